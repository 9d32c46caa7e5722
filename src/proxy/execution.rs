//! `Execute`: forwarded and observed; one for what is in flight, or what another client executes,
//! joins that, and sees its stages and its result. If that one ends otherwise than with a result,
//! the client's own call is made.

use std::sync::Arc;

use super::alike::{Circle, Wish, may_be_shared};
use super::joining::{Joined, Joiner};
use super::leading::lead;
use super::parent_answer::completing;
use super::shared_execution::Entered;
use super::tap::{Method, Tap};
use super::{Asked, Call, Observed, Proxy, Reply, about, asked};
use crate::backend::exchange::Answer;
use crate::backend::upstream::UpstreamError;
use crate::reapi::ExecuteRequest;
use crate::speculation::Engine;
use crate::speculation::clients::observation::Observation;

/// How often a client joins in vain before its own call is made for it alone.
const ATTEMPTS: usize = 2;

pub async fn call(proxy: Arc<Proxy>, engine: Arc<Engine>, call: Call, mut reply: Reply) {
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
    let mut observed = call.observed(key);
    // A request that cannot be sent twice, or on behalf of another, is the client's own alone.
    let mut wish = call.again().map(|_| Wish {
        circle: Circle::of(&call, &observed.key),
        request: call.read(),
    });
    let peer = call.peer.id();
    if let Some(wish) = &wish
        && let Some(operation) = proxy.joining.redeem(peer, wish)
    {
        let joiner = Joiner {
            proxy: &proxy,
            engine: &engine,
            observed,
            own: None,
        };
        return joiner.end(operation, reply, true).await;
    }
    let mut is_sharable = false;
    for _ in 0..ATTEMPTS {
        let joined = match join(&proxy, &engine, &observed, wish.as_ref()) {
            Some(joined) => joined,
            None => match wish
                .clone()
                .map(|wish| proxy.joining.executions.enter(wish, peer))
            {
                Some(Entered::Join(reader)) => Joined::Shared(reader),
                Some(Entered::Lead(shared)) => {
                    let Some(whole) = call.again() else { break };
                    tell(&engine, &observed);
                    let leader = lead(&proxy, &engine, shared, whole);
                    let executes = leader.executes.clone();
                    let told = finish(engine, observed, reply, leader.answer(), executes);
                    return Box::pin(told).await;
                }
                None => break,
            },
        };
        if matches!(joined, Joined::Shared(_)) && !is_sharable {
            let may = Box::pin(may_be_shared(&proxy, &call, &observed.key));
            is_sharable = match reply.unless_gone(may).await {
                Some(may) => may,
                None => return,
            };
            if !is_sharable {
                wish = None;
                continue;
            }
        }
        let joiner = Joiner {
            proxy: &proxy,
            engine: &engine,
            observed,
            own: wish.clone().zip(call.again()),
        };
        match Box::pin(joiner.follow(joined, reply)).await {
            Some(unanswered) => {
                let is_impatient = unanswered.is_impatient;
                (observed, reply) = (unanswered.observed, unanswered.reply);
                if is_impatient {
                    break;
                }
            }
            None => return,
        }
    }
    tell(&engine, &observed);
    followed(proxy, engine, call, observed, reply).await;
}

/// What is under way. Where both are, primed has been silent for so long that a client executes it
/// as well.
fn join(
    proxy: &Proxy,
    engine: &Engine,
    observed: &Observed,
    wish: Option<&Wish>,
) -> Option<Joined> {
    let shared = wish.and_then(|wish| {
        proxy
            .joining
            .executions
            .join(wish, observed.origin.peer.id())
    });
    let flight = || engine.flights().join(&observed.key).map(Joined::flight);
    shared.map(Joined::Shared).or_else(flight)
}

/// Tells the engine that the client's own execution begins.
fn tell(engine: &Engine, observed: &Observed) {
    engine.observe(Observation::Executing {
        origin: observed.origin.clone(),
        key: observed.key.clone(),
    });
}

/// Forwards a call that tells of the client's own execution to its end, observed.
pub async fn followed(
    proxy: Arc<Proxy>,
    engine: Arc<Engine>,
    call: Call,
    observed: Observed,
    reply: Reply,
) {
    let guard = engine.flights().client_executes(observed.key.clone());
    finish(engine, observed, reply, proxy.send(call), guard).await;
}

/// Passes the answer on to its end, observed; `executes` is kept until the engine knows of it.
async fn finish(
    engine: Arc<Engine>,
    observed: Observed,
    mut reply: Reply,
    answer: impl Future<Output = Result<Box<Answer>, UpstreamError>>,
    executes: impl Send + 'static,
) {
    if let Some(answer) = reply.unless_gone(answer).await {
        let answer =
            answer.map(|answer| completing(&engine, &observed.key, Method::Execution, answer));
        let tap = Tap::new(engine, Method::Execution, observed).holding(executes);
        reply.finish(answer, Some(tap)).await;
    }
}
