//! A build tool played by the test: it makes input trees of real files in a workspace, looks
//! actions up, uploads what they need and has them executed, as recc does.
//!
//! A real `make` that does nothing stands for the build's process: it runs in the workspace, the
//! calls name it as recc names its parent, and when it ends, the build has ended. A build on another
//! machine has no such process, and ends by falling silent.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use hyper_util::rt::TokioIo;
use primed::backend::remote::REQUEST_METADATA_KEY;
use primed::cas::{Digest, DigestFunction};
use primed::reapi;
use primed::reapi::action_cache_client::ActionCacheClient;
use primed::reapi::build::bazel::remote::execution::v2::*;
use primed::reapi::content_addressable_storage_client::ContentAddressableStorageClient;
use primed::reapi::execution_client::ExecutionClient;
use primed::reapi::google::longrunning::operations_client::OperationsClient;
use primed::reapi::google::longrunning::{CancelOperationRequest, Operation, operation};
use prost::Message;
use tonic::codegen::http::Uri;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

use crate::support::make;

/// How the client came by a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The lookup found it.
    Found,
    /// `Execute` brought it.
    Executed,
}

/// An action with all that it needs.
#[derive(Clone, Debug)]
pub struct Action {
    pub digest: Digest,
    pub blobs: HashMap<Digest, Bytes>,
    /// The path that it writes.
    pub output: String,
}

/// What an action is made of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Recipe<'a> {
    pub command: &'a str,
    pub inputs: &'a [&'a str],
    pub output: &'a str,
    pub do_not_cache: bool,
    /// Puts a field that REAPI does not have into the root directory.
    pub odd_root: bool,
}

/// One build that is running.
pub struct Build {
    /// `None` on another machine.
    process: Option<Child>,
    channel: Channel,
    workspace: PathBuf,
    metadata: MetadataValue<tonic::metadata::Binary>,
    /// What it says to be let in.
    authorization: Option<&'static str>,
    pub instance: String,
    pub digest_function: DigestFunction,
}

impl Build {
    /// Begins a build in `workspace` whose calls go to the Unix socket `server`.
    pub fn begin(server: &Path, workspace: &Path) -> Self {
        Build::over(connect(server), workspace)
    }

    /// Begins one whose calls go over a connection that there is.
    pub fn over(channel: Channel, workspace: &Path) -> Self {
        // `cat` ends when its input is closed, and `make` with it.
        let process = Command::new(make())
            .args(["--eval", "wait:;@cat", "wait"])
            .env_remove("MAKEFLAGS")
            .env_remove("MAKELEVEL")
            .current_dir(workspace)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let host = rustix::system::uname();
        let host = host.nodename().to_string_lossy().into_owned();
        let invocation = format!("{host}:{}", process.id());
        let mut build = Build::elsewhere(channel, workspace, &invocation);
        build.process = Some(process);
        build
    }

    /// Begins one that says of itself what recc says on another machine.
    pub fn elsewhere(channel: Channel, workspace: &Path, invocation: &str) -> Self {
        let metadata = RequestMetadata {
            tool_details: Some(ToolDetails {
                tool_name: "recc".to_owned(),
                ..ToolDetails::default()
            }),
            tool_invocation_id: invocation.to_owned(),
            ..RequestMetadata::default()
        };
        Build {
            process: None,
            channel,
            workspace: workspace.to_owned(),
            metadata: MetadataValue::from_bytes(&metadata.encode_to_vec()),
            authorization: None,
            instance: String::new(),
            digest_function: DigestFunction::Sha256,
        }
    }

    pub fn authorized(mut self, authorization: &'static str) -> Self {
        self.authorization = Some(authorization);
        self
    }

    pub fn on_instance(mut self, instance: &str) -> Self {
        self.instance = instance.to_owned();
        self
    }

    pub fn hashed_with(mut self, function: DigestFunction) -> Self {
        self.digest_function = function;
        self
    }

    /// What its requests say of the digest function: like recc's, nothing that can be inferred.
    fn named_function(&self) -> i32 {
        match self.digest_function {
            DigestFunction::Blake3 => DigestFunction::Blake3.to_proto(),
            _ => 0,
        }
    }

    /// Says of itself what `metadata` says, and nothing of its process.
    pub fn saying(mut self, metadata: &RequestMetadata) -> Self {
        self.metadata = MetadataValue::from_bytes(&metadata.encode_to_vec());
        self
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let key = tonic::metadata::BinaryMetadataKey::from_static(REQUEST_METADATA_KEY);
        request
            .metadata_mut()
            .insert_bin(key, self.metadata.clone());
        if let Some(authorization) = self.authorization {
            let value = MetadataValue::from_static(authorization);
            request.metadata_mut().insert("authorization", value);
        }
        request
    }

    /// The first call of a build that asks for no action.
    pub async fn greet(&self) {
        let message = FindMissingBlobsRequest {
            instance_name: self.instance.clone(),
            ..FindMissingBlobsRequest::default()
        };
        let mut client = ContentAddressableStorageClient::new(self.channel.clone());
        client
            .find_missing_blobs(self.request(message))
            .await
            .unwrap();
    }

