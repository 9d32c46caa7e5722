//! Where `primed export` and `primed import` find records: with the primed that has them open, or,
//! where none does, in the state directory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use clap::Args;
use http::Method;

use super::admin_client::AdminClient;
use super::{AdminAddress, Failure, exit_codes};
use crate::config::Environment;
use crate::server::{RECORDS_PATH, RecordsList};
use crate::speculation::recording::archive::{self, Imported, Incoming, Listed};
use crate::speculation::records::parent::WeakKey;
use crate::speculation::records::store::{OpenError, Store};

/// Which records are meant.
#[derive(Debug, Args)]
pub struct RecordsArguments {
    #[command(flatten)]
    admin: AdminAddress,
    /// Where records are kept. A running primed that keeps its records there is asked for them;
    /// otherwise they are read where they are [default: those of the primed at --admin, or, if
    /// there is none, $XDG_STATE_HOME/primed].
    #[arg(long, env = "PRIMED_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

/// The records, and how they are reached.
pub enum Records {
    /// A running primed has them.
    Running(AdminClient),
    /// They lie in this directory, and there are none if there is no store.
    Lying {
        /// The state directory.
        directory: PathBuf,
        /// What is in it.
        store: Option<Arc<Store>>,
    },
}

impl RecordsArguments {
    /// Finds the records; a store is made if there is none and they are `to_be_written`.
    pub async fn open(self, to_be_written: bool) -> Result<Records, Failure> {
        let mut in_use = String::new();
        if let Ok(admin) = self.admin.find().await {
            match AdminClient::connect(&admin).await {
                Ok(mut client) => {
                    let list = list(&mut client).await?;
                    if let Some(kept_in) = list.state_dir
                        && self
                            .state_dir
                            .as_deref()
                            .is_none_or(|dir| same(dir, &kept_in))
                    {
                        return Ok(Records::Running(client));
                    }
                    in_use = format!("; the primed at {admin} keeps other records");
                }
                Err(_) => in_use = format!("; none answers at {admin}"),
            }
        }
        let directory = match self.state_dir {
            Some(directory) => directory,
            None => Environment::of_process().default_state_dir()?,
        };
        let opened = Store::open_for_command(&directory, to_be_written);
        let store = opened.map_err(|error| {
            let directory = directory.display();
            let message = match error {
                OpenError::InUse => format!(
                    "another primed has the records in {directory} open{in_use}; name its admin \
                     socket with --admin"
                ),
                error => format!("the records in {directory} cannot be opened: {error}"),
            };
            Failure::new(exit_codes::FAILURE, message)
        })?;
        Ok(Records::Lying {
            directory,
            store: store.map(Arc::new),
        })
    }
}

impl Records {
    /// The recorded parents.
    pub async fn list(&mut self) -> Result<Vec<Listed>, Failure> {
        match self {
            Records::Running(client) => Ok(list(client).await?.parents),
            Records::Lying { directory, store } => {
                let store = opened(directory, store.as_ref())?;
                archive::list(store).map_err(failed)
            }
        }
    }

    /// The records of a parent as a message.
    pub async fn export(&mut self, key: WeakKey) -> Result<Bytes, Failure> {
        match self {
            Records::Running(client) => {
                let path = format!("{RECORDS_PATH}/{key}");
                client.send(Method::GET, &path, Bytes::new()).await
            }
            Records::Lying { directory, store } => {
                let store = opened(directory, store.as_ref())?;
                archive::export(store, None, key).await.map_err(failed)
            }
        }
    }

    /// Takes in a message.
    pub async fn import(&mut self, incoming: Incoming) -> Result<Imported, Failure> {
        match self {
            Records::Running(client) => {
                let path = match incoming.key {
                    Some(key) => format!("{RECORDS_PATH}/{key}"),
                    None => RECORDS_PATH.to_owned(),
                };
                let method = match incoming.replace {
                    true => Method::PUT,
                    false => Method::POST,
                };
                parse(&client.send(method, &path, incoming.message).await?)
            }
            Records::Lying { directory, store } => {
                let store = opened(directory, store.as_ref())?;
                let imported = archive::import(store, None, incoming).await;
                imported.map(|(imported, _)| imported).map_err(failed)
            }
        }
    }
}

async fn list(client: &mut AdminClient) -> Result<RecordsList, Failure> {
    parse(&client.send(Method::GET, RECORDS_PATH, Bytes::new()).await?)
}

fn parse<'a, T: serde::Deserialize<'a>>(page: &'a [u8]) -> Result<T, Failure> {
    serde_json::from_slice(page).map_err(|error| {
        let message = format!("the running primed answered what this one cannot read: {error}");
        Failure::new(exit_codes::FAILURE, message)
    })
}

fn opened<'a>(directory: &Path, store: Option<&'a Arc<Store>>) -> Result<&'a Arc<Store>, Failure> {
    store.ok_or_else(|| {
        let message = format!(
            "no primed that has records is running, and there are none in {}; name others with \
             --state-dir",
            directory.display()
        );
        Failure::new(exit_codes::FAILURE, message)
    })
}

fn failed(error: impl ToString) -> Failure {
    Failure::new(exit_codes::FAILURE, error)
}

fn same(one: &Path, other: &Path) -> bool {
    match (one.canonicalize(), other.canonicalize()) {
        (Ok(one), Ok(other)) => one == other,
        _ => one == other,
    }
}
