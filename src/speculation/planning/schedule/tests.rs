use bytes::Bytes;
use prost::Message;

use super::super::known::{CurrentParent, Sources};
use super::super::uses::RETIRES;
use super::super::verdict::By;
use super::super::worth::Worth;
use super::*;
use crate::cas::DigestFunction;
use crate::cas::directories::{Directory, Trees};
use crate::reapi;
use crate::speculation::flights::left_out::LeftOut;
use crate::speculation::records::parent::{
    ActionParent, ExecutedParent, Origin, OverlayTable, ParentIdentity, ParentKind, SubactionKey,
    fixture,
};
use crate::speculation::records::prediction::{Prediction, Wasted};

/// Actions in `/p`; each reads files of the root directory and writes one file there.
#[derive(Default)]
struct Scene {
    bases: Vec<BaseAction>,
    trees: Trees,
    sources: Sources,
    overlays: OverlayTable,
    wasted: Wasted,
    overhead: Duration,
}

fn digest(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

impl Scene {
    /// An action that reads `inputs` as they were recorded ("old NAME") and writes `output`.
    fn action(mut self, output: &str, inputs: &[&str], seconds: u64) -> Self {
        let (input_root, directory) = Digest::of_message(&root(inputs, |_| "old"));
        let directory = Directory::parse(directory, input_root.function()).unwrap();
        self.trees.insert(input_root, Arc::new(directory));
        let encoded = encoded(output, input_root);
        let base = BaseAction {
            digest: Digest::of(&encoded),
            encoded,
            outputs: vec![(output.to_owned(), digest(&format!("old {output}")))],
            duration: Duration::from_secs(seconds),
            order: self.bases.len() as u64,
            ..fixture::base(output, input_root)
        };
        let origin = Origin::Action {
            parent: None,
            action: base.digest,
            path: output.to_owned(),
        };
        self.overlays.add(digest(&format!("old {output}")), origin);
        self.bases.push(base);
        self
    }

    /// A source file that was "old NAME" when it was recorded.
    fn source(mut self, name: &str, now: &str) -> Self {
        let path = std::path::Path::new("/p").join(name);
        self.overlays
            .add(digest(&format!("old {name}")), Origin::Disk(path.clone()));
        self.sources
            .insert(path, Some(digest(&format!("{now} {name}"))));
        self
    }

    /// So many executions in a row of the last action were wasted.
    fn wasted(mut self, times: u8) -> Self {
        let last = self.bases.last().unwrap();
        self.wasted.insert(Prediction::of(last).unwrap(), times);
        self
    }

    /// To execute an action costs so many seconds.
    fn costing(mut self, seconds: u64) -> Self {
        self.overhead = Duration::from_secs(seconds);
        self
    }

    fn plan(self) -> Plan {
        let actions = self.bases.into_iter().map(|base| {
            let action_key = base.parts().unwrap().action_key;
            let mount = base.mount.clone();
            (SubactionKey { action_key, mount }, Arc::new(base))
        });
        let mut parent = fixture::invocation(self.overlays);
        parent.actions = actions.collect();
        let wasted = (parent.identity.weak_key(), Arc::new(self.wasted));
        let worth = Worth {
            wasted: HashMap::from([wasted]),
            overhead: self.overhead,
        };
        let planned = PlannedParent {
            parent: Arc::new(parent),
            share: Share::Whole,
        };
        Plan::new(Subject {
            parents: vec![planned],
            trees: self.trees,
            known: Known {
                disk: self.sources,
                ..Known::default()
            },
            worth,
            ..Subject::default()
        })
    }
}

fn root(inputs: &[&str], age: impl Fn(&str) -> &'static str) -> reapi::Directory {
    let mut inputs = inputs.to_vec();
    inputs.sort_unstable();
    let files = inputs.iter().map(|name| reapi::FileNode {
        name: (*name).to_owned(),
        digest: Some(digest(&format!("{} {name}", age(name))).to_proto()),
        ..reapi::FileNode::default()
    });
    reapi::Directory {
        files: files.collect(),
        ..reapi::Directory::default()
    }
}

fn encoded(output: &str, input_root: Digest) -> Bytes {
    reapi::Action {
        command_digest: Some(digest(&format!("write {output}")).to_proto()),
        input_root_digest: Some(input_root.to_proto()),
        ..reapi::Action::default()
    }
    .encode_to_vec()
    .into()
}

/// The action that writes `output` when all of its `inputs` are new.
fn adapted(output: &str, inputs: &[&str]) -> Digest {
    let (input_root, _) = Digest::of_message(&root(inputs, |_| "new"));
    Digest::of(&encoded(output, input_root))
}

fn actions(ready: &[Ready]) -> Vec<Digest> {
    ready.iter().map(|ready| ready.adapted.action).collect()
}

/// `action` has written a new `output`.
fn done(plan: &mut Plan, action: Digest, output: &str) -> Vec<Digest> {
    let outputs = vec![(output.to_owned(), digest(&format!("new {output}")))];
    actions(&plan.complete(&key(action), Some(outputs), &HashMap::new()))
}

fn key(action: Digest) -> FlightKey {
    FlightKey {
        instance: "".into(),
        action,
    }
}

fn chain() -> Scene {
    Scene::default()
        .source("a.c", "new")
        .action("a.i", &["a.c"], 1)
        .action("a.o", &["a.i"], 1)
        .action("prog", &["a.o"], 1)
}

#[test]
fn a_chain_becomes_ready_link_by_link() {
    let mut plan = chain().plan();
    let first = adapted("a.i", &["a.c"]);
    let second = adapted("a.o", &["a.i"]);
    let third = adapted("prog", &["a.o"]);
    assert_eq!(actions(&plan.start(&HashMap::new())), [first]);
    assert!(plan.awaits(&key(first)) && !plan.awaits(&key(second)));
    assert_eq!(done(&mut plan, first, "a.i"), [second]);
    assert_eq!(done(&mut plan, second, "a.o"), [third]);
    assert_eq!(done(&mut plan, third, "prog"), []);
    assert_eq!(plan.awaited().count(), 0);
    assert_eq!(plan.take_unadaptable(), []);
}

#[test]
fn what_is_retired_is_awaited_but_not_executed_until_a_client_asks_for_it() {
    let scene = Scene::default().source("a.c", "new");
    let scene = scene.action("a.o", &["a.c"], 1);
    let scene = scene.action("b.o", &["a.c"], 1).wasted(RETIRES);
    let mut plan = scene.action("c.o", &["a.c"], 1).wasted(RETIRES).plan();
    let [a, b, c] = ["a.o", "b.o", "c.o"].map(|output| adapted(output, &["a.c"]));
    assert_eq!(actions(&plan.start(&HashMap::new())), [a]);
    assert!(plan.awaits(&key(b)), "a client may execute it");
    assert_eq!(plan.left_out(&key(a)), []);
    let left_out = |plan: &mut Plan, output| {
        let verdicts = plan.take_verdicts();
        match outlook(&verdicts, output) {
            Outlook::Adapted(adaptation) => adaptation.left_out,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(left_out(&mut plan, "b.o"), Some(LeftOut::Retired(RETIRES)));
    assert_eq!(plan.left_out(&key(b)).len(), 1);
    let back = plan.judge_anew(Worth::default());
    assert_eq!(actions(&back), [b, c]);
    assert_eq!(plan.left_out(&key(b)), []);
    assert_eq!(left_out(&mut plan, "c.o"), None);
}

#[test]
fn what_is_cheap_is_executed_only_if_something_that_waits_for_it_is_worth_it() {
    let scene = |seconds| {
        let scene = Scene::default().source("a.c", "new").costing(10);
        let scene = scene.action("a.o", &["a.c"], 1).wasted(1);
        scene.action("prog", &["a.o"], seconds).wasted(1).plan()
    };
    let compile = adapted("a.o", &["a.c"]);
    assert_eq!(actions(&scene(100).start(&HashMap::new())), [compile]);
    let mut cheap = scene(1);
    assert_eq!(actions(&cheap.start(&HashMap::new())), []);
    assert_eq!(
        done(&mut cheap, compile, "a.o"),
        [],
        "the client has executed it"
    );
    assert!(cheap.awaits(&key(adapted("prog", &["a.o"]))));
}

#[test]
fn what_is_retired_is_executed_only_for_what_has_never_been_wasted() {
    let scene = |wasted| {
        let scene = Scene::default().source("a.c", "new");
        let scene = scene.action("a.o", &["a.c"], 1).wasted(RETIRES);
        scene.action("prog", &["a.o"], 100).wasted(wasted).plan()
    };
    let compile = adapted("a.o", &["a.c"]);
    assert_eq!(actions(&scene(0).start(&HashMap::new())), [compile]);
    assert_eq!(actions(&scene(1).start(&HashMap::new())), []);
}

/// What was said of the action that writes `output`, last of all.
fn outlook(verdicts: &[Verdict], output: &str) -> Outlook {
    let mut of_it = verdicts
        .iter()
        .rev()
        .filter(|verdict| verdict.base.outputs[0].0 == output);
    of_it.next().unwrap().outlook.clone()
}

#[test]
fn a_plan_tells_what_has_changed_by_what_and_after_what() {
    let mut plan = chain().plan();
    let first = adapted("a.i", &["a.c"]);
    plan.start(&HashMap::new());
    let verdicts = plan.take_verdicts();
    let Outlook::Adapted(told) = outlook(&verdicts, "a.i") else {
        panic!("{verdicts:?}");
    };
    assert_eq!(told.key, key(first));
    let change = told.changes[0].as_ref();
    assert_eq!((change.path.as_str(), change.by), ("a.c", By::Source));
    assert_eq!(change.from, Some(digest("old a.c")));
    assert_eq!(change.to, Some(digest("new a.c")));
    assert_eq!(change.origin, "/p/a.c");
    assert!(matches!(outlook(&verdicts, "a.o"), Outlook::Waits(after) if after == [first]));

    done(&mut plan, first, "a.i");
    let verdicts = plan.take_verdicts();
    let Outlook::Adapted(told) = outlook(&verdicts, "a.o") else {
        panic!("{verdicts:?}");
    };
    assert_eq!(told.after, [first]);
    assert_eq!(told.changes[0].by, By::Action);
    assert!(plan.take_verdicts().is_empty());

    let mut plan = chain().plan();
    let first = actions(&plan.start(&HashMap::new()))[0];
    plan.complete(&key(first), Some(Outputs::new()), &HashMap::new());
    let verdicts = plan.take_verdicts();
    assert!(
        matches!(outlook(&verdicts, "a.o"), Outlook::Unadaptable(_, why) if why.contains("a.i"))
    );
}

#[test]
fn nothing_is_ready_when_nothing_changed() {
    let unchanged = Scene::default()
        .source("a.c", "old")
        .action("a.o", &["a.c"], 1)
        .action("prog", &["a.o"], 1);
    assert_eq!(actions(&unchanged.plan().start(&HashMap::new())), []);
}

#[test]
fn an_output_equal_to_the_old_one_ends_the_chain() {
    let mut plan = chain().plan();
    let first = actions(&plan.start(&HashMap::new()))[0];
    let as_before = vec![("a.i".to_owned(), digest("old a.i"))];
    let ready = plan.complete(&key(first), Some(as_before), &HashMap::new());
    assert_eq!(actions(&ready), []);
    assert_eq!(plan.awaited().count(), 0);
}

#[test]
fn what_depends_on_a_failure_is_never_ready() {
    let mut plan = chain().plan();
    let first = actions(&plan.start(&HashMap::new()))[0];
    assert_eq!(
        actions(&plan.complete(&key(first), None, &HashMap::new())),
        []
    );
    assert_eq!(plan.awaited().count(), 0);
}

#[test]
fn an_output_that_is_there_no_more_makes_its_reader_unadaptable() {
    let mut plan = chain().plan();
    let first = actions(&plan.start(&HashMap::new()))[0];
    let ready = plan.complete(&key(first), Some(Outputs::new()), &HashMap::new());
    assert_eq!(actions(&ready), []);
    let reasons = plan.take_unadaptable();
    assert!(
        matches!(reasons.as_slice(), [(_, Unadaptable::Vanished(path))] if path.ends_with("a.i")),
        "{reasons:?}"
    );
}

#[test]
fn the_tip_of_a_diamond_waits_for_both_sides() {
    let mut plan = Scene::default()
        .source("s", "new")
        .action("top", &["s"], 1)
        .action("left", &["top"], 1)
        .action("right", &["top"], 1)
        .action("tip", &["left", "right"], 1)
        .plan();
    let top = actions(&plan.start(&HashMap::new()));
    assert_eq!(top, [adapted("top", &["s"])]);
    let sides = done(&mut plan, top[0], "top");
    assert_eq!(
        sides,
        [adapted("left", &["top"]), adapted("right", &["top"])]
    );
    assert_eq!(done(&mut plan, sides[1], "right"), []);
    let tip = done(&mut plan, sides[0], "left");
    assert_eq!(tip, [adapted("tip", &["left", "right"])]);
}

#[test]
fn actions_that_wait_for_each_other_wait_for_ever_and_harm_no_others() {
    let mut plan = Scene::default()
        .source("s", "new")
        .action("a", &["b", "s"], 1)
        .action("b", &["a", "s"], 1)
        .action("self", &["self", "s"], 1)
        .action("c", &["s"], 1)
        .plan();
    let ready = actions(&plan.start(&HashMap::new()));
    assert!(ready.contains(&adapted("c", &["s"])));
    assert_eq!(ready.len(), 2, "and the one that reads its own output");
    assert_eq!(done(&mut plan, adapted("c", &["s"]), "c"), []);
}

#[test]
fn an_action_that_rewrites_its_input_is_waited_for_by_others_and_not_by_itself() {
    let both = ["s", "x"];
    let rewriter = Scene::default()
        .source("s", "new")
        .action("x", &both, 1)
        .action("y", &both, 1);
    let reader_first = Scene::default()
        .source("s", "new")
        .action("y", &both, 1)
        .action("x", &both, 1);
    for scene in [rewriter, reader_first] {
        let mut plan = scene.plan();
        // Its own output is for it what it was.
        let age = |name: &str| if name == "s" { "new" } else { "old" };
        let (input_root, _) = Digest::of_message(&root(&both, age));
        let first = Digest::of(&encoded("x", input_root));
        assert_eq!(actions(&plan.start(&HashMap::new())), [first]);
        assert_eq!(done(&mut plan, first, "x"), [adapted("y", &both)]);
    }
}

#[test]
fn among_those_that_take_nearly_as_long_the_order_of_the_build_counts() {
    let mut scene = Scene::default().source("s", "new");
    for (name, seconds) in [("a", 80), ("b", 50), ("c", 100), ("d", 60), ("e", 90)] {
        scene = scene.action(name, &["s"], seconds);
    }
    let mut plan = scene.plan();
    let ready = actions(&plan.start(&HashMap::new()));
    let wanted = ["a", "c", "e", "b", "d"];
    assert_eq!(ready, wanted.map(|name| adapted(name, &["s"])));
}

#[test]
fn what_has_the_longest_time_below_it_comes_first() {
    let mut plan = Scene::default()
        .source("s", "new")
        .action("short", &["s"], 5)
        .action("long", &["s"], 1)
        .action("same", &["s"], 5)
        .action("after", &["long"], 9)
        .plan();
    let ready = actions(&plan.start(&HashMap::new()));
    assert_eq!(
        ready,
        [
            adapted("long", &["s"]),
            adapted("short", &["s"]),
            adapted("same", &["s"])
        ],
        "then as recorded"
    );
}

/// An element `app` whose one action reads nothing and runs in a sandbox, which has a header of
/// the element `dep`, and something else.
struct Sandboxed {
    trees: Trees,
    app: Parent,
    dep: Parent,
    command: Bytes,
    known: Known,
}

impl Sandboxed {
    fn new() -> Self {
        let mut trees = Trees::new();
        let root = sandbox(&mut trees, "old header");
        let command = text_command(root);
        let dep = element("dep", sources(&mut trees, "old header"), Vec::new());
        let texts = vec![root.to_string()];
        let mut app = element("app", sources(&mut trees, "app"), texts.clone());
        app.text_roots = vec![root];
        app.overlays.add(
            digest("old header"),
            Origin::Tree {
                parent: Some(dep.identity.weak_key()),
                path: "dep.h".to_owned(),
            },
        );
        let (empty, encoded) = Digest::of_message(&reapi::Directory::default());
        trees.insert(
            empty,
            Arc::new(Directory::parse(encoded, DigestFunction::Sha256).unwrap()),
        );
        let (digest, encoded) = text_action(root);
        let base = BaseAction {
            digest,
            encoded,
            texts,
            ..fixture::base("compile", empty)
        };
        let action_key = base.parts().unwrap().action_key;
        let key = SubactionKey {
            action_key,
            mount: None,
        };
        app.actions.insert(key, Arc::new(base));
        Sandboxed {
            trees,
            app,
            dep,
            command,
            known: Known::default(),
        }
    }

    fn asked(mut self, parent: WeakKey, input_root: Digest, texts: Vec<String>) -> Self {
        let current = CurrentParent {
            input_root,
            texts: texts.into(),
            outputs: None,
        };
        self.known.parents.insert(parent, current);
        self
    }

    /// `dep` is asked for with this header.
    fn dep(mut self, header: &str) -> Self {
        let root = sources(&mut self.trees, header);
        let key = self.dep.identity.weak_key();
        self.asked(key, root, Vec::new())
    }

    fn start(self) -> (Plan, Vec<Ready>) {
        let planned = [self.app, self.dep].map(|parent| PlannedParent {
            parent: Arc::new(parent),
            share: Share::Whole,
        });
        let mut plan = Plan::new(Subject {
            parents: planned.into(),
            trees: self.trees,
            commands: HashMap::from([(Digest::of(&self.command), self.command)]),
            known: self.known,
            ..Subject::default()
        });
        let ready = plan.start(&HashMap::new());
        (plan, ready)
    }
}

fn element(name: &str, input_root: Digest, texts: Vec<String>) -> Parent {
    let mut parent = Parent::new(ParentIdentity {
        instance: "".into(),
        digest_function: DigestFunction::Sha256,
        uid: None,
        kind: ParentKind::Action(ActionParent {
            instance: "".into(),
            key: digest(name),
            name: name.to_owned(),
        }),
    });
    parent.executed = Some(Arc::new(ExecutedParent {
        action: digest(name),
        input_root,
        texts,
        outputs: Vec::new(),
    }));
    parent
}

fn keep(trees: &mut Trees, message: &reapi::Directory) -> Digest {
    let (digest, encoded) = Digest::of_message(message);
    trees.insert(
        digest,
        Arc::new(Directory::parse(encoded, DigestFunction::Sha256).unwrap()),
    );
    digest
}

fn file(name: &str, content: &str) -> reapi::FileNode {
    reapi::FileNode {
        name: name.to_owned(),
        digest: Some(digest(content).to_proto()),
        ..reapi::FileNode::default()
    }
}

/// The tree of `dep`: its header.
fn sources(trees: &mut Trees, header: &str) -> Digest {
    let message = reapi::Directory {
        files: vec![file("dep.h", header)],
        ..reapi::Directory::default()
    };
    keep(trees, &message)
}

/// The header in one directory, and something in another.
fn sandbox(trees: &mut Trees, header: &str) -> Digest {
    let system = reapi::Directory {
        files: vec![file("gcc", "gcc")],
        ..reapi::Directory::default()
    };
    let below = [
        ("bin", keep(trees, &system)),
        ("include", sources(trees, header)),
    ];
    let below = below.map(|(name, digest)| reapi::DirectoryNode {
        name: name.to_owned(),
        digest: Some(digest.to_proto()),
    });
    let root = reapi::Directory {
        directories: below.into(),
        ..reapi::Directory::default()
    };
    keep(trees, &root)
}

fn text_command(root: Digest) -> Bytes {
    let variable = reapi::command::EnvironmentVariable {
        name: "ROOT".to_owned(),
        value: root.to_string(),
    };
    let command = reapi::Command {
        environment_variables: vec![variable],
        ..reapi::Command::default()
    };
    command.encode_to_vec().into()
}

fn text_action(root: Digest) -> (Digest, Bytes) {
    let property = reapi::platform::Property {
        name: "root".to_owned(),
        value: root.to_string(),
    };
    Digest::of_message(&reapi::Action {
        command_digest: Some(Digest::of(&text_command(root)).to_proto()),
        input_root_digest: Some(Digest::of(b"").to_proto()),
        platform: Some(reapi::Platform {
            properties: vec![property],
        }),
        ..reapi::Action::default()
    })
}

#[test]
fn what_a_text_will_be_is_told_by_the_tree_that_it_names() {
    let (_, ready) = Sandboxed::new().dep("new header").start();
    let mut trees = Trees::new();
    let root = sandbox(&mut trees, "new header");
    assert_eq!(actions(&ready), [text_action(root).0]);
    let (mut known, mut needed) = (HashSet::new(), HashMap::new());
    ready[0].adapted.collect_blobs(&mut known, &mut needed);
    let include = sources(&mut trees, "new header");
    for new in [
        root,
        include,
        Digest::of(&text_command(root)),
        text_action(root).0,
    ] {
        assert!(needed.remove(&new).is_some(), "{new} is to be uploaded");
    }
    assert!(needed.is_empty(), "the rest is there: {needed:?}");
}

#[test]
fn a_text_whose_tree_is_as_it_was_stays() {
    let (plan, ready) = Sandboxed::new().dep("old header").start();
    assert_eq!(actions(&ready), []);
    assert_eq!(plan.unchanged().count(), 1);
}

#[test]
fn what_the_own_parent_names_counts_more_than_what_was_foreseen() {
    let scene = Sandboxed::new().dep("new header");
    let key = scene.app.identity.weak_key();
    let executed = scene.app.executed.clone().unwrap();
    let named = digest("a root that nobody could foresee");
    let (_, ready) = scene
        .asked(key, executed.input_root, vec![named.to_string()])
        .start();
    assert_eq!(actions(&ready), [text_action(named).0]);
}

#[test]
fn a_text_that_cannot_be_foreseen_is_waited_for() {
    let mut unread = Sandboxed::new().dep("new header");
    let root = unread.app.text_roots[0];
    unread.trees.remove(&root);
    let mut vanished = Sandboxed::new();
    let key = vanished.dep.identity.weak_key();
    let nothing = keep(&mut vanished.trees, &reapi::Directory::default());
    let vanished = vanished.asked(key, nothing, Vec::new());
    let mut awaited = Sandboxed::new();
    let made = Origin::Artifact {
        parent: awaited.dep.identity.weak_key(),
        path: "dep.h".to_owned(),
    };
    awaited.app.overlays = OverlayTable::default();
    awaited.app.overlays.add(digest("old header"), made);
    for scene in [unread, vanished, awaited.dep("new header")] {
        let (mut plan, ready) = scene.start();
        assert_eq!(actions(&ready), []);
        assert_eq!(plan.take_unadaptable(), [], "another plan will know more");
    }
}

#[test]
fn results_of_an_earlier_plan_are_carried_over() {
    let mut plan = chain().plan();
    let results = HashMap::from([
        (
            key(adapted("a.i", &["a.c"])),
            vec![("a.i".to_owned(), digest("new a.i"))],
        ),
        (
            key(adapted("a.o", &["a.i"])),
            vec![("a.o".to_owned(), digest("new a.o"))],
        ),
    ]);
    assert_eq!(actions(&plan.start(&results)), [adapted("prog", &["a.o"])]);
}
