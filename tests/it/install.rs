//! `primed install` and `primed uninstall`: what is written where, and that nothing is overwritten
//! or taken away that is not primed's own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Output;

use crate::support::{Primed, scratch};

/// Runs primed for a user whose home is `home`, on a machine without systemd.
fn primed(home: &Path, arguments: &[&str]) -> Output {
    let mut command = Primed::command();
    for variable in [
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
        "XDG_STATE_HOME",
        "PRIMED_CONFIG",
        "SHELL",
    ] {
        command.env_remove(variable);
    }
    command
        .args(arguments)
        .env("HOME", home)
        .env("XDG_CONFIG_DIRS", home.join("xdg"))
        .env("XDG_RUNTIME_DIR", home.join("run"))
        .env("PATH", home.join("bin"))
        .output()
        .unwrap()
}

/// Fails unless all was done but what needs a service manager.
fn assert_done(output: &Output, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stdout);
    let failed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}{failed}");
    assert!(
        failed.contains("no systemctl") && failed.contains("systemctl --user"),
        "{failed}"
    );
    for word in words {
        assert!(said.contains(word), "'{word}' is not in: {said}{failed}");
    }
}

fn files(directory: &Path) -> BTreeSet<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return BTreeSet::new();
    };
    let paths = entries.map(|entry| entry.unwrap().path());
    let below = paths.flat_map(|path| match path.is_dir() {
        true => files(&path),
        false => BTreeSet::from([path]),
    });
    below.collect()
}

#[test]
fn install_writes_everything_where_it_belongs_and_uninstall_takes_just_that_away() {
    let scratch = scratch();
    let home = scratch.path();
    let foreign = home.join(".config/systemd/user/other.service");
    std::fs::create_dir_all(foreign.parent().unwrap()).unwrap();
    std::fs::write(&foreign, "[Service]\n").unwrap();

    let dry = primed(
        home,
        &["install", "--upstream", "unix:/a", "--dry-run", "--now"],
    );
    let said = String::from_utf8_lossy(&dry.stdout);
    assert_eq!(dry.status.code(), Some(0), "{dry:?}");
    assert!(
        said.contains("would run  systemctl --user start primed.socket"),
        "{said}"
    );
    assert_eq!(
        files(home),
        BTreeSet::from([foreign.clone()]),
        "nothing was done"
    );

    let install = primed(home, &["install", "--upstream", "unix:/a"]);
    assert_done(
        &install,
        &["RECC_SERVER=unix:$XDG_RUNTIME_DIR/primed/remote-apis.sock"],
    );
    let unit = std::fs::read_to_string(home.join(".config/systemd/user/primed.service")).unwrap();
    let exec = format!("\nExecStart={} serve\n", env!("CARGO_BIN_EXE_primed"));
    assert!(unit.contains(&exec), "{unit}");
    let settings = std::fs::read_to_string(home.join(".config/primed/primed.toml")).unwrap();
    assert!(
        settings.contains("\nupstream = \"unix:/a\"\n"),
        "{settings}"
    );
    for file in [
        ".config/systemd/user/primed.socket",
        ".local/share/bash-completion/completions/primed",
        ".local/share/zsh/site-functions/_primed",
        ".local/share/fish/vendor_completions.d/primed.fish",
        ".local/share/man/man1/primed.1",
        ".local/share/man/man1/primed-serve.1",
    ] {
        assert!(home.join(file).is_file(), "{file}");
    }
    assert!(
        !home
            .join(".config/systemd/user/buildbox-casd.service")
            .exists()
    );
    let config = primed(home, &["config"]);
    let said = String::from_utf8_lossy(&config.stdout);
    assert!(
        said.contains("upstream = \"unix:/a\""),
        "what was written is in use: {said}"
    );

    let written = files(home);
    assert_done(
        &primed(home, &["install"]),
        &["unchanged", "primed.toml (as it is)"],
    );
    assert_eq!(files(home), written);

    let dry = primed(home, &["uninstall", "--dry-run"]);
    assert_eq!(dry.status.code(), Some(0), "{dry:?}");
    assert_eq!(files(home), written);
    assert_done(&primed(home, &["uninstall"]), &[]);
    assert_eq!(files(home), BTreeSet::from([foreign]));
    assert!(!home.join(".config/primed").exists() && !home.join(".local/share/primed").exists());
    let again = primed(home, &["uninstall"]);
    assert_eq!(again.status.code(), Some(0), "{again:?}");
    assert!(String::from_utf8_lossy(&again.stdout).contains("Nothing is installed"));
}

#[test]
fn what_primed_did_not_write_or_the_user_has_changed_is_kept_and_said() {
    let scratch = scratch();
    let home = scratch.path();
    let socket = home.join(".config/systemd/user/primed.socket");
    let service = home.join(".config/systemd/user/primed.service");
    std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
    std::fs::write(&socket, "mine").unwrap();
    let not_ours = format!(
        "kept       {} (it was not written by primed",
        socket.display()
    );
    assert_done(&primed(home, &["install"]), &[&not_ours]);
    std::fs::write(&service, "changed").unwrap();
    let changed = format!("kept       {} (it was changed", service.display());
    assert_done(&primed(home, &["install"]), &[&not_ours, &changed]);
    // What another version wrote, and nobody has changed, is renewed.
    let page = home.join(".local/share/man/man1/primed.1");
    let notes = home.join(".local/share/primed/installed.sha256");
    let before = std::fs::read_to_string(&page).unwrap();
    std::fs::write(&page, "").unwrap();
    let of_nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    let noted = std::fs::read_to_string(&notes).unwrap();
    let noted = noted.lines().map(|line| match line.ends_with("/primed.1") {
        true => format!("{of_nothing}  {}\n", page.display()),
        false => format!("{line}\n"),
    });
    std::fs::write(&notes, noted.collect::<String>()).unwrap();
    assert_done(
        &primed(home, &["install"]),
        &[&format!("renewed    {}", page.display())],
    );
    assert_eq!(std::fs::read_to_string(&page).unwrap(), before);

    primed(home, &["uninstall"]);
    assert_eq!(
        files(home),
        BTreeSet::from([socket.clone(), service.clone()])
    );
    assert_eq!(std::fs::read_to_string(&socket).unwrap(), "mine");
    assert_eq!(std::fs::read_to_string(&service).unwrap(), "changed");
}

#[test]
fn what_cannot_be_installed_is_refused_before_anything_is_written() {
    let scratch = scratch();
    let home = scratch.path();
    for (arguments, code, words) in [
        (
            &["install", "--upstream", "nowhere"][..],
            64,
            &["nowhere", "unix:PATH"][..],
        ),
        (&["install", "--with-casd"], 1, &["buildbox-casd", "PATH"]),
    ] {
        let output = primed(home, arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{said}");
        for word in words {
            assert!(said.contains(word), "{said}");
        }
    }
    assert_eq!(files(home), BTreeSet::new());
}
