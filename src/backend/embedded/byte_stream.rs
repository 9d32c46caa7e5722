//! Single blobs of any size as streams. What is in memory of one is a few pieces.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::blobs::{BlobWriter, Blobs};
use super::compression::{Compressor, Decompressor};
use super::errors::WriteError;
use super::requests::on_disk;
use super::resource_name::ResourceName;
use super::uploads::{Turn, Uploads};
use crate::reapi::google::bytestream::byte_stream_server::ByteStream;
use crate::reapi::google::bytestream::{
    QueryWriteStatusRequest, QueryWriteStatusResponse, ReadRequest, ReadResponse, WriteRequest,
    WriteResponse,
};
use crate::task;

/// How much of a blob one message carries: with what is around it, one HTTP/2 frame.
const PIECE: usize = 256 * 1024 - 64;

/// The service.
pub(super) struct ByteStreamService {
    pub blobs: Arc<Blobs>,
    pub uploads: Arc<Uploads>,
}

#[async_trait]
impl ByteStream for ByteStreamService {
    async fn read(
        &self,
        request: Request<ReadRequest>,
    ) -> Result<Response<BoxStream<ReadResponse>>, Status> {
        let request = request.into_inner();
        let name = ResourceName::to_read(&request.resource_name)?;
        let size = name.digest.size();
        let offset = u64::try_from(request.read_offset).ok();
        let offset = offset.filter(|offset| *offset <= size).ok_or_else(|| {
            Status::out_of_range(format!(
                "the blob has {size} bytes, and cannot be read from byte {}",
                request.read_offset
            ))
        })?;
        let limit = match u64::try_from(request.read_limit) {
            Ok(0) => size,
            Ok(_) if name.compressed => {
                return Err(Status::invalid_argument(
                    "a compressed read cannot have a read_limit",
                ));
            }
            Ok(limit) => limit,
            Err(_) => return Err(Status::invalid_argument("the read_limit is negative")),
        };
        let left = limit.min(size - offset);
        let blobs = self.blobs.clone();
        let opened = on_disk("blob open", move || {
            let mut file = blobs.open_verified_now(name.digest)?;
            file.seek(SeekFrom::Start(offset)).map_err(unreadable)?;
            let compressor = name.compressed.then(Compressor::new);
            let compressor = compressor.transpose().map_err(unreadable)?;
            Ok(Pieces {
                file,
                left,
                compressor,
            })
        });
        let mut pieces = opened.await?;
        let (sender, receiver) = mpsc::channel(1);
        task::spawn("blob read", async move {
            loop {
                let read = on_disk("blob read", move || {
                    let piece = pieces.next()?;
                    Ok((pieces, piece))
                });
                let message = match read.await {
                    Ok((_, None)) => return,
                    Ok((rest, Some(data))) => {
                        pieces = rest;
                        Ok(ReadResponse { data })
                    }
                    Err(status) => {
                        // A client that has gone away does not care.
                        let _ = sender.send(Err(status)).await;
                        return;
                    }
                };
                if sender.send(message).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteRequest>>,
    ) -> Result<Response<WriteResponse>, Status> {
        let mut stream = request.into_inner();
        let Some(first) = stream.message().await? else {
            return Err(Status::invalid_argument("the write is empty"));
        };
        let resource = first.resource_name.clone();
        let name = ResourceName::to_write(&resource)?;
        let size = name.digest.size();
        let (blobs, uploads, offset) =
            (self.blobs.clone(), self.uploads.clone(), first.write_offset);
        let opening = resource.clone();
        let opened = on_disk("upload", move || {
            if blobs.contains(name.digest) {
                uploads.close(&opening);
                return Ok(None);
            }
            let now = Instant::now();
            uploads
                .open(&blobs, &opening, name.digest, offset, now)
                .map(Some)
        });
        let Some(turn) = opened.await? else {
            // Whoever sees the full size, or -1, knows that nothing more is wanted.
            let committed_size = if name.compressed { -1 } else { size as i64 };
            return Ok(Response::new(WriteResponse { committed_size }));
        };
        let decompressor = name.compressed.then(Decompressor::new).transpose();
        let mut incoming = Incoming {
            turn: Arc::new(turn),
            decompressor: decompressor.map_err(unreadable)?,
            offset: first.write_offset,
            resource,
        };
        let mut next = Some(first);
        while let Some(message) = next {
            let (data, finish) = match incoming.check(message) {
                Ok(checked) => checked,
                Err(status) => {
                    self.uploads.close(&incoming.resource);
                    return Err(status);
                }
            };
            let taking = on_disk("upload", move || {
                let taken = incoming.take_in(&data, finish);
                Ok((incoming, taken))
            });
            let taken;
            (incoming, taken) = taking.await?;
            match taken {
                Ok(Progress::Complete) => {
                    self.uploads.close(&incoming.resource);
                    let committed_size = match name.compressed {
                        true => incoming.offset,
                        false => size as i64,
                    };
                    return Ok(Response::new(WriteResponse { committed_size }));
                }
                Ok(Progress::More) => {}
                Err(status) => {
                    self.uploads.close(&incoming.resource);
                    return Err(status);
                }
            }
            // What breaks the stream, does not end the upload: it may be resumed.
            next = stream.message().await?;
        }
        // It ended without a last message. What is there stays, to go on from.
        Ok(Response::new(WriteResponse {
            committed_size: self.uploads.written(&incoming.resource) as i64,
        }))
    }

    async fn query_write_status(
        &self,
        request: Request<QueryWriteStatusRequest>,
    ) -> Result<Response<QueryWriteStatusResponse>, Status> {
        let resource = request.into_inner().resource_name;
        let name = ResourceName::to_write(&resource)?;
        let (blobs, uploads) = (self.blobs.clone(), self.uploads.clone());
        let query = move || {
            let complete = blobs.contains(name.digest);
            let committed = match complete {
                true => name.digest.size(),
                false => uploads.written(&resource),
            };
            Ok(QueryWriteStatusResponse {
                committed_size: committed as i64,
                complete,
            })
        };
        on_disk("upload status", query).await.map(Response::new)
    }
}

enum Progress {
    More,
    Complete,
}

/// One stream that feeds an upload.
struct Incoming {
    turn: Arc<Turn>,
    decompressor: Option<Decompressor>,
    /// Where the next message should begin.
    offset: i64,
    resource: String,
}

impl Incoming {
    fn check(&mut self, message: WriteRequest) -> Result<(Bytes, bool), Status> {
        if !message.resource_name.is_empty() && message.resource_name != self.resource {
            return Err(Status::invalid_argument(
                "the messages of one write name different resources",
            ));
        }
        if message.write_offset != self.offset {
            return Err(Status::invalid_argument(format!(
                "a message begins at byte {}, where byte {} should follow",
                message.write_offset, self.offset
            )));
        }
        self.offset += message.data.len() as i64;
        Ok((message.data, message.finish_write))
    }

    fn take_in(&mut self, data: &[u8], finish: bool) -> Result<Progress, Status> {
        let decompressor = &mut self.decompressor;
        self.turn.with(|upload| {
            let Some(writer) = upload else {
                return Ok(Progress::More);
            };
            match decompressor {
                Some(decompressor) => decompressor.push(data, |piece| writer.append(piece))?,
                None => writer.append(data)?,
            }
            if !finish {
                return Ok(Progress::More);
            }
            if let Some(decompressor) = decompressor {
                decompressor.finish()?;
            }
            if let Some(writer) = upload.take() {
                complete(writer)?;
            }
            Ok(Progress::Complete)
        })
    }
}

fn complete(writer: BlobWriter) -> Result<(), Status> {
    let (digest, written) = (writer.digest(), writer.written());
    if written < digest.size() {
        return Err(Status::invalid_argument(format!(
            "the write of {digest} was finished after {written} bytes"
        )));
    }
    writer.complete().map_err(|error: WriteError| error.into())
}

/// What is left to send of a blob.
struct Pieces {
    file: File,
    left: u64,
    compressor: Option<Compressor>,
}

impl Pieces {
    fn next(&mut self) -> Result<Option<Bytes>, Status> {
        while self.left > 0 {
            let mut piece = vec![0; self.left.min(PIECE as u64) as usize];
            self.file.read_exact(&mut piece).map_err(unreadable)?;
            self.left -= piece.len() as u64;
            let Some(compressor) = &mut self.compressor else {
                return Ok(Some(piece.into()));
            };
            let compressed = compressor.push(&piece).map_err(unreadable)?;
            if !compressed.is_empty() {
                return Ok(Some(compressed.into()));
            }
        }
        let rest = self.compressor.take().map(Compressor::finish);
        let rest = rest.transpose().map_err(unreadable)?;
        Ok(rest.map(Bytes::from))
    }
}

fn unreadable(error: std::io::Error) -> Status {
    Status::internal(format!("the blob cannot be read: {error}"))
}
