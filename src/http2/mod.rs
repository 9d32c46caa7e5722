//! HTTP/2 for forwarding: both ends of a connection, no more than gRPC needs of it, and no work that
//! a proxy need not do. Headers stay lists that are shared and hardly ever looked at, bodies stay
//! chunks that pass by reference count, and all that is due on a socket leaves in one write.
//!
//! `connection` reads and writes frames (`frame`, `frame_memory`, `outbox`), `streams` knows what
//! they mean (with `hpack`, `fields`), `stream` is what a call holds. `body` and `pump` move messages from one
//! stream to another, large ones as a whole where that helps (`whole_messages`).

pub mod body;
pub mod connection;
pub mod fields;
pub mod frame;
pub mod frame_memory;
pub mod hpack;
mod outbox;
pub mod pump;
pub mod stream;
mod streams;
#[cfg(test)]
mod tests;
pub mod whole_messages;

use std::time::Duration;

/// casd sends frames of up to 256 KiB; 16 KiB, HTTP/2's default, doubles the CPU for large blobs.
pub const MAX_FRAME_SIZE: u32 = 256 * 1024;
/// What one stream may have under way unread.
pub const STREAM_WINDOW: u32 = 1024 * 1024;
/// What may be under way unread on a connection to the upstream. Far above the sum of the stream
/// windows: stalled readers must never block the others that share the connection (32 of them did,
/// with 16 MiB).
pub const UPSTREAM_WINDOW: u32 = 1024 * 1024 * 1024;
/// What may be under way unread on a client's connection: it bounds what one client can make
/// primed hold.
pub const CLIENT_WINDOW: u32 = 256 * 1024 * 1024;
/// What the headers of an answer may come to. HTTP/2's usual limit is 16 KiB.
pub const UPSTREAM_HEADER_LIST: u32 = 1024 * 1024;
/// What the headers of a call may come to. 40 KiB have been seen, which the usual limit would
/// forbid; but a few bytes of a header block can stand for that much, on every stream.
pub const CLIENT_HEADER_LIST: u32 = 256 * 1024;
/// What may wait for one stream's receiver, in bytes.
pub const SEND_BUFFER: usize = 512 * 1024;
/// How long a peer may take to open an HTTP/2 connection.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(20);
