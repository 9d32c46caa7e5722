//! The database's file: opened, created, or put aside if it is broken.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use redb::backends::InMemoryBackend;
use redb::{Database, DatabaseError, StorageError};

/// Its name in the directory of the store.
pub(super) const FILE_NAME: &str = "records.redb";
/// Memory for its pages.
const CACHE_BYTES: usize = 16 * 1024 * 1024;

/// Why there is no store on disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is locked.
    #[error("another primed uses it; give each its own --state-dir")]
    InUse,
    /// Its file or directory cannot be used.
    #[error("{0}; check that it exists and can be written")]
    Io(#[from] io::Error),
    /// What is in the file cannot be.
    #[error("{0}")]
    Database(Box<DatabaseError>),
}

impl From<DatabaseError> for OpenError {
    fn from(error: DatabaseError) -> Self {
        match error {
            DatabaseError::DatabaseAlreadyOpen => OpenError::InUse,
            DatabaseError::Storage(StorageError::Io(error)) => OpenError::Io(error),
            other => OpenError::Database(Box::new(other)),
        }
    }
}

pub(super) fn make_directory(directory: &Path) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
}

pub(super) fn open_file(directory: &Path) -> Result<Database, OpenError> {
    make_directory(directory)?;
    let path = directory.join(FILE_NAME);
    match create(&path) {
        // Garbage, or cut short, or of a version that this one does not read.
        Err(reason) if path.exists() && is_broken(&reason) => {
            let aside = (1..)
                .map(|number| directory.join(format!("{FILE_NAME}.broken-{number}")))
                .find(|aside| !aside.exists())
                .unwrap_or_else(|| directory.join("broken"));
            std::fs::rename(&path, &aside)?;
            tracing::warn!(
                kept_as = %aside.display(), %reason,
                "the record store is broken; it was put aside and a new one begun"
            );
            Ok(create(&path)?)
        }
        opened => Ok(opened?),
    }
}

pub(super) fn create_in_memory() -> Result<Database, DatabaseError> {
    Database::builder().create_with_backend(InMemoryBackend::new())
}

pub(super) fn create(path: &Path) -> Result<Database, DatabaseError> {
    let open = || {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(StorageError::Io)?;
        Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create_file(file)
    };
    // redb asserts on some kinds of damage: a store must never take the proxy down.
    std::panic::catch_unwind(open).unwrap_or_else(|_| {
        let damage = StorageError::Corrupted("it cannot be parsed".to_owned());
        Err(DatabaseError::Storage(damage))
    })
}

fn is_broken(error: &DatabaseError) -> bool {
    match error {
        DatabaseError::Storage(StorageError::Corrupted(_))
        | DatabaseError::RepairAborted
        | DatabaseError::UpgradeRequired(_) => true,
        DatabaseError::Storage(StorageError::Io(error)) => matches!(
            error.kind(),
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
        ),
        _ => false,
    }
}
