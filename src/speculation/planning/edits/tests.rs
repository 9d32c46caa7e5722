use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use prost::Message;

use super::super::instantiate::{Adapted, Instantiation, Instantiator, Task, Texts};
use super::super::known::Known;
use super::super::resolve::{Node, Resolver};
use super::super::tree_edit::{MAX_DIFFERENCES, digest_of};
use super::*;
use crate::cas::directories::{Directory, child_path};
use crate::reapi::{self, FileNode, NodeProperties, SymlinkNode};
use crate::speculation::records::parent::fixture::Dice;
use crate::speculation::records::parent::{OverlayTable, fixture};
use crate::speculation::records::texts::Replacements;

/// A tree by its entries.
type Flat = BTreeMap<String, Entry>;

fn digest(content: &str) -> Digest {
    Digest::of(content.as_bytes())
}

fn properties(mode: u32) -> NodeProperties {
    NodeProperties {
        unix_mode: Some(mode),
        ..NodeProperties::default()
    }
}

fn file(content: &str) -> Entry {
    Entry::File(FileNode {
        digest: Some(digest(content).to_proto()),
        ..FileNode::default()
    })
}

fn link(target: &str) -> Entry {
    Entry::Symlink(SymlinkNode {
        target: target.to_owned(),
        ..SymlinkNode::default()
    })
}

/// The same entry under the last name of `path`.
fn named(path: &str, entry: &Entry) -> Entry {
    let name = path.rsplit('/').next().unwrap().to_owned();
    match entry.clone() {
        Entry::File(file) => Entry::File(FileNode { name, ..file }),
        Entry::Symlink(link) => Entry::Symlink(SymlinkNode { name, ..link }),
        directory => directory,
    }
}

/// These files and nothing else, as `path: content`.
fn files(files: &[(&str, &str)]) -> Flat {
    let entries = files
        .iter()
        .map(|(path, content)| ((*path).to_owned(), named(path, &file(content))));
    entries.collect()
}

