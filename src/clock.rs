//! The wall clock, for what people read and for the age of records. Logic uses `Instant`s that
//! it is given.

use std::time::SystemTime;

/// Milliseconds since 1970.
pub fn now_unix_ms() -> i64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| {
            i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
        })
}
