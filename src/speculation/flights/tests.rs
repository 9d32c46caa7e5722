//! What clients and owners of flights can rely on.

use super::record::Course;
use super::state::GIVES_WAY;
use super::*;

fn key(name: &str) -> FlightKey {
    FlightKey {
        instance: "".into(),
        action: Digest::of(name.as_bytes()),
    }
}

fn owner() -> mpsc::Sender<Landing> {
    mpsc::channel(1).0
}

fn urgency(seconds: u64) -> Urgency {
    Urgency::new(Duration::from_secs(seconds), 0)
}

fn queue(flights: &Arc<Flights>, names: &[(&str, u64)]) {
    for (name, seconds) in names {
        let announced = flights.announce(key(name), &owner()).unwrap();
        announced.submit(urgency(*seconds));
    }
}

/// What departs now, without waiting.
async fn departing(flights: &Arc<Flights>) -> Option<Departure> {
    tokio::select! {
        biased;
        departure = flights.depart() => Some(departure),
        () = std::future::ready(()) => None,
    }
}

#[tokio::test]
async fn the_longest_critical_path_departs_first_and_the_cap_holds() {
    let flights = Flights::new(2);
    queue(&flights, &[("short", 1), ("long", 9), ("middle", 5)]);
    let first = departing(&flights).await.unwrap();
    let second = departing(&flights).await.unwrap();
    assert_eq!(*first.key(), key("long"));
    assert_eq!(*second.key(), key("middle"));
    assert!(departing(&flights).await.is_none());
    first.end(Ending::Cached, Duration::ZERO);
    assert_eq!(*departing(&flights).await.unwrap().key(), key("short"));
}

#[tokio::test]
async fn a_flight_that_a_client_joins_departs_beyond_the_cap() {
    let flights = Flights::new(1);
    queue(&flights, &[("running", 9), ("queued", 1)]);
    let _running = departing(&flights).await.unwrap();
    assert!(departing(&flights).await.is_none());
    let mut stage = flights.join(&key("queued")).unwrap();
    let wanted = departing(&flights).await.unwrap();
    assert_eq!(*wanted.key(), key("queued"));
    wanted.end(Ending::Succeeded(Bytes::new()), Duration::from_secs(1));
    assert!(matches!(ending(&mut stage).await, Ending::Succeeded(_)));
    assert!(flights.use_primed(&key("queued"), 1).is_some());
    assert!(
        flights.use_primed(&key("queued"), 1).is_some(),
        "the same build"
    );
    assert!(
        flights.use_primed(&key("queued"), 2).is_none(),
        "a later one"
    );
    assert!(flights.join(&key("queued")).is_none());
}

#[tokio::test]
async fn what_is_held_back_stays_queued_but_for_those_who_wait_for_it_or_want_it_too() {
    let flights = Flights::new(9);
    let (doubted, trusted) = (owner(), owner());
    let announce = |name| {
        let announced = flights.announce(key(name), &doubted).unwrap();
        announced.submit(urgency(1));
    };
    announce("before");
    flights.hold_back(&doubted);
    for name in ["after", "awaited", "shared"] {
        announce(name);
    }
    assert!(departing(&flights).await.is_none());
    let _stage = flights.join(&key("awaited")).unwrap();
    assert_eq!(*departing(&flights).await.unwrap().key(), key("awaited"));
    assert!(flights.announce(key("shared"), &trusted).is_none());
    assert_eq!(*departing(&flights).await.unwrap().key(), key("shared"));
    assert!(departing(&flights).await.is_none());
    flights.withdraw(&key("after"), &doubted);
    flights.trust(&doubted);
    assert_eq!(*departing(&flights).await.unwrap().key(), key("before"));
    assert!(departing(&flights).await.is_none());
}

#[tokio::test]
async fn a_wanted_flight_starts_as_soon_as_its_inputs_are_there() {
    let flights = Flights::new(1);
    queue(&flights, &[("running", 9)]);
    let _running = departing(&flights).await.unwrap();
    let late = flights.announce(key("late"), &owner()).unwrap();
    let _stage = flights.join(&key("late")).unwrap();
    assert!(departing(&flights).await.is_none());
    late.submit(urgency(1));
    assert_eq!(*departing(&flights).await.unwrap().key(), key("late"));
}

