//! Large messages that are passed on as a whole.
//!
//! A server that works synchronously, as buildbox-casd does, prepares the next message once the last one
//! has left. While a proxy passes on how it begins, the server's socket is full, and the server waits. So
//! where one pauses between its messages (`streams/rhythm.rs`), what it sends is read as fast as it comes,
//! and passed on while it prepares the next: whoever reads the stream is woken once the message is
//! complete, or once the thread would have to sleep to hear more of it.

use std::cell::RefCell;
use std::task::Waker;
use std::time::Duration;

use tokio::time::Instant;

/// How long a message may keep its reader waiting, on a thread that always has something else to do.
const LONGEST: Duration = Duration::from_millis(5);

thread_local! {
    /// Of this thread, if it passes on what waits before it sleeps.
    static THIS: RefCell<Option<Waiting>> = const { RefCell::new(None) };
}

/// Who waits for the rest of a message.
#[derive(Default)]
struct Waiting {
    readers: Vec<Waker>,
    /// Since when the first of them does.
    since: Option<Instant>,
}

/// The current thread calls `pass_on` each time before it sleeps, from now on.
pub fn begin() {
    THIS.with_borrow_mut(|this| _ = this.get_or_insert_default());
}

/// Whether somebody on this thread waits for the rest of a message.
pub fn are_awaited() -> bool {
    with_this(|this| this.since).flatten().is_some()
}

/// Has a reader wait for the rest of a message, if this thread is one that passes on what waits.
/// Returns whether it is.
pub fn wait(reader: &mut Option<Waker>) -> bool {
    let waits = with_this(|this| {
        if let Some(reader) = reader.take() {
            this.since.get_or_insert_with(Instant::now);
            this.readers.push(reader);
        }
    });
    waits.is_some()
}

/// Wakes those on this thread that wait.
pub fn pass_on() {
    let readers = with_this(|this| {
        this.since.take()?;
        Some(std::mem::take(&mut this.readers))
    });
    for reader in readers.flatten().into_iter().flatten() {
        reader.wake();
    }
}

/// The same if they have waited for long.
pub fn pass_on_if_late() {
    let since = with_this(|this| this.since).flatten();
    if since.is_some_and(|since| since.elapsed() >= LONGEST) {
        pass_on();
    }
}

fn with_this<T>(act: impl FnOnce(&mut Waiting) -> T) -> Option<T> {
    // Nobody waits on a thread that ends.
    let done = THIS.try_with(|this| this.borrow_mut().as_mut().map(act));
    done.ok().flatten()
}
