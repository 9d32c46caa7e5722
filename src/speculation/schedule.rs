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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cas::directories::Directory;
    use crate::reapi;
    use crate::speculation::parent::{
        Origin, OverlayTable, ParentIdentity, SubactionKey, action_parts,
    };
    use bytes::Bytes;
    use prost::Message;

    /// Actions in `/p`; each reads files of the root directory and writes one file there.
    #[derive(Default)]
    struct Scene {
        bases: Vec<BaseAction>,
        trees: Trees,
        sources: Sources,
        overlays: OverlayTable,
    }

    fn digest(text: &str) -> Digest {
        Digest::of(text.as_bytes())
    }

    impl Scene {
        /// An action that reads `inputs` as they were recorded ("old NAME") and writes `output`.
        fn action(mut self, output: &str, inputs: &[&str], seconds: u64) -> Self {
            let (input_root, directory) = Digest::of_message(&root(inputs, |_| "old"));
            let directory = Directory::parse(directory).unwrap();
            self.trees.insert(input_root, Arc::new(directory));
            let encoded = encoded(output, input_root);
            let base = BaseAction {
                digest: Digest::of(&encoded),
                encoded,
                input_root,
                mount: Some("/p".into()),
                file_system_root: "/".into(),
                working_directory: String::new(),
                outputs: vec![(output.to_owned(), digest(&format!("old {output}")))],
                duration: Duration::from_secs(seconds),
                order: self.bases.len() as u64,
                last_seen_unix_ms: 0,
            };
            let (action, path) = (base.digest, output.to_owned());
            self.overlays.add(
                digest(&format!("old {output}")),
                Origin::Action { action, path },
            );
            self.bases.push(base);
            self
        }

        /// A source file that was "old NAME" when it was recorded.
        fn source(mut self, name: &str, now: &str) -> Self {
            let path = std::path::Path::new("/p").join(name);
            self.overlays
                .add(digest(&format!("old {name}")), Origin::Source(path.clone()));
            self.sources
                .insert(path, Some(digest(&format!("{now} {name}"))));
            self
        }

        fn plan(self) -> Plan {
            let actions = self.bases.into_iter().map(|base| {
                let action_key = action_parts(&base.encoded).unwrap().action_key;
                let mount = base.mount.clone();
                (SubactionKey { action_key, mount }, Arc::new(base))
            });
            let mut parent = Parent::new(ParentIdentity {
                instance: "".into(),
                uid: None,
                project_root: Some("/p".into()),
                tool: "make".into(),
            });
            parent.actions = actions.collect();
            parent.overlays = self.overlays;
            Plan::new(Arc::new(parent), self.trees, self.sources)
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
        actions(&plan.complete(action, Some(outputs), &HashMap::new()))
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
        assert!(plan.awaits(&first) && !plan.awaits(&second));
        assert_eq!(done(&mut plan, first, "a.i"), [second]);
        assert_eq!(done(&mut plan, second, "a.o"), [third]);
        assert_eq!(done(&mut plan, third, "prog"), []);
        assert_eq!(plan.awaited().count(), 0);
        assert_eq!(plan.take_unadaptable(), []);
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
        let ready = plan.complete(first, Some(as_before), &HashMap::new());
        assert_eq!(actions(&ready), []);
        assert_eq!(plan.awaited().count(), 0);
    }

    #[test]
    fn what_depends_on_a_failure_is_never_ready() {
        let mut plan = chain().plan();
        let first = actions(&plan.start(&HashMap::new()))[0];
        assert_eq!(actions(&plan.complete(first, None, &HashMap::new())), []);
        assert_eq!(plan.awaited().count(), 0);
    }

    #[test]
    fn an_output_that_is_there_no_more_makes_its_reader_unadaptable() {
        let mut plan = chain().plan();
        let first = actions(&plan.start(&HashMap::new()))[0];
        let ready = plan.complete(first, Some(Outputs::new()), &HashMap::new());
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

    #[test]
    fn results_of_an_earlier_plan_are_carried_over() {
        let mut plan = chain().plan();
        let results = HashMap::from([
            (
                adapted("a.i", &["a.c"]),
                vec![("a.i".to_owned(), digest("new a.i"))],
            ),
            (
                adapted("a.o", &["a.i"]),
                vec![("a.o".to_owned(), digest("new a.o"))],
            ),
        ]);
        assert_eq!(actions(&plan.start(&results)), [adapted("prog", &["a.o"])]);
    }
}
