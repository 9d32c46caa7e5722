//! What is in flight, behind one lock: who waits for what, which flight departs next, and which
//! gives way.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::lane_width::{LaneWidth, Whose};
use super::record::FlightRecord;
use super::{Ending, FlightCounts, FlightKey, Landing, SUPERSEDED, Stage, Urgency};
use crate::quick_map::QuickMap;

/// How often a flight gives way. Then it is left alone: it has been begun in vain often enough.
pub(super) const GIVES_WAY: u8 = 2;

/// See the module.
pub(super) struct State {
    pub(super) flights: QuickMap<FlightKey, Flight>,
    pub(super) ready: BTreeSet<(Urgency, FlightKey)>,
    /// What would be ready, but for those who announced it.
    pub(super) held_back: BTreeSet<(Urgency, FlightKey)>,
    /// Those whose flights are held back.
    pub(super) doubted: Vec<mpsc::Sender<Landing>>,
    pub(super) wanted: VecDeque<FlightKey>,
    /// What runs, in the order in which it began.
    pub(super) airborne: BTreeMap<u64, Airborne>,
    pub(super) departures: u64,
    pub(super) width: LaneWidth,
    /// Whether executions that are stopped leave their workers to clients, as far as is known.
    pub(super) gives_way: bool,
    pub(super) clients: QuickMap<FlightKey, usize>,
    /// Its queued, running and clients' own are what is so now; the rest is counted.
    pub(super) counts: FlightCounts,
}

/// Something announced that has not ended.
pub(super) struct Flight {
    pub(super) record: Arc<FlightRecord>,
    pub(super) stage: watch::Sender<Stage>,
    pub(super) owners: Vec<mpsc::Sender<Landing>>,
    /// Set once the inputs are uploaded.
    pub(super) ready: Option<Urgency>,
    pub(super) wanted: bool,
    /// Once it is running and nobody wants it any more. Nobody joins it then.
    pub(super) cancelled: CancellationToken,
    /// How often it was stopped for clients.
    pub(super) gave_way: u8,
    /// Nobody is left who wants it, but as it runs it may go on.
    pub(super) is_withdrawn: bool,
}

/// A flight that runs.
pub(super) struct Airborne {
    pub(super) key: FlightKey,
    /// Ready once it is to give way.
    pub(super) asked: CancellationToken,
    /// It is to give way, or does so.
    pub(super) is_leaving: bool,
}

/// The flight that departs.
pub(super) struct Next {
    pub(super) key: FlightKey,
    pub(super) number: u64,
    pub(super) cancelled: CancellationToken,
    pub(super) asked: CancellationToken,
}

impl State {
    /// Nothing is in flight. See `Flights::before`.
    pub(super) fn new(slots: Option<usize>, cap: usize) -> Self {
        State {
            flights: QuickMap::default(),
            ready: BTreeSet::new(),
            held_back: BTreeSet::new(),
            doubted: Vec::new(),
            wanted: VecDeque::new(),
            airborne: BTreeMap::new(),
            departures: 0,
            width: LaneWidth::new(cap, slots),
            gives_way: true,
            clients: QuickMap::default(),
            counts: FlightCounts::default(),
        }
    }

    /// Puts a flight that may start into the queue: before all others if a client waits for it; and
    /// it is held back if nobody who is trusted has announced it.
    pub(super) fn queue(&mut self, urgency: Urgency, key: FlightKey) {
        let flight = self.flights.get(&key);
        if flight.is_some_and(|flight| flight.wanted) {
            return self.wanted.push_back(key);
        }
        let owners = flight.map_or(&[][..], |it| &it.owners);
        let is_doubted = |owner: &mpsc::Sender<Landing>| {
            let mut doubted = self.doubted.iter();
            doubted.any(|doubted| doubted.same_channel(owner))
        };
        match !self.doubted.is_empty() && owners.iter().all(is_doubted) {
            true => self.held_back.insert((urgency, key)),
            false => self.ready.insert((urgency, key)),
        };
    }

    /// Somebody else wants a flight, too. Returns whether it was held back.
    pub(super) fn release(&mut self, key: &FlightKey) -> bool {
        let urgency = self.flights.get(key).and_then(|flight| flight.ready);
        let held = urgency.map(|urgency| (urgency, key.clone()));
        match held.and_then(|held| self.held_back.take(&held)) {
            Some((urgency, key)) => {
                self.queue(urgency, key);
                true
            }
            None => false,
        }
    }

