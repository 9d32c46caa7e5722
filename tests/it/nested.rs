//! Real BuildStream, whose elements are built by primed's upstream, and compile there with recc
//! through the daemon that runs them: actions that have actions executed, all by way of primed.
//!
//!     bst ──► primed ──► backend ──► sandbox: make, recc ──► worker's casd ──► primed ──► backend
//!
//! Parents come to primed with no instance's name, and nested actions with `NX`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{Counts, Daemon, Primed, connects, installed, scratch, tools, wait_until};

/// How much the worker runs at once: all parents of a build, their nested actions, and what primed
/// executes ahead of time. A nested action that finds no room would wait for ever, for its parent
/// would.
const JOBS: usize = 16;
/// What an element's nested calls ask for: its units and the link.
const NESTED: u64 = UNITS.len() as u64 + 1;
const UNITS: [&str; 3] = ["one", "two", "three"];
/// `dep.bst`, `library.bst` and `program.bst`.
const PARENTS: u64 = 3;

/// How a dependency's header comes to a nested compile.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Headers {
    /// In its input tree, by an absolute path.
    InTree,
    /// In the root file system that it names by the platform property `chrootRootDigest`.
    InChroot,
}

/// Which casd the sandboxes talk to, in whose caches nested calls are looked up first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Worker {
    /// One beside the backend, as the workers of a cluster have. What was executed elsewhere is not
    /// in its caches, so primed sees each lookup.
    Apart,
    /// The backend itself, which sends nested calls back through primed. It knows the results of
    /// all that it executed: primed sees the lookups that miss, and of those that hit only that the
    /// outputs are looked for (`FindMissingBlobs`), which tells it of them.
    Backend,
}

/// A project, BuildStream to build it, primed, and casd.
pub struct Stage {
    pub primed: Primed,
    _casds: Vec<Daemon>,
    directory: TempDir,
}

impl Stage {
    pub fn start(worker: Worker, headers: Headers) -> Self {
        let directory = scratch();
        let path = directory.path();
        write_project(&path.join("project"), headers);

        let address = |name: &str| format!("unix:{}/{name}.sock", path.display());
        let remotes = ["cas", "ac", "exec"]
            .map(|service| format!("--{service}-remote={}", address("primed")));
        let mut asks_primed = vec!["--proxy-instance=nested:NX"];
        asks_primed.extend(remotes.iter().map(String::as_str));
        let serves = ["--local-server-instance=", "--local-server-instance=NX"];

        let remote = match worker {
            Worker::Apart => address("worker"),
            Worker::Backend => address("backend"),
        };
        let run = path.join("run");
        write_runner(&run, &remote);
        let run = format!("--buildbox-run={}", run.display());
        let jobs = format!("--jobs={JOBS}");
        let executes = [&run, &jobs, "--runner-arg=--nested-instance=nested"];

        let start_primed = || Primed::start(path, &address("backend"));
        let (primed, casds) = match worker {
            Worker::Apart => {
                let backend = casd(path, "backend", &[&serves[..], &executes].concat());
                let primed = start_primed();
                let stands_for = ["--proxy-instance=", "--proxy-instance=NX:NX"];
                let worker = casd(path, "worker", &[&stands_for[..], &asks_primed].concat());
                (primed, vec![backend, worker])
            }
            Worker::Backend => {
                // A casd asks its remote for its capabilities before it listens. So that primed can
                // answer for a backend that is not there yet, it must have been there once: one
                // that asks nobody, of which another casd wants to know by way of primed.
                let primed = start_primed();
                let backend = casd(path, "backend", &serves);
                drop(casd(path, "asking", &asks_primed));
                drop(backend);
                std::fs::remove_file(path.join("backend.sock")).unwrap();
                let all = [&serves[..], &executes, &asks_primed].concat();
                (primed, vec![casd(path, "backend", &all)])
            }
        };
        Stage {
            primed,
            _casds: casds,
            directory,
        }
    }

