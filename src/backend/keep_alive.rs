//! Finds connections that are dead though nothing says so: a machine that vanished, a network that
//! swallows packets. Where calls wait and nothing comes, the upstream is asked for a sign of life.
//!
//! gRPC's C-core answers frequent PINGs with GOAWAY (`too_many_pings`): while it sends nothing else,
//! it forgives two that come within five minutes of the one before. Hence one PING in a silence, and
//! then none for longer than that. (grpcio 1.51 and 1.85: measured.)

use std::time::Duration;

use crate::http2::connection::Pulse;

/// From one PING to the next, while the upstream sends nothing but PONGs.
const BETWEEN_PINGS: Duration = Duration::from_secs(310);
/// The size of a PONG on the wire.
const PONG: u64 = 17;

/// Watches one connection. Returns when it must be given up: calls are open, nothing came for
/// `patience`, and nothing again in as long a time after a PING.
pub async fn until_dead(pulse: Pulse, patience: Duration) {
    let mut heard = pulse.heard();
    let mut next_ping = tokio::time::Instant::now();
    loop {
        tokio::time::sleep(patience).await;
        let now = pulse.heard();
        if std::mem::replace(&mut heard, now) != now {
            next_ping = tokio::time::Instant::now();
            continue;
        }
        if !pulse.has_calls() || tokio::time::Instant::now() < next_ping {
            continue;
        }
        pulse.ask();
        tokio::time::sleep(patience).await;
        let now = pulse.heard();
        if now == heard {
            return;
        }
        if now.saturating_sub(heard) <= PONG {
            next_ping = tokio::time::Instant::now() + BETWEEN_PINGS;
        }
        heard = now;
    }
}
