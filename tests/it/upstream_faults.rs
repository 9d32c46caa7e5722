//! What breaks behind primed: an upstream that is down, dies, says farewell, falls silent or is
//! slow costs a build no more than it would cost it without primed, and often less.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use serde_json::json;

use crate::grpcio::{AnyServer, Grpcio, Session, hex};
use crate::project::{Outcome, Project};
use crate::relay::{Farewell, Faults, Relay};
use crate::stage::{JOBS, Stage, UNITS};
use crate::support::{Casd, Primed, scratch, wait_until};

const GET_CAPABILITIES: &str = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities";

/// Finds a silent connection within some seconds.
const WATCHFUL: &[&str] = &["--keep-alive", "1"];

#[test]
fn a_build_without_an_upstream_ends_as_it_does_without_a_server() {
    let end_without_casd = |mut stage: Stage| {
        stage.casd.daemon.kill();
        std::fs::remove_file(stage.casd.socket()).unwrap();
        let build = stage.project.begin();
        stage.end(build)
    };
    let direct = end_without_casd(Stage::direct());
    assert_eq!(end_without_casd(Stage::primed()), direct);
}

#[test]
fn a_build_waits_for_an_upstream_that_comes_in_time() {
    let scratch = scratch();
    let upstream = format!("unix:{}/casd.sock", scratch.path().display());
    let primed = Primed::start_with(scratch.path(), &upstream, &["--connect-wait", "60"]);
    let project = Project::of_units(scratch.path(), &primed.address(), UNITS);
    let mut build = project.begin();
    wait_until("primed has looked for the upstream", || {
        primed.status()["upstream"]["state"] == "unavailable"
    });
    assert!(build.is_running(), "it did not wait: {}", build.log());
    let _casd = Casd::start(scratch.path(), JOBS);
    assert_eq!(build.exit_code(), Some(0), "{}", build.log());
}

#[test]
fn a_call_waits_for_an_upstream_no_longer_than_it_was_told_to() {
    let scratch = scratch();
    let upstream = format!("unix:{}/server.sock", scratch.path().display());
    let primed = Primed::start_with(scratch.path(), &upstream, &["--connect-wait", "1"]);
    let mut session = Session::start(Grpcio::New, &primed.address());
    let refused = session.call("/some.Service/Echo", b"hello");
    assert_eq!(refused.code, "UNAVAILABLE", "{refused:?}");
    assert!(refused.details.contains(&upstream), "{refused:?}");
}

#[test]
fn capabilities_that_were_once_known_are_told_without_the_upstream_and_after_a_restart() {
    let scratch = scratch();
    let mut casd = Casd::start(scratch.path(), 1);
    let primed = Primed::start(scratch.path(), &casd.address());
    let mut session = Session::start(Grpcio::New, &primed.address());
    let known = session.call(GET_CAPABILITIES, b"");
    assert_eq!(known.code, "OK", "{known:?}");

    casd.daemon.kill();
    let mut told = session.call(GET_CAPABILITIES, b"");
    assert_eq!(
        (&told.code, &told.messages),
        (&known.code, &known.messages),
        "{told:?}"
    );

    let primed = primed.restart(&casd.address());
    let mut session = Session::start(Grpcio::Old, &primed.address());
    told = session.call(GET_CAPABILITIES, b"");
    assert_eq!(
        (&told.code, &told.messages),
        (&known.code, &known.messages),
        "{told:?}"
    );
    let refused = session.call("/some.Service/Echo", b"hello");
    assert_eq!(refused.code, "UNAVAILABLE", "{refused:?}");
    assert!(refused.details.contains(&casd.address()), "{refused:?}");
}

#[test]
fn capabilities_that_were_never_known_are_unavailable_without_the_upstream() {
    let scratch = scratch();
    let upstream = format!("unix:{}/casd.sock", scratch.path().display());
    let primed = Primed::start(scratch.path(), &upstream);
    let mut session = Session::start(Grpcio::New, &primed.address());
    let refused = session.call(GET_CAPABILITIES, b"");
    assert_eq!(refused.code, "UNAVAILABLE", "{refused:?}");
}

/// buildbox-casd asks its remote for its capabilities before it listens, and gives up after about
/// ten seconds.
#[test]
fn a_casd_in_front_of_primed_starts_without_an_upstream_and_builds_when_there_is_one() {
    let mut stage = Stage::primed();
    let front = stage.path().join("front");
    std::fs::create_dir(&front).unwrap();
    let address = stage.primed.as_ref().unwrap().address();
    drop(Casd::proxy_of(&front, &address));

    stage.casd.daemon.kill();
    std::fs::remove_file(front.join("casd.sock")).unwrap();
    let proxy = Casd::proxy_of(&front, &address);
    stage.restart_casd();
    stage.project = Project::of_units(stage.path(), &proxy.address(), UNITS);
    stage.finish();
}

#[test]
fn an_upstream_that_is_killed_in_mid_build_costs_what_it_costs_without_primed() {
    let end_with_casd_killed = |mut stage: Stage| {
        let build = stage.begin();
        stage.casd.daemon.kill();
        let outcome = stage.end(build);
        stage.restart_casd();
        stage.finish();
        outcome
    };
    let direct = end_with_casd_killed(Stage::direct());
    assert_eq!(end_with_casd_killed(Stage::primed()), direct);
}

