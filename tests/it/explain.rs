//! Journals of builds and what `primed builds` and `primed explain` make of them. Real recc, make and
//! buildbox-casd.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use serde_json::Value;
use tempfile::TempDir;

use crate::project::Project;
use crate::support::{Casd, Primed, scratch};

/// Units of the project.
const UNITS: usize = 6;
/// Every compile and the link.
const ALL: u64 = UNITS as u64 + 2;
/// Columns that text for people may take.
const WIDTH: usize = 100;

/// A project that was built once through primed.
struct Stage {
    project: Project,
    primed: Primed,
    casd: Casd,
    _scratch: TempDir,
}

impl Stage {
    fn set() -> Self {
        let scratch = scratch();
        let casd = Casd::start(scratch.path(), 4);
        let primed = Primed::start(scratch.path(), &casd.address());
        let project = Project::of_units(scratch.path(), &primed.address(), UNITS);
        let stage = Stage {
            project,
            primed,
            casd,
            _scratch: scratch,
        };
        stage.build();
        stage
    }

    fn build(&self) {
        self.project.build();
        self.primed.wait();
    }

    /// Builds again after the header that all units include has changed.
    fn common(&self, value: i64) {
        let content = format!("#define COMMON {value}\n");
        self.project.write("include/common.h", &content);
        self.build();
    }

