//! The speculation engine: it records what builds execute, finds where each input came from, and
//! executes ahead of time what the next build will ask for.
//!
//! | | |
//! |---|---|
//! | `engine` | takes in what the proxy's taps saw, and tells the others what to do |
//! | `clients` | whose calls these are, and the builds that they belong to |
//! | `nested` | which of them are made on behalf of actions that are being executed |
//! | `recording` | after a build: what it executed, and where each input came from |
//! | `records` | what is recorded, and the store that keeps it |
//! | `sharing` | records for others, and those of others, in the backend |
//! | `priming` | when the next build begins, a source file is saved, or a client shows what has changed: has a plan made, and carried out |
//! | `planning` | what recorded actions are now, which of them are worth it, and in which order |
//! | `flights` | what is in flight, and how much of it at once |
//! | `journal` | what builds asked for, and what was done for them |
//! | `explanation` | what is to be said of that to those who ask |
//!
//! The proxy holds an [`Engine`] and asks it one question: is this digest in flight?

mod activity;
pub mod clients;
pub mod engine;
pub mod explanation;
pub mod flights;
pub mod journal;
pub mod nested;
pub mod planning;
mod priming;
pub mod recording;
pub mod records;
mod room;
mod sharing;
mod workshop;

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::Instant;

use tokio::sync::{Notify, mpsc, oneshot};

use clients::hidden_hits::HiddenHits;
use clients::observation::{CallOrigin, Observation, TapMemory};
use clients::operations::Operations;
use flights::{FlightKey, Flights};
use nested::subactions::Subactions;

use crate::backend::Backend;
use crate::meters::METERS;
use crate::workspace::peer::PeerOrigin;

/// The proxy's handle on the engine. All its methods return at once or wait for a bounded time,
/// whatever state the engine is in.
pub struct Engine {
    observations: mpsc::Sender<Observation>,
    flights: Arc<Flights>,
    subactions: Arc<Subactions>,
    operations: Operations,
    hidden_hits: Arc<HiddenHits>,
    /// Where what a proxy has answered is looked up.
    backend: Arc<dyn Backend>,
    dropped: Arc<AtomicU64>,
    /// What taps hold.
    memory: TapMemory,
    /// Ends the engine's rest.
    urgent: Arc<Notify>,
    /// The local process whose first call on a connection was the last to be seen; 0 before that.
    latest_process: AtomicI32,
}

/// When so many observations wait, the engine's rest is over: were there more, their memory would not
/// be used again while it is in a cache.
const MANY: usize = 32;

impl Engine {
    /// What is in flight.
    pub fn flights(&self) -> &Arc<Flights> {
        &self.flights
    }

    /// Tells the engine of the first call on a connection. A client that is new is looked at here
    /// and now, while it waits for its answer: a compiler wrapper may be gone, with all that stood
    /// between it and the build tool, before the engine has its turn.
    pub fn observe_first(&self, origin: CallOrigin) {
        if let PeerOrigin::Local { pid: Some(pid), .. } = origin.peer.origin() {
            // A process that opens one connection after the other is known.
            if self.latest_process.swap(pid, Ordering::Relaxed) != pid {
                origin.peer.lineage();
            }
        }
        self.observe(Observation::FirstCall(origin));
    }

    /// Tells the engine what a tap saw. If the engine is too far behind, the observation is
    /// dropped and counted.
    pub fn observe(&self, observation: Observation) {
        let urgent = is_urgent(&observation);
        if self.observations.try_send(observation).is_err() {
            self.count_dropped();
        } else if urgent || self.are_many_waiting() {
            self.urgent.notify_one();
        }
    }

    /// Whether so many observations wait. With none, the engine has just taken this one in.
    fn are_many_waiting(&self) -> bool {
        let waiting = self.observations.max_capacity() - self.observations.capacity();
        waiting > 0 && waiting.is_multiple_of(MANY)
    }

    /// Sets memory aside for a chunk of an answer, in whole KiB: a small one takes more than its
    /// bytes. `None` when the engine is too far behind.
    pub fn room_for(&self, bytes: usize) -> Option<TapMemory> {
        let mut room = self.memory.clone();
        room.take(bytes.next_multiple_of(1024)).then_some(room)
    }

