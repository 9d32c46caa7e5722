//! In which order adapted actions are executed.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::time::Duration;

use super::super::instantiate::Adapted;
use super::super::resolve::Node;
use super::{Plan, Ready};
use crate::speculation::flights::Urgency;

/// Of two paths to the end of the build, one of at least this part of the other is nearly as long:
/// what executions of the same take differs by as much from build to build.
const NEARLY: f64 = 0.75;

impl Plan {
    /// The longest recorded time from each node to the end of what depends on it.
    pub(super) fn find_critical_paths(&mut self) {
        let mut producers_of: Vec<Vec<Node>> = vec![Vec::new(); self.actions.len()];
        let mut open: Vec<usize> = vec![0; self.actions.len()];
        for (producer, dependents) in self.dependents.iter().enumerate() {
            open[producer] = dependents.len();
            for dependent in dependents {
                producers_of[*dependent].push(producer);
            }
        }
        let mut leaves: Vec<Node> = (0..open.len()).filter(|node| open[*node] == 0).collect();
        while let Some(node) = leaves.pop() {
            for producer in std::mem::take(&mut producers_of[node]) {
                let through = self.actions[producer].base.duration + self.critical_paths[node];
                let longest = &mut self.critical_paths[producer];
                *longest = through.max(*longest);
                open[producer] -= 1;
                if open[producer] == 0 {
                    leaves.push(producer);
                }
            }
        }
    }

    /// The most urgent first; two base actions that became the same adapted one count once. No two
    /// executions take equally long, so what takes nearly as long as the longest counts as equal to
    /// it, and the next longest begins what comes after that.
    pub(super) fn in_order(&self, adapted: Vec<(Node, Box<Adapted>)>) -> Vec<Ready> {
        let mut adapted = adapted;
        adapted.sort_by_key(|(node, _)| Reverse(self.critical_paths[*node]));
        let mut longest = Duration::MAX;
        let mut seen = HashSet::new();
        let mut ready: Vec<Ready> = adapted
            .into_iter()
            .map(|(node, adapted)| {
                if self.critical_paths[node] < longest.mul_f64(NEARLY) {
                    longest = self.critical_paths[node];
                }
                Ready {
                    key: self.flight(node, adapted.action),
                    adapted,
                    recorded: self.actions[node].base.duration,
                    urgency: Urgency::new(longest, self.actions[node].base.order),
                }
            })
            .filter(|ready| seen.insert(ready.key.clone()))
            .collect();
        ready.sort_by_key(|ready| ready.urgency);
        ready
    }
}
