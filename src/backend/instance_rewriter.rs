//! Replaces the instance name in the requests of a forwarded call, whose body is a stream of
//! gRPC frames split anywhere.
//!
//! The name is field 1 of each request that has one. Only that field and the length before the
//! message are written anew; all other bytes pass by reference count, in the order they came.
//! What cannot be understood passes as it is: to judge it is the upstream's business.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field, string};

use super::instances::InstanceMap;

/// Length of the prefix of a gRPC message: a flag and a big-endian length.
const PREFIX: usize = 5;
/// Up to this size a message is searched for a name that does not stand at its beginning, and a
/// name is read. Encoders write field 1 first; a larger message that begins with another field
/// has none. The size of a frame that HTTP/2 always allows.
const SEARCHED: usize = 16 * 1024;
/// Bytes that are copied behind changed ones rather than sent in a frame of their own.
const COPIED: usize = 4 * 1024;

/// Why a call's requests cannot be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RewriteError {
    /// A message is compressed as a whole. The call should end with `UNIMPLEMENTED`.
    #[error(
        "primed maps instance names (--map-instance), which it cannot do in compressed gRPC \
         messages; switch gRPC compression off in the client (compressed blobs may stay)"
    )]
    Compressed,
}

/// The rewriting of one call's requests.
#[derive(Debug)]
pub struct InstanceRewriter {
    map: Arc<InstanceMap>,
    name: NameField,
    state: State,
    /// What is held back of the prefix or message that is being read.
    held: BytesMut,
    /// In the first message an absent name is the unnamed instance. In later ones (of
    /// `ByteStream.Write`, `StageTree`) it says "as before", and must stay absent.
    is_first: bool,
}

/// What field 1 of the requests is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NameField {
    Instance,
    Resource,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Before a message.
    Prefix,
    /// At the beginning of a message of this length, whose name is not known yet.
    Head(usize),
    /// So much of a message passes as it comes.
    Rest(usize),
}

impl NameField {
    /// REAPI's services, remote asset's and casd's own have `instance_name` in field 1 of every
    /// request but those named here (checked against the descriptors in buildbox-casd 1.4.30).
    fn of_method(path: &str) -> Option<Self> {
        let (service, method) = path.strip_prefix('/')?.split_once('/')?;
        match (service, method) {
            ("google.bytestream.ByteStream", _) => Some(NameField::Resource),
            // Operation names are the upstream's.
            ("build.bazel.remote.execution.v2.Execution", "WaitExecution")
            // These describe another server and its instance, or nothing at all.
            | (
                "build.buildgrid.LocalContentAddressableStorage",
                "GetInstanceNameForRemote" | "GetInstanceNameForRemotes" | "GetLocalDiskUsage",
            ) => None,
            (
                "build.bazel.remote.execution.v2.Execution"
                | "build.bazel.remote.execution.v2.ActionCache"
                | "build.bazel.remote.execution.v2.ContentAddressableStorage"
                | "build.bazel.remote.execution.v2.Capabilities"
                | "build.bazel.remote.asset.v1.Fetch"
                | "build.bazel.remote.asset.v1.Push"
                | "build.buildgrid.LocalContentAddressableStorage",
                _,
            ) => Some(NameField::Instance),
            _ => None,
        }
    }
}

impl InstanceRewriter {
    /// A rewriter for a call of the method at `path`; `None` if its requests pass unchanged.
    pub fn for_method(path: &str, map: &Arc<InstanceMap>) -> Option<Self> {
        if map.is_identity() {
            return None;
        }
        Some(InstanceRewriter {
            map: map.clone(),
            name: NameField::of_method(path)?,
            state: State::Prefix,
            held: BytesMut::new(),
            is_first: true,
        })
    }

