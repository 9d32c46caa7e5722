//! `primed explain`: why an action was answered as it was.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use clap::Args;
use http::Method;

use super::admin_client::AdminClient;
use super::{Daemon, Failure, block_on, exit_codes, shown};
use crate::server::EXPLAIN_PATH;
use crate::speculation::explanation::difference::{
    Aspect, ChangedEntry, Differing, Entry, Field, TreeDifference,
};
use crate::speculation::explanation::explain::{Counterpart, Explanation, Explanations, Question};
use crate::speculation::journal::page::{
    AnswerWord, AskedEntry, ChangeEntry, OutcomeWord, PrimedEntry, Trigger,
};
use crate::speculation::planning::verdict::By;

/// Entries of a list that are shown, unless all are wanted.
const FEW: usize = 8;
/// Columns before what is said of something.
const INDENT: usize = 14;

/// Say why an action was answered as it was, or why a build missed what it missed.
#[derive(Debug, Args)]
#[command(override_usage = "primed explain [OPTIONS] ACTION|FILE\n       \
                            primed explain [OPTIONS] --last-missed")]
pub struct Arguments {
    /// An action: its digest, or the beginning of its hash. Or a file: what an action writes or
    /// reads.
    #[arg(value_name = "ACTION|FILE", required_unless_present = "last_missed")]
    about: Option<String>,
    /// Explain what the last build missed, or the one that --build names.
    #[arg(long, env = "PRIMED_LAST_MISSED", value_parser = clap::builder::FalseyValueParser::new(), conflicts_with = "about")]
    last_missed: bool,
    /// The build, by its id or the beginning of it [default: the newest that has to do with it].
    #[arg(long, env = "PRIMED_BUILD", value_name = "ID")]
    build: Option<String>,
    /// Show all actions, and all entries of long lists.
    #[arg(long, env = "PRIMED_ALL", value_parser = clap::builder::FalseyValueParser::new())]
    all: bool,
    /// Print one JSON object.
    #[arg(long, env = "PRIMED_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
    #[command(flatten)]
    daemon: Daemon,
}

pub(super) fn run(arguments: Arguments, file: Option<&Path>) -> Result<(), Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::new(exit_codes::FAILURE, error);
    let question = Question {
        build: arguments.build,
        about: arguments.about,
        directory: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
        all: arguments.all,
    };
    let question = serde_json::to_vec(&question).map_err(|error| failed(&error))?;
    let (admin, page) = block_on(async {
        let admin = arguments.daemon.visit(file).await?;
        let mut client = AdminClient::connect(&admin).await?;
        let question = Bytes::from(question);
        let page = client.send(Method::POST, EXPLAIN_PATH, question).await?;
        Ok((admin, page))
    })?;
    if arguments.json {
        return shown::print(&format!("{}\n", String::from_utf8_lossy(&page)));
    }
    let explanations: Explanations = serde_json::from_slice(&page).map_err(|error| {
        failed(&format!(
            "primed at {admin} answered what is no explanation: {error}"
        ))
    })?;
    let text = Text {
        lines: Vec::new(),
        all: arguments.all,
        told: HashMap::new(),
    };
    shown::print(&text.of(&explanations))
}

/// An explanation in the making.
struct Text {
    lines: Vec<String>,
    all: bool,
    /// What was said of an action, with the label of the first of which it was.
    told: HashMap<String, String>,
}

impl Text {
    fn of(mut self, explanations: &Explanations) -> String {
        let build = &explanations.build;
        let took = match build.ended_unix_ms {
            Some(ended) => shown::span(build.started_unix_ms, ended),
            None => "running".to_owned(),
        };
        let when = shown::date_and_time(build.started_unix_ms);
        let id = build.id.get(..13).unwrap_or(&build.id);
        let label = shown::cut(
            &build.label,
            shown::WIDTH - id.len() - when.len() - took.len() - 12,
        );
        self.lines
            .push(format!("build {id}  {when}  {took}  {label}"));
        let counts = &build.counts;
        self.lines.push(format!(
            "{} asked: {} cached, {} hit, {} joined, {} missed",
            counts.asked, counts.cached, counts.hit, counts.joined, counts.missed
        ));
        if explanations.explanations.is_empty() {
            self.lines.push("This build missed nothing.".to_owned());
        }
        for explanation in &explanations.explanations {
            self.explanation(explanation);
        }
        if explanations.left_out > 0 {
            self.lines.push(String::new());
            let more = explanations.left_out;
            self.lines
                .push(format!("{more} more actions; --all shows them"));
        }
        self.lines.join("\n") + "\n"
    }

