//! Builds that never were: pages of the admin socket with as many actions as a test wants, and a
//! server that gives them, for what a small real build does not show.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

/// When the builds began.
pub const STARTED: i64 = 1_790_000_000_000;

/// The page of a build that asked for `count` actions by eight calls at once, while sixteen ran
/// ahead of it. The same each time.
pub fn build(count: usize) -> Value {
    let mut random = fastrand::Rng::with_seed(7);
    let mut client = [STARTED + 40; 8];
    let mut ahead = [STARTED + 30; 16];
    let mut actions = Vec::new();
    let mut tally = BTreeMap::from([("cached", 0), ("hit", 0), ("joined", 0), ("missed", 0)]);
    let (mut primed_count, mut saved) = (0, 0);
    for number in 0..count {
        let execution = random.i64(400..2600);
        let last = number + 1 == count;
        let lane = free(&ahead);
        let ready = ahead[lane] + execution;
        let slot = if last { latest(&client) } else { free(&client) };
        let at = client[slot];
        let fate = random.u8(0..100);
        let mut asked = json!({ "at_unix_ms": at, "executed_ms": 0 });
        let primed = json!({
            "planned_unix_ms": STARTED + 12, "started_unix_ms": ahead[lane], "ended_unix_ms": ready,
            "outcome": "primed", "reason": null, "execution_ms": execution - 40,
            "used_unix_ms": null, "trigger": "workspace", "after": [],
            "changes": [{ "path": "src/table.h", "from": digest(1), "to": digest(2), "by": "SOURCE", "origin": "src/table.h" }],
        });
        let mut answer = |name: &'static str, took: i64| {
            asked["answer"] = name.into();
            asked["answered_unix_ms"] = (at + took).into();
            client[slot] = at + took + random.i64(200..900);
            *tally.get_mut(name).unwrap() += 1;
        };
        let primed = match fate {
            0..6 => {
                answer("cached", 4);
                Value::Null
            }
            6..9 => {
                answer("missed", execution + 80);
                asked["executed_ms"] = execution.into();
                Value::Null
            }
            9..11 => {
                answer("missed", execution + 80);
                let mut primed = primed;
                primed["outcome"] = "unresolved".into();
                primed["reason"] = "no origin is known for gen/version.h".into();
                for time in ["started_unix_ms", "ended_unix_ms"] {
                    primed[time] = Value::Null;
                }
                primed
            }
            11..13 => {
                answer("missed", execution + 80);
                ahead[lane] = ready;
                let mut primed = primed;
                primed["outcome"] = "failed".into();
                primed
            }
            _ => {
                ahead[lane] = ready + 2;
                primed_count += 1;
                let mut primed = primed;
                if ready <= at {
                    answer("hit", 5);
                    primed["used_unix_ms"] = at.into();
                } else {
                    answer("joined", ready - at + 6);
                    primed["used_unix_ms"] = ready.into();
                }
                saved += execution;
                primed
            }
        };
        let label = match last {
            true => "build/program".to_owned(),
            false => format!("build/src/module{:03}/unit{number:05}.o", number / 40),
        };
        actions.push(json!({
            "action": digest(1000 + number), "base": digest(500_000 + number), "label": label,
            "asked": asked, "primed": primed,
        }));
    }
    // Some that nobody asked for.
    for number in 0..count / 50 {
        let lane = free(&ahead);
        let ready = ahead[lane] + 900;
        primed_count += 1;
        actions.push(json!({
            "action": digest(900_000 + number), "base": digest(910_000 + number), "asked": null,
            "label": format!("build/tests/test{number:04}.o"),
            "primed": {
                "planned_unix_ms": STARTED + 12, "started_unix_ms": ahead[lane],
                "ended_unix_ms": ready, "outcome": "primed", "reason": null, "execution_ms": 880,
                "used_unix_ms": null, "trigger": "workspace", "changes": [], "after": [],
            },
        }));
        ahead[lane] = ready + 2;
    }
    let ended = client.iter().max().unwrap() + 30;
    json!({
        "id": "01890a5d-ac96-774b-bcce-b302099a8057", "parent": "invocation",
        "label": "make in /home/ada/src/engine", "started_unix_ms": STARTED, "ended_unix_ms": ended,
        "asked": count, "cached": tally["cached"], "hit": tally["hit"], "joined": tally["joined"],
        "missed": tally["missed"], "primed": primed_count, "used": tally["hit"] + tally["joined"],
        "saved_ms": saved, "actions": actions, "left_out": 0,
    })
}

