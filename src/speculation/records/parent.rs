//! What is known of a parent: the base actions that were recorded for it, and its overlay table.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use sha2::{Digest as _, Sha256};

use crate::cas::{Digest, DigestFunction};
use crate::digest::unhex;
use crate::reapi::Action;

/// The identity of a parent that stays the same when only file contents change.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeakKey(pub [u8; 32]);

impl fmt::Debug for WeakKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for WeakKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Text that is no weak key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a weak key: 64 hexadecimal digits")]
pub struct WeakKeyError(String);

impl FromStr for WeakKey {
    type Err = WeakKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut key = [0; 32];
        unhex(&text.to_ascii_lowercase(), &mut key).ok_or_else(|| WeakKeyError(text.to_owned()))?;
        Ok(WeakKey(key))
    }
}

/// What a parent is known by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ParentIdentity {
    /// REAPI's instance name, of its subactions.
    pub instance: Arc<str>,
    /// The digest function of its subactions.
    pub digest_function: DigestFunction,
    /// The user whose processes ask; `None` for clients on other machines.
    pub uid: Option<u32>,
    /// What it is, and how that is told from others.
    pub kind: ParentKind,
}

/// The kinds of parents.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ParentKind {
    /// Calls of one run of a build tool.
    Invocation {
        /// Where the build tool runs, if it can be seen.
        project_root: Option<PathBuf>,
        /// The build tool's name.
        tool: String,
    },
    /// An action whose command runs actions itself.
    Action(ActionParent),
}

/// An action whose command runs actions itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ActionParent {
    /// The instance that it is executed under itself.
    pub instance: Arc<str>,
    /// Digest of the `Action` without its input root, and without digest-valued text.
    pub key: Digest,
    /// Where its command runs: the name by which people know it, and by which it is known again
    /// when its command has changed.
    pub name: String,
}

impl ParentIdentity {
    /// The digest of what identifies the parent. The tool counts only where no root is known, and
    /// the name of an action not at all.
    pub fn weak_key(&self) -> WeakKey {
        use std::os::unix::ffi::OsStrExt;
        let mut hasher = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hasher.update((bytes.len() as u64).to_be_bytes());
            hasher.update(bytes);
        };
        field(match &self.kind {
            ParentKind::Invocation { .. } => b"primed invocation parent",
            ParentKind::Action(_) => b"primed action parent",
        });
        field(&self.digest_function.to_proto().to_be_bytes());
        field(self.instance.as_bytes());
        field(
            self.uid
                .map(u32::to_be_bytes)
                .as_ref()
                .map_or(b"", |uid| uid),
        );
        match &self.kind {
            ParentKind::Invocation {
                project_root: Some(root),
                ..
            } => field(root.as_os_str().as_bytes()),
            ParentKind::Invocation { tool, .. } => field(tool.as_bytes()),
            ParentKind::Action(action) => {
                field(action.instance.as_bytes());
                field(action.key.hash());
            }
        }
        WeakKey(hasher.finalize().into())
    }

    /// As what an action is asked for: which instance its command executes under is not known
    /// then, so its own stands in that place. `None` for an invocation.
    pub fn as_asked_for(&self) -> Option<Self> {
        let ParentKind::Action(action) = &self.kind else {
            return None;
        };
        Some(ParentIdentity {
            instance: action.instance.clone(),
            ..self.clone()
        })
    }

    /// For people: the tool and where it ran.
    pub fn label(&self) -> String {
        match &self.kind {
            ParentKind::Invocation {
                project_root: Some(root),
                tool,
            } => format!("{tool} in {}", root.display()),
            ParentKind::Invocation { tool, .. } => tool.clone(),
            ParentKind::Action(action) => format!("action in {}", action.name),
        }
    }

    /// Where the build tool runs, if that is known.
    pub fn project_root(&self) -> Option<&Path> {
        match &self.kind {
            ParentKind::Invocation { project_root, .. } => project_root.as_deref(),
            ParentKind::Action(_) => None,
        }
    }
}

