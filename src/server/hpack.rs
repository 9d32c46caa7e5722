//! Makes the `:authority` of one HPACK header block (RFC 7541) acceptable to `h2`.
//!
//! [`super::authority`] calls [`rewrite_authority`] with every whole header block a client sends.
//! Promises: only an `:authority` literal that `http::uri::Authority` refuses is changed, the
//! block keeps its length, every string in it keeps its decoded length (so both ends' dynamic tables
//! stay equal in size), and a block that cannot be walked to its end is left as it was.
//!
//! No table state is kept: field boundaries do not depend on it. What this costs is a literal that
//! takes the *name* `:authority` from the dynamic table, which stays unseen. An encoder has the
//! static entry for that, and no reason to; none is known that does.

use std::ops::Range;

use http::uri::Authority;

/// Index of `:authority` in the static table (RFC 7541, Appendix A).
const AUTHORITY_INDEX: usize = 1;
const AUTHORITY: &[u8] = b":authority";
const AUTHORITY_HUFFMAN: &[u8] = b"\xb8\x3b\x53\x39\xec\x32\x7d\x7f";

/// Bound in bytes of a value worth the work: a socket's path has 108, thrice as many when encoded.
const MAX_AUTHORITY: usize = 1 << 10;

/// The bytes with a Huffman code of each length, in the order of their codes (RFC 7541, Appendix B).
/// The code is canonical, so this is all of it up to 15 bits. Longer codes stand for `\`, the
/// other control bytes and bytes beyond ASCII, which h2 refuses whatever is done here.
const HUFFMAN: [&[u8]; 16] = [
    b"",
    b"",
    b"",
    b"",
    b"",
    b"012aceiost",
    b" %-./3456789=A_bdfghlmnpru",
    b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz",
    b"&*,;XZ",
    b"",
    b"!\"()?",
    b"'+|",
    b"#>",
    b"\0$@[]~",
    b"^}",
    b"<`{",
];

/// Stand-in for `byte` in an authority that h2 refuses; its Huffman code has the same length.
///
/// gRPC makes the authority of a `unix:` target by percent-encoding the socket's path, in which it
/// keeps `:`, `[`, `]` and `@` (RFC 3986, 3.2). `http` refuses any `%` outside user information and
/// IPv6 literals, a second `:`, unpaired brackets and a last `@`. Clients with a dialer of their own
/// send the bare path, hence `/`.
fn stand_in(byte: u8) -> u8 {
    match byte {
        b'%' | b'/' => b'-',
        b':' => b'x',
        b'[' | b']' | b'@' => b'~',
        accepted => accepted,
    }
}

/// Rewrites in place the `:authority` literal of `block`, if h2 would refuse it and [`stand_in`] can
/// mend it. Returns whether `block` was changed.
pub(super) fn rewrite_authority(block: &mut [u8]) -> bool {
    let Some(Literal { huffman, range }) = authority_value(block) else {
        return false;
    };
    let value = &mut block[range];
    match mend(value, huffman) {
        Some(mended) if mended.len() == value.len() => {
            value.copy_from_slice(&mended);
            true
        }
        _ => false,
    }
}

/// The value to send instead of `value`, or `None` to leave it alone.
fn mend(value: &[u8], huffman: bool) -> Option<Vec<u8>> {
    if value.len() > MAX_AUTHORITY {
        return None;
    }
    let acceptable = |text: &[u8]| Authority::try_from(text).is_ok();
    if !huffman {
        let mended = || value.iter().copied().map(stand_in).collect::<Vec<_>>();
        return (!acceptable(value)).then(mended).filter(|m| acceptable(m));
    }
    let mut text = huffman_decode(value)?;
    if acceptable(&text) {
        return None;
    }
    text.iter_mut().for_each(|byte| *byte = stand_in(*byte));
    acceptable(&text).then(|| huffman_encode(&text)).flatten()
}

/// Where a string literal's bytes lie in the block.
struct Literal {
    huffman: bool,
    range: Range<usize>,
}

