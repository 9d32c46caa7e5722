use std::path::Path;

use prost::Message as _;

use super::*;
use crate::cas::memory::Memory;
use crate::cas::{Digest, DigestFunction};
use crate::reapi::{self, ActionResult};
use crate::speculation::flights::Outcome;
use crate::speculation::records::parent::{
    BaseAction, Origin, OverlayTable, SubactionKey, fixture,
};
use bytes::Bytes;

const OLD: &str = "as it was recorded";

fn digest(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

/// The records of a build that compiled each of `sources` by itself, and the trees that it read.
fn recorded(directory: &Path, sources: &[&str]) -> (Parent, Vec<Bytes>) {
    let mut overlays = OverlayTable::default();
    let mut actions = HashMap::new();
    let mut trees = Vec::new();
    for source in sources {
        let old = digest(&format!("{OLD}: {source}"));
        overlays.add(old, Origin::Disk(directory.join(source)));
        let root = reapi::Directory {
            files: vec![reapi::FileNode {
                name: (*source).to_owned(),
                digest: Some(old.to_proto()),
                ..reapi::FileNode::default()
            }],
            ..reapi::Directory::default()
        };
        let (input_root, root) = Digest::of_message(&root);
        trees.push(root);
        let action = reapi::Action {
            command_digest: Some(digest(&format!("compile {source}")).to_proto()),
            input_root_digest: Some(input_root.to_proto()),
            ..reapi::Action::default()
        };
        let encoded = Bytes::from(action.encode_to_vec());
        let base = BaseAction {
            digest: Digest::of(&encoded),
            encoded,
            mount: Some(directory.to_owned()),
            outputs: vec![(source.replace(".c", ".o"), digest(source))],
            ..fixture::base(source, input_root)
        };
        let action_key = base.parts().unwrap().action_key;
        let mount = base.mount.clone();
        actions.insert(SubactionKey { action_key, mount }, Arc::new(base));
    }
    let mut parent = fixture::invocation(overlays);
    parent.actions = actions.into_iter().collect();
    assert_eq!(parent.identity.digest_function, DigestFunction::Sha256);
    (parent, trees)
}

#[tokio::test]
async fn what_has_landed_while_another_plan_was_made_is_not_executed_again() {
    let directory = tempfile::tempdir().unwrap();
    let write = |source: &str, text: &str| {
        std::fs::write(directory.path().join(source), text).unwrap();
    };
    let sources = ["a.c", "b.c"];
    for source in sources {
        write(source, &format!("{OLD}: {source}"));
    }
    let (parent, trees) = recorded(directory.path(), &sources);
    let group = Group::Invocation(parent.identity.weak_key());
    let workshop = Workshop::before(Memory::holding(trees));
    let (mailbox, _messages) = mpsc::channel(1);
    let mut worker = Worker::new(&group, mailbox.downgrade(), workshop.clone());
    let awaited = |worker: &Worker| -> Vec<FlightKey> {
        let plan = worker.plan.iter();
        plan.flat_map(Plan::awaited).cloned().collect()
    };

    write("a.c", "changed");
    worker.deal_with(Message::Records(Arc::new(parent))).await;
    let first = awaited(&worker);
    let [a] = first.as_slice() else {
        panic!("{first:?}");
    };
    assert!(workshop.flights.is_in_flight(a));

    // It lands when `b.c` is being planned for: the worker will hear of it afterwards.
    let landing = Landing {
        key: a.clone(),
        outcome: Outcome::Cached(Arc::new(ActionResult::default())),
        activity: workshop.activities.begin(),
    };
    worker.landed.send(landing).await.unwrap();
    workshop.flights.withdraw(a, &worker.landed);
    assert!(!workshop.flights.is_in_flight(a));
    write("b.c", "changed as well");
    worker.deal_with(Message::Saved).await;

    let second = awaited(&worker);
    let [b] = second.as_slice() else {
        panic!("{second:?}");
    };
    assert_ne!(a, b);
    assert!(workshop.flights.is_in_flight(b));
    assert!(!workshop.flights.is_in_flight(a));
}
