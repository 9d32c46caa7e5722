//! The results of action parents name their subactions, and that is all that changes. Upstream and
//! client are bare HTTP/2 here, which hide nothing; what was executed on whose behalf is told to
//! the engine's table by the test.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Response};
use primed::backend::remote::Remote;
use primed::backend::upstream::{Routes, Upstream as WayUpstream};
use primed::cas::Digest;
use primed::config::{BudgetLimits, Mode, Patience};
use primed::grpc::{Framed, framed, split_message};
use primed::http2::connection::Connection;
use primed::proxy::{Capabilities, Client, Joining, Proxy};
use primed::reapi::google::longrunning::{Operation, operation};
use primed::reapi::{
    ActionResult, ExecuteRequest, ExecuteResponse, GetActionResultRequest, OutputFile,
    WaitExecutionRequest,
};
use primed::speculation::Engine;
use primed::speculation::engine::{EngineParts, engine};
use primed::speculation::flights::{FlightKey, Flights, Urgency};
use primed::speculation::journal::store::JournalStore;
use primed::speculation::records::store::Store;
use primed::task;
use primed::workspace::peer::{Peer, PeerOrigin};
use prost::Message;
use tempfile::TempDir;
use tokio::net::UnixListener;

use crate::http2::{Ending, Upstream, answer_of, begin, connect, fields, headers, in_time, read};
use crate::support::scratch;

const LOOKUP: &str = "/build.bazel.remote.execution.v2.ActionCache/GetActionResult";
const EXECUTE: &str = "/build.bazel.remote.execution.v2.Execution/Execute";
const WAIT: &str = "/build.bazel.remote.execution.v2.Execution/WaitExecution";
const CAPABILITIES: &str = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities";

/// Field 1023, a varint: nobody knows it.
const UNKNOWN: [u8; 3] = [0xf8, 0x3f, 7];

/// An upstream, a proxy before it in this process, and a client.
struct Stage {
    upstream: Upstream,
    client: SendRequest<Bytes>,
    engine: Arc<Engine>,
    _scratch: TempDir,
}

/// What the engine does.
#[derive(PartialEq)]
enum EngineIs {
    Running,
    Stuck,
}

