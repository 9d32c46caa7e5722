//! Header blocks of a peer. What is malformed as HTTP is still decoded to its end, for the tables
//! of both ends must stay the same; what is malformed as HPACK ends the connection.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{HeaderName, HeaderValue, TE};
use http::uri::PathAndQuery;
use http::{Method, StatusCode};

use super::{ENTRY_OVERHEAD, STATIC, TABLE_SIZE, huffman};
use crate::http2::fields::Fields;

/// How many blocks are remembered, and up to which size.
const REMEMBERED: usize = 4;
const LONGEST_REMEMBERED: usize = 512;

/// What a header block says.
#[derive(Debug, Default)]
pub struct Block {
    /// `:method`.
    pub method: Option<Method>,
    /// `:path`.
    pub path: Option<PathAndQuery>,
    /// `:scheme` is there.
    pub has_scheme: bool,
    /// `:authority` is there. What it says is nobody's business here.
    pub has_authority: bool,
    /// `:status`.
    pub status: Option<StatusCode>,
    /// All other fields.
    pub fields: Fields,
    /// It breaks HTTP's rules.
    pub is_malformed: bool,
    /// The fields come to more than is allowed; not all of them are here.
    pub is_too_large: bool,
}

impl Block {
    /// Whether any field is a pseudo-header.
    pub fn has_pseudo(&self) -> bool {
        self.method.is_some()
            || self.path.is_some()
            || self.has_scheme
            || self.has_authority
            || self.status.is_some()
    }
}

/// The block is no HPACK, or it breaks the rules of its tables.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed;

/// One field as a table holds it.
#[derive(Clone)]
struct Entry {
    name: Name,
    value: Bytes,
}

#[derive(Clone)]
enum Name {
    Regular(HeaderName),
    Pseudo(&'static str),
    /// Not a name that HTTP/2 allows.
    Invalid(Bytes),
}

impl Name {
    fn read(bytes: &[u8]) -> Self {
        if bytes.first() == Some(&b':') {
            let pseudo = [":method", ":path", ":scheme", ":authority", ":status"];
            let known = pseudo.into_iter().find(|known| known.as_bytes() == bytes);
            if let Some(known) = known {
                return Name::Pseudo(known);
            }
        }
        match HeaderName::from_lowercase(bytes) {
            Ok(name) => Name::Regular(name),
            Err(_) => Name::Invalid(Bytes::copy_from_slice(bytes)),
        }
    }

    fn len(&self) -> usize {
        match self {
            Name::Regular(name) => name.as_str().len(),
            Name::Pseudo(name) => name.len(),
            Name::Invalid(name) => name.len(),
        }
    }
}

impl Entry {
    fn size(&self) -> usize {
        self.name.len() + self.value.len() + ENTRY_OVERHEAD
    }
}

/// The state of one direction of a connection.
pub struct Decoder {
    /// The newest first.
    table: VecDeque<Entry>,
    size: usize,
    capacity: usize,
    /// What a header list may come to.
    limit: usize,
    /// Counts what has happened to the table.
    generation: u64,
    remembered: VecDeque<(Box<[u8]>, u64, Arc<Block>)>,
}

impl Decoder {
    /// A decoder for header lists of up to `limit` bytes, as HTTP/2 counts them.
    pub fn new(limit: usize) -> Self {
        Decoder {
            table: VecDeque::new(),
            size: 0,
            capacity: TABLE_SIZE,
            limit,
            generation: 0,
            remembered: VecDeque::new(),
        }
    }

    /// What a whole header block says.
    ///
    /// # Errors
    /// `Malformed`: the connection cannot go on.
    pub fn decode(&mut self, block: &[u8]) -> Result<Arc<Block>, Malformed> {
        let mut remembered = self.remembered.iter();
        let generation = self.generation;
        let same = remembered.find(|(bytes, of, _)| **bytes == *block && *of == generation);
        if let Some((.., same)) = same {
            return Ok(same.clone());
        }
        let decoded = Arc::new(self.read(block)?);
        if self.generation == generation && block.len() <= LONGEST_REMEMBERED {
            self.remembered.truncate(REMEMBERED - 1);
            let remembered = (block.into(), generation, decoded.clone());
            self.remembered.push_front(remembered);
        }
        Ok(decoded)
    }

