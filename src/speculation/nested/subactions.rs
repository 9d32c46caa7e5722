//! What was executed on behalf of which action parent, for `ActionResult.subactions`. Shared by
//! the engine, which attributes, and the proxy, which adds it to the answers about parents.
//!
//! Promises: as long as there is no parent, a call costs one look at a flag; nothing here blocks
//! longer than a short lock.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use moka::sync::Cache;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::cas::Digest;
use crate::speculation::Engine;
use crate::speculation::clients::observation::Observation;
use crate::speculation::flights::FlightKey;
use crate::speculation::records::parent::{Parent, ParentKind, WeakKey};
use crate::speculation::records::store::Store;

/// How many digests are remembered, of all parents: as many as there are records.
const MAX_DIGESTS: u64 = 500_000;
/// How long the result of an open parent may wait for what the engine has not attributed yet.
const PATIENCE: Duration = Duration::from_millis(100);

/// The subactions of parents, by the action that the parent executed as.
pub struct Subactions {
    /// Parents that are executing, and how often.
    open: Mutex<HashMap<FlightKey, usize>>,
    known: Cache<FlightKey, Arc<[Digest]>>,
    /// Whether there has been any parent.
    any: AtomicBool,
}

/// A parent that is executing, until this is dropped.
#[must_use = "the parent is open only for as long as this is kept"]
pub struct OpenParent {
    subactions: Arc<Subactions>,
    key: FlightKey,
}

impl Default for Subactions {
    fn default() -> Self {
        let weight = |_: &FlightKey, digests: &Arc<[Digest]>| {
            u32::try_from(digests.len())
                .unwrap_or(u32::MAX)
                .saturating_add(1)
        };
        Subactions {
            open: Mutex::default(),
            known: Cache::builder()
                .max_capacity(MAX_DIGESTS)
                .weigher(weight)
                .build(),
            any: AtomicBool::new(false),
        }
    }
}

impl Subactions {
    /// Notes that the action `key` is a parent and executes now: its result is to be looked at.
    pub fn begin(self: &Arc<Self>, key: FlightKey) -> OpenParent {
        *self.open.lock().entry(key.clone()).or_default() += 1;
        self.any.store(true, Ordering::Release);
        OpenParent {
            subactions: self.clone(),
            key,
        }
    }

    /// Replaces what is known of the parent `key`: the actions that were executed, or answered
    /// from the action cache, on its behalf, in that order.
    pub fn set(&self, key: FlightKey, digests: impl Into<Arc<[Digest]>>) {
        self.known.insert(key, digests.into());
        self.any.store(true, Ordering::Release);
    }

    /// What is known of the parent `key`.
    pub fn of(&self, key: &FlightKey) -> Option<Arc<[Digest]>> {
        self.known.get(key)
    }

    /// Whether `key` is a parent that executes now.
    pub fn is_open(&self, key: &FlightKey) -> bool {
        self.open.lock().contains_key(key)
    }

    /// Whether any parent executes now.
    pub fn has_open(&self) -> bool {
        self.any.load(Ordering::Acquire) && !self.open.lock().is_empty()
    }

    /// Whether `key` is a parent, as far as is known now.
    pub fn expects(&self, key: &FlightKey) -> bool {
        self.any.load(Ordering::Acquire) && (self.is_open(key) || self.known.contains_key(key))
    }

    /// Takes in what is recorded of `parents`, but for what is known better by now. Blocks.
    pub fn fill(&self, store: &Store, parents: impl IntoIterator<Item = WeakKey>) {
        for parent in parents {
            match store.load(parent) {
                Ok(parent) => {
                    if let Some((key, digests)) = parent.as_ref().and_then(recorded) {
                        self.known.entry(key).or_insert(digests);
                        self.any.store(true, Ordering::Release);
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "records cannot be read; earlier parents' results are not completed");
                    return;
                }
            }
        }
    }
}

impl Drop for OpenParent {
    fn drop(&mut self) {
        let mut open = self.subactions.open.lock();
        if let Some(count) = open.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.key);
            }
        }
    }
}

/// What a parent executed as, and its subactions then. Those that it had only in earlier builds
/// are recorded too, but are not its any more.
pub fn recorded(parent: &Parent) -> Option<(FlightKey, Arc<[Digest]>)> {
    let ParentKind::Action(action) = &parent.identity.kind else {
        return None;
    };
    let key = FlightKey {
        instance: action.instance.clone(),
        action: parent.executed.as_ref()?.action,
    };
    let actions = parent.actions.values();
    let latest = actions.map(|base| base.last_seen_unix_ms).max();
    let actions = parent.actions.values();
    let mut actions: Vec<_> = actions
        .filter(|base| Some(base.last_seen_unix_ms) == latest)
        .collect();
    actions.sort_unstable_by_key(|base| base.order);
    Some((key, actions.iter().map(|base| base.digest).collect()))
}

impl Engine {
    /// What was executed on behalf of which parent.
    pub fn subactions(&self) -> &Arc<Subactions> {
        &self.subactions
    }

