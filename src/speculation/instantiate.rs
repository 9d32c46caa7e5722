//! Instantiation: a base action's input tree with every file replaced by what it is now.
//!
//! Only the spine is rewritten: a directory that holds nothing replaced keeps its digest. One
//! memo is shared by all actions of a plan, so a directory that many trees hold at the same place
//! is rewritten once. What does not re-encode to its own bytes is never rewritten.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use super::parent::{BaseAction, with_input_root};
use super::resolve::{Current, Node, Resolver, TreeFile};
use crate::cas::Digest;
use crate::cas::directories::{Directory, Trees, child_path};
use crate::reapi;

/// At how many places of an input root one directory may stand. Real trees stay far below; one
/// that is built to have 2^40 paths does not.
pub const MAX_PLACES: usize = 4096;

/// A base action with new digests.
#[derive(Clone, Debug)]
pub struct Adapted {
    /// Digest of the adapted action.
    pub action: Digest,
    /// The encoded `Action`.
    pub encoded: Bytes,
    /// The root of its input tree.
    pub input_root: Arc<NewDirectory>,
}

/// A directory that was rewritten, with all that is new below it.
#[derive(Debug)]
pub struct NewDirectory {
    /// Its digest.
    pub digest: Digest,
    /// The encoded `Directory`.
    pub encoded: Bytes,
    /// Source files that were replaced in it.
    files: Vec<(Digest, PathBuf)>,
    /// Directories in it that were rewritten.
    directories: Vec<Arc<NewDirectory>>,
}

/// Something that an adapted action needs in the CAS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Blob {
    /// An adapted action.
    Action(Bytes),
    /// A rewritten directory.
    Directory(Bytes),
    /// A source file, to be read when it is uploaded.
    File(PathBuf),
}

impl Adapted {
    /// Adds what the action needs to `needed`, less what `known` holds, and all of it to `known`.
    pub fn collect_blobs(&self, known: &mut HashSet<Digest>, needed: &mut HashMap<Digest, Blob>) {
        if known.insert(self.action) {
            needed.insert(self.action, Blob::Action(self.encoded.clone()));
        }
        self.input_root.collect_blobs(known, needed);
    }
}

impl NewDirectory {
    fn collect_blobs(&self, known: &mut HashSet<Digest>, needed: &mut HashMap<Digest, Blob>) {
        // What is known is known with all that is below it.
        if !known.insert(self.digest) {
            return;
        }
        needed.insert(self.digest, Blob::Directory(self.encoded.clone()));
        for (digest, path) in &self.files {
            if known.insert(*digest) {
                needed.insert(*digest, Blob::File(path.clone()));
            }
        }
        for directory in &self.directories {
            directory.collect_blobs(known, needed);
        }
    }
}

/// What came of instantiating a base action.
#[derive(Clone, Debug)]
pub enum Instantiation {
    /// Nothing that it reads has changed.
    Unchanged,
    /// It is to be executed anew.
    Adapted(Adapted),
    /// Some of its inputs come from actions that are not done: these.
    Waits(Arc<[Node]>),
}

/// Why a base action cannot be adapted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unadaptable {
    /// A file that it read is there no more.
    #[error("its input {} is there no more", .0.display())]
    Vanished(PathBuf),
    /// A directory of its tree is not in the CAS, malformed, or too deep.
    #[error("its input directory {0} cannot be read")]
    Directory(Digest),
    /// A message that must change does not re-encode to its own bytes.
    #[error("{0} among its inputs holds fields that primed does not know")]
    NotCanonical(Digest),
    /// Its tree has more paths than any real one.
    #[error("its input tree has too many paths")]
    TooLarge,
}

/// One base action to instantiate, and what that needs to know.
pub struct Task<'a, O> {
    /// The action's index in the plan.
    pub node: Node,
    /// The recorded action.
    pub base: &'a BaseAction,
    /// The policy.
    pub resolver: &'a Resolver<'a>,
    /// All directories.
    pub trees: &'a Trees,
    /// What an action of the plan wrote to a path; `None` while it is not done.
    pub output: O,
}

/// Rewrites trees. Lives as long as one set of replacements.
#[derive(Default)]
pub struct Instantiator {
    memo: HashMap<Mounted, HashMap<String, Rewritten>>,
}

/// A directory, and what the roots of the trees that hold it stand for. What its files are
/// depends on both, and on its path in the tree.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Mounted {
    directory: Digest,
    mount: Option<PathBuf>,
}

#[derive(Clone)]
enum Rewritten {
    Same,
    New(Arc<NewDirectory>),
    Waits(Arc<[Node]>),
}

