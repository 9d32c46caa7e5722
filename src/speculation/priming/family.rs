//! Action parents that have to do with each other, as far as they are recorded.

use std::collections::{HashMap, HashSet};

use crate::speculation::records::parent::{ActionParent, ParentKind, WeakKey};
use crate::speculation::records::store::KnownParent;

/// What is recorded of an action parent, and of those that have to do with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Family {
    /// Its own records: one for each instance that its command executes under.
    pub keys: Vec<WeakKey>,
    /// Others of its name: what it was before its command changed.
    pub earlier: Vec<WeakKey>,
    /// Those that depend on it, directly or not.
    pub dependents: Vec<WeakKey>,
    /// Those that it, or one of its dependents, depends on.
    pub dependencies: Vec<WeakKey>,
}

impl Family {
    /// The family of the action parent `action` of the user `uid`.
    pub fn of(
        action: &ActionParent,
        uid: Option<u32>,
        parents: &HashMap<WeakKey, KnownParent>,
    ) -> Self {
        let mut family = Family::default();
        for known in parents.values().filter(|known| known.identity.uid == uid) {
            match &known.identity.kind {
                ParentKind::Action(other)
                    if other.instance != action.instance
                        || other.key.function() != action.key.function() => {}
                ParentKind::Action(other) if other.key == action.key => {
                    family.keys.push(known.key);
                }
                ParentKind::Action(other) if other.name == action.name => {
                    family.earlier.push(known.key);
                }
                _ => {}
            }
        }
        let mut reached: HashSet<WeakKey> = family.own().collect();
        loop {
            let depends = |known: &&KnownParent| {
                !reached.contains(&known.key) && !known.dependencies.is_disjoint(&reached)
            };
            let more: Vec<WeakKey> = parents.values().filter(depends).map(|k| k.key).collect();
            if more.is_empty() {
                break;
            }
            reached.extend(&more);
            family.dependents.extend(more);
        }
        let whole = family.keys.iter().chain(&family.dependents);
        let dependencies = whole.filter_map(|key| Some(&parents.get(key)?.dependencies));
        let dependencies: HashSet<WeakKey> = dependencies.flatten().copied().collect();
        family.dependencies.extend(dependencies);
        family
    }

    /// Whether nothing is recorded.
    pub fn is_empty(&self) -> bool {
        *self == Family::default()
    }

    /// Its own records, and those of what it was.
    pub(super) fn own(&self) -> impl Iterator<Item = WeakKey> {
        self.keys.iter().chain(&self.earlier).copied()
    }
}
