//! Checks of the kernel and how it is set: what primed can see of other processes, and what actions
//! can be shut in with.

use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use super::{Finding, Surroundings};
use crate::clock;
use crate::local_socket::credentials;
use crate::workspace::process::Process;

/// Fewer open files than this are soon used up by a build.
const MIN_DESCRIPTORS: u64 = 4096;
/// Fewer watches than this do not cover a source tree.
const MIN_WATCHES: u64 = 8192;
/// No clock that was ever set shows an earlier time: 2024, in milliseconds since 1970.
const EARLIEST: i64 = 1_704_067_200_000;

/// Whether the processes of clients can be seen: where they run, and when they end.
pub fn processes(surroundings: &Surroundings) -> Vec<Finding> {
    let mounts = surroundings.read("self/mounts").unwrap_or_default();
    let hidden = mounts.lines().any(|line| {
        let mut words = line.split(' ').skip(1);
        let (place, kind, options) = (words.next(), words.next(), words.next());
        let hides = |option: &str| {
            option
                .strip_prefix("hidepid=")
                .is_some_and(|value| !["0", "off"].contains(&value))
        };
        (place, kind) == (Some("/proc"), Some("proc"))
            && options.unwrap_or_default().split(',').any(hides)
    });
    if hidden && !surroundings.is_root() {
        return vec![Finding::warning(
            "kernel",
            "/proc hides other users' processes (hidepid): of their clients primed sees no workspace",
            "run primed as the user who builds, or mount /proc with gid= of a group that primed is in",
        )];
    }
    let me = i32::try_from(std::process::id())
        .ok()
        .and_then(Process::find);
    let watched = me.map(|me| me.watch().map(drop));
    vec![match watched {
        Some(Ok(())) => Finding::ok("kernel", "processes can be seen, and their ends waited for"),
        Some(Err(error)) => Finding::warning(
            "kernel",
            format!("the end of a process cannot be waited for (pidfd): {error}"),
            "use Linux 5.3 or later, and a container that lets pidfd_open through; builds end by \
             silence without it",
        ),
        None => Finding::error(
            "kernel",
            "/proc cannot be read, so primed does not know where clients run",
            "mount it: mount -t proc proc /proc",
        ),
    }]
}

/// Whether it is known who connects.
pub fn peers(_: &Surroundings) -> Vec<Finding> {
    let known = UnixStream::pair().and_then(|(near, _far)| credentials(&near));
    vec![match known {
        Ok((Some(_), _)) => Finding::ok("kernel", "it is known which process connects"),
        Ok((None, _)) => Finding::warning(
            "kernel",
            "the processes that connect cannot be named here: they are in another PID namespace",
            "run primed in the PID namespace of its clients",
        ),
        Err(error) => Finding::error(
            "kernel",
            format!("it cannot be known who connects (SO_PEERCRED): {error}"),
            "use a kernel that can tell",
        ),
    }]
}

/// Whether the embedded backend can shut its actions in.
pub fn sandbox(surroundings: &Surroundings) -> Vec<Finding> {
    let Some(program) = surroundings.find("bwrap") else {
        return vec![Finding::warning(
            "sandbox",
            "there is no bubblewrap (bwrap) on PATH: actions that primed executes itself can see \
             all files",
            "Debian has it in the package bubblewrap; other backends need none",
        )];
    };
    let mut command = Command::new(&program);
    let tried = command
        .args([
            "--ro-bind",
            "/",
            "/",
            "--unshare-pid",
            "--die-with-parent",
            "true",
        ])
        .stdin(Stdio::null())
        .output();
    let refused = |reason: String| {
        Finding::warning(
            "sandbox",
            format!("bubblewrap cannot make a sandbox here: {reason}"),
            "allow user namespaces: sysctl user.max_user_namespaces, \
             kernel.unprivileged_userns_clone=1 or kernel.apparmor_restrict_unprivileged_userns=0",
        )
    };
    vec![match tried {
        Ok(output) if output.status.success() => Finding::ok(
            "sandbox",
            format!("bubblewrap works: {}", program.display()),
        ),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            refused(said.lines().next().unwrap_or("it says nothing").to_owned())
        }
        Err(error) => refused(error.to_string()),
    }]
}

