//! Execution on this machine: `Execution` of the Remote Execution API, and `Operations` as far as
//! executions go. A request becomes an operation (`operations`), which waits for its turn (`queue`);
//! then the action (`action`, `tree`) is put on disk (`staging`), run (`sandbox`, `process`,
//! `supervisor`), and what it wrote is taken in (`outputs`), all by the `worker`.

mod action;
mod failure;
mod inline;
mod operations;
mod outputs;
mod process;
mod queue;
mod sandbox;
mod staging;
mod supervisor;
mod tree;
mod worker;

use std::sync::Arc;

use prost::Message;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status, async_trait};

use super::blobs::Blobs;
use super::results::Results;
use crate::config::embedded::EmbeddedConfig;
use crate::digest::DigestFunction;
use crate::reapi::google::longrunning::{
    CancelOperationRequest, GetOperationRequest, Operation, operations_server,
};
use crate::reapi::{ExecuteRequest, WaitExecutionRequest, execution_server};
use crate::task;

pub use sandbox::SandboxError;
pub use supervisor::supervise;

use inline::Inlined;
use operations::{Key, Operations, Waiter, Wish};
use sandbox::Sandbox;
use tree::TreeReader;
use worker::Worker;

/// How many actions run, and how many wait for their turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// On a slot.
    pub running: usize,
    /// Waiting for one.
    pub queued: usize,
}

/// The services. Clones are the same.
#[derive(Clone)]
pub struct Execution {
    operations: Arc<Operations>,
}

type Listening = BoxStream<Operation>;

impl Execution {
    /// Services that execute what is in `blobs`, and keep what comes of it there and in `results`.
    /// Blocks.
    ///
    /// # Errors
    /// `SandboxError`, when a sandbox is asked for that does not work.
    pub fn new(
        blobs: Arc<Blobs>,
        results: Arc<Results>,
        config: &EmbeddedConfig,
    ) -> Result<Self, SandboxError> {
        // Where it stands, the whole cache does.
        let temporary = blobs.temporary_directory();
        let cache = temporary.parent().unwrap_or(temporary);
        let host = rustix::system::uname();
        let worker = Worker {
            sandbox: Sandbox::find(config.sandbox, cache)?,
            max_timeout: config.max_action_time,
            name: host.nodename().to_string_lossy().into_owned(),
            trees: TreeReader::new(blobs.clone()),
            blobs,
        };
        let jobs = config.jobs.get();
        Ok(Execution {
            operations: Operations::new(Arc::new(worker), results, jobs),
        })
    }

    /// How many actions run, and how many wait for their turn.
    pub fn counts(&self) -> Counts {
        self.operations.counts()
    }

    fn find(&self, name: &str) -> Result<Arc<Waiter>, Status> {
        self.operations.find(name).ok_or_else(|| {
            Status::not_found(format!(
                "there is no operation {name:?}, or it ended long ago; execute the action again"
            ))
        })
    }

    /// A stream of all that happens to the operation of `waiter`.
    fn listen(&self, waiter: Arc<Waiter>) -> Response<Listening> {
        let (listener, listening) = mpsc::channel(1);
        let following = self.operations.clone().follow(waiter, listener);
        task::spawn("operation", following);
        Response::new(Box::pin(ReceiverStream::new(listening)))
    }
}

#[async_trait]
impl execution_server::Execution for Execution {
    async fn execute(
        &self,
        request: Request<ExecuteRequest>,
    ) -> Result<Response<Listening>, Status> {
        let request = request.into_inner();
        let digest = request.action_digest.clone().unwrap_or_default();
        let invalid = |error: String| Status::invalid_argument(format!("action_digest: {error}"));
        let function = DigestFunction::of_request(request.digest_function, &digest);
        let function = function.ok_or_else(|| {
            invalid("no digest of a digest function that primed knows".to_owned())
        })?;
        let action = function.read(Some(&digest));
        let action = action.map_err(|error| invalid(error.to_string()))?;
        let wish = Wish {
            priority: request.execution_policy.unwrap_or_default().priority,
            skip_cache_lookup: request.skip_cache_lookup,
            inlined: Inlined::of(&request, function),
        };
        let key = Key {
            instance: request.instance_name,
            action,
        };
        let waiter = self.operations.begin(key, wish).await;
        Ok(self.listen(waiter))
    }

    async fn wait_execution(
        &self,
        request: Request<WaitExecutionRequest>,
    ) -> Result<Response<Listening>, Status> {
        let waiter = self.find(&request.get_ref().name)?;
        Ok(self.listen(waiter))
    }
}

#[async_trait]
impl operations_server::Operations for Execution {
    async fn get_operation(
        &self,
        request: Request<GetOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let waiter = self.find(&request.get_ref().name)?;
        Ok(Response::new(self.operations.operation(&waiter).await))
    }

    async fn cancel_operation(
        &self,
        request: Request<CancelOperationRequest>,
    ) -> Result<Response<()>, Status> {
        let waiter = self.find(&request.get_ref().name)?;
        self.operations.cancel(&waiter);
        Ok(Response::new(()))
    }
}

/// A message within another.
fn any(name: &str, message: &impl Message) -> prost_types::Any {
    prost_types::Any {
        type_url: format!("type.googleapis.com/{name}"),
        value: message.encode_to_vec(),
    }
}
