//! What a CAS and an action cache do, by the protocol: the same claims about the embedded backend and
//! about a real buildbox-casd, both behind primed. Where casd differs, the claim says so, and how.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::HashSet;

use bytes::Bytes;
use primed::cas::{Digest, DigestFunction};
use primed::reapi;
use primed::reapi::action_cache_client::ActionCacheClient;
use primed::reapi::build::bazel::remote::execution::v2::*;
use primed::reapi::capabilities_client::CapabilitiesClient;
use primed::reapi::content_addressable_storage_client::ContentAddressableStorageClient;
use primed::reapi::google::bytestream::byte_stream_client::ByteStreamClient;
use primed::reapi::google::bytestream::{QueryWriteStatusRequest, ReadRequest, WriteRequest};
use prost::Message;
use tempfile::TempDir;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::client::connect;
use crate::support::{Casd, Primed, scratch};

/// Each claim about each backend.
macro_rules! protocol {
    ($($claim:ident),* $(,)?) => {
        mod embedded {
            $(#[tokio::test]
            async fn $claim() {
                super::$claim(super::Server::embedded()).await;
            })*
        }
        mod casd {
            $(#[tokio::test]
            async fn $claim() {
                super::$claim(super::Server::casd()).await;
            })*
        }
    };
}

protocol! {
    what_is_uploaded_in_a_batch_is_found_and_read_back,
    a_blob_of_a_batch_that_is_not_what_it_is_said_to_be_is_refused_alone,
    the_empty_blob_is_always_there,
    a_batch_beyond_the_limit_is_refused,
    what_is_no_digest_is_refused,
    a_large_blob_is_streamed_up_and_down,
    a_part_of_a_blob_can_be_read_and_nothing_beyond_its_end,
    a_blob_that_is_absent_is_not_found,
    an_upload_that_is_not_what_it_is_said_to_be_is_refused_and_leaves_nothing,
    an_upload_of_what_is_there_ends_at_once_and_well,
    an_interrupted_upload_goes_on_where_it_stopped,
    names_of_resources_that_are_none_are_refused,
    blobs_are_compressed_on_the_wire_both_ways,
    a_compressed_blob_that_is_not_what_it_is_said_to_be_is_refused,
    a_tree_is_listed_with_each_directory_in_it,
    a_result_is_found_once_it_is_there_and_while_its_outputs_are,
    outputs_are_inlined_where_that_is_asked_for,
    capabilities_say_what_there_is,
    an_instance_may_have_slashes_in_its_name,
}

struct Server {
    is_casd: bool,
    channel: Channel,
    _primed: Primed,
    _casd: Option<Casd>,
    _scratch: TempDir,
}

impl Server {
    fn embedded() -> Self {
        let scratch = scratch();
        let primed = Primed::embedded(scratch.path(), &[]);
        Server::behind(primed, None, scratch)
    }

    fn casd() -> Self {
        let scratch = scratch();
        let casd = Casd::start(scratch.path(), 1);
        let primed = Primed::start(scratch.path(), &casd.address());
        Server::behind(primed, Some(casd), scratch)
    }

    fn behind(primed: Primed, casd: Option<Casd>, scratch: TempDir) -> Self {
        Server {
            is_casd: casd.is_some(),
            channel: connect(&primed.socket()),
            _primed: primed,
            _casd: casd,
            _scratch: scratch,
        }
    }

    fn cas(&self) -> ContentAddressableStorageClient<Channel> {
        ContentAddressableStorageClient::new(self.channel.clone())
            .max_encoding_message_size(64 << 20)
            .max_decoding_message_size(64 << 20)
    }

    fn byte_stream(&self) -> ByteStreamClient<Channel> {
        ByteStreamClient::new(self.channel.clone())
    }

    fn action_cache(&self) -> ActionCacheClient<Channel> {
        ActionCacheClient::new(self.channel.clone())
    }

    async fn capabilities(&self) -> ServerCapabilities {
        let mut client = CapabilitiesClient::new(self.channel.clone());
        let request = GetCapabilitiesRequest::default();
        client.get_capabilities(request).await.unwrap().into_inner()
    }

