//! The main job: a recorded build, a change, and a next build that finds its compiles and its
//! link in the action cache. Real recc, real make, real buildbox-casd with local execution.

use tempfile::TempDir;

use crate::project::{FEW, Project, UNITS};
use crate::support::{Casd, Counts, Primed, scratch, tool, wait_until};

/// What may be missed before a miss has taught anything: make runs two compiles at a time.
const FIRST_MISSES: u64 = 4;
/// Every compile and the link.
const ALL: u64 = UNITS as u64 + 2;

/// A project that was built once through primed.
struct Stage {
    project: Project,
    primed: Primed,
    casd: Casd,
    _scratch: TempDir,
}

impl Stage {
    fn set(variables: &[(&str, &str)]) -> Self {
        let scratch = scratch();
        let casd = Casd::start(scratch.path(), 4);
        let primed = Primed::start(scratch.path(), &casd.address());
        let server = primed.address();
        Stage::begin(scratch, casd, primed, &server, variables)
    }

    /// Its client comes by TCP and says of itself what recc says on another machine.
    fn unseen() -> Self {
        let scratch = scratch();
        let casd = Casd::start(scratch.path(), 4);
        let arguments = ["--listen", "127.0.0.1:0"];
        let primed = Primed::start_with(scratch.path(), &casd.address(), &arguments);
        let server = format!("http://127.0.0.1:{}", primed.port());
        let elsewhere = [("RECC_TOOL_INVOCATION_ID", "elsewhere:1")];
        let stage = Stage::begin(scratch, casd, primed, &server, &elsewhere);
        let status = stage.primed.status();
        assert_eq!(status["builds"][0]["label"], "recc", "it shows no place");
        stage
    }

    /// Saving a file primes.
    fn watching() -> Self {
        let scratch = scratch();
        let casd = Casd::start(scratch.path(), 4);
        let primed = Primed::start_with(scratch.path(), &casd.address(), &["--watch"]);
        let server = primed.address();
        let stage = Stage::begin(scratch, casd, primed, &server, &[]);
        wait_until("the sources are watched", || stage.watched() > 0);
        stage
    }

    /// How many directories are watched.
    fn watched(&self) -> u64 {
        let status = self.primed.status();
        status["watch"]["directories"].as_u64().unwrap_or_default()
    }

    /// How often it was seen that something was saved.
    fn saves(&self) -> usize {
        let log = self.primed.daemon.log();
        log.matches("a source file was saved").count()
    }

    /// How many speculative actions have run.
    fn completed(&self) -> u64 {
        let status = self.primed.status();
        status["speculation"]["completed"]
            .as_u64()
            .unwrap_or_default()
    }

    /// Its client and its backend hash with `function`.
    fn hashed_with(function: &str) -> Self {
        let scratch = scratch();
        let argument = format!("--digest-function={function}");
        let casd = Casd::start_with(scratch.path(), 4, &[&argument]);
        let primed = Primed::start(scratch.path(), &casd.address());
        let server = primed.address();
        let variables = [("RECC_CAS_DIGEST_FUNCTION", function)];
        Stage::begin(scratch, casd, primed, &server, &variables)
    }

    fn begin(
        scratch: TempDir,
        casd: Casd,
        primed: Primed,
        server: &str,
        variables: &[(&str, &str)],
    ) -> Self {
        let mut project = Project::create(scratch.path(), server);
        for (name, value) in variables {
            project = project.with(name, value);
        }
        let stage = Stage {
            project,
            primed,
            casd,
            _scratch: scratch,
        };
        let first = stage.build();
        let expected = Counts {
            asked: ALL,
            cached: 0,
            hit: 0,
            joined: 0,
            missed: ALL,
            primed: 0,
            used: 0,
        };
        assert_eq!(first, expected, "the first build");
        assert_eq!(stage.primed.status()["records"]["actions"], ALL);
        assert_eq!(stage.project.run(), sum(1, 1));
        stage
    }

    /// Builds what is out of date and waits until it is recorded.
    fn build(&self) -> Counts {
        self.project.build();
        self.counts()
    }

    /// Builds everything anew and waits until it is recorded.
    fn rebuild(&self) -> Counts {
        self.project.rebuild();
        self.counts()
    }

    fn counts(&self) -> Counts {
        self.primed.wait();
        Counts::newest(&self.primed.status())
    }

    /// Every asked-for action was cached or primed, and everything primed was of use.
    #[track_caller]
    fn assert_primed(&self, counts: Counts, cached: u64, primed: u64) {
        let shown = format!("{counts:?}\n{}", self.primed.daemon.log());
        assert_eq!(counts.missed, 0, "{shown}");
        assert_eq!(counts.cached, cached, "{shown}");
        assert_eq!(counts.hit + counts.joined, primed, "{shown}");
        assert_eq!(counts.primed, primed, "precision is 1: {shown}");
        assert_eq!(counts.used, primed, "{shown}");
    }

