//! The `primed` command.

use std::process::ExitCode;

/// Half the CPU of the system's allocator for large messages, and less for small ones. C libraries use
/// it too (its feature `override`): of the system's, each thread would keep what it once had. Its
/// version 3 hardly gives back what large frames were read into (docs/forwarding.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    primed::cli::main()
}
