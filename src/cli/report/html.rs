//! A build as one HTML page: style, script and data in one file that asks nobody for anything.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::timeline::Timeline;

const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// What the script finds.
#[derive(Debug, Serialize)]
pub struct Content<'a> {
    /// The build's page, as primed gave it.
    pub build: &'a Value,
    /// Where its actions stand.
    pub timeline: &'a Timeline,
    /// What primed says of misses, by action.
    pub explanations: &'a BTreeMap<String, String>,
    /// Who wrote it.
    pub version: &'static str,
}

/// The page.
pub fn page(content: &Content) -> serde_json::Result<String> {
    // In a script's text `<` can begin an end tag or a comment, and as an escape it cannot.
    let content = serde_json::to_string(content)?.replace('<', "\\u003c");
    // One part after the other: what is put in is not searched for the next mark.
    let (head, rest) = split(PAGE, "/*STYLE*/");
    let (middle, rest) = split(rest, "/*CONTENT*/");
    let (before_script, tail) = split(rest, "/*SCRIPT*/");
    let parts = [head, STYLE, middle, &content, before_script, SCRIPT, tail];
    Ok(parts.concat())
}

fn split<'a>(text: &'a str, mark: &str) -> (&'a str, &'a str) {
    text.split_once(mark).unwrap_or((text, ""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::build_page::BuildPage;

    #[test]
    fn a_page_holds_everything_and_no_path_can_end_its_script() {
        let build =
            serde_json::json!({ "label": "</script><!--<script>/*SCRIPT*/", "actions": [] });
        let text = page(&Content {
            build: &build,
            timeline: &Timeline::of(&BuildPage::default()),
            explanations: &BTreeMap::new(),
            version: "1",
        })
        .unwrap();
        assert!(text.contains(STYLE) && text.contains(SCRIPT));
        let empty = PAGE.matches("</script>").count();
        assert_eq!(text.matches("</script").count(), empty);
        assert_eq!(text.matches("<!--").count(), 0);
        assert!(text.contains("\\u003c/script>"));
        assert!(
            !text.contains("http:") && !text.contains("https:"),
            "it asks nobody"
        );
    }
}
