//! Recording: turns what a build asked for into base actions. The `Action`s and `Command`s are
//! read back from the CAS, where the client or primed itself has put them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use prost_types::Timestamp;
use tonic::Status;

use super::mounts::Mounts;
use super::parent::{BaseAction, Parent, ParentKind, SubactionKey, Unrecordable, action_parts};
use super::schedule::Outputs;
use super::texts::{runs_actions, texts_of};
use super::workshop::Workshop;
use crate::cas::directories::{Directory, Trees, child_path};
use crate::cas::{Digest, DigestFunction};
use crate::reapi::{Action, ActionResult, Command, ExecutedActionMetadata, OutputDirectory, Tree};

/// Directories of an output that are looked into: one that stands at very many places is cut off.
const MAX_DIRECTORIES: usize = 100_000;

/// An action that a build executed, or found in the action cache.
#[derive(Clone, Debug)]
pub struct Subaction {
    /// Digest of the action.
    pub action: Digest,
    /// Its result, with exit code 0.
    pub result: Arc<ActionResult>,
    /// Its place in the order in which the build asked.
    pub order: u64,
    /// Where the client that asked ran, if it could be seen.
    pub working_directory: Option<PathBuf>,
    /// The root of that client's file system; empty if it could not be seen.
    pub file_system_root: PathBuf,
}

/// Records `subactions` in `parent`. Returns how many could not be recorded.
///
/// # Errors
/// The backend's status, when it cannot be asked; `parent` is then as it was.
pub async fn record(
    workshop: &Workshop,
    parent: &mut Parent,
    subactions: &[Subaction],
    now_unix_ms: i64,
) -> Result<usize, Status> {
    let cas = &workshop.cas;
    let instance = parent.identity.instance.clone();
    let function = parent.identity.digest_function;
    let known: HashMap<Digest, Arc<BaseAction>> = parent
        .actions
        .values()
        .map(|base| (base.digest, base.clone()))
        .collect();
    let new = subactions.iter().map(|subaction| subaction.action);
    let new = new.filter(|action| !known.contains_key(action));
    let actions = cas.fetch(&instance, new).await?;
    let commands = actions
        .values()
        .filter_map(|blob| Some(action_parts(blob, function).ok()?.command));
    let commands = cas.fetch(&instance, commands).await?;
    let mut unrecorded = 0;
    let mut bases = Vec::with_capacity(subactions.len());
    for subaction in subactions {
        let base = match known.get(&subaction.action) {
            // Seen again, unchanged; where it is worked on may be known better than before.
            Some(base) => BaseAction {
                order: subaction.order,
                ..base.as_ref().clone()
            },
            None => match base_action(subaction, &actions, &commands) {
                Some(base) => base,
                None => {
                    unrecorded += 1;
                    continue;
                }
            },
        };
        let outputs = output_files(
            workshop,
            &instance,
            function,
            &base.working_directory,
            &subaction.result,
        );
        bases.push(BaseAction {
            outputs: outputs.await?,
            duration: execution_time(&subaction.result).unwrap_or(base.duration),
            last_seen_unix_ms: now_unix_ms,
            ..base
        });
    }
    if let (Some(executed), ParentKind::Action(action)) = (&parent.executed, &parent.identity.kind)
    {
        let directories = &workshop.directories;
        let roots = bases.iter().map(|base| base.input_root);
        let mut trees = directories.load(cas, &instance, roots.clone()).await?;
        let own = directories.load(cas, &action.instance, [executed.input_root]);
        trees.extend(own.await?);
        let mut mounts = Mounts::new(executed.input_root, roots, &trees);
        // Once more for those that read only what others of them have written.
        for _ in 0..2 {
            for base in &mut bases {
                base.mount = mounts.of(base);
                if let Some(mount) = &base.mount {
                    mounts.add_outputs(mount, base);
                }
            }
        }
    }
    supersede(parent, bases);
    parent.last_seen_unix_ms = now_unix_ms;
    Ok(unrecorded)
}

