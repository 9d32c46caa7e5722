//! The state of one HTTP/2 connection: its streams, the windows, the tables of HPACK, and what
//! waits to be sent. Frames that were read come in by `receive`; those that are to be written go
//! out by `assemble`; calls move their messages through `stream`'s handles. There is no I/O here.
//!
//! What waits is bounded: a stream's share by its window and `SEND_BUFFER`, that of all by
//! `QUEUED`, answers to what the peer says by `is_flooded`. A stream counts until its end has been
//! handed to the socket, so a peer that does not read cannot begin others instead.

mod receiving;
mod rhythm;
mod sending;
mod windows;

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use slab::Slab;
use tokio::time::Instant;

use super::fields::Fields;
use super::frame::{self, FIRST_FRAME_SIZE, FIRST_WINDOW, LARGEST_WINDOW, PREFACE, Reason, kind};
use super::hpack::{Block, Decoder, Encoder, Pseudo};
use super::{MAX_FRAME_SIZE, SEND_BUFFER, STREAM_WINDOW, whole_messages};
use crate::chunks::Chunks;
use crate::quick_map::QuickMap;
use rhythm::Rhythm;
use windows::Distance;

/// What may wait to be sent for all streams together, in bytes.
const QUEUED: usize = 8 * 1024 * 1024;
/// Frames up to this size overtake those of other streams that send a lot.
const SMALL: usize = 16 * 1024;
/// Chunks below this size are gathered up to `GATHERED` while they are not read: each one costs
/// some fifty bytes, however small it is.
const SMALL_CHUNK: usize = 1024;
const GATHERED: usize = 16 * 1024;
/// How many bytes of answers to a peer may wait before no more of it is read.
const FLOOD: usize = 64 * 1024;
/// How many streams may be gone for the peer but not yet for those who serve them.
const LINGERING: usize = 1024;
/// How many streams that were reset are remembered: what is still under way for them is no error.
const REMEMBERED_RESETS: usize = 1024;
/// How many CONTINUATION frames a header block may have, and how much longer it may be than what
/// it stands for. It is dropped then, but has to be decoded.
const CONTINUATIONS: usize = 1024;
const BLOCK_FACTOR: usize = 2;
/// From so many bytes of data on, a stream is a transfer.
const TRANSFER: usize = 128 * 1024;
/// How many streams a client opens before the server has said how many it takes.
const FIRST_STREAMS: usize = 100;
/// The PING by which a server learns that its farewell has arrived.
const FAREWELL: [u8; 8] = *b"farewell";

/// Which end of a connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It begins calls.
    Client,
    /// It serves so many calls at a time.
    Server {
        /// How many.
        max_streams: u32,
    },
}

/// Why a stream, or all of a connection, came to an end before its time.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StreamError {
    /// The peer reset the stream.
    #[error("it was reset: {0}")]
    Reset(Reason),
    /// The peer broke the rules, or went on for too long: it was reset on this side.
    #[error("the peer broke HTTP/2's rules: {0}")]
    Violation(Reason),
    /// The peer did not look at the stream: it has said farewell (GOAWAY), or had as many as it takes
    /// (REFUSED_STREAM and the like).
    #[error("the peer did not look at it: {0}")]
    NotProcessed(Reason),
    /// The connection is gone.
    #[error("{0}")]
    Broken(Arc<str>),
}

/// What a connection has to carry. Less is less to wait behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Load {
    /// Whether further streams would have to wait until others end.
    pub is_full: bool,
    /// Streams that have moved a lot.
    pub transfers: usize,
    /// All that are not at their end.
    pub streams: usize,
}

/// The stream takes no more.
#[derive(Clone, Copy, Debug)]
pub struct Gone;

/// One stream.
pub struct Stream {
    /// 0 while a client waits to open it.
    id: u32,
    /// How many handles to it exist.
    handles: u8,
    /// One of them reads.
    has_reader: bool,
    error: Option<StreamError>,

