//! Bounded load of every kind that clients make, through a proxy and directly to its backend, for
//! as long as told: `scripts/soak` watches the proxy's memory meanwhile. How calls ended is counted
//! by kind on both ways; an ending that only the proxy's have is the proxy's fault.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::ValueEnum;
use parking_lot::Mutex;
use primed::digest::Digest;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::client::{Connection, Head, code};
use crate::load::runtime;
use crate::tuning::Tuning;
use crate::{Result, reapi};

#[derive(clap::Args)]
pub struct Mix {
    /// The proxy's socket.
    #[arg(long)]
    through: PathBuf,
    /// Its backend's socket, already seeded.
    #[arg(long)]
    direct: PathBuf,
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// How many times less often directly.
    #[arg(long, default_value_t = 4.0)]
    direct_slower: f64,
}

/// What a client does in one turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Kind {
    /// A connection, some lookups one after the other.
    Hits,
    /// The same of what is not there.
    Misses,
    /// A connection, 64 lookups at once.
    Streams,
    /// A method that the backend does not know.
    Unknown,
    /// A blob of 16 MiB, whose bytes are compared.
    Read,
    /// A new blob of 256 KiB.
    WriteNew,
    /// The blob of 16 MiB, which the backend has: it answers before all of it is there.
    WriteOld,
    /// Reads that are dropped after their first bytes, and a lookup on the same connection.
    CancelReads,
    /// Lookups that are dropped as soon as they are sent, and one that is not.
    CancelLookups,
    /// A connection that is closed in the middle of a read.
    Cut,
    /// The blob of 16 MiB by someone with small windows who takes seconds for it.
    SlowRead,
    /// A connection with a call at its begin and at its end, half a minute later.
    Idle,
}

impl Kind {
    /// How many do this, and how often each of them in a second at most.
    fn clients(self) -> (usize, f64) {
        match self {
            Kind::Hits => (2, 10.0),
            Kind::Misses => (1, 10.0),
            Kind::Streams => (1, 2.0),
            Kind::Unknown | Kind::Read | Kind::Cut => (1, 2.0),
            Kind::WriteNew | Kind::WriteOld => (1, 1.0),
            Kind::CancelReads | Kind::CancelLookups => (1, 4.0),
            Kind::SlowRead => (4, 1.0),
            Kind::Idle => (20, 1.0),
        }
    }
}

const FAST: Tuning = Tuning {
    frame: 4 << 20,
    window: 4 << 20,
};
const SMALL: Tuning = Tuning {
    frame: 16 << 10,
    window: 65_535,
};
/// Whatever is not over by then, hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// One way to the backend, and how the calls on it ended.
struct Way {
    socket: PathBuf,
    /// What sets this way's new blobs apart from the other's: 0 or 1.
    salt: u64,
    big: Bytes,
    big_digest: Digest,
    turn: AtomicU64,
    endings: Mutex<BTreeMap<(Kind, String), u64>>,
}

impl Mix {
    pub fn run(self) -> Result<()> {
        let big: Bytes = bytes_of(0, 16 << 20);
        let way = |socket: &PathBuf, salt| {
            Arc::new(Way {
                socket: socket.clone(),
                salt,
                big: big.clone(),
                big_digest: Digest::of(&big),
                turn: AtomicU64::new(1),
                endings: Mutex::default(),
            })
        };
        let (through, direct) = (way(&self.through, 1), way(&self.direct, 0));
        runtime()?.block_on(async {
            // Reads need the blob there.
            direct.turn(Kind::WriteOld).await?;
            let end = Instant::now() + Duration::from_secs(self.seconds);
            let mut clients = JoinSet::new();
            for kind in Kind::value_variants() {
                let (number, rate) = kind.clients();
                for _ in 0..number {
                    clients.spawn(through.clone().keep(*kind, rate, end));
                }
                clients.spawn(direct.clone().keep(*kind, rate / self.direct_slower, end));
            }
            clients.join_all().await;
            Ok::<(), crate::Error>(())
        })?;
        tell(&through.endings.lock(), &direct.endings.lock())
    }
}

/// Prints both ways' endings.
///
/// # Errors
/// If calls through the proxy ended as none did directly.
fn tell(
    through: &BTreeMap<(Kind, String), u64>,
    direct: &BTreeMap<(Kind, String), u64>,
) -> Result<()> {
    let all: BTreeSet<_> = through.keys().chain(direct.keys()).collect();
    let mut only = 0;
    println!(
        "{:<14}{:>10}{:>10}  ended with",
        "kind", "through", "direct"
    );
    for ending in all {
        let number = |of: &BTreeMap<_, u64>| of.get(ending).copied().unwrap_or(0);
        let (kind, how) = ending;
        let fault = number(direct) == 0 && how != OK;
        only += u64::from(fault) * number(through);
        let mark = if fault {
            "  <- only through the proxy"
        } else {
            ""
        };
        let kind = format!("{kind:?}");
        println!(
            "{kind:<14}{:>10}{:>10}  {how}{mark}",
            number(through),
            number(direct)
        );
    }
    println!("{:<14}{:>10}{:>10}", "all", total(through), total(direct));
    match only {
        0 => Ok(()),
        only => Err(format!("{only} calls through the proxy ended as none did directly").into()),
    }
}

