//! Preparation: what is done for an adapted action between instantiation and the lane. It is
//! looked up in the action cache, and if it is not there, what it needs is uploaded; both for
//! many actions at a time, in the order in which their flights are to start. While those of one
//! batch are uploaded, the next is looked up.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tonic::Status;

use crate::cas::Digest;
use crate::cas::directories::{Directory, DirectoryCache};
use crate::meters::METERS;
use crate::speculation::activity::Activity;
use crate::speculation::flights::Announcement;
use crate::speculation::journal::accounting::Effort;
use crate::speculation::planning::instantiate::Blob;
use crate::speculation::planning::schedule::Ready;
use crate::speculation::workshop::{Beneficiary, News, Workshop};
use crate::task;
use crate::workspace::index;

/// Actions that are looked up and uploaded together.
const BATCH: usize = 256;
/// The first batch is small, so that the lane has work soon.
const FIRST_BATCH: usize = 16;
/// Lookups under way at once, at least. A backend that is far away is asked more at a time, so many
/// for each millisecond that it takes to answer, up to what one connection carries of most servers
/// (100 calls), with room left for executions.
const LOOKUPS: usize = 16;
const LOOKUPS_PER_MS: u128 = 8;
const MOST_LOOKUPS: usize = 64;

/// An adapted action on its way to the lane.
pub struct Job {
    /// Its flight; abandoned if the job is dropped.
    pub announcement: Announcement,
    /// What is to be executed.
    pub ready: Ready,
    /// For whom it is done.
    pub whom: Beneficiary,
    /// When what made it ready happened; `None` where that was the end of another action, whose
    /// time would count.
    pub triggered: Option<Instant>,
    /// Counts as activity until the job is done.
    pub activity: Activity,
}

/// Jobs that wait. They are never more than the actions of the plan that made them.
#[derive(Default)]
pub struct Queue {
    jobs: Mutex<Vec<Job>>,
    more: Notify,
}

impl Queue {
    /// Adds jobs to what waits.
    pub fn push(&self, jobs: Vec<Job>) {
        self.jobs.lock().extend(jobs);
        self.more.notify_one();
    }

    /// Takes up to `count` of the most urgent jobs, as soon as there are any.
    async fn take(&self, count: usize) -> Vec<Job> {
        loop {
            let batch = {
                let mut jobs = self.jobs.lock();
                jobs.sort_by_key(|job| job.ready.urgency);
                let count = count.min(jobs.len());
                jobs.drain(..count).collect::<Vec<_>>()
            };
            if !batch.is_empty() {
                return batch;
            }
            self.more.notified().await;
        }
    }

    fn is_empty(&self) -> bool {
        self.jobs.lock().is_empty()
    }
}

/// Prepares the jobs of one parent until the task is dropped.
pub async fn run(workshop: Workshop, instance: Arc<str>, queue: Arc<Queue>) {
    let (not_cached, mut next) = mpsc::channel(1);
    let looking_up = async {
        let mut size = FIRST_BATCH;
        let mut answers_in = None;
        loop {
            let batch = queue.take(size).await;
            size = if queue.is_empty() { FIRST_BATCH } else { BATCH };
            let missing = look_up(&workshop, &instance, batch, &mut answers_in).await;
            if not_cached.send(missing).await.is_err() {
                return;
            }
        }
    };
    let uploading = async {
        let mut uploaded = HashSet::new();
        while let Some(missing) = next.recv().await {
            upload(&workshop, &instance, missing, &mut uploaded).await;
        }
    };
    tokio::join!(looking_up, uploading);
}

/// How many lookups may be under way where the quickest answer took so long.
fn lookups_at_once(answers_in: Option<Duration>) -> usize {
    let ms = answers_in.unwrap_or_default().as_millis();
    usize::try_from(ms * LOOKUPS_PER_MS)
        .map_or(MOST_LOOKUPS, |count| count.clamp(LOOKUPS, MOST_LOOKUPS))
}

