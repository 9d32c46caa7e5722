//! The engine: one task that takes in what the proxy saw, attributes it to builds, and tells the
//! others what to do. It never waits for anybody: what it cannot hand over at once it gives up.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore, mpsc, oneshot};

use super::accounting::{Effort, Leads, Totals};
use super::activity::{Activities, Activity};
use super::archive;
use super::attribution::{Attributor, Found, FoundParent};
use super::budgets::Budgets;
pub use super::builds::BuildStatus;
use super::builds::{Asked, Build};
use super::callers::{BuildKey, Caller, Callers};
use super::explain::{ExplainError, Explanations, Question, explain};
use super::flights::{FlightKey, Flights};
use super::journal::{Journal, Note, Room};
use super::journal_page::Page;
use super::journal_store::{Fresh, JournalStore};
use super::known::CurrentParent;
use super::labels::Names;
use super::lane_width::Executed;
use super::library::{JournalError, Library};
use super::nested::{Answered, Nested, OpenParent};
use super::observation::{Call, CallOrigin, NotExecuted, Observation};
use super::operations::operations;
use super::parent::{ExecutedParent, ParentIdentity, ParentKind, WeakKey};
use super::priming::{Family, Group, Message, Opened, Priming};
use super::record::{Subaction, execution_time};
use super::recorder::{self, Ended, Recorded};
use super::runs::{self, OpenRun, Opened as OpenedRun};
use super::schedule::Outputs;
use super::share::Sharing;
use super::store::{KnownParent, RecordCounts, Store};
use super::subactions::{self, Subactions};
use super::uses::Uses;
use super::watching::Watching;
use super::workshop::{Beneficiary, News, Workshop};
use super::{Engine, TAP_MEMORY_KIB, lane};
use crate::backend::Backend;
use crate::cas::directories::DirectoryCache;
use crate::cas::transfer::Cas;
use crate::clock;
use crate::config::{BudgetLimits, Mode};
use crate::meters::METERS;
use crate::quick_map::QuickMap;
use crate::reapi::ActionResult;
use crate::task;
use crate::workspace::index::FileIndex;
use crate::workspace::process::Process;

/// Observations that may wait; more are dropped and counted.
const OBSERVATIONS: usize = 16 * 1024;
/// How many are taken in at once.
const BATCH: usize = 1024;
/// How long the engine rests after it has taken in what there was: to wake it for each call would
/// cost the call itself some microseconds.
const REST: Duration = Duration::from_millis(1);
/// Builds that `primed status` still knows after they have ended.
const REMEMBERED_BUILDS: usize = 100;
/// Subactions of one build that are kept for recording.
const MAX_SUBACTIONS: usize = 200_000;
/// A client below no build tool has ended its build when it was silent for this long.
const QUIET_TIME: Duration = Duration::from_secs(10);
/// Builds that have ended and whose journals wait for what is in flight.
const MAX_UNSETTLED: usize = 16;
/// Recorded parents that are primed when a build begins: a run may find many below its directory.
const MAX_BEGUN: usize = 16;
/// Messages between the engine and its tasks that may wait.
const NOTES: usize = 1024;

/// What `primed status` and `primed wait` ask of the engine.
pub enum Request {
    /// The state of things.
    Status(oneshot::Sender<Status>),
    /// Answered when recording, generation and priming are quiet.
    Wait(oneshot::Sender<()>),
    /// Ends all builds; answered when they are recorded.
    Finish(oneshot::Sender<()>),
    /// All builds that are known, also those of earlier runs of the daemon.
    Builds(oneshot::Sender<Vec<BuildStatus>>),
    /// The journal of the one build whose id begins so.
    Journal(String, oneshot::Sender<Result<Page, JournalError>>),
    /// Why actions were answered as they were.
    Explain(
        Box<Question>,
        oneshot::Sender<Result<Explanations, ExplainError>>,
    ),
    /// About runs.
    Run(runs::Request),
    /// About the records themselves.
    Records(archive::Request),
}

