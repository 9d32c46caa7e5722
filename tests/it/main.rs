//! Tests of the whole: primed as its users run it, with real recc, buildbox-casd and gRPC clients.

mod abuse;
mod backend;
mod broken_upstream;
mod certificates;
mod cli;
mod client;
mod client_faults;
mod clients;
mod conformance;
mod elements;
mod examples;
mod frames;
mod grpcio;
mod http2;
mod listeners;
mod local_cas;
#[cfg(feature = "buildstream-tests")]
mod nested;
mod project;
mod protocol;
mod proxy;
mod rebuild;
mod records;
mod relay;
mod restart;
mod stage;
mod store_faults;
mod subactions;
mod support;
mod upstream_faults;
mod upstreams;
mod users;
mod wire;
