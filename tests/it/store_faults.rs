//! What breaks around the records, or makes them wrong, costs at most what primed would have saved:
//! builds go on, and what is wrong is said once. Real recc, make and buildbox-casd.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::project::{FEW, Project};
use crate::support::{Casd, Counts, Daemon, Primed, scratch, wait_until};

const UNITS: usize = 6;
/// Every compile and the link.
const ALL: u64 = UNITS as u64 + 2;
const JOBS: usize = 4;

/// A backend and a place for a project; primed is started by each test.
struct Ground {
    casd: Casd,
    scratch: TempDir,
}

impl Ground {
    fn prepare() -> Self {
        let scratch = scratch();
        let casd = Casd::start(scratch.path(), JOBS);
        Ground { casd, scratch }
    }

    fn path(&self) -> &Path {
        self.scratch.path()
    }

    fn records(&self) -> PathBuf {
        self.path().join("state/records.redb")
    }

    fn primed(&self) -> Primed {
        let primed = Primed::start(self.path(), &self.casd.address());
        // Sockets are bound before the records are opened; an answer comes after.
        primed.status();
        primed
    }

    fn project(&self) -> Project {
        let server = format!("unix:{}/primed.sock", self.path().display());
        Project::of_units(self.path(), &server, UNITS)
    }

    /// Kills primed without warning and starts it again.
    fn crash(&self, mut primed: Primed) -> Primed {
        primed.daemon.kill();
        self.primed()
    }

    /// Ends primed in good order, has `damage` done, and starts it again.
    fn restart_after(&self, mut primed: Primed, damage: impl FnOnce()) -> Primed {
        primed.daemon.signal(rustix::process::Signal::TERM);
        assert_eq!(primed.daemon.exit_code(), Some(0));
        damage();
        self.primed()
    }
}

fn common(project: &Project, value: i64) {
    project.write("include/common.h", &format!("#define COMMON {value}\n"));
}

/// Builds all of it anew; what was built is right.
fn rebuild(project: &Project, primed: &Primed, value: i64) -> Counts {
    common(project, value);
    project.rebuild();
    assert_eq!(project.run(), value * UNITS as i64 + FEW as i64);
    primed.wait();
    Counts::newest(&primed.status())
}

/// `value` was primed in full: all but `main.c` was executed ahead of time.
#[track_caller]
fn assert_primed(counts: Counts, primed: &Primed) {
    let log = primed.daemon.log();
    assert_eq!(counts.missed, 0, "{counts:?}\n{log}");
    assert_eq!(counts.used, ALL - 1, "{counts:?}\n{log}");
}

/// The lines of level WARN or ERROR in a log.
fn complaints(daemon: &Daemon) -> Vec<String> {
    let log = daemon.log();
    let lines = log.lines().filter(|line| {
        line.contains(" WARN ") || line.contains(" ERROR ") || line.contains("panicked")
    });
    lines.map(str::to_owned).collect()
}

#[track_caller]
fn assert_one_complaint(daemon: &Daemon, about: &[&str]) {
    let said = complaints(daemon);
    let [line] = said.as_slice() else {
        panic!("one line should say it: {said:#?}");
    };
    for word in about {
        assert!(line.contains(word), "no '{word}' in: {line}");
    }
}

#[test]
fn a_state_directory_that_cannot_be_had_costs_only_the_memory_of_it() {
    let ground = Ground::prepare();
    // Where a file is, no directory can be: not for root either.
    std::fs::write(ground.path().join("state"), "in the way").unwrap();
    let primed = ground.primed();
    let project = ground.project();
    rebuild(&project, &primed, 1);
    assert_primed(rebuild(&project, &primed, 2), &primed);
    let state = ground.path().join("state");
    assert_one_complaint(
        &primed.daemon,
        &["records cannot be kept on disk", state.to_str().unwrap()],
    );
    let primed = ground.crash(primed);
    let counts = rebuild(&project, &primed, 3);
    assert_eq!(counts.missed, ALL - 1, "it has forgotten all: {counts:?}");
}

