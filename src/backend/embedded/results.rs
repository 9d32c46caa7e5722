//! The action cache on disk. A result is found only if all that it refers to is in the CAS, and it
//! is checksummed, so it is right or absent.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use prost::Message;

use super::blobs::Blobs;
use super::cache_directory::{Key, Kind};
use super::errors::WriteError;
use crate::digest::{Digest, DigestError, DigestFunction};
use crate::reapi::{self, ActionResult, Directory, Tree};
use crate::task;

/// What stands before a result in its file.
const CHECKSUM: usize = 32;

/// The action cache.
pub struct Results {
    blobs: Arc<Blobs>,
}

impl Results {
    /// The results that stand beside `blobs`, and refer to them.
    pub fn new(blobs: Arc<Blobs>) -> Arc<Self> {
        Arc::new(Results { blobs })
    }

    /// The result of `action`, if there is one and all that it refers to is there; all of that is
    /// marked as used.
    pub async fn get(self: &Arc<Self>, instance: &str, action: Digest) -> Option<ActionResult> {
        let key = key(instance, action);
        let results = self.clone();
        task::blocking("result read", move || results.get_now(key, action)).await?
    }

    fn get_now(&self, key: Key, action: Digest) -> Option<ActionResult> {
        let directory = self.blobs.directory();
        directory.touch(key)?;
        let (inode, result) = match self.load(key) {
            Ok((inode, result)) => (Some(inode), result),
            Err(_) => (None, None),
        };
        let complete = result.filter(|result| self.check(result, action.function()).is_ok());
        if complete.is_none() {
            directory.discard(key, inode);
        }
        complete
    }

    /// The inode of a result's file, and the result, if it is one.
    fn load(&self, key: Key) -> io::Result<(u64, Option<ActionResult>)> {
        let mut file = File::open(self.blobs.directory().path(key))?;
        let inode = file.metadata()?.ino();
        let mut stored = Vec::new();
        file.read_to_end(&mut stored)?;
        let result = decode(key, &stored);
        if result.is_none() {
            tracing::warn!("an action result was damaged on disk; it has been dropped");
        }
        Ok((inode, result))
    }

    /// Whether all blobs are there that `result` refers to, which are of `function`. Marks them as
    /// used. Blocks.
    ///
    /// # Errors
    /// `Incomplete`, with the first one that is not.
    pub fn check(&self, result: &ActionResult, function: DigestFunction) -> Result<(), Incomplete> {
        for file in &result.output_files {
            self.present(function, file.digest.as_ref())?;
        }
        for digest in [&result.stdout_digest, &result.stderr_digest] {
            if digest.is_some() {
                self.present(function, digest.as_ref())?;
            }
        }
        for output in &result.output_directories {
            let (tree, root) = (&output.tree_digest, &output.root_directory_digest);
            if tree.is_some() || root.is_none() {
                let tree: Tree = self.message(function, tree.as_ref())?;
                for directory in tree.root.iter().chain(&tree.children) {
                    self.files_present(function, directory)?;
                }
            }
            if root.is_some() {
                self.directories_present(function, root.as_ref())?;
            }
        }
        Ok(())
    }

    fn present(
        &self,
        function: DigestFunction,
        digest: Option<&reapi::Digest>,
    ) -> Result<Digest, Incomplete> {
        let digest = function.read(digest)?;
        match self.blobs.contains(digest) {
            true => Ok(digest),
            false => Err(Incomplete::Absent(digest)),
        }
    }

    fn message<M: Message + Default>(
        &self,
        function: DigestFunction,
        digest: Option<&reapi::Digest>,
    ) -> Result<M, Incomplete> {
        let digest = function.read(digest)?;
        let encoded = self.blobs.read_now(digest);
        let encoded = encoded.map_err(|_| Incomplete::Absent(digest))?;
        M::decode(encoded).map_err(|_| Incomplete::Malformed(digest))
    }

    fn files_present(
        &self,
        function: DigestFunction,
        directory: &Directory,
    ) -> Result<(), Incomplete> {
        for file in &directory.files {
            self.present(function, file.digest.as_ref())?;
        }
        Ok(())
    }

