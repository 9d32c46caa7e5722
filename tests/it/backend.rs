//! A backend in this process that speaks the Remote Execution API: content in memory, actions
//! "executed" by a closure, and everything that was asked of it on record.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use primed::backend::remote::REQUEST_METADATA_KEY;
use primed::cas::{Digest, DigestFunction};
use primed::reapi::action_cache_server::{ActionCache, ActionCacheServer};
use primed::reapi::build::bazel::remote::execution::v2::*;
use primed::reapi::capabilities_server::{Capabilities, CapabilitiesServer};
use primed::reapi::content_addressable_storage_server::{
    ContentAddressableStorage, ContentAddressableStorageServer,
};
use primed::reapi::execution_server::{Execution, ExecutionServer};
use primed::reapi::google::bytestream::byte_stream_server::{ByteStream, ByteStreamServer};
use primed::reapi::google::bytestream::{ReadRequest, ReadResponse, WriteRequest, WriteResponse};
use primed::reapi::google::longrunning::operations_server::{Operations, OperationsServer};
use primed::reapi::google::longrunning::{
    CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
    ListOperationsResponse, Operation, WaitOperationRequest, operation,
};
use primed::reapi::google::rpc;
use prost::Message;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::service::InterceptorLayer;
use tonic::{Code, Request, Response, Status, Streaming, async_trait};

/// The largest priority that the backend allows.
pub const LEAST_URGENT: i32 = 50;

const MAX_MESSAGE: usize = 64 * 1024 * 1024;

/// One execution, as the backend was asked for it.
#[derive(Clone, Debug)]
pub struct Run {
    pub instance: String,
    pub action: Digest,
    pub priority: i32,
    /// Whether primed asked for it by itself.
    pub speculative: bool,
    pub arguments: Vec<String>,
    /// The time that it was given.
    pub timeout: Option<Duration>,
    pub over: bool,
    /// Whether whoever asked for it has left before its end.
    pub left: bool,
}

/// One lookup that a client asked for.
#[derive(Clone, Debug)]
pub struct Lookup {
    pub action: Digest,
    /// The time that it was given.
    pub timeout: Option<Duration>,
}

/// How an execution ends.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Exit code 0, and this output.
    Output(Bytes),
    /// Exit code 0, and these outputs, by path.
    Files(Vec<(String, Bytes)>),
    /// Another exit code.
    Exit(i32),
    /// The stream ends with this gRPC status, after a stage.
    Broken(Code),
    /// The call is refused before anything is said.
    Refused(Code),
    /// The operation is done, and holds this status.
    Failed(Code),
    /// The stream ends well, but the operation never does.
    Cut,
    /// The stream ends with this gRPC status unless the action is kept open; the operation goes on
    /// for as long as clients' are held, and has this output.
    Lost(Code, Bytes),
}

type Behaviour = dyn Fn(&World, &Run) -> Outcome + Send + Sync;
type Name = (String, Digest);

/// What the backend holds, and what was asked of it.
pub struct World {
    state: Mutex<State>,
    behaviour: Mutex<Arc<Behaviour>>,
    /// While it is set, the executions that primed began do not end.
    hold: watch::Sender<bool>,
    /// Those in this range that clients began do not end.
    held_clients: watch::Sender<Range<usize>>,
    /// Executions of these actions do not end.
    kept_open: watch::Sender<HashSet<Digest>>,
    /// How many more stages those that run have told of, and how long each of them is.
    stages: watch::Sender<(usize, usize)>,
    /// Operations that clients wait for by name, and those that were cancelled.
    pub waits: Mutex<Vec<String>>,
    pub cancelled: Mutex<Vec<String>>,
    /// Whether clients are told that what they execute is queued.
    pub tells_queued: Mutex<bool>,
    /// Whether failures are put into the action cache, and answer whoever executes the same, as with
    /// buildbox-casd.
    pub keeps_failures: Mutex<bool>,
    /// Whether what is in the action cache answers whoever executes the same, be it a success.
    pub executes_once: Mutex<bool>,
    /// Operations that are done, by name.
    done: watch::Sender<HashMap<String, Operation>>,
    /// While it is set, primed waits for the blobs that it reads.
    held_reads: watch::Sender<bool>,
    /// While it is set, calls whose operations are done do not end.
    held_streams: watch::Sender<bool>,
    /// While it is set, blobs that primed reads come back damaged.
    pub damage: Mutex<bool>,
    /// Whether clients may write to the action cache.
    pub takes_updates: Mutex<bool>,
    /// Calls that have another `authorization` are refused; all are welcome where it is empty.
    pub authorization: Mutex<String>,
}

