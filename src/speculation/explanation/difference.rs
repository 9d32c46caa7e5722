//! The exact difference between two actions: their input trees, of which only subtrees that differ
//! are read, and their commands, platforms and the rest.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use prost::Message;
use serde::{Deserialize, Serialize};
use tonic::Status;

use crate::cas::Digest;
use crate::cas::directories::{DirectoryCache, child_path};
use crate::cas::transfer::Cas;
use crate::reapi::{Action, Command, Directory, Platform};
use crate::speculation::journal::labels::declared_outputs;

/// Entries of trees that are told; more are counted.
const MAX_ENTRIES: usize = 10_000;
/// Directories that are looked into.
const MAX_DIRECTORIES: usize = 100_000;
/// Arguments beyond which two lists are compared by their ends alone.
const MAX_ARGUMENTS: usize = 4_000;

/// How one input tree differs from another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TreeDifference {
    /// What only the new tree has, by path.
    pub added: Vec<Entry>,
    /// What only the old tree has, by path.
    pub removed: Vec<Entry>,
    /// What both have, by path.
    pub changed: Vec<ChangedEntry>,
    /// How many more entries differ, at least.
    pub left_out: usize,
    /// Directories that are not in the CAS any more.
    pub unreadable: Vec<String>,
}

/// An entry of a tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Relative to the input root.
    pub path: String,
    /// What it is.
    pub kind: Kind,
    /// A file's digest, or where a symbolic link leads.
    pub content: String,
}

/// What stands in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A file.
    File,
    /// A symbolic link.
    Symlink,
    /// An empty directory.
    Directory,
}

/// An entry that both trees have, in different forms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedEntry {
    /// Relative to the input root.
    pub path: String,
    /// What differs.
    pub what: Aspect,
    /// In the old tree.
    pub from: String,
    /// In the new tree.
    pub to: String,
}

/// In what an entry differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Aspect {
    /// A file's content.
    Content,
    /// Whether a file may be executed.
    Mode,
    /// Where a symbolic link leads.
    Target,
    /// Times and other properties that the client has put there.
    Properties,
    /// One is a file, the other a symbolic link.
    Kind,
}

impl TreeDifference {
    /// What leads from the tree of `old` to that of `new`.
    ///
    /// # Errors
    /// The backend's status, when it cannot be asked at all.
    pub async fn between(
        directories: &DirectoryCache,
        cas: &Cas,
        instance: &str,
        old: Digest,
        new: Digest,
    ) -> Result<Self, Status> {
        let mut difference = TreeDifference::default();
        let mut level = vec![(String::new(), Some(old), Some(new))];
        let mut visited = 0;
        while !level.is_empty() && visited < MAX_DIRECTORIES {
            level.retain(|(_, old, new)| old != new);
            visited += level.len();
            let sides = level.iter().flat_map(|(_, old, new)| [*old, *new]);
            let sides: BTreeSet<Digest> = sides.flatten().collect();
            let trees = directories.level(cas, instance, sides).await?;
            let mut below = Vec::new();
            for (path, old, new) in level {
                let read = |side: Option<Digest>| match side {
                    None => Some(Directory::default()),
                    Some(digest) => {
                        let found = trees.get(&digest)?;
                        Directory::decode(found.encoded.clone()).ok()
                    }
                };
                let (Some(from), Some(to)) = (read(old), read(new)) else {
                    difference.unreadable.push(path);
                    continue;
                };
                difference.compare_entries(&path, &from, &to);
                let is_empty = |side: &Directory| *side == Directory::default();
                let entry = |path: &str| Entry {
                    path: path.to_owned(),
                    kind: Kind::Directory,
                    content: String::new(),
                };
                match (old, new) {
                    (None, Some(_)) if is_empty(&to) => {
                        let entry = entry(&path);
                        difference.tell(|it| it.added.push(entry));
                    }
                    (Some(_), None) if is_empty(&from) => {
                        let entry = entry(&path);
                        difference.tell(|it| it.removed.push(entry));
                    }
                    _ => {}
                }
                let function = old.or(new).map(|digest| digest.function());
                let children = |side: &Directory| -> BTreeMap<String, Digest> {
                    let entries = side.directories.iter().filter_map(|entry| {
                        let digest = function?.read(entry.digest.as_ref()).ok()?;
                        Some((entry.name.clone(), digest))
                    });
                    entries.collect()
                };
                let (from, mut to) = (children(&from), children(&to));
                for (name, digest) in from {
                    let path = child_path(&path, &name);
                    below.push((path, Some(digest), to.remove(&name)));
                }
                for (name, digest) in to {
                    below.push((child_path(&path, &name), None, Some(digest)));
                }
            }
            level = below;
        }
        difference.left_out += level.len();
        difference
            .added
            .sort_by(|one, other| one.path.cmp(&other.path));
        difference
            .removed
            .sort_by(|one, other| one.path.cmp(&other.path));
        difference
            .changed
            .sort_by(|one, other| one.path.cmp(&other.path));
        Ok(difference)
    }

