//! `primed wait`: for scripts that go on when recording, generation and priming are quiet.

use std::time::Duration;

use clap::Args;

use super::{AdminAddress, Failure, admin_client, block_on, exit_codes};
use crate::server::WAIT_PATH;

/// Wait until recording, generation and priming are quiet; exit code 1 if that takes too long.
#[derive(Debug, Args)]
pub struct Arguments {
    /// How long to wait, in seconds [default: for ever].
    #[arg(long, env = "PRIMED_TIMEOUT", value_name = "SECONDS")]
    timeout: Option<f64>,
    #[command(flatten)]
    admin: AdminAddress,
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let timeout = match arguments.timeout.map(Duration::try_from_secs_f64) {
        None => Duration::MAX,
        Some(Ok(timeout)) => timeout,
        Some(Err(error)) => {
            return Err(Failure::new(
                exit_codes::USAGE,
                format!("--timeout: {error}"),
            ));
        }
    };
    let admin = block_on(async { Ok(arguments.admin.find().await?) })?;
    block_on(async {
        match tokio::time::timeout(timeout, admin_client::get(&admin, WAIT_PATH)).await {
            Ok(answered) => answered.map(drop),
            Err(_) => {
                let message = format!("not quiet after {} s", timeout.as_secs_f64());
                Err(Failure::new(exit_codes::FAILURE, message))
            }
        }
    })
}
