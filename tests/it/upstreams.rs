//! What primed does to calls on their way upstream: headers, credentials, instance names, and
//! services at addresses of their own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use primed::cas::Digest;
use primed::grpc::framed;
use primed::reapi::google::bytestream::byte_stream_client::ByteStreamClient;
use primed::reapi::google::bytestream::{ReadRequest, WriteRequest};
use primed::reapi::{FindMissingBlobsRequest, GetActionResultRequest};
use prost::Message;
use serde_json::{Value, json};

use crate::backend::FakeBackend;
use crate::client::{Build, Recipe, Way, connect};
use crate::grpcio::{AnyServer, Grpcio, Session, hex};
use crate::http2::{Ending, answer_of, begin, connect as connect_http2, headers, in_time};
use crate::project::Project;
use crate::relay::{Faults, Relay};
use crate::support::{Casd, Counts, Primed, scratch, wait_until};

const ECHO: &str = "/some.Service/Echo";
/// Translation units of a C project.
const SOME: usize = 8;

/// A server without a schema, and primed before it.
struct Stage {
    server: AnyServer,
    primed: Primed,
    session: Session,
    control: Session,
}

impl Stage {
    fn set(directory: &Path, arguments: &[&str]) -> Self {
        let server = AnyServer::start(directory, Grpcio::New);
        let primed = Primed::start_with(directory, server.address(), arguments);
        Stage {
            session: Session::start(Grpcio::New, &primed.address()),
            control: Session::start(Grpcio::New, server.target()),
            server,
            primed,
        }
    }

    /// The metadata that the server saw of a call that the client made with `metadata`.
    fn seen(&mut self, metadata: &[(&str, &str)]) -> Value {
        let mut metadata = metadata.to_vec();
        metadata.push(("call-id", "this"));
        let options = json!({ "metadata": metadata });
        let ended = self.session.call_with(ECHO, b"hello", options);
        assert_eq!(ended.code, "OK", "{ended:?}\n{}", self.primed.daemon.log());
        self.control.record("this")["metadata"].clone()
    }
}

/// Writes a credential helper that notes each run in the file `runs` beside it.
fn helper(directory: &Path, script: &str) -> PathBuf {
    let path = directory.join("helper");
    let runs = directory.join("runs");
    let script = format!("#!/bin/sh\ncat >> {}\n{script}\n", runs.display());
    // Written by another process: were this one to write it while a test beside this one forks,
    // the program could not be run ("text file busy").
    let write = "printf %s \"$0\" > \"$1\" && chmod +x \"$1\"";
    let mut shell = Command::new("sh");
    let written = shell.args(["-c", write, &script]).arg(&path).status();
    assert!(written.unwrap().success());
    path
}

#[test]
fn headers_are_added_in_place_of_the_clients_own() {
    let scratch = scratch();
    let arguments = [
        "--upstream-header",
        "authorization: Bearer own",
        "--upstream-header",
        "X-Many=1\nx-many=2",
        "--upstream-header",
        "x-blob-bin: AAH/",
    ];
    let mut stage = Stage::set(scratch.path(), &arguments);
    let seen = stage.seen(&[
        ("authorization", "Bearer client"),
        ("x-many", "client"),
        ("x-other", "stays"),
    ]);
    assert_eq!(seen["authorization"], json!(["Bearer own"]), "{seen}");
    assert_eq!(seen["x-many"], json!(["1", "2"]));
    assert_eq!(seen["x-blob-bin"], json!(["0001ff"]));
    assert_eq!(seen["x-other"], json!(["stays"]));
    let log = stage.primed.daemon.log();
    assert!(!log.contains("Bearer"), "{log}");
}

