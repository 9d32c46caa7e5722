//! The journal of a build as others read it: `GET /builds/ID` of the admin socket, and what is kept
//! of it on disk. Times are milliseconds since 1970, digests `HASH/SIZE`.

use serde::{Deserialize, Serialize};

use crate::speculation::journal::accounting::BuildStatus;
use crate::speculation::planning::verdict::By;

/// What a build asked for, and what was primed for it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Page {
    /// The build, with its counts.
    #[serde(flatten)]
    pub build: BuildStatus,
    /// What was asked for in the order in which that was, then what was only planned.
    pub actions: Vec<ActionEntry>,
    /// How many actions there was no room for.
    #[serde(default)]
    pub left_out: u64,
}

/// One action.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ActionEntry {
    /// Its digest; that of the recorded action, where it could not be adapted.
    pub action: String,
    /// The recorded action that it was adapted from, or is.
    pub base: Option<String>,
    /// For people: its first output, or else its command in short.
    pub label: String,
    /// Its outputs, where it has several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub outputs: Vec<String>,
    /// The instance that it belongs to.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub instance: String,
    /// The digest function, where the digest's length does not tell it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest_function: Option<String>,
    /// The client's question for it.
    pub asked: Option<AskedEntry>,
    /// What priming made of it.
    pub primed: Option<PrimedEntry>,
}

/// A client's question for an action, and the answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AskedEntry {
    /// When the first call about it began.
    pub at_unix_ms: i64,
    /// When the client had its answer: the result, if it executed the action itself.
    pub answered_unix_ms: i64,
    /// How it was answered.
    pub answer: AnswerWord,
    /// How long the worker ran it, whoever had it executed; 0 where nobody says.
    pub executed_ms: u64,
}

/// How a question was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AnswerWord {
    /// From the action cache, without primed's help.
    Cached,
    /// By a primed result.
    Hit,
    /// By a speculative execution in flight.
    Joined,
    /// It was left to the client.
    Missed,
}

/// What priming made of an action.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrimedEntry {
    /// When it was worked out what it is.
    pub planned_unix_ms: i64,
    /// When it was given to the backend.
    pub started_unix_ms: Option<i64>,
    /// When that was over.
    pub ended_unix_ms: Option<i64>,
    /// What came of it.
    pub outcome: OutcomeWord,
    /// Why, where the outcome does not say all.
    pub reason: Option<String>,
    /// How long the worker ran it.
    pub execution_ms: u64,
    /// When a client had the result first.
    pub used_unix_ms: Option<i64>,
    /// Why nobody has used the result, though there is one and the build has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unused: Option<UnusedWord>,
    /// What made primed work it out.
    pub trigger: Trigger,
    /// The files of its input tree that are not what was recorded.
    pub changes: Vec<ChangeEntry>,
    /// How many more of them there are.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub changes_left_out: usize,
    /// The adapted actions that it waited for.
    pub after: Vec<String>,
    /// When the recorded action was seen last, before this build.
    #[serde(default)]
    pub recorded_unix_ms: i64,
    /// How long the worker ran the recorded action.
    #[serde(default)]
    pub recorded_ms: u64,
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// What came of priming an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutcomeWord {
    /// It waits for its turn.
    Queued,
    /// It is being executed.
    Running,
    /// Its result was brought into the action cache.
    Primed,
    /// Its result was there already.
    Cached,
    /// Nothing that it reads has changed.
    Unchanged,
    /// It ended with another exit code than 0.
    Failed,
    /// It was not executed, or not to its end.
    Abandoned,
    /// It cannot be adapted.
    Unadaptable,
    /// It is not known what it reads.
    Unresolved,
    /// It was left out: predictions like it went unused time and again.
    Retired,
    /// It was left out: there is too little to gain.
    Cheap,
    /// It was left out: a budget was spent.
    #[serde(rename = "over budget")]
    OverBudget,
}

/// Why nobody has used a primed result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnusedWord {
    /// Something else was expected of the recorded action later.
    Superseded,
    /// The client asked for what writes the same files in another form.
    AskedOtherwise,
    /// The client did not ask for it.
    NotAsked,
    /// The client asked for it, and had its answer otherwise.
    TooLate,
}

impl UnusedWord {
    /// As it is written.
    pub fn word(self) -> &'static str {
        match self {
            UnusedWord::Superseded => "superseded",
            UnusedWord::AskedOtherwise => "asked_otherwise",
            UnusedWord::NotAsked => "not_asked",
            UnusedWord::TooLate => "too_late",
        }
    }
}

/// What made primed work out what an action has become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trigger {
    /// A look at the workspace when a build began, or missed something.
    Workspace,
    /// A look at the workspace when a source file was saved.
    Saved,
    /// Its parent was asked for.
    Parent,
    /// Something that its parent depends on was asked for.
    Dependency,
    /// A client executed something that was not foreseen.
    Observed,
    /// An action that it waited for was done.
    Completed,
    /// The same as any of these, by records that others have shared.
    Shared,
}

/// A file of an input tree that is not what was recorded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChangeEntry {
    /// Relative to the input root.
    pub path: String,
    /// What was recorded; `None` where nothing was.
    pub from: Option<String>,
    /// What it is now; `None` if it is gone.
    pub to: Option<String>,
    /// What says so.
    pub by: By,
    /// A path, or the recorded action that writes it.
    pub origin: String,
}
