//! What recording and priming share: the backend, its CAS, the workspace, the records.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tokio::sync::mpsc;

use super::activity::Activities;
use super::flights::Flights;
use super::parent::WeakKey;
use super::share::Sharing;
use super::store::Store;
use crate::backend::Backend;
use crate::cas::directories::DirectoryCache;
use crate::cas::transfer::Cas;
use crate::workspace::index::FileIndex;

/// Handles on everything that works on records; clones are handles on the same.
#[derive(Clone)]
pub struct Workshop {
    /// What is in flight.
    pub flights: Arc<Flights>,
    /// Where actions are executed and looked up.
    pub backend: Arc<dyn Backend>,
    /// Where blobs are read and uploaded.
    pub cas: Cas,
    /// Parsed directories.
    pub directories: DirectoryCache,
    /// Source files.
    pub index: Arc<FileIndex>,
    /// The records.
    pub store: Arc<Store>,
    /// Whether records are shared, and with whom.
    pub sharing: Option<Arc<Sharing>>,
    /// What is under way.
    pub activities: Activities,
    /// Base actions that could not be adapted, ever.
    pub unadaptable: Arc<AtomicU64>,
    /// Told of each result that was primed.
    pub primed: mpsc::Sender<Primed>,
}

/// For whom a result was primed.
#[derive(Clone, Copy, Debug)]
pub struct Primed {
    /// The parent.
    pub parent: WeakKey,
    /// Its build, if that has begun.
    pub build: Option<u64>,
}

#[cfg(test)]
impl Workshop {
    /// One without records that shares, before `backend`. Nobody saves what it obtains.
    pub fn sharing(backend: Arc<dyn Backend>) -> Self {
        let (recorder, _) = mpsc::channel(1);
        let (primed, _) = mpsc::channel(1);
        Workshop {
            flights: Flights::new(1),
            cas: Cas::new(backend.clone()),
            backend,
            directories: DirectoryCache::default(),
            index: Arc::new(FileIndex::with(Vec::new())),
            store: Arc::new(Store::in_memory()),
            sharing: Some(Arc::new(Sharing::new(&recorder))),
            activities: Activities::default(),
            unadaptable: Arc::default(),
            primed,
        }
    }
}
