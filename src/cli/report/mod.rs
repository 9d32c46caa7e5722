//! `primed report`: one build as a page to look at, or as a trace for Perfetto. Everything comes
//! from the running primed's page of that build; the result stands alone, without the network.

mod html;
mod timeline;
mod trace;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use clap::{Args, ValueEnum};
use http::Method;
use serde::Deserialize;
use serde_json::Value;

use super::admin_client::AdminClient;
use super::build_page::BuildPage;
use super::{Daemon, Failure, block_on, exit_codes};
use crate::address::Address;
use crate::server::{BUILDS_PATH, EXPLAIN_PATH};
use crate::speculation::explanation::explain::{Explanations, Question};

/// Write a build as an HTML page with its timeline, or as a trace for Perfetto.
#[derive(Debug, Args)]
pub struct Arguments {
    /// A build's id, as much of its beginning as no other has, or `last`.
    #[arg(default_value = "last")]
    build: String,
    /// The file to write, or `-` for stdout [default: primed-BUILD.html or primed-BUILD.json].
    #[arg(long, short, env = "PRIMED_OUTPUT", value_name = "FILE")]
    output: Option<PathBuf>,
    /// What to write.
    #[arg(
        long,
        env = "PRIMED_FORMAT",
        default_value = "html",
        value_name = "FORMAT"
    )]
    format: Format,
    #[command(flatten)]
    daemon: Daemon,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// A page for any browser.
    Html,
    /// Trace events, for ui.perfetto.dev or chrome://tracing.
    Trace,
}

impl Format {
    fn extension(self) -> &'static str {
        match self {
            Format::Html => "html",
            Format::Trace => "json",
        }
    }
}

pub(super) fn run(arguments: Arguments, file: Option<&Path>) -> Result<(), Failure> {
    let (admin, build, explanations) = block_on(async {
        let admin = arguments.daemon.visit(file).await?;
        let mut client = AdminClient::connect(&admin).await?;
        let build = fetch(&admin, &mut client, &arguments.build).await?;
        let explanations = match arguments.format {
            Format::Html => explain(&mut client, &build).await,
            Format::Trace => BTreeMap::new(),
        };
        Ok((admin, build, explanations))
    })?;
    let unreadable = |error| unreadable(&admin, &error);
    let page = BuildPage::deserialize(&build).map_err(unreadable)?;
    let text = match arguments.format {
        Format::Trace => trace::of(&page).to_string(),
        Format::Html => html::page(&html::Content {
            build: &build,
            timeline: &timeline::Timeline::of(&page),
            explanations: &explanations,
            version: env!("CARGO_PKG_VERSION"),
        })
        .map_err(unreadable)?,
    };
    let output = arguments.output.unwrap_or_else(|| {
        let extension = arguments.format.extension();
        format!("primed-{}.{extension}", page.id).into()
    });
    write(&output, text.as_bytes()).map_err(|error| {
        let message = format!("{} cannot be written: {error}", output.display());
        Failure::new(exit_codes::FAILURE, message)
    })?;
    if output != Path::new("-") {
        eprintln!("primed: {} shows {}", output.display(), page.label);
    }
    Ok(())
}

/// The page of the build that `named` means.
async fn fetch(admin: &Address, client: &mut AdminClient, named: &str) -> Result<Value, Failure> {
    let id = match named {
        "last" => last(
            admin,
            &client.send(Method::GET, BUILDS_PATH, Bytes::new()).await?,
        )?,
        named => named.to_owned(),
    };
    let path = format!("{BUILDS_PATH}/{id}");
    let page = client.send(Method::GET, &path, Bytes::new()).await?;
    serde_json::from_slice(&page).map_err(|error| unreadable(admin, &error))
}

/// What primed says of what `build` missed, by action. A report goes without, if it says nothing.
async fn explain(client: &mut AdminClient, build: &Value) -> BTreeMap<String, String> {
    let question = Question {
        build: build["id"].as_str().map(str::to_owned),
        ..Question::default()
    };
    let Ok(question) = serde_json::to_vec(&question) else {
        return BTreeMap::new();
    };
    let asked = client.send(Method::POST, EXPLAIN_PATH, question.into());
    let answer: Explanations = match asked.await.map(|page| serde_json::from_slice(&page)) {
        Ok(Ok(answer)) => answer,
        _ => return BTreeMap::new(),
    };
    let told = answer.explanations.into_iter().map(|one| {
        let hints = one.hints.iter().map(|hint| format!("\nhint: {hint}"));
        (one.entry.action, one.summary + &hints.collect::<String>())
    });
    told.collect()
}

fn last(admin: &Address, list: &[u8]) -> Result<String, Failure> {
    let list: Value = serde_json::from_slice(list).map_err(|error| unreadable(admin, &error))?;
    let id = list["builds"][0]["id"].as_str();
    id.map(str::to_owned).ok_or_else(|| {
        let message =
            format!("primed at {admin} has seen no build yet; run one through it, then ask again");
        Failure::new(exit_codes::FAILURE, message)
    })
}

fn write(output: &Path, text: &[u8]) -> std::io::Result<()> {
    if output == Path::new("-") {
        let mut stdout = std::io::stdout().lock();
        return stdout.write_all(text).and_then(|()| stdout.flush());
    }
    std::fs::write(output, text)
}

fn unreadable(admin: &Address, error: &serde_json::Error) -> Failure {
    let message = format!("primed at {admin} answered what is no build: {error}");
    Failure::new(exit_codes::FAILURE, message)
}
