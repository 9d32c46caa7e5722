//! Records as they travel: a parent as a `buildstream.v2.SpeculativeActions`, and back. Pure.
//!
//! Such a message says in BuildStream's words what BuildStream needs: base actions by digest, and
//! for each of them where the files of its input tree came from. What primed needs on top of that
//! (who the parent is, the actions themselves, their outputs, durations and places) stands in a
//! field of its own, `primed_records`, which others skip. Where that field is there nothing else is
//! read, so records that travel between primeds arrive as they left.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use super::parent::{BaseAction, Origin, Parent, ParentKind, WeakKey};
use super::store::{KnownParent, base_action, parent_of, stored_action, stored_parent};
use crate::cas::Digest;
use crate::cas::directories::Trees;
use crate::cas::outputs::normalized;
use crate::reapi::buildstream::v2::SpeculativeActions;
use crate::reapi::buildstream::v2::speculative_actions::overlay::OverlayType;
use crate::reapi::buildstream::v2::speculative_actions::{Overlay, SpeculativeAction};
use crate::reapi::primed::store::v1 as proto;

/// The largest message that is taken in.
pub const MAX_MESSAGE: usize = 128 * 1024 * 1024;
/// Overlays that are written for single actions, in all. (A table of 300 headers, written out for
/// 10,000 actions, would take half a gigabyte.)
const MAX_OVERLAYS: usize = 400_000;
/// Where BuildStream runs the commands of elements: below this, the project's name and the element's.
const BUILD_ROOT: &str = "buildstream/";

/// Bytes that are no message, or one that contradicts itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It is too long to look at.
    #[error("it is longer than {} MiB", MAX_MESSAGE / 1024 / 1024)]
    TooLarge,
    /// It is something else.
    #[error("it is no buildstream.v2.SpeculativeActions: {0}")]
    NoMessage(prost::DecodeError),
    /// Nothing is recorded in it.
    #[error("it holds no actions: it is empty, or no buildstream.v2.SpeculativeActions")]
    Empty,
    /// A digest in it is none.
    #[error("it holds {0} without a digest of a digest function that primed knows")]
    Digest(&'static str),
    /// primed's own part of it is damaged.
    #[error("primed's own part of it is malformed: {0}")]
    Records(&'static str),
}

/// What a message holds.
#[derive(Debug)]
pub enum Interchange {
    /// All that a primed has recorded of a parent.
    Records(Box<Parent>),
    /// What others have written.
    Foreign(SpeculativeActions),
}

/// The names of action parents: where their commands run.
#[derive(Clone, Debug, Default)]
pub struct Names(HashMap<WeakKey, String>);

impl Names {
    /// The names of `parents`.
    pub fn of<'a>(parents: impl IntoIterator<Item = &'a KnownParent>) -> Self {
        let named = parents.into_iter().filter_map(|known| {
            let ParentKind::Action(action) = &known.identity.kind else {
                return None;
            };
            Some((known.key, action.name.clone()))
        });
        Names(named.collect())
    }

    fn name(&self, key: WeakKey) -> &str {
        self.0.get(&key).map_or("", String::as_str)
    }

    /// What others call a parent: the element's name, or else its weak key.
    fn element(&self, key: WeakKey) -> String {
        let element = element_name(self.name(key)).map(str::to_owned);
        element.unwrap_or_else(|| key.to_string())
    }

    /// The parents that others call so.
    fn keys(&self, element: &str) -> Vec<WeakKey> {
        match element.parse() {
            Ok(key) => vec![key],
            Err(_) => {
                let named = self.0.iter();
                let named = named.filter(|(_, name)| element_name(name) == Some(element));
                let mut keys: Vec<_> = named.map(|(key, _)| *key).collect();
                keys.sort_unstable();
                keys
            }
        }
    }
}

