//! Credentials from a program, by Bazel's protocol
//! (<https://github.com/EngFlow/credential-helper-spec>): `PROGRAM get` reads `{"uri": …}` and
//! answers `{"headers": {NAME: [VALUE, …]}, "expires": TIME}`.
//!
//! The program runs once for all calls that need it, never for each. Shortly before its answer
//! expires it runs again beside the calls, which use the old answer meanwhile; a failure is
//! remembered for some seconds.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use parking_lot::Mutex;
use prost_types::Timestamp;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::sync::watch;

use crate::config::upstream::UpstreamHeader;
use crate::{clock, task};

/// How long the program may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an answer holds that does not say when it expires, in milliseconds.
const DEFAULT_LIFETIME_MS: i64 = 30 * 60 * 1000;
/// The program does not run again sooner than this, in milliseconds, whatever it said.
const PAUSE_MS: i64 = 5 * 1000;
/// The longest time before its end that an answer is replaced, in milliseconds.
const REFRESH_MS: i64 = 60 * 1000;
/// The longest time before its end that an answer is not used any more, in milliseconds: a call
/// takes some time to arrive, and clocks differ.
const UNUSED_MS: i64 = 5 * 1000;
/// How much of the answer is read.
const MAX_ANSWER: u64 = 1024 * 1024;
/// How much of its complaint is passed on.
const MAX_WORDS: u64 = 2 * 1024;

/// Why a credential helper gave no credentials, in words for the user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the credential helper {} gave no credentials for {uri}: {reason}; to try it by hand: \
     echo '{{\"uri\":\"{uri}\"}}' | {} get", program.display(), program.display()
)]
pub struct HelperError {
    program: PathBuf,
    uri: String,
    reason: String,
}

/// The headers that one program gives for one URI.
pub struct CredentialHelper {
    program: PathBuf,
    uri: String,
    /// Headers beside those of the program, which replace them.
    others: HeaderMap,
    patience: Duration,
    now_unix_ms: fn() -> i64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    known: Option<Known>,
    /// The last failure, and until when it stands.
    failed: Option<(HelperError, i64)>,
    /// Open while the program runs.
    running: Option<watch::Receiver<()>>,
}

struct Known {
    headers: Arc<HeaderMap>,
    received_ms: i64,
    refresh_ms: i64,
    end_ms: i64,
}

/// What the program answers. Fields that are not known are ignored, as the protocol asks.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    headers: BTreeMap<String, Vec<String>>,
    expires: Option<String>,
}

impl fmt::Debug for CredentialHelper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CredentialHelper")
            .field("program", &self.program)
            .field("uri", &self.uri)
            .finish_non_exhaustive()
    }
}

impl CredentialHelper {
    /// Asks `program` about `uri` when it is first needed; `others` are headers to go with its
    /// own.
    pub fn new(program: &Path, uri: String, others: HeaderMap) -> Arc<Self> {
        Arc::new(CredentialHelper {
            program: program.to_owned(),
            uri,
            others,
            patience: PATIENCE,
            now_unix_ms: clock::now_unix_ms,
            state: Mutex::default(),
        })
    }

    /// The headers, if they are known. Sees to it that they stay so; needs a runtime.
    pub fn ready(self: &Arc<Self>) -> Option<Arc<HeaderMap>> {
        let now = (self.now_unix_ms)();
        let mut state = self.state.lock();
        let known = state.known.as_ref().filter(|known| now < known.end_ms)?;
        let headers = known.headers.clone();
        if now >= known.refresh_ms && state.has_failed(now).is_none() {
            self.run(&mut state);
        }
        Some(headers)
    }

    /// The headers, for which the program may have to run first.
    ///
    /// # Errors
    /// `HelperError`, when it fails, or has failed within the last seconds.
    pub async fn headers(self: &Arc<Self>) -> Result<Arc<HeaderMap>, HelperError> {
        let mut ran = false;
        loop {
            if let Some(headers) = self.ready() {
                return Ok(headers);
            }
            let mut running = {
                let now = (self.now_unix_ms)();
                let mut state = self.state.lock();
                match state.has_failed(now) {
                    Some(error) => return Err(error.clone()),
                    None if ran => return Err(self.error("it was interrupted")),
                    None => self.run(&mut state),
                }
            };
            // It is closed when the program has ended.
            let _ = running.changed().await;
            ran = true;
        }
    }

