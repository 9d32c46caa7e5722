//! The call behind a shared execution: sent as the client that began it made it, and followed in a
//! task of its own, so that it does not depend on that client. That client, the leader, is told
//! all of it, byte for byte; those who read along are told the operations. If the call is cut off
//! while others wait, they go on by `WaitExecution`.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::Frame;
use http_body_util::BodyExt as _;
use prost::Message as _;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::shared_execution::{Presence, Reader, Shared};
use super::{Call, Proxy, methods};
use crate::backend::exchange::{Answer, CallError};
use crate::backend::upstream::UpstreamError;
use crate::grpc::{self, FRAME_HEADER, Prefix};
use crate::http2::body::Body;
use crate::http2::fields::Fields;
use crate::http2::frame::Reason;
use crate::http2::stream::AnswerHead;
use crate::reapi::WaitExecutionRequest;
use crate::reapi::google::longrunning::{CancelOperationRequest, Operation};
use crate::speculation::Engine;
use crate::speculation::clients::observation::may_go_on;
use crate::speculation::flights::ClientExecution;
use crate::speculation::flights::stages::{Told, told};
use crate::task;

/// The longest operation that is shared: what gRPC clients take unless they are told otherwise.
const MAX_OPERATION: usize = 4 * 1024 * 1024;
/// How much may wait for a leader that reads slowly. Alone, it slows the upstream down; with
/// others, it misses operations that newer ones have followed.
const AHEAD: usize = 256;
/// How often a call that was cut off is resumed.
const RESUMPTIONS: usize = 3;
/// How long an execution may be queued until something speculative gives way to it, and then something
/// more.
const QUEUED: Duration = Duration::from_millis(100);
/// How long the backend has to take note of a cancellation.
const CANCELLATION: Duration = Duration::from_secs(10);

type Part = Result<Frame<Bytes>, CallError>;

/// How the leader's call began: the answer's head, and whether that is all of it.
type Begun = Result<(AnswerHead, bool), UpstreamError>;

/// The leader's side of a shared execution.
pub struct Leader {
    presence: Presence,
    /// To be kept until the engine knows of the end: to it, what nobody executes can be primed.
    pub executes: Arc<ClientExecution>,
    begun: oneshot::Receiver<Begun>,
    parts: mpsc::Receiver<Part>,
}

/// Begins `shared` with the call of a client that is to be answered with it.
pub fn lead(proxy: &Arc<Proxy>, engine: &Arc<Engine>, shared: Arc<Shared>, call: Call) -> Leader {
    let (begin, begun) = oneshot::channel();
    let (to_leader, parts) = mpsc::channel(AHEAD);
    let presence = Presence::of(&shared, call.peer.id());
    let mut driver = Driver::new(proxy, engine, shared, &call);
    driver.leader = Some(to_leader);
    let leader = Leader {
        presence,
        executes: driver.executes.clone(),
        begun,
        parts,
    };
    task::spawn("shared execution", driver.run(call, Some(begin)));
    leader
}

/// Begins `shared` beside another execution of the same. If it turns out that nobody needs it, it
/// is cancelled.
pub fn hedge(proxy: &Arc<Proxy>, engine: &Arc<Engine>, shared: Arc<Shared>, call: Call) -> Reader {
    let reader = Reader::of(&shared, call.peer.id());
    let mut driver = Driver::new(proxy, engine, shared, &call);
    driver.is_hedge = true;
    task::spawn("hedged execution", driver.run(call, None));
    reader
}

impl Leader {
    /// What the upstream answers.
    ///
    /// # Errors
    /// `UpstreamError`, when there will be no answer.
    pub async fn answer(self) -> Result<Box<Answer>, UpstreamError> {
        // Only a panic would keep it from beginning.
        let lost = |_| UpstreamError::Call(CallError::Reset(Reason::INTERNAL_ERROR));
        let (head, is_all) = self.begun.await.map_err(lost)??;
        let body = match is_all {
            true => Body::empty(),
            false => Body::made(LeadersBody {
                parts: self.parts,
                _presence: self.presence,
            }),
        };
        Ok(Answer::made(head, body))
    }
}