    fn directories_present(
        &self,
        function: DigestFunction,
        root: Option<&reapi::Digest>,
    ) -> Result<(), Incomplete> {
        let mut seen = HashSet::new();
        let mut due = vec![function.read(root)?];
        while let Some(digest) = due.pop() {
            if !seen.insert(digest) {
                continue;
            }
            let directory: Directory = self.message(function, Some(&digest.to_proto()))?;
            self.files_present(function, &directory)?;
            for child in &directory.directories {
                due.push(function.read(child.digest.as_ref())?);
            }
        }
        Ok(())
    }

    /// Keeps the result of an action.
    ///
    /// # Errors
    /// `WriteError`.
    pub async fn put(
        self: &Arc<Self>,
        instance: &str,
        action: Digest,
        result: &ActionResult,
    ) -> Result<(), WriteError> {
        let key = key(instance, action);
        let encoded = result.encode_to_vec();
        let results = self.clone();
        let put = move || results.put_now(key, &encoded);
        let stopped = || WriteError::Io(io::Error::other("primed is stopping"));
        task::blocking("result write", put)
            .await
            .unwrap_or_else(|| Err(stopped()))
    }

    fn put_now(&self, key: Key, encoded: &[u8]) -> Result<(), WriteError> {
        let directory = self.blobs.directory();
        let mut temporary = directory.create((CHECKSUM + encoded.len()) as u64)?;
        let written = temporary.file().and_then(|file| {
            file.write_all(checksum(key, encoded).hash())?;
            file.write_all(encoded)
        });
        written.map_err(|error| WriteError::new(error, directory.root()))?;
        directory.place(temporary, key)
    }
}

/// Why a result is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Incomplete {
    /// It refers to a blob that is not there.
    #[error("the blob {0}, which the result refers to, is not in the cache; upload it first")]
    Absent(Digest),
    /// A blob that it refers to is no such message.
    #[error("the blob {0}, which the result refers to as a directory, is none")]
    Malformed(Digest),
    /// It refers to something that is no digest.
    #[error("the result refers to something else than a digest: {0}")]
    Digest(#[from] DigestError),
}

/// The name of a result.
fn key(instance: &str, action: Digest) -> Key {
    let name = format!("{}\n{action}\n{instance}", action.function());
    Key {
        kind: Kind::Result,
        digest: Digest::of(name.as_bytes()),
    }
}

/// A result as `put_now` has stored it.
fn decode(key: Key, stored: &[u8]) -> Option<ActionResult> {
    let (sum, encoded) = stored.split_at_checked(CHECKSUM)?;
    let right = sum == checksum(key, encoded).hash();
    right.then(|| ActionResult::decode(encoded).ok())?
}

