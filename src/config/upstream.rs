//! What primed does to calls on their way upstream, as users write it: headers and credentials
//! that it adds, instance names that it replaces, and services that have a backend of their own.
//!
//! The command line fills an `UpstreamConfig`; `backend` acts on it. What is secret in here is
//! never printed, neither by `Debug` nor in an error.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use http::{HeaderName, HeaderValue};

use super::http_proxy::{HttpProxy, NoHttpProxy};
use crate::address::Address;

/// All of it. The default changes nothing.
#[derive(Clone, Debug, Default)]
pub struct UpstreamConfig {
    /// Headers of every call; each replaces the client's of the same name.
    pub headers: Vec<UpstreamHeader>,
    /// File that holds a bearer token.
    pub token_file: Option<PathBuf>,
    /// Programs that know the headers of hosts.
    pub credential_helpers: Vec<HelperRule>,
    /// Instance names to replace.
    pub instances: Vec<InstanceRule>,
    /// What stands between this machine and upstreams on others.
    pub http_proxy: Option<HttpProxy>,
    /// Backend of `Execution` and `Operations`, if it is another than the upstream.
    pub execution: Option<Address>,
    /// Backend of `ActionCache`, if it is another than the upstream.
    pub action_cache: Option<Address>,
    /// Backend of the CAS, `ByteStream` and `LocalContentAddressableStorage`, if it is another
    /// than the upstream.
    pub cas: Option<Address>,
}

/// Why what is to be done on the way upstream cannot be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpstreamConfigError {
    /// A header cannot be sent.
    #[error("--upstream-header: {0}")]
    Header(#[from] HeaderError),
    /// A proxy cannot be asked.
    #[error("--upstream-proxy: {0}, or none")]
    HttpProxy(#[from] NoHttpProxy),
    /// Two rules say what to make of one instance.
    #[error("--map-instance: {0} is mapped twice; leave one of the two out")]
    InstanceTwice(Instances),
    /// There is nobody who would look at it.
    #[error(
        "{0} has no effect: calls go to the embedded backend, within primed; name the backend with \
         --upstream"
    )]
    Embedded(&'static str),
}

impl UpstreamConfig {
    /// Refuses rules that contradict each other.
    ///
    /// # Errors
    /// `InstanceTwice`.
    pub fn check(&self) -> Result<(), UpstreamConfigError> {
        let mut seen = HashSet::new();
        match self.instances.iter().find(|rule| !seen.insert(&rule.from)) {
            Some(rule) => Err(UpstreamConfigError::InstanceTwice(rule.from.clone())),
            None => Ok(()),
        }
    }

    /// Refuses what makes no sense on the way to the embedded backend.
    ///
    /// # Errors
    /// `Embedded`.
    pub fn refuse_embedded(&self) -> Result<(), UpstreamConfigError> {
        let set = [
            ("--upstream-header", !self.headers.is_empty()),
            ("--upstream-token-file", self.token_file.is_some()),
            ("--credential-helper", !self.credential_helpers.is_empty()),
        ];
        let set = set
            .into_iter()
            .filter_map(|(flag, set)| set.then_some(flag));
        match set.chain(self.endpoints().map(|(flag, _)| flag)).next() {
            Some(flag) => Err(UpstreamConfigError::Embedded(flag)),
            None => Ok(()),
        }
    }

    /// Backends of single services, by the flag that names them.
    pub fn endpoints(&self) -> impl Iterator<Item = (&'static str, &Address)> {
        [
            ("--execution-upstream", &self.execution),
            ("--action-cache-upstream", &self.action_cache),
            ("--cas-upstream", &self.cas),
        ]
        .into_iter()
        .filter_map(|(flag, address)| Some((flag, address.as_ref()?)))
    }

    /// The program that knows the headers of `host`, `None` for a Unix socket. As in Bazel, the
    /// host itself goes before a pattern, a longer pattern before a shorter one, and a later rule
    /// before an earlier one that is the same.
    pub fn credential_helper(&self, host: Option<&str>) -> Option<&Path> {
        let applying = self.credential_helpers.iter().filter_map(|rule| {
            let precedence = rule.hosts.precedence(host)?;
            Some((precedence, rule.program.as_path()))
        });
        let (_, program) = applying.max_by_key(|(precedence, _)| *precedence)?;
        Some(program)
    }
}

