//! Raw HTTP/2 connections to the upstream, for forwarding calls that nobody decodes.
//!
//! Each proxy shard owns one `Http2Pool`. Connections are dialled when first needed and again
//! after they broke; a request that never reached the upstream is sent once more on a fresh one.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use serde::Serialize;

use super::dial::Dialer;
use crate::address::Address;
use crate::task;

/// casd sends frames of up to 256 KiB; 16 KiB, HTTP/2's default, doubles the CPU for large blobs.
pub const MAX_FRAME_SIZE: u32 = 256 * 1024;
/// What one stream may have under way unread.
pub const STREAM_WINDOW: u32 = 1024 * 1024;
/// Far above the sum of the stream windows: stalled readers must never block the others that
/// share a connection (32 of them did, with 16 MiB).
pub const CONNECTION_WINDOW: u32 = 1024 * 1024 * 1024;
/// Header lists of 40 KiB have been seen; HTTP/2's usual limit would answer them with 431.
pub const MAX_HEADER_LIST_SIZE: u32 = 1024 * 1024;

/// One HTTP/2 connection limits 64 concurrent streams to about half of what two of them carry.
const CONNECTIONS: usize = 2;

/// What is known of the way to the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum UpstreamState {
    /// There is no connection, because no call needed one.
    Idle,
    /// There is a connection.
    Connected,
    /// There is no connection: the last attempt failed, or the last one broke.
    Unavailable,
}

/// The state of the upstream, shared by all shards and shown by `primed status`.
#[derive(Debug, Default)]
pub struct UpstreamHealth {
    connections: AtomicUsize,
    failed: AtomicBool,
}

impl UpstreamHealth {
    /// What the connections and the last attempt show.
    pub fn state(&self) -> UpstreamState {
        if self.connections.load(Ordering::Relaxed) > 0 {
            UpstreamState::Connected
        } else if self.failed.load(Ordering::Relaxed) {
            UpstreamState::Unavailable
        } else {
            UpstreamState::Idle
        }
    }

    fn opened(&self, address: &Address) {
        let first = self.connections.fetch_add(1, Ordering::Relaxed) == 0;
        if self.failed.swap(false, Ordering::Relaxed) || first {
            tracing::info!(upstream = %address, "connected to the upstream");
        }
    }

    fn closed(&self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }

    fn failed(&self, address: &Address, reason: &dyn std::fmt::Display) {
        if !self.failed.swap(true, Ordering::Relaxed) {
            tracing::warn!(upstream = %address, %reason, "the upstream is not available");
        }
    }
}

/// Why a request got no response.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// No connection could be made.
    #[error("cannot connect to the upstream {address}: {source}")]
    Connect {
        /// Where primed tried to connect.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
    /// A connection was made, but the stream or the connection failed.
    #[error("the connection to the upstream {address} failed: {source}")]
    Stream {
        /// Where the connection led.
        address: Address,
        /// What HTTP/2 said.
        source: hyper::Error,
    },
}

/// The connections of one shard to the upstream.
pub struct Http2Pool<B> {
    dialer: Dialer,
    health: Arc<UpstreamHealth>,
    slots: [Slot<B>; CONNECTIONS],
    next: AtomicUsize,
}

struct Slot<B> {
    sender: Mutex<Option<SendRequest<B>>>,
    dialling: tokio::sync::Mutex<()>,
}

impl<B> Http2Pool<B>
where
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// A pool that dials when it is first used.
    pub fn new(dialer: Dialer, health: Arc<UpstreamHealth>) -> Self {
        Http2Pool {
            dialer,
            health,
            slots: std::array::from_fn(|_| Slot {
                sender: Mutex::new(None),
                dialling: tokio::sync::Mutex::new(()),
            }),
            next: AtomicUsize::new(0),
        }
    }

    /// Sends `request` and returns when the response's headers are there.
    ///
    /// # Errors
    /// `SendError`, when the upstream cannot be reached or the stream fails before its headers.
    pub async fn send(&self, request: Request<B>) -> Result<Response<Incoming>, SendError> {
        let slot = &self.slots[self.next.fetch_add(1, Ordering::Relaxed) % CONNECTIONS];
        let mut request = request;
        let mut retried = false;
        loop {
            let mut sender = self.sender(slot).await?;
            match sender.try_send_request(request).await {
                Ok(response) => return Ok(response),
                Err(mut failed) => match failed.take_message() {
                    // Never sent: the connection had ended unnoticed.
                    Some(unsent) if !retried => {
                        retried = true;
                        request = unsent;
                        slot.sender.lock().take();
                    }
                    _ => {
                        let source = failed.into_error();
                        return Err(SendError::Stream {
                            address: self.dialer.address().clone(),
                            source,
                        });
                    }
                },
            }
        }
    }

    async fn sender(&self, slot: &Slot<B>) -> Result<SendRequest<B>, SendError> {
        let open = || {
            slot.sender
                .lock()
                .clone()
                .filter(|sender| !sender.is_closed())
        };
        if let Some(sender) = open() {
            return Ok(sender);
        }
        let _turn = slot.dialling.lock().await;
        if let Some(sender) = open() {
            return Ok(sender);
        }
        let sender = self.connect().await.inspect_err(|error| {
            let reason: &dyn std::fmt::Display = match error {
                SendError::Connect { source, .. } => source,
                SendError::Stream { source, .. } => source,
            };
            self.health.failed(self.dialer.address(), reason);
        })?;
        *slot.sender.lock() = Some(sender.clone());
        Ok(sender)
    }

    async fn connect(&self) -> Result<SendRequest<B>, SendError> {
        let stream = self
            .dialer
            .dial()
            .await
            .map_err(|source| SendError::Connect {
                address: self.dialer.address().clone(),
                source,
            })?;
        let (sender, connection) = Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME_SIZE)
            .max_header_list_size(MAX_HEADER_LIST_SIZE)
            .max_concurrent_reset_streams(1024)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|source| SendError::Stream {
                address: self.dialer.address().clone(),
                source,
            })?;
        let health = self.health.clone();
        let address = self.dialer.address().clone();
        health.opened(&address);
        task::spawn("upstream connection", async move {
            let ended = connection.await;
            health.closed();
            if let Err(error) = ended {
                health.failed(&address, &error);
            }
        });
        Ok(sender)
    }
}