    /// Takes a flight out of the queue; `false` if it is not there.
    pub(super) fn takes_out(&mut self, urgency: Urgency, key: &FlightKey) -> bool {
        let queued = (urgency, key.clone());
        self.ready.remove(&queued) || self.held_back.remove(&queued)
    }

    /// Takes the next flight to start: first what clients wait for, then the most urgent while
    /// the lane has room.
    pub(super) fn take_next(&mut self, now: Instant) -> Option<Next> {
        let key = match self.wanted.pop_front() {
            Some(key) => key,
            None => {
                if self.airborne.len() >= self.width.room(now) {
                    return None;
                }
                self.ready.pop_first()?.1
            }
        };
        self.departures += 1;
        let number = self.departures;
        let asked = CancellationToken::new();
        let airborne = Airborne {
            key: key.clone(),
            asked: asked.clone(),
            is_leaving: false,
        };
        self.airborne.insert(number, airborne);
        self.width.entered(now, Whose::Speculative);
        let mut cancelled = CancellationToken::new();
        if let Some(flight) = self.flights.get(&key) {
            flight.record.start();
            flight.stage.send_replace(Stage::Running(None));
            cancelled = flight.cancelled.clone();
        }
        Some(Next {
            key,
            number,
            cancelled,
            asked,
        })
    }

    /// Has `count` flights that no client waits for give way, those first that began last: they
    /// lose least, and may be queued yet.
    pub(super) fn make_room(&mut self, now: Instant, count: usize) {
        if count == 0 {
            return;
        }
        let flights = &self.flights;
        let can = |airborne: &&mut Airborne| {
            let flight = flights.get(&airborne.key);
            !airborne.asked.is_cancelled() && flight.is_some_and(Flight::may_give_way)
        };
        for airborne in self.airborne.values_mut().rev().filter(can).take(count) {
            airborne.is_leaving = true;
            airborne.asked.cancel();
            // From now on it takes no worker that a client waits for.
            self.width.gives_way(now);
        }
    }

    /// A flight is over, or stopped.
    pub(super) fn lands(&mut self, number: u64) {
        if self
            .airborne
            .remove(&number)
            .is_some_and(|it| !it.is_leaving)
        {
            self.width.left(Instant::now(), Whose::Speculative);
        }
    }

    /// It goes on all the same.
    pub(super) fn stays(&mut self, number: u64) {
        if let Some(airborne) = self.airborne.get_mut(&number)
            && std::mem::take(&mut airborne.is_leaving)
        {
            self.width.entered(Instant::now(), Whose::Speculative);
        }
    }

    /// Takes away an owner. `None` if others wait for the flight; else whether it is queued.
    pub(super) fn gives_up(
        &mut self,
        key: &FlightKey,
        owner: &mpsc::Sender<Landing>,
    ) -> Option<bool> {
        let flight = self.flights.get_mut(key)?;
        flight.owners.retain(|known| !known.same_channel(owner));
        if flight.wanted || !flight.owners.is_empty() {
            return None;
        }
        let is_queued = matches!(*flight.stage.borrow(), Stage::Queued);
        match is_queued {
            true => flight.record.because(SUPERSEDED.to_owned()),
            // It is told when it lands, all the same.
            false => flight.owners.push(owner.clone()),
        }
        Some(is_queued)
    }

    pub(super) fn end(&mut self, key: &FlightKey, ending: Ending) {
        if let Some(flight) = self.flights.remove(key) {
            if let Some(urgency) = flight.ready {
                self.takes_out(urgency, key);
                self.wanted.retain(|wanted| wanted != key);
            }
            flight.record.end(&ending);
            flight.stage.send_replace(Stage::Ended(ending));
        }
    }
}

impl Flight {
    /// Announced by `owner`, and not ready yet.
    pub(super) fn announced(record: Arc<FlightRecord>, owner: mpsc::Sender<Landing>) -> Self {
        Flight {
            record,
            stage: watch::Sender::new(Stage::Queued),
            owners: vec![owner],
            ready: None,
            wanted: false,
            cancelled: CancellationToken::new(),
            gave_way: 0,
            is_withdrawn: false,
        }
    }

    pub(super) fn may_give_way(&self) -> bool {
        !self.wanted && !self.cancelled.is_cancelled() && self.gave_way < GIVES_WAY
    }
}
