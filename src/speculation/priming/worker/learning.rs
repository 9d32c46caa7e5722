//! What a build shows: its workspace, what it executes that was not foreseen, and what it uses.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::super::trust::Trust;
use super::{Span, Worker};
use crate::cas::Digest;
use crate::speculation::flights::FlightKey;
use crate::speculation::journal::page::Trigger;
use crate::speculation::planning::schedule::Plan;
use crate::speculation::records::parent::action_parts;
use crate::speculation::workshop::Workshop;
use crate::task;

/// Recorded forms of one action that what a client executes is compared with.
const MAX_BASES: usize = 16;
/// To plan for what was learned may take half of the time, but for plans that take no longer.
const SHORT_PLANNING: Duration = Duration::from_millis(50);
/// Looking at the workspace again for a miss may take this part of the time: one tenth.
const SCAN_SHARE: u32 = 10;

impl Worker {
    /// Whether a miss at `asked` is a reason to look at the workspace again: something may have
    /// been edited or generated since the last look, but looking must stay cheap.
    pub(super) fn may_scan_for(&self, asked: Instant) -> bool {
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
    pub(super) async fn look_at_workspace(&mut self, trigger: Trigger) {
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
    pub(super) async fn learn_from(&mut self, key: FlightKey) {
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
    pub(super) async fn expects(&mut self, key: &FlightKey) -> bool {
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
    pub(super) fn trust_after(&mut self, note: impl FnOnce(&mut Trust)) {
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
    pub(super) fn may_plan_at(&self) -> Instant {
        match &self.last_planning {
            Some(Span { began, ended }) if *ended - *began > SHORT_PLANNING => {
                *ended + (*ended - *began)
            }
            _ => Instant::now(),
        }
    }
}
