//! Carries one HTTP/2 connection: reads frames and hands them to its state, writes what waits
//! there. One task polls it, and is woken only by its socket and by what there is to send.

use std::cell::RefCell;
use std::io;
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{BufMut, Bytes};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

use super::fields::Fields;
use super::frame::{FrameHeader, HEADER, PREFACE, Reason};
use super::frame_memory::FrameMemory;
use super::hpack::{Block, Pseudo};
use super::outbox::Outbox;
use super::stream::{Incoming, Load, Outgoing, Shared, StreamError};
use super::streams::{Role, State};
use super::{
    CLIENT_HEADER_LIST, CLIENT_WINDOW, MAX_FRAME_SIZE, UPSTREAM_HEADER_LIST, UPSTREAM_WINDOW,
    whole_messages,
};

/// What one read takes at most, unless it is the rest of a large frame.
const READ: usize = 64 * 1024;
/// A frame of which this much is not there yet is read into memory of its own.
const LARGE: usize = 2 * 1024;
/// After such a frame another one probably follows, of which no more than this is to be copied. As
/// much is read at once with the end of a frame.
const BETWEEN: usize = 1024;
/// How often it is read before other tasks have their turn.
const TURNS: usize = 8;
/// How often a socket is read that takes nothing more: what the system keeps of what the peer said.
const LAST_READS: usize = 64;
/// How far into its memory data begins. Large pieces of memory begin with a page, and so does what
/// the system keeps of a message of 64 KiB and some bytes, for all but those bytes. To copy to a
/// place that lies one to fifteen bytes further into its page than what is copied takes AMD's
/// processors three times as long.
const INDENT: usize = 512;

thread_local! {
    /// What connections of this thread read into: between reads none of them holds more than the
    /// beginning of a frame.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; INDENT + READ].into());
}

/// A call that a client makes.
pub struct Request {
    /// Its headers.
    pub head: Arc<Block>,
    /// The rest of it.
    pub body: Incoming,
    /// Where the answer goes.
    pub reply: Outgoing,
}

/// One end of a connection.
pub struct Connection<S> {
    io: S,
    shared: Shared,
    reading: Reading,
    out: Outbox,
    is_shutting: bool,
}

/// What has been read, but is not a whole frame.
enum Reading {
    /// A client has said so much of what it says first.
    Preface(usize),
    /// The beginning of a frame.
    Some(Vec<u8>),
    /// The beginning of a large one, `INDENT` bytes into its memory.
    Large(FrameHeader, FrameMemory),
    /// A large one has just been read, and nothing more.
    Between,
}

/// Begins calls on a client's connection.
pub struct Calls {
    shared: Shared,
}

/// Sees and asks whether a peer is alive.
pub struct Pulse {
    shared: Shared,
}

/// Ends a connection when its calls have ended.
pub struct Farewell {
    shared: Shared,
}

/// How far a connection has come.
pub struct Standing {
    /// Whether the peer has spoken HTTP/2.
    pub is_greeted: bool,
    /// Whether either side has said farewell.
    pub is_leaving: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// The server's end, which serves so many calls at a time.
    pub fn server(io: S, max_streams: u32) -> Self {
        let role = Role::Server { max_streams };
        let state = State::new(role, CLIENT_WINDOW, CLIENT_HEADER_LIST);
        Connection::new(io, state, Reading::Preface(0))
    }

    /// The client's end. Nothing is said before it is polled.
    pub fn client(io: S) -> (Calls, Self) {
        let mut state = State::new(Role::Client, UPSTREAM_WINDOW, UPSTREAM_HEADER_LIST);
        state.add_caller();
        let connection = Connection::new(io, state, Reading::Some(Vec::new()));
        let shared = connection.shared.clone();
        (Calls { shared }, connection)
    }

    fn new(io: S, state: State, reading: Reading) -> Self {
        Connection {
            io,
            shared: Arc::new(Mutex::new(state)),
            reading,
            out: Outbox::default(),
            is_shutting: false,
        }
    }

    /// How far it has come.
    pub fn standing(&self) -> Standing {
        let state = self.shared.lock();
        Standing {
            is_greeted: state.is_greeted(),
            is_leaving: state.is_leaving(),
        }
    }

    /// For whoever ends it.
    pub fn farewell(&self) -> Farewell {
        let shared = self.shared.clone();
        Farewell { shared }
    }

