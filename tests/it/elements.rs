//! Builds in two layers: elements are actions that run actions themselves, as BuildStream's are.
//! What is primed of them, when, and from what, proven with action chains on a backend that
//! executes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use primed::cas::Digest;
use primed::reapi::build::bazel::remote::execution::v2::*;
use primed::reapi::google::longrunning::Operation;
use prost::Message;
use serde_json::Value;
use tempfile::TempDir;
use tonic::Streaming;

use crate::backend::{FakeBackend, Outcome, Run, World, compile};
use crate::client::{self, Action, Build, Way, connect, keep, last, tree};
use crate::support::{Casd, PATIENCE, Primed, scratch};

/// Files by path.
type Files = Vec<(String, Bytes)>;

/// What the next execution of each element is to put out.
type Artifacts = Arc<Mutex<HashMap<Digest, Files>>>;

/// The platform property that names the sandbox's root.
const ROOT_PROPERTY: &str = "chrootRootDigest";

struct Stage {
    primed: Primed,
    /// Between primed and the backend, on a second machine.
    _casd: Option<Casd>,
    backend: Arc<FakeBackend>,
    artifacts: Artifacts,
    scratch: TempDir,
}

/// An element that is being built.
struct Element<'a> {
    stage: &'a Stage,
    label: String,
    action: Action,
    operations: Streaming<Operation>,
    client: Build,
    nested: Build,
    /// Text in the platform and the environment of what runs inside.
    root: Option<String>,
    between: Between,
    ways: Vec<Way>,
    /// What was run inside.
    subactions: Vec<Digest>,
}

/// What stands between what runs inside and primed.
#[derive(Clone, Copy, PartialEq)]
enum Between {
    Nothing,
    /// A proxy that answers what it can without a word.
    SilentProxy,
    /// One that asks whether the outputs are still there, as buildbox-casd does.
    AskingProxy,
}

/// How an element is built, beside its name and its inputs.
#[derive(Clone, Copy, Default)]
struct Settings<'a> {
    arguments: &'a str,
    /// Given to what runs inside.
    root: Option<&'a str>,
    /// What it names, to be uploaded.
    sandbox: Option<&'a Sandbox>,
}

/// A tree of its own, which what runs inside names by text.
struct Sandbox {
    text: String,
    blobs: HashMap<Digest, Bytes>,
}

impl Sandbox {
    fn of(staged: &[&Files]) -> Self {
        let files: Files = staged
            .iter()
            .flat_map(|files| files.iter().cloned())
            .collect();
        let mut blobs = HashMap::new();
        let root = tree(&files, &mut blobs);
        Sandbox {
            text: root.to_string(),
            blobs,
        }
    }

    fn settings(&self) -> Settings<'_> {
        Settings {
            root: Some(&self.text),
            sandbox: Some(self),
            ..Settings::default()
        }
    }
}

/// Compiles, in the sandbox that the platform names if that is a tree: the output depends on all
/// files in it, and there is none if one is missing.
fn compile_in_sandbox(world: &World, run: &Run) -> Outcome {
    let outcome = compile(world, run);
    let platform = world.action(run).and_then(|action| action.platform);
    let properties = platform
        .into_iter()
        .flat_map(|platform| platform.properties);
    let mut roots = properties.filter(|property| property.name == ROOT_PROPERTY);
    let (Some(root), Outcome::Output(output)) = (roots.next(), outcome.clone()) else {
        return outcome;
    };
    let root: Digest = root.value.parse().unwrap();
    let blob = world.blob(&run.instance, root);
    if blob.is_some_and(|blob| Directory::decode(blob).is_err()) {
        return outcome;
    }
    let Some(files) = world.files(&run.instance, root) else {
        return Outcome::Failed(tonic::Code::FailedPrecondition);
    };
    let mut output = String::from_utf8(output.to_vec()).unwrap();
    for (path, content) in files {
        output.push_str(&format!("\n/{path} {}", Digest::of(&content)));
    }
    Outcome::Output(output.into())
}

impl Stage {
    fn set() -> Self {
        Stage::set_with(&[])
    }

    /// With a primed that shares what it records, and a backend that takes that.
    fn sharing() -> Self {
        let stage = Stage::set_with(&["--share"]);
        *stage.backend.world.takes_updates.lock() = true;
        stage
    }

    fn set_with(arguments: &[&str]) -> Self {
        let scratch = scratch();
        let backend = FakeBackend::start(scratch.path());
        let artifacts = Artifacts::default();
        let known = artifacts.clone();
        backend
            .world
            .behave(move |world, run| match known.lock().get(&run.action) {
                Some(files) => Outcome::Files(files.clone()),
                None => compile_in_sandbox(world, run),
            });
        let primed = Primed::start_with(scratch.path(), &backend.address(), arguments);
        Stage {
            primed,
            _casd: None,
            backend: Arc::new(backend),
            artifacts,
            scratch,
        }
    }

    /// A machine of its own, with a primed without records that shares, and a casd, before the same
    /// backend.
    fn second_machine(&self) -> Self {
        let scratch = scratch();
        let casd = Casd::proxy_of(scratch.path(), &self.backend.address());
        let stage = self.newcomer(scratch, &casd.address());
        Stage {
            _casd: Some(casd),
            ..stage
        }
    }

    /// A primed without records that shares, before `upstream`.
    fn newcomer(&self, scratch: TempDir, upstream: &str) -> Self {
        let primed = Primed::start_with(scratch.path(), upstream, &["--share"]);
        assert_eq!(primed.status()["records"]["parents"], 0);
        Stage {
            primed,
            _casd: None,
            backend: self.backend.clone(),
            artifacts: self.artifacts.clone(),
            scratch,
        }
    }

