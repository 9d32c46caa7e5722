//! The records of earlier builds on disk: an embedded, crash-safe store in the state directory.
//!
//! The store may be missing, broken, locked or read-only; primed then says so once, keeps its
//! records in memory, and goes on. A broken file is put aside, never deleted.

mod database;
mod messages;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;
use prost::Message;
use redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTable, ReadableTableMetadata,
    TableDefinition,
};

pub use self::database::OpenError;
use self::database::{FILE_NAME, create, create_in_memory, make_directory, open_file};
pub use self::messages::{base_action, identity, parent_of, stored_action, stored_parent};
use self::messages::{known_file, overlays, path_bytes, path_of, stored_file};
use super::parent::{Parent, ParentIdentity, WeakKey};
use super::prediction::{Prediction, Wasted};
use crate::cas::Digest;
use crate::reapi::primed::store::v1 as proto;
use crate::workspace::index::FileSignature;

/// Under the weak key: `Parent`.
const PARENTS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("parents-v1");
/// Under the weak key and the action's digest: `BaseAction`.
const ACTIONS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("actions-v1");
/// Under the weak key: a message as it was imported, until the parent's records change.
const IMPORTS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("imports-v1");
/// Under the weak key and the name of a prediction: how many in a row were wasted, one byte.
const WASTED: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("wasted-v1");
/// Under the path: `FileState`.
const FILES: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("files-v1");

/// How many base actions are kept in all. Least recently seen parents go first.
const MAX_ACTIONS: u64 = 500_000;
/// How many file states are kept. They only save hashing, so they go all at once.
const MAX_FILES: u64 = 1_000_000;

/// What went wrong inside the store.
#[derive(Debug, thiserror::Error)]
#[error("the record store failed: {0}")]
pub struct StoreError(Box<redb::Error>);

impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(error: E) -> Self {
        StoreError(Box::new(error.into()))
    }
}

impl StoreError {
    /// After an I/O error (a full disk, say) redb refuses all further work until it is reopened.
    fn calls_for_reopening(&self) -> bool {
        matches!(*self.0, redb::Error::PreviousIo)
    }
}

/// The record store.
pub struct Store {
    database: RwLock<Option<Database>>,
    reopen: Reopen,
    /// How many base actions are kept in all.
    max_actions: u64,
    is_on_disk: bool,
}

/// Opens the same database again.
type Reopen = Box<dyn Fn() -> Result<Database, DatabaseError> + Send + Sync>;

/// How many records there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecordCounts {
    /// Base actions of all parents.
    pub actions: u64,
    /// Parents.
    pub parents: u64,
}

/// What the engine keeps in mind of a recorded parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownParent {
    /// Under which it is recorded.
    pub key: WeakKey,
    /// Who it is.
    pub identity: ParentIdentity,
    /// The other parents that its overlays name.
    pub dependencies: HashSet<WeakKey>,
    /// When it was last recorded: milliseconds since 1970.
    pub last_seen_unix_ms: i64,
}

impl KnownParent {
    /// Whether it is `earlier` in all but the digest function, and was recorded later.
    pub fn is_rehashed(&self, earlier: &Self) -> bool {
        let function = earlier.identity.digest_function;
        let otherwise_equal = ParentIdentity {
            digest_function: function,
            ..self.identity.clone()
        };
        self.last_seen_unix_ms > earlier.last_seen_unix_ms
            && self.identity.digest_function != function
            && otherwise_equal.weak_key() == earlier.key
    }
}

/// A file with what its metadata were when it was hashed.
pub type KnownFile = (PathBuf, (FileSignature, Digest));

/// How large the store in `directory` is, in bytes, if there is one.
pub fn size_on_disk(directory: &Path) -> Option<u64> {
    let metadata = std::fs::metadata(directory.join(FILE_NAME));
    metadata.ok().map(|metadata| metadata.len())
}

impl Store {
    /// Opens the store in `directory`, or one in memory if that cannot be had. Blocks.
    pub fn open(directory: &Path) -> Self {
        match open_file(directory) {
            Ok(database) => {
                let path = directory.join(FILE_NAME);
                Store {
                    is_on_disk: true,
                    ..Store::new(database, Box::new(move || create(&path)))
                }
            }
            Err(reason) => {
                tracing::warn!(
                    directory = %directory.display(), %reason,
                    "records cannot be kept on disk; they will be lost when primed stops"
                );
                Store::in_memory()
            }
        }
    }

