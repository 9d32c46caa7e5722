//! `FindMissingBlobs`: forwarded as it is. Where a proxy makes it for a lookup that it has answered
//! itself, the engine is told of that hit, beside the call.

use std::sync::Arc;

use super::{Call, MAX_OBSERVED_REQUEST, Proxy, Reply};
use crate::cas::Digest;
use crate::reapi::FindMissingBlobsRequest;
use crate::speculation::Engine;
use crate::speculation::clients::hidden_hits::action_of_proxy;
use crate::speculation::flights::FlightKey;
use prost::Message as _;

pub async fn call(proxy: Arc<Proxy>, engine: Arc<Engine>, call: Call, mut reply: Reply) {
    let mut call = call;
    let origin = call.origin();
    let hit = match action_of_proxy(&origin.request_metadata()) {
        Some(action) => match reply.unless_gone(hit(&mut call, action)).await {
            Some(hit) => hit,
            None => return,
        },
        None => None,
    };
    match hit.filter(|key| engine.wants_hidden_hit(key)) {
        Some(key) => {
            let forwarded = proxy.forward(call, reply, None);
            Box::pin(async { tokio::join!(forwarded, engine.hidden_hit(origin, key)) }).await;
        }
        None => proxy.forward(call, reply, None).await,
    }
}

/// What a request for `action` tells of: its result, unless the action itself is among what it asks
/// for, and so about to be uploaded.
async fn hit(call: &mut Call, action: Digest) -> Option<FlightKey> {
    let message = call.first_message(MAX_OBSERVED_REQUEST).await?;
    let request = FindMissingBlobsRequest::decode(message).ok()?;
    let mut asked = request.blob_digests.iter();
    let uploads = asked.any(|digest| action.function().read(Some(digest)) == Ok(action));
    (!uploads).then(|| FlightKey {
        instance: request.instance_name.into(),
        action,
    })
}
