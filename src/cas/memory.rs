//! A CAS and an action cache in memory, for tests. It counts what is asked of the CAS.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tonic::{Status, async_trait};

use super::Digest;
use crate::backend::{Backend, Operations};
use crate::reapi::{
    ActionCacheUpdateCapabilities, ActionResult, CacheCapabilities, ServerCapabilities,
};

/// How much one batch may hold.
pub const BATCH: u64 = 10_000;

#[derive(Default)]
pub struct Memory {
    pub blobs: Mutex<HashMap<Digest, Bytes>>,
    /// The digests of each batch that was read.
    pub batches_read: Mutex<Vec<Vec<Digest>>>,
    /// The digests that were written, in batches and by stream.
    pub written: Mutex<[Vec<Digest>; 2]>,
    /// The action cache, by instance.
    pub results: Mutex<HashMap<(String, Digest), ActionResult>>,
}

impl Memory {
    pub fn holding(blobs: impl IntoIterator<Item = Bytes>) -> Arc<Self> {
        let memory = Memory::default();
        for blob in blobs {
            memory.blobs.lock().insert(Digest::of(&blob), blob);
        }
        Arc::new(memory)
    }
}

#[async_trait]
impl Backend for Memory {
    async fn capabilities(&self, _: &str) -> Result<ServerCapabilities, Status> {
        Ok(ServerCapabilities {
            cache_capabilities: Some(CacheCapabilities {
                max_batch_total_size_bytes: BATCH as i64,
                action_cache_update_capabilities: Some(ActionCacheUpdateCapabilities {
                    update_enabled: true,
                }),
                ..CacheCapabilities::default()
            }),
            ..ServerCapabilities::default()
        })
    }

    async fn find_missing(&self, _: &str, digests: &[Digest]) -> Result<Vec<Digest>, Status> {
        let blobs = self.blobs.lock();
        let missing = digests.iter().filter(|digest| !blobs.contains_key(digest));
        Ok(missing.copied().collect())
    }

    async fn read_batch(
        &self,
        _: &str,
        digests: &[Digest],
    ) -> Result<Vec<(Digest, Bytes)>, Status> {
        let total: u64 = digests.iter().map(Digest::size).sum();
        if total > BATCH {
            return Err(Status::invalid_argument("the batch is too large"));
        }
        self.batches_read.lock().push(digests.to_vec());
        let blobs = self.blobs.lock();
        let found = |digest: &Digest| Some((*digest, blobs.get(digest)?.clone()));
        Ok(digests.iter().filter_map(found).collect())
    }

    async fn read(&self, _: &str, digest: Digest) -> Result<Bytes, Status> {
        let blob = self.blobs.lock().get(&digest).cloned();
        blob.ok_or_else(|| Status::not_found("no such blob"))
    }

    async fn write_batch(&self, _: &str, blobs: &[(Digest, Bytes)]) -> Result<(), Status> {
        let total: u64 = blobs.iter().map(|(digest, _)| digest.size()).sum();
        if total > BATCH {
            return Err(Status::invalid_argument("the batch is too large"));
        }
        for (digest, blob) in blobs {
            self.written.lock()[0].push(*digest);
            self.blobs.lock().insert(*digest, blob.clone());
        }
        Ok(())
    }

    async fn write(&self, _: &str, digest: Digest, blob: Bytes) -> Result<(), Status> {
        self.written.lock()[1].push(digest);
        self.blobs.lock().insert(digest, blob);
        Ok(())
    }

    async fn action_result(
        &self,
        instance: &str,
        action: Digest,
    ) -> Result<Option<ActionResult>, Status> {
        let name = (instance.to_owned(), action);
        Ok(self.results.lock().get(&name).cloned())
    }

    async fn update_action_result(
        &self,
        instance: &str,
        action: Digest,
        result: ActionResult,
    ) -> Result<(), Status> {
        let name = (instance.to_owned(), action);
        self.results.lock().insert(name, result);
        Ok(())
    }

    async fn execute(&self, _: &str, _: Digest, _: i32) -> Result<Operations, Status> {
        Err(Status::unimplemented("it executes nothing"))
    }

    async fn cancel(&self, _: &str) -> Result<(), Status> {
        Err(Status::unimplemented("it executes nothing"))
    }
}
