//! Opens a byte stream to an `Address`. Used by the backend's channels and by admin clients.

use std::io;
use std::net::SocketAddr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net as std_unix;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::TcpStream;
use tokio_rustls::rustls::pki_types::ServerName;

use super::embedded::Embedded;
use crate::address::Address;
use crate::local_socket::LocalSocket;
use crate::stream::{Stream, Transport, tune_tcp};
use crate::tls::TlsError;
use crate::tls::client::ClientTls;

/// How long looking up a name may take, and connecting to one of its addresses; Unix sockets
/// answer at once.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long sent bytes may stay unacknowledged before the connection counts as broken, in
/// milliseconds.
const USER_TIMEOUT_MS: u32 = 60_000;

/// Connects to one address, as often as it is asked to.
#[derive(Clone)]
pub struct Dialer {
    address: Address,
    /// How to do the handshake, and whose certificate to expect.
    tls: Option<(Arc<ClientTls>, ServerName<'static>)>,
    /// What `Address::Embedded` leads to.
    embedded: Option<Arc<Embedded>>,
}

impl Dialer {
    /// Dials `address`; with `tls` if that is how it is reached.
    ///
    /// # Errors
    /// `TlsError`, when the address's host cannot stand in a certificate.
    pub fn new(address: Address, tls: Option<Arc<ClientTls>>) -> Result<Self, TlsError> {
        let tls = match (&address, tls) {
            (Address::Tls { host, .. }, Some(tls)) => {
                let name = tls.server_name(host)?;
                Some((tls, name))
            }
            _ => None,
        };
        Ok(Dialer {
            address,
            tls,
            embedded: None,
        })
    }

    /// Dials `address`, which must not be a TLS one.
    pub fn without_tls(address: Address) -> Self {
        Dialer {
            address,
            tls: None,
            embedded: None,
        }
    }

    /// Dials the backend within this process.
    pub fn embedded(embedded: Arc<Embedded>) -> Self {
        Dialer {
            address: Address::Embedded,
            tls: None,
            embedded: Some(embedded),
        }
    }

    /// Where it connects to.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Whether its streams are encrypted: then the scheme of requests is `https`.
    pub fn is_tls(&self) -> bool {
        self.address.is_tls()
    }

    /// Connects.
    ///
    /// # Errors
    /// What the system or TLS said, or `TimedOut`: five seconds for each address of the host, and
    /// ten for the handshake.
    pub async fn dial(&self) -> io::Result<Stream> {
        let transport = match (&self.address, &self.tls) {
            (Address::Unix(path), _) => Transport::Unix(LocalSocket::connect(path).await?),
            (Address::Abstract(name), _) => {
                let name = std_unix::SocketAddr::from_abstract_name(name)?;
                let socket = std_unix::UnixStream::connect_addr(&name)?;
                socket.set_nonblocking(true)?;
                Transport::Unix(LocalSocket::new(socket)?)
            }
            (Address::Tcp { host, port }, _) => Transport::Tcp(connect_tcp(host, *port).await?),
            (Address::Tls { host, port }, Some((tls, name))) => {
                let socket = connect_tcp(host, *port).await?;
                Transport::Tls(Box::new(tls.connect(name.clone(), socket).await?.into()))
            }
            (Address::Embedded, _) => {
                let Some(embedded) = &self.embedded else {
                    let reason =
                        "the embedded backend runs within primed, where nobody else reaches it";
                    return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
                };
                Transport::Unix(embedded.connect().await?)
            }
            (Address::Tls { .. }, None) => {
                let reason = "TLS is not set up for this connection; write grpc:// or a socket";
                return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
            }
        };
        Ok(transport.into())
    }
}

async fn connect_tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    connect_any(in_time(tokio::net::lookup_host((host, port))).await?).await
}

/// Tries `addresses` in turn; the error is that of the last one.
async fn connect_any(addresses: impl Iterator<Item = SocketAddr>) -> io::Result<TcpStream> {
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in addresses {
        match in_time(connect_to(address)).await {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

async fn connect_to(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    tune_tcp(&stream)?;
    // Not for clients: it also counts the time that a peer is alive but does not read, and a
    // build may be stopped (^Z) for longer than this.
    sockopt::set_tcp_user_timeout(&stream, USER_TIMEOUT_MS)?;
    Ok(stream)
}

async fn in_time<T>(attempt: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(CONNECT_TIMEOUT, attempt)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[tokio::test]
    async fn addresses_of_a_host_are_tried_in_turn() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let open = listener.local_addr().unwrap();
        let unused = TcpListener::bind("127.0.0.1:0").unwrap();
        let closed = unused.local_addr().unwrap();
        drop(unused);
        let stream = connect_any([closed, open].into_iter()).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), open);
        let refused = connect_any([closed, closed].into_iter()).await;
        assert_eq!(
            refused.unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
        assert!(connect_any(std::iter::empty()).await.is_err());
    }

    #[tokio::test]
    async fn an_upstream_that_vanishes_is_noticed_by_the_system() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = connect_to(listener.local_addr().unwrap()).await.unwrap();
        assert!(sockopt::tcp_nodelay(&stream).unwrap());
        assert!(sockopt::socket_keepalive(&stream).unwrap());
        assert_eq!(sockopt::tcp_user_timeout(&stream).unwrap(), USER_TIMEOUT_MS);
        let idle = sockopt::tcp_keepidle(&stream).unwrap();
        let interval = sockopt::tcp_keepintvl(&stream).unwrap();
        let probes = sockopt::tcp_keepcnt(&stream).unwrap();
        assert!(idle + interval * probes < Duration::from_secs(60));
    }

    #[tokio::test]
    async fn a_tls_address_is_never_dialled_in_the_clear() {
        let dialer = Dialer::without_tls("grpcs://127.0.0.1:1".parse().unwrap());
        let refused = dialer.dial().await.err().unwrap();
        assert_eq!(refused.kind(), io::ErrorKind::Unsupported);
    }
}