/// A header that primed may add to a call. Its value counts as secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamHeader {
    /// Lower case.
    pub name: HeaderName,
    /// Marked as sensitive.
    pub value: HeaderValue,
}

/// Why something is no header for the upstream. Never says the value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// There is no separator.
    #[error("there is neither ':' nor '=' in it; write NAME: VALUE or NAME=VALUE")]
    NoSeparator,
    /// The name is no name in gRPC.
    #[error(
        "'{0}' is not a header name; gRPC allows letters, digits, '-', '_' and '.' (a name with \
         ':' in front is HTTP/2's own)"
    )]
    Name(String),
    /// The name is not for users to set.
    #[error("'{0}' belongs to gRPC or to the connection, and cannot be set")]
    Reserved(HeaderName),
    /// The value is not what HTTP allows.
    #[error("the value of '{0}' may hold visible ASCII characters and spaces only")]
    Value(HeaderName),
    /// The value of a `-bin` header is not encoded.
    #[error("the value of '{0}' must be base64, because the name ends in -bin: `base64 -w0 FILE`")]
    Binary(HeaderName),
}

impl UpstreamHeader {
    /// A header, if it can be sent.
    ///
    /// # Errors
    /// `HeaderError`, with what is wrong.
    pub fn new(name: &str, value: &str) -> Result<Self, HeaderError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let name = HeaderName::from_bytes(name.as_bytes())
            .ok()
            .filter(|_| name.bytes().all(allowed))
            .ok_or_else(|| HeaderError::Name(name.to_owned()))?;
        if is_reserved(name.as_str()) {
            return Err(HeaderError::Reserved(name));
        }
        let ascii = |byte: u8| matches!(byte, b' '..=b'~');
        let mut value = HeaderValue::from_str(value)
            .ok()
            .filter(|_| value.bytes().all(ascii))
            .ok_or_else(|| HeaderError::Value(name.clone()))?;
        if name.as_str().ends_with("-bin") && !is_base64(value.as_bytes()) {
            return Err(HeaderError::Binary(name));
        }
        value.set_sensitive(true);
        Ok(UpstreamHeader { name, value })
    }
}

impl FromStr for UpstreamHeader {
    type Err = HeaderError;

    /// `NAME: VALUE`, or `NAME=VALUE` as Bazel writes it. No name has either character in it, so
    /// the first one of the two separates.
    fn from_str(text: &str) -> Result<Self, HeaderError> {
        let (name, value) = text
            .split_once([':', '='])
            .ok_or(HeaderError::NoSeparator)?;
        UpstreamHeader::new(name.trim(), value.trim())
    }
}

