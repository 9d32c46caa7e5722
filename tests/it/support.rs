//! What the tests share: the real tools, daemons that end with the test, and a C project.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How long anything here may take before the test fails.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// How often a condition is looked at that nothing announces.
const PAUSE: Duration = Duration::from_millis(10);

/// A real tool, installed by `scripts/tools`. Fails loudly where it is not installed.
pub fn tool(name: &str) -> PathBuf {
    installed("recc", &format!("bin/{name}"))
}

/// What `scripts/tools SET` installs at `path`. Fails loudly where it is not installed.
pub fn installed(set: &str, path: &str) -> PathBuf {
    let path = tools().join(path);
    assert!(
        path.exists(),
        "{} is missing: run `scripts/tools {set}` first, or `scripts/test`, which does",
        path.display()
    );
    path
}

/// Where `scripts/tools` installs.
pub fn tools() -> PathBuf {
    match std::env::var_os("PRIMED_TOOLS") {
        Some(path) => path.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools"),
    }
}

/// `make`: the machine's own, or the one that `scripts/tools` installs where there is none.
pub fn make() -> PathBuf {
    let installed = tools().join("bin/make");
    if installed.exists() {
        installed
    } else {
        "make".into()
    }
}

/// Waits for a condition that nothing announces.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "{what}: not after {PATIENCE:?}");
        #[allow(
            clippy::disallowed_methods,
            reason = "between two looks at a condition"
        )]
        std::thread::sleep(PAUSE);
    }
}

