//! Tests of the whole: primed as its users run it, with real recc, buildbox-casd and gRPC clients.

mod backend;
mod cli;
mod client;
mod conformance;
mod examples;
mod faults;
mod grpcio;
mod http2;
mod local_cas;
mod project;
mod protocol;
mod proxy;
mod rebuild;
mod support;
mod wire;
