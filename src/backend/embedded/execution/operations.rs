//! What runs, and who waits for it. An action that may be cached runs once, however many ask for it
//! at the same time; each of them has an operation of its own, which it can wait for again, also
//! for a while after the end, and cancel. An execution that nobody listens to goes on, since clients
//! come back for it; it is stopped once all who asked for it have cancelled.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use moka::sync::Cache;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use uuid::Uuid;

use super::failure::Failure;
use super::inline::Inlined;
use super::queue::{Queue, Slot, Ticket};
use super::staging::Stage as Staged;
use super::worker::{Outcome, Worker, now};
use super::{Counts, action, any};
use crate::backend::embedded::results::Results;
use crate::digest::Digest;
use crate::reapi::execution_stage::Value as Stage;
use crate::reapi::google::longrunning::{Operation, operation};
use crate::reapi::{
    Action, ActionResult, ExecuteOperationMetadata, ExecuteResponse, ExecutedActionMetadata,
};
use crate::task;

/// How long an operation that is done can be waited for.
const REMEMBERED: Duration = Duration::from_secs(10 * 60);
/// What such operations may take in memory.
const REMEMBERED_BYTES: u64 = 32 * 1024 * 1024;
/// How often those who wait are told that nothing is new: some clients give up after a minute.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Whose result it will be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The instance that it was asked for under.
    pub instance: String,
    /// The action.
    pub action: Digest,
}

/// How an execution is asked for.
#[derive(Clone, Debug)]
pub struct Wish {
    /// REAPI's priority: a larger number is less urgent.
    pub priority: i32,
    /// Whether the action cache is not to be asked.
    pub skip_cache_lookup: bool,
    /// What the result is to hold.
    pub inlined: Inlined,
}

/// All operations of a server.
pub struct Operations {
    worker: Arc<Worker>,
    results: Arc<Results>,
    queue: Arc<Queue>,
    state: Mutex<State>,
    ended: Cache<String, Arc<Waiter>>,
}

#[derive(Default)]
struct State {
    in_flight: HashMap<Key, Arc<Run>>,
    waiters: HashMap<String, Arc<Waiter>>,
}

/// One execution.
struct Run {
    key: Key,
    progress: watch::Sender<Progress>,
    wanted: Mutex<Wanted>,
    cancelled: CancellationToken,
}

/// By whom an execution is wanted, and how much.
struct Wanted {
    /// Names of all operations.
    names: Vec<String>,
    /// How many of them have not been cancelled.
    by: usize,
    priority: i32,
    ticket: Option<Ticket>,
}

/// How far an execution has come.
#[derive(Clone)]
struct Progress {
    stage: Stage,
    metadata: ExecutedActionMetadata,
    response: Option<Arc<ExecuteResponse>>,
}

/// One operation: somebody's share in an execution.
pub struct Waiter {
    name: String,
    inlined: Inlined,
    run: Arc<Run>,
    cancelled: CancellationToken,
}

impl Operations {
    /// Operations that `worker` carries out, `jobs` at a time.
    pub fn new(worker: Arc<Worker>, results: Arc<Results>, jobs: usize) -> Arc<Self> {
        let weigh = |name: &String, waiter: &Arc<Waiter>| {
            let response = waiter.run.progress.borrow().response.clone();
            let response = response.map_or(0, |response| response.encoded_len());
            u32::try_from(name.len() + response + 512).unwrap_or(u32::MAX)
        };
        Arc::new(Operations {
            worker,
            results,
            queue: Queue::new(jobs),
            state: Mutex::default(),
            ended: Cache::builder()
                .weigher(weigh)
                .max_capacity(REMEMBERED_BYTES)
                .time_to_live(REMEMBERED)
                .build(),
        })
    }

    /// What runs, and what waits for its turn.
    pub fn counts(&self) -> Counts {
        let (running, queued) = self.queue.counts();
        Counts { running, queued }
    }

    /// Begins an execution, or joins the one that is under way.
    pub async fn begin(self: &Arc<Self>, key: Key, wish: Wish) -> Arc<Waiter> {
        let digest = key.action;
        let read = move |worker: &Worker| action::read(&worker.blobs, digest);
        let action = match self.worker.blocking("action", read).await {
            Ok(action) => action,
            Err(failure) => {
                let run = Run::new(key, wish.priority);
                let waiter = self.wait_for(&run, &wish);
                self.end(&run, failed(ActionResult::default(), &failure));
                return waiter;
            }
        };
        if action.do_not_cache {
            let run = Run::new(key, wish.priority);
            let waiter = self.wait_for(&run, &wish);
            self.start(run, action, wish);
            return waiter;
        }
        loop {
            let mut checking = {
                let mut state = self.state.lock();
                let Some(run) = state.in_flight.get(&key).cloned() else {
                    let run = Run::new(key.clone(), wish.priority);
                    state.in_flight.insert(key, run.clone());
                    let waiter = enlist(&mut state, &run, &wish);
                    drop(state);
                    self.start(run, action, wish);
                    return waiter;
                };
                let stage = run.progress.borrow().stage;
                if !wish.skip_cache_lookup || stage != Stage::CacheCheck {
                    return enlist(&mut state, &run, &wish);
                }
                run.progress.subscribe()
            };
            // That one may be answered by a result from before this request.
            let _ = checking
                .wait_for(|progress| progress.stage != Stage::CacheCheck)
                .await;
        }
    }

