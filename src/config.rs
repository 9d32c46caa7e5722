//! The settings of `primed serve`: defaults < environment < flags, resolved once into one struct.

pub mod upstream;

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use self::upstream::{UpstreamConfig, UpstreamConfigError};
use crate::address::{Address, AddressError};

/// What primed records and uses; each mode includes those before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Forward only.
    None,
    /// Use the records there are, make none.
    PrimeOnly,
    /// Record; follow source files, but no action's outputs.
    SourceArtifact,
    /// Also follow the outputs of other actions of the same parent.
    IntraElement,
    /// Follow everything that primed can follow.
    #[default]
    Full,
}

impl Mode {
    /// Whether builds are recorded.
    pub fn records(self) -> bool {
        self >= Mode::SourceArtifact
    }

    /// Whether files are traced back to the actions that wrote them.
    pub fn uses_action_overlays(self) -> bool {
        self >= Mode::IntraElement
    }
}

/// A client that is to be pleased by a change to an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compat {
    /// Bazel up to 7 speaks version 2.0 of the API and refuses a server whose oldest is newer;
    /// buildbox-casd says 2.1, and works with 2.0 all the same.
    Bazel,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long a call waits for a connection.
    pub connect: Duration,
    /// After how long a silence, on a connection by network with open calls, the upstream is
    /// asked for a sign of life, and how long it has to give one.
    pub keep_alive: Duration,
}

/// Everything that `primed serve` needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where calls are forwarded to.
    pub upstream: Address,
    /// What happens to them on their way.
    pub on_the_way: UpstreamConfig,
    /// Where clients connect.
    pub listen: Vec<Address>,
    /// Where `primed status` and `primed wait` connect.
    pub admin: Address,
    /// Where records are kept.
    pub state_dir: PathBuf,
    /// What is recorded and used.
    pub mode: Mode,
    /// How many speculative actions run at once.
    pub max_speculative: NonZero<usize>,
    /// How long things may take on the way upstream.
    pub patience: Patience,
    /// Calls that a client may have open on one connection.
    pub max_streams: u32,
    /// Which client is to be pleased by a change to an answer.
    pub compat: Option<Compat>,
}

/// Why the settings cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A default needs a variable that is not set.
    #[error("{variable} is not set, so there is no default for {flag}; set one of them")]
    NoDefault {
        /// The flag that would have helped.
        flag: &'static str,
        /// The variable that would have helped.
        variable: &'static str,
    },
    /// A default is no usable address.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// A listener is an upstream: primed would forward to itself.
    #[error("primed would forward to itself: {address} is both --listen and {flag}")]
    Loop {
        /// Where it would listen and call.
        address: Address,
        /// The flag that names it as an upstream.
        flag: &'static str,
    },
    /// What is to happen to calls on their way contradicts itself.
    #[error(transparent)]
    Upstream(#[from] UpstreamConfigError),
}

/// The variables that defaults are made of.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// `XDG_RUNTIME_DIR`.
    pub runtime_dir: Option<PathBuf>,
    /// `XDG_STATE_HOME`.
    pub state_home: Option<PathBuf>,
    /// `HOME`.
    pub home: Option<PathBuf>,
}

impl Environment {
    /// What this process was given. Empty and relative paths do not count (XDG Base Directory
    /// specification).
    pub fn of_process() -> Self {
        let path = |name| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        Environment {
            runtime_dir: path("XDG_RUNTIME_DIR"),
            state_home: path("XDG_STATE_HOME"),
            home: path("HOME"),
        }
    }

    /// Where clients connect unless told otherwise.
    ///
    /// # Errors
    /// `NoDefault` without `XDG_RUNTIME_DIR`.
    pub fn default_listen(&self) -> Result<Address, ConfigError> {
        self.socket("remote-apis.sock", "--listen")
    }

    /// Where admin commands connect unless told otherwise.
    ///
    /// # Errors
    /// `NoDefault` without `XDG_RUNTIME_DIR`.
    pub fn default_admin(&self) -> Result<Address, ConfigError> {
        self.socket("admin.sock", "--admin")
    }

    /// Where records are kept unless told otherwise.
    ///
    /// # Errors
    /// `NoDefault` without `XDG_STATE_HOME` and `HOME`.
    pub fn default_state_dir(&self) -> Result<PathBuf, ConfigError> {
        let state_home = self.state_home.clone();
        let state_home = state_home.or_else(|| Some(self.home.as_ref()?.join(".local/state")));
        let state_home = state_home.ok_or(ConfigError::NoDefault {
            flag: "--state-dir",
            variable: "XDG_STATE_HOME",
        })?;
        Ok(state_home.join("primed"))
    }

    fn socket(&self, name: &str, flag: &'static str) -> Result<Address, ConfigError> {
        let runtime_dir = self.runtime_dir.as_deref().ok_or(ConfigError::NoDefault {
            flag,
            variable: "XDG_RUNTIME_DIR",
        })?;
        let path: PathBuf = [runtime_dir, Path::new("primed"), Path::new(name)]
            .iter()
            .collect();
        Ok(format!("unix:{}", path.display()).parse()?)
    }
}

impl Config {
    /// Refuses settings that cannot work together.
    ///
    /// # Errors
    /// `ConfigError`, with what is wrong.
    pub fn check(self) -> Result<Self, ConfigError> {
        self.on_the_way.check()?;
        let looping = std::iter::once(("--upstream", &self.upstream))
            .chain(self.on_the_way.endpoints())
            .find(|(_, address)| self.listen.contains(address))
            .map(|(flag, address)| ConfigError::Loop {
                address: address.clone(),
                flag,
            });
        looping.map_or(Ok(self), Err)
    }
}

/// Speculative actions at once, unless told otherwise: two for each core.
pub fn default_max_speculative() -> NonZero<usize> {
    let cores = std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN);
    cores.saturating_mul(NonZero::<usize>::MIN.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_stand_in_the_xdg_directories() {
        let environment = Environment {
            runtime_dir: Some("/run/user/7".into()),
            state_home: None,
            home: Some("/home/me".into()),
        };
        let shown = |address: Result<Address, _>| address.map(|address| address.to_string());
        assert_eq!(
            shown(environment.default_listen()).as_deref(),
            Ok("unix:/run/user/7/primed/remote-apis.sock")
        );
        assert_eq!(
            shown(environment.default_admin()).as_deref(),
            Ok("unix:/run/user/7/primed/admin.sock")
        );
        assert_eq!(
            environment.default_state_dir(),
            Ok("/home/me/.local/state/primed".into())
        );
    }

    #[test]
    fn a_missing_variable_is_named_with_the_flag_that_helps() {
        let error = Environment::default()
            .default_listen()
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("XDG_RUNTIME_DIR") && error.contains("--listen"),
            "{error}"
        );
    }

    #[test]
    fn each_mode_includes_those_before_it() {
        assert!(!Mode::PrimeOnly.records() && Mode::SourceArtifact.records());
        assert!(!Mode::SourceArtifact.uses_action_overlays());
        assert!(Mode::IntraElement.uses_action_overlays() && Mode::Full.uses_action_overlays());
    }
}
