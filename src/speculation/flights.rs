//! What is in flight. The lane's queue and its running executions, and the clients' own
//! executions beside them. This is all that the proxy and the engine share: the proxy asks
//! whether a digest is in flight, the engine submits and runs.
//!
//! Promises: a flight always ends, also when the task that ran it panicked or was dropped; a
//! client that wants a queued flight gets it started at once, whatever the cap; nothing here
//! blocks longer than a short lock.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use moka::sync::Cache;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};

use super::activity::Activity;
use crate::cas::Digest;
use crate::reapi::ActionResult;

/// How many primed and failed digests are remembered for accounting.
const REMEMBERED: u64 = 200_000;
/// How long a failed speculative action is kept from answering lookups.
const FAILED_FOR: Duration = Duration::from_secs(600);

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
}

/// The flights of one primed.
pub struct Flights {
    state: Mutex<State>,
    changed: Notify,
    primed: Cache<FlightKey, Primed>,
    failed: Cache<FlightKey, ()>,
    cap: usize,
}

#[derive(Default)]
struct State {
    flights: HashMap<FlightKey, Flight>,
    ready: BTreeSet<(Urgency, FlightKey)>,
    wanted: VecDeque<FlightKey>,
    running: usize,
    clients: HashMap<FlightKey, usize>,
    completed: u64,
    failed: u64,
}

struct Flight {
    stage: watch::Sender<Stage>,
    owners: Vec<mpsc::Sender<Landing>>,
    /// Set once the inputs are uploaded.
    ready: Option<Urgency>,
    wanted: bool,
}

/// An announced action that is to be submitted or settled. Dropping it abandons the flight.
pub struct Announcement {
    flights: Arc<Flights>,
    key: FlightKey,
    submitted: bool,
}

/// A flight that its runner must end. Dropping it abandons the flight.
pub struct Departure {
    flights: Arc<Flights>,
    key: FlightKey,
    ended: bool,
}

/// One client's own execution; it counts until this is dropped.
pub struct ClientExecution {
    flights: Arc<Flights>,
    key: FlightKey,
}

impl Flights {
    /// Flights of which at most `cap` run at once, but for those that a client waits for.
    pub fn new(cap: usize) -> Arc<Self> {
        Arc::new(Flights {
            state: Mutex::default(),
            changed: Notify::new(),
            primed: Cache::new(REMEMBERED),
            failed: Cache::builder()
                .max_capacity(REMEMBERED)
                .time_to_live(FAILED_FOR)
                .build(),
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
            if !flight.owners.iter().any(|known| known.same_channel(owner)) {
                flight.owners.push(owner.clone());
            }
            return None;
        }
        if state.clients.contains_key(&key) {
            return None;
        }
        let flight = Flight {
            stage: watch::Sender::new(Stage::Queued),
            owners: vec![owner.clone()],
            ready: None,
            wanted: false,
        };
        state.flights.insert(key.clone(), flight);
        Some(Announcement {
            flights: self.clone(),
            key,
            submitted: false,
        })
    }

    /// Drops a flight that has not started and that no client waits for.
    pub fn withdraw(&self, key: &FlightKey) {
        let mut state = self.state.lock();
        let unwanted = state.flights.get(key).is_some_and(|flight| {
            !flight.wanted && matches!(*flight.stage.borrow(), Stage::Queued)
        });
        if unwanted {
            state.end(key, Ending::Abandoned);
        }
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
            if let Some(key) = self.state.lock().take_next(self.cap) {
                return Departure {
                    flights: self.clone(),
                    key,
                    ended: false,
                };
            }
            self.changed.notified().await;
        }
    }

    /// Asks whether `key` is in flight. A flight that was queued starts now: a client waits for it.
    pub fn join(&self, key: &FlightKey) -> Option<watch::Receiver<Stage>> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let flight = state.flights.get_mut(key)?;
        let stage = flight.stage.subscribe();
        if !flight.wanted {
            flight.wanted = true;
            if let Some(urgency) = flight.ready
                && state.ready.remove(&(urgency, key.clone()))
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
        self.state.lock().flights.contains_key(key) || self.primed.contains_key(key)
    }

