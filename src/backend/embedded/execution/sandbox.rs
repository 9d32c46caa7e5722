//! What a command can see and touch. With bubblewrap: the machine's files read-only, its input root
//! under a name that is the same each time, a `/tmp` of its own, no other processes, no network
//! unless it is asked for, and nothing of the cache. Without: whatever primed's user can.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use super::action::Assignment;
use super::staging::Stage;
use super::supervisor::{NOT_EXECUTABLE, NOT_FOUND, Order, cannot_run};
use crate::config::embedded::SandboxMode;

/// Where a command in a sandbox sees its input root.
const ROOT: &str = "/primed";
/// What it does not see as it is.
const REPLACED: &[&str] = &["/proc", "/dev", "/tmp", "/run", ROOT];
/// Where some systems keep their programs, below what is hidden.
const PROGRAMS_IN_RUN: &[&str] = &["/run/current-system", "/run/opengl-driver"];
/// What is needed of it to look up names of hosts.
const RESOLVER: &str = "/run/systemd/resolve";
/// Where programs are looked for without a `PATH`.
const DEFAULT_PATH: &str = "/bin:/usr/bin";
/// bubblewrap's command.
const BUBBLEWRAP: &str = "bwrap";

/// bubblewrap was asked for, and does not work.
#[derive(Debug, thiserror::Error)]
#[error("--sandbox bubblewrap: {0}")]
pub struct SandboxError(String);

/// How commands are run.
#[derive(Debug)]
pub enum Sandbox {
    /// As any process.
    Open,
    /// In a sandbox.
    Bubblewrap(Bubblewrap),
}

/// The sandbox, but for what differs from action to action.
#[derive(Debug)]
pub struct Bubblewrap {
    program: PathBuf,
    arguments: Vec<String>,
    /// Hidden from commands.
    cache: Option<PathBuf>,
}

impl Sandbox {
    /// Finds out what works here, and says so. Commands see nothing of `cache`. Blocks.
    ///
    /// # Errors
    /// `SandboxError`, when bubblewrap is asked for and does not work.
    pub fn find(mode: SandboxMode, cache: &Path) -> Result<Self, SandboxError> {
        if mode == SandboxMode::None {
            tracing::info!("actions run without a sandbox, as --sandbox none says");
            return Ok(Sandbox::Open);
        }
        match Bubblewrap::find(cache) {
            Ok(bubblewrap) => {
                let program = bubblewrap.program.display();
                tracing::info!(%program, "actions run in a sandbox of bubblewrap");
                Ok(Sandbox::Bubblewrap(bubblewrap))
            }
            Err(reason) if mode == SandboxMode::Bubblewrap => Err(SandboxError(reason)),
            Err(reason) => {
                tracing::warn!("actions run without a sandbox: {reason}");
                Ok(Sandbox::Open)
            }
        }
    }

    /// What it takes to run `assignment` on `stage`.
    pub fn order(&self, assignment: &Assignment, stage: &Stage) -> Order {
        let directory = stage.root().join(&assignment.working_directory);
        let (stdout, stderr) = (stage.stdout(), stage.stderr());
        match self {
            Sandbox::Open => Order {
                arguments: assignment.arguments.clone(),
                environment: assignment.environment.clone(),
                directory,
                stdout,
                stderr,
                confined: false,
            },
            // It must not be governed by the command's own environment.
            Sandbox::Bubblewrap(bubblewrap) => Order {
                arguments: bubblewrap.command(assignment, stage),
                environment: Vec::new(),
                directory: "/".into(),
                stdout,
                stderr,
                confined: true,
            },
        }
    }

    /// Whether the program of `assignment` is absent, or cannot be run: the exit code and the
    /// message that say so. Outside of a sandbox, starting it tells. Blocks.
    pub fn refuse(&self, assignment: &Assignment, stage: &Stage) -> Option<(i32, String)> {
        if matches!(self, Sandbox::Open) {
            return None;
        }
        let program = assignment.arguments.first()?;
        let directory = Path::new(ROOT).join(&assignment.working_directory);
        let places = match program.contains('/') {
            true => vec![directory.join(program)],
            false => {
                let mut variables = assignment.environment.iter();
                let path = variables.find(|(name, _)| name == "PATH");
                let path = path.map_or(DEFAULT_PATH, |(_, value)| value);
                let folders = path.split(':');
                folders
                    .map(|folder| directory.join(folder).join(program))
                    .collect()
            }
        };
        let mut refusal = (NOT_FOUND, io::ErrorKind::NotFound);
        for place in places {
            // /tmp is its own, and empty.
            let seen = match place.strip_prefix(ROOT) {
                Ok(below) => stage.root().join(below),
                Err(_) => place,
            };
            match fs::symlink_metadata(&seen) {
                // Where a symlink leads, the sandbox will see.
                Ok(file) if file.is_symlink() => return None,
                Ok(file) if file.is_file() && file.permissions().mode() & 0o111 != 0 => {
                    return None;
                }
                Ok(_) => refusal = (NOT_EXECUTABLE, io::ErrorKind::PermissionDenied),
                Err(_) => {}
            }
        }
        let (code, kind) = refusal;
        Some((code, cannot_run(program, &kind.into())))
    }
}