    fn client(&self, tool: &str, invocation: &str) -> Build {
        let build = Build::over(connect(&self.primed.socket()), self.scratch.path());
        build.saying(&RequestMetadata {
            tool_details: Some(ToolDetails {
                tool_name: tool.to_owned(),
                ..ToolDetails::default()
            }),
            tool_invocation_id: invocation.to_owned(),
            ..RequestMetadata::default()
        })
    }

    /// Asks for an element and has it executed, in a tree of its own `sources` and of what it
    /// depends on, and waits until primed knows of it.
    async fn begin(&self, name: &str, sources: &[(&str, &str)], staged: &[&Files]) -> Element<'_> {
        self.begin_with(Settings::default(), name, sources, staged)
            .await
    }

    async fn begin_with(
        &self,
        settings: Settings<'_>,
        name: &str,
        sources: &[(&str, &str)],
        staged: &[&Files],
    ) -> Element<'_> {
        let element = self.execute(settings, name, sources, staged).await;
        self.until("the element is known", || {
            self.open_build(&element.label).is_some()
        })
        .await;
        element
    }

    /// Asks for an element and has it executed, and does not wait for primed.
    async fn execute(
        &self,
        settings: Settings<'_>,
        name: &str,
        sources: &[(&str, &str)],
        staged: &[&Files],
    ) -> Element<'_> {
        let client = self.client("BuildStream", "");
        let action = element(settings, name, sources, staged);
        assert!(
            client.lookup(action.digest).await.is_err(),
            "{name} is cached"
        );
        client.upload(&action).await;
        self.backend.world.keep_open(action.digest);
        let operations = client.execute(action.digest, false).await.unwrap();
        Element {
            stage: self,
            label: format!("action in {}", directory_of(name)),
            action,
            operations,
            client,
            nested: self.client("recc", "buildbox:6"),
            root: settings.root.map(str::to_owned),
            between: Between::Nothing,
            ways: Vec::new(),
            subactions: Vec::new(),
        }
    }

    /// What `primed status` says of an element that is being built.
    fn open_build(&self, label: &str) -> Option<Value> {
        let status = self.primed.status();
        let mut builds = status["builds"].as_array().unwrap().iter();
        let is_it = |build: &&Value| build["label"] == label && build["ended_unix_ms"].is_null();
        builds.find(is_it).cloned()
    }

    /// The commands that primed has executed by itself, in order, when there are `count` of them,
    /// all of them are over, and primed knows that.
    async fn primed_by_now(&self, count: usize) -> Vec<String> {
        self.until("all is primed", || {
            let runs = self.backend.world.speculative();
            runs.len() >= count && runs.iter().all(|run| run.over) && self.primed.is_idle()
        })
        .await;
        self.speculative()
    }

    /// How many builds of elements have been recorded.
    fn recorded(&self) -> usize {
        let recorded = "recorded a build parent=\"action in";
        self.primed.daemon.log().matches(recorded).count()
    }

    fn speculative(&self) -> Vec<String> {
        let runs = self.backend.world.speculative().into_iter();
        runs.map(|run| run.arguments.join(" ")).collect()
    }

    /// hit, joined and missed of the newest build of an element.
    fn counts(&self, name: &str) -> (u64, u64, u64) {
        let label = format!("action in {}", directory_of(name));
        let status = self.primed.status();
        let builds = status["builds"].as_array().unwrap();
        let newest = builds.iter().find(|build| build["label"] == label.as_str());
        let newest = newest.unwrap_or_else(|| panic!("no build of {name}: {status}"));
        assert_eq!(newest["parent"], "action");
        let count = |which: &str| newest[which].as_u64().unwrap();
        (count("hit"), count("joined"), count("missed"))
    }

    async fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let began = Instant::now();
        while !holds() {
            assert!(
                began.elapsed() < PATIENCE / 4,
                "{what}: never; primed executed {:?}\n{}",
                self.speculative(),
                self.primed.daemon.log()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Element<'_> {
    /// Runs an action from inside, as recc does, and returns what it wrote.
    async fn run(&mut self, command: &str, inputs: &[(&str, &Bytes)], output: &str) -> Bytes {
        let inputs: Files = inputs
            .iter()
            .map(|(path, content)| ((*path).to_owned(), (*content).clone()))
            .collect();
        let mut blobs = HashMap::new();
        let root = tree(&inputs, &mut blobs);
        let action = self.action(command, root, output, blobs);
        let known = self.stage.backend.world.result("", action.digest);
        let (way, result) = match (self.between, known) {
            (Between::Nothing, _) | (_, None) => self.nested.run(&action).await,
            (Between::SilentProxy, Some(result)) => (Way::Found, result),
            (Between::AskingProxy, Some(result)) => {
                self.nested.confirm(action.digest, &result).await;
                (Way::Found, result)
            }
        };
        assert_eq!(result.exit_code, 0);
        self.ways.push(way);
        self.subactions.push(action.digest);
        let digest = result.output_files[0].digest.as_ref().unwrap();
        let digest = Digest::try_from(digest).unwrap();
        self.stage.backend.world.blob("", digest).unwrap()
    }

    fn action(
        &self,
        command: &str,
        root: Digest,
        output: &str,
        mut blobs: HashMap<Digest, Bytes>,
    ) -> Action {
        let Some(text) = &self.root else {
            let command = client::command_of(command, output, &mut blobs);
            return Action::of(command, root, output, false, blobs);
        };
        let platform = Some(Platform {
            properties: vec![platform::Property {
                name: ROOT_PROPERTY.to_owned(),
                value: text.clone(),
            }],
        });
        let command = rooted_command(command, output, text, platform.clone());
        let action = primed::reapi::Action {
            command_digest: Some(keep(&mut blobs, command.encode_to_vec().into()).to_proto()),
            input_root_digest: Some(root.to_proto()),
            platform,
            ..primed::reapi::Action::default()
        };
        Action {
            digest: keep(&mut blobs, action.encode_to_vec().into()),
            blobs,
            output: output.to_owned(),
        }
    }

    /// Ends the element with these files as its output, and waits until it is recorded. Returns
    /// the output, and how the actions inside came by their results.
    async fn end(self, files: &[(&str, &Bytes)]) -> (Files, Vec<Way>) {
        let files: Files = files
            .iter()
            .map(|(path, content)| ((*path).to_owned(), (*content).clone()))
            .collect();
        let Element { stage, action, .. } = self;
        // A result waits for what is not attributed yet, but on a busy machine not for long enough.
        let run = match self.between {
            Between::SilentProxy => 0,
            _ => self.subactions.len() as u64,
        };
        stage
            .until("what was run inside is known", || {
                let build = stage.open_build(&self.label);
                build.is_some_and(|build| build["asked"].as_u64().unwrap() >= run)
            })
            .await;
        stage.artifacts.lock().insert(action.digest, files.clone());
        let recorded = stage.recorded();
        stage.backend.world.let_end(action.digest);
        let result = last(self.operations).await.result.unwrap();
        assert_eq!(result.exit_code, 0);
        if self.between != Between::SilentProxy {
            let named = result.subactions.iter().map(Digest::try_from);
            let named: Vec<Digest> = named.map(Result::unwrap).collect();
            assert_eq!(
                named, self.subactions,
                "the result names what was run inside"
            );
        }
        let cached = self.client.lookup(action.digest).await.unwrap();
        assert_eq!(cached.subactions, result.subactions);
        stage
            .until("the element is recorded", || stage.recorded() > recorded)
            .await;
        (files, self.ways)
    }
}

fn directory_of(element: &str) -> String {
    format!("buildstream/project/{element}")
}

/// A command with `root` in its environment.
#[allow(deprecated, reason = "recc puts the platform there, too")]
fn rooted_command(words: &str, output: &str, root: &str, platform: Option<Platform>) -> Command {
    Command {
        arguments: words.split(' ').map(str::to_owned).collect(),
        environment_variables: vec![command::EnvironmentVariable {
            name: "RECC_REMOTE_PLATFORM_chrootRootDigest".to_owned(),
            value: root.to_owned(),
        }],
        output_paths: vec![output.to_owned()],
        platform,
        ..Command::default()
    }
}

fn element(
    settings: Settings<'_>,
    name: &str,
    sources: &[(&str, &str)],
    staged: &[&Files],
) -> Action {
    let sources = sources.iter().map(|(path, content)| {
        let path = format!("{}/{path}", directory_of(name));
        (path, Bytes::copy_from_slice(content.as_bytes()))
    });
    let staged = staged.iter().flat_map(|files| files.iter().cloned());
    let files: Files = sources.chain(staged).collect();
    let mut blobs = HashMap::new();
    blobs.extend(
        settings
            .sandbox
            .iter()
            .flat_map(|sandbox| sandbox.blobs.clone()),
    );
    let root = tree(&files, &mut blobs);
    let words = format!("build {name} {}", settings.arguments);
    let root_text = settings.root.unwrap_or_default();
    let command = Command {
        working_directory: directory_of(name),
        ..rooted_command(&words, "install", root_text, None)
    };
    let command = keep(&mut blobs, command.encode_to_vec().into());
    let action = primed::reapi::Action {
        command_digest: Some(command.to_proto()),
        input_root_digest: Some(root.to_proto()),
        platform: Some(Platform {
            properties: vec![platform::Property {
                name: "remoteApisSocketPath".to_owned(),
                value: "tmp/casd.sock".to_owned(),
            }],
        }),
        ..primed::reapi::Action::default()
    };
    Action {
        digest: keep(&mut blobs, action.encode_to_vec().into()),
        blobs,
        output: "install".to_owned(),
    }
}

fn text(content: &str) -> Bytes {
    Bytes::copy_from_slice(content.as_bytes())
}

/// Compiles and links `app`, whose `main.c` includes `dep.h`.
async fn build_app(app: &mut Element<'_>, header: &Bytes) -> Bytes {
    let main = text("main");
    let object = app
        .run(
            "compile main",
            &[("main.c", &main), ("usr/include/dep.h", header)],
            "main.o",
        )
        .await;
    app.run("link", &[("main.o", &object)], "app").await
}

#[tokio::test]
async fn a_changed_dependency_primes_what_is_built_from_it_before_that_is_asked_for() {
    let stage = Stage::set();
    for (before, round) in ["one", "two", "three"].into_iter().enumerate() {
        let header = text(round);
        let dep = stage.begin("dep", &[("dep.h", round)], &[]).await;
        stage.primed_by_now(2 * before).await;
        let (dep, _) = dep.end(&[("usr/include/dep.h", &header)]).await;
        let mut app = stage.begin("app", &[("main.c", "main")], &[&dep]).await;
        let program = build_app(&mut app, &header).await;
        let (_, ways) = app.end(&[("usr/bin/app", &program)]).await;
        match round {
            "one" => {
                assert_eq!(ways, [Way::Executed; 2]);
                assert_eq!(stage.counts("app"), (0, 0, 2));
            }
            _ => {
                assert_eq!(ways, [Way::Found; 2]);
                assert_eq!(stage.counts("app"), (2, 0, 0));
                let primed = ["compile main", "link"].repeat(before);
                assert_eq!(stage.speculative(), primed, "and nothing else");
            }
        }
    }
}

#[tokio::test]
async fn an_element_that_has_ended_before_primed_could_read_it_primes_what_is_built_from_it() {
    let stage = Stage::set();
    let client = stage.client("BuildStream", "");
    for round in ["one", "two"] {
        let header = text(round);
        let action = element(Settings::default(), "dep", &[("dep.h", round)], &[]);
        client.upload(&action).await;
        let dep: Files = vec![("usr/include/dep.h".to_owned(), header.clone())];
        stage.artifacts.lock().insert(action.digest, dep.clone());
        let recorded = stage.recorded();
        stage.backend.world.hold_reads(true);
        let operations = client.execute(action.digest, false).await.unwrap();
        assert_eq!(last(operations).await.result.unwrap().exit_code, 0);
        stage.backend.world.hold_reads(false);
        stage
            .until("the element is recorded", || stage.recorded() > recorded)
            .await;
        if round == "two" {
            assert_eq!(stage.primed_by_now(2).await, ["compile main", "link"]);
        }
        let mut app = stage.begin("app", &[("main.c", "main")], &[&dep]).await;
        let program = build_app(&mut app, &header).await;
        app.end(&[("usr/bin/app", &program)]).await;
    }
    assert_eq!(stage.counts("app"), (2, 0, 0));
}

#[tokio::test]
async fn what_an_element_runs_is_its_own_while_primed_still_has_to_read_what_was_asked_before() {
    let stage = Stage::set();
    let header = text("dep");
    let dep = stage.begin("dep", &[("dep.h", "dep")], &[]).await;
    stage.backend.world.hold_reads(true);
    let mut blobs = HashMap::new();
    let root = tree(&[("else.c".to_owned(), text("else"))], &mut blobs);
    let command = client::command_of("compile else", "else.o", &mut blobs);
    let unrelated = Action::of(command, root, "else.o", false, blobs);
    let client = stage.client("recc", "make:1");
    assert_eq!(client.run(&unrelated).await.0, Way::Executed);

    // What has been asked so far is not answered yet when the next element runs its first action.
    let files: Files = vec![("usr/include/dep.h".to_owned(), header.clone())];
    let artifacts = &stage.artifacts;
    artifacts.lock().insert(dep.action.digest, files.clone());
    stage.backend.world.let_end(dep.action.digest);
    assert_eq!(last(dep.operations).await.result.unwrap().exit_code, 0);
    let sources = [("main.c", "main")];
    let mut app = stage
        .execute(Settings::default(), "app", &sources, &[&files])
        .await;
    let main = [("main.c", &text("main")), ("usr/include/dep.h", &header)];
    let object = app.run("compile main", &main, "main.o").await;

    stage.backend.world.hold_reads(false);
    let program = app.run("link", &[("main.o", &object)], "app").await;
    app.end(&[("usr/bin/app", &program)]).await;
    assert_eq!(stage.counts("app"), (0, 0, 2));
    assert_eq!(stage.primed.status()["records"]["actions"], 2);
}

#[tokio::test]
async fn an_element_whose_client_leaves_as_soon_as_it_is_told_the_result_is_recorded() {
    let stage = Stage::set();
    stage.backend.world.hold_streams(true);
    let client = stage.client("BuildStream", "");
    let action = element(Settings::default(), "dep", &[("dep.h", "one")], &[]);
    client.upload(&action).await;
    let mut operations = client.execute(action.digest, false).await.unwrap();
    let result = loop {
        let operation = operations.message().await.unwrap().unwrap();
        if let Some(response) = client::response(&operation) {
            break response.result.unwrap();
        }
    };
    assert_eq!(result.exit_code, 0);
    assert_eq!(stage.recorded(), 0, "the call has not ended");
    drop(operations);
    stage
        .until("the element is recorded", || stage.recorded() == 1)
        .await;
}

#[tokio::test]
async fn what_an_action_of_another_element_writes_is_followed() {
    let stage = Stage::set();
    for round in ["one", "two"] {
        let mut lib = stage.begin("lib", &[("lib.c", round)], &[]).await;
        if round == "two" {
            assert_eq!(stage.primed_by_now(2).await, ["compile lib", "link app"]);
        }
        let object = lib
            .run("compile lib", &[("lib.c", &text(round))], "lib.o")
            .await;
        let (lib, _) = lib.end(&[("usr/lib/lib.o", &object)]).await;
        let mut app = stage.begin("app", &[("README", "app")], &[&lib]).await;
        let program = app
            .run("link app", &[("usr/lib/lib.o", &object)], "app")
            .await;
        app.end(&[("usr/bin/app", &program)]).await;
    }
    assert_eq!(stage.counts("lib"), (1, 0, 0));
    assert_eq!(stage.counts("app"), (1, 0, 0));
    assert_eq!(stage.speculative().len(), 2);
}

#[tokio::test]
async fn a_chain_within_an_element_is_primed_when_its_tree_is_known() {
    let stage = Stage::set();
    for round in ["one", "two"] {
        let sources = [("a.c", round), ("b.c", "same"), ("c.c", round)];
        let mut lib = stage.begin("lib", &sources, &[]).await;
        if round == "two" {
            let mut primed = stage.primed_by_now(3).await;
            assert_eq!(primed.pop().as_deref(), Some("archive"), "last of all");
            primed.sort_unstable();
            assert_eq!(
                primed,
                ["compile a", "compile c"],
                "several sources changed, one did not"
            );
        }
        let mut objects = Vec::new();
        for (path, content) in sources {
            let unit = &path[..1];
            let command = format!("compile {unit}");
            let output = format!("{unit}.o");
            let object = lib.run(&command, &[(path, &text(content))], &output).await;
            objects.push((output, object));
        }
        let objects: Vec<(&str, &Bytes)> = objects
            .iter()
            .map(|(path, object)| (path.as_str(), object))
            .collect();
        let archive = lib.run("archive", &objects, "lib.a").await;
        lib.end(&[("usr/lib/lib.a", &archive)]).await;
    }
    assert_eq!(stage.counts("lib"), (3, 0, 0), "one was cached");
    assert_eq!(stage.speculative().len(), 3);
}

#[tokio::test]
async fn a_changed_element_in_the_middle_primes_itself_and_what_comes_after_it() {
    let stage = Stage::set();
    let mut base = stage.begin("base", &[("base.c", "base")], &[]).await;
    let object = base
        .run("compile base", &[("base.c", &text("base"))], "base.o")
        .await;
    let (base, _) = base.end(&[("usr/lib/base.o", &object)]).await;
    let base_object = object;
    for round in ["one", "two"] {
        let mut middle = stage
            .begin("middle", &[("middle.c", round)], &[&base])
            .await;
        if round == "two" {
            let primed = stage.primed_by_now(3).await;
            assert_eq!(primed, ["compile middle", "combine", "link top"]);
        }
        let object = middle
            .run("compile middle", &[("middle.c", &text(round))], "middle.o")
            .await;
        let inputs = [("middle.o", &object), ("usr/lib/base.o", &base_object)];
        let combined = middle.run("combine", &inputs, "all.o").await;
        let (middle, _) = middle.end(&[("usr/lib/all.o", &combined)]).await;
        let mut top = stage
            .begin("top", &[("README", "top")], &[&base, &middle])
            .await;
        let program = top
            .run("link top", &[("usr/lib/all.o", &combined)], "top")
            .await;
        top.end(&[("usr/bin/top", &program)]).await;
    }
    assert_eq!(stage.counts("middle"), (2, 0, 0));
    assert_eq!(stage.counts("top"), (1, 0, 0));
    assert_eq!(stage.counts("base"), (0, 0, 1), "it was not built again");
}

#[tokio::test]
async fn an_adapted_dependency_is_enough_where_own_sources_stay() {
    let stage = Stage::set();
    for round in ["one", "two"] {
        let mut dep = stage.begin("dep", &[("spec", round)], &[]).await;
        if round == "two" {
            assert_eq!(
                stage.primed_by_now(3).await,
                ["generate", "compile main", "link"]
            );
        }
        let header = dep
            .run("generate", &[("spec", &text(round))], "dep.h")
            .await;
        let (dep, _) = dep.end(&[("usr/include/dep.h", &header)]).await;
        let mut app = stage.begin("app", &[("main.c", "main")], &[&dep]).await;
        let program = build_app(&mut app, &header).await;
        app.end(&[("usr/bin/app", &program)]).await;
    }
    assert_eq!(stage.counts("dep"), (1, 0, 0));
    assert_eq!(stage.counts("app"), (2, 0, 0));
}

#[tokio::test]
async fn an_element_whose_command_changed_does_not_break_the_chain() {
    let stage = Stage::set();
    for (round, arguments) in [("one", "--old"), ("two", "--new")] {
        let spec = [("spec", round)];
        let settings = Settings {
            arguments,
            ..Settings::default()
        };
        let mut dep = stage.begin_with(settings, "dep", &spec, &[]).await;
        if round == "two" {
            assert_eq!(
                stage.primed_by_now(3).await,
                ["generate", "compile main", "link"]
            );
        }
        let header = dep
            .run("generate", &[("spec", &text(round))], "dep.h")
            .await;
        let (dep, _) = dep.end(&[("usr/include/dep.h", &header)]).await;
        let mut app = stage.begin("app", &[("main.c", "main")], &[&dep]).await;
        let program = build_app(&mut app, &header).await;
        app.end(&[("usr/bin/app", &program)]).await;
    }
    assert_eq!(stage.counts("app"), (2, 0, 0));
}

#[tokio::test]
async fn elements_that_are_built_at_once_are_told_apart_by_what_their_actions_read() {
    let stage = Stage::set();
    let shared = vec![("usr/include/dep.h".to_owned(), text("dep"))];
    for round in ["one", "two"] {
        let mut left = stage.begin("left", &[("left.c", round)], &[&shared]).await;
        let mut right = stage
            .begin("right", &[("right.c", round)], &[&shared])
            .await;
        if round == "two" {
            let mut primed = stage.primed_by_now(4).await;
            primed.sort_unstable();
            assert_eq!(
                primed,
                ["compile left", "compile right", "link left", "link right"]
            );
        }
        let mut programs = Vec::new();
        for (element, name) in [(&mut left, "left"), (&mut right, "right")] {
            let (source, output) = (format!("{name}.c"), format!("{name}.o"));
            let content = text(round);
            let inputs = [
                (source.as_str(), &content),
                ("usr/include/dep.h", &shared[0].1),
            ];
            let object = element
                .run(&format!("compile {name}"), &inputs, &output)
                .await;
            let inputs = [(output.as_str(), &object)];
            programs.push(element.run(&format!("link {name}"), &inputs, name).await);
        }
        let (_, ways) = left.end(&[("usr/bin/left", &programs[0])]).await;
        right.end(&[("usr/bin/right", &programs[1])]).await;
        let way = if round == "one" {
            Way::Executed
        } else {
            Way::Found
        };
        assert_eq!(ways, [way; 2]);
    }
    assert_eq!(stage.counts("left"), (2, 0, 0));
    assert_eq!(stage.counts("right"), (2, 0, 0));
}

#[tokio::test]
async fn a_call_that_fits_no_element_is_nobodys() {
    let stage = Stage::set();
    let mut lib = stage.begin("lib", &[("lib.c", "lib")], &[]).await;
    lib.run("compile lib", &[("lib.c", &text("lib"))], "lib.o")
        .await;
    let mut stranger = stage.begin("other", &[("other.c", "other")], &[]).await;
    stranger
        .run("compile x", &[("x.c", &text("of nobody"))], "x.o")
        .await;
    stranger.subactions.clear();
    stranger.end(&[]).await;
    lib.end(&[]).await;
    assert_eq!(stage.counts("lib"), (0, 0, 1));
    assert_eq!(stage.counts("other"), (0, 0, 0));
}

#[tokio::test]
async fn digests_in_platform_and_environment_are_adapted_once_the_element_tells_them() {
    let stage = Stage::set();
    for (round, header) in [("one", "a"), ("two", "b"), ("three", "b")] {
        let content = text(header);
        // It names no tree.
        let root = stage.backend.world.put("", text(round)).to_string();
        if round != "three" {
            let dep = stage.begin("dep", &[("dep.h", header)], &[]).await;
            dep.end(&[("usr/include/dep.h", &content)]).await;
            assert!(stage.speculative().is_empty(), "the root is not known yet");
        }
        let dep = vec![("usr/include/dep.h".to_owned(), content.clone())];
        let settings = Settings {
            root: Some(&root),
            ..Settings::default()
        };
        let sources = [("main.c", "main")];
        let mut app = stage.begin_with(settings, "app", &sources, &[&dep]).await;
        let primed = match round {
            "one" => 0,
            "two" => 2,
            _ => 4, // the header is as before, the root is not
        };
        stage.primed_by_now(primed).await;
        let program = build_app(&mut app, &content).await;
        app.end(&[("usr/bin/app", &program)]).await;
        assert_eq!(stage.speculative().len(), primed);
        match round {
            "one" => assert_eq!(stage.counts("app"), (0, 0, 2)),
            _ => assert_eq!(stage.counts("app"), (2, 0, 0), "{round}"),
        }
    }
}

/// Compiles and links `app` in its sandbox, which has the headers.
async fn build_in_sandbox(app: &mut Element<'_>) -> Bytes {
    let object = app
        .run("compile main", &[("main.c", &text("main"))], "main.o")
        .await;
    app.run("link", &[("main.o", &object)], "app").await
}

/// What nobody has built: not small, and the same for all.
fn base() -> Files {
    let file = |path: &str| (path.to_owned(), text(path));
    let mut files = vec![file("usr/bin/gcc"), file("usr/include/stdio.h")];
    files.push(("usr/share/empty".to_owned(), Bytes::new()));
    files
}

#[tokio::test]
async fn a_changed_header_in_a_sandbox_primes_what_is_built_in_it_before_that_is_asked_for() {
    let stage = Stage::set();
    let base = base();
    for (before, round) in ["one", "two", "three"].into_iter().enumerate() {
        let dep = stage.begin("dep", &[("dep.h", round)], &[&base]).await;
        let primed = ["compile main", "link"].repeat(before);
        assert_eq!(stage.primed_by_now(2 * before).await, primed);
        let (dep, _) = dep.end(&[("usr/include/dep.h", &text(round))]).await;
        let sandbox = Sandbox::of(&[&base, &dep]);
        let (settings, sources) = (sandbox.settings(), [("main.c", "main")]);
        let mut app = stage
            .begin_with(settings, "app", &sources, &[&base, &dep])
            .await;
        let program = build_in_sandbox(&mut app).await;
        let (_, ways) = app.end(&[("usr/bin/app", &program)]).await;
        match before {
            0 => assert_eq!(stage.counts("app"), (0, 0, 2)),
            _ => {
                assert_eq!(ways, [Way::Found; 2]);
                assert_eq!(stage.counts("app"), (2, 0, 0));
            }
        }
        assert_eq!(stage.speculative(), primed, "and nothing else");
    }
}

#[tokio::test]
async fn sandboxes_are_followed_from_element_to_element() {
    let stage = Stage::set();
    let base = base();
    for (before, round) in ["one", "two", "three"].into_iter().enumerate() {
        let dep = stage.begin("dep", &[("dep.h", round)], &[&base]).await;
        let primed = ["compile lib", "compile main", "link"].repeat(before);
        assert_eq!(stage.primed_by_now(3 * before).await, primed);
        let (dep, _) = dep.end(&[("usr/include/dep.h", &text(round))]).await;
        let sandbox = Sandbox::of(&[&base, &dep]);
        let (settings, sources) = (sandbox.settings(), [("lib.c", "lib")]);
        let mut lib = stage
            .begin_with(settings, "lib", &sources, &[&base, &dep])
            .await;
        let object = lib
            .run("compile lib", &[("lib.c", &text("lib"))], "lib.o")
            .await;
        let (lib, _) = lib.end(&[("usr/lib/lib.o", &object)]).await;
        let sandbox = Sandbox::of(&[&base, &dep, &lib]);
        let (settings, sources) = (sandbox.settings(), [("main.c", "main")]);
        let mut app = stage
            .begin_with(settings, "app", &sources, &[&base, &dep, &lib])
            .await;
        let program = build_in_sandbox(&mut app).await;
        app.end(&[("usr/bin/app", &program)]).await;
        if before > 0 {
            assert_eq!(stage.counts("lib"), (1, 0, 0));
            assert_eq!(stage.counts("app"), (2, 0, 0));
        }
        assert_eq!(stage.speculative(), primed, "and nothing else");
    }
}

#[tokio::test]
async fn what_elements_make_by_themselves_is_awaited_before_a_sandbox_is_foreseen() {
    let stage = Stage::set();
    let base = base();
    for (before, round) in ["one", "two", "three"].into_iter().enumerate() {
        // What both put out is made by nothing that primed could see.
        let made = |name: &str| text(&format!("{name} made from {round}"));
        let dep = stage.begin("dep", &[("in", round)], &[&base]).await;
        let (dep, _) = dep.end(&[("usr/include/dep.h", &made("dep"))]).await;
        let primed = ["compile lib", "compile main", "link"].repeat(before);
        if before > 0 {
            let first = stage.primed_by_now(3 * before - 2).await;
            assert_eq!(first, primed[..3 * before - 2], "only its header is there");
        }
        let sandbox = Sandbox::of(&[&base, &dep]);
        let (settings, sources) = (sandbox.settings(), [("lib.c", "lib")]);
        let mut lib = stage
            .begin_with(settings, "lib", &sources, &[&base, &dep])
            .await;
        lib.run("compile lib", &[("lib.c", &text("lib"))], "lib.o")
            .await;
        let (lib, _) = lib.end(&[("usr/lib/lib.so", &made("lib"))]).await;
        assert_eq!(stage.primed_by_now(3 * before).await, primed);
        let sandbox = Sandbox::of(&[&base, &dep, &lib]);
        let (settings, sources) = (sandbox.settings(), [("main.c", "main")]);
        let mut app = stage
            .begin_with(settings, "app", &sources, &[&base, &dep, &lib])
            .await;
        let program = build_in_sandbox(&mut app).await;
        app.end(&[("usr/bin/app", &program)]).await;
        if before > 0 {
            assert_eq!(stage.counts("lib"), (1, 0, 0));
            assert_eq!(stage.counts("app"), (2, 0, 0));
        }
        assert_eq!(stage.speculative(), primed, "and nothing else");
    }
}

#[tokio::test]
async fn a_sandbox_that_is_another_than_foreseen_wastes_and_is_followed_once_it_is_named() {
    let stage = Stage::set();
    let base = base();
    let unrelated = vec![("usr/bin/new".to_owned(), text("of nobody"))];
    for round in ["one", "two"] {
        let dep = stage.begin("dep", &[("dep.h", round)], &[&base]).await;
        if round == "two" {
            assert_eq!(stage.primed_by_now(2).await, ["compile main", "link"]);
        }
        let (dep, _) = dep.end(&[("usr/include/dep.h", &text(round))]).await;
        let mut staged = vec![&base, &dep];
        if round == "two" {
            staged.push(&unrelated);
        }
        let sandbox = Sandbox::of(&staged);
        let (settings, sources) = (sandbox.settings(), [("main.c", "main")]);
        let mut app = stage.begin_with(settings, "app", &sources, &staged).await;
        if round == "two" {
            let primed = ["compile main", "link"].repeat(2);
            assert_eq!(stage.primed_by_now(4).await, primed);
        }
        let program = build_in_sandbox(&mut app).await;
        app.end(&[("usr/bin/app", &program)]).await;
    }
    assert_eq!(stage.counts("app"), (2, 0, 0));
    assert_eq!(stage.speculative().len(), 4);
}

#[tokio::test]
async fn a_sandbox_in_which_nothing_changed_keeps_nobody_waiting() {
    let stage = Stage::set();
    let base = base();
    let sandbox = Sandbox::of(&[&base]);
    for round in ["one", "two"] {
        let header = text(round);
        let dep = stage.begin("dep", &[("dep.h", round)], &[&base]).await;
        if round == "two" {
            assert_eq!(stage.primed_by_now(2).await, ["compile main", "link"]);
        }
        let (dep, _) = dep.end(&[("usr/include/dep.h", &header)]).await;
        let (settings, sources) = (sandbox.settings(), [("main.c", "main")]);
        let mut app = stage
            .begin_with(settings, "app", &sources, &[&base, &dep])
            .await;
        let program = build_app(&mut app, &header).await;
        app.end(&[("usr/bin/app", &program)]).await;
    }
    assert_eq!(stage.counts("app"), (2, 0, 0));
    assert_eq!(stage.speculative().len(), 2);
}

#[tokio::test]
async fn without_action_results_only_what_reads_sources_and_artifacts_is_primed() {
    let stage = Stage::set_with(&["--mode", "source-artifact"]);
    for round in ["one", "two"] {
        let dep = stage.begin("dep", &[("dep.in", round)], &[]).await;
        // It is made from the source by nothing that primed could see.
        let header = text(&format!("made from {round}"));
        let (dep, _) = dep.end(&[("usr/include/dep.h", &header)]).await;
        if round == "two" {
            assert_eq!(stage.primed_by_now(1).await, ["compile main"]);
        }
        let mut app = stage.begin("app", &[("main.c", "main")], &[&dep]).await;
        let program = build_app(&mut app, &header).await;
        app.end(&[("usr/bin/app", &program)]).await;
    }
    // The link reads what an action writes.
    assert_eq!(stage.counts("app"), (1, 0, 1));
    assert_eq!(stage.speculative().len(), 1);
}

#[tokio::test]
async fn what_a_proxy_between_answers_itself_is_known_the_next_time() {
    let stage = Stage::set();
    let header = vec![("usr/include/dep.h".to_owned(), text("dep"))];
    for (round, content) in ["one", "two", "three", "four"].into_iter().enumerate() {
        let sources = [("main.c", content), ("same.c", "same")];
        let mut app = stage.begin("app", &sources, &[&header]).await;
        assert_eq!(stage.primed_by_now(2 * round).await.len(), 2 * round);
        if round > 0 {
            app.between = Between::SilentProxy;
        }
        let mut objects = Vec::new();
        for (path, content) in sources {
            let command = format!("compile {path}");
            let output = path.replace(".c", ".o");
            let inputs = [(path, &text(content)), ("usr/include/dep.h", &header[0].1)];
            let object = app.run(&command, &inputs, &output).await;
            objects.push((output, object));
        }
        let objects: Vec<(&str, &Bytes)> = objects
            .iter()
            .map(|(path, object)| (path.as_str(), object))
            .collect();
        let program = app.run("link", &objects, "app").await;
        app.end(&[("usr/bin/app", &program)]).await;
        let missed = if round == 0 { 3 } else { 0 };
        assert_eq!(stage.counts("app"), (0, 0, missed), "it was not asked");
        assert_eq!(stage.primed.status()["records"]["actions"], 3);
    }
}

#[tokio::test]
async fn the_same_command_in_two_directories_is_two_actions() {
    let stage = Stage::set();
    for round in ["one", "two"] {
        let sources = [("left/main.c", round), ("right/main.c", "right")];
        let mut app = stage.begin("app", &sources, &[]).await;
        if round == "two" {
            assert_eq!(stage.primed_by_now(2).await, ["compile main", "link"]);
        }
        let mut objects = Vec::new();
        for content in [round, "right"] {
            let inputs = [("main.c", &text(content))];
            objects.push(app.run("compile main", &inputs, "main.o").await);
        }
        let inputs = [("left/main.o", &objects[0]), ("right/main.o", &objects[1])];
        let program = app.run("link", &inputs, "app").await;
        app.end(&[("usr/bin/app", &program)]).await;
        assert_eq!(stage.primed.status()["records"]["actions"], 3);
    }
    assert_eq!(stage.counts("app"), (2, 0, 0));
    assert_eq!(stage.speculative().len(), 2);
}

/// Builds `dep`, which generates the header that `app` is compiled with, and `app`.
async fn build_both(stage: &Stage, round: &str, primed: &[&str]) {
    let mut dep = stage.begin("dep", &[("spec", round)], &[]).await;
    assert_eq!(stage.primed_by_now(primed.len()).await, primed);
    let header = dep
        .run("generate", &[("spec", &text(round))], "dep.h")
        .await;
    let (dep, _) = dep.end(&[("usr/include/dep.h", &header)]).await;
    let mut app = stage.begin("app", &[("main.c", "main")], &[&dep]).await;
    let program = build_app(&mut app, &header).await;
    app.end(&[("usr/bin/app", &program)]).await;
}

/// Waits until both elements are shared.
async fn shared(stage: &Stage) {
    let shared = "share: shared parent=\"action in";
    let log = || stage.primed.daemon.log();
    stage
        .until("both are shared", || log().matches(shared).count() == 2)
        .await;
}

#[tokio::test]
async fn another_machine_primes_elements_and_their_dependents_from_what_the_first_one_shared() {
    let first = Stage::sharing();
    build_both(&first, "one", &[]).await;
    shared(&first).await;
    let second = first.second_machine();
    build_both(&second, "two", &["generate", "compile main", "link"]).await;
    assert_eq!(second.counts("dep"), (1, 0, 0));
    assert_eq!(second.counts("app"), (2, 0, 0));
    for stage in [&first, &second] {
        let log = stage.primed.daemon.log();
        assert!(
            !log.contains(" WARN ") && !log.contains("panicked"),
            "{log}"
        );
    }
}

#[tokio::test]
async fn a_backend_that_takes_no_updates_is_read_from_and_that_is_said_once() {
    let first = Stage::sharing();
    build_both(&first, "one", &[]).await;
    shared(&first).await;
    *first.backend.world.takes_updates.lock() = false;
    let second = first.newcomer(scratch(), &first.backend.address());
    build_both(&second, "two", &["generate", "compile main", "link"]).await;
    let said = || {
        let log = second.primed.daemon.log();
        let warnings: Vec<&str> = log.lines().filter(|line| line.contains("WARN")).collect();
        warnings.join("\n")
    };
    second
        .until("it is said", || {
            said().contains("the backend allows no action-cache updates")
        })
        .await;
    assert_eq!(said().lines().count(), 1, "{}", said());
}

#[tokio::test]
async fn what_a_proxy_between_answers_and_asks_about_is_counted_and_named() {
    let stage = Stage::set();
    for (round, content) in ["one", "two", "three"].into_iter().enumerate() {
        let sources = [("main.c", content), ("same.c", "same")];
        let mut app = stage.begin("app", &sources, &[]).await;
        stage.primed_by_now(2 * round).await;
        app.between = Between::AskingProxy;
        let mut objects = Vec::new();
        for (path, content) in sources {
            let (command, output) = (format!("compile {path}"), path.replace(".c", ".o"));
            let object = app.run(&command, &[(path, &text(content))], &output).await;
            objects.push((output, object));
        }
        let inputs: Vec<(&str, &Bytes)> = objects
            .iter()
            .map(|(path, object)| (path.as_str(), object))
            .collect();
        // Nothing of it stands in the element's tree.
        let program = app.run("link", &inputs, "app").await;
        app.end(&[("usr/bin/app", &program)]).await;
        match round {
            0 => assert_eq!(stage.counts("app"), (0, 0, 3)),
            _ => assert_eq!(stage.counts("app"), (2, 0, 0), "one was cached"),
        }
        let status = stage.primed.status();
        let newest = &status["builds"][0];
        assert_eq!(
            (&newest["asked"], &newest["parent"]),
            (&3.into(), &"action".into())
        );
    }
    assert_eq!(stage.speculative().len(), 4);
}

#[tokio::test]
async fn an_element_whose_client_goes_on_waiting_by_name_is_named_counted_and_recorded_as_ever() {
    let stage = Stage::set();
    for round in ["one", "two"] {
        let mut lib = stage.begin("lib", &[("lib.c", round)], &[]).await;
        if round == "two" {
            assert_eq!(stage.primed_by_now(1).await, ["compile lib"]);
        }
        let operation = lib.operations.message().await.unwrap().unwrap();
        // The stream that it was told so by is dropped.
        lib.operations = lib.client.wait(&operation.name).await.unwrap();
        let object = lib
            .run("compile lib", &[("lib.c", &text(round))], "lib.o")
            .await;
        lib.end(&[("usr/lib/lib.o", &object)]).await;
    }
    assert_eq!(stage.counts("lib"), (1, 0, 0));
}
