//! Peers that strain or break HTTP/2 on purpose. A client that does is limited or cut off; an
//! upstream that does is unavailable. Either way memory stays bounded and others are served.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::time::Duration;

use primed::cas;
use primed::reapi::content_addressable_storage_client::ContentAddressableStorageClient;
use primed::reapi::google::bytestream::WriteRequest;
use primed::reapi::google::bytestream::byte_stream_client::ByteStreamClient;
use primed::reapi::{Digest, FindMissingBlobsRequest};
use prost::Message;
use serde_json::json;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::client::connect;
use crate::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, INITIAL_WINDOW_SIZE,
    LARGEST, MAX_CONCURRENT_STREAMS, NEWEST, PADDED, PING, PREFACE, RST_STREAM, SETTINGS, field,
    message, remembered_field, request,
};
use crate::grpcio::{Grpcio, Session};
use crate::support::{Casd, PATIENCE, Primed, scratch};

/// How long a real call may take while primed is abused.
const SERVED_WITHIN: Duration = Duration::from_secs(30);
/// How much more memory primed may take than for a few calls.
const MEMORY: u64 = 64 * 1024 * 1024;
/// How many calls others make at least, during an attack.
const OTHERS: usize = 20;

const FIND_MISSING: &str =
    "/build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs";
const GET_CAPABILITIES: &str = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities";

/// Error codes of RFC 9113.
const FLOW_CONTROL_ERROR: u32 = 3;
const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;

/// How many calls are in progress all the time: some on each connection to the upstream.
const UPLOADS: usize = 8;

/// A real casd behind primed.
struct Ground {
    primed: Primed,
    memory_before: u64,
    uploads: Vec<Upload>,
    _casd: Casd,
    _scratch: TempDir,
}

impl Ground {
    async fn prepare() -> Self {
        let scratch = scratch();
        let casd = Casd::start(scratch.path(), 1);
        let primed = Primed::start(scratch.path(), &casd.address());
        for _ in 0..OTHERS {
            call(&primed).await.unwrap();
        }
        let mut uploads = Vec::new();
        for number in 0..UPLOADS {
            uploads.push(Upload::begin(&primed, number).await);
        }
        Ground {
            uploads,
            memory_before: primed.daemon.peak_memory(),
            primed,
            _casd: casd,
            _scratch: scratch,
        }
    }

    async fn attacker(&self, settings: &[(u16, u32)]) -> Attacker {
        let stream = UnixStream::connect(self.primed.socket()).await.unwrap();
        let (reader, writer) = stream.into_split();
        let mut attacker = Attacker { reader, writer };
        let settings = Frame::settings(settings).bytes();
        let greeting = [
            PREFACE,
            &settings,
            &Frame::window_update(0, LARGEST - 65_535).bytes(),
        ];
        attacker.writer.write_all(&greeting.concat()).await.unwrap();
        attacker
    }

    /// Has `attacker` write all of `bytes`, as far as primed takes them, while others make calls.
    async fn endure(&self, attacker: Attacker, bytes: impl Iterator<Item = Vec<u8>>) -> Seen {
        let (seen, ()) = tokio::join!(attacker.attack(bytes), self.serve_others());
        self.is_well().await;
        seen
    }

    async fn serve_others(&self) {
        for _ in 0..OTHERS {
            call(&self.primed).await.unwrap();
        }
    }

    /// primed answers, has not panicked and has not grown beyond measure.
    async fn is_well(&self) {
        call(&self.primed).await.unwrap();
        for upload in &self.uploads {
            assert!(!upload.call.is_finished(), "a call in progress has ended");
        }
        assert!(!self.primed.daemon.log().contains("panicked"));
        // The kernel keeps the peak roughly: it may say less than before.
        let peak = self.primed.daemon.peak_memory();
        let growth = peak.saturating_sub(self.memory_before);
        assert!(growth < MEMORY, "primed grew by {growth} bytes");
    }
}

