//! The journals of builds that have ended: one compressed file for each in the state directory, the
//! newest of them, so that builds can be listed and explained after a restart. What cannot be
//! written is kept in memory instead, and what cannot be read is left out: a broken or full disk
//! costs explanations and nothing else.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, DirBuilder, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use serde::de::DeserializeOwned;

use super::Journal;
use super::page::{ActionEntry, Page};
use crate::speculation::journal::accounting::BuildStatus;

/// Below the state directory.
const DIRECTORY: &str = "builds";
/// What the names of files end in, behind the build's id.
const EXTENSION: &str = "json.zst";
/// Builds that are kept.
const MAX_BUILDS: usize = 200;
/// What their journals may take, compressed.
const MAX_BYTES: u64 = 64 * 1024 * 1024;
/// What a journal may take when it is read: more is none of primed's.
const MAX_LINE: u64 = 1024 * 1024 * 1024;
/// How hard they are compressed: fast, and hashes hardly shrink anyway.
const LEVEL: i32 = 3;

/// The journals that are kept.
pub struct JournalStore {
    /// `None` if they are kept in memory only.
    directory: Option<PathBuf>,
    shelf: Mutex<Shelf>,
}

#[derive(Default)]
struct Shelf {
    /// By the build's id, which begins with its time.
    kept: BTreeMap<String, Kept>,
    /// Of builds that have ended and are not written yet.
    fresh: HashMap<String, Fresh>,
    /// Whether the log knows that the disk refuses.
    complained: bool,
}

struct Kept {
    build: BuildStatus,
    size: u64,
    /// Set where it could not be written to disk.
    content: Option<Bytes>,
}

/// A build that has ended, with what is to be written of it.
#[derive(Clone)]
pub struct Fresh {
    /// How it ended.
    pub build: BuildStatus,
    /// What it asked for, and what was primed for it.
    pub journal: Arc<Journal>,
}

/// A journal that was found.
pub enum Found {
    /// Not written yet.
    Fresh(Box<Fresh>),
    /// In this file, or these bytes.
    Kept(Source),
}

/// Where a journal is read from.
pub enum Source {
    /// A file.
    File(PathBuf),
    /// Compressed bytes.
    Memory(Bytes),
}

/// Why no journal is found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotFound {
    /// No build is called so.
    #[error(
        "no build has an id that begins with '{0}'; `primed builds` lists those that are known"
    )]
    Unknown(String),
    /// Several are.
    #[error("the ids of {1} builds begin with '{0}'; say more of it")]
    Ambiguous(String, usize),
}

impl JournalStore {
    /// Those in the state directory `directory`. Blocks.
    pub fn open(directory: &Path) -> Self {
        let directory = directory.join(DIRECTORY);
        let store = JournalStore {
            shelf: Mutex::new(read_shelf(&directory)),
            directory: Some(directory),
        };
        store.make_room();
        store
    }

    /// One that lives as long as the process.
    pub fn in_memory() -> Self {
        JournalStore {
            directory: None,
            shelf: Mutex::default(),
        }
    }

    /// Announces what will be written, so that it is found until then.
    pub fn announce(&self, fresh: Fresh) {
        let id = fresh.build.id.clone();
        self.shelf.lock().fresh.insert(id, fresh);
    }

    /// Writes a journal, in the place of an earlier one of the same build. Blocks.
    pub fn save(&self, page: &Page) {
        let id = page.build.id.clone();
        let content = match encode(page) {
            Ok(content) => Bytes::from(content),
            Err(error) => {
                tracing::warn!(%error, "the journal of a build could not be encoded");
                return;
            }
        };
        let written = match &self.directory {
            Some(directory) => write(directory, &id, &content),
            None => Err(io::ErrorKind::Unsupported.into()),
        };
        let mut shelf = self.shelf.lock();
        if let (Err(error), Some(directory), false) = (&written, &self.directory, shelf.complained)
        {
            // No warning: where the disk refuses, the records' store has complained.
            tracing::info!(
                directory = %directory.display(), %error,
                "journals of builds cannot be written; they will be lost when primed stops"
            );
            shelf.complained = true;
        }
        let kept = Kept {
            build: page.build.clone(),
            size: content.len() as u64,
            content: written.is_err().then_some(content),
        };
        shelf.fresh.remove(&id);
        shelf.kept.insert(id, kept);
        drop(shelf);
        self.make_room();
    }