impl Stage {
    async fn set(engine_is: EngineIs) -> Self {
        let scratch = scratch();
        let upstream = Upstream::listen(scratch.path()).await;
        let address = upstream.address().parse().unwrap();
        let capabilities = Arc::new(Capabilities::load(scratch.path(), &address, None));
        let patience = Patience {
            connect: Duration::from_secs(20),
            keep_alive: Duration::from_secs(60),
        };
        let routes = Arc::new(Routes::plain(address, patience));
        let (handle, requests, runner) = engine(EngineParts {
            mode: Mode::Full,
            backend: Arc::new(Remote::new(WayUpstream::new(routes.clone()))),
            flights: Flights::new(1),
            store: Arc::new(Store::in_memory()),
            journals: Arc::new(JournalStore::in_memory()),
            share: false,
            budgets: BudgetLimits::default(),
            watch: false,
        });
        task::spawn("engine", async move {
            match engine_is {
                EngineIs::Running => runner.run().await,
                EngineIs::Stuck => {
                    let _kept = (runner, requests);
                    std::future::pending().await
                }
            }
        });
        let proxy = Arc::new(Proxy {
            upstream: WayUpstream::new(routes),
            capabilities,
            engine: Some(handle.clone()),
            joining: Joining::new(None),
        });
        let socket = scratch.path().join("primed.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        task::spawn("proxy", async move {
            let (stream, _) = listener.accept().await.unwrap();
            let origin = PeerOrigin::Local { pid: None, uid: 0 };
            let client = Client::new(Arc::new(Peer::new(origin)));
            let mut connection = Connection::server(stream, 100);
            let serve = |request| proxy.serve(&client, request);
            poll_fn(|cx| connection.poll(cx, serve)).await
        });
        Stage {
            upstream,
            client: connect(&socket).await,
            engine: handle,
            _scratch: scratch,
        }
    }

    /// Begins a call about `key`, and waits until it has come upstream.
    async fn call(
        &mut self,
        method: &str,
        key: &FlightKey,
    ) -> (ResponseFuture, SendResponse<Bytes>) {
        if method == WAIT {
            self.engine.name_operation(name_of(key), key);
        }
        let (response, mut request) = begin(&self.client, method, HeaderMap::new()).await;
        request.send_data(request_about(method, key), true).unwrap();
        loop {
            let (request, mut respond) = self.upstream.call().await;
            if request.uri().path() == method {
                return (response, respond);
            }
            // The engine's own, who wants to know what action that is.
            respond.send_reset(h2::Reason::CANCEL);
        }
    }

    /// What the client is told if the upstream answers a call about `key` with `data`, split at
    /// `cuts`.
    async fn told(
        &mut self,
        method: &str,
        key: &FlightKey,
        head: HeaderMap,
        data: &[u8],
        cuts: &[usize],
    ) -> (HeaderMap, Vec<u8>) {
        let (response, mut respond) = self.call(method, key).await;
        let mut sending = respond.send_response(with(head), false).unwrap();
        let mut sent = 0;
        for cut in cuts.iter().copied().chain([data.len()]) {
            send(&mut sending, &data[sent..cut]);
            sent = cut;
            // Frames that leave together may be read together.
            tokio::task::yield_now().await;
        }
        sending.send_trailers(trailers()).unwrap();
        let response = in_time(response).await.unwrap();
        let head = response.headers().clone();
        let answer = answer_of(response).await;
        assert_eq!(answer.ending, Ending::Trailers(fields(&trailers())));
        (head, answer.data)
    }
}

fn request_about(method: &str, key: &FlightKey) -> Bytes {
    let (instance_name, action_digest) = (key.instance.to_string(), Some(key.action.to_proto()));
    framed(&match method {
        LOOKUP => GetActionResultRequest {
            instance_name,
            action_digest,
            ..GetActionResultRequest::default()
        }
        .encode_to_vec(),
        WAIT => WaitExecutionRequest { name: name_of(key) }.encode_to_vec(),
        _ => ExecuteRequest {
            instance_name,
            action_digest,
            ..ExecuteRequest::default()
        }
        .encode_to_vec(),
    })
}

/// What the upstream calls the execution of `key`.
fn name_of(key: &FlightKey) -> String {
    format!("operations/{}", key.action)
}

fn key(name: &str) -> FlightKey {
    FlightKey {
        instance: "main".into(),
        action: Digest::of(name.as_bytes()),
    }
}

fn digests(count: usize) -> Vec<Digest> {
    let numbers = 0..count;
    numbers
        .map(|number| Digest::of(&number.to_be_bytes()))
        .collect()
}

fn with(headers: HeaderMap) -> Response<()> {
    let mut head = Response::new(());
    *head.headers_mut() = headers;
    head
}

fn head() -> HeaderMap {
    headers(&[
        ("content-type", b"application/grpc"),
        ("some-bin", b"AAEC/w=="),
    ])
}

fn trailers() -> HeaderMap {
    headers(&[
        ("grpc-status", b"0"),
        ("grpc-status-details-bin", b"AAEC/w"),
    ])
}

fn send(to: &mut SendStream<Bytes>, data: &[u8]) {
    to.send_data(Bytes::copy_from_slice(data), false).unwrap();
}

/// An `ActionResult` with a field that nobody knows, before or behind all others.
fn result(stdout: usize) -> Vec<u8> {
    let result = ActionResult {
        output_files: vec![OutputFile {
            path: "out".to_owned(),
            ..OutputFile::default()
        }],
        exit_code: 3,
        stdout_raw: vec![b'x'; stdout].into(),
        ..ActionResult::default()
    };
    [&UNKNOWN[..], &result.encode_to_vec(), &UNKNOWN].concat()
}

