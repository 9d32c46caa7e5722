//! Accounting: how a build's questions were answered, what priming did for it, and what that cost.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::AddAssign;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::millis;

/// Leads that are kept of one build; further ones do not count.
const MAX_LEADS: usize = 10_000;

/// How the client's question for an action was answered.
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

/// What priming did for one build, or for several.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Accounting {
    /// Of what was asked for and not cached, the part that priming answered; `None` if there was
    /// nothing.
    pub recall: Option<f64>,
    /// Of what was primed, the part that was used; `None` if nothing was primed.
    pub precision: Option<f64>,
    /// How long a primed result had been there before its first use: the median, in milliseconds.
    pub lead_p50_ms: Option<u64>,
    /// The same: nineteen of twenty were no longer there.
    pub lead_p95_ms: Option<u64>,
    /// Execution time of what was executed ahead of time and that nobody used.
    pub wasted_ms: u64,
    /// Bytes that adaptation added to the CAS.
    pub added_bytes: u64,
    /// Bytes of the inputs of what was recorded of it, each digest once.
    pub input_bytes: u64,
    /// How long recording and generation took.
    pub generation_ms: u64,
    /// The longest time from a trigger until all that it made ready was submitted.
    pub submission_ms: u64,
    /// How many recorded actions could not be adapted, by reason.
    pub unadaptable: Reasons,
    /// Of how many it is not known what they read, by reason.
    pub unresolved: Reasons,
    /// How many primed results nobody has used, by reason; known when it has ended.
    pub unused: Reasons,
}

/// How many there are of each reason.
pub type Reasons = BTreeMap<Cow<'static, str>, u64>;

/// Adds what others have counted.
fn add_reasons(to: &mut Reasons, other: &Reasons) {
    for (reason, count) in other {
        *to.entry(reason.clone()).or_default() += count;
    }
}

/// What was not to be had of the predictions for a build.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shortfall {
    /// Recorded actions that could not be adapted.
    pub unadaptable: Reasons,
    /// Of which it is not known what they read.
    pub unresolved: Reasons,
    /// Primed results that nobody has used.
    pub unused: Reasons,
}

/// What was done for a build beside executing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effort {
    /// Bytes that adaptation added to the CAS.
    pub added_bytes: u64,
    /// Bytes of the recorded inputs.
    pub input_bytes: u64,
    /// Recording and generation.
    pub generation: Duration,
    /// The longest time from a trigger to the last submission.
    pub submission: Duration,
}

impl AddAssign for Effort {
    fn add_assign(&mut self, other: Self) {
        self.added_bytes += other.added_bytes;
        self.input_bytes += other.input_bytes;
        self.generation += other.generation;
        self.submission = self.submission.max(other.submission);
    }
}

impl Accounting {
    /// Of a build with these counts. What it cost beside that is added by those who know.
    pub fn of(counts: &Counts, leads: &Leads, wasted: Duration) -> Self {
        Accounting {
            recall: ratio(counts.used, counts.asked - counts.cached),
            precision: ratio(counts.used, counts.primed),
            lead_p50_ms: leads.percentile(50),
            lead_p95_ms: leads.percentile(95),
            wasted_ms: millis(wasted),
            ..Accounting::default()
        }
    }

    /// Adds what was done for it beside executing.
    pub fn spend(&mut self, effort: &Effort) {
        self.added_bytes += effort.added_bytes;
        self.input_bytes += effort.input_bytes;
        self.generation_ms += millis(effort.generation);
        self.submission_ms = self.submission_ms.max(millis(effort.submission));
    }

    /// Says what was not to be had.
    pub fn fall_short(&mut self, shortfall: Shortfall) {
        self.unadaptable = shortfall.unadaptable;
        self.unresolved = shortfall.unresolved;
        self.unused = shortfall.unused;
    }

    /// Adds what another build cost, and what was not to be had there.
    fn add_costs(&mut self, other: &Accounting) {
        self.wasted_ms += other.wasted_ms;
        self.added_bytes += other.added_bytes;
        self.input_bytes += other.input_bytes;
        self.generation_ms += other.generation_ms;
        self.submission_ms = self.submission_ms.max(other.submission_ms);
        add_reasons(&mut self.unadaptable, &other.unadaptable);
        add_reasons(&mut self.unresolved, &other.unresolved);
        add_reasons(&mut self.unused, &other.unused);
    }
}

/// How a build's questions for actions were answered, or those of several builds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// Distinct actions of each build that were asked for.
    pub asked: u64,
    /// Of these, answered from the action cache without primed's help.
    pub cached: u64,
    /// Answered by a primed result.
    pub hit: u64,
    /// Attached to a speculative execution in flight.
    pub joined: u64,
    /// Left to the client.
    pub missed: u64,
    /// Results that were primed.
    pub primed: u64,
    /// Of these, how many were used.
    pub used: u64,
    /// Execution time that clients were spared, in milliseconds: that recorded of hits, and the
    /// elapsed part of joins.
    pub saved_ms: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.asked += other.asked;
        self.cached += other.cached;
        self.hit += other.hit;
        self.joined += other.joined;
        self.missed += other.missed;
        self.primed += other.primed;
        self.used += other.used;
        self.saved_ms += other.saved_ms;
    }
}

