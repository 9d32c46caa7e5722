//! Parents being primed: while builds of them run, a task of its own finds out what is known now,
//! adapts the recorded actions to it, uploads what they need and queues them.
//!
//! An invocation is primed by itself, from what its workspace holds. Action parents are primed
//! together, for what one is being built from, another will be built from next: those that have
//! been asked for, and those that depend on them.
//!
//! Messages are dealt with one after the other. A question is answered when all that came before
//! it is settled, so "is this digest in flight?" has its answer by then.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use super::activity::{Activities, Activity};
use super::budgets::{Reservation, Spender};
use super::flights::{FlightKey, Landing, Outcome, ending};
use super::journal::Planned;
use super::journal_page::Trigger;
use super::known::{CurrentParent, Known};
use super::parent::{ActionParent, Parent, ParentIdentity, ParentKind, WeakKey, action_parts};
use super::prepare::{self, Job, Queue};
use super::record::{execution_time, output_files};
use super::relatives::{self, Dependents, SharedFamily};
use super::schedule::{Outputs, Plan, Ready, Results};
use super::share::{self, Obtained};
use super::shelf::MAX_SHARED;
use super::store::KnownParent;
use super::subject::{PlannedParent, Share, Subject};
use super::trust::Trust;
use super::verdict::{LeftOut, Outlook, Verdict};
use super::workshop::{Beneficiary, News, Workshop};
use super::worth::Worth;
use crate::cas::{Digest, DigestFunction};
use crate::clock;
use crate::meters::METERS;
use crate::reapi::ActionResult;
use crate::task;

/// Messages that may wait for a priming that is busy.
const MAILBOX: usize = 16 * 1024;
/// Landings that may wait for it.
const LANDINGS: usize = 1024;
/// Recorded forms of one action that what a client executes is compared with.
const MAX_BASES: usize = 16;
/// To plan for what was learned may take half of the time, but for plans that take no longer.
const SHORT_PLANNING: Duration = Duration::from_millis(50);
/// How long shared records of dependents are looked for.
const MAX_WALK: Duration = Duration::from_secs(60);
/// Looking at the workspace again for a miss may take this part of the time: one tenth.
const SCAN_SHARE: u32 = 10;

/// A handle on a priming. When it is dropped, what is queued is withdrawn.
pub struct Priming {
    mailbox: mpsc::Sender<(Message, Activity)>,
    activities: Activities,
}

/// What is primed together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Group {
    /// An invocation parent.
    Invocation(WeakKey),
    /// The action parents that one user executes under one instance and digest function.
    Actions {
        /// The instance.
        instance: Arc<str>,
        /// The digest function.
        digest_function: DigestFunction,
        /// The user.
        uid: Option<u32>,
    },
}

/// What a priming is told.
pub enum Message {
    /// A build of an invocation has begun, or an earlier one found something else than expected:
    /// look at the workspace. The number names the build that speculative work is done for.
    Begin(u64),
    /// A source file was saved, and no build has begun: look at the workspace.
    Saved,
    /// An invocation of which nothing is recorded here asks: others may have shared it. Comes
    /// before whatever begins its priming.
    Unrecorded(Box<ParentIdentity>),
    /// An action parent has been asked for.
    Opened(Opened),
    /// What others have shared of parents that depend on one that has been asked for.
    Dependents(Vec<Arc<Parent>>),
    /// An action parent has ended with this output.
    Closed {
        /// As what it was asked for.
        asked: ParentIdentity,
        /// What it is recorded under.
        keys: Vec<WeakKey>,
        /// The files that it wrote, sorted by path.
        outputs: Arc<Outputs>,
    },
    /// A client's lookup found nothing. `reply` is dropped when the plan is settled; it is closed
    /// when all who were asked have done so.
    Question {
        /// What was looked up.
        key: FlightKey,
        /// When.
        asked: Instant,
        /// Closed for an answer.
        reply: Arc<oneshot::Sender<()>>,
    },
    /// Dropped when all that came before it is settled.
    Settled {
        /// Shared by all who are told.
        _reply: Arc<oneshot::Sender<()>>,
    },
    /// A client executes this action itself; what that needs is in the CAS.
    Executing {
        /// The action.
        key: FlightKey,
    },
    /// The records of an invocation were replaced.
    Records(Arc<Parent>),
    /// The build has used something of what was primed, for the first time.
    Used,
    /// A client has a result that primed did not bring it.
    Observed {
        /// Of this action.
        key: FlightKey,
        /// With exit code 0.
        result: Arc<ActionResult>,
    },
}

