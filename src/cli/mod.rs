//! The command line: arguments in, exit code out. Each command has a file of its own.

mod admin_client;
mod build_page;
mod builds;
mod completions;
mod config;
mod daemons;
mod doctor;
pub mod exit_codes;
mod explain;
mod export;
mod import;
mod install;
mod man;
mod records;
mod report;
mod run;
mod serve;
mod settings;
mod shown;
mod status;
mod supervise;
mod top;
#[cfg(feature = "otlp")]
mod traces;
#[cfg(not(feature = "otlp"))]
mod untraced;
mod upstream_arguments;
mod wait;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::address::Address;
use crate::config::{ConfigError, Environment};
use daemons::Daemons;
use settings::Stopped;
#[cfg(feature = "otlp")]
use traces::Traces;
#[cfg(not(feature = "otlp"))]
use untraced::Traces;

/// A transparent Remote Execution API proxy that primes the action cache.
///
/// Put it between build clients (recc, BuildStream, Bazel, …) and a backend (buildbox-casd, a
/// remote execution cluster). It forwards every call unchanged, remembers what each build
/// executed, and executes ahead of time what the next build will ask for.
#[derive(Debug, Parser)]
#[command(name = "primed", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// File with settings, or `none` [default: primed/primed.toml in $XDG_CONFIG_HOME, and below it
    /// in $XDG_CONFIG_DIRS].
    #[arg(long, global = true, env = "PRIMED_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    log: Log,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Box<serve::Arguments>),
    Run(run::Arguments),
    Status(status::Arguments),
    Builds(builds::Arguments),
    Explain(explain::Arguments),
    Doctor(doctor::Arguments),
    Wait(wait::Arguments),
    Export(export::Arguments),
    Import(import::Arguments),
    /// Runs the command of an action, for the embedded backend.
    #[command(hide = true)]
    Supervise,
    Config(config::Arguments),
    Install(install::InstallArguments),
    Uninstall(install::UninstallArguments),
    Completions(completions::Arguments),
    Man(man::Arguments),
    Report(report::Arguments),
    Top(top::Arguments),
}

#[derive(Debug, Args)]
struct Log {
    /// What is logged to stderr: error, warn, info, debug, trace, or a filter such as
    /// `primed::speculation=debug`.
    #[arg(
        long,
        global = true,
        env = "PRIMED_LOG_LEVEL",
        default_value = "info",
        value_name = "LEVEL"
    )]
    log_level: String,
    /// How it is written.
    #[arg(
        long,
        global = true,
        env = "PRIMED_LOG_FORMAT",
        default_value = "text",
        value_name = "FORMAT"
    )]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Where a running primed is asked.
#[derive(Debug, Args)]
struct AdminAddress {
    /// Admin socket of the primed to ask [default: unix:$XDG_RUNTIME_DIR/primed/admin.sock, or that
    /// of a primed that a command of yours has started].
    #[arg(long, env = "PRIMED_ADMIN", value_name = "ADDR")]
    admin: Option<Address>,
}

/// The primed that knows the builds.
#[derive(Debug, Args)]
struct Daemon {
    /// Admin socket of the primed to ask [default: that of the one that runs, else of one that is
    /// started for the answer].
    #[arg(long, env = "PRIMED_ADMIN", value_name = "ADDR")]
    admin: Option<Address>,
    /// Backend of the one that is started [default: what `primed serve` takes].
    #[arg(long, env = "PRIMED_UPSTREAM", value_name = "ADDR")]
    upstream: Option<Address>,
    /// Where it keeps its records [default: $XDG_STATE_HOME/primed].
    #[arg(long, env = "PRIMED_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

impl Daemon {
    /// Where one answers, with the settings in `file` if it has to be started.
    async fn visit(self, file: Option<&Path>) -> Result<Address, Failure> {
        let daemons = Daemons {
            environment: Environment::of_process(),
            admin: self.admin,
            upstream: self.upstream,
            state_dir: self.state_dir,
            file: file.map(Path::to_owned),
        };
        let visited = daemons.visit().await;
        visited.map_err(|reason| {
            let message = format!("no primed runs, and none was started for the answer: {reason}");
            Failure::new(exit_codes::FAILURE, message)
        })
    }
}

impl AdminAddress {
    async fn find(self) -> Result<Address, ConfigError> {
        daemons::find(self.admin, &Environment::of_process()).await
    }
}

/// What went wrong, and the exit code that says so.
#[derive(Debug)]
struct Failure {
    message: String,
    code: u8,
}

impl Failure {
    fn new(code: u8, message: impl ToString) -> Self {
        Failure {
            message: message.to_string(),
            code,
        }
    }

