//! Budgets: what priming may spend on one build, and in an hour. They are for what runs away: a
//! generator that changes a core header with each build, a workspace that never comes to rest.
//! What is about to be executed is reserved by its recorded time, and settled by what it took.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::config::BudgetLimits;
use crate::speculation::records::parent::WeakKey;

/// What an hourly budget is about.
const HOUR: Duration = Duration::from_secs(3600);
/// Builds whose spending is remembered; those that began first are forgotten.
const REMEMBERED: usize = 256;

/// For whom something is spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Spender {
    /// For a parent whose build has not begun.
    Parent(WeakKey),
    /// For a build, by its number.
    Build(u64),
}

/// What was spent of all budgets.
#[derive(Debug, Default)]
pub struct Budgets {
    limits: BudgetLimits,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    spent: BTreeMap<Spender, Spent>,
    /// Of the last hour, oldest first.
    settled: VecDeque<(Instant, Duration)>,
    /// Of all that is not settled.
    reserved: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
struct Spent {
    actions: u64,
    /// Also what is reserved.
    time: Duration,
}

/// What one execution may take. Unless it is settled it has taken nothing.
#[derive(Debug)]
pub struct Reservation {
    budgets: Arc<Budgets>,
    spender: Spender,
    expected: Duration,
    taken: Option<(Duration, Instant)>,
}

impl Budgets {
    /// Budgets of which nothing is spent.
    pub fn new(limits: BudgetLimits) -> Arc<Self> {
        Arc::new(Budgets {
            limits,
            state: Mutex::default(),
        })
    }

    /// Reserves an execution that is expected to take so long.
    ///
    /// # Errors
    /// The flag whose budget has no room for it.
    pub fn reserve(
        self: &Arc<Self>,
        spender: Spender,
        expected: Duration,
        now: Instant,
    ) -> Result<Reservation, &'static str> {
        let mut state = self.state.lock();
        while let Some((at, _)) = state.settled.front()
            && now.duration_since(*at) >= HOUR
        {
            state.settled.pop_front();
        }
        let hour = state.settled.iter().map(|(_, time)| *time);
        let hour = hour.sum::<Duration>() + state.reserved + expected;
        let spent = state.spent.get(&spender).copied().unwrap_or_default();
        let BudgetLimits {
            build_actions,
            build_time,
            hour_time,
        } = self.limits;
        if build_actions.is_some_and(|most| spent.actions >= most) {
            return Err("--build-budget-actions");
        }
        if build_time.is_some_and(|most| spent.time + expected > most) {
            return Err("--build-budget-cpu");
        }
        if hour_time.is_some_and(|most| hour > most) {
            return Err("--hour-budget-cpu");
        }
        if state.spent.len() >= REMEMBERED && !state.spent.contains_key(&spender) {
            state.spent.pop_first();
        }
        let spent = state.spent.entry(spender).or_default();
        spent.actions += 1;
        spent.time += expected;
        state.reserved += expected;
        drop(state);
        Ok(Reservation {
            budgets: self.clone(),
            spender,
            expected,
            taken: None,
        })
    }

    /// A parent will be built in another form than the last time: what was spent on that is past.
    pub fn begin(&self, parent: WeakKey) {
        self.state.lock().spent.remove(&Spender::Parent(parent));
    }
}

impl Reservation {
    /// It was executed, and a worker was busy with it for so long.
    pub fn settle(mut self, time: Duration, now: Instant) {
        self.taken = Some((time, now));
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.budgets.state.lock();
        state.reserved = state.reserved.saturating_sub(self.expected);
        if let Some(spent) = state.spent.get_mut(&self.spender) {
            spent.time = spent.time.saturating_sub(self.expected);
            match self.taken {
                Some((time, _)) => spent.time += time,
                None => spent.actions = spent.actions.saturating_sub(1),
            }
        }
        if let (Some((time, now)), Some(_)) = (self.taken, self.budgets.limits.hour_time) {
            state.settled.push_back((now, time));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUILD: Spender = Spender::Build(1);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_build_may_execute_so_many_actions_and_what_took_nothing_does_not_count() {
        let budgets = Budgets::new(BudgetLimits {
            build_actions: Some(2),
            ..BudgetLimits::default()
        });
        let now = Instant::now();
        let reserve = |spender| budgets.reserve(spender, seconds(1), now);
        let first = reserve(BUILD).unwrap();
        reserve(BUILD).unwrap().settle(seconds(1), now);
        assert_eq!(reserve(BUILD).unwrap_err(), "--build-budget-actions");
        assert!(reserve(Spender::Build(2)).is_ok(), "each build has its own");
        drop(first);
        reserve(BUILD).unwrap().settle(seconds(1), now);
        assert!(reserve(BUILD).is_err());
    }

    #[test]
    fn time_is_reserved_as_recorded_and_settled_as_it_was() {
        let budgets = Budgets::new(BudgetLimits {
            build_time: Some(seconds(10)),
            ..BudgetLimits::default()
        });
        let now = Instant::now();
        let reserve = |expected| budgets.reserve(BUILD, seconds(expected), now);
        let first = reserve(8).unwrap();
        assert_eq!(reserve(3).unwrap_err(), "--build-budget-cpu");
        first.settle(seconds(5), now);
        let second = reserve(5).unwrap();
        assert!(reserve(1).is_err());
        second.settle(seconds(9), now);
        assert!(reserve(0).is_err(), "more was spent than there was");
    }

    #[test]
    fn what_was_spent_an_hour_ago_is_past() {
        let budgets = Budgets::new(BudgetLimits {
            hour_time: Some(seconds(10)),
            ..BudgetLimits::default()
        });
        let now = Instant::now();
        let reserve = |build, now| budgets.reserve(Spender::Build(build), seconds(6), now);
        reserve(1, now).unwrap().settle(seconds(6), now);
        let later = now + HOUR - seconds(1);
        assert_eq!(reserve(2, later).unwrap_err(), "--hour-budget-cpu");
        assert!(reserve(2, now + HOUR).is_ok());
    }

    #[test]
    fn a_parent_that_will_be_built_anew_has_a_new_budget() {
        let budgets = Budgets::new(BudgetLimits {
            build_actions: Some(1),
            ..BudgetLimits::default()
        });
        let parent = WeakKey([7; 32]);
        let now = Instant::now();
        let reserve = || budgets.reserve(Spender::Parent(parent), seconds(1), now);
        reserve().unwrap().settle(seconds(1), now);
        assert!(reserve().is_err());
        budgets.begin(parent);
        assert!(reserve().is_ok());
    }
}
