//! The fast server: raw HTTP/2 on one thread for each core, so that what stands before it shows.

use std::collections::HashMap;
use std::future::poll_fn;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use primed::digest::Digest;

use crate::tuning::{HEADER_LIST, RESETS, STREAMS, Tuning};
use crate::{Result, reapi, threads};

#[derive(clap::Args)]
pub struct Server {
    /// The socket to listen at.
    #[arg(long)]
    listen: PathBuf,
    #[command(flatten)]
    tuning: Tuning,
    /// Threads; connections are dealt out in turn.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

/// What is answered always in the same way.
struct Answers {
    lookup: Bytes,
    capabilities: Bytes,
    blobs: HashMap<Digest, Bytes>,
}

impl Server {
    pub fn run(self) -> Result<()> {
        let answers = Arc::new(Answers {
            lookup: reapi::lookup_answer(),
            capabilities: reapi::capabilities_answer(),
            blobs: reapi::seeded_blobs(),
        });
        let tuning = self.tuning;
        threads::serve(&self.listen, self.threads, move |socket| {
            connection(socket, tuning, answers.clone())
        })
    }
}

async fn connection(socket: UnixStream, tuning: Tuning, answers: Arc<Answers>) -> Result<()> {
    let socket = tokio::net::UnixStream::from_std(socket)?;
    let mut connection = h2::server::Builder::new()
        .initial_window_size(tuning.window)
        .initial_connection_window_size(tuning.window)
        .max_frame_size(tuning.frame())
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(HEADER_LIST)
        .max_send_buffer_size(tuning.window as usize)
        .max_pending_accept_reset_streams(RESETS)
        .max_local_error_reset_streams(None)
        .handshake::<_, Bytes>(socket)
        .await?;
    while let Some(incoming) = connection.accept().await {
        let (request, respond) = incoming?;
        let answers = answers.clone();
        let mut call = Box::pin(async move {
            // A call that its client dropped ends alone.
            let _ = answer(request, respond, &answers).await;
        });
        // Most requests are complete when they are seen; those need no task.
        let done = poll_fn(|context| Poll::Ready(call.as_mut().poll(context).is_ready())).await;
        if !done {
            primed::task::spawn("call", call);
        }
    }
    Ok(())
}

async fn answer(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    answers: &Answers,
) -> Result<()> {
    let (head, mut body) = request.into_parts();
    let headers = Response::builder()
        .header("content-type", "application/grpc")
        .body(())?;
    match head.uri.path() {
        reapi::READ => {
            let request = collect(&mut body).await?;
            let size = reapi::size_read(&request);
            let message_size = head.headers.get(reapi::MESSAGE_SIZE_KEY);
            let message_size = message_size.and_then(|value| value.to_str().ok()?.parse().ok());
            let message_size = message_size.unwrap_or(1 << 20);
            let message = reapi::read_message(message_size);
            let mut stream = respond.send_response(headers, false)?;
            for _ in 0..size.div_ceil(message_size) {
                send(&mut stream, message.clone()).await?;
            }
            stream.send_trailers(status(0))?;
        }
        reapi::WRITE => {
            let received = drain(&mut body).await?;
            small(respond, headers, reapi::write_answer(received))?;
        }
        reapi::HOLD => {
            let mut stream = respond.send_response(headers, false)?;
            drain(&mut body).await?;
            stream.send_trailers(status(0))?;
        }
        reapi::LOOKUP => {
            drain(&mut body).await?;
            small(respond, headers, answers.lookup.clone())?;
        }
        reapi::ECHO => {
            let message = collect(&mut body).await?;
            small(respond, headers, message)?;
        }
        reapi::CAPABILITIES => small(respond, headers, answers.capabilities.clone())?,
        reapi::BATCH_READ => {
            let request = collect(&mut body).await?;
            let message = reapi::batch_read_answer(&answers.blobs, &request);
            small(respond, headers, message)?;
        }
        _ => {
            let (mut head, ()) = headers.into_parts();
            head.headers.extend(status(12));
            respond.send_response(Response::from_parts(head, ()), true)?;
        }
    }
    Ok(())
}

/// One message and the trailers of success.
fn small(
    mut respond: SendResponse<Bytes>,
    headers: Response<()>,
    message: Bytes,
) -> Result<(), h2::Error> {
    let mut stream = respond.send_response(headers, false)?;
    stream.send_data(message, false)?;
    stream.send_trailers(status(0))
}

fn status(code: u16) -> HeaderMap {
    const STATUS: HeaderName = HeaderName::from_static("grpc-status");
    HeaderMap::from_iter([(STATUS, HeaderValue::from(code))])
}

/// Sends all of `data`, as fast as the windows allow.
pub async fn send(stream: &mut SendStream<Bytes>, mut data: Bytes) -> Result<(), h2::Error> {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        if stream.capacity() == 0 {
            match poll_fn(|context| stream.poll_capacity(context)).await {
                Some(granted) => granted?,
                None => return Err(h2::Reason::CANCEL.into()),
            };
        }
        let now = stream.capacity().min(data.len());
        stream.send_data(data.split_to(now), false)?;
    }
    Ok(())
}

/// The number of bytes of a body, which are dropped as they come.
pub async fn drain(body: &mut RecvStream) -> Result<usize, h2::Error> {
    let mut received = 0;
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        received += chunk.len();
        body.flow_control().release_capacity(chunk.len())?;
    }
    Ok(received)
}

/// A small body in one piece.
pub async fn collect(body: &mut RecvStream) -> Result<Bytes, h2::Error> {
    let mut whole = Bytes::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        whole = match whole.is_empty() {
            true => chunk,
            false => [whole, chunk].concat().into(),
        };
    }
    Ok(whole)
}