    /// Removes the oldest until there are no more than there may be.
    fn make_room(&self) {
        let mut shelf = self.shelf.lock();
        let mut size: u64 = shelf.kept.values().map(|kept| kept.size).sum();
        while shelf.kept.len() > MAX_BUILDS || (size > MAX_BYTES && shelf.kept.len() > 1) {
            let Some((id, kept)) = shelf.kept.pop_first() else {
                return;
            };
            size -= kept.size;
            if let (Some(directory), None) = (&self.directory, &kept.content)
                && let Err(error) = fs::remove_file(file_of(directory, &id))
            {
                tracing::debug!(%error, id, "an old journal could not be removed");
            }
        }
    }

    /// How many journals are kept, and how many bytes they take.
    pub fn size(&self) -> (u64, u64) {
        let shelf = self.shelf.lock();
        let bytes = shelf.kept.values().map(|kept| kept.size).sum();
        (shelf.kept.len() as u64, bytes)
    }

    /// The builds that have ended, newest first.
    pub fn list(&self) -> Vec<BuildStatus> {
        let shelf = self.shelf.lock();
        let fresh = shelf.fresh.values().map(|fresh| &fresh.build);
        let kept = shelf.kept.values().map(|kept| &kept.build);
        let mut builds: BTreeMap<&str, &BuildStatus> = BTreeMap::new();
        builds.extend(kept.chain(fresh).map(|build| (build.id.as_str(), build)));
        builds.into_values().rev().cloned().collect()
    }

    /// The journal of the build whose id is `id`.
    pub fn find(&self, id: &str) -> Option<Found> {
        let shelf = self.shelf.lock();
        if let Some(fresh) = shelf.fresh.get(id) {
            return Some(Found::Fresh(Box::new(fresh.clone())));
        }
        let source = match &shelf.kept.get(id)?.content {
            Some(content) => Source::Memory(content.clone()),
            None => Source::File(file_of(self.directory.as_deref()?, id)),
        };
        Some(Found::Kept(source))
    }
}

/// The one of `ids` that begins with `prefix`.
///
/// # Errors
/// When there is none, or more than one.
pub fn unique<'a>(
    ids: impl IntoIterator<Item = &'a str>,
    prefix: &str,
) -> Result<&'a str, NotFound> {
    let mut found: Vec<&str> = ids
        .into_iter()
        .filter(|id| id.starts_with(prefix))
        .collect();
    found.sort_unstable();
    found.dedup();
    match found.as_slice() {
        [id] => Ok(id),
        [] => Err(NotFound::Unknown(prefix.to_owned())),
        several => Err(NotFound::Ambiguous(prefix.to_owned(), several.len())),
    }
}

impl Source {
    /// Reads the journal. Blocks.
    ///
    /// # Errors
    /// When the file is gone, or broken.
    pub fn read(&self) -> io::Result<Page> {
        let mut lines = self.lines()?;
        let build = lines.next()?;
        let actions: Vec<ActionEntry> = lines.next()?;
        let left_out = lines.next()?;
        Ok(Page {
            build,
            actions,
            left_out,
        })
    }

    fn lines(&self) -> io::Result<Lines> {
        let content: Box<dyn io::Read> = match self {
            Source::File(path) => Box::new(File::open(path)?),
            Source::Memory(content) => Box::new(io::Cursor::new(content.clone())),
        };
        let decoder = zstd::Decoder::new(content)?;
        Ok(Lines(BufReader::new(Box::new(decoder))))
    }
}

/// One JSON value a line.
struct Lines(BufReader<Box<dyn io::Read>>);

impl Lines {
    fn next<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        let mut line = Vec::new();
        io::Read::take(&mut self.0, MAX_LINE).read_until(b'\n', &mut line)?;
        Ok(serde_json::from_slice(&line)?)
    }
}

/// The build alone comes first: to list builds, no more is read.
fn encode(page: &Page) -> io::Result<Vec<u8>> {
    let mut encoder = zstd::Encoder::new(Vec::new(), LEVEL)?;
    serde_json::to_writer(&mut encoder, &page.build)?;
    encoder.write_all(b"\n")?;
    serde_json::to_writer(&mut encoder, &page.actions)?;
    encoder.write_all(b"\n")?;
    serde_json::to_writer(&mut encoder, &page.left_out)?;
    encoder.finish()
}

fn file_of(directory: &Path, id: &str) -> PathBuf {
    directory.join(format!("{id}.{EXTENSION}"))
}

