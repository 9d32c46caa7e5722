//! Both ends of a connection as bare HTTP/2, which hide nothing: an upstream whose calls the test
//! answers, and a client that is told all that arrives. Both are `h2`, and where that is too
//! well-behaved, frames by hand.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::path::{Path, PathBuf};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_util::either::Either;

use crate::frames::{
    ACK, DATA, END_STREAM, Frame, GOAWAY, HEADERS, PING, PREFACE, RST_STREAM, SETTINGS,
};
use crate::support::PATIENCE;

/// Of a connection. `h2` takes many small frames in a row for an attack, unless this is large.
const WINDOW: u32 = 1 << 24;

/// An upstream whose calls the test answers itself. It listens on a Unix socket and, as `h2`
/// refuses the authority that new gRPC sends there, on TCP.
pub struct Upstream {
    calls: mpsc::Receiver<UpstreamCall>,
    pub socket: PathBuf,
    pub port: u16,
}

pub type UpstreamCall = (Request<RecvStream>, SendResponse<Bytes>);

impl Upstream {
    pub async fn listen(directory: &Path) -> Self {
        let socket = directory.join("upstream.sock");
        let unix = UnixListener::bind(&socket).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = tcp.local_addr().unwrap().port();
        let (sender, calls) = mpsc::channel(16);
        primed::task::spawn("upstream", async move {
            loop {
                let stream = tokio::select! {
                    accepted = unix.accept() => Either::Left(accepted.unwrap().0),
                    accepted = tcp.accept() => Either::Right(accepted.unwrap().0),
                };
                let sender = sender.clone();
                primed::task::spawn("upstream connection", async move {
                    let mut server = h2::server::Builder::new();
                    server.initial_connection_window_size(WINDOW);
                    let mut connection = server.handshake::<_, Bytes>(stream).await.unwrap();
                    while let Some(Ok(call)) = connection.accept().await {
                        sender.send(call).await.unwrap();
                    }
                });
            }
        });
        Upstream {
            calls,
            socket,
            port,
        }
    }

    /// For primed.
    pub fn address(&self) -> String {
        format!("unix:{}", self.socket.display())
    }

    /// Waits for the next call.
    pub async fn call(&mut self) -> UpstreamCall {
        in_time(self.calls.recv()).await.unwrap()
    }
}

/// What `future` becomes, which must not take for ever.
pub async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap()
}

/// A client on the Unix socket `socket`.
pub async fn connect(socket: &Path) -> SendRequest<Bytes> {
    let stream = UnixStream::connect(socket).await.unwrap();
    let mut client = h2::client::Builder::new();
    client.initial_connection_window_size(WINDOW);
    let (client, connection) = client.handshake(stream).await.unwrap();
    primed::task::spawn("client", connection);
    client
}

/// Begins a call, and leaves its requests to the caller.
pub async fn begin(
    client: &SendRequest<Bytes>,
    method: &str,
    headers: HeaderMap,
) -> (ResponseFuture, SendStream<Bytes>) {
    let mut request = Request::post(format!("http://localhost{method}"))
        .body(())
        .unwrap();
    *request.headers_mut() = headers;
    let mut client = in_time(client.clone().ready()).await.unwrap();
    client.send_request(request, false).unwrap()
}

/// Headers or trailers in the order in which they came. (Those of one name stand together.)
pub type Fields = Vec<(HeaderName, HeaderValue)>;

pub fn fields(headers: &HeaderMap) -> Fields {
    let pairs = headers.iter();
    pairs
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

/// How a body ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    Trailers(Fields),
    NoTrailers,
    Reset(Option<Reason>),
}

/// Reads a body to its end.
pub async fn read(mut body: RecvStream) -> (Vec<u8>, Ending) {
    let mut read = Vec::new();
    while let Some(data) = in_time(body.data()).await {
        match data {
            Ok(data) => {
                body.flow_control().release_capacity(data.len()).unwrap();
                read.extend_from_slice(&data);
            }
            Err(error) => return (read, Ending::Reset(error.reason())),
        }
    }
    let ending = match in_time(body.trailers()).await {
        Ok(Some(trailers)) => Ending::Trailers(fields(&trailers)),
        Ok(None) => Ending::NoTrailers,
        Err(error) => Ending::Reset(error.reason()),
    };
    (read, ending)
}

/// All that a client is told.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: Fields,
    pub data: Vec<u8>,
    pub ending: Ending,
}

pub async fn answer(response: ResponseFuture) -> Result<Answer, Option<Reason>> {
    let response = in_time(response).await.map_err(|error| error.reason())?;
    Ok(answer_of(response).await)
}

pub async fn answer_of(response: Response<RecvStream>) -> Answer {
    let (parts, body) = response.into_parts();
    let (data, ending) = read(body).await;
    Answer {
        status: parts.status,
        headers: fields(&parts.headers),
        data,
        ending,
    }
}

pub fn headers(pairs: &[(&'static str, &'static [u8])]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        let value = HeaderValue::from_bytes(value).unwrap();
        headers.append(HeaderName::from_static(name), value);
    }
    headers
}

/// A client that writes frames as the test wants them.
pub struct Framer<S>(S);

/// What a `Framer` is told about one stream: data, and how it ended.
#[derive(Debug, PartialEq)]
pub enum Told {
    Ended(Vec<u8>),
    Reset(Reason),
    GoneAway,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Framer<S> {
    pub async fn open(stream: S) -> Self {
        let mut framer = Framer(stream);
        framer.0.write_all(PREFACE).await.unwrap();
        framer.send(SETTINGS, 0, 0, b"").await;
        framer
    }

    pub async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let frame = Frame::new(kind, flags, stream, payload);
        frame.write(&mut self.0).await.unwrap();
    }

    /// Waits for the end of `stream`.
    pub async fn told(&mut self, stream: u32) -> Told {
        let mut data = Vec::new();
        loop {
            let Ok(frame) = in_time(Frame::read(&mut self.0)).await else {
                return Told::GoneAway;
            };
            let ours = frame.stream == stream;
            match frame.kind {
                SETTINGS if !frame.is_ack() => self.send(SETTINGS, ACK, 0, b"").await,
                PING if !frame.is_ack() => self.send(PING, ACK, 0, &frame.payload).await,
                GOAWAY => return Told::GoneAway,
                RST_STREAM if ours => {
                    let code = u32::from_be_bytes(frame.payload[..].try_into().unwrap());
                    return Told::Reset(code.into());
                }
                DATA if ours => data.extend(frame.payload),
                _ => {}
            }
            if matches!(frame.kind, DATA | HEADERS) && ours && frame.flags & END_STREAM != 0 {
                return Told::Ended(data);
            }
        }
    }
}
