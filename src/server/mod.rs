//! The daemon: listeners, the shards that serve their connections, the engine beside them, the
//! admin socket, and an orderly end.

mod admin;
pub mod admission;
mod busy_poll;
mod connection;
pub mod listen;
mod metrics;
mod pages;
pub mod passed;
mod preemption;
pub mod runs;
mod shards;
mod watchdog;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Builder;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

use crate::address::ListenAddress;
use crate::backend::embedded::{Embedded, EmbeddedError};
use crate::backend::remote::Remote;
use crate::backend::upstream::{RouteError, Routes, Upstream};
use crate::config::{Config, ConfigError, Mode};
use crate::http2::frame_memory;
use crate::proxy::{Capabilities, Joining, Proxy};
use crate::speculation::Engine;
use crate::speculation::engine::{EngineParts, Request, engine};
use crate::speculation::flights::Flights;
use crate::speculation::flights::lane_memory::{self, LaneMemory};
use crate::speculation::journal::store::JournalStore;
use crate::speculation::records::store::Store;
use crate::task;
use crate::tls::TlsError;
use crate::tls::client::ClientTls;
use crate::tls::server::ServerTls;
use admission::{Admission, make_room};
use listen::{ListenError, Listener};
use passed::PassedSockets;
use runs::Runs;
use shards::{ShardSettings, Shards};
use watchdog::Watchdog;

pub use admin::{
    BUILDS_PATH, BuildsList, EXPLAIN_PATH, RECORDS_PATH, RUNS_PATH, RecordsList, STATUS_PATH,
    StatusPage, WAIT_PATH,
};

/// How long calls in progress may take to end after a request to stop.
const DRAIN: Duration = Duration::from_secs(20);
/// How long recording may take after that.
const FINISH: Duration = Duration::from_secs(10);
/// How long to leave a listener alone that cannot accept, for want of descriptors say.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Stack of the threads that adapt recorded actions, in bytes: they go down trees by recursion, as
/// deep as 256 directories, which takes more than 2 MiB where the compiler does not optimise.
const PLANNING_STACK: usize = 8 * 1024 * 1024;

/// How many commands may ask the admin socket at once.
const MAX_ADMIN_CONNECTIONS: usize = 256;

/// How many scrapers may read metrics at once; further ones wait.
const MAX_SCRAPERS: usize = 16;

/// Why the daemon could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// An address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A file or name for TLS cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The way upstream cannot be gone as it is set.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// There is no embedded backend.
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    /// The settings and what the service manager passed do not go together.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The system refused a thread or a runtime.
    #[error("cannot start: {0}")]
    System(#[from] io::Error),
}

impl ServerError {
    /// Whether other settings would help.
    pub fn is_of_settings(&self) -> bool {
        matches!(
            self,
            ServerError::Tls(_)
                | ServerError::Route(_)
                | ServerError::Config(_)
                | ServerError::Listen(ListenError::NotPassed { .. } | ListenError::Passed(_))
        )
    }
}

/// To build a runtime of one thread, for calls or what comes with them.
pub fn runtime() -> Builder {
    let scheduling = preemption::watch();
    let mut runtime = Builder::new_current_thread();
    runtime
        .enable_all()
        .on_thread_park(busy_poll::idle)
        .on_thread_unpark(move || {
            busy_poll::woke();
            scheduling();
        });
    runtime
}

/// Serves until `shutdown` completes, then drains. Call it before the process has other threads.
///
/// # Errors
/// `ServerError`, when it could not start; nothing listens then.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> Result<(), ServerError> {
    let tls = upstream_tls(&config)?;
    let embedded = config.embedded.as_ref().map(Embedded::start).transpose()?;
    let (embedded, embedded_thread) = embedded.unzip();
    let routes = Arc::new(Routes::new(&config, tls, embedded.clone())?);
    let listeners = bind(&config).await?;
    let for_owner = Arc::new(Admission::new(&[], MAX_ADMIN_CONNECTIONS));
    let admin_listener = Listener::bind(&config.admin, None, &for_owner).await?;
    let metrics_listener = match &config.metrics {
        Some(address) => {
            let scrapers = Arc::new(Admission::new(&[], MAX_SCRAPERS));
            Some(Listener::bind(address, None, &scrapers).await?)
        }
        None => None,
    };
    let slots = config.embedded.as_ref().map(|own| own.jobs.get());
    let flights = Flights::before(slots, config.max_speculative.get());
    let memory = Arc::new(LaneMemory::of(&config.state_dir, &config.upstream));
    if let Some(learned) = memory.recall() {
        flights.recall(learned);
    }
    let engine = match config.mode {
        Mode::None => None,
        _ => Some(EngineThread::start(&config, &routes, flights.clone()).await?),
    };
    let (state_dir, upstream) = (&config.state_dir, &config.upstream);
    let capabilities = Arc::new(Capabilities::load(state_dir, upstream, config.compat));
    let joining = Joining::new(config.hedge_after);
    let proxy = || Proxy {
        upstream: Upstream::new(routes.clone()),
        capabilities: capabilities.clone(),
        engine: engine.as_ref().map(|engine| engine.handle.clone()),
        joining: joining.clone(),
    };
    let mut watchdog = Watchdog::default();
    let settings = ShardSettings {
        max_streams: config.max_streams.get(),
        busy_poll: config.busy_poll,
        grace: DRAIN,
    };
    let shards = Shards::start(proxy, config.threads, settings, &mut watchdog)?;
    let shards = Arc::new(shards);

    let tasks = TaskTracker::new();
    let mut accepting = Vec::new();
    let learning = lane_memory::keep_up(memory.clone(), flights.clone());
    accepting.push(task::spawn("lane memory", learning));
    let listening = listeners
        .iter()
        .map(|listener| listener.address().clone())
        .collect();
    for listener in listeners {
        tracing::info!(address = %listener.address(), upstream = %config.upstream, "listening");
        let shards = shards.clone();
        accepting.push(task::spawn(
            "listener",
            tasks.track_future(accept(listener, shards)),
        ));
    }
    let requests = engine.as_ref().map(|engine| engine.requests.clone());
    let runs = Runs::new(requests.clone(), listening, config.until_unused);
    let admin = admin::Admin {
        upstream: config.upstream.clone(),
        health: routes.health().clone(),
        embedded,
        flights: flights.clone(),
        engine: requests,
        state_dir: config.state_dir.clone(),
        runs: runs.clone(),
    };
    if let Some(listener) = metrics_listener {
        tracing::info!(metrics = %listener.address(), "metrics can be read");
        let admin = admin.clone();
        let now = move || {
            let admin = admin.clone();
            async move { admin.now().await }
        };
        let metrics = tasks.track_future(metrics::serve(listener, now));
        accepting.push(task::spawn("metrics listener", metrics));
    }
    let admin_page = tasks.track_future(admin::serve(admin_listener, admin));
    accepting.push(task::spawn("admin listener", admin_page));
    notify_service_manager(sd_notify::NotifyState::Ready);
    let alive = watchdog.run(|| notify_service_manager(sd_notify::NotifyState::Watchdog));
    accepting.push(task::spawn("watchdog", tasks.track_future(alive)));

    tokio::select! {
        () = shutdown => {}
        () = runs.over() => tracing::info!("the last run has ended"),
    }
    tracing::info!("stopping: no new connections; calls in progress may end");
    notify_service_manager(sd_notify::NotifyState::Stopping);
    for task in &accepting {
        task.abort();
    }
    tasks.close();
    tasks.wait().await;
    if let Some(shards) = Arc::into_inner(shards) {
        shards.shut_down().await;
    }
    if let Some(engine) = engine {
        engine.finish().await;
    }
    if let Some(learned) = flights.learned() {
        task::blocking("lane memory", move || memory.keep(learned)).await;
    }
    if let Some(embedded) = embedded_thread {
        embedded.stop().await;
    }
    tracing::info!("stopped");
    Ok(())
}

