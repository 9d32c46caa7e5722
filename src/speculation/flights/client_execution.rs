//! A client's own execution, for which what is speculative gives way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::lane_width::Whose;
use super::{FlightKey, Flights};

/// One client's own execution; it counts until this is dropped.
pub struct ClientExecution {
    flights: Arc<Flights>,
    key: FlightKey,
    began: Instant,
    /// Whether it is known to have waited.
    has_waited: AtomicBool,
}

impl ClientExecution {
    pub(super) fn new(flights: Arc<Flights>, key: FlightKey, began: Instant) -> Self {
        ClientExecution {
            flights,
            key,
            began,
            has_waited: AtomicBool::new(false),
        }
    }

    /// The backend says that it is still queued: something speculative gives way to it, if there is
    /// anything.
    pub fn is_still_queued(&self) {
        let now = Instant::now();
        let mut state = self.flights.state.lock();
        if !self.has_waited.swap(true, Ordering::Relaxed) {
            state.width.is_queued(self.began, now);
        }
        state.make_room(now, 1);
    }
}

impl Drop for ClientExecution {
    fn drop(&mut self) {
        let mut state = self.flights.state.lock();
        state.width.left(Instant::now(), Whose::Client);
        if let Some(count) = state.clients.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                state.clients.remove(&self.key);
            }
        }
        drop(state);
        self.flights.changed.notify_one();
    }
}