    /// One line, or several, behind a word in the margin.
    fn say(&mut self, word: &str, text: &str) {
        let mut margin = word;
        for line in wrapped(text, shown::WIDTH - INDENT) {
            self.lines
                .push(format!("  {margin:<width$}{line}", width = INDENT - 2));
            margin = "";
        }
    }

    fn explanation(&mut self, explanation: &Explanation) {
        let entry = &explanation.entry;
        let answer = match &entry.asked {
            Some(asked) => answer_word(asked.answer),
            None => "not asked for",
        };
        let digest = shown::digest(&entry.action);
        let label = shown::cut(
            &entry.label,
            shown::WIDTH - answer.len() - digest.len() - 12,
        );
        let head = format!("{label}  {answer}  (action {digest})");
        let is_missed = answer == answer_word(AnswerWord::Missed);
        let cause = cause(explanation);
        if is_missed && !self.all {
            if let Some(first) = self.told.get(&cause) {
                self.lines
                    .push(shown::cut(&format!("{head}  as {first}"), shown::WIDTH));
                return;
            }
            self.told.insert(cause, label);
        }
        self.lines.push(String::new());
        self.lines.push(head);
        for line in wrapped(&sentence(&explanation.summary), shown::WIDTH - 2) {
            self.lines.push(format!("  {line}"));
        }
        if let Some(asked) = &entry.asked {
            self.asked(asked);
        }
        match (&explanation.counterpart, &entry.primed) {
            (Some(counterpart), Some(primed)) if is_missed => {
                self.recorded(explanation, primed);
                self.counterpart(counterpart, true);
            }
            (counterpart, primed) => {
                if let Some(primed) = primed {
                    self.recorded(explanation, primed);
                    self.primed(primed, entry.asked.as_ref());
                }
                if let Some(counterpart) = counterpart {
                    self.counterpart(counterpart, entry.asked.is_some());
                }
            }
        }
        for hint in &explanation.hints {
            self.say("hint", &sentence(hint));
        }
    }

    fn asked(&mut self, asked: &AskedEntry) {
        let waited = shown::span(asked.at_unix_ms, asked.answered_unix_ms);
        let at = shown::time_of_day(asked.at_unix_ms);
        let executed = match asked.executed_ms {
            0 => String::new(),
            ms if asked.answer == AnswerWord::Missed => {
                format!("; executed for {}", shown::duration(ms))
            }
            ms => format!("; its execution took {}", shown::duration(ms)),
        };
        self.say(
            "asked for",
            &format!("{at}, answered after {waited}{executed}"),
        );
    }

    fn recorded(&mut self, explanation: &Explanation, primed: &PrimedEntry) {
        let base = explanation.entry.base.as_deref().unwrap_or_default();
        let took = shown::duration(primed.recorded_ms);
        let (at, build) = match &explanation.recorded {
            Some(recorded) => {
                let id = recorded.build.get(..13).unwrap_or(&recorded.build);
                (recorded.at_unix_ms, format!(" in build {id}"))
            }
            None => (primed.recorded_unix_ms, String::new()),
        };
        let at = shown::date_and_time(at);
        let text = format!("{at}{build}, as action {}, for {took}", shown::digest(base));
        self.say("recorded", &text);
    }