/// All builds that are known, as if they were one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// How many builds there are.
    pub count: u64,
    /// What they asked for, together.
    #[serde(flatten)]
    pub counts: Counts,
    /// The ratios; leads are the builds' own and are not added up.
    #[serde(flatten)]
    pub accounting: Accounting,
}

impl Totals {
    /// Of `builds`, whose leads are `leads`.
    pub fn of<'a>(builds: impl IntoIterator<Item = &'a BuildStatus>, leads: &Leads) -> Self {
        let mut totals = Totals::default();
        for build in builds {
            totals.count += 1;
            totals.counts += build.counts;
            totals.accounting.add_costs(&build.accounting);
        }
        let ratios = Accounting::of(&totals.counts, leads, Duration::ZERO);
        totals.accounting.recall = ratios.recall;
        totals.accounting.precision = ratios.precision;
        totals.accounting.lead_p50_ms = ratios.lead_p50_ms;
        totals.accounting.lead_p95_ms = ratios.lead_p95_ms;
        totals
    }
}

/// How long primed results had been there before they were used.
#[derive(Clone, Debug, Default)]
pub struct Leads(Vec<Duration>);

impl Leads {
    /// Adds those there are.
    pub fn extend(&mut self, leads: impl IntoIterator<Item = Duration>) {
        let room = MAX_LEADS.saturating_sub(self.0.len());
        self.0.extend(leads.into_iter().take(room));
    }

    /// Adds all of another build.
    pub fn merge(&mut self, other: &Leads) {
        self.0.extend_from_slice(&other.0);
    }

    /// The least lead, in milliseconds, that this many of a hundred do not exceed.
    fn percentile(&self, percent: usize) -> Option<u64> {
        let mut leads = self.0.clone();
        let rank = (leads.len() * percent).div_ceil(100).checked_sub(1)?;
        let (_, lead, _) = leads.select_nth_unstable(rank);
        Some(millis(*lead))
    }
}

/// `part` of `whole`, at most all of it: what an earlier build had primed may be used, too.
fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| (part as f64 / whole as f64).min(1.0))
}

/// One build in `primed status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BuildStatus {
    /// Differs for each build.
    pub id: String,
    /// Kind of the parent: `invocation`, `action` or `run`.
    pub parent: Cow<'static, str>,
    /// For people.
    pub label: String,
    /// Milliseconds since 1970.
    pub started_unix_ms: i64,
    /// Milliseconds since 1970; `None` while it runs.
    pub ended_unix_ms: Option<i64>,
    /// What it asked for, and what was primed for it.
    #[serde(flatten)]
    pub counts: Counts,
    /// What that makes of it.
    #[serde(flatten)]
    pub accounting: Accounting,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_leads_that_occurred() {
        let mut leads = Leads::default();
        assert_eq!(leads.percentile(50), None);
        leads.extend([40, 10, 30, 20].map(Duration::from_millis));
        assert_eq!(leads.percentile(50), Some(20));
        assert_eq!(leads.percentile(95), Some(40));
    }

    #[test]
    fn totals_add_up_what_builds_cost_and_keep_the_longest_submission() {
        let build = |seconds, reason: &'static str| {
            let mut accounting = Accounting::default();
            accounting.spend(&Effort {
                added_bytes: 10,
                input_bytes: 1000,
                generation: Duration::from_secs(seconds),
                submission: Duration::from_secs(seconds),
            });
            accounting.fall_short(Shortfall {
                unused: Reasons::from([("not_asked".into(), 1), (reason.into(), 2)]),
                ..Shortfall::default()
            });
            accounting
        };
        let mut totals = Accounting::default();
        totals.add_costs(&build(1, "superseded"));
        totals.add_costs(&build(2, "asked_otherwise"));
        assert_eq!((totals.added_bytes, totals.input_bytes), (20, 2000));
        assert_eq!((totals.generation_ms, totals.submission_ms), (3000, 2000));
        let unused: Vec<_> = totals.unused.values().copied().collect();
        assert_eq!(unused, [2, 2, 2], "{:?}", totals.unused);
    }

    #[test]
    fn ratios_of_nothing_are_none_and_no_more_than_all_of_it_is_used() {
        let nothing = Accounting::of(&Counts::default(), &Leads::default(), Duration::ZERO);
        assert_eq!(nothing, Accounting::default());
        let counts = Counts {
            asked: 10,
            cached: 2,
            used: 6,
            primed: 4,
            ..Counts::default()
        };
        let some = Accounting::of(&counts, &Leads::default(), Duration::from_secs(2));
        assert_eq!((some.recall, some.precision), (Some(0.75), Some(1.0)));
        assert_eq!(some.wasted_ms, 2000);
    }
}
