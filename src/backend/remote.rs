//! A `Backend` that is a remote service. Its stubs are tonic's; their calls go the way of the
//! forwarded ones, over an `Upstream`.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use bytes::{Buf, Bytes};
use http::header::{HeaderValue, USER_AGENT};
use http::uri::PathAndQuery;
use prost::Message;
use tokio_stream::StreamExt;
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic::codegen::Service;
use tonic::metadata::{BinaryMetadataKey, MetadataValue};
use tonic::{Code, Request, Status, async_trait};
use tonic_prost::ProstEncoder;

use super::exchange::Answer;
use super::upstream::{Head, Upstream};
use super::{Backend, Operations};
use crate::digest::{Digest, DigestFunction};
use crate::http2::body::Body;
use crate::http2::fields::Fields;
use crate::reapi::action_cache_client::ActionCacheClient;
use crate::reapi::capabilities_client::CapabilitiesClient;
use crate::reapi::content_addressable_storage_client::ContentAddressableStorageClient;
use crate::reapi::google::bytestream::byte_stream_client::ByteStreamClient;
use crate::reapi::google::bytestream::{ReadRequest, WriteRequest};
use crate::reapi::google::longrunning::CancelOperationRequest;
use crate::reapi::google::longrunning::operations_client::OperationsClient;
use crate::reapi::{
    ActionResult, BatchReadBlobsRequest, BatchUpdateBlobsRequest, ExecuteRequest, ExecutionPolicy,
    FindMissingBlobsRequest, GetActionResultRequest, GetCapabilitiesRequest, RequestMetadata,
    ServerCapabilities, ToolDetails, UpdateActionResultRequest, batch_update_blobs_request,
};

/// The largest message primed accepts on its own calls. Batches are kept far smaller; an
/// `ExecuteResponse` with inlined outputs may be large.
const MAX_MESSAGE: usize = 64 * 1024 * 1024;
/// How much of a blob one `WriteRequest` carries.
const WRITE_CHUNK: usize = 256 * 1024;
const OWN_USER_AGENT: HeaderValue =
    HeaderValue::from_static(concat!("primed/", env!("CARGO_PKG_VERSION")));
/// REAPI's header for `RequestMetadata`.
pub const REQUEST_METADATA_KEY: &str = "build.bazel.remote.execution.v2.requestmetadata-bin";

/// A remote execution service.
pub struct Remote {
    caller: Caller,
}

impl Remote {
    /// A client of `upstream`, to be used on one runtime.
    pub fn new(upstream: Upstream) -> Self {
        let caller = Caller(Arc::new(upstream));
        Remote { caller }
    }

