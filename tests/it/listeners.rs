//! How clients come in and how upstreams are reached: TLS on both sides, sockets of the service
//! manager, and limits on who may connect.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::io::Read;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use primed::digest::Digest;
use rustix::process::Signal;

use crate::certificates::{Authority, Credentials, Issued};
use crate::conformance::assert_same;
use crate::grpcio::{AnyServer, Grpcio, Session, hex, target};
use crate::project::Project;
use crate::support::{Casd, Daemon, PATIENCE, Primed, connects, scratch, tool, wait_until};

const ECHO: &str = "/some.Service/Echo";
/// An upstream that need not be there.
const NOBODY: &str = "unix:/nonexistent/upstream.sock";
/// A user that no test runs as.
const STRANGER: &str = "4000000000";
/// Names of what listens on this machine.
const HERE: [&str; 2] = ["127.0.0.1", "localhost"];

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A primed that listens for TLS, beside its Unix socket.
fn start_tls(directory: &Path, upstream: &str, identity: &Issued, more: &[&str]) -> Primed {
    let listen = format!(
        "unix:{}/primed.sock,grpcs://127.0.0.1:0",
        directory.display()
    );
    let mut arguments = vec!["--listen", &listen];
    arguments.extend(["--tls-cert", text(&identity.certificate)]);
    arguments.extend(["--tls-key", text(&identity.key)]);
    arguments.extend(more);
    Primed::start_with(directory, upstream, &arguments)
}

/// Where clients of gRPC find the TLS listener.
fn tls_target(primed: &Primed) -> String {
    format!("127.0.0.1:{}", primed.daemon.port("grpcs://"))
}

/// How one call ends for a new client.
fn echo(credentials: &Credentials, client: Grpcio, target: &str) -> (String, String) {
    let ended = Session::start_with(credentials, client, target).call_unconnected(ECHO, b"hello");
    if ended.code == "OK" {
        assert_eq!(ended.messages, [hex(b"hello")]);
    }
    (ended.code, ended.details)
}

fn assert_same_through(client: Grpcio, server: Grpcio) {
    let scratch = scratch();
    let at = scratch.path();
    let ours = Authority::create(at, "ours");
    let theirs = Authority::create(at, "theirs");
    let listener = ours.issue(at, "listener", &HERE);
    let upstream = theirs.issue(at, "upstream", &HERE);
    let server = AnyServer::start_tls(at, server, &upstream, Some(&ours.file));
    let shown = ours.issue(at, "shown", &["primed"]);
    let primed = start_tls(
        at,
        &format!("grpcs://127.0.0.1:{}", server.tls_port()),
        &listener,
        &[
            "--tls-client-ca",
            text(&theirs.file),
            "--upstream-ca",
            text(&theirs.file),
            "--upstream-cert",
            text(&shown.certificate),
            "--upstream-key",
            text(&shown.key),
        ],
    );
    let known = theirs.issue(at, "client", &["client"]);
    let credentials = ours.trusted().showing(&known);
    let calls: (&str, &[&str]) = ("calls.py", &[]);
    let clear = Credentials::default();
    let direct = client.transcript(&clear, calls, server.target(), &server);
    let proxied = client.transcript(&credentials, calls, &tls_target(&primed), &server);
    assert_eq!(direct["unary_unary"]["code"], "StatusCode.OK");
    assert_eq!(primed.status()["upstream"]["state"], "connected");
    assert_same(&direct, &proxied);
}

#[test]
fn a_new_client_and_server_see_of_each_other_by_mutual_tls_what_they_see_without_primed() {
    assert_same_through(Grpcio::New, Grpcio::New);
}

#[test]
fn an_old_client_and_server_see_of_each_other_by_mutual_tls_what_they_see_without_primed() {
    assert_same_through(Grpcio::Old, Grpcio::Old);
}

