//! A flight that is with the backend.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::lane_width::Executed;
use super::stages::Told;
use super::state::{Flight, Next};
use super::{Ending, FlightKey, Flights, Landing, Outcome, Primed, SUPERSEDED, Stage};
use crate::reapi::ActionResult;
use crate::speculation::activity::Activity;

/// A flight that its runner must end. Dropping it abandons the flight.
pub struct Departure {
    flights: Arc<Flights>,
    key: FlightKey,
    number: u64,
    began: Instant,
    cancelled: CancellationToken,
    asked: CancellationToken,
    /// When the backend said that it is queued, and that a worker has it.
    queued: Option<Instant>,
    executing: Option<Instant>,
    ended: bool,
}

impl Departure {
    pub(super) fn new(flights: Arc<Flights>, next: Next, began: Instant) -> Self {
        Departure {
            flights,
            key: next.key,
            number: next.number,
            began,
            cancelled: next.cancelled,
            asked: next.asked,
            queued: None,
            executing: None,
            ended: false,
        }
    }

    /// What departs.
    pub fn key(&self) -> &FlightKey {
        &self.key
    }

    /// Passes an `Operation` of the backend on to all that joined.
    pub fn progress(&self, operation: Bytes) {
        let state = self.flights.state.lock();
        if let Some(flight) = state.flights.get(&self.key) {
            flight.stage.send_replace(Stage::Running(Some(operation)));
        }
    }

    /// Says why it will end as it does.
    pub fn because(&self, reason: impl ToString) {
        self.flights.because(&self.key, reason.to_string());
    }

    /// Ready once nobody wants it any more.
    pub fn cancelled(&self) -> &CancellationToken {
        &self.cancelled
    }

    /// The backend puts the speculative behind clients' executions by itself.
    pub fn leave_to_priorities(&self) {
        self.flights.state.lock().gives_way = false;
    }

    /// Ready once it is to give way to a client's execution.
    pub fn asked_to_give_way(&self) -> &CancellationToken {
        &self.asked
    }

    /// Whether it still is: a client may wait for it by now, and then it goes on.
    pub fn is_to_give_way(&self) -> bool {
        let mut state = self.flights.state.lock();
        let flight = state.flights.get(&self.key);
        let may = flight.is_some_and(Flight::may_give_way);
        if !may {
            state.stays(self.number);
        }
        may
    }

    /// The backend does not stop it. If it never does that, nothing gives way any more.
    pub fn goes_on(&self, is_impossible: bool) {
        let mut state = self.flights.state.lock();
        state.stays(self.number);
        state.gives_way &= !is_impossible;
    }

    /// Whether it has been begun before, and was stopped for a client.
    pub fn has_given_way(&self) -> bool {
        let state = self.flights.state.lock();
        let flight = state.flights.get(&self.key);
        flight.is_some_and(|flight| flight.gave_way > 0)
    }

    /// Goes back into the queue, as it has been stopped for a client. Returns `false` if nobody wants
    /// it any more: then it is to be ended.
    pub fn give_way(&mut self) -> bool {
        let mut state = self.flights.state.lock();
        let state = &mut *state;
        let Some(flight) = state.flights.get_mut(&self.key) else {
            return false;
        };
        let Some(urgency) = flight.ready else {
            return false;
        };
        if flight.cancelled.is_cancelled() || (flight.is_withdrawn && !flight.wanted) {
            flight.record.because(SUPERSEDED.to_owned());
            return false;
        }
        flight.gave_way += 1;
        flight.record.queue_again();
        flight.stage.send_replace(Stage::Queued);
        state.queue(urgency, self.key.clone());
        state.counts.gave_way += 1;
        state.lands(self.number);
        self.ended = true;
        self.flights.changed.notify_one();
        true
    }

    /// The backend says where it is.
    pub fn told(&mut self, told: Told) {
        match told {
            Told::Queued => drop(self.queued.get_or_insert_with(Instant::now)),
            Told::Executing => drop(self.executing.get_or_insert_with(Instant::now)),
            Told::Nothing => {}
        }
    }

    /// Takes in how long it had to wait for a worker, as the backend has just answered.
    pub fn executed(&self, result: &ActionResult) {
        let executed = Executed::of(result, self.began, Instant::now());
        if let Some(executed) = executed {
            let seen = self.queued.zip(self.executing);
            let seen = seen.map(|(queued, executing)| executing.duration_since(queued));
            let queued = executed.queued.or(seen);
            self.flights.learn(Executed { queued, ..executed });
        }
    }

    /// Tells those who announced the flight what came of it. Comes before `end`.
    pub async fn land(&self, outcome: Outcome, activity: Activity) {
        let key = self.key.clone();
        self.flights
            .tell_owners(Landing {
                key,
                outcome,
                activity,
            })
            .await;
    }

    /// Ends the flight. `execution` is how long the worker ran it.
    pub fn end(mut self, ending: Ending, execution: Duration) {
        self.finish(ending, execution);
    }

    fn finish(&mut self, ending: Ending, execution: Duration) {
        self.ended = true;
        let mut state = self.flights.state.lock();
        state.lands(self.number);
        if let Some(flight) = state.flights.get(&self.key) {
            flight.record.executed_for(execution);
        }
        match ending {
            Ending::Succeeded(_) => {
                state.counts.completed += 1;
                self.flights.primed.insert(
                    self.key.clone(),
                    Primed {
                        execution,
                        used_by: None,
                    },
                );
            }
            Ending::Failed => {
                state.counts.failed += 1;
                self.flights.failed.insert(self.key.clone(), ());
                self.flights.has_any_failed.store(true, Ordering::Relaxed);
            }
            Ending::Abandoned if self.cancelled.is_cancelled() => state.counts.cancelled += 1,
            Ending::Abandoned => state.counts.failed += 1,
            Ending::Cached => {}
        }
        state.end(&self.key, ending);
        drop(state);
        self.flights.changed.notify_one();
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        if !self.ended {
            self.finish(Ending::Abandoned, Duration::ZERO);
        }
    }
}