/// An action parent that has been asked for.
pub struct Opened {
    /// Which records it concerns.
    pub family: Family,
    /// What it is now.
    pub current: CurrentParent,
    /// Names the build that speculative work is done for, if it has begun.
    pub build: Option<u64>,
    /// As what it has been asked for, if none of its own records are here and others may have
    /// shared theirs.
    pub unrecorded: Option<ParentIdentity>,
}

/// What is recorded of an action parent, and of those that have to do with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Family {
    /// Its own records: one for each instance that its command executes under.
    pub keys: Vec<WeakKey>,
    /// Others of its name: what it was before its command changed.
    pub earlier: Vec<WeakKey>,
    /// Those that depend on it, directly or not.
    pub dependents: Vec<WeakKey>,
    /// Those that it, or one of its dependents, depends on.
    pub dependencies: Vec<WeakKey>,
}

impl Family {
    /// The family of the action parent `action` of the user `uid`.
    pub fn of(
        action: &ActionParent,
        uid: Option<u32>,
        parents: &HashMap<WeakKey, KnownParent>,
    ) -> Self {
        let mut family = Family::default();
        for known in parents.values().filter(|known| known.identity.uid == uid) {
            match &known.identity.kind {
                ParentKind::Action(other)
                    if other.instance != action.instance
                        || other.key.function() != action.key.function() => {}
                ParentKind::Action(other) if other.key == action.key => {
                    family.keys.push(known.key);
                }
                ParentKind::Action(other) if other.name == action.name => {
                    family.earlier.push(known.key);
                }
                _ => {}
            }
        }
        let mut reached: HashSet<WeakKey> = family.own().collect();
        loop {
            let depends = |known: &&KnownParent| {
                !reached.contains(&known.key) && !known.dependencies.is_disjoint(&reached)
            };
            let more: Vec<WeakKey> = parents.values().filter(depends).map(|k| k.key).collect();
            if more.is_empty() {
                break;
            }
            reached.extend(&more);
            family.dependents.extend(more);
        }
        let whole = family.keys.iter().chain(&family.dependents);
        let dependencies = whole.filter_map(|key| Some(&parents.get(key)?.dependencies));
        let dependencies: HashSet<WeakKey> = dependencies.flatten().copied().collect();
        family.dependencies.extend(dependencies);
        family
    }

    /// Whether nothing is recorded.
    pub fn is_empty(&self) -> bool {
        *self == Family::default()
    }

    fn own(&self) -> impl Iterator<Item = WeakKey> {
        self.keys.iter().chain(&self.earlier).copied()
    }
}

impl Priming {
    /// Starts a priming of `group`.
    pub fn start(group: &Group, workshop: Workshop) -> Self {
        let (mailbox, messages) = mpsc::channel(MAILBOX);
        let activities = workshop.activities.clone();
        let (landed, landings) = mpsc::channel(LANDINGS);
        let shares = match group {
            Group::Invocation(key) => BTreeMap::from([(*key, Share::Whole)]),
            Group::Actions { .. } => BTreeMap::new(),
        };
        let worker = Worker {
            shares,
            parents: HashMap::new(),
            shared: HashMap::new(),
            shared_keys: HashMap::new(),
            mailbox: mailbox.downgrade(),
            known: Known::default(),
            plan: None,
            results: Results::new(),
            last_scan: None,
            triggered: None,
            last_planning: None,
            has_news: false,
            builds: HashMap::new(),
            landed,
            trust: matches!(group, Group::Invocation(_)).then(Trust::default),
            reserved: HashMap::new(),
            over_budget: HashMap::new(),
            preparations: HashMap::new(),
            workshop,
        };
        task::spawn("priming", worker.run(messages, landings));
        Priming {
            mailbox,
            activities,
        }
    }

    /// Tells it something. If it is too far behind, it is not told: a question is then answered
    /// at once.
    pub fn tell(&self, message: Message) {
        // Dropping what does not fit is the answer.
        let _ = self.mailbox.try_send((message, self.activities.begin()));
    }
}