    /// Whether its records outlive the process.
    pub fn is_on_disk(&self) -> bool {
        self.is_on_disk
    }

    /// A store that lives as long as the process.
    pub fn in_memory() -> Self {
        #[allow(
            clippy::expect_used,
            reason = "an empty database in memory does no I/O"
        )]
        let database = create_in_memory().expect("a database in memory can be created");
        Store::new(database, Box::new(create_in_memory))
    }

    /// Opens the store in `directory` for a command: with it, or not at all. `None` if there is
    /// none and none is to be created. Blocks.
    ///
    /// # Errors
    /// `OpenError`. A broken store is left where it is.
    pub fn open_for_command(directory: &Path, may_create: bool) -> Result<Option<Self>, OpenError> {
        let path = directory.join(FILE_NAME);
        if !path.exists() {
            if !may_create {
                return Ok(None);
            }
            make_directory(directory)?;
        }
        let database = create(&path)?;
        Ok(Some(Store::new(database, Box::new(move || create(&path)))))
    }

    fn new(database: Database, reopen: Reopen) -> Self {
        Store {
            database: RwLock::new(Some(database)),
            reopen,
            max_actions: MAX_ACTIONS,
            is_on_disk: false,
        }
    }

    /// Does `work` on the database, which is opened again first if an earlier error calls for it.
    fn with<T>(&self, work: impl Fn(&Database) -> Result<T, StoreError>) -> Result<T, StoreError> {
        if let Some(database) = self.database.read().as_ref() {
            match work(database) {
                Err(error) if error.calls_for_reopening() => {}
                done => return done,
            }
        }
        let mut database = self.database.write();
        // Closed first: it holds a lock on its file.
        *database = None;
        let database = database.insert((self.reopen)()?);
        tracing::info!("the record store was opened again after an error");
        work(database)
    }

    /// All parents, without their actions.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn parents(&self) -> Result<Vec<KnownParent>, StoreError> {
        self.with(|database| {
            let read = database.begin_read()?;
            let Ok(table) = read.open_table(PARENTS) else {
                return Ok(Vec::new());
            };
            let mut parents = Vec::new();
            for entry in table.iter()? {
                let (key, value) = entry?;
                let stored = proto::Parent::decode(value.value()).ok();
                let known = stored.and_then(|stored| {
                    let identity = identity(&stored)?;
                    let overlays = overlays(&stored.overlays, identity.digest_function);
                    Some((identity, overlays.parents(), stored.last_seen_unix_ms))
                });
                match (<[u8; 32]>::try_from(key.value()), known) {
                    (Ok(key), Some((identity, dependencies, last_seen_unix_ms))) => {
                        parents.push(KnownParent {
                            key: WeakKey(key),
                            identity,
                            dependencies,
                            last_seen_unix_ms,
                        })
                    }
                    _ => tracing::warn!("a parent in the record store is malformed; it is ignored"),
                }
            }
            Ok(parents)
        })
    }

    /// How many executions of one parent's predictions in a row were wasted, where any were.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn wasted(&self, key: WeakKey) -> Result<Wasted, StoreError> {
        self.with(|database| {
            let read = database.begin_read()?;
            let Ok(table) = read.open_table(WASTED) else {
                return Ok(Wasted::new());
            };
            let mut wasted = Wasted::new();
            let (first, last) = range_of(key);
            for entry in table.range(first.as_slice()..=last.as_slice())? {
                let (name, count) = entry?;
                let prediction = name.value().get(key.0.len()..);
                let prediction = prediction.and_then(|name| name.try_into().ok());
                if let (Some(prediction), [count]) = (prediction, count.value()) {
                    wasted.insert(Prediction(prediction), *count);
                }
            }
            Ok(wasted)
        })
    }

    /// Replaces them.
    ///
    /// # Errors
    /// When the store cannot be written; it is then as it was.
    pub fn save_wasted(&self, key: WeakKey, wasted: &Wasted) -> Result<(), StoreError> {
        self.with(|database| {
            let write = database.begin_write()?;
            {
                let mut table = write.open_table(WASTED)?;
                let (first, last) = range_of(key);
                table.retain_in(first.as_slice()..=last.as_slice(), |_, _| false)?;
                for (prediction, count) in wasted {
                    let name = [key.0, prediction.0].concat();
                    table.insert(name.as_slice(), [*count].as_slice())?;
                }
            }
            Ok(write.commit()?)
        })
    }

    /// How many base actions are recorded of one parent.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn actions_of(&self, key: WeakKey) -> Result<usize, StoreError> {
        self.with(|database| {
            let read = database.begin_read()?;
            let Ok(actions) = read.open_table(ACTIONS) else {
                return Ok(0);
            };
            let (first, last) = range_of(key);
            Ok(actions.range(first.as_slice()..=last.as_slice())?.count())
        })
    }

    /// The message that was imported under `key`, if the parent's records are not newer.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn import(&self, key: WeakKey) -> Result<Option<Bytes>, StoreError> {
        self.with(|database| {
            let read = database.begin_read()?;
            let Ok(imports) = read.open_table(IMPORTS) else {
                return Ok(None);
            };
            let message = imports.get(key.0.as_slice())?;
            Ok(message.map(|message| Bytes::copy_from_slice(message.value())))
        })
    }

    /// The weak keys of all such messages.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn imports(&self) -> Result<Vec<WeakKey>, StoreError> {
        self.with(|database| {
            let read = database.begin_read()?;
            let Ok(imports) = read.open_table(IMPORTS) else {
                return Ok(Vec::new());
            };
            let mut keys = Vec::new();
            for entry in imports.iter()? {
                keys.extend(<[u8; 32]>::try_from(entry?.0.value()).map(WeakKey));
            }
            Ok(keys)
        })
    }

    /// Keeps a message that was imported under `key`.
    ///
    /// # Errors
    /// When the store cannot be written; it is then as it was.
    pub fn keep_import(&self, key: WeakKey, message: &[u8]) -> Result<(), StoreError> {
        self.with(|database| {
            let write = database.begin_write()?;
            {
                let mut imports = write.open_table(IMPORTS)?;
                imports.insert(key.0.as_slice(), message)?;
            }
            Ok(write.commit()?)
        })
    }

    /// How many records there are.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn counts(&self) -> Result<RecordCounts, StoreError> {
        self.with(|database| {
            let read = database.begin_read()?;
            let length = |table| match read.open_table(table) {
                Ok(table) => table.len(),
                Err(_) => Ok(0),
            };
            Ok(RecordCounts {
                actions: length(ACTIONS)?,
                parents: length(PARENTS)?,
            })
        })
    }

    /// All that is recorded of one parent.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn load(&self, key: WeakKey) -> Result<Option<Parent>, StoreError> {
        self.with(|database| {
            let read = database.begin_read()?;
            let (Ok(parents), Ok(actions)) = (read.open_table(PARENTS), read.open_table(ACTIONS))
            else {
                return Ok(None);
            };
            let Some(value) = parents.get(key.0.as_slice())? else {
                return Ok(None);
            };
            let Ok(stored) = proto::Parent::decode(value.value()) else {
                return Ok(None);
            };
            let Some(mut parent) = parent_of(&stored) else {
                return Ok(None);
            };
            let (first, last) = range_of(key);
            for entry in actions.range(first.as_slice()..=last.as_slice())? {
                let (_, value) = entry?;
                let decoded = proto::BaseAction::decode(value.value()).ok();
                let function = parent.identity.digest_function;
                match decoded.and_then(|stored| base_action(stored, function)) {
                    Some((key, base)) => {
                        parent.actions.insert(key, Arc::new(base));
                    }
                    None => {
                        tracing::warn!("an action in the record store is malformed; it is ignored")
                    }
                }
            }
            Ok(Some(parent))
        })
    }

    /// Replaces what is recorded of one parent, and drops the least recently seen parents if
    /// there are too many actions now. Returns those dropped.
    ///
    /// # Errors
    /// When the store cannot be written; it is then as it was.
    pub fn save(&self, parent: &Parent, files: &[KnownFile]) -> Result<Vec<WeakKey>, StoreError> {
        self.replace(parent, files, None)
    }

    /// The same for records that were imported as `message`, which is kept with them.
    ///
    /// # Errors
    /// When the store cannot be written; it is then as it was.
    pub fn save_import(&self, parent: &Parent, message: &[u8]) -> Result<Vec<WeakKey>, StoreError> {
        self.replace(parent, &[], Some(message))
    }

    fn replace(
        &self,
        parent: &Parent,
        files: &[KnownFile],
        import: Option<&[u8]>,
    ) -> Result<Vec<WeakKey>, StoreError> {
        self.with(|database| {
            let key = parent.identity.weak_key();
            let write = database.begin_write()?;
            let mut dropped = Vec::new();
            {
                let mut parents = write.open_table(PARENTS)?;
                let mut actions = write.open_table(ACTIONS)?;
                let mut states = write.open_table(FILES)?;
                let mut imports = write.open_table(IMPORTS)?;
                let mut wasted = write.open_table(WASTED)?;
                match import {
                    Some(message) => imports.insert(key.0.as_slice(), message)?,
                    None => imports.remove(key.0.as_slice())?,
                };
                let (first, last) = range_of(key);
                actions.retain_in(first.as_slice()..=last.as_slice(), |_, _| false)?;
                for base in parent.actions.values() {
                    let name = [key.0.as_slice(), base.digest.hash()].concat();
                    actions.insert(
                        name.as_slice(),
                        stored_action(base).encode_to_vec().as_slice(),
                    )?;
                }
                let stored = stored_parent(parent).encode_to_vec();
                parents.insert(key.0.as_slice(), stored.as_slice())?;
                if actions.len()? > self.max_actions {
                    let mut by_age = Vec::new();
                    for entry in parents.iter()? {
                        let (name, value) = entry?;
                        let seen = proto::Parent::decode(value.value())
                            .map_or(0, |parent| parent.last_seen_unix_ms);
                        if let Ok(name) = <[u8; 32]>::try_from(name.value()) {
                            by_age.push((seen, WeakKey(name)));
                        }
                    }
                    by_age.sort_unstable();
                    for (_, oldest) in by_age {
                        if actions.len()? <= self.max_actions {
                            break;
                        }
                        // Also when a clock that was wrong makes it look the oldest.
                        if oldest == key {
                            continue;
                        }
                        let (first, last) = range_of(oldest);
                        actions.retain_in(first.as_slice()..=last.as_slice(), |_, _| false)?;
                        parents.remove(oldest.0.as_slice())?;
                        imports.remove(oldest.0.as_slice())?;
                        wasted.retain_in(first.as_slice()..=last.as_slice(), |_, _| false)?;
                        dropped.push(oldest);
                    }
                }
                if states.len()? > MAX_FILES {
                    states.retain(|_, _| false)?;
                }
                for (path, state) in files {
                    let stored = stored_file(state).encode_to_vec();
                    states.insert(&*path_bytes(path), stored.as_slice())?;
                }
            }
            write.commit()?;
            Ok(dropped)
        })
    }

    /// The file states that were saved.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn files(&self) -> Result<Vec<KnownFile>, StoreError> {
        self.with(|database| {
            let read = database.begin_read()?;
            let Ok(table) = read.open_table(FILES) else {
                return Ok(Vec::new());
            };
            let mut files = Vec::new();
            for entry in table.iter()? {
                let (path, value) = entry?;
                let path = path_of(path.value());
                if let Some(state) = proto::FileState::decode(value.value())
                    .ok()
                    .and_then(known_file)
                {
                    files.push((path, state));
                }
            }
            Ok(files)
        })
    }
}