    /// Whether the trees are the same, as far as they can be read.
    pub fn is_empty(&self) -> bool {
        *self == TreeDifference::default()
    }

    fn tell(&mut self, told: impl FnOnce(&mut Self)) {
        match self.added.len() + self.removed.len() + self.changed.len() < MAX_ENTRIES {
            true => told(self),
            false => self.left_out += 1,
        }
    }

    fn compare_entries(&mut self, path: &str, old: &Directory, new: &Directory) {
        if old.node_properties != new.node_properties {
            let changed = ChangedEntry {
                path: path.to_owned(),
                what: Aspect::Properties,
                from: format!("{:?}", old.node_properties),
                to: format!("{:?}", new.node_properties),
            };
            self.tell(|it| it.changed.push(changed));
        }
        let (old, mut new) = (listed(path, old), listed(path, new));
        for (name, was) in old {
            match new.remove(&name) {
                None => self.tell(|it| it.removed.push(was.entry)),
                Some(now) => {
                    for changed in was.changed_to(&now) {
                        self.tell(|it| it.changed.push(changed));
                    }
                }
            }
        }
        for (_, now) in new {
            self.tell(|it| it.added.push(now.entry));
        }
    }
}

/// An entry with what else is known of it.
struct Listed {
    entry: Entry,
    is_executable: bool,
    properties: String,
}

impl Listed {
    fn changed_to(&self, now: &Listed) -> Vec<ChangedEntry> {
        let changed = |what, from: &str, to: &str| ChangedEntry {
            path: self.entry.path.clone(),
            what,
            from: from.to_owned(),
            to: to.to_owned(),
        };
        let (was, is) = (&self.entry, &now.entry);
        let mut all = Vec::new();
        if was.kind != is.kind {
            return vec![changed(Aspect::Kind, &was.content, &is.content)];
        }
        if was.content != is.content {
            let what = match was.kind {
                Kind::Symlink => Aspect::Target,
                Kind::File | Kind::Directory => Aspect::Content,
            };
            all.push(changed(what, &was.content, &is.content));
        }
        if self.is_executable != now.is_executable {
            let mode = |is_executable| match is_executable {
                true => "executable",
                false => "not executable",
            };
            let (from, to) = (mode(self.is_executable), mode(now.is_executable));
            all.push(changed(Aspect::Mode, from, to));
        }
        if self.properties != now.properties {
            all.push(changed(
                Aspect::Properties,
                &self.properties,
                &now.properties,
            ));
        }
        all
    }
}

