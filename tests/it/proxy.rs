//! Forwarding where something goes wrong, or comes and goes: malformed requests, an upstream that
//! is not there, a stop. That all else is the same through primed is shown in `conformance`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use prost::Message;
use rustix::process::Signal;

use primed::cas::Digest;
use primed::reapi::google::bytestream::ReadRequest;
use primed::reapi::{ExecuteRequest, GetActionResultRequest};

use crate::frames;
use crate::grpcio::{AnyServer, Ended, Grpcio, Session, hex, target};
use crate::support::{Casd, Primed, connects, scratch, tool, wait_until};

const GET_ACTION_RESULT: &str = "/build.bazel.remote.execution.v2.ActionCache/GetActionResult";
const EXECUTE: &str = "/build.bazel.remote.execution.v2.Execution/Execute";
const GET_CAPABILITIES: &str = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities";
const READ: &str = "/google.bytestream.ByteStream/Read";

/// The digest of a blob that nobody has.
const ABSENT: &str = "00000000000000000000000000000000000000000000000000000000deadbeef";

#[test]
fn sockets_whose_paths_need_percent_encoding_serve_old_and_new_clients() {
    let scratch = scratch();
    let directory = scratch.path().join("a %41+b:c=d@é&~(e)");
    std::fs::create_dir(&directory).unwrap();
    let server = AnyServer::start(&directory, Grpcio::New);
    let primed = Primed::start(&directory, server.address());
    for client in [Grpcio::Old, Grpcio::New] {
        let mut session = Session::start(client, &target(&primed.socket()));
        let ended = session.call("/some.Service/Echo", b"hello");
        assert_eq!(ended.code, "OK", "{client:?}: {ended:?}");
        assert_eq!(ended.messages, [hex(b"hello")]);
    }
}

#[test]
fn as_many_threads_as_it_is_told_to_use_carry_calls() {
    for threads in [1, 3] {
        let scratch = scratch();
        let server = AnyServer::start(scratch.path(), Grpcio::New);
        let arguments = ["--threads", &threads.to_string()];
        let primed = Primed::start_with(scratch.path(), server.address(), &arguments);
        // Each client's connection goes to the thread with the fewest.
        let mut clients = [(); 3].map(|()| Session::start(Grpcio::New, &primed.address()));
        for client in &mut clients {
            assert_eq!(client.call("/some.Service/Echo", b"hello").code, "OK");
        }
        let tasks = std::fs::read_dir(format!("/proc/{}/task", primed.daemon.pid())).unwrap();
        let names = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")));
        let proxies = names.filter(|name| name.as_ref().unwrap().starts_with("proxy-"));
        assert_eq!(proxies.count() + 1, threads, "one is the main thread");
    }
}

#[test]
fn threads_wait_for_their_turn_while_calls_are_made_beside_a_download() {
    let scratch = scratch();
    let casd = Casd::start(scratch.path(), 1);
    let primed = Primed::start_with(scratch.path(), &casd.address(), &["--threads", "2"]);
    let blob = scratch.path().join("blob");
    let mut random = File::open("/dev/urandom").unwrap().take(128 << 20);
    std::io::copy(&mut random, &mut File::create(&blob).unwrap()).unwrap();
    let digest = Digest::of(&std::fs::read(&blob).unwrap());
    let uploaded = Command::new(tool("casupload"))
        .arg(format!("--remote={}", casd.address()))
        .arg(&blob)
        .output()
        .unwrap();
    assert!(uploaded.status.success(), "{uploaded:?}");
    let mut clients = [(); 2].map(|()| Session::start(Grpcio::New, &primed.address()));
    let mut in_turn = BTreeSet::new();
    wait_until(
        "both wait for their turn (are tests run with niceness 0?)",
        || {
            let mut download = Command::new(tool("casdownload"))
                .arg(format!("--remote={}", primed.address()))
                .arg(format!("--file-digest={digest}"))
                .arg(format!(
                    "--destination-dir={}",
                    scratch.path().join("down").display()
                ))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let ended = loop {
                for client in &mut clients {
                    client.call("/some.Service/Echo", b"hello");
                }
                in_turn.extend(threads_in_turn(primed.daemon.pid()));
                if let Some(ended) = download.try_wait().unwrap() {
                    break ended;
                }
            };
            assert!(ended.success(), "{ended}");
            std::fs::remove_dir_all(scratch.path().join("down")).unwrap();
            // There are others: the engine's, and what these start.
            let shards = ["primed", "proxy-1"];
            shards.iter().all(|shard| in_turn.contains(*shard))
        },
    );
}

