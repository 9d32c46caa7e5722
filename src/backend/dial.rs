//! Opens a byte stream to an `Address`. Used by the backend's channels and by admin clients.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net as std_unix;
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};
use tokio_util::either::Either;

use crate::address::Address;

/// A connected socket of either family.
pub type Stream = Either<UnixStream, TcpStream>;

/// How long a TCP connection may take; Unix sockets answer at once.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Connects to `address`.
///
/// # Errors
/// What the system said, or `TimedOut` after five seconds.
pub async fn dial(address: &Address) -> io::Result<Stream> {
    match address {
        Address::Unix(path) => UnixStream::connect(path).await.map(Either::Left),
        Address::Abstract(name) => {
            let name = std_unix::SocketAddr::from_abstract_name(name)?;
            let stream = std_unix::UnixStream::connect_addr(&name)?;
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream).map(Either::Left)
        }
        Address::Tcp { host, port } => {
            let connecting = TcpStream::connect((host.as_str(), *port));
            let stream = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            stream.set_nodelay(true)?;
            Ok(Either::Right(stream))
        }
    }
}
