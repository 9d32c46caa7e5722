//! The client's side of one call: what it is told, and whether it is still there.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::Reason;
use h2::server::SendResponse;
use http::Response;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use pin_project_lite::pin_project;
use tonic::Code;

use super::tap::Tap;
use crate::backend::exchange::{Answer, CallError, Passed};
use crate::backend::instance_rewriter::RewriteError;
use crate::backend::upstream::UpstreamError;
use crate::grpc;
use crate::http2::pump::{Gone, Sink};

const APPLICATION_GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// What a client is told. Errors of its stream are not reported: they mean that it has gone, and
/// there is nobody to tell.
pub enum Reply {
    /// Nothing has been sent.
    Due(SendResponse<Bytes>),
    /// The headers have been sent.
    Begun(Sink),
}

impl Reply {
    /// The output of `future`, or `None` if the client goes away before that.
    pub fn unless_gone<F: Future>(&mut self, future: F) -> UnlessGone<'_, F> {
        UnlessGone {
            reply: self,
            future,
        }
    }

    /// Ends the call with a status of primed's own.
    pub fn end(self, code: Code, message: &str) {
        let trailers = grpc::trailers(code, message);
        match self {
            Reply::Due(mut stream) => {
                let mut head = grpc_head();
                head.headers_mut().extend(trailers);
                let _ = stream.send_response(head, true);
            }
            Reply::Begun(mut sink) => {
                let _ = sink.end(trailers);
            }
        }
    }

    /// Resets the stream, as the upstream did.
    pub fn reset(self, reason: Reason) {
        match self {
            Reply::Due(mut stream) => stream.send_reset(reason),
            Reply::Begun(mut sink) => sink.reset(reason),
        }
    }

    /// Sends one message of primed's own, with its prefix. Returns when it is on its way, with
    /// what is left of the reply: nothing, if the client has gone.
    pub async fn message(self, framed: Bytes) -> Option<Self> {
        let mut framed = framed;
        let mut sink = match self {
            Reply::Due(mut stream) => Sink::new(stream.send_response(grpc_head(), false).ok()?),
            Reply::Begun(sink) => sink,
        };
        poll_fn(|cx| match sink.poll_send(cx, &mut framed, false) {
            Poll::Pending => sink.poll_gone(cx).map(Err),
            sent => sent,
        })
        .await
        .ok()?;
        Some(Reply::Begun(sink))
    }

    /// Sends a whole answer.
    pub async fn whole(self, head: Response<()>, data: Bytes, trailers: HeaderMap) {
        let Reply::Due(mut stream) = self else { return };
        let Ok(stream) = stream.send_response(head, false) else {
            return;
        };
        let begun = Reply::Begun(Sink::new(stream));
        if let Some(Reply::Begun(mut sink)) = begun.message(data).await {
            let _ = sink.end(trailers);
        }
    }

    /// Passes on what came of a call.
    pub async fn finish(self, answer: Result<Box<Answer>, UpstreamError>, tap: Option<Tap>) {
        match answer {
            Ok(answer) => self.pass_on(answer, tap).await,
            Err(error) => self.fail(&error, tap),
        }
    }

    /// Passes the upstream's answer on to its end, while `tap` sees it.
    async fn pass_on(self, answer: Box<Answer>, tap: Option<Tap>) {
        let mut tap = tap;
        let mut answer = answer;
        let head = std::mem::take(&mut answer.head);
        if answer.is_end_stream() {
            // Trailers-Only, in gRPC's words: the status stands in the headers.
            if let Some(tap) = tap {
                tap.end(grpc::status(head.headers()));
            }
            let _ = match self {
                Reply::Due(mut stream) => stream.send_response(head, true).map(drop).or(Err(Gone)),
                Reply::Begun(mut sink) => sink.end(head.into_parts().0.headers),
            };
            return;
        }
        let sink = match self {
            Reply::Due(mut stream) => match stream.send_response(head, false) {
                Ok(stream) => Sink::new(stream),
                Err(_) => return,
            },
            Reply::Begun(sink) => sink,
        };
        match answer.pass_on(sink, &mut tap).await {
            Passed::Whole | Passed::ReceiverGone => {}
            Passed::BrokenOff(error, sink) => Reply::Begun(sink).fail(&error.into(), tap),
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
        match (this.future.poll(cx), this.reply) {
            (Poll::Ready(output), _) => Poll::Ready(Some(output)),
            (Poll::Pending, Reply::Due(stream)) => stream.poll_reset(cx).map(|_| None),
            (Poll::Pending, Reply::Begun(sink)) => sink.poll_gone(cx).map(|_| None),
        }
    }
}

fn grpc_head() -> Response<()> {
    let mut head = Response::new(());
    head.headers_mut().insert(CONTENT_TYPE, APPLICATION_GRPC);
    head
}