#[tokio::test]
async fn clients_own_executions_take_room_from_the_lane_but_leave_it_one() {
    let flights = Flights::new(2);
    let own = [
        flights.client_executes(key("a")),
        flights.client_executes(key("b")),
        flights.client_executes(key("b")),
    ];
    assert!(
        flights.announce(key("b"), &owner()).is_none(),
        "a client executes it itself"
    );
    queue(&flights, &[("x", 3), ("y", 2)]);
    let _x = departing(&flights).await.unwrap();
    assert!(departing(&flights).await.is_none());
    drop(own);
    // When none of them has come back for a while.
    assert_eq!(*flights.depart().await.key(), key("y"));
    assert!(flights.announce(key("b"), &owner()).is_some());
}

/// No client waits for it any more.
fn leave(flights: &Flights, name: &str) {
    let mut state = flights.state.lock();
    state.flights.get_mut(&key(name)).unwrap().wanted = false;
}

/// Before a backend that takes two executions at once, with two that run.
async fn full(names: [&str; 2]) -> (Arc<Flights>, [Departure; 2]) {
    let flights = Flights::before(Some(2), 2);
    queue(&flights, &names.map(|name| (name, 1)));
    let mut departures = Vec::new();
    for name in names {
        // Told of, it leaves a slot free; a client that waits takes it.
        let stage = flights.join(&key(name)).unwrap();
        departures.push(departing(&flights).await.unwrap());
        drop(stage);
        leave(&flights, name);
    }
    (flights, departures.try_into().ok().unwrap())
}

fn is_asked(departure: &Departure) -> bool {
    departure.asked_to_give_way().is_cancelled()
}

#[tokio::test]
async fn what_began_last_gives_way_to_a_client_and_departs_again_when_there_is_room() {
    let (flights, [first, mut last]) = full(["first", "last"]).await;
    let own = flights.client_executes(key("own"));
    assert!(!is_asked(&first) && is_asked(&last));
    assert!(last.is_to_give_way());
    assert!(last.give_way());
    drop(last);
    let counts = flights.counts();
    assert_eq!((counts.running, counts.queued, counts.gave_way), (1, 1, 1));
    assert_eq!((counts.failed, counts.cancelled), (0, 0));
    let record = flights.record(&key("last")).unwrap();
    assert_eq!(record.flown().course, Course::Queued);
    assert_eq!(record.flown().started_unix_ms, None);
    assert!(departing(&flights).await.is_none());
    drop(own);
    first.end(Ending::Cached, Duration::ZERO);
    let again = flights.depart().await;
    assert_eq!(*again.key(), key("last"));
    again.end(Ending::Succeeded(Bytes::new()), Duration::from_secs(1));
    assert!(flights.use_primed(&key("last"), 1).is_some());
    assert_eq!(flights.counts().running, 0);
}

#[tokio::test]
async fn its_landing_is_told_once_after_it_has_given_way() {
    let flights = Flights::new(1);
    let (owner, mut landings) = mpsc::channel(4);
    let announced = flights.announce(key("a"), &owner).unwrap();
    announced.submit(urgency(1));
    let mut departure = departing(&flights).await.unwrap();
    let own = [
        flights.client_executes(key("b")),
        flights.client_executes(key("c")),
    ];
    assert!(is_asked(&departure) && departure.give_way());
    drop((departure, own));
    assert!(landings.try_recv().is_err());
    let departure = flights.depart().await;
    let activities = crate::speculation::activity::Activities::default();
    departure.land(Outcome::Failed, activities.begin()).await;
    departure.end(Ending::Failed, Duration::ZERO);
    assert_eq!(landings.try_recv().unwrap().key, key("a"));
    assert!(landings.try_recv().is_err());
}

#[tokio::test]
async fn what_a_client_waits_for_never_gives_way_and_starts_again_at_once_if_it_just_has() {
    let (flights, [mut first, last]) = full(["first", "last"]).await;
    let _stage = flights.join(&key("last")).unwrap();
    let _own = flights.client_executes(key("own"));
    assert!(is_asked(&first) && !is_asked(&last));
    // A client joins before anything has been done about it.
    let _stage = flights.join(&key("first")).unwrap();
    assert!(!first.is_to_give_way());
    last.end(Ending::Cached, Duration::ZERO);
    // And one joins when it is too late for that.
    let mut stage = flights.watch(&key("first")).unwrap();
    assert!(first.give_way());
    assert!(matches!(*stage.borrow_and_update(), Stage::Queued));
    assert_eq!(*departing(&flights).await.unwrap().key(), key("first"));
}

