//! The examples do what they say.

use std::process::Command;

use crate::support::{Primed, tools};

#[test]
fn the_recc_example_is_primed() {
    let primed = Primed::command().get_program().to_owned();
    let binaries = std::path::Path::new(&primed).parent().unwrap().to_owned();
    let path = std::env::var("PATH").unwrap();
    let path = format!(
        "{}:{}:{path}",
        binaries.display(),
        tools().join("bin").display()
    );
    let output = Command::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/examples/recc-make/run"
    ))
    .env("PATH", path)
    .env_remove("MAKEFLAGS")
    .output()
    .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(said.contains("good morning, world (number 1)"), "{said}");
    let newest = said.lines().find(|line| line.contains("make in"));
    let counts: Vec<&str> = newest.unwrap().split_whitespace().take(6).collect();
    // Three files and a link asked for; none missed. count.c comes out the same either way.
    assert_eq!(counts[0], "4", "{said}");
    assert_eq!(counts[4], "0", "{said}");
    assert_eq!(counts[5], "4", "{said}");
}