    /// Builds these elements, several at a time where they can be.
    pub fn build(&self, elements: &[&str]) {
        let arguments = ["--builders", "2", "build"];
        self.bst(&[&arguments, elements].concat());
    }

    /// What the program says that `element` and all that it needs installs.
    pub fn sum(&self, element: &str) -> i64 {
        let out = self.directory.path().join("out");
        if out.exists() {
            std::fs::remove_dir_all(&out).unwrap();
        }
        let to = out.to_str().unwrap();
        let arguments = ["artifact", "checkout", "--deps", "run", "--directory", to];
        self.bst(&[&arguments, &[element][..]].concat());
        // The program's loader and libraries are those of the sandbox.
        let output = Command::new(tool("bwrap"))
            .arg("--ro-bind")
            .arg(sysroot().join("usr"))
            .args(["/usr", "--symlink", "usr/lib", "/lib"])
            .args(["--symlink", "usr/lib64", "/lib64"])
            .args(["--ro-bind", to, "/out"])
            .args(["--setenv", "LD_LIBRARY_PATH", "/out/usr/lib"])
            .arg(format!("/out/usr/bin/{}", element.replace(".bst", "")))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        said.trim().parse().unwrap_or_else(|_| panic!("{output:?}"))
    }

    /// Changes the header that `dep.bst` installs.
    pub fn edit(&self, value: i64) {
        let header = self.directory.path().join("project/files/dep/dep.h");
        std::fs::write(header, format!("#define DEP {value}\n")).unwrap();
    }

    fn bst(&self, arguments: &[&str]) {
        let path = self.directory.path();
        let home = path.join("home").display().to_string();
        // By a Unix socket, so that primed knows when the client's process ends.
        let url = format!("{{ url: '{}' }}", self.primed.address());
        let settings = format!(
            "cachedir: {home}/cache\nlogdir: {home}/logs\nsourcedir: {home}/sources\n\
             remote-execution:\n  execution-service: {url}\n  storage-service: {url}\n  \
             action-cache-service: {url}\n"
        );
        std::fs::write(path.join("bst.conf"), settings).unwrap();
        let mut command = Command::new(tool("bst"));
        command
            .current_dir(path.join("project"))
            .env_clear()
            .env("PATH", path_variable())
            .env("HOME", home)
            .args(["--no-interactive", "--no-colors", "--config"])
            .arg(path.join("bst.conf"))
            .args(arguments);
        let mut process = Daemon::start(&mut command, path.join("bst.log"));
        assert_eq!(process.exit_code(), Some(0), "{arguments:?}");
    }

    /// All builds of `element`, the newest first: so many, and all that belongs to them has come.
    pub fn parents(&self, element: &str, number: i64) -> Vec<Built> {
        self.primed.wait();
        let status = self.primed.status();
        let place = format!("buildstream/nest/{element}");
        let is_of = |build: &&Value| {
            build["parent"] == "action" && build["label"].as_str().unwrap().contains(&place)
        };
        let builds = status["builds"].as_array().unwrap();
        let builds = builds.iter().filter(is_of).map(|build| Built {
            counts: Counts::of(build),
            started: build["started_unix_ms"].as_i64().unwrap(),
            ended: build["ended_unix_ms"].as_i64().unwrap(),
        });
        let builds: Vec<_> = builds.collect();
        assert_eq!(builds.len() as i64, number, "{element}: {status}");
        builds
    }

    /// How many actions primed has adapted so far.
    fn adapted(&self) -> u64 {
        let log = self.primed.daemon.log();
        let lines = log.lines().filter(|line| line.contains(" adapted "));
        let actions = lines.map(|line| line.rsplit_once("actions=").unwrap().1);
        actions.map(|actions| actions.parse::<u64>().unwrap()).sum()
    }

    /// What was asked for in all builds so far.
    pub fn asked(&self) -> u64 {
        let status = self.primed.status();
        let builds = status["builds"].as_array().unwrap();
        builds.iter().map(|build| Counts::of(build).asked).sum()
    }
}

