//! The records for those who ask for them: lists, exports and imports. The daemon answers its admin
//! socket with it; where no daemon runs, commands use it on the store itself.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use super::record::record;
use super::recorder::{self, Recorded};
use crate::reapi::ActionResult;
use crate::reapi::buildstream::v2::SpeculativeActions;
use crate::speculation::clients::subaction::Subaction;
use crate::speculation::records::interchange::{self, Interchange, Malformed, Names};
use crate::speculation::records::parent::{BaseAction, Parent, WeakKey};
use crate::speculation::records::store::{Store, StoreError};
use crate::speculation::workshop::Workshop;
use crate::{clock, task};

/// What is asked of the daemon's records.
pub enum Request {
    /// Which parents there are.
    List(Reply<Vec<Listed>>),
    /// One of them, as a message.
    Export(WeakKey, Reply<Bytes>),
    /// To take in a message.
    Import(Box<Import>),
}

/// Where the answer goes. It is dropped without one if there is too much to do.
pub type Reply<T> = oneshot::Sender<Result<T, ArchiveError>>;

/// Why records are not given or taken.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// Nothing is recorded under this key.
    #[error("nothing is recorded under {0}; `primed export --list` shows what is")]
    Unknown(WeakKey),
    /// The message cannot be read.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The message does not say which parent it is about.
    #[error(
        "primed did not write it, so it does not say which parent it is about; name that with --as WEAK_KEY"
    )]
    Nameless,
    /// The message is about another parent than was said.
    #[error("these are the records of {0}, not of the parent that --as names")]
    OfAnother(WeakKey),
    /// Other records would be lost.
    #[error(
        "{label} is recorded here too, as {key}; --replace puts the imported records in their place"
    )]
    Recorded {
        /// The parent.
        key: WeakKey,
        /// For people.
        label: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The backend cannot be asked for what the message names.
    #[error("the backend cannot be asked for its actions: {0}")]
    Backend(Status),
    /// A task panicked.
    #[error("it failed; primed's log says why")]
    Panicked,
}

/// A recorded parent in a list.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listed {
    /// Under which it is recorded, in hexadecimal digits.
    pub weak_key: String,
    /// For people.
    pub label: String,
    /// REAPI's instance name, of its actions.
    pub instance: String,
    /// REAPI's name of their digest function.
    pub digest_function: String,
    /// How many base actions are recorded of it.
    pub actions: usize,
    /// Whether all there is of it is a message that waits for its first build.
    pub waits: bool,
}

/// What became of an imported message.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Imported {
    /// The parent that it is about.
    pub weak_key: String,
    /// For people.
    pub outcome: String,
}

/// Every recorded parent, by label. Blocks.
///
/// # Errors
/// When the store cannot be read.
pub fn list(store: &Store) -> Result<Vec<Listed>, ArchiveError> {
    let parents = store.parents()?;
    let waiting = store.imports()?.into_iter();
    let waiting = waiting.filter(|key| parents.iter().all(|known| known.key != *key));
    let waiting = waiting.map(|key| Listed {
        weak_key: key.to_string(),
        label: "imported; used from its first recorded build on".to_owned(),
        instance: String::new(),
        digest_function: String::new(),
        actions: 0,
        waits: true,
    });
    let mut listed: Vec<Listed> = waiting.collect();
    for known in &parents {
        listed.push(Listed {
            weak_key: known.key.to_string(),
            label: known.identity.label(),
            instance: known.identity.instance.to_string(),
            digest_function: known.identity.digest_function.to_string(),
            actions: store.actions_of(known.key)?,
            waits: false,
        });
    }
    listed.sort_by(|one, other| (&one.label, &one.weak_key).cmp(&(&other.label, &other.weak_key)));
    Ok(listed)
}

/// The records under `key` as a message; as it was imported, if they have not changed since.
/// Single actions have overlays of their own only if there is a `workshop` to read their trees with.
///
/// # Errors
/// `Unknown`, or when the store cannot be read.
pub async fn export(
    store: &Arc<Store>,
    workshop: Option<&Workshop>,
    key: WeakKey,
) -> Result<Bytes, ArchiveError> {
    let (parent, import, names) = blocking(store, move |store| {
        let names = Names::of(&store.parents()?);
        Ok((store.load(key)?, store.import(key)?, names))
    })
    .await?;
    match (parent, import) {
        (None, Some(message)) => Ok(message),
        (Some(_), Some(message)) if is_own(&message) => Ok(message),
        (Some(parent), _) => {
            let trees = match workshop {
                Some(workshop) => trees_of(workshop, &parent).await,
                None => None,
            };
            let message = interchange::message(&parent, &names, trees.as_ref());
            Ok(message.encode_to_vec().into())
        }
        (None, None) => Err(ArchiveError::Unknown(key)),
    }
}

