//! `primed install` and `primed uninstall`: user units, settings, completions and manual pages where
//! they belong. What was written is noted down with its hash, so that nothing else is ever
//! overwritten or taken away.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::num::NonZero;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use sha2::{Digest as _, Sha256};

use super::{Cli, Failure, completions, exit_codes, man};
use crate::address::{Address, ListenAddress};
use crate::config::Environment;
use crate::local_socket::credentials;

const SOCKET_UNIT: &str = "primed.socket";
const SERVICE_UNIT: &str = "primed.service";
const CASD_UNIT: &str = "buildbox-casd.service";

/// How long calls wait for a casd that is started by the same call, in seconds.
const CASD_STARTS: u32 = 10;

/// Set up primed for this user: systemd units, primed.toml, completions and manual pages.
#[derive(Debug, Args)]
pub struct InstallArguments {
    /// Backend to write into primed.toml, if there is none yet; as for `primed serve`.
    #[arg(long, env = "PRIMED_UPSTREAM", value_name = "ADDR")]
    upstream: Option<String>,
    /// Also set up buildbox-casd as a service, and have primed forward to it.
    #[arg(long, env = "PRIMED_WITH_CASD", value_parser = clap::builder::FalseyValueParser::new())]
    with_casd: bool,
    /// Listen at once, not only after the next login.
    #[arg(long, env = "PRIMED_NOW", value_parser = clap::builder::FalseyValueParser::new())]
    now: bool,
    /// Say what would be done, and do nothing.
    #[arg(long, env = "PRIMED_DRY_RUN", value_parser = clap::builder::FalseyValueParser::new())]
    dry_run: bool,
}

/// Take away what `primed install` wrote; what was changed since is kept.
#[derive(Debug, Args)]
pub struct UninstallArguments {
    /// Say what would be done, and do nothing.
    #[arg(long, env = "PRIMED_DRY_RUN", value_parser = clap::builder::FalseyValueParser::new())]
    dry_run: bool,
}

/// Where things belong.
struct Places {
    config: PathBuf,
    data: PathBuf,
}

impl Places {
    fn of(environment: &Environment) -> Result<Self, Failure> {
        match (environment.config_home(), environment.data_home()) {
            (Some(config), Some(data)) => Ok(Places { config, data }),
            _ => {
                let message = "HOME is not set, so there is no place to install to; set it";
                Err(Failure::new(exit_codes::USAGE, message))
            }
        }
    }

    fn unit(&self, name: &str) -> PathBuf {
        self.config.join("systemd/user").join(name)
    }

    fn settings(&self) -> PathBuf {
        self.config.join("primed/primed.toml")
    }

    fn notes(&self) -> PathBuf {
        self.data.join("primed/installed.sha256")
    }

    fn zsh(&self) -> PathBuf {
        self.data.join("zsh/site-functions")
    }
}

pub(super) fn install(
    arguments: &InstallArguments,
    environment: &Environment,
) -> Result<(), Failure> {
    let places = Places::of(environment)?;
    let settings_exist = places.settings().exists();
    let upstream = match arguments.with_casd {
        true => Some(casd_address(environment)?),
        false => arguments.upstream.clone(),
    };
    if let Some(upstream) = &upstream {
        check_upstream(upstream)?;
    }
    let mut files = units(&places, arguments.with_casd)?;
    files.extend(documents(&places)?);
    let mut notes = Notes::read(places.notes())?;
    let settings = settings(upstream.as_deref(), arguments.with_casd);
    match std::fs::read(places.settings()) {
        // The user's own, from now on.
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            files.push((places.settings(), settings));
        }
        Err(error) => return Err(failed(&places.settings(), &error)),
    }
    for (path, content) in &files {
        notes.put(path, content, arguments.dry_run)?;
    }
    notes.save(arguments.dry_run)?;
    if settings_exist {
        let path = places.settings();
        println!("kept       {} (as it is)", path.display());
        if let Some(upstream) = upstream {
            println!("           for this backend it should say: upstream = \"{upstream}\"");
        }
    }
    let mut units = vec![SOCKET_UNIT];
    if arguments.with_casd {
        units.push(CASD_UNIT);
    }
    let enabled = enable(&units, arguments, environment);
    println!();
    println!("For recc, put this into your shell's profile:");
    println!("    export RECC_SERVER=unix:$XDG_RUNTIME_DIR/primed/remote-apis.sock");
    if std::env::var_os("SHELL").is_some_and(|shell| Path::new(&shell).ends_with("zsh")) {
        println!("For completions, put this into ~/.zshrc, before compinit:");
        println!("    fpath+=({})", places.zsh().display());
    }
    enabled
}

