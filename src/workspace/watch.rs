//! Tells when files are saved. What is watched are the directories that they are in, so that a file
//! that an editor replaces, or that is gone for a while, is seen as well.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::hash::Hash;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchDescriptor, WatchMask, Watches};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;

use crate::task;

/// Those who change several files (a branch switch, a formatter) are waited for until they have
/// paused for this long.
const PAUSE: Duration = Duration::from_millis(100);
/// But no longer than this.
const PATIENCE: Duration = Duration::from_secs(1);
/// Directories that are watched, at most: each takes kernel memory, and users have a limit for all
/// that watch.
pub const MAX_DIRECTORIES: usize = 8192;
/// What the kernel says at once.
const EVENTS: usize = 64 * 1024;
/// Orders that may wait.
const ORDERS: usize = 64;

/// Whose files are to be watched. Each `K` is told of its own.
pub struct Watch<K> {
    orders: mpsc::Sender<Order<K>>,
    /// How many directories are watched.
    watched: Arc<AtomicUsize>,
}

struct Order<K> {
    whom: K,
    files: Vec<PathBuf>,
}

impl<K: Copy + Eq + Hash + Send + 'static> Watch<K> {
    /// Watches nothing yet, and `most` directories at most. Whoever has files that were saved is
    /// named in `saved`.
    ///
    /// # Errors
    /// When the system has nothing to watch with.
    pub fn start(saved: mpsc::Sender<Vec<K>>, most: usize) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let (orders, ordered) = mpsc::channel(ORDERS);
        let watched = Arc::new(AtomicUsize::new(0));
        let worker = Worker {
            watches: inotify.watches(),
            directories: HashMap::new(),
            absent: HashMap::new(),
            most,
            watched: watched.clone(),
            is_full: false,
        };
        let events = inotify.into_event_stream(vec![0; EVENTS])?;
        task::spawn("watch", worker.run(events, ordered, saved));
        Ok(Watch { orders, watched })
    }

    /// How many directories are watched.
    pub fn directories(&self) -> usize {
        self.watched.load(Ordering::Relaxed)
    }

    /// Watches these files, by absolute path, for `whom`, and no others of its any more.
    pub fn watch(&self, whom: K, files: Vec<PathBuf>) {
        // One that is so far behind learns of it with the next build.
        let _ = self.orders.try_send(Order { whom, files });
    }
}

/// Files of a directory, and whose they are.
type Files<K> = HashMap<OsString, HashSet<K>>;

struct Worker<K> {
    watches: Watches,
    directories: HashMap<WatchDescriptor, (PathBuf, Files<K>)>,
    /// Those that were not there, or are gone.
    absent: HashMap<PathBuf, Files<K>>,
    most: usize,
    watched: Arc<AtomicUsize>,
    /// Whether the log knows that not all can be watched.
    is_full: bool,
}

