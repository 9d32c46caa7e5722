//! Recording: turns what a build asked for into base actions. The `Action`s and `Command`s are
//! read back from the CAS, where the client or primed itself has put them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use tonic::Status;

use super::mounts::Mounts;
use crate::cas::outputs::output_files;
use crate::cas::{Digest, DigestFunction};
use crate::reapi::{Action, Command};
use crate::speculation::clients::subaction::Subaction;
use crate::speculation::flights::durations::execution_time;
use crate::speculation::records::parent::{
    BaseAction, Parent, ParentKind, SubactionKey, Unrecordable, action_parts,
};
use crate::speculation::records::texts::{runs_actions, texts_of};
use crate::speculation::workshop::Workshop;

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
            cas,
            &workshop.directories,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_input_root_stands_for_the_directory_above_the_working_directory() {
        let strip = |directory: &str, suffix| strip_suffix(Path::new(directory), suffix);
        assert_eq!(strip("/home/me/p/src", "src"), Some("/home/me/p".into()));
        assert_eq!(strip("/home/me/p", ""), Some("/home/me/p".into()));
        assert_eq!(strip("/home/me/p", "other"), None);
        assert_eq!(strip("/p", "a/b/p"), None);
    }
}
