//! `Execute`: forwarded and observed; one for an action in flight joins it, and sees the stages
//! and the result of the execution that is under way. If that one ends otherwise than with a
//! result, the client's own call is forwarded.

use std::sync::Arc;

use tokio::sync::watch;
use tonic::Code;

use super::parent_answer::{completed, completing};
use super::tap::{Method, Tap};
use super::{Asked, Call, Proxy, Reply, about, asked};
use crate::grpc;
use crate::reapi::ExecuteRequest;
use crate::speculation::Engine;
use crate::speculation::flights::{Ending, Stage};
use crate::speculation::observation::{Answer, Call as Observed, Observation};

pub const METHOD: &str = "/build.bazel.remote.execution.v2.Execution/Execute";

pub async fn call(proxy: Arc<Proxy>, engine: Engine, call: Call, mut reply: Reply) {
    let mut call = call;
    let read = |request: ExecuteRequest| {
        if request.skip_cache_lookup {
            return Some(Asked::LeftAlone);
        }
        let function = request.digest_function;
        about(request.instance_name, request.action_digest, function)
    };
    let key = match asked(&mut call, &mut reply, read).await {
        Some(Asked::About(key)) => key,
        Some(Asked::LeftAlone) => return proxy.forward(call, reply, None).await,
        None => return,
    };
    let observed = call.observed(key);
    if let Some(stage) = engine.flights().join(&observed.key) {
        return joined(proxy, engine, call, observed, stage, reply).await;
    }
    own_call(proxy, engine, call, observed, reply).await;
}

/// Forwards the client's own call, observed.
async fn own_call(proxy: Arc<Proxy>, engine: Engine, call: Call, observed: Observed, reply: Reply) {
    engine.observe(Observation::Executing {
        origin: observed.origin.clone(),
        key: observed.key.clone(),
    });
    followed(proxy, engine, call, observed, reply).await;
}

/// Forwards a call that tells of the client's own execution to its end, observed.
pub async fn followed(
    proxy: Arc<Proxy>,
    engine: Engine,
    call: Call,
    observed: Observed,
    mut reply: Reply,
) {
    let guard = engine.flights().client_executes(observed.key.clone());
    if let Some(answer) = reply.unless_gone(proxy.send(call)).await {
        let answer =
            answer.map(|answer| completing(&engine, &observed.key, Method::Execution, answer));
        let tap = Tap::new(engine, Method::Execution, observed).holding(guard);
        reply.finish(answer, Some(tap)).await;
    }
}

/// Tells the client what becomes of the flight that it joins. Nothing is sent before the flight has
/// something to tell, so that one that comes to nothing leaves no trace in the client's own call.
async fn joined(
    proxy: Arc<Proxy>,
    engine: Engine,
    call: Call,
    mut observed: Observed,
    mut stage: watch::Receiver<Stage>,
    mut reply: Reply,
) {
    loop {
        let now = stage.borrow_and_update().clone();
        let (operation, ended) = match now {
            Stage::Running(Some(operation)) => (Some(operation), false),
            Stage::Ended(Ending::Succeeded(operation)) => (Some(operation), true),
            Stage::Ended(_) => break,
            Stage::Queued | Stage::Running(None) => (None, false),
        };
        if let Some(mut operation) = operation {
            if ended {
                let last = Box::pin(completed(&engine, &observed.key, operation));
                match reply.unless_gone(last).await {
                    Some(completed) => operation = completed,
                    None => return,
                }
            }
            let framed = grpc::framed(&operation);
            let joined = call.began.elapsed();
            observed.joined.get_or_insert(joined);
            match reply.message(framed.clone()).await {
                Some(rest) => reply = rest,
                None => return,
            }
            if ended {
                let tap = Tap::new(engine.clone(), Method::Execution, observed);
                tap.end_with(Answer::of_message(framed));
                return reply.end(Code::Ok, "");
            }
        }
        match reply.unless_gone(stage.changed()).await {
            Some(Ok(())) => {}
            Some(Err(_)) => break,
            None => return,
        }
    }
    observed.joined = None;
    own_call(proxy, engine, call, observed, reply).await;
}
