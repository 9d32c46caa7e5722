//! Sharing: what is recorded of a parent goes to the CAS of the backend, and an action-cache entry
//! that is found by the parent's weak key points to it. A primed that has no records of a parent
//! looks there.
//!
//! The entry stands under an action that nobody runs: its `Command` has the arguments
//! `primed-records` and the weak key, its input root is empty, it has no platform, and `SALT` for
//! its salt. Its result has one output file, which is the encoded `SpeculativeActions`.
//!
//! Whoever may write to an action cache can hand wrong results to those who read it, and is
//! trusted with this too; what comes from there is checked all the same, like any foreign input.

use std::collections::{HashMap, HashSet};
use std::path::{Component, Path};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tonic::Status;

use super::archive::Import;
use super::interchange::{self, Interchange, Malformed, Names};
use super::parent::{Origin, OverlayTable, Parent, ParentIdentity, WeakKey};
use super::recorder;
use super::workshop::Workshop;
use crate::cas::{Digest, DigestFunction};
use crate::clock;
use crate::reapi::{Action, ActionResult, Command, Directory, ExecutedActionMetadata, OutputFile};

/// What the entry's command begins with.
const COMMAND: &str = "primed-records";
/// The path of the entry's output file.
const OUTPUT: &str = "records.sa";
/// Changes with the form of what is shared.
const SALT: &[u8] = b"primed.store.v1";
/// The largest message that is shared or fetched, in bytes.
const MAX_SHARED: u64 = 64 * 1024 * 1024;
/// How long a build's first question may wait for shared records.
const MAX_LOOKUP: Duration = Duration::from_secs(10);
/// How long recording may be held up by sharing.
const MAX_UPLOAD: Duration = Duration::from_secs(60);

/// What sharing needs to remember.
pub struct Sharing {
    /// Has fetched records saved. Weak: the recorder itself shares.
    recorder: mpsc::WeakSender<recorder::Message>,
    /// For each instance, whether its action cache may be updated.
    may_write: Mutex<HashMap<Arc<str>, bool>>,
    /// Instances whose refusal was reported.
    reported: Mutex<HashSet<Arc<str>>>,
}

/// Why records were not shared.
#[derive(Debug, thiserror::Error)]
enum ShareError {
    #[error("they take {0} bytes, which is too many")]
    TooLarge(usize),
    #[error("it took too long")]
    TooSlow,
    #[error("the backend answers: {0}")]
    Backend(#[from] Status),
}

/// Why shared records were not used.
#[derive(Debug, thiserror::Error)]
enum UnusableError {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("primed did not write them")]
    Foreign,
    #[error("they are those of another parent")]
    OfAnother,
    #[error("they take {0} bytes, which is too many")]
    TooLarge(u64),
    #[error("their digest is none")]
    NoDigest,
}

impl Sharing {
    /// Fetched records are saved by `recorder`.
    pub fn new(recorder: &mpsc::Sender<recorder::Message>) -> Self {
        Sharing {
            recorder: recorder.downgrade(),
            may_write: Mutex::default(),
            reported: Mutex::default(),
        }
    }

    /// Whether `instance` takes updates, by what it says of itself.
    async fn may_write(&self, workshop: &Workshop, instance: &Arc<str>) -> Result<bool, Status> {
        if let Some(known) = self.may_write.lock().get(instance) {
            return Ok(*known);
        }
        let capabilities = workshop.backend.capabilities(instance).await?;
        let cache = capabilities.cache_capabilities.unwrap_or_default();
        let updates = cache.action_cache_update_capabilities.unwrap_or_default();
        let may_write = updates.update_enabled;
        self.may_write.lock().insert(instance.clone(), may_write);
        if !may_write {
            tracing::warn!(
                %instance,
                "records are not shared: the backend allows no action-cache updates; let primed \
                 reach it with credentials that may write, or leave sharing to a primed that has \
                 them. What others share is used"
            );
        }
        Ok(may_write)
    }
}

