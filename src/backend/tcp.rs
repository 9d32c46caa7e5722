//! TCP connections to hosts by name.

use std::error::Error;
use std::io;
use std::time::Duration;

use http::Uri;
use http::uri::Scheme;
use hyper::service::Service as _;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt;
use tokio::net::TcpStream;

use crate::address::Bracketed;
use crate::stream::tune_tcp;

/// How long connecting to the addresses of a host may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long sent bytes may stay unacknowledged before the connection counts as broken, in
/// milliseconds.
const USER_TIMEOUT_MS: u32 = 60_000;

/// Connects to one of the host's addresses. They are tried in turn; where there are some of IPv6 and
/// some of IPv4, those of the other kind too after 300 ms (RFC 8305).
pub async fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[tokio::test]
    async fn the_address_of_a_host_that_answers_is_found_and_failures_are_the_systems() {
        // Of most machines' localhost there is one of IPv6, too.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let open = listener.local_addr().unwrap();
        let stream = connect("localhost", open.port()).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), open);
        drop(listener);
        let kind = async |host| connect(host, open.port()).await.unwrap_err().kind();
        for host in ["127.0.0.1", "localhost"] {
            assert_eq!(kind(host).await, io::ErrorKind::ConnectionRefused, "{host}");
        }
        assert_eq!(kind("no name").await, io::ErrorKind::InvalidInput);
    }

    #[tokio::test]
    async fn an_upstream_that_vanishes_is_noticed_by_the_system() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let stream = connect("127.0.0.1", port).await.unwrap();
        assert!(sockopt::tcp_nodelay(&stream).unwrap());
        assert!(sockopt::socket_keepalive(&stream).unwrap());
        assert_eq!(sockopt::tcp_user_timeout(&stream).unwrap(), USER_TIMEOUT_MS);
        let idle = sockopt::tcp_keepidle(&stream).unwrap();
        let interval = sockopt::tcp_keepintvl(&stream).unwrap();
        let probes = sockopt::tcp_keepcnt(&stream).unwrap();
        assert!(idle + interval * probes < Duration::from_secs(60));
    }
}
