//! Real recc processes in checkouts of their own that compile the same at once, on buildbox-casd,
//! which by itself would execute each of their calls.

use std::path::Path;
use std::process::Command;

use super::{JOINS, LOOKUP_WAITS};
use crate::client_faults::GatedCompiler;
use crate::support::{Casd, Daemon, Primed, scratch, tool, wait_until};

/// Starts recc on the one source of the checkout `name`.
fn compile(directory: &Path, name: &str, primed: &Primed, compiler: &GatedCompiler) -> Daemon {
    let checkout = directory.join(name);
    std::fs::create_dir(&checkout).unwrap();
    std::fs::write(checkout.join("unit.c"), "int unit(void) { return 7; }\n").unwrap();
    let mut command = Command::new(tool("recc"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("RECC_") {
            command.env_remove(name);
        }
    }
    command
        .current_dir(&checkout)
        .env("RECC_SERVER", primed.address())
        .env("PATH", compiler.path())
        .args(["cc", "-c", "unit.c", "-o", "unit.o"]);
    Daemon::start(&mut command, directory.join(format!("{name}.log")))
}

fn waiting(primed: &Primed) -> usize {
    let log = primed.daemon.log();
    log.matches(JOINS).count() + log.matches(LOOKUP_WAITS).count()
}

#[test]
fn compilers_that_start_together_compile_once() {
    together(false);
}

#[test]
fn compilers_get_the_result_when_the_one_that_began_is_killed() {
    together(true);
}

fn together(kill_first: bool) {
    let scratch = scratch();
    let casd = Casd::start(scratch.path(), 4);
    let primed = Primed::start(scratch.path(), &casd.address());
    let compiler = GatedCompiler::install(scratch.path());
    let start = |name| compile(scratch.path(), name, &primed, &compiler);
    let mut first = start("first");
    wait_until("the first compiles", || compiler.compiling() == 1);
    let others = ["second", "third"];
    let mut running = others.map(start);
    wait_until("the others wait", || waiting(&primed) == 2);
    if kill_first {
        first.kill();
    }
    compiler.open();
    for compile in &mut running {
        assert_eq!(compile.exit_code(), Some(0), "{}", compile.log());
    }
    let object = |name: &str| std::fs::read(scratch.path().join(name).join("unit.o")).unwrap();
    assert_eq!(object("second"), object("third"));
    if !kill_first {
        assert_eq!(first.exit_code(), Some(0), "{}", first.log());
        assert_eq!(object("first"), object("second"));
    }
    assert_eq!(compiler.compiling(), 1, "{}", primed.daemon.log());
}
