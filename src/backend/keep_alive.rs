//! Finds connections that are dead though nothing says so: a machine that vanished, a network that
//! swallows packets. Where calls wait and nothing comes, the upstream is asked for a sign of life.
//!
//! gRPC's C-core answers frequent PINGs with GOAWAY (`too_many_pings`): while it sends nothing else,
//! it forgives two that come within five minutes of the one before. Hence one PING in a silence, and
//! then none for longer than that. (grpcio 1.51 and 1.85: measured.)

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use h2::{Ping, PingPong};

/// From one PING to the next, while the upstream sends nothing but PONGs.
const BETWEEN_PINGS: Duration = Duration::from_secs(310);
/// Who holds a connection's mark without having a call open: the connection and this watch.
const HOLDERS: usize = 2;
/// The size of a PONG on the wire.
const PONG: u64 = 17;

/// Bytes received on one connection.
#[derive(Clone, Debug, Default)]
pub struct Received(Arc<AtomicU64>);

impl Received {
    /// Counts what has been read.
    pub fn count(&self, bytes: &[u8]) {
        self.0.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }

    fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Watches one connection, of whose mark each open call holds a clone. Returns when the connection
/// must be given up: calls are open, nothing came for `patience`, and nothing again in as long a
/// time after a PING.
pub async fn until_dead(
    calls: Arc<()>,
    mut ping_pong: PingPong,
    received: Received,
    patience: Duration,
) {
    let mut heard = received.bytes();
    let mut next_ping = tokio::time::Instant::now();
    loop {
        tokio::time::sleep(patience).await;
        let now = received.bytes();
        if std::mem::replace(&mut heard, now) != now {
            next_ping = tokio::time::Instant::now();
            continue;
        }
        if Arc::strong_count(&calls) <= HOLDERS || tokio::time::Instant::now() < next_ping {
            continue;
        }
        // Refused only while an earlier PING is under way, and there is none.
        if ping_pong.send_ping(Ping::opaque()).is_err() {
            continue;
        }
        let answered = poll_fn(|cx| ping_pong.poll_pong(cx));
        let alive = tokio::time::timeout(patience, answered).await.is_ok();
        let now = received.bytes();
        if !alive && now == heard {
            return;
        }
        if now.saturating_sub(heard) <= PONG {
            next_ping = tokio::time::Instant::now() + BETWEEN_PINGS;
        }
        heard = now;
    }
}
