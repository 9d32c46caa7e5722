//! One parent being primed: while a build of it runs, a task of its own looks at the workspace,
//! adapts the recorded actions to what changed, uploads what they need and queues them.
//!
//! Messages are dealt with one after the other. A question is answered when all that came before
//! it is settled, so "is this digest in flight?" has its answer by then.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use super::activity::{Activities, Activity};
use super::flights::{FlightKey, Landing, Outcome, ending};
use super::parent::{Parent, WeakKey};
use super::prepare::{self, Job, Queue};
use super::record::output_files;
use super::schedule::{Outputs, Plan, Ready};
use super::workshop::Workshop;
use crate::cas::Digest;
use crate::reapi::ActionResult;
use crate::task;

/// Messages that may wait for a priming that is busy.
const MAILBOX: usize = 16 * 1024;
/// Landings that may wait for it.
const LANDINGS: usize = 1024;
/// Looking at the workspace again for a miss may take this part of the time: one tenth.
const SCAN_SHARE: u32 = 10;

/// A handle on a priming. When it is dropped, what is queued is withdrawn.
pub struct Priming {
    mailbox: mpsc::Sender<(Message, Activity)>,
    activities: Activities,
}

/// What a priming is told.
pub enum Message {
    /// A build has begun, or an earlier one found something else than expected: look at the
    /// workspace. The number names the build that speculative work is done for.
    Begin(u64),
    /// A client's lookup found nothing. `reply` is dropped when the plan is settled.
    Question {
        /// What was looked up.
        action: Digest,
        /// When.
        asked: Instant,
        /// Closed for an answer.
        reply: oneshot::Sender<()>,
    },
    /// The records were replaced.
    Records(Arc<Parent>),
    /// A client has a result that primed did not bring it.
    Observed {
        /// Of this action.
        action: Digest,
        /// With exit code 0.
        result: Arc<ActionResult>,
    },
}

impl Priming {
    /// Starts a priming of the parent that is recorded under `key`.
    pub fn start(key: WeakKey, workshop: Workshop) -> Self {
        let (mailbox, messages) = mpsc::channel(MAILBOX);
        let activities = workshop.activities.clone();
        let (landed, landings) = mpsc::channel(LANDINGS);
        let worker = Worker {
            key,
            parent: None,
            plan: None,
            results: HashMap::new(),
            last_scan: None,
            build: 0,
            landed,
            preparation: None,
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
    key: WeakKey,
    parent: Option<Arc<Parent>>,
    plan: Option<Plan>,
    /// Outputs of adapted actions, of this plan and those before it.
    results: HashMap<Digest, Outputs>,
    last_scan: Option<Scan>,
    build: u64,
    landed: mpsc::Sender<Landing>,
    preparation: Option<Preparation>,
    workshop: Workshop,
}

/// The task that prepares what is adapted, and what it is to prepare.
struct Preparation {
    queue: Arc<Queue>,
    _task: AbortOnDropHandle<Option<()>>,
}

struct Scan {
    began: Instant,
    ended: Instant,
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
            }
        }
        // What has started, or is waited for, goes on and is still counted.
        let mut flying = Vec::new();
        for key in self.awaited() {
            self.workshop.flights.withdraw(&key);
            flying.extend(self.workshop.flights.watch(&key));
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
                self.build = build;
                self.look_at_workspace().await;
            }
            Message::Question {
                action,
                asked,
                reply,
            } => {
                let expected = self.plan.as_ref().is_some_and(|plan| plan.awaits(&action));
                if !expected && self.may_scan_for(asked) {
                    self.look_at_workspace().await;
                }
                drop(reply);
            }
            Message::Records(parent) => {
                self.parent = Some(parent);
                self.look_at_workspace().await;
            }
            Message::Observed { action, result } => {
                self.complete(action, Some(&result), true).await;
            }
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

