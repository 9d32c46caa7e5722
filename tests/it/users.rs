//! Two users of one primed, who work on the same files: what one records is nothing to the other.
//! Real recc, make and buildbox-casd. To be two users, the tests have to be run by root.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;

use crate::project::{FEW, Project};
use crate::support::{Casd, Counts, Primed, scratch};

const UNITS: usize = 8;
/// Every compile and the link.
const ALL: u64 = UNITS as u64 + 2;

const ROOT: u32 = 0;
/// No account is needed to be somebody.
const GUEST: u32 = 64_123;

struct Ground {
    project: Project,
    primed: Primed,
    _casd: Casd,
}

impl Ground {
    fn set(directory: &Path) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "two users are needed, and only root can be both: run the tests as root, or leave \
             this one out with `-- --skip users::`"
        );
        let casd = Casd::start(directory, 4);
        let uids = format!("{ROOT},{GUEST}");
        let primed = Primed::start_with(directory, &casd.address(), &["--allow-uid", &uids]);
        let project = Project::of_units(directory, &primed.address(), UNITS);
        for path in ["", "src", "include"] {
            open_to_all(&project.directory.join(path), 0o777);
        }
        open_to_all(directory, 0o755);
        Ground {
            project,
            primed,
            _casd: casd,
        }
    }

    /// Builds everything anew as this user, with another value in the header that all include.
    fn build_by(&self, uid: u32, common: i64) -> Counts {
        let content = format!("#define COMMON {common}\n");
        self.project.write("include/common.h", &content);
        assert!(self.project.make(&["clean"]).status.success());
        let mut make = self.project.command(&[]);
        make.uid(uid).gid(uid).env("HOME", &self.project.directory);
        // recc gives up at a directory that it may not look into, such as those of root's home.
        make.env("PATH", "/usr/local/bin:/usr/bin:/bin");
        make.env_remove("LD_LIBRARY_PATH");
        let output = make.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let sum = common * UNITS as i64 + FEW as i64;
        assert_eq!(self.project.run(), sum, "user {uid}");
        self.primed.wait();
        Counts::newest(&self.primed.status())
    }

    fn recorded(&self) -> (u64, u64) {
        let records = &self.primed.status()["records"];
        let count = |name: &str| records[name].as_u64().unwrap();
        (count("parents"), count("actions"))
    }
}

fn open_to_all(path: &Path, mode: u32) {
    let permissions = std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(path, permissions).unwrap();
}

#[test]
fn what_one_user_records_is_never_primed_for_another() {
    let scratch = scratch();
    let ground = Ground::set(scratch.path());
    let first = ground.build_by(ROOT, 1);
    assert_eq!((first.asked, first.missed), (ALL, ALL), "{first:?}");
    assert_eq!(ground.recorded(), (1, ALL));

    // The same files in the same place; main.c, which does not include the header, is in the
    // action cache, and that is the backend's.
    let guest = ground.build_by(GUEST, 2);
    let log = ground.primed.daemon.log();
    assert_eq!((guest.asked, guest.cached), (ALL, 1), "{guest:?}\n{log}");
    assert_eq!(
        (guest.missed, guest.primed),
        (ALL - 1, 0),
        "{guest:?}\n{log}"
    );
    assert_eq!(ground.recorded(), (2, 2 * ALL), "{log}");
    assert_eq!(
        ground.primed.status()["speculation"]["completed"],
        0,
        "{log}"
    );

    // Each is primed by what it has recorded itself.
    for (uid, common) in [(GUEST, 3), (ROOT, 4)] {
        let counts = ground.build_by(uid, common);
        let shown = format!("user {uid}: {counts:?}\n{}", ground.primed.daemon.log());
        assert_eq!((counts.missed, counts.cached), (0, 1), "{shown}");
        assert_eq!(counts.hit + counts.joined, ALL - 1, "{shown}");
        assert_eq!(counts.primed, ALL - 1, "{shown}");
    }
    assert_eq!(ground.recorded(), (2, 2 * ALL));
}
