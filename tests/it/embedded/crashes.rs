//! kill -9 under load: what was acknowledged is there afterwards, and nothing else than what it is
//! said to be. `scripts/crash-embedded` does this more often.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use primed::cas::Digest;
use primed::reapi::action_cache_client::ActionCacheClient;
use primed::reapi::build::bazel::remote::execution::v2::*;
use primed::reapi::google::bytestream::WriteRequest;
use primed::reapi::google::bytestream::byte_stream_client::ByteStreamClient;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::{cas, keep, missing};
use crate::client::connect;
use crate::support::{Primed, scratch, wait_until};

/// How often it is killed, unless `PRIMED_TEST_KILLS` says otherwise.
const KILLS: usize = 10;
/// Who loads it at once.
const CLIENTS: usize = 4;
/// After how many acknowledgements it is killed, at most.
const LONGEST: usize = 60;

/// What was acknowledged.
#[derive(Default)]
struct Acknowledged {
    blobs: Mutex<Vec<Digest>>,
    /// The exit code that the result of an action has.
    results: Mutex<HashMap<Digest, i32>>,
    count: AtomicUsize,
}

/// Uploads blobs and results until that fails.
async fn load(channel: Channel, seed: u64, all: Arc<Acknowledged>) -> Status {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut cas =
        primed::reapi::content_addressable_storage_client::ContentAddressableStorageClient::new(
            channel.clone(),
        );
    let mut streams = ByteStreamClient::new(channel.clone());
    let mut results = ActionCacheClient::new(channel);
    loop {
        let done = match random.u32(0..10) {
            0 => stream(&mut streams, &mut random, &all).await,
            1..4 => update(&mut results, &mut random, &all).await,
            _ => {
                let size = random.usize(1..60_000);
                let content = std::iter::repeat_with(|| random.u8(..))
                    .take(size)
                    .collect();
                keep(&mut cas, content)
                    .await
                    .map(|digest| all.blobs.lock().push(digest))
            }
        };
        if let Err(status) = done {
            return status;
        }
        all.count.fetch_add(1, Ordering::Relaxed);
    }
}

async fn stream(
    streams: &mut ByteStreamClient<Channel>,
    random: &mut fastrand::Rng,
    all: &Acknowledged,
) -> Result<(), Status> {
    let size = random.usize(1..1_000_000);
    let content: Vec<u8> = std::iter::repeat_with(|| random.u8(..))
        .take(size)
        .collect();
    let digest = Digest::of(&content);
    let name = format!("uploads/{}/blobs/{digest}", random.u64(..));
    let pieces: Vec<&[u8]> = content.chunks(100_000).collect();
    let last = pieces.len() - 1;
    let messages = pieces
        .iter()
        .enumerate()
        .map(|(number, piece)| WriteRequest {
            resource_name: name.clone(),
            write_offset: number as i64 * 100_000,
            finish_write: number == last,
            data: piece.to_vec().into(),
        });
    let messages: Vec<WriteRequest> = messages.collect();
    streams.write(tokio_stream::iter(messages)).await?;
    all.blobs.lock().push(digest);
    Ok(())
}

async fn update(
    results: &mut ActionCacheClient<Channel>,
    random: &mut fastrand::Rng,
    all: &Acknowledged,
) -> Result<(), Status> {
    let output = random.choice(all.blobs.lock().iter()).copied();
    let output = output.unwrap_or_else(|| Digest::of(b""));
    let action = Digest::of(&random.u64(..).to_le_bytes());
    let exit_code = random.i32(..);
    let request = UpdateActionResultRequest {
        action_digest: Some(action.to_proto()),
        action_result: Some(ActionResult {
            exit_code,
            output_files: vec![OutputFile {
                digest: Some(output.to_proto()),
                ..OutputFile::default()
            }],
            ..ActionResult::default()
        }),
        ..UpdateActionResultRequest::default()
    };
    results.update_action_result(request).await?;
    all.results.lock().insert(action, exit_code);
    Ok(())
}

/// Everything that was acknowledged is there, and every file is what its name says.
async fn nothing_is_lost(primed: &Primed, all: &Acknowledged) {
    let blobs = all.blobs.lock().clone();
    let lost = missing(&mut cas(primed), &blobs).await;
    assert_eq!(lost, [], "of {}", blobs.len());
    let mut results = ActionCacheClient::new(connect(&primed.socket()));
    let expected = all.results.lock().clone();
    for (action, exit_code) in expected {
        let request = GetActionResultRequest {
            action_digest: Some(action.to_proto()),
            ..GetActionResultRequest::default()
        };
        let found = results
            .get_action_result(request)
            .await
            .unwrap()
            .into_inner();
        assert_eq!(found.exit_code, exit_code);
    }
}

fn nothing_is_wrong(cache: &Path) -> usize {
    let mut files = 0;
    for shard in std::fs::read_dir(cache.join("blobs/sha256")).unwrap() {
        for file in std::fs::read_dir(shard.unwrap().path()).unwrap() {
            let file = file.unwrap();
            let digest = Digest::of(&std::fs::read(file.path()).unwrap());
            let name = digest.to_string().replace('/', "_");
            assert_eq!(file.file_name().to_str(), Some(name.as_str()));
            files += 1;
        }
    }
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_at_any_moment_loses_nothing_that_was_acknowledged() {
    let kills = std::env::var("PRIMED_TEST_KILLS").ok();
    let kills = kills.map_or(KILLS, |kills| kills.parse().unwrap());
    let seed = std::env::var("PRIMED_TEST_SEED").ok();
    let seed: u64 = seed.map_or_else(|| fastrand::u64(..), |seed| seed.parse().unwrap());
    eprintln!("PRIMED_TEST_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let scratch = scratch();
    let all = Arc::new(Acknowledged::default());
    let mut abandoned = 0;
    for _ in 0..kills {
        let mut primed = Primed::embedded(scratch.path(), &[]);
        let enough = all.count.load(Ordering::Relaxed) + random.usize(0..LONGEST);
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                let channel = connect(&primed.socket());
                #[allow(clippy::disallowed_methods, reason = "the test waits for it")]
                tokio::spawn(load(channel, random.u64(..), all.clone()))
            })
            .collect();
        wait_until("there was enough load", || {
            all.count.load(Ordering::Relaxed) >= enough
                || clients.iter().any(|one| one.is_finished())
        });
        primed.daemon.kill();
        for client in clients {
            let ended = client.await.unwrap();
            // Only for want of a server: how that shows depends on where the call was.
            let codes = [
                Code::Unavailable,
                Code::Unknown,
                Code::Cancelled,
                Code::Internal,
            ];
            assert!(codes.contains(&ended.code()), "{ended}");
        }
        abandoned += std::fs::read_dir(scratch.path().join("cache/temporary"))
            .unwrap()
            .count();
        // What the kill left at the sockets' places.
        for socket in ["primed.sock", "admin.sock"] {
            let _ = std::fs::remove_file(scratch.path().join(socket));
        }
    }
    let primed = Primed::embedded(scratch.path(), &[]);
    nothing_is_lost(&primed, &all).await;
    let files = nothing_is_wrong(&scratch.path().join("cache"));
    let left = std::fs::read_dir(scratch.path().join("cache/temporary"))
        .unwrap()
        .count();
    assert_eq!(left, 0);
    eprintln!(
        "{kills} kills under load: {} blobs and {} results were acknowledged, and all are there; \
         {files} files of blobs, all of them right; {abandoned} half-written files were left and \
         cleared away",
        all.blobs.lock().len(),
        all.results.lock().len(),
    );
}