/// The state of the engine.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// How much is recorded.
    pub records: RecordCounts,
    /// Base actions that could not be adapted, since primed began.
    pub unadaptable: u64,
    /// Directories in which saved files are seen; `None` if that is not wanted.
    pub watched_directories: Option<usize>,
    /// Builds that run.
    pub open_builds: u64,
    /// Calls that the engine has yet to look at.
    pub queued_observations: u64,
    /// What the recorder has yet to look at.
    pub queued_recordings: u64,
    /// How many journals of builds are kept.
    pub journals: u64,
    /// What they take, in bytes.
    pub journal_bytes: u64,
    /// Builds, newest first.
    pub builds: Vec<BuildStatus>,
    /// All of them together.
    pub totals: Totals,
}

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
        sharing: parts.share.then(|| Arc::new(Sharing::new(&recorder))),
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
        memory: Arc::new(Semaphore::new(TAP_MEMORY_KIB)),
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
            mode: parts.mode,
            workshop,
            parents,
            callers: Callers::new(),
            open: QuickMap::default(),
            closed: VecDeque::new(),
            primings: HashMap::new(),
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
    mode: Mode,
    workshop: Workshop,
    /// All recorded parents.
    parents: HashMap<WeakKey, KnownParent>,
    callers: Callers,
    open: QuickMap<BuildKey, Build>,
    closed: VecDeque<Build>,
    /// Parents of open builds that are being primed, and action parents of late.
    primings: HashMap<Group, Priming>,
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
}

