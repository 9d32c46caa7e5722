//! Builds as clients run them: which call belongs to which, and how each of its actions was
//! answered. Counts only; what is recorded is `recording`'s business.

use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::field::Empty;

use super::caller::{BuildKey, Caller};
use super::subaction::Subaction;
use crate::cas::Digest;
use crate::clock::millis;
use crate::meters::METERS;
use crate::quick_map::{QuickMap, RandomState};
use crate::speculation::flights::FlightKey;
use crate::speculation::journal::accounting::{
    Accounting, Asked, BuildStatus, Counts, Effort, Leads, Shortfall,
};
use crate::speculation::journal::{Journal, Line, Note, Room};

/// Distinct actions of one build that are told apart; further ones are not counted.
const MAX_ASKED: usize = 1_000_000;

/// A build that is running or has ended.
#[derive(Debug)]
pub struct Build {
    /// Differs for each build of this process.
    pub number: u64,
    /// Differs for each build, ever.
    pub id: String,
    /// Who runs it.
    pub caller: Arc<Caller>,
    /// Milliseconds since 1970.
    pub started_unix_ms: i64,
    /// Milliseconds since 1970; `None` while it runs.
    pub ended_unix_ms: Option<i64>,
    /// When it was last heard of.
    pub last_call: Instant,
    /// What to record of it.
    pub subactions: QuickMap<FlightKey, Subaction>,
    /// By a hash: there can be many, and nothing but their number counts.
    asked: QuickMap<u64, (Asked, Line)>,
    hasher: RandomState,
    tally: Tally,
    saved: Duration,
    /// Results that were primed for it.
    pub primed: u64,
    /// How long those that it used had been there.
    pub leads: Leads,
    /// What it asked for, and what was primed for it; empty once it has ended.
    pub journal: Journal,
    /// What was wasted on it, once it has ended.
    pub wasted: Duration,
    /// What was done for it beside executing.
    pub effort: Effort,
    /// What was not to be had of the predictions for it, once it has ended.
    pub shortfall: Shortfall,
    /// From its first call to its end.
    span: tracing::Span,
}

/// How many distinct actions were answered in which way.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    cached: u64,
    hit: u64,
    joined: u64,
    missed: u64,
}

impl Tally {
    fn of(&mut self, asked: Asked) -> &mut u64 {
        match asked {
            Asked::Cached => &mut self.cached,
            Asked::Hit => &mut self.hit,
            Asked::Joined => &mut self.joined,
            Asked::Missed => &mut self.missed,
        }
    }

    fn all(&self) -> u64 {
        self.cached + self.hit + self.joined + self.missed
    }
}

impl Build {
    /// A build that begins now.
    pub fn new(number: u64, caller: Arc<Caller>, now_unix_ms: i64, room: &Room) -> Self {
        let id = uuid::Uuid::now_v7().to_string();
        Build {
            number,
            span: tracing::debug_span!(
                parent: None, "build", id, number, label = caller.label(),
                asked = Empty, cached = Empty, hit = Empty, joined = Empty, missed = Empty,
                primed = Empty,
            ),
            id,
            caller,
            started_unix_ms: now_unix_ms,
            ended_unix_ms: None,
            last_call: Instant::now(),
            subactions: QuickMap::default(),
            asked: QuickMap::default(),
            hasher: RandomState::default(),
            tally: Tally::default(),
            saved: Duration::ZERO,
            primed: 0,
            leads: Leads::default(),
            journal: Journal::within(room),
            wasted: Duration::ZERO,
            effort: Effort::default(),
            shortfall: Shortfall::default(),
        }
    }

    /// Whether any action was asked for.
    pub fn has_asked(&self) -> bool {
        self.tally.all() > 0
    }

    /// Whether any action was answered by what primed had executed, or was executing.
    pub fn has_used(&self) -> bool {
        self.tally.hit + self.tally.joined > 0
    }

    /// Counts an answer. `saved` is what primed spared the client. The first answer counts, but
    /// an action that was missed may still be joined. Returns whether it did.
    pub fn count(&mut self, key: &FlightKey, asked: Asked, saved: Duration, note: Note) -> bool {
        let hash = self.hasher.hash_one(key);
        let line = match self.asked.get(&hash) {
            None if self.asked.len() >= MAX_ASKED => return false,
            None => {
                METERS.asked.add(1);
                self.journal.ask(key, asked, note)
            }
            Some((Asked::Missed, line)) => {
                let is_joined = asked == Asked::Joined;
                let answer = if is_joined { asked } else { Asked::Missed };
                self.journal.answer(*line, answer, note);
                if !is_joined {
                    return false;
                }
                self.tally.missed -= 1;
                *line
            }
            Some(_) => return false,
        };
        *self.tally.of(asked) += 1;
        match asked {
            Asked::Cached => METERS.cached.add(1),
            Asked::Hit => METERS.hit.add(1),
            Asked::Joined => METERS.joined.add(1),
            // It may yet be joined.
            Asked::Missed => {}
        }
        METERS.saved.add(saved);
        self.asked.insert(hash, (asked, line));
        self.saved += saved;
        true
    }

