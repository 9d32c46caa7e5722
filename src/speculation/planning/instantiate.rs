//! Instantiation: a base action's input tree with every file replaced by what it is now, and with
//! the entries that appear and vanish for that action.
//!
//! Its digest-valued text is what its own parent says, once that has been asked for. Until then, where
//! it names a tree, that tree is rewritten in the same way, and the text is the digest of what it
//! becomes.
//!
//! Only the spine is rewritten: a directory that holds nothing replaced keeps its digest. One
//! memo is shared by all actions of a plan, so a directory that many trees hold at the same place
//! is rewritten once. What does not re-encode to its own bytes is never rewritten.

mod revision;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use prost::Message;

use self::revision::Revision;
use super::edits::Implied;
use super::resolve::{Current, Node, Resolver, TreeFile, TreeKind};
use super::verdict::Change;
use crate::cas::Digest;
use crate::cas::directories::{Directory, Holders, Trees, child_path};
use crate::reapi;
use crate::speculation::records::parent::{BaseAction, WeakKey};
use crate::speculation::records::texts::{self, Replacements};

/// At how many places of one input tree a directory may stand. Real trees stay far below; one
/// that is built to have 2^40 paths does not.
pub const MAX_PLACES: usize = 4096;

/// A base action with new digests.
#[derive(Clone, Debug)]
pub struct Adapted {
    /// Digest of the adapted action.
    pub action: Digest,
    /// The encoded `Action`.
    pub encoded: Bytes,
    /// The root of its input tree, if that is new.
    pub tree: Option<Arc<NewDirectory>>,
    /// The roots of further trees that its text names, and that are new.
    pub text_trees: Vec<Arc<NewDirectory>>,
    /// Its command, if that is new.
    pub command: Option<(Digest, Bytes)>,
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
    /// Files that differ in it.
    changes: Vec<Arc<Change>>,
    /// Directories in it that were rewritten.
    directories: Vec<Arc<NewDirectory>>,
}

/// Something that an adapted action needs in the CAS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Blob {
    /// An adapted action, or the command of one.
    Message(Bytes),
    /// A rewritten directory.
    Directory(Bytes),
    /// A source file, to be read when it is uploaded.
    File(PathBuf),
}

impl Adapted {
    /// Adds what the action needs to `needed`, less what `known` holds, and all of it to `known`.
    pub fn collect_blobs(&self, known: &mut HashSet<Digest>, needed: &mut HashMap<Digest, Blob>) {
        if known.insert(self.action) {
            needed.insert(self.action, Blob::Message(self.encoded.clone()));
        }
        if let Some((digest, command)) = &self.command
            && known.insert(*digest)
        {
            needed.insert(*digest, Blob::Message(command.clone()));
        }
        for tree in self.tree.iter().chain(&self.text_trees) {
            tree.collect_blobs(known, needed);
        }
    }
}

impl Adapted {
    /// The files that differ in its input tree and in those that its text names, at most `limit`,
    /// and how many more there are.
    pub fn changes(&self, limit: usize) -> (Vec<Arc<Change>>, usize) {
        let (mut changes, mut left_out) = (Vec::new(), 0);
        let mut open: Vec<&NewDirectory> = Vec::new();
        open.extend(self.text_trees.iter().chain(&self.tree).map(Arc::as_ref));
        while let Some(directory) = open.pop() {
            let room = limit.saturating_sub(changes.len());
            changes.extend(directory.changes.iter().take(room).cloned());
            left_out += directory.changes.len().saturating_sub(room);
            open.extend(directory.directories.iter().map(Arc::as_ref));
        }
        (changes, left_out)
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
    Adapted(Box<Adapted>),
    /// Some of its inputs come from actions that are not done: these.
    Waits(Arc<[Node]>),
    /// What it is to be will be known when a parent has been asked for, or has ended: that one makes
    /// this file, if it is a file.
    Awaits(Option<Arc<str>>),
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

impl Unadaptable {
    /// The kind of reason, in a word.
    pub fn word(&self) -> &'static str {
        match self {
            Unadaptable::Vanished(_) => "input_vanished",
            Unadaptable::Directory(_) => "directory_unreadable",
            Unadaptable::NotCanonical(_) => "unknown_fields",
            Unadaptable::TooLarge => "tree_too_large",
        }
    }
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
    /// What became of the digest-valued text of the parent.
    pub texts: &'a Texts,
    /// The action's encoded command, where it holds digest-valued text.
    pub command: Option<&'a Bytes>,
    /// What an action of the plan wrote to a path; `None` while it is not done.
    pub output: O,
}

/// What became of the digest-valued text of a parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Texts {
    /// This was replaced: by nothing, if the map is empty.
    Replaced(Replacements),
    /// The parent has not been asked for: whether this has changed is not known.
    Unknown(HashSet<String>),
}

