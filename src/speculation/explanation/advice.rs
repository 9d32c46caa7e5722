//! Advice: what is to be said of an action in one sentence, and what to do about it.

use std::collections::HashSet;

use super::difference::{Aspect, ChangedEntry, Differing, Field, TreeDifference};
use super::explain::{Counterpart, is_missed, outputs};
use crate::speculation::journal::page::{
    ActionEntry, AnswerWord, ChangeEntry, OutcomeWord, Page, PrimedEntry,
};
use crate::speculation::planning::verdict::By;

/// What is to be said of an action in one sentence, and what to do about it.
pub fn judge(
    page: &Page,
    entry: &ActionEntry,
    counterpart: Option<&Counterpart>,
) -> (String, Vec<String>) {
    match (&entry.asked, &entry.primed) {
        (Some(asked), primed) => match asked.answer {
            AnswerWord::Cached => (cached(primed.as_ref()), Vec::new()),
            AnswerWord::Hit => {
                let summary = "it was executed ahead of time, and the build found its result";
                (summary.to_owned(), Vec::new())
            }
            AnswerWord::Joined => {
                let summary = "it was being executed ahead of time when the build asked for it, \
                               and the build waited for that";
                (summary.to_owned(), Vec::new())
            }
            AnswerWord::Missed => match (primed, counterpart) {
                (_, Some(counterpart)) => otherwise(page, counterpart),
                (Some(primed), None) => expected_in_vain(asked.at_unix_ms, primed),
                (None, None) => unexpected(page),
            },
        },
        (None, Some(primed)) => not_asked_for(page, primed, counterpart),
        (None, None) => ("nothing is known of it".to_owned(), Vec::new()),
    }
}

fn cached(primed: Option<&PrimedEntry>) -> String {
    match primed.map(|primed| primed.outcome) {
        Some(OutcomeWord::Unchanged) => {
            "nothing that it reads has changed, and its result was in the action cache"
        }
        Some(_) => "its inputs have changed, and its result was in the action cache already",
        None => "its result was in the action cache; primed had no part in that",
    }
    .to_owned()
}

/// It was foreseen what would be asked for, and the client executed it all the same.
fn expected_in_vain(asked_unix_ms: i64, primed: &PrimedEntry) -> (String, Vec<String>) {
    let reason = primed.reason.clone();
    let because = reason.map_or_else(String::new, |reason| format!(": {reason}"));
    let (summary, hint) = match primed.outcome {
        OutcomeWord::Unchanged => (
            "nothing that it reads has changed since it was recorded, but its result was not in \
             the action cache"
                .to_owned(),
            Some(
                "the backend has dropped it, or it failed last time: give the backend's cache \
                 more room if this happens often",
            ),
        ),
        OutcomeWord::Failed => (
            format!("it was foreseen and executed ahead of time, but it failed{because}"),
            Some("the build executed it itself to see why; its own output says more"),
        ),
        OutcomeWord::Abandoned if primed.planned_unix_ms >= asked_unix_ms => (
            "it was foreseen, but only when the build had asked for it".to_owned(),
            Some(
                "actions that a build begins with leave primed no time; save a file before the \
                 build, or begin it with `primed run`, which primes first",
            ),
        ),
        OutcomeWord::Retired | OutcomeWord::Cheap => (
            format!("it was foreseen, but left out{because}"),
            Some("nothing needs to be done: it was asked for, so it is primed from now on"),
        ),
        OutcomeWord::OverBudget => (
            format!("it was foreseen, but left out{because}"),
            Some("give that flag a larger value if the backend can bear it"),
        ),
        OutcomeWord::Abandoned => (
            format!("it was foreseen, but not executed ahead of time{because}"),
            None,
        ),
        _ => (
            "it was foreseen, but was not done in time".to_owned(),
            Some("more run ahead with a larger --max-speculative, if the backend has room"),
        ),
    };
    (summary, hint.map(str::to_owned).into_iter().collect())
}

/// Nothing was expected to write these files.
fn unexpected(page: &Page) -> (String, Vec<String>) {
    let is_primed = page.actions.iter().any(|entry| entry.primed.is_some());
    match is_primed {
        true => (
            "no recorded action writes the same files: it is new".to_owned(),
            vec![
                "nothing needs to be done: it is recorded now, and primed from the next build on"
                    .to_owned(),
            ],
        ),
        false => (
            "nothing was planned for this build: no earlier one of this project is recorded, or \
             nothing was known of it"
                .to_owned(),
            vec![
                "the first build of a project only records; if earlier ones were made, they ran in \
                 another directory, as another user, or under another instance (`primed export \
                 --list` shows what is recorded)"
                    .to_owned(),
            ],
        ),
    }
}

