//! Records as the messages that stand for them on disk, and in what is exported and shared.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::super::parent::{
    ActionParent, BaseAction, ExecutedParent, Origin, OverlayTable, Parent, ParentIdentity,
    ParentKind, SubactionKey, action_parts,
};
use crate::cas::{Digest, DigestFunction};
use crate::reapi::buildstream::v2::speculative_actions::{Overlay, overlay::OverlayType};
use crate::reapi::primed::store::v1 as proto;
use crate::workspace::index::FileSignature;

pub(super) fn path_bytes(path: &Path) -> Bytes {
    Bytes::copy_from_slice(path.as_os_str().as_bytes())
}

pub(super) fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes.to_vec()))
}

fn stored_digest(digest: Digest) -> Option<proto::Digest> {
    Some(proto::Digest {
        hash: Bytes::copy_from_slice(digest.hash()),
        size: digest.size(),
        function: digest.function().to_proto(),
    })
}

fn digest_of(stored: Option<&proto::Digest>) -> Option<Digest> {
    let stored = stored?;
    function(stored.function)?.digest(&stored.hash, stored.size)
}

/// Records from when there was only one function do not name it.
fn function(stored: i32) -> Option<DigestFunction> {
    match stored {
        0 => Some(DigestFunction::Sha256),
        named => DigestFunction::from_proto(named),
    }
}

/// A parent without its actions.
pub fn stored_parent(parent: &Parent) -> proto::Parent {
    let identity = &parent.identity;
    let mut stored = proto::Parent {
        instance_name: identity.instance.to_string(),
        digest_function: identity.digest_function.to_proto(),
        uid: identity.uid,
        last_seen_unix_ms: parent.last_seen_unix_ms,
        overlays: parent
            .overlays
            .iter()
            .map(|(target, origin)| stored_overlay(*target, origin))
            .collect(),
        text_roots: parent
            .text_roots
            .iter()
            .filter_map(|root| stored_digest(*root))
            .collect(),
        ..proto::Parent::default()
    };
    match &identity.kind {
        ParentKind::Invocation { project_root, tool } => {
            stored.tool.clone_from(tool);
            stored.project_root = project_root.as_deref().map(path_bytes);
        }
        ParentKind::Action(action) => {
            stored.action = Some(proto::ActionParent {
                instance_name: action.instance.to_string(),
                key: stored_digest(action.key),
                name: action.name.clone(),
                executed: parent.executed.as_deref().map(stored_execution),
            });
        }
    }
    stored
}

/// `None` if it is malformed.
pub fn identity(stored: &proto::Parent) -> Option<ParentIdentity> {
    let kind = match &stored.action {
        None => ParentKind::Invocation {
            project_root: stored.project_root.as_deref().map(path_of),
            tool: stored.tool.clone(),
        },
        Some(action) => ParentKind::Action(ActionParent {
            instance: action.instance_name.as_str().into(),
            key: digest_of(action.key.as_ref())?,
            name: action.name.clone(),
        }),
    };
    Some(ParentIdentity {
        instance: stored.instance_name.as_str().into(),
        digest_function: function(stored.digest_function)?,
        uid: stored.uid,
        kind,
    })
}

/// Without its actions. `None` if it is malformed.
pub fn parent_of(stored: &proto::Parent) -> Option<Parent> {
    let action = stored.action.as_ref();
    let executed = action.and_then(|action| execution(action.executed.as_ref()?));
    let identity = identity(stored)?;
    let function = identity.digest_function;
    let text_roots = stored.text_roots.iter();
    Some(Parent {
        overlays: overlays(&stored.overlays, function),
        text_roots: text_roots
            .map(|root| digest_of(Some(root)))
            .collect::<Option<_>>()?,
        executed: executed.map(Arc::new),
        last_seen_unix_ms: stored.last_seen_unix_ms,
        ..Parent::new(identity)
    })
}

fn stored_execution(executed: &ExecutedParent) -> proto::ExecutedParent {
    proto::ExecutedParent {
        action: stored_digest(executed.action),
        input_root: stored_digest(executed.input_root),
        texts: executed.texts.clone(),
        outputs: stored_outputs(&executed.outputs),
    }
}

fn execution(stored: &proto::ExecutedParent) -> Option<ExecutedParent> {
    Some(ExecutedParent {
        action: digest_of(stored.action.as_ref())?,
        input_root: digest_of(stored.input_root.as_ref())?,
        texts: stored.texts.clone(),
        outputs: outputs(&stored.outputs)?,
    })
}

fn stored_outputs(outputs: &[(String, Digest)]) -> Vec<proto::Output> {
    let stored = outputs.iter().map(|(path, digest)| proto::Output {
        path: path.clone(),
        digest: stored_digest(*digest),
    });
    stored.collect()
}

