//! The background task that turns ended builds into records: record, then generate, then store.
//! One build after the other, so that two builds of a parent never overwrite each other.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use super::archive::{Import, adopt_waiting};
use super::carry_over::carry_over;
use super::generate::{ReadFiles, Sources, generate, generate_for_texts};
use super::record::record;
use crate::cas::directories::Trees;
use crate::cas::{Digest, DigestFunction};
use crate::config::Mode;
use crate::meters::{self, METERS};
use crate::quick_map::QuickMap;
use crate::speculation::activity::Activity;
use crate::speculation::clients::caller::Caller;
use crate::speculation::clients::subaction::Subaction;
use crate::speculation::flights::FlightKey;
use crate::speculation::journal::accounting::{Accounting, Effort, Reasons, Shortfall};
use crate::speculation::journal::store::Fresh;
use crate::speculation::records::parent::{
    BaseAction, ExecutedParent, Parent, ParentIdentity, ParentKind, WeakKey,
};
use crate::speculation::workshop::{Beneficiary, News, Workshop};
use crate::task;

/// What the recorder is told.
pub enum Message {
    /// A build has ended.
    Ended(Box<Ended>),
    /// Records that were made elsewhere.
    Import(Box<Import>),
    /// The journal of a build that has ended is to be kept; it is the last time that it is, if
    /// nothing is in flight for the build any more.
    Journal {
        /// The journal.
        fresh: Box<Fresh>,
        /// Whether it is the last time.
        is_final: bool,
        /// Counts as activity until it is kept.
        activity: Activity,
    },
    /// Answered when all that came before it is recorded.
    Flush(oneshot::Sender<()>),
}

/// A build that has ended.
pub struct Ended {
    /// The build's id.
    pub id: String,
    /// The build's number.
    pub number: u64,
    /// Who ran it.
    pub caller: Arc<Caller>,
    /// What it asked for.
    pub subactions: QuickMap<FlightKey, Subaction>,
    /// What was executed, if it was for an action parent, and recorded parents that it may depend
    /// on.
    pub executed: Option<(Arc<ExecutedParent>, Vec<WeakKey>)>,
    /// The instances under which its actions are recorded, if it was for an action parent.
    pub instances: Vec<Arc<str>>,
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

/// Has `recorder` save what others have shared, unless it has too much to do.
pub fn saves_shared(recorder: &mpsc::Sender<Message>) -> impl Fn(Arc<Parent>) + use<> {
    // Weak: the recorder itself shares.
    let recorder = recorder.downgrade();
    move |parent| {
        if let Some(recorder) = recorder.upgrade() {
            // What is not saved is used all the same.
            let _ = recorder.try_send(Message::Import(Box::new(Import::Shared(parent))));
        }
    }
}

/// Records builds until there are no more.
pub async fn run(
    workshop: Workshop,
    mode: Mode,
    mut messages: mpsc::Receiver<Message>,
    recorded: mpsc::Sender<Recorded>,
) {
    // What recording the latest build took. Its journal comes next, and says so.
    let mut latest = (String::new(), Effort::default());
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
            Message::Journal {
                mut fresh,
                is_final,
                activity,
            } => {
                let (id, effort) = &latest;
                if fresh.build.id == *id {
                    fresh.build.accounting.spend(effort);
                    latest = Default::default();
                }
                keep_journal(&workshop, *fresh, is_final).await;
                drop(activity);
                continue;
            }
            Message::Flush(reply) => {
                // Whoever asked may have gone.
                let _ = reply.send(());
                continue;
            }
        };
        if latest.0 != build.id {
            latest = (build.id.clone(), Effort::default());
        }
        let mut by_place: HashMap<(Arc<str>, DigestFunction), Vec<Subaction>> = HashMap::new();
        for (key, subaction) in build.subactions {
            let place = (key.instance, key.action.function());
            by_place.entry(place).or_default().push(subaction);
        }
        if let (Some(action), true) = (&build.caller.action, by_place.is_empty()) {
            // What it runs was answered elsewhere; or it runs nothing, and others may depend on it
            // all the same.
            let unknown = build.instances.is_empty().then(|| action.instance.clone());
            let instances = build.instances.iter().cloned().chain(unknown);
            let function = action.key.function();
            by_place.extend(instances.map(|instance| ((instance, function), Vec::new())));
        }
        for ((instance, function), mut subactions) in by_place {
            let identity = build.caller.parent(&instance, function);
            subactions.sort_by_key(|subaction| subaction.order);
            let label = identity.label();
            let began = Instant::now();
            let whom = Beneficiary {
                parent: identity.weak_key(),
                build: Some(build.number),
            };
            let recording = Recording {
                workshop: &workshop,
                mode,
                identity,
                executed: build.executed.as_ref(),
            };
            match recording.record(&subactions).await {
                Ok(Saved {
                    parent,
                    dependencies,
                    dropped,
                    input_bytes,
                }) => {
                    let effort = Effort {
                        input_bytes,
                        generation: began.elapsed(),
                        ..Effort::default()
                    };
                    METERS.input_bytes.add(input_bytes);
                    METERS.generation.add(effort.generation);
                    latest.1 += effort;
                    // An engine that is gone needs to know nothing.
                    let _ = workshop.news.send(News::Spent(whom, effort)).await;
                    let activity = build.activity.clone();
                    let message = Recorded {
                        parent: parent.clone(),
                        dropped,
                        activity,
                    };
                    // An engine that is gone needs to know nothing.
                    let _ = recorded.send(message).await;
                    if let Some(sharing) = &workshop.sharing {
                        sharing.publish(&parent, &dependencies).await;
                    }
                }
                Err(reason) => tracing::warn!(parent = label, %reason, "a build was not recorded"),
            }
        }
    }
}

