//! What breaks before primed: clients that vanish, and clients that do not read. Their calls are
//! cancelled upstream, what they were sent is not kept, and nobody else notices.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use primed::backend::Backend;
use primed::backend::remote::Remote;
use primed::backend::upstream::{Routes, Upstream};
use primed::cas::Digest;
use primed::config::Patience;
use primed::reapi::google::bytestream::ReadRequest;
use prost::Message;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use crate::frames::{
    DATA, END_HEADERS, END_STREAM, Frame, HEADERS, INITIAL_WINDOW_SIZE, LARGEST, PREFACE, message,
    request,
};
use crate::grpcio::{AnyServer, Grpcio, Session, hex};
use crate::relay::Faults;
use crate::stage::Stage;
use crate::support::{Casd, Daemon, PATIENCE, Primed, scratch, wait_until};

/// A compiler that finds out what a file includes at once, and compiles only while its gate is
/// open.
pub struct GatedCompiler {
    directory: PathBuf,
}

impl GatedCompiler {
    pub fn install(directory: &Path) -> Self {
        let directory = directory.join("bin");
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join("closed"), "").unwrap();
        let script = format!(
            "#!/bin/sh\n\
             case \" $* \" in *\" -M\"*) ;; *\" -c \"*)\n\
             \techo >{0}/compiling.$$\n\
             \twhile [ -e {0}/closed ]; do sleep 0.02; done;;\n\
             esac\n\
             PATH=${{PATH#{0}:}} exec cc \"$@\"\n",
            directory.display()
        );
        let compiler = directory.join("cc");
        std::fs::write(&compiler, script).unwrap();
        std::fs::set_permissions(&compiler, std::fs::Permissions::from_mode(0o755)).unwrap();
        GatedCompiler { directory }
    }

    pub fn path(&self) -> String {
        let path = std::env::var("PATH").unwrap();
        format!("{}:{path}", self.directory.display())
    }

    pub fn compiling(&self) -> usize {
        let names = std::fs::read_dir(&self.directory).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name());
        names
            .filter(|name| name.to_string_lossy().starts_with("compiling"))
            .count()
    }

    pub fn open(&self) {
        std::fs::remove_file(self.directory.join("closed")).unwrap();
    }
}

/// A build whose first two compiles are being executed, and go on until the gate is opened.
fn executing() -> (Stage, GatedCompiler, Daemon) {
    let mut stage = Stage::wired(Faults::default(), &[]);
    let compiler = GatedCompiler::install(stage.path());
    stage.project = stage.project.with("PATH", &compiler.path());
    let log = stage.path().join("make.log");
    let build = Daemon::start(stage.project.command(&[]).process_group(0), log);
    wait_until("two compiles are executed", || compiler.compiling() == 2);
    assert_eq!(stage.relay().resets(), 0);
    (stage, compiler, build)
}

/// The commands that `make` runs.
fn children(make: &Daemon) -> Vec<Pid> {
    let pid = make.pid();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let pids = children.split_whitespace().map(|pid| pid.parse().unwrap());
    pids.map(|pid| Pid::from_raw(pid).unwrap()).collect()
}

#[test]
fn the_call_of_a_recc_that_is_killed_is_cancelled_upstream() {
    let (mut stage, compiler, mut build) = executing();
    let reccs = children(&build);
    assert_eq!(reccs.len(), 2);
    kill_process(reccs[0], Signal::KILL).unwrap();
    wait_until("its call is cancelled", || stage.relay().resets() == 1);
    compiler.open();
    assert_eq!(build.exit_code(), Some(2), "{}", build.log());
    assert_eq!(stage.relay().resets(), 1, "the other one ended well");
    stage.finish();
}

#[test]
fn the_calls_of_a_build_that_is_killed_are_cancelled_upstream_and_the_next_build_is_whole() {
    let (mut stage, compiler, mut build) = executing();
    let group = Pid::from_raw(build.pid() as i32).unwrap();
    kill_process_group(group, Signal::KILL).unwrap();
    build.exit_code();
    wait_until("their calls are cancelled", || stage.relay().resets() == 2);
    compiler.open();
    stage.finish();
}

#[test]
fn a_server_sees_that_a_client_was_killed() {
    let scratch = scratch();
    let server = AnyServer::start(scratch.path(), Grpcio::New);
    let primed = Primed::start(scratch.path(), server.address());
    let mut control = Session::start(Grpcio::New, server.target());
    for client in [Grpcio::Old, Grpcio::New] {
        let mut session = Session::start(client, &primed.address());
        session.begin(&json!({
            "method": "/some.Service/Linger",
            "requests": [hex(b"1")],
            "metadata": [["call-id", "vanishing"]],
        }));
        assert_eq!(session.message(), hex(b"still here"));
        drop(session);
        let record = control.record("vanishing");
        assert_eq!(record["client_left"], true, "{record}");
    }
}

const STREAMS: usize = 24;
/// The stream's window, and as much again for what is on its way from one side to the other.
const MEMORY_OF_A_STREAM: u64 = 2_306_867;
/// For what has nothing to do with the number of streams.
const MEMORY_BESIDE: u64 = 16 * 1024 * 1024;
const BLOB: usize = 16 * 1024 * 1024;

#[tokio::test]
async fn downloads_that_nobody_reads_take_bounded_memory_and_others_are_served() {
    unread_downloads(LARGEST).await;
}

#[tokio::test]
async fn downloads_that_are_given_no_window_take_bounded_memory_and_others_are_served() {
    unread_downloads(0).await;
}

async fn unread_downloads(window: u32) {
    let scratch = scratch();
    let casd = Casd::start(scratch.path(), 1);
    let primed = Primed::start(scratch.path(), &casd.address());
    let blob: Vec<u8> = (0..BLOB as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let digest = Digest::of(&blob);
    let patience = Patience {
        connect: Duration::ZERO,
        keep_alive: PATIENCE,
    };
    let routes = Routes::plain(primed.address().parse().unwrap(), patience);
    let other = Remote::new(Upstream::new(Arc::new(routes)));
    other
        .write("", digest, Bytes::from(blob.clone()))
        .await
        .unwrap();
    assert!(other.read("", digest).await.unwrap() == blob);
    let before = primed.daemon.peak_memory();

    let mut client = UnixStream::connect(primed.socket()).await.unwrap();
    let read = ReadRequest {
        resource_name: format!("blobs/{digest}"),
        ..ReadRequest::default()
    };
    let read = message(&read.encode_to_vec());
    let block = request("/google.bytestream.ByteStream/Read");
    let mut said = PREFACE.to_vec();
    said.extend(Frame::settings(&[(INITIAL_WINDOW_SIZE, window)]).bytes());
    said.extend(Frame::window_update(0, LARGEST - 65_535).bytes());
    for stream in (1..).step_by(2).take(STREAMS) {
        said.extend(Frame::new(HEADERS, END_HEADERS, stream, &*block).bytes());
        said.extend(Frame::new(DATA, END_STREAM, stream, &*read).bytes());
    }
    client.write_all(&said).await.unwrap();

    // Time enough for the unread ones to take all that they can get.
    for _ in 0..6 {
        assert!(other.read("", digest).await.unwrap() == blob);
    }
    let growth = primed.daemon.peak_memory() - before;
    let bound = STREAMS as u64 * MEMORY_OF_A_STREAM + MEMORY_BESIDE;
    assert!(growth < bound, "{growth} bytes for {STREAMS} streams");
    drop(client);
    assert!(other.read("", digest).await.unwrap() == blob);
}
