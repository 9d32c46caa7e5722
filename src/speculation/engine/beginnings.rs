//! Builds begin: with the first call of a new client, a run that is opened, or, before any call, a
//! source file that is saved.

use std::collections::hash_map::Entry;
use std::sync::Arc;

use super::State;
use crate::speculation::clients::builds::Build;
use crate::speculation::clients::caller::{BuildKey, Caller};
use crate::speculation::clients::observation::CallOrigin;
use crate::speculation::flights::FlightKey;
use crate::speculation::priming::{Group, Message, Priming};
use crate::speculation::records::parent::WeakKey;
use crate::speculation::records::store::KnownParent;
use crate::workspace::process::Process;
use crate::{clock, task};

/// Recorded parents that are primed when a build begins: a run may find many below its directory.
const MAX_BEGUN: usize = 16;

impl State {
    /// The build that a call belongs to. If it is a new one, it is primed.
    pub(super) fn build_of(&mut self, origin: &CallOrigin) -> &mut Build {
        let open = &self.open;
        let caller = self.callers.of(origin, |key| open.contains_key(key));
        if !self.open.contains_key(&caller.key) {
            let build = self.begin(caller.clone());
            self.open.insert(caller.key.clone(), build);
        }
        self.is_called(&caller.key)
    }

    /// An open build, which is called now.
    pub(super) fn is_called(&mut self, key: &BuildKey) -> &mut Build {
        let Some(build) = self.open.get_mut(key) else {
            unreachable!("whoever asks has seen that it is open");
        };
        build.last_call = self.now.instant;
        build
    }

    /// Has a new build watched and primed.
    pub(super) fn begin(&mut self, caller: Arc<Caller>) -> Build {
        self.builds += 1;
        let number = self.builds;
        tracing::debug!(build = caller.label(), "a build begins");
        if let BuildKey::Process(process) = &caller.key {
            self.watch(process, &caller.key);
        }
        let known = self.parents.values();
        let known = known.filter(|known| caller.works_on(&known.identity));
        let mut latest: Vec<&KnownParent> = known.filter(|one| self.is_latest(one)).collect();
        latest.sort_by_key(|known| std::cmp::Reverse(known.last_seen_unix_ms));
        latest.truncate(MAX_BEGUN);
        let keys: Vec<WeakKey> = latest.iter().map(|known| known.key).collect();
        let mut build = Build::new(number, caller, clock::now_unix_ms(), &self.room);
        for key in &keys {
            if let Some(early) = self.early.remove(key) {
                early.count_for(&mut build);
            }
        }
        if !self.callers.runs.leaves_alone(number) {
            for key in keys {
                self.priming_of(key).tell(Message::Begin(number));
            }
        }
        build
    }

    /// Whether a client that works on this parent hashes so, until a call says otherwise: it did
    /// last.
    fn is_latest(&self, known: &KnownParent) -> bool {
        let mut others = self.parents.values();
        !others.any(|other| other.is_rehashed(known))
    }

    /// The priming of an invocation, which is started if there is none.
    fn priming_of(&mut self, key: WeakKey) -> &Priming {
        let workshop = &self.workshop;
        let priming = self.primings.entry(Group::Invocation(key));
        priming.or_insert_with_key(|group| Priming::start(group, workshop.clone()))
    }

    /// Sources of these parents were saved: they are primed, unless they are being built, in which
    /// case calls tell what is needed.
    pub(super) fn saved(&mut self, keys: &[WeakKey]) {
        for key in keys {
            let Some(known) = self.parents.get(key).filter(|known| self.is_latest(known)) else {
                continue;
            };
            let mut callers = self.open.values().map(|build| &build.caller);
            if callers.any(|caller| caller.works_on(&known.identity)) {
                continue;
            }
            tracing::debug!(parent = known.identity.label(), "a source file was saved");
            self.priming_of(*key).tell(Message::Saved);
        }
    }

    /// Has a build primed whose `caller` asks for `key`, an action of this parent, if that was not
    /// foreseen when it began; by what others have shared, if nothing is recorded here.
    pub(super) fn begin_asked(
        &mut self,
        parent: WeakKey,
        caller: &Caller,
        key: &FlightKey,
        build: u64,
    ) {
        let is_recorded = self.parents.contains_key(&parent);
        let others_may_know = self.workshop.sharing.is_some();
        if self.callers.runs.leaves_alone(build) || !is_recorded && !others_may_know {
            return;
        }
        if let Entry::Vacant(new) = self.primings.entry(Group::Invocation(parent)) {
            let priming = Priming::start(new.key(), self.workshop.clone());
            if !is_recorded {
                let identity = caller.parent(&key.instance, key.action.function());
                priming.tell(Message::Unrecorded(Box::new(identity)));
            }
            priming.tell(Message::Begin(build));
            new.insert(priming);
        }
    }

    /// Has the end of a process end its build.
    fn watch(&self, process: &Process, key: &BuildKey) {
        let exited = self.exited.clone();
        let key = key.clone();
        match process.watch() {
            Ok(ended) => {
                task::spawn("build process", async move {
                    ended.wait().await;
                    // An engine that is gone ends its builds otherwise.
                    let _ = exited.send(key).await;
                });
            }
            Err(_) => {
                // It has ended already.
                let _ = exited.try_send(key);
            }
        }
    }
}
