//! The fast client: one connection, and the three shapes of call that are measured on it.

use std::future::poll_fn;
use std::path::Path;
use std::task::Poll;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Method, Request};
use tokio::net::UnixStream;
use tokio::task::JoinSet;

use crate::server::{drain, send};
use crate::tuning::{HEADER_LIST, Tuning};
use crate::{Result, reapi};

/// More streams than any server announces: as long as this stands, its SETTINGS have not come.
const NOT_SETTLED: usize = (1 << 31) - 7;

/// A connection; closed when dropped.
pub struct Connection {
    sender: SendRequest<Bytes>,
    _driver: JoinSet<()>,
}

/// A request without its body, to be sent many times.
#[derive(Clone)]
pub struct Head(Request<()>);

impl Head {
    pub fn new(path: &str, metadata: &[(&str, &str)]) -> Result<Self> {
        let mut head = Request::builder()
            .method(Method::POST)
            .uri(format!("http://localhost{path}"))
            .header("te", "trailers")
            .header("content-type", "application/grpc")
            .header(
                "user-agent",
                "grpc-c++/1.51.1 grpc-c/29.0.0 (linux; chttp2)",
            )
            .header("grpc-accept-encoding", "identity, deflate, gzip");
        for (name, value) in metadata {
            head = head.header(*name, *value);
        }
        Ok(Head(head.body(())?))
    }

    /// As recc sends it.
    pub fn of_recc(path: &str) -> Result<Self> {
        let metadata = reapi::request_metadata();
        Head::new(path, &[(reapi::REQUEST_METADATA_KEY, &metadata)])
    }
}

impl Connection {
    /// Connects, and waits for the server's SETTINGS as gRPC's C core does before it calls.
    pub async fn open(socket: &Path, tuning: Tuning) -> Result<Self> {
        let stream = UnixStream::connect(socket).await?;
        let (sender, connection) = h2::client::Builder::new()
            .initial_window_size(tuning.window)
            .initial_connection_window_size(tuning.window)
            .max_frame_size(tuning.frame())
            .max_header_list_size(HEADER_LIST)
            .max_send_buffer_size(tuning.window as usize)
            .initial_max_send_streams(NOT_SETTLED)
            .enable_push(false)
            .handshake::<_, Bytes>(stream)
            .await?;
        let mut connection = Box::pin(connection);
        poll_fn(|context| match connection.as_mut().poll(context) {
            Poll::Ready(ended) => Poll::Ready(ended.and_then(|()| Err(h2::Reason::CANCEL.into()))),
            Poll::Pending if connection.max_concurrent_send_streams() == NOT_SETTLED => {
                Poll::Pending
            }
            Poll::Pending => Poll::Ready(Ok(())),
        })
        .await?;
        let mut driver = JoinSet::new();
        // How the connection ends, its calls tell.
        driver.spawn(async { drop(connection.await) });
        Ok(Connection {
            sender,
            _driver: driver,
        })
    }

    /// A way to call, for one task.
    pub fn caller(&self) -> Caller {
        Caller(self.sender.clone())
    }
}

/// Calls on a connection that someone else holds open.
pub struct Caller(SendRequest<Bytes>);

impl Caller {
    async fn begin(
        &mut self,
        head: &Head,
        end: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
        poll_fn(|context| self.0.poll_ready(context)).await?;
        self.0.send_request(head.0.clone(), end)
    }

    /// A call with one message each way: gRPC's status.
    pub async fn unary(&mut self, head: &Head, message: Bytes) -> Result<u16, h2::Error> {
        let (response, mut request) = self.begin(head, false).await?;
        request.send_data(message, true)?;
        answer(response).await
    }

    /// Opens a call, sends `message` and waits for the head of the answer. The request stays open
    /// unless `end`; nothing of the answer is read until the caller does.
    pub async fn start(
        &mut self,
        head: &Head,
        message: Bytes,
        end: bool,
    ) -> Result<(SendStream<Bytes>, RecvStream), h2::Error> {
        let (response, mut request) = self.begin(head, false).await?;
        request.send_data(message, end)?;
        Ok((request, response.await?.into_body()))
    }

    /// Sends a call and takes no interest in it any more.
    pub async fn send_and_drop(&mut self, head: &Head, message: Bytes) -> Result<(), h2::Error> {
        let (_, mut request) = self.begin(head, false).await?;
        request.send_data(message, true)
    }

    /// The number of bytes that a call with one message brings, all of them read and dropped.
    pub async fn download(&mut self, head: &Head, message: Bytes) -> Result<usize> {
        let (_, mut body) = self.start(head, message, true).await?;
        let received = drain(&mut body).await?;
        match body.trailers().await? {
            Some(trailers) if code(&trailers) == 0 => Ok(received),
            _ => Err(format!("the download ended after {received} bytes without success").into()),
        }
    }

    /// Sends the messages, one after the other, unless the answer comes before the last of them.
    pub async fn upload(
        &mut self,
        head: &Head,
        messages: impl IntoIterator<Item = Bytes>,
    ) -> Result<u16, h2::Error> {
        let (response, mut request) = self.begin(head, false).await?;
        let mut sent = Ok(());
        for message in messages {
            sent = send(&mut request, message).await;
            if sent.is_err() {
                break;
            }
        }
        if sent.is_ok() {
            sent = request.send_data(Bytes::new(), true);
        }
        answer(response)
            .await
            .map_err(|error| sent.err().unwrap_or(error))
    }
}

async fn answer(response: ResponseFuture) -> Result<u16, h2::Error> {
    let (head, mut body) = response.await?.into_parts();
    drain(&mut body).await?;
    let trailers = body.trailers().await?;
    Ok(code(trailers.as_ref().unwrap_or(&head.headers)))
}

/// The gRPC status that `headers` tell; 2 (unknown) without one.
pub fn code(headers: &HeaderMap) -> u16 {
    headers
        .get("grpc-status")
        .and_then(|code| code.to_str().ok()?.parse().ok())
        .unwrap_or(2)
}