fn is_reserved(name: &str) -> bool {
    const RESERVED: [&str; 10] = [
        "connection",
        "content-length",
        "content-type",
        "host",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    name.starts_with("grpc-") || RESERVED.contains(&name)
}

/// gRPC lets senders pad or not.
fn is_base64(value: &[u8]) -> bool {
    let unpadded = value.trim_ascii_end();
    let unpadded = unpadded
        .strip_suffix(b"==")
        .or(unpadded.strip_suffix(b"="))
        .unwrap_or(unpadded);
    STANDARD_NO_PAD.decode(unpadded).is_ok()
}

/// `PROGRAM`, or `HOSTS=PROGRAM`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelperRule {
    hosts: Hosts,
    program: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Hosts {
    Any,
    /// One host, in lower case.
    Exactly(String),
    /// A domain and all below it, in lower case.
    Within(String),
}

impl Hosts {
    /// How closely this describes `host`; `None` if it does not.
    fn precedence(&self, host: Option<&str>) -> Option<usize> {
        let host = host.map(str::to_ascii_lowercase);
        match (self, host.as_deref()) {
            (Hosts::Any, _) => Some(0),
            (Hosts::Exactly(exactly), Some(host)) => (exactly == host).then_some(usize::MAX),
            (Hosts::Within(domain), Some(host)) => host
                .strip_suffix(domain.as_str())
                .is_some_and(|before| before.is_empty() || before.ends_with('.'))
                .then_some(domain.len()),
            (_, None) => None,
        }
    }
}

/// Why a text names no credential helper.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}; write PROGRAM, HOST=PROGRAM or *.DOMAIN=PROGRAM")]
pub struct HelperRuleError(&'static str);

impl FromStr for HelperRule {
    type Err = HelperRuleError;

    fn from_str(text: &str) -> Result<Self, HelperRuleError> {
        let (hosts, program) = match text.split_once('=') {
            // A program whose path holds '='.
            Some((hosts, _)) if hosts.contains('/') => (None, text),
            Some((hosts, program)) => (Some(hosts), program),
            None => (None, text),
        };
        if program.is_empty() {
            return Err(HelperRuleError("the program is missing"));
        }
        let hosts = match hosts.map(str::to_ascii_lowercase) {
            None => Hosts::Any,
            Some(host) => {
                let (domain, within) = match host.strip_prefix("*.") {
                    Some(domain) => (domain, true),
                    None => (host.as_str(), false),
                };
                let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
                if domain.is_empty() || !domain.bytes().all(allowed) {
                    return Err(HelperRuleError(
                        "what stands before '=' is no host name (without port), nor '*.' and one",
                    ));
                }
                match within {
                    true => Hosts::Within(domain.to_owned()),
                    false => Hosts::Exactly(domain.to_owned()),
                }
            }
        };
        Ok(HelperRule {
            hosts,
            program: program.into(),
        })
    }
}

/// `FROM=TO`: calls for the instance FROM go to the instance TO of the upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceRule {
    /// The client's name for it.
    pub from: Instances,
    /// The upstream's name for it.
    pub to: String,
}

/// Which instances a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Instances {
    /// Every one that has no rule of its own, the unnamed one included.
    All,
    /// The one of this name, which may be empty.
    Named(String),
}

impl std::fmt::Display for Instances {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Instances::All => f.write_str("'*'"),
            Instances::Named(name) if name.is_empty() => f.write_str("the unnamed instance"),
            Instances::Named(name) => write!(f, "'{name}'"),
        }
    }
}

