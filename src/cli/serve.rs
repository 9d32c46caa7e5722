//! `primed serve`: the daemon.

use std::ffi::OsString;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, CommandFactory, FromArgMatches};
use nix::sys::signal::SigSet;
use tokio::signal::unix::{SignalKind, signal};

use super::settings::{self, Stopped};
use super::upstream_arguments::UpstreamArguments;
use super::{Cli, Command, Failure, exit_codes};
use crate::address::{Address, ListenAddress};
use crate::config::embedded::{ByteSize, EmbeddedConfig, SandboxMode};
use crate::config::{
    BudgetLimits, Compat, Config, ConfigError, Environment, Mode, Patience, default_jobs,
    default_max_speculative, default_threads,
};
use crate::server;
use crate::tls::client::ClientTlsFiles;
use crate::tls::server::ServerTlsFiles;
use crate::tls::{Identity, PemFile};

/// The longest time that can be asked for: a day.
const MAX_SECONDS: Duration = Duration::from_secs(86_400);

/// Forward calls from build clients to a backend, and prime its action cache.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Backend that calls are forwarded to: unix:PATH, unix-abstract:NAME, grpcs://HOST:PORT or
    /// https://HOST:PORT with TLS (443 if no port), grpc://HOST:PORT, http://HOST:PORT or HOST:PORT
    /// without; or `embedded`, which is primed itself: it keeps blobs and results on disk, and
    /// executes actions on this machine.
    #[arg(
        long,
        env = "PRIMED_UPSTREAM",
        value_name = "ADDR",
        default_value = "embedded"
    )]
    upstream: Address,
    #[command(flatten)]
    embedded: EmbeddedArguments,
    #[command(flatten)]
    upstream_tls: UpstreamTls,
    /// Where clients connect: an address like that of --upstream, `systemd` for the sockets that
    /// the service manager passes, or `systemd:NAME` for those with this FileDescriptorName. May
    /// be given several times, or with commas between [default: the sockets that the service
    /// manager passes, else unix:$XDG_RUNTIME_DIR/primed/remote-apis.sock].
    #[arg(
        long,
        env = "PRIMED_LISTEN",
        value_name = "ADDR",
        value_delimiter = ','
    )]
    listen: Vec<ListenAddress>,
    #[command(flatten)]
    tls: ListenTls,
    /// Let only this user connect by Unix sockets; may be given several times, or with commas
    /// between. Sockets are for their owner unless others are listed.
    #[arg(
        long = "allow-uid",
        env = "PRIMED_ALLOW_UID",
        value_name = "UID",
        value_delimiter = ','
    )]
    allow_uids: Vec<u32>,
    /// How many clients may be connected at once; further ones wait.
    #[arg(
        long,
        env = "PRIMED_MAX_CONNECTIONS",
        value_name = "N",
        default_value = "10000"
    )]
    max_connections: NonZero<usize>,
    /// How many calls a client may have open on one connection.
    #[arg(
        long,
        env = "PRIMED_MAX_STREAMS",
        value_name = "N",
        default_value = "4096"
    )]
    max_streams: NonZero<u32>,
    /// How many threads forward calls [default: one for each core, 8 at most].
    #[arg(long, env = "PRIMED_THREADS", value_name = "N")]
    threads: Option<NonZero<usize>>,
    /// For how many microseconds a thread that forwards calls polls before it sleeps, while calls follow
    /// one another closely and nobody else wants its processor: they are answered sooner for it. 0: it
    /// never does.
    #[arg(
        long,
        env = "PRIMED_BUSY_POLL",
        value_name = "MICROSECONDS",
        value_parser = clap::value_parser!(u64).range(..=10_000),
        default_value = "200"
    )]
    busy_poll: u64,
    /// Where the records of earlier builds are kept [default: $XDG_STATE_HOME/primed].
    #[arg(long, env = "PRIMED_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where other commands (`primed status`, say) connect
    /// [default: unix:$XDG_RUNTIME_DIR/primed/admin.sock].
    #[arg(long, env = "PRIMED_ADMIN", value_name = "ADDR")]
    admin: Option<Address>,
    /// Where metrics can be read as OpenMetrics text, under /metrics: HOST:PORT or unix:PATH
    /// [default: nowhere but at the admin socket].
    #[arg(long, env = "PRIMED_METRICS", value_name = "ADDR")]
    metrics: Option<Address>,
    /// What is recorded and used; each mode includes those before it.
    #[arg(
        long,
        env = "PRIMED_MODE",
        value_enum,
        default_value_t,
        value_name = "MODE"
    )]
    mode: Mode,
    /// Share what is recorded through the backend, and use what others have shared where nothing
    /// is recorded here.
    #[arg(long, env = "PRIMED_SHARE", value_parser = clap::builder::FalseyValueParser::new())]
    share: bool,
    /// Prime as soon as a source file is saved, not only when a build begins: of the 16 projects that
    /// were built last. Speculative work is then also done for what is never built.
    #[arg(long, env = "PRIMED_WATCH", value_parser = clap::builder::FalseyValueParser::new())]
    watch: bool,
    /// How many speculative actions run at once, at most; fewer while clients would have to wait
    /// [default: two for each core, 256 where the backend is reached by the network].
    #[arg(long, env = "PRIMED_MAX_SPECULATIVE", value_name = "N")]
    max_speculative: Option<NonZero<usize>>,
    /// For how many seconds an execution that a client has joined may be silent; then the client's
    /// own call is made as well [default: five times as long as it took before, and 10 at least; 300
    /// where that is not known; more where the backend is busy].
    #[arg(
        long,
        env = "PRIMED_HEDGE_AFTER",
        value_parser = seconds,
        value_name = "SECONDS"
    )]
    hedge_after: Option<Duration>,
    #[command(flatten)]
    budgets: Budgets,
    /// How long calls wait, in seconds, while the backend cannot be reached; then they end with
    /// UNAVAILABLE.
    #[arg(
        long,
        env = "PRIMED_CONNECT_WAIT",
        value_parser = seconds,
        default_value = "0",
        value_name = "SECONDS"
    )]
    connect_wait: Duration,
    /// After how many seconds of silence a backend that is connected by network, and has calls
    /// open, is asked for a sign of life; it is given up after as many more.
    #[arg(
        long,
        env = "PRIMED_KEEP_ALIVE",
        value_parser = seconds,
        default_value = "20",
        value_name = "SECONDS"
    )]
    keep_alive: Duration,
    /// Change the one answer that keeps a client from working: with `bazel`, capabilities that
    /// begin at a later version 2.x of the API are shown to begin at 2.0.
    #[arg(long, env = "PRIMED_COMPAT", value_enum, value_name = "CLIENT")]
    compat: Option<Compat>,
    /// End when the last `primed run` that uses it has ended; `primed run` starts it so.
    #[arg(long, env = "PRIMED_UNTIL_UNUSED", value_parser = clap::builder::FalseyValueParser::new())]
    until_unused: bool,
    #[cfg(feature = "otlp")]
    #[command(flatten)]
    pub(super) traces: super::traces::TraceArguments,
    // Its heading holds for all that follow.
    #[command(flatten)]
    on_the_way: UpstreamArguments,
}