/// The name of the element that is built in `directory`.
fn element_name(directory: &str) -> Option<&str> {
    let (_project, element) = directory.strip_prefix(BUILD_ROOT)?.split_once('/')?;
    Some(element)
}

/// `path` relative to `directory`, if it is below it.
fn below<'a>(path: &'a str, directory: &str) -> Option<&'a str> {
    match directory {
        "" => Some(path),
        _ => path.strip_prefix(directory)?.strip_prefix('/'),
    }
}

fn join(directory: &str, path: &str) -> String {
    match directory {
        "" => path.to_owned(),
        _ => format!("{directory}/{path}"),
    }
}

/// `parent` as others read it. The overlays of single actions are written where `trees` hold their
/// input trees, and all of them together are not too many.
pub fn message(parent: &Parent, names: &Names, trees: Option<&Trees>) -> SpeculativeActions {
    let bases = in_order(parent);
    let words = Words::of(parent, names);
    let mut by_action = trees.map_or_else(Vec::new, |trees| {
        let overlays = bases.iter().map(|base| words.of_tree(base, trees));
        overlays.collect()
    });
    if by_action.iter().map(Vec::len).sum::<usize>() > MAX_OVERLAYS {
        tracing::info!(
            parent = parent.identity.label(),
            "single actions have too many overlays to be written out"
        );
        by_action.clear();
    }
    by_action.resize(bases.len(), Vec::new());
    let actions = bases.iter().zip(by_action);
    let actions = actions.map(|(base, overlays)| SpeculativeAction {
        base_action_digest: Some(base.digest.to_proto()),
        overlays: overlays.iter().map(|overlay| (**overlay).clone()).collect(),
    });
    SpeculativeActions {
        actions: actions.collect(),
        artifact_overlays: words.of_outputs(),
        primed_records: records(parent).encode_to_vec().into(),
    }
}

/// The base actions of a parent as they were recorded one after the other.
fn in_order(parent: &Parent) -> Vec<&Arc<BaseAction>> {
    let mut bases: Vec<_> = parent.actions.values().collect();
    bases.sort_unstable_by_key(|base| (base.order, base.digest, &base.mount));
    bases
}

/// primed's own part of the message: equal for equal parents.
pub fn records(parent: &Parent) -> proto::Records {
    let mut stored = stored_parent(parent);
    // The order of those with the same target means something, and stays.
    let target = |overlay: &Overlay| overlay.target_digest.clone().map(|digest| digest.hash);
    stored.overlays.sort_by_cached_key(target);
    proto::Records {
        parent: Some(stored),
        actions: in_order(parent)
            .into_iter()
            .map(|base| stored_action(base))
            .collect(),
    }
}

/// Reads what primed or others have written.
///
/// # Errors
/// `Malformed`.
pub fn read(encoded: Bytes) -> Result<Interchange, Malformed> {
    if encoded.len() > MAX_MESSAGE {
        return Err(Malformed::TooLarge);
    }
    let message = SpeculativeActions::decode(encoded).map_err(Malformed::NoMessage)?;
    if !message.primed_records.is_empty() {
        return own_records(&message).map(|parent| Interchange::Records(Box::new(parent)));
    }
    if message.actions.is_empty() && message.artifact_overlays.is_empty() {
        return Err(Malformed::Empty);
    }
    // Of which function they are is known when it is known which parent this is about.
    let is_digest = |digest: Option<&_>| digest.is_some_and(|it| Digest::try_from(it).is_ok());
    for action in &message.actions {
        if !is_digest(action.base_action_digest.as_ref()) {
            return Err(Malformed::Digest("an action"));
        }
    }
    for overlay in overlays(&message) {
        if !is_digest(overlay.target_digest.as_ref()) {
            return Err(Malformed::Digest("an overlay"));
        }
        let is_of_action = overlay.r#type() == OverlayType::Action;
        if is_of_action && !is_digest(overlay.source_action_digest.as_ref()) {
            return Err(Malformed::Digest("an ACTION overlay"));
        }
    }
    Ok(Interchange::Foreign(message))
}