fn total(endings: &BTreeMap<(Kind, String), u64>) -> u64 {
    endings.values().sum()
}

const OK: &str = "OK";

impl Way {
    /// Takes turns until `end`, at most `rate` in a second.
    async fn keep(self: Arc<Self>, kind: Kind, rate: f64, end: Instant) {
        let mut ticks = interval(Duration::from_secs_f64(1.0 / rate));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while Instant::now() < end {
            ticks.tick().await;
            match tokio::time::timeout(LIMIT, self.turn(kind)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => self.ended(kind, error.to_string()),
                Err(_) => self.ended(kind, "hung".into()),
            }
        }
    }

    fn ended(&self, kind: Kind, how: String) {
        *self.endings.lock().entry((kind, how)).or_default() += 1;
    }

    fn answered(&self, kind: Kind, code: u16) {
        self.ended(
            kind,
            if code == 0 {
                OK.into()
            } else {
                format!("gRPC status {code}")
            },
        );
    }

    async fn turn(&self, kind: Kind) -> Result<()> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let tuning = if kind == Kind::SlowRead { SMALL } else { FAST };
        let connection = Connection::open(&self.socket, tuning).await?;
        let mut caller = connection.caller();
        let lookup = Head::of_recc(reapi::LOOKUP)?;
        let read = Head::of_recc(reapi::READ)?;
        let read_message = reapi::read_of(&reapi::blob_name(self.big_digest));
        let hit = reapi::lookup(turn as usize % reapi::ACTIONS);
        match kind {
            Kind::Hits => {
                for _ in 0..turn % 20 {
                    let answer = caller.unary(&lookup, hit.clone()).await?;
                    self.answered(kind, answer);
                }
            }
            Kind::Misses => {
                for salt in 0..turn % 10 {
                    let nothing = reapi::lookup_of_nothing(turn << 8 | salt);
                    self.answered(kind, caller.unary(&lookup, nothing).await?);
                }
            }
            Kind::Streams => {
                let mut calls = JoinSet::new();
                for _ in 0..64 {
                    let (mut caller, lookup, hit) =
                        (connection.caller(), lookup.clone(), hit.clone());
                    calls.spawn(async move { caller.unary(&lookup, hit).await });
                }
                while let Some(answer) = calls.join_next().await {
                    self.answered(kind, answer??);
                }
            }
            Kind::Unknown => {
                let echo = Head::of_recc(reapi::ECHO)?;
                self.answered(kind, caller.unary(&echo, hit).await?);
            }
            Kind::Read | Kind::SlowRead => {
                let (_, mut body) = caller.start(&read, read_message, true).await?;
                let mut whole = Vec::new();
                while let Some(chunk) = body.data().await {
                    let chunk = chunk?;
                    body.flow_control().release_capacity(chunk.len())?;
                    whole.extend_from_slice(&chunk);
                    if kind == Kind::SlowRead {
                        sleep(Duration::from_millis(5)).await;
                    }
                }
                let status = body.trailers().await?.map_or(0, |trailers| code(&trailers));
                if status != 0 || reapi::digest_read(whole.into()) == self.big_digest {
                    self.answered(kind, status);
                } else {
                    self.ended(kind, "other bytes".into());
                }
            }
            Kind::WriteNew | Kind::WriteOld => {
                let blob = match kind {
                    Kind::WriteNew => bytes_of(turn << 1 | self.salt, 256 << 10),
                    _ => self.big.clone(),
                };
                let write = Head::of_recc(reapi::WRITE)?;
                let answer = caller.upload(&write, reapi::write_of(&blob)).await?;
                self.answered(kind, answer);
            }
            Kind::CancelReads => {
                for _ in 0..4 {
                    let (_, mut body) = caller.start(&read, read_message.clone(), true).await?;
                    if let Some(first) = body.data().await {
                        first?;
                    }
                }
                self.answered(kind, caller.unary(&lookup, hit).await?);
            }
            Kind::CancelLookups => {
                for _ in 0..16 {
                    caller.send_and_drop(&lookup, hit.clone()).await?;
                }
                self.answered(kind, caller.unary(&lookup, hit).await?);
            }
            Kind::Cut => {
                let (_, mut body) = caller.start(&read, read_message, true).await?;
                if let Some(first) = body.data().await {
                    first?;
                }
                self.ended(kind, OK.into());
            }
            Kind::Idle => {
                self.answered(kind, caller.unary(&lookup, hit.clone()).await?);
                sleep(Duration::from_secs(30)).await;
                self.answered(kind, caller.unary(&lookup, hit).await?);
            }
        }
        Ok(())
    }
}

/// `size` bytes that are the same for the same `seed`, and compress badly.
fn bytes_of(seed: u64, size: usize) -> Bytes {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.into()
}
