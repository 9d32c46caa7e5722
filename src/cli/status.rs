//! `primed status`: what a running primed has recorded and primed.

use std::io::Write;

use clap::Args;
use serde_json::Value;

use super::{AdminAddress, Failure, admin_client, block_on, exit_codes, shown};
use crate::address::Address;
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
    let admin = block_on(async { Ok(arguments.admin.find().await?) })?;
    let page = block_on(admin_client::get(&admin, STATUS_PATH))?;
    let text = if arguments.json {
        format!("{}\n", String::from_utf8_lossy(&page))
    } else {
        text(&admin, &page)?
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|error| Failure::new(exit_codes::FAILURE, error))
}

/// The status page of the primed at `admin`, for people.
pub fn text(admin: &Address, page: &[u8]) -> Result<String, Failure> {
    let status = serde_json::from_slice(page).map_err(|error| {
        let message = format!("primed at {admin} answered what is no status: {error}");
        Failure::new(exit_codes::FAILURE, message)
    })?;
    Ok(for_people(&status))
}

fn for_people(status: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    let records = &status["records"];
    let speculation = &status["speculation"];
    let mut lines = vec![
        format!("primed {}", text(&status["version"])),
        format!(
            "upstream     {} ({}){}",
            text(&status["upstream"]["address"]),
            text(&status["upstream"]["state"]),
            embedded(&status["upstream"]["embedded"])
        ),
        format!(
            "records      {} actions of {} parents",
            number(&records["actions"]),
            number(&records["parents"])
        ),
    ];
    let directories = status["watch"]["directories"].as_u64();
    lines.extend(directories.map(|count| format!("watch        {count} directories")));
    lines.push(format!(
        "speculation  {} queued, {} running, {} completed, {} failed, {} unadaptable",
        number(&speculation["queued"]),
        number(&speculation["running"]),
        number(&speculation["completed"]),
        number(&speculation["failed"]),
        number(&speculation["unadaptable"])
    ));
    let totals = &status["totals"];
    if totals["recall"].is_number() || totals["precision"].is_number() {
        lines.push(format!("accounting   {}", accounting(totals)));
    }
    lines.extend(adaptation(totals).map(|cost| format!("adaptation   {cost}")));
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

/// What the embedded backend does and keeps, where there is one.
fn embedded(usage: &Value) -> String {
    let number = |name: &str| usage[name].as_u64().unwrap_or_default();
    match usage.is_object() {
        true => format!(
            ", {} running, {} queued, {} of {} cached",
            number("running"),
            number("queued"),
            shown::bytes(number("cache_bytes")),
            shown::bytes(number("cache_limit")),
        ),
        false => String::new(),
    }
}

/// What adapting took, and what it was in vain for; `None` where nothing was adapted.
fn adaptation(totals: &Value) -> Option<String> {
    let added = totals["added_bytes"].as_u64().filter(|added| *added > 0)?;
    let inputs = totals["input_bytes"].as_u64().filter(|inputs| *inputs > 0);
    let part =
        inputs.map(|inputs| format!(" ({:.1} % of inputs)", added as f64 / inputs as f64 * 100.0));
    let mut cost = format!(
        "{} added to the CAS{}",
        shown::bytes(added),
        part.unwrap_or_default()
    );
    if let Some(submission) = totals["submission_ms"].as_u64() {
        cost += &format!(", all submitted within {}", shown::duration(submission));
    }
    let unused = totals["unused"].as_object().into_iter().flatten();
    let unused: Vec<String> = unused
        .map(|(reason, count)| format!("{count} {}", reason.replace('_', " ")))
        .collect();
    if !unused.is_empty() {
        cost += &format!("; not used: {}", unused.join(", "));
    }
    Some(cost)
}

/// What priming did and what it cost, over all builds that are listed.
fn accounting(totals: &Value) -> String {
    let percent = |name: &str| match totals[name].as_f64() {
        Some(ratio) => format!("{:.0} %", ratio * 100.0),
        None => "-".to_owned(),
    };
    let time = |name: &str| shown::duration(totals[name].as_u64().unwrap_or_default());
    let lead = match totals["lead_p50_ms"].is_number() {
        true => format!(
            "lead {} (p95 {}), ",
            time("lead_p50_ms"),
            time("lead_p95_ms")
        ),
        false => String::new(),
    };
    format!(
        "recall {}, precision {}, {lead}{} saved, {} wasted",
        percent("recall"),
        percent("precision"),
        time("saved_ms"),
        time("wasted_ms"),
    )
}