struct Worker {
    /// What is to be planned.
    shares: BTreeMap<WeakKey, Share>,
    /// The records, as far as they were loaded.
    parents: HashMap<WeakKey, Arc<Parent>>,
    /// What others have shared, as long as nothing is recorded here.
    shared: HashMap<WeakKey, Arc<Parent>>,
    /// What action parents are recorded under by others, by what they are asked for as.
    shared_keys: HashMap<WeakKey, Vec<WeakKey>>,
    /// Its own.
    mailbox: mpsc::WeakSender<(Message, Activity)>,
    known: Known,
    plan: Option<Plan>,
    results: Results,
    last_scan: Option<Span>,
    /// When what is dealt with now began.
    triggered: Option<Instant>,
    last_planning: Option<Span>,
    /// Whether more was learned than the plan knows.
    has_news: bool,
    /// The builds that speculative work is done for.
    builds: HashMap<WeakKey, u64>,
    landed: mpsc::Sender<Landing>,
    /// What the build shows of the plan. Of action parents too many are primed together.
    trust: Option<Trust>,
    /// What is in flight for it, and may take of the budgets.
    reserved: HashMap<FlightKey, Reservation>,
    /// What there was no budget for.
    over_budget: HashMap<FlightKey, LeftOut>,
    /// For each instance.
    preparations: HashMap<Arc<str>, Preparation>,
    workshop: Workshop,
}

/// The task that prepares what is adapted, and what it is to prepare.
struct Preparation {
    queue: Arc<Queue>,
    _task: AbortOnDropHandle<Option<()>>,
}

struct Span {
    began: Instant,
    ended: Instant,
}

impl Span {
    fn since(began: Instant) -> Self {
        Span {
            began,
            ended: Instant::now(),
        }
    }
}

impl Worker {
    async fn run(
        mut self,
        mut messages: mpsc::Receiver<(Message, Activity)>,
        mut landings: mpsc::Receiver<Landing>,
    ) {
        loop {
            tokio::select! {
                biased;
                Some(landing) = landings.recv() => self.land(landing, true).await,
                message = messages.recv() => match message {
                    Some((message, _activity)) => {
                        self.triggered = Some(Instant::now());
                        self.deal_with(message).await;
                        self.triggered = None;
                    }
                    None => break,
                },
                () = tokio::time::sleep_until(self.may_plan_at().into()), if self.has_news => {
                    self.triggered = Some(Instant::now());
                    self.plan(Trigger::Observed).await;
                    self.triggered = None;
                }
            }
        }
        self.trust_after(|trust| *trust = Trust::default());
        // What has started, or is waited for, goes on and is still counted.
        let mut flying = Vec::new();
        for key in self.plan.iter().flat_map(Plan::awaited) {
            self.workshop.flights.withdraw(key, &self.landed);
            let Some(stage) = self.workshop.flights.watch(key) else {
                continue;
            };
            flying.push(stage);
            let recorded = self.plan.as_ref().and_then(|plan| plan.recorded(key));
            if let Some((_, parent)) = recorded {
                let leftover = (key.clone(), self.landed.clone());
                self.workshop.leftovers.add(parent, leftover);
            }
        }
        let landed = async {
            for mut stage in flying {
                ending(&mut stage).await;
            }
        };
        tokio::pin!(landed);
        loop {
            tokio::select! {
                biased;
                Some(landing) = landings.recv() => self.land(landing, false).await,
                () = &mut landed => break,
            }
        }
        self.workshop.leftovers.forget(&self.landed);
    }

