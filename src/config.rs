//! The settings of `primed serve`: defaults < file < environment < flags, resolved once into one
//! struct.

pub mod embedded;
pub mod file;
pub mod http_proxy;
pub mod upstream;

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use self::embedded::EmbeddedConfig;
use self::http_proxy::HttpProxy;
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

/// What may be spent; `None` is without end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BudgetLimits {
    /// Executions for one build.
    pub build_actions: Option<u64>,
    /// Time of workers for one build.
    pub build_time: Option<Duration>,
    /// Time of workers in an hour.
    pub hour_time: Option<Duration>,
}

/// Everything that `primed serve` needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where calls are forwarded to.
    pub upstream: Address,
    /// The backend within primed, where it is the upstream.
    pub embedded: Option<EmbeddedConfig>,
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
    /// How many threads forward calls.
    pub threads: NonZero<usize>,
    /// For how long they poll before they sleep.
    pub busy_poll: Duration,
    /// Where `primed status` and `primed wait` connect.
    pub admin: Address,
    /// Where metrics can be read, if they can.
    pub metrics: Option<Address>,
    /// Where records are kept.
    pub state_dir: PathBuf,
    /// What is recorded and used.
    pub mode: Mode,
    /// Whether records are shared through the backend.
    pub share: bool,
    /// Whether saving a file primes what reads it.
    pub watch: bool,
    /// How many speculative actions run at once.
    pub max_speculative: NonZero<usize>,
    /// How long an execution that a client has joined may be silent; `None`: that depends on how
    /// long it took before.
    pub hedge_after: Option<Duration>,
    /// What priming may spend.
    pub budgets: BudgetLimits,
    /// How long things may take on the way upstream.
    pub patience: Patience,
    /// Which client is to be pleased by a change to an answer.
    pub compat: Option<Compat>,
    /// Whether it ends with the last `primed run` that uses it.
    pub until_unused: bool,
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
    /// The embedded backend is to serve some calls only.
    #[error("{0} embedded: the embedded backend serves all calls or none; leave --upstream out")]
    EmbeddedFor(&'static str),
    /// The admin address is one by TLS, or none of a socket.
    #[error(
        "--admin {0}: admin pages are served without TLS and by a socket of their own; give unix:PATH"
    )]
    Admin(Address),
    /// The same of the address for metrics.
    #[error(
        "--metrics {0}: metrics are served without TLS and by a socket of their own; give HOST:PORT or unix:PATH"
    )]
    Metrics(Address),
}