    /// The upstream refused `sent`: the program is asked again, unless it has just answered.
    pub fn refused(&self, sent: &Arc<HeaderMap>) {
        let now = (self.now_unix_ms)();
        let mut state = self.state.lock();
        state.known.take_if(|known| {
            Arc::ptr_eq(&known.headers, sent) && now >= known.received_ms + PAUSE_MS
        });
    }

    /// Starts the program unless it runs. In a task of its own, so that a caller who goes away
    /// leaves it to those who still wait.
    fn run(self: &Arc<Self>, state: &mut State) -> watch::Receiver<()> {
        if let Some(running) = &state.running
            && running.has_changed().is_ok()
        {
            return running.clone();
        }
        let (ended, running) = watch::channel(());
        state.running = Some(running.clone());
        let helper = self.clone();
        task::spawn("credential helper", async move {
            let outcome = match tokio::time::timeout(helper.patience, helper.ask()).await {
                Ok(outcome) => outcome,
                Err(_) => Err(format!("no answer within {:?}", helper.patience)),
            };
            helper.learn(outcome);
            drop(ended);
        });
        running
    }

    fn learn(&self, outcome: Result<(HeaderMap, Option<i64>), String>) {
        let now = (self.now_unix_ms)();
        let mut state = self.state.lock();
        match outcome {
            Ok((headers, expires_ms)) => {
                let lifetime = expires_ms.map_or(DEFAULT_LIFETIME_MS, |expires| expires - now);
                let lifetime = lifetime.max(PAUSE_MS);
                state.failed = None;
                state.known = Some(Known {
                    headers: Arc::new(headers),
                    received_ms: now,
                    refresh_ms: now + lifetime - REFRESH_MS.min(lifetime / 4),
                    end_ms: now + lifetime - UNUSED_MS.min(lifetime / 8),
                });
            }
            Err(reason) => {
                let error = self.error(&reason);
                tracing::warn!(%error, "no upstream credentials");
                state.failed = Some((error, now + PAUSE_MS));
            }
        }
    }

    fn error(&self, reason: &str) -> HelperError {
        HelperError {
            program: self.program.clone(),
            uri: self.uri.clone(),
            reason: reason.to_owned(),
        }
    }

    /// Runs the program once. Returns all headers, and when they expire in milliseconds since
    /// 1970.
    async fn ask(&self) -> Result<(HeaderMap, Option<i64>), String> {
        let mut child = Command::new(&self.program)
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("it cannot be started: {error}"))?;
        let question = serde_json::json!({ "uri": self.uri }).to_string();
        let stdin = child.stdin.take();
        let asking = async {
            if let Some(mut stdin) = stdin {
                // A program that knows one answer only need not read the question.
                let _ = stdin.write_all(question.as_bytes()).await;
            }
        };
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (status, answer, words, ()) = tokio::join!(
            child.wait(),
            read(stdout, MAX_ANSWER),
            read(stderr, MAX_WORDS),
            asking
        );
        let status = status.map_err(|error| format!("it was lost: {error}"))?;
        if !status.success() {
            return Err(complaint(status, &words));
        }
        self.understood(&answer)
    }

    fn understood(&self, answer: &[u8]) -> Result<(HeaderMap, Option<i64>), String> {
        // serde's own message would quote the answer, which is secret.
        let answer: Answer = serde_json::from_slice(answer).map_err(|error| {
            format!(
                "its answer is not {{\"headers\": {{NAME: [VALUE, …]}}}} in JSON (line {}, \
                 column {})",
                error.line(),
                error.column()
            )
        })?;
        let mut headers = self.others.clone();
        for (name, values) in &answer.headers {
            for (index, value) in values.iter().enumerate() {
                let header = UpstreamHeader::new(name, value).map_err(|error| error.to_string())?;
                match index {
                    0 => headers.insert(header.name, header.value).is_some(),
                    _ => headers.append(header.name, header.value),
                };
            }
        }
        let expires_ms = answer.expires.map(|text| {
            let time: Timestamp = text
                .parse()
                .map_err(|_| format!("its 'expires' is no RFC 3339 time: '{text}'"))?;
            Ok::<_, String>(time.seconds.saturating_mul(1000))
        });
        Ok((headers, expires_ms.transpose()?))
    }
}

