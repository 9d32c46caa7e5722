//! The process between primed and the command of an action (`primed supervise`, which nobody calls
//! by hand): it starts the command, and is the ancestor that all of the command's processes fall
//! back to, whatever group or session they have moved to. So when it ends, they have ended. It
//! kills them when the command is over, and when primed closes its standard input, be it because
//! time is up or because primed itself was killed.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, BufRead, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, getpid};
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};

/// How often processes are collected that ended while the command goes on.
const COLLECT: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};
/// What the shell says of a command that is not there, or cannot be run.
pub const NOT_FOUND: i32 = 127;
/// See `NOT_FOUND`.
pub const NOT_EXECUTABLE: i32 = 126;

/// What to run. One line of JSON, on standard input.
#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    /// The program, and its arguments.
    pub arguments: Vec<String>,
    /// The whole environment.
    pub environment: Vec<(String, String)>,
    /// Where it runs.
    pub directory: PathBuf,
    /// Where its standard output goes.
    pub stdout: PathBuf,
    /// Where its standard error goes.
    pub stderr: PathBuf,
    /// Whether the program sees to it that the command has no rights that it should not have.
    pub confined: bool,
}

/// How it ended. One line of JSON, on standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// With this code.
    Exited(i32),
    /// By this signal.
    Signalled(i32),
}

/// Runs what it is ordered to run, to the end of all its processes.
///
/// # Errors
/// What the system said, when that is not possible.
pub fn supervise() -> io::Result<()> {
    rustix::process::set_child_subreaper(Some(getpid()))?;
    // What is written with it must not depend on who has started primed.
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    let mut order = String::new();
    let stdin = io::stdin();
    stdin.lock().read_line(&mut order)?;
    let order: Order = serde_json::from_str(&order)?;
    let end = run(&order, &stdin)?;
    let report = serde_json::to_string(&end)?;
    writeln!(io::stdout(), "{report}")
}

fn run(order: &Order, stdin: &io::Stdin) -> io::Result<End> {
    let stdout = File::create(&order.stdout)?;
    let mut stderr = File::create(&order.stderr)?;
    let Some((program, arguments)) = order.arguments.split_first() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    if !order.confined {
        give_up_rights()?;
    }
    let started = Command::new(program)
        .args(arguments)
        .env_clear()
        .envs(order.environment.iter().map(|(name, value)| (name, value)))
        .current_dir(&order.directory)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr.try_clone()?)
        .process_group(0)
        .spawn();
    let command = match started {
        Ok(child) => Pid::from_child(&child),
        Err(error) => {
            writeln!(stderr, "{}", cannot_run(program, &error))?;
            let is_absent = error.kind() == io::ErrorKind::NotFound;
            return Ok(End::Exited(match is_absent {
                true => NOT_FOUND,
                false => NOT_EXECUTABLE,
            }));
        }
    };
    let mut family = Family { command, end: None };
    let ended = rustix::process::pidfd_open(command, PidfdFlags::empty())?;
    loop {
        let mut watched = [
            PollFd::new(stdin, PollFlags::IN),
            PollFd::new(&ended, PollFlags::IN),
        ];
        match poll(&mut watched, Some(&COLLECT)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => break,
            Err(error) => return Err(error.into()),
        }
        family.collect()?;
        if family.end.is_some() {
            break;
        }
    }
    family.end()?;
    // All have ended, so the command has.
    family.end.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// What the command's standard error says of a program that does not start.
pub fn cannot_run(program: &str, error: &io::Error) -> String {
    format!("primed: {program} cannot be run: {error}")
}

/// Lets nothing that is started from here gain rights, or, as root, write to files that are
/// read-only: inputs are links to the cache.
fn give_up_rights() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    if rustix::process::geteuid().is_root() {
        rustix::thread::remove_capability_from_bounding_set(CapabilitySet::DAC_OVERRIDE).or_else(
            |error| match error {
                // A root without that right has not got the other one either, or not to give up.
                Errno::PERM => Ok(()),
                error => Err(error),
            },
        )?;
    }
    Ok(())
}

/// The command, and all that it has started.
struct Family {
    command: Pid,
    end: Option<End>,
}

impl Family {
    /// Takes note of those who have ended. Returns whether there are others.
    fn collect(&mut self) -> io::Result<bool> {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.note(pid, status),
                Ok(None) => return Ok(true),
                Err(Errno::CHILD) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn note(&mut self, pid: Pid, status: WaitStatus) {
        if pid != self.command {
            return;
        }
        self.end = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Some(End::Exited(code)),
            (None, Some(signal)) => Some(End::Signalled(signal)),
            (None, None) => None,
        };
    }

    /// Kills those who are left, and waits until none are.
    fn end(&mut self) -> io::Result<()> {
        while self.collect()? {
            kill_descendants()?;
            match rustix::process::wait(WaitOptions::empty()) {
                Ok(Some((pid, status))) => self.note(pid, status),
                Ok(None) | Err(Errno::INTR | Errno::CHILD) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Kills all descendants of this process. They are stopped first, for who is stopped starts no others.
fn kill_descendants() -> io::Result<()> {
    let mut stopped = HashSet::new();
    loop {
        let found = descendants()?;
        let fresh: Vec<Pid> = found
            .into_iter()
            .filter(|pid| stopped.insert(*pid))
            .collect();
        if fresh.is_empty() {
            break;
        }
        for pid in fresh {
            signal(pid, Signal::STOP);
        }
    }
    for pid in stopped {
        signal(pid, Signal::KILL);
    }
    Ok(())
}

/// One that has ended meanwhile needs no signal; its id is taken by no other before it is collected.
fn signal(pid: Pid, signal: Signal) {
    let _ = rustix::process::kill_process(pid, signal);
}

fn descendants() -> io::Result<Vec<Pid>> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if let Some(parent) = parent(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = Vec::new();
    let mut parents = vec![getpid().as_raw_nonzero().get()];
    while let Some(parent) = parents.pop() {
        let below = children.remove(&parent).unwrap_or_default();
        found.extend(below.iter().copied().filter_map(Pid::from_raw));
        parents.extend(below);
    }
    Ok(found)
}

/// The parent of a process that has not ended; of a zombie too, whose children may be left to it
/// while it has other threads.
fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may hold anything; then state and parent.
    let (_, after) = stat.rsplit_once(')')?;
    after.split_ascii_whitespace().nth(1)?.parse().ok()
}
