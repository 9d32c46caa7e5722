//! The settings of every command: what the command line and the environment leave open is taken
//! from `primed.toml`, under the flags' own names, and what that leaves open is a default.
//!
//! A value of the file is handed to the parser as if its flag had been given, so what a flag takes,
//! needs and excludes holds for the file as well, and a new flag can be set there without being
//! mentioned here.

use std::error::Error as _;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, ValueHint};

use super::{Failure, exit_codes};
use crate::config::Environment;
use crate::config::file::{self, ConfigFile, Entry, Place, Value};

/// What no file can say: where it is itself, and that nothing is to be done.
const NOT_IN_A_FILE: [&str; 3] = ["config", "help", "version"];
/// Commands that shells run when they start: a slip in the file is no reason not to complete.
const WITHOUT_FILE: [&str; 2] = ["completions", "man"];
/// How much a name must be like another to be mistaken for it, up to 1.
const ALIKE: f64 = 0.6;

/// Why a command does not run.
#[derive(Debug)]
pub(super) enum Stopped {
    /// The parser has something to say: an error, or help that was asked for.
    Said(Box<clap::Error>),
    /// A file is wrong.
    Failed(Failure),
}

impl From<clap::Error> for Stopped {
    fn from(error: clap::Error) -> Self {
        Stopped::Said(Box::new(error))
    }
}

impl From<Failure> for Stopped {
    fn from(failure: Failure) -> Self {
        Stopped::Failed(failure)
    }
}

/// What `typed` and all that stands behind it say.
pub(super) fn parse(
    command: &Command,
    typed: Vec<OsString>,
    environment: &Environment,
) -> Result<ArgMatches, Stopped> {
    let first = command.clone().ignore_errors(true);
    let first = first.try_get_matches_from(&typed)?;
    let Some((name, given)) = first.subcommand() else {
        return Ok(command.clone().try_get_matches_from(typed)?);
    };
    if !commands(command).any(|one| one == name) {
        return Ok(command.clone().try_get_matches_from(typed)?);
    }
    let named = given.try_get_one::<PathBuf>("config").ok().flatten();
    let files = Files::load(command, named.map(PathBuf::as_path), environment)?;
    let below = files.below(name, given)?;
    let mut arguments = typed;
    let after = subcommand_at(command, &arguments, name);
    let additions = below.iter().flat_map(|one| one.arguments.iter().cloned());
    arguments.splice(after..after, additions);
    let parsed = command.clone().try_get_matches_from(arguments);
    parsed.map_err(|error| said(error, &below))
}

/// The files, checked against the flags that there are.
pub(super) struct Files<'a> {
    command: Command,
    files: Vec<ConfigFile>,
    environment: &'a Environment,
}

/// A setting of a file that nothing outweighs.
pub(super) struct FromFile<'a> {
    id: &'a str,
    entry: &'a Entry,
    /// As if it had been typed.
    arguments: Vec<OsString>,
}

impl<'a> Files<'a> {
    /// Reads the files and looks at every name in them.
    pub(super) fn load(
        command: &Command,
        named: Option<&Path>,
        environment: &'a Environment,
    ) -> Result<Self, Failure> {
        let files = file::load(named, environment);
        let files = files.map_err(|error| Failure::new(exit_codes::USAGE, error))?;
        let mut command = command.clone();
        command.build();
        // A value of the file is to be judged by itself.
        let command = command.mut_subcommands(|sub| sub.mut_args(|arg| arg.env(Resettable::Reset)));
        let known = Known(&command);
        for file in &files {
            for (table, at) in &file.tables {
                known.check_table(table, at)?;
            }
            for entry in &file.entries {
                known.check_key(entry)?;
            }
        }
        Ok(Files {
            command,
            files,
            environment,
        })
    }

    /// Where they stand.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// The flags of the command `name`.
    pub(super) fn flags(&self, name: &str) -> impl Iterator<Item = &Arg> {
        flags(self.command.find_subcommand(name))
    }

