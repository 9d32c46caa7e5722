//! What is kept of an action that a build has asked for, until it is recorded.

use std::path::PathBuf;
use std::sync::Arc;

use crate::cas::Digest;
use crate::reapi::ActionResult;

/// An action that a build executed, or found in the action cache.
#[derive(Clone, Debug)]
pub struct Subaction {
    /// Digest of the action.
    pub action: Digest,
    /// Its result, with exit code 0.
    pub result: Arc<ActionResult>,
    /// Its place in the order in which the build asked.
    pub order: u64,
    /// Where the client that asked ran, if it could be seen.
    pub working_directory: Option<PathBuf>,
    /// The root of that client's file system; empty if it could not be seen.
    pub file_system_root: PathBuf,
}