/// Something else was expected in its place.
fn otherwise(page: &Page, counterpart: &Counterpart) -> (String, Vec<String>) {
    let expected = counterpart.entry.primed.as_ref();
    let outcome = expected.map(|primed| primed.outcome);
    let reason = expected
        .and_then(|primed| primed.reason.as_deref())
        .unwrap_or("unknown");
    if outcome == Some(OutcomeWord::Unadaptable) {
        let summary = format!("the recorded action could not be adapted: {reason}");
        let hint = "if that file was moved or removed on purpose, nothing needs to be done: the next \
                    build is primed again";
        return (summary, vec![hint.to_owned()]);
    }
    if outcome == Some(OutcomeWord::Unresolved) {
        let summary = format!("it was not known in time what it would be: {reason}");
        return (summary, Vec::new());
    }
    if counterpart.incomparable.is_some() {
        let summary = "it is not what was expected to write the same files";
        return (summary.to_owned(), Vec::new());
    }
    let mut hints = Vec::new();
    if !counterpart.command.is_empty() {
        hints.extend(command_hints(&counterpart.command));
        let summary = format!(
            "its {} was other than recorded",
            fields(&counterpart.command)
        );
        return (summary, hints);
    }
    let TreeDifference {
        added,
        removed,
        changed,
        ..
    } = &counterpart.tree;
    if !added.is_empty() || !removed.is_empty() {
        let what = match (added.len(), removed.len()) {
            (added, 0) => format!("read {} more than expected", files(added)),
            (0, removed) => format!("read {} less than expected", files(removed)),
            (added, removed) => format!(
                "read {} more and {removed} less than expected",
                files(added)
            ),
        };
        hints.push(
            "an #include was added or removed, or the like: nothing needs to be done, the next \
             build is primed with it"
                .to_owned(),
        );
        return (format!("it {what}"), hints);
    }
    if !changed.is_empty() {
        let foreseen = expected.map_or(&[][..], |primed| &primed.changes);
        hints.extend(changed_hints(page, changed, foreseen));
        let summary = format!(
            "{} it reads had other content than expected",
            files(changed.len())
        );
        return (summary, hints);
    }
    let summary = "it is not what was expected, but the difference cannot be seen";
    (summary.to_owned(), hints)
}

fn files(count: usize) -> String {
    match count {
        1 => "1 file".to_owned(),
        count => format!("{count} files"),
    }
}

/// What differs, in a few words.
fn fields(command: &[Differing]) -> String {
    let mut words: Vec<&str> = Vec::new();
    for differing in command {
        let word = match differing.what {
            Field::Argument => "command line",
            Field::Environment => "environment",
            Field::Output => "list of outputs",
            Field::WorkingDirectory => "working directory",
            Field::Platform => "platform",
            Field::Timeout => "timeout",
            Field::Salt => "salt",
            Field::Other => "message",
        };
        if !words.contains(&word) {
            words.push(word);
        }
    }
    match words.as_slice() {
        [only] => (*only).to_owned(),
        [rest @ .., last] => format!("{} and {last}", rest.join(", ")),
        [] => String::new(),
    }
}

fn command_hints(command: &[Differing]) -> Vec<String> {
    let mut hints: Vec<&str> = Vec::new();
    let mut add = |hint| {
        if !hints.contains(&hint) {
            hints.push(hint);
        }
    };
    for differing in command {
        add(match (differing.what, &differing.from, &differing.to) {
            (Field::WorkingDirectory, ..) => {
                "the same project was built from another directory: set RECC_PROJECT_ROOT to the \
                 directory that all builds of it have in common"
            }
            (Field::Argument | Field::Environment, Some(from), Some(to))
                if is_volatile(from, to) =>
            {
                "a time, a counter, or a random name stands in the command: make it the same in \
                 each build, or no build can be primed or cached"
            }
            (Field::Environment | Field::Platform, ..) => {
                "what is sent with each command depends on the environment (RECC_REMOTE_ENV and \
                 RECC_REMOTE_PLATFORM of recc, for example): keep it the same in each build"
            }
            _ => {
                "the build uses other flags than last time: nothing needs to be done, they are \
                 recorded now"
            }
        });
    }
    hints.into_iter().map(str::to_owned).collect()
}

