//! What clients and backend see of primed, proven against a backend that does as the test says.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

mod isolation;
mod observed_changes;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use primed::cas::Digest;
use primed::reapi::ActionResult;
use primed::reapi::google::longrunning::Operation;
use tempfile::TempDir;
use tonic::{Code, Streaming};

use crate::backend::{FakeBackend, LEAST_URGENT, Outcome, Run, World, compile};
use crate::client::{Action, Build, Recipe, Way, connect, last, response};
use crate::support::{Counts, PATIENCE, Primed, scratch};

/// Sources `0.c`, `1.c`, … that all read `common.h`.
const UNITS: usize = 6;

/// A backend, primed before it, and a workspace in which a "program" is built.
struct Stage {
    backend: FakeBackend,
    primed: Primed,
    workspace: PathBuf,
    _scratch: TempDir,
}

impl Stage {
    fn set(arguments: &[&str]) -> Self {
        let scratch = scratch();
        let backend = FakeBackend::start(scratch.path());
        let primed = Primed::start_with(scratch.path(), &backend.address(), arguments);
        let workspace = scratch.path().join("workspace");
        std::fs::create_dir_all(workspace.join("src")).unwrap();
        std::fs::create_dir_all(workspace.join("include")).unwrap();
        std::fs::create_dir_all(workspace.join("out")).unwrap();
        let stage = Stage {
            backend,
            primed,
            workspace,
            _scratch: scratch,
        };
        stage.write("include/common.h", "common");
        for unit in 0..UNITS {
            stage.write(&format!("src/{unit}.c"), &format!("unit {unit}"));
        }
        stage
    }

    /// A stage on which the program was built once.
    async fn built(arguments: &[&str]) -> Self {
        let stage = Stage::set(arguments);
        let ways = stage.build().await;
        assert_eq!(ways, [Way::Executed; UNITS + 1]);
        let recorded = &stage.primed.status()["records"]["actions"];
        assert_eq!(*recorded, UNITS + 1, "{}", stage.primed.daemon.log());
        stage
    }

    fn write(&self, path: &str, content: &str) {
        std::fs::write(self.workspace.join(path), content).unwrap();
    }

    fn begin(&self) -> Build {
        Build::begin(&self.primed.socket(), &self.workspace)
    }

    /// Builds the program in a build of its own, and waits until it is recorded.
    async fn build(&self) -> Vec<Way> {
        let build = self.begin();
        let ways = self.build_all(&build).await;
        // Its process is looked at some milliseconds after its first call, and must live by then.
        let label = format!("make in {}", self.workspace.display());
        self.until("it is seen who builds", || {
            let builds = &self.primed.status()["builds"];
            let mut open = builds.as_array().unwrap().iter();
            open.any(|build| build["label"] == label && build["ended_unix_ms"].is_null())
        })
        .await;
        build.end();
        self.primed.wait();
        ways
    }

    async fn build_all(&self, build: &Build) -> Vec<Way> {
        let mut ways = Vec::new();
        for unit in 0..UNITS {
            ways.push(self.run(build, &compile_of(build, unit)).await);
        }
        ways.push(self.run(build, &link_of(build)).await);
        ways
    }

    /// Runs one action and puts its output into the workspace, as clients do.
    async fn run(&self, build: &Build, action: &Action) -> Way {
        let (way, result) = build.run(action).await;
        assert_eq!(result.exit_code, 0);
        let output = self.output(build, &result);
        std::fs::write(self.workspace.join(&action.output), output).unwrap();
        way
    }

    fn output(&self, build: &Build, result: &ActionResult) -> bytes::Bytes {
        let digest = result.output_files[0].digest.as_ref().unwrap();
        let digest = build.digest_function.read(Some(digest)).unwrap();
        self.backend.world.blob(&build.instance, digest).unwrap()
    }

    fn counts(&self) -> Counts {
        Counts::newest(&self.primed.status())
    }