    /// Counts an observation that could not be kept.
    pub fn count_dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
        METERS.dropped.add(1);
    }

    /// Waits until the engine has worked out whether `key` is about to be executed, but not past
    /// `deadline`. Then `Flights` knows.
    pub async fn ask(&self, origin: CallOrigin, key: FlightKey, deadline: Instant) {
        let question = |reply| Observation::Question { origin, key, reply };
        self.answered(question, deadline).await;
    }

    /// Puts a question to the engine and waits until it is answered, but not past `deadline`.
    async fn answered(
        &self,
        question: impl FnOnce(oneshot::Sender<()>) -> Observation,
        deadline: Instant,
    ) {
        let (reply, answered) = oneshot::channel();
        self.observe(question(reply));
        // One that was dropped, or an engine that is gone, drops `reply`: an answer too.
        let _ = tokio::time::timeout_at(deadline.into(), answered).await;
    }
}

/// Whether the engine should look at it at once: somebody waits for it, or who called may be gone
/// in a moment.
fn is_urgent(observation: &Observation) -> bool {
    match observation {
        Observation::FirstCall(origin) => matches!(origin.peer.origin(), PeerOrigin::Tcp(_)),
        Observation::Question { .. }
        | Observation::Executing { .. }
        | Observation::Completing { .. } => true,
        Observation::Lookup(_) | Observation::Execution(_) | Observation::Disconnected(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::clients::operations::operations;
    use super::*;
    use crate::cas::Digest;
    use crate::cas::memory::Memory;
    use crate::speculation::clients::observation::MAX_TAP_MEMORY;
    use crate::workspace::peer::{Peer, PeerOrigin};
    use std::time::Duration;

    /// A handle on an engine that takes nothing in, with room for one observation.
    pub(super) fn stuck() -> (Arc<Engine>, mpsc::Receiver<Observation>) {
        let (observations, unread) = mpsc::channel(1);
        let engine = Arc::new(Engine {
            observations,
            flights: Flights::new(1),
            subactions: Arc::default(),
            operations: operations(),
            hidden_hits: Arc::default(),
            backend: Memory::holding([]),
            dropped: Arc::default(),
            memory: TapMemory::default(),
            urgent: Arc::default(),
            latest_process: AtomicI32::new(0),
        });
        (engine, unread)
    }

    fn question() -> (CallOrigin, FlightKey) {
        let peer = Arc::new(Peer::new(PeerOrigin::Local { pid: None, uid: 0 }));
        let origin = CallOrigin {
            peer,
            metadata: None,
        };
        let action = Digest::of(b"action");
        (
            origin,
            FlightKey {
                instance: "".into(),
                action,
            },
        )
    }

    #[test]
    fn what_a_full_queue_cannot_take_is_dropped_and_counted() {
        let (engine, _unread) = stuck();
        for _ in 0..4 {
            engine.observe(Observation::Disconnected(1));
        }
        assert_eq!(engine.dropped.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn taps_hold_no_more_than_their_memory() {
        let (engine, _unread) = stuck();
        let first = engine.room_for(MAX_TAP_MEMORY - 548);
        assert!(first.is_some());
        assert!(engine.room_for(1).is_none());
        drop(first);
        assert!(engine.room_for(1).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_is_over_at_its_deadline_and_when_nobody_can_answer() {
        let (engine, unread) = stuck();
        let (origin, key) = question();
        let began = tokio::time::Instant::now();
        let deadline = began + Duration::from_secs(2);
        engine
            .ask(origin.clone(), key.clone(), deadline.into())
            .await;
        assert_eq!(
            began.elapsed(),
            Duration::from_secs(2),
            "the engine is stuck"
        );
        engine
            .ask(origin.clone(), key.clone(), deadline.into())
            .await;
        assert_eq!(
            engine.dropped.load(Ordering::Relaxed),
            1,
            "its queue is full"
        );
        drop(unread);
        let later = began + Duration::from_secs(60);
        engine.ask(origin, key, later.into()).await;
        assert_eq!(began.elapsed(), Duration::from_secs(2), "it is gone");
    }
}
