//! What a command's environment says about primed, so that recc below it goes there.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use tokio::process::Command;

use super::super::{Failure, exit_codes};
use crate::address::Address;
use crate::server::runs::OpenedPage;

/// What recc sends as `correlated_invocations_id`.
pub const CORRELATION: &str = "RECC_CORRELATED_INVOCATIONS_ID";
const SERVER: &str = "RECC_SERVER";
const PROJECT_ROOT: &str = "RECC_PROJECT_ROOT";
/// Has recc run all commands by itself.
const PASSTHROUGH: &str = "RECC_PASSTHROUGH";
/// What would lead recc past primed.
const BYPASSES: [&str; 2] = ["RECC_CAS_SERVER", "RECC_ACTION_CACHE_SERVER"];
/// Wrappers that recc does not know as compilers, so that it would run them by itself.
const WRAPPERS: [&str; 3] = ["ccache", "sccache", "distcc"];
/// What the top of a project's sources holds.
const TOPS: [&str; 5] = [".git", ".hg", ".jj", ".svn", ".bzr"];

/// Compilers as `--recc` has them called.
pub struct Compilers {
    /// The top of the sources. recc takes files that are named by absolute paths, as CMake does,
    /// for the machine's own if they are not below its working directory, and does not notice
    /// their changes (measured with 1.4.30). Other digests do not depend on it.
    project_root: PathBuf,
}

impl Compilers {
    /// Looks for recc.
    ///
    /// # Errors
    /// When there is none on `path`.
    pub fn through_recc(path: &OsStr) -> Result<Self, Failure> {
        let mut places = std::env::split_paths(path);
        if !places.any(|place| place.join("recc").is_file()) {
            let message = "--recc: there is no recc on PATH; Debian has it in the package \
                           buildbox, and where it is elsewhere, PATH must say so";
            return Err(Failure::new(exit_codes::NOT_FOUND, message));
        }
        let failed = |error| {
            let message = format!("the working directory cannot be found: {error}");
            Failure::new(exit_codes::FAILURE, message)
        };
        let directory = std::env::current_dir().map_err(failed)?;
        Ok(Compilers {
            project_root: top_of(&directory).to_owned(),
        })
    }
}

/// The nearest directory that is under version control, else `directory` itself.
fn top_of(directory: &Path) -> &Path {
    let is_top = |place: &&Path| TOPS.iter().any(|name| place.join(name).exists());
    directory.ancestors().find(is_top).unwrap_or(directory)
}

/// What is set, and what is taken away.
#[derive(Debug, Default)]
pub struct CommandEnvironment {
    set: Vec<(&'static str, OsString)>,
    removed: Vec<&'static str>,
    notes: Vec<String>,
}

impl CommandEnvironment {
    /// The environment for clients of the primed that has `opened` the run; without one, they go to
    /// `upstream` if that was named, or where they go by themselves.
    pub fn new(
        variable: &dyn Fn(&str) -> Option<OsString>,
        opened: Option<&OpenedPage>,
        upstream: Option<&Address>,
        compilers: Option<&Compilers>,
    ) -> Self {
        let mut this = CommandEnvironment::default();
        let text = |name: &str| {
            let value = variable(name)?.to_string_lossy().into_owned();
            Some(value).filter(|value| !value.is_empty())
        };
        let server = match opened {
            Some(opened) => server_of(&opened.addresses),
            None => upstream.and_then(|upstream| server_of(&[upstream.to_string()])),
        };
        match (server, text(SERVER)) {
            (Some(server), before) => {
                if let (Some(before), Some(opened)) = (before, opened)
                    && !is_same(&before, &server)
                    && !is_same(&before, &opened.upstream)
                {
                    this.notes.push(format!(
                        "calls go through primed to {}, not to RECC_SERVER {before}; to have them \
                         forwarded there: primed run --upstream {before}",
                        opened.upstream
                    ));
                }
                for name in BYPASSES {
                    if text(name).is_some_and(|value| !is_same(&value, &server)) {
                        this.removed.push(name);
                    }
                }
                this.set(SERVER, server);
            }
            (None, None) => this.set(PASSTHROUGH, "1"),
            (None, Some(_)) => {}
        }
        if let Some(opened) = opened
            && text(CORRELATION).is_none()
        {
            this.set(CORRELATION, &opened.id);
        }
        if let Some(compilers) = compilers {
            for (name, default) in [("CC", "cc"), ("CXX", "c++")] {
                this.call_by_recc(name, text(name).as_deref().unwrap_or(default));
            }
            if text(PROJECT_ROOT).is_none() {
                this.set(PROJECT_ROOT, &compilers.project_root);
            }
        }
        this
    }

