//! The command line: arguments in, exit code out. Each command has a file of its own.

mod admin_client;
pub mod exit_codes;
mod export;
mod import;
mod records;
mod serve;
mod status;
mod upstream_arguments;
mod wait;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::address::Address;
use crate::config::{ConfigError, Environment};

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
    #[command(flatten)]
    log: Log,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Box<serve::Arguments>),
    Status(status::Arguments),
    Wait(wait::Arguments),
    Export(export::Arguments),
    Import(import::Arguments),
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
    /// Admin socket of the primed to ask [default: unix:$XDG_RUNTIME_DIR/primed/admin.sock].
    #[arg(long, env = "PRIMED_ADMIN", value_name = "ADDR")]
    admin: Option<Address>,
}

impl AdminAddress {
    fn resolve(self) -> Result<Address, ConfigError> {
        match self.admin {
            Some(address) => Ok(address),
            None => Environment::of_process().default_admin(),
        }
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
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Failure::new(exit_codes::USAGE, error)
    }
}

/// Runs the command that the process's arguments name.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
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
    let done = start_logging(&cli.log).and_then(|()| match cli.command {
        Command::Serve(arguments) => serve::run(*arguments),
        Command::Status(arguments) => status::run(arguments),
        Command::Wait(arguments) => wait::run(arguments),
        Command::Export(arguments) => export::run(arguments),
        Command::Import(arguments) => import::run(arguments),
    });
    match done {
        Ok(()) => ExitCode::from(exit_codes::OK),
        Err(failure) => {
            eprintln!("primed: {}", failure.message);
            ExitCode::from(failure.code)
        }
    }
}

fn start_logging(log: &Log) -> Result<(), Failure> {
    let filter = tracing_subscriber::EnvFilter::try_new(&log.log_level).map_err(|error| {
        let message = format!("--log-level '{}' is not a filter: {error}", log.log_level);
        Failure::new(exit_codes::USAGE, message)
    })?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match log.log_format {
        LogFormat::Text => subscriber.with_ansi(false).init(),
        LogFormat::Json => subscriber.json().init(),
    }
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
        for sub in command.get_subcommands() {
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
