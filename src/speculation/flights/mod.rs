//! What is in flight. The lane's queue and its running executions, and the clients' own
//! executions beside them. This is all that the proxy and the engine share: the proxy asks
//! whether a digest is in flight, the engine submits and runs.
//!
//! Promises: a flight always ends, also when the task that ran it panicked or was dropped; a
//! client that wants a queued flight gets it started at once, whatever the cap; what runs and nobody
//! waits for gives way where a client would have to wait for it, and starts again later; nothing here
//! blocks longer than a short lock.

mod announcement;
pub(super) mod budgets;
mod client_execution;
mod departure;
pub(super) mod durations;
pub(super) mod lane;
pub mod lane_memory;
pub(super) mod lane_width;
pub(super) mod left_out;
pub(super) mod leftovers;
pub(super) mod record;
pub mod stages;
mod state;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use quick_cache::sync::Cache;
use serde::Serialize;
use tokio::sync::{Notify, mpsc, watch};

pub use self::announcement::Announcement;
pub use self::client_execution::ClientExecution;
pub use self::departure::Departure;
use self::lane_width::{Executed, Learned, Whose};
use self::left_out::LeftOut;
use self::record::FlightRecord;
use self::state::{Flight, State};
use super::activity::Activity;
use crate::cas::Digest;
use crate::quick_map::RandomState;
use crate::reapi::ActionResult;

/// How many primed and failed digests are remembered for accounting.
const REMEMBERED: usize = 200_000;
/// How many flights' courses are remembered.
const REMEMBERED_RECORDS: usize = 100_000;
/// How long a failed speculative action is kept from answering lookups.
const FAILED_FOR: Duration = Duration::from_secs(600);

/// Why a flight is withdrawn.
const SUPERSEDED: &str = "something else was expected by then, or its build was over";

/// What names an execution: the same action under two instances is two executions.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlightKey {
    /// REAPI's instance name.
    pub instance: Arc<str>,
    /// The action to execute.
    pub action: Digest,
}

/// Where a flight is.
#[derive(Clone, Debug)]
pub enum Stage {
    /// Planned; its uploads or its turn are still to come.
    Queued,
    /// Given to the backend, with the last `Operation` that it sent, if any.
    Running(Option<Bytes>),
    /// Over.
    Ended(Ending),
}

/// How a flight ended.
#[derive(Clone, Debug)]
pub enum Ending {
    /// The action cache already held a result: nothing was executed.
    Cached,
    /// Executed with exit code 0; the last, encoded `Operation`.
    Succeeded(Bytes),
    /// Executed with another exit code. Clients run their own course.
    Failed,
    /// Superseded, refused, or the backend failed. Clients run their own course.
    Abandoned,
}

/// The order of the lane: the longest recorded time still below an action first, then the
/// order in which the build asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Urgency {
    critical_path: std::cmp::Reverse<Duration>,
    order: u64,
}

impl Urgency {
    /// `critical_path`: recorded time of the action and the longest chain that waits for it.
    pub fn new(critical_path: Duration, order: u64) -> Self {
        Urgency {
            critical_path: std::cmp::Reverse(critical_path),
            order,
        }
    }
}

/// A result that primed brought into the action cache.
#[derive(Clone, Copy, Debug)]
pub struct Primed {
    /// How long the backend's worker ran it.
    pub execution: Duration,
    /// The build that used it first.
    pub used_by: Option<u64>,
}

/// What a flight brought home, told to whoever announced it before any client hears of it.
#[derive(Debug)]
pub struct Landing {
    /// What flew.
    pub key: FlightKey,
    /// What came of it.
    pub outcome: Outcome,
    /// Counts as activity until the landing is dealt with.
    pub activity: Activity,
}

/// What came of a flight.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// A result with exit code 0, executed by primed.
    Primed(Arc<ActionResult>),
    /// A result with exit code 0 that was there without primed.
    Cached(Arc<ActionResult>),
    /// Another exit code.
    Failed,
    /// Not executed; the client may do so.
    Abandoned,
}