fn above(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

fn holds_anything(flat: &Flat, path: &str) -> bool {
    let below = format!("{path}/");
    flat.range(below.clone()..)
        .next()
        .is_some_and(|(other, _)| other.starts_with(&below))
}

fn is_leaf(entry: Option<&Entry>) -> bool {
    matches!(entry, Some(Entry::File(_) | Entry::Symlink(_)))
}

/// What can be a tree: nothing is below a file, and directories that hold something are not
/// entries by themselves, but for their properties.
fn normal(flat: &Flat) -> Flat {
    let stays = |(path, entry): &(&String, &Entry)| {
        above(path).all(|above| !is_leaf(flat.get(above)))
            && match entry {
                Entry::Directory(None) => !path.is_empty() && !holds_anything(flat, path),
                _ => true,
            }
    };
    let entries = flat.iter().filter(stays);
    entries
        .map(|(path, entry)| (path.clone(), entry.clone()))
        .collect()
}

fn encode(flat: &Flat, trees: &mut Trees) -> Digest {
    encode_below(&normal(flat), "", trees)
}

fn encode_below(flat: &Flat, at: &str, trees: &mut Trees) -> Digest {
    let mut message = reapi::Directory::default();
    let mut names: Vec<&str> = Vec::new();
    for (path, entry) in flat {
        if path == at {
            if let Entry::Directory(properties) = entry {
                message.node_properties = properties.clone();
            }
            continue;
        }
        let rest = match at {
            "" => Some(path.as_str()),
            at => path
                .strip_prefix(at)
                .and_then(|rest| rest.strip_prefix('/')),
        };
        let Some(rest) = rest else {
            continue;
        };
        match (rest.split_once('/'), entry) {
            (None, Entry::File(file)) => message.files.push(file.clone()),
            (None, Entry::Symlink(link)) => message.symlinks.push(link.clone()),
            (None, Entry::Directory(_)) => names.push(rest),
            (Some((name, _)), _) => names.push(name),
        }
    }
    names.sort_unstable();
    names.dedup();
    for name in names {
        message.directories.push(reapi::DirectoryNode {
            name: name.to_owned(),
            digest: Some(encode_below(flat, &child_path(at, name), trees).to_proto()),
        });
    }
    message
        .files
        .sort_by(|one, other| one.name.cmp(&other.name));
    message
        .symlinks
        .sort_by(|one, other| one.name.cmp(&other.name));
    let (digest, encoded) = Digest::of_message(&message);
    trees.insert(
        digest,
        Arc::new(Directory::parse(encoded, digest.function()).unwrap()),
    );
    digest
}

fn random_entry(dice: &mut Dice) -> Entry {
    let properties = (dice.roll(3) == 0).then(|| properties(0o700 + dice.roll(2) as u32));
    match dice.roll(8) {
        0 => Entry::Directory(properties),
        1 => Entry::Symlink(SymlinkNode {
            target: format!("../{}", dice.roll(3)),
            node_properties: properties,
            ..SymlinkNode::default()
        }),
        _ => Entry::File(FileNode {
            // Many files have the same content.
            digest: Some(digest(&format!("content {}", dice.roll(4))).to_proto()),
            is_executable: dice.roll(2) == 0,
            node_properties: properties,
            ..FileNode::default()
        }),
    }
}

fn random_path(dice: &mut Dice) -> String {
    let depth = 1 + dice.roll(4);
    let names = (0..depth).map(|_| ["a", "b", "b-", "c.h"][dice.roll(4)]);
    names.collect::<Vec<_>>().join("/")
}

fn add_random(flat: &mut Flat, dice: &mut Dice) {
    let path = random_path(dice);
    let entry = named(&path, &random_entry(dice));
    flat.insert(path, entry);
}

/// The file that all trees here have, and that every edit changes.
const COMMON: &str = "a/common";

fn random_tree(dice: &mut Dice) -> Flat {
    let mut flat = Flat::new();
    for _ in 0..dice.roll(20) {
        add_random(&mut flat, dice);
    }
    if dice.roll(4) == 0 {
        flat.insert(String::new(), Entry::Directory(Some(properties(0o500))));
    }
    flat.remove("a");
    flat.insert(COMMON.to_owned(), named(COMMON, &file("old")));
    normal(&flat)
}

fn random_edit(tree: &Flat, dice: &mut Dice) -> Flat {
    let mut flat = tree.clone();
    for _ in 0..dice.roll(8) {
        let paths: Vec<String> = flat.keys().cloned().collect();
        if paths.is_empty() {
            add_random(&mut flat, dice);
            continue;
        }
        let path = paths[dice.roll(paths.len())].clone();
        match dice.roll(5) {
            0 => add_random(&mut flat, dice),
            1 => drop(flat.remove(&path)),
            // A file becomes a directory, and the other way round.
            2 if !path.is_empty() => {
                let entry = flat.remove(&path).unwrap();
                let below = format!("{path}/x");
                flat.insert(below.clone(), named(&below, &entry));
            }
            3 if path.contains('/') => {
                let (above, _) = path.split_once('/').unwrap();
                let below = format!("{above}/");
                flat.retain(|path, _| !path.starts_with(&below));
                flat.insert(above.to_owned(), named(above, &random_entry(dice)));
            }
            _ if path.is_empty() => {
                flat.insert(path, Entry::Directory(Some(properties(0o600))));
            }
            _ => drop(flat.insert(path.clone(), named(&path, &random_entry(dice)))),
        }
    }
    flat.remove("a");
    flat.insert(COMMON.to_owned(), named(COMMON, &file("new")));
    normal(&flat)
}

/// What an edit makes of another tree, said once more and in another way.
fn expected(tree: &Flat, edit: &Edit) -> Flat {
    let mut flat = tree.clone();
    for (old, now) in &edit.changed {
        if let Some(Entry::File(file)) = flat.get_mut(&old.path)
            && digest_of(file, old.digest.function()) == Some(old.digest)
        {
            file.digest = Some(now.to_proto());
        }
    }
    for (path, entry) in &edit.vanished {
        if flat.get(path) == Some(entry) {
            flat.remove(path);
        }
    }
    let before = flat.clone();
    for (path, entry) in &edit.appeared {
        let is_below_file = above(path).any(|above| is_leaf(before.get(above)));
        let is_taken = match entry {
            Entry::Directory(_) => before.contains_key(path),
            _ => before.contains_key(path) || holds_anything(&before, path),
        };
        if !is_below_file && !is_taken {
            flat.insert(path.clone(), entry.clone());
        }
    }
    normal(&flat)
}

/// Recorded actions of one parent, and what was learned.
#[derive(Default)]
struct Scene {
    trees: Trees,
    bases: Vec<BaseAction>,
    edits: Edits,
}

const NOT_DONE: fn(Node, &str) -> Option<Option<Digest>> = |_, _| None;

impl Scene {
    fn of(trees: &[&Flat]) -> Self {
        let mut scene = Scene::default();
        for (number, tree) in trees.iter().enumerate() {
            let root = encode(tree, &mut scene.trees);
            let action = reapi::Action {
                command_digest: Some(digest(&number.to_string()).to_proto()),
                input_root_digest: Some(root.to_proto()),
                ..reapi::Action::default()
            };
            scene.bases.push(BaseAction {
                encoded: action.encode_to_vec().into(),
                ..fixture::base(&number.to_string(), root)
            });
        }
        scene
    }

    /// A client executes an action with this tree instead.
    fn learn(&mut self, node: Node, tree: &Flat) -> bool {
        let now = encode(tree, &mut self.trees);
        let base = &self.bases[node];
        let edit = Edit::between(base.input_root, now, &self.trees).unwrap();
        let lesson = Lesson {
            parent: parent(),
            base,
            trees: &self.trees,
            edit: &edit,
        };
        let roots = self.bases.iter().map(|base| base.input_root);
        let readers = |file: &OldFile| {
            let found = roots
                .clone()
                .map(|root| find_file(&self.trees, root, &file.path));
            found.filter(|found| *found == Some(file.digest)).count()
        };
        let is_source = |path: &str, _| !path.ends_with(".o");
        self.edits.learn(&lesson, is_source, readers)
    }

    fn instantiate(&self, instantiator: &mut Instantiator, node: Node) -> Option<Adapted> {
        let parent = fixture::invocation(OverlayTable::default());
        let known = Known {
            edits: self.edits.clone(),
            ..Known::default()
        };
        let resolver = Resolver {
            expected: &HashSet::new(),
            key: parent.identity.weak_key(),
            parent: &parent,
            known: &known,
            trees: &self.trees,
            producers: &HashMap::new(),
        };
        let task = Task {
            node,
            base: &self.bases[node],
            resolver: &resolver,
            trees: &self.trees,
            texts: &Texts::Replaced(Replacements::new()),
            command: None,
            output: NOT_DONE,
        };
        match instantiator.instantiate(&task).unwrap() {
            Instantiation::Unchanged => None,
            Instantiation::Adapted(adapted) => Some(*adapted),
            waits => panic!("for whom? {waits:?}"),
        }
    }

    /// The root that an action is adapted to.
    fn adapted(&self, node: Node) -> Digest {
        let adapted = self.instantiate(&mut Instantiator::default(), node);
        adapted.map_or(self.bases[node].input_root, |adapted| {
            adapted.tree.unwrap().digest
        })
    }

    #[track_caller]
    fn assert_adapted(&mut self, node: Node, tree: &Flat) {
        let adapted = self.adapted(node);
        assert_eq!(adapted, encode(tree, &mut self.trees), "action {node}");
    }
}

fn parent() -> WeakKey {
    fixture::invocation(OverlayTable::default())
        .identity
        .weak_key()
}

#[test]
fn an_edit_applied_to_the_old_tree_gives_exactly_the_new_one() {
    let mut dice = Dice(3);
    let mut differences = 0;
    for round in 0..2000 {
        let old = random_tree(&mut dice);
        let new = random_edit(&old, &mut dice);
        let mut scene = Scene::of(&[&old]);
        assert!(scene.learn(0, &new), "round {round}");
        let root = encode(&new, &mut scene.trees);
        let adapted = scene.instantiate(&mut Instantiator::default(), 0).unwrap();
        assert_eq!(
            adapted.tree.as_ref().map(|tree| tree.digest),
            Some(root),
            "round {round}: {old:#?} became {new:#?}"
        );
        let mut old_trees = Trees::new();
        encode(&old, &mut old_trees);
        assert_complete(&adapted, root, &scene.trees, &old_trees);
        differences += Edit::between(scene.bases[0].input_root, root, &scene.trees)
            .unwrap()
            .size();
        assert!(!scene.learn(0, &new), "round {round}: it is known");
    }
    assert!(differences > 8000, "{differences}");
}

/// All directories that are new are uploaded.
fn assert_complete(adapted: &Adapted, root: Digest, trees: &Trees, old: &Trees) {
    let mut needed = HashMap::new();
    adapted.collect_blobs(&mut HashSet::new(), &mut needed);
    let mut open = vec![root];
    while let Some(digest) = open.pop() {
        assert!(old.contains_key(&digest) || needed.contains_key(&digest));
        open.extend(trees[&digest].directories.iter().map(|(_, child)| *child));
    }
}

#[test]
fn an_edit_is_applied_to_other_trees_as_far_as_they_are_alike_with_and_without_memo() {
    let mut dice = Dice(4);
    let mut others_changed = 0;
    for round in 0..1000 {
        let whole = random_tree(&mut dice);
        let new = random_edit(&whole, &mut dice);
        let mut trees = vec![whole.clone()];
        for _ in 0..5 {
            let mut tree = whole.clone();
            tree.retain(|path, _| path == COMMON || dice.roll(3) > 0);
            for _ in 0..dice.roll(3) {
                add_random(&mut tree, &mut dice);
            }
            if dice.roll(4) == 0 {
                tree.remove(COMMON);
            } else {
                tree.remove("a");
                tree.insert(COMMON.to_owned(), named(COMMON, &file("old")));
            }
            trees.push(normal(&tree));
        }
        let trees: Vec<&Flat> = trees.iter().collect();
        let mut scene = Scene::of(&trees);
        scene.learn(0, &new);
        let new = encode(&new, &mut scene.trees);
        let edit = Edit::between(scene.bases[0].input_root, new, &scene.trees).unwrap();
        // As if nothing but the common file could be the cause.
        let learned = scene.edits.learned.get_mut(&parent()).unwrap();
        for implied in &mut learned.values_mut().next().unwrap().implied {
            implied.causes.truncate(1);
            implied.causes[0].file = OldFile {
                path: COMMON.to_owned(),
                digest: digest("old"),
            };
        }
        let mut shared = Instantiator::default();
        for (node, tree) in trees.iter().enumerate() {
            let expected = match tree.get(COMMON) {
                Some(_) => expected(tree, &edit),
                None => expected(
                    tree,
                    &Edit {
                        changed: edit.changed.clone(),
                        ..Edit::default()
                    },
                ),
            };
            let expected = encode(&expected, &mut scene.trees);
            let together = scene.instantiate(&mut shared, node);
            let together = together.map_or(scene.bases[node].input_root, |adapted| {
                adapted.tree.unwrap().digest
            });
            assert_eq!(scene.adapted(node), expected, "round {round}: {tree:#?}");
            assert_eq!(together, expected, "round {round}: {tree:#?}");
            others_changed += usize::from(node > 0 && expected != scene.bases[node].input_root);
        }
    }
    assert!(others_changed > 3000, "{others_changed}");
}

#[test]
fn equal_trees_teach_nothing() {
    let mut dice = Dice(5);
    for _ in 0..200 {
        let tree = random_tree(&mut dice);
        let mut scene = Scene::of(&[&tree]);
        assert!(!scene.learn(0, &tree));
        assert!(scene.instantiate(&mut Instantiator::default(), 0).is_none());
    }
}

#[test]
fn trees_that_are_too_different_teach_nothing() {
    let mut trees = Trees::new();
    let mut between = |old: &Flat, new: &Flat| {
        let (old, new) = (encode(old, &mut trees), encode(new, &mut trees));
        Edit::between(old, new, &trees)
    };
    let many = |count: usize| {
        let mut flat = files(&[("common.h", "common")]);
        flat.extend((0..count).map(|number| {
            let path = format!("{number}.h");
            let entry = named(&path, &file("x"));
            (path, entry)
        }));
        flat
    };
    let few = many(1);
    let edit = between(&few, &many(MAX_DIFFERENCES)).unwrap();
    assert_eq!(edit.size(), MAX_DIFFERENCES - 1);
    assert_eq!(between(&few, &many(MAX_DIFFERENCES + 2)), None);
    let one = files(&[("one/a.c", "a"), ("one/a.h", "h")]);
    assert_eq!(between(&one, &files(&[("b.c", "b")])), None);
    let known = encode(&one, &mut trees);
    assert_eq!(Edit::between(known, digest("absent"), &trees), None);
}

#[test]
fn trees_with_more_paths_than_any_real_one_teach_nothing() {
    let mut trees = Trees::new();
    let mut root_of = |content: &str| {
        let leaf = encode(&files(&[("file", content)]), &mut trees);
        (0..40).fold(leaf, |below, _| {
            let directories = ["a", "b"].map(|name| reapi::DirectoryNode {
                name: name.to_owned(),
                digest: Some(below.to_proto()),
            });
            let (digest, encoded) = Digest::of_message(&reapi::Directory {
                directories: directories.into(),
                ..reapi::Directory::default()
            });
            trees.insert(
                digest,
                Arc::new(Directory::parse(encoded, digest.function()).unwrap()),
            );
            digest
        })
    };
    let (old, new) = (root_of("old"), root_of("new"));
    assert_eq!(Edit::between(old, new, &trees), None);
}

#[test]
fn what_must_not_be_rewritten_teaches_nothing() {
    let mut trees = Trees::new();
    let old = encode(&files(&[("a.h", "a"), ("b.h", "b")]), &mut trees);
    let odd = [trees[&old].encoded.as_ref(), &[0xf8, 0x3f, 1]].concat(); // field 1023
    let new = Digest::of(&odd);
    trees.insert(
        new,
        Arc::new(Directory::parse(odd.into(), new.function()).unwrap()),
    );
    assert_eq!(Edit::between(old, new, &trees), None);
}

#[test]
fn a_header_that_gains_an_include_brings_it_to_all_who_read_the_header() {
    let reads = |source: &'static str| files(&[(source, source), ("common.h", "old")]);
    let apart = files(&[("d.c", "d")]);
    let mut scene = Scene::of(&[&reads("a.c"), &reads("b.c"), &reads("c.c"), &apart]);
    let now = |source: &'static str| {
        files(&[(source, source), ("common.h", "new"), ("sub/new.h", "new")])
    };
    assert!(scene.learn(0, &now("a.c")));
    scene.assert_adapted(1, &now("b.c"));
    scene.assert_adapted(2, &now("c.c"));
    scene.assert_adapted(3, &apart);
    assert!(!scene.learn(1, &now("b.c")));
    // The new header is edited in its turn.
    let later = |source: &'static str| {
        files(&[
            (source, source),
            ("common.h", "new"),
            ("sub/new.h", "newer"),
        ])
    };
    assert!(scene.learn(1, &later("b.c")));
    scene.assert_adapted(2, &later("c.c"));
}

