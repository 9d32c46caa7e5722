//! Attribution: finds out what the actions are that clients ask for. Some run actions themselves
//! (action parents); others are asked for on behalf of such a one, by a connection that tells
//! nothing of it. These are known by their content: a nested action reads what its parent's input
//! tree holds, and what other actions of that parent have written.
//!
//! A task of its own, because it has to read actions and trees from the CAS. What is asked of it
//! is answered in order.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use prost::Message as _;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::cas::Digest;
use crate::cas::outputs::{Outputs, files_in, output_files};
use crate::reapi::{Action, ActionResult, Command};
use crate::speculation::activity::{Activities, Activity};
use crate::speculation::clients::observation::CallOrigin;
use crate::speculation::flights::FlightKey;
use crate::speculation::records::parent::{ActionParent, ActionParts, action_parts};
use crate::speculation::records::texts::{parent_key, runs_actions, texts_of};
use crate::speculation::workshop::Workshop;
use crate::task;

/// Questions that are answered together.
const BATCH: usize = 256;
/// Questions that may wait; further ones are not answered.
const MAILBOX: usize = 16 * 1024;
/// Answers that may wait.
const ANSWERS: usize = 1024;

/// What is asked, or told.
pub enum Message {
    /// A client asks for this action, on behalf of whom?
    Asked {
        /// Who asks.
        origin: CallOrigin,
        /// The action.
        key: FlightKey,
        /// Whether it executes it.
        executes: bool,
    },
    /// An action, which was asked about before, has written these files.
    Wrote {
        /// The action.
        key: FlightKey,
        /// Path and digest of each.
        files: Outputs,
    },
    /// The result of an action parent is on its way to its client.
    Completing {
        /// The parent.
        parent: FlightKey,
        /// Given back with the answer.
        reply: oneshot::Sender<()>,
    },
    /// An action, which may be a parent, has ended with this result, or without one.
    Ended {
        /// The action.
        parent: FlightKey,
        /// With exit code 0.
        result: Option<Arc<ActionResult>>,
    },
}

/// What was found out.
pub enum Found {
    /// The action runs actions itself.
    Parent(Box<FoundParent>),
    /// It is asked for on behalf of an action parent that is open, or of none of these.
    Nested {
        /// The action.
        key: FlightKey,
        /// Whether it is executed.
        executes: bool,
        /// The parent.
        parent: Option<FlightKey>,
    },
    /// All that was asked before the parent completed is answered.
    Completing {
        /// The parent.
        parent: FlightKey,
        /// As it came.
        reply: oneshot::Sender<()>,
    },
    /// All that was asked before the parent ended is answered.
    Ended {
        /// The parent.
        parent: FlightKey,
        /// The files that it wrote, sorted by path; `None` if it failed.
        outputs: Option<Arc<Outputs>>,
    },
}

/// An action that runs actions itself.
pub struct FoundParent {
    /// Who asks for it.
    pub origin: CallOrigin,
    /// The action.
    pub key: FlightKey,
    /// Whether it is executed, and so open until it has ended.
    pub executes: bool,
    /// What it is known by.
    pub identity: ActionParent,
    /// Its input tree.
    pub input_root: Digest,
    /// Its digest-valued text.
    pub texts: Vec<String>,
}

/// A handle on the task.
pub struct Attributor {
    mailbox: mpsc::Sender<(Message, Activity)>,
    activities: Activities,
}

impl Attributor {
    /// Starts the task. Its answers come by the other end.
    pub fn start(workshop: Workshop) -> (Self, mpsc::Receiver<(Found, Activity)>) {
        let (mailbox, messages) = mpsc::channel(MAILBOX);
        let (found, answers) = mpsc::channel(ANSWERS);
        let activities = workshop.activities.clone();
        task::spawn("attribution", run(workshop, messages, found));
        let attributor = Attributor {
            mailbox,
            activities,
        };
        (attributor, answers)
    }

    /// Tells it something. Says whether there was room for that.
    pub fn tell(&self, message: Message) -> bool {
        let message = (message, self.activities.begin());
        self.mailbox.try_send(message).is_ok()
    }
}

