//! Content: digests, input trees, a cache of parsed directories, batched fetch and upload.

pub mod digest;
pub mod directories;
pub mod transfer;

pub use digest::Digest;
