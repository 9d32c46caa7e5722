//! Upstreams that strain or break HTTP/2: calls to them end as unavailable, primed stays up and
//! does not grow.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::io;
use std::sync::Arc;

use primed::reapi::content_addressable_storage_client::ContentAddressableStorageClient;
use primed::reapi::{BatchUpdateBlobsRequest, FindMissingBlobsRequest, batch_update_blobs_request};
use prost::Message as _;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{oneshot, watch};
use tonic::{Code, Status};

use crate::client::connect;
use crate::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, HEADERS, INITIAL_WINDOW_SIZE, LARGEST,
    NEWEST, PING, PREFACE, field, message, remembered_field, request,
};
use crate::support::{PATIENCE, Primed, scratch};

/// How much may be sent of a call before the upstream says anything.
const FIRST_WINDOW: usize = 65_535;
/// How much memory primed may take.
const MEMORY: u64 = 64 * 1024 * 1024;
/// How many bytes of a flood must go to primed, unless it breaks that off: more than the system
/// keeps for a reader that does not read.
const FLOOD: usize = 16 * 1024 * 1024;

/// What an upstream does with each connection.
enum Conduct {
    /// It says this and closes the connection.
    Says(Vec<u8>),
    /// It says nothing, and listens.
    IsSilent,
    /// It says this again and again.
    Floods(Vec<u8>),
    /// It greets as it should, and answers the first call, whose stream this is, so.
    Answers(fn(u32) -> Vec<Frame>),
    /// The same, and then says this again and again.
    AnswersAndFloods(fn(u32) -> Vec<Frame>, fn(u32) -> Frame),
}

struct Upstream {
    conduct: Conduct,
    /// How many bytes a flood has brought to primed, or `CUT_OFF`.
    flooded: watch::Sender<usize>,
}

/// primed has closed a connection.
const CUT_OFF: usize = usize::MAX;

impl Upstream {
    async fn treat(&self, mut stream: TcpStream) {
        if self.conduct_itself(&mut stream).await.is_err() {
            self.flooded.send_replace(CUT_OFF);
        }
    }

    async fn conduct_itself(&self, stream: &mut TcpStream) -> io::Result<()> {
        match &self.conduct {
            Conduct::Says(bytes) => return stream.write_all(bytes).await,
            Conduct::IsSilent => (),
            Conduct::Floods(bytes) => self.flood(stream, bytes).await?,
            Conduct::Answers(answer) => {
                greet_and_answer(stream, answer).await?;
            }
            Conduct::AnswersAndFloods(answer, more) => {
                let call = greet_and_answer(stream, answer).await?;
                self.flood(stream, &more(call).bytes().repeat(1000)).await?;
            }
        }
        let mut unread = vec![0; 64 * 1024];
        while stream.read(&mut unread).await? > 0 {}
        Ok(())
    }

    async fn flood(&self, stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
        let (mut reader, mut writer) = stream.split();
        let mut unread = vec![0; 64 * 1024];
        let read = async {
            while reader.read(&mut unread).await? > 0 {}
            Err(io::ErrorKind::ConnectionReset.into())
        };
        let write = async {
            loop {
                writer.write_all(bytes).await?;
                self.flooded
                    .send_modify(|flooded| *flooded = flooded.saturating_add(bytes.len()));
            }
        };
        tokio::select! {
            ended = read => ended,
            ended = write => ended,
        }
    }
}

async fn greet_and_answer(
    stream: &mut TcpStream,
    answer: &fn(u32) -> Vec<Frame>,
) -> io::Result<u32> {
    Frame::settings(&[]).write(stream).await?;
    let mut preface = [0; PREFACE.len()];
    stream.read_exact(&mut preface).await?;
    let call = loop {
        let frame = Frame::read(stream).await?;
        if frame.kind == HEADERS {
            break frame.stream;
        }
    };
    for frame in answer(call) {
        frame.write(stream).await?;
    }
    Ok(call)
}

struct Ground {
    primed: Primed,
    flooded: watch::Receiver<usize>,
    _scratch: TempDir,
}

impl Ground {
    async fn prepare(conduct: Conduct, arguments: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (flooded, was_flooded) = watch::channel(0);
        let upstream = Arc::new(Upstream { conduct, flooded });
        primed::task::spawn("broken upstream", async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let upstream = upstream.clone();
                primed::task::spawn("broken connection", async move {
                    upstream.treat(stream).await;
                });
            }
        });
        let scratch = scratch();
        // primed's start is waited for without letting others run; it does not connect before a call.
        let primed = Primed::start_with(scratch.path(), &address, arguments);
        Ground {
            primed,
            flooded: was_flooded,
            _scratch: scratch,
        }
    }

    async fn call(&self) -> Status {
        let mut client = ContentAddressableStorageClient::new(connect(&self.primed.socket()));
        let answer = client.find_missing_blobs(FindMissingBlobsRequest::default());
        let answer = tokio::time::timeout(PATIENCE, answer).await;
        answer.expect("a call takes too long").unwrap_err()
    }

    fn is_well(&mut self) {
        assert!(self.primed.daemon.is_running());
        assert!(!self.primed.daemon.log().contains("panicked"));
        let peak = self.primed.daemon.peak_memory();
        assert!(peak < MEMORY, "primed takes {peak} bytes");
    }
}

