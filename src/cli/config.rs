//! `primed config`: the settings that hold, as a `primed.toml`, each with where it comes from.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, CommandFactory};
use serde::Serialize;

use super::settings::{self, Files, FromFile};
use super::{Cli, Failure, exit_codes};
use crate::config::{Environment, default_jobs, default_threads};

/// The command whose settings are those of all, where these have the same flags.
const MAIN: &str = "serve";

/// Show the settings that hold, as a primed.toml, and where each comes from.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The command whose settings are wanted [default: those of serve, and what the file or the
    /// environment says to others].
    command: Option<String>,
    /// Print one JSON object.
    #[arg(long, env = "PRIMED_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
}

/// A flag, and what holds for it.
#[derive(Debug, PartialEq, Serialize)]
struct Setting {
    key: String,
    /// What is set, as text; `None` if nothing is.
    value: Option<Shown>,
    from: From,
    /// Where exactly, or why.
    #[serde(skip_serializing_if = "Option::is_none")]
    place: Option<String>,
    /// Whether the value is a secret, and left out.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    hidden: bool,
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(untagged)]
enum Shown {
    Switch(bool),
    One(String),
    List(Vec<String>),
}

/// Where a setting comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum From {
    Default,
    File,
    Environment,
}

#[derive(Serialize)]
struct Page {
    files: Vec<String>,
    commands: Vec<OfCommand>,
}

#[derive(Serialize)]
struct OfCommand {
    command: String,
    settings: Vec<Setting>,
}

pub(super) fn run(
    arguments: Arguments,
    named: Option<&Path>,
    environment: &Environment,
) -> Result<(), Failure> {
    let command = Cli::command();
    let files = Files::load(&command, named, environment)?;
    let all: Vec<&str> = settings::commands(&command).collect();
    let mut commands = Vec::new();
    for name in &all {
        let (matches, below) = files.effective(&command, name)?;
        let settings = files.flags(name);
        let settings = settings.map(|arg| setting(arg, &matches, &below, environment));
        commands.push(OfCommand {
            command: (*name).to_owned(),
            settings: settings.collect(),
        });
    }
    match &arguments.command {
        Some(wanted) if all.contains(&wanted.as_str()) => {
            commands.retain(|one| one.command == *wanted);
        }
        Some(wanted) => {
            let message = format!(
                "no command '{wanted}' has settings; {} have",
                all.join(", ")
            );
            return Err(Failure::new(exit_codes::USAGE, message));
        }
        None => leave_out_what_is_said_by_main(&mut commands),
    }
    let page = Page {
        files: files
            .paths()
            .map(|path| path.display().to_string())
            .collect(),
        commands,
    };
    let text = match arguments.json {
        true => serde_json::to_string_pretty(&page).map(|text| text + "\n"),
        false => Ok(toml(&page, environment)),
    };
    let text = text.map_err(|error| Failure::new(exit_codes::FAILURE, error))?;
    let written = std::io::stdout().write_all(text.as_bytes());
    written.map_err(|error| Failure::new(exit_codes::FAILURE, error))
}

/// Of the other commands only what the file or the environment says to them alone.
fn leave_out_what_is_said_by_main(commands: &mut Vec<OfCommand>) {
    let Some(at) = commands.iter().position(|one| one.command == MAIN) else {
        return;
    };
    let main = commands.remove(at);
    for other in commands.iter_mut() {
        let differs = |setting: &mut Setting| {
            setting.from != From::Default && !main.settings.contains(setting)
        };
        other.settings = other.settings.extract_if(.., differs).collect();
    }
    commands.retain(|other| !other.settings.is_empty());
    commands.insert(0, main);
}