    /// What the files say to the command `name`, where neither the command line nor the environment
    /// says something.
    pub(super) fn below(
        &self,
        name: &str,
        given: &ArgMatches,
    ) -> Result<Vec<FromFile<'_>>, Failure> {
        let mut below = Vec::new();
        for arg in self.flags(name) {
            let id = arg.get_id().as_str();
            let source = given.try_contains_id(id).ok();
            let source = source.and_then(|_| given.value_source(id));
            if source.is_some_and(|source| source != ValueSource::DefaultValue) {
                continue;
            }
            if let Some(entry) = self.entry(name, arg.get_long().unwrap_or_default()) {
                let arguments = self.arguments(name, arg, entry)?;
                below.push(FromFile {
                    id,
                    entry,
                    arguments,
                });
            }
        }
        Ok(below)
    }

    /// The settings of the command `name` where nothing is typed, and which of them are a file's.
    pub(super) fn effective(
        &self,
        command: &Command,
        name: &str,
    ) -> Result<(ArgMatches, Vec<FromFile<'_>>), Failure> {
        let program = [OsString::from("primed"), OsString::from(name)];
        // What is missing to run the command is of no interest here; what is wrong is.
        let command = command.clone();
        let command = command.mut_subcommands(|sub| sub.arg_required_else_help(false));
        let of_command = |arguments: Vec<OsString>| {
            let strict = command.clone().try_get_matches_from(&arguments);
            let wrong = strict.err().filter(is_about_a_value);
            let matches = match wrong {
                Some(error) => Err(error),
                None => command
                    .clone()
                    .ignore_errors(true)
                    .try_get_matches_from(arguments),
            };
            let mut matches = matches.map_err(|error| of_parser(&error, ""))?;
            Ok::<_, Failure>(matches.remove_subcommand().unwrap_or_default().1)
        };
        let below = self.below(name, &of_command(program.to_vec())?)?;
        let additions = below.iter().flat_map(|one| one.arguments.iter().cloned());
        let matches = of_command(program.iter().cloned().chain(additions).collect())?;
        Ok((matches, below))
    }

    /// The entry that counts: the first file's, and there the command's own.
    fn entry(&self, command: &str, key: &str) -> Option<&Entry> {
        self.files.iter().find_map(|file| {
            let named = |table: Option<&str>| {
                let mut entries = file.entries.iter();
                entries.find(|entry| entry.key == key && entry.command.as_deref() == table)
            };
            named(Some(command)).or_else(|| named(None))
        })
    }

    /// `entry` as the arguments that say the same.
    fn arguments(&self, command: &str, arg: &Arg, entry: &Entry) -> Result<Vec<OsString>, Failure> {
        let flag = format!("--{}", entry.key);
        let values = match wanted(arg, &entry.value) {
            Ok(Given::Nothing) => return Ok(Vec::new()),
            Ok(Given::Flag) => return Ok(vec![flag.into()]),
            Ok(Given::Values(values)) => values,
            Err(wanted) => return Err(wrong(entry, &wanted)),
        };
        let mut arguments = Vec::with_capacity(values.len());
        for value in values {
            let value = self.placed(arg, value, &entry.value_at)?;
            let argument = OsString::from(format!("{flag}={value}"));
            self.judge(command, arg, entry, &argument)?;
            arguments.push(argument);
        }
        Ok(arguments)
    }

    /// Relative paths are meant from the file's directory, and `~/` from the user's.
    fn placed(&self, arg: &Arg, value: String, at: &Place) -> Result<String, Failure> {
        let (scheme, path) = match value.strip_prefix("unix:") {
            Some(path) => ("unix:", path.strip_prefix("//").unwrap_or(path)),
            None if is_path(arg) => ("", value.as_str()),
            None => return Ok(value),
        };
        let base = match (path.strip_prefix("~/"), at.file.parent()) {
            _ if path.is_empty() => return Ok(value),
            (Some(_), _) => self.environment.home.as_deref().ok_or_else(|| {
                let message = format!("{at}: HOME is not set, so there is no ~/");
                Failure::new(exit_codes::USAGE, message)
            })?,
            (None, directory) => directory.unwrap_or(Path::new("/")),
        };
        let path = base.join(path.strip_prefix("~/").unwrap_or(path));
        Ok(format!("{scheme}{}", path.display()))
    }

    /// Whether the flag takes this value.
    fn judge(
        &self,
        command: &str,
        arg: &Arg,
        entry: &Entry,
        argument: &OsString,
    ) -> Result<(), Failure> {
        let alone = [
            OsString::from("primed"),
            OsString::from(command),
            argument.clone(),
        ];
        let Err(error) = self.command.clone().try_get_matches_from(alone) else {
            return Ok(());
        };
        // Whatever else is missing or too much shows when all is put together.
        if !is_about_a_value(&error) {
            return Ok(());
        }
        let reason = match (error.source(), error.get(ContextKind::ValidValue)) {
            (Some(source), _) => source.to_string(),
            (None, Some(ContextValue::Strings(values))) => {
                format!("one of {} is wanted", values.join(", "))
            }
            _ => "the flag takes no such value".to_owned(),
        };
        match arg.is_hide_env_values_set() {
            true => Err(wrong(entry, &reason)),
            false => {
                let argument = argument.to_string_lossy();
                let value = argument.split_once('=').map_or("", |(_, value)| value);
                let already = reason.contains(&format!("'{value}'"));
                let reason = match already {
                    true => reason,
                    false => format!("'{value}' cannot be used: {reason}"),
                };
                Err(wrong(entry, &reason))
            }
        }
    }
}

