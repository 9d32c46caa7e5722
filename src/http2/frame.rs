//! HTTP/2's frames on the wire (RFC 9113, 4 and 6), and why streams and connections end.

use std::fmt;

/// What a client says first.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The length of what stands before each frame's payload.
pub const HEADER: usize = 9;
/// The largest window there is.
pub const LARGEST_WINDOW: i64 = (1 << 31) - 1;
/// Of streams and connections, until something else is said.
pub const FIRST_WINDOW: u32 = 65_535;
/// The largest frame that every peer takes, and the largest that one can take.
pub const FIRST_FRAME_SIZE: u32 = 16 * 1024;
const LARGEST_FRAME_SIZE: u32 = (1 << 24) - 1;

/// Kinds of frames.
pub mod kind {
    #![allow(missing_docs, reason = "the names are those of RFC 9113")]
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const PRIORITY: u8 = 2;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PUSH_PROMISE: u8 = 5;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
}

/// Flags of frames.
pub mod flag {
    #![allow(missing_docs, reason = "the names are those of RFC 9113")]
    pub const END_STREAM: u8 = 1;
    pub const ACK: u8 = 1;
    pub const END_HEADERS: u8 = 4;
    pub const PADDED: u8 = 8;
    pub const PRIORITY: u8 = 0x20;
}

/// What stands before a frame's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Of the payload, in bytes.
    pub length: usize,
    /// One of `kind`, or unknown.
    pub kind: u8,
    /// Of `flag`.
    pub flags: u8,
    /// 0 is the connection.
    pub stream: u32,
}

impl FrameHeader {
    /// Reads the header at the beginning of `bytes`, if all of it is there.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let [a, b, c, kind, flags, stream @ ..] = *bytes.first_chunk::<HEADER>()?;
        Some(FrameHeader {
            length: u32::from_be_bytes([0, a, b, c]) as usize,
            kind,
            flags,
            stream: u32::from_be_bytes(stream) & 0x7fff_ffff,
        })
    }

    /// Whether all of these flags are set.
    pub fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// As bytes.
    pub fn bytes(&self) -> [u8; HEADER] {
        let [_, a, b, c] = (self.length as u32).to_be_bytes();
        let [d, e, f, g] = self.stream.to_be_bytes();
        [a, b, c, self.kind, self.flags, d, e, f, g]
    }
}

/// Appends a whole frame to `out`.
pub fn put(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let header = FrameHeader {
        length: payload.len(),
        kind,
        flags,
        stream,
    };
    out.extend_from_slice(&header.bytes());
    out.extend_from_slice(payload);
}

/// Why a stream or a connection ended (RFC 9113, 7).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Reason(pub u32);

#[allow(missing_docs, reason = "the names are those of RFC 9113")]
impl Reason {
    pub const NO_ERROR: Reason = Reason(0);
    pub const PROTOCOL_ERROR: Reason = Reason(1);
    pub const INTERNAL_ERROR: Reason = Reason(2);
    pub const FLOW_CONTROL_ERROR: Reason = Reason(3);
    pub const STREAM_CLOSED: Reason = Reason(5);
    pub const FRAME_SIZE_ERROR: Reason = Reason(6);
    pub const REFUSED_STREAM: Reason = Reason(7);
    pub const CANCEL: Reason = Reason(8);
    pub const COMPRESSION_ERROR: Reason = Reason(9);
    pub const ENHANCE_YOUR_CALM: Reason = Reason(11);
}

const REASONS: [&str; 14] = [
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
];

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match REASONS.get(self.0 as usize) {
            Some(name) => f.write_str(name),
            None => write!(f, "code {}", self.0),
        }
    }
}

impl fmt::Debug for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a peer has said in SETTINGS, as far as it matters to who sends to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Of its HPACK table.
    pub header_table_size: Option<u32>,
    /// How many streams may be open to it.
    pub max_concurrent_streams: Option<u32>,
    /// Of each stream.
    pub initial_window_size: Option<u32>,
    /// Of frames.
    pub max_frame_size: Option<u32>,
}