/// The action that the records of a parent are found by, and what describes it in the CAS.
struct Entry {
    action: Digest,
    blobs: HashMap<Digest, Bytes>,
}

impl Entry {
    fn of(key: WeakKey, function: DigestFunction) -> Self {
        let command = function.of_message(&Command {
            arguments: vec![COMMAND.to_owned(), key.to_string()],
            output_paths: vec![OUTPUT.to_owned()],
            ..Command::default()
        });
        let input_root = function.of_message(&Directory::default());
        let action = function.of_message(&Action {
            command_digest: Some(command.0.to_proto()),
            input_root_digest: Some(input_root.0.to_proto()),
            salt: Bytes::from_static(SALT),
            ..Action::default()
        });
        Entry {
            action: action.0,
            blobs: HashMap::from([command, input_root, action]),
        }
    }
}

/// Shares what was recorded of `parent`, if that is wanted. Returns when it is done or given up.
pub async fn publish(workshop: &Workshop, parent: &Parent) {
    let Some(sharing) = &workshop.sharing else {
        return;
    };
    let instance = &parent.identity.instance;
    let shared = async {
        if sharing.may_write(workshop, instance).await? {
            share(workshop, parent).await?;
        }
        Ok(())
    };
    let shared = tokio::time::timeout(MAX_UPLOAD, shared).await;
    if let Err(error) = shared.unwrap_or(Err(ShareError::TooSlow)) {
        let parent = parent.identity.label();
        match sharing.reported.lock().insert(instance.clone()) {
            true => tracing::warn!(parent, %error, "records are not shared"),
            false => tracing::debug!(parent, %error, "records are not shared"),
        }
    }
}

async fn share(workshop: &Workshop, parent: &Parent) -> Result<(), ShareError> {
    let identity = &parent.identity;
    let message = interchange::message(&timeless(parent), &Names::default(), None);
    let function = identity.digest_function;
    let (records, encoded) = function.of_message(&message);
    if records.size() > MAX_SHARED {
        return Err(ShareError::TooLarge(encoded.len()));
    }
    let Entry { action, mut blobs } = Entry::of(identity.weak_key(), function);
    blobs.insert(records, encoded);
    workshop.cas.upload(&identity.instance, &blobs).await?;
    let result = ActionResult {
        output_files: vec![OutputFile {
            path: OUTPUT.to_owned(),
            digest: Some(records.to_proto()),
            ..OutputFile::default()
        }],
        execution_metadata: Some(ExecutedActionMetadata {
            worker: env!("CARGO_PKG_NAME").to_owned(),
            ..ExecutedActionMetadata::default()
        }),
        ..ActionResult::default()
    };
    let backend = &workshop.backend;
    backend
        .update_action_result(&identity.instance, action, result)
        .await?;
    tracing::debug!(parent = identity.label(), %records, "shared");
    Ok(())
}

/// `parent` without the times at which this machine saw it: a build that changed nothing shares
/// the same bytes again, which the CAS has.
fn timeless(parent: &Parent) -> Parent {
    let mut parent = parent.clone();
    parent.last_seen_unix_ms = 0;
    for base in parent.actions.values_mut() {
        Arc::make_mut(base).last_seen_unix_ms = 0;
    }
    parent
}

/// The shared records of a parent, if that is wanted, nothing is recorded here, and there are any.
/// They are saved too, in the background.
pub async fn obtain(workshop: &Workshop, identity: &ParentIdentity) -> Option<Arc<Parent>> {
    let sharing = workshop.sharing.as_ref()?;
    let label = identity.label();
    let fetched = tokio::time::timeout(MAX_LOOKUP, fetch(workshop, identity)).await;
    let message = match fetched {
        Ok(Ok(message)) => message?,
        Ok(Err(status)) => {
            tracing::debug!(parent = label, %status, "shared records cannot be asked for");
            return None;
        }
        Err(_) => {
            tracing::warn!(parent = label, "shared records took too long to fetch");
            return None;
        }
    };
    match message.and_then(|message| usable(identity, message)) {
        Ok(parent) => {
            let parent = Arc::new(parent);
            let actions = parent.actions.len();
            tracing::info!(parent = label, actions, "uses shared records");
            if let Some(recorder) = sharing.recorder.upgrade() {
                let shared = Box::new(Import::Shared(parent.clone()));
                // Dropped if there is too much to save; then they are only used.
                let _ = recorder.try_send(recorder::Message::Import(shared));
            }
            Some(parent)
        }
        Err(error) => {
            tracing::warn!(parent = label, %error, "shared records are not used");
            None
        }
    }
}

