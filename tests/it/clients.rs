//! Real builds by each client that can be had, directly and through primed: they end alike, write
//! the same files, and the same actions are executed and cached.
//!
//! All build the program in `clients/project`. Its compiler is a script that notes where it runs,
//! so what a backend executed is counted without asking anyone.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

mod bazel;
mod buildstream;
mod justbuild;
mod recc;
mod siso;
mod trexe;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};

use primed::cas::Digest;
use tempfile::TempDir;

use crate::grpcio::Grpcio;
use crate::support::{Casd, Daemon, Primed, installed, make, scratch, wait_until};

/// How often the compiler runs for the whole program: four units and the link.
const COMPILES: usize = 5;

/// Where a client sends its calls.
#[derive(Clone, Debug)]
struct Server {
    /// A Unix socket where there is one, else what `port` says.
    address: String,
    /// On the loopback device.
    port: u16,
}

impl Server {
    /// For clients that know of hosts and ports only.
    fn host_and_port(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

/// A client's build: runs it in the site's project, and says how it went.
type Client = fn(&Site, &Server) -> Built;

/// How a build went.
struct Built {
    exit_code: Option<i32>,
    /// All that it said.
    said: String,
    reported: Reported,
    /// What it wrote, by path.
    outputs: BTreeMap<String, Digest>,
}

/// Actions, by what somebody says of them.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Reported {
    executed: usize,
    cached: usize,
}

/// What is compared of a build that must succeed.
#[derive(Debug, PartialEq)]
struct Observed {
    exit_code: Option<i32>,
    reported: Reported,
    outputs: BTreeMap<String, Digest>,
    /// How often the compiler ran in the backend.
    compiles: usize,
}

/// What is compared of one that must fail: which other actions it still comes to is chance.
#[derive(Debug, PartialEq)]
struct Failed {
    exit_code: Option<i32>,
    /// Whether the compiler's own words reach the user.
    tells_why: bool,
}

/// Three builds, each from nothing local: with nothing cached, with everything, and of a program
/// with an error in it.
#[derive(Debug, PartialEq)]
struct Builds {
    cold: Observed,
    cached: Observed,
    broken: Failed,
}

/// A folder for one client.
struct Site {
    directory: TempDir,
    /// The compiler's note of where it ran.
    note: PathBuf,
    started: Cell<usize>,
}

impl Site {
    fn create() -> Self {
        let directory = scratch();
        let note = directory.path().join("compiled");
        std::fs::write(&note, "").unwrap();
        let compiler = directory.path().join("cc");
        let script = format!(
            "#!/bin/sh\npwd -P >>'{}'\nPATH='{}' exec cc \"$@\"\n",
            note.display(),
            path_variable(),
        );
        std::fs::write(&compiler, script).unwrap();
        std::fs::set_permissions(&compiler, PermissionsExt::from_mode(0o755)).unwrap();
        Site {
            directory,
            note,
            started: Cell::new(0),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The compiler that the project names.
    fn compiler(&self) -> PathBuf {
        self.path("cc")
    }

    /// How often the compiler has run below `directory`.
    fn compiles_below(&self, directory: &Path) -> usize {
        let note = std::fs::read_to_string(&self.note).unwrap();
        let below = |line: &&str| Path::new(line).starts_with(directory);
        note.lines().filter(below).count()
    }

    /// Puts a fresh project in the place of what the last build left, and an empty home.
    fn clear(&self) {
        for name in ["project", "home"] {
            if self.path(name).exists() {
                std::fs::remove_dir_all(self.path(name)).unwrap();
            }
            std::fs::create_dir(self.path(name)).unwrap();
        }
        let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/clients/project");
        copy(
            &project,
            &self.path("project"),
            self.compiler().to_str().unwrap(),
        );
    }

    /// A command in the project, with nothing of the tester's environment but the `PATH`.
    fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command
            .current_dir(self.path("project"))
            .env_clear()
            .env("PATH", path_variable())
            .env("HOME", self.path("home"));
        command
    }

    /// Runs a command to its end. Returns its exit code and all that it said.
    fn run(&self, command: &mut Command) -> (Option<i32>, String) {
        let number = self.started.replace(self.started.get() + 1);
        let log = self.path(&format!("{number}.log"));
        let mut process = Daemon::start(command, log);
        (process.exit_code(), process.log())
    }

    /// The build's outputs in `directory`, by the `names` that are there.
    fn outputs(&self, directory: &str, names: &[&str]) -> BTreeMap<String, Digest> {
        let directory = self.path("project").join(directory);
        let read = |name: &&str| {
            let content = std::fs::read(directory.join(name)).ok()?;
            Some(((*name).to_owned(), Digest::of(&content)))
        };
        names.iter().filter_map(read).collect()
    }

    /// Builds by way of `server`, in front of the backend that executes below `directory`.
    fn builds(&self, client: Client, server: &Server, directory: &Path) -> Builds {
        let [cold, cached] = [(), ()].map(|()| {
            self.clear();
            let before = self.compiles_below(directory);
            let built = client(self, server);
            Observed {
                exit_code: built.exit_code,
                reported: built.reported,
                outputs: built.outputs,
                compiles: self.compiles_below(directory) - before,
            }
        });
        self.clear();
        let source = self.path("project/src/main.c");
        let text = std::fs::read_to_string(&source).unwrap();
        std::fs::write(&source, text + "#error broken on purpose\n").unwrap();
        let built = client(self, server);
        Builds {
            cold,
            cached,
            broken: Failed {
                exit_code: built.exit_code,
                tells_why: built.said.contains("error broken on purpose"),
            },
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for number in 0..self.started.get() {
            if std::thread::panicking() {
                let log = std::fs::read(self.path(&format!("{number}.log"))).unwrap_or_default();
                eprintln!("--- command {number}\n{}", String::from_utf8_lossy(&log));
            }
        }
    }
}

/// The servers behind primed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Backend {
    Casd,
    /// casd, for a client that would refuse it for its versions of the API: the way there leads
    /// through `widened.py`, and through `primed serve --compat bazel`.
    CasdForBazel,
    /// `justbuild execute`, with the arguments that go before its own.
    JustbuildExecute(&'static [&'static str]),
}

/// A backend that runs, with nothing cached.
struct Running {
    _daemons: Vec<Daemon>,
    /// For clients.
    server: Server,
    /// For primed.
    upstream: String,
}

impl Backend {
    fn start(self, directory: &Path) -> Running {
        std::fs::create_dir(directory).unwrap();
        let port = free_port();
        if let Backend::JustbuildExecute(arguments) = self {
            return justbuild::execute(directory, port, arguments);
        }
        let bind = format!("--bind=127.0.0.1:{port}");
        let casd = Casd::start_with(directory, 2, &[&bind]);
        let upstream = casd.address();
        let mut server = Server {
            address: casd.address(),
            port,
        };
        let mut daemons = vec![casd.daemon];
        if self == Backend::CasdForBazel {
            server.port = free_port();
            let mut command = Grpcio::Old.python("widened.py");
            command.args([&server.host_and_port(), &upstream]);
            let widened = Daemon::start(&mut command, directory.join("widened.log"));
            daemons.push(listens(widened, server.port));
        }
        Running {
            _daemons: daemons,
            server,
            upstream,
        }
    }

