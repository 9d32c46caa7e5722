//! Forwards any gRPC method, known or not, at the level of HTTP/2: headers, messages and
//! trailers pass as they came. A few methods get more than that, in a file each: `lookup` and
//! `execution` are observed, may wait for what is in flight, and tell what was executed on behalf of
//! an action, and so does `waiting`; clients that execute the same share one call (`joining`,
//! `shared_execution`, `leading`), which `cancelling` knows of; `find_missing` tells of lookups that a proxy has answered;
//! `capabilities` are remembered, and `health` is told, for when the upstream cannot say it itself.

mod alike;
mod cancelling;
mod capabilities;
mod execution;
mod find_missing;
mod health;
mod joining;
mod leading;
mod lookup;
mod methods;
mod parent_answer;
mod reply;
mod shared_execution;
mod subactions;
mod tap;
mod waiting;

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Method;
use http::header::HeaderName;
use http::uri::PathAndQuery;
use prost::Message;

use crate::backend::exchange::Answer;
use crate::backend::remote::REQUEST_METADATA_KEY;
use crate::backend::upstream::{Head, Upstream, UpstreamError};
use crate::cas::DigestFunction;
use crate::grpc::{self, Framed, split_message};
use crate::http2::body::Body;
use crate::http2::connection::Request;
use crate::meters::METERS;
use crate::reapi::{self, digest_function::Value};
use crate::speculation::Engine;
use crate::speculation::clients::observation::{self, CallOrigin};
use crate::speculation::flights::FlightKey;
use crate::task;
use crate::workspace::peer::Peer;

pub use capabilities::Capabilities;
pub use joining::Joining;
pub use reply::Reply;
use tap::Tap;

/// An observed request whose message is longer than this is forwarded unobserved.
const MAX_OBSERVED_REQUEST: usize = 64 * 1024;
const REQUEST_METADATA: HeaderName = HeaderName::from_static(REQUEST_METADATA_KEY);
/// The longest that a lookup is held for what is in flight, where the client names no deadline.
const MAX_HOLD: Duration = Duration::from_secs(60);

/// The forwarding path of one shard.
pub struct Proxy {
    /// Where calls go.
    pub upstream: Upstream,
    /// What the upstream can do, as it last said.
    pub capabilities: Arc<Capabilities>,
    /// Without an engine nothing is observed, and nothing joined.
    pub engine: Option<Arc<Engine>>,
    /// What clients execute together.
    pub joining: Arc<Joining>,
}

/// One connection of a client.
pub struct Client {
    peer: Arc<Peer>,
    has_called: AtomicBool,
}

impl Client {
    /// A client that has made no call yet.
    pub fn new(peer: Arc<Peer>) -> Self {
        Client {
            peer,
            has_called: AtomicBool::new(false),
        }
    }

    /// Whether it has made a call.
    pub fn has_called(&self) -> bool {
        self.has_called.load(Ordering::Relaxed)
    }
}

/// What the engine will be told of a call. Boxed, for it is passed through many hands.
type Observed = Box<observation::Call>;

/// One call of a client, as it came.
struct Call {
    peer: Arc<Peer>,
    head: Head,
    body: Body,
    began: Instant,
}

impl Proxy {
    /// Answers one call of `client`, in a task of its own. A method has a task of its own kind, for
    /// what a task may come to hold is moved about when it starts.
    pub fn serve(self: &Arc<Self>, client: &Client, request: Request) {
        let first = !client.has_called.swap(true, Ordering::Relaxed);
        let Request { head, body, reply } = request;
        let reply = Reply::due(reply);
        let path = head.path.clone();
        let call = Call {
            peer: client.peer.clone(),
            head: Head {
                method: head.method.clone().unwrap_or(Method::POST),
                path: path.unwrap_or_else(|| PathAndQuery::from_static("/")),
                headers: head.fields.clone(),
            },
            body: Body::stream(body),
            began: Instant::now(),
        };
        if let (Some(engine), true) = (&self.engine, first) {
            engine.observe_first(call.origin());
        }
        let reply = reply.metered(METERS.calls.begin(call.head.path.path()));
        let this = self.clone();
        match (call.head.path.path(), &self.engine) {
            (methods::GET_ACTION_RESULT, Some(engine)) => {
                task::spawn("lookup", lookup::call(this, engine.clone(), call, reply));
            }
            (methods::EXECUTE, Some(engine)) => {
                task::spawn(
                    "execution",
                    execution::call(this, engine.clone(), call, reply),
                );
            }
            (methods::WAIT_EXECUTION, Some(engine)) => {
                task::spawn("waiting", waiting::call(this, engine.clone(), call, reply));
            }
            (methods::CANCEL_OPERATION, Some(engine)) => {
                let engine = engine.clone();
                task::spawn("cancelling", cancelling::call(this, engine, call, reply));
            }
            (methods::FIND_MISSING_BLOBS, Some(engine)) => {
                let engine = engine.clone();
                task::spawn(
                    "find missing",
                    find_missing::call(this, engine, call, reply),
                );
            }
            (methods::GET_CAPABILITIES, _) => {
                task::spawn("capabilities", capabilities::call(this, call, reply));
            }
            (methods::HEALTH_CHECK | methods::HEALTH_WATCH, _) => {
                task::spawn("health", health::call(this, call, reply));
            }
            _ => {
                task::spawn("call", this.forward(call, reply, None));
            }
        }
    }

    /// Sends a call upstream as it is, and its answer back. What goes wrong on the way becomes a
    /// gRPC status.
    async fn forward(self: Arc<Self>, call: Call, mut reply: Reply, tap: Option<Tap>) {
        if let Some(answer) = reply.unless_gone(self.send(call)).await {
            reply.finish(answer, tap).await;
        }
    }

