//! The live line: the lowest line of the terminal, below what the command writes.
//!
//! The command writes to the terminal itself, so that nothing stands between the two: not its
//! colours, its questions, or its job control. The terminal is told to scroll all lines but its
//! lowest (DECSTBM), as apt does while it installs; so the line is not overwritten, and what the
//! command has written is not either. Each change is one `write`, which the kernel does not mix
//! with others.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use rustix::termios::{tcgetpgrp, tcgetwinsize};

use super::summary::seconds;
use crate::server::runs::RunPage;

/// With fewer lines, none is to spare.
const MIN_ROWS: u16 = 5;

/// The lowest line of the terminal that stderr is. It is given back when this is dropped.
pub struct LiveLine {
    terminal: File,
    /// Rows and columns for which the terminal has been told to keep a line free.
    kept: Option<(u16, u16)>,
    text: String,
    plain: bool,
}

impl LiveLine {
    /// `None` if stderr is no terminal that can do this.
    pub fn new() -> Option<Self> {
        let stderr = io::stderr();
        let dumb = std::env::var("TERM").is_ok_and(|term| term == "dumb");
        if !stderr.is_terminal() || dumb {
            return None;
        }
        Some(LiveLine {
            terminal: File::from(stderr.as_fd().try_clone_to_owned().ok()?),
            kept: None,
            text: String::new(),
            plain: std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()),
        })
    }

    /// Shows how the run stands.
    pub fn show(&mut self, page: &RunPage) {
        let text = text(page);
        if text != self.text || self.size() != self.kept {
            self.text = text;
            self.redraw();
        }
    }

    /// Shows it again: the terminal may be another by now.
    pub fn redraw(&mut self) {
        if self.text.is_empty() || !self.is_in_foreground() {
            return;
        }
        let Some((rows, columns)) = self.size().filter(|(rows, _)| *rows >= MIN_ROWS) else {
            return self.hide();
        };
        let mut out = String::new();
        if self.kept != Some((rows, columns)) {
            out.push_str(&self.keep_free(rows));
            self.kept = Some((rows, columns));
        }
        let shown: String = self.text.chars().take(usize::from(columns) - 1).collect();
        let (dim, normal) = match self.plain {
            true => ("", ""),
            false => ("\x1b[2m", ""),
        };
        // Cursor saved with its attributes, lowest line, those set to normal, line cleared.
        out.push_str(&format!(
            "\x1b7\x1b[{rows};1H\x1b[0m\x1b[2K{dim}{shown}{normal}\x1b8"
        ));
        self.write(&out);
    }

    /// Has the terminal scroll only what is above its lowest line.
    fn keep_free(&self, rows: u16) -> String {
        let above = rows - 1;
        match self.kept {
            // Makes room below the cursor. DECSTBM moves it to the top, hence saved and restored.
            None => format!("\n\x1b7\x1b[1;{above}r\x1b8\x1b[1A"),
            // Where the line was, there is now something else or nothing: terminals differ in what
            // they do when their size changes. The cursor must not be left on the lowest line.
            Some((before, _)) => {
                let at = before.min(rows);
                format!("\x1b7\x1b[r\x1b[{at};1H\x1b[2K\x1b8\n\x1b7\x1b[1;{above}r\x1b8\x1b[1A")
            }
        }
    }

    /// Gives the line back.
    pub fn hide(&mut self) {
        if let Some((rows, _)) = self.kept.take() {
            self.write(&format!("\x1b7\x1b[r\x1b[{rows};1H\x1b[0m\x1b[2K\x1b8"));
        }
    }

    fn size(&self) -> Option<(u16, u16)> {
        let size = tcgetwinsize(&self.terminal).ok()?;
        Some((size.ws_row, size.ws_col)).filter(|(_, columns)| *columns > 1)
    }

    /// In the background the terminal is another's. One that is not the process's own has none.
    fn is_in_foreground(&self) -> bool {
        tcgetpgrp(&self.terminal).map_or(true, |group| group == rustix::process::getpgrp())
    }

    fn write(&mut self, text: &str) {
        // A terminal that is gone shows nothing.
        let _ = self.terminal.write_all(text.as_bytes());
    }
}

impl Drop for LiveLine {
    fn drop(&mut self) {
        self.hide();
    }
}

/// What stands in the line.
fn text(page: &RunPage) -> String {
    let Some(build) = &page.build else {
        return String::new();
    };
    let counts = &build.counts;
    let mut text = format!(
        "primed: {} primed, {} hit, {} joined, {} missed, saved {}",
        counts.primed,
        counts.hit,
        counts.joined,
        counts.missed,
        seconds(counts.saved_ms)
    );
    if page.queued + page.running > 0 {
        text.push_str(&format!(
            " ({} running ahead, {} queued)",
            page.running, page.queued
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_what_was_primed_and_what_it_was_worth() {
        let mut page = RunPage {
            build: Some(super::super::summary::tests::build()),
            ..RunPage::default()
        };
        let idle = "primed: 38 primed, 36 hit, 1 joined, 1 missed, saved 31.2 s";
        assert_eq!(text(&page), idle);
        (page.queued, page.running) = (3, 4);
        assert_eq!(text(&page), format!("{idle} (4 running ahead, 3 queued)"));
        page.build = None;
        assert_eq!(text(&page), "");
    }
}
