//! The primed that a command goes through: the one that runs, or one that is started for the
//! duration.
//!
//! The latter has sockets of its own, at a place that follows from its state directory and backend.
//! So commands at the same time share one, and it ends by itself with the last of them
//! (`--until-unused`), even if they are killed. Its standard input is a locked file: as long as the lock is held, it
//! lives, and the state directory is its.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, StatusCode};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use super::Failure;
use super::admin_client::AdminClient;
use crate::address::Address;
use crate::config::{ConfigError, Environment};
use crate::server::RUNS_PATH;
use crate::server::runs::{OpenPage, OpenedPage, RunPage};
use crate::task;

/// How long a primed may take to start, one that is about to end included.
const START: Duration = Duration::from_secs(20);
/// How long it may take to record the run, after which it goes on by itself.
const END: Duration = Duration::from_secs(40);
/// Between two looks at what nothing announces: a socket, a lock.
const PAUSE: Duration = Duration::from_millis(20);
/// How often the live line may change.
const TICK: Duration = Duration::from_millis(250);
/// How long an answer may take while the command runs.
const ANSWER: Duration = Duration::from_secs(10);

/// What the names of their directories begin with.
const PLACE: &str = "run-";

/// What the service manager said, and not to this one.
const NOT_PASSED_ON: [&str; 7] = [
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "INVOCATION_ID",
];

/// Where a primed may be, and how one is started.
pub struct Daemons {
    /// For what is not set.
    pub environment: Environment,
    /// Admin socket of one that may run.
    pub admin: Option<Address>,
    /// The backend to use.
    pub upstream: Option<Address>,
    /// Where records are kept.
    pub state_dir: Option<PathBuf>,
    /// The settings to use.
    pub file: Option<PathBuf>,
}

/// A run that is open.
pub struct Attached {
    /// What primed says about it.
    pub opened: OpenedPage,
    /// What the user should know.
    pub notes: Vec<String>,
    /// Where that primed is asked.
    pub admin: Address,
    /// The file that is locked as long as a primed for the duration lives.
    lock: Option<PathBuf>,
    started: Option<Child>,
}

/// Why a primed did not open a run.
enum Refused {
    /// There is none, or it is about to end.
    Absent,
    /// It has another backend.
    OtherUpstream(String),
    /// It says so.
    Said(String),
}

impl Daemons {
    /// Opens a run.
    ///
    /// # Errors
    /// Why that cannot be done, in a sentence.
    pub async fn attach(&self, page: &OpenPage) -> Result<Attached, String> {
        let admin = self.admin.clone();
        let admin = admin.or_else(|| self.environment.default_admin().ok());
        let mut notes = Vec::new();
        if let Some(admin) = admin {
            match self.open(&admin, page).await {
                Ok(opened) => return Ok(Attached::new(opened, admin)),
                Err(Refused::OtherUpstream(upstream)) => notes.push(format!(
                    "the primed that runs forwards to {upstream}; another is started for this run"
                )),
                Err(Refused::Said(reason)) => return Err(reason),
                Err(Refused::Absent) => {}
            }
        }
        let mut attached = self.attach_to_own(page).await?;
        if attached.opened.speculates && !attached.opened.keeps_records {
            notes.push(
                "nothing can be used of earlier builds or kept for later ones: the state directory \
                 is in use by another primed, or cannot be written; `primed doctor` says more"
                    .to_owned(),
            );
        }
        attached.notes = notes;
        Ok(attached)
    }

    /// Where a primed answers questions about the builds of the past: one that runs, or one that is
    /// started, and lives as long as this process.
    ///
    /// # Errors
    /// Why there is none, in a sentence.
    pub async fn visit(&self) -> Result<Address, String> {
        if let Some(admin) = &self.admin {
            return Ok(admin.clone());
        }
        let page = OpenPage {
            visit: true,
            ..OpenPage::default()
        };
        for admin in candidates(&self.environment) {
            // One that is about to end may still take connections, but no visit.
            match open(&admin, &page).await {
                Err(Refused::Absent) => {}
                _ => return Ok(admin),
            }
        }
        let state_dir = self.state_dir()?;
        if !state_dir.is_dir() {
            return Err(format!(
                "none has ever run here ({} is not there)",
                state_dir.display()
            ));
        }
        Ok(self.attach_to_own(&page).await?.admin)
    }

