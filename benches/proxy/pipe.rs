//! A proxy that understands nothing: whatever comes from a client goes to the backend over a
//! connection of its own, and back. What it costs is what two more sockets and one more process
//! cost, so it shows how much of a proxy's price could be had back at all.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use crate::{Result, threads};

/// Bytes that are moved at once.
const PIECE: usize = 256 * 1024;

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
}

impl Pipe {
    pub fn run(self) -> Result<()> {
        let Pipe {
            listen,
            to,
            threads,
        } = self;
        threads::serve(&listen, threads, move |client| {
            let to = to.clone();
            async move { pass(client, to).await }
        })
    }
}

async fn pass(client: UnixStream, to: PathBuf) -> Result<()> {
    let mut client = tokio::net::UnixStream::from_std(client)?;
    let mut backend = tokio::net::UnixStream::connect(to).await?;
    tokio::io::copy_bidirectional_with_sizes(&mut client, &mut backend, PIECE, PIECE).await?;
    Ok(())
}
