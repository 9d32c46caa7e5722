//! The CAS on disk. What comes in is hashed, and what goes out has been hashed by this process: a
//! blob that was damaged meanwhile is dropped, and is not found any more.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::OFlags;

use super::cache_directory::{
    CacheDirectory, Key, Kind, Limits, TemporaryFile, Trust, boot_unix_seconds,
};
use super::errors::{OpenError, ReadError, WriteError};
use crate::digest::{Digest, DigestFunction, Hasher};
use crate::task;

/// Nothing leaves that was used so recently.
const RECENT: Duration = Duration::from_secs(3 * 60);
/// How much of a file is in memory at once.
const PIECE: usize = 128 * 1024;

/// The CAS.
pub struct Blobs {
    directory: Arc<CacheDirectory>,
}

impl Blobs {
    /// Opens the cache in `directory`, which may come to hold `limit` bytes, or what the disk has
    /// room for, and looks at what is in it. Blocks.
    ///
    /// # Errors
    /// `OpenError`, when it cannot be used or another process has it open.
    pub fn open(directory: &Path, limit: impl Into<Option<u64>>) -> Result<Arc<Self>, OpenError> {
        let blobs = Blobs::open_unloaded(directory, limit)?;
        blobs.directory.load()?;
        Ok(blobs)
    }

    /// As `open`, but leaves looking at what there is to `CacheDirectory::load`, which has to come
    /// before all else.
    pub(super) fn open_unloaded(
        directory: &Path,
        limit: impl Into<Option<u64>>,
    ) -> Result<Arc<Self>, OpenError> {
        let limits = Limits {
            bytes: limit.into(),
            recent: RECENT,
            booted_unix_seconds: boot_unix_seconds(),
        };
        let directory = Arc::new(CacheDirectory::open(directory, limits)?);
        Ok(Arc::new(Blobs { directory }))
    }

    #[cfg(test)]
    pub(super) fn open_within(directory: &Path, limits: Limits) -> Result<Arc<Self>, OpenError> {
        let directory = Arc::new(CacheDirectory::open(directory, limits)?);
        directory.load()?;
        Ok(Arc::new(Blobs { directory }))
    }

    pub(super) fn directory(&self) -> &Arc<CacheDirectory> {
        &self.directory
    }

    /// A directory on the same file system; what is in it when the cache is opened, is removed.
    pub fn temporary_directory(&self) -> &Path {
        self.directory.temporary()
    }

    /// Whether the blob is there; counts as a use. Blocks, but for longer than a moment only where
    /// the blob may have been damaged.
    pub fn contains(&self, digest: Digest) -> bool {
        is_empty(digest) || self.look(blob(digest), Trust::Whole).is_ok()
    }

    /// Keeps blobs that are there from being evicted, and those that will come.
    pub fn pin(&self, digests: impl IntoIterator<Item = Digest>) -> Pin {
        let digests: Vec<Digest> = digests.into_iter().collect();
        self.directory.pin(&digests);
        Pin {
            directory: self.directory.clone(),
            digests,
        }
    }

    /// All of a blob.
    ///
    /// # Errors
    /// `ReadError`.
    pub async fn read(self: &Arc<Self>, digest: Digest) -> Result<Bytes, ReadError> {
        let blobs = self.clone();
        let read = task::blocking("blob read", move || blobs.read_now(digest)).await;
        read.unwrap_or_else(|| Err(interrupted(digest)))
    }

    /// As `read`, on a thread that may block.
    ///
    /// # Errors
    /// `ReadError`.
    pub fn read_now(&self, digest: Digest) -> Result<Bytes, ReadError> {
        if is_empty(digest) {
            return Ok(Bytes::new());
        }
        let key = blob(digest);
        if self.directory.touch(key).is_none() {
            return Err(ReadError::NotFound(digest));
        }
        let unreadable = |error| self.unreadable(key, error);
        let mut file = File::open(self.directory.path(key)).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        let mut content = Vec::with_capacity(metadata.len() as usize);
        file.read_to_end(&mut content).map_err(unreadable)?;
        if digest.function().of(&content) != digest {
            return Err(self.corrupt(key, &metadata));
        }
        Ok(content.into())
    }

