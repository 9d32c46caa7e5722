//! What the engine and the log are told of a plan.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use super::Worker;
use crate::clock;
use crate::meters::METERS;
use crate::speculation::journal::Planned;
use crate::speculation::journal::page::Trigger;
use crate::speculation::planning::schedule::Plan;
use crate::speculation::planning::verdict::{Outlook, Verdict};
use crate::speculation::records::parent::WeakKey;
use crate::speculation::workshop::{Beneficiary, News};

impl Worker {
    /// Tells the engine what is planned, for the journals of those for whom it is. Comes after what
    /// is ready was announced.
    pub(super) async fn report_verdicts(&mut self, trigger: Trigger) {
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

    pub(super) fn report_unadaptable(&mut self) {
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
