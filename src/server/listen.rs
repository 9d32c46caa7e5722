//! Listening sockets. A socket file that nobody listens on is replaced; one that somebody does
//! is an error that says who. Sockets are for their owner, or for the users of `--allow-uid`.

use std::fs::{DirBuilder, File, Permissions};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net as std_unix;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::Mode;
use tokio::net::{TcpListener, TcpStream, UnixSocket};
use tokio::sync::OwnedSemaphorePermit;

use super::admission::Admission;
use super::passed::{Passed, PassedSocket};
use crate::address::{Address, ListenAddress};
use crate::local_socket::{LocalListener, LocalSocket, credentials};
use crate::stream::{Stream, Transport, tune_tcp};
use crate::tls::server::ServerTls;
use crate::workspace::peer::PeerOrigin;
use crate::workspace::process;

/// Clients that may wait for `accept`, as many as Linux allows unless told otherwise.
const BACKLOG: u32 = 4096;

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A live process has the address.
    #[error("{address} is in use: {holder} listens there; stop it or choose another address")]
    InUse {
        /// The address asked for.
        address: Address,
        /// The process that listens, as far as it can be known.
        holder: String,
    },
    /// A file that is no socket stands in the way.
    #[error("{0} exists and is not a socket; remove it or choose another address")]
    NotASocket(PathBuf),
    /// The service manager passed no such socket.
    #[error(
        "no socket was passed for --listen {wanted}; passed: {passed:?}. Start primed from a \
         .socket unit (its FileDescriptorName= is the name)"
    )]
    NotPassed {
        /// What was asked for.
        wanted: ListenAddress,
        /// The names of those that are left.
        passed: Vec<String>,
    },
    /// The service manager passed what cannot be used.
    #[error("cannot use a socket that the service manager passed: {0}")]
    Passed(io::Error),
    /// The system refused.
    #[error("cannot listen on {address}: {source}")]
    System {
        /// The address asked for.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
}

/// A bound socket. A socket file that it made is removed when it is dropped.
pub struct Listener {
    address: Address,
    socket: Socket,
    tls: Option<Arc<ServerTls>>,
    admission: Arc<Admission>,
}

enum Socket {
    Unix {
        listener: LocalListener,
        /// Removes the file when the listener goes; abstract names and passed sockets need none.
        _file: Option<SocketFile>,
    },
    Tcp(TcpListener),
}

/// A client that has been let in.
pub struct Accepted {
    socket: AcceptedSocket,
    origin: PeerOrigin,
    tls: Option<Arc<ServerTls>>,
    place: OwnedSemaphorePermit,
}

enum AcceptedSocket {
    Unix(std_unix::UnixStream),
    /// Known to the current runtime.
    Tcp(TcpStream),
    /// On its way to another runtime.
    DetachedTcp(std::net::TcpStream),
}

impl Accepted {
    /// Who it is.
    pub fn origin(&self) -> PeerOrigin {
        self.origin
    }

    /// Makes it ready for another runtime than the one that accepted it.
    ///
    /// # Errors
    /// What the system said.
    pub fn detach(self) -> io::Result<Self> {
        let socket = match self.socket {
            AcceptedSocket::Tcp(socket) => AcceptedSocket::DetachedTcp(socket.into_std()?),
            free => free,
        };
        Ok(Accepted { socket, ..self })
    }

    /// Registers it with the current runtime, if that does not know it yet, and does the TLS handshake, if
    /// there is one. Until the stream is dropped it counts as one of `--max-connections`.
    ///
    /// # Errors
    /// What the system or TLS said; `TimedOut` for a handshake of more than ten seconds.
    pub async fn into_stream(self) -> io::Result<Stream> {
        let transport = match self.socket {
            AcceptedSocket::Tcp(socket) => tcp(socket, self.tls).await?,
            AcceptedSocket::Unix(socket) => Transport::Unix(LocalSocket::new(socket)),
            AcceptedSocket::DetachedTcp(socket) => {
                tcp(TcpStream::from_std(socket)?, self.tls).await?
            }
        };
        Ok(Stream::with_place(transport, self.place))
    }
}

async fn tcp(socket: TcpStream, tls: Option<Arc<ServerTls>>) -> io::Result<Transport> {
    // Lets the runtime learn what the client has sent already. To read that before a clock is set for
    // the handshake is cheaper than to set the clock.
    tokio::task::yield_now().await;
    Ok(match tls {
        None => Transport::Tcp(socket),
        Some(tls) => Transport::Tls(Box::new(tls.accept(socket).await?.into())),
    })
}

