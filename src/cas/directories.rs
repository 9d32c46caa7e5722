//! Parsed directories, kept by digest. A directory that many trees share is fetched and parsed
//! once; whole trees are fetched breadth first, one batch for each level of all trees together.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use moka::sync::Cache;
use prost::Message;
use tonic::Status;

use super::Digest;
use super::transfer::Cas;
use crate::reapi;

/// Encoded bytes of directories that stay in memory.
const CACHE_BYTES: u64 = 128 * 1024 * 1024;
/// No real tree is deeper; a chain that is longer is left unread below this.
const MAX_DEPTH: usize = 256;

/// One directory of an input tree.
#[derive(Debug)]
pub struct Directory {
    /// The message as it is stored.
    pub encoded: Bytes,
    /// Names and digests of its files.
    pub files: Vec<(String, Digest)>,
    /// Names and digests of its subdirectories.
    pub directories: Vec<(String, Digest)>,
    /// Whether encoding the parsed message gives the stored bytes again. One that does not
    /// (unknown fields, odd order) must not be rewritten.
    pub canonical: bool,
}

impl Directory {
    /// Parses a stored directory; `None` if it is malformed.
    pub fn parse(encoded: Bytes) -> Option<Self> {
        let message = reapi::Directory::decode(encoded.clone()).ok()?;
        let canonical =
            message.encoded_len() == encoded.len() && message.encode_to_vec() == encoded;
        let files = message
            .files
            .into_iter()
            .map(|file| Some((entry_name(file.name)?, entry_digest(file.digest)?)))
            .collect::<Option<_>>()?;
        let directories = message
            .directories
            .into_iter()
            .map(|entry| Some((entry_name(entry.name)?, entry_digest(entry.digest)?)))
            .collect::<Option<_>>()?;
        Some(Directory {
            encoded,
            files,
            directories,
            canonical,
        })
    }
}

fn entry_name(name: String) -> Option<String> {
    let plain = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0']);
    plain.then_some(name)
}

fn entry_digest(digest: Option<reapi::Digest>) -> Option<Digest> {
    Digest::try_from(&digest?).ok()
}

/// The path of `name` in the directory at `path`; the root's own path is empty.
pub fn child_path(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}/{name}")
    }
}

/// The directories of some trees, all in memory. A digest that is not in it could not be had.
pub type Trees = HashMap<Digest, Arc<Directory>>;

/// Parsed directories by digest, of all instances: equal digests are equal bytes.
#[derive(Clone)]
pub struct DirectoryCache {
    parsed: Cache<Digest, Arc<Directory>>,
}

impl Default for DirectoryCache {
    fn default() -> Self {
        let weigh = |_: &Digest, directory: &Arc<Directory>| {
            u32::try_from(directory.encoded.len() + 256).unwrap_or(u32::MAX)
        };
        DirectoryCache {
            parsed: Cache::builder()
                .weigher(weigh)
                .max_capacity(CACHE_BYTES)
                .build(),
        }
    }
}

impl DirectoryCache {
    /// Adds a directory that primed made itself, so that it need not be fetched back.
    pub fn insert(&self, digest: Digest, directory: Arc<Directory>) {
        self.parsed.insert(digest, directory);
    }

    /// Loads all directories below `roots`. What the backend does not hold, or holds malformed,
    /// is absent from the answer.
    ///
    /// # Errors
    /// The backend's status, when it cannot be asked at all.
    pub async fn load(
        &self,
        cas: &Cas,
        instance: &str,
        roots: impl IntoIterator<Item = Digest>,
    ) -> Result<Trees, Status> {
        let mut trees = Trees::new();
        let mut seen: HashSet<Digest> = HashSet::new();
        let mut level: Vec<Digest> = roots
            .into_iter()
            .filter(|root| seen.insert(*root))
            .collect();
        for _ in 0..MAX_DEPTH {
            if level.is_empty() {
                break;
            }
            let mut loaded: Vec<(Digest, Arc<Directory>)> = Vec::with_capacity(level.len());
            let mut absent = Vec::new();
            for digest in level.drain(..) {
                match self.parsed.get(&digest) {
                    Some(directory) => loaded.push((digest, directory)),
                    None => absent.push(digest),
                }
            }
            for (digest, blob) in cas.fetch(instance, absent).await? {
                let Some(directory) = Directory::parse(blob) else {
                    tracing::warn!(%digest, "a directory is malformed; actions that hold it are left alone");
                    continue;
                };
                let directory = Arc::new(directory);
                self.parsed.insert(digest, directory.clone());
                loaded.push((digest, directory));
            }
            for (digest, directory) in loaded {
                for (_, child) in &directory.directories {
                    if seen.insert(*child) {
                        level.push(*child);
                    }
                }
                trees.insert(digest, directory);
            }
        }
        Ok(trees)
    }
}