    /// Compares the sources with what was recorded and plans anew if they changed since the last
    /// plan. What was queued for another state of the sources is withdrawn.
    async fn look_at_workspace(&mut self) {
        let Some(parent) = self.parent().await else {
            return;
        };
        let began = Instant::now();
        let index = self.workshop.index.clone();
        let scanned = parent.clone();
        let sources = task::blocking("workspace scan", move || {
            let sources = scanned.overlays.sources().into_iter();
            sources
                .map(|path| (path.to_owned(), index.digest(path).ok()))
                .collect::<HashMap<PathBuf, Option<Digest>>>()
        })
        .await;
        self.last_scan = Some(Scan {
            began,
            ended: Instant::now(),
        });
        let Some(sources) = sources else {
            return;
        };
        let same = |plan: &Plan| *plan.sources() == sources && Arc::ptr_eq(plan.parent(), &parent);
        if self.plan.as_ref().is_some_and(same) {
            return;
        }
        let roots: Vec<Digest> = parent
            .actions
            .values()
            .map(|base| base.input_root)
            .collect();
        let instance = parent.identity.instance.clone();
        let workshop = &self.workshop;
        let trees = match workshop
            .directories
            .load(&workshop.cas, &instance, roots)
            .await
        {
            Ok(trees) => trees,
            Err(status) => {
                tracing::warn!(parent = parent.identity.label(), %status, "input trees cannot be read; nothing is primed");
                return;
            }
        };
        let results = std::mem::take(&mut self.results);
        let planned = task::blocking("planning", move || {
            let mut plan = Plan::new(parent, trees, sources);
            let ready = plan.start(&results);
            (plan, ready, results)
        })
        .await;
        let Some((plan, ready, results)) = planned else {
            return;
        };
        self.results = results;
        let superseded = self.plan.replace(plan);
        if let (Some(old), Some(new)) = (superseded, &self.plan) {
            for action in old.awaited().filter(|action| !new.awaits(action)) {
                self.workshop.flights.withdraw(&flight(&instance, *action));
            }
        }
        self.report_unadaptable();
        self.launch(ready);
    }

    async fn parent(&mut self) -> Option<Arc<Parent>> {
        if self.parent.is_none() {
            let store = self.workshop.store.clone();
            let key = self.key;
            self.parent = match task::blocking("loading records", move || store.load(key)).await? {
                Ok(parent) => parent.map(Arc::new),
                Err(error) => {
                    tracing::warn!(%error, "records cannot be read; nothing is primed");
                    None
                }
            };
        }
        self.parent.clone()
    }

    /// Announces what is ready, at once and all together, and has it prepared.
    fn launch(&mut self, ready: Vec<Ready>) {
        let Some(parent) = &self.parent else {
            return;
        };
        let instance = parent.identity.instance.clone();
        let mut jobs = Vec::with_capacity(ready.len());
        for ready in ready {
            let key = flight(&instance, ready.adapted.action);
            if let Some(announcement) = self.workshop.flights.announce(key, &self.landed) {
                let activity = self.workshop.activities.begin();
                jobs.push(Job {
                    announcement,
                    ready,
                    activity,
                });
            }
        }
        if jobs.is_empty() {
            return;
        }
        tracing::debug!(
            parent = parent.identity.label(),
            actions = jobs.len(),
            "adapted"
        );
        let workshop = &self.workshop;
        let preparation = self.preparation.get_or_insert_with(|| {
            let queue = Arc::new(Queue::default());
            let run = prepare::run(workshop.clone(), instance, queue.clone());
            Preparation {
                queue,
                _task: AbortOnDropHandle::new(task::spawn("preparation", run)),
            }
        });
        preparation.queue.push(jobs);
    }

    async fn land(&mut self, landing: Landing, go_on: bool) {
        let action = landing.key.action;
        match landing.outcome {
            Outcome::Primed(result) => {
                // The engine is told last of all, by a channel that it drains promptly.
                let _ = self.workshop.primed.send(self.build).await;
                self.complete(action, Some(&result), go_on).await;
            }
            Outcome::Cached(result) => self.complete(action, Some(&result), go_on).await,
            Outcome::Failed => self.complete(action, None, go_on).await,
            // The client may yet execute it, and then it is observed.
            Outcome::Abandoned => {}
        }
    }

    async fn complete(&mut self, action: Digest, result: Option<&ActionResult>, go_on: bool) {
        let (Some(plan), Some(parent)) = (&self.plan, &self.parent) else {
            return;
        };
        let Some(directory) = plan.working_directory(&action) else {
            // Of a plan that was superseded.
            return;
        };
        let instance = &parent.identity.instance;
        let outputs = match result {
            Some(result) => {
                match output_files(&self.workshop.cas, instance, directory, result).await {
                    Ok(outputs) => Some(outputs),
                    Err(status) => {
                        tracing::debug!(%action, %status, "outputs cannot be read");
                        None
                    }
                }
            }
            None => None,
        };
        if let Some(outputs) = &outputs {
            self.results.insert(action, outputs.clone());
        }
        let Some(mut plan) = self.plan.take() else {
            return;
        };
        let results = std::mem::take(&mut self.results);
        let advanced = task::blocking("planning", move || {
            let ready = plan.complete(action, outputs, &results);
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
            let parent = plan.parent().identity.label();
            tracing::info!(parent, actions, example = %reason, "recorded actions cannot be adapted");
        }
    }

    fn awaited(&self) -> impl Iterator<Item = FlightKey> {
        let instance = self
            .parent
            .as_ref()
            .map(|parent| parent.identity.instance.clone());
        let awaited = self.plan.iter().flat_map(Plan::awaited);
        awaited.filter_map(move |action| Some(flight(instance.as_ref()?, *action)))
    }
}

fn flight(instance: &Arc<str>, action: Digest) -> FlightKey {
    FlightKey {
        instance: instance.clone(),
        action,
    }
}