    /// The headers have come, or are not due.
    is_begun: bool,
    head: Option<Arc<Block>>,
    chunks: Chunks,
    /// Small chunks behind those.
    gathered: BytesMut,
    trailers: Option<Fields>,
    unread: usize,
    has_ended: bool,
    /// What the peer may send, and what it may send more but has not been told of.
    window_in: i64,
    credit: u32,
    /// When a client opened it, if that matters.
    asked: Option<Instant>,
    /// By how much its window is larger than that of a new stream.
    extra_window: u32,
    /// How much has been read since when, as far as it was asked.
    pace: Option<(Instant, u32)>,
    rhythm: Rhythm,
    /// What is still due by `content-length`.
    announced: Option<u64>,
    reader: Option<Waker>,

    /// The end has been queued.
    is_ended: bool,
    /// The headers have been handed to the socket; a client's stream is open only then.
    is_opened: bool,
    /// The end has been handed to the socket.
    is_sent: bool,
    window_out: i64,
    /// Bytes of data in both directions.
    moved: usize,
    /// Frames in the outbox, their bytes, and how many of them are in its slow lane.
    frames: usize,
    queued: usize,
    slow: usize,
    /// The writer waits for room.
    is_waiting: bool,
    /// It stands in the connection's list of those.
    is_blocked: bool,
    writer: Option<Waker>,
}

impl Stream {
    fn new(id: u32, window_in: u32, window_out: i64) -> Self {
        Stream {
            id,
            handles: 2,
            has_reader: true,
            error: None,
            is_begun: false,
            head: None,
            chunks: Chunks::default(),
            gathered: BytesMut::new(),
            trailers: None,
            unread: 0,
            has_ended: false,
            window_in: i64::from(window_in),
            credit: 0,
            asked: None,
            extra_window: 0,
            pace: None,
            rhythm: Rhythm::default(),
            announced: None,
            reader: None,
            is_ended: false,
            is_opened: false,
            is_sent: false,
            window_out,
            moved: 0,
            frames: 0,
            queued: 0,
            slow: 0,
            is_waiting: false,
            is_blocked: false,
            writer: None,
        }
    }

    fn push(&mut self, data: Bytes) {
        self.unread += data.len();
        if data.len() < SMALL_CHUNK && !(self.chunks.is_empty() && self.gathered.is_empty()) {
            if self.gathered.len() + data.len() > GATHERED {
                self.chunks.push(self.gathered.split().freeze());
            }
            self.gathered.extend_from_slice(&data);
            return;
        }
        if !self.gathered.is_empty() {
            self.chunks.push(self.gathered.split().freeze());
        }
        self.chunks.push(data);
    }

    fn pop(&mut self) -> Option<Bytes> {
        let chunk = match self.chunks.pop() {
            Some(chunk) => chunk,
            None if self.gathered.is_empty() => return None,
            None => std::mem::take(&mut self.gathered).freeze(),
        };
        self.unread -= chunk.len();
        Some(chunk)
    }

    fn wake_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
        // It may be one that waits for the rest of a message.
        whole_messages::pass_on();
    }

    fn wake_writer(&mut self) {
        self.is_waiting = false;
        if let Some(writer) = self.writer.take() {
            writer.wake();
        }
    }
}

/// A frame that waits to be sent. Headers are encoded when it is their turn, for HPACK wants them
/// in the order in which they are sent.
pub enum Frame {
    /// A header list.
    Head {
        /// What comes first.
        pseudo: Pseudo,
        /// All other fields.
        fields: Fields,
        /// The stream ends with it.
        is_end: bool,
    },
    /// Data.
    Data {
        /// All of it has room in the windows.
        data: Bytes,
        /// The stream ends with it.
        is_end: bool,
    },
    /// The stream is reset once what came before has been sent.
    Reset(Reason),
}

impl Frame {
    /// Of data, in bytes.
    fn size(&self) -> usize {
        match self {
            Frame::Data { data, .. } => data.len(),
            Frame::Head { .. } | Frame::Reset(_) => 0,
        }
    }
}

/// What a client has called for.
pub struct Call {
    /// Its stream.
    pub key: usize,
    /// Its headers.
    pub head: Arc<Block>,
}

/// A header block that is not complete.
struct Unfinished {
    stream: u32,
    is_end: bool,
    block: Vec<u8>,
    frames: usize,
}

/// What a connection is doing.
#[derive(Debug)]
enum Phase {
    Open,
    /// Farewell has been said, but calls that are under way are still taken.
    Leaving,
    /// The peer knows which calls are the last. No others are begun.
    Left,
    /// Nothing more is read, and no stream is left.
    Over(StreamError),
}

