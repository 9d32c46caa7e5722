//! The graph of recorded actions: nodes are base actions, edges ACTION overlays. It says what can
//! be instantiated now, takes in what has completed, and orders what is ready by the longest
//! recorded time still below it. A plan is pure: it calls nobody and knows no clock.

mod learning;
mod order;
mod selection;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::instantiate::{Adapted, Instantiation, Instantiator, Task, Texts, Unadaptable};
use super::known::Known;
use super::resolve::{Node, Resolver};
use super::subject::{PlannedParent, Share, Subject};
use super::verdict::{Adaptation, MAX_CHANGES, Outlook, Verdict};
use crate::cas::Digest;
use crate::cas::outputs::{Outputs, find_output};
use crate::speculation::flights::{FlightKey, Urgency};
use crate::speculation::records::parent::{BaseAction, Parent, WeakKey};

/// Outputs of adapted actions, of this plan and those before it.
pub type Results = HashMap<FlightKey, Outputs>;

/// The adaptation of recorded actions to what is known now.
pub struct Plan {
    subject: Subject,
    keys: Vec<WeakKey>,
    /// See `Resolver::expected`.
    expected: HashSet<WeakKey>,
    texts: Vec<Texts>,
    actions: Vec<PlannedAction>,
    producers: HashMap<(WeakKey, Digest), Node>,
    states: Vec<State>,
    dependents: Vec<Vec<Node>>,
    critical_paths: Vec<Duration>,
    instantiator: Instantiator,
    flying: HashMap<FlightKey, Vec<Node>>,
    unchanged: Vec<Node>,
    unadaptable: Vec<(Digest, Unadaptable)>,
    /// What each action was adapted to.
    adapted: HashMap<Node, Digest>,
    /// What actions have waited for.
    waited: HashMap<Node, Arc<[Node]>>,
    /// Adapted, and not executed.
    left_out: BTreeMap<Node, Box<Adapted>>,
    verdicts: Vec<Verdict>,
}

struct PlannedAction {
    base: Arc<BaseAction>,
    /// Index of its parent.
    parent: usize,
    command: Option<Bytes>,
    /// How many executions of it in a row were wasted.
    wasted: u8,
}

enum State {
    /// Adapted only if somebody waits for it, and nobody does yet.
    Idle,
    /// Waits for this many others.
    Waiting(usize),
    /// Adapted; its result is awaited.
    Flying,
    /// Its outputs are known: sorted by path.
    Done(Outputs),
    /// It cannot be adapted as far as is known, or it failed; what depends on it waits for ever.
    Stuck,
}

/// An action that is ready to be executed.
#[derive(Clone, Debug)]
pub struct Ready {
    /// What it is executed as.
    pub key: FlightKey,
    /// The adapted action with what it needs.
    pub adapted: Box<Adapted>,
    /// Its place in the lane.
    pub urgency: Urgency,
    /// How long it took when it was recorded; zero if that is not known.
    pub recorded: Duration,
}

impl Plan {
    /// A plan that adapts `subject`'s actions to what it knows.
    pub fn new(subject: Subject) -> Self {
        let keys: Vec<WeakKey> = subject
            .parents
            .iter()
            .map(|planned| planned.parent.identity.weak_key())
            .collect();
        let mut actions = Vec::new();
        for (index, planned) in subject.parents.iter().enumerate() {
            let mut bases: Vec<_> = planned.parent.actions.values().cloned().collect();
            bases.sort_by_key(|base| (base.order, base.digest));
            actions.extend(bases.into_iter().map(|base| PlannedAction {
                command: command(&base, &subject.commands),
                wasted: subject.worth.wasted(keys[index], &base),
                parent: index,
                base,
            }));
        }
        let producers = actions.iter().enumerate();
        let producers = producers
            .map(|(node, action)| ((keys[action.parent], action.base.digest), node))
            .collect();
        let texts = subject.parents.iter().zip(&keys);
        let texts = texts
            .map(|(planned, key)| texts_now(&planned.parent, *key, &subject.known))
            .collect();
        let unasked = subject.parents.iter().zip(&keys);
        let unasked = unasked.filter(|(planned, key)| {
            planned.parent.executed.is_some() && !subject.known.parents.contains_key(key)
        });
        let expected = unasked.clone();
        let expected = expected.filter(|(planned, _)| planned.share == Share::Whole);
        let text_targets = unasked
            .filter(|(planned, _)| !planned.parent.text_roots.is_empty())
            .flat_map(|(planned, _)| planned.parent.overlays.iter())
            .filter(|(_, origin)| origin.parent().is_some())
            .map(|(target, _)| *target);
        let state = |action: &PlannedAction| match subject.parents[action.parent].share {
            Share::Whole => State::Waiting(0),
            Share::OnDemand => State::Idle,
        };
        Plan {
            states: actions.iter().map(state).collect(),
            dependents: vec![Vec::new(); actions.len()],
            critical_paths: actions.iter().map(|action| action.base.duration).collect(),
            producers,
            texts,
            actions,
            expected: expected.map(|(_, key)| *key).collect(),
            instantiator: Instantiator::new(text_targets.collect()),
            keys,
            subject,
            flying: HashMap::new(),
            unchanged: Vec::new(),
            unadaptable: Vec::new(),
            adapted: HashMap::new(),
            waited: HashMap::new(),
            left_out: BTreeMap::new(),
            verdicts: Vec::new(),
        }
    }

