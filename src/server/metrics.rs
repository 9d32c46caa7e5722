//! `--metrics`: what primed has counted and what there is now, as OpenMetrics text. The names are
//! documented in docs/metrics.md and stay as they are.

pub mod process;

use std::fmt;
use std::time::Duration;

use http::{Method, Request, StatusCode};
use hyper::body::Incoming as Body;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text as open_metrics};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::{Registry, Unit};

use super::listen::Listener;
use super::pages::{self, Lifetime, Page, of_type, text};
use crate::backend::embedded::Usage;
use crate::backend::health::UpstreamState;
use crate::meters::{Distribution, METERS};
use crate::speculation::engine::Status;
use crate::speculation::flights::FlightCounts;
use crate::task;
use process::Process;

/// Where the page is.
pub const METRICS_PATH: &str = "/metrics";

/// OpenMetrics 1.0, section "Content Type".
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// How long a scraper may take to ask and to read: ten seconds is what Prometheus allows itself.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves what `read` returns until the task is dropped.
pub async fn serve<R>(listener: Listener, read: impl Fn() -> R + Clone + Send + Sync + 'static)
where
    R: Future<Output = Now> + Send,
{
    let answer = move |request: Request<Body>, _| {
        let read = read.clone();
        async move {
            match (request.method(), request.uri().path()) {
                (&Method::GET | &Method::HEAD, METRICS_PATH) => read().await.page(),
                (_, METRICS_PATH) => {
                    text(StatusCode::METHOD_NOT_ALLOWED, "metrics are read by GET\n")
                }
                _ => text(StatusCode::NOT_FOUND, "there is /metrics\n"),
            }
        }
    };
    pages::serve(listener, Lifetime::OneAnswer(PATIENCE), answer).await;
}

/// What is there, beside what `METERS` has counted.
#[derive(Debug)]
pub struct Now {
    /// Absent without an engine, and where it does not answer in time.
    pub engine: Option<Status>,
    /// What was in flight, and is.
    pub flights: FlightCounts,
    /// How much may be.
    pub slots: usize,
    /// Whether `--upstream` can be reached.
    pub upstream: UpstreamState,
    /// How many connections to it there are.
    pub upstream_connections: usize,
    /// What the embedded backend holds and runs, if there is one.
    pub embedded: Option<Usage>,
    /// How large the store is, if that can be seen.
    pub store_bytes: Option<u64>,
    /// What the system says of this process, if it can be asked.
    pub process: Option<Process>,
}

impl Collector for Now {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut to = Families(encoder);
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        to.info("primed_build", "The primed that answers", &version)?;
        self.forwarding(&mut to)?;
        builds(&mut to)?;
        self.speculation(&mut to)?;
        self.records(&mut to)?;
        if let Some(embedded) = &self.embedded {
            of_embedded(&mut to, embedded)?;
        }
        match &self.process {
            Some(process) => process.encode(&mut to),
            None => Ok(()),
        }
    }
}