    fn primed(&mut self, primed: &PrimedEntry, asked: Option<&AskedEntry>) {
        let changes: Vec<String> = primed.changes.iter().map(change).collect();
        self.list("changed", &changes, primed.changes_left_out);
        if primed.outcome == OutcomeWord::Unchanged {
            return;
        }
        let planned = shown::time_of_day(primed.planned_unix_ms);
        self.say(
            "foreseen",
            &format!("{planned}, {}", trigger(primed.trigger)),
        );
        if let Some(started) = primed.started_unix_ms {
            let at = shown::time_of_day(started);
            let text = match primed.ended_unix_ms {
                Some(ended) => {
                    let (all, run) = (shown::span(started, ended), primed.execution_ms);
                    format!("{at}, for {all}, of which it ran {}", shown::duration(run))
                }
                None => format!("{at}; it is running"),
            };
            self.say("executed", &text);
        }
        let Some(used) = primed.used_unix_ms else {
            if primed.outcome == OutcomeWord::Primed {
                self.say("used", "no");
            }
            return;
        };
        let lead = match primed.ended_unix_ms {
            Some(ended) if asked.is_some_and(|asked| asked.answer == AnswerWord::Hit) => {
                format!(", {} after its result was there", shown::span(ended, used))
            }
            _ => String::new(),
        };
        let at = shown::time_of_day(used);
        let saved = shown::duration(primed.execution_ms);
        let saved = match asked.map(|asked| asked.answer) {
            Some(AnswerWord::Hit) => format!("; {saved} saved"),
            _ => String::new(),
        };
        self.say("used", &format!("{at}{lead}{saved}"));
    }

    fn counterpart(&mut self, counterpart: &Counterpart, is_expected: bool) {
        let entry = &counterpart.entry;
        let word = if is_expected {
            "expected"
        } else {
            "in its place"
        };
        let mut text = format!("action {}", shown::digest(&entry.action));
        if let Some(primed) = entry.primed.as_ref().filter(|_| is_expected) {
            text.push_str(&format!(", {}", outcome_word(primed.outcome)));
            if primed.outcome != OutcomeWord::Unchanged {
                text.push_str(&format!(", foreseen {}", trigger(primed.trigger)));
            }
        }
        self.say(word, &text);
        if let Some(primed) = entry.primed.as_ref().filter(|_| is_expected) {
            let changes: Vec<String> = primed.changes.iter().map(change).collect();
            self.list("foreseen", &changes, primed.changes_left_out);
        }
        if let Some(reason) = &counterpart.incomparable {
            self.say("difference", &format!("cannot be told: {reason}"));
        }
        self.tree(&counterpart.tree);
        let lines: Vec<String> = counterpart.command.iter().map(differing).collect();
        self.list("differs", &lines, 0);
    }

    fn tree(&mut self, tree: &TreeDifference) {
        let shown = |entry: &Entry| {
            let content = shown::digest(&entry.content);
            format!("{}  {content}", shown::cut(&entry.path, 64))
        };
        let added: Vec<String> = tree.added.iter().map(shown).collect();
        let removed: Vec<String> = tree.removed.iter().map(shown).collect();
        let changed: Vec<String> = tree.changed.iter().map(changed_entry).collect();
        self.list("added", &added, 0);
        self.list("removed", &removed, 0);
        self.list("other", &changed, tree.left_out);
        for path in &tree.unreadable {
            let path = if path.is_empty() {
                "the input root"
            } else {
                path
            };
            self.say("unknown", &format!("{path} is not in the CAS any more"));
        }
    }

    /// A list that is cut short if it is long.
    fn list(&mut self, word: &str, lines: &[String], left_out: usize) {
        let limit = if self.all { lines.len() } else { FEW };
        let mut margin = word;
        for line in lines.iter().take(limit) {
            self.lines
                .push(format!("  {margin:<width$}{line}", width = INDENT - 2));
            margin = "";
        }
        match (lines.len().saturating_sub(limit), left_out) {
            (0, 0) => {}
            (0, more) => self.say("", &format!("… and {more} more")),
            (hidden, more) => self.say(
                "",
                &format!("… and {} more; --all shows them", hidden + more),
            ),
        }
    }
}

/// Why an action was missed: several that were for the same reason need be told of only once.
fn cause(explanation: &Explanation) -> String {
    let Explanation { summary, hints, .. } = explanation;
    let differences = explanation.counterpart.as_ref().map(|counterpart| {
        let TreeDifference { added, removed, .. } = &counterpart.tree;
        (&counterpart.command, added, removed)
    });
    format!("{summary} {hints:?} {differences:?}")
}

