//! A faulty wire: it carries HTTP/2 from a TCP port of its own to a server's Unix socket, and
//! stalls, breaks, slows down, says farewell or is long as a test wants it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{Mutex, oneshot, watch};
use tokio::time::Instant;

use crate::frames::{Frame, HEADERS, LARGEST, PING, PREFACE, RST_STREAM};

/// What is wrong with the wire from the beginning.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Bytes that it carries in a second, in each direction of each connection.
    pub rate: Option<usize>,
    /// How long what is said takes to arrive, in each direction.
    pub lag: Option<Duration>,
    /// When the server says farewell to a connection.
    pub farewell: Option<Farewell>,
}

/// A GOAWAY of a server that ends its connections after so many calls.
#[derive(Clone, Copy, Debug)]
pub enum Farewell {
    /// Right after the last one, and whatever comes before the client knows is served.
    Announced(u32),
    /// When one more comes: that one is not served.
    Refusing(u32),
}

/// What has been asked of the connections so far. They are numbered as they came.
#[derive(Clone, Copy, Debug, Default)]
struct Orders {
    /// Those before this one carry nothing any more, and stay open.
    stalled_before: usize,
    /// Those before this one are closed.
    cut_before: usize,
    /// Those before this one have been told farewell.
    leaving_before: usize,
}

/// What has been seen.
#[derive(Default)]
struct Seen {
    accepted: AtomicUsize,
    open: AtomicUsize,
    pings: AtomicUsize,
    resets: AtomicUsize,
    farewells: AtomicUsize,
    most_under_way: AtomicUsize,
}

/// The end of the wire that is written to.
type Sink = Box<dyn AsyncWrite + Send + Unpin>;

/// The wire. Its connections break when it is dropped.
pub struct Relay {
    address: String,
    orders: watch::Sender<Orders>,
    seen: Arc<Seen>,
    thread: Option<(oneshot::Sender<()>, std::thread::JoinHandle<()>)>,
}

