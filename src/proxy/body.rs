//! Bodies of forwarded calls. Frames pass by reference count; nothing is copied or decoded.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, Response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::sync::mpsc;

use super::grpc;
use super::tap::Tap;
use crate::speculation::observation::{FRAME_HEADER, Framed, joined, split_message};

/// A request body on its way to the upstream.
pub enum RequestBody {
    /// Not looked at.
    Untouched(Incoming),
    /// Its beginning was read; the rest follows.
    ReadAhead {
        /// Frames that were taken out already.
        frames: VecDeque<Frame<Bytes>>,
        /// What is still to come.
        rest: Incoming,
    },
    /// One whole message and the end, to be sent once more.
    Again(Option<Bytes>),
}

impl RequestBody {
    /// Reads the first gRPC message, if it is uncompressed and at most `limit` bytes long.
    /// Returns the body with everything still in it.
    pub async fn read_first_message(mut body: Incoming, limit: usize) -> (Option<Bytes>, Self) {
        let mut frames = VecDeque::new();
        let mut read = Vec::new();
        let mut message = None;
        while let Some(Ok(frame)) = body.frame().await {
            if let Some(data) = frame.data_ref() {
                read.push(data.clone());
            }
            let is_trailers = frame.is_trailers();
            frames.push_back(frame);
            message = first_message(&read);
            let size: usize = read.iter().map(Bytes::len).sum();
            if is_trailers || message.is_some() || size > limit {
                break;
            }
        }
        (message, RequestBody::ReadAhead { frames, rest: body })
    }

    /// The same body once more, for a method whose request is one message. Ask before it is sent.
    pub fn again(&self) -> Option<Self> {
        match self {
            RequestBody::Again(whole) => Some(RequestBody::Again(whole.clone())),
            // Whether the client has ended the stream yet does not matter: nothing else can
            // follow, and some clients (tonic's) do so later, with a frame of its own.
            RequestBody::ReadAhead { frames, .. } => {
                let read: Option<Vec<&[u8]>> = frames
                    .iter()
                    .map(|frame| frame.data_ref().map(Bytes::as_ref))
                    .collect();
                let whole = Bytes::from(read?.concat());
                let message = first_message(std::slice::from_ref(&whole))?;
                (whole.len() == FRAME_HEADER + message.len())
                    .then_some(RequestBody::Again(Some(whole)))
            }
            RequestBody::Untouched(_) => None,
        }
    }
}

