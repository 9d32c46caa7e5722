//! One client's HTTP/2 connection: its calls are served as tasks of their own, and it ends with
//! its last call, or when the client is gone.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::http2::HANDSHAKE_TIMEOUT;
use crate::http2::connection::Connection;
use crate::http2::stream::StreamError;
use crate::proxy::{Client, Proxy};
use crate::workspace::peer::Peer;

/// How long a connection without any call may last after a request to stop.
const SILENT_GRACE: Duration = Duration::from_secs(1);

/// Serves one connection to its end. When `stopped` is ready it takes no new calls.
///
/// # Errors
/// Why HTTP/2 came to an end before its time; a client that just goes is no error.
pub async fn serve<S>(
    stream: S,
    peer: Arc<Peer>,
    proxy: Arc<Proxy>,
    max_streams: u32,
    stopped: impl Future<Output = ()>,
) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let client = Client::new(peer);
    let mut connection = Connection::server(stream, max_streams);
    let late = tokio::time::sleep(HANDSHAKE_TIMEOUT);
    tokio::pin!(late);
    // No clock is set for what has arrived already.
    let mut carried =
        poll_fn(
            |cx| match connection.poll(cx, |request| proxy.serve(&client, request)) {
                Poll::Pending if !connection.is_greeted() && late.as_mut().poll(cx).is_ready() => {
                    Poll::Ready(Err("the client did not open HTTP/2 in time".to_owned()))
                }
                Poll::Pending => Poll::Pending,
                Poll::Ready(Ok(()) | Err(StreamError::Broken(_))) => Poll::Ready(Ok(())),
                Poll::Ready(Err(error)) => Poll::Ready(Err(error.to_string())),
            },
        );
    tokio::select! {
        biased;
        ended = &mut carried => return ended,
        () = stopped => {}
    }
    drop(carried);
    if !connection.is_greeted() {
        return Ok(());
    }
    connection.leave();
    let mut carried = poll_fn(|cx| connection.poll(cx, |request| proxy.serve(&client, request)));
    // A client that never had anything to say may never answer the GOAWAY either.
    let soon = tokio::time::timeout(SILENT_GRACE, &mut carried).await;
    let ended = match soon {
        Ok(ended) => ended,
        Err(_) if client.has_called() => carried.await,
        Err(_) => return Ok(()),
    };
    match ended {
        Ok(()) | Err(StreamError::Broken(_)) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}
