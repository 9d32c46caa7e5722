//! Whether predictions were of use: for each recorded action, how many executions of it ahead of time
//! in a row nobody has used. By this `worth` decides what is retired. The actions are named by what
//! stays the same when their inputs change, and counted within their parent.
//!
//! A result that one build leaves unused may serve the next, which takes up where the first has
//! failed. So it is only at the end of the next build of its parent that it counts as wasted.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::speculation::flights::record::{Course, FlightRecord};
use crate::speculation::records::parent::{BaseAction, WeakKey};
use crate::speculation::records::prediction::{Prediction, Wasted};
use crate::speculation::records::store::Store;

/// So many wasted executions in a row retire a prediction.
pub const RETIRES: u8 = 3;
/// Counts that are kept of one parent. If there are more, most are of actions that are long gone,
/// and all are forgotten.
const MAX_COUNTS: usize = 100_000;

/// The counts of all parents.
pub struct Uses {
    store: Arc<Store>,
    parents: Mutex<HashMap<WeakKey, ParentUses>>,
}

#[derive(Default)]
struct ParentUses {
    wasted: Arc<Wasted>,
    /// What the last build has not used.
    unused: Vec<(Prediction, Arc<FlightRecord>)>,
}

impl Uses {
    /// Those that `store` holds.
    pub fn of(store: Arc<Store>) -> Self {
        Uses {
            store,
            parents: Mutex::default(),
        }
    }

    /// The counts of one parent. Blocks.
    pub fn wasted(&self, parent: WeakKey) -> Arc<Wasted> {
        let mut parents = self.parents.lock();
        self.known(&mut parents, parent).wasted.clone()
    }

    /// Takes in what a build that has ended has used: of these parents, that was executed ahead of time as
    /// these recorded actions. Blocks.
    pub fn end_build<'a>(
        &self,
        parents: impl Iterator<Item = WeakKey>,
        flights: impl Iterator<Item = (WeakKey, &'a BaseAction, &'a Arc<FlightRecord>)>,
    ) {
        let mut by_parent: HashMap<WeakKey, Vec<(Prediction, Arc<FlightRecord>)>> = HashMap::new();
        for (parent, base, flight) in flights {
            if let Some(prediction) = Prediction::of(base) {
                let of_parent = by_parent.entry(parent).or_default();
                of_parent.push((prediction, flight.clone()));
            }
        }
        for parent in parents {
            by_parent.entry(parent).or_default();
        }
        for (parent, flights) in by_parent {
            self.end(parent, flights);
        }
    }

    fn end(&self, parent: WeakKey, flights: Vec<(Prediction, Arc<FlightRecord>)>) {
        let mut parents = self.parents.lock();
        let uses = self.known(&mut parents, parent);
        let mut wasted = Wasted::clone(&uses.wasted);
        for (prediction, flight) in std::mem::take(&mut uses.unused) {
            let flown = flight.flown();
            if flown.course == Course::Primed && flown.used_unix_ms.is_none() {
                let count = wasted.entry(prediction).or_default();
                *count = count.saturating_add(1);
            }
        }
        for (prediction, flight) in flights {
            if flight.flown().used_unix_ms.is_some() {
                wasted.remove(&prediction);
            } else {
                uses.unused.push((prediction, flight));
            }
        }
        self.keep(parent, uses, wasted);
    }

    /// A client asks for what was left out. It comes back, and with it all that were retired beside
    /// it: what made this one useful again has most likely done so for them, too. If one of these
    /// is wasted once more, it is retired again. Blocks.
    pub fn bring_back(&self, parent: WeakKey, prediction: Prediction) -> Arc<Wasted> {
        let mut parents = self.parents.lock();
        let uses = self.known(&mut parents, parent);
        let mut wasted = Wasted::clone(&uses.wasted);
        if wasted
            .remove(&prediction)
            .is_some_and(|count| count >= RETIRES)
        {
            for count in wasted.values_mut() {
                *count = (*count).min(RETIRES - 1);
            }
        }
        self.keep(parent, uses, wasted);
        uses.wasted.clone()
    }

    fn known<'a>(
        &self,
        parents: &'a mut HashMap<WeakKey, ParentUses>,
        parent: WeakKey,
    ) -> &'a mut ParentUses {
        parents.entry(parent).or_insert_with(|| {
            let wasted = self.store.wasted(parent).unwrap_or_else(|error| {
                tracing::warn!(%error, "it cannot be read what was wasted; nothing is retired");
                Wasted::new()
            });
            ParentUses {
                wasted: Arc::new(wasted),
                unused: Vec::new(),
            }
        })
    }

    fn keep(&self, parent: WeakKey, uses: &mut ParentUses, mut wasted: Wasted) {
        if wasted.len() > MAX_COUNTS {
            wasted.clear();
        }
        if *uses.wasted == wasted {
            return;
        }
        if let Err(error) = self.store.save_wasted(parent, &wasted) {
            tracing::warn!(%error, "what was wasted cannot be kept");
        }
        uses.wasted = Arc::new(wasted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cas::Digest;
    use crate::speculation::flights::Ending;
    use bytes::Bytes;

    const PARENT: WeakKey = WeakKey([1; 32]);
    const ONE: Prediction = Prediction([1; 32]);
    const OTHER: Prediction = Prediction([2; 32]);

    fn uses() -> Uses {
        Uses::of(Arc::new(Store::in_memory()))
    }

    fn primed() -> Arc<FlightRecord> {
        let flight = FlightRecord::announced(Digest::of(b"action"));
        flight.end(&Ending::Succeeded(Bytes::new()));
        Arc::new(flight)
    }

    fn count(uses: &Uses, prediction: Prediction) -> u8 {
        let wasted = uses.wasted(PARENT);
        wasted.get(&prediction).copied().unwrap_or(0)
    }

    #[test]
    fn what_the_next_build_uses_is_not_wasted() {
        let uses = uses();
        let (late, never) = (primed(), primed());
        uses.end(PARENT, vec![(ONE, late.clone()), (OTHER, never)]);
        assert_eq!((count(&uses, ONE), count(&uses, OTHER)), (0, 0));
        late.used(1);
        uses.end(PARENT, Vec::new());
        assert_eq!((count(&uses, ONE), count(&uses, OTHER)), (0, 1));
    }

    #[test]
    fn one_use_makes_up_for_all_that_was_wasted() {
        let uses = uses();
        for _ in 0..3 {
            uses.end(PARENT, vec![(ONE, primed())]);
        }
        assert_eq!(count(&uses, ONE), 2);
        let used = primed();
        used.used(1);
        uses.end(PARENT, vec![(ONE, used)]);
        assert_eq!(count(&uses, ONE), 0);
    }

    #[test]
    fn what_is_asked_for_comes_back_and_so_does_what_was_retired_beside_it() {
        let uses = uses();
        for _ in 0..=RETIRES {
            uses.end(PARENT, vec![(ONE, primed()), (OTHER, primed())]);
        }
        assert_eq!((count(&uses, ONE), count(&uses, OTHER)), (RETIRES, RETIRES));
        uses.bring_back(PARENT, ONE);
        assert_eq!((count(&uses, ONE), count(&uses, OTHER)), (0, RETIRES - 1));
    }

    #[test]
    fn counts_survive_a_restart() {
        let store = Arc::new(Store::in_memory());
        let uses = Uses::of(store.clone());
        uses.end(PARENT, vec![(ONE, primed())]);
        uses.end(PARENT, Vec::new());
        assert_eq!(count(&Uses::of(store), ONE), 1);
    }
}