    /// The open file of a blob, at its beginning.
    ///
    /// # Errors
    /// `ReadError`.
    pub async fn open_verified(self: &Arc<Self>, digest: Digest) -> Result<File, ReadError> {
        let blobs = self.clone();
        let open = move || blobs.open_verified_now(digest);
        let opened = task::blocking("blob open", open).await;
        opened.unwrap_or_else(|| Err(interrupted(digest)))
    }

    /// As `open_verified`, on a thread that may block.
    ///
    /// # Errors
    /// `ReadError`.
    pub fn open_verified_now(&self, digest: Digest) -> Result<File, ReadError> {
        let opened = match is_empty(digest) {
            true => File::open("/dev/null"),
            false => return self.look(blob(digest), Trust::Hashed),
        };
        opened.map_err(|source| ReadError::Io { digest, source })
    }

    /// Opens the file of `key`, which was found good at least as far as `wanted`.
    fn look(&self, key: Key, wanted: Trust) -> Result<File, ReadError> {
        let digest = key.digest;
        let Some(trust) = self.directory.touch(key) else {
            return Err(ReadError::NotFound(digest));
        };
        let unreadable = |error| self.unreadable(key, error);
        let path = self.directory.path(key);
        let mut file = File::open(path).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        let untouched = self.directory.is_untouched(&metadata);
        if metadata.len() != digest.size() {
            return Err(self.corrupt(key, &metadata));
        }
        if trust >= wanted && untouched {
            return Ok(file);
        }
        if hash(&mut file, digest.function()).map_err(unreadable)? != digest {
            return Err(self.corrupt(key, &metadata));
        }
        if !untouched {
            self.directory.reset_times(&file).map_err(unreadable)?;
        }
        self.directory.trust(key);
        file.rewind().map_err(unreadable)?;
        Ok(file)
    }

    fn unreadable(&self, key: Key, error: io::Error) -> ReadError {
        if error.kind() == io::ErrorKind::NotFound {
            // Somebody has removed it, or it has left just now.
            self.directory.discard(key, None);
            return ReadError::NotFound(key.digest);
        }
        ReadError::Io {
            digest: key.digest,
            source: error,
        }
    }

    fn corrupt(&self, key: Key, seen: &Metadata) -> ReadError {
        tracing::warn!(digest = %key.digest, "a blob was damaged on disk; it has been dropped");
        self.directory.discard(key, Some(seen.ino()));
        ReadError::Corrupt(key.digest)
    }

    /// Takes in a blob.
    ///
    /// # Errors
    /// `WriteError`; then nothing was taken in.
    pub async fn write(self: &Arc<Self>, digest: Digest, content: Bytes) -> Result<(), WriteError> {
        let blobs = self.clone();
        let write = move || blobs.write_now(digest, &content);
        let written = task::blocking("blob write", write).await;
        written.unwrap_or_else(|| Err(WriteError::Io(stopped())))
    }

    /// As `write`, on a thread that may block.
    ///
    /// # Errors
    /// `WriteError`; then nothing was taken in.
    pub fn write_now(&self, digest: Digest, content: &[u8]) -> Result<(), WriteError> {
        WriteError::unless_equal(digest, digest.function().of(content))?;
        if self.contains(digest) {
            return Ok(());
        }
        let mut temporary = self.directory.create(digest.size())?;
        let written = temporary.file().and_then(|file| file.write_all(content));
        written.map_err(|error| self.unwritable(error))?;
        self.directory.place(temporary, blob(digest))
    }

    /// Begins to take in a blob that comes in pieces.
    ///
    /// # Errors
    /// `WriteError`, when there is no room for it.
    pub fn begin(self: &Arc<Self>, digest: Digest) -> Result<BlobWriter, WriteError> {
        Ok(BlobWriter {
            temporary: self.directory.create(digest.size())?,
            hasher: digest.function().hasher(),
            written: 0,
            digest,
            blobs: self.clone(),
        })
    }

