//! The engine: one task that takes in what the proxy saw, attributes it to builds, and tells the
//! others what to do. It never waits for anybody: what it cannot hand over at once it gives up.

mod action_parents;
mod beginnings;
mod calls;
mod endings;
mod requests;
mod watching;

use std::collections::{HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, oneshot};

pub use self::requests::{Request, Status};
use self::watching::Watching;
use super::Engine;
use super::activity::{Activities, Activity};
use super::clients::builds::Build;
use super::clients::caller::{BuildKey, Caller};
use super::clients::callers::Callers;
use super::clients::observation::{CallOrigin, Observation, TapMemory};
use super::clients::operations::operations;
use super::flights::budgets::Budgets;
use super::flights::{Flights, lane};
pub use super::journal::accounting::BuildStatus;
use super::journal::accounting::Effort;
use super::journal::labels::Names;
use super::journal::store::JournalStore;
use super::journal::{Journal, Room};
use super::nested::attribution::{Attributor, Found};
use super::nested::subactions::{self, Subactions};
use super::nested::{Answered, Nested};
use super::planning::uses::Uses;
use super::priming::{Group, Message, Priming};
use super::recording::recorder::{self, Recorded};
use super::records::parent::{ParentKind, WeakKey};
use super::records::store::{KnownParent, Store};
use super::sharing::share::Sharing;
use super::sharing::shelf::Place;
use super::workshop::{Beneficiary, News, Workshop};
use crate::backend::Backend;
use crate::cas::directories::DirectoryCache;
use crate::cas::transfer::Cas;
use crate::clock::Moment;
use crate::config::{BudgetLimits, Mode};
use crate::quick_map::QuickMap;
use crate::task;
use crate::workspace::index::FileIndex;

/// Observations that may wait; more are dropped and counted.
const OBSERVATIONS: usize = 16 * 1024;
/// How many are taken in at once.
const BATCH: usize = 1024;
/// How long the engine rests, at most, after it has taken in what there was. To wake it takes as long as
/// some ten calls do when it has them at once, most of all where others use the processor's cache meanwhile.
const REST: Duration = Duration::from_millis(5);
/// Messages between the engine and its tasks that may wait.
const NOTES: usize = 1024;

/// What an engine is made of.
pub struct EngineParts {
    /// What it records and uses.
    pub mode: Mode,
    /// Where actions are executed and blobs are kept.
    pub backend: Arc<dyn Backend>,
    /// What is in flight.
    pub flights: Arc<Flights>,
    /// The records.
    pub store: Arc<Store>,
    /// The journals of builds.
    pub journals: Arc<JournalStore>,
    /// Whether they are shared with others.
    pub share: bool,
    /// What priming may spend.
    pub budgets: BudgetLimits,
    /// Whether saving a file primes.
    pub watch: bool,
}

/// The receiving end of an `Engine`, to be run by one task.
pub struct Runner {
    observations: mpsc::Receiver<Observation>,
    /// Ends a rest.
    urgent: Arc<Notify>,
    requests: mpsc::Receiver<Request>,
    state: State,
    news: mpsc::Receiver<News>,
    recorded: mpsc::Receiver<Recorded>,
    exits: mpsc::Receiver<BuildKey>,
    found: mpsc::Receiver<(Found, Activity)>,
    /// Parents whose sources were saved; `None` if they are not watched.
    saved: Option<mpsc::Receiver<Vec<WeakKey>>>,
}

