//! The engine: one task that takes in what the proxy saw, attributes it to builds, and tells the
//! others what to do. It never waits for anybody: what it cannot hand over at once it gives up.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore, mpsc, oneshot};

use super::activity::{Activities, Activity};
use super::archive;
use super::attribution::{Attributor, Found, FoundParent};
pub use super::builds::BuildStatus;
use super::builds::{Asked, Build};
use super::callers::{BuildKey, Caller, Callers};
use super::flights::{FlightKey, Flights};
use super::known::CurrentParent;
use super::nested::{Answered, Nested, OpenParent};
use super::observation::{Call, CallOrigin, Observation};
use super::operations::operations;
use super::parent::{ExecutedParent, ParentIdentity, ParentKind, WeakKey};
use super::priming::{Family, Group, Message, Opened, Priming};
use super::record::{Subaction, execution_time};
use super::recorder::{self, Ended, Recorded};
use super::schedule::Outputs;
use super::share::Sharing;
use super::store::{KnownParent, RecordCounts, Store};
use super::subactions::{self, Subactions};
use super::workshop::{Primed, Workshop};
use super::{Engine, TAP_MEMORY_KIB, lane};
use crate::backend::Backend;
use crate::cas::directories::DirectoryCache;
use crate::cas::transfer::Cas;
use crate::clock;
use crate::config::Mode;
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
    /// Builds, newest first.
    pub builds: Vec<BuildStatus>,
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
    /// Whether they are shared with others.
    pub share: bool,
}

/// The receiving end of an `Engine`, to be run by one task.
pub struct Runner {
    observations: mpsc::Receiver<Observation>,
    /// Ends a rest.
    urgent: Arc<Notify>,
    requests: mpsc::Receiver<Request>,
    state: State,
    primed: mpsc::Receiver<Primed>,
    recorded: mpsc::Receiver<Recorded>,
    exits: mpsc::Receiver<BuildKey>,
    found: mpsc::Receiver<(Found, Activity)>,
}