/// A build of an element, as `primed status` shows it.
#[derive(Clone, Debug)]
pub struct Built {
    pub counts: Counts,
    /// Milliseconds since 1970.
    pub started: i64,
    pub ended: i64,
}

/// A casd that listens on `name`.sock in `directory`.
fn casd(directory: &Path, name: &str, arguments: &[&str]) -> Daemon {
    // Users that are not root would need a setuid fusermount3 for FUSE, and containers often have
    // no FUSE at all. Links work everywhere, but take up to three times as long.
    let fuse = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let stager = match fuse {
        Ok(_) if rustix::process::geteuid().is_root() => "fuse",
        _ => "copy-or-link",
    };
    let socket = directory.join(format!("{name}.sock"));
    let mut command = Command::new(tool("buildbox-casd"));
    command
        .env("PATH", path_variable())
        .env("BUILDBOX_STAGER", stager)
        .args(arguments)
        .arg(format!("--bind=unix:{}", socket.display()))
        .arg(directory.join(name));
    let mut daemon = Daemon::start(&mut command, directory.join(format!("{name}.log")));
    wait_until("casd listens", || {
        assert!(daemon.is_running(), "casd ended: {}", daemon.log());
        connects(&socket)
    });
    daemon
}

/// Writes a runner for casd that stages from, and sends nested calls to, the casd at `remote`: it
/// would be the casd that starts it.
fn write_runner(path: &Path, remote: &str) {
    let script = format!(
        "#!/bin/sh\n\
         for argument; do\n\
         shift\n\
         case $argument in --remote=*) argument='--remote={remote}' ;; esac\n\
         set -- \"$@\" \"$argument\"\n\
         done\n\
         exec '{}' \"$@\"\n",
        tool("buildbox-run").display(),
    );
    std::fs::write(path, script).unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
}

/// Writes the project: a file system with a compiler, `dep.bst`, which installs a header, and
/// elements that compile with recc: `library.bst`, `program.bst`, which links with that, and
/// `other.bst`, which does not need it.
fn write_project(directory: &Path, headers: Headers) {
    let write = |path: &str, text: &str| {
        let path = directory.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write(
        "project.conf",
        "name: nest\n\
         min-version: \"2.8\"\n\
         element-path: elements\n\
         environment: { PATH: /usr/bin }\n\
         sandbox: { remote-apis-socket: { path: /tmp/casd.sock } }\n",
    );
    let import = "kind: import\nsources: [{ kind: local, path: files/sysroot }]\n";
    write("elements/base.bst", import);
    link(&sysroot(), &directory.join("files/sysroot"));
    write("files/dep/dep.h", "#define DEP 1\n");
    write(
        "elements/dep.bst",
        "kind: manual\n\
         build-depends: [base.bst]\n\
         sources: [{ kind: local, path: files/dep }]\n\
         config:\n  install-commands:\n  \
         - mkdir -p %{install-root}/usr/include && cp dep.h %{install-root}/usr/include/\n",
    );

    let elements = [
        Element {
            name: "library",
            uses: &[],
            output: "usr/lib/libsum.so",
            flags: "-shared",
        },
        Element {
            name: "program",
            uses: &["library"],
            output: "usr/bin/program",
            flags: "-lsum",
        },
        Element {
            name: "other",
            uses: &[],
            output: "usr/bin/other",
            flags: "",
        },
    ];
    for element in &elements {
        let name = element.name;
        write(&format!("elements/{name}.bst"), &element.text(headers));
        write(&format!("files/{name}/Makefile"), &element.makefile());
        write(&format!("files/{name}/own.h"), "#define OWN 10\n");
        for unit in UNITS {
            let path = format!("files/{name}/{unit}.c");
            write(&path, &element.source(unit));
        }
    }
}

/// An element that compiles `UNITS` and links them.
struct Element {
    name: &'static str,
    /// The libraries that it links with.
    uses: &'static [&'static str],
    /// Where its output is installed.
    output: &'static str,
    /// For its link.
    flags: &'static str,
}

