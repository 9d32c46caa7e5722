//! recc, below `make`.

use super::*;
use crate::support;

#[test]
fn a_build_by_recc_passes_as_directly() {
    passes_as_directly(build, Backend::Casd, COMPILES);
}

#[test]
fn a_build_by_recc_passes_as_directly_to_justbuild_execute() {
    passes_as_directly(
        build,
        Backend::JustbuildExecute(&["--compatible"]),
        COMPILES,
    );
}

fn build(site: &Site, server: &Server) -> Built {
    let mut command = site.command(make());
    command
        .arg(format!("RECC={}", support::tool("recc").display()))
        .env("RECC_SERVER", &server.address)
        .env("RECC_LINK", "1")
        .env("RECC_LOG_LEVEL", "info");
    let (exit_code, said) = site.run(&mut command);
    Built {
        exit_code,
        reported: Reported {
            executed: said.matches("Executing action remotely").count(),
            cached: said.matches("Action Cache hit").count(),
        },
        outputs: site.outputs(".", &["program", "main.o", "entry.o", "hash.o", "total.o"]),
        said,
    }
}