/// How many flights there are of each kind, for `primed status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlightCounts {
    /// Waiting for their turn.
    pub queued: u64,
    /// With the backend.
    pub running: u64,
    /// Executed with exit code 0, since primed began.
    pub completed: u64,
    /// Executed with another exit code, or not executed for the backend's reasons.
    pub failed: u64,
    /// What clients execute themselves.
    pub clients: u64,
    /// How many speculative executions the backend may have while clients execute nothing.
    pub width: u64,
    /// Given to the backend and cancelled, since primed began.
    pub cancelled: u64,
    /// Given to the backend, and stopped for clients' own executions; they started again later, or
    /// will.
    pub gave_way: u64,
    /// Adapted, and left out as predictions like it went unused, since primed began.
    pub retired: u64,
    /// The same, as there was too little to gain.
    pub cheap: u64,
    /// The same, as a budget was spent.
    pub over_budget: u64,
}

/// An execution ahead of time that is with the backend, for `primed top`.
#[derive(Clone, Debug, Serialize)]
pub struct RunningFlight {
    /// What is executed, as `HASH/SIZE`.
    pub action: String,
    /// Milliseconds since 1970.
    pub started_unix_ms: i64,
    /// Whether a client waits for it.
    pub wanted: bool,
}

/// The flights of one primed.
pub struct Flights {
    state: Mutex<State>,
    changed: Notify,
    /// When something has been learned of the backend.
    has_learned: Notify,
    primed: Cache<FlightKey, Primed>,
    /// Forgotten after a while, hence in a cache of another kind.
    failed: moka::sync::Cache<FlightKey, (), RandomState>,
    /// Most often nothing has, and then no lookup needs to search.
    has_any_failed: AtomicBool,
    /// Of those in flight, and of as many that were before.
    records: Cache<FlightKey, Arc<FlightRecord>>,
    cap: usize,
}

impl Flights {
    /// Flights of which at most `cap` run at once, but for those that a client waits for.
    pub fn new(cap: usize) -> Arc<Self> {
        Flights::before(None, cap)
    }

    /// The same before a backend that is known to run `slots` executions at once.
    pub fn before(slots: Option<usize>, cap: usize) -> Arc<Self> {
        Arc::new(Flights {
            state: Mutex::new(State::new(slots, cap)),
            changed: Notify::new(),
            has_learned: Notify::new(),
            primed: Cache::new(REMEMBERED),
            failed: moka::sync::Cache::builder()
                .max_capacity(REMEMBERED as u64)
                .time_to_live(FAILED_FOR)
                .build_with_hasher(RandomState::default()),
            has_any_failed: AtomicBool::new(false),
            records: Cache::new(REMEMBERED_RECORDS),
            cap: cap.max(1),
        })
    }

    /// Announces an action that will be executed; `owner` is told when it lands. `None` if there
    /// is nothing to submit: it is in flight already, or a client is executing it itself.
    pub fn announce(
        self: &Arc<Self>,
        key: FlightKey,
        owner: &mpsc::Sender<Landing>,
    ) -> Option<Announcement> {
        let mut state = self.state.lock();
        if let Some(flight) = state.flights.get_mut(&key) {
            if !flight.cancelled.is_cancelled() {
                flight.is_withdrawn = false;
                if !flight.owners.iter().any(|known| known.same_channel(owner)) {
                    flight.owners.push(owner.clone());
                    if state.release(&key) {
                        self.changed.notify_one();
                    }
                }
            }
            return None;
        }
        if state.clients.contains_key(&key) {
            return None;
        }
        let record = Arc::new(FlightRecord::announced(key.action));
        self.records.insert(key.clone(), record.clone());
        let flight = Flight::announced(record, owner.clone());
        state.flights.insert(key.clone(), flight);
        Some(Announcement::new(self.clone(), key))
    }

    /// `owner` is not interested in a flight any more. One that no other owner and no client waits
    /// for is dropped if it has not started, and goes on if it has: its result may be of use yet.
    pub fn withdraw(&self, key: &FlightKey, owner: &mpsc::Sender<Landing>) {
        let mut state = self.state.lock();
        match state.gives_up(key, owner) {
            Some(true) => state.end(key, Ending::Abandoned),
            Some(false) => {
                if let Some(flight) = state.flights.get_mut(key) {
                    flight.is_withdrawn = true;
                }
            }
            None => {}
        }
    }

    /// The same where something else was found to be wanted in its place: nobody will ask for the
    /// result, so it is cancelled if it has started.
    pub fn supersede(&self, key: &FlightKey, owner: &mpsc::Sender<Landing>) {
        let mut state = self.state.lock();
        match state.gives_up(key, owner) {
            Some(true) => state.end(key, Ending::Abandoned),
            Some(false) => {
                if let Some(flight) = state.flights.get(key) {
                    flight.record.because(SUPERSEDED.to_owned());
                    flight.cancelled.cancel();
                }
            }
            None => {}
        }
    }