/// See the module.
pub struct State {
    role: Role,
    phase: Phase,
    streams: Slab<Stream>,
    /// Those that are open for the peer.
    by_id: QuickMap<u32, usize>,
    /// Those of a client that have become transfers; some may have ended.
    transfers: Vec<u32>,
    /// Those that a client cannot open yet, as the server takes no more at a time.
    waiting: VecDeque<(usize, Frame)>,
    /// Calls to be served.
    calls: Vec<Call>,
    resets: VecDeque<u32>,
    /// The newest stream of the peer, and the next one of one's own.
    newest: u32,
    next: u32,
    is_greeted: bool,
    unfinished: Option<Unfinished>,
    heard: u64,
    /// How many handles can begin calls.
    callers: usize,

    decoder: Decoder,
    header_list: usize,
    /// What the peer may send on the connection, what it may send more but has not been told of,
    /// and how much both are together.
    window_in: i64,
    credit: u32,
    window: u32,
    /// What it may send on a new stream, and what on the one whose window has grown most.
    first_window_in: u32,
    widest: u32,
    distance: Distance,
    /// When the peer was asked how far it is, if it has not answered.
    asked_how_far: Option<Instant>,

    encoder: Encoder,
    window_out: i64,
    first_window_out: i64,
    frame_size: usize,
    /// How many streams the peer takes, once it has said so, and how many it is given until then.
    max_streams: Option<usize>,
    first_streams: usize,
    /// Whole frames that may overtake all others.
    control: Vec<u8>,
    fast: VecDeque<(usize, Frame)>,
    slow: VecDeque<(usize, Frame)>,
    queued: usize,
    /// Streams whose writers wait for room in the connection's window or the queue.
    blocked: Vec<usize>,
    scratch: Vec<u8>,
    driver: Option<Waker>,
    is_asleep: bool,
}

impl State {
    /// A connection on which so much may be unread, and on which header lists come to no more than
    /// so many bytes.
    pub fn new(role: Role, window: u32, header_list: u32) -> Self {
        let mut control = Vec::new();
        let mut settings = vec![(4, STREAM_WINDOW), (5, MAX_FRAME_SIZE), (6, header_list)];
        match role {
            Role::Client => {
                control.extend_from_slice(PREFACE);
                // There is no use for what a server pushes.
                settings.insert(0, (2, 0));
            }
            Role::Server { max_streams } => settings.insert(0, (3, max_streams)),
        }
        let settings = frame::settings(&settings);
        frame::put(&mut control, kind::SETTINGS, 0, 0, &settings);
        let more = window.saturating_sub(FIRST_WINDOW);
        frame::put(&mut control, kind::WINDOW_UPDATE, 0, 0, &more.to_be_bytes());
        State {
            role,
            phase: Phase::Open,
            streams: Slab::new(),
            by_id: QuickMap::default(),
            transfers: Vec::new(),
            waiting: VecDeque::new(),
            calls: Vec::new(),
            resets: VecDeque::new(),
            newest: 0,
            next: 1,
            is_greeted: false,
            unfinished: None,
            heard: 0,
            callers: 0,
            decoder: Decoder::new(header_list as usize),
            header_list: header_list as usize,
            window_in: i64::from(window),
            credit: 0,
            window,
            first_window_in: STREAM_WINDOW,
            widest: STREAM_WINDOW,
            distance: Distance::Asked(Instant::now()),
            asked_how_far: None,
            encoder: Encoder::default(),
            window_out: i64::from(FIRST_WINDOW),
            first_window_out: i64::from(FIRST_WINDOW),
            frame_size: FIRST_FRAME_SIZE as usize,
            max_streams: None,
            first_streams: FIRST_STREAMS,
            control,
            fast: VecDeque::new(),
            slow: VecDeque::new(),
            queued: 0,
            blocked: Vec::new(),
            scratch: Vec::new(),
            driver: None,
            is_asleep: false,
        }
    }

    // What the connection's task asks.

    /// Which end this is.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Whether the peer has spoken HTTP/2.
    pub fn is_greeted(&self) -> bool {
        self.is_greeted
    }