impl Runner {
    /// Takes in what has been observed, and rests.
    async fn observe_batch(&mut self, first: Observation) {
        // A call to hurry that has been heard; what it was for is in the queue.
        pin!(self.urgent.notified()).enable();
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
                let (parent, _) = self.asked_by(&origin, &key);
                self.tell_primings(parent, || Message::Executing { key: key.clone() });
            }
            Observation::Lookup(call) => self.answered(Answered::Lookup(call)),
            Observation::Execution(call) => self.answered(Answered::Execution(call)),
            Observation::Question { origin, key, reply } => {
                if self.has_action_parents(&key.instance) {
                    self.nested.ask(&origin, &key, false);
                }
                let (parent, build) = self.asked_by(&origin, &key);
                self.begin_asked(parent.clone(), build);
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

    /// The parent that a call about `key` belongs to if it is for no other action, and the number
    /// of its build.
    fn asked_by(&mut self, origin: &CallOrigin, key: &FlightKey) -> (ParentIdentity, u64) {
        let client = self.client_in_run(origin);
        let build = self.build_of(origin);
        let caller = client.as_ref().unwrap_or(&build.caller);
        let function = key.action.function();
        (caller.parent(&key.instance, function), build.number)
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
    fn tell_primings(&self, parent: ParentIdentity, message: impl Fn() -> Message) {
        let own = Group::Invocation(parent.weak_key());
        let open = self.nested.open().map(|(_, open)| &open.group);
        for group in open.chain([&own]) {
            if let Some(priming) = self.primings.get(group) {
                priming.tell(message());
            }
        }
    }

    /// The build that a call belongs to. If it is a new one, it is primed.
    fn build_of(&mut self, origin: &CallOrigin) -> &mut Build {
        let open = &self.open;
        let caller = self.callers.of(origin, |key| open.contains_key(key));
        if !self.open.contains_key(&caller.key) {
            let build = self.begin(caller.clone());
            self.open.insert(caller.key.clone(), build);
        }
        let (build, room) = (self.open.entry(caller.key.clone()), &self.room);
        // The entry is there; to look again is what the borrow checker wants.
        let build = build.or_insert_with(|| Build::new(0, caller, 0, room));
        build.last_call = Instant::now();
        build
    }

    /// Has a new build watched and primed.
    fn begin(&mut self, caller: Arc<Caller>) -> Build {
        self.builds += 1;
        let number = self.builds;
        tracing::debug!(build = caller.label(), "a build begins");
        if let BuildKey::Process(process) = &caller.key {
            self.watch(process, &caller.key);
        }
        let known = self.parents.values();
        let known = known.filter(|known| caller.works_on(&known.identity));
        let mut latest: Vec<&KnownParent> = known.filter(|one| self.is_latest(one)).collect();
        latest.sort_by_key(|known| std::cmp::Reverse(known.last_seen_unix_ms));
        latest.truncate(MAX_BEGUN);
        let keys: Vec<WeakKey> = latest.iter().map(|known| known.key).collect();
        let mut build = Build::new(number, caller, clock::now_unix_ms(), &self.room);
        for key in &keys {
            if let Some(early) = self.early.remove(key) {
                early.count_for(&mut build);
            }
        }
        if !self.callers.runs.leaves_alone(number) {
            for key in keys {
                self.priming_of(key).tell(Message::Begin(number));
            }
        }
        build
    }

    /// Whether a client that works on this parent hashes so, until a call says otherwise: it did
    /// last.
    fn is_latest(&self, known: &KnownParent) -> bool {
        let mut others = self.parents.values();
        !others.any(|other| other.is_rehashed(known))
    }

    /// The priming of an invocation, which is started if there is none.
    fn priming_of(&mut self, key: WeakKey) -> &Priming {
        let workshop = &self.workshop;
        let priming = self.primings.entry(Group::Invocation(key));
        priming.or_insert_with_key(|group| Priming::start(group, workshop.clone()))
    }

    /// Sources of these parents were saved: they are primed, unless they are being built, in which
    /// case calls tell what is needed.
    fn saved(&mut self, keys: &[WeakKey]) {
        for key in keys {
            let Some(known) = self.parents.get(key).filter(|known| self.is_latest(known)) else {
                continue;
            };
            let mut callers = self.open.values().map(|build| &build.caller);
            if callers.any(|caller| caller.works_on(&known.identity)) {
                continue;
            }
            tracing::debug!(parent = known.identity.label(), "a source file was saved");
            self.priming_of(*key).tell(Message::Saved);
        }
    }

    /// Has a build primed that asks for something of this parent, if that was not foreseen when it
    /// began; by what others have shared, if nothing is recorded here.
    fn begin_asked(&mut self, parent: ParentIdentity, build: u64) {
        let key = parent.weak_key();
        let is_recorded = self.parents.contains_key(&key);
        let others_may_know = self.workshop.sharing.is_some();
        if self.callers.runs.leaves_alone(build) || !is_recorded && !others_may_know {
            return;
        }
        if let Entry::Vacant(new) = self.primings.entry(Group::Invocation(key)) {
            let priming = Priming::start(new.key(), self.workshop.clone());
            if !is_recorded {
                priming.tell(Message::Unrecorded(Box::new(parent)));
            }
            priming.tell(Message::Begin(build));
            new.insert(priming);
        }
    }

    /// Has the end of a process end its build.
    fn watch(&self, process: &Process, key: &BuildKey) {
        let exited = self.exited.clone();
        let key = key.clone();
        match process.watch() {
            Ok(ended) => {
                task::spawn("build process", async move {
                    ended.wait().await;
                    // An engine that is gone ends its builds otherwise.
                    let _ = exited.send(key).await;
                });
            }
            Err(_) => {
                // It has ended already.
                let _ = exited.try_send(key);
            }
        }
    }

    /// Counts and keeps an answered call, as soon as it is known on whose behalf it was made.
    fn answered(&mut self, answered: Answered) {
        if let Some((answered, parent)) = self.nested.decide(answered) {
            self.attributed(answered, parent.as_ref());
        }
    }

    fn attributed(&mut self, answered: Answered, parent: Option<&FlightKey>) {
        match answered {
            Answered::Lookup(call) => self.lookup(call, parent),
            Answered::Execution(call) => self.execution(call, parent),
        }
    }

    /// The build on whose behalf a call was made.
    fn build_for(&mut self, origin: &CallOrigin, parent: Option<&FlightKey>) -> &mut Build {
        let key = parent.map(|parent| BuildKey::Action(parent.clone()));
        match key.filter(|key| self.open.contains_key(key)) {
            // The entry is there; to look again is what the borrow checker wants.
            Some(key) => {
                let caller = self.open[&key].caller.clone();
                let build = self.open.entry(key);
                let build = build.or_insert_with(|| Build::new(0, caller, 0, &self.room));
                build.last_call = Instant::now();
                build
            }
            None => self.build_of(origin),
        }
    }

    fn lookup(&mut self, call: Box<Call>, parent: Option<&FlightKey>) {
        const OK: u32 = tonic::Code::Ok as u32;
        const NOT_FOUND: u32 = tonic::Code::NotFound as u32;
        match call.answer.status {
            Some(OK) => {
                let result: Option<ActionResult> = call.answer.last_message();
                self.asked_for(call, result, parent);
            }
            Some(NOT_FOUND) => {
                let note = note(&call, None);
                self.build_for(&call.origin, parent).count(
                    &call.key,
                    Asked::Missed,
                    Duration::ZERO,
                    note,
                );
            }
            _ => {}
        }
    }

    fn execution(&mut self, call: Box<Call>, parent: Option<&FlightKey>) {
        let (result, ended) = match call.answer.executed() {
            Ok(result) => (Some(result), true),
            Err(NotExecuted { reason, may_go_on }) => {
                tracing::info!(action = %call.key.action, reason, "an execution ended without a result");
                (None, !may_go_on)
            }
        };
        if ended && self.nested.is_open(&call.key) {
            let succeeded = result.clone().filter(|result| result.exit_code == 0);
            self.end_parent(&call.key, succeeded.map(Arc::new));
        }
        if call.joined.is_none() {
            if let Some(result) = &result
                && !call.answer.is_cached()
                && let Some(executed) = Executed::of(result, call.began, call.ended)
            {
                self.workshop.flights.learn(executed);
            }
            let note = note(&call, result.as_ref());
            self.build_for(&call.origin, parent).count(
                &call.key,
                Asked::Missed,
                Duration::ZERO,
                note,
            );
        }
        self.asked_for(call, result, parent);
    }

    /// Counts an answered call and keeps the action for recording.
    fn asked_for(
        &mut self,
        call: Box<Call>,
        result: Option<ActionResult>,
        parent: Option<&FlightKey>,
    ) {
        let flights = self.workshop.flights.clone();
        let note = note(&call, result.as_ref());
        let client = match parent {
            None => self.client_in_run(&call.origin),
            Some(_) => None,
        };
        let build = self.build_for(&call.origin, parent);
        let executed = result.as_ref().and_then(execution_time).unwrap_or_default();
        let had_used = build.has_used();
        match call.joined {
            Some(waited) => {
                let saved = executed.saturating_sub(waited);
                build.count(&call.key, Asked::Joined, saved, note);
                flights.use_primed(&call.key, build.number);
                use_result(&flights, &call.key, note.answered_unix_ms);
            }
            None => match flights.use_primed(&call.key, build.number) {
                Some(primed) => {
                    let is_first = build.count(&call.key, Asked::Hit, primed.execution, note);
                    let lead = use_result(&flights, &call.key, note.began_unix_ms);
                    if let (Some(lead), true) = (lead, is_first) {
                        METERS.lead.add(lead);
                        build.leads.extend([lead]);
                    }
                }
                None => {
                    build.count(&call.key, Asked::Cached, Duration::ZERO, note);
                }
            },
        }
        let uses_first = !had_used && build.has_used();
        let caller = client.as_ref().unwrap_or(&build.caller).clone();
        let succeeded = result.filter(|result| result.exit_code == 0);
        let succeeded = succeeded.map(|mut result| {
            result.stdout_raw.clear();
            result.stderr_raw.clear();
            Arc::new(result)
        });
        if let Some(result) = &succeeded
            && build.subactions.len() < MAX_SUBACTIONS
        {
            build.keep(call.key.clone(), |order| Subaction {
                action: call.key.action,
                result: result.clone(),
                order,
                working_directory: caller.working_directory.clone(),
                file_system_root: caller.file_system_root.clone(),
            });
            self.callers.runs.keep(&caller, &call.key);
        }
        if uses_first {
            self.tell_priming(&caller, &call.key, parent, || Message::Used);
        }
        if let Some(result) = succeeded
            && call.joined.is_none()
        {
            let key = call.key.clone();
            let observed = || Message::Observed { key, result };
            self.tell_priming(&caller, &call.key, parent, observed);
        }
    }

    /// Tells the priming of those on whose behalf `key` was asked for.
    fn tell_priming(
        &self,
        caller: &Caller,
        key: &FlightKey,
        parent: Option<&FlightKey>,
        message: impl FnOnce() -> Message,
    ) {
        if self.primings.is_empty() {
            return;
        }
        let group = match parent.and_then(|parent| self.nested.group(parent)) {
            Some(group) => group.clone(),
            None => {
                let function = key.action.function();
                Group::Invocation(caller.parent(&key.instance, function).weak_key())
            }
        };
        if let Some(priming) = self.primings.get(&group) {
            priming.tell(message());
        }
    }

    fn found(&mut self, found: Found) {
        match found {
            Found::Parent(parent) => self.open_parent(*parent),
            Found::Nested { key, parent } => {
                for answered in self.nested.attribute(key, parent.clone()) {
                    self.attributed(answered, parent.as_ref());
                }
            }
            Found::Completing { parent, reply } => {
                if let Some(build) = self.open.get(&BuildKey::Action(parent.clone())) {
                    self.subactions.set(parent, build.subactions_in_order());
                }
                drop(reply);
            }
            Found::Ended { parent, outputs } => self.close_parent(&parent, outputs),
        }
    }

    /// Whether any action parent is recorded that is executed under `instance`.
    fn has_action_parents(&self, instance: &str) -> bool {
        let mut identities = self.parents.values().map(|known| &known.identity);
        identities.any(|identity| {
            matches!(&identity.kind, ParentKind::Action(action) if *action.instance == *instance)
        })
    }

    /// An action parent has been asked for: it is primed with all that depends on it. If it is
    /// executed, its build begins.
    fn open_parent(&mut self, found: FoundParent) {
        let FoundParent {
            origin,
            key,
            executes,
            identity,
            input_root,
            texts,
        } = found;
        let build = self.build_of(&origin);
        let (caller, by) = (build.caller.clone(), build.number);
        let caller = Arc::new(caller.nested_in(key.clone(), identity.clone()));
        let asked = caller.parent(&identity.instance, key.action.function());
        let family = Family::of(&identity, caller.uid, &self.parents);
        let group = Group::Actions {
            instance: identity.instance.clone(),
            digest_function: key.action.function(),
            uid: caller.uid,
        };
        let mut number = None;
        let build_key = caller.key.clone();
        if executes && !self.open.contains_key(&build_key) {
            self.builds += 1;
            number = Some(self.builds);
            let now = clock::now_unix_ms();
            let mut build = Build::new(self.builds, caller, now, &self.room);
            for early in family.keys.iter().filter_map(|key| self.early.remove(key)) {
                early.count_for(&mut build);
            }
            self.open.insert(build_key, build);
            let open = OpenParent {
                _completing: self.subactions.begin(key.clone()),
                group: group.clone(),
                asked: asked.clone(),
                keys: family.keys.iter().chain(&family.earlier).copied().collect(),
                executed: ExecutedParent {
                    action: key.action,
                    input_root,
                    texts: texts.clone(),
                    outputs: Outputs::new(),
                },
            };
            self.nested.begin(key, open);
        }
        let workshop = &self.workshop;
        let others_may_know = family.keys.is_empty() && workshop.sharing.is_some();
        if self.callers.runs.leaves_alone(by) || family.is_empty() && !others_may_know {
            return;
        }
        self.primings
            .entry(group)
            .or_insert_with_key(|group| Priming::start(group, workshop.clone()))
            .tell(Message::Opened(Opened {
                current: CurrentParent {
                    input_root,
                    texts: texts.into(),
                    outputs: None,
                },
                family,
                build: number,
                unrecorded: others_may_know.then_some(asked),
            }));
    }

    /// An action parent has ended. What was asked on its behalf before is looked at first.
    fn end_parent(&mut self, parent: &FlightKey, result: Option<Arc<ActionResult>>) {
        if !self.nested.end(parent, result) {
            self.close_parent(parent, None);
        }
    }

    fn close_parent(&mut self, parent: &FlightKey, outputs: Option<Arc<Outputs>>) {
        let (closed, rest) = self.nested.close(parent);
        for answered in rest {
            self.attributed(answered, None);
        }
        let Some(mut closed) = closed else { return };
        if let (Some(outputs), Some(priming)) = (&outputs, self.primings.get(&closed.group)) {
            priming.tell(Message::Closed {
                asked: closed.asked,
                keys: closed.keys,
                outputs: outputs.clone(),
            });
        }
        // What failed may have run only some of its actions: nothing is learned from it.
        let executed = outputs.map(|outputs| {
            closed.executed.outputs.clone_from(&outputs);
            Arc::new(closed.executed)
        });
        self.close_with(&BuildKey::Action(parent.clone()), executed);
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

    /// Ends a build: what is queued for it is withdrawn, and it is recorded.
    fn close(&mut self, key: &BuildKey) {
        match key {
            BuildKey::Action(parent) => self.end_parent(&parent.clone(), None),
            _ => self.close_with(key, None),
        }
    }

    fn close_with(&mut self, key: &BuildKey, executed: Option<Arc<ExecutedParent>>) {
        let Some(mut build) = self.open.remove(key) else {
            return;
        };
        self.callers.forget_build(key);
        tracing::debug!(build = build.caller.label(), "a build has ended");
        let (subactions, journal) = build.end(clock::now_unix_ms());
        let (known, open) = (&self.parents, &self.open);
        self.primings.retain(|group, _| match group {
            // Others may be primed before they are built.
            Group::Invocation(key) => known.get(key).is_some_and(|known| {
                let mut callers = open.values().map(|build| &build.caller);
                !build.caller.works_on(&known.identity)
                    || callers.any(|caller| caller.works_on(&known.identity))
            }),
            // Action parents come and go below whoever executes them, and what depends on one that
            // has ended may be asked for much later. There is one for each user and instance.
            Group::Actions { .. } => true,
        });
        let is_nested = matches!(key, BuildKey::Action(_));
        let mut executed = executed.map(|executed| (executed, self.action_parents(&build.caller)));
        let is_run = matches!(key, BuildKey::Run(_));
        for (caller, subactions) in self.callers.runs.close(&build.caller, subactions) {
            let worth_recording = match is_nested {
                true => executed.is_some(),
                false => !subactions.is_empty(),
            };
            if !self.mode.records() || !worth_recording {
                continue;
            }
            let activity = self.workshop.activities.begin();
            let ended = recorder::Message::Ended(Box::new(Ended {
                id: build.id.clone(),
                number: build.number,
                caller,
                subactions,
                executed: executed.take(),
                instances: self.instances(&build.caller),
                activity,
            }));
            if self.recorder.try_send(ended).is_err() {
                tracing::warn!("a build was not recorded: too many wait to be");
            }
        }
        if build.has_asked() || is_nested || is_run {
            let journal = Arc::new(journal);
            if build.has_asked() {
                self.judge_predictions(journal.clone());
            }
            let is_in_flight = journal.is_in_flight();
            self.keep_journal(build.status(), journal.clone(), !is_in_flight);
            if is_in_flight {
                self.unsettled.push((build.number, journal));
            }
            if self.unsettled.len() > MAX_UNSETTLED {
                self.unsettled.remove(0);
            }
            self.closed.push_front(build);
            self.closed.truncate(REMEMBERED_BUILDS);
        }
    }

    /// Has it counted which of the predictions for a build that has ended were of use.
    fn judge_predictions(&self, journal: Arc<Journal>) {
        let uses = self.workshop.uses.clone();
        let activity = self.workshop.activities.begin();
        task::spawn("uses of predictions", async move {
            task::blocking("uses of predictions", move || uses.end_build(&journal)).await;
            drop(activity);
        });
    }

    /// Has the journal of a build that has ended kept.
    fn keep_journal(&self, build: BuildStatus, journal: Arc<Journal>, is_final: bool) {
        let fresh = Fresh { build, journal };
        let activity = self.workshop.activities.begin();
        self.workshop.journals.announce(fresh.clone());
        let keep = recorder::Message::Journal {
            fresh: Box::new(fresh),
            is_final,
            activity,
        };
        if self.recorder.try_send(keep).is_err() {
            tracing::warn!("the journal of a build is not written: too many wait to be");
        }
    }

    /// Has journals kept as they are when nothing is in flight any more.
    fn settle_journals(&mut self) {
        let settled = self
            .unsettled
            .extract_if(.., |(_, journal)| !journal.is_in_flight());
        for (number, journal) in settled.collect::<Vec<_>>() {
            let build = self.closed.iter_mut().find(|build| build.number == number);
            if let Some(build) = build {
                build.wasted = journal.wasted();
                let status = build.status();
                self.keep_journal(status, journal, true);
            }
        }
    }

    /// The builds that are known, newest first.
    fn builds(&self) -> Vec<&Build> {
        let all = self.open.values().chain(&self.closed);
        let shown = |build: &&Build| {
            let is_invocation = !matches!(build.caller.key, BuildKey::Action(_) | BuildKey::Run(_));
            build.has_asked() || !is_invocation
        };
        let mut builds: Vec<&Build> = all.filter(shown).collect();
        builds.sort_by_key(|build| std::cmp::Reverse(build.number));
        builds
    }

    /// The same, and those of earlier runs of the daemon.
    fn all_builds(&self) -> Vec<BuildStatus> {
        let mut builds: Vec<BuildStatus> = self.builds().into_iter().map(Build::status).collect();
        let mut kept = self.workshop.journals.list();
        kept.retain(|kept| !builds.iter().any(|known| known.id == kept.id));
        builds.extend(kept);
        builds
    }

    /// The journals of all builds; of those that are open, the ones whose ids begin with `prefix`.
    fn library(&self, prefix: &str) -> Library {
        let open = self.open.values();
        let open = open.filter(|build| build.id.starts_with(prefix));
        let open = open.map(|build| {
            let fresh = Fresh {
                build: build.status(),
                journal: Arc::new(build.journal.clone()),
            };
            (build.id.clone(), fresh)
        });
        Library {
            open: open.collect(),
            builds: self.all_builds(),
            workshop: self.workshop.clone(),
        }
    }

    /// The recorded action parents that `caller`'s may depend on.
    fn action_parents(&self, caller: &Caller) -> Vec<WeakKey> {
        let known = self.parents.values();
        let of_its_kind = known.filter(|known| match (&known.identity.kind, &caller.action) {
            (ParentKind::Action(action), Some(own)) => {
                known.identity.uid == caller.uid
                    && action.instance == own.instance
                    && action.key.function() == own.key.function()
                    && action.name != own.name
            }
            _ => false,
        });
        of_its_kind.map(|known| known.key).collect()
    }

    /// The instances under which actions of an action parent are recorded.
    fn instances(&self, caller: &Caller) -> Vec<Arc<str>> {
        let known = self.parents.values().map(|known| &known.identity);
        let recorded = known.filter(|identity| match (&identity.kind, &caller.action) {
            (ParentKind::Action(action), Some(own)) => identity.uid == caller.uid && action == own,
            _ => false,
        });
        recorded.map(|identity| identity.instance.clone()).collect()
    }

    /// Ends the builds that belong to no build tool and have been silent for long enough.
    fn close_silent(&mut self) {
        let now = Instant::now();
        let flights = self.workshop.flights.clone();
        let silent: Vec<BuildKey> = self
            .open
            .iter()
            .filter(|(_, build)| {
                build.caller.ends_by_silence && now - build.last_call >= QUIET_TIME
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in silent {
            let busy = match &key {
                BuildKey::Action(parent) => flights.is_executed_by_client(parent),
                _ => flights.has_client_executions(),
            };
            if busy {
                if let Some(build) = self.open.get_mut(&key) {
                    build.last_call = now;
                }
            } else {
                self.close(&key);
            }
        }
    }

    fn next_quiet(&self) -> Instant {
        let by_calls = self
            .open
            .values()
            .filter(|build| build.caller.ends_by_silence);
        let next = by_calls.map(|build| build.last_call + QUIET_TIME).min();
        next.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600))
    }

    fn answer(&mut self, request: Request) {
        match request {
            Request::Status(reply) => {
                let records = self.workshop.store.counts().unwrap_or_default();
                let builds = self.builds();
                let mut leads = Leads::default();
                builds.iter().for_each(|build| leads.merge(&build.leads));
                let builds: Vec<BuildStatus> = builds.into_iter().map(Build::status).collect();
                let (journals, journal_bytes) = self.workshop.journals.size();
                let observations = self.observations.upgrade();
                let waiting = |all: usize, free: usize| (all - free) as u64;
                let status = Status {
                    records,
                    watched_directories: self.watching.as_ref().map(Watching::directories),
                    open_builds: self.open.len() as u64,
                    queued_observations: observations
                        .map_or(0, |it| waiting(it.max_capacity(), it.capacity())),
                    queued_recordings: waiting(
                        self.recorder.max_capacity(),
                        self.recorder.capacity(),
                    ),
                    journals,
                    journal_bytes,
                    unadaptable: self.workshop.unadaptable.load(Ordering::Relaxed),
                    totals: Totals::of(&builds, &leads),
                    builds,
                };
                // Whoever asked may have gone.
                let _ = reply.send(status);
            }
            Request::Builds(reply) => {
                // Whoever asked may have gone.
                let _ = reply.send(self.all_builds());
            }
            Request::Journal(prefix, reply) => {
                let library = self.library(&prefix);
                task::spawn("journal", async move {
                    // Whoever asked may have gone.
                    let _ = reply.send(library.find(&prefix).await);
                });
            }
            Request::Explain(question, reply) => {
                let library = self.library(question.build.as_deref().unwrap_or_default());
                task::spawn("explanation", async move {
                    // Whoever asked may have gone.
                    let _ = reply.send(explain(&library, &question).await);
                });
            }
            Request::Run(request) => self.answer_run(request),
            Request::Records(request) => {
                archive::dispatch(request, &self.workshop, &self.recorder);
            }
            Request::Wait(reply) => {
                self.close_exited();
                self.waiting.push(reply);
            }
            Request::Finish(reply) => {
                let open: Vec<BuildKey> = self.open.keys().cloned().collect();
                for key in open {
                    self.close(&key);
                }
                // Dropping the reply answers it: nothing more will be recorded.
                let _ = self.recorder.try_send(recorder::Message::Flush(reply));
            }
        }
    }

    fn answer_run(&mut self, request: runs::Request) {
        // Whoever asked may have gone.
        match request {
            runs::Request::Open(run, reply) => drop(reply.send(self.open_run(run))),
            runs::Request::Look(id, reply) => {
                let build = self.open.get_mut(&BuildKey::Run(id.into()));
                let status = build.map(|build| {
                    build.last_call = Instant::now();
                    build.status()
                });
                drop(reply.send(status));
            }
            runs::Request::Close(id, reply) => {
                let key = BuildKey::Run(id.into());
                let is_open = self.open.contains_key(&key);
                self.close(&key);
                let closed = self.closed.front().filter(|_| is_open);
                drop(reply.send(closed.map(Build::status)));
            }
        }
    }

    /// Opens a run, and has it primed before its command has begun.
    fn open_run(&mut self, run: OpenRun) -> OpenedRun {
        let caller = self.callers.runs.open(run, self.builds + 1);
        let mut build = self.begin(Arc::new(caller));
        if let BuildKey::Run(id) = &build.caller.key {
            build.id = id.to_string();
        }
        let (reply, planned) = oneshot::channel();
        let reply = Arc::new(reply);
        let groups = self.primings.iter();
        for (_, priming) in groups.filter(|(group, _)| match group {
            Group::Invocation(key) => self
                .parents
                .get(key)
                .is_some_and(|known| build.caller.works_on(&known.identity)),
            Group::Actions { .. } => false,
        }) {
            priming.tell(Message::Settled {
                _reply: reply.clone(),
            });
        }
        let opened = OpenedRun {
            id: build.id.clone(),
            planned,
            keeps_records: self.workshop.store.is_on_disk(),
        };
        self.open.insert(build.caller.key.clone(), build);
        opened
    }

    /// Ends the builds whose process is gone, without waiting to be told.
    fn close_exited(&mut self) {
        let gone =
            |key: &&BuildKey| matches!(key, BuildKey::Process(process) if !process.is_alive());
        let exited: Vec<BuildKey> = self.open.keys().filter(gone).cloned().collect();
        for key in exited {
            self.close(&key);
        }
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

    fn answer_waiting(&mut self) {
        self.waiting.retain(|reply| !reply.is_closed());
        let counts = self.workshop.flights.counts();
        // Who waits may be part of a run, which ends later.
        let mut open = self.open.keys();
        let quiet = open.all(|key| matches!(key, BuildKey::Run(_)))
            && self.workshop.activities.is_quiet()
            && counts.queued + counts.running == 0;
        if quiet {
            for reply in self.waiting.drain(..) {
                let _ = reply.send(());
            }
        }
    }
}

/// What the journal notes of a call. Its times are those of the monotonic clock; what has passed since
/// then is deducted from now.
fn note(call: &Call, result: Option<&ActionResult>) -> Note {
    let (now, now_unix_ms) = (Instant::now(), clock::now_unix_ms());
    let before = |time: Instant| {
        let passed = now.saturating_duration_since(time).as_millis();
        now_unix_ms - i64::try_from(passed).unwrap_or(0)
    };
    Note {
        began_unix_ms: before(call.began),
        answered_unix_ms: before(call.ended),
        executed: result.and_then(execution_time).unwrap_or_default(),
    }
}

/// Notes the use of a result that a flight has brought. Returns how long it had been there.
fn use_result(flights: &Flights, key: &FlightKey, now_unix_ms: i64) -> Option<Duration> {
    let record = flights.record(key)?;
    Some(record.used(now_unix_ms))
}