    async fn missing(&self, digests: &[Digest]) -> Vec<Digest> {
        let request = FindMissingBlobsRequest {
            blob_digests: digests.iter().map(|digest| digest.to_proto()).collect(),
            ..FindMissingBlobsRequest::default()
        };
        let answer = self.cas().find_missing_blobs(request).await.unwrap();
        let missing = answer.into_inner().missing_blob_digests;
        let missing = missing
            .iter()
            .map(|digest| Digest::try_from(digest).unwrap());
        missing.collect()
    }

    /// The codes of the blobs, in order.
    async fn batch_update(&self, requests: Vec<batch_update_blobs_request::Request>) -> Vec<Code> {
        let digests: Vec<_> = requests.iter().map(|one| one.digest.clone()).collect();
        let request = BatchUpdateBlobsRequest {
            requests,
            ..BatchUpdateBlobsRequest::default()
        };
        let answer = self.cas().batch_update_blobs(request).await.unwrap();
        let answers = answer.into_inner().responses;
        let code = |digest: &Option<reapi::Digest>| {
            let answer = answers.iter().find(|answer| answer.digest == *digest);
            let status = answer.unwrap().status.as_ref();
            Code::from(status.map_or(0, |status| status.code))
        };
        digests.iter().map(code).collect()
    }

    async fn keep(&self, content: &[u8]) -> Digest {
        let digest = Digest::of(content);
        assert_eq!(
            self.batch_update(vec![plain(digest, content)]).await,
            [Code::Ok]
        );
        digest
    }

    async fn keep_message(&self, message: &impl Message) -> Digest {
        self.keep(&message.encode_to_vec()).await
    }

    async fn batch_read(
        &self,
        digests: &[Digest],
        compressors: &[compressor::Value],
    ) -> Vec<batch_read_blobs_response::Response> {
        let request = BatchReadBlobsRequest {
            digests: digests.iter().map(|digest| digest.to_proto()).collect(),
            acceptable_compressors: compressors.iter().map(|one| *one as i32).collect(),
            ..BatchReadBlobsRequest::default()
        };
        let answer = self.cas().batch_read_blobs(request).await.unwrap();
        let answers = answer.into_inner().responses;
        let of = |digest: &Digest| {
            let digest = Some(digest.to_proto());
            let answer = answers.iter().find(|answer| answer.digest == digest);
            answer.unwrap().clone()
        };
        digests.iter().map(of).collect()
    }

    async fn read(&self, name: String, offset: i64, limit: i64) -> Result<Vec<u8>, Status> {
        let request = ReadRequest {
            resource_name: name,
            read_offset: offset,
            read_limit: limit,
        };
        let mut stream = self.byte_stream().read(request).await?.into_inner();
        let mut content = Vec::new();
        while let Some(piece) = stream.message().await? {
            content.extend_from_slice(&piece.data);
        }
        Ok(content)
    }

    /// The committed size.
    async fn write(&self, messages: Vec<WriteRequest>) -> Result<i64, Status> {
        let answer = self
            .byte_stream()
            .write(tokio_stream::iter(messages))
            .await?;
        Ok(answer.into_inner().committed_size)
    }

    async fn status(&self, name: &str) -> Result<(i64, bool), Status> {
        let request = QueryWriteStatusRequest {
            resource_name: name.to_owned(),
        };
        let answer = self.byte_stream().query_write_status(request).await?;
        let answer = answer.into_inner();
        Ok((answer.committed_size, answer.complete))
    }

    async fn lookup(&self, action: Digest) -> Result<ActionResult, Status> {
        let request = GetActionResultRequest {
            action_digest: Some(action.to_proto()),
            ..GetActionResultRequest::default()
        };
        Ok(self
            .action_cache()
            .get_action_result(request)
            .await?
            .into_inner())
    }

    async fn update(&self, action: Digest, result: &ActionResult) -> Result<ActionResult, Status> {
        let request = UpdateActionResultRequest {
            action_digest: Some(action.to_proto()),
            action_result: Some(result.clone()),
            ..UpdateActionResultRequest::default()
        };
        let answer = self.action_cache().update_action_result(request).await?;
        Ok(answer.into_inner())
    }
}