/// What the leader is told after the head.
struct LeadersBody {
    parts: mpsc::Receiver<Part>,
    _presence: Presence,
}

impl http_body::Body for LeadersBody {
    type Data = Bytes;
    type Error = CallError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, CallError>>> {
        self.parts.poll_recv(cx)
    }
}

struct Driver {
    proxy: Arc<Proxy>,
    shared: Arc<Shared>,
    /// What further calls on behalf of the same client are made of.
    client: Call,
    leader: Option<mpsc::Sender<Part>>,
    /// What the leader has not had room for.
    due: VecDeque<Due>,
    operations: Operations,
    is_hedge: bool,
    executes: Arc<ClientExecution>,
    course: Course,
}

/// Where the execution is, as far as the backend tells.
enum Course {
    Untold,
    /// It waits for a worker, and for what gives way to it then.
    Queued(Instant),
    Executing,
}

/// A part of the answer that the leader has not had room for.
struct Due {
    part: Part,
    /// It can be left out.
    is_whole: bool,
}

/// How an answer ended.
enum Ended {
    With(Option<HeaderMap>),
    Broken(CallError),
    /// Nobody waits any more.
    Abandoned,
}

impl Driver {
    fn new(proxy: &Arc<Proxy>, engine: &Arc<Engine>, shared: Arc<Shared>, call: &Call) -> Self {
        let executes = engine
            .flights()
            .client_executes(shared.wish().circle.key().clone());
        Driver {
            proxy: proxy.clone(),
            client: call.bare(),
            leader: None,
            due: VecDeque::new(),
            operations: Operations::default(),
            is_hedge: false,
            executes: Arc::new(executes),
            course: Course::Untold,
            shared,
        }
    }

    async fn run(mut self, call: Call, begun: Option<oneshot::Sender<Begun>>) {
        let (mut call, mut begun) = (call, begun);
        for _ in 0..=RESUMPTIONS {
            let proxy = self.proxy.clone();
            let shared = self.shared.clone();
            let sent = tokio::select! {
                sent = proxy.send(call) => sent,
                () = abandoned(&proxy, &shared, self.is_hedge) => return,
            };
            let answer = match (sent, begun.take()) {
                (Ok(mut answer), Some(begun)) => {
                    let head = std::mem::take(&mut answer.head);
                    let _ = begun.send(Ok((head, answer.is_end_stream())));
                    answer
                }
                (Ok(answer), None) => answer,
                // What the leader makes of it is up to the leader; others make their own calls.
                (Err(error), begun) => {
                    if let Some(begun) = begun {
                        let _ = begun.send(Err(error));
                    }
                    return;
                }
            };
            let early_status = grpc::status(&answer.head.headers);
            let (last, goes_on) = match self.follow(answer).await {
                Ended::With(trailers) => {
                    let status = trailers.as_ref().map(Fields::from);
                    let status = status.as_ref().and_then(grpc::status);
                    let status = status.or(early_status);
                    (trailers.map(Frame::trailers).map(Ok), may_go_on(status))
                }
                Ended::Broken(error) => (Some(Err(error)), true),
                Ended::Abandoned => return self.abandon().await,
            };
            self.dismiss_leader(last);
            match self.resumption().filter(|_| goes_on) {
                Some(next) => call = next,
                None => return,
            }
        }
    }

