//! Records that travel: as files between state directories, and through the backend between
//! machines. Real recc, make and buildbox-casd.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Output;

use primed::reapi::buildstream::v2::SpeculativeActions;
use primed::reapi::buildstream::v2::speculative_actions::overlay::OverlayType;
use prost::Message;
use rustix::process::Signal;
use tempfile::TempDir;

use crate::project::{FEW, Project};
use crate::support::{Casd, Counts, Primed, scratch};

const UNITS: usize = 8;
/// Every compile and the link.
const ALL: u64 = UNITS as u64 + 2;

/// A project that was built once, and recorded by a primed.
struct Ground {
    project: Project,
    primed: Primed,
    casd: Casd,
    scratch: TempDir,
}

impl Ground {
    fn built(arguments: &[&str]) -> Self {
        let scratch = scratch();
        let casd = Casd::start(scratch.path(), 4);
        let primed = Primed::start_with(scratch.path(), &casd.address(), arguments);
        let project = Project::of_units(scratch.path(), &primed.address(), UNITS);
        project.build();
        primed.wait();
        assert_eq!(Counts::newest(&primed.status()).missed, ALL);
        Ground {
            project,
            primed,
            casd,
            scratch,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// A directory of its own for another primed, or another casd.
    fn place(&self, name: &str) -> PathBuf {
        let place = self.path(name);
        std::fs::create_dir_all(&place).unwrap();
        place
    }

    /// A primed without records, before the same casd.
    fn newcomer(&self) -> Primed {
        Primed::start(&self.place("newcomer"), &self.casd.address())
    }

    /// Builds all of it anew through `primed` after a change of the header that all include.
    fn rebuild(&self, primed: &Primed, value: i64) -> Counts {
        let content = format!("#define COMMON {value}\n");
        self.project.write("include/common.h", &content);
        assert!(self.project.make(&["clean"]).status.success());
        let server = primed.address();
        let output = self
            .project
            .command(&[])
            .env("RECC_SERVER", server)
            .output();
        let output = output.unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(self.project.run(), value * UNITS as i64 + FEW as i64);
        primed.wait();
        Counts::newest(&primed.status())
    }

    /// Ends the first primed in good order, so that its records lie there.
    fn end(&mut self) {
        self.primed.daemon.signal(Signal::TERM);
        assert_eq!(self.primed.daemon.exit_code(), Some(0));
    }
}

/// All but `main.c`, which does not include the header, was primed.
#[track_caller]
fn assert_primed(counts: Counts, primed: &Primed) {
    let shown = format!("{counts:?}\n{}", primed.daemon.log());
    assert_eq!((counts.asked, counts.missed), (ALL, 0), "{shown}");
    assert_eq!(counts.hit + counts.joined, ALL - 1, "{shown}");
}

/// Runs primed where no primed runs, on the records in `state`.
fn offline(state: &Path, arguments: &[&str]) -> Output {
    Primed::command()
        .args(arguments)
        .args(["--admin", "unix:/nonexistent/admin.sock", "--state-dir"])
        .arg(state)
        .output()
        .unwrap()
}

#[track_caller]
fn succeeds(output: Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn fails(output: &Output, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for word in words {
        assert!(said.contains(word), "'{word}' is not in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The files in a directory and what is in them.
fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(directory).unwrap();
    let files = entries.map(|entry| {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        (name, std::fs::read(entry.path()).unwrap())
    });
    files.collect()
}

/// The weak key of the only recorded parent.
fn only_key(list: &str) -> &str {
    let mut lines = list.lines();
    let key = lines.next().unwrap().split(' ').next().unwrap();
    assert_eq!((key.len(), lines.next()), (64, None), "{list}");
    key
}

#[test]
fn an_export_brings_the_same_records_to_an_empty_state_directory_and_back() {
    let mut ground = Ground::built(&[]);
    let list = succeeds(ground.primed.ask(&["export", "--list"]));
    let key = only_key(&list);
    assert!(list.contains(&format!("{ALL}  make in ")), "{list}");
    let exported = ground.path("exported");
    succeeds(ground.primed.ask(&["export", "--all", text(&exported)]));
    let all = files(&exported);
    assert_eq!(all.keys().collect::<Vec<_>>(), [&format!("{key}.sa")]);
    let one = ground.path("one");
    succeeds(ground.primed.ask(&["export", &key[..9], text(&one)]));
    assert!(std::fs::read(&one).unwrap() == all[&format!("{key}.sa")]);

    // By way of a running primed, which uses them at once.
    let newcomer = ground.newcomer();
    let said = succeeds(newcomer.ask(&["import", text(&exported)]));
    assert!(said.starts_with(key), "{said}");
    let again = ground.path("again");
    succeeds(newcomer.ask(&["export", "--all", text(&again)]));
    assert!(files(&again) == all);
    newcomer.wait();
    let counts = ground.rebuild(&newcomer, 2);
    assert_primed(counts, &newcomer);

    // And where none runs.
    ground.end();
    let offline_export = ground.path("offline");
    succeeds(offline(
        &ground.path("state"),
        &["export", "--all", text(&offline_export)],
    ));
    let state = ground.place("lonely").join("state");
    succeeds(offline(&state, &["import", text(&offline_export)]));
    succeeds(offline(&state, &["export", "--all", text(&again)]));
    assert!(files(&again) == files(&offline_export));
    let lonely = Primed::start(&ground.path("lonely"), &ground.casd.address());
    assert_primed(ground.rebuild(&lonely, 3), &lonely);
}

#[test]
fn each_exported_action_says_where_the_files_of_its_own_input_tree_came_from() {
    let ground = Ground::built(&[]);
    let list = succeeds(ground.primed.ask(&["export", "--list"]));
    let file = ground.path("file");
    succeeds(ground.primed.ask(&["export", only_key(&list), text(&file)]));
    let message = SpeculativeActions::decode(std::fs::read(&file).unwrap().as_slice()).unwrap();
    assert_eq!(message.actions.len() as u64, ALL);
    let mut compiles = 0;
    for action in &message.actions {
        let overlays = &action.overlays;
        let of = |wanted| {
            overlays
                .iter()
                .filter(move |overlay| overlay.r#type() == wanted)
        };
        let sources: Vec<_> = of(OverlayType::Source)
            .map(|o| o.source_path.as_str())
            .collect();
        if sources.contains(&"include/common.h") {
            compiles += 1;
            assert_eq!(
                sources.iter().filter(|path| path.ends_with(".c")).count(),
                1
            );
        }
        let objects = of(OverlayType::Action).count() as u64;
        assert!(objects == 0 || objects == ALL - 1, "{overlays:?}");
    }
    assert_eq!(compiles, UNITS);
}

#[test]
fn what_primed_did_not_write_waits_for_its_parent_or_adds_to_it() {
    let mut ground = Ground::built(&[]);
    let list = succeeds(ground.primed.ask(&["export", "--list"]));
    let key = only_key(&list);
    let foreign = ground.path(&format!("{key}.sa"));
    succeeds(ground.primed.ask(&["export", key, text(&foreign)]));
    let message = std::fs::read(&foreign).unwrap();
    let mut message = SpeculativeActions::decode(message.as_slice()).unwrap();
    message.primed_records.clear();
    let encoded = message.encode_to_vec();
    std::fs::write(&foreign, &encoded).unwrap();
    ground.end();

    // Nothing is known of the parent: the message is kept as it is.
    let newcomer = ground.newcomer();
    let said = succeeds(newcomer.ask(&["import", text(&foreign)]));
    assert!(said.contains("wait"), "{said}");
    let list = succeeds(newcomer.ask(&["export", "--list"]));
    assert_eq!(only_key(&list), key);
    let again = ground.path("again");
    succeeds(newcomer.ask(&["export", key, text(&again)]));
    assert!(std::fs::read(&again).unwrap() == encoded);

    // One action of it is recorded: the others come with it.
    let partly = |primed: &Primed| {
        assert!(ground.project.make(&["clean"]).status.success());
        let mut build = ground.project.command(&["build/unit7.o"]);
        let output = build.env("RECC_SERVER", primed.address()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        primed.wait();
    };
    partly(&newcomer);
    assert_eq!(newcomer.status()["records"]["actions"], ALL);
    assert_primed(ground.rebuild(&newcomer, 2), &newcomer);

    // And where the parent is known already, at once.
    let other = Primed::start(&ground.place("other"), &ground.casd.address());
    partly(&other);
    assert_eq!(other.status()["records"]["actions"], 1);
    let nameless = ground.path("nameless");
    std::fs::copy(&foreign, &nameless).unwrap();
    fails(&other.ask(&["import", text(&nameless)]), &["--as"]);
    let said = succeeds(other.ask(&["import", "--as", key, text(&nameless)]));
    assert!(
        said.contains(&format!("{} actions added", ALL - 1)),
        "{said}"
    );
    other.wait();
    assert_primed(ground.rebuild(&other, 3), &other);
}

#[test]
fn what_cannot_be_exported_or_imported_is_said_and_nothing_is_lost() {
    let ground = Ground::built(&[]);
    let ask = |arguments: &[&str]| ground.primed.ask(arguments);
    let list = succeeds(ask(&["export", "--list"]));
    let key = only_key(&list).to_owned();
    let file = ground.path("file");
    fails(
        &ask(&["export", "ffff0000", text(&file)]),
        &["ffff0000", "--list"],
    );
    assert!(!file.exists());
    let nowhere = ground.path("nowhere/file");
    fails(&ask(&["export", &key, text(&nowhere)]), &["nowhere/file"]);
    succeeds(ask(&["export", &key, text(&file)]));

    fails(&ask(&["import", text(&nowhere)]), &["nowhere/file"]);
    fails(
        &ask(&["import", text(&ground.place("none"))]),
        &["no .sa files"],
    );
    let whole = std::fs::read(&file).unwrap();
    let broken = ground.path("broken");
    std::fs::write(&broken, &whole[..whole.len() / 2]).unwrap();
    fails(
        &ask(&["import", text(&broken)]),
        &["broken", "SpeculativeActions"],
    );
    std::fs::write(&broken, "no message at all").unwrap();
    fails(
        &ask(&["import", text(&broken)]),
        &["broken", "SpeculativeActions"],
    );
    let other = "ab".repeat(32);
    fails(
        &ask(&["import", "--as", &other, text(&file)]),
        &[&key, "--as"],
    );

    // What is recorded is not replaced unless that is wanted.
    succeeds(ask(&["import", text(&file)]));
    ground.rebuild(&ground.primed, 2);
    fails(&ask(&["import", text(&file)]), &[&key, "--replace"]);
    assert_eq!(ground.primed.status()["records"]["actions"], ALL);
    succeeds(ask(&["import", "--replace", text(&file)]));
    ground.primed.wait();
    assert_primed(ground.rebuild(&ground.primed, 3), &ground.primed);

    // The records are in use, and whoever uses them is somewhere else.
    let locked = offline(&ground.path("state"), &["export", "--list"]);
    fails(&locked, &["state", "--admin"]);
    let empty = ground.path("empty");
    fails(
        &offline(&empty, &["export", "--list"]),
        &["empty", "--state-dir"],
    );
    assert!(!empty.exists(), "to look makes nothing");
}

#[test]
fn another_machine_is_primed_from_what_the_first_one_shared() {
    let ground = Ground::built(&["--share"]);
    let casd = Casd::proxy_of(&ground.place("second"), &ground.casd.address());
    let second = ground.path("second");
    let primed = Primed::start_with(&second, &casd.address(), &["--share"]);
    assert_eq!(primed.status()["records"]["actions"], 0);
    let counts = ground.rebuild(&primed, 2);
    assert_primed(counts, &primed);
    assert_eq!(primed.status()["records"]["actions"], ALL);
    // What the second one shares, a third one finds.
    let third = ground.place("third");
    let third = Primed::start_with(&third, &ground.casd.address(), &["--share"]);
    assert_primed(ground.rebuild(&third, 3), &third);
    for primed in [&ground.primed, &primed, &third] {
        let log = primed.daemon.log();
        assert!(
            !log.contains(" WARN ") && !log.contains("panicked"),
            "{log}"
        );
    }
}

#[test]
fn nobody_shares_unless_told_to() {
    let ground = Ground::built(&[]);
    let newcomer = Primed::start_with(
        &ground.place("newcomer"),
        &ground.casd.address(),
        &["--share"],
    );
    let counts = ground.rebuild(&newcomer, 2);
    assert_eq!((counts.primed, counts.missed), (0, ALL - 1), "{counts:?}");
    // It has shared what it has recorded, and the first one does not look.
    let unasked = Primed::start(&ground.place("unasked"), &ground.casd.address());
    let counts = ground.rebuild(&unasked, 3);
    assert_eq!((counts.primed, counts.missed), (0, ALL - 1), "{counts:?}");
}
