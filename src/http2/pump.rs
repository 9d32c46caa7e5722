//! Moves a body from the stream that it comes from to the one that it goes to, no faster than the
//! receiver takes it: at most one chunk is held here, and `SEND_BUFFER` bytes in h2.

use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use h2::{Reason, SendStream};
use http::HeaderMap;

use super::body::{Body, BodyError};

/// A chunk of at most this size that begins a body is sent without asking for room: it then leaves
/// in one write with the headers, and this is within every peer's first window.
const FIRST_CHUNK: usize = 32 * 1024;

/// Chunks below this size are gathered up to `GATHERED`, as far as they are there already: each one
/// costs some hundred bytes on its way, however small it is.
const SMALL_CHUNK: usize = 1024;
const GATHERED: usize = 16 * 1024;

/// Where a body goes: a stream whose headers have been sent, and which is still open.
pub struct Sink {
    stream: SendStream<Bytes>,
    begun: bool,
}

/// The receiver has reset its stream, or its connection is gone.
#[derive(Clone, Copy, Debug)]
pub struct Gone;

impl Sink {
    /// A sink to which nothing has been sent.
    pub fn new(stream: SendStream<Bytes>) -> Self {
        Sink {
            stream,
            begun: false,
        }
    }

    /// Sends `chunk` as fast as there is room for it, and leaves what has not been sent yet. With
    /// its end the stream ends too, if it is the `last`.
    ///
    /// # Errors
    /// `Gone`, when nobody takes it.
    pub fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        chunk: &mut Bytes,
        last: bool,
    ) -> Poll<Result<(), Gone>> {
        loop {
            let first = !std::mem::replace(&mut self.begun, true);
            let room = if chunk.is_empty() || first && chunk.len() <= FIRST_CHUNK {
                chunk.len()
            } else {
                ready!(self.poll_room(cx, chunk.len()))?
            };
            let part = chunk.split_to(room.min(chunk.len()));
            let done = chunk.is_empty();
            let sent = self.stream.send_data(part, last && done);
            sent.map_err(|_| Gone)?;
            if done {
                return Poll::Ready(Ok(()));
            }
        }
    }

    fn poll_room(&mut self, cx: &mut Context<'_>, size: usize) -> Poll<Result<usize, Gone>> {
        self.stream.reserve_capacity(size);
        loop {
            match self.stream.capacity() {
                0 => match ready!(self.stream.poll_capacity(cx)) {
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return Poll::Ready(Err(Gone)),
                },
                room => return Poll::Ready(Ok(room)),
            }
        }
    }

    /// Ends the stream with `trailers`.
    ///
    /// # Errors
    /// `Gone`, when nobody takes them.
    pub fn end(&mut self, trailers: HeaderMap) -> Result<(), Gone> {
        self.stream.send_trailers(trailers).map_err(|_| Gone)
    }

    /// Resets the stream.
    pub fn reset(&mut self, reason: Reason) {
        self.stream.send_reset(reason);
    }

    /// Ready when the receiver has gone.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Gone> {
        self.stream.poll_reset(cx).map(|_| Gone)
    }
}

/// Sees what a pump moves.
pub trait Witness {
    /// A chunk passes.
    fn data(&mut self, _chunk: &Bytes) {}
    /// The body has ended with these trailers, or without any.
    fn end(&mut self, _trailers: Option<&HeaderMap>) {}
}

impl Witness for () {}

/// One direction of a call.
pub struct Pump {
    from: Body,
    to: Sink,
    held: Option<Bytes>,
    source: Source,
}

/// What is known of the body's end.
enum Source {
    Flowing,
    /// There is no more data; trailers may follow.
    Drained,
    Broken(BodyError),
}

/// Why a pump stopped before the end.
#[derive(Debug)]
pub enum PumpError {
    /// The sender broke off.
    Source(BodyError),
    /// The receiver takes no more.
    Sink,
}

impl Source {
    fn ended(last: Option<Result<Bytes, BodyError>>) -> Self {
        match last {
            Some(Err(error)) => Source::Broken(error),
            Some(Ok(_)) | None => Source::Drained,
        }
    }
}

impl From<Gone> for PumpError {
    fn from(Gone: Gone) -> Self {
        PumpError::Sink
    }
}

impl Pump {
    /// A pump from a body to a sink.
    pub fn new(from: Body, to: Sink) -> Self {
        Pump {
            from,
            to,
            held: None,
            source: Source::Flowing,
        }
    }

    /// Moves what can be moved. Ready when the whole body, trailers included, is on its way.
    ///
    /// # Errors
    /// `PumpError`, when either side broke off.
    pub fn poll<W: Witness>(
        &mut self,
        cx: &mut Context<'_>,
        witness: &mut W,
    ) -> Poll<Result<(), PumpError>> {
        loop {
            if let Some(chunk) = &mut self.held {
                let last = match self.source {
                    Source::Flowing | Source::Drained => self.from.is_end_stream(),
                    Source::Broken(_) => false,
                };
                ready!(self.to.poll_send(cx, chunk, last))?;
                self.held = None;
                if last {
                    witness.end(None);
                    return Poll::Ready(Ok(()));
                }
            }
            match std::mem::replace(&mut self.source, Source::Flowing) {
                Source::Flowing => {
                    let chunk = ready!(self.poll_gather(cx));
                    // An empty frame says nothing.
                    if !chunk.is_empty() {
                        witness.data(&chunk);
                        self.held = Some(chunk);
                    }
                    continue;
                }
                Source::Broken(error) => return Poll::Ready(Err(PumpError::Source(error))),
                Source::Drained => self.source = Source::Drained,
            }
            let trailers = ready!(self.from.poll_trailers(cx)).map_err(PumpError::Source)?;
            witness.end(trailers.as_ref());
            match trailers {
                Some(trailers) => self.to.end(trailers)?,
                None => ready!(self.to.poll_send(cx, &mut Bytes::new(), true))?,
            }
            return Poll::Ready(Ok(()));
        }
    }

    /// The next chunk, with those small ones behind it that are there already. Empty if there is
    /// none; `source` says why.
    fn poll_gather(&mut self, cx: &mut Context<'_>) -> Poll<Bytes> {
        let first = match ready!(self.from.poll_data(cx)) {
            Some(Ok(chunk)) if chunk.len() < SMALL_CHUNK => chunk,
            Some(Ok(chunk)) => return Poll::Ready(chunk),
            ended => {
                self.source = Source::ended(ended);
                return Poll::Ready(Bytes::new());
            }
        };
        let mut gathered = BytesMut::new();
        while gathered.len() < GATHERED {
            match self.from.poll_data(cx) {
                Poll::Ready(Some(Ok(chunk))) => {
                    if gathered.is_empty() {
                        gathered.extend_from_slice(&first);
                    }
                    gathered.extend_from_slice(&chunk);
                }
                Poll::Ready(ended) => {
                    self.source = Source::ended(ended);
                    break;
                }
                Poll::Pending => break,
            }
        }
        Poll::Ready(match gathered.is_empty() {
            true => first,
            false => gathered.freeze(),
        })
    }

    /// Ready when the receiver has gone.
    pub fn poll_sink_gone(&mut self, cx: &mut Context<'_>) -> Poll<Gone> {
        self.to.poll_gone(cx)
    }

    /// What has not been read from the body yet. What was, the pump may still hold.
    pub fn into_source(self) -> Body {
        self.from
    }

    /// The sink that it moved to.
    pub fn into_sink(self) -> Sink {
        self.to
    }
}
