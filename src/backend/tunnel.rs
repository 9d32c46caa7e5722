//! A tunnel through an HTTP proxy (CONNECT; RFC 9110, section 9.3.6).

use std::io;

use http::header::{HOST, PROXY_AUTHORIZATION};
use http::{Request, StatusCode};
use hyper::client::conn::http1;
use hyper::upgrade::Upgraded;
use hyper_util::client::proxy::matcher::Intercept;
use hyper_util::rt::TokioIo;

use super::tcp;
use crate::task;

/// Opens one to `authority`, which is `HOST:PORT`.
///
/// # Errors
/// Why the proxy cannot be reached, or what it said.
pub async fn open(proxy: &Intercept, authority: &str) -> io::Result<Upgraded> {
    let asked = ask(proxy, authority).await;
    asked.map_err(|error| {
        let proxy = proxy.uri().authority().map_or("", |proxy| proxy.as_str());
        let reason = format!("by the HTTP proxy {proxy}: {error}");
        io::Error::new(error.kind(), reason)
    })
}

async fn ask(proxy: &Intercept, authority: &str) -> io::Result<Upgraded> {
    let host = proxy.uri().host().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let socket = tcp::connect(host, proxy.uri().port_u16().unwrap_or(80)).await?;
    let handshake = http1::handshake(TokioIo::new(socket)).await;
    let (mut sender, connection) = handshake.map_err(io::Error::other)?;
    task::spawn("tunnel", connection.with_upgrades());
    let mut request = Request::connect(authority).header(HOST, authority);
    if let Some(credentials) = proxy.basic_auth() {
        request = request.header(PROXY_AUTHORIZATION, credentials);
    }
    let request = request.body(String::new()).map_err(io::Error::other)?;
    let response = sender.send_request(request).await;
    let response = response.map_err(io::Error::other)?;
    match response.status() {
        StatusCode::OK => hyper::upgrade::on(response).await.map_err(io::Error::other),
        refused => Err(io::Error::other(format!(
            "it opens no tunnel to {authority}: {refused}"
        ))),
    }
}