    /// The operation of that name.
    pub fn find(&self, name: &str) -> Option<Arc<Waiter>> {
        let waiter = self.state.lock().waiters.get(name).cloned();
        waiter.or_else(|| self.ended.get(name))
    }

    /// Ends an operation. The execution goes on if others wait for it.
    pub fn cancel(&self, waiter: &Waiter) {
        let mut state = self.state.lock();
        if waiter.cancelled.is_cancelled() || waiter.run.is_over() {
            return;
        }
        waiter.cancelled.cancel();
        let mut wanted = waiter.run.wanted.lock();
        wanted.by -= 1;
        if wanted.by == 0 {
            // Nobody may join it any more.
            forget(&mut state, &waiter.run);
            waiter.run.cancelled.cancel();
        }
    }

    /// The operation as it is now.
    pub async fn operation(&self, waiter: &Waiter) -> Operation {
        let progress = waiter.run.progress.borrow().clone();
        self.shown(waiter, progress).await
    }

    /// Tells `listener` how the operation proceeds, until it is done.
    pub async fn follow(
        self: Arc<Self>,
        waiter: Arc<Waiter>,
        listener: mpsc::Sender<Result<Operation, Status>>,
    ) {
        let mut news = waiter.run.progress.subscribe();
        loop {
            let progress = news.borrow_and_update().clone();
            let operation = self.shown(&waiter, progress).await;
            let done = operation.done;
            if listener.send(Ok(operation)).await.is_err() || done {
                return;
            }
            tokio::select! {
                _ = news.changed() => {}
                () = waiter.cancelled.cancelled() => {}
                () = tokio::time::sleep(KEEP_ALIVE) => {}
                () = listener.closed() => return,
            }
        }
    }

    async fn shown(&self, waiter: &Waiter, progress: Progress) -> Operation {
        let response = match progress.response {
            Some(response) => Some(waiter.inlined.grant(&self.worker.blobs, &response).await),
            None if waiter.cancelled.is_cancelled() => {
                let failure = Failure::new(Code::Cancelled, "the operation was cancelled");
                Some(failed(ActionResult::default(), &failure))
            }
            None => None,
        };
        let stage = match response {
            Some(_) => Stage::Completed,
            None => progress.stage,
        };
        let action = waiter.run.key.action;
        let metadata = ExecuteOperationMetadata {
            stage: stage as i32,
            action_digest: Some(action.to_proto()),
            partial_execution_metadata: Some(progress.metadata),
            digest_function: action.function().to_proto(),
            ..ExecuteOperationMetadata::default()
        };
        Operation {
            name: waiter.name.clone(),
            metadata: Some(any(&reapi_name("ExecuteOperationMetadata"), &metadata)),
            done: response.is_some(),
            result: response.map(|response| {
                operation::Result::Response(any(&reapi_name("ExecuteResponse"), &response))
            }),
        }
    }

    fn wait_for(&self, run: &Arc<Run>, wish: &Wish) -> Arc<Waiter> {
        enlist(&mut self.state.lock(), run, wish)
    }

    fn start(self: &Arc<Self>, run: Arc<Run>, action: Action, wish: Wish) {
        let unfinished = Unfinished {
            operations: self.clone(),
            run,
        };
        task::spawn("action", unfinished.finish(action, wish));
    }

    /// Takes an execution from its first stage to its last.
    async fn execute(&self, run: &Run, action: Action, wish: Wish) -> Executed {
        let do_not_cache = action.do_not_cache;
        let Key {
            instance,
            action: digest,
        } = &run.key;
        if !do_not_cache
            && !wish.skip_cache_lookup
            && let Some(result) = self.results.get(instance, *digest).await
        {
            return Executed::here(ExecuteResponse {
                result: Some(result),
                cached_result: true,
                ..ExecuteResponse::default()
            });
        }
        let prepared = match self.worker.prepare(*digest, action).await {
            Ok(prepared) => prepared,
            Err(failure) => return Executed::here(failed(ActionResult::default(), &failure)),
        };
        let queued = now().unwrap_or_default();
        run.advance(
            Stage::Queued,
            &ExecutedActionMetadata {
                queued_timestamp: Some(queued),
                ..ExecutedActionMetadata::default()
            },
        );
        let Some(slot) = self.turn(run).await else {
            let failure = Failure::new(Code::Cancelled, "the action was cancelled");
            return Executed::here(failed(ActionResult::default(), &failure));
        };
        let carried = self
            .worker
            .carry_out(prepared, queued, &run.cancelled, |metadata| {
                run.advance(Stage::Executing, metadata);
            });
        let (Outcome { result, failure }, staged) = carried.await;
        let response = match failure {
            Some(failure) => {
                tracing::debug!(action = %digest, reason = failure.message, "an action failed");
                failed(result, &failure)
            }
            None => {
                if result.exit_code == 0 && !do_not_cache {
                    let kept = self.results.put(instance, *digest, &result).await;
                    if let Err(error) = kept {
                        tracing::warn!(action = %digest, %error, "a result cannot be kept");
                    }
                }
                ExecuteResponse {
                    result: Some(result),
                    ..ExecuteResponse::default()
                }
            }
        };
        Executed {
            response,
            slot: Some(slot),
            staged,
        }
    }

