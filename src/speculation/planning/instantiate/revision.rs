//! What becomes of one directory of an input tree when entries change, appear and vanish.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use prost::Message;

use super::super::edits::{Fate, Implied};
use super::super::tree_edit::{Entry, stands_for_itself};
use super::super::verdict::Change;
use super::Spot;
use crate::cas::Digest;
use crate::cas::directories::{Directory, child_path};
use crate::reapi;
use crate::speculation::records::parent::BaseAction;

/// What becomes of one directory.
#[derive(Default)]
pub(super) struct Revision<'a> {
    /// By their index: other digests, or `None` for what vanishes.
    pub(super) files: HashMap<usize, Option<Digest>>,
    pub(super) directories: HashMap<usize, Option<Digest>>,
    /// Those that vanish.
    symlinks: HashSet<usize>,
    appeared: Vec<&'a Entry>,
    /// New directories.
    pub(super) grown: Vec<(&'a str, Digest)>,
    /// The directory's own properties, if they change.
    properties: Option<Option<reapi::NodeProperties>>,
    /// Whether it stays when nothing is left in it, and whether that is new.
    pub(super) stands: bool,
    begins_to_stand: bool,
    /// What appears and vanishes further down, by the name of the directory on the way there.
    pub(super) below: BTreeMap<&'a str, Vec<&'a Implied>>,
}

impl<'a> Revision<'a> {
    /// What becomes of the entries of `directory` itself. `None` if it is malformed.
    pub(super) fn of(directory: &Directory, exists: bool, spot: Spot<'a>) -> Option<Self> {
        let message = reapi::Directory::decode(directory.encoded.clone()).ok()?;
        let mut revision = Revision {
            stands: exists && stands_for_itself(&message, spot.path),
            ..Revision::default()
        };
        // Something else may appear where something has vanished.
        let (vanishing, appearing): (Vec<&Implied>, Vec<&Implied>) = spot
            .implied
            .iter()
            .partition(|implied| implied.fate == Fate::Vanishes);
        for implied in vanishing.into_iter().chain(appearing) {
            let rest = implied.path.strip_prefix(spot.path).unwrap_or_default();
            let rest = rest.strip_prefix('/').unwrap_or(rest);
            let name = rest.split('/').next().unwrap_or_default();
            match (&implied.entry, implied.fate) {
                (Entry::Directory(properties), Fate::Vanishes) if rest.is_empty() => {
                    if revision.stands && message.node_properties == *properties {
                        revision.stands = false;
                        revision.properties = Some(None);
                    }
                }
                (Entry::Directory(properties), Fate::Appears) if rest.is_empty() => {
                    if !revision.stands {
                        revision.stands = true;
                        revision.begins_to_stand = true;
                        revision.properties = Some(properties.clone());
                    }
                }
                (Entry::File(file), Fate::Vanishes) if rest == name => {
                    let at = message.files.iter().position(|other| other == file);
                    revision.files.extend(at.map(|index| (index, None)));
                }
                (Entry::Symlink(link), Fate::Vanishes) if rest == name => {
                    let at = message.symlinks.iter().position(|other| other == link);
                    revision.symlinks.extend(at);
                }
                (Entry::File(_) | Entry::Symlink(_), Fate::Appears) if rest == name => {
                    revision.appeared.push(&implied.entry);
                }
                _ => revision.below.entry(name).or_default().push(implied),
            }
        }
        Some(revision)
    }

    pub(super) fn is_nothing(&self) -> bool {
        self.files.is_empty()
            && self.directories.is_empty()
            && self.symlinks.is_empty()
            && self.appeared.is_empty()
            && self.grown.is_empty()
            && self.properties.is_none()
            && !self.begins_to_stand
    }

    /// The files of the directory at `path` that appear and vanish.
    pub(super) fn entries_that_differ(
        &self,
        directory: &Directory,
        path: &str,
        base: &BaseAction,
    ) -> Vec<Arc<Change>> {
        let vanished = self.files.iter().filter(|(_, now)| now.is_none());
        let vanished = vanished.filter_map(|(index, _)| directory.files.get(*index));
        let vanished = vanished.map(|(name, was)| {
            let path = child_path(path, name);
            Change::new(path, Some(*was), None, None)
        });
        let function = base.digest.function();
        let appeared = self.appeared.iter().filter_map(|entry| match entry {
            Entry::File(file) => {
                let path = child_path(path, &file.name);
                let now = function.read(file.digest.as_ref()).ok()?;
                Some(Change::new(path, None, Some(now), None))
            }
            Entry::Symlink(_) | Entry::Directory(_) => None,
        });
        vanished.chain(appeared).map(Arc::new).collect()
    }

    /// The directory after it; `None` if it must not be rewritten.
    pub(super) fn apply(&self, directory: &Directory) -> Option<reapi::Directory> {
        if !directory.canonical {
            return None;
        }
        let mut message = reapi::Directory::decode(directory.encoded.clone()).ok()?;
        for (index, digest) in &self.files {
            message.files.get_mut(*index)?.digest = digest.map(Digest::to_proto);
        }
        for (index, digest) in &self.directories {
            message.directories.get_mut(*index)?.digest = digest.map(Digest::to_proto);
        }
        message.files.retain(|file| file.digest.is_some());
        message.directories.retain(|entry| entry.digest.is_some());
        let mut links = 0..;
        message.symlinks.retain(|_| {
            !links
                .next()
                .is_some_and(|index| self.symlinks.contains(&index))
        });
        if let Some(properties) = &self.properties {
            message.node_properties = properties.clone();
        }
        if !self.appeared.is_empty() || !self.grown.is_empty() {
            self.add_to(&mut message)?;
        }
        Some(message)
    }

    /// Adds what appeared where nothing else stands. `None` if the directory has an order of its
    /// own.
    fn add_to(&self, message: &mut reapi::Directory) -> Option<()> {
        let is_sorted = message.files.is_sorted_by_key(|file| &file.name)
            && message.symlinks.is_sorted_by_key(|link| &link.name)
            && message.directories.is_sorted_by_key(|entry| &entry.name);
        let files = message.files.iter().map(|file| &file.name);
        let links = message.symlinks.iter().map(|link| &link.name);
        let directories = message.directories.iter().map(|entry| &entry.name);
        let mut names: HashSet<String> = files.chain(links).chain(directories).cloned().collect();
        for entry in &self.appeared {
            match entry {
                Entry::File(file) if names.insert(file.name.clone()) => {
                    message.files.push(file.clone());
                }
                Entry::Symlink(link) if names.insert(link.name.clone()) => {
                    message.symlinks.push(link.clone());
                }
                _ => {}
            }
        }
        for (name, digest) in &self.grown {
            if names.insert((*name).to_owned()) {
                message.directories.push(reapi::DirectoryNode {
                    name: (*name).to_owned(),
                    digest: Some(digest.to_proto()),
                });
            }
        }
        message
            .files
            .sort_by(|one, other| one.name.cmp(&other.name));
        message
            .symlinks
            .sort_by(|one, other| one.name.cmp(&other.name));
        message
            .directories
            .sort_by(|one, other| one.name.cmp(&other.name));
        is_sorted.then_some(())
    }
}
