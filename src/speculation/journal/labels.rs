//! What people call an action: its first output, or else its command in short. Made when somebody
//! wants to know, from the record or from the `Command` in the CAS.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use quick_cache::sync::Cache;

use crate::cas::Digest;
use crate::cas::outputs::normalized;
use crate::cas::transfer::Cas;
use crate::reapi::{Action, Command};
use crate::speculation::flights::FlightKey;
use crate::speculation::records::parent::BaseAction;

/// Names that are remembered.
const REMEMBERED: usize = 50_000;
/// Outputs of one action that are named.
const MAX_OUTPUTS: usize = 16;
/// Characters of a command that stand for it.
const MAX_COMMAND: usize = 60;
/// Actions whose commands are read at once.
const CHUNK: usize = 1000;

/// What an action is called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Name {
    /// Its first output, or its command in short.
    pub label: String,
    /// Its outputs, where it has several.
    pub outputs: Vec<String>,
}

impl Name {
    /// Of a recorded action.
    pub fn of_recorded(base: &BaseAction) -> Option<Self> {
        let outputs = base.outputs.iter().map(|(path, _)| path.clone());
        Name::of_outputs(outputs.take(MAX_OUTPUTS).collect())
    }

    /// Of whatever runs `command`.
    pub fn of_command(command: &Command) -> Self {
        Name::of_outputs(declared_outputs(command)).unwrap_or_else(|| Name {
            label: in_short(&command.arguments.join(" ")),
            outputs: Vec::new(),
        })
    }

    /// Of an action of which nothing can be read.
    pub fn of_unknown(action: Digest) -> Self {
        let digest = action.to_string();
        Name {
            label: format!("action {}", digest.get(..12).unwrap_or(&digest)),
            outputs: Vec::new(),
        }
    }

    fn of_outputs(mut outputs: Vec<String>) -> Option<Self> {
        outputs.sort_unstable();
        outputs.truncate(MAX_OUTPUTS);
        let label = outputs.first()?.clone();
        if outputs.len() == 1 {
            outputs.clear();
        }
        Some(Name { label, outputs })
    }
}

/// What a command says that it writes, relative to the input root.
pub fn declared_outputs(command: &Command) -> Vec<String> {
    #[allow(deprecated, reason = "clients of older versions of REAPI use them")]
    let older = command
        .output_files
        .iter()
        .chain(&command.output_directories);
    let all = command.output_paths.iter().chain(older);
    all.filter_map(|path| normalized(&command.working_directory, path))
        .collect()
}

fn in_short(text: &str) -> String {
    let mut short: String = text.chars().take(MAX_COMMAND).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// The names of actions of which nothing is recorded.
#[derive(Clone)]
pub struct Names {
    known: Arc<Cache<FlightKey, Arc<Name>>>,
}

impl Default for Names {
    fn default() -> Self {
        Names {
            known: Arc::new(Cache::new(REMEMBERED)),
        }
    }
}

impl Names {
    /// The names of `actions`, as far as their `Action`s and `Command`s are in the CAS.
    pub async fn of(&self, cas: &Cas, actions: &[FlightKey]) -> HashMap<FlightKey, Arc<Name>> {
        let mut names = HashMap::new();
        let mut unknown: HashMap<Arc<str>, Vec<Digest>> = HashMap::new();
        for key in actions {
            match self.known.get(key) {
                Some(name) => {
                    names.insert(key.clone(), name);
                }
                None => unknown
                    .entry(key.instance.clone())
                    .or_default()
                    .push(key.action),
            }
        }
        for (instance, digests) in unknown {
            for chunk in digests.chunks(CHUNK) {
                for (action, command) in commands(cas, &instance, chunk).await {
                    let key = FlightKey {
                        instance: instance.clone(),
                        action,
                    };
                    let name = Arc::new(Name::of_command(&command));
                    self.known.insert(key.clone(), name.clone());
                    names.insert(key, name);
                }
            }
        }
        names
    }
}

/// The commands of `actions`, as far as they are in the CAS.
pub async fn commands(cas: &Cas, instance: &str, actions: &[Digest]) -> Vec<(Digest, Command)> {
    let found = async {
        let encoded = cas.fetch(instance, actions.iter().copied()).await?;
        let command_of = |digest: Digest, encoded: &Bytes| {
            let action = Action::decode(encoded.clone()).ok()?;
            let read = digest.function().read(action.command_digest.as_ref());
            Some((digest, read.ok()?))
        };
        let named = encoded.iter();
        let named: Vec<_> = named
            .filter_map(|(digest, encoded)| command_of(*digest, encoded))
            .collect();
        let digests = named.iter().map(|(_, command)| *command);
        let commands = cas.fetch(instance, digests).await?;
        let decoded = named.into_iter().filter_map(|(action, command)| {
            let command = Command::decode(commands.get(&command)?.clone()).ok()?;
            Some((action, command))
        });
        Ok::<_, tonic::Status>(decoded.collect())
    };
    found.await.unwrap_or_else(|status| {
        tracing::debug!(%status, "commands cannot be read");
        Vec::new()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cas::memory::Memory;
    use crate::cas::{Digest, DigestFunction};

    fn command(outputs: &[&str]) -> Command {
        Command {
            arguments: ["cc", "-c", "src/a.c"].map(str::to_owned).to_vec(),
            working_directory: "build".to_owned(),
            output_paths: outputs.iter().map(|path| (*path).to_owned()).collect(),
            ..Command::default()
        }
    }

    #[test]
    fn an_action_is_called_by_its_first_output_or_its_command() {
        let name = Name::of_command(&command(&["b.o", "../a.d"]));
        assert_eq!(name.label, "a.d");
        assert_eq!(name.outputs, ["a.d", "build/b.o"]);
        assert_eq!(Name::of_command(&command(&[])).label, "cc -c src/a.c");
    }

    #[tokio::test]
    async fn names_are_read_from_the_cas_once_and_what_is_not_there_has_none() {
        let (digest, encoded) = DigestFunction::Sha256.of_message(&command(&["a.o"]));
        let action = Action {
            command_digest: Some(digest.to_proto()),
            ..Action::default()
        };
        let (action, encoded_action) = DigestFunction::Sha256.of_message(&action);
        let memory = Memory::holding([encoded, encoded_action]);
        let cas = Cas::new(memory.clone());
        let key = |action| FlightKey {
            instance: "".into(),
            action,
        };
        let names = Names::default();
        let wanted = [key(action), key(Digest::of(b"absent"))];
        for _ in 0..2 {
            let found = names.of(&cas, &wanted[..1]).await;
            assert_eq!(found[&wanted[0]].label, "build/a.o");
        }
        assert_eq!(memory.batches_read.lock().len(), 2, "action and command");
        assert!(names.of(&cas, &wanted[1..]).await.is_empty());
    }
}
