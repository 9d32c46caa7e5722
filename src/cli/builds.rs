//! `primed builds`: the builds that primed knows, also those of its earlier runs.

use std::path::Path;

use clap::Args;

use super::{Daemon, Failure, admin_client, block_on, exit_codes, shown};
use crate::server::{BUILDS_PATH, BuildsList};
use crate::speculation::journal::accounting::BuildStatus;

/// What stands above the table.
const HEAD: &str = "when            took asked cached   hit joined missed recall    saved  what";

/// List builds and how they were answered, newest first.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Print one JSON object.
    #[arg(long, env = "PRIMED_JSON", value_parser = clap::builder::FalseyValueParser::new())]
    json: bool,
    /// How many builds to list.
    #[arg(
        short,
        long,
        env = "PRIMED_NUMBER",
        value_name = "COUNT",
        default_value_t = 20
    )]
    number: usize,
    #[command(flatten)]
    daemon: Daemon,
}

pub(super) fn run(arguments: Arguments, file: Option<&Path>) -> Result<(), Failure> {
    let (admin, page) = block_on(async {
        let admin = arguments.daemon.visit(file).await?;
        let page = admin_client::get(&admin, BUILDS_PATH).await?;
        Ok((admin, page))
    })?;
    let mut list: BuildsList = serde_json::from_slice(&page).map_err(|error| {
        let message = format!("primed at {admin} answered what is no list of builds: {error}");
        Failure::new(exit_codes::FAILURE, message)
    })?;
    list.builds.truncate(arguments.number);
    let text = match arguments.json {
        true => serde_json::to_string(&list)
            .map_err(|error| Failure::new(exit_codes::FAILURE, error))?,
        false => for_people(&list.builds),
    };
    shown::print(&format!("{}\n", text.trim_end()))
}

fn for_people(builds: &[BuildStatus]) -> String {
    if builds.is_empty() {
        return "no builds are known yet; run one with RECC_SERVER set to primed's address"
            .to_owned();
    }
    let id_length = shown::id_length(builds.iter().map(|build| build.id.as_str()));
    let mut lines = vec![format!("{:id_length$}  {HEAD}", "build")];
    for build in builds {
        let id = build.id.get(..id_length).unwrap_or(&build.id);
        let took = match build.ended_unix_ms {
            Some(ended) => shown::span(build.started_unix_ms, ended),
            None => "running".to_owned(),
        };
        let recall = match build.accounting.recall {
            Some(recall) => format!("{:.0} %", recall * 100.0),
            None => "-".to_owned(),
        };
        let counts = &build.counts;
        let numbers = format!(
            "{id}  {} {took:>8} {:>5} {:>6} {:>5} {:>6} {:>6} {recall:>6} {:>8}  ",
            shown::date_and_time(build.started_unix_ms)
                .get(5..16)
                .unwrap_or_default(),
            counts.asked,
            counts.cached,
            counts.hit,
            counts.joined,
            counts.missed,
            shown::duration(counts.saved_ms),
        );
        let room = shown::WIDTH.saturating_sub(numbers.chars().count());
        lines.push(numbers + &shown::cut(&build.label, room.max(12)));
    }
    lines.join("\n")
}