/// An `Operation` that runs.
fn running() -> Vec<u8> {
    let operation = Operation {
        name: "operations/1".to_owned(),
        ..Operation::default()
    };
    [&operation.encode_to_vec()[..], &UNKNOWN].concat()
}

/// An `Operation` that is done, with `result`.
fn done(result: &[u8]) -> Vec<u8> {
    let mut value = ExecuteResponse {
        message: "a word".to_owned(),
        ..ExecuteResponse::default()
    }
    .encode_to_vec();
    prost::encoding::bytes::encode(1, &result.to_vec(), &mut value);
    let operation = Operation {
        name: "operations/1".to_owned(),
        metadata: None,
        done: true,
        result: Some(operation::Result::Response(prost_types::Any {
            type_url: "type.googleapis.com/build.bazel.remote.execution.v2.ExecuteResponse".into(),
            value,
        })),
    };
    [&UNKNOWN[..], &operation.encode_to_vec(), &UNKNOWN].concat()
}

/// `result` with subactions.
fn filled(result: &[u8], digests: &[Digest]) -> Vec<u8> {
    let subactions = ActionResult {
        subactions: digests.iter().map(|digest| digest.to_proto()).collect(),
        ..ActionResult::default()
    };
    [result, &subactions.encode_to_vec()].concat()
}

/// The messages of a body, encoded. None is compressed.
fn messages(data: &[u8]) -> Vec<Bytes> {
    let mut data = Bytes::copy_from_slice(data);
    let mut messages = Vec::new();
    while !data.is_empty() {
        match split_message(&mut data) {
            Some(Framed::Plain(message)) => messages.push(message),
            _ => panic!("no whole message: {data:?}"),
        }
    }
    messages
}

#[tokio::test]
async fn an_execution_that_turns_out_to_be_a_parents_ends_with_its_subactions() {
    let mut stage = Stage::set(EngineIs::Running).await;
    let parent = key("parent");
    let (response, mut respond) = stage.call(EXECUTE, &parent).await;
    let mut sending = respond.send_response(with(head()), false).unwrap();
    let stage_of_it = framed(&running());
    // Not all of the second one: whatever has come passes at once.
    send(
        &mut sending,
        &[&stage_of_it[..], &stage_of_it[..7]].concat(),
    );
    let mut response = in_time(response).await.unwrap();
    assert_eq!(fields(response.headers()), fields(&head()));
    let first = next(response.body_mut(), stage_of_it.len() + 7).await;
    assert_eq!(first, [&stage_of_it[..], &stage_of_it[..7]].concat());

    let open = stage.engine.subactions().begin(parent.clone());
    send(&mut sending, &stage_of_it[7..]);
    let second = next(response.body_mut(), stage_of_it.len() - 7).await;
    assert_eq!(second, stage_of_it[7..]);
    send(&mut sending, &stage_of_it);
    let third = next(response.body_mut(), stage_of_it.len()).await;
    assert_eq!(third, stage_of_it, "passes before there is a result");

    let subactions = digests(3);
    stage
        .engine
        .subactions()
        .set(parent.clone(), subactions.clone());
    let last = framed(&done(&result(100)));
    let (one, other) = last.split_at(last.len() / 2);
    send(&mut sending, one);
    send(&mut sending, other);
    sending.send_trailers(trailers()).unwrap();
    let (data, ending) = read(response.into_body()).await;
    assert_eq!(messages(&data), [done(&filled(&result(100), &subactions))]);
    assert_eq!(ending, Ending::Trailers(fields(&trailers())));

    drop(open);
    let answer = framed(&result(100));
    let (_, data) = stage.told(LOOKUP, &parent, head(), &answer, &[]).await;
    assert_eq!(messages(&data), [filled(&result(100), &subactions)]);
}

