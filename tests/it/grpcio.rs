//! Python's gRPC, old and new, as a client and as a server without a schema.
//!
//! 1.51 is what Debian's recc is built with; from 1.57 on gRPC sends the socket's percent-encoded
//! path as `:authority`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use serde_json::{Value, json};

use crate::certificates::{Credentials, Issued};
use crate::support::{Daemon, installed, lines, wait_until};

/// A version of grpcio.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grpcio {
    Old,
    New,
}

impl Grpcio {
    /// A command that runs one of the scripts in `tests/it/grpcio`.
    pub fn python(self, script: &str) -> Command {
        let python = match self {
            Grpcio::Old => "grpcio/python-old",
            Grpcio::New => "grpcio/python-new",
        };
        let python = installed("grpcio", python);
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/grpcio");
        let mut command = Command::new(python);
        command
            .arg(scripts.join(script))
            .env_remove("PYTHONPATH")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            // A proxy of the machine's is none of ours.
            .env("no_grpc_proxy", "127.0.0.1")
            .env_remove("GRPC_VERBOSITY");
        command
    }

    /// Runs a script to its end, which must be a good one, and returns what it printed.
    pub fn run(self, script: &str, arguments: &[&str]) -> String {
        self.run_with(&Credentials::default(), script, arguments)
    }

    fn run_with(self, credentials: &Credentials, script: &str, arguments: &[&str]) -> String {
        let mut command = self.python(script);
        let command = command.envs(credentials.variables()).args(arguments);
        let output = command.output().unwrap();
        assert!(
            output.status.success(),
            "{script}: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a script that makes calls, and `server`, see of each other when the calls go to
    /// `target`, by the name of the call.
    pub fn transcript(
        self,
        credentials: &Credentials,
        (script, arguments): (&str, &[&str]),
        target: &str,
        server: &AnyServer,
    ) -> BTreeMap<String, Value> {
        let arguments = [&[target, server.target()], arguments].concat();
        serde_json::from_str(&self.run_with(credentials, script, &arguments)).unwrap()
    }
}

/// What carries a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Unix,
    Tcp,
}

/// `path` as gRPC wants to be told it: a URI, in which what is unusual is percent-encoded.
pub fn target(path: &Path) -> String {
    let mut target = String::from("unix:");
    for byte in path.to_str().unwrap().bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' | b'~' => {
                target.push(char::from(byte));
            }
            _ => write!(target, "%{byte:02X}").unwrap(),
        }
    }
    target
}

/// `server.py`, listening.
pub struct AnyServer {
    pub daemon: Daemon,
    socket: PathBuf,
    target: String,
    address: String,
}

impl AnyServer {
    /// Starts it on a Unix socket.
    pub fn start(directory: &Path, grpcio: Grpcio) -> Self {
        AnyServer::start_on(Transport::Unix, directory, grpcio)
    }

    pub fn start_on(transport: Transport, directory: &Path, grpcio: Grpcio) -> Self {
        AnyServer::start_by(grpcio.python("server.py"), transport, directory, &[])
    }

    /// The same on a Unix socket; it takes no more than so many calls at a time on a connection.
    pub fn start_narrow(directory: &Path, grpcio: Grpcio, max_streams: usize) -> Self {
        let mut command = grpcio.python("server.py");
        command.env("MAX_STREAMS", max_streams.to_string());
        AnyServer::start_by(command, Transport::Unix, directory, &[])
    }

    /// Listens on a Unix socket, and for TLS; with `client_ca` for clients that show a certificate
    /// only.
    pub fn start_tls(
        directory: &Path,
        grpcio: Grpcio,
        identity: &Issued,
        client_ca: Option<&Path>,
    ) -> Self {
        let mut command = grpcio.python("server.py");
        command
            .env("TLS_CERT", &identity.certificate)
            .env("TLS_KEY", &identity.key)
            .envs(client_ca.map(|path| ("TLS_CLIENT_CA", path)));
        AnyServer::start_by(command, Transport::Unix, directory, &["127.0.0.1:0"])
    }

    fn start_by(
        mut command: Command,
        transport: Transport,
        directory: &Path,
        arguments: &[&str],
    ) -> Self {
        let socket = directory.join("server.sock");
        let listen = match transport {
            Transport::Unix => target(&socket),
            Transport::Tcp => "127.0.0.1:0".to_owned(),
        };
        command.arg(&listen).args(arguments);
        let mut daemon = Daemon::start(&mut command, directory.join("server.log"));
        wait_until("the server listens", || {
            assert!(daemon.is_running(), "the server ended: {}", daemon.log());
            said_port(&daemon, "port ").is_some()
        });
        let (target, address) = match transport {
            Transport::Unix => (listen, format!("unix:{}", socket.display())),
            Transport::Tcp => {
                let tcp = format!("127.0.0.1:{}", said_port(&daemon, "port ").unwrap());
                (tcp.clone(), tcp)
            }
        };
        AnyServer {
            daemon,
            socket,
            target,
            address,
        }
    }

