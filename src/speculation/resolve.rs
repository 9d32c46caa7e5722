//! Where "current" comes from: one ordered policy that answers what a recorded file is now.
//!
//! Of all origins of a digest, the one that fits the file's own path comes first: two files with
//! the same content (both empty, say) are told apart by it. Otherwise SOURCE comes before ACTION.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::parent::{BaseAction, Origin, OverlayTable};
use crate::cas::Digest;

/// Index of an action in its plan.
pub type Node = usize;

/// One file of a base action's input tree.
#[derive(Clone, Copy, Debug)]
pub struct TreeFile<'a> {
    /// The action.
    pub node: Node,
    /// Its recorded form.
    pub base: &'a BaseAction,
    /// Path relative to the input root.
    pub path: &'a str,
    /// The digest that was recorded.
    pub digest: Digest,
}

/// What a recorded file is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Current<'a> {
    /// It has no origin: taken to be as it was.
    Recorded,
    /// That source file, with this digest.
    Source(&'a Path, Digest),
    /// An output of an action that is done.
    Output(Digest),
    /// Known once that action of the plan is done.
    Pending(Node),
    /// There is no such file any more.
    Vanished(PathBuf),
}

/// What is known of source files now: their digest, or `None` where there is no such file.
pub type Sources = HashMap<PathBuf, Option<Digest>>;

/// Resolves overlays of one parent.
pub struct Resolver<'a> {
    /// All overlays of the parent.
    pub overlays: &'a OverlayTable,
    /// The source files that they name, as they are now.
    pub sources: &'a Sources,
    /// The actions that they name.
    pub producers: &'a HashMap<Digest, Node>,
}

impl Resolver<'_> {
    /// What `file` is now. `output` tells what an action of the plan has written to a path, or
    /// `None` while it is not done. A file without an origin stays as it was recorded.
    pub fn resolve<'b>(
        &'b self,
        file: TreeFile<'_>,
        output: impl Fn(Node, &str) -> Option<Option<Digest>>,
    ) -> Current<'b> {
        let mut vanished = None;
        for origin in self.candidates(file) {
            match origin {
                Origin::Source(path) => match self.sources.get(path) {
                    Some(Some(digest)) => return Current::Source(path, *digest),
                    Some(None) | None => vanished.get_or_insert_with(|| path.clone()),
                },
                Origin::Action { action, path } => match self.producers.get(action) {
                    None => continue,
                    Some(producer) => match output(*producer, path) {
                        None => return Current::Pending(*producer),
                        Some(Some(digest)) => return Current::Output(digest),
                        Some(None) => vanished.get_or_insert_with(|| PathBuf::from(path)),
                    },
                },
            };
        }
        match vanished {
            Some(path) => Current::Vanished(path),
            None => Current::Recorded,
        }
    }

    /// The origins of `file`, strongest first. If any fits its path, only those count.
    fn candidates<'b>(&'b self, file: TreeFile<'_>) -> Vec<&'b Origin> {
        let mut origins: Vec<&Origin> = self
            .overlays
            .origins(&file.digest)
            .iter()
            .filter(|origin| !self.is_own_output(file, origin))
            .collect();
        if origins.len() > 1 {
            let places: Vec<PathBuf> = roots(file.base).map(|root| root.join(file.path)).collect();
            let fits = |origin: &&Origin| match origin {
                Origin::Source(path) => places.contains(path),
                Origin::Action { path, .. } => path == file.path,
            };
            if origins.iter().any(fits) {
                origins.retain(fits);
            }
            origins.sort_by_key(|origin| matches!(origin, Origin::Action { .. }));
        }
        origins
    }

    /// Whether what `file` is depends on which action reads it: on one that writes it itself.
    pub fn is_read_by_its_writer(&self, file: TreeFile<'_>) -> bool {
        let origins = self.overlays.origins(&file.digest);
        origins
            .iter()
            .any(|origin| self.is_own_output(file, origin))
    }

    /// An action that rewrites one of its inputs does not wait for itself.
    fn is_own_output(&self, file: TreeFile<'_>, origin: &Origin) -> bool {
        matches!(origin, Origin::Action { action, .. }
            if self.producers.get(action) == Some(&file.node))
    }
}

