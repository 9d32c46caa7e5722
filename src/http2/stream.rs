//! The two directions of one stream, as the calls hold them. When both are gone before the stream
//! is at its end, it is reset.

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::StatusCode;
use parking_lot::Mutex;

use super::fields::Fields;
use super::frame::Reason;
use super::hpack::{Block, Pseudo};
use super::streams::State;
pub use super::streams::{Gone, Load, StreamError};

/// A connection's state, shared by its task and its calls. It is nearly always one thread that
/// locks it.
pub type Shared = Arc<Mutex<State>>;

/// Status and headers of an answer.
#[derive(Clone, Debug, Default)]
pub struct AnswerHead {
    /// HTTP's.
    pub status: StatusCode,
    /// All other headers.
    pub headers: Fields,
}

/// What the peer sends.
pub struct Incoming {
    shared: Shared,
    key: usize,
}

impl Incoming {
    pub(super) fn new(shared: Shared, key: usize) -> Self {
        Incoming { shared, key }
    }

    /// The answer's headers, to a client.
    ///
    /// # Errors
    /// `StreamError`, when there will be none.
    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Arc<Block>, StreamError>> {
        self.shared.lock().poll_head(self.key, cx)
    }

    /// The next chunk; `None` after the last one.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, StreamError>>> {
        self.shared.lock().poll_data(self.key, cx)
    }

    /// The trailers, once there is no more data.
    pub fn poll_trailers(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Fields>, StreamError>> {
        self.shared.lock().poll_trailers(self.key, cx)
    }

    /// Whether neither data nor trailers follow.
    pub fn is_end_stream(&self) -> bool {
        self.shared.lock().is_end_stream(self.key)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.shared.lock().drop_reader(self.key);
    }
}

/// What the peer is sent.
pub struct Outgoing {
    shared: Shared,
    key: usize,
}

impl Outgoing {
    pub(super) fn new(shared: Shared, key: usize) -> Self {
        Outgoing { shared, key }
    }

    /// Begins an answer; with `is_end` that is all of it.
    ///
    /// # Errors
    /// `Gone`, when nobody takes it.
    pub fn answer(&mut self, head: AnswerHead, is_end: bool) -> Result<(), Gone> {
        let pseudo = Pseudo::Response(head.status);
        let mut state = self.shared.lock();
        state.send_head(self.key, pseudo, head.headers, is_end)
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
        self.shared.lock().poll_send(self.key, cx, chunk, last)
    }

    /// Ends the stream with `trailers`.
    ///
    /// # Errors
    /// `Gone`, when nobody takes them.
    pub fn end(&mut self, trailers: Fields) -> Result<(), Gone> {
        let mut state = self.shared.lock();
        state.send_head(self.key, Pseudo::Trailers, trailers, true)
    }

    /// Resets the stream, once what has been sent so far has left.
    pub fn reset(&mut self, reason: Reason) {
        self.shared.lock().send_reset(self.key, reason);
    }

    /// Ready when the receiver has gone.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Gone> {
        self.shared.lock().poll_gone(self.key, cx)
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.shared.lock().drop_handle(self.key);
    }
}
