//! The threads that carry forwarded calls: one for each core, each with a runtime of its own.
//! A connection stays on the shard that it was given to, so nothing is stolen or woken across
//! cores; one multi-threaded runtime costs more than half as much CPU again for each call.

use std::io;
use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;

use super::authority::AuthorityRewrite;
use super::listen::Accepted;
use crate::backend::dial::Dialer;
use crate::backend::http2::{
    CONNECTION_WINDOW, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE, STREAM_WINDOW, UpstreamHealth,
};
use crate::proxy::Proxy;
use crate::speculation::Engine;
use crate::speculation::observation::Observation;
use crate::task;
use crate::workspace::peer::Peer;

/// Connections that may wait for a shard to pick them up.
const BACKLOG: usize = 1024;
/// How many streams a client may have open on one connection.
const MAX_CONCURRENT_STREAMS: u32 = 100_000;
/// A client that cancels a burst of calls is no attack: h2's own limit (20) closes the connection.
const MAX_PENDING_RESETS: usize = 10_000;
/// How long a connection without any call may last after a request to stop. hyper waits for the
/// client's side of the handshake, and a client that has nothing to say may never send it.
const SILENT_GRACE: Duration = Duration::from_secs(1);

/// All shards of one server.
pub struct Shards {
    shards: Vec<Shard>,
    shutdown: watch::Sender<bool>,
}

struct Shard {
    connections: mpsc::Sender<Accepted>,
    open: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

impl Shards {
    /// Starts one shard for each core. After a shutdown they drain for at most `grace`.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(
        upstream: &Dialer,
        health: &Arc<UpstreamHealth>,
        engine: Option<&Engine>,
        grace: Duration,
    ) -> io::Result<Self> {
        let (shutdown, _) = watch::channel(false);
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let shards = (0..cores)
            .map(|index| {
                let proxy = Proxy::new(upstream.clone(), health.clone(), engine.cloned());
                let (connections, accepted) = mpsc::channel(BACKLOG);
                let open = Arc::new(AtomicUsize::new(0));
                let worker = Worker {
                    proxy: Arc::new(proxy),
                    engine: engine.cloned(),
                    open: open.clone(),
                    shutdown: shutdown.subscribe(),
                    grace,
                };
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()?;
                let thread = std::thread::Builder::new()
                    .name(format!("proxy-{index}"))
                    .spawn(move || runtime.block_on(worker.run(accepted)))?;
                Ok(Shard {
                    connections,
                    open,
                    thread,
                })
            })
            .collect::<io::Result<_>>()?;
        Ok(Shards { shards, shutdown })
    }

    /// Gives a connection to the shard with the fewest.
    pub fn serve(&self, accepted: Accepted) -> io::Result<()> {
        let least = |shard: &&Shard| shard.open.load(Ordering::Relaxed);
        let Some(shard) = self.shards.iter().min_by_key(least) else {
            return Ok(());
        };
        shard.open.fetch_add(1, Ordering::Relaxed);
        shard.connections.try_send(accepted).map_err(|_| {
            shard.open.fetch_sub(1, Ordering::Relaxed);
            io::Error::other("too many connections wait to be served")
        })
    }

    /// Lets calls in progress end, for at most the grace period, and stops. Blocks.
    pub fn shut_down(self) {
        self.shutdown.send_replace(true);
        for shard in self.shards {
            drop(shard.connections);
            if shard.thread.join().is_err() {
                tracing::error!("a proxy thread panicked");
            }
        }
    }
}

struct Worker {
    proxy: Arc<Proxy>,
    engine: Option<Engine>,
    open: Arc<AtomicUsize>,
    shutdown: watch::Receiver<bool>,
    grace: Duration,
}

impl Worker {
    async fn run(self, mut accepted: mpsc::Receiver<Accepted>) {
        let serving = TaskTracker::new();
        let mut shutdown = self.shutdown.clone();
        loop {
            let accepted = tokio::select! {
                next = accepted.recv() => match next {
                    Some(next) => next,
                    None => break,
                },
                () = stopped(&mut shutdown) => break,
            };
            let connection = self.connection(accepted);
            task::spawn("connection", serving.track_future(connection));
        }
        serving.close();
        if tokio::time::timeout(self.grace, serving.wait())
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
        let engine = self.engine.clone();
        let open = self.open.clone();
        let mut shutdown = self.shutdown.clone();
        async move {
            let peer = Arc::new(Peer::new(accepted.origin()));
            let stream = match accepted.into_stream().await {
                Ok(stream) => stream,
                Err(error) => {
                    open.fetch_sub(1, Ordering::Relaxed);
                    return tracing::debug!(client = %peer.origin(), %error, "no connection was made");
                }
            };
            let fresh = AtomicBool::new(true);
            let serving = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_frame_size(MAX_FRAME_SIZE)
                .max_header_list_size(MAX_HEADER_LIST_SIZE)
                .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
                .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
                .max_local_error_reset_streams(None)
                .auto_date_header(false)
                .serve_connection(
                    TokioIo::new(AuthorityRewrite::new(stream)),
                    service_fn(|request| {
                        let proxy = proxy.clone();
                        let peer = peer.clone();
                        let first = fresh.swap(false, Ordering::Relaxed);
                        async move {
                            Ok::<_, std::convert::Infallible>(
                                proxy.call(&peer, first, request).await,
                            )
                        }
                    }),
                );
            tokio::pin!(serving);
            let ended = tokio::select! {
                ended = &mut serving => ended,
                () = stopped(&mut shutdown) => {
                    serving.as_mut().graceful_shutdown();
                    match tokio::time::timeout(SILENT_GRACE, serving.as_mut()).await {
                        Ok(ended) => ended,
                        Err(_) if fresh.load(Ordering::Relaxed) => Ok(()),
                        Err(_) => serving.await,
                    }
                }
            };
            if let Err(error) = ended {
                tracing::debug!(peer = peer.id(), %error, "a connection ended with an error");
            }
            open.fetch_sub(1, Ordering::Relaxed);
            if let Some(engine) = engine {
                engine.observe(Observation::Disconnected(peer.id()));
            }
        }
    }
}

/// Waits until the shards are told to stop, or nobody is left to tell them.
async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    let _ = shutdown.wait_for(|stop| *stop).await;
}
