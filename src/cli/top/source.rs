//! Asks a running primed how things stand, once a second and whenever another build is looked at.
//! One that is gone is asked again until it is back.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use http::Method;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, watch};

use crate::address::Address;
use crate::cli::admin_client::AdminClient;
use crate::cli::build_page::BuildPage;
use crate::server::{BUILDS_PATH, STATUS_PATH};

/// Between two questions.
const PAUSE: Duration = Duration::from_secs(1);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Running builds that are asked for the names of what runs.
const NAMED_BUILDS: usize = 4;

/// What primed said, or why it said nothing.
pub type Answer = Result<Seen, String>;

/// How things stand.
#[derive(Debug, Default)]
pub struct Seen {
    pub status: Status,
    /// The build that is looked at, or why it is not known.
    pub build: Option<Result<BuildPage, String>>,
    /// Names of running actions, by digest.
    pub labels: HashMap<String, String>,
}

/// `/status`, as far as it is shown. What an older primed does not say is empty.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Status {
    pub version: String,
    pub upstream: Upstream,
    pub records: Records,
    pub speculation: Speculation,
    pub builds: Vec<Build>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Upstream {
    pub address: String,
    pub state: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Records {
    pub actions: u64,
    pub parents: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Speculation {
    pub queued: u64,
    pub running: u64,
    pub completed: u64,
    pub failed: u64,
    pub unadaptable: u64,
    pub slots: u64,
    pub clients: u64,
    pub flights: Vec<Flight>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Flight {
    pub action: String,
    pub started_unix_ms: i64,
    pub wanted: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Build {
    pub id: String,
    pub label: String,
    pub started_unix_ms: i64,
    pub ended_unix_ms: Option<i64>,
    pub asked: u64,
    pub cached: u64,
    pub hit: u64,
    pub joined: u64,
    pub missed: u64,
    pub primed: u64,
    pub saved_ms: u64,
}

/// Sends an answer a second, with the build that is `wanted`, until nobody takes them.
pub async fn run(
    admin: Address,
    mut wanted: watch::Receiver<Option<String>>,
    answers: mpsc::Sender<Answer>,
) {
    let mut client = None;
    let mut labels = HashMap::new();
    loop {
        let build = wanted.borrow_and_update().clone();
        let asking = ask(&admin, &mut client, build.as_deref(), &mut labels);
        let answer = match tokio::time::timeout(PATIENCE, asking).await {
            Ok(answer) => answer,
            Err(_) => Err(format!(
                "primed at {admin} has not answered for {} s",
                PATIENCE.as_secs()
            )),
        };
        if answer.is_err() {
            client = None;
        }
        if answers.send(answer).await.is_err() {
            return;
        }
        // Over early when another build is wanted; a screen that is gone shows at the next answer.
        let _ = tokio::time::timeout(PAUSE, wanted.changed()).await;
    }
}

async fn ask(
    admin: &Address,
    client: &mut Option<AdminClient>,
    build: Option<&str>,
    labels: &mut HashMap<String, String>,
) -> Answer {
    let client = match client {
        Some(client) => client,
        None => {
            let connected = AdminClient::connect(admin).await;
            client.insert(connected.map_err(|failure| failure.message)?)
        }
    };
    let status: Status = page(client, STATUS_PATH).await?;
    let build = match build {
        Some(id) => Some(page(client, &format!("{BUILDS_PATH}/{id}")).await),
        None => None,
    };
    let flights = &status.speculation.flights;
    labels.retain(|action, _| flights.iter().any(|flight| flight.action == *action));
    let running = status.builds.iter();
    let running = running.filter(|build| build.ended_unix_ms.is_none());
    for running in running.take(NAMED_BUILDS) {
        if flights.iter().all(|one| labels.contains_key(&one.action)) {
            break;
        }
        // Without its journal, its actions go by their digests.
        let path = format!("{BUILDS_PATH}/{}", running.id);
        let Ok(journal) = page::<BuildPage>(client, &path).await else {
            continue;
        };
        let named = journal.actions.into_iter();
        let named = named.filter(|action| flights.iter().any(|one| one.action == action.action));
        labels.extend(named.map(|action| (action.action, action.label)));
    }
    Ok(Seen {
        status,
        build,
        labels: labels.clone(),
    })
}

async fn page<T: DeserializeOwned>(client: &mut AdminClient, path: &str) -> Result<T, String> {
    let sent = client.send(Method::GET, path, Bytes::new()).await;
    let page = sent.map_err(|failure| failure.message)?;
    serde_json::from_slice(&page)
        .map_err(|error| format!("the running primed answered what this one cannot read: {error}"))
}
