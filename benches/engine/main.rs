//! How the engine does with many actions: it is told of a build as the taps would tell it, the build
//! ends, one header that all actions include is changed, and the next build begins. Prints, for each
//! number of actions, what recording and generation, the adaptation of all, and their execution
//! take, in time and memory. Everything that the backend holds is in memory; the sources are on disk.
//!
//!     cargo bench --bench engine [-- [--round-trip MS] ACTIONS...]     (default: 1000 10000)

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a benchmark that cannot go on ends"
)]

mod backend;
mod project;

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Parser as _;
use parking_lot::Mutex;
use primed::config::{BudgetLimits, Mode};
use primed::digest::Digest;
use primed::reapi::ActionResult;
use primed::speculation::Engine;
use primed::speculation::clients::observation::{Answer, Call, CallOrigin, Observation};
use primed::speculation::engine::{EngineParts, Request, engine};
use primed::speculation::flights::{FlightKey, Flights};
use primed::speculation::journal::store::JournalStore;
use primed::speculation::records::store::Store;
use primed::workspace::peer::{Peer, PeerOrigin};
use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, registry};

use backend::InMemory;
use project::Project;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Input files of each action.
const INPUTS: usize = 300;
/// Speculative actions at once: a cluster's worth.
const CAP: usize = 64;
/// Observations between two moments at which the engine is waited for.
const STRIDE: usize = 1000;

/// What one size came to.
struct Measured {
    actions: usize,
    recorded: Duration,
    stored: u64,
    memory: u64,
    adapted: Duration,
    bare: Duration,
    executed: Duration,
    uploads: usize,
}

#[derive(clap::Parser)]
struct Arguments {
    /// How many actions there are; one measurement for each.
    #[arg(default_values_t = [1_000, 10_000])]
    actions: Vec<usize>,
    /// How far the backend is, in milliseconds.
    #[arg(long, default_value_t = 0)]
    round_trip: u64,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let arguments = Arguments::parse();
    let round_trip = Duration::from_millis(arguments.round_trip);
    let adaptations = Adaptations::default();
    Registry::default().with(adaptations.clone()).init();
    let measured: Vec<Measured> = arguments
        .actions
        .into_iter()
        .map(|actions| measure(actions, round_trip, &adaptations))
        .collect();
    print(&measured);
}

fn print(measured: &[Measured]) {
    println!(
        "| actions, {INPUTS} inputs each | recorded, generated, stored | store | memory, at most | all adapted | encoded and hashed, no more | all executed | blobs uploaded |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let ms = |time: Duration| format!("{:.0} ms", time.as_secs_f64() * 1e3);
    for it in measured {
        println!(
            "| {} | {} | {:.1} MB | {:.0} MB | {} | {} | {} | {} |",
            it.actions,
            ms(it.recorded),
            it.stored as f64 / 1e6,
            it.memory as f64 / 1e6,
            ms(it.adapted),
            ms(it.bare),
            ms(it.executed),
            it.uploads,
        );
    }
    if let [first, .., last] = measured {
        let growth = |of: fn(&Measured) -> Duration| of(last).div_duration_f64(of(first));
        println!(
            "\n{} × the actions: {:.1} × the time to record them, {:.1} × the time to adapt them",
            last.actions / first.actions,
            growth(|it| it.recorded),
            growth(|it| it.adapted),
        );
    }
}

fn measure(actions: usize, round_trip: Duration, adaptations: &Adaptations) -> Measured {
    let directory = tempfile::tempdir().unwrap();
    let mut project = Project::create(&directory.path().join("project"), actions, INPUTS);
    let state = directory.path().join("state");
    let backend = Arc::new(InMemory::at(round_trip));
    project.upload(&backend);
    let before = memory("VmRSS:");
    std::fs::write("/proc/self/clear_refs", "5").unwrap();

    let engine = Running::start(
        backend.clone(),
        Store::open(&state),
        JournalStore::open(&state),
    );
    let build = Build::start(&project);
    for (number, key) in project.keys().enumerate() {
        let now = Instant::now();
        let answer = Answer::of_message(framed(&backend::operation(project.result(number))));
        engine.handle.observe(Observation::Execution(Box::new(Call {
            origin: build.origin(),
            key,
            joined: None,
            began: now,
            ended: now,
            answer,
        })));
        if number % STRIDE == 0 {
            engine.status();
        }
    }
    engine.status();
    let began = Instant::now();
    build.end();
    engine.wait_until_recorded(actions);
    let recorded = began.elapsed();
    let stored = std::fs::metadata(state.join("records.redb")).unwrap().len();

    project.edit_core_header();
    backend.begin_count();
    adaptations.0.lock().clear();
    let build = Build::start(&project);
    let began = Instant::now();
    engine.miss(&build, project.key(0));
    let foreseen = backend.wait_for_executions(actions);
    let executed = began.elapsed();
    let adapted = adaptations.last_of(actions).duration_since(began);
    assert!(project.keys().all(|key| foreseen.contains(&key)));
    let memory = memory("VmHWM:") - before;
    build.end();
    engine.wait();
    Measured {
        actions,
        recorded,
        stored,
        memory,
        adapted,
        bare: project.encode_and_hash_what_changes(),
        executed,
        uploads: backend.uploads(),
    }
}

fn framed(message: &impl Message) -> Bytes {
    let encoded = message.encode_to_vec();
    let length = u32::try_from(encoded.len()).unwrap().to_be_bytes();
    [&[0], &length[..], &encoded].concat().into()
}

/// A line of `/proc/self/status`, in bytes.
fn memory(line: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|it| it.strip_prefix(line)).unwrap();
    let kib = line.trim().strip_suffix(" kB").unwrap();
    kib.parse::<u64>().unwrap() * 1024
}