async fn trees_of(workshop: &Workshop, parent: &Parent) -> Option<crate::cas::directories::Trees> {
    let instance = &parent.identity.instance;
    let roots = parent.actions.values().map(|base| base.input_root);
    let trees = workshop
        .directories
        .load(&workshop.cas, instance, roots.collect::<Vec<_>>());
    trees
        .await
        .inspect_err(|status| tracing::warn!(%status, "input trees cannot be read for an export"))
        .ok()
}

fn is_own(message: &Bytes) -> bool {
    let decoded = SpeculativeActions::decode(message.clone());
    decoded.is_ok_and(|message| !message.primed_records.is_empty())
}

async fn blocking<T: Send + 'static>(
    store: &Arc<Store>,
    work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, ArchiveError> {
    let store = store.clone();
    let done = task::blocking("records", move || work(&store)).await;
    Ok(done.ok_or(ArchiveError::Panicked)??)
}

/// Has a request dealt with. Imports go the way of what is recorded, one after the other.
pub fn dispatch(request: Request, workshop: &Workshop, recorder: &mpsc::Sender<recorder::Message>) {
    let workshop = workshop.clone();
    // Whoever asked may have gone.
    match request {
        Request::List(reply) => {
            task::spawn("records", async move {
                let store = workshop.store.clone();
                let listed = task::blocking("records", move || list(&store)).await;
                let _ = reply.send(listed.unwrap_or(Err(ArchiveError::Panicked)));
            });
        }
        Request::Export(key, reply) => {
            task::spawn("records", async move {
                let exported = export(&workshop.store, Some(&workshop), key).await;
                let _ = reply.send(exported);
            });
        }
        Request::Import(import) => {
            // Dropping what does not fit is the answer.
            let _ = recorder.try_send(recorder::Message::Import(import));
        }
    }
}

/// Records that are to be taken in.
pub enum Import {
    /// A file of a user.
    Message(Incoming, Reply<Imported>),
    /// What another primed has shared.
    Shared(Arc<Parent>),
}

/// A message, and what its bearer says about it.
#[derive(Clone, Debug)]
pub struct Incoming {
    /// The parent that it is about, if that was said.
    pub key: Option<WeakKey>,
    /// A SpeculativeActions.
    pub message: Bytes,
    /// Whether it may take the place of other records.
    pub replace: bool,
}

impl Import {
    /// Takes them in. Returns what is recorded now, if that has changed.
    pub(super) async fn run(self, workshop: &Workshop) -> Option<Recorded> {
        let activity = workshop.activities.begin();
        let taken = match self {
            Import::Message(incoming, reply) => {
                let (answer, taken) = match import(&workshop.store, Some(workshop), incoming).await
                {
                    Ok((imported, taken)) => (Ok(imported), taken),
                    Err(error) => (Err(error), None),
                };
                // Whoever asked may have gone.
                let _ = reply.send(answer);
                taken
            }
            Import::Shared(parent) => {
                let key = parent.identity.weak_key();
                let saved = blocking(&workshop.store, move |store| {
                    if store.load(key)?.is_some() {
                        return Ok(None);
                    }
                    let dropped = store.save(&parent, &[])?;
                    Ok(Some(Taken { parent, dropped }))
                });
                saved.await.unwrap_or_else(|error| {
                    tracing::warn!(%error, "shared records could not be saved");
                    None
                })
            }
        };
        taken.map(|Taken { parent, dropped }| Recorded {
            parent,
            dropped,
            activity,
        })
    }
}

/// Records that were saved.
pub struct Taken {
    parent: Arc<Parent>,
    /// Those that had to go.
    dropped: Vec<WeakKey>,
}

/// Takes in a message. Nothing is lost: if it cannot be used whole, the records are as they were.
///
/// # Errors
/// `ArchiveError`.
pub async fn import(
    store: &Arc<Store>,
    workshop: Option<&Workshop>,
    incoming: Incoming,
) -> Result<(Imported, Option<Taken>), ArchiveError> {
    match interchange::read(incoming.message.clone())? {
        Interchange::Records(parent) => import_records(store, *parent, incoming).await,
        Interchange::Foreign(message) => import_foreign(store, workshop, message, incoming).await,
    }
}

async fn import_records(
    store: &Arc<Store>,
    parent: Parent,
    incoming: Incoming,
) -> Result<(Imported, Option<Taken>), ArchiveError> {
    let key = parent.identity.weak_key();
    if incoming.key.is_some_and(|named| named != key) {
        return Err(ArchiveError::OfAnother(key));
    }
    let known = blocking(store, move |store| store.load(key)).await?;
    let label = parent.identity.label();
    let is_new = known.is_none();
    if let Some(known) = known
        && interchange::records(&known) != interchange::records(&parent)
        && !incoming.replace
    {
        return Err(ArchiveError::Recorded { key, label });
    }
    let outcome = match (is_new, parent.actions.len()) {
        (true, actions) => format!("{actions} actions of {label}"),
        (false, actions) => format!("{actions} actions of {label}, in place of earlier records"),
    };
    let taken = blocking(store, move |store| {
        let dropped = store.save_import(&parent, &incoming.message)?;
        let parent = Arc::new(parent);
        Ok(Taken { parent, dropped })
    });
    let weak_key = key.to_string();
    Ok((Imported { weak_key, outcome }, Some(taken.await?)))
}