/// What holds for the flag `arg`.
fn setting(
    arg: &Arg,
    matches: &ArgMatches,
    below: &[FromFile<'_>],
    environment: &Environment,
) -> Setting {
    let id = arg.get_id().as_str();
    let key = arg.get_long().unwrap_or_default();
    let values: Option<Vec<String>> = matches.try_get_raw(id).ok().flatten().map(|raw| {
        let values = raw.map(|value| value.to_string_lossy().into_owned());
        values.collect()
    });
    let in_file = below.iter().find(|one| one.is_of(id));
    let (from, place) = match (in_file, matches.value_source(id)) {
        (Some(one), _) => (From::File, Some(one.place().to_string())),
        (None, Some(ValueSource::EnvVariable)) => {
            // All are named alike (there is a test).
            let variable = format!("PRIMED_{}", key.replace('-', "_").to_uppercase());
            (From::Environment, Some(variable))
        }
        _ => (From::Default, None),
    };
    let mut setting = Setting {
        key: key.to_owned(),
        value: None,
        from,
        place,
        hidden: arg.is_hide_env_values_set() && from != From::Default,
    };
    setting.value = match (arg.get_action(), values) {
        _ if setting.hidden => values_hidden(matches, id),
        (ArgAction::SetTrue | ArgAction::SetFalse, _) => {
            let on = matches.try_get_one::<bool>(id).ok().flatten();
            Some(Shown::Switch(on.copied().unwrap_or_default()))
        }
        (ArgAction::Append, Some(values)) => Some(Shown::List(values)),
        (_, Some(values)) => Some(Shown::One(values.join(" "))),
        // An empty list in the file.
        (ArgAction::Append, None) if from == From::File => Some(Shown::List(Vec::new())),
        (_, None) => match derived(key, environment) {
            Some((value, how)) => {
                setting.place = Some(how);
                value
            }
            None => {
                setting.place = default_in_help(arg);
                None
            }
        },
    };
    setting
}

/// The names of headers, and nothing of their values.
fn values_hidden(matches: &ArgMatches, id: &str) -> Option<Shown> {
    let raw = matches.try_get_raw(id).ok().flatten()?;
    let names = raw.map(|value| {
        let value = value.to_string_lossy();
        match value.split_once([':', '=']) {
            Some((name, _)) => format!("{}: …", name.trim()),
            None => "…".to_owned(),
        }
    });
    Some(Shown::List(names.collect()))
}

/// Defaults that depend on the machine or the user, and what they are made of.
fn derived(key: &str, environment: &Environment) -> Option<(Option<Shown>, String)> {
    let (value, how) = match key {
        "listen" => {
            let listen = environment.default_listen();
            (
                listen.map(|one| Shown::List(vec![one.to_string()])),
                "XDG_RUNTIME_DIR",
            )
        }
        "admin" => {
            let admin = environment.default_admin();
            (
                admin.map(|one| Shown::One(one.to_string())),
                "XDG_RUNTIME_DIR",
            )
        }
        "state-dir" => {
            let dir = environment.default_state_dir();
            (
                dir.map(|dir| Shown::One(dir.display().to_string())),
                "XDG_STATE_HOME",
            )
        }
        "cache-dir" => {
            let dir = environment.default_cache_dir();
            (
                dir.map(|dir| Shown::One(dir.display().to_string())),
                "XDG_CACHE_HOME",
            )
        }
        "jobs" => {
            let cores = default_jobs().to_string();
            (Ok(Shown::One(cores)), "one for each core")
        }
        "threads" => {
            let threads = default_threads().to_string();
            (Ok(Shown::One(threads)), "one for each core, 8 at most")
        }
        _ => return None,
    };
    Some(match value {
        Ok(value) => (Some(value), how.to_owned()),
        Err(error) => (None, error.to_string()),
    })
}

/// What the help says in `[default: …]`.
fn default_in_help(arg: &Arg) -> Option<String> {
    let help = arg.get_help()?.to_string();
    let (_, default) = help.rsplit_once("[default: ")?;
    Some(default.strip_suffix(']')?.replace('\n', " "))
}

fn toml(page: &Page, environment: &Environment) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = match page.files.as_slice() {
        [] => {
            let places = environment.config_files();
            let places = places.iter().map(|path| path.display().to_string());
            let places = places.collect::<Vec<_>>().join(", ");
            writeln!(
                text,
                "# No configuration file is in use; it would stand in {places}"
            )
        }
        files => writeln!(
            text,
            "# In use, the first outweighs the others: {}",
            files.join(", ")
        ),
    };
    for one in &page.commands {
        if one.command != MAIN {
            let _ = writeln!(text, "\n[{}]", one.command);
        }
        for setting in &one.settings {
            let _ = writeln!(text, "\n# {}\n{}", origin(setting), assignment(setting));
        }
    }
    text
}

fn origin(setting: &Setting) -> String {
    let place = setting.place.as_deref();
    let origin = match (setting.from, &setting.value, place) {
        (From::Default, Some(_), Some(how)) => format!("default, by {how}"),
        (From::Default, Some(_), None) => "default".to_owned(),
        (From::Default, None, Some(why)) => format!("default: {why}"),
        (From::Default, None, None) => "not set".to_owned(),
        (From::File | From::Environment, _, place) => place.unwrap_or_default().to_owned(),
    };
    match setting.hidden {
        true => origin + " (values are not shown)",
        false => origin,
    }
}

/// What is not set or not shown is a comment, so that the output can be used as a file.
fn assignment(setting: &Setting) -> String {
    let value = match &setting.value {
        None => "".to_owned(),
        Some(Shown::Switch(on)) => on.to_string(),
        Some(Shown::One(text)) => scalar(text),
        Some(Shown::List(texts)) => {
            let texts: Vec<_> = texts.iter().map(|text| scalar(text)).collect();
            format!("[{}]", texts.join(", "))
        }
    };
    let comment = if setting.value.is_none() || setting.hidden {
        "# "
    } else {
        ""
    };
    format!("{comment}{} = {value}", setting.key)
        .trim_end()
        .to_owned()
}

/// A number as it is, everything else in quotes.
fn scalar(text: &str) -> String {
    let is_number = |number: f64| number.is_finite() && number.to_string() == text;
    match text.parse() {
        Ok(number) if is_number(number) => text.to_owned(),
        // What JSON escapes, TOML escapes alike; but DEL, which must be in TOML.
        _ => serde_json::Value::from(text)
            .to_string()
            .replace('\x7f', "\\u007f"),
    }
}