fn enable(
    units: &[&str],
    arguments: &InstallArguments,
    environment: &Environment,
) -> Result<(), Failure> {
    let mut commands = vec![vec!["daemon-reload"], [&["enable"], units].concat()];
    let in_the_way = match arguments.now && !arguments.dry_run {
        true => in_the_way(environment),
        false => None,
    };
    if arguments.now && in_the_way.is_none() {
        commands.push(vec!["start", SOCKET_UNIT]);
        // One that runs already is of another version, or has other settings.
        commands.push(vec!["try-restart", SERVICE_UNIT]);
    }
    for command in &commands {
        systemctl(command, arguments.dry_run).map_err(|reason| {
            let message = format!(
                "the files are in place, but `systemctl --user {}` did not work: {reason}; in a \
                 login session with systemd run: systemctl --user daemon-reload && systemctl \
                 --user enable --now {}",
                command.join(" "),
                units.join(" ")
            );
            Failure::new(exit_codes::FAILURE, message)
        })?;
    }
    match in_the_way {
        Some(what) => {
            let message = format!(
                "all is in place, but {what} listens at the service's address already; end that, \
                 then run: systemctl --user start {SOCKET_UNIT}"
            );
            Err(Failure::new(exit_codes::FAILURE, message))
        }
        None => Ok(()),
    }
}

/// Who listens where the service is to, if that is not the service: systemd would take the address
/// away from it.
fn in_the_way(environment: &Environment) -> Option<String> {
    let mut asked = Command::new("systemctl");
    let asked = asked.args(["--user", "--quiet", "is-active", SOCKET_UNIT]);
    let is_service = asked.status().is_ok_and(|status| status.success());
    let address = match environment.default_listen() {
        Ok(ListenAddress::At(Address::Unix(path))) if !is_service => path,
        _ => return None,
    };
    let (pid, _) = credentials(&UnixStream::connect(address).ok()?).ok()?;
    Some(pid.map_or_else(|| "a process".to_owned(), |pid| format!("process {pid}")))
}

pub(super) fn uninstall(
    arguments: &UninstallArguments,
    environment: &Environment,
) -> Result<(), Failure> {
    let places = Places::of(environment)?;
    let mut notes = Notes::read(places.notes())?;
    if notes.hashes.is_empty() {
        println!(
            "Nothing is installed: {} is not there",
            places.notes().display()
        );
        return Ok(());
    }
    let written = |unit: &&str| notes.hashes.contains_key(&places.unit(unit));
    let units = [SOCKET_UNIT, SERVICE_UNIT, CASD_UNIT];
    let units: Vec<&str> = units.into_iter().filter(|unit| written(unit)).collect();
    let disabled = match units.is_empty() {
        true => Ok(()),
        false => systemctl(
            &[&["disable", "--now"][..], &units].concat(),
            arguments.dry_run,
        ),
    };
    notes.take_away_all(arguments.dry_run)?;
    let disabled = disabled.and_then(|()| systemctl(&["daemon-reload"], arguments.dry_run));
    disabled.map_err(|reason| {
        let message = format!(
            "the files are gone, but systemd could not be told: {reason}; in a login session run: \
             systemctl --user stop {0}; systemctl --user disable {0}; systemctl --user daemon-reload",
            units.join(" ")
        );
        Failure::new(exit_codes::FAILURE, message)
    })
}

/// The units, with the paths of this machine.
fn units(places: &Places, with_casd: bool) -> Result<Vec<(PathBuf, Vec<u8>)>, Failure> {
    let program = std::env::current_exe().map_err(|error| {
        let message = format!("the path of this program is not known: {error}");
        Failure::new(exit_codes::FAILURE, message)
    })?;
    let service = include_str!("../../systemd/primed.service");
    let service = service.replace("%h/.cargo/bin/primed", &escaped(&program));
    let socket = include_str!("../../systemd/primed.socket");
    let mut units = vec![
        (places.unit(SOCKET_UNIT), socket.as_bytes().to_vec()),
        (places.unit(SERVICE_UNIT), service.into_bytes()),
    ];
    if with_casd {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let casd = include_str!("../../systemd/buildbox-casd.service")
            .replace(
                "/usr/bin/buildbox-casd",
                &escaped(&in_path("buildbox-casd")?),
            )
            .replace(
                "/usr/bin/buildbox-run-hosttools",
                &escaped(&in_path("buildbox-run-hosttools")?),
            )
            .replace("--jobs=4", &format!("--jobs={cores}"));
        units.push((places.unit(CASD_UNIT), casd.into_bytes()));
    }
    Ok(units)
}

