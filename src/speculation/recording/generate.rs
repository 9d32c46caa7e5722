//! Generation: finds for every file in the recorded input trees where it came from. Runs in the
//! background after a parent has ended, over all of its actions at once: origins depend on the
//! digest, not on the action, so a parent has one overlay table.
//!
//! The sources of an invocation are on disk, those of an action parent in its own input tree. That
//! holds what other parents have written, too; it is looked for among their outputs, their sources
//! and the outputs of their actions, for all of that may be known before the tree is.
//!
//! Digest-valued text of the actions of an action parent may name further trees: the root of a
//! sandbox, say. What stands in them others have put there. Such a tree may be a whole system, so
//! overlays are made only for what recorded parents have put out.
//!
//! A directory on disk counts as the root of input trees only if it is proven: at least one file
//! below it has the digest that was recorded for its path. Others may have been edited since.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cas::directories::{Holders, Trees, child_path};
use crate::cas::{Digest, DigestFunction};
use crate::config::Mode;
use crate::speculation::planning::instantiate::MAX_PLACES;
use crate::speculation::planning::resolve::roots;
use crate::speculation::records::parent::{BaseAction, Origin, OverlayTable, Parent, WeakKey};
use crate::workspace::index::FileIndex;

/// At how many paths of one tree, or of one output, a file is looked for.
const MAX_PATHS: usize = 16;
/// Overlays for the files of trees that text names, in all. Where there would be more, the text is
/// not foreseen.
const MAX_TEXT_OVERLAYS: usize = 50_000;

/// Where sources are.
pub enum Sources<'a> {
    /// On disk.
    Disk(&'a FileIndex),
    /// In the input tree of the parent itself; and other parents, of whose outputs it holds some.
    Tree {
        /// Root of the tree.
        own: Digest,
        /// See `depends_on`.
        others: &'a [Arc<Parent>],
    },
}

/// The overlay table of `actions`. All directories are in `trees`. Blocks.
pub fn generate(
    actions: &[Arc<BaseAction>],
    trees: &Trees,
    sources: &Sources<'_>,
    mode: Mode,
) -> OverlayTable {
    let outputs = WrittenFiles::of(actions);
    let index = match sources {
        Sources::Disk(index) => Some(*index),
        Sources::Tree { .. } => None,
    };
    let mut generation = Generation {
        outputs: &outputs,
        index,
        actions_too: mode.uses_action_overlays(),
        overlays: OverlayTable::default(),
        visited: HashSet::new(),
        seen: HashSet::new(),
        on_disk: HashMap::new(),
        sources: Vec::new(),
        proven: HashSet::new(),
    };
    for base in actions {
        generation.visit(base, trees);
    }
    let mut overlays = generation.finish();
    if let Sources::Tree { own, others } = sources {
        let read = ReadFiles::below(actions.iter().map(|base| base.input_root), trees);
        read.add_tree(None, *own, trees, &mut overlays);
        for other in others.iter().filter(|other| read.depend_on(other)) {
            read.add_other(other, trees, mode, &mut overlays);
        }
    }
    overlays
}

/// Adds where the files `staged` in trees that text names came from, as far as `others` have put
/// them there. Returns whether that is all of it. Blocks.
pub fn generate_for_texts(
    staged: &ReadFiles,
    others: &[Arc<Parent>],
    trees: &Trees,
    mode: Mode,
    overlays: &mut OverlayTable,
) -> bool {
    let mut found = OverlayTable::default();
    for other in others.iter().filter(|other| staged.hold_most_of(other)) {
        let put_out = staged.put_out_by(other);
        put_out.add_other(other, trees, mode, &mut found);
        if found.iter().count() > MAX_TEXT_OVERLAYS {
            tracing::debug!("the trees that text names hold too many files of other parents");
            return false;
        }
    }
    for (target, origin) in found.iter() {
        overlays.add(*target, origin.clone());
    }
    true
}

/// Files that actions read: their digests, and the names under which they do.
#[derive(Default)]
pub struct ReadFiles(HashMap<Digest, HashSet<String>>);

