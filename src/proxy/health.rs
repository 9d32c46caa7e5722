//! `grpc.health.v1.Health`: forwarded as any call. Where the upstream does not know that service
//! (buildbox-casd does not) or cannot be reached, primed tells whether the upstream can be reached.
//! All services are the upstream's, so what holds for it holds for each of them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tonic::Code;

use super::{Call, Proxy, Reply, methods};
use crate::backend::endpoints::Endpoint;
use crate::backend::health::UpstreamState;
use crate::backend::upstream::UpstreamError;
use crate::grpc;

/// The longest `HealthCheckRequest`: the name of a service.
const MAX_REQUEST: usize = 4 * 1024;
/// How often an upstream that cannot be reached is tried again while somebody watches.
const PROBE: Duration = Duration::from_secs(2);

pub async fn call(proxy: Arc<Proxy>, call: Call, mut reply: Reply) {
    let watches = call.head.path.path() == methods::HEALTH_WATCH;
    let mut call = call;
    if reply
        .unless_gone(call.first_message(MAX_REQUEST))
        .await
        .is_none()
    {
        return;
    }
    let Some(mut answer) = reply.unless_gone(proxy.send(call)).await else {
        return;
    };
    let known_to_upstream = match &mut answer {
        Ok(answer) => match reply.unless_gone(answer.early_status()).await {
            Some(status) => status != Some(Code::Unimplemented as u32),
            None => return,
        },
        Err(UpstreamError::Connect(_)) => false,
        Err(_) => true,
    };
    if known_to_upstream {
        return reply.finish(answer, None).await;
    }
    drop(answer);
    let mut state = proxy.upstream.health().state();
    loop {
        let Some(rest) = reply.message(response(state)).await else {
            return;
        };
        reply = rest;
        if !watches {
            return reply.end(Code::Ok, "");
        }
        let Some(new) = reply.unless_gone(change(&proxy, state)).await else {
            return;
        };
        state = new;
    }
}

/// Waits for another state than `known`. An upstream that is away is noticed when it is back.
async fn change(proxy: &Proxy, known: UpstreamState) -> UpstreamState {
    let serving = |state| state != UpstreamState::Unavailable;
    let mut state = known;
    while serving(state) == serving(known) {
        let changed = proxy.upstream.health().changed_from(state);
        state = match tokio::time::timeout(PROBE, changed).await {
            Ok(state) => state,
            Err(_) if serving(state) => continue,
            Err(_) => {
                // Whether it succeeds, the state shows.
                let _ = proxy.upstream.reach(Endpoint::Rest, Duration::ZERO).await;
                proxy.upstream.health().state()
            }
        };
    }
    state
}

/// A `HealthCheckResponse`: field 1 is 1 for SERVING, 2 for NOT_SERVING.
fn response(state: UpstreamState) -> Bytes {
    grpc::framed(match state {
        UpstreamState::Idle | UpstreamState::Connected => &[0x08, 1],
        UpstreamState::Unavailable => &[0x08, 2],
    })
}
