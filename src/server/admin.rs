//! The admin socket: a page of JSON for `primed status`, and one that answers when all is quiet
//! for `primed wait`. Plain HTTP/1.1, so that `curl --unix-socket` works too.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use super::ACCEPT_PAUSE;
use super::listen::Listener;
use crate::address::Address;
use crate::backend::health::{UpstreamHealth, UpstreamState};
use crate::speculation::engine::{Request as EngineRequest, Status};
use crate::speculation::flights::Flights;
use crate::task;

/// Where the state of things is.
pub const STATUS_PATH: &str = "/status";
/// Where one waits for quiet.
pub const WAIT_PATH: &str = "/wait";

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
                    async move { Ok::<_, Infallible>(admin.page(&request).await) }
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
    async fn page(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        match (request.method(), request.uri().path()) {
            (&Method::GET, STATUS_PATH) => match serde_json::to_vec(&self.status().await) {
                Ok(json) => {
                    let mut response = Response::new(Full::from(json));
                    let json = HeaderValue::from_static("application/json");
                    response.headers_mut().insert(CONTENT_TYPE, json);
                    response
                }
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
            },
            (&Method::GET, WAIT_PATH) => {
                self.wait().await;
                text(StatusCode::OK, "quiet\n")
            }
            _ => text(StatusCode::NOT_FOUND, "there are /status and /wait\n"),
        }
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

fn text(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text.to_owned()));
    *response.status_mut() = status;
    response
}