impl Instantiator {
    /// Instantiates one base action.
    ///
    /// # Errors
    /// `Unadaptable`, with the reason.
    pub fn instantiate<O>(&mut self, task: &Task<'_, O>) -> Result<Instantiation, Unadaptable>
    where
        O: Fn(Node, &str) -> Option<Option<Digest>>,
    {
        match self.rewrite(task, task.base.input_root, "")? {
            Rewritten::Same => Ok(Instantiation::Unchanged),
            Rewritten::Waits(nodes) => Ok(Instantiation::Waits(nodes)),
            Rewritten::New(input_root) => {
                let (action, encoded) = with_input_root(&task.base.encoded, input_root.digest)
                    .ok_or(Unadaptable::NotCanonical(task.base.digest))?;
                Ok(Instantiation::Adapted(Adapted {
                    action,
                    encoded,
                    input_root,
                }))
            }
        }
    }

    fn rewrite<O>(
        &mut self,
        task: &Task<'_, O>,
        digest: Digest,
        path: &str,
    ) -> Result<Rewritten, Unadaptable>
    where
        O: Fn(Node, &str) -> Option<Option<Digest>>,
    {
        let mounted = Mounted {
            directory: digest,
            mount: task.base.mount.clone(),
        };
        let places = self.memo.entry(mounted.clone()).or_default();
        match places.get(path) {
            // Valid until one of them is done.
            Some(Rewritten::Waits(nodes))
                if nodes.iter().any(|node| (task.output)(*node, "").is_some()) => {}
            Some(known) => return Ok(known.clone()),
            None if places.len() >= MAX_PLACES => return Err(Unadaptable::TooLarge),
            None => {}
        }
        let directory = task
            .trees
            .get(&digest)
            .ok_or(Unadaptable::Directory(digest))?;
        if directory.files.is_empty() && directory.directories.is_empty() {
            return Ok(Rewritten::Same);
        }
        let rewritten = self.rewrite_entries(task, digest, directory, path)?;
        let places = self.memo.entry(mounted).or_default();
        places.insert(path.to_owned(), rewritten.clone());
        Ok(rewritten)
    }

    fn rewrite_entries<O>(
        &mut self,
        task: &Task<'_, O>,
        digest: Digest,
        directory: &Directory,
        path: &str,
    ) -> Result<Rewritten, Unadaptable>
    where
        O: Fn(Node, &str) -> Option<Option<Digest>>,
    {
        let mut waits: Vec<Node> = Vec::new();
        let mut sources = Vec::new();
        let mut files: Vec<(usize, Digest)> = Vec::new();
        let mut directories: Vec<(usize, Arc<NewDirectory>)> = Vec::new();
        for (index, (name, recorded)) in directory.files.iter().enumerate() {
            let path = child_path(path, name);
            let file = TreeFile {
                node: task.node,
                base: task.base,
                path: &path,
                digest: *recorded,
            };
            match task.resolver.resolve(file, &task.output) {
                Current::Recorded => {}
                Current::Source(_, now) | Current::Output(now) if now == *recorded => {}
                Current::Source(source, now) => {
                    sources.push((now, source.to_owned()));
                    files.push((index, now));
                }
                Current::Output(now) => files.push((index, now)),
                Current::Pending(node) => waits.push(node),
                Current::Vanished(path) => return Err(Unadaptable::Vanished(path)),
            }
        }
        for (index, (name, recorded)) in directory.directories.iter().enumerate() {
            match self.rewrite(task, *recorded, &child_path(path, name))? {
                Rewritten::Same => {}
                Rewritten::New(new) => directories.push((index, new)),
                Rewritten::Waits(nodes) => waits.extend_from_slice(&nodes),
            }
        }
        if !waits.is_empty() {
            waits.sort_unstable();
            waits.dedup();
            return Ok(Rewritten::Waits(waits.into()));
        }
        if files.is_empty() && directories.is_empty() {
            return Ok(Rewritten::Same);
        }
        let (new, encoded) =
            replaced(directory, &files, &directories).ok_or(Unadaptable::NotCanonical(digest))?;
        Ok(Rewritten::New(Arc::new(NewDirectory {
            digest: new,
            encoded,
            files: sources,
            directories: directories.into_iter().map(|(_, new)| new).collect(),
        })))
    }
}

/// The directory with some of its digests replaced; `None` if it must not be rewritten.
fn replaced(
    directory: &Directory,
    files: &[(usize, Digest)],
    directories: &[(usize, Arc<NewDirectory>)],
) -> Option<(Digest, Bytes)> {
    if !directory.canonical {
        return None;
    }
    let mut message = reapi::Directory::decode(directory.encoded.clone()).ok()?;
    for (index, digest) in files {
        message.files.get_mut(*index)?.digest = Some(digest.to_proto());
    }
    for (index, new) in directories {
        message.directories.get_mut(*index)?.digest = Some(new.digest.to_proto());
    }
    Some(Digest::of_message(&message))
}
