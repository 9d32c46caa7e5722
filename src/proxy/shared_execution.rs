//! Executions that clients share: the first one's call, and what came of it so far. Whoever asks
//! for the same while it lasts reads along, from the last operation on. The call lives as long as
//! anybody waits for it, whoever began it.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::{Notify, watch};

use super::alike::{Circle, Wish};
use crate::grpc::FRAME_HEADER;
use crate::reapi::google::longrunning::Operation;

/// How many operations are kept for those who read slowly, and how many bytes of them. A reader
/// that falls back further goes on with the oldest that is there; the last one always is.
const KEPT: usize = 256;
const KEPT_BYTES: usize = 1024 * 1024;

/// All executions that are shared, or could be.
#[derive(Default)]
pub struct SharedExecutions {
    by_circle: Mutex<HashMap<Circle, Vec<Arc<Shared>>>>,
}

/// One execution.
pub struct Shared {
    wish: Wish,
    course: watch::Sender<Course>,
    readers: AtomicUsize,
    gained: Notify,
    /// The connections of those who wait for it.
    waiting: Mutex<Vec<u64>>,
    /// Nobody is to join it any more.
    is_closed: AtomicBool,
}

/// What has become of an execution.
#[derive(Default)]
struct Course {
    /// The operations in their frames, without those that were `dropped`.
    operations: VecDeque<Bytes>,
    dropped: u64,
    size: usize,
    /// No more will come.
    is_over: bool,
}

/// What to do about an execution.
pub enum Entered {
    /// It is under way.
    Join(Reader),
    /// It is to be begun.
    Lead(Arc<Shared>),
}

/// One client's view on a shared execution, which lives while there is any.
pub struct Reader {
    presence: Presence,
    next: u64,
}

/// A client that waits for a shared execution, and keeps it alive.
pub struct Presence {
    shared: Arc<Shared>,
    peer: u64,
    course: watch::Receiver<Course>,
}

impl SharedExecutions {
    /// Joins the execution that `wish` asks for, or has the caller begin it.
    pub fn enter(&self, wish: Wish, peer: u64) -> Entered {
        let mut by_circle = self.by_circle.lock();
        let known = by_circle.entry(wish.circle.clone()).or_default();
        if let Some(reader) = open(known, &wish, peer) {
            return Entered::Join(reader);
        }
        let shared = Arc::new(Shared {
            wish,
            course: watch::Sender::default(),
            readers: AtomicUsize::new(0),
            gained: Notify::new(),
            waiting: Mutex::default(),
            is_closed: AtomicBool::new(false),
        });
        known.push(shared.clone());
        Entered::Lead(shared)
    }

    /// Joins the execution that `wish` asks for, if it is under way.
    pub fn join(&self, wish: &Wish, peer: u64) -> Option<Reader> {
        open(self.by_circle.lock().get(&wish.circle)?, wish, peer)
    }

    /// Whether there are none.
    pub fn are_none(&self) -> bool {
        self.by_circle.lock().is_empty()
    }

    /// An execution that is under way in `circle`.
    pub fn find(&self, circle: &Circle, peer: u64) -> Option<Reader> {
        let by_circle = self.by_circle.lock();
        let mut known = by_circle.get(circle)?.iter();
        let open = known.find(|shared| shared.is_open())?;
        Some(Reader::of(open, peer))
    }

    /// The execution in `circle` that the upstream calls `operation`.
    pub fn named(&self, circle: &Circle, operation: &str) -> Option<Arc<Shared>> {
        let by_circle = self.by_circle.lock();
        let is_named = |shared: &&Arc<Shared>| {
            let last = shared.last().map(Operation::decode);
            last.is_some_and(|last| last.is_ok_and(|last| last.name == operation))
        };
        by_circle.get(circle)?.iter().find(is_named).cloned()
    }

    /// Waits until nobody waits for `shared`. Nobody can join it then.
    pub async fn abandoned(&self, shared: &Arc<Shared>) {
        loop {
            shared.course.closed().await;
            let mut by_circle = self.by_circle.lock();
            if shared.course.is_closed() {
                return remove(&mut by_circle, shared);
            }
        }
    }

