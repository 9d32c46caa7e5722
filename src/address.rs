//! Addresses as users write them: `unix:PATH`, `unix-abstract:NAME`, `grpcs://HOST:PORT` and
//! `https://HOST:PORT` with TLS, `grpc://HOST:PORT`, `http://HOST:PORT` and `HOST:PORT` without.
//! Listeners bind them, backends and admin clients dial them.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Serialize;

/// Where something listens, or is to be reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// The backend within primed itself; an upstream only.
    Embedded,
    /// A Unix socket in the file system.
    Unix(PathBuf),
    /// A Unix socket in Linux's abstract namespace, without the leading NUL.
    Abstract(String),
    /// A TCP socket. `host` is a name or a literal address, without brackets.
    Tcp {
        /// Name or literal IP address.
        host: String,
        /// Port; 0 lets the system choose when listening.
        port: u16,
    },
    /// TLS over TCP.
    Tls {
        /// Name or literal IP address, without brackets.
        host: String,
        /// Port; 0 lets the system choose when listening.
        port: u16,
    },
}

impl Address {
    /// Whether what is sent there is encrypted.
    pub fn is_tls(&self) -> bool {
        matches!(self, Address::Tls { .. })
    }

    /// `HOST:PORT`, as HTTP names it; `None` for Unix sockets.
    pub fn authority(&self) -> Option<String> {
        match self {
            Address::Tcp { host, port } | Address::Tls { host, port } => {
                Some(format!("{}:{port}", Bracketed(host)))
            }
            Address::Embedded | Address::Unix(_) | Address::Abstract(_) => None,
        }
    }

    /// Whether it is on this machine, as far as its name tells.
    pub fn is_on_this_machine(&self) -> bool {
        match self {
            Address::Embedded | Address::Unix(_) | Address::Abstract(_) => true,
            Address::Tcp { host, .. } | Address::Tls { host, .. } => {
                host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
            }
        }
    }

    /// Whether it is reached by a Unix socket, so that the kernel knows who connects.
    pub fn is_unix(&self) -> bool {
        matches!(
            self,
            Address::Embedded | Address::Unix(_) | Address::Abstract(_)
        )
    }
}

/// Where clients are to connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// A socket that primed binds.
    At(Address),
    /// Sockets that the service manager has bound: `systemd`, or `systemd:NAME` for those with
    /// this `FileDescriptorName=`.
    Passed(Option<String>),
}

impl FromStr for ListenAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text.split_once(':') {
            None if text == "systemd" => ListenAddress::Passed(None),
            Some(("systemd", name)) => ListenAddress::Passed(Some(name.to_owned())),
            _ => match text.parse()? {
                Address::Embedded => {
                    return Err(AddressError {
                        text: text.to_owned(),
                        reason: "it is an upstream only",
                    });
                }
                address => ListenAddress::At(address),
            },
        })
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddress::At(address) => address.fmt(f),
            ListenAddress::Passed(None) => f.write_str("systemd"),
            ListenAddress::Passed(Some(name)) => write!(f, "systemd:{name}"),
        }
    }
}

/// Why a text is not an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not an address: {reason}; write {FORMS}")]
pub struct AddressError {
    text: String,
    reason: &'static str,
}

/// What stands for the backend within primed.
const EMBEDDED: &str = "embedded";

const FORMS: &str = "unix:PATH, unix-abstract:NAME, grpcs://HOST:PORT or https://HOST:PORT (TLS), \
                     grpc://HOST:PORT, http://HOST:PORT or HOST:PORT";

/// Where TLS listens unless told otherwise: Bazel takes `grpcs://HOST` for this too.
const TLS_PORT: u16 = 443;

