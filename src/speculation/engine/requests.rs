//! What the administration asks of the engine.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::sync::oneshot;

use super::State;
use super::watching::Watching;
use crate::speculation::clients::builds::Build;
use crate::speculation::clients::caller::BuildKey;
use crate::speculation::clients::runs::{self, OpenRun, Opened as OpenedRun};
use crate::speculation::explanation::explain::{ExplainError, Explanations, Question, explain};
use crate::speculation::explanation::library::{JournalError, Library};
use crate::speculation::journal::accounting::{BuildStatus, Leads, Totals};
use crate::speculation::journal::page::Page;
use crate::speculation::journal::store::Fresh;
use crate::speculation::priming::{Group, Message};
use crate::speculation::recording::{archive, recorder};
use crate::speculation::records::store::RecordCounts;
use crate::task;

/// What `primed status` and `primed wait` ask of the engine.
pub enum Request {
    /// The state of things.
    Status(oneshot::Sender<Status>),
    /// Answered when recording, generation and priming are quiet.
    Wait(oneshot::Sender<()>),
    /// Ends all builds; answered when they are recorded.
    Finish(oneshot::Sender<()>),
    /// All builds that are known, also those of earlier runs of the daemon.
    Builds(oneshot::Sender<Vec<BuildStatus>>),
    /// The journal of the one build whose id begins so.
    Journal(String, oneshot::Sender<Result<Page, JournalError>>),
    /// Why actions were answered as they were.
    Explain(
        Box<Question>,
        oneshot::Sender<Result<Explanations, ExplainError>>,
    ),
    /// About runs.
    Run(runs::Request),
    /// About the records themselves.
    Records(archive::Request),
}

/// The state of the engine.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// How much is recorded.
    pub records: RecordCounts,
    /// Base actions that could not be adapted, since primed began.
    pub unadaptable: u64,
    /// Directories in which saved files are seen; `None` if that is not wanted.
    pub watched_directories: Option<usize>,
    /// Builds that run.
    pub open_builds: u64,
    /// Calls that the engine has yet to look at.
    pub queued_observations: u64,
    /// What the recorder has yet to look at.
    pub queued_recordings: u64,
    /// How many journals of builds are kept.
    pub journals: u64,
    /// What they take, in bytes.
    pub journal_bytes: u64,
    /// Builds, newest first.
    pub builds: Vec<BuildStatus>,
    /// All of them together.
    pub totals: Totals,
}

impl State {
    pub(super) fn answer(&mut self, request: Request) {
        match request {
            Request::Status(reply) => {
                let records = self.workshop.store.counts().unwrap_or_default();
                let builds = self.builds();
                let mut leads = Leads::default();
                builds.iter().for_each(|build| leads.merge(&build.leads));
                let builds: Vec<BuildStatus> = builds.into_iter().map(Build::status).collect();
                let (journals, journal_bytes) = self.workshop.journals.size();
                let observations = self.observations.upgrade();
                let waiting = |all: usize, free: usize| (all - free) as u64;
                let status = Status {
                    records,
                    watched_directories: self.watching.as_ref().map(Watching::directories),
                    open_builds: self.open.len() as u64,
                    queued_observations: observations
                        .map_or(0, |it| waiting(it.max_capacity(), it.capacity())),
                    queued_recordings: waiting(
                        self.recorder.max_capacity(),
                        self.recorder.capacity(),
                    ),
                    journals,
                    journal_bytes,
                    unadaptable: self.workshop.unadaptable.load(Ordering::Relaxed),
                    totals: Totals::of(&builds, &leads),
                    builds,
                };
                // Whoever asked may have gone.
                let _ = reply.send(status);
            }
            Request::Builds(reply) => {
                // Whoever asked may have gone.
                let _ = reply.send(self.all_builds());
            }
            Request::Journal(prefix, reply) => {
                let library = self.library(&prefix);
                task::spawn("journal", async move {
                    // Whoever asked may have gone.
                    let _ = reply.send(library.find(&prefix).await);
                });
            }
            Request::Explain(question, reply) => {
                let library = self.library(question.build.as_deref().unwrap_or_default());
                task::spawn("explanation", async move {
                    // Whoever asked may have gone.
                    let _ = reply.send(explain(&library, &question).await);
                });
            }
            Request::Run(request) => self.answer_run(request),
            Request::Records(request) => {
                archive::dispatch(request, &self.workshop, &self.recorder);
            }
            Request::Wait(reply) => {
                self.close_exited();
                self.waiting.push(reply);
            }
            Request::Finish(reply) => {
                let open: Vec<BuildKey> = self.open.keys().cloned().collect();
                for key in open {
                    self.close(&key);
                }
                // Dropping the reply answers it: nothing more will be recorded.
                let _ = self.recorder.try_send(recorder::Message::Flush(reply));
            }
        }
    }

