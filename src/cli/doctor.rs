//! `primed doctor`: looks at all that primed depends on, and says what to do about what is wrong.
//! Each check is a function from the surroundings to findings; they stand in lists.

mod backend;
mod clients;
mod files;
mod machine;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::{Failure, admin_client, block_on, exit_codes};
use crate::address::{Address, ListenAddress};
use crate::config::{Config, Environment};
use crate::server::STATUS_PATH;

/// Check all that primed depends on, and say how to fix what is wrong.
///
/// Looks at recc, buildbox-casd, sockets, directories, the environment, the kernel, and the backend,
/// which executes one trivial action. Exit code 1 if anything is an error.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Print one JSON object for each finding.
    #[arg(long, env = "PRIMED_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
    /// Backend to look at [default: that of the primed that runs, else what `primed serve` takes].
    #[arg(long, env = "PRIMED_UPSTREAM", value_name = "ADDR")]
    upstream: Option<Address>,
    /// Where records are kept [default: $XDG_STATE_HOME/primed].
    #[arg(long, env = "PRIMED_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Admin socket of the primed to look at [default: unix:$XDG_RUNTIME_DIR/primed/admin.sock].
    #[arg(long, env = "PRIMED_ADMIN", value_name = "ADDR")]
    admin: Option<Address>,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Something works less well than it could.
    Warning,
    /// Something does not work.
    Error,
}

/// What a check has found.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, message: impl Into<String>) -> Self {
        Finding {
            check,
            verdict: Verdict::Ok,
            message: message.into(),
            hint: None,
        }
    }

    fn warning(check: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Finding {
            verdict: Verdict::Warning,
            hint: Some(hint.into()),
            ..Finding::ok(check, message)
        }
    }

    fn error(check: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Finding {
            verdict: Verdict::Error,
            ..Finding::warning(check, message, hint)
        }
    }
}

/// What is looked at.
struct Surroundings {
    variables: BTreeMap<String, String>,
    environment: Environment,
    upstream: Option<Address>,
    /// What the primed that runs says of itself.
    running: Option<Value>,
    admin: Option<Address>,
    /// Where clients connect by default.
    listen: Option<Address>,
    state_dir: Option<PathBuf>,
    /// Where the embedded backend keeps its blobs, if that is the one.
    cache_dir: Option<PathBuf>,
    /// What `primed serve` would do with these variables, or why it would not.
    settings: Result<Config, String>,
    /// `/proc`, or what stands for it.
    proc: PathBuf,
}

type Check = fn(&Surroundings) -> Vec<Finding>;

/// All that can be seen at once. Beside these there are those that have to wait for others:
/// `clients::probe`, `backend::capabilities` and `backend::execution`.
const CHECKS: &[Check] = &[
    clients::recc,
    clients::casd,
    clients::servers,
    clients::defeaters,
    clients::wrappers,
    clients::epoch,
    settings,
    daemon,
    files::runtime_directory,
    files::sockets,
    files::state_directory,
    files::cache_directory,
    machine::processes,
    machine::peers,
    machine::sandbox,
    machine::watches,
    machine::descriptors,
    machine::clock,
];

impl Surroundings {
    fn of_process(arguments: Arguments, file: Option<&Path>) -> Self {
        let environment = Environment::of_process();
        let admin = arguments.admin;
        let listen = std::env::var("PRIMED_LISTEN").ok();
        let listen = listen.and_then(|text| text.split(',').next()?.parse().ok());
        let listen = listen.or_else(|| environment.default_listen().ok());
        let state_dir = arguments.state_dir;
        let upstream = arguments.upstream;
        let settings = super::serve::settings(upstream.as_ref(), file, &environment);
        let embedded = settings.as_ref().ok();
        let embedded = embedded.and_then(|settings| settings.embedded.as_ref());
        Surroundings {
            variables: std::env::vars_os()
                .map(|(name, value)| {
                    let text = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
                    (text(name), text(value))
                })
                .collect(),
            cache_dir: embedded.map(|embedded| embedded.cache_dir.clone()),
            settings: settings.map_err(|failure| failure.message),
            admin: admin.or_else(|| environment.default_admin().ok()),
            listen: match listen {
                Some(ListenAddress::At(address)) => Some(address),
                _ => None,
            },
            state_dir: state_dir.or_else(|| environment.default_state_dir().ok()),
            upstream,
            running: None,
            environment,
            proc: "/proc".into(),
        }
    }

    /// A variable that is set to something.
    fn variable(&self, name: &str) -> Option<&str> {
        let value = self.variables.get(name).map(String::as_str);
        value.filter(|value| !value.is_empty())
    }

    /// Where `program` is found.
    fn find(&self, program: &str) -> Option<PathBuf> {
        let path = self.variable("PATH")?;
        let mut places = std::env::split_paths(path).map(|place| place.join(program));
        places.find(|place| place.is_file())
    }

    /// The first line of a file in `/proc`.
    fn read(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.proc.join(path)).ok()
    }

    fn is_root(&self) -> bool {
        rustix::process::geteuid().is_root()
    }
}

