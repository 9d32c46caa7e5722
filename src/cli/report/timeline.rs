//! A build's page laid out in time: which of its calls and executions stand in which lane, and
//! which chain of them decided how long it took.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};

use serde::Serialize;

use crate::cli::build_page::{ActionPage, BuildPage};

/// The layout. Indexes are those of the page's actions.
#[derive(Debug, Serialize)]
pub struct Timeline {
    /// The first moment of all, in milliseconds since 1970.
    pub from_unix_ms: i64,
    /// The last one.
    pub to_unix_ms: i64,
    /// Calls of clients.
    pub client: Lanes,
    /// Executions ahead of time.
    pub speculative: Lanes,
    /// The chain that ends with the last answer, in the order of time.
    pub critical_path: Vec<usize>,
}

/// Rows, in none of which two things happen at once.
#[derive(Debug, Serialize)]
pub struct Lanes {
    /// How many.
    pub count: usize,
    /// The lane of each action, or `None` where there is nothing to draw.
    pub of_action: Vec<Option<usize>>,
}

/// From when to when, in milliseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub from: i64,
    pub to: i64,
}

impl Timeline {
    /// Lays out `page`.
    pub fn of(page: &BuildPage) -> Self {
        let latest = page.latest_unix_ms();
        let asked = spans(page, |action| asked_span(action, latest));
        let executed = spans(page, |action| executed_span(action, latest));
        let first = asked.iter().chain(&executed).flatten();
        let first = first.map(|span| span.from).min();
        Timeline {
            from_unix_ms: first.map_or(page.started_unix_ms, |at| at.min(page.started_unix_ms)),
            to_unix_ms: latest,
            critical_path: critical_path(page, &asked, &executed),
            client: Lanes::of(asked),
            speculative: Lanes::of(executed),
        }
    }
}

/// From the client's question to its answer; to `latest` while it waits.
pub fn asked_span(action: &ActionPage, latest: i64) -> Option<Span> {
    let asked = action.asked.as_ref()?;
    let from = asked.at_unix_ms;
    let to = asked.answered_unix_ms.unwrap_or(latest).max(from);
    Some(Span { from, to })
}

/// From the start of the execution ahead of time to its end; to `latest` while it runs.
pub fn executed_span(action: &ActionPage, latest: i64) -> Option<Span> {
    let primed = action.primed.as_ref()?;
    let from = primed.started_unix_ms?;
    let to = primed.ended_unix_ms.unwrap_or(latest).max(from);
    Some(Span { from, to })
}

fn spans(page: &BuildPage, of: impl Fn(&ActionPage) -> Option<Span>) -> Vec<Option<Span>> {
    page.actions.iter().map(of).collect()
}

impl Lanes {
    /// Puts each span, by its beginning, into the topmost lane that is free.
    fn of(spans: Vec<Option<Span>>) -> Self {
        let mut order: Vec<(Span, usize)> = spans
            .iter()
            .enumerate()
            .filter_map(|(index, span)| Some(((*span)?, index)))
            .collect();
        order.sort_unstable_by_key(|(span, index)| (span.from, span.to, *index));
        let mut of_action = vec![None; spans.len()];
        let mut busy = BinaryHeap::new();
        let mut free = BTreeSet::new();
        let mut count = 0;
        for (span, index) in order {
            while let Some(Reverse((until, lane))) = busy.peek().copied()
                && until <= span.from
            {
                busy.pop();
                free.insert(lane);
            }
            let lane = free.pop_first().unwrap_or_else(|| {
                count += 1;
                count - 1
            });
            // What took no time at all would else share its moment with the next.
            busy.push(Reverse((span.to.max(span.from + 1), lane)));
            of_action[index] = Some(lane);
        }
        Lanes { count, of_action }
    }
}