fn write(directory: &Path, id: &str, content: &[u8]) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    let unfinished = directory.join("unfinished");
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&unfinished)?;
    file.write_all(content)?;
    fs::rename(unfinished, file_of(directory, id))
}

fn read_shelf(directory: &Path) -> Shelf {
    let mut shelf = Shelf::default();
    // One that is not there yet is empty.
    let Ok(entries) = fs::read_dir(directory) else {
        return shelf;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some((id, EXTENSION)) = name.to_str().and_then(|name| name.split_once('.')) else {
            continue;
        };
        let source = Source::File(entry.path());
        let read = source
            .lines()
            .and_then(|mut lines| Ok((lines.next::<BuildStatus>()?, entry.metadata()?.len())));
        match read {
            Ok((build, size)) if build.id == id => {
                let kept = Kept {
                    build,
                    size,
                    content: None,
                };
                shelf.kept.insert(id.to_owned(), kept);
            }
            Ok(_) => {}
            Err(error) => {
                let file = entry.path();
                tracing::warn!(file = %file.display(), %error, "a journal is broken; it is removed");
                // If that fails, it is tried again at the next start.
                let _ = fs::remove_file(file);
            }
        }
    }
    shelf
}

#[cfg(test)]
mod tests {
    use super::super::accounting::{Accounting, Counts};
    use super::*;

    fn page(number: usize) -> Page {
        let build = BuildStatus {
            id: format!("{number:08}"),
            parent: "invocation".into(),
            label: "make in /p".to_owned(),
            started_unix_ms: 1,
            ended_unix_ms: Some(2),
            counts: Counts {
                asked: 1,
                cached: 1,
                ..Counts::default()
            },
            accounting: Accounting::default(),
        };
        Page {
            build,
            actions: vec![ActionEntry {
                label: "a.o".to_owned(),
                ..ActionEntry::default()
            }],
            left_out: 3,
        }
    }

    fn read(store: &JournalStore, id: &str) -> Option<io::Result<Page>> {
        match store.find(id)? {
            Found::Fresh(_) => None,
            Found::Kept(source) => Some(source.read()),
        }
    }

    fn ids(store: &JournalStore) -> Vec<String> {
        store.list().into_iter().map(|build| build.id).collect()
    }

    #[test]
    fn journals_are_read_back_after_a_restart_and_the_oldest_make_room() {
        let directory = tempfile::tempdir().unwrap();
        let store = JournalStore::open(directory.path());
        for number in 0..MAX_BUILDS + 5 {
            store.save(&page(number));
        }
        let again = JournalStore::open(directory.path());
        assert_eq!(ids(&again), ids(&store));
        assert_eq!(ids(&again).len(), MAX_BUILDS);
        assert_eq!(read(&again, "00000004").map(|_| ()), None);
        let found = read(&again, "00000007").unwrap().unwrap();
        assert_eq!(found, page(7));
        let files = fs::read_dir(directory.path().join(DIRECTORY)).unwrap();
        assert_eq!(files.count(), MAX_BUILDS);
    }

    #[test]
    fn a_journal_that_is_cut_short_is_removed_and_one_that_breaks_later_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let store = JournalStore::open(directory.path());
        store.save(&page(1));
        store.save(&page(2));
        let file = file_of(&directory.path().join(DIRECTORY), "00000001");
        fs::write(&file, b"no journal").unwrap();
        assert!(read(&store, "00000001").unwrap().is_err());
        let again = JournalStore::open(directory.path());
        assert_eq!(ids(&again), ["00000002"]);
        assert!(!file.exists());
    }

    #[test]
    fn what_cannot_be_written_is_kept_in_memory() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(DIRECTORY), "in the way").unwrap();
        for store in [
            JournalStore::open(directory.path()),
            JournalStore::in_memory(),
        ] {
            store.save(&page(1));
            assert_eq!(read(&store, "00000001").unwrap().unwrap(), page(1));
        }
    }

    #[test]
    fn a_build_is_named_by_the_beginning_of_its_id_if_no_other_begins_so() {
        let ids = ["0123", "0145", "0123"];
        assert_eq!(unique(ids, "012"), Ok("0123"));
        assert_eq!(
            unique(ids, "01"),
            Err(NotFound::Ambiguous("01".to_owned(), 2))
        );
        assert_eq!(unique(ids, "02"), Err(NotFound::Unknown("02".to_owned())));
    }
}
