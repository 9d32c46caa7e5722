//! Both ends of a connection against `h2`, against each other, and against frames by hand.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderName, HeaderValue, Method, StatusCode};
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex,
};
use tokio::sync::{mpsc, watch};

use super::SEND_BUFFER;
use super::connection::{Calls, Connection, Request};
use super::fields::Fields;
use super::frame::{self, FrameHeader, PREFACE, Reason, flag, kind};
use super::hpack::Pseudo;
use super::stream::{AnswerHead, Incoming, Load, Outgoing, StreamError};
use super::whole_messages;
use crate::task;

const PIPE: usize = 64 * 1024;

fn fields(pairs: &[(&'static str, &'static str)]) -> Fields {
    let pair = |(name, value): &(&'static str, &'static str)| {
        (
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        )
    };
    pairs.iter().map(pair).collect()
}

fn post(path: &'static str) -> Pseudo {
    let authority = Authority::from_static("localhost");
    let path = PathAndQuery::from_static(path);
    Pseudo::Request(Box::new((Method::POST, Scheme::HTTP, authority, path)))
}

/// Carries a server's end. Its calls come out of the channel.
fn serve(io: DuplexStream, max_streams: u32) -> mpsc::Receiver<Request> {
    let (sender, calls) = mpsc::channel(1000);
    let mut connection = Connection::server(io, max_streams);
    task::spawn("server", async move {
        poll_fn(|cx| connection.poll(cx, |call| drop(sender.try_send(call)))).await
    });
    calls
}

fn call_on(io: DuplexStream) -> Calls {
    let (calls, mut connection) = Connection::client(io);
    task::spawn("client", async move {
        poll_fn(|cx| connection.poll(cx, drop)).await
    });
    calls
}

/// Sends back what comes, with its length as a trailer.
async fn echo(request: Request) {
    let Request {
        mut body,
        mut reply,
        ..
    } = request;
    let head = AnswerHead {
        status: StatusCode::OK,
        headers: fields(&[("content-type", "application/grpc")]),
    };
    reply.answer(head, false).unwrap();
    let mut size = 0;
    while let Some(chunk) = poll_fn(|cx| body.poll_data(cx)).await {
        let mut chunk = chunk.unwrap();
        size += chunk.len();
        if poll_fn(|cx| reply.poll_send(cx, &mut chunk, false))
            .await
            .is_err()
        {
            return;
        }
    }
    let size = HeaderValue::from(size);
    let trailers = Fields::from_iter([(HeaderName::from_static("x-size"), size)]);
    reply.end(trailers).unwrap();
}

fn serve_echoes(io: DuplexStream) {
    let mut calls = serve(io, 100);
    task::spawn("echoes", async move {
        while let Some(call) = calls.recv().await {
            task::spawn("echo", echo(call));
        }
    });
}

/// An echo server of `h2`.
fn serve_echoes_of_h2(io: DuplexStream) {
    task::spawn("h2", async move {
        let mut builder = h2::server::Builder::new();
        builder
            .max_concurrent_streams(3)
            .initial_window_size(10_000);
        let mut connection = builder.handshake::<_, Bytes>(io).await.unwrap();
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            task::spawn("h2 call", async move {
                let mut body = request.into_body();
                let mut reply = respond
                    .send_response(http::Response::new(()), false)
                    .unwrap();
                let mut size = 0;
                while let Some(Ok(chunk)) = body.data().await {
                    let _ = body.flow_control().release_capacity(chunk.len());
                    size += chunk.len();
                    reply.send_data(chunk, false).unwrap();
                }
                let mut trailers = http::HeaderMap::new();
                trailers.insert("x-size", size.into());
                reply.send_trailers(trailers).unwrap();
            });
        }
    });
}

async fn read_all(body: &mut Incoming) -> Result<(Vec<u8>, Option<Fields>), StreamError> {
    let mut read = Vec::new();
    while let Some(chunk) = poll_fn(|cx| body.poll_data(cx)).await {
        read.extend_from_slice(&chunk?);
    }
    let trailers = poll_fn(|cx| body.poll_trailers(cx)).await?;
    Ok((read, trailers))
}

async fn send_all(out: &mut Outgoing, data: &[u8], pieces: usize) {
    let pieces: Vec<&[u8]> = data.chunks(pieces.max(1)).collect();
    for (place, piece) in pieces.iter().enumerate() {
        let mut piece = Bytes::copy_from_slice(piece);
        let last = place + 1 == pieces.len();
        poll_fn(|cx| out.poll_send(cx, &mut piece, last))
            .await
            .unwrap();
    }
    if pieces.is_empty() {
        poll_fn(|cx| out.poll_send(cx, &mut Bytes::new(), true))
            .await
            .unwrap();
    }
}

/// Makes calls with bodies of random sizes, several at a time.
async fn make_random_calls(calls: Calls, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..20 {
        let at_a_time: Vec<_> = (0..random.usize(1..8))
            .map(|_| {
                let longest = [1, 100, 20_000, 600_000][random.usize(..4)];
                let size = random.usize(..longest);
                let data: Vec<u8> = (0..size).map(|_| random.u8(..)).collect();
                let pieces = random.usize(1..100_000).max(size / 50);
                let calls = calls.clone();
                task::spawn("call", async move {
                    let headers = fields(&[("te", "trailers"), ("x-one", "two")]);
                    let (mut body, mut out) = calls.begin(post("/echo"), headers, false).unwrap();
                    let sending = send_all(&mut out, &data, pieces);
                    let reading = async {
                        let head = poll_fn(|cx| body.poll_head(cx)).await.unwrap();
                        assert_eq!(head.status, Some(StatusCode::OK));
                        read_all(&mut body).await.unwrap()
                    };
                    let ((), (read, trailers)) = tokio::join!(sending, reading);
                    assert!(read == data);
                    let size = trailers.unwrap().iter().next().unwrap().1.clone();
                    assert_eq!(size, data.len().to_string());
                })
            })
            .collect();
        for call in at_a_time {
            assert!(call.await.unwrap().is_some(), "a call failed");
        }
    }
}