/// Completions and manual pages.
fn documents(places: &Places) -> Result<Vec<(PathBuf, Vec<u8>)>, Failure> {
    let data = &places.data;
    let mut files = vec![
        (
            data.join("bash-completion/completions/primed"),
            completions::script(Shell::Bash),
        ),
        (
            places.zsh().join("_primed"),
            completions::script(Shell::Zsh),
        ),
        (
            data.join("fish/vendor_completions.d/primed.fish"),
            completions::script(Shell::Fish),
        ),
    ];
    let pages = man::pages().map_err(|error| Failure::new(exit_codes::FAILURE, error))?;
    let pages = pages.into_iter();
    files.extend(pages.map(|(name, page)| (data.join("man/man1").join(name), page)));
    Ok(files)
}

fn settings(upstream: Option<&str>, with_casd: bool) -> Vec<u8> {
    let mut text = "# Settings of primed: flags by their long names. `primed config` shows all of \
                    them,\n# `primed serve --help` what they mean.\n"
        .to_owned();
    if let Some(upstream) = upstream {
        text += &format!("\nupstream = {}\n", serde_json::Value::from(upstream));
    }
    if with_casd {
        text += &format!("# casd starts together with primed.\nconnect-wait = {CASD_STARTS}\n");
    }
    text.into_bytes()
}

fn casd_address(environment: &Environment) -> Result<String, Failure> {
    let runtime_dir = environment.runtime_dir.as_deref().ok_or_else(|| {
        let message = "XDG_RUNTIME_DIR is not set, so the socket of casd has no place; run this \
                       in a login session";
        Failure::new(exit_codes::USAGE, message)
    })?;
    Ok(format!(
        "unix:{}/buildbox-casd/casd.sock",
        runtime_dir.display()
    ))
}

/// Whether `primed serve` would take it.
fn check_upstream(upstream: &str) -> Result<(), Failure> {
    let flag = format!("--upstream={upstream}");
    match Cli::command().try_get_matches_from(["primed", "serve", &flag]) {
        Err(error) if error.kind() == ErrorKind::ValueValidation => {
            let text = error.to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text);
            Err(Failure::new(exit_codes::USAGE, text.trim_end()))
        }
        _ => Ok(()),
    }
}

/// A program's path as `ExecStart=` takes it.
fn escaped(program: &Path) -> String {
    let path = program.display().to_string();
    let path = path.replace('%', "%%").replace('$', "$$");
    match path.contains(|c: char| c.is_whitespace() || "\"'\\;".contains(c)) {
        true => format!("\"{}\"", path.replace('\\', "\\\\").replace('"', "\\\"")),
        false => path,
    }
}

fn in_path(program: &str) -> Result<PathBuf, Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found = std::env::split_paths(&path).map(|dir| dir.join(program));
    found
        .find(|path| path.is_absolute() && path.is_file())
        .ok_or_else(|| {
            let message =
                format!("there is no {program} in PATH; on Debian: apt-get install buildbox");
            Failure::new(exit_codes::FAILURE, message)
        })
}

/// Runs `systemctl --user`; what it said, if that fails.
fn systemctl(arguments: &[&str], dry_run: bool) -> Result<(), String> {
    let line = format!("systemctl --user {}", arguments.join(" "));
    if dry_run {
        println!("would run  {line}");
        return Ok(());
    }
    let output = Command::new("systemctl")
        .arg("--user")
        .args(arguments)
        .output();
    let output = output.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => "there is no systemctl on this machine".to_owned(),
        _ => error.to_string(),
    })?;
    if output.status.success() {
        println!("ran        {line}");
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said: Vec<&str> = said
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    match said.as_slice() {
        [] => Err(output.status.to_string()),
        said => Err(said.join(", ")),
    }
}

