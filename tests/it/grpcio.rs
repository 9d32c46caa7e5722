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
use crate::support::{Daemon, connects, lines, tools, wait_until};

/// A version of grpcio.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grpcio {
    Old,
    New,
}

impl Grpcio {
    /// A command that runs one of the scripts in `tests/it/grpcio`.
    pub fn python(self, script: &str) -> Command {
        let python = tools().join(match self {
            Grpcio::Old => "grpcio/python-old",
            Grpcio::New => "grpcio/python-new",
        });
        assert!(
            python.exists(),
            "{} is missing: run `scripts/tools grpcio` first",
            python.display()
        );
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/grpcio");
        let mut command = Command::new(python);
        command
            .arg(scripts.join(script))
            .env_remove("PYTHONPATH")
            .env("PYTHONDONTWRITEBYTECODE", "1")
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

    /// What `calls.py` and `server` see of each other when the calls go to `target`.
    pub fn transcript(self, target: &str, server: &AnyServer) -> BTreeMap<String, Value> {
        self.transcript_with(&Credentials::default(), target, server)
    }

    /// The same by TLS.
    pub fn transcript_with(
        self,
        credentials: &Credentials,
        target: &str,
        server: &AnyServer,
    ) -> BTreeMap<String, Value> {
        let arguments = [target, &server.target()];
        serde_json::from_str(&self.run_with(credentials, "calls.py", &arguments)).unwrap()
    }
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

/// `server.py`, on a Unix socket.
pub struct AnyServer {
    pub daemon: Daemon,
    socket: PathBuf,
}

impl AnyServer {
    pub fn start(directory: &Path, grpcio: Grpcio) -> Self {
        AnyServer::start_by(grpcio.python("server.py"), directory, &[])
    }

    /// Listens for TLS too; with `client_ca` for clients that show a certificate only.
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
        AnyServer::start_by(command, directory, &["127.0.0.1:0"])
    }

    /// Where a server that was `start_tls`ed listens for TLS.
    pub fn tls_port(&self) -> u16 {
        let mut port = None;
        wait_until("the server says which port it has", || {
            let log = self.daemon.log();
            let said = log.lines().find_map(|line| line.strip_prefix("port "));
            port = said.and_then(|port| port.parse().ok());
            port.is_some()
        });
        port.unwrap()
    }

    fn start_by(mut command: Command, directory: &Path, arguments: &[&str]) -> Self {
        let socket = directory.join("server.sock");
        command.arg(target(&socket)).args(arguments);
        let mut daemon = Daemon::start(&mut command, directory.join("server.log"));
        wait_until("the server listens", || {
            assert!(daemon.is_running(), "the server ended: {}", daemon.log());
            connects(&socket)
        });
        AnyServer { daemon, socket }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// For clients of gRPC.
    pub fn target(&self) -> String {
        target(&self.socket)
    }

    /// For primed.
    pub fn address(&self) -> String {
        format!("unix:{}", self.socket.display())
    }
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
        self.tell(&options);
        self.ended()
    }

    /// Makes a call that perhaps finds no connection; `connected` says nothing then.
    pub fn call_unconnected(&mut self, method: &str, request: &[u8]) -> Ended {
        let requests = [hex(request)];
        self.tell(&json!({"method": method, "requests": requests, "hasty": true}));
        self.ended()
    }

    /// Begins a call whose requests do not end until it is `release`d.
    pub fn hold(&mut self, method: &str) {
        self.tell(&json!({"method": method, "requests": [], "hold": true}));
    }

    /// Begins a call as `session.py` describes one.
    pub fn begin(&mut self, call: &Value) {
        self.tell(call);
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

    fn tell(&mut self, command: &Value) {
        writeln!(self.commands, "{command}").unwrap();
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