    /// Takes in a file, which stays as it is. It must be a regular one.
    ///
    /// # Errors
    /// `WriteError`.
    pub async fn add_file(
        self: &Arc<Self>,
        function: DigestFunction,
        path: PathBuf,
    ) -> Result<Digest, WriteError> {
        let blobs = self.clone();
        let add = move || blobs.add_file_now(function, &path);
        let added = task::blocking("output", add).await;
        added.unwrap_or_else(|| Err(WriteError::Io(stopped())))
    }

    /// As `add_file`, on a thread that may block.
    ///
    /// # Errors
    /// `WriteError`.
    pub fn add_file_now(
        &self,
        function: DigestFunction,
        path: &Path,
    ) -> Result<Digest, WriteError> {
        let mut source = open_regular(path).map_err(WriteError::Io)?;
        let size = source.metadata().map_err(WriteError::Io)?.len();
        let mut temporary = self.directory.create(size)?;
        let copied = temporary.file().and_then(|file| {
            // What is hashed must be the copy: somebody may still write to the source.
            if rustix::fs::ioctl_ficlone(&*file, &source).is_ok() {
                return hash(file, function);
            }
            copy(&mut source, file, function)
        });
        let digest = copied.map_err(|error| self.unwritable(error))?;
        // Kept where it is in use already: others have links to it.
        if !self.contains(digest) {
            self.directory.place(temporary, blob(digest))?;
        }
        Ok(digest)
    }

    /// Puts an input file at `to`, where there must be nothing: read-only, and not to be written to
    /// by anyone, for it is a hard link wherever that is possible. Blocks.
    ///
    /// # Errors
    /// `ReadError`.
    pub fn link(&self, digest: Digest, executable: bool, to: &Path) -> Result<(), ReadError> {
        let failed = |source| ReadError::Io { digest, source };
        if is_empty(digest) {
            let mode = if executable { 0o555 } else { 0o444 };
            let mut options = OpenOptions::new();
            options.create_new(true).write(true).mode(mode);
            return options.open(to).map(drop).map_err(failed);
        }
        let mut key = blob(digest);
        if executable {
            key.kind = Kind::Executable;
        }
        let mut source = match self.look(key, Trust::Hashed) {
            Err(ReadError::NotFound(_) | ReadError::Corrupt(_)) if executable => {
                self.make_executable(digest)?;
                self.look(key, Trust::Hashed)?
            }
            looked => looked?,
        };
        let path = self.directory.path(key);
        match std::fs::hard_link(&path, to) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(failed(error)),
            // Another file system, too many links, or it has left just now: it is open still.
            Err(_) => copy_to(&mut source, to, executable).map_err(failed),
        }
    }

    /// Makes the executable file of a blob.
    fn make_executable(&self, digest: Digest) -> Result<(), ReadError> {
        let failed = |source| ReadError::Io { digest, source };
        let mut source = self.look(blob(digest), Trust::Hashed)?;
        let created = self.directory.create(digest.size());
        let mut temporary = created.map_err(|error| failed(io::Error::other(error)))?;
        let file = temporary.file().map_err(failed)?;
        if rustix::fs::ioctl_ficlone(&*file, &source).is_err() {
            let copied = copy(&mut source, file, digest.function()).map_err(failed)?;
            if copied != digest {
                let metadata = source.metadata().map_err(failed)?;
                return Err(self.corrupt(blob(digest), &metadata));
            }
        }
        let key = Key {
            kind: Kind::Executable,
            digest,
        };
        let placed = self.directory.place(temporary, key);
        placed.map_err(|error| failed(io::Error::other(error)))
    }

    fn unwritable(&self, error: io::Error) -> WriteError {
        WriteError::new(error, self.directory.root())
    }
}

/// Keeps blobs from being evicted until it is dropped.
#[must_use]
pub struct Pin {
    directory: Arc<CacheDirectory>,
    digests: Vec<Digest>,
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.directory.unpin(&self.digests);
    }
}

/// A blob that is coming in. Nothing of it is left if this is dropped before it is complete.
pub struct BlobWriter {
    blobs: Arc<Blobs>,
    digest: Digest,
    temporary: TemporaryFile,
    hasher: Hasher,
    written: u64,
}