fn range_of(key: WeakKey) -> (Vec<u8>, Vec<u8>) {
    let first = key.0.to_vec();
    let last = [key.0.as_slice(), &[0xff; 33]].concat();
    (first, last)
}

#[cfg(test)]
mod tests {
    use super::super::parent::{BaseAction, Origin, ParentKind, SubactionKey};
    use super::*;
    use crate::cas::DigestFunction;
    use crate::reapi::Action;
    use std::io;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    fn parent(root: &str, actions: usize, seen: i64) -> Parent {
        let mut parent = Parent::new(ParentIdentity {
            instance: "instance".into(),
            digest_function: DigestFunction::Sha256,
            uid: Some(7),
            kind: ParentKind::Invocation {
                project_root: Some(root.into()),
                tool: "make".to_owned(),
            },
        });
        parent.last_seen_unix_ms = seen;
        for number in 0..actions {
            let text = format!("{root} {number}");
            let (digest, encoded) = Digest::of_message(&Action {
                command_digest: Some(Digest::of(text.as_bytes()).to_proto()),
                input_root_digest: Some(Digest::of(b"root").to_proto()),
                ..Action::default()
            });
            let mount = (number % 2 == 0).then(|| PathBuf::from(root));
            let base = BaseAction {
                digest,
                input_root: Digest::of(b"root"),
                mount: mount.clone(),
                file_system_root: if number % 3 == 0 { "/" } else { "/chroot" }.into(),
                working_directory: "build".to_owned(),
                texts: vec!["text".to_owned()],
                outputs: vec![(format!("{number}.o"), Digest::of(b"output"))],
                duration: Duration::from_micros(number as u64),
                order: number as u64,
                last_seen_unix_ms: seen,
                encoded,
            };
            let action_key = base.parts().unwrap().action_key;
            let key = SubactionKey { action_key, mount };
            parent.actions.insert(key, Arc::new(base));
            let path = format!("{number}.o");
            let origin = Origin::Action {
                parent: None,
                action: digest,
                path,
            };
            parent.overlays.add(Digest::of(b"output"), origin);
        }
        let source = Origin::Disk(format!("{root}/a.c").into());
        parent.overlays.add(Digest::of(b"a.c"), source);
        parent.text_roots = vec![Digest::of(b"sandbox")];
        parent
    }

