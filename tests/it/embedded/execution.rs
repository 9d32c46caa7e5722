//! The embedded backend executes: real commands, asked for by gRPC, with bubblewrap and without.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use primed::cas::{Digest, DigestFunction};
use primed::reapi;
use primed::reapi::build::bazel::remote::execution::v2::*;
use primed::reapi::capabilities_client::CapabilitiesClient;
use primed::reapi::execution_client::ExecutionClient;
use primed::reapi::google::longrunning::operations_client::OperationsClient;
use primed::reapi::google::longrunning::{CancelOperationRequest, Operation};
use prost::Message;
use tempfile::TempDir;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

use crate::client::{self, Build, connect, last, response};
use crate::project::{FEW, Project, UNITS};
use crate::support::{Counts, Daemon, Primed, connects, scratch, tools, wait_until};

/// With and without a sandbox.
const SANDBOXES: [&str; 2] = ["bubblewrap", "none"];

/// A primed that executes by itself.
pub struct Server {
    pub primed: Primed,
    build: Build,
    channel: Channel,
    directory: TempDir,
}

impl Server {
    pub fn start(sandbox: &str, arguments: &[&str]) -> Self {
        let directory = scratch();
        let primed = start(&directory, sandbox, arguments);
        let channel = connect(&primed.socket());
        Server {
            build: Build::elsewhere(channel.clone(), directory.path(), "test:1"),
            primed,
            channel,
            directory,
        }
    }

    async fn upload(&self, job: &Job) -> Digest {
        let action = job.action();
        self.build.upload(&action).await;
        action.digest
    }

    /// Uploads and executes.
    pub async fn run(&self, job: &Job) -> ExecuteResponse {
        self.run_all_but(&HashSet::new(), job).await
    }

    /// The same, where some of what it needs is there.
    pub async fn run_all_but(&self, there: &HashSet<Digest>, job: &Job) -> ExecuteResponse {
        let mut action = job.action();
        action.blobs.retain(|digest, _| !there.contains(digest));
        self.build.upload(&action).await;
        let operations = self.build.execute(action.digest, false).await;
        last(operations.unwrap()).await
    }

    async fn ask(&self, request: ExecuteRequest) -> Streaming<Operation> {
        let mut client = ExecutionClient::new(self.channel.clone());
        client.execute(request).await.unwrap().into_inner()
    }

    async fn cancel(&self, name: &str) {
        let name = name.to_owned();
        let mut client = OperationsClient::new(self.channel.clone());
        let request = CancelOperationRequest { name };
        client.cancel_operation(request).await.unwrap();
    }

    async fn read(&self, digest: &Option<reapi::Digest>) -> Bytes {
        let Some(digest) = digest.clone() else {
            return Bytes::new();
        };
        let request = BatchReadBlobsRequest {
            digests: vec![digest],
            ..BatchReadBlobsRequest::default()
        };
        let mut client =
            reapi::content_addressable_storage_client::ContentAddressableStorageClient::new(
                self.channel.clone(),
            );
        let answer = client.batch_read_blobs(request).await.unwrap().into_inner();
        answer.responses[0].data.clone()
    }

    /// What the command of `response` has written to its standard output.
    async fn stdout(&self, response: &ExecuteResponse) -> String {
        let result = response.result.as_ref().unwrap();
        String::from_utf8(self.read(&result.stdout_digest).await.to_vec()).unwrap()
    }