    /// Passes the answer on to its end.
    async fn follow(&mut self, mut answer: Box<Answer>) -> Ended {
        let (proxy, shared, is_hedge) = (self.proxy.clone(), self.shared.clone(), self.is_hedge);
        loop {
            let may_read = self.due.is_empty() || self.is_read_along();
            let queued = match self.course {
                Course::Queued(until) => Some(until),
                _ => None,
            };
            let leader = match self.due.is_empty() {
                true => None,
                false => self.leader.clone(),
            };
            tokio::select! {
                frame = answer.frame(), if may_read => match frame {
                    Some(Ok(frame)) => match frame.into_data() {
                        Ok(chunk) => self.pass(chunk),
                        Err(frame) => return Ended::With(frame.into_trailers().ok()),
                    },
                    Some(Err(error)) => return Ended::Broken(error),
                    None => return Ended::With(None),
                },
                room = room_for(leader) => match (room, self.due.pop_front()) {
                    (Some(room), Some(due)) => drop(room.send(due.part)),
                    _ => self.lose_leader(),
                },
                () = shared.gains_reader(), if !may_read => {}
                () = until(queued) => {
                    self.executes.is_still_queued();
                    self.course = Course::Queued(Instant::now() + QUEUED);
                }
                () = abandoned(&proxy, &shared, is_hedge) => return Ended::Abandoned,
            }
        }
    }

    /// Passes on a chunk of the answer.
    fn pass(&mut self, chunk: Bytes) {
        let begins = self.operations.are_complete();
        if !self.operations.are_opaque {
            for framed in self.operations.split(chunk.clone()) {
                self.note_course(&framed);
                self.shared.push(framed);
            }
            if self.operations.are_opaque {
                self.shared.break_off();
            }
        }
        let is_whole = begins && self.operations.are_complete();
        self.tell_leader(chunk, is_whole);
    }

    fn note_course(&mut self, framed: &Bytes) {
        if matches!(self.course, Course::Executing) {
            return;
        }
        match (told(framed.slice(FRAME_HEADER..)), &self.course) {
            (Told::Executing, _) => self.course = Course::Executing,
            (Told::Queued, Course::Untold) => self.course = Course::Queued(Instant::now() + QUEUED),
            _ => {}
        }
    }

    /// `is_whole` if the chunk is made of nothing but operations from their beginning to their end.
    fn tell_leader(&mut self, chunk: Bytes, is_whole: bool) {
        let Some(leader) = &self.leader else { return };
        let part = Ok(Frame::data(chunk));
        if self.due.is_empty() {
            match leader.try_send(part) {
                Ok(()) => {}
                Err(TrySendError::Full(part)) => self.due.push_back(Due { part, is_whole }),
                Err(TrySendError::Closed(_)) => self.lose_leader(),
            }
            return;
        }
        if self.due.len() >= AHEAD && self.is_read_along() {
            let oldest = self.due.iter().position(|due| due.is_whole);
            oldest.and_then(|oldest| self.due.remove(oldest));
        }
        self.due.push_back(Due { part, is_whole });
    }

    /// Whether there are others than the leader to whom this matters.
    fn is_read_along(&self) -> bool {
        self.shared.has_readers() && !self.operations.are_opaque
    }

    fn lose_leader(&mut self) {
        self.leader = None;
        self.due.clear();
    }

    /// Tells the leader how its call ended, as soon as it has read the rest.
    fn dismiss_leader(&mut self, last: Option<Part>) {
        let Some(leader) = self.leader.take() else {
            return;
        };
        let due = std::mem::take(&mut self.due);
        let mut rest: VecDeque<Part> = due.into_iter().map(|due| due.part).chain(last).collect();
        while let Some(part) = rest.pop_front() {
            match leader.try_send(part) {
                Ok(()) => {}
                Err(TrySendError::Full(part)) => {
                    rest.push_front(part);
                    break;
                }
                Err(TrySendError::Closed(_)) => return,
            }
        }
        if !rest.is_empty() {
            task::spawn("end of a shared execution", async move {
                for part in rest {
                    if leader.send(part).await.is_err() {
                        return;
                    }
                }
            });
        }
    }

    /// The call by which those who read along go on waiting, if there is an operation to wait for.
    fn resumption(&self) -> Option<Call> {
        let running = self.running()?;
        let request = WaitExecutionRequest { name: running.name };
        self.is_read_along()
            .then(|| self.client.beside(methods::WAIT_EXECUTION, &request))
    }