#[tokio::test]
async fn a_client_and_a_server_understand_each_other() {
    let (near, far) = duplex(PIPE);
    serve_echoes(far);
    make_random_calls(call_on(near), 1).await;
}

#[tokio::test]
async fn a_server_of_h2_understands_the_client_and_limits_its_streams_and_windows() {
    let (near, far) = duplex(PIPE);
    serve_echoes_of_h2(far);
    make_random_calls(call_on(near), 2).await;
}

#[tokio::test]
async fn a_client_of_h2_understands_the_server() {
    for (seed, window) in [(3, 65_535), (4, 1000), (5, 1 << 20)] {
        let (near, far) = duplex(PIPE);
        serve_echoes(far);
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(window).max_frame_size(20_000);
        let (client, connection) = builder.handshake::<_, Bytes>(near).await.unwrap();
        task::spawn("client", connection);
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..20 {
            let data: Vec<u8> = (0..random.usize(..200_000))
                .map(|_| random.u8(..))
                .collect();
            let request = http::Request::post("http://localhost/echo")
                .body(())
                .unwrap();
            let mut ready = client.clone().ready().await.unwrap();
            let (response, mut out) = ready.send_request(request, false).unwrap();
            out.send_data(data.clone().into(), true).unwrap();
            let mut body = response.await.unwrap().into_body();
            let mut read = Vec::new();
            while let Some(chunk) = body.data().await {
                let chunk = chunk.unwrap();
                body.flow_control().release_capacity(chunk.len()).unwrap();
                read.extend_from_slice(&chunk);
            }
            assert!(read == data);
            let trailers = body.trailers().await.unwrap().unwrap();
            assert_eq!(trailers["x-size"], data.len().to_string());
        }
    }
}

/// A peer that writes frames by hand.
struct Peer(DuplexStream);

#[derive(Debug)]
struct Seen {
    header: FrameHeader,
    payload: Vec<u8>,
}

impl Seen {
    /// How much more may be sent, by a WINDOW_UPDATE.
    fn window_update(&self) -> usize {
        let more = self.payload[..].try_into().unwrap();
        u32::from_be_bytes(more) as usize
    }

    fn code(&self) -> Reason {
        let at = if self.header.kind == kind::GOAWAY {
            4
        } else {
            0
        };
        Reason(u32::from_be_bytes(
            self.payload[at..at + 4].try_into().unwrap(),
        ))
    }
}

impl Peer {
    /// A client of a server, whose calls come out of the channel.
    async fn of_server() -> (Self, mpsc::Receiver<Request>) {
        let (near, far) = duplex(PIPE);
        let calls = serve(far, 10);
        let mut peer = Peer(near);
        peer.0.write_all(PREFACE).await.unwrap();
        peer.send(kind::SETTINGS, 0, 0, &[]).await;
        (peer, calls)
    }

    /// A server of a client.
    async fn of_client() -> (Self, Calls) {
        let (near, far) = duplex(PIPE);
        let calls = call_on(far);
        let mut peer = Peer(near);
        let mut preface = [0; 24];
        peer.0.read_exact(&mut preface).await.unwrap();
        assert_eq!(preface, *PREFACE);
        peer.send(kind::SETTINGS, 0, 0, &[]).await;
        (peer, calls)
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut frame = Vec::new();
        frame::put(&mut frame, kind, flags, stream, payload);
        self.0.write_all(&frame).await.unwrap();
    }

    async fn read(&mut self) -> Option<Seen> {
        let mut header = [0; frame::HEADER];
        self.0.read_exact(&mut header).await.ok()?;
        let header = FrameHeader::read(&header).unwrap();
        let mut payload = vec![0; header.length];
        self.0.read_exact(&mut payload).await.ok()?;
        Some(Seen { header, payload })
    }

    /// The next frame of this kind, whatever comes before it.
    async fn next(&mut self, kind: u8) -> Seen {
        loop {
            let seen = self.read().await.expect("the connection was closed");
            if seen.header.kind == kind && (kind != kind::SETTINGS || seen.header.flags == 0) {
                return seen;
            }
        }
    }

    /// With which reason the connection is ended.
    async fn dismissal(&mut self) -> Reason {
        let reason = self.next(kind::GOAWAY).await.code();
        assert!(self.read().await.is_none(), "it is closed");
        reason
    }

    /// The connection goes on.
    async fn is_answered(&mut self) {
        self.send(kind::PING, 0, 0, b"12345678").await;
        assert_eq!(self.next(kind::PING).await.payload, b"12345678");
    }
}

/// `:method POST`, `:scheme http`, `:path /`.
const REQUEST: &[u8] = &[0x83, 0x86, 0x84];
const WHOLE: u8 = flag::END_HEADERS | flag::END_STREAM;

fn literal(name: &str, value: &str) -> Vec<u8> {
    let mut field = vec![0];
    for text in [name, value] {
        field.push(text.len() as u8);
        field.extend(text.as_bytes());
    }
    field
}

