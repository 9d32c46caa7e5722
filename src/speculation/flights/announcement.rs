//! A flight that has been announced and may not start yet.

use std::sync::Arc;
use std::time::Duration;

use super::{Ending, FlightKey, Flights, Landing, Outcome, Urgency};
use crate::reapi::ActionResult;
use crate::speculation::activity::Activity;

/// An announced action that is to be submitted or settled. Dropping it abandons the flight.
pub struct Announcement {
    flights: Arc<Flights>,
    key: FlightKey,
    submitted: bool,
}

impl Announcement {
    pub(super) fn new(flights: Arc<Flights>, key: FlightKey) -> Self {
        Announcement {
            flights,
            key,
            submitted: false,
        }
    }

    /// Whether it is still to be submitted: it may have been withdrawn.
    pub fn is_current(&self) -> bool {
        self.flights.is_in_flight(&self.key)
    }

    /// Says why it may be dropped.
    pub fn because(&self, reason: impl ToString) {
        self.flights.because(&self.key, reason.to_string());
    }

    /// Says how long it is expected to run.
    pub fn expect(&self, duration: Duration) {
        if let Some(record) = self.flights.record(&self.key) {
            record.expect(duration);
        }
    }

    /// Says that all that the action needs is in the CAS: it may start when it is its turn.
    pub fn submit(mut self, urgency: Urgency) {
        self.submitted = true;
        let mut state = self.flights.state.lock();
        let Some(flight) = state.flights.get_mut(&self.key) else {
            return;
        };
        flight.ready = Some(urgency);
        state.queue(urgency, self.key.clone());
        drop(state);
        self.flights.changed.notify_one();
    }

    /// Ends the flight before it started: its result was there already.
    pub async fn settle(mut self, result: Arc<ActionResult>, activity: Activity) {
        self.submitted = true;
        let landing = Landing {
            key: self.key.clone(),
            outcome: Outcome::Cached(result),
            activity: activity.clone(),
        };
        self.flights.tell_owners(landing).await;
        self.flights.state.lock().end(&self.key, Ending::Cached);
        drop(activity);
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        if !self.submitted {
            let mut state = self.flights.state.lock();
            if state.flights.contains_key(&self.key) {
                state.counts.failed += 1;
                state.end(&self.key, Ending::Abandoned);
            }
        }
    }
}