    /// What `primed ARGUMENTS` prints for people.
    #[track_caller]
    fn said(&self, arguments: &[&str]) -> String {
        let output = self.primed.ask(arguments);
        let said = String::from_utf8(output.stdout).unwrap();
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}{log}");
        for line in said.lines() {
            assert!(line.chars().count() <= WIDTH, "too long: {line}");
        }
        println!("$ primed {}\n{said}", arguments.join(" "));
        said
    }

    /// What it prints for programs.
    #[track_caller]
    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.primed.ask(&[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// What it prints when it refuses.
    #[track_caller]
    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.primed.ask(arguments);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// The one explanation of a miss of the last build.
    #[track_caller]
    fn missed(&self, label: &str) -> Value {
        let answer = self.json(&["explain", "--last-missed", "--all"]);
        let explanations = answer["explanations"].as_array().unwrap();
        let found = explanations.iter().find(|one| one["label"] == label);
        found
            .unwrap_or_else(|| panic!("{label} was not missed: {answer}"))
            .clone()
    }
}

#[test]
fn what_was_primed_after_an_edited_header_is_explained_by_that_header_also_after_a_restart() {
    let mut stage = Stage::set();
    stage.common(2);
    let expected = stage.json(&["explain", "build/unit5.o"]);
    for is_restarted in [false, true] {
        if is_restarted {
            stage.primed = stage.primed.restart(&stage.casd.address());
        }
        let answer = stage.json(&["explain", "build/unit5.o"]);
        assert_eq!(answer, expected);
        let one = &answer["explanations"][0];
        assert!(["hit", "joined"].contains(&one["asked"]["answer"].as_str().unwrap()));
        let primed = &one["primed"];
        assert_eq!(
            (&primed["outcome"], &primed["trigger"]),
            (&"primed".into(), &"workspace".into())
        );
        assert!(primed["used_unix_ms"].is_number());
        let change = &primed["changes"][0];
        assert_eq!(change["path"], "include/common.h");
        assert_eq!(change["by"], "SOURCE");
        let header = stage.project.directory.join("include/common.h");
        assert_eq!(change["origin"], header.to_str().unwrap());
        let builds = stage.json(&["builds"]);
        let builds = builds["builds"].as_array().unwrap();
        assert_eq!(one["recorded"]["build"], builds[1]["id"]);

        let said = stage.said(&["explain", "build/unit5.o"]);
        for part in [
            "build/unit5.o",
            "include/common.h",
            "by the source file",
            "executed",
            "used",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        // By what it is, by where it is, and by what it reads.
        let digest = one["action"].as_str().unwrap();
        let file = stage.project.directory.join("build/unit5.o");
        for name in [digest, &digest[..10], file.to_str().unwrap(), "src/unit5.c"] {
            let found = stage.json(&["explain", name]);
            assert_eq!(found["explanations"][0]["action"], digest, "{name}");
        }
        let link = stage.json(&["explain", "build/program"]);
        let link = &link["explanations"][0]["primed"];
        assert_eq!(link["trigger"], "completed");
        assert_eq!(link["changes"].as_array().unwrap().len(), UNITS);
        assert_eq!(link["after"].as_array().unwrap().len(), UNITS);
        assert_eq!(link["changes"][0]["by"], "ACTION");
        let header = stage.json(&["explain", "include/common.h"]);
        assert_eq!(header["explanations"].as_array().unwrap().len(), UNITS);
    }
}

#[test]
fn builds_are_listed_newest_first_with_what_priming_did_for_them_also_after_a_restart() {
    let mut stage = Stage::set();
    stage.common(2);
    stage.common(3);
    let expected = stage.json(&["builds"]);
    stage.primed = stage.primed.restart(&stage.casd.address());
    assert_eq!(stage.json(&["builds"]), expected);
    let builds = expected["builds"].as_array().unwrap();
    assert_eq!(builds.len(), 3);
    for (build, missed) in builds.iter().zip([0, 0, ALL]) {
        assert_eq!(build["asked"], ALL);
        assert_eq!(build["missed"], missed);
        assert_eq!(build["recall"], if missed == 0 { 1.0 } else { 0.0 });
        assert!(build["ended_unix_ms"].is_number());
    }
    assert_eq!(builds[0]["precision"], 1.0);
    assert_eq!(builds[0]["wasted_ms"], 0);
    let said = stage.said(&["builds", "-n", "2"]);
    assert_eq!(said.lines().count(), 3, "a head and two builds: {said}");
    assert_eq!(stage.json(&["builds", "-n", "1"])["builds"][0], builds[0]);

    let status = stage.primed.status();
    assert_eq!(status["totals"]["count"], 0, "since it was started");
    stage.common(4);
    let status = stage.primed.status();
    assert_eq!(status["totals"]["recall"], 1.0);
    assert!(
        stage
            .said(&["status"])
            .contains("recall 100 %, precision 100 %")
    );
    assert!(
        stage
            .said(&["explain", "--last-missed"])
            .contains("missed nothing")
    );
}

#[test]
fn a_miss_because_of_a_new_include_names_the_file_that_was_added() {
    let stage = Stage::set();
    stage.project.write("include/new.h", "#define NEW 10\n");
    let common = "#include \"new.h\"\n#define COMMON NEW\n";
    stage.project.write("include/common.h", common);
    stage.build();
    let said = stage.said(&["explain", "--last-missed"]);
    for part in [
        "include/new.h",
        "1 file more than expected",
        "added",
        "#include",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let answer = stage.json(&["explain", "--last-missed"]);
    let one = &answer["explanations"][0]["counterpart"];
    let tree = &one["tree"];
    let paths = |list: &Value| -> Vec<String> {
        let entries = list.as_array().unwrap().iter();
        entries
            .map(|entry| entry["path"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(paths(&tree["added"]), ["include/new.h"]);
    assert!(paths(&tree["removed"]).is_empty(), "{tree}");
    assert!(paths(&tree["changed"]).is_empty(), "foreseen: {tree}");
    assert_eq!(one["command"].as_array().unwrap().len(), 0);
}

#[test]
fn a_miss_because_of_another_flag_names_the_flag_once_and_the_link_points_at_the_compiles() {
    let stage = Stage::set();
    stage.project.make(&["clean"]);
    assert!(stage.project.make(&["CFLAGS=-O2"]).status.success());
    stage.primed.wait();
    let one = stage.missed("build/unit3.o");
    let differs = one["counterpart"]["command"].as_array().unwrap();
    assert_eq!(differs.len(), 1, "{one}");
    assert_eq!(differs[0]["what"], "argument");
    assert_eq!(
        (&differs[0]["from"], &differs[0]["to"]),
        (&"-O1".into(), &"-O2".into())
    );
    let link = stage.missed("build/program");
    let hint = link["hints"][0].as_str().unwrap();
    assert!(hint.contains("was missed too"), "{hint}");
    let said = stage.said(&["explain", "--last-missed"]);
    assert_eq!(
        said.matches("-O1 → -O2").count(),
        1,
        "the others are alike: {said}"
    );
}

#[test]
fn the_first_build_is_missed_for_want_of_records_and_a_new_file_for_being_new() {
    let stage = Stage::set();
    let said = stage.said(&["explain", "--last-missed"]);
    assert!(
        said.contains("Nothing was planned for this build"),
        "{said}"
    );
    stage
        .project
        .write("src/more.c", "int more(void) { return 1; }\n");
    stage.build();
    let one = stage.missed("build/more.o");
    assert!(
        one["summary"].as_str().unwrap().contains("it is new"),
        "{one}"
    );
    let refusal = stage.refused(&["explain", "no/such/file.c"]);
    assert!(refusal.contains("'no/such/file.c'"), "{refusal}");
    let refusal = stage.refused(&["explain", "--build", "ffff", "--last-missed"]);
    assert!(refusal.contains("no build has an id"), "{refusal}");
}

#[test]
fn a_command_that_holds_the_time_is_told_to_be_made_stable() {
    let stage = Stage::set();
    for time in ["1795274041", "1795274099"] {
        stage.project.make(&["clean"]);
        let flags = format!("CFLAGS=-DBUILT={time}");
        assert!(stage.project.make(&[&flags]).status.success());
        stage.primed.wait();
    }
    let said = stage.said(&["explain", "--last-missed"]);
    assert!(
        said.contains("-DBUILT=1795274041 → -DBUILT=1795274099"),
        "{said}"
    );
    assert!(said.contains("make it the same"), "{said}");
}

#[test]
fn journals_that_cannot_be_written_are_kept_in_memory_and_broken_ones_are_left_out() {
    let mut stage = Stage::set();
    let journals = stage.primed.directory.join("state/builds");
    let file = std::fs::read_dir(&journals)
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let whole = std::fs::read(file.path()).unwrap();
    std::fs::write(file.path(), &whole[..whole.len() / 2]).unwrap();
    stage.primed = stage.primed.restart(&stage.casd.address());
    std::fs::remove_dir_all(&journals).unwrap();
    std::fs::write(&journals, "in the way").unwrap();
    stage.common(2);
    let builds = stage.json(&["builds"]);
    assert_eq!(builds["builds"][0]["missed"], 0);
    stage.said(&["explain", "build/unit5.o"]);
    assert!(
        stage
            .primed
            .daemon
            .log()
            .contains("journals of builds cannot be written")
    );
}

#[test]
fn what_the_cas_has_lost_is_said_to_be_gone() {
    let mut stage = Stage::set();
    stage.project.make(&["clean"]);
    assert!(stage.project.make(&["CFLAGS=-O2"]).status.success());
    stage.primed.wait();
    let directory = stage.primed.directory.clone();
    stage.casd.restart(&directory, 4, false);
    let said = stage.said(&["explain", "--last-missed"]);
    assert!(said.contains("not in the CAS any more"), "{said}");
}
