//! The generated messages and stubs of the protocols that primed speaks, and nothing else.
//! The schemas stand in `proto/`; `build.rs` compiles them.

#![allow(missing_docs, clippy::all, rustdoc::all)]

pub use build::bazel::remote::execution::v2::*;

pub mod build {
    pub mod bazel {
        pub mod remote {
            pub mod execution {
                pub mod v2 {
                    tonic::include_proto!("build.bazel.remote.execution.v2");
                }
            }
        }
        pub mod semver {
            tonic::include_proto!("build.bazel.semver");
        }
    }
    pub mod buildgrid {
        tonic::include_proto!("build.buildgrid");
    }
}

pub mod buildstream {
    pub mod v2 {
        tonic::include_proto!("buildstream.v2");
    }
}

pub mod google {
    pub mod bytestream {
        tonic::include_proto!("google.bytestream");
    }
    pub mod longrunning {
        tonic::include_proto!("google.longrunning");
    }
    pub mod rpc {
        tonic::include_proto!("google.rpc");
    }
}

pub mod primed {
    pub mod store {
        pub mod v1 {
            tonic::include_proto!("primed.store.v1");
        }
    }
}
