//! A proxy that understands nothing: whatever comes from a client goes to the backend over a
//! connection of its own, and back. What it costs is what two more sockets and one more process
//! cost, so it shows how much of a proxy's price could be had back at all. It may also stand for a
//! long line.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::{Result, threads};

/// Bytes that are moved at once.
const PIECE: usize = 256 * 1024;
/// Pieces that a long line holds.
const ON_THE_LINE: usize = 1024;

#[derive(clap::Args)]
pub struct Pipe {
    /// The socket to listen at.
    #[arg(long)]
    listen: PathBuf,
    /// The backend's.
    #[arg(long)]
    to: PathBuf,
    /// Threads; connections are dealt out in turn.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// How long everything takes to arrive, in each direction, in milliseconds.
    #[arg(long, default_value_t = 0)]
    lag_ms: u64,
}

impl Pipe {
    pub fn run(self) -> Result<()> {
        let Pipe {
            listen,
            to,
            threads,
            lag_ms,
        } = self;
        let lag = Duration::from_millis(lag_ms);
        threads::serve(&listen, threads, move |client| {
            let to = to.clone();
            async move { pass(client, to, lag).await }
        })
    }
}

async fn pass(client: UnixStream, to: PathBuf, lag: Duration) -> Result<()> {
    let mut client = tokio::net::UnixStream::from_std(client)?;
    let mut backend = tokio::net::UnixStream::connect(to).await?;
    if lag.is_zero() {
        tokio::io::copy_bidirectional_with_sizes(&mut client, &mut backend, PIECE, PIECE).await?;
        return Ok(());
    }
    let (client, to_client) = client.into_split();
    let (backend, to_backend) = backend.into_split();
    tokio::try_join!(
        pass_late(client, to_backend, lag),
        pass_late(backend, to_client, lag)
    )?;
    Ok(())
}

/// Passes everything on so long after it came.
async fn pass_late(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    lag: Duration,
) -> Result<()> {
    let (came, mut under_way) = mpsc::channel::<(Instant, Bytes)>(ON_THE_LINE);
    let take_in = async {
        loop {
            let mut piece = BytesMut::with_capacity(PIECE);
            if from.read_buf(&mut piece).await? == 0 {
                return Ok(());
            }
            came.send((Instant::now() + lag, piece.freeze())).await?;
        }
    };
    let hand_out = async {
        while let Some((due, piece)) = under_way.recv().await {
            tokio::time::sleep_until(due).await;
            to.write_all(&piece).await?;
        }
        Ok(())
    };
    let ended: Result<((), ())> = tokio::try_join!(take_in, hand_out);
    ended.map(drop)
}
