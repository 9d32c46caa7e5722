//! Who is at the other end of a connection.

use std::fmt;
use std::net::SocketAddr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::process::{Lineage, Process};

/// A connected client.
#[derive(Debug)]
pub struct Peer {
    id: u64,
    origin: PeerOrigin,
    lineage: OnceLock<Option<Box<Lineage>>>,
    complained: AtomicBool,
}

/// How a client came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerOrigin {
    /// By a Unix socket: the kernel says which process connected, and whose it is.
    Local {
        /// Process id, where the kernel can express it in this namespace.
        pid: Option<i32>,
        /// User id.
        uid: u32,
    },
    /// By TCP.
    Tcp(SocketAddr),
}

impl fmt::Display for PeerOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PeerOrigin::Local {
                pid: Some(pid),
                uid,
            } => write!(f, "process {pid} of user {uid}"),
            PeerOrigin::Local { pid: None, uid } => write!(f, "a process of user {uid}"),
            PeerOrigin::Tcp(address) => write!(f, "{address}"),
        }
    }
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl Peer {
    /// A new peer with an id of its own.
    pub fn new(origin: PeerOrigin) -> Self {
        Peer {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            origin,
            lineage: OnceLock::new(),
            complained: AtomicBool::new(false),
        }
    }

    /// True the first time: a client that sends nonsense gets one line in the log, not many.
    pub fn is_first_complaint(&self) -> bool {
        !self.complained.swap(true, Ordering::Relaxed)
    }

    /// Differs for each connection.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// How it came in.
    pub fn origin(&self) -> PeerOrigin {
        self.origin
    }

    /// Its process and those above it, as they were when this was first called; `None` if the
    /// kernel does not say which process it is, or if that was gone by then.
    pub fn lineage(&self) -> Option<&Lineage> {
        let PeerOrigin::Local { pid: Some(pid), .. } = self.origin else {
            return None;
        };
        let lineage = || Process::find(pid).map(Lineage::of).map(Box::new);
        self.lineage.get_or_init(lineage).as_deref()
    }

    /// Whether its processes run on this machine.
    pub fn is_on_this_machine(&self) -> bool {
        match self.origin {
            PeerOrigin::Local { .. } => true,
            // A socket that takes both kinds shows IPv4 addresses as IPv6 ones.
            PeerOrigin::Tcp(address) => address.ip().to_canonical().is_loopback(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_by_the_loopback_device_is_on_this_machine() {
        for (address, expected) in [
            ("127.0.0.1:1", true),
            ("[::1]:1", true),
            ("[::ffff:127.0.0.1]:1", true),
            ("192.0.2.1:1", false),
            ("[::ffff:192.0.2.1]:1", false),
        ] {
            let peer = Peer::new(PeerOrigin::Tcp(address.parse().unwrap()));
            assert_eq!(peer.is_on_this_machine(), expected, "{address}");
        }
    }
}
