//! The runs that are open: `primed run` opens one by `POST /runs`, looks at it by `GET /runs/ID`
//! and closes it by `DELETE /runs/ID`. One whose process is gone is closed by itself. A primed that
//! was started for runs ends with the last of them.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use crate::address::Address;
use crate::speculation::clients::runs::{OpenRun, Opened, Request as RunRequest};
use crate::speculation::engine::{BuildStatus, Request};
use crate::task;
use crate::workspace::peer::PeerOrigin;
use crate::workspace::process::Process;

/// How long a primed that was started for runs waits for the first one.
const FIRST_RUN: Duration = Duration::from_secs(30);
/// The longest wait for the planning of a run.
const MAX_PRIME_WAIT: Duration = Duration::from_secs(600);

/// What `primed run` says when it opens a run.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct OpenPage {
    /// For people: the command.
    pub command: String,
    /// What clients send as `correlated_invocations_id`, if that is not to be the run's id.
    pub correlated: Option<String>,
    /// Whether anything is to be primed.
    pub prime: bool,
    /// How long to wait until what is known is planned for, in milliseconds.
    pub prime_wait_ms: u64,
    /// Whether this is no build at all, but somebody who has questions, and wants primed to be there
    /// until then.
    pub visit: bool,
}

/// What it is told.
#[derive(Debug, Serialize, Deserialize)]
pub struct OpenedPage {
    /// Names the run from now on; also its build, if it is one and the mode is not `none`.
    pub id: String,
    /// Where clients connect, in the order of `--listen`.
    pub addresses: Vec<String>,
    /// Where their calls go.
    pub upstream: String,
    /// Whether priming was planned for in time.
    pub planned: bool,
    /// Whether what is recorded will be there for the next run.
    pub keeps_records: bool,
    /// Whether builds are recorded or primed at all: not if the mode is `none`, or for a visit.
    pub speculates: bool,
}

/// How a run stands, or how it ended.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct RunPage {
    /// Absent if the mode is `none`.
    pub build: Option<BuildStatus>,
    /// Speculative actions that are queued, for whatever build.
    pub queued: u64,
    /// Those that are running.
    pub running: u64,
    /// Whether this primed ends now: it was the last run.
    pub ends: bool,
}

/// The runs that are open, and who is told about them.
#[derive(Clone)]
pub struct Runs(Arc<Inner>);

struct Inner {
    open: Mutex<HashSet<String>>,
    usage: watch::Sender<Usage>,
    engine: Option<mpsc::Sender<Request>>,
    listening: Vec<Address>,
    /// Whether this primed ends with the last run.
    until_unused: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Usage {
    Unused,
    InUse,
    Over,
}

impl Runs {
    /// None yet. With `until_unused` there will be none after the last.
    pub fn new(
        engine: Option<mpsc::Sender<Request>>,
        listening: Vec<Address>,
        until_unused: bool,
    ) -> Self {
        Runs(Arc::new(Inner {
            open: Mutex::default(),
            usage: watch::Sender::new(Usage::Unused),
            engine,
            listening,
            until_unused,
        }))
    }

    /// Returns when the last run has been closed, or when none was opened for half a minute; never
    /// if this primed goes on without runs.
    pub async fn over(&self) {
        if !self.0.until_unused {
            return std::future::pending().await;
        }
        let mut usage = self.0.usage.subscribe();
        let first = usage.wait_for(|usage| *usage != Usage::Unused);
        if tokio::time::timeout(FIRST_RUN, first).await.is_err() {
            // One that comes at this moment is turned away.
            self.0.usage.send_if_modified(|usage| {
                let unused = *usage == Usage::Unused;
                if unused {
                    *usage = Usage::Over;
                }
                unused
            });
        }
        // The sender lives as long as `self`.
        let _ = usage.wait_for(|usage| *usage == Usage::Over).await;
    }

    /// Opens a run for whoever asks. `None` if this primed is about to end.
    pub async fn open(
        &self,
        page: OpenPage,
        upstream: String,
        by: PeerOrigin,
    ) -> Option<OpenedPage> {
        let (process, uid) = match by {
            PeerOrigin::Local { pid, uid } => (pid.and_then(Process::find), Some(uid)),
            PeerOrigin::Tcp(_) => (None, None),
        };
        let prime_wait = Duration::from_millis(page.prime_wait_ms).min(MAX_PRIME_WAIT);
        // Holds the place of one that has no id yet.
        let place = uuid::Uuid::now_v7().to_string();
        if !self.begin(place.clone()) {
            return None;
        }
        let run = OpenRun {
            process: process.clone(),
            uid,
            command: page.command,
            correlated: page.correlated,
            primes: page.prime,
        };
        let opened = match page.visit {
            true => None,
            false => self.ask(|reply| RunRequest::Open(run, reply)).await,
        };
        let (id, planned, keeps_records) = match opened {
            Some(Opened {
                id,
                planned,
                keeps_records,
            }) => (id, Some(planned), keeps_records),
            None => (place.clone(), None, false),
        };
        {
            let mut open = self.0.open.lock();
            open.remove(&place);
            open.insert(id.clone());
        }
        if let Some(process) = process {
            let (runs, id) = (self.clone(), id.clone());
            task::spawn("run", async move {
                if let Ok(end) = process.watch() {
                    end.wait().await;
                }
                // It has closed its run itself, unless it was killed.
                runs.close(&id).await;
            });
        }
        let speculates = planned.is_some();
        let planned = match planned {
            // An answer is that the other end is dropped.
            Some(planned) => tokio::time::timeout(prime_wait, planned).await.is_ok(),
            None => false,
        };
        let absolute = |address: &Address| match address {
            Address::Unix(path) => match std::path::absolute(path) {
                Ok(path) => Address::Unix(path).to_string(),
                Err(_) => address.to_string(),
            },
            other => other.to_string(),
        };
        Some(OpenedPage {
            id,
            addresses: self.0.listening.iter().map(absolute).collect(),
            upstream,
            planned,
            keeps_records,
            speculates,
        })
    }

    /// How the run `id` stands; `None` if it is not open.
    pub async fn look(&self, id: &str) -> Option<RunPage> {
        if !self.0.open.lock().contains(id) {
            return None;
        }
        let look = |reply| RunRequest::Look(id.to_owned(), reply);
        Some(RunPage {
            build: self.ask(look).await.flatten(),
            ..RunPage::default()
        })
    }

    /// Closes the run `id`; `None` if it is not open.
    pub async fn close(&self, id: &str) -> Option<RunPage> {
        if !self.0.open.lock().remove(id) {
            return None;
        }
        let close = |reply| RunRequest::Close(id.to_owned(), reply);
        let build = self.ask(close).await.flatten();
        Some(RunPage {
            build,
            ends: self.end(),
            ..RunPage::default()
        })
    }

    /// Whether another run may begin; if so, it has.
    fn begin(&self, place: String) -> bool {
        let mut open = self.0.open.lock();
        let may = self.0.usage.send_if_modified(|usage| {
            let may = *usage != Usage::Over;
            if may {
                *usage = Usage::InUse;
            }
            may
        });
        if may {
            open.insert(place);
        }
        may
    }

    /// Whether this was the last one there will be.
    fn end(&self) -> bool {
        let open = self.0.open.lock();
        self.0.usage.send_if_modified(|usage| {
            let over = self.0.until_unused && open.is_empty();
            if over {
                *usage = Usage::Over;
            }
            over
        })
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> RunRequest) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Run(request(reply));
        self.0.engine.as_ref()?.send(request).await.ok()?;
        answer.await.ok()
    }
}