fn plain(digest: Digest, content: &[u8]) -> batch_update_blobs_request::Request {
    batch_update_blobs_request::Request {
        digest: Some(digest.to_proto()),
        data: content.to_vec().into(),
        ..batch_update_blobs_request::Request::default()
    }
}

fn compressed(digest: Digest, content: &[u8]) -> batch_update_blobs_request::Request {
    batch_update_blobs_request::Request {
        digest: Some(digest.to_proto()),
        data: zstd::bulk::compress(content, 1).unwrap().into(),
        compressor: compressor::Value::Zstd as i32,
    }
}

/// Content of any length that does not repeat itself soon.
fn content(length: usize) -> Vec<u8> {
    let bytes = (0u32..).flat_map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes());
    bytes.take(length).collect()
}

/// Messages that write `content` in pieces, from `offset` on; the last one ends the write.
fn pieces(name: &str, content: &[u8], offset: usize) -> Vec<WriteRequest> {
    const PIECE: usize = 100_000;
    let mut messages = Vec::new();
    let mut at = offset;
    loop {
        let end = content.len().min(at + PIECE);
        messages.push(WriteRequest {
            resource_name: if at == offset {
                name.to_owned()
            } else {
                String::new()
            },
            write_offset: at as i64,
            finish_write: end == content.len(),
            data: content[at..end].to_vec().into(),
        });
        at = end;
        if at == content.len() {
            return messages;
        }
    }
}

fn upload_name(digest: Digest) -> String {
    format!("uploads/6d1f3a52-0000-4000-8000-000000000001/blobs/{digest}")
}

fn code<T: std::fmt::Debug>(result: Result<T, Status>) -> Code {
    result.unwrap_err().code()
}

async fn what_is_uploaded_in_a_batch_is_found_and_read_back(server: Server) {
    let contents: Vec<Vec<u8>> = [1, 100, 4096, 1_000_000].map(content).into();
    let digests: Vec<Digest> = contents.iter().map(|one| Digest::of(one)).collect();
    assert_eq!(server.missing(&digests).await, digests);
    let requests = contents.iter().zip(&digests);
    let requests = requests
        .map(|(content, digest)| plain(*digest, content))
        .collect();
    assert_eq!(server.batch_update(requests).await, [Code::Ok; 4]);
    assert_eq!(server.missing(&digests).await, []);
    let read = server.batch_read(&digests, &[]).await;
    let read: Vec<Bytes> = read.into_iter().map(|answer| answer.data).collect();
    assert_eq!(read, contents);
}

async fn a_blob_of_a_batch_that_is_not_what_it_is_said_to_be_is_refused_alone(server: Server) {
    let [good, wrong, short] = [b"good!", b"wrong", b"short"].map(|one| Digest::of(one));
    let requests = vec![
        plain(wrong, b"gnorw"),
        plain(good, b"good!"),
        plain(short, b"shor"),
    ];
    let codes = server.batch_update(requests).await;
    assert_eq!(
        codes,
        [Code::InvalidArgument, Code::Ok, Code::InvalidArgument]
    );
    assert_eq!(server.missing(&[good, wrong, short]).await, [wrong, short]);
    let codes = server.batch_read(&[wrong, good], &[]).await;
    let codes = codes
        .iter()
        .map(|answer| answer.status.as_ref().map_or(0, |one| one.code));
    assert_eq!(codes.collect::<Vec<_>>(), [Code::NotFound as i32, 0]);
}

async fn the_empty_blob_is_always_there(server: Server) {
    let empty = Digest::of(b"");
    assert_eq!(server.missing(&[empty]).await, []);
    let read = server.batch_read(&[empty], &[]).await;
    assert_eq!(read[0].status.as_ref().map_or(0, |status| status.code), 0);
    assert_eq!(
        server.read(format!("blobs/{empty}"), 0, 0).await.unwrap(),
        b""
    );
    assert_eq!(
        server
            .write(pieces(&upload_name(empty), b"", 0))
            .await
            .unwrap(),
        0
    );
}

