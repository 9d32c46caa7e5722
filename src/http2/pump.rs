//! Moves a body from the stream that it comes from to the one that it goes to, no faster than the
//! receiver takes it: at most one chunk is held here, and `SEND_BUFFER` bytes wait to be
//! written.

use std::task::{Context, Poll, ready};

use bytes::Bytes;

use super::body::{Body, BodyError};
use super::fields::Fields;
use super::stream::{Gone, Outgoing};

/// Sees what a pump moves.
pub trait Witness {
    /// A chunk passes.
    fn data(&mut self, _chunk: &Bytes) {}
    /// The body has ended with these trailers, or without any.
    fn end(&mut self, _trailers: Option<&Fields>) {}
}

impl Witness for () {}

/// One direction of a call.
pub struct Pump {
    from: Body,
    to: Outgoing,
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

impl From<Gone> for PumpError {
    fn from(Gone: Gone) -> Self {
        PumpError::Sink
    }
}

impl Pump {
    /// A pump from a body to a sink.
    pub fn new(from: Body, to: Outgoing) -> Self {
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
                    match ready!(self.from.poll_data(cx)) {
                        // An empty frame says nothing.
                        Some(Ok(chunk)) if chunk.is_empty() => {}
                        Some(Ok(chunk)) => {
                            witness.data(&chunk);
                            self.held = Some(chunk);
                        }
                        Some(Err(error)) => self.source = Source::Broken(error),
                        None => self.source = Source::Drained,
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

    /// Ready when the receiver has gone.
    pub fn poll_sink_gone(&mut self, cx: &mut Context<'_>) -> Poll<Gone> {
        self.to.poll_gone(cx)
    }

    /// What has not been read from the body yet. What was, the pump may still hold.
    pub fn into_source(self) -> Body {
        self.from
    }

    /// The sink that it moved to.
    pub fn into_sink(self) -> Outgoing {
        self.to
    }
}
