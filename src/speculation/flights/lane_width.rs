//! How wide the lane is: how many speculative executions the backend may have at once, from how long
//! executions wait there. Pure: it knows no clock but the times that it is told.
//!
//! A backend with a fixed number of slots that ignores priorities (buildbox-casd) makes clients wait
//! behind whatever primed gave it first, so primed itself must find out how many slots there are and
//! stay below. What an execution was made to wait shows that without comparing clocks: all of its
//! time less what the worker took, less what a call takes anyway. Whoever had to wait began when
//! those before it, less those that had ended by then, filled the backend: so many slots there are.
//! Whoever did not wait shows that there are at least as many as were under way.
//!
//! As long as nobody had to wait it is known only how many at once have had no need to: these are
//! proven. Beyond them the lane tries its way, at most to the double, and only while clients
//! execute nothing. Once somebody had to wait, the lane leaves one slot free for the next client, and
//! widens step by step, ever more slowly where that is in vain.
//!
//! What is under way beyond the slots, or beyond what is proven, is in the way of the client that
//! comes then: `excess` says how much of it there is.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::durations::{between, execution_time};
use crate::reapi::ActionResult;

/// How many executions the lane begins with before a backend of which nothing is known, at least,
const BEGINNING: usize = 8;
/// and as a part of how many it may be.
const BEGINNING_SHARE: usize = 8;
/// How many times as many executions as are proven the lane tries.
const TRIES: usize = 2;
/// Executions that are remembered as witnesses of what the backend runs at once.
const WITNESSES: usize = 512;
/// Comings and goings that are remembered: of those that end while one execution waits.
const REMEMBERED: usize = 4096;
/// A shorter wait may be the backend's pace.
const SHORTEST_WAIT: Duration = Duration::from_millis(50);
/// A wait is one if it took this part of the execution, too.
const WAIT_SHARE: u32 = 3;
/// Who waited for no more than this part of its execution had a slot at once.
const NO_WAIT_SHARE: u32 = 20;
/// How much of the lane stays, whatever is seen, by the number of executions that have waited of
/// late: one may have been unlucky, but not all of them.
const STAYS: [f64; 5] = [1.0, 1.0, 0.7, 0.5, 0.0];
/// Executions without a wait after which a lane that was too wide widens again, at most.
const MAX_PATIENCE: usize = 32;
/// Whoever executes actions itself will most likely do so again within this time: its share is kept.
const LINGERS: Duration = Duration::from_millis(500);
/// The same when something had to give way of late: such clients come in waves,
const LINGERS_LONGER: Duration = Duration::from_secs(2);
/// and of late is within this time.
const OF_LATE: Duration = Duration::from_secs(30);
/// What a call takes beside the execution is known by the quickest of late; it may have become more
/// by this part with each execution that had the backend to itself.
const DRIFT: u32 = 50;

/// How wide the lane is, and what it is reckoned from.
#[derive(Debug)]
pub struct LaneWidth {
    most: usize,
    /// How many executions the backend runs at once; `None` as long as none had to wait.
    slots: Option<f64>,
    /// How many at once have been seen of which none had to wait.
    proven: usize,
    /// Whether that is told, and not found out.
    is_told: bool,
    in_flight: usize,
    /// Of these, what clients execute themselves.
    clients: usize,
    /// When how many were in flight, after somebody came or left.
    passages: VecDeque<Passage>,
    /// When the latest of these came that clients' executions were beside.
    beside_clients: Option<Instant>,
    /// When executions that ended of late were surely with a worker.
    witnesses: VecDeque<Witness>,
    /// When something gave way last.
    gave_way: Option<Instant>,
    /// What a call takes beside the execution.
    overhead: Option<Duration>,
    /// Whether that was found out by an earlier primed.
    is_recalled: bool,
    /// How many more executions have waited of late than have not.
    pressure: usize,
    /// Executions without a wait since the lane was changed.
    calm: usize,
    /// How many it takes for the lane to widen.
    patience: usize,
    /// Whether it has widened so since it shrank.
    has_widened: bool,
}