async fn a_batch_beyond_the_limit_is_refused(server: Server) {
    let limit = server.capabilities().await.cache_capabilities.unwrap();
    let limit = usize::try_from(limit.max_batch_total_size_bytes).unwrap();
    if server.is_casd {
        // casd names no limit; the one of a gRPC message remains.
        assert_eq!(limit, 0);
        return;
    }
    assert!(limit > 1_000_000, "{limit}");
    let content = content(limit + 1);
    let digest = Digest::of(&content);
    let request = BatchUpdateBlobsRequest {
        requests: vec![plain(digest, &content)],
        ..BatchUpdateBlobsRequest::default()
    };
    let updated = server.cas().batch_update_blobs(request).await;
    let kept = server
        .write(pieces(&upload_name(digest), &content, 0))
        .await;
    assert_eq!(kept.unwrap(), content.len() as i64);
    let request = BatchReadBlobsRequest {
        digests: vec![digest.to_proto()],
        ..BatchReadBlobsRequest::default()
    };
    let read = server.cas().batch_read_blobs(request).await;
    assert_eq!(code(read), Code::InvalidArgument);
    assert_eq!(code(updated), Code::InvalidArgument);
}

async fn what_is_no_digest_is_refused(server: Server) {
    let good = Digest::of(b"x").to_proto();
    let upper = good.hash.to_uppercase();
    for (hash, size_bytes) in [
        ("", 1),
        (&good.hash[1..], 1),
        (upper.as_str(), 1),
        (&good.hash, -1),
    ] {
        let odd = reapi::Digest {
            hash: hash.to_owned(),
            size_bytes,
        };
        let request = FindMissingBlobsRequest {
            blob_digests: vec![odd.clone()],
            ..FindMissingBlobsRequest::default()
        };
        let found = server.cas().find_missing_blobs(request).await;
        let request = GetActionResultRequest {
            action_digest: Some(odd.clone()),
            ..GetActionResultRequest::default()
        };
        let looked_up = server.action_cache().get_action_result(request).await;
        if server.is_casd {
            // casd looks for whatever it is asked for, and does not find it.
            assert!(found.is_ok_and(|found| found.get_ref().missing_blob_digests == [odd]));
            assert!(looked_up.is_err());
        } else {
            assert_eq!(code(found), Code::InvalidArgument, "{hash}/{size_bytes}");
            assert_eq!(
                code(looked_up),
                Code::InvalidArgument,
                "{hash}/{size_bytes}"
            );
        }
    }
}

async fn a_large_blob_is_streamed_up_and_down(server: Server) {
    let content = content(9_000_001);
    let digest = Digest::of(&content);
    let size = server
        .write(pieces(&upload_name(digest), &content, 0))
        .await
        .unwrap();
    assert_eq!(size, content.len() as i64);
    assert_eq!(server.missing(&[digest]).await, []);
    let read = server.read(format!("blobs/{digest}"), 0, 0).await.unwrap();
    assert!(read == content);
}

async fn a_part_of_a_blob_can_be_read_and_nothing_beyond_its_end(server: Server) {
    let content = content(1_000_000);
    let digest = server.keep(&content).await;
    let name = format!("blobs/{digest}");
    for (offset, limit) in [
        (0, 1),
        (10, 10),
        (999_990, 0),
        (500_000, 400_000),
        (0, 1_000_000),
    ] {
        let end = if limit == 0 {
            content.len()
        } else {
            offset + limit
        };
        let read = server.read(name.clone(), offset as i64, limit as i64).await;
        assert!(read.unwrap() == content[offset..end], "{offset} {limit}");
    }
    let read = server.read(name.clone(), 1, 2_000_000).await;
    match server.is_casd {
        // casd calls a limit beyond the end an error.
        true => assert_eq!(code(read), Code::InvalidArgument),
        false => assert!(read.unwrap() == content[1..]),
    }
    let read = server.read(name.clone(), 1_000_000, 0).await;
    assert_eq!(read.unwrap(), b"");
    for offset in [1_000_001, -1] {
        let read = server.read(name.clone(), offset, 0).await;
        assert_eq!(code(read), Code::OutOfRange, "{offset}");
    }
    let read = server.read(name, 0, -1).await;
    assert_eq!(code(read), Code::InvalidArgument);
}