impl<K: Copy + Eq + Hash + Send + 'static> Worker<K> {
    async fn run(
        mut self,
        mut events: EventStream<Vec<u8>>,
        mut orders: mpsc::Receiver<Order<K>>,
        saved: mpsc::Sender<Vec<K>>,
    ) {
        let mut concerned: HashSet<K> = HashSet::new();
        // When the first and the latest event came that nobody was told of.
        let mut times: Option<(Instant, Instant)> = None;
        loop {
            self.watched
                .store(self.directories.len(), Ordering::Relaxed);
            let due = times.map(|(first, latest)| (latest + PAUSE).min(first + PATIENCE));
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(event)) => {
                        if self.take_in(&event, &mut concerned) {
                            let now = Instant::now();
                            times = Some((times.map_or(now, |(first, _)| first), now));
                        }
                    }
                    Some(Err(error)) => {
                        tracing::warn!(
                            %error,
                            "saved files are seen no more; priming waits for builds again"
                        );
                        self.watched.store(0, Ordering::Relaxed);
                        return;
                    }
                    None => return,
                },
                order = orders.recv() => match order {
                    Some(Order { whom, files }) => {
                        self.strike(whom);
                        self.add(whom, files);
                        self.drop_empty();
                    }
                    None => return,
                },
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => {
                    times = None;
                    self.look_for_absent();
                    if saved.send(concerned.drain().collect()).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Adds those whom an event concerns. Returns whether there are any.
    fn take_in(&mut self, event: &EventOwned, concerned: &mut HashSet<K>) -> bool {
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            let all = self
                .directories
                .values()
                .flat_map(|(_, files)| files.values());
            concerned.extend(all.flatten());
            return true;
        }
        if event.mask.contains(EventMask::MOVE_SELF) {
            // It may just have gone. Whatever takes its place is another one.
            let _ = self.watches.remove(event.wd.clone());
        }
        if event
            .mask
            .intersects(EventMask::MOVE_SELF | EventMask::IGNORED)
        {
            if let Some((path, files)) = self.directories.remove(&event.wd) {
                add_all(self.absent.entry(path).or_default(), files);
            }
            return false;
        }
        let directory = self.directories.get(&event.wd);
        let whose = directory.and_then(|(_, files)| files.get(event.name.as_ref()?));
        concerned.extend(whose.into_iter().flatten());
        whose.is_some()
    }

    fn add(&mut self, whom: K, files: Vec<PathBuf>) {
        let mut directories: HashMap<PathBuf, Files<K>> = HashMap::new();
        for file in &files {
            if let (Some(path), Some(name)) = (file.parent(), file.file_name()) {
                let files = directories.entry(path.to_owned()).or_default();
                files.entry(name.to_owned()).or_default().insert(whom);
            }
        }
        for (path, files) in directories {
            self.add_directory(path, files);
        }
    }

    fn add_directory(&mut self, path: PathBuf, files: Files<K>) {
        let there = match self.watch_directory(&path) {
            Ok(descriptor) => {
                let new = || (path, Files::new());
                &mut self.directories.entry(descriptor).or_insert_with(new).1
            }
            Err(error) => {
                if error.kind() == io::ErrorKind::StorageFull {
                    self.warn_of(&path);
                }
                self.absent.entry(path).or_default()
            }
        };
        add_all(there, files);
    }

    fn watch_directory(&mut self, path: &Path) -> io::Result<WatchDescriptor> {
        // That of a directory that is watched already, if it is.
        let descriptor = self.watches.add(path, saved())?;
        if self.directories.len() < self.most || self.directories.contains_key(&descriptor) {
            return Ok(descriptor);
        }
        // It may just have gone.
        let _ = self.watches.remove(descriptor);
        Err(io::ErrorKind::StorageFull.into())
    }

    fn warn_of(&mut self, path: &Path) {
        if !std::mem::replace(&mut self.is_full, true) {
            tracing::warn!(
                path = %path.display(),
                watched = self.directories.len(),
                "not all directories can be watched; fs.inotify.max_user_watches says how many \
                 those of a user may be, and primed takes {} at most",
                self.most
            );
        }
    }

    /// Watches directories that have come back.
    fn look_for_absent(&mut self) {
        for (path, files) in std::mem::take(&mut self.absent) {
            self.add_directory(path, files);
        }
    }

    /// No file is `whom`'s any more.
    fn strike(&mut self, whom: K) {
        let watched = self.directories.values_mut().map(|(_, files)| files);
        for files in watched.chain(self.absent.values_mut()) {
            files.retain(|_, whose| {
                whose.remove(&whom);
                !whose.is_empty()
            });
        }
    }

    /// Watches no directory in which nobody has files.
    fn drop_empty(&mut self) {
        self.absent.retain(|_, files| !files.is_empty());
        let directories = &mut self.directories;
        for (descriptor, _) in directories.extract_if(|_, (_, files)| files.is_empty()) {
            // It may just have gone.
            let _ = self.watches.remove(descriptor);
        }
    }
}

fn add_all<K: Eq + Hash>(there: &mut Files<K>, files: Files<K>) {
    for (name, whose) in files {
        there.entry(name).or_default().extend(whose);
    }
}

