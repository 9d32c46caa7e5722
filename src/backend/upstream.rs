//! The way upstream, for forwarded calls and for primed's own alike: the backend that serves the
//! method, what is added to the call, a connection, and once more another one if the first went
//! away without having looked at the call.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::Method;
use http::uri::{Authority, PathAndQuery, Scheme};
use http_body::Frame;
use tonic::Code;

use super::connections::{ConnectError, Connections, Headers};
use super::credentials::{CredentialError, Credentials, replace};
use super::dial::Dialer;
use super::embedded::Embedded;
use super::endpoints::{Endpoint, Endpoints};
use super::exchange::{Answer, Begun, CallError, Exchange};
use super::health::UpstreamHealth;
use super::instance_rewriter::InstanceRewriter;
use super::instances::InstanceMap;
use crate::address::Address;
use crate::config::upstream::UpstreamConfig;
use crate::config::{Config, Patience};
use crate::grpc;
use crate::http2::body::{Body, BodyError};
use crate::http2::fields::Fields;
use crate::http2::hpack::Pseudo;
use crate::tls::TlsError;
use crate::tls::client::ClientTls;

/// How often a call may meet a connection whose other end does not look at it.
const ATTEMPTS: usize = 3;

/// Where calls go, and what they take along. Shared by all threads.
pub struct Routes {
    endpoints: Endpoints,
    /// For each of the endpoints' addresses.
    destinations: Vec<Destination>,
    instances: Arc<InstanceMap>,
    patience: Patience,
}

struct Destination {
    dialer: Dialer,
    scheme: Scheme,
    authority: Authority,
    credentials: Credentials,
    health: Arc<UpstreamHealth>,
}

/// Why calls cannot go where they are to go.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// A host name that no certificate can have.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Credentials that cannot be had.
    #[error(transparent)]
    Credentials(#[from] CredentialError),
}

impl Routes {
    /// The routes that `config` describes; `tls` and `embedded` are needed where an address says so.
    ///
    /// # Errors
    /// `RouteError`: what is wrong with the settings.
    pub fn new(
        config: &Config,
        tls: Option<Arc<ClientTls>>,
        embedded: Option<Arc<Embedded>>,
    ) -> Result<Self, RouteError> {
        let endpoints = Endpoints::new(&config.upstream, &config.on_the_way);
        let destination = |address: &Address| {
            let dialer = match (address, &embedded) {
                (Address::Embedded, Some(embedded)) => Dialer::embedded(embedded.clone()),
                _ => {
                    let proxy = config.on_the_way.http_proxy.as_ref();
                    let proxy = proxy.and_then(|proxy| proxy.on_the_way_to(address));
                    if let Some(proxy) = proxy.as_ref().and_then(|proxy| proxy.uri().authority()) {
                        tracing::info!(upstream = %address, %proxy, "there is an HTTP proxy on the way");
                    }
                    Dialer::new(address.clone(), tls.clone(), proxy)?
                }
            };
            let credentials = Credentials::new(&config.on_the_way, address)?;
            Ok(Destination::new(dialer, credentials))
        };
        let destinations = endpoints.addresses().iter().map(destination);
        Ok(Routes {
            destinations: destinations.collect::<Result<_, RouteError>>()?,
            endpoints,
            instances: Arc::new(InstanceMap::new(&config.on_the_way.instances)),
            patience: config.patience,
        })
    }

    /// Everything goes to `address`, in the clear and with nothing added.
    pub fn plain(address: Address, patience: Patience) -> Self {
        let endpoints = Endpoints::new(&address, &UpstreamConfig::default());
        let dialer = Dialer::without_tls(address);
        Routes {
            endpoints,
            destinations: vec![Destination::new(dialer, Credentials::default())],
            instances: Arc::default(),
            patience,
        }
    }

    /// Whether `--upstream` can be reached.
    pub fn health(&self) -> &Arc<UpstreamHealth> {
        &self.destination(Endpoint::Rest).health
    }

    fn destination(&self, endpoint: Endpoint) -> &Destination {
        &self.destinations[self.endpoints.index(endpoint)]
    }
}

/// The upstream, as one thread sees it.
pub struct Upstream {
    routes: Arc<Routes>,
    /// For each of the routes' destinations.
    connections: Vec<Connections>,
}

/// What a call is to be sent with.
#[derive(Clone, Debug)]
pub struct Head {
    /// HTTP's method: POST, for gRPC.
    pub method: Method,
    /// The name of the gRPC method.
    pub path: PathAndQuery,
    /// All headers.
    pub headers: Fields,
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
    /// There are no credentials for it.
    #[error(transparent)]
    Credentials(#[from] CredentialError),
}

impl Upstream {
    /// The upstream at the end of `routes`; connected to when it is first needed.
    pub fn new(routes: Arc<Routes>) -> Self {
        let connections = |destination: &Destination| {
            let (dialer, health) = (destination.dialer.clone(), destination.health.clone());
            Connections::new(dialer, health, routes.patience.keep_alive)
        };
        let connections = routes.destinations.iter().map(connections).collect();
        Upstream {
            routes,
            connections,
        }
    }