async fn a_blob_that_is_absent_is_not_found(server: Server) {
    let absent = Digest::of(b"absent");
    let read = server.read(format!("blobs/{absent}"), 0, 0).await;
    assert_eq!(code(read), Code::NotFound);
    let present = server.keep(b"present").await;
    let hash = present.to_proto().hash;
    let read = server.read(format!("blobs/{hash}/8"), 0, 0).await;
    assert_eq!(code(read), Code::NotFound, "another size is another blob");
    assert_eq!(code(server.lookup(absent).await), Code::NotFound);
}

async fn an_upload_that_is_not_what_it_is_said_to_be_is_refused_and_leaves_nothing(server: Server) {
    let right = content(300_000);
    let digest = Digest::of(&right);
    let name = upload_name(digest);
    let mut flipped = right.clone();
    flipped[150_000] ^= 1;
    for wrong in [flipped, right[1..].to_vec(), content(300_001), Vec::new()] {
        let written = server.write(pieces(&name, &wrong, 0)).await;
        assert_eq!(
            code(written),
            Code::InvalidArgument,
            "{} bytes",
            wrong.len()
        );
        assert_eq!(server.missing(&[digest]).await, [digest]);
    }
    let written = server.write(pieces(&name, &right, 0)).await;
    assert_eq!(written.unwrap(), 300_000);
    assert_eq!(server.missing(&[digest]).await, []);
}

async fn an_upload_of_what_is_there_ends_at_once_and_well(server: Server) {
    let content = content(2_000_000);
    let digest = server.keep(&content).await;
    let first = pieces(&upload_name(digest), &content, 0).swap_remove(0);
    // The rest never comes.
    let (sender, messages) = tokio::sync::mpsc::channel(1);
    sender.send(first).await.unwrap();
    let messages = tokio_stream::wrappers::ReceiverStream::new(messages);
    let answer = server.byte_stream().write(messages).await.unwrap();
    assert_eq!(answer.into_inner().committed_size, 2_000_000);
}

async fn an_interrupted_upload_goes_on_where_it_stopped(server: Server) {
    let content = content(500_000);
    let digest = Digest::of(&content);
    let name = upload_name(digest);
    if server.is_casd {
        // casd begins each upload anew, and says so by not knowing the call.
        assert_eq!(code(server.status(&name).await), Code::Unimplemented);
        return;
    }
    assert_eq!(server.status(&name).await.unwrap(), (0, false));
    let mut messages = pieces(&name, &content, 0);
    messages.truncate(2);
    assert_eq!(server.write(messages).await.unwrap(), 200_000);
    assert_eq!(server.status(&name).await.unwrap(), (200_000, false));
    let elsewhere = server.write(pieces(&name, &content, 100_000)).await;
    assert_eq!(code(elsewhere), Code::InvalidArgument);
    let written = server.write(pieces(&name, &content, 200_000)).await;
    assert_eq!(written.unwrap(), 500_000);
    assert_eq!(server.status(&name).await.unwrap(), (500_000, true));
    assert_eq!(server.missing(&[digest]).await, []);
}

async fn names_of_resources_that_are_none_are_refused(server: Server) {
    let digest = server.keep(b"content").await;
    let refused = |code: Code| match server.is_casd {
        // For some of them casd fails without a word.
        true => matches!(code, Code::InvalidArgument | Code::Unknown),
        false => code == Code::InvalidArgument,
    };
    for name in ["", "blobs", "blobs/x/y", "nothing/of/that"] {
        let code = code(server.read(name.to_owned(), 0, 0).await);
        assert!(refused(code), "read '{name}': {code:?}");
    }
    for name in [format!("blobs/{digest}"), "uploads/u/blobs/x/1".to_owned()] {
        let code = code(server.write(pieces(&name, b"content", 0)).await);
        assert!(refused(code), "write '{name}': {code:?}");
    }
}