/// From the last answer back: before each action, of those that it waited for, the one that ended
/// last; where no record says what it waited for, the call that was answered last before it began.
fn critical_path(
    page: &BuildPage,
    asked: &[Option<Span>],
    executed: &[Option<Span>],
) -> Vec<usize> {
    let by_digest: HashMap<&str, usize> = page
        .actions
        .iter()
        .enumerate()
        .map(|(index, action)| (action.action.as_str(), index))
        .collect();
    // An answer that took as long as nothing held nobody up.
    let mut answers: Vec<(i64, usize)> = asked
        .iter()
        .enumerate()
        .filter_map(|(index, span)| Some(((*span)?.to, index)))
        .collect();
    answers.sort_unstable();
    let span = |index: usize| asked[index].or(executed[index]);
    let mut path = Vec::new();
    let mut next = answers.last().map(|(_, index)| *index);
    while let Some(index) = next {
        path.push(index);
        let Some(Span { from, .. }) = span(index) else {
            break;
        };
        let earlier = |candidate: usize| {
            let candidate = span(candidate)?;
            (candidate.to <= from && candidate.from < from).then_some(candidate.to)
        };
        let known = page.actions[index].primed.iter();
        let known = known
            .flat_map(|primed| &primed.after)
            .filter_map(|digest| by_digest.get(digest.as_str()).copied())
            .filter_map(|candidate| Some((earlier(candidate)?, candidate)))
            .max();
        next = known.map(|(_, candidate)| candidate).or_else(|| {
            let before = answers.partition_point(|(to, _)| *to <= from);
            let mut before = answers[..before].iter().rev().map(|(_, index)| *index);
            before.find(|candidate| earlier(*candidate).is_some())
        });
    }
    path.reverse();
    path
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::build_page::{AskedPage, PrimedPage};

    fn asked(name: &str, from: i64, to: i64) -> ActionPage {
        ActionPage {
            action: name.to_owned(),
            asked: Some(AskedPage {
                at_unix_ms: from,
                answered_unix_ms: Some(to),
                ..AskedPage::default()
            }),
            ..ActionPage::default()
        }
    }

    fn page(actions: Vec<ActionPage>) -> BuildPage {
        BuildPage {
            actions,
            ..BuildPage::default()
        }
    }

    #[test]
    fn nothing_overlaps_in_a_lane_and_lanes_are_used_again() {
        let page = page(vec![
            asked("a", 0, 10),
            asked("b", 5, 15),
            asked("c", 10, 20),
            asked("d", 12, 13),
            asked("e", 20, 20),
            asked("f", 20, 20),
        ]);
        let timeline = Timeline::of(&page);
        let lanes = [0, 1, 0, 2, 0, 1].map(Some);
        assert_eq!(timeline.client.of_action, lanes);
        assert_eq!(timeline.client.count, 3);
        assert_eq!(timeline.speculative.count, 0);
        assert_eq!((timeline.from_unix_ms, timeline.to_unix_ms), (0, 20));
    }

    #[test]
    fn the_critical_path_follows_what_an_action_waited_for_before_what_ended_last() {
        let mut link = asked("link", 30, 40);
        link.primed = Some(PrimedPage {
            after: vec!["a".to_owned(), "b".to_owned(), "unknown".to_owned()],
            ..PrimedPage::default()
        });
        let page = page(vec![
            asked("first", 0, 5),
            asked("a", 5, 10),
            asked("b", 6, 20),
            asked("other", 6, 29),
            link,
        ]);
        assert_eq!(Timeline::of(&page).critical_path, [0, 2, 4]);
    }

    #[test]
    fn the_critical_path_ends_even_where_times_make_no_sense() {
        let page = page(vec![
            asked("a", 10, 0),
            asked("b", 10, 10),
            asked("c", 10, 10),
        ]);
        assert_eq!(Timeline::of(&page).critical_path.len(), 1);
    }

    #[test]
    fn ten_thousand_actions_at_once_are_laid_out() {
        let page = page((0..10_000).map(|n| asked(&n.to_string(), 0, n)).collect());
        assert_eq!(Timeline::of(&page).client.count, 10_000);
    }
}