impl Element {
    fn text(&self, headers: Headers) -> String {
        let name = self.name;
        let (place, output) = self.output.rsplit_once('/').unwrap();
        let mut text = String::from("kind: manual\nbuild-depends:\n");
        for used in [&["base", "dep"], self.uses].concat() {
            writeln!(text, "- filename: {used}.bst").unwrap();
            if used == "base" || headers == Headers::InChroot {
                let variable = "RECC_REMOTE_PLATFORM_chrootRootDigest";
                writeln!(text, "  config: {{ digest-environment: {variable} }}").unwrap();
            }
        }
        for used in self.uses {
            writeln!(text, "runtime-depends: [{used}.bst]").unwrap();
        }
        writeln!(
            text,
            "sources: [{{ kind: local, path: files/{name} }}]\n\
             config:\n  \
             build-commands: [make]\n  \
             install-commands:\n  \
             - mkdir -p %{{install-root}}/{place} && cp {output} %{{install-root}}/{place}/\n\
             environment:\n  \
             CC: recc gcc\n  \
             RECC_SERVER: unix:/tmp/casd.sock\n  \
             RECC_LINK: \"1\""
        )
        .unwrap();
        if headers == Headers::InTree {
            writeln!(text, "  RECC_DEPS_GLOBAL_PATHS: \"1\"").unwrap();
        }
        text
    }

    fn makefile(&self) -> String {
        let (_, output) = self.output.rsplit_once('/').unwrap();
        let flags = self.flags;
        let objects = UNITS.map(|unit| format!("{unit}.o")).join(" ");
        format!(
            "{output}: {objects}\n\t$(CC) -o {output} {objects} {flags}\n\
             %.o: %.c own.h\n\t$(CC) -fPIC -O1 -c $< -o $@\n"
        )
    }

    /// The first unit of a program says the sum of all.
    fn source(&self, unit: &str) -> String {
        let name = self.name;
        let mut text = String::from("#include <dep.h>\n#include \"own.h\"\n");
        if unit != UNITS[0] || self.flags == "-shared" {
            writeln!(text, "int {name}_{unit}(void) {{ return DEP + OWN; }}").unwrap();
            return text;
        }
        let own = UNITS[1..].iter().map(|unit| format!("{name}_{unit}"));
        let used = self.uses.iter();
        let used = used.flat_map(|used| UNITS.map(|unit| format!("{used}_{unit}")));
        let mut sum = String::from("DEP + OWN");
        for function in own.chain(used) {
            writeln!(text, "int {function}(void);").unwrap();
            write!(sum, " + {function}()").unwrap();
        }
        let main = format!("int main(void) {{ printf(\"%d\\n\", {sum}); return 0; }}");
        writeln!(text, "#include <stdio.h>\n{main}").unwrap();
        text
    }
}

