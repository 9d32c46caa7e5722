//! One call on its way upstream: the request is moved along while the answer is waited for.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::Frame;

use crate::chunks::Chunks;
use crate::grpc;
use crate::http2::body::{Body, BodyError};
use crate::http2::connection::Calls;
use crate::http2::fields::Fields;
use crate::http2::frame::Reason;
use crate::http2::hpack::Pseudo;
use crate::http2::pump::{Pump, PumpError, Witness};
use crate::http2::stream::{AnswerHead, Incoming, Outgoing, StreamError};

/// A request of which no more than this has been sent can be sent again, to another connection. As much
/// as most load balancers take of a call at which they have not looked.
const MAX_KEPT: usize = 64 * 1024;

/// Why a call got no answer, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The upstream reset the stream; what that means is for the client to say.
    #[error("the upstream reset the call: {0}")]
    Reset(Reason),
    /// The connection broke, or was given up.
    #[error("the connection to the upstream broke off: {0}")]
    Broken(StreamError),
    /// The sender of the request broke off; there is nobody left to answer.
    #[error("the request broke off: {0}")]
    Request(BodyError),
}

impl From<BodyError> for CallError {
    fn from(error: BodyError) -> Self {
        match error.downcast::<StreamError>() {
            Ok(error) => CallError::from(*error),
            // The body of an answer that was passed from task to task.
            Err(error) => match error.downcast::<CallError>() {
                Ok(error) => *error,
                Err(error) => CallError::Request(error),
            },
        }
    }
}

impl From<StreamError> for CallError {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Reset(reason) => CallError::Reset(reason),
            error => CallError::Broken(error),
        }
    }
}

/// A call whose answer has not begun.
pub struct Exchange {
    request: Sending,
    /// None once the answer has begun.
    answer: Option<Incoming>,
    kept: Kept,
}

/// The request's direction of a call.
#[derive(Default)]
struct Sending {
    /// None once all of it is on its way.
    pump: Option<Pump>,
    /// The upstream wants no more of it. That is no failure: the answer tells why.
    stopped: bool,
}

impl Sending {
    fn poll<W: Witness>(&mut self, cx: &mut Context<'_>, witness: &mut W) -> Result<(), CallError> {
        let Some(pump) = self.pump.as_mut().filter(|_| !self.stopped) else {
            return Ok(());
        };
        match pump.poll(cx, witness) {
            Poll::Pending => {}
            Poll::Ready(Ok(())) => self.pump = None,
            Poll::Ready(Err(PumpError::Sink)) => self.stopped = true,
            Poll::Ready(Err(PumpError::Source(error))) => return Err(CallError::Request(error)),
        }
        Ok(())
    }
}

/// The beginning of a request, in case it must be sent again.
#[derive(Default)]
struct Kept {
    chunks: Chunks,
    /// The size of all chunks but the newest, which is taken when they have been sent.
    sent: usize,
}

impl Witness for Kept {
    fn data(&mut self, chunk: &Bytes) {
        let newest = self.chunks.last().map_or(0, Bytes::len);
        self.sent = self.sent.saturating_add(newest);
        if self.sent <= MAX_KEPT {
            self.chunks.push(chunk.clone());
        } else {
            self.chunks = Chunks::default();
        }
    }

    fn end(&mut self, trailers: Option<&Fields>) {
        if trailers.is_some() {
            self.sent = usize::MAX;
        }
    }
}

/// What came of waiting for an answer.
pub enum Begun {
    /// It has begun. Boxed, for it is passed through many hands.
    Answer(Box<Answer>),
    /// The upstream went away (GOAWAY) or had too many calls, and has not looked at this one, which may
    /// be sent anew.
    NotProcessed(Body, StreamError),
}

impl Exchange {
    /// Sends the headers and what there is of `body`.
    ///
    /// # Errors
    /// `CallError`, when the connection takes no new call.
    pub fn begin(
        calls: &Calls,
        pseudo: Pseudo,
        headers: Fields,
        body: Body,
    ) -> Result<Self, CallError> {
        let is_end = body.is_end_stream();
        let (answer, stream) = calls.begin(pseudo, headers, is_end)?;
        Ok(Exchange {
            request: Sending {
                pump: (!is_end).then(|| Pump::new(body, stream)),
                stopped: false,
            },
            answer: Some(answer),
            kept: Kept::default(),
        })
    }

    /// The request from its beginning, if it is all still there.
    fn take_request(&mut self) -> Option<Body> {
        let kept = std::mem::take(&mut self.kept);
        if kept.sent > MAX_KEPT {
            return None;
        }
        let mut body = match self.request.pump.take() {
            // What the pump itself still holds was kept too.
            Some(pump) => pump.into_source(),
            None => Body::empty(),
        };
        body.put_back(kept.chunks);
        Some(body)
    }
}

