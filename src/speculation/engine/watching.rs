//! Which parents' sources are watched: those of the builds that were recorded last. When one of the
//! files is saved, what reads it is primed before anybody builds.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::speculation::records::parent::{Parent, WeakKey};
use crate::speculation::records::store::{KnownParent, Store};
use crate::task;
use crate::workspace::watch::{MAX_DIRECTORIES, Watch};

/// How many parents are watched at once; those that were recorded first are forgotten.
const MAX_WATCHED: usize = 16;
/// Times that something was saved of which the engine has not heard yet.
const WAITING: usize = 64;

/// See the module.
pub struct Watching {
    watch: Arc<Watch<WeakKey>>,
    /// The oldest first.
    watched: VecDeque<WeakKey>,
}

impl Watching {
    /// Watches what is recorded already. Also gives what tells whose sources were saved. `None` if
    /// the system has nothing to watch with, which is logged.
    pub fn start<'known>(
        store: &Arc<Store>,
        parents: impl Iterator<Item = &'known KnownParent>,
    ) -> Option<(Self, mpsc::Receiver<Vec<WeakKey>>)> {
        let (told, saved) = mpsc::channel(WAITING);
        let watch = match Watch::start(told, MAX_DIRECTORIES) {
            Ok(watch) => Arc::new(watch),
            Err(error) => {
                tracing::warn!(
                    %error,
                    "saved files cannot be seen, so priming waits for builds; perhaps \
                     fs.inotify.max_user_instances is reached"
                );
                return None;
            }
        };
        let mut latest: Vec<&KnownParent> = parents
            .filter(|known| known.identity.project_root().is_some())
            .collect();
        latest.sort_by_key(|known| known.last_seen_unix_ms);
        let old = latest.len().saturating_sub(MAX_WATCHED);
        let watched: VecDeque<WeakKey> = latest[old..].iter().map(|known| known.key).collect();
        let (loading, store, keys) = (watch.clone(), store.clone(), watched.clone());
        task::spawn("watched records", async move {
            task::blocking("watched records", move || {
                for key in keys {
                    match store.load(key) {
                        Ok(Some(parent)) => watch_sources(&loading, key, &parent),
                        // It is recorded anew with the next build.
                        Ok(None) => {}
                        Err(error) => tracing::warn!(%error, "records cannot be read"),
                    }
                }
            })
            .await;
        });
        Some((Watching { watch, watched }, saved))
    }

    /// How many directories are watched.
    pub fn directories(&self) -> usize {
        self.watch.directories()
    }

    /// A parent was recorded: it is watched as it is now.
    pub fn recorded(&mut self, key: WeakKey, parent: &Parent) {
        if parent.identity.project_root().is_none() {
            return;
        }
        self.watched.retain(|known| *known != key);
        self.watched.push_back(key);
        if self.watched.len() > MAX_WATCHED
            && let Some(oldest) = self.watched.pop_front()
        {
            self.watch.watch(oldest, Vec::new());
        }
        watch_sources(&self.watch, key, parent);
    }
}

fn watch_sources(watch: &Watch<WeakKey>, key: WeakKey, parent: &Parent) {
    let sources = parent.overlays.sources().into_iter();
    watch.watch(key, sources.map(|path| path.to_owned()).collect());
}