/// Everything recorded about one parent.
#[derive(Clone, Debug)]
pub struct Parent {
    /// Who it is.
    pub identity: ParentIdentity,
    /// Its base actions, each under its subaction key.
    pub actions: HashMap<SubactionKey, Arc<BaseAction>>,
    /// Where the files of their input trees came from, and those of `text_roots`.
    pub overlays: OverlayTable,
    /// Roots of the trees that their digest-valued text names, as far as these could be read.
    pub text_roots: Vec<Digest>,
    /// What it executed as, if it is an action.
    pub executed: Option<Arc<ExecutedParent>>,
    /// Milliseconds since 1970.
    pub last_seen_unix_ms: i64,
}

/// An action parent as it was executed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecutedParent {
    /// Digest of the action.
    pub action: Digest,
    /// Its input tree.
    pub input_root: Digest,
    /// The digest-valued text of its `Action` and `Command`, in the order in which it stands.
    pub texts: Vec<String>,
    /// The files that it wrote: paths relative to what it staged or installed them as, sorted.
    pub outputs: Vec<(String, Digest)>,
}

impl Parent {
    /// A parent of which nothing is recorded yet.
    pub fn new(identity: ParentIdentity) -> Self {
        Parent {
            identity,
            actions: HashMap::new(),
            overlays: OverlayTable::default(),
            text_roots: Vec::new(),
            executed: None,
            last_seen_unix_ms: 0,
        }
    }

    /// The root of the tree that `text` names, if its files have overlays.
    pub fn text_root(&self, text: &str) -> Option<Digest> {
        let root = text.parse().ok()?;
        self.text_roots.contains(&root).then_some(root)
    }

    /// The other parents that its overlays name.
    pub fn dependencies(&self) -> HashSet<WeakKey> {
        self.overlays.parents()
    }
}

/// The identity of one subaction across builds: its `Action` without the input root, and the
/// directory that its input tree stands for. (One `make` may run the same command in two places.)
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SubactionKey {
    /// The action key: digest of the `Action` without its input root.
    pub action_key: Digest,
    /// See `BaseAction::mount`.
    pub mount: Option<PathBuf>,
}

/// A subaction as it was recorded in an earlier build.
#[derive(Clone, Debug, PartialEq)]
pub struct BaseAction {
    /// Digest of the action.
    pub digest: Digest,
    /// The encoded `Action`.
    pub encoded: Bytes,
    /// Its input tree.
    pub input_root: Digest,
    /// The directory that the root of the input tree stands for, where known: an absolute one, or
    /// one in the tree of the action parent.
    pub mount: Option<PathBuf>,
    /// The root of the client's file system as primed sees it; empty if it does not.
    pub file_system_root: PathBuf,
    /// Where the command runs, relative to the input root.
    pub working_directory: String,
    /// The distinct digest-valued texts of its `Action` and `Command`.
    pub texts: Vec<String>,
    /// Files that it wrote: paths relative to the input root, without `.` and `..`.
    pub outputs: Vec<(String, Digest)>,
    /// How long the worker ran it.
    pub duration: Duration,
    /// Its place in the order in which its build asked.
    pub order: u64,
    /// Milliseconds since 1970.
    pub last_seen_unix_ms: i64,
}

impl BaseAction {
    /// The parts of its `Action`.
    ///
    /// # Errors
    /// `Unrecordable`, when it must be left alone.
    pub fn parts(&self) -> Result<ActionParts, Unrecordable> {
        action_parts(&self.encoded, self.digest.function())
    }
}

/// Why an action cannot be recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unrecordable {
    /// The blob is no `Action`, or one that does not re-encode to its own bytes.
    #[error("it is malformed, or holds fields that primed does not know")]
    Malformed,
    /// The client asked that it be not cached: it must not be executed ahead of time.
    #[error("it is marked do_not_cache")]
    DoNotCache,
    /// What it does depends on the actions that it runs, and it would take their places.
    #[error("it runs actions itself")]
    RunsActions,
}

/// The parts of an encoded `Action` that recording needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActionParts {
    /// Digest of the `Action` without its input root.
    pub action_key: Digest,
    /// Its `Command`.
    pub command: Digest,
    /// Its input tree.
    pub input_root: Digest,
}

