//! The relatives of an action parent, as others share them: what it is recorded under, which
//! nobody knows before it has run, for that depends on the instances that its command executes
//! under; and who depends on it, which no records of its own tell.
//!
//! Each parent that is shared is entered with itself and with all parents that it depends on, as
//! far as these have written what it reads. Entries are read, added to and written again: of two
//! that are written at once one is lost, until its parent is recorded again.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;

use super::share::{Obtained, Sharing, in_time};
use super::shelf::{MAX_SHARED, ShareError, Shelf, UnusableError};
use crate::reapi::primed::store::v1 as proto;
use crate::speculation::records::interchange::Malformed;
use crate::speculation::records::parent::{Parent, ParentIdentity, WeakKey};
use crate::speculation::records::store::{Store, identity, stored_parent};
use crate::task;

/// The instances that a parent's command executes under, as far as they are kept apart.
const MAX_OWN: usize = 16;
/// Dependents that are named; those that were recorded first go.
const MAX_NAMED: usize = 1000;
/// Dependents that are obtained for one parent, directly or not.
const MAX_OBTAINED: usize = 500;
/// How much they may take in all, in bytes.
const MAX_BYTES: u64 = MAX_SHARED;

/// What others share about an action parent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Relatives {
    /// Itself, as it is recorded. Newest first.
    own: Vec<ParentIdentity>,
    /// Those that depend on it. Newest first.
    dependents: Vec<ParentIdentity>,
}

impl Relatives {
    /// Reads what is shared of the parent that is asked for as `asked`. Whatever cannot be a
    /// relative is left out.
    fn read(asked: &ParentIdentity, encoded: Bytes) -> Result<Self, UnusableError> {
        let stored = proto::Relatives::decode(encoded).map_err(Malformed::NoMessage)?;
        let relatives = |stored: &[proto::Parent], most| -> Vec<ParentIdentity> {
            let relatives = stored.iter().filter_map(identity);
            let related = relatives.filter(|relative| {
                let own = relative.as_asked_for();
                own.is_some_and(|own| own.uid == asked.uid && own.instance == asked.instance)
            });
            related.take(most).collect()
        };
        let mut own = relatives(&stored.own, MAX_OWN);
        let key = asked.weak_key();
        own.retain(|own| own.as_asked_for().is_some_and(|own| own.weak_key() == key));
        Ok(Relatives {
            own,
            dependents: relatives(&stored.dependents, MAX_NAMED),
        })
    }

    fn encode(&self) -> Bytes {
        let stored = |relatives: &[ParentIdentity]| {
            let relatives = relatives.iter().cloned().map(Parent::new);
            relatives.map(|parent| stored_parent(&parent)).collect()
        };
        let stored = proto::Relatives {
            own: stored(&self.own),
            dependents: stored(&self.dependents),
        };
        stored.encode_to_vec().into()
    }

    /// What is shared of the parent that is asked for as `asked`.
    async fn fetch(
        sharing: &Sharing,
        asked: &ParentIdentity,
    ) -> Result<Option<Self>, UnusableError> {
        let get = Shelf::Relatives.get(&sharing.place, asked, MAX_SHARED);
        let encoded = get.await?;
        encoded
            .map(|encoded| Self::read(asked, encoded))
            .transpose()
    }
}

/// Names a parent that is shared as such, and as a dependent of `dependencies`.
pub async fn introduce(
    sharing: &Sharing,
    parent: &ParentIdentity,
    dependencies: &[ParentIdentity],
) -> Result<(), ShareError> {
    let Some(own) = parent.as_asked_for() else {
        return Ok(());
    };
    if !sharing.may_write(&own.instance).await? {
        return Ok(());
    }
    enter(sharing, &own, |known| add(&mut known.own, parent, MAX_OWN)).await?;
    for dependency in dependencies {
        if let Some(dependency) = dependency.as_asked_for() {
            enter(sharing, &dependency, |known| {
                add(&mut known.dependents, parent, MAX_NAMED)
            })
            .await?;
        }
    }
    Ok(())
}

/// Has `add` add to what is shared of a parent.
async fn enter(
    sharing: &Sharing,
    asked: &ParentIdentity,
    add: impl FnOnce(&mut Relatives) -> bool,
) -> Result<(), ShareError> {
    let mut relatives = match Relatives::fetch(sharing, asked).await {
        Ok(known) => known.unwrap_or_default(),
        Err(UnusableError::Backend(status)) => return Err(status.into()),
        // Nobody can use it.
        Err(_) => Relatives::default(),
    };
    if add(&mut relatives) {
        let put = Shelf::Relatives.put(&sharing.place, asked, relatives.encode());
        put.await?;
    }
    Ok(())
}

