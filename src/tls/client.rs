//! What primed believes of the upstreams that it reaches by TLS, and what it shows them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{self, CertificateError, ClientConfig, RootCertStore};

use super::reload::Reloaded;
use super::{ALPN_HTTP2, HANDSHAKE_TIMEOUT, Identity, PemFile, TlsError, provider};

/// The flag that says whom to believe.
const CA_FLAG: &str = "--upstream-ca";
/// The flag that says which name to expect.
const NAME_FLAG: &str = "--upstream-server-name";

/// The files and names of `--upstream-…`, for all upstreams.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientTlsFiles {
    /// The authorities to trust instead of the system's.
    pub ca: Option<PemFile>,
    /// What to show an upstream that asks for a certificate (mTLS).
    pub identity: Option<Identity>,
    /// The name to expect in certificates instead of the address's host.
    pub server_name: Option<String>,
}

impl ClientTlsFiles {
    /// The flag that brought one of them in, if any did.
    pub fn flag(&self) -> Option<&'static str> {
        let identity = self
            .identity
            .as_ref()
            .map(|identity| &identity.certificates);
        let file = self.ca.as_ref().or(identity);
        let name = self.server_name.as_ref().map(|_| NAME_FLAG);
        file.map(|file| file.flag).or(name)
    }
}

/// The client's side of TLS, shared by the connections to all upstreams.
pub struct ClientTls {
    config: Reloaded<ClientConfig>,
    server_name: Option<ServerName<'static>>,
}

impl ClientTls {
    /// Reads and checks the files.
    ///
    /// # Errors
    /// `TlsError`, with the file or name that cannot be used.
    pub fn load(files: ClientTlsFiles) -> Result<Self, TlsError> {
        let server_name = match &files.server_name {
            Some(name) => Some(server_name(name, NAME_FLAG)?),
            None => None,
        };
        let identity = files.identity.iter().flat_map(Identity::paths);
        let ca = files.ca.iter().map(|file| file.path.as_path());
        let paths: Vec<PathBuf> = identity.chain(ca).map(Path::to_owned).collect();
        let paths = paths.iter().map(|path| path.as_path());
        Ok(ClientTls {
            config: Reloaded::new(paths, move || configure(&files))?,
            server_name,
        })
    }

    /// The name that a certificate of `host` must hold.
    ///
    /// # Errors
    /// `TlsError`, when `host` is no name that can stand in a certificate.
    pub fn server_name(&self, host: &str) -> Result<ServerName<'static>, TlsError> {
        match &self.server_name {
            Some(name) => Ok(name.clone()),
            None => server_name(host, "--upstream"),
        }
    }

    /// Does the handshake with an upstream that must be `name`.
    ///
    /// # Errors
    /// What TLS said, with a hint; `TimedOut` after ten seconds.
    pub async fn connect(
        &self,
        name: ServerName<'static>,
        socket: TcpStream,
    ) -> io::Result<TlsStream<TcpStream>> {
        let connector = TlsConnector::from(self.config.current().await);
        let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, connector.connect(name, socket))
            .await
            .map_err(|_| {
                io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake took too long")
            })?
            .map_err(with_hint)?;
        if stream.get_ref().1.alpn_protocol() != Some(ALPN_HTTP2) {
            let reason = "it speaks TLS but not HTTP/2 (ALPN h2), as gRPC needs";
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        Ok(stream)
    }
}

fn server_name(name: &str, flag: &'static str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(name.to_owned()).map_err(|error| TlsError {
        flag,
        value: name.to_owned(),
        reason: error.to_string(),
        hint: "a server's name is a DNS name or an IP address; see --upstream-server-name",
    })
}

fn configure(files: &ClientTlsFiles) -> Result<ClientConfig, TlsError> {
    let roots = match &files.ca {
        Some(file) => file.roots()?,
        None => system_roots()?,
    };
    let setup = |error: rustls::Error| TlsError {
        flag: "--upstream",
        value: "grpcs://…".to_owned(),
        reason: error.to_string(),
        hint: "this is a fault in primed",
    };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(setup)?
        .with_root_certificates(roots);
    let mut config = match &files.identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let (certificates, key) = identity.load()?;
            builder
                .with_client_auth_cert(certificates, key)
                .map_err(|error| identity.refused(&error))?
        }
    };
    config.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
    Ok(config)
}

/// The authorities that this machine trusts: `SSL_CERT_FILE`, `SSL_CERT_DIR`, or the usual places.
fn system_roots() -> Result<Arc<RootCertStore>, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (usable, _) = roots.add_parsable_certificates(found.certs);
    if usable == 0 {
        let reason = found.errors.first().map(ToString::to_string);
        return Err(TlsError {
            flag: CA_FLAG,
            value: "(not given)".to_owned(),
            reason: reason.unwrap_or_else(|| "this system trusts no authority".to_owned()),
            hint: "install ca-certificates, or name the upstream's authority",
        });
    }
    Ok(Arc::new(roots))
}

/// Says what to do about the failures that people meet when they set TLS up.
fn with_hint(error: io::Error) -> io::Error {
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let hint = match tls {
        Some(rustls::Error::InvalidCertificate(reason)) => match reason {
            CertificateError::UnknownIssuer => "name its authority with --upstream-ca",
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "dial the name in its certificate, or give it with --upstream-server-name"
            }
            _ => return error,
        },
        Some(rustls::Error::InvalidMessage(_)) => "is it a TLS port? Without TLS write grpc://",
        Some(rustls::Error::AlertReceived(_)) => {
            "does it want a certificate? Give --upstream-cert and --upstream-key"
        }
        _ => return error,
    };
    io::Error::new(error.kind(), format!("{error}; {hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertifiedKey, generate_simple_self_signed};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::rustls::ServerConfig;
    use tokio_rustls::rustls::pki_types::PrivateKeyDer;

    /// What a client says of a server that offers `protocols`.
    async fn connect(protocols: &[&[u8]]) -> io::Result<()> {
        let scratch = tempfile::tempdir().unwrap();
        let names = vec!["server.example".to_owned()];
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(names).unwrap();
        let ca = scratch.path().join("ca.pem");
        std::fs::write(&ca, cert.pem()).unwrap();
        let key = PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .unwrap();
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).await?;
        let accepted = crate::task::spawn("test server", async move {
            let (socket, _) = listener.accept().await?;
            TlsAcceptor::from(Arc::new(config)).accept(socket).await
        });
        let tls = ClientTls::load(ClientTlsFiles {
            ca: Some(PemFile::new(CA_FLAG, ca)),
            ..ClientTlsFiles::default()
        });
        let tls = tls.unwrap();
        let name = tls.server_name("server.example").unwrap();
        let connected = tls.connect(name, socket).await;
        let _ = accepted.await;
        connected.map(drop)
    }

    #[tokio::test]
    async fn a_server_that_does_not_say_that_it_speaks_http2_is_refused() {
        assert!(connect(&[b"http/1.1", b"h2"]).await.is_ok());
        let refused = connect(&[]).await.unwrap_err().to_string();
        assert!(refused.contains("h2"), "{refused}");
        assert!(connect(&[b"http/1.1"]).await.is_err());
    }

    #[test]
    fn the_name_to_expect_can_be_given_and_must_be_one() {
        let named = |name: &str| {
            let server_name = Some(name.to_owned());
            ClientTls::load(ClientTlsFiles {
                ca: None,
                identity: None,
                server_name,
            })
        };
        let error = named("a b").err().unwrap().to_string();
        assert!(
            error.contains(NAME_FLAG) && error.contains("a b"),
            "{error}"
        );
    }
}