/// Makes an engine: the proxy's handle, a way to ask it things, and the task to run. Call it on
/// the runtime that will run it.
pub fn engine(parts: EngineParts) -> (Engine, mpsc::Sender<Request>, Runner) {
    let (observed, observations) = mpsc::channel(OBSERVATIONS);
    let (asked, requests) = mpsc::channel(NOTES);
    let (recorder, to_record) = mpsc::channel(NOTES);
    let (records, recorded) = mpsc::channel(NOTES);
    let (primed, primings) = mpsc::channel(NOTES);
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
        sharing: parts.share.then(|| Arc::new(Sharing::new(&recorder))),
        activities: Activities::default(),
        unadaptable: Arc::default(),
        primed,
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
    let (filled, store) = (subactions.clone(), parts.store);
    // In the background: there may be many, and nobody waits for them.
    task::spawn("recorded subactions", async move {
        task::blocking("recorded subactions", move || filled.fill(&store, actions)).await;
    });
    let (attributor, found) = Attributor::start(workshop.clone());
    let dropped = Arc::new(AtomicU64::new(0));
    let engine = Engine {
        observations: observed,
        flights: parts.flights,
        subactions,
        operations: operations(),
        hidden_hits: Arc::default(),
        backend: parts.backend,
        dropped: dropped.clone(),
        memory: Arc::new(Semaphore::new(TAP_MEMORY_KIB)),
        urgent: Arc::default(),
        latest_process: Arc::default(),
    };
    let runner = Runner {
        observations,
        urgent: engine.urgent.clone(),
        requests,
        primed: primings,
        recorded,
        exits,
        found,
        state: State {
            mode: parts.mode,
            workshop,
            parents,
            callers: Callers::new(),
            open: HashMap::new(),
            closed: VecDeque::new(),
            primings: HashMap::new(),
            nested: Nested::new(attributor),
            subactions: engine.subactions.clone(),
            early: HashMap::new(),
            waiting: Vec::new(),
            recorder,
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
    open: HashMap<BuildKey, Build>,
    closed: VecDeque<Build>,
    /// Parents of open builds that are being primed, and action parents of late.
    primings: HashMap<Group, Priming>,
    /// Action parents that are open.
    nested: Nested,
    /// What they, and those before them, have run.
    subactions: Arc<Subactions>,
    /// How many results were primed for action parents before they began.
    early: HashMap<WeakKey, u64>,
    /// Those who wait for quiet.
    waiting: Vec<oneshot::Sender<()>>,
    recorder: mpsc::Sender<recorder::Message>,
    exited: mpsc::Sender<BuildKey>,
    builds: u64,
    /// Observations that were dropped, and how many of them the log knows of.
    dropped: Arc<AtomicU64>,
    reported: u64,
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
                Some(primed) = self.primed.recv() => guarded(|| self.state.count_primed(primed)),
                Some(recorded) = self.recorded.recv() => guarded(|| self.state.recorded(recorded)),
                Some((found, _activity)) = self.found.recv() => guarded(|| self.state.found(found)),
                Some(key) = self.exits.recv() => guarded(|| self.state.close(&key)),
                Some(request) = self.requests.recv() => guarded(|| self.state.answer(request)),
                () = activities.ended() => {}
                () = tokio::time::sleep_until(quiet_at.into()) => {
                    guarded(|| self.state.close_silent());
                }
            }
            let drained =
                self.observations.is_empty() && self.primed.is_empty() && self.recorded.is_empty();
            if drained {
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
        let build = self.build_of(origin);
        let function = key.action.function();
        (build.caller.parent(&key.instance, function), build.number)
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
            self.begin(&caller);
        }
        let number = self.builds;
        let build = match self.open.entry(caller.key.clone()) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(new) => new.insert(Build::new(number, caller, clock::now_unix_ms())),
        };
        build.last_call = Instant::now();
        build
    }

    /// Has a new build watched and primed.
    fn begin(&mut self, caller: &Caller) {
        self.builds += 1;
        let number = self.builds;
        tracing::debug!(build = caller.label(), "a build begins");
        if let BuildKey::Process(process) = &caller.key {
            self.watch(process, &caller.key);
        }
        let known = self.parents.values();
        let known = known.filter(|known| caller.works_on(&known.identity));
        // Until a call says otherwise, the client hashes as it did last.
        let latest = known.clone().filter(|one| {
            let mut others = known.clone();
            !others.any(|other| other.is_rehashed(one))
        });
        for known in latest {
            let workshop = &self.workshop;
            self.primings
                .entry(Group::Invocation(known.key))
                .or_insert_with_key(|group| Priming::start(group, workshop.clone()))
                .tell(Message::Begin(number));
        }
    }

    /// Has a build primed that asks for something of this parent, if that was not foreseen when it
    /// began; by what others have shared, if nothing is recorded here.
    fn begin_asked(&mut self, parent: ParentIdentity, build: u64) {
        let key = parent.weak_key();
        let is_recorded = self.parents.contains_key(&key);
        if self.workshop.sharing.is_none() && !is_recorded {
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
                let build = build.or_insert_with(|| Build::new(0, caller, 0));
                build.last_call = Instant::now();
                build
            }
            None => self.build_of(origin),
        }
    }

    fn lookup(&mut self, call: Call, parent: Option<&FlightKey>) {
        const OK: u32 = tonic::Code::Ok as u32;
        const NOT_FOUND: u32 = tonic::Code::NotFound as u32;
        match call.answer.status {
            Some(OK) => {
                let result: Option<ActionResult> = call.answer.last_message();
                self.asked_for(call, result, parent);
            }
            Some(NOT_FOUND) => {
                self.build_for(&call.origin, parent).count(
                    &call.key,
                    Asked::Missed,
                    Duration::ZERO,
                );
            }
            _ => {}
        }
    }

    fn execution(&mut self, call: Call, parent: Option<&FlightKey>) {
        let result = match call.executed() {
            Ok(result) => Some(result),
            Err(reason) => {
                tracing::info!(action = %call.key.action, reason, "an execution ended without a result");
                None
            }
        };
        // Whoever has lost the stream may go on waiting for the operation.
        if self.nested.is_open(&call.key) && !call.answer.is_cut_off() {
            let succeeded = result.clone().filter(|result| result.exit_code == 0);
            self.end_parent(&call.key, succeeded.map(Arc::new));
        }
        if call.joined.is_none() {
            self.build_for(&call.origin, parent)
                .count(&call.key, Asked::Missed, Duration::ZERO);
        }
        self.asked_for(call, result, parent);
    }

    /// Counts an answered call and keeps the action for recording.
    fn asked_for(&mut self, call: Call, result: Option<ActionResult>, parent: Option<&FlightKey>) {
        let flights = self.workshop.flights.clone();
        let build = self.build_for(&call.origin, parent);
        let executed = result.as_ref().and_then(execution_time).unwrap_or_default();
        match call.joined {
            Some(waited) => {
                build.count(&call.key, Asked::Joined, executed.saturating_sub(waited));
                flights.use_primed(&call.key, build.number);
            }
            None => match flights.use_primed(&call.key, build.number) {
                Some(primed) => build.count(&call.key, Asked::Hit, primed.execution),
                None => build.count(&call.key, Asked::Cached, Duration::ZERO),
            },
        }
        let Some(mut result) = result.filter(|result| result.exit_code == 0) else {
            return;
        };
        result.stdout_raw.clear();
        result.stderr_raw.clear();
        let result = Arc::new(result);
        let caller = build.caller.clone();
        if build.subactions.len() < MAX_SUBACTIONS {
            build.keep(call.key.clone(), |order| Subaction {
                action: call.key.action,
                result: result.clone(),
                order,
                working_directory: caller.working_directory.clone(),
                file_system_root: caller.file_system_root.clone(),
            });
        }
        if call.joined.is_none() {
            let group = match parent.and_then(|parent| self.nested.group(parent)) {
                Some(group) => group.clone(),
                None => {
                    let function = call.key.action.function();
                    Group::Invocation(caller.parent(&call.key.instance, function).weak_key())
                }
            };
            if let Some(priming) = self.primings.get(&group) {
                let key = call.key;
                priming.tell(Message::Observed { key, result });
            }
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
        let caller = self.build_of(&origin).caller.clone();
        let caller = caller.nested_in(key.clone(), identity.clone());
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
            let mut build = Build::new(self.builds, caller, clock::now_unix_ms());
            build.primed = family
                .keys
                .iter()
                .filter_map(|key| self.early.remove(key))
                .sum();
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
        if family.is_empty() && !others_may_know {
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

    fn count_primed(&mut self, primed: Primed) {
        let mut builds = self.open.values_mut().chain(&mut self.closed);
        match builds.find(|build| Some(build.number) == primed.build) {
            Some(build) => build.primed += 1,
            None => *self.early.entry(primed.parent).or_default() += 1,
        }
    }

    fn recorded(&mut self, recorded: Recorded) {
        for key in &recorded.dropped {
            self.parents.remove(key);
        }
        let key = recorded.parent.identity.weak_key();
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
        let subactions = build.end(clock::now_unix_ms());
        let (known, open) = (&self.parents, &self.open);
        self.primings.retain(|group, _| match group {
            Group::Invocation(key) => known.get(key).is_some_and(|known| {
                let mut callers = open.values().map(|build| &build.caller);
                callers.any(|caller| caller.works_on(&known.identity))
            }),
            Group::Actions { .. } => true,
        });
        let is_nested = matches!(key, BuildKey::Action(_));
        let executed = executed.map(|executed| (executed, self.action_parents(&build.caller)));
        let worth_recording = match is_nested {
            true => executed.is_some(),
            false => !subactions.is_empty(),
        };
        if self.mode.records() && worth_recording {
            let activity = self.workshop.activities.begin();
            let ended = recorder::Message::Ended(Box::new(Ended {
                caller: build.caller.clone(),
                subactions,
                executed,
                instances: self.instances(&build.caller),
                activity,
            }));
            if self.recorder.try_send(ended).is_err() {
                tracing::warn!("a build was not recorded: too many wait to be");
            }
        }
        if build.has_asked() || is_nested {
            self.closed.push_front(build);
            self.closed.truncate(REMEMBERED_BUILDS);
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
                let all = self.open.values().chain(&self.closed);
                let shown = |build: &&Build| build.has_asked() || build.caller.action.is_some();
                let mut builds: Vec<&Build> = all.filter(shown).collect();
                builds.sort_by_key(|build| std::cmp::Reverse(build.number));
                let status = Status {
                    records,
                    unadaptable: self.workshop.unadaptable.load(Ordering::Relaxed),
                    builds: builds.into_iter().map(Build::status).collect(),
                };
                // Whoever asked may have gone.
                let _ = reply.send(status);
            }
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
        let quiet = self.open.is_empty()
            && self.workshop.activities.is_quiet()
            && counts.queued + counts.running == 0;
        if quiet {
            for reply in self.waiting.drain(..) {
                let _ = reply.send(());
            }
        }
    }
}
