//! One client's HTTP/2 connection: its calls are served as tasks of their own, and it ends with
//! its last call, or when the client is gone.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use crate::http2::HANDSHAKE_TIMEOUT;
use crate::http2::connection::Connection;
use crate::http2::stream::StreamError;
use crate::proxy::{Client, Proxy};
use crate::workspace::peer::Peer;

/// How long a connection without any call may last after a request to stop.
const SILENT_GRACE: Duration = Duration::from_secs(1);

/// Serves one connection to its end.
///
/// # Errors
/// Why HTTP/2 came to an end before its time; a client that just goes is no error.
pub async fn serve<S>(
    mut connection: Connection<S>,
    peer: Arc<Peer>,
    proxy: Arc<Proxy>,
) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let client = Client::new(peer);
    let mut late = pin!(tokio::time::sleep(HANDSHAKE_TIMEOUT));
    let mut was_leaving = false;
    let carried = poll_fn(|cx| {
        match connection.poll(cx, |request| proxy.serve(&client, request)) {
            Poll::Pending => {}
            Poll::Ready(Ok(()) | Err(StreamError::Broken(_))) => return Poll::Ready(Ok(())),
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error.to_string())),
        }
        // No clock is set for what has arrived already.
        let standing = connection.standing();
        match (standing.is_greeted, standing.is_leaving) {
            (true, false) => Poll::Pending,
            (false, true) => Poll::Ready(Ok(())),
            (false, false) => {
                let too_late = || Err("the client did not open HTTP/2 in time".to_owned());
                late.as_mut().poll(cx).map(|()| too_late())
            }
            (true, true) if client.has_called() => Poll::Pending,
            (true, true) => {
                // A client that never had anything to say may never answer the GOAWAY either.
                if !std::mem::replace(&mut was_leaving, true) {
                    late.as_mut().reset(Instant::now() + SILENT_GRACE);
                }
                late.as_mut().poll(cx).map(Ok)
            }
        }
    });
    carried.await
}