/// Waits for the answer's headers, sending the request meanwhile. Not to be polled again then.
///
/// # Errors
/// `CallError`, when there will be none.
impl Future for Exchange {
    type Output = Result<Begun, CallError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        this.request.poll(cx, &mut this.kept)?;
        let Some(answer) = &mut this.answer else {
            return Poll::Pending;
        };
        Poll::Ready(match ready!(answer.poll_head(cx)) {
            Ok(head) => {
                let head = AnswerHead {
                    status: head.status.unwrap_or_default(),
                    headers: head.fields.clone(),
                };
                let body = this.answer.take().map_or_else(Body::empty, Body::stream);
                let request = std::mem::take(&mut this.request);
                Ok(Begun::Answer(Box::new(Answer {
                    head,
                    body,
                    request,
                })))
            }
            Err(error @ StreamError::NotProcessed(_)) => match this.take_request() {
                Some(body) => Ok(Begun::NotProcessed(body, error)),
                None => Err(CallError::Broken(error)),
            },
            Err(error) => Err(error.into()),
        })
    }
}

/// The answer to a call, from its headers on.
pub struct Answer {
    /// Status and headers.
    pub head: AnswerHead,
    body: Body,
    request: Sending,
}

/// How the passing on of an answer ended.
pub enum Passed {
    /// With the end of the answer.
    Whole,
    /// The receiver has gone; the call is cancelled.
    ReceiverGone,
    /// The answer broke off. The receiver's stream is still open.
    BrokenOff(CallError, Outgoing),
}

impl Answer {
    /// An answer that was received elsewhere.
    pub fn made(head: AnswerHead, body: Body) -> Box<Self> {
        Box::new(Answer {
            head,
            body,
            request: Sending::default(),
        })
    }

    /// Whether there is nothing but headers: "Trailers-Only" in gRPC's words.
    pub fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    /// The same answer with another body in the place of its own.
    pub fn with_body(mut self: Box<Self>, other: impl FnOnce(Body) -> Body) -> Box<Self> {
        self.body = other(std::mem::replace(&mut self.body, Body::empty()));
        self
    }

    /// The trailers, if nothing comes before them. Waits for whatever comes first, and takes
    /// nothing away.
    ///
    /// # Errors
    /// `CallError`, when the answer breaks off instead.
    async fn bare_trailers(&mut self) -> Result<Option<&Fields>, CallError> {
        let Answer { body, request, .. } = self;
        poll_fn(|cx| {
            request.poll(cx, &mut ())?;
            body.poll_ahead(cx).map_err(CallError::from)
        })
        .await?;
        Ok(body.bare_trailers())
    }

    /// The gRPC status, as far as it is known before any message.
    pub async fn early_status(&mut self) -> Option<u32> {
        match grpc::status(&self.head.headers) {
            Some(status) => Some(status),
            // That an answer broke off is seen again when it is passed on.
            None => self.bare_trailers().await.ok()?.and_then(grpc::status),
        }
    }

    /// Passes the body on, while the rest of the request goes the other way.
    pub async fn pass_on<W: Witness>(self: Box<Self>, to: Outgoing, witness: &mut W) -> Passed {
        let mut request = self.request;
        let mut answer = Pump::new(self.body, to);
        let broken = poll_fn(|cx| {
            if let Err(CallError::Request(_)) = request.poll(cx, &mut ()) {
                return Poll::Ready(Err(None));
            }
            match answer.poll(cx, witness) {
                Poll::Ready(Ok(())) => Poll::Ready(Ok(())),
                Poll::Ready(Err(PumpError::Sink)) => Poll::Ready(Err(None)),
                Poll::Ready(Err(PumpError::Source(error))) => {
                    Poll::Ready(Err(Some(CallError::from(error))))
                }
                Poll::Pending => answer.poll_sink_gone(cx).map(|_| Err(None)),
            }
        })
        .await;
        match broken {
            Ok(()) => Passed::Whole,
            Err(None) => Passed::ReceiverGone,
            Err(Some(error)) => Passed::BrokenOff(error, answer.into_sink()),
        }
    }
}

/// For primed's own stubs.
impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = CallError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, CallError>>> {
        let this = self.get_mut();
        this.request.poll(cx, &mut ())?;
        if let Some(chunk) = ready!(this.body.poll_data(cx)) {
            return Poll::Ready(Some(chunk.map(Frame::data).map_err(CallError::from)));
        }
        let trailers = ready!(this.body.poll_trailers(cx)).map_err(CallError::from)?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers.to_map()))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}