    fn set(&mut self, name: &'static str, value: impl AsRef<OsStr>) {
        self.set.push((name, value.as_ref().to_owned()));
    }

    fn call_by_recc(&mut self, name: &'static str, compiler: &str) {
        let program = |word: &str| Path::new(word).file_name().map(OsStr::to_owned);
        let mut words = compiler.split_ascii_whitespace().peekable();
        let first = words.peek().and_then(|word| program(word));
        if first.as_deref() == Some(OsStr::new("recc")) {
            return;
        }
        let wrapper = WRAPPERS
            .into_iter()
            .find(|wrapper| first.as_deref() == Some(OsStr::new(wrapper)));
        if let Some(wrapper) = wrapper {
            self.notes.push(format!(
                "{name} is called without {wrapper}, which recc would not send anywhere"
            ));
            words.next();
        }
        let compiler: Vec<&str> = words.collect();
        self.set(name, format!("recc {}", compiler.join(" ")));
    }

    /// What the user should know about it.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Gives it to a command.
    pub fn apply(&self, command: &mut Command) {
        command.envs(self.set.iter().map(|(name, value)| (name, value)));
        for name in &self.removed {
            command.env_remove(name);
        }
    }
}

/// Whether two texts name the same server, as far as can be told.
fn is_same(one: &str, other: &str) -> bool {
    one == other
        || match (one.parse::<Address>(), other.parse::<Address>()) {
            (Ok(one), Ok(other)) => one == other,
            _ => false,
        }
}

/// The best of `addresses` for a local client, as recc writes it: Unix sockets, by which the kernel
/// knows who calls, before others, and TLS last.
fn server_of(addresses: &[String]) -> Option<String> {
    let addresses = addresses.iter().filter_map(|text| text.parse().ok());
    let rank = |address: &Address| match address {
        Address::Unix(_) => 0,
        Address::Abstract(_) => 1,
        Address::Tcp { .. } => 2,
        Address::Tls { .. } => 3,
        #[allow(unreachable_patterns, reason = "no other is a server's")]
        _ => 4,
    };
    let best: Address = addresses.min_by_key(rank)?;
    let reachable = |host: &str| match host {
        // To listen at all of a machine's addresses is not to be reached by them.
        "0.0.0.0" | "::" | "*" => "localhost".to_owned(),
        host if host.contains(':') => format!("[{host}]"),
        host => host.to_owned(),
    };
    match &best {
        Address::Tcp { host, port } => Some(format!("http://{}:{port}", reachable(host))),
        Address::Tls { host, port } => Some(format!("https://{}:{port}", reachable(host))),
        local => local.is_unix().then(|| local.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn opened(addresses: &[&str]) -> OpenedPage {
        OpenedPage {
            id: "the-run".to_owned(),
            addresses: addresses.iter().map(|&one| one.to_owned()).collect(),
            upstream: "unix:/casd.sock".to_owned(),
            planned: true,
            keeps_records: true,
            speculates: true,
        }
    }

    fn of(
        before: &[(&str, &str)],
        opened: Option<&OpenedPage>,
        recc: bool,
    ) -> (HashMap<String, String>, CommandEnvironment) {
        let variable = |name: &str| {
            let found = before.iter().find(|(one, _)| *one == name);
            found.map(|(_, value)| OsString::from(value))
        };
        let compilers = Compilers {
            project_root: "/p".into(),
        };
        let compilers = recc.then_some(&compilers);
        let environment = CommandEnvironment::new(&variable, opened, None, compilers);
        let set = environment.set.iter();
        let set = set.map(|(name, value)| ((*name).to_owned(), value.to_string_lossy().into()));
        (set.collect(), environment)
    }

    #[test]
    fn recc_is_led_to_primed_and_past_nothing() {
        let before = [
            ("RECC_CAS_SERVER", "http://elsewhere:1"),
            ("RECC_ACTION_CACHE_SERVER", "unix:/primed.sock"),
            ("RECC_SERVER", "unix:/casd.sock"),
        ];
        let page = opened(&["0.0.0.0:8980", "unix:/primed.sock"]);
        let (set, environment) = of(&before, Some(&page), false);
        assert_eq!(set["RECC_SERVER"], "unix:/primed.sock");
        assert_eq!(set["RECC_CORRELATED_INVOCATIONS_ID"], "the-run");
        assert_eq!(environment.removed, ["RECC_CAS_SERVER"]);
        assert!(environment.notes.is_empty(), "it goes where it went");
        let (set, environment) = of(
            &[("RECC_SERVER", "http://cluster:1")],
            Some(&opened(&["[::]:8980"])),
            false,
        );
        assert_eq!(set["RECC_SERVER"], "http://localhost:8980");
        let note = &environment.notes[0];
        assert!(note.contains("--upstream http://cluster:1"), "{note}");
    }

    #[test]
    fn a_users_own_correlation_id_and_project_root_stay() {
        let before = [
            ("RECC_CORRELATED_INVOCATIONS_ID", "mine"),
            ("RECC_PROJECT_ROOT", "/mine"),
        ];
        let (set, _) = of(&before, Some(&opened(&["unix:/p"])), true);
        assert!(!set.contains_key("RECC_CORRELATED_INVOCATIONS_ID"));
        assert!(!set.contains_key("RECC_PROJECT_ROOT"));
        let (set, _) = of(&[], Some(&opened(&["unix:/p"])), true);
        assert_eq!(set["RECC_PROJECT_ROOT"], "/p");
    }

    #[test]
    fn compilers_are_called_by_recc_once() {
        let page = opened(&["unix:/p"]);
        let (set, _) = of(&[], Some(&page), true);
        assert_eq!((&*set["CC"], &*set["CXX"]), ("recc cc", "recc c++"));
        let before = [("CC", "gcc-12 -m32"), ("CXX", "/opt/bin/recc clang++")];
        let (set, _) = of(&before, Some(&page), true);
        assert_eq!(set["CC"], "recc gcc-12 -m32");
        assert!(!set.contains_key("CXX"));
        let (set, environment) = of(&[("CC", "ccache gcc")], Some(&page), true);
        assert_eq!(set["CC"], "recc gcc");
        assert!(environment.notes[0].contains("ccache"));
        assert!(!of(&[], Some(&page), false).0.contains_key("CC"));
    }

    #[test]
    fn without_primed_recc_works_as_it_would_or_compiles_by_itself() {
        let (set, _) = of(&[("RECC_SERVER", "unix:/casd")], None, false);
        assert!(set.is_empty());
        let (set, _) = of(&[], None, true);
        assert_eq!(set["RECC_PASSTHROUGH"], "1");
        let upstream: Address = "grpc://cluster:80".parse().unwrap();
        let environment = CommandEnvironment::new(&|_| None, None, Some(&upstream), None);
        assert_eq!(
            environment.set,
            [("RECC_SERVER", "http://cluster:80".into())]
        );
    }

    #[test]
    fn the_top_of_a_project_is_where_its_version_control_is() {
        let scratch = tempfile::tempdir().unwrap();
        let below = scratch.path().join("a/b");
        std::fs::create_dir_all(&below).unwrap();
        std::fs::create_dir(scratch.path().join(".git")).unwrap();
        assert_eq!(top_of(&below), scratch.path());
    }
}
