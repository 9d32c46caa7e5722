//! Tests of the whole: primed as its users run it, with real recc, buildbox-casd and gRPC clients.

mod backend;
mod certificates;
mod cli;
mod client;
mod examples;
mod faults;
mod grpcio;
mod listeners;
mod local_cas;
mod project;
mod protocol;
mod proxy;
mod rebuild;
mod support;
mod upstreams;
mod wire;
