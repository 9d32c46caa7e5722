//! The wall clock, for what people read and for the age of records. Logic uses `Instant`s that
//! it is given.

use std::time::{Duration, Instant, SystemTime};

/// Milliseconds since 1970.
pub fn now_unix_ms() -> i64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, signed_millis)
}

/// `time` in milliseconds.
pub fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn signed_millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// What both clocks showed at one time.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// The monotonic clock.
    pub instant: Instant,
    unix_ms: i64,
}

impl Moment {
    /// The present one.
    pub fn now() -> Self {
        Moment {
            instant: Instant::now(),
            unix_ms: now_unix_ms(),
        }
    }

    /// What the wall clock showed, or will, at a time near this one: milliseconds since 1970.
    pub fn unix_ms_at(&self, time: Instant) -> i64 {
        match time.checked_duration_since(self.instant) {
            Some(later) => self.unix_ms.saturating_add(signed_millis(later)),
            None => self
                .unix_ms
                .saturating_sub(signed_millis(self.instant - time)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wall_clock_is_told_for_times_before_and_after_a_moment() {
        let moment = Moment::now();
        let second = Duration::from_secs(1);
        let shown = moment.unix_ms_at(moment.instant);
        assert_eq!(moment.unix_ms_at(moment.instant + second), shown + 1000);
        assert_eq!(moment.unix_ms_at(moment.instant - second), shown - 1000);
        assert!((now_unix_ms() - shown).abs() < 1000 * 60);
    }
}