#[test]
fn recc_builds_by_tls_and_only_with_a_certificate_by_mutual_tls() {
    let scratch = scratch();
    let at = scratch.path();
    let authority = Authority::create(at, "ours");
    let listener = authority.issue(at, "listener", &HERE);
    let client = authority.issue(at, "client", &["client"]);
    let casd = Casd::start(at, 2);
    for mutual in [false, true] {
        let directory = at.join(if mutual { "mutual" } else { "plain" });
        std::fs::create_dir(&directory).unwrap();
        let client_ca = ["--tls-client-ca", text(&authority.file)];
        let more: &[&str] = if mutual { &client_ca } else { &[] };
        let primed = start_tls(&directory, &casd.address(), &listener, more);
        // recc 1.4.30 takes `grpcs://` for a host's name.
        let server = format!("https://{}", tls_target(&primed));
        let project = Project::of_units(&directory, &server, 6)
            .with("RECC_SERVER_CERT", text(&authority.file));
        let project = if mutual {
            let refused = project.make(&[]);
            assert!(!refused.status.success(), "{refused:?}");
            project
                .with("RECC_CLIENT_CERT", text(&client.certificate))
                .with("RECC_CLIENT_KEY", text(&client.key))
        } else {
            project
        };
        project.build();
        assert_eq!(
            project.run(),
            11,
            "six units, five of which count once more"
        );
    }
}

#[test]
fn casd_stores_by_mutual_tls_what_it_is_given() {
    let scratch = scratch();
    let at = scratch.path();
    let authority = Authority::create(at, "ours");
    let listener = authority.issue(at, "listener", &HERE);
    let client = authority.issue(at, "client", &["client"]);
    let casd = Casd::start(at, 1);
    let mutual = ["--tls-client-ca", text(&authority.file)];
    let primed = start_tls(at, &casd.address(), &listener, &mutual);
    let socket = at.join("near.sock");
    let mut command = Command::new(tool("buildbox-casd"));
    command
        .arg(format!("--cas-remote=https://{}", tls_target(&primed)))
        .arg(format!("--cas-server-cert={}", text(&authority.file)))
        .arg(format!("--cas-client-cert={}", text(&client.certificate)))
        .arg(format!("--cas-client-key={}", text(&client.key)))
        .arg(format!("--bind=unix:{}", text(&socket)))
        .arg(at.join("near"));
    let mut near = Daemon::start(&mut command, at.join("near.log"));
    wait_until("the nearer casd listens", || {
        assert!(near.is_running(), "it ended: {}", near.log());
        connects(&socket)
    });
    let file = at.join("content.txt");
    std::fs::write(&file, "by way of TLS").unwrap();
    let uploaded = Command::new(tool("casupload"))
        .arg(format!("--remote=unix:{}", text(&socket)))
        .arg(&file)
        .output()
        .unwrap();
    assert!(uploaded.status.success(), "{uploaded:?}");
    let digest = Digest::of(b"by way of TLS").to_string();
    let downloaded = Command::new(tool("casdownload"))
        .arg(format!("--remote={}", casd.address()))
        .arg(format!("--file-digest={digest}"))
        .arg(format!("--destination-dir={}", text(&at.join("down"))))
        .output()
        .unwrap();
    assert!(downloaded.status.success(), "{downloaded:?}");
    assert_eq!(primed.status()["upstream"]["state"], "connected");
}

#[test]
fn clients_that_trust_another_authority_or_show_no_good_certificate_are_not_served() {
    let scratch = scratch();
    let at = scratch.path();
    let ours = Authority::create(at, "ours");
    let other = Authority::create(at, "other");
    let listener = ours.issue(at, "listener", &HERE);
    let known = ours.issue(at, "known", &["client"]);
    let unknown = other.issue(at, "unknown", &["client"]);
    let server = AnyServer::start(at, Grpcio::New);
    let mutual = ["--tls-client-ca", text(&ours.file)];
    let primed = start_tls(at, server.address(), &listener, &mutual);
    let target = tls_target(&primed);
    for client in [Grpcio::Old, Grpcio::New] {
        let code = |credentials| echo(&credentials, client, &target).0;
        assert_eq!(code(ours.trusted().showing(&known)), "OK");
        assert_eq!(code(ours.trusted()), "UNAVAILABLE", "without one");
        assert_eq!(code(ours.trusted().showing(&unknown)), "UNAVAILABLE");
        assert_eq!(code(other.trusted().showing(&known)), "UNAVAILABLE");
        assert_eq!(code(Credentials::default()), "UNAVAILABLE", "in the clear");
    }
}

