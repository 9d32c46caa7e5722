//! Takes in what a command has written, once all of its processes have ended: files, directories
//! and symlinks that were asked for, and what it said. What is absent is left out.

use std::collections::HashSet;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::action::{Assignment, Output, Wanted};
use super::failure::Failure;
use super::staging::Stage;
use crate::backend::embedded::blobs::Blobs;
use crate::backend::embedded::errors::WriteError;
use crate::digest::{Digest, DigestFunction};
use crate::reapi::command::OutputDirectoryFormat;
use crate::reapi::{
    ActionResult, Directory, DirectoryNode, FileNode, NodeProperties, OutputDirectory, OutputFile,
    OutputSymlink, SymlinkNode, Tree,
};

/// Deeper than this no output is followed.
const MAX_DEPTH: usize = 256;

/// Puts what the command has written into the CAS, and says in `result` what that is. Blocks.
///
/// # Errors
/// `Failure`, when the CAS does not take it, or an output is not what it must be.
pub fn take_in(
    blobs: &Blobs,
    assignment: &Assignment,
    stage: &Stage,
    result: &mut ActionResult,
) -> Result<(), Failure> {
    let taking = Taking {
        blobs,
        assignment,
        function: assignment.digest.function(),
    };
    result.stdout_digest = taking.said(&stage.stdout())?;
    result.stderr_digest = taking.said(&stage.stderr())?;
    let root = fs::canonicalize(stage.root()).map_err(Failure::internal)?;
    for output in &assignment.outputs {
        if let Some(place) = find(&root, &output.place) {
            taking.output(output, &place, result)?;
        }
    }
    Ok(())
}

/// Where an output is, if there is one: no symlink above it may lead out of the root.
fn find(root: &Path, place: &Path) -> Option<PathBuf> {
    let Some((parent, name)) = place.parent().zip(place.file_name()) else {
        return Some(root.to_owned());
    };
    let parent = fs::canonicalize(root.join(parent)).ok()?;
    parent.starts_with(root).then(|| parent.join(name))
}

struct Taking<'a> {
    blobs: &'a Blobs,
    assignment: &'a Assignment,
    function: DigestFunction,
}

