//! A project as large ones are: every source includes nearly all headers of some modules, and each
//! compile's input tree holds just what it reads. One header in a hundred is left out by an action
//! here and there, so that many trees share most of their directories, and few share all.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use primed::digest::{Digest, DigestFunction};
use primed::reapi::{Action, ActionResult, Command, Directory, DirectoryNode, FileNode};
use primed::speculation::flights::FlightKey;
use prost::Message;

use crate::backend::InMemory;
use crate::{key, result};

/// Headers of one module.
const MODULE: usize = 20;
/// Sources in one directory.
const SOURCES: usize = 100;

pub struct Project {
    directory: PathBuf,
    modules: usize,
    actions: usize,
    /// The content of the header that all include.
    core: String,
    /// All that the actions are made of, as things stand.
    blobs: HashMap<Digest, Bytes>,
    keys: Vec<FlightKey>,
}

impl Project {
    /// Writes it to disk.
    pub fn create(directory: &Path, actions: usize, inputs: usize) -> Self {
        let modules = inputs / MODULE;
        let mut project = Project {
            directory: directory.to_owned(),
            modules,
            actions,
            core: "int core_1;\n".to_owned(),
            blobs: HashMap::new(),
            keys: Vec::new(),
        };
        for module in 0..modules {
            let path = directory.join(format!("include/module_{module}"));
            std::fs::create_dir_all(&path).unwrap();
            for header in 0..MODULE {
                let content = project.header(module, header);
                std::fs::write(path.join(format!("header_{header}.h")), content).unwrap();
            }
        }
        for action in 0..actions {
            let path = directory.join(source_directory(action));
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join(source_name(action)), source(action)).unwrap();
        }
        project.assemble();
        project
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Puts what a first build uploads into the CAS.
    pub fn upload(&self, backend: &InMemory) {
        for (digest, blob) in &self.blobs {
            backend.hold(*digest, blob.clone());
        }
    }

    /// What the build asks for, in order.
    pub fn keys(&self) -> impl Iterator<Item = FlightKey> {
        self.keys.iter().cloned()
    }

    pub fn key(&self, action: usize) -> FlightKey {
        self.keys[action].clone()
    }

    /// What the action of this number came to in the first build.
    pub fn result(&self, action: usize) -> ActionResult {
        result(
            &format!("{}.o", source_name(action)),
            source(action).as_bytes(),
        )
    }

    /// Changes the header that all include.
    pub fn edit_core_header(&mut self) {
        self.core = "int core_2, more_than_before;\n".to_owned();
        let path = self.directory.join("include/module_0/header_0.h");
        std::fs::write(path, &self.core).unwrap();
        self.assemble();
    }

    /// How long it takes to encode and to hash all that a change of that header changes, and
    /// nothing else.
    pub fn encode_and_hash_what_changes(&self) -> Duration {
        let messages: Vec<Bytes> = self.blobs.values().cloned().collect();
        let directories: Vec<Directory> = messages
            .iter()
            .filter_map(|blob| {
                let directory = Directory::decode(blob.clone()).ok()?;
                let changes = directory
                    .directories
                    .iter()
                    .any(|it| it.name == "include" || it.name == "module_0")
                    || directory.files.iter().any(|it| it.name == "header_0.h");
                changes.then_some(directory)
            })
            .collect();
        let actions: Vec<Action> = self
            .keys()
            .map(|key| Action::decode(self.blobs[&key.action].clone()).unwrap())
            .collect();
        let began = Instant::now();
        for directory in &directories {
            std::hint::black_box(DigestFunction::Sha256.of_message(directory));
        }
        for action in &actions {
            std::hint::black_box(DigestFunction::Sha256.of_message(action));
        }
        began.elapsed()
    }

    fn header(&self, module: usize, header: usize) -> String {
        match (module, header) {
            (0, 0) => self.core.clone(),
            _ => format!("int declared_{module}_{header};\n"),
        }
    }

    fn keep(&mut self, message: &impl Message) -> Digest {
        let (digest, encoded) = DigestFunction::Sha256.of_message(message);
        self.blobs.insert(digest, encoded);
        digest
    }

    /// Makes the actions that a build asks for now.
    fn assemble(&mut self) {
        self.blobs.clear();
        self.keys.clear();
        let mut includes = HashMap::new();
        for action in 0..self.actions {
            // Which header it leaves out: never the first of a module.
            let header = 1 + action / self.modules % (MODULE - 1);
            let left_out = (action % self.modules, header);
            let include = match includes.get(&left_out) {
                Some(include) => *include,
                None => {
                    let include = self.include(left_out);
                    includes.insert(left_out, include);
                    include
                }
            };
            let action = self.action(action, include);
            self.keys.push(key(action));
        }
    }

    fn include(&mut self, left_out: (usize, usize)) -> Digest {
        let mut directories = Vec::new();
        for module in 0..self.modules {
            let headers = (0..MODULE).filter(|header| (module, *header) != left_out);
            let files = headers.map(|header| {
                let content = self.header(module, header);
                file(format!("header_{header}.h"), content.as_bytes())
            });
            let module_directory = Directory {
                files: sorted(files.collect(), |file| &file.name),
                ..Directory::default()
            };
            let digest = self.keep(&module_directory);
            directories.push(directory(format!("module_{module}"), digest));
        }
        self.keep(&Directory {
            directories: sorted(directories, |directory| &directory.name),
            ..Directory::default()
        })
    }

    /// The compile of one source.
    fn action(&mut self, action: usize, include: Digest) -> Digest {
        let (path, name) = (source_directory(action), source_name(action));
        let sources = self.keep(&Directory {
            files: vec![file(name.clone(), source(action).as_bytes())],
            ..Directory::default()
        });
        let input_root = self.keep(&Directory {
            directories: vec![
                directory("include".to_owned(), include),
                directory(path.clone(), sources),
            ],
            ..Directory::default()
        });
        let output = format!("{name}.o");
        let arguments = [
            "cc",
            "-Iinclude",
            "-c",
            &format!("{path}/{name}"),
            "-o",
            &output,
        ];
        let command = self.keep(&Command {
            arguments: arguments.map(str::to_owned).into(),
            output_paths: vec![output.clone()],
            ..Command::default()
        });
        self.keep(&Action {
            command_digest: Some(command.to_proto()),
            input_root_digest: Some(input_root.to_proto()),
            ..Action::default()
        })
    }
}

fn source_directory(action: usize) -> String {
    format!("sources_{}", action / SOURCES)
}

fn source_name(action: usize) -> String {
    format!("unit_{action}.c")
}

fn source(action: usize) -> String {
    format!("int defined_{action};\n")
}

fn file(name: String, content: &[u8]) -> FileNode {
    FileNode {
        name,
        digest: Some(Digest::of(content).to_proto()),
        ..FileNode::default()
    }
}

fn directory(name: String, digest: Digest) -> DirectoryNode {
    DirectoryNode {
        name,
        digest: Some(digest.to_proto()),
    }
}

/// REAPI wants the entries of a directory in the order of their names.
fn sorted<T>(mut entries: Vec<T>, name: impl Fn(&T) -> &String) -> Vec<T> {
    entries.sort_by(|one, other| name(one).cmp(name(other)));
    entries
}