#[derive(Default)]
struct State {
    blobs: HashMap<Name, Bytes>,
    results: HashMap<Name, ActionResult>,
    runs: Vec<Run>,
    lookups: Vec<Lookup>,
    most_speculative: usize,
}

impl World {
    /// From now on, executions end as `behaviour` says.
    pub fn behave(&self, behaviour: impl Fn(&World, &Run) -> Outcome + Send + Sync + 'static) {
        *self.behaviour.lock() = Arc::new(behaviour);
    }

    /// Whether speculative executions are kept from ending.
    pub fn hold(&self, hold: bool) {
        self.hold.send_replace(hold);
    }

    /// Whether primed is kept waiting for blobs that it reads.
    pub fn hold_reads(&self, hold: bool) {
        self.held_reads.send_replace(hold);
    }

    /// Whether calls of `Execute` stay open after all is said.
    pub fn hold_streams(&self, hold: bool) {
        self.held_streams.send_replace(hold);
    }

    /// Whether clients' executions are kept from ending.
    pub fn hold_clients(&self, hold: bool) {
        let held = if hold { 0..usize::MAX } else { 0..0 };
        self.held_clients.send_replace(held);
    }

    /// Lets those that clients began after the first `count` executions end.
    pub fn let_end_after(&self, count: usize) {
        self.held_clients.send_replace(0..count);
    }

    /// Lets those that clients began among the first `count` executions end.
    pub fn let_end_before(&self, count: usize) {
        self.held_clients.send_replace(count..usize::MAX);
    }

    /// Lets what runs tell of one more stage, in so many bytes. Return to it when that has come.
    pub fn tell_stage(&self, bytes: usize) {
        self.stages
            .send_modify(|(count, size)| (*count, *size) = (*count + 1, bytes));
    }

    /// Keeps executions of `action` from ending.
    pub fn keep_open(&self, action: Digest) {
        self.kept_open.send_modify(|open| {
            open.insert(action);
        });
    }

    /// Lets executions of `action` end.
    pub fn let_end(&self, action: Digest) {
        self.kept_open.send_modify(|open| {
            open.remove(&action);
        });
    }

    pub fn put(&self, instance: &str, blob: Bytes) -> Digest {
        self.put_under(instance, DigestFunction::Sha256, blob)
    }

    fn put_under(&self, instance: &str, function: DigestFunction, blob: Bytes) -> Digest {
        let digest = function.of(&blob);
        self.state
            .lock()
            .blobs
            .insert((instance.to_owned(), digest), blob);
        digest
    }

    pub fn blob(&self, instance: &str, digest: Digest) -> Option<Bytes> {
        let name = (instance.to_owned(), digest);
        self.state.lock().blobs.get(&name).cloned()
    }

    pub fn result(&self, instance: &str, action: Digest) -> Option<ActionResult> {
        let name = (instance.to_owned(), action);
        self.state.lock().results.get(&name).cloned()
    }

    pub fn runs(&self) -> Vec<Run> {
        self.state.lock().runs.clone()
    }

    /// The lookups of `action` that were not primed's own.
    pub fn lookups(&self, action: Digest) -> Vec<Lookup> {
        let mut lookups = self.state.lock().lookups.clone();
        lookups.retain(|lookup| lookup.action == action);
        lookups
    }

    /// What primed executed by itself.
    pub fn speculative(&self) -> Vec<Run> {
        let mut runs = self.runs();
        runs.retain(|run| run.speculative);
        runs
    }