impl Bubblewrap {
    fn find(cache: &Path) -> Result<Self, String> {
        let path = std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
        let mut places = std::env::split_paths(&path).map(|folder| folder.join(BUBBLEWRAP));
        let program = places.find(|place| place.is_file()).ok_or(
            "bubblewrap is not installed; apt-get install bubblewrap, or say --sandbox none",
        )?;
        let cache = fs::canonicalize(cache).map_err(|error| error.to_string())?;
        let is_seen = !REPLACED.iter().any(|place| cache.starts_with(place));
        let cache = is_seen.then_some(cache);
        let mut refusal = String::new();
        // Root in a container is no root, and needs a namespace of users to be one.
        for more in [None, Some("--unshare-user")] {
            let mut arguments = fixed_arguments().map_err(|error| error.to_string())?;
            arguments.extend(more.map(str::to_owned));
            let bubblewrap = Bubblewrap {
                program: program.clone(),
                arguments,
                cache: cache.clone(),
            };
            match bubblewrap.try_out() {
                Ok(()) => return Ok(bubblewrap),
                Err(error) => refusal = error,
            }
        }
        Err(format!(
            "{} does not work here ({refusal}); it needs user namespaces \
             (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces, and in a container \
             --privileged); or say --sandbox none",
            program.display()
        ))
    }

    /// Runs something harmless with all that commands will be run with.
    fn try_out(&self) -> Result<(), String> {
        let temporary = std::env::temp_dir();
        let mut arguments = self.places(&temporary, &temporary, Path::new(""), false);
        arguments.push("--".to_owned());
        let output = Command::new(&self.program)
            .args(&self.arguments)
            .args(arguments)
            .arg(&self.program)
            .arg("--version")
            .env_clear()
            .current_dir("/")
            .output()
            .map_err(|error| error.to_string())?;
        match output.status.success() {
            true => Ok(()),
            false => {
                let said = String::from_utf8_lossy(&output.stderr);
                Err(said
                    .lines()
                    .next()
                    .unwrap_or("it fails in silence")
                    .to_owned())
            }
        }
    }

    fn command(&self, assignment: &Assignment, stage: &Stage) -> Vec<String> {
        let mut command = vec![text(&self.program)];
        command.extend_from_slice(&self.arguments);
        command.extend(self.places(
            &stage.root(),
            &stage.temporary(),
            &assignment.working_directory,
            assignment.network,
        ));
        for (name, value) in &assignment.environment {
            command.extend(["--setenv".to_owned(), name.clone(), value.clone()]);
        }
        command.push("--".to_owned());
        command.extend_from_slice(&assignment.arguments);
        command
    }

    /// What differs from action to action.
    fn places(
        &self,
        root: &Path,
        temporary: &Path,
        working_directory: &Path,
        network: bool,
    ) -> Vec<String> {
        let mut arguments = Vec::new();
        let mut say =
            |words: &[&str]| arguments.extend(words.iter().map(|word| (*word).to_owned()));
        match network {
            true => say(&["--ro-bind-try", RESOLVER, RESOLVER]),
            false => say(&["--unshare-net"]),
        }
        if let Some(cache) = &self.cache {
            say(&["--tmpfs", &text(cache)]);
        }
        let temporary = text(temporary);
        say(&["--bind", &temporary, "/tmp"]);
        if Path::new("/var/tmp").is_dir() {
            say(&["--bind", &temporary, "/var/tmp"]);
        }
        let directory = Path::new(ROOT).join(working_directory);
        say(&["--bind", &text(root), ROOT, "--remount-ro", "/"]);
        say(&["--chdir", &text(&directory)]);
        arguments
    }
}

/// What is the same for all actions: namespaces, and the machine's files, read-only.
fn fixed_arguments() -> io::Result<Vec<String>> {
    let mut arguments: Vec<String> = [
        "--unshare-pid",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
        "--die-with-parent",
        "--new-session",
        "--hostname",
        "primed",
        // Root, too, must not write to inputs: they are links to the cache.
        "--cap-drop",
        "ALL",
    ]
    .map(str::to_owned)
    .into();
    let mut say = |words: &[&str]| arguments.extend(words.iter().map(|word| (*word).to_owned()));
    for entry in fs::read_dir("/")? {
        let entry = entry?;
        let path = text(&entry.path());
        if REPLACED.contains(&path.as_str()) {
            continue;
        }
        match entry.file_type()?.is_symlink() {
            true => say(&["--symlink", &text(&fs::read_link(&path)?), &path]),
            false => say(&["--ro-bind-try", &path, &path]),
        }
    }
    for path in PROGRAMS_IN_RUN {
        say(&["--ro-bind-try", path, path]);
    }
    say(&["--dir", "/run", "--proc", "/proc", "--dev", "/dev"]);
    Ok(arguments)
}

/// The paths here are primed's own, or of the machine's top level; one that is no UTF-8 is lost there.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