pub(super) fn run(arguments: Arguments, file: Option<&Path>) -> Result<(), Failure> {
    // What connections log is found below, in other words.
    let _quiet = tracing::subscriber::set_default(tracing::subscriber::NoSubscriber::new());
    let json = arguments.json;
    let mut surroundings = Surroundings::of_process(arguments, file);
    let findings = block_on(async {
        if let Some(admin) = &surroundings.admin
            && let Ok(page) = admin_client::get(admin, STATUS_PATH).await
        {
            surroundings.running = serde_json::from_slice(&page).ok();
        }
        let mut findings: Vec<Finding> = Vec::new();
        findings.extend(CHECKS.iter().flat_map(|check| check(&surroundings)));
        findings.extend(clients::probe(&surroundings).await);
        findings.extend(backend::check(&surroundings).await);
        Ok(findings)
    })?;
    let text = match json {
        true => as_json(&findings)?,
        false => for_people(&findings),
    };
    let written = std::io::stdout().write_all(text.as_bytes());
    written.map_err(|error| Failure::new(exit_codes::FAILURE, error))?;
    let errors = findings.iter().filter(|one| one.verdict == Verdict::Error);
    match errors.count() {
        0 => Ok(()),
        1 => Err(Failure::new(
            exit_codes::FAILURE,
            "one check found an error",
        )),
        errors => {
            let message = format!("{errors} checks found errors");
            Err(Failure::new(exit_codes::FAILURE, message))
        }
    }
}

fn as_json(findings: &[Finding]) -> Result<String, Failure> {
    let lines = findings.iter().map(|finding| {
        let line = serde_json::to_string(finding);
        line.map(|line| line + "\n")
    });
    let lines: Result<String, _> = lines.collect();
    lines.map_err(|error| Failure::new(exit_codes::FAILURE, error))
}

fn for_people(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let verdict = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Error => "ERROR",
        };
        let (check, message) = (finding.check, &finding.message);
        text.push_str(&format!("{verdict:<8} {check:<12} {message}\n"));
        if let Some(hint) = &finding.hint {
            text.push_str(&format!("{:<21} hint: {hint}\n", ""));
        }
    }
    text
}

/// Whether `primed serve` would start with these variables.
fn settings(surroundings: &Surroundings) -> Vec<Finding> {
    vec![match &surroundings.settings {
        Ok(_) => Finding::ok("settings", "`primed serve` accepts what is set"),
        Err(reason) => Finding::error(
            "settings",
            format!("`primed serve` would not start: {reason}"),
            "correct or unset what it names; each flag has a variable, PRIMED_ and its name",
        ),
    }]
}

/// Whether a primed runs, and of which version.
fn daemon(surroundings: &Surroundings) -> Vec<Finding> {
    let own = env!("CARGO_PKG_VERSION");
    let Some(page) = &surroundings.running else {
        return vec![Finding::ok(
            "daemon",
            "no primed runs; `primed run` starts one for as long as a command takes",
        )];
    };
    let version = page["version"].as_str().unwrap_or("unknown");
    vec![if version == own {
        let upstream = page["upstream"]["address"].as_str().unwrap_or("?");
        Finding::ok(
            "daemon",
            format!("primed {version} runs and forwards to {upstream}"),
        )
    } else {
        Finding::warning(
            "daemon",
            format!("the primed that runs is version {version}, this one is {own}"),
            "restart it: systemctl --user restart primed, or however it was started",
        )
    }]
}

/// Whether a path is a directory of this user's that nobody else can write to; else why not.
fn privacy(path: &Path) -> Result<(), String> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if !metadata.is_dir() {
        return Err("it is no directory".to_owned());
    }
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(format!("it belongs to user {}", metadata.uid()));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err("others may write to it".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Surroundings in which nothing is set, and nothing runs.
    pub fn bare(variables: &[(&str, &str)]) -> Surroundings {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Surroundings {
            variables: variables.iter().map(owned).collect(),
            environment: Environment::default(),
            upstream: None,
            running: None,
            admin: None,
            listen: Some("unix:/run/primed.sock".parse().unwrap()),
            state_dir: None,
            cache_dir: None,
            settings: Err("nothing is set".to_owned()),
            proc: "/proc".into(),
        }
    }

    /// Asserts that there is one finding, like this, whose hint holds `hint`.
    pub fn assert_finds(findings: &[Finding], verdict: Verdict, message: &str, hint: &str) {
        let [finding] = findings else {
            panic!("not one finding: {findings:?}");
        };
        assert_eq!(finding.verdict, verdict, "{finding:?}");
        assert!(finding.message.contains(message), "{finding:?}");
        let said = finding.hint.clone().unwrap_or_default();
        assert!(said.contains(hint), "{finding:?}");
    }

    #[test]
    fn settings_that_serve_refuses_are_an_error() {
        let found = settings(&bare(&[]));
        assert_finds(&found, Verdict::Error, "nothing is set", "PRIMED_");
    }

    #[test]
    fn a_primed_of_another_version_is_to_be_restarted() {
        let mut surroundings = bare(&[]);
        assert_finds(&daemon(&surroundings), Verdict::Ok, "no primed runs", "");
        surroundings.running = Some(serde_json::json!({ "version": "0.0.1" }));
        assert_finds(&daemon(&surroundings), Verdict::Warning, "0.0.1", "restart");
        let own = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "upstream": { "address": "unix:/casd" }
        });
        surroundings.running = Some(own);
        assert_finds(&daemon(&surroundings), Verdict::Ok, "unix:/casd", "");
    }

    #[test]
    fn findings_are_printed_with_their_hints_for_people_and_programs() {
        let findings = [
            Finding::ok("clock", "it runs"),
            Finding::error("disk", "it is full", "make room"),
        ];
        assert_eq!(
            for_people(&findings),
            "ok       clock        it runs\n\
             ERROR    disk         it is full\n                      hint: make room\n"
        );
        let json = as_json(&findings).unwrap();
        assert_eq!(
            json.lines().last().unwrap(),
            r#"{"check":"disk","verdict":"error","message":"it is full","hint":"make room"}"#
        );
    }
}
