//! The threads that carry forwarded calls, one for each core unless there are many; each has a runtime
//! of its own. A connection stays on the shard that it was given to, so nothing is stolen or woken
//! across cores; one multi-threaded runtime costs more than half as much CPU again for each call.

use std::io;
use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use slab::Slab;
use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;

use super::listen::Accepted;
use super::watchdog::{Pulse, Watchdog};
use super::{busy_poll, connection};
use crate::http2::connection::{Connection, Farewell};
use crate::http2::frame_memory;
use crate::meters::METERS;
use crate::proxy::Proxy;
use crate::speculation::clients::observation::Observation;
use crate::task;
use crate::workspace::peer::Peer;

/// Connections that may wait for a shard to pick them up.
const BACKLOG: usize = 1024;

/// All shards of one server.
pub struct Shards {
    shards: Vec<Shard>,
    shutdown: watch::Sender<bool>,
}

/// How shards carry calls.
#[derive(Clone, Copy)]
pub struct ShardSettings {
    /// How many calls a client may have open on one connection.
    pub max_streams: u32,
    /// For how long they poll before they sleep.
    pub busy_poll: Duration,
    /// For how long they drain after a shutdown, at most.
    pub grace: Duration,
}

struct Shard {
    connections: mpsc::Sender<Accepted>,
    open: Arc<AtomicUsize>,
    runs: Runs,
}

/// Where a shard runs.
enum Runs {
    /// On the thread that accepts connections: the first shard, to which a lone connection goes
    /// without waking another thread.
    Here(tokio::task::JoinHandle<Option<()>>),
    Thread(std::thread::JoinHandle<()>),
}

impl Shards {
    /// Starts so many shards with a proxy each, the first of them on the current runtime, which is
    /// one of `super::runtime`. The watchdog hears of a shard that is stuck.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(
        proxy: impl Fn() -> Proxy,
        count: NonZero<usize>,
        settings: ShardSettings,
        watchdog: &mut Watchdog,
    ) -> io::Result<Self> {
        let (shutdown, _) = watch::channel(false);
        let shards = (0..count.get())
            .map(|index| {
                let (connections, accepted) = mpsc::channel(BACKLOG);
                let open = Arc::new(AtomicUsize::new(0));
                let worker = Worker {
                    proxy: Arc::new(proxy()),
                    settings,
                    open: open.clone(),
                    shutdown: shutdown.subscribe(),
                    carried: Arc::default(),
                };
                let pulse = watchdog.pulse(format!("proxy-{index}"));
                let runs = match index {
                    0 => Runs::Here(task::spawn("proxy-0", worker.run(accepted, pulse))),
                    _ => {
                        let runtime = super::runtime().build()?;
                        let thread = std::thread::Builder::new()
                            .name(format!("proxy-{index}"))
                            .spawn(move || runtime.block_on(worker.run(accepted, pulse)))?;
                        Runs::Thread(thread)
                    }
                };
                Ok(Shard {
                    connections,
                    open,
                    runs,
                })
            })
            .collect::<io::Result<_>>()?;
        Ok(Shards { shards, shutdown })
    }

    /// Gives a connection to the shard with the fewest.
    ///
    /// # Errors
    /// When too many wait there already, or what the system said.
    pub fn serve(&self, accepted: Accepted) -> io::Result<()> {
        let least = |shard: &&Shard| shard.open.load(Ordering::Relaxed);
        let Some(shard) = self.shards.iter().min_by_key(least) else {
            return Ok(());
        };
        let accepted = match shard.runs {
            Runs::Here(_) => accepted,
            Runs::Thread(_) => accepted.detach()?,
        };
        shard.open.fetch_add(1, Ordering::Relaxed);
        shard.connections.try_send(accepted).map_err(|_| {
            shard.open.fetch_sub(1, Ordering::Relaxed);
            io::Error::other("too many connections wait to be served")
        })
    }

    /// Lets calls in progress end, for at most the grace period, and stops.
    pub async fn shut_down(self) {
        self.shutdown.send_replace(true);
        for shard in self.shards {
            drop(shard.connections);
            let ended = match shard.runs {
                Runs::Here(task) => task.await.is_ok_and(|ended| ended.is_some()),
                Runs::Thread(thread) => {
                    task::blocking("drain", move || thread.join().is_ok()).await == Some(true)
                }
            };
            if !ended {
                tracing::error!("a proxy thread panicked");
            }
        }
    }
}

struct Worker {
    proxy: Arc<Proxy>,
    settings: ShardSettings,
    open: Arc<AtomicUsize>,
    shutdown: watch::Receiver<bool>,
    carried: Arc<Carried>,
}

impl Worker {
    async fn run(mut self, mut accepted: mpsc::Receiver<Accepted>, pulse: Pulse) {
        task::spawn("pulse", pulse.beat());
        task::spawn("busy poll", busy_poll::keep(self.settings.busy_poll));
        task::spawn("frame memory", frame_memory::keep());
        let serving = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                next = accepted.recv() => match next {
                    Some(next) => next,
                    None => break,
                },
                _ = self.shutdown.wait_for(|stop| *stop) => break,
            };
            let connection = self.connection(accepted);
            task::spawn("connection", serving.track_future(connection));
        }
        self.carried.end();
        serving.close();
        if tokio::time::timeout(self.settings.grace, serving.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                open = serving.len(),
                "connections were still open after the grace period"
            );
        }
    }

    fn connection(&self, accepted: Accepted) -> impl Future<Output = ()> + use<> {
        let proxy = self.proxy.clone();
        let max_streams = self.settings.max_streams;
        let carried = self.carried.clone();
        let open = self.open.clone();
        async move {
            let _present = METERS.clients.enter();
            let peer = Arc::new(Peer::new(accepted.origin()));
            let engine = proxy.engine.clone();
            let ended = match accepted.into_stream().await {
                Ok(stream) => {
                    let connection = Connection::server(stream, max_streams);
                    let _carried = carried.enter(connection.farewell());
                    connection::serve(connection, peer.clone(), proxy).await
                }
                Err(error) => Err(error.to_string()),
            };
            open.fetch_sub(1, Ordering::Relaxed);
            if let Some(engine) = &engine {
                engine.observe(Observation::Disconnected(peer.id()));
            }
            if let Err(error) = ended {
                tracing::debug!(client = %peer.origin(), error, "a connection ended with an error");
            }
        }
    }
}

/// The connections of a shard. It tells them when it ends, so that none need ask whenever it is woken.
#[derive(Default)]
struct Carried(Mutex<Farewells>);

#[derive(Default)]
struct Farewells {
    due: Slab<Farewell>,
    /// Whether they have been said.
    are_said: bool,
}

/// A connection that is carried until this is dropped.
struct Entered {
    carried: Arc<Carried>,
    key: usize,
}

impl Carried {
    /// A connection begins; it ends soon if the others have been told to.
    fn enter(self: Arc<Self>, farewell: Farewell) -> Entered {
        let mut farewells = self.0.lock();
        if farewells.are_said {
            farewell.say();
        }
        let key = farewells.due.insert(farewell);
        drop(farewells);
        Entered { carried: self, key }
    }

    /// Has all of them end, as soon as their calls have ended.
    fn end(&self) {
        let mut farewells = self.0.lock();
        farewells.are_said = true;
        for (_, farewell) in &farewells.due {
            farewell.say();
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.carried.0.lock().due.remove(self.key);
    }
}