#[tokio::test]
async fn a_connection_that_breaks_the_rules_is_ended_with_the_reason() {
    type Sent = (u8, u8, u32, &'static [u8]);
    let cases: [(&[Sent], Reason); 18] = [
        (&[(kind::DATA, 0, 0, b"")], Reason::PROTOCOL_ERROR),
        (&[(kind::DATA, 0, 1, b"")], Reason::PROTOCOL_ERROR),
        (&[(kind::RST_STREAM, 0, 1, &[0; 4])], Reason::PROTOCOL_ERROR),
        (
            &[(kind::WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1])],
            Reason::PROTOCOL_ERROR,
        ),
        (
            &[(kind::HEADERS, WHOLE, 2, REQUEST)],
            Reason::PROTOCOL_ERROR,
        ),
        (
            &[(kind::CONTINUATION, WHOLE, 1, REQUEST)],
            Reason::PROTOCOL_ERROR,
        ),
        (
            &[(kind::HEADERS, 0, 1, REQUEST), (kind::PING, 0, 0, &[0; 8])],
            Reason::PROTOCOL_ERROR,
        ),
        (
            &[
                (kind::HEADERS, 0, 1, REQUEST),
                (kind::CONTINUATION, 4, 3, b""),
            ],
            Reason::PROTOCOL_ERROR,
        ),
        (
            &[(kind::PUSH_PROMISE, 4, 1, &[0; 8])],
            Reason::PROTOCOL_ERROR,
        ),
        (&[(kind::PING, 0, 0, &[0; 7])], Reason::FRAME_SIZE_ERROR),
        (&[(kind::PING, 0, 1, &[0; 8])], Reason::PROTOCOL_ERROR),
        (&[(kind::SETTINGS, 0, 0, &[0; 5])], Reason::FRAME_SIZE_ERROR),
        (
            &[(kind::SETTINGS, flag::ACK, 0, &[0; 6])],
            Reason::FRAME_SIZE_ERROR,
        ),
        (&[(kind::GOAWAY, 0, 0, &[0; 4])], Reason::FRAME_SIZE_ERROR),
        (
            &[(kind::WINDOW_UPDATE, 0, 0, &[0; 4])],
            Reason::PROTOCOL_ERROR,
        ),
        (
            &[(kind::WINDOW_UPDATE, 0, 0, &[0x7f, 255, 255, 255])],
            Reason::FLOW_CONTROL_ERROR,
        ),
        (
            &[(kind::HEADERS, WHOLE, 1, &[0x80])],
            Reason::COMPRESSION_ERROR,
        ),
        (
            &[(kind::HEADERS, WHOLE | flag::PADDED, 1, &[9, 0x83])],
            Reason::PROTOCOL_ERROR,
        ),
    ];
    for (frames, reason) in cases {
        let (mut peer, _calls) = Peer::of_server().await;
        for (kind, flags, stream, payload) in frames {
            peer.send(*kind, *flags, *stream, payload).await;
        }
        assert_eq!(peer.dismissal().await, reason, "{frames:?}");
    }
}

#[tokio::test]
async fn what_does_not_begin_as_http_2_does_or_is_too_large_is_ended() {
    let (mut near, far) = duplex(PIPE);
    let _calls = serve(far, 10);
    near.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert_eq!(Peer(near).dismissal().await, Reason::PROTOCOL_ERROR);

    let (mut near, far) = duplex(PIPE);
    let _calls = serve(far, 10);
    near.write_all(PREFACE).await.unwrap();
    let mut peer = Peer(near);
    peer.send(kind::PING, 0, 0, &[0; 8]).await;
    assert_eq!(peer.dismissal().await, Reason::PROTOCOL_ERROR);

    let (mut peer, _calls) = Peer::of_server().await;
    let header = FrameHeader {
        length: super::MAX_FRAME_SIZE as usize + 1,
        kind: kind::DATA,
        flags: 0,
        stream: 1,
    };
    peer.0.write_all(&header.bytes()).await.unwrap();
    assert_eq!(peer.dismissal().await, Reason::FRAME_SIZE_ERROR);
}

#[tokio::test]
async fn a_malformed_call_is_reset_and_others_go_on() {
    let bad = [
        vec![0x83, 0x86],
        vec![0x86, 0x84],
        vec![0x83, 0x84],
        [REQUEST, &[0x88]].concat(),
        [REQUEST, &[0x84]].concat(),
        [REQUEST, &literal("Upper", "x")].concat(),
        [REQUEST, &literal("connection", "close")].concat(),
        [REQUEST, &literal("te", "gzip")].concat(),
        [REQUEST, &literal("content-length", "1")].concat(),
        [&literal("x", "y"), REQUEST].concat(),
    ];
    let (mut peer, mut calls) = Peer::of_server().await;
    let mut stream = 1;
    for block in bad {
        peer.send(kind::HEADERS, WHOLE, stream, &block).await;
        let reset = peer.next(kind::RST_STREAM).await;
        assert_eq!(
            (reset.header.stream, reset.code()),
            (stream, Reason::PROTOCOL_ERROR)
        );
        stream += 2;
    }
    while calls.try_recv().is_ok() {}
    peer.send(kind::HEADERS, WHOLE, stream, REQUEST).await;
    let call = calls.recv().await.unwrap();
    assert_eq!(call.head.path.as_ref().unwrap(), "/");
}