/// Makes the journal readable, and keeps it.
#[tracing::instrument(level = "debug", skip_all, fields(build = fresh.build.id))]
async fn keep_journal(workshop: &Workshop, fresh: Fresh, is_final: bool) {
    let Fresh { build, journal } = fresh;
    let page = journal.page(build, &workshop.names, &workshop.cas).await;
    let Accounting {
        unresolved, unused, ..
    } = &page.build.accounting;
    if is_final {
        count(&METERS.unresolved, unresolved);
        count(&METERS.unused, unused);
    }
    let reviewed = Shortfall {
        unadaptable: page.build.accounting.unadaptable.clone(),
        unresolved: unresolved.clone(),
        unused: unused.clone(),
    };
    let news = News::Reviewed(page.build.id.clone(), reviewed);
    // An engine that is gone needs to know nothing.
    let _ = workshop.news.send(news).await;
    let journals = workshop.journals.clone();
    // A panic is logged.
    task::blocking("keeping a journal", move || journals.save(&page)).await;
}

fn count<const N: usize>(meters: &meters::Reasons<N>, reasons: &Reasons) {
    for (reason, count) in reasons {
        // Reasons that were read from somewhere have been counted before.
        if let Cow::Borrowed(reason) = reason {
            meters.add(reason, *count);
        }
    }
}

/// What a build is recorded with.
struct Recording<'a> {
    workshop: &'a Workshop,
    mode: Mode,
    identity: ParentIdentity,
    executed: Option<&'a (Arc<ExecutedParent>, Vec<WeakKey>)>,
}

/// A build that was recorded.
struct Saved {
    parent: Arc<Parent>,
    /// Who its parent depends on.
    dependencies: Vec<ParentIdentity>,
    /// Parents that had to go.
    dropped: Vec<WeakKey>,
    /// Bytes of the inputs, each digest once.
    input_bytes: u64,
}

