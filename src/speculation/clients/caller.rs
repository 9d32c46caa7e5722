//! Who calls: which build a client's calls belong to, where that build works, and whose process it is.
//! For local clients the process tree decides.

use std::path::PathBuf;
use std::sync::Arc;

use crate::cas::DigestFunction;
use crate::reapi::RequestMetadata;
use crate::speculation::flights::FlightKey;
use crate::speculation::records::parent::{ActionParent, ParentIdentity, ParentKind};
use crate::workspace::peer::{Peer, PeerOrigin};
use crate::workspace::process::{Lineage, Process, Seen};

/// What makes calls belong together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum BuildKey {
    /// They come from below the same process.
    Process(Process),
    /// They carry the same invocation id.
    Invocation(String),
    /// They come by the same connection, and nothing else is known of them.
    Connection(u64),
    /// They are made on behalf of this action.
    Action(FlightKey),
    /// They belong to the run with this id.
    Run(Arc<str>),
}

/// What is known of a client.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The build it belongs to.
    pub key: BuildKey,
    /// Whether the build has ended when nothing was heard of it for a while: its process, if there
    /// is one, is no build tool and may live on.
    pub ends_by_silence: bool,
    /// Name of the build tool.
    pub tool: String,
    /// Whose process it is, on this machine.
    pub uid: Option<u32>,
    /// Where the build tool runs.
    pub project_root: Option<PathBuf>,
    /// Where the client itself runs.
    pub working_directory: Option<PathBuf>,
    /// The root of the client's file system; empty if nothing can be seen of the client.
    pub file_system_root: PathBuf,
    /// The action on whose behalf it calls, if it does.
    pub action: Option<ActionParent>,
}

impl Caller {
    /// Finds out who calls. Reads `/proc`, some microseconds for each ancestor, unless the peer's
    /// lineage is known.
    ///
    /// For local peers the process tree decides. recc says `host:ppid` of itself; where that is
    /// not the parent of whoever connected, the connection is a proxy's (buildbox-casd's, say),
    /// and the process that recc named is asked instead.
    pub fn identify(peer: &Peer, metadata: RequestMetadata, host: &str) -> Self {
        let named = if peer.is_on_this_machine() {
            named_process(&metadata, host)
        } else {
            None
        };
        let uid = match peer.origin() {
            PeerOrigin::Local { uid, .. } => Some(uid),
            PeerOrigin::Tcp(_) => None,
        };
        let connected = peer.lineage();
        let by_proxy = match (connected, &named) {
            (Some(connected), Some(named)) => !connected.client.process.is_child_of(named),
            (None, _) => true,
            (Some(_), None) => false,
        };
        // Of the client itself, or where that cannot be seen, of the process that it works for.
        let lineage = match &named {
            Some(named) if by_proxy => Some(Lineage::of(named.clone())),
            _ => connected.cloned(),
        };
        let build_tool = lineage.as_ref().and_then(|it| it.build_tool.clone());
        let ends_by_silence = build_tool.is_none();
        let tool = build_tool.or_else(|| named.map(Seen::from));
        let client = lineage.as_ref().map(|lineage| &lineage.client);
        let worker = tool.as_ref().or(client);
        let key = match (&tool, invocation(&metadata)) {
            (None, Some(id)) => BuildKey::Invocation(id),
            _ => match worker {
                Some(worker) => BuildKey::Process(worker.process.clone()),
                None => BuildKey::Connection(peer.id()),
            },
        };
        let tool_name = metadata.tool_details.map(|details| details.tool_name);
        Caller {
            key,
            ends_by_silence,
            tool: worker
                .map(|worker| worker.process.name.clone())
                .or(tool_name)
                .filter(|name| !name.is_empty())
                .unwrap_or_else(|| "unknown".to_owned()),
            uid: uid.or_else(|| worker.and_then(|worker| worker.process.uid())),
            project_root: worker.and_then(|worker| worker.working_directory.clone()),
            working_directory: client.and_then(|client| client.working_directory.clone()),
            file_system_root: lineage.map_or_else(PathBuf::new, |it| it.file_system_root),
            action: None,
        }
    }

    /// Whoever calls on behalf of an action that this client executes as `key`. Of that one it is
    /// not known where it works.
    pub fn nested_in(&self, key: FlightKey, action: ActionParent) -> Self {
        Caller {
            key: BuildKey::Action(key),
            ends_by_silence: true,
            tool: self.tool.clone(),
            uid: self.uid,
            project_root: None,
            working_directory: None,
            file_system_root: PathBuf::from("/"),
            action: Some(action),
        }
    }

    /// Whether what is recorded of `parent` is about the workspace that this client works on; or,
    /// where that cannot be seen, about the work of the same tool. A run works on all below its
    /// directory.
    pub fn works_on(&self, parent: &ParentIdentity) -> bool {
        let ParentKind::Invocation { project_root, tool } = &parent.kind else {
            return false;
        };
        if let (BuildKey::Run(_), Some(directory), Some(root)) =
            (&self.key, &self.project_root, project_root)
        {
            return self.uid == parent.uid && root.starts_with(directory);
        }
        self.uid == parent.uid
            && self.project_root == *project_root
            && (project_root.is_some() || self.tool == *tool)
    }

    /// For people: what its parents are called.
    pub fn label(&self) -> String {
        self.parent(&"".into(), DigestFunction::default()).label()
    }

