//! `primed serve`: the daemon.

use std::num::NonZero;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::upstream_arguments::UpstreamArguments;
use super::{Failure, block_on, exit_codes};
use crate::address::{Address, ListenAddress};
use crate::config::{Compat, Config, Environment, Mode, Patience, default_max_speculative};
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
    /// https://HOST:PORT with TLS (443 if no port), grpc://HOST:PORT, http://HOST:PORT or HOST:PORT without.
    #[arg(long, env = "PRIMED_UPSTREAM", value_name = "ADDR")]
    upstream: Address,
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
    /// Where the records of earlier builds are kept [default: $XDG_STATE_HOME/primed].
    #[arg(long, env = "PRIMED_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where other commands (`primed status`, say) connect
    /// [default: unix:$XDG_RUNTIME_DIR/primed/admin.sock].
    #[arg(long, env = "PRIMED_ADMIN", value_name = "ADDR")]
    admin: Option<Address>,
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
    /// How many speculative actions run at once [default: two for each core].
    #[arg(long, env = "PRIMED_MAX_SPECULATIVE", value_name = "N")]
    max_speculative: Option<NonZero<usize>>,
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
    // Its heading holds for all that follow.
    #[command(flatten)]
    on_the_way: UpstreamArguments,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().map(Duration::try_from_secs_f64);
    match seconds {
        Some(Ok(duration)) if duration <= MAX_SECONDS => Ok(duration),
        _ => Err("a number of seconds is wanted, up to 86400".to_owned()),
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
        let config = Config {
            on_the_way: self.on_the_way.resolve(&self.upstream)?,
            upstream: self.upstream,
            upstream_tls: self.upstream_tls.files(),
            listen,
            tls: self.tls.files(),
            allow_uids: self.allow_uids,
            max_connections: self.max_connections,
            max_streams: self.max_streams,
            admin,
            state_dir,
            mode: self.mode,
            share: self.share,
            max_speculative: self.max_speculative.unwrap_or_else(default_max_speculative),
            patience: Patience {
                connect: self.connect_wait,
                keep_alive: self.keep_alive,
            },
            compat: self.compat,
        };
        Ok(config.check()?)
    }
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let config = arguments.resolve(&Environment::of_process())?;
    block_on(async {
        let failed = |error| Failure::new(exit_codes::FAILURE, error);
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
