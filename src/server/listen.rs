//! Listening sockets. A socket file that nobody listens on is replaced; one that somebody does
//! is an error that says who. Sockets are for their owner only.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net as std_unix;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::sockopt::socket_peercred;
use tokio::net::{TcpListener, UnixListener};
use tokio_util::either::Either;

use crate::address::Address;
use crate::backend::dial::Stream;
use crate::workspace::peer::PeerOrigin;
use crate::workspace::process;

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
}

enum Socket {
    Unix {
        listener: UnixListener,
        /// Removes the file when the listener goes; abstract names need none.
        _file: Option<SocketFile>,
    },
    Tcp(TcpListener),
}

impl Listener {
    /// Binds `address`. Call before other threads start: the file mode mask is the process's.
    ///
    /// # Errors
    /// `ListenError`, which names what is in the way.
    pub async fn bind(address: &Address) -> Result<Self, ListenError> {
        let system = |source| ListenError::System {
            address: address.clone(),
            source,
        };
        match address {
            Address::Unix(path) => {
                create_private_directory(path).map_err(system)?;
                let lock = remove_stale(address, path)?;
                // Mode 0600 from the start: no moment at which others may connect.
                let mask = rustix::process::umask(Mode::from_raw_mode(0o177));
                let bound = UnixListener::bind(path);
                rustix::process::umask(mask);
                drop(lock);
                let listener = bound.map_err(system)?;
                let file = SocketFile::new(path).map_err(system)?;
                Ok(Listener {
                    address: address.clone(),
                    socket: Socket::Unix {
                        listener,
                        _file: Some(file),
                    },
                })
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
                listener.set_nonblocking(true).map_err(system)?;
                let listener = UnixListener::from_std(listener).map_err(system)?;
                Ok(Listener {
                    address: address.clone(),
                    socket: Socket::Unix {
                        listener,
                        _file: None,
                    },
                })
            }
            Address::Tcp { host, port } => {
                let bound = TcpListener::bind((host.as_str(), *port)).await;
                let listener = bound.map_err(|source| match source.kind() {
                    io::ErrorKind::AddrInUse => ListenError::InUse {
                        address: address.clone(),
                        holder: "another process".to_owned(),
                    },
                    _ => system(source),
                })?;
                let port = listener.local_addr().map_err(system)?.port();
                Ok(Listener {
                    address: Address::Tcp {
                        host: host.clone(),
                        port,
                    },
                    socket: Socket::Tcp(listener),
                })
            }
        }
    }

    /// Where it listens; with the real port where 0 was asked for.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for the next client.
    ///
    /// # Errors
    /// What the system said: for example that no descriptor is free.
    pub async fn accept(&self) -> io::Result<(Stream, PeerOrigin)> {
        match &self.socket {
            Socket::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                let credentials = stream.peer_cred()?;
                let origin = PeerOrigin::Local {
                    pid: credentials.pid(),
                    uid: credentials.uid(),
                };
                Ok((Either::Left(stream), origin))
            }
            Socket::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok((Either::Right(stream), PeerOrigin::Tcp(address)))
            }
        }
    }
}

fn create_private_directory(socket: &Path) -> io::Result<()> {
    match socket.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory),
        _ => Ok(()),
    }
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
    let unknown = || "another process".to_owned();
    let Ok(stream) = connected else {
        return unknown();
    };
    // On the connecting side the credentials are those of the process that called listen().
    match socket_peercred(&stream) {
        Ok(credentials) => {
            let pid = credentials.pid.as_raw_nonzero().get();
            match process::name(pid) {
                Some(name) => format!("{name} (pid {pid})"),
                None => format!("pid {pid}"),
            }
        }
        Err(_) => unknown(),
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
    use std::os::unix::fs::PermissionsExt;

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn sockets_and_their_directory_are_for_their_owner_and_are_removed() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("primed/remote-apis.sock");
        let listener = Listener::bind(&Address::Unix(path.clone())).await.unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_file_is_replaced_and_a_live_one_names_its_holder() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("s.sock");
        let address = Address::Unix(path.clone());
        drop(std_unix::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "stale");
        let _live = Listener::bind(&address).await.unwrap();
        let error = Listener::bind(&address).await.err().unwrap().to_string();
        let pid = format!("(pid {})", std::process::id());
        assert!(error.contains(&pid), "{error}");
    }

    #[tokio::test]
    async fn a_file_in_the_way_is_left_alone() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("notes.txt");
        std::fs::write(&path, "keep").unwrap();
        let refused = Listener::bind(&Address::Unix(path.clone())).await;
        assert!(matches!(refused, Err(ListenError::NotASocket(_))));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "keep");
    }

    #[tokio::test]
    async fn an_abstract_name_in_use_names_its_holder() {
        let address = Address::Abstract(format!("primed-test-{}", std::process::id()));
        let _live = Listener::bind(&address).await.unwrap();
        let refused = Listener::bind(&address).await;
        assert!(matches!(refused, Err(ListenError::InUse { .. })));
    }
}