    /// The compiles that include the common header and the link were primed, but for a few.
    #[track_caller]
    fn assert_missed_at_most(&self, counts: Counts, missed: u64) {
        let shown = format!("{counts:?}\n{}", self.primed.daemon.log());
        let recall = (counts.hit + counts.joined) as f64 / (counts.asked - counts.cached) as f64;
        println!("recall {recall:.2}: {counts:?}");
        // main.c does not include it.
        assert_eq!((counts.asked, counts.cached), (ALL, 1), "{shown}");
        assert!((1..=missed).contains(&counts.missed), "{shown}");
        assert_eq!(counts.primed, counts.used, "precision is 1: {shown}");
    }

    fn common(&self, value: i64) {
        let content = format!("#define COMMON {value}\n");
        self.project.write("include/common.h", &content);
    }
}

/// What the program prints.
fn sum(common: i64, few: i64) -> i64 {
    common * UNITS as i64 + few * FEW as i64
}

#[test]
fn nothing_changed_is_all_cached_and_nothing_is_primed() {
    let stage = Stage::set(&[]);
    let counts = stage.rebuild();
    stage.assert_primed(counts, ALL, 0);
}

#[test]
fn one_source_changed_primes_its_compile_and_the_link() {
    let stage = Stage::set(&[]);
    stage
        .project
        .append("src/unit7.c", "int added(void) { return 7; }\n");
    let counts = stage.build();
    stage.assert_primed(counts, 0, 2);
    assert_eq!(stage.project.run(), sum(1, 1));
}

#[test]
fn the_common_header_changed_primes_all_that_include_it_and_the_link() {
    let stage = Stage::set(&[]);
    stage.common(2);
    let counts = stage.rebuild();
    // main.c does not include it.
    stage.assert_primed(counts, 1, ALL - 1);
    assert_eq!(stage.project.run(), sum(2, 1));
}

#[test]
fn a_generated_header_changed_primes_the_few_that_include_it_and_the_link() {
    let stage = Stage::set(&[]);
    stage.project.write("few.in", "3\n");
    let counts = stage.build();
    let few = FEW as u64;
    stage.assert_primed(counts, ALL - few - 1, few + 1);
    assert_eq!(stage.project.run(), sum(1, 3));
}

#[test]
fn a_change_that_leaves_the_objects_equal_primes_no_link() {
    let stage = Stage::set(&[]);
    stage.project.write(
        "include/common.h",
        "#define COMMON 1 // said more clearly\n",
    );
    let counts = stage.rebuild();
    // The link and main.c are as they were.
    stage.assert_primed(counts, 2, ALL - 2);
    assert_eq!(stage.project.run(), sum(1, 1));
}

#[test]
fn a_build_that_was_all_hits_was_recorded_too() {
    let stage = Stage::set(&[]);
    for value in 2..5 {
        stage.common(value);
        let counts = stage.rebuild();
        stage.assert_primed(counts, 1, ALL - 1);
        assert_eq!(stage.project.run(), sum(value, 1));
    }
    stage.common(2);
    let counts = stage.rebuild();
    stage.assert_primed(counts, ALL, 0);
    assert_eq!(
        stage.project.run(),
        sum(2, 1),
        "a change taken back is cached"
    );
}

#[test]
fn records_survive_a_restart() {
    let mut stage = Stage::set(&[]);
    stage.primed = stage.primed.restart(&stage.casd.address());
    assert_eq!(stage.primed.status()["records"]["actions"], ALL);
    stage.common(2);
    let counts = stage.rebuild();
    stage.assert_primed(counts, 1, ALL - 1);
    assert_eq!(stage.project.run(), sum(2, 1));
}

#[test]
fn a_build_that_does_something_else_than_foreseen_is_soon_left_alone() {
    let number = "RECC_REMOTE_ENV_BUILD_NUMBER";
    let mut stage = Stage::set(&[(number, "1")]);
    stage.project = stage.project.with(number, "2");
    stage.common(2);
    let counts = stage.rebuild();
    let shown = format!("{counts:?}\n{}", stage.primed.daemon.log());
    assert_eq!(counts.missed, ALL, "{shown}");
    assert!(shown.contains("what is queued is held back"), "{shown}");
    assert!(counts.primed < ALL - 1, "{shown}");

    // The next one is as foreseen again.
    stage.common(3);
    let counts = stage.rebuild();
    stage.assert_primed(counts, 1, ALL - 1);
    assert_eq!(stage.project.run(), sum(3, 1));
}

