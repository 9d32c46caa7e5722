//! `GetCapabilities`: forwarded, and the answer remembered, so that it can be given again while the
//! upstream cannot be reached: buildbox-casd asks its remote before it listens, and gives up after
//! ten seconds, so two daemons that point at each other could never start.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use http::header::CONTENT_LENGTH;
use http_body_util::BodyExt as _;
use parking_lot::Mutex;
use prost::Message;
use tonic::Code;

use super::{Call, Proxy, Reply};
use crate::address::Address;
use crate::backend::exchange::Answer;
use crate::backend::upstream::UpstreamError;
use crate::config::Compat;
use crate::grpc::{self, Framed, split_message};
use crate::http2::fields::Fields;
use crate::reapi::build::bazel::semver::SemVer;
use crate::reapi::primed::store::v1::RememberedCapabilities;
use crate::reapi::{GetCapabilitiesRequest, ServerCapabilities};
use crate::{task, whole_file};

/// The longest request: the name of an instance.
const MAX_REQUEST: usize = 4 * 1024;
/// Longer answers are not remembered; a real one has some hundred bytes.
const MAX_ANSWER: usize = 64 * 1024;
/// How many instances are remembered.
const MAX_INSTANCES: usize = 64;

/// What the upstream said that it can do.
pub struct Capabilities {
    upstream: String,
    compat: Option<Compat>,
    file: PathBuf,
    /// By instance.
    known: Mutex<BTreeMap<String, Bytes>>,
}

impl Capabilities {
    /// What was remembered in `state_dir` of the upstream at `address`.
    pub fn load(state_dir: &Path, address: &Address, compat: Option<Compat>) -> Self {
        let file = state_dir.join("capabilities");
        let upstream = address.to_string();
        let known = std::fs::read(&file)
            .ok()
            .and_then(|bytes| RememberedCapabilities::decode(bytes.as_slice()).ok())
            .filter(|remembered| remembered.upstream == upstream)
            .unwrap_or_default()
            .by_instance;
        Capabilities {
            upstream,
            compat,
            file,
            known: Mutex::new(known.into_iter().collect()),
        }
    }

    fn of_instance(&self, instance: &str) -> Option<Bytes> {
        self.known.lock().get(instance).cloned()
    }

    /// Remembers what the upstream said, in the background.
    fn remember(self: &Arc<Self>, instance: String, message: &Bytes) {
        {
            let mut known = self.known.lock();
            let is_new = known.get(&instance) != Some(message);
            let fits = known.len() < MAX_INSTANCES || known.contains_key(&instance);
            if !is_new || !fits || message.len() > MAX_ANSWER {
                return;
            }
            // A copy, for the message may be a slice of something large.
            known.insert(instance, Bytes::copy_from_slice(message));
        }
        let this = self.clone();
        task::spawn("capabilities", async move {
            task::blocking("capabilities", move || this.save()).await;
        });
    }

    fn save(&self) {
        let known = self.known.lock();
        let remembered = RememberedCapabilities {
            upstream: self.upstream.clone(),
            by_instance: known.clone().into_iter().collect(),
        };
        // One at a time: the lock is held.
        let saved = std::fs::create_dir_all(self.file.parent().unwrap_or(Path::new(".")))
            .and_then(|()| whole_file::write(&self.file, &remembered.encode_to_vec()));
        if let Err(error) = saved {
            tracing::debug!(file = %self.file.display(), %error, "capabilities cannot be kept");
        }
    }

    /// The message as the client is to see it.
    fn shown(&self, message: &Bytes) -> Bytes {
        match self.compat {
            Some(Compat::Bazel) => widened(message),
            None => message.clone(),
        }
    }
}

pub async fn call(proxy: Arc<Proxy>, call: Call, mut reply: Reply) {
    let mut call = call;
    let Some(message) = reply.unless_gone(call.first_message(MAX_REQUEST)).await else {
        return;
    };
    let request = message.and_then(|message| GetCapabilitiesRequest::decode(message).ok());
    let Some(GetCapabilitiesRequest { instance_name }) = request else {
        return proxy.forward(call, reply, None).await;
    };
    let known = proxy.capabilities.of_instance(&instance_name);
    let answer = match &known {
        // What is known need not be waited for.
        Some(_) => reply.unless_gone(proxy.send_at_once(call)).await,
        None => reply.unless_gone(proxy.send(call)).await,
    };
    match (answer, known) {
        (None, _) => {}
        (Some(Err(UpstreamError::Connect(_))), Some(known)) => {
            let framed = grpc::framed(&proxy.capabilities.shown(&known));
            if let Some(reply) = reply.message(framed).await {
                reply.end(Code::Ok, "");
            }
        }
        (Some(Ok(answer)), _) if !answer.is_end_stream() => {
            pass_on(&proxy, instance_name, answer, reply).await;
        }
        (Some(answer), _) => reply.finish(answer, None).await,
    }
}