#[derive(Clone, Copy, Debug)]
struct Passage {
    at: Instant,
    passing: Passing,
    in_flight: usize,
    /// What clients executed until then, or from then on.
    clients: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Passing {
    Enters,
    Leaves,
    /// It is stopped so that a client need not wait for it.
    GivesWay,
}

/// What is known of a backend, for the next primed before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Learned {
    slots: Option<f64>,
    proven: usize,
    overhead_us: Option<u64>,
}

/// Between these times a worker had an execution for sure.
#[derive(Clone, Copy, Debug)]
struct Witness {
    from: Instant,
    until: Instant,
    /// How many others had theirs at its middle, itself among them; those that ended later count it.
    together: usize,
}

/// Whose an execution is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Whose {
    /// A client asked the backend for it.
    Client,
    /// primed did.
    Speculative,
}

/// An execution that has ended, whoever asked for it.
#[derive(Clone, Copy, Debug)]
pub struct Executed {
    /// When the backend was asked.
    pub began: Instant,
    /// When it had answered.
    pub ended: Instant,
    /// How long a worker was busy with it.
    pub worked: Duration,
    /// How long it was queued, if the backend says so.
    pub queued: Option<Duration>,
}

impl Executed {
    /// What `result` tells; `None` if it does not say how long the worker took.
    pub fn of(result: &ActionResult, began: Instant, ended: Instant) -> Option<Self> {
        let metadata = result.execution_metadata.as_ref()?;
        let started = metadata.worker_start_timestamp.as_ref();
        let worked = started.zip(metadata.worker_completed_timestamp.as_ref());
        let worked = worked.and_then(|(started, completed)| between(started, completed));
        let queued = metadata.queued_timestamp.as_ref().zip(started);
        Some(Executed {
            began,
            ended,
            worked: worked.or_else(|| execution_time(result))?,
            queued: queued.and_then(|(queued, started)| between(queued, started)),
        })
    }
}

impl LaneWidth {
    /// A lane of `most` at once. `slots` is how many executions the backend runs at once, where that
    /// is known.
    pub fn new(most: usize, slots: Option<usize>) -> Self {
        LaneWidth {
            most: most.max(1),
            slots: slots.map(|slots| slots as f64),
            proven: 0,
            is_told: slots.is_some(),
            in_flight: 0,
            clients: 0,
            passages: VecDeque::new(),
            beside_clients: None,
            witnesses: VecDeque::new(),
            gave_way: None,
            overhead: None,
            is_recalled: false,
            pressure: 0,
            calm: 0,
            patience: 1,
            has_widened: false,
        }
    }

    /// What has been learned so far, if anything was. What was told is not.
    pub fn learned(&self) -> Option<Learned> {
        let overhead = self.overhead.filter(|_| !self.is_told)?;
        Some(Learned {
            slots: self.slots,
            proven: self.proven,
            overhead_us: overhead.as_micros().try_into().ok(),
        })
    }

    /// Begins with what was learned earlier. Whatever has become of the backend since is learned
    /// anew.
    pub fn recall(&mut self, learned: Learned) {
        if self.is_told {
            return;
        }
        let Learned {
            slots,
            proven,
            overhead_us,
        } = learned;
        self.slots = slots
            .filter(|slots| slots.is_finite())
            .map(|it| it.max(1.0));
        self.proven = proven.min(REMEMBERED);
        self.overhead = overhead_us.map(Duration::from_micros);
        self.is_recalled = self.overhead.is_some();
    }

    /// How many speculative executions the backend may have now. What clients execute themselves, or
    /// have just executed, takes its share first; that may be all there is.
    pub fn room(&self, now: Instant) -> usize {
        let recent = self.recent(now).map(|passage| passage.clients);
        self.beside(recent.max().unwrap_or(0).max(self.clients))
    }

    /// When there may be more room without anybody having come or left.
    pub fn more_room_at(&self, now: Instant) -> Option<Instant> {
        let recent = self
            .recent(now)
            .filter(|passage| passage.clients > self.clients);
        let oldest = recent.map(|passage| passage.at).min()?;
        Some(oldest + self.lingers(now))
    }

    /// How many executions there are beyond those that the backend surely takes at once.
    pub fn excess(&self) -> usize {
        let taken = match self.slots {
            None => self.tried_beside(self.clients),
            Some(slots) if self.is_told => slots as usize,
            // It may have widened further than that for a try.
            Some(slots) => self.proven.min(slots as usize),
        };
        self.in_flight.saturating_sub(taken.max(self.clients))
    }

