//! Which clients are let in, and how many at once: one `Admission` for all listeners for clients.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::workspace::peer::PeerOrigin;

/// Descriptors that are not for clients: the store, upstream connections, logs, each shard's own.
const RESERVED_DESCRIPTORS: u64 = 256;

/// The rules that connections are accepted by.
pub struct Admission {
    /// Empty: whoever can reach the socket.
    uids: BTreeSet<u32>,
    refused: Mutex<BTreeSet<u32>>,
    places: Arc<Semaphore>,
    full: AtomicBool,
}

impl Admission {
    /// Lets in `max` clients at once, and by Unix sockets only those of `uids`, if there are any.
    pub fn new(uids: &[u32], max: usize) -> Self {
        Admission {
            uids: uids.iter().copied().collect(),
            refused: Mutex::default(),
            places: Arc::new(Semaphore::new(max.min(Semaphore::MAX_PERMITS))),
            full: AtomicBool::new(false),
        }
    }

    /// Whether sockets must let others than their owner connect, so that the list decides.
    pub fn includes_others(&self) -> bool {
        self.uids.iter().any(|uid| *uid != geteuid().as_raw())
    }

    /// Whether a client may come in at all. Each refused user gets one line in the log.
    pub fn admits(&self, origin: &PeerOrigin) -> bool {
        let PeerOrigin::Local { uid, .. } = origin else {
            return true;
        };
        let admitted = self.uids.is_empty() || self.uids.contains(uid);
        if !admitted && self.refused.lock().insert(*uid) {
            tracing::warn!(client = %origin, "refused: the user is not one of --allow-uid");
        }
        admitted
    }

    /// Waits until there is room for one more client.
    ///
    /// Its listener accepts no one else meanwhile: further clients wait in the system's queue. A
    /// build's client that waits a moment succeeds; one that is sent away may fail its build.
    ///
    /// # Errors
    /// None that can happen: the places are never withdrawn.
    pub async fn place(&self) -> io::Result<OwnedSemaphorePermit> {
        if let Ok(place) = self.places.clone().try_acquire_owned() {
            self.full.store(false, Ordering::Relaxed);
            return Ok(place);
        }
        if !self.full.swap(true, Ordering::Relaxed) {
            tracing::warn!("--max-connections clients are connected; further ones wait");
        }
        let place = self.places.clone().acquire_owned().await;
        place.map_err(io::Error::other)
    }
}

/// Lets this process open as many files as it may, and returns how many of `wanted` clients that
/// has room for.
pub fn make_room(wanted: usize) -> usize {
    let limits = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limits.maximum,
        ..limits
    };
    let limit = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limits.maximum,
        Err(error) => {
            tracing::warn!(%error, "the limit of open files could not be raised");
            limits.current
        }
    };
    let Some(limit) = limit else {
        return wanted;
    };
    let room = limit.saturating_sub(RESERVED_DESCRIPTORS).max(1);
    let room = usize::try_from(room).unwrap_or(usize::MAX);
    if room < wanted {
        tracing::info!(
            max_connections = room,
            "fewer clients at once than --max-connections says: {limit} files may be open \
             (LimitNOFILE=, ulimit -Hn)"
        );
    }
    wanted.min(room)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(uid: u32) -> PeerOrigin {
        PeerOrigin::Local { pid: None, uid }
    }

    #[test]
    fn a_list_admits_its_users_alone_and_no_list_admits_all() {
        let listed = Admission::new(&[7, 8], 1);
        assert!(listed.admits(&user(7)) && listed.admits(&user(8)));
        assert!(!listed.admits(&user(0)) && !listed.admits(&user(9)));
        assert!(Admission::new(&[], 1).admits(&user(9)));
        let tcp = PeerOrigin::Tcp("127.0.0.1:1".parse().unwrap());
        assert!(listed.admits(&tcp), "the list is about Unix sockets");
    }

    #[test]
    fn sockets_are_opened_to_others_only_if_the_list_names_others() {
        let own = geteuid().as_raw();
        assert!(!Admission::new(&[], 1).includes_others());
        assert!(!Admission::new(&[own], 1).includes_others());
        assert!(Admission::new(&[own, own + 1], 1).includes_others());
    }

    #[tokio::test]
    async fn a_client_beyond_the_limit_waits_until_another_has_gone() {
        let admission = Arc::new(Admission::new(&[], 1));
        let place = admission.place().await.unwrap();
        let waiting = crate::task::spawn("test", {
            let admission = admission.clone();
            async move { admission.place().await.is_ok() }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(place);
        assert_eq!(waiting.await.unwrap(), Some(true));
    }
}