    fn read(&mut self, block: &[u8]) -> Result<Block, Malformed> {
        let mut input = Input(block);
        let mut building = Building::default();
        while let Some(first) = input.0.first().copied() {
            let entry = if first & 0x80 != 0 {
                self.entry(input.integer(7)?)?
            } else if first & 0xe0 == 0x20 {
                let capacity = input.integer(5)?;
                if building.size > 0 || capacity > TABLE_SIZE {
                    return Err(Malformed);
                }
                self.capacity = capacity;
                self.generation += 1;
                self.evict(0);
                continue;
            } else {
                let is_kept = first & 0x40 != 0;
                let index = input.integer(if is_kept { 6 } else { 4 })?;
                let name = match index {
                    0 => Name::read(&input.string()?),
                    index => self.entry(index)?.name,
                };
                let value = input.string()?;
                let entry = Entry { name, value };
                if is_kept {
                    self.insert(entry.clone());
                }
                if first & 0x10 != 0 && !is_kept {
                    building.add(entry, true, self.limit);
                    continue;
                }
                entry
            };
            building.add(entry, false, self.limit);
        }
        let mut block = building.block;
        block.fields = building.fields.into_iter().collect();
        Ok(block)
    }

    fn entry(&self, index: usize) -> Result<Entry, Malformed> {
        match index.checked_sub(1).ok_or(Malformed)? {
            index if index < STATIC.len() => {
                let (name, value) = STATIC[index];
                Ok(Entry {
                    name: match name.starts_with(':') {
                        true => Name::Pseudo(name),
                        false => Name::Regular(HeaderName::from_static(name)),
                    },
                    value: Bytes::from_static(value.as_bytes()),
                })
            }
            index => {
                let entry = self.table.get(index - STATIC.len());
                entry.cloned().ok_or(Malformed)
            }
        }
    }

    fn insert(&mut self, entry: Entry) {
        self.generation += 1;
        let size = entry.size();
        self.evict(size);
        if size <= self.capacity {
            self.size += size;
            self.table.push_front(entry);
        }
    }

    /// Makes room for `size` bytes.
    fn evict(&mut self, size: usize) {
        while self.size + size > self.capacity
            && let Some(oldest) = self.table.pop_back()
        {
            self.size -= oldest.size();
        }
    }
}

/// A block that is being read.
#[derive(Default)]
struct Building {
    block: Block,
    fields: Vec<(HeaderName, HeaderValue)>,
    size: usize,
}

impl Building {
    fn add(&mut self, entry: Entry, is_sensitive: bool, limit: usize) {
        self.size += entry.size();
        if self.size > limit {
            self.block.is_too_large = true;
            return;
        }
        if self.place(entry, is_sensitive).is_none() {
            self.block.is_malformed = true;
        }
    }

