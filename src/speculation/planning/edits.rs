//! Observed changes: what the actions that clients execute themselves show of the inputs of all
//! others. The input tree of one that was not foreseen is compared with that of its base action
//! (`tree_edit`): which files changed, which entries appeared and which vanished. `resolve` is asked
//! for the rest of the policy; here is what was learned.
//!
//! A changed file is the same change wherever the same path holds the same old digest. What
//! appeared or vanished does so because of a change (a header gained an `#include`, say), and it
//! will where the file that caused it is read. Which one that was is a guess: of all that changed,
//! those that the fewest recorded actions read. A guess that other executions contradict as often
//! as they confirm it is given up.
//!
//! Paths are relative to input roots, so nothing is carried over from one parent to another, or
//! between actions whose roots stand for different directories.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::PathBuf;

use super::tree_edit::{Edit, Entry, OldFile, decoded, stands_for_itself};
use crate::cas::Digest;
use crate::cas::directories::{Trees, find_directory, find_file};
use crate::speculation::records::parent::{BaseAction, WeakKey};

/// What is remembered; when there is more, it is about a time that is over.
const MAX_LEARNED: usize = 4000;
/// A guess that was wrong so often is never made again.
const MAX_REFUTED: u32 = 3;

/// All that was learned, for as long as records are primed.
#[derive(Clone, Debug, Default)]
pub struct Edits {
    learned: HashMap<WeakKey, HashMap<Option<PathBuf>, Learned>>,
    /// Counts the changes of what is in force.
    version: u64,
}

/// Of one history, the version tells.
impl PartialEq for Edits {
    fn eq(&self, other: &Self) -> bool {
        self.version == other.version
    }
}

impl Eq for Edits {}

/// What was learned of the input trees of one parent whose roots stand for the same directory.
#[derive(Clone, Debug, Default)]
pub struct Learned {
    /// By the old digest and the path.
    changed: HashMap<Digest, HashMap<String, Digest>>,
    implied: Vec<Implied>,
}

/// An entry that appears or vanishes with a change.
#[derive(Clone, Debug)]
pub struct Implied {
    /// Relative to the input root.
    pub path: String,
    /// What stands there.
    pub entry: Entry,
    /// What becomes of it.
    pub fate: Fate,
    causes: Vec<Cause>,
}

/// What becomes of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It was not there.
    Appears,
    /// It is there no more.
    Vanishes,
}

/// A guess, and how it has done.
#[derive(Clone, Debug)]
pub struct Cause {
    /// The file that is other now.
    pub file: OldFile,
    /// It is not other but gone.
    pub vanished: bool,
    confirmed: u32,
    refuted: u32,
}

impl Cause {
    fn is_believed(&self) -> bool {
        self.confirmed > self.refuted && self.refuted < MAX_REFUTED
    }
}

impl Implied {
    /// What it is the consequence of: any of these.
    pub fn causes(&self) -> impl Iterator<Item = &Cause> {
        self.causes.iter().filter(|cause| cause.is_believed())
    }
}

impl Learned {
    /// What the file at `path` was changed to.
    pub fn changed(&self, path: &str, old: Digest) -> Option<Digest> {
        self.changed.get(&old)?.get(path).copied()
    }

    /// All that appears and vanishes, where its causes are read.
    pub fn implied(&self) -> &[Implied] {
        &self.implied
    }

    fn size(&self) -> usize {
        let changed: usize = self.changed.values().map(HashMap::len).sum();
        changed + self.implied.len()
    }
}

/// What one execution shows.
pub struct Lesson<'a> {
    /// The weak key of the base action's parent.
    pub parent: WeakKey,
    /// The recorded action.
    pub base: &'a BaseAction,
    /// The directories of its tree.
    pub trees: &'a Trees,
    /// How the client's tree differs.
    pub edit: &'a Edit,
}

impl Edits {
    /// What was learned that concerns an action of `parent`.
    pub fn of(&self, parent: WeakKey, base: &BaseAction) -> Option<&Learned> {
        self.learned.get(&parent)?.get(&base.mount)
    }

    /// Takes in what an execution shows. `is_source` tells which files an observed change is the
    /// only news of, and `readers` how many recorded actions read a file. Returns whether anything
    /// is expected now that was not, or the other way round.
    pub fn learn(
        &mut self,
        lesson: &Lesson<'_>,
        is_source: impl Fn(&str, Option<Digest>) -> bool,
        readers: impl Fn(&OldFile) -> usize,
    ) -> bool {
        let edit = lesson.edit;
        let all: usize = self
            .learned
            .values()
            .flat_map(HashMap::values)
            .map(Learned::size)
            .sum();
        if all + edit.size() > MAX_LEARNED {
            self.learned.clear();
            self.version += 1;
        }
        let of_parent = self.learned.entry(lesson.parent).or_default();
        let learned = of_parent.entry(lesson.base.mount.clone()).or_default();
        let mut news = learned.forget_refuted(lesson);
        news |= learned.judge(lesson);
        for (old, now) in &edit.changed {
            if is_source(&old.path, Some(old.digest)) {
                let changed = learned.changed.entry(old.digest).or_default();
                news |= changed.insert(old.path.clone(), *now) != Some(*now);
            }
        }
        let appeared = edit.appeared.iter();
        let appeared = appeared.filter(|(path, _)| is_source(path, None));
        let appeared = appeared.map(|entry| (entry, Fate::Appears));
        let vanished = edit.vanished.iter().map(|entry| (entry, Fate::Vanishes));
        let mut causes = None;
        for ((path, entry), fate) in vanished.chain(appeared) {
            let implied = learned.noted(path, entry, fate);
            if implied.causes().any(|cause| edit.touches(&cause.file)) {
                continue;
            }
            let causes = causes.get_or_insert_with(|| {
                let causes = edit.causes().into_iter();
                causes
                    .map(|file| (readers(&file), file))
                    .collect::<Vec<_>>()
            });
            news |= implied.blame(causes, edit.changed.is_empty());
        }
        if news {
            self.version += 1;
        }
        news
    }
}

