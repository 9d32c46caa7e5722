//! What the lane has learned of the backend, kept in the state directory by the address of the
//! upstream, so that the next primed need not find it out again. It is only a beginning: see
//! `lane_width`. Nobody ever waits for the disk on its account.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::Flights;
use super::lane_width::Learned;
use crate::address::Address;
use crate::{task, whole_file};

const FILE_NAME: &str = "lane.json";
/// Of how many upstreams it is kept.
const MAX_UPSTREAMS: usize = 256;
/// It is kept when nothing has been learned for this long, and when primed ends.
const QUIET: Duration = Duration::from_secs(5);

type ByUpstream = BTreeMap<String, Learned>;

/// The file, as one primed before one upstream uses it.
#[derive(Debug)]
pub struct LaneMemory {
    file: PathBuf,
    upstream: String,
    /// One writes at a time.
    writing: Mutex<()>,
}

impl LaneMemory {
    /// The one in `state_dir`.
    pub fn of(state_dir: &Path, upstream: &Address) -> Self {
        LaneMemory {
            file: state_dir.join(FILE_NAME),
            upstream: upstream.to_string(),
            writing: Mutex::default(),
        }
    }

    /// What was kept of this upstream. Blocks.
    pub fn recall(&self) -> Option<Learned> {
        self.read().remove(&self.upstream)
    }

    /// Keeps what is known now. Blocks.
    pub fn keep(&self, learned: Learned) {
        let _writing = self.writing.lock();
        let mut all = self.read();
        if all.insert(self.upstream.clone(), learned) == Some(learned) {
            return;
        }
        if all.len() > MAX_UPSTREAMS {
            all.retain(|upstream, _| *upstream == self.upstream);
        }
        let kept = serde_json::to_vec(&all)
            .map_err(std::io::Error::other)
            .and_then(|bytes| whole_file::write(&self.file, &bytes));
        if let Err(error) = kept {
            tracing::debug!(file = %self.file.display(), %error, "it cannot be kept how much the backend takes");
        }
    }

    fn read(&self) -> ByUpstream {
        let Ok(bytes) = std::fs::read(&self.file) else {
            return ByUpstream::new();
        };
        serde_json::from_slice(&bytes).unwrap_or_else(|error| {
            tracing::warn!(
                file = %self.file.display(), %error,
                "what was known of the backend cannot be read; it is found out anew"
            );
            ByUpstream::new()
        })
    }
}

/// Keeps what `flights` learn, whenever they are quiet, until the task is dropped.
pub async fn keep_up(memory: Arc<LaneMemory>, flights: Arc<Flights>) {
    loop {
        flights.learns().await;
        while tokio::time::timeout(QUIET, flights.learns()).await.is_ok() {}
        if let Some(learned) = flights.learned() {
            let memory = memory.clone();
            task::blocking("lane memory", move || memory.keep(learned)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lane_width::LaneWidth;
    use super::*;

    fn learned(proven: usize) -> Learned {
        let learned = serde_json::json!({ "slots": 3.5, "proven": proven, "overhead_us": 900 });
        serde_json::from_value(learned).unwrap()
    }

    fn of(state: &tempfile::TempDir, upstream: &str) -> LaneMemory {
        LaneMemory::of(state.path(), &upstream.parse().unwrap())
    }

    #[test]
    fn what_was_learned_is_recalled_before_the_same_upstream_only() {
        let state = tempfile::tempdir().unwrap();
        of(&state, "unix:/one").keep(learned(4));
        of(&state, "unix:/other").keep(learned(9));
        of(&state, "unix:/one").keep(learned(5));
        assert_eq!(of(&state, "unix:/one").recall(), Some(learned(5)));
        assert_eq!(of(&state, "unix:/other").recall(), Some(learned(9)));
        assert_eq!(of(&state, "unix:/third").recall(), None);
        let mut width = LaneWidth::new(8, None);
        width.recall(learned(5));
        assert_eq!((width.width(), width.learned()), (2, Some(learned(5))));
        let files = std::fs::read_dir(state.path()).unwrap();
        assert_eq!(files.count(), 1);
    }

    #[test]
    fn a_broken_file_is_as_good_as_none_and_is_written_anew() {
        let state = tempfile::tempdir().unwrap();
        for broken in [
            "",
            "{",
            "[]",
            r#"{"unix:/one":{"slots":"many","proven":1}}"#,
        ] {
            std::fs::write(state.path().join(FILE_NAME), broken).unwrap();
            assert_eq!(of(&state, "unix:/one").recall(), None, "{broken}");
            of(&state, "unix:/one").keep(learned(4));
            assert_eq!(of(&state, "unix:/one").recall(), Some(learned(4)));
        }
    }
}