    async fn deal_with(&mut self, message: Message) {
        match message {
            Message::Begin(build) => {
                for key in self.shares.keys() {
                    self.workshop.budgets.begin(*key);
                    self.builds.insert(*key, build);
                }
                self.trust_after(|trust| *trust = Trust::default());
                self.look_at_workspace(Trigger::Workspace).await;
            }
            Message::Saved => self.look_at_workspace(Trigger::Saved).await,
            Message::Unrecorded(identity) => {
                let obtained = share::obtain(&self.workshop, &identity, MAX_SHARED).await;
                if let Some(Obtained { parent, .. }) = obtained {
                    self.shared.insert(identity.weak_key(), parent);
                }
            }
            Message::Opened(mut opened) => {
                let dependents = self.look_for_shared(&mut opened).await;
                self.open(opened);
                self.plan(Trigger::Parent).await;
                if let Some(dependents) = dependents {
                    self.look_for_dependents(dependents);
                }
            }
            Message::Dependents(parents) => {
                for parent in parents {
                    let key = parent.identity.weak_key();
                    // It may have been asked for itself by now.
                    self.shares.entry(key).or_insert(Share::Whole);
                    self.shared.insert(key, parent);
                }
                self.plan(Trigger::Shared).await;
            }
            Message::Closed {
                asked,
                keys,
                outputs,
            } => {
                let shared = self.shared_keys.remove(&asked.weak_key());
                for key in keys.into_iter().chain(shared.into_iter().flatten()) {
                    // Others may still wait for what its actions wrote.
                    self.shares.insert(key, Share::OnDemand);
                    if let Some(current) = self.known.parents.get_mut(&key) {
                        current.outputs = Some(outputs.clone());
                    }
                }
                self.plan(Trigger::Dependency).await;
            }
            Message::Question { key, asked, reply } => {
                if !self.expects(&key).await && self.may_scan_for(asked) {
                    self.look_at_workspace(Trigger::Workspace).await;
                }
                self.bring_back(&key, true).await;
                drop(reply);
            }
            Message::Executing { key } => {
                self.bring_back(&key, false).await;
                self.learn_from(key).await;
            }
            Message::Used => self.trust_after(Trust::is_earned),
            Message::Settled { .. } => {}
            Message::Records(parent) => {
                let key = parent.identity.weak_key();
                self.parents.insert(key, parent);
                self.look_at_workspace(Trigger::Workspace).await;
            }
            Message::Observed { key, result } => {
                self.expects(&key).await;
                self.complete(&key, Some(&result), true).await;
            }
        }
    }

    /// Adds to the family of a parent what others have recorded of it. Returns the way to those
    /// that depend on it.
    async fn look_for_shared(&mut self, opened: &mut Opened) -> Option<Dependents> {
        let asked = opened.unrecorded.as_ref()?;
        let SharedFamily { own, dependents } = relatives::obtain(&self.workshop, asked).await?;
        for parent in own {
            let key = parent.identity.weak_key();
            opened.family.keys.push(key);
            self.shared.insert(key, parent);
        }
        let keys = opened.family.keys.clone();
        self.shared_keys.insert(asked.weak_key(), keys);
        Some(dependents)
    }

    /// Looks for them beside what else there is to do: there may be many.
    fn look_for_dependents(&self, mut dependents: Dependents) {
        let (mailbox, workshop) = (self.mailbox.clone(), self.workshop.clone());
        let activity = self.workshop.activities.begin();
        let walk = async move {
            while let Some(found) = dependents.next(&workshop).await
                && let Some(mailbox) = mailbox.upgrade()
            {
                let message = (Message::Dependents(found), activity.clone());
                // A priming that is gone needs them no more.
                let _ = mailbox.send(message).await;
            }
        };
        // What was found until then is used.
        let in_time = tokio::time::timeout(MAX_WALK, walk);
        task::spawn("shared dependents", in_time);
    }

    fn open(&mut self, opened: Opened) {
        let Opened {
            family,
            current,
            build,
            unrecorded: _,
        } = opened;
        let is_news = |key: &WeakKey| {
            self.known.parents.get(key).is_none_or(|known| {
                (known.input_root, &known.texts) != (current.input_root, &current.texts)
            })
        };
        if family.own().any(|key| is_news(&key)) {
            // They will be asked for again, in another form than the last time.
            for key in &family.dependents {
                self.workshop.budgets.begin(*key);
                self.known.parents.remove(key);
                self.builds.remove(key);
            }
        }
        for key in family.own() {
            self.known.parents.insert(key, current.clone());
        }
        for key in &family.keys {
            match build {
                Some(build) => self.builds.insert(*key, build),
                None => self.builds.remove(key),
            };
        }
        for key in family.keys.iter().chain(&family.dependents) {
            // They may have been recorded again since.
            self.parents.remove(key);
            self.shares.insert(*key, Share::Whole);
        }
        for key in family.dependencies {
            self.shares.entry(key).or_insert(Share::OnDemand);
        }
    }

    /// Whether a miss at `asked` is a reason to look at the workspace again: something may have
    /// been edited or generated since the last look, but looking must stay cheap.
    fn may_scan_for(&self, asked: Instant) -> bool {
        match &self.last_scan {
            None => true,
            Some(scan) => {
                let pause = (scan.ended - scan.began) * SCAN_SHARE;
                scan.began < asked && scan.ended.elapsed() >= pause
            }
        }
    }

