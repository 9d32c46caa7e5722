//! The embedded backend: what `primed serve` forwards to where no upstream is named. A CAS and an
//! action cache in one directory, and the services of the Remote Execution API on top of them.
//!
//! To the rest of primed it is one more upstream, dialled like any other: `connect` makes a pair of
//! sockets, and serves the other end on threads of its own, so that work on the disk holds up no
//! forwarding.

mod action_cache;
pub mod blobs;
mod byte_stream;
mod cache_directory;
pub mod capabilities;
mod cas_service;
mod compression;
pub mod errors;
mod eviction;
pub mod execution;
mod requests;
mod resource_name;
pub mod results;
mod uploads;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Server;

use self::action_cache::ActionCacheService;
use self::blobs::Blobs;
use self::byte_stream::ByteStreamService;
use self::capabilities::CapabilitiesService;
use self::cas_service::CasService;
use self::errors::OpenError;
use self::execution::{Counts, Execution, SandboxError};
use self::requests::MAX_MESSAGE;
use self::results::Results;
use crate::config::embedded::EmbeddedConfig;
use crate::http2::{MAX_FRAME_SIZE, STREAM_WINDOW, UPSTREAM_HEADER_LIST, UPSTREAM_WINDOW};
use crate::local_socket::LocalSocket;
use crate::reapi::action_cache_server::ActionCacheServer;
use crate::reapi::capabilities_server::CapabilitiesServer;
use crate::reapi::content_addressable_storage_server::ContentAddressableStorageServer;
use crate::reapi::execution_server::ExecutionServer;
use crate::reapi::google::bytestream::byte_stream_server::ByteStreamServer;
use crate::reapi::google::longrunning::operations_server::OperationsServer;
use crate::task;

/// Connections that wait to be served.
const BACKLOG: usize = 64;
/// How long calls that are being served may take to end, once nobody waits for them.
const FINISH: Duration = Duration::from_secs(5);

/// Why there is no embedded backend.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// Its directory cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The sandbox that was asked for does not work.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The system refused a thread or a runtime.
    #[error("the embedded backend cannot start: {0}")]
    System(#[from] io::Error),
}

/// A running embedded backend.
pub struct Embedded {
    connections: mpsc::Sender<UnixStream>,
    execution: Execution,
    blobs: Arc<Blobs>,
}

/// What it does, and what it keeps.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Usage {
    /// How many actions it runs, and how many wait for their turn.
    #[serde(flatten)]
    pub executing: Counts,
    /// How much it keeps.
    pub cache_bytes: u64,
    /// How much it may keep; 0 until it is known what there is.
    pub cache_limit: u64,
}

/// The thread that it runs on.
pub struct EmbeddedThread {
    stop: DropGuard,
    thread: std::thread::JoinHandle<()>,
}

impl Embedded {
    /// Opens the cache and begins to serve; calls wait while it looks at what there is.
    ///
    /// # Errors
    /// `EmbeddedError`.
    pub fn start(config: &EmbeddedConfig) -> Result<(Arc<Self>, EmbeddedThread), EmbeddedError> {
        let size = config.cache_size.map(|size| size.0);
        // Commands run in directories of their own, and what supervises them must find it too.
        let directory = std::path::absolute(&config.cache_dir)?;
        let blobs = Blobs::open_unloaded(&directory, size)?;
        let results = Results::new(blobs.clone());
        let execution = Execution::new(blobs.clone(), results.clone(), config)?;
        let (executing, kept) = (execution.clone(), blobs.clone());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .thread_name("embedded")
            .enable_all()
            .build()?;
        let (connections, accepted) = mpsc::channel(BACKLOG);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("embedded".to_owned())
            .spawn(move || {
                let directory = blobs.directory();
                if let Err(error) = directory.load() {
                    tracing::error!(%error, "there is no embedded backend");
                    return;
                }
                tracing::info!(
                    directory = %directory.root().display(),
                    bytes = directory.occupied(),
                    limit = directory.limit(),
                    "the embedded backend is open"
                );
                runtime.block_on(serve(blobs, results, execution, accepted, stopped));
                runtime.shutdown_timeout(FINISH);
            })?;
        Ok((
            Arc::new(Embedded {
                connections,
                execution: executing,
                blobs: kept,
            }),
            EmbeddedThread {
                stop: stop.drop_guard(),
                thread,
            },
        ))
    }

    /// What it does now.
    pub fn usage(&self) -> Usage {
        let directory = self.blobs.directory();
        Usage {
            executing: self.execution.counts(),
            cache_bytes: directory.occupied(),
            cache_limit: directory.limit(),
        }
    }

    /// A connection to it.
    ///
    /// # Errors
    /// What the system said, or `ConnectionRefused` when it has stopped.
    pub async fn connect(&self) -> io::Result<LocalSocket> {
        let (near, far) = UnixStream::pair()?;
        near.set_nonblocking(true)?;
        far.set_nonblocking(true)?;
        let sent = self.connections.send(far).await;
        sent.map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
        Ok(LocalSocket::new(near))
    }
}

impl EmbeddedThread {
    /// Ends it, when its clients have ended.
    pub async fn stop(self) {
        drop(self.stop);
        let thread = self.thread;
        if task::blocking("embedded", move || thread.join().is_err()).await != Some(false) {
            tracing::error!("the embedded backend's thread panicked");
        }
    }
}

async fn serve(
    blobs: Arc<Blobs>,
    results: Arc<Results>,
    execution: Execution,
    accepted: mpsc::Receiver<UnixStream>,
    stopped: CancellationToken,
) {
    let eviction = task::spawn("eviction", eviction::run(blobs.directory().clone()));
    let accepted = ReceiverStream::new(accepted).map(tokio::net::UnixStream::from_std);
    let action_cache = ActionCacheService {
        blobs: blobs.clone(),
        results,
    };
    let cas = CasService {
        blobs: blobs.clone(),
    };
    let byte_stream = ByteStreamService {
        blobs,
        uploads: Arc::default(),
    };
    let serving = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(UPSTREAM_WINDOW)
        .max_frame_size(MAX_FRAME_SIZE)
        .http2_max_header_list_size(UPSTREAM_HEADER_LIST)
        // Calls that clients have cancelled, many at a time, are no attack here.
        .http2_max_pending_accept_reset_streams(Some(usize::MAX))
        .http2_max_local_error_reset_streams(None)
        .add_service(CapabilitiesServer::new(CapabilitiesService))
        .add_service(ActionCacheServer::new(action_cache).max_decoding_message_size(MAX_MESSAGE))
        .add_service(
            ContentAddressableStorageServer::new(cas).max_decoding_message_size(MAX_MESSAGE),
        )
        .add_service(ExecutionServer::new(execution.clone()))
        .add_service(OperationsServer::new(execution))
        .add_service(ByteStreamServer::new(byte_stream).max_decoding_message_size(MAX_MESSAGE))
        .serve_with_incoming_shutdown(accepted, stopped.clone().cancelled_owned());
    let out_of_time = async {
        stopped.cancelled().await;
        tokio::time::sleep(FINISH).await;
    };
    tokio::select! {
        served = serving => {
            if let Err(error) = served {
                tracing::error!(%error, "the embedded backend has ended");
            }
        }
        () = out_of_time => tracing::warn!("calls to the embedded backend did not end in time"),
    }
    eviction.abort();
}