    /// Whether either side has said farewell.
    pub fn is_leaving(&self) -> bool {
        matches!(self.phase, Phase::Leaving | Phase::Left)
    }

    /// Whether the peer must read before more of it is read.
    pub fn is_flooded(&self) -> bool {
        self.control.len() >= FLOOD
    }

    /// Whether no stream is left, and none will be begun.
    pub fn is_done(&self) -> bool {
        let is_idle = self.by_id.is_empty() && self.fast.is_empty() && self.slow.is_empty();
        match (&self.phase, self.role) {
            (Phase::Over(_), _) => true,
            (Phase::Left, _) => is_idle,
            (_, Role::Client) => is_idle && self.callers == 0 && self.waiting.is_empty(),
            (_, Role::Server { .. }) => false,
        }
    }

    /// Why it is over, if it is.
    pub fn ended(&self) -> Option<StreamError> {
        match &self.phase {
            Phase::Over(error) => Some(error.clone()),
            _ => None,
        }
    }

    /// How many streams are not at their end.
    pub fn open_streams(&self) -> usize {
        self.by_id.len() + self.waiting.len()
    }

    /// How much there is to carry.
    pub fn load(&mut self) -> Load {
        self.transfers.retain(|id| self.by_id.contains_key(id));
        let streams = self.open_streams();
        Load {
            // Where none is taken at all, another connection takes none either.
            is_full: streams >= self.max_streams().max(1),
            transfers: self.transfers.len(),
            streams,
        }
    }

    /// How many streams the peer takes, if it has said so.
    pub fn said_max_streams(&self) -> Option<usize> {
        self.max_streams
    }

    /// What the peer will most likely say.
    pub fn expect_max_streams(&mut self, max_streams: usize) {
        self.first_streams = max_streams;
    }

    fn max_streams(&self) -> usize {
        self.max_streams.unwrap_or(self.first_streams)
    }

    /// So much of a stream's data has come or is about to leave.
    fn moved(&mut self, key: usize, size: usize) {
        let stream = &mut self.streams[key];
        let was_transfer = stream.moved >= TRANSFER;
        stream.moved += size;
        if self.role == Role::Client && !was_transfer && stream.moved >= TRANSFER {
            self.transfers.push(stream.id);
        }
    }

    /// Whether there is nothing to write. Then `waker` is woken once there is.
    pub fn is_idle_for(&mut self, waker: &Waker) -> bool {
        let is_idle = self.control.is_empty() && self.fast.is_empty() && self.slow.is_empty();
        self.is_asleep = is_idle;
        if is_idle {
            keep(&mut self.driver, waker);
        }
        is_idle
    }

    /// Nobody need wake the connection's task, which is at work.
    pub fn is_awake(&mut self) {
        self.is_asleep = false;
    }

    /// The calls that have come.
    pub fn take_calls(&mut self) -> Vec<Call> {
        std::mem::take(&mut self.calls)
    }

    /// Says farewell: calls that are under way are served to their end.
    pub fn leave(&mut self) {
        if !matches!(self.phase, Phase::Open) {
            return;
        }
        self.phase = Phase::Leaving;
        self.go_away(LARGEST_WINDOW as u32, Reason::NO_ERROR);
        frame::put(&mut self.control, kind::PING, 0, 0, &FAREWELL);
        self.stir();
    }

    /// So many bytes have come.
    pub fn heard(&mut self, bytes: usize) {
        self.heard += bytes as u64;
    }

    /// How many have come in all.
    pub fn bytes_heard(&self) -> u64 {
        self.heard
    }

    /// Asks for a sign of life.
    pub fn ping(&mut self) {
        frame::put(&mut self.control, kind::PING, 0, 0, &[0; 8]);
        self.stir();
    }

    /// The peer has broken the rules: it is told so, and all streams end.
    pub fn violated(&mut self, reason: Reason) {
        self.go_away(self.newest, reason);
        self.end(StreamError::Violation(reason));
    }

    /// The connection is gone.
    pub fn broken(&mut self, why: &str) {
        self.control.clear();
        self.end(StreamError::Broken(why.into()));
    }