async fn is_unavailable(conduct: Conduct, arguments: &[&str]) {
    let mut ground = Ground::prepare(conduct, arguments).await;
    for _ in 0..4 {
        let status = ground.call().await;
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    }
    ground.is_well();
}

fn garbage() -> Vec<u8> {
    let number = |i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8;
    (0..100_000).map(number).collect()
}

#[tokio::test]
async fn an_upstream_that_closes_each_connection_is_unavailable() {
    is_unavailable(Conduct::Says(Vec::new()), &[]).await;
}

#[tokio::test]
async fn an_upstream_that_speaks_something_else_is_unavailable() {
    let http_1 = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";
    is_unavailable(Conduct::Says(http_1.to_vec()), &[]).await;
    is_unavailable(Conduct::Says(garbage()), &[]).await;
    is_unavailable(Conduct::Floods(garbage()), &[]).await;
}

#[tokio::test]
async fn an_upstream_that_says_nothing_is_unavailable() {
    is_unavailable(Conduct::IsSilent, &["--keep-alive", "1"]).await;
}

#[tokio::test]
async fn an_upstream_that_takes_no_call_is_unavailable_however_often_it_is_asked() {
    let farewell = |_| vec![Frame::go_away(0)];
    is_unavailable(Conduct::Answers(farewell), &[]).await;
    let frames = [Frame::settings(&[]), Frame::go_away(0)];
    let frames = frames.map(|frame| frame.bytes()).concat();
    is_unavailable(Conduct::Says(frames), &[]).await;
}

/// As load balancers do that end a connection after so many calls.
#[tokio::test]
async fn an_upload_at_which_an_upstream_has_not_looked_is_made_again_whole() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (received, whole) = oneshot::channel();
    primed::task::spawn("leaving upstream", async move {
        let (mut leaving, _) = listener.accept().await.unwrap();
        let body = body_of_call(&mut leaving, 0, FIRST_WINDOW).await;
        assert_eq!(body.len(), FIRST_WINDOW, "what it takes without a look");
        Frame::go_away(0).write(&mut leaving).await.unwrap();

        let (mut staying, _) = listener.accept().await.unwrap();
        let body = body_of_call(&mut staying, LARGEST / 2, usize::MAX).await;
        for frame in [
            Frame::new(HEADERS, END_HEADERS, 1, field(":status", "200")),
            Frame::new(DATA, 0, 1, message(b"")),
            Frame::new(
                HEADERS,
                END_HEADERS | END_STREAM,
                1,
                field("grpc-status", "0"),
            ),
        ] {
            frame.write(&mut staying).await.unwrap();
        }
        received.send(body).unwrap();
        let mut unread = [0; 1024];
        while staying.read(&mut unread).await.is_ok_and(|read| read > 0) {}
    });
    let scratch = scratch();
    let primed = Primed::start(scratch.path(), &address);
    let request = BatchUpdateBlobsRequest {
        requests: vec![batch_update_blobs_request::Request {
            data: garbage().into(),
            ..batch_update_blobs_request::Request::default()
        }],
        ..BatchUpdateBlobsRequest::default()
    };
    let expected = message(&request.encode_to_vec());
    let mut client = ContentAddressableStorageClient::new(connect(&primed.socket()));
    let answer = tokio::time::timeout(PATIENCE, client.batch_update_blobs(request));
    answer.await.expect("it takes too long").unwrap();
    assert!(whole.await.unwrap() == expected);
}

/// Greets, lets `window` more bytes of the first call come than HTTP/2 allows at first, and reads of
/// its body until there are `enough` or it ends.
async fn body_of_call(stream: &mut TcpStream, window: u32, enough: usize) -> Vec<u8> {
    Frame::settings(&[]).write(stream).await.unwrap();
    let mut preface = [0; PREFACE.len()];
    stream.read_exact(&mut preface).await.unwrap();
    if window > 0 {
        Frame::window_update(0, window).write(stream).await.unwrap();
    }
    let mut body = Vec::new();
    while body.len() < enough {
        let frame = Frame::read(stream).await.unwrap();
        if frame.kind == HEADERS && window > 0 {
            let more = Frame::window_update(frame.stream, window);
            more.write(stream).await.unwrap();
        }
        if frame.kind == DATA {
            body.extend(&frame.payload);
            if frame.flags & END_STREAM > 0 {
                break;
            }
        }
    }
    body
}

