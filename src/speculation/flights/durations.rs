//! How long executions took, as their results say.

use std::time::Duration;

use prost_types::Timestamp;

use crate::reapi::{ActionResult, ExecutedActionMetadata};

/// How long a worker ran the action, if the result says so.
pub fn execution_time(result: &ActionResult) -> Option<Duration> {
    let metadata: &ExecutedActionMetadata = result.execution_metadata.as_ref()?;
    let started = metadata.execution_start_timestamp.as_ref()?;
    between(started, metadata.execution_completed_timestamp.as_ref()?)
}

/// How long it was from one time to a later one.
pub fn between(earlier: &Timestamp, later: &Timestamp) -> Option<Duration> {
    let nanos =
        |time: &Timestamp| i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
    let nanos = u64::try_from(nanos(later) - nanos(earlier));
    nanos.ok().map(Duration::from_nanos)
}
