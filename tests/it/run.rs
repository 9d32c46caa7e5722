//! `primed run`: a real make, recc and buildbox-casd with primed round them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::project::Project;
use crate::support::{Casd, Daemon, Primed, connects, make, scratch, tool, tools, wait_until};

/// Files of the project, and the program that is linked of them.
const UNITS: u64 = 8;
const COMPILES: u64 = UNITS + 1;
const ACTIONS: u64 = COMPILES + 1;

/// A user with a home, a project, and a casd that is the default upstream.
struct User {
    casd: Casd,
    project: Project,
    home: TempDir,
}

/// What a summary says.
#[derive(Debug, PartialEq, Eq)]
struct Summary {
    actions: u64,
    cached: u64,
    used: u64,
    missed: u64,
}

impl User {
    fn new() -> Self {
        let home = scratch();
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(home.path().join("run"))
            .unwrap();
        User {
            casd: Casd::start(home.path(), 4),
            project: Project::of_units(home.path(), "", UNITS as usize),
            home,
        }
    }

    /// `primed` with `arguments`, as this user would run it in the project.
    fn primed(&self, arguments: &[&str]) -> Command {
        let mut command = Primed::command();
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("RECC_") {
                command.env_remove(name);
            }
        }
        command
            .args(arguments)
            .current_dir(&self.project.directory)
            .env_remove("MAKEFLAGS")
            .env_remove("XDG_STATE_HOME")
            .env_remove("CC")
            .env("HOME", self.home.path())
            .env("XDG_RUNTIME_DIR", self.home.path().join("run"))
            .env("PRIMED_UPSTREAM", self.casd.address());
        command
    }

    /// `primed run ARGUMENTS -- make -j2`, which links by recc too.
    fn make(&self, arguments: &[&str]) -> Command {
        let mut command = self.primed(&["run", "--summary"]);
        command
            .args(arguments)
            .env("RECC_LINK", "1")
            .arg("--")
            .arg(make())
            .arg("-j2")
            .arg(format!("RECC={}", tool("recc").display()));
        command
    }

    /// Has all objects but that of main.c come out different.
    fn change(&self, value: u32) {
        let header = format!("#define COMMON {value}\n");
        self.project.write("include/common.h", &header);
    }

    /// The directory for the sockets of a primed that was started for the duration.
    fn place(&self) -> Option<PathBuf> {
        let entries = std::fs::read_dir(self.home.path().join("run/primed")).ok()?;
        let mut places = entries.map(|entry| entry.unwrap().path());
        places.find(|path| path.join("lock").exists())
    }

    /// Whether such a primed runs.
    fn has_daemon(&self) -> bool {
        self.place()
            .is_some_and(|place| connects(&place.join("admin.sock")))
    }

    /// What it says of itself.
    fn status(&self) -> Value {
        let admin = format!("unix:{}/admin.sock", self.place().unwrap().display());
        let mut command = self.primed(&["status", "--json", "--admin", &admin]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// A named pipe; who reads it waits until it is opened by the test.
    fn gate(&self, name: &str) -> Gate {
        let path = self.project.directory.join(name);
        let made = Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        Gate(path)
    }
}

struct Gate(PathBuf);

impl Gate {
    fn open(&self) {
        std::fs::OpenOptions::new()
            .write(true)
            .open(&self.0)
            .unwrap()
            .write_all(b"go\n")
            .unwrap();
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn run(command: &mut Command) -> Summary {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    summary(&said(&output))
}

fn summary(said: &str) -> Summary {
    let line = said.lines().find(|line| line.contains(" cached, "));
    let line = line.unwrap_or_else(|| panic!("no summary in: {said}"));
    let of = |word: &str| -> u64 {
        let before = line.split(word).next().unwrap();
        before.split_whitespace().last().unwrap().parse().unwrap()
    };
    Summary {
        actions: of(" action"),
        cached: of(" cached"),
        used: of(" hit") + of(" joined"),
        missed: of(" missed"),
    }
}

#[test]
fn a_run_starts_a_primed_that_primes_before_the_command_and_ends_with_it() {
    let user = User::new();
    let first = run(&mut user.make(&[]));
    assert_eq!((first.actions, first.missed), (ACTIONS, ACTIONS));
    assert!(!user.has_daemon(), "it ended with the run");
    user.change(2);

    let gate = user.gate("gate");
    let mut command = user.primed(&["run", "--summary", "--", "sh", "-c"]);
    let script = format!(
        "read go <gate; exec make -j2 RECC={}",
        tool("recc").display()
    );
    command.arg(script).env("RECC_LINK", "1");
    let mut second = Daemon::start(&mut command, user.home.path().join("second.log"));
    wait_until("everything is primed before the command asks", || {
        user.has_daemon() && user.status()["speculation"]["completed"] == ACTIONS - 1
    });
    let status = user.status();
    assert_eq!(status["builds"][0]["parent"], "run");
    assert_eq!(status["builds"][0]["asked"], 0);
    gate.open();
    assert_eq!(second.exit_code(), Some(0), "{}", second.log());
    let expected = Summary {
        actions: ACTIONS,
        // main.c includes no header.
        cached: 1,
        used: ACTIONS - 1,
        missed: 0,
    };
    assert_eq!(summary(&second.log()), expected);
    assert!(!user.has_daemon());
}

#[test]
fn a_plain_make_and_a_run_prime_each_other_by_the_primed_that_runs() {
    let user = User::new();
    let primed = Primed::start(user.home.path(), &user.casd.address());
    let admin = format!("unix:{}/admin.sock", user.home.path().display());
    // The same one, whose clients talk to that primed.
    let plain = Project::of_units(user.home.path(), &primed.address(), UNITS as usize);
    plain.build();
    primed.wait();
    user.change(3);
    let by_run = run(&mut user.make(&["--admin", &admin]));
    assert_eq!((by_run.used, by_run.missed), (ACTIONS - 1, 0));
    primed.wait();
    user.change(4);
    plain.build();
    primed.wait();
    let builds = primed.status()["builds"].clone();
    assert_eq!(builds[0]["parent"], "invocation");
    assert_eq!(builds[0]["used"], ACTIONS - 1, "{builds}");
    assert_eq!(builds[1]["parent"], "run");
    assert!(user.place().is_none(), "no other was started");
}

#[test]
fn without_priming_a_run_is_recorded_all_the_same() {
    let user = User::new();
    run(&mut user.make(&[]));
    user.change(5);
    let unprimed = run(&mut user.make(&["--no-prime"]));
    assert_eq!((unprimed.used, unprimed.missed), (0, ACTIONS - 1));
    user.change(6);
    let primed = run(&mut user.make(&[]));
    assert_eq!((primed.used, primed.missed), (ACTIONS - 1, 0));
}

#[test]
fn below_the_command_other_commands_ask_the_primed_of_the_run() {
    let user = User::new();
    run(&mut user.make(&[]));
    user.change(7);
    let script = "$P wait --timeout 60 && $P run -- true && $P status --json";
    let mut command = user.primed(&["run", "--", "sh", "-c", script]);
    let primed = command.get_program().to_owned();
    let output = command.env("P", primed).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status["speculation"]["completed"], ACTIONS - 1, "{status}");
    assert_eq!(status["builds"].as_array().unwrap().len(), 2, "{status}");
}

#[test]
fn builds_are_listed_explained_and_reported_when_no_primed_runs() {
    let user = User::new();
    let ask = |arguments: &[&str]| {
        let output = user.primed(arguments).output().unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            said(&output),
        )
    };
    let (code, _, complaint) = ask(&["builds"]);
    assert_eq!(code, Some(1));
    assert!(complaint.contains("none has ever run here"), "{complaint}");
    assert!(user.place().is_none(), "none was started for nothing");

    run(&mut user.make(&[]));
    user.change(11);
    run(&mut user.make(&["--no-prime"]));
    let (code, list, _) = ask(&["builds", "--json"]);
    let list: Value = serde_json::from_str(&list).unwrap();
    assert_eq!(code, Some(0));
    assert_eq!(list["builds"].as_array().unwrap().len(), 2, "{list}");
    assert_eq!(list["builds"][0]["missed"], ACTIONS - 1, "{list}");
    let (code, explained, complaint) = ask(&["explain", "--last-missed"]);
    assert_eq!(code, Some(0), "{complaint}");
    assert!(explained.contains("unit7.o"), "{explained}");
    let page = user.home.path().join("report.html");
    let (code, _, complaint) = ask(&["report", "-o", page.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{complaint}");
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("unit7.o"));
    wait_until("the primed has ended", || !user.has_daemon());

    user.change(12);
    let next = run(&mut user.make(&[]));
    assert_eq!(next.used, ACTIONS - 1, "the answers were no builds");
    assert_eq!(ask(&["builds"]).1.lines().count(), 4, "and are not listed");
}

#[test]
fn the_primed_of_a_run_is_found_by_those_who_ask_beside_it() {
    let user = User::new();
    let gate = user.gate("gate");
    let mut command = user.primed(&["run", "--", "sh", "-c", "echo ready; read go <gate"]);
    let mut beside = Daemon::start(&mut command, user.home.path().join("beside.log"));
    wait_until("the command runs", || beside.log().contains("ready"));
    for arguments in [&["status", "--json"][..], &["builds", "--json"]] {
        let output = user.primed(arguments).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        let page: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(page["builds"][0]["parent"], "run", "{page}");
    }
    gate.open();
    assert_eq!(beside.exit_code(), Some(0));
    assert!(!user.has_daemon());
}

#[test]
fn recc_is_put_before_the_compilers_of_a_makefile_that_knows_nothing_of_it() {
    let user = User::new();
    user.project.write(
        "Makefile",
        "build/main.o: src/unit7.c include/common.h\n\
         \tmkdir -p build\n\
         \t$(CC) -Iinclude -c $< -o $@\n",
    );
    let mut command = user.primed(&["run", "--recc", "--summary", "--"]);
    let path = std::env::var("PATH").unwrap();
    let path = format!("{path}:{}", tools().join("bin").display());
    let summary = run(command.arg(make()).env("PATH", path));
    assert_eq!((summary.actions, summary.missed), (1, 1));
    let mut command = user.primed(&["run", "--recc", "--", "true"]);
    let output = command.env("PATH", "/nonexistent").output().unwrap();
    assert_eq!(output.status.code(), Some(127));
    assert!(said(&output).contains("buildbox"), "{output:?}");
}

#[test]
fn a_run_ends_as_its_command_does_and_is_quiet_where_nobody_looks() {
    let user = User::new();
    for (script, code) in [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143)] {
        let mut command = user.primed(&["run", "--", "sh", "-c", script]);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(output.stderr.is_empty(), "{}", said(&output));
    }
    for (program, code, word) in [
        ("no-such-program", 127, "PATH"),
        ("./Makefile", 126, "chmod +x"),
    ] {
        let output = user.primed(&["run", "--", program]).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(said(&output).contains(word), "{output:?}");
    }
    assert!(!user.has_daemon());
}

#[test]
fn signals_reach_the_command_once_and_those_that_are_ignored_stay_so() {
    let user = User::new();
    let script = "trap 'echo got TERM' TERM; trap 'echo got USR1' USR1; echo ready; \
                  while ! read line <gate; do :; done; echo line $line";
    let gate = user.gate("gate");
    let mut command = Command::new("nohup");
    let own = user.primed(&[]);
    command
        .arg(own.get_program())
        .args(["run", "--", "sh", "-c", script]);
    for (name, value) in own.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.current_dir(&user.project.directory);
    let mut running = Daemon::start(&mut command, user.home.path().join("signals.log"));
    wait_until("the command runs", || running.log().contains("ready"));
    running.signal(Signal::HUP);
    running.signal(Signal::USR1);
    wait_until("it got USR1", || running.log().contains("got USR1"));
    running.signal(Signal::TERM);
    wait_until("it got TERM", || running.log().contains("got TERM"));
    gate.open();
    assert_eq!(running.exit_code(), Some(0), "{}", running.log());
    assert_eq!(running.log().matches("got TERM").count(), 1);
    assert!(running.log().ends_with("line go\n"));
}

#[test]
fn runs_at_the_same_time_share_a_primed_that_ends_with_the_last() {
    let user = User::new();
    let gate = user.gate("gate");
    let script = "echo $RECC_SERVER; read go <gate";
    let mut command = user.primed(&["run", "--", "sh", "-c", script]);
    let mut first = Daemon::start(&mut command, user.home.path().join("first.log"));
    wait_until("the first command runs", || first.log().contains("unix:"));
    let second = user.primed(&["run", "--", "sh", "-c", "echo $RECC_SERVER"]);
    let second = { second }.output().unwrap();
    assert!(second.stderr.is_empty(), "{}", said(&second));
    assert_eq!(String::from_utf8_lossy(&second.stdout), first.log());
    assert!(user.has_daemon(), "the first still needs it");
    gate.open();
    assert_eq!(first.exit_code(), Some(0));
    assert!(!user.has_daemon());
}

#[test]
fn a_primed_that_was_started_for_a_run_ends_when_that_is_killed() {
    let user = User::new();
    let gate = user.gate("gate");
    let mut command = user.primed(&["run", "--", "sh", "-c", "echo ready; read go <gate"]);
    let mut killed = Daemon::start(&mut command, user.home.path().join("killed.log"));
    wait_until("the command runs", || killed.log().contains("ready"));
    killed.kill();
    wait_until("the primed has ended", || !user.has_daemon());
    gate.open();
    let next = run(&mut user.make(&[]));
    assert_eq!(
        next.missed, ACTIONS,
        "the next one is served and keeps records"
    );
    user.change(9);
    assert_eq!(run(&mut user.make(&[])).used, ACTIONS - 1);
}

#[test]
fn a_primed_that_was_started_for_a_run_ends_when_it_is_told_to() {
    let user = User::new();
    let gate = user.gate("gate");
    let mut command = user.primed(&[
        "run",
        "--",
        "sh",
        "-c",
        "echo ready; read go <gate; echo $go",
    ]);
    let mut running = Daemon::start(&mut command, user.home.path().join("running.log"));
    wait_until("the command runs", || running.log().contains("ready"));
    // The credentials of a listening socket are those of the process that listens.
    let listens = UnixStream::connect(user.place().unwrap().join("admin.sock")).unwrap();
    let daemon = rustix::net::sockopt::socket_peercred(&listens).unwrap().pid;
    drop(listens);
    rustix::process::kill_process(daemon, Signal::TERM).unwrap();
    wait_until("the primed has ended", || !user.has_daemon());
    gate.open();
    assert_eq!(running.exit_code(), Some(0), "{}", running.log());
    assert!(running.log().ends_with("go\n"));
}

#[test]
fn a_command_runs_without_primed_where_that_cannot_start() {
    let user = User::new();
    let script = "echo $RECC_SERVER $RECC_PASSTHROUGH";
    let mut command = user.primed(&["run", "--", "sh", "-c", script]);
    let output = command
        .env("PRIMED_MAX_SPECULATIVE", "none")
        .output()
        .unwrap();
    assert!(output.status.success());
    let printed = String::from_utf8_lossy(&output.stdout);
    assert_eq!(
        printed.trim(),
        user.casd.address(),
        "straight to the backend"
    );
    let note = said(&output);
    assert!(note.contains("runs without primed"), "{note}");
    assert!(note.contains("--max-speculative"), "{note}");
    let mut command = user.primed(&["run", "--quiet", "--", "sh", "-c", script]);
    command.env_remove("PRIMED_UPSTREAM");
    let output = command
        .env("PRIMED_MAX_SPECULATIVE", "none")
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "1");
    assert!(output.stderr.is_empty());
}