    fn end(&mut self, error: StreamError) {
        if matches!(self.phase, Phase::Over(_)) {
            return;
        }
        self.phase = Phase::Over(error.clone());
        self.by_id.clear();
        self.waiting.clear();
        self.fast.clear();
        self.slow.clear();
        self.queued = 0;
        self.calls.clear();
        for (_, stream) in &mut self.streams {
            (stream.frames, stream.queued, stream.slow) = (0, 0, 0);
            stream.error.get_or_insert_with(|| error.clone());
            stream.wake_reader();
            stream.wake_writer();
        }
        self.streams.retain(|_, stream| stream.handles > 0);
    }

    fn go_away(&mut self, last: u32, reason: Reason) {
        let mut payload = [0; 8];
        payload[..4].copy_from_slice(&last.to_be_bytes());
        payload[4..].copy_from_slice(&reason.0.to_be_bytes());
        frame::put(&mut self.control, kind::GOAWAY, 0, 0, &payload);
    }

    fn stir(&mut self) {
        if std::mem::take(&mut self.is_asleep)
            && let Some(driver) = &self.driver
        {
            driver.wake_by_ref();
        }
    }

    // What the handles ask.

    /// One more handle that can begin calls.
    pub fn add_caller(&mut self) {
        self.callers += 1;
    }

    /// One less.
    pub fn drop_caller(&mut self) {
        self.callers -= 1;
        if self.callers == 0 {
            self.stir();
        }
    }

    /// Whether calls can be begun.
    pub fn takes_calls(&self) -> bool {
        matches!(self.phase, Phase::Open) && i64::from(self.next) < LARGEST_WINDOW
    }

    /// Begins a call. It has two handles from then on.
    ///
    /// # Errors
    /// `StreamError`, when the connection takes none.
    pub fn begin(
        &mut self,
        pseudo: Pseudo,
        fields: Fields,
        is_end: bool,
    ) -> Result<usize, StreamError> {
        if !self.takes_calls() {
            let gone = StreamError::Broken("the peer takes no more calls".into());
            return Err(self.ended().unwrap_or(gone));
        }
        let key = self.streams.insert(Stream::new(0, self.first_window_in, 0));
        self.streams[key].is_ended = is_end;
        let head = Frame::Head {
            pseudo,
            fields,
            is_end,
        };
        if self.by_id.len() < self.max_streams() {
            self.open(key);
            self.queue(key, head);
        } else {
            self.waiting.push_back((key, head));
        }
        Ok(key)
    }