/// Answers questions until there are no more.
async fn run(
    workshop: Workshop,
    mut messages: mpsc::Receiver<(Message, Activity)>,
    found: mpsc::Sender<(Found, Activity)>,
) {
    let mut attribution = Attribution {
        workshop,
        open: HashMap::new(),
        attributed: HashMap::new(),
        by_connection: HashMap::new(),
    };
    let mut batch = Vec::new();
    while messages.recv_many(&mut batch, BATCH).await > 0 {
        let (messages, activities): (Vec<_>, Vec<_>) = batch.drain(..).unzip();
        let activity = activities.into_iter().next();
        let Some(activity) = activity else { continue };
        let asked = messages.iter().filter_map(|message| match message {
            Message::Asked { key, .. } => Some(key),
            _ => None,
        });
        let actions = attribution.actions(asked).await;
        for message in messages {
            if let Some(answer) = attribution.answer(message, &actions).await {
                // An engine that is gone needs no answer.
                let _ = found.send((answer, activity.clone())).await;
            }
        }
    }
}

struct Attribution {
    workshop: Workshop,
    open: HashMap<FlightKey, OpenParent>,
    /// The open parents on whose behalf actions were asked for.
    attributed: HashMap<FlightKey, FlightKey>,
    /// On behalf of which open parents a connection has asked.
    by_connection: HashMap<u64, HashSet<FlightKey>>,
}

struct OpenParent {
    working_directory: String,
    input_tree: InputTree,
    /// Files of its input tree, if that has been read, and those that its actions have written: each
    /// with its names.
    files: HashMap<Digest, HashSet<String>>,
    /// Its client's `correlated_invocations_id`, if any.
    correlated: String,
}

/// What is known of a parent's input tree. It may be large, as one with a compiler and its headers
/// is: it is read when something is asked for that may be the parent's.
enum InputTree {
    Unread(Digest),
    Read,
    /// It cannot be read, so what the parent ran is not known.
    Unreadable,
}

/// An action that is asked for, as it is stored.
struct Stored {
    action: Action,
    /// What it consists of, if it has actions executed itself.
    parent: Option<(ActionParts, Command)>,
}

impl Attribution {
    async fn answer(
        &mut self,
        message: Message,
        actions: &HashMap<FlightKey, Stored>,
    ) -> Option<Found> {
        match message {
            Message::Asked {
                origin,
                key,
                executes,
            } => {
                let stored = actions.get(&key);
                if let Some(stored) = stored
                    && let Some(parent) = self.parent(&origin, &key, stored, executes)
                {
                    return Some(Found::Parent(Box::new(parent)));
                }
                let parent = match stored {
                    Some(stored) => self.asked_for_by(&origin, &key, stored).await,
                    None if executes => None,
                    // It may not be uploaded yet. Then it will be asked about again.
                    None => return None,
                };
                if let Some(parent) = &parent {
                    self.attributed.insert(key.clone(), parent.clone());
                }
                Some(Found::Nested {
                    key,
                    executes,
                    parent,
                })
            }
            Message::Wrote { key, files } => {
                let parent = self.attributed.get(&key);
                if let Some(open) = parent.and_then(|parent| self.open.get_mut(parent)) {
                    open.add_files(files);
                }
                None
            }
            Message::Completing { parent, reply } => Some(Found::Completing { parent, reply }),
            Message::Ended { parent, result } => {
                let outputs = self.end(&parent, result).await;
                Some(Found::Ended { parent, outputs })
            }
        }
    }

    /// Closes a parent. Returns what it wrote, if it succeeded and is known as one.
    async fn end(
        &mut self,
        parent: &FlightKey,
        result: Option<Arc<ActionResult>>,
    ) -> Option<Arc<Outputs>> {
        let open = self.open.remove(parent)?;
        for parents in self.by_connection.values_mut() {
            parents.remove(parent);
        }
        self.by_connection.retain(|_, parents| !parents.is_empty());
        self.attributed.retain(|_, of| of != parent);
        if matches!(open.input_tree, InputTree::Unreadable) {
            return None;
        }
        self.outputs(parent, &open, &*result?).await.map(Arc::new)
    }

