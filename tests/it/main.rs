//! Tests of the whole: primed as its users run it, with real recc, buildbox-casd and gRPC clients.

mod abuse;
mod backend;
mod broken_upstream;
mod certificates;
mod cli;
mod client;
mod client_faults;
mod conformance;
mod examples;
mod frames;
mod grpcio;
mod http2;
mod listeners;
mod local_cas;
mod project;
mod protocol;
mod proxy;
mod rebuild;
mod relay;
mod restart;
mod stage;
mod store_faults;
mod support;
mod upstream_faults;
mod upstreams;
mod wire;