#[test]
fn with_watch_a_saved_header_is_primed_before_anybody_builds() {
    let mut stage = Stage::watching();
    for value in [2, 3] {
        stage.common(value);
        // All that include it, and the link.
        let landed = || stage.completed() == ALL - 1;
        wait_until("what was saved is primed", landed);
        let builds = stage.primed.status()["builds"].clone();
        stage.project.rebuild();
        let counts = stage.counts();
        stage.assert_primed(counts, 1, ALL - 1);
        let shown = format!("{counts:?}, after {builds}");
        assert_eq!((counts.hit, counts.joined), (ALL - 1, 0), "{shown}");
        assert_eq!(stage.project.run(), sum(value, 1));
        let explained = stage.primed.ask(&["explain", "unit7.o"]);
        let explained = String::from_utf8(explained.stdout).unwrap();
        assert!(explained.contains("a source file was saved"), "{explained}");

        // What was recorded before it began is watched, too.
        stage.primed = stage
            .primed
            .restart_with(&stage.casd.address(), &["--watch"]);
        wait_until("the sources are watched", || stage.watched() > 0);
    }
}

#[test]
fn with_watch_what_is_saved_again_takes_the_place_of_what_was_saved_before() {
    let stage = Stage::watching();
    stage.common(2);
    let begun = || stage.completed() > 0;
    wait_until("what was saved is being primed", begun);
    stage.common(3);
    let seen = || stage.saves() == 2;
    wait_until("it is seen again", seen);
    stage.primed.wait();
    let counts = stage.rebuild();
    let shown = format!("{counts:?}\n{}", stage.primed.daemon.log());
    assert_eq!((counts.missed, counts.cached), (0, 1), "{shown}");
    assert_eq!((counts.hit, counts.used), (ALL - 1, ALL - 1), "{shown}");
    assert!(
        counts.primed > ALL - 1,
        "the first ones count as well: {shown}"
    );
    assert_eq!(stage.project.run(), sum(3, 1));
}

#[test]
fn with_watch_a_file_that_is_saved_as_it_was_primes_nothing() {
    let stage = Stage::watching();
    stage.common(1);
    let seen = || stage.saves() == 1;
    wait_until("it is seen", seen);
    stage.primed.wait();
    assert_eq!(stage.completed(), 0);
    let counts = stage.rebuild();
    stage.assert_primed(counts, ALL, 0);
}

#[test]
fn system_headers_in_the_input_tree_change_nothing() {
    let stage = Stage::set(&[("RECC_DEPS_GLOBAL_PATHS", "1")]);
    stage.common(2);
    let counts = stage.rebuild();
    stage.assert_primed(counts, 1, ALL - 1);
    assert_eq!(stage.project.run(), sum(2, 1));
}

#[test]
fn clients_that_leave_hashing_to_casd_are_primed_too() {
    let stage = Stage::set(&[("RECC_USE_LOCALCAS", "1")]);
    stage.common(2);
    let counts = stage.rebuild();
    stage.assert_primed(counts, 1, ALL - 1);
    assert_eq!(stage.project.run(), sum(2, 1));
}

#[test]
fn under_each_digest_function_that_recc_and_casd_speak_a_header_change_is_primed() {
    for function in ["SHA512", "SHA384", "SHA1", "MD5"] {
        let mut stage = Stage::hashed_with(function);
        stage.common(2);
        let counts = stage.rebuild();
        println!("{function}: {counts:?}");
        stage.assert_primed(counts, 1, ALL - 1);
        assert_eq!(stage.project.run(), sum(2, 1), "{function}");

        // What was recorded is read back as what it was.
        stage.primed = stage.primed.restart(&stage.casd.address());
        stage.project.write("few.in", "3\n");
        let counts = stage.build();
        let few = FEW as u64;
        stage.assert_primed(counts, ALL - few - 1, few + 1);
        assert_eq!(stage.project.run(), sum(2, 3), "{function}");
    }
}

#[test]
fn when_client_and_backend_begin_to_hash_otherwise_all_is_recorded_anew_and_primed() {
    let mut stage = Stage::set(&[]);
    stage.casd.daemon.kill();
    let directory = stage.primed.directory.clone();
    std::fs::remove_file(stage.casd.socket()).unwrap();
    std::fs::remove_dir_all(directory.join("casd")).unwrap();
    stage.casd = Casd::start_with(&directory, 4, &["--digest-function=SHA512"]);
    stage.project = stage.project.with("RECC_CAS_DIGEST_FUNCTION", "SHA512");
    stage.common(2);
    let counts = stage.rebuild();
    assert_eq!((counts.asked, counts.missed), (ALL, ALL), "{counts:?}");
    let refused = || {
        let log = stage.primed.daemon.log();
        log.matches("Unsupported digest function").count()
    };
    let before = refused();
    stage.common(3);
    let counts = stage.rebuild();
    stage.assert_primed(counts, 1, ALL - 1);
    assert_eq!(refused(), before, "the old records are left alone");
    assert_eq!(stage.project.run(), sum(3, 1));
}

