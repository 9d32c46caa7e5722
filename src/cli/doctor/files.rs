//! Checks of directories and sockets: whether they are there, whose they are, and whether there is
//! room.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::{Finding, Surroundings, privacy};
use crate::address::Address;

const MIB: u64 = 1024 * 1024;
/// With less room than this something will soon fail, in bytes.
const LITTLE: u64 = 1024 * MIB;
/// With less room than this it fails.
const NONE: u64 = 64 * MIB;

/// Whether there is a private place for sockets.
pub fn runtime_directory(surroundings: &Surroundings) -> Vec<Finding> {
    let check = "sockets";
    let Some(directory) = &surroundings.environment.runtime_dir else {
        return vec![Finding::warning(
            check,
            "XDG_RUNTIME_DIR is not set, so there is no default place for sockets",
            "log in by a session that sets it, or give --listen and --admin; `primed run` uses the \
             directory for temporary files",
        )];
    };
    let shown = directory.display();
    vec![match privacy(directory) {
        Ok(()) => Finding::ok(check, format!("{shown} is this user's alone")),
        Err(reason) => Finding::error(
            check,
            format!("{shown} (XDG_RUNTIME_DIR) cannot be trusted: {reason}"),
            format!("it must be a directory of this user's: chown and chmod 700 {shown}"),
        ),
    }]
}

/// Whether there is anything in the way of the sockets.
pub fn sockets(surroundings: &Surroundings) -> Vec<Finding> {
    let addresses = [&surroundings.listen, &surroundings.admin];
    let paths = addresses.into_iter().filter_map(|address| match address {
        Some(Address::Unix(path)) => Some(path),
        _ => None,
    });
    paths.filter_map(|path| socket(path)).collect()
}

fn socket(path: &Path) -> Option<Finding> {
    let shown = path.display();
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            return Some(Finding::error(
                "sockets",
                format!("{shown} cannot be looked at: {error}"),
                "make its directory this user's own",
            ));
        }
    };
    if !metadata.file_type().is_socket() {
        return Some(Finding::error(
            "sockets",
            format!("{shown} is no socket, so primed cannot listen there"),
            format!("remove it: rm {shown}"),
        ));
    }
    Some(match UnixStream::connect(path) {
        Ok(_) => Finding::ok("sockets", format!("somebody listens at {shown}")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Finding::warning(
            "sockets",
            format!("{shown} was left behind: nobody listens there"),
            "start primed, which replaces it; clients that use it fail until then",
        ),
        Err(error) => Finding::error(
            "sockets",
            format!("{shown} lets nobody in: {error}"),
            "it is for the user who started primed, and those of --allow-uid",
        ),
    })
}

/// Whether records can be kept.
pub fn state_directory(surroundings: &Surroundings) -> Vec<Finding> {
    let Some(directory) = &surroundings.state_dir else {
        return vec![Finding::error(
            "state",
            "neither XDG_STATE_HOME nor HOME is set, so there is no place for records",
            "set one of them, or give --state-dir",
        )];
    };
    let mut findings = vec![writable("state", directory, "--state-dir")];
    findings.extend(room("state", directory));
    findings
}

/// Whether the embedded backend can keep its blobs.
pub fn cache_directory(surroundings: &Surroundings) -> Vec<Finding> {
    let Some(directory) = &surroundings.cache_dir else {
        return Vec::new();
    };
    let mut findings = vec![writable("cache", directory, "--cache-dir")];
    findings.extend(room("cache", directory));
    findings
}

/// Whether files can be made in `directory`, or `directory` itself.
fn writable(check: &'static str, directory: &Path, flag: &str) -> Finding {
    let shown = directory.display();
    let Some(existing) = existing(directory) else {
        return Finding::error(check, format!("{shown} is nowhere"), format!("give {flag}"));
    };
    let refused = |reason: &str| {
        Finding::error(
            check,
            format!("{shown} cannot be used: {reason}"),
            format!(
                "make it this user's own: chown -R $(id -u) {}, or give {flag}",
                existing.display()
            ),
        )
    };
    if existing != directory {
        // It will be made there.
        return match tempfile::tempfile_in(existing) {
            Ok(_) => Finding::ok(check, format!("{shown} will be made when it is needed")),
            Err(error) => refused(&error.to_string()),
        };
    }
    if let Err(reason) = privacy(directory) {
        return refused(&reason);
    }
    match tempfile::tempfile_in(directory) {
        Ok(_) => Finding::ok(check, format!("{shown} can be written")),
        Err(error) => refused(&error.to_string()),
    }
}