/// What the entry of a parent points to.
async fn fetch(
    workshop: &Workshop,
    identity: &ParentIdentity,
) -> Result<Option<Result<Bytes, UnusableError>>, Status> {
    let instance = &identity.instance;
    let function = identity.digest_function;
    let entry = Entry::of(identity.weak_key(), function);
    let result = workshop.backend.action_result(instance, entry.action);
    let Some(result) = result.await? else {
        return Ok(None);
    };
    let mut outputs = result.output_files.iter();
    let Some(output) = outputs.find(|output| output.path == OUTPUT) else {
        return Ok(None);
    };
    let Ok(digest) = function.read(output.digest.as_ref()) else {
        return Ok(Some(Err(UnusableError::NoDigest)));
    };
    if digest.size() > MAX_SHARED {
        return Ok(Some(Err(UnusableError::TooLarge(digest.size()))));
    }
    // One that is gone was shared too long ago.
    let mut blobs = workshop.cas.fetch(instance, [digest]).await?;
    Ok(blobs.remove(&digest).map(Ok))
}

/// What can be used of a message that should hold the records of this parent.
fn usable(identity: &ParentIdentity, message: Bytes) -> Result<Parent, UnusableError> {
    let mut parent = match interchange::read(message)? {
        Interchange::Records(parent) => *parent,
        Interchange::Foreign(_) => return Err(UnusableError::Foreign),
    };
    if parent.identity.weak_key() != identity.weak_key() {
        return Err(UnusableError::OfAnother);
    }
    parent.identity = identity.clone();
    let now = clock::now_unix_ms();
    parent.last_seen_unix_ms = now;
    parent.actions.retain(|key, _| {
        let mount = key.mount.as_deref();
        mount.is_none_or(|mount| may_be_root(mount, identity))
    });
    for base in parent.actions.values_mut() {
        Arc::make_mut(base).last_seen_unix_ms = now;
    }
    // Whoever shares does not choose which of this machine's files are read.
    let mut overlays = OverlayTable::default();
    for (target, origin) in parent.overlays.iter() {
        match origin {
            Origin::Disk(path) if !is_in_project(path, identity) => {}
            _ => overlays.add(*target, origin.clone()),
        }
    }
    parent.overlays = overlays;
    Ok(parent)
}

/// Whether a file on disk belongs to the project of this parent.
fn is_in_project(path: &Path, identity: &ParentIdentity) -> bool {
    let root = identity.project_root();
    root.is_some_and(|root| path.starts_with(root)) && is_plain(path)
}

/// Whether an input tree may stand for this directory: one around the project, or in it.
fn may_be_root(mount: &Path, identity: &ParentIdentity) -> bool {
    let root = identity.project_root();
    root.is_some_and(|root| mount.starts_with(root) || root.starts_with(mount)) && is_plain(mount)
}