impl Settings {
    /// Reads the payload of a SETTINGS frame.
    ///
    /// # Errors
    /// The reason with which the connection ends.
    pub fn read(payload: &[u8]) -> Result<Self, Reason> {
        let (settings, []) = payload.as_chunks::<6>() else {
            return Err(Reason::FRAME_SIZE_ERROR);
        };
        let mut read = Settings::default();
        for [a, b, value @ ..] in settings {
            let value = u32::from_be_bytes(*value);
            match u16::from_be_bytes([*a, *b]) {
                1 => read.header_table_size = Some(value),
                2 if value > 1 => return Err(Reason::PROTOCOL_ERROR),
                3 => read.max_concurrent_streams = Some(value),
                4 if i64::from(value) > LARGEST_WINDOW => return Err(Reason::FLOW_CONTROL_ERROR),
                4 => read.initial_window_size = Some(value),
                5 if !(FIRST_FRAME_SIZE..=LARGEST_FRAME_SIZE).contains(&value) => {
                    return Err(Reason::PROTOCOL_ERROR);
                }
                5 => read.max_frame_size = Some(value),
                _ => {}
            }
        }
        Ok(read)
    }
}

/// The payload of a SETTINGS frame that says these, by their numbers.
pub fn settings(settings: &[(u16, u32)]) -> Vec<u8> {
    let bytes = |(number, value): &(u16, u32)| {
        let ([a, b], [c, d, e, f]) = (number.to_be_bytes(), value.to_be_bytes());
        [a, b, c, d, e, f]
    };
    settings.iter().flat_map(bytes).collect()
}

/// `payload` without the padding that `header` says it has.
///
/// # Errors
/// The reason with which the connection ends.
pub fn unpadded<'a>(header: &FrameHeader, payload: &'a [u8]) -> Result<&'a [u8], Reason> {
    if !header.has(flag::PADDED) {
        return Ok(payload);
    }
    let (padding, rest) = payload.split_first().ok_or(Reason::FRAME_SIZE_ERROR)?;
    let length = rest.len().checked_sub(usize::from(*padding));
    Ok(&rest[..length.ok_or(Reason::PROTOCOL_ERROR)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_is_written_and_the_reserved_bit_means_nothing() {
        let header = FrameHeader {
            length: 0x1_02_03,
            kind: kind::DATA,
            flags: flag::END_STREAM,
            stream: 7,
        };
        let mut bytes = header.bytes();
        assert_eq!(FrameHeader::read(&bytes[..8]), None);
        assert_eq!(FrameHeader::read(&bytes), Some(header));
        bytes[5] |= 0x80;
        assert_eq!(FrameHeader::read(&bytes), Some(header));
    }

    #[test]
    fn settings_are_read_and_those_out_of_bounds_refused() {
        let read = Settings::read(&settings(&[(4, 1000), (5, 16_384), (99, 1), (3, 7)])).unwrap();
        assert_eq!(read.initial_window_size, Some(1000));
        assert_eq!(read.max_frame_size, Some(16_384));
        assert_eq!(read.max_concurrent_streams, Some(7));
        for (number, value, reason) in [
            (2, 2, Reason::PROTOCOL_ERROR),
            (4, 1 << 31, Reason::FLOW_CONTROL_ERROR),
            (5, 16_383, Reason::PROTOCOL_ERROR),
            (5, 1 << 24, Reason::PROTOCOL_ERROR),
        ] {
            assert_eq!(Settings::read(&settings(&[(number, value)])), Err(reason));
        }
        assert_eq!(Settings::read(&[0; 5]), Err(Reason::FRAME_SIZE_ERROR));
    }

    #[test]
    fn padding_is_taken_off_and_must_not_be_longer_than_the_frame() {
        let header = |flags| FrameHeader {
            length: 0,
            kind: kind::DATA,
            flags,
            stream: 1,
        };
        assert_eq!(unpadded(&header(0), b"\x01ab"), Ok(&b"\x01ab"[..]));
        assert_eq!(unpadded(&header(flag::PADDED), b"\x01ab"), Ok(&b"a"[..]));
        let too_long = unpadded(&header(flag::PADDED), b"\x03ab");
        assert_eq!(too_long, Err(Reason::PROTOCOL_ERROR));
        assert_eq!(
            unpadded(&header(flag::PADDED), b""),
            Err(Reason::FRAME_SIZE_ERROR)
        );
    }
}
