//! Conformance by foreign stacks: through primed, a client and a server of C-core, old and new,
//! see of each other what they see without it, over Unix sockets and TCP.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{Request, Response, StatusCode};
use serde_json::Value;
use tempfile::TempDir;

use crate::certificates::Credentials;
use crate::grpcio::{AnyServer, Ended, Grpcio, Session, Transport, hex, target};
use crate::http2::{Ending, Fields, Upstream, fields, headers, read};
use crate::support::{Primed, connects, scratch};

/// Who talks to whom, and how. Between them the pairs have each generation on each side of each
/// other one, and each transport before and behind primed.
struct Pair {
    client: Grpcio,
    server: Grpcio,
    /// Between the client and primed.
    front: Transport,
    /// Between primed and the server; also between the client and the server without primed.
    back: Transport,
    mode: &'static str,
}

const NEW_AND_NEW: Pair = Pair {
    client: Grpcio::New,
    server: Grpcio::New,
    front: Transport::Unix,
    back: Transport::Unix,
    mode: "full",
};
const OLD_AND_OLD: Pair = Pair {
    client: Grpcio::Old,
    server: Grpcio::Old,
    front: Transport::Tcp,
    back: Transport::Tcp,
    mode: "full",
};
const NEW_AND_OLD: Pair = Pair {
    client: Grpcio::New,
    server: Grpcio::Old,
    front: Transport::Tcp,
    back: Transport::Unix,
    mode: "none",
};
const OLD_AND_NEW: Pair = Pair {
    client: Grpcio::Old,
    server: Grpcio::New,
    front: Transport::Unix,
    back: Transport::Tcp,
    mode: "prime-only",
};

#[test]
fn a_new_client_and_a_new_server_see_of_each_other_what_they_see_without_primed() {
    covers_what_it_should(&NEW_AND_NEW.same_through_primed("calls.py", &[]));
}

#[test]
fn an_old_client_and_an_old_server_see_of_each_other_what_they_see_without_primed() {
    covers_what_it_should(&OLD_AND_OLD.same_through_primed("calls.py", &[]));
}

#[test]
fn a_new_client_and_an_old_server_see_of_each_other_what_they_see_without_primed() {
    covers_what_it_should(&NEW_AND_OLD.same_through_primed("calls.py", &[]));
}

#[test]
fn an_old_client_and_a_new_server_see_of_each_other_what_they_see_without_primed() {
    covers_what_it_should(&OLD_AND_NEW.same_through_primed("calls.py", &[]));
}

#[test]
fn a_thousand_random_calls_of_a_new_client_to_a_new_server_are_the_same_through_primed() {
    NEW_AND_NEW.random_calls();
}

#[test]
fn a_thousand_random_calls_of_an_old_client_to_an_old_server_are_the_same_through_primed() {
    OLD_AND_OLD.random_calls();
}

#[test]
fn a_thousand_random_calls_of_a_new_client_to_an_old_server_are_the_same_through_primed() {
    NEW_AND_OLD.random_calls();
}

#[test]
fn a_thousand_random_calls_of_an_old_client_to_a_new_server_are_the_same_through_primed() {
    OLD_AND_NEW.random_calls();
}

/// A server with primed before it.
struct Stage {
    server: AnyServer,
    primed: Primed,
    _scratch: TempDir,
}

impl Pair {
    fn set(&self) -> Stage {
        let scratch = scratch();
        let server = AnyServer::start_on(self.back, scratch.path(), self.server);
        let listen = format!("unix:{}/primed.sock,127.0.0.1:0", scratch.path().display());
        let arguments = ["--listen", &listen, "--mode", self.mode];
        let primed = Primed::start_with(scratch.path(), server.address(), &arguments);
        Stage {
            server,
            primed,
            _scratch: scratch,
        }
    }

    /// Has `script` make its calls without primed and through it. Returns what was seen without.
    fn same_through_primed(&self, script: &str, arguments: &[&str]) -> BTreeMap<String, Value> {
        let Stage { server, primed, .. } = &self.set();
        let front = match self.front {
            Transport::Unix => target(&primed.socket()),
            Transport::Tcp => format!("127.0.0.1:{}", primed.port()),
        };
        let calls = (script, arguments);
        let clear = Credentials::default();
        let see = |target| self.client.transcript(&clear, calls, target, server);
        let direct = see(server.target());
        assert_eq!(primed.status()["upstream"]["state"], "idle");
        let proxied = see(&front);
        assert_eq!(primed.status()["upstream"]["state"], "connected");
        assert_same(&direct, &proxied);
        let errors = direct
            .values()
            .filter_map(|seen| seen.pointer("/server/error"));
        assert_eq!(errors.collect::<Vec<_>>(), [&Value::Null; 0]);
        direct
    }

    /// `PRIMED_TEST_SEED` repeats the calls of a run that failed.
    fn random_calls(&self) {
        let seed = std::env::var("PRIMED_TEST_SEED")
            .unwrap_or_else(|_| RandomState::new().hash_one(()).to_string());
        println!("PRIMED_TEST_SEED={seed}");
        let calls = self.same_through_primed("random_calls.py", &[&seed, "1000"]);
        assert_eq!(calls.len(), 1000);
    }
}