#[test]
fn certificates_are_replaced_while_connections_run_and_a_broken_one_is_not_used() {
    let scratch = scratch();
    let at = scratch.path();
    let old = Authority::create(at, "old");
    let new = Authority::create(at, "new");
    let listener = old.issue(at, "listener", &HERE);
    let server = AnyServer::start(at, Grpcio::New);
    let primed = start_tls(at, server.address(), &listener, &[]);
    let target = tls_target(&primed);
    let code = |authority: &Authority| echo(&authority.trusted(), Grpcio::New, &target).0;
    let mut session = Session::start_with(&old.trusted(), Grpcio::New, &target);
    assert_eq!(session.call(ECHO, b"1").code, "OK");

    new.issue(at, "listener", &HERE);
    assert_eq!(code(&new), "OK");
    assert_eq!(code(&old), "UNAVAILABLE");

    std::fs::write(&listener.key, "no key").unwrap();
    assert_eq!(code(&new), "OK");
    assert_eq!(code(&new), "OK");
    let log = primed.daemon.log();
    assert_eq!(log.matches("no private key").count(), 1, "{log}");

    let ended = session.call(ECHO, b"2");
    assert_eq!((ended.code.as_str(), ended.connected), ("OK", 1));

    old.issue(at, "listener", &HERE);
    assert_eq!(code(&old), "OK", "mended");
}

#[test]
fn a_tls_client_that_stays_silent_stops_nobody_and_is_dropped() {
    let scratch = scratch();
    let at = scratch.path();
    let authority = Authority::create(at, "ours");
    let listener = authority.issue(at, "listener", &HERE);
    let server = AnyServer::start(at, Grpcio::New);
    let primed = start_tls(at, server.address(), &listener, &[]);
    let target = tls_target(&primed);
    let mut silent: Vec<_> = (0..20)
        .map(|_| TcpStream::connect(&target).unwrap())
        .collect();
    assert_eq!(echo(&authority.trusted(), Grpcio::New, &target).0, "OK");
    for stream in &mut silent {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(stream.read(&mut [0; 64]).unwrap(), 0, "it is closed");
    }
}

#[test]
fn what_cannot_be_used_for_tls_is_named_with_its_flag_and_a_hint() {
    let scratch = scratch();
    let at = scratch.path();
    let authority = Authority::create(at, "ours");
    let issued = authority.issue(at, "listener", &HERE);
    let other = authority.issue(at, "other", &HERE);
    let empty = at.join("empty.pem");
    std::fs::write(&empty, "").unwrap();
    let broken = at.join("broken.pem");
    let certificate = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    std::fs::write(&broken, certificate).unwrap();
    let missing = at.join("missing.pem");
    let (cert, key, ca) = (
        text(&issued.certificate),
        text(&issued.key),
        text(&authority.file),
    );
    let (empty, broken, missing) = (text(&empty), text(&broken), text(&missing));
    let refused = |arguments: &[&str], words: &[&str]| {
        let output = Primed::command()
            .env("XDG_RUNTIME_DIR", at)
            .env("HOME", at)
            .arg("serve")
            .args(arguments)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{arguments:?}: {said}");
        for word in words {
            assert!(said.contains(word), "'{word}' is not in: {said}");
        }
        assert!(!at.join("primed").exists(), "nothing was bound");
    };
    let listen = ["--upstream", NOBODY, "--listen", "grpcs://127.0.0.1:0"];
    let listener = |more: &[&str], words: &[&str]| refused(&[&listen, more].concat(), words);
    listener(&[], &["127.0.0.1:0", "--tls-cert", "--tls-key"]);
    listener(&["--tls-cert", cert], &["--tls-key"]);
    listener(&["--tls-client-ca", ca], &["--tls-cert"]);
    listener(
        &["--tls-cert", missing, "--tls-key", key],
        &["--tls-cert", "missing.pem", "No such file"],
    );
    listener(
        &["--tls-cert", empty, "--tls-key", key],
        &["--tls-cert", "empty.pem", "no certificate"],
    );
    listener(
        &["--tls-cert", broken, "--tls-key", key],
        &["--tls-cert", "broken.pem", "certificate"],
    );
    listener(
        &["--tls-cert", cert, "--tls-key", cert],
        &["--tls-key", "listener.pem", "no private key", "unencrypted"],
    );
    listener(
        &["--tls-cert", cert, "--tls-key", text(&other.key)],
        &["--tls-key", "other-key.pem", "does not belong to", cert],
    );
    listener(
        &["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", key],
        &["--tls-client-ca", "no certificate"],
    );
    refused(
        &["--upstream", NOBODY, "--tls-cert", cert, "--tls-key", key],
        &["--tls-cert", "no effect", "--listen grpcs://"],
    );
    refused(
        &["--upstream", NOBODY, "--upstream-ca", ca],
        &["--upstream-ca", "no effect", "grpcs://"],
    );
    refused(
        &["--upstream", NOBODY, "--admin", "grpcs://127.0.0.1:0"],
        &["--admin", "TLS"],
    );
    let upstream = |more: &[&str], words: &[&str]| {
        refused(
            &[&["--upstream", "grpcs://localhost"], more].concat(),
            words,
        );
    };
    upstream(&["--upstream-ca", empty], &["--upstream-ca", "empty.pem"]);
    upstream(&["--upstream-cert", cert], &["--upstream-key"]);
    upstream(
        &["--upstream-cert", cert, "--upstream-key", text(&other.key)],
        &["--upstream-key", "does not belong to"],
    );
    upstream(
        &["--upstream-ca", ca, "--upstream-server-name", "no name"],
        &["--upstream-server-name", "no name", "DNS"],
    );
}