    /// How often `action` was executed.
    pub fn count(&self, action: Digest) -> usize {
        let state = self.state.lock();
        state.runs.iter().filter(|run| run.action == action).count()
    }

    /// How many speculative executions there were at once, at most.
    pub fn most_speculative(&self) -> usize {
        self.state.lock().most_speculative
    }

    pub fn running_speculative(&self) -> usize {
        let state = self.state.lock();
        running_speculative(&state)
    }

    /// The input files of an action by path; `None` if anything is missing.
    pub fn inputs(&self, run: &Run) -> Option<BTreeMap<String, Bytes>> {
        let action = self.action(run)?;
        let root = run
            .action
            .function()
            .read(action.input_root_digest.as_ref())
            .ok()?;
        self.files(&run.instance, root)
    }

    pub fn action(&self, run: &Run) -> Option<Action> {
        Action::decode(self.blob(&run.instance, run.action)?).ok()
    }

    /// The files of a tree by path; `None` if anything is missing.
    pub fn files(&self, instance: &str, root: Digest) -> Option<BTreeMap<String, Bytes>> {
        let function = root.function();
        let mut files = BTreeMap::new();
        let mut open = vec![(String::new(), root)];
        while let Some((path, directory)) = open.pop() {
            let directory = Directory::decode(self.blob(instance, directory)?).ok()?;
            for file in &directory.files {
                let digest = function.read(file.digest.as_ref()).ok()?;
                let path = format!("{path}{}", file.name);
                files.insert(path, self.blob(instance, digest)?);
            }
            for child in &directory.directories {
                let digest = function.read(child.digest.as_ref()).ok()?;
                open.push((format!("{path}{}/", child.name), digest));
            }
        }
        Some(files)
    }

    fn begin(&self, run: Run) -> usize {
        let mut state = self.state.lock();
        state.runs.push(run);
        state.most_speculative = state.most_speculative.max(running_speculative(&state));
        state.runs.len() - 1
    }
}

fn running_speculative(state: &State) -> usize {
    let running = |run: &&Run| run.speculative && !run.over;
    state.runs.iter().filter(running).count()
}

/// What a compiler would do: the output depends on the command, and on all inputs less what
/// stands behind `//` in them.
pub fn compile(world: &World, run: &Run) -> Outcome {
    let Some(inputs) = world.inputs(run) else {
        return Outcome::Failed(Code::NotFound);
    };
    let mut output = run.arguments.join(" ");
    for (path, content) in inputs {
        let text = String::from_utf8_lossy(&content);
        let read: Vec<&str> = text
            .lines()
            .map(|line| line.split("//").next().unwrap_or_default().trim_end())
            .collect();
        if read.iter().any(|line| line.contains("#error")) {
            return Outcome::Exit(1);
        }
        let digest = Digest::of(read.join("\n").as_bytes());
        output.push_str(&format!("\n{path} {digest}"));
    }
    Outcome::Output(output.into())
}