    /// `None` if HTTP/2 does not allow it.
    fn place(&mut self, entry: Entry, is_sensitive: bool) -> Option<()> {
        let block = &mut self.block;
        match entry.name {
            Name::Regular(name) => {
                let mut value = HeaderValue::from_maybe_shared(entry.value).ok()?;
                if is_of_connection(&name) || name == TE && value != "trailers" {
                    return None;
                }
                value.set_sensitive(is_sensitive);
                self.fields.push((name, value));
            }
            Name::Pseudo(name) if self.fields.is_empty() => match name {
                ":method" if block.method.is_none() => {
                    block.method = Some(Method::from_bytes(&entry.value).ok()?);
                }
                ":path" if block.path.is_none() && !entry.value.is_empty() => {
                    block.path = Some(PathAndQuery::from_maybe_shared(entry.value).ok()?);
                }
                ":scheme" if !block.has_scheme => block.has_scheme = true,
                ":authority" if !block.has_authority => {
                    HeaderValue::from_maybe_shared(entry.value).ok()?;
                    block.has_authority = true;
                }
                ":status" if block.status.is_none() => {
                    block.status = Some(StatusCode::from_bytes(&entry.value).ok()?);
                }
                _ => return None,
            },
            Name::Pseudo(_) | Name::Invalid(_) => return None,
        }
        Some(())
    }
}

/// Fields that speak of one connection, which HTTP/2 has other means for (RFC 9113, 8.2.2).
fn is_of_connection(name: &HeaderName) -> bool {
    let names = [
        "connection",
        "proxy-connection",
        "keep-alive",
        "transfer-encoding",
        "upgrade",
    ];
    names.contains(&name.as_str())
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Result<u8, Malformed> {
        let (first, rest) = self.0.split_first().ok_or(Malformed)?;
        self.0 = rest;
        Ok(*first)
    }

    /// An integer with a prefix of so many bits.
    fn integer(&mut self, bits: u32) -> Result<usize, Malformed> {
        let full = (1 << bits) - 1;
        let mut value = usize::from(self.byte()? & full as u8);
        if value < full {
            return Ok(value);
        }
        // Four bytes more stand for more than anything that is allowed.
        for shift in [0, 7, 14, 21] {
            let byte = self.byte()?;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Malformed)
    }

    fn string(&mut self) -> Result<Bytes, Malformed> {
        let is_coded = self.0.first().is_some_and(|first| first & 0x80 != 0);
        let length = self.integer(7)?;
        let (bytes, rest) = self.0.split_at_checked(length).ok_or(Malformed)?;
        self.0 = rest;
        match is_coded {
            true => Ok(huffman::decode(bytes).ok_or(Malformed)?.into()),
            false => Ok(Bytes::copy_from_slice(bytes)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(digits: &str) -> Vec<u8> {
        let digits: Vec<u8> = digits.bytes().filter(|digit| *digit != b' ').collect();
        let byte = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.chunks(2).map(byte).collect()
    }

    fn shown(block: &Block) -> Vec<String> {
        let mut shown = Vec::new();
        shown.extend(block.status.iter().map(|status| status.as_str().to_owned()));
        shown.extend(block.method.iter().map(|method| method.to_string()));
        shown.extend(block.path.iter().map(|path| path.to_string()));
        let field = |(name, value): &(HeaderName, HeaderValue)| {
            format!("{name}: {}", value.to_str().unwrap())
        };
        shown.extend(block.fields.iter().map(field));
        shown
    }

    /// Appendix C.3 and C.4: three requests, plain and with Huffman's code.
    #[test]
    fn the_requests_of_the_rfc_are_decoded() {
        for blocks in [
            [
                "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
                "8286 84be 5808 6e6f 2d63 6163 6865",
                "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
            ],
            [
                "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
                "8286 84be 5886 a8eb 1064 9cbf",
                "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
            ],
        ] {
            let mut decoder = Decoder::new(1 << 20);
            let [one, two, three] = blocks.map(|block| decoder.decode(&hex(block)).unwrap());
            assert!(one.has_authority && !one.is_malformed);
            assert_eq!(shown(&one), ["GET", "/"]);
            assert_eq!(shown(&two), ["GET", "/", "cache-control: no-cache"]);
            let last = ["GET", "/index.html", "custom-key: custom-value"];
            assert_eq!(shown(&three), last);
            assert_eq!(decoder.size, 164);
        }
    }

    /// Appendix C.6: entries are evicted from a table of 256 bytes.
    #[test]
    fn the_responses_of_the_rfc_are_decoded_and_old_entries_forgotten() {
        let mut decoder = Decoder::new(1 << 20);
        let mut size = vec![0x3f];
        size.extend([0xe1, 0x01]); // 256
        decoder.decode(&size).unwrap();
        let first = "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 \
                     82a6 2d1b ff6e 919d 29ad 1718 63c7 8f0b 97c8 e9ae 82ae 43d3";
        let first = decoder.decode(&hex(first)).unwrap();
        assert_eq!(decoder.size, 222);
        assert_eq!(
            shown(&first),
            [
                "302",
                "cache-control: private",
                "date: Mon, 21 Oct 2013 20:13:21 GMT",
                "location: https://www.example.com"
            ]
        );
        let second = decoder.decode(&hex("4883 640e ffc1 c0bf")).unwrap();
        assert_eq!(shown(&second)[0], "307");
        assert_eq!(shown(&second)[1..], shown(&first)[1..]);
        assert_eq!(decoder.size, 222);
        let third = "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b \
                     d9ab 77ad 94e7 821d d7f2 e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 \
                     0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 3d50 07";
        let third = decoder.decode(&hex(third)).unwrap();
        assert_eq!(decoder.size, 215);
        assert_eq!(shown(&third)[0], "200");
        assert_eq!(shown(&third).len(), 6);
        assert!(shown(&third)[5].starts_with("set-cookie: foo=ASDJ"));
    }

    #[test]
    fn a_block_that_comes_again_is_the_same_until_a_table_changes() {
        let mut decoder = Decoder::new(1 << 20);
        let named = [0x82, 0x86, 0x84, 0xbe];
        decoder.decode(&hex("8286 84 40 01 78 01 79")).unwrap();
        let one = decoder.decode(&named).unwrap();
        let again = decoder.decode(&named).unwrap();
        assert!(Arc::ptr_eq(&one, &again));
        assert_eq!(shown(&again)[2], "x: y");
        decoder.decode(&hex("40 01 78 01 7a")).unwrap();
        let later = decoder.decode(&named).unwrap();
        assert_eq!(shown(&later)[2], "x: z");
    }

    #[test]
    fn what_is_no_hpack_is_an_error() {
        let mut decoder = Decoder::new(1 << 20);
        for block in [
            "80",                // entry 0
            "be",                // an entry that there is not
            "40 01",             // cut off
            "40 05 78",          // a string that is longer than the block
            "82 20",             // another size after a field
            "3f e2 1f",          // a table larger than allowed
            "ff ff ff ff ff ff", // an integer without end
            "40 81 00 00",       // padding of zeros
        ] {
            assert_eq!(
                decoder.decode(&hex(block)).unwrap_err(),
                Malformed,
                "{block}"
            );
        }
    }

    #[test]
    fn what_http_2_does_not_allow_is_malformed_but_kept_in_the_table() {
        let field = |name: &str, value: &str| {
            let mut field = vec![0x40];
            for text in [name, value] {
                field.push(text.len() as u8);
                field.extend(text.as_bytes());
            }
            field
        };
        for (name, value) in [
            ("Upper", "x"),
            (":other", "x"),
            ("", "x"),
            ("a b", "x"),
            ("connection", "close"),
            ("te", "gzip"),
            ("x", "a\nb"),
            ("x", "\0"),
            (":method", "GET"),
            (":status", "abc"),
            (":path", ""),
        ] {
            let mut decoder = Decoder::new(1 << 20);
            let block = [&[0x83][..], &field(name, value)].concat();
            let decoded = decoder.decode(&block).unwrap();
            assert!(decoded.is_malformed, "{name}: {value}");
            assert_eq!(decoder.table.len(), 1);
        }
        let mut decoder = Decoder::new(1 << 20);
        let late = [field("x", "y"), vec![0x83]].concat();
        assert!(decoder.decode(&late).unwrap().is_malformed);
    }

    #[test]
    fn a_list_that_comes_to_too_much_is_decoded_to_its_end_and_not_kept() {
        let mut decoder = Decoder::new(100);
        let block = hex("83 40 01 78 01 79 40 01 78 01 7a 40 01 78 01 7b");
        let decoded = decoder.decode(&block).unwrap();
        assert!(decoded.is_too_large);
        assert!(decoded.fields.iter().count() < 3);
        assert_eq!(decoder.table.len(), 3);
    }

    #[test]
    fn noise_never_panics() {
        let mut random = fastrand::Rng::with_seed(3);
        let mut decoder = Decoder::new(1000);
        for _ in 0..50_000 {
            let noise: Vec<u8> = (0..random.usize(..30)).map(|_| random.u8(..)).collect();
            let _ = decoder.decode(&noise);
            assert!(decoder.size <= TABLE_SIZE);
        }
    }
}
