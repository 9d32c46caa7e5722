//! primed ends in mid-build, in good order or not: that costs a build what it costs when casd
//! ends, and one that tries again comes through when primed is back.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use rustix::process::Signal;

use crate::project::Outcome;
use crate::stage::Stage;
use crate::support::{Primed, connects, wait_until};

/// Ends the server that recc talks to in mid-build, and the build after it.
fn end_with_server(stage: &mut Stage, signal: Signal) -> Outcome {
    let mut build = stage.begin();
    stage.server().signal(signal);
    stage.server().exit_code();
    stage.project.outcome(&mut build)
}

/// Starts primed again at the same place.
fn start_again(stage: &mut Stage) {
    let socket = stage.primed.take().unwrap().socket();
    assert!(!connects(&socket));
    stage.primed = Some(Primed::start(stage.path(), &stage.casd.address()));
}

#[test]
fn a_build_in_which_primed_is_killed_ends_as_one_in_which_casd_is() {
    let direct = end_with_server(&mut Stage::direct(), Signal::KILL);
    let mut stage = Stage::primed();
    assert_eq!(end_with_server(&mut stage, Signal::KILL), direct);
    assert!(
        stage.primed.as_ref().unwrap().socket().exists(),
        "a stale socket is in the way"
    );
    start_again(&mut stage);
    stage.finish();
}

#[test]
fn a_build_in_which_primed_is_told_to_stop_ends_as_one_in_which_casd_is() {
    let direct = end_with_server(&mut Stage::direct(), Signal::TERM);
    let mut stage = Stage::primed();
    let ours = end_with_server(&mut stage, Signal::TERM);
    let (Outcome::Failed(ours), Outcome::Failed(direct)) = (&ours, &direct) else {
        panic!("{ours:?}, directly {direct:?}");
    };
    // casd may interrupt what it executes, and say so (130); primed executes nothing.
    assert!(
        !ours.is_empty() && ours.is_subset(direct),
        "{ours:?}, directly {direct:?}"
    );
    let daemon = &mut stage.primed.as_mut().unwrap().daemon;
    assert_eq!(daemon.exit_code(), Some(0), "{}", daemon.log());
    assert!(!daemon.log().contains("grace period"), "{}", daemon.log());
    start_again(&mut stage);
    stage.finish();
}

#[test]
fn a_patient_build_survives_that_primed_is_killed_and_started_again() {
    let mut stage = Stage::primed().patient();
    let build = stage.begin();
    stage.server().kill();
    start_again(&mut stage);
    stage.end_well(build);
}

#[test]
fn a_patient_build_survives_that_primed_is_stopped_and_started_again() {
    let mut stage = Stage::primed().patient();
    let build = stage.begin();
    let socket = stage.primed.as_ref().unwrap().socket();
    stage.server().signal(Signal::TERM);
    wait_until("new connections are refused", || !connects(&socket));
    assert_eq!(stage.server().exit_code(), Some(0));
    start_again(&mut stage);
    stage.end_well(build);
}