fn first_message(parts: &[Bytes]) -> Option<Bytes> {
    match split_message(&mut joined(parts))? {
        Framed::Plain(message) => Some(message),
        Framed::Compressed => None,
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            RequestBody::Untouched(body) => Pin::new(body).poll_frame(cx),
            RequestBody::ReadAhead { frames, rest } => match frames.pop_front() {
                Some(frame) => Poll::Ready(Some(Ok(frame))),
                None => Pin::new(rest).poll_frame(cx),
            },
            RequestBody::Again(whole) => {
                Poll::Ready(whole.take().map(|data| Ok(Frame::data(data))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            RequestBody::Untouched(body) => body.is_end_stream(),
            RequestBody::ReadAhead { frames, rest } => frames.is_empty() && rest.is_end_stream(),
            RequestBody::Again(whole) => whole.is_none(),
        }
    }
}

/// A response body on its way to the client.
pub struct ResponseBody {
    source: Source,
    tap: Option<Tap>,
}

enum Source {
    Upstream(Incoming),
    /// The first frame was read to learn the status; the rest follows.
    Peeked(Option<Frame<Bytes>>, Incoming),
    /// Made by primed, for a joined execution.
    Made(mpsc::Receiver<Frame<Bytes>>),
    /// The upstream reset the stream.
    Reset(h2::Reason),
    Ended,
}

impl ResponseBody {
    /// A body that the upstream sends.
    pub fn upstream(body: Incoming) -> Self {
        ResponseBody {
            source: Source::Upstream(body),
            tap: None,
        }
    }

    /// A body that primed sends, frame by frame.
    pub fn made(frames: mpsc::Receiver<Frame<Bytes>>) -> Self {
        ResponseBody {
            source: Source::Made(frames),
            tap: None,
        }
    }

    /// No body, but the reset that the upstream sent.
    pub fn reset(reason: h2::Reason) -> Self {
        ResponseBody {
            source: Source::Reset(reason),
            tap: None,
        }
    }

    /// No body at all: the status stands in the headers.
    pub fn empty() -> Self {
        ResponseBody {
            source: Source::Ended,
            tap: None,
        }
    }

    /// Lets `tap` see `response` to its end, which its headers may be already.
    pub fn observed_by(tap: Tap, response: Response<Self>) -> Response<Self> {
        match grpc::status(response.headers()) {
            Some(status) => {
                tap.end(Some(status));
                response
            }
            None => response.map(|body| ResponseBody {
                tap: Some(tap),
                ..body
            }),
        }
    }

    /// The trailers, if the body consists of nothing else. Takes nothing away.
    pub async fn trailers_if_bare(&mut self) -> Option<HeaderMap> {
        if let Source::Upstream(_) = self.source {
            let Source::Upstream(mut body) = std::mem::replace(&mut self.source, Source::Ended)
            else {
                return None;
            };
            self.source = match body.frame().await.transpose() {
                Ok(frame) => Source::Peeked(frame, body),
                Err(error) => match grpc::reset_by_upstream(&error) {
                    Some(reason) => Source::Reset(reason),
                    None => {
                        Source::Peeked(Some(Frame::trailers(grpc::broken_upstream(&error))), body)
                    }
                },
            };
        }
        match &self.source {
            Source::Peeked(Some(frame), _) => frame.trailers_ref().cloned(),
            _ => None,
        }
    }

    /// What a reset means is for the client to say, as it would without primed.
    fn end_with_reset(
        &mut self,
        reason: h2::Reason,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        self.source = Source::Ended;
        if let Some(tap) = self.tap.take() {
            tap.end(None);
        }
        Poll::Ready(Some(Err(reason.into())))
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let this = self.get_mut();
        let polled = match &mut this.source {
            Source::Upstream(body) => ready!(Pin::new(body).poll_frame(cx)),
            Source::Peeked(first, rest) => match first.take() {
                Some(frame) => Some(Ok(frame)),
                None => ready!(Pin::new(rest).poll_frame(cx)),
            },
            Source::Made(frames) => ready!(frames.poll_recv(cx)).map(Ok),
            Source::Reset(reason) => {
                let reason = *reason;
                return this.end_with_reset(reason);
            }
            Source::Ended => None,
        };
        let frame = match polled {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => match grpc::reset_by_upstream(&error) {
                Some(reason) => return this.end_with_reset(reason),
                // The connection broke. A reset would reach the client as an internal error;
                // gRPC's own word for a lost server is UNAVAILABLE, which clients retry.
                None => Frame::trailers(grpc::broken_upstream(&error)),
            },
            None => {
                this.source = Source::Ended;
                return Poll::Ready(None);
            }
        };
        if frame.is_trailers() {
            this.source = Source::Ended;
        }
        if let Some(tap) = &mut this.tap {
            match (frame.data_ref(), frame.trailers_ref()) {
                (Some(data), _) => tap.data(data),
                (None, Some(trailers)) => {
                    let status = grpc::status(trailers);
                    if let Some(tap) = this.tap.take() {
                        tap.end(status);
                    }
                }
                (None, None) => {}
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Upstream(body) => body.is_end_stream(),
            Source::Peeked(first, rest) => first.is_none() && rest.is_end_stream(),
            Source::Made(_) | Source::Reset(_) => false,
            Source::Ended => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Upstream(body) => body.size_hint(),
            _ => SizeHint::default(),
        }
    }
}
