//! The client's side of one call: what it is told, and whether it is still there.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use pin_project_lite::pin_project;
use tonic::Code;

use super::tap::Tap;
use crate::backend::exchange::{Answer, CallError, Passed};
use crate::backend::instance_rewriter::RewriteError;
use crate::backend::upstream::UpstreamError;
use crate::grpc;
use crate::http2::fields::Fields;
use crate::http2::frame::Reason;
use crate::http2::pump::Witness;
use crate::http2::stream::{AnswerHead, Outgoing};
use crate::meters::calls::CallMeter;

const APPLICATION_GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// What a client is told. Errors of its stream are not reported: they mean that it has gone, and
/// there is nobody to tell.
pub struct Reply {
    stream: Outgoing,
    /// Whether the headers have been sent.
    is_begun: bool,
    /// Counts the call, with the status that the client is told.
    meter: Option<CallMeter>,
}

impl Reply {
    /// One to a client that has been told nothing yet.
    pub fn due(stream: Outgoing) -> Self {
        Reply {
            stream,
            is_begun: false,
            meter: None,
        }
    }

    /// Has `meter` count how it ends.
    pub fn metered(self, meter: CallMeter) -> Self {
        Reply {
            meter: Some(meter),
            ..self
        }
    }

    fn count(&mut self, status: Option<u32>) {
        if let Some(meter) = &mut self.meter {
            meter.status(status);
        }
    }

    /// The output of `future`, or `None` if the client goes away before that.
    pub fn unless_gone<F: Future>(&mut self, future: F) -> UnlessGone<'_, F> {
        UnlessGone {
            reply: self,
            future,
        }
    }

    /// Ends the call with a status of primed's own.
    pub fn end(mut self, code: Code, message: &str) {
        self.count(Some(code as u32));
        let trailers = grpc::trailers(code, message);
        let _ = match self.is_begun {
            true => self.stream.end(trailers),
            false => {
                let mut head = grpc_head();
                head.headers.extend(trailers);
                self.stream.answer(head, true)
            }
        };
    }

    /// Resets the stream, as the upstream did.
    pub fn reset(mut self, reason: Reason) {
        self.stream.reset(reason);
    }

    /// Sends one message of primed's own, with its prefix. Returns when it is on its way, with
    /// what is left of the reply: nothing, if the client has gone.
    pub async fn message(mut self, framed: Bytes) -> Option<Self> {
        self.begin(grpc_head())?;
        self.send(framed).await?;
        Some(self)
    }

    async fn send(&mut self, data: Bytes) -> Option<()> {
        let mut data = data;
        let stream = &mut self.stream;
        let sent = poll_fn(|cx| match stream.poll_send(cx, &mut data, false) {
            Poll::Pending => stream.poll_gone(cx).map(Err),
            sent => sent,
        });
        sent.await.ok()
    }

    /// Sends a whole answer.
    pub async fn whole(mut self, head: AnswerHead, data: Bytes, trailers: Fields) {
        if self.begin(head).is_some() && self.send(data).await.is_some() {
            self.count(grpc::status(&trailers));
            let _ = self.stream.end(trailers);
        }
    }

    /// Sends these headers, if none have been sent yet. `None` if the client has gone.
    fn begin(&mut self, head: AnswerHead) -> Option<()> {
        if !self.is_begun {
            self.stream.answer(head, false).ok()?;
            self.is_begun = true;
        }
        Some(())
    }

    /// Passes on what came of a call.
    pub async fn finish(self, answer: Result<Box<Answer>, UpstreamError>, tap: Option<Tap>) {
        match answer {
            Ok(answer) => self.pass_on(answer, tap).await,
            Err(error) => self.fail(&error, tap),
        }
    }

    /// Passes the upstream's answer on to its end, while `tap` sees it.
    async fn pass_on(mut self, answer: Box<Answer>, tap: Option<Tap>) {
        let mut answer = answer;
        let head = std::mem::take(&mut answer.head);
        if answer.is_end_stream() {
            // Trailers-Only, in gRPC's words: the status stands in the headers.
            let status = grpc::status(&head.headers);
            self.count(status);
            if let Some(tap) = tap {
                tap.end(status);
            }
            let _ = match self.is_begun {
                true => self.stream.end(head.headers),
                false => self.stream.answer(head, true),
            };
            return;
        }
        if self.begin(head).is_none() {
            return;
        }
        let mut witnesses = Witnesses {
            tap,
            meter: self.meter,
        };
        match answer.pass_on(self.stream, &mut witnesses).await {
            Passed::Whole => {}
            Passed::ReceiverGone => {
                if let Some(tap) = witnesses.tap {
                    tap.left();
                }
            }
            Passed::BrokenOff(error, stream) => {
                let Witnesses { tap, meter } = witnesses;
                let reply = Reply {
                    stream,
                    is_begun: true,
                    meter,
                };
                reply.fail(&error.into(), tap);
            }
        }
    }

    /// Tells the client that the upstream failed.
    pub fn fail(self, error: &UpstreamError, tap: Option<Tap>) {
        let (status, hint) = match error {
            UpstreamError::Call(CallError::Reset(reason)) => {
                if let Some(tap) = tap {
                    tap.end(None);
                }
                return self.reset(*reason);
            }
            UpstreamError::Call(CallError::Request(error)) if error.is::<RewriteError>() => {
                return self.end(Code::Unimplemented, &error.to_string());
            }
            // The client itself broke off.
            UpstreamError::Call(CallError::Request(_)) => return self.reset(Reason::CANCEL),
            UpstreamError::Credentials(_) => (
                Code::Unauthenticated,
                "see --credential-helper of `primed serve`",
            ),
            UpstreamError::Connect(_) => {
                (Code::Unavailable, "is it running, and is this its address?")
            }
            // A reset would reach the client as an internal error; gRPC's own word for a lost
            // server is UNAVAILABLE, which clients retry.
            UpstreamError::Call(CallError::Broken(_)) => (Code::Unavailable, "try again"),
        };
        if let Some(tap) = tap {
            tap.end(Some(status as u32));
        }
        self.end(status, &format!("primed: {error}; {hint}"));
    }
}

/// Those who see an answer pass.
struct Witnesses {
    tap: Option<Tap>,
    meter: Option<CallMeter>,
}

impl Witness for Witnesses {
    fn data(&mut self, chunk: &Bytes) {
        self.tap.data(chunk);
    }

    fn end(&mut self, trailers: Option<&Fields>) {
        if let Some(meter) = &mut self.meter {
            meter.status(trailers.and_then(grpc::status));
        }
        self.tap.end(trailers);
    }
}

pin_project! {
    /// See `Reply::unless_gone`. A type of its own, because an `async fn` would hold the future
    /// twice.
    pub struct UnlessGone<'a, F> {
        reply: &'a mut Reply,
        #[pin]
        future: F,
    }
}

impl<F: Future> Future for UnlessGone<'_, F> {
    type Output = Option<F::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        match this.future.poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending => this.reply.stream.poll_gone(cx).map(|_| None),
        }
    }
}

fn grpc_head() -> AnswerHead {
    AnswerHead {
        headers: Fields::from_iter([(CONTENT_TYPE, APPLICATION_GRPC)]),
        ..AnswerHead::default()
    }
}
