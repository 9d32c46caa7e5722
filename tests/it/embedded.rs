//! The embedded backend as a part of primed: its settings, its directory, its limits, and kills at any
//! moment. What it says to clients is `storage_protocol`'s.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

mod crashes;
mod execution;
mod many_actions;
mod memory;

use std::path::Path;

use primed::cas::Digest;
use primed::reapi::build::bazel::remote::execution::v2::*;
use primed::reapi::content_addressable_storage_client::ContentAddressableStorageClient;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::client::connect;
use crate::support::{Primed, scratch};

fn cas(primed: &Primed) -> ContentAddressableStorageClient<Channel> {
    ContentAddressableStorageClient::new(connect(&primed.socket()))
        .max_decoding_message_size(64 << 20)
}

/// Uploads one blob by itself.
async fn keep(
    cas: &mut ContentAddressableStorageClient<Channel>,
    content: Vec<u8>,
) -> Result<Digest, Status> {
    let digest = Digest::of(&content);
    let request = BatchUpdateBlobsRequest {
        requests: vec![batch_update_blobs_request::Request {
            digest: Some(digest.to_proto()),
            data: content.into(),
            ..batch_update_blobs_request::Request::default()
        }],
        ..BatchUpdateBlobsRequest::default()
    };
    let answer = cas.batch_update_blobs(request).await?.into_inner();
    let status = answer
        .responses
        .into_iter()
        .next()
        .and_then(|one| one.status);
    match status {
        Some(status) if status.code != 0 => Err(Status::new(status.code.into(), status.message)),
        _ => Ok(digest),
    }
}

async fn missing(
    cas: &mut ContentAddressableStorageClient<Channel>,
    digests: &[Digest],
) -> Vec<primed::reapi::Digest> {
    let request = FindMissingBlobsRequest {
        blob_digests: digests.iter().map(|digest| digest.to_proto()).collect(),
        ..FindMissingBlobsRequest::default()
    };
    let answer = cas.find_missing_blobs(request).await.unwrap();
    answer.into_inner().missing_blob_digests
}

/// What `primed serve` says as it ends.
fn refused(directory: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let output = Primed::command()
        .arg("serve")
        .args(arguments)
        .env("XDG_RUNTIME_DIR", directory)
        .env("XDG_STATE_HOME", directory)
        .env("XDG_CACHE_HOME", directory)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), said)
}

#[tokio::test]
async fn primed_needs_no_upstream_and_keeps_its_cache_over_a_restart() {
    let scratch = scratch();
    let mut command = Primed::command();
    command.args(["serve"]);
    for variable in ["XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CACHE_HOME"] {
        command.env(variable, scratch.path());
    }
    let mut digest = None;
    for round in 0..2 {
        let log = scratch.path().join("log");
        let mut daemon = crate::support::Daemon::start(&mut command, log);
        let socket = scratch.path().join("primed/remote-apis.sock");
        crate::support::wait_until("primed listens", || {
            assert!(daemon.is_running(), "{}", daemon.log());
            crate::support::connects(&socket)
        });
        let mut cas = ContentAddressableStorageClient::new(connect(&socket));
        match digest {
            None => digest = Some(keep(&mut cas, b"kept".to_vec()).await.unwrap()),
            Some(digest) => assert_eq!(missing(&mut cas, &[digest]).await, []),
        }
        let status = Primed::command()
            .args(["status", "--json"])
            .env("XDG_RUNTIME_DIR", scratch.path())
            .output()
            .unwrap();
        let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
        assert_eq!(status["upstream"]["address"], "embedded", "{status}");
        assert_eq!(
            status["upstream"]["state"], "connected",
            "round {round}: {status}"
        );
        daemon.signal(rustix::process::Signal::TERM);
        assert_eq!(daemon.exit_code(), Some(0), "{}", daemon.log());
    }
}

#[test]
fn a_cache_directory_that_is_in_use_is_refused_with_what_to_do() {
    let scratch = scratch();
    let primed = Primed::embedded(scratch.path(), &[]);
    let cache = scratch.path().join("cache");
    let (code, said) = refused(scratch.path(), &["--cache-dir", cache.to_str().unwrap()]);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("in use by another primed") && said.contains("--cache-dir"),
        "{said}"
    );
    drop(primed);
    std::fs::write(scratch.path().join("file"), "").unwrap();
    let file = scratch.path().join("file/cache");
    let (code, said) = refused(scratch.path(), &["--cache-dir", file.to_str().unwrap()]);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("file/cache") && said.contains("cannot be used"),
        "{said}"
    );
}

#[test]
fn settings_that_the_embedded_backend_has_no_use_for_are_refused() {
    let scratch = scratch();
    for (arguments, flag) in [
        (&["--upstream-header", "a: b"][..], "--upstream-header"),
        (&["--cas-upstream", "unix:/a"], "--cas-upstream"),
        (&["--upstream-ca", "/a"], "--upstream-ca"),
        (
            &["--upstream", "unix:/a", "--cache-size", "1GiB"],
            "--cache-size",
        ),
        (
            &["--upstream", "unix:/a", "--cache-dir", "/a"],
            "--cache-dir",
        ),
        (&["--upstream", "unix:/a", "--jobs", "2"], "--jobs"),
        (
            &["--upstream", "unix:/a", "--cas-upstream", "embedded"],
            "--cas-upstream",
        ),
        (&["--listen", "embedded"], "--listen"),
        (&["--admin", "embedded"], "--admin"),
        (&["--cache-size", "much"], "--cache-size"),
    ] {
        let (code, said) = refused(scratch.path(), arguments);
        assert_eq!(code, Some(64), "{arguments:?}: {said}");
        assert!(said.contains(flag), "{arguments:?}: {said}");
    }
}

#[tokio::test]
async fn a_cache_that_is_full_says_so_and_primed_goes_on() {
    let scratch = scratch();
    let primed = Primed::embedded(scratch.path(), &["--cache-size", "4MiB"]);
    let mut cas = cas(&primed);
    let mut kept = Vec::new();
    let refused = loop {
        assert!(kept.len() < 100, "the limit does not hold");
        let content = vec![kept.len() as u8; 256 * 1024];
        match keep(&mut cas, content).await {
            Ok(digest) => kept.push(digest),
            Err(status) => break status,
        }
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("--cache-size"), "{refused}");
    assert!(kept.len() >= 14, "{}", kept.len());
    assert_eq!(
        missing(&mut cas, &kept).await,
        [],
        "all of it was used just now"
    );
    let large = keep(&mut cas, vec![1; 3_600_000]).await.unwrap_err();
    assert_eq!(large.code(), Code::ResourceExhausted);
}
