//! What primed itself calls upstream: one narrow trait, so that a remote service, an embedded
//! one and decorators (retries, metrics, faults) are the same thing to their callers.

pub mod connections;
mod credential_helper;
pub mod credentials;
pub mod dial;
pub mod embedded;
pub mod endpoints;
pub mod exchange;
pub mod health;
pub mod instance_rewriter;
pub mod instances;
mod keep_alive;
pub mod remote;
mod tcp;
mod token_file;
mod tunnel;
pub mod upstream;

use std::pin::Pin;

use bytes::Bytes;
use tokio_stream::Stream;
use tonic::{Status, async_trait};

use crate::digest::Digest;
use crate::reapi::{ActionResult, ServerCapabilities};

/// Encoded `google.longrunning.Operation` messages, as the backend sent them.
pub type Operations = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

/// The calls of the Remote Execution API that speculation needs. Every method is one RPC, which
/// says what digest function the digests in it are of: all of the same. Batching and verification
/// are `cas::transfer`'s.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// What `instance` can do, how much fits into one batch, and which priorities it allows.
    async fn capabilities(&self, instance: &str) -> Result<ServerCapabilities, Status>;

    /// Which of `digests` the CAS does not hold.
    async fn find_missing(&self, instance: &str, digests: &[Digest])
    -> Result<Vec<Digest>, Status>;

    /// Blobs that together fit into one batch. Absent ones are left out of the answer.
    async fn read_batch(
        &self,
        instance: &str,
        digests: &[Digest],
    ) -> Result<Vec<(Digest, Bytes)>, Status>;

    /// One blob of any size, by `ByteStream.Read`.
    async fn read(&self, instance: &str, digest: Digest) -> Result<Bytes, Status>;

    /// Uploads blobs that together fit into one batch; the first one refused is the error.
    async fn write_batch(&self, instance: &str, blobs: &[(Digest, Bytes)]) -> Result<(), Status>;

    /// Uploads one blob of any size, by `ByteStream.Write`.
    async fn write(&self, instance: &str, digest: Digest, blob: Bytes) -> Result<(), Status>;

    /// What the action cache holds for `action`, if it holds anything.
    async fn action_result(
        &self,
        instance: &str,
        action: Digest,
    ) -> Result<Option<ActionResult>, Status>;

    /// Puts a result into the action cache.
    async fn update_action_result(
        &self,
        instance: &str,
        action: Digest,
        result: ActionResult,
    ) -> Result<(), Status>;

    /// Executes `action` at `priority` (REAPI: a larger number is less urgent).
    async fn execute(
        &self,
        instance: &str,
        action: Digest,
        priority: i32,
    ) -> Result<Operations, Status>;

    /// Asks for an operation to be stopped, by the name that `execute` was told. Backends may refuse,
    /// and the operation goes on.
    async fn cancel(&self, operation: &str) -> Result<(), Status>;
}
