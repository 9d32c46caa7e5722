//! `--metrics`: valid by Prometheus' own parser, true by what real builds did, named as documented,
//! and not to be blocked by who reads it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use crate::grpcio::Grpcio;
use crate::project::{Project, UNITS};
use crate::support::{Casd, PATIENCE, Primed, installed, scratch, wait_until};

/// The port that primed chose for metrics.
fn port(primed: &Primed) -> u16 {
    let mark = "metrics=127.0.0.1:";
    let mut port = None;
    wait_until("primed says where metrics are", || {
        let log = primed.daemon.log();
        let said = log.lines().find_map(|line| line.split_once(mark));
        port = said.and_then(|(_, rest)| rest.trim().parse().ok());
        port.is_some()
    });
    port.unwrap()
}

/// Sends one request, and returns the head and the body of the answer.
fn ask(mut stream: impl Read + Write, request: &str) -> (String, String) {
    write!(
        stream,
        "{request} HTTP/1.1\r\nHost: primed\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// What Prometheus' parser finds on a page.
struct Families(BTreeMap<String, Value>);

impl Families {
    fn of(page: &str) -> Self {
        let site = installed("prometheus", "prometheus/site");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/metrics/parse.py");
        let mut parser = Grpcio::Old
            .python(script.to_str().unwrap())
            .env("PYTHONPATH", site)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = parser.stdin.take().unwrap();
        stdin.write_all(page.as_bytes()).unwrap();
        drop(stdin);
        let output = parser.wait_with_output().unwrap();
        assert!(output.status.success(), "it is no OpenMetrics:\n{page}");
        Families(serde_json::from_slice(&output.stdout).unwrap())
    }

    fn read(primed: &Primed) -> Self {
        let (head, page) = ask(connect(port(primed)), "GET /metrics");
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        assert!(head.to_lowercase().contains(content_type), "{head}");
        Families::of(&page)
    }

    /// The sum of all samples of this name that have these labels.
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let mut samples = self.0.values().flat_map(|family| {
            let samples = family["samples"].as_array().unwrap();
            samples.iter().filter(|sample| sample["name"] == name)
        });
        let has = |sample: &&Value| {
            labels
                .iter()
                .all(|(key, value)| sample["labels"][key] == *value)
        };
        let mut found = samples.by_ref().filter(has).peekable();
        assert!(found.peek().is_some(), "there is no {name} {labels:?}");
        found.map(|sample| sample["value"].as_f64().unwrap()).sum()
    }

    fn count(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        self.value(name, labels) as u64
    }
}

#[test]
fn the_page_is_valid_and_counts_what_real_builds_asked_for_and_were_answered() {
    let directory = scratch();
    let casd = Casd::start(directory.path(), 4);
    let primed = Primed::start_with(
        directory.path(),
        &casd.address(),
        &["--metrics", "127.0.0.1:0"],
    );
    let before = Families::read(&primed);
    assert_eq!(before.count("primed_builds_total", &[]), 0);
    let project = Project::create(directory.path(), &primed.address());
    project.build();
    primed.wait();
    project.write("include/common.h", "#define COMMON 2\n");
    project.build();
    primed.wait();

    let status = primed.status();
    let totals = &status["totals"];
    let total = |name: &str| totals[name].as_u64().unwrap();
    let page = Families::read(&primed);
    assert_eq!(page.count("primed_builds_total", &[]), 2);
    assert_eq!(page.count("primed_asked_total", &[]), total("asked"));
    assert_eq!(total("asked"), 2 * (UNITS as u64 + 2));
    for answer in ["cached", "hit", "joined", "missed"] {
        let counted = page.count("primed_answers_total", &[("answer", answer)]);
        assert_eq!(counted, total(answer), "{answer}");
    }
    let primed_results = page.count("primed_speculative_actions_total", &[("outcome", "primed")]);
    assert_eq!(primed_results, total("primed"));
    assert!(primed_results >= UNITS as u64);
    assert_eq!(
        page.count("primed_speculative_used_total", &[]),
        total("used")
    );
    let saved = page.value("primed_saved_seconds_total", &[]) * 1000.0;
    assert!((saved - total("saved_ms") as f64).abs() <= 2.0, "{saved}");
    assert_eq!(page.count("primed_lead_seconds_count", &[]), total("hit"));
    assert_eq!(page.count("primed_generation_seconds_count", &[]), 2);
    let added = page.count("primed_adaptation_added_bytes_total", &[]);
    assert_eq!(added, total("added_bytes"));
    assert!(added > 0);
    let inputs = page.count("primed_recorded_input_bytes_total", &[]);
    assert_eq!(inputs, total("input_bytes"));
    let builds = status["builds"].as_array().unwrap();
    assert!(builds[0]["submission_ms"].as_u64().unwrap() > 0, "{status}");
    assert!(
        builds
            .iter()
            .all(|build| build["generation_ms"].as_u64() > Some(0))
    );

    // recc asks once for each action, and executes what it missed.
    let lookups = [("service", "ActionCache"), ("method", "GetActionResult")];
    assert_eq!(page.count("primed_calls_total", &lookups), total("asked"));
    let missed = [&lookups[..], &[("status", "NOT_FOUND")]].concat();
    assert!(page.count("primed_calls_total", &missed) >= total("missed"));
    let executions = [("method", "Execute"), ("status", "OK")];
    let executed = page.count("primed_calls_total", &executions);
    assert!((total("missed")..=total("missed") + total("joined")).contains(&executed));
    wait_until("connections of clients that have ended are gone", || {
        let page = Families::read(&primed);
        let open = ["primed_calls_in_flight", "primed_client_connections"];
        open.iter().all(|name| page.count(name, &[]) == 0)
    });
    let opened = page.count("primed_client_connections_opened_total", &[]);
    assert!(opened >= total("asked"), "recc connects anew each time");
    assert_eq!(
        page.count("primed_recorded_actions", &[]),
        status["records"]["actions"].as_u64().unwrap()
    );
    assert_eq!(
        page.value("primed_upstream_state", &[("state", "connected")]),
        1.0
    );
    assert_eq!(page.value("primed_observations_dropped_total", &[]), 0.0);
    assert!(page.value("process_resident_memory_bytes", &[]) > 1e6);
    assert!(page.value("process_cpu_seconds_total", &[]) > 0.0);
}

/// What docs/metrics.md says is stable. The embedded backend has all that there is.
#[test]
fn the_page_holds_just_the_families_that_are_documented() {
    let directory = scratch();
    let primed = Primed::embedded(directory.path(), &["--metrics", "127.0.0.1:0"]);
    let page = Families::read(&primed);
    let families: BTreeSet<String> = page.0.keys().cloned().collect();
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    let guide = std::fs::read_to_string(guide).unwrap();
    let rows = guide
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter(|row| row.starts_with("primed_") || row.starts_with("process_"));
    let rows = rows.map(|row| {
        let (name, rest) = row.split_once('`').unwrap();
        let kind = rest.split('|').nth(1).unwrap().trim();
        let name = name.split('{').next().unwrap();
        let family = match kind {
            "counter" => name.strip_suffix("_total").unwrap(),
            "info" => name.strip_suffix("_info").unwrap(),
            _ => name,
        };
        (family.to_owned(), kind.to_owned())
    });
    let documented: BTreeMap<String, String> = rows.collect();
    assert_eq!(
        documented.keys().cloned().collect::<BTreeSet<_>>(),
        families
    );
    for (name, kind) in &documented {
        assert_eq!(page.0[name]["type"], **kind, "{name}");
    }
    let status = primed.status();
    let embedded = &status["upstream"]["embedded"];
    for name in ["running", "queued", "cache_bytes"] {
        let metric = match name {
            "cache_bytes" => "primed_embedded_cache_bytes".to_owned(),
            name => format!("primed_embedded_{name}"),
        };
        assert_eq!(Some(page.count(&metric, &[])), embedded[name].as_u64());
    }
    let said = primed.ask(&["status"]).stdout;
    let said = String::from_utf8(said).unwrap();
    assert!(said.contains("upstream     embedded ("), "{said}");
    assert!(said.contains("), 0 running, 0 queued, "), "{said}");
    // The same page stands at the admin socket.
    let admin = UnixStream::connect(directory.path().join("admin.sock")).unwrap();
    let (head, _) = ask(admin, "GET /metrics");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
}

#[test]
fn who_holds_connections_open_or_asks_for_nonsense_keeps_nobody_from_reading() {
    let directory = scratch();
    let socket = directory.path().join("metrics.sock");
    let address = format!("unix:{}", socket.display());
    let by_unix = Primed::start_with(
        directory.path(),
        "unix:/nowhere/casd.sock",
        &["--metrics", &address, "--mode", "none"],
    );
    let (head, page) = ask(UnixStream::connect(&socket).unwrap(), "GET /metrics");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    Families::of(&page);
    for (request, status) in [
        ("GET /", "404"),
        ("GET /status", "404"),
        ("POST /metrics", "405"),
        ("DELETE /builds", "404"),
    ] {
        let (head, _) = ask(UnixStream::connect(&socket).unwrap(), request);
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
    }
    // More than are let in at once, none of which asks, and some of which do not stop asking.
    let mut idle: Vec<UnixStream> = (0..20)
        .map(|_| UnixStream::connect(&socket).unwrap())
        .collect();
    for stream in idle.iter_mut().take(10) {
        stream.write_all(b"GET /metrics HTTP/1.1\r\nx: ").unwrap();
    }
    let (head, _) = ask(UnixStream::connect(&socket).unwrap(), "GET /metrics");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    drop(by_unix);
}

#[test]
fn an_address_for_metrics_that_cannot_work_is_refused_at_the_start() {
    for (address, why) in [
        ("grpcs://127.0.0.1:1", "without TLS"),
        ("embedded", "a socket of their own"),
    ] {
        let directory = scratch();
        let output = Primed::command()
            .args(["serve", "--upstream", "unix:/nowhere", "--metrics", address])
            .env("XDG_RUNTIME_DIR", directory.path())
            .env("XDG_STATE_HOME", directory.path())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(64), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(why), "{said}");
    }
}
