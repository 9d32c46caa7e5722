//! Lookups that never come to primed, because a proxy between answers them. Real recc, make and
//! buildbox-casd.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use crate::project::Project;
use crate::support::{Casd, Counts, Primed, scratch};

const UNITS: usize = 6;

/// recc asks the backend, which sends what it cannot answer back to itself by way of primed. It
/// has executed all that was primed, so it answers most lookups that hit.
#[test]
fn hits_that_a_casd_between_answers_itself_are_counted() {
    let scratch = scratch();
    let path = scratch.path();
    let backend = format!("unix:{}/casd.sock", path.display());
    let primed = Primed::start(path, &backend);
    let serves = ["--local-server-instance=", "--local-server-instance=main"];
    let remotes = ["cas", "ac", "exec"].map(|to| format!("--{to}-remote={}", primed.address()));
    let mut asks = vec!["--proxy-instance=outer:main"];
    asks.extend(remotes.iter().map(String::as_str));
    // It asks for its remote's capabilities before it listens: primed must have heard of them.
    let first = Casd::start_with(path, 4, &serves);
    let asking = path.join("asking");
    std::fs::create_dir(&asking).unwrap();
    drop(Casd::start_with(&asking, 1, &asks));
    drop(first);
    std::fs::remove_file(path.join("casd.sock")).unwrap();
    let casd = Casd::start_with(path, 4, &[&serves[..], &asks].concat());

    let project = Project::of_units(path, &casd.address(), UNITS).with("RECC_INSTANCE", "outer");
    project.build();
    primed.wait();
    for value in 2..=3 {
        project.write("include/common.h", &format!("#define COMMON {value}\n"));
        project.build();
        primed.wait();
        let counts = Counts::newest(&primed.status());
        let shown = format!("{counts:?}\n{}", primed.daemon.log());
        // The units, and the link.
        let changed = UNITS as u64 + 1;
        assert_eq!((counts.primed, counts.missed), (changed, 0), "{shown}");
        assert_eq!(counts.hit + counts.joined, changed, "{shown}");
    }
}