impl FromFile<'_> {
    /// Whether it is about the argument `id`.
    pub(super) fn is_of(&self, id: &str) -> bool {
        self.id == id
    }

    /// Where it stands.
    pub(super) fn place(&self) -> &Place {
        &self.entry.value_at
    }
}

/// What a flag is given.
enum Given {
    Nothing,
    Flag,
    Values(Vec<String>),
}

/// What `value` gives the flag `arg`, or what is wanted instead.
fn wanted(arg: &Arg, value: &Value) -> Result<Given, String> {
    let name = arg.get_value_names().and_then(|names| names.first());
    let name = name.map_or("a value", |name| name.as_str());
    let is_list = matches!(arg.get_action(), ArgAction::Append);
    match (arg.get_action(), value) {
        (ArgAction::SetTrue | ArgAction::SetFalse, Value::Switch(true)) => Ok(Given::Flag),
        (ArgAction::SetTrue | ArgAction::SetFalse, Value::Switch(false)) => Ok(Given::Nothing),
        (ArgAction::SetTrue | ArgAction::SetFalse, _) => {
            Err("true or false is wanted, without quotes".to_owned())
        }
        (_, Value::Switch(on)) if takes_no_value(arg) => Ok(match on {
            true => Given::Flag,
            false => Given::Nothing,
        }),
        (_, Value::Text(text)) => Ok(Given::Values(match arg.get_value_delimiter() {
            // Each part may be a path of its own.
            Some(delimiter) => text.split(delimiter).map(str::to_owned).collect(),
            None => vec![text.clone()],
        })),
        (_, Value::List(texts)) if is_list => Ok(Given::Values(texts.clone())),
        (_, Value::List(_)) => Err(format!("one {name} is wanted, not a list")),
        (_, Value::Switch(_)) => Err(format!("{name} is wanted, not true or false")),
        (_, Value::Other(what)) => Err(format!("{name} is wanted, not {what}")),
    }
}

fn takes_no_value(arg: &Arg) -> bool {
    arg.get_num_args()
        .is_some_and(|range| range.min_values() == 0)
}

fn is_path(arg: &Arg) -> bool {
    matches!(
        arg.get_value_hint(),
        ValueHint::AnyPath | ValueHint::FilePath | ValueHint::DirPath | ValueHint::ExecutablePath
    )
}

fn wrong(entry: &Entry, reason: &str) -> Failure {
    let message = format!("{}: {}: {reason}", entry.value_at, entry.key);
    Failure::new(exit_codes::USAGE, message)
}

/// The flags of a command that a file can set.
fn flags(command: Option<&Command>) -> impl Iterator<Item = &Arg> {
    let arguments = command.into_iter().flat_map(Command::get_arguments);
    arguments.filter(|arg| {
        let flag = arg.get_long();
        flag.is_some_and(|flag| !NOT_IN_A_FILE.contains(&flag))
    })
}

/// The commands that have settings: those that primed starts itself have none.
pub(super) fn commands(command: &Command) -> impl Iterator<Item = &str> {
    let commands = command.get_subcommands();
    let names = commands
        .filter(|sub| !sub.is_hide_set())
        .map(Command::get_name);
    names.filter(|name| *name != "help" && !WITHOUT_FILE.contains(name))
}

