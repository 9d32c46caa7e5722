//! `GetActionResult`: forwarded and observed; one for an action in flight waits for it first, up
//! to a bound. What the client is told is always the upstream's answer, with one exception: a
//! failed speculative execution is not shown to a lookup that would have found nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{Response, request};
use hyper::body::Incoming;
use prost::Message;
use tonic::Code;

use super::body::{RequestBody, ResponseBody};
use super::tap::{Observed, Tap};
use super::{MAX_OBSERVED_REQUEST, Proxy, again, grpc, hold_until, origin, response};
use crate::cas::Digest;
use crate::reapi::{GetActionResultRequest, digest_function};
use crate::speculation::Engine;
use crate::speculation::flights::{Ending, FlightKey, ending};
use crate::speculation::observation::{Answer, Call};
use crate::workspace::peer::Peer;

pub const METHOD: &str = "/build.bazel.remote.execution.v2.ActionCache/GetActionResult";

/// How long the engine may take to work out what is about to be executed.
const MAX_QUESTION: Duration = Duration::from_secs(2);

pub async fn call(
    proxy: &Proxy,
    engine: &Engine,
    peer: &Arc<Peer>,
    parts: request::Parts,
    body: Incoming,
) -> Response<ResponseBody> {
    let began = Instant::now();
    let (message, mut body) = RequestBody::read_first_message(body, MAX_OBSERVED_REQUEST).await;
    let Some(key) = message.and_then(key_of) else {
        return proxy.forward(parts, body).await;
    };
    let deadline = hold_until(began, &parts.headers);
    let mut call = Call {
        origin: origin(peer, &parts.headers),
        key,
        began,
        joined: None,
        answer: Answer::default(),
    };
    let mut asked = false;
    loop {
        match wait_for_flight(engine, &call.key, deadline).await {
            Some(Ending::Succeeded(_)) => call.joined = Some(began.elapsed()),
            Some(Ending::Failed) => return hidden_failure(engine, call),
            Some(Ending::Cached | Ending::Abandoned) | None => {}
        }
        if engine.flights().has_failed(&call.key) {
            return hidden_failure(engine, call);
        }
        // Of a body that cannot be sent twice, the question is left out.
        let later = body.again();
        let mut response = proxy.forward(again(&parts), body).await;
        let not_found = status_so_far(&mut response).await == Some(Code::NotFound as u32);
        match later {
            Some(later) if not_found && !asked && Instant::now() < deadline => {
                asked = true;
                let patience = deadline.min(Instant::now() + MAX_QUESTION);
                engine
                    .ask(call.origin.clone(), call.key.clone(), patience)
                    .await;
                if engine.flights().is_expected(&call.key) {
                    body = later;
                    continue;
                }
            }
            _ => {}
        }
        return observed(engine, call, response);
    }
}

/// The action that a request asks for, if primed can name it.
fn key_of(message: bytes::Bytes) -> Option<FlightKey> {
    let request = GetActionResultRequest::decode(message).ok()?;
    is_sha256(request.digest_function).then_some(())?;
    Some(FlightKey {
        instance: request.instance_name.into(),
        action: Digest::try_from(request.action_digest.as_ref()?).ok()?,
    })
}

/// Whether a request's `digest_function` is SHA-256, named or implied by the length of the hash.
pub fn is_sha256(digest_function: i32) -> bool {
    digest_function == digest_function::Value::Unknown as i32
        || digest_function == digest_function::Value::Sha256 as i32
}

/// Waits for the flight of `key`, if there is one, but not past `deadline`.
async fn wait_for_flight(engine: &Engine, key: &FlightKey, deadline: Instant) -> Option<Ending> {
    let mut stage = engine.flights().join(key)?;
    tokio::time::timeout_at(deadline.into(), ending(&mut stage))
        .await
        .ok()
}

/// The status of a response, as far as it is known without reading any message.
async fn status_so_far(response: &mut Response<ResponseBody>) -> Option<u32> {
    if let Some(status) = grpc::status(response.headers()) {
        return Some(status);
    }
    let trailers = response.body_mut().trailers_if_bare().await?;
    grpc::status(&trailers)
}

/// Tells the client that there is no result, as it would have been told without primed.
fn hidden_failure(engine: &Engine, call: Call) -> Response<ResponseBody> {
    let message = format!("no result for action {}", call.key.action);
    Tap::new(engine.clone(), Observed::Lookup, call).end(Some(Code::NotFound as u32));
    response::ended(Code::NotFound, &message)
}

fn observed(
    engine: &Engine,
    call: Call,
    response: Response<ResponseBody>,
) -> Response<ResponseBody> {
    let tap = Tap::new(engine.clone(), Observed::Lookup, call);
    match grpc::status(response.headers()) {
        Some(status) => {
            tap.end(Some(status));
            response
        }
        None => response.map(|body| body.observed_by(tap)),
    }
}
