//! Checks of build clients: which there are, and what in their environment leads them past primed
//! or keeps results from being found.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{Finding, Surroundings};
use crate::address::Address;

/// How long recc may take to compile three words.
const PROBE: Duration = Duration::from_secs(30);

/// What keeps recc from using the cache, or from sending anything, and what it does.
const DEFEATERS: [(&str, &str); 7] = [
    ("RECC_PASSTHROUGH", "recc runs all commands by itself"),
    ("RECC_NO_EXECUTE", "recc runs nothing"),
    (
        "RECC_SKIP_CACHE",
        "recc looks nothing up, so no primed result is used",
    ),
    (
        "RECC_ACTION_UNCACHEABLE",
        "recc's results are not kept, so nothing can be primed",
    ),
    ("RECC_CACHE_ONLY", "recc has nothing executed remotely"),
    ("RECC_DONT_SAVE_OUTPUT", "recc writes no outputs"),
    (
        "RECC_PRESERVE_ENV",
        "the whole environment is part of each action, so that any change in it is a miss",
    ),
];

/// Whether recc is there.
pub fn recc(surroundings: &Surroundings) -> Vec<Finding> {
    vec![match surroundings.find("recc") {
        Some(path) => match version(&path) {
            Some(version) => Finding::ok("recc", format!("recc {version}: {}", path.display())),
            None => Finding::error(
                "recc",
                format!("{} does not say its version", path.display()),
                "run `recc --version` to see why; it may have been built for another system",
            ),
        },
        None => Finding::warning(
            "recc",
            "there is no recc on PATH, so `primed run --recc` does not work",
            "Debian has it in the package buildbox; other clients need none",
        ),
    }]
}

/// Whether buildbox-casd is there. It is only one of several backends.
pub fn casd(surroundings: &Surroundings) -> Vec<Finding> {
    vec![match surroundings.find("buildbox-casd") {
        Some(path) => match version(&path) {
            Some(version) => Finding::ok(
                "casd",
                format!("buildbox-casd {version}: {}", path.display()),
            ),
            None => Finding::warning(
                "casd",
                format!("{} does not say its version", path.display()),
                "run `buildbox-casd --version` to see why",
            ),
        },
        None => Finding::ok(
            "casd",
            "there is no buildbox-casd on PATH; none is needed unless it is to be the backend",
        ),
    }]
}

/// The last word of what `program --version` says first.
fn version(program: &Path) -> Option<String> {
    let mut command = Command::new(program);
    let output = command
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = if said.trim().is_empty() {
        String::from_utf8_lossy(&output.stderr).into_owned()
    } else {
        said
    };
    let word = said.lines().next()?.split_whitespace().last()?.to_owned();
    (output.status.success() && word.starts_with(|first: char| first.is_ascii_digit()))
        .then_some(word)
}

/// Whether recc is led to primed.
pub fn servers(surroundings: &Surroundings) -> Vec<Finding> {
    let Some(listen) = &surroundings.listen else {
        return Vec::new();
    };
    let is_primed = |text: &str| {
        text.parse::<Address>()
            .is_ok_and(|address| address == *listen)
    };
    let mut findings = vec![match surroundings.variable("RECC_SERVER") {
        None => Finding::ok(
            "RECC_SERVER",
            "it is not set; `primed run` sets it for its command",
        ),
        Some(server) if is_primed(server) => Finding::ok("RECC_SERVER", "it names primed"),
        Some(server) => Finding::warning(
            "RECC_SERVER",
            format!("it is {server}, which is not where primed listens by default ({listen})"),
            format!("export RECC_SERVER={listen}, or use `primed run`, which sets it"),
        ),
    }];
    for name in ["RECC_CAS_SERVER", "RECC_ACTION_CACHE_SERVER"] {
        if let Some(server) = surroundings.variable(name)
            && surroundings.variable("RECC_SERVER") != Some(server)
        {
            findings.push(Finding::warning(
                "RECC_SERVER",
                format!(
                    "{name} is {server}, another server than RECC_SERVER: calls go past primed"
                ),
                format!("unset {name}; where the backend has several endpoints, primed has flags"),
            ));
        }
    }
    findings
}

/// What keeps results from being found.
pub fn defeaters(surroundings: &Surroundings) -> Vec<Finding> {
    let set = |(name, _): &&(&str, &str)| surroundings.variable(name).is_some();
    let set = DEFEATERS.iter().filter(set);
    set.map(|(name, what)| {
        Finding::warning(
            "environment",
            format!("{name} is set: {what}"),
            format!("unset {name}"),
        )
    })
    .collect()
}

/// Compiler caches in front of recc.
pub fn wrappers(surroundings: &Surroundings) -> Vec<Finding> {
    let mut findings = Vec::new();
    for name in ["CC", "CXX"] {
        let Some(compiler) = surroundings.variable(name) else {
            continue;
        };
        let first = compiler.split_whitespace().next().unwrap_or_default();
        let first = Path::new(first).file_name().unwrap_or_default();
        if let Some(wrapper) = first.to_str()
            && ["ccache", "sccache", "distcc"].contains(&wrapper)
        {
            findings.push(Finding::warning(
                "environment",
                format!("{name} is '{compiler}': what {wrapper} answers, primed does not see"),
                format!(
                    "export {name}='recc {}', or use `primed run --recc`",
                    compiler.split_once(' ').map_or("cc", |(_, rest)| rest)
                ),
            ));
        }
    }
    findings
}

