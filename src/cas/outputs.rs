//! What actions have written: the files that a result names, those in output directories too, by their
//! paths in the input root.

use std::sync::Arc;

use prost::Message as _;
use tonic::Status;

use super::directories::{Directory, DirectoryCache, Trees, child_path};
use super::transfer::Cas;
use super::{Digest, DigestFunction};
use crate::reapi::{ActionResult, OutputDirectory, Tree};

/// Files that an action wrote: paths relative to its input root.
pub type Outputs = Vec<(String, Digest)>;

/// Directories of an output that are looked into: one that stands at very many places is cut off.
const MAX_DIRECTORIES: usize = 100_000;

/// The files that an action under `function` wrote, those in output directories too: paths relative
/// to the input root, sorted. Directories that cannot be read are left out.
///
/// # Errors
/// The backend's status, when it cannot be asked for an output directory.
pub async fn output_files(
    cas: &Cas,
    directories: &DirectoryCache,
    instance: &str,
    function: DigestFunction,
    working_directory: &str,
    result: &ActionResult,
) -> Result<Outputs, Status> {
    let mut outputs = Outputs::new();
    for file in &result.output_files {
        let path = normalized(working_directory, &file.path);
        if let (Some(path), Ok(digest)) = (path, function.read(file.digest.as_ref())) {
            outputs.push((path, digest));
        }
    }
    for directory in &result.output_directories {
        let Some(path) = normalized(working_directory, &directory.path) else {
            continue;
        };
        let files = files_in(cas, directories, instance, function, directory).await?;
        outputs.extend(
            files
                .into_iter()
                .map(|(file, digest)| (child_path(&path, &file), digest)),
        );
    }
    outputs.sort_unstable();
    Ok(outputs)
}

/// The files in an output directory: paths relative to it.
///
/// # Errors
/// The backend's status, when it cannot be asked.
pub async fn files_in(
    cas: &Cas,
    directories: &DirectoryCache,
    instance: &str,
    function: DigestFunction,
    directory: &OutputDirectory,
) -> Result<Outputs, Status> {
    let mut files = Outputs::new();
    if let Ok(tree) = function.read(directory.tree_digest.as_ref()) {
        let blob = cas.fetch(instance, [tree]).await?.remove(&tree);
        if let Some(tree) = blob.and_then(|blob| Tree::decode(blob).ok()) {
            files_of_tree(&tree, function, &mut files);
        }
    } else if let Ok(root) = function.read(directory.root_directory_digest.as_ref()) {
        let trees = directories.load(cas, instance, [root]).await?;
        files_below(root, &trees, &mut files);
    }
    Ok(files)
}

fn files_below(root: Digest, trees: &Trees, files: &mut Outputs) {
    let mut open = vec![(root, String::new())];
    let mut visits = 0;
    while let Some((digest, path)) = open.pop() {
        visits += 1;
        let Some(directory) = trees.get(&digest).filter(|_| visits <= MAX_DIRECTORIES) else {
            continue;
        };
        let here = directory.files.iter();
        files.extend(here.map(|(name, file)| (child_path(&path, name), *file)));
        for (name, child) in &directory.directories {
            open.push((*child, child_path(&path, name)));
        }
    }
}

fn files_of_tree(tree: &Tree, function: DigestFunction, outputs: &mut Outputs) {
    let mut trees = Trees::new();
    for child in tree.root.iter().chain(&tree.children) {
        let (digest, encoded) = function.of_message(child);
        if let Some(directory) = Directory::parse(encoded, function) {
            trees.insert(digest, Arc::new(directory));
        }
    }
    if let Some(root) = &tree.root {
        files_below(function.of_message(root).0, &trees, outputs);
    }
}

/// `path` in `directory` without `.` and `..`; `None` if it leads out of the input root.
pub fn normalized(directory: &str, path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in directory.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            name => parts.push(name),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// The digest that `outputs`, sorted by path, hold for `path`.
pub fn find_output(outputs: &Outputs, path: &str) -> Option<Digest> {
    let at = outputs
        .binary_search_by(|(name, _)| name.as_str().cmp(path))
        .ok()?;
    Some(outputs[at].1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reapi;

    #[test]
    fn output_paths_become_relative_to_the_input_root() {
        assert_eq!(normalized("", "a.o").as_deref(), Some("a.o"));
        assert_eq!(
            normalized("build/x", "../a.o").as_deref(),
            Some("build/a.o")
        );
        assert_eq!(
            normalized("build", "./sub//a.o").as_deref(),
            Some("build/sub/a.o")
        );
        assert_eq!(normalized("build", "../../a.o"), None);
        assert_eq!(normalized("", "."), None);
    }

    #[test]
    fn files_in_output_directories_are_outputs() {
        let leaf = reapi::Directory {
            files: vec![reapi::FileNode {
                name: "x.h".to_owned(),
                digest: Some(Digest::of(b"x").to_proto()),
                ..Default::default()
            }],
            ..reapi::Directory::default()
        };
        let root = reapi::Directory {
            directories: vec![reapi::DirectoryNode {
                name: "sub".to_owned(),
                digest: Some(Digest::of_message(&leaf).0.to_proto()),
            }],
            ..reapi::Directory::default()
        };
        let tree = Tree {
            root: Some(root),
            children: vec![leaf],
        };
        let mut outputs = Outputs::new();
        files_of_tree(&tree, DigestFunction::Sha256, &mut outputs);
        assert_eq!(outputs, [("sub/x.h".to_owned(), Digest::of(b"x"))]);
    }
}
