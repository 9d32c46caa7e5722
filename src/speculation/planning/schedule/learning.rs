//! What a client shows of other actions by one that it executes itself.

use std::collections::HashSet;

use super::super::edits::{Edits, Lesson};
use super::super::resolve::{Current, Node, TreeFile, TreeKind};
use super::super::tree_edit::{Edit, OldFile};
use super::{Plan, PlannedAction, output_of};
use crate::cas::Digest;
use crate::cas::directories::{Trees, find_file};

impl Plan {
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
}