/// A sentence of its own.
fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters
        .next()
        .map(|letter| letter.to_uppercase().to_string());
    format!("{}{}.", first.unwrap_or_default(), letters.as_str())
}

/// Lines of at most `width` columns, broken between words.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let last = lines.last_mut();
        match last {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

fn change(change: &ChangeEntry) -> String {
    let path = shown::cut(&change.path, 40);
    let contents = match (&change.from, &change.to) {
        (Some(from), Some(to)) => format!("{} → {}", shown::digest(from), shown::digest(to)),
        (None, Some(to)) => format!("new: {}", shown::digest(to)),
        (Some(_), None) => "gone".to_owned(),
        (None, None) => String::new(),
    };
    let by = match change.by {
        By::Source => "by the source file".to_owned(),
        By::Artifact => "by what a dependency made".to_owned(),
        By::Action => format!("by action {}", shown::digest(&change.origin)),
        By::Observed => "as another action showed".to_owned(),
    };
    format!("{path}  {contents}, {by}")
}

fn changed_entry(changed: &ChangedEntry) -> String {
    let path = shown::cut(&changed.path, 40);
    let (from, to) = match changed.what {
        Aspect::Content => (shown::digest(&changed.from), shown::digest(&changed.to)),
        _ => (changed.from.as_str(), changed.to.as_str()),
    };
    let what = match changed.what {
        Aspect::Content => "",
        Aspect::Mode => "mode: ",
        Aspect::Target => "leads to ",
        Aspect::Properties => "properties: ",
        Aspect::Kind => "kind: ",
    };
    shown::cut(
        &format!("{path}  {what}{from} → {to}"),
        shown::WIDTH - INDENT,
    )
}

fn differing(differing: &Differing) -> String {
    let what = match differing.what {
        Field::Argument => "argument",
        Field::Environment => "environment",
        Field::Output => "output",
        Field::WorkingDirectory => "working directory",
        Field::Platform => "platform",
        Field::Timeout => "timeout",
        Field::Salt => "salt",
        Field::Other => "another field of the message",
    };
    let name = differing.name.iter().map(|name| format!(" {name}"));
    let name: String = name.collect();
    let values = match (&differing.from, &differing.to) {
        (Some(from), Some(to)) => format!("{from} → {to}"),
        (None, Some(to)) => format!("added: {to}"),
        (Some(from), None) => format!("removed: {from}"),
        (None, None) => String::new(),
    };
    shown::cut(&format!("{what}{name}  {values}"), shown::WIDTH - INDENT)
}

fn answer_word(answer: AnswerWord) -> &'static str {
    match answer {
        AnswerWord::Cached => "cached",
        AnswerWord::Hit => "hit",
        AnswerWord::Joined => "joined",
        AnswerWord::Missed => "missed",
    }
}

fn outcome_word(outcome: OutcomeWord) -> &'static str {
    match outcome {
        OutcomeWord::Queued => "waiting for its turn",
        OutcomeWord::Running => "being executed",
        OutcomeWord::Primed => "executed ahead of time",
        OutcomeWord::Cached => "in the action cache",
        OutcomeWord::Unchanged => "as it was recorded",
        OutcomeWord::Failed => "failed",
        OutcomeWord::Abandoned => "not executed",
        OutcomeWord::Unadaptable => "not to be adapted",
        OutcomeWord::Unresolved => "not resolved",
        OutcomeWord::Retired => "retired",
        OutcomeWord::Cheap => "too cheap",
        OutcomeWord::OverBudget => "over budget",
    }
}

fn trigger(trigger: Trigger) -> &'static str {
    match trigger {
        Trigger::Workspace => "by a look at the workspace",
        Trigger::Saved => "when a source file was saved",
        Trigger::Parent => "when its parent was asked for",
        Trigger::Dependency => "when something that its parent depends on was asked for",
        Trigger::Observed => "by what the build executed before",
        Trigger::Completed => "when what it reads was made",
        Trigger::Shared => "by records that others have shared",
    }
}