#[test]
fn garbage_in_place_of_the_records_is_put_aside_and_kept() {
    let ground = Ground::prepare();
    std::fs::create_dir(ground.path().join("state")).unwrap();
    let garbage: Vec<u8> = (0..300_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    std::fs::write(ground.records(), &garbage).unwrap();
    let primed = ground.primed();
    let project = ground.project();
    rebuild(&project, &primed, 1);
    assert_primed(rebuild(&project, &primed, 2), &primed);
    assert_one_complaint(&primed.daemon, &["put aside", "records.redb.broken-1"]);
    let aside = ground.path().join("state/records.redb.broken-1");
    assert!(std::fs::read(&aside).unwrap() == garbage);
    // The new store is as good as any.
    let primed = ground.restart_after(primed, || {});
    assert_eq!(complaints(&primed.daemon), Vec::<String>::new());
    assert_primed(rebuild(&project, &primed, 3), &primed);
}

#[test]
fn records_that_were_cut_short_are_put_aside_and_made_anew() {
    let ground = Ground::prepare();
    let primed = ground.primed();
    let project = ground.project();
    rebuild(&project, &primed, 1);
    let mut kept = Vec::new();
    let primed = ground.restart_after(primed, || {
        let whole = std::fs::read(ground.records()).unwrap();
        kept = whole[..whole.len() / 2].to_vec();
        std::fs::write(ground.records(), &kept).unwrap();
    });
    assert_one_complaint_or_panic_of_the_store(&primed.daemon);
    let aside = ground.path().join("state/records.redb.broken-1");
    assert!(std::fs::read(&aside).unwrap() == kept);
    rebuild(&project, &primed, 2);
    assert_primed(rebuild(&project, &primed, 3), &primed);
}

/// The store's own library may assert on damage: then its words stand before primed's line.
#[track_caller]
fn assert_one_complaint_or_panic_of_the_store(daemon: &Daemon) {
    let said = complaints(daemon);
    let lines: Vec<_> = said.iter().filter(|line| line.contains("WARN")).collect();
    assert_eq!(lines.len(), 1, "{said:#?}");
    assert!(lines[0].contains("put aside"), "{said:#?}");
}

#[test]
fn a_second_primed_on_the_same_records_works_without_them_and_says_so() {
    let ground = Ground::prepare();
    let first = ground.primed();
    let other = ground.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let state = ground.path().join("state");
    std::os::unix::fs::symlink(&state, other.join("state")).unwrap();
    let second = Primed::start(&other, &ground.casd.address());
    second.status();
    assert_one_complaint(&second.daemon, &["another primed uses it", "--state-dir"]);
    let project = Project::of_units(ground.path(), &second.address(), UNITS);
    rebuild(&project, &second, 1);
    assert_primed(rebuild(&project, &second, 2), &second);
    assert_eq!(first.status()["records"]["actions"], 0);
    let project = ground.project();
    rebuild(&project, &first, 3);
    assert_eq!(first.status()["records"]["actions"], ALL);
    assert_eq!(complaints(&first.daemon), Vec::<String>::new());
}

#[test]
fn a_project_that_is_removed_and_comes_back_is_known_again() {
    let ground = Ground::prepare();
    let primed = ground.primed();
    let project = ground.project();
    rebuild(&project, &primed, 1);
    std::fs::remove_dir_all(&project.directory).unwrap();
    let primed = ground.restart_after(primed, || {});
    assert_eq!(primed.status()["records"]["actions"], ALL);
    let project = ground.project();
    assert_primed(rebuild(&project, &primed, 2), &primed);
    assert_eq!(complaints(&primed.daemon), Vec::<String>::new());
}

#[test]
fn a_project_that_is_removed_in_mid_build_harms_nobody_else() {
    let ground = Ground::prepare();
    let primed = ground.primed();
    let project = ground.project();
    rebuild(&project, &primed, 1);
    common(&project, 2);
    assert!(project.make(&["clean"]).status.success());
    let mut build = begin_build(&project, &primed);
    // Against make, which goes on making files: until it stays removed.
    wait_until("the project is gone", || {
        let _ = std::fs::remove_dir_all(&project.directory);
        !project.directory.exists()
    });
    build.exit_code();
    primed.wait();
    let project = ground.project();
    rebuild(&project, &primed, 3);
    assert_primed(rebuild(&project, &primed, 4), &primed);
}

/// Starts a build and waits until it has its first answers.
fn begin_build(project: &Project, primed: &Primed) -> Daemon {
    let newest = || primed.status()["builds"][0]["id"].clone();
    let before = newest();
    let mut build = project.begin();
    wait_until("the build has its first answers", || newest() != before);
    assert!(build.is_running(), "it ended too soon: {}", build.log());
    build
}

#[test]
fn a_backend_that_dies_in_mid_build_fails_that_build_alone() {
    let mut ground = Ground::prepare();
    let mut primed = ground.primed();
    let project = ground.project();
    let mut build = begin_build(&project, &primed);
    ground.casd.daemon.kill();
    let code = build.exit_code();
    assert_eq!(code, Some(2), "make fails: {}", build.log());
    assert!(primed.daemon.is_running());
    primed.wait();

    let path = ground.scratch.path().to_owned();
    ground.casd.restart(&path, JOBS, true);
    rebuild(&project, &primed, 2);
    assert_eq!(primed.status()["records"]["actions"], ALL);
    assert_primed(rebuild(&project, &primed, 3), &primed);
    assert!(!primed.daemon.log().contains("panicked"));
}

#[test]
fn a_backend_that_lost_its_cache_is_filled_again_and_nothing_is_wrong() {
    for restart_primed in [false, true] {
        let mut ground = Ground::prepare();
        let mut primed = ground.primed();
        let project = ground.project();
        rebuild(&project, &primed, 1);
        let path = ground.scratch.path().to_owned();
        ground.casd.restart(&path, JOBS, false);
        if restart_primed {
            primed = ground.restart_after(primed, || {});
        }
        // Unchanged: primed believes that all of it is cached, and it is not.
        let counts = rebuild(&project, &primed, 1);
        assert_eq!(counts.missed, ALL, "{counts:?}");
        assert_primed(rebuild(&project, &primed, 2), &primed);

        ground.casd.restart(&path, JOBS, false);
        if restart_primed {
            primed = ground.restart_after(primed, || {});
        }
        // Changed: the recorded files and directories that did not change are gone.
        rebuild(&project, &primed, 3);
        assert_primed(rebuild(&project, &primed, 4), &primed);
        assert!(!primed.daemon.log().contains("panicked"));
    }
}

#[test]
fn records_survive_a_kill() {
    let ground = Ground::prepare();
    let primed = ground.primed();
    let project = ground.project();
    rebuild(&project, &primed, 1);
    let primed = ground.crash(primed);
    assert_eq!(primed.status()["records"]["actions"], ALL);
    assert_primed(rebuild(&project, &primed, 2), &primed);
    let primed = ground.crash(primed);
    assert_primed(rebuild(&project, &primed, 3), &primed);
    let said: Vec<String> = complaints(&primed.daemon);
    assert_eq!(said, Vec::<String>::new());
}

#[test]
fn a_build_during_which_primed_is_killed_fails_and_the_next_one_is_whole() {
    let ground = Ground::prepare();
    let primed = ground.primed();
    let project = ground.project();
    rebuild(&project, &primed, 1);
    common(&project, 2);
    assert!(project.make(&["clean"]).status.success());
    let mut build = begin_build(&project, &primed);
    let primed = ground.crash(primed);
    build.exit_code();
    // What was executed for it is of use all the same; which of it was, is a matter of time.
    let counts = rebuild(&project, &primed, 2);
    assert_eq!(counts.missed, 0, "{counts:?}");
    assert_primed(rebuild(&project, &primed, 3), &primed);
}
