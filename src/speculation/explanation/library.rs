//! The journals of all builds that are known: those that run, those that have just ended, and those
//! on disk.

use std::collections::HashMap;
use std::sync::Arc;

use crate::speculation::journal::accounting::BuildStatus;
use crate::speculation::journal::page::Page;
use crate::speculation::journal::store::{Found, Fresh, NotFound, unique};
use crate::speculation::workshop::Workshop;
use crate::task;

/// Why there is no journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// It is not known which one is meant.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// It cannot be read.
    #[error("the journal of build {0} cannot be read: {1}")]
    Unreadable(String, std::io::Error),
}

/// The journals as they are at one time.
pub struct Library {
    /// Of builds that run, by id, as far as they are wanted.
    pub open: HashMap<String, Fresh>,
    /// All builds, newest first.
    pub builds: Vec<BuildStatus>,
    /// Where the rest is found.
    pub workshop: Workshop,
}

impl Library {
    /// The journal of the one build whose id begins with `prefix`.
    ///
    /// # Errors
    /// `JournalError`.
    pub async fn find(&self, prefix: &str) -> Result<Page, JournalError> {
        let ids = self.builds.iter().map(|build| build.id.as_str());
        self.page(unique(ids, prefix)?).await
    }

    /// The journal of the build whose id is `id`.
    ///
    /// # Errors
    /// `JournalError`.
    pub async fn page(&self, id: &str) -> Result<Page, JournalError> {
        let Workshop {
            journals,
            names,
            cas,
            ..
        } = &self.workshop;
        let fresh = match self.open.get(id) {
            Some(fresh) => fresh.clone(),
            None => match journals.find(id) {
                Some(Found::Fresh(fresh)) => *fresh,
                Some(Found::Kept(source)) => {
                    let read = task::blocking("reading a journal", move || source.read()).await;
                    let read = read.unwrap_or_else(|| Err(std::io::Error::other("malformed")));
                    return read.map_err(|error| JournalError::Unreadable(id.to_owned(), error));
                }
                None => return Err(NotFound::Unknown(id.to_owned()).into()),
            },
        };
        let Fresh { build, journal } = fresh;
        Ok(Arc::as_ref(&journal).page(build, names, cas).await)
    }
}
