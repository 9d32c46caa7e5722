//! A backend in memory that executes in no time, and counts. It may be far away.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use primed::backend::{Backend, Operations};
use primed::digest::Digest;
use primed::reapi::google::longrunning::{Operation, operation};
use primed::reapi::{ActionResult, CacheCapabilities, ExecuteResponse, ServerCapabilities};
use primed::speculation::flights::FlightKey;
use prost::Message;
use tonic::{Status, async_trait};

use crate::result;

/// How much one batch may hold.
const BATCH: i64 = 4 * 1024 * 1024;
/// For how long nothing may be executed.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Default)]
pub struct InMemory {
    blobs: Mutex<HashMap<Digest, Bytes>>,
    executed: Mutex<HashSet<FlightKey>>,
    one_more: Condvar,
    uploads: Mutex<usize>,
    round_trip: Duration,
}

impl InMemory {
    /// One that holds nothing, and to which each call takes so long.
    pub fn at(round_trip: Duration) -> Self {
        InMemory {
            round_trip,
            ..InMemory::default()
        }
    }

    /// There and back.
    async fn travel(&self) {
        if !self.round_trip.is_zero() {
            tokio::time::sleep(self.round_trip).await;
        }
    }

    /// Holds a blob from the beginning.
    pub fn hold(&self, digest: Digest, blob: Bytes) {
        self.blobs.lock().insert(digest, blob);
    }

    /// Counts uploads from now on.
    pub fn begin_count(&self) {
        *self.uploads.lock() = 0;
    }

    pub fn uploads(&self) -> usize {
        *self.uploads.lock()
    }

    /// Returns when so many actions have been executed, and tells which.
    pub fn wait_for_executions(&self, count: usize) -> HashSet<FlightKey> {
        let mut executed = self.executed.lock();
        while executed.len() < count {
            let wait = self.one_more.wait_for(&mut executed, PATIENCE);
            assert!(!wait.timed_out(), "only {} were executed", executed.len());
        }
        executed.clone()
    }

    /// As a service would send it: bytes of the receiver's own.
    fn sent(&self, digest: &Digest) -> Option<Bytes> {
        let blobs = self.blobs.lock();
        blobs.get(digest).map(|blob| Bytes::copy_from_slice(blob))
    }
}

/// The last word about an execution.
pub fn operation(result: ActionResult) -> Operation {
    let response = ExecuteResponse {
        result: Some(result),
        ..ExecuteResponse::default()
    };
    Operation {
        done: true,
        result: Some(operation::Result::Response(prost_types::Any {
            type_url: String::new(),
            value: response.encode_to_vec(),
        })),
        ..Operation::default()
    }
}

#[async_trait]
impl Backend for InMemory {
    async fn capabilities(&self, _: &str) -> Result<ServerCapabilities, Status> {
        self.travel().await;
        Ok(ServerCapabilities {
            cache_capabilities: Some(CacheCapabilities {
                max_batch_total_size_bytes: BATCH,
                ..CacheCapabilities::default()
            }),
            ..ServerCapabilities::default()
        })
    }

    async fn find_missing(&self, _: &str, digests: &[Digest]) -> Result<Vec<Digest>, Status> {
        self.travel().await;
        let blobs = self.blobs.lock();
        let missing = digests.iter().filter(|digest| !blobs.contains_key(digest));
        Ok(missing.copied().collect())
    }

    async fn read_batch(
        &self,
        _: &str,
        digests: &[Digest],
    ) -> Result<Vec<(Digest, Bytes)>, Status> {
        self.travel().await;
        let found = |digest: &Digest| Some((*digest, self.sent(digest)?));
        Ok(digests.iter().filter_map(found).collect())
    }

    async fn read(&self, _: &str, digest: Digest) -> Result<Bytes, Status> {
        self.travel().await;
        self.sent(&digest)
            .ok_or_else(|| Status::not_found("no such blob"))
    }

    async fn write_batch(&self, _: &str, blobs: &[(Digest, Bytes)]) -> Result<(), Status> {
        self.travel().await;
        *self.uploads.lock() += blobs.len();
        let mut held = self.blobs.lock();
        for (digest, blob) in blobs {
            held.insert(*digest, blob.clone());
        }
        Ok(())
    }

    async fn write(&self, instance: &str, digest: Digest, blob: Bytes) -> Result<(), Status> {
        self.write_batch(instance, &[(digest, blob)]).await
    }

    async fn action_result(&self, _: &str, _: Digest) -> Result<Option<ActionResult>, Status> {
        self.travel().await;
        Ok(None)
    }

    async fn update_action_result(
        &self,
        _: &str,
        _: Digest,
        _: ActionResult,
    ) -> Result<(), Status> {
        self.travel().await;
        Ok(())
    }

    async fn execute(&self, _: &str, action: Digest, _: i32) -> Result<Operations, Status> {
        self.travel().await;
        let key = crate::key(action);
        let encoded = self.sent(&action);
        let encoded = encoded.ok_or_else(|| Status::failed_precondition("no such action"))?;
        self.executed.lock().insert(key);
        self.one_more.notify_one();
        let done = operation(result("a.o", &encoded)).encode_to_vec();
        Ok(Box::pin(tokio_stream::once(Ok(Bytes::from(done)))))
    }

    async fn cancel(&self, _: &str) -> Result<(), Status> {
        Ok(())
    }
}
