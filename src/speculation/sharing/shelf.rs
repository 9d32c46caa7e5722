//! Where shared things stand: in the CAS, behind an action-cache entry that is found by a weak key.
//!
//! The entry stands under an action that nobody runs: its `Command` has two arguments, which say
//! what it is and whose, its input root is empty, it has no platform, and `SALT` for its salt. Its
//! result has one output file, which is what is shared.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use tonic::Status;

use crate::backend::Backend;
use crate::cas::transfer::Cas;
use crate::cas::{Digest, DigestFunction};
use crate::reapi::{Action, ActionResult, Command, Directory, ExecutedActionMetadata, OutputFile};
use crate::speculation::records::interchange::Malformed;
use crate::speculation::records::parent::{ParentIdentity, WeakKey};

/// Changes with the form of what is shared.
const SALT: &[u8] = b"primed.store.v1";
/// The largest blob that is shared or fetched, in bytes.
pub const MAX_SHARED: u64 = 64 * 1024 * 1024;

/// The backend that they stand in.
pub struct Place {
    /// Has the action cache.
    pub backend: Arc<dyn Backend>,
    /// Its CAS.
    pub cas: Cas,
}

/// What is shared of a parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shelf {
    /// An encoded `SpeculativeActions`.
    Records,
    /// An encoded `primed.store.v1.Relatives`.
    Relatives,
}

/// Why something was not shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// Others would not fetch it.
    #[error("they take {0} bytes, which is too many")]
    TooLarge(u64),
    /// The backend is slow, or there is much to share.
    #[error("it took too long")]
    TooSlow,
    /// The backend's own words.
    #[error("the backend answers: {0}")]
    Backend(#[from] Status),
}

/// Why what others share was not used.
#[derive(Debug, thiserror::Error)]
pub enum UnusableError {
    /// The backend's own words.
    #[error("the backend answers: {0}")]
    Backend(#[from] Status),
    /// It is no message, or one that contradicts itself.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// Not primed's form of it.
    #[error("primed did not write them")]
    Foreign,
    /// Something else stands in its place.
    #[error("they are those of another parent")]
    OfAnother,
    /// It would take too much memory.
    #[error("they take {0} bytes, which is too many")]
    TooLarge(u64),
    /// The entry is malformed.
    #[error("their digest is none")]
    NoDigest,
}

impl Shelf {
    /// What the entry's command begins with.
    fn command(self) -> &'static str {
        match self {
            Shelf::Records => "primed-records",
            Shelf::Relatives => "primed-relatives",
        }
    }

    /// The path of the entry's output file.
    fn output(self) -> &'static str {
        match self {
            Shelf::Records => "records.sa",
            Shelf::Relatives => "relatives",
        }
    }

    /// Puts `shared` where others look for it.
    ///
    /// # Errors
    /// `TooLarge`, or the backend's status.
    pub async fn put(
        self,
        place: &Place,
        parent: &ParentIdentity,
        shared: Bytes,
    ) -> Result<Digest, ShareError> {
        let instance = &parent.instance;
        let digest = parent.digest_function.of(&shared);
        if digest.size() > MAX_SHARED {
            return Err(ShareError::TooLarge(digest.size()));
        }
        let Entry { action, mut blobs } = Entry::of(self, parent);
        blobs.insert(digest, shared);
        place.cas.upload(instance, &blobs).await?;
        let result = ActionResult {
            output_files: vec![OutputFile {
                path: self.output().to_owned(),
                digest: Some(digest.to_proto()),
                ..OutputFile::default()
            }],
            execution_metadata: Some(ExecutedActionMetadata {
                worker: env!("CARGO_PKG_NAME").to_owned(),
                ..ExecutedActionMetadata::default()
            }),
            ..ActionResult::default()
        };
        place
            .backend
            .update_action_result(instance, action, result)
            .await?;
        Ok(digest)
    }

    /// What stands there, if anything does.
    ///
    /// # Errors
    /// When it cannot be asked for, its entry cannot be used, or it takes more than `most` bytes.
    pub async fn get(
        self,
        place: &Place,
        parent: &ParentIdentity,
        most: u64,
    ) -> Result<Option<Bytes>, UnusableError> {
        let instance = &parent.instance;
        let entry = Entry::of(self, parent);
        let result = place.backend.action_result(instance, entry.action);
        let Some(result) = result.await? else {
            return Ok(None);
        };
        let mut outputs = result.output_files.iter();
        let Some(output) = outputs.find(|output| output.path == self.output()) else {
            return Ok(None);
        };
        let digest = parent.digest_function.read(output.digest.as_ref());
        let digest = digest.map_err(|_| UnusableError::NoDigest)?;
        if digest.size() > most {
            return Err(UnusableError::TooLarge(digest.size()));
        }
        // One that is gone was shared too long ago.
        let mut blobs = place.cas.fetch(instance, [digest]).await?;
        Ok(blobs.remove(&digest))
    }
}

/// The action that something is found by, and what describes it in the CAS.
struct Entry {
    action: Digest,
    blobs: HashMap<Digest, Bytes>,
}

impl Entry {
    fn of(shelf: Shelf, parent: &ParentIdentity) -> Self {
        Self::under(shelf, parent.weak_key(), parent.digest_function)
    }

    fn under(shelf: Shelf, key: WeakKey, function: DigestFunction) -> Self {
        let command = function.of_message(&Command {
            arguments: vec![shelf.command().to_owned(), key.to_string()],
            output_paths: vec![shelf.output().to_owned()],
            ..Command::default()
        });
        let input_root = function.of_message(&Directory::default());
        let action = function.of_message(&Action {
            command_digest: Some(command.0.to_proto()),
            input_root_digest: Some(input_root.0.to_proto()),
            salt: Bytes::from_static(SALT),
            ..Action::default()
        });
        Entry {
            action: action.0,
            blobs: HashMap::from([command, input_root, action]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    const SHA256: DigestFunction = DigestFunction::Sha256;

    #[test]
    fn the_entry_depends_on_what_it_is_the_weak_key_and_the_digest_function_alone() {
        let entry = Entry::under(Shelf::Records, WeakKey([1; 32]), SHA256);
        let again = Entry::under(Shelf::Records, WeakKey([1; 32]), SHA256);
        assert_eq!(entry.action, again.action);
        for other in [
            Entry::under(Shelf::Records, WeakKey([2; 32]), SHA256),
            Entry::under(Shelf::Relatives, WeakKey([1; 32]), SHA256),
        ] {
            assert_ne!(entry.action, other.action);
        }
        let sha1 = Entry::under(Shelf::Records, WeakKey([1; 32]), DigestFunction::Sha1);
        let is_sha1 = |digest: &Digest| digest.function() == DigestFunction::Sha1;
        assert!(is_sha1(&sha1.action) && sha1.blobs.keys().all(is_sha1));
        let action = Action::decode(entry.blobs[&entry.action].clone()).unwrap();
        let command = SHA256.read(action.command_digest.as_ref()).unwrap();
        let command = Command::decode(entry.blobs[&command].clone()).unwrap();
        assert_eq!(command.arguments, ["primed-records", &"01".repeat(32)]);
        assert!(action.platform.is_none() && !action.do_not_cache);
        // Every primed must find what any other has shared.
        assert_eq!(
            entry.action.to_string(),
            "3b6bb683813a00bee1df8a210a5f7502a2417dc80c6cea619f9bad83a2920f01/155"
        );
    }
}
