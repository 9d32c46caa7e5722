//! Forwarding at the level of HTTP/2, where a client library would hide the difference: the
//! client and the upstream are both bare `h2`, and see each other's headers, bytes and resets.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::future::poll_fn;
use std::path::Path;

use bytes::Bytes;
use h2::Reason;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::frames::{CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PADDED, field};
use crate::grpcio::target;
use crate::http2::{
    Answer, Ending, Fields, Framer, Told, Upstream, answer, answer_of, begin, connect, fields,
    headers, in_time, read,
};
use crate::support::{Casd, Primed, scratch};

/// `:method: POST` and `:scheme: http` in HPACK. (RFC 7541, A.)
const POST: u8 = 0x83;
const HTTP: u8 = 0x86;

const METHOD: &str = "/any.Service/Method";
const OBSERVED: [&str; 2] = [
    "/build.bazel.remote.execution.v2.ActionCache/GetActionResult",
    "/build.bazel.remote.execution.v2.Execution/Execute",
];

const TIMEOUT: &str = "99999S";

/// `received` with `TIMEOUT` in place of what primed left of it, if that is nearly all.
fn with_all_its_time(received: &HeaderMap) -> Fields {
    let mut received = fields(received);
    for (name, value) in &mut received {
        let milliseconds = |text: &str| text.strip_suffix('m')?.parse::<u32>().ok();
        let left = (name == "grpc-timeout").then(|| milliseconds(value.to_str().ok()?));
        if left
            .flatten()
            .is_some_and(|left| (99_939_000..99_999_000).contains(&left))
        {
            *value = HeaderValue::from_static(TIMEOUT);
        }
    }
    received
}

/// Headers as gRPC clients send them. `te` is the one that concerns a single connection only.
fn request_headers() -> HeaderMap {
    let mut request = any_headers();
    request.insert("te", HeaderValue::from_static("trailers"));
    request
}

/// Headers of gRPC and of others, and some that nobody should send.
fn any_headers() -> HeaderMap {
    headers(&[
        ("content-type", b"application/grpc+proto"),
        (
            "user-agent",
            b"grpc-c++/1.51.1 grpc-c/29.0.0 (linux; chttp2)",
        ),
        ("grpc-encoding", b"gzip"),
        ("grpc-accept-encoding", b"identity, deflate, gzip"),
        ("grpc-timeout", TIMEOUT.as_bytes()),
        ("x.dotted.name", b"1"),
        ("under_score_", b"_"),
        ("twice", b"one"),
        ("twice", b"two"),
        ("empty", b""),
        ("high-bytes", b"\xfc\xff"),
        ("some-bin", b"AAEC/w=="),
        ("joined-bin", b"AAEC/w,,/w==,  AA"),
        ("accept", b"*/*"),
        ("date", b"yesterday"),
        ("server", b"none"),
    ])
}

#[tokio::test]
async fn headers_bytes_and_trailers_pass_as_they_are_in_both_directions() {
    let scratch = scratch();
    let mut upstream = Upstream::listen(scratch.path()).await;
    let primed = Primed::start(scratch.path(), &upstream.address());
    let client = connect(&primed.socket()).await;
    // A compressed message that is not one, and the beginning of another.
    let sent = Bytes::from_static(b"\x01\0\0\0\x03abc\0\0\0\xff\xffno more");
    for method in [METHOD, OBSERVED[0], OBSERVED[1], "/with?query=%2F&x#y", "/"] {
        let (response, mut body) = begin(&client, method, request_headers()).await;
        body.send_data(sent.clone(), false).unwrap();
        body.send_trailers(headers(&[("from-client", b"trailer")]))
            .unwrap();

        let (request, mut respond) = upstream.call().await;
        let path = method.split('#').next();
        assert_eq!(
            request.uri().path_and_query().map(|path| path.as_str()),
            path
        );
        assert_eq!(request.method(), http::Method::POST);
        assert_eq!(
            with_all_its_time(request.headers()),
            fields(&request_headers()),
            "{method}"
        );
        let (data, ending) = read(request.into_body()).await;
        assert_eq!(data, sent, "{method}");
        let trailers = fields(&headers(&[("from-client", b"trailer")]));
        assert_eq!(ending, Ending::Trailers(trailers), "{method}");

        let mut head = Response::builder()
            .status(StatusCode::IM_A_TEAPOT)
            .body(())
            .unwrap();
        *head.headers_mut() = any_headers();
        let mut body = respond.send_response(head, false).unwrap();
        body.send_data(sent.clone(), false).unwrap();
        let trailers = headers(&[
            ("grpc-status", b"99"),
            ("grpc-message", b"100%25 %E2%9C%93 %zz"),
            ("grpc-status-details-bin", b"not base64!"),
            ("twice", b"one"),
            ("twice", b"two"),
        ]);
        body.send_trailers(trailers.clone()).unwrap();
        let expected = Answer {
            status: StatusCode::IM_A_TEAPOT,
            headers: fields(&any_headers()),
            data: sent.to_vec(),
            ending: Ending::Trailers(fields(&trailers)),
        };
        assert_eq!(answer(response).await, Ok(expected), "{method}");
    }
}

