//! primed: a transparent proxy for the Remote Execution API that primes the action cache.
//!
//! It stands between build clients (recc, BuildStream, Bazel, …) and a backend (buildbox-casd, a
//! remote execution cluster), forwards every call unchanged, remembers what each build executed,
//! and executes ahead of time what the next build will ask for.
//!
//! Dependencies point downward in this list only.

pub mod cli;
pub mod server;

pub mod proxy;

pub mod speculation;

pub mod workspace;

pub mod cas;

pub mod backend;

pub mod reapi;

pub mod config;

pub mod local_socket;
pub mod stream;
pub mod tls;

pub mod address;
pub mod chunks;
pub mod clock;
pub mod digest;
pub mod grpc;
pub mod http2;
pub mod meters;
pub mod quick_map;
pub mod task;
pub mod whole_file;
