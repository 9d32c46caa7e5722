//! What listens deals its connections out to threads in turn, each with a runtime of its own.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use tokio::sync::mpsc;

use crate::Result;

/// Serves what connects to the socket `listen`, for ever. How a connection ends is its own affair: a
/// peer that goes away ends it, and that is all.
pub fn serve<F>(
    listen: &Path,
    threads: usize,
    connection: impl Fn(UnixStream) -> F + Clone + Send + 'static,
) -> Result<()>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let listener = UnixListener::bind(listen)?;
    let mut workers = Vec::new();
    for _ in 0..threads.max(1) {
        let (connections, accepted) = mpsc::channel(1024);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let connection = connection.clone();
        thread::Builder::new().spawn(move || runtime.block_on(work(accepted, connection)))?;
        workers.push(connections);
    }
    for (accepted, turn) in listener.incoming().zip((0..workers.len()).cycle()) {
        let socket = accepted?;
        socket.set_nonblocking(true)?;
        workers[turn].blocking_send(socket)?;
    }
    Ok(())
}

async fn work<F>(mut accepted: mpsc::Receiver<UnixStream>, connection: impl Fn(UnixStream) -> F)
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    while let Some(socket) = accepted.recv().await {
        primed::task::spawn("connection", connection(socket));
    }
}