    /// Whether it is about these parents and what is known of them now.
    pub fn is_about(&self, parents: &[PlannedParent], known: &Known) -> bool {
        let planned = &self.subject.parents;
        let same = |(one, other): (&PlannedParent, &PlannedParent)| {
            Arc::ptr_eq(&one.parent, &other.parent) && one.share == other.share
        };
        self.subject.known == *known
            && planned.len() == parents.len()
            && planned.iter().zip(parents).all(same)
    }

    /// Instantiates whatever waits for nothing. `results` are outputs of adapted actions that are
    /// known already, from an earlier plan.
    pub fn start(&mut self, results: &Results) -> Vec<Ready> {
        let wanted = |node: &Node| !matches!(self.states[*node], State::Idle);
        let nodes = (0..self.actions.len()).filter(wanted).collect();
        let adapted = self.advance(nodes, results);
        let adapted = self.worthwhile(adapted);
        self.find_critical_paths();
        self.in_order(adapted)
    }

    /// Takes in the outputs of an adapted action, or that there will be none.
    pub fn complete(
        &mut self,
        key: &FlightKey,
        outputs: Option<Outputs>,
        results: &Results,
    ) -> Vec<Ready> {
        let mut released = Vec::new();
        for node in self.flying.remove(key).unwrap_or_default() {
            match &outputs {
                Some(outputs) => self.finish(node, outputs.clone(), &mut released),
                None => self.states[node] = State::Stuck,
            }
            self.left_out.remove(&node);
        }
        let adapted = self.advance(released, results);
        let adapted = self.worthwhile(adapted);
        self.in_order(adapted)
    }

    /// Whether the result of `key` is awaited.
    pub fn awaits(&self, key: &FlightKey) -> bool {
        self.flying.contains_key(key)
    }

    /// The adapted actions whose results are awaited.
    pub fn awaited(&self) -> impl Iterator<Item = &FlightKey> {
        self.flying.keys()
    }

    /// The recorded form of an awaited action, and the weak key of its parent.
    pub fn recorded(&self, key: &FlightKey) -> Option<(&BaseAction, WeakKey)> {
        let action = &self.actions[*self.flying.get(key)?.first()?];
        Some((&action.base, self.keys[action.parent]))
    }

    /// The base actions of which it is known that they are what they were.
    pub fn unchanged(&self) -> impl Iterator<Item = &Arc<BaseAction>> {
        self.unchanged.iter().map(|node| &self.actions[*node].base)
    }