/// A time that is part of each action.
pub fn epoch(surroundings: &Surroundings) -> Vec<Finding> {
    let sent = surroundings
        .variable("RECC_REMOTE_ENV_SOURCE_DATE_EPOCH")
        .is_some();
    let read = surroundings
        .variable("RECC_ENV_TO_READ")
        .unwrap_or_default();
    let read = read
        .split(',')
        .any(|name| name.trim() == "SOURCE_DATE_EPOCH");
    let preserved = surroundings.variable("RECC_PRESERVE_ENV").is_some();
    let set = surroundings.variable("SOURCE_DATE_EPOCH").is_some();
    if sent || set && (read || preserved) {
        return vec![Finding::warning(
            "environment",
            "SOURCE_DATE_EPOCH is part of each action: when it changes, all are missed",
            "keep it the same from build to build, or leave it out of what recc sends",
        )];
    }
    Vec::new()
}

/// Whether recc works through the primed that runs.
pub async fn probe(surroundings: &Surroundings) -> Vec<Finding> {
    let (Some(_), Some(recc), Some(listen)) = (
        &surroundings.running,
        surroundings.find("recc"),
        &surroundings.listen,
    ) else {
        return Vec::new();
    };
    let Ok(directory) = tempfile::tempdir() else {
        return Vec::new();
    };
    let source = format!("int probe = {};\n", std::process::id());
    if std::fs::write(directory.path().join("probe.c"), source).is_err() {
        return Vec::new();
    }
    let mut command = tokio::process::Command::new(recc);
    for name in surroundings.variables.keys() {
        if name.starts_with("RECC_") {
            command.env_remove(name);
        }
    }
    let server = match listen {
        Address::Tcp { .. } => format!("http://{listen}"),
        other => other.to_string(),
    };
    command
        .args(["cc", "-c", "probe.c", "-o", "probe.o"])
        .env("RECC_SERVER", server)
        .current_dir(directory.path())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let failed = |reason: String| {
        Finding::error(
            "recc",
            format!("recc cannot compile through {listen}: {reason}"),
            "see what primed and the backend log; `cc` must be there where actions are executed",
        )
    };
    vec![match tokio::time::timeout(PROBE, command.output()).await {
        Err(_) => failed(format!("it has not ended after {PROBE:?}")),
        Ok(Err(error)) => failed(error.to_string()),
        Ok(Ok(output)) if output.status.success() && directory.path().join("probe.o").exists() => {
            Finding::ok("recc", format!("recc compiles through {listen}"))
        }
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().last().unwrap_or("it says nothing");
            failed(last.trim().to_owned())
        }
    }]
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::tests::{assert_finds, bare};
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_client_that_is_absent_or_broken_is_found_with_what_to_do() {
        let absent = bare(&[("PATH", "/nonexistent")]);
        assert_finds(&recc(&absent), Verdict::Warning, "no recc", "buildbox");
        assert_finds(&casd(&absent), Verdict::Ok, "none is needed", "");
        let scratch = tempfile::tempdir().unwrap();
        let install = |name: &str, script: &str| {
            let path = scratch.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        install("recc", "echo 'no such library' >&2; exit 1");
        install("buildbox-casd", "echo buildbox-casd 1.4.30");
        let there = bare(&[("PATH", scratch.path().to_str().unwrap())]);
        assert_finds(&recc(&there), Verdict::Error, "version", "recc --version");
        assert_finds(&casd(&there), Verdict::Ok, "1.4.30", "");
    }

    #[test]
    fn a_server_that_is_not_primed_is_found() {
        let ok = bare(&[("RECC_SERVER", "unix:///run/primed.sock")]);
        assert_finds(&servers(&ok), Verdict::Ok, "names primed", "");
        assert_finds(&servers(&bare(&[])), Verdict::Ok, "not set", "");
        let elsewhere = bare(&[("RECC_SERVER", "http://elsewhere:1")]);
        let hint = "export RECC_SERVER=unix:/run/primed.sock";
        assert_finds(&servers(&elsewhere), Verdict::Warning, "elsewhere", hint);
        let past = bare(&[("RECC_CAS_SERVER", "http://elsewhere:1")]);
        let found = servers(&past);
        let hint = "unset RECC_CAS_SERVER";
        assert_finds(&found[1..], Verdict::Warning, "past primed", hint);
    }

    #[test]
    fn variables_that_defeat_caching_are_found_one_by_one() {
        assert!(defeaters(&bare(&[("RECC_SKIP_CACHE", "")])).is_empty());
        for (name, _) in DEFEATERS {
            let found = defeaters(&bare(&[(name, "1")]));
            assert_finds(&found, Verdict::Warning, name, &format!("unset {name}"));
        }
        let cached = bare(&[("CC", "/usr/bin/ccache gcc"), ("CXX", "g++")]);
        let hint = "export CC='recc gcc'";
        assert_finds(&wrappers(&cached), Verdict::Warning, "ccache", hint);
        let date = ("SOURCE_DATE_EPOCH", "1");
        assert!(epoch(&bare(&[date])).is_empty(), "recc does not send it");
        for how in [
            ("RECC_ENV_TO_READ", "LANG,SOURCE_DATE_EPOCH"),
            ("RECC_PRESERVE_ENV", "1"),
            ("RECC_REMOTE_ENV_SOURCE_DATE_EPOCH", "1"),
        ] {
            let found = epoch(&bare(&[date, how]));
            assert_finds(&found, Verdict::Warning, "EPOCH", "the same");
        }
    }
}