/// Passes an answer on when it is all there, and remembers it if it is good.
async fn pass_on(proxy: &Proxy, instance: String, mut answer: Box<Answer>, mut reply: Reply) {
    let mut head = std::mem::take(&mut answer.head);
    let whole = match reply.unless_gone(answer.collect()).await {
        Some(Ok(whole)) => whole,
        Some(Err(error)) => return reply.fail(&error.into(), None),
        None => return,
    };
    let trailers = whole.trailers().map(Fields::from).unwrap_or_default();
    let mut body = whole.to_bytes();
    if grpc::status(&trailers) == Some(Code::Ok as u32)
        && let Some(Framed::Plain(message)) = split_message(&mut body.clone())
    {
        let shown = proxy.capabilities.shown(&message);
        if shown != message {
            body = grpc::framed(&shown);
            head.headers.remove(&CONTENT_LENGTH);
        }
        proxy.capabilities.remember(instance, &message);
    }
    reply.whole(head, body, trailers).await;
}

/// `message`, a `ServerCapabilities`, with 2.0 as the oldest version of the API, if that was a
/// later 2.x. A field that follows is merged into the one before, so everything else stays.
fn widened(message: &Bytes) -> Bytes {
    let low = ServerCapabilities::decode(message.clone()).ok();
    match low.and_then(|capabilities| capabilities.low_api_version) {
        Some(SemVer {
            major: 2,
            minor,
            patch,
            ..
        }) if (minor, patch) != (0, 0) => {
            // low_api_version = 4 { minor = 2: 0, patch = 3: 0 }
            let oldest: &[u8] = &[0x22, 4, 0x10, 0, 0x18, 0];
            [message, oldest].concat().into()
        }
        _ => message.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capabilities(major: i32, minor: i32) -> Bytes {
        let capabilities = ServerCapabilities {
            low_api_version: Some(SemVer {
                major,
                minor,
                ..SemVer::default()
            }),
            high_api_version: Some(SemVer {
                major: 2,
                minor: 12,
                ..SemVer::default()
            }),
            ..ServerCapabilities::default()
        };
        // With a field that this program does not know.
        [&capabilities.encode_to_vec()[..], &[0xfa, 0x3f, 1, 7]]
            .concat()
            .into()
    }

    #[test]
    fn widening_makes_2_0_the_oldest_version_and_keeps_all_else() {
        let message = capabilities(2, 1);
        let shown = widened(&message);
        assert!(shown.starts_with(&message));
        let read = ServerCapabilities::decode(shown).unwrap();
        let low = read.low_api_version.unwrap();
        assert_eq!((low.major, low.minor, low.patch), (2, 0, 0));
        assert_eq!(read.high_api_version.unwrap().minor, 12);
    }

    #[test]
    fn what_needs_no_widening_stays_as_it_is() {
        for message in [capabilities(2, 0), capabilities(3, 1), Bytes::new()] {
            assert_eq!(widened(&message), message);
        }
        let garbage = Bytes::from_static(b"\xff");
        assert_eq!(widened(&garbage), garbage);
    }

    #[test]
    fn what_is_remembered_of_another_upstream_does_not_count() {
        let state = tempfile::tempdir().unwrap();
        let address = |text: &str| text.parse::<Address>().unwrap();
        let one = Capabilities::load(state.path(), &address("unix:/one"), None);
        one.known
            .lock()
            .insert("main".to_owned(), capabilities(2, 1));
        one.save();
        let again = Capabilities::load(state.path(), &address("unix:/one"), None);
        assert_eq!(again.of_instance("main"), Some(capabilities(2, 1)));
        assert_eq!(again.of_instance(""), None);
        let other = Capabilities::load(state.path(), &address("unix:/other"), None);
        assert_eq!(other.of_instance("main"), None);
    }

    #[test]
    fn a_broken_memory_is_as_good_as_none() {
        let state = tempfile::tempdir().unwrap();
        std::fs::write(state.path().join("capabilities"), b"\xff\xff").unwrap();
        let address: Address = "unix:/one".parse().unwrap();
        let loaded = Capabilities::load(state.path(), &address, None);
        assert_eq!(loaded.of_instance(""), None);
    }
}