#[test]
fn a_thread_polls_for_calls_that_are_made_one_after_the_other_rather_than_sleep() {
    const CALLS: u64 = 100;
    let scratch = scratch();
    let casd = Casd::start(scratch.path(), 1);
    let start = |name: &str, microseconds| {
        let directory = scratch.path().join(name);
        std::fs::create_dir(&directory).unwrap();
        let arguments = ["--threads", "1", "--busy-poll", microseconds];
        Primed::start_with(&directory, &casd.address(), &arguments)
    };
    let polling = start("polling", "10000");
    let sleeping = start("sleeping", "0");
    let slept_in_calls = |primed: &Primed| {
        let mut client = Session::start(Grpcio::New, &primed.address());
        client.call(GET_CAPABILITIES, b"");
        let before = times_slept(primed.daemon.pid());
        for _ in 0..CALLS {
            assert_eq!(client.call(GET_CAPABILITIES, b"").code, "OK");
        }
        times_slept(primed.daemon.pid()) - before
    };
    assert!(slept_in_calls(&sleeping) >= CALLS);
    // Others may want its processor, and have it for a while.
    wait_until("it sleeps less often than it is called", || {
        slept_in_calls(&polling) < CALLS
    });
}

/// How often a process' first thread had to wait, for whatever.
fn times_slept(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/status")).unwrap();
    let mut lines = status.lines();
    let switches = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    switches.unwrap().trim().parse().unwrap()
}

/// The names of a process' threads that are `SCHED_BATCH`.
fn threads_in_turn(pid: u32) -> Vec<String> {
    const BATCH: &str = "3";
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let stats =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok());
    let in_turn = stats.filter_map(|stat| {
        let (name, fields) = stat.rsplit_once(')')?;
        // The policy is the 41st field, the name the second.
        let policy = fields.split_ascii_whitespace().nth(38)?;
        let (_, name) = name.split_once('(')?;
        (policy == BATCH).then(|| name.to_owned())
    });
    in_turn.collect()
}

/// A casd with primed before it, and a client of each. Returns what primed logged.
fn with_casd(claim: impl Fn(&mut dyn FnMut(&str, &[u8]) -> Ended)) -> String {
    let scratch = scratch();
    let casd = Casd::start(scratch.path(), 1);
    let mut primed = Primed::start(scratch.path(), &casd.address());
    for client in [Grpcio::Old, Grpcio::New] {
        let mut directly = Session::start(client, &casd.address());
        let mut through_primed = Session::start(client, &primed.address());
        claim(&mut |method, request| {
            let direct = directly.call(method, request);
            let proxied = through_primed.call(method, request);
            if method == EXECUTE {
                // The operation has a name of its own each time, always equally long.
                let unnamed = |ended: &Ended| {
                    let lengths = ended
                        .messages
                        .iter()
                        .map(|message| message.len().to_string());
                    Ended {
                        messages: lengths.collect(),
                        ..ended.clone()
                    }
                };
                assert_eq!(unnamed(&proxied), unnamed(&direct), "{method}");
            } else {
                assert_eq!(
                    proxied, direct,
                    "{method}: left through primed, right directly"
                );
            }
            direct
        });
    }
    assert!(primed.daemon.is_running(), "{}", primed.daemon.log());
    let log = primed.daemon.log();
    assert!(!log.contains("panic"), "{log}");
    log
}

#[test]
fn what_casd_answers_reaches_the_client_as_casd_said_it() {
    with_casd(|call| {
        let capabilities = call(GET_CAPABILITIES, b"");
        assert_eq!(capabilities.code, "OK");
        assert!(!capabilities.messages.is_empty());

        let unknown = call(
            "/build.bazel.remote.execution.v9.Future/Method",
            b"anything",
        );
        assert_eq!(unknown.code, "UNIMPLEMENTED");

        let miss = GetActionResultRequest {
            action_digest: Some(primed::reapi::Digest {
                hash: ABSENT.to_owned(),
                size_bytes: 7,
            }),
            ..Default::default()
        };
        assert_eq!(
            call(GET_ACTION_RESULT, &miss.encode_to_vec()).code,
            "NOT_FOUND"
        );

        let execute = ExecuteRequest {
            action_digest: miss.action_digest.clone(),
            ..Default::default()
        };
        let execute = execute.encode_to_vec();
        assert_eq!(
            call(EXECUTE, &execute).code,
            "OK",
            "the operation holds the error"
        );

        let read = ReadRequest {
            resource_name: format!("blobs/{ABSENT}/7"),
            ..Default::default()
        };
        assert_eq!(call(READ, &read.encode_to_vec()).code, "NOT_FOUND");
    });
}

