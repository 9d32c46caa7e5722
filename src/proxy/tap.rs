//! Taps: copies of reference-counted frames of the few methods that are observed. A tap never
//! waits and never holds more than a bound; what it cannot keep it gives up and counts.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use crate::grpc;
use crate::http2::fields::Fields;
use crate::http2::pump::Witness;
use crate::reapi::google::longrunning::Operation;
use crate::speculation::Engine;
use crate::speculation::clients::observation::{Answer, Call, NotExecuted, Observation};

/// The largest answer that a tap keeps. An `ActionResult` is far smaller.
const MAX_ANSWER: usize = 8 * 1024 * 1024;

/// Which of the observed calls this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// `GetActionResult`.
    Lookup,
    /// `Execute`.
    Execution,
}

/// What is not observed is not witnessed either.
impl Witness for Option<Tap> {
    fn data(&mut self, chunk: &Bytes) {
        if let Some(tap) = self {
            tap.data(chunk);
        }
    }

    fn end(&mut self, trailers: Option<&Fields>) {
        if let Some(tap) = self.take() {
            tap.end(trailers.and_then(grpc::status));
        }
    }
}

/// Collects the answer to one call and tells the engine when it is complete.
pub struct Tap {
    engine: Arc<Engine>,
    method: Method,
    call: Box<Call>,
    size: usize,
    given_up: bool,
    /// Whether it is known what the upstream calls the execution.
    named: bool,
    /// Kept until the answer is complete, then dropped.
    _while_open: Option<Box<dyn Send>>,
}

impl Tap {
    /// A tap for a call that has just begun.
    pub fn new(engine: Arc<Engine>, method: Method, call: Box<Call>) -> Self {
        Tap {
            engine,
            method,
            call,
            size: 0,
            given_up: false,
            named: false,
            _while_open: None,
        }
    }

    /// Keeps `guard` for as long as the call is open.
    pub fn holding(mut self, guard: impl Send + 'static) -> Self {
        self._while_open = Some(Box::new(guard));
        self
    }

    /// Sees one chunk of the body.
    fn data(&mut self, chunk: &Bytes) {
        self.size += chunk.len();
        if self.given_up {
            return;
        }
        let fits = self.size <= MAX_ANSWER;
        match self.engine.room_for(chunk.len()).filter(|_| fits) {
            Some(room) => {
                self.call.answer.push(chunk.clone(), room);
                self.learn_name();
            }
            None => {
                self.given_up = true;
                self.call.answer = Answer::default();
            }
        }
    }

    /// The first message of an execution says by which name it can be waited for.
    fn learn_name(&mut self) {
        if self.named || self.method != Method::Execution {
            return;
        }
        if let Some(first) = self.call.answer.first_message() {
            self.named = true;
            if let Some(Operation { name, .. }) = first {
                self.engine.name_operation(name, &self.call.key);
            }
        }
    }

    /// The call has ended with `status`.
    pub fn end(mut self, status: Option<u32>) {
        if self.given_up {
            self.engine.count_dropped();
            return;
        }
        self.call.answer.status = status;
        self.call.ended = Instant::now();
        self.engine.observe(match self.method {
            Method::Lookup => Observation::Lookup(self.call),
            Method::Execution => Observation::Execution(self.call),
        });
    }

    /// The client has left before the end of its call. If it was told all that an execution brings,
    /// it has what it wanted.
    pub fn left(self) {
        let may_go_on = |why: NotExecuted| why.may_go_on;
        if self.method == Method::Execution && !self.call.answer.executed().is_err_and(may_go_on) {
            self.end(None);
        }
    }

    /// The call has ended with an answer that primed gave itself.
    pub fn end_with(mut self, answer: Answer) {
        self.call.answer = answer;
        let status = self.call.answer.status;
        self.end(status);
    }
}
