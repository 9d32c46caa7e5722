//! Input trees: read from the CAS, checked, and complete before anything is staged. A directory
//! that many trees share is read and checked once.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use moka::sync::Cache;
use prost::Message;

use super::failure::Failure;
use crate::backend::embedded::blobs::{Blobs, Pin};
use crate::backend::embedded::errors::ReadError;
use crate::digest::{Digest, DigestFunction};
use crate::reapi::{self, NodeProperties};

/// What checked directories that stay in memory take.
const CACHE_BYTES: u64 = 64 * 1024 * 1024;
/// No real tree is deeper.
const MAX_DEPTH: usize = 256;
/// Nor has it more entries. A tree whose directories stand in it again and again could have more
/// of them than any disk.
const MAX_ENTRIES: u64 = 2_000_000;
/// The longest name that file systems take, in bytes.
const MAX_NAME: usize = 255;

/// One directory, all of whose names are good.
#[derive(Debug)]
pub struct Directory {
    /// Its files.
    pub files: Vec<File>,
    /// Its subdirectories.
    pub directories: Vec<(String, Digest)>,
    /// Its symlinks: names and targets.
    pub symlinks: Vec<(String, String)>,
    /// Its own properties.
    pub properties: Properties,
}

/// A file in a directory.
#[derive(Debug)]
pub struct File {
    /// Its name.
    pub name: String,
    /// Its content.
    pub digest: Digest,
    /// Whether it can be run.
    pub executable: bool,
    /// Its properties.
    pub properties: Properties,
}

/// What REAPI lets a tree say of a file or a directory beside its content.
#[derive(Clone, Copy, Debug, Default)]
pub struct Properties {
    /// When its content was last changed.
    pub mtime: Option<std::time::SystemTime>,
    /// Its permission bits.
    pub unix_mode: Option<u32>,
    /// Whether all below is to be read-only (buildbox's `SubtreeReadOnly`).
    pub read_only: bool,
}

impl Properties {
    fn of(message: Option<NodeProperties>) -> Self {
        let Some(message) = message else {
            return Properties::default();
        };
        let mut others = message.properties.iter();
        Properties {
            mtime: message.mtime.and_then(|mtime| mtime.try_into().ok()),
            unix_mode: message.unix_mode.map(|mode| mode & 0o777),
            read_only: others.any(|one| one.name == "SubtreeReadOnly" && one.value == "true"),
        }
    }

    /// Whether it says nothing that the file of a blob, which others have links to, could not have.
    pub fn are_plain(&self) -> bool {
        self.mtime.is_none() && self.unix_mode.is_none()
    }
}

/// A whole tree, which stays in the CAS while this lives.
pub struct InputTree {
    /// All directories in it.
    pub directories: HashMap<Digest, Arc<Directory>>,
    /// The one at the top.
    pub root: Digest,
    _pins: Vec<Pin>,
}

/// Reads trees.
pub struct TreeReader {
    blobs: Arc<Blobs>,
    parsed: Cache<Digest, Arc<Directory>>,
}

impl TreeReader {
    /// One that reads from `blobs`.
    pub fn new(blobs: Arc<Blobs>) -> Self {
        let weigh = |_: &Digest, directory: &Arc<Directory>| {
            let entries =
                directory.files.len() + directory.directories.len() + directory.symlinks.len();
            u32::try_from(256 + entries * 2 * size_of::<File>()).unwrap_or(u32::MAX)
        };
        TreeReader {
            blobs,
            parsed: Cache::builder()
                .weigher(weigh)
                .max_capacity(CACHE_BYTES)
                .build(),
        }
    }

    /// Reads the tree below `root`, all of whose blobs are there then. Blocks.
    ///
    /// # Errors
    /// `Failure`, when blobs are missing, or it is not such that it could stand on a disk.
    pub fn read(&self, root: Digest) -> Result<InputTree, Failure> {
        let mut directories = HashMap::new();
        let mut files = HashSet::new();
        let mut missing = Vec::new();
        let mut pins = Vec::new();
        let mut level = vec![root];
        let mut seen = HashSet::from([root]);
        for _ in 0..MAX_DEPTH {
            if level.is_empty() {
                break;
            }
            pins.push(self.blobs.pin(level.iter().copied()));
            let mut below = Vec::new();
            for digest in level.drain(..) {
                let Some(directory) = self.directory(digest)? else {
                    missing.push(digest);
                    continue;
                };
                files.extend(directory.files.iter().map(|file| file.digest));
                let children = directory.directories.iter().map(|(_, child)| *child);
                below.extend(children.filter(|child| seen.insert(*child)));
                directories.insert(digest, directory);
            }
            level = below;
        }
        if !level.is_empty() {
            return Err(too_deep());
        }
        pins.push(self.blobs.pin(files.iter().copied()));
        missing.extend(files.into_iter().filter(|file| !self.blobs.contains(*file)));
        if !missing.is_empty() {
            return Err(Failure::missing(missing));
        }
        let tree = InputTree {
            directories,
            root,
            _pins: pins,
        };
        match tree.measure(root, &mut HashMap::new(), MAX_DEPTH) {
            Some((entries, _)) if entries > MAX_ENTRIES => Err(Failure::invalid(format!(
                "the input tree has more than {MAX_ENTRIES} files and directories"
            ))),
            Some((_, height)) if height <= MAX_DEPTH => Ok(tree),
            _ => Err(too_deep()),
        }
    }

