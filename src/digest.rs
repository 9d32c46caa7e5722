//! `Digest`: the name of a blob, as a hash and a size, and the function that made it. Text only at
//! the edge. `DigestFunction`: REAPI's names for those that primed can compute.

use std::fmt;
use std::hash::Hash;
use std::str::FromStr;

use bytes::Bytes;
use prost::Message;
use sha2::Digest as _;

use crate::reapi::{self, digest_function::Value};

/// The longest hash, SHA-512's, in bytes.
const MAX_HASH: usize = 64;

/// A digest function, with REAPI's number for it. An action and all that it refers to use the same one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DigestFunction {
    /// MD5.
    Md5 = Value::Md5 as isize,
    /// SHA-1.
    Sha1 = Value::Sha1 as isize,
    /// SHA-256, REAPI's default.
    #[default]
    Sha256 = Value::Sha256 as isize,
    /// SHA-384.
    Sha384 = Value::Sha384 as isize,
    /// SHA-512.
    Sha512 = Value::Sha512 as isize,
    /// BLAKE3 with 32 bytes. Hashes of SHA-256 look the same: it is always named.
    Blake3 = Value::Blake3 as isize,
}

impl DigestFunction {
    /// All of them.
    pub const ALL: [Self; 6] = [
        DigestFunction::Md5,
        DigestFunction::Sha1,
        DigestFunction::Sha256,
        DigestFunction::Sha384,
        DigestFunction::Sha512,
        DigestFunction::Blake3,
    ];

    /// The function of a request about `digest`: the one that its `digest_function` names, or else
    /// the one that the hash's length tells. `None` if primed cannot compute it.
    pub fn of_request(named: i32, digest: &reapi::Digest) -> Option<Self> {
        if named == Value::Unknown as i32 {
            return Self::of_length(digest.hash.len());
        }
        Self::from_proto(named)
    }

    /// The function that REAPI knows by this number.
    pub fn from_proto(value: i32) -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|function| function.to_proto() == value)
    }

    /// What REAPI's `digest_function` fields say.
    pub fn to_proto(self) -> i32 {
        self as i32
    }

    /// The function whose hashes have so many hexadecimal digits, as REAPI infers it.
    fn of_length(digits: usize) -> Option<Self> {
        let mut inferred = Self::ALL
            .into_iter()
            .filter(|function| !function.is_named());
        inferred.find(|function| function.hash_digits() == digits)
    }

    /// Whether names of resources have the function in them, for it cannot be inferred.
    fn is_named(self) -> bool {
        self == DigestFunction::Blake3
    }

    /// Length of a hash in bytes.
    fn hash_bytes(self) -> usize {
        match self {
            DigestFunction::Md5 => 16,
            DigestFunction::Sha1 => 20,
            DigestFunction::Sha256 | DigestFunction::Blake3 => 32,
            DigestFunction::Sha384 => 48,
            DigestFunction::Sha512 => 64,
        }
    }

    /// Length of a hash in hexadecimal digits.
    pub fn hash_digits(self) -> usize {
        2 * self.hash_bytes()
    }

    /// The digest of `blob`.
    pub fn of(self, blob: &[u8]) -> Digest {
        let mut hasher = self.hasher();
        hasher.update(blob);
        hasher.finish()
    }

    /// The digest of an encoded message, with its bytes.
    pub fn of_message(self, message: &impl Message) -> (Digest, Bytes) {
        let blob = Bytes::from(message.encode_to_vec());
        (self.of(&blob), blob)
    }

    /// For a blob that comes in pieces.
    pub fn hasher(self) -> Hasher {
        let state = match self {
            DigestFunction::Md5 => State::Md5(md5::Md5::new()),
            DigestFunction::Sha1 => State::Sha1(sha1::Sha1::new()),
            DigestFunction::Sha256 => State::Sha256(sha2::Sha256::new()),
            DigestFunction::Sha384 => State::Sha384(sha2::Sha384::new()),
            DigestFunction::Sha512 => State::Sha512(sha2::Sha512::new()),
            DigestFunction::Blake3 => State::Blake3(Box::default()),
        };
        Hasher {
            state,
            size: 0,
            function: self,
        }
    }

    /// A digest from its parts; `None` if the hash is not as long as this function makes it.
    pub fn digest(self, hash: &[u8], size: u64) -> Option<Digest> {
        let mut padded = [0; MAX_HASH];
        padded.get_mut(..hash.len())?.copy_from_slice(hash);
        (hash.len() == self.hash_bytes()).then_some(Digest {
            hash: padded,
            size,
            function: self,
        })
    }

    /// Reads a digest in a message that is about digests of this function. One that is absent is
    /// malformed.
    ///
    /// # Errors
    /// `DigestError`.
    pub fn read(self, proto: Option<&reapi::Digest>) -> Result<Digest, DigestError> {
        let Some(proto) = proto else {
            return Err(DigestError("(absent)".to_owned()));
        };
        let error = || DigestError(format!("{}/{}", proto.hash, proto.size_bytes));
        let size = u64::try_from(proto.size_bytes).map_err(|_| error())?;
        let mut hash = [0; MAX_HASH];
        let bytes = &mut hash[..self.hash_bytes()];
        unhex(&proto.hash, bytes).ok_or_else(error)?;
        Ok(Digest {
            hash,
            size,
            function: self,
        })
    }
}

