//! The calls that the peers exchange, as messages with gRPC's prefix: lookups of a fixed set of
//! actions (so that no state need pass from the process that uploads them to those that ask),
//! reads, and writes.

use std::collections::HashMap;

use base64::Engine as _;
use bytes::{BufMut, Bytes, BytesMut};
use primed::digest::{Digest, DigestFunction};
use primed::reapi::google::bytestream::{ReadRequest, ReadResponse, WriteRequest, WriteResponse};
use primed::reapi::google::rpc::Status;
use primed::reapi::{
    Action, ActionResult, BatchReadBlobsRequest, BatchReadBlobsResponse, BatchUpdateBlobsRequest,
    Command, Directory, GetActionResultRequest, OutputFile, RequestMetadata, ServerCapabilities,
    ToolDetails, UpdateActionResultRequest, batch_read_blobs_response, batch_update_blobs_request,
};
use prost::Message;

pub const LOOKUP: &str = "/build.bazel.remote.execution.v2.ActionCache/GetActionResult";
pub const UPDATE_RESULT: &str = "/build.bazel.remote.execution.v2.ActionCache/UpdateActionResult";
pub const CAPABILITIES: &str = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities";
pub const BATCH_READ: &str =
    "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchReadBlobs";
pub const BATCH_UPDATE: &str =
    "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchUpdateBlobs";
pub const READ: &str = "/google.bytestream.ByteStream/Read";
pub const WRITE: &str = "/google.bytestream.ByteStream/Write";
/// A small call that means nothing to a proxy.
pub const ECHO: &str = "/primed.bench.Peer/Echo";
/// A call that is answered with headers at once, and with the rest when its request ends.
pub const HOLD: &str = "/primed.bench.Peer/Hold";

/// How many bytes each message of a read holds; the fast server obeys it, others ignore it.
pub const MESSAGE_SIZE_KEY: &str = "primed-bench-message-size";
pub const REQUEST_METADATA_KEY: &str = "build.bazel.remote.execution.v2.requestmetadata-bin";

/// How many actions there are to look up.
pub const ACTIONS: usize = 64;

const SHA256: DigestFunction = DigestFunction::Sha256;

/// An action, all that the CAS must hold for it, and its result.
pub struct Seeded {
    pub action: Digest,
    pub blobs: Vec<(Digest, Bytes)>,
    pub result: ActionResult,
}

/// The compile of file number `index`, as recc would have sent it.
pub fn seeded(index: usize) -> Seeded {
    let command = Command {
        arguments: ["cc", "-O2", "-c", "-o"]
            .map(String::from)
            .into_iter()
            .chain([format!("f{index}.o"), format!("f{index}.c")])
            .collect(),
        output_paths: vec![format!("f{index}.o")],
        ..Command::default()
    };
    let command = SHA256.of_message(&command);
    let root = SHA256.of_message(&Directory::default());
    let action = SHA256.of_message(&Action {
        command_digest: Some(command.0.to_proto()),
        input_root_digest: Some(root.0.to_proto()),
        ..Action::default()
    });
    let object = Bytes::from(format!("object {index}"));
    let object = (Digest::of(&object), object);
    let result = ActionResult {
        output_files: vec![OutputFile {
            path: format!("f{index}.o"),
            digest: Some(object.0.to_proto()),
            ..OutputFile::default()
        }],
        ..ActionResult::default()
    };
    Seeded {
        action: action.0,
        blobs: vec![command, root, action, object],
        result,
    }
}

/// `message` with gRPC's prefix: not compressed, its length.
pub fn framed(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(5 + length);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    framed.extend_from_slice(&message.encode_to_vec());
    framed.freeze()
}

/// What a framed message holds, or an empty message where it cannot be decoded.
pub fn unframed<M: Message + Default>(framed: &[u8]) -> M {
    framed
        .get(5..)
        .and_then(|message| M::decode(message).ok())
        .unwrap_or_default()
}

/// The lookup of one seeded action.
pub fn lookup(index: usize) -> Bytes {
    framed(&GetActionResultRequest {
        action_digest: Some(seeded(index).action.to_proto()),
        ..GetActionResultRequest::default()
    })
}

/// A lookup that no backend can answer.
pub fn lookup_of_nothing(salt: u64) -> Bytes {
    let digest = Digest::of(&salt.to_be_bytes());
    framed(&GetActionResultRequest {
        action_digest: Some(digest.to_proto()),
        ..GetActionResultRequest::default()
    })
}

/// Uploads all that the seeded action needs.
pub fn upload_of(seeded: &Seeded) -> Bytes {
    let blobs = seeded.blobs.iter();
    let requests = blobs.map(|(digest, data)| batch_update_blobs_request::Request {
        digest: Some(digest.to_proto()),
        data: data.clone(),
        ..Default::default()
    });
    framed(&BatchUpdateBlobsRequest {
        requests: requests.collect(),
        ..BatchUpdateBlobsRequest::default()
    })
}

