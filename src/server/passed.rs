//! Sockets that the service manager bound before it started primed (systemd's `.socket` units).
//! Their files are the service manager's: nothing here removes them.

use std::io;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use listenfd::ListenFd;
use rustix::net::sockopt::socket_acceptconn;

use crate::address::Address;

/// The sockets that nobody has asked for yet.
pub struct PassedSockets(Vec<PassedSocket>);

/// A bound socket.
pub struct PassedSocket {
    /// `FileDescriptorName=`; systemd gives the unit's name where there is none.
    pub name: String,
    /// The socket itself.
    pub socket: Passed,
}

/// What kinds there are.
pub enum Passed {
    /// In the file system or the abstract namespace.
    Unix(UnixListener),
    /// TCP of either version.
    Tcp(TcpListener),
}

impl PassedSockets {
    /// Takes what was passed to this process, once. Call it before there are other threads: it
    /// clears the variables that name the sockets.
    ///
    /// # Errors
    /// When the variables are malformed, or a socket is of another kind or not listening.
    pub fn take() -> io::Result<Self> {
        let names: Vec<_> = sd_notify::listen_fds_with_names()?
            .map(|(_, name)| name)
            .collect();
        if names.is_empty() {
            return Ok(PassedSockets(Vec::new()));
        }
        let mut descriptors = ListenFd::from_env();
        let sockets = names.into_iter().enumerate().map(|(index, name)| {
            let socket = take(&mut descriptors, index)
                .map_err(|error| io::Error::new(error.kind(), format!("'{name}': {error}")))?;
            Ok(PassedSocket { name, socket })
        });
        sockets.collect::<io::Result<_>>().map(PassedSockets)
    }

    /// Those called `name`, or all of them, that were not asked for before.
    pub fn select(&mut self, name: Option<&str>) -> Vec<PassedSocket> {
        let is_wanted = |socket: &mut PassedSocket| name.is_none_or(|name| socket.name == name);
        self.0.extract_if(.., is_wanted).collect()
    }

    /// The names of those that nobody has asked for.
    pub fn names(&self) -> Vec<&str> {
        self.0.iter().map(|socket| socket.name.as_str()).collect()
    }
}

fn take(descriptors: &mut ListenFd, index: usize) -> io::Result<Passed> {
    let gone = || io::Error::from(io::ErrorKind::NotFound);
    let (socket, listening) = match descriptors.take_unix_listener(index) {
        Ok(taken) => {
            let socket = taken.ok_or_else(gone)?;
            let listening = socket_acceptconn(&socket)?;
            (Passed::Unix(socket), listening)
        }
        Err(_) => {
            let socket = descriptors.take_tcp_listener(index).map_err(|_| {
                let reason = "not a stream socket; write ListenStream= in the .socket unit";
                io::Error::new(io::ErrorKind::InvalidInput, reason)
            })?;
            let socket = socket.ok_or_else(gone)?;
            let listening = socket_acceptconn(&socket)?;
            (Passed::Tcp(socket), listening)
        }
    };
    if !listening {
        let reason = "connected, not listening; write Accept=no in the .socket unit";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    Ok(socket)
}

impl Passed {
    /// Where it listens. TCP counts as TLS where there is a certificate for it: nobody who gives
    /// one expects to be served in the clear.
    ///
    /// # Errors
    /// What the system said.
    pub fn address(&self, tls: bool) -> io::Result<Address> {
        Ok(match self {
            Passed::Unix(listener) => {
                let address = listener.local_addr()?;
                match address.as_abstract_name() {
                    Some(name) => Address::Abstract(String::from_utf8_lossy(name).into_owned()),
                    None => Address::Unix(
                        address
                            .as_pathname()
                            .unwrap_or(Path::new("(unnamed)"))
                            .to_owned(),
                    ),
                }
            }
            Passed::Tcp(listener) => {
                let address = listener.local_addr()?;
                let (host, port) = (address.ip().to_string(), address.port());
                match tls {
                    true => Address::Tls { host, port },
                    false => Address::Tcp { host, port },
                }
            }
        })
    }
}