/// The backend, listening.
pub struct FakeBackend {
    pub world: Arc<World>,
    socket: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FakeBackend {
    /// Starts it in `directory`, on a thread of its own.
    pub fn start(directory: &Path) -> Self {
        let world = Arc::new(World {
            state: Mutex::default(),
            behaviour: Mutex::new(Arc::new(compile)),
            hold: watch::Sender::new(false),
            held_reads: watch::Sender::new(false),
            held_streams: watch::Sender::new(false),
            held_clients: watch::Sender::new(0..0),
            kept_open: watch::Sender::default(),
            stages: watch::Sender::default(),
            waits: Mutex::default(),
            cancelled: Mutex::default(),
            tells_queued: Mutex::new(false),
            keeps_failures: Mutex::new(true),
            executes_once: Mutex::new(false),
            done: watch::Sender::default(),
            damage: Mutex::new(false),
            takes_updates: Mutex::new(false),
            authorization: Mutex::default(),
        });
        let socket = directory.join("backend.sock");
        let (stop, stopped) = oneshot::channel();
        let service = Service(world.clone());
        let guarded = world.clone();
        let guard = InterceptorLayer::new(move |request: Request<()>| {
            let wanted = guarded.authorization.lock();
            match request.metadata().get("authorization") {
                Some(value) if *value == **wanted => Ok(request),
                _ if wanted.is_empty() => Ok(request),
                _ => Err(Status::unauthenticated("who are you?")),
            }
        });
        let bound = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        bound.set_nonblocking(true).unwrap();
        let serve = async move {
            let incoming = Incoming(UnixListener::from_std(bound).unwrap());
            tonic::transport::Server::builder()
                .layer(guard)
                .add_service(CapabilitiesServer::new(service.clone()))
                .add_service(ActionCacheServer::new(service.clone()))
                .add_service(ByteStreamServer::new(service.clone()))
                .add_service(ExecutionServer::new(service.clone()))
                .add_service(OperationsServer::new(service.clone()))
                .add_service(
                    ContentAddressableStorageServer::new(service)
                        .max_decoding_message_size(MAX_MESSAGE),
                )
                .serve_with_incoming_shutdown(incoming, async {
                    let _ = stopped.await;
                })
                .await
                .unwrap();
        };
        let thread = std::thread::Builder::new()
            .name("backend".to_owned())
            .spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .unwrap();
                runtime.block_on(serve);
            })
            .unwrap();
        FakeBackend {
            world,
            socket,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    pub fn address(&self) -> String {
        format!("unix:{}", self.socket.display())
    }
}

impl Drop for FakeBackend {
    fn drop(&mut self) {
        self.world.hold(false);
        self.world.hold_clients(false);
        self.world.hold_streams(false);
        self.world.kept_open.send_modify(HashSet::clear);
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Incoming(UnixListener);

impl Stream for Incoming {
    type Item = std::io::Result<UnixStream>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0
            .poll_accept(cx)
            .map(|accepted| Some(accepted.map(|(stream, _)| stream)))
    }
}

#[derive(Clone)]
struct Service(Arc<World>);

fn is_primed<T>(request: &Request<T>) -> bool {
    let metadata = request.metadata().get_bin(REQUEST_METADATA_KEY);
    metadata
        .and_then(|value| value.to_bytes().ok())
        .and_then(|bytes| RequestMetadata::decode(bytes).ok())
        .and_then(|metadata| metadata.tool_details)
        // buildbox-casd adds that it was by way of itself.
        .is_some_and(|tool| tool.tool_name.split(' ').next() == Some("primed"))
}

/// What `grpc-timeout` says.
fn timeout<T>(request: &Request<T>) -> Option<Duration> {
    let text = request.metadata().get("grpc-timeout")?.to_str().unwrap();
    let (digits, unit) = text.split_at(text.len() - 1);
    let unit = match unit {
        "H" => Duration::from_secs(3600),
        "M" => Duration::from_secs(60),
        "S" => Duration::from_secs(1),
        "m" => Duration::from_millis(1),
        "u" => Duration::from_micros(1),
        "n" => Duration::from_nanos(1),
        _ => panic!("grpc-timeout: {text}"),
    };
    Some(unit * digits.parse::<u32>().unwrap())
}

/// A digest in a request that says `named` of its digest function.
fn digest(proto: Option<&primed::reapi::Digest>, named: i32) -> Result<Digest, Status> {
    let function = proto.and_then(|proto| DigestFunction::of_request(named, proto));
    function
        .and_then(|function| function.read(proto).ok())
        .ok_or_else(|| Status::invalid_argument("no digest"))
}

fn status(code: Code) -> rpc::Status {
    rpc::Status {
        code: code as i32,
        message: "as the test wants it".to_owned(),
        ..rpc::Status::default()
    }
}

#[async_trait]
impl Capabilities for Service {
    async fn get_capabilities(
        &self,
        _: Request<GetCapabilitiesRequest>,
    ) -> Result<Response<ServerCapabilities>, Status> {
        Ok(Response::new(ServerCapabilities {
            cache_capabilities: Some(CacheCapabilities {
                max_batch_total_size_bytes: 1024 * 1024,
                action_cache_update_capabilities: Some(ActionCacheUpdateCapabilities {
                    update_enabled: *self.0.takes_updates.lock(),
                }),
                digest_functions: vec![digest_function::Value::Sha256 as i32],
                ..CacheCapabilities::default()
            }),
            execution_capabilities: Some(ExecutionCapabilities {
                execution_priority_capabilities: Some(PriorityCapabilities {
                    priorities: vec![priority_capabilities::PriorityRange {
                        min_priority: -LEAST_URGENT,
                        max_priority: LEAST_URGENT,
                    }],
                }),
                ..ExecutionCapabilities::default()
            }),
            ..ServerCapabilities::default()
        }))
    }
}

#[async_trait]
impl ActionCache for Service {
    async fn get_action_result(
        &self,
        request: Request<GetActionResultRequest>,
    ) -> Result<Response<ActionResult>, Status> {
        let (speculative, timeout) = (is_primed(&request), timeout(&request));
        let request = request.into_inner();
        let action = digest(request.action_digest.as_ref(), request.digest_function)?;
        let mut state = self.0.state.lock();
        if !speculative {
            state.lookups.push(Lookup { action, timeout });
        }
        let result = state.results.get(&(request.instance_name, action)).cloned();
        result
            .map(Response::new)
            .ok_or_else(|| Status::not_found("no result"))
    }