    /// Takes the next bytes of the body and returns those that can be sent.
    ///
    /// # Errors
    /// `Compressed`; the call cannot go on then.
    pub fn push(&mut self, mut chunk: Bytes) -> Result<Vec<Bytes>, RewriteError> {
        let mut sent = Pieces::default();
        loop {
            match self.state {
                State::Prefix => {
                    if !self.hold(&mut chunk, PREFIX) {
                        break;
                    }
                    if self.held[0] != 0 {
                        return Err(RewriteError::Compressed);
                    }
                    let length = u32::from_be_bytes(std::array::from_fn(|i| self.held[i + 1]));
                    self.held.clear();
                    self.state = State::Head(length as usize);
                }
                State::Head(length) => {
                    let head = match self.held.is_empty() {
                        true => &chunk[..chunk.len().min(length)],
                        false => &self.held[..],
                    };
                    match find_name(head, length) {
                        Found::AfterReading(size) => {
                            if !self.hold(&mut chunk, size) {
                                break;
                            }
                        }
                        found => {
                            let read = match (self.held.is_empty(), &found) {
                                (false, _) => self.held.split().freeze(),
                                (true, Found::At(name)) => chunk.split_to(name.field.end),
                                (true, _) => Bytes::new(),
                            };
                            self.state = State::Rest(length - read.len());
                            self.begin_message(length, read, found, &mut sent);
                            self.is_first = false;
                        }
                    }
                }
                State::Rest(0) => self.state = State::Prefix,
                State::Rest(left) => {
                    if chunk.is_empty() {
                        break;
                    }
                    let part = chunk.split_to(chunk.len().min(left));
                    self.state = State::Rest(left - part.len());
                    sent.pass(part);
                }
            }
        }
        Ok(sent.finish())
    }

    /// What is left at the end of the body: a message that is cut off goes on as it came.
    pub fn end(self) -> Option<Bytes> {
        let mut left = match self.state {
            State::Prefix | State::Rest(_) => BytesMut::new(),
            State::Head(length) => prefix(length),
        };
        left.extend_from_slice(&self.held);
        (!left.is_empty()).then(|| left.freeze())
    }

    /// Moves bytes from `chunk` until `size` are held; whether they are.
    fn hold(&mut self, chunk: &mut Bytes, size: usize) -> bool {
        let wanted = size.saturating_sub(self.held.len()).min(chunk.len());
        self.held.extend_from_slice(&chunk.split_to(wanted));
        self.held.len() >= size
    }

    /// Sends the prefix of a message of `length` and what was `read` of it, with its new name.
    fn begin_message(&self, length: usize, read: Bytes, found: Found, sent: &mut Pieces) {
        let (field, name) = match &found {
            Found::At(at) => (at.field.clone(), &read[at.value.clone()]),
            Found::Absent => (0..0, &[][..]),
            Found::AfterReading(_) | Found::Malformed => return sent.message(length, read),
        };
        let renamed = std::str::from_utf8(name)
            .ok()
            .filter(|name| self.is_first || !name.is_empty())
            .and_then(|name| self.renamed(name));
        let Some(renamed) = renamed else {
            return sent.message(length, read);
        };
        let mut fresh = BytesMut::new();
        if !renamed.is_empty() {
            string::encode(1, &renamed.into_owned(), &mut fresh);
        }
        let new_length = length - field.len() + fresh.len();
        if u32::try_from(new_length).is_err() {
            // No prefix can say that; nobody takes a message of 4 GiB anyhow.
            return sent.message(length, read);
        }
        sent.write(&prefix(new_length));
        sent.pass(read.slice(..field.start));
        sent.write(&fresh);
        sent.pass(read.slice(field.end..));
    }

    /// The upstream's name for `name`, if that is another.
    fn renamed<'a>(&'a self, name: &'a str) -> Option<Cow<'a, str>> {
        match self.name {
            NameField::Instance => Some(self.map.upstream_name(name))
                .filter(|renamed| *renamed != name)
                .map(Cow::Borrowed),
            NameField::Resource => self.map.upstream_resource(name).map(Cow::Owned),
        }
    }
}

/// Where a message's name is.
#[derive(Debug)]
enum Found {
    /// That can be said when this much of the message is there.
    AfterReading(usize),
    At(NameAt),
    Absent,
    /// Not to be understood, or not for certain.
    Malformed,
}

#[derive(Debug)]
struct NameAt {
    /// The whole field.
    field: Range<usize>,
    /// The name in it.
    value: Range<usize>,
}

/// Looks for field 1 in `head`, the beginning of a message of `length`.
fn find_name(head: &[u8], length: usize) -> Found {
    const KEY: u8 = 1 << 3 | WireType::LengthDelimited as u8;
    if length == 0 {
        return Found::Absent;
    }
    match head.first() {
        None => Found::AfterReading(1),
        Some(&KEY) => name_at_beginning(head, length),
        Some(_) if length > SEARCHED => Found::Absent,
        Some(_) if head.len() < length => Found::AfterReading(length),
        Some(_) => search(head).unwrap_or(Found::Malformed),
    }
}

