//! Eviction: what was not used for longest leaves, as soon as there is nine tenths of what there may
//! be, until there is eight tenths. What is pinned stays, and what was used in the last minutes.

use std::sync::Arc;

use super::cache_directory::CacheDirectory;
use crate::task;

impl CacheDirectory {
    /// From here on files leave.
    pub(super) fn high_water(&self) -> u64 {
        self.limit() / 10 * 9
    }

    /// Lets files leave until `needed` bytes more would be well within the limit, or none may. Blocks.
    pub(super) fn make_room(&self, needed: u64) {
        let _turn = self.evicting.lock();
        let target = (self.limit() / 10 * 8).saturating_sub(needed);
        let before = self.occupied();
        let Some(mut excess) = before.checked_sub(target).filter(|excess| *excess > 0) else {
            return;
        };
        let mut candidates = self.candidates();
        candidates.sort_unstable_by_key(|candidate| (candidate.used_unix_ms, candidate.key));
        let mut evicted = 0;
        for candidate in &candidates {
            if let Some(size) = self.evict(candidate) {
                evicted += 1;
                excess = excess.saturating_sub(size);
            }
            if excess == 0 {
                break;
            }
        }
        let occupied = self.occupied();
        tracing::debug!(files = evicted, before, occupied, "files left the cache");
    }
}

/// Evicts whenever there is need to. Never ends.
pub(super) async fn run(directory: Arc<CacheDirectory>) {
    loop {
        directory.crowded.notified().await;
        let crowded = directory.clone();
        let pass = move || {
            if crowded.occupied() > crowded.high_water() {
                crowded.make_room(0);
            }
        };
        task::blocking("eviction", pass).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use tempfile::TempDir;

    use super::super::blobs::tests::{keep, limits};
    use super::super::blobs::{Blobs, blob};
    use super::super::cache_directory::{Kind, Limits};
    use super::super::errors::WriteError;
    use super::super::results::Results;
    use crate::digest::Digest;
    use crate::reapi::{ActionResult, OutputFile};
    use crate::task;

    /// What each blob here takes on disk, and how many there may be.
    const SIZE: u64 = 4096;
    const MOST: u64 = 100;

    fn open(directory: &TempDir) -> Arc<Blobs> {
        Blobs::open_within(directory.path(), limits(MOST * SIZE)).unwrap()
    }

    fn content(number: u64) -> Vec<u8> {
        format!("blob {number}").into_bytes()
    }

    #[test]
    fn what_was_not_used_for_longest_leaves_and_the_limit_holds() {
        let directory = TempDir::new().unwrap();
        let blobs = open(&directory);
        for number in 0..MOST * 3 {
            let digest = keep(&blobs, &content(number));
            assert!(blobs.directory().occupied() <= MOST * SIZE);
            blobs.directory().set_used(blob(digest), number as i64);
        }
        let there: Vec<u64> = (0..MOST * 3)
            .filter(|number| blobs.contains(Digest::of(&content(*number))))
            .collect();
        assert!(there.len() as u64 >= MOST / 10 * 7, "{}", there.len());
        let newest: Vec<u64> = (MOST * 3 - there.len() as u64..MOST * 3).collect();
        assert_eq!(there, newest);
    }

    #[test]
    fn the_background_pass_begins_before_the_limit_is_reached() {
        let directory = TempDir::new().unwrap();
        let blobs = open(&directory);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            let evicting = task::spawn("eviction", super::run(blobs.directory().clone()));
            for number in 0..MOST - 2 {
                let digest = keep(&blobs, &content(number));
                blobs.directory().set_used(blob(digest), number as i64);
            }
            while blobs.directory().occupied() > blobs.directory().high_water() {
                tokio::task::yield_now().await;
            }
            evicting.abort();
        });
    }

    #[test]
    fn pinned_blobs_stay_and_a_cache_full_of_them_takes_no_more() {
        let directory = TempDir::new().unwrap();
        let blobs = open(&directory);
        let digests: Vec<Digest> = (0..MOST)
            .map(|number| Digest::of(&content(number)))
            .collect();
        let pin = blobs.pin(digests.clone());
        let second = blobs.pin(digests[..1].iter().copied());
        for number in 0..MOST {
            keep(&blobs, &content(number));
        }
        let one_more = content(MOST);
        let refused = blobs.write_now(Digest::of(&one_more), &one_more);
        assert!(matches!(refused, Err(WriteError::Full { .. })));
        assert!(digests.iter().all(|digest| blobs.contains(*digest)));
        drop(pin);
        for number in MOST..MOST * 3 {
            keep(&blobs, &content(number));
        }
        assert!(blobs.contains(digests[0]), "it is pinned twice");
        assert!(digests[1..].iter().any(|digest| !blobs.contains(*digest)));
        drop(second);
        let large = vec![0; (MOST * SIZE + 1) as usize];
        let refused = blobs.write_now(Digest::of(&large), &large);
        assert!(matches!(refused, Err(WriteError::TooLarge { .. })));
    }

    #[test]
    fn what_was_asked_for_a_moment_ago_stays() {
        let directory = TempDir::new().unwrap();
        let limits = Limits {
            recent: Duration::from_secs(3600),
            ..limits(MOST * SIZE)
        };
        let blobs = Blobs::open_within(directory.path(), limits).unwrap();
        let digests: Vec<Digest> = (0..MOST)
            .map(|number| keep(&blobs, &content(number)))
            .collect();
        for digest in &digests {
            blobs.directory().set_used(blob(*digest), 0);
        }
        assert!(blobs.contains(digests[3]));
        assert!(blobs.read_now(digests[5]).is_ok());
        for number in MOST..MOST * 2 - 10 {
            let content = content(number);
            // From a point on there is no more room: all is recent.
            let _ = blobs.write_now(Digest::of(&content), &content);
        }
        let kept: Vec<usize> = (0..digests.len())
            .filter(|at| blobs.contains(digests[*at]))
            .collect();
        assert!(kept.contains(&3) && kept.contains(&5), "{kept:?}");
        assert!(kept.len() < digests.len() / 2, "{kept:?}");
    }

    #[tokio::test]
    async fn a_result_leaves_before_its_outputs() {
        let directory = TempDir::new().unwrap();
        let blobs = open(&directory);
        let results = Results::new(blobs.clone());
        for number in 0..20 {
            let output = keep(&blobs, &content(number));
            let result = ActionResult {
                output_files: vec![OutputFile {
                    digest: Some(output.to_proto()),
                    ..OutputFile::default()
                }],
                ..ActionResult::default()
            };
            let action = Digest::of(&content(1000 + number));
            results.put("", action, &result).await.unwrap();
            assert!(results.get("", action).await.is_some());
        }
        for number in 100..100 + MOST {
            keep(&blobs, &content(number));
            let keys = blobs.directory().keys();
            let results = keys.iter().filter(|key| key.kind == Kind::Result).count();
            let outputs = (0..20).filter(|number| {
                let output = blob(Digest::of(&content(*number)));
                keys.contains(&output)
            });
            assert!(results <= outputs.count());
        }
    }
}