/// What is needed to reach upstreams by TLS, if there are any.
///
/// # Errors
/// `TlsError`, when a file or name cannot be used.
pub fn upstream_tls(config: &Config) -> Result<Option<Arc<ClientTls>>, TlsError> {
    match config.upstreams().any(|(_, address)| address.is_tls()) {
        true => Ok(Some(Arc::new(ClientTls::load(
            config.upstream_tls.clone(),
        )?))),
        false => Ok(None),
    }
}

/// Binds or takes over every socket for clients.
async fn bind(config: &Config) -> Result<Vec<Listener>, ServerError> {
    let tls = config.tls.clone().map(ServerTls::load).transpose()?;
    let tls = tls.map(Arc::new);
    let max_connections = make_room(config.max_connections.get());
    let admission = Arc::new(Admission::new(&config.allow_uids, max_connections));
    let mut passed = PassedSockets::take().map_err(ListenError::Passed)?;
    let mut listeners = Vec::with_capacity(config.listen.len());
    for listen in &config.listen {
        match listen {
            ListenAddress::At(address) => {
                listeners.push(Listener::bind(address, tls.as_ref(), &admission).await?);
            }
            ListenAddress::Passed(name) => {
                let selected = passed.select(name.as_deref());
                if selected.is_empty() {
                    let passed = passed.names().into_iter().map(str::to_owned).collect();
                    let wanted = listen.clone();
                    return Err(ListenError::NotPassed { wanted, passed }.into());
                }
                for socket in selected {
                    let listener = Listener::passed(socket, tls.as_ref(), &admission)?;
                    config.refuse_loop(listener.address())?;
                    listeners.push(listener);
                }
            }
        }
    }
    if !passed.names().is_empty() {
        tracing::warn!(sockets = ?passed.names(), "no --listen takes these passed sockets");
    }
    Ok(listeners)
}

async fn accept(listener: Listener, shards: Arc<Shards>) {
    loop {
        let accepted = listener.accept().await;
        // A client that opens one connection after the other has closed the last one by now: seen
        // in that order, they go to the same shard.
        tokio::task::yield_now().await;
        let served = accepted.and_then(|accepted| shards.serve(accepted));
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
    handle: Arc<Engine>,
    requests: mpsc::Sender<Request>,
    thread: std::thread::JoinHandle<()>,
    stop: oneshot::Sender<()>,
}

impl EngineThread {
    async fn start(
        config: &Config,
        routes: &Arc<Routes>,
        flights: Arc<Flights>,
    ) -> Result<Self, ServerError> {
        let runtime = runtime().thread_stack_size(PLANNING_STACK).build()?;
        let (stop, stopped) = oneshot::channel();
        let (started, ready) = oneshot::channel();
        let (config, routes) = (config.clone(), routes.clone());
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                runtime.block_on(async move {
                    let upstream = Upstream::new(routes);
                    let (handle, requests, runner) = engine(EngineParts {
                        mode: config.mode,
                        backend: Arc::new(Remote::new(upstream)),
                        flights,
                        store: Arc::new(Store::open(&config.state_dir)),
                        journals: Arc::new(JournalStore::open(&config.state_dir)),
                        share: config.share,
                        budgets: config.budgets,
                        watch: config.watch,
                    });
                    // Nobody waits for it only if the server is gone.
                    let _ = started.send((handle, requests));
                    let running = task::spawn("engine", runner.run());
                    task::spawn("frame memory", frame_memory::keep());
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