    fn state_dir(&self) -> Result<PathBuf, String> {
        let state_dir = match &self.state_dir {
            Some(directory) => directory.clone(),
            None => {
                let found = self.environment.default_state_dir();
                found.map_err(|error| error.to_string())?
            }
        };
        std::path::absolute(&state_dir)
            .map_err(|error| format!("{} is no directory: {error}", state_dir.display()))
    }

    /// Opens a run at a primed for the duration, which is started if there is none.
    async fn attach_to_own(&self, page: &OpenPage) -> Result<Attached, String> {
        let state_dir = self.state_dir()?;
        let place = self.place(&state_dir);
        self.make(&place)?;
        let socket = |name: &str| format!("unix:{}", place.join(name).display());
        let admin = admin_at(&place)?;
        let lock = place.join("lock");
        let log = state_dir.join(match page.visit {
            true => "visit.log",
            false => "run.log",
        });
        let mut started: Option<Child> = None;
        let began = Instant::now();
        loop {
            match self.open(&admin, page).await {
                Ok(opened) => {
                    return Ok(Attached {
                        lock: Some(lock),
                        started,
                        ..Attached::new(opened, admin)
                    });
                }
                Err(Refused::Said(reason)) => return Err(reason),
                Err(Refused::Absent | Refused::OtherUpstream(_)) => {}
            }
            match &mut started {
                None => {
                    let ours = try_lock(&lock)
                        .map_err(|error| format!("{} cannot be locked: {error}", lock.display()))?;
                    if let Some(file) = ours {
                        let child = self.start(&socket, &state_dir, &log, file);
                        started =
                            Some(child.map_err(|error| format!("it cannot be started: {error}"))?);
                    }
                }
                Some(child) => {
                    if let Ok(Some(_)) = child.try_wait() {
                        return Err(last_word(&log));
                    }
                }
            }
            if began.elapsed() > START {
                let log = log.display();
                return Err(format!("it did not start in {START:?}; its log is {log}"));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// The directory for the sockets of a primed for the duration.
    fn place(&self, state_dir: &Path) -> PathBuf {
        let mut name = Sha256::new();
        name.update(state_dir.as_os_str().as_encoded_bytes());
        name.update([0]);
        if let Some(upstream) = &self.upstream {
            name.update(upstream.to_string());
        }
        let name: String = name.finalize()[..6]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        places(&self.environment).join(format!("{PLACE}{name}"))
    }

    /// Makes it, such that only its user can enter it.
    fn make(&self, place: &Path) -> Result<(), String> {
        let uid = rustix::process::getuid().as_raw();
        let mut builder = DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(place);
        made.map_err(|error| format!("{} cannot be made: {error}", place.display()))?;
        // Others may have made it in a directory that is open to all.
        for made in place.ancestors().take(2) {
            let metadata = std::fs::symlink_metadata(made)
                .map_err(|error| format!("{} cannot be read: {error}", made.display()))?;
            if metadata.uid() != uid || !metadata.is_dir() || metadata.mode() & 0o022 != 0 {
                let made = made.display();
                return Err(format!(
                    "{made} belongs to another user, or others may write to it; remove it, or set \
                     XDG_RUNTIME_DIR"
                ));
            }
        }
        Ok(())
    }

    /// Starts a primed that ends with the last run.
    fn start(
        &self,
        socket: &dyn Fn(&str) -> String,
        state_dir: &Path,
        log: &Path,
        lock: File,
    ) -> io::Result<Child> {
        // primed itself says what is wrong with its state directory, and does without.
        let _ = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state_dir);
        let mut options = OpenOptions::new();
        options.create(true).write(true).truncate(true).mode(0o600);
        let log = options.open(log);
        let (out, error) = match log.and_then(|log| Ok((log.try_clone()?, log))) {
            Ok((out, error)) => (Stdio::from(out), Stdio::from(error)),
            Err(_) => (Stdio::null(), Stdio::null()),
        };
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("serve")
            .arg("--until-unused")
            .args(["--listen", &socket("remote-apis.sock")])
            .args(["--admin", &socket("admin.sock")])
            .arg("--state-dir")
            .arg(state_dir)
            .stdin(lock)
            .stdout(out)
            .stderr(error)
            // What a terminal sends to the command's group is not for it.
            .process_group(0);
        if let Some(upstream) = &self.upstream {
            command.arg("--upstream").arg(upstream.to_string());
        }
        if let Some(file) = &self.file {
            command.arg("--config").arg(file);
        }
        for name in NOT_PASSED_ON {
            command.env_remove(name);
        }
        command.spawn()
    }

    /// Opens a run at the primed at `admin`, if its backend is the one to use.
    async fn open(&self, admin: &Address, page: &OpenPage) -> Result<OpenedPage, Refused> {
        let (mut client, opened) = open(admin, page).await?;
        match &self.upstream {
            Some(upstream) if upstream.to_string() != opened.upstream => {
                let path = format!("{RUNS_PATH}/{}", opened.id);
                // If that fails, the end of this process closes it.
                let _ = client.ask(Method::DELETE, &path, Bytes::new()).await;
                Err(Refused::OtherUpstream(opened.upstream))
            }
            _ => Ok(opened),
        }
    }
}

/// Opens a run at the primed at `admin`, whatever its backend.
async fn open(admin: &Address, page: &OpenPage) -> Result<(AdminClient, OpenedPage), Refused> {
    let connected = AdminClient::connect(admin).await;
    let mut client = connected.map_err(|_| Refused::Absent)?;
    let body = serde_json::to_vec(page).map_err(|error| Refused::Said(error.to_string()))?;
    let answered = client.ask(Method::POST, RUNS_PATH, body.into()).await;
    let (status, answer) = answered.map_err(|_| Refused::Absent)?;
    match status {
        StatusCode::OK => match serde_json::from_slice(&answer) {
            Ok(opened) => Ok((client, opened)),
            Err(error) => Err(Refused::Said(format!(
                "primed at {admin} answers in another way: {error}"
            ))),
        },
        StatusCode::SERVICE_UNAVAILABLE => Err(Refused::Absent),
        StatusCode::NOT_FOUND => Err(Refused::Said(format!(
            "the primed at {admin} is an older version; restart it"
        ))),
        _ => {
            let said = String::from_utf8_lossy(&answer).trim_end().to_owned();
            Err(Refused::Said(format!("primed at {admin} said: {said}")))
        }
    }
}

impl Attached {
    fn new(opened: OpenedPage, admin: Address) -> Self {
        Attached {
            opened,
            notes: Vec::new(),
            admin,
            lock: None,
            started: None,
        }
    }

    /// How the run stands, now and then, as long as that is wanted.
    pub fn follow(&self) -> watch::Receiver<RunPage> {
        let (shown, pages) = watch::channel(RunPage::default());
        let (admin, path) = (self.admin.clone(), self.path());
        task::spawn("run progress", async move {
            let look = async {
                let mut client = AdminClient::connect(&admin).await?;
                loop {
                    let page = client.send(Method::GET, &path, Bytes::new()).await?;
                    if let Ok(page) = serde_json::from_slice(&page) {
                        shown.send_replace(page);
                    }
                    tokio::time::sleep(TICK).await;
                }
            };
            tokio::select! {
                () = shown.closed() => {}
                // One that is gone tells no more.
                _ = async { let ended: Result<(), Failure> = look.await; ended } => {}
            }
        });
        pages
    }

    /// Closes the run, and waits until a primed that ends with it has recorded it. Says how it ended,
    /// if primed still knows.
    pub async fn close(mut self) -> Option<RunPage> {
        let (admin, path) = (self.admin.clone(), self.path());
        let closed = async {
            let mut client = AdminClient::connect(&admin).await.ok()?;
            let page = client
                .send(Method::DELETE, &path, Bytes::new())
                .await
                .ok()?;
            serde_json::from_slice(&page).ok()
        };
        let page: Option<RunPage> = tokio::time::timeout(ANSWER, closed).await.ok()?;
        if let (Some(lock), Some(RunPage { ends: true, .. })) = (&self.lock, &page) {
            let began = Instant::now();
            while let Ok(None) = try_lock(lock)
                && began.elapsed() < END
            {
                tokio::time::sleep(PAUSE).await;
            }
            if let Some(started) = &mut self.started {
                // Nothing depends on it: who ends later is no child of anybody's.
                let _ = started.try_wait();
            }
        }
        page
    }

    fn path(&self) -> String {
        format!("{RUNS_PATH}/{}", self.opened.id)
    }
}

/// Where the primed answers that is meant: the one at `admin`, if that is given, else the one that
/// runs. The usual place, if there is none.
///
/// # Errors
/// When there is no such place.
pub async fn find(
    admin: Option<Address>,
    environment: &Environment,
) -> Result<Address, ConfigError> {
    if let Some(admin) = admin {
        return Ok(admin);
    }
    for admin in candidates(environment) {
        if AdminClient::connect(&admin).await.is_ok() {
            return Ok(admin);
        }
    }
    environment.default_admin()
}

/// Where a primed may answer: at the usual place, else where one for the duration of something does,
/// the latest of them first.
fn candidates(environment: &Environment) -> impl Iterator<Item = Address> {
    let entries = std::fs::read_dir(places(environment));
    let entries = entries.into_iter().flatten().flatten();
    let places = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(PLACE));
    let began = |place: &Path| place.join("admin.sock").metadata().ok()?.modified().ok();
    let places = places.filter_map(|entry| Some((began(&entry.path())?, entry.path())));
    let mut places: Vec<_> = places.collect();
    places.sort();
    let latest_first = places.into_iter().rev();
    let latest_first = latest_first.filter_map(|(_, place)| admin_at(&place).ok());
    environment
        .default_admin()
        .ok()
        .into_iter()
        .chain(latest_first)
}

/// What holds the sockets of those for the duration.
fn places(environment: &Environment) -> PathBuf {
    match &environment.runtime_dir {
        Some(directory) => directory.join("primed"),
        None => {
            let uid = rustix::process::getuid().as_raw();
            std::env::temp_dir().join(format!("primed-{uid}"))
        }
    }
}

fn admin_at(place: &Path) -> Result<Address, String> {
    let admin = format!("unix:{}", place.join("admin.sock").display());
    admin.parse().map_err(|error| format!("{error}"))
}

/// Locks the file, until it and what inherits it are closed; `None` if somebody else holds the lock.
fn try_lock(path: &Path) -> io::Result<Option<File>> {
    let mut options = OpenOptions::new();
    let file = options.create(true).append(true).mode(0o600).open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(error) if error == rustix::io::Errno::WOULDBLOCK => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What a primed said before it ended, out of its log.
fn last_word(log: &Path) -> String {
    let said = std::fs::read_to_string(log).unwrap_or_default();
    let last = said.lines().rev().find_map(|line| {
        let line = line.trim();
        let line = line
            .strip_prefix("primed: ")
            .or_else(|| line.strip_prefix("error: "));
        line.map(str::to_owned)
    });
    let last = last.unwrap_or_else(|| "it ended without a word".to_owned());
    format!("{last} (its log is {})", log.display())
}
