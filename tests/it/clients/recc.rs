//! recc, below `make`.

use super::*;
use crate::support;

#[test]
fn a_build_by_recc_passes_as_directly() {
    alike_to_the_last_action(build, Backend::Casd);
}

#[test]
fn a_build_by_recc_passes_as_directly_to_justbuild_execute() {
    alike_to_the_last_action(build, Backend::JustbuildExecute(&["--compatible"]));
}

fn build(stage: &Stage, server: &Server) -> Built {
    let mut command = stage.command(make());
    command
        .arg(format!("RECC={}", support::tool("recc").display()))
        .env("RECC_SERVER", &server.address)
        .env("RECC_LINK", "1")
        .env("RECC_LOG_LEVEL", "info");
    let (exit_code, said) = stage.run(&mut command);
    eprintln!("{said}");
    Built {
        exit_code,
        reported: Reported {
            executed: said.matches("Executing action remotely").count(),
            cached: said.matches("Action Cache hit").count(),
        },
        outputs: stage.outputs(".", &["program", "main.o", "entry.o", "hash.o", "total.o"]),
    }
}
