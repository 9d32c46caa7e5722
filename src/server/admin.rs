//! The admin socket: a page of JSON for `primed status`, one that answers when all is quiet for
//! `primed wait`, and the records for `primed export` and `primed import`. Plain HTTP/1.1, so that
//! `curl --unix-socket` works too.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming as Body;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::ACCEPT_PAUSE;
use super::listen::Listener;
use crate::address::Address;
use crate::backend::health::{UpstreamHealth, UpstreamState};
use crate::speculation::archive::{
    self, ArchiveError, Import, Incoming, Listed, Reply, Request as RecordsRequest,
};
use crate::speculation::engine::{Request as EngineRequest, Status};
use crate::speculation::flights::Flights;
use crate::speculation::interchange::MAX_MESSAGE;
use crate::speculation::parent::WeakKey;
use crate::task;

/// Where the state of things is.
pub const STATUS_PATH: &str = "/status";
/// Where one waits for quiet.
pub const WAIT_PATH: &str = "/wait";
/// The recorded parents; with a slash and a weak key after it, one of them. A message is added by
/// POST, and takes the place of other records by PUT.
pub const RECORDS_PATH: &str = "/records";

/// How long the engine may take to describe itself.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// What the admin socket shows and asks.
#[derive(Clone)]
pub struct Admin {
    /// Where calls are forwarded to.
    pub upstream: Address,
    /// Whether that can be reached.
    pub health: Arc<UpstreamHealth>,
    /// What is in flight.
    pub flights: Arc<Flights>,
    /// The engine, unless the mode is `none`.
    pub engine: Option<mpsc::Sender<EngineRequest>>,
    /// Where records are kept.
    pub state_dir: PathBuf,
}

/// The recorded parents of a running primed.
#[derive(Debug, Serialize, Deserialize)]
pub struct RecordsList {
    /// Where they are kept; absent if the mode is `none`, in which records are left alone.
    pub state_dir: Option<PathBuf>,
    /// By label.
    pub parents: Vec<Listed>,
}

/// The object that `primed status --json` prints.
#[derive(Debug, Serialize)]
pub struct StatusPage {
    version: &'static str,
    upstream: UpstreamPage,
    records: RecordsPage,
    speculation: SpeculationPage,
    builds: Vec<crate::speculation::engine::BuildStatus>,
}

#[derive(Debug, Serialize)]
struct UpstreamPage {
    address: Address,
    state: UpstreamState,
}

#[derive(Debug, Serialize)]
struct RecordsPage {
    actions: u64,
    parents: u64,
}

#[derive(Debug, Serialize)]
struct SpeculationPage {
    queued: u64,
    running: u64,
    completed: u64,
    failed: u64,
    unadaptable: u64,
}