    fn known_file(path: &str) -> KnownFile {
        let signature = FileSignature {
            size: 1,
            modified_ns: -2,
            changed_ns: 3,
            inode: 4,
            device: 5,
        };
        (path.into(), (signature, Digest::of(b"file")))
    }

    fn assert_same(one: &Parent, other: &Parent) {
        assert_eq!(one.identity, other.identity);
        assert_eq!(one.actions, other.actions);
        assert_eq!(one.text_roots, other.text_roots);
        assert_eq!(one.last_seen_unix_ms, other.last_seen_unix_ms);
        let overlays = |parent: &Parent| {
            let mut overlays: Vec<_> = parent
                .overlays
                .iter()
                .map(|(digest, origin)| (*digest, origin.clone()))
                .collect();
            overlays.sort_unstable();
            overlays
        };
        assert_eq!(overlays(one), overlays(other));
    }

    #[test]
    fn records_that_name_no_digest_function_are_of_sha256() {
        let recorded = parent("/one", 3, 1);
        let stored = proto::Parent {
            digest_function: 0,
            ..stored_parent(&recorded)
        };
        assert_eq!(identity(&stored).unwrap(), recorded.identity);
        for base in recorded.actions.values() {
            let mut stored = stored_action(base);
            for output in &mut stored.outputs {
                output.digest.as_mut().unwrap().function = 0;
            }
            let (_, read) = base_action(stored, recorded.identity.digest_function).unwrap();
            assert_eq!(read, **base);
        }
        let unknown = proto::Parent {
            digest_function: 1000,
            ..stored_parent(&recorded)
        };
        assert_eq!(identity(&unknown), None, "of a later version");
    }

