//! BuildStream, whose one action builds a whole element.

use super::*;

#[test]
fn a_build_by_buildstream_passes_as_directly() {
    passes_as_directly(build, Backend::Casd, 1);
}

fn build(site: &Site, server: &Server) -> Built {
    let home = site.path("home").display().to_string();
    let url = format!("{{ url: 'http://{}' }}", server.host_and_port());
    let settings = format!(
        "cachedir: {home}/cache\nlogdir: {home}/logs\nsourcedir: {home}/sources\n\
         remote-execution:\n  execution-service: {url}\n  storage-service: {url}\n  \
         action-cache-service: {url}\n"
    );
    let file = site.path("home").join("buildstream.conf");
    std::fs::write(&file, settings).unwrap();
    let bst = || {
        let mut command = site.command(tool("bst"));
        command
            .args(["--no-interactive", "--no-colors", "--config"])
            .arg(&file);
        command
    };
    let (exit_code, said) = site.run(bst().args(["build", "program.bst"]));
    let out = ["artifact", "checkout", "program.bst", "--directory", "out"];
    site.run(bst().args(out));
    let executed = said.matches("START   Waiting for the remote build").count();
    let built = said.matches("START   Running commands").count();
    Built {
        exit_code,
        reported: Reported {
            executed,
            cached: built - executed,
        },
        outputs: site.outputs("out", &["program"]),
        said,
    }
}
