//! Explanations: why an action was answered as it was. What the journals say of it, and, where it was
//! not what primed expected, the exact difference between the two, read from the CAS when somebody
//! asks; and what to do about it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::advice::judge;
use super::difference::{Differing, TreeDifference, Whole};
use super::library::{JournalError, Library};
use crate::cas::outputs::normalized;
use crate::cas::{Digest, DigestFunction};
use crate::speculation::journal::accounting::BuildStatus;
use crate::speculation::journal::labels::commands;
use crate::speculation::journal::page::{
    ActionEntry, AnswerWord, ChangeEntry, OutcomeWord, Page, PrimedEntry, Trigger,
};
use crate::speculation::planning::verdict::By;
use crate::speculation::workshop::Workshop;

/// Explanations that are given at once, unless all are wanted.
const FEW: usize = 10;
/// Those that are given if all are wanted.
const MANY: usize = 1000;
/// Builds that are looked through for an action or a file.
const MAX_BUILDS: usize = 50;
/// Earlier builds that are looked through for the one in which an action was recorded.
const MAX_EARLIER: usize = 20;
/// The shortest beginning of a hash that names an action.
const MIN_PREFIX: usize = 4;

/// What is asked.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Question {
    /// The build, by the beginning of its id; the newest that can answer, if absent.
    pub build: Option<String>,
    /// About what: a digest, the beginning of a hash, or a file.
    pub about: Option<String>,
    /// Where whoever asks is, for the names of files.
    pub directory: PathBuf,
    /// Whether all is to be told.
    pub all: bool,
}

/// The answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Explanations {
    /// Of which build.
    pub build: BuildStatus,
    /// One for each action.
    pub explanations: Vec<Explanation>,
    /// How many more actions there are.
    pub left_out: usize,
}

/// Why an action was answered as it was.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Explanation {
    /// What the journal says of it.
    #[serde(flatten)]
    pub entry: ActionEntry,
    /// In one sentence.
    pub summary: String,
    /// Where the recorded action was asked for last, before this build.
    pub recorded: Option<Recorded>,
    /// What was expected in its place, if something was; or asked for in its place, if it was not
    /// asked for itself.
    pub counterpart: Option<Counterpart>,
    /// What to do about it.
    pub hints: Vec<String>,
}

/// A build in which an action was recorded.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Recorded {
    /// Its id.
    pub build: String,
    /// What it is called.
    pub label: String,
    /// When the action was asked for: milliseconds since 1970.
    pub at_unix_ms: i64,
}

/// The action that stands in the place of another, and how they differ.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Counterpart {
    /// What the journal says of it.
    #[serde(flatten)]
    pub entry: ActionEntry,
    /// From what was expected to what was asked for: the input trees.
    pub tree: TreeDifference,
    /// The same: all else.
    pub command: Vec<Differing>,
    /// Why they cannot be compared, if they cannot.
    pub incomparable: Option<String>,
}

/// Why there is no explanation.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// There is no such journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// There are no builds.
    #[error("no build is known yet; run one with RECC_SERVER set to primed's address")]
    NoBuild,
    /// Nothing answers to that name.
    #[error(
        "no action of {where_} has the digest '{what}', or reads or writes a file of that name; \
         `primed builds` lists the builds that are known"
    )]
    Unknown {
        /// What was asked about.
        what: String,
        /// In which builds.
        where_: String,
    },
}

/// Answers a question.
///
/// # Errors
/// `ExplainError`.
pub async fn explain(library: &Library, question: &Question) -> Result<Explanations, ExplainError> {
    let Some(about) = &question.about else {
        let page = match &question.build {
            Some(prefix) => library.find(prefix).await?,
            None => {
                let latest = library.builds.iter().find(|build| build.counts.asked > 0);
                library
                    .page(&latest.ok_or(ExplainError::NoBuild)?.id)
                    .await?
            }
        };
        let missed = (0..page.actions.len()).filter(|index| is_missed(&page.actions[*index]));
        let missed = missed.collect();
        return Ok(answer(library, question, &page, missed).await);
    };
    if let Some(prefix) = &question.build {
        let page = library.find(prefix).await?;
        let found = find(library, &page, about, &question.directory).await;
        return match found.is_empty() {
            true => Err(ExplainError::Unknown {
                what: about.clone(),
                where_: format!("build {}", page.build.id),
            }),
            false => Ok(answer(library, question, &page, found).await),
        };
    }
    for build in library.builds.iter().take(MAX_BUILDS) {
        // One that cannot be read is left out.
        let Ok(page) = library.page(&build.id).await else {
            continue;
        };
        let found = find(library, &page, about, &question.directory).await;
        if !found.is_empty() {
            return Ok(answer(library, question, &page, found).await);
        }
    }
    match library.builds.is_empty() {
        true => Err(ExplainError::NoBuild),
        false => Err(ExplainError::Unknown {
            what: about.clone(),
            where_: "the builds that are known".to_owned(),
        }),
    }
}

