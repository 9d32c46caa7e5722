//! Decodes HPACK's Huffman code (RFC 7541, Appendix B). The code is canonical, so the lengths of
//! its words are all there is to know. Nothing is encoded: the few bytes that it saves on a socket
//! are not worth the time.

/// The length in bits of each byte's word, and of the one that means the end.
#[rustfmt::skip]
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28,
    28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11,
    10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8,
    15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5, 6, 5,
    6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7,
    7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23,
    23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21,
    23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25,
    26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26,
    28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
];
const END: u16 = 256;
const LONGEST: usize = 30;

/// The words of one length, which follow one another.
#[derive(Clone, Copy)]
struct Words {
    first: u32,
    count: u32,
    /// Where their symbols stand in `SYMBOLS`.
    at: u32,
}

const SORTED: ([Words; LONGEST + 1], [u16; 257]) = sorted();
const WORDS: [Words; LONGEST + 1] = SORTED.0;
static SYMBOLS: [u16; 257] = SORTED.1;
/// For each beginning of eight bits: the symbol and the length of its word, or no length if that
/// is longer.
static SHORT: [(u8, u8); 256] = short();

const fn sorted() -> ([Words; LONGEST + 1], [u16; 257]) {
    let nothing = Words {
        first: 0,
        count: 0,
        at: 0,
    };
    let (mut words, mut symbols) = ([nothing; LONGEST + 1], [0; 257]);
    let (mut code, mut at, mut length) = (0, 0, 1);
    while length <= LONGEST {
        code <<= 1;
        words[length].first = code;
        words[length].at = at;
        let mut symbol = 0;
        while symbol < LENGTHS.len() {
            if LENGTHS[symbol] as usize == length {
                symbols[at as usize] = symbol as u16;
                words[length].count += 1;
                at += 1;
                code += 1;
            }
            symbol += 1;
        }
        length += 1;
    }
    (words, symbols)
}

const fn short() -> [(u8, u8); 256] {
    let mut short = [(0, 0); 256];
    let mut length = 5;
    while length <= 8 {
        let Words { first, count, at } = WORDS[length];
        let mut word = 0;
        while word < count {
            let begin = ((first + word) << (8 - length)) as usize;
            let mut rest = 0;
            while rest < 1 << (8 - length) {
                short[begin + rest] = (SORTED.1[(at + word) as usize] as u8, length as u8);
                rest += 1;
            }
            word += 1;
        }
        length += 1;
    }
    short
}

/// What `coded` stands for; `None` if it is malformed.
pub fn decode(coded: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::with_capacity(coded.len() * 8 / 5);
    // Those that are to be decoded stand on top.
    let (mut bits, mut count) = (0_u64, 0_u32);
    let mut coded = coded.iter();
    loop {
        while count <= 56
            && let Some(byte) = coded.next()
        {
            bits |= u64::from(*byte) << (56 - count);
            count += 8;
        }
        let (symbol, length) = match SHORT[(bits >> 56) as usize] {
            (_, 0) => long(bits),
            (symbol, length) => (u16::from(symbol), u32::from(length)),
        };
        if length > count {
            // What is left must be padding: less than a byte, the beginning of the end.
            let is_padding = count < 8 && bits.leading_ones() >= count;
            return is_padding.then_some(text);
        }
        if symbol == END {
            return None;
        }
        text.push(symbol as u8);
        bits <<= length;
        count -= length;
    }
}

/// The word of more than eight bits at the top of `bits`.
fn long(bits: u64) -> (u16, u32) {
    for (length, words) in (0..).zip(&WORDS).skip(9) {
        let word = (bits >> (64 - length)) as u32 - words.first;
        if word < words.count {
            return (SYMBOLS[(words.at + word) as usize], length);
        }
    }
    // All ones at the latest is a word.
    (END, LONGEST as u32)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// The other direction, which only tests need.
    pub fn encode(text: &[u8]) -> Vec<u8> {
        let (mut coded, mut bits, mut count) = (Vec::new(), 0_u64, 0);
        for byte in text {
            let length = usize::from(LENGTHS[usize::from(*byte)]);
            let words = WORDS[length];
            let of_length = &SYMBOLS[words.at as usize..][..words.count as usize];
            let place = of_length
                .iter()
                .position(|symbol| *symbol == u16::from(*byte));
            bits = (bits << length) | (u64::from(words.first) + place.unwrap() as u64);
            count += length;
            while count >= 8 {
                count -= 8;
                coded.push((bits >> count) as u8);
            }
        }
        if count > 0 {
            coded.push((bits << (8 - count)) as u8 | (0xff >> count));
        }
        coded
    }

    #[test]
    fn every_byte_comes_back_alone_and_among_others() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(decode(&encode(&all)).as_deref(), Some(&all[..]));
        for byte in 0..=255 {
            let text = [b'a', byte, byte, b'0'];
            assert_eq!(decode(&encode(&text)).as_deref(), Some(&text[..]));
            assert_eq!(decode(&encode(&[byte])).as_deref(), Some(&[byte][..]));
        }
        assert_eq!(decode(b""), Some(Vec::new()));
    }

    #[test]
    fn the_words_are_those_of_the_rfc() {
        let coded = b"\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff";
        assert_eq!(decode(coded).as_deref(), Some(&b"www.example.com"[..]));
        assert_eq!(encode(b"www.example.com"), coded);
    }

    #[test]
    fn padding_is_less_than_a_byte_of_ones_and_the_end_is_never_said() {
        // "0" is 00000.
        assert_eq!(decode(&[0b0000_0111]).as_deref(), Some(&b"0"[..]));
        assert_eq!(decode(&[0b0000_0011]), None);
        assert_eq!(decode(&[0b0000_0111, 0xff]), None);
        assert_eq!(decode(&[0xff]), None);
        assert_eq!(decode(&[0xff; 4]), None);
    }

    #[test]
    fn noise_never_panics() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..20_000 {
            let noise: Vec<u8> = (0..random.usize(..20)).map(|_| random.u8(..)).collect();
            if let Some(text) = decode(&noise) {
                assert_eq!(encode(&text), noise);
            }
        }
    }
}