/// Two transcripts must be the same.
pub fn assert_same(direct: &BTreeMap<String, Value>, proxied: &BTreeMap<String, Value>) {
    let differing = differences(direct, proxied);
    assert!(differing.is_empty(), "{differing}");
}

/// What is not the same in two transcripts, for people. Only the first few: one fault can spoil
/// all calls.
fn differences(direct: &BTreeMap<String, Value>, proxied: &BTreeMap<String, Value>) -> String {
    let calls = direct.keys().chain(proxied.keys());
    let calls: std::collections::BTreeSet<&String> = calls.collect();
    let differing = calls.into_iter().filter_map(|call| {
        let [direct, proxied] =
            [direct, proxied].map(|seen| seen.get(call).unwrap_or(&Value::Null));
        if direct == proxied {
            return None;
        }
        let fields = direct.as_object().into_iter().flatten();
        let fields = fields.filter(|(name, value)| proxied.get(name) != Some(value));
        let shown = fields.map(|(name, value)| {
            format!(
                "  {name}\n    directly {value}\n    through primed {}\n",
                proxied[name]
            )
        });
        Some(format!("{call}\n{}", shown.collect::<String>()))
    });
    differing.take(5).collect()
}

/// Transcripts of calls that all failed alike would be equal too.
fn covers_what_it_should(transcript: &BTreeMap<String, Value>) {
    let case = |name: &str| {
        let seen = transcript.get(name);
        seen.unwrap_or_else(|| panic!("there is no case {name}"))
    };
    let code = |name: &str| case(name)["code"].as_str().unwrap().to_owned();
    for (name, seen) in transcript {
        let deadline = &seen["deadline"];
        assert!(deadline.is_null() || deadline == true, "{name}: {seen}");
    }
    for kind in [
        "unary_unary",
        "stream_unary",
        "unary_stream",
        "stream_stream",
    ] {
        let plain = case(kind);
        assert_eq!(plain["code"], "StatusCode.OK", "{plain}");
        assert_eq!(plain["messages"][0], "hello");
        for place in [&plain["initial"], &plain["trailing"]] {
            assert_eq!(place["repeated"][1], "two", "{plain}");
            assert_eq!(place["under_score"][0], "_", "{plain}");
            assert_eq!(place["blob-bin"][0].as_str().map(str::len), Some(512));
            assert_eq!(place["blob-bin"][1], "", "{plain}");
        }
        let agent = |name: &str| {
            let agent = &case(name)["server"]["metadata"]["user-agent"][0];
            agent.as_str().unwrap().to_owned()
        };
        assert!(agent(kind).starts_with("grpc-python/"));
        assert!(agent(&format!("{kind}.odd_channel")).starts_with("conformance/1.0 (a; b) "));

        let late = case(&format!("{kind}.deadline"));
        assert_eq!(late["code"], "StatusCode.DEADLINE_EXCEEDED", "{late}");
        assert_eq!(late["server"]["client_left"], true, "{late}");

        let unknown = case(&format!("{kind}.unknown"));
        assert_eq!(unknown["code"], "StatusCode.UNIMPLEMENTED", "{unknown}");

        let ends = (0..17).map(|number| code(&format!("{kind}.ends_{number}")));
        assert_eq!(ends.collect::<std::collections::BTreeSet<_>>().len(), 17);
        let failed = case(&format!("{kind}.ends_5"));
        assert_eq!(failed["code"], "StatusCode.NOT_FOUND", "{failed}");
        assert!(
            failed["details"]
                .as_str()
                .is_some_and(|details| details.contains('失'))
        );
        assert!(failed["trailing"]["grpc-status-details-bin"].is_array());
        assert_eq!(
            code(&format!("{kind}.Abort")),
            "StatusCode.FAILED_PRECONDITION"
        );
        assert_eq!(code(&format!("{kind}.Cancel")), "StatusCode.CANCELLED");
        for way in ["Gzip", "Deflate"] {
            assert_eq!(code(&format!("{kind}.{way}")), "StatusCode.OK");
        }
    }
    for name in ["64_MiB", "64_MiB_in_streams"] {
        let huge = case(name)["messages"].as_array().unwrap();
        let huge = huge.iter().filter_map(Value::as_str);
        assert!(
            huge.max()
                .is_some_and(|huge| huge.starts_with("67108864 bytes ")),
            "{name}"
        );
    }
    for (start, expected) in [
        ("large_metadata.", "OK"),
        ("turns", "OK"),
        ("client_ends", "OK"),
        ("stream_unary.Ahead", "OK"),
        ("unary_stream.Ahead", "OK"),
        ("stream_stream.Ahead", "OK"),
        ("stream_unary.Enough", "OK"),
        ("stream_stream.Enough", "OK"),
        ("stream_unary.Refuse", "ALREADY_EXISTS"),
        ("stream_stream.Refuse", "ALREADY_EXISTS"),
        ("stream_unary.Nothing", "UNIMPLEMENTED"),
        ("cancel.", "CANCELLED"),
    ] {
        let mut names = transcript
            .keys()
            .filter(|name| name.starts_with(start))
            .peekable();
        assert!(names.peek().is_some(), "{start}");
        for name in names {
            assert_eq!(code(name), format!("StatusCode.{expected}"), "{name}");
            if start == "cancel." {
                assert_eq!(case(name)["server"]["client_left"], true, "{name}");
            }
        }
    }
}

