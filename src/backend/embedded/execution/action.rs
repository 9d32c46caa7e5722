//! What is to be executed: an `Action` and its `Command`, read from the CAS, and found to be such
//! that they can be. Called when an execution begins; what is wrong with them becomes its status.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use prost::Message;

use super::failure::Failure;
use crate::backend::embedded::blobs::Blobs;
use crate::backend::embedded::errors::ReadError;
use crate::digest::Digest;
use crate::reapi::command::OutputDirectoryFormat;
use crate::reapi::platform::Property;
use crate::reapi::{Action, Command, Platform};

/// The names of this machine's architecture, in the vocabularies that clients use.
const ISA: &[&str] = if cfg!(target_arch = "x86_64") {
    &["x86-64", "x86_64", "amd64", "x64"]
} else if cfg!(target_arch = "aarch64") {
    &["aarch64", "arm64", "a64", "armv8"]
} else {
    &[std::env::consts::ARCH]
};

/// An action that can be executed.
#[derive(Debug)]
pub struct Assignment {
    /// The digest of the `Action`, and so the digest function of all of it.
    pub digest: Digest,
    /// The root of its input tree.
    pub input_root: Digest,
    /// The program and its arguments: one word at least.
    pub arguments: Vec<String>,
    /// The whole environment.
    pub environment: Vec<(String, String)>,
    /// Where the command runs, below the input root.
    pub working_directory: PathBuf,
    /// What is wanted of what it writes.
    pub outputs: Vec<Output>,
    /// How directories among them are to be reported.
    pub directory_format: OutputDirectoryFormat,
    /// Whether their times and permission bits are wanted, too.
    pub wants_mtime: bool,
    /// See `wants_mtime`.
    pub wants_unix_mode: bool,
    /// How long the command may run.
    pub timeout: Duration,
    /// Whether it may use the network.
    pub network: bool,
}

/// Something that a command may write.
#[derive(Debug)]
pub struct Output {
    /// As the command names it, relative to the working directory.
    pub path: String,
    /// Where that is, below the input root.
    pub place: PathBuf,
    /// What it must be.
    pub wanted: Wanted,
}

/// What an output must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Anything (`output_paths`).
    Any,
    /// A file (`output_files`, of version 2.0).
    File,
    /// A directory (`output_directories`, of version 2.0).
    Directory,
}

/// Reads the action itself. Blocks.
///
/// # Errors
/// `Failure`, when it is missing or malformed.
pub fn read(blobs: &Blobs, digest: Digest) -> Result<Action, Failure> {
    message(blobs, digest, "the Action")
}

impl Assignment {
    /// Reads what `action` refers to, but for its inputs. Nothing may run for longer than
    /// `max_timeout`. Blocks.
    ///
    /// # Errors
    /// `Failure`, when something is missing, malformed, or more than this machine can do.
    pub fn read(
        blobs: &Blobs,
        digest: Digest,
        action: Action,
        max_timeout: Duration,
    ) -> Result<Self, Failure> {
        let function = digest.function();
        let named = |proto, what: &str| {
            let invalid = |error| Failure::invalid(format!("{what} of the Action: {error}"));
            function.read(proto).map_err(invalid)
        };
        let input_root = named(action.input_root_digest.as_ref(), "the input root")?;
        let command_digest = named(action.command_digest.as_ref(), "the command")?;
        let command: Command = message(blobs, command_digest, "the Command")?;
        let platform = action.platform.or(command.platform).unwrap_or_default();
        let network = read_platform(&platform)?;
        if command.arguments.first().is_none_or(String::is_empty) {
            return Err(Failure::invalid("the Command has no arguments"));
        }
        let environment = environment(command.environment_variables)?;
        if command.arguments.iter().any(|word| word.contains('\0')) {
            return Err(Failure::invalid("an argument of the Command holds a NUL"));
        }
        let working_directory = below(Path::new(""), &command.working_directory)?;
        let lists = match command.output_paths.is_empty() {
            false => vec![(command.output_paths, Wanted::Any)],
            true => vec![
                (command.output_files, Wanted::File),
                (command.output_directories, Wanted::Directory),
            ],
        };
        let mut outputs = Vec::new();
        for (paths, wanted) in lists {
            for path in paths {
                outputs.push(Output {
                    place: below(&working_directory, &path)?,
                    path,
                    wanted,
                });
            }
        }
        let wants = |name: &str| {
            let mut properties = command.output_node_properties.iter();
            properties.any(|property| property.eq_ignore_ascii_case(name))
        };
        Ok(Assignment {
            digest,
            input_root,
            wants_mtime: wants("mtime"),
            wants_unix_mode: wants("unix_mode"),
            directory_format: OutputDirectoryFormat::try_from(command.output_directory_format)
                .unwrap_or_default(),
            arguments: command.arguments,
            environment,
            working_directory,
            outputs,
            timeout: timeout(action.timeout, max_timeout)?,
            network,
        })
    }
}

