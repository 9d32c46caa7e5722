//! Tests of the whole: primed as its users run it, with real recc, buildbox-casd and gRPC clients.

mod cli;
mod examples;
mod grpcio;
mod local_cas;
mod project;
mod proxy;
mod rebuild;
mod support;
mod wire;