impl Taking<'_> {
    /// What the command said on one of its outputs, if anything.
    fn said(&self, file: &Path) -> Result<Option<crate::reapi::Digest>, Failure> {
        match fs::metadata(file) {
            // A program that did not start said nothing.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unreadable(file, &error)),
            Ok(metadata) if metadata.len() == 0 => Ok(None),
            Ok(_) => Ok(Some(self.file(file)?.to_proto())),
        }
    }

    fn output(
        &self,
        output: &Output,
        place: &Path,
        result: &mut ActionResult,
    ) -> Result<(), Failure> {
        let metadata = match fs::symlink_metadata(place) {
            Ok(metadata) => metadata,
            Err(error) if is_absence(&error) => return Ok(()),
            Err(error) => return Err(unreadable(place, &error)),
        };
        let path = output.path.clone();
        if metadata.is_symlink() {
            let symlink = OutputSymlink {
                path,
                target: target(place)?,
                node_properties: self.properties(&metadata),
            };
            // Clients of version 2.0 look into the list for what they asked for.
            match output.wanted {
                Wanted::Any => {}
                Wanted::File => result.output_file_symlinks.push(symlink.clone()),
                Wanted::Directory => result.output_directory_symlinks.push(symlink.clone()),
            }
            result.output_symlinks.push(symlink);
        } else if metadata.is_file() && output.wanted != Wanted::Directory {
            result.output_files.push(OutputFile {
                path,
                digest: Some(self.file(place)?.to_proto()),
                is_executable: is_executable(&metadata),
                contents: Bytes::new(),
                node_properties: self.properties(&metadata),
            });
        } else if metadata.is_dir() && output.wanted != Wanted::File {
            let directory = self.output_directory(path, place)?;
            result.output_directories.push(directory);
        } else if output.wanted != Wanted::Any {
            return Err(Failure::precondition(format!(
                "the output {path:?} is not a {}, as the Command says",
                match output.wanted {
                    Wanted::Directory => "directory",
                    _ => "file",
                }
            )));
        } else {
            tracing::debug!(path, "an output is no file, directory or symlink: left out");
        }
        Ok(())
    }

    fn output_directory(&self, path: String, place: &Path) -> Result<OutputDirectory, Failure> {
        let format = self.assignment.directory_format;
        let mut found = Found::default();
        let root = self.directory(place, &mut found, MAX_DEPTH)?;
        if format != OutputDirectoryFormat::TreeOnly {
            for (digest, encoded, _) in &found.directories {
                self.write(*digest, encoded)?;
            }
        }
        let mut tree_digest = None;
        if format != OutputDirectoryFormat::DirectoryOnly {
            // They were found after what is below them.
            let mut directories = found.directories.into_iter().rev();
            let tree = Tree {
                root: directories.next().map(|(_, _, directory)| directory),
                children: directories.map(|(_, _, directory)| directory).collect(),
            };
            let (digest, encoded) = self.function.of_message(&tree);
            self.write(digest, &encoded)?;
            tree_digest = Some(digest.to_proto());
        }
        let is_rooted = format != OutputDirectoryFormat::TreeOnly;
        Ok(OutputDirectory {
            path,
            is_topologically_sorted: tree_digest.is_some(),
            tree_digest,
            root_directory_digest: is_rooted.then(|| root.to_proto()),
        })
    }

    /// Takes in a directory and all below it; each one is added to `found` after its subdirectories.
    fn directory(&self, place: &Path, found: &mut Found, depth: usize) -> Result<Digest, Failure> {
        let Some(depth) = depth.checked_sub(1) else {
            let message = format!("an output is deeper than {MAX_DEPTH} directories");
            return Err(Failure::precondition(message));
        };
        let refused = |error: io::Error| unreadable(place, &error);
        let metadata = fs::symlink_metadata(place).map_err(refused)?;
        let mut directory = Directory {
            node_properties: self.properties(&metadata),
            ..Directory::default()
        };
        for entry in fs::read_dir(place).map_err(refused)? {
            let entry = entry.map_err(refused)?;
            let path = entry.path();
            let name = entry.file_name().into_string().map_err(|name| {
                Failure::precondition(format!("the name of the output {name:?} is no UTF-8"))
            })?;
            let metadata = entry.metadata().map_err(refused)?;
            if metadata.is_symlink() {
                directory.symlinks.push(SymlinkNode {
                    name,
                    target: target(&path)?,
                    node_properties: self.properties(&metadata),
                });
            } else if metadata.is_dir() {
                let digest = self.directory(&path, found, depth)?.to_proto();
                directory.directories.push(DirectoryNode {
                    name,
                    digest: Some(digest),
                });
            } else if metadata.is_file() {
                directory.files.push(FileNode {
                    name,
                    digest: Some(self.file(&path)?.to_proto()),
                    is_executable: is_executable(&metadata),
                    node_properties: self.properties(&metadata),
                });
            } else {
                tracing::debug!(name, "no file, directory or symlink: left out of an output");
            }
        }
        directory.files.sort_by(|a, b| a.name.cmp(&b.name));
        directory.directories.sort_by(|a, b| a.name.cmp(&b.name));
        directory.symlinks.sort_by(|a, b| a.name.cmp(&b.name));
        let (digest, encoded) = self.function.of_message(&directory);
        if found.known.insert(digest) {
            found.directories.push((digest, encoded, directory));
        }
        Ok(digest)
    }

    fn file(&self, path: &Path) -> Result<Digest, Failure> {
        let added = self.blobs.add_file_now(self.function, path);
        added.map_err(|error| match error {
            // Its owner may have taken away the right to read it.
            WriteError::Io(error) => unreadable(path, &error),
            error => refused(&error),
        })
    }

    fn write(&self, digest: Digest, encoded: &Bytes) -> Result<(), Failure> {
        let written = self.blobs.write_now(digest, encoded);
        written.map_err(|error| refused(&error))
    }

    fn properties(&self, metadata: &Metadata) -> Option<NodeProperties> {
        let (mtime, mode) = (self.assignment.wants_mtime, self.assignment.wants_unix_mode);
        (mtime || mode).then(|| NodeProperties {
            properties: vec![],
            mtime: mtime.then(|| prost_types::Timestamp {
                seconds: metadata.mtime(),
                nanos: i32::try_from(metadata.mtime_nsec()).unwrap_or(0),
            }),
            unix_mode: mode.then(|| metadata.permissions().mode() & 0o7777),
        })
    }
}

/// The directories of an output, each once.
#[derive(Default)]
struct Found {
    directories: Vec<(Digest, Bytes, Directory)>,
    known: HashSet<Digest>,
}

fn target(symlink: &Path) -> Result<String, Failure> {
    let target = fs::read_link(symlink).map_err(|error| unreadable(symlink, &error))?;
    target.into_os_string().into_string().map_err(|target| {
        Failure::precondition(format!("the target of a symlink, {target:?}, is no UTF-8"))
    })
}

fn is_executable(metadata: &Metadata) -> bool {
    metadata.permissions().mode() & 0o100 != 0
}

fn is_absence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    let name = path.file_name().unwrap_or(path.as_os_str());
    Failure::precondition(format!("the output {name:?} cannot be read: {error}"))
}

fn refused(error: &WriteError) -> Failure {
    let code = match error {
        WriteError::TooLarge { .. } | WriteError::Full { .. } | WriteError::DiskFull(_) => {
            tonic::Code::ResourceExhausted
        }
        _ => tonic::Code::Internal,
    };
    Failure::new(code, format!("the output cannot be kept: {error}"))
}
