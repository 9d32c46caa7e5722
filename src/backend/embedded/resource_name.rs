//! ByteStream's names of blobs: `[INSTANCE/]blobs/[FUNCTION/]HASH/SIZE`, `compressed-blobs/zstd/` in
//! the place of `blobs/`, and before it `uploads/UUID/` where something is uploaded.

use tonic::Status;

use super::requests;
use crate::digest::{Digest, DigestFunction};
use crate::reapi;

/// A blob, and how it is to be transferred. No instance: all have the same blobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ResourceName {
    pub digest: Digest,
    /// By Zstandard.
    pub compressed: bool,
}

const FORM: &str = "[INSTANCE/]blobs/[FUNCTION/]HASH/SIZE";
const UPLOAD_FORM: &str = "[INSTANCE/]uploads/UUID/blobs/[FUNCTION/]HASH/SIZE";

impl ResourceName {
    /// The name of something to read.
    pub fn to_read(name: &str) -> Result<Self, Status> {
        let segments: Vec<&str> = name.split('/').collect();
        let first = segments.iter().position(|one| is_keyword(one));
        let rest = first.map(|first| &segments[first..]);
        rest.map_or_else(
            || Err(malformed(name, FORM)),
            |rest| parse(name, rest, FORM),
        )
    }

    /// The name of something to write. What follows the size is the client's own business.
    pub fn to_write(name: &str) -> Result<Self, Status> {
        let segments: Vec<&str> = name.split('/').collect();
        let uploads = segments.iter().position(|one| *one == "uploads");
        match uploads.and_then(|uploads| segments.get(uploads + 2..)) {
            Some(rest @ [first, ..]) if is_keyword(first) => parse(name, rest, UPLOAD_FORM),
            _ => Err(malformed(name, UPLOAD_FORM)),
        }
    }
}

fn is_keyword(segment: &str) -> bool {
    matches!(segment, "blobs" | "compressed-blobs")
}

fn parse(name: &str, segments: &[&str], form: &str) -> Result<ResourceName, Status> {
    let (compressed, rest) = match segments {
        ["compressed-blobs", "zstd", rest @ ..] => (true, rest),
        ["compressed-blobs", "identity", rest @ ..] => (false, rest),
        ["compressed-blobs", other, ..] => {
            return Err(Status::invalid_argument(format!(
                "the compressor '{other}' in '{name}' is not supported; zstd is"
            )));
        }
        ["blobs", rest @ ..] => (false, rest),
        _ => return Err(malformed(name, form)),
    };
    let named = rest.first().and_then(|first| {
        let mut all = DigestFunction::ALL.into_iter();
        all.find(|function| function.to_string().to_lowercase() == *first)
    });
    let rest = if named.is_some() { &rest[1..] } else { rest };
    let [hash, size, ..] = rest else {
        return Err(malformed(name, form));
    };
    let digest = reapi::Digest {
        hash: (*hash).to_owned(),
        size_bytes: size.parse().map_err(|_| malformed(name, form))?,
    };
    let function = named.map_or(0, DigestFunction::to_proto);
    Ok(ResourceName {
        digest: requests::only_digest(function, Some(&digest))?,
        compressed,
    })
}

fn malformed(name: &str, form: &str) -> Status {
    Status::invalid_argument(format!(
        "'{name}' is not the name of a blob: it should look like {form}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    #[test]
    fn names_of_every_form_are_read() {
        let sha = Digest::of(b"abc");
        let blake = DigestFunction::Blake3.of(b"abc");
        for (before, digest) in [("", sha), ("a/", sha), ("a/b/c/", sha), ("", blake)] {
            for (form, compressed) in [("blobs", false), ("compressed-blobs/zstd", true)] {
                let expected = ResourceName { digest, compressed };
                let resource = digest.resource();
                let name = format!("{before}{form}/{resource}");
                assert_eq!(ResourceName::to_read(&name).unwrap(), expected, "{name}");
                for after in ["", "/some/file.c"] {
                    let name = format!("{before}uploads/u-1/{form}/{resource}{after}");
                    assert_eq!(ResourceName::to_write(&name).unwrap(), expected, "{name}");
                }
            }
        }
        let named = format!("blobs/sha256/{sha}");
        assert_eq!(ResourceName::to_read(&named).unwrap().digest, sha);
    }

    #[test]
    fn what_names_no_blob_is_refused() {
        let sha = Digest::of(b"abc");
        for name in [
            String::new(),
            "blobs".to_owned(),
            format!("{sha}"),
            format!("blobs/{sha}x"),
            format!("blobs/{}", &sha.to_string()[1..]),
            format!("blobs/md5/{sha}"),
            format!("compressed-blobs/deflate/{sha}"),
            format!("blobs/{}/-1", sha.to_proto().hash),
        ] {
            let refused = ResourceName::to_read(&name).unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument, "{name}");
            let upload = format!("uploads/u/{name}");
            assert!(ResourceName::to_write(&upload).is_err(), "{upload}");
        }
        assert!(ResourceName::to_write(&format!("blobs/{sha}")).is_err());
        assert!(ResourceName::to_write(&format!("uploads/blobs/{sha}")).is_err());
    }
}