impl State {
    fn has_failed(&self, now: i64) -> Option<&HelperError> {
        let (error, until) = self.failed.as_ref()?;
        (now < *until).then_some(error)
    }
}

/// Reads up to `limit`, and drains the rest: who waits for its reader would never end.
async fn read(stream: Option<impl AsyncRead + Unpin>, limit: u64) -> Vec<u8> {
    let mut content = Vec::new();
    if let Some(stream) = stream {
        let mut limited = stream.take(limit);
        // What was read before it broke is all there is.
        let _ = limited.read_to_end(&mut content).await;
        let _ = tokio::io::copy(&mut limited.into_inner(), &mut tokio::io::sink()).await;
    }
    content
}

fn complaint(status: ExitStatus, words: &[u8]) -> String {
    let words = String::from_utf8_lossy(words);
    match words.trim() {
        "" => format!("{status}, without a word on stderr"),
        words => format!("{status}: {words}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::process::Command as Shell;
    use tempfile::TempDir;

    thread_local! {
        /// The time, on the one thread that a test runs on.
        static NOW_MS: Cell<i64> = const { Cell::new(1_000_000_000_000) };
    }

    fn wait(ms: i64) {
        NOW_MS.set(NOW_MS.get() + ms);
    }

    /// A helper that runs `script`, in which `$DIR` is a folder of its own. Each run is noted.
    struct Stage {
        folder: TempDir,
        helper: Arc<CredentialHelper>,
    }

    impl Stage {
        fn set(script: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let program = folder.path().join("helper");
            let script = format!(
                "#!/bin/sh\nDIR='{}'\necho \"$@\" >> $DIR/runs\n{script}\n",
                folder.path().display()
            );
            // Written by another process: were this one to write it while a test beside this one
            // forks, the program could not be run ("text file busy").
            let written = Shell::new("sh")
                .args([
                    "-c",
                    "printf %s \"$0\" > \"$1\" && chmod +x \"$1\"",
                    &script,
                ])
                .arg(&program)
                .status();
            assert!(written.unwrap().success());
            let mut others = HeaderMap::new();
            others.insert("x-key", "kept".parse().unwrap());
            others.insert("authorization", "replaced".parse().unwrap());
            let helper = CredentialHelper {
                program,
                uri: "https://cas.example/".to_owned(),
                others,
                patience: PATIENCE,
                now_unix_ms: || NOW_MS.get(),
                state: Mutex::default(),
            };
            Stage {
                folder,
                helper: Arc::new(helper),
            }
        }

        /// A helper that answers with what the file `answer` holds, or fails where there is none.
        fn answering(answer: &str) -> Self {
            let stage = Stage::set("cat $DIR/answer");
            stage.answer(answer);
            stage
        }

        fn answer(&self, answer: &str) {
            std::fs::write(self.folder.path().join("answer"), answer).unwrap();
        }

        fn runs(&self) -> usize {
            let runs = std::fs::read_to_string(self.folder.path().join("runs"));
            runs.unwrap_or_default().lines().count()
        }

        async fn token(&self) -> String {
            let headers = self.helper.headers().await.unwrap();
            assert_eq!(headers["x-key"], "kept");
            headers["authorization"].to_str().unwrap().to_owned()
        }

        async fn error(&self) -> String {
            self.helper.headers().await.unwrap_err().to_string()
        }

        /// Waits until the program does not run.
        async fn quiet(&self) {
            let running = self.helper.state.lock().running.clone();
            if let Some(mut running) = running {
                let _ = running.changed().await;
            }
        }
    }

    fn answer(token: &str, lifetime_ms: i64) -> String {
        let seconds = (NOW_MS.get() + lifetime_ms) / 1000;
        let expires = Timestamp { seconds, nanos: 0 };
        format!(r#"{{"headers":{{"Authorization":["{token}"]}},"expires":"{expires}","new":1}}"#)
    }

    #[tokio::test]
    async fn the_program_is_asked_as_bazel_asks_and_its_headers_replace_others() {
        let stage = Stage::set(
            r#"cat > $DIR/question; echo '{"headers":{"authorization":["a"],"x-two":["1","2"]}}'"#,
        );
        assert!(stage.helper.ready().is_none());
        assert_eq!(stage.token().await, "a");
        let headers = stage.helper.ready().unwrap();
        let two: Vec<_> = headers.get_all("x-two").iter().collect();
        assert_eq!(two, ["1", "2"]);
        assert!(headers["authorization"].is_sensitive());
        assert!(!format!("{:?}", stage.helper).contains("kept"));
        let read = |name: &str| std::fs::read_to_string(stage.folder.path().join(name)).unwrap();
        assert_eq!(read("runs"), "get\n");
        assert_eq!(read("question"), r#"{"uri":"https://cas.example/"}"#);
    }

    #[tokio::test]
    async fn callers_at_the_same_time_share_one_run_that_outlives_each_of_them() {
        let stage = Stage::set(
            r#"mkfifo $DIR/go; cat $DIR/go; echo '{"headers":{"authorization":["a"]}}'"#,
        );
        let helper = stage.helper.clone();
        let impatient = task::spawn("caller", async move { helper.headers().await.is_ok() });
        while stage.runs() == 0 {
            tokio::task::yield_now().await;
        }
        impatient.abort();
        let callers = (0..10).map(|_| {
            let helper = stage.helper.clone();
            task::spawn("caller", async move { helper.headers().await.is_ok() })
        });
        let callers: Vec<_> = callers.collect();
        let go = stage.folder.path().join("go");
        while !go.exists() {
            tokio::task::yield_now().await;
        }
        task::blocking("go", move || std::fs::write(go, "").unwrap()).await;
        for caller in callers {
            assert_eq!(caller.await.unwrap(), Some(true));
        }
        assert_eq!(stage.runs(), 1);
    }

    #[tokio::test]
    async fn an_answer_is_used_until_it_expires_and_replaced_beside_the_calls() {
        let stage = Stage::answering(&answer("one", 600_000));
        assert_eq!(stage.token().await, "one");
        wait(500_000);
        assert_eq!(stage.token().await, "one");
        stage.quiet().await;
        assert_eq!(stage.runs(), 1);
        wait(45_000); // less than a minute is left
        stage.answer(&answer("two", 600_000));
        assert_eq!(stage.helper.ready().unwrap()["authorization"], "one");
        stage.quiet().await;
        assert_eq!(stage.helper.ready().unwrap()["authorization"], "two");
        assert_eq!(stage.runs(), 2);
        wait(596_000); // too little is left
        stage.answer(&answer("three", 600_000));
        assert!(stage.helper.ready().is_none());
        assert_eq!(stage.token().await, "three");
    }

    #[tokio::test]
    async fn an_answer_that_does_not_expire_is_asked_for_again_after_half_an_hour() {
        let stage = Stage::answering(r#"{"headers":{"authorization":["one"]}}"#);
        assert_eq!(stage.token().await, "one");
        wait(28 * 60_000);
        stage.token().await;
        stage.quiet().await;
        assert_eq!(stage.runs(), 1);
        wait(2 * 60_000);
        stage.token().await;
        assert_eq!(stage.runs(), 2);
    }

    #[tokio::test]
    async fn an_answer_that_has_expired_already_does_not_run_the_program_for_each_call() {
        let stage = Stage::answering(&answer("late", -3_600_000));
        for _ in 0..3 {
            assert_eq!(stage.token().await, "late");
        }
        assert_eq!(stage.runs(), 1);
        wait(PAUSE_MS);
        stage.token().await;
        assert_eq!(stage.runs(), 2);
    }

    #[tokio::test]
    async fn a_failure_is_told_in_the_programs_words_and_remembered_for_some_seconds() {
        let stage = Stage::set("echo 'log in first' >&2; exit 3");
        for _ in 0..3 {
            let error = stage.error().await;
            for words in [
                "log in first",
                "exit status: 3",
                "https://cas.example/",
                "echo '{",
            ] {
                assert!(error.contains(words), "{error}");
            }
        }
        assert_eq!(stage.runs(), 1);
        wait(PAUSE_MS);
        stage.error().await;
        assert_eq!(stage.runs(), 2);
    }

    #[tokio::test]
    async fn a_failure_to_replace_an_answer_leaves_it_in_use_until_its_end() {
        let stage = Stage::answering(&answer("one", 600_000));
        stage.token().await;
        std::fs::remove_file(stage.folder.path().join("answer")).unwrap();
        wait(550_000);
        for _ in 0..3 {
            assert_eq!(stage.token().await, "one");
            stage.quiet().await;
        }
        assert_eq!(stage.runs(), 2);
        wait(50_000);
        assert!(stage.error().await.contains("No such file"));
    }

    #[tokio::test]
    async fn an_answer_that_the_upstream_refused_is_asked_for_again_but_not_at_once() {
        let stage = Stage::answering(&answer("one", 600_000));
        stage.token().await;
        let sent = stage.helper.ready().unwrap();
        stage.helper.refused(&sent);
        assert!(stage.helper.ready().is_some());
        wait(PAUSE_MS);
        stage.helper.refused(&Arc::default());
        assert!(stage.helper.ready().is_some());
        stage.helper.refused(&sent);
        stage.answer(&answer("two", 600_000));
        assert_eq!(stage.token().await, "two");
    }

    #[tokio::test]
    async fn an_answer_that_is_not_understood_is_not_quoted() {
        for (answer, reason) in [
            ("s3cret", "line 1"),
            (r#"{"headers":{"authorization":"s3cret"}}"#, "line 1"),
            (
                r#"{"headers":{"grpc-status":["s3cret"]}}"#,
                "belongs to gRPC",
            ),
            (r#"{"headers":{"a b":["s3cret"]}}"#, "not a header name"),
            ("{\"headers\":{\"x\":[\"s3cret\\n\"]}}", "visible ASCII"),
            (r#"{"headers":{},"expires":"soon"}"#, "RFC 3339"),
            ("", "line 1"),
        ] {
            let error = Stage::answering(answer).error().await;
            assert!(error.contains(reason), "{answer}: {error}");
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[tokio::test]
    async fn times_are_read_in_any_zone() {
        let stage = Stage::answering("{}");
        for text in ["2026-01-02T03:04:05Z", "2026-01-02T05:04:05.5+02:00"] {
            let answer = format!(r#"{{"expires":"{text}"}}"#);
            let (_, expires) = stage.helper.understood(answer.as_bytes()).unwrap();
            assert_eq!(expires, Some(1_767_323_045_000), "{text}");
        }
    }

    #[tokio::test]
    async fn a_program_that_does_not_answer_or_cannot_run_is_a_failure() {
        let mut stage = Stage::set("exec sleep 600");
        Arc::get_mut(&mut stage.helper).unwrap().patience = Duration::from_millis(50);
        let error = stage.error().await;
        assert!(error.contains("no answer within 50ms"), "{error}");

        let mut stage = Stage::set("");
        Arc::get_mut(&mut stage.helper).unwrap().program = "/nonexistent/helper".into();
        let error = stage.error().await;
        assert!(error.contains("cannot be started"), "{error}");
    }

    #[tokio::test]
    async fn a_program_that_talks_without_end_is_listened_to_with_measure() {
        let stage = Stage::set("head -c 300000 /dev/zero | tr '\\0' x >&2; exit 1");
        let error = stage.error().await;
        assert!(
            error.len() < 4096 && error.contains("xxx"),
            "{}",
            error.len()
        );
    }
}