/// The next `size` bytes of a body.
async fn next(body: &mut RecvStream, size: usize) -> Vec<u8> {
    let mut data = Vec::new();
    while data.len() < size {
        let chunk = in_time(body.data()).await.unwrap().unwrap();
        body.flow_control().release_capacity(chunk.len()).unwrap();
        data.extend(chunk);
    }
    data
}

#[tokio::test]
async fn an_answer_is_completed_however_it_is_split() {
    let mut stage = Stage::set(EngineIs::Running).await;
    let (parent, subactions) = (key("parent"), digests(2));
    stage
        .engine
        .subactions()
        .set(parent.clone(), subactions.clone());
    let (short, long) = (result(0), result(100_000));
    let execution = [
        framed(&running()),
        framed(&[]),
        framed(&done(&short)),
        framed(&running()),
    ];
    let execution = execution.concat();
    let expected = [
        running(),
        Vec::new(),
        done(&filled(&short, &subactions)),
        running(),
    ];
    for cut in 1..execution.len() {
        let cuts = [cut, (cut + 4).min(execution.len())];
        let (_, data) = stage
            .told(EXECUTE, &parent, head(), &execution, &cuts)
            .await;
        assert_eq!(messages(&data), expected, "cut at {cut}");
    }
    let lookup = framed(&long);
    for cut in [1, 4, 5, 6, 50_000, lookup.len() - 1] {
        let (_, data) = stage.told(LOOKUP, &parent, head(), &lookup, &[cut]).await;
        assert_eq!(
            messages(&data),
            [filled(&long, &subactions)],
            "cut at {cut}"
        );
    }
}

#[tokio::test]
async fn an_answer_that_becomes_longer_does_not_say_how_long_it_was() {
    let mut stage = Stage::set(EngineIs::Running).await;
    let (parent, subactions) = (key("parent"), digests(1));
    stage
        .engine
        .subactions()
        .set(parent.clone(), subactions.clone());
    for (method, answer, expected) in [
        (LOOKUP, result(9), filled(&result(9), &subactions)),
        (
            EXECUTE,
            done(&result(9)),
            done(&filled(&result(9), &subactions)),
        ),
    ] {
        let answer = framed(&answer);
        let mut sized = head();
        sized.insert("content-length", answer.len().into());
        let (head_of_it, data) = stage.told(method, &parent, sized, &answer, &[]).await;
        assert_eq!(messages(&data), [expected]);
        assert_eq!(fields(&head_of_it), fields(&head()), "the length is gone");
    }
}

