//! The exact difference between two input trees.

use std::collections::BTreeMap;

use prost::Message;

use crate::cas::directories::{Directory, Trees, child_path};
use crate::cas::{Digest, DigestFunction};
use crate::reapi::{self, FileNode, NodeProperties, SymlinkNode};

/// A tree that differs in more entries than this is another one, and teaches nothing.
pub(super) const MAX_DIFFERENCES: usize = 1000;
/// Entries that one comparison looks at.
const MAX_ENTRIES: usize = 1_000_000;
/// An entry of a tree that came or went, as it stands there.
#[derive(Clone, Debug, PartialEq)]
pub enum Entry {
    /// A file with all its attributes.
    File(FileNode),
    /// A symbolic link.
    Symlink(SymlinkNode),
    /// A directory that is empty or has properties. Others are there by what they hold.
    Directory(Option<NodeProperties>),
}

/// A file as it was recorded.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct OldFile {
    /// Relative to the input root.
    pub path: String,
    /// What was recorded.
    pub digest: Digest,
}

/// The difference between two input trees.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Edit {
    /// Files of other content and equal attributes.
    pub changed: Vec<(OldFile, Digest)>,
    /// Entries, by path, that only the old tree has.
    pub vanished: BTreeMap<String, Entry>,
    /// Entries, by path, that only the new tree has.
    pub appeared: BTreeMap<String, Entry>,
    /// Of which the digests of both trees are.
    pub digest_function: DigestFunction,
}

impl Edit {
    /// What leads from the tree of `old` to that of `new`. `None` if it teaches nothing: they are
    /// too different, or a directory cannot be read or must not be rewritten.
    pub fn between(old: Digest, new: Digest, trees: &Trees) -> Option<Self> {
        let mut comparison = Comparison {
            trees,
            edit: Edit {
                digest_function: old.function(),
                ..Edit::default()
            },
            has_common: old == new,
            seen: 0,
        };
        comparison.compare(Some(old), Some(new), "")?;
        comparison.has_common.then_some(comparison.edit)
    }

    /// How many entries differ.
    pub fn size(&self) -> usize {
        self.changed.len() + self.vanished.len() + self.appeared.len()
    }

    /// Whether `file` is other now, or not there.
    pub fn touches(&self, file: &OldFile) -> bool {
        self.changed.iter().any(|(changed, _)| changed == file)
            || matches!(self.vanished.get(&file.path), Some(Entry::File(_)))
    }

    /// What the rest may be the consequence of: what changed, or else what vanished.
    pub fn causes(&self) -> Vec<OldFile> {
        if !self.changed.is_empty() {
            return self.changed.iter().map(|(file, _)| file.clone()).collect();
        }
        let vanished = self
            .vanished
            .iter()
            .filter_map(|(path, entry)| match entry {
                Entry::File(file) => Some(OldFile {
                    path: path.clone(),
                    digest: digest_of(file, self.digest_function)?,
                }),
                _ => None,
            });
        vanished.collect()
    }
}

pub(super) fn digest_of(file: &FileNode, function: DigestFunction) -> Option<Digest> {
    function.read(file.digest.as_ref()).ok()
}

struct Comparison<'a> {
    trees: &'a Trees,
    edit: Edit,
    has_common: bool,
    seen: usize,
}

impl Comparison<'_> {
    /// `None` when it is to be given up.
    fn compare(&mut self, old: Option<Digest>, new: Option<Digest>, path: &str) -> Option<()> {
        if old == new {
            return Some(());
        }
        let (old, new) = (self.listed(old, path)?, self.listed(new, path)?);
        self.seen += 1 + old.size() + new.size();
        if self.seen > MAX_ENTRIES || self.edit.size() > MAX_DIFFERENCES {
            return None;
        }
        for (name, entry) in &old.entries {
            match new.entries.get(name) {
                Some(now) if now == entry => self.has_common = true,
                Some(now) => self.replace(child(path, name), entry, now),
                None => self.vanish(child(path, name), entry),
            }
        }
        for (name, entry) in &new.entries {
            if !old.entries.contains_key(name) {
                self.appear(child(path, name), entry);
            }
        }
        for (name, directory) in &old.directories {
            let now = new.directories.get(name).copied();
            self.has_common |= now == Some(*directory);
            self.compare(Some(*directory), now, &child_path(path, name))?;
        }
        for (name, directory) in &new.directories {
            if !old.directories.contains_key(name) {
                self.compare(None, Some(*directory), &child_path(path, name))?;
            }
        }
        (self.edit.size() <= MAX_DIFFERENCES).then_some(())
    }

    fn replace(&mut self, path: String, old: &Entry, new: &Entry) {
        let function = self.edit.digest_function;
        if let (Entry::File(old), Entry::File(new)) = (old, new)
            && let (Some(digest), Some(now)) = (digest_of(old, function), digest_of(new, function))
        {
            self.has_common = true;
            let otherwise_equal = FileNode {
                digest: old.digest.clone(),
                ..new.clone()
            };
            if otherwise_equal == *old {
                self.edit.changed.push((OldFile { path, digest }, now));
                return;
            }
        }
        self.vanish(path.clone(), old);
        self.appear(path, new);
    }

    fn vanish(&mut self, path: String, entry: &Entry) {
        self.edit.vanished.insert(path, entry.clone());
    }

    fn appear(&mut self, path: String, entry: &Entry) {
        self.edit.appeared.insert(path, entry.clone());
    }

    /// What stands in a directory; nothing if there is none.
    fn listed(&self, digest: Option<Digest>, path: &str) -> Option<Listed> {
        let mut listed = Listed::default();
        let Some(digest) = digest else {
            return Some(listed);
        };
        let directory = self.trees.get(&digest).filter(|found| found.canonical)?;
        let message = decoded(directory)?;
        if stands_for_itself(&message, path) {
            let itself = Entry::Directory(message.node_properties);
            listed.entries.insert(String::new(), itself);
        }
        let files = message.files.into_iter();
        let files = files.map(|file| (file.name.clone(), Entry::File(file)));
        let links = message.symlinks.into_iter();
        let links = links.map(|link| (link.name.clone(), Entry::Symlink(link)));
        listed.entries.extend(files.chain(links));
        listed
            .directories
            .extend(directory.directories.iter().cloned());
        Some(listed)
    }
}

/// A directory's entries; the one of no name is the directory itself.
#[derive(Default)]
struct Listed {
    entries: BTreeMap<String, Entry>,
    directories: BTreeMap<String, Digest>,
}

impl Listed {
    fn size(&self) -> usize {
        self.entries.len() + self.directories.len()
    }
}

fn child(path: &str, name: &str) -> String {
    match name {
        "" => path.to_owned(),
        name => child_path(path, name),
    }
}

/// Whether the directory at `path` is there by itself, and not by what it holds.
pub fn stands_for_itself(directory: &reapi::Directory, path: &str) -> bool {
    let is_empty = directory.files.is_empty()
        && directory.symlinks.is_empty()
        && directory.directories.is_empty();
    directory.node_properties.is_some() || is_empty && !path.is_empty()
}

/// A directory as a message, with what the cache leaves out.
pub fn decoded(directory: &Directory) -> Option<reapi::Directory> {
    reapi::Directory::decode(directory.encoded.clone()).ok()
}