/// Takes apart an encoded `Action` whose digest is of `function`.
///
/// # Errors
/// `Unrecordable`, when it must be left alone.
pub fn action_parts(
    encoded: &Bytes,
    function: DigestFunction,
) -> Result<ActionParts, Unrecordable> {
    let read = |digest: Option<&_>| function.read(digest).map_err(|_| Unrecordable::Malformed);
    let mut action = Action::decode(encoded.clone()).map_err(|_| Unrecordable::Malformed)?;
    if action.do_not_cache {
        return Err(Unrecordable::DoNotCache);
    }
    if encoded != &action.encode_to_vec() {
        return Err(Unrecordable::Malformed);
    }
    let command = read(action.command_digest.as_ref())?;
    let input_root = read(action.input_root_digest.take().as_ref())?;
    Ok(ActionParts {
        action_key: function.of_message(&action).0,
        command,
        input_root,
    })
}

/// Where a file of an input tree came from. A parent is named where it is not the own one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// A source file on disk, by its absolute path.
    Disk(PathBuf),
    /// A source file of an action parent, by its path in that one's input tree.
    Tree {
        /// Whose tree.
        parent: Option<WeakKey>,
        /// Path of the file.
        path: String,
    },
    /// An output of another subaction: that base action, and the path relative to its input root.
    Action {
        /// Whose subaction.
        parent: Option<WeakKey>,
        /// Digest of the base action.
        action: Digest,
        /// Path of the output.
        path: String,
    },
    /// A file of another parent's finished output.
    Artifact {
        /// Whose output.
        parent: WeakKey,
        /// Path of the file.
        path: String,
    },
}

impl Origin {
    /// The other parent that it names.
    pub fn parent(&self) -> Option<WeakKey> {
        match self {
            Origin::Disk(_) => None,
            Origin::Tree { parent, .. } | Origin::Action { parent, .. } => *parent,
            Origin::Artifact { parent, .. } => Some(*parent),
        }
    }
}

/// For each file digest in the recorded trees, all its origins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OverlayTable {
    origins: HashMap<Digest, Vec<Origin>>,
}

impl OverlayTable {
    /// Adds one overlay, unless it is there already.
    pub fn add(&mut self, target: Digest, origin: Origin) {
        let origins = self.origins.entry(target).or_default();
        if !origins.contains(&origin) {
            origins.push(origin);
        }
    }

    /// All origins of `target`.
    pub fn origins(&self, target: &Digest) -> &[Origin] {
        self.origins.get(target).map_or(&[], Vec::as_slice)
    }

    /// Every overlay, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = (&Digest, &Origin)> {
        self.origins
            .iter()
            .flat_map(|(target, origins)| origins.iter().map(move |origin| (target, origin)))
    }

    /// The other parents that overlays name.
    pub fn parents(&self) -> HashSet<WeakKey> {
        let origins = self.iter();
        origins.filter_map(|(_, origin)| origin.parent()).collect()
    }

    /// The distinct source files on disk that overlays name.
    pub fn sources(&self) -> HashSet<&Path> {
        self.iter()
            .filter_map(|(_, origin)| match origin {
                Origin::Disk(path) => Some(path.as_path()),
                _ => None,
            })
            .collect()
    }
}

/// What tests of several modules begin with.
#[cfg(test)]
pub mod fixture {
    use super::*;

    /// Numbers that look random and are the same in every run.
    pub struct Dice(pub u64);