    /// Compares the sources on disk with what was recorded, and plans anew if they changed.
    #[tracing::instrument(level = "debug", skip_all)]
    async fn look_at_workspace(&mut self, trigger: Trigger) {
        self.load_parents().await;
        let began = Instant::now();
        let index = self.workshop.index.clone();
        let parents: Vec<_> = self.parents.values().cloned().collect();
        let disk = task::blocking("workspace scan", move || {
            let sources = parents.iter().flat_map(|parent| {
                let function = parent.identity.digest_function;
                let sources = parent.overlays.sources().into_iter();
                sources.map(move |path| (path, function))
            });
            sources
                .map(|(path, function)| (path.to_owned(), index.digest(path, function).ok()))
                .collect::<HashMap<PathBuf, Option<Digest>>>()
        })
        .await;
        self.last_scan = Some(Span::since(began));
        if let Some(disk) = disk {
            self.known.disk = disk;
            self.plan(trigger).await;
        }
    }

    /// Compares what a client executes with what was recorded, where that was not foreseen.
    #[tracing::instrument(level = "debug", skip_all, fields(action = %key.action))]
    async fn learn_from(&mut self, key: FlightKey) {
        if self.plan.as_ref().is_none_or(|plan| plan.awaits(&key)) {
            return;
        }
        self.trust_after(Trust::is_disappointed);
        let Some(plan) = &self.plan else { return };
        let Workshop {
            cas, directories, ..
        } = &self.workshop;
        let encoded = match cas.fetch(&key.instance, [key.action]).await {
            Ok(mut fetched) => fetched.remove(&key.action),
            Err(status) => {
                tracing::debug!(action = %key.action, %status, "what a client executes cannot be read");
                return;
            }
        };
        let Some(parts) =
            encoded.and_then(|encoded| action_parts(&encoded, key.action.function()).ok())
        else {
            return;
        };
        let mut bases = plan.bases(&key.instance, parts.action_key);
        bases.truncate(MAX_BASES);
        if bases.is_empty() {
            return;
        }
        let roots = bases.iter().map(|base| plan.input_root(*base));
        let roots = roots.chain([parts.input_root]);
        let trees = match directories.load(cas, &key.instance, roots).await {
            Ok(trees) => trees,
            Err(status) => {
                tracing::debug!(action = %key.action, %status, "its input tree cannot be read");
                return;
            }
        };
        let Some(plan) = self.plan.take() else {
            return;
        };
        let mut edits = self.known.edits.clone();
        let learned = task::blocking("learning", move || {
            let news = plan.learn(&mut edits, &bases, parts.input_root, &trees);
            (plan, edits, news)
        })
        .await;
        let Some((plan, edits, news)) = learned else {
            return;
        };
        self.plan = Some(plan);
        self.known.edits = edits;
        self.has_news |= news;
        if news {
            tracing::debug!(action = %key.action, "an execution shows that inputs changed");
        }
    }

    /// Whether the plan awaits `key`, also in the light of what was learned since it was made.
    async fn expects(&mut self, key: &FlightKey) -> bool {
        let awaits = |plan: &Plan| plan.awaits(key);
        let expected = self.plan.as_ref().is_some_and(awaits);
        if expected || !self.has_news || self.may_plan_at() > Instant::now() {
            return expected;
        }
        self.plan(Trigger::Observed).await;
        self.plan.as_ref().is_some_and(awaits)
    }

    /// Notes what the build has shown of the plan; what is queued for it stays queued, or does so no
    /// longer.
    fn trust_after(&mut self, note: impl FnOnce(&mut Trust)) {
        let Some(trust) = &mut self.trust else { return };
        let was_lost = trust.is_lost();
        note(trust);
        match (was_lost, trust.is_lost()) {
            (false, true) => {
                tracing::debug!("nothing that was foreseen is used; what is queued is held back");
                self.workshop.flights.hold_back(&self.landed);
            }
            (true, false) => self.workshop.flights.trust(&self.landed),
            _ => {}
        }
    }

    /// When what was learned may be planned for: planning must not take all of the time.
    fn may_plan_at(&self) -> Instant {
        match &self.last_planning {
            Some(Span { began, ended }) if *ended - *began > SHORT_PLANNING => {
                *ended + (*ended - *began)
            }
            _ => Instant::now(),
        }
    }

