//! One client's HTTP/2 connection: its calls are served as tasks of their own, and it ends with
//! its last call, or when the client is gone.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::server::Builder;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

use super::authority::AuthorityRewrite;
use super::shards::stopped;
use crate::http2::gathered::Gathered;
use crate::http2::{
    CLIENT_HEADER_LIST, CLIENT_WINDOW, DATA_FRAME_BUDGET, HANDSHAKE_TIMEOUT, MAX_FRAME_SIZE,
    SEND_BUFFER, STREAM_WINDOW,
};
use crate::proxy::{Client, Proxy, Reply};
use crate::workspace::peer::Peer;

/// A client that cancels a burst of calls is no attack: h2's own limit (20) closes the connection.
const MAX_PENDING_RESETS: usize = 10_000;
/// How long a connection without any call may last after a request to stop.
const SILENT_GRACE: Duration = Duration::from_secs(1);

/// Serves one connection to its end. After `shutdown` it takes no new calls.
///
/// # Errors
/// Why HTTP/2 came to an end before its time; a client that just goes is no error.
pub async fn serve<S>(
    stream: S,
    peer: Arc<Peer>,
    proxy: Arc<Proxy>,
    max_streams: u32,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let client = Client::new(peer);
    let stopping = stopped(&mut shutdown);
    tokio::pin!(stopping);
    let handshake = Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CLIENT_WINDOW)
        .max_frame_size(MAX_FRAME_SIZE)
        .max_header_list_size(CLIENT_HEADER_LIST)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_streams(max_streams)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_local_error_reset_streams(Some(MAX_PENDING_RESETS))
        .data_frame_budget(DATA_FRAME_BUDGET)
        .handshake::<_, Bytes>(AuthorityRewrite::new(Gathered::new(stream)));
    let mut connection = tokio::select! {
        opened = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake) => match opened {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err("the client did not open HTTP/2 in time".to_owned()),
        },
        () = &mut stopping => return Ok(()),
    };
    let mut stopped = false;
    loop {
        let accepted = tokio::select! {
            biased;
            accepted = connection.accept() => accepted,
            () = &mut stopping, if !stopped => {
                stopped = true;
                connection.graceful_shutdown();
                if client.has_called() {
                    continue;
                }
                // A client that never had anything to say may never answer the GOAWAY either.
                match tokio::time::timeout(SILENT_GRACE, connection.accept()).await {
                    Ok(accepted) => accepted,
                    Err(_) => return Ok(()),
                }
            }
        };
        match accepted {
            Some(Ok((request, reply))) => {
                proxy.serve(&client, request, Reply::Due(reply));
            }
            Some(Err(error)) if error.is_io() => return Ok(()),
            Some(Err(error)) => return Err(error.to_string()),
            None => return Ok(()),
        }
    }
}