#[test]
fn five_hundred_streams_on_one_connection_and_a_connection_for_each_call_work() {
    for pair in [NEW_AND_NEW, OLD_AND_OLD] {
        let Stage { primed, .. } = &pair.set();
        pair.client.run("many.py", &[&target(&primed.socket())]);
    }
}

#[test]
fn a_client_that_waits_for_ready_is_served_once_primed_is_there() {
    for client in [Grpcio::Old, Grpcio::New] {
        let scratch = scratch();
        let server = AnyServer::start(scratch.path(), Grpcio::New);
        let socket = scratch.path().join("primed.sock");
        assert!(!connects(&socket));
        let mut session = Session::start(client, &target(&socket));
        session.wait("/some.Service/Echo", b"hello");
        let _primed = Primed::start(scratch.path(), server.address());
        let ended = session.ended();
        assert_eq!(ended.code, "OK", "{ended:?}");
        assert_eq!(ended.messages, [hex(b"hello")]);
    }
}

/// All that an upstream is told of a call, less the deadline, which is the clock's.
#[derive(Debug, PartialEq)]
struct Received {
    method: String,
    headers: Fields,
    body: Vec<u8>,
    ending: Ending,
}

impl Received {
    async fn all_of(request: Request<RecvStream>) -> Self {
        let (parts, body) = request.into_parts();
        let mut headers = fields(&parts.headers);
        headers.retain(|(name, _)| name != "grpc-timeout");
        assert_eq!(headers.len() + 1, parts.headers.len());
        let (body, ending) = read(body).await;
        Received {
            method: format!("{} {}", parts.method, parts.uri.path()),
            headers,
            body,
            ending,
        }
    }
}

/// Has clients of C-core make a call each, without primed and through it, which `answer` answers.
/// Both must be told the same, and send the same. Returns how the calls ended.
async fn both_ways(answer: impl AsyncFn(&mut SendResponse<Bytes>)) -> Vec<Ended> {
    let scratch = scratch();
    let mut upstream = Upstream::listen(scratch.path()).await;
    let primed = Primed::start(scratch.path(), &upstream.address());
    let mut all = Vec::new();
    for client in [Grpcio::Old, Grpcio::New] {
        let mut seen = Vec::new();
        let directly = format!("127.0.0.1:{}", upstream.port);
        for target in [directly, target(&primed.socket())] {
            let called = primed::task::blocking("client", move || {
                let mut session = Session::start(client, &target);
                session.call("/some.Service/Odd%2F'method'", b"hello")
            });
            let answered = async {
                let (request, mut respond) = upstream.call().await;
                let received = Received::all_of(request).await;
                answer(&mut respond).await;
                received
            };
            let (ended, received) = tokio::join!(called, answered);
            seen.push((received, ended.unwrap()));
        }
        assert_eq!(seen[1], seen[0], "{client:?}: left through primed");
        all.push(seen.remove(0).1);
    }
    all
}

#[tokio::test]
async fn a_status_that_nobody_knows_is_what_the_client_makes_of_it_without_primed() {
    for ended in both_ways(async |respond| {
        let mut response = Response::new(());
        *response.headers_mut() = headers(&[
            ("content-type", b"application/grpc"),
            ("grpc-status", b"99"),
            ("grpc-message", b"%E2%9C%93 %zz %"),
        ]);
        respond.send_response(response, true).unwrap();
    })
    .await
    {
        assert_eq!(ended.code, "UNKNOWN", "{ended:?}");
    }
}

#[tokio::test]
async fn an_answer_that_is_no_grpc_is_what_the_client_makes_of_it_without_primed() {
    for ended in both_ways(async |respond| {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        *response.headers_mut() = headers(&[("content-type", b"text/plain")]);
        let mut body = respond.send_response(response, false).unwrap();
        body.send_data(Bytes::from_static(b"come again"), true)
            .unwrap();
    })
    .await
    {
        assert_eq!(ended.code, "UNAVAILABLE", "{ended:?}");
    }
}

#[tokio::test]
async fn a_reset_in_mid_stream_is_what_the_client_makes_of_it_without_primed() {
    for reason in [
        Reason::NO_ERROR,
        Reason::INTERNAL_ERROR,
        Reason::REFUSED_STREAM,
        Reason::CANCEL,
    ] {
        for ended in both_ways(async |respond| {
            let mut response = Response::new(());
            *response.headers_mut() = headers(&[("content-type", b"application/grpc")]);
            let mut body = respond.send_response(response, false).unwrap();
            body.send_reset(reason);
        })
        .await
        {
            assert_ne!(ended.code, "OK", "{reason:?}: {ended:?}");
        }
    }
}