/// A real call on a connection of its own.
async fn call(primed: &Primed) -> Result<(), Status> {
    let mut client = ContentAddressableStorageClient::new(connect(&primed.socket()));
    let answer = client.find_missing_blobs(FindMissingBlobsRequest::default());
    let answer = tokio::time::timeout(SERVED_WITHIN, answer).await;
    answer.expect("a call takes too long").map(|_| ())
}

/// A real upload that is not complete, and so stays in progress.
struct Upload {
    call: JoinHandle<Option<()>>,
    _rest: mpsc::Sender<WriteRequest>,
}

impl Upload {
    async fn begin(primed: &Primed, number: usize) -> Self {
        let blob = format!("blob {number}");
        let begin = WriteRequest {
            resource_name: format!(
                "uploads/{number}/blobs/{}",
                cas::Digest::of(blob.as_bytes())
            ),
            data: blob.as_bytes()[..4].to_vec().into(),
            ..WriteRequest::default()
        };
        let (rest, requests) = mpsc::channel(1);
        rest.send(begin).await.unwrap();
        let mut client = ByteStreamClient::new(connect(&primed.socket()));
        let call = primed::task::spawn("upload", async move {
            let ended = client.write(ReceiverStream::new(requests)).await;
            eprintln!("an upload has ended: {ended:?}");
        });
        // It has begun when there is room for another request.
        let room = tokio::time::timeout(PATIENCE, rest.reserve()).await;
        room.expect("an upload does not begin").unwrap();
        Upload { call, _rest: rest }
    }
}

/// One end of a connection that keeps to no rules.
struct Attacker {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
}

/// What primed said to an attacker.
#[derive(Debug, Default)]
struct Seen {
    frames: Vec<Frame>,
    /// Whether primed closed the connection.
    closed: bool,
}

impl Seen {
    /// Reads until a PING is answered or the connection is closed.
    async fn read_until(&mut self, ping: Frame, reader: &mut OwnedReadHalf) {
        while !self.closed {
            match Frame::read(reader).await {
                Err(_) => self.closed = true,
                Ok(frame) if frame.kind == PING && frame.payload == ping.payload => return,
                // What is in the answers is of no interest.
                Ok(frame) if frame.kind == DATA => (),
                Ok(frame) => self.frames.push(frame),
            }
        }
    }

    fn count(&self, kind: u8) -> usize {
        self.frames
            .iter()
            .filter(|frame| frame.kind == kind)
            .count()
    }

    /// The error codes of frames of this kind.
    fn codes(&self, kind: u8) -> Vec<u32> {
        let frames = self.frames.iter().filter(|frame| frame.kind == kind);
        let code = |frame: &Frame| {
            let at = if kind == GOAWAY { 4..8 } else { 0..4 };
            u32::from_be_bytes(frame.payload[at].try_into().unwrap())
        };
        frames.map(code).collect()
    }
}

