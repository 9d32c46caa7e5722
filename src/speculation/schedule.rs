//! The graph of one parent's actions: nodes are base actions, edges ACTION overlays. It says what
//! can be instantiated now, takes in what has completed, and orders what is ready by the longest
//! recorded time still below it. Pure: it calls nobody and knows no clock.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::flights::Urgency;
use super::instantiate::{Adapted, Instantiation, Instantiator, Task, Unadaptable};
use super::parent::{BaseAction, Parent};
use super::resolve::{Node, Resolver, Sources};
use crate::cas::Digest;
use crate::cas::directories::Trees;

/// Files that an action wrote: paths relative to its input root.
pub type Outputs = Vec<(String, Digest)>;

/// The adaptation of one parent's actions to one state of its sources.
pub struct Plan {
    parent: Arc<Parent>,
    trees: Trees,
    sources: Sources,
    bases: Vec<Arc<BaseAction>>,
    producers: HashMap<Digest, Node>,
    states: Vec<State>,
    dependents: Vec<Vec<Node>>,
    critical_paths: Vec<Duration>,
    instantiator: Instantiator,
    flying: HashMap<Digest, Vec<Node>>,
    unadaptable: Vec<(Digest, Unadaptable)>,
}

enum State {
    /// Waits for this many others.
    Waiting(usize),
    /// Adapted; its result is awaited.
    Flying,
    /// Its outputs are known: sorted by path.
    Done(Outputs),
    /// It cannot be adapted, or it failed; what depends on it waits for ever.
    Stuck,
}

/// An action that is ready to be executed.
#[derive(Clone, Debug)]
pub struct Ready {
    /// The adapted action with what it needs.
    pub adapted: Adapted,
    /// Its place in the lane.
    pub urgency: Urgency,
}

impl Plan {
    /// A plan for `parent` in a workspace where its sources are as `sources` says.
    pub fn new(parent: Arc<Parent>, trees: Trees, sources: Sources) -> Self {
        let mut bases: Vec<_> = parent.actions.values().cloned().collect();
        bases.sort_by_key(|base| (base.order, base.digest));
        let producers = bases
            .iter()
            .enumerate()
            .map(|(node, base)| (base.digest, node))
            .collect();
        Plan {
            states: bases.iter().map(|_| State::Waiting(0)).collect(),
            dependents: vec![Vec::new(); bases.len()],
            critical_paths: bases.iter().map(|base| base.duration).collect(),
            producers,
            bases,
            parent,
            trees,
            sources,
            instantiator: Instantiator::default(),
            flying: HashMap::new(),
            unadaptable: Vec::new(),
        }
    }

    /// The records that this plan adapts.
    pub fn parent(&self) -> &Arc<Parent> {
        &self.parent
    }

    /// The state of the sources that it adapts them to.
    pub fn sources(&self) -> &Sources {
        &self.sources
    }

    /// Instantiates whatever waits for nothing. `results` are outputs of adapted actions that are
    /// known already, from an earlier plan.
    pub fn start(&mut self, results: &HashMap<Digest, Outputs>) -> Vec<Ready> {
        let nodes = (0..self.bases.len()).collect();
        let adapted = self.advance(nodes, results);
        self.find_critical_paths();
        self.in_order(adapted)
    }

    /// Takes in the outputs of an adapted action, or that there will be none.
    pub fn complete(
        &mut self,
        action: Digest,
        outputs: Option<Outputs>,
        results: &HashMap<Digest, Outputs>,
    ) -> Vec<Ready> {
        let mut released = Vec::new();
        for node in self.flying.remove(&action).unwrap_or_default() {
            match &outputs {
                Some(outputs) => self.finish(node, outputs.clone(), &mut released),
                None => self.states[node] = State::Stuck,
            }
        }
        let adapted = self.advance(released, results);
        self.in_order(adapted)
    }

    /// Whether the result of `action` is awaited.
    pub fn awaits(&self, action: &Digest) -> bool {
        self.flying.contains_key(action)
    }

    /// The adapted actions whose results are awaited.
    pub fn awaited(&self) -> impl Iterator<Item = &Digest> {
        self.flying.keys()
    }