    /// Sends a call upstream as it is, and returns when its answer has begun.
    fn send(&self, call: Call) -> impl Future<Output = Result<Box<Answer>, UpstreamError>> {
        let (head, body) = call.into_request();
        self.upstream.call(head, body)
    }

    /// As `send`, but fails at once where there is no connection.
    fn send_at_once(&self, call: Call) -> impl Future<Output = Result<Box<Answer>, UpstreamError>> {
        let (head, body) = call.into_request();
        self.upstream.call_within(Duration::ZERO, head, body)
    }
}

impl Call {
    fn origin(&self) -> CallOrigin {
        CallOrigin {
            peer: self.peer.clone(),
            metadata: self.head.headers.get(&REQUEST_METADATA).cloned(),
        }
    }

    /// What the engine will be told of it, as far as it is known before the answer.
    fn observed(&self, key: FlightKey) -> Observed {
        Box::new(observation::Call {
            origin: self.origin(),
            key,
            joined: None,
            began: self.began,
            ended: self.began,
            answer: Default::default(),
        })
    }

    /// What is sent upstream now.
    fn into_request(self) -> (Head, Body) {
        let mut head = self.head;
        grpc::deduct_from_timeout(&mut head.headers, self.began);
        (head, self.body)
    }

    /// The first message, if it is uncompressed and at most `limit` bytes long. Everything stays
    /// in the body.
    async fn first_message(&mut self, limit: usize) -> Option<Bytes> {
        loop {
            let mut read = self.read();
            let size = read.len();
            match split_message(&mut read) {
                Some(Framed::Plain(message)) => return Some(message),
                Some(Framed::Compressed) => return None,
                None => {}
            }
            // That it broke off is seen again when it is forwarded.
            let more = poll_fn(|cx| self.body.poll_ahead(cx))
                .await
                .unwrap_or(false);
            if size > limit || !more || self.body.bare_trailers().is_some() {
                return None;
            }
        }
    }

    /// What has been read of the request, in one piece.
    fn read(&self) -> Bytes {
        self.body.ahead().joined()
    }

    /// The same call once more, if its request is one message that has been read whole. Ask before
    /// it is sent.
    fn again(&self) -> Option<Self> {
        // Whether the client has ended the stream yet does not matter: nothing else can follow,
        // and some clients (tonic's) do so later, with a frame of its own.
        let mut read = self.read();
        split_message(&mut read)?;
        read.is_empty().then(|| {
            let mut body = Body::empty();
            body.put_back(self.body.ahead().clone());
            Call {
                peer: self.peer.clone(),
                head: self.head.clone(),
                body,
                began: self.began,
            }
        })
    }

    /// It without a request.
    fn bare(&self) -> Self {
        Call {
            peer: self.peer.clone(),
            head: self.head.clone(),
            body: Body::empty(),
            began: self.began,
        }
    }

    /// A call of primed's own on behalf of the same client, without a deadline.
    fn beside(&self, method: &'static str, request: &impl Message) -> Self {
        let mut call = self.bare();
        call.head.path = PathAndQuery::from_static(method);
        call.head.headers.remove(&http::header::CONTENT_LENGTH);
        grpc::forget_timeout(&mut call.head.headers);
        let framed = grpc::framed(&request.encode_to_vec());
        call.body.put_back(framed);
        call
    }

    /// Until when it may be held: well within the client's own deadline.
    fn hold_until(&self) -> Instant {
        let timeout = grpc::timeout(&self.head.headers);
        self.began + timeout.map_or(MAX_HOLD, |timeout| (timeout / 2).min(MAX_HOLD))
    }
}

/// What a method that is observed is asked to do.
enum Asked {
    /// Something about this action.
    About(FlightKey),
    /// Something that primed leaves alone: `skip_cache_lookup`, or a digest function that it cannot compute.
    LeftAlone,
}

/// Reads the message of an observed request. One that cannot be read is the upstream's to judge.
/// `None` if the client goes away before that.
async fn asked<M: Message + Default>(
    call: &mut Call,
    reply: &mut Reply,
    read: impl FnOnce(M) -> Option<Asked>,
) -> Option<Asked> {
    let first = call.first_message(MAX_OBSERVED_REQUEST);
    let message = reply.unless_gone(first).await?;
    let asked = message
        .and_then(|message| M::decode(message).ok())
        .and_then(read);
    Some(asked.unwrap_or_else(|| {
        if call.peer.is_first_complaint() {
            tracing::warn!(
                client = %call.peer.origin(), method = call.head.path.path(),
                "a request is malformed, compressed or very long; it is forwarded unobserved"
            );
        }
        Asked::LeftAlone
    }))
}

/// The same of a request about an operation, with the operation's name, which `read_name` takes out.
/// What it executes is asked about if primed has seen it begin.
async fn asked_by_name<M: Message + Default>(
    engine: &Engine,
    call: &mut Call,
    reply: &mut Reply,
    read_name: impl FnOnce(M) -> String,
) -> Option<(Asked, String)> {
    let mut name = String::new();
    let read = |request| {
        name = read_name(request);
        let known = engine.operation(&name);
        Some(known.map_or(Asked::LeftAlone, Asked::About))
    };
    let asked = asked(call, reply, read).await?;
    Some((asked, name))
}

/// The asked-for action under its instance; `None` if the digest is malformed.
fn about(instance: String, digest: Option<reapi::Digest>, digest_function: i32) -> Option<Asked> {
    let digest = digest?;
    let Some(function) = DigestFunction::of_request(digest_function, &digest) else {
        let is_named = digest_function != Value::Unknown as i32;
        return is_named.then_some(Asked::LeftAlone);
    };
    Some(Asked::About(FlightKey {
        instance: instance.into(),
        action: function.read(Some(&digest)).ok()?,
    }))
}
