//! The task behind a priming.

mod flying;
mod learning;
mod telling;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::prepare::Queue;
use super::trust::Trust;
use super::{Group, Message, Opened};
use crate::speculation::activity::Activity;
use crate::speculation::flights::budgets::Reservation;
use crate::speculation::flights::left_out::LeftOut;
use crate::speculation::flights::{FlightKey, Landing, ending};
use crate::speculation::journal::page::Trigger;
use crate::speculation::planning::known::Known;
use crate::speculation::planning::schedule::{Plan, Results};
use crate::speculation::planning::subject::{PlannedParent, Share, Subject};
use crate::speculation::records::parent::{Parent, WeakKey};
use crate::speculation::sharing::relatives::{self, Dependents, SharedFamily};
use crate::speculation::sharing::share::Obtained;
use crate::speculation::sharing::shelf::MAX_SHARED;
use crate::speculation::workshop::Workshop;
use crate::task;

/// Landings that may wait for it.
const LANDINGS: usize = 1024;
/// How long shared records of dependents are looked for.
const MAX_WALK: Duration = Duration::from_secs(60);

/// What primes a group.
pub(super) struct Worker {
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
    /// What came of speculative work, and is not dealt with yet.
    landings: mpsc::Receiver<Landing>,
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
    /// A worker for `group` that tells itself things by `mailbox`.
    pub(super) fn new(
        group: &Group,
        mailbox: mpsc::WeakSender<(Message, Activity)>,
        workshop: Workshop,
    ) -> Self {
        let (landed, landings) = mpsc::channel(LANDINGS);
        let (shares, trust) = match group {
            Group::Invocation(key) => (
                BTreeMap::from([(*key, Share::Whole)]),
                Some(Trust::default()),
            ),
            Group::Actions { .. } => (BTreeMap::new(), None),
        };
        Worker {
            shares,
            parents: HashMap::new(),
            shared: HashMap::new(),
            shared_keys: HashMap::new(),
            mailbox,
            known: Known::default(),
            plan: None,
            results: Results::new(),
            last_scan: None,
            triggered: None,
            last_planning: None,
            has_news: false,
            builds: HashMap::new(),
            landed,
            landings,
            trust,
            reserved: HashMap::new(),
            over_budget: HashMap::new(),
            preparations: HashMap::new(),
            workshop,
        }
    }

    /// Deals with messages and landings until the handle is dropped, and then with the landings of
    /// what goes on.
    pub(super) async fn run(mut self, mut messages: mpsc::Receiver<(Message, Activity)>) {
        loop {
            let may_plan_at = self.may_plan_at();
            tokio::select! {
                biased;
                Some(landing) = self.landings.recv() => {
                    let ready = self.land(landing).await;
                    self.launch(ready, Trigger::Completed).await;
                }
                message = messages.recv() => match message {
                    Some((message, _activity)) => {
                        self.triggered = Some(Instant::now());
                        self.deal_with(message).await;
                        self.triggered = None;
                    }
                    None => break,
                },
                () = tokio::time::sleep_until(may_plan_at.into()), if self.has_news => {
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
                Some(landing) = self.landings.recv() => {
                    self.land(landing).await;
                    self.report_verdicts(Trigger::Completed).await;
                }
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
                let Some(sharing) = &self.workshop.sharing else {
                    return;
                };
                if let Some(Obtained { parent, .. }) = sharing.obtain(&identity, MAX_SHARED).await {
                    self.shared.insert(identity.weak_key(), parent);
                }
            }
            Message::Opened(mut opened) => {
                let dependents = self.look_for_shared(&mut opened).await;
                self.open(*opened);
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
                if self.expects(&key).await {
                    let ready = self.complete(&key, Some(&result)).await;
                    self.launch(ready, Trigger::Completed).await;
                }
            }
        }
    }

    /// Adds to the family of a parent what others have recorded of it. Returns the way to those
    /// that depend on it.
    async fn look_for_shared(&mut self, opened: &mut Opened) -> Option<Dependents> {
        let asked = opened.unrecorded.as_ref()?;
        let SharedFamily { own, dependents } =
            relatives::obtain(self.workshop.sharing.as_ref()?, asked).await?;
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
        let mailbox = self.mailbox.clone();
        let activity = self.workshop.activities.begin();
        let walk = async move {
            while let Some(found) = dependents.next().await
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
        let subject = match Subject::load(
            &self.workshop.cas,
            &self.workshop.directories,
            parents,
            self.known.clone(),
        )
        .await
        {
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
        self.launch(ready, trigger).await;
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
}
