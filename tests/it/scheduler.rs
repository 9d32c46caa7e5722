//! What the scheduler does to a real buildbox-casd with few slots: it steps back for clients, cancels
//! what nobody wants any more, leaves out what is never used, and keeps to budgets. Real recc and
//! make; the compiler is a script that writes down when it runs, and waits at a gate.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use tempfile::TempDir;

use crate::project::Project;
use crate::support::{Casd, Counts, Daemon, Primed, scratch, wait_until};

/// Files that include the common header; main.c comes on top of them.
const UNITS: usize = 12;
/// Slots of casd.
const SLOTS: usize = 2;

/// A project that was built once through primed, with a compiler that can be held.
struct Stage {
    project: Project,
    primed: Primed,
    _casd: Casd,
    scratch: TempDir,
}

impl Stage {
    fn set(slots: usize, arguments: &[&str]) -> Self {
        let scratch = scratch();
        let casd = Casd::start(scratch.path(), slots);
        let primed = Primed::start_with(scratch.path(), &casd.address(), arguments);
        let project = Project::of_units(scratch.path(), &primed.address(), UNITS);
        let stage = Stage {
            project,
            primed,
            _casd: casd,
            scratch,
        };
        stage.write_compiler();
        stage.project.build();
        stage.primed.wait();
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// A `cc` that notes for each compile when it begins and ends, with its options and the header
    /// that it reads; in between it waits as long as there is a file `hold`,
    /// and a while if there is a file `slow`.
    fn write_compiler(&self) {
        fs::create_dir(self.path("bin")).unwrap();
        let compiler = self.path("bin/cc");
        let (log, hold) = (self.path("compiles"), self.path("hold"));
        let script = format!(
            "#!/bin/sh\n\
             case \" $* \" in *' -M'*) exec cc \"$@\" ;; *' -c '*) ;; *) exec cc \"$@\" ;; esac\n\
             note() {{ echo \"$1 $(cat include/common.h) $*\" >>{log}; }}\n\
             note begin \"$@\"\n\
             while [ -e {hold} ]; do sleep 0.02; done\n\
             if [ -e {slow} ]; then sleep 0.4; fi\n\
             cc \"$@\"; code=$?\n\
             note end \"$@\"\n\
             exit $code\n",
            log = log.display(),
            hold = hold.display(),
            slow = self.path("slow").display(),
        );
        fs::write(&compiler, script).unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&compiler, executable).unwrap();
        let makefile = fs::read_to_string(self.project.directory.join("Makefile")).unwrap();
        let called = format!("$(RECC) {} $(CFLAGS)", compiler.display());
        let makefile = makefile.replace("$(RECC) cc $(CFLAGS)", &called)
            + "held: build/unit0.o\n\twhile [ -e held ]; do sleep 0.02; done\n";
        self.project.write("Makefile", &makefile);
    }

    fn hold(&self) {
        fs::write(self.path("hold"), "").unwrap();
    }

    fn let_go(&self) {
        fs::remove_file(self.path("hold")).unwrap();
    }

    fn common(&self, value: usize) {
        let content = format!("#define COMMON {value}\n");
        self.project.write("include/common.h", &content);
    }

    /// What the compiler has noted so far.
    fn compiles(&self) -> Vec<String> {
        let noted = fs::read_to_string(self.path("compiles")).unwrap_or_default();
        noted.lines().map(str::to_owned).collect()
    }

    /// How many compiles with `common.h` of this value have begun.
    fn begun(&self, value: usize) -> usize {
        let begin = format!("begin #define COMMON {value} ");
        let compiles = self.compiles();
        compiles.iter().filter(|it| it.starts_with(&begin)).count()
    }

    fn speculation(&self, count: &str) -> u64 {
        self.primed.status()["speculation"][count].as_u64().unwrap()
    }

    /// A build that wants one object, and goes on until all that is primed for it is done, and that is
    /// `least` or more.
    fn build_one(&self, least: usize) -> Counts {
        self.project.write("held", "");
        let log = self.path("held.log");
        let mut build = Daemon::start(&mut self.project.command(&["held"]), log);
        wait_until("the object is there, and all is primed", || {
            let has_object = build.log().contains("while [ -e held ]");
            let primed = || Counts::newest(&self.primed.status()).primed;
            has_object && self.primed.is_idle() && primed() >= least as u64
        });
        fs::remove_file(self.project.directory.join("held")).unwrap();
        assert_eq!(build.exit_code(), Some(0), "{}", build.log());
        self.primed.wait();
        Counts::newest(&self.primed.status())
    }

