//! Clients that ask for the same at the same time: it is executed once, all are told, and whatever
//! becomes of one of them, or of what they share, the others get what they would have got alone.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

mod compilers;

use std::time::{Duration, Instant};

use primed::reapi::ExecuteOperationMetadata;
use primed::reapi::google::longrunning::Operation;
use prost::Message;
use tempfile::TempDir;
use tonic::{Code, Status, Streaming};

use crate::backend::{FakeBackend, Outcome, Run, compile};
use crate::client::{Action, Build, Recipe, connect, last, response};
use crate::support::{Counts, PATIENCE, Primed, scratch};

/// A backend, primed before it, and a workspace with one source.
struct Stage {
    backend: FakeBackend,
    primed: Primed,
    scratch: TempDir,
}

impl Stage {
    fn set(arguments: &[&str]) -> Self {
        let scratch = scratch();
        let backend = FakeBackend::start(scratch.path());
        let primed = Primed::start_with(scratch.path(), &backend.address(), arguments);
        std::fs::write(scratch.path().join("unit.c"), "unit").unwrap();
        Stage {
            backend,
            primed,
            scratch,
        }
    }

    /// A client with a connection of its own.
    fn client(&self) -> Build {
        let channel = connect(&self.primed.socket());
        Build::elsewhere(channel, self.scratch.path(), "another machine:1")
    }

    /// The action that all ask for, uploaded.
    async fn action(&self) -> Action {
        let client = self.client();
        let action = client.action(Recipe {
            command: "compile unit",
            inputs: &["unit.c"],
            output: "unit.o",
            ..Recipe::default()
        });
        client.upload(&action).await;
        action
    }

    /// A client whose execution of `action` is under way and does not end until clients' may.
    async fn leading(&self, action: &Action) -> (Build, Streaming<Operation>, Operation) {
        self.backend.world.hold_clients(true);
        let client = self.client();
        let mut operations = client.execute(action.digest, false).await.unwrap();
        let first = next(&mut operations).await.unwrap();
        (client, operations, first)
    }

    /// A client that joins what is under way, with what it is told first.
    async fn joining(&self, action: &Action) -> (Build, Streaming<Operation>, Operation) {
        let client = self.client();
        let mut operations = client.execute(action.digest, false).await.unwrap();
        let first = next(&mut operations).await.unwrap();
        (client, operations, first)
    }

    fn runs(&self, action: &Action) -> Vec<Run> {
        let mut runs = self.backend.world.runs();
        runs.retain(|run| run.action == action.digest);
        runs
    }

