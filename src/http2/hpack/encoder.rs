//! Header blocks for a peer. A field enters the table when it comes for the second time, so that
//! what is different in each call (a deadline, the name of an action) does not push out what is
//! the same in all of them.

use std::collections::VecDeque;

use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, StatusCode};

use super::{ENTRY_OVERHEAD, STATIC, TABLE_SIZE};
use crate::http2::fields::Fields;

/// Places for what is known of fields by their hash. More fields than a table can hold.
const PLACES: usize = 256;
/// How many lists are remembered.
const REMEMBERED: usize = 8;

/// What comes before the fields.
#[derive(Clone, Debug)]
pub enum Pseudo {
    /// Of a request. Boxed, for it is larger than all else that waits to be sent.
    Request(Box<(Method, Scheme, Authority, PathAndQuery)>),
    /// Of a response.
    Response(StatusCode),
    /// Of trailers: nothing.
    Trailers,
}

/// Name and value.
type Entry = (Box<[u8]>, Box<[u8]>);

/// The state of one direction of a connection.
pub struct Encoder {
    /// The newest first.
    table: VecDeque<Entry>,
    size: usize,
    capacity: usize,
    /// The peer has yet to be told of another capacity.
    is_resized: bool,
    /// How many entries there have ever been: the newest one's number.
    inserted: u32,
    /// By a field's hash: the number of its entry.
    entries: Box<[u32; PLACES]>,
    /// By a field's hash: all of the hash, of a field that has been sent once.
    seen: Box<[u32; PLACES]>,
    /// A field was encoded in another way than it will be the next time.
    has_news: bool,
    /// Lists that will be encoded in the same way, and how many entries there were.
    remembered: VecDeque<(Fields, Box<[u8]>, u32)>,
}

impl Default for Encoder {
    fn default() -> Self {
        Encoder {
            table: VecDeque::new(),
            size: 0,
            capacity: TABLE_SIZE,
            is_resized: false,
            inserted: 0,
            entries: Box::new([0; PLACES]),
            seen: Box::new([0; PLACES]),
            has_news: false,
            remembered: VecDeque::new(),
        }
    }
}

impl Encoder {
    /// The peer's table has room for so many bytes.
    pub fn resize(&mut self, size: usize) {
        let capacity = size.min(TABLE_SIZE);
        if capacity != self.capacity {
            self.capacity = capacity;
            self.is_resized = true;
            self.evict(0);
        }
    }

    /// Appends a whole header block to `out`.
    pub fn encode(&mut self, pseudo: &Pseudo, fields: &Fields, out: &mut Vec<u8>) {
        if std::mem::take(&mut self.is_resized) {
            // To nothing in between: what the peer has dropped, and when, does not matter then.
            self.forget();
            integer(out, 0x20, 5, 0);
            integer(out, 0x20, 5, self.capacity);
        }
        match pseudo {
            Pseudo::Request(request) => {
                let (method, scheme, authority, path) = &**request;
                match *method {
                    Method::POST => out.push(0x83),
                    _ => self.field(b":method", method.as_str().as_bytes(), false, out),
                }
                match scheme.as_str() {
                    "http" => out.push(0x86),
                    scheme => self.field(b":scheme", scheme.as_bytes(), false, out),
                }
                self.field(b":authority", authority.as_str().as_bytes(), false, out);
                self.field(b":path", path.as_str().as_bytes(), false, out);
            }
            Pseudo::Response(StatusCode::OK) => out.push(0x88),
            Pseudo::Response(status) => {
                self.field(b":status", status.as_str().as_bytes(), false, out);
            }
            Pseudo::Trailers => {}
        }
        self.fields(fields, out);
    }

