//! The `primed` command.

use std::process::ExitCode;

/// Half the CPU of the system's allocator for large messages, and less for small ones.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    primed::cli::main()
}