    /// Where the command of an awaited action runs, relative to its input root.
    pub fn working_directory(&self, action: &Digest) -> Option<&str> {
        let node = *self.flying.get(action)?.first()?;
        Some(&self.bases[node].working_directory)
    }

    /// The base actions that could not be adapted since the last call, with the reasons.
    pub fn take_unadaptable(&mut self) -> Vec<(Digest, Unadaptable)> {
        std::mem::take(&mut self.unadaptable)
    }

    /// Instantiates `nodes` and whatever that releases.
    fn advance(
        &mut self,
        nodes: Vec<Node>,
        results: &HashMap<Digest, Outputs>,
    ) -> Vec<(Node, Adapted)> {
        let mut ready = Vec::new();
        let mut released = nodes;
        released.reverse();
        while let Some(node) = released.pop() {
            match self.instantiate(node) {
                Ok(Instantiation::Unchanged) => {
                    let outputs = self.bases[node].outputs.clone();
                    self.finish(node, outputs, &mut released);
                }
                Ok(Instantiation::Waits(nodes)) => {
                    self.states[node] = State::Waiting(nodes.len());
                    for producer in nodes.iter() {
                        self.dependents[*producer].push(node);
                    }
                }
                Ok(Instantiation::Adapted(adapted)) => match results.get(&adapted.action) {
                    Some(outputs) => self.finish(node, outputs.clone(), &mut released),
                    None => {
                        self.states[node] = State::Flying;
                        self.flying.entry(adapted.action).or_default().push(node);
                        ready.push((node, adapted));
                    }
                },
                Err(reason) => {
                    self.states[node] = State::Stuck;
                    self.unadaptable.push((self.bases[node].digest, reason));
                }
            }
        }
        ready
    }

    fn instantiate(&mut self, node: Node) -> Result<Instantiation, Unadaptable> {
        let resolver = Resolver {
            overlays: &self.parent.overlays,
            sources: &self.sources,
            producers: &self.producers,
        };
        let states = &self.states;
        self.instantiator.instantiate(&Task {
            node,
            base: &self.bases[node],
            resolver: &resolver,
            trees: &self.trees,
            output: |node: Node, path: &str| match &states[node] {
                State::Done(outputs) => Some(output(outputs, path)),
                _ => None,
            },
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

    /// The longest recorded time from each node to the end of what depends on it.
    fn find_critical_paths(&mut self) {
        let mut producers_of: Vec<Vec<Node>> = vec![Vec::new(); self.bases.len()];
        let mut open: Vec<usize> = vec![0; self.bases.len()];
        for (producer, dependents) in self.dependents.iter().enumerate() {
            open[producer] = dependents.len();
            for dependent in dependents {
                producers_of[*dependent].push(producer);
            }
        }
        let mut leaves: Vec<Node> = (0..open.len()).filter(|node| open[*node] == 0).collect();
        while let Some(node) = leaves.pop() {
            for producer in std::mem::take(&mut producers_of[node]) {
                let through = self.bases[producer].duration + self.critical_paths[node];
                let longest = &mut self.critical_paths[producer];
                *longest = through.max(*longest);
                open[producer] -= 1;
                if open[producer] == 0 {
                    leaves.push(producer);
                }
            }
        }
    }

    /// The most urgent first; two base actions that became the same adapted one count once.
    fn in_order(&self, adapted: Vec<(Node, Adapted)>) -> Vec<Ready> {
        let mut seen = std::collections::HashSet::new();
        let mut ready: Vec<Ready> = adapted
            .into_iter()
            .filter(|(_, adapted)| seen.insert(adapted.action))
            .map(|(node, adapted)| Ready {
                adapted,
                urgency: Urgency::new(self.critical_paths[node], self.bases[node].order),
            })
            .collect();
        ready.sort_by_key(|ready| ready.urgency);
        ready
    }
}

fn output(outputs: &Outputs, path: &str) -> Option<Digest> {
    let at = outputs
        .binary_search_by(|(name, _)| name.as_str().cmp(path))
        .ok()?;
    Some(outputs[at].1)
}