    async fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let began = Instant::now();
        while !holds() {
            let log = || self.primed.daemon.log();
            assert!(began.elapsed() < PATIENCE / 2, "{what}: never\n{}", log());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn until_logged(&self, what: &str, times: usize) {
        let logged = || self.primed.daemon.log().matches(what).count() >= times;
        self.until(what, logged).await;
    }
}

const JOINS: &str = "a client joins an execution";
const LOOKUP_WAITS: &str = "a lookup waits for an execution";

/// The next operation, or how the stream ended instead.
async fn next(operations: &mut Streaming<Operation>) -> Result<Operation, Option<Status>> {
    let next = tokio::time::timeout(PATIENCE / 2, operations.message());
    match next.await.expect("in time") {
        Ok(Some(operation)) => Ok(operation),
        Ok(None) => Err(None),
        Err(status) => Err(Some(status)),
    }
}

async fn all(operations: &mut Streaming<Operation>) -> (Vec<Operation>, Option<Status>) {
    let mut all = Vec::new();
    loop {
        match next(operations).await {
            Ok(operation) => all.push(operation),
            Err(status) => return (all, status),
        }
    }
}

/// Which of the stages an operation tells of that `tell_stage` has caused.
fn stage(operation: &Operation) -> usize {
    let metadata = operation.metadata.as_ref().unwrap();
    let metadata = ExecuteOperationMetadata::decode(metadata.value.as_slice()).unwrap();
    metadata.stdout_stream_name.parse().unwrap_or(0)
}

#[tokio::test]
async fn an_action_that_three_clients_execute_at_once_is_executed_once_and_all_are_told_the_same() {
    let stage = Stage::set(&[]);
    let action = stage.action().await;
    let (_one, mut first, begun) = stage.leading(&action).await;
    let (_two, mut second, joined) = stage.joining(&action).await;
    let (_three, mut third, _) = stage.joining(&action).await;
    assert_eq!(joined, begun, "the last that was told");
    stage.backend.world.hold_clients(false);
    let (first, ended) = all(&mut first).await;
    assert!(ended.is_none());
    assert_eq!(first.len(), 1);
    assert!(response(&first[0]).unwrap().result.is_some());
    assert_eq!(all(&mut second).await.0, first, "as the backend said it");
    assert_eq!(all(&mut third).await.0, first);
    assert_eq!(stage.runs(&action).len(), 1);
}

#[tokio::test]
async fn stages_reach_every_client_and_one_that_comes_late_begins_with_the_last() {
    let stage = Stage::set(&[]);
    let action = stage.action().await;
    let (_one, mut first, _) = stage.leading(&action).await;
    let (_two, mut second, _) = stage.joining(&action).await;
    for told in 1..=3 {
        stage.backend.world.tell_stage(10);
        assert_eq!(self::stage(&next(&mut first).await.unwrap()), told);
        assert_eq!(self::stage(&next(&mut second).await.unwrap()), told);
    }
    let (_three, mut third, latest) = stage.joining(&action).await;
    assert_eq!(self::stage(&latest), 3);
    stage.backend.world.tell_stage(10);
    for operations in [&mut first, &mut second, &mut third] {
        assert_eq!(self::stage(&next(operations).await.unwrap()), 4);
    }
    stage.backend.world.hold_clients(false);
    for operations in [&mut first, &mut second, &mut third] {
        assert!(next(operations).await.unwrap().done);
    }
}

#[tokio::test]
async fn clients_that_do_not_read_keep_nobody_else_waiting() {
    const STAGES: usize = 400;
    let stage = Stage::set(&[]);
    let action = stage.action().await;
    let (_one, _unread, _) = stage.leading(&action).await;
    let (_two, _unread_too, _) = stage.joining(&action).await;
    let (_three, mut read, _) = stage.joining(&action).await;
    for told in 1..=STAGES {
        stage.backend.world.tell_stage(16 * 1024);
        assert_eq!(self::stage(&next(&mut read).await.unwrap()), told);
    }
    stage.backend.world.hold_clients(false);
    assert!(next(&mut read).await.unwrap().done);
    let peak = stage.primed.daemon.peak_memory();
    assert!(peak < 128 * 1024 * 1024, "{peak} bytes");
}

#[tokio::test]
async fn a_lone_client_that_reads_slowly_misses_nothing() {
    const STAGES: usize = 1000;
    let stage = Stage::set(&[]);
    let action = stage.action().await;
    let (_one, mut operations, _) = stage.leading(&action).await;
    for _ in 0..STAGES {
        stage.backend.world.tell_stage(4 * 1024);
    }
    for told in 1..=STAGES {
        assert_eq!(self::stage(&next(&mut operations).await.unwrap()), told);
    }
}

#[tokio::test]
async fn others_go_on_when_the_client_that_began_it_leaves_and_the_last_one_ends_it() {
    let stage = Stage::set(&[]);
    let action = stage.action().await;
    let (one, first, _) = stage.leading(&action).await;
    let (_two, mut second, _) = stage.joining(&action).await;
    let (three, third, _) = stage.joining(&action).await;
    drop((one, first));
    drop((three, third));
    stage.backend.world.tell_stage(10);
    assert_eq!(self::stage(&next(&mut second).await.unwrap()), 1);
    assert!(!stage.runs(&action)[0].left);
    stage.backend.world.hold_clients(false);
    assert!(next(&mut second).await.unwrap().done);
    assert_eq!(stage.runs(&action).len(), 1);

    std::fs::write(stage.scratch.path().join("unit.c"), "another").unwrap();
    let action = stage.action().await;
    let (one, first, _) = stage.leading(&action).await;
    let (two, second, _) = stage.joining(&action).await;
    drop((one, first));
    assert!(!stage.runs(&action)[0].left);
    drop((two, second));
    let left = || stage.runs(&action)[0].left;
    stage.until("the call is cancelled upstream", left).await;
}

#[tokio::test]
async fn what_differs_in_any_respect_is_executed_apart() {
    let stage = Stage::set(&[]);
    let action = stage.action().await;
    let (_one, _first, _) = stage.leading(&action).await;
    let other_instance = stage.client().on_instance("other");
    other_instance.upload(&action).await;
    let apart = [
        stage.client().authorized("Bearer one"),
        stage.client().authorized("Bearer two"),
        other_instance,
    ];
    let mut open = Vec::new();
    for client in &apart {
        let mut operations = client.execute(action.digest, false).await.unwrap();
        next(&mut operations).await.unwrap();
        open.push(operations);
    }
    let mut skipping = stage.client().execute(action.digest, true).await.unwrap();
    next(&mut skipping).await.unwrap();
    assert_eq!(stage.runs(&action).len(), 5);

    let alike = stage.client().authorized("Bearer two");
    let mut joined = alike.execute(action.digest, false).await.unwrap();
    let joined = next(&mut joined).await.unwrap();
    assert_eq!(stage.runs(&action).len(), 5);
    assert!(!joined.name.is_empty());
}

#[tokio::test]
async fn nothing_is_joined_in_mode_none() {
    let stage = Stage::set(&["--mode", "none"]);
    let action = stage.action().await;
    let (_one, _first, _) = stage.leading(&action).await;
    let (_two, _second, _) = stage.joining(&action).await;
    assert_eq!(stage.runs(&action).len(), 2);
}

#[tokio::test]
async fn when_what_they_joined_fails_one_client_executes_anew_and_the_others_join_that() {
    const CLIENTS: usize = 6;
    for outcome in [
        Outcome::Broken(Code::Unavailable),
        Outcome::Broken(Code::Internal),
        Outcome::Failed(Code::ResourceExhausted),
        Outcome::Failed(Code::Aborted),
        Outcome::Cut,
    ] {
        let stage = Stage::set(&[]);
        let action = stage.action().await;
        let broken = outcome.clone();
        stage.backend.world.behave(move |world, run| {
            let is_first = world.count(run.action) == 1;
            if is_first {
                broken.clone()
            } else {
                compile(world, run)
            }
        });
        let (_one, mut first, _) = stage.leading(&action).await;
        let mut others = Vec::new();
        for _ in 0..CLIENTS {
            others.push(stage.joining(&action).await);
        }
        stage.backend.world.hold_clients(false);
        let (told, status) = all(&mut first).await;
        match &outcome {
            Outcome::Broken(code) => assert_eq!(status.unwrap().code(), *code),
            Outcome::Failed(code) => {
                let status = response(told.last().unwrap()).unwrap().status.unwrap();
                assert_eq!(status.code, *code as i32, "as it was told");
            }
            _ => assert!(told.is_empty() && status.is_none(), "{told:?}"),
        }
        for (_, operations, _) in others {
            let result = last(operations).await.result.unwrap();
            assert_eq!(result.exit_code, 0, "{outcome:?}");
        }
        // Those who come just after the second one has ended find its result.
        let runs = stage.runs(&action).len();
        assert!((2..=3).contains(&runs), "{outcome:?}: {runs}");
    }
}

#[tokio::test]
async fn when_everything_fails_every_client_is_told_by_the_backend_itself() {
    let stage = Stage::set(&[]);
    let action = stage.action().await;
    stage
        .backend
        .world
        .behave(|_, _| Outcome::Broken(Code::Unavailable));
    let (_one, mut first, _) = stage.leading(&action).await;
    let (_two, mut second, _) = stage.joining(&action).await;
    stage.backend.world.hold_clients(false);
    for operations in [&mut first, &mut second] {
        let (told, status) = all(operations).await;
        assert!(told.iter().all(|operation| !operation.done));
        assert_eq!(status.unwrap().code(), Code::Unavailable);
    }
}

#[tokio::test]
async fn a_call_that_is_cut_off_at_its_clients_deadline_is_resumed_for_the_others() {
    let stage = Stage::set(&[]);
    let action = stage.action().await;
    stage
        .backend
        .world
        .behave(|world, run| match compile(world, run) {
            Outcome::Output(output) => Outcome::Lost(Code::DeadlineExceeded, output),
            other => other,
        });
    stage.backend.world.keep_open(action.digest);
    let (_one, mut first, begun) = stage.leading(&action).await;
    let (_two, mut second, _) = stage.joining(&action).await;
    stage.backend.world.let_end(action.digest);
    let (told, status) = all(&mut first).await;
    assert!(told.is_empty());
    assert_eq!(status.unwrap().code(), Code::DeadlineExceeded);
    let resumed = || !stage.backend.world.waits.lock().is_empty();
    stage.until("the other one goes on by name", resumed).await;
    assert_eq!(*stage.backend.world.waits.lock(), [begun.name]);
    stage.backend.world.hold_clients(false);
    let (told, status) = all(&mut second).await;
    assert!(told.last().is_some_and(|last| last.done), "{told:?}");
    assert!(status.is_none());
    assert_eq!(stage.runs(&action).len(), 1);
}

#[tokio::test]
async fn a_client_that_has_lost_its_stream_goes_on_by_name_while_others_wait_and_afterwards() {
    let stage = Stage::set(&[]);
    let action = stage.action().await;
    let (_one, mut first, begun) = stage.leading(&action).await;
    let (two, second, joined) = stage.joining(&action).await;
    assert_eq!(joined.name, begun.name);
    drop(second);
    stage.backend.world.tell_stage(10);
    next(&mut first).await.unwrap();
    let mut resumed = two.wait(&joined.name).await.unwrap();
    assert_eq!(self::stage(&next(&mut resumed).await.unwrap()), 1);
    assert!(
        stage.backend.world.waits.lock().is_empty(),
        "it is known here"
    );
    stage.backend.world.hold_clients(false);
    let done = next(&mut resumed).await.unwrap();
    assert!(done.done);
    assert_eq!(next(&mut first).await.unwrap(), done);
    assert!(next(&mut first).await.is_err());

    let mut late = two.wait(&joined.name).await.unwrap();
    assert_eq!(all(&mut late).await.0.last(), Some(&done));
    assert_eq!(
        stage.backend.world.waits.lock().len(),
        1,
        "the backend says it"
    );
}

#[tokio::test]
async fn a_lookup_waits_for_what_another_client_executes_and_hits() {
    let stage = Stage::set(&[]);
    let action = stage.action().await;
    let (_one, first, _) = stage.leading(&action).await;
    let client = stage.client();
    let release = async {
        stage.until_logged(LOOKUP_WAITS, 1).await;
        assert!(stage.backend.world.lookups(action.digest).is_empty());
        stage.backend.world.hold_clients(false);
    };
    let (found, ()) = tokio::join!(client.lookup(action.digest), release);
    assert_eq!(found.unwrap(), last(first).await.result.unwrap());
    assert_eq!(stage.runs(&action).len(), 1);
}

#[tokio::test]
async fn a_lookup_is_let_go_well_before_its_deadline_whoever_executes() {
    let stage = Stage::set(&[]);
    let action = stage.action().await;
    let (_one, _first, _) = stage.leading(&action).await;
    let deadline = Duration::from_secs(4);
    let client = stage.client();
    let found = client.lookup_within(action.digest, Some(deadline)).await;
    assert_eq!(found.unwrap_err().code(), Code::NotFound);
    assert_eq!(stage.primed.daemon.log().matches(LOOKUP_WAITS).count(), 1);
}

#[tokio::test]
async fn who_has_waited_for_a_failure_by_a_lookup_does_not_wait_for_it_again() {
    let stage = Stage::set(&[]);
    let action = stage.action().await;
    *stage.backend.world.keeps_failures.lock() = false;
    stage.backend.world.behave(|_, _| Outcome::Exit(7));
    let (_one, first, _) = stage.leading(&action).await;
    let client = stage.client();
    let release = async {
        stage.until_logged(LOOKUP_WAITS, 1).await;
        stage.backend.world.hold_clients(false);
    };
    let (found, ()) = tokio::join!(client.lookup(action.digest), release);
    assert_eq!(found.unwrap_err().code(), Code::NotFound);
    assert_eq!(last(first).await.result.unwrap().exit_code, 7);
    for runs in [1, 2] {
        let operations = client.execute(action.digest, false).await.unwrap();
        assert_eq!(last(operations).await.result.unwrap().exit_code, 7);
        assert_eq!(
            stage.runs(&action).len(),
            runs,
            "one has waited for it, once"
        );
    }
}

#[tokio::test]
async fn one_of_several_cancels_for_itself_alone_and_a_lone_one_for_good() {
    let stage = Stage::set(&[]);
    let action = stage.action().await;
    let (one, first, begun) = stage.leading(&action).await;
    let (two, mut second, _) = stage.joining(&action).await;
    one.cancel(&begun.name).await;
    assert!(stage.backend.world.cancelled.lock().is_empty());
    drop((one, first));
    stage.backend.world.tell_stage(10);
    assert_eq!(self::stage(&next(&mut second).await.unwrap()), 1);
    two.cancel(&begun.name).await;
    assert_eq!(*stage.backend.world.cancelled.lock(), [begun.name]);
}

#[tokio::test]
async fn what_is_silent_for_too_long_is_executed_beside_once_for_all_and_the_first_result_counts() {
    let stage = Stage::set(&["--hedge-after", "6"]);
    let action = stage.action().await;
    let (_one, mut first, _) = stage.leading(&action).await;
    let (_two, second, _) = stage.joining(&action).await;
    let (_three, third, _) = stage.joining(&action).await;
    // The first one stays stuck.
    let hedged = || stage.runs(&action).len() == 2;
    stage.until("it is executed beside", hedged).await;
    stage.until_logged("a joined execution is silent", 2).await;
    let (_four, fourth, _) = stage.joining(&action).await;
    stage.backend.world.let_end_after(1);
    for operations in [second, third, fourth] {
        assert_eq!(last(operations).await.result.unwrap().exit_code, 0);
    }
    assert_eq!(stage.runs(&action).len(), 2);
    assert!(!stage.runs(&action)[0].over, "its own client still waits");
    stage.backend.world.hold_clients(false);
    assert!(next(&mut first).await.unwrap().done);
}

#[tokio::test]
async fn what_was_executed_beside_in_vain_is_cancelled() {
    let stage = Stage::set(&["--hedge-after", "1"]);
    let action = stage.action().await;
    let (_one, _first, _) = stage.leading(&action).await;
    let (_two, second, _) = stage.joining(&action).await;
    let hedged = || stage.runs(&action).len() == 2;
    stage.until("it is executed beside", hedged).await;
    stage.backend.world.let_end_before(1);
    assert_eq!(last(second).await.result.unwrap().exit_code, 0);
    let cancelled = || stage.backend.world.cancelled.lock().clone();
    stage
        .until("it is cancelled", || !cancelled().is_empty())
        .await;
    assert_eq!(cancelled(), ["operation-1"]);
}

#[tokio::test]
async fn a_speculation_that_is_stuck_is_executed_by_the_client_as_well() {
    let stage = Stage::set(&["--hedge-after", "1"]);
    let workspace = stage.scratch.path().join("workspace");
    std::fs::create_dir(&workspace).unwrap();
    std::fs::write(workspace.join("unit.c"), "unit").unwrap();
    let recipe = Recipe {
        command: "compile unit",
        inputs: &["unit.c"],
        output: "unit.o",
        ..Recipe::default()
    };
    let build = Build::begin(&stage.primed.socket(), &workspace);
    build.run(&build.action(recipe)).await;
    build.end();
    stage.primed.wait();

    stage.backend.world.hold(true);
    std::fs::write(workspace.join("unit.c"), "changed").unwrap();
    let build = Build::begin(&stage.primed.socket(), &workspace);
    build.greet().await;
    let running = || stage.backend.world.running_speculative() == 1;
    stage.until("it is executed ahead of time", running).await;
    let action = build.action(recipe);
    build.upload(&action).await;
    let operations = build.execute(action.digest, false).await.unwrap();
    assert_eq!(last(operations).await.result.unwrap().exit_code, 0);
    let runs = stage.runs(&action);
    let speculative: Vec<bool> = runs.iter().map(|run| run.speculative).collect();
    assert_eq!(speculative, [true, false]);
    stage.backend.world.hold(false);
    build.end();
    stage.primed.wait();
    let counts = Counts::newest(&stage.primed.status());
    assert_eq!((counts.joined, counts.missed), (0, 1));
}