/// A process that is killed when the test ends.
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command`; both of its outputs go to `log`.
    pub fn start(command: &mut Command, log: PathBuf) -> Self {
        let file = File::create(&log).unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Daemon { child, log }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap()).into_owned()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// The most memory that it has had so far, in bytes.
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let peak = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB"));
        peak.unwrap().trim().parse::<u64>().unwrap() * 1024
    }

    /// The port that a primed chose for its listener at `scheme`127.0.0.1.
    pub fn port(&self, scheme: &str) -> u16 {
        let address = format!("address={scheme}127.0.0.1:");
        let mut port = None;
        wait_until("primed says which port it chose", || {
            let log = self.log();
            let said = log.lines().find_map(|line| line.split_once(&address));
            port = said.and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
            port.is_some()
        });
        port.unwrap()
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits until it has ended, and returns its exit code.
    pub fn exit_code(&mut self) -> Option<i32> {
        wait_until("the process ends", || !self.is_running());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.log.display(), self.log());
        }
    }
}

/// A buildbox-casd that executes locally.
pub struct Casd {
    pub daemon: Daemon,
    socket: PathBuf,
}

impl Casd {
    pub fn start(directory: &Path, jobs: usize) -> Self {
        Casd::start_with(directory, jobs, &[])
    }

    /// One that keeps what it is asked for and passes on what it has not to `remote`.
    pub fn proxy_of(directory: &Path, remote: &str) -> Self {
        let remote = |service: &str| format!("--{service}-remote={remote}");
        let remotes = [remote("cas"), remote("ac"), remote("exec")];
        Casd::start_with(directory, 1, &remotes.each_ref().map(String::as_str))
    }

    pub fn start_with(directory: &Path, jobs: usize, arguments: &[&str]) -> Self {
        let socket = directory.join("casd.sock");
        let mut command = Command::new(tool("buildbox-casd"));
        command
            .env("BUILDBOX_STAGER", "copy-or-link")
            .arg(format!(
                "--buildbox-run={}",
                tool("buildbox-run-hosttools").display()
            ))
            .arg(format!("--jobs={jobs}"))
            .args(arguments)
            .arg("--bind")
            .arg(format!("unix:{}", socket.display()))
            .arg(directory.join("casd"));
        let mut daemon = Daemon::start(&mut command, directory.join("casd.log"));
        wait_until("casd listens", || {
            assert!(daemon.is_running(), "casd ended: {}", daemon.log());
            connects(&socket)
        });
        Casd { daemon, socket }
    }

    pub fn address(&self) -> String {
        format!("unix:{}", self.socket.display())
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Kills it and starts it again, with its cache, or with an empty one.
    pub fn restart(&mut self, directory: &Path, jobs: usize, keep_cache: bool) {
        self.daemon.kill();
        if self.socket.exists() {
            std::fs::remove_file(&self.socket).unwrap();
        }
        if !keep_cache {
            std::fs::remove_dir_all(directory.join("casd")).unwrap();
        }
        *self = Casd::start(directory, jobs);
    }
}

/// Whether somebody listens on `socket`.
pub fn connects(socket: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(socket).is_ok()
}

/// The primed under test.
pub struct Primed {
    pub daemon: Daemon,
    pub directory: PathBuf,
}

impl Primed {
    /// Starts primed in `directory`, in front of `upstream`.
    pub fn start(directory: &Path, upstream: &str) -> Self {
        Primed::start_with(directory, upstream, &[])
    }

    pub fn start_with(directory: &Path, upstream: &str, arguments: &[&str]) -> Self {
        Primed::start_by(Primed::command(), directory, upstream, arguments)
    }

    /// The same by a command that has more in its environment.
    pub fn start_by(
        mut command: Command,
        directory: &Path,
        upstream: &str,
        arguments: &[&str],
    ) -> Self {
        command
            .args(["serve", "--upstream", upstream])
            .args(["--log-level", "primed=debug"])
            .args(arguments)
            .env(
                "PRIMED_LISTEN",
                format!("unix:{}/primed.sock", directory.display()),
            )
            .env(
                "PRIMED_ADMIN",
                format!("unix:{}/admin.sock", directory.display()),
            )
            .env("PRIMED_STATE_DIR", directory.join("state"));
        let daemon = Daemon::start(&mut command, directory.join("primed.log"));
        let mut primed = Primed {
            daemon,
            directory: directory.to_owned(),
        };
        let admin = directory.join("admin.sock");
        wait_until("primed listens", || {
            assert!(
                primed.daemon.is_running(),
                "primed ended: {}",
                primed.daemon.log()
            );
            connects(&admin)
        });
        primed
    }

    /// Starts one that is its own backend.
    pub fn embedded(directory: &Path, arguments: &[&str]) -> Self {
        let cache = directory.join("cache");
        let own = ["--cache-dir", cache.to_str().unwrap()];
        Primed::start_with(directory, "embedded", &[&own[..], arguments].concat())
    }

    /// The command under test, with nothing set in its environment and no configuration file.
    pub fn command() -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_primed"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PRIMED_") {
                command.env_remove(name);
            }
        }
        command.env("PRIMED_CONFIG", "none");
        command
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.join("primed.sock")
    }

    pub fn address(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    /// The port that it chose, where it was told to listen on `127.0.0.1:0` too.
    pub fn port(&self) -> u16 {
        self.daemon.port("")
    }

    /// Runs `primed COMMAND`, which asks this primed.
    pub fn ask(&self, arguments: &[&str]) -> Output {
        Primed::command()
            .args(arguments)
            .arg("--admin")
            .arg(format!("unix:{}/admin.sock", self.directory.display()))
            .output()
            .unwrap()
    }

    /// Waits until all is quiet.
    pub fn wait(&self) {
        let output = self.ask(&["wait", "--timeout", "60"]);
        assert!(output.status.success(), "{output:?}\n{}", self.daemon.log());
    }

    pub fn status(&self) -> Value {
        let output = self.ask(&["status", "--json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Whether nothing is executed ahead of time, and nothing waits for that.
    pub fn is_idle(&self) -> bool {
        let speculation = &self.status()["speculation"];
        [&speculation["queued"], &speculation["running"]] == [0, 0]
    }

    /// Stops it in good order and starts it again.
    pub fn restart(self, upstream: &str) -> Self {
        self.restart_with(upstream, &[])
    }

    pub fn restart_with(self, upstream: &str, arguments: &[&str]) -> Self {
        let Primed {
            mut daemon,
            directory,
        } = self;
        daemon.signal(rustix::process::Signal::TERM);
        assert_eq!(daemon.exit_code(), Some(0), "{}", daemon.log());
        Primed::start_with(&directory, upstream, arguments)
    }
}

/// How one build was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub asked: u64,
    pub cached: u64,
    pub hit: u64,
    pub joined: u64,
    pub missed: u64,
    pub primed: u64,
    pub used: u64,
}

impl Counts {
    /// The newest build of `status`.
    pub fn newest(status: &Value) -> Self {
        Counts::of(&status["builds"][0])
    }

    /// One of the builds of a status.
    pub fn of(build: &Value) -> Self {
        let count = |name: &str| {
            build[name]
                .as_u64()
                .unwrap_or_else(|| panic!("the build has no {name}: {build}"))
        };
        Counts {
            asked: count("asked"),
            cached: count("cached"),
            hit: count("hit"),
            joined: count("joined"),
            missed: count("missed"),
            primed: count("primed"),
            used: count("used"),
        }
    }
}

/// A directory for one test. Short, because socket paths must be.
pub fn scratch() -> TempDir {
    tempfile::Builder::new()
        .prefix("primed")
        .tempdir_in("/tmp")
        .unwrap()
}

/// The lines that `reader` gives, as long as it gives any.
pub fn lines(reader: impl std::io::Read) -> impl Iterator<Item = String> {
    BufReader::new(reader).lines().map_while(Result::ok)
}
