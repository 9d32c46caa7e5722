//! Run parents: builds that `primed run` opens and closes. What is called within a run counts for
//! it, but is recorded under the build tool that called, as it is without a run: so that a plain
//! `make` is primed by what `primed run -- make` has recorded, and the other way round.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::caller::{BuildKey, Caller};
use super::subaction::Subaction;
use crate::quick_map::QuickMap;
use crate::speculation::flights::FlightKey;
use crate::speculation::journal::accounting::BuildStatus;
use crate::workspace::peer::Peer;
use crate::workspace::process::Process;

/// What the admin socket asks about runs.
pub enum Request {
    /// Opens a run.
    Open(OpenRun, oneshot::Sender<Opened>),
    /// How a run stands; `None` if it is not open.
    Look(String, oneshot::Sender<Option<BuildStatus>>),
    /// Closes a run, and says how it ended; `None` if it was not open.
    Close(String, oneshot::Sender<Option<BuildStatus>>),
}

/// A run to be opened.
pub struct OpenRun {
    /// The process that its command descends from, if it can be seen.
    pub process: Option<Process>,
    /// Whose it is.
    pub uid: Option<u32>,
    /// For people: the command.
    pub command: String,
    /// What its clients send as `correlated_invocations_id`, if that is not to be the run's id.
    pub correlated: Option<String>,
    /// Whether anything is primed for it.
    pub primes: bool,
}

/// A run that has been opened.
pub struct Opened {
    /// The id of its build.
    pub id: String,
    /// Closed when what is known of its workspace is planned for.
    pub planned: oneshot::Receiver<()>,
    /// Whether its records will outlive this process.
    pub keeps_records: bool,
}

/// The runs that are open.
#[derive(Default)]
pub struct Runs {
    open: HashMap<Arc<str>, Run>,
}

struct Run {
    id: Arc<str>,
    number: u64,
    process: Option<Process>,
    uid: Option<u32>,
    directory: Option<PathBuf>,
    command: String,
    correlated: String,
    primes: bool,
    /// Who asked for what is kept for recording.
    clients: HashMap<FlightKey, Arc<Caller>>,
}

/// What is recorded together: actions, and who asked for them.
pub type Part = (Arc<Caller>, QuickMap<FlightKey, Subaction>);

impl Runs {
    /// Opens a run as build `number`, and says who calls in it.
    pub fn open(&mut self, run: OpenRun, number: u64) -> Caller {
        let id: Arc<str> = uuid::Uuid::now_v7().to_string().into();
        let process = run.process.as_ref();
        let directory = process.and_then(Process::working_directory);
        let file_system_root = process.and_then(Process::file_system_root);
        let caller = Caller {
            key: BuildKey::Run(id.clone()),
            // Where its process can be seen, its end is.
            ends_by_silence: process.is_none(),
            tool: run.command.clone(),
            uid: run.uid,
            project_root: directory.clone(),
            working_directory: directory.clone(),
            file_system_root: file_system_root.unwrap_or_default(),
            action: None,
        };
        let run = Run {
            id: id.clone(),
            number,
            process: run.process,
            uid: run.uid,
            directory,
            command: run.command,
            correlated: run.correlated.unwrap_or_else(|| id.to_string()),
            primes: run.primes,
            clients: HashMap::new(),
        };
        self.open.insert(id, run);
        caller
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Whether nothing is to be primed for build `number`.
    pub fn leaves_alone(&self, number: u64) -> bool {
        let mut runs = self.open.values();
        runs.any(|run| run.number == number && !run.primes)
    }

    /// Puts a client into the run that it belongs to, if there is one: it sends the run's
    /// correlation id, or its process descends from the run's. Of several runs, one within the
    /// other, it belongs to the innermost, which was opened last.
    pub fn adopt(&self, caller: Caller, correlated: &str, peer: &Peer) -> Caller {
        let belongs = |run: &&Run| run.is_of(&caller, correlated, peer);
        let runs = self.open.values().filter(belongs);
        let Some(run) = runs.max_by_key(|run| run.number) else {
            return caller;
        };
        let below_build_tool = !caller.ends_by_silence;
        let (project_root, tool) = match (below_build_tool, &run.directory) {
            (false, Some(directory)) => (Some(directory.clone()), run.tool()),
            _ => (caller.project_root, caller.tool),
        };
        Caller {
            key: BuildKey::Run(run.id.clone()),
            ends_by_silence: run.process.is_none(),
            project_root,
            tool,
            ..caller
        }
    }

    /// Remembers who asked for an action that is kept for recording.
    pub fn keep(&mut self, client: &Arc<Caller>, key: &FlightKey) {
        if let BuildKey::Run(id) = &client.key
            && let Some(run) = self.open.get_mut(id)
        {
            let clients = run.clients.entry(key.clone());
            clients.or_insert_with(|| client.clone());
        }
    }

    /// Ends the run of `caller`, and sorts what is to be recorded by the parents that it belongs to.
    pub fn close(
        &mut self,
        caller: &Arc<Caller>,
        subactions: QuickMap<FlightKey, Subaction>,
    ) -> Vec<Part> {
        let run = match &caller.key {
            BuildKey::Run(id) => self.open.remove(id),
            _ => None,
        };
        let Some(mut run) = run else {
            return vec![(caller.clone(), subactions)];
        };
        let mut parts: Vec<Part> = Vec::new();
        for (key, subaction) in subactions {
            let client = run.clients.remove(&key).unwrap_or_else(|| caller.clone());
            let same = |(other, _): &&mut Part| {
                (other.uid, &other.project_root) == (client.uid, &client.project_root)
                    && (client.project_root.is_some() || other.tool == client.tool)
            };
            match parts.iter_mut().find(same) {
                Some((_, kept)) => drop(kept.insert(key, subaction)),
                None => parts.push((client, QuickMap::from_iter([(key, subaction)]))),
            }
        }
        parts
    }
}

impl Run {
    fn is_of(&self, caller: &Caller, correlated: &str, peer: &Peer) -> bool {
        // A client whose user cannot be seen may know the id all the same.
        let same_user = caller.uid.is_none() || caller.uid == self.uid;
        same_user && (correlated == self.correlated || self.descends(caller, peer))
    }