/// An engine on a thread of its own, as the server runs it.
struct Running {
    handle: Arc<Engine>,
    requests: mpsc::Sender<Request>,
    runtime: tokio::runtime::Runtime,
}

impl Running {
    fn start(backend: Arc<InMemory>, store: Store, journals: JournalStore) -> Self {
        let (started, parts) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name("engine".to_owned());
        let running = thread.spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .thread_stack_size(16 * 1024 * 1024)
                .build()
                .unwrap();
            runtime.block_on(async move {
                let (handle, requests, runner) = engine(EngineParts {
                    mode: Mode::Full,
                    backend,
                    flights: Flights::new(CAP),
                    store: Arc::new(store),
                    journals: Arc::new(journals),
                    share: false,
                    budgets: BudgetLimits::default(),
                    watch: false,
                });
                started.send((handle, requests)).unwrap();
                runner.run().await;
            });
        });
        running.expect("a thread can be started");
        let (handle, requests) = parts.recv().unwrap();
        Running {
            handle,
            requests,
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .build()
                .unwrap(),
        }
    }

    fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> T {
        let (reply, answer) = oneshot::channel();
        self.requests.blocking_send(request(reply)).unwrap();
        answer.blocking_recv().unwrap()
    }

    fn status(&self) -> u64 {
        self.ask(Request::Status).records.actions
    }

    fn wait(&self) {
        self.ask(Request::Wait);
    }

    fn wait_until_recorded(&self, actions: usize) {
        let expected = actions as u64;
        while self.status() < expected {
            self.wait();
        }
    }

    /// A lookup that finds nothing, as the proxy tells of it.
    fn miss(&self, build: &Build, key: FlightKey) {
        self.handle.observe_first(build.origin());
        let deadline = Instant::now() + Duration::from_secs(600);
        let question = self.handle.ask(build.origin(), key, deadline);
        self.runtime.block_on(question);
    }
}

/// A build tool that works on the project until it is told to end.
struct Build {
    make: Child,
    peer: Arc<Peer>,
}

impl Build {
    fn start(project: &Project) -> Self {
        let make = Command::new("make")
            .args(["--silent", "--eval", "all: ; @read line || true"])
            .current_dir(project.directory())
            .stdin(Stdio::piped())
            .spawn()
            .expect("make is installed");
        let pid = i32::try_from(make.id()).unwrap();
        let origin = PeerOrigin::Local {
            pid: Some(pid),
            uid: rustix::process::getuid().as_raw(),
        };
        Build {
            make,
            peer: Arc::new(Peer::new(origin)),
        }
    }

    fn origin(&self) -> CallOrigin {
        CallOrigin {
            peer: self.peer.clone(),
            metadata: None,
        }
    }

    fn end(mut self) {
        drop(self.make.stdin.take());
        self.make.wait().unwrap();
    }
}

/// When how many actions were adapted: the engine says so in its log.
#[derive(Clone, Default)]
struct Adaptations(Arc<Mutex<Vec<(Instant, u64)>>>);

impl Adaptations {
    /// When the last of `actions` was.
    fn last_of(&self, actions: usize) -> Instant {
        let adapted = self.0.lock();
        let all: u64 = adapted.iter().map(|(_, count)| count).sum();
        assert_eq!(all, actions as u64, "adapted");
        adapted.last().unwrap().0
    }
}

impl<S> Layer<S> for Adaptations
where
    S: tracing::Subscriber + for<'a> registry::LookupSpan<'a>,
{
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        if fields.message == "adapted" {
            self.0.lock().push((Instant::now(), fields.actions));
        } else if *event.metadata().level() <= tracing::Level::WARN {
            eprintln!("{}", fields.message);
        }
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    actions: u64,
}

impl tracing::field::Visit for Fields {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        }
    }

    fn record_u64(&mut self, field: &tracing::field::Field, value: u64) {
        if field.name() == "actions" {
            self.actions = value;
        }
    }
}

/// The digest under which an action is executed here: no instance has a name.
fn key(action: Digest) -> FlightKey {
    FlightKey {
        instance: "".into(),
        action,
    }
}

/// The result of an action that wrote one file.
fn result(path: &str, content: &[u8]) -> ActionResult {
    use primed::reapi::{ExecutedActionMetadata, OutputFile};
    let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
    ActionResult {
        output_files: vec![OutputFile {
            path: path.to_owned(),
            digest: Some(Digest::of(content).to_proto()),
            ..OutputFile::default()
        }],
        execution_metadata: Some(ExecutedActionMetadata {
            execution_start_timestamp: at(1),
            execution_completed_timestamp: at(2),
            ..ExecutedActionMetadata::default()
        }),
        ..ActionResult::default()
    }
}
