//! What is known now of the places that origins name: files on disk, and the action parents that
//! have been asked for in this session. And what executions have shown of files that stand nowhere
//! else.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::edits::Edits;
use crate::cas::Digest;
use crate::cas::directories::{Directory, Trees};
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

/// The digest of the file at `path` in the tree of `root`.
pub fn find_file(trees: &Trees, root: Digest, path: &str) -> Option<Digest> {
    let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
    find_entry(&find_directory(trees, root, above)?.files, name)
}

/// The directory at `path` in the tree of `root`; the root itself if the path is empty.
pub fn find_directory<'a>(trees: &'a Trees, root: Digest, path: &str) -> Option<&'a Directory> {
    let mut directory = trees.get(&root)?;
    for name in path.split('/').filter(|_| !path.is_empty()) {
        directory = trees.get(&find_entry(&directory.directories, name)?)?;
    }
    Some(directory)
}

/// Entries of a canonical directory are sorted; others may not be.
fn find_entry(entries: &[(String, Digest)], name: &str) -> Option<Digest> {
    let sorted = entries.binary_search_by(|(entry, _)| entry.as_str().cmp(name));
    let at = match sorted {
        Ok(at) => Some(at),
        Err(_) => entries.iter().position(|(entry, _)| entry == name),
    };
    at.map(|at| entries[at].1)
}

/// The digest that `outputs`, sorted by path, hold for `path`.
pub fn find_output(outputs: &Outputs, path: &str) -> Option<Digest> {
    let at = outputs
        .binary_search_by(|(name, _)| name.as_str().cmp(path))
        .ok()?;
    Some(outputs[at].1)
}
