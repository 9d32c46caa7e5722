//! The clients that are known, by their connections and invocations: the next call of one is known by
//! little.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::HeaderValue;

use super::caller::{BuildKey, Caller, invocation};
use super::observation::CallOrigin;
use super::runs::Runs;
use crate::cas::DigestFunction;
use crate::quick_map::QuickMap;
use crate::speculation::flights::FlightKey;
use crate::speculation::records::parent::WeakKey;
use crate::workspace::peer::PeerOrigin;

/// Connections whose clients are remembered; those forgotten are identified again.
const MAX_CONNECTIONS: usize = 100_000;
/// Invocations of one connection that are remembered.
const MAX_INVOCATIONS: usize = 1000;

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
    use std::collections::HashSet;

    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD_NO_PAD;

    use super::super::caller::fixture::{invoked_as, tcp_peer};
    use super::*;
    use crate::workspace::peer::Peer;

    const SHA256: DigestFunction = DigestFunction::Sha256;

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
