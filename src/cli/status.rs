//! `primed status`: what a running primed has recorded and primed.

use std::io::Write;

use clap::Args;
use serde_json::Value;

use super::{AdminAddress, Failure, admin_client, block_on, exit_codes};
use crate::server::STATUS_PATH;

/// Show what a running primed has recorded and primed.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Print one JSON object.
    #[arg(long, env = "PRIMED_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
    #[command(flatten)]
    admin: AdminAddress,
}

pub(super) fn run(arguments: Arguments) -> Result<(), Failure> {
    let admin = arguments.admin.resolve()?;
    let page = block_on(admin_client::get(&admin, STATUS_PATH))?;
    let text = if arguments.json {
        format!("{}\n", String::from_utf8_lossy(&page))
    } else {
        let status: Value = serde_json::from_slice(&page).map_err(|error| {
            let message = format!("primed at {admin} answered what is no status: {error}");
            Failure::new(exit_codes::FAILURE, message)
        })?;
        for_people(&status)
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|error| Failure::new(exit_codes::FAILURE, error))
}

fn for_people(status: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    let records = &status["records"];
    let speculation = &status["speculation"];
    let mut lines = vec![
        format!("primed {}", text(&status["version"])),
        format!(
            "upstream     {} ({})",
            text(&status["upstream"]["address"]),
            text(&status["upstream"]["state"])
        ),
        format!(
            "records      {} actions of {} parents",
            number(&records["actions"]),
            number(&records["parents"])
        ),
        format!(
            "speculation  {} queued, {} running, {} completed, {} failed, {} unadaptable",
            number(&speculation["queued"]),
            number(&speculation["running"]),
            number(&speculation["completed"]),
            number(&speculation["failed"]),
            number(&speculation["unadaptable"])
        ),
    ];
    let builds = status["builds"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    if !builds.is_empty() {
        lines.push(String::new());
        lines.push(format!(
            "{:>6} {:>6} {:>6} {:>6} {:>6} {:>6} {:>8}  {}",
            "asked", "cached", "hit", "joined", "missed", "primed", "saved", "build, newest first"
        ));
    }
    for build in builds {
        let saved = number(&build["saved_ms"]) as f64 / 1000.0;
        lines.push(format!(
            "{:>6} {:>6} {:>6} {:>6} {:>6} {:>6} {:>6.1} s  {}{}",
            number(&build["asked"]),
            number(&build["cached"]),
            number(&build["hit"]),
            number(&build["joined"]),
            number(&build["missed"]),
            number(&build["primed"]),
            saved,
            text(&build["label"]),
            if build["ended_unix_ms"].is_null() {
                " (running)"
            } else {
                ""
            },
        ));
    }
    lines.join("\n") + "\n"
}