impl fmt::Display for DigestFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Value::try_from(self.to_proto()).map_or("", |value| value.as_str_name());
        f.write_str(name)
    }
}

/// A digest in the making.
pub struct Hasher {
    state: State,
    size: u64,
    function: DigestFunction,
}

enum State {
    Md5(md5::Md5),
    Sha1(sha1::Sha1),
    Sha256(sha2::Sha256),
    Sha384(sha2::Sha384),
    Sha512(sha2::Sha512),
    Blake3(Box<blake3::Hasher>),
}

impl Hasher {
    /// Takes in the next piece.
    pub fn update(&mut self, piece: &[u8]) {
        self.size += piece.len() as u64;
        match &mut self.state {
            State::Md5(state) => state.update(piece),
            State::Sha1(state) => state.update(piece),
            State::Sha256(state) => state.update(piece),
            State::Sha384(state) => state.update(piece),
            State::Sha512(state) => state.update(piece),
            State::Blake3(state) => {
                state.update(piece);
            }
        }
    }

    /// The digest of all pieces.
    pub fn finish(self) -> Digest {
        let mut hash = [0; MAX_HASH];
        let room = &mut hash[..self.function.hash_bytes()];
        match self.state {
            State::Md5(state) => room.copy_from_slice(&state.finalize()),
            State::Sha1(state) => room.copy_from_slice(&state.finalize()),
            State::Sha256(state) => room.copy_from_slice(&state.finalize()),
            State::Sha384(state) => room.copy_from_slice(&state.finalize()),
            State::Sha512(state) => room.copy_from_slice(&state.finalize()),
            State::Blake3(state) => room.copy_from_slice(state.finalize().as_bytes()),
        }
        Digest {
            hash,
            size: self.size,
            function: self.function,
        }
    }
}

/// The digest of a blob.
///
/// 80 bytes, whatever the function. That doubles what a digest takes, but a file in a parsed tree
/// grows by a fifth only (its name and its encoded form stand beside it), and that is the largest
/// of the tables that hold digests.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Digest {
    /// Zeros behind a hash that is shorter.
    hash: [u8; MAX_HASH],
    size: u64,
    function: DigestFunction,
}

/// A digest that is no hash of a known digest function in lower-case hexadecimal digits, and a
/// size of zero or more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a digest of a digest function that primed knows, or not of the right one")]
pub struct DigestError(String);

impl Digest {
    /// The digest of `blob` under SHA-256. What a message refers to is under the function of the
    /// message's own digest instead.
    pub fn of(blob: &[u8]) -> Self {
        DigestFunction::Sha256.of(blob)
    }

    /// The same of an encoded message, with its bytes.
    #[cfg(test)]
    pub fn of_message(message: &impl Message) -> (Self, Bytes) {
        DigestFunction::Sha256.of_message(message)
    }

    /// The function that made it.
    pub fn function(&self) -> DigestFunction {
        self.function
    }

    /// The hash, as long as its function makes it.
    pub fn hash(&self) -> &[u8] {
        &self.hash[..self.function.hash_bytes()]
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

    /// What stands in `ByteStream`'s resource names: `hash/size`, and before it the function where
    /// it cannot be inferred.
    pub fn resource(&self) -> String {
        match self.function.is_named() {
            true => format!("{}/{self}", self.function.to_string().to_lowercase()),
            false => self.to_string(),
        }
    }

    fn hex(&self) -> String {
        self.hash()
            .iter()
            .flat_map(|byte| [byte >> 4, byte & 15])
            .map(|nibble| char::from(DIGITS[usize::from(nibble)]))
            .collect()
    }
}

/// The first bytes of a hash tell it from others as well as all do.
impl Hash for Digest {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        state.write(&self.hash[..16]);
    }
}