    fn primed_arguments(self) -> &'static [&'static str] {
        match self {
            Backend::CasdForBazel => &["--compat", "bazel"],
            _ => &[],
        }
    }
}

/// Builds directly and through primed, each time with a backend of its own, and holds both builds
/// of the whole program to the number of `actions` that they should take.
fn passes_as_directly(client: Client, backend: Backend, actions: usize) {
    let site = Site::create();
    let directory = site.path("direct");
    let running = backend.start(&directory);
    let direct = site.builds(client, &running.server, &directory);
    drop(running);

    let directory = site.path("behind");
    let running = backend.start(&directory);
    let place = site.path("primed");
    std::fs::create_dir(&place).unwrap();
    let port = free_port();
    let listen = format!("unix:{}/primed.sock,127.0.0.1:{port}", place.display());
    let mut arguments = vec!["--listen", &listen];
    arguments.extend(backend.primed_arguments());
    let primed = Primed::start_with(&place, &running.upstream, &arguments);
    let server = Server {
        address: primed.address(),
        port,
    };
    let through = site.builds(client, &server, &directory);

    assert_eq!(direct, through, "{}", primed.daemon.log());
    let Builds {
        cold,
        cached,
        broken,
    } = direct;
    assert_eq!((cold.exit_code, cached.exit_code), (Some(0), Some(0)));
    assert_eq!((cold.compiles, cached.compiles), (COMPILES, 0));
    let reported = |executed, cached| Reported { executed, cached };
    assert_eq!(cold.reported, reported(actions, 0));
    assert_eq!(cached.reported, reported(0, actions));
    assert!(cold.outputs.contains_key("program"));
    assert_eq!(cold.outputs, cached.outputs);
    assert!(broken.exit_code.is_some_and(|code| code != 0));
    assert!(broken.tells_why);
}

/// Copies a tree of text, with `compiler` for each `@CC@`.
fn copy(from: &Path, to: &Path, compiler: &str) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir(&to).unwrap();
            copy(&entry.path(), &to, compiler);
        } else {
            std::fs::copy(entry.path(), &to).unwrap(); // with its permissions
            let text = std::fs::read_to_string(&to).unwrap();
            std::fs::write(&to, text.replace("@CC@", compiler)).unwrap();
        }
    }
}

/// A client that `scripts/tools clients` installs.
fn tool(name: &str) -> PathBuf {
    installed("clients", &format!("clients/bin/{name}"))
}

/// Waits until `daemon` listens on `port`.
fn listens(mut daemon: Daemon, port: u16) -> Daemon {
    wait_until("it listens", || {
        assert!(daemon.is_running(), "it ended: {}", daemon.log());
        TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    daemon
}

/// A port that was free a moment ago, for casd cannot tell which one it chose. Not one of those
/// that the kernel gives to connections, and not one that this process has named before.
fn free_port() -> u16 {
    static NAMED: AtomicU16 = AtomicU16::new(0);
    let first = 10_000 + (std::process::id() % 100) as u16 * 200;
    let mut ports = std::iter::repeat_with(|| first + NAMED.fetch_add(1, Ordering::Relaxed) % 200);
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    ports.find(is_free).unwrap()
}

fn path_variable() -> String {
    std::env::var("PATH").unwrap()
}

/// The number that follows `before` in `text`, where it comes last.
fn number_after(text: &str, before: &str) -> Option<usize> {
    let (_, rest) = text.rsplit_once(before)?;
    let digits = rest.find(|c: char| !c.is_ascii_digit());
    rest[..digits.unwrap_or(rest.len())].parse().ok()
}
