//! Joining: a client that asks for what is being executed already, ahead of time or by another
//! client, is told of that execution as of its own. If it comes to nothing, the client's own call
//! is made after all; if it is silent for too long, beside it, and the first result counts.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use moka::sync::Cache;
use prost::Message as _;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::Code;

use super::alike::Wish;
use super::leading::hedge;
use super::parent_answer::completed;
use super::shared_execution::{Entered, Reader, SharedExecutions};
use super::tap::{Method, Tap};
use super::{Call, Observed, Proxy, Reply};
use crate::grpc;
use crate::reapi::ExecuteResponse;
use crate::reapi::google::longrunning::{Operation, operation};
use crate::speculation::Engine;
use crate::speculation::clients::observation::{Answer, Observation};
use crate::speculation::flights::{Ending, FlightKey, Stage};

/// An execution that is joined is given up as stuck when it has been silent for so many times the
/// recorded duration,
const TIMES_RECORDED: u32 = 5;
/// which counts as this long where there is none,
const UNRECORDED: Duration = Duration::from_secs(60);
/// and for no less than this.
const LEAST_PATIENCE: Duration = Duration::from_secs(10);
/// As long again, and so often, if other executions have ended meanwhile: then the backend is busy
/// rather than stuck, and would be the busier for one more. (buildbox-casd does not say what waits
/// for a slot.)
const BUSY_EXTENSIONS: u32 = 4;

/// How long the end of an execution is kept for a client whose lookup waited for it, and how many
/// bytes of such ends.
const TICKET: Duration = Duration::from_secs(10);
const TICKETS_BYTES: u64 = 16 * 1024 * 1024;
/// Of how many actions it is remembered whether they may be shared.
const SHARABLE: usize = 10_000;

/// What clients of one primed execute together.
pub struct Joining {
    /// What is under way.
    pub(super) executions: SharedExecutions,
    /// What lookups have waited for and not found, by connection.
    tickets: Cache<(u64, FlightKey), Arc<Ticket>>,
    /// Whether actions that several clients have executed at a time may be shared.
    pub(super) sharable: quick_cache::sync::Cache<FlightKey, bool>,
    /// How many clients' executions have ended.
    ended: AtomicU64,
    hedge_after: Option<Duration>,
}

/// The end of an execution, for one who has waited for it by a lookup in vain: some results are not
/// put into the action cache.
struct Ticket {
    wish: Wish,
    operation: Bytes,
}

impl Joining {
    /// What is joined is given up as stuck after a silence of `hedge_after`, if that is set.
    pub fn new(hedge_after: Option<Duration>) -> Arc<Self> {
        let weigh = |_: &_, ticket: &Arc<Ticket>| ticket.operation.len() as u32;
        Arc::new(Joining {
            executions: SharedExecutions::default(),
            tickets: Cache::builder()
                .max_capacity(TICKETS_BYTES)
                .weigher(weigh)
                .time_to_live(TICKET)
                .build(),
            sharable: quick_cache::sync::Cache::new(SHARABLE),
            ended: AtomicU64::new(0),
            hedge_after,
        })
    }

    /// How long something that is joined may be silent; `recorded` is how long it took before.
    pub fn patience(&self, recorded: Option<Duration>) -> Duration {
        self.hedge_after.unwrap_or_else(|| {
            let patience = recorded.unwrap_or(UNRECORDED) * TIMES_RECORDED;
            patience.max(LEAST_PATIENCE)
        })
    }

    /// A client's execution has ended.
    pub(super) fn count_end(&self) {
        self.ended.fetch_add(1, Ordering::Relaxed);
    }

    /// Changes whenever an execution ends.
    fn ends(&self, engine: &Engine) -> u64 {
        let flights = engine.flights().counts();
        self.ended.load(Ordering::Relaxed) + flights.completed + flights.failed
    }

    /// Keeps the end of an execution for an `Execute` on the connection `peer`.
    pub fn keep(&self, peer: u64, wish: Wish, operation: Bytes) {
        let key = (peer, wish.circle.key().clone());
        let ticket = Ticket { wish, operation };
        self.tickets.insert(key, Arc::new(ticket));
    }

    /// What was kept for this `wish`, once.
    pub fn redeem(&self, peer: u64, wish: &Wish) -> Option<Bytes> {
        let ticket = self.tickets.remove(&(peer, wish.circle.key().clone()))?;
        (ticket.wish == *wish).then(|| ticket.operation.clone())
    }
}