/// Why a text does not map an instance.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}; write FROM=TO, where either may be empty and FROM may be '*' for all")]
pub struct InstanceRuleError(&'static str);

impl FromStr for InstanceRule {
    type Err = InstanceRuleError;

    fn from_str(text: &str) -> Result<Self, InstanceRuleError> {
        let (from, to) = text
            .split_once('=')
            .ok_or(InstanceRuleError("there is no '=' in it"))?;
        Ok(InstanceRule {
            from: match from {
                "*" => Instances::All,
                name => Instances::Named(instance_name(name)?),
            },
            to: instance_name(to)?,
        })
    }
}

/// REAPI, "ByteStream": an instance name may have several segments, none of which may be one of
/// the words that follow it in resource names.
fn instance_name(name: &str) -> Result<String, InstanceRuleError> {
    const WORDS: [&str; 7] = [
        "actionResults",
        "actions",
        "blobs",
        "capabilities",
        "compressed-blobs",
        "operations",
        "uploads",
    ];
    if name.contains(['*', '=']) {
        return Err(InstanceRuleError(
            "an instance name has neither '*' nor '=' in it",
        ));
    }
    if name.split('/').any(|segment| WORDS.contains(&segment)) {
        return Err(InstanceRuleError(
            "no segment of an instance name may be a word of resource names, such as 'blobs'",
        ));
    }
    if !name.is_empty() && name.split('/').any(str::is_empty) {
        return Err(InstanceRuleError(
            "an instance name has no '/' at its ends, and no two in a row",
        ));
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(text: &str) -> Result<(String, String), HeaderError> {
        let header: UpstreamHeader = text.parse()?;
        assert!(header.value.is_sensitive());
        let value = header.value.to_str().unwrap().to_owned();
        Ok((header.name.to_string(), value))
    }

    #[test]
    fn a_header_is_read_in_both_forms() {
        for (text, name, value) in [
            ("x-key: secret", "x-key", "secret"),
            ("X-Key:secret", "x-key", "secret"),
            ("x-key=secret", "x-key", "secret"),
            (
                "authorization: Bearer a=b:c",
                "authorization",
                "Bearer a=b:c",
            ),
            ("authorization=Basic dTpw", "authorization", "Basic dTpw"),
            ("x-empty:", "x-empty", ""),
            ("x.dotted_key-1=1", "x.dotted_key-1", "1"),
            ("x-blob-bin: AAE=", "x-blob-bin", "AAE="),
            ("x-blob-bin: AAE", "x-blob-bin", "AAE"),
        ] {
            let expected = Ok((name.to_owned(), value.to_owned()));
            assert_eq!(header(text), expected, "{text}");
        }
    }

    #[test]
    fn a_header_that_cannot_be_sent_is_refused_and_its_value_not_said() {
        for (text, reason) in [
            ("s3cret", "neither"),
            (":path: s3cret", "HTTP/2's own"),
            ("x y: s3cret", "not a header name"),
            ("x!: s3cret", "not a header name"),
            ("grpc-timeout: s3cret", "belongs to gRPC"),
            ("Te: s3cret", "belongs to gRPC"),
            ("content-type: s3cret", "belongs to gRPC"),
            ("x: s3cret\u{7f}", "visible ASCII"),
            ("x: s3cret ü", "visible ASCII"),
            ("x-bin: s3cret!", "base64"),
        ] {
            let error = header(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
            assert!(!error.contains("s3cret"), "{text}: {error}");
        }
        let header: UpstreamHeader = "x-key: s3cret".parse().unwrap();
        assert!(!format!("{header:?}").contains("s3cret"));
    }

    #[test]
    fn the_closest_rule_names_the_credential_helper_of_a_host() {
        let config = UpstreamConfig {
            credential_helpers: [
                "/bin/any",
                "*.example.com=/bin/domain",
                "*.build.example.com=/bin/subdomain",
                "cas.build.example.com=/bin/first",
                "CAS.build.example.com=/bin/host",
                "other.org=in-path",
            ]
            .map(|text| text.parse().unwrap())
            .into(),
            ..UpstreamConfig::default()
        };
        for (host, program) in [
            (Some("cas.build.example.com"), "/bin/host"),
            (Some("x.build.example.com"), "/bin/subdomain"),
            (Some("build.example.com"), "/bin/subdomain"),
            (Some("a.b.Example.com"), "/bin/domain"),
            (Some("badexample.com"), "/bin/any"),
            (Some("x.other.org"), "/bin/any"),
            (Some("other.org"), "in-path"),
            (None, "/bin/any"),
        ] {
            let found = config.credential_helper(host);
            assert_eq!(found, Some(Path::new(program)), "{host:?}");
        }
    }

    #[test]
    fn what_names_no_credential_helper_is_refused() {
        for text in ["", "host=", "*=x", "a.*.b=x", "host:443=x", "=x"] {
            let error = text.parse::<HelperRule>().unwrap_err().to_string();
            assert!(error.contains("HOST=PROGRAM"), "{text}: {error}");
        }
        let odd: HelperRule = "/opt/a=b".parse().unwrap();
        assert_eq!(odd.program, Path::new("/opt/a=b"));
    }

    #[test]
    fn instance_rules_are_read_and_nonsense_refused() {
        let named = |name: &str| Instances::Named(name.to_owned());
        for (text, from, to) in [
            ("a=b", named("a"), "b"),
            ("=main", named(""), "main"),
            ("main=", named("main"), ""),
            ("*=a/b", Instances::All, "a/b"),
        ] {
            let to = to.to_owned();
            assert_eq!(text.parse(), Ok(InstanceRule { from, to }), "{text}");
        }
        for text in [
            "",
            "a",
            "a=*",
            "a*=b",
            "a=b=c",
            "a/blobs=b",
            "a=/b",
            "a//b=c",
        ] {
            let error = text.parse::<InstanceRule>().unwrap_err().to_string();
            assert!(error.contains("FROM=TO"), "{text}: {error}");
        }
    }

    #[test]
    fn an_instance_that_is_mapped_twice_is_refused() {
        let mut config = UpstreamConfig {
            instances: ["a=b", "=b", "*=c"]
                .map(|text| text.parse().unwrap())
                .into(),
            ..UpstreamConfig::default()
        };
        assert_eq!(config.check(), Ok(()));
        config.instances.push("=d".parse().unwrap());
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains("the unnamed instance"), "{error}");
    }
}
