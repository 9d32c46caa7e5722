//! Writes `ActionResult.subactions` (field 99) into encoded messages: into an `ActionResult`, or
//! into the one that an `Operation` ends with. Nothing is decoded and encoded again: the entries
//! come behind everything else in the result, the lengths that count them grow, and all other
//! bytes, unknown fields too, stay as they are and where they are.
//!
//! A message that is malformed, or in any way other than encoders write it, is left alone.

use std::ops::Range;

use bytes::Bytes;
use prost::encoding::{
    DecodeContext, WireType, decode_key, decode_varint, encode_varint, encoded_len_varint, message,
    skip_field,
};

use crate::cas::Digest;

/// The end of the type of what a good `Operation` of `Execute` ends with. (What stands before it
/// differs between backends.)
const EXECUTE_RESPONSE: &[u8] = b"/build.bazel.remote.execution.v2.ExecuteResponse";

/// Numbers of fields.
mod field {
    pub const ACTION_RESULT_SUBACTIONS: u32 = 99;
    pub const OPERATION_DONE: u32 = 3;
    pub const OPERATION_RESPONSE: u32 = 5;
    pub const ANY_TYPE_URL: u32 = 1;
    pub const ANY_VALUE: u32 = 2;
    pub const EXECUTE_RESPONSE_RESULT: u32 = 1;
}

/// A message that holds an `ActionResult` without subactions.
pub struct Unfilled {
    message: Bytes,
    /// What the result stands in, from the outermost field to the innermost.
    around: Vec<Field>,
    /// Where the result ends.
    end: usize,
}

/// A field that begins with its length.
#[derive(Clone, Debug)]
struct Field {
    length: Range<usize>,
    value: Range<usize>,
}

impl Unfilled {
    /// `message` is an `ActionResult`. `None` if it has subactions, or is malformed.
    pub fn result(message: Bytes) -> Option<Self> {
        let whole = 0..message.len();
        Self::within(message, whole, Vec::new())
    }

    /// `message` is an `Operation`. `None` also if it is not done, or holds no result.
    pub fn operation(message: Bytes) -> Option<Self> {
        let whole = 0..message.len();
        match &occurrences(&message, whole.clone(), field::OPERATION_DONE)?[..] {
            [(WireType::Varint, at)] if message[at.clone()] == [1] => {}
            _ => return None,
        }
        let response = only(&message, whole, field::OPERATION_RESPONSE)?;
        let of_type = only(&message, response.value.clone(), field::ANY_TYPE_URL)?;
        if !message[of_type.value].ends_with(EXECUTE_RESPONSE) {
            return None;
        }
        let value = only(&message, response.value.clone(), field::ANY_VALUE)?;
        let result = only(
            &message,
            value.value.clone(),
            field::EXECUTE_RESPONSE_RESULT,
        )?;
        let within = result.value.clone();
        Self::within(message, within, vec![response, value, result])
    }

    fn within(message: Bytes, result: Range<usize>, around: Vec<Field>) -> Option<Self> {
        let end = result.end;
        let present = occurrences(&message, result, field::ACTION_RESULT_SUBACTIONS)?;
        present.is_empty().then_some(Unfilled {
            message,
            around,
            end,
        })
    }

    /// The message with `digests` as the result's subactions.
    pub fn filled(&self, digests: &[Digest]) -> Bytes {
        let mut entries = Vec::new();
        for digest in digests {
            let number = field::ACTION_RESULT_SUBACTIONS;
            message::encode(number, &digest.to_proto(), &mut entries);
        }
        // From the innermost: a length that takes more bytes itself makes the next one larger.
        let mut growth = entries.len();
        let mut lengths = Vec::with_capacity(self.around.len());
        for field in self.around.iter().rev() {
            let length = (field.value.len() + growth) as u64;
            growth += encoded_len_varint(length) - field.length.len();
            lengths.push((field.length.clone(), length));
        }
        let mut filled = Vec::with_capacity(self.message.len() + growth);
        let mut copied = 0;
        for (at, length) in lengths.into_iter().rev() {
            filled.extend_from_slice(&self.message[copied..at.start]);
            encode_varint(length, &mut filled);
            copied = at.end;
        }
        filled.extend_from_slice(&self.message[copied..self.end]);
        filled.extend_from_slice(&entries);
        filled.extend_from_slice(&self.message[self.end..]);
        filled.into()
    }
}

