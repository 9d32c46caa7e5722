//! Spawning, in one place: a task that panics is logged and counted, never lost in silence.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use tokio::task::JoinHandle;

static PANICS: AtomicU64 = AtomicU64::new(0);

/// How many tasks have panicked since the process began.
pub fn panics() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

/// Runs `future` on the current runtime; `name` stands in the log should it panic.
#[allow(
    clippy::disallowed_methods,
    reason = "this is the one place that spawns"
)]
pub fn spawn<F>(name: &'static str, future: F) -> JoinHandle<Option<F::Output>>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    tokio::spawn(Guarded {
        name,
        future: Box::pin(future),
    })
}

/// Runs `work` on a thread that may block. `None` if it panicked or the runtime is shutting down.
#[allow(
    clippy::disallowed_methods,
    reason = "this is the one place that spawns"
)]
pub async fn blocking<T, W>(name: &'static str, work: W) -> Option<T>
where
    W: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    tokio::task::spawn_blocking(move || guard(name, work))
        .await
        .unwrap_or(None)
}

/// A future whose panic ends it with `None`, logged and counted.
struct Guarded<F: Future> {
    name: &'static str,
    future: Pin<Box<F>>,
}

impl<F: Future> Future for Guarded<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        match guard(this.name, || this.future.as_mut().poll(cx)) {
            Some(Poll::Pending) => Poll::Pending,
            Some(Poll::Ready(output)) => Poll::Ready(Some(output)),
            None => Poll::Ready(None),
        }
    }
}

/// Runs `work`; `None` if it panicked.
pub fn guard<T>(name: &'static str, work: impl FnOnce() -> T) -> Option<T> {
    match std::panic::catch_unwind(AssertUnwindSafe(work)) {
        Ok(output) => Some(output),
        Err(_) => {
            PANICS.fetch_add(1, Ordering::Relaxed);
            tracing::error!(task = name, "a task panicked; primed goes on without it");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_ends_the_task_alone_and_is_counted() {
        let before = panics();
        assert_eq!(
            spawn("test", async { panic!("on purpose") }).await.unwrap(),
            None::<()>
        );
        assert_eq!(blocking("test", || panic!("on purpose")).await, None::<()>);
        assert_eq!(spawn("test", async { 7 }).await.unwrap(), Some(7));
        assert!(panics() >= before + 2);
    }
}
