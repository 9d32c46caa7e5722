//! trexe: one process for each action, told its inputs.

use super::*;
use crate::support;

#[test]
fn a_build_by_trexe_passes_as_directly() {
    passes_as_directly(build, Backend::Casd, COMPILES);
}

fn build(site: &Site, server: &Server) -> Built {
    let mut command = site.command("sh");
    command
        .arg("trexe.sh")
        .arg(support::tool("trexe"))
        .arg(format!("--remote={}", server.address))
        .args(["--d=.", "--wait"]);
    let (exit_code, said) = site.run(&mut command);
    let reported = |cached: &str| {
        let results = ["main", "entry", "hash", "total", "program"].map(|action| {
            let path = site.path("project").join(format!("{action}.json"));
            let result = std::fs::read(path).unwrap_or_default();
            String::from_utf8(result).unwrap()
        });
        let wanted = format!("\"cachedResult\":{cached}");
        results
            .iter()
            .filter(|result| result.contains(&wanted))
            .count()
    };
    Built {
        exit_code,
        reported: Reported {
            executed: reported("false"),
            cached: reported("true"),
        },
        outputs: site.outputs(".", &["program", "main.o", "entry.o", "hash.o", "total.o"]),
        said,
    }
}
