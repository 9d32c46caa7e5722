//! Upstreams that are reached through an HTTP proxy, as gRPC reaches them itself.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::process::Command;
use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::certificates::{Authority, Credentials};
use crate::conformance::assert_same;
use crate::grpcio::{AnyServer, Grpcio, Session, Transport};
use crate::support::{Primed, scratch};

/// A name that only the proxy knows.
const CLUSTER: &str = "cluster.test";
const ECHO: &str = "/some.Service/Echo";

/// How the proxy answers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// With a tunnel.
    Open,
    /// The same, and what the server says first comes along with the answer.
    OpenAndFirstWords,
    /// Not without a password.
    Refuse,
}

/// A proxy for which all hosts are this machine.
struct HttpProxy {
    port: u16,
    /// The heads of all requests.
    asked: Arc<Mutex<Vec<String>>>,
}

impl HttpProxy {
    async fn start(way: Way) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = HttpProxy {
            port: listener.local_addr().unwrap().port(),
            asked: Arc::default(),
        };
        let asked = proxy.asked.clone();
        primed::task::spawn("proxy", async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                primed::task::spawn("tunnel", tunnel(client, way, asked.clone()));
            }
        });
        proxy
    }

    fn url(&self) -> String {
        format!("http://me:secret@127.0.0.1:{}", self.port)
    }

    /// What gRPC goes by.
    fn set<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command
            .env("grpc_proxy", self.url())
            .env_remove("no_grpc_proxy")
            .env_remove("no_proxy")
    }

    /// Each request was for a tunnel to the cluster at `port`, with the password.
    fn assert_asked_for(&self, port: u16) {
        let asked = self.asked.lock();
        assert!(!asked.is_empty());
        for head in asked.iter() {
            let head = head.to_lowercase();
            let line = format!("connect {CLUSTER}:{port} http/1.1\r\n");
            assert!(head.starts_with(&line), "{head}");
            let password = "\r\nproxy-authorization: basic bwu6c2vjcmv0\r\n";
            assert!(head.contains(password), "{head}");
        }
    }
}

async fn tunnel(mut client: TcpStream, way: Way, asked: Arc<Mutex<Vec<String>>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    let port = head
        .split(' ')
        .nth(1)
        .and_then(|host| host.rsplit_once(':'));
    let port: u16 = port.unwrap().1.parse().unwrap();
    asked.lock().push(head);
    if way == Way::Refuse {
        let refusal = "HTTP/1.1 407 Who are you?\r\ncontent-length: 0\r\n\r\n";
        client.write_all(refusal.as_bytes()).await.unwrap();
        return;
    }
    let mut server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let mut answer = b"HTTP/1.1 200 Connection established\r\n\r\n".to_vec();
    if way == Way::OpenAndFirstWords {
        server.read_buf(&mut answer).await.unwrap();
    }
    client.write_all(&answer).await.unwrap();
    // Either end may break off.
    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
}

fn port_of(server: &AnyServer) -> u16 {
    server
        .address()
        .rsplit_once(':')
        .unwrap()
        .1
        .parse()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_behind_a_proxy_is_seen_as_it_is_without() {
    let scratch = scratch();
    let proxy = HttpProxy::start(Way::OpenAndFirstWords).await;
    let server = AnyServer::start_on(Transport::Tcp, scratch.path(), Grpcio::New);
    let port = port_of(&server);
    let upstream = format!("{CLUSTER}:{port}");
    let arguments = ["--upstream-proxy", &proxy.url()];
    let primed = Primed::start_with(scratch.path(), &upstream, &arguments);
    let calls: (&str, &[&str]) = ("calls.py", &[]);
    let clear = Credentials::default();
    let direct = Grpcio::New.transcript(&clear, calls, server.target(), &server);
    let proxied = Grpcio::New.transcript(&clear, calls, &primed.address(), &server);
    assert_same(&direct, &proxied);
    proxy.assert_asked_for(port);
    let log = primed.daemon.log();
    assert!(log.contains("there is an HTTP proxy on the way"), "{log}");
    assert!(!log.contains("secret"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn primed_goes_by_the_variables_that_grpc_goes_by() {
    let scratch = scratch();
    let proxy = HttpProxy::start(Way::Open).await;
    let server = AnyServer::start_on(Transport::Tcp, scratch.path(), Grpcio::New);
    let port = port_of(&server);
    let upstream = format!("{CLUSTER}:{port}");
    for grpcio in [Grpcio::Old, Grpcio::New] {
        let mut client = grpcio.python("crowd.py");
        let output = proxy.set(&mut client).args([&upstream, "1"]).output();
        let said: Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
        assert_eq!(said, json!({"OK": 1}), "{grpcio:?}");
    }
    proxy.assert_asked_for(port);
    proxy.asked.lock().clear();
    let mut command = Primed::command();
    proxy.set(&mut command);
    let primed = Primed::start_by(command, scratch.path(), &upstream, &[]);
    let ended = Session::start(Grpcio::New, &primed.address()).call(ECHO, b"hello");
    assert_eq!(ended.code, "OK", "{ended:?}");
    proxy.assert_asked_for(port);

    let mut command = Primed::command();
    proxy.set(&mut command).env("no_proxy", "other.test,.test");
    let at = scratch.path().join("another");
    std::fs::create_dir(&at).unwrap();
    let primed = Primed::start_by(command, &at, &upstream, &[]);
    let asked = proxy.asked.lock().len();
    let ended = Session::start(Grpcio::New, &primed.address()).call(ECHO, b"hello");
    assert_eq!(ended.code, "UNAVAILABLE", "nobody else knows the name");
    assert_eq!(proxy.asked.lock().len(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_passes_through_a_proxy() {
    let scratch = scratch();
    let authority = Authority::create(scratch.path(), "authority");
    let identity = authority.issue(scratch.path(), "cluster", &[CLUSTER]);
    let server = AnyServer::start_tls(scratch.path(), Grpcio::New, &identity, None);
    let proxy = HttpProxy::start(Way::Open).await;
    let upstream = format!("grpcs://{CLUSTER}:{}", server.tls_port());
    let ca = authority.file.display().to_string();
    let arguments = ["--upstream-ca", &ca, "--upstream-proxy", &proxy.url()];
    let primed = Primed::start_with(scratch.path(), &upstream, &arguments);
    let ended = Session::start(Grpcio::New, &primed.address()).call(ECHO, b"hello");
    assert_eq!(ended.code, "OK", "{ended:?}");
    proxy.assert_asked_for(server.tls_port());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_proxy_says_when_it_refuses_reaches_the_client() {
    let scratch = scratch();
    let proxy = HttpProxy::start(Way::Refuse).await;
    let url = proxy.url();
    let arguments = ["--upstream-proxy", &url];
    let primed = Primed::start_with(scratch.path(), "cluster.test:8980", &arguments);
    let ended = Session::start(Grpcio::New, &primed.address()).call(ECHO, b"hello");
    assert_eq!(ended.code, "UNAVAILABLE");
    let proxy = format!("127.0.0.1:{}", proxy.port);
    for words in ["HTTP proxy", &proxy, "cluster.test:8980", "407"] {
        assert!(ended.details.contains(words), "{ended:?}");
    }
    assert!(!ended.details.contains("secret"));
}
