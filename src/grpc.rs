//! The few words of gRPC over HTTP/2 that primed must speak itself: the frames of messages, the
//! status, and the timeout.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::header::{HeaderName, HeaderValue};
use std::time::{Duration, Instant};
use tonic::Code;

use crate::http2::fields::Fields;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The gRPC status in headers or trailers, if there is one.
pub fn status(headers: &Fields) -> Option<u32> {
    headers.get(&GRPC_STATUS)?.to_str().ok()?.parse().ok()
}

/// How much time the client gives the call, if it says so. (gRPC over HTTP/2, "Timeout".)
pub fn timeout(headers: &Fields) -> Option<Duration> {
    let text = headers.get(&GRPC_TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value.saturating_mul(3600)),
        "M" => Duration::from_secs(value.saturating_mul(60)),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

/// Takes the time since `began` off the timeout, if there is one, so that the upstream gives up when
/// the client does. Less than a millisecond is less than the network takes.
pub fn deduct_from_timeout(headers: &mut Fields, began: Instant) {
    if !headers.contains_key(&GRPC_TIMEOUT) {
        return;
    }
    let spent = began.elapsed();
    if spent >= Duration::from_millis(1)
        && let Some(timeout) = timeout(headers)
    {
        let left = timeout.saturating_sub(spent).as_millis().max(1);
        // At most eight digits.
        let left = match left {
            ..=99_999_999 => format!("{left}m"),
            _ => format!("{}S", (left / 1000).min(99_999_999)),
        };
        if let Ok(value) = HeaderValue::try_from(left) {
            headers.insert(GRPC_TIMEOUT, value);
        }
    }
}

/// Takes the timeout away.
pub fn forget_timeout(headers: &mut Fields) {
    headers.remove(&GRPC_TIMEOUT);
}

/// Trailers that end a call with `code` and a message for people.
pub fn trailers(code: Code, message: &str) -> Fields {
    let mut headers = Fields::new();
    headers.insert(GRPC_STATUS, HeaderValue::from(code as i32));
    if let Ok(value) = HeaderValue::from_str(&percent_encoded(message))
        && !value.is_empty()
    {
        headers.insert(GRPC_MESSAGE, value);
    }
    headers
}

/// `message` with the prefix that gRPC puts before each message.
pub fn framed(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(FRAME_HEADER + message.len());
    framed.put_u8(0);
    framed.put_u32(message.len() as u32);
    framed.put_slice(message);
    framed.freeze()
}

/// One gRPC message, out of its frame.
pub enum Framed {
    /// As it was encoded.
    Plain(Bytes),
    /// Compressed; left alone.
    Compressed,
}

/// What stands before a gRPC message.
pub struct Prefix {
    /// Whether the message is compressed.
    pub compressed: bool,
    /// How many bytes it has.
    pub length: usize,
}

/// The prefix at the beginning of `framed`; `None` if it is not there in full.
pub fn prefix(framed: &[u8]) -> Option<Prefix> {
    let [flag, length @ ..] = framed.first_chunk::<FRAME_HEADER>()?;
    Some(Prefix {
        compressed: *flag != 0,
        length: u32::from_be_bytes(*length) as usize,
    })
}

/// Takes the first gRPC message off `body`; `None` if it is not there in full.
pub fn split_message(body: &mut Bytes) -> Option<Framed> {
    let Prefix { compressed, length } = prefix(body)?;
    if length > body.len() - FRAME_HEADER {
        return None;
    }
    body.advance(FRAME_HEADER);
    let message = body.split_to(length);
    Some(if compressed {
        Framed::Compressed
    } else {
        Framed::Plain(message)
    })
}

/// Length of the prefix of a gRPC message: a flag and a big-endian length.
pub const FRAME_HEADER: usize = 5;

fn percent_encoded(message: &str) -> String {
    use std::fmt::Write as _;
    let mut encoded = String::with_capacity(message.len());
    for byte in message.bytes() {
        if matches!(byte, b' '..=b'~') && byte != b'%' {
            encoded.push(char::from(byte));
        } else {
            // Writing to a `String` cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_in_every_unit_and_odd_ones_ignored() {
        for (text, expected) in [
            ("2S", Some(Duration::from_secs(2))),
            ("1H", Some(Duration::from_secs(3600))),
            ("3M", Some(Duration::from_secs(180))),
            ("250m", Some(Duration::from_millis(250))),
            ("99999999u", Some(Duration::from_micros(99_999_999))),
            ("5n", Some(Duration::from_nanos(5))),
            ("5", None),
            ("", None),
            ("x", None),
            ("é", None),
        ] {
            let mut headers = Fields::new();
            headers.insert(
                GRPC_TIMEOUT,
                HeaderValue::from_bytes(text.as_bytes()).unwrap(),
            );
            assert_eq!(timeout(&headers), expected, "{text}");
        }
    }

    #[test]
    fn messages_are_percent_encoded_as_grpc_asks() {
        let headers = trailers(Code::Unavailable, "100% off\nü");
        assert_eq!(status(&headers), Some(14));
        assert_eq!(headers.get(&GRPC_MESSAGE).unwrap(), "100%25 off%0A%C3%BC");
    }
}
