//! HTTP/2 frames as bytes: for peers that do what no library would let them do, and for the faulty
//! wire, which must know where a frame ends.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// What a client says first.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

/// Flag of DATA and HEADERS.
pub const END_STREAM: u8 = 1;
/// Flag of SETTINGS and PING.
pub const ACK: u8 = 1;
/// Flag of HEADERS and CONTINUATION.
pub const END_HEADERS: u8 = 4;
/// Flag of DATA and HEADERS.
pub const PADDED: u8 = 8;

/// Settings, by their number in RFC 9113.
pub const MAX_CONCURRENT_STREAMS: u16 = 3;
pub const INITIAL_WINDOW_SIZE: u16 = 4;

/// The largest window, stream identifier and increment there is.
pub const LARGEST: u32 = (1 << 31) - 1;

const HEADER: usize = 9;

#[derive(Clone, Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn new(kind: u8, flags: u8, stream: u32, payload: impl Into<Vec<u8>>) -> Self {
        Frame {
            kind,
            flags,
            stream,
            payload: payload.into(),
        }
    }

    pub fn settings(settings: &[(u16, u32)]) -> Self {
        let payload = settings.iter().flat_map(|(name, value)| {
            let value = value.to_be_bytes();
            name.to_be_bytes().into_iter().chain(value)
        });
        Frame::new(SETTINGS, 0, 0, payload.collect::<Vec<u8>>())
    }

    pub fn window_update(stream: u32, increment: u32) -> Self {
        Frame::new(WINDOW_UPDATE, 0, stream, increment.to_be_bytes())
    }

    pub fn reset(stream: u32, code: u32) -> Self {
        Frame::new(RST_STREAM, 0, stream, code.to_be_bytes())
    }

    /// Says farewell without an error.
    pub fn go_away(last_stream: u32) -> Self {
        let mut payload = last_stream.to_be_bytes().to_vec();
        payload.extend([0; 4]);
        Frame::new(GOAWAY, 0, 0, payload)
    }

    pub fn is_ack(&self) -> bool {
        self.flags & ACK != 0
    }

    /// The settings in a SETTINGS frame.
    pub fn setting(&self, name: u16) -> Option<u32> {
        let mut settings = self.payload.chunks_exact(6);
        let found = settings.find(|setting| setting[..2] == name.to_be_bytes())?;
        Some(u32::from_be_bytes(found[2..].try_into().unwrap()))
    }

    pub fn bytes(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).unwrap().to_be_bytes();
        let mut bytes = length[1..].to_vec();
        bytes.extend([self.kind, self.flags]);
        bytes.extend(self.stream.to_be_bytes());
        bytes.extend(&self.payload);
        bytes
    }

    /// Reads the next frame.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        let mut header = [0; HEADER];
        from.read_exact(&mut header).await?;
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
        let stream = u32::from_be_bytes(header[5..].try_into().unwrap());
        let mut frame = Frame::new(header[3], header[4], stream & LARGEST, []);
        frame.payload.resize(length as usize, 0);
        from.read_exact(&mut frame.payload).await?;
        Ok(frame)
    }

    pub async fn write(&self, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        to.write_all(&self.bytes()).await
    }
}

/// A header field in HPACK: a literal that enters no table.
pub fn field(name: &str, value: &str) -> Vec<u8> {
    literal(0, name, value)
}

/// A header field in HPACK that enters the dynamic table, as entry 62.
pub fn remembered_field(name: &str, value: &str) -> Vec<u8> {
    literal(0x40, name, value)
}

/// Refers to the newest entry of the dynamic table.
pub const NEWEST: u8 = 0x80 | 62;

fn literal(form: u8, name: &str, value: &str) -> Vec<u8> {
    let mut field = vec![form];
    for text in [name, value] {
        // HPACK's integers, with a prefix of seven bits.
        match u8::try_from(text.len()) {
            Ok(short) if short < 0x7f => field.push(short),
            _ => {
                field.push(0x7f);
                let mut rest = text.len() - 0x7f;
                while rest >= 0x80 {
                    field.push(0x80 | (rest & 0x7f) as u8);
                    rest >>= 7;
                }
                field.push(rest as u8);
            }
        }
        field.extend(text.as_bytes());
    }
    field
}

/// The header block of a gRPC request.
pub fn request(path: &str) -> Vec<u8> {
    [
        field(":method", "POST"),
        field(":scheme", "http"),
        field(":authority", "localhost"),
        field(":path", path),
        field("content-type", "application/grpc"),
        field("te", "trailers"),
    ]
    .concat()
}

/// A gRPC message, uncompressed.
pub fn message(encoded: &[u8]) -> Vec<u8> {
    let mut message = vec![0];
    message.extend(u32::try_from(encoded.len()).unwrap().to_be_bytes());
    message.extend(encoded);
    message
}
