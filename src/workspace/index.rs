//! What source files contain, known from their metadata: a file is hashed only when its size,
//! times or inode are not those it had when it was last hashed.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::cas::{Digest, DigestFunction};

/// Files whose last change is more recent than this when they are hashed are hashed again next
/// time: the kernel's clock for file times moves in ticks of up to 10 ms, so a second change in
/// the same tick would not show.
const RACY: Duration = Duration::from_millis(50);
/// A file that is being written is read again this often before it is given up.
const ATTEMPTS: usize = 3;

/// What the metadata of a file were when it was hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSignature {
    /// Size in bytes.
    pub size: u64,
    /// Last modification, nanoseconds since 1970.
    pub modified_ns: i64,
    /// Last change of content or metadata, nanoseconds since 1970.
    pub changed_ns: i64,
    /// Inode number.
    pub inode: u64,
    /// Device the inode is on.
    pub device: u64,
}

impl FileSignature {
    fn of(metadata: &Metadata) -> Self {
        FileSignature {
            size: metadata.size(),
            modified_ns: metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec(),
            changed_ns: metadata.ctime() * 1_000_000_000 + metadata.ctime_nsec(),
            inode: metadata.ino(),
            device: metadata.dev(),
        }
    }

    /// Whether a change right after `now` could leave the same signature.
    fn is_racy(&self, now: SystemTime) -> bool {
        let now = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos() as i64);
        now - self.changed_ns.max(self.modified_ns) < RACY.as_nanos() as i64
    }
}

/// The signatures and digests of the files that were asked for.
#[derive(Default)]
pub struct FileIndex {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    files: HashMap<PathBuf, (FileSignature, Digest)>,
    unsaved: Vec<PathBuf>,
}

impl FileIndex {
    /// An index that already knows these files.
    pub fn with(files: impl IntoIterator<Item = (PathBuf, (FileSignature, Digest))>) -> Self {
        FileIndex {
            known: Mutex::new(Known {
                files: files.into_iter().collect(),
                unsaved: Vec::new(),
            }),
        }
    }

    /// The digest under `function` of the file at `path` as it is now. Follows symbolic links.
    /// Blocks.
    ///
    /// # Errors
    /// When there is no regular file at `path`, it cannot be read, or it keeps changing.
    pub fn digest(&self, path: &Path, function: DigestFunction) -> io::Result<Digest> {
        let mut signature = signature(path)?;
        if let Some((known, digest)) = self.known.lock().files.get(path)
            && *known == signature
            && digest.function() == function
        {
            return Ok(*digest);
        }
        for _ in 0..ATTEMPTS {
            let began = SystemTime::now();
            let digest = hash(path, function)?;
            let after = self::signature(path)?;
            if after == signature && digest.size() == signature.size {
                if !signature.is_racy(began) {
                    let mut known = self.known.lock();
                    known.files.insert(path.to_owned(), (signature, digest));
                    known.unsaved.push(path.to_owned());
                }
                return Ok(digest);
            }
            signature = after;
        }
        Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "the file keeps changing",
        ))
    }

    /// What was learned since the last call, for a store to keep.
    pub fn take_unsaved(&self) -> Vec<(PathBuf, (FileSignature, Digest))> {
        let mut known = self.known.lock();
        let mut paths = std::mem::take(&mut known.unsaved);
        paths.sort_unstable();
        paths.dedup();
        paths
            .into_iter()
            .filter_map(|path| known.files.get(&path).copied().map(|file| (path, file)))
            .collect()
    }
}

/// The content of the file at `path`, if it still has `digest`. Blocks.
pub fn read(path: &Path, digest: Digest) -> Option<Bytes> {
    let content = Bytes::from(std::fs::read(path).ok()?);
    (digest.function().of(&content) == digest).then_some(content)
}

fn signature(path: &Path) -> io::Result<FileSignature> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    Ok(FileSignature::of(&metadata))
}

fn hash(path: &Path, function: DigestFunction) -> io::Result<Digest> {
    let mut file = File::open(path)?;
    let mut hasher = function.hasher();
    let mut buffer = vec![0; 128 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finish()),
            read => hasher.update(&buffer[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA256: DigestFunction = DigestFunction::Sha256;

    fn backdate(path: &Path) {
        let file = File::options().write(true).open(path).unwrap();
        let hour_ago = SystemTime::now() - Duration::from_secs(3600);
        file.set_modified(hour_ago).unwrap();
    }

    #[test]
    fn a_known_signature_answers_without_reading_and_any_change_of_it_reads() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("a.h");
        std::fs::write(&path, "one").unwrap();
        let claimed = Digest::of(b"claimed");
        let index = FileIndex::with([(path.clone(), (signature(&path).unwrap(), claimed))]);
        assert_eq!(index.digest(&path, SHA256).unwrap(), claimed);
        let sha1 = DigestFunction::Sha1;
        let other = index.digest(&path, sha1).unwrap();
        assert_eq!(other, sha1.of(b"one"), "it was known by another function");
        backdate(&path);
        assert_eq!(index.digest(&path, SHA256).unwrap(), Digest::of(b"one"));
    }

    #[test]
    fn a_file_that_changed_just_now_is_not_trusted_next_time() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("a.h");
        std::fs::write(&path, "one").unwrap();
        let index = FileIndex::default();
        index.digest(&path, SHA256).unwrap();
        let signature = signature(&path).unwrap();
        assert!(signature.is_racy(SystemTime::now() - RACY));
        let later = SystemTime::now() + Duration::from_secs(1);
        assert!(!signature.is_racy(later));
        let saved = index.take_unsaved().len();
        assert_eq!(saved, index.known.lock().files.len());
        assert!(index.take_unsaved().is_empty());
    }

    #[test]
    fn what_is_no_readable_file_is_an_error() {
        let scratch = tempfile::tempdir().unwrap();
        let index = FileIndex::default();
        assert!(index.digest(scratch.path(), SHA256).is_err());
        assert!(
            index
                .digest(&scratch.path().join("absent"), SHA256)
                .is_err()
        );
    }

    #[test]
    fn content_is_returned_only_if_it_still_matches() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("a.h");
        std::fs::write(&path, "one").unwrap();
        assert_eq!(
            read(&path, Digest::of(b"one")).as_deref(),
            Some(&b"one"[..])
        );
        assert_eq!(read(&path, Digest::of(b"two")), None);
    }
}
