//! What the services share: digests in requests, work that may block, and statuses within answers.

use tonic::{Code, Status};

use crate::digest::{Digest, DigestFunction};
use crate::reapi::{self, google::rpc};
use crate::task;

/// The largest message that is taken in. Batches are kept far smaller, by `MAX_BATCH`.
pub(super) const MAX_MESSAGE: usize = 16 * 1024 * 1024;
/// What the blobs of one batch may come to, in bytes. With their digests they fit into 4 MiB, which
/// is what gRPC clients take unless told otherwise.
pub(super) const MAX_BATCH: u64 = 7 * 512 * 1024;

/// The digest function of a request, which it names, or else the length of its first hash tells.
pub(super) fn function(
    named: i32,
    first: Option<&reapi::Digest>,
) -> Result<DigestFunction, Status> {
    let function = match first {
        Some(first) => DigestFunction::of_request(named, first),
        None if named == 0 => Some(DigestFunction::default()),
        None => DigestFunction::from_proto(named),
    };
    function.ok_or_else(|| {
        let known = DigestFunction::ALL.map(|function| function.to_string());
        Status::invalid_argument(format!(
            "the digest function of the request is not supported, or the hash is not as long as \
             one of its; supported are {}",
            known.join(", ")
        ))
    })
}

/// A digest of a request.
pub(super) fn digest(
    function: DigestFunction,
    digest: Option<&reapi::Digest>,
) -> Result<Digest, Status> {
    let digest = function.read(digest);
    digest.map_err(|error| Status::invalid_argument(error.to_string()))
}

/// The digest that a request is about, and with it its function.
pub(super) fn only_digest(named: i32, of: Option<&reapi::Digest>) -> Result<Digest, Status> {
    let Some(of) = of else {
        return Err(Status::invalid_argument("the request has no digest"));
    };
    digest(function(named, Some(of))?, Some(of))
}

/// Does `work` on a thread that may block.
pub(super) async fn on_disk<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let done = task::blocking(name, work).await;
    done.unwrap_or_else(|| {
        Err(Status::unavailable(
            "primed is stopping, or failed in this call",
        ))
    })
}

/// A status within an answer.
pub(super) fn status_within(result: Result<(), Status>) -> Option<rpc::Status> {
    let status = result.err().unwrap_or_else(|| Status::new(Code::Ok, ""));
    Some(rpc::Status {
        code: status.code() as i32,
        message: status.message().to_owned(),
        ..rpc::Status::default()
    })
}