/// What priming may spend.
#[derive(Debug, Args)]
struct Budgets {
    /// How many actions are executed ahead of time for one build, at most; 0 is without end.
    #[arg(
        long,
        env = "PRIMED_BUILD_BUDGET_ACTIONS",
        value_name = "N",
        default_value = "100000"
    )]
    build_budget_actions: u64,
    /// How many seconds workers may be busy ahead of time for one build, in all; 0 is without end.
    #[arg(
        long,
        env = "PRIMED_BUILD_BUDGET_CPU",
        value_name = "SECONDS",
        default_value = "360000"
    )]
    build_budget_cpu: u64,
    /// How many seconds workers may be busy ahead of time within an hour, for all builds; 0 is
    /// without end: no more than --max-speculative for an hour.
    #[arg(
        long,
        env = "PRIMED_HOUR_BUDGET_CPU",
        value_name = "SECONDS",
        default_value = "0"
    )]
    hour_budget_cpu: u64,
}

impl Budgets {
    fn limits(&self) -> BudgetLimits {
        let limit = |most: u64| (most > 0).then_some(most);
        BudgetLimits {
            build_actions: limit(self.build_budget_actions),
            build_time: limit(self.build_budget_cpu).map(Duration::from_secs),
            hour_time: limit(self.hour_budget_cpu).map(Duration::from_secs),
        }
    }
}

pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().map(Duration::try_from_secs_f64);
    match seconds {
        Some(Ok(duration)) if duration <= MAX_SECONDS => Ok(duration),
        _ => Err("a number of seconds is wanted, up to 86400".to_owned()),
    }
}

