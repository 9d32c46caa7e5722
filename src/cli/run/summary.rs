//! What a run was worth, in one sentence.

use crate::speculation::engine::BuildStatus;

/// What is said when the command has ended.
pub fn sentence(build: Option<&BuildStatus>) -> String {
    let Some(build) = build else {
        return "it is not known how the command was answered; primed stopped meanwhile".to_owned();
    };
    let counts = &build.counts;
    if counts.asked == 0 {
        return "the command asked for no action; if it compiled anything, have it call recc: \
                with --recc, if it heeds CC and CXX, or with make CC='recc cc'"
            .to_owned();
    }
    let plural = if counts.asked == 1 { "" } else { "s" };
    let mut sentence = format!(
        "{} action{plural}: {} cached, {} hit, {} joined, {} missed; saved {}",
        counts.asked,
        counts.cached,
        counts.hit,
        counts.joined,
        counts.missed,
        seconds(counts.saved_ms)
    );
    if counts.missed > 0 {
        sentence.push_str("; explain with: primed explain --last-missed");
    }
    sentence
}

/// Milliseconds as seconds, for people.
pub fn seconds(ms: u64) -> String {
    format!("{}.{} s", ms / 1000, ms % 1000 / 100)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::speculation::journal::accounting::Counts;

    pub fn build() -> BuildStatus {
        BuildStatus {
            id: "id".to_owned(),
            parent: "run".into(),
            label: "make in /p".to_owned(),
            started_unix_ms: 0,
            ended_unix_ms: None,
            counts: Counts {
                asked: 40,
                cached: 2,
                hit: 36,
                joined: 1,
                missed: 1,
                primed: 38,
                used: 37,
                saved_ms: 31_270,
            },
            accounting: Default::default(),
        }
    }

    #[test]
    fn a_summary_counts_and_says_how_to_learn_more() {
        let mut build = build();
        assert_eq!(
            sentence(Some(&build)),
            "40 actions: 2 cached, 36 hit, 1 joined, 1 missed; saved 31.2 s; explain with: primed \
             explain --last-missed"
        );
        build.counts = Counts {
            asked: 1,
            hit: 1,
            ..Counts::default()
        };
        assert_eq!(
            sentence(Some(&build)),
            "1 action: 0 cached, 1 hit, 0 joined, 0 missed; saved 0.0 s"
        );
        build.counts.asked = 0;
        assert!(sentence(Some(&build)).contains("--recc"));
    }
}
