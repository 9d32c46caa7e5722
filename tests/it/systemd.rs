//! The units in `systemd/`: systemd itself finds nothing wrong with them, and a client's first call
//! starts primed through a socket of the service manager, which hears that it is ready and well.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;

use crate::support::{Casd, Daemon, PATIENCE, Primed, scratch, tool, tools, wait_until};

/// One of systemd's stand-alone tools: the machine's own, or what `scripts/tools` installed.
fn systemd(name: &str) -> PathBuf {
    let installed = tools().join("systemd/bin").join(name);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|directory| directory.join(name));
    let found = std::iter::once(installed)
        .chain(found)
        .find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "there is no {name}: run `scripts/tools systemd` first, or `scripts/test`, which does"
        )
    })
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units_as_installed() {
    let scratch = scratch();
    let home = scratch.path();
    std::fs::create_dir(home.join("run")).unwrap();
    let path = std::env::var("PATH").unwrap();
    let path = format!("{}:{path}", tools().join("bin").display());
    let mut install = Primed::command();
    install
        .args(["install", "--with-casd", "--upstream", "unix:/unused"])
        .env("HOME", home)
        .env("XDG_RUNTIME_DIR", home.join("run"))
        .env("XDG_CONFIG_HOME", home.join("config"))
        .env("XDG_DATA_HOME", home.join("data"))
        .env("PATH", path);
    let output = install.output().unwrap();
    let units = home.join("config/systemd/user");
    // There may be no user manager here to enable them with.
    assert!(units.join("primed.service").exists(), "{output:?}");
    let output = Command::new(systemd("systemd-analyze"))
        .args(["--user", "--man=no", "verify"])
        .args(
            ["primed.socket", "primed.service", "buildbox-casd.service"]
                .map(|unit| units.join(unit)),
        )
        .env("HOME", home)
        .env("XDG_RUNTIME_DIR", home.join("run"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let about_ours = said
        .lines()
        .filter(|line| line.contains("primed") || line.contains("buildbox"));
    assert_eq!(about_ours.collect::<Vec<_>>(), Vec::<&str>::new(), "{said}");
    assert!(output.status.success(), "{said}");
}

/// What the service manager was told, one message after the other.
fn next_word(manager: &UnixDatagram) -> String {
    let mut word = [0; 256];
    let length = manager
        .recv(&mut word)
        .expect("a word for the service manager");
    String::from_utf8_lossy(&word[..length]).trim().to_owned()
}

fn compile(directory: &Path, address: &str) {
    let status = Command::new(tool("recc"))
        .args(["gcc", "-c", "one.c", "-o", "one.o"])
        .current_dir(directory)
        .env("RECC_SERVER", address)
        .env("RECC_PROJECT_ROOT", directory)
        .env("HOME", directory)
        .output()
        .unwrap();
    assert!(status.status.success(), "{status:?}");
}

#[test]
fn a_compile_starts_primed_through_its_socket_and_the_service_manager_hears_of_it() {
    let scratch = scratch();
    let at = scratch.path();
    let casd = Casd::start(at, 1);
    let project = at.join("project");
    std::fs::create_dir(&project).unwrap();
    std::fs::write(project.join("one.c"), "int one(void) { return 1; }\n").unwrap();
    let socket = at.join("activated.sock");
    let manager = UnixDatagram::bind(at.join("notify.sock")).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();

    let mut activate = Command::new(systemd("systemd-socket-activate"));
    activate.arg("--listen").arg(&socket);
    for (name, value) in [
        (
            "NOTIFY_SOCKET",
            at.join("notify.sock").display().to_string(),
        ),
        ("WATCHDOG_USEC", "400000".to_owned()),
        ("XDG_RUNTIME_DIR", at.join("run").display().to_string()),
        ("HOME", at.display().to_string()),
        ("PRIMED_CONFIG", "none".to_owned()),
        ("PRIMED_UPSTREAM", casd.address()),
    ] {
        activate.arg(format!("--setenv={name}={value}"));
    }
    activate
        .arg("--")
        .arg(env!("CARGO_BIN_EXE_primed"))
        .arg("serve");
    let mut primed = Daemon::start(&mut activate, at.join("activate.log"));
    wait_until("systemd listens", || {
        assert!(primed.is_running(), "{}", primed.log());
        primed.log().contains("Listening on")
    });
    assert!(
        !at.join("run/primed/admin.sock").exists(),
        "nobody has called yet"
    );

    compile(&project, &format!("unix:{}", socket.display()));
    assert!(project.join("one.o").exists());
    assert_eq!(next_word(&manager), "READY=1");
    // One that is stuck gives no second one.
    for _ in 0..3 {
        assert_eq!(next_word(&manager), "WATCHDOG=1");
    }
    primed.signal(Signal::TERM);
    let last = std::iter::repeat_with(|| next_word(&manager)).find(|word| word != "WATCHDOG=1");
    assert_eq!(last.as_deref(), Some("STOPPING=1"));
    assert_eq!(primed.exit_code(), Some(0), "{}", primed.log());
    assert!(socket.exists(), "it is the service manager's");
}

#[test]
fn a_service_manager_that_wants_no_signs_of_life_gets_none() {
    let scratch = scratch();
    let at = scratch.path();
    let manager = UnixDatagram::bind(at.join("notify.sock")).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut serve = Primed::command();
    serve
        .args(["serve", "--upstream", "unix:/nonexistent/upstream.sock"])
        .env("NOTIFY_SOCKET", at.join("notify.sock"))
        // Another process's.
        .env("WATCHDOG_USEC", "1000")
        .env("WATCHDOG_PID", "1")
        .env("XDG_RUNTIME_DIR", at.join("run"))
        .env("HOME", at);
    let mut primed = Daemon::start(&mut serve, at.join("log"));
    assert_eq!(next_word(&manager), "READY=1");
    let admin = format!("unix:{}", at.join("run/primed/admin.sock").display());
    let wait = Primed::command()
        .args(["wait", "--timeout", "60", "--admin", &admin])
        .status();
    assert!(wait.unwrap().success());
    primed.signal(Signal::TERM);
    assert_eq!(next_word(&manager), "STOPPING=1");
    assert_eq!(primed.exit_code(), Some(0), "{}", primed.log());
}
