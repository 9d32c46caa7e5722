//! Processes of local clients, read from `/proc`: which build tool a compiler wrapper works for,
//! where it runs, and when it ends.

use std::hash::{Hash, Hasher};
use std::io;
use std::path::PathBuf;

use rustix::process::{Pid, PidfdFlags};
use tokio::net::unix::pipe::Receiver;

/// Names of programs that run builds. The topmost of them below the user's shell is the one that
/// a build belongs to. Matched against the kernel's name of a process, 15 bytes long.
const BUILD_TOOLS: &[&str] = &[
    "make",
    "gmake",
    "ninja",
    "ninja-build",
    "samu",
    "siso",
    "cmake",
    "ctest",
    "meson",
    "scons",
    "b2",
    "bjam",
    "xmake",
    "just",
    "tup",
    "redo",
    "waf",
    "buck2",
    "gn",
    "emake",
    "remake",
    "bmake",
];

/// Shells, which tools put between themselves and what they run.
const SHELLS: &[&str] = &[
    "sh", "bash", "dash", "zsh", "ksh", "mksh", "busybox", "fish",
];

/// No real process tree is deeper.
const MAX_ANCESTORS: usize = 64;

/// A process, distinguished from a later one that has the same id.
#[derive(Clone, Debug)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since the machine booted.
    pub started: u64,
    /// The kernel's name of it, up to 15 bytes.
    pub name: String,
    parent: i32,
    session: i32,
}

impl PartialEq for Process {
    /// The name and the parent of a process may change while it lives.
    fn eq(&self, other: &Self) -> bool {
        (self.pid, self.started) == (other.pid, other.started)
    }
}

impl Eq for Process {}

impl Hash for Process {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.pid, self.started).hash(state);
    }
}

impl Process {
    /// Looks `pid` up, some microseconds; `None` if there is no such process.
    pub fn find(pid: i32) -> Option<Self> {
        let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
        parse_stat(pid, &stat)
    }

    /// Its working directory, as this process can reach it.
    pub fn working_directory(&self) -> Option<PathBuf> {
        link(self.pid, "cwd")
    }

    /// The root of its file system, as this process can reach it: `/` but for a process in a chroot.
    pub fn file_system_root(&self) -> Option<PathBuf> {
        link(self.pid, "root")
    }

    /// Something to wait for until it ends. Call it on a runtime.
    ///
    /// # Errors
    /// What the system said; `NotFound` if it has ended already.
    pub fn watch(&self) -> io::Result<ProcessEnd> {
        let pid = Pid::from_raw(self.pid).ok_or(io::ErrorKind::InvalidInput)?;
        let descriptor = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)?;
        // The id may have gone to another process before the descriptor was opened.
        if self.is_alive() {
            // A pidfd is no pipe, but becomes readable like one; tokio's own `AsyncFd` can only
            // be made with unsafe code.
            Receiver::from_owned_fd_unchecked(descriptor).map(ProcessEnd)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    /// Whether `other` started it.
    pub fn is_child_of(&self, other: &Process) -> bool {
        self.parent == other.pid
    }

    /// Whether it is `other`, or `other` is above it. Some microseconds for each ancestor.
    pub fn descends_from(&self, other: &Process) -> bool {
        let mut process = self.clone();
        for _ in 0..MAX_ANCESTORS {
            if process == *other {
                return true;
            }
            match Process::find(process.parent) {
                Some(above) => process = above,
                None => break,
            }
        }
        false
    }

    /// Whose it is.
    pub fn uid(&self) -> Option<u32> {
        use std::os::unix::fs::MetadataExt;
        let metadata = std::fs::metadata(format!("/proc/{}", self.pid)).ok()?;
        Some(metadata.uid())
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        Process::find(self.pid).is_some_and(|now| now.started == self.started)
    }

    fn is_build_tool(&self) -> bool {
        BUILD_TOOLS.contains(&self.name.as_str())
    }

    fn is_session_leader(&self) -> bool {
        self.session == self.pid
    }

    fn is_shell(&self) -> bool {
        SHELLS.contains(&self.name.as_str())
    }
}

/// The end of a process, by its pidfd.
pub struct ProcessEnd(Receiver);

impl ProcessEnd {
    /// Waits until the process has ended. An error is taken to mean the same.
    pub async fn wait(&self) {
        let _ = self.0.readable().await;
    }
}

/// The kernel's name of process `pid`.
pub fn name(pid: i32) -> Option<String> {
    Process::find(pid).map(|process| process.name)
}

/// A process and where it runs, as it was while it lived.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The process.
    pub process: Process,
    /// Its working directory.
    pub working_directory: Option<PathBuf>,
}

