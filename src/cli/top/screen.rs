//! What `primed top` shows, and what its keys do. Knows nothing of where that comes from.

use std::collections::HashMap;

use ratatui::Frame;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::layout::{Alignment, Constraint, Layout, Margin, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Clear, Paragraph, Row, Table, TableState, Wrap};

use super::source::{Answer, Build, Flight, Seen, Status};
use crate::cli::build_page::{ActionPage, BuildPage};

/// What comes of a key.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    GoOn,
    Quit,
}

/// The state of the screen.
pub struct Screen {
    status: Option<Status>,
    labels: HashMap<String, String>,
    /// Why primed does not answer, and since when, in milliseconds since 1970.
    lost: Option<(String, Option<i64>)>,
    /// The build under the cursor: by its id, for others come before it.
    chosen: Option<String>,
    builds: TableState,
    opened: Option<Opened>,
    help: bool,
    /// How many lines a page key moves.
    page: usize,
}

/// A build that is looked at.
struct Opened {
    id: String,
    page: Option<Result<BuildPage, String>>,
    actions: TableState,
}

const HELP: &str = " up, down, j, k     move
 page up, page down move a screen
 home, end          to the first, to the last
 enter              look at the build's actions
 esc, left          back
 ?                  this help
 q, ctrl-c          quit

 cached  from the action cache, without primed
 hit     by a result that primed brought there
 joined  by an execution that was under way
 missed  left to the client
 lead    how long a result was there before its use";

impl Screen {
    /// An empty one.
    pub fn new() -> Self {
        Screen {
            status: None,
            labels: HashMap::new(),
            lost: None,
            chosen: None,
            builds: TableState::new(),
            opened: None,
            help: false,
            page: 10,
        }
    }

    /// The build that is looked at.
    pub fn opened(&self) -> Option<String> {
        Some(self.opened.as_ref()?.id.clone())
    }

    /// Takes in what primed said.
    pub fn take(&mut self, answer: Answer) {
        match answer {
            Ok(Seen {
                mut status,
                build,
                labels,
            }) => {
                self.lost = None;
                // Both halves stay in their order: newest first.
                status
                    .builds
                    .sort_by_key(|build| build.ended_unix_ms.is_some());
                self.status = Some(status);
                self.labels = labels;
                if let (Some(opened), Some(page)) = (&mut self.opened, build)
                    && page.as_ref().map_or(true, |page| page.id == opened.id)
                {
                    opened.page = Some(page);
                }
            }
            Err(reason) => {
                let since = self.lost.take().and_then(|(_, since)| since);
                self.lost = Some((reason, since));
            }
        }
    }