/// Whether a source tree can be watched.
pub fn watches(surroundings: &Surroundings) -> Vec<Finding> {
    let limit = surroundings.read("sys/fs/inotify/max_user_watches");
    let limit = limit.and_then(|limit| limit.trim().parse::<u64>().ok());
    match limit {
        Some(limit) if limit < MIN_WATCHES => vec![Finding::warning(
            "kernel",
            format!("only {limit} directories can be watched for changes"),
            "sysctl fs.inotify.max_user_watches=65536",
        )],
        _ => Vec::new(),
    }
}

/// Whether there are enough descriptors for the clients of a large build.
pub fn descriptors(surroundings: &Surroundings) -> Vec<Finding> {
    let limits = surroundings.read("self/limits").unwrap_or_default();
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    // Soft and hard; primed raises the one to the other.
    let hard = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    match hard {
        Some(hard) if hard < MIN_DESCRIPTORS => vec![Finding::warning(
            "kernel",
            format!(
                "only {hard} files may be open at once, which limits how many clients are served"
            ),
            "raise the hard limit: ulimit -Hn, LimitNOFILE= in the unit, or limits.conf",
        )],
        _ => Vec::new(),
    }
}

/// Whether the clock has been set.
pub fn clock(_: &Surroundings) -> Vec<Finding> {
    finding_of_time(clock::now_unix_ms())
}

fn finding_of_time(now_unix_ms: i64) -> Vec<Finding> {
    match now_unix_ms < EARLIEST {
        true => vec![Finding::error(
            "clock",
            "the clock of this machine has not been set",
            "set it: timedatectl set-ntp true",
        )],
        false => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::tests::{assert_finds, bare};
    use super::*;
    use std::path::Path;

    fn with(directory: &Path, file: &str, content: &str) -> Surroundings {
        let path = directory.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
        let mut surroundings = bare(&[]);
        surroundings.proc = directory.to_owned();
        surroundings
    }

    #[tokio::test]
    async fn what_this_machine_shows_of_processes_is_enough() {
        assert_finds(&processes(&bare(&[])), Verdict::Ok, "ends", "");
        assert_finds(&peers(&bare(&[])), Verdict::Ok, "which process", "");
    }

    #[tokio::test]
    async fn processes_that_are_hidden_matter_to_all_but_root() {
        let scratch = tempfile::tempdir().unwrap();
        let mounts = "proc /proc proc rw,nosuid,hidepid=invisible 0 0\n";
        let surroundings = with(scratch.path(), "self/mounts", mounts);
        let found = processes(&surroundings);
        if surroundings.is_root() {
            assert_finds(&found, Verdict::Ok, "ends", "");
        } else {
            assert_finds(&found, Verdict::Warning, "hidepid", "gid=");
        }
    }

    #[test]
    fn limits_that_are_too_low_are_found_with_how_to_raise_them() {
        let scratch = tempfile::tempdir().unwrap();
        let low = with(scratch.path(), "sys/fs/inotify/max_user_watches", "128\n");
        assert_finds(&watches(&low), Verdict::Warning, "128", "sysctl");
        let limits = "Limit  Soft Hard\nMax open files            256    1024   files\n";
        let low = with(scratch.path(), "self/limits", limits);
        assert_finds(&descriptors(&low), Verdict::Warning, "1024", "LimitNOFILE");
        assert_finds(&finding_of_time(0), Verdict::Error, "clock", "timedatectl");
        assert!(finding_of_time(EARLIEST).is_empty());
    }

    #[test]
    fn a_sandbox_that_is_absent_or_does_not_work_is_found() {
        let absent = bare(&[("PATH", "/nonexistent")]);
        assert_finds(
            &sandbox(&absent),
            Verdict::Warning,
            "no bubblewrap",
            "package",
        );
        let scratch = tempfile::tempdir().unwrap();
        let program = scratch.path().join("bwrap");
        std::fs::write(&program, "#!/bin/sh\necho not permitted >&2; exit 1\n").unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&program, executable).unwrap();
        let broken = bare(&[("PATH", scratch.path().to_str().unwrap())]);
        let found = sandbox(&broken);
        assert_finds(&found, Verdict::Warning, "not permitted", "user namespaces");
    }
}