/// A message in the CAS.
fn message<M: Message + Default>(blobs: &Blobs, digest: Digest, what: &str) -> Result<M, Failure> {
    let blob = blobs.read_now(digest).map_err(|error| match error {
        ReadError::NotFound(_) | ReadError::Corrupt(_) => Failure::missing([digest]),
        ReadError::Io { .. } => Failure::internal(error),
    })?;
    M::decode(blob).map_err(|_| Failure::invalid(format!("{digest} does not hold {what}")))
}

fn environment(
    variables: Vec<crate::reapi::command::EnvironmentVariable>,
) -> Result<Vec<(String, String)>, Failure> {
    let pairs = variables.into_iter().map(|variable| {
        let name = &variable.name;
        match name.is_empty() || name.contains(['=', '\0']) || variable.value.contains('\0') {
            true => Err(Failure::invalid(format!(
                "the Command's environment variable {name:?} cannot be set"
            ))),
            false => Ok((variable.name, variable.value)),
        }
    });
    pairs.collect()
}

/// Where `path`, seen from `directory`, is below the input root. It may go up, but not out.
fn below(directory: &Path, path: &str) -> Result<PathBuf, Failure> {
    let outside = || Failure::invalid(format!("the path {path:?} leads out of the input root"));
    let mut place = directory.to_owned();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => place.push(name),
            Component::CurDir => {}
            Component::ParentDir if place.pop() => {}
            _ => return Err(outside()),
        }
    }
    match path.contains('\0') {
        true => Err(outside()),
        false => Ok(place),
    }
}

fn timeout(asked: Option<prost_types::Duration>, most: Duration) -> Result<Duration, Failure> {
    let Some(asked) = asked else {
        return Ok(most);
    };
    let timeout = Duration::try_from(asked)
        .map_err(|_| Failure::invalid("the Action's timeout is negative"))?;
    match timeout {
        // Some clients mean by it what they should say by leaving it out.
        Duration::ZERO => Ok(most),
        timeout if timeout > most => Err(Failure::invalid(format!(
            "the Action's timeout is {} s, and this server allows {} s; --max-action-time allows more",
            timeout.as_secs(),
            most.as_secs()
        ))),
        timeout => Ok(timeout),
    }
}

/// Refuses what another machine is needed for; says whether the network is asked for.
fn read_platform(platform: &Platform) -> Result<bool, Failure> {
    let mut network = false;
    for Property { name, value } in &platform.properties {
        let offered: &[&str] = match name.as_str() {
            "OSFamily" => &[std::env::consts::OS],
            "ISA" | "Arch" => ISA,
            "network" => {
                network |= value == "on";
                continue;
            }
            "dockerNetwork" => {
                network |= value == "standard";
                continue;
            }
            _ => {
                tracing::debug!(name, value, "a platform property means nothing here");
                continue;
            }
        };
        if !offered
            .iter()
            .any(|offer| offer.eq_ignore_ascii_case(value))
        {
            return Err(Failure::precondition(format!(
                "the action wants a machine whose {name} is {value}, and this one's is {}; send it \
                 to one that has it with --execution-upstream",
                offered[0]
            )));
        }
    }
    Ok(network)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_may_go_up_but_not_out_of_the_input_root() {
        let place = |directory: &str, path: &str| below(Path::new(directory), path).ok();
        assert_eq!(place("a/b", "c"), Some("a/b/c".into()));
        assert_eq!(place("a/b", "../c/./d/"), Some("a/c/d".into()));
        assert_eq!(place("a", ""), Some("a".into()));
        assert_eq!(place("a", ".."), Some("".into()));
        for outside in ["../../c", "/etc/passwd", "..", "c\0"] {
            assert_eq!(place("", outside), None, "{outside}");
        }
    }

    #[test]
    fn another_kind_of_machine_is_refused_and_unknown_wishes_are_not() {
        let platform = |name: &str, value: &str| {
            read_platform(&Platform {
                properties: vec![Property {
                    name: name.to_owned(),
                    value: value.to_owned(),
                }],
            })
        };
        assert!(!platform("OSFamily", "Linux").unwrap());
        assert!(!platform("ISA", ISA[0]).unwrap());
        assert!(!platform("container-image", "docker://x").unwrap());
        assert!(platform("network", "on").unwrap());
        assert!(platform("OSFamily", "windows").is_err());
        assert!(platform("Arch", "vax").is_err());
    }

    #[test]
    fn a_timeout_beyond_what_the_server_allows_is_refused() {
        let most = Duration::from_secs(60);
        let asked = |seconds| {
            let asked = prost_types::Duration { seconds, nanos: 0 };
            timeout(Some(asked), most).ok()
        };
        assert_eq!(timeout(None, most).ok(), Some(most));
        assert_eq!(asked(0), Some(most));
        assert_eq!(asked(7), Some(Duration::from_secs(7)));
        assert_eq!((asked(61), asked(-1)), (None, None));
    }
}
