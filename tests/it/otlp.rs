//! `--otlp-endpoint`, in a primed that is built with the feature `otlp`: what a collector receives of
//! real builds, and that one which is absent, or takes nothing, is no burden.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::Arc;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::Span;
use parking_lot::Mutex;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, async_trait};

use crate::project::{Project, UNITS};
use crate::support::{Casd, Primed, scratch, wait_until};

/// All that a collector has received.
#[derive(Clone, Default)]
struct Received {
    spans: Arc<Mutex<Vec<Span>>>,
    resources: Arc<Mutex<Vec<Resource>>>,
}

#[async_trait]
impl TraceService for Received {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource_spans in request.into_inner().resource_spans {
            self.resources.lock().extend(resource_spans.resource);
            let spans = resource_spans.scope_spans.into_iter();
            self.spans
                .lock()
                .extend(spans.flat_map(|scope| scope.spans));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Received {
    fn named(&self, name: &str) -> Vec<Span> {
        let spans = self.spans.lock();
        spans
            .iter()
            .filter(|span| span.name == name)
            .cloned()
            .collect()
    }
}

/// A collector that runs until the test ends.
struct Collector {
    received: Received,
    address: String,
    _runtime: tokio::runtime::Runtime,
}

impl Collector {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let received = Received::default();
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let service = TraceServiceServer::new(received.clone());
        let serving = Server::builder().add_service(service);
        #[allow(clippy::disallowed_methods, reason = "it ends with the runtime")]
        runtime.spawn(serving.serve_with_incoming(TcpListenerStream::new(listener)));
        Collector {
            received,
            address,
            _runtime: runtime,
        }
    }
}

/// What a span says of itself.
fn fields(span: &Span) -> BTreeMap<&str, String> {
    let fields = span.attributes.iter().map(|field| {
        let value = match field.value.clone().unwrap().value.unwrap() {
            Value::StringValue(text) => text,
            Value::IntValue(number) => number.to_string(),
            other => format!("{other:?}"),
        };
        (field.key.as_str(), value)
    });
    fields.collect()
}

#[test]
fn a_collector_receives_the_spans_of_real_builds_the_last_ones_when_primed_stops() {
    let directory = scratch();
    let collector = Collector::start();
    let casd = Casd::start(directory.path(), 4);
    let arguments = ["--otlp-endpoint", collector.address.as_str()];
    let mut primed = Primed::start_with(directory.path(), &casd.address(), &arguments);
    let project = Project::create(directory.path(), &primed.address());
    project.build();
    primed.wait();
    project.write("include/common.h", "#define COMMON 2\n");
    project.build();
    primed.wait();
    let status = primed.status();
    primed.daemon.signal(rustix::process::Signal::TERM);
    assert_eq!(
        primed.daemon.exit_code(),
        Some(0),
        "{}",
        primed.daemon.log()
    );

    let received = &collector.received;
    let builds = received.named("build");
    assert_eq!(builds.len(), 2);
    let latest = builds
        .iter()
        .max_by_key(|span| span.start_time_unix_nano)
        .unwrap();
    let latest = fields(latest);
    assert_eq!(latest["id"], status["builds"][0]["id"].as_str().unwrap());
    for name in ["asked", "cached", "hit", "joined", "missed"] {
        assert_eq!(
            latest[name],
            status["builds"][0][name].to_string(),
            "{name}"
        );
    }
    assert_eq!(received.named("record").len(), 2);
    assert_eq!(received.named("generation").len(), 2);
    let plans = received.named("plan");
    assert!(
        plans
            .iter()
            .any(|span| fields(span)["trigger"] == "Workspace")
    );
    let actions = received.named("speculative action");
    let primed_actions = actions
        .iter()
        .filter(|span| fields(span)["outcome"] == "Primed");
    assert!(primed_actions.count() >= UNITS);
    let executions = received.named("execution");
    assert!(executions.iter().all(|execution| {
        let whole = actions
            .iter()
            .find(|span| span.span_id == execution.parent_span_id);
        whole.is_some_and(|whole| whole.trace_id == execution.trace_id)
    }));
    let planned = actions
        .iter()
        .filter(|span| plans.iter().any(|plan| plan.span_id == span.parent_span_id));
    assert!(
        planned.count() >= UNITS,
        "compiles are made ready by a plan"
    );
    let resources = received.resources.lock();
    let service = resources[0]
        .attributes
        .iter()
        .find(|field| field.key == "service.name");
    let name = service.unwrap().value.clone().unwrap().value.unwrap();
    assert_eq!(name, Value::StringValue("primed".to_owned()));
}

#[test]
fn builds_and_shutdown_are_as_usual_when_no_collector_is_there_or_it_is_silent() {
    // Accepts connections, and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    let absent = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    for (address, is_refused) in [(silent, false), (format!("http://{absent}"), true)] {
        let directory = scratch();
        let casd = Casd::start(directory.path(), 4);
        let arguments = ["--otlp-endpoint", address.as_str()];
        let mut primed = Primed::start_with(directory.path(), &casd.address(), &arguments);
        let project = Project::of_units(directory.path(), &primed.address(), 6);
        project.build();
        primed.wait();
        if is_refused {
            wait_until("primed says once that nobody takes traces", || {
                primed
                    .daemon
                    .log()
                    .contains("the collector takes no traces")
            });
        }
        primed.daemon.signal(rustix::process::Signal::TERM);
        assert_eq!(
            primed.daemon.exit_code(),
            Some(0),
            "{}",
            primed.daemon.log()
        );
    }
}

#[test]
fn an_endpoint_that_is_no_url_is_refused_and_the_standard_variable_names_one() {
    let serve = ["serve", "--upstream", "unix:/nowhere"];
    let directory = scratch();
    let command = || {
        let mut command = Primed::command();
        command
            .args(serve)
            .env("XDG_RUNTIME_DIR", directory.path())
            .env("XDG_STATE_HOME", directory.path());
        command
    };
    let output = command()
        .args(["--otlp-endpoint", "collector"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(64), "{output:?}");
    let output = command()
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", "nonsense")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(64), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("nonsense"), "{said}");
}
