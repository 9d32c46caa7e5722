//! One measurement of one thing, printed as one line of JSON.

use std::fmt;
use std::future::pending;
use std::iter::{once, repeat_n};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::{Subcommand, ValueEnum};
use serde_json::{Map, Value, json};
use tokio::task::JoinSet;

use crate::client::{Caller, Connection, Head};
use crate::process::Family;
use crate::tuning::Tuning;
use crate::{Result, reapi};

/// Uploads the actions that lookups ask for, and their results.
#[derive(clap::Args)]
pub struct Seed {
    /// The backend's socket.
    #[arg(long)]
    to: PathBuf,
}

#[derive(clap::Args)]
pub struct Load {
    /// The socket to connect to.
    #[arg(long)]
    to: PathBuf,
    #[command(flatten)]
    tuning: Tuning,
    /// The proxy's process, whose CPU time and memory are told, with all below it.
    #[arg(long)]
    pid: Option<u32>,
    /// Something to stand in the printed line.
    #[arg(long = "tag", value_name = "KEY=VALUE")]
    tags: Vec<String>,
    #[command(subcommand)]
    shape: Shape,
}

#[derive(Subcommand)]
enum Shape {
    /// Small calls, as many as come back: p50, p99, calls a second, CPU time of each.
    Calls {
        #[arg(long, default_value = "lookup")]
        kind: Kind,
        #[arg(long, default_value_t = 1)]
        connections: usize,
        /// Calls at a time on each connection.
        #[arg(long, default_value_t = 1)]
        streams: usize,
        #[arg(long, default_value_t = 1.0)]
        seconds: f64,
    },
    /// A new connection, one lookup, and over again.
    Connect {
        #[arg(long, default_value_t = 1.0)]
        seconds: f64,
    },
    /// Reads a blob, once and again until the time is over: MB/s.
    Read {
        #[command(flatten)]
        blob: Blob,
        #[arg(long, default_value_t = 0.5)]
        seconds: f64,
    },
    /// Writes one as large, to a server that does not look at it, in the same way: MB/s.
    Write {
        #[command(flatten)]
        blob: Blob,
        #[arg(long, default_value_t = 0.5)]
        seconds: f64,
    },
    /// Lookups one after the other, while another connection reads a blob over and over.
    During {
        #[command(flatten)]
        blob: Blob,
        #[arg(long, default_value_t = 1.0)]
        seconds: f64,
    },
    /// What the proxy's memory grows by for each connection on which one call was made.
    Idle {
        #[arg(long, default_value_t = 1000)]
        connections: usize,
    },
    /// What it grows by for each open stream.
    Open {
        #[arg(long, default_value_t = 100)]
        connections: usize,
        /// Streams on each connection.
        #[arg(long, default_value_t = 100)]
        streams: usize,
    },
    /// What it grows by for each answer that its client does not read.
    Stalled {
        #[arg(long, default_value_t = 32)]
        streams: usize,
        #[command(flatten)]
        blob: Blob,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    /// `GetActionResult` with recc's metadata: what a proxy for REAPI may look into.
    Lookup,
    /// A method that no proxy knows.
    Echo,
}

/// What is read.
#[derive(clap::Args)]
struct Blob {
    /// HASH/SIZE; the fast server makes any up.
    #[arg(long, default_value_t = format!("{:064}/{}", 0, 256 << 20))]
    blob: String,
    /// Bytes in each message of a write, or of a read from the fast server.
    #[arg(long, default_value_t = 1 << 20)]
    message_size: usize,
}

impl Blob {
    fn head(&self) -> Result<Head> {
        let size = self.message_size.to_string();
        Head::new(reapi::READ, &[(reapi::MESSAGE_SIZE_KEY, &size)])
    }