fn name_at_beginning(head: &[u8], length: usize) -> Found {
    // As many bytes as the length of the longest name takes.
    let digits = head[1..].iter().take(3).take_while(|byte| **byte >= 0x80);
    let start = 1 + digits.count() + 1;
    if start > length {
        return Found::Malformed;
    }
    let Some(mut encoded) = head.get(1..start) else {
        return Found::AfterReading(start);
    };
    let size = decode_varint(&mut encoded).ok();
    let size = size.and_then(|size| usize::try_from(size).ok());
    let Some(end) = size
        .filter(|size| *size <= SEARCHED)
        .map(|size| start + size)
    else {
        return Found::Malformed;
    };
    match end {
        _ if end > length => Found::Malformed,
        _ if end > head.len() => Found::AfterReading(end),
        _ => Found::At(NameAt {
            field: 0..end,
            value: start..end,
        }),
    }
}

/// Goes through the fields of a whole message; `None` if they cannot be told apart.
fn search(message: &[u8]) -> Option<Found> {
    let mut found = Found::Absent;
    let mut rest = message;
    while !rest.is_empty() {
        let start = message.len() - rest.len();
        let (number, wire_type) = decode_key(&mut rest).ok()?;
        let mut value = rest;
        skip_field(wire_type, number, &mut rest, DecodeContext::default()).ok()?;
        let end = message.len() - rest.len();
        if number == 1 {
            // Of two names the last would count; nobody sends that.
            if wire_type != WireType::LengthDelimited || !matches!(found, Found::Absent) {
                return None;
            }
            decode_varint(&mut value).ok()?;
            found = Found::At(NameAt {
                field: start..end,
                value: message.len() - value.len()..end,
            });
        }
    }
    Some(found)
}

fn prefix(length: usize) -> BytesMut {
    let mut prefix = BytesMut::with_capacity(PREFIX);
    prefix.put_u8(0);
    // Longer ones do not come: see `begin_message`.
    prefix.put_u32(length as u32);
    prefix
}

/// Bytes on their way out. Little ones are joined, so that they do not become HTTP/2 frames of
/// their own.
#[derive(Default)]
struct Pieces {
    finished: Vec<Bytes>,
    joined: BytesMut,
}

impl Pieces {
    /// An unchanged beginning of a message.
    fn message(&mut self, length: usize, read: Bytes) {
        self.write(&prefix(length));
        self.pass(read);
    }

    fn write(&mut self, bytes: &[u8]) {
        self.joined.extend_from_slice(bytes);
    }

    fn pass(&mut self, bytes: Bytes) {
        if bytes.is_empty() {
            return;
        }
        if !self.joined.is_empty() && bytes.len() <= COPIED {
            return self.write(&bytes);
        }
        self.flush();
        self.finished.push(bytes);
    }

    fn flush(&mut self) {
        if !self.joined.is_empty() {
            self.finished.push(self.joined.split().freeze());
        }
    }