/// Puts the seeded action's result into the action cache.
pub fn update_of(seeded: &Seeded) -> Bytes {
    framed(&UpdateActionResultRequest {
        action_digest: Some(seeded.action.to_proto()),
        action_result: Some(seeded.result.clone()),
        ..UpdateActionResultRequest::default()
    })
}

/// The answer to a lookup: always the first action's result.
pub fn lookup_answer() -> Bytes {
    framed(&seeded(0).result)
}

pub fn capabilities_answer() -> Bytes {
    framed(&ServerCapabilities::default())
}

/// All seeded blobs, for a server that has them without being told.
pub fn seeded_blobs() -> HashMap<Digest, Bytes> {
    (0..ACTIONS).flat_map(|index| seeded(index).blobs).collect()
}

/// Answers `BatchReadBlobs` out of `blobs`.
pub fn batch_read_answer(blobs: &HashMap<Digest, Bytes>, request: &[u8]) -> Bytes {
    let request: BatchReadBlobsRequest = unframed(request);
    let responses = request.digests.into_iter().map(|proto| {
        let data = SHA256
            .read(Some(&proto))
            .ok()
            .and_then(|digest| blobs.get(&digest).cloned());
        let missing = Status {
            code: 5,
            ..Status::default()
        };
        batch_read_blobs_response::Response {
            digest: Some(proto),
            status: data.is_none().then_some(missing),
            data: data.unwrap_or_default(),
            ..Default::default()
        }
    });
    framed(&BatchReadBlobsResponse {
        responses: responses.collect(),
    })
}

/// Reads ask for a blob by this.
pub fn blob_name(digest: Digest) -> String {
    let digest = digest.to_proto();
    format!("{}/{}", digest.hash, digest.size_bytes)
}

/// Asks for the blob `hash/size`.
pub fn read_of(blob: &str) -> Bytes {
    framed(&ReadRequest {
        resource_name: format!("blobs/{blob}"),
        ..ReadRequest::default()
    })
}

/// How many bytes the blob has that a read asks for, by the end of its name.
pub fn size_read(request: &[u8]) -> usize {
    let request: ReadRequest = unframed(request);
    let size = request.resource_name.rsplit('/').next();
    size.and_then(|size| size.parse().ok()).unwrap_or(0)
}

/// One message of a read, with `size` bytes.
pub fn read_message(size: usize) -> Bytes {
    framed(&ReadResponse {
        data: vec![0x5a; size].into(),
    })
}

/// The first message of a write of `size` bytes of nothing in particular.
pub fn write_head(size: usize) -> Bytes {
    framed(&WriteRequest {
        resource_name: format!(
            "uploads/00000000-0000-4000-8000-000000000000/blobs/{:064}/{size}",
            0
        ),
        ..WriteRequest::default()
    })
}

/// A later message of a write, with `size` bytes.
pub fn write_message(size: usize) -> Bytes {
    framed(&WriteRequest {
        data: vec![0x5a; size].into(),
        ..WriteRequest::default()
    })
}

/// All messages of a write of `blob`, as the backend wants them.
pub fn write_of(blob: &Bytes) -> Vec<Bytes> {
    const MESSAGE: usize = 256 << 10;
    let (digest, upload) = (Digest::of(blob), uuid::Uuid::new_v4());
    let messages = (0..blob.len()).step_by(MESSAGE).map(|offset| {
        let end = blob.len().min(offset + MESSAGE);
        framed(&WriteRequest {
            resource_name: format!("uploads/{upload}/blobs/{}", blob_name(digest)),
            write_offset: i64::try_from(offset).unwrap_or(i64::MAX),
            finish_write: end == blob.len(),
            data: blob.slice(offset..end),
        })
    });
    messages.collect()
}

/// The digest of what a read brought, message by message.
pub fn digest_read(mut body: Bytes) -> Digest {
    let mut blob = BytesMut::new();
    while body.len() >= 5 {
        let length = 5 + u32::from_be_bytes([body[1], body[2], body[3], body[4]]) as usize;
        let message = body.split_to(length.min(body.len()));
        blob.extend_from_slice(&unframed::<ReadResponse>(&message).data);
    }
    Digest::of(&blob)
}

pub fn write_answer(received: usize) -> Bytes {
    framed(&WriteResponse {
        committed_size: i64::try_from(received).unwrap_or(i64::MAX),
    })
}

/// What recc sends with each call, so that a proxy that reads it has that to read.
pub fn request_metadata() -> String {
    let metadata = RequestMetadata {
        tool_details: Some(ToolDetails {
            tool_name: "recc".into(),
            tool_version: "1.4.30".into(),
        }),
        action_id: format!("{}/142", "5a".repeat(32)),
        tool_invocation_id: format!("bench:{}", std::process::id()),
        ..RequestMetadata::default()
    };
    base64::engine::general_purpose::STANDARD_NO_PAD.encode(metadata.encode_to_vec())
}
