//! Where "current" comes from: one ordered policy that answers what a recorded file is now.
//!
//! All origins of its digest are asked: SOURCE (the disk, the own parent's tree, other parents'
//! trees), then ACTION (own, then others'), then ARTIFACT. Each kind answers with a digest, with
//! what must be waited for, or not at all, and then the next is asked. A file that none of them
//! knows is what an execution has shown it to be, and else as it was recorded.
//!
//! What entries a tree has is recorded, but for those that executions have shown to appear or to
//! vanish with a change: where that change is, they do.
//!
//! What stands in a tree that digest-valued text names was put there before the own parent began: of
//! its files, only other parents are asked. Where one of these has not been asked for, but will be,
//! for something that it depends on has changed, a file that only its output holds is awaited.
//!
//! Where a kind has several origins of one digest, those whose path is nearest to the file's own
//! count: two files with the same content (both empty, say) are told apart by it.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::edits::{Cause, Implied, Learned};
use super::known::Known;
use super::tree_edit::OldFile;
use crate::cas::Digest;
use crate::cas::directories::{Trees, find_file};
use crate::cas::outputs::find_output;
use crate::speculation::records::parent::{BaseAction, Origin, Parent, WeakKey};

/// Index of an action in its plan.
pub type Node = usize;

/// What a tree is to an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TreeKind {
    /// Its input tree.
    Input,
    /// One that its digest-valued text names.
    Text,
}

/// One file of a base action's input tree, or of another tree that it names.
#[derive(Clone, Copy, Debug)]
pub struct TreeFile<'a> {
    /// The action.
    pub node: Node,
    /// Its recorded form.
    pub base: &'a BaseAction,
    /// Which tree it stands in.
    pub tree: TreeKind,
    /// Path relative to the root of that.
    pub path: &'a str,
    /// The digest that was recorded.
    pub digest: Digest,
}

/// What a recorded file is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Current<'a> {
    /// Nothing is known of it: taken to be as it was.
    Recorded,
    /// That source file on disk, with this digest.
    Source(&'a Path, Digest),
    /// A file that the CAS holds: of a parent's tree, or an output of what is done.
    Stored(Digest),
    /// Known once that action of the plan is done.
    Pending(Node),
    /// Known once a parent has ended that is under way, or expected.
    Awaited,
    /// There is no such file any more.
    Vanished(PathBuf),
}

/// Resolves the overlays of one parent.
pub struct Resolver<'a> {
    /// The weak key of the parent.
    pub key: WeakKey,
    /// Its records.
    pub parent: &'a Parent,
    /// What is known now.
    pub known: &'a Known,
    /// The parents that will be asked for, as what they depend on has changed.
    pub expected: &'a HashSet<WeakKey>,
    /// The directories of all trees.
    pub trees: &'a Trees,
    /// The actions of the plan, by their parent and digest.
    pub producers: &'a HashMap<(WeakKey, Digest), Node>,
}

/// The kinds of origins, strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Kind {
    Disk,
    OwnTree,
    OtherTree,
    OwnAction,
    OtherAction,
    Artifact,
}

impl Kind {
    fn of(origin: &Origin) -> Self {
        match origin {
            Origin::Disk(_) => Kind::Disk,
            Origin::Tree { parent: None, .. } => Kind::OwnTree,
            Origin::Tree { .. } => Kind::OtherTree,
            Origin::Action { parent: None, .. } => Kind::OwnAction,
            Origin::Action { .. } => Kind::OtherAction,
            Origin::Artifact { .. } => Kind::Artifact,
        }
    }
}

