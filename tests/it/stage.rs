//! One build of forty files with a fault in the midst of it: real recc, make and buildbox-casd,
//! directly and through primed, so that what the fault does to the one can be compared with what
//! it does to the other.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::path::Path;

use tempfile::TempDir;

use crate::project::{FEW, Outcome, Project};
use crate::relay::{Faults, Relay};
use crate::support::{Casd, Daemon, Primed, scratch, wait_until};

pub const UNITS: usize = 40;
pub const JOBS: usize = 4;
/// How many objects there are when a fault happens.
const MIDST: usize = 8;
/// What the program prints, if every file was compiled as it stands.
const SUM: i64 = (UNITS + FEW) as i64;

/// More than primed may ever need for such a build, however it goes.
const MEMORY: u64 = 128 * 1024 * 1024;

pub struct Stage {
    pub primed: Option<Primed>,
    pub relay: Option<Relay>,
    pub casd: Casd,
    pub project: Project,
    scratch: TempDir,
}

impl Stage {
    /// recc talks to casd.
    pub fn direct() -> Self {
        let scratch = scratch();
        let casd = Casd::start(scratch.path(), JOBS);
        Stage {
            project: Project::of_units(scratch.path(), &casd.address(), UNITS),
            primed: None,
            relay: None,
            casd,
            scratch,
        }
    }

    /// recc talks to primed, and primed to casd.
    pub fn primed() -> Self {
        Stage::direct().behind_primed(None, &[])
    }

    /// recc talks to primed, and primed by way of a faulty wire to casd.
    pub fn wired(faults: Faults, arguments: &[&str]) -> Self {
        let stage = Stage::direct();
        let relay = Relay::start(stage.casd.socket(), faults);
        stage.behind_primed(Some(relay), arguments)
    }

    fn behind_primed(self, relay: Option<Relay>, arguments: &[&str]) -> Self {
        let upstream = match &relay {
            Some(relay) => relay.address().to_owned(),
            None => self.casd.address(),
        };
        let primed = Primed::start_with(self.path(), &upstream, arguments);
        Stage {
            project: Project::of_units(self.path(), &primed.address(), UNITS),
            primed: Some(primed),
            relay,
            ..self
        }
    }

    /// Lets recc try again what was unavailable, for longer than any fault here lasts.
    pub fn patient(self) -> Self {
        let project = self.project.with("RECC_RETRY_LIMIT", "12");
        Stage {
            project: project.with("RECC_RETRY_DELAY", "100"),
            ..self
        }
    }

    pub fn path(&self) -> &Path {
        self.scratch.path()
    }

    pub fn relay(&self) -> &Relay {
        self.relay.as_ref().unwrap()
    }

    /// The server that recc talks to.
    pub fn server(&mut self) -> &mut Daemon {
        match &mut self.primed {
            Some(primed) => &mut primed.daemon,
            None => &mut self.casd.daemon,
        }
    }

    /// Starts a build and returns in the midst of it.
    pub fn begin(&self) -> Daemon {
        let mut build = self.project.begin();
        wait_until("the build is half way", || {
            assert!(build.is_running(), "it ended too soon: {}", build.log());
            self.project.objects() >= MIDST
        });
        build
    }

    /// Waits for the end of a build, after which primed is as well as ever.
    pub fn end(&mut self, mut build: Daemon) -> Outcome {
        let outcome = self.project.outcome(&mut build);
        if let Some(primed) = &mut self.primed {
            assert!(primed.daemon.is_running(), "{}", primed.daemon.log());
            assert!(!primed.daemon.log().contains("panicked"));
            let peak = primed.daemon.peak_memory();
            assert!(peak < MEMORY, "{peak} bytes");
        }
        if let Outcome::Built(sum) = outcome {
            assert_eq!(sum, SUM, "{}", build.log());
        }
        outcome
    }

    /// Starts casd again where it was, with its cache.
    pub fn restart_casd(&mut self) {
        let path = self.path().to_owned();
        self.casd.restart(&path, JOBS, true);
    }

    /// Builds what is missing and asserts that this works.
    pub fn finish(&mut self) {
        let build = self.project.begin();
        let outcome = self.end(build);
        assert_eq!(outcome, Outcome::Built(SUM), "{}", self.project.log());
    }

    /// Ends a build that must have come through.
    pub fn end_well(&mut self, build: Daemon) {
        let outcome = self.end(build);
        assert_eq!(outcome, Outcome::Built(SUM), "{}", self.project.log());
    }
}