#[test]
fn clients_do_not_wait_for_each_other_where_the_upstream_takes_few_calls_on_a_connection() {
    for grpcio in [Grpcio::Old, Grpcio::New] {
        let scratch = scratch();
        let server = AnyServer::start_narrow(scratch.path(), grpcio, 4);
        let primed = Primed::start(scratch.path(), server.address());
        for target in [server.target(), &primed.address()] {
            // Those with much metadata have connections of their own, all of them.
            for metadata in ["0", "7200"] {
                // None of them ends before all are answered.
                let ended = Grpcio::New.run("crowd.py", &[target, "60", metadata]);
                let ended: Value = serde_json::from_str(&ended).unwrap();
                assert_eq!(ended, json!({"OK": 60}), "{target}, {metadata}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_wait_for_each_other_where_the_upstream_takes_no_further_connection() {
    let scratch = scratch();
    let server = AnyServer::start_narrow(scratch.path(), Grpcio::New, 1);
    let primed = Primed::start(scratch.path(), server.address());
    let client = connect_http2(&primed.socket()).await;
    let fields = || headers(&[("content-type", b"application/grpc"), ("te", b"trailers")]);
    let (first, mut request) = begin(&client, "/some.Service/Greet", fields()).await;
    let mut first = in_time(first).await.unwrap();
    in_time(first.body_mut().data()).await.unwrap().unwrap();

    std::fs::remove_file(server.socket()).unwrap();
    let (second, mut message) = begin(&client, ECHO, fields()).await;
    message
        .send_data(framed(&Bytes::from("hello")), true)
        .unwrap();
    wait_until("primed has tried to connect", || {
        primed
            .daemon
            .log()
            .contains("the upstream is not available")
    });
    request.send_data(Bytes::new(), true).unwrap();
    for response in [first, in_time(second).await.unwrap()] {
        let Ending::Trailers(trailers) = answer_of(response).await.ending else {
            panic!("{}", primed.daemon.log());
        };
        let (_, status) = trailers
            .iter()
            .find(|(name, _)| name == "grpc-status")
            .unwrap();
        assert_eq!(status, "0");
    }
}

#[test]
fn a_token_is_read_again_when_its_file_changes_and_kept_when_it_vanishes() {
    let scratch = scratch();
    let token = scratch.path().join("token");
    std::fs::write(&token, "one\n").unwrap();
    let arguments = ["--upstream-token-file", token.to_str().unwrap()];
    let mut stage = Stage::set(scratch.path(), &arguments);
    let client = [("authorization", "Bearer client")];
    assert_eq!(stage.seen(&client)["authorization"], json!(["Bearer one"]));

    let fresh = scratch.path().join("fresh");
    std::fs::write(&fresh, "two\n").unwrap();
    std::fs::rename(&fresh, &token).unwrap();
    wait_until("the new token is used", || {
        stage.seen(&[])["authorization"] == json!(["Bearer two"])
    });
    std::fs::remove_file(&token).unwrap();
    wait_until("primed misses the file", || {
        assert_eq!(stage.seen(&[])["authorization"], json!(["Bearer two"]));
        stage.primed.daemon.log().contains("no new upstream token")
    });
    assert_eq!(stage.seen(&[])["authorization"], json!(["Bearer two"]));
    let log = stage.primed.daemon.log();
    assert_eq!(log.matches("no new upstream token").count(), 1, "{log}");
}

#[test]
fn a_credential_helper_is_run_once_for_all_calls_and_asked_about_the_upstream() {
    let scratch = scratch();
    let answer = r#"{"headers":{"Authorization":["Bearer helped"],"x-two":["1","2"]}}"#;
    let helper = helper(scratch.path(), &format!("echo '{answer}'"));
    let arguments = ["--credential-helper", helper.to_str().unwrap()];
    let mut stage = Stage::set(scratch.path(), &arguments);
    let mut another = Session::start(Grpcio::Old, &stage.primed.address());
    for _ in 0..3 {
        let seen = stage.seen(&[("authorization", "Bearer client")]);
        assert_eq!(seen["authorization"], json!(["Bearer helped"]), "{seen}");
        assert_eq!(seen["x-two"], json!(["1", "2"]));
        assert_eq!(another.call(ECHO, b"").code, "OK");
    }
    let asked = std::fs::read_to_string(scratch.path().join("runs")).unwrap();
    let question = json!({ "uri": stage.server.address() });
    assert_eq!(asked, question.to_string(), "one run");
}

#[test]
fn what_a_credential_helper_says_when_it_fails_reaches_the_client() {
    let scratch = scratch();
    let helper = helper(scratch.path(), "echo 'run: cluster login' >&2; exit 1");
    let arguments = ["--credential-helper", helper.to_str().unwrap()];
    let mut stage = Stage::set(scratch.path(), &arguments);
    for _ in 0..3 {
        let ended = stage.session.call(ECHO, b"hello");
        assert_eq!(ended.code, "UNAUTHENTICATED", "{ended:?}");
        for words in ["run: cluster login", helper.to_str().unwrap()] {
            assert!(ended.details.contains(words), "{ended:?}");
        }
        assert_eq!(ended.connected, 1, "the client kept its connection");
    }
}

#[tokio::test]
async fn what_primed_calls_itself_is_authenticated_too() {
    let scratch = scratch();
    let backend = FakeBackend::start(scratch.path());
    *backend.world.authorization.lock() = "Bearer own".to_owned();
    let token = scratch.path().join("token");
    std::fs::write(&token, "own").unwrap();
    let arguments = ["--upstream-token-file", token.to_str().unwrap()];
    let primed = Primed::start_with(scratch.path(), &backend.address(), &arguments);
    let workspace = scratch.path().join("workspace");
    std::fs::create_dir(&workspace).unwrap();
    let recipe = Recipe {
        command: "compile",
        inputs: &["a.c"],
        output: "a.o",
        ..Recipe::default()
    };
    for (content, way) in [("one", Way::Executed), ("two", Way::Found)] {
        std::fs::write(workspace.join("a.c"), content).unwrap();
        let build = Build::begin(&primed.socket(), &workspace);
        let action = build.action(recipe);
        assert_eq!(build.run(&action).await.0, way, "{}", primed.daemon.log());
        build.end();
        primed.wait();
    }
    assert_eq!(backend.world.speculative().len(), 1);
}

#[test]
fn instance_names_are_replaced_in_requests_of_any_size() {
    let scratch = scratch();
    let arguments = ["--map-instance", "=main,dev/a=", "--map-instance", "*=rest"];
    let mut stage = Stage::set(scratch.path(), &arguments);
    let find_missing = |instance: &str, blobs: usize| {
        let digest = Digest::of(b"x").to_proto();
        let message = FindMissingBlobsRequest {
            instance_name: instance.to_owned(),
            blob_digests: vec![digest; blobs],
            ..FindMissingBlobsRequest::default()
        };
        message.encode_to_vec()
    };
    let read = |name: &str| {
        let message = ReadRequest {
            resource_name: name.to_owned(),
            read_offset: 3,
            ..ReadRequest::default()
        };
        message.encode_to_vec()
    };
    let lookup = |instance: &str| {
        let message = GetActionResultRequest {
            instance_name: instance.to_owned(),
            action_digest: Some(Digest::of(b"x").to_proto()),
            ..GetActionResultRequest::default()
        };
        message.encode_to_vec()
    };
    const REAPI: &str = "/build.bazel.remote.execution.v2";
    let cas = format!("{REAPI}.ContentAddressableStorage/Echo");
    let cache = format!("{REAPI}.ActionCache/Echo");
    let stream = "/google.bytestream.ByteStream/Echo";
    for (method, sent, received) in [
        (cas.as_str(), find_missing("", 1), find_missing("main", 1)),
        (
            &cas,
            find_missing("dev/a", 20_000),
            find_missing("", 20_000),
        ),
        (
            &cas,
            find_missing("x", 20_000),
            find_missing("rest", 20_000),
        ),
        (&cas, Vec::new(), find_missing("main", 0)),
        (&cache, lookup("rest"), lookup("rest")),
        (&cache, lookup(""), lookup("main")),
        (stream, read("blobs/H/1"), read("main/blobs/H/1")),
        (stream, read("dev/a/blobs/H/1"), read("blobs/H/1")),
        (stream, read("a/b/c/blobs/H/1"), read("rest/blobs/H/1")),
        (stream, read("odd"), read("odd")),
        (ECHO, lookup("x"), lookup("x")),
    ] {
        let ended = stage.session.call(method, &sent);
        assert_eq!(ended.code, "OK", "{method}: {ended:?}");
        assert!(ended.messages == [hex(&received)], "{method}");
    }
    let options = json!({ "gzip": true });
    let large = find_missing("x", 100);
    let refused = stage.session.call_with(&cas, &large, options.clone());
    assert_eq!(refused.code, "UNIMPLEMENTED", "{refused:?}");
    assert!(refused.details.contains("--map-instance"), "{refused:?}");
    let other = stage.session.call_with(ECHO, &large, options);
    assert_eq!(other.code, "OK", "what has no instance may be compressed");
}

#[test]
fn recc_builds_and_is_primed_on_an_instance_that_casd_calls_otherwise() {
    let scratch = scratch();
    let casd = Casd::start_with(scratch.path(), 4, &["--local-server-instance=main"]);
    let arguments = ["--map-instance", "dev=main,=main"];
    let primed = Primed::start_with(scratch.path(), &casd.address(), &arguments);
    let project =
        Project::of_units(scratch.path(), &primed.address(), SOME).with("RECC_INSTANCE", "dev");
    let counts = || {
        primed.wait();
        Counts::newest(&primed.status())
    };
    project.build();
    assert_eq!(counts().missed, SOME as u64 + 2);
    project.write("include/common.h", "#define COMMON 2\n");
    project.build();
    let primed_build = counts();
    let log = primed.daemon.log();
    assert_eq!(primed_build.missed, 0, "{primed_build:?}\n{log}");
    assert!(
        primed_build.hit + primed_build.joined > 0,
        "{primed_build:?}"
    );

    // The unnamed instance is the same one to casd.
    let project = project.with("RECC_INSTANCE", "");
    project.rebuild();
    assert_eq!(counts().missed, 0, "{}", primed.daemon.log());
}

#[tokio::test]
async fn a_blob_that_is_written_in_parts_arrives_under_the_other_instance() {
    let scratch = scratch();
    let casd = Casd::start_with(scratch.path(), 1, &["--local-server-instance=main"]);
    let arguments = ["--map-instance", "a/b=main"];
    let primed = Primed::start_with(scratch.path(), &casd.address(), &arguments);
    let blob: Vec<u8> = (0..3_000_000u32)
        .map(|number| (number % 251) as u8)
        .collect();
    let digest = Digest::of(&blob);
    write(&primed.socket(), "a/b/", &blob).await;

    let casd_socket = scratch.path().join("casd.sock");
    for (server, name) in [
        (primed.socket(), format!("a/b/blobs/{digest}")),
        (casd_socket, format!("main/blobs/{digest}")),
    ] {
        assert!(read(&server, name).await == blob);
    }
}

/// Writes a blob in parts, under an instance with its slash.
async fn write(server: &Path, instance: &str, blob: &[u8]) {
    const PART: usize = 100_000;
    let id = uuid::Uuid::nil();
    let name = format!("{instance}uploads/{id}/blobs/{}", Digest::of(blob));
    let parts: Vec<WriteRequest> = blob
        .chunks(PART)
        .enumerate()
        .map(|(index, data)| WriteRequest {
            resource_name: match index {
                0 => name.clone(),
                _ => String::new(),
            },
            write_offset: (index * PART) as i64,
            finish_write: index * PART + data.len() == blob.len(),
            data: data.to_vec().into(),
        })
        .collect();
    let mut client = ByteStreamClient::new(connect(server));
    let written = client.write(tokio_stream::iter(parts)).await.unwrap();
    assert_eq!(written.into_inner().committed_size, blob.len() as i64);
}

async fn read(server: &Path, resource_name: String) -> Vec<u8> {
    let request = ReadRequest {
        resource_name,
        ..ReadRequest::default()
    };
    let mut client = ByteStreamClient::new(connect(server));
    let mut parts = client.read(request).await.unwrap().into_inner();
    let mut read = Vec::new();
    while let Some(part) = parts.message().await.unwrap() {
        read.extend_from_slice(&part.data);
    }
    read
}

#[tokio::test]
async fn a_far_upstream_may_send_more_at_a_time_than_a_near_one() {
    const NEAR: usize = primed::http2::STREAM_WINDOW as usize;
    let scratch = scratch();
    let casd = Casd::start(scratch.path(), 1);
    let far = || Faults {
        lag: Some(Duration::from_millis(15)),
        ..Faults::default()
    };
    let blob: Vec<u8> = (0..48_000_000u32).map(|number| number as u8).collect();
    let blob_name = format!("blobs/{}", Digest::of(&blob));

    let to_casd = Relay::start(casd.socket(), far());
    let primed = Primed::start(scratch.path(), to_casd.address());
    write(casd.socket(), "", &blob).await;
    assert!(read(&primed.socket(), blob_name.clone()).await == blob);
    let most = to_casd.most_under_way();
    assert!(most > 2 * NEAR, "never more than {most} bytes");
}

#[test]
fn each_service_goes_to_its_own_upstream() {
    let scratch = scratch();
    let names = ["rest", "execution", "cache", "cas"];
    let servers: HashMap<&str, AnyServer> = names
        .into_iter()
        .map(|name| {
            let directory = scratch.path().join(name);
            std::fs::create_dir(&directory).unwrap();
            (name, AnyServer::start(&directory, Grpcio::New))
        })
        .collect();
    let address = |name: &str| servers[name].address();
    let primed = Primed::start_with(
        scratch.path(),
        address("rest"),
        &[
            "--execution-upstream",
            address("execution"),
            "--action-cache-upstream",
            address("cache"),
            "--cas-upstream",
            address("cas"),
        ],
    );
    let mut session = Session::start(Grpcio::New, &primed.address());
    for (service, name) in [
        ("build.bazel.remote.execution.v2.Execution", "execution"),
        ("google.longrunning.Operations", "execution"),
        ("build.bazel.remote.execution.v2.ActionCache", "cache"),
        (
            "build.bazel.remote.execution.v2.ContentAddressableStorage",
            "cas",
        ),
        ("google.bytestream.ByteStream", "cas"),
        ("build.buildgrid.LocalContentAddressableStorage", "cas"),
        ("build.bazel.remote.execution.v2.Capabilities", "rest"),
        ("build.bazel.remote.asset.v1.Fetch", "rest"),
        ("some.Service", "rest"),
    ] {
        let options = json!({ "metadata": [["call-id", service]] });
        let method = format!("/{service}/Echo");
        let ended = session.call_with(&method, b"hello", options);
        assert_eq!(ended.code, "OK", "{service}: {ended:?}");
        let mut control = Session::start(Grpcio::New, servers[name].target());
        assert_eq!(control.record(service)["method"], method.as_str());
    }
}

#[test]
fn recc_builds_and_is_primed_where_the_cas_is_another_casd() {
    let scratch = scratch();
    let directory = |name: &str| {
        let directory = scratch.path().join(name);
        std::fs::create_dir(&directory).unwrap();
        directory
    };
    let executing = Casd::start(&directory("execution"), 4);
    let remote = format!("--cas-remote={}", executing.address());
    let storing = Casd::start_with(&directory("cas"), 1, &[&remote]);
    let primed = Primed::start_with(
        scratch.path(),
        &executing.address(),
        &["--cas-upstream", &storing.address()],
    );
    let project = Project::of_units(scratch.path(), &primed.address(), SOME);
    project.build();
    primed.wait();
    project.write("include/common.h", "#define COMMON 2\n");
    project.build();
    primed.wait();
    let counts = Counts::newest(&primed.status());
    let log = primed.daemon.log();
    assert_eq!(counts.missed, 0, "{counts:?}\n{log}");
    assert!(counts.hit + counts.joined > 0, "{counts:?}");
    let stored = files(&scratch.path().join("cas/casd/cas/objects"));
    assert!(stored > SOME, "{stored} blobs passed the other casd");
}

/// How many files there are below `directory`.
fn files(directory: &Path) -> usize {
    let entries = std::fs::read_dir(directory).unwrap();
    let below = entries.map(|entry| match entry.unwrap().path() {
        path if path.is_dir() => files(&path),
        _ => 1,
    });
    below.sum()
}
