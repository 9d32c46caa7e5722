//! The HTTP/2 connections of one thread to one upstream address: dialled when first needed and
//! again after they ended, with a back-off while that fails.

use std::convert::Infallible;
use std::future::{pending, poll_fn};
use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::dial::Dialer;
use super::health::UpstreamHealth;
use super::keep_alive::until_dead;
use crate::address::Address;
use crate::http2::HANDSHAKE_TIMEOUT;
use crate::http2::connection::{Calls, Connection, Pulse};
use crate::http2::fields::Fields;
use crate::http2::stream::{Load, StreamError};
use crate::task;

/// One HTTP/2 connection limits 64 concurrent streams to about half of what two of them carry.
const CONNECTIONS: usize = 2;
/// Where the upstream takes only so many streams on a connection (100, of many servers), there are
/// further ones: a call that takes long must not keep others waiting, as it would not if each client
/// had a connection of its own.
const MOST: usize = 32;
/// Further ones are given up when they were of no use for so long.
const USELESS: Duration = Duration::from_secs(60);
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
    usual: Slots,
    /// For calls with long headers.
    aside: Slots,
    back_off: Mutex<BackOff>,
}

/// Places for connections of which any will do.
struct Slots([Arc<Slot>; MOST]);

#[derive(Default)]
struct Slot {
    open: Mutex<Option<Calls>>,
    dialling: tokio::sync::Mutex<()>,
    is_further: bool,
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
            usual: Slots::default(),
            aside: Slots::default(),
            back_off: Mutex::default(),
        }
    }

    /// A connection that takes calls, as far as is known.
    ///
    /// # Errors
    /// `ConnectError`, when there is none within `patience`.
    pub async fn ready(&self, headers: Headers, patience: Duration) -> Result<Calls, ConnectError> {
        let slots = match headers {
            Headers::Usual => &self.usual,
            Headers::Long => &self.aside,
        };
        match slots.lightest().open() {
            Some(open) => Ok(open),
            // Boxed: it is rare, and large for something that is part of every call.
            None => Box::pin(self.connected(slots, patience)).await,
        }
    }

    async fn connected(&self, slots: &Slots, patience: Duration) -> Result<Calls, ConnectError> {
        let deadline = Instant::now() + patience;
        loop {
            let slot = slots.lightest();
            match self.turn(slot, Instant::now()).await {
                // Others have waited for it, too. If they have filled it, there may be another.
                Ok(open) if open.load().is_full && !Arc::ptr_eq(slot, slots.lightest()) => {}
                Ok(open) => return Ok(open),
                Err(error) => match slots.lightest_open() {
                    Some(open) => return Ok(open),
                    None if Instant::now() >= deadline => return Err(error),
                    None => {}
                },
            }
        }
    }

    /// Connects, after the pause that earlier failures make due, or waits for whoever does so
    /// already. A failure since `arrived` is shared.
    async fn turn(&self, slot: &Arc<Slot>, arrived: Instant) -> Result<Calls, ConnectError> {
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
        let open = self.connect(slot).await?;
        *slot.open.lock() = Some(open.clone());
        Ok(open)
    }

    async fn connect(&self, slot: &Arc<Slot>) -> Result<Calls, ConnectError> {
        let opening = tokio::time::timeout(HANDSHAKE_TIMEOUT, self.open(slot));
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

    async fn open(&self, slot: &Arc<Slot>) -> io::Result<Calls> {
        let (calls, connection) = Connection::client(self.dialer.dial().await?);
        let known = [&self.usual, &self.aside].map(Slots::max_streams);
        if let Some(max_streams) = known.into_iter().flatten().next() {
            calls.expect_max_streams(max_streams);
        }
        self.health.opened(self.dialer.address());
        // A Unix socket's other end cannot vanish in silence.
        let by_network = !self.dialer.address().is_unix();
        let watched = by_network.then(|| until_dead(connection.pulse(), self.keep_alive));
        let retired = slot
            .is_further
            .then(|| retire(Arc::downgrade(slot), connection.pulse()));
        let driven = drive(connection, watched, self.keep_alive);
        let (health, address) = (self.health.clone(), self.dialer.address().clone());
        task::spawn("upstream connection", async move {
            let ended = match retired {
                None => driven.await,
                Some(retired) => tokio::select! {
                    ended = driven => ended,
                    never = retired => match never {},
                },
            };
            health.closed();
            if let Err(error) = ended {
                health.failed(&address, &error);
            }
        });
        Ok(calls)
    }
}

