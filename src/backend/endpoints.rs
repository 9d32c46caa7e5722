//! Which backend a call goes to: some clusters serve execution, action cache and CAS at addresses
//! of their own. The path of a call decides, whoever makes it.

use crate::address::Address;
use crate::config::upstream::UpstreamConfig;

/// Services that one backend serves together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `Execution`, and the `Operations` that it begins.
    Execution,
    /// `ActionCache`.
    ActionCache,
    /// `ContentAddressableStorage`, `ByteStream`, and casd's `LocalContentAddressableStorage`.
    Cas,
    /// All others. `Capabilities` is among them: what `--upstream` says of itself counts.
    Rest,
}

impl Endpoint {
    /// The endpoint that serves the method at `path` (`/SERVICE/METHOD`).
    fn of_path(path: &str) -> Self {
        let service = path
            .strip_prefix('/')
            .and_then(|path| path.split_once('/'))
            .map(|(service, _)| service);
        match service {
            Some("build.bazel.remote.execution.v2.Execution" | "google.longrunning.Operations") => {
                Endpoint::Execution
            }
            Some("build.bazel.remote.execution.v2.ActionCache") => Endpoint::ActionCache,
            Some(
                "build.bazel.remote.execution.v2.ContentAddressableStorage"
                | "google.bytestream.ByteStream"
                | "build.buildgrid.LocalContentAddressableStorage",
            ) => Endpoint::Cas,
            _ => Endpoint::Rest,
        }
    }
}

/// Where each endpoint is.
#[derive(Clone, Debug)]
pub struct Endpoints {
    /// Each address once, so that endpoints at the same one share connections.
    addresses: Vec<Address>,
    /// For each `Endpoint`, in its order, where its address stands in `addresses`.
    places: [usize; 4],
}

impl Endpoints {
    /// `upstream` serves whatever `config` names no other address for.
    pub fn new(upstream: &Address, config: &UpstreamConfig) -> Self {
        let mut addresses = vec![upstream.clone()];
        let named = [&config.execution, &config.action_cache, &config.cas, &None];
        let places = named.map(|address| {
            let Some(address) = address else { return 0 };
            let known = addresses.iter().position(|known| known == address);
            known.unwrap_or_else(|| {
                addresses.push(address.clone());
                addresses.len() - 1
            })
        });
        Endpoints { addresses, places }
    }

    /// The distinct addresses; the first one is `--upstream`.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Where the address of `endpoint` stands in `addresses`.
    pub fn index(&self, endpoint: Endpoint) -> usize {
        self.places[endpoint as usize]
    }

    /// Where the address of what serves the method at `path` stands in `addresses`.
    pub fn index_of(&self, path: &str) -> usize {
        match self.addresses.len() {
            1 => 0,
            _ => self.index(Endpoint::of_path(path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Endpoints {
        fn address(&self, endpoint: Endpoint) -> &Address {
            &self.addresses[self.index(endpoint)]
        }
    }

    #[test]
    fn a_path_names_its_endpoint_by_its_whole_service() {
        for (path, endpoint) in [
            (
                "/build.bazel.remote.execution.v2.Execution/Execute",
                Endpoint::Execution,
            ),
            (
                "/build.bazel.remote.execution.v2.Execution/WaitExecution",
                Endpoint::Execution,
            ),
            (
                "/google.longrunning.Operations/CancelOperation",
                Endpoint::Execution,
            ),
            (
                "/build.bazel.remote.execution.v2.ActionCache/GetActionResult",
                Endpoint::ActionCache,
            ),
            (
                "/build.bazel.remote.execution.v2.ContentAddressableStorage/GetTree",
                Endpoint::Cas,
            ),
            ("/google.bytestream.ByteStream/Write", Endpoint::Cas),
            (
                "/build.buildgrid.LocalContentAddressableStorage/StageTree",
                Endpoint::Cas,
            ),
            (
                "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities",
                Endpoint::Rest,
            ),
            (
                "/build.bazel.remote.asset.v1.Fetch/FetchBlob",
                Endpoint::Rest,
            ),
            ("/google.bytestream.ByteStreams/Write", Endpoint::Rest),
            ("/my.google.bytestream.ByteStream/Write", Endpoint::Rest),
            ("google.bytestream.ByteStream/Write", Endpoint::Rest),
            ("/", Endpoint::Rest),
            ("*", Endpoint::Rest),
        ] {
            assert_eq!(Endpoint::of_path(path), endpoint, "{path}");
        }
    }

    #[test]
    fn equal_addresses_are_listed_once() {
        let address = |text: &str| text.parse::<Address>().unwrap();
        let config = UpstreamConfig {
            execution: Some(address("unix:/b")),
            action_cache: Some(address("unix:/a")),
            cas: Some(address("unix:///b")),
            ..UpstreamConfig::default()
        };
        let endpoints = Endpoints::new(&address("unix:/a"), &config);
        assert_eq!(
            endpoints.addresses(),
            [address("unix:/a"), address("unix:/b")]
        );
        assert_eq!(endpoints.index(Endpoint::Execution), 1);
        assert_eq!(endpoints.index(Endpoint::ActionCache), 0);
        assert_eq!(endpoints.address(Endpoint::Cas), &address("unix:/b"));
        assert_eq!(endpoints.address(Endpoint::Rest), &address("unix:/a"));
        assert_eq!(endpoints.index_of("/google.bytestream.ByteStream/Read"), 1);
        assert_eq!(endpoints.index_of("/a.Service/Method"), 0);
    }

    #[test]
    fn without_addresses_of_their_own_all_are_at_the_upstream() {
        let upstream = "unix:/a".parse().unwrap();
        let endpoints = Endpoints::new(&upstream, &UpstreamConfig::default());
        assert_eq!(endpoints.addresses(), std::slice::from_ref(&upstream));
        for endpoint in [
            Endpoint::Execution,
            Endpoint::ActionCache,
            Endpoint::Cas,
            Endpoint::Rest,
        ] {
            assert_eq!(endpoints.address(endpoint), &upstream);
        }
    }
}
