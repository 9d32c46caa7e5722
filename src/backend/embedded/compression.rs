//! Zstandard, with memory that does not depend on what is compressed: neither does a small upload
//! that stands for a huge blob take more than the blob's digest says.

use std::io::{self, Write};

use tonic::Status;
use zstd::stream::raw::{Decoder, Operation};
use zstd::stream::write::Encoder;

use super::errors::WriteError;
use crate::digest::Digest;

/// Little time for most of the gain.
const LEVEL: i32 = 1;
/// How much comes out at once.
const PIECE: usize = 128 * 1024;

/// What is wrong with compressed content.
#[derive(Debug, thiserror::Error)]
pub(super) enum DecompressError {
    #[error("the content is not valid Zstandard: {0}")]
    Malformed(io::Error),
    #[error("the Zstandard content ends in the midst of a frame")]
    Unfinished,
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl From<DecompressError> for Status {
    fn from(error: DecompressError) -> Self {
        match error {
            DecompressError::Write(error) => error.into(),
            error => Status::invalid_argument(error.to_string()),
        }
    }
}

/// Decompresses content that comes in pieces: one frame, or several.
pub(super) struct Decompressor {
    decoder: Decoder<'static>,
    room: Vec<u8>,
    within_frame: bool,
}

impl Decompressor {
    pub fn new() -> io::Result<Self> {
        Ok(Decompressor {
            decoder: Decoder::new()?,
            room: vec![0; PIECE],
            within_frame: false,
        })
    }

    /// Takes in compressed bytes; `sink` gets what they stand for.
    pub fn push(
        &mut self,
        mut input: &[u8],
        mut sink: impl FnMut(&[u8]) -> Result<(), WriteError>,
    ) -> Result<(), DecompressError> {
        loop {
            let ran = self.decoder.run_on_buffers(input, &mut self.room);
            let ran = ran.map_err(DecompressError::Malformed)?;
            input = &input[ran.bytes_read..];
            if ran.bytes_read + ran.bytes_written > 0 {
                self.within_frame = ran.remaining > 0;
            }
            sink(&self.room[..ran.bytes_written])?;
            // A full room may not have been enough.
            if input.is_empty() && ran.bytes_written < self.room.len() {
                return Ok(());
            }
        }
    }

    /// To be called when there is no more.
    pub fn finish(&self) -> Result<(), DecompressError> {
        match self.within_frame {
            true => Err(DecompressError::Unfinished),
            false => Ok(()),
        }
    }
}

/// The blob `digest` out of `compressed`, not longer than it should be.
pub(super) fn decompress(digest: Digest, compressed: &[u8]) -> Result<Vec<u8>, DecompressError> {
    let mut content = Vec::new();
    let mut decompressor = Decompressor::new().map_err(DecompressError::Malformed)?;
    decompressor.push(compressed, |piece| {
        content.extend_from_slice(piece);
        match content.len() as u64 > digest.size() {
            true => Err(WriteError::TooLong(digest)),
            false => Ok(()),
        }
    })?;
    decompressor.finish()?;
    Ok(content)
}

/// `content` as one frame.
pub(super) fn compress(content: &[u8]) -> io::Result<Vec<u8>> {
    zstd::bulk::compress(content, LEVEL)
}

/// Compresses content that comes in pieces into one frame.
pub(super) struct Compressor(Encoder<'static, Vec<u8>>);

impl Compressor {
    pub fn new() -> io::Result<Self> {
        Ok(Compressor(Encoder::new(Vec::new(), LEVEL)?))
    }

    /// Takes in a piece, and returns what there is of the frame by now: often nothing.
    pub fn push(&mut self, piece: &[u8]) -> io::Result<Vec<u8>> {
        self.0.write_all(piece)?;
        Ok(std::mem::take(self.0.get_mut()))
    }

    /// The rest of the frame.
    pub fn finish(self) -> io::Result<Vec<u8>> {
        self.0.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(decompressor: &mut Decompressor, input: &[u8]) -> Result<Vec<u8>, DecompressError> {
        let mut out = Vec::new();
        decompressor.push(input, |piece| {
            out.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(out)
    }

    #[test]
    fn several_frames_in_pieces_of_any_size_are_one_content() {
        let content: Vec<u8> = (0..500_000u32)
            .flat_map(|n| (n / 3).to_le_bytes())
            .collect();
        let (one, other) = content.split_at(700_001);
        let mut streamed = Compressor::new().unwrap();
        let mut compressed = compress(one).unwrap();
        for piece in other.chunks(99_991) {
            compressed.extend(streamed.push(piece).unwrap());
        }
        compressed.extend(streamed.finish().unwrap());
        for size in [1, 1000, compressed.len()] {
            let mut decompressor = Decompressor::new().unwrap();
            let pieces = compressed.chunks(size);
            let out = pieces.flat_map(|piece| collect(&mut decompressor, piece).unwrap());
            assert!(out.eq(content.iter().copied()), "pieces of {size}");
            decompressor.finish().unwrap();
        }
    }

    #[test]
    fn what_is_cut_off_or_malformed_is_refused() {
        let compressed = compress(b"hello, hello, hello").unwrap();
        let digest = Digest::of(b"hello, hello, hello");
        assert_eq!(
            decompress(digest, &compressed).unwrap(),
            b"hello, hello, hello"
        );
        let cut = decompress(digest, &compressed[..compressed.len() - 1]);
        assert!(matches!(cut, Err(DecompressError::Unfinished)));
        let odd = decompress(digest, b"this is no frame");
        assert!(matches!(odd, Err(DecompressError::Malformed(_))));
    }

    #[test]
    fn a_bomb_is_defused_at_the_size_that_its_digest_says() {
        let bomb = compress(&vec![0; 64 * 1024 * 1024]).unwrap();
        let digest = Digest::of(&[0; 1000]);
        let refused = decompress(digest, &bomb);
        assert!(matches!(
            refused,
            Err(DecompressError::Write(WriteError::TooLong(_)))
        ));
    }
}
