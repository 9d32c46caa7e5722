//! The HTTP/2 connections of one thread to one upstream address: dialled when first needed and
//! again after they ended, with a back-off while that fails.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use h2::client::Builder;
use http::HeaderMap;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_util::io::InspectReader;

use super::dial::Dialer;
use super::exchange::Connection;
use super::health::UpstreamHealth;
use super::keep_alive::{Received, until_dead};
use crate::address::Address;
use crate::http2::{
    DATA_FRAME_BUDGET, HANDSHAKE_TIMEOUT, MAX_FRAME_SIZE, SEND_BUFFER, STREAM_WINDOW,
    UPSTREAM_HEADER_LIST, UPSTREAM_WINDOW,
};
use crate::task;

/// One HTTP/2 connection limits 64 concurrent streams to about half of what two of them carry.
const CONNECTIONS: usize = 2;
/// After a failure: how long to the next attempt, doubled each time, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The same for Unix sockets, to which a vain attempt costs next to nothing.
const LONGEST_LOCAL_PAUSE: Duration = Duration::from_millis(100);

/// Why there is no connection.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot connect to the upstream {address}: {source}")]
pub struct ConnectError {
    address: Address,
    source: Arc<io::Error>,
}

/// What a call's headers come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Headers {
    /// Within what every server takes.
    Usual,
    /// More than some take. gRPC's C-core then ends the whole connection, with all calls on it
    /// (buildbox-casd from 8 KiB on: measured), so these must not share one with others.
    Long,
}

/// From how many bytes on headers are long.
const LONG_HEADERS: usize = 7 * 1024;

impl Headers {
    /// Which these are, by the bytes of their names and values.
    pub fn of(headers: &HeaderMap) -> Self {
        let size = headers
            .iter()
            .map(|(name, value)| name.as_str().len() + value.len());
        match size.sum::<usize>() {
            ..LONG_HEADERS => Headers::Usual,
            LONG_HEADERS.. => Headers::Long,
        }
    }
}

/// Connections to one address.
pub struct Connections {
    dialer: Dialer,
    health: Arc<UpstreamHealth>,
    keep_alive: Duration,
    slots: [Slot; CONNECTIONS],
    /// For calls with long headers.
    aside: Slot,
    next: AtomicUsize,
    back_off: Mutex<BackOff>,
}

#[derive(Default)]
struct Slot {
    open: Mutex<Option<Connection>>,
    dialling: tokio::sync::Mutex<()>,
}

/// After failures in a row, the next attempt has to wait.
#[derive(Default)]
struct BackOff {
    pause: Duration,
    last: Option<(Instant, ConnectError)>,
}

impl Connections {
    /// Connections to where `dialer` leads, made when they are first needed.
    pub fn new(dialer: Dialer, health: Arc<UpstreamHealth>, keep_alive: Duration) -> Self {
        Connections {
            dialer,
            health,
            keep_alive,
            slots: Default::default(),
            aside: Slot::default(),
            next: AtomicUsize::new(0),
            back_off: Mutex::default(),
        }
    }

    /// A connection that takes calls, as far as is known.
    ///
    /// # Errors
    /// `ConnectError`, when there is none within `patience`.
    pub async fn ready(
        &self,
        headers: Headers,
        patience: Duration,
    ) -> Result<Connection, ConnectError> {
        let slot = match headers {
            Headers::Usual => &self.slots[self.next.fetch_add(1, Ordering::Relaxed) % CONNECTIONS],
            Headers::Long => &self.aside,
        };
        match slot.open() {
            Some(open) => Ok(open),
            // Boxed: it is rare, and large for something that is part of every call.
            None => Box::pin(self.connected(slot, patience)).await,
        }
    }

    async fn connected(&self, slot: &Slot, patience: Duration) -> Result<Connection, ConnectError> {
        let deadline = Instant::now() + patience;
        loop {
            match self.turn(slot, Instant::now()).await {
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => {}
                open => return open,
            }
        }
    }

