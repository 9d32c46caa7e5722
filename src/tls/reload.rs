//! Something made of files, made again when they change. A change is looked for whenever it is
//! used, which costs a `stat` for each file and needs neither a watcher nor a timer.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::TlsError;
use crate::task;

/// The newest `T` that could be made of its files.
pub struct Reloaded<T>(Arc<Source<T>>);

struct Source<T> {
    files: Vec<PathBuf>,
    make: Box<dyn Fn() -> Result<T, TlsError> + Send + Sync>,
    state: Mutex<State<T>>,
}

struct State<T> {
    /// What the files looked like when they were read last, with or without success.
    read: Vec<Option<Stamp>>,
    current: Arc<T>,
}

/// Differs when a file was written again, replaced, or reached by another symbolic link.
#[derive(PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

impl<T: Send + Sync + 'static> Reloaded<T> {
    /// Makes the first one of `files`.
    ///
    /// # Errors
    /// What `make` said.
    pub fn new<'a>(
        files: impl IntoIterator<Item = &'a Path>,
        make: impl Fn() -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        let files: Vec<PathBuf> = files.into_iter().map(Path::to_owned).collect();
        // Before they are read: what is written in between is then seen as a change.
        let read = stamps(&files);
        let current = Arc::new(make()?);
        Ok(Reloaded(Arc::new(Source {
            files,
            make: Box::new(make),
            state: Mutex::new(State { read, current }),
        })))
    }

    /// The newest one. Files that changed into something unusable are reported once, and what
    /// was made before stays in use.
    pub async fn current(&self) -> Arc<T> {
        let source = self.0.clone();
        match task::blocking("TLS files", move || source.refresh()).await {
            Some(current) => current,
            None => self.0.state.lock().current.clone(),
        }
    }
}

impl<T> Source<T> {
    fn refresh(&self) -> Arc<T> {
        let mut state = self.state.lock();
        let now = stamps(&self.files);
        if now != state.read {
            state.read = now;
            match (self.make)() {
                Ok(made) => {
                    tracing::info!(files = ?self.files, "TLS files have changed and are in use");
                    state.current = Arc::new(made);
                }
                Err(error) => {
                    tracing::warn!(%error, "TLS files have changed; what they held before stays in use");
                }
            }
        }
        state.current.clone()
    }
}

fn stamps(files: &[PathBuf]) -> Vec<Option<Stamp>> {
    files.iter().map(|path| Stamp::of(path)).collect()
}