#[tokio::test]
async fn an_answer_of_headers_alone_stays_one() {
    let scratch = scratch();
    let mut upstream = Upstream::listen(scratch.path()).await;
    let primed = Primed::start(scratch.path(), &upstream.address());
    let client = connect(&primed.socket()).await;
    for method in [METHOD, OBSERVED[0], OBSERVED[1]] {
        let (response, mut body) = begin(&client, method, request_headers()).await;
        body.send_data(Bytes::from_static(b"\0\0\0\0\0"), true)
            .unwrap();
        let (_request, mut respond) = upstream.call().await;
        let mut head = Response::new(());
        let trailers_only = headers(&[
            ("content-type", b"application/grpc"),
            ("grpc-status", b"5"),
            ("grpc-message", b"nothing"),
            ("grpc-status-details-bin", b"AAEC/w"),
        ]);
        *head.headers_mut() = trailers_only.clone();
        respond.send_response(head, true).unwrap();
        let expected = Answer {
            status: StatusCode::OK,
            headers: fields(&trailers_only),
            data: Vec::new(),
            ending: Ending::NoTrailers,
        };
        assert_eq!(answer(response).await, Ok(expected), "{method}");
    }
}

#[tokio::test]
async fn a_request_that_its_client_resets_is_reset_upstream_and_never_ended() {
    let scratch = scratch();
    let mut upstream = Upstream::listen(scratch.path()).await;
    let primed = Primed::start(scratch.path(), &upstream.address());
    let client = connect(&primed.socket()).await;
    for method in [METHOD, OBSERVED[0], OBSERVED[1]] {
        for answered in [false, true] {
            // One of the observed methods is forwarded once its message is there.
            let (response, mut body) = begin(&client, method, HeaderMap::new()).await;
            body.send_data(Bytes::from_static(b"\0\0\0\0\x01x"), false)
                .unwrap();
            let (request, mut respond) = upstream.call().await;
            let mut received = request.into_body();
            assert_eq!(in_time(received.data()).await.unwrap().unwrap().len(), 6);
            let mut begun = None;
            if answered {
                let mut sending = respond.send_response(Response::new(()), false).unwrap();
                sending
                    .send_data(Bytes::from_static(b"so far"), false)
                    .unwrap();
                let mut response = in_time(response).await.unwrap();
                let first = in_time(response.body_mut().data()).await.unwrap().unwrap();
                assert_eq!(first, "so far");
                begun = Some((sending, response));
            }
            body.send_reset(Reason::CANCEL);
            assert_eq!(
                read(received).await,
                (vec![], Ending::Reset(Some(Reason::CANCEL))),
                "{method}, after the response began: {answered}"
            );
            drop(begun);
        }
    }
}

/// How far an upstream comes before it resets a stream.
#[derive(Clone, Copy, Debug)]
enum Came {
    Nowhere,
    ToHeaders,
    ToData,
}

