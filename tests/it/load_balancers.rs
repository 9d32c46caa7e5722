//! Real load balancers between primed and buildbox-casd. They limit the calls of a connection, and end
//! it after so many, with calls under way: no client may notice.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot set the stage fails"
)]

use std::path::Path;
use std::process::Command;

use crate::project::Project;
use crate::support::{Casd, Daemon, Primed, connects, installed, scratch, tool, wait_until};

const JOBS: usize = 4;
const UNITS: usize = 20;
/// Clients that upload at a time, and how many files each of them uploads.
const CLIENTS: u8 = 4;
const FILES: u8 = 12;
/// More than nginx takes of a call at which it has not looked.
const FILE: usize = 1024 * 1024;

/// nginx before `casd`, which takes eight calls at a time on a connection, and ends it after twenty.
fn nginx(directory: &Path, casd: &Casd) -> (Daemon, String) {
    let at = directory.display();
    let backend = casd.address();
    // One process, for workers would outlive it; as another user it could not reach casd's socket.
    let user = match rustix::process::geteuid().is_root() {
        true => "user root;",
        false => "",
    };
    let settings = format!(
        "{user}
        daemon off;
        master_process off;
        pid {at}/nginx.pid;
        error_log stderr warn;
        events {{ }}
        http {{
            access_log off;
            client_max_body_size 0;
            client_body_temp_path {at}/nginx-body;
            proxy_temp_path {at}/nginx-proxy;
            fastcgi_temp_path {at}/nginx-fastcgi;
            uwsgi_temp_path {at}/nginx-uwsgi;
            scgi_temp_path {at}/nginx-scgi;
            http2_max_concurrent_streams 8;
            keepalive_requests 20;
            upstream casd {{ server {backend}; keepalive 16; }}
            server {{
                listen unix:{at}/nginx.sock http2;
                location / {{ grpc_pass grpc://casd; }}
            }}
        }}"
    );
    let file = directory.join("nginx.conf");
    std::fs::write(&file, settings).unwrap();
    let mut command = Command::new(installed("proxies", "proxies/bin/nginx"));
    command.arg("-c").arg(file).args(["-e", "stderr"]);
    let mut daemon = Daemon::start(&mut command, directory.join("nginx.log"));
    let socket = directory.join("nginx.sock");
    wait_until("nginx listens", || {
        assert!(daemon.is_running(), "nginx ended: {}", daemon.log());
        connects(&socket)
    });
    (daemon, format!("unix:{}", socket.display()))
}

#[test]
fn builds_and_uploads_by_way_of_one_that_ends_connections_go_on() {
    let scratch = scratch();
    let casd = Casd::start(scratch.path(), JOBS);
    let (_nginx, address) = nginx(scratch.path(), &casd);
    let primed = Primed::start(scratch.path(), &address);

    let project = Project::of_units(scratch.path(), &primed.address(), UNITS);
    project.build();
    primed.wait();
    project.rebuild();

    let uploads = (0..CLIENTS).map(|client| {
        let directory = scratch.path().join(format!("files-{client}"));
        std::fs::create_dir(&directory).unwrap();
        let files = (0..FILES).map(|file| {
            let path = directory.join(file.to_string());
            std::fs::write(&path, [client, file].repeat(FILE / 2)).unwrap();
            path
        });
        let mut command = Command::new(tool("casupload"));
        command
            .arg(format!("--remote={}", primed.address()))
            .args(files);
        let log = scratch.path().join(format!("upload-{client}.log"));
        Daemon::start(&mut command, log)
    });
    let uploads: Vec<Daemon> = uploads.collect();
    for mut upload in uploads {
        assert_eq!(upload.exit_code(), Some(0), "{}", upload.log());
    }
    let log = primed.daemon.log();
    assert!(
        !log.contains(" WARN ") && !log.contains("panicked"),
        "{log}"
    );
}
