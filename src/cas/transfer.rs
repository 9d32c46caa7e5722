//! Batched fetch and upload of blobs, each checked against its digest. Used by whatever reads
//! recorded trees or uploads adapted ones; forwarded traffic does not pass here.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tonic::Status;

use super::Digest;
use crate::backend::Backend;

/// What fits into one batch where the backend names no limit: gRPC's usual 4 MiB less room for
/// the envelope. (recc assumes the same.)
const DEFAULT_BATCH: u64 = 4 * 1024 * 1024 - 64 * 1024;
/// What the envelope of one blob in a batch takes: a digest, a status, a few tags.
const BLOB_OVERHEAD: u64 = 128;
/// How many digests are asked for in one `FindMissingBlobs`.
const FIND_MISSING_CHUNK: usize = 10_000;
/// No directory, action or command is larger; a digest that says so is not fetched.
const MAX_FETCH: u64 = 256 * 1024 * 1024;

/// The content-addressable storage of one backend.
#[derive(Clone)]
pub struct Cas {
    backend: Arc<dyn Backend>,
    batch_limits: Arc<Mutex<HashMap<String, u64>>>,
}

impl Cas {
    /// The CAS behind `backend`.
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Cas {
            backend,
            batch_limits: Arc::default(),
        }
    }

    /// Fetches `digests`, each once; those that are absent, or whose content does not match
    /// their digest, are left out.
    ///
    /// # Errors
    /// The backend's status, when a whole call failed.
    pub async fn fetch(
        &self,
        instance: &str,
        digests: impl IntoIterator<Item = Digest>,
    ) -> Result<HashMap<Digest, Bytes>, Status> {
        let limit = self.batch_limit(instance).await;
        let mut blobs = HashMap::new();
        let mut wanted: HashSet<Digest> = digests.into_iter().collect();
        wanted.retain(|digest| digest.size() <= MAX_FETCH);
        let is_empty = |digest: &Digest| digest.size() == 0 && *digest == digest.function().of(b"");
        blobs.extend(
            wanted
                .extract_if(is_empty)
                .map(|empty| (empty, Bytes::new())),
        );
        let (mut small, large): (Vec<_>, Vec<_>) = wanted
            .into_iter()
            .partition(|digest| digest.size() + BLOB_OVERHEAD <= limit);
        small.sort_unstable_by_key(Digest::function);
        for small in small.chunk_by(|one, other| one.function() == other.function()) {
            let sizes = small.iter().map(Digest::size);
            for range in batches(sizes, limit) {
                for (digest, blob) in self.backend.read_batch(instance, &small[range]).await? {
                    keep_verified(&mut blobs, digest, blob);
                }
            }
        }
        for digest in large {
            match self.backend.read(instance, digest).await {
                Ok(blob) => keep_verified(&mut blobs, digest, blob),
                Err(status) if status.code() == tonic::Code::NotFound => {}
                Err(status) => return Err(status),
            }
        }
        Ok(blobs)
    }

    /// Uploads those of `blobs` that the backend does not hold, and says which.
    ///
    /// # Errors
    /// The backend's status for the first blob or call that failed.
    pub async fn upload(
        &self,
        instance: &str,
        blobs: &HashMap<Digest, Bytes>,
    ) -> Result<Vec<Digest>, Status> {
        let mut digests: Vec<Digest> = blobs.keys().copied().collect();
        digests.sort_unstable_by_key(Digest::function);
        let mut missing = Vec::new();
        for digests in digests.chunk_by(|one, other| one.function() == other.function()) {
            for chunk in digests.chunks(FIND_MISSING_CHUNK) {
                for digest in self.backend.find_missing(instance, chunk).await? {
                    if let Some(blob) = blobs.get(&digest) {
                        missing.push((digest, blob.clone()));
                    }
                }
            }
        }
        let uploaded = missing.iter().map(|(digest, _)| *digest).collect();
        if missing.is_empty() {
            return Ok(uploaded);
        }
        let limit = self.batch_limit(instance).await;
        let (small, large): (Vec<_>, Vec<_>) = missing
            .into_iter()
            .partition(|(digest, _)| digest.size() + BLOB_OVERHEAD <= limit);
        for small in small.chunk_by(|(one, _), (other, _)| one.function() == other.function()) {
            let sizes = small.iter().map(|(digest, _)| digest.size());
            for range in batches(sizes, limit) {
                self.backend.write_batch(instance, &small[range]).await?;
            }
        }
        for (digest, blob) in large {
            self.backend.write(instance, digest, blob).await?;
        }
        Ok(uploaded)
    }

    /// How many bytes one batch may hold, asked of the backend once for each instance.
    async fn batch_limit(&self, instance: &str) -> u64 {
        if let Some(limit) = self.batch_limits.lock().get(instance) {
            return *limit;
        }
        let Ok(capabilities) = self.backend.capabilities(instance).await else {
            return DEFAULT_BATCH;
        };
        let capabilities = capabilities.cache_capabilities.unwrap_or_default();
        // Zero means that the backend sets no limit; gRPC's own remains.
        let limit = match u64::try_from(capabilities.max_batch_total_size_bytes) {
            Ok(limit @ 1..) => limit.min(DEFAULT_BATCH),
            _ => DEFAULT_BATCH,
        };
        self.batch_limits.lock().insert(instance.to_owned(), limit);
        limit
    }
}