    /// A run that does nothing, but has all primed before it begins, and lasts.
    fn run(&self, name: &str) -> Daemon {
        let mut command = Primed::command();
        let admin = format!("unix:{}", self.path("admin.sock").display());
        command
            .args(["run", "--admin", &admin, "--", "tail", "-f", "/dev/null"])
            .current_dir(&self.project.directory);
        Daemon::start(&mut command, self.path(name))
    }

    /// What is said of `build/unit0.o` and the like in the newest build, by outcome.
    fn outcomes(&self) -> Vec<(String, String)> {
        let status = self.primed.status();
        let id = status["builds"][0]["id"].as_str().unwrap();
        let output = self.primed.ask(&[
            "explain",
            "--json",
            "--build",
            id,
            "--all",
            "include/common.h",
        ]);
        let answer: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
        let explanations = answer["explanations"].as_array().unwrap();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        explanations
            .iter()
            .map(|it| {
                (
                    text(&it["primed"]["outcome"]),
                    text(&it["primed"]["reason"]),
                )
            })
            .collect()
    }
}

#[test]
fn what_is_executed_for_an_edit_that_another_has_superseded_is_cancelled_and_makes_room() {
    let stage = Stage::set(1, &["--max-speculative", "4"]);
    stage.hold();
    stage.common(2);
    let mut first = stage.run("first.log");
    wait_until("the slot is taken", || stage.begun(2) == 1);
    first.signal(rustix::process::Signal::TERM);
    first.exit_code();
    stage.common(3);
    let second = stage.run("second.log");
    // The gate is closed: casd has room only because what had taken it is gone.
    wait_until("another has begun", || stage.begun(3) == 1);
    assert!(stage.speculation("cancelled") >= 1);
    assert!(
        !stage
            .compiles()
            .iter()
            .any(|it| it.starts_with("end #define COMMON 2 "))
    );
    stage.let_go();
    stage.project.rebuild();
    drop(second);
    let status = stage.primed.status();
    let counts = Counts::newest(&status);
    assert_eq!(counts.missed, 0, "{counts:?}");
    assert_eq!(stage.project.run(), 3 * UNITS as i64 + 5);
}

#[test]
fn where_clients_fill_the_backend_with_what_was_not_foreseen_priming_steps_back() {
    let stage = Stage::set(SLOTS, &["--max-speculative", "4"]);
    // What is foreseen has the recorded options, and what is asked for has others.
    let begun_for = |value: usize, option: &str| {
        let begin = format!("begin #define COMMON {value} ");
        let compiles = stage.compiles();
        let of_header = compiles.iter().filter(|it| it.starts_with(&begin));
        of_header.filter(|it| it.contains(option)).count()
    };
    for value in 2..4 {
        stage.common(value);
        assert!(stage.project.make(&["clean"]).status.success());
        let option = format!("-DOTHER={value}");
        let flags = format!("CFLAGS=-O1 {option}");
        assert!(stage.project.make(&[&flags]).status.success());
        let speculative = begun_for(value, "") - begun_for(value, &option);
        println!(
            "{speculative} began beside {UNITS} of the client, width {}",
            stage.speculation("width")
        );
        assert_eq!(begun_for(value, &option), UNITS);
        if value > 2 {
            assert!(
                speculative < UNITS,
                "{speculative}: {:#?}",
                stage.compiles()
            );
        }
        stage.primed.wait();
    }
}

#[test]
fn what_is_never_used_is_retired_and_comes_back_at_once_when_a_build_asks_for_it() {
    let mut stage = Stage::set(SLOTS, &[]);
    // So that none of them is ever too cheap.
    fs::write(stage.path("slow"), "").unwrap();
    stage.common(9);
    stage.project.build();
    stage.primed.wait();
    // The link is planned when all of its objects are there.
    stage.common(2);
    let mut counts = vec![stage.build_one(UNITS + 1)];
    for value in 3..6 {
        stage.common(value);
        counts.push(stage.build_one(0));
    }
    // The counts survive a restart.
    let upstream = stage._casd.address();
    stage.primed = stage.primed.restart(&upstream);
    stage.common(6);
    let frugal = stage.build_one(1);
    assert_eq!(
        (frugal.primed, frugal.missed),
        (1, 0),
        "{frugal:?}\n{counts:?}"
    );
    assert_eq!(stage.speculation("retired"), UNITS as u64 - 1);
    let outcomes = stage.outcomes();
    let retired = outcomes.iter().filter(|(outcome, _)| outcome == "retired");
    assert_eq!(retired.clone().count(), UNITS - 1, "{outcomes:?}");
    assert!(
        retired
            .clone()
            .all(|(_, reason)| reason.contains("the last 3 times"))
    );

    stage.common(7);
    stage.project.build();
    stage.primed.wait();
    let whole = Counts::newest(&stage.primed.status());
    assert_eq!(whole.missed, 0, "{whole:?}\n{}", stage.primed.daemon.log());
    assert_eq!(stage.project.run(), 7 * UNITS as i64 + 5);
}

