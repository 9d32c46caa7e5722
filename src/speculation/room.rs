//! What many hold together, and never more than a bound.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The share of one holder in what all of them may hold, which is `MOST`. It is given back when the
/// share is dropped. A copy is another share of the same whole, with nothing in it.
#[derive(Debug, Default)]
pub struct Room<const MOST: usize> {
    taken: Arc<AtomicUsize>,
    held: usize,
}

impl<const MOST: usize> Room<MOST> {
    /// Takes so much more. `false`, and nothing is taken, if less than that is left.
    pub fn take(&mut self, amount: usize) -> bool {
        let before = self.taken.fetch_add(amount, Ordering::Relaxed);
        let has_room = before
            .checked_add(amount)
            .is_some_and(|taken| taken <= MOST);
        match has_room {
            true => self.held += amount,
            false => {
                self.taken.fetch_sub(amount, Ordering::Relaxed);
            }
        }
        has_room
    }

    /// Takes over what another share of the same whole holds.
    pub fn join(&mut self, mut other: Self) {
        self.held += std::mem::take(&mut other.held);
    }
}

impl<const MOST: usize> Clone for Room<MOST> {
    fn clone(&self) -> Self {
        Room {
            taken: self.taken.clone(),
            held: 0,
        }
    }
}

impl<const MOST: usize> Drop for Room<MOST> {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.held, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_shares_hold_is_bounded_and_comes_back_when_they_are_dropped() {
        let mut one = Room::<10>::default();
        let mut two = one.clone();
        assert!(one.take(6));
        assert!(!two.take(5), "four are left");
        assert!(!two.take(usize::MAX));
        assert!(two.take(4));
        one.join(two);
        let mut three = one.clone();
        assert!(!three.take(1));
        drop(one);
        assert!(three.take(10), "all of it came back");
    }
}
