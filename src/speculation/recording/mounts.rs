//! Which directory of an action parent's tree the input tree of one of its actions stands for.
//! recc names files relative to where it runs, and a parent may run the same command in many
//! directories: it is the files that tell where.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use crate::cas::Digest;
use crate::cas::directories::{Trees, child_path};
use crate::speculation::records::parent::BaseAction;

/// At how many paths of the parent's tree a file is looked for.
const MAX_PATHS: usize = 64;
/// Directories that are walked, at most.
const MAX_VISITS: usize = 1_000_000;

/// Where files of a parent stand: in its tree, and where its actions have written them.
pub struct Mounts<'a> {
    trees: &'a Trees,
    places: HashMap<Digest, Vec<String>>,
}

impl<'a> Mounts<'a> {
    /// Those of a parent with this tree, of the files that trees of `roots` hold.
    pub fn new(own: Digest, roots: impl IntoIterator<Item = Digest>, trees: &'a Trees) -> Self {
        let mut wanted = HashSet::new();
        for root in roots {
            walk(root, trees, |_, digest| {
                wanted.insert(digest);
            });
        }
        let mut places: HashMap<Digest, Vec<String>> = HashMap::new();
        walk(own, trees, |path, digest| {
            if wanted.contains(&digest) {
                let places = places.entry(digest).or_default();
                if places.len() < MAX_PATHS {
                    places.push(path.to_owned());
                }
            }
        });
        Mounts { trees, places }
    }

    /// The directory that most files of an action are relative to. Files that are named from the
    /// root of the parent's tree, as those of the system are, say nothing if others do.
    pub fn of(&self, base: &BaseAction) -> Option<PathBuf> {
        let mut votes: BTreeMap<&str, usize> = BTreeMap::new();
        walk(base.input_root, self.trees, |path, digest| {
            for place in self.places.get(&digest).into_iter().flatten() {
                if let Some(directory) = directory_above(place, path) {
                    *votes.entry(directory).or_default() += 1;
                }
            }
        });
        let by_votes = |(directory, votes): &(&str, usize)| (!directory.is_empty(), *votes);
        let most = votes.into_iter().rev().max_by_key(by_votes);
        most.map(|(directory, _)| PathBuf::from(directory))
    }

    /// An action has written its outputs below `mount`.
    pub fn add_outputs(&mut self, mount: &Path, base: &BaseAction) {
        for (path, digest) in &base.outputs {
            if let Some(place) = mount.join(path).to_str() {
                self.places
                    .entry(*digest)
                    .or_default()
                    .push(place.to_owned());
            }
        }
    }
}

/// The directory in which `path` leads to `place`.
fn directory_above<'p>(place: &'p str, path: &str) -> Option<&'p str> {
    let above = place.strip_suffix(path)?;
    match above {
        "" => Some(""),
        above => above.strip_suffix('/'),
    }
}

fn walk(root: Digest, trees: &Trees, mut visit: impl FnMut(&str, Digest)) {
    let mut open = vec![(root, String::new())];
    for _ in 0..MAX_VISITS {
        let Some((digest, path)) = open.pop() else {
            return;
        };
        let Some(directory) = trees.get(&digest) else {
            continue;
        };
        for (name, file) in &directory.files {
            visit(&child_path(&path, name), *file);
        }
        for (name, child) in &directory.directories {
            open.push((*child, child_path(&path, name)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cas::directories::Directory;
    use crate::reapi;
    use crate::speculation::records::parent::fixture;
    use std::sync::Arc;

    /// A tree of files that hold what `files` says.
    fn tree(files: &[(&str, &str)], trees: &mut Trees) -> Digest {
        let mut message = reapi::Directory::default();
        let mut below: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::new();
        for (path, content) in files {
            match path.split_once('/') {
                Some((name, rest)) => below.entry(name).or_default().push((rest, content)),
                None => message.files.push(reapi::FileNode {
                    name: (*path).to_owned(),
                    digest: Some(Digest::of(content.as_bytes()).to_proto()),
                    ..reapi::FileNode::default()
                }),
            }
        }
        for (name, files) in below {
            message.directories.push(reapi::DirectoryNode {
                name: name.to_owned(),
                digest: Some(tree(&files, trees).to_proto()),
            });
        }
        let (digest, encoded) = Digest::of_message(&message);
        trees.insert(
            digest,
            Arc::new(Directory::parse(encoded, digest.function()).unwrap()),
        );
        digest
    }

    #[test]
    fn the_files_of_an_action_tell_where_it_ran() {
        let mut trees = Trees::new();
        let own = [
            ("work/one/main.c", "one"),
            ("work/two/main.c", "two"),
            ("work/two/sub/x.h", "x"),
            ("usr/include/stdio.h", "stdio"),
            ("usr/include/string.h", "string"),
        ];
        let own = tree(&own, &mut trees);
        let one = [
            ("main.c", "one"),
            ("usr/include/stdio.h", "stdio"),
            ("usr/include/string.h", "string"),
        ];
        let inputs = [
            tree(&one, &mut trees),
            tree(&[("main.c", "two"), ("sub/x.h", "x")], &mut trees),
            tree(&[("usr/include/stdio.h", "stdio")], &mut trees),
            tree(
                &[("main.o", "object"), ("usr/include/stdio.h", "stdio")],
                &mut trees,
            ),
            tree(&[("main.c", "of nobody")], &mut trees),
        ];
        let mut mounts = Mounts::new(own, inputs, &trees);
        let mount =
            |mounts: &Mounts<'_>, index: usize| mounts.of(&fixture::base("a", inputs[index]));
        assert_eq!(mount(&mounts, 0), Some("work/one".into()));
        assert_eq!(mount(&mounts, 1), Some("work/two".into()));
        assert_eq!(mount(&mounts, 2), Some("".into()));
        assert_eq!(
            mount(&mounts, 3),
            Some("".into()),
            "nobody wrote the object yet"
        );
        assert_eq!(mount(&mounts, 4), None);
        let mut compile = fixture::base("compile", inputs[1]);
        compile.outputs = vec![("main.o".to_owned(), Digest::of(b"object"))];
        mounts.add_outputs(Path::new("work/two"), &compile);
        assert_eq!(mount(&mounts, 3), Some("work/two".into()));
    }
}