/// Makes an engine: the proxy's handle, a way to ask it things, and the task to run. Call it on
/// the runtime that will run it.
pub fn engine(parts: EngineParts) -> (Arc<Engine>, mpsc::Sender<Request>, Runner) {
    let (observed, observations) = mpsc::channel(OBSERVATIONS);
    let (asked, requests) = mpsc::channel(NOTES);
    let (recorder, to_record) = mpsc::channel(NOTES);
    let (records, recorded) = mpsc::channel(NOTES);
    let (told, news) = mpsc::channel(NOTES);
    let (exited, exits) = mpsc::channel(NOTES);
    let cas = Cas::new(parts.backend.clone());
    let files = parts.store.files().unwrap_or_else(|error| {
        tracing::warn!(%error, "known files cannot be read; they will be hashed again");
        Vec::new()
    });
    let sharing = parts.share.then(|| {
        let place = Place {
            backend: parts.backend.clone(),
            cas: cas.clone(),
        };
        let save = recorder::saves_shared(&recorder);
        Arc::new(Sharing::new(place, parts.store.clone(), save))
    });
    let workshop = Workshop {
        flights: parts.flights.clone(),
        backend: parts.backend.clone(),
        cas,
        directories: DirectoryCache::default(),
        index: Arc::new(FileIndex::with(files)),
        store: parts.store.clone(),
        uses: Arc::new(Uses::of(parts.store.clone())),
        leftovers: Arc::default(),
        budgets: Budgets::new(parts.budgets),
        sharing,
        activities: Activities::default(),
        unadaptable: Arc::default(),
        journals: parts.journals,
        names: Names::default(),
        news: told,
    };
    task::spawn(
        "lane",
        lane::run(
            parts.flights.clone(),
            parts.backend.clone(),
            workshop.activities.clone(),
        ),
    );
    task::spawn(
        "recorder",
        recorder::run(workshop.clone(), parts.mode, to_record, records),
    );
    let mut parents: HashMap<WeakKey, KnownParent> = HashMap::new();
    match parts.store.parents() {
        Ok(known) => parents.extend(known.into_iter().map(|known| (known.key, known))),
        Err(error) => tracing::warn!(%error, "records cannot be read; nothing is primed"),
    }
    let subactions = Arc::new(Subactions::default());
    let actions = parents.values();
    let actions: Vec<WeakKey> = actions
        .filter(|known| matches!(known.identity.kind, ParentKind::Action(_)))
        .map(|known| known.key)
        .collect();
    let watching = parts
        .watch
        .then(|| Watching::start(&parts.store, parents.values()));
    let (watching, saved) = watching.flatten().unzip();
    let (filled, store) = (subactions.clone(), parts.store);
    // In the background: there may be many, and nobody waits for them.
    task::spawn("recorded subactions", async move {
        task::blocking("recorded subactions", move || filled.fill(&store, actions)).await;
    });
    let (attributor, found) = Attributor::start(workshop.clone());
    let dropped = Arc::new(AtomicU64::new(0));
    let waiting_observations = observed.downgrade();
    let engine = Arc::new(Engine {
        observations: observed,
        flights: parts.flights,
        subactions,
        operations: operations(),
        hidden_hits: Arc::default(),
        backend: parts.backend,
        dropped: dropped.clone(),
        memory: TapMemory::default(),
        urgent: Arc::default(),
        latest_process: AtomicI32::new(0),
    });
    let runner = Runner {
        observations,
        urgent: engine.urgent.clone(),
        requests,
        news,
        recorded,
        exits,
        found,
        saved,
        state: State {
            now: Moment::now(),
            mode: parts.mode,
            workshop,
            parents,
            callers: Callers::new(),
            open: QuickMap::default(),
            closed: VecDeque::new(),
            primings: QuickMap::default(),
            nested: Nested::new(attributor),
            subactions: engine.subactions.clone(),
            early: HashMap::new(),
            watching,
            unsettled: Vec::new(),
            room: Room::default(),
            waiting: Vec::new(),
            recorder,
            observations: waiting_observations,
            exited,
            builds: 0,
            dropped,
            reported: 0,
        },
    };
    (engine, asked, runner)
}

struct State {
    /// When the latest observations and findings were taken in.
    now: Moment,
    mode: Mode,
    workshop: Workshop,
    /// All recorded parents.
    parents: HashMap<WeakKey, KnownParent>,
    callers: Callers,
    open: QuickMap<BuildKey, Build>,
    closed: VecDeque<Build>,
    /// Parents of open builds that are being primed, and action parents of late.
    primings: QuickMap<Group, Priming>,
    /// Action parents that are open.
    nested: Nested,
    /// What they, and those before them, have run.
    subactions: Arc<Subactions>,
    /// What was planned and primed for parents before their builds began.
    early: HashMap<WeakKey, Early>,
    /// If saving a file primes.
    watching: Option<Watching>,
    /// Journals of builds that have ended while something was in flight for them, with the numbers
    /// of these.
    unsettled: Vec<(u64, Arc<Journal>)>,
    /// What all journals share.
    room: Room,
    /// Those who wait for quiet.
    waiting: Vec<oneshot::Sender<()>>,
    recorder: mpsc::Sender<recorder::Message>,
    /// For what it says of its length.
    observations: mpsc::WeakSender<Observation>,
    exited: mpsc::Sender<BuildKey>,
    builds: u64,
    /// Observations that were dropped, and how many of them the log knows of.
    dropped: Arc<AtomicU64>,
    reported: u64,
}

