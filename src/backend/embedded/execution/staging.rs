//! Puts an input tree on disk for a command to run in: a fresh directory whose files are links to
//! the CAS, and read-only, and whose directories are its own.

use std::fs::{self, DirBuilder, File, FileTimes, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::action::Assignment;
use super::failure::Failure;
use super::tree::{self, InputTree};
use crate::backend::embedded::blobs::Blobs;
use crate::digest::Digest;

/// The directory of one execution.
#[derive(Clone)]
pub struct Stage {
    directory: PathBuf,
}

impl Stage {
    /// Puts `tree` on disk, with the directories that `assignment` wants to be there. Blocks.
    ///
    /// # Errors
    /// `Failure`, when the disk cannot take it, or a blob is damaged.
    pub fn set(blobs: &Blobs, tree: &InputTree, assignment: &Assignment) -> Result<Self, Failure> {
        let stage = Stage {
            directory: blobs.temporary_directory().join(Uuid::new_v4().to_string()),
        };
        let built = stage.build(blobs, tree, assignment);
        match built {
            Ok(()) => Ok(stage),
            Err(failure) => {
                stage.strike();
                Err(failure)
            }
        }
    }

    fn build(
        &self,
        blobs: &Blobs,
        tree: &InputTree,
        assignment: &Assignment,
    ) -> Result<(), Failure> {
        let refused = |error: io::Error| {
            Failure::internal(format!(
                "the inputs cannot be put into {}: {error}",
                self.directory.display()
            ))
        };
        let mut private = DirBuilder::new();
        private
            .mode(0o700)
            .create(&self.directory)
            .map_err(refused)?;
        fs::create_dir(self.temporary()).map_err(refused)?;
        let root = self.root();
        stage_directory(blobs, tree, tree.root, &root, false)?;
        make_directories(&root, &assignment.working_directory)?;
        for output in &assignment.outputs {
            let parent = output.place.parent().unwrap_or(Path::new(""));
            make_directories(&root, parent)?;
        }
        Ok(())
    }

    /// The input root.
    pub fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// What the command may have as its `/tmp`.
    pub fn temporary(&self) -> PathBuf {
        self.directory.join("tmp")
    }

    /// Where its standard output goes.
    pub fn stdout(&self) -> PathBuf {
        self.directory.join("stdout")
    }

    /// Where its standard error goes.
    pub fn stderr(&self) -> PathBuf {
        self.directory.join("stderr")
    }

    /// Removes it. What resists is left for the next start to remove. Blocks.
    pub fn strike(self) {
        if let Err(error) = remove(&self.directory) {
            let directory = self.directory.display();
            tracing::warn!(%directory, %error, "what an action left behind cannot be removed");
        }
    }
}

/// Makes `place` what `digest` says, `read_only` with all below if that was said above it.
fn stage_directory(
    blobs: &Blobs,
    tree: &InputTree,
    digest: Digest,
    place: &Path,
    read_only: bool,
) -> Result<(), Failure> {
    let refused = |error: io::Error| refusal(place, &error);
    let Some(directory) = tree.directories.get(&digest) else {
        return Err(Failure::missing([digest]));
    };
    let read_only = read_only || directory.properties.read_only;
    fs::create_dir(place).map_err(refused)?;
    for file in &directory.files {
        stage_file(blobs, file, &place.join(&file.name))?;
    }
    for (name, target) in &directory.symlinks {
        symlink(target, place.join(name)).map_err(refused)?;
    }
    for (name, child) in &directory.directories {
        stage_directory(blobs, tree, *child, &place.join(name), read_only)?;
    }
    if let Some(mtime) = directory.properties.mtime {
        let opened = File::open(place).map_err(refused)?;
        opened.set_modified(mtime).map_err(refused)?;
    }
    match (directory.properties.unix_mode, read_only) {
        (Some(mode), _) => set_mode(place, mode).map_err(refused),
        (None, true) => set_mode(place, 0o555).map_err(refused),
        (None, false) => Ok(()),
    }
}

fn stage_file(blobs: &Blobs, file: &tree::File, place: &Path) -> Result<(), Failure> {
    let linked = blobs.link(file.digest, file.executable, place);
    linked.map_err(|error| Failure::internal(format!("{}: {error}", place.display())))?;
    if file.properties.are_plain() {
        return Ok(());
    }
    // Times and permissions are those of all links to a file, so this one gets a copy.
    let changed = own_copy(place).and_then(|()| {
        let opened = File::open(place)?;
        if let Some(mtime) = file.properties.mtime {
            opened.set_times(FileTimes::new().set_modified(mtime))?;
        }
        let default = if file.executable { 0o555 } else { 0o444 };
        let mode = file.properties.unix_mode.unwrap_or(default);
        opened.set_permissions(Permissions::from_mode(mode))
    });
    changed.map_err(|error| refusal(place, &error))
}

/// Puts a file of its own in the place of a link.
fn own_copy(place: &Path) -> io::Result<()> {
    let mut source = File::open(place)?;
    fs::remove_file(place)?;
    let mut copy = File::create_new(place)?;
    io::copy(&mut source, &mut copy).map(drop)
}

/// Makes the directory `path` below `root`, and those above it, writable by the command.
fn make_directories(root: &Path, path: &Path) -> Result<(), Failure> {
    let mut place = root.to_owned();
    for name in path {
        place.push(name);
        let made = match fs::symlink_metadata(&place) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => fs::create_dir(&place),
            Err(error) => Err(error),
            Ok(metadata) if metadata.is_dir() => Ok(()),
            // A symlink may lead to another directory of the tree, and nowhere else.
            Ok(_) => fs::canonicalize(&place).and_then(|target| {
                let inside = target.starts_with(fs::canonicalize(root)?) && target.is_dir();
                place = target;
                match inside {
                    true => Ok(()),
                    false => Err(io::ErrorKind::NotADirectory.into()),
                }
            }),
        };
        made.map_err(|error| {
            Failure::invalid(format!(
                "the Command wants {} to be a directory below the input root, and it cannot: {error}",
                path.display()
            ))
        })?;
    }
    let writable = fs::metadata(&place).and_then(|metadata| {
        let mode = metadata.permissions().mode();
        match mode & 0o700 == 0o700 {
            true => Ok(()),
            false => set_mode(&place, mode | 0o700),
        }
    });
    writable.map_err(|error| refusal(&place, &error))
}

fn set_mode(place: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(place, Permissions::from_mode(mode))
}

/// The disk does not take what the tree says.
fn refusal(place: &Path, error: &io::Error) -> Failure {
    let message = format!("{} cannot be staged: {error}", place.display());
    match error.kind() {
        io::ErrorKind::InvalidFilename => Failure::invalid(message),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Failure::new(tonic::Code::ResourceExhausted, message)
        }
        _ => Failure::internal(message),
    }
}

/// Removes a directory with all that is in it, though a command may have taken away the right to.
fn remove(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            make_removable(directory)?;
            fs::remove_dir_all(directory)
        }
        removed => removed,
    }
}

fn make_removable(directory: &Path) -> io::Result<()> {
    set_mode(directory, 0o700)?;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            make_removable(&entry.path())?;
        }
    }
    Ok(())
}
