//! The HTTP proxy that may stand between this machine and upstreams on others. gRPC's C-core, and
//! recc with it, goes by the same environment variables.

use std::sync::Arc;

use http::Uri;
use http::uri::Scheme;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};

use crate::address::Address;

/// Which upstreams are reached by which proxy.
#[derive(Clone, Debug)]
pub struct HttpProxy(Arc<Matcher>);

/// What is no address of such a proxy. It is not repeated, for there may be a password in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an HTTP proxy is written as http://HOST:PORT or http://USER:PASSWORD@HOST:PORT")]
pub struct NoHttpProxy;

impl HttpProxy {
    /// The proxy at `url` for all hosts but those in `not_for`: names (which stand for what is below
    /// them, too), addresses and networks, with commas between, or `*`.
    ///
    /// # Errors
    /// `NoHttpProxy`; one that is spoken to by TLS is none either.
    pub fn new(url: &str, not_for: &str) -> Result<Self, NoHttpProxy> {
        let build = |not_for: &str| Matcher::builder().all(url).no(not_for).build();
        let any = build("").intercept(&Uri::from_static("http://any/"));
        match any {
            Some(proxy) if proxy.uri().scheme() == Some(&Scheme::HTTP) => {
                Ok(HttpProxy(Arc::new(build(not_for))))
            }
            _ => Err(NoHttpProxy),
        }
    }

    /// The proxy on the way to `address`, which is on another machine.
    pub fn on_the_way_to(&self, address: &Address) -> Option<Intercept> {
        if address.is_on_this_machine() {
            return None;
        }
        let uri = Uri::builder()
            .scheme(Scheme::HTTP)
            .authority(address.authority()?)
            .path_and_query("/");
        self.0.intercept(&uri.build().ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_is_for_all_that_is_on_other_machines_and_not_left_out() {
        let proxy = HttpProxy::new("http://me:secret@proxy:3128", "lan, 10.0.0.0/8").unwrap();
        let to = |address: &str| {
            let proxy = proxy.on_the_way_to(&address.parse().unwrap())?;
            Some(proxy.uri().to_string())
        };
        for address in [
            "cluster:8980",
            "grpcs://cluster.example",
            "[2001:db8::1]:80",
        ] {
            assert_eq!(
                to(address).as_deref(),
                Some("http://proxy:3128/"),
                "{address}"
            );
        }
        for address in [
            "build.lan:1",
            "10.1.2.3:1",
            "localhost:1",
            "[::1]:1",
            "unix:/casd",
        ] {
            assert_eq!(to(address), None, "{address}");
        }
        assert!(!format!("{proxy:?}").contains("secret"));
    }

    #[test]
    fn what_is_no_http_proxy_is_refused() {
        assert!(HttpProxy::new("proxy:3128", "").is_ok());
        for url in [
            "",
            "https://proxy:3128",
            "socks5://proxy:1080",
            "http://",
            "a proxy",
        ] {
            assert_eq!(HttpProxy::new(url, "").err(), Some(NoHttpProxy), "{url}");
        }
    }
}