pub(super) fn is_missed(entry: &ActionEntry) -> bool {
    let asked = entry.asked.as_ref();
    asked.is_some_and(|asked| asked.answer == AnswerWord::Missed)
}

/// The entries that a question is about: of an action, by its digest; of a file, those that write
/// it, or else those that name it in their command or in which it was changed.
async fn find(library: &Library, page: &Page, about: &str, directory: &Path) -> Vec<usize> {
    let all = || page.actions.iter().enumerate();
    let indexes = |found: &dyn Fn(&ActionEntry) -> bool| -> Vec<usize> {
        all()
            .filter(|(_, entry)| found(entry))
            .map(|(index, _)| index)
            .collect()
    };
    if about.len() >= MIN_PREFIX && !about.contains('.') {
        let begins = |digest: &str| digest.starts_with(about);
        let found = indexes(&|entry| begins(&entry.action));
        let found = match found.is_empty() {
            true => indexes(&|entry| entry.base.as_deref().is_some_and(begins)),
            false => found,
        };
        if !found.is_empty() {
            return found;
        }
    }
    let file = NamedFile::new(about, directory);
    let writers = indexes(&|entry| outputs(entry).any(|output| file.is(output)));
    if !writers.is_empty() {
        return writers;
    }
    let mut readers: BTreeSet<usize> = BTreeSet::new();
    let mut by_instance: HashMap<&str, HashMap<Digest, usize>> = HashMap::new();
    for (index, entry) in all() {
        let changes = entry.primed.iter().flat_map(|primed| &primed.changes);
        let mut changes = changes.filter(|change| change.by != By::Action);
        if changes.any(|change| file.is(&change.path) || file.is(&change.origin)) {
            readers.insert(index);
        }
        if let (Some(digest), Some(_)) = (digest_of(entry, &entry.action), &entry.asked) {
            let of_instance = by_instance.entry(&entry.instance).or_default();
            of_instance.insert(digest, index);
        }
    }
    for (instance, entries) in by_instance {
        let digests: Vec<Digest> = entries.keys().copied().collect();
        for (digest, command) in commands(&library.workshop.cas, instance, &digests).await {
            let names = |argument: &String| match argument.starts_with('/') {
                true => file.is(argument),
                false => normalized(&command.working_directory, argument)
                    .is_some_and(|path| file.is(&path)),
            };
            if command.arguments.iter().any(names) {
                readers.extend(entries.get(&digest));
            }
        }
    }
    readers.into_iter().collect()
}

/// A file by the name that somebody gave it.
struct NamedFile {
    absolute: String,
    relative: String,
}

impl NamedFile {
    fn new(name: &str, directory: &Path) -> Self {
        let mut absolute = PathBuf::new();
        for component in directory.join(name).components() {
            match component {
                Component::ParentDir => {
                    absolute.pop();
                }
                Component::CurDir => {}
                other => absolute.push(other),
            }
        }
        let relative = normalized("", name).unwrap_or_else(|| name.to_owned());
        NamedFile {
            absolute: absolute.display().to_string(),
            relative,
        }
    }