#[tokio::test]
async fn what_cannot_be_completed_passes_byte_for_byte() {
    let mut stage = Stage::set(EngineIs::Running).await;
    let parent = key("parent");
    let subactions = stage.engine.subactions();
    subactions.set(parent.clone(), digests(2));
    subactions.set(key("childless"), digests(0));
    subactions.set(key("many"), digests(100_000));
    let _open = subactions.begin(key("unknown yet"));
    let has_them = filled(&result(5), &digests(1));
    let compressed = |message: &[u8]| {
        let mut framed = framed(message).to_vec();
        framed[0] = 1;
        framed
    };
    let plain = |message: &[u8]| framed(message).to_vec();
    for (what, key, method, answer) in [
        ("another's", key("other"), LOOKUP, plain(&result(5))),
        ("another's", key("other"), EXECUTE, plain(&done(&result(5)))),
        ("childless", key("childless"), LOOKUP, plain(&result(5))),
        (
            "childless",
            key("childless"),
            EXECUTE,
            plain(&done(&result(5))),
        ),
        (
            "never told",
            key("unknown yet"),
            EXECUTE,
            plain(&done(&result(5))),
        ),
        ("too many", key("many"), LOOKUP, plain(&result(5))),
        ("too many", key("many"), EXECUTE, plain(&done(&result(5)))),
        ("full", parent.clone(), LOOKUP, plain(&has_them)),
        ("full", parent.clone(), EXECUTE, plain(&done(&has_them))),
        ("compressed", parent.clone(), LOOKUP, compressed(&result(5))),
        (
            "compressed",
            parent.clone(),
            EXECUTE,
            compressed(&done(&result(5))),
        ),
        ("long", parent.clone(), LOOKUP, plain(&result(5 << 20))),
        (
            "long",
            parent.clone(),
            EXECUTE,
            plain(&done(&result(5 << 20))),
        ),
        ("malformed", parent.clone(), LOOKUP, plain(b"\xff")),
        ("malformed", parent.clone(), EXECUTE, plain(b"\xff")),
        (
            "cut off",
            parent.clone(),
            LOOKUP,
            b"\0\0\0\0\x09\xff\xff\xff".to_vec(),
        ),
        (
            "cut off",
            parent.clone(),
            EXECUTE,
            b"\0\0\0\0\x09\xff\xff\xff".to_vec(),
        ),
        ("no prefix", parent.clone(), LOOKUP, b"\0\0".to_vec()),
        ("nothing", parent.clone(), EXECUTE, Vec::new()),
    ] {
        // Twice, for what follows is not to be left alone for it.
        let twice = [&answer[..], &answer].concat();
        let cuts = [answer.len() / 2, answer.len()];
        let methods: &[&str] = match method {
            EXECUTE => &[EXECUTE, WAIT],
            _ => &[method],
        };
        for method in methods {
            let (_, data) = stage.told(method, &key, head(), &twice, &cuts).await;
            assert!(data == twice, "{what}, by {method}");
        }
    }
    let mut sized = head();
    let answer = plain(&done(&result(5)));
    sized.insert("content-length", answer.len().into());
    let other = key("with a length");
    let (head_of_it, data) = stage
        .told(EXECUTE, &other, sized.clone(), &answer, &[])
        .await;
    assert_eq!((fields(&head_of_it), data), (fields(&sized), answer));
}

#[tokio::test]
async fn behind_what_cannot_be_completed_the_rest_is() {
    let mut stage = Stage::set(EngineIs::Running).await;
    let (parent, subactions) = (key("parent"), digests(1));
    stage
        .engine
        .subactions()
        .set(parent.clone(), subactions.clone());
    let mut odd = framed(&running()).to_vec();
    odd[0] = 1;
    let long = framed(&vec![0; 5 << 20]);
    let last = framed(&done(&result(5)));
    let expected = framed(&done(&filled(&result(5), &subactions)));
    for before in [&odd[..], &long[..]] {
        let answer = [before, &last].concat();
        let cuts = [3, before.len() - 1, before.len() + 2];
        let (_, data) = stage.told(EXECUTE, &parent, head(), &answer, &cuts).await;
        assert!(data == [before, &expected].concat());
    }
}

#[tokio::test]
async fn a_client_that_goes_on_waiting_by_name_is_told_the_subactions() {
    let mut stage = Stage::set(EngineIs::Running).await;
    let (parent, subactions) = (key("parent"), digests(2));
    let last = framed(&done(&result(5)));
    let (response, mut respond) = stage.call(EXECUTE, &parent).await;
    let mut sending = respond.send_response(with(head()), false).unwrap();
    let named = framed(&running());
    // The name is known however it comes.
    send(&mut sending, &named[..9]);
    let mut response = in_time(response).await.unwrap();
    next(response.body_mut(), 9).await;
    send(&mut sending, &named[9..]);
    next(response.body_mut(), named.len() - 9).await;
    sending.send_reset(Reason::CANCEL);
    read(response.into_body()).await;

    stage
        .engine
        .subactions()
        .set(parent.clone(), subactions.clone());
    for (name, expected) in [
        ("operations/1", done(&filled(&result(5), &subactions))),
        ("operations/2", done(&result(5))),
    ] {
        let (response, mut request) = begin(&stage.client, WAIT, HeaderMap::new()).await;
        let name = name.to_owned();
        let asked = framed(&WaitExecutionRequest { name }.encode_to_vec());
        request.send_data(asked.clone(), true).unwrap();
        let (mut request, mut respond) = loop {
            let (request, respond) = stage.upstream.call().await;
            if request.uri().path() == WAIT {
                break (request, respond);
            }
        };
        assert_eq!(next(request.body_mut(), asked.len()).await, asked);
        let mut sending = respond.send_response(with(head()), false).unwrap();
        send(&mut sending, &[&named[..], &last].concat());
        sending.send_trailers(trailers()).unwrap();
        let response = in_time(response).await.unwrap();
        assert_eq!(fields(response.headers()), fields(&head()));
        let answer = answer_of(response).await;
        assert_eq!(messages(&answer.data), [running(), expected]);
        assert_eq!(answer.ending, Ending::Trailers(fields(&trailers())));
    }
}

