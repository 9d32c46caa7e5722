//! Opens a byte stream to an `Address`. Used by the backend's channels and by admin clients.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net as std_unix;
use std::sync::Arc;

use hyper::upgrade::Upgraded;
use hyper_util::client::proxy::matcher::Intercept;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::rustls::pki_types::ServerName;

use super::embedded::Embedded;
use super::{tcp, tunnel};
use crate::address::Address;
use crate::local_socket::LocalSocket;
use crate::stream::{Stream, Transport};
use crate::tls::TlsError;
use crate::tls::client::ClientTls;

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
                Transport::Unix(LocalSocket::new(socket))
            }
            (Address::Tcp { host, port }, _) => match self.tunnel().await? {
                Some(tunnel) => Transport::Tunnel(Box::new(TokioIo::new(tunnel))),
                None => Transport::Tcp(tcp::connect(host, *port).await?),
            },
            (Address::Tls { host, port }, Some((tls, name))) => {
                let socket = match self.tunnel().await? {
                    Some(tunnel) => untouched(tunnel)?,
                    None => tcp::connect(host, *port).await?,
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

    #[tokio::test]
    async fn a_tls_address_is_never_dialled_in_the_clear() {
        let dialer = Dialer::without_tls("grpcs://127.0.0.1:1".parse().unwrap());
        let refused = dialer.dial().await.err().unwrap();
        assert_eq!(refused.kind(), io::ErrorKind::Unsupported);
    }
}
