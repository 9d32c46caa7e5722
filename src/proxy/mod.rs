//! Forwards any gRPC method, known or not, at the level of HTTP/2: headers, messages and
//! trailers pass as they came. Two methods are also observed, and may wait for what is in
//! flight: see `lookup` and `execution`.

mod body;
mod execution;
mod grpc;
mod lookup;
mod response;
mod tap;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::uri::{Authority, Scheme, Uri};
use http::{HeaderMap, Request, Response, request};
use hyper::body::Incoming;
use prost::Message;
use tonic::Code;

use crate::backend::dial::Dialer;
use crate::backend::http2::{Http2Pool, SendError, UpstreamHealth};
use crate::backend::remote::REQUEST_METADATA_KEY;
use crate::cas::Digest;
use crate::reapi::{self, digest_function};
use crate::speculation::Engine;
use crate::speculation::flights::FlightKey;
use crate::speculation::observation::{CallOrigin, Observation};
use crate::workspace::peer::Peer;

pub use body::{RequestBody, ResponseBody};

/// An observed request whose message is longer than this is forwarded unobserved.
const MAX_OBSERVED_REQUEST: usize = 64 * 1024;
/// The longest that a lookup is held for what is in flight, where the client names no deadline.
const MAX_HOLD: Duration = Duration::from_secs(60);

/// The forwarding path of one shard.
pub struct Proxy {
    upstream: Http2Pool<RequestBody>,
    authority: Authority,
    engine: Option<Engine>,
}

impl Proxy {
    /// A proxy to where `dialer` leads. Without an engine nothing is observed.
    pub fn new(dialer: Dialer, health: Arc<UpstreamHealth>, engine: Option<Engine>) -> Self {
        let authority = dialer.address().authority();
        let authority = authority.and_then(|authority| Authority::try_from(authority).ok());
        Proxy {
            upstream: Http2Pool::new(dialer, health),
            authority: authority.unwrap_or_else(|| Authority::from_static("localhost")),
            engine,
        }
    }

    /// Answers one call of `peer`.
    pub async fn call(
        self: &Arc<Self>,
        peer: &Arc<Peer>,
        first: bool,
        request: Request<Incoming>,
    ) -> Response<ResponseBody> {
        let (parts, body) = request.into_parts();
        let Some(engine) = &self.engine else {
            return self.forward(parts, RequestBody::Untouched(body)).await;
        };
        if first {
            engine.observe(Observation::FirstCall(origin(peer, &parts.headers)));
        }
        match parts.uri.path() {
            lookup::METHOD => lookup::call(self, engine, peer, parts, body).await,
            execution::METHOD => execution::call(self, engine, peer, parts, body).await,
            _ => self.forward(parts, RequestBody::Untouched(body)).await,
        }
    }

    /// Sends a call upstream as it is. What goes wrong on the way becomes a gRPC status.
    async fn forward(&self, parts: request::Parts, body: RequestBody) -> Response<ResponseBody> {
        match self.upstream.send(self.upstream_request(parts, body)).await {
            Ok(response) => response.map(ResponseBody::upstream),
            Err(error @ SendError::Connect { .. }) => {
                let hint = "is it running, and is this its address?";
                response::ended(Code::Unavailable, &format!("primed: {error}; {hint}"))
            }
            Err(SendError::Stream { address, source }) => match grpc::reset_by_upstream(&source) {
                Some(reason) => response::started(ResponseBody::reset(reason)),
                None => {
                    let error = SendError::Stream { address, source };
                    response::ended(Code::Unavailable, &format!("primed: {error}; try again"))
                }
            },
        }
    }

    fn upstream_request(&self, parts: request::Parts, body: RequestBody) -> Request<RequestBody> {
        let mut request = Request::new(body);
        let mut uri = http::uri::Parts::default();
        uri.scheme = Some(Scheme::HTTP);
        uri.authority = Some(self.authority.clone());
        uri.path_and_query = parts.uri.into_parts().path_and_query;
        *request.method_mut() = parts.method;
        *request.uri_mut() = Uri::from_parts(uri).unwrap_or_default();
        *request.version_mut() = http::Version::HTTP_2;
        *request.headers_mut() = parts.headers;
        request
    }
}

fn origin(peer: &Arc<Peer>, headers: &HeaderMap) -> CallOrigin {
    CallOrigin {
        peer: peer.clone(),
        metadata: headers.get(REQUEST_METADATA_KEY).cloned(),
    }
}

/// What a method that is observed is asked to do.
enum Asked {
    /// Something about this action.
    About(FlightKey),
    /// Something that primed leaves alone: `skip_cache_lookup`, or another digest function.
    LeftAlone,
}

/// Reads the message of an observed request. One that cannot be read is the upstream's to judge.
fn asked<M: Message + Default>(
    peer: &Peer,
    method: &'static str,
    message: Option<Bytes>,
    read: impl FnOnce(M) -> Option<Asked>,
) -> Asked {
    let asked = message
        .and_then(|message| M::decode(message).ok())
        .and_then(read);
    asked.unwrap_or_else(|| {
        if peer.is_first_complaint() {
            tracing::warn!(
                client = %peer.origin(), method,
                "a request is malformed, compressed or very long; it is forwarded unobserved"
            );
        }
        Asked::LeftAlone
    })
}

/// The asked-for action under its instance; `None` if the digest is malformed. Only SHA-256, named
/// or not, is primed's business.
fn about(instance: String, digest: Option<reapi::Digest>, digest_function: i32) -> Option<Asked> {
    let (unknown, sha256) = (
        digest_function::Value::Unknown as i32,
        digest_function::Value::Sha256 as i32,
    );
    if digest_function != unknown && digest_function != sha256 {
        return Some(Asked::LeftAlone);
    }
    Some(Asked::About(FlightKey {
        instance: instance.into(),
        action: Digest::try_from(&digest?).ok()?,
    }))
}

/// Until when a call that began at `began` may be held: well within the client's own deadline.
fn hold_until(began: Instant, headers: &HeaderMap) -> Instant {
    let hold = grpc::timeout(headers).map_or(MAX_HOLD, |timeout| (timeout / 2).min(MAX_HOLD));
    began + hold
}

/// The parts of a request once more, for a call that may be sent twice.
fn again(parts: &request::Parts) -> request::Parts {
    let mut request = Request::new(());
    *request.method_mut() = parts.method.clone();
    *request.uri_mut() = parts.uri.clone();
    *request.headers_mut() = parts.headers.clone();
    request.into_parts().0
}
