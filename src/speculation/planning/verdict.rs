//! What a plan says of one recorded action, for the journals of builds: it is what it was, or has
//! become this, by these changes; or it cannot be adapted, and why.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::cas::Digest;
use crate::speculation::flights::FlightKey;
use crate::speculation::flights::left_out::LeftOut;
use crate::speculation::records::parent::{BaseAction, Origin, WeakKey};

/// Changes that are kept for one action; more are counted.
pub const MAX_CHANGES: usize = 500;

/// What a plan says of a recorded action.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Whose action it is.
    pub parent: WeakKey,
    /// As it was recorded.
    pub base: Arc<BaseAction>,
    /// What it is taken to be now.
    pub outlook: Outlook,
}

/// What a recorded action is taken to be.
#[derive(Clone, Debug)]
pub enum Outlook {
    /// What it was.
    Unchanged,
    /// Another action, by these changes.
    Adapted(Adaptation),
    /// It waits for these adapted actions.
    Waits(Vec<Digest>),
    /// What this file of its input tree is depends on a parent that has not ended, or not begun.
    Unresolved(Option<String>),
    /// It cannot be adapted, for this kind of reason, and this reason.
    Unadaptable(&'static str, String),
}

/// How a recorded action became another one.
#[derive(Clone, Debug)]
pub struct Adaptation {
    /// What it is executed as.
    pub key: FlightKey,
    /// The files that differ, at most `MAX_CHANGES`.
    pub changes: Vec<Arc<Change>>,
    /// How many more there are.
    pub changes_left_out: usize,
    /// The adapted actions that it waited for.
    pub after: Vec<Digest>,
    /// Why it is not executed ahead of time all the same.
    pub left_out: Option<LeftOut>,
}

/// A file of an input tree that is not what was recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Relative to the input root.
    pub path: String,
    /// As it was recorded; `None` where there was none.
    pub from: Option<Digest>,
    /// What it is now; `None` if it is gone.
    pub to: Option<Digest>,
    /// What says so.
    pub by: By,
    /// Where that is: a path, or the digest of a base action.
    pub origin: String,
}

/// What says that a file has changed: a kind of overlay, or what an execution has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum By {
    /// A source file.
    Source,
    /// A dependency's finished output.
    Artifact,
    /// An output of another action.
    Action,
    /// What a client executed.
    Observed,
}

impl Change {
    /// A file at `path` that `origin` says is another one; without one, an execution has shown it.
    pub fn new(
        path: String,
        from: Option<Digest>,
        to: Option<Digest>,
        origin: Option<&Origin>,
    ) -> Self {
        let (by, origin) = match origin {
            Some(Origin::Disk(path)) => (By::Source, path.display().to_string()),
            Some(Origin::Tree { path, .. }) => (By::Source, path.clone()),
            Some(Origin::Action { action, .. }) => (By::Action, action.to_string()),
            Some(Origin::Artifact { path, .. }) => (By::Artifact, path.clone()),
            None => (By::Observed, path.clone()),
        };
        Change {
            path,
            from,
            to,
            by,
            origin,
        }
    }
}