/// An execution that is under way.
pub enum Joined {
    /// One that primed has begun ahead of time.
    Flight(watch::Receiver<Stage>),
    /// A client's.
    Shared(Reader),
}

/// What is told of it.
pub enum News {
    /// An operation, encoded, that is not done.
    Operation(Bytes),
    /// The operation that ended it with a result.
    Done(Bytes),
    /// It has ended otherwise.
    Over,
}

impl Joined {
    /// Joins a flight.
    pub fn flight(mut stage: watch::Receiver<Stage>) -> Self {
        stage.mark_changed();
        Joined::Flight(stage)
    }

    /// The next that is told. Nothing is lost if this is dropped.
    pub async fn news(&mut self) -> News {
        match self {
            Joined::Flight(stage) => loop {
                if stage.changed().await.is_err() {
                    return News::Over;
                }
                match &*stage.borrow_and_update() {
                    Stage::Running(Some(operation)) => return News::Operation(operation.clone()),
                    Stage::Ended(Ending::Succeeded(operation)) => {
                        return News::Done(operation.clone());
                    }
                    Stage::Ended(_) => return News::Over,
                    Stage::Queued | Stage::Running(None) => {}
                }
            },
            Joined::Shared(reader) => match reader.next().await {
                Some(operation) => judged(operation),
                None => News::Over,
            },
        }
    }

    /// How long the action took before, as far as that is known.
    fn recorded(&self, engine: &Engine, key: &FlightKey) -> Option<Duration> {
        let record = engine.flights().record(key).filter(|_| self.is_flight())?;
        Some(record.flown().expected).filter(|expected| !expected.is_zero())
    }

    fn is_flight(&self) -> bool {
        matches!(self, Joined::Flight(_))
    }
}

/// Waits for the result of an execution; `None` if there will be none.
pub async fn result(reader: &mut Reader) -> Option<Bytes> {
    while let Some(operation) = reader.next().await {
        match judged(operation) {
            News::Operation(_) => {}
            News::Done(operation) => return Some(operation),
            News::Over => return None,
        }
    }
    None
}

/// What an encoded operation says.
fn judged(encoded: Bytes) -> News {
    match Operation::decode(encoded.clone()) {
        Ok(operation) if operation.done => match has_result(operation.result) {
            true => News::Done(encoded),
            false => News::Over,
        },
        _ => News::Operation(encoded),
    }
}

fn has_result(result: Option<operation::Result>) -> bool {
    let Some(operation::Result::Response(any)) = result else {
        return false;
    };
    ExecuteResponse::decode(any.value.as_slice()).is_ok_and(|response| {
        response.result.is_some() && response.status.is_none_or(|status| status.code == 0)
    })
}

/// A client that joins.
pub struct Joiner<'a> {
    pub proxy: &'a Arc<Proxy>,
    pub engine: &'a Arc<Engine>,
    pub observed: Observed,
    /// What it does about an execution that is silent for too long; `None`: it waits.
    pub own: Option<(Wish, Call)>,
}

/// What happens next to a client that has joined.
enum Next {
    Joined(News),
    Own(News),
    Stuck,
}