/// Rewrites trees. Lives as long as one set of replacements.
#[derive(Default)]
pub struct Instantiator {
    memo: HashMap<Place, Known>,
    /// Numbers the sets of entries that appear and vanish together.
    sets: HashMap<Vec<usize>, usize>,
    /// How often each directory was rewritten for the action at hand.
    places: HashMap<Digest, usize>,
    /// Whether what is being rewritten holds an own output of the action that reads it.
    for_its_writer: bool,
    /// Directories of trees that text names, of whose files anything can be said.
    text_holders: Holders,
}

/// A directory at the place where a tree holds it: what its files are depends on both.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Place {
    parent: WeakKey,
    directory: Digest,
    tree: TreeKind,
    mount: Option<PathBuf>,
    path: String,
    /// The set of what appears and vanishes in the tree, where any of it is in this directory.
    set: Option<usize>,
}

/// What became of a directory.
struct Known {
    rewritten: Rewritten,
    /// The only action that it holds for, where that one reads what it writes itself.
    only_for: Option<Node>,
}

impl Known {
    fn holds_for(&self, node: Node) -> bool {
        let waits_for_itself =
            matches!(&self.rewritten, Rewritten::Waits(nodes) if nodes.contains(&node));
        self.only_for.is_none_or(|only| only == node) && !waits_for_itself
    }
}

#[derive(Clone)]
enum Rewritten {
    Same,
    New(Arc<NewDirectory>),
    /// Nothing is left of it.
    Gone,
    Waits(Arc<[Node]>),
    /// For this file.
    Awaits(Arc<str>),
}

/// A directory of the tree that is being rewritten.
#[derive(Clone, Copy)]
struct Spot<'a> {
    /// Which tree that is.
    tree: TreeKind,
    /// Relative to its root.
    path: &'a str,
    /// What appears and vanishes in it.
    implied: &'a [&'a Implied],
    /// The number of the set that this is a part of.
    set: usize,
}

/// What becomes of the digest-valued text of an action.
#[derive(Default)]
struct NewTexts {
    replacements: Replacements,
    trees: Vec<Arc<NewDirectory>>,
    waits: Vec<Node>,
    awaits: bool,
    /// It may change, and nobody can say.
    unforeseen: bool,
}

/// A directory that is not there yet.
static NOTHING: LazyLock<Directory> = LazyLock::new(|| Directory {
    encoded: Bytes::new(),
    files: Vec::new(),
    directories: Vec::new(),
    canonical: true,
});

impl Instantiator {
    /// One for actions whose text may name trees. In these, only `text_targets` can be replaced.
    pub fn new(text_targets: HashSet<Digest>) -> Self {
        Instantiator {
            text_holders: Holders::of(text_targets),
            ..Instantiator::default()
        }
    }

