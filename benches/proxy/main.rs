//! The peers between which `scripts/bench-proxy` and `scripts/soak` put a proxy: a load generator
//! and a fast server on raw HTTP/2, tuned so that they themselves cost little, and the report that
//! turns measurements into a table. Unix sockets throughout.
//!
//! One `load` is one measurement and one line of JSON; whoever starts it says in `--tag` what the
//! line stands for. `cargo bench` alone measures nothing: a proxy takes a script to set up.

mod client;
mod load;
mod mix;
mod pipe;
mod process;
mod reapi;
mod report;
mod server;
mod threads;
mod tuning;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What can go wrong in a measurement is only ever printed.
type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Parser)]
#[command(
    name = "proxy",
    about = "The peers and the report of scripts/bench-proxy"
)]
struct Cli {
    /// What `cargo bench` passes to each benchmark.
    #[arg(long, hide = true)]
    bench: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Answers lookups and other small calls, sends blobs, swallows uploads.
    Server(server::Server),
    /// Passes bytes on and understands nothing: what any proxy costs.
    Pipe(pipe::Pipe),
    /// Puts the results that lookups ask for into a backend.
    Seed(load::Seed),
    /// Measures one thing once and prints it as a line of JSON.
    Load(load::Load),
    /// Bounded load of every kind for a while, through a proxy and beside it; for scripts/soak.
    Mix(mix::Mix),
    /// Turns the lines that `load` printed into a table of ratios.
    Report(report::Report),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Some(Command::Server(server)) => server.run(),
        Some(Command::Pipe(pipe)) => pipe.run(),
        Some(Command::Seed(seed)) => seed.run(),
        Some(Command::Load(load)) => load.run(),
        Some(Command::Mix(mix)) => mix.run(),
        Some(Command::Report(report)) => report.run(),
        None => {
            eprintln!("proxy: nothing measured; scripts/bench-proxy sets the proxies up");
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("proxy: error: {error}");
            ExitCode::FAILURE
        }
    }
}
