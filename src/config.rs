//! The settings of `primed serve`: defaults < environment < flags, resolved once into one struct.

pub mod upstream;

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use self::upstream::{UpstreamConfig, UpstreamConfigError};
use crate::address::{Address, AddressError, ListenAddress};
use crate::tls::client::ClientTlsFiles;
use crate::tls::server::ServerTlsFiles;

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

    /// Whether they are traced back to the actions of other parents, too.
    pub fn crosses_parents(self) -> bool {
        self >= Mode::Full
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
    /// How upstreams that are reached by TLS are verified.
    pub upstream_tls: ClientTlsFiles,
    /// Where clients connect.
    pub listen: Vec<ListenAddress>,
    /// What TLS listeners show.
    pub tls: Option<ServerTlsFiles>,
    /// The users who may connect by Unix sockets; empty: whoever can reach the socket.
    pub allow_uids: Vec<u32>,
    /// How many clients may be connected at once.
    pub max_connections: NonZero<usize>,
    /// How many calls one client may have open on one connection.
    pub max_streams: NonZero<u32>,
    /// Where `primed status` and `primed wait` connect.
    pub admin: Address,
    /// Where records are kept.
    pub state_dir: PathBuf,
    /// What is recorded and used.
    pub mode: Mode,
    /// Whether records are shared through the backend.
    pub share: bool,
    /// How many speculative actions run at once.
    pub max_speculative: NonZero<usize>,
    /// How long things may take on the way upstream.
    pub patience: Patience,
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
    /// A TLS listener has nothing to show.
    #[error("{0} needs a certificate; give --tls-cert and --tls-key")]
    NoCertificate(Address),
    /// Settings that would have no effect, where their absence matters.
    #[error("{flag} has no effect: {reason}; {hint}")]
    NoEffect {
        /// The flag.
        flag: &'static str,
        /// Why.
        reason: &'static str,
        /// What to write.
        hint: &'static str,
    },
    /// The admin address is no local one.
    #[error("--admin {0}: admin pages are not served by TLS; give a Unix socket")]
    AdminTls(Address),
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
    /// Whether the service manager passed sockets (`LISTEN_FDS`).
    pub has_passed_sockets: bool,
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
            // What is malformed is reported by whoever takes the sockets.
            has_passed_sockets: sd_notify::listen_fds().map_or(true, |sockets| sockets.len() > 0),
        }
    }

    /// Where clients connect unless told otherwise: by the service manager's sockets, if there
    /// are any.
    ///
    /// # Errors
    /// `NoDefault` without them and `XDG_RUNTIME_DIR`.
    pub fn default_listen(&self) -> Result<ListenAddress, ConfigError> {
        match self.has_passed_sockets {
            true => Ok(ListenAddress::Passed(None)),
            false => self
                .socket("remote-apis.sock", "--listen")
                .map(ListenAddress::At),
        }
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
        let mut may_be_tls = false;
        let mut may_be_unix = false;
        for listen in &self.listen {
            match listen {
                ListenAddress::At(address) => {
                    self.refuse_loop(address)?;
                    if address.is_tls() && self.tls.is_none() {
                        return Err(ConfigError::NoCertificate(address.clone()));
                    }
                    may_be_tls |= address.is_tls();
                    may_be_unix |= address.is_unix();
                }
                ListenAddress::Passed(_) => (may_be_tls, may_be_unix) = (true, true),
            }
        }
        let no_effect = |flag, reason, hint| ConfigError::NoEffect { flag, reason, hint };
        if self.admin.is_tls() {
            return Err(ConfigError::AdminTls(self.admin));
        }
        if self.share && self.mode == Mode::None {
            let hint = "choose another mode";
            return Err(no_effect(
                "--share",
                "--mode none leaves records alone",
                hint,
            ));
        }
        if self.tls.is_some() && !may_be_tls {
            let hint = "write --listen grpcs://HOST:PORT";
            return Err(no_effect("--tls-cert", "no --listen address is TLS", hint));
        }
        if !self.allow_uids.is_empty() && !may_be_unix {
            let hint = "only there is the user of a client known";
            return Err(no_effect(
                "--allow-uid",
                "no --listen address is a Unix socket",
                hint,
            ));
        }
        if let Some(flag) = self.upstream_tls.flag()
            && !self.upstreams().any(|(_, address)| address.is_tls())
        {
            let hint = "write --upstream grpcs://HOST:PORT";
            return Err(no_effect(flag, "no upstream is reached by TLS", hint));
        }
        Ok(self)
    }

    /// Refuses to listen where calls are forwarded to.
    ///
    /// # Errors
    /// `Loop`.
    pub fn refuse_loop(&self, listen: &Address) -> Result<(), ConfigError> {
        match self.upstreams().find(|(_, address)| *address == listen) {
            Some((flag, address)) => Err(ConfigError::Loop {
                address: address.clone(),
                flag,
            }),
            None => Ok(()),
        }
    }

    /// Every backend that calls are forwarded to, with the flag that names it.
    pub fn upstreams(&self) -> impl Iterator<Item = (&'static str, &Address)> {
        std::iter::once(("--upstream", &self.upstream)).chain(self.on_the_way.endpoints())
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
            has_passed_sockets: false,
        };
        let listen = environment.default_listen().unwrap();
        assert_eq!(
            listen.to_string(),
            "unix:/run/user/7/primed/remote-apis.sock"
        );
        let admin = environment.default_admin().unwrap();
        assert_eq!(admin.to_string(), "unix:/run/user/7/primed/admin.sock");
        assert_eq!(
            environment.default_state_dir(),
            Ok("/home/me/.local/state/primed".into())
        );
    }

    #[test]
    fn passed_sockets_stand_in_for_the_default_address() {
        let environment = Environment {
            has_passed_sockets: true,
            ..Environment::default()
        };
        let listen = environment.default_listen();
        assert_eq!(listen, Ok(ListenAddress::Passed(None)));
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
