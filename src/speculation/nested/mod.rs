//! Action parents that are open, and the calls made while they are: each is held until it is known
//! on whose behalf it was made.

pub(super) mod attribution;
pub mod subactions;

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::oneshot;

use self::attribution::{Attributor, Message};
use super::clients::observation::{Call, CallOrigin};
use super::flights::FlightKey;
use super::priming::Group;
use super::records::parent::{ExecutedParent, ParentIdentity, WeakKey};
use crate::reapi::ActionResult;

/// Calls that are held at a time; further ones are taken for the client's own.
const MAX_HELD: usize = 100_000;

/// An action parent that is being executed.
pub struct OpenParent {
    /// It is primed with these.
    pub group: Group,
    /// Has the proxy look at its result.
    pub _completing: subactions::OpenParent,
    /// As what it has been asked for.
    pub asked: ParentIdentity,
    /// What it, and what had its name before, is recorded under.
    pub keys: Vec<WeakKey>,
    /// What it is executed as; its outputs come last.
    pub executed: ExecutedParent,
}

/// A call that was answered.
pub enum Answered {
    /// A lookup.
    Lookup(Box<Call>),
    /// An execution.
    Execution(Box<Call>),
}

impl Answered {
    fn call(&self) -> &Call {
        match self {
            Answered::Lookup(call) | Answered::Execution(call) => call,
        }
    }

    /// The result, if there is one.
    fn result(&self) -> Option<ActionResult> {
        match self {
            Answered::Lookup(call) => {
                let found = call.answer.status == Some(tonic::Code::Ok as u32);
                found.then(|| call.answer.last_message()).flatten()
            }
            Answered::Execution(call) => call.answer.executed().ok(),
        }
    }
}

/// What is open.
pub struct Nested {
    attributor: Attributor,
    open: HashMap<FlightKey, OpenParent>,
    /// How many executions were asked about, and of how many of them it is known whether they are
    /// parents. It becomes known in order.
    executions: u64,
    known: u64,
    /// Whether calls may be on behalf of parents: while any is open, and after the last one has been
    /// closed until so many executions are known, all that had begun by then.
    holds: bool,
    holds_until: u64,
    /// On whose behalf actions are asked for, as far as it is known.
    attributed: HashMap<FlightKey, Option<FlightKey>>,
    held: HashMap<FlightKey, Vec<Answered>>,
}

impl Nested {
    /// Nothing is open.
    pub fn new(attributor: Attributor) -> Self {
        Nested {
            attributor,
            open: HashMap::new(),
            executions: 0,
            known: 0,
            holds: false,
            holds_until: 0,
            attributed: HashMap::new(),
            held: HashMap::new(),
        }
    }

    /// Asks what an action is, and on whose behalf it is asked for.
    pub fn ask(&mut self, origin: &CallOrigin, key: &FlightKey, executes: bool) -> bool {
        let is_told = self.attributor.tell(Message::Asked {
            origin: origin.clone(),
            key: key.clone(),
            executes,
        });
        self.executions += u64::from(is_told && executes);
        is_told
    }

    /// It is known now whether the next execution is a parent; what is, is open by now.
    pub fn is_known(&mut self) {
        self.known += 1;
    }

    /// Gives an answered call back with the parent on whose behalf it was made, or holds it until
    /// that is known.
    pub fn decide(&mut self, answered: Answered) -> Option<(Answered, Option<FlightKey>)> {
        let call = answered.call();
        if !self.holds || self.open.contains_key(&call.key) {
            return Some((answered, None));
        }
        let parent = self.attributed.get(&call.key).cloned();
        // What was missed will be executed, and is asked about then.
        if let Some(result) = answered.result() {
            let is_asked = parent.is_some() || self.ask(&call.origin, &call.key, false);
            if !is_asked {
                return Some((answered, None));
            }
            self.tell_written(&call.key, &result);
        }
        if let Some(parent) = parent {
            return Some((answered, parent));
        }
        if self.held.len() >= MAX_HELD {
            return Some((answered, None));
        }
        let held = self.held.entry(call.key.clone()).or_default();
        held.push(answered);
        None
    }

    /// It is known now on whose behalf an action is asked for: the calls about it that were held.
    pub fn attribute(&mut self, key: FlightKey, parent: Option<FlightKey>) -> Vec<Answered> {
        let held = self.held.remove(&key).unwrap_or_default();
        if self.holds {
            self.attributed.insert(key, parent);
        }
        held
    }

    /// The parents that are open.
    pub fn open(&self) -> impl Iterator<Item = (&FlightKey, &OpenParent)> {
        self.open.iter()
    }

    /// What is primed with an open parent.
    pub fn group(&self, key: &FlightKey) -> Option<&Group> {
        self.open.get(key).map(|open| &open.group)
    }

    /// Opens a parent.
    pub fn begin(&mut self, key: FlightKey, parent: OpenParent) {
        self.open.insert(key, parent);
        self.holds = true;
    }

    fn tell_written(&self, key: &FlightKey, result: &ActionResult) {
        let files = result.output_files.iter().filter_map(|file| {
            let digest = key.action.function().read(file.digest.as_ref()).ok()?;
            Some((file.path.clone(), digest))
        });
        // Whoever is not told knows less of what further actions read.
        self.attributor.tell(Message::Wrote {
            key: key.clone(),
            files: files.collect(),
        });
    }

    /// Drops `reply` when all that was asked before is answered, and what `parent` has run is known.
    pub fn complete(&self, parent: &FlightKey, reply: oneshot::Sender<()>) {
        self.attributor.tell(Message::Completing {
            parent: parent.clone(),
            reply,
        });
    }

    /// What may be a parent has ended. It is closed when all that was asked before is answered, for
    /// only then it is known.
    pub fn end(&self, parent: &FlightKey, result: Option<Arc<ActionResult>>) -> bool {
        self.attributor.tell(Message::Ended {
            parent: parent.clone(),
            result,
        })
    }

    /// Closes a parent.
    pub fn close(&mut self, parent: &FlightKey) -> Option<OpenParent> {
        let closed = self.open.remove(parent)?;
        self.holds_until = self.executions;
        Some(closed)
    }

    /// When no call can be on behalf of a parent any more, gives back those of which nothing was
    /// found out.
    pub fn let_go(&mut self) -> Vec<Answered> {
        if !self.holds || !self.open.is_empty() || self.known < self.holds_until {
            return Vec::new();
        }
        self.holds = false;
        self.attributed.clear();
        let held = self.held.drain();
        held.flat_map(|(_, held)| held).collect()
    }
}
