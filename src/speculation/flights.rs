//! What is in flight. The lane's queue and its running executions, and the clients' own
//! executions beside them. This is all that the proxy and the engine share: the proxy asks
//! whether a digest is in flight, the engine submits and runs.
//!
//! Promises: a flight always ends, also when the task that ran it panicked or was dropped; a
//! client that wants a queued flight gets it started at once, whatever the cap; what runs and nobody
//! waits for gives way where a client would have to wait for it, and starts again later; nothing here
//! blocks longer than a short lock.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use moka::sync::{Cache, CacheBuilder};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::activity::Activity;
use super::flight_record::FlightRecord;
use super::lane_width::{Executed, LaneWidth, Learned, Whose};
use super::stages::Told;
use super::verdict::LeftOut;
use crate::cas::Digest;
use crate::quick_map::{QuickMap, RandomState};
use crate::reapi::ActionResult;

/// How many primed and failed digests are remembered for accounting.
const REMEMBERED: u64 = 200_000;
/// How many flights' courses are remembered.
const REMEMBERED_RECORDS: u64 = 100_000;
/// How long a failed speculative action is kept from answering lookups.
const FAILED_FOR: Duration = Duration::from_secs(600);
/// How often a flight gives way. Then it is left alone: it has been begun in vain often enough.
const GIVES_WAY: u8 = 2;

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
    primed: Cache<FlightKey, Primed, RandomState>,
    failed: Cache<FlightKey, (), RandomState>,
    /// Most often nothing has, and then no lookup needs to search.
    has_any_failed: AtomicBool,
    /// Of those in flight, and of as many that were before.
    records: Cache<FlightKey, Arc<FlightRecord>, RandomState>,
    cap: usize,
}

type Remembering<V> = CacheBuilder<FlightKey, V, Cache<FlightKey, V>>;

struct State {
    flights: QuickMap<FlightKey, Flight>,
    ready: BTreeSet<(Urgency, FlightKey)>,
    /// What would be ready, but for those who announced it.
    held_back: BTreeSet<(Urgency, FlightKey)>,
    /// Those whose flights are held back.
    doubted: Vec<mpsc::Sender<Landing>>,
    wanted: VecDeque<FlightKey>,
    /// What runs, in the order in which it began.
    airborne: BTreeMap<u64, Airborne>,
    departures: u64,
    width: LaneWidth,
    /// Whether executions that are stopped leave their workers to clients, as far as is known.
    gives_way: bool,
    clients: QuickMap<FlightKey, usize>,
    /// Its queued, running and clients' own are what is so now; the rest is counted.
    counts: FlightCounts,
}

struct Flight {
    record: Arc<FlightRecord>,
    stage: watch::Sender<Stage>,
    owners: Vec<mpsc::Sender<Landing>>,
    /// Set once the inputs are uploaded.
    ready: Option<Urgency>,
    wanted: bool,
    /// Once it is running and nobody wants it any more. Nobody joins it then.
    cancelled: CancellationToken,
    /// How often it was stopped for clients.
    gave_way: u8,
    /// Nobody is left who wants it, but as it runs it may go on.
    is_withdrawn: bool,
}

/// A flight that runs.
struct Airborne {
    key: FlightKey,
    /// Ready once it is to give way.
    asked: CancellationToken,
    /// It is to give way, or does so.
    is_leaving: bool,
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
    number: u64,
    began: Instant,
    cancelled: CancellationToken,
    asked: CancellationToken,
    /// When the backend said that it is queued, and that a worker has it.
    queued: Option<Instant>,
    executing: Option<Instant>,
    ended: bool,
}

/// One client's own execution; it counts until this is dropped.
pub struct ClientExecution {
    flights: Arc<Flights>,
    key: FlightKey,
    began: Instant,
    /// Whether it is known to have waited.
    has_waited: AtomicBool,
}

impl Flights {
    /// Flights of which at most `cap` run at once, but for those that a client waits for.
    pub fn new(cap: usize) -> Arc<Self> {
        Flights::before(None, cap)
    }