    /// For whoever watches over the connection.
    pub fn pulse(&self) -> Pulse {
        let shared = self.shared.clone();
        Pulse { shared }
    }

    /// Carries the connection; `serve` takes the calls that come. Ready when it is at its end.
    ///
    /// # Errors
    /// Why it ended before its time. A peer that just goes is no error where no call was open.
    pub fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut serve: impl FnMut(Request),
    ) -> Poll<Result<(), StreamError>> {
        self.shared.lock().is_awake();
        whole_messages::pass_on_if_late();
        if self.is_shutting {
            return self.poll_shutdown(cx);
        }
        let mut turns = 0;
        let mut was_flooded;
        loop {
            was_flooded = self.shared.lock().is_flooded();
            if was_flooded {
                break;
            }
            match self.poll_read(cx) {
                Poll::Pending => break,
                Poll::Ready(Ok(0)) => {
                    let was_open = self.close("the peer has closed the connection");
                    return Poll::Ready(was_open);
                }
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(self.close(&error.to_string())),
            }
            turns += 1;
            if turns == TURNS || self.shared.lock().ended().is_some() {
                cx.waker().wake_by_ref();
                break;
            }
        }
        let calls = self.shared.lock().take_calls();
        for call in calls {
            let body = Incoming::new(self.shared.clone(), call.key);
            let reply = Outgoing::new(self.shared.clone(), call.key);
            serve(Request {
                head: call.head,
                body,
                reply,
            });
        }
        loop {
            if self.out.is_empty() {
                self.shared.lock().assemble(&mut self.out);
            }
            match self.poll_write(cx) {
                Poll::Pending => break,
                Poll::Ready(Err(error)) => {
                    self.read_out(cx);
                    return Poll::Ready(self.close(&error.to_string()));
                }
                Poll::Ready(Ok(())) => {}
            }
            let mut state = self.shared.lock();
            if was_flooded && !state.is_flooded() {
                was_flooded = false;
                // There may be more to read, which the socket will not tell again.
                cx.waker().wake_by_ref();
            }
            if state.is_idle_for(cx.waker()) {
                if state.is_done() {
                    drop(state);
                    self.is_shutting = true;
                    return self.poll_shutdown(cx);
                }
                break;
            }
        }
        Poll::Pending
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.out.poll_write(&mut self.io, cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        // The peer may be gone already, and all is said.
        let _ = ready!(Pin::new(&mut self.io).poll_shutdown(cx));
        Poll::Ready(match self.shared.lock().ended() {
            Some(error) => Err(error),
            None => Ok(()),
        })
    }

    /// The peer listens no more. What it has said before it went are answers yet, or a farewell.
    fn read_out(&mut self, cx: &mut Context<'_>) {
        for _ in 0..LAST_READS {
            if !matches!(self.poll_read(cx), Poll::Ready(Ok(1..))) {
                return;
            }
        }
    }

    /// The socket is of no more use.
    fn close(&mut self, why: &str) -> Result<(), StreamError> {
        let mut state = self.shared.lock();
        let was_idle = state.open_streams() == 0;
        state.broken(why);
        match state.ended() {
            Some(error) if !was_idle => Err(error),
            _ => Ok(()),
        }
    }

    /// Reads once, and takes in what there is. Ready with the number of bytes: 0 at the end.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if let Reading::Large(header, memory) = &mut self.reading {
            let bytes = memory.bytes();
            let end = INDENT + header.length;
            let missing = end + BETWEEN - bytes.len();
            let mut rest = (&mut *bytes).limit(missing);
            let read = ready!(poll_read_buf(Pin::new(&mut self.io), cx, &mut rest))?;
            if bytes.len() < end {
                self.shared.lock().heard(read);
                return Poll::Ready(Ok(read));
            }
            let (header, bytes) = (*header, Bytes::from_owner(mem::take(memory)));
            self.reading = Reading::Between;
            let payload = bytes.slice(INDENT..end);
            take_in(&mut self.shared.lock(), header, &payload, Some(&payload));
            let next = &bytes[end..];
            if next.is_empty() {
                self.shared.lock().heard(read);
            } else {
                self.take_in_all(next, read);
            }
            return Poll::Ready(Ok(read));
        }
        BUFFER.with_borrow_mut(|buffer| {
            let buffer = &mut buffer[INDENT..];
            let (held, limit) = match &self.reading {
                Reading::Some(held) => (&held[..], READ),
                Reading::Between => (&[][..], BETWEEN),
                Reading::Preface(_) | Reading::Large(..) => (&[][..], READ),
            };
            let held_size = held.len();
            buffer[..held_size].copy_from_slice(held);
            let mut fresh = ReadBuf::new(&mut buffer[held_size..limit]);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut fresh))?;
            let read = fresh.filled().len();
            if read > 0 {
                self.take_in_all(&buffer[..held_size + read], read);
            }
            Poll::Ready(Ok(read))
        })
    }

    /// Takes in the frames in `bytes`, and keeps what is not a whole one.
    fn take_in_all(&mut self, bytes: &[u8], read: usize) {
        let mut rest = bytes;
        let mut state = self.shared.lock();
        state.heard(read);
        let mut held = match &mut self.reading {
            Reading::Some(held) => mem::take(held),
            _ => Vec::new(),
        };
        held.clear();
        if let Reading::Preface(said) = self.reading {
            let (now, others) = rest.split_at(rest.len().min(PREFACE.len() - said));
            if !PREFACE[said..].starts_with(now) {
                state.violated(Reason::PROTOCOL_ERROR);
            }
            if said + now.len() < PREFACE.len() {
                self.reading = Reading::Preface(said + now.len());
                return;
            }
            rest = others;
        }
        while let Some(header) = FrameHeader::read(rest) {
            let there = &rest[HEADER..];
            if header.length > MAX_FRAME_SIZE as usize {
                state.violated(Reason::FRAME_SIZE_ERROR);
            }
            if state.ended().is_some() {
                rest = &[];
                break;
            }
            let Some((payload, others)) = there.split_at_checked(header.length) else {
                if header.length > LARGE {
                    let mut memory = FrameMemory::with_room(INDENT + header.length + BETWEEN);
                    memory.bytes().resize(INDENT, 0);
                    memory.bytes().extend_from_slice(there);
                    self.reading = Reading::Large(header, memory);
                    return;
                }
                break;
            };
            take_in(&mut state, header, payload, None);
            rest = others;
        }
        held.extend_from_slice(rest);
        self.reading = Reading::Some(held);
    }
}