    /// An action on an input tree that there is already.
    pub fn action_on(&self, root: Digest, command: &str, output: &str) -> Action {
        let mut blobs = HashMap::new();
        let command = command_under(root.function(), command, output, &mut blobs);
        Action::of(command, root, output, false, blobs)
    }

    /// The action that `recipe` is now, with the files as they are.
    pub fn action(&self, recipe: Recipe<'_>) -> Action {
        let files = recipe.inputs.iter().map(|path| {
            let content = std::fs::read(self.workspace.join(path)).unwrap();
            ((*path).to_owned(), Bytes::from(content))
        });
        let mut blobs = HashMap::new();
        let files: Vec<(String, Bytes)> = files.collect();
        let function = self.digest_function;
        let root = tree_under(function, &files, &mut blobs);
        let mut root = blobs[&root].to_vec();
        if recipe.odd_root {
            root.extend([0xf8, 0x3f, 1]); // field 1023
        }
        let root = keep_under(function, &mut blobs, root.into());
        let command = command_under(function, recipe.command, recipe.output, &mut blobs);
        Action::of(command, root, recipe.output, recipe.do_not_cache, blobs)
    }

    pub async fn lookup(&self, action: Digest) -> Result<ActionResult, Status> {
        self.lookup_within(action, None).await
    }

    /// Looks `action` up with a deadline.
    pub async fn lookup_within(
        &self,
        action: Digest,
        timeout: Option<Duration>,
    ) -> Result<ActionResult, Status> {
        let mut request = self.request(GetActionResultRequest {
            instance_name: self.instance.clone(),
            action_digest: Some(action.to_proto()),
            digest_function: self.named_function(),
            ..GetActionResultRequest::default()
        });
        if let Some(timeout) = timeout {
            request.set_timeout(timeout);
        }
        let answer = ActionCacheClient::new(self.channel.clone())
            .get_action_result(request)
            .await?;
        Ok(answer.into_inner())
    }

    pub async fn upload(&self, action: &Action) {
        let requests =
            action
                .blobs
                .iter()
                .map(|(digest, data)| batch_update_blobs_request::Request {
                    digest: Some(digest.to_proto()),
                    data: data.clone(),
                    ..batch_update_blobs_request::Request::default()
                });
        let message = BatchUpdateBlobsRequest {
            instance_name: self.instance.clone(),
            requests: requests.collect(),
            digest_function: self.named_function(),
        };
        ContentAddressableStorageClient::new(self.channel.clone())
            .max_encoding_message_size(64 * 1024 * 1024)
            .batch_update_blobs(self.request(message))
            .await
            .unwrap();
    }

    /// Has an action executed whose blobs are uploaded.
    pub async fn execute(
        &self,
        action: Digest,
        skip_cache_lookup: bool,
    ) -> Result<Streaming<Operation>, Status> {
        self.execute_within(action, skip_cache_lookup, None).await
    }

    /// Has `action` executed with a deadline.
    pub async fn execute_within(
        &self,
        action: Digest,
        skip_cache_lookup: bool,
        timeout: Option<Duration>,
    ) -> Result<Streaming<Operation>, Status> {
        let mut request = self.request(ExecuteRequest {
            instance_name: self.instance.clone(),
            action_digest: Some(action.to_proto()),
            skip_cache_lookup,
            digest_function: self.named_function(),
            ..ExecuteRequest::default()
        });
        if let Some(timeout) = timeout {
            request.set_timeout(timeout);
        }
        let answer = ExecutionClient::new(self.channel.clone())
            .execute(request)
            .await?;
        Ok(answer.into_inner())
    }

    /// Goes on waiting for an execution that was begun.
    pub async fn wait(&self, operation: &str) -> Result<Streaming<Operation>, Status> {
        let name = operation.to_owned();
        let request = self.request(WaitExecutionRequest { name });
        let answer = ExecutionClient::new(self.channel.clone())
            .wait_execution(request)
            .await?;
        Ok(answer.into_inner())
    }

    /// Asks for an execution to be cancelled.
    pub async fn cancel(&self, operation: &str) {
        let name = operation.to_owned();
        let request = self.request(CancelOperationRequest { name });
        let mut client = OperationsClient::new(self.channel.clone());
        client.cancel_operation(request).await.unwrap();
    }