/// What was done for a parent before its build began.
struct Early {
    primed: u64,
    effort: Effort,
    journal: Journal,
}

impl Early {
    fn count_for(self, build: &mut Build) {
        build.primed += self.primed;
        build.effort += self.effort;
        build.journal.adopt(self.journal);
    }
}

impl Runner {
    /// Runs the engine until nobody holds a handle on it. What panics is given up; the engine,
    /// and the proxy with it, go on.
    pub async fn run(mut self) {
        let activities = self.state.workshop.activities.clone();
        loop {
            let quiet_at = self.state.next_quiet();
            tokio::select! {
                biased;
                observation = self.observations.recv() => match observation {
                    Some(observation) => self.observe_batch(observation).await,
                    None => return,
                },
                Some(news) = self.news.recv() => guarded(|| self.state.take_in(news)),
                Some(recorded) = self.recorded.recv() => guarded(|| self.state.recorded(recorded)),
                Some((found, _activity)) = self.found.recv() => guarded(|| self.state.found(found)),
                Some(key) = self.exits.recv() => guarded(|| self.state.close(&key)),
                Some(saved) = next(&mut self.saved) => guarded(|| self.state.saved(&saved)),
                Some(request) = self.requests.recv() => guarded(|| self.state.answer(request)),
                () = activities.ended() => {}
                () = tokio::time::sleep_until(quiet_at.into()) => {
                    guarded(|| self.state.close_silent());
                }
            }
            let drained =
                self.observations.is_empty() && self.news.is_empty() && self.recorded.is_empty();
            if drained {
                guarded(|| self.state.settle_journals());
                guarded(|| self.state.answer_waiting());
                guarded(|| self.state.report_dropped());
            }
        }
    }

    /// Takes in what has been observed, and rests.
    async fn observe_batch(&mut self, first: Observation) {
        // A call to hurry that has been heard; what it was for is in the queue.
        pin!(self.urgent.notified()).enable();
        self.state.now = Moment::now();
        guarded(|| self.state.observe(first));
        for _ in 1..BATCH {
            let Ok(next) = self.observations.try_recv() else {
                break;
            };
            guarded(|| self.state.observe(next));
        }
        tokio::select! {
            () = self.urgent.notified() => {}
            () = tokio::time::sleep(REST) => {}
        }
    }
}

