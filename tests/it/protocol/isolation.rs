//! Every digest function is primed, and what is recorded under one instance or digest function is
//! primed for no other.

use std::collections::{BTreeMap, BTreeSet};

use primed::cas::DigestFunction;

use super::*;

use DigestFunction::{Blake3, Md5, Sha1, Sha256, Sha384, Sha512};

/// Where a client's actions are kept.
type Place = (&'static str, DigestFunction);

impl Stage {
    /// Builds the program in `place`, in a build of its own, and waits until it is recorded.
    async fn build_in(&self, (instance, function): Place) -> Vec<Way> {
        let build = self.begin().on_instance(instance).hashed_with(function);
        let ways = self.build_all(&build).await;
        build.end();
        self.primed.wait();
        ways
    }

    /// How often primed executed actions, by place.
    fn primed_in(&self) -> BTreeMap<(String, DigestFunction), usize> {
        let mut counts = BTreeMap::new();
        for run in self.backend.world.speculative() {
            let place = (run.instance, run.action.function());
            *counts.entry(place).or_default() += 1;
        }
        counts
    }
}

/// Builds in both places, which the backend keeps apart, and changes the header in between.
async fn assert_apart(one: Place, other: Place) {
    let stage = Stage::set(&CAP);
    let all = UNITS + 1;
    let is_of = |(instance, function): Place| (instance.to_owned(), function);
    assert_eq!(stage.build_in(one).await, [Way::Executed; UNITS + 1]);

    // In the other place nothing is known of it, even where something changed.
    stage.write("include/common.h", "changed");
    assert_eq!(stage.build_in(other).await, [Way::Executed; UNITS + 1]);
    assert_eq!(stage.counts().missed, all as u64);
    let primed = stage.primed_in();
    assert!(!primed.contains_key(&is_of(other)), "{primed:?}");
    assert_eq!(stage.primed.status()["records"]["parents"], 2);
    assert_eq!(stage.primed.status()["records"]["actions"], 2 * all);

    // Each is primed by what it has recorded itself.
    for (place, content) in [(one, "once more"), (other, "and again")] {
        stage.write("include/common.h", content);
        let before = stage.primed_in().get(&is_of(place)).copied();
        let ways = stage.build_in(place).await;
        let log = stage.primed.daemon.log();
        assert_eq!(ways, [Way::Found; UNITS + 1], "{place:?}: {log}");
        let primed = stage.primed_in();
        assert_eq!(stage.counts().missed, 0, "{place:?}");
        assert_eq!(primed[&is_of(place)], before.unwrap_or_default() + all);
        let places: BTreeSet<_> = primed.into_keys().collect();
        assert!(places.is_subset(&BTreeSet::from([is_of(one), is_of(other)])));
    }
    let listed = stage.primed.ask(&["export", "--list"]);
    let listed = String::from_utf8(listed.stdout).unwrap();
    let keys: BTreeSet<&str> = listed.lines().filter_map(|l| l.split(' ').next()).collect();
    assert_eq!(keys.len(), 2, "{listed}");
    let labels: BTreeSet<&str> = listed
        .lines()
        .filter_map(|l| l.split("  ").last())
        .collect();
    assert_eq!(labels.len(), 2, "people can tell them apart: {listed}");
}

#[tokio::test]
async fn what_one_instance_records_is_never_primed_for_another() {
    assert_apart(("one", Sha256), ("other", Sha256)).await;
}

#[tokio::test]
async fn what_one_digest_function_records_is_never_primed_for_another() {
    assert_apart(("", Sha256), ("", Sha512)).await;
    // Their hashes look the same.
    assert_apart(("", Sha256), ("", Blake3)).await;
}

#[tokio::test]
async fn under_every_digest_function_all_that_changed_is_primed() {
    for function in [Md5, Sha1, Sha256, Sha384, Sha512, Blake3] {
        let stage = Stage::set(&CAP);
        let place = ("instance", function);
        assert_eq!(stage.build_in(place).await, [Way::Executed; UNITS + 1]);
        // Too large for a batch.
        stage.write("include/common.h", &"changed\n".repeat(200_000));
        let ways = stage.build_in(place).await;
        let log = stage.primed.daemon.log();
        assert_eq!(ways, [Way::Found; UNITS + 1], "{function}: {log}");
        assert_eq!(stage.counts().primed, UNITS as u64 + 1, "{function}");
        assert_eq!(stage.counts().used, UNITS as u64 + 1, "{function}");
    }
}

#[tokio::test]
async fn a_client_joins_what_is_primed_under_its_digest_function() {
    let stage = Stage::set(&CAP);
    let begin = || stage.begin().hashed_with(Blake3);
    let build = begin();
    stage.build_all(&build).await;
    build.end();
    stage.primed.wait();
    stage.backend.world.hold(true);
    stage.write("include/common.h", "changed");
    let build = begin();
    build.greet().await;
    let world = &stage.backend.world;
    stage
        .until("primed executes", || world.running_speculative() == UNITS)
        .await;
    let action = compile_of(&build, 0);
    let mut operations = build.execute(action.digest, false).await.unwrap();
    let first = operations.message().await.unwrap().unwrap();
    assert!(!first.done);
    world.hold(false);
    last(operations).await;
    assert_eq!(world.count(action.digest), 1, "it was joined");
    stage.build_all(&build).await;
    build.end();
    stage.primed.wait();
    let counts = stage.counts();
    // The others may have been about to end when the build came to them.
    assert_eq!(counts.missed, 0, "{counts:?}");
    assert!(counts.joined >= 1, "{counts:?}");
}
