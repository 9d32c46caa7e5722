//! casd's own protocol beside REAPI, which recc speaks with `RECC_USE_LOCALCAS`, passes primed.

use std::path::PathBuf;

use hyper_util::rt::TokioIo;
use primed::cas::Digest;
use primed::reapi::build::buildgrid::CaptureFilesRequest;
use primed::reapi::build::buildgrid::local_content_addressable_storage_client::LocalContentAddressableStorageClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::support::{Casd, Primed, scratch};

fn channel(socket: PathBuf) -> Channel {
    Endpoint::from_static("http://localhost").connect_with_connector_lazy(tower::service_fn(
        move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        },
    ))
}

#[tokio::test]
async fn files_are_captured_through_primed() {
    let scratch = scratch();
    let casd = Casd::start(scratch.path(), 1);
    let primed = Primed::start(scratch.path(), &casd.address());
    let file = scratch.path().join("a.h");
    std::fs::write(&file, "#define A 1\n").unwrap();
    let request = CaptureFilesRequest {
        path: vec![
            file.display().to_string(),
            scratch.path().join("absent.h").display().to_string(),
        ],
        ..CaptureFilesRequest::default()
    };
    let mut client = LocalContentAddressableStorageClient::new(channel(primed.socket()));
    let answer = client.capture_files(request).await.unwrap().into_inner();
    let [captured, absent] = answer.responses.as_slice() else {
        panic!("two answers: {answer:?}");
    };
    let digest = captured.digest.as_ref().map(Digest::try_from);
    assert_eq!(digest, Some(Ok(Digest::of(b"#define A 1\n"))));
    assert_ne!(absent.status.as_ref().map_or(0, |status| status.code), 0);
}