    /// Waits for a slot; `None` if the execution is cancelled before there is one.
    async fn turn(&self, run: &Run) -> Option<Slot> {
        let called = {
            let mut wanted = run.wanted.lock();
            let (ticket, called) = self.queue.enter(wanted.priority);
            wanted.ticket = Some(ticket);
            called
        };
        let slot = tokio::select! {
            biased;
            () = run.cancelled.cancelled() => None,
            slot = called => slot.ok(),
        };
        run.wanted.lock().ticket = None;
        slot
    }

    /// Tells all who wait that it is over.
    fn end(&self, run: &Arc<Run>, response: ExecuteResponse) {
        let mut state = self.state.lock();
        forget(&mut state, run);
        run.progress.send_modify(|progress| {
            progress.stage = Stage::Completed;
            let metadata = response.result.as_ref();
            if let Some(metadata) = metadata.and_then(|result| result.execution_metadata.as_ref()) {
                progress.metadata = metadata.clone();
            }
            progress.response = Some(Arc::new(response));
        });
        for name in std::mem::take(&mut run.wanted.lock().names) {
            if let Some(waiter) = state.waiters.remove(&name) {
                self.ended.insert(name, waiter);
            }
        }
    }
}

/// Nobody joins it any more.
fn forget(state: &mut State, run: &Arc<Run>) {
    let current = state.in_flight.get(&run.key);
    if current.is_some_and(|current| Arc::ptr_eq(current, run)) {
        state.in_flight.remove(&run.key);
    }
}

/// Makes an operation of `run`, which has not ended.
fn enlist(state: &mut State, run: &Arc<Run>, wish: &Wish) -> Arc<Waiter> {
    let waiter = Arc::new(Waiter {
        name: Uuid::now_v7().to_string(),
        inlined: wish.inlined.clone(),
        run: run.clone(),
        cancelled: CancellationToken::new(),
    });
    let mut wanted = run.wanted.lock();
    wanted.by += 1;
    wanted.names.push(waiter.name.clone());
    if wish.priority < wanted.priority {
        wanted.priority = wish.priority;
        if let Some(ticket) = &wanted.ticket {
            ticket.hurry(wish.priority);
        }
    }
    state.waiters.insert(waiter.name.clone(), waiter.clone());
    waiter
}

impl Run {
    fn new(key: Key, priority: i32) -> Arc<Self> {
        let progress = Progress {
            stage: Stage::CacheCheck,
            metadata: ExecutedActionMetadata::default(),
            response: None,
        };
        Arc::new(Run {
            key,
            progress: watch::Sender::new(progress),
            wanted: Mutex::new(Wanted {
                names: Vec::new(),
                by: 0,
                priority,
                ticket: None,
            }),
            cancelled: CancellationToken::new(),
        })
    }

    fn is_over(&self) -> bool {
        self.progress.borrow().response.is_some()
    }

    fn advance(&self, stage: Stage, metadata: &ExecutedActionMetadata) {
        self.progress.send_modify(|progress| {
            progress.stage = stage;
            progress.metadata = metadata.clone();
        });
    }
}

/// The end of an execution, and what it still holds.
struct Executed {
    response: ExecuteResponse,
    slot: Option<Slot>,
    staged: Option<Staged>,
}

impl Executed {
    /// One that took no slot.
    fn here(response: ExecuteResponse) -> Self {
        Executed {
            response,
            slot: None,
            staged: None,
        }
    }
}

/// An execution that must come to an end, whatever becomes of its task.
struct Unfinished {
    operations: Arc<Operations>,
    run: Arc<Run>,
}

impl Unfinished {
    async fn finish(self, action: Action, wish: Wish) {
        let executed = self.operations.execute(&self.run, action, wish).await;
        self.operations.end(&self.run, executed.response);
        if let Some(staged) = executed.staged {
            // What it has left is removed before another takes its slot, so that never more is
            // left than there are slots.
            let _ = task::blocking("staging", move || staged.strike()).await;
        }
        drop(executed.slot);
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.run.is_over() {
            let failure = Failure::stopping();
            let response = failed(ActionResult::default(), &failure);
            self.operations.end(&self.run, response);
        }
    }
}

/// The response of an action that did not run to its end.
fn failed(result: ActionResult, failure: &Failure) -> ExecuteResponse {
    ExecuteResponse {
        result: Some(result),
        status: Some(failure.to_status()),
        ..ExecuteResponse::default()
    }
}

fn reapi_name(message: &str) -> String {
    format!("build.bazel.remote.execution.v2.{message}")
}