    /// Instantiates one base action.
    ///
    /// # Errors
    /// `Unadaptable`, with the reason.
    pub fn instantiate<O>(&mut self, task: &Task<'_, O>) -> Result<Instantiation, Unadaptable>
    where
        O: Fn(Node, &str) -> Option<Option<Digest>>,
    {
        let resolver = task.resolver;
        let (numbers, implied): (Vec<usize>, Vec<&Implied>) =
            resolver.implied(task.node, task.base, &task.output).unzip();
        let next = self.sets.len();
        let spot = Spot {
            tree: TreeKind::Input,
            path: "",
            implied: &implied,
            set: *self.sets.entry(numbers).or_insert(next),
        };
        let rewritten = self.rewrite_tree(task, task.base.input_root, spot)?;
        let mut texts = self.texts(task);
        let tree = match rewritten {
            Rewritten::Same | Rewritten::Gone => None,
            Rewritten::New(tree) => Some(tree),
            Rewritten::Waits(nodes) => {
                texts.waits.extend_from_slice(&nodes);
                None
            }
            Rewritten::Awaits(path) => return Ok(Instantiation::Awaits(Some(path))),
        };
        let is_same = tree.is_none() && texts.replacements.is_empty();
        if texts.awaits {
            Ok(Instantiation::Awaits(None))
        } else if !texts.waits.is_empty() {
            Ok(Instantiation::Waits(distinct(texts.waits)))
        } else if is_same {
            Ok(Instantiation::Unchanged)
        } else if texts.unforeseen {
            Ok(Instantiation::Awaits(None))
        } else {
            let adapted = adapted(task, tree, texts)?;
            Ok(Instantiation::Adapted(Box::new(adapted)))
        }
    }

    /// What becomes of the digest-valued text of the action: what its parent says, or else what the
    /// trees become that it names.
    fn texts<O>(&mut self, task: &Task<'_, O>) -> NewTexts
    where
        O: Fn(Node, &str) -> Option<Option<Digest>>,
    {
        let mut texts = NewTexts::default();
        for text in &task.base.texts {
            let named = match task.texts {
                Texts::Replaced(replacements) => {
                    let new = replacements.get_key_value(text);
                    let new = new.map(|(old, new)| (old.clone(), new.clone()));
                    texts.replacements.extend(new);
                    continue;
                }
                Texts::Unknown(old) => old.contains(text),
            };
            if !named {
                continue;
            }
            let Some(root) = task.resolver.parent.text_root(text) else {
                texts.unforeseen = true;
                continue;
            };
            let spot = Spot {
                tree: TreeKind::Text,
                path: "",
                implied: &[],
                set: 0,
            };
            match self.rewrite_tree(task, root, spot) {
                Ok(Rewritten::Same | Rewritten::Gone) => {}
                Ok(Rewritten::New(tree)) => {
                    let new = tree.digest.to_string();
                    texts.replacements.insert(text.clone(), new);
                    texts.trees.push(tree);
                }
                Ok(Rewritten::Waits(nodes)) => texts.waits.extend_from_slice(&nodes),
                // What is there no more may be there under another name.
                Ok(Rewritten::Awaits(_)) | Err(Unadaptable::Vanished(_)) => texts.awaits = true,
                Err(_) => texts.unforeseen = true,
            }
        }
        texts
    }

    fn rewrite_tree<O>(
        &mut self,
        task: &Task<'_, O>,
        root: Digest,
        spot: Spot<'_>,
    ) -> Result<Rewritten, Unadaptable>
    where
        O: Fn(Node, &str) -> Option<Option<Digest>>,
    {
        self.places.clear();
        self.for_its_writer = false;
        self.rewrite(task, root, spot)
    }

    fn rewrite<O>(
        &mut self,
        task: &Task<'_, O>,
        digest: Digest,
        spot: Spot<'_>,
    ) -> Result<Rewritten, Unadaptable>
    where
        O: Fn(Node, &str) -> Option<Option<Digest>>,
    {
        let mount = match spot.tree {
            TreeKind::Input => task.base.mount.clone(),
            TreeKind::Text if !self.text_holders.contain(digest, task.trees) => {
                return Ok(Rewritten::Same);
            }
            // It is the same for all that name it.
            TreeKind::Text => None,
        };
        let place = Place {
            parent: task.resolver.key,
            directory: digest,
            tree: spot.tree,
            mount,
            path: spot.path.to_owned(),
            set: (!spot.implied.is_empty()).then_some(spot.set),
        };
        match self.memo.get(&place) {
            Some(known) if !known.holds_for(task.node) => {}
            Some(known) => match &known.rewritten {
                // Valid until one of them is done.
                Rewritten::Waits(nodes)
                    if nodes.iter().any(|node| (task.output)(*node, "").is_some()) => {}
                rewritten => {
                    self.for_its_writer |= known.only_for.is_some();
                    return Ok(rewritten.clone());
                }
            },
            None => {}
        }
        let directory = task
            .trees
            .get(&digest)
            .ok_or(Unadaptable::Directory(digest))?;
        // An empty one may stand anywhere.
        let is_empty = directory.files.is_empty() && directory.directories.is_empty();
        if is_empty && spot.implied.is_empty() {
            return Ok(Rewritten::Same);
        }
        let places = self.places.entry(digest).or_default();
        *places += 1;
        if *places > MAX_PLACES {
            return Err(Unadaptable::TooLarge);
        }
        let above = std::mem::take(&mut self.for_its_writer);
        let rewritten = self.rewrite_entries(task, Some(digest), directory, spot)?;
        let known = Known {
            rewritten: rewritten.clone(),
            only_for: self.for_its_writer.then_some(task.node),
        };
        self.for_its_writer |= above;
        self.memo.insert(place, known);
        Ok(rewritten)
    }

    /// Rewrites a directory, or makes one of `NOTHING`, which has no digest.
    fn rewrite_entries<O>(
        &mut self,
        task: &Task<'_, O>,
        digest: Option<Digest>,
        directory: &Directory,
        spot: Spot<'_>,
    ) -> Result<Rewritten, Unadaptable>
    where
        O: Fn(Node, &str) -> Option<Option<Digest>>,
    {
        let not_canonical = || Unadaptable::NotCanonical(digest.unwrap_or(task.base.digest));
        let mut waits: Vec<Node> = Vec::new();
        let mut awaits: Option<Arc<str>> = None;
        let mut changes = Vec::new();
        let mut sources = Vec::new();
        let mut revision = match spot.implied {
            [] => Revision::default(),
            _ => Revision::of(directory, digest.is_some(), spot).ok_or_else(not_canonical)?,
        };
        for (index, (name, recorded)) in directory.files.iter().enumerate() {
            if revision.files.contains_key(&index) {
                continue;
            }
            let path = child_path(spot.path, name);
            let file = TreeFile {
                node: task.node,
                base: task.base,
                tree: spot.tree,
                path: &path,
                digest: *recorded,
            };
            self.for_its_writer |= task.resolver.is_read_by_its_writer(file);
            match task.resolver.resolve(file, &task.output) {
                Current::Recorded => {}
                Current::Source(_, now) | Current::Stored(now) if now == *recorded => {}
                Current::Source(source, now) => {
                    sources.push((now, source.to_owned()));
                    revision.files.insert(index, Some(now));
                    changes.push(change(task, file, now));
                }
                Current::Stored(now) => {
                    revision.files.insert(index, Some(now));
                    changes.push(change(task, file, now));
                }
                Current::Pending(node) => waits.push(node),
                Current::Awaited => awaits = Some(path.into()),
                Current::Vanished(path) => return Err(Unadaptable::Vanished(path)),
            }
        }
        let mut below = Vec::new();
        for (index, (name, recorded)) in directory.directories.iter().enumerate() {
            let implied = revision.below.remove(name.as_str()).unwrap_or_default();
            let child = Spot {
                path: &child_path(spot.path, name),
                implied: &implied,
                ..spot
            };
            match self.rewrite(task, *recorded, child)? {
                Rewritten::Same => {}
                Rewritten::New(new) => {
                    revision.directories.insert(index, Some(new.digest));
                    below.push(new);
                }
                Rewritten::Gone => {
                    revision.directories.insert(index, None);
                }
                Rewritten::Waits(nodes) => waits.extend_from_slice(&nodes),
                Rewritten::Awaits(path) => awaits = Some(path),
            }
        }
        for (name, implied) in std::mem::take(&mut revision.below) {
            let child = Spot {
                path: &child_path(spot.path, name),
                implied: &implied,
                ..spot
            };
            if let Rewritten::New(new) = self.rewrite_entries(task, None, &NOTHING, child)? {
                revision.grown.push((name, new.digest));
                below.push(new);
            }
        }
        if let Some(path) = awaits {
            return Ok(Rewritten::Awaits(path));
        }
        if !waits.is_empty() {
            return Ok(Rewritten::Waits(distinct(waits)));
        }
        if revision.is_nothing() {
            return Ok(Rewritten::Same);
        }
        let message = revision.apply(directory).ok_or_else(not_canonical)?;
        changes.extend(revision.entries_that_differ(directory, spot.path, task.base));
        let is_empty = message.encoded_len() == 0;
        if is_empty && !revision.stands && !spot.path.is_empty() {
            return Ok(Rewritten::Gone);
        }
        let (new, encoded) = task.base.digest.function().of_message(&message);
        if Some(new) == digest {
            return Ok(Rewritten::Same);
        }
        Ok(Rewritten::New(Arc::new(NewDirectory {
            digest: new,
            encoded,
            files: sources,
            changes,
            directories: below,
        })))
    }
}

/// What is said of a file that was replaced by `now`.
fn change<O>(task: &Task<'_, O>, file: TreeFile<'_>, now: Digest) -> Arc<Change>
where
    O: Fn(Node, &str) -> Option<Option<Digest>>,
{
    let origin = task.resolver.telling(file, &task.output);
    let path = file.path.to_owned();
    Arc::new(Change::new(path, Some(file.digest), Some(now), origin))
}

fn distinct(mut nodes: Vec<Node>) -> Arc<[Node]> {
    nodes.sort_unstable();
    nodes.dedup();
    nodes.into()
}

/// The base action with another tree, or other digest-valued text, or both.
fn adapted<O>(
    task: &Task<'_, O>,
    tree: Option<Arc<NewDirectory>>,
    new: NewTexts,
) -> Result<Adapted, Unadaptable> {
    let not_canonical = || Unadaptable::NotCanonical(task.base.digest);
    let mut action =
        reapi::Action::decode(task.base.encoded.clone()).map_err(|_| not_canonical())?;
    if let Some(tree) = &tree {
        action.input_root_digest = Some(tree.digest.to_proto());
    }
    let function = task.base.digest.function();
    let command = match new.replacements.is_empty() {
        true => None,
        false => {
            let encoded = task.command.ok_or_else(not_canonical)?;
            let mut command =
                reapi::Command::decode(encoded.clone()).map_err(|_| not_canonical())?;
            if command.encode_to_vec() != *encoded {
                return Err(not_canonical());
            }
            texts::replace(&mut action, &mut command, function, &new.replacements);
            let (digest, encoded) = function.of_message(&command);
            action.command_digest = Some(digest.to_proto());
            Some((digest, encoded))
        }
    };
    let (action, encoded) = function.of_message(&action);
    Ok(Adapted {
        action,
        encoded,
        tree,
        text_trees: new.trees,
        command,
    })
}

#[cfg(test)]
mod tests {
    use super::super::known::{Known, Sources};
    use super::*;
    use crate::speculation::records::parent::fixture::Dice;
    use crate::speculation::records::parent::{Origin, OverlayTable, Parent, fixture};
    use std::collections::BTreeMap;

    /// A directory without its contents: those are looked up by path.
    #[derive(Clone, Default)]
    struct Shape {
        files: BTreeMap<String, Kind>,
        links: Vec<String>,
        directories: BTreeMap<String, Shape>,
    }

    #[derive(Clone, Copy)]
    struct Kind {
        executable: bool,
        with_properties: bool,
    }

    type Contents = BTreeMap<String, String>;

    impl Shape {
        fn random(dice: &mut Dice, depth: usize) -> Self {
            let mut shape = Shape::default();
            for number in 0..dice.roll(4) {
                let kind = Kind {
                    executable: dice.roll(2) == 0,
                    with_properties: dice.roll(4) == 0,
                };
                shape.files.insert(format!("file{number}"), kind);
            }
            for number in 0..dice.roll(2) {
                shape.links.push(format!("link{number}"));
            }
            if depth > 0 {
                for number in 0..dice.roll(4) {
                    let below = Shape::random(dice, depth - 1);
                    shape.directories.insert(format!("dir{number}"), below);
                }
            }
            shape
        }

        fn paths(&self, below: &str, paths: &mut Vec<String>) {
            paths.extend(self.files.keys().map(|name| child_path(below, name)));
            for (name, shape) in &self.directories {
                shape.paths(&child_path(below, name), paths);
            }
        }

        /// Encodes the tree with `contents`. Returns its root; all directories go to `trees`.
        fn encode(&self, below: &str, contents: &Contents, trees: &mut Trees) -> Digest {
            let files = self.files.iter().map(|(name, kind)| reapi::FileNode {
                name: name.clone(),
                digest: Some(content_digest(&contents[&child_path(below, name)]).to_proto()),
                is_executable: kind.executable,
                node_properties: kind.with_properties.then(|| reapi::NodeProperties {
                    unix_mode: Some(0o755),
                    ..reapi::NodeProperties::default()
                }),
            });
            let symlinks = self.links.iter().map(|name| reapi::SymlinkNode {
                name: name.clone(),
                target: "../elsewhere".to_owned(),
                ..reapi::SymlinkNode::default()
            });
            let files = files.collect();
            let symlinks = symlinks.collect();
            let mut message = reapi::Directory {
                files,
                symlinks,
                node_properties: (!self.links.is_empty()).then(|| reapi::NodeProperties {
                    properties: vec![reapi::NodeProperty {
                        name: "SubtreeReadOnly".to_owned(),
                        value: "true".to_owned(),
                    }],
                    ..reapi::NodeProperties::default()
                }),
                ..reapi::Directory::default()
            };
            for (name, shape) in &self.directories {
                let digest = shape.encode(&child_path(below, name), contents, trees);
                message.directories.push(reapi::DirectoryNode {
                    name: name.clone(),
                    digest: Some(digest.to_proto()),
                });
            }
            let (digest, encoded) = Digest::of_message(&message);
            trees.insert(
                digest,
                Arc::new(Directory::parse(encoded, digest.function()).unwrap()),
            );
            digest
        }
    }

    fn content_digest(content: &str) -> Digest {
        Digest::of(content.as_bytes())
    }

    fn base(input_root: Digest) -> BaseAction {
        let encoded = reapi::Action {
            command_digest: Some(content_digest("command").to_proto()),
            input_root_digest: Some(input_root.to_proto()),
            ..reapi::Action::default()
        };
        let (digest, encoded) = Digest::of_message(&encoded);
        BaseAction {
            digest,
            encoded,
            ..fixture::base("", input_root)
        }
    }

    /// A workspace, and actions that each read a part of it.
    struct Scene {
        shapes: Vec<Shape>,
        bases: Vec<BaseAction>,
        trees: Trees,
        overlays: OverlayTable,
        old: Contents,
        new: Contents,
        sources: Sources,
    }

    impl Scene {
        /// Of each ten files, `changes` change.
        fn random(dice: &mut Dice, changes: usize) -> Self {
            let whole = Shape::random(dice, 4);
            let mut paths = Vec::new();
            whole.paths("", &mut paths);
            let mut scene = Scene {
                shapes: Vec::new(),
                bases: Vec::new(),
                trees: Trees::new(),
                overlays: OverlayTable::default(),
                old: Contents::new(),
                new: Contents::new(),
                sources: Sources::new(),
            };
            for path in paths {
                // Many files have the same content.
                let old = format!("old {}", dice.roll(5));
                let new = match dice.roll(10) < changes {
                    true => format!("new {}", dice.roll(5)),
                    false => old.clone(),
                };
                let source = PathBuf::from("/p").join(&path);
                scene
                    .overlays
                    .add(content_digest(&old), Origin::Disk(source.clone()));
                scene.sources.insert(source, Some(content_digest(&new)));
                scene.old.insert(path.clone(), old);
                scene.new.insert(path, new);
            }
            for _ in 0..6 {
                let mut shape = whole.clone();
                shape.directories.retain(|_, _| dice.roll(3) > 0);
                shape.files.retain(|_, _| dice.roll(3) > 0);
                let root = shape.encode("", &scene.old, &mut scene.trees);
                scene.bases.push(base(root));
                scene.shapes.push(shape);
            }
            scene
        }

        fn instantiate(&self, instantiator: &mut Instantiator, node: Node) -> Instantiation {
            let known = Known {
                disk: self.sources.clone(),
                ..Known::default()
            };
            let parent = fixture::invocation(self.overlays.clone());
            let base = &self.bases[node];
            instantiate(instantiator, node, base, &parent, &known, &self.trees).unwrap()
        }
    }

    fn instantiate(
        instantiator: &mut Instantiator,
        node: Node,
        base: &BaseAction,
        parent: &Parent,
        known: &Known,
        trees: &Trees,
    ) -> Result<Instantiation, Unadaptable> {
        let resolver = Resolver {
            key: parent.identity.weak_key(),
            parent,
            known,
            expected: &HashSet::new(),
            trees,
            producers: &HashMap::new(),
        };
        instantiator.instantiate(&Task {
            node,
            base,
            resolver: &resolver,
            trees,
            texts: &Texts::Replaced(Replacements::new()),
            command: None,
            output: |_: Node, _: &str| None,
        })
    }

    #[test]
    fn without_a_change_every_action_is_unchanged() {
        let mut dice = Dice(1);
        for _ in 0..200 {
            let scene = Scene::random(&mut dice, 0);
            let mut instantiator = Instantiator::default();
            for node in 0..scene.bases.len() {
                let instantiation = scene.instantiate(&mut instantiator, node);
                assert!(matches!(instantiation, Instantiation::Unchanged));
            }
        }
    }

    #[test]
    fn adapting_a_tree_is_the_same_as_making_it_anew() {
        let mut dice = Dice(2);
        let mut adapted_trees = 0;
        for round in 0..300 {
            let scene = Scene::random(&mut dice, 1 + round % 4);
            let mut shared = Instantiator::default();
            for node in 0..scene.bases.len() {
                let mut afresh = Trees::new();
                let expected = scene.shapes[node].encode("", &scene.new, &mut afresh);
                let alone = scene.instantiate(&mut Instantiator::default(), node);
                let together = scene.instantiate(&mut shared, node);
                for instantiation in [alone, together] {
                    match instantiation {
                        Instantiation::Unchanged => {
                            assert_eq!(expected, scene.bases[node].input_root);
                        }
                        Instantiation::Adapted(adapted) => {
                            adapted_trees += 1;
                            assert_eq!(adapted.tree.as_ref().unwrap().digest, expected);
                            assert_eq!(adapted.action, base(expected).digest);
                            assert_eq!(adapted.encoded, base(expected).encoded);
                            assert_complete(&scene, &adapted, &afresh);
                        }
                        waits => panic!("for whom? {waits:?}"),
                    }
                }
            }
        }
        assert!(adapted_trees > 1000, "{adapted_trees}");
    }

    /// What the CAS had and what is uploaded make up the whole new tree.
    fn assert_complete(scene: &Scene, adapted: &Adapted, afresh: &Trees) {
        let mut needed = HashMap::new();
        adapted.collect_blobs(&mut HashSet::new(), &mut needed);
        assert!(matches!(
            needed.get(&adapted.action),
            Some(Blob::Message(_))
        ));
        let old: HashSet<Digest> = scene.old.values().map(|old| content_digest(old)).collect();
        for (digest, directory) in afresh {
            let is_there = scene.trees.contains_key(digest);
            assert!(is_there || needed.contains_key(digest), "a directory");
            for (_, file) in &directory.files {
                assert!(old.contains(file) || needed.contains_key(file), "a file");
            }
        }
        for (digest, blob) in needed {
            match blob {
                Blob::Message(encoded) | Blob::Directory(encoded) => {
                    assert_eq!(Digest::of(&encoded), digest)
                }
                Blob::File(path) => assert_eq!(scene.sources[&path], Some(digest)),
            }
        }
    }

    #[test]
    fn a_directory_at_too_many_places_makes_its_action_unadaptable() {
        let mut trees = Trees::new();
        let shape = Shape {
            files: [(
                "file".to_owned(),
                Kind {
                    executable: false,
                    with_properties: false,
                },
            )]
            .into(),
            ..Shape::default()
        };
        let mut root = shape.encode(
            "",
            &[("file".to_owned(), "old".to_owned())].into(),
            &mut trees,
        );
        for _ in 0..40 {
            let directories = ["a", "b"].map(|name| reapi::DirectoryNode {
                name: name.to_owned(),
                digest: Some(root.to_proto()),
            });
            let (digest, encoded) = Digest::of_message(&reapi::Directory {
                directories: directories.into(),
                ..reapi::Directory::default()
            });
            trees.insert(
                digest,
                Arc::new(Directory::parse(encoded, digest.function()).unwrap()),
            );
            root = digest;
        }
        let answer = instantiate(
            &mut Instantiator::default(),
            0,
            &base(root),
            &fixture::invocation(OverlayTable::default()),
            &Known::default(),
            &trees,
        );
        assert_eq!(answer.err(), Some(Unadaptable::TooLarge));
    }
}