#[tokio::test]
async fn a_result_waits_only_so_long_for_an_engine_that_is_stuck() {
    let mut stage = Stage::set(EngineIs::Stuck).await;
    let parent = key("parent");
    let _open = stage.engine.subactions().begin(parent.clone());
    stage.engine.subactions().set(parent.clone(), digests(1));
    let answer = framed(&done(&result(5)));
    let (_, data) = stage.told(EXECUTE, &parent, head(), &answer, &[]).await;
    // With what is known by then.
    assert_eq!(messages(&data), [done(&filled(&result(5), &digests(1)))]);
}

#[tokio::test]
async fn a_parents_execution_that_breaks_off_does_so_for_the_client() {
    let mut stage = Stage::set(EngineIs::Running).await;
    let parent = key("parent");
    let _open = stage.engine.subactions().begin(parent.clone());
    let (response, mut respond) = stage.call(EXECUTE, &parent).await;
    let mut sending = respond.send_response(with(head()), false).unwrap();
    send(&mut sending, &framed(&running()));
    let response = in_time(response).await.unwrap();
    sending.send_reset(Reason::INTERNAL_ERROR);
    let (_, ending) = read(response.into_body()).await;
    assert_eq!(ending, Ending::Reset(Some(Reason::INTERNAL_ERROR)));
}

#[tokio::test]
async fn a_client_that_joins_a_parent_in_flight_is_told_its_subactions() {
    let mut stage = Stage::set(EngineIs::Running).await;
    let (parent, subactions) = (key("parent"), digests(2));
    let (owner, _landings) = tokio::sync::mpsc::channel(1);
    let announced = stage.engine.flights().announce(parent.clone(), &owner);
    announced
        .unwrap()
        .submit(Urgency::new(Duration::from_secs(1), 0));
    // The lane asks which priorities there are.
    let (request, mut respond) = stage.upstream.call().await;
    assert_eq!(request.uri().path(), CAPABILITIES);
    let refusal = headers(&[
        ("content-type", b"application/grpc"),
        ("grpc-status", b"12"),
    ]);
    respond.send_response(with(refusal), true).unwrap();
    let (request, mut respond) = stage.upstream.call().await;
    assert_eq!(request.uri().path(), EXECUTE);
    let mut sending = respond.send_response(with(head()), false).unwrap();
    send(&mut sending, &framed(&running()));

    let (response, mut request) = begin(&stage.client, EXECUTE, HeaderMap::new()).await;
    request
        .send_data(request_about(EXECUTE, &parent), true)
        .unwrap();
    let mut response = in_time(response).await.unwrap();
    let first = next(response.body_mut(), framed(&running()).len()).await;
    assert_eq!(messages(&first), [running()]);
    stage.engine.subactions().set(parent, subactions.clone());
    let succeeded = ActionResult::default().encode_to_vec();
    send(&mut sending, &framed(&done(&succeeded)));
    sending.send_trailers(trailers()).unwrap();
    let (data, _) = read(response.into_body()).await;
    assert_eq!(messages(&data), [done(&filled(&succeeded, &subactions))]);
}
