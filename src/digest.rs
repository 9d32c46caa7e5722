//! `Digest`: the name of a blob, as 32 bytes of SHA-256 and a size. Text only at the edge.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use prost::Message;
use sha2::{Digest as _, Sha256};

use crate::reapi;

/// The digest of a blob under SHA-256, REAPI's default digest function.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    hash: [u8; 32],
    size: u64,
}

/// A digest that is not 64 lower-case hexadecimal digits and a size of zero or more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a SHA-256 digest")]
pub struct DigestError(String);

impl Digest {
    /// The digest of `blob`.
    pub fn of(blob: &[u8]) -> Self {
        Digest {
            hash: Sha256::digest(blob).into(),
            size: blob.len() as u64,
        }
    }

    /// The digest of an encoded message, with its bytes.
    pub fn of_message(message: &impl Message) -> (Self, Bytes) {
        let blob = Bytes::from(message.encode_to_vec());
        (Digest::of(&blob), blob)
    }

    /// A digest from a finished hash and the number of bytes that went into it.
    pub fn from_hasher(hasher: Sha256, size: u64) -> Self {
        Digest {
            hash: hasher.finalize().into(),
            size,
        }
    }

    /// A digest from its parts, as a store keeps them.
    pub fn from_parts(hash: [u8; 32], size: u64) -> Self {
        Digest { hash, size }
    }

    /// The hash, 32 bytes.
    pub fn hash(&self) -> &[u8; 32] {
        &self.hash
    }

    /// Size of the blob in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The form that REAPI messages carry.
    pub fn to_proto(self) -> reapi::Digest {
        reapi::Digest {
            hash: self.hex(),
            size_bytes: self.size as i64,
        }
    }

    fn hex(&self) -> String {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        self.hash
            .iter()
            .flat_map(|byte| [byte >> 4, byte & 15])
            .map(|nibble| char::from(DIGITS[usize::from(nibble)]))
            .collect()
    }
}

impl TryFrom<&reapi::Digest> for Digest {
    type Error = DigestError;

    fn try_from(proto: &reapi::Digest) -> Result<Self, Self::Error> {
        let error = || DigestError(format!("{}/{}", proto.hash, proto.size_bytes));
        let size = u64::try_from(proto.size_bytes).map_err(|_| error())?;
        let digits = proto.hash.as_bytes();
        if digits.len() != 64 {
            return Err(error());
        }
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = nibble(pair[0]).ok_or_else(error)? << 4 | nibble(pair[1]).ok_or_else(error)?;
        }
        Ok(Digest { hash, size })
    }
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

/// Reads an optional digest of a message: one that is absent is malformed.
pub fn required(proto: Option<&reapi::Digest>) -> Result<Digest, DigestError> {
    match proto {
        Some(digest) => Digest::try_from(digest),
        None => Err(DigestError("(absent)".to_owned())),
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    /// Reads `hash/size`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || DigestError(text.to_owned());
        let (hash, size) = text.split_once('/').ok_or_else(error)?;
        Digest::try_from(&reapi::Digest {
            hash: hash.to_owned(),
            size_bytes: size.parse().map_err(|_| error())?,
        })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.hex(), self.size)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips() {
        let digest = Digest::of(b"hello");
        let text = digest.to_string();
        assert_eq!(
            text,
            "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824/5"
        );
        assert_eq!(text.parse(), Ok(digest));
        assert_eq!(Digest::try_from(&digest.to_proto()), Ok(digest));
    }

    #[test]
    fn other_digest_functions_and_odd_sizes_are_refused() {
        for text in [
            "da39a3ee5e6b4b0d3255bfef95601890afd80709/0",
            "2CF24DBA5FB0A30E26E83B2AC5B9E29E1B161E5C1FA7425E73043362938B9824/5",
            "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824/-1",
            "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
        ] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }
}