#[tokio::test]
async fn a_reset_by_the_upstream_reaches_the_client_with_its_code_and_at_its_place() {
    let scratch = scratch();
    let mut upstream = Upstream::listen(scratch.path()).await;
    let primed = Primed::start(scratch.path(), &upstream.address());
    let directly = connect(&upstream.socket.clone()).await;
    let through_primed = connect(&primed.socket()).await;
    // One message without a field.
    let message = Bytes::from_static(b"\0\0\0\0\0");
    let all = [METHOD, OBSERVED[0], OBSERVED[1]];
    let mut differing = Vec::new();
    for reason in [
        Reason::CANCEL,
        Reason::REFUSED_STREAM,
        Reason::ENHANCE_YOUR_CALM,
        Reason::INTERNAL_ERROR,
        Reason::NO_ERROR,
        Reason::from(0xdead_beef),
    ] {
        for (method, came) in all.into_iter().flat_map(|method| {
            [Came::Nowhere, Came::ToHeaders, Came::ToData].map(|came| (method, came))
        }) {
            // The answer to a lookup may be held until its status is known.
            if method == OBSERVED[0] && matches!(came, Came::ToHeaders) {
                continue;
            }
            let mut answers = Vec::new();
            for client in [&directly, &through_primed] {
                let (response, mut body) = begin(client, method, HeaderMap::new()).await;
                body.send_data(message.clone(), true).unwrap();
                let (_request, mut respond) = upstream.call().await;
                if matches!(came, Came::Nowhere) {
                    respond.send_reset(reason);
                    answers.push(answer(response).await);
                    continue;
                }
                let mut body = respond.send_response(Response::new(()), false).unwrap();
                let mut data = None;
                if matches!(came, Came::ToData) {
                    body.send_data(message.clone(), false).unwrap();
                }
                let mut response = in_time(response).await.unwrap();
                if matches!(came, Came::ToData) {
                    data = Some(in_time(response.body_mut().data()).await.unwrap().unwrap());
                }
                assert_eq!(data.is_some(), matches!(came, Came::ToData));
                body.send_reset(reason);
                answers.push(Ok(answer_of(response).await));
            }
            if answers[1] != answers[0] {
                differing.push(format!(
                    "{method}: {reason:?}, the upstream came {came:?}: directly {:?}, through primed {:?}",
                    answers[0], answers[1]
                ));
            }
        }
    }
    assert!(differing.is_empty(), "{differing:#?}");
}

#[tokio::test]
async fn an_answer_before_the_end_of_the_requests_is_whole_and_then_the_upstream_wants_no_more() {
    let scratch = scratch();
    let mut upstream = Upstream::listen(scratch.path()).await;
    let primed = Primed::start(scratch.path(), &upstream.address());
    let directly = connect(&upstream.socket.clone()).await;
    let through_primed = connect(&primed.socket()).await;
    for with_data in [false, true] {
        let mut seen = Vec::new();
        for client in [&directly, &through_primed] {
            let (response, mut requests) = begin(client, METHOD, request_headers()).await;
            requests
                .send_data(Bytes::from_static(b"\0\0\0\0\x01x"), false)
                .unwrap();
            let (request, mut respond) = upstream.call().await;
            let mut head = Response::new(());
            if with_data {
                let mut body = respond.send_response(head, false).unwrap();
                body.send_data(Bytes::from_static(b"early"), false).unwrap();
                let trailers = headers(&[("grpc-status", b"6"), ("twice", b"1"), ("twice", b"2")]);
                body.send_trailers(trailers).unwrap();
            } else {
                *head.headers_mut() = headers(&[("grpc-status", b"6"), ("grpc-message", b"no")]);
                respond.send_response(head, true).unwrap();
            }
            drop((request, respond));
            let answer = answer(response).await;
            let reset = in_time(poll_fn(|cx| requests.poll_reset(cx)))
                .await
                .unwrap();
            seen.push((answer, reset));
        }
        assert_eq!(seen[0].1, Reason::NO_ERROR);
        assert_eq!(
            seen[1], seen[0],
            "with data: {with_data}; left through primed"
        );
    }
}

#[tokio::test]
async fn what_is_no_grpc_passes_too() {
    let scratch = scratch();
    let mut upstream = Upstream::listen(scratch.path()).await;
    let primed = Primed::start(scratch.path(), &upstream.address());
    let client = connect(&primed.socket()).await;
    let text = Bytes::from_static(b"<html>no more today</html>");
    for path in [METHOD, OBSERVED[0], OBSERVED[1]] {
        for method in [Method::POST, Method::GET, Method::OPTIONS] {
            for (status, body) in [
                (200, true),
                (204, false),
                (404, true),
                (429, false),
                (503, true),
            ] {
                let request = Request::builder()
                    .method(method.clone())
                    .uri(format!("http://localhost{path}"))
                    .header("accept", "text/*")
                    .body(())
                    .unwrap();
                // A request of headers alone.
                let mut client = in_time(client.clone().ready()).await.unwrap();
                let (response, _) = client.send_request(request, true).unwrap();
                let (request, mut respond) = upstream.call().await;
                assert_eq!(request.method(), method);
                assert_eq!(
                    read(request.into_body()).await,
                    (vec![], Ending::NoTrailers)
                );
                let plain = headers(&[("content-type", b"text/plain"), ("retry-after", b"7")]);
                let mut head = Response::builder().status(status).body(()).unwrap();
                *head.headers_mut() = plain.clone();
                let mut sending = respond.send_response(head, !body).unwrap();
                if body {
                    sending.send_data(text.clone(), true).unwrap();
                }
                let expected = Answer {
                    status: StatusCode::from_u16(status).unwrap(),
                    headers: fields(&plain),
                    data: if body { text.to_vec() } else { Vec::new() },
                    ending: Ending::NoTrailers,
                };
                let answer = answer(response).await;
                assert_eq!(answer, Ok(expected), "{method} {path}");
            }
        }
    }
}