/// What the embedded backend works with.
#[derive(Debug, Args)]
struct EmbeddedArguments {
    /// Where the embedded backend keeps blobs and results [default: $XDG_CACHE_HOME/primed].
    #[arg(long, env = "PRIMED_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// How much they may take, such as 20GiB; what was not used for longest goes first [default:
    /// half of what the disk has free, 50GiB at most].
    #[arg(long, env = "PRIMED_CACHE_SIZE", value_name = "SIZE")]
    cache_size: Option<ByteSize>,
    /// How many actions the embedded backend executes at once [default: one for each core].
    #[arg(long, env = "PRIMED_JOBS", value_name = "N")]
    jobs: Option<NonZero<usize>>,
    /// Whether they run in a sandbox, without the network and where the machine's files are
    /// read-only [default: auto].
    #[arg(long, env = "PRIMED_SANDBOX", value_name = "SANDBOX")]
    sandbox: Option<SandboxMode>,
    /// How long one may run; actions that ask for more are refused [default: 86400, a day].
    #[arg(
        long,
        env = "PRIMED_MAX_ACTION_TIME",
        value_name = "SECONDS",
        value_parser = seconds
    )]
    max_action_time: Option<Duration>,
}

impl EmbeddedArguments {
    /// `None` for another upstream.
    fn resolve(
        self,
        upstream: &Address,
        environment: &Environment,
    ) -> Result<Option<EmbeddedConfig>, ConfigError> {
        if *upstream != Address::Embedded {
            let set = [
                ("--cache-dir", self.cache_dir.is_some()),
                ("--cache-size", self.cache_size.is_some()),
                ("--jobs", self.jobs.is_some()),
                ("--sandbox", self.sandbox.is_some()),
                ("--max-action-time", self.max_action_time.is_some()),
            ];
            return match set.into_iter().find(|(_, set)| *set) {
                Some((flag, _)) => Err(ConfigError::NoEffect {
                    flag,
                    reason: "it is about the embedded backend, and --upstream names another",
                    hint: "leave one of the two out",
                }),
                None => Ok(None),
            };
        }
        let cache_dir = self.cache_dir;
        Ok(Some(EmbeddedConfig {
            cache_dir: cache_dir.map_or_else(|| environment.default_cache_dir(), Ok)?,
            cache_size: self.cache_size,
            jobs: self.jobs.unwrap_or_else(default_jobs),
            sandbox: self.sandbox.unwrap_or_default(),
            max_action_time: self.max_action_time.unwrap_or(MAX_SECONDS),
        }))
    }
}

/// What TLS listeners show, and ask of clients.
#[derive(Debug, Args)]
struct ListenTls {
    /// Certificate chain of TLS listeners (grpcs://…), PEM; read again when it changes.
    #[arg(
        long,
        env = "PRIMED_TLS_CERT",
        value_name = "FILE",
        requires = "tls_key"
    )]
    tls_cert: Option<PathBuf>,
    /// Private key of that certificate, PEM.
    #[arg(
        long,
        env = "PRIMED_TLS_KEY",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    tls_key: Option<PathBuf>,
    /// Let in only clients with a certificate of these authorities (mTLS), PEM.
    #[arg(
        long,
        env = "PRIMED_TLS_CLIENT_CA",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    tls_client_ca: Option<PathBuf>,
}

/// How upstreams that are reached by TLS are verified, and what they are shown.
#[derive(Debug, Args)]
struct UpstreamTls {
    /// Authorities of TLS upstreams, PEM; read again when it changes [default: the system's].
    #[arg(long, env = "PRIMED_UPSTREAM_CA", value_name = "FILE")]
    upstream_ca: Option<PathBuf>,
    /// Certificate chain to show TLS upstreams that ask for one (mTLS), PEM.
    #[arg(
        long,
        env = "PRIMED_UPSTREAM_CERT",
        value_name = "FILE",
        requires = "upstream_key"
    )]
    upstream_cert: Option<PathBuf>,
    /// Private key of that certificate, PEM.
    #[arg(
        long,
        env = "PRIMED_UPSTREAM_KEY",
        value_name = "FILE",
        requires = "upstream_cert"
    )]
    upstream_key: Option<PathBuf>,
    /// Name to expect in the certificates of TLS upstreams [default: the host of their address].
    #[arg(long, env = "PRIMED_UPSTREAM_SERVER_NAME", value_name = "NAME")]
    upstream_server_name: Option<String>,
}

impl ListenTls {
    fn files(self) -> Option<ServerTlsFiles> {
        let certificates = PemFile::new("--tls-cert", self.tls_cert?);
        let key = PemFile::new("--tls-key", self.tls_key?);
        let client_ca = self.tls_client_ca;
        Some(ServerTlsFiles {
            identity: Identity { certificates, key },
            client_ca: client_ca.map(|path| PemFile::new("--tls-client-ca", path)),
        })
    }
}

