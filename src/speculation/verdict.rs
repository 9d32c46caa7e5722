//! What a plan says of one recorded action, for the journals of builds: it is what it was, or has
//! become this, by these changes; or it cannot be adapted, and why.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::flights::FlightKey;
use super::parent::{BaseAction, Origin, WeakKey};
use crate::cas::Digest;

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

/// Why an action is not executed ahead of time although it is known what it would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftOut {
    /// So many executions of it in a row were wasted.
    Retired(u8),
    /// There is too little to gain.
    Cheap {
        /// How long it took.
        recorded: Duration,
        /// What executing it takes beside that.
        overhead: Duration,
        /// How many executions of it in a row were wasted.
        wasted: u8,
    },
    /// The budget of this flag is spent.
    OverBudget(&'static str),
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LeftOut::Retired(wasted) => write!(
                f,
                "nobody has used its result the last {wasted} times; it comes back when a build \
                 asks for it"
            ),
            LeftOut::Cheap {
                recorded,
                overhead,
                wasted,
            } => write!(
                f,
                "it takes {} ms, and was not used the last {}; to execute it ahead of time costs \
                 {} ms",
                recorded.as_millis(),
                match wasted {
                    1 => "time".to_owned(),
                    wasted => format!("{wasted} times"),
                },
                overhead.as_millis()
            ),
            LeftOut::OverBudget(flag) => write!(f, "what {flag} allows was spent"),
        }
    }
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
