//! TLS on both sides: what primed shows its clients (`server`) and what it believes of its
//! upstreams (`client`). Files are PEM, checked at the start, and read again when they change.

pub mod client;
mod reload;
pub mod server;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, RootCertStore};

/// HTTP/2, as ALPN names it: the only thing that gRPC speaks.
const ALPN_HTTP2: &[u8] = b"h2";
/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why TLS cannot be set up: always a file or a name that a flag brought in.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{flag} {value}: {reason}; {hint}")]
pub struct TlsError {
    flag: &'static str,
    value: String,
    reason: String,
    hint: &'static str,
}

const READABLE: &str = "give a PEM file that primed may read";
const MADE_FOR_EACH_OTHER: &str = "give the certificate that was made for this key";

/// A PEM file, and the flag that named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PemFile {
    /// For messages.
    pub flag: &'static str,
    /// Where it is.
    pub path: PathBuf,
}

/// A certificate chain and the private key to its first certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The chain, the certificate of this side first.
    pub certificates: PemFile,
    /// The key, unencrypted: PKCS#8, PKCS#1 or SEC1.
    pub key: PemFile,
}

type Certificates = Vec<CertificateDer<'static>>;

impl PemFile {
    /// The file at `path`, which `flag` named.
    pub fn new(flag: &'static str, path: PathBuf) -> Self {
        PemFile { flag, path }
    }

    fn error(&self, reason: impl ToString, hint: &'static str) -> TlsError {
        TlsError {
            flag: self.flag,
            value: self.path.display().to_string(),
            reason: reason.to_string(),
            hint,
        }
    }

    fn content(&self) -> Result<Vec<u8>, TlsError> {
        std::fs::read(&self.path).map_err(|error| self.error(error, READABLE))
    }

    fn malformed(&self, error: &pem::Error) -> TlsError {
        self.error(format!("not valid PEM: {error}"), READABLE)
    }

    fn certificates(&self) -> Result<Certificates, TlsError> {
        let certificates: Certificates = CertificateDer::pem_slice_iter(&self.content()?)
            .collect::<Result<_, _>>()
            .map_err(|error| self.malformed(&error))?;
        if certificates.is_empty() {
            let reason = "there is no certificate in it";
            let hint = "a PEM certificate begins with '-----BEGIN CERTIFICATE-----'";
            return Err(self.error(reason, hint));
        }
        Ok(certificates)
    }

    fn key(&self) -> Result<PrivateKeyDer<'static>, TlsError> {
        PrivateKeyDer::from_pem_slice(&self.content()?).map_err(|error| match error {
            pem::Error::NoItemsFound => self.error(
                "there is no private key in it that can be used",
                "give an unencrypted PEM key; `openssl pkey -in FILE` takes a password off",
            ),
            error => self.malformed(&error),
        })
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates()? {
            roots.add(certificate).map_err(|error| {
                self.error(error, "give the certificates of the authorities to trust")
            })?;
        }
        Ok(Arc::new(roots))
    }
}

impl Identity {
    fn load(&self) -> Result<(Certificates, PrivateKeyDer<'static>), TlsError> {
        Ok((self.certificates.certificates()?, self.key.key()?))
    }

    /// What is wrong with a pair whose parts could each be read.
    fn refused(&self, error: &rustls::Error) -> TlsError {
        match error {
            rustls::Error::InconsistentKeys(_) => {
                let certificates = self.certificates.path.display();
                let reason = format!("the key does not belong to {certificates}");
                self.key.error(reason, MADE_FOR_EACH_OTHER)
            }
            rustls::Error::InvalidCertificate(_) => self.certificates.error(error, READABLE),
            _ => self.key.error(error, "give an RSA, ECDSA or Ed25519 key"),
        }
    }

    fn paths(&self) -> [&Path; 2] {
        [&self.certificates.path, &self.key.path]
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}