impl Now {
    /// The page itself.
    pub fn page(self) -> Page {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut page = String::new();
        match open_metrics::encode(&mut page, &registry) {
            Ok(()) => of_type(CONTENT_TYPE, page),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    }

    fn forwarding(&self, to: &mut Families) -> fmt::Result {
        let calls = METERS.calls.get();
        let ended = calls.iter().flat_map(|calls| {
            let labels = |status| {
                [
                    ("service", calls.service),
                    ("method", calls.method),
                    ("status", status),
                ]
            };
            calls
                .ended
                .iter()
                .map(move |(status, count)| (labels(*status), *count))
        });
        to.counters("primed_calls", "Calls of clients that are over", ended)?;
        let open = calls.iter().map(|calls| {
            let labels = [("service", calls.service), ("method", calls.method)];
            (labels, calls.in_flight)
        });
        to.gauges(
            "primed_calls_in_flight",
            "Calls of clients that are not over",
            open,
        )?;
        let clients = &METERS.clients;
        to.counter(
            "primed_client_connections_opened",
            "Connections of clients since the start",
            clients.begun(),
        )?;
        to.gauge(
            "primed_client_connections",
            "Connections of clients",
            clients.present(),
        )?;
        let states = [
            ("idle", UpstreamState::Idle),
            ("connected", UpstreamState::Connected),
            ("unavailable", UpstreamState::Unavailable),
        ];
        let states =
            states.map(|(name, state)| ([("state", name)], u64::from(state == self.upstream)));
        to.gauges(
            "primed_upstream_state",
            "1 for the state that --upstream is in",
            states,
        )?;
        let connections = self.upstream_connections as u64;
        to.gauge(
            "primed_upstream_connections",
            "Connections to --upstream",
            connections,
        )
    }

    fn speculation(&self, to: &mut Families) -> fmt::Result {
        let meters = &METERS;
        let outcomes = [
            ("primed", &meters.primed),
            ("cached", &meters.found),
            ("failed", &meters.failed),
            ("abandoned", &meters.abandoned),
        ];
        let outcomes = outcomes.map(|(outcome, count)| ([("outcome", outcome)], count.get()));
        to.counters(
            "primed_speculative_actions",
            "Adapted actions that are over, by what came of them",
            outcomes,
        )?;
        to.counter(
            "primed_speculative_used",
            "Primed results that a client has had",
            meters.used.get(),
        )?;
        to.time(
            "primed_speculative_used",
            "Execution time of primed results that a client has had",
            meters.used_time.seconds(),
        )?;
        to.histogram(
            "primed_speculative_execution",
            "Execution time of adapted actions",
            &meters.execution.get(),
        )?;
        let flights = self.flights;
        to.gauge(
            "primed_speculative_queued",
            "Adapted actions that wait for their turn",
            flights.queued,
        )?;
        to.gauge(
            "primed_speculative_running",
            "Adapted actions that are with the backend",
            flights.running,
        )?;
        to.gauge(
            "primed_speculative_slots",
            "How many of them may be with the backend",
            self.slots as u64,
        )?;
        to.gauge(
            "primed_speculative_width",
            "How many of them may be, as the backend is now, while clients execute nothing",
            flights.width,
        )?;
        to.counter(
            "primed_speculative_cancelled",
            "Adapted actions that were cancelled while they ran",
            flights.cancelled,
        )?;
        to.counter(
            "primed_speculative_gave_way",
            "Adapted actions that were stopped for clients' own executions, to start again later",
            flights.gave_way,
        )?;
        let left_out = [
            ("retired", flights.retired),
            ("cheap", flights.cheap),
            ("over_budget", flights.over_budget),
        ];
        to.counters(
            "primed_left_out",
            "Adapted actions that were not executed ahead of time",
            left_out.map(|(reason, count)| ([("reason", reason)], count)),
        )?;
        to.gauge(
            "primed_client_executions",
            "Actions that clients execute themselves",
            flights.clients,
        )?;
        to.bytes_counter(
            "primed_adaptation_added",
            "Bytes that adaptation added to the CAS",
            meters.added_bytes.get(),
        )?;
        to.histogram(
            "primed_submission",
            "From a trigger until all that it made ready was submitted",
            &meters.submission.get(),
        )?;
        let reasons = |of: Vec<(&'static str, u64)>| {
            of.into_iter()
                .map(|(reason, count)| ([("reason", reason)], count))
        };
        to.counters(
            "primed_unadaptable",
            "Recorded actions that could not be adapted",
            reasons(meters.unadaptable.get()),
        )?;
        to.counters(
            "primed_unresolved",
            "Predictions of ended builds that waited for something until the end",
            reasons(meters.unresolved.get()),
        )?;
        to.counters(
            "primed_unused",
            "Primed results of ended builds that nobody has used",
            reasons(meters.unused.get()),
        )
    }

    fn records(&self, to: &mut Families) -> fmt::Result {
        to.histogram(
            "primed_generation",
            "Recording and generation after a build",
            &METERS.generation.get(),
        )?;
        to.bytes_counter(
            "primed_recorded_input",
            "Bytes of the inputs of recorded builds, each digest of a build once",
            METERS.input_bytes.get(),
        )?;
        to.counter(
            "primed_observations_dropped",
            "Calls that the engine did not see because it fell behind",
            METERS.dropped.get(),
        )?;
        to.counter("primed_task_panics", "Tasks that panicked", task::panics())?;
        if let Some(bytes) = self.store_bytes {
            to.bytes("primed_store", "The size of the records on disk", bytes)?;
        }
        let Some(engine) = &self.engine else {
            return Ok(());
        };
        to.gauge("primed_builds_open", "Builds that run", engine.open_builds)?;
        to.gauge(
            "primed_recorded_actions",
            "Actions that are recorded",
            engine.records.actions,
        )?;
        to.gauge(
            "primed_recorded_parents",
            "Parents that are recorded",
            engine.records.parents,
        )?;
        to.gauge(
            "primed_observations_queued",
            "Calls that the engine has yet to look at",
            engine.queued_observations,
        )?;
        to.gauge(
            "primed_recorder_queued",
            "Builds and journals that the recorder has yet to look at",
            engine.queued_recordings,
        )?;
        to.gauge(
            "primed_journals",
            "Journals of builds that are kept",
            engine.journals,
        )?;
        to.bytes(
            "primed_journals",
            "The size of the journals that are kept",
            engine.journal_bytes,
        )
    }
}

fn builds(to: &mut Families) -> fmt::Result {
    let meters = &METERS;
    to.counter(
        "primed_builds",
        "Builds that have ended",
        meters.builds.get(),
    )?;
    to.counter(
        "primed_asked",
        "Distinct actions of builds that clients asked for",
        meters.asked.get(),
    )?;
    let answers = [
        ("cached", &meters.cached),
        ("hit", &meters.hit),
        ("joined", &meters.joined),
        ("missed", &meters.missed),
    ];
    let answers = answers.map(|(answer, count)| ([("answer", answer)], count.get()));
    to.counters("primed_answers", "How these were answered", answers)?;
    to.time(
        "primed_saved",
        "Execution time that clients were spared",
        meters.saved.seconds(),
    )?;
    to.histogram(
        "primed_lead",
        "How long primed results had been there before their first use",
        &meters.lead.get(),
    )
}

fn of_embedded(to: &mut Families, usage: &Usage) -> fmt::Result {
    to.gauge(
        "primed_embedded_running",
        "Actions that the embedded backend runs",
        usage.executing.running as u64,
    )?;
    to.gauge(
        "primed_embedded_queued",
        "Actions that wait for the embedded backend",
        usage.executing.queued as u64,
    )?;
    to.bytes(
        "primed_embedded_cache",
        "What the embedded backend keeps",
        usage.cache_bytes,
    )?;
    to.bytes(
        "primed_embedded_cache_limit",
        "What it may keep",
        usage.cache_limit,
    )
}

/// Writes families of metrics.
struct Families<'a>(DescriptorEncoder<'a>);

