//! The cache directory: files that appear whole or not at all, and a ledger in memory of what there
//! is, how large, when last used, and what must not go. Blobs and results both stand in it.
//!
//! ```text
//! lock                                    held by the one primed that has it open
//! blobs/sha256/ab/ab…_1234                content, mode 0444
//! executables/sha256/ab/ab…_1234          the same with mode 0555, where it was ever wanted so
//! results/sha256/cd/cd…_80                action results, under hashes of their names
//! temporary/                              what is being written; emptied at the start
//! ```
//!
//! A file is written in `temporary` and renamed into place before anybody is told of it, so a kill
//! at any moment loses nothing and leaves nothing half-done. Its modification time is always the
//! same, `MTIME`: files are handed out as hard links, and one that somebody wrote to after all shows
//! by another time. Its access time is when it was last used, more or less.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, FileTimes, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
use tokio::sync::Notify;

use super::errors::{OpenError, WriteError};
use crate::clock::now_unix_ms;
use crate::digest::{Digest, DigestFunction};

/// When each file was modified, it says: 2001-02-03 04:05:06, in seconds since 1970.
const MTIME: u64 = 981_173_106;
/// How much later than the disk says a file may have been used.
const USE_GRAIN_MS: i64 = 10 * 60 * 1000;
/// What file systems hand out at once.
const BLOCK: u64 = 4096;

/// What a file is. In this order they leave when they were used at the same time: a result never
/// after its outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Kind {
    Result,
    Executable,
    Blob,
}

impl Kind {
    const ALL: [Kind; 3] = [Kind::Result, Kind::Executable, Kind::Blob];

    fn folder(self) -> &'static str {
        match self {
            Kind::Result => "results",
            Kind::Executable => "executables",
            Kind::Blob => "blobs",
        }
    }

    fn mode(self) -> u32 {
        match self {
            Kind::Executable => 0o555,
            Kind::Result | Kind::Blob => 0o444,
        }
    }
}

/// The name of a file. That of a result is a digest of whose result it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub kind: Kind,
    pub digest: Digest,
}

/// How far a file's content can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Trust {
    /// It may have been torn by a power cut: it was not used since the machine started.
    Suspect,
    /// It was written or hashed since the machine started.
    Whole,
    /// This process has hashed it.
    Hashed,
}

struct Entry {
    /// What it takes on disk.
    size: u64,
    used_unix_ms: i64,
    /// What of that the disk knows.
    saved_unix_ms: i64,
    trust: Trust,
}

#[derive(Default)]
struct Ledger {
    files: HashMap<Key, Entry>,
    /// How often each is pinned.
    pins: HashMap<Digest, usize>,
    /// What all files take, and what those take that are being written.
    size: u64,
    reserved: u64,
}

/// How much may be kept, and for how long at least.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// `None`: what the disk has room for.
    pub bytes: Option<u64>,
    /// Nothing leaves that was used so recently: whoever was told of it may come for it.
    pub recent: Duration,
    /// Files that did not change since then are suspect.
    pub booted_unix_seconds: i64,
}

/// An open cache directory.
pub(super) struct CacheDirectory {
    root: PathBuf,
    temporary: PathBuf,
    limits: Limits,
    /// How many bytes there may be. None, until it is known what there is.
    limit: AtomicU64,
    ledger: Mutex<Ledger>,
    /// Told when there is more than should be.
    pub(super) crowded: Notify,
    /// One pass at a time.
    pub(super) evicting: Mutex<()>,
    next_name: AtomicU64,
    _lock: File,
}

/// What a file may leave for.
pub(super) struct Candidate {
    pub used_unix_ms: i64,
    pub key: Key,
}

