//! Which adapted actions are executed: those that are worth it, and those that others need which are.

use std::collections::{HashMap, HashSet};

use super::super::instantiate::Adapted;
use super::super::resolve::Node;
use super::super::uses::RETIRES;
use super::super::verdict::{Adaptation, Outlook};
use super::super::worth::Worth;
use super::{Plan, PlannedAction, Ready};
use crate::speculation::flights::FlightKey;
use crate::speculation::flights::left_out::LeftOut;
use crate::speculation::records::parent::WeakKey;
use crate::speculation::records::prediction::Prediction;

impl Plan {
    /// The predictions that are awaited as `key` and not executed, each with its parent.
    pub fn left_out(&self, key: &FlightKey) -> Vec<(WeakKey, Prediction)> {
        let nodes = self.flying.get(key).into_iter().flatten();
        let nodes = nodes.filter(|node| self.left_out.contains_key(node));
        let actions = nodes.map(|node| &self.actions[*node]);
        let named = actions.filter_map(|action| {
            let prediction = Prediction::of(&action.base)?;
            Some((self.keys[action.parent], prediction))
        });
        named.collect()
    }

    /// Takes in that other counts of what was wasted hold. Returns what is worth it now.
    pub fn judge_anew(&mut self, worth: Worth) -> Vec<Ready> {
        self.subject.worth = worth;
        for action in &mut self.actions {
            let parent = self.keys[action.parent];
            action.wasted = self.subject.worth.wasted(parent, &action.base);
        }
        let back = self.worthwhile(Vec::new());
        self.in_order(back)
    }

    /// Whom among the adapted, and those that were left out before, it is worth it to execute. The
    /// others are left out.
    pub(super) fn worthwhile(
        &mut self,
        adapted: Vec<(Node, Box<Adapted>)>,
    ) -> Vec<(Node, Box<Adapted>)> {
        let before = std::mem::take(&mut self.left_out);
        let is_new: HashSet<Node> = adapted.iter().map(|(node, _)| *node).collect();
        let mut needed = HashMap::new();
        let mut worthwhile = Vec::new();
        let mut to_say = HashMap::new();
        for (node, adapted) in adapted.into_iter().chain(before) {
            let verdict = self.verdict_on(node);
            let needed = verdict.is_none() || self.is_needed(node, &mut needed);
            if !needed {
                self.left_out.insert(node, adapted);
            } else {
                worthwhile.push((node, adapted));
            }
            if needed != is_new.contains(&node) {
                to_say.insert(node, verdict.filter(|_| !needed));
            }
        }
        self.say_left_out(to_say);
        worthwhile
    }

    /// Why an action is not executed for its own sake.
    fn verdict_on(&self, node: Node) -> Option<LeftOut> {
        let PlannedAction { base, wasted, .. } = &self.actions[node];
        self.subject.worth.judge(*wasted, base.duration)
    }

    /// Whether an action that waits for this one is executed for its own sake. What is retired is
    /// executed only for one that has never been wasted: another, left out whenever it was cheap,
    /// may not have been counted as often as it was in vain.
    fn is_needed(&self, node: Node, known: &mut HashMap<Node, bool>) -> bool {
        if let Some(known) = known.get(&node) {
            return *known;
        }
        // Actions that wait for each other, which no build asks for, need nothing.
        known.insert(node, false);
        let mut dependents = self.dependents[node].iter();
        let is_retired = self.actions[node].wasted >= RETIRES;
        let needed = dependents.any(|dependent| {
            let may_want = !is_retired || self.actions[*dependent].wasted == 0;
            may_want && self.verdict_on(*dependent).is_none() || self.is_needed(*dependent, known)
        });
        known.insert(node, needed);
        needed
    }

    /// Says of adapted actions whether they are executed.
    fn say_left_out(&mut self, mut to_say: HashMap<Node, Option<LeftOut>>) {
        if to_say.is_empty() {
            return;
        }
        for verdict in &mut self.verdicts {
            let place = (verdict.parent, verdict.base.digest);
            if let Outlook::Adapted(adaptation) = &mut verdict.outlook
                && let Some(node) = self.producers.get(&place)
                && let Some(left_out) = to_say.remove(node)
            {
                adaptation.left_out = left_out;
            }
        }
        // Of the others it was told before what they have become.
        for (node, left_out) in to_say {
            let Some(action) = self.adapted.get(&node).copied() else {
                continue;
            };
            let adaptation = Adaptation {
                key: self.flight(node, action),
                changes: Vec::new(),
                changes_left_out: 0,
                after: self.after(node),
                left_out,
            };
            self.say(node, Outlook::Adapted(adaptation));
        }
    }
}
