//! What primed counts since it began, for `--metrics`: plain atomics that anybody may add to and
//! nobody waits for. The process has one set of them, as it has one count of panics.
//!
//! Counts only grow. What a build was answered with stands in `speculation::accounting`; what is
//! there now, such as queues, is asked of whoever has it when somebody reads the page.

pub mod calls;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// All meters of this process.
pub static METERS: Meters = Meters::new();

/// See `METERS`.
#[derive(Debug)]
pub struct Meters {
    /// Calls of clients.
    pub calls: calls::Calls,
    /// Connections of clients.
    pub clients: Level,
    /// Builds that have ended.
    pub builds: Counter,
    /// Distinct actions that builds asked for.
    pub asked: Counter,
    /// Of these, answered from the action cache without primed's help.
    pub cached: Counter,
    /// Answered by a primed result.
    pub hit: Counter,
    /// Attached to a speculative execution.
    pub joined: Counter,
    /// Left to the client; counted when the build ends, for until then they may be joined.
    pub missed: Counter,
    /// Execution time that clients were spared.
    pub saved: Time,
    /// How long primed results had been there before they were used.
    pub lead: Histogram<9>,
    /// Speculative executions that brought a result.
    pub primed: Counter,
    /// Actions whose result was there already.
    pub found: Counter,
    /// Speculative executions with another exit code than 0.
    pub failed: Counter,
    /// What was planned, and not executed to its end.
    pub abandoned: Counter,
    /// Results of speculative executions that a client has had.
    pub used: Counter,
    /// Execution time of these.
    pub used_time: Time,
    /// Execution time of speculative executions.
    pub execution: Histogram<9>,
    /// Bytes that were added to the CAS by adaptation.
    pub added_bytes: Counter,
    /// Bytes of the inputs of builds that were recorded, each digest of a build once.
    pub input_bytes: Counter,
    /// How long recording and generation took after a build.
    pub generation: Histogram<9>,
    /// How long it took from a trigger until all that it made ready was submitted.
    pub submission: Histogram<9>,
    /// Recorded actions that could not be adapted, by reason.
    pub unadaptable: Reasons<8>,
    /// Predictions of builds that have ended which were not resolved, by reason.
    pub unresolved: Reasons<8>,
    /// Results that were primed for builds that have ended, and not used, by reason.
    pub unused: Reasons<8>,
    /// What the engine did not see, because it fell behind.
    pub dropped: Counter,
}

/// In seconds: from what cannot be noticed to what people go for lunch in.
const SECONDS: [f64; 9] = [0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0];

impl Meters {
    const fn new() -> Self {
        Meters {
            calls: calls::Calls::new(),
            clients: Level::new(),
            builds: Counter::new(),
            asked: Counter::new(),
            cached: Counter::new(),
            hit: Counter::new(),
            joined: Counter::new(),
            missed: Counter::new(),
            saved: Time::new(),
            lead: Histogram::new(SECONDS),
            primed: Counter::new(),
            found: Counter::new(),
            failed: Counter::new(),
            abandoned: Counter::new(),
            used: Counter::new(),
            used_time: Time::new(),
            execution: Histogram::new(SECONDS),
            added_bytes: Counter::new(),
            input_bytes: Counter::new(),
            generation: Histogram::new(SECONDS),
            submission: Histogram::new(SECONDS),
            unadaptable: Reasons::new(),
            unresolved: Reasons::new(),
            unused: Reasons::new(),
            dropped: Counter::new(),
        }
    }
}

/// A number that only grows.
#[derive(Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    const fn new() -> Self {
        Counter(AtomicU64::new(0))
    }

    /// Adds to it.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// What it has come to.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Time that adds up.
#[derive(Debug)]
pub struct Time(Counter);

impl Time {
    const fn new() -> Self {
        Time(Counter::new())
    }

