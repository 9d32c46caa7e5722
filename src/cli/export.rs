//! `primed export`: what is recorded of a parent, as a file that others can read.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;

use super::records::{Records, RecordsArguments};
use super::{Failure, block_on, exit_codes};
use crate::speculation::recording::archive::Listed;
use crate::whole_file;

/// What the names of exported files end in.
pub const EXTENSION: &str = "sa";

/// Write what is recorded of a build, or of all, as buildstream.v2.SpeculativeActions.
#[derive(Debug, Args)]
#[command(override_usage = "primed export [OPTIONS] WEAK_KEY FILE\n       \
                            primed export [OPTIONS] --all DIR\n       \
                            primed export [OPTIONS] --list")]
pub struct Arguments {
    /// Write all that is recorded: one file for each parent, WEAK_KEY.sa, in a directory.
    #[arg(long, env = "PRIMED_ALL", value_parser = clap::builder::FalseyValueParser::new(), conflicts_with = "list")]
    all: bool,
    /// Print the weak key, the number of actions and the name of each recorded parent.
    #[arg(long, env = "PRIMED_LIST", value_parser = clap::builder::FalseyValueParser::new())]
    list: bool,
    /// The weak key of a parent, or as much of its beginning as no other has; then the file or
    /// directory to write.
    #[arg(value_names = ["WEAK_KEY", "PATH"], num_args = 0..=2)]
    what: Vec<PathBuf>,
    #[command(flatten)]
    records: RecordsArguments,
}

enum Wanted {
    List,
    All(PathBuf),
    One(String, PathBuf),
}

impl Arguments {
    fn wanted(&mut self) -> Result<Wanted, Failure> {
        let what = std::mem::take(&mut self.what);
        match (self.list, self.all, what.as_slice()) {
            (true, false, []) => Ok(Wanted::List),
            (false, true, [directory]) => Ok(Wanted::All(directory.clone())),
            (false, false, [key, file]) => Ok(Wanted::One(key.display().to_string(), file.clone())),
            _ => {
                let message = "what is to be exported? `primed export WEAK_KEY FILE` writes one \
                               parent, `primed export --all DIR` all of them, and `primed export \
                               --list` shows their weak keys";
                Err(Failure::new(exit_codes::USAGE, message))
            }
        }
    }
}

pub(super) fn run(mut arguments: Arguments) -> Result<(), Failure> {
    let wanted = arguments.wanted()?;
    block_on(async {
        let mut records = arguments.records.open(false).await?;
        let listed = records.list().await?;
        match wanted {
            Wanted::List => print(&list(&listed)),
            Wanted::All(directory) => {
                std::fs::create_dir_all(&directory)
                    .map_err(|error| cannot_write(&directory, &error))?;
                for parent in &listed {
                    let file = directory.join(format!("{}.{EXTENSION}", parent.weak_key));
                    export(&mut records, parent, &file).await?;
                }
                note_what_is_missing(&records);
                Ok(())
            }
            Wanted::One(key, file) => {
                export(&mut records, find(&listed, &key)?, &file).await?;
                note_what_is_missing(&records);
                Ok(())
            }
        }
    })
}

fn list(listed: &[Listed]) -> String {
    let mut text = String::new();
    for parent in listed {
        let instance = match parent.instance.as_str() {
            "" => String::new(),
            named => format!(" (instance {named})"),
        };
        let function = match parent.digest_function.as_str() {
            "" | "SHA256" => String::new(),
            named => format!(" ({named})"),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{} {:>6}  {}{instance}{function}",
            parent.weak_key, parent.actions, parent.label
        );
    }
    text
}

fn print(text: &str) -> Result<(), Failure> {
    let written = std::io::stdout().write_all(text.as_bytes());
    written.map_err(|error| Failure::new(exit_codes::FAILURE, error))
}

/// The parent whose weak key begins with `key`.
fn find<'a>(listed: &'a [Listed], key: &str) -> Result<&'a Listed, Failure> {
    let begins = |parent: &&Listed| !key.is_empty() && parent.weak_key.starts_with(key);
    let mut found = listed.iter().filter(begins);
    match (found.next(), found.next()) {
        (Some(parent), None) => Ok(parent),
        (None, _) => {
            let message = format!(
                "nothing is recorded under the weak key '{key}'; `primed export --list` shows what is"
            );
            Err(Failure::new(exit_codes::FAILURE, message))
        }
        (Some(_), Some(_)) => {
            let message = format!("several weak keys begin with '{key}'; give more of it");
            Err(Failure::new(exit_codes::FAILURE, message))
        }
    }
}

async fn export(records: &mut Records, parent: &Listed, file: &Path) -> Result<(), Failure> {
    let key = parent.weak_key.parse();
    let key = key.map_err(|error| Failure::new(exit_codes::FAILURE, error))?;
    let message = records.export(key).await?;
    whole_file::write(file, &message).map_err(|error| cannot_write(file, &error))?;
    eprintln!("{}: {}", file.display(), parent.label);
    Ok(())
}

fn cannot_write(path: &Path, error: &std::io::Error) -> Failure {
    let path = path.display();
    let message = format!("{path} cannot be written: {error}; is there such a directory?");
    Failure::new(exit_codes::FAILURE, message)
}

fn note_what_is_missing(records: &Records) {
    if matches!(records, Records::Lying { .. }) {
        eprintln!(
            "primed: no primed is running that could read input trees: the actions in what was \
             written have no overlays of their own. primed needs none; others do"
        );
    }
}