    /// Whether `--upstream` can be reached.
    pub fn health(&self) -> &UpstreamHealth {
        self.routes.health()
    }

    /// Connects to what serves `endpoint`, if there is no connection, for at most `patience`.
    ///
    /// # Errors
    /// `ConnectError`, when that fails.
    pub async fn reach(&self, endpoint: Endpoint, patience: Duration) -> Result<(), ConnectError> {
        let connections = &self.connections[self.routes.endpoints.index(endpoint)];
        connections.ready(Headers::Usual, patience).await.map(drop)
    }

    /// Makes a call, and returns when its answer has begun.
    ///
    /// # Errors
    /// `UpstreamError`, when there will be no answer.
    pub fn call(
        &self,
        head: Head,
        body: Body,
    ) -> impl Future<Output = Result<Box<Answer>, UpstreamError>> {
        self.call_within(self.routes.patience.connect, head, body)
    }

    /// As `call`, but waits for a connection, where there is none, no longer than `patience`.
    ///
    /// # Errors
    /// `UpstreamError`, when there will be no answer.
    pub async fn call_within(
        &self,
        patience: Duration,
        head: Head,
        body: Body,
    ) -> Result<Box<Answer>, UpstreamError> {
        let (mut head, mut body) = (head, body);
        let index = self.routes.endpoints.index_of(head.path.path());
        let destination = &self.routes.destinations[index];
        let own = match destination.credentials.ready() {
            Some(own) => own,
            None => Box::pin(destination.credentials.headers()).await?,
        };
        replace(&mut head.headers, &own);
        if let Some(rewriter) =
            InstanceRewriter::for_method(head.path.path(), &self.routes.instances)
        {
            body = Body::made(Renamed::new(body, rewriter));
        }
        let connections = &self.connections[index];
        let headers = Headers::of(&head.headers);
        let mut attempt = 1;
        let answer = loop {
            let calls = connections.ready(headers, patience).await?;
            let pseudo = destination.pseudo(&head);
            match Exchange::begin(&calls, pseudo, head.headers.clone(), body)?.await? {
                Begun::Answer(answer) => break answer,
                Begun::NotProcessed(_, error) if attempt == ATTEMPTS => {
                    return Err(CallError::Broken(error).into());
                }
                Begun::NotProcessed(unsent, _) => body = unsent,
            }
            attempt += 1;
        };
        if grpc::status(&answer.head.headers) == Some(Code::Unauthenticated as u32) {
            destination.credentials.refused(&own);
        }
        Ok(answer)
    }
}

impl Destination {
    fn new(dialer: Dialer, credentials: Credentials) -> Self {
        let authority = dialer.address().authority();
        let authority = authority.and_then(|authority| Authority::try_from(authority).ok());
        Destination {
            scheme: match dialer.is_tls() {
                true => Scheme::HTTPS,
                false => Scheme::HTTP,
            },
            // What gRPC calls the other end of a Unix socket.
            authority: authority.unwrap_or_else(|| Authority::from_static("localhost")),
            dialer,
            credentials,
            health: Arc::default(),
        }
    }

    fn pseudo(&self, head: &Head) -> Pseudo {
        let (scheme, authority) = (self.scheme.clone(), self.authority.clone());
        let request = (head.method.clone(), scheme, authority, head.path.clone());
        Pseudo::Request(Box::new(request))
    }
}

/// A request in which the instance is called as the upstream calls it.
struct Renamed {
    body: Body,
    /// None after the end.
    rewriter: Option<InstanceRewriter>,
    due: std::vec::IntoIter<Bytes>,
}

impl Renamed {
    fn new(body: Body, rewriter: InstanceRewriter) -> Self {
        Renamed {
            body,
            rewriter: Some(rewriter),
            due: Vec::new().into_iter(),
        }
    }
}

impl http_body::Body for Renamed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        loop {
            if let Some(chunk) = this.due.next() {
                return Poll::Ready(Some(Ok(Frame::data(chunk))));
            }
            let Some(rewriter) = &mut this.rewriter else {
                return Poll::Ready(None);
            };
            match ready!(this.body.poll_data(cx)) {
                Some(chunk) => this.due = rewriter.push(chunk?)?.into_iter(),
                None => {
                    let last = this.rewriter.take().and_then(InstanceRewriter::end);
                    this.due = Vec::from_iter(last).into_iter();
                }
            }
        }
    }
}