/// The variables that defaults are made of.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// `XDG_RUNTIME_DIR`.
    pub runtime_dir: Option<PathBuf>,
    /// `XDG_STATE_HOME`.
    pub state_home: Option<PathBuf>,
    /// `XDG_CACHE_HOME`.
    pub cache_home: Option<PathBuf>,
    /// `XDG_CONFIG_HOME`.
    pub config_home: Option<PathBuf>,
    /// `XDG_CONFIG_DIRS`.
    pub config_dirs: Vec<PathBuf>,
    /// `XDG_DATA_HOME`.
    pub data_home: Option<PathBuf>,
    /// `HOME`.
    pub home: Option<PathBuf>,
    /// `grpc_proxy`, `https_proxy` or `http_proxy`.
    pub http_proxy: Option<String>,
    /// `no_grpc_proxy` or `no_proxy`.
    pub no_proxy: Option<String>,
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
        let first = |names: &[&str]| {
            let values = names.iter().filter_map(|name| std::env::var(name).ok());
            values.into_iter().find(|value| !value.is_empty())
        };
        Environment {
            runtime_dir: path("XDG_RUNTIME_DIR"),
            state_home: path("XDG_STATE_HOME"),
            cache_home: path("XDG_CACHE_HOME"),
            config_home: path("XDG_CONFIG_HOME"),
            config_dirs: std::env::var_os("XDG_CONFIG_DIRS")
                .map(|list| std::env::split_paths(&list).collect())
                .unwrap_or_default(),
            data_home: path("XDG_DATA_HOME"),
            home: path("HOME"),
            http_proxy: first(&["grpc_proxy", "https_proxy", "http_proxy"]),
            no_proxy: first(&["no_grpc_proxy", "no_proxy"]),
            // What is malformed is reported by whoever takes the sockets.
            has_passed_sockets: sd_notify::listen_fds().map_or(true, |sockets| sockets.len() > 0),
        }
    }

    /// Where settings are looked for unless told otherwise; what stands first outweighs the rest.
    pub fn config_files(&self) -> Vec<PathBuf> {
        let dirs = self.config_dirs.iter().filter(|dir| dir.is_absolute());
        let mut dirs: Vec<_> = dirs.cloned().collect();
        if dirs.is_empty() {
            dirs.push("/etc/xdg".into());
        }
        let home = self.config_home();
        let files = home.into_iter().chain(dirs);
        files.map(|dir| dir.join("primed/primed.toml")).collect()
    }

    /// Where the user's own settings stand, primed's and others'.
    pub fn config_home(&self) -> Option<PathBuf> {
        let home = || Some(self.home.as_ref()?.join(".config"));
        self.config_home.clone().or_else(home)
    }

    /// Where the user's own completions and man pages stand, among others.
    pub fn data_home(&self) -> Option<PathBuf> {
        let home = || Some(self.home.as_ref()?.join(".local/share"));
        self.data_home.clone().or_else(home)
    }

    /// The HTTP proxy that gRPC would go by. What is none is ignored, as it is by gRPC.
    pub fn http_proxy(&self) -> Option<HttpProxy> {
        let not_for = self.no_proxy.as_deref().unwrap_or_default();
        HttpProxy::new(self.http_proxy.as_deref()?, not_for).ok()
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

    /// Where the embedded backend keeps its blobs unless told otherwise.
    ///
    /// # Errors
    /// `NoDefault` without `XDG_CACHE_HOME` and `HOME`.
    pub fn default_cache_dir(&self) -> Result<PathBuf, ConfigError> {
        let cache_home = self.cache_home.clone();
        let cache_home = cache_home.or_else(|| Some(self.home.as_ref()?.join(".cache")));
        let cache_home = cache_home.ok_or(ConfigError::NoDefault {
            flag: "--cache-dir",
            variable: "XDG_CACHE_HOME",
        })?;
        Ok(cache_home.join("primed"))
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
        let embedded = self.upstreams().find(|(_, one)| **one == Address::Embedded);
        match embedded {
            Some(("--upstream", _)) => self.on_the_way.refuse_embedded()?,
            Some((flag, _)) => return Err(ConfigError::EmbeddedFor(flag)),
            None => {}
        }
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
        if self.admin.is_tls() || self.admin == Address::Embedded {
            return Err(ConfigError::Admin(self.admin));
        }
        if let Some(metrics) = &self.metrics {
            if metrics.is_tls() || *metrics == Address::Embedded {
                return Err(ConfigError::Metrics(metrics.clone()));
            }
            self.refuse_loop(metrics)?;
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

/// One for each core: local executions at once, unless told otherwise.
pub fn default_jobs() -> NonZero<usize> {
    std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN)
}

/// Speculative actions at once where `executor` executes, unless told otherwise: two for each core if
/// it may be on this machine, and `MOST_BY_NETWORK` if it is not. How many slots it has is found out.
pub fn default_max_speculative(executor: &Address) -> NonZero<usize> {
    match executor.is_on_this_machine() {
        true => default_jobs().saturating_mul(NonZero::<usize>::MIN.saturating_add(1)),
        false => MOST_BY_NETWORK,
    }
}

/// More than most builds ask a cluster for at once.
const MOST_BY_NETWORK: NonZero<usize> = NonZero::<usize>::MIN.saturating_add(255);

/// Threads that forward calls, unless told otherwise: one for each core, up to as many as carry more
/// than any cluster answers. Each has connections of its own to the upstream.
pub fn default_threads() -> NonZero<usize> {
    default_jobs().min(MOST_THREADS)
}

const MOST_THREADS: NonZero<usize> = NonZero::<usize>::MIN.saturating_add(7);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_runs_ahead_where_the_backend_is_on_another_machine() {
        let most = |address: &str| default_max_speculative(&address.parse().unwrap()).get();
        let here = default_jobs().get() * 2;
        for address in [
            "unix:/run/casd",
            "unix-abstract:casd",
            "localhost:1",
            "[::1]:1",
        ] {
            assert_eq!(most(address), here, "{address}");
        }
        assert_eq!(most("127.1.2.3:8980"), here);
        for address in ["cluster:8980", "grpcs://10.0.0.1", "localhost.example:1"] {
            assert_eq!(most(address), 256, "{address}");
        }
    }

    #[test]
    fn defaults_stand_in_the_xdg_directories() {
        let environment = Environment {
            runtime_dir: Some("/run/user/7".into()),
            home: Some("/home/me".into()),
            ..Environment::default()
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
        let cache = environment.default_cache_dir();
        assert_eq!(cache, Ok("/home/me/.cache/primed".into()));
    }

    #[test]
    fn settings_stand_in_the_xdg_directories_the_users_own_first() {
        let mut environment = Environment {
            home: Some("/home/me".into()),
            ..Environment::default()
        };
        let files = |environment: &Environment| {
            let files = environment.config_files();
            files
                .iter()
                .map(|file| file.display().to_string())
                .collect::<Vec<_>>()
        };
        let own = "/home/me/.config/primed/primed.toml";
        assert_eq!(files(&environment), [own, "/etc/xdg/primed/primed.toml"]);
        environment.config_home = Some("/c".into());
        environment.config_dirs = vec!["/d".into(), "relative".into(), "/e".into()];
        assert_eq!(
            files(&environment),
            ["/c", "/d", "/e"].map(|dir| format!("{dir}/primed/primed.toml"))
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
