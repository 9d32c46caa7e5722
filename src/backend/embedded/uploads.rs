//! Uploads that are under way, or were when their connection broke: for a while a client may go on
//! where it stopped.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tonic::Status;

use super::blobs::{BlobWriter, Blobs};
use crate::digest::Digest;

/// How long an interrupted upload is kept, and how many of them.
const KEPT: Duration = Duration::from_secs(10 * 60);
const MOST: usize = 1024;

/// All of them, by resource name.
#[derive(Default)]
pub(super) struct Uploads(Mutex<HashMap<String, Parked>>);

struct Parked {
    upload: Arc<Upload>,
    since: Instant,
}

/// One upload. Locked while a piece is written, so not for long.
pub(super) struct Upload(Mutex<Progress>);

struct Progress {
    /// `None` when it is over.
    writer: Option<BlobWriter>,
    /// Which stream feeds it: one that was broken, without our knowing yet, must not go on.
    stream: u64,
}

/// The right of one stream to feed an upload.
pub(super) struct Turn {
    upload: Arc<Upload>,
    stream: u64,
}

impl Uploads {
    /// Begins an upload, or goes on with one. `offset` is where the client does. Blocks.
    pub fn open(
        &self,
        blobs: &Arc<Blobs>,
        name: &str,
        digest: Digest,
        offset: i64,
        now: Instant,
    ) -> Result<Turn, Status> {
        let parked = {
            let mut all = self.0.lock();
            all.retain(|_, parked| now.saturating_duration_since(parked.since) < KEPT);
            all.get(name).map(|parked| parked.upload.clone())
        };
        if let Some(upload) = parked.filter(|_| offset > 0) {
            let mut progress = upload.0.lock();
            let written = progress.writer.as_ref().map(BlobWriter::written);
            if written == u64::try_from(offset).ok() {
                progress.stream += 1;
                let stream = progress.stream;
                drop(progress);
                self.keep(name, upload.clone(), now);
                return Ok(Turn { upload, stream });
            }
            return Err(wrong_offset(offset, written.unwrap_or(0)));
        }
        if offset != 0 {
            return Err(wrong_offset(offset, 0));
        }
        let progress = Progress {
            writer: Some(blobs.begin(digest)?),
            stream: 0,
        };
        let upload = Arc::new(Upload(Mutex::new(progress)));
        self.keep(name, upload.clone(), now);
        Ok(Turn { upload, stream: 0 })
    }

    fn keep(&self, name: &str, upload: Arc<Upload>, since: Instant) {
        let mut all = self.0.lock();
        if all.len() >= MOST {
            let oldest = all.iter().min_by_key(|(_, parked)| parked.since);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                all.remove(&oldest);
            }
        }
        all.insert(name.to_owned(), Parked { upload, since });
    }

    /// How many bytes of it have come in.
    pub fn written(&self, name: &str) -> u64 {
        let upload = self.0.lock().get(name).map(|parked| parked.upload.clone());
        let written = |upload: Arc<Upload>| Some(upload.0.lock().writer.as_ref()?.written());
        upload.and_then(written).unwrap_or(0)
    }

    /// Forgets it: it is complete, or will never be.
    pub fn close(&self, name: &str) {
        self.0.lock().remove(name);
    }
}

impl Turn {
    /// Does something to the upload, as long as it is this stream's turn. Blocks.
    pub fn with<T>(
        &self,
        work: impl FnOnce(&mut Option<BlobWriter>) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let mut progress = self.upload.0.lock();
        if progress.stream != self.stream || progress.writer.is_none() {
            return Err(Status::aborted("the upload goes on in another call"));
        }
        work(&mut progress.writer)
    }
}

fn wrong_offset(offset: i64, written: u64) -> Status {
    Status::invalid_argument(format!(
        "the write begins at byte {offset}, but {written} bytes have come in; ask with \
         QueryWriteStatus, or begin anew at 0"
    ))
}