fn is_plain(path: &Path) -> bool {
    path.components().all(|part| part != Component::ParentDir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::speculation::parent::{BaseAction, SubactionKey, fixture};
    use prost::Message as _;

    const SHA256: DigestFunction = DigestFunction::Sha256;

    #[test]
    fn the_entry_depends_on_the_weak_key_and_the_digest_function_alone() {
        let entry = Entry::of(WeakKey([1; 32]), SHA256);
        assert_eq!(entry.action, Entry::of(WeakKey([1; 32]), SHA256).action);
        assert_ne!(entry.action, Entry::of(WeakKey([2; 32]), SHA256).action);
        let sha1 = Entry::of(WeakKey([1; 32]), DigestFunction::Sha1);
        let is_sha1 = |digest: &Digest| digest.function() == DigestFunction::Sha1;
        assert!(is_sha1(&sha1.action) && sha1.blobs.keys().all(is_sha1));
        let action = Action::decode(entry.blobs[&entry.action].clone()).unwrap();
        let command = SHA256.read(action.command_digest.as_ref()).unwrap();
        let command = Command::decode(entry.blobs[&command].clone()).unwrap();
        assert_eq!(command.arguments, ["primed-records", &"01".repeat(32)]);
        assert!(action.platform.is_none() && !action.do_not_cache);
        // Every primed must find what any other has shared.
        assert_eq!(
            entry.action.to_string(),
            "3b6bb683813a00bee1df8a210a5f7502a2417dc80c6cea619f9bad83a2920f01/155"
        );
    }

    fn in_project(mount: &str) -> BaseAction {
        let (digest, encoded) = Digest::of_message(&Action {
            command_digest: Some(Digest::of(mount.as_bytes()).to_proto()),
            input_root_digest: Some(Digest::of(b"root").to_proto()),
            ..Action::default()
        });
        BaseAction {
            digest,
            encoded,
            mount: Some(mount.into()),
            last_seen_unix_ms: 5,
            ..fixture::base("", Digest::of(b"root"))
        }
    }

    /// Records of make in `/p`, with these mounts and sources.
    fn parent(mounts: &[&str], sources: &[&str]) -> Parent {
        let mut overlays = OverlayTable::default();
        for path in sources {
            overlays.add(Digest::of(b"file"), Origin::Disk(path.into()));
        }
        let mut parent = fixture::invocation(overlays);
        for mount in mounts {
            let base = in_project(mount);
            let key = SubactionKey {
                action_key: base.parts().unwrap().action_key,
                mount: base.mount.clone(),
            };
            parent.actions.insert(key, Arc::new(base));
        }
        parent
    }

    fn encoded(parent: &Parent) -> Bytes {
        let message = interchange::message(parent, &Names::default(), None);
        message.encode_to_vec().into()
    }

    #[test]
    fn shared_records_name_no_file_outside_of_the_project() {
        let mounts = ["/p", "/p/build", "/", "/etc", "/p/../etc"];
        let sources = ["/p/a.c", "/etc/passwd", "/p/../etc/passwd", "/pp/a.c"];
        let shared = parent(&mounts, &sources);
        let usable = usable(&shared.identity, encoded(&shared)).unwrap();
        let mut kept: Vec<_> = usable
            .actions
            .keys()
            .filter_map(|key| key.mount.clone())
            .collect();
        kept.sort_unstable();
        assert_eq!(
            kept,
            [Path::new("/"), Path::new("/p"), Path::new("/p/build")]
        );
        let sources: Vec<_> = usable.overlays.sources().into_iter().collect();
        assert_eq!(sources, [Path::new("/p/a.c")]);
    }

    #[test]
    fn records_of_another_parent_and_garbage_are_refused() {
        let shared = parent(&["/p"], &[]);
        let of_another = ParentIdentity {
            uid: Some(1),
            ..shared.identity.clone()
        };
        let refused = |identity, message| usable(identity, message).unwrap_err();
        let error = refused(&of_another, encoded(&shared));
        assert!(matches!(error, UnusableError::OfAnother), "{error}");
        let error = refused(&shared.identity, Bytes::from_static(b"\xff"));
        assert!(matches!(error, UnusableError::Malformed(_)), "{error}");
    }

    #[test]
    fn what_changed_in_nothing_but_the_time_is_shared_as_the_same_bytes() {
        let one = parent(&["/p"], &["/p/a.c"]);
        let mut later = one.clone();
        later.last_seen_unix_ms = 99;
        assert_eq!(encoded(&timeless(&one)), encoded(&timeless(&later)));
        assert_ne!(encoded(&one), encoded(&later));
    }
}