#[tokio::test]
async fn a_flight_gives_way_twice_and_is_left_alone_then() {
    let (flights, [_first, last]) = full(["first", "last"]).await;
    let mut departure = last;
    for _ in 0..GIVES_WAY {
        let own = flights.client_executes(key("own"));
        assert!(is_asked(&departure) && departure.give_way());
        drop(own);
        let _stage = flights.join(&key("last")).unwrap();
        departure = departing(&flights).await.unwrap();
        leave(&flights, "last");
    }
    let _own = flights.client_executes(key("own"));
    assert!(!is_asked(&departure));
}

#[tokio::test]
async fn nothing_gives_way_where_priorities_do_or_where_nothing_can_be_stopped() {
    let (flights, [first, last]) = full(["first", "last"]).await;
    let own = flights.client_executes(key("own"));
    assert!(is_asked(&last));
    last.goes_on(true);
    assert_eq!(flights.counts().running, 2);
    let _other = flights.client_executes(key("other"));
    assert!(!is_asked(&first));
    // Even there something does if a client is queued all the same.
    own.is_still_queued();
    assert!(is_asked(&first));

    let (flights, [first, last]) = full(["first", "last"]).await;
    first.leave_to_priorities();
    let _own = flights.client_executes(key("own"));
    assert!(!is_asked(&first) && !is_asked(&last));
}

#[tokio::test]
async fn what_nobody_wants_any_more_does_not_start_again() {
    let flights = Flights::new(1);
    let owner = queue_for(&flights, &[("withdrawn", 2)]);
    let mut departure = departing(&flights).await.unwrap();
    flights.withdraw(&key("withdrawn"), &owner);
    let _own = [
        flights.client_executes(key("b")),
        flights.client_executes(key("c")),
    ];
    assert!(is_asked(&departure) && !departure.give_way());
    departure.end(Ending::Abandoned, Duration::ZERO);
    assert!(!flights.is_in_flight(&key("withdrawn")));
    let counts = flights.counts();
    assert_eq!((counts.running, counts.gave_way), (0, 0));
}

#[tokio::test]
async fn what_runs_is_named_longest_first_with_who_waits_for_it() {
    let flights = Flights::new(2);
    queue(&flights, &[("a", 3), ("b", 2), ("c", 1)]);
    let a = departing(&flights).await.unwrap();
    let _b = departing(&flights).await.unwrap();
    let _stage = flights.join(&key("b")).unwrap();
    let named = |most| {
        let mut running = flights.running(most);
        running.sort_by_key(|flight| flight.wanted);
        let name = |flight: &RunningFlight| (flight.action.clone(), flight.wanted);
        running.iter().map(name).collect::<Vec<_>>()
    };
    let digest = |name| key(name).action.to_string();
    assert_eq!(named(9), [(digest("a"), false), (digest("b"), true)]);
    assert_eq!(named(1).len(), 1);
    a.end(Ending::Failed, Duration::ZERO);
    assert_eq!(named(9), [(digest("b"), true)]);
}

#[tokio::test]
async fn a_dropped_departure_abandons_its_flight() {
    let flights = Flights::new(1);
    queue(&flights, &[("a", 1)]);
    let departure = departing(&flights).await.unwrap();
    let mut stage = flights.join(&key("a")).unwrap();
    drop(departure);
    assert!(matches!(ending(&mut stage).await, Ending::Abandoned));
    assert_eq!(flights.counts().running, 0);
}

#[tokio::test]
async fn a_dropped_announcement_abandons_its_flight() {
    let flights = Flights::new(1);
    let announced = flights.announce(key("a"), &owner()).unwrap();
    let mut stage = flights.join(&key("a")).unwrap();
    drop(announced);
    assert!(matches!(ending(&mut stage).await, Ending::Abandoned));
    assert_eq!(flights.counts().queued, 0);
}