    /// Adds to it.
    pub fn add(&self, time: Duration) {
        self.0
            .add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// What it has come to, in seconds.
    pub fn seconds(&self) -> f64 {
        Duration::from_nanos(self.0.get()).as_secs_f64()
    }
}

/// How many there have been, and how many of them are there now.
#[derive(Debug)]
pub struct Level {
    begun: Counter,
    ended: Counter,
}

/// One of a `Level`, which is gone when this is dropped.
#[derive(Debug)]
pub struct Present(&'static Level);

impl Level {
    const fn new() -> Self {
        Level {
            begun: Counter::new(),
            ended: Counter::new(),
        }
    }

    /// One more.
    pub fn enter(&'static self) -> Present {
        self.begun.add(1);
        Present(self)
    }

    /// How many there have been.
    pub fn begun(&self) -> u64 {
        self.begun.get()
    }

    /// How many there are.
    pub fn present(&self) -> u64 {
        // In this order, so that one that comes and goes meanwhile does not count as less than none.
        let ended = self.ended.get();
        self.begun.get().saturating_sub(ended)
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        self.0.ended.add(1);
    }
}

/// How many times took how long.
#[derive(Debug)]
pub struct Histogram<const N: usize> {
    bounds: [f64; N],
    /// For each bound, those up to it and above the one before.
    buckets: [Counter; N],
    longer: Counter,
    sum: Time,
}

/// A histogram as it was at one time.
#[derive(Clone, Debug, PartialEq)]
pub struct Distribution {
    /// All of it, in seconds.
    pub sum: f64,
    /// How many there were.
    pub count: u64,
    /// For each upper bound in seconds, those that it is the least one of; infinity comes last.
    pub buckets: Vec<(f64, u64)>,
}

impl<const N: usize> Histogram<N> {
    const fn new(bounds: [f64; N]) -> Self {
        Histogram {
            bounds,
            buckets: [const { Counter::new() }; N],
            longer: Counter::new(),
            sum: Time::new(),
        }
    }

    /// Adds one.
    pub fn add(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let bounded = self.bounds.iter().position(|bound| seconds <= *bound);
        bounded.map_or(&self.longer, |at| &self.buckets[at]).add(1);
        self.sum.add(time);
    }

    /// What it has come to.
    pub fn get(&self) -> Distribution {
        let counted = self.buckets.iter().chain([&self.longer]).map(Counter::get);
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(counted).collect();
        Distribution {
            sum: self.sum.seconds(),
            // Of what was read, so that the two agree whatever is added meanwhile.
            count: buckets.iter().map(|(_, count)| count).sum(),
            buckets,
        }
    }
}

/// A count for each of a few reasons, which come to be known by being counted.
#[derive(Debug)]
pub struct Reasons<const N: usize> {
    slots: [(std::sync::OnceLock<&'static str>, Counter); N],
}

impl<const N: usize> Reasons<N> {
    const fn new() -> Self {
        Reasons {
            slots: [const { (std::sync::OnceLock::new(), Counter::new()) }; N],
        }
    }

    /// Counts one for `reason`. Where there are too many, it counts for the last.
    pub fn add(&self, reason: &'static str, count: u64) {
        let is_its_own =
            |slot: &&(std::sync::OnceLock<_>, _)| *slot.0.get_or_init(|| reason) == reason;
        let slot = self.slots.iter().find(is_its_own).or(self.slots.last());
        if let Some((_, counter)) = slot {
            counter.add(count);
        }
    }

    /// What they have come to.
    pub fn get(&self) -> Vec<(&'static str, u64)> {
        let known = self.slots.iter();
        let known = known.filter_map(|(reason, counter)| Some((*reason.get()?, counter.get())));
        known.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_counts_for_the_least_bound_that_holds_it() {
        let histogram = Histogram::new([0.5, 1.0]);
        for milliseconds in [100, 500, 501, 9000] {
            histogram.add(Duration::from_millis(milliseconds));
        }
        let got = histogram.get();
        assert_eq!(got.buckets, [(0.5, 2), (1.0, 1), (f64::INFINITY, 1)]);
        assert_eq!(got.count, 4);
        assert!((got.sum - 10.101).abs() < 1e-9);
    }

    #[test]
    fn each_reason_has_a_count_of_its_own_as_long_as_there_is_room() {
        let reasons: Reasons<2> = Reasons::new();
        assert_eq!(reasons.get(), []);
        for reason in ["a", "b", "a", "c"] {
            reasons.add(reason, 1);
        }
        assert_eq!(reasons.get(), [("a", 2), ("b", 2)]);
    }

    #[test]
    fn who_is_there_counts_until_it_is_dropped() {
        static LEVEL: Level = Level::new();
        let one = LEVEL.enter();
        let two = LEVEL.enter();
        drop(one);
        assert_eq!((LEVEL.begun(), LEVEL.present()), (2, 1));
        drop(two);
        assert_eq!((LEVEL.begun(), LEVEL.present()), (2, 0));
    }
}
