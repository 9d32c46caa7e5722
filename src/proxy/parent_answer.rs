//! Answers about action parents, which gain `ActionResult.subactions` on their way to the client
//! where the backend has left that empty. All other messages pass at once and as they came; those
//! that are compressed or very long do so too.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::header::CONTENT_LENGTH;
use http_body::Frame;

use super::subactions::Unfilled;
use super::tap::Method;
use crate::backend::exchange::Answer;
use crate::grpc::{self, FRAME_HEADER, Prefix};
use crate::http2::body::{Body, BodyError};
use crate::speculation::Engine;
use crate::speculation::flights::FlightKey;

/// The longest message that gRPC clients take unless they are told otherwise. None becomes longer
/// than this; some 50,000 subactions have room.
const MAX_MESSAGE: usize = 4 * 1024 * 1024;

/// The answer that the client gets for `answer`, to a call about the action `key`. That an
/// `Execute` is about a parent may become known while it runs.
pub fn completing(
    engine: &Arc<Engine>,
    key: &FlightKey,
    method: Method,
    mut answer: Box<Answer>,
) -> Box<Answer> {
    let is_looked_at = match method {
        // By then it is too late for what has said how long it is.
        Method::Execution if !answer.head.headers.contains_key(&CONTENT_LENGTH) => true,
        Method::Execution | Method::Lookup => engine.subactions().expects(key),
    };
    if !is_looked_at || answer.is_end_stream() {
        return answer;
    }
    answer.head.headers.remove(&CONTENT_LENGTH);
    let call = ParentCall::new(engine, key, method);
    answer.with_body(|body| Body::made(ParentAnswer::new(call, body)))
}

/// The last message that the client gets for `operation`, which ended an execution of `key`.
pub async fn completed(engine: &Arc<Engine>, key: &FlightKey, operation: Bytes) -> Bytes {
    let call = ParentCall::new(engine, key, Method::Execution);
    match call.unfilled(operation.clone()) {
        Some(unfilled) if call.is_about_parent() => call.filled(unfilled, operation).await,
        _ => operation,
    }
}

/// A call about an action that may be a parent.
#[derive(Clone)]
struct ParentCall {
    engine: Arc<Engine>,
    key: FlightKey,
    method: Method,
}

impl ParentCall {
    fn new(engine: &Arc<Engine>, key: &FlightKey, method: Method) -> Self {
        ParentCall {
            engine: engine.clone(),
            key: key.clone(),
            method,
        }
    }

    fn is_about_parent(&self) -> bool {
        self.engine.subactions().expects(&self.key)
    }

    /// `message`, if it is one that can be filled.
    fn unfilled(&self, message: Bytes) -> Option<Unfilled> {
        match self.method {
            Method::Lookup => Unfilled::result(message),
            Method::Execution => Unfilled::operation(message),
        }
    }

    async fn filled(self, unfilled: Unfilled, message: Bytes) -> Bytes {
        let digests = self.engine.subactions_of(&self.key).await;
        let filled = digests.map(|digests| unfilled.filled(&digests));
        filled
            .filter(|filled| filled.len() <= MAX_MESSAGE)
            .unwrap_or(message)
    }
}

/// The body of an answer in which messages are looked at once the call is about a parent.
struct ParentAnswer {
    call: ParentCall,
    body: Body,
    passing: Passing,
    /// What has been read of messages that are to be looked at.
    held: BytesMut,
    /// The message that is being completed.
    completing: Option<Pin<Box<dyn Future<Output = Bytes> + Send>>>,
}

impl ParentAnswer {
    fn new(call: ParentCall, body: Body) -> Self {
        ParentAnswer {
            call,
            body,
            passing: Passing::default(),
            held: BytesMut::new(),
            completing: None,
        }
    }

    /// The next of what is held that can pass, if there is any. What passes in another form is
    /// `completing` instead.
    fn release(&mut self) -> Option<Bytes> {
        if self.held.is_empty() {
            return None;
        }
        if self.passing.is_between_messages() {
            let Prefix { compressed, length } = grpc::prefix(&self.held)?;
            if !compressed && length <= MAX_MESSAGE {
                if self.held.len() < FRAME_HEADER + length {
                    return None;
                }
                let framed = self.held.split_to(FRAME_HEADER + length).freeze();
                let message = framed.slice(FRAME_HEADER..);
                let Some(unfilled) = self.call.unfilled(message.clone()) else {
                    return Some(framed);
                };
                let filled = self.call.clone().filled(unfilled, message);
                self.completing = Some(Box::pin(filled));
                return None;
            }
        }
        let size = self.passing.pass(&self.held);
        Some(self.held.split_to(size).freeze())
    }
}

impl http_body::Body for ParentAnswer {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let data = loop {
            if let Some(completing) = &mut this.completing {
                let message = ready!(completing.as_mut().poll(cx));
                this.completing = None;
                break grpc::framed(&message);
            }
            if let Some(released) = this.release() {
                break released;
            }
            if this.completing.is_some() {
                continue;
            }
            match ready!(this.body.poll_data(cx)).transpose()? {
                Some(chunk) if !this.held.is_empty() || this.call.is_about_parent() => {
                    this.held.extend_from_slice(&chunk);
                }
                Some(chunk) => {
                    this.passing.pass_all(&chunk);
                    break chunk;
                }
                // A message that is cut off.
                None if !this.held.is_empty() => break this.held.split().freeze(),
                None => {
                    let trailers = ready!(this.body.poll_trailers(cx))?;
                    return Poll::Ready(
                        trailers.map(|trailers| Ok(Frame::trailers(trailers.to_map()))),
                    );
                }
            }
        };
        Poll::Ready(Some(Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.held.is_empty() && self.completing.is_none() && self.body.is_end_stream()
    }
}

/// Follows messages that pass without being looked at, to know where the next one begins.
#[derive(Default)]
struct Passing {
    /// What has passed of a prefix that is not complete yet.
    prefix: Vec<u8>,
    /// How much of a message is still to come.
    rest: usize,
}

impl Passing {
    fn is_between_messages(&self) -> bool {
        self.prefix.is_empty() && self.rest == 0
    }

    /// Lets so much of `chunk` pass as belongs to one message, and returns how much that is.
    fn pass(&mut self, chunk: &[u8]) -> usize {
        let mut passed = 0;
        if self.rest == 0 {
            passed = chunk.len().min(FRAME_HEADER - self.prefix.len());
            self.prefix.extend_from_slice(&chunk[..passed]);
            let Some(Prefix { length, .. }) = grpc::prefix(&self.prefix) else {
                return passed;
            };
            self.prefix.clear();
            self.rest = length;
        }
        let of_message = self.rest.min(chunk.len() - passed);
        self.rest -= of_message;
        passed + of_message
    }

    fn pass_all(&mut self, mut chunk: &[u8]) {
        while !chunk.is_empty() {
            chunk = &chunk[self.pass(chunk)..];
        }
    }
}
