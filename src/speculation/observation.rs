//! What the proxy's taps tell the engine: raw bytes, decoded here and off the path.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderValue;
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::flights::FlightKey;
use crate::backend::remote::decode_request_metadata;
use crate::grpc::{FRAME_HEADER, Framed, joined, split_message};
use crate::reapi::google::longrunning::{Operation, operation};
use crate::reapi::{ActionResult, ExecuteResponse, RequestMetadata};
use crate::workspace::peer::Peer;

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
    Lookup(Call),
    /// An `Execute` was answered to its end.
    Execution(Call),
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
    /// What the client was told.
    pub answer: Answer,
}

impl Call {
    /// The result at the end of an `Execute`.
    ///
    /// # Errors
    /// What was said in its place.
    pub fn executed(&self) -> Result<ActionResult, String> {
        if self.answer.status != Some(tonic::Code::Ok as u32) {
            let status = self.answer.status.map_or(tonic::Code::Unknown, |status| {
                tonic::Code::from_i32(i32::try_from(status).unwrap_or(i32::MAX))
            });
            return Err(format!("{status:?}"));
        }
        let operation: Operation = self.answer.last_message().ok_or("no operation was sent")?;
        let response = match operation.result {
            Some(operation::Result::Response(any)) => any,
            Some(operation::Result::Error(status)) => return Err(status.message),
            None => return Err("the operation was not done".to_owned()),
        };
        let response: ExecuteResponse =
            prost::Message::decode(response.value.as_ref()).map_err(|error| error.to_string())?;
        let status = response.status.unwrap_or_default();
        let code = tonic::Code::from_i32(status.code);
        response
            .result
            .filter(|_| code == tonic::Code::Ok)
            .ok_or_else(|| format!("{code:?}: {}", status.message))
    }
}

/// The answer to a call: its gRPC status and its body as it was sent.
#[derive(Debug, Default)]
pub struct Answer {
    /// gRPC status code; `None` if the call was cut off before it had one.
    pub status: Option<u32>,
    /// Length-prefixed messages, split anywhere.
    body: Vec<Bytes>,
    /// The share of the taps' memory that the body takes.
    room: Option<OwnedSemaphorePermit>,
}

impl Answer {
    /// An answer of status OK with one message.
    pub fn of_message(framed: Bytes) -> Self {
        Answer {
            status: Some(0),
            body: vec![framed],
            room: None,
        }
    }

    /// Adds a chunk of the body, with the memory that was set aside for it.
    pub fn push(&mut self, chunk: Bytes, room: OwnedSemaphorePermit) {
        self.body.push(chunk);
        match &mut self.room {
            Some(all) => all.merge(room),
            None => self.room = Some(room),
        }
    }

    /// Whether the call broke off, and what it was about may still be under way.
    pub fn is_cut_off(&self) -> bool {
        use tonic::Code::{Cancelled, DeadlineExceeded, Unavailable};
        let codes = [Cancelled, DeadlineExceeded, Unavailable];
        let cut_off = |status| codes.iter().any(|code| *code as u32 == status);
        self.status.is_none_or(cut_off)
    }

    /// The first message, if it is there, decoded if it can be.
    pub fn first_message<M: Message + Default>(&self) -> Option<Option<M>> {
        match split_message(&mut joined(&self.body))? {
            Framed::Plain(message) => Some(M::decode(message).ok()),
            Framed::Compressed => Some(None),
        }
    }

    /// The last message, decoded. `None` if there is none, or if it is compressed or malformed.
    pub fn last_message<M: Message + Default>(&self) -> Option<M> {
        let mut body = joined(&self.body);
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

    #[test]
    fn the_last_message_is_decoded_however_the_body_was_split() {
        let frame = |exit_code| {
            let message = ActionResult {
                exit_code,
                ..ActionResult::default()
            }
            .encode_to_vec();
            let mut framed = vec![0];
            framed.extend_from_slice(&(message.len() as u32).to_be_bytes());
            framed.extend_from_slice(&message);
            framed
        };
        let whole = Bytes::from([frame(1), frame(2)].concat());
        for split in 0..whole.len() {
            let answer = Answer {
                status: Some(0),
                body: vec![whole.slice(..split), whole.slice(split..)],
                room: None,
            };
            let last: ActionResult = answer.last_message().unwrap();
            assert_eq!(last.exit_code, 2);
        }
        let truncated = Answer::of_message(whole.slice(..whole.len() - 1));
        assert_eq!(truncated.last_message::<ActionResult>(), None);
    }
}
