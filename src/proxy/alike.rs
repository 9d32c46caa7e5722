//! Which executions may be shared: those of clients that are as good as one to the backend. They
//! ask for the same action in the same words, as the same user, with the same credentials. And the
//! action says nothing against it: with `do_not_cache` it must be executed for each who asks.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{HeaderName, HeaderValue};
use http_body_util::{BodyExt as _, Limited};
use prost::Message as _;

use super::{Call, Proxy, methods};
use crate::cas::Digest;
use crate::grpc::{Framed, split_message};
use crate::http2::fields::Fields;
use crate::reapi::{Action, BatchReadBlobsRequest, BatchReadBlobsResponse};
use crate::speculation::flights::FlightKey;
use crate::workspace::peer::PeerOrigin;

/// Metadata that says nothing of who calls or what for. Credentials may stand under any name, so
/// all other metadata must be the same where something is shared.
const INDIFFERENT: [&str; 26] = [
    "accept-encoding",
    "b3",
    "baggage",
    "build.bazel.remote.execution.v2.requestmetadata-bin",
    "content-length",
    "content-type",
    "google.devtools.remoteexecution.v1test.requestmetadata-bin",
    "grpc-accept-encoding",
    "grpc-previous-rpc-attempts",
    "grpc-tags-bin",
    "grpc-timeout",
    "grpc-trace-bin",
    "te",
    "traceparent",
    "tracestate",
    "uber-trace-id",
    "user-agent",
    "x-b3-flags",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-spanid",
    "x-b3-traceid",
    "x-cloud-trace-context",
    "x-correlation-id",
    "x-request-id",
    "x-request-start",
];

/// An action, and those who may hear of one another that it is executed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Circle {
    key: FlightKey,
    /// Of clients by Unix sockets.
    uid: Option<u32>,
    /// What may be credentials, by name.
    metadata: Arc<[(HeaderName, HeaderValue)]>,
}

/// An execution that may be shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Those who may share it.
    pub circle: Circle,
    /// The `ExecuteRequest` as it was sent, in its frame: priority, and which outputs are to come
    /// inline, are the same as well.
    pub request: Bytes,
}

impl Circle {
    /// The circle of those who call like `call`, about `key`.
    pub(super) fn of(call: &Call, key: &FlightKey) -> Self {
        let uid = match call.peer.origin() {
            PeerOrigin::Local { uid, .. } => Some(uid),
            PeerOrigin::Tcp(_) => None,
        };
        Circle {
            key: key.clone(),
            uid,
            metadata: telling(&call.head.headers),
        }
    }

    /// What is executed.
    pub fn key(&self) -> &FlightKey {
        &self.key
    }
}

/// No action is larger than what gRPC's clients take.
const MAX_ACTION: usize = 4 * 1024 * 1024;
/// In what forms an answer may come: plain, if it is not there.
const ACCEPTED: HeaderName = HeaderName::from_static("grpc-accept-encoding");

/// Whether the action itself may be executed once for several clients. `call` is that of one of
/// them, on whose behalf it is read; what cannot be read is not shared.
pub(super) fn may_be_shared(
    proxy: &Arc<Proxy>,
    call: &Call,
    key: &FlightKey,
) -> impl Future<Output = bool> + Send + use<> {
    let request = BatchReadBlobsRequest {
        instance_name: key.instance.to_string(),
        digests: vec![key.action.to_proto()],
        digest_function: key.action.function().to_proto(),
        ..BatchReadBlobsRequest::default()
    };
    let mut read = call.beside(methods::BATCH_READ_BLOBS, &request);
    read.head.headers.remove(&ACCEPTED);
    let (proxy, key) = (proxy.clone(), key.clone());
    async move {
        let known = &proxy.joining.sharable;
        if let Some(may) = known.get(&key) {
            return may;
        }
        let Some(action) = action(&proxy, read, key.action).await else {
            return false;
        };
        known.insert(key, !action.do_not_cache);
        !action.do_not_cache
    }
}

/// The action `digest`, by the call that asks for it.
async fn action(proxy: &Proxy, read: Call, digest: Digest) -> Option<Action> {
    let answer = proxy.send(read).await.ok()?;
    let body = Limited::new(answer, MAX_ACTION).collect().await.ok()?;
    let Framed::Plain(message) = split_message(&mut body.to_bytes())? else {
        return None;
    };
    let mut blobs = BatchReadBlobsResponse::decode(message).ok()?.responses;
    let blob = blobs.pop().filter(|_| blobs.is_empty())?.data;
    let is_it = digest.function().of(&blob) == digest;
    is_it.then(|| Action::decode(&*blob).ok()).flatten()
}

/// The metadata that is not `INDIFFERENT`, in an order that does not depend on how it was sent.
fn telling(headers: &Fields) -> Arc<[(HeaderName, HeaderValue)]> {
    let telling = headers
        .iter()
        .filter(|(name, _)| INDIFFERENT.binary_search(&name.as_str()).is_err());
    let mut telling: Vec<_> = telling
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    telling.sort_by(|(one, _), (other, _)| one.as_str().cmp(other.as_str()));
    telling.into()
}

#[cfg(test)]
impl Wish {
    /// Of a client that says nothing of itself.
    pub fn for_test(key: FlightKey) -> Self {
        let circle = Circle {
            key,
            uid: None,
            metadata: Arc::new([]),
        };
        Wish {
            circle,
            request: Bytes::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_call_says_of_itself_is_indifferent_and_all_else_tells_callers_apart() {
        assert!(INDIFFERENT.is_sorted(), "it is searched by halves");
        let of = |headers: &[(&'static str, &'static str)]| {
            let headers = headers.iter().map(|(name, value)| {
                let name = HeaderName::from_static(name);
                (name, HeaderValue::from_static(value))
            });
            telling(&headers.collect())
        };
        let plain = of(&[("te", "trailers"), ("grpc-timeout", "5S")]);
        assert!(plain.is_empty());
        assert_eq!(of(&[("user-agent", "recc")]), plain);
        for credentials in ["authorization", "cookie", "x-some-key", "x-tenant-bin"] {
            let (one, other) = (of(&[(credentials, "1")]), of(&[(credentials, "2")]));
            assert_ne!(one, other, "{credentials}");
            assert_ne!(one, plain, "{credentials}");
        }
        assert_eq!(of(&[("a", "1"), ("b", "2")]), of(&[("b", "2"), ("a", "1")]));
    }
}
