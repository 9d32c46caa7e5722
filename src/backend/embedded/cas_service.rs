//! The CAS as a service, but for streams of single blobs: these are `byte_stream`'s.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status, async_trait};

use super::blobs::Blobs;
use super::compression::{compress, decompress};
use super::requests::{MAX_BATCH, digest, function, on_disk, only_digest, status_within};
use crate::digest::{Digest, DigestFunction};
use crate::reapi::compressor::Value as Compressor;
use crate::reapi::content_addressable_storage_server::ContentAddressableStorage;
use crate::reapi::{
    BatchReadBlobsRequest, BatchReadBlobsResponse, BatchUpdateBlobsRequest,
    BatchUpdateBlobsResponse, Directory, FindMissingBlobsRequest, FindMissingBlobsResponse,
    GetTreeRequest, GetTreeResponse, batch_read_blobs_response, batch_update_blobs_request,
    batch_update_blobs_response,
};
use crate::task;

/// Blobs below this many bytes are not worth compressing.
const WORTHWHILE: usize = 512;
/// How many directories one message has at most, and about how many bytes.
const MAX_PAGE: usize = 1000;
const PAGE_BYTES: usize = 512 * 1024;

/// The service.
pub(super) struct CasService {
    pub blobs: Arc<Blobs>,
}

#[async_trait]
impl ContentAddressableStorage for CasService {
    async fn find_missing_blobs(
        &self,
        request: Request<FindMissingBlobsRequest>,
    ) -> Result<Response<FindMissingBlobsResponse>, Status> {
        let request = request.into_inner();
        let function = function(request.digest_function, request.blob_digests.first())?;
        let blobs = self.blobs.clone();
        let find = move || {
            let mut missing = Vec::new();
            for proto in request.blob_digests {
                if !blobs.contains(digest(function, Some(&proto))?) {
                    missing.push(proto);
                }
            }
            Ok(FindMissingBlobsResponse {
                missing_blob_digests: missing,
            })
        };
        on_disk("find missing", find).await.map(Response::new)
    }

    async fn batch_update_blobs(
        &self,
        request: Request<BatchUpdateBlobsRequest>,
    ) -> Result<Response<BatchUpdateBlobsResponse>, Status> {
        let request = request.into_inner();
        let first = request.requests.first();
        let first = first.and_then(|request| request.digest.as_ref());
        let function = function(request.digest_function, first)?;
        let sizes = request.requests.iter().map(|one| one.data.len() as u64);
        refuse_large(sizes)?;
        let blobs = self.blobs.clone();
        let update = move || {
            let responses = request.requests.into_iter().map(|request| {
                let status = status_within(take_in(&blobs, function, &request));
                batch_update_blobs_response::Response {
                    digest: request.digest,
                    status,
                }
            });
            Ok(BatchUpdateBlobsResponse {
                responses: responses.collect(),
            })
        };
        on_disk("batch update", update).await.map(Response::new)
    }

    async fn batch_read_blobs(
        &self,
        request: Request<BatchReadBlobsRequest>,
    ) -> Result<Response<BatchReadBlobsResponse>, Status> {
        let request = request.into_inner();
        let function = function(request.digest_function, request.digests.first())?;
        let sizes = request.digests.iter().map(|digest| digest.size_bytes);
        refuse_large(sizes.map(|size| u64::try_from(size).unwrap_or(0)))?;
        let zstd = request
            .acceptable_compressors
            .contains(&(Compressor::Zstd as i32));
        let blobs = self.blobs.clone();
        let read = move || {
            let responses = request.digests.into_iter().map(|proto| {
                let read =
                    digest(function, Some(&proto)).and_then(|digest| Ok(blobs.read_now(digest)?));
                let (content, status) = match read {
                    Ok(content) => (content, Ok(())),
                    Err(status) => (Bytes::new(), Err(status)),
                };
                let (data, compressor) = packed(content, zstd);
                batch_read_blobs_response::Response {
                    digest: Some(proto),
                    data,
                    compressor: compressor as i32,
                    status: status_within(status),
                }
            });
            Ok(BatchReadBlobsResponse {
                responses: responses.collect(),
            })
        };
        on_disk("batch read", read).await.map(Response::new)
    }

