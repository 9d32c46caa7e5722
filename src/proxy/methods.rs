//! The names of the methods that are more than forwarded, and of those that primed calls itself for a
//! client.

pub const GET_ACTION_RESULT: &str = "/build.bazel.remote.execution.v2.ActionCache/GetActionResult";
pub const EXECUTE: &str = "/build.bazel.remote.execution.v2.Execution/Execute";
pub const WAIT_EXECUTION: &str = "/build.bazel.remote.execution.v2.Execution/WaitExecution";
pub const CANCEL_OPERATION: &str = "/google.longrunning.Operations/CancelOperation";
pub const FIND_MISSING_BLOBS: &str =
    "/build.bazel.remote.execution.v2.ContentAddressableStorage/FindMissingBlobs";
pub const BATCH_READ_BLOBS: &str =
    "/build.bazel.remote.execution.v2.ContentAddressableStorage/BatchReadBlobs";
pub const GET_CAPABILITIES: &str = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities";
pub const HEALTH_CHECK: &str = "/grpc.health.v1.Health/Check";
pub const HEALTH_WATCH: &str = "/grpc.health.v1.Health/Watch";