impl Attacker {
    /// Writes `bytes` until primed has taken and answered all of them, or closes the connection.
    async fn attack(mut self, bytes: impl Iterator<Item = Vec<u8>>) -> Seen {
        let mut seen = Seen::default();
        let attack = async {
            let write = async {
                for bytes in bytes {
                    // Whether the connection is closed is the reader's to say.
                    if self.writer.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
                let _ = last(1).write(&mut self.writer).await;
            };
            tokio::join!(write, seen.read_until(last(1), &mut self.reader));
            // A PING is answered before what was to be said already, hence another one.
            let _ = last(2).write(&mut self.writer).await;
            seen.read_until(last(2), &mut self.reader).await;
        };
        let ended = tokio::time::timeout(PATIENCE, attack).await;
        ended.expect("primed neither takes what is written nor closes the connection");
        seen
    }
}

/// A PING that no flood contains.
fn last(number: u8) -> Frame {
    Frame::new(PING, 0, 0, [number; 8])
}

/// The streams that a client may open.
fn streams() -> impl Iterator<Item = u32> {
    (1..).step_by(2)
}

/// Frames in chunks, so that they are not written one by one.
fn chunks(frames: impl Iterator<Item = Frame>) -> impl Iterator<Item = Vec<u8>> {
    let mut frames = frames.map(|frame| frame.bytes()).peekable();
    std::iter::from_fn(move || {
        frames.peek()?;
        Some(frames.by_ref().take(64).flatten().collect())
    })
}

fn repeated(frame: Frame, times: usize) -> impl Iterator<Item = Vec<u8>> {
    chunks(std::iter::repeat_n(frame, times))
}

fn open(stream: u32) -> Frame {
    Frame::new(HEADERS, END_HEADERS, stream, request(FIND_MISSING))
}

#[tokio::test]
async fn a_flood_of_calls_that_are_reset_at_once_harms_nobody() {
    let ground = Ground::prepare().await;
    let attacker = ground.attacker(&[]).await;
    let pairs = streams().take(10_000);
    let pairs = pairs.flat_map(|stream| [open(stream), Frame::reset(stream, CANCEL)]);
    ground.endure(attacker, chunks(pairs)).await;
}

#[tokio::test]
async fn a_flood_of_complete_calls_that_are_reset_at_once_harms_nobody() {
    let ground = Ground::prepare().await;
    let attacker = ground.attacker(&[]).await;
    let calls = streams().take(5_000).flat_map(|stream| {
        [
            open(stream),
            Frame::new(DATA, END_STREAM, stream, message(b"")),
            Frame::reset(stream, CANCEL),
        ]
    });
    ground.endure(attacker, chunks(calls)).await;
}

#[tokio::test]
async fn a_header_block_that_never_ends_is_cut_off() {
    let ground = Ground::prepare().await;
    for fill in [16_000, 1, 0] {
        let attacker = ground.attacker(&[]).await;
        let begin = Frame::new(HEADERS, 0, 1, request(FIND_MISSING));
        let more = match fill {
            0 => Vec::new(),
            _ => field("x", &"y".repeat(fill)),
        };
        let more = Frame::new(CONTINUATION, 0, 1, more);
        let more = repeated(more, 64 * 1024 * 1024 / (fill + 1024));
        let flood = std::iter::once(begin.bytes()).chain(more);
        let seen = ground.endure(attacker, flood).await;
        assert!(seen.closed, "{fill}");
    }
}

#[tokio::test]
async fn headers_longer_than_a_mebibyte_are_refused() {
    let ground = Ground::prepare().await;
    let attacker = ground.attacker(&[]).await;
    let calls = streams().take(50).flat_map(|stream| {
        let begin = Frame::new(HEADERS, 0, stream, request(FIND_MISSING));
        let more = Frame::new(CONTINUATION, 0, stream, field("x", &"y".repeat(16_000)));
        let end = Frame::new(CONTINUATION, END_HEADERS, stream, field("z", ""));
        let more = std::iter::repeat_n(more, 100);
        std::iter::once(begin).chain(more).chain([end])
    });
    let seen = ground.endure(attacker, chunks(calls)).await;
    assert!(
        seen.closed || seen.count(HEADERS) + seen.count(RST_STREAM) >= 50,
        "they were refused"
    );
}

/// One long field in the dynamic table, and blocks that name it again and again.
fn bomb(stream: u32, times: usize) -> Frame {
    let mut block = request(FIND_MISSING);
    if stream == 1 {
        block.extend(remembered_field("x", &"y".repeat(3_900)));
    }
    block.resize(block.len() + times, NEWEST);
    Frame::new(HEADERS, END_HEADERS | END_STREAM, stream, block)
}

#[tokio::test]
async fn small_header_blocks_that_stand_for_huge_headers_are_refused() {
    let ground = Ground::prepare().await;
    let attacker = ground.attacker(&[]).await;
    let calls = streams().take(200).map(|stream| bomb(stream, 16_000));
    let seen = ground.endure(attacker, chunks(calls)).await;
    assert!(
        seen.closed || seen.count(HEADERS) + seen.count(RST_STREAM) >= 200,
        "they were refused"
    );
}

#[tokio::test]
async fn small_header_blocks_that_stand_for_large_headers_take_bounded_memory() {
    let ground = Ground::prepare().await;
    let attacker = ground.attacker(&[]).await;
    let calls = streams().take(200).map(|stream| bomb(stream, 250));
    ground.endure(attacker, chunks(calls)).await;
}

/// casd ends a connection with all calls on it when one call's headers are longer than 16 KiB.
#[tokio::test]
async fn headers_that_the_upstream_refuses_cost_their_own_call_alone() {
    let ground = Ground::prepare().await;
    let socket = ground.primed.address();
    let mut session = Session::start(Grpcio::New, &socket);
    // Often enough to come over each connection to the upstream.
    for _ in 0..UPLOADS {
        session.begin(&json!({
            "method": FIND_MISSING,
            "requests": [""],
            "metadata": [["x", "y".repeat(20_000)]],
        }));
        let refused = session.ended();
        // It takes the first call on a connection, whose settings it has not told yet. The end of
        // the connection may overtake its answer.
        let possible = ["RESOURCE_EXHAUSTED", "UNAVAILABLE", "OK"];
        assert!(possible.contains(&refused.code.as_str()), "{refused:?}");
        ground.is_well().await;
    }
}

#[tokio::test]
async fn a_message_in_frames_of_one_byte_harms_nobody() {
    let ground = Ground::prepare().await;
    let attacker = ground.attacker(&[]).await;
    let digest = Digest {
        hash: "0".repeat(64),
        size_bytes: 1,
    };
    let find = FindMissingBlobsRequest {
        blob_digests: vec![digest; 500],
        ..FindMissingBlobsRequest::default()
    };
    let find = message(&find.encode_to_vec());
    let byte = |byte: &u8| Frame::new(DATA, 0, 1, [*byte]);
    let frames = std::iter::once(open(1))
        .chain(find.iter().map(byte))
        .chain([Frame::new(DATA, END_STREAM, 1, [])]);
    let frames: Vec<Frame> = frames.collect();
    ground.endure(attacker, chunks(frames.into_iter())).await;
}

#[tokio::test]
async fn a_flood_of_empty_frames_harms_nobody() {
    let ground = Ground::prepare().await;
    let padded = [vec![200], vec![0; 200]].concat();
    for (flags, payload) in [(0, Vec::new()), (PADDED, padded)] {
        let attacker = ground.attacker(&[]).await;
        let nothing = repeated(Frame::new(DATA, flags, 1, payload), 50_000);
        let frames = std::iter::once(open(1).bytes()).chain(nothing);
        ground.endure(attacker, frames).await;
    }
}

#[tokio::test]
async fn a_flood_of_pings_or_settings_harms_nobody() {
    let ground = Ground::prepare().await;
    for frame in [
        Frame::new(PING, 0, 0, [7; 8]),
        Frame::settings(&[]),
        Frame::settings(&[(INITIAL_WINDOW_SIZE, 7), (INITIAL_WINDOW_SIZE, 70_000)]),
    ] {
        let attacker = ground.attacker(&[]).await;
        ground.endure(attacker, repeated(frame, 50_000)).await;
    }
}

#[tokio::test]
async fn a_flood_whose_answers_are_not_read_takes_bounded_memory() {
    let ping = repeated(Frame::new(PING, 0, 0, [7; 8]), 1_000_000);
    unread(ping).await;
    unread(repeated(Frame::settings(&[]), 1_000_000)).await;
}

#[tokio::test]
async fn calls_whose_answers_are_not_read_take_bounded_memory() {
    let calls = streams().take(10_000).flat_map(|stream| {
        let block = request(GET_CAPABILITIES);
        [
            Frame::new(HEADERS, END_HEADERS, stream, block),
            Frame::new(DATA, END_STREAM, stream, message(b"")),
        ]
    });
    unread(chunks(calls)).await;
}

async fn unread(flood: impl Iterator<Item = Vec<u8>>) {
    let ground = Ground::prepare().await;
    let mut attacker = ground.attacker(&[(INITIAL_WINDOW_SIZE, LARGEST)]).await;
    let write = async {
        for bytes in flood {
            if attacker.writer.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    // It may well be that no more is taken: then others have been served meanwhile.
    tokio::select! {
        () = write => (),
        () = ground.serve_others() => (),
    }
    ground.serve_others().await;
    ground.is_well().await;
}

#[tokio::test]
async fn windows_that_overflow_are_errors() {
    let ground = Ground::prepare().await;
    let attacker = ground.attacker(&[]).await;
    let twice = repeated(Frame::window_update(0, LARGEST), 2);
    let seen = ground.endure(attacker, twice).await;
    assert!(seen.closed);
    assert_eq!(seen.codes(GOAWAY), [FLOW_CONTROL_ERROR]);

    let attacker = ground.attacker(&[]).await;
    let twice = repeated(Frame::window_update(1, LARGEST), 2);
    let frames = std::iter::once(open(1).bytes()).chain(twice);
    let seen = ground.endure(attacker, frames).await;
    let codes = [seen.codes(RST_STREAM), seen.codes(GOAWAY)].concat();
    assert_eq!(codes, [FLOW_CONTROL_ERROR]);
}

#[tokio::test]
async fn streams_beyond_the_limit_are_refused() {
    const BEYOND: usize = 50;
    let ground = Ground::prepare().await;
    let mut attacker = ground.attacker(&[]).await;
    let settings = Frame::read(&mut attacker.reader).await.unwrap();
    assert_eq!(settings.kind, SETTINGS);
    let limit = settings.setting(MAX_CONCURRENT_STREAMS).unwrap() as usize;
    let seen = ground
        .endure(attacker, chunks(streams().take(limit + BEYOND).map(open)))
        .await;
    let refused = seen.codes(RST_STREAM);
    let refused = refused.iter().filter(|code| **code == REFUSED_STREAM);
    assert!(seen.closed || refused.count() >= BEYOND, "of {limit}");
}

#[tokio::test]
async fn what_is_not_http_2_is_cut_off() {
    let ground = Ground::prepare().await;
    let garbage: Vec<u8> = (0..100_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let settings = Frame::settings(&[]).bytes();
    for bytes in [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".as_slice(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        &garbage,
        &[PREFACE, &garbage].concat(),
        &[PREFACE, &settings, &garbage].concat(),
        &[PREFACE, &settings, b"\xff\xff\xff\0\0\0\0\0\x01"].concat(),
    ] {
        let mut stream = UnixStream::connect(ground.primed.socket()).await.unwrap();
        let beginning = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]);
        // It may be closed before all is written.
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let closed = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
        assert!(closed.is_ok(), "{beginning}");
        ground.is_well().await;
    }
}

#[tokio::test]
async fn connections_that_say_nothing_or_stop_in_the_middle_harm_nobody() {
    let ground = Ground::prepare().await;
    let begin = open(1).bytes();
    let mut connections = Vec::new();
    for said in [
        Vec::new(),
        PREFACE[..10].to_vec(),
        [PREFACE, &Frame::settings(&[]).bytes(), &begin[..5]].concat(),
        [PREFACE, &Frame::settings(&[]).bytes(), &begin[..30]].concat(),
    ] {
        for _ in 0..100 {
            let mut stream = UnixStream::connect(ground.primed.socket()).await.unwrap();
            stream.write_all(&said).await.unwrap();
            connections.push(stream);
        }
    }
    ground.serve_others().await;
    ground.is_well().await;
}