/// What a client hears of an upstream that primed cannot use.
fn why_not(directory: &Path, upstream: &str, arguments: &[&str]) -> String {
    let primed = Primed::start_with(directory, upstream, arguments);
    let (code, details) = echo(&Credentials::default(), Grpcio::New, &primed.address());
    assert_eq!(code, "UNAVAILABLE", "{details}");
    details
}

#[test]
fn an_upstream_is_verified_and_what_is_amiss_comes_with_a_hint() {
    let scratch = scratch();
    let at = scratch.path();
    let ours = Authority::create(at, "ours");
    let other = Authority::create(at, "other");
    let upstream = ours.issue(at, "upstream", &["cluster.example"]);
    let client = ours.issue(at, "client", &["primed"]);
    let server = AnyServer::start_tls(at, Grpcio::New, &upstream, Some(&ours.file));
    let address = format!("https://127.0.0.1:{}", server.tls_port());
    let named = ["--upstream-server-name", "cluster.example"];
    let ca = ["--upstream-ca", text(&ours.file)];
    let wrong_ca = ["--upstream-ca", text(&other.file)];
    let (cert, key) = (text(&client.certificate), text(&client.key));
    let identity = ["--upstream-cert", cert, "--upstream-key", key];
    let said = |arguments: &[&[&str]]| why_not(at, &address, &arguments.concat());
    for (details, words) in [
        (said(&[&identity, &named, &wrong_ca]), "--upstream-ca"),
        (said(&[&identity, &ca]), "--upstream-server-name"),
    ] {
        assert!(details.contains(words), "{words}: {details}");
    }
    // TLS 1.3 tells a client only after the handshake that its certificate was wanted.
    said(&[&named, &ca]);
    let plain = format!("127.0.0.1:{}", server.tls_port());
    why_not(at, &plain, &[]);

    let primed = Primed::start_with(at, &address, &[&identity[..], &named, &ca].concat());
    let (code, details) = echo(&Credentials::default(), Grpcio::New, &primed.address());
    assert_eq!(code, "OK", "{details}");
}

