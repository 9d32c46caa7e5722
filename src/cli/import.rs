//! `primed import`: takes in what `primed export` or BuildStream has written.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;

use super::export::EXTENSION;
use super::records::{Records, RecordsArguments};
use super::{Failure, block_on, exit_codes};
use crate::speculation::recording::archive::Incoming;
use crate::speculation::records::interchange::{self, Interchange};
use crate::speculation::records::parent::WeakKey;

/// Read recorded builds from a file, or from all .sa files of a directory.
#[derive(Debug, Args)]
pub struct Arguments {
    /// A buildstream.v2.SpeculativeActions, or a directory of them.
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// The parent that the file is about, where the file does not say it itself: one that primed
    /// has not written. Without this, the file's name is taken for the weak key.
    #[arg(long = "as", env = "PRIMED_AS", value_name = "WEAK_KEY")]
    named: Option<WeakKey>,
    /// Put imported records in the place of other records of the same parent.
    #[arg(long, env = "PRIMED_REPLACE", value_parser = clap::builder::FalseyValueParser::new())]
    replace: bool,
    #[command(flatten)]
    records: RecordsArguments,
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let path = arguments.path;
    let files = match path.is_dir() {
        false => vec![path],
        true if arguments.named.is_some() => {
            let message = "--as names the parent of one file; give it a file, not a directory";
            return Err(Failure::new(exit_codes::USAGE, message));
        }
        true => files_in(&path)?,
    };
    let total = files.len();
    let mut failures = Vec::new();
    let mut messages = Vec::new();
    for file in files {
        match read(&file, arguments.named, arguments.replace) {
            Ok(incoming) => messages.push((file, incoming)),
            Err(failure) => failures.push(failure),
        }
    }
    // A state directory is made only if there is something to put into it.
    if !messages.is_empty() {
        failures.extend(block_on(async {
            let mut records = arguments.records.open(true).await?;
            let mut failures = Vec::new();
            for (file, incoming) in messages {
                failures.extend(import(&mut records, &file, incoming).await.err());
            }
            Ok(failures)
        })?);
    }
    match failures.len() {
        0 => Ok(()),
        1 if total == 1 => Err(failures.remove(0)),
        failed => {
            for failure in failures {
                eprintln!("primed: {}", failure.message);
            }
            let message = format!("{failed} of {total} files were not imported");
            Err(Failure::new(exit_codes::FAILURE, message))
        }
    }
}

fn files_in(directory: &Path) -> Result<Vec<PathBuf>, Failure> {
    let read = || {
        let entries = std::fs::read_dir(directory)?;
        let paths = entries.map(|entry| Ok(entry?.path()));
        paths.collect::<std::io::Result<Vec<_>>>()
    };
    let mut files = read().map_err(|error| cannot_read(directory, &error))?;
    files.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == EXTENSION)
    });
    files.sort_unstable();
    if files.is_empty() {
        let message = format!("there are no .{EXTENSION} files in {}", directory.display());
        return Err(Failure::new(exit_codes::FAILURE, message));
    }
    Ok(files)
}

/// Reads a file, and finds out which parent it is about.
fn read(file: &Path, named: Option<WeakKey>, replace: bool) -> Result<Incoming, Failure> {
    let message = std::fs::read(file).map_err(|error| cannot_read(file, &error))?;
    let message = bytes::Bytes::from(message);
    let read = interchange::read(message.clone());
    let key = match read.map_err(|error| not_imported(file, &error))? {
        Interchange::Records(_) => named,
        Interchange::Foreign(_) => {
            let name = file.file_stem().and_then(|name| name.to_str());
            named.or_else(|| name?.parse().ok())
        }
    };
    Ok(Incoming {
        key,
        message,
        replace,
    })
}

async fn import(records: &mut Records, file: &Path, incoming: Incoming) -> Result<(), Failure> {
    let imported = records.import(incoming).await;
    let imported = imported.map_err(|failure| not_imported(file, &failure.message))?;
    let said = format!("{}: {}\n", imported.weak_key, imported.outcome);
    // It is imported, whether anybody reads of it or not.
    let _ = std::io::stdout().write_all(said.as_bytes());
    Ok(())
}

fn cannot_read(path: &Path, error: &std::io::Error) -> Failure {
    let message = format!("{} cannot be read: {error}", path.display());
    Failure::new(exit_codes::FAILURE, message)
}

fn not_imported(file: &Path, reason: &impl ToString) -> Failure {
    let (file, reason) = (file.display(), reason.to_string());
    Failure::new(
        exit_codes::FAILURE,
        format!("{file} was not imported: {reason}"),
    )
}