impl Joiner<'_> {
    /// Tells the client what becomes of the execution that it has joined. Nothing is sent before
    /// there is something to tell, so that one that comes to nothing leaves no trace in the
    /// client's own call. Returns what is left of the reply if that has to be made.
    pub async fn follow(mut self, mut joined: Joined, mut reply: Reply) -> Option<Unanswered> {
        let key = self.observed.key.clone();
        let patience = self
            .proxy
            .joining
            .patience(joined.recorded(self.engine, &key));
        tracing::debug!(action = %key.action, "a client joins an execution");
        let mut stuck_at = Instant::now() + patience;
        let joining = &self.proxy.joining;
        let mut ends = joining.ends(self.engine);
        let mut extensions = match joining.hedge_after {
            Some(_) => 0,
            None => BUSY_EXTENSIONS,
        };
        let mut beside: Option<Joined> = None;
        // Whether its own call is the one beside; and whether what it reads is another's.
        let (mut leads, mut has_joined) = (false, true);
        let mut is_named = false;
        loop {
            let hedges = self.own.is_some();
            let own_news = async {
                match &mut beside {
                    Some(own) => own.news().await,
                    None => pending().await,
                }
            };
            let next = async {
                tokio::select! {
                    biased;
                    news = joined.news() => Next::Joined(news),
                    news = own_news => Next::Own(news),
                    () = tokio::time::sleep_until(stuck_at), if hedges => Next::Stuck,
                }
            };
            match reply.unless_gone(Box::pin(next)).await? {
                Next::Joined(News::Operation(operation)) => {
                    if !is_named {
                        is_named = true;
                        self.learn_name(&operation);
                    }
                    stuck_at = Instant::now() + patience;
                    reply = reply.message(grpc::framed(&operation)).await?;
                }
                Next::Joined(News::Done(operation)) => {
                    drop(beside);
                    self.end(operation, reply, has_joined).await;
                    return None;
                }
                Next::Own(News::Done(operation)) => {
                    drop(joined);
                    self.end(operation, reply, !leads).await;
                    return None;
                }
                Next::Own(News::Operation(_)) => {}
                Next::Joined(News::Over) => match beside.take() {
                    Some(own) => (joined, has_joined) = (own, !leads),
                    None => return Some(self.unanswered(joined, reply)),
                },
                // Without primed, this is what the client would have been told.
                Next::Own(News::Over) => {
                    let unanswered = self.unanswered(joined, reply);
                    return Some(Unanswered {
                        is_impatient: true,
                        ..unanswered
                    });
                }
                Next::Stuck if extensions > 0 && ends != self.proxy.joining.ends(self.engine) => {
                    extensions -= 1;
                    ends = self.proxy.joining.ends(self.engine);
                    stuck_at = Instant::now() + patience;
                }
                Next::Stuck => {
                    if let Some((own, is_led)) = self.hedge(&joined) {
                        (beside, leads) = (Some(own), is_led);
                    }
                }
            }
        }
    }

    fn unanswered(self, joined: Joined, reply: Reply) -> Unanswered {
        if let Joined::Shared(reader) = &joined {
            reader.shared().close();
        }
        Unanswered {
            observed: self.observed,
            reply,
            is_impatient: false,
        }
    }

    /// Makes the client's own call beside what it has joined, or joins one who has done so. Says
    /// also whether it leads.
    fn hedge(&mut self, joined: &Joined) -> Option<(Joined, bool)> {
        let (wish, call) = self.own.take()?;
        if let Joined::Shared(reader) = joined {
            reader.shared().close();
        }
        let action = &self.observed.key.action;
        tracing::info!(%action, "a joined execution is silent; the client's own call is made, too");
        let executions = &self.proxy.joining.executions;
        let (reader, leads) = match executions.enter(wish, call.peer.id()) {
            Entered::Join(reader) => (reader, false),
            Entered::Lead(shared) => {
                self.engine.observe(Observation::Executing {
                    origin: self.observed.origin.clone(),
                    key: self.observed.key.clone(),
                });
                (hedge(self.proxy, self.engine, shared, call), true)
            }
        };
        Some((Joined::Shared(reader), leads))
    }

    /// By this name the client can go on waiting.
    fn learn_name(&self, operation: &Bytes) {
        if let Ok(Operation { name, .. }) = Operation::decode(operation.clone()) {
            self.engine.name_operation(name, &self.observed.key);
        }
    }

    /// Tells the client how it ended.
    pub async fn end(mut self, operation: Bytes, mut reply: Reply, has_joined: bool) {
        self.observed.joined = has_joined.then(|| self.observed.began.elapsed());
        let completed = Box::pin(completed(self.engine, &self.observed.key, operation));
        let Some(operation) = reply.unless_gone(completed).await else {
            return;
        };
        let framed = grpc::framed(&operation);
        if let Some(reply) = reply.message(framed.clone()).await {
            let tap = Tap::new(self.engine.clone(), Method::Execution, self.observed);
            tap.end_with(Answer::of_message(framed));
            reply.end(Code::Ok, "");
        }
    }
}

/// A client that has joined in vain.
pub struct Unanswered {
    pub observed: Observed,
    pub reply: Reply,
    /// It has waited for long enough; its own call is to be made now.
    pub is_impatient: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_grows_with_the_recorded_duration_unless_it_is_set() {
        let seconds = Duration::from_secs;
        let derived = Joining::new(None);
        assert_eq!(derived.patience(Some(seconds(20))), seconds(100));
        assert_eq!(derived.patience(Some(seconds(1))), seconds(10));
        assert_eq!(derived.patience(None), seconds(300));
        let set = Joining::new(Some(seconds(3)));
        assert_eq!(set.patience(Some(seconds(20))), seconds(3));
    }
}