    fn fields(&mut self, fields: &Fields, out: &mut Vec<u8>) {
        let inserted = self.inserted;
        let mut remembered = self.remembered.iter();
        let same = remembered.find(|(list, _, of)| *of == inserted && list.is_clone_of(fields));
        if let Some((_, block, _)) = same {
            return out.extend_from_slice(block);
        }
        let begin = out.len();
        self.has_news = false;
        for (name, value) in fields.iter() {
            let name = name.as_str().as_bytes();
            self.field(name, value.as_bytes(), value.is_sensitive(), out);
        }
        // Whoever holds a clone may well send it again.
        if !self.has_news && fields.is_shared() {
            self.remembered.truncate(REMEMBERED - 1);
            let remembered = (fields.clone(), out[begin..].into(), inserted);
            self.remembered.push_front(remembered);
        }
    }

    fn field(&mut self, name: &[u8], value: &[u8], is_sensitive: bool, out: &mut Vec<u8>) {
        if is_sensitive {
            return literal(0x10, 4, static_name(name), name, value, out);
        }
        let hash = hash(name, value);
        let place = hash as usize % PLACES;
        if let Some(index) = self.index(self.entries[place], name, value) {
            return integer(out, 0x80, 7, index);
        }
        let of_name = static_name(name);
        let size = name.len() + value.len() + ENTRY_OVERHEAD;
        let is_kept = self.seen[place] == hash && size <= self.capacity / 2;
        if let Some(index) = of_name.filter(|index| STATIC[index - 1].1.as_bytes() == value) {
            return integer(out, 0x80, 7, index);
        }
        if !is_kept {
            self.has_news |= std::mem::replace(&mut self.seen[place], hash) != hash;
            return literal(0, 4, of_name, name, value, out);
        }
        literal(0x40, 6, of_name, name, value, out);
        self.evict(size);
        self.size += size;
        self.table.push_front((name.into(), value.into()));
        self.inserted = self.inserted.wrapping_add(1);
        self.has_news = true;
        self.entries[place] = self.inserted;
    }

    /// The index of the entry with this number, if it is still there and is this field.
    fn index(&self, number: u32, name: &[u8], value: &[u8]) -> Option<usize> {
        let age = self.inserted.wrapping_sub(number) as usize;
        let (of_name, of_value) = self.table.get(age)?;
        (**of_value == *value && **of_name == *name).then_some(STATIC.len() + 1 + age)
    }

    fn evict(&mut self, size: usize) {
        while self.size + size > self.capacity
            && let Some((name, value)) = self.table.pop_back()
        {
            self.size -= name.len() + value.len() + ENTRY_OVERHEAD;
        }
    }

    fn forget(&mut self) {
        self.table.clear();
        self.size = 0;
        self.remembered.clear();
    }
}

/// The index of an entry of the static table with this name: the one with an empty value, if there
/// is one.
fn static_name(name: &[u8]) -> Option<usize> {
    let place = STATIC
        .iter()
        .position(|(known, _)| known.as_bytes() == name);
    place.map(|place| place + 1)
}

fn literal(
    form: u8,
    bits: u32,
    index: Option<usize>,
    name: &[u8],
    value: &[u8],
    out: &mut Vec<u8>,
) {
    integer(out, form, bits, index.unwrap_or(0));
    if index.is_none() {
        integer(out, 0, 7, name.len());
        out.extend_from_slice(name);
    }
    integer(out, 0, 7, value.len());
    out.extend_from_slice(value);
}

fn integer(out: &mut Vec<u8>, form: u8, bits: u32, value: usize) {
    let full = (1 << bits) - 1;
    if value < full {
        return out.push(form | value as u8);
    }
    out.push(form | full as u8);
    let mut rest = value - full;
    while rest >= 0x80 {
        out.push(0x80 | (rest & 0x7f) as u8);
        rest >>= 7;
    }
    out.push(rest as u8);
}

/// Only as good as it must be: fields with the same hash are not compressed, no more.
fn hash(name: &[u8], value: &[u8]) -> u32 {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut hash = ((name.len() as u64) << 32) | value.len() as u64;
    for text in [name, value] {
        let (words, rest) = text.as_chunks::<8>();
        for word in words {
            hash = (hash ^ u64::from_le_bytes(*word))
                .wrapping_mul(FACTOR)
                .rotate_left(29);
        }
        for byte in rest {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(FACTOR);
        }
    }
    // Never 0, which stands for nothing seen.
    ((hash ^ (hash >> 32)) as u32).max(1)
}