    /// Begins a build after a change of the common header, with primed's executions held, and
    /// waits until `running` of them run.
    async fn begin_held(&self, running: usize) -> Build {
        self.backend.world.hold(true);
        self.write("include/common.h", "changed");
        let build = self.begin();
        build.greet().await;
        self.until("primed executes", || {
            self.backend.world.running_speculative() == running
        })
        .await;
        build
    }

    /// Begins a build in the same way, in which a client executes what nobody foresaw and is told that
    /// it is queued, until so many executions have given way to it.
    async fn begin_giving_way(&self, count: u64) -> (Build, Streaming<Operation>) {
        let build = self.begin_held(UNITS).await;
        let unforeseen = build.action(Recipe {
            command: "compile otherwise",
            inputs: &["src/0.c"],
            output: "out/otherwise.o",
            ..Recipe::default()
        });
        build.upload(&unforeseen).await;
        self.backend.world.hold_clients(true);
        *self.backend.world.tells_queued.lock() = true;
        let mut operations = build.execute(unforeseen.digest, false).await.unwrap();
        operations.message().await.unwrap().unwrap();
        let gave_way = || self.primed.status()["speculation"]["gave_way"].as_u64();
        self.until("so many give way", || gave_way() >= Some(count))
            .await;
        (build, operations)
    }