    async fn get_tree(
        &self,
        request: Request<GetTreeRequest>,
    ) -> Result<Response<BoxStream<GetTreeResponse>>, Status> {
        let request = request.into_inner();
        let root = only_digest(request.digest_function, request.root_digest.as_ref())?;
        let given = match request.page_token.as_str() {
            "" => 0,
            token => token.parse().map_err(|_| {
                Status::invalid_argument(format!("the page token '{token}' is not of this server"))
            })?,
        };
        let page = match usize::try_from(request.page_size) {
            Ok(0) => MAX_PAGE,
            Ok(size) => size.min(MAX_PAGE),
            Err(_) => return Err(Status::invalid_argument("the page size is negative")),
        };
        let mut walk = Walk::new(self.blobs.clone(), root);
        let (mut walk, first) = on_disk("tree", move || {
            walk.skip(given)?;
            let first = walk.page(page)?;
            Ok((walk, first))
        })
        .await?;
        let (pages, receiver) = mpsc::channel(1);
        task::spawn("tree", async move {
            let mut next = Ok(first);
            loop {
                let ends = !matches!(&next, Ok(page) if !page.next_page_token.is_empty());
                // A client that has gone away needs no more.
                if pages.send(next).await.is_err() || ends {
                    return;
                }
                let walked = on_disk("tree", move || {
                    let next = walk.page(page);
                    Ok((walk, next))
                });
                (walk, next) = match walked.await {
                    Ok(walked) => walked,
                    Err(_) => return,
                };
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

fn refuse_large(sizes: impl Iterator<Item = u64>) -> Result<(), Status> {
    let total = sizes.fold(0, u64::saturating_add);
    match total > MAX_BATCH {
        true => Err(Status::invalid_argument(format!(
            "the blobs of the batch come to {total} bytes, and may come to {MAX_BATCH} \
             (max_batch_total_size_bytes); split it, or use ByteStream"
        ))),
        false => Ok(()),
    }
}

fn take_in(
    blobs: &Blobs,
    function: DigestFunction,
    request: &batch_update_blobs_request::Request,
) -> Result<(), Status> {
    let digest = digest(function, request.digest.as_ref())?;
    match Compressor::try_from(request.compressor) {
        Ok(Compressor::Identity) => Ok(blobs.write_now(digest, &request.data)?),
        Ok(Compressor::Zstd) => {
            let content = decompress(digest, &request.data)?;
            Ok(blobs.write_now(digest, &content)?)
        }
        _ => Err(Status::invalid_argument(format!(
            "the compressor {} is not supported; IDENTITY (0) and ZSTD (1) are",
            request.compressor
        ))),
    }
}

/// `content` as it is to be sent: compressed if that is welcome and worth it.
fn packed(content: Bytes, zstd: bool) -> (Bytes, Compressor) {
    if zstd
        && content.len() >= WORTHWHILE
        && let Ok(compressed) = compress(&content)
        && compressed.len() < content.len()
    {
        return (compressed.into(), Compressor::Zstd);
    }
    (content, Compressor::Identity)
}

/// A tree, directory by directory, each once; always in the same order. What is not in the CAS is
/// left out, except for the root.
struct Walk {
    blobs: Arc<Blobs>,
    root: Digest,
    due: VecDeque<Digest>,
    seen: HashSet<Digest>,
    given: usize,
}

impl Walk {
    fn new(blobs: Arc<Blobs>, root: Digest) -> Self {
        Walk {
            blobs,
            root,
            due: VecDeque::from([root]),
            seen: HashSet::from([root]),
            given: 0,
        }
    }

    /// The next directory, and the size of its message.
    fn next(&mut self) -> Result<Option<(Directory, usize)>, Status> {
        while let Some(digest) = self.due.pop_front() {
            let encoded = match self.blobs.read_now(digest) {
                Ok(encoded) => encoded,
                Err(error) if digest == self.root => return Err(error.into()),
                Err(_) => continue,
            };
            let size = encoded.len();
            let no_directory =
                || Status::invalid_argument(format!("the blob {digest} is no directory"));
            let directory = Directory::decode(encoded).map_err(|_| no_directory())?;
            for child in &directory.directories {
                let child = digest.function().read(child.digest.as_ref());
                let child = child.map_err(|_| no_directory())?;
                if self.seen.insert(child) {
                    self.due.push_back(child);
                }
            }
            self.given += 1;
            return Ok(Some((directory, size)));
        }
        Ok(None)
    }

    fn skip(&mut self, count: usize) -> Result<(), Status> {
        for _ in 0..count {
            self.next()?;
        }
        Ok(())
    }

    fn page(&mut self, most: usize) -> Result<GetTreeResponse, Status> {
        let mut page = GetTreeResponse::default();
        let mut bytes = 0;
        while page.directories.len() < most && bytes < PAGE_BYTES {
            let Some((directory, size)) = self.next()? else {
                break;
            };
            bytes += size;
            page.directories.push(directory);
        }
        if !self.due.is_empty() {
            page.next_page_token = self.given.to_string();
        }
        Ok(page)
    }
}