    /// Asks whether the outputs of `result` are still there, as buildbox-casd does when it has
    /// answered a lookup of `action` itself.
    pub async fn confirm(&self, action: Digest, result: &ActionResult) {
        let outputs = result.output_files.iter();
        let mut request = self.request(FindMissingBlobsRequest {
            instance_name: self.instance.clone(),
            blob_digests: outputs.filter_map(|file| file.digest.clone()).collect(),
            ..FindMissingBlobsRequest::default()
        });
        let metadata = self.metadata.to_bytes().unwrap();
        let mut metadata = RequestMetadata::decode(metadata).unwrap();
        if let Some(tool) = &mut metadata.tool_details {
            tool.tool_name.push_str(" (via buildbox-casd)");
        }
        metadata.action_id = action.to_string();
        let key = tonic::metadata::BinaryMetadataKey::from_static(REQUEST_METADATA_KEY);
        let metadata = MetadataValue::from_bytes(&metadata.encode_to_vec());
        request.metadata_mut().insert_bin(key, metadata);
        let answer = ContentAddressableStorageClient::new(self.channel.clone())
            .find_missing_blobs(request)
            .await
            .unwrap();
        assert!(answer.into_inner().missing_blob_digests.is_empty());
    }

    /// Looks up, else uploads and executes. What the action wrote is left to the caller.
    pub async fn run(&self, action: &Action) -> (Way, ActionResult) {
        if let Ok(result) = self.lookup(action.digest).await {
            return (Way::Found, result);
        }
        self.upload(action).await;
        let operations = self.execute(action.digest, false).await.unwrap();
        (Way::Executed, last(operations).await.result.unwrap())
    }

    /// Ends the build's process.
    pub fn end(self) {
        drop(self);
    }
}

impl Drop for Build {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            drop(process.stdin.take());
            let _ = process.wait();
        }
    }
}

impl Action {
    pub fn of(
        command: Digest,
        root: Digest,
        output: &str,
        do_not_cache: bool,
        mut blobs: HashMap<Digest, Bytes>,
    ) -> Self {
        let action = reapi::Action {
            command_digest: Some(command.to_proto()),
            input_root_digest: Some(root.to_proto()),
            do_not_cache,
            ..reapi::Action::default()
        };
        Action {
            digest: keep_under(root.function(), &mut blobs, action.encode_to_vec().into()),
            blobs,
            output: output.to_owned(),
        }
    }
}

pub fn command_of(words: &str, output: &str, blobs: &mut HashMap<Digest, Bytes>) -> Digest {
    command_under(DigestFunction::Sha256, words, output, blobs)
}

fn command_under(
    function: DigestFunction,
    words: &str,
    output: &str,
    blobs: &mut HashMap<Digest, Bytes>,
) -> Digest {
    let command = reapi::Command {
        arguments: words.split(' ').map(str::to_owned).collect(),
        output_paths: vec![output.to_owned()],
        ..reapi::Command::default()
    };
    keep_under(function, blobs, command.encode_to_vec().into())
}

/// A channel that connects to the Unix socket `server` when it is first used.
pub fn connect(server: &Path) -> Channel {
    let server = server.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let server = server.clone();
        async move {
            tokio::net::UnixStream::connect(server)
                .await
                .map(TokioIo::new)
        }
    });
    Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector)
}

/// Puts a blob with the others.
pub fn keep(blobs: &mut HashMap<Digest, Bytes>, blob: Bytes) -> Digest {
    keep_under(DigestFunction::Sha256, blobs, blob)
}

fn keep_under(function: DigestFunction, blobs: &mut HashMap<Digest, Bytes>, blob: Bytes) -> Digest {
    let digest = function.of(&blob);
    blobs.insert(digest, blob);
    digest
}

/// The canonical tree of `files`, by path. Returns its root.
pub fn tree(files: &[(String, Bytes)], blobs: &mut HashMap<Digest, Bytes>) -> Digest {
    tree_under(DigestFunction::Sha256, files, blobs)
}

fn tree_under(
    function: DigestFunction,
    files: &[(String, Bytes)],
    blobs: &mut HashMap<Digest, Bytes>,
) -> Digest {
    let mut directory = Directory::default();
    let mut below: std::collections::BTreeMap<String, Vec<(String, Bytes)>> = Default::default();
    for (path, content) in files {
        match path.split_once('/') {
            Some((name, rest)) => below
                .entry(name.to_owned())
                .or_default()
                .push((rest.to_owned(), content.clone())),
            None => directory.files.push(FileNode {
                name: path.clone(),
                digest: Some(keep_under(function, blobs, content.clone()).to_proto()),
                ..FileNode::default()
            }),
        }
    }
    directory
        .files
        .sort_by(|one, other| one.name.cmp(&other.name));
    for (name, files) in below {
        directory.directories.push(DirectoryNode {
            name,
            digest: Some(tree_under(function, &files, blobs).to_proto()),
        });
    }
    keep_under(function, blobs, directory.encode_to_vec().into())
}

/// The response of an operation that must end well.
pub async fn last(mut operations: Streaming<Operation>) -> ExecuteResponse {
    let mut last = None;
    while let Some(operation) = operations.message().await.unwrap() {
        last = Some(operation);
    }
    response(&last.expect("at least one operation")).expect("the last operation is done")
}

/// The response in an operation, once it is done.
pub fn response(operation: &Operation) -> Option<ExecuteResponse> {
    match &operation.result {
        Some(operation::Result::Response(any)) => {
            Some(ExecuteResponse::decode(any.value.as_slice()).unwrap())
        }
        _ => None,
    }
}
