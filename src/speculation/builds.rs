//! Builds as clients run them: which call belongs to which, and how each of its actions was
//! answered. Counts only; what is recorded is `record`'s business.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::callers::Caller;
use super::flights::FlightKey;
use super::record::Subaction;
use crate::cas::Digest;

/// How the client's question for an action was answered. Section 11 of the design has the words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// From the action cache, without primed's help.
    Cached,
    /// By a primed result.
    Hit,
    /// It attached to a speculative execution in flight.
    Joined,
    /// It had to execute the action itself.
    Missed,
}

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
    pub caller: Caller,
    /// Milliseconds since 1970.
    pub started_unix_ms: i64,
    /// Milliseconds since 1970; `None` while it runs.
    pub ended_unix_ms: Option<i64>,
    /// When it was last heard of.
    pub last_call: Instant,
    /// What to record of it.
    pub subactions: HashMap<FlightKey, Subaction>,
    /// By a hash: there can be many, and nothing but their number counts.
    asked: HashMap<u64, Asked>,
    hasher: RandomState,
    tally: Tally,
    saved: Duration,
    /// Results that were primed for it.
    pub primed: u64,
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
    pub fn new(number: u64, caller: Caller, now_unix_ms: i64) -> Self {
        Build {
            number,
            id: uuid::Uuid::now_v7().to_string(),
            caller,
            started_unix_ms: now_unix_ms,
            ended_unix_ms: None,
            last_call: Instant::now(),
            subactions: HashMap::new(),
            asked: HashMap::new(),
            hasher: RandomState::new(),
            tally: Tally::default(),
            saved: Duration::ZERO,
            primed: 0,
        }
    }

    /// Whether any action was asked for.
    pub fn has_asked(&self) -> bool {
        self.tally.all() > 0
    }

    /// Counts an answer. `saved` is what primed spared the client. The first answer counts, but
    /// an action that was missed may still be joined.
    pub fn count(&mut self, key: &FlightKey, asked: Asked, saved: Duration) {
        let key = self.hasher.hash_one(key);
        match self.asked.get(&key) {
            None if self.asked.len() >= MAX_ASKED => return,
            None => {}
            Some(Asked::Missed) if asked == Asked::Joined => self.tally.missed -= 1,
            Some(_) => return,
        }
        *self.tally.of(asked) += 1;
        self.asked.insert(key, asked);
        self.saved += saved;
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

    /// Ends it, and gives away what is to be recorded. Only what `status` needs is kept.
    pub fn end(&mut self, now_unix_ms: i64) -> HashMap<FlightKey, Subaction> {
        self.ended_unix_ms = Some(now_unix_ms);
        self.asked = HashMap::new();
        std::mem::take(&mut self.subactions)
    }

    /// What `primed status` shows of it.
    pub fn status(&self) -> BuildStatus {
        let Tally {
            cached,
            hit,
            joined,
            missed,
        } = self.tally;
        BuildStatus {
            id: self.id.clone(),
            parent: match self.caller.action {
                Some(_) => "action",
                None => "invocation",
            },
            label: self.caller.label(),
            started_unix_ms: self.started_unix_ms,
            ended_unix_ms: self.ended_unix_ms,
            asked: self.tally.all(),
            cached,
            hit,
            joined,
            missed,
            primed: self.primed,
            used: hit + joined,
            saved_ms: u64::try_from(self.saved.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

/// One build in `primed status`.
#[derive(Clone, Debug, Serialize)]
pub struct BuildStatus {
    /// Differs for each build.
    pub id: String,
    /// Kind of the parent: `invocation` or `action`.
    pub parent: &'static str,
    /// For people.
    pub label: String,
    /// Milliseconds since 1970.
    pub started_unix_ms: i64,
    /// Milliseconds since 1970; `None` while it runs.
    pub ended_unix_ms: Option<i64>,
    /// Distinct actions that the client asked for.
    pub asked: u64,
    /// Of these, answered from the action cache without primed's help.
    pub cached: u64,
    /// Answered by a primed result.
    pub hit: u64,
    /// Attached to a speculative execution in flight.
    pub joined: u64,
    /// Left to the client.
    pub missed: u64,
    /// Results that were primed for it.
    pub primed: u64,
    /// Of these, how many it used.
    pub used: u64,
    /// Recorded execution time of hits, and the elapsed part of joins.
    pub saved_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::speculation::callers::Callers;
    use crate::speculation::observation::CallOrigin;
    use crate::workspace::peer::{Peer, PeerOrigin};
    use std::sync::Arc;

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
        let mut build = Build::new(1, caller, 0);
        assert!(!build.has_asked());
        let second = Duration::from_secs(1);
        build.count(&key("a"), Asked::Missed, Duration::ZERO);
        build.count(&key("a"), Asked::Joined, second);
        build.count(&key("b"), Asked::Missed, Duration::ZERO);
        build.count(&key("b"), Asked::Cached, Duration::ZERO);
        build.count(&key("c"), Asked::Hit, second);
        build.count(&key("c"), Asked::Hit, second);
        for status in [build.status(), {
            build.end(1);
            build.status()
        }] {
            assert_eq!((status.asked, status.cached), (3, 0));
            assert_eq!((status.hit, status.joined, status.missed), (1, 1, 1));
            assert_eq!((status.used, status.saved_ms), (2, 2000));
        }
    }
}