/// The directories on disk that the root of an input tree may stand for: the mount, or (for
/// clients that put absolute paths into their trees) the root of the file system.
pub fn roots(base: &BaseAction) -> impl Iterator<Item = &Path> {
    let mount = base.mount.iter().map(PathBuf::as_path);
    mount.chain([base.file_system_root.as_path()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn base(mount: &str) -> BaseAction {
        BaseAction {
            digest: Digest::of(mount.as_bytes()),
            encoded: bytes::Bytes::new(),
            input_root: Digest::of(b""),
            mount: Some(mount.into()),
            file_system_root: "/".into(),
            working_directory: String::new(),
            outputs: Vec::new(),
            duration: Duration::ZERO,
            order: 0,
            last_seen_unix_ms: 0,
        }
    }

    fn digest(text: &str) -> Digest {
        Digest::of(text.as_bytes())
    }

    #[test]
    fn of_equal_files_the_one_at_the_same_path_decides() {
        let empty = digest("");
        let mut overlays = OverlayTable::default();
        overlays.add(empty, Origin::Source("/p/a.h".into()));
        overlays.add(empty, Origin::Source("/p/b.h".into()));
        overlays.add(empty, Origin::Source("/usr/include/c.h".into()));
        let sources: Sources = [
            ("/p/a.h".into(), Some(digest("a"))),
            ("/p/b.h".into(), Some(digest("b"))),
            ("/usr/include/c.h".into(), None),
        ]
        .into();
        let producers = HashMap::new();
        let resolver = Resolver {
            overlays: &overlays,
            sources: &sources,
            producers: &producers,
        };
        let base = base("/p");
        let resolve = |path| {
            let file = TreeFile {
                node: 0,
                base: &base,
                path,
                digest: empty,
            };
            resolver.resolve(file, |_, _| None)
        };
        assert_eq!(
            resolve("a.h"),
            Current::Source(Path::new("/p/a.h"), digest("a"))
        );
        assert_eq!(
            resolve("b.h"),
            Current::Source(Path::new("/p/b.h"), digest("b"))
        );
        assert_eq!(
            resolve("usr/include/c.h"),
            Current::Vanished("/usr/include/c.h".into())
        );
    }

    #[test]
    fn sources_come_before_actions_and_a_file_of_no_origin_stays() {
        let both = digest("both");
        let made = digest("made");
        let maker = digest("maker");
        let mut overlays = OverlayTable::default();
        overlays.add(
            both,
            Origin::Action {
                action: maker,
                path: "x".into(),
            },
        );
        overlays.add(both, Origin::Source("/p/y".into()));
        overlays.add(
            made,
            Origin::Action {
                action: maker,
                path: "x".into(),
            },
        );
        let sources: Sources = [("/p/y".into(), Some(digest("source")))].into();
        let producers: HashMap<_, _> = [(maker, 7)].into();
        let resolver = Resolver {
            overlays: &overlays,
            sources: &sources,
            producers: &producers,
        };
        let base = base("/p");
        let file = |node, digest| TreeFile {
            node,
            base: &base,
            path: "elsewhere",
            digest,
        };
        let done = |_: Node, path: &str| (path == "x").then(|| Some(self::digest("output")));
        assert_eq!(
            resolver.resolve(file(0, both), done),
            Current::Source(Path::new("/p/y"), digest("source"))
        );
        assert_eq!(
            resolver.resolve(file(0, made), |_, _| None),
            Current::Pending(7)
        );
        assert_eq!(
            resolver.resolve(file(0, made), done),
            Current::Output(digest("output"))
        );
        assert_eq!(
            resolver.resolve(file(7, made), done),
            Current::Recorded,
            "not itself"
        );
        let unknown = digest("unknown");
        assert_eq!(resolver.resolve(file(0, unknown), done), Current::Recorded);
    }
}