#[test]
fn a_client_that_comes_by_tcp_from_this_machine_is_primed_too() {
    let mut stage = Stage::set(&[]);
    let socket = stage.primed.socket();
    let Primed { daemon, directory } = stage.primed;
    drop(daemon);
    let listen = format!("unix:{},127.0.0.1:0", socket.display());
    let upstream = stage.casd.address();
    stage.primed = Primed::start_with(&directory, &upstream, &["--listen", &listen]);
    let server = format!("http://127.0.0.1:{}", stage.primed.port());
    stage.project = stage.project.with("RECC_SERVER", &server);
    stage.common(2);
    let counts = stage.rebuild();
    stage.assert_primed(counts, 1, ALL - 1);
    assert_eq!(stage.project.run(), sum(2, 1));
}

#[test]
fn a_project_root_above_the_working_directory_is_found() {
    let stage = Stage::set(&[("RECC_PROJECT_ROOT", "/tmp")]);
    stage.common(2);
    let counts = stage.rebuild();
    stage.assert_primed(counts, 1, ALL - 1);
    assert_eq!(stage.project.run(), sum(2, 1));
}

#[test]
fn a_client_whose_workspace_cannot_be_seen_misses_what_it_begins_with_and_no_more() {
    let stage = Stage::unseen();
    stage.common(2);
    let counts = stage.rebuild();
    stage.assert_missed_at_most(counts, FIRST_MISSES);
    assert_eq!(stage.project.run(), sum(2, 1));

    stage.project.write("include/new.h", "#define NEW 10\n");
    stage.project.write(
        "include/common.h",
        "#include \"new.h\"\n#define COMMON NEW\n",
    );
    let counts = stage.rebuild();
    stage.assert_missed_at_most(counts, FIRST_MISSES);
    assert_eq!(stage.project.run(), sum(10, 1));
}

#[test]
fn a_new_include_is_missed_by_what_the_build_begins_with_and_known_from_then_on() {
    let stage = Stage::set(&[]);
    stage.project.write("include/new.h", "#define NEW 10\n");
    stage.project.write(
        "include/common.h",
        "#include \"new.h\"\n#define COMMON NEW\n",
    );
    let counts = stage.rebuild();
    stage.assert_missed_at_most(counts, FIRST_MISSES);
    assert_eq!(stage.project.run(), sum(10, 1));

    stage.project.write("include/new.h", "#define NEW 11\n");
    let counts = stage.rebuild();
    stage.assert_primed(counts, 1, ALL - 1);
    assert_eq!(stage.project.run(), sum(11, 1));
}

#[test]
fn other_flags_replace_the_commands_that_were_recorded() {
    let stage = Stage::set(&[]);
    stage.project.make(&["clean"]);
    assert!(stage.project.make(&["CFLAGS=-O2"]).status.success());
    let counts = stage.counts();
    assert_eq!(counts.primed, 0, "{counts:?}");
    assert!(
        counts.missed > UNITS as u64,
        "every compile is a new command: {counts:?}"
    );
    stage.common(2);
    stage.project.make(&["clean"]);
    assert!(stage.project.make(&["CFLAGS=-O2"]).status.success());
    let counts = stage.counts();
    stage.assert_primed(counts, 1, ALL - 1);
    assert_eq!(stage.project.run(), sum(2, 1));
}

#[test]
fn a_wrapper_between_make_and_recc_changes_nothing() {
    let stage = Stage::set(&[]);
    stage.common(2);
    let wrapped = format!("RECC=timeout 60 {}", tool("recc").display());
    stage.project.make(&["clean"]);
    assert!(stage.project.make(&[&wrapped]).status.success());
    let counts = stage.counts();
    stage.assert_primed(counts, 1, ALL - 1);
}

#[test]
fn a_broken_header_fails_as_it_would_without_primed_and_the_repair_builds() {
    let stage = Stage::set(&[]);
    stage
        .project
        .write("include/common.h", "#define COMMON oops oops\n");
    let output = stage.project.make(&["-k"]);
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("oops"),
        "the compiler's words reach the user: {said}"
    );
    let counts = stage.counts();
    assert_eq!(
        (counts.hit, counts.joined, counts.missed),
        (0, 0, UNITS as u64),
        "{counts:?}"
    );

    stage.common(4);
    let counts = stage.rebuild();
    stage.assert_primed(counts, 1, ALL - 1);
    assert_eq!(stage.project.run(), sum(4, 1));
}