async fn import_foreign(
    store: &Arc<Store>,
    workshop: Option<&Workshop>,
    message: SpeculativeActions,
    incoming: Incoming,
) -> Result<(Imported, Option<Taken>), ArchiveError> {
    let key = incoming.key.ok_or(ArchiveError::Nameless)?;
    let weak_key = key.to_string();
    let known = blocking(store, move |store| store.load(key)).await?;
    if let (Some(workshop), Some(mut parent)) = (workshop, known) {
        let added = adopt(workshop, &mut parent, &message).await?;
        let label = parent.identity.label();
        let outcome = format!("{added} actions added to those of {label}");
        let taken = blocking(store, move |store| {
            let dropped = store.save(&parent, &[])?;
            let parent = Arc::new(parent);
            Ok(Taken { parent, dropped })
        });
        return Ok((Imported { weak_key, outcome }, Some(taken.await?)));
    }
    blocking(store, move |store| {
        store.keep_import(key, &incoming.message)
    })
    .await?;
    let outcome = format!(
        "{} actions wait for the next recorded build of this parent",
        message.actions.len()
    );
    Ok((Imported { weak_key, outcome }, None))
}

/// Adds to the records of a parent that is about to be saved what was imported of it before it
/// was known here.
pub(super) async fn adopt_waiting(workshop: &Workshop, parent: &mut Parent) {
    let key = parent.identity.weak_key();
    let adopted = async {
        let waiting = blocking(&workshop.store, move |store| store.import(key)).await?;
        let Some(Interchange::Foreign(message)) = waiting.map(interchange::read).transpose()?
        else {
            return Ok(0);
        };
        adopt(workshop, parent, &message).await
    };
    let adopted: Result<usize, ArchiveError> = adopted.await;
    if let Err(error) = adopted {
        tracing::warn!(%error, weak_key = %key, "imported records could not be used");
    }
}

/// Adds what others have recorded of a parent: actions whose command is not recorded yet, and
/// overlays. What is recorded here outweighs. Returns how many actions were added.
async fn adopt(
    workshop: &Workshop,
    parent: &mut Parent,
    message: &SpeculativeActions,
) -> Result<usize, ArchiveError> {
    let instance = parent.identity.instance.clone();
    let bases = parent.actions.values();
    let first = bases.map(|base| base.order + 1).max().unwrap_or_default();
    let function = parent.identity.digest_function;
    let mut subactions = Vec::new();
    for (order, action) in (first..).zip(&message.actions) {
        let Ok(action) = function.read(action.base_action_digest.as_ref()) else {
            continue;
        };
        let result = workshop.backend.action_result(&instance, action).await;
        let result = result.map_err(ArchiveError::Backend)?;
        subactions.push(Subaction {
            action,
            // What it wrote may be forgotten; its command is worth repeating all the same.
            result: Arc::new(result.unwrap_or_else(ActionResult::default)),
            order,
            working_directory: None,
            file_system_root: "/".into(),
        });
    }
    subactions.retain(|subaction| subaction.result.exit_code == 0);
    let mut others = Parent::new(parent.identity.clone());
    let now = clock::now_unix_ms();
    record(workshop, &mut others, &subactions, now)
        .await
        .map_err(ArchiveError::Backend)?;
    let mut added = 0;
    let place = only_place(parent);
    let mut recorded_as = HashMap::new();
    for (mut key, mut base) in others.actions {
        let mut known = parent.actions.iter();
        match known.find(|(known, _)| known.action_key == key.action_key) {
            Some((_, known)) => {
                recorded_as.insert(base.digest, known.digest);
            }
            None => {
                if let Some((mount, file_system_root)) = &place {
                    key.mount = Some(mount.clone());
                    let base = Arc::make_mut(&mut base);
                    base.mount = Some(mount.clone());
                    base.file_system_root = file_system_root.clone();
                }
                parent.actions.insert(key, base);
                added += 1;
            }
        }
    }
    let names = blocking(&workshop.store, |store| Ok(Names::of(&store.parents()?))).await?;
    interchange::add_overlays(parent, message, &names, &recorded_as);
    Ok(added)
}

/// What the input trees of a parent's actions stand for on disk, if that is one place for all: then
/// those of actions that others recorded of it do too.
fn only_place(parent: &Parent) -> Option<(PathBuf, PathBuf)> {
    let mut bases = parent.actions.values();
    let first = bases.next()?;
    let same = |base: &Arc<BaseAction>| {
        (&base.mount, &base.file_system_root) == (&first.mount, &first.file_system_root)
    };
    let place = (first.mount.clone()?, first.file_system_root.clone());
    bases.all(same).then_some(place)
}
