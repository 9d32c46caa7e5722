//! `GetActionResult`: forwarded and observed; one for an action in flight waits for it first, up
//! to a bound. What the client is told is always the upstream's answer, with two exceptions: a
//! failed speculative execution is not shown to a lookup that would have found nothing, and the
//! result of an action parent gains its subactions.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::Code;

use super::parent_answer::completing;
use super::tap::{Method, Tap};
use super::{Asked, Call, Proxy, Reply, about, asked};
use crate::backend::exchange as backend;
use crate::backend::upstream::UpstreamError;
use crate::reapi::GetActionResultRequest;
use crate::speculation::Engine;
use crate::speculation::flights::{Ending, ending};
use crate::speculation::observation::Call as Observed;

pub const METHOD: &str = "/build.bazel.remote.execution.v2.ActionCache/GetActionResult";

/// How long the engine may take to work out what is about to be executed.
const MAX_QUESTION: Duration = Duration::from_secs(2);

pub async fn call(proxy: Arc<Proxy>, engine: Engine, call: Call, mut reply: Reply) {
    let mut call = call;
    let read = |request: GetActionResultRequest| {
        let function = request.digest_function;
        about(request.instance_name, request.action_digest, function)
    };
    match asked(&mut call, &mut reply, read).await {
        Some(Asked::About(key)) => {
            let observed = call.observed(key);
            observed_call(proxy, engine, call, observed, reply).await;
        }
        Some(Asked::LeftAlone) => Box::pin(proxy.forward(call, reply, None)).await,
        None => {}
    }
}

async fn observed_call(
    proxy: Arc<Proxy>,
    engine: Engine,
    mut call: Call,
    mut observed: Observed,
    mut reply: Reply,
) {
    let deadline = call.hold_until();
    let mut questioned = false;
    loop {
        if let Some(mut stage) = engine.flights().join(&observed.key) {
            let flight = tokio::time::timeout_at(deadline.into(), ending(&mut stage));
            match reply.unless_gone(Box::pin(flight)).await {
                Some(Ok(Ending::Succeeded(_))) => observed.joined = Some(call.began.elapsed()),
                Some(Ok(Ending::Failed)) => return hidden_failure(&engine, observed, reply),
                Some(Ok(Ending::Cached | Ending::Abandoned) | Err(_)) => {}
                None => return,
            }
        }
        if engine.flights().has_failed(&observed.key) {
            return hidden_failure(&engine, observed, reply);
        }
        // A request that cannot be sent twice is not held for a question.
        let later = match questioned {
            false => call.again(),
            true => None,
        };
        let Some(mut answer) = reply.unless_gone(proxy.send(call)).await else {
            return;
        };
        if let Some(later) = later
            && Instant::now() < deadline
            && reply.unless_gone(has_no_result(&mut answer)).await == Some(true)
        {
            questioned = true;
            let patience = deadline.min(Instant::now() + MAX_QUESTION);
            let question = engine.ask(observed.origin.clone(), observed.key.clone(), patience);
            if reply.unless_gone(Box::pin(question)).await.is_none() {
                return;
            }
            if engine.flights().is_expected(&observed.key) {
                call = later;
                continue;
            }
        }
        let answer =
            answer.map(|answer| completing(&engine, &observed.key, Method::Lookup, answer));
        let tap = Tap::new(engine.clone(), Method::Lookup, observed);
        return reply.finish(answer, Some(tap)).await;
    }
}

/// Whether an answer says so far that there is no result.
async fn has_no_result(answer: &mut Result<Box<backend::Answer>, UpstreamError>) -> bool {
    let Ok(answer) = answer else {
        return false;
    };
    answer.early_status().await == Some(Code::NotFound as u32)
}

/// Tells the client that there is no result, as it would have been told without primed.
fn hidden_failure(engine: &Engine, observed: Observed, reply: Reply) {
    let message = format!("no result for action {}", observed.key.action);
    Tap::new(engine.clone(), Method::Lookup, observed).end(Some(Code::NotFound as u32));
    reply.end(Code::NotFound, &message);
}
