//! Parents being primed: while builds of them run, a task of its own finds out what is known now,
//! adapts the recorded actions to it, uploads what they need and queues them.
//!
//! An invocation is primed by itself, from what its workspace holds. Action parents are primed
//! together, for what one is being built from, another will be built from next: those that have
//! been asked for, and those that depend on them.
//!
//! Messages are dealt with one after the other. A question is answered when all that came before
//! it is settled, so "is this digest in flight?" has its answer by then.

mod family;
mod prepare;
mod trust;
mod worker;

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

pub use self::family::Family;
use self::worker::Worker;
use super::activity::{Activities, Activity};
use super::flights::FlightKey;
use super::planning::known::CurrentParent;
use super::records::parent::{Parent, ParentIdentity, WeakKey};
use super::workshop::Workshop;
use crate::cas::DigestFunction;
use crate::cas::outputs::Outputs;
use crate::reapi::ActionResult;
use crate::task;

/// Messages that may wait for a priming that is busy.
const MAILBOX: usize = 16 * 1024;

/// A handle on a priming. When it is dropped, what is queued is withdrawn.
pub struct Priming {
    mailbox: mpsc::Sender<(Message, Activity)>,
    activities: Activities,
}

/// What is primed together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Group {
    /// An invocation parent.
    Invocation(WeakKey),
    /// The action parents that one user executes under one instance and digest function.
    Actions {
        /// The instance.
        instance: Arc<str>,
        /// The digest function.
        digest_function: DigestFunction,
        /// The user.
        uid: Option<u32>,
    },
}

/// What a priming is told.
pub enum Message {
    /// A build of an invocation has begun, or an earlier one found something else than expected:
    /// look at the workspace. The number names the build that speculative work is done for.
    Begin(u64),
    /// A source file was saved, and no build has begun: look at the workspace.
    Saved,
    /// An invocation of which nothing is recorded here asks: others may have shared it. Comes
    /// before whatever begins its priming.
    Unrecorded(Box<ParentIdentity>),
    /// An action parent has been asked for.
    Opened(Box<Opened>),
    /// What others have shared of parents that depend on one that has been asked for.
    Dependents(Vec<Arc<Parent>>),
    /// An action parent has ended with this output.
    Closed {
        /// As what it was asked for.
        asked: ParentIdentity,
        /// What it is recorded under.
        keys: Vec<WeakKey>,
        /// The files that it wrote, sorted by path.
        outputs: Arc<Outputs>,
    },
    /// A client's lookup found nothing. `reply` is dropped when the plan is settled; it is closed
    /// when all who were asked have done so.
    Question {
        /// What was looked up.
        key: FlightKey,
        /// When.
        asked: Instant,
        /// Closed for an answer.
        reply: Arc<oneshot::Sender<()>>,
    },
    /// Dropped when all that came before it is settled.
    Settled {
        /// Shared by all who are told.
        _reply: Arc<oneshot::Sender<()>>,
    },
    /// A client executes this action itself; what that needs is in the CAS.
    Executing {
        /// The action.
        key: FlightKey,
    },
    /// The records of an invocation were replaced.
    Records(Arc<Parent>),
    /// The build has used something of what was primed, for the first time.
    Used,
    /// A client has a result that primed did not bring it.
    Observed {
        /// Of this action.
        key: FlightKey,
        /// With exit code 0.
        result: Arc<ActionResult>,
    },
}

/// An action parent that has been asked for.
pub struct Opened {
    /// Which records it concerns.
    pub family: Family,
    /// What it is now.
    pub current: CurrentParent,
    /// Names the build that speculative work is done for, if it has begun.
    pub build: Option<u64>,
    /// As what it has been asked for, if none of its own records are here and others may have
    /// shared theirs.
    pub unrecorded: Option<ParentIdentity>,
}

impl Priming {
    /// Starts a priming of `group`.
    pub fn start(group: &Group, workshop: Workshop) -> Self {
        let (mailbox, messages) = mpsc::channel(MAILBOX);
        let activities = workshop.activities.clone();
        let worker = Worker::new(group, mailbox.downgrade(), workshop);
        task::spawn("priming", worker.run(messages));
        Priming {
            mailbox,
            activities,
        }
    }

    /// Tells it something. If it is too far behind, it is not told: a question is then answered
    /// at once.
    pub fn tell(&self, message: Message) {
        // Dropping what does not fit is the answer.
        let _ = self.mailbox.try_send((message, self.activities.begin()));
    }
}