impl CacheDirectory {
    /// Takes possession of `root`, which is created if need be. What is in it must be loaded before
    /// anything else is done. Blocks.
    pub fn open(root: &Path, limits: Limits) -> Result<Self, OpenError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::Io { path, source }
        };
        let temporary = root.join("temporary");
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(root).map_err(failed(root))?;
        let lock_path = root.join("lock");
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600);
        let lock = options.open(&lock_path).map_err(failed(&lock_path))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => OpenError::InUse(root.to_owned()),
            TryLockError::Error(source) => failed(&lock_path)(source),
        })?;
        clear(&temporary).map_err(failed(&temporary))?;
        builder.create(&temporary).map_err(failed(&temporary))?;
        Ok(CacheDirectory {
            root: root.to_owned(),
            temporary,
            limits,
            limit: AtomicU64::new(0),
            ledger: Mutex::default(),
            crowded: Notify::new(),
            evicting: Mutex::new(()),
            next_name: AtomicU64::new(0),
            _lock: lock,
        })
    }

    /// Looks at what there is. Blocks: for seconds, where there are a million files.
    pub fn load(&self) -> Result<(), OpenError> {
        let scanned = scan(&self.root, self.limits.booted_unix_seconds);
        let ledger = scanned.map_err(|source| OpenError::Io {
            path: self.root.clone(),
            source,
        })?;
        let limit = self.limits.bytes;
        let limit = limit.unwrap_or_else(|| default_limit(&self.root, ledger.size));
        self.limit.store(limit, Ordering::Relaxed);
        *self.ledger.lock() = ledger;
        Ok(())
    }

    /// Where files are written that may be renamed into place.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// All of it.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// How many bytes there may be.
    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Where the file of `key` stands.
    pub fn path(&self, key: Key) -> PathBuf {
        let (hash, size) = hash_and_size(key.digest);
        self.folder(key)
            .join(&hash[..2])
            .join(format!("{hash}_{size}"))
    }

    fn folder(&self, key: Key) -> PathBuf {
        let function = key.digest.function().to_string().to_lowercase();
        self.root.join(key.kind.folder()).join(function)
    }

    /// Marks a file as used. `None` if there is none by this name.
    pub fn touch(&self, key: Key) -> Option<Trust> {
        let now = now_unix_ms();
        let mut ledger = self.ledger.lock();
        let entry = ledger.files.get_mut(&key)?;
        entry.used_unix_ms = entry.used_unix_ms.max(now);
        let trust = entry.trust;
        // One that is suspect must go on looking so, until it has been hashed.
        let save = now - entry.saved_unix_ms > USE_GRAIN_MS && trust > Trust::Suspect;
        if save {
            entry.saved_unix_ms = now;
        }
        drop(ledger);
        if save {
            self.save_use(key);
        }
        Some(trust)
    }

    /// Writes down that a file is in use. Should that fail, it seems older than it is.
    fn save_use(&self, key: Key) {
        let times = Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: rustix::fs::UTIME_NOW,
            },
            last_modification: Timespec {
                tv_sec: 0,
                tv_nsec: rustix::fs::UTIME_OMIT,
            },
        };
        if let Err(error) = utimensat(CWD, self.path(key), &times, AtFlags::SYMLINK_NOFOLLOW) {
            tracing::debug!(%error, digest = %key.digest, "a use could not be written down");
        }
    }

    /// Notes that this process has hashed the file, and found it good.
    pub fn trust(&self, key: Key) {
        if let Some(entry) = self.ledger.lock().files.get_mut(&key) {
            entry.trust = Trust::Hashed;
            entry.saved_unix_ms = 0;
        }
        self.touch(key);
    }

    /// Sets the times of a file that is good to what they are for all.
    pub fn reset_times(&self, file: &File) -> io::Result<()> {
        let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(MTIME);
        file.set_times(
            FileTimes::new()
                .set_accessed(SystemTime::now())
                .set_modified(modified),
        )
    }

    /// Whether the metadata are those of a file that nobody has written to since.
    pub fn is_untouched(&self, metadata: &fs::Metadata) -> bool {
        metadata.mtime() == MTIME as i64 && metadata.mtime_nsec() == 0
    }

    /// Removes a file, for it is not what it should be: the one that was `seen`, by its inode, not
    /// one that has taken its place meanwhile. `None`: there was none.
    pub fn discard(&self, key: Key, seen: Option<u64>) {
        let path = self.path(key);
        self.remove(key, |_, _| {
            let inode = fs::symlink_metadata(&path).map(|metadata| metadata.ino());
            inode.ok() == seen
        });
    }

    /// Removes a file, if it is `right` to, which is asked with the number of its pins. Returns what
    /// it took.
    fn remove(&self, key: Key, right: impl FnOnce(&Entry, usize) -> bool) -> Option<u64> {
        let aside = self.fresh_path();
        let moved;
        let size;
        {
            // Within the lock: nobody can put a new file of this name into place meanwhile.
            let mut ledger = self.ledger.lock();
            let pins = ledger.pins.get(&key.digest).copied().unwrap_or(0);
            if !right(ledger.files.get(&key)?, pins) {
                return None;
            }
            size = ledger.files.remove(&key)?.size;
            ledger.size -= size;
            moved = fs::rename(self.path(key), &aside);
        }
        if let Err(error) = moved.and_then(|()| fs::remove_file(&aside))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, digest = %key.digest, "a file could not be removed from the cache");
        }
        Some(size)
    }

    /// Removes the file of `candidate`, unless it was used or pinned since. Returns what it took.
    pub fn evict(&self, candidate: &Candidate) -> Option<u64> {
        self.remove(candidate.key, |entry, pins| {
            pins == 0 && entry.used_unix_ms == candidate.used_unix_ms
        })
    }

    /// How much there is, with what is being written.
    pub fn occupied(&self) -> u64 {
        let ledger = self.ledger.lock();
        ledger.size + ledger.reserved
    }

    /// All that may leave.
    pub fn candidates(&self) -> Vec<Candidate> {
        let recent = i64::try_from(self.limits.recent.as_millis()).unwrap_or(i64::MAX);
        let latest = now_unix_ms().saturating_sub(recent);
        let ledger = self.ledger.lock();
        let may_leave = |(key, entry): (&Key, &Entry)| {
            let leaves = entry.used_unix_ms <= latest && !ledger.pins.contains_key(&key.digest);
            leaves.then_some(Candidate {
                used_unix_ms: entry.used_unix_ms,
                key: *key,
            })
        };
        ledger.files.iter().filter_map(may_leave).collect()
    }

    /// Keeps blobs in the cache until as many `unpin`.
    pub fn pin(&self, digests: &[Digest]) {
        let mut ledger = self.ledger.lock();
        for digest in digests {
            *ledger.pins.entry(*digest).or_default() += 1;
        }
    }

    /// Ends what `pin` began.
    pub fn unpin(&self, digests: &[Digest]) {
        let now = now_unix_ms();
        let mut ledger = self.ledger.lock();
        for digest in digests {
            if let Some(count) = ledger.pins.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    ledger.pins.remove(digest);
                }
            }
            // What was in use until now, was used now.
            for kind in [Kind::Blob, Kind::Executable] {
                let key = Key {
                    kind,
                    digest: *digest,
                };
                if let Some(entry) = ledger.files.get_mut(&key) {
                    entry.used_unix_ms = now;
                }
            }
        }
    }

    fn fresh_path(&self) -> PathBuf {
        let number = self.next_name.fetch_add(1, Ordering::Relaxed);
        self.temporary.join(format!("file-{number}"))
    }

    /// A new file that will have `size` bytes. Makes room for it. Blocks.
    pub fn create(self: &Arc<Self>, size: u64) -> Result<TemporaryFile, WriteError> {
        let reserved = on_disk(size);
        self.reserve(reserved)?;
        let mut temporary = TemporaryFile {
            directory: self.clone(),
            path: self.fresh_path(),
            file: None,
            reserved,
        };
        let mut options = OpenOptions::new();
        options.create_new(true).read(true).write(true).mode(0o600);
        let mut file = options.open(&temporary.path);
        if matches!(&file, Err(error) if error.kind() == io::ErrorKind::NotFound) {
            // Somebody has cleared the whole cache away.
            file = fs::create_dir_all(&self.temporary).and_then(|()| options.open(&temporary.path));
        }
        temporary.file = Some(file.map_err(|error| WriteError::new(error, &self.root))?);
        Ok(temporary)
    }

    fn reserve(&self, size: u64) -> Result<(), WriteError> {
        let limit = self.limit();
        if size > limit {
            return Err(WriteError::TooLarge {
                needed: size,
                limit,
            });
        }
        if self.occupied() + size > limit {
            self.make_room(size);
        }
        let mut ledger = self.ledger.lock();
        let occupied = ledger.size + ledger.reserved + size;
        if occupied > limit {
            return Err(WriteError::Full { limit });
        }
        ledger.reserved += size;
        drop(ledger);
        if occupied > self.high_water() {
            self.crowded.notify_one();
        }
        Ok(())
    }

    /// Puts a file into place under `key`. It replaces one that is there: they are the same, unless
    /// that one was damaged.
    pub fn place(&self, mut temporary: TemporaryFile, key: Key) -> Result<(), WriteError> {
        let failed = |error| WriteError::new(error, &self.root);
        let file = temporary.file().map_err(failed)?;
        file.set_permissions(Permissions::from_mode(key.kind.mode()))
            .map_err(failed)?;
        self.reset_times(file).map_err(failed)?;
        let size = on_disk(file.metadata().map_err(failed)?.len());
        let path = self.path(key);
        let now = now_unix_ms();
        let mut ledger = self.ledger.lock();
        let mut renamed = fs::rename(&temporary.path, &path);
        if matches!(&renamed, Err(error) if error.kind() == io::ErrorKind::NotFound) {
            let folder = path.parent().unwrap_or(&self.root);
            fs::create_dir_all(folder).map_err(failed)?;
            renamed = fs::rename(&temporary.path, &path);
        }
        renamed.map_err(failed)?;
        let entry = Entry {
            size,
            used_unix_ms: now,
            saved_unix_ms: now,
            trust: Trust::Hashed,
        };
        ledger.reserved -= temporary.reserved;
        ledger.size += size;
        if let Some(replaced) = ledger.files.insert(key, entry) {
            ledger.size -= replaced.size;
        }
        drop(ledger);
        temporary.file = None;
        temporary.reserved = 0;
        Ok(())
    }
}