    fn answer_run(&mut self, request: runs::Request) {
        // Whoever asked may have gone.
        match request {
            runs::Request::Open(run, reply) => drop(reply.send(self.open_run(run))),
            runs::Request::Look(id, reply) => {
                let build = self.open.get_mut(&BuildKey::Run(id.into()));
                let status = build.map(|build| {
                    build.last_call = Instant::now();
                    build.status()
                });
                drop(reply.send(status));
            }
            runs::Request::Close(id, reply) => {
                let key = BuildKey::Run(id.into());
                let is_open = self.open.contains_key(&key);
                self.close(&key);
                let closed = self.closed.front().filter(|_| is_open);
                drop(reply.send(closed.map(Build::status)));
            }
        }
    }

    /// Opens a run, and has it primed before its command has begun.
    fn open_run(&mut self, run: OpenRun) -> OpenedRun {
        let caller = self.callers.runs.open(run, self.builds + 1);
        let mut build = self.begin(Arc::new(caller));
        if let BuildKey::Run(id) = &build.caller.key {
            build.id = id.to_string();
        }
        let (reply, planned) = oneshot::channel();
        let reply = Arc::new(reply);
        let groups = self.primings.iter();
        for (_, priming) in groups.filter(|(group, _)| match group {
            Group::Invocation(key) => self
                .parents
                .get(key)
                .is_some_and(|known| build.caller.works_on(&known.identity)),
            Group::Actions { .. } => false,
        }) {
            priming.tell(Message::Settled {
                _reply: reply.clone(),
            });
        }
        let opened = OpenedRun {
            id: build.id.clone(),
            planned,
            keeps_records: self.workshop.store.is_on_disk(),
        };
        self.open.insert(build.caller.key.clone(), build);
        opened
    }

    /// The builds that are known, newest first.
    pub(super) fn builds(&self) -> Vec<&Build> {
        let all = self.open.values().chain(&self.closed);
        let shown = |build: &&Build| {
            let is_invocation = !matches!(build.caller.key, BuildKey::Action(_) | BuildKey::Run(_));
            build.has_asked() || !is_invocation
        };
        let mut builds: Vec<&Build> = all.filter(shown).collect();
        builds.sort_by_key(|build| std::cmp::Reverse(build.number));
        builds
    }

    /// The same, and those of earlier runs of the daemon.
    fn all_builds(&self) -> Vec<BuildStatus> {
        let mut builds: Vec<BuildStatus> = self.builds().into_iter().map(Build::status).collect();
        let mut kept = self.workshop.journals.list();
        kept.retain(|kept| !builds.iter().any(|known| known.id == kept.id));
        builds.extend(kept);
        builds
    }

    /// The journals of all builds; of those that are open, the ones whose ids begin with `prefix`.
    fn library(&self, prefix: &str) -> Library {
        let open = self.open.values();
        let open = open.filter(|build| build.id.starts_with(prefix));
        let open = open.map(|build| {
            let fresh = Fresh {
                build: build.status(),
                journal: Arc::new(build.journal.clone()),
            };
            (build.id.clone(), fresh)
        });
        Library {
            open: open.collect(),
            builds: self.all_builds(),
            workshop: self.workshop.clone(),
        }
    }

    pub(super) fn answer_waiting(&mut self) {
        self.waiting.retain(|reply| !reply.is_closed());
        let counts = self.workshop.flights.counts();
        // Who waits may be part of a run, which ends later.
        let mut open = self.open.keys();
        let quiet = open.all(|key| matches!(key, BuildKey::Run(_)))
            && self.workshop.activities.is_quiet()
            && counts.queued + counts.running == 0;
        if quiet {
            for reply in self.waiting.drain(..) {
                let _ = reply.send(());
            }
        }
    }
}
