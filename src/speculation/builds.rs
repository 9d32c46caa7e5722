//! Builds as clients run them: which call belongs to which, and how each of its actions was
//! answered. Counts only; what is recorded is `record`'s business.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::flights::FlightKey;
use super::parent::ParentIdentity;
use super::record::Subaction;
use crate::reapi::RequestMetadata;
use crate::workspace::peer::{Peer, PeerOrigin};
use crate::workspace::process::{self, Process};

/// What makes calls belong together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum BuildKey {
    /// They come from below the same process.
    Process(Process),
    /// They carry the same invocation id.
    Invocation(String),
    /// They come by the same connection, and nothing else is known of them.
    Connection(u64),
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
    /// The root of the client's file system.
    pub file_system_root: PathBuf,
}

impl Caller {
    /// Finds out who calls. Reads `/proc`, some microseconds for each ancestor.
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
        let (connected, uid) = match peer.origin() {
            PeerOrigin::Local { pid, uid } => (pid.and_then(Process::find), Some(uid)),
            PeerOrigin::Tcp(_) => (None, None),
        };
        let by_proxy = match (&connected, &named) {
            (Some(connected), Some(named)) => !connected.is_child_of(named),
            (None, _) => true,
            (Some(_), None) => false,
        };
        // The client itself, or where that cannot be seen, the process that it works for.
        let client = if by_proxy {
            named.clone().or(connected)
        } else {
            connected
        };
        let build_tool = client.as_ref().and_then(process::topmost_build_tool);
        let ends_by_silence = build_tool.is_none();
        let tool = build_tool.or(named);
        let key = match (&tool, invocation(&metadata)) {
            (Some(tool), _) => BuildKey::Process(tool.clone()),
            (None, Some(id)) => BuildKey::Invocation(id),
            (None, None) => match &client {
                Some(client) => BuildKey::Process(client.clone()),
                None => BuildKey::Connection(peer.id()),
            },
        };
        let worker = tool.as_ref().or(client.as_ref());
        let tool_name = metadata.tool_details.map(|details| details.tool_name);
        Caller {
            key,
            ends_by_silence,
            tool: worker
                .map(|process| process.name.clone())
                .or(tool_name)
                .filter(|name| !name.is_empty())
                .unwrap_or_else(|| "unknown".to_owned()),
            uid: uid.or_else(|| worker.and_then(Process::uid)),
            project_root: worker.and_then(Process::working_directory),
            working_directory: client.as_ref().and_then(Process::working_directory),
            file_system_root: client
                .as_ref()
                .and_then(Process::file_system_root)
                .unwrap_or_else(|| PathBuf::from("/")),
        }
    }

    /// Whether what is recorded of `parent` is about the workspace that this client works on.
    pub fn works_on(&self, parent: &ParentIdentity) -> bool {
        self.project_root.is_some()
            && self.project_root == parent.project_root
            && self.uid == parent.uid
    }

    /// The parent that calls of this client under `instance` belong to.
    pub fn parent(&self, instance: &Arc<str>) -> ParentIdentity {
        ParentIdentity {
            instance: instance.clone(),
            uid: self.uid,
            project_root: self.project_root.clone(),
            tool: self.tool.clone(),
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

/// How the client's question for an action was answered. Section 11 of the design has the words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// From the action cache, without primed's help.
    Cached,
    /// By a primed result.
    Hit,
    /// It attached to a speculative execution in flight.
    Joined,
    /// It had to execute the action itself.
    Missed,
}

/// A build that is running or has ended.
#[derive(Debug)]
pub struct Build {
    /// Differs for each build of this process.
    pub number: u64,
    /// Differs for each build, ever.
    pub id: String,
    /// Who runs it.
    pub caller: Caller,
    /// Milliseconds since 1970.
    pub started_unix_ms: i64,
    /// Milliseconds since 1970; `None` while it runs.
    pub ended_unix_ms: Option<i64>,
    /// When it was last heard of.
    pub last_call: Instant,
    /// What to record of it.
    pub subactions: HashMap<FlightKey, Subaction>,
    asked: HashMap<FlightKey, (Asked, Duration)>,
    /// Results that were primed for it.
    pub primed: u64,
}

impl Build {
    /// A build that begins now.
    pub fn new(number: u64, caller: Caller, now_unix_ms: i64) -> Self {
        Build {
            number,
            id: uuid::Uuid::now_v7().to_string(),
            caller,
            started_unix_ms: now_unix_ms,
            ended_unix_ms: None,
            last_call: Instant::now(),
            subactions: HashMap::new(),
            asked: HashMap::new(),
            primed: 0,
        }
    }

    /// Whether any action was asked for.
    pub fn has_asked(&self) -> bool {
        !self.asked.is_empty()
    }

    /// Counts an answer. `saved` is what primed spared the client. The first answer counts, but
    /// an action that was missed may still be joined.
    pub fn count(&mut self, key: &FlightKey, asked: Asked, saved: Duration) {
        let entry = self.asked.entry(key.clone()).or_insert((asked, saved));
        if entry.0 == Asked::Missed && asked == Asked::Joined {
            *entry = (asked, saved);
        }
    }

    /// Keeps an action for recording.
    pub fn keep(&mut self, key: FlightKey, subaction: impl FnOnce(u64) -> Subaction) {
        let order = self.subactions.len() as u64;
        self.subactions
            .entry(key)
            .or_insert_with(|| subaction(order));
    }

    /// What `primed status` shows of it.
    pub fn status(&self) -> BuildStatus {
        let count = |which| {
            self.asked
                .values()
                .filter(|(asked, _)| *asked == which)
                .count() as u64
        };
        let (hit, joined) = (count(Asked::Hit), count(Asked::Joined));
        let saved: Duration = self.asked.values().map(|(_, saved)| *saved).sum();
        BuildStatus {
            id: self.id.clone(),
            parent: "invocation",
            label: self.caller.parent(&"".into()).label(),
            started_unix_ms: self.started_unix_ms,
            ended_unix_ms: self.ended_unix_ms,
            asked: self.asked.len() as u64,
            cached: count(Asked::Cached),
            hit,
            joined,
            missed: count(Asked::Missed),
            primed: self.primed,
            used: hit + joined,
            saved_ms: u64::try_from(saved.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

/// One build in `primed status`.
#[derive(Clone, Debug, Serialize)]
pub struct BuildStatus {
    /// Differs for each build.
    pub id: String,
    /// Kind of the parent: `invocation`.
    pub parent: &'static str,
    /// For people.
    pub label: String,
    /// Milliseconds since 1970.
    pub started_unix_ms: i64,
    /// Milliseconds since 1970; `None` while it runs.
    pub ended_unix_ms: Option<i64>,
    /// Distinct actions that the client asked for.
    pub asked: u64,
    /// Of these, answered from the action cache without primed's help.
    pub cached: u64,
    /// Answered by a primed result.
    pub hit: u64,
    /// Attached to a speculative execution in flight.
    pub joined: u64,
    /// Left to the client.
    pub missed: u64,
    /// Results that were primed for it.
    pub primed: u64,
    /// Of these, how many it used.
    pub used: u64,
    /// Recorded execution time of hits, and the elapsed part of joins.
    pub saved_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cas::Digest;

    fn key(name: &str) -> FlightKey {
        FlightKey {
            instance: "".into(),
            action: Digest::of(name.as_bytes()),
        }
    }

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
    fn each_action_counts_once_and_a_missed_one_may_still_be_joined() {
        let peer = tcp_peer("192.0.2.1:4000");
        let caller = Caller::identify(&peer, invoked_as("ci"), "here");
        let mut build = Build::new(1, caller, 0);
        assert!(!build.has_asked());
        let second = Duration::from_secs(1);
        build.count(&key("a"), Asked::Missed, Duration::ZERO);
        build.count(&key("a"), Asked::Joined, second);
        build.count(&key("b"), Asked::Missed, Duration::ZERO);
        build.count(&key("b"), Asked::Cached, Duration::ZERO);
        build.count(&key("c"), Asked::Hit, second);
        build.count(&key("c"), Asked::Hit, second);
        let status = build.status();
        assert_eq!((status.asked, status.cached), (3, 0));
        assert_eq!((status.hit, status.joined, status.missed), (1, 1, 1));
        assert_eq!((status.used, status.saved_ms), (2, 2000));
    }

    #[test]
    fn a_client_on_another_machine_is_known_by_its_invocation_alone() {
        let peer = tcp_peer("192.0.2.1:4000");
        let pid = std::process::id();
        let caller = Caller::identify(&peer, invoked_as(&format!("here:{pid}")), "here");
        assert_eq!(caller.key, BuildKey::Invocation(format!("here:{pid}")));
        assert!(caller.ends_by_silence);
        assert_eq!((caller.uid, caller.project_root), (None, None));
        let silent = Caller::identify(&peer, RequestMetadata::default(), "here");
        assert_eq!(silent.key, BuildKey::Connection(peer.id()));
    }

    #[test]
    fn the_workspace_decides_what_is_primed_and_not_the_name_of_the_tool() {
        let peer = tcp_peer("127.0.0.1:4000");
        let id = format!("here:{}", std::process::id());
        let caller = Caller::identify(&peer, invoked_as(&id), "here");
        let parent = caller.parent(&"".into());
        assert!(caller.works_on(&parent));
        let by_another_tool = ParentIdentity {
            tool: "another".to_owned(),
            ..parent.clone()
        };
        assert!(caller.works_on(&by_another_tool));
        assert_eq!(by_another_tool.weak_key(), parent.weak_key());
        let elsewhere = ParentIdentity {
            project_root: Some("/elsewhere".into()),
            ..parent.clone()
        };
        assert!(!caller.works_on(&elsewhere));
        let of_another_user = ParentIdentity {
            uid: Some(u32::MAX),
            ..parent
        };
        assert!(!caller.works_on(&of_another_user));
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