impl Listener {
    /// Binds `address`; `tls` is for TLS addresses.
    ///
    /// # Errors
    /// `ListenError`, which names what is in the way.
    pub async fn bind(
        address: &Address,
        tls: Option<&Arc<ServerTls>>,
        admission: &Arc<Admission>,
    ) -> Result<Self, ListenError> {
        let system = |source| ListenError::System {
            address: address.clone(),
            source,
        };
        let (socket, address) = match address {
            // Refused where settings are read.
            Address::Embedded => return Err(system(io::ErrorKind::Unsupported.into())),
            Address::Unix(path) => {
                let shared = admission.includes_others();
                create_directory(path, shared).map_err(system)?;
                let lock = remove_stale(address, path)?;
                let listener = bind_unix(path, shared);
                drop(lock);
                let listener = listener.map_err(system)?;
                let file = SocketFile::new(path).map_err(system)?;
                let socket = Socket::Unix {
                    listener,
                    _file: Some(file),
                };
                (socket, address.clone())
            }
            Address::Abstract(name) => {
                let name = std_unix::SocketAddr::from_abstract_name(name).map_err(system)?;
                let listener = std_unix::UnixListener::bind_addr(&name).map_err(|source| {
                    match source.kind() {
                        io::ErrorKind::AddrInUse => ListenError::InUse {
                            address: address.clone(),
                            holder: holder(std_unix::UnixStream::connect_addr(&name)),
                        },
                        _ => system(source),
                    }
                })?;
                (unix(listener).map_err(system)?, address.clone())
            }
            Address::Tcp { host, port } | Address::Tls { host, port } => {
                let bound = TcpListener::bind((host.as_str(), *port)).await;
                let listener = bound.map_err(|source| match source.kind() {
                    io::ErrorKind::AddrInUse => ListenError::InUse {
                        address: address.clone(),
                        holder: "another process".to_owned(),
                    },
                    _ => system(source),
                })?;
                let port = listener.local_addr().map_err(system)?.port();
                let host = host.clone();
                let bound = match address.is_tls() {
                    true => Address::Tls { host, port },
                    false => Address::Tcp { host, port },
                };
                (Socket::Tcp(listener), bound)
            }
        };
        Ok(Listener::new(socket, address, tls, admission))
    }

    /// Listens on a socket that the service manager has bound.
    ///
    /// # Errors
    /// `ListenError::Passed`.
    pub fn passed(
        passed: PassedSocket,
        tls: Option<&Arc<ServerTls>>,
        admission: &Arc<Admission>,
    ) -> Result<Self, ListenError> {
        let address = passed.socket.address(tls.is_some());
        let address = address.map_err(ListenError::Passed)?;
        let socket = match passed.socket {
            Passed::Unix(listener) => unix(listener),
            Passed::Tcp(listener) => listener
                .set_nonblocking(true)
                .and_then(|()| TcpListener::from_std(listener))
                .map(Socket::Tcp),
        };
        let socket = socket.map_err(ListenError::Passed)?;
        Ok(Listener::new(socket, address, tls, admission))
    }

    fn new(
        socket: Socket,
        address: Address,
        tls: Option<&Arc<ServerTls>>,
        admission: &Arc<Admission>,
    ) -> Self {
        Listener {
            tls: tls.filter(|_| address.is_tls()).cloned(),
            admission: admission.clone(),
            address,
            socket,
        }
    }

    /// Where it listens; with the real port where 0 was asked for.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for the next client that may come in, and until there is room for it.
    ///
    /// # Errors
    /// What the system said: for example that no descriptor is free.
    pub async fn accept(&self) -> io::Result<Accepted> {
        loop {
            let (socket, origin) = match &self.socket {
                Socket::Unix { listener, .. } => {
                    let socket = listener.accept().await?;
                    let (pid, uid) = credentials(&socket)?;
                    (AcceptedSocket::Unix(socket), PeerOrigin::Local { pid, uid })
                }
                Socket::Tcp(listener) => {
                    let (stream, address) = listener.accept().await?;
                    let origin = PeerOrigin::Tcp(address);
                    if let Err(error) = tune_tcp(&stream) {
                        // It concerns this client alone, who may have left already.
                        tracing::debug!(client = %origin, %error, "a client was lost");
                        continue;
                    }
                    (AcceptedSocket::Tcp(stream), origin)
                }
            };
            if self.admission.admits(&origin) {
                return Ok(Accepted {
                    socket,
                    origin,
                    tls: self.tls.clone(),
                    place: self.admission.place().await?,
                });
            }
        }
    }
}