    #[test]
    fn records_are_the_same_after_the_store_was_opened_again() {
        let scratch = tempfile::tempdir().unwrap();
        let (one, two) = (parent("/one", 9, 1), parent("/two", 4, 2));
        let store = Store::open(scratch.path());
        store.save(&one, &[known_file("/one/a.c")]).unwrap();
        store.save(&two, &[known_file("/two/a.c")]).unwrap();
        drop(store);
        let store = Store::open(scratch.path());
        let counts = RecordCounts {
            actions: 13,
            parents: 2,
        };
        assert_eq!(store.counts().unwrap(), counts);
        assert_eq!(store.parents().unwrap().len(), 2);
        for saved in [one, two] {
            let loaded = store.load(saved.identity.weak_key()).unwrap().unwrap();
            assert_same(&saved, &loaded);
        }
        let files = [known_file("/one/a.c"), known_file("/two/a.c")];
        assert_eq!(store.files().unwrap(), files);
        assert!(store.load(WeakKey([9; 32])).unwrap().is_none());
    }

    #[test]
    fn saving_a_parent_replaces_its_records_and_no_others() {
        let store = Store::in_memory();
        let other = parent("/other", 3, 1);
        store.save(&other, &[]).unwrap();
        store.save(&parent("/p", 5, 1), &[]).unwrap();
        let newer = parent("/p", 2, 2);
        store.save(&newer, &[]).unwrap();
        let loaded = |parent: &Parent| store.load(parent.identity.weak_key()).unwrap().unwrap();
        assert_same(&loaded(&newer), &newer);
        assert_same(&loaded(&other), &other);
        assert_eq!(store.counts().unwrap().actions, 5);
    }

