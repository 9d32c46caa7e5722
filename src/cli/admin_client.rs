//! Asks a running primed for one of its admin pages.

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;

use super::{Failure, exit_codes};
use crate::address::Address;
use crate::backend::dial::Dialer;
use crate::task;

/// The content of the page at `path`.
pub async fn get(admin: &Address, path: &str) -> Result<Bytes, Failure> {
    let dialer = Dialer::without_tls(admin.clone());
    let stream = dialer.dial().await.map_err(|error| {
        let message = format!(
            "no primed answers at {admin}: {error}; start one with `primed serve`, or name its \
             admin socket with --admin"
        );
        Failure::new(exit_codes::FAILURE, message)
    })?;
    let lost = |error: hyper::Error| {
        let message = format!("primed at {admin} broke off the answer: {error}");
        Failure::new(exit_codes::FAILURE, message)
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
    task::spawn("admin client", connection);
    let request = Request::get(path)
        .header(http::header::HOST, "primed")
        .body(Empty::<Bytes>::new())
        .map_err(|error| Failure::new(exit_codes::FAILURE, error))?;
    let response = sender.send_request(request).await.map_err(lost)?;
    let status = response.status();
    let page = response
        .into_body()
        .collect()
        .await
        .map_err(lost)?
        .to_bytes();
    if status == StatusCode::OK {
        Ok(page)
    } else {
        let message = format!("primed at {admin} answered {status}");
        Err(Failure::new(exit_codes::FAILURE, message))
    }
}