impl ReadFiles {
    /// What stands below `roots`.
    pub fn below(roots: impl IntoIterator<Item = Digest>, trees: &Trees) -> Self {
        let mut files: HashMap<Digest, HashSet<String>> = HashMap::new();
        let mut visited = HashSet::new();
        let mut open: Vec<Digest> = roots.into_iter().collect();
        while let Some(digest) = open.pop() {
            let Some(directory) = trees.get(&digest).filter(|_| visited.insert(digest)) else {
                continue;
            };
            for (name, file) in &directory.files {
                files.entry(*file).or_default().insert(name.clone());
            }
            open.extend(directory.directories.iter().map(|(_, child)| *child));
        }
        ReadFiles(files)
    }

    /// Whether any of them is an output of `other`, by name and content.
    pub fn depend_on(&self, other: &Parent) -> bool {
        let outputs = other.executed.iter().flat_map(|executed| &executed.outputs);
        outputs
            .into_iter()
            .any(|(path, digest)| digest.size() > 0 && self.has(digest, path))
    }

    /// Whether more than half of the output of `other` is among them, by name and content. (A whole
    /// system has some files of anybody's: the text of a licence, say.)
    pub fn hold_most_of(&self, other: &Parent) -> bool {
        let outputs = other.executed.iter().flat_map(|executed| &executed.outputs);
        let (mut held, mut all) = (0, 0);
        for (path, digest) in outputs.filter(|(_, digest)| digest.size() > 0) {
            all += 1;
            held += usize::from(self.has(digest, path));
        }
        held * 2 > all
    }

    /// Those that are outputs of `other`. Empty files are not: any two of them are equal.
    fn put_out_by(&self, other: &Parent) -> Self {
        let outputs = other.executed.iter().flat_map(|executed| &executed.outputs);
        let outputs = outputs.filter(|(path, digest)| digest.size() > 0 && self.has(digest, path));
        let mut files: HashMap<Digest, HashSet<String>> = HashMap::new();
        for (path, digest) in outputs {
            let names = files.entry(*digest).or_default();
            names.insert(name_of(path).to_owned());
        }
        ReadFiles(files)
    }

    fn has(&self, digest: &Digest, path: &str) -> bool {
        let names = self.0.get(digest);
        names.is_some_and(|names| names.contains(name_of(path)))
    }

    /// Adds where they stand in the input tree of a parent.
    fn add_tree(
        &self,
        parent: Option<WeakKey>,
        root: Digest,
        trees: &Trees,
        overlays: &mut OverlayTable,
    ) {
        let mut paths: HashMap<Digest, Vec<String>> = HashMap::new();
        let mut places: HashMap<Digest, usize> = HashMap::new();
        let mut holders = Holders::of(self.0.keys().copied().collect());
        let mut open = vec![(root, String::new())];
        while let Some((digest, path)) = open.pop() {
            if !holders.contain(digest, trees) {
                continue;
            }
            let count = places.entry(digest).or_default();
            *count += 1;
            let Some(directory) = trees.get(&digest).filter(|_| *count <= MAX_PLACES) else {
                continue;
            };
            for (name, file) in &directory.files {
                if self.0.contains_key(file) {
                    let paths = paths.entry(*file).or_default();
                    paths.push(child_path(&path, name));
                }
            }
            for (name, child) in &directory.directories {
                open.push((*child, child_path(&path, name)));
            }
        }
        for (digest, mut paths) in paths {
            // Those under a name that they are read by come first.
            paths.sort_unstable_by_key(|path| (!self.has(&digest, path), path.clone()));
            for path in paths.into_iter().take(MAX_PATHS) {
                overlays.add(digest, Origin::Tree { parent, path });
            }
        }
    }

    /// Adds what they have of another parent: its output, its sources, its actions' outputs.
    fn add_other(&self, other: &Parent, trees: &Trees, mode: Mode, overlays: &mut OverlayTable) {
        let Some(executed) = &other.executed else {
            return;
        };
        let parent = other.identity.weak_key();
        let mut paths: HashMap<Digest, usize> = HashMap::new();
        for (path, digest) in &executed.outputs {
            let count = paths.entry(*digest).or_default();
            if *count < MAX_PATHS && self.has(digest, path) {
                *count += 1;
                let path = path.clone();
                overlays.add(*digest, Origin::Artifact { parent, path });
            }
        }
        self.add_tree(Some(parent), executed.input_root, trees, overlays);
        if !mode.crosses_parents() {
            return;
        }
        for base in other.actions.values() {
            for (path, digest) in &base.outputs {
                if self.0.contains_key(digest) {
                    let origin = Origin::Action {
                        parent: Some(parent),
                        action: base.digest,
                        path: path.clone(),
                    };
                    overlays.add(*digest, origin);
                }
            }
        }
    }
}

