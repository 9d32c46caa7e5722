//! One supervised command, as primed sees it: started, left alone until it ends, or told to end.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use super::failure::Failure;
use super::supervisor::{End, Order};

/// The name of the command that `supervisor` is behind.
const SUPERVISE: &str = "supervise";

/// How a command came to its end, with all its processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this code: what a shell makes of a signal is 128 and its number.
    Exited(i32),
    /// It was killed, for it took too long.
    Overran,
    /// It was killed, for nobody wants it any more.
    Cancelled,
}

/// Runs what `order` says, for `timeout` at most, and until `cancelled`. Once it returns, no
/// process of it is left.
///
/// # Errors
/// `Failure`, when it could not be run, or its supervisor was killed.
pub async fn run(
    order: &Order,
    timeout: Duration,
    cancelled: &CancellationToken,
) -> Result<Ended, Failure> {
    let failed = |error| Failure::internal(format!("the command cannot be supervised: {error}"));
    let mut line = serde_json::to_vec(order).map_err(|error| failed(error.into()))?;
    line.push(b'\n');
    let mut supervisor = start().map_err(failed)?;
    let (Some(mut stdin), Some(mut stdout)) = (supervisor.stdin.take(), supervisor.stdout.take())
    else {
        return Err(Failure::internal("the command's supervisor has no pipes"));
    };
    // One that has ended before it reads says so below.
    let _ = stdin.write_all(&line).await;
    let mut report = Vec::new();
    let reading = stdout.read_to_end(&mut report);
    tokio::pin!(reading);
    let stopped = tokio::select! {
        _ = &mut reading => None,
        () = tokio::time::sleep(timeout) => Some(Ended::Overran),
        () = cancelled.cancelled() => Some(Ended::Cancelled),
    };
    // Tells it to kill what is left.
    drop(stdin);
    if stopped.is_some() {
        let _ = reading.await;
    }
    let status = supervisor.wait().await.map_err(failed)?;
    if let Some(stopped) = stopped {
        return Ok(stopped);
    }
    match serde_json::from_slice(&report) {
        Ok(End::Exited(code)) => Ok(Ended::Exited(code)),
        Ok(End::Signalled(signal)) => Ok(Ended::Exited(128 + signal)),
        Err(_) if status.code().is_some() => Err(Failure::internal(
            "the command could not be supervised; primed's log says why",
        )),
        Err(_) => Err(Failure::new(
            tonic::Code::Unavailable,
            "the command's supervisor was killed, perhaps for want of memory; fewer --jobs take less",
        )),
    }
}

/// This very program once more, even if its file has been replaced.
fn start() -> std::io::Result<Child> {
    Command::new(Path::new("/proc/self/exe"))
        .arg0("primed")
        .arg(SUPERVISE)
        .env_clear()
        .current_dir(PathBuf::from("/"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
}
