//! What became of a flight, and when. `flights` writes it; the journals of builds, which outlive the
//! flight, read it.

use std::time::Duration;

use parking_lot::Mutex;
use tracing::field::Empty;

use super::Ending;
use crate::cas::Digest;
use crate::clock;
use crate::clock::millis;
use crate::meters::METERS;

/// The record of one flight, from its announcement to the first use of its result.
#[derive(Debug)]
pub struct FlightRecord {
    flown: Mutex<Flown>,
    /// Until it is over.
    spans: Mutex<Option<Spans>>,
}

/// What a trace shows of it.
#[derive(Debug)]
struct Spans {
    /// From its announcement to its end.
    whole: tracing::Span,
    /// While it is with the backend.
    _execution: tracing::Span,
}

/// The state of a flight. Times are milliseconds since 1970.
#[derive(Clone, Debug)]
pub struct Flown {
    /// When it was announced.
    pub announced_unix_ms: i64,
    /// When it was given to the backend.
    pub started_unix_ms: Option<i64>,
    /// When it was over.
    pub ended_unix_ms: Option<i64>,
    /// Where it is, or how it ended.
    pub course: Course,
    /// Why, where that is not plain.
    pub reason: Option<String>,
    /// How long the action that it was adapted from ran; zero where that is not known.
    pub expected: Duration,
    /// How long the worker ran it.
    pub execution: Duration,
    /// When a client had its result first.
    pub used_unix_ms: Option<i64>,
}

/// Where a flight is, or how it ended: `Stage` and `Ending` without what they carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Course {
    /// It waits for its uploads or its turn.
    Queued,
    /// It is with the backend.
    Running,
    /// Executed with exit code 0.
    Primed,
    /// Its result was there already.
    Cached,
    /// Executed with another exit code.
    Failed,
    /// Not executed, or not to its end.
    Abandoned,
}

impl Course {
    /// Whether it is over.
    pub fn is_over(self) -> bool {
        !matches!(self, Course::Queued | Course::Running)
    }
}

impl FlightRecord {
    /// Of a flight that is announced now.
    pub fn announced(action: Digest) -> Self {
        let flown = Flown {
            announced_unix_ms: clock::now_unix_ms(),
            started_unix_ms: None,
            ended_unix_ms: None,
            course: Course::Queued,
            reason: None,
            expected: Duration::ZERO,
            execution: Duration::ZERO,
            used_unix_ms: None,
        };
        let whole = tracing::debug_span!(
            "speculative action", %action, outcome = Empty, execution_ms = Empty
        );
        FlightRecord {
            flown: Mutex::new(flown),
            spans: Mutex::new(Some(Spans {
                whole,
                _execution: tracing::Span::none(),
            })),
        }
    }

    /// How long it is expected to run.
    pub fn expect(&self, duration: Duration) {
        self.flown.lock().expected = duration;
    }

    /// It is given to the backend.
    pub fn start(&self) {
        let mut flown = self.flown.lock();
        flown.course = Course::Running;
        flown.started_unix_ms = Some(clock::now_unix_ms());
        if let Some(spans) = &mut *self.spans.lock() {
            spans._execution = tracing::debug_span!(parent: &spans.whole, "execution");
        }
    }

    /// It was given to the backend, and is queued again.
    pub fn queue_again(&self) {
        let mut flown = self.flown.lock();
        flown.course = Course::Queued;
        flown.started_unix_ms = None;
        if let Some(spans) = &mut *self.spans.lock() {
            spans._execution = tracing::Span::none();
        }
    }

    /// Says why it will end as it does.
    pub fn because(&self, reason: String) {
        self.flown.lock().reason = Some(reason);
    }

    /// How long the worker ran it.
    pub fn executed_for(&self, execution: Duration) {
        self.flown.lock().execution = execution;
    }

    /// It is over.
    pub fn end(&self, ending: &Ending) {
        let mut flown = self.flown.lock();
        flown.ended_unix_ms = Some(clock::now_unix_ms());
        let (course, counter) = match ending {
            Ending::Cached => (Course::Cached, &METERS.found),
            Ending::Succeeded(_) => (Course::Primed, &METERS.primed),
            Ending::Failed => (Course::Failed, &METERS.failed),
            Ending::Abandoned => (Course::Abandoned, &METERS.abandoned),
        };
        flown.course = course;
        counter.add(1);
        if flown.execution > Duration::ZERO {
            METERS.execution.add(flown.execution);
        }
        let execution_ms = millis(flown.execution);
        drop(flown);
        if let Some(Spans { whole, .. }) = self.spans.lock().take() {
            let outcome = tracing::field::debug(course);
            whole
                .record("outcome", outcome)
                .record("execution_ms", execution_ms);
        }
    }

    /// A client has its result, at `now_unix_ms`. Returns the lead: how long the result had been
    /// there before its first use.
    pub fn used(&self, now_unix_ms: i64) -> Duration {
        let mut flown = self.flown.lock();
        if flown.course == Course::Primed && flown.used_unix_ms.is_none() {
            METERS.used.add(1);
            METERS.used_time.add(flown.execution);
        }
        let used = *flown.used_unix_ms.get_or_insert(now_unix_ms);
        let lead = used - flown.ended_unix_ms.unwrap_or(used);
        Duration::from_millis(lead.try_into().unwrap_or(0))
    }

    /// What is known of it now.
    pub fn flown(&self) -> Flown {
        self.flown.lock().clone()
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        self.flown.lock().course.is_over()
    }
}