impl Resolver<'_> {
    /// What `file` is now. `output` tells what an action of the plan has written to a path, or
    /// `None` while it is not done.
    pub fn resolve<'b>(
        &'b self,
        file: TreeFile<'_>,
        output: impl Fn(Node, &str) -> Option<Option<Digest>>,
    ) -> Current<'b> {
        let current = self.by_origin(file, output);
        let learned = match file.tree {
            TreeKind::Input => self.learned(file.base),
            TreeKind::Text => None,
        };
        match (&current, learned) {
            (Current::Recorded | Current::Vanished(_), Some(learned)) => {
                match learned.changed(file.path, file.digest) {
                    Some(digest) => Current::Stored(digest),
                    None => current,
                }
            }
            _ => current,
        }
    }

    /// The entries that appear in the tree of action `node`, or vanish from it, each with its
    /// number among those that were learned.
    pub fn implied<'b>(
        &'b self,
        node: Node,
        base: &'b BaseAction,
        output: impl Fn(Node, &str) -> Option<Option<Digest>>,
    ) -> impl Iterator<Item = (usize, &'b Implied)> {
        let mut happened: HashMap<&OldFile, bool> = HashMap::new();
        let mut has_happened = move |cause: &'b Cause| {
            let known = happened.entry(&cause.file);
            *known.or_insert_with_key(|file| {
                let is_read = find_file(self.trees, base.input_root, &file.path);
                let file = TreeFile {
                    node,
                    base,
                    tree: TreeKind::Input,
                    path: &file.path,
                    digest: file.digest,
                };
                is_read == Some(file.digest) && (cause.vanished || self.has_changed(file, &output))
            })
        };
        let learned = self.learned(base).map_or(&[][..], Learned::implied);
        let learned = learned.iter().enumerate();
        learned.filter(move |(_, implied)| implied.causes().any(&mut has_happened))
    }

    /// Whether `file` is other than it was recorded, as far as can be said.
    fn has_changed(
        &self,
        file: TreeFile<'_>,
        output: impl Fn(Node, &str) -> Option<Option<Digest>>,
    ) -> bool {
        match self.resolve(file, output) {
            Current::Recorded => false,
            Current::Source(_, now) | Current::Stored(now) => now != file.digest,
            Current::Pending(_) | Current::Awaited | Current::Vanished(_) => true,
        }
    }

    fn learned(&self, base: &BaseAction) -> Option<&Learned> {
        self.known.edits.of(self.key, base)
    }

    /// What `file` is now by its origins alone.
    pub fn by_origin<'b>(
        &'b self,
        file: TreeFile<'_>,
        output: impl Fn(Node, &str) -> Option<Option<Digest>>,
    ) -> Current<'b> {
        self.with_origin(file, output).0
    }

    /// The origin that says what `file` is now, if one does.
    pub fn telling(
        &self,
        file: TreeFile<'_>,
        output: impl Fn(Node, &str) -> Option<Option<Digest>>,
    ) -> Option<&Origin> {
        self.with_origin(file, output).1
    }

    fn with_origin<'b>(
        &'b self,
        file: TreeFile<'_>,
        output: impl Fn(Node, &str) -> Option<Option<Digest>>,
    ) -> (Current<'b>, Option<&'b Origin>) {
        let mut vanished = None;
        let mut awaited = false;
        let candidates = self.candidates(file);
        for &origin in &candidates {
            let found = match origin {
                Origin::Disk(path) => match self.known.disk.get(path) {
                    Some(Some(digest)) => {
                        return (Current::Source(path, *digest), Some(origin));
                    }
                    Some(None) | None => None,
                },
                Origin::Tree { parent, path } => match self.current(*parent) {
                    Some(now) => find_file(self.trees, now.input_root, path),
                    None => continue,
                },
                Origin::Action { action, path, .. } => match self.producer(origin, action) {
                    Some(producer) => match output(producer, path) {
                        Some(found) => found,
                        None => return (Current::Pending(producer), Some(origin)),
                    },
                    None => continue,
                },
                Origin::Artifact { parent, path } => match self.current(Some(*parent)) {
                    Some(now) => match &now.outputs {
                        Some(outputs) => find_output(outputs, path),
                        None => {
                            awaited = true;
                            continue;
                        }
                    },
                    None => {
                        awaited |=
                            file.tree == TreeKind::Text && self.is_to_make(*parent, &candidates);
                        continue;
                    }
                },
            };
            match found {
                Some(digest) => return (Current::Stored(digest), Some(origin)),
                None => vanished = vanished.or(Some(path_of(origin))),
            }
        }
        let unknown = match vanished {
            _ if awaited => Current::Awaited,
            Some(path) => Current::Vanished(path),
            None => Current::Recorded,
        };
        (unknown, None)
    }

    /// Whether a file with these origins is made anew by another parent, which has not been asked
    /// for: not, if it is one of that one's sources, of which no change is known.
    fn is_to_make(&self, other: WeakKey, candidates: &[&Origin]) -> bool {
        let is_source = |origin: &&Origin| matches!(origin, Origin::Tree { parent: Some(parent), .. } if *parent == other);
        self.expected.contains(&other) && !candidates.iter().any(is_source)
    }

    fn current(&self, parent: Option<WeakKey>) -> Option<&super::known::CurrentParent> {
        self.known.parents.get(&parent.unwrap_or(self.key))
    }

    fn producer(&self, origin: &Origin, action: &Digest) -> Option<Node> {
        let parent = origin.parent().unwrap_or(self.key);
        self.producers.get(&(parent, *action)).copied()
    }

    /// The origins of `file`, strongest first; of each kind those nearest to its path.
    fn candidates<'b>(&'b self, file: TreeFile<'_>) -> Vec<&'b Origin> {
        let mut origins: Vec<&Origin> = self
            .parent
            .overlays
            .origins(&file.digest)
            .iter()
            .filter(|origin| match file.tree {
                TreeKind::Input => !self.is_own_output(file, origin),
                TreeKind::Text => origin.parent().is_some(),
            })
            .collect();
        if origins.len() > 1 {
            let places: Vec<PathBuf> = roots(file.base).map(|root| root.join(file.path)).collect();
            let at_its_place = |origin: &&Origin| match origin {
                Origin::Disk(path) => places.contains(path),
                Origin::Action {
                    parent: None, path, ..
                } => path == file.path,
                _ => false,
            };
            // A file that stands where an own action writes is not some file on disk like it, nor
            // the other way round.
            if origins.iter().any(at_its_place) {
                origins.retain(|origin| {
                    at_its_place(origin)
                        || !matches!(Kind::of(origin), Kind::Disk | Kind::OwnAction)
                });
            }
            let nearness = |origin: &Origin| match origin {
                Origin::Disk(_) => 0,
                Origin::Tree { path, .. }
                | Origin::Action { path, .. }
                | Origin::Artifact { path, .. } => common_end(path, file.path),
            };
            let mut nearest: HashMap<(Kind, Option<WeakKey>), usize> = HashMap::new();
            let class = |origin: &Origin| (Kind::of(origin), origin.parent());
            for origin in &origins {
                let best = nearest.entry(class(origin)).or_default();
                *best = nearness(origin).max(*best);
            }
            origins.retain(|origin| nearness(origin) == nearest[&class(origin)]);
            origins.sort_by_key(|origin| Kind::of(origin));
        }
        origins
    }

    /// Whether what `file` is depends on which action reads it: on one that writes it itself.
    pub fn is_read_by_its_writer(&self, file: TreeFile<'_>) -> bool {
        let mut origins = self.parent.overlays.origins(&file.digest).iter();
        file.tree == TreeKind::Input && origins.any(|origin| self.is_own_output(file, origin))
    }

    /// An action that rewrites one of its inputs does not wait for itself.
    fn is_own_output(&self, file: TreeFile<'_>, origin: &Origin) -> bool {
        matches!(origin, Origin::Action { action, .. }
            if self.producer(origin, action) == Some(file.node))
    }
}

