//! The admin socket: a page of JSON for `primed status`, one that answers when all is quiet for
//! `primed wait`, and the records for `primed export` and `primed import`. Plain HTTP/1.1, so that
//! `curl --unix-socket` works too.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming as Body;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::listen::Listener;
use super::metrics::process::Process;
use super::metrics::{METRICS_PATH, Now};
use super::pages::{self, Lifetime, of_type, text};
use super::runs::{OpenPage, Runs};
use crate::address::Address;
use crate::backend::embedded::{Embedded, Usage};
use crate::backend::health::{UpstreamHealth, UpstreamState};
use crate::speculation::engine::{BuildStatus, Request as EngineRequest, Status};
use crate::speculation::explanation::explain::{ExplainError, Question};
use crate::speculation::explanation::library::JournalError;
use crate::speculation::flights::{Flights, RunningFlight};
use crate::speculation::journal::accounting::Totals;
use crate::speculation::recording::archive::{
    self, ArchiveError, Import, Incoming, Listed, Reply, Request as RecordsRequest,
};
use crate::speculation::records::interchange::MAX_MESSAGE;
use crate::speculation::records::parent::WeakKey;
use crate::speculation::records::store;
use crate::task;
use crate::workspace::peer::PeerOrigin;

/// Where the state of things is.
pub const STATUS_PATH: &str = "/status";
/// Where one waits for quiet.
pub const WAIT_PATH: &str = "/wait";
/// The builds that are known, newest first; with a slash and the beginning of an id after it, the
/// journal of one.
pub const BUILDS_PATH: &str = "/builds";
/// Where a question about actions is posted: a JSON object.
pub const EXPLAIN_PATH: &str = "/explain";
/// The recorded parents; with a slash and a weak key after it, one of them. A message is added by
/// POST, and takes the place of other records by PUT.
pub const RECORDS_PATH: &str = "/records";

/// How long a question may be, in bytes.
const MAX_QUESTION: usize = 64 * 1024;
/// Where `primed run` opens its runs; with a slash and its id after it, one of them.
pub const RUNS_PATH: &str = "/runs";

/// The longest request that opens a run: a command may be long.
const MAX_OPEN_PAGE: usize = 1024 * 1024;

/// How long the engine may take to describe itself.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// How many running flights a page names.
const MOST_FLIGHTS: usize = 100;

/// What the admin socket shows and asks.
#[derive(Clone)]
pub struct Admin {
    /// Where calls are forwarded to.
    pub upstream: Address,
    /// Whether that can be reached.
    pub health: Arc<UpstreamHealth>,
    /// The backend within primed, where it is the upstream.
    pub embedded: Option<Arc<Embedded>>,
    /// What is in flight.
    pub flights: Arc<Flights>,
    /// The engine, unless the mode is `none`.
    pub engine: Option<mpsc::Sender<EngineRequest>>,
    /// Where records are kept.
    pub state_dir: PathBuf,
    /// The runs that are open.
    pub runs: Runs,
}

/// The recorded parents of a running primed.
#[derive(Debug, Serialize, Deserialize)]
pub struct RecordsList {
    /// Where they are kept; absent if the mode is `none`, in which records are left alone.
    pub state_dir: Option<PathBuf>,
    /// By label.
    pub parents: Vec<Listed>,
}

/// The builds that a running primed knows.
#[derive(Debug, Serialize, Deserialize)]
pub struct BuildsList {
    /// Newest first.
    pub builds: Vec<BuildStatus>,
}

/// The object that `primed status --json` prints.
#[derive(Debug, Serialize)]
pub struct StatusPage {
    version: &'static str,
    upstream: UpstreamPage,
    records: RecordsPage,
    /// With `--watch`.
    #[serde(skip_serializing_if = "Option::is_none")]
    watch: Option<WatchPage>,
    speculation: SpeculationPage,
    totals: Totals,
    builds: Vec<BuildStatus>,
}

#[derive(Debug, Serialize)]
struct UpstreamPage {
    address: Address,
    state: UpstreamState,
    /// What the embedded backend does, where it is the upstream.
    #[serde(skip_serializing_if = "Option::is_none")]
    embedded: Option<Usage>,
}

#[derive(Debug, Serialize)]
struct RecordsPage {
    actions: u64,
    parents: u64,
}

#[derive(Debug, Serialize)]
struct WatchPage {
    /// In which files that are saved are seen.
    directories: usize,
}