    /// Does what a key means.
    pub fn press(&mut self, key: KeyEvent) -> Next {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => return Next::Quit,
            KeyCode::Char('q') => return Next::Quit,
            _ if self.help => self.help = false,
            KeyCode::Char('?') => self.help = true,
            KeyCode::Up | KeyCode::Char('k') => self.move_by(-1),
            KeyCode::Down | KeyCode::Char('j') => self.move_by(1),
            KeyCode::PageUp => self.move_by(-self.a_page()),
            KeyCode::PageDown | KeyCode::Char(' ') => self.move_by(self.a_page()),
            KeyCode::Home | KeyCode::Char('g') => self.move_by(isize::MIN),
            KeyCode::End | KeyCode::Char('G') => self.move_by(isize::MAX),
            KeyCode::Enter | KeyCode::Right if self.opened.is_none() => {
                let build = self
                    .builds
                    .selected()
                    .and_then(|at| self.all_builds().get(at));
                self.opened = build.map(|build| Opened {
                    id: build.id.clone(),
                    page: None,
                    actions: TableState::new().with_selected(0),
                });
            }
            KeyCode::Esc | KeyCode::Left | KeyCode::Backspace => self.opened = None,
            _ => {}
        }
        Next::GoOn
    }

    fn a_page(&self) -> isize {
        isize::try_from(self.page).unwrap_or(10).max(1)
    }

    fn move_by(&mut self, by: isize) {
        let (table, count) = match &mut self.opened {
            Some(opened) => {
                let count = opened.actions().len();
                (&mut opened.actions, count)
            }
            None => {
                let count = self.all_builds().len();
                (&mut self.builds, count)
            }
        };
        let at = table.selected().unwrap_or(0).saturating_add_signed(by);
        let at = count.checked_sub(1).map(|last| at.min(last));
        table.select(at);
        if self.opened.is_none() {
            self.chosen = at.and_then(|at| Some(self.all_builds().get(at)?.id.clone()));
        }
    }

    fn all_builds(&self) -> &[Build] {
        self.status.as_ref().map_or(&[], |status| &status.builds)
    }

    /// Draws all of it; `now` is in milliseconds since 1970.
    pub fn draw(&mut self, frame: &mut Frame, now: i64) {
        let [head, body, foot] = Layout::vertical([
            Constraint::Length(2),
            Constraint::Min(0),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        self.draw_head(frame, head, now);
        if self.opened.is_some() {
            self.draw_build(frame, body, now);
        } else {
            self.draw_overview(frame, body, now);
        }
        let keys = match self.opened {
            Some(_) => " esc back   ↑↓ move   ? help   q quit",
            None => " ↑↓ choose   enter actions   ? help   q quit",
        };
        frame.render_widget(Line::from(keys).style(Modifier::DIM), foot);
        if self.help {
            draw_help(frame);
        }
    }

    fn draw_head(&mut self, frame: &mut Frame, area: Rect, now: i64) {
        let Some(status) = &self.status else {
            let text = match &self.lost {
                Some((reason, _)) => reason.as_str().red(),
                None => "asking primed …".into(),
            };
            frame.render_widget(Paragraph::new(text).wrap(Wrap { trim: true }), area);
            return;
        };
        let upstream = &status.upstream;
        let state = match upstream.state.as_str() {
            "connected" => upstream.state.as_str().green(),
            "unavailable" => upstream.state.as_str().red().bold(),
            _ => upstream.state.as_str().dim(),
        };
        let first = Line::from(vec![
            format!(" primed {}", status.version).bold(),
            "  upstream ".into(),
            state,
            ", ".into(),
            upstream.address.as_str().into(),
            format!(
                "; {} of {} recorded",
                plural(status.records.actions, "action"),
                plural(status.records.parents, "parent")
            )
            .dim(),
        ]);
        let second = match &mut self.lost {
            Some((reason, since)) => {
                let since = *since.get_or_insert(now);
                let lost = format!(
                    " primed has not answered for {}; asking again. ",
                    duration(now - since)
                );
                Line::from(vec![lost.red().bold(), reason.as_str().dim()])
            }
            None => {
                let speculation = &status.speculation;
                let unadaptable = match speculation.unadaptable {
                    0 => String::new(),
                    some => format!(", {some} unadaptable"),
                };
                let slots = speculation.slots.max(speculation.running);
                let mut spans = vec![" ahead of time: ".into()];
                spans.extend(bar(&[(speculation.running, Color::Blue)], slots, 8));
                spans.push(
                    format!(
                        " {} running, {} queued, {} completed, {} failed{unadaptable}",
                        speculation.running,
                        speculation.queued,
                        speculation.completed,
                        speculation.failed
                    )
                    .into(),
                );
                spans.push(format!("; clients {}", speculation.clients).dim());
                Line::from(spans)
            }
        };
        frame.render_widget(Paragraph::new(vec![first, second]), area);
    }

    fn draw_overview(&mut self, frame: &mut Frame, area: Rect, now: i64) {
        let flights = self
            .status
            .as_ref()
            .map(|status| &status.speculation.flights);
        let flights: &[Flight] = flights.map_or(&[], |flights| flights);
        // What runs gets at most a third; builds are what one looks for.
        let lines = (flights.len() as u16).min((area.height / 3).saturating_sub(1));
        let above = if lines > 0 { lines + 1 } else { 0 };
        let [running, builds] =
            Layout::vertical([Constraint::Length(above), Constraint::Min(0)]).areas(area);
        if lines > 0 {
            let more = flights.len().saturating_sub(lines.into());
            let title = match more {
                0 => " running ahead of time ".to_owned(),
                more => format!(" running ahead of time, {more} more "),
            };
            let inner = titled(frame, running, title);
            let lines = flights.iter().take(lines.into()).map(|flight| {
                let label = self.labels.get(&flight.action);
                let label = label.map_or(flight.action.as_str(), String::as_str);
                let waits = if flight.wanted {
                    "  a client waits"
                } else {
                    ""
                };
                let room = usize::from(inner.width).saturating_sub(11 + waits.len());
                Line::from(vec![
                    format!("{:>9}  ", duration(now - flight.started_unix_ms)).into(),
                    tail(label, room).into(),
                    waits.yellow(),
                ])
            });
            frame.render_widget(Paragraph::new(lines.collect::<Vec<_>>()), inner);
        }
        let inner = titled(frame, builds, " builds ".to_owned());
        self.page = usize::from(inner.height).saturating_sub(2);
        if self.all_builds().is_empty() {
            let none = "No build yet. Point a client at primed, and it appears here.";
            let inner = inner.inner(Margin::new(1, 0));
            frame.render_widget(Paragraph::new(none.dim()).wrap(Wrap { trim: true }), inner);
            return;
        }
        let chosen = self.chosen.as_ref();
        let at = self
            .all_builds()
            .iter()
            .position(|build| Some(&build.id) == chosen);
        self.builds.select(Some(at.unwrap_or(0)));
        let columns = Columns::of(inner.width);
        let (header, widths) = columns.header();
        let builds = self
            .status
            .as_ref()
            .map_or(&[][..], |status| &status.builds);
        let rows = builds.iter().map(|build| columns.row(build, now));
        let table = Table::new(rows.collect::<Vec<_>>(), widths)
            .header(header)
            .row_highlight_style(Modifier::REVERSED);
        frame.render_stateful_widget(table, inner, &mut self.builds);
    }

    fn draw_build(&mut self, frame: &mut Frame, area: Rect, now: i64) {
        let Some(opened) = &mut self.opened else {
            return;
        };
        let builds = self
            .status
            .as_ref()
            .map_or(&[][..], |status| &status.builds);
        let build = builds.iter().find(|build| build.id == opened.id);
        let label = build.map_or(opened.id.as_str(), |build| build.label.as_str());
        let title = format!(
            " {} ",
            tail(label, usize::from(area.width).saturating_sub(4))
        );
        let inner = titled(frame, area, title);
        let [counts, inner] =
            Layout::vertical([Constraint::Length(1), Constraint::Min(0)]).areas(inner);
        if let Some(build) = build {
            let tally = format!(
                " asked {}, cached {}, hit {}, joined {}, missed {}, primed {}; saved {}",
                build.asked,
                build.cached,
                build.hit,
                build.joined,
                build.missed,
                build.primed,
                duration(i64::try_from(build.saved_ms).unwrap_or(i64::MAX)),
            );
            frame.render_widget(Line::from(tally), counts);
        }
        self.page = usize::from(inner.height).saturating_sub(2);
        let note = match &opened.page {
            None => Some("asking primed …".to_owned()),
            Some(Err(reason)) => Some(reason.clone()),
            Some(Ok(page)) if page.actions.is_empty() => {
                Some("Nothing was asked for or primed.".to_owned())
            }
            Some(Ok(_)) => None,
        };
        if let Some(note) = note {
            let inner = inner.inner(Margin::new(1, 0));
            frame.render_widget(Paragraph::new(note.dim()).wrap(Wrap { trim: true }), inner);
            return;
        }
        let narrow = inner.width < 72;
        let right = |text: &'static str| Line::from(text).alignment(Alignment::Right);
        let (header, widths) = if narrow {
            let header = vec![Line::from(" answer"), "action".into()];
            (header, vec![Constraint::Length(9), Constraint::Min(10)])
        } else {
            let header = vec![
                Line::from(" answer"),
                "primed".into(),
                right("waited"),
                right("executed"),
                right("lead"),
                "action".into(),
            ];
            let widths = [9, 11, 9, 9, 9].map(Constraint::Length);
            (header, [&widths[..], &[Constraint::Min(10)]].concat())
        };
        let room = usize::from(inner.width).saturating_sub(if narrow { 10 } else { 52 });
        // Only what can be seen is made: there may be ten thousand.
        let all = opened.actions();
        let height = usize::from(inner.height).saturating_sub(1).max(1);
        let at = opened
            .actions
            .selected()
            .unwrap_or(0)
            .min(all.len().saturating_sub(1));
        let first = opened.actions.offset();
        let first = first.clamp(at.saturating_sub(height - 1), at);
        let rows = all.iter().skip(first).take(height);
        let rows = rows.map(|action| action_row(action, now, narrow, room));
        let table = Table::new(rows.collect::<Vec<_>>(), widths)
            .header(Row::new(header).style(Modifier::DIM))
            .row_highlight_style(Modifier::REVERSED);
        let mut seen = TableState::new().with_selected(at - first);
        frame.render_stateful_widget(table, inner, &mut seen);
        *opened.actions.offset_mut() = first;
        opened.actions.select(Some(at));
    }
}

impl Opened {
    fn actions(&self) -> &[ActionPage] {
        match &self.page {
            Some(Ok(page)) => &page.actions,
            _ => &[],
        }
    }
}

/// Which columns a table of builds has room for.
struct Columns {
    all: bool,
    some: bool,
    label: usize,
}

impl Columns {
    fn of(width: u16) -> Self {
        let (all, some) = (width >= 92, width >= 62);
        let others = match (all, some) {
            (true, _) => 65,
            (_, true) => 41,
            _ => 23,
        };
        Columns {
            all,
            some,
            label: usize::from(width).saturating_sub(others).max(8),
        }
    }

    fn header(&self) -> (Row<'static>, Vec<Constraint>) {
        let number = |text: &'static str| Cell::from(Line::from(text).alignment(Alignment::Right));
        let mut cells = vec![Cell::from(" time")];
        let mut widths = vec![Constraint::Length(9)];
        let mut add = |cell, width| {
            cells.push(cell);
            widths.push(Constraint::Length(width));
        };
        if self.some {
            add("answers".into(), 10);
            add(number("asked"), 6);
        }
        if self.all {
            add(number("cached"), 6);
        }
        add(number("hit"), 5);
        if self.all {
            add(number("joined"), 6);
        }
        add(number("missed"), 6);
        if self.all {
            add(number("saved"), 9);
        }
        cells.push("build".into());
        widths.push(Constraint::Min(8));
        (Row::new(cells).style(Modifier::DIM), widths)
    }

    fn row(&self, build: &Build, now: i64) -> Row<'static> {
        let running = build.ended_unix_ms.is_none();
        let number = |n: u64, colour: Color| {
            let style = if n > 0 {
                Style::new().fg(colour)
            } else {
                Style::new()
            };
            Cell::from(Line::from(n.to_string()).alignment(Alignment::Right)).style(style)
        };
        let took = build.ended_unix_ms.unwrap_or(now) - build.started_unix_ms;
        let mark = if running { "▶" } else { " " };
        let mut cells = vec![Cell::from(format!("{mark}{}", duration(took)))];
        if self.some {
            let parts = [
                (build.hit + build.joined, Color::Green),
                (build.missed, Color::Red),
                (build.cached, Color::DarkGray),
            ];
            cells.push(Line::from(bar(&parts, build.asked, 10)).into());
            cells.push(number(build.asked, Color::Reset));
        }
        if self.all {
            cells.push(number(build.cached, Color::Reset));
        }
        cells.push(number(build.hit, Color::Green));
        if self.all {
            cells.push(number(build.joined, Color::Blue));
        }
        cells.push(number(build.missed, Color::Red));
        if self.all {
            let saved = duration(i64::try_from(build.saved_ms).unwrap_or(i64::MAX));
            cells.push(Line::from(saved).alignment(Alignment::Right).into());
        }
        cells.push(tail(&build.label, self.label).into());
        let row = Row::new(cells);
        if running { row.bold() } else { row }
    }
}