#[test]
fn a_primed_in_front_of_another_backend_is_not_used() {
    let user = User::new();
    let elsewhere = "unix:/nonexistent/casd.sock";
    let directory = user.home.path();
    let other = Primed::start(directory, elsewhere);
    let admin = format!("unix:{}/admin.sock", directory.display());
    let state = directory.join("state");
    let arguments = [
        "run",
        "--admin",
        &admin,
        "--state-dir",
        state.to_str().unwrap(),
    ];
    let mut command = user.primed(&arguments);
    let output = command
        .args(["--", "sh", "-c", "echo $RECC_SERVER"])
        .output()
        .unwrap();
    let note = said(&output);
    assert!(note.contains(elsewhere), "{note}");
    assert!(note.contains("state directory is in use"), "{note}");
    let printed = String::from_utf8_lossy(&output.stdout);
    assert_ne!(printed.trim(), other.address());
    let unforced = user
        .primed(&[
            "run",
            "--admin",
            &admin,
            "--",
            "sh",
            "-c",
            "echo $RECC_SERVER",
        ])
        .env_remove("PRIMED_UPSTREAM")
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&unforced.stdout);
    assert_eq!(printed.trim(), other.address(), "{}", said(&unforced));
    assert!(Path::new(&state).exists());
}

#[test]
fn a_doctor_finds_a_machine_on_which_all_works_and_one_without_a_backend() {
    let user = User::new();
    let path = std::env::var("PATH").unwrap();
    let path = format!("{path}:{}", tools().join("bin").display());
    let mut doctor = user.primed(&["doctor", "--json"]);
    let output = doctor.env("PATH", &path).output().unwrap();
    let findings = findings(&output);
    assert!(output.status.success(), "{findings:#?}");
    for check in [
        "recc",
        "settings",
        "daemon",
        "state",
        "backend",
        "execution",
        "clock",
    ] {
        let finding = findings.iter().find(|finding| finding["check"] == check);
        assert_eq!(finding.unwrap()["verdict"], "ok", "{check}: {findings:#?}");
    }
    let mut doctor = user.primed(&["doctor", "--json", "--upstream", "unix:/nonexistent"]);
    let output = doctor.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let away = self::findings(&output).pop().unwrap();
    assert_eq!(
        (&away["check"], &away["verdict"]),
        (&"backend".into(), &"error".into())
    );
    assert!(
        away["hint"].as_str().unwrap().contains("--upstream"),
        "{away}"
    );
}

