//! Compiles the `.proto` files with protox, a compiler in Rust, so that no `protoc` is needed.

use std::error::Error;

const PROTOS: &[&str] = &[
    "proto/build/bazel/remote/execution/v2/remote_execution.proto",
    "proto/build/buildgrid/local_cas.proto",
    "proto/buildstream/v2/speculative_actions.proto",
    "proto/google/bytestream/bytestream.proto",
    "proto/google/longrunning/operations.proto",
    "proto/primed/store/v1/capabilities.proto",
    "proto/primed/store/v1/records.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    tonic_prost_build::configure()
        .bytes(".")
        .generate_default_stubs(true)
        .compile_fds(descriptors)?;
    Ok(())
}
