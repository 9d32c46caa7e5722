//! `primed completions`: what a shell needs to know to complete primed's commands and flags.

use std::io::Write;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Failure, exit_codes};

/// Print the completions of a shell, e.g. for `source <(primed completions bash)`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let written = std::io::stdout().write_all(&script(arguments.shell));
    written.map_err(|error| Failure::new(exit_codes::FAILURE, error))
}

/// The completions of `shell`.
pub(super) fn script(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "primed", &mut script);
    script
}
