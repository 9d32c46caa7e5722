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
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_util::either::Either;

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

/// The kinds of frames that are sent by hand. (RFC 9113, 6.)
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
pub const CONTINUATION: u8 = 9;

/// Flags. Those of `SETTINGS` and `PING` that are called ACK have the bit of END_STREAM.
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const PADDED: u8 = 8;

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
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        framer.0.write_all(preface).await.unwrap();
        framer.send(SETTINGS, 0, 0, b"").await;
        framer
    }

    pub async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        self.0.write_all(&frame).await.unwrap();
    }

    /// Waits for the end of `stream`.
    pub async fn told(&mut self, stream: u32) -> Told {
        let mut data = Vec::new();
        loop {
            let (kind, flags, about, payload) = in_time(self.frame()).await;
            match kind {
                SETTINGS | PING if flags & END_STREAM == 0 => {
                    let echo = if kind == PING { &payload[..] } else { b"" };
                    self.send(kind, END_STREAM, 0, echo).await;
                }
                GOAWAY => return Told::GoneAway,
                RST_STREAM if about == stream => {
                    let code = u32::from_be_bytes(payload[..].try_into().unwrap());
                    return Told::Reset(code.into());
                }
                DATA if about == stream => data.extend(payload),
                _ => {}
            }
            if matches!(kind, DATA | HEADERS) && about == stream && flags & END_STREAM != 0 {
                return Told::Ended(data);
            }
        }
    }

    async fn frame(&mut self) -> (u8, u8, u32, Vec<u8>) {
        let mut head = [0; 9];
        if self.0.read_exact(&mut head).await.is_err() {
            return (GOAWAY, 0, 0, Vec::new());
        }
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        self.0.read_exact(&mut payload).await.unwrap();
        (kind, flags, u32::from_be_bytes(stream), payload)
    }
}

/// A header in HPACK, written out. (RFC 7541, 6.2.2.)
pub fn literal(name: &str, value: &[u8]) -> Vec<u8> {
    let mut field = vec![0];
    for text in [name.as_bytes(), value] {
        let length = text.len();
        if length < 127 {
            field.push(length as u8);
        } else {
            let rest = length - 127;
            assert!(rest < 1 << 14);
            field.extend([127, rest as u8 | 128, (rest >> 7) as u8]);
        }
        field.extend(text);
    }
    field
}
