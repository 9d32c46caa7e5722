//! `primed report`: its page in a real browser, and its trace by the rules of the format.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::chromium::Chromium;
use crate::journals::{self, Pages};
use crate::project::Project;
use crate::support::{Casd, Primed, scratch};

/// Has `primed report` write `build`, and returns where.
fn report(directory: &TempDir, build: &Value, format: &str) -> PathBuf {
    let pages = Pages::of(&directory.path().join("admin.sock"), build, false);
    let file = directory.path().join(format!("report.{format}"));
    let output = Primed::command()
        .args([
            "report",
            "last",
            "--format",
            format,
            "--admin",
            &pages.address(),
            "-o",
        ])
        .arg(&file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    file
}

/// Keeps a picture where `PRIMED_SCREENSHOTS` says, for people to look at.
fn keep(browser: &mut Chromium, name: &str) {
    if let Some(directory) = std::env::var_os("PRIMED_SCREENSHOTS") {
        let picture = browser.screenshot(true);
        std::fs::write(Path::new(&directory).join(name), picture).unwrap();
    }
}

#[test]
fn the_page_shows_the_numbers_of_the_journal_and_asks_nobody() {
    let directory = scratch();
    let build = journals::build(300);
    let file = report(&directory, &build, "html");
    let mut browser = Chromium::open(&file, (1400, 1000), false);
    assert_eq!(browser.text("#label"), build["label"].as_str().unwrap());
    for name in ["asked", "cached", "hit", "joined", "missed"] {
        assert_eq!(
            browser.text(&format!("#total-{name} b")),
            build[name].to_string(),
            "{name}"
        );
    }
    let used = format!("{}used of {} primed", build["used"], build["primed"]);
    assert_eq!(browser.text("#total-used"), used);
    let missed = format!("{} actions left to the client", build["missed"]);
    assert_eq!(browser.text("#missed-count"), missed);
    assert_eq!(
        browser.text("#shown"),
        build["actions"].as_array().unwrap().len().to_string()
    );
    assert!(
        browser
            .text("#missed")
            .contains("no origin is known for gen/version.h")
    );
    // One box for each call and for each execution ahead of time.
    let times = |field: &str, at: &str| {
        let actions = build["actions"].as_array().unwrap();
        actions
            .iter()
            .filter(|action| !action[field][at].is_null())
            .count()
    };
    let boxes = times("asked", "at_unix_ms") + times("primed", "started_unix_ms");
    assert_eq!(
        browser.value("document.documentElement.dataset.ready"),
        boxes.to_string()
    );
    keep(&mut browser, "report.png");
    assert_eq!(browser.complaints, Vec::<String>::new());

    let mut browser = Chromium::open(&file, (1400, 1000), true);
    keep(&mut browser, "report-dark.png");
    let mut browser = Chromium::open(&file, (560, 900), true);
    assert_eq!(
        browser.value("document.documentElement.scrollWidth <= innerWidth"),
        true
    );
    keep(&mut browser, "report-narrow.png");
}

/// By recc: a header includes a new one, which is missed until it has been seen once, and explained.
#[test]
fn a_real_build_has_a_page_with_its_own_numbers_and_explanations() {
    let directory = scratch();
    let casd = Casd::start(directory.path(), 4);
    let primed = Primed::start(directory.path(), &casd.address());
    let project = Project::of_units(directory.path(), &primed.address(), 6);
    project.build();
    primed.wait();
    project.write("include/new.h", "#define NEW 10\n");
    let common = "#include \"new.h\"\n#define COMMON NEW\n";
    project.write("include/common.h", common);
    project.build();
    primed.wait();

    let file = directory.path().join("report.html");
    let output = primed.ask(&["report", "-o", file.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    let build = primed.status()["builds"][0].clone();
    assert!(build["missed"].as_u64().unwrap() > 0, "{build}");
    assert!(
        build["hit"].as_u64().unwrap() + build["joined"].as_u64().unwrap() > 0,
        "{build}"
    );
    let mut browser = Chromium::open(&file, (1400, 1000), false);
    for name in ["asked", "cached", "hit", "joined", "missed"] {
        assert_eq!(
            browser.text(&format!("#total-{name} b")),
            build[name].to_string(),
            "{name}"
        );
    }
    let explained = browser.text("#missed .said");
    assert!(!explained.is_empty());
    keep(&mut browser, "report-real.png");
    assert_eq!(browser.complaints, Vec::<String>::new());
    let output = primed.ask(&["report", "--format", "trace", "-o", "-"]);
    let trace: Value = serde_json::from_slice(&output.stdout).unwrap();
    let calls = trace["traceEvents"].as_array().unwrap().iter();
    let calls = calls.filter(|event| event["ph"] == "X" && event["pid"] == 1);
    assert_eq!(calls.count() as u64, build["asked"].as_u64().unwrap());
}

#[test]
fn a_page_of_ten_thousand_actions_answers_searches_clicks_and_zooms() {
    let directory = scratch();
    let build = journals::build(10_000);
    let file = report(&directory, &build, "html");
    let mut browser = Chromium::open(&file, (1400, 1000), false);
    assert_eq!(browser.text("#shown"), "10,200");
    assert!(
        browser
            .value("document.querySelectorAll('*').length")
            .as_u64()
            .unwrap()
            < 1500
    );
    keep(&mut browser, "report-large.png");

    let search = |words: &str| {
        format!(
            "document.getElementById('search').value = '{words}'; \
                 document.getElementById('search').dispatchEvent(new Event('input'))"
        )
    };
    browser.value(&search("module003 unit00123"));
    assert_eq!(browser.text("#shown"), "1 of 10,200");
    assert_eq!(browser.text(".row span"), "build/src/module003/unit00123.o");
    browser.value("document.querySelector('.row').click()");
    let digest = build["actions"][123]["action"].as_str().unwrap();
    assert!(browser.text("#details").contains(digest));
    browser.value(&search(""));
    assert_eq!(browser.text("#shown"), "10,200");

    // The last row can be reached, and the rows of a table are sorted as its head says.
    browser.value(
        "new Promise((done) => { const table = document.getElementById('table'); \
         [...document.querySelectorAll('#columns button')].find((b) => b.textContent === 'waited').click(); \
         [...document.querySelectorAll('#columns button')].find((b) => b.textContent === 'waited').click(); \
         table.scrollTop = 0; requestAnimationFrame(() => requestAnimationFrame(done)); })",
    );
    let waited = |action: &Value| {
        let asked = &action["asked"];
        Some(asked["answered_unix_ms"].as_i64()? - asked["at_unix_ms"].as_i64()?)
    };
    let actions = build["actions"].as_array().unwrap();
    let longest = actions.iter().filter_map(waited).max().unwrap();
    let first = browser.text(".row :nth-child(5)");
    assert_eq!(first, format!("{:.2} s", longest as f64 / 1000.0));

    // What is under the mouse says what it is, and zooming in puts another thing there.
    browser.value("scrollTo(0, 0)");
    let place = browser.value(
        "(() => { const r = document.getElementById('timeline').getBoundingClientRect(); return [r.left, r.top, r.width]; })()",
    );
    let at = |n: usize| place[n].as_f64().unwrap();
    let (x, y) = (at(0) + at(2) / 2.0, at(1) + 60.0);
    browser.mouse("mouseMoved", x, y);
    assert_eq!(
        browser.value("document.getElementById('tip').hidden"),
        false
    );
    assert!(browser.text("#tip b").starts_with("build/"));
    for _ in 0..8 {
        browser.value("document.getElementById('zoom-in').click()");
    }
    keep(&mut browser, "report-zoomed.png");
    browser.mouse("mouseMoved", x, y);
    browser.mouse("mousePressed", x, y);
    browser.mouse("mouseReleased", x, y);
    assert_eq!(
        browser.value("document.getElementById('details').hidden"),
        false
    );
    keep(&mut browser, "report-chosen.png");
    assert_eq!(browser.complaints, Vec::<String>::new());
}

#[test]
fn names_that_look_like_markup_are_shown_as_they_are() {
    let directory = scratch();
    let mut build = journals::build(30);
    let name = "</script><img src=x onerror=alert(1)><!--<script>&amp;'\"`${1}";
    build["label"] = name.into();
    for action in build["actions"].as_array_mut().unwrap() {
        action["label"] = name.into();
        if action["primed"]["outcome"] == "unresolved" {
            action["primed"]["reason"] = name.into();
        }
    }
    let file = report(&directory, &build, "html");
    let mut browser = Chromium::open(&file, (1000, 800), false);
    assert_eq!(browser.text("#label"), name);
    assert_eq!(browser.text(".row span"), name);
    assert_eq!(browser.value("document.images.length"), 0);
    assert_eq!(browser.complaints, Vec::<String>::new());
}

#[test]
fn builds_without_actions_and_builds_that_still_run_have_a_page_too() {
    let directory = scratch();
    let mut running = journals::build(20);
    running["ended_unix_ms"] = Value::Null;
    running["actions"][0]["asked"]["answered_unix_ms"] = Value::Null;
    running["actions"][0]["primed"]["ended_unix_ms"] = Value::Null;
    for build in [journals::build(0), journals::build(1), running] {
        let file = report(&directory, &build, "html");
        let mut browser = Chromium::open(&file, (1000, 800), false);
        assert_eq!(browser.text("#total-asked b"), build["asked"].to_string());
        assert_eq!(browser.complaints, Vec::<String>::new());
    }
}

#[test]
fn the_trace_keeps_the_rules_of_the_trace_event_format() {
    let directory = scratch();
    let build = journals::build(500);
    let file = report(&directory, &build, "trace");
    let trace: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!(trace["displayTimeUnit"], "ms");
    let events = trace["traceEvents"].as_array().unwrap();
    let mut slices: BTreeMap<(u64, u64), Vec<(i64, i64)>> = BTreeMap::new();
    let mut named = BTreeSet::new();
    let mut arrows: BTreeMap<u64, Vec<&Value>> = BTreeMap::new();
    for event in events {
        let track = (
            event["pid"].as_u64().unwrap(),
            event["tid"].as_u64().unwrap(),
        );
        assert!(event["name"].is_string(), "{event}");
        match event["ph"].as_str().unwrap() {
            "M" if event["name"] == "thread_name" => assert!(named.insert(track), "{event}"),
            "M" => assert!(event["args"].is_object()),
            "X" => {
                let (at, took) = (
                    event["ts"].as_i64().unwrap(),
                    event["dur"].as_i64().unwrap(),
                );
                assert!(at >= 0 && took > 0, "{event}");
                slices.entry(track).or_default().push((at, at + took));
            }
            "s" | "f" => {
                arrows
                    .entry(event["id"].as_u64().unwrap())
                    .or_default()
                    .push(event);
            }
            other => panic!("an event of no known kind: {other}"),
        }
    }
    // On each track, which has a name, slices follow each other.
    assert_eq!(slices.keys().copied().collect::<BTreeSet<_>>(), named);
    for track in slices.values_mut() {
        track.sort_unstable();
        assert!(track.windows(2).all(|pair| pair[0].1 <= pair[1].0));
    }
    // Each arrow leads on in time, from a slice to a slice: as many as results were used.
    for ends in arrows.values() {
        let [start, finish] = ends[..] else {
            panic!("half an arrow: {ends:?}")
        };
        assert_eq!(
            (&start["ph"], &finish["ph"], &finish["bp"]),
            (&"s".into(), &"f".into(), &"e".into())
        );
        assert!(start["ts"].as_i64() <= finish["ts"].as_i64());
        for end in [start, finish] {
            let at = end["ts"].as_i64().unwrap();
            let track = (end["pid"].as_u64().unwrap(), end["tid"].as_u64().unwrap());
            assert!(
                slices[&track]
                    .iter()
                    .any(|(from, to)| (*from..=*to).contains(&at)),
                "{end}"
            );
        }
    }
    assert_eq!(arrows.len() as u64, build["used"].as_u64().unwrap());
    let all: usize = slices.values().map(Vec::len).sum();
    assert_eq!(
        all,
        events.iter().filter(|event| event["ph"] == "X").count()
    );
}

#[test]
fn a_report_goes_to_stdout_on_request_and_says_so_when_there_is_no_such_build() {
    let directory = scratch();
    let build = journals::build(5);
    let pages = Pages::of(&directory.path().join("admin.sock"), &build, false);
    let report = |arguments: &[&str]| {
        let mut command = Primed::command();
        command
            .arg("report")
            .args(arguments)
            .args(["--admin", &pages.address()]);
        command.current_dir(directory.path()).output().unwrap()
    };
    let output = report(&["-o", "-"]);
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.starts_with(b"<!doctype html>"));
    assert!(output.stderr.is_empty(), "{output:?}");

    let id = build["id"].as_str().unwrap();
    let output = report(&[id, "--format", "trace"]);
    assert!(output.status.success(), "{output:?}");
    assert!(directory.path().join(format!("primed-{id}.json")).exists());

    let output = report(&["no-such-build"]);
    assert_eq!(output.status.code(), Some(1));
    let output = report(&["-o", "no/such/folder/report.html"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("no/such/folder/report.html cannot be written"),
        "{said}"
    );
}
