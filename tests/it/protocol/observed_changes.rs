//! What no disk tells is learned from the first execution that shows it: every change for a client
//! whose workspace cannot be seen, new and dropped includes for all.

use std::sync::atomic::{AtomicUsize, Ordering};

use tonic::transport::Endpoint;

use super::*;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Client {
    /// It comes by a Unix socket, and names its process.
    Seen,
    /// It comes by TCP, and names a process of another machine.
    Unseen,
}

use Client::{Seen, Unseen};

/// Which headers all units include.
type Headers<'a> = &'a [&'a str];

const COMMON: Headers<'static> = &["include/common.h"];
const BOTH: Headers<'static> = &["include/common.h", "include/other.h"];

impl Stage {
    /// A stage on which the program was built once by `client`.
    async fn built_by(client: Client, headers: Headers<'_>) -> Self {
        let stage = match client {
            Seen => Stage::set(&CAP),
            Unseen => Stage::set(&[CAP[0], CAP[1], "--listen", "127.0.0.1:0"]),
        };
        stage.write("include/other.h", "other");
        let ways = stage.build_by(client, headers).await;
        assert_eq!(ways, [Way::Executed; UNITS + 1]);
        stage
    }

    fn begin_by(&self, client: Client) -> Build {
        static BUILDS: AtomicUsize = AtomicUsize::new(0);
        if client == Seen {
            return self.begin();
        }
        let server = format!("http://127.0.0.1:{}", self.primed.port());
        let channel = Endpoint::from_shared(server).unwrap().connect_lazy();
        let number = BUILDS.fetch_add(1, Ordering::Relaxed);
        Build::elsewhere(channel, &self.workspace, &format!("elsewhere:{number}"))
    }

    /// Builds the program in a build of its own, and waits until it is recorded.
    async fn build_by(&self, client: Client, headers: Headers<'_>) -> Vec<Way> {
        let build = self.begin_by(client);
        let mut ways = Vec::new();
        for unit in 0..UNITS {
            ways.push(self.run(&build, &including(&build, unit, headers)).await);
        }
        ways.push(self.run(&build, &link_of(&build)).await);
        build.end();
        self.primed.wait();
        ways
    }

    /// Asserts that the first unit was missed, and that all others and the link were primed.
    #[track_caller]
    fn assert_missed_once(&self, ways: &[Way]) {
        let log = self.primed.daemon.log();
        let mut expected = [Way::Found; UNITS + 1];
        expected[0] = Way::Executed;
        assert_eq!(ways, expected, "{log}");
        let counts = self.counts();
        let others = UNITS as u64;
        assert_eq!((counts.asked, counts.missed), (others + 1, 1), "{log}");
        assert_eq!((counts.primed, counts.used), (others, others), "{log}");
        assert_eq!(self.backend.world.speculative().len(), UNITS, "{log}");
        let lessons = log.matches("an execution shows that inputs changed");
        assert_eq!(lessons.count(), 1, "objects are not learned: {log}");
    }
}

/// The compile of a unit that includes `headers`.
fn including(build: &Build, unit: usize, headers: Headers<'_>) -> Action {
    let source = format!("src/{unit}.c");
    let inputs: Vec<&str> = headers.iter().copied().chain([source.as_str()]).collect();
    build.action(Recipe {
        command: &format!("compile {unit}"),
        inputs: &inputs,
        output: &format!("out/{unit}.o"),
        ..Recipe::default()
    })
}

#[tokio::test]
async fn a_changed_header_is_missed_once_by_a_client_whose_workspace_cannot_be_seen() {
    let stage = Stage::built_by(Unseen, COMMON).await;
    let ways = stage.build_by(Unseen, COMMON).await;
    assert_eq!(ways, [Way::Found; UNITS + 1], "nothing changed");
    assert!(stage.backend.world.speculative().is_empty());
    stage.write("include/common.h", "changed");
    let ways = stage.build_by(Unseen, COMMON).await;
    stage.assert_missed_once(&ways);
}

#[tokio::test]
async fn the_link_is_primed_when_an_unseen_client_has_changed_one_source() {
    let stage = Stage::built_by(Unseen, COMMON).await;
    stage.write("src/2.c", "changed");
    let mut expected = [Way::Found; UNITS + 1];
    expected[2] = Way::Executed;
    assert_eq!(stage.build_by(Unseen, COMMON).await, expected);
    let runs = stage.backend.world.speculative();
    let arguments: Vec<_> = runs.iter().map(|run| run.arguments.join(" ")).collect();
    assert_eq!(arguments, ["link"]);
}

#[tokio::test]
async fn a_header_that_gains_an_include_is_missed_once() {
    for client in [Seen, Unseen] {
        let stage = Stage::built_by(client, COMMON).await;
        stage
            .backend
            .world
            .behave(|world, run| match run.speculative {
                // What is primed before the first miss lacks a file that the header includes.
                true if !includes_other(world, run) => Outcome::Exit(1),
                _ => compile(world, run),
            });
        stage.write("include/common.h", "includes the other");
        let build = stage.begin_by(client);
        let mut ways = Vec::new();
        for unit in 0..UNITS {
            ways.push(stage.run(&build, &including(&build, unit, BOTH)).await);
        }
        ways.push(stage.run(&build, &link_of(&build)).await);
        build.end();
        stage.primed.wait();
        let mut expected = [Way::Found; UNITS + 1];
        expected[0] = Way::Executed;
        let log = stage.primed.daemon.log();
        assert_eq!(ways, expected, "{client:?}: {log}");
        let counts = stage.counts();
        assert_eq!(
            (counts.missed, counts.used),
            (1, UNITS as u64),
            "{client:?}"
        );
        assert_eq!(counts.primed, counts.used, "{client:?}");
    }
}

/// Whether a compile has the other header; a link always does.
fn includes_other(world: &World, run: &Run) -> bool {
    let inputs = world.inputs(run).unwrap_or_default();
    inputs.contains_key("include/other.h") || run.arguments == ["link"]
}

#[tokio::test]
async fn a_header_that_drops_an_include_is_missed_once() {
    for client in [Seen, Unseen] {
        let stage = Stage::built_by(client, BOTH).await;
        stage.write("include/common.h", "includes nothing");
        std::fs::remove_file(stage.workspace.join("include/other.h")).unwrap();
        let ways = stage.build_by(client, COMMON).await;
        stage.assert_missed_once(&ways);
    }
}

#[tokio::test]
async fn an_include_that_only_one_source_gains_is_primed_for_no_other() {
    let stage = Stage::built_by(Seen, COMMON).await;
    let world = &stage.backend.world;
    world.hold(true);
    stage.write("include/common.h", "changed");
    stage.write("src/0.c", "includes the other");
    let build = stage.begin();
    build.greet().await;
    stage
        .until("primed executes", || world.running_speculative() == UNITS)
        .await;
    world.hold(false);
    let mut ways = vec![stage.run(&build, &including(&build, 0, BOTH)).await];
    for unit in 1..UNITS {
        ways.push(stage.run(&build, &including(&build, unit, COMMON)).await);
    }
    ways.push(stage.run(&build, &link_of(&build)).await);
    build.end();
    stage.primed.wait();
    let mut expected = [Way::Found; UNITS + 1];
    expected[0] = Way::Executed;
    assert_eq!(ways, expected, "{}", stage.primed.daemon.log());
    let mut compiles = world.speculative();
    compiles.retain(|run| run.arguments != ["link"]);
    assert_eq!(compiles.len(), UNITS, "once each: {compiles:#?}");
    assert!(compiles.iter().all(|run| !includes_other(world, run)));
}