#[tokio::test]
async fn an_upstream_whose_answers_break_http_2_is_unavailable() {
    for answer in [
        // A body without a head; a window of nothing; a stream that nobody opened.
        (|call| vec![Frame::new(DATA, END_STREAM, call, message(b""))]) as fn(u32) -> Vec<Frame>,
        |call| vec![Frame::new(PING, 0, call, [0; 8])],
        |_| {
            vec![
                Frame::window_update(0, LARGEST),
                Frame::window_update(0, LARGEST),
            ]
        },
        |call| {
            vec![Frame::new(
                HEADERS,
                END_HEADERS,
                call + 100,
                field(":status", "200"),
            )]
        },
        |call| vec![Frame::new(HEADERS, END_HEADERS, call, [NEWEST])],
    ] {
        is_unavailable(Conduct::Answers(answer), &[]).await;
    }
}

#[tokio::test]
async fn an_upstream_whose_headers_never_end_is_unavailable() {
    let begin = |call| vec![Frame::new(HEADERS, 0, call, field(":status", "200"))];
    let empty = |call| Frame::new(CONTINUATION, 0, call, []);
    let long = |call| Frame::new(CONTINUATION, 0, call, field("x", &"y".repeat(16_000)));
    for more in [empty as fn(u32) -> Frame, long] {
        is_unavailable(Conduct::AnswersAndFloods(begin, more), &[]).await;
    }
}

#[tokio::test]
async fn an_upstream_whose_small_header_blocks_stand_for_huge_ones_is_unavailable() {
    let bomb = |call| {
        let mut block = field(":status", "200");
        block.extend(remembered_field("x", &"y".repeat(3_900)));
        block.resize(block.len() + 16_000, NEWEST);
        vec![Frame::new(HEADERS, END_HEADERS, call, block)]
    };
    is_unavailable(Conduct::Answers(bomb), &[]).await;
}

#[tokio::test]
async fn answers_that_never_end_are_endured() {
    for more in [
        (|call| Frame::new(DATA, 0, call, [])) as fn(u32) -> Frame,
        |call| Frame::new(HEADERS, END_HEADERS, call, field(":status", "100")),
        |_| Frame::new(PING, 0, 0, [7; 8]),
        |_| Frame::settings(&[(INITIAL_WINDOW_SIZE, 7), (INITIAL_WINDOW_SIZE, 70_000)]),
    ] {
        is_endured(more).await;
    }
}

#[tokio::test]
async fn answers_in_frames_of_one_byte_take_no_more_memory_than_others() {
    is_endured(|call| Frame::new(DATA, 0, call, [0])).await;
}

#[tokio::test]
async fn requests_in_frames_of_one_byte_take_no_more_memory_than_others() {
    let mut ground = Ground::prepare(Conduct::IsSilent, &[]).await;
    let client = UnixStream::connect(ground.primed.socket()).await.unwrap();
    let (mut reader, mut writer) = client.into_split();
    let call = request("/any.Service/Method");
    let greeting = [
        PREFACE,
        &Frame::settings(&[]).bytes(),
        &Frame::new(HEADERS, END_HEADERS, 1, call).bytes(),
    ];
    writer.write_all(&greeting.concat()).await.unwrap();
    // No more than the window that primed gives to a stream.
    let bytes = Frame::new(DATA, 0, 1, [0]).bytes().repeat(1000);
    let write = async {
        for _ in 0..1000 {
            if writer.write_all(&bytes).await.is_err() {
                return;
            }
        }
        let ping = Frame::new(PING, 0, 0, [0; 8]);
        let _ = ping.write(&mut writer).await;
    };
    // All of it was taken when the PING is answered, unless primed broke it off.
    let read = async {
        while let Ok(frame) = Frame::read(&mut reader).await {
            if frame.kind == PING {
                return;
            }
        }
    };
    let both = async { tokio::join!(write, read) };
    let taken = tokio::time::timeout(PATIENCE, both).await;
    taken.expect("primed neither reads nor breaks it off");
    ground.is_well();
}

/// Begins a call, reads nothing of its answer, and waits until a flood of it has come.
async fn is_endured(more: fn(u32) -> Frame) {
    let begin = |call| {
        let head = [
            field(":status", "200"),
            field("content-type", "application/grpc"),
        ];
        vec![Frame::new(HEADERS, END_HEADERS, call, head.concat())]
    };
    let mut ground = Ground::prepare(Conduct::AnswersAndFloods(begin, more), &[]).await;
    let mut client = UnixStream::connect(ground.primed.socket()).await.unwrap();
    let call = request("/any.Service/Method");
    let greeting = [
        PREFACE,
        &Frame::settings(&[(INITIAL_WINDOW_SIZE, LARGEST)]).bytes(),
        &Frame::window_update(0, LARGEST - 65_535).bytes(),
        &Frame::new(HEADERS, END_HEADERS | END_STREAM, 1, call).bytes(),
    ];
    client.write_all(&greeting.concat()).await.unwrap();
    let flooded = ground.flooded.wait_for(|flooded| *flooded >= FLOOD);
    let flooded = tokio::time::timeout(PATIENCE, flooded).await;
    flooded
        .expect("primed neither reads nor breaks it off")
        .unwrap();
    ground.is_well();
}