    async fn stderr(&self, response: &ExecuteResponse) -> String {
        let result = response.result.as_ref().unwrap();
        String::from_utf8(self.read(&result.stderr_digest).await.to_vec()).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// Starts a primed with an embedded backend in `directory`.
fn start(directory: &TempDir, sandbox: &str, arguments: &[&str]) -> Primed {
    let directory = directory.path();
    let mut path = std::env::var_os("PATH").unwrap();
    path.push(":");
    path.push(tools().join("buildstream/bin"));
    let mut command = Primed::command();
    command
        .args(["serve", "--sandbox", sandbox, "--log-level", "primed=debug"])
        .args(arguments)
        .current_dir(directory)
        .env("PATH", path)
        .env("PRIMED_CACHE_DIR", directory.join("cache"))
        .env("PRIMED_STATE_DIR", directory.join("state"))
        .env(
            "PRIMED_LISTEN",
            format!("unix:{}", directory.join("primed.sock").display()),
        )
        .env(
            "PRIMED_ADMIN",
            format!("unix:{}", directory.join("admin.sock").display()),
        );
    let mut daemon = Daemon::start(&mut command, directory.join("primed.log"));
    wait_until("primed listens", || {
        assert!(daemon.is_running(), "primed ended: {}", daemon.log());
        connects(&directory.join("admin.sock"))
    });
    Primed {
        daemon,
        directory: directory.to_owned(),
    }
}

/// An action in the making.
#[derive(Clone, Default)]
pub struct Job {
    command: Command,
    pub files: Vec<(String, Bytes)>,
    /// Instead of a tree of the files.
    root: Option<Directory>,
    timeout: Option<Duration>,
    do_not_cache: bool,
    salt: &'static str,
}

impl Job {
    /// Runs `script` by the shell.
    pub fn of(script: &str, outputs: &[&str]) -> Self {
        let variable = |name: &str, value: &str| command::EnvironmentVariable {
            name: name.to_owned(),
            value: value.to_owned(),
        };
        Job {
            command: Command {
                arguments: ["sh", "-c", script].map(str::to_owned).into(),
                environment_variables: vec![
                    variable("GREETING", "hello"),
                    variable("PATH", "/usr/local/bin:/usr/bin:/bin"),
                ],
                output_paths: outputs.iter().map(|path| (*path).to_owned()).collect(),
                ..Command::default()
            },
            ..Job::default()
        }
    }

    fn with_file(mut self, path: &str, content: &str) -> Self {
        let content = Bytes::from(content.to_owned());
        self.files.push((path.to_owned(), content));
        self
    }

    fn with_property(mut self, name: &str, value: &str) -> Self {
        let platform = self.command.platform.get_or_insert_default();
        platform.properties.push(platform::Property {
            name: name.to_owned(),
            value: value.to_owned(),
        });
        self
    }

    pub fn action(&self) -> client::Action {
        let mut blobs = HashMap::new();
        let root = match &self.root {
            Some(root) => client::keep(&mut blobs, root.encode_to_vec().into()),
            None => client::tree(&self.files, &mut blobs),
        };
        let command = client::keep(&mut blobs, self.command.encode_to_vec().into());
        let action = Action {
            command_digest: Some(command.to_proto()),
            input_root_digest: Some(root.to_proto()),
            timeout: self.timeout.map(|timeout| timeout.try_into().unwrap()),
            do_not_cache: self.do_not_cache,
            salt: self.salt.into(),
            ..Action::default()
        };
        client::Action {
            digest: client::keep(&mut blobs, action.encode_to_vec().into()),
            blobs,
            output: String::new(),
        }
    }
}

fn code(response: &ExecuteResponse) -> Code {
    Code::from(response.status.as_ref().map_or(0, |status| status.code))
}

fn stage(operation: &Operation) -> execution_stage::Value {
    let metadata = operation.metadata.as_ref().unwrap();
    let metadata = ExecuteOperationMetadata::decode(metadata.value.as_slice()).unwrap();
    metadata.stage()
}

/// Reads until the operation is in this stage.
async fn until(operations: &mut Streaming<Operation>, wanted: execution_stage::Value) -> Operation {
    loop {
        let operation = operations.message().await.unwrap().unwrap();
        assert!(!operation.done, "{:?}", response(&operation));
        if stage(&operation) == wanted {
            return operation;
        }
    }
}

/// How many processes of the machine have `word` among their arguments.
fn processes(word: &str) -> usize {
    let entries = std::fs::read_dir("/proc").unwrap();
    let lines =
        entries.filter_map(|entry| std::fs::read(entry.unwrap().path().join("cmdline")).ok());
    lines
        .filter(|line| {
            line.split(|byte| *byte == 0)
                .any(|one| one == word.as_bytes())
        })
        .count()
}

/// A time to sleep for that no other process does, and which ends long after the test.
fn long_sleep() -> String {
    format!("{}", 100_000_000 + fastrand::u32(..1_000_000_000))
}

/// Starts processes in groups and sessions of their own, and leaves one without a parent.
fn scatter(sleep: &str) -> String {
    format!(
        "sleep {sleep} & setsid sleep {sleep} & \
         (setsid sh -c 'trap \"\" TERM HUP; sleep {sleep} & setsid sleep {sleep}' &) ; "
    )
}
/// How many processes it starts that sleep.
const SCATTERED: usize = 4;

#[tokio::test]
async fn a_command_has_its_inputs_its_environment_and_nothing_else() {
    for sandbox in SANDBOXES {
        let server = Server::start(sandbox, &[]);
        let mut job = Job::of("cat a/in.txt; ls -A . ..; env; pwd >&2", &["b/c/out"])
            .with_file("work/a/in.txt", "input\n");
        job.command.working_directory = "work".to_owned();
        let response = server.run(&job).await;
        assert_eq!(code(&response), Code::Ok, "{response:?}");
        let said = server.stdout(&response).await;
        let mut lines: Vec<&str> = said.lines().collect();
        // What shells set by themselves.
        lines.retain(|line| {
            !["PWD=", "OLDPWD=", "SHLVL=", "_="]
                .iter()
                .any(|own| line.starts_with(own))
        });
        let environment = ["GREETING=hello", "PATH=/usr/local/bin:/usr/bin:/bin"];
        let listed = ["input", ".:", "a", "b", "", "..:", "work"];
        assert_eq!(lines[..7], listed, "{sandbox}: {said}");
        lines[7..].sort_unstable();
        assert_eq!(lines[7..], environment, "{sandbox}: {said}");
        let place = server.stderr(&response).await;
        if sandbox == "bubblewrap" {
            assert_eq!(place, "/primed/work\n", "the same each time");
        }

        let result = response.result.unwrap();
        assert!(result.output_files.is_empty(), "what is absent is left out");
        let metadata = result.execution_metadata.unwrap();
        let mut last = None;
        for time in [
            metadata.queued_timestamp,
            metadata.worker_start_timestamp,
            metadata.input_fetch_start_timestamp,
            metadata.input_fetch_completed_timestamp,
            metadata.execution_start_timestamp,
            metadata.execution_completed_timestamp,
            metadata.output_upload_start_timestamp,
            metadata.output_upload_completed_timestamp,
            metadata.worker_completed_timestamp,
        ] {
            let time = time.map(|time| (time.seconds, time.nanos));
            assert!(
                time.is_some() && time >= last,
                "in this order: {last:?} {time:?}"
            );
            last = time;
        }
        assert!(!metadata.worker.is_empty() && metadata.virtual_execution_duration.is_some());
    }
}

#[tokio::test]
async fn files_directories_and_symlinks_are_taken_in_as_they_are() {
    let script = "mkdir -p tree/sub/same tree/same; echo 1 > tree/same/x; echo 1 > tree/sub/same/x; \
                  ln -s ../x tree/sub/link; echo 2 > plain; echo 3 > run; chmod 755 run; ln -s plain away; \
                  chmod 640 plain; touch -d @1000000000 plain; ln -s / out; mkfifo tree/pipe";
    for sandbox in SANDBOXES {
        let server = Server::start(sandbox, &[]);
        let outputs = ["absent", "away", "out/etc/passwd", "plain", "run", "tree"];
        let mut job = Job::of(script, &outputs);
        job.command.output_node_properties = vec!["mtime".to_owned(), "unix_mode".to_owned()];
        job.command
            .set_output_directory_format(command::OutputDirectoryFormat::TreeAndDirectory);
        let response = server.run(&job).await;
        assert_eq!(code(&response), Code::Ok, "{response:?}");
        let result = response.result.unwrap();
        assert_eq!(result.exit_code, 0, "{result:?}");

        let [plain, run] = &result.output_files[..] else {
            panic!("{:?}", result.output_files);
        };
        assert_eq!((plain.path.as_str(), plain.is_executable), ("plain", false));
        assert_eq!((run.path.as_str(), run.is_executable), ("run", true));
        assert_eq!(server.read(&plain.digest).await, "2\n");
        let properties = plain.node_properties.as_ref().unwrap();
        assert_eq!(properties.mtime.as_ref().unwrap().seconds, 1_000_000_000);
        assert_eq!(properties.unix_mode, Some(0o640));
        let [away] = &result.output_symlinks[..] else {
            panic!("{:?}", result.output_symlinks);
        };
        assert_eq!(
            (away.path.as_str(), away.target.as_str()),
            ("away", "plain")
        );

        let [directory] = &result.output_directories[..] else {
            panic!("{:?}", result.output_directories);
        };
        assert!(directory.is_topologically_sorted);
        let tree = Tree::decode(server.read(&directory.tree_digest).await).unwrap();
        let root = tree.root.unwrap();
        let of = |directory: &Directory| Digest::of(&directory.encode_to_vec()).to_proto();
        assert_eq!(directory.root_directory_digest, Some(of(&root)));
        let stored = server.read(&directory.root_directory_digest).await;
        assert_eq!(stored, root.encode_to_vec());
        let names: Vec<&str> = root
            .directories
            .iter()
            .map(|one| one.name.as_str())
            .collect();
        assert_eq!(names, ["same", "sub"]);
        assert!(root.files.is_empty(), "a pipe is left out: {root:?}");
        let sub = tree
            .children
            .iter()
            .find(|one| !one.symlinks.is_empty())
            .unwrap();
        assert_eq!(sub.symlinks[0].target, "../x");
        let mut known: Vec<reapi::Digest> = root
            .directories
            .iter()
            .filter_map(|one| one.digest.clone())
            .collect();
        for child in &tree.children {
            assert!(known.contains(&of(child)), "parents before children");
            known.extend(
                child
                    .directories
                    .iter()
                    .filter_map(|one| one.digest.clone()),
            );
        }
    }
}

#[tokio::test]
async fn the_output_fields_of_version_2_0_are_understood() {
    let server = Server::start("none", &[]);
    let mut job = Job::of(
        "mkdir d; echo 1 > d/x; echo 2 > f; ln -s f l; ln -s d k",
        &[],
    );
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    job.command.output_files = names(&["f", "l"]);
    job.command.output_directories = names(&["d", "k"]);
    let result = server.run(&job).await.result.unwrap();
    assert_eq!(result.output_files[0].path, "f");
    assert_eq!(result.output_file_symlinks[0].path, "l");
    assert_eq!(result.output_directory_symlinks[0].path, "k");
    assert_eq!(result.output_directories[0].path, "d");
    assert_eq!(result.output_directories[0].root_directory_digest, None);

    job.command.output_files = names(&["d"]);
    job.command.output_directories = vec![];
    let response = server.run(&job).await;
    assert_eq!(code(&response), Code::FailedPrecondition, "{response:?}");
}

#[tokio::test]
async fn an_overrun_command_is_killed_and_what_it_said_is_kept() {
    for sandbox in SANDBOXES {
        let server = Server::start(sandbox, &[]);
        let sleep = long_sleep();
        let mut job = Job::of(
            &format!("echo partial; {} sleep {sleep}", scatter(&sleep)),
            &[],
        );
        job.timeout = Some(Duration::from_secs(2));
        let response = server.run(&job).await;
        assert_eq!(
            code(&response),
            Code::DeadlineExceeded,
            "{sandbox}: {response:?}"
        );
        assert_eq!(server.stdout(&response).await, "partial\n");
        assert_eq!(processes(&sleep), 0, "{sandbox}");
        let action = job.action().digest;
        assert!(
            server.build.lookup(action).await.is_err(),
            "it is not cached"
        );
    }
}

#[tokio::test]
async fn a_cancelled_command_is_dead_with_all_it_started_when_its_end_is_told() {
    for sandbox in SANDBOXES {
        let server = Server::start(sandbox, &["--mode", "none"]);
        let sleep = long_sleep();
        let job = Job::of(&format!("{} sleep {sleep}", scatter(&sleep)), &[]);
        let action = server.upload(&job).await;
        let mut first = server.build.execute(action, false).await.unwrap();
        let name = until(&mut first, execution_stage::Value::Executing)
            .await
            .name;
        wait_until("all of it runs", || processes(&sleep) > SCATTERED);
        // Another one that wants the same keeps it alive; the backend sees to that, not the proxy.
        let mut second = server.build.execute(action, false).await.unwrap();
        let other = until(&mut second, execution_stage::Value::Executing)
            .await
            .name;
        server.cancel(&name).await;
        assert_eq!(code(&last(first).await), Code::Cancelled);
        assert!(processes(&sleep) > SCATTERED, "somebody else waits for it");
        server.cancel(&other).await;
        assert_eq!(code(&last(second).await), Code::Cancelled);
        wait_until("all of it is dead", || processes(&sleep) == 0);
    }
}

#[tokio::test]
async fn what_a_command_leaves_running_is_dead_when_its_result_is_there() {
    for sandbox in SANDBOXES {
        let server = Server::start(sandbox, &[]);
        let sleep = long_sleep();
        let response = server.run(&Job::of(&scatter(&sleep), &[])).await;
        assert_eq!(response.result.unwrap().exit_code, 0);
        assert_eq!(processes(&sleep), 0, "{sandbox}");
    }
}

#[tokio::test]
async fn when_primed_is_killed_its_commands_die() {
    for sandbox in SANDBOXES {
        let mut server = Server::start(sandbox, &[]);
        let sleep = long_sleep();
        let action = server
            .upload(&Job::of(&format!("{} sleep {sleep}", scatter(&sleep)), &[]))
            .await;
        let _operations = server.build.execute(action, false).await.unwrap();
        wait_until("all of it runs", || processes(&sleep) > SCATTERED);
        server.primed.daemon.kill();
        wait_until("all of it is dead", || processes(&sleep) == 0);
    }
}

/// A command that leaves a line in `runs` each time it runs, and ends when `go` is written to.
fn gated(server: &Server) -> Job {
    let (runs, go) = (server.path("runs"), server.path("go"));
    if !go.exists() {
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &go,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
    }
    let (runs, go) = (runs.display(), go.display());
    Job::of(
        &format!("echo x >> {runs}; cat {go}; echo 1 > out"),
        &["out"],
    )
}

fn runs(server: &Server) -> usize {
    std::fs::read_to_string(server.path("runs")).map_or(0, |runs| runs.lines().count())
}

/// Lets `gated` commands that run now end.
fn let_go(server: &Server) {
    let mut go = std::fs::OpenOptions::new()
        .write(true)
        .open(server.path("go"))
        .unwrap();
    go.write_all(b"go\n").unwrap();
}

#[tokio::test]
async fn identical_executions_at_the_same_time_run_once_and_all_are_told() {
    let server = Server::start("none", &["--jobs", "4"]);
    let job = gated(&server);
    let action = server.upload(&job).await;
    let mut waiting = Vec::new();
    for number in 0..3 {
        let mut operations = server.build.execute(action, number == 2).await.unwrap();
        let name = until(&mut operations, execution_stage::Value::Executing)
            .await
            .name;
        waiting.push((name, operations));
    }
    // Who has gone comes back by the name of its operation.
    let (name, gone) = waiting.remove(0);
    drop(gone);
    let mut back = server.build.wait(&name).await.unwrap();
    assert_eq!(
        until(&mut back, execution_stage::Value::Executing)
            .await
            .name,
        name
    );
    waiting.push((name.clone(), back));
    wait_until("it runs", || runs(&server) > 0);
    let_go(&server);
    for (_, operations) in waiting {
        let response = last(operations).await;
        assert_eq!((code(&response), response.cached_result), (Code::Ok, false));
        assert_eq!(response.result.unwrap().output_files.len(), 1);
    }
    assert_eq!(runs(&server), 1);
    // It can be waited for after its end, too.
    let late = last(server.build.wait(&name).await.unwrap()).await;
    assert_eq!(late.result.unwrap().output_files.len(), 1);
    assert!(server.run(&job).await.cached_result);
    assert_eq!(
        server.build.wait("nonsense").await.unwrap_err().code(),
        Code::NotFound
    );
}

#[tokio::test]
async fn what_is_not_to_be_cached_is_not_joined_either() {
    let server = Server::start("none", &["--jobs", "4"]);
    let mut job = gated(&server);
    job.do_not_cache = true;
    let action = server.upload(&job).await;
    let one = server.build.execute(action, false).await.unwrap();
    let two = server.build.execute(action, false).await.unwrap();
    wait_until("both run", || runs(&server) == 2);
    let_go(&server);
    let_go_until_over(&server, async { (last(one).await, last(two).await) }).await;
    assert!(server.build.lookup(action).await.is_err());
}

/// One opening of the pipe may serve both readers, or one of them.
async fn let_go_until_over<T>(server: &Server, over: impl Future<Output = T>) -> T {
    tokio::pin!(over);
    loop {
        tokio::select! {
            done = &mut over => return done,
            () = tokio::time::sleep(Duration::from_millis(50)) => {
                let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK;
                let open = rustix::fs::open(server.path("go"), flags, rustix::fs::Mode::empty());
                drop(open);
            }
        }
    }
}

#[tokio::test]
async fn the_most_urgent_goes_first() {
    let server = Server::start("none", &["--jobs", "1"]);
    let gate = server.upload(&gated(&server)).await;
    let mut gate = server.build.execute(gate, false).await.unwrap();
    until(&mut gate, execution_stage::Value::Executing).await;
    let order = server.path("order");
    let mut queued = Vec::new();
    for (name, priority) in [("late", 7), ("first", 0), ("second", 0), ("urgent", -3)] {
        let job = Job::of(&format!("echo {name} >> {}", order.display()), &[]);
        let action = server.upload(&job).await;
        let mut operations = server
            .ask(ExecuteRequest {
                action_digest: Some(action.to_proto()),
                execution_policy: Some(ExecutionPolicy { priority }),
                ..ExecuteRequest::default()
            })
            .await;
        until(&mut operations, execution_stage::Value::Queued).await;
        queued.push(operations);
    }
    let_go(&server);
    last(gate).await;
    for operations in queued {
        assert_eq!(code(&last(operations).await), Code::Ok);
    }
    let order = std::fs::read_to_string(order).unwrap();
    assert_eq!(order, "urgent\nfirst\nsecond\nlate\n");
}

#[tokio::test]
async fn only_what_succeeded_is_cached() {
    let server = Server::start("none", &[]);
    let failing = Job::of("echo no >&2; exit 3", &[]);
    let response = server.run(&failing).await;
    assert_eq!(
        (code(&response), response.result.as_ref().unwrap().exit_code),
        (Code::Ok, 3)
    );
    assert_eq!(server.stderr(&response).await, "no\n");
    assert!(server.build.lookup(failing.action().digest).await.is_err());
    assert!(!server.run(&failing).await.cached_result);

    let random = Job::of("head -c 16 /dev/urandom > out; kill -9 $$", &["out"]);
    assert_eq!(server.run(&random).await.result.unwrap().exit_code, 137);

    let random = Job::of("head -c 16 /dev/urandom > out", &["out"]);
    let first = server.run(&random).await.result.unwrap();
    let again = server.run(&random).await;
    assert!(again.cached_result);
    assert_eq!(again.result.unwrap().output_files, first.output_files);
    let action = random.action().digest;
    let anew = last(server.build.execute(action, true).await.unwrap()).await;
    assert!(!anew.cached_result);
    assert_ne!(anew.result.unwrap().output_files, first.output_files);
}

#[tokio::test]
async fn contents_are_within_the_result_for_those_who_ask() {
    let server = Server::start("none", &[]);
    let job = Job::of(
        "echo out; echo err >&2; echo 1 > a; echo 2 > b",
        &["a", "b"],
    );
    let action = server.upload(&job).await;
    let plain = last(server.build.execute(action, false).await.unwrap()).await;
    assert_eq!(plain.result.unwrap().stdout_raw, "");
    let asked = server
        .ask(ExecuteRequest {
            action_digest: Some(action.to_proto()),
            inline_stdout: true,
            inline_stderr: true,
            inline_output_files: vec!["b".to_owned()],
            ..ExecuteRequest::default()
        })
        .await;
    let result = last(asked).await.result.unwrap();
    assert_eq!(
        (result.stdout_raw, result.stderr_raw),
        ("out\n".into(), "err\n".into())
    );
    assert_eq!(
        (
            &result.output_files[0].contents[..],
            &result.output_files[1].contents[..]
        ),
        (&b""[..], &b"2\n"[..])
    );
}

#[tokio::test]
async fn missing_blobs_are_all_named() {
    let server = Server::start("none", &[]);
    let job = Job::of("true", &[])
        .with_file("a", "lost\n")
        .with_file("b", "lost too\n");
    let mut action = job.action();
    let lost = [Digest::of(b"lost\n"), Digest::of(b"lost too\n")];
    action.blobs.retain(|digest, _| !lost.contains(digest));
    server.build.upload(&action).await;
    let response = last(server.build.execute(action.digest, false).await.unwrap()).await;
    assert_eq!(code(&response), Code::FailedPrecondition);
    let status = response.status.unwrap();
    assert!(
        status.details[0]
            .type_url
            .ends_with("/google.rpc.PreconditionFailure")
    );
    let details = String::from_utf8_lossy(&status.details[0].value).into_owned();
    for digest in lost {
        assert!(details.contains(&format!("blobs/{digest}")), "{details}");
    }
    assert!(details.contains("MISSING"));

    let nothing = Digest::of(b"no action");
    let response = last(server.build.execute(nothing, false).await.unwrap()).await;
    assert_eq!(code(&response), Code::FailedPrecondition);
}

#[tokio::test]
async fn what_cannot_be_staged_is_refused_in_words() {
    let server = Server::start("none", &[]);
    let good = Job::of("true", &[]);
    let empty = DigestFunction::Sha256.of(b"").to_proto();
    let file = |name: &str| FileNode {
        name: name.to_owned(),
        digest: Some(empty.clone()),
        ..FileNode::default()
    };
    let rooted = |files: Vec<FileNode>| Job {
        root: Some(Directory {
            files,
            ..Directory::default()
        }),
        ..good.clone()
    };
    let mut refused = vec![
        rooted(vec![file("../evil")]),
        rooted(vec![file("..")]),
        rooted(vec![file("a\0b")]),
        rooted(vec![file("")]),
        rooted(vec![file("a"), file("a")]),
        rooted(vec![file(&"x".repeat(256))]),
        Job::of("true", &["../../etc/passwd"]),
        Job::of("true", &["/etc/passwd"]),
    ];
    let mut nothing = good.clone();
    nothing.command.arguments.clear();
    let mut outside = good.clone();
    outside.command.working_directory = "..".to_owned();
    let mut patient = good.clone();
    patient.timeout = Some(Duration::from_secs(1_000_000));
    refused.extend([nothing, outside, patient]);
    for job in refused {
        let response = server.run(&job).await;
        assert_eq!(code(&response), Code::InvalidArgument, "{response:?}");
    }

    // Each level holds the next one three times: more files than any disk has.
    let mut blobs = HashMap::new();
    let mut directory = client::keep(&mut blobs, Bytes::new());
    for _ in 0..60 {
        let names = ["a", "b", "c"].map(|name| DirectoryNode {
            name: name.to_owned(),
            digest: Some(directory.to_proto()),
        });
        let level = Directory {
            directories: names.into(),
            ..Directory::default()
        };
        directory = client::keep(&mut blobs, level.encode_to_vec().into());
    }
    let command = client::command_of("true", "out", &mut blobs);
    let bomb = client::Action::of(command, directory, "out", false, blobs);
    server.build.upload(&bomb).await;
    let response = last(server.build.execute(bomb.digest, false).await.unwrap()).await;
    assert_eq!(code(&response), Code::InvalidArgument, "{response:?}");

    let foreign = server.run(&good.with_property("OSFamily", "windows")).await;
    assert_eq!(code(&foreign), Code::FailedPrecondition);
}

#[tokio::test]
async fn the_cache_may_be_named_relative_to_where_primed_was_started() {
    for sandbox in SANDBOXES {
        let server = Server::start(sandbox, &["--cache-dir", "kept/here"]);
        let response = server.run(&Job::of("echo done", &[])).await;
        assert_eq!(code(&response), Code::Ok, "{sandbox}: {}", response.message);
        assert_eq!(server.stdout(&response).await, "done\n");
        assert!(server.path("kept/here").is_dir());
    }
}

#[tokio::test]
async fn a_program_that_is_not_there_is_said_to_be_so() {
    for sandbox in SANDBOXES {
        let server = Server::start(sandbox, &[]);
        for (program, exit_code) in [("no-such-program", 127), ("./tool", 127), ("./in.txt", 126)] {
            let mut job = Job::of("", &[]).with_file("in.txt", "no program");
            job.command.arguments = vec![program.to_owned()];
            let response = server.run(&job).await;
            let said = server.stderr(&response).await;
            assert_eq!(
                response.result.unwrap().exit_code,
                exit_code,
                "{sandbox}: {said}"
            );
            assert!(said.contains(program), "{sandbox}: {said}");
        }
    }
}

#[tokio::test]
async fn inputs_cannot_be_written_to_and_one_that_is_all_the_same_harms_no_other_action() {
    for sandbox in SANDBOXES {
        let server = Server::start(sandbox, &[]);
        let input = |script: &str| Job::of(script, &[]).with_file("in/a.txt", "as it was\n");
        let response = server.run(&input("echo changed > in/a.txt")).await;
        assert_ne!(response.result.unwrap().exit_code, 0, "{sandbox}");
        // Beside inputs there is room for what compilers leave there.
        let response = server
            .run(&input("echo 1 > in/a.gcno && rm in/a.txt"))
            .await;
        assert_eq!(response.result.unwrap().exit_code, 0, "{sandbox}");
        let response = server
            .run(&input("chmod u+w in/a.txt && echo changed > in/a.txt"))
            .await;
        assert_eq!(response.result.unwrap().exit_code, 0, "{sandbox}");
        let mut later = input("cat in/a.txt");
        later.salt = "later";
        server.build.upload(&later.action()).await;
        let response = server.run(&later).await;
        assert_eq!(server.stdout(&response).await, "as it was\n", "{sandbox}");
    }
}

#[tokio::test]
async fn properties_of_inputs_are_those_that_the_tree_says() {
    let server = Server::start("none", &[]);
    let content = DigestFunction::Sha256.of(b"#!/bin/sh\necho run\n");
    let node = |name: &str, is_executable, mode: Option<u32>, mtime: Option<i64>| FileNode {
        name: name.to_owned(),
        digest: Some(content.to_proto()),
        is_executable,
        node_properties: (mode.is_some() || mtime.is_some()).then(|| NodeProperties {
            mtime: mtime.map(|seconds| prost_types::Timestamp { seconds, nanos: 0 }),
            unix_mode: mode,
            ..NodeProperties::default()
        }),
    };
    let mut job = Job::of("stat -c '%n %a' a b c; stat -c %Y c; ./b; readlink l", &[]);
    job.root = Some(Directory {
        files: vec![
            node("a", false, None, None),
            node("b", true, None, None),
            node("c", false, Some(0o640), Some(1_000_000_000)),
        ],
        symlinks: vec![SymlinkNode {
            name: "l".to_owned(),
            target: "../anywhere".to_owned(),
            ..SymlinkNode::default()
        }],
        ..Directory::default()
    });
    let mut action = job.action();
    action
        .blobs
        .insert(content, Bytes::from_static(b"#!/bin/sh\necho run\n"));
    server.build.upload(&action).await;
    let response = server.run(&job).await;
    let said = server.stdout(&response).await;
    assert_eq!(said, "a 444\nb 555\nc 640\n1000000000\nrun\n../anywhere\n");
}

#[tokio::test]
async fn in_the_sandbox_there_is_no_network_no_other_process_and_no_way_to_the_cache() {
    let server = Server::start("bubblewrap", &[]);
    let script = "grep -c : /proc/net/dev; ls -d /proc/[0-9]* | wc -l; ls -A /tmp | wc -l; \
                  (touch /usr/x /etc/x /x) 2>/dev/null || echo read-only; touch /tmp/x && echo mine";
    let response = server.run(&Job::of(script, &[])).await;
    let said = server.stdout(&response).await;
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(
        (lines[0], &lines[2..]),
        ("1", &["0", "read-only", "mine"][..]),
        "{said}"
    );
    assert!(lines[1].parse::<usize>().unwrap() < 8, "{said}");
    let cache = server.path("cache");
    let response = server
        .run(&Job::of(&format!("ls -A {}", cache.display()), &[]))
        .await;
    assert_eq!(server.stdout(&response).await, "");

    let asked = Job::of("cat /proc/net/dev", &[]).with_property("network", "on");
    let response = server.run(&asked).await;
    let here = std::fs::read_to_string("/proc/net/dev").unwrap();
    let there = server.stdout(&response).await;
    assert_eq!(there.lines().count(), here.lines().count(), "{there}");
}

#[tokio::test]
async fn capabilities_say_that_it_executes_and_which_priorities_there_are() {
    let server = Server::start("auto", &[]);
    let mut client = CapabilitiesClient::new(server.channel.clone());
    let answer = client
        .get_capabilities(GetCapabilitiesRequest::default())
        .await
        .unwrap();
    let execution = answer.into_inner().execution_capabilities.unwrap();
    assert!(execution.exec_enabled);
    assert!(
        !execution
            .execution_priority_capabilities
            .unwrap()
            .priorities
            .is_empty()
    );
    assert!(
        execution
            .supported_node_properties
            .contains(&"mtime".to_owned())
    );
    let log = server.primed.daemon.log();
    assert!(
        log.contains("actions run in a sandbox of bubblewrap"),
        "{log}"
    );
}

#[test]
fn recc_builds_on_it_and_a_rebuild_after_a_header_change_is_primed() {
    for sandbox in SANDBOXES {
        let directory = scratch();
        let primed = start(&directory, sandbox, &["--jobs", "4"]);
        let project = Project::create(directory.path(), &primed.address());
        let counts = || {
            primed.wait();
            Counts::newest(&primed.status())
        };
        let all = UNITS as u64 + 2;
        let sum = |common: i64, few: i64| common * UNITS as i64 + few * FEW as i64;
        project.build();
        let first = counts();
        assert_eq!(
            (first.asked, first.missed),
            (all, all),
            "{sandbox}: {first:?}"
        );
        assert_eq!(project.run(), sum(1, 1));

        project.write("include/common.h", "#define COMMON 2\n");
        project.rebuild();
        let primed_ones = counts();
        assert_eq!(project.run(), sum(2, 1));
        // main.c does not include it.
        let brought = primed_ones.hit + primed_ones.joined;
        assert_eq!(
            (primed_ones.cached, brought),
            (1, all - 1),
            "{sandbox}: {primed_ones:?}"
        );
        assert_eq!(
            primed_ones.used, primed_ones.primed,
            "{sandbox}: {primed_ones:?}"
        );

        project.rebuild();
        assert_eq!(counts().cached, all, "{sandbox}");
    }
}