fn outputs(stored: &[proto::Output]) -> Option<Vec<(String, Digest)>> {
    let outputs = stored.iter();
    outputs
        .map(|output| Some((output.path.clone(), digest_of(output.digest.as_ref())?)))
        .collect()
}

fn stored_overlay(target: Digest, origin: &Origin) -> Overlay {
    let mut overlay = Overlay {
        target_digest: Some(target.to_proto()),
        source_element: origin
            .parent()
            .map(|key| key.to_string())
            .unwrap_or_default(),
        ..Overlay::default()
    };
    match origin {
        Origin::Disk(path) => {
            overlay.set_type(OverlayType::Source);
            overlay.source_path = path.to_string_lossy().into_owned();
        }
        Origin::Tree { path, .. } => {
            overlay.set_type(OverlayType::Source);
            overlay.source_path.clone_from(path);
        }
        Origin::Action { action, path, .. } => {
            overlay.set_type(OverlayType::Action);
            overlay.source_action_digest = Some(action.to_proto());
            overlay.source_path.clone_from(path);
        }
        Origin::Artifact { path, .. } => {
            overlay.set_type(OverlayType::Artifact);
            overlay.source_path.clone_from(path);
        }
    }
    overlay
}

pub(super) fn overlays(stored: &[Overlay], function: DigestFunction) -> OverlayTable {
    let mut table = OverlayTable::default();
    for overlay in stored {
        if let Some((target, origin)) = overlay_origin(overlay, function) {
            table.add(target, origin);
        }
    }
    table
}

/// `None` if it is malformed.
fn overlay_origin(overlay: &Overlay, function: DigestFunction) -> Option<(Digest, Origin)> {
    let target = function.read(overlay.target_digest.as_ref()).ok()?;
    let parent = match overlay.source_element.as_str() {
        "" => None,
        named => Some(named.parse().ok()?),
    };
    let path = overlay.source_path.clone();
    let origin = match overlay.r#type() {
        OverlayType::Source if path.starts_with('/') => Origin::Disk(path.into()),
        OverlayType::Source => Origin::Tree { parent, path },
        OverlayType::Action => Origin::Action {
            parent,
            action: function.read(overlay.source_action_digest.as_ref()).ok()?,
            path,
        },
        OverlayType::Artifact => Origin::Artifact {
            parent: parent?,
            path,
        },
    };
    Some((target, origin))
}

/// A base action; its key is not in it.
pub fn stored_action(base: &BaseAction) -> proto::BaseAction {
    let root = base.file_system_root.as_path();
    proto::BaseAction {
        action: base.encoded.clone(),
        mount: base.mount.as_deref().map(path_bytes),
        file_system_root: (root != Path::new("/")).then(|| path_bytes(root)),
        working_directory: base.working_directory.clone(),
        texts: base.texts.clone(),
        outputs: stored_outputs(&base.outputs),
        duration_us: u64::try_from(base.duration.as_micros()).unwrap_or(u64::MAX),
        order: base.order,
        last_seen_unix_ms: base.last_seen_unix_ms,
    }
}

/// The same with its key. `None` if it is malformed.
pub fn base_action(
    stored: proto::BaseAction,
    function: DigestFunction,
) -> Option<(SubactionKey, BaseAction)> {
    let parts = action_parts(&stored.action, function).ok()?;
    let outputs = outputs(&stored.outputs)?;
    let mount = stored.mount.as_deref().map(path_of);
    let root = stored.file_system_root.as_deref();
    let base = BaseAction {
        digest: function.of(&stored.action),
        input_root: parts.input_root,
        mount: mount.clone(),
        file_system_root: root.map_or_else(|| PathBuf::from("/"), path_of),
        working_directory: stored.working_directory,
        texts: stored.texts,
        outputs,
        duration: Duration::from_micros(stored.duration_us),
        order: stored.order,
        last_seen_unix_ms: stored.last_seen_unix_ms,
        encoded: stored.action,
    };
    let action_key = parts.action_key;
    Some((SubactionKey { action_key, mount }, base))
}

pub(super) fn stored_file((signature, digest): &(FileSignature, Digest)) -> proto::FileState {
    proto::FileState {
        size: signature.size,
        modified_ns: signature.modified_ns,
        changed_ns: signature.changed_ns,
        inode: signature.inode,
        device: signature.device,
        digest: stored_digest(*digest),
    }
}

pub(super) fn known_file(stored: proto::FileState) -> Option<(FileSignature, Digest)> {
    let signature = FileSignature {
        size: stored.size,
        modified_ns: stored.modified_ns,
        changed_ns: stored.changed_ns,
        inode: stored.inode,
        device: stored.device,
    };
    Some((signature, digest_of(stored.digest.as_ref())?))
}