/// Where the field `number` stands in the message at `within`, without its key. `None` if the
/// fields cannot be told apart.
fn occurrences(
    message: &[u8],
    within: Range<usize>,
    number: u32,
) -> Option<Vec<(WireType, Range<usize>)>> {
    let mut found = Vec::new();
    let end = within.end;
    let mut rest = &message[within];
    while !rest.is_empty() {
        let (key, wire_type) = decode_key(&mut rest).ok()?;
        let start = end - rest.len();
        skip_field(wire_type, key, &mut rest, DecodeContext::default()).ok()?;
        if key == number {
            found.push((wire_type, start..end - rest.len()));
        }
    }
    Some(found)
}

/// The field `number` of the message at `within`, which has a length, if it stands there once. (Of
/// two the last would count, or both be merged; nobody sends that.)
fn only(message: &[u8], within: Range<usize>, number: u32) -> Option<Field> {
    let found = occurrences(message, within, number)?;
    let [(WireType::LengthDelimited, at)] = &found[..] else {
        return None;
    };
    let mut value = &message[at.clone()];
    let length = decode_varint(&mut value).ok()?;
    let start = at.end - value.len();
    // One that takes more bytes than it needs might have to shrink.
    (start - at.start == encoded_len_varint(length)).then_some(Field {
        length: at.start..start,
        value: start..at.end,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reapi::google::longrunning::{Operation, operation};
    use crate::reapi::{ActionResult, ExecuteResponse, ExecutedActionMetadata, OutputFile};
    use prost::Message;

    /// An unknown field: number 1023, a varint.
    const UNKNOWN: [u8; 3] = [0xf8, 0x3f, 7];
    /// Another: number 1022, a group with a field in it.
    const UNKNOWN_GROUP: [u8; 7] = [0xf3, 0x3f, 0x08, 0x96, 0x01, 0xf4, 0x3f];

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

        /// Sizes on both sides of where a length takes another byte.
        fn text(&mut self) -> String {
            let size = [0, 1, 40, 110, 127, 128, 300, 16_300, 16_384, 20_000][self.below(10)];
            "x".repeat(size)
        }

        fn digests(&mut self) -> Vec<Digest> {
            let count = [1, 2, 5, 300][self.below(4)];
            (0..count)
                .map(|_| Digest::of(&self.below(usize::MAX).to_be_bytes()))
                .collect()
        }

        fn result(&mut self) -> ActionResult {
            let files = self.below(4);
            ActionResult {
                output_files: (0..files)
                    .map(|_| OutputFile {
                        path: self.text(),
                        digest: Some(Digest::of(b"output").to_proto()),
                        ..OutputFile::default()
                    })
                    .collect(),
                exit_code: self.below(3) as i32,
                stdout_raw: self.text().into(),
                execution_metadata: (self.below(2) == 0).then(|| ExecutedActionMetadata {
                    worker: self.text(),
                    ..ExecutedActionMetadata::default()
                }),
                ..ActionResult::default()
            }
        }

        /// `message`, mostly with unknown fields before and behind it.
        fn encoded(&mut self, message: &impl Message) -> Vec<u8> {
            let mut encoded = message.encode_to_vec();
            if self.below(2) == 0 {
                encoded.splice(..0, UNKNOWN);
            }
            if self.below(2) == 0 {
                encoded.extend(UNKNOWN_GROUP);
            }
            encoded
        }
    }

    /// An operation that holds `result`, the fields around it in either order.
    fn operation_of(numbers: &mut Numbers, result: &[u8]) -> Vec<u8> {
        let response = ExecuteResponse {
            message: numbers.text(),
            cached_result: numbers.below(2) == 0,
            ..ExecuteResponse::default()
        };
        let mut response = numbers.encoded(&response);
        insert(
            &mut response,
            numbers,
            field::EXECUTE_RESPONSE_RESULT,
            result,
        );
        let any = prost_types::Any {
            type_url: "type.googleapis.com/build.bazel.remote.execution.v2.ExecuteResponse".into(),
            value: Vec::new(),
        };
        let mut any = numbers.encoded(&any);
        insert(&mut any, numbers, field::ANY_VALUE, &response);
        let operation = Operation {
            name: numbers.text(),
            done: true,
            ..Operation::default()
        };
        let mut operation = numbers.encoded(&operation);
        insert(&mut operation, numbers, field::OPERATION_RESPONSE, &any);
        operation
    }

    /// Puts a field before or behind all others.
    fn insert(message: &mut Vec<u8>, numbers: &mut Numbers, number: u32, value: &[u8]) {
        let mut field = Vec::new();
        prost::encoding::encode_key(number, WireType::LengthDelimited, &mut field);
        encode_varint(value.len() as u64, &mut field);
        field.extend(value);
        match numbers.below(2) {
            0 => drop(message.splice(..0, field)),
            _ => message.extend(field),
        }
    }

    fn response_of(operation: &Operation) -> ExecuteResponse {
        match &operation.result {
            Some(operation::Result::Response(any)) => {
                ExecuteResponse::decode(any.value.as_slice()).unwrap()
            }
            other => panic!("{other:?}"),
        }
    }

    /// Takes field 99 out of a decoded result.
    fn take(result: &mut ActionResult) -> Vec<Digest> {
        let taken = std::mem::take(&mut result.subactions);
        let taken = taken.iter().map(Digest::try_from);
        taken.collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn a_result_gains_its_subactions_behind_all_its_bytes() {
        let mut numbers = Numbers(1);
        for _ in 0..500 {
            let (result, digests) = (numbers.result(), numbers.digests());
            let before = Bytes::from(numbers.encoded(&result));
            let filled = Unfilled::result(before.clone()).unwrap().filled(&digests);
            assert!(filled.starts_with(&before));
            let mut after = ActionResult::decode(filled.clone()).unwrap();
            assert_eq!(take(&mut after), digests);
            assert_eq!(after, result);
            assert!(Unfilled::result(filled).is_none(), "it has them now");
        }
    }

    #[test]
    fn an_operation_gains_nothing_but_the_subactions_of_its_result() {
        let mut numbers = Numbers(2);
        for _ in 0..2000 {
            let (result, digests) = (numbers.result(), numbers.digests());
            let result = numbers.encoded(&result);
            let before = Bytes::from(operation_of(&mut numbers, &result));
            let unfilled = Unfilled::operation(before.clone()).unwrap();
            assert_eq!(unfilled.filled(&[]), before);
            let filled = unfilled.filled(&digests);

            let mut operation = Operation::decode(filled.clone()).unwrap();
            let mut response = response_of(&operation);
            assert_eq!(take(response.result.as_mut().unwrap()), digests);
            let expected = Operation::decode(before.clone()).unwrap();
            assert_eq!(response, response_of(&expected));
            operation.result.clone_from(&expected.result);
            assert_eq!(operation, expected);

            let mut entries = Vec::new();
            for digest in &digests {
                message::encode(99, &digest.to_proto(), &mut entries);
            }
            let again = Unfilled::operation(filled.clone());
            assert!(again.is_none(), "it has them now");
            // Unknown fields and the order of all are in the bytes.
            assert_eq!(without_entries(&filled, &entries), before);
        }
    }

    /// `filled` with its entries cut out and its lengths put right, by a way of its own.
    fn without_entries(filled: &[u8], entries: &[u8]) -> Vec<u8> {
        fn cut(message: &[u8], path: &[u32], entries: &[u8]) -> Vec<u8> {
            let Some((number, below)) = path.split_first() else {
                return message.strip_suffix(entries).unwrap().to_vec();
            };
            let field = only(message, 0..message.len(), *number).unwrap();
            let value = cut(&message[field.value.clone()], below, entries);
            let mut shorter = message[..field.length.start].to_vec();
            encode_varint(value.len() as u64, &mut shorter);
            shorter.extend(value);
            shorter.extend(&message[field.value.end..]);
            shorter
        }
        cut(filled, &[5, 2, 1], entries)
    }

    #[test]
    fn an_empty_result_can_be_filled() {
        let digests = [Digest::of(b"only")];
        let filled = Unfilled::result(Bytes::new()).unwrap().filled(&digests);
        let result = ActionResult::decode(filled).unwrap();
        assert_eq!(result.subactions, [digests[0].to_proto()]);
        let operation = operation_of(&mut Numbers(3), &[]);
        let filled = Unfilled::operation(operation.into()).unwrap();
        let operation = Operation::decode(filled.filled(&digests)).unwrap();
        let result = response_of(&operation).result.unwrap();
        assert_eq!(result.subactions, [digests[0].to_proto()]);
    }

    #[test]
    fn what_is_odd_or_unfinished_is_left_alone() {
        let mut numbers = Numbers(4);
        let good = operation_of(&mut numbers, &[]);
        assert!(Unfilled::operation(good.clone().into()).is_some());
        let with = |change: &dyn Fn(&mut Operation)| {
            let mut operation = Operation::decode(&good[..]).unwrap();
            change(&mut operation);
            operation.encode_to_vec()
        };
        let any_of = |type_url: &str, value: &[u8]| {
            let any = prost_types::Any {
                type_url: type_url.to_owned(),
                value: value.to_vec(),
            };
            with(&|operation| {
                operation.result = Some(operation::Result::Response(any.clone()));
            })
        };
        let url = "type.googleapis.com/build.bazel.remote.execution.v2.ExecuteResponse";
        let field_twice = [&good[..], &[0x2a, 0]].concat();
        for (what, odd) in [
            ("not done", with(&|operation| operation.done = false)),
            ("no response", with(&|operation| operation.result = None)),
            ("two responses", field_twice),
            ("cut off", good[..good.len() - 1].to_vec()),
            ("trailing garbage", [&good[..], &[0xff]].concat()),
            (
                "an error",
                with(&|operation| {
                    operation.result = Some(operation::Result::Error(Default::default()));
                }),
            ),
            (
                "another type",
                any_of("type.googleapis.com/google.rpc.Status", &[0x0a, 0]),
            ),
            ("no result", any_of(url, &[0x10, 1])),
            ("two results", any_of(url, &[0x0a, 0, 0x0a, 0])),
            ("a number for a result", any_of(url, &[0x08, 1])),
            ("a result beyond its field", any_of(url, &[0x0a, 5, 0])),
            ("a length that is too long", any_of(url, &[0x0a, 0x80, 0])),
            ("a malformed result", any_of(url, &[0x0a, 1, 0x0a])),
            ("subactions already", any_of(url, &[0x0a, 3, 0x9a, 0x06, 0])),
        ] {
            assert!(Unfilled::operation(odd.into()).is_none(), "{what}");
        }
        for (what, odd) in [
            ("cut off", &[0x0a, 5][..]),
            ("field 0", &[0x02, 0]),
            ("the end of no group", &[0x0c]),
            ("subactions already", &[0x9a, 0x06, 0]),
            ("another field 99", &[0x98, 0x06, 1]),
        ] {
            let odd = Bytes::copy_from_slice(odd);
            assert!(Unfilled::result(odd).is_none(), "{what}");
        }
    }

    #[test]
    fn garbage_is_looked_at_without_harm() {
        let mut numbers = Numbers(5);
        let result = numbers.result().encode_to_vec();
        let good = operation_of(&mut numbers, &result);
        for _ in 0..5000 {
            let mut damaged = good.clone();
            for _ in 0..=numbers.below(3) {
                let at = numbers.below(damaged.len());
                damaged[at] = numbers.below(256) as u8;
            }
            damaged.truncate(1 + numbers.below(2 * good.len()));
            let damaged = Bytes::from(damaged);
            for found in [
                Unfilled::operation(damaged.clone()),
                Unfilled::result(damaged.clone()),
            ] {
                let same = found.map(|unfilled| unfilled.filled(&[]));
                assert!(same.is_none_or(|same| same == damaged));
            }
        }
    }
}