    /// Notes that a client executes `key` itself.
    pub fn client_executes(self: &Arc<Self>, key: FlightKey) -> ClientExecution {
        let mut state = self.state.lock();
        *state.clients.entry(key.clone()).or_default() += 1;
        // Whatever this execution shows, it is the client's own result from here on.
        self.failed.invalidate(&key);
        ClientExecution {
            flights: self.clone(),
            key,
        }
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
        self.failed.contains_key(key)
    }

    /// How many flights there are and were.
    pub fn counts(&self) -> FlightCounts {
        let state = self.state.lock();
        FlightCounts {
            queued: (state.flights.len() - state.running) as u64,
            running: state.running as u64,
            completed: state.completed,
            failed: state.failed,
        }
    }
}

impl State {
    /// Takes the next flight to start: first what clients wait for, then the most urgent while
    /// the lane has room. Each execution that clients run themselves takes room from the lane.
    fn take_next(&mut self, cap: usize) -> Option<FlightKey> {
        let key = match self.wanted.pop_front() {
            Some(key) => key,
            None => {
                let clients: usize = self.clients.values().sum();
                if self.running >= cap.saturating_sub(clients).max(1) {
                    return None;
                }
                self.ready.pop_first()?.1
            }
        };
        self.running += 1;
        if let Some(flight) = self.flights.get(&key) {
            flight.stage.send_replace(Stage::Running(None));
        }
        Some(key)
    }

    fn end(&mut self, key: &FlightKey, ending: Ending) {
        if let Some(flight) = self.flights.remove(key) {
            if let Some(urgency) = flight.ready {
                self.ready.remove(&(urgency, key.clone()));
                self.wanted.retain(|wanted| wanted != key);
            }
            flight.stage.send_replace(Stage::Ended(ending));
        }
    }
}

impl Announcement {
    /// Whether it is still to be submitted: it may have been withdrawn.
    pub fn is_current(&self) -> bool {
        self.flights.is_in_flight(&self.key)
    }

    /// Says that all that the action needs is in the CAS: it may start when it is its turn.
    pub fn submit(mut self, urgency: Urgency) {
        self.submitted = true;
        let mut state = self.flights.state.lock();
        let Some(flight) = state.flights.get_mut(&self.key) else {
            return;
        };
        flight.ready = Some(urgency);
        if flight.wanted {
            state.wanted.push_back(self.key.clone());
        } else {
            state.ready.insert((urgency, self.key.clone()));
        }
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
                state.failed += 1;
                state.end(&self.key, Ending::Abandoned);
            }
        }
    }
}

