//! siso, Chromium's ninja.

use super::*;

#[test]
fn a_build_by_siso_passes_as_directly() {
    passes_as_directly(build, Backend::Casd, COMPILES);
}

fn build(site: &Site, server: &Server) -> Built {
    let mut command = site.command(tool("siso"));
    command
        .args(["ninja", "-C", "siso", "-config_repo_dir", "siso"])
        .args(["-reapi_address", &server.host_and_port()])
        .args(["-reapi_insecure", "-reapi_instance", "", "-project", ""])
        .args(["-strict_remote", "-local_cache_enable=false"]);
    let (exit_code, said) = site.run(&mut command);
    // "noexec:0 local:0 remote:5 cache:0 skip:0"
    let number = |what| number_after(&said, what).unwrap_or_default();
    Built {
        exit_code,
        reported: Reported {
            executed: number(" remote:") + number(" local:"),
            cached: number(" cache:"),
        },
        outputs: site.outputs(
            "siso",
            &["program", "main.o", "entry.o", "hash.o", "total.o"],
        ),
        said,
    }
}