    async fn update_action_result(
        &self,
        request: Request<UpdateActionResultRequest>,
    ) -> Result<Response<ActionResult>, Status> {
        if !*self.0.takes_updates.lock() {
            return Err(Status::permission_denied("no updates"));
        }
        let request = request.into_inner();
        let action = digest(request.action_digest.as_ref(), request.digest_function)?;
        let result = request.action_result.unwrap_or_default();
        let mut state = self.0.state.lock();
        let name = (request.instance_name, action);
        state.results.insert(name, result.clone());
        Ok(Response::new(result))
    }
}

#[async_trait]
impl ContentAddressableStorage for Service {
    async fn find_missing_blobs(
        &self,
        request: Request<FindMissingBlobsRequest>,
    ) -> Result<Response<FindMissingBlobsResponse>, Status> {
        let request = request.into_inner();
        let mut missing_blob_digests = Vec::new();
        for proto in request.blob_digests {
            let digest = digest(Some(&proto), request.digest_function)?;
            if self.0.blob(&request.instance_name, digest).is_none() {
                missing_blob_digests.push(proto);
            }
        }
        Ok(Response::new(FindMissingBlobsResponse {
            missing_blob_digests,
        }))
    }

    async fn batch_update_blobs(
        &self,
        request: Request<BatchUpdateBlobsRequest>,
    ) -> Result<Response<BatchUpdateBlobsResponse>, Status> {
        let request = request.into_inner();
        let mut responses = Vec::new();
        for blob in request.requests {
            let digest = digest(blob.digest.as_ref(), request.digest_function)?;
            let kept = self
                .0
                .put_under(&request.instance_name, digest.function(), blob.data);
            let code = match kept == digest {
                true => Code::Ok,
                false => Code::InvalidArgument,
            };
            responses.push(batch_update_blobs_response::Response {
                digest: blob.digest,
                status: Some(status(code)),
            });
        }
        Ok(Response::new(BatchUpdateBlobsResponse { responses }))
    }

