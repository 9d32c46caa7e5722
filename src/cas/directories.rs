//! Parsed directories, kept by digest. A directory that many trees share is fetched and parsed
//! once; whole trees are fetched breadth first, one batch for each level of all trees together.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use moka::sync::Cache;
use prost::Message;
use tonic::Status;

use super::transfer::Cas;
use super::{Digest, DigestFunction};
use crate::reapi;

/// What directories that stay in memory take, encoded and parsed.
const CACHE_BYTES: u64 = 256 * 1024 * 1024;
/// A blob that may be the root of a tree is read up to this size in bytes.
const MAX_ROOT: u64 = 1024 * 1024;
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
    /// Parses a stored directory of a tree under `function`; `None` if it is malformed.
    pub fn parse(encoded: Bytes, function: DigestFunction) -> Option<Self> {
        let message = reapi::Directory::decode(encoded.clone()).ok()?;
        let canonical =
            message.encoded_len() == encoded.len() && message.encode_to_vec() == encoded;
        let files = message
            .files
            .into_iter()
            .map(|file| {
                Some((
                    entry_name(file.name)?,
                    function.read(file.digest.as_ref()).ok()?,
                ))
            })
            .collect::<Option<_>>()?;
        let directories = message
            .directories
            .into_iter()
            .map(|entry| {
                Some((
                    entry_name(entry.name)?,
                    function.read(entry.digest.as_ref()).ok()?,
                ))
            })
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

/// Finds the directories that hold some files, at any depth. Each is looked through once, however
/// many trees it stands in.
#[derive(Debug, Default)]
pub struct Holders {
    files: HashSet<Digest>,
    looked_through: HashMap<Digest, bool>,
}

impl Holders {
    /// Of one or more of `files`.
    pub fn of(files: HashSet<Digest>) -> Self {
        Holders {
            files,
            looked_through: HashMap::new(),
        }
    }

    /// Whether `directory` is one. One that could not be had may be.
    pub fn contain(&mut self, directory: Digest, trees: &Trees) -> bool {
        if let Some(known) = self.looked_through.get(&directory) {
            return *known;
        }
        let holds = trees.get(&directory).is_none_or(|directory| {
            let mut files = directory.files.iter();
            let mut below = directory.directories.iter();
            files.any(|(_, file)| self.files.contains(file))
                || below.any(|(_, child)| self.contain(*child, trees))
        });
        self.looked_through.insert(directory, holds);
        holds
    }
}

/// Parsed directories by digest, of all instances: equal digests are equal bytes.
#[derive(Clone)]
pub struct DirectoryCache {
    parsed: Cache<Digest, Arc<Directory>>,
}

impl Default for DirectoryCache {
    fn default() -> Self {
        let weigh = |_: &Digest, directory: &Arc<Directory>| {
            let entries = directory.files.len() + directory.directories.len();
            let parsed = entries * size_of::<(String, Digest)>();
            u32::try_from(directory.encoded.len() + parsed + 256).unwrap_or(u32::MAX)
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

    /// Those of `candidates` that name a directory. Of others nothing is said.
    ///
    /// # Errors
    /// The backend's status, when it cannot be asked at all.
    pub async fn roots(
        &self,
        cas: &Cas,
        instance: &str,
        candidates: impl IntoIterator<Item = Digest>,
    ) -> Result<Vec<Digest>, Status> {
        let small = candidates
            .into_iter()
            .filter(|root| root.size() <= MAX_ROOT);
        let (mut roots, unknown): (Vec<_>, Vec<_>) =
            small.partition(|root| self.parsed.contains_key(root));
        let blobs = cas.fetch(instance, unknown).await?.into_iter();
        let is_directory = |digest: &Digest, blob: &Bytes| {
            Directory::parse(blob.clone(), digest.function()).is_some()
        };
        let directories = blobs.filter(|(digest, blob)| is_directory(digest, blob));
        roots.extend(directories.map(|(root, _)| root));
        roots.sort_unstable();
        roots.dedup();
        Ok(roots)
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
            for (digest, directory) in self.level(cas, instance, level.drain(..)).await? {
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

    /// Loads these directories and nothing below them. What the backend does not hold, or holds
    /// malformed, is absent from the answer.
    ///
    /// # Errors
    /// The backend's status, when it cannot be asked at all.
    pub async fn level(
        &self,
        cas: &Cas,
        instance: &str,
        digests: impl IntoIterator<Item = Digest>,
    ) -> Result<Trees, Status> {
        let mut loaded = Trees::new();
        let mut absent = Vec::new();
        for digest in digests {
            match self.parsed.get(&digest) {
                Some(directory) => {
                    loaded.insert(digest, directory);
                }
                None => absent.push(digest),
            }
        }
        for (digest, blob) in cas.fetch(instance, absent).await? {
            let Some(directory) = Directory::parse(blob, digest.function()) else {
                tracing::warn!(%digest, "a directory is malformed; actions that hold it are left alone");
                continue;
            };
            let directory = Arc::new(directory);
            self.parsed.insert(digest, directory.clone());
            loaded.insert(digest, directory);
        }
        Ok(loaded)
    }
}

/// The digest of the file at `path` in the tree of `root`.
pub fn find_file(trees: &Trees, root: Digest, path: &str) -> Option<Digest> {
    let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
    find_entry(&find_directory(trees, root, above)?.files, name)
}

/// The directory at `path` in the tree of `root`; the root itself if the path is empty.
pub fn find_directory<'a>(trees: &'a Trees, root: Digest, path: &str) -> Option<&'a Directory> {
    let mut directory = trees.get(&root)?;
    for name in path.split('/').filter(|_| !path.is_empty()) {
        directory = trees.get(&find_entry(&directory.directories, name)?)?;
    }
    Some(directory)
}

/// Entries of a canonical directory are sorted; others may not be.
fn find_entry(entries: &[(String, Digest)], name: &str) -> Option<Digest> {
    let sorted = entries.binary_search_by(|(entry, _)| entry.as_str().cmp(name));
    let at = match sorted {
        Ok(at) => Some(at),
        Err(_) => entries.iter().position(|(entry, _)| entry == name),
    };
    at.map(|at| entries[at].1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cas::memory::Memory;

    fn directory(children: &[(&str, Digest)]) -> Bytes {
        let directories = children.iter().map(|(name, digest)| reapi::DirectoryNode {
            name: (*name).to_owned(),
            digest: Some(digest.to_proto()),
        });
        let message = reapi::Directory {
            directories: directories.collect(),
            ..reapi::Directory::default()
        };
        message.encode_to_vec().into()
    }

    #[tokio::test]
    async fn shared_directories_are_fetched_once_level_by_level() {
        let leaf = directory(&[]);
        let leaf = directory(&[("empty", Digest::of(&leaf))]);
        let middle = directory(&[("a", Digest::of(&leaf)), ("b", Digest::of(&leaf))]);
        let roots = ["x", "y", "z"].map(|name| directory(&[(name, Digest::of(&middle))]));
        let all = roots.iter().chain([&middle, &leaf]).cloned();
        let memory = Memory::holding(all);
        let cas = Cas::new(memory.clone());
        let cache = DirectoryCache::default();
        let digests = roots.each_ref().map(|root| Digest::of(root));
        let trees = cache.load(&cas, "", digests).await.unwrap();
        assert_eq!(trees.len(), 6, "the empty one too");
        let sizes: Vec<usize> = memory.batches_read.lock().iter().map(Vec::len).collect();
        assert_eq!(sizes, [3, 1, 1]);
        let again = cache.load(&cas, "", digests).await.unwrap();
        assert_eq!(again.len(), 6);
        assert_eq!(memory.batches_read.lock().len(), 3, "nothing more is read");
    }

    #[tokio::test]
    async fn what_is_absent_malformed_or_too_deep_is_left_out() {
        let malformed = Bytes::from_static(b"\xff\xff\xff");
        let slash = directory(&[("a/b", Digest::of(b"x"))]);
        let root = directory(&[
            ("absent", Digest::of(b"absent")),
            ("malformed", Digest::of(&malformed)),
            ("slash", Digest::of(&slash)),
        ]);
        let mut chain = vec![directory(&[])];
        for depth in 0..MAX_DEPTH * 2 {
            chain.push(directory(&[("d", Digest::of(&chain[depth]))]));
        }
        let bottom = Digest::of(&chain[0]);
        let top = Digest::of(&chain[MAX_DEPTH * 2]);
        let all = chain.into_iter().chain([malformed, slash, root.clone()]);
        let cas = Cas::new(Memory::holding(all));
        let roots = [Digest::of(&root), top];
        let trees = DirectoryCache::default()
            .load(&cas, "", roots)
            .await
            .unwrap();
        assert_eq!(trees.len(), 1 + MAX_DEPTH);
        assert!(trees.contains_key(&roots[0]) && trees.contains_key(&top));
        assert!(!trees.contains_key(&bottom));
    }

    #[tokio::test]
    async fn only_directories_are_roots() {
        let file = Bytes::from_static(b"\xff\xff\xff");
        let root = directory(&[("empty", Digest::of(b""))]);
        let large = directory(&[(&"n".repeat(MAX_ROOT as usize), Digest::of(b""))]);
        let memory = Memory::holding([file.clone(), root.clone(), large.clone()]);
        let cas = Cas::new(memory.clone());
        let cache = DirectoryCache::default();
        let candidates = [&file, &root, &large, &Bytes::from_static(b"absent")];
        let candidates = candidates.map(|blob| Digest::of(blob));
        let found = cache.roots(&cas, "", candidates).await.unwrap();
        assert_eq!(found, [Digest::of(&root)]);
        cache.load(&cas, "", found.clone()).await.unwrap();
        let before = memory.batches_read.lock().len();
        assert_eq!(cache.roots(&cas, "", [found[0]]).await.unwrap(), found);
        assert_eq!(memory.batches_read.lock().len(), before, "it is known");
    }

    #[test]
    fn directories_hold_what_stands_anywhere_below_them() {
        let mut trees = Trees::new();
        let mut add = |files: &[&str], below: &[(&str, Digest)]| {
            let mut message = reapi::Directory::decode(directory(below)).unwrap();
            message
                .files
                .extend(files.iter().map(|name| reapi::FileNode {
                    name: (*name).to_owned(),
                    digest: Some(Digest::of(name.as_bytes()).to_proto()),
                    ..reapi::FileNode::default()
                }));
            let (digest, encoded) = Digest::of_message(&message);
            trees.insert(
                digest,
                Arc::new(Directory::parse(encoded, digest.function()).unwrap()),
            );
            digest
        };
        let leaf = add(&["wanted", "x"], &[]);
        let middle = add(&[], &[("leaf", leaf)]);
        let other = add(&["y"], &[]);
        let root = add(&["z"], &[("a", other), ("b", middle)]);
        let cut = add(&[], &[("absent", Digest::of(b"absent"))]);
        let mut holders = Holders::of(HashSet::from([Digest::of(b"wanted")]));
        let found = [root, middle, leaf, other, cut];
        let found = found.map(|directory| holders.contain(directory, &trees));
        assert_eq!(found, [true, true, true, false, true]);
    }

    #[test]
    fn a_directory_with_unknown_fields_is_known_for_one_that_must_not_be_rewritten() {
        let plain = directory(&[("a", Digest::of(b"x"))]);
        assert!(
            Directory::parse(plain.clone(), DigestFunction::Sha256)
                .unwrap()
                .canonical
        );
        let odd = [plain.as_ref(), &[0xf8, 0x3f, 1]].concat(); // field 1023
        assert!(
            !Directory::parse(odd.into(), DigestFunction::Sha256)
                .unwrap()
                .canonical
        );
    }
}
