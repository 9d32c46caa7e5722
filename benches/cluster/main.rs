//! A worker of a simulated cluster: what `scripts/bench-gain` and `scripts/bench-harm` give to
//! buildbox-casd as `--buildbox-run`, so that two cores can stand for sixty-four.
//!
//! The first time that an action is asked for, the real runner executes it, two at a time, and its
//! real result is kept under the action's digest. From then on the action takes the time that it is
//! said to take on the cluster, and next to nothing of this machine. What the action wrote is put
//! into casd's store as a hard link, since a cluster's worker would not upload it from here either.
//!
//! Everything is said in the environment, which casd passes on:
//!
//! | variable | |
//! |---|---|
//! | `CLUSTER_MEMO` | the folder of kept results |
//! | `CLUSTER_STORE` | casd's folder of blobs |
//! | `CLUSTER_RUNNER` | the real runner |
//! | `CLUSTER_COMPILE_MS`, `CLUSTER_OTHER_MS` | how long an action takes that writes a `.o`, and any other |
//! | `CLUSTER_LATE` | a file that gets a line for each result that had not been kept |

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::time::{Duration, SystemTime};

use nix::sys::signal::SigSet;
use primed::reapi::{ActionResult, Digest};
use prost::Message;
use sha2::{Digest as _, Sha256};

/// Executions of the real runner at a time.
const CORES: u32 = 2;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let path = |flag: &str| {
        let value = arguments.iter().find_map(|given| given.strip_prefix(flag));
        value.map(PathBuf::from)
    };
    let (Some(action), Some(answer)) = (path("--action="), path("--action-result=")) else {
        // What `cargo bench` does, too.
        eprintln!("cluster: nothing to execute; scripts/bench-gain has casd run this");
        return ExitCode::SUCCESS;
    };
    // casd blocks SIGTERM for itself, and so for what it starts; by it a cancelled action is stopped.
    if let Err(error) = SigSet::all().thread_unblock() {
        eprintln!("cluster: error: it cannot be stopped: {error}");
        return ExitCode::FAILURE;
    }
    match execute(&action, &answer, &arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cluster: error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Puts the result of `action` into the file `answer`.
fn execute(action: &Path, answer: &Path, arguments: &[String]) -> Result<()> {
    let began = SystemTime::now();
    let memo = PathBuf::from(variable("CLUSTER_MEMO")?);
    let store = PathBuf::from(variable("CLUSTER_STORE")?);
    let action = fs::read(action)?;
    let key: String = Sha256::digest(&action)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let kept = memo.join("results").join(&key);
    let blobs = memo.join("blobs");

    let result = match fs::read(&kept) {
        Ok(bytes) => {
            let result = ActionResult::decode(&bytes[..])?;
            for blob in written(&result) {
                link(&blobs.join(&blob.hash), &in_store(&store, &blob.hash))?;
            }
            result
        }
        Err(_) => {
            let status = run_for_real(&memo, &key, arguments)?;
            let result = ActionResult::decode(&fs::read(answer)?[..])?;
            if !status.success() || result.exit_code != 0 {
                return Ok(()); // The client is told what went wrong; nothing is kept.
            }
            for blob in written(&result) {
                link(&in_store(&store, &blob.hash), &blobs.join(&blob.hash))?;
            }
            write_whole(&kept, &result.encode_to_vec())?;
            let mut late = File::options()
                .append(true)
                .create(true)
                .open(variable("CLUSTER_LATE")?)?;
            writeln!(late, "{key}")?;
            result
        }
    };
    let takes = if result
        .output_files
        .iter()
        .any(|file| file.path.ends_with(".o"))
    {
        "CLUSTER_COMPILE_MS"
    } else {
        "CLUSTER_OTHER_MS"
    };
    let takes = Duration::from_millis(variable(takes)?.parse()?);
    wait(takes.saturating_sub(began.elapsed()?));
    fs::write(answer, as_of(result, began).encode_to_vec())?;
    Ok(())
}

/// The variable `name` of the environment.
fn variable(name: &str) -> Result<String> {
    std::env::var(name).map_err(|error| format!("{name}: {error}").into())
}

/// Has the real runner execute the action, when a core is free for it.
fn run_for_real(memo: &Path, key: &str, arguments: &[String]) -> Result<ExitStatus> {
    let core = u32::from_str_radix(&key[..4], 16)? % CORES;
    let lock = File::create(memo.join(format!("core.{core}")))?;
    lock.lock()?;
    Ok(Command::new(variable("CLUSTER_RUNNER")?)
        .args(arguments)
        .status()?)
}

/// What the result refers to. The empty blob is everywhere.
fn written(result: &ActionResult) -> impl Iterator<Item = &Digest> {
    let files = result.output_files.iter().map(|file| &file.digest);
    files
        .chain([&result.stdout_digest, &result.stderr_digest])
        .flatten()
        .filter(|digest| digest.size_bytes > 0)
}

/// Where casd keeps a blob (buildbox-casd 1.4: two characters of the hash are a folder).
fn in_store(store: &Path, hash: &str) -> PathBuf {
    store.join(&hash[..2]).join(&hash[2..])
}

fn link(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    match fs::hard_link(from, to) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(format!("{}: {error}", from.display()).into())
        }
        _ => Ok(()),
    }
}

/// Writes a file that others may read at any time.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let new = path.with_extension(std::process::id().to_string());
    fs::write(&new, bytes)?;
    Ok(fs::rename(new, path)?)
}

/// The result as if it had been executed from `began` until now.
fn as_of(mut result: ActionResult, began: SystemTime) -> ActionResult {
    let metadata = result.execution_metadata.get_or_insert_default();
    let began = Some(began.into());
    let now = Some(SystemTime::now().into());
    metadata.worker_start_timestamp = began;
    metadata.input_fetch_start_timestamp = began;
    metadata.input_fetch_completed_timestamp = began;
    metadata.execution_start_timestamp = began;
    metadata.execution_completed_timestamp = now;
    metadata.output_upload_start_timestamp = now;
    metadata.output_upload_completed_timestamp = now;
    metadata.worker_completed_timestamp = now;
    result
}

#[allow(
    clippy::disallowed_methods,
    reason = "to take time is what a simulated worker is for"
)]
fn wait(time: Duration) {
    std::thread::sleep(time);
}
