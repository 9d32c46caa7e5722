//! BuildStream, whose one action builds a whole element.

use super::*;

#[test]
fn a_build_by_buildstream_passes_as_directly() {
    let [cold, cached] = alike(build, Backend::Casd);
    assert_eq!((cold.built.exit_code, cold.compiles), (Some(0), COMPILES));
    assert_eq!((cached.built.exit_code, cached.compiles), (Some(0), 0));
}

fn build(stage: &Stage, server: &Server) -> Built {
    let home = stage.path("home").display().to_string();
    let url = format!("{{ url: 'http://{}' }}", server.host_and_port());
    let settings = format!(
        "cachedir: {home}/cache\nlogdir: {home}/logs\nsourcedir: {home}/sources\n\
         remote-execution:\n  execution-service: {url}\n  storage-service: {url}\n  \
         action-cache-service: {url}\n"
    );
    let file = stage.path("home").join("buildstream.conf");
    std::fs::write(&file, settings).unwrap();
    let bst = || {
        let mut command = stage.command(tool("bst"));
        command
            .args(["--no-interactive", "--no-colors", "--config"])
            .arg(&file);
        command
    };
    let (exit_code, said) = stage.run(bst().args(["build", "program.bst"]));
    eprintln!("{said}");
    let out = [
        "artifact",
        "checkout",
        "program.bst",
        "--directory",
        "checkout",
    ];
    let (_, said_then) = stage.run(bst().args(out));
    eprintln!("{said_then}");
    Built {
        exit_code,
        reported: Reported {
            executed: said.matches("START   Waiting for the remote build").count(),
            cached: 0,
        },
        outputs: stage.outputs("checkout", &["program"]),
    }
}
