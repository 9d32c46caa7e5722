//! What can go wrong with the cache on disk, and the gRPC status that says so.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;
use tonic::Status;

use crate::digest::Digest;

/// Why a cache directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error(
        "the cache directory {0} is in use by another primed; stop that one, or give this one a \
         directory of its own with --cache-dir"
    )]
    InUse(PathBuf),
    /// The system said no.
    #[error("the cache directory {path} cannot be used: {source}; --cache-dir names another")]
    Io {
        /// What was touched.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Why a blob cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It is not there.
    #[error("the blob {0} is not in the cache; upload it (again)")]
    NotFound(Digest),
    /// It was there, but its content was damaged; now it is gone.
    #[error(
        "the blob {0} was damaged on disk and has been dropped from the cache; upload it again"
    )]
    Corrupt(Digest),
    /// The system said no.
    #[error("the blob {digest} cannot be read: {source}")]
    Io {
        /// The blob.
        digest: Digest,
        /// What the system said.
        source: io::Error,
    },
}

/// Why something was not taken in.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The content is another blob's.
    #[error(transparent)]
    Mismatch(Box<Mismatch>),
    /// The content is longer than its digest says.
    #[error("the content of the blob {0} is longer than its digest says")]
    TooLong(Digest),
    /// It is larger than the whole cache may become.
    #[error(
        "{needed} bytes do not fit into the cache, which may hold {limit}; give primed a larger \
         --cache-size"
    )]
    TooLarge {
        /// How many bytes it takes.
        needed: u64,
        /// How many there may be.
        limit: u64,
    },
    /// All that the cache holds is in use.
    #[error(
        "the cache is full: all of its {limit} bytes are in use, or were in the last minutes; give \
         primed a larger --cache-size"
    )]
    Full {
        /// How many bytes there may be.
        limit: u64,
    },
    /// The disk is full.
    #[error(
        "the disk that holds the cache ({0}) is full; make room on it, or name another directory \
         with --cache-dir"
    )]
    DiskFull(PathBuf),
    /// The system said no.
    #[error("the cache cannot be written: {0}")]
    Io(#[source] io::Error),
}

/// Content that is not what it was said to be.
#[derive(Debug, thiserror::Error)]
#[error("the content is not that of the blob {expected}: its digest is {actual}")]
pub struct Mismatch {
    /// What it was said to be.
    pub expected: Digest,
    /// What it is.
    pub actual: Digest,
}

impl WriteError {
    /// Says whether content is what it was said to be.
    pub(super) fn unless_equal(expected: Digest, actual: Digest) -> Result<(), Self> {
        match expected == actual {
            true => Ok(()),
            false => Err(WriteError::Mismatch(Box::new(Mismatch {
                expected,
                actual,
            }))),
        }
    }

    /// What `error`, from writing below `directory`, means.
    pub(super) fn new(error: io::Error, directory: &std::path::Path) -> Self {
        match Errno::from_io_error(&error) {
            Some(Errno::NOSPC | Errno::DQUOT) => WriteError::DiskFull(directory.to_owned()),
            _ => WriteError::Io(error),
        }
    }
}

impl From<ReadError> for Status {
    fn from(error: ReadError) -> Self {
        let message = error.to_string();
        match error {
            ReadError::NotFound(_) | ReadError::Corrupt(_) => Status::not_found(message),
            ReadError::Io { .. } => Status::internal(message),
        }
    }
}

impl From<WriteError> for Status {
    fn from(error: WriteError) -> Self {
        let message = error.to_string();
        match error {
            WriteError::Mismatch(_) | WriteError::TooLong(_) => Status::invalid_argument(message),
            WriteError::TooLarge { .. } | WriteError::Full { .. } | WriteError::DiskFull(_) => {
                Status::resource_exhausted(message)
            }
            WriteError::Io(_) => Status::internal(message),
        }
    }
}