    /// The last operation, if it has a name and is not done.
    fn running(&self) -> Option<Operation> {
        let last = Operation::decode(self.shared.last()?).ok()?;
        (!last.done && !last.name.is_empty()).then_some(last)
    }

    /// What the backend does with an execution that a client has left is its own affair; one that
    /// primed has begun beside another is not to go on in vain.
    async fn abandon(self) {
        let running = self.running().filter(|_| self.is_hedge);
        let Some(Operation { name, .. }) = running else {
            return;
        };
        let proxy = self.proxy.clone();
        let cancel = self
            .client
            .beside(methods::CANCEL_OPERATION, &CancelOperationRequest { name });
        drop(self);
        let cancelled = async {
            if let Ok(answer) = proxy.send(cancel).await {
                let _ = answer.collect().await;
            }
        };
        let _ = tokio::time::timeout(CANCELLATION, cancelled).await;
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.proxy.joining.count_end();
        self.proxy.joining.executions.end(&self.shared);
    }
}

/// Waits until nobody waits for `shared` any more; with one that is to be cancelled then, also for
/// its name.
async fn abandoned(proxy: &Proxy, shared: &Arc<Shared>, is_hedge: bool) {
    proxy.joining.executions.abandoned(shared).await;
    if is_hedge && shared.last().is_none() {
        tokio::time::sleep(CANCELLATION).await;
    }
}

/// Waits until then; for ever, if that is never.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Room for one more part; `None` if the leader has gone. Waits for ever without a leader.
async fn room_for(leader: Option<mpsc::Sender<Part>>) -> Option<mpsc::OwnedPermit<Part>> {
    match leader {
        Some(leader) => leader.reserve_owned().await.ok(),
        None => std::future::pending().await,
    }
}

/// The operations in an answer that was split anywhere.
#[derive(Default)]
struct Operations {
    /// The beginning of one that is not complete yet.
    held: BytesMut,
    /// They are compressed or very long, and only for the client that understands them.
    are_opaque: bool,
}

impl Operations {
    /// The operations that are complete with `chunk`, in their frames.
    fn split(&mut self, chunk: Bytes) -> Vec<Bytes> {
        let mut rest = match self.held.is_empty() {
            true => chunk,
            false => {
                self.held.extend_from_slice(&chunk);
                self.held.split().freeze()
            }
        };
        let mut complete = Vec::new();
        while let Some(Prefix { compressed, length }) = grpc::prefix(&rest) {
            if compressed || length > MAX_OPERATION {
                self.are_opaque = true;
                return complete;
            }
            if rest.len() < FRAME_HEADER + length {
                break;
            }
            complete.push(rest.split_to(FRAME_HEADER + length));
        }
        self.held.extend_from_slice(&rest);
        complete
    }

    /// Whether there is none of which a part is still to come.
    fn are_complete(&self) -> bool {
        self.held.is_empty() && !self.are_opaque
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_found_however_their_bytes_were_split() {
        let sent: Vec<Bytes> = [b"one".as_slice(), b"", b"three"].map(grpc::framed).into();
        let whole: Bytes = sent.concat().into();
        for middle in 0..=whole.len() {
            let mut operations = Operations::default();
            let mut found = operations.split(whole.slice(..middle));
            found.extend(operations.split(whole.slice(middle..)));
            assert_eq!(found, sent, "{middle}");
            assert!(operations.are_complete());
        }
        let mut operations = Operations::default();
        assert_eq!(operations.split(whole.slice(..10)), sent[..1]);
        assert!(!operations.are_complete());
    }

    #[test]
    fn what_is_compressed_or_too_long_is_not_looked_into() {
        let long = (MAX_OPERATION as u32 + 1).to_be_bytes();
        for odd in [
            Bytes::from_static(&[1, 0, 0, 0, 9, 7]),
            [&[0], &long[..]].concat().into(),
        ] {
            let mut operations = Operations::default();
            let first = grpc::framed(b"one");
            let found = operations.split([first.clone(), odd].concat().into());
            assert_eq!(found, [first]);
            assert!(operations.are_opaque && !operations.are_complete());
        }
    }
}