impl Relay {
    /// Listens, for a server at the Unix socket `server`.
    pub fn start(server: &Path, faults: Faults) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (orders, ordered) = watch::channel(Orders::default());
        let (stop, stopped) = oneshot::channel();
        let seen = Arc::new(Seen::default());
        let accepting = Accepting {
            server: server.to_owned(),
            faults,
            ordered,
            seen: seen.clone(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let thread = std::thread::Builder::new()
            .name("relay".to_owned())
            .spawn(move || {
                runtime.block_on(async move {
                    let listener = TcpListener::from_std(listener).unwrap();
                    tokio::select! {
                        () = accepting.run(listener) => (),
                        _ = stopped => (),
                    }
                });
            })
            .unwrap();
        Relay {
            address,
            orders,
            seen,
            thread: Some((stop, thread)),
        }
    }

    /// For primed.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The connections there are become black holes: nothing passes, and nobody is told. New ones
    /// work.
    pub fn stall(&self) {
        let accepted = self.accepted();
        self.orders
            .send_modify(|orders| orders.stalled_before = accepted);
    }

    /// Breaks the connections there are. New ones work.
    pub fn cut(&self) {
        let accepted = self.accepted();
        self.orders
            .send_modify(|orders| orders.cut_before = accepted);
    }

    /// The server says farewell to the connections there are: calls that it knows go on.
    pub fn go_away(&self) {
        let accepted = self.accepted();
        self.orders
            .send_modify(|orders| orders.leaving_before = accepted);
    }

    /// How many connections there have been.
    pub fn accepted(&self) -> usize {
        self.seen.accepted.load(Ordering::SeqCst)
    }

    /// How many connections there are.
    pub fn open(&self) -> usize {
        self.seen.open.load(Ordering::SeqCst)
    }

    /// How many PINGs, without the answers, the client has sent.
    pub fn pings(&self) -> usize {
        self.seen.pings.load(Ordering::SeqCst)
    }

    /// The most bytes that were ever on a long wire, on their way in one direction.
    pub fn most_under_way(&self) -> usize {
        self.seen.most_under_way.load(Ordering::SeqCst)
    }

    /// How many calls the client has reset.
    pub fn resets(&self) -> usize {
        self.seen.resets.load(Ordering::SeqCst)
    }

    /// How often the server has said farewell.
    pub fn farewells(&self) -> usize {
        self.seen.farewells.load(Ordering::SeqCst)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

struct Accepting {
    server: PathBuf,
    faults: Faults,
    ordered: watch::Receiver<Orders>,
    seen: Arc<Seen>,
}

impl Accepting {
    async fn run(self, listener: TcpListener) {
        loop {
            let (client, _) = listener.accept().await.unwrap();
            client.set_nodelay(true).unwrap();
            let number = self.seen.accepted.fetch_add(1, Ordering::SeqCst);
            let server = self.server.clone();
            let connection = Connection {
                faults: self.faults,
                seen: self.seen.clone(),
                calls: AtomicU32::new(0),
                newest: AtomicU32::new(0),
                last_served: AtomicU32::new(LARGEST),
            };
            let mut ordered = self.ordered.clone();
            let mut cut = self.ordered.clone();
            primed::task::spawn("relayed connection", async move {
                connection.seen.open.fetch_add(1, Ordering::SeqCst);
                tokio::select! {
                    // It ends with an error when either side is gone.
                    _ = connection.carry(client, &server, number, &mut ordered) => (),
                    () = ordered_to(&mut cut, |orders| orders.cut_before > number) => (),
                }
                connection.seen.open.fetch_sub(1, Ordering::SeqCst);
            });
        }
    }
}

async fn ordered_to(ordered: &mut watch::Receiver<Orders>, what: impl Fn(&Orders) -> bool) {
    if ordered.wait_for(what).await.is_err() {
        // The relay is gone, and this with it.
        std::future::pending().await
    }
}

struct Connection {
    faults: Faults,
    seen: Arc<Seen>,
    /// Calls that the client has begun.
    calls: AtomicU32,
    /// The newest of them.
    newest: AtomicU32,
    /// The last one that reaches the server.
    last_served: AtomicU32,
}

impl Connection {
    async fn carry(
        &self,
        client: TcpStream,
        server: &Path,
        number: usize,
        ordered: &mut watch::Receiver<Orders>,
    ) -> io::Result<()> {
        let (mut client_says, client) = client.into_split();
        let (mut server_says, server) = UnixStream::connect(server).await?.into_split();
        let mut server = self.lengthened(server);
        let client = Mutex::new(self.lengthened(client));
        let mut farewell = ordered.clone();
        let farewell = async {
            ordered_to(&mut farewell, |orders| orders.leaving_before > number).await;
            let newest = self.newest.load(Ordering::SeqCst);
            self.say_farewell(&client, newest).await?;
            std::future::pending().await
        };
        tokio::select! {
            ended = self.to_server(&mut client_says, &client, &mut server) => ended,
            ended = self.to_client(&mut server_says, &client) => ended,
            ended = farewell => ended,
            () = ordered_to(ordered, |orders| orders.stalled_before > number) => {
                std::future::pending().await
            }
        }
    }

    /// Makes the wire to `end` as long as it is to be.
    fn lengthened(&self, end: impl AsyncWrite + Send + Unpin + 'static) -> Sink {
        let Some(lag) = self.faults.lag else {
            return Box::new(end);
        };
        let (beginning, wire) = tokio::io::duplex(LARGEST as usize);
        let seen = self.seen.clone();
        primed::task::spawn("long wire", async move {
            carry_late(wire, end, lag, &seen).await
        });
        Box::new(beginning)
    }

    async fn to_server(
        &self,
        client_says: &mut (impl AsyncRead + Unpin),
        client: &Mutex<Sink>,
        server: &mut (impl AsyncWrite + Unpin),
    ) -> io::Result<()> {
        let mut preface = [0; PREFACE.len()];
        client_says.read_exact(&mut preface).await?;
        server.write_all(&preface).await?;
        loop {
            let frame = Frame::read(client_says).await?;
            let count = match frame.kind {
                PING if !frame.is_ack() => Some(&self.seen.pings),
                RST_STREAM => Some(&self.seen.resets),
                _ => None,
            };
            if let Some(count) = count {
                count.fetch_add(1, Ordering::SeqCst);
            }
            let is_call =
                frame.kind == HEADERS && frame.stream > self.newest.load(Ordering::SeqCst);
            if is_call {
                self.begin_call(client, frame.stream).await?;
            }
            if frame.stream <= self.last_served.load(Ordering::SeqCst) {
                self.pass(server, &frame).await?;
            }
        }
    }

    async fn begin_call(&self, client: &Mutex<Sink>, stream: u32) -> io::Result<()> {
        let before = self.newest.swap(stream, Ordering::SeqCst);
        let calls = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        match self.faults.farewell {
            Some(Farewell::Announced(limit)) if calls == limit => {
                self.say_farewell(client, LARGEST).await
            }
            Some(Farewell::Refusing(limit)) if calls == limit + 1 => {
                self.say_farewell(client, before).await
            }
            _ => Ok(()),
        }
    }

    async fn say_farewell(&self, client: &Mutex<Sink>, last_served: u32) -> io::Result<()> {
        self.last_served.store(last_served, Ordering::SeqCst);
        self.seen.farewells.fetch_add(1, Ordering::SeqCst);
        let farewell = Frame::go_away(last_served);
        farewell.write(&mut *client.lock().await).await
    }

    async fn to_client(
        &self,
        server_says: &mut (impl AsyncRead + Unpin),
        client: &Mutex<Sink>,
    ) -> io::Result<()> {
        loop {
            let frame = Frame::read(server_says).await?;
            self.pass(&mut *client.lock().await, &frame).await?;
        }
    }

    async fn pass(&self, to: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> io::Result<()> {
        let Some(rate) = self.faults.rate else {
            return frame.write(to).await;
        };
        for part in frame.bytes().chunks(rate.div_ceil(100)) {
            tokio::time::sleep(Duration::from_secs_f64(part.len() as f64 / rate as f64)).await;
            to.write_all(part).await?;
        }
        Ok(())
    }
}

/// Carries everything, each piece so long after it came.
async fn carry_late(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    lag: Duration,
    seen: &Seen,
) -> io::Result<()> {
    let mut under_way = VecDeque::new();
    let mut size = 0;
    let mut piece = vec![0; 256 * 1024];
    loop {
        let due = under_way.front().map(|(due, _)| *due);
        tokio::select! {
            read = from.read(&mut piece) => {
                let read = read?;
                if read == 0 {
                    return Ok(());
                }
                size += read;
                seen.most_under_way.fetch_max(size, Ordering::SeqCst);
                under_way.push_back((Instant::now() + lag, piece[..read].to_vec()));
            }
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                if let Some((_, piece)) = under_way.pop_front() {
                    to.write_all(&piece).await?;
                    size -= piece.len();
                }
            }
        }
    }
}
