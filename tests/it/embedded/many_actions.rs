//! Many actions with many inputs: memory stays as it is, and nothing is left on disk.
//! `scripts/soak-embedded` shows it with more.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bytes::Bytes;

use super::execution::{Job, Server};
use primed::cas::Digest;

/// How many actions there are, unless `PRIMED_TEST_ACTIONS` says otherwise.
const ACTIONS: usize = 100;
/// Inputs of each, in directories of ten; all but one are the same for all.
const INPUTS: usize = 300;
/// How many are asked for at once.
const AT_ONCE: usize = 8;
/// More than primed may need for them, in bytes. A build for debugging takes more than a real one.
const MEMORY: u64 = 160 << 20;

#[tokio::test]
async fn memory_does_not_grow_with_the_actions_that_run_and_nothing_of_them_is_left() {
    let actions = std::env::var("PRIMED_TEST_ACTIONS").ok();
    let actions = actions.map_or(ACTIONS, |actions| actions.parse().unwrap());
    let server = Arc::new(Server::start("auto", &["--mode", "none"]));
    let headers = (1..INPUTS).map(|number| {
        let content = Bytes::from(format!("#define HEADER {number}\n").repeat(20));
        (format!("include/{}/{number}.h", number / 10), content)
    });
    let headers: Vec<(String, Bytes)> = headers.collect();
    let job = move |number: usize| {
        let mut job = Job::of("cat source.c include/7/7?.h > out.o", &["out.o"]);
        job.files = headers.clone();
        let source = Bytes::from(format!("int unit{number};\n"));
        job.files.push(("source.c".to_owned(), source));
        job
    };
    server.run(&job(0)).await;
    // What all need is uploaded once, as build clients do it.
    let there: Arc<HashSet<Digest>> = Arc::new(job(0).action().blobs.into_keys().collect());
    let next = Arc::new(AtomicUsize::new(1));
    let began = Instant::now();
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..AT_ONCE {
        let (server, next) = (server.clone(), next.clone());
        let (job, there) = (job.clone(), there.clone());
        clients.spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number > actions {
                    return;
                }
                let response = server.run_all_but(&there, &job(number)).await;
                assert_eq!(response.status, None);
                let result = response.result.unwrap();
                assert_eq!((result.exit_code, result.output_files.len()), (0, 1));
            }
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }
    let took = began.elapsed();
    let peak = server.primed.daemon.peak_memory();
    eprintln!(
        "{actions} actions of {INPUTS} inputs: {:.0} a second; peak RSS {} MiB",
        actions as f64 / took.as_secs_f64(),
        peak >> 20
    );
    assert!(peak < MEMORY, "{peak} bytes");
    let left = server.primed.directory.join("cache/temporary");
    crate::support::wait_until("nothing is left", || {
        left.read_dir().unwrap().next().is_none()
    });
}