/// Whether there is room for more.
fn room(check: &'static str, directory: &Path) -> Option<Finding> {
    let existing = existing(directory)?;
    let system = rustix::fs::statvfs(existing).ok()?;
    let free = system.f_bavail.saturating_mul(system.f_frsize);
    finding_of_room(check, existing, free)
}

fn finding_of_room(check: &'static str, directory: &Path, free: u64) -> Option<Finding> {
    let message = format!("{} MiB are free in {}", free / MIB, directory.display());
    let hint = "make room there, or keep it on another disk";
    if free < NONE {
        Some(Finding::error(check, message, hint))
    } else if free < LITTLE {
        Some(Finding::warning(check, message, hint))
    } else {
        None
    }
}

/// `path`, or the nearest directory above it that is there.
fn existing(path: &Path) -> Option<&Path> {
    path.ancestors().find(|place| place.exists())
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::tests::{assert_finds, bare};
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_runtime_directory_that_is_absent_or_open_to_others_is_found() {
        let mut surroundings = bare(&[]);
        let found = runtime_directory(&surroundings);
        assert_finds(&found, Verdict::Warning, "XDG_RUNTIME_DIR", "--listen");
        let scratch = tempfile::tempdir().unwrap();
        surroundings.environment.runtime_dir = Some(scratch.path().to_owned());
        let found = runtime_directory(&surroundings);
        assert_finds(&found, Verdict::Ok, "alone", "");
        let open = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(scratch.path(), open).unwrap();
        let found = runtime_directory(&surroundings);
        assert_finds(&found, Verdict::Error, "others may write", "chmod 700");
        surroundings.environment.runtime_dir = Some("/nonexistent".into());
        let found = runtime_directory(&surroundings);
        assert_finds(&found, Verdict::Error, "No such file", "chown");
    }

    #[test]
    fn sockets_that_are_stale_or_none_are_found() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("socket");
        let mut surroundings = bare(&[]);
        surroundings.listen = Some(format!("unix:{}", path.display()).parse().unwrap());
        assert!(sockets(&surroundings).is_empty());
        let listener = UnixListener::bind(&path).unwrap();
        assert_finds(&sockets(&surroundings), Verdict::Ok, "listens", "");
        drop(listener);
        let found = sockets(&surroundings);
        assert_finds(&found, Verdict::Warning, "left behind", "start primed");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        assert_finds(&sockets(&surroundings), Verdict::Error, "no socket", "rm ");
    }

    #[test]
    fn directories_that_cannot_be_used_are_found_with_the_flag_that_names_others() {
        let mut surroundings = bare(&[]);
        let found = state_directory(&surroundings);
        assert_finds(&found, Verdict::Error, "XDG_STATE_HOME", "--state-dir");
        let scratch = tempfile::tempdir().unwrap();
        surroundings.state_dir = Some(scratch.path().join("a/b"));
        let found = &state_directory(&surroundings)[..1];
        assert_finds(found, Verdict::Ok, "will be made", "");
        let file = scratch.path().join("file");
        std::fs::write(&file, "").unwrap();
        surroundings.state_dir = Some(file.clone());
        let found = &state_directory(&surroundings)[..1];
        assert_finds(found, Verdict::Error, "no directory", "--state-dir");
        surroundings.cache_dir = Some(file);
        let found = &cache_directory(&surroundings)[..1];
        assert_finds(found, Verdict::Error, "no directory", "--cache-dir");
        assert!(cache_directory(&bare(&[])).is_empty());
    }

    #[test]
    fn a_full_disk_is_an_error_and_an_almost_full_one_a_warning() {
        let place = Path::new("/p");
        let of = |free| Vec::from_iter(finding_of_room("state", place, free));
        assert_finds(&of(5 * MIB), Verdict::Error, "5 MiB", "room");
        assert_finds(&of(500 * MIB), Verdict::Warning, "500 MiB", "room");
        assert!(of(5000 * MIB).is_empty());
    }
}