/// Puts links to all files of a tree into a new one, or copies on another file system.
fn link(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            link(&entry.path(), &to);
        } else if kind.is_symlink() {
            symlink(std::fs::read_link(entry.path()).unwrap(), to).unwrap();
        } else if std::fs::hard_link(entry.path(), &to).is_err() {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// The root file system of the sandboxes, before dependencies are added.
fn sysroot() -> PathBuf {
    installed("buildstream", "buildstream/sysroot")
}

/// A program that `scripts/tools buildstream` installs.
fn tool(name: &str) -> PathBuf {
    installed("buildstream", &format!("buildstream/bin/{name}"))
}

/// With buildbox-run, buildbox-fuse and bwrap, which casd and each other look for.
fn path_variable() -> String {
    let path = std::env::var("PATH").unwrap();
    format!("{}:{path}", tools().join("buildstream/bin").display())
}

/// What a program says when `dep.h` says `dep` and it is made of this many units.
fn sum_of(dep: i64, units: usize) -> i64 {
    units as i64 * (dep + 10)
}

/// Runs a test for each way to wire the casds, and each way for headers to come to a compile.
fn on_each_stage(test: impl Fn(Stage)) {
    for worker in [Worker::Apart, Worker::Backend] {
        for headers in [Headers::InTree, Headers::InChroot] {
            eprintln!("--- {worker:?}, {headers:?}"); // shown where the test fails
            test(Stage::start(worker, headers));
        }
    }
}

#[test]
fn elements_that_compile_by_nested_calls_are_built_and_their_calls_seen() {
    on_each_stage(|stage| {
        stage.build(&["program.bst"]);
        assert_eq!(stage.sum("program.bst"), sum_of(1, 6));
        // The taps are beside the calls.
        wait_until("all calls are counted", || {
            stage.asked() >= PARENTS + 2 * NESTED
        });
        assert_eq!(stage.asked(), PARENTS + 2 * NESTED);

        stage.edit(2);
        stage.build(&["program.bst"]);
        assert_eq!(stage.sum("program.bst"), sum_of(2, 6));
    });
}

#[test]
fn after_each_change_of_a_dependency_all_nested_calls_of_elements_are_primed() {
    on_each_stage(|stage| {
        stage.build(&["program.bst"]);
        for dep in 2..=3 {
            stage.primed.wait();
            stage.edit(dep);
            stage.build(&["program.bst"]);
            assert_eq!(stage.sum("program.bst"), sum_of(dep, 6));
            for element in ["library.bst", "program.bst"] {
                all_primed(&stage.parents(element, dep));
            }
        }
    });
}

#[test]
fn when_a_dependency_is_built_all_nested_calls_are_primed_of_elements_that_nobody_asked_for_yet() {
    on_each_stage(|stage| {
        stage.build(&["program.bst"]);
        for dep in 2..=3 {
            stage.primed.wait();
            let before = stage.adapted();
            stage.edit(dep);
            stage.build(&["dep.bst"]);
            stage.primed.wait();
            assert_eq!(stage.adapted() - before, 2 * NESTED);
            stage.build(&["program.bst"]);
            assert_eq!(stage.sum("program.bst"), sum_of(dep, 6));
            for element in ["library.bst", "program.bst"] {
                all_primed(&stage.parents(element, dep));
            }
            assert_eq!(stage.adapted() - before, 2 * NESTED, "as was foreseen");
            for element in ["library", "program"] {
                let recorded = format!("buildstream/nest/{element}.bst\" actions={NESTED} ");
                let recorded = stage.primed.daemon.log().matches(&recorded).count();
                assert_eq!(recorded as i64, dep, "{element}");
            }
        }
    });
}

#[test]
fn nested_calls_of_two_elements_at_a_time_are_primed_for_the_right_one() {
    on_each_stage(|stage| {
        let elements = ["library.bst", "other.bst"];
        stage.build(&elements);
        stage.primed.wait();
        stage.edit(2);
        stage.build(&elements);
        assert_eq!(stage.sum("other.bst"), sum_of(2, 3));
        let parents = elements.map(|element| stage.parents(element, 2));
        for builds in &parents {
            all_primed(builds);
        }
        let [library, other] = parents.map(|builds| builds[0].clone());
        let began = library.started.max(other.started);
        let ended = library.ended.min(other.ended);
        assert!(began < ended, "they were not built at the same time");
    });
}

/// The first of these builds of an element missed all its nested calls, and the last none.
fn all_primed(builds: &[Built]) {
    let [newest, .., first] = builds else {
        panic!("{builds:?}");
    };
    let counts = |built: &Built| {
        let Counts { hit, joined, .. } = built.counts;
        (built.counts.asked, hit + joined, built.counts.missed)
    };
    assert_eq!(counts(first), (NESTED, 0, NESTED), "{first:?}");
    assert_eq!(counts(newest), (NESTED, NESTED, 0), "{newest:?}");
}