fn action_row(action: &ActionPage, now: i64, narrow: bool, room: usize) -> Row<'static> {
    let answer = action.asked.as_ref().map_or("", |asked| &asked.answer);
    let colour = match answer {
        "hit" => Color::Green,
        "joined" => Color::Blue,
        "missed" => Color::Red,
        _ => Color::Reset,
    };
    let answer = Cell::from(format!(" {answer}")).style(Style::new().fg(colour));
    let label = Cell::from(tail(&action.label, room));
    if narrow {
        return Row::new([answer, label]);
    }
    let time = |ms: Option<i64>| {
        let text = ms.map_or_else(String::new, duration);
        Cell::from(Line::from(text).alignment(Alignment::Right))
    };
    let asked = action.asked.as_ref();
    let primed = action.primed.as_ref();
    let waited = asked.map(|asked| asked.answered_unix_ms.unwrap_or(now) - asked.at_unix_ms);
    let executed = asked.map_or(0, |asked| asked.executed_ms);
    let executed = executed.max(primed.map_or(0, |primed| primed.execution_ms));
    let executed = i64::try_from(executed).ok().filter(|ms| *ms > 0);
    let lead = action.lead_ms().and_then(|ms| i64::try_from(ms).ok());
    let outcome = primed.map_or_else(String::new, |primed| primed.outcome.clone());
    Row::new([
        answer,
        outcome.into(),
        time(waited),
        time(executed),
        time(lead),
        label,
    ])
}