#[test]
fn a_source_that_gains_an_include_brings_it_to_nobody_else() {
    let reads = |source: &'static str| files(&[(source, source), ("common.h", "old")]);
    let mut scene = Scene::of(&[&reads("a.c"), &reads("b.c")]);
    scene.learn(
        0,
        &files(&[("a.c", "new"), ("common.h", "new"), ("new.h", "new")]),
    );
    scene.assert_adapted(1, &files(&[("b.c", "b.c"), ("common.h", "new")]));
    // It was the header after all.
    let now =
        |source: &'static str| files(&[(source, source), ("common.h", "new"), ("new.h", "new")]);
    let mut scene = Scene::of(&[&reads("a.c"), &reads("b.c"), &reads("c.c")]);
    scene.learn(
        0,
        &files(&[("a.c", "new"), ("common.h", "new"), ("new.h", "new")]),
    );
    assert!(scene.learn(1, &now("b.c")));
    scene.assert_adapted(2, &now("c.c"));
}

#[test]
fn a_guess_that_is_refuted_is_given_up() {
    let reads = |source: &str| files(&[(source, "source"), ("common.h", "old"), ("x.h", "x")]);
    let sources: Vec<String> = (0..20).map(|number| format!("{number}.c")).collect();
    let trees: Vec<Flat> = sources.iter().map(|source| reads(source)).collect();
    let mut scene = Scene::of(&trees.iter().collect::<Vec<_>>());
    let without = |number: usize| files(&[(&sources[number], "source"), ("common.h", "new")]);
    let with = |number: usize| {
        let source: &str = &sources[number];
        files(&[(source, "source"), ("common.h", "new"), ("x.h", "x")])
    };
    assert!(scene.learn(0, &without(0)));
    scene.assert_adapted(19, &without(19));
    assert!(scene.learn(1, &with(1)), "it reads it by itself");
    scene.assert_adapted(19, &with(19));
    assert!(!scene.learn(2, &with(2)));
    for number in 3..15 {
        scene.learn(number, &without(number));
    }
    scene.assert_adapted(19, &without(19));
    for number in 15..17 {
        scene.learn(number, &with(number));
    }
    scene.assert_adapted(19, &with(19));
    assert!(!scene.learn(17, &without(17)), "for good");
}