    /// What `owner` has announced, and will, stays queued until it is trusted again, but for what
    /// others want too. What has started goes on.
    pub fn hold_back(&self, owner: &mpsc::Sender<Landing>) {
        let mut state = self.state.lock();
        state.doubted.push(owner.clone());
        for (urgency, key) in std::mem::take(&mut state.ready) {
            state.queue(urgency, key);
        }
    }

    /// What `owner` has announced may start.
    pub fn trust(&self, owner: &mpsc::Sender<Landing>) {
        let mut state = self.state.lock();
        state.doubted.retain(|doubted| !doubted.same_channel(owner));
        for (urgency, key) in std::mem::take(&mut state.held_back) {
            state.queue(urgency, key);
        }
        drop(state);
        self.changed.notify_one();
    }

    async fn tell_owners(&self, landing: Landing) {
        let owners = match self.state.lock().flights.get(&landing.key) {
            Some(flight) => flight.owners.clone(),
            None => return,
        };
        for owner in owners {
            let copy = Landing {
                key: landing.key.clone(),
                outcome: landing.outcome.clone(),
                activity: landing.activity.clone(),
            };
            // An owner that is gone has lost interest.
            let _ = owner.send(copy).await;
        }
    }

    /// Waits for the next flight whose turn it is. For the one task that runs the lane.
    pub async fn depart(self: &Arc<Self>) -> Departure {
        loop {
            let now = Instant::now();
            let (next, more_room_at) = {
                let mut state = self.state.lock();
                let next = state.take_next(now);
                let waits = next.is_none() && !state.ready.is_empty();
                (next, waits.then(|| state.width.more_room_at(now)).flatten())
            };
            if let Some(next) = next {
                return Departure::new(self.clone(), next, now);
            }
            let more_room = async {
                match more_room_at {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.changed.notified() => {}
                () = more_room => {}
            }
        }
    }

    /// Asks whether `key` is in flight. A flight that was queued starts now: a client waits for it.
    pub fn join(&self, key: &FlightKey) -> Option<watch::Receiver<Stage>> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let flight = state.flights.get_mut(key)?;
        if flight.cancelled.is_cancelled() {
            return None;
        }
        let stage = flight.stage.subscribe();
        if !flight.wanted {
            flight.wanted = true;
            if let Some(urgency) = flight.ready
                && state.takes_out(urgency, key)
            {
                state.wanted.push_back(key.clone());
                self.changed.notify_one();
            }
        }
        Some(stage)
    }

    /// Whether `key` is announced and has not ended.
    pub fn is_in_flight(&self, key: &FlightKey) -> bool {
        self.state.lock().flights.contains_key(key)
    }

    /// Follows `key`, if it is in flight, without wanting it.
    pub fn watch(&self, key: &FlightKey) -> Option<watch::Receiver<Stage>> {
        let state = self.state.lock();
        Some(state.flights.get(key)?.stage.subscribe())
    }

    /// Whether a client is executing `key` itself.
    pub fn is_executed_by_client(&self, key: &FlightKey) -> bool {
        self.state.lock().clients.contains_key(key)
    }

    /// Whether a client is executing anything itself.
    pub fn has_client_executions(&self) -> bool {
        !self.state.lock().clients.is_empty()
    }

    /// Whether a result of `key` is about to be there, or has been primed already.
    pub fn is_expected(&self, key: &FlightKey) -> bool {
        let state = self.state.lock();
        let flight = state.flights.get(key);
        flight.is_some_and(|flight| !flight.cancelled.is_cancelled())
            || self.primed.contains_key(key)
    }

    /// Notes that a client executes `key` itself. What would have it wait gives way.
    pub fn client_executes(self: &Arc<Self>, key: FlightKey) -> ClientExecution {
        let mut state = self.state.lock();
        let began = Instant::now();
        *state.clients.entry(key.clone()).or_default() += 1;
        state.width.entered(began, Whose::Client);
        let excess = state.width.excess();
        if state.gives_way {
            state.make_room(began, excess);
        }
        // Whatever this execution shows, it is the client's own result from here on.
        self.failed.invalidate(&key);
        ClientExecution::new(self.clone(), key, began)
    }

