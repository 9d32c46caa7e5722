//! The examples do what they say.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::path::Path;
use std::process::Command;

use crate::support::{Primed, scratch, tools};

/// A row of the table at the end: how a build was answered.
#[derive(Debug)]
struct Row {
    asked: u64,
    cached: u64,
    hit: u64,
    joined: u64,
    missed: u64,
}

impl Row {
    fn served(&self) -> u64 {
        self.hit + self.joined
    }
}

/// Runs an example, with these folders of tools in `PATH`. Returns all that it said, and the
/// table's rows: the first build, and the one after the change.
fn run(example: &str, folders: &[&str]) -> (String, [Row; 2]) {
    let primed = Primed::command().get_program().to_owned();
    let binaries = Path::new(&primed).parent().unwrap().to_owned();
    let folders = folders.iter().map(|folder| tools().join(folder));
    // Tools of the host's own come before those that stand in for them.
    let host = std::env::split_paths(&std::env::var_os("PATH").unwrap()).collect::<Vec<_>>();
    let path = [binaries].into_iter().chain(folders).chain(host);
    let home = scratch();
    let script = format!("{}/examples/{example}/run", env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(script)
        .env("PATH", std::env::join_paths(path).unwrap())
        .env("HOME", home.path())
        .env("PRIMED_TOOLS", tools())
        .env_remove("MAKEFLAGS")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let wrong = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{wrong}");
    let (_, table) = said.rsplit_once("missed\n").unwrap();
    let row = |line: &str| {
        let mut words = line.split_whitespace().rev();
        let mut number = || words.next().unwrap().parse().unwrap();
        let [missed, joined, hit, cached, asked] = std::array::from_fn(|_| number());
        Row {
            asked,
            cached,
            hit,
            joined,
            missed,
        }
    };
    let rows: Vec<Row> = table.lines().map(row).collect();
    let [first, changed] = rows.try_into().expect(&said);
    assert_eq!(first.served(), 0, "{said}");
    assert_eq!(first.missed + first.cached, first.asked, "{said}");
    assert_eq!(
        changed.served() + changed.cached + changed.missed,
        changed.asked,
        "{said}"
    );
    (said, [first, changed])
}

#[test]
fn the_example_of_make_is_primed() {
    let (said, [first, changed]) = run("make", &["bin"]);
    assert!(said.contains("good morning, world (number 1)"), "{said}");
    // Three files and a link; count.c comes out the same either way.
    assert_eq!((first.asked, changed.asked), (4, 4), "{said}");
    assert_eq!((changed.served(), changed.missed), (4, 0), "{said}");
}

#[test]
fn the_example_of_cmake_and_ninja_is_primed() {
    let (said, [first, changed]) = run("cmake-ninja", &["bin", "cmake/bin"]);
    assert!(said.contains("12 queens stand in 14200 ways"), "{said}");
    assert_eq!((first.asked, changed.asked), (5, 5), "{said}");
    assert_eq!((changed.served(), changed.missed), (5, 0), "{said}");
}

/// It asks for all compiles at once, and those that are not worked out by then are missed.
#[test]
fn the_example_of_justbuild_is_primed() {
    let (said, [first, changed]) = run("justbuild", &["bin", "clients/bin"]);
    assert!(said.contains("4 words have 6 letters or more"), "{said}");
    assert_eq!((first.asked, changed.asked), (5, 5), "{said}");
    assert!(changed.served() > 0, "{said}");
}

/// Two elements, whose own actions are never primed, and three compiles and a link inside.
#[test]
fn the_example_of_buildstream_is_primed() {
    let (said, [first, changed]) = run("buildstream", &["buildstream/bin"]);
    assert_eq!((first.asked, changed.asked), (6, 6), "{said}");
    assert_eq!((changed.served(), changed.missed), (4, 2), "{said}");
}

#[test]
fn the_example_of_buildgrid_is_primed() {
    let (said, [first, changed]) = run("buildgrid", &["bin", "buildgrid/bin"]);
    assert!(said.contains("good morning, world (number 1)"), "{said}");
    assert_eq!((first.asked, changed.asked), (4, 4), "{said}");
    assert_eq!((changed.served(), changed.missed), (4, 0), "{said}");
}
