//! The headers that primed adds to the calls that go to one backend: those of `--upstream-header`
//! and, on top of them, what the credential helper says or, where none is in charge, the token in
//! the token file. Each replaces the client's own header of the same name.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use http::HeaderMap;

use super::credential_helper::{CredentialHelper, HelperError};
use super::token_file::TokenFile;
use crate::address::Address;
use crate::config::upstream::UpstreamConfig;
use crate::http2::fields::Fields;

/// Why there are no headers for a call. It should end with `UNAUTHENTICATED` and these words.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CredentialError {
    /// The helper gave none.
    #[error(transparent)]
    Helper(#[from] HelperError),
    /// The program is not there. Found at the start only.
    #[error("--credential-helper: '{}' {reason}", program.display())]
    NoHelper {
        /// As it was configured.
        program: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// There is no token to begin with. Found at the start only.
    #[error(
        "--upstream-token-file: there is no token in '{}': {error}; its whole content should be \
         the token", path.display()
    )]
    NoToken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: Arc<std::io::Error>,
    },
}

/// The headers for one backend. To be shared by all who call it, on any runtime.
#[derive(Debug)]
pub struct Credentials(Source);

#[derive(Debug)]
enum Source {
    Fixed(Arc<HeaderMap>),
    TokenFile(Box<TokenFile>),
    Helper(Arc<CredentialHelper>),
}

/// None: no headers.
impl Default for Credentials {
    fn default() -> Self {
        Credentials(Source::Fixed(Arc::default()))
    }
}

impl Credentials {
    /// What `config` says of calls to `address`.
    ///
    /// # Errors
    /// `NoHelper` and `NoToken`: what is wrong with the settings.
    pub fn new(config: &UpstreamConfig, address: &Address) -> Result<Self, CredentialError> {
        let mut fixed = HeaderMap::new();
        for header in &config.headers {
            fixed.append(header.name.clone(), header.value.clone());
        }
        let host = match address {
            Address::Tcp { host, .. } | Address::Tls { host, .. } => Some(host.as_str()),
            Address::Embedded | Address::Unix(_) | Address::Abstract(_) => None,
        };
        if let Some(program) = config.credential_helper(host) {
            check_program(program)?;
            let helper = CredentialHelper::new(program, uri(address), fixed);
            return Ok(Credentials(Source::Helper(helper)));
        }
        let Some(path) = &config.token_file else {
            return Ok(Credentials(Source::Fixed(Arc::new(fixed))));
        };
        let file = TokenFile::open(path, fixed).map_err(|error| CredentialError::NoToken {
            path: path.clone(),
            error: Arc::new(error),
        })?;
        Ok(Credentials(Source::TokenFile(Box::new(file))))
    }

    /// The headers, if they can be had at once; `None` where `headers` has to be awaited. To be
    /// called within a runtime.
    pub fn ready(&self) -> Option<Arc<HeaderMap>> {
        match &self.0 {
            Source::Fixed(headers) => Some(headers.clone()),
            Source::TokenFile(file) => Some(file.headers(Instant::now())),
            Source::Helper(helper) => helper.ready(),
        }
    }

    /// The headers, for which a credential helper may have to run first.
    ///
    /// # Errors
    /// `Helper`, with its words.
    pub async fn headers(&self) -> Result<Arc<HeaderMap>, CredentialError> {
        match &self.0 {
            Source::Helper(helper) => Ok(helper.headers().await?),
            Source::Fixed(_) | Source::TokenFile(_) => Ok(self.ready().unwrap_or_default()),
        }
    }

    /// Tells that the backend answered UNAUTHENTICATED to a call that had the headers `sent`. A
    /// credential helper is asked again then.
    pub fn refused(&self, sent: &Arc<HeaderMap>) {
        if let Source::Helper(helper) = &self.0 {
            helper.refused(sent);
        }
    }
}

/// Puts primed's `own` headers in place of those of the same names.
pub fn replace(headers: &mut Fields, own: &HeaderMap) {
    for name in own.keys() {
        headers.remove(name);
        for value in own.get_all(name) {
            headers.append(name.clone(), value.clone());
        }
    }
}

/// How a credential helper is told of `address`. Bazel names the service too; primed asks once
/// for all of them.
fn uri(address: &Address) -> String {
    match address.authority() {
        Some(authority) => {
            let authority = authority.strip_suffix(":443").unwrap_or(&authority);
            format!("https://{authority}/")
        }
        None => address.to_string(),
    }
}