#[test]
fn a_change_that_is_taken_back_is_forgotten() {
    let reads = |source: &'static str, common: &'static str| {
        files(&[(source, "old"), ("common.h", common)])
    };
    let mut scene = Scene::of(&[&reads("a.c", "old"), &reads("b.c", "old")]);
    assert!(scene.learn(0, &reads("a.c", "new")));
    scene.assert_adapted(1, &reads("b.c", "new"));
    assert!(scene.learn(0, &reads("a.c", "old")));
    scene.assert_adapted(1, &reads("b.c", "old"));
}

#[test]
fn a_header_that_another_one_hides_vanishes_for_all_who_read_it() {
    let reads = |source: &'static str| files(&[(source, "source"), ("b/x.h", "b")]);
    let now = |source: &'static str| files(&[(source, "source"), ("a/x.h", "a")]);
    let mut scene = Scene::of(&[&reads("a.c"), &reads("b.c"), &reads("c.c")]);
    assert!(scene.learn(0, &now("a.c")));
    scene.assert_adapted(1, &now("b.c"));
    // It looks for headers in another order.
    assert!(scene.learn(2, &reads("c.c")));
    scene.assert_adapted(1, &reads("b.c"));
}

#[test]
fn outputs_of_actions_are_not_learned() {
    let old = files(&[("a.o", "old"), ("script", "script")]);
    let mut scene = Scene::of(&[&old]);
    assert!(!scene.learn(0, &files(&[("a.o", "new"), ("script", "script")])));
    scene.assert_adapted(0, &old);
    assert!(scene.learn(
        0,
        &files(&[("a.o", "new"), ("script", "new"), ("b.o", "b")])
    ));
    scene.assert_adapted(0, &files(&[("a.o", "old"), ("script", "new")]));
}

