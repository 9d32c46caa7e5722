//! The HTTP/2 connections of one thread to one upstream address: dialled when first needed and
//! again after they ended, with a back-off while that fails.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::dial::Dialer;
use super::health::UpstreamHealth;
use super::keep_alive::until_dead;
use crate::address::Address;
use crate::http2::HANDSHAKE_TIMEOUT;
use crate::http2::connection::{Calls, Connection};
use crate::http2::fields::Fields;
use crate::http2::stream::{Load, StreamError};
use crate::task;

/// One HTTP/2 connection limits 64 concurrent streams to about half of what two of them carry.
const CONNECTIONS: usize = 2;
/// How many streams one of them carries before the other is used: where there are few, whatever was
/// used last is quickest.
const FEW: usize = 8;
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
    pub fn of(headers: &Fields) -> Self {
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
    back_off: Mutex<BackOff>,
}

#[derive(Default)]
struct Slot {
    open: Mutex<Option<Calls>>,
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
            back_off: Mutex::default(),
        }
    }

    /// A connection that takes calls, as far as is known.
    ///
    /// # Errors
    /// `ConnectError`, when there is none within `patience`.
    pub async fn ready(&self, headers: Headers, patience: Duration) -> Result<Calls, ConnectError> {
        let slot = match headers {
            Headers::Usual => &self.slots[lightest(self.slots.iter().map(Slot::load))],
            Headers::Long => &self.aside,
        };
        match slot.open() {
            Some(open) => Ok(open),
            // Boxed: it is rare, and large for something that is part of every call.
            None => Box::pin(self.connected(slot, patience)).await,
        }
    }

    async fn connected(&self, slot: &Slot, patience: Duration) -> Result<Calls, ConnectError> {
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
    async fn turn(&self, slot: &Slot, arrived: Instant) -> Result<Calls, ConnectError> {
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

    async fn connect(&self) -> Result<Calls, ConnectError> {
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

    async fn open(&self) -> io::Result<Calls> {
        let (calls, connection) = Connection::client(self.dialer.dial().await?);
        self.health.opened(self.dialer.address());
        // A Unix socket's other end cannot vanish in silence.
        let by_network = !self.dialer.address().is_unix();
        let watched = by_network.then(|| until_dead(connection.pulse(), self.keep_alive));
        let driven = drive(connection, watched, self.keep_alive);
        let (health, address) = (self.health.clone(), self.dialer.address().clone());
        task::spawn("upstream connection", async move {
            let ended = driven.await;
            health.closed();
            if let Err(error) = ended {
                health.failed(&address, &error);
            }
        });
        Ok(calls)
    }
}

/// The first that carries few streams, and no transfer which others would wait behind; else the one
/// that carries least. No more are looked at than it takes.
fn lightest(loads: impl Iterator<Item = Load>) -> usize {
    let (mut lightest, mut least) = (0, None);
    for (index, load) in loads.enumerate() {
        if load.transfers == 0 && load.streams < FEW {
            return index;
        }
        if least.is_none_or(|least| load < least) {
            (lightest, least) = (index, Some(load));
        }
    }
    lightest
}

impl Slot {
    fn load(&self) -> Load {
        let open = self.open.lock();
        open.as_ref().map(Calls::load).unwrap_or_default()
    }

    fn open(&self) -> Option<Calls> {
        let mut open = self.open.lock();
        if open.as_ref().is_some_and(|calls| !calls.is_open()) {
            *open = None;
        }
        open.clone()
    }
}

/// Carries one connection to its end, or gives it up when the watch on it says so.
async fn drive<S>(
    mut connection: Connection<S>,
    watched: Option<impl Future<Output = ()>>,
    silence: Duration,
) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let carried = poll_fn(|cx| connection.poll(cx, drop));
    let ended = |ended: Result<(), StreamError>| ended.map_err(|error| error.to_string());
    let Some(watched) = watched else {
        return ended(carried.await);
    };
    tokio::select! {
        result = carried => ended(result),
        () = watched => Err(format!("no sign of life for {silence:?} twice")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_connection_is_used_beside_a_transfer_and_for_many_streams() {
        let chosen = |loads: [(usize, usize); 2]| {
            let loads = loads.into_iter();
            lightest(loads.map(|(transfers, streams)| Load { transfers, streams }))
        };
        assert_eq!(chosen([(0, 0), (0, 0)]), 0);
        assert_eq!(chosen([(0, FEW - 1), (0, 0)]), 0, "few are no load");
        assert_eq!(chosen([(0, FEW), (0, 0)]), 1);
        assert_eq!(
            chosen([(1, 1), (0, 5)]),
            1,
            "nobody waits behind a transfer"
        );
        assert_eq!(chosen([(1, 1), (1, 2)]), 0);
        assert_eq!(chosen([(0, 30), (0, 29)]), 1);
        assert_eq!(chosen([(0, 30), (0, 30)]), 0);
    }
}
