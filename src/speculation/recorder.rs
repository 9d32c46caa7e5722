//! The background task that turns ended builds into records: record, then generate, then store.
//! One build after the other, so that two builds of a parent never overwrite each other.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::activity::Activity;
use super::archive::{Import, adopt_waiting};
use super::callers::Caller;
use super::flights::FlightKey;
use super::generate::{Sources, generate};
use super::parent::{Parent, ParentIdentity, WeakKey};
use super::record::{Subaction, record};
use super::share;
use super::workshop::Workshop;
use crate::config::Mode;
use crate::task;

/// What the recorder is told.
pub enum Message {
    /// A build has ended.
    Ended(Box<Ended>),
    /// Records that were made elsewhere.
    Import(Box<Import>),
    /// Answered when all that came before it is recorded.
    Flush(oneshot::Sender<()>),
}

/// A build that has ended.
pub struct Ended {
    /// Who ran it.
    pub caller: Caller,
    /// What it asked for.
    pub subactions: HashMap<FlightKey, Subaction>,
    /// Counts as activity until it is recorded.
    pub activity: Activity,
}

/// Records that were replaced, or dropped to make room.
pub struct Recorded {
    /// The parent as it is recorded now.
    pub parent: Arc<Parent>,
    /// Parents that had to go.
    pub dropped: Vec<WeakKey>,
    /// Counts as activity until the records are in use.
    pub activity: Activity,
}

/// Records builds until there are no more.
pub async fn run(
    workshop: Workshop,
    mode: Mode,
    mut messages: mpsc::Receiver<Message>,
    recorded: mpsc::Sender<Recorded>,
) {
    while let Some(message) = messages.recv().await {
        let build = match message {
            Message::Ended(build) => build,
            Message::Import(import) => {
                if let Some(message) = import.run(&workshop).await {
                    // An engine that is gone needs to know nothing.
                    let _ = recorded.send(message).await;
                }
                continue;
            }
            Message::Flush(reply) => {
                // Whoever asked may have gone.
                let _ = reply.send(());
                continue;
            }
        };
        let mut by_instance: HashMap<Arc<str>, Vec<Subaction>> = HashMap::new();
        for (key, subaction) in build.subactions {
            by_instance.entry(key.instance).or_default().push(subaction);
        }
        for (instance, mut subactions) in by_instance {
            let identity = build.caller.parent(&instance);
            subactions.sort_by_key(|subaction| subaction.order);
            let label = identity.label();
            match record_build(&workshop, mode, identity, &subactions).await {
                Ok((parent, dropped)) => {
                    let activity = build.activity.clone();
                    let message = Recorded {
                        parent: parent.clone(),
                        dropped,
                        activity,
                    };
                    // An engine that is gone needs to know nothing.
                    let _ = recorded.send(message).await;
                    share::publish(&workshop, &parent).await;
                }
                Err(reason) => tracing::warn!(parent = label, %reason, "a build was not recorded"),
            }
        }
    }
}

async fn record_build(
    workshop: &Workshop,
    mode: Mode,
    identity: ParentIdentity,
    subactions: &[Subaction],
) -> Result<(Arc<Parent>, Vec<WeakKey>), String> {
    let store = workshop.store.clone();
    let weak_key = identity.weak_key();
    let known = task::blocking("loading records", move || store.load(weak_key)).await;
    let known = match known {
        Some(Ok(known)) => known,
        Some(Err(error)) => return Err(error.to_string()),
        None => return Err("loading its earlier records failed".to_owned()),
    };
    let mut parent = known.unwrap_or_else(|| Parent::new(identity.clone()));
    parent.identity = identity;
    let now = crate::clock::now_unix_ms();
    let unrecorded = record(&workshop.cas, &mut parent, subactions, now)
        .await
        .map_err(|status| format!("its actions cannot be read: {status}"))?;
    if unrecorded > 0 {
        tracing::info!(
            parent = parent.identity.label(),
            unrecorded,
            "some actions were not recorded: they are not in the CAS, or must not be repeated"
        );
    }
    adopt_waiting(workshop, &mut parent).await;
    let instance = parent.identity.instance.clone();
    let roots: Vec<_> = parent
        .actions
        .values()
        .map(|base| base.input_root)
        .collect();
    let trees = workshop
        .directories
        .load(&workshop.cas, &instance, roots)
        .await
        .map_err(|status| format!("its input trees cannot be read: {status}"))?;
    // What the CAS has lost cannot be adapted again.
    parent
        .actions
        .retain(|_, base| trees.contains_key(&base.input_root));
    let store = workshop.store.clone();
    let index = workshop.index.clone();
    let label = parent.identity.label();
    let saved = task::blocking("generation", move || {
        let actions: Vec<_> = parent.actions.values().cloned().collect();
        parent.overlays = generate(&actions, &trees, &Sources::Disk(&index), mode);
        let dropped = store.save(&parent, &index.take_unsaved());
        (Arc::new(parent), dropped)
    })
    .await;
    let Some((parent, dropped)) = saved else {
        return Err("generating its overlays failed".to_owned());
    };
    tracing::info!(
        parent = label,
        actions = parent.actions.len(),
        overlays = parent.overlays.iter().count(),
        "recorded a build"
    );
    match dropped {
        Ok(dropped) => Ok((parent, dropped)),
        Err(error) => {
            // A full disk, say: the records stay in memory as long as somebody holds them.
            tracing::warn!(parent = label, %error, "records could not be saved");
            Ok((parent, Vec::new()))
        }
    }
}
