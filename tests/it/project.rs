//! A C program of many files that is built by `make` through recc.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::{Daemon, make, tool};

/// Translation units that include `common.h`; `main.c` comes on top of them and does not.
pub const UNITS: usize = 42;
/// Those among them that include `few.h`, which the Makefile generates from `few.in`.
pub const FEW: usize = 5;

/// How a build ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The program is there, and prints this.
    Built(i64),
    /// make failed because commands did, with these exit codes.
    Failed(BTreeSet<String>),
}

/// The project on disk, and how it is built.
pub struct Project {
    pub directory: PathBuf,
    environment: Vec<(String, String)>,
}

impl Project {
    /// Writes the project into `directory`; its clients talk to `server`.
    pub fn create(directory: &Path, server: &str) -> Self {
        Project::of_units(directory, server, UNITS)
    }

    /// The same with this many units, at least `FEW`.
    pub fn of_units(directory: &Path, server: &str, units: usize) -> Self {
        let directory = directory.join("project");
        std::fs::create_dir_all(directory.join("src")).unwrap();
        std::fs::create_dir_all(directory.join("include")).unwrap();
        let project = Project {
            directory,
            environment: vec![
                ("RECC_SERVER".to_owned(), server.to_owned()),
                ("RECC_LINK".to_owned(), "1".to_owned()),
            ],
        };
        project.write("include/common.h", "#define COMMON 1\n");
        project.write("few.in", "1\n");
        let mut main = String::new();
        let mut sum = String::from("0");
        for unit in 0..units {
            let include = if unit < FEW {
                "#include \"few.h\"\n"
            } else {
                "#define FEW 0\n"
            };
            let source = format!(
                "#include \"common.h\"\n{include}int unit{unit}(void) {{ return COMMON + FEW; }}\n"
            );
            project.write(&format!("src/unit{unit}.c"), &source);
            writeln!(main, "int unit{unit}(void);").unwrap();
            write!(sum, " + unit{unit}()").unwrap();
        }
        writeln!(
            main,
            "#include <stdio.h>\nint main(void) {{ printf(\"%d\\n\", {sum}); return 0; }}"
        )
        .unwrap();
        project.write("src/main.c", &main);
        project.write(
            "Makefile",
            "CFLAGS = -O1\n\
             SOURCES := $(wildcard src/*.c)\n\
             OBJECTS := $(SOURCES:src/%.c=build/%.o)\n\
             build/program: $(OBJECTS)\n\
             \t$(RECC) cc -o $@ $(OBJECTS)\n\
             build/%.o: src/%.c include/common.h build/few.h Makefile\n\
             \t$(RECC) cc $(CFLAGS) -Iinclude -Ibuild -c $< -o $@\n\
             build/few.h: few.in\n\
             \tmkdir -p build\n\
             \techo \"#define FEW $$(cat few.in)\" > $@\n\
             clean:\n\
             \trm -rf build\n",
        );
        project
    }

    /// Sets a variable for the build.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn write(&self, path: &str, content: &str) {
        std::fs::write(self.directory.join(path), content).unwrap();
    }

    pub fn append(&self, path: &str, content: &str) {
        let path = self.directory.join(path);
        let old = std::fs::read_to_string(&path).unwrap();
        std::fs::write(path, old + content).unwrap();
    }

    /// Runs `make -j2` with `arguments`.
    pub fn make(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// `make -j2` with `arguments`, to be run.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(make());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("RECC_") {
                command.env_remove(name);
            }
        }
        command
            .current_dir(&self.directory)
            .env_remove("MAKEFLAGS")
            .env_remove("MAKELEVEL")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .arg("-j2")
            .arg(format!("RECC={}", tool("recc").display()))
            .args(arguments);
        command
    }

    /// Starts `make -j2`, whose output goes to `log`.
    pub fn begin(&self) -> Daemon {
        Daemon::start(&mut self.command(&[]), self.log_file())
    }

    /// How many objects have been built.
    pub fn objects(&self) -> usize {
        let Ok(entries) = std::fs::read_dir(self.directory.join("build")) else {
            return 0;
        };
        let is_object = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "o");
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.filter(is_object).count()
    }

    /// Waits for the end of a build that was begun.
    pub fn outcome(&self, build: &mut Daemon) -> Outcome {
        if build.exit_code() == Some(0) {
            return Outcome::Built(self.run());
        }
        let log = build.log();
        let codes = log.lines().filter_map(|line| {
            let code = line.strip_prefix("make: ***")?.split_once("] ")?.1;
            code.strip_prefix("Error ")
        });
        Outcome::Failed(codes.map(str::to_owned).collect())
    }

    /// What the build that was begun last has printed so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_file()).unwrap()
    }

    fn log_file(&self) -> PathBuf {
        self.directory.with_extension("log")
    }

    /// Builds; fails the test if the build fails.
    pub fn build(&self) {
        let output = self.make(&[]);
        assert!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Builds everything anew, with nothing left of earlier builds in the project.
    pub fn rebuild(&self) {
        assert!(self.make(&["clean"]).status.success());
        self.build();
    }

    /// What the program prints.
    pub fn run(&self) -> i64 {
        let output = Command::new(self.directory.join("build/program"))
            .output()
            .unwrap();
        String::from_utf8(output.stdout)
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    }
}