    fn size(&self) -> Result<usize> {
        let size = self
            .blob
            .rsplit('/')
            .next()
            .and_then(|size| size.parse().ok());
        size.ok_or_else(|| format!("--blob wants HASH/SIZE, not '{}'", self.blob).into())
    }
}

/// How long calls are made before they count: a proxy's first calls also connect it upstream.
const WARM_UP: Duration = Duration::from_millis(100);
/// A measurement that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(60);
/// Memory is measured when it has not grown for this long.
const QUIET: Duration = Duration::from_millis(700);
/// Or after this long.
const PATIENCE: Duration = Duration::from_secs(20);

impl Seed {
    pub fn run(self) -> Result<()> {
        runtime()?.block_on(async {
            let tuning = Tuning {
                frame: 1 << 20,
                window: 1 << 20,
            };
            let connection = Connection::open(&self.to, tuning).await?;
            let mut caller = connection.caller();
            let (upload, update) = (
                Head::of_recc(reapi::BATCH_UPDATE)?,
                Head::of_recc(reapi::UPDATE_RESULT)?,
            );
            for index in 0..reapi::ACTIONS {
                let seeded = reapi::seeded(index);
                for (head, message) in [
                    (&upload, reapi::upload_of(&seeded)),
                    (&update, reapi::update_of(&seeded)),
                ] {
                    let code = caller.unary(head, message).await?;
                    if code != 0 {
                        return Err(format!("the backend refuses: gRPC status {code}").into());
                    }
                }
            }
            Ok(())
        })
    }
}

impl Load {
    pub fn run(self) -> Result<()> {
        let mut line = Map::new();
        for tag in &self.tags {
            let (key, value) = tag.split_once('=').ok_or("--tag wants KEY=VALUE")?;
            let value = value
                .parse::<u64>()
                .map_or_else(|_| json!(value), |number| json!(number));
            line.insert(key.into(), value);
        }
        let measured = runtime()?
            .block_on(async { tokio::time::timeout(LIMIT, self.measure()).await })
            .map_err(|_| format!("it did not end within {} s", LIMIT.as_secs()))??;
        if let Value::Object(measured) = measured {
            line.extend(measured);
        }
        println!("{}", Value::Object(line));
        Ok(())
    }

    async fn measure(&self) -> Result<Value> {
        match &self.shape {
            Shape::Calls {
                kind,
                connections,
                streams,
                seconds,
            } => self.calls(*kind, *connections, *streams, *seconds).await,
            Shape::Connect { seconds } => self.connect(*seconds).await,
            Shape::Read { blob, seconds } => self.read(blob, *seconds).await,
            Shape::Write { blob, seconds } => self.write(blob, *seconds).await,
            Shape::During { blob, seconds } => self.during(blob, *seconds).await,
            Shape::Idle { connections } => self.idle(*connections).await,
            Shape::Open {
                connections,
                streams,
            } => self.open(*connections, *streams).await,
            Shape::Stalled { streams, blob } => self.stalled(*streams, blob).await,
        }
    }

    fn family(&self) -> Family {
        self.pid.map(Family::of).unwrap_or_default()
    }

    async fn connection(&self) -> Result<Connection> {
        Connection::open(&self.to, self.tuning).await
    }

    async fn calls(
        &self,
        kind: Kind,
        connections: usize,
        streams: usize,
        seconds: f64,
    ) -> Result<Value> {
        let (head, messages) = kind.requests()?;
        let mut open = Vec::new();
        for _ in 0..connections {
            open.push(self.connection().await?);
        }
        let family = self.family();
        let begin = Instant::now() + WARM_UP;
        let end = begin + Duration::from_secs_f64(seconds);
        let mut tasks = JoinSet::new();
        for (index, connection) in open.iter().cycle().take(connections * streams).enumerate() {
            let calls = Calls {
                head: head.clone(),
                messages: messages.clone(),
                first: index,
            };
            tasks.spawn(calls.until(connection.caller(), begin, end));
        }
        tokio::time::sleep_until(begin.into()).await;
        let before = family.cpu_ns();
        tokio::time::sleep_until(end.into()).await;
        let cpu_ns = family.cpu_ns().saturating_sub(before);
        let mut latencies = Latencies::default();
        while let Some(done) = tasks.join_next().await {
            latencies.0.extend(done??.0);
        }
        let mut told = latencies.tell(seconds)?;
        if self.pid.is_some() {
            told["cpu_us"] = json!(cpu_ns as f64 / 1e3 / latencies.0.len() as f64);
        }
        Ok(told)
    }

    async fn connect(&self, seconds: f64) -> Result<Value> {
        let (head, messages) = Kind::Lookup.requests()?;
        let begin = Instant::now() + WARM_UP;
        let end = begin + Duration::from_secs_f64(seconds);
        let mut latencies = Latencies::default();
        for turn in 0.. {
            let called = Instant::now();
            if called >= end {
                break;
            }
            let connection = self.connection().await?;
            let message = messages[turn % messages.len()].clone();
            succeeded(connection.caller().unary(&head, message).await?)?;
            drop(connection);
            if called >= begin {
                latencies.0.push(called.elapsed());
            }
        }
        latencies.tell(seconds)
    }