#[test]
fn other_places_and_parents_learn_nothing() {
    let tree = files(&[("a.c", "a"), ("common.h", "old")]);
    let mut scene = Scene::of(&[&tree, &tree]);
    scene.bases[1].mount = Some("/elsewhere".into());
    scene.learn(0, &files(&[("a.c", "a"), ("common.h", "new")]));
    scene.assert_adapted(1, &tree);
    assert!(scene.edits.of(WeakKey([1; 32]), &scene.bases[0]).is_none());
}

#[test]
fn no_more_is_remembered_than_has_room() {
    let tree = |age: &str| {
        let mut flat = files(&[("same", "same")]);
        for number in 0..MAX_DIFFERENCES - 1 {
            let path = format!("{number}");
            let entry = named(&path, &file(&format!("{age} {number}")));
            flat.insert(path, entry);
        }
        flat
    };
    let old: Vec<Flat> = (0..8).map(|age| tree(&format!("old {age}"))).collect();
    let mut scene = Scene::of(&old.iter().collect::<Vec<_>>());
    let new = tree("new");
    for node in 0..old.len() {
        assert!(scene.learn(node, &new));
        let learned = scene.edits.learned.values().flat_map(HashMap::values);
        assert!(learned.map(Learned::size).sum::<usize>() <= MAX_LEARNED);
        scene.assert_adapted(node, &new);
    }
}

#[test]
fn a_link_that_leads_elsewhere_is_another_entry() {
    let with = |target: &str| {
        let mut flat = files(&[("a.h", target)]);
        flat.insert("lib".to_owned(), named("lib", &link(target)));
        flat
    };
    let mut scene = Scene::of(&[&with("old"), &with("old")]);
    assert!(scene.learn(0, &with("new")));
    scene.assert_adapted(1, &with("new"));
}
