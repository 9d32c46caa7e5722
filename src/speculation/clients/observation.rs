//! What the proxy's taps tell the engine: raw bytes, decoded here and off the path.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderValue;
use prost::Message;
use tokio::sync::oneshot;

use crate::backend::remote::decode_request_metadata;
use crate::chunks::Chunks;
use crate::grpc::{FRAME_HEADER, Framed, split_message};
use crate::reapi::google::longrunning::{Operation, operation};
use crate::reapi::{ActionResult, ExecuteResponse, RequestMetadata};
use crate::speculation::flights::FlightKey;
use crate::speculation::room::Room;
use crate::workspace::peer::Peer;

/// How much of clients' answers taps and the engine's queue hold in all, in bytes.
pub const MAX_TAP_MEMORY: usize = 64 * 1024 * 1024;

/// The share of one answer in that.
pub type TapMemory = Room<MAX_TAP_MEMORY>;

/// Where a call came from.
#[derive(Clone, Debug)]
pub struct CallOrigin {
    /// The connection.
    pub peer: Arc<Peer>,
    /// REAPI's `RequestMetadata`, still encoded.
    pub metadata: Option<HeaderValue>,
}

impl CallOrigin {
    /// Decodes the `RequestMetadata`; empty where there is none.
    pub fn request_metadata(&self) -> RequestMetadata {
        self.metadata
            .as_ref()
            .and_then(decode_request_metadata)
            .unwrap_or_default()
    }
}

/// One thing that the proxy saw.
#[derive(Debug)]
pub enum Observation {
    /// The first call on a connection has begun.
    FirstCall(CallOrigin),
    /// A client's own `Execute` has begun.
    Executing {
        /// Who executes.
        origin: CallOrigin,
        /// The action.
        key: FlightKey,
    },
    /// A `GetActionResult` was answered.
    Lookup(Box<Call>),
    /// An `Execute` was answered to its end.
    Execution(Box<Call>),
    /// A lookup found nothing, and the client would now be told so. The engine drops `reply`
    /// once it has worked out whether the action is about to be executed.
    Question {
        /// Who asked.
        origin: CallOrigin,
        /// What was looked up.
        key: FlightKey,
        /// Closed when the question is answered: see `Flights::join`.
        reply: oneshot::Sender<()>,
    },
    /// The result of an open parent has arrived, and is held back until the engine drops `reply`:
    /// when `Subactions` knows all of it, or as much as there will be.
    Completing {
        /// The parent's action.
        key: FlightKey,
        /// Closed when the result may go on.
        reply: oneshot::Sender<()>,
    },
    /// A connection has ended.
    Disconnected(u64),
}

/// A call about one action, with its answer.
#[derive(Debug)]
pub struct Call {
    /// Who called.
    pub origin: CallOrigin,
    /// The action it was about.
    pub key: FlightKey,
    /// How long the client waited for a flight that it joined; `None` if it joined none.
    pub joined: Option<Duration>,
    /// When it began.
    pub began: Instant,
    /// When its answer was complete.
    pub ended: Instant,
    /// What the client was told.
    pub answer: Answer,
}

/// Why an `Execute` has no result.
#[derive(Debug)]
pub struct NotExecuted {
    /// What was said in its place.
    pub reason: String,
    /// Whether only the call has ended, and what it was about may still be under way: whoever loses
    /// the stream may go on waiting for the operation.
    pub may_go_on: bool,
}

/// The answer to a call: its gRPC status and its body as it was sent.
#[derive(Debug, Default)]
pub struct Answer {
    /// gRPC status code; `None` if the call was cut off before it had one.
    pub status: Option<u32>,
    /// Length-prefixed messages, split anywhere.
    body: Chunks,
    /// The share of the taps' memory that the body takes.
    room: Option<TapMemory>,
}

/// Whether a call of `Execute` that ended with `status`, and no operation that is done, may have left
/// an execution that goes on.
pub fn may_go_on(status: Option<u32>) -> bool {
    use tonic::Code::{Cancelled, DeadlineExceeded, Unavailable};
    status.is_none_or(|status| {
        [Cancelled, DeadlineExceeded, Unavailable].contains(&tonic::Code::from_i32(status as i32))
    })
}

impl Answer {
    /// An answer of status OK with one message.
    pub fn of_message(framed: Bytes) -> Self {
        Answer {
            status: Some(0),
            body: framed.into(),
            room: None,
        }
    }

    /// Adds a chunk of the body, with the memory that was set aside for it.
    pub fn push(&mut self, chunk: Bytes, room: TapMemory) {
        self.body.push(chunk);
        match &mut self.room {
            Some(all) => all.join(room),
            None => self.room = Some(room),
        }
    }