fn name_of(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// The files that actions write, by content and by place.
struct WrittenFiles {
    by_digest: HashMap<Digest, Vec<Origin>>,
    by_place: HashMap<PathBuf, Origin>,
}

impl WrittenFiles {
    fn of(actions: &[Arc<BaseAction>]) -> Self {
        let mut files = WrittenFiles {
            by_digest: HashMap::new(),
            by_place: HashMap::new(),
        };
        for base in actions {
            for (path, digest) in &base.outputs {
                let origin = Origin::Action {
                    parent: None,
                    action: base.digest,
                    path: path.clone(),
                };
                let of_digest = files.by_digest.entry(*digest).or_default();
                of_digest.push(origin.clone());
                if let Some(mount) = &base.mount {
                    files.by_place.insert(mount.join(path), origin);
                }
            }
        }
        files
    }
}

struct Generation<'a> {
    outputs: &'a WrittenFiles,
    /// None if sources are not on disk.
    index: Option<&'a FileIndex>,
    actions_too: bool,
    overlays: OverlayTable,
    /// Directories at the places where they were visited.
    visited: HashSet<(Digest, Option<PathBuf>, String)>,
    /// Digests whose ACTION origins by content were added.
    seen: HashSet<Digest>,
    /// What stands on disk at places that were looked at.
    on_disk: HashMap<PathBuf, Option<Digest>>,
    /// Files that are sources if their root is proven.
    sources: Vec<SourceFile>,
    /// Roots of input trees below which a file was as recorded.
    proven: HashSet<PathBuf>,
}

struct SourceFile {
    target: Digest,
    root: PathBuf,
    place: PathBuf,
}