fn own_records(message: &SpeculativeActions) -> Result<Parent, Malformed> {
    let records = proto::Records::decode(message.primed_records.clone())
        .map_err(|_| Malformed::Records("it cannot be decoded"))?;
    let parent = records.parent.as_ref().and_then(parent_of);
    let mut parent = parent.ok_or(Malformed::Records("it does not say whose records they are"))?;
    if records.actions.len() != message.actions.len() {
        return Err(Malformed::Records("it is about another number of actions"));
    }
    let function = parent.identity.digest_function;
    for (stored, named) in records.actions.into_iter().zip(&message.actions) {
        let base = base_action(stored, function);
        let (key, base) = base.ok_or(Malformed::Records("an action is broken"))?;
        if function.read(named.base_action_digest.as_ref()) != Ok(base.digest) {
            return Err(Malformed::Records("an action has another digest"));
        }
        if parent.actions.insert(key, Arc::new(base)).is_some() {
            return Err(Malformed::Records("an action stands in it twice"));
        }
    }
    Ok(parent)
}

fn overlays(message: &SpeculativeActions) -> impl Iterator<Item = &Overlay> {
    let of_actions = message.actions.iter().flat_map(|action| &action.overlays);
    of_actions.chain(&message.artifact_overlays)
}

/// Adds to the overlay table of `parent` what others have written about it. Some of the actions
/// that they name are `recorded_as` others here: the same commands on other files.
pub fn add_overlays(
    parent: &mut Parent,
    message: &SpeculativeActions,
    names: &Names,
    recorded_as: &HashMap<Digest, Digest>,
) {
    let words = Words {
        recorded_as: recorded_as.clone(),
        ..Words::of(parent, names)
    };
    let read = overlays(message).flat_map(|overlay| words.origins(overlay));
    for (target, origin) in read.collect::<Vec<_>>() {
        parent.overlays.add(target, origin);
    }
}

/// Translates between primed's records of one parent and what others call things: they know
/// sources and outputs by their paths in them, where primed knows paths in input trees.
struct Words<'a> {
    parent: &'a Parent,
    names: &'a Names,
    /// Where the recorded actions run.
    directories: HashMap<Digest, &'a str>,
    /// See `add_overlays`.
    recorded_as: HashMap<Digest, Digest>,
}

impl<'a> Words<'a> {
    fn of(parent: &'a Parent, names: &'a Names) -> Self {
        let bases = parent.actions.values();
        Words {
            parent,
            names,
            directories: bases
                .map(|base| (base.digest, base.working_directory.as_str()))
                .collect(),
            recorded_as: HashMap::new(),
        }
    }

    /// Where the command of an action parent runs.
    fn own_name(&self) -> &str {
        match &self.parent.identity.kind {
            ParentKind::Action(action) => &action.name,
            ParentKind::Invocation { .. } => "",
        }
    }

    fn project_root(&self) -> Option<&Path> {
        self.parent.identity.project_root()
    }

    /// The overlays for the files in the input tree of `base`: for each of them SOURCE, then
    /// ACTION, then ARTIFACT, which is the order in which others try them. (They look into no other
    /// trees; overlays of those that digest-valued text names are for primed alone.)
    fn of_tree(&self, base: &BaseAction, trees: &Trees) -> Vec<Arc<Overlay>> {
        let mut files = BTreeSet::new();
        let mut seen = HashSet::new();
        let mut open = vec![base.input_root];
        while let Some(digest) = open.pop() {
            let Some(directory) = trees.get(&digest).filter(|_| seen.insert(digest)) else {
                continue;
            };
            files.extend(directory.files.iter().map(|(_, file)| *file));
            open.extend(directory.directories.iter().map(|(_, child)| *child));
        }
        let overlays = files.iter().flat_map(|target| self.overlays(*target));
        overlays.map(Arc::new).collect()
    }