/// Binds `path`; there is no moment at which others may connect who may not later.
fn bind_unix(path: &Path, shared: bool) -> io::Result<LocalListener> {
    let socket = UnixSocket::new_stream()?;
    // Linux makes the file with the mode that the socket had before, less the process's mask.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(0o600))?;
    socket.bind(path)?;
    if shared {
        std::fs::set_permissions(path, Permissions::from_mode(0o666))?;
    }
    LocalListener::new(socket.listen(BACKLOG)?.into_std()?)
}

fn unix(listener: std_unix::UnixListener) -> io::Result<Socket> {
    Ok(Socket::Unix {
        listener: LocalListener::new(listener)?,
        _file: None,
    })
}

fn create_directory(socket: &Path, shared: bool) -> io::Result<()> {
    let Some(directory) = socket.parent().filter(|path| !path.as_os_str().is_empty()) else {
        return Ok(());
    };
    let exists = directory.exists();
    DirBuilder::new()
        .recursive(true)
        .mode(if shared { 0o755 } else { 0o700 })
        .create(directory)?;
    if shared && !exists {
        // Whatever the process's mask took away.
        std::fs::set_permissions(directory, Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Removes a socket file that nobody listens on. The lock that it returns keeps a second primed
/// from doing the same until the new socket is bound.
fn remove_stale(address: &Address, path: &Path) -> Result<Option<File>, ListenError> {
    let system = |source| ListenError::System {
        address: address.clone(),
        source,
    };
    let metadata = match path.symlink_metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(system(error)),
    };
    if !std::os::unix::fs::FileTypeExt::is_socket(&metadata.file_type()) {
        return Err(ListenError::NotASocket(path.to_owned()));
    }
    let directory = match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    };
    let lock = File::open(directory).map_err(system)?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
        .map_err(|errno| system(errno.into()))?;
    match std_unix::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(system)?;
            tracing::info!(path = %path.display(), "replaced a socket file that nobody listened on");
            Ok(Some(lock))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Some(lock)),
        connected => Err(ListenError::InUse {
            address: address.clone(),
            holder: holder(connected),
        }),
    }
}

/// Who listens at the other end of `connected`, for people.
fn holder(connected: io::Result<std_unix::UnixStream>) -> String {
    // On the connecting side the credentials are those of the process that called listen().
    match connected.and_then(|stream| credentials(&stream)) {
        Ok((Some(pid), _)) => match process::name(pid) {
            Some(name) => format!("{name} (pid {pid})"),
            None => format!("pid {pid}"),
        },
        _ => "another process".to_owned(),
    }
}

/// A socket file that this process made.
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        let metadata = path.symlink_metadata()?;
        Ok(SocketFile {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A successor may have put its own socket in this place.
        let ours = self
            .path
            .symlink_metadata()
            .is_ok_and(|now| now.dev() == self.device && now.ino() == self.inode);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the socket file could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn bind(address: &Address, allow_uids: &[u32]) -> Result<Listener, ListenError> {
        let admission = Arc::new(Admission::new(allow_uids, 8));
        Listener::bind(address, None, &admission).await
    }

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn sockets_and_their_directory_are_for_their_owner_and_are_removed() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("primed/remote-apis.sock");
        let listener = bind(&Address::Unix(path.clone()), &[]).await.unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn sockets_that_are_for_other_users_too_can_be_reached_by_them() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("primed/remote-apis.sock");
        let address = Address::Unix(path.clone());
        let _listener = bind(&address, &[4_000_000]).await.unwrap();
        assert_eq!(mode(&path), 0o666);
        assert_eq!(mode(path.parent().unwrap()), 0o755);
    }

    #[tokio::test]
    async fn a_stale_socket_file_is_replaced_and_a_live_one_names_its_holder() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("s.sock");
        let address = Address::Unix(path.clone());
        drop(std_unix::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "stale");
        let _live = bind(&address, &[]).await.unwrap();
        let error = bind(&address, &[]).await.err().unwrap().to_string();
        let pid = format!("(pid {})", std::process::id());
        assert!(error.contains(&pid), "{error}");
    }

    #[tokio::test]
    async fn a_file_in_the_way_is_left_alone() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("notes.txt");
        std::fs::write(&path, "keep").unwrap();
        let refused = bind(&Address::Unix(path.clone()), &[]).await;
        assert!(matches!(refused, Err(ListenError::NotASocket(_))));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "keep");
    }

    #[tokio::test]
    async fn an_abstract_name_in_use_names_its_holder() {
        let address = Address::Abstract(format!("primed-test-{}", std::process::id()));
        let _live = bind(&address, &[]).await.unwrap();
        let refused = bind(&address, &[]).await;
        assert!(matches!(refused, Err(ListenError::InUse { .. })));
    }
}
