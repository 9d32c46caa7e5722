//! `primed run`: a command with primed round it, from priming before it starts to a summary of what
//! that was worth. The command must never fail for primed's sake: where primed cannot help, it runs
//! all the same.

mod environment;
mod live_line;
mod signals;
mod summary;

use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use clap::Args;
use tokio::process::{Child, Command};
use tokio::sync::watch;

use super::daemons::{Attached, Daemons};
use super::{Failure, block_on, exit_codes};
use crate::address::Address;
use crate::config::Environment;
use crate::server::runs::{OpenPage, RunPage};
use environment::{CommandEnvironment, Compilers};
use live_line::LiveLine;
use signals::Signals;

/// Run a build command with primed round it.
///
/// Primes before the command starts, tells recc where primed is, and says at the end what it was
/// worth. Uses the primed that runs, or starts one for as long as the command takes.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Have compilers called through recc: CC and CXX become `recc $CC` and `recc $CXX`.
    #[arg(long, env = "PRIMED_RECC", value_parser = clap::builder::FalseyValueParser::new())]
    recc: bool,
    /// Prime nothing for this command, to see what it takes then. It is recorded all the same.
    #[arg(long, env = "PRIMED_NO_PRIME", value_parser = clap::builder::FalseyValueParser::new())]
    no_prime: bool,
    /// How long the command may have to wait, in seconds, until it is known what to prime.
    #[arg(
        long,
        env = "PRIMED_PRIME_WAIT",
        value_parser = super::serve::seconds,
        default_value = "2",
        value_name = "SECONDS"
    )]
    prime_wait: Duration,
    /// Print the summary even where stderr is no terminal.
    #[arg(long, env = "PRIMED_SUMMARY", value_parser = clap::builder::FalseyValueParser::new())]
    summary: bool,
    /// Print nothing: no live line, no summary, no notes.
    #[arg(long, env = "PRIMED_QUIET", value_parser = clap::builder::FalseyValueParser::new())]
    quiet: bool,
    /// Backend of the primed that is started; one that runs is only used if that is its backend
    /// [default: what `primed serve` takes].
    #[arg(long, env = "PRIMED_UPSTREAM", value_name = "ADDR")]
    upstream: Option<Address>,
    /// Where the primed that is started keeps its records [default: $XDG_STATE_HOME/primed].
    #[arg(long, env = "PRIMED_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Admin socket of the primed to use, if it runs
    /// [default: unix:$XDG_RUNTIME_DIR/primed/admin.sock].
    #[arg(long, env = "PRIMED_ADMIN", value_name = "ADDR")]
    admin: Option<Address>,
    /// The command and its arguments.
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    command: Vec<OsString>,
}

/// What is said beside the command's own output, and where.
struct Voice {
    quiet: bool,
}

impl Voice {
    /// A sentence for people, at once.
    fn say(&self, sentence: &str) {
        if !self.quiet {
            eprintln!("primed: {sentence}");
        }
    }
}

/// Runs the command; returns the exit code that says how it ended.
pub(super) fn run(arguments: Arguments, file: Option<PathBuf>) -> Result<u8, Failure> {
    // Before there is any other thread: all of them inherit what is blocked.
    let signals = Signals::block().map_err(|error| Failure::new(exit_codes::FAILURE, error))?;
    block_on(async move {
        let mut signals = signals.listen()?;
        Run::new(arguments, file)?.go(&mut signals).await
    })
}

struct Run {
    arguments: Arguments,
    /// The settings that were named.
    file: Option<PathBuf>,
    compilers: Option<Compilers>,
    voice: Voice,
}

