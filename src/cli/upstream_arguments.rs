//! The flags of `primed serve` that say what happens to calls on their way upstream.

use std::convert::Infallible;
use std::path::PathBuf;

use clap::Args;

use super::{Failure, exit_codes};
use crate::address::Address;
use crate::backend::credentials::Credentials;
use crate::backend::endpoints::Endpoints;
use crate::config::Environment;
use crate::config::http_proxy::HttpProxy;
use crate::config::upstream::{
    HeaderError, HelperRule, InstanceRule, UpstreamConfig, UpstreamConfigError, UpstreamHeader,
};

/// A header, or what is wrong with it: the parser of arguments would print its value otherwise.
type HeaderArgument = Option<Result<UpstreamHeader, HeaderError>>;

#[derive(Debug, Args)]
#[command(next_help_heading = "Calls on their way upstream")]
pub(super) struct UpstreamArguments {
    /// Header for every call, instead of the client's own of that name: "NAME: VALUE" or
    /// NAME=VALUE, in base64 if NAME ends in -bin. May be given several times; in the variable,
    /// one a line.
    #[arg(
        long,
        env = "PRIMED_UPSTREAM_HEADER",
        hide_env_values = true,
        value_name = "HEADER",
        value_delimiter = '\n',
        value_parser = header
    )]
    upstream_header: Vec<HeaderArgument>,
    /// File with a token that is sent as "authorization: Bearer TOKEN"; read again when it
    /// changes.
    #[arg(long, env = "PRIMED_UPSTREAM_TOKEN_FILE", value_name = "FILE")]
    upstream_token_file: Option<PathBuf>,
    /// Program that knows the headers of a host, by Bazel's credential helper protocol: PROGRAM
    /// for all hosts, HOST=PROGRAM or *.DOMAIN=PROGRAM. May be given several times, or with
    /// commas between; the closest counts.
    #[arg(
        long,
        env = "PRIMED_CREDENTIAL_HELPER",
        value_name = "[HOST=]PROGRAM",
        value_delimiter = ','
    )]
    credential_helper: Vec<HelperRule>,
    /// Send calls for the instance FROM to the instance TO. Either may be empty, which is the
    /// unnamed instance; FROM may be * for all others. May be given several times, or with commas
    /// between.
    #[arg(
        long,
        env = "PRIMED_MAP_INSTANCE",
        value_name = "FROM=TO",
        value_delimiter = ','
    )]
    map_instance: Vec<InstanceRule>,
    /// HTTP proxy by which upstreams on other machines are reached (http://HOST:PORT), or none
    /// [default: $grpc_proxy, $https_proxy or $http_proxy, but for what $no_grpc_proxy or $no_proxy
    /// names].
    #[arg(
        long,
        env = "PRIMED_UPSTREAM_PROXY",
        hide_env_values = true,
        value_name = "URL"
    )]
    upstream_proxy: Option<String>,
    /// Backend of Execution and Operations [default: that of --upstream].
    #[arg(long, env = "PRIMED_EXECUTION_UPSTREAM", value_name = "ADDR")]
    execution_upstream: Option<Address>,
    /// Backend of ActionCache [default: that of --upstream].
    #[arg(long, env = "PRIMED_ACTION_CACHE_UPSTREAM", value_name = "ADDR")]
    action_cache_upstream: Option<Address>,
    /// Backend of ContentAddressableStorage and ByteStream [default: that of --upstream].
    #[arg(long, env = "PRIMED_CAS_UPSTREAM", value_name = "ADDR")]
    cas_upstream: Option<Address>,
}

/// A blank line in the variable is none.
fn header(text: &str) -> Result<HeaderArgument, Infallible> {
    Ok((!text.trim().is_empty()).then(|| text.parse()))
}

impl UpstreamArguments {
    pub(super) fn resolve(
        self,
        upstream: &Address,
        environment: &Environment,
    ) -> Result<UpstreamConfig, Failure> {
        let usage = |error: &dyn std::error::Error| Failure::new(exit_codes::USAGE, error);
        let headers: Result<_, HeaderError> = self.upstream_header.into_iter().flatten().collect();
        let http_proxy = match self.upstream_proxy.as_deref() {
            None => environment.http_proxy(),
            Some("none") => None,
            Some(url) => {
                let proxy = HttpProxy::new(url, "");
                Some(proxy.map_err(|error| usage(&UpstreamConfigError::from(error)))?)
            }
        };
        let config = UpstreamConfig {
            http_proxy,
            headers: headers.map_err(|error| usage(&UpstreamConfigError::from(error)))?,
            token_file: self.upstream_token_file,
            credential_helpers: self.credential_helper,
            instances: self.map_instance,
            execution: self.execution_upstream,
            action_cache: self.action_cache_upstream,
            cas: self.cas_upstream,
        };
        for address in Endpoints::new(upstream, &config).addresses() {
            Credentials::new(&config, address).map_err(|error| usage(&error))?;
        }
        Ok(config)
    }
}