impl Generation<'_> {
    fn visit(&mut self, base: &BaseAction, trees: &Trees) {
        let mut open = vec![(base.input_root, String::new())];
        let mut places_of: HashMap<Digest, usize> = HashMap::new();
        while let Some((digest, path)) = open.pop() {
            let count = places_of.entry(digest).or_default();
            let place = (digest, base.mount.clone(), path.clone());
            if *count >= MAX_PLACES || !self.visited.insert(place) {
                continue;
            }
            *count += 1;
            let Some(directory) = trees.get(&digest) else {
                continue;
            };
            for (name, target) in &directory.files {
                self.add_origins(base, &child_path(&path, name), *target);
            }
            for (name, child) in &directory.directories {
                open.push((*child, child_path(&path, name)));
            }
        }
    }

    fn add_origins(&mut self, base: &BaseAction, path: &str, target: Digest) {
        let written = base
            .mount
            .as_ref()
            .and_then(|mount| self.outputs.by_place.get(&mount.join(path)));
        match written {
            Some(origin) if self.actions_too => self.overlays.add(target, origin.clone()),
            // What an action writes is no source, however old the file on disk is.
            Some(_) => {}
            None if self.index.is_some() => self.add_source(base, path, target),
            None => {}
        }
        if self.actions_too && self.seen.insert(target) {
            for origin in self.outputs.by_digest.get(&target).into_iter().flatten() {
                self.overlays.add(target, origin.clone());
            }
        }
    }

    /// Finds the file on disk that `path` stands for: the first that is as it was recorded, or
    /// else the first that exists.
    fn add_source(&mut self, base: &BaseAction, path: &str, target: Digest) {
        let mut found = None;
        for root in roots(base) {
            let place = root.join(path);
            let Some(digest) = self.on_disk(&place, target.function()) else {
                continue;
            };
            let file = SourceFile {
                target,
                root: root.to_owned(),
                place,
            };
            if digest == target {
                self.proven.insert(file.root.clone());
                found = Some(file);
                break;
            }
            found = found.or(Some(file));
        }
        self.sources.extend(found);
    }

    /// The digest of the file at `place`, if there is one. It is hashed on this occasion, so that
    /// the next build need only look at its metadata.
    fn on_disk(&mut self, place: &Path, function: DigestFunction) -> Option<Digest> {
        if let Some(known) = self.on_disk.get(place) {
            return *known;
        }
        let index = self.index;
        let digest = index.and_then(|index| index.digest(place, function).ok());
        self.on_disk.insert(place.to_owned(), digest);
        digest
    }

    fn finish(mut self) -> OverlayTable {
        for file in self.sources {
            if self.proven.contains(&file.root) {
                self.overlays.add(file.target, Origin::Disk(file.place));
            }
        }
        self.overlays
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cas::directories::Directory;
    use crate::reapi;
    use crate::speculation::records::parent::{
        ActionParent, ExecutedParent, ParentIdentity, ParentKind, SubactionKey, fixture,
    };

    /// A tree of one directory with these files.
    fn tree(trees: &mut Trees, files: &[(&str, &str)]) -> Digest {
        let files = files.iter().map(|(name, content)| reapi::FileNode {
            name: (*name).to_owned(),
            digest: Some(Digest::of(content.as_bytes()).to_proto()),
            ..reapi::FileNode::default()
        });
        let message = reapi::Directory {
            files: files.collect(),
            ..reapi::Directory::default()
        };
        let (digest, encoded) = Digest::of_message(&message);
        trees.insert(
            digest,
            Arc::new(Directory::parse(encoded, digest.function()).unwrap()),
        );
        digest
    }

    fn action(
        name: &str,
        mount: &Path,
        input_root: Digest,
        outputs: &[(&str, &str)],
    ) -> Arc<BaseAction> {
        Arc::new(BaseAction {
            mount: Some(mount.to_owned()),
            outputs: outputs
                .iter()
                .map(|(path, content)| ((*path).to_owned(), Digest::of(content.as_bytes())))
                .collect(),
            ..fixture::base(name, input_root)
        })
    }

    fn origins(table: &OverlayTable, content: &str) -> Vec<Origin> {
        table.origins(&Digest::of(content.as_bytes())).to_vec()
    }

    #[test]
    fn sources_are_found_on_disk_and_outputs_at_their_action() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path();
        std::fs::write(root.join("a.c"), "source").unwrap();
        std::fs::write(root.join("edited.h"), "edited since").unwrap();
        std::fs::write(root.join("a.o"), "stale object").unwrap();
        let mut trees = Trees::new();
        let compiled = [
            ("a.c", "source"),
            ("edited.h", "recorded"),
            ("gone.h", "gone"),
        ];
        let compile = tree(&mut trees, &compiled);
        let link = tree(&mut trees, &[("a.o", "object")]);
        let actions = [
            action("compile", root, compile, &[("a.o", "object")]),
            action("link", root, link, &[("program", "program")]),
        ];
        let index = FileIndex::default();
        let table = generate(&actions, &trees, &Sources::Disk(&index), Mode::Full);
        assert_eq!(origins(&table, "source"), [Origin::Disk(root.join("a.c"))]);
        assert_eq!(
            origins(&table, "recorded"),
            [Origin::Disk(root.join("edited.h"))]
        );
        assert_eq!(origins(&table, "gone"), []);
        let compiled = Origin::Action {
            parent: None,
            action: actions[0].digest,
            path: "a.o".to_owned(),
        };
        assert_eq!(origins(&table, "object"), [compiled]);

        let table = generate(
            &actions,
            &trees,
            &Sources::Disk(&index),
            Mode::SourceArtifact,
        );
        assert_eq!(
            origins(&table, "object"),
            [],
            "a stale object is no source either"
        );
    }

    /// An element that was built from `sources` in a tree that holds the system, too.
    fn element(
        trees: &mut Trees,
        name: &str,
        sources: &[(&str, &str)],
        outputs: &[(&str, &str)],
    ) -> Parent {
        let mut parent = Parent::new(ParentIdentity {
            instance: "".into(),
            digest_function: DigestFunction::Sha256,
            uid: None,
            kind: ParentKind::Action(ActionParent {
                instance: "".into(),
                key: Digest::of(name.as_bytes()),
                name: name.to_owned(),
            }),
        });
        let outputs = outputs.iter();
        parent.executed = Some(Arc::new(ExecutedParent {
            action: Digest::of(name.as_bytes()),
            input_root: tree(trees, &[sources, &SYSTEM].concat()),
            texts: Vec::new(),
            outputs: outputs
                .map(|(path, content)| ((*path).to_owned(), Digest::of(content.as_bytes())))
                .collect(),
        }));
        parent
    }

    const SYSTEM: [(&str, &str); 3] = [("gcc", "gcc"), ("COPYING", "licence"), ("stamp", "")];

    #[test]
    fn of_a_tree_that_text_names_only_what_parents_have_put_there_has_origins() {
        let mut trees = Trees::new();
        let outputs = [
            ("usr/dep.h", "header"),
            ("usr/dep.o", "object"),
            ("usr/stamp", ""),
        ];
        let mut dep = element(&mut trees, "dep", &[("src.h", "header")], &outputs);
        let input = dep.executed.as_ref().unwrap().input_root;
        let compile = action("compile", Path::new("/"), input, &[("o", "object")]);
        let key = SubactionKey {
            action_key: compile.digest,
            mount: None,
        };
        dep.actions.insert(key, compile.clone());
        let outputs = [("COPYING", "licence"), ("a", "a"), ("b", "b")];
        let unrelated = element(&mut trees, "unrelated", &[], &outputs);
        let staged = [
            ("dep.h", "header"),
            ("dep.o", "object"),
            ("new", "of nobody"),
        ];
        let root = tree(&mut trees, &[&staged[..], &SYSTEM].concat());
        let parent = dep.identity.weak_key();
        let others = [Arc::new(dep), Arc::new(unrelated)];
        let generate = |mode| {
            let mut table = OverlayTable::default();
            let staged = ReadFiles::below([root], &trees);
            assert!(generate_for_texts(
                &staged, &others, &trees, mode, &mut table
            ));
            table
        };
        let table = generate(Mode::Full);
        let artifact = |path: &str| Origin::Artifact {
            parent,
            path: path.to_owned(),
        };
        let source = Origin::Tree {
            parent: Some(parent),
            path: "src.h".to_owned(),
        };
        let made = Origin::Action {
            parent: Some(parent),
            action: compile.digest,
            path: "o".to_owned(),
        };
        assert_eq!(origins(&table, "header"), [artifact("usr/dep.h"), source]);
        assert_eq!(origins(&table, "object"), [artifact("usr/dep.o"), made]);
        for content in ["gcc", "licence", "", "of nobody"] {
            assert_eq!(origins(&table, content), [], "{content}");
        }
        let table = generate(Mode::SourceArtifact);
        assert_eq!(origins(&table, "object"), [artifact("usr/dep.o")]);
    }

    #[test]
    fn a_tree_with_too_many_files_of_other_parents_is_left_alone() {
        let mut trees = Trees::new();
        let names: Vec<String> = (0..=MAX_TEXT_OVERLAYS).map(|n| n.to_string()).collect();
        let files: Vec<_> = names
            .iter()
            .map(|name| (name.as_str(), name.as_str()))
            .collect();
        let root = tree(&mut trees, &files);
        let others = [Arc::new(element(&mut trees, "large", &[], &files))];
        let mut table = OverlayTable::default();
        let staged = ReadFiles::below([root], &trees);
        let generated = generate_for_texts(&staged, &others, &trees, Mode::Full, &mut table);
        assert!(!generated);
        assert_eq!(table.iter().count(), 0);
    }

    #[test]
    fn a_directory_below_which_nothing_is_as_recorded_is_no_root() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path();
        std::fs::write(root.join("a.c"), "of another project").unwrap();
        let mut trees = Trees::new();
        let input = tree(&mut trees, &[("a.c", "source")]);
        let actions = [action("compile", root, input, &[])];
        let table = generate(
            &actions,
            &trees,
            &Sources::Disk(&FileIndex::default()),
            Mode::Full,
        );
        assert_eq!(table.iter().count(), 0);
    }
}