    fn exit(self) -> ExitCode {
        eprintln!("primed: {}", self.message);
        ExitCode::from(self.code)
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Failure::new(exit_codes::USAGE, error)
    }
}

/// Runs the command that the process's arguments name.
pub fn main() -> ExitCode {
    let environment = Environment::of_process();
    let parsed = settings::parse(&Cli::command(), std::env::args_os().collect(), &environment);
    let parsed = parsed.and_then(|matches| Ok(Cli::from_arg_matches(&matches)?));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(Stopped::Failed(failure)) => return failure.exit(),
        Err(Stopped::Said(error)) => {
            // Nothing can be done about a closed terminal.
            let _ = error.print();
            let code = if error.use_stderr() {
                exit_codes::USAGE
            } else {
                exit_codes::OK
            };
            return ExitCode::from(code);
        }
    };
    let mut code = exit_codes::OK;
    // What is left of them is sent when this returns.
    let mut traces = None;
    let logging = Traces::start(&cli.command).and_then(|started| {
        traces = started;
        start_logging(&cli.log, traces.as_ref())
    });
    let done = logging.and_then(|()| match cli.command {
        Command::Run(arguments) => run::run(arguments, cli.config).map(|ended| code = ended),
        Command::Serve(arguments) => serve::run(*arguments),
        Command::Status(arguments) => status::run(arguments),
        Command::Builds(arguments) => builds::run(arguments, cli.config.as_deref()),
        Command::Explain(arguments) => explain::run(arguments, cli.config.as_deref()),
        Command::Doctor(arguments) => doctor::run(arguments, cli.config.as_deref()),
        Command::Wait(arguments) => wait::run(arguments),
        Command::Export(arguments) => export::run(arguments),
        Command::Import(arguments) => import::run(arguments),
        Command::Supervise => supervise::run(),
        Command::Config(arguments) => config::run(arguments, cli.config.as_deref(), &environment),
        Command::Install(arguments) => install::install(&arguments, &environment),
        Command::Uninstall(arguments) => install::uninstall(&arguments, &environment),
        Command::Completions(arguments) => completions::run(arguments),
        Command::Man(arguments) => man::run(arguments),
        Command::Report(arguments) => report::run(arguments, cli.config.as_deref()),
        Command::Top(arguments) => top::run(arguments),
    });
    match done {
        Ok(()) => ExitCode::from(code),
        Err(failure) => failure.exit(),
    }
}

fn start_logging(log: &Log, traces: Option<&Traces>) -> Result<(), Failure> {
    let filter = tracing_subscriber::EnvFilter::try_new(&log.log_level).map_err(|error| {
        let message = format!("--log-level '{}' is not a filter: {error}", log.log_level);
        Failure::new(exit_codes::USAGE, message)
    })?;
    // Spans are of the level debug: where that is logged, they say at their end how long they took.
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_span_events(FmtSpan::CLOSE);
    let lines = match log.log_format {
        LogFormat::Text => lines.with_ansi(false).with_filter(filter).boxed(),
        LogFormat::Json => lines.json().with_filter(filter).boxed(),
    };
    let traces = traces.map(Traces::layer);
    tracing_subscriber::registry()
        .with(lines)
        .with(traces)
        .init();
    Ok(())
}

/// Runs a future to its end on this thread alone.
fn block_on<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(exit_codes::FAILURE, error))?;
    runtime.block_on(future)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound_and_every_flag_has_a_variable() {
        let command = Cli::command();
        command.clone().debug_assert();
        let own = std::iter::once(&command);
        for sub in own.chain(command.get_subcommands()) {
            for argument in sub.get_arguments().filter(|one| !one.is_positional()) {
                let flag = argument.get_long().unwrap();
                let variable = format!("PRIMED_{}", flag.replace('-', "_").to_uppercase());
                assert_eq!(
                    argument.get_env().unwrap().to_str(),
                    Some(variable.as_str())
                );
            }
        }
    }
}