/// A typing error should be found when primed starts, not by the first call.
fn check_program(program: &Path) -> Result<(), CredentialError> {
    let no_helper = |reason| CredentialError::NoHelper {
        program: program.to_owned(),
        reason,
    };
    if program.components().count() > 1 || program.has_root() {
        return match program.is_file() {
            false => Err(no_helper("is no file; give the path of a program")),
            true if is_executable(program) => Ok(()),
            true => Err(no_helper("is not executable; try chmod +x")),
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path).any(|folder| is_executable(&folder.join(program))) {
        true => Ok(()),
        false => Err(no_helper("is not in PATH; give the path of a program")),
    }
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::header;

    fn config(headers: &[&str]) -> UpstreamConfig {
        UpstreamConfig {
            headers: headers.iter().map(|text| text.parse().unwrap()).collect(),
            ..UpstreamConfig::default()
        }
    }

    fn address(text: &str) -> Address {
        text.parse().unwrap()
    }

    #[test]
    fn own_headers_take_the_place_of_those_of_the_same_name() {
        let config = config(&["authorization: Bearer own", "x-many: 1", "x-many: 2"]);
        let own = Credentials::new(&config, &address("unix:/a")).unwrap();
        let mut headers = Fields::new();
        for (name, value) in [
            ("authorization", "Bearer client's"),
            ("authorization", "again"),
            ("x-many", "client's"),
            ("x-other", "stays"),
        ] {
            let name = http::HeaderName::from_static(name);
            headers.append(name, value.parse().unwrap());
        }
        replace(&mut headers, &own.ready().unwrap());
        let values = |name: &str| {
            let values = headers.iter().filter(|(other, _)| other == name);
            values
                .map(|(_, value)| value.to_str().unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(values("authorization"), ["Bearer own"]);
        assert_eq!(values("x-many"), ["1", "2"]);
        assert_eq!(values("x-other"), ["stays"]);
        let debug = format!("{own:?} {config:?}");
        assert!(!debug.contains("own\""), "{debug}");
    }

    #[tokio::test]
    async fn without_settings_nothing_is_added() {
        let own = Credentials::new(&config(&[]), &address("host:1")).unwrap();
        assert!(own.ready().unwrap().is_empty());
        assert!(own.headers().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn the_token_goes_where_no_helper_is_in_charge() {
        let directory = tempfile::tempdir().unwrap();
        let token = directory.path().join("token");
        std::fs::write(&token, "secret\n").unwrap();
        let mut config = config(&["authorization: Basic x", "x-key: 1"]);
        config.token_file = Some(token);
        config.credential_helpers = vec!["cas.example=/bin/false".parse().unwrap()];
        for upstream in ["unix:/a", "other.example:443"] {
            let own = Credentials::new(&config, &address(upstream)).unwrap();
            let headers = own.headers().await.unwrap();
            assert_eq!(headers[header::AUTHORIZATION], "Bearer secret");
            assert_eq!(headers["x-key"], "1");
        }
        let own = Credentials::new(&config, &address("cas.example:443")).unwrap();
        assert!(own.ready().is_none());
        let error = own.headers().await.unwrap_err().to_string();
        assert!(error.contains("/bin/false"), "{error}");
    }

    #[test]
    fn settings_that_cannot_work_are_found_at_the_start() {
        let directory = tempfile::tempdir().unwrap();
        let plain = directory.path().join("plain");
        std::fs::write(&plain, "").unwrap();
        let error = |config: &UpstreamConfig| {
            let error = Credentials::new(config, &address("host:1")).unwrap_err();
            error.to_string()
        };
        for (program, reason) in [
            ("/nonexistent/helper", "no file"),
            ("./nonexistent", "no file"),
            ("primed-no-such-helper", "PATH"),
            (plain.to_str().unwrap(), "not executable"),
        ] {
            let mut config = config(&[]);
            config.credential_helpers = vec![program.parse().unwrap()];
            let error = error(&config);
            assert!(error.contains(reason) && error.contains(program), "{error}");
        }
        let mut config = config(&[]);
        config.token_file = Some(plain);
        let error = error(&config);
        assert!(error.contains("empty") && error.contains("--upstream-token-file"));
    }

    #[test]
    fn helpers_are_asked_about_the_host_as_bazel_asks() {
        for (upstream, expected) in [
            ("cas.example:443", "https://cas.example/"),
            ("cas.example:8980", "https://cas.example:8980/"),
            ("[::1]:443", "https://[::1]/"),
            ("unix:/run/casd.sock", "unix:/run/casd.sock"),
        ] {
            assert_eq!(uri(&address(upstream)), expected);
        }
    }
}
