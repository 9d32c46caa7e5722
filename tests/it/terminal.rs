//! What `primed run` shows in a terminal: a real pseudo-terminal with a shell in it, seen as a
//! terminal emulator shows it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use vt100::Parser;

use crate::support::{Casd, PATIENCE, Primed, scratch};

const ROWS: u16 = 12;
const COLUMNS: u16 = 76;

/// A terminal in which `bash` waits for commands.
struct Terminal {
    shell: Child,
    output: Receiver<Vec<u8>>,
    screen: Parser,
    _casd: Casd,
    primed: Primed,
    /// The last to go.
    _home: tempfile::TempDir,
}

impl Terminal {
    fn open() -> Self {
        let home = scratch();
        let casd = Casd::start(home.path(), 1);
        let primed = Primed::start(home.path(), &casd.address());
        let mut command = Command::new("script");
        let own = Primed::command();
        for (name, value) in own.get_envs() {
            if value.is_none() {
                command.env_remove(name);
            }
        }
        let shell = format!(
            "stty rows {ROWS} cols {COLUMNS}; exec env PS1='$ ' bash --norc --noprofile -i"
        );
        let mut shell = command
            .args(["--quiet", "--flush", "--command", &shell, "/dev/null"])
            .current_dir(home.path())
            .env("TERM", "xterm")
            .env("SHELL", "/bin/bash")
            .env("HOME", home.path())
            .env("P", own.get_program())
            .env(
                "PRIMED_ADMIN",
                format!("unix:{}/admin.sock", home.path().display()),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = shell.stdout.take().unwrap();
        let (sender, output) = sync_channel(1024);
        std::thread::Builder::new()
            .spawn(move || {
                let mut piece = [0; 4096];
                while let Ok(size @ 1..) = stdout.read(&mut piece) {
                    if sender.send(piece[..size].to_vec()).is_err() {
                        break;
                    }
                }
            })
            .unwrap();
        let mut terminal = Terminal {
            shell,
            output,
            screen: Parser::new(ROWS.try_into().unwrap(), COLUMNS.try_into().unwrap(), 0),
            _home: home,
            _casd: casd,
            primed,
        };
        terminal.wait_for("the shell is ready", |lines| {
            lines.iter().any(|line| line == "$")
        });
        terminal
    }

    fn type_in(&mut self, keys: &str) {
        let stdin = self.shell.stdin.as_mut().unwrap();
        stdin.write_all(keys.as_bytes()).unwrap();
        stdin.flush().unwrap();
    }

    fn lines(&self) -> Vec<String> {
        let lines = self.screen.screen().rows(0, COLUMNS);
        lines.map(|line| line.trim_end().to_owned()).collect()
    }

    /// Waits until the screen is like this; shows it if it never is.
    fn wait_for(&mut self, what: &str, holds: impl Fn(&[String]) -> bool) {
        let deadline = std::time::Instant::now() + PATIENCE;
        while !holds(&self.lines()) {
            match self.output.recv_timeout(Duration::from_millis(100)) {
                Ok(piece) => self.screen.process(&piece),
                Err(_) if std::time::Instant::now() < deadline => {}
                Err(error) => panic!("{what}: {error}; on screen:\n{}", self.lines().join("\n")),
            }
        }
        if std::env::var_os("SHOW_SCREENS").is_some() {
            eprintln!("--- {what}\n{}", self.lines().join("\n"));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // The end of its input ends the shell.
        drop(self.shell.stdin.take());
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

/// What bash does until a signal comes for which there is a trap. One that comes just before it begins
/// to read is heeded when it has read, so it does not read for long.
const HEEDFUL: &str = "echo begun; while :; do read -t 1 go; done";

fn has_live_line(lines: &[String]) -> bool {
    lines
        .last()
        .is_some_and(|line| line.starts_with("primed: 0 primed, 0 hit"))
}

fn shows(lines: &[String], text: &str) -> bool {
    lines.iter().any(|line| line == text)
}

#[test]
fn the_live_line_stays_below_what_the_command_writes_and_leaves_no_trace() {
    let mut terminal = Terminal::open();
    let typed = "$P run -- sh -c 'echo begun; read go; seq 30; read go; echo done; exit 3'";
    terminal.type_in(&format!("{typed}\n"));
    terminal.wait_for("the live line is there", |lines| {
        shows(lines, "begun") && has_live_line(lines)
    });
    terminal.type_in("go\n");
    terminal.wait_for("output scrolls above the line", |lines| {
        lines[usize::from(ROWS) - 3] == "30" && has_live_line(lines)
    });
    let lines = terminal.lines();
    let numbers: Vec<&str> = lines[..usize::from(ROWS) - 2]
        .iter()
        .map(String::as_str)
        .collect();
    let expected: Vec<String> = (21..=30).map(|number| number.to_string()).collect();
    assert_eq!(numbers, expected, "none is lost or doubled");
    terminal.type_in("go\n");
    terminal.wait_for("the line is gone", |lines| {
        shows(lines, "done")
            && lines
                .iter()
                .any(|line| line.contains("asked for no action"))
    });
    terminal.type_in("echo code $?; seq 100 130\n");
    terminal.wait_for("the terminal scrolls as a whole again", |lines| {
        lines.last().is_some_and(|line| line == "$") && lines[usize::from(ROWS) - 2] == "130"
    });
    let text = terminal.lines().join("\n");
    assert!(!text.contains("primed:"), "{text}");
}

#[test]
fn a_run_that_is_stopped_gives_the_terminal_back_until_it_goes_on() {
    let mut terminal = Terminal::open();
    terminal.type_in("$P run --quiet -- true; echo quiet $?\n");
    terminal.wait_for("a quiet run says nothing", |lines| shows(lines, "quiet 0"));
    terminal.type_in("clear; $P run -- sh -c 'echo begun; read go; echo went on'\n");
    terminal.wait_for("the live line is there", has_live_line);
    terminal.type_in("\x1a");
    terminal.wait_for("the shell has the terminal", |lines| {
        lines.iter().any(|line| line.contains("Stopped")) && !has_live_line(lines)
    });
    terminal.type_in("echo meanwhile; fg\n");
    terminal.wait_for("the live line is there again", |lines| {
        shows(lines, "meanwhile") && has_live_line(lines)
    });
    terminal.type_in("go\n");
    terminal.wait_for("the command has ended", |lines| {
        shows(lines, "went on") && !has_live_line(lines)
    });
}

#[test]
fn a_command_that_is_told_to_stop_has_the_terminal_until_it_does() {
    let mut terminal = Terminal::open();
    let script = format!(
        "trap \"echo; echo tidying; read last; echo last \\$last; kill -STOP \\$\\$\" TSTP; {HEEDFUL}"
    );
    terminal.type_in(&format!("clear; $P run -- bash -c '{script}'\n"));
    terminal.wait_for("the live line is there", |lines| {
        shows(lines, "begun") && has_live_line(lines)
    });
    terminal.type_in("\x1a");
    terminal.wait_for("the command tidies up", |lines| shows(lines, "tidying"));
    terminal.type_in("words\n");
    terminal.wait_for(
        "it has read them, and the shell has the terminal",
        |lines| {
            shows(lines, "last words")
                && lines.iter().any(|line| line.contains("Stopped"))
                && !has_live_line(lines)
        },
    );
}

#[test]
fn an_interrupt_ends_the_command_once_and_the_terminal_is_as_before() {
    let mut terminal = Terminal::open();
    let script = format!("trap \"echo interrupted; exit 5\" INT; {HEEDFUL}");
    terminal.type_in(&format!("clear; $P run -- bash -c '{script}'\n"));
    terminal.wait_for("the live line is there", |lines| {
        shows(lines, "begun") && has_live_line(lines)
    });
    terminal.type_in("\x03");
    terminal.wait_for("the command has ended", |lines| {
        lines.iter().any(|line| line.ends_with("interrupted")) && !has_live_line(lines)
    });
    terminal.type_in("echo code $?\n");
    terminal.wait_for("its exit code is the command's", |lines| {
        shows(lines, "code 5")
    });
    let text = terminal.lines().join("\n");
    assert_eq!(text.matches("interrupted").count(), 1, "{text}");
    assert!(terminal.primed.daemon.is_running());
}
