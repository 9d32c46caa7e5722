//! Pages by HTTP/1.1 on a listener of their own, for the admin socket and for `--metrics`.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming as Body;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};

use super::ACCEPT_PAUSE;
use super::listen::Listener;
use crate::task;
use crate::workspace::peer::PeerOrigin;

/// An answer.
pub type Page = Response<Full<Bytes>>;

/// How long a connection may last.
#[derive(Clone, Copy, Debug)]
pub enum Lifetime {
    /// As long as the client likes; some answers take their time.
    Open,
    /// For one answer, and no longer than this, whatever the client does meanwhile.
    OneAnswer(Duration),
}

/// Serves what `answer` says until the task is dropped.
pub async fn serve<A, F>(listener: Listener, lifetime: Lifetime, answer: A)
where
    A: Fn(Request<Body>, PeerOrigin) -> F + Clone + Send + 'static,
    F: Future<Output = Page> + Send,
{
    loop {
        match listener.accept().await {
            Ok(accepted) => {
                let answer = answer.clone();
                let by = accepted.origin();
                let pages = service_fn(move |request| {
                    let answer = answer(request, by);
                    async move { Ok::<_, Infallible>(answer.await) }
                });
                let connection = async move {
                    let stream = match accepted.into_stream().await {
                        Ok(stream) => TokioIo::new(stream),
                        Err(error) => return tracing::debug!(%error, "a connection was lost"),
                    };
                    let mut http = http1::Builder::new();
                    http.timer(TokioTimer::new());
                    http.keep_alive(matches!(lifetime, Lifetime::Open));
                    if let Err(error) = http.serve_connection(stream, pages).await {
                        tracing::debug!(%error, "a connection for pages ended with an error");
                    }
                };
                task::spawn("pages", async move {
                    match lifetime {
                        Lifetime::Open => connection.await,
                        // Whoever has not read it by then gets no more of it.
                        Lifetime::OneAnswer(most) => {
                            let _ = tokio::time::timeout(most, connection).await;
                        }
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection for pages was refused");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A page of this content type.
pub fn of_type(content_type: &'static str, content: impl Into<Bytes>) -> Page {
    let mut page = Response::new(Full::new(content.into()));
    let content_type = HeaderValue::from_static(content_type);
    page.headers_mut().insert(CONTENT_TYPE, content_type);
    page
}

/// A line or two for people.
pub fn text(status: StatusCode, text: &str) -> Page {
    let mut page = Response::new(Full::from(text.to_owned()));
    *page.status_mut() = status;
    page
}