    fn overlays(&self, target: Digest) -> Vec<Overlay> {
        let origins = self.parent.overlays.origins(&target).iter();
        let overlays = origins.filter_map(|origin| self.overlay(target, origin));
        let mut overlays: Vec<_> = overlays.collect();
        overlays.sort_by_key(|overlay| match overlay.r#type() {
            OverlayType::Source => 0,
            OverlayType::Action => 1,
            OverlayType::Artifact => 2,
        });
        overlays
    }

    /// `None` if it says nothing to others: a file that stands in an element's tree, but not where
    /// its sources are, was put there by a dependency, and has an overlay that names that one.
    fn overlay(&self, target: Digest, origin: &Origin) -> Option<Overlay> {
        let element = origin.parent().map(|key| self.names.element(key));
        let mut overlay = Overlay {
            target_digest: Some(target.to_proto()),
            source_element: element.unwrap_or_default(),
            ..Overlay::default()
        };
        overlay.source_path = match origin {
            Origin::Disk(path) => {
                let root = self.project_root();
                let inside = root.and_then(|root| path.strip_prefix(root).ok());
                inside.unwrap_or(path).to_str()?.to_owned()
            }
            Origin::Tree { parent, path } => {
                let name = parent.map_or(self.own_name(), |key| self.names.name(key));
                below(path, name)?.to_owned()
            }
            Origin::Action { action, path, .. } => {
                overlay.set_type(OverlayType::Action);
                overlay.source_action_digest = Some(action.to_proto());
                let directory = self.directories.get(action).copied().unwrap_or_default();
                below(path, directory).unwrap_or(path).to_owned()
            }
            Origin::Artifact { path, .. } => {
                overlay.set_type(OverlayType::Artifact);
                path.clone()
            }
        };
        Some(overlay)
    }

    /// Where the files of the parent's own output came from.
    fn of_outputs(&self) -> Vec<Overlay> {
        let executed = self.parent.executed.iter();
        let targets: BTreeSet<Digest> = executed
            .flat_map(|executed| &executed.outputs)
            .map(|(_, digest)| *digest)
            .collect();
        let mut overlays = Vec::new();
        for target in &targets {
            let known = self.overlays(*target);
            let known = known
                .into_iter()
                .filter(|overlay| overlay.source_element.is_empty());
            overlays.extend(known);
        }
        for base in in_order(self.parent) {
            let written = base.outputs.iter();
            let written = written.filter(|(_, digest)| targets.contains(digest));
            overlays.extend(written.filter_map(|(path, digest)| {
                let origin = Origin::Action {
                    parent: None,
                    action: base.digest,
                    path: path.clone(),
                };
                self.overlay(*digest, &origin)
            }));
        }
        let mut seen = HashSet::new();
        overlays.retain(|overlay| seen.insert(overlay.encode_to_vec()));
        overlays
    }

    /// What an overlay that others wrote says in primed's words; nothing if it names a parent that
    /// nothing is known of.
    fn origins(&self, overlay: &Overlay) -> Vec<(Digest, Origin)> {
        let function = self.parent.identity.digest_function;
        let Ok(target) = function.read(overlay.target_digest.as_ref()) else {
            return Vec::new();
        };
        let element = overlay.source_element.as_str();
        let own = element.is_empty() || element_name(self.own_name()) == Some(element);
        let parents = match own {
            true => vec![None],
            false => self.names.keys(element).into_iter().map(Some).collect(),
        };
        let origins = parents.into_iter().filter_map(|parent| {
            let path = overlay.source_path.as_str();
            Some(match overlay.r#type() {
                OverlayType::Source if path.starts_with('/') => Origin::Disk(path.into()),
                OverlayType::Source => match (parent, &self.parent.identity.kind) {
                    (None, ParentKind::Invocation { project_root, .. }) => {
                        Origin::Disk(project_root.as_ref()?.join(path))
                    }
                    _ => {
                        let name = parent.map_or(self.own_name(), |key| self.names.name(key));
                        let path = join(name, path);
                        Origin::Tree { parent, path }
                    }
                },
                OverlayType::Action => {
                    let action = overlay.source_action_digest.as_ref();
                    let action = function.read(action).ok()?;
                    let action = *self.recorded_as.get(&action).unwrap_or(&action);
                    let directory = self.directories.get(&action).copied().unwrap_or_default();
                    let path = normalized(directory, path)?;
                    Origin::Action {
                        parent,
                        action,
                        path,
                    }
                }
                OverlayType::Artifact => Origin::Artifact {
                    parent: parent?,
                    path: path.trim_start_matches('/').to_owned(),
                },
            })
        });
        origins.map(|origin| (target, origin)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::parent::{
        ActionParent, ExecutedParent, OverlayTable, ParentIdentity, SubactionKey,
    };
    use super::*;
    use crate::cas::DigestFunction;
    use crate::cas::directories::Directory;
    use crate::reapi;
    use std::path::PathBuf;
    use std::time::Duration;

    fn digest(text: &str) -> Digest {
        Digest::of(text.as_bytes())
    }

    const SHA256: DigestFunction = DigestFunction::Sha256;

    fn base(command: &str, input_root: Digest) -> BaseAction {
        let function = input_root.function();
        let (digest, encoded) = function.of_message(&reapi::Action {
            command_digest: Some(function.of(command.as_bytes()).to_proto()),
            input_root_digest: Some(input_root.to_proto()),
            ..reapi::Action::default()
        });
        BaseAction {
            digest,
            encoded,
            input_root,
            mount: None,
            file_system_root: "/".into(),
            working_directory: String::new(),
            texts: Vec::new(),
            outputs: Vec::new(),
            duration: Duration::ZERO,
            order: 0,
            last_seen_unix_ms: 0,
        }
    }

    fn insert(parent: &mut Parent, base: BaseAction) {
        let key = SubactionKey {
            action_key: base.parts().unwrap().action_key,
            mount: base.mount.clone(),
        };
        parent.actions.insert(key, Arc::new(base));
    }

    fn element(name: &str) -> ParentIdentity {
        ParentIdentity {
            instance: "nested".into(),
            digest_function: SHA256,
            uid: None,
            kind: ParentKind::Action(ActionParent {
                instance: "".into(),
                key: digest(name),
                name: name.to_owned(),
            }),
        }
    }

    fn known(identity: ParentIdentity) -> KnownParent {
        KnownParent {
            key: identity.weak_key(),
            identity,
            dependencies: HashSet::new(),
            last_seen_unix_ms: 0,
        }
    }

    /// Anything that can be recorded under a digest function, drawn at random.
    struct Random(fastrand::Rng, DigestFunction);

    impl Random {
        fn new(seed: u64) -> Self {
            let numbers = [1, 2, 3, 5, 6, 9];
            let mut rng = fastrand::Rng::with_seed(seed);
            let function = DigestFunction::from_proto(numbers[rng.usize(..numbers.len())]);
            Random(rng, function.unwrap())
        }

        fn text(&mut self) -> String {
            let length = self.0.usize(..12);
            let letter = |rng: &mut fastrand::Rng| rng.char('\u{20}'..='\u{2100}');
            let text: String = (0..length).map(|_| letter(&mut self.0)).collect();
            text.replace('/', "_")
        }

        fn digest(&mut self) -> Digest {
            // Few enough for the same to occur again.
            let text = self.0.u8(..40).to_string();
            self.1.of(text.as_bytes())
        }

        fn path(&mut self) -> PathBuf {
            Path::new("/").join(self.text()).join(self.text())
        }

        fn maybe<T>(&mut self, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
            self.0.bool().then(|| make(self))
        }

        fn some<T>(&mut self, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
            let count = self.0.usize(..6);
            (0..count).map(|_| make(self)).collect()
        }

        fn key(&mut self) -> WeakKey {
            WeakKey(self.0.u128(..).to_be_bytes().repeat(2).try_into().unwrap())
        }

        fn outputs(&mut self) -> Vec<(String, Digest)> {
            self.some(|random| (random.text(), random.digest()))
        }

        fn parent(&mut self) -> Parent {
            let kind = match self.0.bool() {
                true => ParentKind::Invocation {
                    project_root: self.maybe(Random::path),
                    tool: self.text(),
                },
                false => ParentKind::Action(ActionParent {
                    instance: self.text().into(),
                    key: self.digest(),
                    name: self.text(),
                }),
            };
            let mut parent = Parent::new(ParentIdentity {
                instance: self.text().into(),
                digest_function: self.1,
                uid: self.maybe(|random| random.0.u32(..)),
                kind,
            });
            parent.last_seen_unix_ms = self.0.i64(..);
            parent.text_roots = self.some(Random::digest);
            if matches!(parent.identity.kind, ParentKind::Action(_)) {
                parent.executed = self.maybe(|random| {
                    Arc::new(ExecutedParent {
                        action: random.digest(),
                        input_root: random.digest(),
                        texts: random.some(Random::text),
                        outputs: random.outputs(),
                    })
                });
            }
            for _ in 0..self.0.usize(..9) {
                let (command, root) = (self.text(), self.digest());
                insert(
                    &mut parent,
                    BaseAction {
                        mount: self.maybe(Random::path),
                        file_system_root: self.path(),
                        working_directory: self.text(),
                        texts: self.some(Random::text),
                        outputs: self.outputs(),
                        duration: Duration::from_micros(self.0.u64(..)),
                        order: self.0.u64(..4),
                        last_seen_unix_ms: self.0.i64(..),
                        ..base(&command, root)
                    },
                );
            }
            for _ in 0..self.0.usize(..30) {
                let owner = self.maybe(Random::key);
                let path = self.text();
                let origin = match self.0.u8(..4) {
                    0 => Origin::Disk(self.path()),
                    1 => Origin::Tree {
                        parent: owner,
                        path,
                    },
                    2 => Origin::Action {
                        parent: owner,
                        action: self.digest(),
                        path,
                    },
                    _ => Origin::Artifact {
                        parent: self.key(),
                        path,
                    },
                };
                let target = self.digest();
                parent.overlays.add(target, origin);
            }
            parent
        }
    }

    #[test]
    fn any_parent_comes_back_as_it_was_and_is_written_the_same_again() {
        for seed in 0..500 {
            let parent = Random::new(seed).parent();
            let encoded = message(&parent, &Names::default(), None).encode_to_vec();
            let Ok(Interchange::Records(back)) = read(encoded.clone().into()) else {
                panic!("seed {seed} is not read as records");
            };
            assert_eq!(back.identity, parent.identity, "seed {seed}");
            assert_eq!(back.actions, parent.actions, "seed {seed}");
            assert_eq!(back.overlays, parent.overlays, "seed {seed}");
            assert_eq!(back.text_roots, parent.text_roots, "seed {seed}");
            assert_eq!(back.executed, parent.executed, "seed {seed}");
            assert_eq!(back.last_seen_unix_ms, parent.last_seen_unix_ms);
            let again = message(&back, &Names::default(), None).encode_to_vec();
            assert!(
                again == encoded,
                "seed {seed} is not written the same again"
            );
        }
    }

    #[test]
    fn damaged_messages_are_refused_or_read_but_never_believed_to_be_of_another_parent() {
        let mut refused = 0;
        for seed in 0..300 {
            let mut random = Random::new(seed);
            let parent = random.parent();
            let mut encoded = message(&parent, &Names::default(), None).encode_to_vec();
            let at = random.0.usize(..encoded.len());
            match random.0.bool() {
                true => encoded.truncate(at),
                false => encoded[at] ^= 1 << random.0.u8(..8),
            }
            match read(encoded.into()) {
                Ok(Interchange::Records(back)) => {
                    for (key, base) in &back.actions {
                        assert_eq!(base.digest.function().of(&base.encoded), base.digest);
                        assert_eq!(key.mount, base.mount);
                    }
                }
                Ok(Interchange::Foreign(_)) => {}
                Err(_) => refused += 1,
            }
        }
        assert!(refused > 100, "the damage was none: {refused}");
    }

    #[test]
    fn what_is_no_message_is_refused_with_the_reason() {
        let refused = |bytes: &[u8]| read(Bytes::copy_from_slice(bytes)).unwrap_err();
        assert_eq!(refused(b""), Malformed::Empty);
        assert!(matches!(refused(b"no message"), Malformed::NoMessage(_)));
        let nameless = SpeculativeActions {
            actions: vec![SpeculativeAction::default()],
            ..SpeculativeActions::default()
        };
        assert_eq!(
            refused(&nameless.encode_to_vec()),
            Malformed::Digest("an action")
        );
        let parent = Random::new(1).parent();
        let mut short = message(&parent, &Names::default(), None);
        short.actions.push(SpeculativeAction::default());
        assert!(matches!(
            refused(&short.encode_to_vec()),
            Malformed::Records(_)
        ));
    }

    /// A tree of one directory with these files, each with its name as content.
    fn tree(trees: &mut Trees, names: &[&str]) -> Digest {
        let files = names.iter().map(|name| reapi::FileNode {
            name: (*name).to_owned(),
            digest: Some(digest(name).to_proto()),
            ..reapi::FileNode::default()
        });
        let (digest, encoded) = Digest::of_message(&reapi::Directory {
            files: files.collect(),
            ..reapi::Directory::default()
        });
        trees.insert(
            digest,
            Arc::new(Directory::parse(encoded, digest.function()).unwrap()),
        );
        digest
    }

    fn shown(overlay: &Overlay) -> (OverlayType, &str, &str) {
        let (element, path) = (&overlay.source_element, &overlay.source_path);
        (overlay.r#type(), element, path)
    }

    /// An element that compiles and links, and has a header of another one.
    fn library(trees: &mut Trees) -> (Parent, Names) {
        let other = element("buildstream/p/base.bst").weak_key();
        let mut parent = Parent::new(element("buildstream/p/lib/a.bst"));
        let compile = BaseAction {
            working_directory: "buildstream/p/lib/a.bst".into(),
            outputs: vec![("buildstream/p/lib/a.bst/a.o".into(), digest("a.o"))],
            ..base("compile", tree(trees, &["a.c", "base.h"]))
        };
        let link = BaseAction {
            order: 1,
            ..base("link", tree(trees, &["a.o"]))
        };
        let mut overlays = OverlayTable::default();
        let of = |parent, path: &str| Origin::Tree {
            parent,
            path: path.to_owned(),
        };
        overlays.add(
            digest("base.h"),
            Origin::Artifact {
                parent: other,
                path: "usr/include/base.h".into(),
            },
        );
        overlays.add(digest("base.h"), of(None, "usr/include/base.h"));
        let base_h = of(Some(other), "buildstream/p/base.bst/include/base.h");
        overlays.add(digest("base.h"), base_h);
        overlays.add(digest("a.c"), of(None, "buildstream/p/lib/a.bst/src/a.c"));
        overlays.add(
            digest("a.o"),
            Origin::Action {
                parent: None,
                action: compile.digest,
                path: "buildstream/p/lib/a.bst/a.o".into(),
            },
        );
        parent.overlays = overlays;
        parent.executed = Some(Arc::new(ExecutedParent {
            action: digest("parent"),
            input_root: digest("root"),
            texts: Vec::new(),
            outputs: vec![("usr/lib/a.o".into(), digest("a.o"))],
        }));
        insert(&mut parent, compile);
        insert(&mut parent, link);
        let names = Names::of([&known(element("buildstream/p/base.bst"))]);
        (parent, names)
    }

    #[test]
    fn each_action_has_the_overlays_of_its_own_tree_in_buildstreams_words() {
        let mut trees = Trees::new();
        let (parent, names) = library(&mut trees);
        let message = message(&parent, &names, Some(&trees));
        let mut compile: Vec<_> = message.actions[0].overlays.iter().map(shown).collect();
        compile.sort_unstable();
        assert_eq!(
            compile,
            [
                (OverlayType::Source, "", "src/a.c"),
                (OverlayType::Source, "base.bst", "include/base.h"),
                (OverlayType::Artifact, "base.bst", "usr/include/base.h"),
            ]
        );
        let link: Vec<_> = message.actions[1].overlays.iter().map(shown).collect();
        assert_eq!(link, [(OverlayType::Action, "", "a.o")]);
        let compiled = message.actions[0].base_action_digest.clone();
        assert_eq!(
            message.actions[1].overlays[0].source_action_digest,
            compiled
        );
        let outputs: Vec<_> = message.artifact_overlays.iter().map(shown).collect();
        assert_eq!(outputs, [(OverlayType::Action, "", "a.o")]);
    }

    #[test]
    fn what_others_wrote_says_the_same_to_primed() {
        let mut trees = Trees::new();
        let (parent, names) = library(&mut trees);
        let mut foreign = message(&parent, &names, Some(&trees));
        foreign.primed_records.clear();
        let Ok(Interchange::Foreign(foreign)) = read(foreign.encode_to_vec().into()) else {
            panic!("it is read as something else");
        };
        let mut known = parent.clone();
        known.overlays = OverlayTable::default();
        add_overlays(&mut known, &foreign, &names, &HashMap::new());
        let origins = |parent: &Parent| {
            let mut origins: Vec<_> = parent
                .overlays
                .iter()
                .map(|(target, origin)| (*target, origin.clone()))
                .collect();
            origins.sort_unstable();
            origins
        };
        let in_own_tree = |origin: &Origin| match origin {
            Origin::Tree { parent: None, path } => path.starts_with("usr/"),
            _ => false,
        };
        let mut expected = origins(&parent);
        expected.retain(|(_, origin)| !in_own_tree(origin));
        assert_eq!(origins(&known), expected);
    }

    #[test]
    fn the_sources_of_an_invocation_are_named_by_their_place_in_the_project() {
        let mut trees = Trees::new();
        let mut parent = Parent::new(ParentIdentity {
            instance: "".into(),
            digest_function: SHA256,
            uid: Some(7),
            kind: ParentKind::Invocation {
                project_root: Some("/home/me/p".into()),
                tool: "make".into(),
            },
        });
        insert(
            &mut parent,
            base("compile", tree(&mut trees, &["a.c", "stdio.h"])),
        );
        let mut overlays = OverlayTable::default();
        overlays.add(digest("a.c"), Origin::Disk("/home/me/p/src/a.c".into()));
        overlays.add(
            digest("stdio.h"),
            Origin::Disk("/usr/include/stdio.h".into()),
        );
        parent.overlays = overlays.clone();
        let mut message = message(&parent, &Names::default(), Some(&trees));
        let paths: BTreeSet<_> = message.actions[0].overlays.iter().map(shown).collect();
        let source = |path| (OverlayType::Source, "", path);
        assert_eq!(
            paths,
            BTreeSet::from([source("src/a.c"), source("/usr/include/stdio.h")])
        );
        message.primed_records.clear();
        parent.overlays = OverlayTable::default();
        add_overlays(&mut parent, &message, &Names::default(), &HashMap::new());
        assert_eq!(parent.overlays, overlays);
    }
}