    /// Where a server that was `start_tls`ed listens for TLS.
    pub fn tls_port(&self) -> u16 {
        // Said before the other port.
        said_port(&self.daemon, "TLS port ").unwrap()
    }

    /// Where a server listens that was not started on TCP.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// For clients of gRPC.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// For primed.
    pub fn address(&self) -> &str {
        &self.address
    }
}

/// The port in the line of `server.py` that begins with `name`.
fn said_port(server: &Daemon, name: &str) -> Option<u16> {
    let log = server.log();
    let mut lines = log.lines();
    lines.find_map(|line| line.strip_prefix(name)?.parse().ok())
}

/// How a call ended, for its client.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    pub messages: Vec<String>,
    pub code: String,
    pub details: String,
    pub initial: Value,
    pub trailing: Value,
    /// How often the session's channel has connected so far.
    pub connected: u64,
}

/// `session.py`: a client that makes one call after another on one channel.
pub struct Session {
    child: Child,
    commands: ChildStdin,
    events: Box<dyn Iterator<Item = String>>,
}

impl Session {
    pub fn start(grpcio: Grpcio, target: &str) -> Self {
        Session::start_with(&Credentials::default(), grpcio, target)
    }

    /// The same by TLS.
    pub fn start_with(credentials: &Credentials, grpcio: Grpcio, target: &str) -> Self {
        let mut child = grpcio
            .python("session.py")
            .envs(credentials.variables())
            .arg(target)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Session {
            commands: child.stdin.take().unwrap(),
            events: Box::new(lines(child.stdout.take().unwrap())),
            child,
        }
    }

    /// Makes a call from its beginning to its end.
    pub fn call(&mut self, method: &str, request: &[u8]) -> Ended {
        self.call_with(method, request, json!({}))
    }

    /// The same with more that `session.py` understands.
    pub fn call_with(&mut self, method: &str, request: &[u8], mut options: Value) -> Ended {
        options["method"] = method.into();
        options["requests"] = json!([hex(request)]);
        self.begin(&options);
        self.ended()
    }

    /// Makes a call that perhaps finds no connection; `connected` says nothing then.
    pub fn call_unconnected(&mut self, method: &str, request: &[u8]) -> Ended {
        self.call_with(method, request, json!({"hasty": true}))
    }

    /// Begins a call as `session.py` describes one.
    pub fn begin(&mut self, call: &Value) {
        writeln!(self.commands, "{call}").unwrap();
    }

    /// Begins a call whose requests do not end until it is `release`d.
    pub fn hold(&mut self, method: &str) {
        self.begin(&json!({"method": method, "requests": [], "hold": true}));
    }

    /// Begins a call that waits for a server, and returns when there has been none.
    pub fn wait(&mut self, method: &str, request: &[u8]) {
        self.begin(&json!({"method": method, "requests": [hex(request)], "wait": true}));
        let event = self.event();
        assert_eq!(event, json!({"state": "TRANSIENT_FAILURE"}));
    }

    /// Asks `server.py`, to which this session leads directly, what it saw of the call `id`.
    pub fn record(&mut self, id: &str) -> Value {
        let ended = self.call("/control/Record", json!([id]).to_string().as_bytes());
        let record: Value = serde_json::from_slice(&unhex(&ended.messages[0])).unwrap();
        assert!(record["error"].is_null(), "{record}");
        record
    }

    /// Ends the requests of the call that is held.
    pub fn release(&mut self) {
        writeln!(self.commands, "release").unwrap();
    }

    /// Waits for the next message of the call.
    pub fn message(&mut self) -> String {
        let event = self.event();
        let message = event["message"].as_str();
        message.unwrap_or_else(|| panic!("{event}")).to_owned()
    }

    /// Waits for the end of the call.
    pub fn ended(&mut self) -> Ended {
        let mut messages = Vec::new();
        loop {
            let event = self.event();
            if let Some(message) = event["message"].as_str() {
                messages.push(message.to_owned());
                continue;
            }
            return Ended {
                messages,
                code: event["code"].as_str().unwrap().to_owned(),
                details: event["details"].as_str().unwrap_or_default().to_owned(),
                initial: event["initial"].clone(),
                trailing: event["trailing"].clone(),
                connected: event["connected"].as_u64().unwrap(),
            };
        }
    }

    /// The client gives every call a deadline, so this does not wait for ever.
    fn event(&mut self) -> Value {
        let line = self.events.next().expect("the client has ended");
        serde_json::from_str(&line).unwrap()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `bytes` in hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What `hex` was made of.
pub fn unhex(digits: &str) -> Vec<u8> {
    let pairs = (0..digits.len()).step_by(2).map(|at| &digits[at..at + 2]);
    pairs
        .map(|pair| u8::from_str_radix(pair, 16).unwrap())
        .collect()
}