impl Run {
    fn new(arguments: Arguments, file: Option<PathBuf>) -> Result<Self, Failure> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let compilers = match arguments.recc {
            true => Some(Compilers::through_recc(&path)?),
            false => None,
        };
        Ok(Run {
            voice: Voice {
                quiet: arguments.quiet,
            },
            arguments,
            file,
            compilers,
        })
    }

    async fn go(self, signals: &mut Signals) -> Result<u8, Failure> {
        let attached = tokio::select! {
            attached = self.attach() => attached,
            signal = signals.next_deadly() => {
                return Ok(exit_codes::SIGNALLED.saturating_add(signal));
            }
        };
        let variables = |name: &str| std::env::var_os(name);
        let environment = CommandEnvironment::new(
            &variables,
            attached.as_ref().map(|attached| &attached.opened),
            self.arguments.upstream.as_ref(),
            self.compilers.as_ref(),
        );
        for note in environment.notes() {
            self.voice.say(note);
        }
        let mut command = Command::new(&self.arguments.command[0]);
        command.args(&self.arguments.command[1..]);
        environment.apply(&mut command);
        if let Some(attached) = &attached {
            // For `primed status`, `wait` and `run` below it.
            command.env("PRIMED_ADMIN", attached.admin.to_string());
        }
        let ended = match signals.spawn(&mut command) {
            Ok(child) => self.accompany(child, signals, attached.as_ref()).await,
            Err(error) => Err(cannot_run(&self.arguments.command[0], &error)),
        };
        let code = match ended {
            Ok(status) => exit_code(status),
            Err(failure) => {
                if let Some(attached) = attached {
                    attached.close().await;
                }
                return Err(failure);
            }
        };
        if let Some(attached) = attached {
            let wanted = self.arguments.summary || io::stderr().is_terminal();
            let speculates = attached.opened.speculates;
            let page = attached.close().await;
            if wanted && speculates {
                let build = page.and_then(|page| page.build);
                self.voice.say(&summary::sentence(build.as_ref()));
            }
        }
        Ok(code)
    }

    /// Opens the run at the primed that is there, or at one that is started for it.
    async fn attach(&self) -> Option<Attached> {
        let command: Vec<_> = self
            .arguments
            .command
            .iter()
            .map(|word| word.to_string_lossy())
            .collect();
        let correlated = std::env::var(environment::CORRELATION).ok();
        let page = OpenPage {
            command: command.join(" "),
            correlated: correlated.filter(|id| !id.is_empty()),
            prime: !self.arguments.no_prime,
            prime_wait_ms: u64::try_from(self.arguments.prime_wait.as_millis()).unwrap_or(u64::MAX),
            visit: false,
        };
        let daemons = Daemons {
            environment: Environment::of_process(),
            admin: self.arguments.admin.clone(),
            upstream: self.arguments.upstream.clone(),
            state_dir: self.arguments.state_dir.clone(),
            file: self.file.clone(),
        };
        match daemons.attach(&page).await {
            Ok(attached) => {
                for note in &attached.notes {
                    self.voice.say(note);
                }
                Some(attached)
            }
            Err(reason) => {
                self.voice
                    .say(&format!("the command runs without primed: {reason}"));
                None
            }
        }
    }

    /// Waits for the command to end, passes signals on to it, and shows how things stand.
    async fn accompany(
        &self,
        mut child: Child,
        signals: &mut Signals,
        attached: Option<&Attached>,
    ) -> Result<ExitStatus, Failure> {
        let mut line = match attached {
            Some(attached) if attached.opened.speculates && !self.voice.quiet => LiveLine::new(),
            _ => None,
        };
        let mut pages = match (&line, attached) {
            (Some(_), Some(attached)) => attached.follow(),
            // Never changes.
            _ => watch::channel(RunPage::default()).1,
        };
        let mut followed = line.is_some();
        loop {
            tokio::select! {
                ended = child.wait() => {
                    drop(line);
                    return ended.map_err(|error| Failure::new(exit_codes::FAILURE, error));
                }
                signal = signals.next() => {
                    if signal.is_of_a_child() {
                        // Its end is heard of here alone where the kernel has no descriptors of
                        // processes: then the runtime waits for the signal, too.
                        if let Some(ended) = child.try_wait().transpose() {
                            return ended.map_err(|error| Failure::new(exit_codes::FAILURE, error));
                        }
                        if let Some(command) = child.id() {
                            signals::stop_with(command, line.as_mut());
                        }
                    } else {
                        signal.pass_on(child.id());
                    }
                    if let Some(line) = &mut line {
                        signal.after(line);
                    }
                }
                changed = pages.changed(), if followed => {
                    followed = changed.is_ok();
                    if let Some(line) = &mut line {
                        line.show(&pages.borrow_and_update());
                    }
                }
            }
        }
    }
}

fn exit_code(status: ExitStatus) -> u8 {
    let by_signal = || {
        status
            .signal()
            .map(|signal| signal + i32::from(exit_codes::SIGNALLED))
    };
    let code = status.code().or_else(by_signal);
    code.and_then(|code| u8::try_from(code).ok())
        .unwrap_or(exit_codes::FAILURE)
}

/// Says what shells say, with their exit codes.
fn cannot_run(program: &OsStr, error: &io::Error) -> Failure {
    let program = program.to_string_lossy();
    match error.kind() {
        io::ErrorKind::NotFound => Failure::new(
            exit_codes::NOT_FOUND,
            format!(
                "{program} cannot be run: there is no such program; check its spelling and PATH"
            ),
        ),
        io::ErrorKind::PermissionDenied => Failure::new(
            exit_codes::NOT_EXECUTABLE,
            format!("{program} cannot be run: it is not executable; chmod +x makes it so"),
        ),
        _ => Failure::new(
            exit_codes::NOT_EXECUTABLE,
            format!("{program} cannot be run: {error}"),
        ),
    }
}