async fn blobs_are_compressed_on_the_wire_both_ways(server: Server) {
    let capabilities = server.capabilities().await.cache_capabilities.unwrap();
    let zstd = compressor::Value::Zstd;
    let compresses = capabilities.supported_compressors.contains(&(zstd as i32));
    // casd compresses on its way to a remote only.
    assert_eq!(compresses, !server.is_casd);
    if !compresses {
        return;
    }
    let large = [content(700_000), vec![7; 3_000_000]].concat();
    let small = vec![5; 10_000];
    let (digest, small_digest) = (Digest::of(&large), Digest::of(&small));
    let stream = zstd::bulk::compress(&large, 1).unwrap();
    let name = format!("uploads/u-1/compressed-blobs/zstd/{digest}");
    let size = server.write(pieces(&name, &stream, 0)).await.unwrap();
    assert!(
        size == stream.len() as i64 || size == -1 || size == large.len() as i64,
        "{size}"
    );
    let codes = server
        .batch_update(vec![compressed(small_digest, &small)])
        .await;
    assert_eq!(codes, [Code::Ok]);
    assert_eq!(server.missing(&[digest, small_digest]).await, []);
    assert!(server.read(format!("blobs/{digest}"), 0, 0).await.unwrap() == large);
    let name = format!("compressed-blobs/zstd/{digest}");
    let read = server.read(name.clone(), 0, 0).await.unwrap();
    assert!(read.len() < large.len());
    assert!(zstd::stream::decode_all(read.as_slice()).unwrap() == large);
    let read = server.read(name.clone(), 3_600_000, 0).await.unwrap();
    assert!(zstd::stream::decode_all(read.as_slice()).unwrap() == large[3_600_000..]);
    let limited = server.read(name, 0, 10).await;
    assert_eq!(code(limited), Code::InvalidArgument);
    let read = server.batch_read(&[small_digest], &[zstd]).await;
    let data = &read[0].data;
    match read[0].compressor == zstd as i32 {
        true => assert!(zstd::stream::decode_all(data.as_ref()).unwrap() == small),
        false => assert!(data == &small),
    }
}

async fn a_compressed_blob_that_is_not_what_it_is_said_to_be_is_refused(server: Server) {
    let right = vec![5; 10_000];
    let digest = Digest::of(&right);
    let mut odd = compressed(digest, &right);
    odd.data = b"this is no frame".as_slice().into();
    let bomb = compressed(digest, &vec![0; 50_000_000]);
    let cut = {
        let mut cut = compressed(digest, &right);
        cut.data.truncate(cut.data.len() - 2);
        cut
    };
    for (what, request) in [("odd", odd), ("bomb", bomb), ("cut", cut)] {
        let data = request.data.to_vec();
        let codes = server.batch_update(vec![request]).await;
        assert_ne!(codes, [Code::Ok], "{what}");
        let name = format!("uploads/u-2/compressed-blobs/zstd/{digest}");
        let written = server.write(pieces(&name, &data, 0)).await;
        assert!(written.is_err(), "{what}");
        if !server.is_casd {
            assert_eq!(codes, [Code::InvalidArgument], "{what}");
            assert_eq!(code(written), Code::InvalidArgument, "{what}");
        }
    }
    assert_eq!(server.missing(&[digest]).await, [digest]);
}