#[tokio::test]
async fn a_stream_that_breaks_the_rules_is_reset_and_the_connection_goes_on() {
    type Sent = (u8, u8, &'static [u8]);
    let cases: [(u8, Sent, Reason); 6] = [
        (WHOLE, (kind::DATA, 0, b"x"), Reason::STREAM_CLOSED),
        (WHOLE, (kind::HEADERS, WHOLE, b""), Reason::STREAM_CLOSED),
        (4, (kind::HEADERS, 4, b""), Reason::PROTOCOL_ERROR),
        (4, (kind::HEADERS, WHOLE, &[0x83]), Reason::PROTOCOL_ERROR),
        (4, (kind::WINDOW_UPDATE, 0, &[0; 4]), Reason::PROTOCOL_ERROR),
        (
            4,
            (kind::WINDOW_UPDATE, 0, &[0x7f, 255, 255, 255]),
            Reason::FLOW_CONTROL_ERROR,
        ),
    ];
    for (flags, (sent, with, payload), reason) in cases {
        let (mut peer, mut calls) = Peer::of_server().await;
        peer.send(kind::HEADERS, flags, 1, REQUEST).await;
        let mut call = calls.recv().await.unwrap();
        peer.send(sent, with, 1, payload).await;
        let reset = peer.next(kind::RST_STREAM).await;
        assert_eq!(reset.code(), reason);
        poll_fn(|cx| call.reply.poll_gone(cx)).await;
        drop(call);
        peer.is_answered().await;
    }
}

#[tokio::test]
async fn priorities_padding_and_frames_of_other_kinds_mean_nothing() {
    let (mut peer, mut calls) = Peer::of_server().await;
    peer.send(kind::PRIORITY, 0, 9, &[0; 5]).await;
    peer.send(0xbe, 0xff, 77, b"what is this?").await;
    let padded = [&[2, 0, 0, 0, 0, 7], REQUEST, &[0, 0]].concat();
    let flags = flag::END_HEADERS | flag::PADDED | flag::PRIORITY;
    peer.send(kind::HEADERS, flags, 1, &padded).await;
    peer.send(
        kind::DATA,
        flag::PADDED | flag::END_STREAM,
        1,
        b"\x03abc\0\0\0",
    )
    .await;
    let mut call = calls.recv().await.unwrap();
    assert_eq!(
        read_all(&mut call.body).await.unwrap(),
        (b"abc".to_vec(), None)
    );
}

#[tokio::test]
async fn small_chunks_that_nobody_reads_yet_are_gathered() {
    let (mut peer, mut calls) = Peer::of_server().await;
    peer.send(kind::HEADERS, flag::END_HEADERS, 1, REQUEST)
        .await;
    for byte in 0..100 {
        peer.send(kind::DATA, 0, 1, &[byte]).await;
    }
    peer.is_answered().await;
    let mut call = calls.recv().await.unwrap();
    let first = poll_fn(|cx| call.body.poll_data(cx))
        .await
        .unwrap()
        .unwrap();
    let second = poll_fn(|cx| call.body.poll_data(cx))
        .await
        .unwrap()
        .unwrap();
    let all: Vec<u8> = (0..100).collect();
    assert_eq!((&first[..], &second[..]), all.split_at(1));
}

#[tokio::test]
async fn what_a_peer_sends_beyond_a_window_is_refused_and_what_is_read_may_be_sent_again() {
    let (mut peer, mut calls) = Peer::of_server().await;
    peer.send(kind::HEADERS, flag::END_HEADERS, 1, REQUEST)
        .await;
    let mut call = calls.recv().await.unwrap();
    let quarter = vec![7; super::STREAM_WINDOW as usize / 4];
    for _ in 0..4 {
        peer.send(kind::DATA, 0, 1, &quarter).await;
    }
    peer.is_answered().await;
    for _ in 0..2 {
        poll_fn(|cx| call.body.poll_data(cx))
            .await
            .unwrap()
            .unwrap();
    }
    let update = loop {
        let update = peer.next(kind::WINDOW_UPDATE).await;
        if update.header.stream == 1 {
            break update;
        }
    };
    assert_eq!(update.payload, (super::STREAM_WINDOW / 2).to_be_bytes());
    for _ in 0..2 {
        peer.send(kind::DATA, 0, 1, &quarter).await;
    }
    peer.send(kind::DATA, 0, 1, b"x").await;
    let reset = peer.next(kind::RST_STREAM).await;
    assert_eq!(reset.code(), Reason::FLOW_CONTROL_ERROR);
}

/// A server that answers a client's first stream, and sends as much as it may.
struct Far {
    peer: Peer,
    calls: Calls,
    answer: Incoming,
    _request: Outgoing,
    /// What it may send on that stream, and what on a new one.
    window: usize,
    first_window: usize,
}

impl Far {
    /// One to which and back it takes so long.
    async fn at(round_trip: Duration) -> Self {
        let mut far = Far::greeting(round_trip).await;
        far.answer_next(1, round_trip).await;
        far
    }

    /// One that takes so long to acknowledge SETTINGS, and has been called.
    async fn greeting(time: Duration) -> Self {
        let (mut peer, calls) = Peer::of_client().await;
        tokio::time::advance(time).await;
        peer.send(kind::SETTINGS, flag::ACK, 0, &[]).await;
        // It is processed before the call begins.
        peer.is_answered().await;
        let (answer, request) = calls.begin(post("/"), Fields::new(), true).unwrap();
        Far {
            peer,
            calls,
            answer,
            _request: request,
            window: super::STREAM_WINDOW as usize,
            first_window: super::STREAM_WINDOW as usize,
        }
    }

    /// It answers the next call after so long.
    async fn answer_next(&mut self, stream: u32, time: Duration) {
        self.peer.next(kind::HEADERS).await;
        tokio::time::advance(time).await;
        self.peer
            .send(kind::HEADERS, flag::END_HEADERS, stream, &[0x88])
            .await;
    }

    /// It sends all that it may, which is read piece by piece, each taking so long.
    async fn round(&mut self, time_for_a_piece: Duration) {
        let piece = vec![7; 64 * 1024];
        let pieces = self.window / piece.len();
        for _ in 0..pieces {
            self.peer.send(kind::DATA, 0, 1, &piece).await;
        }
        self.peer.is_answered().await;
        self.window = 0;
        for _ in 0..pieces {
            let read = poll_fn(|cx| self.answer.poll_data(cx)).await;
            assert_eq!(read.unwrap().unwrap().len(), piece.len());
            tokio::time::advance(time_for_a_piece).await;
        }
        self.peer.send(kind::PING, 0, 0, b"12345678").await;
        loop {
            let seen = self.peer.read().await.unwrap();
            match (seen.header.kind, seen.header.stream) {
                (kind::WINDOW_UPDATE, 1) => {
                    self.window += seen.window_update();
                }
                (kind::SETTINGS, 0) => {
                    let new = frame::Settings::read(&seen.payload).unwrap();
                    let new = new.initial_window_size.unwrap() as usize;
                    self.window += new - self.first_window;
                    self.first_window = new;
                }
                (kind::PING, _) => break,
                _ => {}
            }
        }
    }
}

const MIB: usize = 1024 * 1024;

#[tokio::test(start_paused = true)]
async fn the_window_of_a_stream_from_far_away_grows_as_long_as_its_reader_is_quick() {
    let mut far = Far::at(Duration::from_millis(20)).await;
    for _ in 0..8 {
        far.round(Duration::ZERO).await;
    }
    assert_eq!((far.window, far.first_window), (32 * MIB, 4 * MIB));

    // Half a window, eight pieces of it, in two round trips: it is not what holds the reader up.
    let mut far = Far::at(Duration::from_millis(20)).await;
    for _ in 0..4 {
        far.round(Duration::from_millis(5)).await;
    }
    assert_eq!((far.window, far.first_window), (MIB, MIB));

    // One that is near, and one that was only busy at first.
    let mut slow_to_greet = Far::greeting(Duration::from_millis(20)).await;
    slow_to_greet
        .answer_next(1, Duration::from_micros(900))
        .await;
    for mut near in [Far::at(Duration::from_micros(900)).await, slow_to_greet] {
        for _ in 0..4 {
            near.round(Duration::ZERO).await;
        }
        assert_eq!((near.window, near.first_window), (MIB, MIB));
    }
}

/// A stream from near, whose reader takes what there is when it is woken.
struct Transfer {
    peer: Peer,
    read: watch::Receiver<usize>,
    /// How much was sent, and how much may have been by now.
    sent: usize,
    window: usize,
    _other_way: Outgoing,
    _calls: Option<Calls>,
}

/// How many frames of the largest size are in a message of `Transfer`, and what else is.
const FRAMES: usize = 3;
const LAST: usize = 10;
const FRAME: usize = super::MAX_FRAME_SIZE as usize;
/// What is not read after each frame of one that is passed on as it comes, or as a whole.
const AT_ONCE: [usize; FRAMES + 1] = [0; FRAMES + 1];
const AS_A_WHOLE: [usize; FRAMES + 1] = [FRAME, 2 * FRAME, 3 * FRAME, 0];
/// Between messages.
const PAUSE: Duration = Duration::from_millis(1);

impl Transfer {
    /// From a server.
    async fn down() -> Self {
        let near = Far::at(Duration::from_micros(900)).await;
        Transfer {
            _calls: Some(near.calls),
            ..Transfer::begin(near.peer, near.answer, near._request)
        }
    }

    /// From a server, the beginning of whose second message waits for the rest.
    async fn amid_message() -> Self {
        whole_messages::begin();
        let mut download = Transfer::down().await;
        download.message().await;
        tokio::time::advance(PAUSE).await;
        assert_eq!(download.frame(FRAME).await, FRAME);
        download
    }

    /// From a client.
    async fn up() -> Self {
        let (mut peer, mut calls) = Peer::of_server().await;
        peer.send(kind::HEADERS, flag::END_HEADERS, 1, REQUEST)
            .await;
        let call = calls.recv().await.unwrap();
        Transfer::begin(peer, call.body, call.reply)
    }

    fn begin(peer: Peer, mut body: Incoming, other_way: Outgoing) -> Self {
        let (reader, read) = watch::channel(0);
        task::spawn("reader", async move {
            while let Some(Ok(chunk)) = poll_fn(|cx| body.poll_data(cx)).await {
                reader.send_modify(|read| *read += chunk.len());
            }
        });
        Transfer {
            peer,
            read,
            sent: 0,
            window: super::STREAM_WINDOW as usize,
            _other_way: other_way,
            _calls: None,
        }
    }

    /// Sends a frame. Returns how much is not read then.
    async fn frame(&mut self, size: usize) -> usize {
        self.peer.send(kind::DATA, 0, 1, &vec![7; size]).await;
        self.sent += size;
        self.unread().await
    }

    /// Sends a message. Returns how much was not read after each of its frames.
    async fn message(&mut self) -> [usize; FRAMES + 1] {
        let mut unread = AT_ONCE;
        for (index, unread) in unread.iter_mut().enumerate() {
            *unread = self.frame(if index < FRAMES { FRAME } else { LAST }).await;
        }
        unread
    }

    /// How much has been sent but is not read.
    async fn unread(&mut self) -> usize {
        // The answer comes after whoever is woken by what was sent has had his turn.
        for _ in 0..2 {
            self.peer.send(kind::PING, 0, 0, b"12345678").await;
            loop {
                let seen = self.peer.read().await.unwrap();
                match (seen.header.kind, seen.header.stream) {
                    (kind::WINDOW_UPDATE, 1) => {
                        self.window += seen.window_update();
                    }
                    (kind::PING, _) => break,
                    _ => {}
                }
            }
        }
        self.sent - *self.read.borrow()
    }
}

#[tokio::test(start_paused = true)]
async fn large_messages_of_a_sender_that_pauses_between_them_are_passed_on_as_a_whole() {
    whole_messages::begin();
    let mut download = Transfer::down().await;
    assert_eq!(download.message().await, AT_ONCE, "it may not pause");
    for _ in 0..3 {
        tokio::time::advance(PAUSE).await;
        assert_eq!(download.message().await, AS_A_WHOLE);
    }
    assert_eq!(download.message().await, AT_ONCE, "it has not paused");
}

#[tokio::test(start_paused = true)]
async fn the_beginning_of_a_message_waits_no_longer_than_the_thread_is_awake_nor_for_long() {
    let mut download = Transfer::amid_message().await;
    whole_messages::pass_on();
    assert_eq!(download.unread().await, 0);
    assert_eq!(download.frame(FRAME).await, FRAME);
    tokio::time::advance(Duration::from_millis(5)).await;
    assert_eq!(download.unread().await, 0);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_stream_is_passed_on_though_its_last_message_seems_to_go_on() {
    let mut download = Transfer::amid_message().await;
    let trailers = flag::END_HEADERS | flag::END_STREAM;
    download.peer.send(kind::HEADERS, trailers, 1, &[]).await;
    assert_eq!(download.unread().await, 0);
}

#[tokio::test(start_paused = true)]
async fn a_window_grows_to_hold_the_messages_that_are_passed_on_as_a_whole_and_no_further() {
    whole_messages::begin();
    let mut download = Transfer::down().await;
    for _ in 0..10 {
        download.message().await;
        tokio::time::advance(PAUSE).await;
    }
    let message = FRAMES * FRAME + LAST + FRAME;
    let left = download.window - download.sent;
    let credit = super::STREAM_WINDOW as usize / 2;
    assert!((message..=message + credit).contains(&left), "{left}");
}

#[tokio::test(start_paused = true)]
async fn the_beginning_of_a_message_does_not_wait_if_the_window_has_no_room_for_more() {
    whole_messages::begin();
    let mut download = Transfer::down().await;
    download.frame(FRAME).await;
    download.frame(LAST).await;
    tokio::time::advance(PAUSE).await;
    let mut sent = 0;
    while download.window - download.sent >= 2 * FRAME {
        sent += FRAME;
        assert_eq!(download.frame(FRAME).await, sent);
    }
    assert!(sent > 0);
    assert_eq!(download.frame(FRAME).await, 0);
}

#[tokio::test(start_paused = true)]
async fn what_a_client_sends_is_passed_on_as_it_comes() {
    whole_messages::begin();
    let mut upload = Transfer::up().await;
    for _ in 0..3 {
        assert_eq!(upload.message().await, AT_ONCE);
        tokio::time::advance(PAUSE).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_thread_of_which_nobody_knows_when_it_sleeps_passes_on_what_comes() {
    let mut download = Transfer::down().await;
    for _ in 0..3 {
        assert_eq!(download.message().await, AT_ONCE);
        tokio::time::advance(PAUSE).await;
    }
}

/// What a client may send in all, on one stream that is read at once, when it sends 16 MiB. It
/// acknowledges SETTINGS after 20 ms, and answers each PING after so long.
async fn window_of_a_client(time_for_a_ping: Duration) -> usize {
    let (mut peer, mut calls) = Peer::of_server().await;
    tokio::time::advance(Duration::from_millis(20)).await;
    peer.send(kind::SETTINGS, flag::ACK, 0, &[]).await;
    peer.send(kind::HEADERS, flag::END_HEADERS, 1, REQUEST)
        .await;
    let mut call = calls.recv().await.unwrap();
    let piece = vec![7; 64 * 1024];
    let mut window = super::STREAM_WINDOW as usize;
    let mut first_window = window;
    for _ in 0..16 * MIB / piece.len() {
        peer.send(kind::DATA, 0, 1, &piece).await;
        window -= piece.len();
        poll_fn(|cx| call.body.poll_data(cx))
            .await
            .unwrap()
            .unwrap();
        peer.send(kind::PING, 0, 0, b"12345678").await;
        loop {
            let seen = peer.read().await.unwrap();
            match (seen.header.kind, seen.header.stream, seen.header.flags) {
                (kind::PING, _, flag::ACK) => break,
                (kind::PING, ..) => {
                    tokio::time::advance(time_for_a_ping).await;
                    peer.send(kind::PING, flag::ACK, 0, &seen.payload).await;
                }
                (kind::WINDOW_UPDATE, 1, _) => {
                    window += seen.window_update();
                }
                (kind::SETTINGS, _, 0) => {
                    let new = frame::Settings::read(&seen.payload).unwrap();
                    let new = new.initial_window_size.unwrap_or(first_window as u32) as usize;
                    window += new - first_window;
                    first_window = new;
                }
                _ => {}
            }
        }
    }
    window
}

#[tokio::test(start_paused = true)]
async fn the_windows_of_a_client_grow_if_it_is_far_and_not_if_it_was_only_busy() {
    let far = window_of_a_client(Duration::from_millis(10)).await;
    assert!(far > 4 * MIB, "{far}");
    let busy = window_of_a_client(Duration::from_micros(900)).await;
    assert!(busy <= MIB, "{busy}");
}

#[tokio::test(start_paused = true)]
async fn a_far_peer_may_send_little_on_a_new_stream_until_it_is_read() {
    let round_trip = Duration::from_millis(20);
    let mut far = Far::at(round_trip).await;
    for _ in 0..8 {
        far.round(Duration::ZERO).await;
    }
    let piece = vec![7; 64 * 1024];
    let begin = |far: &Far| far.calls.begin(post("/"), Fields::new(), true).unwrap();
    let ((mut read, _request), (_unread, _other)) = (begin(&far), begin(&far));
    for stream in [3, 5] {
        far.answer_next(stream, round_trip).await;
        for _ in 0..4 * MIB / piece.len() {
            far.peer.send(kind::DATA, 0, stream, &piece).await;
        }
    }
    let peer = &mut far.peer;
    peer.is_answered().await;
    peer.send(kind::DATA, 0, 5, b"x").await;
    let reset = peer.next(kind::RST_STREAM).await;
    assert_eq!(reset.code(), Reason::FLOW_CONTROL_ERROR);
    for _ in 0..MIB / 2 / piece.len() {
        poll_fn(|cx| read.poll_data(cx)).await.unwrap().unwrap();
    }
    let update = loop {
        let update = peer.next(kind::WINDOW_UPDATE).await;
        if update.header.stream == 3 {
            break update;
        }
    };
    let more = MIB / 2 + (32 - 4) * MIB;
    assert_eq!(update.payload, (more as u32).to_be_bytes());
}

#[tokio::test]
async fn no_more_waits_for_a_receiver_than_its_window_and_the_buffer_allow() {
    let (mut peer, mut calls) = Peer::of_server().await;
    let settings = frame::settings(&[(4, 0x7fff_ffff)]);
    peer.send(kind::SETTINGS, 0, 0, &settings).await;
    peer.send(kind::WINDOW_UPDATE, 0, 0, &[0x70, 0, 0, 0]).await;
    peer.send(kind::HEADERS, WHOLE, 1, REQUEST).await;
    let mut call = calls.recv().await.unwrap();
    call.reply.answer(AnswerHead::default(), false).unwrap();
    let mut data = Bytes::from(vec![1; 8 * SEND_BUFFER]);
    // The peer does not read: what is not sent stays here.
    let waits = poll_fn(|cx| match call.reply.poll_send(cx, &mut data, true) {
        Poll::Pending => Poll::Ready(true),
        Poll::Ready(_) => Poll::Ready(false),
    });
    assert!(waits.await);
    assert_eq!(data.len(), 7 * SEND_BUFFER);
    let sending = poll_fn(|cx| call.reply.poll_send(cx, &mut data, true));
    let reading = async {
        let mut size = 0;
        while size < 8 * SEND_BUFFER {
            size += peer.next(kind::DATA).await.payload.len();
        }
    };
    let (sent, ()) = tokio::join!(sending, reading);
    sent.unwrap();
}

#[tokio::test]
async fn calls_that_a_farewell_does_not_count_were_not_processed_and_others_end_well() {
    let (mut peer, calls) = Peer::of_client().await;
    let begin = || calls.begin(post("/"), Fields::new(), true).unwrap();
    let (mut one, _out) = begin();
    let (mut two, _other) = begin();
    peer.next(kind::HEADERS).await;
    peer.next(kind::HEADERS).await;
    peer.send(kind::GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 0])
        .await;
    let error = poll_fn(|cx| two.poll_head(cx)).await.unwrap_err();
    assert!(matches!(error, StreamError::NotProcessed(Reason::NO_ERROR)));
    assert!(!calls.is_open());
    peer.send(kind::HEADERS, WHOLE, 1, &[0x88]).await;
    let head = poll_fn(|cx| one.poll_head(cx)).await.unwrap();
    assert_eq!(head.status, Some(StatusCode::OK));
    assert!(one.is_end_stream());
    drop((one, two, _out, _other));
    assert!(peer.read().await.is_none(), "the connection is closed");
}

/// The end of a connection to a peer that has gone, which is found out by writing to it. What it had
/// said is read then.
struct Abandoned {
    said: Vec<u8>,
    is_found_out: bool,
}

impl AsyncRead for Abandoned {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.is_found_out {
            return Poll::Pending;
        }
        let size = self.said.len().min(to.remaining());
        to.put_slice(&self.said.drain(..size).collect::<Vec<u8>>());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Abandoned {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.is_found_out = true;
        Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn what_a_peer_has_said_before_it_went_is_heard_though_nothing_can_be_sent() {
    let mut said = Vec::new();
    frame::put(&mut said, kind::SETTINGS, 0, 0, &[]);
    frame::put(&mut said, kind::HEADERS, WHOLE, 1, &[0x88]);
    frame::put(&mut said, kind::GOAWAY, 0, 0, &[0, 0, 0, 3, 0, 0, 0, 0]);
    let is_found_out = false;
    let (calls, mut connection) = Connection::client(Abandoned { said, is_found_out });
    let begin = || calls.begin(post("/"), Fields::new(), true).unwrap();
    let mut begun = [begin(), begin(), begin()];
    poll_fn(|cx| connection.poll(cx, drop)).await.unwrap_err();
    let heads = begun
        .iter_mut()
        .map(|(answer, _)| answer.poll_head(&mut Context::from_waker(Waker::noop())));
    let [answered, broken, unseen] = Vec::from_iter(heads).try_into().ok().unwrap();
    assert!(matches!(answered, Poll::Ready(Ok(head)) if head.status == Some(StatusCode::OK)));
    assert!(matches!(broken, Poll::Ready(Err(StreamError::Broken(_)))));
    assert!(matches!(
        unseen,
        Poll::Ready(Err(StreamError::NotProcessed(_)))
    ));
}

#[tokio::test]
async fn a_connection_that_carries_what_its_peer_takes_is_full_until_a_stream_ends() {
    let (mut peer, calls) = Peer::of_client().await;
    let begin = || calls.begin(post("/"), Fields::new(), true).unwrap();
    let _two = [begin(), begin()];
    assert!(!calls.load().is_full);
    calls.expect_max_streams(2);
    assert!(calls.load().is_full);
    calls.expect_max_streams(100);
    assert_eq!(calls.max_streams(), None);
    peer.send(kind::SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 2]).await;
    peer.is_answered().await;
    assert!(calls.load().is_full);
    assert_eq!(calls.max_streams(), Some(2));
    peer.send(kind::HEADERS, WHOLE, 1, &[0x88]).await;
    peer.is_answered().await;
    assert!(!calls.load().is_full);
    peer.send(kind::SETTINGS, 0, 0, &[]).await;
    let _third = begin();
    peer.is_answered().await;
    assert!(calls.load().is_full, "what was said once holds");
}

#[tokio::test]
async fn a_connection_on_which_nothing_may_be_asked_is_not_full_before_somebody_waits() {
    let (mut peer, calls) = Peer::of_client().await;
    peer.send(kind::SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 0]).await;
    peer.is_answered().await;
    assert!(!calls.load().is_full);
    let _one = calls.begin(post("/"), Fields::new(), true).unwrap();
    assert!(calls.load().is_full);
}

#[tokio::test]
async fn of_refused_streams_those_were_not_processed_that_were_more_than_the_peer_takes() {
    let (mut peer, calls) = Peer::of_client().await;
    let begin = || calls.begin(post("/"), Fields::new(), true).unwrap();
    let mut begun = [begin(), begin(), begin(), begin(), begin()];
    for _ in &begun {
        peer.next(kind::HEADERS).await;
    }
    peer.send(kind::SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 2]).await;
    let (refused, calm) = (Reason::REFUSED_STREAM, Reason::ENHANCE_YOUR_CALM);
    for (id, reason) in [(9, refused), (7, calm), (5, Reason::CANCEL), (3, refused)] {
        peer.send(kind::RST_STREAM, 0, id, &reason.0.to_be_bytes())
            .await;
        let head = &mut begun[id as usize / 2].0;
        let error = poll_fn(|cx| head.poll_head(cx)).await.unwrap_err();
        match id {
            9 | 7 => assert!(matches!(error, StreamError::NotProcessed(of) if of == reason)),
            _ => assert!(
                matches!(error, StreamError::Reset(of) if of == reason),
                "{id}"
            ),
        }
    }
}

#[tokio::test]
async fn a_call_that_has_moved_a_lot_is_a_transfer_until_it_ends() {
    let (mut peer, calls) = Peer::of_client().await;
    let load = |transfers, streams| Load {
        is_full: false,
        transfers,
        streams,
    };
    assert_eq!(calls.load(), load(0, 0));
    let begin = || calls.begin(post("/"), Fields::new(), true).unwrap();
    let (mut one, _out) = begin();
    let _two = begin();
    assert_eq!(calls.load(), load(0, 2));
    peer.send(kind::HEADERS, flag::END_HEADERS, 1, &[0x88])
        .await;
    for _ in 0..9 {
        peer.send(kind::DATA, 0, 1, &[0; 16 * 1024]).await;
    }
    peer.is_answered().await;
    assert_eq!(calls.load(), load(1, 2));
    peer.send(kind::DATA, flag::END_STREAM, 1, b"last").await;
    while let Some(chunk) = poll_fn(|cx| one.poll_data(cx)).await {
        chunk.unwrap();
    }
    assert_eq!(calls.load(), load(0, 1));
}

#[tokio::test]
async fn a_reset_reaches_the_reader_after_the_data_and_the_writer_at_once() {
    let (mut peer, calls) = Peer::of_client().await;
    let (mut body, mut out) = calls.begin(post("/"), Fields::new(), false).unwrap();
    peer.next(kind::HEADERS).await;
    peer.send(kind::HEADERS, flag::END_HEADERS, 1, &[0x88])
        .await;
    peer.send(kind::DATA, 0, 1, b"abc").await;
    peer.send(kind::RST_STREAM, 0, 1, &Reason::NO_ERROR.0.to_be_bytes())
        .await;
    poll_fn(|cx| out.poll_gone(cx)).await;
    let chunk = poll_fn(|cx| body.poll_data(cx)).await.unwrap().unwrap();
    assert_eq!(chunk, "abc");
    let error = poll_fn(|cx| body.poll_data(cx)).await.unwrap().unwrap_err();
    assert!(matches!(error, StreamError::Reset(Reason::NO_ERROR)));
}

#[tokio::test]
async fn a_call_that_is_dropped_is_cancelled_and_an_early_answer_ends_without_an_error() {
    let (mut peer, calls) = Peer::of_client().await;
    drop(calls.begin(post("/"), Fields::new(), false).unwrap());
    let (_body, _out) = calls.begin(post("/"), Fields::new(), false).unwrap();
    let begun = peer.next(kind::HEADERS).await;
    assert_eq!(begun.header.stream, 3, "nobody hears of the first one");
    drop((_body, _out));
    assert_eq!(peer.next(kind::RST_STREAM).await.code(), Reason::CANCEL);

    let (mut peer, mut calls) = Peer::of_server().await;
    peer.send(kind::HEADERS, flag::END_HEADERS, 1, REQUEST)
        .await;
    let mut call = calls.recv().await.unwrap();
    call.reply.answer(AnswerHead::default(), true).unwrap();
    drop(call);
    assert!(peer.next(kind::HEADERS).await.header.has(flag::END_STREAM));
    assert_eq!(peer.next(kind::RST_STREAM).await.code(), Reason::NO_ERROR);
}

#[tokio::test]
async fn a_server_that_leaves_serves_what_is_under_way_and_takes_no_more() {
    let (near, far) = duplex(PIPE);
    let mut connection = Connection::server(far, 10);
    let mut peer = Peer(near);
    peer.0.write_all(PREFACE).await.unwrap();
    peer.send(kind::SETTINGS, 0, 0, &[]).await;
    peer.send(kind::HEADERS, WHOLE, 1, REQUEST).await;
    let (mut call, mut later) = (None, 0);
    poll_fn(|cx| {
        let _ = connection.poll(cx, |begun| call = Some(begun));
        match call {
            Some(_) => Poll::Ready(()),
            None => Poll::Pending,
        }
    })
    .await;
    connection.farewell().say();
    let carried = poll_fn(|cx| connection.poll(cx, |_| later += 1));
    let talked = async {
        let farewell = peer.next(kind::GOAWAY).await;
        assert_eq!(farewell.payload[..4], [0x7f, 255, 255, 255]);
        let ping = peer.next(kind::PING).await;
        peer.send(kind::PING, flag::ACK, 0, &ping.payload).await;
        let last = peer.next(kind::GOAWAY).await;
        assert_eq!(last.payload[..4], [0, 0, 0, 1]);
        peer.send(kind::HEADERS, WHOLE, 3, REQUEST).await;
        peer.is_answered().await;
        let mut call = call.take().unwrap();
        call.reply.answer(AnswerHead::default(), true).unwrap();
        drop(call);
        peer.next(kind::HEADERS).await;
        assert!(peer.read().await.is_none());
    };
    let (carried, ()) = tokio::join!(carried, talked);
    carried.unwrap();
    assert_eq!(later, 0);
}

#[tokio::test]
async fn a_flood_that_must_be_answered_is_taken_as_fast_as_the_answers_are() {
    const TIMES: usize = 100_000;
    let (peer, _calls) = Peer::of_server().await;
    let (mut reader, mut writer) = tokio::io::split(peer.0);
    let mut ping = Vec::new();
    frame::put(&mut ping, kind::PING, 0, 0, &[7; 8]);
    let flood = ping.repeat(TIMES);
    let answers = async {
        let mut answered = 0;
        let mut frame = [0; frame::HEADER];
        while answered < TIMES {
            reader.read_exact(&mut frame).await.unwrap();
            let header = FrameHeader::read(&frame).unwrap();
            let mut payload = vec![0; header.length];
            reader.read_exact(&mut payload).await.unwrap();
            answered += usize::from(header.kind == kind::PING);
        }
    };
    let (written, ()) = tokio::join!(writer.write_all(&flood), answers);
    written.unwrap();
}

#[tokio::test]
async fn random_bytes_never_hang_or_panic() {
    let mut random = fastrand::Rng::with_seed(5);
    for _ in 0..300 {
        let (mut peer, calls) = Peer::of_server().await;
        for _ in 0..random.usize(1..20) {
            let payload: Vec<u8> = (0..random.usize(..40)).map(|_| random.u8(..)).collect();
            let (kind, stream) = (random.u8(..10), random.u32(..6));
            let mut frame = Vec::new();
            frame::put(&mut frame, kind, random.u8(..), stream, &payload);
            if peer.0.write_all(&frame).await.is_err() {
                break;
            }
        }
        drop(calls);
        let _ = peer.0.shutdown().await;
        while peer.read().await.is_some() {}
    }
    assert_eq!(task::panics(), 0);
}