    /// Whether it is what an action calls `path`: relative to a directory that its input tree
    /// stands for, which is one above the file; or a part of that, as whoever asks is elsewhere.
    fn is(&self, path: &str) -> bool {
        let ends_with = |long: &str, short: &str| {
            let rest = long.strip_suffix(short.trim_start_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
        };
        path == self.absolute
            || ends_with(path, &self.relative)
            || !path.starts_with('/') && ends_with(&self.absolute, path)
    }
}

/// All that an action writes.
pub(super) fn outputs(entry: &ActionEntry) -> impl Iterator<Item = &str> {
    entry
        .outputs
        .iter()
        .chain([&entry.label])
        .map(String::as_str)
}

fn digest_of(entry: &ActionEntry, text: &str) -> Option<Digest> {
    let digest: Digest = text.parse().ok()?;
    match &entry.digest_function {
        Some(_) => DigestFunction::Blake3.digest(digest.hash(), digest.size()),
        None => Some(digest),
    }
}

async fn answer(
    library: &Library,
    question: &Question,
    page: &Page,
    mut found: Vec<usize>,
) -> Explanations {
    let limit = if question.all { MANY } else { FEW };
    let left_out = found.len().saturating_sub(limit);
    found.truncate(limit);
    let bases = found
        .iter()
        .filter_map(|index| page.actions[*index].base.as_deref());
    let mut recorded = Records::new(bases);
    let older = library
        .builds
        .iter()
        .skip_while(|build| build.id >= page.build.id);
    let older = older.filter(|build| build.label == page.build.label);
    for build in older.take(MAX_EARLIER) {
        if recorded.are_complete() {
            break;
        }
        if let Ok(page) = library.page(&build.id).await {
            recorded.look_in(&page);
        }
    }
    let mut explanations = Vec::with_capacity(found.len());
    for index in found {
        let entry = &page.actions[index];
        let counterpart = match counterpart(page, index) {
            Some(other) => Some(compare(&library.workshop, entry, other).await),
            None => None,
        };
        let (summary, hints) = judge(page, entry, counterpart.as_ref());
        let base = entry.base.as_deref();
        explanations.push(Explanation {
            entry: entry.clone(),
            summary,
            recorded: base.and_then(|base| recorded.found.get(base).cloned()),
            counterpart,
            hints,
        });
    }
    Explanations {
        build: page.build.clone(),
        explanations,
        left_out,
    }
}

/// Where recorded actions were asked for.
struct Records<'a> {
    wanted: HashSet<&'a str>,
    found: HashMap<String, Recorded>,
}

impl<'a> Records<'a> {
    fn new(bases: impl Iterator<Item = &'a str>) -> Self {
        Records {
            wanted: bases.collect(),
            found: HashMap::new(),
        }
    }

    fn are_complete(&self) -> bool {
        self.found.len() == self.wanted.len()
    }

    fn look_in(&mut self, page: &Page) {
        for entry in &page.actions {
            if let Some(asked) = &entry.asked
                && self.wanted.contains(entry.action.as_str())
                && !self.found.contains_key(&entry.action)
            {
                let recorded = Recorded {
                    build: page.build.id.clone(),
                    label: page.build.label.clone(),
                    at_unix_ms: asked.at_unix_ms,
                };
                self.found.insert(entry.action.clone(), recorded);
            }
        }
    }
}

/// What priming made of an entry before it was asked for. What was only learned from it does not
/// count.
fn foreseen(entry: &ActionEntry) -> Option<&PrimedEntry> {
    let primed = entry.primed.as_ref()?;
    let asked = entry.asked.as_ref();
    let asked = asked.filter(|asked| asked.answer == AnswerWord::Missed);
    let is_learned = primed.trigger == Trigger::Observed
        && asked.is_some_and(|asked| primed.planned_unix_ms > asked.at_unix_ms);
    (!is_learned).then_some(primed)
}

/// What stands in the place of an entry: of one that was missed and not expected, what was expected
/// to write the same files; of one that nobody asked for, what was asked for.
fn counterpart(page: &Page, index: usize) -> Option<&ActionEntry> {
    let entry = &page.actions[index];
    let written: HashSet<&str> = outputs(entry).collect();
    let mut others = page
        .actions
        .iter()
        .enumerate()
        .filter(|(other, candidate)| {
            *other != index
                && candidate.instance == entry.instance
                && outputs(candidate).any(|output| written.contains(output))
        });
    match (&entry.asked, foreseen(entry)) {
        (Some(asked), None) if asked.answer == AnswerWord::Missed => {
            let others: Vec<_> = others.map(|(_, other)| other).collect();
            let planned = others.iter().filter(|other| other.primed.is_some());
            // Best what nobody asked for: it was meant for this one.
            planned.copied().min_by_key(|other| other.asked.is_some())
        }
        (None, Some(_)) => others
            .find(|(_, other)| other.asked.is_some())
            .map(|(_, other)| other),
        _ => None,
    }
}

/// Compares what was expected with what was asked for.
async fn compare(workshop: &Workshop, entry: &ActionEntry, other: &ActionEntry) -> Counterpart {
    let (expected, asked) = match entry.asked {
        Some(_) => (other, entry),
        None => (entry, other),
    };
    let mut counterpart = Counterpart {
        entry: other.clone(),
        tree: TreeDifference::default(),
        command: Vec::new(),
        incomparable: None,
    };
    match differences(workshop, expected, asked).await {
        Ok((tree, command)) => {
            counterpart.tree = tree;
            counterpart.command = command;
        }
        Err(reason) => counterpart.incomparable = Some(reason),
    }
    counterpart
}