fn base_action(
    subaction: &Subaction,
    actions: &HashMap<Digest, Bytes>,
    commands: &HashMap<Digest, Bytes>,
) -> Option<BaseAction> {
    let encoded = actions.get(&subaction.action)?;
    let function = subaction.action.function();
    let parts = action_parts(encoded, function)
        .inspect_err(|reason| tracing::debug!(action = %subaction.action, %reason, "not recorded"))
        .ok()?;
    let command = Command::decode(commands.get(&parts.command)?.clone()).ok()?;
    let action = Action::decode(encoded.clone()).ok()?;
    if runs_actions(&action, &command) {
        let reason = Unrecordable::RunsActions;
        tracing::debug!(action = %subaction.action, %reason, "not recorded");
        return None;
    }
    let mount = subaction
        .working_directory
        .as_deref()
        .and_then(|directory| strip_suffix(directory, &command.working_directory));
    Some(BaseAction {
        digest: subaction.action,
        encoded: encoded.clone(),
        input_root: parts.input_root,
        mount,
        file_system_root: subaction.file_system_root.clone(),
        texts: distinct_texts(&action, &command, function),
        working_directory: command.working_directory,
        outputs: Vec::new(),
        duration: Duration::ZERO,
        order: subaction.order,
        last_seen_unix_ms: 0,
    })
}

fn distinct_texts(action: &Action, command: &Command, function: DigestFunction) -> Vec<String> {
    let mut texts = texts_of(action, command, function);
    texts.sort_unstable();
    texts.dedup();
    texts
}

/// Puts recorded actions in the place of what they replace: their own earlier form, and any other
/// command that wrote the same files in the same place (the same compile with other flags, say).
fn supersede(parent: &mut Parent, recorded: Vec<BaseAction>) {
    let mut writers: HashMap<Written, SubactionKey> = parent
        .actions
        .iter()
        .filter_map(|(key, base)| Some((Written::by(base)?, key.clone())))
        .collect();
    for base in recorded {
        let Ok(parts) = base.parts() else {
            continue;
        };
        let key = SubactionKey {
            action_key: parts.action_key,
            mount: base.mount.clone(),
        };
        if let Some(written) = Written::by(&base)
            && let Some(earlier) = writers.insert(written, key.clone())
        {
            parent.actions.remove(&earlier);
        }
        parent.actions.insert(key, Arc::new(base));
    }
}

/// The files that an action writes, by place.
#[derive(PartialEq, Eq, Hash)]
struct Written {
    mount: PathBuf,
    paths: Vec<String>,
}

impl Written {
    /// `None` where the place is not known, or nothing is written.
    fn by(base: &BaseAction) -> Option<Self> {
        let mut paths: Vec<_> = base.outputs.iter().map(|(path, _)| path.clone()).collect();
        paths.sort_unstable();
        let mount = base.mount.clone()?;
        (!paths.is_empty()).then_some(Written { mount, paths })
    }
}

/// `directory` without `suffix`, if it ends so: the directory that the input root stands for.
fn strip_suffix(directory: &Path, suffix: &str) -> Option<PathBuf> {
    let mut rest = directory.to_owned();
    let wanted: Vec<_> = Path::new(suffix).components().collect();
    for component in wanted.into_iter().rev() {
        if rest.components().next_back() != Some(component) {
            return None;
        }
        rest.pop();
    }
    Some(rest)
}

/// How long a worker ran the action, if the result says so.
pub fn execution_time(result: &ActionResult) -> Option<Duration> {
    let metadata: &ExecutedActionMetadata = result.execution_metadata.as_ref()?;
    let started = metadata.execution_start_timestamp.as_ref()?;
    between(started, metadata.execution_completed_timestamp.as_ref()?)
}

/// How long it was from one time to a later one.
pub fn between(earlier: &Timestamp, later: &Timestamp) -> Option<Duration> {
    let nanos =
        |time: &Timestamp| i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
    let nanos = u64::try_from(nanos(later) - nanos(earlier));
    nanos.ok().map(Duration::from_nanos)
}

/// The files that an action under `function` wrote, those in output directories too: paths relative
/// to the input root, sorted. Directories that cannot be read are left out.
///
/// # Errors
/// The backend's status, when it cannot be asked for an output directory.
pub async fn output_files(
    workshop: &Workshop,
    instance: &str,
    function: DigestFunction,
    working_directory: &str,
    result: &ActionResult,
) -> Result<Outputs, Status> {
    let mut outputs = Outputs::new();
    for file in &result.output_files {
        let path = normalized(working_directory, &file.path);
        if let (Some(path), Ok(digest)) = (path, function.read(file.digest.as_ref())) {
            outputs.push((path, digest));
        }
    }
    for directory in &result.output_directories {
        let Some(path) = normalized(working_directory, &directory.path) else {
            continue;
        };
        let files = files_in(workshop, instance, function, directory).await?;
        outputs.extend(
            files
                .into_iter()
                .map(|(file, digest)| (child_path(&path, &file), digest)),
        );
    }
    outputs.sort_unstable();
    Ok(outputs)
}

