//! Builds end: when their process does, when they have been silent for long enough, or when they are
//! told to. What was asked for is recorded, and the journal is kept.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::State;
use crate::speculation::clients::caller::BuildKey;
use crate::speculation::journal::Journal;
use crate::speculation::journal::accounting::BuildStatus;
use crate::speculation::journal::store::Fresh;
use crate::speculation::priming::Group;
use crate::speculation::recording::recorder::{self, Ended};
use crate::speculation::records::parent::ExecutedParent;
use crate::{clock, task};

/// Builds that `primed status` still knows after they have ended.
const REMEMBERED_BUILDS: usize = 100;
/// A client below no build tool has ended its build when it was silent for this long.
const QUIET_TIME: Duration = Duration::from_secs(10);
/// Builds that have ended and whose journals wait for what is in flight.
const MAX_UNSETTLED: usize = 16;

impl State {
    /// Ends a build: what is queued for it is withdrawn, and it is recorded.
    pub(super) fn close(&mut self, key: &BuildKey) {
        match key {
            BuildKey::Action(parent) => self.end_parent(&parent.clone(), None),
            _ => self.close_with(key, None),
        }
    }

    pub(super) fn close_with(&mut self, key: &BuildKey, executed: Option<Arc<ExecutedParent>>) {
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
            task::blocking("uses of predictions", move || {
                uses.end_build(journal.parents(), journal.flights());
            })
            .await;
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
    pub(super) fn settle_journals(&mut self) {
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

    /// Ends the builds that belong to no build tool and have been silent for long enough.
    pub(super) fn close_silent(&mut self) {
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

    pub(super) fn next_quiet(&self) -> Instant {
        let by_calls = self
            .open
            .values()
            .filter(|build| build.caller.ends_by_silence);
        let next = by_calls.map(|build| build.last_call + QUIET_TIME).min();
        next.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600))
    }

    /// Ends the builds whose process is gone, without waiting to be told.
    pub(super) fn close_exited(&mut self) {
        let gone =
            |key: &&BuildKey| matches!(key, BuildKey::Process(process) if !process.is_alive());
        let exited: Vec<BuildKey> = self.open.keys().filter(gone).cloned().collect();
        for key in exited {
            self.close(&key);
        }
    }
}