/// recc waits on for an operation whose name it knows, which a casd that was started again does
/// not: then, as without primed, the build fails, and for no other reason.
#[test]
fn a_patient_build_loses_nothing_by_the_death_of_the_upstream_but_what_casd_forgot() {
    let mut stage = Stage::primed().patient();
    let build = stage.begin();
    stage.restart_casd();
    let outcome = stage.end(build);
    let log = stage.project.log();
    let mut errors = log.lines().filter(|line| line.contains("[ERROR]"));
    assert!(
        errors.all(|error| error.contains("5: The operation was not found")),
        "{log}"
    );
    let failed = log.contains("[ERROR]");
    assert_eq!(matches!(outcome, Outcome::Failed(_)), failed, "{log}");
    stage.finish();
}

#[test]
fn a_patient_build_survives_a_broken_connection() {
    let mut stage = Stage::wired(Faults::default(), &[]).patient();
    let build = stage.begin();
    stage.relay().cut();
    stage.end_well(build);
}

#[test]
fn connections_that_a_server_ends_after_some_calls_are_not_noticed_by_a_build() {
    unnoticed(Farewell::Announced(11));
}

#[test]
fn calls_that_a_server_did_not_take_before_it_ended_a_connection_are_made_again() {
    unnoticed(Farewell::Refusing(11));
}

/// A build whose server ends each connection after so many calls: two of recc's actions or so.
fn unnoticed(farewell: Farewell) {
    let faults = Faults {
        farewell: Some(farewell),
        ..Faults::default()
    };
    let mut stage = Stage::wired(faults, &[]);
    stage.finish();
    let farewells = stage.relay().farewells();
    assert!(farewells > 4, "{farewells} are not many");
    wait_until("connections without calls are closed", || {
        stage.relay().open() < farewells
    });
    let log = stage.project.log();
    assert!(!log.contains("[ERROR]"), "{log}");
}

#[test]
fn a_call_goes_on_when_its_connection_is_told_farewell_and_the_next_has_a_new_one() {
    let scratch = scratch();
    let server = AnyServer::start(scratch.path(), Grpcio::New);
    let relay = Relay::start(server.socket(), Faults::default());
    let primed = Primed::start(scratch.path(), relay.address());
    let mut held = Session::start(Grpcio::New, &primed.address());
    held.hold("/some.Service/Greet");
    assert_eq!(held.message(), hex(b"welcome"));
    let before = relay.accepted();
    relay.go_away();
    wait_until("the server has said farewell", || {
        relay.farewells() == before
    });
    let mut other = Session::start(Grpcio::Old, &primed.address());
    for number in 0..8 {
        let ended = other.call("/some.Service/Echo", b"hello");
        assert_eq!(ended.code, "OK", "call {number}: {ended:?}");
    }
    assert!(relay.accepted() > before);
    held.release();
    let ended = held.ended();
    assert_eq!(ended.code, "OK", "{ended:?}");
}

#[test]
fn a_connection_that_has_become_a_black_hole_is_found_and_replaced() {
    let scratch = scratch();
    let server = AnyServer::start(scratch.path(), Grpcio::New);
    let relay = Relay::start(server.socket(), Faults::default());
    let primed = Primed::start_with(scratch.path(), relay.address(), WATCHFUL);
    let mut session = Session::start(Grpcio::New, &primed.address());
    session.hold("/some.Service/Greet");
    assert_eq!(session.message(), hex(b"welcome"));
    relay.stall();
    let lost = session.ended();
    assert_eq!(lost.code, "UNAVAILABLE", "{lost:?}");
    // Whether a connection is a black hole shows when it is used.
    wait_until("calls are served again", || {
        let ended = session.call("/some.Service/Echo", b"hello");
        assert!(["OK", "UNAVAILABLE"].contains(&&*ended.code), "{ended:?}");
        ended.code == "OK"
    });
}

#[test]
fn a_build_over_connections_that_became_black_holes_ends_and_a_patient_one_comes_through() {
    // Directly it would wait for ever: recc sends no pings unless it is told to.
    let mut stage = Stage::wired(Faults::default(), WATCHFUL);
    let build = stage.begin();
    stage.relay().stall();
    stage.end(build);

    let mut stage = Stage::wired(Faults::default(), WATCHFUL).patient();
    let build = stage.begin();
    stage.relay().stall();
    stage.end_well(build);
    // What primed does of itself hangs no more than the build did.
    stage.primed.as_ref().unwrap().wait();
}

/// gRPC's C core says farewell (too_many_pings) to a client that pings often without sending data.
#[test]
fn a_server_does_not_punish_the_watch_over_a_long_silent_call() {
    let scratch = scratch();
    let server = AnyServer::start(scratch.path(), Grpcio::New);
    let relay = Relay::start(server.socket(), Faults::default());
    let primed = Primed::start_with(scratch.path(), relay.address(), WATCHFUL);
    let mut session = Session::start(Grpcio::New, &primed.address());
    // Its deadline is the only end that it has: eight times as long as a connection may be silent.
    session.begin(&json!({
        "method": "/some.Service/Linger", "requests": [hex(b"0")], "timeout": 8
    }));
    let ended = session.ended();
    assert_eq!(ended.code, "DEADLINE_EXCEEDED", "{ended:?}");
    let pings = relay.pings();
    assert!((1..=2).contains(&pings), "{pings} pings");
    assert_eq!(session.call("/some.Service/Echo", b"hello").code, "OK");
}

#[test]
fn a_slow_upstream_makes_a_build_slow_and_nothing_else() {
    let faults = Faults {
        rate: Some(48 * 1024),
        ..Faults::default()
    };
    // Answers that take long to arrive are no silence.
    let mut stage = Stage::wired(faults, WATCHFUL);
    stage.finish();
    let log = stage.project.log();
    assert!(!log.contains("[ERROR]"), "{log}");
}