/// All commands and flags.
struct Known<'a>(&'a Command);

impl Known<'_> {
    fn check_table(&self, name: &str, at: &Place) -> Result<(), Failure> {
        if self.commands().any(|command| command == name) {
            return Ok(());
        }
        let hint = match self.commands_with(name).is_empty() {
            false => format!("{name} is a flag, not a command; write {name} = …"),
            true => match nearest(name, self.commands()) {
                Some(near) => format!("did you mean [{near}]?"),
                None => "tables are named like the commands of primed".to_owned(),
            },
        };
        Err(unknown(at, &format!("[{name}]"), &hint))
    }

    fn check_key(&self, entry: &Entry) -> Result<(), Failure> {
        let key = entry.key.as_str();
        if NOT_IN_A_FILE.contains(&key) {
            let hint = "a file cannot say this";
            return Err(unknown(&entry.key_at, key, hint));
        }
        let having = self.commands_with(key);
        let hint = match &entry.command {
            Some(command) if having.contains(&command.as_str()) => return Ok(()),
            None if !having.is_empty() => return Ok(()),
            Some(command) if !having.is_empty() => {
                format!(
                    "primed {command} has no --{key}, but {} has",
                    having.join(", ")
                )
            }
            Some(command) => match nearest(key, self.flags_of(command)) {
                Some(near) => format!("did you mean {near}?"),
                None => format!("primed {command} --help shows what there is"),
            },
            None if self.commands().any(|command| command == key) => {
                format!("a command has a table: [{key}]")
            }
            None => {
                let all = self.commands().flat_map(|command| self.flags_of(command));
                match nearest(key, all) {
                    Some(near) => format!("did you mean {near}?"),
                    None => "primed config shows what there is".to_owned(),
                }
            }
        };
        Err(unknown(&entry.key_at, key, &hint))
    }

    fn commands(&self) -> impl Iterator<Item = &str> {
        commands(self.0)
    }

    fn flags_of(&self, command: &str) -> impl Iterator<Item = &str> {
        flags(self.0.find_subcommand(command)).filter_map(Arg::get_long)
    }

    fn commands_with(&self, key: &str) -> Vec<&str> {
        let has = |command: &&str| self.flags_of(command).any(|flag| flag == key);
        self.commands().filter(has).collect()
    }
}

fn unknown(at: &Place, key: &str, hint: &str) -> Failure {
    let message = format!("{at}: {key} is not known here; {hint}");
    Failure::new(exit_codes::USAGE, message)
}

/// The name that `key` was most likely meant to be.
fn nearest<'a>(key: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let key = key.to_lowercase().replace('_', "-");
    let likeness = names.map(|name| (strsim::normalized_damerau_levenshtein(&key, name), name));
    let best = likeness.max_by(|one, other| one.0.total_cmp(&other.0));
    best.filter(|(likeness, _)| *likeness >= ALIKE)
        .map(|(_, name)| name)
}

/// Where, in `typed`, what follows the subcommand begins.
fn subcommand_at(command: &Command, typed: &[OsString], name: &str) -> usize {
    let takes_value = |flag: &str| {
        let mut arguments = command.get_arguments();
        let arg = arguments.find(|arg| arg.get_long() == Some(flag));
        arg.is_some_and(|arg| arg.get_action().takes_values())
    };
    let mut index = 1;
    while let Some(one) = typed.get(index) {
        index += 1;
        match one.to_str() {
            Some(text) if text == name => return index,
            Some(text) if text.strip_prefix("--").is_some_and(takes_value) => index += 1,
            _ => {}
        }
    }
    typed.len()
}