fn listed(path: &str, directory: &Directory) -> BTreeMap<String, Listed> {
    let properties = |properties: &Option<_>| match properties {
        Some(properties) => format!("{properties:?}"),
        None => String::new(),
    };
    let files = directory.files.iter().map(|file| {
        let digest = file.digest.clone().unwrap_or_default();
        let listed = Listed {
            entry: Entry {
                path: child_path(path, &file.name),
                kind: Kind::File,
                content: format!("{}/{}", digest.hash, digest.size_bytes),
            },
            is_executable: file.is_executable,
            properties: properties(&file.node_properties),
        };
        (file.name.clone(), listed)
    });
    let links = directory.symlinks.iter().map(|link| {
        let listed = Listed {
            entry: Entry {
                path: child_path(path, &link.name),
                kind: Kind::Symlink,
                content: link.target.clone(),
            },
            is_executable: false,
            properties: properties(&link.node_properties),
        };
        (link.name.clone(), listed)
    });
    files.chain(links).collect()
}

/// One thing in which two actions differ, beside their input trees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Differing {
    /// What it is.
    pub what: Field,
    /// Its name, where it has one.
    pub name: Option<String>,
    /// In the old action; `None` if it is not there.
    pub from: Option<String>,
    /// In the new action; `None` if it is not there.
    pub to: Option<String>,
}

/// The parts of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Field {
    /// An argument of the command.
    Argument,
    /// A variable of its environment.
    Environment,
    /// A file or directory that it writes.
    Output,
    /// Where it runs.
    WorkingDirectory,
    /// A property of the platform.
    Platform,
    /// How long it may run.
    Timeout,
    /// What keeps it apart from equal ones.
    Salt,
    /// Whatever else.
    Other,
}

impl Field {
    fn differs(self, name: Option<&str>, from: Option<String>, to: Option<String>) -> Differing {
        Differing {
            what: self,
            name: name.map(str::to_owned),
            from,
            to,
        }
    }
}

/// An action with its command.
pub struct Whole {
    /// The action.
    pub action: Action,
    /// Its command.
    pub command: Command,
}

impl Whole {
    /// Reads an encoded action and its command.
    pub fn decode(action: &Bytes, command: &Bytes) -> Option<Self> {
        Some(Whole {
            action: Action::decode(action.clone()).ok()?,
            command: Command::decode(command.clone()).ok()?,
        })
    }

    /// What leads from this action to `new`, but for the input trees.
    pub fn difference(&self, new: &Whole) -> Vec<Differing> {
        let mut all = Vec::new();
        let (was, is) = (&self.command, &new.command);
        all.extend(differing_arguments(&was.arguments, &is.arguments));
        let variables = |command: &Command| -> BTreeMap<String, String> {
            let variables = command.environment_variables.iter();
            variables
                .map(|variable| (variable.name.clone(), variable.value.clone()))
                .collect()
        };
        let (from, to) = (variables(was), variables(is));
        all.extend(differing_pairs(Field::Environment, &from, &to));
        let outputs = |command| declared_outputs(command).into_iter().collect();
        let (from, to): (BTreeSet<String>, BTreeSet<String>) = (outputs(was), outputs(is));
        let gone = from.difference(&to).map(|path| Some((Some(path), None)));
        let come = to.difference(&from).map(|path| Some((None, Some(path))));
        let outputs = gone.chain(come).flatten();
        all.extend(
            outputs.map(|(from, to)| Field::Output.differs(None, from.cloned(), to.cloned())),
        );
        if was.working_directory != is.working_directory {
            let (from, to) = (&was.working_directory, &is.working_directory);
            let (from, to) = (Some(from.clone()), Some(to.clone()));
            all.push(Field::WorkingDirectory.differs(None, from, to));
        }
        let (from, to) = (self.platform(), new.platform());
        all.extend(differing_pairs(Field::Platform, &from, &to));
        let seconds = |whole: &Whole| {
            let timeout = whole.action.timeout.as_ref()?;
            Some(format!("{} s", timeout.seconds))
        };
        if self.action.timeout != new.action.timeout {
            all.push(Field::Timeout.differs(None, seconds(self), seconds(new)));
        }
        let salt = |whole: &Whole| {
            let salt = &whole.action.salt;
            (!salt.is_empty()).then(|| String::from_utf8_lossy(salt).into_owned())
        };
        if self.action.salt != new.action.salt {
            all.push(Field::Salt.differs(None, salt(self), salt(new)));
        }
        if all.is_empty() && self.rest() != new.rest() {
            all.push(Field::Other.differs(None, None, None));
        }
        all
    }