/// Adds a relative, if it is new.
fn add(relatives: &mut Vec<ParentIdentity>, new: &ParentIdentity, most: usize) -> bool {
    let is_new = !relatives.contains(new);
    if is_new {
        relatives.insert(0, new.clone());
        relatives.truncate(most);
    }
    is_new
}

/// What others have shared of an action parent.
pub struct SharedFamily {
    /// Its own records.
    pub own: Vec<Arc<Parent>>,
    /// The way to its dependents'.
    pub dependents: Dependents,
}

/// What others have shared of the parent that is asked for as `asked`, if there is anything.
pub async fn obtain(sharing: &Arc<Sharing>, asked: &ParentIdentity) -> Option<SharedFamily> {
    let fetched = Relatives::fetch(sharing, asked);
    let relatives = in_time(&asked.label(), fetched).await??;
    let mut dependents = Dependents {
        sharing: sharing.clone(),
        reached: HashSet::new(),
        named: Vec::new(),
        fetched: 0,
    };
    let mut own = Vec::new();
    for identity in &relatives.own {
        dependents.reached.insert(identity.weak_key());
        own.extend(dependents.obtain(identity).await);
    }
    dependents.named = relatives.dependents;
    Some(SharedFamily { own, dependents })
}

/// Those that depend on a parent, directly or not: the nearest first.
pub struct Dependents {
    sharing: Arc<Sharing>,
    /// Those before them.
    reached: HashSet<WeakKey>,
    /// Those that are to be obtained next.
    named: Vec<ParentIdentity>,
    /// How many bytes have been fetched.
    fetched: u64,
}

impl Dependents {
    /// The records of those that depend on those before them; `None` when there are no more.
    pub async fn next(&mut self) -> Option<Vec<Arc<Parent>>> {
        let mut found = Vec::new();
        let mut further = Vec::new();
        for identity in std::mem::take(&mut self.named) {
            let key = identity.weak_key();
            if self.reached.contains(&key) || self.reached.len() >= MAX_OBTAINED {
                continue;
            }
            let parent = match recorded(&self.sharing.store, key).await {
                Some(parent) => Some(parent),
                None => self.obtain(&identity).await,
            };
            // It may have depended on them once.
            let depends = |parent: &Arc<Parent>| !parent.dependencies().is_disjoint(&self.reached);
            let Some(parent) = parent.filter(depends) else {
                continue;
            };
            found.push(parent);
            further.extend(identity.as_asked_for());
        }
        self.reached
            .extend(found.iter().map(|parent| parent.identity.weak_key()));
        for asked in further {
            let fetched = Relatives::fetch(&self.sharing, &asked);
            let relatives = in_time(&asked.label(), fetched).await.flatten();
            self.named.extend(relatives.unwrap_or_default().dependents);
        }
        (!found.is_empty()).then_some(found)
    }

    async fn obtain(&mut self, identity: &ParentIdentity) -> Option<Arc<Parent>> {
        let room = MAX_BYTES - self.fetched;
        let Obtained { parent, size } = self.sharing.obtain(identity, room).await?;
        self.fetched += size;
        Some(parent)
    }
}

/// What is recorded here under `key`.
async fn recorded(store: &Arc<Store>, key: WeakKey) -> Option<Arc<Parent>> {
    let store = store.clone();
    let loaded = task::blocking("loading records", move || store.load(key));
    // A store that cannot be read says so elsewhere.
    loaded.await?.ok()?.map(Arc::new)
}

#[cfg(test)]
mod tests {
    use super::super::shelf::Place;
    use super::*;
    use crate::backend::Backend;
    use crate::cas::memory::Memory;
    use crate::cas::transfer::Cas;
    use crate::cas::{Digest, DigestFunction};
    use crate::speculation::records::parent::{ActionParent, Origin, ParentKind};

    /// An element, whose actions run under an instance of their own.
    fn element(name: &str) -> ParentIdentity {
        ParentIdentity {
            instance: "nested".into(),
            digest_function: DigestFunction::Sha256,
            uid: Some(1000),
            kind: ParentKind::Action(ActionParent {
                instance: "outer".into(),
                key: Digest::of(name.as_bytes()),
                name: name.to_owned(),
            }),
        }
    }

    fn elements(names: &[&str]) -> Vec<ParentIdentity> {
        names.iter().map(|name| element(name)).collect()
    }