/// Whether two texts are the same but for numbers and random names.
fn is_volatile(from: &str, to: &str) -> bool {
    // Fewer digits than this are a version, or a level.
    const MIN_DIGITS: usize = 5;
    let shape = |text: &str| -> (String, usize) {
        let (mut shape, mut longest, mut run) = (String::new(), 0, 0);
        for letter in text.chars() {
            if letter.is_ascii_digit() {
                run += 1;
                longest = longest.max(run);
                if !shape.ends_with('#') {
                    shape.push('#');
                }
            } else {
                run = 0;
                shape.push(letter);
            }
        }
        (shape, longest)
    };
    let is_temporary = |text: &str| text.contains("/tmp/") || text.contains("/tmp.");
    let ((one, digits), (other, _)) = (shape(from), shape(to));
    one == other && digits >= MIN_DIGITS || is_temporary(from) && is_temporary(to)
}

fn changed_hints(page: &Page, changed: &[ChangedEntry], foreseen: &[ChangeEntry]) -> Vec<String> {
    let missed = page.actions.iter().filter(|entry| is_missed(entry));
    let made_anew: HashSet<&str> = missed.flat_map(outputs).collect();
    let mut hints: Vec<&str> = Vec::new();
    for changed in changed {
        let told = foreseen.iter().find(|change| change.path == changed.path);
        let hint = match (changed.what, told.map(|change| change.by)) {
            (Aspect::Mode | Aspect::Properties, _) => {
                "a file's mode or other properties changed, which the client sends: leave them \
                 alone, or have the client leave out what it does not need"
            }
            _ if made_anew.contains(changed.path.as_str()) => {
                "what writes that file was missed too: see why that was"
            }
            (_, Some(By::Action)) => {
                "what writes that file writes something else each time: make it reproducible \
                 (no __DATE__ and __TIME__, ar with D, -frandom-seed)"
            }
            (_, Some(_)) => "the file was changed again when the build had begun, or while it ran",
            (_, None) => {
                "the file changed, and nothing told primed of it before: it is generated by \
                 something that does not run through primed, or lies where primed cannot look"
            }
        };
        if !hints.contains(&hint) {
            hints.push(hint);
        }
    }
    hints.into_iter().map(str::to_owned).collect()
}

/// Something was made of it that nobody asked for.
fn not_asked_for(
    page: &Page,
    primed: &PrimedEntry,
    counterpart: Option<&Counterpart>,
) -> (String, Vec<String>) {
    let done = match primed.outcome {
        OutcomeWord::Primed => "it was executed ahead of time",
        OutcomeWord::Cached => "it was foreseen, and its result was in the action cache already",
        OutcomeWord::Queued | OutcomeWord::Running => "it is about to be executed ahead of time",
        OutcomeWord::Unchanged => "nothing that it reads has changed",
        OutcomeWord::Failed => "it was executed ahead of time and failed",
        OutcomeWord::Abandoned => "it was foreseen but not executed",
        OutcomeWord::Unadaptable => "it cannot be adapted to what has changed",
        OutcomeWord::Unresolved => "it is not known what it reads now",
        OutcomeWord::Retired | OutcomeWord::Cheap | OutcomeWord::OverBudget => {
            "it was foreseen, but left out"
        }
    };
    let reason = primed.reason.iter().map(|reason| format!(" ({reason})"));
    let reason: String = reason.collect();
    match counterpart {
        Some(counterpart) => {
            let (_, hints) = match counterpart.incomparable {
                Some(_) => (String::new(), Vec::new()),
                None => otherwise(page, counterpart),
            };
            let summary = format!("{done}{reason}, but the build asked for another in its place");
            (summary, hints)
        }
        None => (
            format!("{done}{reason}; the build did not ask for it"),
            Vec::new(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_temporary_names_are_told_from_other_flags() {
        assert!(is_volatile("-DBUILT=1795274041", "-DBUILT=1795274099"));
        assert!(is_volatile("/tmp/cc8Xa1.s", "/tmp/ccQQb7.s"));
        assert!(!is_volatile("-O1", "-O2"));
        assert!(!is_volatile("-std=c11", "-std=c17"));
    }
}