/// A file that is being written; it is gone when this is dropped.
pub(super) struct TemporaryFile {
    directory: Arc<CacheDirectory>,
    path: PathBuf,
    /// `None` once it is in place.
    file: Option<File>,
    reserved: u64,
}

impl TemporaryFile {
    /// The open file.
    pub fn file(&mut self) -> io::Result<&mut File> {
        self.file.as_mut().ok_or(io::ErrorKind::NotFound.into())
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        self.directory.ledger.lock().reserved -= self.reserved;
        if self.file.take().is_some()
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "a temporary file stays behind");
        }
    }
}

/// Empties `directory`, if there is one.
fn clear(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn on_disk(size: u64) -> u64 {
    size.div_ceil(BLOCK) * BLOCK
}

fn hash_and_size(digest: Digest) -> (String, u64) {
    let proto = digest.to_proto();
    (proto.hash, digest.size())
}

/// Half of what is free on the disk, or is the cache's already; at most 50 GiB.
fn default_limit(root: &Path, held: u64) -> u64 {
    const MOST: u64 = 50 << 30;
    let free = rustix::fs::statvfs(root).map_or(MOST, |disk| disk.f_bavail * disk.f_frsize);
    (free.saturating_add(held) / 2).min(MOST)
}

/// Looks at all files. Those that cannot be what their names say are removed.
fn scan(root: &Path, booted: i64) -> io::Result<Ledger> {
    let mut ledger = Ledger::default();
    for kind in Kind::ALL {
        for function in DigestFunction::ALL {
            let name = function.to_string().to_lowercase();
            let folder = root.join(kind.folder()).join(name);
            for shard in entries(&folder)? {
                for file in entries(&shard?.path())? {
                    let file = file?;
                    let metadata = file.metadata()?;
                    let digest = digest_of_name(function, &file.file_name());
                    let digest = digest.filter(|digest| {
                        let as_long = metadata.len() == digest.size() || kind == Kind::Result;
                        metadata.is_file() && as_long
                    });
                    let Some(digest) = digest else {
                        tracing::warn!(path = %file.path().display(), "removed: not what its name says");
                        remove_any(&file.path(), &metadata)?;
                        continue;
                    };
                    let size = on_disk(metadata.len());
                    let used = metadata.atime() * 1000;
                    let entry = Entry {
                        size,
                        // The disk may know of an earlier use only.
                        used_unix_ms: (used + USE_GRAIN_MS).min(now_unix_ms()),
                        saved_unix_ms: used,
                        trust: match metadata.ctime() >= booted {
                            true => Trust::Whole,
                            false => Trust::Suspect,
                        },
                    };
                    ledger.size += size;
                    ledger.files.insert(Key { kind, digest }, entry);
                }
            }
        }
    }
    Ok(ledger)
}

fn remove_any(path: &Path, metadata: &fs::Metadata) -> io::Result<()> {
    match metadata.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    }
}