    /// Connects, after the pause that earlier failures make due, or waits for whoever does so
    /// already. A failure since `arrived` is shared.
    async fn turn(&self, slot: &Slot, arrived: Instant) -> Result<Connection, ConnectError> {
        let _turn = slot.dialling.lock().await;
        if let Some(open) = slot.open() {
            return Ok(open);
        }
        let failure = self.back_off.lock().last.clone();
        if let Some((failed, error)) = failure {
            if failed >= arrived {
                return Err(error);
            }
            let pause = self.back_off.lock().pause;
            tokio::time::sleep_until(failed + pause).await;
        }
        let open = self.connect().await?;
        *slot.open.lock() = Some(open.clone());
        Ok(open)
    }

    async fn connect(&self) -> Result<Connection, ConnectError> {
        let opening = tokio::time::timeout(HANDSHAKE_TIMEOUT, self.open());
        let opened = opening
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let mut back_off = self.back_off.lock();
        match opened {
            Ok(open) => {
                *back_off = BackOff::default();
                Ok(open)
            }
            Err(source) => {
                self.health.failed(self.dialer.address(), &source);
                let error = ConnectError {
                    address: self.dialer.address().clone(),
                    source: Arc::new(source),
                };
                let longest = match self.dialer.address().is_unix() {
                    true => LONGEST_LOCAL_PAUSE,
                    false => LONGEST_PAUSE,
                };
                back_off.pause = (back_off.pause * 2).clamp(FIRST_PAUSE, longest);
                back_off.last = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    async fn open(&self) -> io::Result<Connection> {
        let received = Received::default();
        let counted = received.clone();
        let stream = InspectReader::new(self.dialer.dial().await?, move |read| counted.count(read));
        let (calls, mut connection) = Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(UPSTREAM_WINDOW)
            .max_frame_size(MAX_FRAME_SIZE)
            .max_header_list_size(UPSTREAM_HEADER_LIST)
            .max_send_buffer_size(SEND_BUFFER)
            .data_frame_budget(DATA_FRAME_BUDGET)
            .max_concurrent_reset_streams(1024)
            // Answers to calls that clients have cancelled, when there are many of these: no reason
            // to give up the calls of others (h2's limit is 1,024 in a connection's lifetime).
            .max_local_error_reset_streams(None)
            .enable_push(false)
            .handshake(stream)
            .await
            .map_err(|error| match error.into_io() {
                Some(error) => error,
                None => io::ErrorKind::InvalidData.into(),
            })?;
        self.health.opened(self.dialer.address());
        let open = Connection {
            calls,
            open: Arc::default(),
        };
        // A Unix socket's other end cannot vanish in silence.
        let by_network = !self.dialer.address().is_unix();
        let ping_pong = by_network.then(|| connection.ping_pong()).flatten();
        let watched = ping_pong
            .map(|ping_pong| until_dead(open.open.clone(), ping_pong, received, self.keep_alive));
        let driven = drive(connection, watched, self.keep_alive);
        let (health, address) = (self.health.clone(), self.dialer.address().clone());
        task::spawn("upstream connection", async move {
            let ended = driven.await;
            health.closed();
            if let Err(error) = ended {
                health.failed(&address, &error);
            }
        });
        Ok(open)
    }
}

impl Slot {
    fn open(&self) -> Option<Connection> {
        let mut open = self.open.lock();
        let connection = open.as_mut()?;
        // Never pending: that is only so for a handle whose own last call waits to be opened.
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        if let std::task::Poll::Ready(Err(_)) = connection.calls.poll_ready(&mut context) {
            *open = None;
        }
        open.clone()
    }
}

/// Carries one connection to its end, or gives it up when the watch on it says so.
async fn drive<S>(
    connection: h2::client::Connection<S, Bytes>,
    watched: Option<impl Future<Output = ()>>,
    silence: Duration,
) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let ended = |ended: Result<(), h2::Error>| ended.map_err(|error| error.to_string());
    let Some(watched) = watched else {
        return ended(connection.await);
    };
    tokio::select! {
        result = connection => ended(result),
        () = watched => Err(format!("no sign of life for {silence:?} twice")),
    }
}