/// What `primed install` wrote, in the form of sha256sum(1).
struct Notes {
    path: PathBuf,
    hashes: BTreeMap<PathBuf, String>,
}

impl Notes {
    fn read(path: PathBuf) -> Result<Self, Failure> {
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(failed(&path, &error)),
        };
        let lines = text.lines().filter_map(|line| line.split_once("  "));
        let hashes = lines.map(|(hash, path)| (path.into(), hash.to_owned()));
        Ok(Notes {
            path,
            hashes: hashes.collect(),
        })
    }

    fn save(&self, dry_run: bool) -> Result<(), Failure> {
        let lines = self.hashes.iter();
        let text: String = lines
            .map(|(path, hash)| format!("{hash}  {}\n", path.display()))
            .collect();
        match dry_run {
            true => Ok(()),
            false => write(&self.path, text.as_bytes()),
        }
    }

    /// Writes a file, unless another has written or changed what stands there.
    fn put(&mut self, path: &Path, content: &[u8], dry_run: bool) -> Result<(), Failure> {
        let hash = hash(content);
        let there = read(path)?.map(|content| self::hash(&content));
        let shown = path.display();
        match (&there, self.hashes.get(path)) {
            (Some(there), _) if *there == hash => {
                println!("unchanged  {shown}");
                return Ok(());
            }
            (Some(there), Some(noted)) if there == noted => {}
            (Some(_), noted) => {
                let why = match noted {
                    Some(_) => "it was changed since",
                    None => "it was not written by primed",
                };
                println!("kept       {shown} ({why}; remove it to have it written anew)");
                return Ok(());
            }
            (None, _) => {}
        }
        if dry_run {
            println!("would write {shown}");
            return Ok(());
        }
        write(path, content)?;
        self.hashes.insert(path.to_owned(), hash);
        println!(
            "{} {shown}",
            if there.is_some() {
                "renewed   "
            } else {
                "wrote     "
            }
        );
        Ok(())
    }

    /// Removes what is as it was written, and in the end the notes.
    fn take_away_all(&mut self, dry_run: bool) -> Result<(), Failure> {
        for (path, noted) in &self.hashes {
            let shown = path.display();
            match read(path)? {
                None => {}
                Some(content) if hash(&content) != *noted => {
                    println!("kept       {shown} (it was changed since it was installed)");
                }
                Some(_) if dry_run => println!("would remove {shown}"),
                Some(_) => {
                    std::fs::remove_file(path).map_err(|error| failed(path, &error))?;
                    println!("removed    {shown}");
                }
            }
        }
        if !dry_run {
            std::fs::remove_file(&self.path).map_err(|error| failed(&self.path, &error))?;
            // Those that are empty now, and primed's own by their name.
            for file in self.hashes.keys().chain([&self.path]) {
                let directory = file.parent();
                let own = |directory: &&Path| directory.file_name() == Some(OsStr::new("primed"));
                if let Some(directory) = directory.filter(own) {
                    let _ = std::fs::remove_dir(directory);
                }
            }
        }
        Ok(())
    }
}

fn hash(content: &[u8]) -> String {
    let hash = Sha256::digest(content);
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, Failure> {
    match std::fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(path, &error)),
    }
}

fn write(path: &Path, content: &[u8]) -> Result<(), Failure> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let written = std::fs::create_dir_all(directory).and_then(|()| std::fs::write(path, content));
    written.map_err(|error| failed(path, &error))
}

fn failed(path: &Path, error: &io::Error) -> Failure {
    Failure::new(exit_codes::FAILURE, format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_programs_are_written_as_systemd_reads_them() {
        assert_eq!(escaped(Path::new("/usr/bin/primed")), "/usr/bin/primed");
        assert_eq!(escaped(Path::new("/a b/50%$x\"")), "\"/a b/50%%$$x\\\"\"");
    }

    #[test]
    fn the_units_hold_what_is_replaced_in_them() {
        let service = include_str!("../../systemd/primed.service");
        assert_eq!(service.matches("%h/.cargo/bin/primed").count(), 1);
        let casd = include_str!("../../systemd/buildbox-casd.service");
        for replaced in [
            "/usr/bin/buildbox-casd ",
            "/usr/bin/buildbox-run-hosttools ",
            "--jobs=4",
        ] {
            assert_eq!(casd.matches(replaced).count(), 1, "{replaced}");
        }
    }
}