    /// One directory; `None` if it is not there.
    fn directory(&self, digest: Digest) -> Result<Option<Arc<Directory>>, Failure> {
        if let Some(parsed) = self.parsed.get(&digest) {
            return Ok(Some(parsed));
        }
        let blob = match self.blobs.read_now(digest) {
            Ok(blob) => blob,
            Err(ReadError::NotFound(_) | ReadError::Corrupt(_)) => return Ok(None),
            Err(error) => return Err(Failure::internal(error)),
        };
        let directory = reapi::Directory::decode(blob)
            .map_err(|_| Failure::invalid(format!("{digest} does not hold a Directory")))?;
        let directory = Arc::new(Directory::check(directory, digest.function())?);
        self.parsed.insert(digest, directory.clone());
        Ok(Some(directory))
    }
}

impl InputTree {
    /// Entries at and below a directory, and how deep it is. Each is measured once.
    fn measure(
        &self,
        digest: Digest,
        measured: &mut HashMap<Digest, (u64, usize)>,
        depth: usize,
    ) -> Option<(u64, usize)> {
        if let Some(known) = measured.get(&digest) {
            return Some(*known);
        }
        let below = depth.checked_sub(1)?;
        let directory = self.directories.get(&digest)?;
        let mut entries = 1 + (directory.files.len() + directory.symlinks.len()) as u64;
        let mut height = 0;
        for (_, child) in &directory.directories {
            let (inside, deep) = self.measure(*child, measured, below)?;
            entries = entries.saturating_add(inside);
            height = height.max(deep);
        }
        measured.insert(digest, (entries, height + 1));
        Some((entries, height + 1))
    }
}

impl Directory {
    fn check(message: reapi::Directory, function: DigestFunction) -> Result<Self, Failure> {
        let mut names = HashSet::new();
        let mut name = |name: String| {
            let plain = !matches!(name.as_str(), "" | "." | "..")
                && !name.contains(['/', '\0'])
                && name.len() <= MAX_NAME;
            match plain {
                false => Err(Failure::invalid(format!(
                    "the input tree has an entry named {name:?}, which no file can be called"
                ))),
                true if !names.insert(name.clone()) => Err(Failure::invalid(format!(
                    "a directory of the input tree has two entries named {name:?}"
                ))),
                true => Ok(name),
            }
        };
        let digest = |digest: Option<&reapi::Digest>, name: &str| {
            let invalid = |error| Failure::invalid(format!("{name:?} in the input tree: {error}"));
            function.read(digest).map_err(invalid)
        };
        let files = message.files.into_iter().map(|file| {
            Ok(File {
                digest: digest(file.digest.as_ref(), &file.name)?,
                name: name(file.name)?,
                executable: file.is_executable,
                properties: Properties::of(file.node_properties),
            })
        });
        let files = files.collect::<Result<_, Failure>>()?;
        let directories = message.directories.into_iter().map(|entry| {
            let digest = digest(entry.digest.as_ref(), &entry.name)?;
            Ok((name(entry.name)?, digest))
        });
        let directories = directories.collect::<Result<_, Failure>>()?;
        let symlinks = message.symlinks.into_iter().map(|symlink| {
            match symlink.target.is_empty() || symlink.target.contains('\0') {
                true => Err(Failure::invalid(format!(
                    "the symlink {:?} of the input tree has no usable target",
                    symlink.name
                ))),
                false => Ok((name(symlink.name)?, symlink.target)),
            }
        });
        Ok(Directory {
            files,
            directories,
            symlinks: symlinks.collect::<Result<_, Failure>>()?,
            properties: Properties::of(message.node_properties),
        })
    }
}

fn too_deep() -> Failure {
    let message = format!("the input tree is deeper than {MAX_DEPTH} directories");
    Failure::invalid(message)
}
