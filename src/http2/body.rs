//! The body of a call in one direction, read chunk by chunk. Chunks pass by reference count;
//! nothing is copied or decoded.

use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::Body as _;
use http_body_util::BodyExt as _;

use super::fields::Fields;
use super::stream::Incoming;
use crate::chunks::Chunks;

/// Why a body ended before its end.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// A body that primed produces: its own stubs', or one that is rewritten on its way.
type Made = Pin<Box<dyn http_body::Body<Data = Bytes, Error = BodyError> + Send>>;

/// A body on its way through primed. It may have been read from already: what was read is kept
/// and comes first.
pub struct Body {
    ahead: Chunks,
    rest: Rest,
    /// Read ahead of their time.
    trailers: Option<Fields>,
}

enum Rest {
    Stream(Incoming),
    Made(Made),
    Nothing,
}

impl Body {
    /// What a peer sends.
    pub fn stream(stream: Incoming) -> Self {
        Body::of(Rest::Stream(stream))
    }

    /// What primed itself produces, or lets pass in another form.
    pub fn made<B>(body: B) -> Self
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BodyError>,
    {
        Body::of(Rest::Made(Box::pin(body.map_err(Into::into))))
    }

    /// Nothing, until something is put back.
    pub fn empty() -> Self {
        Body::of(Rest::Nothing)
    }

    fn of(rest: Rest) -> Self {
        Body {
            ahead: Chunks::default(),
            rest,
            trailers: None,
        }
    }

    /// The chunks that were read ahead.
    pub fn ahead(&self) -> &Chunks {
        &self.ahead
    }

    /// The trailers, if they were read ahead and nothing stands before them.
    pub fn bare_trailers(&self) -> Option<&Fields> {
        self.trailers.as_ref().filter(|_| self.ahead.is_empty())
    }

    /// Puts `chunks` back, before everything else.
    pub fn put_back(&mut self, chunks: impl Into<Chunks>) {
        let ahead = mem::replace(&mut self.ahead, chunks.into());
        self.ahead.append(ahead);
    }

    /// Reads one more chunk ahead, or the trailers. Ready with false if there is neither.
    ///
    /// # Errors
    /// `BodyError`, when the body broke off; whoever reads on sees it too.
    pub fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, BodyError>> {
        if let Some(chunk) = ready!(self.rest.poll_data(cx, &mut self.trailers)) {
            self.ahead.push(chunk?);
            return Poll::Ready(Ok(true));
        }
        if self.trailers.is_none() {
            self.trailers = ready!(self.poll_trailers(cx))?;
        }
        Poll::Ready(Ok(self.trailers.is_some()))
    }

    /// The next chunk; `None` after the last one.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyError>>> {
        match self.ahead.pop() {
            Some(chunk) => Poll::Ready(Some(Ok(chunk))),
            None => self.rest.poll_data(cx, &mut self.trailers),
        }
    }

    /// The trailers, once `poll_data` has said that there is no more data.
    pub fn poll_trailers(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Fields>, BodyError>> {
        match (self.trailers.take(), &mut self.rest) {
            (None, Rest::Stream(stream)) => stream.poll_trailers(cx).map_err(Into::into),
            (trailers, _) => Poll::Ready(Ok(trailers)),
        }
    }

    /// Whether neither data nor trailers follow.
    pub fn is_end_stream(&self) -> bool {
        self.ahead.is_empty()
            && self.trailers.is_none()
            && match &self.rest {
                Rest::Stream(stream) => stream.is_end_stream(),
                Rest::Made(body) => body.is_end_stream(),
                Rest::Nothing => true,
            }
    }
}

impl Rest {
    /// The next chunk. The trailers of a body that is made come by the way.
    fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
        trailers: &mut Option<Fields>,
    ) -> Poll<Option<Result<Bytes, BodyError>>> {
        match self {
            Rest::Stream(stream) => stream.poll_data(cx).map_err(Into::into),
            Rest::Made(_) if trailers.is_some() => Poll::Ready(None),
            Rest::Made(body) => match ready!(body.as_mut().poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => Poll::Ready(Some(Ok(data))),
                    Err(frame) => {
                        let map = frame.into_trailers().ok();
                        *trailers = map.as_ref().map(Fields::from);
                        Poll::Ready(None)
                    }
                },
                Some(Err(error)) => Poll::Ready(Some(Err(error))),
                None => Poll::Ready(None),
            },
            Rest::Nothing => Poll::Ready(None),
        }
    }
}