#[tokio::test]
async fn bytes_pass_wherever_they_are_split() {
    let scratch = scratch();
    let mut upstream = Upstream::listen(scratch.path()).await;
    let primed = Primed::start(scratch.path(), &upstream.address());
    let client = connect(&primed.socket()).await;
    let sent: Bytes = (0..100_000_u32)
        .map(|number| (number % 251) as u8)
        .collect();
    // The prefix of the first message says how long all the rest is.
    let sent = Bytes::from([&[0, 0, 1, 0x86, 0xa0][..], &sent].concat());
    for method in [METHOD, OBSERVED[0], OBSERVED[1]] {
        // Byte by byte (the beginning), in odd pieces, with empty frames between, all at once.
        for (piece, until) in [(1, 500), (7_919, usize::MAX), (0, usize::MAX)] {
            let pieces = |sent: &Bytes| {
                let split = until.min(sent.len());
                let mut pieces: Vec<Bytes> = match piece {
                    0 => vec![sent.slice(..split)],
                    _ => sent[..split]
                        .chunks(piece)
                        .map(Bytes::copy_from_slice)
                        .collect(),
                };
                pieces.push(sent.slice(split..));
                pieces
            };
            let (response, mut requests) = begin(&client, method, request_headers()).await;
            for piece in pieces(&sent) {
                requests.send_data(piece, false).unwrap();
            }
            requests.send_data(Bytes::new(), true).unwrap();
            let (request, mut respond) = upstream.call().await;
            let (received, ending) = read(request.into_body()).await;
            assert!(received == sent, "{method}, {piece}");
            assert_eq!(ending, Ending::NoTrailers);
            let mut answers = respond.send_response(Response::new(()), false).unwrap();
            for piece in pieces(&sent) {
                answers.send_data(piece, false).unwrap();
            }
            answers
                .send_trailers(headers(&[("grpc-status", b"0")]))
                .unwrap();
            let answer = answer(response).await.unwrap();
            assert!(answer.data == sent, "{method}, {piece}");
            assert!(matches!(answer.ending, Ending::Trailers(_)));
        }
    }
}

/// Answers every call with its path and its body.
fn echo(mut upstream: Upstream) {
    primed::task::spawn("echo", async move {
        loop {
            let (request, mut respond) = upstream.call().await;
            let mut answer = request.uri().path().as_bytes().to_vec();
            primed::task::spawn("answer", async move {
                answer.extend(read(request.into_body()).await.0);
                let mut body = respond.send_response(Response::new(()), false).unwrap();
                body.send_data(answer.into(), false).unwrap();
                body.send_trailers(headers(&[("grpc-status", b"0")]))
                    .unwrap();
            });
        }
    });
}

/// Calls primed, by a Unix socket and by TCP, with `named` among the headers.
async fn call_with(primed: &Primed, named: &[u8]) -> [Told; 2] {
    let unix = UnixStream::connect(primed.socket()).await.unwrap();
    let tcp = TcpStream::connect(("127.0.0.1", primed.port())).await;
    [
        call_over(unix, named).await,
        call_over(tcp.unwrap(), named).await,
    ]
}

async fn call_over(stream: impl AsyncRead + AsyncWrite + Unpin, named: &[u8]) -> Told {
    let mut framer = Framer::open(stream).await;
    let mut head = vec![POST, HTTP];
    head.extend(field(":path", METHOD));
    head.extend(named);
    head.extend(field("te", "trailers"));
    framer.send(HEADERS, END_HEADERS, 1, &head).await;
    framer.send(DATA, END_STREAM, 1, b"\0\0\0\0\0").await;
    framer.told(1).await
}

