//! Whether an adapted action is worth executing ahead of time, by what is known of it: how long it
//! took, and whether its predictions were of use.
//!
//! If it is used, the client is spared its time and what an execution takes anyway, the uploads and
//! the round trips. If it is not, the latter was spent in vain, and the former was time of workers
//! that had nothing better to do. So an action that is always used is worth it however short it is,
//! and one that may not be used must take the longer, the less likely that is.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::uses::RETIRES;
use crate::speculation::flights::left_out::LeftOut;
use crate::speculation::records::parent::{BaseAction, WeakKey};
use crate::speculation::records::prediction::{Prediction, Wasted};

/// What decides.
#[derive(Clone, Debug, Default)]
pub struct Worth {
    /// For each parent.
    pub wasted: HashMap<WeakKey, Arc<Wasted>>,
    /// What executing an action takes beside the worker's time.
    pub overhead: Duration,
}

impl Worth {
    /// How many executions of `base` in a row were wasted.
    pub fn wasted(&self, parent: WeakKey, base: &BaseAction) -> u8 {
        let of_parent = self.wasted.get(&parent);
        let of_parent = of_parent.filter(|wasted| !wasted.is_empty());
        let count = of_parent.and_then(|wasted| wasted.get(&Prediction::of(base)?));
        count.copied().unwrap_or(0)
    }

    /// Why an action is not executed for its own sake, if it is not. `recorded` is how long it took;
    /// zero if that is not known.
    pub fn judge(&self, wasted: u8, recorded: Duration) -> Option<LeftOut> {
        if wasted >= RETIRES {
            return Some(LeftOut::Retired(wasted));
        }
        let chance = 1.0 / f64::from(wasted + 1);
        let gain = (recorded + self.overhead).mul_f64(chance);
        let is_cheap = !recorded.is_zero() && gain < self.overhead;
        is_cheap.then_some(LeftOut::Cheap {
            recorded,
            overhead: self.overhead,
            wasted,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worth(overhead_ms: u64) -> Worth {
        Worth {
            overhead: Duration::from_millis(overhead_ms),
            ..Worth::default()
        }
    }

    fn is_cheap(overhead_ms: u64, wasted: u8, recorded_ms: u64) -> bool {
        let judged = worth(overhead_ms).judge(wasted, Duration::from_millis(recorded_ms));
        matches!(judged, Some(LeftOut::Cheap { .. }))
    }

    #[test]
    fn what_has_never_been_wasted_is_worth_it_however_short() {
        assert!(!is_cheap(5, 0, 20));
        assert!(!is_cheap(100, 0, 1));
    }

    #[test]
    fn what_may_be_wasted_must_take_longer_than_executing_it_costs() {
        assert!(is_cheap(20, 1, 19) && !is_cheap(20, 1, 21));
        assert!(is_cheap(20, 2, 39) && !is_cheap(20, 2, 41));
        assert!(!is_cheap(20, 2, 0), "it is not known how long it takes");
    }

    #[test]
    fn what_was_wasted_time_and_again_is_retired_however_long() {
        let judged = worth(1).judge(RETIRES, Duration::from_secs(100));
        assert_eq!(judged, Some(LeftOut::Retired(RETIRES)));
    }
}