/// The first that carries few streams, and no transfer which others would wait behind; else the one
/// that carries least. No more are looked at than it takes, and further ones only when the others are
/// full.
fn lightest(loads: impl Iterator<Item = Load>) -> usize {
    let (mut lightest, mut least) = (0, None::<Load>);
    for (index, load) in loads.enumerate() {
        if index >= CONNECTIONS && least.is_some_and(|least| !least.is_full) {
            break;
        }
        if !load.is_full && load.transfers == 0 && load.streams < FEW {
            return index;
        }
        if least.is_none_or(|least| load < least) {
            (lightest, least) = (index, Some(load));
        }
    }
    lightest
}

/// Takes a further connection out of its slot when it has been of no use for a while: then it ends.
async fn retire(slot: Weak<Slot>, pulse: Pulse) -> Infallible {
    let mut heard = None;
    loop {
        tokio::time::sleep(USELESS).await;
        let now = pulse.heard();
        if heard.replace(now) == Some(now) && !pulse.has_calls() {
            break;
        }
    }
    if let Some(slot) = slot.upgrade() {
        *slot.open.lock() = None;
    }
    pending().await
}

impl Default for Slots {
    fn default() -> Self {
        Slots(std::array::from_fn(|index| {
            Arc::new(Slot {
                is_further: index >= CONNECTIONS,
                ..Slot::default()
            })
        }))
    }
}

impl Slots {
    fn lightest(&self) -> &Arc<Slot> {
        &self.0[lightest(self.0.iter().map(|slot| slot.load()))]
    }

    /// Where calls can go if there is no other connection to be had.
    fn lightest_open(&self) -> Option<Calls> {
        let open = self.0.iter().filter_map(|slot| slot.open());
        open.min_by_key(Calls::load)
    }

    /// How many calls the upstream takes on a connection, if it has said so.
    fn max_streams(&self) -> Option<usize> {
        self.0.iter().find_map(|slot| slot.max_streams())
    }
}

impl Slot {
    fn load(&self) -> Load {
        let open = self.open.lock();
        open.as_ref().map(Calls::load).unwrap_or_default()
    }

    fn max_streams(&self) -> Option<usize> {
        self.open.lock().as_ref()?.max_streams()
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
    use std::pin::pin;

    use http::Method;
    use http::uri::{Authority, PathAndQuery, Scheme};

    use super::*;
    use crate::http2::hpack::Pseudo;

    #[test]
    fn a_second_connection_is_used_beside_a_transfer_and_for_many_streams() {
        let chosen = |loads: [(usize, usize); 2]| {
            let loads = loads.into_iter();
            lightest(loads.map(|(transfers, streams)| Load {
                is_full: false,
                transfers,
                streams,
            }))
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

    #[test]
    fn further_connections_are_used_when_those_before_them_are_full() {
        let takes = 4;
        let chosen = |streams: [usize; 4]| {
            let loads = streams.into_iter();
            lightest(loads.map(|streams| Load {
                is_full: streams >= takes,
                transfers: 0,
                streams,
            }))
        };
        assert_eq!(chosen([3, 0, 0, 0]), 0);
        assert_eq!(chosen([4, 0, 0, 0]), 1);
        assert_eq!(chosen([4, 4, 0, 0]), 2);
        assert_eq!(chosen([4, 4, 4, 0]), 3);
        assert_eq!(chosen([4, 3, 0, 0]), 1);
        assert_eq!(chosen([5, 4, 6, 7]), 1, "all are full");
    }

    #[tokio::test(start_paused = true)]
    async fn a_further_connection_is_given_up_when_it_carried_no_call_for_a_while() {
        let (near, _far) = tokio::io::duplex(1024);
        let (calls, connection) = Connection::client(near);
        let slot = Arc::new(Slot {
            open: Mutex::new(Some(calls.clone())),
            is_further: true,
            ..Slot::default()
        });
        let mut retired = pin!(retire(Arc::downgrade(&slot), connection.pulse()));
        let mut later = async || tokio::time::timeout(USELESS * 3, &mut retired).await;
        let (scheme, authority) = (Scheme::HTTP, Authority::from_static("localhost"));
        let request = (
            Method::POST,
            scheme,
            authority,
            PathAndQuery::from_static("/"),
        );
        let request = Pseudo::Request(Box::new(request));
        let call = calls.begin(request, Fields::new(), true).unwrap();
        assert!(later().await.is_err());
        assert!(slot.open().is_some());
        drop(call);
        assert!(later().await.is_err());
        assert!(slot.open().is_none());
    }
}
