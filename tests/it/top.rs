//! `primed top` on a real terminal: a pseudo-terminal, whose screen a terminal emulator keeps.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

use crate::journals::{self, Pages};
use crate::support::{Casd, Primed, scratch, wait_until};

/// A command on a terminal of its own.
struct Terminal {
    child: Child,
    keyboard: File,
    pty: OwnedFd,
    /// Kept open, so that how the terminal was left can be seen.
    line: File,
    screen: Arc<Mutex<vt100::Parser>>,
}

impl Terminal {
    /// Starts `primed top` for the primed at `admin`.
    fn top(admin: &str, rows: u16, columns: u16) -> Self {
        let pty = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&pty).unwrap();
        unlockpt(&pty).unwrap();
        let name = ptsname(&pty, Vec::new()).unwrap().into_string().unwrap();
        let line = File::options().read(true).write(true).open(name).unwrap();
        let stdio = || Stdio::from(line.try_clone().unwrap());
        resize(&pty, rows, columns);
        let primed = Primed::command();
        let mut command = Command::new("setsid");
        for (name, value) in primed.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        // The terminal is its own, so that the kernel tells it of another size.
        let child = command
            .args(["--ctty", "--wait"])
            .arg(primed.get_program())
            .args(["top", "--admin", admin])
            .env("TERM", "xterm-256color")
            .env_remove("NO_COLOR")
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .unwrap();
        let screen = Arc::new(Mutex::new(vt100::Parser::new(
            cells(rows),
            cells(columns),
            0,
        )));
        let mut output = File::from(pty.try_clone().unwrap());
        let shown = screen.clone();
        std::thread::Builder::new()
            .spawn(move || {
                let mut bytes = [0; 65536];
                while let Ok(count @ 1..) = output.read(&mut bytes) {
                    shown.lock().process(&bytes[..count]);
                }
            })
            .unwrap();
        Terminal {
            child,
            keyboard: File::from(pty.try_clone().unwrap()),
            pty,
            line,
            screen,
        }
    }

    fn text(&self) -> String {
        self.screen.lock().screen().contents()
    }

    fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    fn shows(&self, wanted: &str) {
        self.until(wanted, |text| text.contains(wanted));
    }

    fn until(&self, what: &str, holds: impl Fn(&str) -> bool) {
        wait_until(&format!("the screen shows {what}"), || holds(&self.text()));
    }

    fn resize(&self, rows: u16, columns: u16) {
        let mut screen = self.screen.lock();
        screen.screen_mut().set_size(cells(rows), cells(columns));
        drop(screen);
        resize(&self.pty, rows, columns);
    }

    /// Waits for its end, and that it leaves the terminal as it found it.
    fn ends(&mut self) {
        wait_until("top ends", || self.child.try_wait().unwrap().is_some());
        assert!(self.child.wait().unwrap().success());
        self.is_restored();
    }

    fn is_restored(&self) {
        let modes = tcgetattr(&self.line).unwrap().local_modes;
        assert!(
            modes.contains(rustix::termios::LocalModes::ECHO | rustix::termios::LocalModes::ICANON)
        );
        wait_until("the terminal is as it was", || {
            let screen = self.screen.lock();
            !screen.screen().alternate_screen() && !screen.screen().hide_cursor()
        });
    }

    /// Keeps what is seen where `PRIMED_SCREENSHOTS` says, for people to look at.
    fn keep(&self, name: &str) {
        if let Some(directory) = std::env::var_os("PRIMED_SCREENSHOTS") {
            std::fs::write(Path::new(&directory).join(name), self.text() + "\n").unwrap();
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the screen\n{}", self.text());
        }
    }
}

fn cells(number: u16) -> NonZero<u16> {
    NonZero::new(number).unwrap()
}

fn resize(pty: &OwnedFd, rows: u16, columns: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(pty, size).unwrap();
}

const ENTER: &str = "\r";
const ESCAPE: &str = "\x1b";
const DOWN: &str = "\x1b[B";
const END: &str = "\x1b[F";

#[test]
fn it_shows_what_runs_and_a_builds_actions_and_leaves_the_terminal_as_it_was() {
    let directory = scratch();
    let build = journals::build(10_000);
    let pages = Pages::of(&directory.path().join("admin.sock"), &build, true);
    let mut top = Terminal::top(&pages.address(), 24, 100);
    top.shows("make in /home/ada/src/engine");
    top.shows("3 running, 17 queued, 210 completed, 2 failed, 1 unadaptable");
    top.shows("build/src/module000/unit00001.o  a client waits");
    top.shows(&build["hit"].to_string());
    top.keep("top.txt");

    top.press("?");
    top.shows("left to the client");
    top.keep("top-help.txt");
    top.press("?");
    top.press(ENTER);
    top.shows("build/src/module000/unit00000.o");
    top.shows("executed");
    top.press(DOWN);
    top.keep("top-actions.txt");
    top.press(END);
    top.shows("build/tests/test0199.o");
    top.press(ESCAPE);
    top.until("builds again", |text| text.contains(" builds "));

    top.resize(10, 46);
    top.until("the end of the label in a narrow window", |text| {
        text.contains("missed") && !text.contains("joined") && text.contains("engine")
    });
    top.keep("top-narrow.txt");
    top.resize(2, 8);
    top.resize(40, 160);
    top.shows("saved");
    top.keep("top-wide.txt");
    top.press("q");
    top.ends();
}

#[test]
fn it_says_when_primed_is_gone_and_goes_on_when_it_is_back() {
    let directory = scratch();
    let socket = directory.path().join("admin.sock");
    let build = journals::build(50);
    let pages = Pages::of(&socket, &build, false);
    let mut top = Terminal::top(&pages.address(), 24, 100);
    top.shows("make in /home/ada/src/engine");
    drop(pages);
    top.shows("primed has not answered for");
    top.shows("make in /home/ada/src/engine");
    top.keep("top-lost.txt");
    let _pages = Pages::of(&socket, &journals::build(77), false);
    top.until("the new figures", |text| {
        text.contains(" 77 ") && !text.contains("has not answered")
    });
    top.press("\x03");
    top.ends();
}

#[test]
fn a_signal_ends_it_in_good_order() {
    let directory = scratch();
    let pages = Pages::of(
        &directory.path().join("admin.sock"),
        &journals::build(5),
        false,
    );
    let mut top = Terminal::top(&pages.address(), 24, 80);
    top.shows("make in /home/ada/src/engine");
    // What setsid runs; setsid itself waits for it.
    let children = format!("/proc/{0}/task/{0}/children", top.child.id());
    let children = std::fs::read_to_string(children).unwrap();
    let pid = match children.trim() {
        "" => top.child.id() as i32,
        pid => pid.parse().unwrap(),
    };
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    top.ends();
}

#[test]
fn without_a_terminal_it_prints_how_things_stand_and_without_a_primed_it_says_so() {
    let directory = scratch();
    let casd = Casd::start(directory.path(), 1);
    let primed = Primed::start(directory.path(), &casd.address());
    let output = primed.ask(&["top"]);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("speculation  0 queued, 0 running"), "{said}");
    assert!(!said.contains('\x1b'), "{said}");
    let speculation = &primed.status()["speculation"];
    assert!(speculation["slots"].as_u64().unwrap() > 0);
    assert_eq!(speculation["flights"].as_array().unwrap().len(), 0);

    let nowhere = format!("unix:{}/nowhere.sock", directory.path().display());
    let output = Primed::command()
        .args(["top", "--admin", &nowhere])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("no primed answers at") && said.contains("primed serve"),
        "{said}"
    );
}