async fn a_tree_is_listed_with_each_directory_in_it(server: Server) {
    let file = server.keep(b"a file").await;
    let named = |name: String, child: Digest| DirectoryNode {
        name,
        digest: Some(child.to_proto()),
    };
    let leaf = |name: String| Directory {
        files: vec![FileNode {
            name,
            digest: Some(file.to_proto()),
            ..FileNode::default()
        }],
        ..Directory::default()
    };
    let mut root = Directory::default();
    let mut expected = HashSet::new();
    for number in 0..30 {
        // Each leaf stands in the tree twice.
        let leaf = server.keep_message(&leaf(format!("f{number}"))).await;
        let middle = Directory {
            directories: vec![named("leaf".to_owned(), leaf)],
            ..Directory::default()
        };
        let middle = server.keep_message(&middle).await;
        root.directories.push(named(format!("a{number:02}"), leaf));
        root.directories
            .push(named(format!("b{number:02}"), middle));
        expected.extend([leaf, middle]);
    }
    root.directories
        .sort_by(|one, other| one.name.cmp(&other.name));
    let root = server.keep_message(&root).await;
    expected.insert(root);
    let listed = async |page_size, page_token: String| {
        let request = GetTreeRequest {
            root_digest: Some(root.to_proto()),
            page_size,
            page_token,
            ..GetTreeRequest::default()
        };
        let mut pages = server.cas().get_tree(request).await.unwrap().into_inner();
        let mut all: Vec<GetTreeResponse> = Vec::new();
        while let Some(page) = pages.message().await.unwrap() {
            all.push(page);
        }
        all
    };
    let digests = |pages: &[GetTreeResponse]| {
        let directories = pages.iter().flat_map(|page| &page.directories);
        directories
            .map(|one| Digest::of(&one.encode_to_vec()))
            .collect::<Vec<_>>()
    };
    let pages = listed(0, String::new()).await;
    assert_eq!(HashSet::from_iter(digests(&pages)), expected);
    assert_eq!(pages.last().unwrap().next_page_token, "");
    if !server.is_casd {
        // casd takes no notice of pages, and names a directory as often as it stands there.
        assert_eq!(digests(&pages).len(), expected.len());
        let pages = listed(7, String::new()).await;
        assert!(pages.iter().all(|page| page.directories.len() <= 7));
        assert_eq!(HashSet::from_iter(digests(&pages)), expected);
        let rest = listed(7, pages[2].next_page_token.clone()).await;
        assert_eq!(digests(&rest), digests(&pages[3..]));
    }
    let request = GetTreeRequest {
        root_digest: Some(Digest::of(b"absent").to_proto()),
        ..GetTreeRequest::default()
    };
    let absent = match server.cas().get_tree(request).await {
        Ok(pages) => pages.into_inner().message().await.map(drop),
        Err(status) => Err(status),
    };
    assert_eq!(code(absent), Code::NotFound);
}

async fn a_result_is_found_once_it_is_there_and_while_its_outputs_are(server: Server) {
    let output = server.keep(b"output").await;
    let absent = Digest::of(b"never uploaded");
    let tree = Tree {
        root: Some(Directory {
            files: vec![FileNode {
                name: "f".to_owned(),
                digest: Some(absent.to_proto()),
                ..FileNode::default()
            }],
            ..Directory::default()
        }),
        ..Tree::default()
    };
    let tree = server.keep_message(&tree).await;
    let action = Digest::of(b"an action");
    let complete = ActionResult {
        output_files: vec![OutputFile {
            path: "out/f.o".to_owned(),
            digest: Some(output.to_proto()),
            is_executable: true,
            ..OutputFile::default()
        }],
        stdout_raw: b"said".as_slice().into(),
        exit_code: 0,
        ..ActionResult::default()
    };
    assert_eq!(code(server.lookup(action).await), Code::NotFound);
    server.update(action, &complete).await.unwrap();
    assert_eq!(server.lookup(action).await.unwrap(), complete);
    let replaced = ActionResult {
        exit_code: 3,
        ..complete.clone()
    };
    server.update(action, &replaced).await.unwrap();
    assert_eq!(server.lookup(action).await.unwrap(), replaced);
    let incomplete = Digest::of(b"another action");
    let result = ActionResult {
        output_directories: vec![OutputDirectory {
            path: "out".to_owned(),
            tree_digest: Some(tree.to_proto()),
            ..OutputDirectory::default()
        }],
        ..complete
    };
    let updated = server.update(incomplete, &result).await;
    if !server.is_casd {
        // casd keeps it, and looks for its outputs when it is asked for it.
        assert_eq!(code(updated), Code::FailedPrecondition);
    }
    assert_eq!(code(server.lookup(incomplete).await), Code::NotFound);
}

async fn outputs_are_inlined_where_that_is_asked_for(server: Server) {
    let [out, err, file] = [
        server.keep(b"to stdout").await,
        server.keep(b"to stderr").await,
        server.keep(b"in a file").await,
    ];
    let result = ActionResult {
        output_files: ["a", "b"]
            .map(|path| OutputFile {
                path: path.to_owned(),
                digest: Some(file.to_proto()),
                ..OutputFile::default()
            })
            .into(),
        stdout_digest: Some(out.to_proto()),
        stderr_digest: Some(err.to_proto()),
        ..ActionResult::default()
    };
    let action = Digest::of(b"an action");
    server.update(action, &result).await.unwrap();
    let request = GetActionResultRequest {
        action_digest: Some(action.to_proto()),
        inline_stdout: true,
        inline_stderr: true,
        inline_output_files: vec!["b".to_owned(), "absent".to_owned()],
        ..GetActionResultRequest::default()
    };
    let found = server.action_cache().get_action_result(request).await;
    let mut expected = result.clone();
    if !server.is_casd {
        // A server may decline, and casd does.
        expected.stdout_raw = b"to stdout".as_slice().into();
        expected.stderr_raw = b"to stderr".as_slice().into();
        expected.output_files[1].contents = b"in a file".as_slice().into();
    }
    assert_eq!(found.unwrap().into_inner(), expected);
    assert_eq!(server.lookup(action).await.unwrap(), result);
}