    /// A primed without records that shares by way of `backend`. Nobody saves what it obtains.
    fn sharing(backend: Arc<dyn Backend>) -> Arc<Sharing> {
        let cas = Cas::new(backend.clone());
        let place = Place { backend, cas };
        Arc::new(Sharing::new(place, Arc::new(Store::in_memory()), drop))
    }

    /// Shares what is recorded of `name`, which depends on `dependencies`.
    async fn publish(sharing: &Sharing, name: &str, dependencies: &[&str]) {
        let mut parent = Parent::new(element(name));
        for dependency in elements(dependencies) {
            let origin = Origin::Artifact {
                parent: dependency.weak_key(),
                path: "output".to_owned(),
            };
            parent.overlays.add(Digest::of(b"output"), origin);
        }
        sharing.publish(&parent, &elements(dependencies)).await;
    }

    /// The names of what is obtained of `name`: of itself, then of those that depend on it, level
    /// by level.
    async fn obtained(sharing: &Arc<Sharing>, name: &str) -> Vec<Vec<String>> {
        let names = |parents: Vec<Arc<Parent>>| {
            let names = parents.iter().map(|parent| match &parent.identity.kind {
                ParentKind::Action(action) => action.name.clone(),
                ParentKind::Invocation { .. } => panic!("no element"),
            });
            let mut names: Vec<_> = names.collect();
            names.sort_unstable();
            names
        };
        let asked = element(name).as_asked_for().unwrap();
        let Some(mut family) = obtain(sharing, &asked).await else {
            return Vec::new();
        };
        let mut levels = vec![names(family.own)];
        while let Some(found) = family.dependents.next().await {
            levels.push(names(found));
        }
        levels
    }

    #[tokio::test]
    async fn whoever_asks_for_a_parent_finds_it_and_all_that_depend_on_it() {
        let backend = Memory::holding([]);
        let one = sharing(backend.clone());
        publish(&one, "base", &[]).await;
        publish(&one, "lib", &["base"]).await;
        publish(&one, "app", &["lib"]).await;
        publish(&one, "tool", &["base", "lib"]).await;
        publish(&one, "stranger", &[]).await;
        let other = sharing(backend.clone());
        let of_base = [&["base"][..], &["lib", "tool"], &["app"]];
        assert_eq!(obtained(&other, "base").await, of_base);
        assert_eq!(obtained(&other, "app").await, [["app"]]);
        assert!(obtained(&other, "unheard of").await.is_empty());

        // It does without its dependency now; another does not, and depends on itself by others.
        publish(&one, "app", &[]).await;
        publish(&one, "base", &["tool"]).await;
        assert_eq!(
            obtained(&other, "base").await,
            [&["base"][..], &["lib", "tool"]]
        );

        // What is recorded here need not be fetched.
        let own = Parent::new(element("lib"));
        other.store.save(&own, &[]).unwrap();
        assert_eq!(obtained(&other, "base").await, [["base"], ["tool"]]);
    }

    #[tokio::test]
    async fn what_is_damaged_is_not_used_and_mended_by_the_next_who_shares() {
        let sharing = sharing(Memory::holding([]));
        let asked = element("lib").as_asked_for().unwrap();
        let garbage = Bytes::from_static(b"\xff");
        let put = Shelf::Relatives.put(&sharing.place, &asked, garbage);
        put.await.unwrap();
        assert!(obtained(&sharing, "lib").await.is_empty());
        publish(&sharing, "lib", &[]).await;
        assert_eq!(obtained(&sharing, "lib").await, [["lib"]]);
    }

    #[test]
    fn strangers_are_no_relatives() {
        let asked = element("lib").as_asked_for().unwrap();
        let of_another = ParentIdentity {
            uid: Some(1),
            ..element("app")
        };
        let invocation = ParentIdentity {
            kind: ParentKind::Invocation {
                project_root: None,
                tool: "make".to_owned(),
            },
            ..element("app")
        };
        let relatives = Relatives {
            own: elements(&["lib", "app"]),
            dependents: vec![of_another, invocation, element("app")],
        };
        let read = Relatives::read(&asked, relatives.encode()).unwrap();
        let expected = Relatives {
            own: elements(&["lib"]),
            dependents: elements(&["app"]),
        };
        assert_eq!(read, expected);
    }

    #[test]
    fn the_newest_relatives_are_named_first_and_those_before_them_go() {
        let mut relatives = Vec::new();
        for name in ["one", "two", "three"] {
            assert!(add(&mut relatives, &element(name), 2));
        }
        assert!(!add(&mut relatives, &element("two"), 2));
        assert_eq!(relatives, elements(&["three", "two"]));
    }
}