async fn differences(
    workshop: &Workshop,
    expected: &ActionEntry,
    asked: &ActionEntry,
) -> Result<(TreeDifference, Vec<Differing>), String> {
    let Workshop {
        cas, directories, ..
    } = workshop;
    let instance = &asked.instance;
    let unreadable =
        |status: tonic::Status| format!("the CAS cannot be read: {}", status.message());
    // What was never uploaded is compared by the action that it was adapted from.
    let is_there = expected.primed.as_ref().is_some_and(|primed| {
        matches!(
            primed.outcome,
            OutcomeWord::Primed | OutcomeWord::Cached | OutcomeWord::Failed
        )
    });
    let foreseen = expected.primed.as_ref();
    let base = expected.base.as_ref().filter(|_| !is_there);
    let old = digest_of(expected, base.unwrap_or(&expected.action));
    let new = digest_of(asked, &asked.action);
    let (Some(old), Some(new)) = (old, new) else {
        return Err("their digests cannot be read".to_owned());
    };
    let actions = cas.fetch(instance, [old, new]).await.map_err(unreadable)?;
    let gone = |which: &str, what: &str| {
        format!("the {what} of the action that was {which} is not in the CAS any more")
    };
    let mut sides = Vec::new();
    for (digest, which) in [(old, "expected"), (new, "asked for")] {
        let encoded = actions.get(&digest).ok_or_else(|| gone(which, "message"))?;
        let function = digest.function();
        let action: crate::reapi::Action = prost::Message::decode(encoded.clone())
            .map_err(|_| "one of the actions is malformed".to_owned())?;
        let read = |proto: Option<&_>| function.read(proto).map_err(|error| error.to_string());
        let command = read(action.command_digest.as_ref())?;
        let root = read(action.input_root_digest.as_ref())?;
        let fetched = cas.fetch(instance, [command]).await.map_err(unreadable)?;
        let command = fetched
            .get(&command)
            .ok_or_else(|| gone(which, "command"))?;
        let whole = Whole::decode(encoded, command);
        sides.push((whole.ok_or("one of the commands is malformed")?, root));
    }
    let [(expected_whole, old_root), (asked_whole, new_root)] = sides.as_slice() else {
        return Err("there are no two actions".to_owned());
    };
    let tree = TreeDifference::between(directories, cas, instance, *old_root, *new_root);
    let mut tree = tree.await.map_err(unreadable)?;
    if let (Some(_), Some(primed)) = (base, foreseen) {
        forget_foreseen(&mut tree, &primed.changes);
    }
    Ok((tree, expected_whole.difference(asked_whole)))
}

/// Leaves out of what leads from a recorded tree to another what was foreseen to change.
fn forget_foreseen(tree: &mut TreeDifference, foreseen: &[ChangeEntry]) {
    let to: HashMap<&str, Option<&str>> = foreseen
        .iter()
        .map(|change| (change.path.as_str(), change.to.as_deref()))
        .collect();
    let is_foreseen =
        |path: &str, now: Option<&str>| to.get(path).is_some_and(|foreseen| *foreseen == now);
    tree.changed
        .retain(|it| !is_foreseen(&it.path, Some(&it.to)));
    tree.added
        .retain(|it| !is_foreseen(&it.path, Some(&it.content)));
    tree.removed.retain(|it| !is_foreseen(&it.path, None));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_found_by_the_names_that_people_give_it() {
        let at = |name| NamedFile::new(name, Path::new("/home/me/project"));
        for (name, path) in [
            ("build/a.o", "build/a.o"),
            ("build/a.o", "project/build/a.o"),
            ("./build/../build/a.o", "build/a.o"),
            ("/home/me/project/build/a.o", "build/a.o"),
            ("a.o", "build/a.o"),
            ("src/a.c", "/home/me/project/src/a.c"),
        ] {
            assert!(at(name).is(path), "{name} {path}");
        }
        for (name, path) in [
            ("build/a.o", "other/a.o"),
            ("a.o", "build/aa.o"),
            ("build/a.o", "/home/me/other/a.o"),
        ] {
            assert!(!at(name).is(path), "{name} {path}");
        }
    }
}