async fn capabilities_say_what_there_is(server: Server) {
    let capabilities = server.capabilities().await;
    let cache = capabilities.cache_capabilities.unwrap();
    assert!(
        cache
            .action_cache_update_capabilities
            .unwrap()
            .update_enabled
    );
    let functions: Vec<DigestFunction> = cache
        .digest_functions
        .iter()
        .map(|value| DigestFunction::from_proto(*value).unwrap())
        .collect();
    assert!(functions.contains(&DigestFunction::Sha256));
    // casd speaks the one it was started with.
    assert_eq!(functions.len() > 1, !server.is_casd);
    for function in functions {
        let digest = function.of(b"content");
        let request = BatchUpdateBlobsRequest {
            requests: vec![plain(digest, b"content")],
            digest_function: function.to_proto(),
            ..BatchUpdateBlobsRequest::default()
        };
        let answer = server.cas().batch_update_blobs(request).await.unwrap();
        let status = answer.into_inner().responses.swap_remove(0).status;
        assert_eq!(status.map_or(0, |status| status.code), 0, "{function}");
        let name = format!("blobs/{}", digest.resource());
        assert_eq!(server.read(name, 0, 0).await.unwrap(), b"content");
    }
    let request = FindMissingBlobsRequest {
        blob_digests: vec![Digest::of(b"x").to_proto()],
        digest_function: digest_function::Value::Vso as i32,
        ..FindMissingBlobsRequest::default()
    };
    let unknown = server.cas().find_missing_blobs(request).await;
    assert_eq!(code(unknown), Code::InvalidArgument);
    let low = capabilities.low_api_version.unwrap();
    // casd says that it begins with 2.1, and so Bazel 7 refuses it.
    assert_eq!((low.major, low.minor), (2, i32::from(server.is_casd)));
    assert!(capabilities.high_api_version.unwrap().minor >= 3);
}

async fn an_instance_may_have_slashes_in_its_name(server: Server) {
    let content = b"content";
    let digest = Digest::of(content);
    let request = FindMissingBlobsRequest {
        instance_name: "some/inner/instance".to_owned(),
        blob_digests: vec![digest.to_proto()],
        ..FindMissingBlobsRequest::default()
    };
    let found = server.cas().find_missing_blobs(request).await;
    if server.is_casd {
        // casd has the instances that it was told of.
        assert_eq!(code(found), Code::InvalidArgument);
        return;
    }
    found.unwrap();
    let name = format!("some/inner/instance/{}/some/file.c", upload_name(digest));
    assert_eq!(server.write(pieces(&name, content, 0)).await.unwrap(), 7);
    let name = format!("some/inner/instance/blobs/{digest}");
    assert_eq!(server.read(name, 0, 0).await.unwrap(), content);
    let action = Digest::of(b"an action");
    let result = ActionResult {
        exit_code: 7,
        ..ActionResult::default()
    };
    let request = UpdateActionResultRequest {
        instance_name: "some/inner".to_owned(),
        action_digest: Some(action.to_proto()),
        action_result: Some(result.clone()),
        ..UpdateActionResultRequest::default()
    };
    server
        .action_cache()
        .update_action_result(request)
        .await
        .unwrap();
    for (instance, found) in [("some/inner", true), ("some", false), ("", false)] {
        let request = GetActionResultRequest {
            instance_name: instance.to_owned(),
            action_digest: Some(action.to_proto()),
            ..GetActionResultRequest::default()
        };
        let looked_up = server.action_cache().get_action_result(request).await;
        assert_eq!(looked_up.is_ok(), found, "'{instance}'");
    }
}