    fn cas(&self) -> ContentAddressableStorageClient<Caller> {
        ContentAddressableStorageClient::new(self.caller.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    fn byte_stream(&self) -> ByteStreamClient<Caller> {
        ByteStreamClient::new(self.caller.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
}

/// What tonic's stubs call through.
#[derive(Clone)]
struct Caller(Arc<Upstream>);

impl Service<http::Request<tonic::body::Body>> for Caller {
    type Response = http::Response<Box<Answer>>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Status>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let upstream = self.0.clone();
        let (parts, body) = request.into_parts();
        Box::pin(async move {
            let path = parts.uri.into_parts().path_and_query;
            let mut head = Head {
                method: parts.method,
                path: path.unwrap_or_else(|| PathAndQuery::from_static("/")),
                headers: Fields::from(&parts.headers),
            };
            head.headers.insert(USER_AGENT, OWN_USER_AGENT);
            let answer = upstream.call(head, Body::made(body)).await;
            let mut answer = answer.map_err(|error| Status::unavailable(error.to_string()))?;
            let head = std::mem::take(&mut answer.head);
            let mut response = http::Response::new(answer);
            *response.status_mut() = head.status;
            *response.headers_mut() = head.headers.to_map();
            Ok(response)
        })
    }
}

/// Wraps `message` with the `RequestMetadata` that names primed, and the action it is about.
fn request<T>(message: T, action: Option<Digest>) -> Request<T> {
    let metadata = RequestMetadata {
        tool_details: Some(ToolDetails {
            tool_name: env!("CARGO_PKG_NAME").to_owned(),
            tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        }),
        action_id: action.map(|digest| digest.to_string()).unwrap_or_default(),
        ..RequestMetadata::default()
    };
    let mut request = Request::new(message);
    request.metadata_mut().insert_bin(
        BinaryMetadataKey::from_static(REQUEST_METADATA_KEY),
        MetadataValue::from_bytes(&metadata.encode_to_vec()),
    );
    request
}

/// Reads the `RequestMetadata` out of a header value; `None` where it is absent or malformed.
pub fn decode_request_metadata(header: &http::HeaderValue) -> Option<RequestMetadata> {
    // gRPC lets senders pad or not; several values may be joined by commas, the first one counts.
    let text = header.as_bytes().split(|byte| *byte == b',').next()?;
    let text = text.trim_ascii_end();
    let unpadded = text
        .strip_suffix(b"==")
        .or(text.strip_suffix(b"="))
        .unwrap_or(text);
    let bytes = STANDARD_NO_PAD.decode(unpadded).ok()?;
    RequestMetadata::decode(bytes.as_slice()).ok()
}

fn resource_prefix(instance: &str) -> String {
    if instance.is_empty() {
        String::new()
    } else {
        format!("{instance}/")
    }
}

/// The function of digests that one request is about.
fn function_of(first: Option<&Digest>) -> DigestFunction {
    first.map(Digest::function).unwrap_or_default()
}

fn malformed(what: impl std::fmt::Display) -> Status {
    Status::internal(format!("the backend's answer is malformed: {what}"))
}

#[async_trait]
impl Backend for Remote {
    async fn capabilities(&self, instance: &str) -> Result<ServerCapabilities, Status> {
        let message = GetCapabilitiesRequest {
            instance_name: instance.to_owned(),
        };
        let answer = CapabilitiesClient::new(self.caller.clone())
            .get_capabilities(request(message, None))
            .await?;
        Ok(answer.into_inner())
    }

    async fn find_missing(
        &self,
        instance: &str,
        digests: &[Digest],
    ) -> Result<Vec<Digest>, Status> {
        let function = function_of(digests.first());
        let message = FindMissingBlobsRequest {
            instance_name: instance.to_owned(),
            blob_digests: digests.iter().map(|digest| digest.to_proto()).collect(),
            digest_function: function.to_proto(),
        };
        let answer = self
            .cas()
            .find_missing_blobs(request(message, None))
            .await?;
        answer
            .into_inner()
            .missing_blob_digests
            .iter()
            .map(|digest| function.read(Some(digest)).map_err(malformed))
            .collect()
    }

    async fn read_batch(
        &self,
        instance: &str,
        digests: &[Digest],
    ) -> Result<Vec<(Digest, Bytes)>, Status> {
        let function = function_of(digests.first());
        let message = BatchReadBlobsRequest {
            instance_name: instance.to_owned(),
            digests: digests.iter().map(|digest| digest.to_proto()).collect(),
            digest_function: function.to_proto(),
            ..BatchReadBlobsRequest::default()
        };
        let answer = self.cas().batch_read_blobs(request(message, None)).await?;
        let mut blobs = Vec::with_capacity(digests.len());
        for response in answer.into_inner().responses {
            let code = response.status.map_or(0, |status| status.code);
            if code == Code::Ok as i32 {
                let digest = response.digest.as_ref();
                let digest = function.read(digest).map_err(malformed)?;
                blobs.push((digest, response.data));
            } else if code != Code::NotFound as i32 {
                return Err(Status::new(
                    Code::from(code),
                    "a blob of a batch cannot be read",
                ));
            }
        }
        Ok(blobs)
    }

    async fn read(&self, instance: &str, digest: Digest) -> Result<Bytes, Status> {
        let message = ReadRequest {
            resource_name: format!("{}blobs/{}", resource_prefix(instance), digest.resource()),
            ..ReadRequest::default()
        };
        let mut stream = self
            .byte_stream()
            .read(request(message, None))
            .await?
            .into_inner();
        let mut blob = Vec::new();
        while let Some(part) = stream.message().await? {
            if (blob.len() + part.data.len()) as u64 > digest.size() {
                return Err(malformed("a blob is longer than its digest says"));
            }
            blob.extend_from_slice(&part.data);
        }
        Ok(blob.into())
    }

    async fn write_batch(&self, instance: &str, blobs: &[(Digest, Bytes)]) -> Result<(), Status> {
        let message = BatchUpdateBlobsRequest {
            instance_name: instance.to_owned(),
            requests: blobs
                .iter()
                .map(|(digest, data)| batch_update_blobs_request::Request {
                    digest: Some(digest.to_proto()),
                    data: data.clone(),
                    ..batch_update_blobs_request::Request::default()
                })
                .collect(),
            digest_function: function_of(blobs.first().map(|(digest, _)| digest)).to_proto(),
        };
        let answer = self
            .cas()
            .batch_update_blobs(request(message, None))
            .await?;
        for response in answer.into_inner().responses {
            let status = response.status.unwrap_or_default();
            if status.code != Code::Ok as i32 {
                return Err(Status::new(Code::from(status.code), status.message));
            }
        }
        Ok(())
    }

    async fn write(&self, instance: &str, digest: Digest, blob: Bytes) -> Result<(), Status> {
        let name = format!(
            "{}uploads/{}/blobs/{}",
            resource_prefix(instance),
            uuid::Uuid::new_v4(),
            digest.resource()
        );
        let chunks = blob.len().div_ceil(WRITE_CHUNK).max(1);
        let parts = (0..chunks).map(move |index| {
            let start = index * WRITE_CHUNK;
            let end = (start + WRITE_CHUNK).min(blob.len());
            WriteRequest {
                // REAPI wants the name on the first message only.
                resource_name: if index == 0 {
                    name.clone()
                } else {
                    String::new()
                },
                write_offset: start as i64,
                finish_write: index + 1 == chunks,
                data: blob.slice(start..end),
            }
        });
        let answer = self
            .byte_stream()
            .write(request(tokio_stream::iter(parts), None))
            .await?;
        // A server that already holds the blob may answer early, with the full size or with -1.
        let committed = answer.into_inner().committed_size;
        if committed == -1 || committed == digest.size() as i64 {
            Ok(())
        } else {
            Err(malformed(format!(
                "{committed} bytes of {digest} were committed"
            )))
        }
    }

    async fn action_result(
        &self,
        instance: &str,
        action: Digest,
    ) -> Result<Option<ActionResult>, Status> {
        let message = GetActionResultRequest {
            instance_name: instance.to_owned(),
            action_digest: Some(action.to_proto()),
            digest_function: action.function().to_proto(),
            ..GetActionResultRequest::default()
        };
        match ActionCacheClient::new(self.caller.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .get_action_result(request(message, Some(action)))
            .await
        {
            Ok(answer) => Ok(Some(answer.into_inner())),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(status),
        }
    }

    async fn update_action_result(
        &self,
        instance: &str,
        action: Digest,
        result: ActionResult,
    ) -> Result<(), Status> {
        let message = UpdateActionResultRequest {
            instance_name: instance.to_owned(),
            action_digest: Some(action.to_proto()),
            action_result: Some(result),
            digest_function: action.function().to_proto(),
            ..UpdateActionResultRequest::default()
        };
        ActionCacheClient::new(self.caller.clone())
            .update_action_result(request(message, Some(action)))
            .await?;
        Ok(())
    }

    async fn execute(
        &self,
        instance: &str,
        action: Digest,
        priority: i32,
    ) -> Result<Operations, Status> {
        let message = ExecuteRequest {
            instance_name: instance.to_owned(),
            action_digest: Some(action.to_proto()),
            execution_policy: Some(ExecutionPolicy { priority }),
            digest_function: action.function().to_proto(),
            ..ExecuteRequest::default()
        };
        let mut grpc =
            tonic::client::Grpc::new(self.caller.clone()).max_decoding_message_size(MAX_MESSAGE);
        grpc.ready().await?;
        let path = PathAndQuery::from_static("/build.bazel.remote.execution.v2.Execution/Execute");
        let answer = grpc
            .server_streaming(request(message, Some(action)), path, RawAnswers)
            .await?;
        Ok(Box::pin(answer.into_inner().map(|message| message)) as Pin<Box<_>>)
    }

    async fn cancel(&self, operation: &str) -> Result<(), Status> {
        let message = CancelOperationRequest {
            name: operation.to_owned(),
        };
        OperationsClient::new(self.caller.clone())
            .cancel_operation(request(message, None))
            .await?;
        Ok(())
    }
}

/// Encodes an `ExecuteRequest`, and leaves the answers as they came: clients that join see the
/// backend's own bytes.
#[derive(Clone, Copy, Default)]
struct RawAnswers;

impl Codec for RawAnswers {
    type Encode = ExecuteRequest;
    type Decode = Bytes;
    type Encoder = ProstEncoder<ExecuteRequest>;
    type Decoder = RawAnswers;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        *self
    }
}

impl Decoder for RawAnswers {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(source.copy_to_bytes(source.remaining())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_metadata_is_read_padded_and_unpadded() {
        let metadata = RequestMetadata {
            tool_invocation_id: "host:12".to_owned(),
            ..RequestMetadata::default()
        };
        let bytes = metadata.encode_to_vec();
        for text in [
            STANDARD_NO_PAD.encode(&bytes),
            base64::engine::general_purpose::STANDARD.encode(&bytes),
        ] {
            let header = http::HeaderValue::from_str(&text).unwrap();
            assert_eq!(decode_request_metadata(&header), Some(metadata.clone()));
        }
        let garbage = http::HeaderValue::from_static("***");
        assert_eq!(decode_request_metadata(&garbage), None);
    }
}
