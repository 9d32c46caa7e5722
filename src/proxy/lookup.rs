//! `GetActionResult`: forwarded and observed; one for an action in flight waits for it first, up
//! to a bound. What the client is told is always the upstream's answer, with one exception: a
//! failed speculative execution is not shown to a lookup that would have found nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{Response, request};
use hyper::body::Incoming;
use tonic::Code;

use super::body::{RequestBody, ResponseBody};
use super::tap::{Observed, Tap};
use super::{
    Asked, MAX_OBSERVED_REQUEST, Proxy, about, again, asked, grpc, hold_until, origin, response,
};
use crate::reapi::GetActionResultRequest;
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
    let Asked::About(key) = asked(peer, METHOD, message, |request: GetActionResultRequest| {
        let function = request.digest_function;
        about(request.instance_name, request.action_digest, function)
    }) else {
        return proxy.forward(parts, body).await;
    };
    let deadline = hold_until(began, &parts.headers);
    let mut call = Call {
        origin: origin(peer, &parts.headers),
        key,
        joined: None,
        answer: Answer::default(),
    };
    let mut questioned = false;
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
            Some(later) if not_found && !questioned && Instant::now() < deadline => {
                questioned = true;
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
        let tap = Tap::new(engine.clone(), Observed::Lookup, call);
        return ResponseBody::observed_by(tap, response);
    }
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
