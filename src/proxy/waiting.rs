//! `WaitExecution`: a client goes on waiting for an execution whose `Execute` it has lost. Where
//! that is known, it is observed like the rest of that `Execute`, and ends as it would have.

use std::sync::Arc;

use super::execution::followed;
use super::{Asked, Call, Proxy, Reply, asked};
use crate::reapi::WaitExecutionRequest;
use crate::speculation::Engine;

pub const METHOD: &str = "/build.bazel.remote.execution.v2.Execution/WaitExecution";

pub async fn call(proxy: Arc<Proxy>, engine: Engine, call: Call, mut reply: Reply) {
    let mut call = call;
    let read = |request: WaitExecutionRequest| {
        let known = engine.operation(&request.name);
        Some(known.map_or(Asked::LeftAlone, Asked::About))
    };
    match asked(&mut call, &mut reply, read).await {
        Some(Asked::About(key)) => {
            let observed = call.observed(key);
            followed(proxy, engine, call, observed, reply).await;
        }
        Some(Asked::LeftAlone) => proxy.forward(call, reply, None).await,
        None => {}
    }
}