    fn descends(&self, caller: &Caller, peer: &Peer) -> bool {
        let Some(process) = &self.process else {
            return false;
        };
        let of_client = || peer.lineage().map(|lineage| &lineage.client.process);
        let of_build = match &caller.key {
            BuildKey::Process(process) => Some(process),
            _ => None,
        };
        let lowest = of_build.or_else(of_client);
        lowest.is_some_and(|lowest| lowest.descends_from(process))
    }

    /// The name of the program that it runs.
    fn tool(&self) -> String {
        let program = self.command.split(' ').next().unwrap_or_default();
        program.rsplit('/').next().unwrap_or_default().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cas::{Digest, DigestFunction};
    use crate::workspace::peer::PeerOrigin;
    use crate::workspace::process::Process;

    fn stranger(uid: Option<u32>) -> (Caller, Peer) {
        let caller = Caller {
            key: BuildKey::Invocation("x".to_owned()),
            ends_by_silence: true,
            tool: "recc".to_owned(),
            uid,
            project_root: None,
            working_directory: None,
            file_system_root: PathBuf::new(),
            action: None,
        };
        let peer = Peer::new(PeerOrigin::Tcp(([127, 0, 0, 1], 1).into()));
        (caller, peer)
    }

    fn open(command: &str, correlated: Option<&str>) -> OpenRun {
        let me = Process::find(std::process::id() as i32);
        OpenRun {
            uid: me.as_ref().and_then(Process::uid),
            process: me,
            command: command.to_owned(),
            correlated: correlated.map(str::to_owned),
            primes: true,
        }
    }

    #[test]
    fn a_client_belongs_to_the_run_whose_correlation_id_it_sends() {
        let mut runs = Runs::default();
        let run = runs.open(open("make -j2", Some("mine")), 1);
        let (client, peer) = stranger(None);
        let adopted = runs.adopt(client.clone(), "mine", &peer);
        assert_eq!(adopted.key, run.key);
        let there = std::env::current_dir().ok();
        assert_eq!((adopted.project_root, &*adopted.tool), (there, "make"));
        assert_eq!(runs.adopt(client, "yours", &peer).key, stranger(None).0.key);
        let (of_another_user, peer) = stranger(Some(u32::MAX));
        let left = runs.adopt(of_another_user, "mine", &peer);
        assert_ne!(left.key, run.key);
    }

    #[test]
    fn a_client_below_a_build_tool_is_recorded_as_it_is_without_a_run() {
        let mut runs = Runs::default();
        let run = runs.open(open("./build.sh", None), 1);
        let make = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn();
        let mut make = make.unwrap();
        let (client, peer) = stranger(run.uid);
        let client = Caller {
            key: BuildKey::Process(Process::find(make.id() as i32).unwrap()),
            ends_by_silence: false,
            project_root: Some("/elsewhere".into()),
            tool: "make".to_owned(),
            ..client
        };
        let parent = |caller: &Caller| caller.parent(&"".into(), DigestFunction::default());
        let adopted = Arc::new(runs.adopt(client.clone(), "", &peer));
        assert_eq!(adopted.key, run.key, "it descends from the run");
        assert_eq!(parent(&adopted), parent(&client));
        let key = FlightKey {
            instance: "".into(),
            action: Digest::of(b"a"),
        };
        runs.keep(&adopted, &key);
        let subaction = Subaction {
            action: key.action,
            result: Arc::default(),
            order: 0,
            working_directory: None,
            file_system_root: PathBuf::new(),
        };
        let unseen = FlightKey {
            action: Digest::of(b"b"),
            ..key.clone()
        };
        let kept = QuickMap::from_iter([(key, subaction.clone()), (unseen, subaction)]);
        let parts = runs.close(&Arc::new(run.clone()), kept);
        let mut roots: Vec<_> = parts
            .iter()
            .map(|(by, _)| by.project_root.clone())
            .collect();
        roots.sort();
        let mut expected = vec![Some("/elsewhere".into()), run.project_root.clone()];
        expected.sort();
        assert_eq!(roots, expected);
        assert!(runs.is_empty());
        drop(make.stdin.take());
        make.wait().unwrap();
    }

    #[test]
    fn of_runs_within_each_other_the_innermost_has_the_call() {
        let mut runs = Runs::default();
        let outer = runs.open(open("make", None), 1);
        let (mut client, peer) = stranger(outer.uid);
        client.key = BuildKey::Process(Process::find(std::process::id() as i32).unwrap());
        assert_eq!(runs.adopt(client.clone(), "", &peer).key, outer.key);
        let inner = runs.open(
            OpenRun {
                primes: false,
                ..open("make sub", None)
            },
            2,
        );
        assert_eq!(runs.adopt(client, "", &peer).key, inner.key);
        assert!(runs.leaves_alone(2) && !runs.leaves_alone(1));
    }
}