    /// The policy for a parent.
    fn resolver(&self, parent: usize) -> Resolver<'_> {
        Resolver {
            key: self.keys[parent],
            parent: &self.subject.parents[parent].parent,
            known: &self.subject.known,
            expected: &self.expected,
            trees: &self.subject.trees,
            producers: &self.producers,
        }
    }

    /// The base actions that could not be adapted since the last call, with the reasons.
    pub fn take_unadaptable(&mut self) -> Vec<(Digest, Unadaptable)> {
        std::mem::take(&mut self.unadaptable)
    }

    /// What was said of recorded actions since the last call. The last word counts.
    pub fn take_verdicts(&mut self) -> Vec<Verdict> {
        std::mem::take(&mut self.verdicts)
    }

    fn say(&mut self, node: Node, outlook: Outlook) {
        let action = &self.actions[node];
        self.verdicts.push(Verdict {
            parent: self.keys[action.parent],
            base: action.base.clone(),
            outlook,
        });
    }

    /// What an action has waited for, less what turned out to be as it was.
    fn after(&self, node: Node) -> Vec<Digest> {
        let waited = self.waited.get(&node).map_or(&[][..], |nodes| nodes);
        let adapted = waited.iter().filter_map(|node| self.adapted.get(node));
        adapted.copied().collect()
    }

    /// Instantiates `nodes` and whatever that releases or calls for.
    fn advance(&mut self, nodes: Vec<Node>, results: &Results) -> Vec<(Node, Box<Adapted>)> {
        let mut ready = Vec::new();
        let mut waiting = Vec::new();
        let mut released = nodes;
        released.reverse();
        while let Some(node) = released.pop() {
            match self.instantiate(node) {
                Ok(Instantiation::Unchanged) => {
                    self.unchanged.push(node);
                    self.say(node, Outlook::Unchanged);
                    let outputs = self.actions[node].base.outputs.clone();
                    self.finish(node, outputs, &mut released);
                }
                Ok(Instantiation::Waits(nodes)) => {
                    self.states[node] = State::Waiting(nodes.len());
                    self.waited.insert(node, nodes.clone());
                    waiting.push(node);
                    for producer in nodes.iter() {
                        self.dependents[*producer].push(node);
                        if let State::Idle = self.states[*producer] {
                            self.states[*producer] = State::Waiting(0);
                            released.push(*producer);
                        }
                    }
                }
                // Another plan will know more.
                Ok(Instantiation::Awaits(path)) => {
                    self.states[node] = State::Stuck;
                    let path = path.map(|path| path.to_string());
                    self.say(node, Outlook::Unresolved(path));
                }
                Ok(Instantiation::Adapted(adapted)) => {
                    let key = self.flight(node, adapted.action);
                    self.adapted.insert(node, adapted.action);
                    let (changes, changes_left_out) = adapted.changes(MAX_CHANGES);
                    let adaptation = Adaptation {
                        key: key.clone(),
                        changes,
                        changes_left_out,
                        after: self.after(node),
                        left_out: None,
                    };
                    self.say(node, Outlook::Adapted(adaptation));
                    match results.get(&key) {
                        Some(outputs) => self.finish(node, outputs.clone(), &mut released),
                        None => {
                            self.states[node] = State::Flying;
                            self.flying.entry(key).or_default().push(node);
                            ready.push((node, adapted));
                        }
                    }
                }
                Err(reason) => {
                    self.states[node] = State::Stuck;
                    let base = self.actions[node].base.digest;
                    self.say(
                        node,
                        Outlook::Unadaptable(reason.word(), reason.to_string()),
                    );
                    self.unadaptable.push((base, reason));
                }
            }
        }
        // All that they wait for has been looked at by now.
        for node in waiting {
            if let State::Waiting(1..) = self.states[node] {
                self.say(node, Outlook::Waits(self.after(node)));
            }
        }
        ready
    }

    fn flight(&self, node: Node, action: Digest) -> FlightKey {
        let planned = &self.subject.parents[self.actions[node].parent];
        FlightKey {
            instance: planned.parent.identity.instance.clone(),
            action,
        }
    }

    fn instantiate(&mut self, node: Node) -> Result<Instantiation, Unadaptable> {
        let action = &self.actions[node];
        let resolver = Resolver {
            key: self.keys[action.parent],
            parent: &self.subject.parents[action.parent].parent,
            known: &self.subject.known,
            expected: &self.expected,
            trees: &self.subject.trees,
            producers: &self.producers,
        };
        self.instantiator.instantiate(&Task {
            node,
            base: &action.base,
            resolver: &resolver,
            trees: &self.subject.trees,
            texts: &self.texts[action.parent],
            command: action.command.as_ref(),
            output: output_of(&self.states),
        })
    }

    fn finish(&mut self, node: Node, mut outputs: Outputs, released: &mut Vec<Node>) {
        outputs.sort_unstable();
        self.states[node] = State::Done(outputs);
        for dependent in std::mem::take(&mut self.dependents[node]) {
            if let State::Waiting(on) = &mut self.states[dependent] {
                *on = on.saturating_sub(1);
                if *on == 0 {
                    released.push(dependent);
                }
            }
        }
    }
}

/// What an action has written to a path; `None` while it is not done.
fn output_of(states: &[State]) -> impl Fn(Node, &str) -> Option<Option<Digest>> {
    |node, path| match &states[node] {
        State::Done(outputs) => Some(find_output(outputs, path)),
        _ => None,
    }
}

/// The encoded command of an action with digest-valued text.
fn command(base: &BaseAction, commands: &HashMap<Digest, Bytes>) -> Option<Bytes> {
    if base.texts.is_empty() {
        return None;
    }
    let parts = base.parts().ok()?;
    commands.get(&parts.command).cloned()
}

/// What became of the digest-valued text of a parent.
fn texts_now(parent: &Parent, key: WeakKey, known: &Known) -> Texts {
    let Some(executed) = &parent.executed else {
        return Texts::Replaced(HashMap::new());
    };
    match known.parents.get(&key) {
        None => Texts::Unknown(executed.texts.iter().cloned().collect()),
        Some(now) => {
            let pairs = executed.texts.iter().zip(now.texts.iter());
            let changed = pairs.filter(|(old, new)| old != new);
            Texts::Replaced(
                changed
                    .map(|(old, new)| (old.clone(), new.clone()))
                    .collect(),
            )
        }
    }
}