/// The next of what may come; never, if nothing may.
async fn next<T>(receiver: &mut Option<mpsc::Receiver<T>>) -> Option<T> {
    match receiver {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
}

fn guarded(step: impl FnOnce()) {
    task::guard("engine", AssertUnwindSafe(step));
}

impl State {
    fn observe(&mut self, observation: Observation) {
        match observation {
            Observation::FirstCall(origin) => {
                self.build_of(&origin);
            }
            Observation::Executing { origin, key } => {
                self.nested.ask(&origin, &key, true);
                let (caller, _) = self.asked_by(&origin);
                let parent = self.callers.weak_key(&caller, &key);
                self.tell_primings(parent, || Message::Executing { key: key.clone() });
            }
            Observation::Lookup(call) => self.answered(Answered::Lookup(call)),
            Observation::Execution(call) => self.answered(Answered::Execution(call)),
            Observation::Question { origin, key, reply } => {
                if self.has_action_parents(&key.instance) {
                    self.nested.ask(&origin, &key, false);
                }
                let (caller, build) = self.asked_by(&origin);
                let parent = self.callers.weak_key(&caller, &key);
                self.begin_asked(parent, &caller, &key, build);
                let (asked, reply) = (Instant::now(), Arc::new(reply));
                self.tell_primings(parent, || Message::Question {
                    key: key.clone(),
                    asked,
                    reply: reply.clone(),
                });
            }
            // Answered when it is known on whose behalf all was asked for that came before.
            Observation::Completing { key, reply } => self.nested.complete(&key, reply),
            Observation::Disconnected(peer) => {
                self.callers.forget_connection(peer);
            }
        }
    }

    /// Whose parent a call belongs to if it is for no other action, and the number of its build.
    fn asked_by(&mut self, origin: &CallOrigin) -> (Arc<Caller>, u64) {
        let client = self.client_in_run(origin);
        let build = self.build_of(origin);
        (client.unwrap_or_else(|| build.caller.clone()), build.number)
    }

    /// Who calls, if it belongs to a run.
    fn client_in_run(&mut self, origin: &CallOrigin) -> Option<Arc<Caller>> {
        if self.callers.runs.is_empty() {
            return None;
        }
        let open = &self.open;
        let client = self.callers.of(origin, |key| open.contains_key(key));
        matches!(client.key, BuildKey::Run(_)).then_some(client)
    }

    /// Tells the priming of `parent`, and those of all open action parents, what a call is about.
    fn tell_primings(&self, parent: WeakKey, message: impl Fn() -> Message) {
        let own = Group::Invocation(parent);
        let open = self.nested.open().map(|(_, open)| &open.group);
        for group in open.chain([&own]) {
            if let Some(priming) = self.primings.get(group) {
                priming.tell(message());
            }
        }
    }

    /// Counts what was primed, and notes what was planned and what it took.
    fn take_in(&mut self, news: News) {
        let mut builds = self.open.values_mut().chain(&mut self.closed);
        let whom = match &news {
            News::Primed(whom) | News::Planned(whom, _) | News::Spent(whom, _) => *whom,
            News::Reviewed(id, shortfall) => {
                if let Some(build) = builds.find(|known| known.id == *id) {
                    build.shortfall = shortfall.clone();
                }
                return;
            }
        };
        let Beneficiary { parent, build } = whom;
        let has_begun = build.is_some();
        let known = self.parents.get(&parent);
        let build = builds.find(|candidate| match (build, known) {
            (Some(build), _) => candidate.number == build,
            // It may have begun since.
            (None, Some(known)) => {
                candidate.ended_unix_ms.is_none() && candidate.caller.works_on(&known.identity)
            }
            (None, None) => false,
        });
        let (primed, effort, journal) = match build {
            Some(build) => {
                let is_open = build.ended_unix_ms.is_none();
                let journal = is_open.then_some(&mut build.journal);
                (&mut build.primed, &mut build.effort, journal)
            }
            // It was recorded when it had been forgotten.
            None if has_begun && matches!(news, News::Spent(..)) => return,
            None => {
                let early = self.early.entry(parent).or_insert_with(|| Early {
                    primed: 0,
                    effort: Effort::default(),
                    journal: Journal::within(&self.room),
                });
                (
                    &mut early.primed,
                    &mut early.effort,
                    Some(&mut early.journal),
                )
            }
        };
        match (news, journal) {
            (News::Primed(_), _) => *primed += 1,
            (News::Spent(_, more), _) => *effort += more,
            (News::Planned(_, planned), Some(journal)) => {
                planned
                    .into_iter()
                    .for_each(|planned| journal.plan(planned));
            }
            (News::Planned(..) | News::Reviewed(..), _) => {}
        }
    }

    fn recorded(&mut self, recorded: Recorded) {
        for key in &recorded.dropped {
            self.parents.remove(key);
        }
        let key = recorded.parent.identity.weak_key();
        if let Some(watching) = &mut self.watching {
            watching.recorded(key, &recorded.parent);
        }
        let known = KnownParent {
            key,
            identity: recorded.parent.identity.clone(),
            dependencies: recorded.parent.dependencies(),
            last_seen_unix_ms: recorded.parent.last_seen_unix_ms,
        };
        self.parents.insert(key, known);
        if let Some((key, digests)) = subactions::recorded(&recorded.parent) {
            self.subactions.set(key, digests);
        }
        if let Some(priming) = self.primings.get(&Group::Invocation(key)) {
            priming.tell(Message::Records(recorded.parent));
        }
        drop(recorded.activity);
    }

    fn report_dropped(&mut self) {
        let dropped = self.dropped.load(Ordering::Relaxed);
        if dropped > self.reported {
            let now = dropped - self.reported;
            tracing::warn!(
                dropped = now,
                "the engine fell behind; what it did not see is not recorded"
            );
            self.reported = dropped;
        }
    }
}