impl BlobWriter {
    /// The blob that it is to become.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// How many bytes have come in.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Takes in the next piece. Blocks.
    ///
    /// # Errors
    /// `WriteError`, when it does not fit, or is more than the digest says.
    pub fn append(&mut self, piece: &[u8]) -> Result<(), WriteError> {
        let size = self.written + piece.len() as u64;
        if size > self.digest.size() {
            return Err(WriteError::TooLong(self.digest));
        }
        let written = self.temporary.file().and_then(|file| file.write_all(piece));
        written.map_err(|error| self.blobs.unwritable(error))?;
        self.hasher.update(piece);
        self.written = size;
        Ok(())
    }

    /// Puts the blob into the cache, now that all of it is there. Blocks.
    ///
    /// # Errors
    /// `WriteError`, when it is not what it was said to be.
    pub fn complete(self) -> Result<(), WriteError> {
        WriteError::unless_equal(self.digest, self.hasher.finish())?;
        if self.blobs.contains(self.digest) {
            return Ok(());
        }
        let directory = &self.blobs.directory;
        directory.place(self.temporary, blob(self.digest))
    }
}

pub(super) fn blob(digest: Digest) -> Key {
    Key {
        kind: Kind::Blob,
        digest,
    }
}

/// The empty blob is always there, under every function.
fn is_empty(digest: Digest) -> bool {
    digest.size() == 0 && digest == digest.function().of(b"")
}

fn stopped() -> io::Error {
    io::Error::other("primed is stopping")
}

fn interrupted(digest: Digest) -> ReadError {
    let source = stopped();
    ReadError::Io { digest, source }
}

/// Opens a file, unless it is a link, or something that would block.
fn open_regular(path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other(format!(
            "{} is not a regular file",
            path.display()
        ))),
    }
}

/// The digest of what there is of `file` from its beginning.
fn hash(file: &mut File, function: DigestFunction) -> io::Result<Digest> {
    file.rewind()?;
    each_piece(file, function, |_| Ok(()))
}

/// Copies all of `source`, and says what it was.
fn copy(source: &mut File, to: &mut File, function: DigestFunction) -> io::Result<Digest> {
    source.rewind()?;
    each_piece(source, function, |piece| to.write_all(piece))
}

