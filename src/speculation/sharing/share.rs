//! Sharing: what is recorded of a parent goes to the CAS of the backend, and an action-cache entry
//! that is found by the parent's weak key points to it (`shelf`). A primed that has no records of a
//! parent looks there. Action parents are found by way of their `relatives`.
//!
//! Whoever may write to an action cache can hand wrong results to those who read it, and is
//! trusted with this too; what comes from there is checked all the same, like any foreign input.

use std::collections::{HashMap, HashSet};
use std::path::{Component, Path};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message as _;
use tonic::Status;

use super::relatives;
use super::shelf::{Place, ShareError, Shelf, UnusableError};
use crate::clock;
use crate::speculation::records::interchange::{self, Interchange, Names};
use crate::speculation::records::parent::{
    Origin, OverlayTable, Parent, ParentIdentity, ParentKind,
};
use crate::speculation::records::store::Store;

/// How long a build's first question may wait for shared records.
const MAX_LOOKUP: Duration = Duration::from_secs(10);
/// How long recording may be held up by sharing.
const MAX_UPLOAD: Duration = Duration::from_secs(60);

/// The way to shared records.
pub struct Sharing {
    /// Where they stand.
    pub(super) place: Place,
    /// What is recorded here.
    pub(super) store: Arc<Store>,
    /// Has fetched records saved.
    save: Box<dyn Fn(Arc<Parent>) + Send + Sync>,
    /// For each instance, whether its action cache may be updated.
    may_write: Mutex<HashMap<Arc<str>, bool>>,
    /// Instances whose refusal was reported.
    reported: Mutex<HashSet<Arc<str>>>,
}

/// Shared records.
pub struct Obtained {
    /// What can be used of them.
    pub parent: Arc<Parent>,
    /// How long the message was, in bytes.
    pub size: u64,
}

impl Sharing {
    /// Records in `place`, beside those in `store`. What is fetched `save` has saved, in the
    /// background.
    pub fn new(
        place: Place,
        store: Arc<Store>,
        save: impl Fn(Arc<Parent>) + Send + Sync + 'static,
    ) -> Self {
        Sharing {
            place,
            store,
            save: Box::new(save),
            may_write: Mutex::default(),
            reported: Mutex::default(),
        }
    }

    /// Whether `instance` takes updates, by what it says of itself.
    pub(super) async fn may_write(&self, instance: &Arc<str>) -> Result<bool, Status> {
        if let Some(known) = self.may_write.lock().get(instance) {
            return Ok(*known);
        }
        let capabilities = self.place.backend.capabilities(instance).await?;
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

    /// Shares what was recorded of `parent`, and that it depends on `dependencies`. Returns when it
    /// is done or given up.
    pub async fn publish(&self, parent: &Parent, dependencies: &[ParentIdentity]) {
        let instance = &parent.identity.instance;
        let shared = async {
            if self.may_write(instance).await? {
                let message = interchange::message(&timeless(parent), &Names::default(), None);
                let encoded = message.encode_to_vec().into();
                let put = Shelf::Records.put(&self.place, &parent.identity, encoded);
                let records = put.await?;
                relatives::introduce(self, &parent.identity, dependencies).await?;
                tracing::debug!(parent = parent.identity.label(), %records, "shared");
            }
            Ok(())
        };
        let shared = tokio::time::timeout(MAX_UPLOAD, shared).await;
        if let Err(error) = shared.unwrap_or(Err(ShareError::TooSlow)) {
            let parent = parent.identity.label();
            match self.reported.lock().insert(instance.clone()) {
                true => tracing::warn!(parent, %error, "records are not shared"),
                false => tracing::debug!(parent, %error, "records are not shared"),
            }
        }
    }

    /// The shared records of a parent of which nothing is recorded here, if there are any, and they
    /// take no more than `most` bytes. They are saved too.
    pub async fn obtain(&self, identity: &ParentIdentity, most: u64) -> Option<Obtained> {
        let label = identity.label();
        let fetched = async {
            let get = Shelf::Records.get(&self.place, identity, most);
            let Some(message) = get.await? else {
                return Ok(None);
            };
            let size = message.len() as u64;
            let parent = Arc::new(usable(identity, message)?);
            Ok(Some(Obtained { parent, size }))
        };
        let obtained = in_time(&label, fetched).await??;
        let actions = obtained.parent.actions.len();
        tracing::info!(parent = label, actions, "uses shared records");
        (self.save)(obtained.parent.clone());
        Some(obtained)
    }
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

/// What was fetched of the parent `label`, if it came in time and can be used. Says so if not.
pub(super) async fn in_time<T>(
    label: &str,
    fetched: impl Future<Output = Result<T, UnusableError>>,
) -> Option<T> {
    match tokio::time::timeout(MAX_LOOKUP, fetched).await {
        Ok(Ok(fetched)) => Some(fetched),
        Ok(Err(UnusableError::Backend(status))) => {
            tracing::debug!(parent = label, %status, "shared records cannot be asked for");
            None
        }
        Ok(Err(error)) => {
            tracing::warn!(parent = label, %error, "shared records are not used");
            None
        }
        Err(_) => {
            tracing::warn!(parent = label, "shared records took too long to fetch");
            None
        }
    }
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

/// Whether an input tree may stand for this directory: one around the project, or in it; for an
/// action's, one in its own tree.
fn may_be_root(mount: &Path, identity: &ParentIdentity) -> bool {
    let is_near = match &identity.kind {
        ParentKind::Action(_) => mount.is_relative(),
        ParentKind::Invocation { .. } => {
            let root = identity.project_root();
            root.is_some_and(|root| mount.starts_with(root) || root.starts_with(mount))
        }
    };
    is_near && is_plain(mount)
}

fn is_plain(path: &Path) -> bool {
    path.components().all(|part| part != Component::ParentDir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cas::Digest;
    use crate::reapi::Action;
    use crate::speculation::records::parent::{
        ActionParent, BaseAction, SubactionKey, WeakKey, fixture,
    };

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
    fn shared_records_of_an_action_name_no_file_outside_of_its_tree() {
        let sources = ["/p/a.c", "/etc/passwd"];
        let mut shared = parent(&["", "src", "/etc", "../etc"], &sources);
        shared.overlays.add(
            Digest::of(b"file"),
            Origin::Tree {
                parent: Some(WeakKey([1; 32])),
                path: "src/a.c".to_owned(),
            },
        );
        shared.identity.kind = ParentKind::Action(ActionParent {
            instance: "".into(),
            key: Digest::of(b"element"),
            name: "p".to_owned(),
        });
        let usable = usable(&shared.identity, encoded(&shared)).unwrap();
        let mounts = usable.actions.keys().filter_map(|key| key.mount.clone());
        let mut mounts: Vec<_> = mounts.collect();
        mounts.sort_unstable();
        assert_eq!(mounts, [Path::new(""), Path::new("src")]);
        assert!(usable.overlays.sources().is_empty());
        assert_eq!(usable.dependencies(), [WeakKey([1; 32])].into());
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
