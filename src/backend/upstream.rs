//! The way upstream, for forwarded calls and for primed's own alike: a connection, the call on it,
//! and once more on another if the first went away without having looked at it.

use std::sync::Arc;
use std::time::Duration;

use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use http::{HeaderMap, Method, Request};

use super::connections::{ConnectError, Connections};
use super::exchange::{Answer, Begun, CallError, Exchange};
use super::health::UpstreamHealth;
use crate::address::Address;
use crate::config::Patience;
use crate::http2::body::Body;

/// How often a call may meet a connection that goes away without having looked at it.
const ATTEMPTS: usize = 3;

/// The upstream, as one thread sees it.
pub struct Upstream {
    connections: Connections,
    patience: Patience,
    authority: Authority,
}

/// What a call is to be sent with.
#[derive(Clone, Debug)]
pub struct Head {
    /// HTTP's method: POST, for gRPC.
    pub method: Method,
    /// The name of the gRPC method.
    pub path: PathAndQuery,
    /// All headers.
    pub headers: HeaderMap,
}

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The call failed.
    #[error(transparent)]
    Call(#[from] CallError),
}

impl Upstream {
    /// The upstream at `address`; connected to when it is first needed.
    pub fn new(address: Address, health: Arc<UpstreamHealth>, patience: Patience) -> Self {
        let authority = match &address {
            Address::Tcp { .. } => Authority::try_from(address.to_string()).ok(),
            Address::Unix(_) | Address::Abstract(_) => None,
        };
        Upstream {
            connections: Connections::new(address, health, patience.keep_alive),
            patience,
            authority: authority.unwrap_or_else(|| Authority::from_static("localhost")),
        }
    }

    /// Makes a call, and returns when its answer has begun.
    ///
    /// # Errors
    /// `UpstreamError`, when there will be no answer.
    pub async fn call(&self, head: Head, body: Body) -> Result<Answer, UpstreamError> {
        let mut body = body;
        for _ in 1..ATTEMPTS {
            match self.begin(head.clone(), body).await? {
                Begun::Answer(answer) => return Ok(answer),
                Begun::NotProcessed(unsent, _) => body = unsent,
            }
        }
        match self.begin(head, body).await? {
            Begun::Answer(answer) => Ok(answer),
            Begun::NotProcessed(_, error) => Err(CallError::Broken(error).into()),
        }
    }

    /// Connects, if there is no connection, for at most `patience`.
    ///
    /// # Errors
    /// `ConnectError`, when that fails.
    pub async fn reach(&self, patience: Duration) -> Result<(), ConnectError> {
        self.connections.ready(patience).await.map(drop)
    }

    async fn begin(&self, head: Head, body: Body) -> Result<Begun, UpstreamError> {
        let connection = self.connections.ready(self.patience.connect).await?;
        let exchange = Exchange::begin(connection, self.request(head), body)?;
        Ok(exchange.answer().await?)
    }

    fn request(&self, head: Head) -> Request<()> {
        let mut uri = http::uri::Parts::default();
        uri.scheme = Some(Scheme::HTTP);
        uri.authority = Some(self.authority.clone());
        uri.path_and_query = Some(head.path);
        let mut request = Request::new(());
        *request.method_mut() = head.method;
        *request.uri_mut() = Uri::from_parts(uri).unwrap_or_default();
        *request.version_mut() = http::Version::HTTP_2;
        *request.headers_mut() = head.headers;
        request
    }
}
