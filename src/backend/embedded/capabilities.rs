//! What the embedded backend says of itself.

use tonic::{Request, Response, Status, async_trait};

use super::requests::MAX_BATCH;
use crate::digest::DigestFunction;
use crate::reapi::build::bazel::semver::SemVer;
use crate::reapi::capabilities_server::Capabilities;
use crate::reapi::{
    ActionCacheUpdateCapabilities, CacheCapabilities, ExecutionCapabilities,
    GetCapabilitiesRequest, PriorityCapabilities, ServerCapabilities, compressor,
    priority_capabilities::PriorityRange, symlink_absolute_path_strategy,
};

/// The service.
pub(super) struct CapabilitiesService;

/// The priorities that executions may have; a larger one is less urgent.
pub const PRIORITIES: std::ops::RangeInclusive<i32> = -100..=100;

#[async_trait]
impl Capabilities for CapabilitiesService {
    async fn get_capabilities(
        &self,
        _: Request<GetCapabilitiesRequest>,
    ) -> Result<Response<ServerCapabilities>, Status> {
        let functions = DigestFunction::ALL.map(DigestFunction::to_proto).to_vec();
        let zstd = vec![compressor::Value::Zstd as i32];
        let strategy = symlink_absolute_path_strategy::Value::Allowed;
        let priorities = PriorityCapabilities {
            priorities: vec![PriorityRange {
                min_priority: *PRIORITIES.start(),
                max_priority: *PRIORITIES.end(),
            }],
        };
        let version = |minor| SemVer {
            major: 2,
            minor,
            ..SemVer::default()
        };
        Ok(Response::new(ServerCapabilities {
            cache_capabilities: Some(CacheCapabilities {
                digest_functions: functions.clone(),
                action_cache_update_capabilities: Some(ActionCacheUpdateCapabilities {
                    update_enabled: true,
                }),
                max_batch_total_size_bytes: MAX_BATCH as i64,
                symlink_absolute_path_strategy: strategy as i32,
                supported_compressors: zstd.clone(),
                supported_batch_update_compressors: zstd,
                ..CacheCapabilities::default()
            }),
            execution_capabilities: Some(ExecutionCapabilities {
                digest_function: DigestFunction::default().to_proto(),
                exec_enabled: true,
                execution_priority_capabilities: Some(priorities),
                digest_functions: functions,
                supported_node_properties: ["mtime", "unix_mode"].map(str::to_owned).into(),
            }),
            low_api_version: Some(version(0)),
            high_api_version: Some(version(11)),
            ..ServerCapabilities::default()
        }))
    }
}