#[derive(Debug, Serialize)]
struct SpeculationPage {
    queued: u64,
    running: u64,
    completed: u64,
    failed: u64,
    unadaptable: u64,
    /// How many may run at once, at most.
    slots: usize,
    /// How many may run at once as the backend is now, while clients execute nothing.
    width: u64,
    /// Those that were cancelled as nobody wanted them any more.
    cancelled: u64,
    /// Those that were stopped for clients' own executions, and start again later.
    gave_way: u64,
    /// Those that were left out as predictions like them went unused.
    retired: u64,
    /// Those that were left out as there was too little to gain.
    cheap: u64,
    /// Those that were left out as a budget was spent.
    over_budget: u64,
    /// How many executions clients run themselves.
    clients: u64,
    /// Those that have run for longest.
    flights: Vec<RunningFlight>,
}

/// Serves the admin pages until the task is dropped.
pub async fn serve(listener: Listener, admin: Admin) {
    let answer = move |request, by| {
        let admin = admin.clone();
        async move { admin.page(request, by).await }
    };
    pages::serve(listener, Lifetime::Open, answer).await;
}

impl Admin {
    async fn page(&self, request: Request<Body>, by: PeerOrigin) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        if let Some(rest) = path.strip_prefix(RUNS_PATH) {
            let id = rest.strip_prefix('/').map(str::to_owned);
            let page = self.run(id, request, by).await;
            return page.unwrap_or_else(|(status, reason)| text(status, &reason));
        }
        if let Some(rest) = path.strip_prefix(RECORDS_PATH) {
            let key = match rest.strip_prefix('/').map(str::parse) {
                None if rest.is_empty() => None,
                Some(Ok(key)) => Some(key),
                _ => return text(StatusCode::NOT_FOUND, "there is /records[/WEAK_KEY]\n"),
            };
            let page = self.records(key, request).await;
            return page.unwrap_or_else(|(status, reason)| text(status, &reason));
        }
        if let (&Method::GET, Some(rest)) = (request.method(), path.strip_prefix(BUILDS_PATH)) {
            let page = self.builds(rest.trim_matches('/')).await;
            return page.unwrap_or_else(|(status, reason)| text(status, &reason));
        }
        if (request.method(), path) == (&Method::POST, EXPLAIN_PATH) {
            let page = self.explain(request).await;
            return page.unwrap_or_else(|(status, reason)| text(status, &reason));
        }
        match (request.method(), path) {
            (&Method::GET, STATUS_PATH) => json(&self.status().await),
            (&Method::GET, METRICS_PATH) => self.now().await.page(),
            (&Method::GET, WAIT_PATH) => {
                self.wait().await;
                text(StatusCode::OK, "quiet\n")
            }
            _ => text(
                StatusCode::NOT_FOUND,
                "there are /status, /metrics, /builds, /explain, /wait, /records and /runs\n",
            ),
        }
    }

    /// What there is now, for the metrics.
    pub async fn now(&self) -> Now {
        Now {
            engine: self.engine_status().await,
            flights: self.flights.counts(),
            slots: self.flights.cap(),
            upstream: self.health.state(),
            upstream_connections: self.health.connections(),
            embedded: self.embedded.as_ref().map(|embedded| embedded.usage()),
            store_bytes: self.store_bytes(),
            process: task::blocking("process", Process::now).await.flatten(),
        }
    }

    /// The list of builds, or the journal of the one whose id begins with `id`.
    async fn builds(&self, id: &str) -> Result<Response<Full<Bytes>>, Refusal> {
        let Some(engine) = &self.engine else {
            let none = BuildsList { builds: Vec::new() };
            return Ok(json(&none));
        };
        if id.is_empty() {
            let builds = ask(engine, EngineRequest::Builds).await?;
            return Ok(json(&BuildsList { builds }));
        }
        let journal = |reply| EngineRequest::Journal(id.to_owned(), reply);
        match ask(engine, journal).await? {
            Ok(page) => Ok(json(&page)),
            Err(error) => {
                let status = journal_status(&error);
                Err((status, format!("{error}\n")))
            }
        }
    }

    /// Answers why actions were answered as they were.
    async fn explain(&self, request: Request<Body>) -> Result<Response<Full<Bytes>>, Refusal> {
        let body = Limited::new(request.into_body(), MAX_QUESTION)
            .collect()
            .await;
        let bad = |reason: String| (StatusCode::BAD_REQUEST, reason);
        let body = body.map_err(|error| bad(format!("the question cannot be read: {error}\n")))?;
        let question: Question = serde_json::from_slice(&body.to_bytes())
            .map_err(|error| bad(format!("the question is malformed: {error}\n")))?;
        let engine = self.engine.as_ref().ok_or_else(|| {
            let reason = "this primed only forwards (--mode none): it knows of no builds\n";
            (StatusCode::SERVICE_UNAVAILABLE, reason.to_owned())
        })?;
        let explain = |reply| EngineRequest::Explain(Box::new(question), reply);
        match ask(engine, explain).await? {
            Ok(explanations) => Ok(json(&explanations)),
            Err(error) => {
                let status = match &error {
                    ExplainError::Journal(error) => journal_status(error),
                    _ => StatusCode::NOT_FOUND,
                };
                Err((status, format!("{error}\n")))
            }
        }
    }

    async fn run(
        &self,
        id: Option<String>,
        request: Request<Body>,
        by: PeerOrigin,
    ) -> Result<Response<Full<Bytes>>, Refusal> {
        let unknown = || (StatusCode::NOT_FOUND, "there is no such run\n".to_owned());
        match (request.method(), id) {
            (&Method::POST, None) => {
                let body = Limited::new(request.into_body(), MAX_OPEN_PAGE).collect();
                let refuse = |error: String| (StatusCode::BAD_REQUEST, error);
                let body = body.await.map_err(|error| refuse(error.to_string()))?;
                let page: OpenPage = serde_json::from_slice(&body.to_bytes())
                    .map_err(|error| refuse(error.to_string()))?;
                let opened = self.runs.open(page, self.upstream.to_string(), by).await;
                let opened = opened.ok_or_else(|| {
                    let reason = "this primed is about to end\n".to_owned();
                    (StatusCode::SERVICE_UNAVAILABLE, reason)
                })?;
                Ok(json(&opened))
            }
            (&Method::GET, Some(id)) => {
                let mut page = self.runs.look(&id).await.ok_or_else(unknown)?;
                let flights = self.flights.counts();
                (page.queued, page.running) = (flights.queued, flights.running);
                Ok(json(&page))
            }
            (&Method::DELETE, Some(id)) => {
                let page = self.runs.close(&id).await.ok_or_else(unknown)?;
                Ok(json(&page))
            }
            _ => {
                let reason = "runs are opened by POST /runs, read by GET /runs/ID, and closed by \
                              DELETE /runs/ID\n";
                Err((StatusCode::METHOD_NOT_ALLOWED, reason.to_owned()))
            }
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
        let engine = self.engine_status().await.unwrap_or_default();
        let flights = self.flights.counts();
        StatusPage {
            version: env!("CARGO_PKG_VERSION"),
            upstream: UpstreamPage {
                address: self.upstream.clone(),
                state: self.health.state(),
                embedded: self.embedded.as_ref().map(|embedded| embedded.usage()),
            },
            records: RecordsPage {
                actions: engine.records.actions,
                parents: engine.records.parents,
            },
            watch: engine
                .watched_directories
                .map(|directories| WatchPage { directories }),
            speculation: SpeculationPage {
                queued: flights.queued,
                running: flights.running,
                completed: flights.completed,
                failed: flights.failed,
                unadaptable: engine.unadaptable,
                slots: self.flights.cap(),
                width: flights.width,
                cancelled: flights.cancelled,
                gave_way: flights.gave_way,
                retired: flights.retired,
                cheap: flights.cheap,
                over_budget: flights.over_budget,
                clients: flights.clients,
                flights: self.flights.running(MOST_FLIGHTS),
            },
            totals: engine.totals,
            builds: engine.builds,
        }
    }

    /// What the engine says of itself; `None` without one, and when it takes too long.
    async fn engine_status(&self) -> Option<Status> {
        ask_status(self.engine.as_ref()?).await
    }

    /// How large the records on disk are, if they are there.
    fn store_bytes(&self) -> Option<u64> {
        self.engine.as_ref()?;
        store::size_on_disk(&self.state_dir)
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

/// Asks the engine for something that it has.
async fn ask<T>(
    engine: &mpsc::Sender<EngineRequest>,
    request: impl FnOnce(oneshot::Sender<T>) -> EngineRequest,
) -> Result<T, Refusal> {
    let (reply, answer) = oneshot::channel();
    let asked = async {
        engine.send(request(reply)).await.ok()?;
        answer.await.ok()
    };
    asked.await.ok_or_else(|| {
        let reason = "primed has too much to do, or is stopping\n";
        (StatusCode::SERVICE_UNAVAILABLE, reason.to_owned())
    })
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

fn journal_status(error: &JournalError) -> StatusCode {
    match error {
        JournalError::NotFound(_) => StatusCode::NOT_FOUND,
        JournalError::Unreadable(..) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

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
        Ok(json) => of_type("application/json", json),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}
