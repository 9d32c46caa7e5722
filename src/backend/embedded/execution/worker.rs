//! Carries out one action whose turn it is: stage, run, take in what was written.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use prost_types::Timestamp;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::action::Assignment;
use super::failure::Failure;
use super::outputs;
use super::process::{self, Ended};
use super::sandbox::Sandbox;
use super::staging::Stage;
use super::tree::{InputTree, TreeReader};
use crate::backend::embedded::blobs::Blobs;
use crate::digest::Digest;
use crate::reapi::{Action, ActionResult, ExecutedActionMetadata};
use crate::task;

/// What it takes to carry out actions.
pub struct Worker {
    /// Where inputs come from, and outputs go to.
    pub blobs: Arc<Blobs>,
    /// How commands are run.
    pub sandbox: Sandbox,
    /// How long a command may run.
    pub max_timeout: Duration,
    /// What this machine is called.
    pub name: String,
    /// Where input trees are read.
    pub trees: TreeReader,
}

/// An action with its inputs, all of them there, and there to stay.
pub struct Prepared {
    assignment: Assignment,
    tree: InputTree,
}

/// What became of an action.
pub struct Outcome {
    /// As far as it came.
    pub result: ActionResult,
    /// Why it did not come to its end.
    pub failure: Option<Failure>,
}

impl Worker {
    /// Reads all that `action` consists of, but for the contents of its inputs.
    ///
    /// # Errors
    /// `Failure`, when something is missing or malformed.
    pub async fn prepare(
        self: &Arc<Self>,
        digest: Digest,
        action: Action,
    ) -> Result<Prepared, Failure> {
        self.blocking("input tree", move |worker| {
            let most = worker.max_timeout;
            let assignment = Assignment::read(&worker.blobs, digest, action, most)?;
            let tree = worker.trees.read(assignment.input_root)?;
            Ok(Prepared { assignment, tree })
        })
        .await
    }

    /// Carries out an action that has entered the queue at `queued`. `started` is called when the
    /// command is about to. What it leaves on disk is removed by the time this returns.
    pub async fn carry_out(
        self: &Arc<Self>,
        prepared: Prepared,
        queued: Timestamp,
        cancelled: &CancellationToken,
        started: impl Fn(&ExecutedActionMetadata),
    ) -> (Outcome, Option<Stage>) {
        let mut result = ActionResult {
            execution_metadata: Some(ExecutedActionMetadata {
                worker: self.name.clone(),
                queued_timestamp: Some(queued),
                worker_start_timestamp: now(),
                ..ExecutedActionMetadata::default()
            }),
            ..ActionResult::default()
        };
        let mut stage = None;
        let done = self.attempt(prepared, cancelled, started, &mut result, &mut stage);
        let failure = done.await.err();
        metadata(&mut result).worker_completed_timestamp = now();
        (Outcome { result, failure }, stage)
    }

    async fn attempt(
        self: &Arc<Self>,
        prepared: Prepared,
        cancelled: &CancellationToken,
        started: impl Fn(&ExecutedActionMetadata),
        result: &mut ActionResult,
        kept: &mut Option<Stage>,
    ) -> Result<(), Failure> {
        metadata(result).input_fetch_start_timestamp = now();
        started(metadata(result));
        let set = self.blocking("staging", move |worker| {
            let Prepared { assignment, tree } = prepared;
            let stage = Stage::set(&worker.blobs, &tree, &assignment)?;
            let refusal = worker.sandbox.refuse(&assignment, &stage);
            let order = worker.sandbox.order(&assignment, &stage);
            Ok((stage, refusal, order, assignment, tree))
        });
        let (stage, refusal, order, assignment, tree) = set.await?;
        let stage = &*kept.insert(stage);
        metadata(result).input_fetch_completed_timestamp = now();

        metadata(result).execution_start_timestamp = now();
        started(metadata(result));
        let began = Instant::now();
        let ended = match &refusal {
            Some((code, _)) => Ended::Exited(*code),
            None => process::run(&order, assignment.timeout, cancelled).await?,
        };
        let took = began.elapsed();
        metadata(result).execution_completed_timestamp = now();
        metadata(result).virtual_execution_duration = took.try_into().ok();
        let timeout = assignment.timeout;
        if let Ended::Exited(code) = ended {
            result.exit_code = code;
        }

        metadata(result).output_upload_start_timestamp = now();
        let (stage, mut taken) = (stage.clone(), result.clone());
        let taken = self.blocking("outputs", move |worker| {
            if let Some((_, message)) = refusal {
                let said = std::fs::write(stage.stderr(), message + "\n");
                said.map_err(Failure::internal)?;
            }
            outputs::take_in(&worker.blobs, &assignment, &stage, &mut taken)?;
            // Until here its blobs had to stay.
            drop(tree);
            Ok(taken)
        });
        *result = taken.await?;
        metadata(result).output_upload_completed_timestamp = now();
        match ended {
            Ended::Exited(_) => Ok(()),
            Ended::Overran => Err(Failure::new(
                Code::DeadlineExceeded,
                format!(
                    "the command was killed after {} s, its timeout",
                    timeout.as_secs_f64()
                ),
            )),
            Ended::Cancelled => Err(Failure::new(Code::Cancelled, "the action was cancelled")),
        }
    }

    /// Runs what blocks elsewhere.
    pub async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        name: &'static str,
        work: impl FnOnce(&Worker) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let worker = self.clone();
        let done = task::blocking(name, move || work(&worker)).await;
        done.unwrap_or_else(|| Err(Failure::stopping()))
    }
}

fn metadata(result: &mut ActionResult) -> &mut ExecutedActionMetadata {
    result.execution_metadata.get_or_insert_default()
}

/// The time, as messages carry it.
pub fn now() -> Option<Timestamp> {
    Some(SystemTime::now().into())
}
