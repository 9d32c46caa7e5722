//! `--otlp-endpoint`: sends what primed traces to an OpenTelemetry collector. Built with the feature
//! `otlp` only.
//!
//! All of it happens on threads of its own, in batches, and what the collector does not take is
//! dropped: neither a slow nor an absent one is noticed by anybody but the log.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, SpanData, SpanExporter as Export};
use tonic::transport::ClientTlsConfig;
use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::registry::LookupSpan;

use super::{Command, Failure, exit_codes};

/// How long what is left may take to be sent when primed stops.
const FLUSH: Duration = Duration::from_secs(2);

/// Where traces go.
#[derive(Debug, Args)]
pub struct TraceArguments {
    /// OpenTelemetry collector that traces are sent to by gRPC: http://HOST:PORT, or
    /// https://HOST:PORT [default: $OTEL_EXPORTER_OTLP_ENDPOINT, else nowhere].
    #[arg(long, env = "PRIMED_OTLP_ENDPOINT", value_name = "URL")]
    otlp_endpoint: Option<String>,
}

/// Sends traces until it is dropped, which sends the rest.
pub struct Traces {
    provider: SdkTracerProvider,
    /// Ends the runtime that connections live on when it is dropped.
    _connections: tokio::sync::oneshot::Sender<()>,
}

impl TraceArguments {
    /// Begins to send, if there is somewhere to send to.
    ///
    /// # Errors
    /// When that is no usable address, or the system refuses a thread.
    pub(super) fn start(&self) -> Result<Option<Traces>, Failure> {
        let standard = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let endpoint = self.otlp_endpoint.clone();
        let endpoint = endpoint
            .or_else(|| standard("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))
            .or_else(|| standard("OTEL_EXPORTER_OTLP_ENDPOINT"));
        let Some(endpoint) = endpoint else {
            return Ok(None);
        };
        let refused = |error: String| {
            let message = format!("--otlp-endpoint '{endpoint}': {error}; give http://HOST:PORT");
            Failure::new(exit_codes::USAGE, message)
        };
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            return Err(refused("it is no URL of a collector".to_owned()));
        }
        let system = |error| Failure::new(exit_codes::FAILURE, error);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(system)?;
        let exporter = {
            let _context = runtime.enter();
            let exporter = SpanExporter::builder().with_tonic();
            let exporter = match endpoint.starts_with("https://") {
                true => exporter.with_tls_config(ClientTlsConfig::new().with_enabled_roots()),
                false => exporter,
            };
            exporter.with_endpoint(&endpoint).build()
        };
        let exporter = exporter.map_err(|error| refused(error.to_string()))?;
        let (connections, ended) = tokio::sync::oneshot::channel::<()>();
        std::thread::Builder::new()
            .name("traces".to_owned())
            .spawn(move || {
                // Nothing is ever sent; it ends when the other end is dropped.
                let _ = runtime.block_on(ended);
            })
            .map_err(system)?;
        let resource = Resource::builder()
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
        let resource = match standard("OTEL_SERVICE_NAME") {
            Some(_) => resource,
            None => resource.with_service_name(env!("CARGO_PKG_NAME")),
        };
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(Complaining {
                exporter,
                complained: AtomicBool::new(false),
            })
            .with_resource(resource.build())
            .build();
        Ok(Some(Traces {
            provider,
            _connections: connections,
        }))
    }
}

impl Traces {
    /// Begins to send what `command` traces: only the daemon does.
    pub(super) fn start(command: &Command) -> Result<Option<Self>, Failure> {
        match command {
            Command::Serve(arguments) => arguments.traces.start(),
            _ => Ok(None),
        }
    }

    /// Takes primed's own spans, whatever is logged.
    pub(super) fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let own = Targets::new().with_target(env!("CARGO_PKG_NAME"), LevelFilter::DEBUG);
        let layer: OpenTelemetryLayer<S, SdkTracer> =
            tracing_opentelemetry::layer().with_tracer(self.provider.tracer("primed"));
        layer
            .with_location(false)
            .with_threads(false)
            .with_filter(own)
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH) {
            tracing::debug!(%error, "the last traces were not sent");
        }
    }
}

/// Says once when the collector takes nothing, and when it does again.
#[derive(Debug)]
struct Complaining {
    exporter: SpanExporter,
    complained: AtomicBool,
}

impl Export for Complaining {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let exported = self.exporter.export(batch).await;
        let failed = exported.is_err();
        let known = self.complained.swap(failed, Ordering::Relaxed);
        match &exported {
            Err(error) if !known => {
                tracing::warn!(spans, %error, "the collector takes no traces; they are dropped");
            }
            Ok(()) if known => tracing::info!("the collector takes traces again"),
            _ => {}
        }
        exported
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