fn path_of(origin: &Origin) -> PathBuf {
    match origin {
        Origin::Disk(path) => path.clone(),
        Origin::Tree { path, .. } | Origin::Action { path, .. } | Origin::Artifact { path, .. } => {
            PathBuf::from(path)
        }
    }
}

/// How many names two paths have in common, counted from their ends.
fn common_end(one: &str, other: &str) -> usize {
    let names = one.rsplit('/').zip(other.rsplit('/'));
    names.take_while(|(one, other)| one == other).count()
}

/// The directories on disk that the root of an input tree may stand for: the mount, or (for
/// clients that put absolute paths into their trees) the root of the file system, where known.
pub fn roots(base: &BaseAction) -> impl Iterator<Item = &Path> {
    let mount = base.mount.iter().map(PathBuf::as_path);
    let root = base.file_system_root.as_path();
    mount.chain((!root.as_os_str().is_empty()).then_some(root))
}

#[cfg(test)]
mod tests {
    use super::super::known::CurrentParent;
    use super::*;
    use crate::cas::directories::Directory;
    use crate::reapi;
    use crate::speculation::records::parent::{OverlayTable, fixture};
    use std::sync::Arc;

    fn digest(text: &str) -> Digest {
        Digest::of(text.as_bytes())
    }

    /// Records of one parent, and what is known.
    #[derive(Default)]
    struct Scene {
        overlays: OverlayTable,
        known: Known,
        trees: Trees,
        producers: HashMap<(WeakKey, Digest), Node>,
        expected: HashSet<WeakKey>,
    }

    const OTHER: WeakKey = WeakKey([7; 32]);

    impl Scene {
        fn origin(mut self, content: &str, origin: Origin) -> Self {
            self.overlays.add(digest(content), origin);
            self
        }

        fn disk(mut self, path: &str, now: Option<&str>) -> Self {
            self.known.disk.insert(path.into(), now.map(digest));
            self
        }

