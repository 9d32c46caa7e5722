//! Who calls: which build a connection's calls belong to, where that build works, and whose
//! process it is. For local clients the process tree decides.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::HeaderValue;

use super::observation::CallOrigin;
use super::runs::Runs;
use crate::cas::DigestFunction;
use crate::quick_map::QuickMap;
use crate::reapi::RequestMetadata;
use crate::speculation::flights::FlightKey;
use crate::speculation::records::parent::{ActionParent, ParentIdentity, ParentKind, WeakKey};
use crate::workspace::peer::{Peer, PeerOrigin};
use crate::workspace::process::{Lineage, Process, Seen};

/// Connections whose clients are remembered; those forgotten are identified again.
const MAX_CONNECTIONS: usize = 100_000;
/// Invocations of one connection that are remembered.
const MAX_INVOCATIONS: usize = 1000;

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
    fn identify(peer: &Peer, metadata: RequestMetadata, host: &str) -> Self {
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
fn invocation(metadata: &RequestMetadata) -> Option<String> {
    [
        &metadata.correlated_invocations_id,
        &metadata.tool_invocation_id,
    ]
    .into_iter()
    .find(|id| !id.is_empty())
    .cloned()
}

/// The clients that are known.
pub struct Callers {
    host: String,
    /// Behind a proxy (buildbox-casd, say) one connection carries the clients of many builds, told
    /// apart by their invocation.
    by_connection: QuickMap<u64, OnConnection>,
    /// Clients of open builds on this machine. One that is gone by the time that its call is
    /// looked at belongs where others of its invocation did.
    by_invocation: HashMap<String, Arc<Caller>>,
    latest: Option<Latest>,
    latest_parent: Option<LatestParent>,
    /// The runs that clients may belong to.
    pub runs: Runs,
}

/// The clients that one connection carries.
#[derive(Default)]
struct OnConnection {
    by_invocation: HashMap<Option<String>, Arc<Caller>>,
    /// Who called last. What it says of itself with each call is most often the same, and need not be
    /// read again.
    latest: Option<(Option<HeaderValue>, Arc<Caller>)>,
}

/// Who was identified last: some clients open one connection after the other.
struct Latest {
    pid: i32,
    metadata: Option<HeaderValue>,
    identified: Instant,
    caller: Arc<Caller>,
}

/// The parent that the last call belongs to: most often the next one does, too, and what it is
/// recorded under takes a hash to find out.
struct LatestParent {
    caller: Arc<Caller>,
    instance: Arc<str>,
    digest_function: DigestFunction,
    key: WeakKey,
}

/// For how long a process id is surely the same process's.
const SAME_PROCESS: Duration = Duration::from_millis(100);

impl Latest {
    fn new(origin: &CallOrigin, caller: &Arc<Caller>) -> Option<Self> {
        let PeerOrigin::Local { pid: Some(pid), .. } = origin.peer.origin() else {
            return None;
        };
        Some(Latest {
            pid,
            metadata: origin.metadata.clone(),
            identified: Instant::now(),
            caller: caller.clone(),
        })
    }

    fn is_of(&self, origin: &CallOrigin) -> bool {
        matches!(origin.peer.origin(), PeerOrigin::Local { pid: Some(pid), .. } if pid == self.pid)
            && self.metadata == origin.metadata
            && self.identified.elapsed() < SAME_PROCESS
    }
}

impl Callers {
    /// Knows nobody yet.
    pub fn new() -> Self {
        let host = rustix::system::uname();
        Callers {
            host: host.nodename().to_string_lossy().into_owned(),
            by_connection: QuickMap::default(),
            by_invocation: HashMap::new(),
            latest: None,
            latest_parent: None,
            runs: Runs::default(),
        }
    }

    /// Who makes a call. `is_open` tells whether a build is still running.
    pub fn of(&mut self, origin: &CallOrigin, is_open: impl Fn(&BuildKey) -> bool) -> Arc<Caller> {
        let known = self.by_connection.get(&origin.peer.id());
        if let Some((metadata, caller)) = known.and_then(|known| known.latest.as_ref())
            && *metadata == origin.metadata
            && is_open(&caller.key)
        {
            return caller.clone();
        }
        let caller = self.identified(origin, is_open);
        let known = self.by_connection.entry(origin.peer.id()).or_default();
        known.latest = Some((origin.metadata.clone(), caller.clone()));
        caller
    }

    fn identified(
        &mut self,
        origin: &CallOrigin,
        is_open: impl Fn(&BuildKey) -> bool,
    ) -> Arc<Caller> {
        let metadata = origin.request_metadata();
        let invocation = invocation(&metadata);
        if self.by_connection.len() > MAX_CONNECTIONS {
            self.by_connection.clear();
        }
        let known = self.by_connection.entry(origin.peer.id()).or_default();
        let known = &mut known.by_invocation;
        if known.len() > MAX_INVOCATIONS {
            known.clear();
        }
        if let Some(caller) = known.get(&invocation)
            && is_open(&caller.key)
        {
            return caller.clone();
        }
        // New; or its build has ended, and its process id may be another's by now.
        let mut caller = match &self.latest {
            Some(latest) if latest.is_of(origin) && is_open(&latest.caller.key) => {
                latest.caller.clone()
            }
            _ => {
                let correlated = metadata.correlated_invocations_id.clone();
                let caller = Caller::identify(&origin.peer, metadata, &self.host);
                Arc::new(self.runs.adopt(caller, &correlated, &origin.peer))
            }
        };
        self.latest = Latest::new(origin, &caller);
        if let Some(id) = &invocation
            && origin.peer.is_on_this_machine()
        {
            if matches!(caller.key, BuildKey::Process(_)) {
                self.by_invocation.insert(id.clone(), caller.clone());
            } else if !matches!(caller.key, BuildKey::Run(_))
                && let Some(other) = self.by_invocation.get(id)
            {
                caller = other.clone();
            }
        }
        known.insert(invocation, caller.clone());
        caller
    }

    /// What the parent that `caller`'s calls about `key` belong to is recorded under; see
    /// `Caller::parent`.
    pub fn weak_key(&mut self, caller: &Arc<Caller>, key: &FlightKey) -> WeakKey {
        let (instance, digest_function) = (&key.instance, key.action.function());
        if let Some(latest) = &self.latest_parent
            && Arc::ptr_eq(&latest.caller, caller)
            && latest.instance == *instance
            && latest.digest_function == digest_function
        {
            return latest.key;
        }
        let key = caller.parent(instance, digest_function).weak_key();
        self.latest_parent = Some(LatestParent {
            caller: caller.clone(),
            instance: instance.clone(),
            digest_function,
            key,
        });
        key
    }

    /// A connection has ended.
    pub fn forget_connection(&mut self, peer: u64) {
        self.by_connection.remove(&peer);
    }

    /// A build has ended.
    pub fn forget_build(&mut self, key: &BuildKey) {
        self.by_invocation.retain(|_, caller| caller.key != *key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::path::Path;

    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD_NO_PAD;

    const SHA256: DigestFunction = DigestFunction::Sha256;

    fn tcp_peer(address: &str) -> Peer {
        Peer::new(PeerOrigin::Tcp(address.parse().unwrap()))
    }

    fn invoked_as(id: &str) -> RequestMetadata {
        RequestMetadata {
            tool_invocation_id: id.to_owned(),
            ..RequestMetadata::default()
        }
    }

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
    fn the_key_of_a_parent_is_that_of_its_caller_and_instance_whoever_called_before() {
        let mut callers = Callers::new();
        let [one, other] = [tcp_peer("192.0.2.1:1"), tcp_peer("192.0.2.2:2")].map(|peer| {
            let origin = CallOrigin {
                peer: Arc::new(peer),
                metadata: None,
            };
            callers.of(&origin, |_| false)
        });
        let other = Arc::new(Caller {
            tool: "another".to_owned(),
            ..(*other).clone()
        });
        let calls = [
            (&one, "", SHA256),
            (&one, "", SHA256),
            (&other, "", SHA256),
            (&other, "debug", SHA256),
            (&other, "debug", DigestFunction::Blake3),
            (&one, "", SHA256),
        ];
        let keys = calls.map(|(caller, instance, function)| {
            let instance: Arc<str> = instance.into();
            let about = FlightKey {
                instance: instance.clone(),
                action: function.of(b"action"),
            };
            let key = callers.weak_key(caller, &about);
            assert_eq!(key, caller.parent(&instance, function).weak_key());
            key
        });
        assert_eq!(keys[0], keys[5]);
        assert_eq!(keys.iter().collect::<HashSet<_>>().len(), 4);
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

    #[test]
    fn a_client_that_is_gone_belongs_where_others_of_its_invocation_did() {
        let mut callers = Callers::new();
        let mut make = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let metadata = invoked_as(&format!("{}:{}", callers.host, make.id()));
        let header = STANDARD_NO_PAD.encode(prost::Message::encode_to_vec(&metadata));
        let call = |peer| CallOrigin {
            peer: Arc::new(peer),
            metadata: Some(header.parse().unwrap()),
        };
        let seen = callers.of(&call(tcp_peer("127.0.0.1:4000")), |_| true);
        assert!(matches!(&seen.key, BuildKey::Process(process) if process.pid == make.id() as i32));
        drop(make.stdin.take());
        make.wait().unwrap();
        let late = callers.of(&call(tcp_peer("127.0.0.1:4001")), |_| true);
        assert_eq!(late.key, seen.key);
        let elsewhere = callers.of(&call(tcp_peer("192.0.2.1:4000")), |_| true);
        assert!(matches!(elsewhere.key, BuildKey::Invocation(_)));
        callers.forget_build(&seen.key);
        let later = callers.of(&call(tcp_peer("127.0.0.1:4002")), |_| true);
        assert!(matches!(later.key, BuildKey::Invocation(_)));
    }

    #[test]
    fn a_client_that_was_seen_is_known_when_it_is_gone() {
        let mut wrapper = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = wrapper.id() as i32;
        let local = || {
            Peer::new(PeerOrigin::Local {
                pid: Some(pid),
                uid: 1,
            })
        };
        let (seen, unseen) = (local(), local());
        assert!(seen.lineage().is_some());
        drop(wrapper.stdin.take());
        wrapper.wait().unwrap();
        let metadata = || invoked_as(&format!("here:{pid}"));
        let caller = Caller::identify(&seen, metadata(), "here");
        assert_eq!(caller.working_directory, std::env::current_dir().ok());
        let caller = Caller::identify(&unseen, metadata(), "here");
        assert_eq!(caller.working_directory, None);
    }
}
