//! What recording and priming share: the backend, its CAS, the workspace, the records.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tokio::sync::mpsc;

use super::activity::Activities;
use super::flights::Flights;
use super::flights::budgets::Budgets;
use super::flights::leftovers::Leftovers;
use super::journal::Planned;
use super::journal::accounting::{Effort, Shortfall};
use super::journal::labels::Names;
use super::journal::store::JournalStore;
use super::planning::uses::Uses;
use super::records::parent::WeakKey;
use super::records::store::Store;
use super::sharing::share::Sharing;
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
    /// The way to shared records, if they are wanted.
    pub sharing: Option<Arc<Sharing>>,
    /// What is under way.
    pub activities: Activities,
    /// Whether predictions were of use.
    pub uses: Arc<Uses>,
    /// What is still executed for builds that are over.
    pub leftovers: Arc<Leftovers>,
    /// What priming may spend.
    pub budgets: Arc<Budgets>,
    /// Base actions that could not be adapted, ever.
    pub unadaptable: Arc<AtomicU64>,
    /// The journals of builds that have ended.
    pub journals: Arc<JournalStore>,
    /// What actions are called.
    pub names: Names,
    /// Told of what is planned and primed.
    pub news: mpsc::Sender<News>,
}

/// What primings tell the engine.
pub enum News {
    /// A result was primed for somebody.
    Primed(Beneficiary),
    /// Something was planned for somebody.
    Planned(Beneficiary, Vec<Planned>),
    /// Adapted actions were uploaded and submitted for somebody, or a build was recorded.
    Spent(Beneficiary, Effort),
    /// The journal of the build with this id is written, which shows what was not to be had.
    Reviewed(String, Shortfall),
}

/// For whom something is primed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Beneficiary {
    /// The parent.
    pub parent: WeakKey,
    /// Its build, if that has begun.
    pub build: Option<u64>,
}

#[cfg(test)]
impl Workshop {
    /// One without records, before `backend`.
    pub fn before(backend: Arc<dyn Backend>) -> Self {
        let (news, _) = mpsc::channel(1);
        Workshop {
            flights: Flights::new(1),
            cas: Cas::new(backend.clone()),
            backend,
            directories: DirectoryCache::default(),
            index: Arc::new(FileIndex::with(Vec::new())),
            store: Arc::new(Store::in_memory()),
            uses: Arc::new(Uses::of(Arc::new(Store::in_memory()))),
            leftovers: Arc::default(),
            budgets: Arc::default(),
            sharing: None,
            activities: Activities::default(),
            unadaptable: Arc::default(),
            journals: Arc::new(JournalStore::in_memory()),
            names: Names::default(),
            news,
        }
    }
}