    async fn batch_read_blobs(
        &self,
        request: Request<BatchReadBlobsRequest>,
    ) -> Result<Response<BatchReadBlobsResponse>, Status> {
        let damaged = is_primed(&request) && *self.0.damage.lock();
        if is_primed(&request) {
            let mut held = self.0.held_reads.subscribe();
            // The world ends after its service.
            let _ = held.wait_for(|held| !held).await;
        }
        let request = request.into_inner();
        let mut responses = Vec::new();
        for proto in request.digests {
            let digest = digest(Some(&proto), request.digest_function)?;
            let blob = self.0.blob(&request.instance_name, digest);
            let code = blob.as_ref().map_or(Code::NotFound, |_| Code::Ok);
            let data = blob.unwrap_or_default();
            responses.push(batch_read_blobs_response::Response {
                digest: Some(proto),
                data: if damaged { damage(&data) } else { data },
                status: Some(status(code)),
                ..batch_read_blobs_response::Response::default()
            });
        }
        Ok(Response::new(BatchReadBlobsResponse { responses }))
    }
}

/// Of the same length, and still well-formed more often than not.
fn damage(data: &Bytes) -> Bytes {
    let mut damaged = data.to_vec();
    if let Some(last) = damaged.last_mut() {
        *last ^= 1;
    }
    damaged.into()
}

#[async_trait]
impl ByteStream for Service {
    async fn read(
        &self,
        request: Request<ReadRequest>,
    ) -> Result<Response<BoxStream<ReadResponse>>, Status> {
        let damaged = is_primed(&request) && *self.0.damage.lock();
        let name = request.into_inner().resource_name;
        let (instance, digest) = resource(&name)?;
        let blob = self
            .0
            .blob(&instance, digest)
            .ok_or_else(|| Status::not_found("no blob"))?;
        let blob = if damaged { damage(&blob) } else { blob };
        let parts: Vec<_> = blob
            .chunks(1024 * 1024)
            .map(|part| {
                Ok(ReadResponse {
                    data: Bytes::copy_from_slice(part),
                })
            })
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(parts))))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteRequest>>,
    ) -> Result<Response<WriteResponse>, Status> {
        let mut parts = request.into_inner();
        let mut name = String::new();
        let mut blob = Vec::new();
        while let Some(part) = parts.message().await? {
            if name.is_empty() {
                name = part.resource_name;
            }
            blob.extend_from_slice(&part.data);
        }
        let (instance, digest) = resource(&name)?;
        let committed_size = blob.len() as i64;
        if self.0.put_under(&instance, digest.function(), blob.into()) != digest {
            return Err(Status::invalid_argument("another digest"));
        }
        Ok(Response::new(WriteResponse { committed_size }))
    }
}

/// `[INSTANCE/][uploads/UUID/]blobs/[FUNCTION/]HASH/SIZE`
fn resource(name: &str) -> Result<(String, Digest), Status> {
    let malformed = || Status::invalid_argument(name.to_owned());
    let (before, digest) = name.rsplit_once("blobs/").ok_or_else(malformed)?;
    let instance = before.split("uploads/").next().unwrap_or_default();
    let digest = match digest.strip_prefix("blake3/") {
        Some(digest) => {
            let inferred: Digest = digest.parse().map_err(|_| malformed())?;
            DigestFunction::Blake3.read(Some(&inferred.to_proto()))
        }
        None => digest.parse(),
    };
    let digest = digest.map_err(|_| malformed())?;
    Ok((instance.trim_end_matches('/').to_owned(), digest))
}