    /// The actions of `keys`, as far as the CAS has them.
    async fn actions(&self, keys: impl Iterator<Item = &FlightKey>) -> HashMap<FlightKey, Stored> {
        let mut by_instance: HashMap<Arc<str>, Vec<Digest>> = HashMap::new();
        for key in keys {
            let digests = by_instance.entry(key.instance.clone()).or_default();
            digests.push(key.action);
        }
        let mut actions = HashMap::new();
        for (instance, digests) in by_instance {
            match self.actions_of(&instance, digests).await {
                Ok(stored) => actions.extend(stored.into_iter().map(|(action, stored)| {
                    let instance = instance.clone();
                    (FlightKey { instance, action }, stored)
                })),
                Err(status) => {
                    tracing::debug!(%status, "actions that clients ask for cannot be read");
                }
            }
        }
        actions
    }

    async fn actions_of(
        &self,
        instance: &str,
        digests: Vec<Digest>,
    ) -> Result<HashMap<Digest, Stored>, Status> {
        let cas = &self.workshop.cas;
        let mut stored = HashMap::new();
        let mut candidates = Vec::new();
        for (digest, encoded) in cas.fetch(instance, digests).await? {
            let Ok(action) = Action::decode(encoded.clone()) else {
                continue;
            };
            // Newer clients put the platform into the action, and need not be asked for the command.
            let may_be_parent =
                action.platform.is_none() || runs_actions(&action, &Command::default());
            if may_be_parent && let Ok(parts) = action_parts(&encoded, digest.function()) {
                candidates.push((digest, parts));
            }
            let parent = None;
            stored.insert(digest, Stored { action, parent });
        }
        let commands = candidates.iter().map(|(_, parts)| parts.command);
        let commands = cas.fetch(instance, commands).await?;
        for (digest, parts) in candidates {
            let command = commands.get(&parts.command).cloned();
            let command = command.and_then(|encoded| Command::decode(encoded).ok());
            if let (Some(stored), Some(command)) = (stored.get_mut(&digest), command)
                && runs_actions(&stored.action, &command)
            {
                stored.parent = Some((parts, command));
            }
        }
        Ok(stored)
    }

    /// Opens a parent, if the action is one.
    fn parent(
        &mut self,
        origin: &CallOrigin,
        key: &FlightKey,
        stored: &Stored,
        executes: bool,
    ) -> Option<FoundParent> {
        let function = key.action.function();
        let (parts, command) = stored.parent.as_ref()?;
        if executes {
            self.open.entry(key.clone()).or_insert_with(|| OpenParent {
                working_directory: command.working_directory.clone(),
                input_tree: InputTree::Unread(parts.input_root),
                files: HashMap::new(),
                correlated: origin.request_metadata().correlated_invocations_id,
            });
        }
        Some(FoundParent {
            origin: origin.clone(),
            key: key.clone(),
            executes,
            identity: ActionParent {
                instance: key.instance.clone(),
                key: parent_key(&stored.action, command, function),
                name: name_of(command),
            },
            input_root: parts.input_root,
            texts: texts_of(&stored.action, command, function),
        })
    }

    /// Reads the input trees of open parents that have not been read yet.
    async fn read_input_trees(&mut self) {
        let Workshop {
            cas, directories, ..
        } = &self.workshop;
        for (key, open) in &mut self.open {
            let InputTree::Unread(root) = open.input_tree else {
                continue;
            };
            match directories.load(cas, &key.instance, [root]).await {
                Ok(trees) => {
                    open.input_tree = InputTree::Read;
                    for directory in trees.values() {
                        open.add_files(directory.files.iter().cloned());
                    }
                }
                Err(status) => {
                    tracing::debug!(action = %key.action, %status, "an input tree cannot be read");
                    open.input_tree = InputTree::Unreadable;
                }
            }
        }
    }

