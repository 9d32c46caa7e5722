//! Hits that primed does not see: a proxy between the client and primed answers a lookup from its
//! own cache. buildbox-casd then asks whether the result's outputs are still there, by one
//! `FindMissingBlobs` with the client's `RequestMetadata`, which names the action. (So do 1.4.25
//! and 1.4.30, each time, as measured; lookups that miss always come as such.)
//!
//! What the proxy has answered with, primed looks up itself. That is observed as the client's own
//! lookup: it is counted, attributed and recorded like one. Many are looked up at once, but observed
//! in the order in which they came: what one action has written tells who asks for the next.

use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::oneshot;

use super::observation::{Answer, Call, CallOrigin, Observation};
use crate::cas::Digest;
use crate::grpc;
use crate::reapi::RequestMetadata;
use crate::speculation::Engine;
use crate::speculation::flights::{FlightKey, ending};

/// How buildbox-casd marks calls that it makes for others: at the end of the tool's name.
const BY_PROXY: &str = "(via buildbox-casd)";

/// How those call themselves that execute actions (buildbox-run, buildbox-worker): what they ask for
/// is where the outputs of their action are to be uploaded.
const WORKER: &str = "buildbox-";

/// How long others may be kept waiting for their turn.
const MAX_LOOKUP: Duration = Duration::from_secs(2);

/// A proxy that executes what is primed has the result so much earlier than primed, at most.
const MAX_LANDING: Duration = Duration::from_millis(500);

/// The action for which a proxy makes a call for a client, if it says so.
pub fn action_of_proxy(metadata: &RequestMetadata) -> Option<Digest> {
    let tool = metadata.tool_details.as_ref()?;
    let is_client = tool.tool_name.ends_with(BY_PROXY) && !tool.tool_name.starts_with(WORKER);
    is_client.then(|| metadata.action_id.parse().ok()).flatten()
}

/// Hits that are looked up, one behind the other.
#[derive(Default)]
pub struct HiddenHits {
    last: Mutex<Option<oneshot::Receiver<()>>>,
}

/// A place behind all who came before; over when it is dropped.
pub struct Turn {
    before: Option<oneshot::Receiver<()>>,
    _over: oneshot::Sender<()>,
}

impl HiddenHits {
    /// Takes the last place.
    pub fn queue(&self) -> Turn {
        let (over, last) = oneshot::channel();
        Turn {
            before: self.last.lock().replace(last),
            _over: over,
        }
    }
}

impl Turn {
    /// Returns when all who came before are through.
    pub async fn comes(&mut self) {
        if let Some(before) = &mut self.before {
            // Closed when it is over.
            let _ = before.await;
        }
        self.before = None;
    }
}

impl Engine {
    /// Whether it matters that a client was answered with the result of `key`: it was primed, or is
    /// about to be, or a parent is open on whose behalf it may have been asked for.
    pub fn wants_hidden_hit(&self, key: &FlightKey) -> bool {
        let flights = self.flights();
        flights.is_in_flight(key) || flights.is_unused(key) || self.subactions().has_open()
    }

    /// Observes that a proxy has answered a lookup of `key`.
    pub async fn hidden_hit(&self, origin: CallOrigin, key: FlightKey) {
        let began = Instant::now();
        let mut turn = self.hidden_hits.queue();
        if let Some(mut flight) = self.flights().watch(&key) {
            // If it is not over by then, the result is not primed.
            let _ = tokio::time::timeout(MAX_LANDING, ending(&mut flight)).await;
        }
        let found = self.backend.action_result(&key.instance, key.action);
        let found = tokio::time::timeout(MAX_LOOKUP, found).await;
        turn.comes().await;
        // What is not there was no hit; a backend that fails is noticed elsewhere.
        let Ok(Ok(Some(result))) = found else { return };
        tracing::debug!(action = %key.action, "a proxy has answered a lookup");
        let answer = Answer::of_message(grpc::framed(&Bytes::from(result.encode_to_vec())));
        self.observe(Observation::Lookup(Box::new(Call {
            origin,
            key,
            joined: None,
            began,
            ended: began,
            answer,
        })));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reapi::ToolDetails;
    use std::future::poll_fn;
    use std::pin::pin;
    use std::task::{Context, Poll};

    #[tokio::test]
    async fn each_turn_comes_when_those_before_it_are_over() {
        let hits = HiddenHits::default();
        let [mut first, mut second, mut third] = [(); 3].map(|()| hits.queue());
        first.comes().await;
        {
            let mut waiting = pin!(second.comes());
            let mut is_pending = |cx: &mut Context<'_>| waiting.as_mut().poll(cx).is_pending();
            assert!(poll_fn(|cx| Poll::Ready(is_pending(cx))).await);
            drop(first);
            waiting.await;
        }
        drop(second);
        third.comes().await;
        third.comes().await;
    }

    #[test]
    fn only_calls_of_proxies_that_name_an_action_tell_of_hits() {
        let digest = Digest::of(b"action");
        let call = |tool: &str, action_id: &str| {
            action_of_proxy(&RequestMetadata {
                tool_details: Some(ToolDetails {
                    tool_name: tool.to_owned(),
                    ..ToolDetails::default()
                }),
                action_id: action_id.to_owned(),
                ..RequestMetadata::default()
            })
        };
        let id = digest.to_string();
        assert_eq!(call("recc (via buildbox-casd)", &id), Some(digest));
        assert_eq!(call("recc", &id), None);
        assert_eq!(call("buildbox-run (via buildbox-casd)", &id), None);
        assert_eq!(call("siso (via buildbox-casd)", "a1b2"), None);
        assert_eq!(action_of_proxy(&RequestMetadata::default()), None);
    }
}
