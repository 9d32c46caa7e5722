//! A connected byte stream of any kind that primed speaks: clients come in by it, and upstreams
//! are dialled with it. Vectored writes reach the socket, or the TLS records, in one go.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio_rustls::TlsStream;

use crate::local_socket::LocalSocket;

thread_local! {
    static READS: Cell<u64> = const { Cell::new(0) };
}

/// How often something came by a connection that the current thread reads, be it an end or an error.
pub fn reads() -> u64 {
    READS.get()
}

/// A connection.
pub struct Stream {
    transport: Transport,
    /// The place that it takes among a listener's clients; given back with the socket.
    _place: Option<OwnedSemaphorePermit>,
}

/// What carries the bytes.
pub enum Transport {
    /// A Unix socket.
    Unix(LocalSocket),
    /// TCP in the clear.
    Tcp(TcpStream),
    /// TCP in the clear through an HTTP proxy.
    Tunnel(Box<TokioIo<Upgraded>>),
    /// TLS over TCP, as client or server. Boxed: its buffers are ten times the size of a socket.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// A stream that holds `place` until it is dropped.
    pub fn with_place(transport: Transport, place: OwnedSemaphorePermit) -> Self {
        Stream {
            transport,
            _place: Some(place),
        }
    }

    /// What carries its bytes.
    pub fn transport(&self) -> &Transport {
        &self.transport
    }
}

impl From<Transport> for Stream {
    fn from(transport: Transport) -> Self {
        Stream {
            transport,
            _place: None,
        }
    }
}

/// When the system asks an idle TCP peer whether it still exists, how often, and how many times:
/// one that vanished without a word is noticed within a minute.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(20);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;

/// Sets what every TCP connection of primed has: small messages leave at once, and a peer that
/// vanished is noticed.
///
/// # Errors
/// What the system said.
pub fn tune_tcp(socket: impl std::os::fd::AsFd) -> io::Result<()> {
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(&socket, KEEPALIVE_INTERVAL)?;
    Ok(sockopt::set_tcp_keepcnt(&socket, KEEPALIVE_PROBES)?)
}

/// Hands a call on to whatever carries the bytes.
macro_rules! delegate {
    ($self:ident, $stream:ident => $call:expr) => {
        match &mut $self.get_mut().transport {
            Transport::Unix($stream) => $call,
            Transport::Tcp($stream) => $call,
            Transport::Tunnel($stream) => $call,
            Transport::Tls($stream) => $call,
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = delegate!(self, stream => Pin::new(stream).poll_read(cx, buf));
        if read.is_ready() {
            READS.set(READS.get() + 1);
        }
        read
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, stream => Pin::new(stream).poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, stream => Pin::new(stream).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        // All of them are.
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}