impl Recording<'_> {
    #[tracing::instrument(level = "debug", skip_all, fields(parent = self.identity.label()))]
    async fn record(self, subactions: &[Subaction]) -> Result<Saved, String> {
        let Recording {
            workshop,
            mode,
            identity,
            executed,
        } = self;
        let known = load(workshop, vec![identity.weak_key()]).await?.pop();
        let mut parent = known.unwrap_or_else(|| Parent::new(identity.clone()));
        parent.identity = identity;
        let now = crate::clock::now_unix_ms();
        let unreadable = |status| format!("its actions cannot be read: {status}");
        let mut subactions = subactions.to_vec();
        if let Some((executed, _)) = executed {
            let earlier = Arc::new(parent.clone());
            let carried = carry_over(workshop, earlier, executed, &subactions);
            let carried = carried.await.map_err(unreadable)?;
            subactions.extend(carried.adapted);
            // It runs all of its actions each time: others are not its any more.
            let unchanged = carried.unchanged.iter().map(|base| base.digest);
            let asked = subactions.iter().map(|subaction| subaction.action);
            let kept: HashSet<Digest> = unchanged.chain(asked).collect();
            parent.actions.retain(|_, base| kept.contains(&base.digest));
            for base in parent.actions.values_mut() {
                Arc::make_mut(base).last_seen_unix_ms = now;
            }
            parent.executed = Some(executed.clone());
        }
        let unrecorded = record(workshop, &mut parent, &subactions, now)
            .await
            .map_err(unreadable)?;
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
        let mut trees = load_trees(workshop, &instance, roots).await?;
        // What the CAS has lost cannot be adapted again.
        parent
            .actions
            .retain(|_, base| trees.contains_key(&base.input_root));
        let actions: Vec<_> = parent.actions.values().cloned().collect();
        let mut others: Vec<Arc<Parent>> = Vec::new();
        let mut staged = ReadFiles::default();
        if let (Some((executed, keys)), ParentKind::Action(action)) =
            (executed, &parent.identity.kind)
        {
            parent.text_roots = text_roots(workshop, &action.instance, executed, &actions).await?;
            let roots = parent.text_roots.clone();
            trees.extend(load_trees(workshop, &action.instance, roots.clone()).await?);
            let known = load(workshop, keys.clone()).await?;
            let inputs: Vec<_> = actions.iter().map(|base| base.input_root).collect();
            let found = task::blocking("generation", move || {
                let read = ReadFiles::below(inputs, &trees);
                let staged = ReadFiles::below(roots, &trees);
                let is_used = |other: &Parent| read.depend_on(other) || staged.hold_most_of(other);
                let others = known.into_iter().filter(is_used).map(Arc::new).collect();
                (others, staged, trees)
            });
            (others, staged, trees) = found.await.ok_or("finding what it depends on failed")?;
            let of_others = others.iter().filter_map(|other| other.executed.as_ref());
            let roots = of_others
                .chain([executed])
                .map(|executed| executed.input_root);
            trees.extend(load_trees(workshop, &action.instance, roots.collect()).await?);
        }
        let dependencies = others.iter().map(|other| other.identity.clone()).collect();
        let store = workshop.store.clone();
        let index = workshop.index.clone();
        let label = parent.identity.label();
        let saved = task::blocking("generation", move || {
            let _generation = tracing::debug_span!("generation", actions = actions.len()).entered();
            let input_bytes = input_bytes(&actions, &trees);
            let sources = match &parent.executed {
                Some(executed) => Sources::Tree {
                    own: executed.input_root,
                    others: &others,
                },
                None => Sources::Disk(&index),
            };
            parent.overlays = generate(&actions, &trees, &sources, mode);
            if !generate_for_texts(&staged, &others, &trees, mode, &mut parent.overlays) {
                parent.text_roots.clear();
            }
            let dropped = store.save(&parent, &index.take_unsaved());
            (Arc::new(parent), dropped, input_bytes)
        })
        .await;
        let Some((parent, dropped, input_bytes)) = saved else {
            return Err("generating its overlays failed".to_owned());
        };
        tracing::info!(
            parent = label,
            actions = parent.actions.len(),
            overlays = parent.overlays.iter().count(),
            "recorded a build"
        );
        let dropped = dropped.unwrap_or_else(|error| {
            // A full disk, say: the records stay in memory as long as somebody holds them.
            tracing::warn!(parent = label, %error, "records could not be saved");
            Vec::new()
        });
        Ok(Saved {
            parent,
            dependencies,
            dropped,
            input_bytes,
        })
    }
}

/// Bytes of all that stands in the input trees of `actions`, directories included, each digest once.
fn input_bytes(actions: &[Arc<BaseAction>], trees: &Trees) -> u64 {
    let mut seen: HashSet<Digest> = HashSet::new();
    let mut open: Vec<Digest> = actions.iter().map(|base| base.input_root).collect();
    while let Some(digest) = open.pop() {
        if !seen.insert(digest) {
            continue;
        }
        if let Some(directory) = trees.get(&digest) {
            open.extend(directory.directories.iter().map(|(_, digest)| *digest));
            seen.extend(directory.files.iter().map(|(_, digest)| *digest));
        }
    }
    seen.iter().map(Digest::size).sum()
}

/// The roots of trees that the text of `actions` names, where that is text of the parent itself.
async fn text_roots(
    workshop: &Workshop,
    instance: &str,
    executed: &ExecutedParent,
    actions: &[Arc<BaseAction>],
) -> Result<Vec<Digest>, String> {
    let texts = actions.iter().flat_map(|base| &base.texts);
    let texts: HashSet<_> = texts.filter(|text| executed.texts.contains(text)).collect();
    let digests = texts.into_iter().filter_map(|text| text.parse().ok());
    let roots = workshop.directories.roots(&workshop.cas, instance, digests);
    roots.await.map_err(unreadable_trees)
}

/// Those of the parents that are recorded.
async fn load(workshop: &Workshop, keys: Vec<WeakKey>) -> Result<Vec<Parent>, String> {
    let store = workshop.store.clone();
    let loading = task::blocking("loading records", move || {
        let loaded = keys.into_iter().map(|key| store.load(key));
        let loaded = loaded.filter_map(Result::transpose);
        loaded.collect::<Result<Vec<_>, _>>()
    });
    match loading.await {
        Some(loaded) => loaded.map_err(|error| error.to_string()),
        None => Err("loading earlier records failed".to_owned()),
    }
}

async fn load_trees(
    workshop: &Workshop,
    instance: &str,
    roots: Vec<Digest>,
) -> Result<Trees, String> {
    let trees = workshop.directories.load(&workshop.cas, instance, roots);
    let trees = trees.await;
    trees.map_err(unreadable_trees)
}

fn unreadable_trees(status: Status) -> String {
    format!("its input trees cannot be read: {status}")
}