/// The longest path that fits `sockaddr_un`, with its closing NUL.
const MAX_SOCKET_PATH: usize = 107;

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = |reason| AddressError {
            text: text.to_owned(),
            reason,
        };
        if text == EMBEDDED {
            return Ok(Address::Embedded);
        }
        if let Some(name) = text.strip_prefix("unix-abstract:") {
            return match name.len() {
                0 => Err(error("the name is empty")),
                1..=MAX_SOCKET_PATH => Ok(Address::Abstract(name.to_owned())),
                _ => Err(error(
                    "the name is longer than a socket name may be (107 bytes)",
                )),
            };
        }
        if let Some(path) = text.strip_prefix("unix:") {
            // gRPC also writes `unix:///absolute/path`.
            let path = path.strip_prefix("//").unwrap_or(path);
            return match path.len() {
                0 => Err(error("the path is empty")),
                1..=MAX_SOCKET_PATH => Ok(Address::Unix(PathBuf::from(path))),
                _ => Err(error(
                    "the path is longer than a socket path may be (107 bytes)",
                )),
            };
        }
        let (tls, rest) = match text.split_once("://") {
            Some(("grpc" | "http", rest)) => (false, rest.strip_suffix('/').unwrap_or(rest)),
            Some(("grpcs" | "https", rest)) => (true, rest.strip_suffix('/').unwrap_or(rest)),
            Some(_) => return Err(error("the scheme is not known")),
            None => (false, text),
        };
        let has_port = |(_, after): &(&str, &str)| !after.ends_with(']');
        let (host, port) = match rest.rsplit_once(':').filter(has_port) {
            Some((host, port)) => (host, port.parse().ok()),
            None if tls => (rest, Some(TLS_PORT)),
            None => return Err(error("the port is missing")),
        };
        let host = match host.strip_prefix('[') {
            Some(literal) => literal
                .strip_suffix(']')
                .ok_or_else(|| error("the bracket is not closed"))?,
            None if host.contains(':') => {
                return Err(error("an IPv6 address stands in brackets: [::1]:8980"));
            }
            None => host,
        };
        if host.is_empty() || host.contains(['/', ' ']) {
            return Err(error("the host is missing or malformed"));
        }
        let port = port.ok_or_else(|| error("the port is not a number up to 65535"))?;
        let host = host.to_owned();
        Ok(match tls {
            true => Address::Tls { host, port },
            false => Address::Tcp { host, port },
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Embedded => f.write_str(EMBEDDED),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Abstract(name) => write!(f, "unix-abstract:{name}"),
            Address::Tcp { host, port } => write!(f, "{}:{port}", Bracketed(host)),
            Address::Tls { host, port } => write!(f, "grpcs://{}:{port}", Bracketed(host)),
        }
    }
}

/// A host as it stands before a port.
pub(crate) struct Bracketed<'a>(pub(crate) &'a str);

impl fmt::Display for Bracketed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.contains(':') {
            true => write!(f, "[{}]", self.0),
            false => f.write_str(self.0),
        }
    }
}

impl Serialize for Address {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Address, AddressError> {
        text.parse()
    }

    #[test]
    fn every_form_is_read_and_written_back() {
        for (text, shown) in [
            ("unix:/run/a.sock", "unix:/run/a.sock"),
            ("unix:///run/a.sock", "unix:/run/a.sock"),
            ("unix:relative.sock", "unix:relative.sock"),
            ("unix-abstract:primed", "unix-abstract:primed"),
            ("grpc://cas.example:8980", "cas.example:8980"),
            ("http://localhost:50051/", "localhost:50051"),
            ("127.0.0.1:0", "127.0.0.1:0"),
            ("[::1]:8980", "[::1]:8980"),
            ("grpcs://cas.example:8980", "grpcs://cas.example:8980"),
            ("https://cas.example:8980/", "grpcs://cas.example:8980"),
            ("grpcs://cas.example", "grpcs://cas.example:443"),
            ("https://[::1]", "grpcs://[::1]:443"),
            ("grpcs://[::1]:8980", "grpcs://[::1]:8980"),
            ("embedded", "embedded"),
        ] {
            assert_eq!(
                parse(text).map(|a| a.to_string()).as_deref(),
                Ok(shown),
                "{text}"
            );
        }
    }

    #[test]
    fn sockets_of_the_service_manager_are_listened_on_by_name() {
        for (text, address) in [
            ("systemd", ListenAddress::Passed(None)),
            ("systemd:rpc", ListenAddress::Passed(Some("rpc".to_owned()))),
            (
                "unix:systemd",
                ListenAddress::At(Address::Unix("systemd".into())),
            ),
        ] {
            assert_eq!(text.parse().as_ref(), Ok(&address));
            assert_eq!(address.to_string(), text);
        }
        assert!(parse("systemd").is_err(), "nobody can dial it");
        let embedded = "embedded".parse::<ListenAddress>().unwrap_err().to_string();
        assert!(embedded.contains("upstream only"), "{embedded}");
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_reason() {
        for (text, reason) in [
            ("", "port is missing"),
            ("unix:", "path is empty"),
            ("unix-abstract:", "name is empty"),
            ("localhost", "port is missing"),
            ("localhost:http", "not a number"),
            ("localhost:70000", "not a number"),
            ("::1:8980", "brackets"),
            ("ftp://host:1", "scheme"),
            ("[::1]", "port is missing"),
            ("grpcs://", "host is missing"),
            ("grpcs://host:", "not a number"),
            ("grpcs://host/path", "host is missing or malformed"),
            ("grpc://host", "port is missing"),
            (":80", "host is missing"),
        ] {
            let message = parse(text).map_err(|e| e.to_string()).unwrap_err();
            assert!(message.contains(reason), "{text}: {message}");
        }
        assert!(parse(&format!("unix:/{}", "x".repeat(200))).is_err());
    }
}
