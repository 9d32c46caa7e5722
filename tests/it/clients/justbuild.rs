//! justbuild, as a client and as a server.

use super::*;

#[test]
fn a_build_by_justbuild_passes_as_directly() {
    passes_as_directly(compatible, Backend::Casd, COMPILES);
}

#[test]
fn a_build_by_justbuild_passes_as_directly_to_justbuild_execute() {
    passes_as_directly(
        compatible,
        Backend::JustbuildExecute(&["--compatible"]),
        COMPILES,
    );
}

/// Its digests are those of Git then, which primed does not know.
#[test]
fn a_build_by_justbuild_in_its_own_protocol_passes_as_directly() {
    passes_as_directly(native, Backend::JustbuildExecute(&[]), COMPILES);
}

fn compatible(site: &Site, server: &Server) -> Built {
    build(site, server, &["--compatible"])
}

fn native(site: &Site, server: &Server) -> Built {
    build(site, server, &[])
}

fn build(site: &Site, server: &Server, arguments: &[&str]) -> Built {
    let mut command = site.command(tool("justbuild"));
    command
        .args(["install", "--plain-log", "--output-dir", "installed"])
        .args(["--remote-execution-address", &server.host_and_port()])
        .args(arguments)
        .arg("program");
    let (exit_code, said) = site.run(&mut command);
    // "Processed 5 actions, 2 cache hits."
    let processed = number_after(&said, "Processed ").unwrap_or_default();
    let cached = number_after(&said, " actions, ").unwrap_or_default();
    Built {
        exit_code,
        reported: Reported {
            executed: processed - cached,
            cached,
        },
        outputs: site.outputs("installed", &["program"]),
        said,
    }
}

/// Starts a server that executes.
pub fn execute(directory: &Path, port: u16, arguments: &[&str]) -> Running {
    let mut command = Command::new(tool("justbuild"));
    command
        .arg("execute")
        .args(arguments)
        .arg("--local-build-root")
        .arg(directory.join("root"))
        .args(["--port", &port.to_string()]);
    let daemon = Daemon::start(&mut command, directory.join("execute.log"));
    let server = Server {
        address: format!("http://127.0.0.1:{port}"),
        port,
    };
    Running {
        _daemons: vec![listens(daemon, port)],
        upstream: server.host_and_port(),
        server,
    }
}