fn free(lanes: &[i64]) -> usize {
    (0..lanes.len()).min_by_key(|lane| lanes[*lane]).unwrap()
}

fn latest(lanes: &[i64]) -> usize {
    (0..lanes.len()).max_by_key(|lane| lanes[*lane]).unwrap()
}

fn digest(number: usize) -> String {
    primed::cas::Digest::of(&number.to_le_bytes()).to_string()
}

/// The status page that goes with `build`.
pub fn status(build: &Value, running: bool) -> Value {
    let mut listed = build.clone();
    let fields = listed.as_object_mut().unwrap();
    fields.remove("actions");
    if running {
        fields.insert("ended_unix_ms".to_owned(), Value::Null);
    }
    let flights: Vec<Value> = build["actions"]
        .as_array()
        .unwrap()
        .iter()
        .take(if running { 3 } else { 0 })
        .enumerate()
        .map(|(n, action)| {
            json!({ "action": action["action"], "started_unix_ms": STARTED, "wanted": n == 1 })
        })
        .collect();
    json!({
        "version": "0.1.0",
        "upstream": { "address": "unix:/run/user/1000/casd.sock", "state": "connected" },
        "records": { "actions": 4711, "parents": 12 },
        "speculation": {
            "queued": 17, "running": flights.len(), "completed": 210, "failed": 2, "unadaptable": 1,
            "slots": 4, "clients": 1, "flights": flights,
        },
        "builds": [listed],
    })
}

/// A server at a socket of its own that gives pages, by path, until it is dropped.
pub struct Pages {
    socket: PathBuf,
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Pages {
    pub fn serve(socket: &Path, pages: Vec<(&str, Value)>) -> Self {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).unwrap();
        let pages: BTreeMap<String, String> = pages
            .into_iter()
            .map(|(path, page)| (path.to_owned(), page.to_string()))
            .collect();
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        let thread = std::thread::Builder::new().spawn(move || {
            // One client after the other: each is done with its connection before it ends.
            for stream in listener.incoming() {
                if ended.load(Ordering::Acquire) {
                    return;
                }
                answer(&stream.unwrap(), &pages, &ended);
            }
        });
        Pages {
            socket: socket.to_owned(),
            over,
            thread: Some(thread.unwrap()),
        }
    }

    /// Those of one build, alone.
    pub fn of(socket: &Path, build: &Value, running: bool) -> Self {
        let status = status(build, running);
        let id = build["id"].as_str().unwrap();
        let pages = vec![
            ("/builds", json!({ "builds": status["builds"] })),
            ("/status", status),
        ];
        let path = format!("/builds/{id}");
        let mut pages = pages;
        pages.push((&path, build.clone()));
        Pages::serve(socket, pages)
    }

    pub fn address(&self) -> String {
        format!("unix:{}", self.socket.display())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        // Wakes it where it waits for a client.
        let _ = UnixStream::connect(&self.socket);
        let ended = self.thread.take().unwrap().join();
        let _ = std::fs::remove_file(&self.socket);
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

/// Answers one client until it goes, or all is over.
fn answer(stream: &UnixStream, pages: &BTreeMap<String, String>, over: &AtomicBool) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    loop {
        let mut request = String::new();
        if !matches!(reader.read_line(&mut request), Ok(1..)) {
            return;
        }
        let path = request.split(' ').nth(1).unwrap().to_owned();
        let mut length = 0;
        let mut header = String::new();
        while matches!(reader.read_line(&mut header), Ok(3..)) {
            if let Some(value) = header.strip_prefix("content-length: ") {
                length = value.trim().parse().unwrap();
            }
            header.clear();
        }
        if reader.read_exact(&mut vec![0; length]).is_err() {
            return;
        }
        if over.load(Ordering::Acquire) {
            return;
        }
        let (status, body) = match pages.get(&path) {
            Some(page) => ("200 OK", page.as_str()),
            None => ("404 Not Found", "there is no such page\n"),
        };
        let mut stream = stream;
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        // A client that has gone in the meantime is no concern.
        let _ = stream
            .write_all(head.as_bytes())
            .and_then(|()| stream.write_all(body.as_bytes()));
    }
}
