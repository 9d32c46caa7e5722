//! Content: a cache of parsed directories, batched fetch and upload. (`Digest` itself stands
//! below, for `backend` speaks of it too.)

pub mod directories;
#[cfg(test)]
pub(crate) mod memory;
pub mod outputs;
pub mod transfer;

pub use crate::digest::{Digest, DigestFunction};