/// A primed that listens on TCP too, before an upstream that echoes.
async fn echoing(directory: &Path) -> Primed {
    let upstream = Upstream::listen(directory).await;
    let listen = format!("unix:{}/primed.sock,127.0.0.1:0", directory.display());
    let primed = Primed::start_with(directory, &upstream.address(), &["--listen", &listen]);
    echo(upstream);
    primed
}

#[tokio::test]
async fn whatever_authority_a_client_names_its_call_is_served() {
    let scratch = scratch();
    let primed = echoing(scratch.path()).await;
    let encoded = target(&primed.socket()).replace("unix:/", "");
    let encoded = encoded.replace('/', "%2F");
    let long = "a".repeat(5000);
    let mut refused = Vec::new();
    for authority in [
        "localhost",
        "localhost:8980",
        "127.0.0.1:1",
        "[::1]:65535",
        "user:word@host",
        &encoded,
        "/tmp/primed.sock",
        "unix:/tmp/primed.sock",
        "%",
        "%zz%2",
        "::::",
        "a_b.~!$&'()*+,;=",
        &long,
    ] {
        // As gRPC sends it, and as others do.
        for name in [":authority", "host"] {
            let told = call_with(&primed, &field(name, authority)).await;
            if told != [(); 2].map(|()| echoed()) {
                refused.push(format!("{name} '{authority}': {told:?}"));
            }
        }
    }
    assert!(refused.is_empty(), "{refused:#?}");
}

#[tokio::test]
async fn a_client_that_names_no_authority_is_served() {
    let scratch = scratch();
    let primed = echoing(scratch.path()).await;
    for named in [vec![], field("host", "")] {
        let told = call_with(&primed, &named).await;
        let named = named.escape_ascii();
        assert_eq!(told, [(); 2].map(|()| echoed()), "{named}");
    }
}

/// What `echo` makes of an empty message to `METHOD`.
fn echoed() -> Told {
    Told::Ended([METHOD.as_bytes(), b"\0\0\0\0\0"].concat())
}

#[tokio::test]
async fn padding_and_split_headers_leave_what_they_carry_as_it_is() {
    let scratch = scratch();
    let upstream = Upstream::listen(scratch.path()).await;
    let primed = Primed::start(scratch.path(), &upstream.address());
    echo(upstream);
    let stream = UnixStream::connect(primed.socket()).await.unwrap();
    let mut framer = Framer::open(stream).await;
    let mut head = vec![POST, HTTP];
    head.extend(field(":path", METHOD));
    head.extend(field("te", "trailers"));
    let (first, rest) = head.split_at(5);
    let (second, third) = rest.split_at(1);
    framer.send(HEADERS, 0, 1, first).await;
    framer.send(CONTINUATION, 0, 1, second).await;
    framer.send(CONTINUATION, END_HEADERS, 1, third).await;
    framer.send(DATA, PADDED, 1, b"\x03\0\0\0\0\x02x***").await;
    framer.send(DATA, 0, 1, b"").await;
    framer.send(DATA, PADDED, 1, b"\0y").await;
    framer.send(DATA, PADDED | END_STREAM, 1, b"\x02**").await;
    let expected = [METHOD.as_bytes(), b"\0\0\0\0\x02xy"].concat();
    assert_eq!(framer.told(1).await, Told::Ended(expected));
}

#[tokio::test]
async fn a_message_shorter_than_it_claims_gets_the_answer_that_casd_gives_it() {
    let scratch = scratch();
    let casd = Casd::start(scratch.path(), 1);
    let mut primed = Primed::start(scratch.path(), &casd.address());
    let directly = connect(&scratch.path().join("casd.sock")).await;
    let through_primed = connect(&primed.socket()).await;
    let grpc = headers(&[("te", b"trailers"), ("content-type", b"application/grpc")]);
    for method in OBSERVED {
        for bytes in [&b"\0\0\0\x01\0short"[..], b"\0\0", b"", b"\x01\0\0\0\x02zz"] {
            let mut answers = Vec::new();
            for client in [&directly, &through_primed] {
                let (response, mut body) = begin(client, method, grpc.clone()).await;
                body.send_data(Bytes::from_static(bytes), true).unwrap();
                answers.push(answer(response).await);
            }
            assert_eq!(
                answers[1], answers[0],
                "{method} {bytes:?}: left through primed"
            );
        }
    }
    assert!(primed.daemon.is_running());
}
