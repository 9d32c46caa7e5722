//! Tests of the whole: primed as its users run it, with real recc and buildbox-casd.

mod cli;
mod grpcio;
mod project;
mod proxy;
mod rebuild;
mod support;
mod wire;