    /// The subactions of the parent `key`, whose result is there. For one that was open until now,
    /// waits until the engine has attributed what came before, but no longer than 100 ms.
    pub async fn subactions_of(&self, key: &FlightKey) -> Option<Arc<[Digest]>> {
        if self.subactions.is_open(key) {
            let key = key.clone();
            let deadline = Instant::now() + PATIENCE;
            // What takes longer is left out.
            let mut turn = self.hidden_hits.queue();
            let _ = tokio::time::timeout_at(deadline, turn.comes()).await;
            let completing = |reply| Observation::Completing { key, reply };
            self.answered(completing, deadline.into()).await;
        }
        self.subactions.of(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cas::DigestFunction;
    use crate::speculation::records::parent::{
        ActionParent, BaseAction, ExecutedParent, ParentIdentity, SubactionKey,
    };
    use crate::speculation::tests::stuck;
    use std::path::PathBuf;

    fn key(name: &str) -> FlightKey {
        FlightKey {
            instance: "outer".into(),
            action: Digest::of(name.as_bytes()),
        }
    }

    /// A parent that executed as `action`, with subactions by digest, order and age.
    fn parent(action: &str, subactions: &[(&str, u64, i64)]) -> Parent {
        let mut parent = Parent::new(ParentIdentity {
            instance: "nested".into(),
            digest_function: DigestFunction::Sha256,
            uid: None,
            kind: ParentKind::Action(ActionParent {
                instance: "outer".into(),
                key: Digest::of(action.as_bytes()),
                name: action.to_owned(),
            }),
        });
        parent.executed = Some(Arc::new(ExecutedParent {
            action: key(action).action,
            input_root: Digest::of(b"tree"),
            texts: Vec::new(),
            outputs: Vec::new(),
        }));
        for (name, order, seen) in subactions {
            let encoded = encoded(name);
            let base = BaseAction {
                digest: Digest::of(&encoded),
                encoded,
                input_root: Digest::of(b"tree"),
                mount: None,
                file_system_root: PathBuf::from("/"),
                working_directory: String::new(),
                texts: Vec::new(),
                outputs: Vec::new(),
                duration: Duration::ZERO,
                order: *order,
                last_seen_unix_ms: *seen,
            };
            let key = SubactionKey {
                action_key: Digest::of(name.as_bytes()),
                mount: None,
            };
            parent.actions.insert(key, Arc::new(base));
        }
        parent
    }

    /// An `Action` of its own kind.
    fn encoded(name: &str) -> bytes::Bytes {
        let action = crate::reapi::Action {
            command_digest: Some(Digest::of(name.as_bytes()).to_proto()),
            input_root_digest: Some(Digest::of(b"tree").to_proto()),
            ..Default::default()
        };
        Digest::of_message(&action).1
    }

    fn digests(names: &[&str]) -> Vec<Digest> {
        let names = names.iter();
        names.map(|name| Digest::of(&encoded(name))).collect()
    }

    #[test]
    fn a_parent_is_open_until_its_last_execution_has_ended() {
        let subactions = Arc::new(Subactions::default());
        assert!(!subactions.expects(&key("p")));
        let one = subactions.begin(key("p"));
        let two = subactions.begin(key("p"));
        drop(one);
        assert!(subactions.is_open(&key("p")) && subactions.expects(&key("p")));
        assert!(!subactions.expects(&key("other")));
        drop(two);
        assert!(!subactions.expects(&key("p")));
        subactions.set(key("p"), digests(&["a"]));
        assert!(subactions.expects(&key("p")) && !subactions.is_open(&key("p")));
    }

    #[tokio::test(start_paused = true)]
    async fn the_result_of_an_open_parent_waits_until_the_engine_has_attributed_the_rest() {
        let (engine, mut observations) = stuck();
        let open = engine.subactions().begin(key("p"));
        let attribute = async {
            let Some(Observation::Completing { key, reply }) = observations.recv().await else {
                panic!("the engine is not asked");
            };
            // Well within the time that it has.
            tokio::time::sleep(PATIENCE / 2).await;
            engine.subactions().set(key, digests(&["late"]));
            drop(reply);
        };
        let asked = key("p");
        let (of, ()) = tokio::join!(engine.subactions_of(&asked), attribute);
        assert_eq!(of.unwrap().to_vec(), digests(&["late"]));

        let began = tokio::time::Instant::now();
        assert!(engine.subactions_of(&asked).await.is_some());
        assert_eq!(began.elapsed(), PATIENCE, "it does not answer");
        drop(open);
        assert!(engine.subactions_of(&asked).await.is_some());
        assert_eq!(began.elapsed(), PATIENCE, "it is not asked about others");
    }

    #[test]
    fn records_fill_in_what_is_not_known_better_in_the_order_of_the_last_build() {
        let store = Store::in_memory();
        let recorded = [
            parent("p", &[("gone", 0, 1), ("last", 9, 2), ("first", 3, 2)]),
            parent("q", &[("old", 0, 1)]),
        ];
        for parent in &recorded {
            store.save(parent, &[]).unwrap();
        }
        let keys = recorded.map(|parent| parent.identity.weak_key());
        let subactions = Arc::new(Subactions::default());
        subactions.set(key("q"), digests(&["new"]));
        subactions.fill(&store, keys);
        let of = |name| subactions.of(&key(name)).unwrap().to_vec();
        assert_eq!(of("p"), digests(&["first", "last"]));
        assert_eq!(of("q"), digests(&["new"]));
    }
}