fn keep_verified(blobs: &mut HashMap<Digest, Bytes>, digest: Digest, blob: Bytes) {
    if digest.function().of(&blob) == digest {
        blobs.insert(digest, blob);
    } else {
        tracing::warn!(%digest, "the backend returned a blob that does not match its digest");
    }
}

/// Splits blobs of these sizes, in order, into ranges that fit into `limit` bytes each.
fn batches(sizes: impl Iterator<Item = u64>, limit: u64) -> Vec<std::ops::Range<usize>> {
    let mut ranges = Vec::new();
    let mut start = 0;
    let mut total = 0;
    let mut end = 0;
    for size in sizes {
        let size = size + BLOB_OVERHEAD;
        if end > start && total + size > limit {
            ranges.push(start..end);
            start = end;
            total = 0;
        }
        total += size;
        end += 1;
    }
    if end > start {
        ranges.push(start..end);
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cas::memory::Memory;

    #[test]
    fn batches_cover_everything_once_and_respect_the_limit() {
        let sizes = [100, 100, 5000, 1, 1, 4000, 4000];
        let ranges = batches(sizes.iter().copied(), 5200);
        assert_eq!(ranges, [0..2, 2..3, 3..6, 6..7]);
        assert!(batches(std::iter::empty(), 10).is_empty());
    }

    fn blob(size: usize, fill: u8) -> Bytes {
        vec![fill; size].into()
    }

    #[tokio::test]
    async fn what_is_fetched_is_there_once_and_whole_or_left_out() {
        let small: Vec<Bytes> = (0..30).map(|fill| blob(1000, fill)).collect();
        let large = blob(50_000, 99);
        let memory = Memory::holding(small.iter().cloned().chain([large.clone()]));
        let absent = [Digest::of(b"absent"), Digest::of(&blob(60_000, 1))];
        let damaged = Digest::of(&small[3]);
        memory.blobs.lock().insert(damaged, blob(1000, 200));
        let damaged_large = Digest::of(&blob(50_000, 98));
        memory.blobs.lock().insert(damaged_large, large.clone());
        let held: Vec<Digest> = small
            .iter()
            .chain([&large])
            .map(|b| Digest::of(b))
            .collect();
        let asked = held.iter().chain(&held).chain(&absent).copied();
        let asked = asked.chain([Digest::of(b""), damaged_large]);
        let fetched = Cas::new(memory.clone()).fetch("", asked).await.unwrap();
        assert_eq!(
            fetched.len(),
            held.len(),
            "less the damaged, and the empty one"
        );
        assert_eq!(fetched[&Digest::of(b"")], Bytes::new());
        assert!(
            fetched
                .iter()
                .all(|(digest, blob)| Digest::of(blob) == *digest)
        );
        let mut read: Vec<Digest> = memory.batches_read.lock().concat();
        let count = read.len();
        read.sort_unstable();
        read.dedup();
        assert_eq!(read.len(), count, "no digest is asked for twice");
    }

    #[tokio::test]
    async fn only_what_is_missing_is_uploaded_and_what_is_large_by_itself() {
        let memory = Memory::holding([blob(10, 1)]);
        let blobs = (0..25)
            .map(|fill| blob(1000, fill))
            .chain([blob(10, 1), blob(20_000, 7)]);
        let blobs: HashMap<Digest, Bytes> = blobs.map(|blob| (Digest::of(&blob), blob)).collect();
        let cas = Cas::new(memory.clone());
        let uploaded = cas.upload("", &blobs).await.unwrap();
        assert_eq!(uploaded.len(), 26);
        assert_eq!(memory.written.lock().each_ref().map(Vec::len), [25, 1]);
        assert_eq!(*memory.blobs.lock(), blobs);
        assert_eq!(cas.upload("", &blobs).await.unwrap(), []);
        assert_eq!(memory.written.lock().each_ref().map(Vec::len), [25, 1]);
    }
}