    async fn read(&self, blob: &Blob, seconds: f64) -> Result<Value> {
        let (head, size) = (blob.head()?, blob.size()?);
        let message = reapi::read_of(&blob.blob);
        let connection = self.connection().await?;
        let mut caller = connection.caller();
        let mut transfer = Transfer::begin(seconds);
        while transfer.goes_on() {
            let received = caller.download(&head, message.clone()).await?;
            if received < size {
                return Err(format!("{received} bytes came of {size}").into());
            }
            transfer.bytes += size;
        }
        Ok(transfer.tell())
    }

    async fn write(&self, blob: &Blob, seconds: f64) -> Result<Value> {
        let (head, size) = (Head::new(reapi::WRITE, &[])?, blob.size()?);
        let connection = self.connection().await?;
        let mut caller = connection.caller();
        let first = reapi::write_head(size);
        let message = reapi::write_message(blob.message_size);
        let times = size.div_ceil(blob.message_size);
        let mut transfer = Transfer::begin(seconds);
        while transfer.goes_on() {
            let messages = once(first.clone()).chain(repeat_n(message.clone(), times));
            let answer = caller.upload(&head, messages).await?;
            succeeded(answer)?;
            transfer.bytes += size;
        }
        Ok(transfer.tell())
    }

    /// The reader has a thread of its own, so that it is the proxy and the backend that lookups
    /// share with it.
    async fn during(&self, blob: &Blob, seconds: f64) -> Result<Value> {
        let (head, message) = (blob.head()?, reapi::read_of(&blob.blob));
        let (to, tuning) = (self.to.clone(), self.tuning);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let (reads, reading) = tokio::sync::oneshot::channel();
        let reader = thread::Builder::new().spawn(move || -> Result<Transfer> {
            runtime()?.block_on(async {
                let connection = Connection::open(&to, tuning).await?;
                let mut caller = connection.caller();
                let (_, mut body) = caller.start(&head, message.clone(), true).await?;
                let _ = reads.send(());
                let mut transfer = Transfer::begin(0.0);
                while !stopped.load(Ordering::Relaxed) {
                    match body.data().await {
                        Some(chunk) => {
                            transfer.bytes += chunk.as_ref().map_or(0, Bytes::len);
                            body.flow_control().release_capacity(chunk?.len())?;
                        }
                        None => body = caller.start(&head, message.clone(), true).await?.1,
                    }
                }
                Ok(transfer)
            })
        })?;
        reading.await?;
        let mut told = self.calls(Kind::Lookup, 1, 1, seconds).await?;
        stop.store(true, Ordering::Relaxed);
        let transfer = reader.join().map_err(|_| "the reader panicked")??;
        told["mb_per_s"] = transfer.tell()["mb_per_s"].take();
        Ok(told)
    }

    async fn idle(&self, connections: usize) -> Result<Value> {
        let (head, messages) = Kind::Lookup.requests()?;
        let message = &messages[0];
        let mut open = vec![self.connection().await?];
        succeeded(open[0].caller().unary(&head, message.clone()).await?)?;
        let before = self.settled().await?;
        for _ in 0..connections {
            let connection = self.connection().await?;
            succeeded(connection.caller().unary(&head, message.clone()).await?)?;
            open.push(connection);
        }
        self.grown(before, connections).await
    }

    async fn open(&self, connections: usize, streams: usize) -> Result<Value> {
        let head = Head::new(reapi::HOLD, &[])?;
        let mut open = Vec::new();
        let mut held = Vec::new();
        for _ in 0..connections {
            let connection = self.connection().await?;
            let message = Bytes::from_static(&[0; 5]);
            held.push(connection.caller().start(&head, message, false).await?);
            open.push(connection);
        }
        let before = self.settled().await?;
        for connection in &open {
            let mut tasks = JoinSet::new();
            for _ in 1..streams {
                let (mut caller, head) = (connection.caller(), head.clone());
                tasks.spawn(async move {
                    let message = Bytes::from_static(&[0; 5]);
                    caller.start(&head, message, false).await
                });
            }
            while let Some(started) = tasks.join_next().await {
                held.push(started??);
            }
        }
        self.grown(before, connections * (streams - 1)).await
    }

