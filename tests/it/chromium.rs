//! A real browser without a window, asked by its own protocol (Chrome DevTools) over pipes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{installed, scratch};

/// A browser with one page open.
pub struct Chromium {
    child: Child,
    commands: ChildStdin,
    messages: BufReader<ChildStdout>,
    session: String,
    sent: u64,
    /// What the page complained about: errors, warnings, and requests to the network.
    pub complaints: Vec<String>,
    _home: TempDir,
}

impl Chromium {
    /// Opens `file`, in a window of `width` by `height`; returns once it is loaded.
    pub fn open(file: &Path, (width, height): (u32, u32), dark: bool) -> Self {
        let program = installed("chromium", "chromium/bin/chromium-headless");
        let home = scratch();
        // Commands come by its file descriptor 3, and messages go to 4.
        let mut child = Command::new("sh")
            .args(["-c", "exec \"$@\" 3<&0 4>&1 1>&2", "sh"])
            .arg(program)
            .arg("--remote-debugging-pipe")
            .arg(format!("--user-data-dir={}", home.path().display()))
            .arg(format!("--window-size={width},{height}"))
            .env("HOME", home.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut browser = Chromium {
            commands: child.stdin.take().unwrap(),
            messages: BufReader::new(child.stdout.take().unwrap()),
            child,
            session: String::new(),
            sent: 0,
            complaints: Vec::new(),
            _home: home,
        };
        let target = browser.command("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = browser.command("Target.attachToTarget", attach);
        browser.session = attached["sessionId"].as_str().unwrap().to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.command(&format!("{domain}.enable"), json!({}));
        }
        let scheme = if dark { "dark" } else { "light" };
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        browser.command(
            "Emulation.setEmulatedMedia",
            json!({ "features": features }),
        );
        let size =
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        browser.command("Emulation.setDeviceMetricsOverride", size);
        let url = format!("file://{}", file.display());
        browser.command("Page.navigate", json!({ "url": url }));
        browser.until("Page.loadEventFired");
        browser
    }

    /// Sends a command and returns its result.
    pub fn command(&mut self, method: &str, parameters: Value) -> Value {
        self.sent += 1;
        let mut command = json!({ "id": self.sent, "method": method, "params": parameters });
        if !self.session.is_empty() {
            command["sessionId"] = self.session.as_str().into();
        }
        self.commands
            .write_all(command.to_string().as_bytes())
            .unwrap();
        self.commands.write_all(b"\0").unwrap();
        loop {
            let message = self.message();
            if message["id"] == self.sent {
                assert!(message["error"].is_null(), "{method}: {}", message["error"]);
                return message["result"].clone();
            }
        }
    }

    /// The value of a JavaScript expression; a promise is waited for.
    pub fn value(&mut self, expression: &str) -> Value {
        let parameters =
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let result = self.command("Runtime.evaluate", parameters);
        assert!(
            result["exceptionDetails"].is_null(),
            "{expression}: {result}"
        );
        result["result"]["value"].clone()
    }

    /// The text of the element that `selector` finds.
    pub fn text(&mut self, selector: &str) -> String {
        let value = self.value(&format!("document.querySelector({selector:?}).textContent"));
        value.as_str().unwrap().to_owned()
    }

    /// What is seen, or the whole page, as a PNG.
    pub fn screenshot(&mut self, whole: bool) -> Vec<u8> {
        let parameters = json!({ "format": "png", "captureBeyondViewport": whole });
        let picture = self.command("Page.captureScreenshot", parameters);
        let picture = picture["data"].as_str().unwrap();
        base64::Engine::decode(&base64::prelude::BASE64_STANDARD, picture).unwrap()
    }

    /// Moves the mouse, presses it or lets it go.
    pub fn mouse(&mut self, what: &str, x: f64, y: f64) {
        let parameters = json!({
            "type": what, "x": x, "y": y, "button": if what == "mouseMoved" { "none" } else { "left" },
            "clickCount": 1,
        });
        self.command("Input.dispatchMouseEvent", parameters);
    }

    fn until(&mut self, event: &str) {
        while self.message()["method"] != event {}
    }

    fn message(&mut self) -> Value {
        let mut message = Vec::new();
        self.messages.read_until(0, &mut message).unwrap();
        message.pop().expect("the browser has ended");
        let message: Value = serde_json::from_slice(&message).unwrap();
        let event = &message["params"];
        match message["method"].as_str().unwrap_or_default() {
            "Runtime.exceptionThrown" | "Log.entryAdded" | "Runtime.consoleAPICalled" => {
                self.complaints.push(event.to_string());
            }
            "Network.requestWillBeSent" => {
                let url = event["request"]["url"].as_str().unwrap_or_default();
                if !url.starts_with("file:") && !url.starts_with("data:") {
                    self.complaints.push(url.to_owned());
                }
            }
            _ => {}
        }
        message
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