    /// How many executions at once are tried beside clients' as long as none had to wait. While
    /// these are few, one more than is proven, so that it can be found to be more.
    fn tried_beside(&self, clients: usize) -> usize {
        self.proven + usize::from(2 * clients <= self.proven)
    }

    /// The passages of late, if there were any beside clients.
    fn recent(&self, now: Instant) -> impl Iterator<Item = &Passage> {
        let beginning = now.checked_sub(self.lingers(now));
        let is_recent = move |at: Instant| beginning.is_none_or(|beginning| at > beginning);
        let count = match self.beside_clients.is_some_and(is_recent) {
            true => self.passages.len(),
            false => 0,
        };
        let passages = self.passages.iter().rev().take(count);
        passages.take_while(move |passage| is_recent(passage.at))
    }

    fn lingers(&self, now: Instant) -> Duration {
        let is_of_late = |at| now.saturating_duration_since(at) < OF_LATE;
        match self.gave_way.is_some_and(is_of_late) {
            true => LINGERS_LONGER,
            false => LINGERS,
        }
    }

    fn beside(&self, clients: usize) -> usize {
        let Some(slots) = self.slots else {
            return match clients {
                0 => (self.proven * TRIES).max(self.beginning()).min(self.most),
                // One is none too many where next to nothing is proven.
                _ => (self.tried_beside(clients).saturating_sub(clients))
                    .max(usize::from(self.proven < BEGINNING))
                    .min(self.most),
            };
        };
        // One is free for whoever comes next.
        let free = (slots as usize).saturating_sub(clients + 1);
        match clients {
            0 => free.clamp(1, self.most),
            _ => free.min(self.most),
        }
    }

    fn beginning(&self) -> usize {
        (self.most / BEGINNING_SHARE).max(BEGINNING)
    }

    /// The same while clients execute nothing: the present width.
    pub fn width(&self) -> usize {
        self.beside(0)
    }

    /// What clients execute themselves.
    pub fn clients(&self) -> usize {
        self.clients
    }

    /// What an execution takes beside the worker's time.
    pub fn overhead(&self) -> Duration {
        self.overhead.unwrap_or_default()
    }

    /// The backend is asked for an execution.
    pub fn entered(&mut self, now: Instant, whose: Whose) {
        self.in_flight += 1;
        self.clients += usize::from(whose == Whose::Client);
        self.remember(now, Passing::Enters, self.clients);
    }

    /// It has answered, or is asked no more.
    pub fn left(&mut self, now: Instant, whose: Whose) {
        self.in_flight = self.in_flight.saturating_sub(1);
        let clients = self.clients;
        if whose == Whose::Client {
            self.clients = self.clients.saturating_sub(1);
        }
        self.remember(now, Passing::Leaves, clients);
    }