fn each_piece(
    source: &mut File,
    function: DigestFunction,
    mut each: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<Digest> {
    let mut hasher = function.hasher();
    let mut room = vec![0; PIECE];
    loop {
        match source.read(&mut room) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(read) => {
                hasher.update(&room[..read]);
                each(&room[..read])?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn copy_to(source: &mut File, to: &Path, executable: bool) -> io::Result<()> {
    let mode = if executable { 0o555 } else { 0o444 };
    let mut options = OpenOptions::new();
    let mut copy = options.create_new(true).write(true).mode(mode).open(to)?;
    if rustix::fs::ioctl_ficlone(&copy, &*source).is_err() {
        source.rewind()?;
        io::copy(source, &mut copy)?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::fs;
    use tempfile::TempDir;

    const PLENTY: u64 = 1 << 30;

    /// Limits under which anything may leave at once.
    pub fn limits(bytes: u64) -> Limits {
        Limits {
            bytes: Some(bytes),
            recent: Duration::ZERO,
            booted_unix_seconds: 0,
        }
    }

    fn open(directory: &TempDir) -> Arc<Blobs> {
        Blobs::open_within(directory.path(), limits(PLENTY)).unwrap()
    }

    pub fn keep(blobs: &Blobs, content: &[u8]) -> Digest {
        let digest = Digest::of(content);
        blobs.write_now(digest, content).unwrap();
        digest
    }

    fn leftovers(blobs: &Blobs) -> usize {
        fs::read_dir(blobs.temporary_directory()).unwrap().count()
    }

    /// Changes a file's content, and not its times if `unseen`.
    fn damage(path: &Path, content: &[u8], unseen: bool) {
        let modified = fs::metadata(path).unwrap().modified().unwrap();
        let mut permissions = fs::metadata(path).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
        fs::set_permissions(path, permissions).unwrap();
        fs::write(path, content).unwrap();
        if unseen {
            File::open(path).unwrap().set_modified(modified).unwrap();
        }
    }

    #[test]
    fn what_was_written_is_read_back_before_and_after_a_restart() {
        let directory = TempDir::new().unwrap();
        let contents: Vec<Vec<u8>> = (0..50u8).map(|n| vec![n; usize::from(n) * 1000]).collect();
        let functions = DigestFunction::ALL;
        for restart in [false, true] {
            let blobs = open(&directory);
            for (content, function) in contents.iter().zip(functions.iter().cycle()) {
                let digest = function.of(content);
                if !restart {
                    assert_eq!(blobs.contains(digest), content.is_empty());
                    blobs.write_now(digest, content).unwrap();
                }
                assert!(blobs.contains(digest));
                assert_eq!(blobs.read_now(digest).unwrap(), content);
                let mut read = Vec::new();
                let mut file = blobs.open_verified_now(digest).unwrap();
                file.read_to_end(&mut read).unwrap();
                assert_eq!(&read, content);
            }
            assert_eq!(leftovers(&blobs), 0);
        }
    }

    #[test]
    fn a_blob_that_is_not_what_it_is_said_to_be_is_refused_and_leaves_nothing() {
        let directory = TempDir::new().unwrap();
        let blobs = open(&directory);
        let digest = Digest::of(b"hello");
        for content in [&b"hallo"[..], b"hell", b"hello!", b""] {
            let refused = blobs.write_now(digest, content);
            assert!(matches!(refused, Err(WriteError::Mismatch(_))));
            let mut writer = blobs.begin(digest).unwrap();
            let refused = writer.append(content).and_then(|()| writer.complete());
            assert!(refused.is_err());
        }
        let mut abandoned = blobs.begin(digest).unwrap();
        abandoned.append(b"he").unwrap();
        drop(abandoned);
        assert!(!blobs.contains(digest));
        assert_eq!(leftovers(&blobs), 0);
        assert_eq!(blobs.directory().occupied(), 0);
    }

    #[test]
    fn a_damaged_blob_is_never_handed_out_and_is_gone_once_that_was_seen() {
        for unseen in [false, true] {
            for restart in [false, true] {
                let directory = TempDir::new().unwrap();
                let mut blobs = open(&directory);
                let digests = [b"one 1", b"two 2", b"three"].map(|one| keep(&blobs, one));
                for digest in digests {
                    damage(&blobs.directory().path(blob(digest)), b"wrong", unseen);
                }
                if restart {
                    drop(blobs);
                    blobs = open(&directory);
                }
                let read = blobs.read_now(digests[0]);
                assert!(matches!(read, Err(ReadError::Corrupt(_))));
                let to = directory.path().join("staged");
                let handed_out = [
                    blobs.open_verified_now(digests[1]).is_ok(),
                    blobs.link(digests[2], false, &to).is_ok(),
                ];
                // Only one that goes unseen even by its times, in a process that has hashed it
                // before, is not hashed again for each use.
                let trusted = unseen && !restart;
                assert_eq!(
                    handed_out, [trusted; 2],
                    "unseen: {unseen}, restart: {restart}"
                );
                if !trusted {
                    for digest in digests {
                        assert!(!blobs.contains(digest));
                    }
                    assert_eq!(blobs.directory().occupied(), 0);
                }
            }
        }
    }

    #[test]
    fn what_is_written_through_a_staged_link_does_not_reach_others() {
        let directory = TempDir::new().unwrap();
        let blobs = open(&directory);
        let digest = keep(&blobs, b"input");
        for (name, executable, mode) in [("a", false, 0o444), ("b", true, 0o555)] {
            let staged = directory.path().join(name);
            blobs.link(digest, executable, &staged).unwrap();
            let metadata = fs::metadata(&staged).unwrap();
            assert_eq!(metadata.mode() & 0o777, mode);
            assert_eq!(metadata.nlink(), 2, "it is a hard link");
            assert_eq!(fs::read(&staged).unwrap(), b"input");
            damage(&staged, b"INPUT", false);
            let other = directory.path().join(format!("{name}2"));
            let _ = blobs.link(digest, executable, &other);
            let seen = fs::read(&other).unwrap_or_default();
            assert_ne!(seen, b"INPUT");
            keep(&blobs, b"input");
        }
        assert_eq!(blobs.read_now(digest).unwrap(), &b"input"[..]);
    }

    #[test]
    fn torn_and_strange_files_are_gone_after_a_start() {
        let directory = TempDir::new().unwrap();
        let blobs = open(&directory);
        let [torn, whole] = [b"torn!", b"whole"].map(|one| keep(&blobs, one));
        let torn_path = blobs.directory().path(blob(torn));
        damage(&torn_path, b"", true);
        let strange = torn_path.with_file_name("strange");
        fs::write(&strange, b"").unwrap();
        fs::write(blobs.temporary_directory().join("file-7"), b"half").unwrap();
        drop(blobs);
        let blobs = open(&directory);
        assert!(!blobs.contains(torn) && blobs.contains(whole));
        assert!(!torn_path.exists() && !strange.exists());
        assert_eq!(leftovers(&blobs), 0);
    }

    #[test]
    fn after_a_reboot_a_blob_is_hashed_before_anybody_is_told_of_it() {
        let directory = TempDir::new().unwrap();
        let blobs = open(&directory);
        let [torn, whole] = [b"torn!", b"whole"].map(|one| keep(&blobs, one));
        damage(&blobs.directory().path(blob(torn)), &[0; 5], true);
        drop(blobs);
        let rebooted = Limits {
            booted_unix_seconds: i64::MAX,
            ..limits(PLENTY)
        };
        let blobs = Blobs::open_within(directory.path(), rebooted).unwrap();
        assert!(!blobs.contains(torn) && blobs.contains(whole));
    }

    #[test]
    fn a_directory_belongs_to_one_at_a_time() {
        let directory = TempDir::new().unwrap();
        let blobs = open(&directory);
        let refused = Blobs::open(directory.path(), None).err().unwrap();
        assert!(matches!(refused, OpenError::InUse(_)));
        drop(blobs);
        Blobs::open(directory.path(), None).unwrap();
    }

    #[test]
    fn an_output_is_taken_in_as_it_is_and_stays_as_it_was() {
        let directory = TempDir::new().unwrap();
        let blobs = open(&directory);
        let path = directory.path().join("output");
        let content: Vec<u8> = (0..400_000u32).map(|n| (n / 7) as u8).collect();
        fs::write(&path, &content).unwrap();
        let before = fs::metadata(&path).unwrap();
        let added = blobs.add_file_now(DigestFunction::Sha1, &path).unwrap();
        assert_eq!(added, DigestFunction::Sha1.of(&content));
        assert_eq!(blobs.read_now(added).unwrap(), content);
        let after = fs::metadata(&path).unwrap();
        assert_eq!(
            (before.mode(), before.modified().unwrap()),
            (after.mode(), after.modified().unwrap())
        );
        fs::write(&path, b"changed").unwrap();
        assert_eq!(blobs.read_now(added).unwrap(), content);
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for odd in [&link, directory.path()] {
            assert!(blobs.add_file_now(DigestFunction::Sha1, odd).is_err());
        }
    }

    #[test]
    fn what_has_taken_a_damaged_files_place_meanwhile_is_not_dropped() {
        let directory = TempDir::new().unwrap();
        let blobs = open(&directory);
        let digest = keep(&blobs, b"again");
        let path = blobs.directory().path(blob(digest));
        let damaged = fs::metadata(&path).unwrap();
        fs::rename(&path, directory.path().join("aside")).unwrap();
        keep(&blobs, b"again");
        blobs.corrupt(blob(digest), &damaged);
        blobs.unreadable(blob(digest), io::ErrorKind::NotFound.into());
        assert!(blobs.contains(digest));
    }

    #[test]
    fn what_somebody_deletes_by_hand_is_simply_not_there() {
        let directory = TempDir::new().unwrap();
        let blobs = open(&directory);
        let digest = keep(&blobs, b"deleted");
        for folder in ["blobs", "temporary"] {
            fs::remove_dir_all(directory.path().join(folder)).unwrap();
        }
        assert!(!blobs.contains(digest));
        assert!(matches!(
            blobs.read_now(digest),
            Err(ReadError::NotFound(_))
        ));
        keep(&blobs, b"deleted");
        assert!(blobs.contains(digest));
    }
}