    /// The parent that calls of this client under `instance` and `digest_function` belong to.
    pub fn parent(&self, instance: &Arc<str>, digest_function: DigestFunction) -> ParentIdentity {
        ParentIdentity {
            instance: instance.clone(),
            digest_function,
            uid: self.uid,
            kind: match &self.action {
                Some(action) => ParentKind::Action(action.clone()),
                None => ParentKind::Invocation {
                    project_root: self.project_root.clone(),
                    tool: self.tool.clone(),
                },
            },
        }
    }
}

/// The process that recc names by `tool_invocation_id = host:ppid`, if the host is this one.
fn named_process(metadata: &RequestMetadata, host: &str) -> Option<Process> {
    let (named, pid) = metadata.tool_invocation_id.rsplit_once(':')?;
    if named != host {
        return None;
    }
    Process::find(pid.parse().ok()?)
}

/// What the client says its calls belong together by, if it does.
pub fn invocation(metadata: &RequestMetadata) -> Option<String> {
    [
        &metadata.correlated_invocations_id,
        &metadata.tool_invocation_id,
    ]
    .into_iter()
    .find(|id| !id.is_empty())
    .cloned()
}

/// Clients for tests.
#[cfg(test)]
pub mod fixture {
    use super::*;

    /// One on another machine, or on this one.
    pub fn tcp_peer(address: &str) -> Peer {
        Peer::new(PeerOrigin::Tcp(address.parse().unwrap()))
    }

    /// What a client says that is told apart by `id`.
    pub fn invoked_as(id: &str) -> RequestMetadata {
        RequestMetadata {
            tool_invocation_id: id.to_owned(),
            ..RequestMetadata::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::fixture::{invoked_as, tcp_peer};
    use super::*;

    const SHA256: DigestFunction = DigestFunction::Sha256;

    #[test]
    fn a_client_on_another_machine_is_known_by_its_invocation_alone() {
        let peer = tcp_peer("192.0.2.1:4000");
        let pid = std::process::id();
        let caller = Caller::identify(&peer, invoked_as(&format!("here:{pid}")), "here");
        assert_eq!(caller.key, BuildKey::Invocation(format!("here:{pid}")));
        assert!(caller.ends_by_silence);
        assert_eq!((caller.uid, &caller.project_root), (None, &None));
        assert_eq!(caller.file_system_root, Path::new(""));
        let silent = Caller::identify(&peer, RequestMetadata::default(), "here");
        assert_eq!(silent.key, BuildKey::Connection(peer.id()));
    }

    #[test]
    fn the_workspace_decides_what_is_primed_and_not_the_name_of_the_tool() {
        let peer = tcp_peer("127.0.0.1:4000");
        let id = format!("here:{}", std::process::id());
        let caller = Caller::identify(&peer, invoked_as(&id), "here");
        let parent = caller.parent(&"".into(), SHA256);
        assert!(caller.works_on(&parent));
        let invocation = |root: Option<&Path>, tool: &str| ParentIdentity {
            kind: ParentKind::Invocation {
                project_root: root.map(Path::to_owned),
                tool: tool.to_owned(),
            },
            ..parent.clone()
        };
        let by_another_tool = invocation(parent.project_root(), "another");
        assert!(caller.works_on(&by_another_tool));
        assert_eq!(by_another_tool.weak_key(), parent.weak_key());
        let elsewhere = invocation(Some(Path::new("/elsewhere")), &caller.tool);
        assert!(!caller.works_on(&elsewhere));
        let of_another_user = ParentIdentity {
            uid: Some(u32::MAX),
            ..parent
        };
        assert!(!caller.works_on(&of_another_user));
    }

    #[test]
    fn where_no_workspace_can_be_seen_the_name_of_the_tool_decides_what_is_primed() {
        let caller = |tool: &str| {
            let mut metadata = invoked_as("elsewhere:1");
            metadata.tool_details = Some(crate::reapi::ToolDetails {
                tool_name: tool.to_owned(),
                ..Default::default()
            });
            Caller::identify(&tcp_peer("192.0.2.1:4000"), metadata, "here")
        };
        let parent = caller("recc").parent(&"".into(), SHA256);
        assert!(caller("recc").works_on(&parent));
        assert!(!caller("bazel").works_on(&parent));
        let peer = tcp_peer("127.0.0.1:4000");
        let seen = invoked_as(&format!("here:{}", std::process::id()));
        let seen = Caller::identify(&peer, seen, "here");
        assert!(!seen.works_on(&parent));
        assert!(!caller(&seen.tool).works_on(&seen.parent(&"".into(), SHA256)));
    }

    #[test]
    fn a_process_that_a_local_client_names_is_believed_only_on_this_host() {
        let peer = tcp_peer("127.0.0.1:4000");
        let pid = std::process::id();
        let named = Caller::identify(&peer, invoked_as(&format!("here:{pid}")), "here");
        assert!(matches!(&named.key, BuildKey::Process(process) if process.pid == pid as i32));
        assert_eq!(named.project_root, std::env::current_dir().ok());
        let elsewhere = Caller::identify(&peer, invoked_as(&format!("there:{pid}")), "here");
        assert_eq!(elsewhere.key, BuildKey::Invocation(format!("there:{pid}")));
    }
}