    /// The open parent on whose behalf an action is asked for. It holds more of what the action
    /// reads than any other, and most of it; or as much as others, and the client says that it
    /// works for that one, or has worked for no other of them by this connection.
    async fn asked_for_by(
        &mut self,
        origin: &CallOrigin,
        key: &FlightKey,
        stored: &Stored,
    ) -> Option<FlightKey> {
        if self.open.is_empty() {
            return None;
        }
        let root = stored.action.input_root_digest.as_ref();
        let root = key.action.function().read(root).ok()?;
        self.read_input_trees().await;
        let Workshop {
            cas, directories, ..
        } = &self.workshop;
        let trees = directories.load(cas, &key.instance, [root]).await.ok()?;
        let directories = trees.values();
        let files: HashSet<(&str, Digest)> = directories
            .flat_map(|directory| &directory.files)
            .map(|(name, digest)| (name.as_str(), *digest))
            .collect();
        let held = |open: &OpenParent| {
            let held = files
                .iter()
                .filter(|(name, digest)| open.holds(name, digest));
            held.count()
        };
        let shares = self.open.iter().map(|(parent, open)| (held(open), parent));
        let shares: Vec<(usize, &FlightKey)> = shares.collect();
        let most = shares.iter().map(|(held, _)| *held).max()?;
        if most * 2 <= files.len() {
            return None;
        }
        let mut candidates: Vec<&FlightKey> = shares
            .into_iter()
            .filter(|(held, _)| *held == most)
            .map(|(_, parent)| parent)
            .collect();
        if candidates.len() > 1 {
            let correlated = origin.request_metadata().correlated_invocations_id;
            let says = |parent: &&FlightKey| {
                !correlated.is_empty() && self.open[*parent].correlated == correlated
            };
            let known = self.by_connection.get(&origin.peer.id());
            let worked_for =
                |parent: &&FlightKey| known.is_some_and(|known| known.contains(*parent));
            for fits in [&says as &dyn Fn(&&FlightKey) -> bool, &worked_for] {
                let fitting: Vec<_> = candidates.iter().copied().filter(fits).collect();
                if fitting.len() == 1 {
                    candidates = fitting;
                    break;
                }
            }
        }
        let [parent] = candidates.as_slice() else {
            return None;
        };
        let parent = (*parent).clone();
        let worked_for = self.by_connection.entry(origin.peer.id()).or_default();
        worked_for.insert(parent.clone());
        Some(parent)
    }

    /// The files of a parent's result, sorted. Those in output directories are named as they stand
    /// there, as they will be staged elsewhere.
    async fn outputs(
        &self,
        key: &FlightKey,
        open: &OpenParent,
        result: &ActionResult,
    ) -> Option<Outputs> {
        let mut own = result.clone();
        let directories = std::mem::take(&mut own.output_directories);
        let function = key.action.function();
        let Workshop {
            cas,
            directories: trees,
            ..
        } = &self.workshop;
        let place = &open.working_directory;
        let files = output_files(cas, trees, &key.instance, function, place, &own);
        let mut files = files.await.ok()?;
        for directory in &directories {
            let files_in = files_in(cas, trees, &key.instance, function, directory);
            files.extend(files_in.await.ok()?);
        }
        files.sort_unstable();
        Some(files)
    }
}

impl OpenParent {
    fn add_files(&mut self, files: impl IntoIterator<Item = (String, Digest)>) {
        for (path, digest) in files {
            let name = path.rsplit('/').next().unwrap_or_default();
            self.files
                .entry(digest)
                .or_default()
                .insert(name.to_owned());
        }
    }

    fn holds(&self, name: &str, digest: &Digest) -> bool {
        let names = self.files.get(digest);
        names.is_some_and(|names| names.contains(name))
    }
}

/// What people know a command by: where it runs, or what it calls.
fn name_of(command: &Command) -> String {
    match command.working_directory.as_str() {
        "" => command.arguments.first().cloned().unwrap_or_default(),
        directory => directory.to_owned(),
    }
}