    async fn load_parents(&mut self) {
        let parents = &self.parents;
        let absent = self.shares.keys().filter(|key| !parents.contains_key(key));
        let absent: Vec<WeakKey> = absent.copied().collect();
        if absent.is_empty() {
            return;
        }
        let store = self.workshop.store.clone();
        let loaded = task::blocking("loading records", move || {
            let loaded = absent.into_iter().map(|key| (key, store.load(key)));
            loaded.collect::<Vec<_>>()
        })
        .await;
        for (key, parent) in loaded.into_iter().flatten() {
            match parent {
                Ok(Some(parent)) => {
                    self.parents.insert(key, Arc::new(parent));
                }
                Ok(None) => {
                    let shared = self.shared.get(&key).cloned();
                    self.parents.extend(shared.map(|parent| (key, parent)));
                }
                Err(error) => {
                    tracing::warn!(%error, "records cannot be read; nothing is primed");
                }
            }
        }
    }

    /// Plans anew if anything changed since the last plan. What was queued for another state of
    /// things is withdrawn.
    #[tracing::instrument(level = "debug", skip_all, fields(?trigger))]
    async fn plan(&mut self, trigger: Trigger) {
        self.has_news = false;
        self.load_parents().await;
        let began = Instant::now();
        let planned = self.shares.iter().filter_map(|(key, share)| {
            let parent = self.parents.get(key)?.clone();
            Some(PlannedParent {
                parent,
                share: *share,
            })
        });
        let parents: Vec<PlannedParent> = planned.collect();
        let known = &self.known;
        let same = |plan: &Plan| plan.is_about(&parents, known);
        if parents.is_empty() || self.plan.as_ref().is_some_and(same) {
            return;
        }
        let worth = self.worth().await;
        let subject = match Subject::load(&self.workshop, parents, self.known.clone()).await {
            Ok(subject) => Subject { worth, ..subject },
            Err(status) => {
                tracing::warn!(%status, "input trees cannot be read; nothing is primed");
                return;
            }
        };
        let results = std::mem::take(&mut self.results);
        let planned = task::blocking("planning", move || {
            let mut plan = Plan::new(subject);
            let ready = plan.start(&results);
            (plan, ready, results)
        })
        .await;
        let Some((plan, ready, results)) = planned else {
            return;
        };
        self.results = results;
        self.last_planning = Some(Span::since(began));
        let superseded = self.plan.replace(plan);
        self.trust_after(Trust::is_renewed);
        if let (Some(old), Some(new)) = (superseded, &self.plan) {
            for key in old.awaited().filter(|key| !new.awaits(key)) {
                self.workshop.flights.supersede(key, &self.landed);
                if !self.workshop.flights.is_in_flight(key) {
                    self.reserved.remove(key);
                }
            }
        }
        self.supersede_leftovers();
        self.report_unadaptable();
        self.launch(ready);
        self.report_verdicts(trigger).await;
    }

    /// Cancels what is still executed for earlier builds of the planned parents, and of no use now.
    fn supersede_leftovers(&self) {
        let Some(plan) = &self.plan else { return };
        for parent in self.shares.keys() {
            for (key, owner) in self.workshop.leftovers.take(*parent) {
                if !plan.awaits(&key) {
                    self.workshop.flights.supersede(&key, &owner);
                }
            }
        }
    }

    /// Announces what is ready, at once and all together, and has it prepared.
    fn launch(&mut self, ready: Vec<Ready>) {
        let mut jobs: HashMap<Arc<str>, Vec<Job>> = HashMap::new();
        for ready in ready {
            let key = ready.key.clone();
            let instance = key.instance.clone();
            let Some(whom) = self.beneficiary(&key) else {
                continue;
            };
            let Some(reservation) = self.reserve(&ready) else {
                continue;
            };
            let announced = self.workshop.flights.announce(key.clone(), &self.landed);
            if let Some(announcement) = announced {
                announcement.expect(ready.recorded);
                self.reserved.insert(key, reservation);
                let activity = self.workshop.activities.begin();
                jobs.entry(instance).or_default().push(Job {
                    announcement,
                    ready,
                    whom,
                    triggered: self.triggered,
                    activity,
                });
            }
        }
        for (instance, jobs) in jobs {
            tracing::debug!(%instance, actions = jobs.len(), "adapted");
            let workshop = &self.workshop;
            let preparation = self
                .preparations
                .entry(instance)
                .or_insert_with_key(|instance| {
                    let queue = Arc::new(Queue::default());
                    let run = prepare::run(workshop.clone(), instance.clone(), queue.clone());
                    Preparation {
                        queue,
                        _task: AbortOnDropHandle::new(task::spawn("preparation", run)),
                    }
                });
            preparation.queue.push(jobs);
        }
    }

