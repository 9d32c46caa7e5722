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
use super::flights::{FlightKey, Landing, Outcome, ending};
use super::known::{CurrentParent, Known};
use super::parent::{ActionParent, Parent, ParentIdentity, ParentKind, WeakKey, action_parts};
use super::prepare::{self, Job, Queue};
use super::record::output_files;
use super::relatives::{self, Dependents, SharedFamily};
use super::schedule::{Outputs, Plan, PlannedParent, Ready, Results, Share, Subject};
use super::share::{self, Obtained};
use super::shelf::MAX_SHARED;
use super::store::KnownParent;
use super::workshop::{Primed, Workshop};
use crate::cas::{Digest, DigestFunction};
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
    /// A client executes this action itself; what that needs is in the CAS.
    Executing {
        /// The action.
        key: FlightKey,
    },
    /// The records of an invocation were replaced.
    Records(Arc<Parent>),
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
            last_planning: None,
            has_news: false,
            builds: HashMap::new(),
            landed,
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
    last_planning: Option<Span>,
    /// Whether more was learned than the plan knows.
    has_news: bool,
    /// The builds that speculative work is done for.
    builds: HashMap<WeakKey, u64>,
    landed: mpsc::Sender<Landing>,
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
                    Some((message, _activity)) => self.deal_with(message).await,
                    None => break,
                },
                () = tokio::time::sleep_until(self.may_plan_at().into()), if self.has_news => {
                    self.plan().await;
                }
            }
        }
        // What has started, or is waited for, goes on and is still counted.
        let mut flying = Vec::new();
        for key in self.plan.iter().flat_map(Plan::awaited) {
            self.workshop.flights.withdraw(key);
            flying.extend(self.workshop.flights.watch(key));
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
    }

    async fn deal_with(&mut self, message: Message) {
        match message {
            Message::Begin(build) => {
                for key in self.shares.keys() {
                    self.builds.insert(*key, build);
                }
                self.look_at_workspace().await;
            }
            Message::Unrecorded(identity) => {
                let obtained = share::obtain(&self.workshop, &identity, MAX_SHARED).await;
                if let Some(Obtained { parent, .. }) = obtained {
                    self.shared.insert(identity.weak_key(), parent);
                }
            }
            Message::Opened(mut opened) => {
                let dependents = self.look_for_shared(&mut opened).await;
                self.open(opened);
                self.plan().await;
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
                self.plan().await;
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
                self.plan().await;
            }
            Message::Question { key, asked, reply } => {
                if !self.expects(&key).await && self.may_scan_for(asked) {
                    self.look_at_workspace().await;
                }
                drop(reply);
            }
            Message::Executing { key } => self.learn_from(key).await,
            Message::Records(parent) => {
                let key = parent.identity.weak_key();
                self.parents.insert(key, parent);
                self.look_at_workspace().await;
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
    async fn look_at_workspace(&mut self) {
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
            self.plan().await;
        }
    }

    /// Compares what a client executes with what was recorded, where that was not foreseen.
    async fn learn_from(&mut self, key: FlightKey) {
        let Some(plan) = self.plan.as_ref().filter(|plan| !plan.awaits(&key)) else {
            return;
        };
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
        self.plan().await;
        self.plan.as_ref().is_some_and(awaits)
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
    async fn plan(&mut self) {
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
        let subject = match Subject::load(&self.workshop, parents, self.known.clone()).await {
            Ok(subject) => subject,
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
        if let (Some(old), Some(new)) = (superseded, &self.plan) {
            for key in old.awaited().filter(|key| !new.awaits(key)) {
                self.workshop.flights.withdraw(key);
            }
        }
        self.report_unadaptable();
        self.launch(ready);
    }

    /// Announces what is ready, at once and all together, and has it prepared.
    fn launch(&mut self, ready: Vec<Ready>) {
        let mut jobs: HashMap<Arc<str>, Vec<Job>> = HashMap::new();
        for ready in ready {
            let key = ready.key.clone();
            let instance = key.instance.clone();
            if let Some(announcement) = self.workshop.flights.announce(key, &self.landed) {
                let activity = self.workshop.activities.begin();
                jobs.entry(instance).or_default().push(Job {
                    announcement,
                    ready,
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

    async fn land(&mut self, landing: Landing, go_on: bool) {
        let key = landing.key;
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

    /// Tells the engine for whom a result was primed. Of one that no plan awaits any more, it is
    /// told that it was for the parent that began last.
    async fn tell_primed(&self, key: &FlightKey) {
        let recorded = self.plan.as_ref().and_then(|plan| plan.recorded(key));
        let parent = recorded.map(|(_, parent)| parent);
        let parent = parent.or_else(|| {
            let latest = self.builds.iter().max_by_key(|(_, build)| **build);
            latest.map(|(parent, _)| *parent)
        });
        if let Some(parent) = parent {
            let build = self.builds.get(&parent).copied();
            // The engine is told last of all, by a channel that it drains promptly.
            let _ = self.workshop.primed.send(Primed { parent, build }).await;
        }
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
    }

    fn report_unadaptable(&mut self) {
        let Some(plan) = &mut self.plan else {
            return;
        };
        let unadaptable = plan.take_unadaptable();
        for (action, reason) in &unadaptable {
            tracing::debug!(%action, %reason, "a recorded action cannot be adapted");
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
