//! Forwarding at the level of HTTP/2, where a client library would hide the difference: the
//! client and the upstream are both bare `h2`, and see each other's headers, bytes and resets.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::path::{Path, PathBuf};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use crate::support::{Casd, PATIENCE, Primed, scratch};

const METHOD: &str = "/any.Service/Method";
const OBSERVED: [&str; 2] = [
    "/build.bazel.remote.execution.v2.ActionCache/GetActionResult",
    "/build.bazel.remote.execution.v2.Execution/Execute",
];

/// An upstream whose calls the test answers itself.
struct Upstream {
    calls: mpsc::Receiver<UpstreamCall>,
    socket: PathBuf,
}

type UpstreamCall = (Request<RecvStream>, SendResponse<Bytes>);

impl Upstream {
    fn listen(directory: &Path) -> Self {
        let socket = directory.join("upstream.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let (sender, calls) = mpsc::channel(16);
        primed::task::spawn("upstream", async move {
            while let Ok((stream, _)) = listener.accept().await {
                let sender = sender.clone();
                primed::task::spawn("upstream connection", async move {
                    let mut connection = h2::server::handshake(stream).await.unwrap();
                    while let Some(Ok(call)) = connection.accept().await {
                        sender.send(call).await.unwrap();
                    }
                });
            }
        });
        Upstream { calls, socket }
    }

    fn address(&self) -> String {
        format!("unix:{}", self.socket.display())
    }

    async fn call(&mut self) -> UpstreamCall {
        in_time(self.calls.recv()).await.unwrap()
    }
}

async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap()
}

async fn connect(socket: &Path) -> SendRequest<Bytes> {
    let stream = UnixStream::connect(socket).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    primed::task::spawn("client", connection);
    client
}

async fn begin(
    client: &SendRequest<Bytes>,
    method: &str,
    headers: HeaderMap,
) -> (ResponseFuture, SendStream<Bytes>) {
    let mut request = Request::post(format!("http://localhost{method}"))
        .body(())
        .unwrap();
    *request.headers_mut() = headers;
    let mut client = in_time(client.clone().ready()).await.unwrap();
    client.send_request(request, false).unwrap()
}

/// How a body ended.
#[derive(Clone, Debug, PartialEq)]
enum Ending {
    Trailers(HeaderMap),
    NoTrailers,
    Reset(Option<Reason>),
}

async fn read(mut body: RecvStream) -> (Vec<u8>, Ending) {
    let mut read = Vec::new();
    while let Some(data) = in_time(body.data()).await {
        match data {
            Ok(data) => {
                body.flow_control().release_capacity(data.len()).unwrap();
                read.extend_from_slice(&data);
            }
            Err(error) => return (read, Ending::Reset(error.reason())),
        }
    }
    let ending = match in_time(body.trailers()).await {
        Ok(Some(trailers)) => Ending::Trailers(trailers),
        Ok(None) => Ending::NoTrailers,
        Err(error) => Ending::Reset(error.reason()),
    };
    (read, ending)
}

/// All that a client is told.
#[derive(Clone, Debug, PartialEq)]
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    data: Vec<u8>,
    ending: Ending,
}

async fn answer(response: ResponseFuture) -> Result<Answer, Option<Reason>> {
    let response = in_time(response).await.map_err(|error| error.reason())?;
    Ok(answer_of(response).await)
}

async fn answer_of(response: Response<RecvStream>) -> Answer {
    let (parts, body) = response.into_parts();
    let (data, ending) = read(body).await;
    Answer {
        status: parts.status,
        headers: parts.headers,
        data,
        ending,
    }
}