/// What is to be told of a directory: that files in it have new content, or are there no more.
fn saved() -> WatchMask {
    WatchMask::CLOSE_WRITE
        | WatchMask::MOVED_TO
        | WatchMask::MOVED_FROM
        | WatchMask::DELETE
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR
        | WatchMask::EXCL_UNLINK
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// What watches `files` for `a` and `b`, as they are named; who is told; and where they are.
    struct Stage {
        watch: Watch<char>,
        saved: mpsc::Receiver<Vec<char>>,
        root: tempfile::TempDir,
    }

    impl Stage {
        fn start() -> Self {
            Stage::with_most(MAX_DIRECTORIES)
        }

        fn with_most(most: usize) -> Self {
            let (told, saved) = mpsc::channel(1);
            let stage = Stage {
                watch: Watch::start(told, most).unwrap(),
                saved,
                root: tempfile::tempdir().unwrap(),
            };
            fs::create_dir(stage.path("src")).unwrap();
            stage.write("src/a.h", "a");
            stage.write("src/b.h", "b");
            stage
        }

        fn path(&self, name: &str) -> PathBuf {
            self.root.path().join(name)
        }

        fn write(&self, name: &str, content: &str) {
            fs::write(self.path(name), content).unwrap();
        }

        /// Watches files, and waits until that is so: all runs on one thread.
        async fn watch(&mut self, whom: char, names: &[&str]) {
            let files = names.iter().map(|name| self.path(name)).collect();
            self.watch.watch(whom, files);
            while self.watch.orders.capacity() < ORDERS {
                tokio::task::yield_now().await;
            }
        }

        /// Who is told of what was done, in order of name.
        async fn told(&mut self) -> String {
            let mut told = self.saved.recv().await.unwrap();
            told.sort_unstable();
            told.into_iter().collect()
        }
    }

    #[tokio::test]
    async fn those_are_told_whose_files_were_written_replaced_or_removed() {
        let mut stage = Stage::start();
        stage.watch('a', &["src/a.h", "src/both.h"]).await;
        stage.watch('b', &["src/b.h", "src/both.h"]).await;
        stage.write("src/a.h", "written");
        assert_eq!(stage.told().await, "a");
        stage.write("src/b.h.new", "of no concern");
        fs::rename(stage.path("src/b.h.new"), stage.path("src/b.h")).unwrap();
        assert_eq!(stage.told().await, "b");
        stage.write("src/both.h", "appears");
        assert_eq!(stage.told().await, "ab");
        fs::remove_file(stage.path("src/both.h")).unwrap();
        assert_eq!(stage.told().await, "ab");
    }

    #[tokio::test]
    async fn many_changes_at_once_are_told_once_and_files_of_nobody_never() {
        let mut stage = Stage::start();
        stage.watch('a', &["src/a.h"]).await;
        stage.watch('b', &["src/b.h"]).await;
        for round in 0..100 {
            stage.write("src/a.h", &round.to_string());
            stage.write("src/b.h", &round.to_string());
            stage.write("src/c.h", "nobody's");
        }
        assert_eq!(stage.told().await, "ab");
        stage.write("src/c.h", "nobody's");
        stage.watch.watch('a', Vec::new());
        stage.write("src/b.h", "again");
        assert_eq!(stage.told().await, "b");
    }

    #[tokio::test]
    async fn who_has_too_many_directories_keeps_those_that_are_watched() {
        let mut stage = Stage::with_most(1);
        stage.watch('a', &["src/a.h"]).await;
        stage.watch('b', &["probe.h", "src/b.h"]).await;
        stage.watch('a', &["src/a.h"]).await;
        stage.write("probe.h", "in a directory too many");
        stage.write("src/a.h", "written");
        assert_eq!(stage.told().await, "a");
        stage.write("src/b.h", "written");
        assert_eq!(stage.told().await, "b");
        assert_eq!(stage.watch.directories(), 1);
    }

    #[tokio::test]
    async fn a_directory_that_comes_back_is_watched_again() {
        let mut stage = Stage::start();
        stage.watch('a', &["src/a.h", "src/new/new.h"]).await;
        stage.watch('b', &["src/b.h"]).await;
        fs::remove_dir_all(stage.path("src")).unwrap();
        fs::create_dir_all(stage.path("src/new")).unwrap();
        assert_eq!(stage.told().await, "ab");
        stage.write("src/new/new.h", "is there");
        assert_eq!(stage.told().await, "a");
        fs::rename(stage.path("src"), stage.path("moved")).unwrap();
        fs::create_dir(stage.path("src")).unwrap();
        stage.write("moved/a.h", "elsewhere");
        stage.write("probe.h", "");
        stage.watch('b', &["probe.h"]).await;
        stage.write("probe.h", "has the new directory found");
        assert_eq!(stage.told().await, "b");
        stage.write("src/a.h", "is back");
        assert_eq!(stage.told().await, "a");
    }
}
