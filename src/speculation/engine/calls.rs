//! Calls that were answered: each is counted for the build on whose behalf it was made, and its
//! action is kept for recording.

use std::sync::Arc;
use std::time::Duration;

use super::State;
use crate::clock::Moment;
use crate::meters::METERS;
use crate::reapi::ActionResult;
use crate::speculation::clients::builds::Build;
use crate::speculation::clients::caller::{BuildKey, Caller};
use crate::speculation::clients::observation::{Call, CallOrigin, NotExecuted};
use crate::speculation::clients::subaction::Subaction;
use crate::speculation::flights::durations::execution_time;
use crate::speculation::flights::lane_width::Executed;
use crate::speculation::flights::{FlightKey, Flights};
use crate::speculation::journal::Note;
use crate::speculation::journal::accounting::Asked;
use crate::speculation::nested::Answered;
use crate::speculation::priming::{Group, Message};

/// Subactions of one build that are kept for recording.
const MAX_SUBACTIONS: usize = 200_000;

impl State {
    /// Counts and keeps an answered call, as soon as it is known on whose behalf it was made.
    pub(super) fn answered(&mut self, answered: Answered) {
        if let Some((answered, parent)) = self.nested.decide(answered) {
            self.attributed(answered, parent.as_ref());
        }
    }

    pub(super) fn attributed(&mut self, answered: Answered, parent: Option<&FlightKey>) {
        match answered {
            Answered::Lookup(call) => self.lookup(call, parent),
            Answered::Execution(call) => self.execution(call, parent),
        }
    }

    /// The build on whose behalf a call was made.
    fn build_for(&mut self, origin: &CallOrigin, parent: Option<&FlightKey>) -> &mut Build {
        let key = parent.map(|parent| BuildKey::Action(parent.clone()));
        match key.filter(|key| self.open.contains_key(key)) {
            Some(key) => self.is_called(&key),
            None => self.build_of(origin),
        }
    }

    fn lookup(&mut self, call: Box<Call>, parent: Option<&FlightKey>) {
        const OK: u32 = tonic::Code::Ok as u32;
        const NOT_FOUND: u32 = tonic::Code::NotFound as u32;
        match call.answer.status {
            Some(OK) => {
                let result = call.answer.last_message().map(Arc::new);
                self.asked_for(call, result, parent);
            }
            Some(NOT_FOUND) => {
                let note = note(self.now, &call, None);
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
            Ok(result) => (Some(Arc::new(result)), true),
            Err(NotExecuted { reason, may_go_on }) => {
                tracing::info!(action = %call.key.action, reason, "an execution ended without a result");
                (None, !may_go_on)
            }
        };
        if ended {
            // It may be a parent, though it is not known yet for one.
            let succeeded = result.clone().filter(|result| result.exit_code == 0);
            self.end_parent(&call.key, succeeded);
        }
        if call.joined.is_none() {
            if let Some(result) = &result
                && !call.answer.is_cached()
                && let Some(executed) = Executed::of(result, call.began, call.ended)
            {
                self.workshop.flights.learn(executed);
            }
            let note = note(self.now, &call, result.as_deref());
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
        result: Option<Arc<ActionResult>>,
        parent: Option<&FlightKey>,
    ) {
        let flights = self.workshop.flights.clone();
        let note = note(self.now, &call, result.as_deref());
        let client = match parent {
            None => self.client_in_run(&call.origin),
            Some(_) => None,
        };
        let build = self.build_for(&call.origin, parent);
        let had_used = build.has_used();
        match call.joined {
            Some(waited) => {
                let saved = note.executed.saturating_sub(waited);
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
            if !result.stdout_raw.is_empty() || !result.stderr_raw.is_empty() {
                let result = Arc::make_mut(&mut result);
                result.stdout_raw.clear();
                result.stderr_raw.clear();
            }
            result
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
        &mut self,
        caller: &Arc<Caller>,
        key: &FlightKey,
        parent: Option<&FlightKey>,
        message: impl FnOnce() -> Message,
    ) {
        if self.primings.is_empty() {
            return;
        }
        let group = match parent.and_then(|parent| self.nested.group(parent)) {
            Some(group) => group.clone(),
            None => Group::Invocation(self.callers.weak_key(caller, key)),
        };
        if let Some(priming) = self.primings.get(&group) {
            priming.tell(message());
        }
    }
}

/// What the journal notes of a call.
fn note(now: Moment, call: &Call, result: Option<&ActionResult>) -> Note {
    Note {
        began_unix_ms: now.unix_ms_at(call.began),
        answered_unix_ms: now.unix_ms_at(call.ended),
        executed: result.and_then(execution_time).unwrap_or_default(),
    }
}

/// Notes the use of a result that a flight has brought. Returns how long it had been there.
fn use_result(flights: &Flights, key: &FlightKey, now_unix_ms: i64) -> Option<Duration> {
    let record = flights.record(key)?;
    Some(record.used(now_unix_ms))
}