/// Settles the jobs whose results are in the action cache: after an edit was taken back, for
/// example, they are. Returns the others. `answers_in` is what the quickest answer took so far.
#[tracing::instrument(level = "debug", skip_all, fields(actions = batch.len()))]
async fn look_up(
    workshop: &Workshop,
    instance: &Arc<str>,
    batch: Vec<Job>,
    answers_in: &mut Option<Duration>,
) -> Vec<Job> {
    let mut missing = Vec::with_capacity(batch.len());
    let mut lookups = JoinSet::new();
    let mut waiting = batch
        .into_iter()
        .filter(|job| job.announcement.is_current());
    loop {
        while lookups.len() < lookups_at_once(*answers_in) {
            let Some(job) = waiting.next() else {
                break;
            };
            let backend = workshop.backend.clone();
            let instance = instance.clone();
            lookups.spawn(async move {
                let asked = Instant::now();
                let answer = backend
                    .action_result(&instance, job.ready.adapted.action)
                    .await;
                (job, answer, asked.elapsed())
            });
        }
        let (job, answer) = match lookups.join_next().await {
            None => return missing,
            Some(Ok((job, answer, time))) => {
                *answers_in = Some(answers_in.map_or(time, |least| least.min(time)));
                (job, answer)
            }
            Some(Err(error)) => {
                tracing::error!(%error, "a lookup ended unexpectedly");
                continue;
            }
        };
        match answer {
            Ok(Some(result)) if result.exit_code == 0 => {
                job.announcement
                    .settle(Arc::new(result), job.activity)
                    .await;
            }
            // A failure that is cached is the client's to see: the job is dropped.
            Ok(Some(result)) => {
                let code = result.exit_code;
                let reason = format!("the backend holds a result with exit code {code}");
                job.announcement.because(reason);
            }
            Ok(None) | Err(_) => missing.push(job),
        }
    }
}

/// Uploads what the jobs need that are still wanted, and submits these.
#[tracing::instrument(level = "debug", skip_all, fields(actions = jobs.len()))]
async fn upload(
    workshop: &Workshop,
    instance: &str,
    mut jobs: Vec<Job>,
    uploaded: &mut HashSet<Digest>,
) {
    jobs.retain(|job| job.announcement.is_current());
    jobs.sort_by_key(|job| job.ready.urgency);
    let mut known = uploaded.clone();
    let mut needed = HashMap::new();
    // What several need, the first of them pays for.
    let mut payers: HashMap<Digest, Beneficiary> = HashMap::new();
    for job in &jobs {
        let mut own = HashMap::new();
        job.ready.adapted.collect_blobs(&mut known, &mut own);
        payers.extend(own.keys().map(|digest| (*digest, job.whom)));
        needed.extend(own);
    }
    let directories = workshop.directories.clone();
    let blobs = task::blocking("reading sources", move || read_blobs(needed, &directories)).await;
    let sent = match blobs {
        Some(blobs) => workshop.cas.upload(instance, &blobs).await,
        None => Err(Status::internal("the sources could not be read")),
    };
    match sent {
        Ok(sent) => {
            *uploaded = known;
            let mut efforts: HashMap<Beneficiary, Effort> = HashMap::new();
            for digest in sent {
                if let Some(whom) = payers.get(&digest) {
                    efforts.entry(*whom).or_default().added_bytes += digest.size();
                }
            }
            let mut activities = Vec::with_capacity(jobs.len());
            for job in jobs {
                job.announcement.submit(job.ready.urgency);
                let effort = efforts.entry(job.whom).or_default();
                let submission = job.triggered.map(|triggered| triggered.elapsed());
                effort.submission = effort.submission.max(submission.unwrap_or_default());
                activities.push(job.activity);
            }
            for (whom, effort) in efforts {
                METERS.added_bytes.add(effort.added_bytes);
                // The engine drains this promptly.
                let _ = workshop.news.send(News::Spent(whom, effort)).await;
            }
            drop(activities);
        }
        Err(status) => {
            tracing::warn!(
                %status, actions = jobs.len(),
                "the inputs of adapted actions cannot be uploaded; they are left to the client"
            );
            for job in &jobs {
                let reason = format!("its inputs could not be uploaded: {}", status.message());
                job.announcement.because(reason);
            }
        }
    }
}

/// The bytes of what is needed. A source file that has changed once more is left out: the action
/// that was to read it is out of date, and the backend will refuse it.
fn read_blobs(
    needed: HashMap<Digest, Blob>,
    directories: &DirectoryCache,
) -> HashMap<Digest, Bytes> {
    let mut blobs = HashMap::with_capacity(needed.len());
    for (digest, blob) in needed {
        match blob {
            Blob::Directory(encoded) => {
                if let Some(directory) = Directory::parse(encoded.clone(), digest.function()) {
                    directories.insert(digest, Arc::new(directory));
                }
                blobs.insert(digest, encoded);
            }
            Blob::Message(encoded) => {
                blobs.insert(digest, encoded);
            }
            Blob::File(path) => {
                if let Some(content) = index::read(&path, digest) {
                    blobs.insert(digest, content);
                }
            }
        }
    }
    blobs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_that_is_far_away_is_asked_for_more_at_a_time() {
        assert_eq!(lookups_at_once(None), LOOKUPS);
        let after = |ms| lookups_at_once(Some(Duration::from_millis(ms)));
        assert_eq!([0, 1, 2].map(after), [LOOKUPS; 3]);
        assert_eq!(after(5), 40);
        assert_eq!([20, 1000].map(after), [MOST_LOOKUPS; 2]);
    }
}