    /// The result that primed brought into the cache under `key`, if it did and no earlier build
    /// has used it: for those after the first one it is an ordinary cache hit.
    pub fn use_primed(&self, key: &FlightKey, build: u64) -> Option<Primed> {
        let primed = self.primed.get(key)?;
        match primed.used_by {
            Some(user) => (user == build).then_some(primed),
            None => {
                let used_by = Some(build);
                self.primed
                    .insert(key.clone(), Primed { used_by, ..primed });
                Some(primed)
            }
        }
    }

    /// Whether primed has brought a result of `key` that no build has used yet.
    pub fn is_unused(&self, key: &FlightKey) -> bool {
        let primed = self.primed.get(key);
        primed.is_some_and(|primed| primed.used_by.is_none())
    }

    /// Whether `key` failed when primed executed it, and no client has executed it since.
    pub fn has_failed(&self, key: &FlightKey) -> bool {
        self.has_any_failed.load(Ordering::Relaxed) && self.failed.contains_key(key)
    }

    /// What is known of the last flight of `key`.
    pub fn record(&self, key: &FlightKey) -> Option<Arc<FlightRecord>> {
        self.records.get(key)
    }

    fn because(&self, key: &FlightKey, reason: String) {
        if let Some(flight) = self.state.lock().flights.get(key) {
            flight.record.because(reason);
        }
    }

    /// How many flights there are and were.
    pub fn counts(&self) -> FlightCounts {
        let state = self.state.lock();
        FlightCounts {
            queued: state.flights.len().saturating_sub(state.airborne.len()) as u64,
            running: state.airborne.len() as u64,
            clients: state.width.clients() as u64,
            width: state.width.width() as u64,
            ..state.counts
        }
    }

    /// Counts what was adapted and is not executed.
    pub fn leave_out(&self, reason: &LeftOut) {
        let counts = &mut self.state.lock().counts;
        let count = match reason {
            LeftOut::Retired(_) => &mut counts.retired,
            LeftOut::Cheap { .. } => &mut counts.cheap,
            LeftOut::OverBudget(_) => &mut counts.over_budget,
        };
        *count += 1;
    }

    /// Takes in how long an execution had to wait, a client's or the lane's.
    pub fn learn(&self, executed: Executed) {
        let mut state = self.state.lock();
        let before = state.width.width();
        state.width.learn(executed);
        let now = state.width.width();
        drop(state);
        self.has_learned.notify_one();
        if now != before {
            tracing::debug!(before, now, ?executed, "the lane's width has changed");
        }
        if now > before {
            self.changed.notify_one();
        }
    }

    /// What is known of the backend, unless it was told.
    pub fn learned(&self) -> Option<Learned> {
        self.state.lock().width.learned()
    }

    /// Begins with what an earlier primed has learned of the backend.
    pub fn recall(&self, learned: Learned) {
        self.state.lock().width.recall(learned);
    }

    /// Waits until something more may have been learned. For one task.
    pub async fn learns(&self) {
        self.has_learned.notified().await;
    }

    /// What an execution takes beside the worker's time.
    pub fn overhead(&self) -> Duration {
        self.state.lock().width.overhead()
    }

    /// At most how many run at once, but for those that a client waits for.
    pub fn cap(&self) -> usize {
        self.cap
    }

    /// The `most` that have been with the backend for longest.
    pub fn running(&self, most: usize) -> Vec<RunningFlight> {
        let state = self.state.lock();
        let started = state.flights.iter().filter_map(|(key, flight)| {
            Some((
                flight.record.flown().started_unix_ms?,
                key.action,
                flight.wanted,
            ))
        });
        let mut running: Vec<_> = started.collect();
        drop(state);
        running.sort_unstable_by_key(|(started, ..)| *started);
        running.truncate(most);
        running
            .into_iter()
            .map(|(started_unix_ms, action, wanted)| RunningFlight {
                action: action.to_string(),
                started_unix_ms,
                wanted,
            })
            .collect()
    }
}

/// Waits until the flight ends. `Abandoned` also when nobody is left to end it.
pub async fn ending(stage: &mut watch::Receiver<Stage>) -> Ending {
    match stage
        .wait_for(|stage| matches!(stage, Stage::Ended(_)))
        .await
        .as_deref()
    {
        Ok(Stage::Ended(ending)) => ending.clone(),
        _ => Ending::Abandoned,
    }
}
