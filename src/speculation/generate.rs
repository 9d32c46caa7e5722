//! Generation: finds for every file in the recorded input trees where it came from. Runs in the
//! background after a parent has ended, over all of its actions at once: origins depend on the
//! digest, not on the action, so a parent has one overlay table.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::parent::{BaseAction, Origin, OverlayTable};
use super::resolve::places;
use crate::cas::Digest;
use crate::cas::directories::{Trees, child_path};
use crate::config::Mode;
use crate::workspace::index::FileIndex;

/// How many directories one generation may visit; see `instantiate`.
const MAX_VISITS: usize = 4_000_000;

/// The overlay table of `actions`, whose directories are in `trees`. Reads source files through
/// `index`. Blocks.
pub fn generate(
    actions: &[Arc<BaseAction>],
    trees: &Trees,
    index: &FileIndex,
    mode: Mode,
) -> OverlayTable {
    let outputs = WrittenFiles::of(actions);
    let mut generation = Generation {
        outputs: &outputs,
        index,
        actions_too: mode.uses_action_overlays(),
        overlays: OverlayTable::default(),
        visited: HashSet::new(),
        seen: HashSet::new(),
        is_source: HashMap::new(),
    };
    for base in actions {
        generation.visit(base, trees);
    }
    generation.overlays
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
    index: &'a FileIndex,
    actions_too: bool,
    overlays: OverlayTable,
    /// Directories at the places where they were visited.
    visited: HashSet<(Digest, Option<PathBuf>, String)>,
    /// Digests whose ACTION origins by content were added.
    seen: HashSet<Digest>,
    is_source: HashMap<PathBuf, bool>,
}

impl Generation<'_> {
    fn visit(&mut self, base: &BaseAction, trees: &Trees) {
        let mut open = vec![(base.input_root, String::new())];
        while let Some((digest, path)) = open.pop() {
            let place = (digest, base.mount.clone(), path);
            if self.visited.len() >= MAX_VISITS || self.visited.contains(&place) {
                continue;
            }
            let path = place.2.clone();
            self.visited.insert(place);
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
        let mut written = false;
        for place in places(base, path) {
            if let Some(origin) = self.outputs.by_place.get(&place) {
                // What an action writes is no source, however old the file on disk is.
                written = true;
                if self.actions_too {
                    self.overlays.add(target, origin.clone());
                }
            } else if !written && self.is_source(&place) {
                self.overlays.add(target, Origin::Source(place));
                break;
            }
        }
        if self.actions_too && self.seen.insert(target) {
            for origin in self.outputs.by_digest.get(&target).into_iter().flatten() {
                self.overlays.add(target, origin.clone());
            }
        }
    }

    /// Whether a file stands at `place` on disk. It is hashed on this occasion, so that the next
    /// build need only look at its metadata.
    fn is_source(&mut self, place: &Path) -> bool {
        if let Some(known) = self.is_source.get(place) {
            return *known;
        }
        let readable = self.index.digest(place).is_ok();
        self.is_source.insert(place.to_owned(), readable);
        readable
    }
}