/// The value of the literal named `:authority`, or `None` if there is none or the block is malformed:
/// not to be walked to its end, or with a second `:authority` (RFC 9113, 8.3).
fn authority_value(block: &[u8]) -> Option<Literal> {
    let mut found = None;
    let mut cursor = Cursor { block, at: 0 };
    while let Some(&first) = block.get(cursor.at) {
        // RFC 7541, section 6: the leading bits tell the representation and its integer's prefix.
        let name_prefix = match first {
            0x80.. => {
                cursor.integer(7)?; // an indexed field
                continue;
            }
            0x40.. => 6,
            0x20.. => {
                cursor.integer(5)?; // a dynamic table size update
                continue;
            }
            _ => 4, // not indexed, or never indexed
        };
        let is_authority = match cursor.integer(name_prefix)? {
            0 => {
                let Literal { huffman, range } = cursor.string()?;
                let name = if huffman {
                    AUTHORITY_HUFFMAN
                } else {
                    AUTHORITY
                };
                block[range] == *name
            }
            index => index == AUTHORITY_INDEX,
        };
        let value = cursor.string()?;
        if is_authority && found.replace(value).is_some() {
            return None;
        }
    }
    found
}

struct Cursor<'a> {
    block: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.block.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    /// An integer with a prefix of `bits` bits (RFC 7541, 5.1). Like h2, takes at most four more
    /// bytes, which is beyond any block's length and far from overflow.
    fn integer(&mut self, bits: u32) -> Option<usize> {
        let mask = (1 << bits) - 1;
        let mut value = usize::from(self.byte()?) & mask;
        if value < mask {
            return Some(value);
        }
        for shift in [0, 7, 14, 21] {
            let byte = self.byte()?;
            value += usize::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    /// A string literal (RFC 7541, 5.2).
    fn string(&mut self) -> Option<Literal> {
        let huffman = self.block.get(self.at)? & 0x80 != 0;
        let length = self.integer(7)?;
        let range = self.at..self.at.checked_add(length)?;
        self.at = range.end;
        (range.end <= self.block.len()).then_some(Literal { huffman, range })
    }
}

/// Decodes a Huffman string, or `None` for one that has codes beyond [`HUFFMAN`] or bad padding.
fn huffman_decode(coded: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::with_capacity(coded.len() * 8 / 5);
    // The code read so far, its length, and the first code of that length.
    let (mut code, mut length, mut first) = (0, 0, 0);
    let bits = |byte: &u8| {
        let byte = usize::from(*byte);
        (0..8).rev().map(move |bit| byte >> bit & 1)
    };
    for bit in coded.iter().flat_map(bits) {
        code = code << 1 | bit;
        length += 1;
        first <<= 1;
        let row = HUFFMAN.get(length)?;
        if let Some(&byte) = row.get(code - first) {
            text.push(byte);
            (code, length, first) = (0, 0, 0);
        } else {
            first += row.len();
        }
    }
    // What remains must be the beginning, shorter than a byte, of the end mark's thirty ones.
    (length < 8 && code + 1 == 1 << length).then_some(text)
}

/// Encodes `text`, or `None` if it has a byte that [`HUFFMAN`] lacks.
fn huffman_encode(text: &[u8]) -> Option<Vec<u8>> {
    let mut coded = Vec::with_capacity(text.len());
    let (mut bits, mut pending) = (0_u64, 0);
    for byte in text {
        let mut first = 0;
        let (length, code) = HUFFMAN.iter().enumerate().find_map(|(length, row)| {
            first <<= 1;
            let place = row.iter().position(|b| b == byte);
            let code = place.map(|place| (length, (first + place) as u64));
            first += row.len();
            code
        })?;
        bits = bits << length | code;
        pending += length;
        while pending >= 8 {
            pending -= 8;
            coded.push((bits >> pending) as u8);
        }
    }
    if pending > 0 {
        coded.push((bits << (8 - pending)) as u8 | 0xff >> pending);
    }
    Some(coded)
}

/// Writing header blocks, for the tests here and in [`super::authority`].
#[cfg(test)]
pub(super) mod encoder {
    pub(in crate::server) fn huffman(text: &str) -> Vec<u8> {
        super::huffman_encode(text.as_bytes()).expect("printable ASCII without a backslash")
    }

    pub(in crate::server) fn integer(top: u8, bits: u32, value: usize) -> Vec<u8> {
        let mask = (1 << bits) - 1;
        if value < mask {
            return vec![top | value as u8];
        }
        let (mut out, mut rest) = (vec![top | mask as u8], value - mask);
        while rest >= 0x80 {
            out.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        out.push(rest as u8);
        out
    }

    pub(in crate::server) fn string(text: &str, coded: bool) -> Vec<u8> {
        let bytes = if coded { huffman(text) } else { text.into() };
        let mut out = integer(if coded { 0x80 } else { 0 }, 7, bytes.len());
        out.extend(bytes);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::encoder::{huffman, integer, string};
    use super::*;

    const SENT: &str = "tmp%2Fa.sock";
    const WANTED: &str = "tmp-2Fa.sock";

    fn hex(digits: &str) -> Vec<u8> {
        let digit = |c: char| c.to_digit(16).unwrap() as u8;
        let digits: Vec<u8> = digits.chars().filter(|c| *c != ' ').map(digit).collect();
        digits
            .chunks(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect()
    }

    fn rewritten(block: &[u8]) -> Vec<u8> {
        let mut copy = block.to_vec();
        let changed = rewrite_authority(&mut copy);
        assert_eq!(changed, copy != block);
        copy
    }

    fn assert_untouched(block: &[u8]) {
        assert_eq!(rewritten(block), block);
    }

    /// An `:authority` field in each way it can be written: first byte and name, then the value.
    fn authority_fields(value: &str) -> Vec<Vec<u8>> {
        let spelt = |top, coded| [vec![top], string(":authority", coded)].concat();
        let names = [0x40, 0x00, 0x10]
            .into_iter()
            .flat_map(|top| [vec![top | 1], spelt(top, false), spelt(top, true)]);
        names
            .flat_map(|name| {
                [false, true].map(|coded| [name.clone(), string(value, coded)].concat())
            })
            .collect()
    }

    #[test]
    fn huffman_strings_agree_with_the_rfc() {
        for (text, coded) in [
            ("www.example.com", "f1e3 c2e5 f23a 6ba0 ab90 f4ff"),
            ("no-cache", "a8eb 1064 9cbf"),
            ("custom-value", "25a8 49e9 5bb8 e8b4 bf"),
            ("302", "6402"),
            (
                "Mon, 21 Oct 2013 20:13:21 GMT",
                "d07a be94 1054 d444 a820 0595 040b 8166 e082 a62d 1bff",
            ),
            (
                "https://www.example.com",
                "9d29 ad17 1863 c78f 0b97 c8e9 ae82 ae43 d3",
            ),
            (
                "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1",
                "94e7 821d d7f2 e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 \
                 03ed 4ee5 b106 3d50 07",
            ),
        ] {
            assert_eq!(huffman(text), hex(coded), "{text}");
            assert_eq!(
                huffman_decode(&hex(coded)).as_deref(),
                Some(text.as_bytes())
            );
        }
        assert_eq!(huffman(":authority"), AUTHORITY_HUFFMAN);
    }

    #[test]
    fn huffman_padding_must_be_fewer_than_eight_ones() {
        assert_eq!(huffman_decode(b"").as_deref(), Some(&b""[..]));
        assert_eq!(huffman_decode(&hex("07")).as_deref(), Some(&b"0"[..]));
        assert_eq!(huffman_decode(&hex("06")), None);
        assert_eq!(huffman_decode(&hex("07ff")), None);
    }

    #[test]
    fn every_stand_in_has_a_code_of_the_same_length() {
        let length = |byte| HUFFMAN.iter().position(|row| row.contains(&byte));
        for byte in (0..=u8::MAX).filter(|byte| stand_in(*byte) != *byte) {
            assert!(length(byte).is_some());
            assert_eq!(length(byte), length(stand_in(byte)));
        }
    }

    #[test]
    fn every_form_of_the_authority_field_is_rewritten() {
        for (sent, wanted) in authority_fields(SENT).iter().zip(authority_fields(WANTED)) {
            assert_eq!(rewritten(sent), wanted);
        }
    }

    #[test]
    fn socket_paths_that_grpc_leaves_unencoded_become_acceptable() {
        for (sent, wanted) in [
            ("run%2Fa:b:c.sock", "run-2Faxbxc.sock"),
            ("a:b:c", "axbxc"),
            ("x[1.sock", "x~1.sock"),
            ("x]", "x~"),
            ("tmp%2Fx@", "tmp-2Fx~"),
            ("%25%5B[%25]%5D", "-25-5B~-25~-5D"),
            ("/tmp/a.sock", "-tmp-a.sock"),
        ] {
            assert!(Authority::try_from(sent).is_err());
            for (sent, wanted) in authority_fields(sent).iter().zip(authority_fields(wanted)) {
                assert_eq!(rewritten(sent), wanted);
            }
        }
    }

    #[test]
    fn an_authority_that_h2_accepts_is_untouched() {
        for value in [
            "localhost",
            "[::1]:50051",
            "[fe80::1%25eth0]:80",
            "me%40x@host:1",
            "a!$&'()*+,;=~_-",
        ] {
            for field in authority_fields(value) {
                assert_untouched(&field);
            }
        }
    }

    #[test]
    fn an_authority_beyond_mending_is_untouched() {
        for value in ["", "a%2Fb c", "a%2Fb?", "a%2F<>"] {
            for field in authority_fields(value) {
                assert_untouched(&field);
            }
        }
        for field in authority_fields(&"%".repeat(2 * MAX_AUTHORITY)) {
            assert_untouched(&field);
        }
        assert_untouched(b"\x41\x05a%2F\\");
        assert_untouched(b"\x41\x05a%2F\xff");
        assert_untouched(&hex("41 84 57 ff f8 7f")); // Huffman `%\`
    }

    #[test]
    fn only_the_authority_is_rewritten() {
        let path = |authority| {
            [
                hex("3fe11f 20 82 86"), // two size updates, :method GET, :scheme http
                [vec![0x04], string("/a%2Fb", true)].concat(),
                [vec![0x01], string(authority, true)].concat(),
                [vec![0x40], string("x-%", false), string("%2F", false)].concat(),
                [
                    vec![0x10],
                    string(":authority%", false),
                    string("%2F", true),
                ]
                .concat(),
                [integer(0x40, 6, 1000), string("%2F", true)].concat(),
                [vec![0x0f, 0x2e], string(&"%".repeat(70_000), false)].concat(), // set-cookie
                hex("be ff80 01"),
            ]
            .concat()
        };
        assert_eq!(rewritten(&path(SENT)), path(WANTED));
    }

    #[test]
    fn table_size_updates_before_the_authority_are_skipped() {
        for update in ["20", "2f", "3f 00", "3f e1 1f", "20 3f e1 1f"] {
            let block = |value| [hex(update), authority_fields(value)[0].clone()].concat();
            assert_eq!(rewritten(&block(SENT)), block(WANTED), "{update}");
        }
    }

    #[test]
    fn a_block_cut_short_is_untouched() {
        let field = authority_fields(SENT)[2].clone();
        let whole = [field.clone(), integer(0x40, 6, 1000), string("abc", false)].concat();
        assert_ne!(rewritten(&whole), whole);
        for end in (0..field.len()).chain(field.len() + 1..whole.len()) {
            assert_untouched(&whole[..end]);
        }
    }

    #[test]
    fn a_block_with_two_authorities_is_untouched() {
        assert_untouched(
            &[authority_fields("a"), authority_fields(SENT)]
                .concat()
                .concat(),
        );
    }

    #[test]
    fn integers_too_long_are_malformed_and_do_not_overflow() {
        let field = &authority_fields(SENT)[0];
        for wild in [
            "ff ff ff ff ff ff ff ff ff ff ff 7f",
            "7f ff ff ff ff 0f",
            "40 7f ff ff ff 7f",
            "41 ff ff ff ff 7f",
        ] {
            assert_untouched(&[field.clone(), hex(wild)].concat());
        }
    }

    #[test]
    fn noise_never_panics_and_never_changes_its_length() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..20_000 {
            let mut noise: Vec<u8> = (0..seed as usize % 40)
                .map(|_| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    seed as u8
                })
                .collect();
            seed = seed.wrapping_add(1);
            let _ = rewrite_authority(&mut noise);
        }
    }
}
