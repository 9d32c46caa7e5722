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

#[cfg(test)]
mod tests {
    use super::*;

    /// What is made of a file: its content, which must be a number.
    fn number(path: &Path) -> Result<u32, TlsError> {
        let content = std::fs::read_to_string(path).unwrap_or_default();
        content.parse().map_err(|_| TlsError {
            flag: "--number",
            value: content,
            reason: "no number".to_owned(),
            hint: "write digits",
        })
    }

    #[tokio::test]
    async fn what_changes_is_made_anew_and_what_breaks_is_kept() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("number");
        let write = |name: &str, content: &str| {
            std::fs::write(scratch.path().join(name), content).unwrap();
        };
        write("number", "1");
        let reloaded = {
            let path = path.clone();
            Reloaded::new([path.clone().as_path()], move || number(&path)).unwrap()
        };
        assert_eq!(*reloaded.current().await, 1);
        let unchanged = reloaded.current().await;
        assert!(Arc::ptr_eq(&unchanged, &reloaded.current().await));

        write("new", "2");
        std::fs::rename(scratch.path().join("new"), &path).unwrap();
        assert_eq!(*reloaded.current().await, 2, "replaced");
        write("number", "broken");
        assert_eq!(*reloaded.current().await, 2, "broken");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(*reloaded.current().await, 2, "gone");
        write("third", "3");
        std::os::unix::fs::symlink("third", &path).unwrap();
        assert_eq!(*reloaded.current().await, 3, "linked");
    }

    #[test]
    fn what_is_broken_at_the_start_is_an_error() {
        let broken = Reloaded::new([Path::new("/nonexistent")], || {
            number(Path::new("/nonexistent"))
        });
        assert!(broken.is_err());
    }
}