/// Serves the admin pages until the task is dropped.
pub async fn serve(listener: Listener, admin: Admin) {
    loop {
        match listener.accept().await {
            Ok(accepted) => {
                let admin = admin.clone();
                let pages = service_fn(move |request| {
                    let admin = admin.clone();
                    async move { Ok::<_, Infallible>(admin.page(request).await) }
                });
                task::spawn("admin connection", async move {
                    let stream = match accepted.into_stream().await {
                        Ok(stream) => TokioIo::new(stream),
                        Err(error) => {
                            return tracing::debug!(%error, "an admin connection was lost");
                        }
                    };
                    let mut http = http1::Builder::new();
                    let connection = http.timer(TokioTimer::new());
                    if let Err(error) = connection.serve_connection(stream, pages).await {
                        tracing::debug!(%error, "an admin connection ended with an error");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "an admin connection was refused");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

impl Admin {
    async fn page(&self, request: Request<Body>) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        if let Some(rest) = path.strip_prefix(RECORDS_PATH) {
            let key = match rest.strip_prefix('/').map(str::parse) {
                None if rest.is_empty() => None,
                Some(Ok(key)) => Some(key),
                _ => return text(StatusCode::NOT_FOUND, "there is /records[/WEAK_KEY]\n"),
            };
            let page = self.records(key, request).await;
            return page.unwrap_or_else(|(status, reason)| text(status, &reason));
        }
        match (request.method(), path) {
            (&Method::GET, STATUS_PATH) => json(&self.status().await),
            (&Method::GET, WAIT_PATH) => {
                self.wait().await;
                text(StatusCode::OK, "quiet\n")
            }
            _ => text(
                StatusCode::NOT_FOUND,
                "there are /status, /wait and /records\n",
            ),
        }
    }

    async fn records(
        &self,
        key: Option<WeakKey>,
        request: Request<Body>,
    ) -> Result<Response<Full<Bytes>>, Refusal> {
        let method = request.method().clone();
        match (&method, key) {
            (&Method::GET, None) if self.engine.is_none() => Ok(json(&RecordsList {
                state_dir: None,
                parents: Vec::new(),
            })),
            (&Method::GET, None) => Ok(json(&RecordsList {
                state_dir: Some(self.state_dir.clone()),
                parents: self.ask_records(RecordsRequest::List).await?,
            })),
            (&Method::GET, Some(key)) => {
                let export = |reply| RecordsRequest::Export(key, reply);
                Ok(Response::new(Full::from(self.ask_records(export).await?)))
            }
            (&Method::POST | &Method::PUT, key) => {
                let body = Limited::new(request.into_body(), MAX_MESSAGE).collect();
                let body = body.await.map_err(|error| {
                    let reason = format!("the message cannot be read: {error}");
                    (StatusCode::BAD_REQUEST, reason)
                })?;
                let incoming = Incoming {
                    key,
                    message: body.to_bytes(),
                    replace: method == Method::PUT,
                };
                let import =
                    |reply| RecordsRequest::Import(Box::new(Import::Message(incoming, reply)));
                Ok(json(&self.ask_records(import).await?))
            }
            _ => {
                let reason = "records are read by GET, and added by POST or PUT\n";
                Err((StatusCode::METHOD_NOT_ALLOWED, reason.to_owned()))
            }
        }
    }

    async fn ask_records<T>(
        &self,
        request: impl FnOnce(Reply<T>) -> archive::Request,
    ) -> Result<T, Refusal> {
        let unavailable = || {
            let reason = "primed keeps no records (--mode none), or has too much to do";
            (StatusCode::SERVICE_UNAVAILABLE, reason.to_owned())
        };
        let engine = self.engine.as_ref().ok_or_else(unavailable)?;
        let (reply, answer) = oneshot::channel();
        let request = EngineRequest::Records(request(reply));
        engine.send(request).await.map_err(|_| unavailable())?;
        let answer = answer.await.map_err(|_| unavailable())?;
        answer.map_err(|error| (status_of(&error), error.to_string()))
    }

    async fn status(&self) -> StatusPage {
        let engine = match &self.engine {
            Some(engine) => ask_status(engine).await.unwrap_or_default(),
            None => Status::default(),
        };
        let flights = self.flights.counts();
        StatusPage {
            version: env!("CARGO_PKG_VERSION"),
            upstream: UpstreamPage {
                address: self.upstream.clone(),
                state: self.health.state(),
            },
            records: RecordsPage {
                actions: engine.records.actions,
                parents: engine.records.parents,
            },
            speculation: SpeculationPage {
                queued: flights.queued,
                running: flights.running,
                completed: flights.completed,
                failed: flights.failed,
                unadaptable: engine.unadaptable,
            },
            builds: engine.builds,
        }
    }

    /// Returns when recording, generation and priming are quiet; at once without an engine.
    async fn wait(&self) {
        if let Some(engine) = &self.engine {
            let (reply, quiet) = oneshot::channel();
            if engine.send(EngineRequest::Wait(reply)).await.is_ok() {
                // An engine that is gone is quiet.
                let _ = quiet.await;
            }
        }
    }
}

async fn ask_status(engine: &mpsc::Sender<EngineRequest>) -> Option<Status> {
    let (reply, status) = oneshot::channel();
    let ask = async {
        engine.send(EngineRequest::Status(reply)).await.ok()?;
        status.await.ok()
    };
    tokio::time::timeout(STATUS_TIMEOUT, ask).await.ok()?
}

/// Why a page is not given.
type Refusal = (StatusCode, String);

fn status_of(error: &ArchiveError) -> StatusCode {
    match error {
        ArchiveError::Unknown(_) => StatusCode::NOT_FOUND,
        ArchiveError::Recorded { .. } => StatusCode::CONFLICT,
        ArchiveError::Malformed(_) | ArchiveError::Nameless | ArchiveError::OfAnother(_) => {
            StatusCode::BAD_REQUEST
        }
        ArchiveError::Backend(_) => StatusCode::BAD_GATEWAY,
        ArchiveError::Store(_) | ArchiveError::Panicked => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn json(page: &impl Serialize) -> Response<Full<Bytes>> {
    match serde_json::to_vec(page) {
        Ok(json) => {
            let mut response = Response::new(Full::from(json));
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(CONTENT_TYPE, json);
            response
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn text(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text.to_owned()));
    *response.status_mut() = status;
    response
}