    /// A speculative one is stopped so that a client need not wait for it.
    pub fn gives_way(&mut self, now: Instant) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.gave_way = Some(now);
        self.remember(now, Passing::GivesWay, self.clients);
    }

    fn remember(&mut self, at: Instant, passing: Passing, clients: usize) {
        if clients > 0 {
            self.beside_clients = Some(at);
        }
        if self.passages.len() == REMEMBERED {
            self.passages.pop_front();
        }
        self.passages.push_back(Passage {
            at,
            passing,
            in_flight: self.in_flight,
            clients,
        });
    }

    /// Takes in how an execution went.
    pub fn learn(&mut self, executed: Executed) {
        let Executed {
            began,
            ended,
            worked,
            queued,
        } = executed;
        let rest = ended.duration_since(began).saturating_sub(worked);
        let ahead = self.in_flight_before(began) + 1;
        let waited = queued.unwrap_or_else(|| rest.saturating_sub(self.overhead.unwrap_or(rest)));
        self.learn_overhead(rest.saturating_sub(queued.unwrap_or_default()), ahead);
        if self.is_told {
            return;
        }
        self.witness(executed);
        // Who made room for it is known of a little later than it began.
        let slack = SHORTEST_WAIT.min(worked / 4);
        let started = ended.checked_sub(worked).map_or(ended, |at| at + slack);
        if waited > SHORTEST_WAIT.max(worked / WAIT_SHARE) {
            match self.gone(began, started) {
                // Nobody made room that is known here. Others use the backend, too, and if they
                // take most of it, primed steps back.
                0 if waited > worked => self.shrink(1),
                0 => {}
                gone => self.shrink(ahead.saturating_sub(gone).max(self.witnessed())),
            }
        } else if waited <= (worked / NO_WAIT_SHARE).max(SHORTEST_WAIT / 10) {
            // It may have had the slot of one that has just gone.
            let until = started.min(began + waited + SHORTEST_WAIT);
            self.widen(ahead, ahead.saturating_sub(self.gone(began, until)).max(1));
        } else {
            // Those before it that had not gone were under way with it, whatever it waited for.
            let together = ahead.saturating_sub(self.gone(began, started));
            self.proven = self.proven.max(together);
        }
    }

    /// A worker had the execution somewhen between its beginning and its end, and if that took most of
    /// the time, surely in the midst of it. So many that were surely under way together the backend
    /// runs at once, however long any of them seems to have waited: where clients and the backend
    /// share a machine, whoever waits for a core has to wait, too.
    fn witness(&mut self, executed: Executed) {
        let Executed {
            began,
            ended,
            worked,
            ..
        } = executed;
        let (Some(from), until) = (ended.checked_sub(worked), began + worked) else {
            return;
        };
        if from >= until {
            return;
        }
        let middle = from + (until - from) / 2;
        let others = self.witnesses.iter();
        let with = others.filter(|other| other.from <= middle && middle <= other.until);
        let together = with.count() + 1;
        self.proven = self.proven.max(together);
        self.slots = self.slots.map(|slots| slots.max(together as f64));
        while self.witnesses.len() == WITNESSES
            || (self.witnesses.front()).is_some_and(|oldest| oldest.until + OF_LATE < ended)
        {
            self.witnesses.pop_front();
        }
        self.witnesses.push_back(Witness {
            from,
            until,
            together,
        });
    }

    /// How many have surely been under way together of late.
    fn witnessed(&self) -> usize {
        let together = self.witnesses.iter().map(|witness| witness.together);
        together.max().unwrap_or(0)
    }

    /// An execution that a client asked for at `began` is still queued, says the backend.
    pub fn is_queued(&mut self, began: Instant, now: Instant) {
        if self.is_told {
            return;
        }
        let ahead = self.in_flight_before(began);
        self.shrink(ahead.saturating_sub(self.gone(began, now)).max(1));
    }

    /// How many have left, or were stopped, after `began`, until `until`.
    fn gone(&self, began: Instant, until: Instant) -> usize {
        let recent = self.passages.iter().rev();
        let recent = recent.skip_while(|passage| passage.at > until);
        let recent = recent.take_while(|passage| passage.at > began);
        let gone = recent.filter(|passage| passage.passing != Passing::Enters);
        gone.count()
    }

    /// How many were in flight when somebody came at `time`.
    fn in_flight_before(&self, time: Instant) -> usize {
        let until = self.passages.iter().rev();
        let mut until = until.skip_while(|passage| passage.at > time);
        let mut just_left = 0;
        let before = until.find(|passage| {
            just_left += usize::from(passage.at == time && passage.passing != Passing::Enters);
            passage.at < time
        });
        before.map_or(0, |passage| passage.in_flight.saturating_sub(just_left))
    }

    /// The quickest of late counts: slower ones may have waited, unless they were alone.
    fn learn_overhead(&mut self, rest: Duration, ahead: usize) {
        let known = self.overhead.unwrap_or(rest);
        let drifted = match ahead {
            // It may be another way to the backend by now.
            1 if std::mem::take(&mut self.is_recalled) => rest,
            1 => known + known / DRIFT + Duration::from_micros(100),
            _ => known,
        };
        self.overhead = Some(rest.min(drifted));
    }

    /// An execution had to wait while the backend ran `seen`.
    fn shrink(&mut self, seen: usize) {
        self.pressure = (self.pressure + 1).min(STAYS.len() - 1);
        let shrunk = match self.slots {
            None => seen.max(self.proven) as f64,
            Some(slots) => (seen as f64).max(slots * STAYS[self.pressure]),
        };
        if self.slots.is_none_or(|slots| shrunk < slots) {
            if std::mem::take(&mut self.has_widened) {
                self.patience = (self.patience * 2).min(MAX_PATIENCE);
            }
            self.slots = Some(shrunk);
            self.proven = self.proven.min(shrunk as usize);
            self.calm = 0;
        }
    }

    /// An execution began at once when `ahead` were under way, itself among them; all but `together`
    /// of them may have gone by then.
    fn widen(&mut self, ahead: usize, together: usize) {
        self.pressure = self.pressure.saturating_sub(1);
        self.proven = self.proven.max(together);
        let Some(slots) = self.slots else {
            return;
        };
        if together as f64 > slots {
            self.slots = Some((slots + 1.0).min(together as f64));
        } else if self.clients == 0 && ahead + 1 >= slots as usize {
            // The lane was full, and nobody had to wait. While clients would suffer from it, no
            // more is tried.
            self.calm += 1;
            if self.calm >= self.patience {
                self.calm = 0;
                self.slots = Some(slots + 1.0);
                // The last step was none too far.
                if std::mem::replace(&mut self.has_widened, true) {
                    self.patience = (self.patience / 2).max(1);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cmp::Reverse;
    use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

    /// What it takes to stop an execution, in milliseconds.
    const STOPPING: u64 = 10;

    /// A backend of `slots`, and clients that execute `jobs` at once, one after the other, before
    /// a lane that always has something to execute.
    struct Simulation {
        slots: usize,
        honours_priority: bool,
        /// What a call takes beside the execution, in milliseconds.
        overhead: u64,
        /// What an execution takes, in milliseconds.
        work: fn(u64) -> u64,
        jobs: usize,
        actions: usize,
        /// When the clients begin, in milliseconds.
        arrive: u64,
        speculates: bool,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum Event {
        Arrival,
        /// An execution of so many milliseconds ends.
        End(u64),
        Stop,
    }

    struct Observed {
        /// How long each of the clients' executions waited, in milliseconds.
        waits: Vec<u64>,
        /// The largest number of speculative executions at once, from each second on.
        speculative: Vec<usize>,
    }

    impl Observed {
        fn p95(&self) -> u64 {
            let mut waits = self.waits.clone();
            waits.sort_unstable();
            waits[(waits.len() * 95).div_ceil(100) - 1]
        }
    }

    impl Simulation {
        fn run(&self, width: &mut LaneWidth, most_seconds: u64) -> Observed {
            // What an earlier run has left in flight has ended.
            let earlier = width.passages.back().map(|passage| passage.at);
            let origin = earlier.map_or_else(Instant::now, |at| at + OF_LATE);
            (width.in_flight, width.clients) = (0, 0);
            width.passages.clear();
            let at = |ms: u64| origin + Duration::from_millis(ms);
            let mut events = BinaryHeap::from([Reverse((self.arrive, 0, Event::Arrival))]);
            let mut queue: BTreeMap<(Whose, u64), u64> = BTreeMap::new();
            let (mut running, mut number) = (0, 0);
            let mut in_flight: BTreeMap<Whose, usize> = BTreeMap::new();
            // Those that are not stopped.
            let mut speculative = BTreeSet::new();
            let mut stopped = BTreeSet::new();
            let mut left = self.actions;
            let mut observed = Observed {
                waits: Vec::new(),
                speculative: Vec::new(),
            };
            let mut began: BTreeMap<u64, (u64, Whose)> = BTreeMap::new();
            let mut now = 0;
            loop {
                // Whoever may begin, begins.
                loop {
                    let of = |whose| in_flight.get(&whose).copied().unwrap_or(0);
                    let clients = of(Whose::Client);
                    let whose = if left > 0 && clients < self.jobs && now >= self.arrive {
                        left -= 1;
                        Whose::Client
                    } else if self.speculates && of(Whose::Speculative) < width.room(at(now)) {
                        Whose::Speculative
                    } else {
                        break;
                    };
                    *in_flight.entry(whose).or_default() += 1;
                    number += 1;
                    width.entered(at(now), whose);
                    let place = if self.honours_priority {
                        whose
                    } else {
                        Whose::Client
                    };
                    queue.insert((place, number), now);
                    began.insert(number, (now, whose));
                    if whose == Whose::Speculative {
                        speculative.insert(number);
                    } else if !self.honours_priority {
                        for _ in 0..width.excess() {
                            let Some(latest) = speculative.pop_last() else {
                                break;
                            };
                            width.gives_way(at(now));
                            if queue.remove(&(Whose::Client, latest)).is_some() {
                                *in_flight.entry(Whose::Speculative).or_default() -= 1;
                            } else {
                                stopped.insert(latest);
                                events.push(Reverse((now + STOPPING, latest, Event::Stop)));
                            }
                        }
                    }
                    let second = (now / 1000) as usize;
                    observed
                        .speculative
                        .resize(observed.speculative.len().max(second + 1), 0);
                    let most = &mut observed.speculative[second];
                    *most = (*most).max(in_flight.get(&Whose::Speculative).copied().unwrap_or(0));
                }
                while running < self.slots
                    && let Some(((_, number), entered)) = queue.pop_first()
                {
                    running += 1;
                    let work = (self.work)(number);
                    if began[&number].1 == Whose::Client {
                        observed.waits.push(now - entered);
                    }
                    let ends = now + work + self.overhead;
                    events.push(Reverse((ends, number, Event::End(work))));
                }
                if observed.waits.len() == self.actions && self.actions > 0 {
                    return observed;
                }
                let Some(Reverse((time, number, event))) = events.pop() else {
                    return observed;
                };
                now = time;
                if now > most_seconds * 1000 {
                    return observed;
                }
                match event {
                    Event::Arrival => {}
                    Event::End(_) if stopped.contains(&number) => {}
                    Event::End(work) => {
                        let (entered, whose) = began[&number];
                        running -= 1;
                        *in_flight.entry(whose).or_default() -= 1;
                        speculative.remove(&number);
                        width.learn(Executed {
                            began: at(entered),
                            ended: at(now),
                            worked: Duration::from_millis(work),
                            queued: None,
                        });
                        width.left(at(now), whose);
                    }
                    Event::Stop => {
                        running -= 1;
                        *in_flight.entry(Whose::Speculative).or_default() -= 1;
                    }
                }
            }
        }
    }

    /// Compiles take from half a second to one and a half.
    fn compile(number: u64) -> u64 {
        500 + number * 7919 % 1000
    }

    fn casd(slots: usize, jobs: usize) -> Simulation {
        Simulation {
            slots,
            honours_priority: false,
            overhead: 5,
            work: compile,
            jobs,
            actions: 200,
            arrive: 0,
            speculates: true,
        }
    }

    #[test]
    fn clients_of_a_backend_with_few_slots_wait_no_longer_than_without_speculation() {
        for (slots, jobs) in [(2, 1), (2, 2), (4, 2), (4, 3), (8, 2)] {
            let mut width = LaneWidth::new(8, None);
            let with = casd(slots, jobs).run(&mut width, 100_000).p95();
            println!(
                "{slots} slots, -j{jobs}: p95 {with} ms, width {}",
                width.width()
            );
            assert!(with <= 25, "{slots} slots, -j{jobs}: {with} ms");
        }
    }

    #[test]
    fn where_clients_fill_the_backend_themselves_nothing_is_added_to_their_queue() {
        for (slots, jobs) in [(2, 4), (4, 8)] {
            let mut width = LaneWidth::new(8, None);
            let with = casd(slots, jobs).run(&mut width, 100_000).p95();
            let without = Simulation {
                speculates: false,
                ..casd(slots, jobs)
            };
            let without = without.run(&mut LaneWidth::new(8, None), 100_000).p95();
            println!("{slots} slots, -j{jobs}: p95 {with} ms with, {without} ms without");
            assert!(with as f64 <= without as f64 * 1.1);
        }
    }

    #[test]
    fn a_cluster_with_room_is_used_in_full_after_a_few_steps_and_stays_so() {
        let cluster = Simulation {
            actions: 0,
            overhead: 40,
            ..casd(64, 0)
        };
        let mut width = LaneWidth::new(64, None);
        let observed = cluster.run(&mut width, 60).speculative;
        assert!(observed[0] <= 2 * BEGINNING, "{observed:?}");
        assert!(observed[4..].iter().all(|most| *most >= 60), "{observed:?}");
        // By then that is known.
        let observed = cluster.run(&mut width, 10).speculative;
        assert!(observed.iter().all(|most| *most >= 60), "{observed:?}");
    }

    /// What is known of a backend after a build that was recorded there.
    fn recorded(backend: &Simulation, most: usize) -> LaneWidth {
        let mut width = LaneWidth::new(most, None);
        let recording = Simulation {
            speculates: false,
            ..*backend
        };
        recording.run(&mut width, 100_000);
        width
    }

    #[test]
    fn clients_that_come_when_the_lane_has_taken_all_slots_wait_only_until_it_has_given_way() {
        for (slots, jobs, most) in [
            (16, 16, 16),
            (16, 8, 64),
            (64, 8, 64),
            (4, 4, 16),
            (64, 64, 64),
        ] {
            let backend = casd(slots, jobs);
            let mut width = recorded(&backend, most);
            for round in 0..3 {
                let burst = Simulation {
                    arrive: 800,
                    ..casd(slots, jobs)
                };
                let observed = burst.run(&mut width, 100_000);
                let (p95, taken) = (observed.p95(), observed.speculative[0]);
                println!(
                    "{slots} slots, -j{jobs}, lane of {most}, round {round}: {taken} taken, p95 {p95} ms, {} waits, {:?}",
                    observed.waits.iter().filter(|wait| **wait > 25).count(),
                    width.learned(),
                );
                assert!(p95 <= 25, "{slots} slots, -j{jobs}: {p95} ms");
                assert!(
                    taken + 1 >= most.min(jobs),
                    "{slots} slots, -j{jobs}: {taken}"
                );
            }
        }
    }

    #[test]
    fn what_a_recorded_build_has_proven_is_used_at_once() {
        let width = recorded(&casd(64, 32), 64);
        assert_eq!((width.width(), width.beside(8)), (64, 25));
        let narrow = recorded(&casd(64, 6), 64);
        assert_eq!((narrow.width(), narrow.beside(8)), (12, 1));
    }

    #[test]
    fn an_execution_that_began_when_others_gave_way_proves_no_room_for_these() {
        let at = Instant::now();
        let after = |ms| at + Duration::from_millis(ms);
        let mut width = LaneWidth::new(8, None);
        (0..4).for_each(|_| width.entered(at, Whose::Speculative));
        width.entered(after(10), Whose::Client);
        assert_eq!(width.excess(), 4);
        (0..3).for_each(|_| width.gives_way(after(10)));
        assert_eq!(width.excess(), 1);
        width.learn(Executed {
            began: after(9),
            ended: after(1020),
            worked: Duration::from_secs(1),
            queued: None,
        });
        assert_eq!(width.proven, 2);
    }

    #[test]
    fn one_that_is_told_to_be_queued_shrinks_the_lane_before_its_end() {
        let at = Instant::now();
        let after = |ms| at + Duration::from_millis(ms);
        let mut width = LaneWidth::new(64, None);
        (0..5).for_each(|_| width.entered(at, Whose::Speculative));
        width.entered(after(10), Whose::Client);
        width.is_queued(after(10), after(120));
        assert_eq!(width.slots, Some(5.0));
        let mut told = LaneWidth::new(64, Some(9));
        told.entered(at, Whose::Client);
        told.is_queued(at, after(120));
        assert_eq!(told.slots, Some(9.0));
    }

    #[test]
    fn what_is_recalled_is_only_a_beginning() {
        let cluster = Simulation {
            actions: 0,
            ..casd(64, 0)
        };
        let mut before = LaneWidth::new(64, None);
        cluster.run(&mut before, 60);
        let mut width = LaneWidth::new(64, None);
        width.recall(before.learned().unwrap());
        assert_eq!(width.width(), 64);
        let small = Simulation {
            slots: 4,
            ..cluster
        };
        small.run(&mut width, 60);
        assert!(width.width() <= 6, "{}", width.width());
        let far = Simulation {
            overhead: 2000,
            ..casd(64, 0)
        };
        let mut width = LaneWidth::new(64, None);
        width.recall(before.learned().unwrap());
        let alone = Simulation {
            jobs: 1,
            actions: 1,
            speculates: false,
            ..far
        };
        alone.run(&mut width, 60);
        let far = Simulation { actions: 0, ..far };
        far.run(&mut width, 60);
        assert_eq!(width.width(), 64, "it is slower to reach, not smaller");
        let mut told = LaneWidth::new(8, Some(4));
        told.recall(before.learned().unwrap());
        assert_eq!((told.width(), told.learned()), (3, None));
    }

    #[test]
    fn the_lane_finds_the_slots_that_there_are_and_leaves_one_free() {
        for slots in [2, 4, 16] {
            let alone = Simulation {
                actions: 0,
                ..casd(slots, 0)
            };
            let mut width = LaneWidth::new(64, None);
            let observed = alone.run(&mut width, 300);
            let late = &observed.speculative[200..];
            let mean = late.iter().sum::<usize>() as f64 / late.len() as f64;
            println!("{slots} slots: {mean:.1} at once");
            assert!(mean <= slots as f64 * 1.25, "{slots}: {mean}");
            assert!(mean >= slots as f64 * 0.5 - 0.2, "{slots}: {mean}");
        }
    }

    #[test]
    fn waits_for_a_core_do_not_hide_how_many_were_under_way_together() {
        let origin = Instant::now();
        let at = |ms: u64| origin + Duration::from_millis(ms);
        let mut width = LaneWidth::new(64, None);
        let wave = |width: &mut LaneWidth, begins: u64, late: u64| {
            for number in 0..32 {
                width.entered(at(begins + number), Whose::Speculative);
            }
            for number in 0..32 {
                let ended = begins + 1010 + late + number;
                width.learn(Executed {
                    began: at(begins + number),
                    ended: at(ended),
                    worked: Duration::from_millis(1000),
                    queued: None,
                });
                width.left(at(ended), Whose::Speculative);
            }
        };
        wave(&mut width, 0, 0);
        let first = width.width();
        assert!(first >= 60, "{first}");
        // All of the next have waited, and others had just gone.
        for (begins, late) in [(1020, 400), (2600, 450), (4200, 500)] {
            wave(&mut width, begins, late);
            assert!(width.width() >= 31, "{}", width.width());
        }
    }

    #[test]
    fn a_slow_backend_is_not_taken_for_a_full_one() {
        let far = Simulation {
            actions: 0,
            overhead: 3000,
            ..casd(100, 0)
        };
        let mut width = LaneWidth::new(32, None);
        far.run(&mut width, 60);
        assert_eq!(width.width(), 32);
    }

    #[test]
    fn a_lane_that_shrank_for_others_load_widens_when_that_is_gone() {
        let mut width = LaneWidth::new(32, None);
        let full = Simulation {
            actions: 0,
            ..casd(3, 0)
        };
        full.run(&mut width, 60);
        assert!(width.width() <= 6, "{}", width.width());
        let wide = Simulation {
            actions: 0,
            ..casd(64, 0)
        };
        wide.run(&mut width, 120);
        assert!(width.width() >= 24, "{}", width.width());
    }

    #[test]
    fn before_a_backend_that_honours_priority_clients_wait_for_no_queue() {
        let mut width = LaneWidth::new(16, None);
        let cluster = Simulation {
            honours_priority: true,
            ..casd(8, 4)
        };
        let with = cluster.run(&mut width, 100_000).p95();
        assert!(with <= 25, "{with} ms");
    }

    #[test]
    fn of_slots_that_are_told_one_is_left_free_and_clients_take_theirs_first() {
        let width = LaneWidth::new(8, Some(4));
        assert_eq!(
            [0, 1, 2, 3, 9].map(|clients| width.beside(clients)),
            [3, 2, 1, 0, 0]
        );
        assert_eq!(LaneWidth::new(8, Some(1)).width(), 1, "there is one");
        let mut unknown = LaneWidth::new(8, None);
        assert_eq!([0, 3, 9].map(|clients| unknown.beside(clients)), [8, 1, 1]);
        unknown.proven = 6;
        assert_eq!([0, 3, 9].map(|clients| unknown.beside(clients)), [8, 4, 1]);
    }
}