#[test]
fn what_there_is_no_budget_for_is_left_out_and_said_so() {
    let stage = Stage::set(SLOTS, &["--build-budget-actions", "3"]);
    stage.common(2);
    stage.project.rebuild();
    stage.primed.wait();
    let counts = Counts::newest(&stage.primed.status());
    assert_eq!(counts.primed, 3, "{counts:?}");
    assert!(counts.missed >= UNITS as u64 - 3, "{counts:?}");
    assert!(stage.speculation("over_budget") >= UNITS as u64 - 3);
    let outcomes = stage.outcomes();
    let over = outcomes
        .iter()
        .filter(|(outcome, _)| outcome == "over budget");
    assert!(over.clone().count() >= UNITS - 3, "{outcomes:?}");
    assert!(
        over.clone()
            .all(|(_, reason)| reason.contains("--build-budget-actions"))
    );
    assert_eq!(stage.project.run(), 2 * UNITS as i64 + 5);
}

#[test]
fn what_is_executed_ahead_gives_way_to_a_clients_execution_and_is_there_for_the_build_after_all() {
    let stage = Stage::set(1, &["--max-speculative", "4"]);
    stage.hold();
    stage.common(2);
    let run = stage.run("run.log");
    wait_until("the slot is taken", || stage.begun(2) == 1);
    // Nobody has foreseen these, and the gate is closed. There are two of them, for the build had two
    // jobs: so many may seem to be taken at once.
    let [one, other] = ["ONE", "OTHER"].map(|name| {
        let flags = format!("CFLAGS=-O1 -D{name}");
        let mut command = stage.project.command(&[&flags, "build/main.o"]);
        Daemon::start(&mut command, stage.path(name))
    });
    wait_until("a client has the slot", || {
        let mut compiles = stage.compiles().into_iter();
        compiles
            .any(|it| it.starts_with("begin ") && it.contains("src/main.c") && it.contains("-D"))
    });
    assert!(stage.speculation("gave_way") >= 1);
    let failed = stage.speculation("failed");
    stage.let_go();
    for mut client in [one, other] {
        assert_eq!(client.exit_code(), Some(0), "{}", client.log());
    }
    wait_until("what gave way is executed", || stage.primed.is_idle());
    assert_eq!(stage.speculation("failed"), failed);
    let executed = stage.begun(2);
    stage.project.rebuild();
    assert_eq!(stage.begun(2), executed, "{:#?}", stage.compiles());
    drop(run);
    assert_eq!(stage.project.run(), 2 * UNITS as i64 + 5);
}

#[test]
fn how_much_the_backend_takes_is_known_again_after_a_restart() {
    const WIDE: [&str; 2] = ["--max-speculative", "12"];
    let mut stage = Stage::set(1, &WIDE);
    // Of two clients' compiles one waits for the other.
    fs::write(stage.path("slow"), "").unwrap();
    let objects = ["CFLAGS=-O1 -DOTHER", "build/unit1.o", "build/unit2.o"];
    assert!(stage.project.make(&["clean"]).status.success());
    assert!(stage.project.make(&objects).status.success());
    stage.primed.wait();
    let known = stage.speculation("width");
    assert!(known <= 2, "{known}");
    let restarted = |mut stage: Stage, meanwhile: &dyn Fn()| {
        stage.primed.daemon.signal(rustix::process::Signal::TERM);
        assert_eq!(stage.primed.daemon.exit_code(), Some(0));
        meanwhile();
        let (directory, upstream) = (stage.primed.directory.clone(), stage._casd.address());
        stage.primed = Primed::start_with(&directory, &upstream, &WIDE);
        stage
    };
    stage = restarted(stage, &|| {});
    assert_eq!(stage.speculation("width"), known);
    // Without what was kept it is not.
    let kept = stage.primed.directory.join("state/lane.json");
    assert!(kept.exists());
    stage = restarted(stage, &|| fs::write(&kept, "{").unwrap());
    assert!(stage.speculation("width") > known);
    assert!(stage.primed.daemon.log().contains("lane.json"));
}