/// The status that a gRPC client makes of an answer. (gRPC over HTTP/2, "Errors".)
fn grpc_status(answer: &Result<Answer, Option<Reason>>) -> u32 {
    let of_reset = |reason: &Option<Reason>| match *reason {
        Some(Reason::REFUSED_STREAM) => 14,
        Some(Reason::CANCEL) => 1,
        Some(Reason::ENHANCE_YOUR_CALM) => 8,
        Some(Reason::INADEQUATE_SECURITY) => 7,
        _ => 13,
    };
    let of_headers =
        |headers: &HeaderMap| headers["grpc-status"].to_str().unwrap().parse().unwrap();
    match answer {
        Err(reason) => of_reset(reason),
        Ok(answer) => match &answer.ending {
            Ending::Trailers(trailers) => of_headers(trailers),
            Ending::NoTrailers => of_headers(&answer.headers),
            Ending::Reset(reason) => of_reset(reason),
        },
    }
}

fn headers(pairs: &[(&'static str, &'static [u8])]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        let value = HeaderValue::from_bytes(value).unwrap();
        headers.append(HeaderName::from_static(name), value);
    }
    headers
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
        ("grpc-timeout", b"99999S"),
        ("x.dotted", b"1"),
        ("twice", b"one"),
        ("twice", b"two"),
        ("empty", b""),
        ("high-bytes", b"\xfc\xff"),
        ("some-bin", b"AAEC/w=="),
        ("accept", b"*/*"),
        ("date", b"yesterday"),
        ("server", b"none"),
    ])
}

#[tokio::test]
async fn headers_bytes_and_trailers_pass_as_they_are_in_both_directions() {
    let scratch = scratch();
    let mut upstream = Upstream::listen(scratch.path());
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
        assert_eq!(request.headers(), &request_headers(), "{method}");
        let (data, ending) = read(request.into_body()).await;
        assert_eq!(data, sent, "{method}");
        let trailers = headers(&[("from-client", b"trailer")]);
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
            headers: any_headers(),
            data: sent.to_vec(),
            ending: Ending::Trailers(trailers),
        };
        assert_eq!(answer(response).await, Ok(expected), "{method}");
    }
}

#[tokio::test]
async fn an_answer_of_headers_alone_stays_one() {
    let scratch = scratch();
    let mut upstream = Upstream::listen(scratch.path());
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
            headers: trailers_only,
            data: Vec::new(),
            ending: Ending::NoTrailers,
        };
        assert_eq!(answer(response).await, Ok(expected), "{method}");
    }
}

#[tokio::test]
async fn a_request_that_its_client_resets_is_reset_upstream_and_never_ended() {
    let scratch = scratch();
    let mut upstream = Upstream::listen(scratch.path());
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

#[tokio::test]
async fn a_reset_by_the_upstream_is_the_status_that_it_is_without_primed() {
    let scratch = scratch();
    let mut upstream = Upstream::listen(scratch.path());
    let primed = Primed::start(scratch.path(), &upstream.address());
    let directly = connect(&upstream.socket.clone()).await;
    let through_primed = connect(&primed.socket()).await;
    // One message without a field.
    let message = Bytes::from_static(b"\0\0\0\0\0");
    for reason in [
        Reason::CANCEL,
        Reason::REFUSED_STREAM,
        Reason::ENHANCE_YOUR_CALM,
        Reason::INTERNAL_ERROR,
    ] {
        for (method, headers_first) in [METHOD, OBSERVED[0], OBSERVED[1]]
            .into_iter()
            .flat_map(|method| [(method, false), (method, true)])
        {
            let mut statuses = Vec::new();
            for client in [&directly, &through_primed] {
                let (response, mut body) = begin(client, method, HeaderMap::new()).await;
                body.send_data(message.clone(), true).unwrap();
                let (_request, mut respond) = upstream.call().await;
                if headers_first {
                    let mut body = respond.send_response(Response::new(()), false).unwrap();
                    body.send_data(message.clone(), false).unwrap();
                    let mut response = in_time(response).await.unwrap();
                    let first = in_time(response.body_mut().data()).await.unwrap();
                    assert_eq!(first.unwrap(), message);
                    body.send_reset(reason);
                    statuses.push(grpc_status(&Ok(answer_of(response).await)));
                } else {
                    respond.send_reset(reason);
                    statuses.push(grpc_status(&answer(response).await));
                }
            }
            assert_eq!(
                statuses[1], statuses[0],
                "{method}: {reason}, after the headers: {headers_first}; left through primed"
            );
        }
    }
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
