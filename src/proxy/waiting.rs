//! `WaitExecution`: a client goes on waiting for an execution whose `Execute` it has lost. Where
//! that is known, it is observed like the rest of that `Execute`, and ends as it would have; where
//! it is still followed here, the client joins. All else is the upstream's to say.

use std::sync::Arc;

use prost::Message as _;

use super::alike::Circle;
use super::execution::followed;
use super::joining::{Joined, Joiner};
use super::shared_execution::Reader;
use super::{Asked, Call, Proxy, Reply, asked_by_name};
use crate::reapi::WaitExecutionRequest;
use crate::reapi::google::longrunning::Operation;
use crate::speculation::Engine;
use crate::speculation::flights::{FlightKey, Stage};

pub async fn call(proxy: Arc<Proxy>, engine: Arc<Engine>, call: Call, mut reply: Reply) {
    let mut call = call;
    let read_name = |request: WaitExecutionRequest| request.name;
    let asked = asked_by_name(&engine, &mut call, &mut reply, read_name);
    let (key, name) = match asked.await {
        Some((Asked::About(key), name)) => (key, name),
        Some((Asked::LeftAlone, _)) => return proxy.forward(call, reply, None).await,
        None => return,
    };
    let mut observed = call.observed(key);
    if let Some(joined) = under_way(&proxy, &engine, &call, &observed.key, &name) {
        let joiner = Joiner {
            proxy: &proxy,
            engine: &engine,
            observed,
            own: None,
        };
        match Box::pin(joiner.follow(joined, reply)).await {
            Some(unanswered) => (observed, reply) = (unanswered.observed, unanswered.reply),
            None => return,
        }
    }
    followed(proxy, engine, call, observed, reply).await;
}

/// What the upstream calls `name`, if it is followed here for others or ahead of time.
fn under_way(
    proxy: &Proxy,
    engine: &Engine,
    call: &Call,
    key: &FlightKey,
    name: &str,
) -> Option<Joined> {
    let circle = Circle::of(call, key);
    if let Some(shared) = proxy.joining.executions.named(&circle, name) {
        return Some(Joined::Shared(Reader::of(&shared, call.peer.id())));
    }
    let flight = engine.flights().watch(key)?;
    let Stage::Running(Some(operation)) = flight.borrow().clone() else {
        return None;
    };
    let is_meant = Operation::decode(operation).is_ok_and(|operation| operation.name == name);
    let joined = is_meant.then(|| engine.flights().join(key)).flatten();
    joined.map(Joined::flight)
}