    /// The headers of the answer.
    pub fn poll_head(
        &mut self,
        key: usize,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Arc<Block>, StreamError>> {
        let stream = &mut self.streams[key];
        match (stream.head.take(), &stream.error) {
            (Some(head), _) => Poll::Ready(Ok(head)),
            (None, Some(error)) => Poll::Ready(Err(error.clone())),
            (None, None) => {
                keep(&mut stream.reader, cx.waker());
                Poll::Pending
            }
        }
    }

    /// The next chunk; `None` after the last one. The peer may send as much again: nothing grows by
    /// that, for whoever cannot pass a chunk on reads no other.
    pub fn poll_data(
        &mut self,
        key: usize,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, StreamError>>> {
        let stream = &mut self.streams[key];
        if let Some(chunk) = stream.pop() {
            self.credit(key, chunk.len());
            return Poll::Ready(Some(Ok(chunk)));
        }
        match (stream.has_ended, &stream.error) {
            (true, _) => Poll::Ready(None),
            (false, Some(error)) => Poll::Ready(Some(Err(error.clone()))),
            (false, None) => {
                keep(&mut stream.reader, cx.waker());
                Poll::Pending
            }
        }
    }

    /// The trailers, once there is no more data.
    pub fn poll_trailers(
        &mut self,
        key: usize,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Fields>, StreamError>> {
        let stream = &mut self.streams[key];
        match (stream.has_ended, &stream.error) {
            (true, _) => Poll::Ready(Ok(stream.trailers.take())),
            (false, Some(error)) => Poll::Ready(Err(error.clone())),
            (false, None) => {
                keep(&mut stream.reader, cx.waker());
                Poll::Pending
            }
        }
    }

    /// Whether neither data nor trailers follow.
    pub fn is_end_stream(&self, key: usize) -> bool {
        let stream = &self.streams[key];
        stream.has_ended && stream.unread == 0 && stream.trailers.is_none()
    }

    /// Sends headers or trailers.
    ///
    /// # Errors
    /// `Gone`, when nobody takes them.
    pub fn send_head(
        &mut self,
        key: usize,
        pseudo: Pseudo,
        fields: Fields,
        is_end: bool,
    ) -> Result<(), Gone> {
        let stream = &self.streams[key];
        if stream.error.is_some() || stream.is_ended {
            return Err(Gone);
        }
        self.queue_head(key, pseudo, fields, is_end);
        Ok(())
    }

    /// Sends `chunk` as fast as there is room for it, and leaves what has not been sent yet. With
    /// its end the stream ends too, if it is the `last`.
    ///
    /// # Errors
    /// `Gone`, when nobody takes it.
    pub fn poll_send(
        &mut self,
        key: usize,
        cx: &mut Context<'_>,
        chunk: &mut Bytes,
        last: bool,
    ) -> Poll<Result<(), Gone>> {
        let stream = &mut self.streams[key];
        if stream.error.is_some() || stream.is_ended {
            return Poll::Ready(Err(Gone));
        }
        let shared = self
            .window_out
            .min(QUEUED.saturating_sub(self.queued) as i64);
        let own = stream
            .window_out
            .min(SEND_BUFFER.saturating_sub(stream.queued) as i64);
        let room = chunk.len().min(shared.min(own).max(0) as usize);
        let is_whole = room == chunk.len();
        if room > 0 || is_whole && last && stream.id > 0 {
            let data = chunk.split_to(room);
            stream.window_out -= room as i64;
            self.window_out -= room as i64;
            stream.is_ended = last && is_whole;
            let is_end = stream.is_ended;
            self.moved(key, room);
            self.queue(key, Frame::Data { data, is_end });
            if is_whole {
                return Poll::Ready(Ok(()));
            }
        } else if is_whole && !last {
            return Poll::Ready(Ok(()));
        }
        let stream = &mut self.streams[key];
        stream.is_waiting = true;
        keep(&mut stream.writer, cx.waker());
        if shared <= room as i64 && !std::mem::replace(&mut stream.is_blocked, true) {
            self.blocked.push(key);
        }
        Poll::Pending
    }

    /// Ready when the stream takes nothing more, though it has not been ended.
    pub fn poll_gone(&mut self, key: usize, cx: &mut Context<'_>) -> Poll<Gone> {
        let stream = &mut self.streams[key];
        if stream.error.is_some() {
            return Poll::Ready(Gone);
        }
        keep(&mut stream.writer, cx.waker());
        Poll::Pending
    }

    /// Resets a stream, once what has been queued is sent.
    pub fn send_reset(&mut self, key: usize, reason: Reason) {
        let stream = &mut self.streams[key];
        if stream.error.is_some() {
            return;
        }
        let error = StreamError::Violation(reason);
        if stream.frames == 0 {
            return self.reset(key, reason, error);
        }
        stream.error = Some(error);
        stream.is_ended = true;
        self.queue(key, Frame::Reset(reason));
    }

    /// The reader is gone.
    pub fn drop_reader(&mut self, key: usize) {
        self.streams[key].has_reader = false;
        self.discard(key);
        self.drop_handle(key);
    }

    /// A handle is gone; with the last one the stream ends.
    pub fn drop_handle(&mut self, key: usize) {
        let stream = &mut self.streams[key];
        stream.handles -= 1;
        if stream.handles > 0 {
            return;
        }
        if stream.error.is_none() && stream.id == 0 {
            self.waiting.retain(|(waiting, _)| *waiting != key);
        } else if stream.error.is_none() && !(stream.is_ended && stream.has_ended) {
            // Whoever has all of the answer need not send the rest of the request.
            if stream.is_ended && self.role != Role::Client {
                return self.queue(key, Frame::Reset(Reason::NO_ERROR));
            }
            let error = StreamError::Violation(Reason::CANCEL);
            return self.reset(key, Reason::CANCEL, error);
        }
        self.settle(key);
    }
}

/// Remembers whom to wake.
fn keep(place: &mut Option<Waker>, waker: &Waker) {
    if place.as_ref().is_none_or(|kept| !kept.will_wake(waker)) {
        *place = Some(waker.clone());
    }
}