    impl Dice {
        /// A number below `sides`.
        pub fn roll(&mut self, sides: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 16) as usize % sides
        }
    }

    /// An action in `/p` of which nothing is known but its name.
    pub fn base(name: &str, input_root: Digest) -> BaseAction {
        BaseAction {
            digest: Digest::of(name.as_bytes()),
            encoded: Bytes::new(),
            input_root,
            mount: Some("/p".into()),
            file_system_root: "/".into(),
            working_directory: String::new(),
            texts: Vec::new(),
            outputs: Vec::new(),
            duration: Duration::ZERO,
            order: 0,
            last_seen_unix_ms: 0,
        }
    }

    /// An invocation of make in `/p`.
    pub fn invocation(overlays: OverlayTable) -> Parent {
        let mut parent = Parent::new(ParentIdentity {
            instance: "".into(),
            digest_function: DigestFunction::Sha256,
            uid: None,
            kind: ParentKind::Invocation {
                project_root: Some("/p".into()),
                tool: "make".into(),
            },
        });
        parent.overlays = overlays;
        parent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA256: DigestFunction = DigestFunction::Sha256;

    fn action(input: &str) -> Action {
        Action {
            command_digest: Some(Digest::of(b"command").to_proto()),
            input_root_digest: Some(Digest::of(input.as_bytes()).to_proto()),
            ..Action::default()
        }
    }

    #[test]
    fn the_action_key_ignores_the_input_root_and_nothing_else() {
        let parts =
            |action: &Action| action_parts(&Bytes::from(action.encode_to_vec()), SHA256).unwrap();
        let one = parts(&action("one"));
        let two = parts(&action("two"));
        assert_eq!(one.action_key, two.action_key);
        assert_ne!(one.input_root, two.input_root);
        let salted = Action {
            salt: Bytes::from_static(b"x"),
            ..action("one")
        };
        assert_ne!(parts(&salted).action_key, one.action_key);
    }

    #[test]
    fn actions_that_must_be_left_alone_are_refused() {
        let mut uncacheable = action("one");
        uncacheable.do_not_cache = true;
        let encoded = uncacheable.encode_to_vec().into();
        assert_eq!(
            action_parts(&encoded, SHA256),
            Err(Unrecordable::DoNotCache)
        );
        let mut unknown_field = action("one").encode_to_vec();
        unknown_field.extend([0xf8, 0x3f, 1]); // field 1023
        assert_eq!(
            action_parts(&unknown_field.into(), SHA256),
            Err(Unrecordable::Malformed)
        );
        assert_eq!(
            action_parts(&Bytes::new(), SHA256),
            Err(Unrecordable::Malformed)
        );
    }

    #[test]
    fn weak_keys_differ_by_every_part_of_the_identity() {
        let invocation = |root: Option<&str>, tool: &str| ParentKind::Invocation {
            project_root: root.map(PathBuf::from),
            tool: tool.to_owned(),
        };
        let identity = ParentIdentity {
            instance: "".into(),
            digest_function: SHA256,
            uid: Some(1000),
            kind: invocation(Some("/p"), "make"),
        };
        // Records of earlier versions, and of other machines, are found by it.
        assert_eq!(
            identity.weak_key().to_string(),
            "b49c677810426e540431b84fb9355badd2a649a4a1ee2b6b898e2879e2b6b507"
        );
        let mut keys = vec![identity.weak_key()];
        keys.push(
            ParentIdentity {
                instance: "x".into(),
                ..identity.clone()
            }
            .weak_key(),
        );
        keys.push(
            ParentIdentity {
                digest_function: DigestFunction::Blake3,
                ..identity.clone()
            }
            .weak_key(),
        );
        keys.push(
            ParentIdentity {
                uid: None,
                ..identity.clone()
            }
            .weak_key(),
        );
        keys.push(
            ParentIdentity {
                uid: Some(1001),
                ..identity.clone()
            }
            .weak_key(),
        );
        keys.push(
            ParentIdentity {
                kind: invocation(Some("/q"), "make"),
                ..identity.clone()
            }
            .weak_key(),
        );
        keys.push(
            ParentIdentity {
                kind: invocation(None, "make"),
                ..identity.clone()
            }
            .weak_key(),
        );
        let action = |instance: &str, key: &[u8], name: &str| {
            ParentKind::Action(ActionParent {
                instance: instance.into(),
                key: Digest::of(key),
                name: name.to_owned(),
            })
        };
        let element = |kind| ParentIdentity {
            kind,
            ..identity.clone()
        };
        keys.push(element(action("", b"a", "a")).weak_key());
        keys.push(element(action("x", b"a", "a")).weak_key());
        keys.push(element(action("", b"b", "a")).weak_key());
        let distinct: HashSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
        let renamed = element(action("", b"a", "b")).weak_key();
        assert_eq!(renamed, element(action("", b"a", "a")).weak_key());
        let other_tool = ParentIdentity {
            kind: invocation(Some("/p"), "ninja"),
            ..identity.clone()
        };
        assert_eq!(other_tool.weak_key(), identity.weak_key());
    }
}
