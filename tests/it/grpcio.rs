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
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use serde_json::{Value, json};

use crate::support::{Daemon, lines, tools, wait_until};

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
            // A proxy of the machine's is none of ours.
            .env("no_grpc_proxy", "127.0.0.1")
            .env_remove("GRPC_VERBOSITY");
        command
    }

    /// Runs a script to its end, which must be a good one, and returns what it printed.
    pub fn run(self, script: &str, arguments: &[&str]) -> String {
        let output = self.python(script).args(arguments).output().unwrap();
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
        script: &str,
        target: &str,
        server: &AnyServer,
        arguments: &[&str],
    ) -> BTreeMap<String, Value> {
        let arguments = [&[target, server.target()], arguments].concat();
        serde_json::from_str(&self.run(script, &arguments)).unwrap()
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
    target: String,
    address: String,
}

impl AnyServer {
    /// Starts it on a Unix socket.
    pub fn start(directory: &Path, grpcio: Grpcio) -> Self {
        AnyServer::start_on(Transport::Unix, directory, grpcio)
    }

    pub fn start_on(transport: Transport, directory: &Path, grpcio: Grpcio) -> Self {
        let socket = directory.join("server.sock");
        let listen = match transport {
            Transport::Unix => target(&socket),
            Transport::Tcp => "127.0.0.1:0".to_owned(),
        };
        let mut command = grpcio.python("server.py");
        let mut daemon = Daemon::start(command.arg(&listen), directory.join("server.log"));
        let mut port = None;
        wait_until("the server listens", || {
            let log = daemon.log();
            assert!(daemon.is_running(), "the server ended: {log}");
            let said = log.lines().find_map(|line| line.strip_prefix("port "));
            port = said.map(str::to_owned);
            port.is_some()
        });
        let tcp = format!("127.0.0.1:{}", port.unwrap());
        let (target, address) = match transport {
            Transport::Unix => (listen, format!("unix:{}", socket.display())),
            Transport::Tcp => (tcp.clone(), tcp),
        };
        AnyServer {
            daemon,
            target,
            address,
        }
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
        let mut child = grpcio
            .python("session.py")
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
        self.tell(&json!({"method": method, "requests": [hex(request)]}));
        self.ended()
    }

    /// Begins a call whose requests do not end until it is `release`d.
    pub fn hold(&mut self, method: &str) {
        self.tell(&json!({"method": method, "requests": [], "hold": true}));
    }

    /// Begins a call that waits for a server, and returns when there has been none.
    pub fn wait(&mut self, method: &str, request: &[u8]) {
        self.tell(&json!({"method": method, "requests": [hex(request)], "wait": true}));
        let event = self.event();
        assert_eq!(event, json!({"state": "TRANSIENT_FAILURE"}));
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
