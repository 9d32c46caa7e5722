//! Who may run: so many at once, the most urgent first, and among equals whoever came first.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// The slots of this machine, and who waits for one.
pub struct Queue {
    state: Mutex<State>,
}

struct State {
    free: usize,
    running: usize,
    arrivals: u64,
    waiting: BTreeMap<Position, oneshot::Sender<Slot>>,
}

/// A place in the queue: priority (REAPI: a larger number is less urgent), then arrival.
type Position = (i32, u64);

/// The right to run, until it is dropped.
pub struct Slot {
    queue: Arc<Queue>,
}

/// A place in the queue, until it is dropped.
pub struct Ticket {
    queue: Arc<Queue>,
    position: Mutex<Position>,
}

impl Queue {
    /// One with `slots`.
    pub fn new(slots: usize) -> Arc<Self> {
        Arc::new(Queue {
            state: Mutex::new(State {
                free: slots,
                running: 0,
                arrivals: 0,
                waiting: BTreeMap::new(),
            }),
        })
    }

    /// Lines up. What is returned with the ticket gives the slot, once it is one's turn.
    pub fn enter(self: &Arc<Self>, priority: i32) -> (Ticket, oneshot::Receiver<Slot>) {
        let (turn, called) = oneshot::channel();
        let mut state = self.state.lock();
        state.arrivals += 1;
        let position = (priority, state.arrivals);
        state.waiting.insert(position, turn);
        drop(state);
        self.call_next();
        let ticket = Ticket {
            queue: self.clone(),
            position: Mutex::new(position),
        };
        (ticket, called)
    }

    /// How many run, and how many wait.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.running, state.waiting.len())
    }

    /// Gives what slots there are to those whose turn it is.
    fn call_next(self: &Arc<Self>) {
        loop {
            let mut state = self.state.lock();
            if state.free == 0 {
                return;
            }
            let Some((_, turn)) = state.waiting.pop_first() else {
                return;
            };
            state.free -= 1;
            state.running += 1;
            drop(state);
            let slot = Slot {
                queue: self.clone(),
            };
            // Whoever does not wait any more gives it back by dropping it.
            drop(turn.send(slot));
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        {
            let mut state = self.queue.state.lock();
            state.free += 1;
            state.running -= 1;
        }
        self.queue.call_next();
    }
}

impl Ticket {
    /// Moves to the front of those who are less urgent than `priority`.
    pub fn hurry(&self, priority: i32) {
        let mut state = self.queue.state.lock();
        let mut position = self.position.lock();
        if priority < position.0
            && let Some(turn) = state.waiting.remove(&*position)
        {
            position.0 = priority;
            state.waiting.insert(*position, turn);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let position = *self.position.lock();
        self.queue.state.lock().waiting.remove(&position);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_most_urgent_runs_first_and_among_equals_whoever_came_first() {
        let queue = Queue::new(1);
        let (_, first) = queue.enter(0);
        let slot = first.await.unwrap();
        let (_a, a) = queue.enter(5);
        let (_b, b) = queue.enter(0);
        let (_c, c) = queue.enter(0);
        let (d, d_turn) = queue.enter(9);
        assert_eq!(queue.counts(), (1, 4));
        d.hurry(-1);
        drop(slot);
        for turn in [d_turn, b, c, a] {
            drop(turn.await.unwrap());
        }
        assert_eq!(queue.counts(), (0, 0));
    }

    #[tokio::test]
    async fn who_leaves_the_queue_takes_no_slot() {
        let queue = Queue::new(1);
        let (_, turn) = queue.enter(0);
        let slot = turn.await.unwrap();
        let (ticket, gone) = queue.enter(0);
        drop((ticket, gone));
        let (_ticket, next) = queue.enter(1);
        drop(slot);
        drop(next.await.unwrap());
        assert_eq!(queue.counts(), (0, 0));
    }
}
