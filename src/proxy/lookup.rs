//! `GetActionResult`: forwarded and observed; one for an action in flight, or that another client
//! executes, waits for it first, up to a bound. What the client is told is always the upstream's
//! answer, with two exceptions: a failed speculative execution is not shown to a lookup that would
//! have found nothing, and the result of an action parent gains its subactions.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout_at;
use tonic::Code;

use super::alike::{Circle, may_be_shared};
use super::joining::result;
use super::parent_answer::completing;
use super::shared_execution::Reader;
use super::tap::{Method, Tap};
use super::{Asked, Call, Observed, Proxy, Reply, about, asked};
use crate::backend::exchange as backend;
use crate::backend::upstream::UpstreamError;
use crate::reapi::GetActionResultRequest;
use crate::speculation::Engine;
use crate::speculation::flights::{Ending, ending};

/// How long the engine may take to work out what is about to be executed.
const MAX_QUESTION: Duration = Duration::from_secs(2);

pub async fn call(proxy: Arc<Proxy>, engine: Arc<Engine>, call: Call, mut reply: Reply) {
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
    engine: Arc<Engine>,
    mut call: Call,
    mut observed: Observed,
    mut reply: Reply,
) {
    let deadline = call.hold_until();
    let mut questioned = false;
    let mut waited_for = None;
    loop {
        let mut another = match &waited_for {
            None => executed_by_another(&proxy, &call, &observed),
            Some(_) => None,
        };
        if another.is_some() {
            let may = Box::pin(may_be_shared(&proxy, &call, &observed.key));
            match reply.unless_gone(may).await {
                Some(true) => {}
                Some(false) => another = None,
                None => return,
            }
        }
        if let Some(mut reader) = another {
            tracing::debug!(action = %observed.key.action, "a lookup waits for an execution");
            let stuck_at = Instant::now() + proxy.joining.patience(None);
            let result = timeout_at(deadline.min(stuck_at).into(), result(&mut reader));
            match reply.unless_gone(Box::pin(result)).await {
                Some(Ok(Some(operation))) => {
                    observed.joined = Some(call.began.elapsed());
                    waited_for = Some((reader.shared().wish().clone(), operation));
                }
                Some(Ok(None) | Err(_)) => {}
                None => return,
            }
        } else if let Some(mut stage) = engine.flights().join(&observed.key) {
            let flight = timeout_at(deadline.into(), ending(&mut stage));
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
        let peer = call.peer.id();
        let Some(mut answer) = reply.unless_gone(proxy.send(call)).await else {
            return;
        };
        if let Some((wish, operation)) = waited_for.take() {
            // What was executed is not in the action cache: it failed, most often. The client will
            // ask for it to be executed, and has waited for that already.
            match reply.unless_gone(has_no_result(&mut answer)).await {
                Some(true) => {
                    observed.joined = None;
                    proxy.joining.keep(peer, wish, operation);
                    questioned = true;
                }
                Some(false) => {}
                None => return,
            }
        }
        if let Some(later) = later
            && !questioned
            && reply.unless_gone(has_no_result(&mut answer)).await == Some(true)
            && Instant::now() < deadline
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

/// What another client executes, if that is what is looked up.
fn executed_by_another(proxy: &Proxy, call: &Call, observed: &Observed) -> Option<Reader> {
    let executions = &proxy.joining.executions;
    if executions.are_none() {
        return None;
    }
    executions.find(&Circle::of(call, &observed.key), call.peer.id())
}

/// Whether an answer says so far that there is no result.
async fn has_no_result(answer: &mut Result<Box<backend::Answer>, UpstreamError>) -> bool {
    let Ok(answer) = answer else {
        return false;
    };
    answer.early_status().await == Some(Code::NotFound as u32)
}

/// Tells the client that there is no result, as it would have been told without primed.
fn hidden_failure(engine: &Arc<Engine>, observed: Observed, reply: Reply) {
    let message = format!("no result for action {}", observed.key.action);
    Tap::new(engine.clone(), Method::Lookup, observed).end(Some(Code::NotFound as u32));
    reply.end(Code::NotFound, &message);
}
