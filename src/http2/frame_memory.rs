//! Memory that large frames are read into. What is done with is used again, the latest first: it
//! still lies in the processor's cache. An allocator would go through some MiB before it came back
//! to the same place, and every copy would wait for main memory. When no large frames come any more it
//! goes back to the allocator.

use std::cell::RefCell;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Poll, Waker};
use std::time::Duration;

/// How many pieces of memory a thread keeps that runs `keep`,
const KEPT: usize = 4;
/// of which size at least,
const LEAST: usize = 32 * 1024;
/// and for how long if none of them is used.
const PATIENCE: Duration = Duration::from_secs(1);

/// Bytes of all frames that were read into such memory, on all threads.
static READ: AtomicU64 = AtomicU64::new(0);

/// How many bytes of large frames have been read since the process began.
pub fn read() -> u64 {
    READ.load(Ordering::Relaxed)
}

/// What a thread keeps for its next large frames.
struct Kept {
    /// How many pieces.
    most: usize,
    /// The latest at the end.
    pieces: Vec<Vec<u8>>,
    /// Whether any was taken or added since this was last asked.
    used: bool,
    /// Wakes `keep` when there are some.
    freeing: Option<Waker>,
}

thread_local! {
    static KEPT_HERE: RefCell<Kept> = const {
        RefCell::new(Kept {
            most: 0,
            pieces: Vec::new(),
            used: false,
            freeing: None,
        })
    };
}

/// Has the current thread keep memory of frames that are done with, and frees it whenever there has
/// been no use for it for a while. Does not end. Without it a thread keeps none, for nothing would
/// free it.
pub async fn keep() {
    KEPT_HERE.with_borrow_mut(|kept| kept.most = KEPT);
    loop {
        poll_fn(|cx| KEPT_HERE.with_borrow_mut(|kept| kept.some(cx.waker()))).await;
        while KEPT_HERE.with_borrow_mut(|kept| std::mem::take(&mut kept.used)) {
            tokio::time::sleep(PATIENCE).await;
        }
        drop(KEPT_HERE.with_borrow_mut(|kept| std::mem::take(&mut kept.pieces)));
    }
}

impl Kept {
    fn some(&mut self, waker: &Waker) -> Poll<()> {
        if !self.pieces.is_empty() {
            return Poll::Ready(());
        }
        self.freeing = Some(waker.clone());
        Poll::Pending
    }

    /// One of so many bytes, or hardly more.
    fn take(&mut self, size: usize) -> Option<Vec<u8>> {
        let fits = |memory: &Vec<u8>| (size..=size + size / 4).contains(&memory.capacity());
        let latest = self.pieces.iter().rposition(fits)?;
        self.used = true;
        Some(self.pieces.remove(latest))
    }

    fn keep(&mut self, memory: Vec<u8>) {
        if self.most == 0 {
            return;
        }
        if self.pieces.len() == self.most {
            self.pieces.remove(0);
        }
        self.pieces.push(memory);
        self.used = true;
        if let Some(freeing) = self.freeing.take() {
            freeing.wake();
        }
    }
}

/// Memory for one frame, empty at first.
#[derive(Default)]
pub struct FrameMemory(Vec<u8>);

impl FrameMemory {
    /// Some with room for `size` bytes, and for hardly more: who waits to be read should not hold
    /// much that it does not need.
    pub fn with_room(size: usize) -> Self {
        READ.fetch_add(size as u64, Ordering::Relaxed);
        if size < LEAST {
            return FrameMemory(Vec::with_capacity(size));
        }
        let kept = KEPT_HERE.with_borrow_mut(|kept| kept.take(size));
        FrameMemory(kept.unwrap_or_else(|| Vec::with_capacity(size)))
    }

    /// What it holds, to add to.
    pub fn bytes(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }
}

impl AsRef<[u8]> for FrameMemory {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for FrameMemory {
    fn drop(&mut self) {
        let mut memory = std::mem::take(&mut self.0);
        if memory.capacity() < LEAST {
            return;
        }
        memory.clear();
        // A thread that ends keeps nothing.
        let _ = KEPT_HERE.try_with(|kept| kept.borrow_mut().keep(memory));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(memory: &FrameMemory) -> *const u8 {
        memory.as_ref().as_ptr()
    }

    /// The thread may have run another test before.
    fn keep_from_now_on(most: usize) {
        KEPT_HERE.with_borrow_mut(|kept| {
            kept.most = most;
            kept.pieces.clear();
        });
    }

    fn kept() -> usize {
        KEPT_HERE.with_borrow(|kept| kept.pieces.len())
    }

    #[test]
    fn what_was_done_with_last_is_used_again_where_it_fits_and_is_empty() {
        keep_from_now_on(KEPT);
        let mut sizes = [100_000, 100_000, 200_000].map(FrameMemory::with_room);
        for memory in &mut sizes {
            memory.bytes().push(1);
        }
        let [first, second, larger] = sizes;
        let (at_first, at_second) = (address(&first), address(&second));
        drop(first);
        drop(second);
        drop(larger);
        let again = FrameMemory::with_room(90_000);
        assert_eq!(address(&again), at_second);
        assert!(again.as_ref().is_empty());
        let small = FrameMemory::with_room(70_000);
        assert!(small.0.capacity() < 90_000, "what is kept is too large");
        assert_eq!(address(&FrameMemory::with_room(100_000)), at_first);
    }

    #[test]
    fn no_more_is_kept_than_some_pieces_and_none_where_nothing_frees_them() {
        for most in [KEPT, 0] {
            keep_from_now_on(most);
            let many: Vec<_> = (0..10).map(|_| FrameMemory::with_room(100_000)).collect();
            drop(many);
            assert_eq!(kept(), most);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_used_for_a_while_is_freed_and_what_is_used_is_not() {
        keep_from_now_on(0);
        let freeing = crate::task::spawn("frame memory", keep());
        tokio::task::yield_now().await;
        for _ in 0..2 {
            drop(FrameMemory::with_room(100_000));
            for _ in 0..5 {
                tokio::time::sleep(PATIENCE * 2 / 3).await;
                assert_eq!(kept(), 1);
                drop(FrameMemory::with_room(100_000));
            }
            tokio::time::sleep(PATIENCE * 2).await;
            assert_eq!(kept(), 0);
        }
        freeing.abort();
    }
}
