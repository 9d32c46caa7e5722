//! Action parents: actions whose commands ask for actions themselves.

use std::sync::Arc;

use super::State;
use crate::cas::outputs::Outputs;
use crate::clock::{self, Moment};
use crate::reapi::ActionResult;
use crate::speculation::clients::builds::Build;
use crate::speculation::clients::caller::{BuildKey, Caller};
use crate::speculation::flights::FlightKey;
use crate::speculation::nested::OpenParent;
use crate::speculation::nested::attribution::{Found, FoundParent};
use crate::speculation::planning::known::CurrentParent;
use crate::speculation::priming::{Family, Group, Message, Opened, Priming};
use crate::speculation::records::parent::{ExecutedParent, ParentKind, WeakKey};

impl State {
    pub(super) fn found(&mut self, found: Found) {
        self.now = Moment::now();
        match found {
            Found::Parent(parent) => {
                let (key, executes) = (parent.key.clone(), parent.executes);
                self.open_parent(*parent);
                self.attribute(key, executes, None);
            }
            Found::Nested {
                key,
                executes,
                parent,
            } => self.attribute(key, executes, parent),
            Found::Completing { parent, reply } => {
                if let Some(build) = self.open.get(&BuildKey::Action(parent.clone())) {
                    self.subactions.set(parent, build.subactions_in_order());
                }
                drop(reply);
            }
            Found::Ended { parent, outputs } => self.close_parent(&parent, outputs),
        }
        self.let_go();
    }

    fn let_go(&mut self) {
        for answered in self.nested.let_go() {
            self.attributed(answered, None);
        }
    }

    /// It is known now on whose behalf an action is asked for.
    fn attribute(&mut self, key: FlightKey, executes: bool, parent: Option<FlightKey>) {
        if executes {
            self.nested.is_known();
        }
        for answered in self.nested.attribute(key, parent.clone()) {
            self.attributed(answered, parent.as_ref());
        }
    }

    /// Whether any action parent is recorded that is executed under `instance`.
    pub(super) fn has_action_parents(&self, instance: &str) -> bool {
        let mut identities = self.parents.values().map(|known| &known.identity);
        identities.any(|identity| {
            matches!(&identity.kind, ParentKind::Action(action) if *action.instance == *instance)
        })
    }

    /// An action parent has been asked for: it is primed with all that depends on it. If it is
    /// executed, its build begins.
    fn open_parent(&mut self, found: FoundParent) {
        let FoundParent {
            origin,
            key,
            executes,
            identity,
            input_root,
            texts,
        } = found;
        let build = self.build_of(&origin);
        let (caller, by) = (build.caller.clone(), build.number);
        let caller = Arc::new(caller.nested_in(key.clone(), identity.clone()));
        let asked = caller.parent(&identity.instance, key.action.function());
        let family = Family::of(&identity, caller.uid, &self.parents);
        let group = Group::Actions {
            instance: identity.instance.clone(),
            digest_function: key.action.function(),
            uid: caller.uid,
        };
        let mut number = None;
        let build_key = caller.key.clone();
        if executes && !self.open.contains_key(&build_key) {
            self.builds += 1;
            number = Some(self.builds);
            let now = clock::now_unix_ms();
            let mut build = Build::new(self.builds, caller, now, &self.room);
            for early in family.keys.iter().filter_map(|key| self.early.remove(key)) {
                early.count_for(&mut build);
            }
            self.open.insert(build_key, build);
            let open = OpenParent {
                _completing: self.subactions.begin(key.clone()),
                group: group.clone(),
                asked: asked.clone(),
                keys: family.keys.iter().chain(&family.earlier).copied().collect(),
                executed: ExecutedParent {
                    action: key.action,
                    input_root,
                    texts: texts.clone(),
                    outputs: Outputs::new(),
                },
            };
            self.nested.begin(key, open);
        }
        let workshop = &self.workshop;
        let others_may_know = family.keys.is_empty() && workshop.sharing.is_some();
        if self.callers.runs.leaves_alone(by) || family.is_empty() && !others_may_know {
            return;
        }
        self.primings
            .entry(group)
            .or_insert_with_key(|group| Priming::start(group, workshop.clone()))
            .tell(Message::Opened(Box::new(Opened {
                current: CurrentParent {
                    input_root,
                    texts: texts.into(),
                    outputs: None,
                },
                family,
                build: number,
                unrecorded: others_may_know.then_some(asked),
            })));
    }

    /// An action parent has ended. What was asked on its behalf before is looked at first.
    pub(super) fn end_parent(&mut self, parent: &FlightKey, result: Option<Arc<ActionResult>>) {
        if !self.nested.end(parent, result) {
            self.close_parent(parent, None);
            self.let_go();
        }
    }

    fn close_parent(&mut self, parent: &FlightKey, outputs: Option<Arc<Outputs>>) {
        let Some(mut closed) = self.nested.close(parent) else {
            return;
        };
        if let (Some(outputs), Some(priming)) = (&outputs, self.primings.get(&closed.group)) {
            priming.tell(Message::Closed {
                asked: closed.asked,
                keys: closed.keys,
                outputs: outputs.clone(),
            });
        }
        // What failed may have run only some of its actions: nothing is learned from it.
        let executed = outputs.map(|outputs| {
            closed.executed.outputs.clone_from(&outputs);
            Arc::new(closed.executed)
        });
        self.close_with(&BuildKey::Action(parent.clone()), executed);
    }

    /// The recorded action parents that `caller`'s may depend on.
    pub(super) fn action_parents(&self, caller: &Caller) -> Vec<WeakKey> {
        let known = self.parents.values();
        let of_its_kind = known.filter(|known| match (&known.identity.kind, &caller.action) {
            (ParentKind::Action(action), Some(own)) => {
                known.identity.uid == caller.uid
                    && action.instance == own.instance
                    && action.key.function() == own.key.function()
                    && action.name != own.name
            }
            _ => false,
        });
        of_its_kind.map(|known| known.key).collect()
    }

    /// The instances under which actions of an action parent are recorded.
    pub(super) fn instances(&self, caller: &Caller) -> Vec<Arc<str>> {
        let known = self.parents.values().map(|known| &known.identity);
        let recorded = known.filter(|identity| match (&identity.kind, &caller.action) {
            (ParentKind::Action(action), Some(own)) => identity.uid == caller.uid && action == own,
            _ => false,
        });
        recorded.map(|identity| identity.instance.clone()).collect()
    }
}