fn entries(folder: &Path) -> io::Result<impl Iterator<Item = io::Result<fs::DirEntry>>> {
    match fs::read_dir(folder) {
        Ok(entries) => Ok(Some(entries).into_iter().flatten()),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None.into_iter().flatten())
        }
        Err(error) => Err(error),
    }
}

fn digest_of_name(function: DigestFunction, name: &std::ffi::OsStr) -> Option<Digest> {
    let (hash, size) = name.to_str()?.split_once('_')?;
    let proto = crate::reapi::Digest {
        hash: hash.to_owned(),
        size_bytes: size.parse().ok()?,
    };
    function.read(Some(&proto)).ok()
}

/// When the machine started, by its own clock; 0 where it does not say.
pub(super) fn boot_unix_seconds() -> i64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = stat.lines().find_map(|line| line.strip_prefix("btime "));
    line.and_then(|seconds| seconds.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
impl CacheDirectory {
    /// Pretends that a file was last used then.
    pub fn set_used(&self, key: Key, used_unix_ms: i64) {
        let mut ledger = self.ledger.lock();
        ledger.files.get_mut(&key).unwrap().used_unix_ms = used_unix_ms;
    }

    /// What is known.
    pub fn keys(&self) -> Vec<Key> {
        let mut keys: Vec<Key> = self.ledger.lock().files.keys().copied().collect();
        keys.sort_unstable();
        keys
    }
}