/// One owner for all of `names`.
fn queue_for(flights: &Arc<Flights>, names: &[(&str, u64)]) -> mpsc::Sender<Landing> {
    let owner = owner();
    for (name, seconds) in names {
        let announced = flights.announce(key(name), &owner).unwrap();
        announced.submit(urgency(*seconds));
    }
    owner
}

#[tokio::test]
async fn withdrawing_stops_what_is_queued_and_leaves_what_runs() {
    let flights = Flights::new(1);
    let owner = queue_for(&flights, &[("runs", 2), ("waits", 1)]);
    let runs = departing(&flights).await.unwrap();
    flights.withdraw(&key("waits"), &owner);
    flights.withdraw(&key("runs"), &owner);
    assert!(!runs.cancelled().is_cancelled());
    assert!(flights.join(&key("waits")).is_none());
    assert!(flights.join(&key("runs")).is_some());
    runs.end(Ending::Failed, Duration::ZERO);
    assert!(flights.has_failed(&key("runs")));
    drop(flights.client_executes(key("runs")));
    assert!(!flights.has_failed(&key("runs")));
    assert!(departing(&flights).await.is_none());
}

#[tokio::test]
async fn what_is_superseded_is_cancelled_and_no_client_joins_it_any_more() {
    let flights = Flights::new(1);
    let owner = queue_for(&flights, &[("runs", 2), ("waits", 1)]);
    let runs = departing(&flights).await.unwrap();
    flights.supersede(&key("waits"), &owner);
    flights.supersede(&key("runs"), &owner);
    assert!(runs.cancelled().is_cancelled());
    assert!(flights.join(&key("runs")).is_none());
    assert!(!flights.is_expected(&key("runs")));
    runs.end(Ending::Abandoned, Duration::ZERO);
    let counts = flights.counts();
    assert_eq!((counts.cancelled, counts.failed), (1, 0));
    let reason = flights.record(&key("runs")).unwrap().flown().reason;
    assert_eq!(reason.as_deref(), Some(SUPERSEDED));
}

#[tokio::test]
async fn what_a_client_or_another_owner_waits_for_is_not_cancelled() {
    let flights = Flights::new(3);
    let one = queue_for(&flights, &[("joined", 2), ("shared", 1)]);
    let joined = departing(&flights).await.unwrap();
    let shared = departing(&flights).await.unwrap();
    let _stage = flights.join(&key("joined")).unwrap();
    let other = owner();
    assert!(flights.announce(key("shared"), &other).is_none());
    flights.supersede(&key("joined"), &one);
    flights.supersede(&key("shared"), &one);
    assert!(!joined.cancelled().is_cancelled() && !shared.cancelled().is_cancelled());
    flights.supersede(&key("shared"), &other);
    assert!(shared.cancelled().is_cancelled());
}

#[tokio::test]
async fn the_record_of_a_flight_outlives_it_and_says_why_it_ended() {
    let flights = Flights::new(1);
    let all = queue_for(&flights, &[("runs", 2), ("waits", 1)]);
    let course = |name: &str| flights.record(&key(name)).unwrap().flown();
    let runs = departing(&flights).await.unwrap();
    assert_eq!(course("runs").course, Course::Running);
    assert_eq!(course("waits").course, Course::Queued);
    flights.withdraw(&key("waits"), &all);
    assert_eq!(course("waits").course, Course::Abandoned);
    assert_eq!(course("waits").reason.as_deref(), Some(SUPERSEDED));
    runs.end(Ending::Succeeded(Bytes::new()), Duration::from_secs(2));
    let flown = course("runs");
    assert_eq!(
        (flown.course, flown.execution),
        (Course::Primed, Duration::from_secs(2))
    );
    let ended = flown.ended_unix_ms.unwrap();
    let record = flights.record(&key("runs")).unwrap();
    assert_eq!(record.used(ended + 30), Duration::from_millis(30));
    record.used(ended + 50);
    assert_eq!(
        course("runs").used_unix_ms,
        Some(ended + 30),
        "the first use counts"
    );
    let dropped = flights.announce(key("dropped"), &owner()).unwrap();
    dropped.because("its inputs could not be uploaded");
    drop(dropped);
    let reason = course("dropped").reason;
    assert_eq!(reason.as_deref(), Some("its inputs could not be uploaded"));
}