    /// Ends `shared`: no more operations will come.
    pub fn end(&self, shared: &Arc<Shared>) {
        remove(&mut self.by_circle.lock(), shared);
        shared.break_off();
    }
}

fn remove(by_circle: &mut HashMap<Circle, Vec<Arc<Shared>>>, shared: &Arc<Shared>) {
    if let Entry::Occupied(mut known) = by_circle.entry(shared.wish.circle.clone()) {
        known.get_mut().retain(|one| !Arc::ptr_eq(one, shared));
        if known.get().is_empty() {
            known.remove();
        }
    }
}

/// A reader of the one among `known` that `wish` asks for, and that can be joined.
fn open(known: &[Arc<Shared>], wish: &Wish, peer: u64) -> Option<Reader> {
    let mut open = known.iter().filter(|shared| shared.is_open());
    let open = open.find(|shared| shared.wish == *wish);
    open.map(|shared| Reader::of(shared, peer))
}

impl Shared {
    fn is_open(&self) -> bool {
        !self.is_closed.load(Ordering::Relaxed)
    }

    /// Nobody is to join it any more; those who have may stay.
    pub fn close(&self) {
        self.is_closed.store(true, Ordering::Relaxed);
    }

    /// Those who read along can expect no more of it.
    pub fn break_off(&self) {
        self.close();
        self.course.send_modify(|course| course.is_over = true);
    }

    /// Passes on one operation in its frame.
    pub fn push(&self, framed: Bytes) {
        self.course.send_modify(|course| {
            course.size += framed.len();
            course.operations.push_back(framed);
            while course.operations.len() > 1
                && (course.operations.len() > KEPT || course.size > KEPT_BYTES)
            {
                let dropped = course.operations.pop_front();
                course.size -= dropped.map_or(0, |dropped| dropped.len());
                course.dropped += 1;
            }
        });
    }

    /// The last operation.
    pub fn last(&self) -> Option<Bytes> {
        let course = self.course.borrow();
        Some(course.operations.back()?.slice(FRAME_HEADER..))
    }

    /// Whether anybody reads along.
    pub fn has_readers(&self) -> bool {
        self.readers.load(Ordering::Relaxed) > 0
    }

    /// Waits until somebody more reads along. For one task.
    pub async fn gains_reader(&self) {
        self.gained.notified().await;
    }

    /// Whether the client on the connection `peer` is one of several that wait for it.
    pub fn is_wanted_beside(&self, peer: u64) -> bool {
        let waiting = self.waiting.lock();
        waiting.contains(&peer) && waiting.iter().any(|other| *other != peer)
    }

    /// What was asked for.
    pub fn wish(&self) -> &Wish {
        &self.wish
    }
}

impl Presence {
    /// The client on the connection `peer` waits for `shared`.
    pub fn of(shared: &Arc<Shared>, peer: u64) -> Self {
        shared.waiting.lock().push(peer);
        Presence {
            shared: shared.clone(),
            peer,
            course: shared.course.subscribe(),
        }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        let mut waiting = self.shared.waiting.lock();
        if let Some(index) = waiting.iter().position(|peer| *peer == self.peer) {
            waiting.swap_remove(index);
        }
    }
}

impl Reader {
    /// A reader for the client on the connection `peer`, which begins with the last operation.
    pub fn of(shared: &Arc<Shared>, peer: u64) -> Self {
        let presence = Presence::of(shared, peer);
        shared.readers.fetch_add(1, Ordering::Relaxed);
        shared.gained.notify_one();
        let next = {
            let course = presence.course.borrow();
            course.dropped + (course.operations.len() as u64).saturating_sub(1)
        };
        Reader { presence, next }
    }

    /// The next operation; `None` after the last one. Nothing is lost if this is dropped.
    pub async fn next(&mut self) -> Option<Bytes> {
        let course = &mut self.presence.course;
        loop {
            {
                let course = course.borrow_and_update();
                let next = self.next.max(course.dropped);
                let index = usize::try_from(next - course.dropped).unwrap_or(usize::MAX);
                if let Some(framed) = course.operations.get(index) {
                    self.next = next + 1;
                    return Some(framed.slice(FRAME_HEADER..));
                }
                if course.is_over {
                    return None;
                }
            }
            course.changed().await.ok()?;
        }
    }

