//! Opens a byte stream to an `Address`. Used by the backend's channels and by admin clients.

use std::error::Error;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net as std_unix;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use http::uri::Scheme;
use hyper::service::Service as _;
use hyper::upgrade::Upgraded;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::proxy::matcher::Intercept;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt;
use tokio::net::TcpStream;
use tokio_rustls::rustls::pki_types::ServerName;

use super::embedded::Embedded;
use super::tunnel;
use crate::address::{Address, Bracketed};
use crate::local_socket::LocalSocket;
use crate::stream::{Stream, Transport, tune_tcp};
use crate::tls::TlsError;
use crate::tls::client::ClientTls;

/// How long connecting to the addresses of a host may take; Unix sockets answer at once.
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
    /// What stands between.
    proxy: Option<Intercept>,
    /// What `Address::Embedded` leads to.
    embedded: Option<Arc<Embedded>>,
}

impl Dialer {
    /// Dials `address`; with `tls` if that is how it is reached, and through `proxy` if there is one.
    ///
    /// # Errors
    /// `TlsError`, when the address's host cannot stand in a certificate.
    pub fn new(
        address: Address,
        tls: Option<Arc<ClientTls>>,
        proxy: Option<Intercept>,
    ) -> Result<Self, TlsError> {
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
            proxy,
            embedded: None,
        })
    }

    /// Dials `address`, which must not be a TLS one.
    pub fn without_tls(address: Address) -> Self {
        Dialer {
            address,
            tls: None,
            proxy: None,
            embedded: None,
        }
    }

    /// Dials the backend within this process.
    pub fn embedded(embedded: Arc<Embedded>) -> Self {
        Dialer {
            address: Address::Embedded,
            tls: None,
            proxy: None,
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
    /// What the system, a proxy or TLS said, or `TimedOut`: five seconds for the addresses of the
    /// host, and ten for the handshake.
    pub async fn dial(&self) -> io::Result<Stream> {
        let transport = match (&self.address, &self.tls) {
            (Address::Unix(path), _) => Transport::Unix(LocalSocket::connect(path).await?),
            (Address::Abstract(name), _) => {
                let name = std_unix::SocketAddr::from_abstract_name(name)?;
                let socket = std_unix::UnixStream::connect_addr(&name)?;
                socket.set_nonblocking(true)?;
                Transport::Unix(LocalSocket::new(socket)?)
            }
            (Address::Tcp { host, port }, _) => match self.tunnel().await? {
                Some(tunnel) => Transport::Tunnel(Box::new(TokioIo::new(tunnel))),
                None => Transport::Tcp(connect_tcp(host, *port).await?),
            },
            (Address::Tls { host, port }, Some((tls, name))) => {
                let socket = match self.tunnel().await? {
                    Some(tunnel) => untouched(tunnel)?,
                    None => connect_tcp(host, *port).await?,
                };
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

    /// A way through the proxy, if there is one.
    async fn tunnel(&self) -> io::Result<Option<Upgraded>> {
        match (&self.proxy, self.address.authority()) {
            (Some(proxy), Some(authority)) => tunnel::open(proxy, &authority).await.map(Some),
            _ => Ok(None),
        }
    }
}

/// Connects to one of the host's addresses. They are tried in turn; where there are some of IPv6 and
/// some of IPv4, those of the other kind too after 300 ms (RFC 8305).
pub async fn connect_tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    let uri = Uri::builder()
        .scheme(Scheme::HTTP)
        .authority(format!("{}:{port}", Bracketed(host)))
        .path_and_query("/")
        .build()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "that is no name of a host"))?;
    let connected = TowerToHyperService::new(connector).call(uri).await;
    let stream = connected.map_err(|error| cause_of(&error))?.into_inner();
    tune_tcp(&stream)?;
    // Not for clients: it also counts the time that a peer is alive but does not read, and a
    // build may be stopped (^Z) for longer than this.
    sockopt::set_tcp_user_timeout(&stream, USER_TIMEOUT_MS)?;
    Ok(stream)
}

/// What the system said when connecting failed.
fn cause_of(error: &(dyn Error + 'static)) -> io::Error {
    match (error.downcast_ref::<io::Error>(), error.source()) {
        (Some(io), _) => match io.raw_os_error() {
            Some(code) => io::Error::from_raw_os_error(code),
            None => io::Error::new(io.kind(), io.to_string()),
        },
        (None, Some(source)) => cause_of(source),
        (None, None) => io::Error::other(error.to_string()),
    }
}

/// The socket of a tunnel in which the other end has not spoken yet: in TLS, that is for the client.
fn untouched(tunnel: Upgraded) -> io::Result<TcpStream> {
    match tunnel.downcast::<TokioIo<TcpStream>>() {
        Ok(parts) if parts.read_buf.is_empty() => Ok(parts.io.into_inner()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it speaks no TLS",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[tokio::test]
    async fn the_address_of_a_host_that_answers_is_found_and_failures_are_the_systems() {
        // Of most machines' localhost there is one of IPv6, too.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let open = listener.local_addr().unwrap();
        let stream = connect_tcp("localhost", open.port()).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), open);
        drop(listener);
        let kind = async |host| connect_tcp(host, open.port()).await.unwrap_err().kind();
        for host in ["127.0.0.1", "localhost"] {
            assert_eq!(kind(host).await, io::ErrorKind::ConnectionRefused, "{host}");
        }
        assert_eq!(kind("no name").await, io::ErrorKind::InvalidInput);
    }

    #[tokio::test]
    async fn an_upstream_that_vanishes_is_noticed_by_the_system() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let stream = connect_tcp("127.0.0.1", port).await.unwrap();
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
