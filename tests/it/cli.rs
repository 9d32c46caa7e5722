//! The command line: what is said and which exit code is given when something is wrong, and what
//! scripts may rely on.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::BTreeSet;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{Daemon, Primed, connects, scratch, wait_until};

/// An upstream that need not be there.
const NOBODY: &str = "unix:/nonexistent/upstream.sock";

/// Runs primed to its end, with no variable set but those given.
fn primed(variables: &[(&str, &str)], arguments: &[&str]) -> Output {
    Primed::command()
        .env_remove("XDG_RUNTIME_DIR")
        .env_remove("XDG_STATE_HOME")
        .env_remove("XDG_CACHE_HOME")
        .env_remove("HOME")
        .envs(variables.iter().copied())
        .args(arguments)
        .output()
        .unwrap()
}

/// Fails unless `output` is a failure with `code` whose message holds all of `words`.
fn assert_fails(output: &Output, code: i32, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(output.stdout.is_empty(), "{output:?}");
    for word in words {
        assert!(said.contains(word), "'{word}' is not in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn an_address_that_is_none_is_a_usage_error_that_shows_the_forms() {
    for address in ["ftp://host:1", "localhost", "unix:", "grpcs://"] {
        for flag in ["--upstream", "--listen", "--admin"] {
            let output = primed(&[], &["serve", flag, address]);
            assert_fails(&output, 64, &[flag, address, "unix:PATH", "HOST:PORT"]);
        }
        let output = primed(&[("PRIMED_UPSTREAM", address)], &["serve"]);
        assert_fails(&output, 64, &["--upstream", address]);
    }
}

#[test]
fn arguments_that_are_missing_or_unknown_are_usage_errors_that_name_them() {
    let runtime_dir = [("XDG_RUNTIME_DIR", "/nonexistent")];
    let serve = ["serve", "--state-dir", "/nonexistent"];
    let no_cache = primed(&runtime_dir, &serve);
    assert_fails(&no_cache, 64, &["XDG_CACHE_HOME", "--cache-dir"]);
    assert_fails(&primed(&[], &[]), 64, &["serve", "status", "wait"]);
    assert_fails(&primed(&[], &["sevre"]), 64, &["sevre"]);
    let serve = |flag, value| primed(&[], &["serve", "--upstream", NOBODY, flag, value]);
    assert_fails(
        &serve("--mode", "turbo"),
        64,
        &[
            "turbo",
            "none",
            "prime-only",
            "source-artifact",
            "intra-element",
            "full",
        ],
    );
    assert_fails(&serve("--max-speculative", "0"), 64, &["--max-speculative"]);
    assert_fails(&serve("--log-format", "xml"), 64, &["text", "json"]);
    assert_fails(
        &serve("--log-level", "primed=loud"),
        64,
        &["--log-level", "primed=loud"],
    );
    assert_fails(&primed(&[], &["wait", "--timeout=-1"]), 64, &["--timeout"]);
    assert_fails(&primed(&[], &["wait", "--timeout=NaN"]), 64, &["--timeout"]);
}

#[test]
fn to_export_or_share_nothing_is_a_usage_error_with_a_hint() {
    for arguments in [
        &["export"][..],
        &["export", "abcd"],
        &["export", "--all"],
        &["export", "--list", "abcd"],
    ] {
        let output = primed(&[], arguments);
        assert_fails(&output, 64, &["--list", "--all", "WEAK_KEY"]);
    }
    assert_fails(&primed(&[], &["import"]), 64, &["PATH"]);
    let output = primed(&[], &["import", "--as", "abcd", "file"]);
    assert_fails(&output, 64, &["--as", "abcd", "64 hexadecimal digits"]);
    let scratch = scratch();
    let output = primed(
        &[("XDG_RUNTIME_DIR", scratch.path().to_str().unwrap())],
        &[
            "serve",
            "--upstream",
            NOBODY,
            "--share",
            "--mode",
            "none",
            "--state-dir",
            "/nonexistent",
        ],
    );
    assert_fails(&output, 64, &["--share", "--mode none"]);
}

#[test]
fn help_and_version_are_no_errors() {
    for arguments in [&["--help"][..], &["--version"], &["serve", "--help"]] {
        let output = primed(&[], arguments);
        assert_eq!(output.status.code(), Some(0));
        assert!(!output.stdout.is_empty() && output.stderr.is_empty());
    }
}

#[test]
fn what_cannot_be_done_on_the_way_upstream_is_a_usage_error_that_keeps_secrets() {
    let scratch = scratch();
    let runtime = scratch.path().display().to_string();
    let empty = scratch.path().join("empty");
    std::fs::write(&empty, "\n").unwrap();
    let empty = empty.to_str().unwrap();
    for (flag, value, words) in [
        ("--upstream-header", "s3cret", &["NAME: VALUE"][..]),
        ("--upstream-header", ":path: s3cret", &["HTTP/2's own"]),
        ("--upstream-header", "grpc-status: s3cret", &["grpc-status"]),
        (
            "--upstream-header",
            "x: 1\ny-bin: s3cret!",
            &["y-bin", "base64"],
        ),
        ("--upstream-token-file", empty, &[empty, "empty"]),
        (
            "--upstream-token-file",
            "/nonexistent",
            &["/nonexistent", "No such file"],
        ),
        (
            "--credential-helper",
            "/nonexistent",
            &["/nonexistent", "path of a program"],
        ),
        (
            "--credential-helper",
            "host:443=x",
            &["HOST=PROGRAM", "without port"],
        ),
        (
            "--upstream-proxy",
            "https://me:s3cret@proxy",
            &["http://HOST:PORT", "none"],
        ),
        ("--map-instance", "main", &["FROM=TO"]),
        ("--map-instance", "a=b,a=c", &["'a'", "twice"]),
        ("--cas-upstream", "nowhere", &["nowhere", "unix:PATH"]),
    ] {
        let variable = format!("PRIMED_{}", flag[2..].replace('-', "_").to_uppercase());
        let base = [("XDG_RUNTIME_DIR", runtime.as_str()), ("HOME", &runtime)];
        let by_flag = primed(&base, &["serve", "--upstream", NOBODY, flag, value]);
        let by_variable = [base[0], base[1], (variable.as_str(), value)];
        let by_variable = primed(&by_variable, &["serve", "--upstream", NOBODY]);
        for output in [by_flag, by_variable] {
            assert_fails(&output, 64, words);
            assert_fails(&output, 64, &[flag]);
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(!said.contains("s3cret"), "{said}");
        }
    }
    let secret = [("PRIMED_UPSTREAM_HEADER", "authorization: s3cret")];
    let help = primed(&secret, &["serve", "--help"]);
    assert!(!String::from_utf8_lossy(&help.stdout).contains("s3cret"));
}

#[test]
fn to_listen_where_an_endpoint_is_is_a_usage_error_that_names_its_flag() {
    let scratch = scratch();
    let runtime = scratch.path().display().to_string();
    let listen = format!("unix:{runtime}/a.sock");
    for flag in [
        "--execution-upstream",
        "--action-cache-upstream",
        "--cas-upstream",
    ] {
        let arguments = [
            "serve",
            "--upstream",
            NOBODY,
            "--listen",
            &listen,
            flag,
            &listen,
        ];
        let output = primed(
            &[("XDG_RUNTIME_DIR", &runtime), ("HOME", &runtime)],
            &arguments,
        );
        assert_fails(&output, 64, &["itself", &listen, flag]);
    }
}

#[test]
fn to_listen_where_the_upstream_is_is_a_usage_error_however_it_is_written() {
    let scratch = scratch();
    let upstream = format!("unix:{}/a.sock", scratch.path().display());
    let state = scratch.path().display().to_string();
    for listen in [
        upstream.clone(),
        upstream.replace("unix:", "unix://"),
        format!("127.0.0.1:0,{upstream}"),
    ] {
        let output = primed(
            &[("XDG_RUNTIME_DIR", &state), ("HOME", &state)],
            &["serve", "--upstream", &upstream, "--listen", &listen],
        );
        assert_fails(
            &output,
            64,
            &["itself", &upstream, "--listen", "--upstream"],
        );
    }
    assert!(!scratch.path().join("a.sock").exists());
}

#[test]
fn a_default_that_needs_a_variable_names_it_and_the_flag_that_helps() {
    let serve = ["serve", "--upstream", NOBODY];
    assert_fails(&primed(&[], &serve), 64, &["XDG_RUNTIME_DIR", "--listen"]);
    let relative = primed(&[("XDG_RUNTIME_DIR", "relative")], &serve);
    assert_fails(&relative, 64, &["XDG_RUNTIME_DIR", "--listen"]);
    let listen = [("PRIMED_LISTEN", "127.0.0.1:0")];
    assert_fails(
        &primed(&listen, &serve),
        64,
        &["XDG_RUNTIME_DIR", "--admin"],
    );
    let sockets = [listen[0], ("PRIMED_ADMIN", "unix:/tmp/never-bound.sock")];
    assert_fails(
        &primed(&sockets, &serve),
        64,
        &["XDG_STATE_HOME", "--state-dir"],
    );
    for command in ["status", "wait"] {
        assert_fails(
            &primed(&[], &[command]),
            64,
            &["XDG_RUNTIME_DIR", "--admin"],
        );
    }
}

#[test]
fn a_socket_in_use_names_who_listens_and_is_left_alone() {
    let scratch = scratch();
    let live = Primed::start(scratch.path(), NOBODY);
    let holder = format!("primed (pid {})", live.daemon.pid());
    let other = format!("unix:{}/other.sock", scratch.path().display());
    let admin = format!("unix:{}/admin.sock", scratch.path().display());
    let state = scratch.path().join("other").display().to_string();
    let common = ["serve", "--upstream", NOBODY, "--state-dir", &state];
    for (listen, admin, taken) in [
        (&live.address(), &other, &live.address()),
        (&other, &admin, &admin),
    ] {
        let arguments = [&common[..], &["--listen", listen, "--admin", admin]].concat();
        assert_fails(&primed(&[], &arguments), 1, &[taken, &holder]);
    }
    assert_eq!(live.status()["upstream"]["address"], NOBODY, "still there");
    assert!(connects(&live.socket()));
    assert!(
        !scratch.path().join("other.sock").exists(),
        "nothing is left behind"
    );
}

#[test]
fn sockets_of_a_primed_that_was_killed_are_replaced() {
    let scratch = scratch();
    let mut killed = Primed::start(scratch.path(), NOBODY);
    killed.daemon.kill();
    assert!(killed.socket().exists() && !connects(&killed.socket()));
    let primed = Primed::start(scratch.path(), NOBODY);
    assert!(connects(&primed.socket()));
}

#[test]
fn a_file_in_the_way_of_a_socket_is_kept_and_named() {
    let scratch = scratch();
    let file = scratch.path().join("notes.txt");
    std::fs::write(&file, "keep").unwrap();
    let listen = format!("unix:{}", file.display());
    let directory = scratch.path().display().to_string();
    let output = primed(
        &[("XDG_RUNTIME_DIR", &directory), ("HOME", &directory)],
        &["serve", "--upstream", NOBODY, "--listen", &listen],
    );
    assert_fails(&output, 1, &["notes.txt", "not a socket"]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "keep");
}

/// Starts `command` and waits until the socket at `admin` is listened on.
fn serve(command: &mut Command, directory: &Path, admin: &Path) -> Daemon {
    let mut daemon = Daemon::start(command, directory.join("serve.log"));
    wait_until("primed listens", || {
        assert!(daemon.is_running(), "primed ended: {}", daemon.log());
        connects(admin)
    });
    daemon
}

/// The object that `primed status --json` prints, asked by way of the environment.
fn status(variables: &[(&str, &str)]) -> Value {
    let output = primed(variables, &["status", "--json"]);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn every_setting_can_be_a_variable_and_a_flag_outweighs_it() {
    let scratch = scratch();
    let at = |name: &str| scratch.path().join(name);
    let unix = |name: &str| format!("unix:{}", at(name).display());
    let mut command = Primed::command();
    command
        .env_remove("XDG_RUNTIME_DIR")
        .env("PRIMED_UPSTREAM", unix("variable.sock"))
        .env(
            "PRIMED_LISTEN",
            format!("{},{}", unix("a.sock"), unix("b.sock")),
        )
        .env("PRIMED_ADMIN", unix("admin.sock"))
        .env("PRIMED_STATE_DIR", at("state"))
        .env("PRIMED_MODE", "prime-only")
        .env("PRIMED_MAX_SPECULATIVE", "3")
        .env("PRIMED_LOG_FORMAT", "json")
        .args(["serve", "--upstream", &unix("flag.sock")]);
    let daemon = serve(&mut command, scratch.path(), &at("admin.sock"));
    let page = status(&[("PRIMED_ADMIN", &unix("admin.sock"))]);
    assert_eq!(page["upstream"]["address"], unix("flag.sock"));
    assert!(connects(&at("a.sock")) && connects(&at("b.sock")));
    assert!(at("state").is_dir());
    assert!(daemon.log().starts_with('{'), "{}", daemon.log());
}

#[test]
fn without_settings_sockets_and_records_stand_in_the_xdg_directories() {
    let scratch = scratch();
    let runtime = scratch.path().join("run");
    let home = scratch.path().join("home");
    let mut command = Primed::command();
    command
        .env("XDG_RUNTIME_DIR", &runtime)
        .env_remove("XDG_STATE_HOME")
        .env("HOME", &home)
        .args(["serve", "--upstream", NOBODY]);
    let admin = runtime.join("primed/admin.sock");
    let mut daemon = serve(&mut command, scratch.path(), &admin);
    assert!(connects(&runtime.join("primed/remote-apis.sock")));
    let page = status(&[("XDG_RUNTIME_DIR", runtime.to_str().unwrap())]);
    assert_eq!(page["upstream"]["address"], NOBODY);
    assert!(home.join(".local/state/primed").is_dir());
    daemon.signal(Signal::INT);
    assert_eq!(daemon.exit_code(), Some(0), "{}", daemon.log());
    assert!(!admin.exists());
}

#[test]
fn to_ask_where_no_primed_is_fails_with_a_hint() {
    let scratch = scratch();
    let admin = format!("unix:{}/admin.sock", scratch.path().display());
    for command in [
        &["wait"][..],
        &["wait", "--timeout", "5"],
        &["status"],
        &["status", "--json"],
    ] {
        let output = primed(&[("PRIMED_ADMIN", &admin)], command);
        assert_fails(&output, 1, &[&admin, "primed serve", "--admin"]);
    }
}

#[test]
fn wait_gives_up_when_its_time_is_over() {
    let scratch = scratch();
    let socket = scratch.path().join("admin.sock");
    // Accepts, and never answers: a primed that is never quiet.
    let _silent = UnixListener::bind(&socket).unwrap();
    let admin = format!("unix:{}", socket.display());
    let output = primed(&[], &["wait", "--timeout", "0.2", "--admin", &admin]);
    assert_fails(&output, 1, &["not quiet after 0.2 s"]);
}

#[test]
fn wait_returns_at_once_when_all_is_quiet() {
    let scratch = scratch();
    for mode in ["none", "full"] {
        let primed = Primed::start_with(scratch.path(), NOBODY, &["--mode", mode]);
        let output = primed.ask(&["wait", "--timeout", "60"]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(output.stdout.is_empty() && output.stderr.is_empty());
    }
}

#[test]
fn a_log_in_json_is_one_object_a_line_on_stderr() {
    let scratch = scratch();
    let arguments = ["--log-format", "json"];
    let mut primed = Primed::start_with(scratch.path(), NOBODY, &arguments);
    primed.daemon.signal(Signal::TERM);
    assert_eq!(primed.daemon.exit_code(), Some(0));
    let log = primed.daemon.log();
    let lines: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    assert!(lines.len() >= 2, "{log}");
    for line in &lines {
        assert!(line["timestamp"].is_string() && line["level"].is_string());
        assert!(line["fields"]["message"].is_string(), "{line}");
    }
    assert_eq!(lines[0]["fields"]["upstream"], NOBODY);
}

fn keys(object: &Value) -> BTreeSet<&str> {
    object
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

#[test]
fn status_in_json_has_the_keys_that_scripts_rely_on_in_every_mode() {
    let scratch = scratch();
    for mode in ["none", "prime-only", "full"] {
        let primed = Primed::start_with(scratch.path(), NOBODY, &["--mode", mode]);
        let status = primed.status();
        assert_eq!(
            keys(&status),
            BTreeSet::from([
                "version",
                "upstream",
                "records",
                "speculation",
                "totals",
                "builds"
            ])
        );
        assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(
            keys(&status["upstream"]),
            BTreeSet::from(["address", "state"])
        );
        assert_eq!(status["upstream"]["state"], "idle");
        assert_eq!(
            keys(&status["records"]),
            BTreeSet::from(["actions", "parents"])
        );
        assert_eq!(
            keys(&status["speculation"]),
            BTreeSet::from([
                "queued",
                "running",
                "completed",
                "failed",
                "unadaptable",
                "slots",
                "width",
                "cancelled",
                "gave_way",
                "retired",
                "cheap",
                "over_budget",
                "clients",
                "flights"
            ])
        );
        for count in ["queued", "running", "completed", "failed", "unadaptable"] {
            assert_eq!(status["speculation"][count], 0);
        }
        assert!(status["speculation"]["slots"].as_u64().unwrap() >= 1);
        assert_eq!(status["speculation"]["clients"], 0);
        assert_eq!(status["speculation"]["flights"], Value::Array(vec![]));
        assert_eq!(status["builds"], Value::Array(vec![]));
    }
}

#[test]
fn status_for_people_names_version_and_upstream() {
    let scratch = scratch();
    let primed = Primed::start(scratch.path(), NOBODY);
    let output = primed.ask(&["status"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with(&format!("primed {}\n", env!("CARGO_PKG_VERSION"))));
    assert!(text.contains(NOBODY) && text.contains("idle"), "{text}");
}