    /// Keeps an action for recording.
    pub fn keep(&mut self, key: FlightKey, subaction: impl FnOnce(u64) -> Subaction) {
        let order = self.subactions.len() as u64;
        self.subactions
            .entry(key)
            .or_insert_with(|| subaction(order));
    }

    /// The actions that are kept, in the order in which they were asked for.
    pub fn subactions_in_order(&self) -> Vec<Digest> {
        let mut subactions: Vec<&Subaction> = self.subactions.values().collect();
        subactions.sort_unstable_by_key(|subaction| subaction.order);
        subactions
            .iter()
            .map(|subaction| subaction.action)
            .collect()
    }

    /// Ends it, and gives away what is to be recorded, and its journal. Only what `status` needs is
    /// kept.
    pub fn end(&mut self, now_unix_ms: i64) -> (QuickMap<FlightKey, Subaction>, Journal) {
        self.ended_unix_ms = Some(now_unix_ms);
        self.asked = QuickMap::default();
        METERS.builds.add(u64::from(self.has_asked()));
        METERS.missed.add(self.tally.missed);
        if !self.effort.submission.is_zero() {
            METERS.submission.add(self.effort.submission);
        }
        let journal = std::mem::take(&mut self.journal);
        self.wasted = journal.wasted();
        let span = std::mem::replace(&mut self.span, tracing::Span::none());
        let counts = self.counts();
        span.record("asked", counts.asked)
            .record("cached", counts.cached)
            .record("hit", counts.hit)
            .record("joined", counts.joined)
            .record("missed", counts.missed)
            .record("primed", counts.primed);
        (std::mem::take(&mut self.subactions), journal)
    }

    fn counts(&self) -> Counts {
        let Tally {
            cached,
            hit,
            joined,
            missed,
        } = self.tally;
        Counts {
            asked: self.tally.all(),
            cached,
            hit,
            joined,
            missed,
            primed: self.primed,
            used: hit + joined,
            saved_ms: millis(self.saved),
        }
    }

    /// What `primed status` shows of it.
    pub fn status(&self) -> BuildStatus {
        let counts = self.counts();
        let wasted = match self.ended_unix_ms {
            Some(_) => self.wasted,
            None => self.journal.wasted(),
        };
        let mut accounting = Accounting::of(&counts, &self.leads, wasted);
        accounting.spend(&self.effort);
        accounting.fall_short(match self.ended_unix_ms {
            Some(_) => self.shortfall.clone(),
            None => self.journal.shortfall(),
        });
        BuildStatus {
            id: self.id.clone(),
            parent: match self.caller.key {
                BuildKey::Action(_) => "action",
                BuildKey::Run(_) => "run",
                _ => "invocation",
            }
            .into(),
            label: self.caller.label(),
            started_unix_ms: self.started_unix_ms,
            ended_unix_ms: self.ended_unix_ms,
            counts,
            accounting,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::callers::Callers;
    use super::super::observation::CallOrigin;
    use super::*;
    use crate::workspace::peer::{Peer, PeerOrigin};

    fn key(name: &str) -> FlightKey {
        FlightKey {
            instance: "".into(),
            action: Digest::of(name.as_bytes()),
        }
    }

    #[test]
    fn each_action_counts_once_and_a_missed_one_may_still_be_joined() {
        let origin = CallOrigin {
            peer: Arc::new(Peer::new(PeerOrigin::Local { pid: None, uid: 0 })),
            metadata: None,
        };
        let caller = Callers::new().of(&origin, |_| false);
        let mut build = Build::new(1, caller, 0, &Room::default());
        assert!(!build.has_asked());
        let note = Note {
            began_unix_ms: 0,
            answered_unix_ms: 0,
            executed: Duration::ZERO,
        };
        let second = Duration::from_secs(1);
        build.count(&key("a"), Asked::Missed, Duration::ZERO, note);
        build.count(&key("a"), Asked::Joined, second, note);
        build.count(&key("b"), Asked::Missed, Duration::ZERO, note);
        build.count(&key("b"), Asked::Cached, Duration::ZERO, note);
        build.count(&key("c"), Asked::Hit, second, note);
        build.count(&key("c"), Asked::Hit, second, note);
        for status in [build.status(), {
            build.end(1);
            build.status()
        }] {
            let counts = status.counts;
            assert_eq!((counts.asked, counts.cached), (3, 0));
            assert_eq!((counts.hit, counts.joined, counts.missed), (1, 1, 1));
            assert_eq!((counts.used, counts.saved_ms), (2, 2000));
        }
    }
}