    async fn stalled(&self, streams: usize, blob: &Blob) -> Result<Value> {
        let (head, message) = (blob.head()?, reapi::read_of(&blob.blob));
        let connection = self.connection().await?;
        let (lookup, messages) = Kind::Lookup.requests()?;
        let code = connection
            .caller()
            .unary(&lookup, messages[0].clone())
            .await?;
        succeeded(code)?;
        let before = self.settled().await?;
        let mut unread = JoinSet::new();
        for _ in 0..streams {
            let (mut caller, head) = (connection.caller(), head.clone());
            let message = message.clone();
            // Not even its head may come, once the connection's window is full: none waits for it.
            unread.spawn(async move {
                let _unread = caller.start(&head, message, true).await;
                pending::<()>().await;
            });
        }
        self.grown(before, streams).await
    }

    /// The proxy's memory in KiB, once it does not grow any more.
    async fn settled(&self) -> Result<u64> {
        let pid = self.pid.ok_or("memory is a process's: --pid is missing")?;
        let began = Instant::now();
        let (mut most, mut since) = (0, Instant::now());
        while since.elapsed() < QUIET && began.elapsed() < PATIENCE {
            let now = Family::of(pid).pss_kib();
            // Less than a part in a thousand is noise.
            if now > most + most / 1000 {
                (most, since) = (now, Instant::now());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(most)
    }

    async fn grown(&self, before: u64, by: usize) -> Result<Value> {
        let grown = self.settled().await?.saturating_sub(before);
        Ok(json!({ "kib_each": grown as f64 / by as f64, "kib_before": before, "number": by }))
    }
}

impl Kind {
    fn requests(self) -> Result<(Head, Arc<[Bytes]>)> {
        Ok(match self {
            Kind::Lookup => (
                Head::of_recc(reapi::LOOKUP)?,
                (0..reapi::ACTIONS).map(reapi::lookup).collect(),
            ),
            Kind::Echo => (Head::of_recc(reapi::ECHO)?, Arc::new([reapi::lookup(0)])),
        })
    }
}

/// One caller's calls, one after the other.
struct Calls {
    head: Head,
    messages: Arc<[Bytes]>,
    first: usize,
}

impl Calls {
    /// The latencies of the calls that began between `begin` and `end`.
    async fn until(self, mut caller: Caller, begin: Instant, end: Instant) -> Result<Latencies> {
        let mut latencies = Latencies::default();
        for turn in self.first.. {
            let called = Instant::now();
            if called >= end {
                break;
            }
            let message = self.messages[turn % self.messages.len()].clone();
            succeeded(caller.unary(&self.head, message).await?)?;
            if called >= begin {
                latencies.0.push(called.elapsed());
            }
        }
        Ok(latencies)
    }
}

#[derive(Default)]
struct Latencies(Vec<Duration>);

impl Latencies {
    fn tell(&mut self, seconds: f64) -> Result<Value> {
        self.0.sort_unstable();
        let at = |part: f64| {
            let index = (self.0.len() as f64 * part) as usize;
            self.0
                .get(index)
                .map(|latency| latency.as_nanos() as f64 / 1e3)
        };
        let p50 = at(0.5).ok_or("no call came back in time")?;
        Ok(json!({
            "calls": self.0.len(),
            "per_s": self.0.len() as f64 / seconds,
            "p50_us": p50,
            "p99_us": at(0.99),
        }))
    }
}

/// Blobs one after the other, at least one.
struct Transfer {
    began: Instant,
    seconds: f64,
    bytes: usize,
}

impl Transfer {
    fn begin(seconds: f64) -> Self {
        Transfer {
            began: Instant::now(),
            seconds,
            bytes: 0,
        }
    }

    fn goes_on(&self) -> bool {
        self.bytes == 0 || self.began.elapsed().as_secs_f64() < self.seconds
    }

    fn tell(&self) -> Value {
        json!({ "mb_per_s": self.bytes as f64 / 1e6 / self.began.elapsed().as_secs_f64() })
    }
}

fn succeeded(code: u16) -> Result<()> {
    match code {
        0 => Ok(()),
        code => Err(Failed(code).into()),
    }
}

/// A call that ended with another gRPC status than OK.
#[derive(Debug)]
struct Failed(u16);

impl std::error::Error for Failed {}

impl fmt::Display for Failed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a call ended with gRPC status {}", self.0)
    }
}

/// A runtime on this thread alone.
pub fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}
