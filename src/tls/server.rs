//! What primed shows the clients of its TLS listeners, and what it wants to see of them.

use std::io;
use std::path::Path;

use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::server::TlsStream;

use super::reload::Reloaded;
use super::{ALPN_HTTP2, HANDSHAKE_TIMEOUT, Identity, PemFile, TlsError, provider};

/// The files of `--tls-…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTlsFiles {
    /// Who primed is.
    pub identity: Identity,
    /// The authorities of clients: with them every client must show a certificate (mTLS).
    pub client_ca: Option<PemFile>,
}

/// The server's side of TLS, shared by all listeners.
pub struct ServerTls(Reloaded<ServerConfig>);

impl ServerTls {
    /// Reads and checks the files.
    ///
    /// # Errors
    /// `TlsError`, with the file that cannot be used.
    pub fn load(files: ServerTlsFiles) -> Result<Self, TlsError> {
        let paths = files.identity.paths().map(Path::to_owned);
        let client_ca = files.client_ca.as_ref().map(|file| file.path.clone());
        let watched: Vec<_> = paths.into_iter().chain(client_ca).collect();
        let paths = watched.iter().map(|path| path.as_path());
        Reloaded::new(paths, move || configure(&files)).map(ServerTls)
    }

    /// Does the handshake with a client that has just connected.
    ///
    /// # Errors
    /// What TLS said, or `TimedOut` after ten seconds.
    pub async fn accept(&self, socket: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let acceptor = TlsAcceptor::from(self.0.current().await);
        tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(socket))
            .await
            .map_err(|_| {
                io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake took too long")
            })?
    }
}

fn configure(files: &ServerTlsFiles) -> Result<ServerConfig, TlsError> {
    let identity = &files.identity;
    let (certificates, key) = identity.load()?;
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| identity.refused(&error))?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(file) => {
            let verifier =
                WebPkiClientVerifier::builder_with_provider(file.roots()?, provider()).build();
            let verifier = verifier.map_err(|error| {
                file.error(
                    error,
                    "give the certificates of the authorities of your clients",
                )
            })?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder
        .with_single_cert(certificates, key)
        .map_err(|error| identity.refused(&error))?;
    config.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
    Ok(config)
}
