//! Whether the upstream can be reached, as its connections show it.

use std::fmt;

use serde::Serialize;
use tokio::sync::watch;

use crate::address::Address;

/// What is known of the way to the upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum UpstreamState {
    /// There is no connection, because no call needed one.
    #[default]
    Idle,
    /// There is a connection.
    Connected,
    /// There is no connection: the last attempt failed, or the last one broke.
    Unavailable,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    connections: usize,
    failed: bool,
}

impl Seen {
    fn state(self) -> UpstreamState {
        match self {
            Seen {
                connections: 1.., ..
            } => UpstreamState::Connected,
            Seen { failed: true, .. } => UpstreamState::Unavailable,
            Seen { .. } => UpstreamState::Idle,
        }
    }
}

/// The state of the upstream, shared by all who connect to it and shown by `primed status`.
#[derive(Debug, Default)]
pub struct UpstreamHealth {
    seen: watch::Sender<Seen>,
}

impl UpstreamHealth {
    /// What the connections and the last attempt show.
    pub fn state(&self) -> UpstreamState {
        self.seen.borrow().state()
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.seen.borrow().connections
    }

    /// Returns when the state is another than `known`, with the new one.
    pub async fn changed_from(&self, known: UpstreamState) -> UpstreamState {
        let mut seen = self.seen.subscribe();
        // The sender lives as long as `self`.
        let now = seen.wait_for(|seen| seen.state() != known).await;
        now.map_or(known, |seen| seen.state())
    }

    /// A connection has been opened.
    pub fn opened(&self, address: &Address) {
        let before = self.seen.borrow().state();
        self.seen.send_modify(|seen| {
            seen.connections += 1;
            seen.failed = false;
        });
        if before != UpstreamState::Connected {
            tracing::info!(upstream = %address, "connected to the upstream");
        }
    }

    /// A connection has ended in good order.
    pub fn closed(&self) {
        self.seen
            .send_modify(|seen| seen.connections = seen.connections.saturating_sub(1));
    }

    /// An attempt to connect has failed, or a connection broke. Said once, until one succeeds.
    pub fn failed(&self, address: &Address, reason: &dyn fmt::Display) {
        let mut first = false;
        self.seen.send_modify(|seen| {
            first = !std::mem::replace(&mut seen.failed, true);
        });
        if first {
            tracing::warn!(upstream = %address, %reason, "the upstream is not available");
        }
    }
}