#[cfg(test)]
mod tests {
    use super::super::Decoder;
    use super::*;
    use http::{HeaderName, HeaderValue};

    fn list(pairs: &[(&'static str, &str)]) -> Fields {
        let pair = |(name, value): &(&'static str, &str)| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_str(value).unwrap(),
            )
        };
        pairs.iter().map(pair).collect()
    }

    fn encoded(encoder: &mut Encoder, fields: &Fields) -> Vec<u8> {
        let mut block = Vec::new();
        encoder.encode(&Pseudo::Trailers, fields, &mut block);
        block
    }

    #[test]
    fn what_comes_again_is_a_byte_for_each_field_and_what_is_new_each_time_enters_no_table() {
        let mut encoder = Encoder::default();
        for number in 0..100 {
            let timeout = format!("{number}m");
            let fields = list(&[
                ("content-type", "application/grpc"),
                ("x-one", "two"),
                ("grpc-timeout", &timeout),
            ]);
            let block = encoded(&mut encoder, &fields);
            if number > 1 {
                assert_eq!(block[..2], [0x80 | 63, 0x80 | 62]);
            }
        }
        assert_eq!(encoder.table.len(), 2);
    }

    #[test]
    fn a_list_that_is_sent_again_is_copied_while_nothing_has_changed() {
        let mut encoder = Encoder::default();
        let fields = list(&[("x-one", "two")]);
        let clone = fields.clone();
        for _ in 0..3 {
            encoded(&mut encoder, &fields);
        }
        assert_eq!(encoder.remembered.len(), 1);
        assert_eq!(encoded(&mut encoder, &clone), [0x80 | 62]);
        for _ in 0..2 {
            encoded(&mut encoder, &list(&[("x-other", "three")]));
        }
        assert_eq!(encoded(&mut encoder, &clone), [0x80 | 63]);
    }

    #[test]
    fn what_is_sensitive_enters_no_table() {
        let mut encoder = Encoder::default();
        let mut value = HeaderValue::from_static("secret");
        value.set_sensitive(true);
        let fields = Fields::from_iter([(http::header::AUTHORIZATION, value)]);
        for _ in 0..3 {
            let block = encoded(&mut encoder, &fields);
            assert_eq!(block[0] & 0xf0, 0x10);
            let decoded = Decoder::new(1 << 20).decode(&block).unwrap();
            assert!(decoded.fields.iter().all(|(_, value)| value.is_sensitive()));
        }
        assert!(encoder.table.is_empty());
    }

    #[test]
    fn random_lists_come_back_whatever_the_size_of_the_table() {
        let mut random = fastrand::Rng::with_seed(11);
        let names = [
            "x",
            "content-type",
            "grpc-status",
            "te-x",
            "user-agent",
            "y-bin",
        ];
        for _ in 0..200 {
            let (mut encoder, mut decoder) = (Encoder::default(), Decoder::new(1 << 20));
            for _ in 0..100 {
                if random.u8(..20) == 0 {
                    encoder.resize(random.usize(..6000));
                }
                let fields: Fields = (0..random.usize(..8))
                    .map(|_| {
                        let name = names[random.usize(..names.len())];
                        let long = random.u8(..10) == 0;
                        let value = "v".repeat(random.usize(..if long { 3000 } else { 6 }));
                        let value = HeaderValue::from_str(&value).unwrap();
                        (HeaderName::from_static(name), value)
                    })
                    .collect();
                let _clone = fields.clone();
                for _ in 0..random.usize(1..4) {
                    let mut block = Vec::new();
                    let pseudo =
                        Pseudo::Response(StatusCode::from_u16(random.u16(200..210)).unwrap());
                    encoder.encode(&pseudo, &fields, &mut block);
                    let decoded = decoder.decode(&block).unwrap();
                    assert_eq!(decoded.fields, fields);
                    assert!(decoded.status.is_some() && !decoded.is_malformed);
                }
            }
        }
    }
}
