//! What is ready takes off, and what lands completes the plan.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::task::AbortOnDropHandle;

use super::super::prepare::{self, Job, Queue};
use super::{Preparation, Worker};
use crate::cas::outputs::output_files;
use crate::reapi::ActionResult;
use crate::speculation::flights::budgets::{Reservation, Spender};
use crate::speculation::flights::durations::execution_time;
use crate::speculation::flights::left_out::LeftOut;
use crate::speculation::flights::{FlightKey, Landing, Outcome};
use crate::speculation::journal::page::Trigger;
use crate::speculation::planning::schedule::Ready;
use crate::speculation::planning::worth::Worth;
use crate::speculation::records::parent::WeakKey;
use crate::speculation::workshop::{Beneficiary, News};
use crate::{clock, task};

impl Worker {
    /// Announces what is ready, has it prepared, and tells of it. Then takes in what has landed in
    /// the meantime, and goes on with what that makes ready.
    pub(super) async fn launch(&mut self, ready: Vec<Ready>, trigger: Trigger) {
        let mut landed = VecDeque::new();
        let (mut ready, mut trigger) = (ready, trigger);
        loop {
            while let Ok(landing) = self.landings.try_recv() {
                landed.push_back(landing);
            }
            self.announce(ready, &landed);
            self.report_verdicts(trigger).await;
            let Some(landing) = landed.pop_front() else {
                return;
            };
            ready = self.land(landing).await;
            trigger = Trigger::Completed;
        }
    }

    /// Announces what is ready, at once and all together, but for what has `landed` by now: it need
    /// not be executed once more.
    fn announce(&mut self, mut ready: Vec<Ready>, landed: &VecDeque<Landing>) {
        let landed = landed
            .iter()
            .filter(|landing| !matches!(landing.outcome, Outcome::Abandoned));
        let landed: HashSet<&FlightKey> = landed.map(|landing| &landing.key).collect();
        ready.retain(|ready| !landed.contains(&ready.key));
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
    pub(super) async fn worth(&self) -> Worth {
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
    pub(super) async fn bring_back(&mut self, key: &FlightKey, with_itself: bool) {
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
        self.launch(back, Trigger::Observed).await;
    }

    /// Takes in what a flight has brought. Returns what is ready now.
    pub(super) async fn land(&mut self, landing: Landing) -> Vec<Ready> {
        let key = landing.key;
        if let Some(reservation) = self.reserved.remove(&key)
            && let Some(taken) = self.taken(&key, &landing.outcome)
        {
            reservation.settle(taken, Instant::now());
        }
        match landing.outcome {
            Outcome::Primed(result) => {
                self.tell_primed(&key).await;
                self.complete(&key, Some(&result)).await
            }
            Outcome::Cached(result) => self.complete(&key, Some(&result)).await,
            Outcome::Failed => self.complete(&key, None).await,
            // The client may yet execute it, and then it is observed.
            Outcome::Abandoned => Vec::new(),
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

    /// Takes in the result of an adapted action, or that there will be none. Returns what is ready
    /// now.
    pub(super) async fn complete(
        &mut self,
        key: &FlightKey,
        result: Option<&ActionResult>,
    ) -> Vec<Ready> {
        let recorded = self.plan.as_ref().and_then(|plan| plan.recorded(key));
        let Some((base, _)) = recorded else {
            // Of a plan that was superseded.
            return Vec::new();
        };
        let directory = &base.working_directory;
        let outputs = match result {
            Some(result) => {
                let (workshop, function) = (&self.workshop, key.action.function());
                match output_files(
                    &workshop.cas,
                    &workshop.directories,
                    &key.instance,
                    function,
                    directory,
                    result,
                )
                .await
                {
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
            return Vec::new();
        };
        let results = std::mem::take(&mut self.results);
        let key = key.clone();
        let advanced = task::blocking("planning", move || {
            let ready = plan.complete(&key, outputs, &results);
            (plan, ready, results)
        })
        .await;
        let Some((plan, ready, results)) = advanced else {
            return Vec::new();
        };
        self.plan = Some(plan);
        self.results = results;
        self.report_unadaptable();
        ready
    }
}