#[test]
fn a_doctor_has_recc_compile_through_the_primed_that_runs() {
    let user = User::new();
    let listen = format!("unix:{}/primed.sock", user.home.path().display());
    let admin = format!("unix:{}/admin.sock", user.home.path().display());
    let _primed = Primed::start(user.home.path(), &user.casd.address());
    let path = std::env::var("PATH").unwrap();
    let mut doctor = user.primed(&["doctor", "--admin", &admin]);
    let output = doctor
        .env("PATH", format!("{path}:{}", tools().join("bin").display()))
        .env("PRIMED_LISTEN", &listen)
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{printed}");
    assert!(
        printed.contains(&format!("recc compiles through {listen}")),
        "{printed}"
    );
}

/// What `primed doctor --json` prints.
fn findings(output: &Output) -> Vec<Value> {
    let printed = String::from_utf8_lossy(&output.stdout);
    let lines = printed
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    lines.collect()
}

/// Says to the one who asks that this primed is about to end.
fn turn_away(listener: UnixListener) {
    let (mut asked, _) = listener.accept().unwrap();
    drop(listener);
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        asked.read_exact(&mut byte).unwrap();
        request.extend(byte);
    }
    let answer = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n";
    asked.write_all(answer.as_bytes()).unwrap();
}

#[test]
fn a_question_that_comes_while_a_primed_ends_is_answered_by_the_next() {
    let user = User::new();
    run(&mut user.make(&[]));
    wait_until("the primed has ended", || !user.has_daemon());
    let place = user.home.path().join("run/primed/run-ends");
    std::fs::create_dir(&place).unwrap();
    let listener = UnixListener::bind(place.join("admin.sock")).unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(|| turn_away(listener));
        user.primed(&["builds", "--json"]).output().unwrap()
    });
    assert!(output.status.success(), "{}", said(&output));
    let list: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(list["builds"].as_array().unwrap().len(), 1, "{list}");
}
