//! What is to be written next, in pieces: small ones are copied together, large ones pass by
//! reference count, and all leave in as few writes as the socket allows.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::AsyncWrite;

use super::frame::{FrameHeader, flag, kind};

/// Data of at most this size is copied.
const COPIED: usize = 4 * 1024;
/// From so many bytes on, it is time to write.
const FULL: usize = 256 * 1024;
/// How many pieces one write takes.
const PIECES: usize = 64;
/// Memory that is kept from one write to the next.
const KEPT: usize = 4 * 1024;

/// See the module.
#[derive(Default)]
pub struct Outbox {
    pieces: VecDeque<Bytes>,
    /// Behind those.
    tail: Vec<u8>,
    /// What of it has been written.
    written: usize,
    size: usize,
}

impl Outbox {
    /// Whether all has been written.
    pub fn is_empty(&self) -> bool {
        self.size == 0
    }

    /// Whether nothing should be added before something has been written.
    pub fn is_full(&self) -> bool {
        self.size >= FULL || self.pieces.len() >= PIECES
    }

    /// Adds whole frames, and leaves nothing of them.
    pub fn append(&mut self, frames: &mut Vec<u8>) {
        if frames.is_empty() {
            return;
        }
        self.size += frames.len();
        match self.tail.is_empty() {
            true => self.tail = std::mem::take(frames),
            false => self.tail.append(frames),
        }
    }

    /// Adds a header block, in as many frames as it takes.
    pub fn head(&mut self, stream: u32, block: &[u8], is_end: bool, frame_size: usize) {
        let (mut frame_kind, mut rest) = (kind::HEADERS, block);
        let mut flags = if is_end { flag::END_STREAM } else { 0 };
        loop {
            let (part, others) = rest.split_at(rest.len().min(frame_size));
            if others.is_empty() {
                flags |= flag::END_HEADERS;
            }
            self.header(frame_kind, flags, stream, part.len());
            self.copy(part);
            if others.is_empty() {
                return;
            }
            (frame_kind, flags, rest) = (kind::CONTINUATION, 0, others);
        }
    }

    /// Adds data, in as many frames as it takes.
    pub fn data(&mut self, stream: u32, data: Bytes, is_end: bool, frame_size: usize) {
        let mut rest = data;
        loop {
            let part = rest.split_to(rest.len().min(frame_size));
            let is_last = rest.is_empty();
            let flags = if is_last && is_end {
                flag::END_STREAM
            } else {
                0
            };
            self.header(kind::DATA, flags, stream, part.len());
            if part.len() <= COPIED {
                self.copy(&part);
            } else {
                self.size += part.len();
                self.pieces.push_back(std::mem::take(&mut self.tail).into());
                self.pieces.push_back(part);
            }
            if is_last {
                return;
            }
        }
    }

    fn header(&mut self, kind: u8, flags: u8, stream: u32, length: usize) {
        let header = FrameHeader {
            length,
            kind,
            flags,
            stream,
        };
        self.copy(&header.bytes());
    }

    fn copy(&mut self, bytes: &[u8]) {
        self.size += bytes.len();
        self.tail.extend_from_slice(bytes);
    }

    /// Writes all there is.
    ///
    /// # Errors
    /// What the system said.
    pub fn poll_write<S: AsyncWrite + Unpin>(
        &mut self,
        io: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while self.size > 0 {
            let mut io = Pin::new(&mut *io);
            let written = if self.pieces.is_empty() {
                ready!(io.poll_write(cx, &self.tail[self.written..]))?
            } else {
                let mut slices = [IoSlice::new(&[]); PIECES + 1];
                let tail = [&self.tail[self.written..]];
                let pieces = self.pieces.iter().map(|piece| &piece[..]);
                let mut count = 0;
                for (slice, piece) in slices.iter_mut().zip(pieces.chain(tail)) {
                    *slice = IoSlice::new(piece);
                    count += 1;
                }
                ready!(io.as_mut().poll_write_vectored(cx, &slices[..count]))?
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(written);
        }
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, written: usize) {
        self.size -= written;
        let mut written = written;
        while let Some(piece) = self.pieces.front_mut() {
            if written < piece.len() {
                return piece.advance(written);
            }
            written -= piece.len();
            self.pieces.pop_front();
        }
        self.written += written;
        if self.size == 0 {
            self.written = 0;
            match self.tail.capacity() {
                ..=KEPT => self.tail.clear(),
                _ => self.tail = Vec::new(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use tokio::io::{AsyncReadExt, duplex};

    #[tokio::test]
    async fn small_and_large_pieces_arrive_in_order_however_little_is_taken_at_a_time() {
        for taken in [1, 7, 1000, 100_000] {
            let mut out = Outbox::default();
            let mut wanted = Vec::new();
            let (mut near, mut far) = duplex(taken);
            for size in [0, 10, COPIED, COPIED + 1, 30_000, 3] {
                let data = Bytes::from(vec![size as u8; size]);
                out.data(1, data, size == 3, 16_384);
            }
            out.head(1, &[5; 40_000], true, 16_384);
            let mut control = b"control".to_vec();
            out.append(&mut control);
            assert!(control.is_empty());
            wanted.extend(out.pieces.iter().flat_map(|piece| piece.to_vec()));
            wanted.extend(&out.tail);
            assert_eq!(out.size, wanted.len());
            let mut read = vec![0; wanted.len()];
            let writing = poll_fn(|cx| out.poll_write(&mut near, cx));
            let (written, arrived) = tokio::join!(writing, far.read_exact(&mut read));
            written.unwrap();
            arrived.unwrap();
            assert!(read == wanted);
            assert!(out.is_empty());
            assert!(out.tail.capacity() <= KEPT);
        }
    }

    #[test]
    fn data_and_headers_are_cut_into_frames_of_which_only_the_last_ends() {
        let mut out = Outbox::default();
        out.data(3, Bytes::from(vec![1; 25]), true, 10);
        out.head(3, &[2; 15], true, 10);
        let mut frames = Vec::new();
        let mut rest = &out.tail[..];
        while let Some(header) = FrameHeader::read(rest) {
            frames.push((header.kind, header.flags, header.length));
            rest = &rest[crate::http2::frame::HEADER + header.length..];
        }
        let wanted = [
            (kind::DATA, 0, 10),
            (kind::DATA, 0, 10),
            (kind::DATA, flag::END_STREAM, 5),
            (kind::HEADERS, flag::END_STREAM, 10),
            (kind::CONTINUATION, flag::END_HEADERS, 5),
        ];
        assert_eq!(frames, wanted);
    }
}
