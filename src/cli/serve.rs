//! `primed serve`: the daemon.

use std::num::NonZero;
use std::path::PathBuf;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::upstream_arguments::UpstreamArguments;
use super::{Failure, block_on, exit_codes};
use crate::address::Address;
use crate::config::{Config, Environment, Mode, default_max_speculative};
use crate::server;

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
    // Its heading holds for all that follow.
    #[command(flatten)]
    on_the_way: UpstreamArguments,
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