impl Learned {
    /// Forgets changes of files that are as they were recorded.
    fn forget_refuted(&mut self, lesson: &Lesson<'_>) -> bool {
        let mut news = false;
        for (digest, paths) in &mut self.changed {
            paths.retain(|path, _| {
                let file = OldFile {
                    path: path.clone(),
                    digest: *digest,
                };
                let keep = !lesson.reads(&file) || lesson.edit.touches(&file);
                news |= !keep;
                keep
            });
        }
        news
    }

    /// Holds what was expected of this execution to what it shows.
    fn judge(&mut self, lesson: &Lesson<'_>) -> bool {
        let edit = lesson.edit;
        let mut news = false;
        for implied in &mut self.implied {
            let (possible, shown) = match implied.fate {
                Fate::Appears => (Standing::Nothing, edit.appeared.get(&implied.path)),
                Fate::Vanishes => (
                    Standing::Entry(implied.entry.clone()),
                    edit.vanished.get(&implied.path),
                ),
            };
            if implied.fate == Fate::Appears
                && let Some(now) = shown
                && *now != implied.entry
            {
                implied.entry = now.clone();
                news = true;
            }
            let causes = implied.causes.iter_mut();
            let mut causes = causes
                .filter(|cause| cause.vanished || edit.touches(&cause.file))
                .filter(|cause| lesson.reads(&cause.file))
                .peekable();
            let was_possible =
                || Standing::at(&implied.path, lesson.base.input_root, lesson.trees) == possible;
            if causes.peek().is_none() || !was_possible() {
                continue;
            }
            for cause in causes {
                let before = cause.is_believed();
                match shown {
                    Some(_) => cause.confirmed += 1,
                    None => cause.refuted += 1,
                }
                news |= before != cause.is_believed();
            }
        }
        news
    }

    /// What is known of an entry.
    fn noted(&mut self, path: &str, entry: &Entry, fate: Fate) -> &mut Implied {
        let known = self.implied.iter().position(|implied| {
            implied.fate == fate && implied.path == path && implied.entry == *entry
        });
        let at = known.unwrap_or_else(|| {
            self.implied.push(Implied {
                path: path.to_owned(),
                entry: entry.clone(),
                fate,
                causes: Vec::new(),
            });
            self.implied.len() - 1
        });
        &mut self.implied[at]
    }
}

impl Implied {
    /// Takes it for the consequence of those files that the fewest actions read, less what was
    /// blamed before.
    fn blame(&mut self, files: &[(usize, OldFile)], vanished: bool) -> bool {
        let known = &self.causes;
        let new = files
            .iter()
            .filter(|(_, file)| known.iter().all(|cause| cause.file != *file));
        let fewest = new.clone().map(|(readers, _)| *readers).min();
        let new: Vec<Cause> = new
            .filter(|(readers, _)| Some(*readers) == fewest)
            .map(|(_, file)| Cause {
                file: file.clone(),
                vanished,
                confirmed: 1,
                refuted: 0,
            })
            .collect();
        let news = !new.is_empty();
        self.causes.extend(new);
        news
    }
}

impl Lesson<'_> {
    fn reads(&self, file: &OldFile) -> bool {
        find_file(self.trees, self.base.input_root, &file.path) == Some(file.digest)
    }
}

/// What stands at a place of a tree.
#[derive(Debug, PartialEq)]
enum Standing {
    Nothing,
    Entry(Entry),
    /// A directory that is there by what it holds.
    Directory,
}

impl Standing {
    fn at(path: &str, root: Digest, trees: &Trees) -> Self {
        let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
        let directory = find_directory(trees, root, above);
        let message = directory.and_then(decoded);
        let Some(message) = message else {
            return Standing::Nothing;
        };
        if let Some(file) = message.files.into_iter().find(|file| file.name == name) {
            return Standing::Entry(Entry::File(file));
        }
        if let Some(link) = message.symlinks.into_iter().find(|link| link.name == name) {
            return Standing::Entry(Entry::Symlink(link));
        }
        match find_directory(trees, root, path).and_then(decoded) {
            None => Standing::Nothing,
            Some(found) if stands_for_itself(&found, path) => {
                Standing::Entry(Entry::Directory(found.node_properties))
            }
            Some(_) => Standing::Directory,
        }
    }
}
