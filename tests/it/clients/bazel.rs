//! Bazel with its C++ rules, whose versions of the API end before buildbox-casd's begin.

use super::*;

#[test]
fn a_build_by_bazel_passes_as_directly() {
    passes_as_directly(build, Backend::CasdForBazel, COMPILES);
}

fn build(site: &Site, server: &Server) -> Built {
    let mut command = site.command(tool("bazel"));
    command
        .env("CC", site.compiler())
        .env("USER", "tester") // else it must be in /etc/passwd
        .args(["--batch", "--host_jvm_args=-XX:TieredStopAtLevel=1"])
        .arg(format!(
            "--output_user_root={}/bazel",
            site.path("home").display()
        ))
        .args(["build", "//:program", "--color=no", "--curses=no"])
        .arg(format!(
            "--remote_executor=grpc://{}",
            server.host_and_port()
        ))
        .arg("--spawn_strategy=remote");
    let (exit_code, said) = site.run(&mut command);
    // "INFO: 10 processes: 2 remote cache hit, 5 internal, 3 remote."
    let summary = said.lines().find(|line| line.contains(" processes: "));
    let counts = summary.and_then(|line| line.trim_end_matches('.').rsplit_once(": "));
    let number = |what| {
        let (_, counts) = counts?;
        counts
            .split(", ")
            .find_map(|count| count.strip_suffix(what)?.parse().ok())
    };
    let number = |what| number(what).unwrap_or_default();
    Built {
        exit_code,
        reported: Reported {
            executed: number(" remote"),
            cached: number(" remote cache hit"),
        },
        outputs: site.outputs("bazel-bin", &["program"]),
        said,
    }
}
