//! Certificate authorities, and what they issue, in PEM files.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

/// An authority.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    /// Its certificate.
    pub file: PathBuf,
}

/// A certificate and its key.
#[derive(Clone, Debug)]
pub struct Issued {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// What a client of TLS believes and shows; by default it speaks no TLS.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    ca: Option<PathBuf>,
    identity: Option<Issued>,
}

impl Authority {
    /// Writes `NAME-ca.pem` into `directory`.
    pub fn create(directory: &Path, name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Without names of their own they could not be told apart.
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let issuer = CertifiedIssuer::self_signed(params, key).unwrap();
        let file = directory.join(format!("{name}-ca.pem"));
        std::fs::write(&file, issuer.pem()).unwrap();
        Authority { issuer, file }
    }

    /// Issues a certificate for `names` into `NAME.pem`, and its key into `NAME-key.pem`; files
    /// that are there are replaced by new ones.
    pub fn issue(&self, directory: &Path, name: &str, names: &[&str]) -> Issued {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let params = CertificateParams::new(names).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let issued = Issued {
            certificate: directory.join(format!("{name}.pem")),
            key: directory.join(format!("{name}-key.pem")),
        };
        std::fs::write(&issued.certificate, certificate.pem()).unwrap();
        std::fs::write(&issued.key, key.serialize_pem()).unwrap();
        issued
    }

    /// What a client needs that trusts this authority.
    pub fn trusted(&self) -> Credentials {
        Credentials {
            ca: Some(self.file.clone()),
            identity: None,
        }
    }
}

impl Credentials {
    /// With a certificate to show.
    pub fn showing(mut self, identity: &Issued) -> Self {
        self.identity = Some(identity.clone());
        self
    }

    /// For the scripts in `tests/it/grpcio`.
    pub fn variables(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let ca = self.ca.as_deref().map(|path| ("TLS_CA", path));
        let identity = self.identity.iter().flat_map(|identity| {
            let (certificate, key) = (identity.certificate.as_path(), identity.key.as_path());
            [("TLS_CERT", certificate), ("TLS_KEY", key)]
        });
        ca.into_iter().chain(identity)
    }
}
