//! The graph of recorded actions: nodes are base actions, edges ACTION overlays. It says what can
//! be instantiated now, takes in what has completed, and orders what is ready by the longest
//! recorded time still below it. A plan is pure: it calls nobody and knows no clock.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::edits::{Edit, Edits, Lesson, OldFile};
use super::instantiate::{Adapted, Instantiation, Instantiator, Task, Texts, Unadaptable};
use super::known::{Known, find_file, find_output};
use super::resolve::{Current, Node, Resolver, TreeFile, TreeKind};
use super::subject::{PlannedParent, Share, Subject};
use super::uses::RETIRES;
use super::verdict::{Adaptation, MAX_CHANGES, Outlook, Verdict};
use super::worth::Worth;
use crate::cas::Digest;
use crate::cas::directories::Trees;
use crate::cas::outputs::Outputs;
use crate::speculation::flights::left_out::LeftOut;
use crate::speculation::flights::{FlightKey, Urgency};
use crate::speculation::records::parent::{BaseAction, Parent, WeakKey};
use crate::speculation::records::prediction::Prediction;
use bytes::Bytes;

/// Of two paths to the end of the build, one of at least this part of the other is nearly as long:
/// what executions of the same take differs by as much from build to build.
const NEARLY: f64 = 0.75;

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
    fn worthwhile(&mut self, adapted: Vec<(Node, Box<Adapted>)>) -> Vec<(Node, Box<Adapted>)> {
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

    /// The recorded forms of an action that a client executes.
    pub fn bases(&self, instance: &str, action_key: Digest) -> Vec<Node> {
        let parents = self.subject.parents.iter().zip(&self.keys);
        let of_instance =
            parents.filter(|(planned, _)| *planned.parent.identity.instance == *instance);
        let mut nodes: Vec<Node> = of_instance
            .flat_map(|(planned, parent)| {
                let actions = planned.parent.actions.iter();
                let bases = actions.filter(|(key, _)| key.action_key == action_key);
                bases.filter_map(|(_, base)| self.producers.get(&(*parent, base.digest)).copied())
            })
            .collect();
        nodes.sort_unstable();
        nodes
    }

    /// The recorded input tree of an action.
    pub fn input_root(&self, node: Node) -> Digest {
        self.actions[node].base.input_root
    }

    /// Has `edits` learn what it shows that a client executes one of `bases`, the nearest, with
    /// another input tree. All of them are in `trees`. Returns whether that is news.
    pub fn learn(
        &self,
        edits: &mut Edits,
        bases: &[Node],
        input_root: Digest,
        trees: &Trees,
    ) -> bool {
        let differences = bases.iter().filter_map(|node| {
            let edit = Edit::between(self.input_root(*node), input_root, trees)?;
            Some((*node, edit))
        });
        let Some((node, edit)) = differences.min_by_key(|(_, edit)| edit.size()) else {
            return false;
        };
        let PlannedAction { base, parent, .. } = &self.actions[node];
        let same_place =
            |other: &&PlannedAction| other.parent == *parent && other.base.mount == base.mount;
        let neighbours: Vec<&PlannedAction> = self.actions.iter().filter(same_place).collect();
        let outputs = neighbours.iter().flat_map(|action| &action.base.outputs);
        let written: HashSet<&str> = outputs.map(|(path, _)| path.as_str()).collect();
        let resolver = self.resolver(*parent);
        let is_told_otherwise = |path: &str, digest| {
            let file = TreeFile {
                node,
                base,
                tree: TreeKind::Input,
                path,
                digest,
            };
            let current = resolver.by_origin(file, output_of(&self.states));
            !matches!(current, Current::Recorded | Current::Vanished(_))
        };
        let is_source = |path: &str, old: Option<Digest>| {
            !written.contains(path) && !old.is_some_and(|digest| is_told_otherwise(path, digest))
        };
        let readers = |file: &OldFile| {
            let roots = neighbours.iter().map(|action| action.base.input_root);
            let found = roots.map(|root| find_file(&self.subject.trees, root, &file.path));
            found.filter(|found| *found == Some(file.digest)).count()
        };
        let lesson = Lesson {
            parent: self.keys[*parent],
            base,
            trees,
            edit: &edit,
        };
        edits.learn(&lesson, is_source, readers)
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

    /// The longest recorded time from each node to the end of what depends on it.
    fn find_critical_paths(&mut self) {
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
    fn in_order(&self, adapted: Vec<(Node, Box<Adapted>)>) -> Vec<Ready> {
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

#[cfg(test)]
mod tests {
    use super::super::known::{CurrentParent, Sources};
    use super::super::verdict::By;
    use super::*;
    use crate::cas::DigestFunction;
    use crate::cas::directories::Directory;
    use crate::reapi;
    use crate::speculation::records::parent::{
        ActionParent, ExecutedParent, Origin, OverlayTable, ParentIdentity, ParentKind,
        SubactionKey, fixture,
    };
    use crate::speculation::records::prediction::Wasted;
    use bytes::Bytes;
    use prost::Message;

    /// Actions in `/p`; each reads files of the root directory and writes one file there.
    #[derive(Default)]
    struct Scene {
        bases: Vec<BaseAction>,
        trees: Trees,
        sources: Sources,
        overlays: OverlayTable,
        wasted: Wasted,
        overhead: Duration,
    }

    fn digest(text: &str) -> Digest {
        Digest::of(text.as_bytes())
    }

    impl Scene {
        /// An action that reads `inputs` as they were recorded ("old NAME") and writes `output`.
        fn action(mut self, output: &str, inputs: &[&str], seconds: u64) -> Self {
            let (input_root, directory) = Digest::of_message(&root(inputs, |_| "old"));
            let directory = Directory::parse(directory, input_root.function()).unwrap();
            self.trees.insert(input_root, Arc::new(directory));
            let encoded = encoded(output, input_root);
            let base = BaseAction {
                digest: Digest::of(&encoded),
                encoded,
                outputs: vec![(output.to_owned(), digest(&format!("old {output}")))],
                duration: Duration::from_secs(seconds),
                order: self.bases.len() as u64,
                ..fixture::base(output, input_root)
            };
            let origin = Origin::Action {
                parent: None,
                action: base.digest,
                path: output.to_owned(),
            };
            self.overlays.add(digest(&format!("old {output}")), origin);
            self.bases.push(base);
            self
        }

        /// A source file that was "old NAME" when it was recorded.
        fn source(mut self, name: &str, now: &str) -> Self {
            let path = std::path::Path::new("/p").join(name);
            self.overlays
                .add(digest(&format!("old {name}")), Origin::Disk(path.clone()));
            self.sources
                .insert(path, Some(digest(&format!("{now} {name}"))));
            self
        }

        /// So many executions in a row of the last action were wasted.
        fn wasted(mut self, times: u8) -> Self {
            let last = self.bases.last().unwrap();
            self.wasted.insert(Prediction::of(last).unwrap(), times);
            self
        }

        /// To execute an action costs so many seconds.
        fn costing(mut self, seconds: u64) -> Self {
            self.overhead = Duration::from_secs(seconds);
            self
        }

        fn plan(self) -> Plan {
            let actions = self.bases.into_iter().map(|base| {
                let action_key = base.parts().unwrap().action_key;
                let mount = base.mount.clone();
                (SubactionKey { action_key, mount }, Arc::new(base))
            });
            let mut parent = fixture::invocation(self.overlays);
            parent.actions = actions.collect();
            let wasted = (parent.identity.weak_key(), Arc::new(self.wasted));
            let worth = Worth {
                wasted: HashMap::from([wasted]),
                overhead: self.overhead,
            };
            let planned = PlannedParent {
                parent: Arc::new(parent),
                share: Share::Whole,
            };
            Plan::new(Subject {
                parents: vec![planned],
                trees: self.trees,
                known: Known {
                    disk: self.sources,
                    ..Known::default()
                },
                worth,
                ..Subject::default()
            })
        }
    }

    fn root(inputs: &[&str], age: impl Fn(&str) -> &'static str) -> reapi::Directory {
        let mut inputs = inputs.to_vec();
        inputs.sort_unstable();
        let files = inputs.iter().map(|name| reapi::FileNode {
            name: (*name).to_owned(),
            digest: Some(digest(&format!("{} {name}", age(name))).to_proto()),
            ..reapi::FileNode::default()
        });
        reapi::Directory {
            files: files.collect(),
            ..reapi::Directory::default()
        }
    }

    fn encoded(output: &str, input_root: Digest) -> Bytes {
        reapi::Action {
            command_digest: Some(digest(&format!("write {output}")).to_proto()),
            input_root_digest: Some(input_root.to_proto()),
            ..reapi::Action::default()
        }
        .encode_to_vec()
        .into()
    }

    /// The action that writes `output` when all of its `inputs` are new.
    fn adapted(output: &str, inputs: &[&str]) -> Digest {
        let (input_root, _) = Digest::of_message(&root(inputs, |_| "new"));
        Digest::of(&encoded(output, input_root))
    }

    fn actions(ready: &[Ready]) -> Vec<Digest> {
        ready.iter().map(|ready| ready.adapted.action).collect()
    }

    /// `action` has written a new `output`.
    fn done(plan: &mut Plan, action: Digest, output: &str) -> Vec<Digest> {
        let outputs = vec![(output.to_owned(), digest(&format!("new {output}")))];
        actions(&plan.complete(&key(action), Some(outputs), &HashMap::new()))
    }

    fn key(action: Digest) -> FlightKey {
        FlightKey {
            instance: "".into(),
            action,
        }
    }

    fn chain() -> Scene {
        Scene::default()
            .source("a.c", "new")
            .action("a.i", &["a.c"], 1)
            .action("a.o", &["a.i"], 1)
            .action("prog", &["a.o"], 1)
    }

    #[test]
    fn a_chain_becomes_ready_link_by_link() {
        let mut plan = chain().plan();
        let first = adapted("a.i", &["a.c"]);
        let second = adapted("a.o", &["a.i"]);
        let third = adapted("prog", &["a.o"]);
        assert_eq!(actions(&plan.start(&HashMap::new())), [first]);
        assert!(plan.awaits(&key(first)) && !plan.awaits(&key(second)));
        assert_eq!(done(&mut plan, first, "a.i"), [second]);
        assert_eq!(done(&mut plan, second, "a.o"), [third]);
        assert_eq!(done(&mut plan, third, "prog"), []);
        assert_eq!(plan.awaited().count(), 0);
        assert_eq!(plan.take_unadaptable(), []);
    }

    #[test]
    fn what_is_retired_is_awaited_but_not_executed_until_a_client_asks_for_it() {
        let scene = Scene::default().source("a.c", "new");
        let scene = scene.action("a.o", &["a.c"], 1);
        let scene = scene.action("b.o", &["a.c"], 1).wasted(RETIRES);
        let mut plan = scene.action("c.o", &["a.c"], 1).wasted(RETIRES).plan();
        let [a, b, c] = ["a.o", "b.o", "c.o"].map(|output| adapted(output, &["a.c"]));
        assert_eq!(actions(&plan.start(&HashMap::new())), [a]);
        assert!(plan.awaits(&key(b)), "a client may execute it");
        assert_eq!(plan.left_out(&key(a)), []);
        let left_out = |plan: &mut Plan, output| {
            let verdicts = plan.take_verdicts();
            match outlook(&verdicts, output) {
                Outlook::Adapted(adaptation) => adaptation.left_out,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(left_out(&mut plan, "b.o"), Some(LeftOut::Retired(RETIRES)));
        assert_eq!(plan.left_out(&key(b)).len(), 1);
        let back = plan.judge_anew(Worth::default());
        assert_eq!(actions(&back), [b, c]);
        assert_eq!(plan.left_out(&key(b)), []);
        assert_eq!(left_out(&mut plan, "c.o"), None);
    }

    #[test]
    fn what_is_cheap_is_executed_only_if_something_that_waits_for_it_is_worth_it() {
        let scene = |seconds| {
            let scene = Scene::default().source("a.c", "new").costing(10);
            let scene = scene.action("a.o", &["a.c"], 1).wasted(1);
            scene.action("prog", &["a.o"], seconds).wasted(1).plan()
        };
        let compile = adapted("a.o", &["a.c"]);
        assert_eq!(actions(&scene(100).start(&HashMap::new())), [compile]);
        let mut cheap = scene(1);
        assert_eq!(actions(&cheap.start(&HashMap::new())), []);
        assert_eq!(
            done(&mut cheap, compile, "a.o"),
            [],
            "the client has executed it"
        );
        assert!(cheap.awaits(&key(adapted("prog", &["a.o"]))));
    }

    #[test]
    fn what_is_retired_is_executed_only_for_what_has_never_been_wasted() {
        let scene = |wasted| {
            let scene = Scene::default().source("a.c", "new");
            let scene = scene.action("a.o", &["a.c"], 1).wasted(RETIRES);
            scene.action("prog", &["a.o"], 100).wasted(wasted).plan()
        };
        let compile = adapted("a.o", &["a.c"]);
        assert_eq!(actions(&scene(0).start(&HashMap::new())), [compile]);
        assert_eq!(actions(&scene(1).start(&HashMap::new())), []);
    }

    /// What was said of the action that writes `output`, last of all.
    fn outlook(verdicts: &[Verdict], output: &str) -> Outlook {
        let mut of_it = verdicts
            .iter()
            .rev()
            .filter(|verdict| verdict.base.outputs[0].0 == output);
        of_it.next().unwrap().outlook.clone()
    }

    #[test]
    fn a_plan_tells_what_has_changed_by_what_and_after_what() {
        let mut plan = chain().plan();
        let first = adapted("a.i", &["a.c"]);
        plan.start(&HashMap::new());
        let verdicts = plan.take_verdicts();
        let Outlook::Adapted(told) = outlook(&verdicts, "a.i") else {
            panic!("{verdicts:?}");
        };
        assert_eq!(told.key, key(first));
        let change = told.changes[0].as_ref();
        assert_eq!((change.path.as_str(), change.by), ("a.c", By::Source));
        assert_eq!(change.from, Some(digest("old a.c")));
        assert_eq!(change.to, Some(digest("new a.c")));
        assert_eq!(change.origin, "/p/a.c");
        assert!(matches!(outlook(&verdicts, "a.o"), Outlook::Waits(after) if after == [first]));

        done(&mut plan, first, "a.i");
        let verdicts = plan.take_verdicts();
        let Outlook::Adapted(told) = outlook(&verdicts, "a.o") else {
            panic!("{verdicts:?}");
        };
        assert_eq!(told.after, [first]);
        assert_eq!(told.changes[0].by, By::Action);
        assert!(plan.take_verdicts().is_empty());

        let mut plan = chain().plan();
        let first = actions(&plan.start(&HashMap::new()))[0];
        plan.complete(&key(first), Some(Outputs::new()), &HashMap::new());
        let verdicts = plan.take_verdicts();
        assert!(
            matches!(outlook(&verdicts, "a.o"), Outlook::Unadaptable(_, why) if why.contains("a.i"))
        );
    }

    #[test]
    fn nothing_is_ready_when_nothing_changed() {
        let unchanged = Scene::default()
            .source("a.c", "old")
            .action("a.o", &["a.c"], 1)
            .action("prog", &["a.o"], 1);
        assert_eq!(actions(&unchanged.plan().start(&HashMap::new())), []);
    }

    #[test]
    fn an_output_equal_to_the_old_one_ends_the_chain() {
        let mut plan = chain().plan();
        let first = actions(&plan.start(&HashMap::new()))[0];
        let as_before = vec![("a.i".to_owned(), digest("old a.i"))];
        let ready = plan.complete(&key(first), Some(as_before), &HashMap::new());
        assert_eq!(actions(&ready), []);
        assert_eq!(plan.awaited().count(), 0);
    }

    #[test]
    fn what_depends_on_a_failure_is_never_ready() {
        let mut plan = chain().plan();
        let first = actions(&plan.start(&HashMap::new()))[0];
        assert_eq!(
            actions(&plan.complete(&key(first), None, &HashMap::new())),
            []
        );
        assert_eq!(plan.awaited().count(), 0);
    }

    #[test]
    fn an_output_that_is_there_no_more_makes_its_reader_unadaptable() {
        let mut plan = chain().plan();
        let first = actions(&plan.start(&HashMap::new()))[0];
        let ready = plan.complete(&key(first), Some(Outputs::new()), &HashMap::new());
        assert_eq!(actions(&ready), []);
        let reasons = plan.take_unadaptable();
        assert!(
            matches!(reasons.as_slice(), [(_, Unadaptable::Vanished(path))] if path.ends_with("a.i")),
            "{reasons:?}"
        );
    }

    #[test]
    fn the_tip_of_a_diamond_waits_for_both_sides() {
        let mut plan = Scene::default()
            .source("s", "new")
            .action("top", &["s"], 1)
            .action("left", &["top"], 1)
            .action("right", &["top"], 1)
            .action("tip", &["left", "right"], 1)
            .plan();
        let top = actions(&plan.start(&HashMap::new()));
        assert_eq!(top, [adapted("top", &["s"])]);
        let sides = done(&mut plan, top[0], "top");
        assert_eq!(
            sides,
            [adapted("left", &["top"]), adapted("right", &["top"])]
        );
        assert_eq!(done(&mut plan, sides[1], "right"), []);
        let tip = done(&mut plan, sides[0], "left");
        assert_eq!(tip, [adapted("tip", &["left", "right"])]);
    }

    #[test]
    fn actions_that_wait_for_each_other_wait_for_ever_and_harm_no_others() {
        let mut plan = Scene::default()
            .source("s", "new")
            .action("a", &["b", "s"], 1)
            .action("b", &["a", "s"], 1)
            .action("self", &["self", "s"], 1)
            .action("c", &["s"], 1)
            .plan();
        let ready = actions(&plan.start(&HashMap::new()));
        assert!(ready.contains(&adapted("c", &["s"])));
        assert_eq!(ready.len(), 2, "and the one that reads its own output");
        assert_eq!(done(&mut plan, adapted("c", &["s"]), "c"), []);
    }

    #[test]
    fn an_action_that_rewrites_its_input_is_waited_for_by_others_and_not_by_itself() {
        let both = ["s", "x"];
        let rewriter = Scene::default()
            .source("s", "new")
            .action("x", &both, 1)
            .action("y", &both, 1);
        let reader_first = Scene::default()
            .source("s", "new")
            .action("y", &both, 1)
            .action("x", &both, 1);
        for scene in [rewriter, reader_first] {
            let mut plan = scene.plan();
            // Its own output is for it what it was.
            let age = |name: &str| if name == "s" { "new" } else { "old" };
            let (input_root, _) = Digest::of_message(&root(&both, age));
            let first = Digest::of(&encoded("x", input_root));
            assert_eq!(actions(&plan.start(&HashMap::new())), [first]);
            assert_eq!(done(&mut plan, first, "x"), [adapted("y", &both)]);
        }
    }

    #[test]
    fn among_those_that_take_nearly_as_long_the_order_of_the_build_counts() {
        let mut scene = Scene::default().source("s", "new");
        for (name, seconds) in [("a", 80), ("b", 50), ("c", 100), ("d", 60), ("e", 90)] {
            scene = scene.action(name, &["s"], seconds);
        }
        let mut plan = scene.plan();
        let ready = actions(&plan.start(&HashMap::new()));
        let wanted = ["a", "c", "e", "b", "d"];
        assert_eq!(ready, wanted.map(|name| adapted(name, &["s"])));
    }

    #[test]
    fn what_has_the_longest_time_below_it_comes_first() {
        let mut plan = Scene::default()
            .source("s", "new")
            .action("short", &["s"], 5)
            .action("long", &["s"], 1)
            .action("same", &["s"], 5)
            .action("after", &["long"], 9)
            .plan();
        let ready = actions(&plan.start(&HashMap::new()));
        assert_eq!(
            ready,
            [
                adapted("long", &["s"]),
                adapted("short", &["s"]),
                adapted("same", &["s"])
            ],
            "then as recorded"
        );
    }

    /// An element `app` whose one action reads nothing and runs in a sandbox, which has a header of
    /// the element `dep`, and something else.
    struct Sandboxed {
        trees: Trees,
        app: Parent,
        dep: Parent,
        command: Bytes,
        known: Known,
    }

    impl Sandboxed {
        fn new() -> Self {
            let mut trees = Trees::new();
            let root = sandbox(&mut trees, "old header");
            let command = text_command(root);
            let dep = element("dep", sources(&mut trees, "old header"), Vec::new());
            let texts = vec![root.to_string()];
            let mut app = element("app", sources(&mut trees, "app"), texts.clone());
            app.text_roots = vec![root];
            app.overlays.add(
                digest("old header"),
                Origin::Tree {
                    parent: Some(dep.identity.weak_key()),
                    path: "dep.h".to_owned(),
                },
            );
            let (empty, encoded) = Digest::of_message(&reapi::Directory::default());
            trees.insert(
                empty,
                Arc::new(Directory::parse(encoded, DigestFunction::Sha256).unwrap()),
            );
            let (digest, encoded) = text_action(root);
            let base = BaseAction {
                digest,
                encoded,
                texts,
                ..fixture::base("compile", empty)
            };
            let action_key = base.parts().unwrap().action_key;
            let key = SubactionKey {
                action_key,
                mount: None,
            };
            app.actions.insert(key, Arc::new(base));
            Sandboxed {
                trees,
                app,
                dep,
                command,
                known: Known::default(),
            }
        }

        fn asked(mut self, parent: WeakKey, input_root: Digest, texts: Vec<String>) -> Self {
            let current = CurrentParent {
                input_root,
                texts: texts.into(),
                outputs: None,
            };
            self.known.parents.insert(parent, current);
            self
        }

        /// `dep` is asked for with this header.
        fn dep(mut self, header: &str) -> Self {
            let root = sources(&mut self.trees, header);
            let key = self.dep.identity.weak_key();
            self.asked(key, root, Vec::new())
        }

        fn start(self) -> (Plan, Vec<Ready>) {
            let planned = [self.app, self.dep].map(|parent| PlannedParent {
                parent: Arc::new(parent),
                share: Share::Whole,
            });
            let mut plan = Plan::new(Subject {
                parents: planned.into(),
                trees: self.trees,
                commands: HashMap::from([(Digest::of(&self.command), self.command)]),
                known: self.known,
                ..Subject::default()
            });
            let ready = plan.start(&HashMap::new());
            (plan, ready)
        }
    }

    fn element(name: &str, input_root: Digest, texts: Vec<String>) -> Parent {
        let mut parent = Parent::new(ParentIdentity {
            instance: "".into(),
            digest_function: DigestFunction::Sha256,
            uid: None,
            kind: ParentKind::Action(ActionParent {
                instance: "".into(),
                key: digest(name),
                name: name.to_owned(),
            }),
        });
        parent.executed = Some(Arc::new(ExecutedParent {
            action: digest(name),
            input_root,
            texts,
            outputs: Vec::new(),
        }));
        parent
    }

    fn keep(trees: &mut Trees, message: &reapi::Directory) -> Digest {
        let (digest, encoded) = Digest::of_message(message);
        trees.insert(
            digest,
            Arc::new(Directory::parse(encoded, DigestFunction::Sha256).unwrap()),
        );
        digest
    }

    fn file(name: &str, content: &str) -> reapi::FileNode {
        reapi::FileNode {
            name: name.to_owned(),
            digest: Some(digest(content).to_proto()),
            ..reapi::FileNode::default()
        }
    }

    /// The tree of `dep`: its header.
    fn sources(trees: &mut Trees, header: &str) -> Digest {
        let message = reapi::Directory {
            files: vec![file("dep.h", header)],
            ..reapi::Directory::default()
        };
        keep(trees, &message)
    }

    /// The header in one directory, and something in another.
    fn sandbox(trees: &mut Trees, header: &str) -> Digest {
        let system = reapi::Directory {
            files: vec![file("gcc", "gcc")],
            ..reapi::Directory::default()
        };
        let below = [
            ("bin", keep(trees, &system)),
            ("include", sources(trees, header)),
        ];
        let below = below.map(|(name, digest)| reapi::DirectoryNode {
            name: name.to_owned(),
            digest: Some(digest.to_proto()),
        });
        let root = reapi::Directory {
            directories: below.into(),
            ..reapi::Directory::default()
        };
        keep(trees, &root)
    }

    fn text_command(root: Digest) -> Bytes {
        let variable = reapi::command::EnvironmentVariable {
            name: "ROOT".to_owned(),
            value: root.to_string(),
        };
        let command = reapi::Command {
            environment_variables: vec![variable],
            ..reapi::Command::default()
        };
        command.encode_to_vec().into()
    }

    fn text_action(root: Digest) -> (Digest, Bytes) {
        let property = reapi::platform::Property {
            name: "root".to_owned(),
            value: root.to_string(),
        };
        Digest::of_message(&reapi::Action {
            command_digest: Some(Digest::of(&text_command(root)).to_proto()),
            input_root_digest: Some(Digest::of(b"").to_proto()),
            platform: Some(reapi::Platform {
                properties: vec![property],
            }),
            ..reapi::Action::default()
        })
    }

    #[test]
    fn what_a_text_will_be_is_told_by_the_tree_that_it_names() {
        let (_, ready) = Sandboxed::new().dep("new header").start();
        let mut trees = Trees::new();
        let root = sandbox(&mut trees, "new header");
        assert_eq!(actions(&ready), [text_action(root).0]);
        let (mut known, mut needed) = (HashSet::new(), HashMap::new());
        ready[0].adapted.collect_blobs(&mut known, &mut needed);
        let include = sources(&mut trees, "new header");
        for new in [
            root,
            include,
            Digest::of(&text_command(root)),
            text_action(root).0,
        ] {
            assert!(needed.remove(&new).is_some(), "{new} is to be uploaded");
        }
        assert!(needed.is_empty(), "the rest is there: {needed:?}");
    }

    #[test]
    fn a_text_whose_tree_is_as_it_was_stays() {
        let (plan, ready) = Sandboxed::new().dep("old header").start();
        assert_eq!(actions(&ready), []);
        assert_eq!(plan.unchanged().count(), 1);
    }

    #[test]
    fn what_the_own_parent_names_counts_more_than_what_was_foreseen() {
        let scene = Sandboxed::new().dep("new header");
        let key = scene.app.identity.weak_key();
        let executed = scene.app.executed.clone().unwrap();
        let named = digest("a root that nobody could foresee");
        let (_, ready) = scene
            .asked(key, executed.input_root, vec![named.to_string()])
            .start();
        assert_eq!(actions(&ready), [text_action(named).0]);
    }

    #[test]
    fn a_text_that_cannot_be_foreseen_is_waited_for() {
        let mut unread = Sandboxed::new().dep("new header");
        let root = unread.app.text_roots[0];
        unread.trees.remove(&root);
        let mut vanished = Sandboxed::new();
        let key = vanished.dep.identity.weak_key();
        let nothing = keep(&mut vanished.trees, &reapi::Directory::default());
        let vanished = vanished.asked(key, nothing, Vec::new());
        let mut awaited = Sandboxed::new();
        let made = Origin::Artifact {
            parent: awaited.dep.identity.weak_key(),
            path: "dep.h".to_owned(),
        };
        awaited.app.overlays = OverlayTable::default();
        awaited.app.overlays.add(digest("old header"), made);
        for scene in [unread, vanished, awaited.dep("new header")] {
            let (mut plan, ready) = scene.start();
            assert_eq!(actions(&ready), []);
            assert_eq!(plan.take_unadaptable(), [], "another plan will know more");
        }
    }

    #[test]
    fn results_of_an_earlier_plan_are_carried_over() {
        let mut plan = chain().plan();
        let results = HashMap::from([
            (
                key(adapted("a.i", &["a.c"])),
                vec![("a.i".to_owned(), digest("new a.i"))],
            ),
            (
                key(adapted("a.o", &["a.i"])),
                vec![("a.o".to_owned(), digest("new a.o"))],
            ),
        ]);
        assert_eq!(actions(&plan.start(&results)), [adapted("prog", &["a.o"])]);
    }
}