    /// Sets aside what an execution may take. `None` if there is no budget for it.
    fn reserve(&mut self, ready: &Ready) -> Option<Reservation> {
        let recorded = self.plan.as_ref()?.recorded(&ready.key);
        let parent = recorded.map(|(_, parent)| parent);
        let build = parent.and_then(|parent| self.builds.get(&parent));
        let spender = match (build, parent) {
            (Some(build), _) => Spender::Build(*build),
            (None, parent) => Spender::Parent(parent?),
        };
        let budgets = &self.workshop.budgets;
        match budgets.reserve(spender, ready.recorded, Instant::now()) {
            Ok(reservation) => Some(reservation),
            Err(flag) => {
                let left_out = LeftOut::OverBudget(flag);
                self.workshop.flights.leave_out(&left_out);
                self.over_budget.insert(ready.key.clone(), left_out);
                None
            }
        }
    }

    /// What is known of how predictions were used.
    async fn worth(&self) -> Worth {
        let parents: Vec<WeakKey> = self.parents.keys().copied().collect();
        let uses = self.workshop.uses.clone();
        let wasted = task::blocking("uses of predictions", move || {
            let wasted = parents.into_iter();
            wasted.map(|parent| (parent, uses.wasted(parent))).collect()
        });
        Worth {
            wasted: wasted.await.unwrap_or_default(),
            overhead: self.workshop.flights.overhead(),
        }
    }

    /// A client asks for `key`. If it was left out, predictions like it come back, and what was
    /// left out with it is executed now; itself, too, unless the client does that already.
    async fn bring_back(&mut self, key: &FlightKey, with_itself: bool) {
        let left_out = self.plan.as_ref().map(|plan| plan.left_out(key));
        let left_out = left_out.unwrap_or_default();
        if left_out.is_empty() {
            return;
        }
        let uses = self.workshop.uses.clone();
        task::blocking("uses of predictions", move || {
            for (parent, prediction) in left_out {
                uses.bring_back(parent, prediction);
            }
        })
        .await;
        let worth = self.worth().await;
        let Some(plan) = &mut self.plan else { return };
        let mut back = plan.judge_anew(worth);
        back.retain(|ready| with_itself || ready.key != *key);
        tracing::debug!(action = %key.action, actions = back.len(), "predictions come back");
        self.launch(back);
        self.report_verdicts(Trigger::Observed).await;
    }

    async fn land(&mut self, landing: Landing, go_on: bool) {
        let key = landing.key;
        if let Some(reservation) = self.reserved.remove(&key)
            && let Some(taken) = self.taken(&key, &landing.outcome)
        {
            reservation.settle(taken, Instant::now());
        }
        match landing.outcome {
            Outcome::Primed(result) => {
                self.tell_primed(&key).await;
                self.complete(&key, Some(&result), go_on).await;
            }
            Outcome::Cached(result) => self.complete(&key, Some(&result), go_on).await,
            Outcome::Failed => self.complete(&key, None, go_on).await,
            // The client may yet execute it, and then it is observed.
            Outcome::Abandoned => {}
        }
    }

    /// How long a worker was busy with what has landed; `None` if it was not executed.
    fn taken(&self, key: &FlightKey, outcome: &Outcome) -> Option<Duration> {
        match outcome {
            Outcome::Primed(result) => Some(execution_time(result).unwrap_or_default()),
            Outcome::Cached(_) => None,
            Outcome::Failed | Outcome::Abandoned => {
                let started = self.workshop.flights.record(key)?.flown().started_unix_ms?;
                let taken = clock::now_unix_ms() - started;
                Some(Duration::from_millis(taken.try_into().unwrap_or(0)))
            }
        }
    }

    /// Tells the engine for whom a result was primed.
    async fn tell_primed(&self, key: &FlightKey) {
        if let Some(whom) = self.beneficiary(key) {
            // The engine is told last of all, by a channel that it drains promptly.
            let _ = self.workshop.news.send(News::Primed(whom)).await;
        }
    }