fn draw_help(frame: &mut Frame) {
    let (width, height) = (58, HELP.lines().count() as u16 + 2);
    let area = frame.area();
    let area = Rect {
        x: area.width.saturating_sub(width) / 2,
        y: area.height.saturating_sub(height) / 2,
        width: width.min(area.width),
        height: height.min(area.height),
    };
    frame.render_widget(Clear, area);
    let block = Block::bordered().title(" primed top ");
    frame.render_widget(Paragraph::new(HELP).block(block), area);
}

/// Draws a rule with a title above `area`, and gives what is below it.
fn titled(frame: &mut Frame, area: Rect, title: String) -> Rect {
    use ratatui::widgets::Borders;
    let block = Block::new()
        .borders(Borders::TOP)
        .border_style(Modifier::DIM)
        .title(title.bold());
    let inner = block.inner(area);
    frame.render_widget(block, area);
    inner
}

/// A bar of `width` cells: each part has its share of `all`, and at least a cell if it is not 0.
fn bar(parts: &[(u64, Color)], all: u64, width: usize) -> Vec<Span<'static>> {
    let mut left = width;
    let mut spans = Vec::new();
    for (n, colour) in parts {
        let share = (*n as f64 / all.max(1) as f64 * width as f64).round() as usize;
        let cells = if *n > 0 { share.max(1).min(left) } else { 0 };
        left -= cells;
        spans.push(Span::from("█".repeat(cells)).fg(*colour));
    }
    spans.push(Span::from("·".repeat(left)).dim());
    spans
}

/// The end of `text`, where paths differ, in at most `room` characters.
fn tail(text: &str, room: usize) -> String {
    // Control characters of a name are not the terminal's business.
    let clean = text.chars().map(|c| if c.is_control() { '?' } else { c });
    let text: Vec<char> = clean.collect();
    if text.len() <= room {
        return text.into_iter().collect();
    }
    let kept = &text[text.len() - room.saturating_sub(1)..];
    std::iter::once('…').chain(kept.iter().copied()).collect()
}

fn plural(n: u64, noun: &str) -> String {
    let s = if n == 1 { "" } else { "s" };
    format!("{n} {noun}{s}")
}

/// For people, in at most eight characters.
fn duration(ms: i64) -> String {
    let ms = ms.max(0);
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{:.1} s", ms as f64 / 1000.0),
        60_000..3_600_000 => format!("{}m {:02}s", ms / 60_000, ms % 60_000 / 1000),
        3_600_000..360_000_000 => format!("{}h {:02}m", ms / 3_600_000, ms % 3_600_000 / 60_000),
        _ => format!("{} d", ms / 86_400_000),
    }
}
