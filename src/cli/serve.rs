//! `primed serve`: the daemon.

use std::num::NonZero;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::upstream_arguments::UpstreamArguments;
use super::{Failure, block_on, exit_codes};
use crate::address::Address;
use crate::config::{Compat, Config, Environment, Mode, Patience, default_max_speculative};
use crate::server;

/// The longest time that can be asked for: a day.
const MAX_SECONDS: Duration = Duration::from_secs(86_400);

/// Forward calls from build clients to a backend, and prime its action cache.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Backend that calls are forwarded to: unix:PATH, unix-abstract:NAME, grpc://HOST:PORT,
    /// http://HOST:PORT or HOST:PORT.
    #[arg(long, env = "PRIMED_UPSTREAM", value_name = "ADDR")]
    upstream: Address,
    /// Where clients connect; may be given several times, or with commas between
    /// [default: unix:$XDG_RUNTIME_DIR/primed/remote-apis.sock].
    #[arg(
        long,
        env = "PRIMED_LISTEN",
        value_name = "ADDR",
        value_delimiter = ','
    )]
    listen: Vec<Address>,
    /// Where the records of earlier builds are kept [default: $XDG_STATE_HOME/primed].
    #[arg(long, env = "PRIMED_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where `primed status` and `primed wait` connect
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
            listen,
            admin,
            state_dir,
            mode: self.mode,
            max_speculative: self.max_speculative.unwrap_or_else(default_max_speculative),
            patience: Patience {
                connect: self.connect_wait,
                keep_alive: self.keep_alive,
            },
            max_streams: 10_000,
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
        server::run(config, shutdown)
            .await
            .map_err(|error| Failure::new(exit_codes::FAILURE, error))
    })
}