#[test]
fn what_upstreams_are_verified_by_is_replaced_without_a_restart() {
    let scratch = scratch();
    let at = scratch.path();
    let ours = Authority::create(at, "ours");
    let trusted = at.join("trusted.pem");
    std::fs::copy(&Authority::create(at, "other").file, &trusted).unwrap();
    let upstream = ours.issue(at, "upstream", &HERE);
    let server = AnyServer::start_tls(at, Grpcio::New, &upstream, None);
    let address = format!("grpcs://127.0.0.1:{}", server.tls_port());
    let primed = Primed::start_with(at, &address, &["--upstream-ca", text(&trusted)]);
    let mut session = Session::start(Grpcio::New, &primed.address());
    assert_eq!(session.call(ECHO, b"1").code, "UNAVAILABLE");
    std::fs::copy(&ours.file, &trusted).unwrap();
    assert_eq!(session.call(ECHO, b"2").code, "OK");
}

/// A primed that is started with sockets, as systemd starts it.
fn passed(directory: &Path, sockets: &[&str], upstream: &str, arguments: &[&str]) -> Daemon {
    let mut command = Grpcio::Old.python("passed.py");
    command
        .args(sockets)
        .args(["--", env!("CARGO_BIN_EXE_primed"), "serve"])
        .args(["--upstream", upstream])
        .args(arguments)
        .env("XDG_RUNTIME_DIR", directory.join("run"))
        .env("HOME", directory);
    Daemon::start(&mut command, directory.join("passed.log"))
}

/// Waits until primed listens at what `passed` gave it.
fn until_listening(primed: &mut Daemon) {
    wait_until("primed listens", || {
        assert!(primed.is_running(), "primed ended: {}", primed.log());
        primed.log().contains("listening")
    });
}

#[test]
fn sockets_of_the_service_manager_are_used_and_left_behind() {
    let scratch = scratch();
    let at = scratch.path();
    let server = AnyServer::start(at, Grpcio::New);
    let socket = at.join("passed.sock");
    let rpc = format!("rpc={}", text(&socket));
    for listen in [&[][..], &["--listen", "systemd"]] {
        let mut primed = passed(at, &[&rpc, "net=tcp"], server.address(), listen);
        until_listening(&mut primed);
        let by_tcp = format!("127.0.0.1:{}", primed.port(""));
        for target in [target(&socket), by_tcp] {
            let (code, details) = echo(&Credentials::default(), Grpcio::New, &target);
            assert_eq!(code, "OK", "{details}");
        }
        assert!(!at.join("run/primed/remote-apis.sock").exists());
        primed.signal(Signal::TERM);
        assert_eq!(primed.exit_code(), Some(0));
        assert!(socket.exists(), "it is the service manager's");
        std::fs::remove_file(&socket).unwrap();
    }
}

#[test]
fn sockets_of_the_service_manager_can_be_chosen_by_name() {
    let scratch = scratch();
    let at = scratch.path();
    let server = AnyServer::start(at, Grpcio::New);
    let (one, two) = (at.join("one.sock"), at.join("two.sock"));
    let sockets = [format!("one={}", text(&one)), format!("two={}", text(&two))];
    let sockets = [sockets[0].as_str(), sockets[1].as_str()];
    let listen = ["--listen", "systemd:two"];
    let mut primed = passed(at, &sockets, server.address(), &listen);
    until_listening(&mut primed);
    assert_eq!(
        echo(&Credentials::default(), Grpcio::New, &target(&two)).0,
        "OK"
    );
    assert!(!connects(&one), "the other one is closed");
    let log = primed.log();
    assert!(
        log.contains("no --listen takes") && log.contains("one"),
        "{log}"
    );
}

#[test]
fn tcp_sockets_of_the_service_manager_speak_tls_where_there_is_a_certificate() {
    let scratch = scratch();
    let at = scratch.path();
    let authority = Authority::create(at, "ours");
    let listener = authority.issue(at, "listener", &HERE);
    let server = AnyServer::start(at, Grpcio::New);
    let (cert, key) = (text(&listener.certificate), text(&listener.key));
    let arguments = ["--tls-cert", cert, "--tls-key", key];
    let mut primed = passed(at, &["net=tcp"], server.address(), &arguments);
    until_listening(&mut primed);
    let target = format!("127.0.0.1:{}", primed.port("grpcs://"));
    assert_eq!(echo(&authority.trusted(), Grpcio::New, &target).0, "OK");
    let in_the_clear = Credentials::default();
    assert_eq!(echo(&in_the_clear, Grpcio::New, &target).0, "UNAVAILABLE");
}

