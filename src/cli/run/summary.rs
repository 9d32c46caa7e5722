//! What a run was worth, in one sentence.

use crate::speculation::engine::BuildStatus;

/// What is said when the command has ended.
pub fn sentence(build: Option<&BuildStatus>) -> String {
    let Some(build) = build else {
        return "it is not known how the command was answered; primed stopped meanwhile".to_owned();
    };
    if build.asked == 0 {
        return "the command asked for no action; if it compiled anything, have it call recc: \
                with --recc, if it heeds CC and CXX, or with make CC='recc cc'"
            .to_owned();
    }
    let plural = if build.asked == 1 { "" } else { "s" };
    let mut sentence = format!(
        "{} action{plural}: {} cached, {} hit, {} joined, {} missed; saved {}",
        build.asked,
        build.cached,
        build.hit,
        build.joined,
        build.missed,
        seconds(build.saved_ms)
    );
    if build.missed > 0 {
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

    pub fn build() -> BuildStatus {
        BuildStatus {
            id: "id".to_owned(),
            parent: "run".into(),
            label: "make in /p".to_owned(),
            started_unix_ms: 0,
            ended_unix_ms: None,
            asked: 40,
            cached: 2,
            hit: 36,
            joined: 1,
            missed: 1,
            primed: 38,
            used: 37,
            saved_ms: 31_270,
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
        (build.asked, build.cached, build.missed) = (1, 0, 0);
        (build.hit, build.joined) = (1, 0);
        assert_eq!(
            sentence(Some(&build)),
            "1 action: 0 cached, 1 hit, 0 joined, 0 missed; saved 31.2 s"
        );
        build.asked = 0;
        assert!(sentence(Some(&build)).contains("--recc"));
    }
}