/// The files in an output directory: paths relative to it.
///
/// # Errors
/// The backend's status, when it cannot be asked.
pub async fn files_in(
    workshop: &Workshop,
    instance: &str,
    function: DigestFunction,
    directory: &OutputDirectory,
) -> Result<Outputs, Status> {
    let mut files = Outputs::new();
    let Workshop {
        cas, directories, ..
    } = workshop;
    if let Ok(tree) = function.read(directory.tree_digest.as_ref()) {
        let blob = cas.fetch(instance, [tree]).await?.remove(&tree);
        if let Some(tree) = blob.and_then(|blob| Tree::decode(blob).ok()) {
            files_of_tree(&tree, function, &mut files);
        }
    } else if let Ok(root) = function.read(directory.root_directory_digest.as_ref()) {
        let trees = directories.load(cas, instance, [root]).await?;
        files_below(root, &trees, &mut files);
    }
    Ok(files)
}

fn files_below(root: Digest, trees: &Trees, files: &mut Outputs) {
    let mut open = vec![(root, String::new())];
    let mut visits = 0;
    while let Some((digest, path)) = open.pop() {
        visits += 1;
        let Some(directory) = trees.get(&digest).filter(|_| visits <= MAX_DIRECTORIES) else {
            continue;
        };
        let here = directory.files.iter();
        files.extend(here.map(|(name, file)| (child_path(&path, name), *file)));
        for (name, child) in &directory.directories {
            open.push((*child, child_path(&path, name)));
        }
    }
}

fn files_of_tree(tree: &Tree, function: DigestFunction, outputs: &mut Outputs) {
    let mut trees = Trees::new();
    for child in tree.root.iter().chain(&tree.children) {
        let (digest, encoded) = function.of_message(child);
        if let Some(directory) = Directory::parse(encoded, function) {
            trees.insert(digest, Arc::new(directory));
        }
    }
    if let Some(root) = &tree.root {
        files_below(function.of_message(root).0, &trees, outputs);
    }
}

/// `path` in `directory` without `.` and `..`; `None` if it leads out of the input root.
pub(super) fn normalized(directory: &str, path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in directory.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            name => parts.push(name),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reapi;

    #[test]
    fn output_paths_become_relative_to_the_input_root() {
        assert_eq!(normalized("", "a.o").as_deref(), Some("a.o"));
        assert_eq!(
            normalized("build/x", "../a.o").as_deref(),
            Some("build/a.o")
        );
        assert_eq!(
            normalized("build", "./sub//a.o").as_deref(),
            Some("build/sub/a.o")
        );
        assert_eq!(normalized("build", "../../a.o"), None);
        assert_eq!(normalized("", "."), None);
    }

    #[test]
    fn the_input_root_stands_for_the_directory_above_the_working_directory() {
        let strip = |directory: &str, suffix| strip_suffix(Path::new(directory), suffix);
        assert_eq!(strip("/home/me/p/src", "src"), Some("/home/me/p".into()));
        assert_eq!(strip("/home/me/p", ""), Some("/home/me/p".into()));
        assert_eq!(strip("/home/me/p", "other"), None);
        assert_eq!(strip("/p", "a/b/p"), None);
    }

    #[test]
    fn files_in_output_directories_are_outputs() {
        let leaf = reapi::Directory {
            files: vec![reapi::FileNode {
                name: "x.h".to_owned(),
                digest: Some(Digest::of(b"x").to_proto()),
                ..Default::default()
            }],
            ..reapi::Directory::default()
        };
        let root = reapi::Directory {
            directories: vec![reapi::DirectoryNode {
                name: "sub".to_owned(),
                digest: Some(Digest::of_message(&leaf).0.to_proto()),
            }],
            ..reapi::Directory::default()
        };
        let tree = Tree {
            root: Some(root),
            children: vec![leaf],
        };
        let mut outputs = Outputs::new();
        files_of_tree(&tree, DigestFunction::Sha256, &mut outputs);
        assert_eq!(outputs, [("sub/x.h".to_owned(), Digest::of(b"x"))]);
    }
}
