//! Counts what is under way in the background, so that `primed wait` knows when all is quiet.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Everything under way.
#[derive(Clone, Debug, Default)]
pub struct Activities(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    under_way: AtomicUsize,
    ended: Notify,
}

/// Something under way; over when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Activity(#[allow(dead_code, reason = "it counts by existing")] Arc<Counted>);

#[derive(Debug)]
struct Counted(Arc<Shared>);

impl Activities {
    /// Something begins.
    pub fn begin(&self) -> Activity {
        self.0.under_way.fetch_add(1, Ordering::AcqRel);
        Activity(Arc::new(Counted(self.0.clone())))
    }

    /// Whether nothing is under way.
    pub fn is_quiet(&self) -> bool {
        self.0.under_way.load(Ordering::Acquire) == 0
    }

    /// Waits until something has ended since the last call.
    pub async fn ended(&self) {
        self.0.ended.notified().await;
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if self.0.under_way.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.ended.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_is_quiet_when_the_last_clone_of_the_last_activity_is_gone() {
        let activities = Activities::default();
        let one = activities.begin();
        let copy = one.clone();
        drop(one);
        assert!(!activities.is_quiet());
        drop(copy);
        activities.ended().await;
        assert!(activities.is_quiet());
    }
}