    /// By name; several values of one name stand together.
    fn platform(&self) -> BTreeMap<String, String> {
        let mut properties: BTreeMap<String, String> = BTreeMap::new();
        #[allow(deprecated, reason = "clients of older versions of REAPI use it")]
        let platforms = [&self.command.platform, &self.action.platform];
        let Some(platform) = platforms.into_iter().rev().flatten().next() else {
            return properties;
        };
        let Platform { properties: listed } = platform;
        for property in listed {
            let value = properties.entry(property.name.clone()).or_default();
            if !value.is_empty() {
                value.push_str(", ");
            }
            value.push_str(&property.value);
        }
        properties
    }

    /// All but the input tree.
    fn rest(&self) -> (Vec<u8>, Vec<u8>) {
        let action = Action {
            input_root_digest: None,
            ..self.action.clone()
        };
        (action.encode_to_vec(), self.command.encode_to_vec())
    }
}

fn differing_pairs(
    what: Field,
    from: &BTreeMap<String, String>,
    to: &BTreeMap<String, String>,
) -> Vec<Differing> {
    let names: BTreeSet<&String> = from.keys().chain(to.keys()).collect();
    let differing = names
        .into_iter()
        .filter(|name| from.get(*name) != to.get(*name));
    differing
        .map(|name| what.differs(Some(name), from.get(name).cloned(), to.get(name).cloned()))
        .collect()
}

