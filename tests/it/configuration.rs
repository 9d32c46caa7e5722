//! `primed.toml` and `primed config`: what a file sets, what outweighs it, and what is said where
//! it is wrong. Completions and manual pages, which are made of the same definition.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::support::{Daemon, Primed, connects, scratch, wait_until};

/// A user whose directories are all in `home`, and whom nobody has configured.
fn user(home: &Path) -> Command {
    let mut command = Primed::command();
    for variable in [
        "XDG_STATE_HOME",
        "XDG_DATA_HOME",
        "XDG_CONFIG_HOME",
        "PRIMED_CONFIG",
    ] {
        command.env_remove(variable);
    }
    command
        .env("HOME", home)
        .env("XDG_RUNTIME_DIR", home.join("run"))
        .env("XDG_CONFIG_DIRS", home.join("xdg"));
    command
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What `primed config --json` says of serve: value and origin of each key.
fn settings(command: &mut Command) -> BTreeMap<String, (Value, String)> {
    let output = command.args(["config", "--json"]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let page: Value = serde_json::from_slice(&output.stdout).unwrap();
    let settings = page["commands"][0]["settings"].as_array().unwrap();
    let setting = |one: &Value| {
        let from = one["from"].as_str().unwrap();
        let place = one["place"].as_str().unwrap_or_default();
        let key = one["key"].as_str().unwrap().to_owned();
        (key, (one["value"].clone(), format!("{from} {place}")))
    };
    settings.iter().map(setting).collect()
}

#[test]
fn flags_outweigh_variables_which_outweigh_the_users_file_and_that_the_machines() {
    let scratch = scratch();
    let home = scratch.path();
    let at = |name: &str| format!("unix:{}", home.join(name).display());
    write(
        &home.join(".config/primed/primed.toml"),
        "listen = ['unix:~/a.sock', 'unix:b.sock']\nstate-dir = '~/state'\nupstream = \
         'unix:/nowhere/file.sock'\nmax-streams = 7\n[status]\njson = true\n",
    );
    write(
        &home.join("xdg/primed/primed.toml"),
        "max-streams = 8\nlog-format = 'json'\nadmin = 'unix:~/admin.sock'\nmode = 'prime-only'\n",
    );
    let mut serve = user(home);
    serve
        .env("PRIMED_UPSTREAM", "unix:/nowhere/variable.sock")
        .env("PRIMED_MODE", "none")
        .args(["serve", "--mode", "full"]);
    let mut daemon = Daemon::start(&mut serve, home.join("log"));
    wait_until("primed listens", || {
        assert!(daemon.is_running(), "{}", daemon.log());
        connects(&home.join("admin.sock"))
    });
    assert!(connects(&home.join("a.sock")), "~/ is the user's");
    assert!(
        connects(&home.join(".config/primed/b.sock")),
        "the file's directory"
    );
    // Nothing is typed: where it is asked and how it answers stand in the files.
    let output = user(home).arg("status").output().unwrap();
    let page: Value = serde_json::from_slice(&output.stdout).expect("json, as its table says");
    assert_eq!(page["upstream"]["address"], "unix:/nowhere/variable.sock");
    // It has answered, so it has started altogether.
    assert!(home.join("state").is_dir());
    assert!(daemon.log().starts_with('{'), "{}", daemon.log());

    let mut command = user(home);
    command.env("PRIMED_UPSTREAM", "unix:/nowhere/variable.sock");
    let settings = settings(&mut command);
    let file = home.join(".config/primed/primed.toml");
    let machines = home.join("xdg/primed/primed.toml");
    let expected = |value: Value, from: String| (value, from);
    for (key, setting) in [
        (
            "upstream",
            expected(
                "unix:/nowhere/variable.sock".into(),
                "environment PRIMED_UPSTREAM".into(),
            ),
        ),
        (
            "max-streams",
            expected("7".into(), format!("file {}:4:15", file.display())),
        ),
        (
            "mode",
            expected(
                "prime-only".into(),
                format!("file {}:4:8", machines.display()),
            ),
        ),
        (
            "admin",
            expected(
                at("admin.sock").into(),
                format!("file {}:3:9", machines.display()),
            ),
        ),
        ("keep-alive", expected("20".into(), "default ".into())),
        ("compat", expected(Value::Null, "default ".into())),
    ] {
        assert_eq!(settings[key], setting, "{key}");
    }
}

#[test]
fn a_variable_outweighs_a_switch_of_the_file_and_one_that_cannot_be_used_is_named() {
    let scratch = scratch();
    let home = scratch.path();
    write(&home.join(".config/primed/primed.toml"), "share = true\n");
    let mut command = user(home);
    assert_eq!(settings(&mut command)["share"].0, Value::Bool(true));
    let mut command = user(home);
    command.env("PRIMED_SHARE", "false");
    let off = (Value::Bool(false), "environment PRIMED_SHARE".to_owned());
    assert_eq!(settings(&mut command)["share"], off);
    let mut command = user(home);
    let output = command
        .env("PRIMED_MODE", "ful")
        .arg("config")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(64));
    assert!(
        output.stdout.is_empty() && said(&output).contains("--mode"),
        "{output:?}"
    );
}

#[test]
fn what_config_prints_can_be_used_as_the_file() {
    let scratch = scratch();
    let home = scratch.path();
    let first = home.join("first.toml");
    write(
        &first,
        "upstream = \"unix:/a \\\"b\\\"\\u007f\"\nlisten = ['127.0.0.1:8980', 'systemd']\nshare = \
         true\nconnect-wait = 2.5\nmax-speculative = 0x10\nallow-uid = [1, 2]\nmap-instance = \
         'a=b,=c'\nlog-level = 'primed=debug'\n[wait]\ntimeout = 60\n",
    );
    let config = |file: &Path| {
        let output = user(home)
            .args(["config", "--config"])
            .arg(file)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let printed = config(&first);
    let second = home.join("second.toml");
    write(&second, &printed);
    let values = |text: &str| {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(values(&config(&second)), values(&printed));
    for line in [
        "upstream = \"unix:/a \\\"b\\\"\\u007f\"",
        "listen = [\"127.0.0.1:8980\", \"systemd\"]",
        "share = true",
        "connect-wait = 2.5",
        "max-speculative = 16",
        "allow-uid = [1, 2]",
        "map-instance = [\"a=b\", \"=c\"]",
        "[wait]",
        "timeout = 60",
    ] {
        assert!(printed.lines().any(|one| one == line), "{line}: {printed}");
    }
    let place = format!("# {}:3:9\nshare = true", first.display());
    assert!(printed.contains(&place), "{printed}");
}

#[test]
fn secrets_are_not_shown_wherever_they_come_from() {
    let scratch = scratch();
    let home = scratch.path();
    let file = home.join("primed.toml");
    let headers = "authorization: Bearer s3cret\nx-key=s3cret\ns3cret";
    for (text, variable) in [
        (format!("upstream-header = '''{headers}'''\n"), None),
        (
            format!(
                "upstream-header = {:?}\n",
                headers.lines().collect::<Vec<_>>()
            ),
            None,
        ),
        (String::new(), Some(headers)),
    ] {
        write(&file, &text);
        for more in [&[][..], &["--json"]] {
            let mut command = user(home);
            command.args(["config", "--config"]).arg(&file).args(more);
            if let Some(headers) = variable {
                command.env("PRIMED_UPSTREAM_HEADER", headers);
            }
            let output = command.output().unwrap();
            let shown = String::from_utf8_lossy(&output.stdout);
            assert!(
                shown.contains("authorization: …") && shown.contains("x-key: …"),
                "{shown}"
            );
            assert!(!shown.contains("s3cret"), "{shown}");
        }
    }
    for text in [
        "upstream-header = [['s3cret']]",
        "upstream-header = s3cret",
        "upstream-header = true",
    ] {
        write(&file, text);
        let output = user(home)
            .args(["serve", "--config"])
            .arg(&file)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(64));
        assert!(!said(&output).contains("s3cret"), "{}", said(&output));
    }
}

#[test]
fn what_is_wrong_in_a_file_is_named_by_its_place_with_a_hint() {
    let scratch = scratch();
    let file = scratch.path().join("primed.toml");
    for (text, command, at, words) in [
        (
            "\nupstrem = 1",
            "serve",
            "2:1",
            &["upstrem", "did you mean upstream?"][..],
        ),
        (
            "max_streams = 1",
            "status",
            "1:1",
            &["did you mean max-streams?"],
        ),
        (
            "[sevre]\na = 1",
            "status",
            "1:2",
            &["did you mean [serve]?"],
        ),
        ("[upstream]", "serve", "1:2", &["flag", "upstream = "]),
        ("status = 1", "serve", "1:1", &["[status]"]),
        (
            "[wait]\n mode = 'full'",
            "serve",
            "2:2",
            &["primed wait has no --mode", "serve"],
        ),
        (
            "[wait]\ntimout = 1",
            "serve",
            "2:1",
            &["did you mean timeout?"],
        ),
        ("xyzzy = 1", "serve", "1:1", &["xyzzy", "primed config"]),
        ("config = 'a'", "serve", "1:1", &["config"]),
        (
            "mode = 'ful'",
            "serve",
            "1:8",
            &["'ful'", "prime-only", "full"],
        ),
        (
            "mode = ['full']",
            "serve",
            "1:8",
            &["mode", "MODE", "not a list"],
        ),
        ("share = 'yes'", "serve", "1:9", &["share", "true or false"]),
        ("listen = true", "serve", "1:10", &["listen", "ADDR"]),
        (
            "listen = ['nowhere']",
            "serve",
            "1:10",
            &["nowhere", "unix:PATH"],
        ),
        ("max-streams = 0", "serve", "1:15", &["'0'", "max-streams"]),
        (
            "busy-poll = 10001",
            "serve",
            "1:13",
            &["'10001'", "busy-poll", "0..=10000"],
        ),
        (
            "max-streams = 1.5",
            "serve",
            "1:15",
            &["'1.5'", "max-streams"],
        ),
        ("connect-wait = -1", "serve", "1:16", &["'-1'", "seconds"]),
        (
            "upstream = 1979-05-27",
            "serve",
            "1:12",
            &["ADDR", "not a date"],
        ),
        ("a = 'x", "serve", "1:7", &[]),
        (
            "mode = 'full'\nmode = 'none'",
            "serve",
            "2:1",
            &["duplicate"],
        ),
    ] {
        write(&file, text);
        let output = user(scratch.path())
            .args([command, "--config"])
            .arg(&file)
            .output()
            .unwrap();
        let said = said(&output);
        assert_eq!(output.status.code(), Some(64), "{text}: {said}");
        let place = format!("primed: {}:{at}: ", file.display());
        assert!(said.starts_with(&place), "{text}: {said}");
        assert_eq!(said.lines().count(), 1, "{text}: {said}");
        for word in words {
            assert!(said.contains(word), "{text}: '{word}' is not in: {said}");
        }
    }
    // What only goes wrong together names both: the flag, and where it stands.
    write(&file, "upstream = 'unix:/a'\n\ntls-cert = '/c'\n");
    let output = user(scratch.path())
        .args(["serve", "--config"])
        .arg(&file)
        .output()
        .unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(64));
    let place = format!("--tls-cert stands in {}:3:1", file.display());
    assert!(
        said.contains("--tls-key") && said.contains(&place),
        "{said}"
    );
}

#[test]
fn a_file_that_cannot_be_read_is_named_and_one_that_was_asked_for_must_be_there() {
    let scratch = scratch();
    let home = scratch.path();
    let own = home.join(".config/primed/primed.toml");
    let status = |config: Option<&Path>| {
        let mut command = user(home);
        command.arg("status");
        if let Some(config) = config {
            command.env("PRIMED_CONFIG", config);
        }
        command.output().unwrap()
    };
    let missing = home.join("missing.toml");
    let output = status(Some(&missing));
    assert_eq!(output.status.code(), Some(64));
    let named = missing.display().to_string();
    assert!(said(&output).contains(&named) && said(&output).contains("--config none"));
    // Nobody is there to answer, which is another matter.
    assert_eq!(status(None).status.code(), Some(1));
    std::fs::create_dir_all(&own).unwrap();
    let output = status(None);
    assert_eq!(output.status.code(), Some(64));
    assert!(said(&output).contains("primed.toml"), "{}", said(&output));
    assert_eq!(status(Some(Path::new("none"))).status.code(), Some(1));
    std::fs::remove_dir(&own).unwrap();
    std::fs::write(&own, b"mode = '\xff'").unwrap();
    let output = status(None);
    assert!(said(&output).contains("UTF-8"), "{}", said(&output));
    // Shells ask for completions while they start.
    let completions = user(home).args(["completions", "bash"]).output().unwrap();
    assert!(completions.status.success());
}

#[test]
fn bash_completes_commands_and_flags() {
    let scratch = scratch();
    let complete = |words: &[&str]| {
        let script = r#"
            eval "$("$PRIMED" completions bash)"
            COMP_WORDS=(primed "$@"); COMP_CWORD=$#
            _primed primed "${!#}" "${COMP_WORDS[COMP_CWORD - 1]}"
            printf '%s\n' "${COMPREPLY[@]}""#;
        let output = user(scratch.path())
            .get_envs()
            .fold(
                &mut Command::new("bash"),
                |bash, (name, value)| match value {
                    Some(value) => bash.env(name, value),
                    None => bash.env_remove(name),
                },
            )
            .env("PRIMED", Primed::command().get_program())
            .args(["--norc", "-c", script, "bash"])
            .args(words)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(complete(&["serv"]), "serve\n");
    assert_eq!(complete(&["serve", "--max-spec"]), "--max-speculative\n");
    assert_eq!(complete(&["serve", "--mode", "prime"]), "prime-only\n");
}

#[test]
fn there_is_a_manual_page_for_each_command_with_all_its_flags() {
    let scratch = scratch();
    let pages = scratch.path().join("man");
    let output = user(scratch.path())
        .args(["man", "--dir"])
        .arg(&pages)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    for (page, words) in [
        (
            "primed.1",
            &[".TH primed 1", "primed\\-serve(1)", "\\-\\-config"][..],
        ),
        (
            "primed-serve.1",
            &[".TH primed-serve 1", "\\-\\-upstream", "PRIMED_UPSTREAM"],
        ),
        ("primed-wait.1", &["\\-\\-timeout"]),
    ] {
        let text = std::fs::read_to_string(pages.join(page)).unwrap();
        for word in words {
            assert!(text.contains(word), "{page}: {word}: {text}");
        }
    }
    let output = user(scratch.path())
        .args(["man", "serve"])
        .output()
        .unwrap();
    assert_eq!(
        output.stdout,
        std::fs::read(pages.join("primed-serve.1")).unwrap()
    );
    let output = user(scratch.path())
        .args(["man", "sreve"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(64), "{}", said(&output));
}
