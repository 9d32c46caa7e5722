//! `primed man`: the manual pages, made of the same definition as `--help`.

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_mangen::Man;

use super::{Cli, Failure, exit_codes};

/// Print a manual page, e.g. for `primed man | man -l -`, or write them all.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The command whose page is wanted [default: that of primed itself].
    command: Option<String>,
    /// Write the pages of primed and of all its commands into this directory.
    #[arg(
        long,
        env = "PRIMED_DIR",
        value_name = "DIR",
        conflicts_with = "command"
    )]
    dir: Option<PathBuf>,
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::new(exit_codes::FAILURE, error);
    if let Some(dir) = arguments.dir {
        let written = std::fs::create_dir_all(&dir).and_then(|()| {
            let mut pages = pages()?.into_iter();
            pages.try_for_each(|(name, page)| std::fs::write(dir.join(name), page))
        });
        return written.map_err(|error| {
            let message = format!("cannot write to {}: {error}", dir.display());
            Failure::new(exit_codes::FAILURE, message)
        });
    }
    let wanted = match &arguments.command {
        Some(command) => format!("primed-{command}.1"),
        None => "primed.1".to_owned(),
    };
    let mut pages = pages().map_err(failed)?.into_iter();
    let Some((_, page)) = pages.find(|(name, _)| *name == wanted) else {
        let command = arguments.command.unwrap_or_default();
        let message =
            format!("primed has no command '{command}'; primed --help shows which it has");
        return Err(Failure::new(exit_codes::USAGE, message));
    };
    std::io::stdout().write_all(&page).map_err(failed)
}

/// Each page, and the name of its file.
pub(super) fn pages() -> std::io::Result<Vec<(String, Vec<u8>)>> {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let commands = std::iter::once(&command).chain(command.get_subcommands());
    let commands = commands.filter(|command| !command.is_hide_set());
    commands
        .map(|command| {
            let man = Man::new(command.clone()).manual("primed");
            let mut page = Vec::new();
            man.render(&mut page)?;
            Ok((man.get_filename(), page))
        })
        .collect()
}
