//! A build's page of the admin socket, as `primed top` and `primed report` read it. What another
//! version of primed leaves out is absent here too, rather than an error.

use serde::Deserialize;

/// One build: what it asked for, and what was primed for it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct BuildPage {
    /// Differs for each build.
    pub id: String,
    /// For people.
    pub label: String,
    /// Milliseconds since 1970.
    pub started_unix_ms: i64,
    /// Milliseconds since 1970; `None` while it runs.
    pub ended_unix_ms: Option<i64>,
    /// In the order in which they became known.
    pub actions: Vec<ActionPage>,
    /// How many more there were than are kept.
    pub left_out: u64,
}

/// One action of a build.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ActionPage {
    /// Its digest, `HASH/SIZE`.
    pub action: String,
    /// The recorded action that it was adapted from.
    pub base: Option<String>,
    /// Its first output's path, or its command in short.
    pub label: String,
    /// The client's question for it.
    pub asked: Option<AskedPage>,
    /// What primed did about it.
    pub primed: Option<PrimedPage>,
}

/// A client's question for an action, from its first call to the answer that settled it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct AskedPage {
    /// Milliseconds since 1970.
    pub at_unix_ms: i64,
    /// Milliseconds since 1970; `None` while the client waits.
    pub answered_unix_ms: Option<i64>,
    /// `cached`, `hit`, `joined` or `missed`.
    pub answer: String,
    /// How long a worker ran it.
    pub executed_ms: u64,
}

/// The priming of an action. All times are milliseconds since 1970.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PrimedPage {
    /// When it became known that it should run.
    pub planned_unix_ms: i64,
    /// When the backend got it.
    pub started_unix_ms: Option<i64>,
    /// When that was over.
    pub ended_unix_ms: Option<i64>,
    /// `queued`, `running`, `primed`, `cached`, `unchanged`, `failed`, and so on.
    pub outcome: String,
    /// Why it came to that, where there is something to say.
    pub reason: Option<String>,
    /// How long a worker ran it.
    pub execution_ms: u64,
    /// When a client used the result first.
    pub used_unix_ms: Option<i64>,
    /// What set it off.
    pub trigger: String,
    /// The adapted actions that it waited for.
    pub after: Vec<String>,
}

impl BuildPage {
    /// The last moment that the page speaks of, in milliseconds since 1970.
    pub fn latest_unix_ms(&self) -> i64 {
        let moments = self.actions.iter().flat_map(|action| {
            let asked = action.asked.as_ref();
            let primed = action.primed.as_ref();
            [
                asked.map(|asked| asked.at_unix_ms),
                asked.and_then(|asked| asked.answered_unix_ms),
                primed.and_then(|primed| primed.started_unix_ms),
                primed.and_then(|primed| primed.ended_unix_ms),
            ]
        });
        let last = moments.flatten().chain(self.ended_unix_ms).max();
        last.unwrap_or_default().max(self.started_unix_ms)
    }
}

impl ActionPage {
    /// How long the result was there before the client used it; `None` where it was not primed, not
    /// used, or used as it came by one who had joined.
    pub fn lead_ms(&self) -> Option<u64> {
        let primed = self.primed.as_ref()?;
        let joined = |asked: &AskedPage| asked.answer == "joined";
        if primed.outcome != "primed" || self.asked.as_ref().is_some_and(joined) {
            return None;
        }
        let lead = primed.used_unix_ms? - primed.ended_unix_ms?;
        u64::try_from(lead).ok()
    }
}
