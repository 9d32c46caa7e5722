//! What is known now of the places that origins name: files on disk, and the action parents that
//! have been asked for in this session. And what executions have shown of files that stand nowhere
//! else.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::edits::Edits;
use crate::cas::Digest;
use crate::cas::outputs::Outputs;
use crate::speculation::records::parent::WeakKey;

/// Source files on disk: their digest, or `None` where there is no such file.
pub type Sources = HashMap<PathBuf, Option<Digest>>;

/// What recorded actions are adapted to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Files on disk.
    pub disk: Sources,
    /// Action parents, under the weak keys that records know them by.
    pub parents: HashMap<WeakKey, CurrentParent>,
    /// Observed changes.
    pub edits: Edits,
}

impl<const COUNT: usize> From<[(WeakKey, CurrentParent); COUNT]> for Known {
    fn from(parents: [(WeakKey, CurrentParent); COUNT]) -> Self {
        Known {
            parents: parents.into(),
            ..Known::default()
        }
    }
}

/// An action parent as it has been asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CurrentParent {
    /// Its input tree.
    pub input_root: Digest,
    /// Its digest-valued text: see `ExecutedParent::texts`.
    pub texts: Arc<[String]>,
    /// What it wrote, sorted by path; `None` while it is not done.
    pub outputs: Option<Arc<Outputs>>,
}