    #[test]
    fn the_parents_not_seen_for_longest_make_room_and_the_one_saved_never_does() {
        let mut store = Store::in_memory();
        store.max_actions = 10;
        let parents = [("/b", 2), ("/a", 1), ("/c", 3)].map(|(root, seen)| parent(root, 3, seen));
        let keys = parents.each_ref().map(|parent| parent.identity.weak_key());
        for parent in &parents {
            assert_eq!(store.save(parent, &[]).unwrap(), []);
        }
        let dropped = store.save(&parent("/d", 6, 0), &[]).unwrap();
        assert_eq!(dropped, [keys[1], keys[0]], "the oldest first");
        assert_eq!(store.counts().unwrap().actions, 9);
        let dropped = store.save(&parent("/huge", 50, 0), &[]).unwrap();
        assert_eq!(dropped.len(), 2);
        assert_eq!(store.counts().unwrap().actions, 50);
    }

    #[test]
    fn damage_anywhere_in_the_file_takes_nobody_down() {
        let scratch = tempfile::tempdir().unwrap();
        let saved = parent("/p", 40, 1);
        let store = Store::open(scratch.path());
        store.save(&saved, &[known_file("/p/a.c")]).unwrap();
        drop(store);
        let whole = std::fs::read(scratch.path().join(FILE_NAME)).unwrap();
        let mut lost = 0;
        for round in 0..60_usize {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join(FILE_NAME);
            let mut damaged = whole.clone();
            match round {
                0..10 => damaged.truncate(whole.len() * round / 10),
                10..30 => damaged[(round - 10) * 16..][..16].fill(0xff),
                _ => {
                    let page = whole.len() / 30 * (round - 30);
                    damaged[page..][..4096.min(whole.len() - page)].fill(0x5a);
                }
            }
            std::fs::write(&path, &damaged).unwrap();
            let store = Store::open(directory.path());
            let read = || {
                store.parents()?;
                store.files()?;
                store.counts()?;
                store.load(saved.identity.weak_key())
            };
            let loaded = read();
            lost += usize::from(!matches!(loaded, Ok(Some(_))));
            // It may refuse, but it says so.
            let _ = store.save(&parent("/q", 3, 2), &[]);
        }
        assert!(lost > 10, "the damage was none: {lost}");
    }

    /// A disk in memory, which can be full.
    #[derive(Clone, Debug, Default)]
    struct Disk {
        content: Arc<parking_lot::Mutex<Vec<u8>>>,
        full: Arc<AtomicBool>,
    }

    impl Disk {
        fn room(&self) -> io::Result<()> {
            match self.full.load(Ordering::Relaxed) {
                true => Err(io::ErrorKind::StorageFull.into()),
                false => Ok(()),
            }
        }
    }

    impl redb::StorageBackend for Disk {
        fn len(&self) -> io::Result<u64> {
            Ok(self.content.lock().len() as u64)
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            let offset = offset as usize;
            out.copy_from_slice(&self.content.lock()[offset..offset + out.len()]);
            Ok(())
        }

        fn set_len(&self, length: u64) -> io::Result<()> {
            self.room()?;
            self.content.lock().resize(length as usize, 0);
            Ok(())
        }

        fn sync_data(&self) -> io::Result<()> {
            self.room()
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.room()?;
            let offset = offset as usize;
            self.content.lock()[offset..offset + data.len()].copy_from_slice(data);
            Ok(())
        }
    }

    #[test]
    fn after_a_full_disk_the_store_has_what_was_saved_and_saves_again() {
        let disk = Disk::default();
        let of_store = disk.clone();
        let open = move || Database::builder().create_with_backend(of_store.clone());
        let store = Store::new(open().unwrap(), Box::new(open));
        let earlier = parent("/earlier", 3, 1);
        let later = parent("/later", 300, 2);
        store.save(&earlier, &[]).unwrap();
        disk.full.store(true, Ordering::Relaxed);
        assert!(store.save(&later, &[]).is_err());
        disk.full.store(false, Ordering::Relaxed);
        let kept = store.load(earlier.identity.weak_key()).unwrap();
        assert_same(&kept.unwrap(), &earlier);
        store.save(&later, &[]).unwrap();
        let saved = store.load(later.identity.weak_key()).unwrap();
        assert_same(&saved.unwrap(), &later);
    }
}