impl Departure {
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
        state.running -= 1;
        match ending {
            Ending::Succeeded(_) => {
                state.completed += 1;
                self.flights.primed.insert(
                    self.key.clone(),
                    Primed {
                        execution,
                        used_by: None,
                    },
                );
            }
            Ending::Failed => {
                state.failed += 1;
                self.flights.failed.insert(self.key.clone(), ());
            }
            Ending::Abandoned => state.failed += 1,
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

impl Drop for ClientExecution {
    fn drop(&mut self) {
        let mut state = self.flights.state.lock();
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

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> FlightKey {
        FlightKey {
            instance: "".into(),
            action: Digest::of(name.as_bytes()),
        }
    }

    fn owner() -> mpsc::Sender<Landing> {
        mpsc::channel(1).0
    }

    fn urgency(seconds: u64) -> Urgency {
        Urgency::new(Duration::from_secs(seconds), 0)
    }

    fn queue(flights: &Arc<Flights>, names: &[(&str, u64)]) {
        for (name, seconds) in names {
            let announced = flights.announce(key(name), &owner()).unwrap();
            announced.submit(urgency(*seconds));
        }
    }

    /// What departs now, without waiting.
    async fn departing(flights: &Arc<Flights>) -> Option<Departure> {
        tokio::select! {
            biased;
            departure = flights.depart() => Some(departure),
            () = std::future::ready(()) => None,
        }
    }

    #[tokio::test]
    async fn the_longest_critical_path_departs_first_and_the_cap_holds() {
        let flights = Flights::new(2);
        queue(&flights, &[("short", 1), ("long", 9), ("middle", 5)]);
        let first = departing(&flights).await.unwrap();
        let second = departing(&flights).await.unwrap();
        assert_eq!(*first.key(), key("long"));
        assert_eq!(*second.key(), key("middle"));
        assert!(departing(&flights).await.is_none());
        first.end(Ending::Cached, Duration::ZERO);
        assert_eq!(*departing(&flights).await.unwrap().key(), key("short"));
    }

    #[tokio::test]
    async fn a_flight_that_a_client_joins_departs_beyond_the_cap() {
        let flights = Flights::new(1);
        queue(&flights, &[("running", 9), ("queued", 1)]);
        let _running = departing(&flights).await.unwrap();
        assert!(departing(&flights).await.is_none());
        let mut stage = flights.join(&key("queued")).unwrap();
        let wanted = departing(&flights).await.unwrap();
        assert_eq!(*wanted.key(), key("queued"));
        wanted.end(Ending::Succeeded(Bytes::new()), Duration::from_secs(1));
        assert!(matches!(ending(&mut stage).await, Ending::Succeeded(_)));
        assert!(flights.use_primed(&key("queued"), 1).is_some());
        assert!(
            flights.use_primed(&key("queued"), 1).is_some(),
            "the same build"
        );
        assert!(
            flights.use_primed(&key("queued"), 2).is_none(),
            "a later one"
        );
        assert!(flights.join(&key("queued")).is_none());
    }

    #[tokio::test]
    async fn a_wanted_flight_starts_as_soon_as_its_inputs_are_there() {
        let flights = Flights::new(1);
        queue(&flights, &[("running", 9)]);
        let _running = departing(&flights).await.unwrap();
        let late = flights.announce(key("late"), &owner()).unwrap();
        let _stage = flights.join(&key("late")).unwrap();
        assert!(departing(&flights).await.is_none());
        late.submit(urgency(1));
        assert_eq!(*departing(&flights).await.unwrap().key(), key("late"));
    }

    #[tokio::test]
    async fn clients_own_executions_take_room_from_the_lane_but_leave_it_one() {
        let flights = Flights::new(2);
        let own = [
            flights.client_executes(key("a")),
            flights.client_executes(key("b")),
            flights.client_executes(key("b")),
        ];
        assert!(
            flights.announce(key("b"), &owner()).is_none(),
            "a client executes it itself"
        );
        queue(&flights, &[("x", 3), ("y", 2)]);
        let _x = departing(&flights).await.unwrap();
        assert!(departing(&flights).await.is_none());
        drop(own);
        assert_eq!(*departing(&flights).await.unwrap().key(), key("y"));
        assert!(flights.announce(key("b"), &owner()).is_some());
    }

    #[tokio::test]
    async fn a_dropped_departure_abandons_its_flight() {
        let flights = Flights::new(1);
        queue(&flights, &[("a", 1)]);
        let departure = departing(&flights).await.unwrap();
        let mut stage = flights.join(&key("a")).unwrap();
        drop(departure);
        assert!(matches!(ending(&mut stage).await, Ending::Abandoned));
        assert_eq!(flights.counts().running, 0);
    }

    #[tokio::test]
    async fn a_dropped_announcement_abandons_its_flight() {
        let flights = Flights::new(1);
        let announced = flights.announce(key("a"), &owner()).unwrap();
        let mut stage = flights.join(&key("a")).unwrap();
        drop(announced);
        assert!(matches!(ending(&mut stage).await, Ending::Abandoned));
        assert_eq!(flights.counts().queued, 0);
    }

    #[tokio::test]
    async fn withdrawing_stops_what_is_queued_and_leaves_what_runs() {
        let flights = Flights::new(1);
        queue(&flights, &[("runs", 2), ("waits", 1)]);
        let runs = departing(&flights).await.unwrap();
        flights.withdraw(&key("waits"));
        flights.withdraw(&key("runs"));
        assert!(flights.join(&key("waits")).is_none());
        assert!(flights.join(&key("runs")).is_some());
        runs.end(Ending::Failed, Duration::ZERO);
        assert!(flights.has_failed(&key("runs")));
        drop(flights.client_executes(key("runs")));
        assert!(!flights.has_failed(&key("runs")));
        assert!(departing(&flights).await.is_none());
    }
}
