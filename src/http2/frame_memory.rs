//! Memory that large frames are read into. What is done with is used again, the latest first: it
//! still lies in the processor's cache. An allocator would go through some MiB before it came back
//! to the same place, and every copy would wait for main memory.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many pieces of memory a thread keeps,
const KEPT: usize = 4;
/// and of which size at least.
const LEAST: usize = 32 * 1024;

/// Bytes of all frames that were read into such memory, on all threads.
static READ: AtomicU64 = AtomicU64::new(0);

/// How many bytes of large frames have been read since the process began.
pub fn read() -> u64 {
    READ.load(Ordering::Relaxed)
}

thread_local! {
    /// The latest at the end.
    static FREE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
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
        let fits = |memory: &Vec<u8>| (size..=size + size / 4).contains(&memory.capacity());
        let kept = FREE.with_borrow_mut(|free| {
            let latest = free.iter().rposition(fits)?;
            Some(free.remove(latest))
        });
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
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() == KEPT {
                free.remove(0);
            }
            free.push(memory);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(memory: &FrameMemory) -> *const u8 {
        memory.as_ref().as_ptr()
    }

    #[test]
    fn what_was_done_with_last_is_used_again_where_it_fits_and_is_empty() {
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
    fn no_more_is_kept_than_some_pieces() {
        let many: Vec<_> = (0..10).map(|_| FrameMemory::with_room(100_000)).collect();
        drop(many);
        assert_eq!(FREE.with_borrow(Vec::len), KEPT);
    }
}