#[test]
fn requests_that_are_no_protobuf_get_the_answer_that_casd_gives_them() {
    let log = with_casd(|call| {
        for method in [GET_ACTION_RESULT, EXECUTE] {
            // A field that is longer than the message; a wire type that does not exist; nothing.
            for request in [&b"\x12\x7fabc"[..], b"\xff\xff\xff", b""] {
                assert_ne!(call(method, request).code, "UNAVAILABLE");
            }
        }
    });
    let complaints = log.matches("a request is malformed").count();
    assert_eq!(complaints, 2, "one line for each client: {log}");
}

#[test]
fn an_upstream_that_is_not_there_yet_is_named_and_reached_once_it_is() {
    let scratch = scratch();
    let upstream = format!("unix:{}/server.sock", scratch.path().display());
    let primed = Primed::start(scratch.path(), &upstream);
    let mut session = Session::start(Grpcio::New, &primed.address());
    let refused = session.call("/some.Service/Echo", b"hello");
    assert_eq!(refused.code, "UNAVAILABLE", "{refused:?}");
    assert!(refused.details.contains(&upstream), "{refused:?}");
    assert_eq!(primed.status()["upstream"]["state"], "unavailable");

    let _server = AnyServer::start(scratch.path(), Grpcio::New);
    let served = session.call("/some.Service/Echo", b"hello");
    assert_eq!(served.code, "OK", "{served:?}");
    assert_eq!(served.connected, 1, "the client kept its connection");
    assert_eq!(primed.status()["upstream"]["state"], "connected");
}

#[test]
fn an_upstream_that_dies_in_mid_stream_is_unavailable_until_it_is_back() {
    let scratch = scratch();
    let mut server = AnyServer::start(scratch.path(), Grpcio::New);
    let primed = Primed::start(scratch.path(), server.address());
    let mut session = Session::start(Grpcio::New, &primed.address());
    session.hold("/some.Service/Greet");
    assert_eq!(session.message(), hex(b"welcome"));
    server.daemon.kill();
    let broken = session.ended();
    assert_eq!(broken.code, "UNAVAILABLE", "{broken:?}");
    assert_eq!(session.call("/some.Service/Echo", b"").code, "UNAVAILABLE");

    let _server = AnyServer::start(scratch.path(), Grpcio::New);
    let served = session.call("/some.Service/Echo", b"hello");
    assert_eq!(served.code, "OK", "{served:?}");
    assert_eq!(served.connected, 1, "the client kept its connection");
}

#[test]
fn calls_in_progress_end_in_order_when_primed_is_told_to_stop() {
    let scratch = scratch();
    let server = AnyServer::start(scratch.path(), Grpcio::New);
    let mut primed = Primed::start(scratch.path(), server.address());
    let mut idle = Session::start(Grpcio::Old, &primed.address());
    assert_eq!(idle.call("/some.Service/Echo", b"").code, "OK");
    let silent = UnixStream::connect(primed.socket()).unwrap();
    let greeted = greet(UnixStream::connect(primed.socket()).unwrap());
    let mut session = Session::start(Grpcio::New, &primed.address());
    session.hold("/some.Service/Greet");
    assert_eq!(session.message(), hex(b"welcome"));

    primed.daemon.signal(Signal::TERM);
    wait_until("new connections are refused", || {
        !connects(&primed.socket())
    });
    wait_until("the socket file is removed", || !primed.socket().exists());
    assert!(primed.daemon.is_running(), "a call is in progress");
    session.release();
    let ended = session.ended();
    assert_eq!(ended.code, "OK", "{ended:?}");

    assert_eq!(
        primed.daemon.exit_code(),
        Some(0),
        "{}",
        primed.daemon.log()
    );
    let log = primed.daemon.log();
    assert!(
        !log.contains("grace period"),
        "idle clients were waited for: {log}"
    );
    assert!(!scratch.path().join("admin.sock").exists());
    drop((silent, greeted));
}

/// Opens HTTP/2, and says nothing more.
fn greet(mut client: UnixStream) -> UnixStream {
    const SETTINGS: [u8; 9] = [0, 0, 0, frames::SETTINGS, 0, 0, 0, 0, 0];
    client.write_all(frames::PREFACE).unwrap();
    client.write_all(&SETTINGS).unwrap();
    loop {
        let mut header = [0; 9];
        client.read_exact(&mut header).unwrap();
        if header[3..5] == [frames::SETTINGS, frames::ACK] {
            return client;
        }
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
        client.read_exact(&mut vec![0; length as usize]).unwrap();
    }
}