#[test]
fn sockets_that_were_not_passed_or_cannot_be_used_are_named() {
    let scratch = scratch();
    let at = scratch.path();
    let socket = at.join("rpc.sock");
    let rpc = format!("rpc={}", text(&socket));
    let upstream = format!("unix:{}", text(&socket));
    for (sockets, upstream, listen, words) in [
        (&[][..], NOBODY, "systemd", &["systemd", ".socket"][..]),
        (
            &[rpc.as_str()],
            NOBODY,
            "systemd:other",
            &["systemd:other", "rpc"],
        ),
        (&["net=udp"], NOBODY, "systemd", &["net", "ListenStream="]),
        (&["net=connected"], NOBODY, "systemd", &["net", "Accept=no"]),
        (&[rpc.as_str()], &upstream, "systemd", &["itself"]),
    ] {
        let mut primed = passed(at, sockets, upstream, &["--listen", listen]);
        assert_eq!(primed.exit_code(), Some(64), "{}", primed.log());
        for word in words {
            assert!(primed.log().contains(word), "{word}: {}", primed.log());
        }
        let _ = std::fs::remove_file(&socket);
    }
}

#[test]
fn users_who_are_not_listed_are_sent_away_and_named_once() {
    let scratch = scratch();
    let at = scratch.path();
    let server = AnyServer::start(at, Grpcio::New);
    let primed = Primed::start_with(at, server.address(), &["--allow-uid", STRANGER]);
    for _ in 0..2 {
        let mut stream = UnixStream::connect(primed.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(stream.read(&mut [0; 64]).unwrap(), 0, "it is closed");
    }
    let log = primed.daemon.log();
    assert_eq!(log.matches("--allow-uid").count(), 1, "{log}");
    let mode = |name: &str| at.join(name).metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("primed.sock"), 0o666, "the list decides");
    assert_eq!(mode("admin.sock"), 0o600, "this is for the owner alone");
    assert!(primed.status().is_object());
}

#[test]
fn users_who_are_listed_are_served() {
    let scratch = scratch();
    let at = scratch.path();
    let server = AnyServer::start(at, Grpcio::New);
    let own = rustix::process::geteuid().as_raw();
    let list = format!("{STRANGER},{own}");
    let primed = Primed::start_with(at, server.address(), &["--allow-uid", &list]);
    let (code, details) = echo(&Credentials::default(), Grpcio::New, &primed.address());
    assert_eq!(code, "OK", "{details}");
}

#[test]
fn a_client_beyond_the_limit_waits_until_another_has_gone() {
    let scratch = scratch();
    let at = scratch.path();
    let server = AnyServer::start(at, Grpcio::New);
    let primed = Primed::start_with(at, server.address(), &["--max-connections", "1"]);
    let mut first = Session::start(Grpcio::New, &primed.address());
    assert_eq!(first.call(ECHO, b"first").code, "OK");
    let mut second = Session::start(Grpcio::Old, &primed.address());
    second.hold(ECHO);
    wait_until("the limit is reached", || {
        primed.daemon.log().contains("--max-connections")
    });
    assert_eq!(first.call(ECHO, b"still served").code, "OK");
    drop(first);
    second.release();
    assert_eq!(second.ended().code, "OK");
}

#[test]
fn primed_may_open_as_many_files_as_the_system_lets_it() {
    let scratch = scratch();
    let at = scratch.path();
    let script = "ulimit -Sn 100; exec \"$0\" serve --upstream \"$1\"";
    let mut command = Command::new("sh");
    command
        .args(["-c", script, env!("CARGO_BIN_EXE_primed"), NOBODY])
        .env("XDG_RUNTIME_DIR", at.join("run"))
        .env("HOME", at);
    let mut primed = Daemon::start(&mut command, at.join("primed.log"));
    until_listening(&mut primed);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", primed.pid())).unwrap();
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let numbers: Vec<_> = files.unwrap().split_whitespace().skip(3).collect();
    assert_ne!(numbers[0], "100");
    assert_eq!(numbers[0], numbers[1], "soft and hard");
}