        /// The own parent's or another's tree has one file now, and that one's output is known.
        fn parent(
            mut self,
            key: WeakKey,
            file: (&str, &str),
            outputs: Option<(&str, &str)>,
        ) -> Self {
            let (root, encoded) = Digest::of_message(&reapi::Directory {
                files: vec![reapi::FileNode {
                    name: file.0.to_owned(),
                    digest: Some(digest(file.1).to_proto()),
                    ..reapi::FileNode::default()
                }],
                ..reapi::Directory::default()
            });
            self.trees.insert(
                root,
                Arc::new(Directory::parse(encoded, root.function()).unwrap()),
            );
            let outputs = outputs.map(|(path, content)| vec![(path.to_owned(), digest(content))]);
            let current = CurrentParent {
                input_root: root,
                texts: Arc::default(),
                outputs: outputs.map(Arc::new),
            };
            self.known.parents.insert(key, current);
            self
        }

        /// What the file of node 0 at `path` is, when `done` have written "output" to "x".
        fn resolve(&self, path: &str, content: &str, done: &[Node]) -> Current<'static> {
            self.resolve_in(TreeKind::Input, path, content, done)
        }

        fn resolve_in(
            &self,
            tree: TreeKind,
            path: &str,
            content: &str,
            done: &[Node],
        ) -> Current<'static> {
            let parent = fixture::invocation(self.overlays.clone());
            let resolver = Resolver {
                key: parent.identity.weak_key(),
                parent: &parent,
                known: &self.known,
                expected: &self.expected,
                trees: &self.trees,
                producers: &self.producers,
            };
            let base = fixture::base("reader", digest("root"));
            let file = TreeFile {
                node: 0,
                base: &base,
                tree,
                path,
                digest: digest(content),
            };
            let output = |node: Node, path: &str| {
                let written = (path == "x").then(|| digest("output"));
                done.contains(&node).then_some(written)
            };
            match resolver.resolve(file, output) {
                Current::Source(path, digest) => {
                    Current::Source(Box::leak(path.to_owned().into_boxed_path()), digest)
                }
                Current::Recorded => Current::Recorded,
                Current::Stored(digest) => Current::Stored(digest),
                Current::Pending(node) => Current::Pending(node),
                Current::Awaited => Current::Awaited,
                Current::Vanished(path) => Current::Vanished(path),
            }
        }
    }

    fn disk(path: &str) -> Origin {
        Origin::Disk(path.into())
    }

    fn tree(parent: Option<WeakKey>, path: &str) -> Origin {
        let path = path.to_owned();
        Origin::Tree { parent, path }
    }

    fn action(parent: Option<WeakKey>, action: &str, path: &str) -> Origin {
        Origin::Action {
            parent,
            action: digest(action),
            path: path.to_owned(),
        }
    }

    fn own() -> WeakKey {
        fixture::invocation(OverlayTable::default())
            .identity
            .weak_key()
    }

    #[test]
    fn of_equal_files_the_one_at_the_same_path_decides() {
        let scene = Scene::default()
            .origin("", disk("/p/a.h"))
            .origin("", disk("/p/b.h"))
            .origin("", disk("/usr/include/c.h"))
            .disk("/p/a.h", Some("a"))
            .disk("/p/b.h", Some("b"))
            .disk("/usr/include/c.h", None);
        let resolve = |path| scene.resolve(path, "", &[]);
        assert_eq!(
            resolve("a.h"),
            Current::Source(Path::new("/p/a.h"), digest("a"))
        );
        assert_eq!(
            resolve("b.h"),
            Current::Source(Path::new("/p/b.h"), digest("b"))
        );
        let gone = Current::Vanished("/usr/include/c.h".into());
        assert_eq!(resolve("usr/include/c.h"), gone);
    }

    #[test]
    fn of_equal_files_in_a_tree_the_one_with_the_nearest_path_decides() {
        let scene = Scene::default()
            .origin("", tree(None, "a.h"))
            .origin("", tree(None, "b.h"))
            .parent(own(), ("b.h", "b"), None);
        assert_eq!(
            scene.resolve("include/b.h", "", &[]),
            Current::Stored(digest("b"))
        );
        let gone = Current::Vanished("a.h".into());
        assert_eq!(scene.resolve("a.h", "", &[]), gone);
    }

    #[test]
    fn sources_come_before_actions_and_a_file_of_no_origin_stays() {
        let mut scene = Scene::default()
            .origin("both", action(None, "maker", "x"))
            .origin("both", disk("/p/y"))
            .origin("made", action(None, "maker", "x"))
            .origin("own", action(None, "reader", "x"))
            .disk("/p/y", Some("source"));
        scene.producers.insert((own(), digest("maker")), 7);
        scene.producers.insert((own(), digest("reader")), 0);
        let resolve = |content, done: &[Node]| scene.resolve("elsewhere", content, done);
        let source = Current::Source(Path::new("/p/y"), digest("source"));
        assert_eq!(resolve("both", &[]), source);
        assert_eq!(resolve("made", &[]), Current::Pending(7));
        assert_eq!(resolve("made", &[7]), Current::Stored(digest("output")));
        assert_eq!(resolve("own", &[0]), Current::Recorded, "not itself");
        assert_eq!(resolve("unknown", &[7]), Current::Recorded);
    }

    #[test]
    fn a_file_of_another_parent_is_what_is_known_of_that_one_first() {
        let artifact = |path: &str| Origin::Artifact {
            parent: OTHER,
            path: path.to_owned(),
        };
        let scene = || {
            Scene::default()
                .origin("a", tree(None, "own"))
                .origin("a", tree(Some(OTHER), "other"))
                .origin("a", artifact("installed"))
                .origin("built", artifact("installed"))
        };
        let resolve = |scene: &Scene, content| scene.resolve("p", content, &[]);
        let nothing_known = scene();
        assert_eq!(resolve(&nothing_known, "a"), Current::Recorded);
        assert_eq!(resolve(&nothing_known, "built"), Current::Recorded);
        let begun = scene().parent(OTHER, ("other", "its source"), None);
        assert_eq!(resolve(&begun, "a"), Current::Stored(digest("its source")));
        assert_eq!(resolve(&begun, "built"), Current::Awaited);
        let ended = scene().parent(OTHER, ("z", ""), Some(("installed", "artifact")));
        assert_eq!(
            resolve(&ended, "built"),
            Current::Stored(digest("artifact"))
        );
        assert_eq!(
            resolve(&ended, "a"),
            Current::Stored(digest("artifact")),
            "its source is gone"
        );
        let asked_for = begun.parent(own(), ("own", "own source"), None);
        assert_eq!(
            resolve(&asked_for, "a"),
            Current::Stored(digest("own source"))
        );
    }

    #[test]
    fn of_what_stands_in_a_tree_that_text_names_only_other_parents_are_asked() {
        let mut scene = Scene::default()
            .origin("a", disk("/p/a"))
            .origin("a", tree(None, "a"))
            .origin("a", action(None, "maker", "x"))
            .disk("/p/a", Some("on disk"))
            .parent(own(), ("a", "in the own tree"), None);
        scene.producers.insert((own(), digest("maker")), 7);
        let resolve = |scene: &Scene| scene.resolve_in(TreeKind::Text, "a", "a", &[]);
        assert_eq!(resolve(&scene), Current::Recorded);
        let mut scene = scene.origin("a", action(Some(OTHER), "maker", "x"));
        scene.producers.insert((OTHER, digest("maker")), 8);
        assert_eq!(resolve(&scene), Current::Pending(8));
        let scene = scene.origin("a", tree(Some(OTHER), "source")).parent(
            OTHER,
            ("source", "source"),
            None,
        );
        assert_eq!(resolve(&scene), Current::Stored(digest("source")));
    }

    #[test]
    fn in_a_tree_that_text_names_what_an_expected_parent_makes_itself_is_awaited() {
        let artifact = |path: &str| Origin::Artifact {
            parent: OTHER,
            path: path.to_owned(),
        };
        let mut scene = Scene::default()
            .origin("made", artifact("made"))
            .origin("copied", artifact("copied"))
            .origin("copied", tree(Some(OTHER), "source"));
        let resolve = |scene: &Scene, kind, content| scene.resolve_in(kind, "p", content, &[]);
        assert_eq!(resolve(&scene, TreeKind::Text, "made"), Current::Recorded);
        scene.expected.insert(OTHER);
        assert_eq!(resolve(&scene, TreeKind::Text, "made"), Current::Awaited);
        assert_eq!(resolve(&scene, TreeKind::Text, "copied"), Current::Recorded);
        assert_eq!(resolve(&scene, TreeKind::Input, "made"), Current::Recorded);
    }

    #[test]
    fn actions_of_other_parents_are_waited_for_after_own_ones() {
        let mut scene = Scene::default()
            .origin("a", action(Some(OTHER), "maker", "x"))
            .origin("a", action(None, "maker", "x"));
        scene.producers.insert((OTHER, digest("maker")), 8);
        assert_eq!(scene.resolve("x", "a", &[]), Current::Pending(8));
        scene.producers.insert((own(), digest("maker")), 7);
        assert_eq!(scene.resolve("x", "a", &[]), Current::Pending(7));
    }
}