    /// What it reads.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.presence.shared
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.shared().readers.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cas::Digest;
    use crate::speculation::flights::FlightKey;

    fn wish() -> Wish {
        let key = FlightKey {
            instance: "".into(),
            action: Digest::of(b"action"),
        };
        Wish::for_test(key)
    }

    fn begun(executions: &SharedExecutions) -> Arc<Shared> {
        match executions.enter(wish(), 1) {
            Entered::Lead(shared) => shared,
            Entered::Join(_) => panic!("it is under way"),
        }
    }

    fn joined(executions: &SharedExecutions) -> Reader {
        executions.join(&wish(), 2).expect("it is under way")
    }

    fn framed(number: usize) -> Bytes {
        crate::grpc::framed(number.to_string().as_bytes())
    }

    async fn numbers(reader: &mut Reader) -> Vec<usize> {
        let mut numbers = Vec::new();
        while let Some(operation) = reader.next().await {
            numbers.push(std::str::from_utf8(&operation).unwrap().parse().unwrap());
        }
        numbers
    }

    #[tokio::test]
    async fn who_joins_reads_from_the_last_operation_on() {
        let executions = SharedExecutions::default();
        let shared = begun(&executions);
        let mut early = joined(&executions);
        (0..3).for_each(|number| shared.push(framed(number)));
        let mut late = joined(&executions);
        (3..5).for_each(|number| shared.push(framed(number)));
        executions.end(&shared);
        assert!(executions.join(&wish(), 2).is_none());
        assert_eq!(numbers(&mut early).await, [0, 1, 2, 3, 4]);
        assert_eq!(numbers(&mut late).await, [2, 3, 4]);
    }

    #[tokio::test]
    async fn who_reads_slowly_misses_old_operations_and_costs_bounded_memory() {
        let executions = SharedExecutions::default();
        let shared = begun(&executions);
        let mut slow = joined(&executions);
        let count = 10 * KEPT;
        (0..count).for_each(|number| shared.push(framed(number)));
        let large = crate::grpc::framed(&[b'0'; KEPT_BYTES]);
        assert_eq!(shared.course.borrow().operations.len(), KEPT);
        let first = slow.next().await.unwrap();
        assert_eq!(first, (count - KEPT).to_string().as_bytes());
        shared.push(large);
        assert_eq!(shared.course.borrow().operations.len(), 1);
        assert_eq!(slow.next().await.unwrap().len(), KEPT_BYTES);
    }

    #[tokio::test]
    async fn it_is_abandoned_when_the_last_one_leaves_and_cannot_be_joined_then() {
        let executions = SharedExecutions::default();
        let shared = begun(&executions);
        let leader = Presence::of(&shared, 1);
        let reader = joined(&executions);
        let mut abandoned = Box::pin(executions.abandoned(&shared));
        let mut is_abandoned = || {
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            abandoned.as_mut().poll(&mut context).is_ready()
        };
        drop(leader);
        assert!(!is_abandoned());
        drop(reader);
        assert!(is_abandoned());
        assert!(executions.join(&wish(), 2).is_none());
        assert!(executions.by_circle.lock().is_empty());
    }

    #[test]
    fn what_is_closed_is_begun_anew_beside() {
        let executions = SharedExecutions::default();
        let first = begun(&executions);
        first.close();
        let second = begun(&executions);
        assert!(Arc::ptr_eq(joined(&executions).shared(), &second));
        executions.end(&first);
        assert!(Arc::ptr_eq(joined(&executions).shared(), &second));
    }

    #[test]
    fn it_is_wanted_beside_a_client_while_another_waits_too() {
        let executions = SharedExecutions::default();
        let shared = begun(&executions);
        let _leader = Presence::of(&shared, 1);
        assert!(!shared.is_wanted_beside(1), "it is alone");
        let other = Presence::of(&shared, 2);
        assert!(shared.is_wanted_beside(1));
        assert!(shared.is_wanted_beside(2));
        assert!(!shared.is_wanted_beside(3), "it does not wait");
        drop(other);
        assert!(!shared.is_wanted_beside(1));
    }
}