impl UpstreamTls {
    fn files(self) -> ClientTlsFiles {
        let file = |flag, path: Option<PathBuf>| path.map(|path| PemFile::new(flag, path));
        let certificates = file("--upstream-cert", self.upstream_cert);
        let pair = certificates.zip(file("--upstream-key", self.upstream_key));
        ClientTlsFiles {
            ca: file("--upstream-ca", self.upstream_ca),
            identity: pair.map(|(certificates, key)| Identity { certificates, key }),
            server_name: self.upstream_server_name,
        }
    }
}

impl Arguments {
    fn resolve(self, environment: &Environment) -> Result<Config, Failure> {
        let listen = match self.listen.is_empty() {
            false => self.listen,
            true => vec![environment.default_listen()?],
        };
        let admin = self.admin.map_or_else(|| environment.default_admin(), Ok)?;
        let state_dir = self
            .state_dir
            .map_or_else(|| environment.default_state_dir(), Ok)?;
        // What is set for a primed for all is not about the sockets of one that a run has started.
        let (tls, allow_uids, metrics) = match self.until_unused {
            true => (None, Vec::new(), None),
            false => (self.tls.files(), self.allow_uids, self.metrics),
        };
        let on_the_way = self.on_the_way.resolve(&self.upstream, environment)?;
        let executor = on_the_way.execution.as_ref().unwrap_or(&self.upstream);
        let max_speculative = self
            .max_speculative
            .unwrap_or_else(|| default_max_speculative(executor));
        let config = Config {
            embedded: self.embedded.resolve(&self.upstream, environment)?,
            on_the_way,
            upstream: self.upstream,
            upstream_tls: self.upstream_tls.files(),
            listen,
            tls,
            allow_uids,
            max_connections: self.max_connections,
            max_streams: self.max_streams,
            threads: self.threads.unwrap_or_else(default_threads),
            busy_poll: Duration::from_micros(self.busy_poll),
            admin,
            metrics,
            state_dir,
            mode: self.mode,
            share: self.share,
            // It ends before anybody edits again.
            watch: self.watch && !self.until_unused,
            budgets: self.budgets.limits(),
            max_speculative,
            hedge_after: self.hedge_after,
            patience: Patience {
                connect: self.connect_wait,
                keep_alive: self.keep_alive,
            },
            compat: self.compat,
            until_unused: self.until_unused,
        };
        Ok(config.check()?)
    }
}

/// What `primed serve` would do with what is set in the environment, and `upstream` if one is named.
///
/// # Errors
/// Why it would not start.
pub(super) fn settings(
    upstream: Option<&Address>,
    file: Option<&Path>,
    environment: &Environment,
) -> Result<Config, Failure> {
    let flag = |flag: &str, value: Option<String>| value.map(|value| format!("--{flag}={value}"));
    let file = file.map(|file| file.display().to_string());
    let upstream = upstream.map(Address::to_string);
    let words = ["primed", "serve"].map(str::to_owned).into_iter();
    let words = words
        .chain(flag("upstream", upstream))
        .chain(flag("config", file));
    let command = Cli::command();
    let parsed = settings::parse(&command, words.map(OsString::from).collect(), environment);
    let parsed = parsed.and_then(|matches| Ok(Cli::from_arg_matches(&matches)?.command));
    match parsed {
        Ok(Command::Serve(arguments)) => arguments.resolve(environment),
        Ok(_) => Err(Failure::new(
            exit_codes::USAGE,
            "this is not `primed serve`",
        )),
        Err(Stopped::Failed(failure)) => Err(failure),
        Err(Stopped::Said(error)) => {
            let said = error.to_string();
            let said = said.lines().take_while(|line| !line.is_empty());
            let said: Vec<&str> = said.map(str::trim).collect();
            let said = said.join(" ");
            let said = said.strip_prefix("error: ").unwrap_or(&said);
            Err(Failure::new(exit_codes::USAGE, said))
        }
    }
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let config = arguments.resolve(&Environment::of_process())?;
    // Who started it may have blocked some, as `primed run` does.
    let unblocked = SigSet::all().thread_unblock();
    unblocked.map_err(|error| Failure::new(exit_codes::FAILURE, error))?;
    let failed = |error| Failure::new(exit_codes::FAILURE, error);
    let runtime = server::runtime().build().map_err(failed)?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let shutdown = async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        server::run(config, shutdown).await.map_err(|error| {
            let code = match error.is_of_settings() {
                true => exit_codes::USAGE,
                false => exit_codes::FAILURE,
            };
            Failure::new(code, error)
        })
    })
}