/// A client, and whom it works for.
#[derive(Clone, Debug)]
pub struct Lineage {
    /// The client itself.
    pub client: Seen,
    /// The root of its file system.
    pub file_system_root: PathBuf,
    /// The process that its build belongs to.
    pub build_tool: Option<Seen>,
}

impl Lineage {
    /// Looks at `client` and at what is above it: some tens of microseconds.
    pub fn of(client: Process) -> Self {
        let root = client.file_system_root();
        Lineage {
            file_system_root: root.unwrap_or_else(|| PathBuf::from("/")),
            build_tool: topmost_build_tool(&client).map(Seen::from),
            client: Seen::from(client),
        }
    }
}

impl From<Process> for Seen {
    fn from(process: Process) -> Self {
        Seen {
            working_directory: process.working_directory(),
            process,
        }
    }
}

/// The process that a build of `client` belongs to: the nearest build tool at or above it (there
/// may be wrappers between: `ccache`, `timeout`), and from there the topmost one, with nothing but
/// build tools and shells between. What lies above the user's login shell is no concern of a build.
fn topmost_build_tool(client: &Process) -> Option<Process> {
    let mut topmost = None;
    let mut process = client.clone();
    for _ in 0..MAX_ANCESTORS {
        if process.is_build_tool() {
            topmost = Some(process.clone());
        } else if process.is_session_leader() || topmost.is_some() && !process.is_shell() {
            break;
        }
        process = match Process::find(process.parent) {
            Some(above) => above,
            None => break,
        };
    }
    topmost
}

fn link(pid: i32, name: &str) -> Option<PathBuf> {
    let target = std::fs::read_link(format!("/proc/{pid}/{name}")).ok()?;
    // In another mount namespace the kernel may have no path to give; and a removed directory
    // is shown with a suffix.
    let text = target.to_string_lossy();
    (target.is_absolute() && !text.ends_with(" (deleted)")).then_some(target)
}

/// Reads `/proc/PID/stat`: the name stands in parentheses and may hold any byte, so the fields
/// are counted from the last one.
fn parse_stat(pid: i32, stat: &[u8]) -> Option<Process> {
    let text = String::from_utf8_lossy(stat);
    let (before, after) = text.rsplit_once(')')?;
    let (_, name) = before.split_once('(')?;
    let mut fields = after.split_ascii_whitespace();
    let state = fields.next()?;
    // A zombie has ended.
    if state == "Z" || state == "X" {
        return None;
    }
    Some(Process {
        pid,
        name: name.to_owned(),
        parent: fields.next()?.parse().ok()?,
        session: fields.nth(1)?.parse().ok()?,
        // Field 22 of the line; the session is field 6.
        started: fields.nth(15)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_spaces_and_parentheses_are_read() {
        let stat = b"12 (a ) b) S 7 12 12 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 9 9";
        let process = parse_stat(12, stat).unwrap();
        assert_eq!(process.name, "a ) b");
        assert_eq!((process.parent, process.session), (7, 12));
        assert!(process.is_session_leader());
        assert_eq!(process.started, 4242);
        assert_eq!(parse_stat(12, b"12 (gone) Z 7"), None);
        assert_eq!(parse_stat(12, b""), None);
    }

    #[tokio::test]
    async fn this_process_is_found_alive_with_its_directory() {
        let me = Process::find(std::process::id() as i32).unwrap();
        assert!(me.is_alive());
        assert_eq!(me.working_directory(), std::env::current_dir().ok());
        assert_eq!(me.file_system_root(), Some(PathBuf::from("/")));
        assert!(me.watch().is_ok());
    }

    #[tokio::test]
    async fn the_end_of_a_process_is_noticed() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let process = Process::find(child.id() as i32).unwrap();
        let me = Process::find(std::process::id() as i32).unwrap();
        assert!(process.descends_from(&me) && !me.descends_from(&process));
        let end = process.watch().unwrap();
        assert!(process.is_alive());
        drop(child.stdin.take());
        end.wait().await;
        assert!(!process.is_alive(), "a zombie has ended");
        child.wait().unwrap();
        assert!(process.watch().is_err());
    }
}