    /// For whom `key` is executed. What no plan awaits any more is for the parent that began last.
    fn beneficiary(&self, key: &FlightKey) -> Option<Beneficiary> {
        let recorded = self.plan.as_ref().and_then(|plan| plan.recorded(key));
        let parent = recorded.map(|(_, parent)| parent);
        let parent = parent.or_else(|| {
            let latest = self.builds.iter().max_by_key(|(_, build)| **build);
            latest.map(|(parent, _)| *parent)
        })?;
        let build = self.builds.get(&parent).copied();
        Some(Beneficiary { parent, build })
    }

    async fn complete(&mut self, key: &FlightKey, result: Option<&ActionResult>, go_on: bool) {
        let recorded = self.plan.as_ref().and_then(|plan| plan.recorded(key));
        let Some((base, _)) = recorded else {
            // Of a plan that was superseded.
            return;
        };
        let directory = &base.working_directory;
        let outputs = match result {
            Some(result) => {
                let (workshop, function) = (&self.workshop, key.action.function());
                match output_files(workshop, &key.instance, function, directory, result).await {
                    Ok(outputs) => Some(outputs),
                    Err(status) => {
                        tracing::debug!(action = %key.action, %status, "outputs cannot be read");
                        None
                    }
                }
            }
            None => None,
        };
        if let Some(outputs) = &outputs {
            self.results.insert(key.clone(), outputs.clone());
        }
        let Some(mut plan) = self.plan.take() else {
            return;
        };
        let results = std::mem::take(&mut self.results);
        let key = key.clone();
        let advanced = task::blocking("planning", move || {
            let ready = plan.complete(&key, outputs, &results);
            (plan, ready, results)
        })
        .await;
        let Some((plan, ready, results)) = advanced else {
            return;
        };
        self.plan = Some(plan);
        self.results = results;
        self.report_unadaptable();
        if go_on {
            self.launch(ready);
        }
        self.report_verdicts(Trigger::Completed).await;
    }

    /// Tells the engine what is planned, for the journals of those for whom it is. Comes after what
    /// is ready was announced.
    async fn report_verdicts(&mut self, trigger: Trigger) {
        let verdicts = self.plan.as_mut().map(Plan::take_verdicts);
        let planned_unix_ms = clock::now_unix_ms();
        let mut by_parent: HashMap<WeakKey, Vec<Planned>> = HashMap::new();
        for mut verdict in verdicts.into_iter().flatten() {
            let flights = &self.workshop.flights;
            let mut flight = None;
            if let Outlook::Adapted(adaptation) = &mut verdict.outlook {
                match &adaptation.left_out {
                    Some(left_out) => flights.leave_out(left_out),
                    None => adaptation.left_out = self.over_budget.remove(&adaptation.key),
                }
                if adaptation.left_out.is_none() {
                    flight = flights.record(&adaptation.key);
                }
            }
            by_parent.entry(verdict.parent).or_default().push(Planned {
                trigger: self.trigger_for(&verdict, trigger),
                verdict,
                planned_unix_ms,
                flight,
            });
        }
        for (parent, planned) in by_parent {
            let build = self.builds.get(&parent).copied();
            let news = News::Planned(Beneficiary { parent, build }, planned);
            // The engine is told last of all, by a channel that it drains promptly.
            let _ = self.workshop.news.send(news).await;
        }
    }

    /// What made primed plan for a parent: what did so for all of them may be about others.
    fn trigger_for(&self, verdict: &Verdict, trigger: Trigger) -> Trigger {
        let parent = &verdict.parent;
        match trigger {
            Trigger::Completed | Trigger::Observed => trigger,
            _ if self.shared.contains_key(parent) => Trigger::Shared,
            Trigger::Parent if !self.known.parents.contains_key(parent) => Trigger::Dependency,
            _ => trigger,
        }
    }

    fn report_unadaptable(&mut self) {
        let Some(plan) = &mut self.plan else {
            return;
        };
        let unadaptable = plan.take_unadaptable();
        for (action, reason) in &unadaptable {
            tracing::debug!(%action, %reason, "a recorded action cannot be adapted");
        }
        for (_, reason) in &unadaptable {
            METERS.unadaptable.add(reason.word(), 1);
        }
        if let Some((_, reason)) = unadaptable.first() {
            let actions = unadaptable.len() as u64;
            self.workshop
                .unadaptable
                .fetch_add(actions, Ordering::Relaxed);
            tracing::info!(actions, example = %reason, "recorded actions cannot be adapted");
        }
    }
}
