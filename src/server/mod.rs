//! The daemon: listeners, the shards that serve their connections, the engine beside them, the
//! admin socket, and an orderly end.

mod admin;
mod authority;
mod connection;
mod hpack;
pub mod listen;
mod shards;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

use crate::backend::health::UpstreamHealth;
use crate::backend::remote::Remote;
use crate::backend::upstream::Upstream;
use crate::config::{Config, Mode};
use crate::proxy::{Capabilities, Proxy};
use crate::speculation::Engine;
use crate::speculation::engine::{EngineParts, Request, engine};
use crate::speculation::flights::Flights;
use crate::speculation::store::Store;
use crate::task;
use listen::{ListenError, Listener};
use shards::Shards;

pub use admin::{STATUS_PATH, StatusPage, WAIT_PATH};

/// How long calls in progress may take to end after a request to stop.
const DRAIN: Duration = Duration::from_secs(20);
/// How long recording may take after that.
const FINISH: Duration = Duration::from_secs(10);
/// How long to leave a listener alone that cannot accept, for want of descriptors say.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why the daemon could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// An address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The system refused a thread or a runtime.
    #[error("cannot start: {0}")]
    System(#[from] io::Error),
}

/// Serves until `shutdown` completes, then drains. Call it before the process has other threads.
///
/// # Errors
/// `ServerError`, when it could not start; nothing listens then.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> Result<(), ServerError> {
    let mut listeners = Vec::with_capacity(config.listen.len());
    for address in &config.listen {
        listeners.push(Listener::bind(address).await?);
    }
    let admin_listener = Listener::bind(&config.admin).await?;
    let health = Arc::new(UpstreamHealth::default());
    let flights = Flights::new(config.max_speculative.get());
    let engine = match config.mode {
        Mode::None => None,
        _ => Some(EngineThread::start(&config, health.clone(), flights.clone()).await?),
    };
    let (state_dir, upstream) = (&config.state_dir, &config.upstream);
    let capabilities = Arc::new(Capabilities::load(state_dir, upstream, config.compat));
    let proxy = || Proxy {
        upstream: Upstream::new(upstream.clone(), health.clone(), config.patience),
        health: health.clone(),
        capabilities: capabilities.clone(),
        engine: engine.as_ref().map(|engine| engine.handle.clone()),
    };
    let shards = Shards::start(proxy, config.max_streams, DRAIN)?;
    let shards = Arc::new(shards);

    let tasks = TaskTracker::new();
    let mut accepting = Vec::new();
    for listener in listeners {
        tracing::info!(address = %listener.address(), upstream = %config.upstream, "listening");
        let shards = shards.clone();
        accepting.push(task::spawn(
            "listener",
            tasks.track_future(accept(listener, shards)),
        ));
    }
    let admin = admin::Admin {
        upstream: config.upstream.clone(),
        health,
        flights,
        engine: engine.as_ref().map(|engine| engine.requests.clone()),
    };
    let admin_page = tasks.track_future(admin::serve(admin_listener, admin));
    accepting.push(task::spawn("admin listener", admin_page));
    notify_service_manager(sd_notify::NotifyState::Ready);

    shutdown.await;
    tracing::info!("stopping: no new connections; calls in progress may end");
    notify_service_manager(sd_notify::NotifyState::Stopping);
    for task in &accepting {
        task.abort();
    }
    tasks.close();
    tasks.wait().await;
    if let Some(shards) = Arc::into_inner(shards) {
        task::blocking("drain", move || shards.shut_down()).await;
    }
    if let Some(engine) = engine {
        engine.finish().await;
    }
    tracing::info!("stopped");
    Ok(())
}

async fn accept(listener: Listener, shards: Arc<Shards>) {
    loop {
        let served = match listener.accept().await {
            Ok((stream, origin)) => shards.serve(stream, origin),
            Err(error) => Err(error),
        };
        if let Err(error) = served {
            tracing::warn!(address = %listener.address(), %error, "a connection was refused");
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
    }
}

fn notify_service_manager(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "the service manager could not be notified");
    }
}

/// The thread that the engine runs on, away from the forwarding path.
struct EngineThread {
    handle: Engine,
    requests: mpsc::Sender<Request>,
    thread: std::thread::JoinHandle<()>,
    stop: oneshot::Sender<()>,
}

impl EngineThread {
    async fn start(
        config: &Config,
        health: Arc<UpstreamHealth>,
        flights: Arc<Flights>,
    ) -> Result<Self, ServerError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (stop, stopped) = oneshot::channel();
        let (started, ready) = oneshot::channel();
        let config = config.clone();
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                runtime.block_on(async move {
                    let upstream = Upstream::new(config.upstream, health, config.patience);
                    let (handle, requests, runner) = engine(EngineParts {
                        mode: config.mode,
                        backend: Arc::new(Remote::new(upstream)),
                        flights,
                        store: Arc::new(Store::open(&config.state_dir)),
                    });
                    // Nobody waits for it only if the server is gone.
                    let _ = started.send((handle, requests));
                    let running = task::spawn("engine", runner.run());
                    // Told to stop, or left alone.
                    let _ = stopped.await;
                    running.abort();
                });
                runtime.shutdown_timeout(Duration::from_secs(1));
            })?;
        let (handle, requests) = ready
            .await
            .map_err(|_| io::Error::other("the speculation engine did not start"))?;
        Ok(EngineThread {
            handle,
            requests,
            thread,
            stop,
        })
    }

    /// Lets the engine record what has been built, for a bounded time, and ends it.
    async fn finish(self) {
        let (reply, done) = oneshot::channel();
        let asked = self.requests.send(Request::Finish(reply)).await;
        if asked.is_ok() && tokio::time::timeout(FINISH, done).await.is_err() {
            tracing::warn!("recording did not end in time; the last build may not be recorded");
        }
        // A thread that has ended needs no telling.
        let _ = self.stop.send(());
        let thread = self.thread;
        if task::blocking("engine", move || thread.join().is_err()).await != Some(false) {
            tracing::error!("the engine's thread panicked");
        }
    }
}
