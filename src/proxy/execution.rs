//! `Execute`: forwarded and observed; one for an action in flight joins it, and sees the stages
//! and the result of the execution that is under way. If that one ends otherwise than with a
//! result, the client's own call is forwarded.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::{Response, request};
use http_body::Frame;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::sync::{mpsc, watch};
use tonic::Code;

use super::body::{RequestBody, ResponseBody};
use super::tap::{Observed, Tap};
use super::{Asked, MAX_OBSERVED_REQUEST, Proxy, about, asked, grpc, origin, response};
use crate::reapi::ExecuteRequest;
use crate::speculation::Engine;
use crate::speculation::flights::{Ending, Stage};
use crate::speculation::observation::{Answer, Call};
use crate::task;
use crate::workspace::peer::Peer;

pub const METHOD: &str = "/build.bazel.remote.execution.v2.Execution/Execute";

/// Stage updates that may wait for a slow reader.
const STAGES_UNREAD: usize = 8;

pub async fn call(
    proxy: &Arc<Proxy>,
    engine: &Engine,
    peer: &Arc<Peer>,
    parts: request::Parts,
    body: Incoming,
) -> Response<ResponseBody> {
    let began = Instant::now();
    let (message, body) = RequestBody::read_first_message(body, MAX_OBSERVED_REQUEST).await;
    let Asked::About(key) = asked(peer, METHOD, message, |request: ExecuteRequest| {
        if request.skip_cache_lookup {
            return Some(Asked::LeftAlone);
        }
        let function = request.digest_function;
        about(request.instance_name, request.action_digest, function)
    }) else {
        return proxy.forward(parts, body).await;
    };
    let mut call = Call {
        origin: origin(peer, &parts.headers),
        key,
        joined: None,
        answer: Answer::default(),
    };
    if let Some(stage) = engine.flights().join(&call.key) {
        match first_word(stage).await {
            FirstWord::Stage(operation, stage) => {
                call.joined = Some(began.elapsed());
                let own = OwnCall { parts, body };
                return joined(proxy, engine, call, own, operation, stage);
            }
            FirstWord::Result(operation) => {
                call.joined = Some(began.elapsed());
                let (frames, body) = mpsc::channel(2);
                let framed = grpc::framed(&operation);
                // Both fit into the channel.
                let _ = frames.try_send(Frame::data(framed.clone()));
                let _ = frames.try_send(Frame::trailers(grpc::trailers(Code::Ok, "")));
                let tap = Tap::new(engine.clone(), Observed::Execution, call);
                tap.end_with(Answer::of_message(framed));
                return response::started(ResponseBody::made(body));
            }
            FirstWord::Nothing => {}
        }
    }
    own_call(proxy, engine, call, OwnCall { parts, body }).await
}

/// The client's own call, in case it must be forwarded after all.
struct OwnCall {
    parts: request::Parts,
    body: RequestBody,
}

/// Forwards the client's own call, observed.
async fn own_call(
    proxy: &Proxy,
    engine: &Engine,
    call: Call,
    own: OwnCall,
) -> Response<ResponseBody> {
    let guard = engine.flights().client_executes(call.key.clone());
    let response = proxy.forward(own.parts, own.body).await;
    let tap = Tap::new(engine.clone(), Observed::Execution, call).holding(guard);
    ResponseBody::observed_by(tap, response)
}

enum FirstWord {
    Stage(Bytes, watch::Receiver<Stage>),
    Result(Bytes),
    Nothing,
}

/// Waits until the joined flight has something to tell the client. Headers are sent only then,
/// so that a flight that comes to nothing leaves no trace in the client's own call.
async fn first_word(mut stage: watch::Receiver<Stage>) -> FirstWord {
    loop {
        let now = stage.borrow_and_update().clone();
        match now {
            Stage::Running(Some(operation)) => return FirstWord::Stage(operation, stage),
            Stage::Ended(Ending::Succeeded(operation)) => return FirstWord::Result(operation),
            Stage::Ended(_) => return FirstWord::Nothing,
            Stage::Queued | Stage::Running(None) => {}
        }
        if stage.changed().await.is_err() {
            return FirstWord::Nothing;
        }
    }
}

/// Passes stages and result on to the client, frame by frame.
fn joined(
    proxy: &Arc<Proxy>,
    engine: &Engine,
    call: Call,
    own: OwnCall,
    operation: Bytes,
    stage: watch::Receiver<Stage>,
) -> Response<ResponseBody> {
    let (frames, body) = mpsc::channel(STAGES_UNREAD);
    let relay = Relay {
        proxy: proxy.clone(),
        engine: engine.clone(),
        frames,
    };
    task::spawn("joined execution", relay.run(call, own, operation, stage));
    response::started(ResponseBody::made(body))
}

/// Carries a joined execution to its client.
struct Relay {
    proxy: Arc<Proxy>,
    engine: Engine,
    frames: mpsc::Sender<Frame<Bytes>>,
}

impl Relay {
    async fn run(
        self,
        mut call: Call,
        own: OwnCall,
        operation: Bytes,
        mut stage: watch::Receiver<Stage>,
    ) {
        let mut operation = Some(operation);
        loop {
            if let Some(operation) = operation.take() {
                self.send(Frame::data(grpc::framed(&operation))).await;
            }
            tokio::select! {
                changed = stage.changed() => if changed.is_err() { break },
                () = self.frames.closed() => return,
            }
            let now = stage.borrow_and_update().clone();
            match now {
                Stage::Queued => {}
                Stage::Running(update) => operation = update,
                Stage::Ended(Ending::Succeeded(result)) => {
                    let framed = grpc::framed(&result);
                    self.send(Frame::data(framed.clone())).await;
                    self.send(Frame::trailers(grpc::trailers(Code::Ok, "")))
                        .await;
                    let tap = Tap::new(self.engine, Observed::Execution, call);
                    return tap.end_with(Answer::of_message(framed));
                }
                Stage::Ended(_) => break,
            }
        }
        call.joined = None;
        let response = own_call(&self.proxy, &self.engine, call, own).await;
        let (parts, mut body) = response.into_parts();
        if grpc::status(&parts.headers).is_some() {
            // What would have stood in the headers ends the stream that has begun.
            self.send(Frame::trailers(parts.headers)).await;
        }
        while let Some(frame) = body.frame().await {
            let frame =
                frame.unwrap_or_else(|reset| Frame::trailers(grpc::broken_upstream(&reset)));
            if self.frames.send(frame).await.is_err() {
                return;
            }
        }
    }

    /// A client that is gone is no error: whoever waits for the frames has dropped them.
    async fn send(&self, frame: Frame<Bytes>) {
        let _ = self.frames.send(frame).await;
    }
}