    async fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let began = Instant::now();
        while !holds() {
            assert!(
                began.elapsed() < PATIENCE / 4,
                "{what}: never\n{}",
                self.primed.daemon.log()
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

fn compile_of(build: &Build, unit: usize) -> Action {
    build.action(Recipe {
        command: &format!("compile {unit}"),
        inputs: &[&format!("src/{unit}.c"), "include/common.h"],
        output: &format!("out/{unit}.o"),
        ..Recipe::default()
    })
}

fn link_of(build: &Build) -> Action {
    let objects: Vec<String> = (0..UNITS).map(|unit| format!("out/{unit}.o")).collect();
    let objects: Vec<&str> = objects.iter().map(String::as_str).collect();
    build.action(Recipe {
        command: "link",
        inputs: &objects,
        output: "out/program",
        ..Recipe::default()
    })
}

const CAP: [&str; 2] = ["--max-speculative", "8"];

#[tokio::test]
async fn a_backend_that_takes_no_updates_costs_one_warning_and_nothing_else() {
    let stage = Stage::built(&["--share"]).await;
    stage.write("include/common.h", "changed");
    let ways = stage.build().await;
    assert!(ways.iter().all(|way| *way != Way::Executed), "{ways:?}");
    let log = stage.primed.daemon.log();
    let warnings: Vec<_> = log.lines().filter(|line| line.contains(" WARN ")).collect();
    assert_eq!(warnings.len(), 1, "{warnings:#?}");
    for word in ["not shared", "action-cache updates", "credentials"] {
        assert!(warnings[0].contains(word), "{warnings:#?}");
    }
}

#[tokio::test]
async fn all_that_changed_is_primed_at_low_priority_and_under_primeds_name() {
    let stage = Stage::built(&CAP).await;
    assert!(stage.backend.world.speculative().is_empty());
    stage.write("include/common.h", "changed");
    assert_eq!(stage.build().await, [Way::Found; UNITS + 1]);
    let runs = stage.backend.world.speculative();
    assert_eq!(runs.len(), UNITS + 1, "each once");
    assert!(
        runs.iter().all(|run| run.priority == LEAST_URGENT),
        "{runs:#?}"
    );
    assert_eq!(stage.counts().missed, 0);
    assert_eq!(stage.counts().primed, UNITS as u64 + 1);
    let own = stage.backend.world.runs().len() - runs.len();
    assert_eq!(own, UNITS + 1, "those of the first build");
}

#[tokio::test]
async fn nothing_is_executed_when_nothing_changed() {
    let stage = Stage::built(&CAP).await;
    assert_eq!(stage.build().await, [Way::Found; UNITS + 1]);
    assert!(stage.backend.world.speculative().is_empty());
}

#[tokio::test]
async fn an_output_that_stays_equal_ends_the_chain() {
    let stage = Stage::built(&CAP).await;
    stage.write("include/common.h", "common // and a remark");
    assert_eq!(stage.build().await, [Way::Found; UNITS + 1]);
    let runs = stage.backend.world.speculative();
    assert_eq!(runs.len(), UNITS, "no link: {runs:#?}");
}

#[tokio::test]
async fn a_clients_execution_joins_the_one_in_flight_and_sees_its_stages() {
    let stage = Stage::built(&CAP).await;
    let build = stage.begin_held(UNITS).await;
    let action = compile_of(&build, 0);
    // Without a lookup, and without an upload: primed has brought all that is needed.
    let mut operations = build.execute(action.digest, false).await.unwrap();
    let first = operations.message().await.unwrap().unwrap();
    assert!(!first.done);
    assert!(first.name.starts_with("operation-"), "the backend's own");
    assert!(first.metadata.is_some());
    stage.backend.world.hold(false);
    let done = operations.message().await.unwrap().unwrap();
    let result = response(&done).unwrap().result.unwrap();
    assert_eq!(done.name, first.name);
    assert_eq!(result.exit_code, 0);
    assert!(operations.message().await.unwrap().is_none());
    assert_eq!(stage.backend.world.count(action.digest), 1);
    build.end();
    stage.primed.wait();
    assert_eq!(stage.counts().joined, 1);
}

#[tokio::test]
async fn to_a_clients_execution_that_is_told_to_be_queued_others_give_way() {
    let stage = Stage::built(&CAP).await;
    // One, and as it is of no avail, another.
    let (build, mut operations) = stage.begin_giving_way(2).await;
    let world = &stage.backend.world;
    assert!(world.cancelled.lock().len() >= 2);
    // Once a worker has it, no more do.
    world.tell_stage(1);
    world.hold_clients(false);
    world.hold(false);
    assert!(operations.message().await.unwrap().is_some());
    stage
        .until("all is executed", || stage.primed.is_idle())
        .await;
    for unit in 0..UNITS {
        let action = compile_of(&build, unit);
        assert_eq!(build.lookup(action.digest).await.unwrap().exit_code, 0);
    }
    assert_eq!(stage.primed.status()["speculation"]["failed"], 0);
    build.end();
}

/// What the backend was first told to cancel.
fn first_that_was_stopped(world: &World) -> Run {
    let stopped = world.cancelled.lock()[0].clone();
    let index = stopped.strip_prefix("operation-").unwrap();
    world.runs()[index.parse::<usize>().unwrap()].clone()
}

#[tokio::test]
async fn what_had_succeeded_when_it_gave_way_counts_as_brought_by_primed() {
    let stage = Stage::built(&CAP).await;
    let (build, _operations) = stage.begin_giving_way(1).await;
    let world = &stage.backend.world;
    let run = first_that_was_stopped(world);
    world.keep_open(run.action);
    world.finish(&run, Vec::new());
    *world.executes_once.lock() = true;
    world.hold_clients(false);
    world.hold(false);
    stage
        .until("all is executed", || stage.primed.is_idle())
        .await;
    assert_eq!(build.lookup(run.action).await.unwrap().exit_code, 0);
    build.end();
    stage.primed.wait();
    let counts = stage.counts();
    assert_eq!((counts.hit, counts.cached), (1, 0), "{counts:?}");
}

#[tokio::test]
async fn what_had_failed_when_it_gave_way_is_hidden_like_any_other_failure() {
    let stage = Stage::built(&CAP).await;
    let (build, _operations) = stage.begin_giving_way(1).await;
    let world = &stage.backend.world;
    let run = first_that_was_stopped(world);
    world.keep_open(run.action);
    world.fail(&run, 1);
    world.hold_clients(false);
    world.hold(false);
    stage
        .until("all is executed", || stage.primed.is_idle())
        .await;
    let hidden = build.lookup(run.action).await.unwrap_err();
    assert_eq!(hidden.code(), Code::NotFound);
    let operations = build.execute(run.action, false).await.unwrap();
    assert_eq!(last(operations).await.result.unwrap().exit_code, 1);
    build.end();
}

#[tokio::test]
async fn a_lookup_waits_for_what_is_in_flight_and_hits() {
    let stage = Stage::built(&CAP).await;
    let build = stage.begin_held(UNITS).await;
    let action = compile_of(&build, 0);
    let release = async {
        // The lookup has had every chance to be answered too soon.
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(stage.backend.world.running_speculative(), UNITS);
        stage.backend.world.hold(false);
    };
    let (found, ()) = tokio::join!(build.lookup(action.digest), release);
    assert_eq!(found.unwrap().exit_code, 0);
    assert_eq!(stage.backend.world.count(action.digest), 1);
    build.end();
    stage.primed.wait();
    assert_eq!(stage.counts().joined, 1);
}

#[tokio::test]
async fn a_held_lookup_is_let_go_well_before_its_deadline() {
    let stage = Stage::built(&CAP).await;
    let build = stage.begin_held(UNITS).await;
    let action = compile_of(&build, 0);
    let deadline = Duration::from_secs(2);
    let began = Instant::now();
    let answer = build.lookup_within(action.digest, Some(deadline)).await;
    let took = began.elapsed();
    assert_eq!(answer.unwrap_err().code(), Code::NotFound);
    assert!(took >= deadline / 4, "it was held: {took:?}");
    assert!(took < deadline * 3 / 4, "and let go: {took:?}");
}

#[tokio::test]
async fn a_call_that_was_held_in_vain_is_forwarded_with_the_time_that_is_left() {
    let stage = Stage::built(&CAP).await;
    let world = &stage.backend.world;
    world.behave(|world, run| match run.speculative {
        true => Outcome::Broken(Code::Unavailable),
        false => compile(world, run),
    });
    let build = stage.begin_held(UNITS).await;
    let given = Duration::from_secs(60);
    let looked_up = compile_of(&build, 0);
    let executed = compile_of(&build, 1);
    build.upload(&executed).await;
    let operations = build.execute_within(executed.digest, false, Some(given));
    let mut operations = operations.await.unwrap();
    let joined = operations.message().await.unwrap().unwrap();
    assert!(!joined.done, "it has joined the execution in flight");
    let began = Instant::now();
    let release = async {
        // Time that is gone when the calls are forwarded.
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(world.lookups(looked_up.digest).len(), 0);
        assert_eq!(world.count(executed.digest), 1);
        world.hold(false);
    };
    let lookup = build.lookup_within(looked_up.digest, Some(given));
    let (found, execution, ()) = tokio::join!(lookup, last(operations), release);
    let most = given - Duration::from_millis(250);
    let least = given - began.elapsed() - Duration::from_secs(1);
    assert_eq!(found.unwrap_err().code(), Code::NotFound);
    assert_eq!(execution.result.unwrap().exit_code, 0);

    let lookups = world.lookups(looked_up.digest);
    let runs = world.runs();
    let mut runs = runs.iter().filter(|run| run.action == executed.digest);
    let run = runs.find(|run| !run.speculative).unwrap();
    for (call, left) in [("lookup", lookups[0].timeout), ("execution", run.timeout)] {
        let left = left.unwrap_or_else(|| panic!("the {call} has lost its deadline"));
        assert!((least..=most).contains(&left), "{call}: {left:?}");
    }
}

#[tokio::test]
async fn a_speculative_failure_is_not_shown_and_the_client_executes_itself() {
    let stage = Stage::built(&CAP).await;
    stage.write("include/common.h", "#error");
    let build = stage.begin();
    let action = compile_of(&build, 0);
    let answer = build.lookup(action.digest).await;
    assert_eq!(answer.unwrap_err().code(), Code::NotFound);
    // The backend holds the failed result, and would show it.
    build.upload(&action).await;
    let operations = build.execute(action.digest, false).await.unwrap();
    let result = last(operations).await.result.unwrap();
    assert_eq!(result.exit_code, 1);
    let runs = stage.backend.world.runs();
    let of_it: Vec<bool> = runs
        .iter()
        .filter(|run| run.action == action.digest)
        .map(|run| run.speculative)
        .collect();
    assert_eq!(of_it, [true, false]);
    let shown = build.lookup(action.digest).await.unwrap();
    assert_eq!(shown.exit_code, 1, "the client's own failure is its to see");
    build.end();
    stage.primed.wait();
    assert!(!stage.primed.daemon.log().contains("panicked"));
}

#[tokio::test]
async fn a_speculation_that_the_backend_breaks_leaves_the_clients_own_call_whole() {
    for outcome in [
        Outcome::Broken(Code::Unavailable),
        Outcome::Failed(Code::Unavailable),
        Outcome::Failed(Code::ResourceExhausted),
        Outcome::Cut,
    ] {
        let stage = Stage::built(&CAP).await;
        let broken = outcome.clone();
        stage.backend.world.behave(move |world, run| {
            if run.speculative {
                broken.clone()
            } else {
                compile(world, run)
            }
        });
        let build = stage.begin_held(UNITS).await;
        // One that joins, one that waits by a lookup, one that comes later.
        let joins = compile_of(&build, 0);
        build.upload(&joins).await;
        let mut operations = build.execute(joins.digest, false).await.unwrap();
        let first = operations.message().await.unwrap().unwrap();
        assert!(!first.done, "{outcome:?}");
        let waits = compile_of(&build, 1);
        let release = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            stage.backend.world.hold(false);
        };
        let (waited, result, ()) = tokio::join!(build.run(&waits), last(operations), release);
        assert_eq!(waited.0, Way::Executed, "{outcome:?}");
        assert_eq!(waited.1.exit_code, 0, "{outcome:?}");
        assert_eq!(result.result.unwrap().exit_code, 0, "{outcome:?}");
        stage.build_all(&build).await;
        assert_eq!(
            stage.backend.world.count(joins.digest),
            2,
            "{outcome:?}: once each"
        );
        build.end();
        stage.primed.wait();
        stage.backend.world.behave(compile);
        stage.write("include/common.h", "changed again");
        assert_eq!(
            stage.build().await,
            [Way::Found; UNITS + 1],
            "{outcome:?}: it recovers"
        );
    }
}

#[tokio::test]
async fn a_speculation_that_the_backend_refuses_leaves_the_client_alone() {
    let stage = Stage::built(&CAP).await;
    stage.backend.world.behave(|world, run| {
        if run.speculative {
            Outcome::Refused(Code::Unavailable)
        } else {
            compile(world, run)
        }
    });
    stage.write("include/common.h", "changed");
    assert_eq!(stage.build().await, [Way::Executed; UNITS + 1]);
    assert_eq!(stage.counts().missed, UNITS as u64 + 1);
}

#[tokio::test]
async fn a_client_that_skips_the_cache_is_never_joined_nor_recorded() {
    let stage = Stage::built(&CAP).await;
    let build = stage.begin_held(UNITS).await;
    let action = compile_of(&build, 0);
    build.upload(&action).await;
    let operations = build.execute(action.digest, true).await.unwrap();
    let result = last(operations).await.result.unwrap();
    assert_eq!(result.exit_code, 0);
    assert_eq!(
        stage.backend.world.running_speculative(),
        UNITS,
        "primed's own is still under way"
    );
    assert_eq!(stage.backend.world.count(action.digest), 2);
    let unknown = build.action(Recipe {
        command: "other",
        inputs: &["src/0.c"],
        output: "out/other",
        ..Recipe::default()
    });
    build.upload(&unknown).await;
    last(build.execute(unknown.digest, true).await.unwrap()).await;
    stage.backend.world.hold(false);
    build.end();
    stage.primed.wait();
    let status = stage.primed.status();
    assert_eq!(status["records"]["actions"], UNITS + 1);
}

#[tokio::test]
async fn an_action_that_must_not_be_cached_is_neither_recorded_nor_primed() {
    let stage = Stage::set(&CAP);
    let recipe = Recipe {
        command: "now",
        inputs: &["include/common.h"],
        output: "out/now",
        do_not_cache: true,
        ..Recipe::default()
    };
    for content in ["one", "two"] {
        stage.write("include/common.h", content);
        let build = stage.begin();
        let action = build.action(recipe);
        build.upload(&action).await;
        last(build.execute(action.digest, false).await.unwrap()).await;
        stage.run(&build, &compile_of(&build, 0)).await;
        build.end();
        stage.primed.wait();
        assert_eq!(stage.primed.status()["records"]["actions"], 1);
    }
    let runs = stage.backend.world.speculative();
    let arguments: Vec<_> = runs.iter().map(|run| run.arguments.join(" ")).collect();
    assert_eq!(arguments, ["compile 0"]);
}

#[tokio::test]
async fn a_directory_with_fields_that_primed_does_not_know_is_never_rewritten() {
    let stage = Stage::set(&CAP);
    let recipe = Recipe {
        command: "odd",
        inputs: &["include/common.h", "src/0.c"],
        output: "out/odd",
        odd_root: true,
        ..Recipe::default()
    };
    for content in ["one", "two"] {
        stage.write("include/common.h", content);
        let build = stage.begin();
        let action = build.action(recipe);
        assert_eq!(stage.run(&build, &action).await, Way::Executed);
        stage.run(&build, &compile_of(&build, 0)).await;
        build.end();
        stage.primed.wait();
    }
    let runs = stage.backend.world.speculative();
    let arguments: Vec<_> = runs.iter().map(|run| run.arguments.join(" ")).collect();
    assert_eq!(arguments, ["compile 0"], "the other one is primed");
    assert_eq!(stage.primed.status()["speculation"]["unadaptable"], 1);
}

#[tokio::test]
async fn blobs_that_do_not_match_their_digest_are_not_used() {
    let stage = Stage::set(&CAP);
    *stage.backend.world.damage.lock() = true;
    assert_eq!(stage.build().await, [Way::Executed; UNITS + 1]);
    assert_eq!(stage.primed.status()["records"]["actions"], 0);
    // Whole again: the same build, now all hits, is recorded.
    *stage.backend.world.damage.lock() = false;
    assert_eq!(stage.build().await, [Way::Found; UNITS + 1]);
    assert_eq!(stage.primed.status()["records"]["actions"], UNITS + 1);
    stage.write("include/common.h", "changed");
    assert_eq!(stage.build().await, [Way::Found; UNITS + 1]);
    assert!(!stage.primed.daemon.log().contains("panicked"));
}

#[tokio::test]
async fn instances_never_mix() {
    let stage = Stage::set(&["--max-speculative", "32"]);
    let world = &stage.backend.world;
    for instance in ["", "one", "two"] {
        let build = stage.begin().on_instance(instance);
        let ways = stage.build_all(&build).await;
        assert_eq!(ways, [Way::Executed; UNITS + 1], "'{instance}'");
        build.end();
        stage.primed.wait();
    }
    world.hold(true);
    stage.write("include/common.h", "changed");
    let build = stage.begin().on_instance("one");
    build.greet().await;
    let action = compile_of(&build, 0);
    stage
        .until("all three are primed", || world.count(action.digest) == 3)
        .await;
    // A fourth instance has the digest in flight under other names only.
    let other = stage.begin().on_instance("four");
    let answer = other.lookup(action.digest).await;
    assert_eq!(answer.unwrap_err().code(), Code::NotFound);
    other.upload(&action).await;
    last(other.execute(action.digest, false).await.unwrap()).await;
    world.hold(false);
    assert_eq!(stage.build_all(&build).await, [Way::Found; UNITS + 1]);
    other.end();
    build.end();
    stage.primed.wait();
    for instance in ["", "one", "two"] {
        let runs = world.speculative();
        let of_it = runs.iter().filter(|run| run.instance == instance);
        assert_eq!(of_it.count(), UNITS + 1, "'{instance}'");
    }
    let runs = world.runs();
    let fourth: Vec<_> = runs.iter().filter(|run| run.instance == "four").collect();
    assert_eq!(fourth.len(), 1);
    assert!(!fourth[0].speculative);
}

#[tokio::test]
async fn the_lane_holds_its_cap_but_starts_beyond_it_what_a_client_waits_for() {
    let stage = Stage::built(&["--max-speculative", "2"]).await;
    let world = &stage.backend.world;
    let build = stage.begin_held(2).await;
    let running = world.speculative();
    let queued = (0..UNITS)
        .map(|unit| compile_of(&build, unit))
        .find(|action| running.iter().all(|run| run.action != action.digest))
        .unwrap();
    stage
        .until("the others are queued", || {
            stage.primed.status()["speculation"]["queued"] == UNITS - 2
        })
        .await;
    assert_eq!(world.most_speculative(), 2);
    let wanted = build.execute(queued.digest, false);
    let released = async {
        stage
            .until("the wanted one starts", || world.running_speculative() == 3)
            .await;
        world.hold(false);
    };
    let (operations, ()) = tokio::join!(wanted, released);
    last(operations.unwrap()).await;
    assert_eq!(world.count(queued.digest), 1, "it was joined");
    stage.build_all(&build).await;
    assert!(world.most_speculative() <= 3);
    build.end();
    stage.primed.wait();
}

#[tokio::test]
async fn a_source_that_is_edited_again_supersedes_what_was_queued_for_it() {
    let stage = Stage::built(&["--max-speculative", "1"]).await;
    let world = &stage.backend.world;
    let build = stage.begin_held(1).await;
    stage
        .until("the others are queued", || {
            stage.primed.status()["speculation"]["queued"] == UNITS - 1
        })
        .await;
    let stale: Vec<Digest> = (0..UNITS)
        .map(|unit| compile_of(&build, unit).digest)
        .collect();
    stage.write("include/common.h", "changed again");
    let fresh = compile_of(&build, 0);
    let release = async {
        stage
            .until("the new plan is known", || {
                world
                    .speculative()
                    .iter()
                    .any(|run| run.action == fresh.digest)
            })
            .await;
        world.hold(false);
    };
    // Looking at the workspace is rationed: it may be looked at for a later lookup only.
    let looked = async { while build.lookup(fresh.digest).await.is_err() {} };
    tokio::join!(looked, release);
    assert_eq!(stage.build_all(&build).await, [Way::Found; UNITS + 1]);
    build.end();
    stage.primed.wait();
    let runs = world.speculative();
    let of_stale = runs.iter().filter(|run| stale.contains(&run.action));
    assert_eq!(of_stale.count(), 1, "only the one that had begun");
    assert_eq!(runs.len(), 1 + UNITS + 1);
}

#[tokio::test]
async fn one_connection_may_carry_one_build_after_the_other() {
    // As when a local buildbox-casd stands between the clients and primed.
    let stage = Stage::set(&CAP);
    let channel = connect(&stage.primed.socket());
    for (content, expected) in [("one", Way::Executed), ("two", Way::Found)] {
        stage.write("include/common.h", content);
        let build = Build::over(channel.clone(), &stage.workspace);
        let ways = stage.build_all(&build).await;
        assert_eq!(ways, [expected; UNITS + 1], "{}", stage.primed.daemon.log());
        build.end();
        stage.primed.wait();
    }
    let status = stage.primed.status();
    let builds = status["builds"].as_array().unwrap();
    assert_eq!(builds.len(), 2, "{status}");
    assert!(builds.iter().all(|build| build["asked"] == UNITS + 1));
}

/// Input trees that no sane client makes, each with `common.h` somewhere in it.
mod odd_trees {
    use bytes::Bytes;
    use primed::reapi::{Directory, DirectoryNode, FileNode};
    use prost::Message;

    use super::*;

    /// What one more tree may take, of primed's memory and of the time until all is quiet.
    const MEMORY: u64 = 400 * 1024 * 1024;
    const TIME: Duration = Duration::from_secs(15);

    fn file(name: &str, content: &str) -> FileNode {
        FileNode {
            name: name.to_owned(),
            digest: Some(Digest::of(content.as_bytes()).to_proto()),
            ..FileNode::default()
        }
    }

    fn put(stage: &Stage, directory: &Directory) -> Digest {
        let encoded = Bytes::from(directory.encode_to_vec());
        stage.backend.world.put("", encoded)
    }

    /// A directory that holds `below` under each of `names`.
    fn above(stage: &Stage, names: &[&str], below: Digest) -> Digest {
        let directories = names.iter().map(|name| DirectoryNode {
            name: (*name).to_owned(),
            digest: Some(below.to_proto()),
        });
        let directory = Directory {
            directories: directories.collect(),
            ..Directory::default()
        };
        put(stage, &directory)
    }

    fn leaf(stage: &Stage) -> Digest {
        let directory = Directory {
            files: vec![file("common.h", "common")],
            ..Directory::default()
        };
        put(stage, &directory)
    }

    /// Builds with an odd action among the others, then changes the header and builds again.
    /// The others are primed as ever, and primed stays within its bounds; it adapts the odd one,
    /// or gives it up.
    async fn endure(unadaptable: u64, tree: impl Fn(&Stage) -> Digest) {
        let stage = Stage::set(&CAP);
        stage.backend.world.behave(|world, run| {
            // These trees are not for walking.
            if run.arguments == ["odd"] {
                Outcome::Output(Bytes::from_static(b"odd"))
            } else {
                compile(world, run)
            }
        });
        let root = tree(&stage);
        let before = stage.primed.daemon.peak_memory();
        let began = Instant::now();
        for (content, expected) in [("common", Way::Executed), ("changed", Way::Found)] {
            stage.write("include/common.h", content);
            let build = stage.begin();
            let ways = stage.build_all(&build).await;
            assert_eq!(ways, [expected; UNITS + 1], "{content}");
            stage
                .run(&build, &build.action_on(root, "odd", "out/odd"))
                .await;
            build.end();
            stage.primed.wait();
        }
        let took = began.elapsed();
        let grown = stage.primed.daemon.peak_memory() - before;
        let speculation = &stage.primed.status()["speculation"];
        assert_eq!(speculation["unadaptable"], unadaptable);
        assert!(took < TIME, "{took:?}");
        assert!(grown < MEMORY, "{grown} bytes");
        assert!(!stage.primed.daemon.log().contains("panicked"));
    }

    #[tokio::test]
    async fn a_chain_of_a_thousand_directories_is_endured() {
        endure(1, |stage| {
            (0..1000).fold(leaf(stage), |below, _| above(stage, &["d"], below))
        })
        .await;
    }

    #[tokio::test]
    async fn a_directory_of_a_hundred_thousand_files_is_endured() {
        endure(0, |stage| {
            let mut files = vec![file("common.h", "common")];
            files.extend((0..100_000).map(|number| file(&format!("f{number:06}"), "same")));
            put(
                stage,
                &Directory {
                    files,
                    ..Directory::default()
                },
            )
        })
        .await;
    }

    #[tokio::test]
    async fn a_few_directories_that_make_a_trillion_paths_are_endured() {
        endure(1, |stage| {
            (0..40).fold(leaf(stage), |below, _| above(stage, &["a", "b"], below))
        })
        .await;
    }
}