#[async_trait]
impl Execution for Service {
    async fn execute(
        &self,
        request: Request<ExecuteRequest>,
    ) -> Result<Response<BoxStream<Operation>>, Status> {
        let (speculative, timeout) = (is_primed(&request), timeout(&request));
        let request = request.into_inner();
        let action = digest(request.action_digest.as_ref(), request.digest_function)?;
        let world = self.0.clone();
        let command = command(&world, &request.instance_name, action);
        let run = Run {
            instance: request.instance_name,
            action,
            priority: request.execution_policy.map_or(0, |policy| policy.priority),
            speculative,
            arguments: command
                .as_ref()
                .map(|command| command.arguments.clone())
                .unwrap_or_default(),
            timeout,
            over: false,
            left: false,
        };
        let index = world.begin(run.clone());
        let cached = world.result(&run.instance, action);
        let once = *world.executes_once.lock();
        if let Some(result) = cached.filter(|result| once || result.exit_code != 0) {
            world.state.lock().runs[index].over = true;
            let response = ExecuteResponse {
                result: Some(result),
                cached_result: true,
                ..ExecuteResponse::default()
            };
            let done = done(format!("operation-{index}"), &response);
            return Ok(Response::new(Box::pin(tokio_stream::once(Ok(done)))));
        }
        let behaviour = world.behaviour.lock().clone();
        if let Outcome::Refused(code) = behaviour(&world, &run) {
            world.state.lock().runs[index].over = true;
            return Err(Status::new(code, "as the test wants it"));
        }
        let (operations, stream) = mpsc::channel(4);
        // As with real backends, a dropped stream does not stop the action.
        primed::task::spawn("execution", async move {
            let name = format!("operation-{index}");
            let told = match !speculative && *world.tells_queued.lock() {
                true => execution_stage::Value::Queued,
                false => execution_stage::Value::Executing,
            };
            let stage = ExecuteOperationMetadata {
                stage: told as i32,
                action_digest: Some(action.to_proto()),
                ..ExecuteOperationMetadata::default()
            };
            let begun = Operation {
                name: name.clone(),
                metadata: Some(any("ExecuteOperationMetadata", &stage)),
                ..Operation::default()
            };
            let _ = operations.send(Ok(begun)).await;
            if speculative {
                let _ = world.hold.subscribe().wait_for(|hold| !hold).await;
            }
            let mut kept_open = world.kept_open.subscribe();
            if let Outcome::Lost(code, _) = behaviour(&world, &run) {
                let _ = kept_open.wait_for(|open| !open.contains(&action)).await;
                let _ = operations.send(Err(Status::new(code, "lost"))).await;
            }
            let mut held = world.held_clients.subscribe();
            let let_end = async {
                let _ = kept_open.wait_for(|open| !open.contains(&action)).await;
                let ends = |held: &Range<usize>| speculative || !held.contains(&index);
                let _ = held.wait_for(ends).await;
            };
            let mut stages = world.stages.subscribe();
            let tell_stages = async {
                let mut told = stages.borrow().0;
                loop {
                    let Ok(now) = stages
                        .wait_for(|(count, _)| *count > told)
                        .await
                        .as_deref()
                        .copied()
                    else {
                        std::future::pending().await
                    };
                    told += 1;
                    let stage = ExecuteOperationMetadata {
                        stage: execution_stage::Value::Executing as i32,
                        stdout_stream_name: format!("{told:0>size$}", size = now.1),
                        ..ExecuteOperationMetadata::default()
                    };
                    let operation = Operation {
                        name: name.clone(),
                        metadata: Some(any("ExecuteOperationMetadata", &stage)),
                        ..Operation::default()
                    };
                    let _ = operations.send(Ok(operation)).await;
                }
            };
            let see_leaving = async {
                operations.closed().await;
                world.state.lock().runs[index].left = true;
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = let_end => {}
                () = tell_stages => {}
                () = see_leaving => {}
            }
            let response = match behaviour(&world, &run) {
                Outcome::Output(output) => {
                    let path = command
                        .as_ref()
                        .and_then(|command| command.output_paths.first());
                    let files = vec![(path.cloned().unwrap_or_default(), output)];
                    Some(ExecuteResponse {
                        result: Some(world.finish(&run, files)),
                        ..ExecuteResponse::default()
                    })
                }
                Outcome::Lost(_, output) => Some(ExecuteResponse {
                    result: Some(world.finish(&run, vec![("lost".to_owned(), output)])),
                    ..ExecuteResponse::default()
                }),
                Outcome::Files(files) => Some(ExecuteResponse {
                    result: Some(world.finish(&run, files)),
                    ..ExecuteResponse::default()
                }),
                Outcome::Exit(exit_code) => Some(ExecuteResponse {
                    result: Some(world.fail(&run, exit_code)),
                    ..ExecuteResponse::default()
                }),
                Outcome::Failed(code) => Some(ExecuteResponse {
                    status: Some(status(code)),
                    ..ExecuteResponse::default()
                }),
                Outcome::Broken(code) | Outcome::Refused(code) => {
                    world.state.lock().runs[index].over = true;
                    let _ = operations.send(Err(Status::new(code, "broken"))).await;
                    None
                }
                Outcome::Cut => None,
            };
            let done = response.map(|response| done(name, &response));
            if let Some(done) = &done {
                world.done.send_modify(|all| {
                    all.insert(done.name.clone(), done.clone());
                });
            }
            world.state.lock().runs[index].over = true;
            if let Some(done) = done {
                let _ = operations.send(Ok(done)).await;
            }
            let mut held = world.held_streams.subscribe();
            tokio::select! {
                _ = held.wait_for(|held| !held) => {}
                () = operations.closed() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn wait_execution(
        &self,
        request: Request<WaitExecutionRequest>,
    ) -> Result<Response<BoxStream<Operation>>, Status> {
        let name = request.into_inner().name;
        self.0.waits.lock().push(name.clone());
        let index: Option<usize> = name.strip_prefix("operation-").and_then(|n| n.parse().ok());
        let is_over = |index: usize| {
            self.0
                .state
                .lock()
                .runs
                .get(index)
                .is_none_or(|run| run.over)
        };
        if index.is_none_or(is_over) && !self.0.done.borrow().contains_key(&name) {
            return Err(Status::not_found("no such operation"));
        }
        let mut done = self.0.done.subscribe();
        let (operations, stream) = mpsc::channel(4);
        primed::task::spawn("waiting", async move {
            let begun = Operation {
                name: name.clone(),
                ..Operation::default()
            };
            let _ = operations.send(Ok(begun)).await;
            let done = done.wait_for(|all| all.contains_key(&name)).await;
            let done = done.map(|all| all[&name].clone());
            if let Ok(done) = done {
                let _ = operations.send(Ok(done)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

#[async_trait]
impl Operations for Service {
    async fn cancel_operation(
        &self,
        request: Request<CancelOperationRequest>,
    ) -> Result<Response<()>, Status> {
        self.0.cancelled.lock().push(request.into_inner().name);
        Ok(Response::new(()))
    }

    async fn list_operations(
        &self,
        _: Request<ListOperationsRequest>,
    ) -> Result<Response<ListOperationsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_operation(
        &self,
        _: Request<GetOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn delete_operation(
        &self,
        _: Request<DeleteOperationRequest>,
    ) -> Result<Response<()>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn wait_operation(
        &self,
        _: Request<WaitOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        Err(Status::unimplemented(""))
    }
}

impl World {
    /// A success with these files. It is put into the action cache.
    pub fn finish(&self, run: &Run, files: Vec<(String, Bytes)>) -> ActionResult {
        let output_files = files.into_iter().map(|(path, content)| OutputFile {
            path,
            digest: Some(
                self.put_under(&run.instance, run.action.function(), content)
                    .to_proto(),
            ),
            ..OutputFile::default()
        });
        let seconds = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let result = ActionResult {
            output_files: output_files.collect(),
            execution_metadata: Some(ExecutedActionMetadata {
                execution_start_timestamp: seconds(100),
                execution_completed_timestamp: seconds(101),
                ..ExecutedActionMetadata::default()
            }),
            ..ActionResult::default()
        };
        self.keep(run, result.clone());
        result
    }

    /// A failure. It is put into the action cache, unless failures are not kept.
    pub fn fail(&self, run: &Run, exit_code: i32) -> ActionResult {
        let result = ActionResult {
            exit_code,
            stderr_raw: "as the test wants it".into(),
            ..ActionResult::default()
        };
        if *self.keeps_failures.lock() {
            self.keep(run, result.clone());
        }
        result
    }

    fn keep(&self, run: &Run, result: ActionResult) {
        let name = (run.instance.clone(), run.action);
        self.state.lock().results.insert(name, result);
    }
}

fn command(world: &World, instance: &str, action: Digest) -> Option<Command> {
    let function = action.function();
    let action = Action::decode(world.blob(instance, action)?).ok()?;
    let command = function.read(action.command_digest.as_ref()).ok()?;
    Command::decode(world.blob(instance, command)?).ok()
}

/// The operation `name` at its end.
fn done(name: String, response: &ExecuteResponse) -> Operation {
    Operation {
        name,
        metadata: None,
        done: true,
        result: Some(operation::Result::Response(any(
            "ExecuteResponse",
            response,
        ))),
    }
}

fn any(name: &str, message: &impl Message) -> prost_types::Any {
    prost_types::Any {
        type_url: format!("type.googleapis.com/build.bazel.remote.execution.v2.{name}"),
        value: message.encode_to_vec(),
    }
}