fn take_in(state: &mut State, header: FrameHeader, payload: &[u8], whole: Option<&Bytes>) {
    if let Err(reason) = state.receive(header, payload, whole) {
        state.violated(reason);
    }
}

impl<S> Drop for Connection<S> {
    fn drop(&mut self) {
        // Calls hold the state, and would wait for ever.
        self.shared.lock().broken("the connection was given up");
    }
}

impl Calls {
    /// Whether calls can be begun, as far as is known.
    pub fn is_open(&self) -> bool {
        self.shared.lock().takes_calls()
    }

    /// How many calls the peer takes at a time, if it has said so.
    pub fn max_streams(&self) -> Option<usize> {
        self.shared.lock().said_max_streams()
    }

    /// How many calls the peer is given at a time before it says how many it takes.
    pub fn expect_max_streams(&self, max_streams: usize) {
        self.shared.lock().expect_max_streams(max_streams);
    }

    /// How much it has to carry now.
    pub fn load(&self) -> Load {
        self.shared.lock().load()
    }

    /// Begins a call; with `is_end` the headers are all of it.
    ///
    /// # Errors
    /// `StreamError`, when the connection takes none.
    pub fn begin(
        &self,
        pseudo: Pseudo,
        fields: Fields,
        is_end: bool,
    ) -> Result<(Incoming, Outgoing), StreamError> {
        let key = self.shared.lock().begin(pseudo, fields, is_end)?;
        let incoming = Incoming::new(self.shared.clone(), key);
        Ok((incoming, Outgoing::new(self.shared.clone(), key)))
    }
}

impl Clone for Calls {
    fn clone(&self) -> Self {
        self.shared.lock().add_caller();
        Calls {
            shared: self.shared.clone(),
        }
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        self.shared.lock().drop_caller();
    }
}

impl Farewell {
    /// Takes no new calls; those that are under way are served to their end.
    pub fn say(&self) {
        self.shared.lock().leave();
    }
}

impl Pulse {
    /// How many bytes have come.
    pub fn heard(&self) -> u64 {
        self.shared.lock().bytes_heard()
    }

    /// Whether an answer is waited for.
    pub fn has_calls(&self) -> bool {
        self.shared.lock().open_streams() > 0
    }

    /// Asks for a sign of life.
    pub fn ask(&self) {
        self.shared.lock().ping();
    }
}
