//! Asks a running primed for its admin pages.

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;

use super::{Failure, exit_codes};
use crate::address::Address;
use crate::backend::dial::Dialer;
use crate::task;

/// A connection to the admin socket of a primed.
pub struct AdminClient {
    admin: Address,
    sender: http1::SendRequest<Full<Bytes>>,
}

/// The content of the page at `path`.
pub async fn get(admin: &Address, path: &str) -> Result<Bytes, Failure> {
    let mut client = AdminClient::connect(admin).await?;
    client.send(Method::GET, path, Bytes::new()).await
}

impl AdminClient {
    /// Connects to the primed at `admin`.
    ///
    /// # Errors
    /// When there is none.
    pub async fn connect(admin: &Address) -> Result<Self, Failure> {
        let dialer = Dialer::without_tls(admin.clone());
        let stream = dialer.dial().await.map_err(|error| {
            let message = format!(
                "no primed answers at {admin}: {error}; start one with `primed serve`, or name its \
                 admin socket with --admin"
            );
            Failure::new(exit_codes::FAILURE, message)
        })?;
        let connected = http1::handshake(TokioIo::new(stream)).await;
        let (sender, connection) = connected.map_err(|error| lost(admin, &error))?;
        task::spawn("admin client", connection);
        Ok(AdminClient {
            admin: admin.clone(),
            sender,
        })
    }

    /// What the page at `path` answers.
    ///
    /// # Errors
    /// With its own words if it refuses.
    pub async fn send(
        &mut self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Bytes, Failure> {
        let (status, page) = self.ask(method, path, body).await?;
        if status == StatusCode::OK {
            return Ok(page);
        }
        let said = String::from_utf8_lossy(&page).trim_end().to_owned();
        let message = match said.is_empty() {
            true => format!("primed at {} answered {status}", self.admin),
            false => said,
        };
        Err(Failure::new(exit_codes::FAILURE, message))
    }

    /// What the page at `path` answers, whether it refuses or not.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn ask(
        &mut self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), Failure> {
        let admin = &self.admin;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, "primed")
            .body(Full::from(body))
            .map_err(|error| Failure::new(exit_codes::FAILURE, error))?;
        let answered = async {
            let response = self.sender.send_request(request).await?;
            let status = response.status();
            Ok((status, response.into_body().collect().await?.to_bytes()))
        };
        answered.await.map_err(|error| lost(admin, &error))
    }
}

fn lost(admin: &Address, error: &hyper::Error) -> Failure {
    let message = format!("primed at {admin} broke off the answer: {error}");
    Failure::new(exit_codes::FAILURE, message)
}