const NO_EXEMPLAR: Option<&Exemplar<NoLabelSet, f64>> = None;

impl Families<'_> {
    fn info(&mut self, name: &str, help: &str, labels: &[(&str, &str); 1]) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Info)?;
        family.encode_info(labels)
    }

    fn counter(&mut self, name: &str, help: &str, count: u64) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        family.encode_counter(&count, NO_EXEMPLAR)
    }

    fn counters<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        counts: impl IntoIterator<Item = ([(&'l str, &'l str); N], u64)>,
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, count) in counts {
            family
                .encode_family(&labels)?
                .encode_counter(&count, NO_EXEMPLAR)?;
        }
        Ok(())
    }

    /// Seconds that add up.
    fn time(&mut self, name: &str, help: &str, seconds: f64) -> fmt::Result {
        let unit = Some(&Unit::Seconds);
        let mut family = self
            .0
            .encode_descriptor(name, help, unit, MetricType::Counter)?;
        family.encode_counter(&seconds, NO_EXEMPLAR)
    }

    /// Bytes that add up.
    fn bytes_counter(&mut self, name: &str, help: &str, bytes: u64) -> fmt::Result {
        let unit = Some(&Unit::Bytes);
        let mut family = self
            .0
            .encode_descriptor(name, help, unit, MetricType::Counter)?;
        family.encode_counter(&bytes, NO_EXEMPLAR)
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        family.encode_gauge(&value)
    }

    fn gauges<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = ([(&'l str, &'l str); N], u64)>,
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in values {
            family.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    fn bytes(&mut self, name: &str, help: &str, bytes: u64) -> fmt::Result {
        let unit = Some(&Unit::Bytes);
        let mut family = self
            .0
            .encode_descriptor(name, help, unit, MetricType::Gauge)?;
        family.encode_gauge(&bytes)
    }

    /// A moment, in seconds since 1970.
    fn moment(&mut self, name: &str, help: &str, seconds: f64) -> fmt::Result {
        let unit = Some(&Unit::Seconds);
        let mut family = self
            .0
            .encode_descriptor(name, help, unit, MetricType::Gauge)?;
        family.encode_gauge(&seconds)
    }

    /// How many times took how many seconds.
    fn histogram(&mut self, name: &str, help: &str, of: &Distribution) -> fmt::Result {
        let unit = Some(&Unit::Seconds);
        let mut family = self
            .0
            .encode_descriptor(name, help, unit, MetricType::Histogram)?;
        family.encode_histogram::<NoLabelSet>(of.sum, of.count, &of.buckets, None)
    }
}