    /// The result at the end of an `Execute`. A client that has it need not wait for the status of
    /// the call, so a call without one has ended too if its operation is done.
    ///
    /// # Errors
    /// What was said in its place.
    pub fn executed(&self) -> Result<ActionResult, NotExecuted> {
        let operation: Operation = self.last_message().unwrap_or_default();
        let Some(done) = operation.result else {
            return Err(self.without_operation());
        };
        let ended = |reason| NotExecuted {
            reason,
            may_go_on: false,
        };
        let response = match done {
            operation::Result::Response(any) => any,
            operation::Result::Error(status) => return Err(ended(status.message)),
        };
        let response: ExecuteResponse = prost::Message::decode(response.value.as_ref())
            .map_err(|error| ended(error.to_string()))?;
        let status = response.status.unwrap_or_default();
        let code = tonic::Code::from_i32(status.code);
        response
            .result
            .filter(|_| code == tonic::Code::Ok)
            .ok_or_else(|| ended(format!("{code:?}: {}", status.message)))
    }

    /// Whether the result at the end of an `Execute` was in the action cache: nothing was executed.
    pub fn is_cached(&self) -> bool {
        let operation: Option<Operation> = self.last_message();
        let Some(operation::Result::Response(any)) = operation.and_then(|it| it.result) else {
            return false;
        };
        ExecuteResponse::decode(any.value.as_ref()).is_ok_and(|response| response.cached_result)
    }

    /// What became of an `Execute` whose last operation is not done.
    fn without_operation(&self) -> NotExecuted {
        use tonic::Code::{Ok, Unknown};
        let code = self
            .status
            .map(|status| i32::try_from(status).map_or(Unknown, tonic::Code::from_i32));
        let reason = match code {
            None => "the call was cut off".to_owned(),
            Some(Ok) => "the operation was not done".to_owned(),
            Some(code) => format!("{code:?}"),
        };
        NotExecuted {
            reason,
            may_go_on: may_go_on(self.status),
        }
    }

    /// The first message, if it is there, decoded if it can be.
    pub fn first_message<M: Message + Default>(&self) -> Option<Option<M>> {
        match split_message(&mut self.body.joined())? {
            Framed::Plain(message) => Some(M::decode(message).ok()),
            Framed::Compressed => Some(None),
        }
    }

    /// The last message, decoded. `None` if there is none, or if it is compressed or malformed.
    pub fn last_message<M: Message + Default>(&self) -> Option<M> {
        let mut body = self.body.joined();
        let mut last = None;
        while body.len() >= FRAME_HEADER {
            last = Some(split_message(&mut body)?);
        }
        match last? {
            Framed::Plain(message) => M::decode(message).ok(),
            Framed::Compressed => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(message: &impl Message) -> Bytes {
        let message = message.encode_to_vec();
        let length = (message.len() as u32).to_be_bytes();
        Bytes::from([&[0][..], &length, &message].concat())
    }

    #[test]
    fn the_last_message_is_decoded_however_the_body_was_split() {
        let frame = |exit_code| {
            frame(&ActionResult {
                exit_code,
                ..ActionResult::default()
            })
        };
        let whole = Bytes::from([frame(1), frame(2)].concat());
        for split in 0..whole.len() {
            let answer = Answer {
                status: Some(0),
                body: [whole.slice(..split), whole.slice(split..)]
                    .into_iter()
                    .collect(),
                room: None,
            };
            let last: ActionResult = answer.last_message().unwrap();
            assert_eq!(last.exit_code, 2);
        }
        let truncated = Answer::of_message(whole.slice(..whole.len() - 1));
        assert_eq!(truncated.last_message::<ActionResult>(), None);
    }

    /// The answer to an `Execute` of which `operation` was the last that arrived.
    fn of_execute(operation: &Operation, status: Option<u32>) -> Answer {
        Answer {
            status,
            ..Answer::of_message(frame(operation))
        }
    }

    #[test]
    fn an_execute_has_ended_once_its_operation_is_done_whatever_became_of_the_call() {
        let done = Operation {
            done: true,
            result: Some(operation::Result::Response(prost_types::Any {
                type_url: String::new(),
                value: ExecuteResponse {
                    result: Some(ActionResult::default()),
                    ..ExecuteResponse::default()
                }
                .encode_to_vec(),
            })),
            ..Operation::default()
        };
        for status in [None, Some(0), Some(tonic::Code::Unavailable as u32)] {
            assert!(of_execute(&done, status).executed().is_ok(), "{status:?}");
        }
        let failed = Operation {
            result: Some(operation::Result::Error(Default::default())),
            ..done
        };
        assert!(!of_execute(&failed, None).executed().unwrap_err().may_go_on);
    }

    #[test]
    fn an_execute_that_is_cut_off_before_its_operation_is_done_may_go_on() {
        let running = Operation::default();
        let may_go_on = |status| {
            of_execute(&running, status)
                .executed()
                .unwrap_err()
                .may_go_on
        };
        assert!(may_go_on(None));
        assert!(may_go_on(Some(tonic::Code::Unavailable as u32)));
        assert!(!may_go_on(Some(0)));
        assert!(!may_go_on(Some(tonic::Code::FailedPrecondition as u32)));
    }
}