/// Covers the name too: a file under another one's name is no result.
fn checksum(key: Key, encoded: &[u8]) -> Digest {
    let mut hasher = DigestFunction::Sha256.hasher();
    hasher.update(key.digest.hash());
    hasher.update(encoded);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::super::blobs::tests::{keep, limits};
    use super::*;
    use crate::reapi::{DirectoryNode, FileNode, OutputDirectory, OutputFile};
    use tempfile::TempDir;

    fn open(directory: &TempDir) -> (Arc<Blobs>, Arc<Results>) {
        let blobs = Blobs::open_within(directory.path(), limits(1 << 30)).unwrap();
        let results = Results::new(blobs.clone());
        (blobs, results)
    }

    fn file(digest: Digest) -> FileNode {
        FileNode {
            digest: Some(digest.to_proto()),
            ..FileNode::default()
        }
    }

    fn message(blobs: &Blobs, message: &impl Message) -> Digest {
        keep(blobs, &message.encode_to_vec())
    }

    /// A result that refers to one blob in each way there is, and these blobs.
    fn result(blobs: &Blobs) -> (ActionResult, Vec<Digest>) {
        let contents: [&[u8]; 6] = [b"file", b"out", b"err", b"in root", b"in child", b"flat"];
        let mut all: Vec<Digest> = contents
            .iter()
            .map(|content| keep(blobs, content))
            .collect();
        let child = Directory {
            files: vec![file(all[4])],
            ..Directory::default()
        };
        let root = |child: Digest, of: Digest| Directory {
            files: vec![file(of)],
            directories: vec![DirectoryNode {
                name: "child".to_owned(),
                digest: Some(child.to_proto()),
            }],
            ..Directory::default()
        };
        let child_digest = message(blobs, &child);
        let tree = Tree {
            root: Some(root(child_digest, all[3])),
            children: vec![child],
        };
        let tree = message(blobs, &tree);
        let flat = message(blobs, &root(child_digest, all[5]));
        all.extend([child_digest, tree, flat]);
        let result = ActionResult {
            output_files: vec![OutputFile {
                digest: Some(all[0].to_proto()),
                ..OutputFile::default()
            }],
            stdout_digest: Some(all[1].to_proto()),
            stderr_digest: Some(all[2].to_proto()),
            output_directories: vec![
                OutputDirectory {
                    tree_digest: Some(tree.to_proto()),
                    ..OutputDirectory::default()
                },
                OutputDirectory {
                    root_directory_digest: Some(flat.to_proto()),
                    ..OutputDirectory::default()
                },
            ],
            ..ActionResult::default()
        };
        (result, all)
    }

    #[tokio::test]
    async fn a_result_is_found_under_its_own_name_only_and_after_a_restart_too() {
        let directory = TempDir::new().unwrap();
        let (blobs, results) = open(&directory);
        let (result, _) = result(&blobs);
        let action = Digest::of(b"action");
        results.put("a/b", action, &result).await.unwrap();
        drop((blobs, results));
        let (_blobs, results) = open(&directory);
        assert_eq!(results.get("a/b", action).await, Some(result));
        let blake = DigestFunction::Blake3.digest(action.hash(), action.size());
        for (instance, action) in [
            ("a", action),
            ("", action),
            ("a/b", Digest::of(b"other")),
            ("a/b", blake.unwrap()),
        ] {
            assert_eq!(results.get(instance, action).await, None);
        }
    }

    #[tokio::test]
    async fn a_result_is_not_found_when_any_blob_that_it_refers_to_is_gone() {
        let directory = TempDir::new().unwrap();
        let (blobs, results) = open(&directory);
        let action = Digest::of(b"action");
        let count = result(&blobs).1.len();
        for gone in 0..count {
            let (result, all) = result(&blobs);
            results.put("", action, &result).await.unwrap();
            assert!(results.get("", action).await.is_some());
            let blob = super::super::blobs::blob(all[gone]);
            std::fs::remove_file(blobs.directory().path(blob)).unwrap();
            assert!(matches!(
                results.check(&result, DigestFunction::Sha256),
                Err(Incomplete::Absent(_))
            ));
            assert_eq!(results.get("", action).await, None, "without {gone}");
        }
    }

    #[tokio::test]
    async fn a_damaged_or_misplaced_result_is_not_found() {
        let directory = TempDir::new().unwrap();
        let (blobs, results) = open(&directory);
        let (result, _) = result(&blobs);
        let [one, other] = [Digest::of(b"one"), Digest::of(b"other")];
        let path = |action| blobs.directory().path(key("", action));
        for damage in ["flip", "cut", "swap", "empty"] {
            results.put("", one, &result).await.unwrap();
            results
                .put("", other, &ActionResult::default())
                .await
                .unwrap();
            let mut stored = std::fs::read(path(one)).unwrap();
            match damage {
                "flip" => stored[40] ^= 1,
                "cut" => stored.truncate(50),
                "swap" => stored = std::fs::read(path(other)).unwrap(),
                _ => stored.clear(),
            }
            std::fs::remove_file(path(one)).unwrap();
            std::fs::write(path(one), stored).unwrap();
            assert_eq!(results.get("", one).await, None, "{damage}");
            assert!(results.get("", other).await.is_some());
        }
    }
}