/// What each byte stands for as a hexadecimal digit, which is a small one (REAPI, `Digest.hash`);
/// `NO_DIGIT` where it is none.
const VALUES: [u8; 256] = {
    let mut values = [NO_DIGIT; 256];
    let mut value = 0;
    while value < DIGITS.len() {
        values[DIGITS[value] as usize] = value as u8;
        value += 1;
    }
    values
};
const DIGITS: &[u8; 16] = b"0123456789abcdef";
const NO_DIGIT: u8 = 0xff;

/// Reads two hexadecimal digits for each byte. `None` if they are not that many, or some are none.
pub fn unhex(digits: &str, bytes: &mut [u8]) -> Option<()> {
    let (pairs, rest) = digits.as_bytes().as_chunks();
    if pairs.len() != bytes.len() || !rest.is_empty() {
        return None;
    }
    let mut seen = 0;
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        let (high, low) = (VALUES[usize::from(*high)], VALUES[usize::from(*low)]);
        *byte = high << 4 | low;
        seen |= high | low;
    }
    (seen != NO_DIGIT).then_some(())
}

impl TryFrom<&reapi::Digest> for Digest {
    type Error = DigestError;

    /// Infers the function from the hash's length, so never BLAKE3.
    fn try_from(proto: &reapi::Digest) -> Result<Self, Self::Error> {
        let function = DigestFunction::of_length(proto.hash.len());
        function.unwrap_or_default().read(Some(proto))
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    /// Reads `hash/size`, and infers the function.
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
    fn every_function_gives_its_known_hash_and_is_read_back() {
        for (function, name, hash) in [
            (
                DigestFunction::Md5,
                "MD5",
                "900150983cd24fb0d6963f7d28e17f72",
            ),
            (
                DigestFunction::Sha1,
                "SHA1",
                "a9993e364706816aba3e25717850c26c9cd0d89d",
            ),
            (
                DigestFunction::Sha256,
                "SHA256",
                "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ),
            (
                DigestFunction::Sha384,
                "SHA384",
                "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed\
                 8086072ba1e7cc2358baeca134c825a7",
            ),
            (
                DigestFunction::Sha512,
                "SHA512",
                "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
                 2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
            ),
            (
                DigestFunction::Blake3,
                "BLAKE3",
                "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
            ),
        ] {
            let digest = function.of(b"abc");
            let proto = digest.to_proto();
            assert_eq!(function.to_string(), name);
            assert_eq!(digest.to_string(), format!("{hash}/3"));
            assert_eq!(function.read(Some(&proto)), Ok(digest));
            assert_eq!(function.digest(digest.hash(), 3), Some(digest));
            let mut pieces = function.hasher();
            pieces.update(b"a");
            pieces.update(b"bc");
            assert_eq!(pieces.finish(), digest);
            let named = DigestFunction::of_request(function.to_proto(), &proto);
            assert_eq!(named, Some(function));
            let inferred = DigestFunction::of_request(0, &proto);
            if function == DigestFunction::Blake3 {
                assert_eq!(inferred, Some(DigestFunction::Sha256));
                assert_eq!(digest.resource(), format!("blake3/{hash}/3"));
            } else {
                assert_eq!(inferred, Some(function));
                assert_eq!(digest.to_string().parse(), Ok(digest));
                assert_eq!(digest.resource(), format!("{hash}/3"));
            }
        }
    }

    #[test]
    fn equal_hashes_of_two_functions_are_two_digests() {
        let hash = DigestFunction::Sha256.of(b"abc");
        let read = |function: DigestFunction| function.read(Some(&hash.to_proto())).unwrap();
        assert_ne!(read(DigestFunction::Sha256), read(DigestFunction::Blake3));
    }

    #[test]
    fn other_functions_and_odd_texts_are_refused() {
        for text in [
            "2CF24DBA5FB0A30E26E83B2AC5B9E29E1B161E5C1FA7425E73043362938B9824/5",
            "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824/-1",
            "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
            "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b982/5",
            "/0",
        ] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
        let digest = DigestFunction::Sha1.of(b"abc").to_proto();
        assert!(DigestFunction::Sha256.read(Some(&digest)).is_err());
        assert!(DigestFunction::Sha256.read(None).is_err());
        let murmur = Value::Murmur3 as i32;
        assert_eq!(DigestFunction::of_request(murmur, &digest), None);
    }
}