    fn finish(mut self) -> Vec<Bytes> {
        self.flush();
        self.finished
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::upstream::InstanceRule;
    use crate::digest::Digest;
    use crate::reapi::google::bytestream::{ReadRequest, WriteRequest};
    use crate::reapi::{
        BatchUpdateBlobsRequest, ExecuteRequest, FindMissingBlobsRequest, GetCapabilitiesRequest,
        batch_update_blobs_request,
    };
    use prost::Message;

    const CAS: &str = "/build.bazel.remote.execution.v2.ContentAddressableStorage/";
    const WRITE: &str = "/google.bytestream.ByteStream/Write";

    fn map(rules: &[&str]) -> Arc<InstanceMap> {
        let rules: Vec<InstanceRule> = rules.iter().map(|text| text.parse().unwrap()).collect();
        Arc::new(InstanceMap::new(&rules))
    }

    fn rewriter(path: &str, rules: &[&str]) -> InstanceRewriter {
        InstanceRewriter::for_method(path, &map(rules)).unwrap()
    }

    fn framed(message: &[u8]) -> Vec<u8> {
        [&prefix(message.len())[..], message].concat()
    }

    /// Numbers that look random and are the same each time.
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, limit: usize) -> usize {
            self.0 = self
                .0
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (self.0 >> 33) as usize % limit
        }
    }

    /// What comes out for `body`, which must not depend on how it is split.
    fn rewritten(path: &str, rules: &[&str], body: &[u8]) -> Vec<u8> {
        let whole = pushed(rewriter(path, rules), [body]);
        if body.len() < 4096 {
            assert_eq!(pushed(rewriter(path, rules), body.chunks(1)), whole);
        }
        let mut numbers = Numbers(body.len() as u64);
        for largest in [2, 7, 300, 20_000] {
            if body.len() / largest > 20_000 {
                continue;
            }
            for _ in 0..20 {
                let mut rest = body;
                let mut chunks = Vec::new();
                while !rest.is_empty() {
                    let size = (1 + numbers.below(largest)).min(rest.len());
                    let (chunk, after) = rest.split_at(size);
                    chunks.push(chunk);
                    rest = after;
                }
                assert_eq!(pushed(rewriter(path, rules), chunks), whole);
            }
        }
        whole
    }

    fn pushed<'a>(
        mut rewriter: InstanceRewriter,
        chunks: impl IntoIterator<Item = &'a [u8]>,
    ) -> Vec<u8> {
        let mut out = Vec::new();
        for chunk in chunks {
            let pieces = rewriter.push(Bytes::copy_from_slice(chunk)).unwrap();
            assert!(pieces.iter().all(|piece| !piece.is_empty()));
            out.extend(pieces.concat());
        }
        out.extend(rewriter.end().unwrap_or_default());
        out
    }

    fn messages<M: Message + Default>(mut body: &[u8]) -> Vec<M> {
        let mut messages = Vec::new();
        while !body.is_empty() {
            assert_eq!(body[0], 0);
            let length = u32::from_be_bytes(body[1..5].try_into().unwrap()) as usize;
            messages.push(M::decode(&body[5..5 + length]).unwrap());
            body = &body[5 + length..];
        }
        messages
    }

    fn find_missing(instance: &str, digests: usize) -> FindMissingBlobsRequest {
        FindMissingBlobsRequest {
            instance_name: instance.to_owned(),
            blob_digests: (0..digests)
                .map(|number| Digest::of(&number.to_be_bytes()).to_proto())
                .collect(),
            ..FindMissingBlobsRequest::default()
        }
    }

    #[test]
    fn the_name_changes_and_nothing_else_in_messages_of_any_size_and_split() {
        let path = format!("{CAS}FindMissingBlobs");
        let long = "a/".repeat(100) + "z";
        for rules in [
            &["=main", "a=b", "gone="][..],
            &["*=everything/is/one"],
            &["*="],
        ] {
            for digests in [0, 1, 5, 300, 3_000] {
                for instance in ["", "a", "gone", "other", &long] {
                    let request = find_missing(instance, digests);
                    let body = framed(&request.encode_to_vec());
                    let expected = FindMissingBlobsRequest {
                        instance_name: map(rules).upstream_name(instance).to_owned(),
                        ..request
                    };
                    let out = rewritten(&path, rules, &body);
                    assert_eq!(
                        out,
                        framed(&expected.encode_to_vec()),
                        "{instance} {digests}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_body_of_several_messages_keeps_their_bounds() {
        let path = "/build.bazel.remote.execution.v2.Execution/Execute";
        let request = |instance: &str| ExecuteRequest {
            instance_name: instance.to_owned(),
            action_digest: Some(Digest::of(b"x").to_proto()),
            ..ExecuteRequest::default()
        };
        let body = [request("a"), request("b"), request("a")]
            .map(|request| framed(&request.encode_to_vec()))
            .concat();
        let out = rewritten(path, &["a=longer than before"], &body);
        let expected = [
            request("longer than before"),
            request("b"),
            request("longer than before"),
        ];
        assert_eq!(messages::<ExecuteRequest>(&out), expected);
    }

    #[test]
    fn an_empty_message_names_the_unnamed_instance() {
        let path = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities";
        let out = rewritten(path, &["=main"], &framed(b""));
        let expected = GetCapabilitiesRequest {
            instance_name: "main".to_owned(),
        };
        assert_eq!(messages::<GetCapabilitiesRequest>(&out), [expected]);
        // Some encoders write the empty name.
        let out = rewritten(path, &["=main"], &framed(&[0x0a, 0]));
        assert_eq!(out, framed(b"\x0a\x04main"));
    }

    #[test]
    fn a_write_is_renamed_in_its_first_message_and_later_ones_stay_nameless() {
        let write = |name: &str, offset: usize, size| WriteRequest {
            resource_name: name.to_owned(),
            write_offset: offset as i64,
            finish_write: size < 20_000,
            data: vec![offset as u8; size].into(),
        };
        let parts = |first: &str, again: &str| {
            [
                write(first, 0, 100_000),
                write("", 100_000, 100_000),
                write(again, 200_000, 100_000),
                write("", 300_000, 10),
            ]
        };
        let encoded =
            |parts: [WriteRequest; 4]| parts.map(|part| framed(&part.encode_to_vec())).concat();
        for (rules, from, to) in [
            (
                &["=main"][..],
                "uploads/ID/blobs/H/1",
                "main/uploads/ID/blobs/H/1",
            ),
            (
                &["a/b="],
                "a/b/uploads/ID/blobs/H/1",
                "uploads/ID/blobs/H/1",
            ),
            (&["*=c"], "a/uploads/ID/blobs/H/1", "c/uploads/ID/blobs/H/1"),
            (&["*=c"], "no resource at all", "no resource at all"),
        ] {
            let out = rewritten(WRITE, rules, &encoded(parts(from, from)));
            assert_eq!(out, encoded(parts(to, to)), "{from}");
        }
        // casd's StageTree ends with a message that has nothing in it.
        let path = "/build.buildgrid.LocalContentAddressableStorage/StageTree";
        let out = rewritten(path, &["=main"], &[framed(b""), framed(b"")].concat());
        assert_eq!(out, [framed(b"\x0a\x04main"), framed(b"")].concat());
    }

    #[test]
    fn the_data_of_large_messages_is_not_copied() {
        let data = Bytes::from(vec![7; 1_000_000]);
        let request = BatchUpdateBlobsRequest {
            instance_name: "a".to_owned(),
            requests: vec![batch_update_blobs_request::Request {
                data,
                ..batch_update_blobs_request::Request::default()
            }],
            ..BatchUpdateBlobsRequest::default()
        };
        let body = Bytes::from(framed(&request.encode_to_vec()));
        let path = format!("{CAS}BatchUpdateBlobs");
        let mut rewriter = rewriter(&path, &["a=bb"]);
        let pieces = rewriter.push(body.clone()).unwrap();
        let [head, rest] = pieces.as_slice() else {
            panic!("{} pieces", pieces.len());
        };
        assert_eq!(&head[5..], b"\x0a\x02bb");
        assert!(body.as_ptr_range().contains(&rest.as_ptr()));
        assert_eq!(rewriter.end(), None);
    }

    #[test]
    fn a_small_message_is_one_piece() {
        let body = framed(&find_missing("a", 3).encode_to_vec());
        let path = format!("{CAS}FindMissingBlobs");
        for rules in [&["a=b"], &["b=c"]] {
            let pieces = rewriter(&path, rules).push(body.clone().into()).unwrap();
            assert_eq!(pieces.len(), 1);
        }
    }

    #[test]
    fn a_name_that_stands_elsewhere_is_found_in_small_messages() {
        let fields = |name: &str, first: bool| {
            let name = GetCapabilitiesRequest {
                instance_name: name.to_owned(),
            };
            let others = find_missing("", 3).encode_to_vec();
            match first {
                true => [name.encode_to_vec(), others].concat(),
                false => [others, name.encode_to_vec()].concat(),
            }
        };
        let path = format!("{CAS}FindMissingBlobs");
        let out = rewritten(&path, &["a=main"], &framed(&fields("a", false)));
        assert_eq!(out, framed(&fields("main", false)));
        let out = rewritten(&path, &["=main"], &framed(&fields("", false)));
        assert_eq!(out, framed(&fields("main", true)));
    }

    #[test]
    fn what_cannot_be_understood_passes_unchanged() {
        let path = format!("{CAS}FindMissingBlobs");
        let whole = framed(&find_missing("a", 2).encode_to_vec());
        let mut bodies = vec![
            Vec::new(),
            framed(&[0x0a]),                               // no length
            framed(&[0x0a, 5, b'a']),                      // longer than the message
            framed(&[0x0a, 0xff, 0xff, 0xff, 0xff, 1]),    // far longer
            framed(&[0x0a, 0x81, 0x80, 0x80, 0x80, 0x80]), // no end of the length
            framed(&[0x0a, 1, 0xff]),                      // not UTF-8
            framed(&[0x08, 1]),                            // field 1 is no string
            framed(&[0x12]),                               // field 2 is cut off
            framed(&[0xff; 30]),
            framed(b"\x12\x00\x0a\x01a\x0a\x01a"), // two names
            framed(&[0x12; SEARCHED + 1]),
        ];
        // Bodies that end in the prefix, or in the name.
        bodies.extend((1..8).map(|size| whole[..size].to_vec()));
        for body in bodies {
            let rules = &["a=main", "b=c"];
            assert_eq!(rewritten(&path, rules, &body), body);
        }
        // One that ends later was promised to be longer by the name.
        let cut = rewritten(&path, &["a=main"], &whole[..20]);
        let complete = rewritten(&path, &["a=main"], &whole);
        assert_eq!(cut, complete[..23]);
    }

    #[test]
    fn random_bytes_do_no_harm_and_are_never_lost() {
        let mut numbers = Numbers(1);
        for _ in 0..300 {
            let length = numbers.below(200);
            let body: Vec<u8> = (0..length)
                .map(|place| match numbers.below(4) {
                    0 if place % 5 != 0 => 0x0a,
                    1 => numbers.below(256) as u8,
                    _ => 0,
                })
                .collect();
            let mut rewriter = rewriter(&format!("{CAS}GetTree"), &["never=this"]);
            if let Ok(pieces) = rewriter.push(body.clone().into()) {
                let mut out = pieces.concat();
                out.extend(rewriter.end().unwrap_or_default());
                assert_eq!(out, body);
            }
        }
    }

    #[test]
    fn compressed_messages_are_refused_with_a_hint() {
        let mut body = framed(&find_missing("a", 2).encode_to_vec());
        body[0] = 1;
        let mut rewriter = rewriter(&format!("{CAS}FindMissingBlobs"), &["a=b"]);
        let error = rewriter.push(body.into()).unwrap_err();
        assert_eq!(error, RewriteError::Compressed);
        assert!(error.to_string().contains("--map-instance"), "{error}");
    }

    #[test]
    fn only_requests_with_a_name_in_field_1_are_rewritten() {
        let map = map(&["a=b"]);
        let rewrites = |path: &str| InstanceRewriter::for_method(path, &map).is_some();
        for path in [
            "/build.bazel.remote.execution.v2.Execution/Execute",
            "/build.bazel.remote.execution.v2.ActionCache/UpdateActionResult",
            "/build.bazel.remote.execution.v2.ContentAddressableStorage/SpliceBlob",
            "/build.bazel.remote.asset.v1.Push/PushBlob",
            "/build.buildgrid.LocalContentAddressableStorage/CaptureFiles",
            "/google.bytestream.ByteStream/QueryWriteStatus",
        ] {
            assert!(rewrites(path), "{path}");
        }
        for path in [
            "/build.bazel.remote.execution.v2.Execution/WaitExecution",
            "/google.longrunning.Operations/CancelOperation",
            "/build.buildgrid.LocalContentAddressableStorage/GetInstanceNameForRemotes",
            "/build.buildgrid.LocalContentAddressableStorage/GetLocalDiskUsage",
            "/some.Service/Method",
            "",
        ] {
            assert!(!rewrites(path), "{path}");
        }
        let identity = Arc::new(InstanceMap::default());
        assert!(InstanceRewriter::for_method(WRITE, &identity).is_none());
    }

    #[test]
    fn reads_are_renamed_too() {
        let request = |name: &str| ReadRequest {
            resource_name: name.to_owned(),
            read_offset: 5,
            ..ReadRequest::default()
        };
        let body = framed(&request("blobs/HASH/7").encode_to_vec());
        let out = rewritten("/google.bytestream.ByteStream/Read", &["=a/b"], &body);
        assert_eq!(messages::<ReadRequest>(&out), [request("a/b/blobs/HASH/7")]);
    }
}