/// What the parser said, with the places of those flags in it that nobody has typed.
fn said(error: clap::Error, below: &[FromFile<'_>]) -> Stopped {
    let text = error.to_string();
    let named = |flag: &str| {
        let mut found = text.match_indices(flag);
        found.any(|(at, _)| {
            !text[at + flag.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '-')
        })
    };
    let hints: String = below
        .iter()
        .filter(|one| !one.arguments.is_empty() && named(&format!("--{}", one.entry.key)))
        .map(|one| format!("\n--{} stands in {}", one.entry.key, one.entry.key_at))
        .collect();
    match hints.is_empty() {
        true => error.into(),
        false => of_parser(&error, &format!("\n{hints}")).into(),
    }
}

/// What the parser said, and something more.
fn of_parser(error: &clap::Error, more: &str) -> Failure {
    let text = error.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text).trim_end();
    Failure::new(exit_codes::USAGE, format!("{text}{more}"))
}

fn is_about_a_value(error: &clap::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::InvalidValue
            | ErrorKind::ValueValidation
            | ErrorKind::TooManyValues
            | ErrorKind::TooFewValues
            | ErrorKind::WrongNumberOfValues
            | ErrorKind::NoEquals
            | ErrorKind::InvalidUtf8
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// A value that `arg` takes, as TOML.
    fn sample(arg: &Arg) -> String {
        let possible = arg.get_possible_values();
        if !arg.get_action().takes_values() {
            return "true".to_owned();
        }
        let taken = |text: &&str| {
            let command = Command::new("primed").subcommand(
                Command::new("one").arg(
                    Arg::new("it")
                        .long("it")
                        .value_parser(arg.get_value_parser().clone()),
                ),
            );
            let argument = format!("--it={text}");
            command
                .try_get_matches_from(["primed", "one", &argument])
                .is_ok()
        };
        let named = possible.first().map(|value| value.get_name().to_owned());
        let named = named.unwrap_or_else(|| {
            let hash = "0".repeat(64);
            let samples = [
                "7",
                "7G",
                "7s",
                "unix:/a",
                "/bin/sh",
                "a=b",
                "auto",
                hash.as_str(),
            ];
            let found = samples.into_iter().find(|sample| taken(sample));
            found
                .unwrap_or_else(|| panic!("no sample for --{:?}", arg.get_long()))
                .to_owned()
        });
        let quoted = format!("'{named}'");
        match arg.get_action() {
            ArgAction::Append => format!("[{quoted}]"),
            _ => quoted,
        }
    }

    fn given(command: &str, text: &str) -> Result<(ArgMatches, Vec<(String, Place)>), Failure> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("primed.toml");
        std::fs::write(&path, text).unwrap();
        let environment = Environment::default();
        let cli = super::super::Cli::command().mut_subcommands(|sub| {
            // The variables of whoever runs the tests outweigh the file.
            sub.mut_args(|arg| arg.env(Resettable::Reset))
        });
        let files = Files::load(&cli, Some(&path), &environment)?;
        let (matches, below) = files.effective(&cli, command)?;
        let places = below
            .iter()
            .map(|one| (one.id.to_owned(), one.place().clone()));
        Ok((matches, places.collect()))
    }

    #[test]
    fn every_flag_of_every_command_can_be_set_in_a_file() {
        let mut command = super::super::Cli::command();
        command.build();
        let mut seen = 0;
        for sub in commands(&command) {
            for arg in flags(command.find_subcommand(sub)) {
                let (id, key) = (arg.get_id().as_str(), arg.get_long().unwrap());
                let line = format!("{key} = {}", sample(arg));
                for text in [line.clone(), format!("[{sub}]\n{line}")] {
                    let (matches, places) = given(sub, &text)
                        .unwrap_or_else(|failure| panic!("{sub}: {text}: {}", failure.message));
                    let source = matches.value_source(id);
                    assert_eq!(source, Some(ValueSource::CommandLine), "{sub}: {text}");
                    assert_eq!(places[0].0, id);
                }
                seen += 1;
            }
        }
        assert!(seen > 30, "{seen}");
    }

    #[test]
    fn the_subcommand_is_found_behind_flags_whose_values_look_like_it() {
        let command = super::super::Cli::command();
        let at = |typed: &[&str]| {
            let typed: Vec<OsString> = typed.iter().map(OsString::from).collect();
            subcommand_at(&command, &typed, "serve")
        };
        assert_eq!(at(&["primed", "serve", "--mode", "serve"]), 2);
        assert_eq!(at(&["primed", "--config", "serve", "serve", "x"]), 4);
        assert_eq!(at(&["primed", "--log-level=serve", "serve"]), 3);
    }
}