    /// The same before a backend that is known to run `slots` executions at once.
    pub fn before(slots: Option<usize>, cap: usize) -> Arc<Self> {
        Arc::new(Flights {
            state: Mutex::new(State {
                flights: QuickMap::default(),
                ready: BTreeSet::new(),
                held_back: BTreeSet::new(),
                doubted: Vec::new(),
                wanted: VecDeque::new(),
                airborne: BTreeMap::new(),
                departures: 0,
                width: LaneWidth::new(cap, slots),
                gives_way: true,
                clients: QuickMap::default(),
                counts: FlightCounts::default(),
            }),
            changed: Notify::new(),
            has_learned: Notify::new(),
            primed: remembering(REMEMBERED).build_with_hasher(RandomState::default()),
            failed: remembering(REMEMBERED)
                .time_to_live(FAILED_FOR)
                .build_with_hasher(RandomState::default()),
            has_any_failed: AtomicBool::new(false),
            records: remembering(REMEMBERED_RECORDS).build_with_hasher(RandomState::default()),
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
        let flight = Flight {
            record,
            stage: watch::Sender::new(Stage::Queued),
            owners: vec![owner.clone()],
            ready: None,
            wanted: false,
            cancelled: CancellationToken::new(),
            gave_way: 0,
            is_withdrawn: false,
        };
        state.flights.insert(key.clone(), flight);
        Some(Announcement {
            flights: self.clone(),
            key,
            submitted: false,
        })
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
            if let Some(Next {
                key,
                number,
                cancelled,
                asked,
            }) = next
            {
                return Departure {
                    flights: self.clone(),
                    key,
                    number,
                    began: now,
                    cancelled,
                    asked,
                    queued: None,
                    executing: None,
                    ended: false,
                };
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
        ClientExecution {
            flights: self.clone(),
            key,
            began,
            has_waited: AtomicBool::new(false),
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

/// A memory of the last `most`.
fn remembering<V: Clone + Send + Sync + 'static>(most: u64) -> Remembering<V> {
    Cache::builder().max_capacity(most)
}

/// The flight that departs.
struct Next {
    key: FlightKey,
    number: u64,
    cancelled: CancellationToken,
    asked: CancellationToken,
}

impl State {
    /// Puts a flight that may start into the queue; or holds it back, if nobody who is trusted has
    /// announced it.
    fn queue(&mut self, urgency: Urgency, key: FlightKey) {
        let owners = self.flights.get(&key).map_or(&[][..], |it| &it.owners);
        let is_doubted = |owner: &mpsc::Sender<Landing>| {
            let mut doubted = self.doubted.iter();
            doubted.any(|doubted| doubted.same_channel(owner))
        };
        match !self.doubted.is_empty() && owners.iter().all(is_doubted) {
            true => self.held_back.insert((urgency, key)),
            false => self.ready.insert((urgency, key)),
        };
    }

    /// Somebody else wants a flight, too. Returns whether it was held back.
    fn release(&mut self, key: &FlightKey) -> bool {
        let urgency = self.flights.get(key).and_then(|flight| flight.ready);
        let held = urgency.map(|urgency| (urgency, key.clone()));
        match held.and_then(|held| self.held_back.take(&held)) {
            Some((urgency, key)) => {
                self.queue(urgency, key);
                true
            }
            None => false,
        }
    }

    /// Takes a flight out of the queue; `false` if it is not there.
    fn takes_out(&mut self, urgency: Urgency, key: &FlightKey) -> bool {
        let queued = (urgency, key.clone());
        self.ready.remove(&queued) || self.held_back.remove(&queued)
    }

    /// Takes the next flight to start: first what clients wait for, then the most urgent while
    /// the lane has room.
    fn take_next(&mut self, now: Instant) -> Option<Next> {
        let key = match self.wanted.pop_front() {
            Some(key) => key,
            None => {
                if self.airborne.len() >= self.width.room(now) {
                    return None;
                }
                self.ready.pop_first()?.1
            }
        };
        self.departures += 1;
        let number = self.departures;
        let asked = CancellationToken::new();
        let airborne = Airborne {
            key: key.clone(),
            asked: asked.clone(),
            is_leaving: false,
        };
        self.airborne.insert(number, airborne);
        self.width.entered(now, Whose::Speculative);
        let mut cancelled = CancellationToken::new();
        if let Some(flight) = self.flights.get(&key) {
            flight.record.start();
            flight.stage.send_replace(Stage::Running(None));
            cancelled = flight.cancelled.clone();
        }
        Some(Next {
            key,
            number,
            cancelled,
            asked,
        })
    }

    /// Has `count` flights that no client waits for give way, those first that began last: they
    /// lose least, and may be queued yet.
    fn make_room(&mut self, now: Instant, count: usize) {
        if count == 0 {
            return;
        }
        let flights = &self.flights;
        let can = |airborne: &&mut Airborne| {
            let flight = flights.get(&airborne.key);
            !airborne.asked.is_cancelled() && flight.is_some_and(Flight::may_give_way)
        };
        for airborne in self.airborne.values_mut().rev().filter(can).take(count) {
            airborne.is_leaving = true;
            airborne.asked.cancel();
            // From now on it takes no worker that a client waits for.
            self.width.gives_way(now);
        }
    }

    /// A flight is over, or stopped.
    fn lands(&mut self, number: u64) {
        if self
            .airborne
            .remove(&number)
            .is_some_and(|it| !it.is_leaving)
        {
            self.width.left(Instant::now(), Whose::Speculative);
        }
    }

    /// It goes on all the same.
    fn stays(&mut self, number: u64) {
        if let Some(airborne) = self.airborne.get_mut(&number)
            && std::mem::take(&mut airborne.is_leaving)
        {
            self.width.entered(Instant::now(), Whose::Speculative);
        }
    }

    /// Takes away an owner. `None` if others wait for the flight; else whether it is queued.
    fn gives_up(&mut self, key: &FlightKey, owner: &mpsc::Sender<Landing>) -> Option<bool> {
        let flight = self.flights.get_mut(key)?;
        flight.owners.retain(|known| !known.same_channel(owner));
        if flight.wanted || !flight.owners.is_empty() {
            return None;
        }
        let is_queued = matches!(*flight.stage.borrow(), Stage::Queued);
        match is_queued {
            true => flight.record.because(SUPERSEDED.to_owned()),
            // It is told when it lands, all the same.
            false => flight.owners.push(owner.clone()),
        }
        Some(is_queued)
    }

    fn end(&mut self, key: &FlightKey, ending: Ending) {
        if let Some(flight) = self.flights.remove(key) {
            if let Some(urgency) = flight.ready {
                self.takes_out(urgency, key);
                self.wanted.retain(|wanted| wanted != key);
            }
            flight.record.end(&ending);
            flight.stage.send_replace(Stage::Ended(ending));
        }
    }
}

impl Flight {
    fn may_give_way(&self) -> bool {
        !self.wanted && !self.cancelled.is_cancelled() && self.gave_way < GIVES_WAY
    }
}

impl Announcement {
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
        if flight.wanted {
            state.wanted.push_back(self.key.clone());
        } else {
            state.queue(urgency, self.key.clone());
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
                state.counts.failed += 1;
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
        match flight.wanted {
            true => state.wanted.push_back(self.key.clone()),
            false => state.queue(urgency, self.key.clone()),
        }
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

impl ClientExecution {
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
    use crate::speculation::flight_record::Course;

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
    async fn what_is_held_back_stays_queued_but_for_those_who_wait_for_it_or_want_it_too() {
        let flights = Flights::new(9);
        let (doubted, trusted) = (owner(), owner());
        let announce = |name| {
            let announced = flights.announce(key(name), &doubted).unwrap();
            announced.submit(urgency(1));
        };
        announce("before");
        flights.hold_back(&doubted);
        for name in ["after", "awaited", "shared"] {
            announce(name);
        }
        assert!(departing(&flights).await.is_none());
        let _stage = flights.join(&key("awaited")).unwrap();
        assert_eq!(*departing(&flights).await.unwrap().key(), key("awaited"));
        assert!(flights.announce(key("shared"), &trusted).is_none());
        assert_eq!(*departing(&flights).await.unwrap().key(), key("shared"));
        assert!(departing(&flights).await.is_none());
        flights.withdraw(&key("after"), &doubted);
        flights.trust(&doubted);
        assert_eq!(*departing(&flights).await.unwrap().key(), key("before"));
        assert!(departing(&flights).await.is_none());
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
        // When none of them has come back for a while.
        assert_eq!(*flights.depart().await.key(), key("y"));
        assert!(flights.announce(key("b"), &owner()).is_some());
    }

    /// No client waits for it any more.
    fn leave(flights: &Flights, name: &str) {
        let mut state = flights.state.lock();
        state.flights.get_mut(&key(name)).unwrap().wanted = false;
    }

    /// Before a backend that takes two executions at once, with two that run.
    async fn full(names: [&str; 2]) -> (Arc<Flights>, [Departure; 2]) {
        let flights = Flights::before(Some(2), 2);
        queue(&flights, &names.map(|name| (name, 1)));
        let mut departures = Vec::new();
        for name in names {
            // Told of, it leaves a slot free; a client that waits takes it.
            let stage = flights.join(&key(name)).unwrap();
            departures.push(departing(&flights).await.unwrap());
            drop(stage);
            leave(&flights, name);
        }
        (flights, departures.try_into().ok().unwrap())
    }

    fn is_asked(departure: &Departure) -> bool {
        departure.asked_to_give_way().is_cancelled()
    }

    #[tokio::test]
    async fn what_began_last_gives_way_to_a_client_and_departs_again_when_there_is_room() {
        let (flights, [first, mut last]) = full(["first", "last"]).await;
        let own = flights.client_executes(key("own"));
        assert!(!is_asked(&first) && is_asked(&last));
        assert!(last.is_to_give_way());
        assert!(last.give_way());
        drop(last);
        let counts = flights.counts();
        assert_eq!((counts.running, counts.queued, counts.gave_way), (1, 1, 1));
        assert_eq!((counts.failed, counts.cancelled), (0, 0));
        let record = flights.record(&key("last")).unwrap();
        assert_eq!(record.flown().course, Course::Queued);
        assert_eq!(record.flown().started_unix_ms, None);
        assert!(departing(&flights).await.is_none());
        drop(own);
        first.end(Ending::Cached, Duration::ZERO);
        let again = flights.depart().await;
        assert_eq!(*again.key(), key("last"));
        again.end(Ending::Succeeded(Bytes::new()), Duration::from_secs(1));
        assert!(flights.use_primed(&key("last"), 1).is_some());
        assert_eq!(flights.counts().running, 0);
    }

    #[tokio::test]
    async fn its_landing_is_told_once_after_it_has_given_way() {
        let flights = Flights::new(1);
        let (owner, mut landings) = mpsc::channel(4);
        let announced = flights.announce(key("a"), &owner).unwrap();
        announced.submit(urgency(1));
        let mut departure = departing(&flights).await.unwrap();
        let own = [
            flights.client_executes(key("b")),
            flights.client_executes(key("c")),
        ];
        assert!(is_asked(&departure) && departure.give_way());
        drop((departure, own));
        assert!(landings.try_recv().is_err());
        let departure = flights.depart().await;
        let activities = super::super::activity::Activities::default();
        departure.land(Outcome::Failed, activities.begin()).await;
        departure.end(Ending::Failed, Duration::ZERO);
        assert_eq!(landings.try_recv().unwrap().key, key("a"));
        assert!(landings.try_recv().is_err());
    }

    #[tokio::test]
    async fn what_a_client_waits_for_never_gives_way_and_starts_again_at_once_if_it_just_has() {
        let (flights, [mut first, last]) = full(["first", "last"]).await;
        let _stage = flights.join(&key("last")).unwrap();
        let _own = flights.client_executes(key("own"));
        assert!(is_asked(&first) && !is_asked(&last));
        // A client joins before anything has been done about it.
        let _stage = flights.join(&key("first")).unwrap();
        assert!(!first.is_to_give_way());
        last.end(Ending::Cached, Duration::ZERO);
        // And one joins when it is too late for that.
        let mut stage = flights.watch(&key("first")).unwrap();
        assert!(first.give_way());
        assert!(matches!(*stage.borrow_and_update(), Stage::Queued));
        assert_eq!(*departing(&flights).await.unwrap().key(), key("first"));
    }

    #[tokio::test]
    async fn a_flight_gives_way_twice_and_is_left_alone_then() {
        let (flights, [_first, last]) = full(["first", "last"]).await;
        let mut departure = last;
        for _ in 0..GIVES_WAY {
            let own = flights.client_executes(key("own"));
            assert!(is_asked(&departure) && departure.give_way());
            drop(own);
            let _stage = flights.join(&key("last")).unwrap();
            departure = departing(&flights).await.unwrap();
            leave(&flights, "last");
        }
        let _own = flights.client_executes(key("own"));
        assert!(!is_asked(&departure));
    }

    #[tokio::test]
    async fn nothing_gives_way_where_priorities_do_or_where_nothing_can_be_stopped() {
        let (flights, [first, last]) = full(["first", "last"]).await;
        let own = flights.client_executes(key("own"));
        assert!(is_asked(&last));
        last.goes_on(true);
        assert_eq!(flights.counts().running, 2);
        let _other = flights.client_executes(key("other"));
        assert!(!is_asked(&first));
        // Even there something does if a client is queued all the same.
        own.is_still_queued();
        assert!(is_asked(&first));

        let (flights, [first, last]) = full(["first", "last"]).await;
        first.leave_to_priorities();
        let _own = flights.client_executes(key("own"));
        assert!(!is_asked(&first) && !is_asked(&last));
    }

    #[tokio::test]
    async fn what_nobody_wants_any_more_does_not_start_again() {
        let flights = Flights::new(1);
        let owner = queue_for(&flights, &[("withdrawn", 2)]);
        let mut departure = departing(&flights).await.unwrap();
        flights.withdraw(&key("withdrawn"), &owner);
        let _own = [
            flights.client_executes(key("b")),
            flights.client_executes(key("c")),
        ];
        assert!(is_asked(&departure) && !departure.give_way());
        departure.end(Ending::Abandoned, Duration::ZERO);
        assert!(!flights.is_in_flight(&key("withdrawn")));
        let counts = flights.counts();
        assert_eq!((counts.running, counts.gave_way), (0, 0));
    }

    #[tokio::test]
    async fn what_runs_is_named_longest_first_with_who_waits_for_it() {
        let flights = Flights::new(2);
        queue(&flights, &[("a", 3), ("b", 2), ("c", 1)]);
        let a = departing(&flights).await.unwrap();
        let _b = departing(&flights).await.unwrap();
        let _stage = flights.join(&key("b")).unwrap();
        let named = |most| {
            let mut running = flights.running(most);
            running.sort_by_key(|flight| flight.wanted);
            let name = |flight: &RunningFlight| (flight.action.clone(), flight.wanted);
            running.iter().map(name).collect::<Vec<_>>()
        };
        let digest = |name| key(name).action.to_string();
        assert_eq!(named(9), [(digest("a"), false), (digest("b"), true)]);
        assert_eq!(named(1).len(), 1);
        a.end(Ending::Failed, Duration::ZERO);
        assert_eq!(named(9), [(digest("b"), true)]);
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

    /// One owner for all of `names`.
    fn queue_for(flights: &Arc<Flights>, names: &[(&str, u64)]) -> mpsc::Sender<Landing> {
        let owner = owner();
        for (name, seconds) in names {
            let announced = flights.announce(key(name), &owner).unwrap();
            announced.submit(urgency(*seconds));
        }
        owner
    }

    #[tokio::test]
    async fn withdrawing_stops_what_is_queued_and_leaves_what_runs() {
        let flights = Flights::new(1);
        let owner = queue_for(&flights, &[("runs", 2), ("waits", 1)]);
        let runs = departing(&flights).await.unwrap();
        flights.withdraw(&key("waits"), &owner);
        flights.withdraw(&key("runs"), &owner);
        assert!(!runs.cancelled().is_cancelled());
        assert!(flights.join(&key("waits")).is_none());
        assert!(flights.join(&key("runs")).is_some());
        runs.end(Ending::Failed, Duration::ZERO);
        assert!(flights.has_failed(&key("runs")));
        drop(flights.client_executes(key("runs")));
        assert!(!flights.has_failed(&key("runs")));
        assert!(departing(&flights).await.is_none());
    }

    #[tokio::test]
    async fn what_is_superseded_is_cancelled_and_no_client_joins_it_any_more() {
        let flights = Flights::new(1);
        let owner = queue_for(&flights, &[("runs", 2), ("waits", 1)]);
        let runs = departing(&flights).await.unwrap();
        flights.supersede(&key("waits"), &owner);
        flights.supersede(&key("runs"), &owner);
        assert!(runs.cancelled().is_cancelled());
        assert!(flights.join(&key("runs")).is_none());
        assert!(!flights.is_expected(&key("runs")));
        runs.end(Ending::Abandoned, Duration::ZERO);
        let counts = flights.counts();
        assert_eq!((counts.cancelled, counts.failed), (1, 0));
        let reason = flights.record(&key("runs")).unwrap().flown().reason;
        assert_eq!(reason.as_deref(), Some(SUPERSEDED));
    }

    #[tokio::test]
    async fn what_a_client_or_another_owner_waits_for_is_not_cancelled() {
        let flights = Flights::new(3);
        let one = queue_for(&flights, &[("joined", 2), ("shared", 1)]);
        let joined = departing(&flights).await.unwrap();
        let shared = departing(&flights).await.unwrap();
        let _stage = flights.join(&key("joined")).unwrap();
        let other = owner();
        assert!(flights.announce(key("shared"), &other).is_none());
        flights.supersede(&key("joined"), &one);
        flights.supersede(&key("shared"), &one);
        assert!(!joined.cancelled().is_cancelled() && !shared.cancelled().is_cancelled());
        flights.supersede(&key("shared"), &other);
        assert!(shared.cancelled().is_cancelled());
    }

    #[tokio::test]
    async fn the_record_of_a_flight_outlives_it_and_says_why_it_ended() {
        let flights = Flights::new(1);
        let all = queue_for(&flights, &[("runs", 2), ("waits", 1)]);
        let course = |name: &str| flights.record(&key(name)).unwrap().flown();
        let runs = departing(&flights).await.unwrap();
        assert_eq!(course("runs").course, Course::Running);
        assert_eq!(course("waits").course, Course::Queued);
        flights.withdraw(&key("waits"), &all);
        assert_eq!(course("waits").course, Course::Abandoned);
        assert_eq!(course("waits").reason.as_deref(), Some(SUPERSEDED));
        runs.end(Ending::Succeeded(Bytes::new()), Duration::from_secs(2));
        let flown = course("runs");
        assert_eq!(
            (flown.course, flown.execution),
            (Course::Primed, Duration::from_secs(2))
        );
        let ended = flown.ended_unix_ms.unwrap();
        let record = flights.record(&key("runs")).unwrap();
        assert_eq!(record.used(ended + 30), Duration::from_millis(30));
        record.used(ended + 50);
        assert_eq!(
            course("runs").used_unix_ms,
            Some(ended + 30),
            "the first use counts"
        );
        let dropped = flights.announce(key("dropped"), &owner()).unwrap();
        dropped.because("its inputs could not be uploaded");
        drop(dropped);
        let reason = course("dropped").reason;
        assert_eq!(reason.as_deref(), Some("its inputs could not be uploaded"));
    }
}