/// The shortest way from one list of arguments to another; what stands in the place of something
/// else is told together with it.
fn differing_arguments(from: &[String], to: &[String]) -> Vec<Differing> {
    let front = from
        .iter()
        .zip(to)
        .take_while(|(one, other)| one == other)
        .count();
    let (from, to) = (&from[front..], &to[front..]);
    let ends = from.iter().rev().zip(to.iter().rev());
    let back = ends.take_while(|(one, other)| one == other).count();
    let (from, to) = (&from[..from.len() - back], &to[..to.len() - back]);
    let is_long = from.len().max(to.len()) > MAX_ARGUMENTS;
    // How many arguments the rests have in common, from each pair of places on.
    let mut common = vec![vec![0_u16; to.len() + 1]; if is_long { 0 } else { from.len() + 1 }];
    if !is_long {
        for old in (0..from.len()).rev() {
            for new in (0..to.len()).rev() {
                common[old][new] = match from[old] == to[new] {
                    true => common[old + 1][new + 1] + 1,
                    false => common[old + 1][new].max(common[old][new + 1]),
                };
            }
        }
    }
    let mut differing = Vec::new();
    let (mut removed, mut added) = (Vec::new(), Vec::new());
    let mut flush = |removed: &mut Vec<String>, added: &mut Vec<String>| {
        let (mut removed, mut added) = (removed.drain(..), added.drain(..));
        loop {
            match (removed.next(), added.next()) {
                (None, None) => break,
                (from, to) => differing.push(Field::Argument.differs(None, from, to)),
            }
        }
    };
    let (mut old, mut new) = (0, 0);
    while old < from.len() || new < to.len() {
        let is_same = old < from.len() && new < to.len() && from[old] == to[new];
        if is_same && !is_long {
            flush(&mut removed, &mut added);
            (old, new) = (old + 1, new + 1);
        } else if new == to.len()
            || old < from.len() && (is_long || common[old + 1][new] >= common[old][new + 1])
        {
            removed.push(from[old].clone());
            old += 1;
        } else {
            added.push(to[new].clone());
            new += 1;
        }
    }
    flush(&mut removed, &mut added);
    differing
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cas::DigestFunction;
    use crate::cas::memory::Memory;
    use crate::reapi::command::EnvironmentVariable;
    use crate::reapi::platform::Property;
    use crate::reapi::{DirectoryNode, FileNode, SymlinkNode};

    /// A CAS in the making.
    #[derive(Default)]
    struct Blobs(Vec<Bytes>);

    impl Blobs {
        fn directory(&mut self, files: &[(&str, &str)], below: &[(&str, Digest)]) -> Digest {
            self.add(with(files, below))
        }

        fn add(&mut self, directory: Directory) -> Digest {
            let (digest, encoded) = DigestFunction::Sha256.of_message(&directory);
            self.0.push(encoded);
            digest
        }

        async fn between(self, old: Digest, new: Digest) -> (TreeDifference, usize) {
            let memory = Memory::holding(self.0);
            let cas = Cas::new(memory.clone());
            let directories = DirectoryCache::default();
            let difference = TreeDifference::between(&directories, &cas, "", old, new).await;
            let read = memory.batches_read.lock().iter().map(Vec::len).sum();
            (difference.unwrap(), read)
        }
    }

    fn with(files: &[(&str, &str)], below: &[(&str, Digest)]) -> Directory {
        let files = files.iter().map(|(name, content)| FileNode {
            name: (*name).to_owned(),
            digest: Some(Digest::of(content.as_bytes()).to_proto()),
            ..FileNode::default()
        });
        let directories = below.iter().map(|(name, digest)| DirectoryNode {
            name: (*name).to_owned(),
            digest: Some(digest.to_proto()),
        });
        Directory {
            files: files.collect(),
            directories: directories.collect(),
            ..Directory::default()
        }
    }

    fn paths(entries: &[Entry]) -> Vec<&str> {
        entries.iter().map(|entry| entry.path.as_str()).collect()
    }

    #[tokio::test]
    async fn files_that_came_went_and_changed_are_told_and_equal_subtrees_are_not_read() {
        let mut blobs = Blobs::default();
        let same = blobs.directory(&[("x", "x")], &[]);
        let old = blobs.directory(&[("a.h", "1"), ("gone.h", "g")], &[]);
        let new = blobs.directory(&[("a.h", "2"), ("new.h", "n")], &[]);
        let old = blobs.directory(&[("main.c", "m")], &[("include", old), ("same", same)]);
        let new = blobs.directory(&[("main.c", "m")], &[("include", new), ("same", same)]);
        let (difference, read) = blobs.between(old, new).await;
        assert_eq!(read, 4, "two roots and two that differ");
        assert_eq!(paths(&difference.added), ["include/new.h"]);
        assert_eq!(paths(&difference.removed), ["include/gone.h"]);
        let changed = ChangedEntry {
            path: "include/a.h".to_owned(),
            what: Aspect::Content,
            from: Digest::of(b"1").to_string(),
            to: Digest::of(b"2").to_string(),
        };
        assert_eq!(difference.changed, [changed]);
    }

    #[tokio::test]
    async fn modes_links_and_what_becomes_of_another_kind_are_told() {
        let mut blobs = Blobs::default();
        let link = |name: &str, target: &str| SymlinkNode {
            name: name.to_owned(),
            target: target.to_owned(),
            ..SymlinkNode::default()
        };
        let mut old = with(&[("kind", "k"), ("run", "r")], &[]);
        old.symlinks = vec![link("link", "here")];
        let mut new = with(&[("run", "r")], &[]);
        new.files[0].is_executable = true;
        new.symlinks = vec![link("kind", "k"), link("link", "there")];
        let (old, new) = (blobs.add(old), blobs.add(new));
        let (difference, _) = blobs.between(old, new).await;
        let told: Vec<_> = difference
            .changed
            .iter()
            .map(|it| (&*it.path, it.what))
            .collect();
        let expected = [
            ("kind", Aspect::Kind),
            ("link", Aspect::Target),
            ("run", Aspect::Mode),
        ];
        assert_eq!(told, expected);
        assert!(difference.added.is_empty() && difference.removed.is_empty());
    }

    #[tokio::test]
    async fn whole_subtrees_are_told_file_by_file_and_empty_ones_by_themselves() {
        let mut blobs = Blobs::default();
        let leaf = blobs.directory(&[("b.h", "b"), ("a.h", "a")], &[]);
        let empty = blobs.directory(&[], &[]);
        let tree = blobs.directory(&[], &[("deep", leaf), ("void", empty)]);
        let old = blobs.directory(&[("x", "x")], &[]);
        let new = blobs.directory(&[("x", "x")], &[("new", tree)]);
        let both = [(old, new), (new, old)];
        let blobs = both.map(|_| Blobs(blobs.0.clone()));
        for ((old, new), blobs) in both.into_iter().zip(blobs) {
            let (difference, _) = blobs.between(old, new).await;
            let mut told = paths(&difference.added);
            told.extend(paths(&difference.removed));
            assert_eq!(told, ["new/deep/a.h", "new/deep/b.h", "new/void"]);
        }
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_told_and_the_rest_is_compared() {
        let mut blobs = Blobs::default();
        let lost = Digest::of(b"lost");
        let old = blobs.directory(&[("a", "1")], &[("below", lost)]);
        let there = blobs.directory(&[("b", "1")], &[]);
        let new = blobs.directory(&[("a", "2")], &[("below", there)]);
        let (difference, _) = blobs.between(old, new).await;
        assert_eq!(difference.unreadable, ["below"]);
        assert_eq!(difference.changed.len(), 1);
    }

    fn arguments(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn pairs(differing: &[Differing]) -> Vec<(Option<&str>, Option<&str>)> {
        differing
            .iter()
            .map(|it| (it.from.as_deref(), it.to.as_deref()))
            .collect()
    }

    #[test]
    fn arguments_are_told_by_the_shortest_way_from_one_list_to_the_other() {
        let between = |from, to| differing_arguments(&arguments(from), &arguments(to));
        let differing = between("cc -O1 -c a.c -o a.o", "cc -O2 -g -c a.c -o a.o");
        assert_eq!(
            pairs(&differing),
            [(Some("-O1"), Some("-O2")), (None, Some("-g"))]
        );
        assert_eq!(pairs(&between("cc -a -b", "cc -b")), [(Some("-a"), None)]);
        assert_eq!(between("cc", "cc"), []);
        let long = "x ".repeat(MAX_ARGUMENTS + 1);
        let differing = between(&format!("cc {long} z"), &format!("cc y {long} z"));
        assert_eq!(pairs(&differing), [(None, Some("y"))], "by the ends alone");
    }

    #[test]
    fn environment_outputs_directory_platform_and_timeout_are_told() {
        let variable = |name: &str, value: &str| EnvironmentVariable {
            name: name.to_owned(),
            value: value.to_owned(),
        };
        let old = Whole {
            action: Action::default(),
            command: Command {
                environment_variables: vec![variable("A", "1"), variable("GONE", "1")],
                output_paths: vec!["a.o".to_owned()],
                ..Command::default()
            },
        };
        let property = Property {
            name: "OS".to_owned(),
            value: "linux".to_owned(),
        };
        let new = Whole {
            action: Action {
                platform: Some(Platform {
                    properties: vec![property],
                }),
                timeout: Some(prost_types::Duration {
                    seconds: 5,
                    nanos: 0,
                }),
                ..Action::default()
            },
            command: Command {
                environment_variables: vec![variable("A", "2")],
                output_paths: vec!["a.o".to_owned(), "a.d".to_owned()],
                working_directory: "build".to_owned(),
                ..Command::default()
            },
        };
        let told: Vec<Field> = old.difference(&new).iter().map(|it| it.what).collect();
        let expected = [
            Field::Environment,
            Field::Environment,
            Field::Output,
            Field::Output,
            Field::Output,
            Field::WorkingDirectory,
            Field::Platform,
            Field::Timeout,
        ];
        assert_eq!(told, expected);
        assert_eq!(old.difference(&old), []);
        let other = Whole {
            action: Action {
                do_not_cache: true,
                ..Action::default()
            },
            command: old.command.clone(),
        };
        assert_eq!(old.difference(&other)[0].what, Field::Other);
    }
}
