//! Checks of the backend: whether it can be reached, what it can do, whether it executes, and what
//! time it is there.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio_stream::StreamExt;

use super::{Finding, Surroundings};
use crate::address::Address;
use crate::backend::Backend;
use crate::backend::remote::Remote;
use crate::backend::upstream::{Routes, Upstream};
use crate::cas::{Digest, DigestFunction};
use crate::reapi::build::bazel::semver::SemVer;
use crate::reapi::google::longrunning::{Operation, operation};
use crate::reapi::{Action, ActionResult, Command, Directory, ExecuteResponse, ServerCapabilities};
use crate::{clock, server};

/// How long the backend may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long it may take to execute a trivial action.
const EXECUTION: Duration = Duration::from_secs(30);
/// By how much clocks may differ, in milliseconds.
const SKEW: i64 = 2000;

/// All that can be learned from the backend.
pub async fn check(surroundings: &Surroundings) -> Vec<Finding> {
    let Ok(config) = &surroundings.settings else {
        // That finding is enough.
        return Vec::new();
    };
    // By way of the primed that runs, unless a backend was named: it may be one that only it can
    // reach, such as its embedded one.
    let mut config = config.clone();
    if surroundings.upstream.is_none() && surroundings.running.is_some() {
        if let Some(listen) = &surroundings.listen {
            config.upstream = listen.clone();
        }
    } else if surroundings.upstream.is_none() {
        return Vec::new();
    }
    let address = &config.upstream;
    if *address == Address::Embedded {
        return vec![Finding::ok(
            "backend",
            "primed is its own; start it to have that looked at, too",
        )];
    }
    let tls = server::upstream_tls(&config).map_err(|error| error.to_string());
    let routes = tls.and_then(|tls| {
        let routes = Routes::new(&config, tls, None);
        routes.map_err(|error| error.to_string())
    });
    let backend = match routes {
        Ok(routes) => Remote::new(Upstream::new(Arc::new(routes))),
        Err(reason) => {
            return vec![Finding::error(
                "backend",
                format!("{address} cannot be used: {reason}"),
                "correct the settings of primed that it names",
            )];
        }
    };
    let asked = tokio::time::timeout(ANSWER, backend.capabilities("")).await;
    let capabilities = match asked {
        Ok(Ok(capabilities)) => capabilities,
        Ok(Err(status)) => return vec![unreachable(address, status.message())],
        Err(_) => return vec![unreachable(address, "it does not answer in ten seconds")],
    };
    let shares = surroundings.variable("PRIMED_SHARE").is_some();
    let mut findings = of_capabilities(address, &capabilities, shares);
    if executes(&capabilities) {
        findings.extend(execution(&backend, &capabilities).await);
    }
    findings
}

fn unreachable(address: &Address, reason: &str) -> Finding {
    Finding::error(
        "backend",
        format!("{address} cannot be asked: {reason}"),
        "start it, or name the right one with --upstream; the instance name \"\" must be one of its own",
    )
}

fn executes(capabilities: &ServerCapabilities) -> bool {
    let execution = capabilities.execution_capabilities.as_ref();
    execution.is_some_and(|execution| execution.exec_enabled)
}

/// What a backend says it can do.
fn of_capabilities(
    address: &Address,
    capabilities: &ServerCapabilities,
    shares: bool,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let version = |version: &Option<SemVer>| {
        let version = version.clone().unwrap_or_default();
        format!("{}.{}", version.major, version.minor)
    };
    let (low, high) = (
        &capabilities.low_api_version,
        &capabilities.high_api_version,
    );
    let major = |version: &Option<SemVer>| version.as_ref().map_or(0, |version| version.major);
    if high.is_some() && !(major(low) <= 2 && 2 <= major(high)) {
        findings.push(Finding::error(
            "backend",
            format!(
                "{address} speaks REAPI {} to {}, not 2",
                version(low),
                version(high)
            ),
            "use a backend that speaks version 2 of the Remote Execution API",
        ));
    }
    if !executes(capabilities) {
        findings.push(Finding::error(
            "backend",
            format!("{address} executes nothing, so nothing can be primed"),
            "name a backend that does with --upstream or --execution-upstream",
        ));
    }
    let cache = capabilities.cache_capabilities.clone().unwrap_or_default();
    let functions: Vec<DigestFunction> = cache
        .digest_functions
        .iter()
        .filter_map(|function| DigestFunction::from_proto(*function))
        .collect();
    let named: Vec<String> = functions.iter().map(ToString::to_string).collect();
    if !functions.is_empty() && !functions.contains(&DigestFunction::Sha256) {
        findings.push(Finding::warning(
            "backend",
            format!("{address} does not hash by SHA256, as recc does unless told otherwise"),
            format!("export RECC_CAS_DIGEST_FUNCTION={}", named[0]),
        ));
    }
    let updates = cache
        .action_cache_update_capabilities
        .is_some_and(|update| update.update_enabled);
    if shares && !updates {
        findings.push(Finding::warning(
            "backend",
            format!("{address} takes no action results, so that --share cannot share records"),
            "allow updates of the action cache there, or do without --share",
        ));
    }
    let batch = match cache.max_batch_total_size_bytes {
        0 => "of any size".to_owned(),
        bytes => format!("of up to {} KiB", bytes / 1024),
    };
    findings.push(Finding::ok(
        "backend",
        format!(
            "{address} speaks REAPI {} to {}, hashes by {}, takes batches {batch}{}",
            version(low),
            version(high),
            named.join(", "),
            if updates { " and action results" } else { "" }
        ),
    ));
    findings
}

/// Has a trivial action executed, and compares clocks by it.
async fn execution(backend: &Remote, capabilities: &ServerCapabilities) -> Vec<Finding> {
    let functions = capabilities.cache_capabilities.as_ref();
    let mut functions = functions
        .into_iter()
        .flat_map(|cache| &cache.digest_functions)
        .filter_map(|function| DigestFunction::from_proto(*function));
    let function = functions.find(|function| *function == DigestFunction::Sha256);
    let function = function.or_else(|| functions.next()).unwrap_or_default();
    let began = clock::now_unix_ms();
    let executed = tokio::time::timeout(EXECUTION, execute(backend, function)).await;
    let ended = clock::now_unix_ms();
    match executed {
        Err(_) => vec![Finding::warning(
            "execution",
            format!("a trivial action was not executed in {EXECUTION:?}"),
            "the backend may be busy, or want platform properties (RECC_REMOTE_PLATFORM_…)",
        )],
        Ok(Err(reason)) => vec![Finding::warning(
            "execution",
            format!("a trivial action was not executed: {reason}"),
            "see what the backend logs; it may want platform properties (RECC_REMOTE_PLATFORM_…)",
        )],
        Ok(Ok(result)) => {
            let mut findings = vec![match result.exit_code {
                0 => Finding::ok(
                    "execution",
                    format!("a trivial action took {} ms", ended - began),
                ),
                code => Finding::warning(
                    "execution",
                    format!("the command `true` ended with exit code {code}"),
                    "see what the backend's workers lack; they must have /bin/sh",
                ),
            }];
            let metadata = result.execution_metadata.unwrap_or_default();
            if let Some(there) = metadata.worker_completed_timestamp {
                let there = there.seconds * 1000 + i64::from(there.nanos) / 1_000_000;
                findings.push(of_clocks(began, ended, there));
            }
            findings
        }
    }
}

async fn execute(backend: &Remote, function: DigestFunction) -> Result<ActionResult, String> {
    let words = ["/bin/sh", "-c", "true"];
    let command = function.of_message(&Command {
        arguments: words.map(str::to_owned).to_vec(),
        ..Command::default()
    });
    let root = function.of_message(&Directory::default());
    let proto = |digest: Digest| Some(digest.to_proto());
    let action = function.of_message(&Action {
        command_digest: proto(command.0),
        input_root_digest: proto(root.0),
        // So that it is executed now, and its result not kept.
        do_not_cache: true,
        ..Action::default()
    });
    let key = action.0;
    let said = |status: tonic::Status| status.message().to_owned();
    let written = backend.write_batch("", &[command, root, action]).await;
    written.map_err(said)?;
    let mut operations = backend.execute("", key, 0).await.map_err(said)?;
    while let Some(operation) = operations.next().await {
        let operation = Operation::decode(operation.map_err(said)?);
        let operation = operation.map_err(|error| error.to_string())?;
        match operation.result {
            Some(operation::Result::Response(any)) => {
                let response = ExecuteResponse::decode(any.value.as_ref());
                let response = response.map_err(|error| error.to_string())?;
                let status = response.status.unwrap_or_default();
                return response.result.ok_or(status.message);
            }
            Some(operation::Result::Error(status)) => return Err(status.message),
            None => {}
        }
    }
    Err("the backend broke off".to_owned())
}

/// Compares the time there when the action had ended with the time here: from before it was asked
/// for to after it was answered. All in milliseconds since 1970.
fn of_clocks(began: i64, ended: i64, there: i64) -> Finding {
    let off = match there {
        early if early < began => early - began,
        late if late > ended => late - ended,
        _ => 0,
    };
    if off.abs() <= SKEW {
        return Finding::ok("clock", "the backend's clock agrees with this one");
    }
    let (seconds, how) = (
        off.abs() / 1000,
        if off < 0 { "behind" } else { "ahead of" },
    );
    Finding::warning(
        "clock",
        format!("the backend's clock is {seconds} s {how} this one"),
        "set both by NTP; times in reports and explanations are wrong until then",
    )
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::tests::assert_finds;
    use super::*;
    use crate::reapi::{ActionCacheUpdateCapabilities, CacheCapabilities, ExecutionCapabilities};

    fn good() -> ServerCapabilities {
        let version = |minor| {
            Some(SemVer {
                major: 2,
                minor,
                ..SemVer::default()
            })
        };
        ServerCapabilities {
            cache_capabilities: Some(CacheCapabilities {
                digest_functions: vec![DigestFunction::Sha256.to_proto()],
                action_cache_update_capabilities: Some(ActionCacheUpdateCapabilities {
                    update_enabled: true,
                }),
                max_batch_total_size_bytes: 4_194_304,
                ..CacheCapabilities::default()
            }),
            execution_capabilities: Some(ExecutionCapabilities {
                exec_enabled: true,
                ..ExecutionCapabilities::default()
            }),
            low_api_version: version(1),
            high_api_version: version(12),
            ..ServerCapabilities::default()
        }
    }

    fn found(capabilities: &ServerCapabilities) -> Vec<Finding> {
        let address = "unix:/casd".parse().unwrap();
        of_capabilities(&address, capabilities, true)
    }

    #[test]
    fn a_backend_that_can_do_all_is_described() {
        let message = "2.1 to 2.12, hashes by SHA256, takes batches of up to 4096 KiB";
        assert_finds(&found(&good()), Verdict::Ok, message, "");
    }

    #[test]
    fn what_a_backend_cannot_do_is_found_with_what_to_do() {
        let first = |capabilities: ServerCapabilities| {
            let mut found = found(&capabilities);
            found.truncate(1);
            found
        };
        let mut none = good();
        none.execution_capabilities = None;
        let found = first(none);
        assert_finds(
            &found,
            Verdict::Error,
            "executes nothing",
            "--execution-upstream",
        );
        let mut old = good();
        old.low_api_version = None;
        old.high_api_version = Some(SemVer {
            major: 1,
            ..SemVer::default()
        });
        assert_finds(&first(old), Verdict::Error, "1.0", "version 2");
        let mut hashing = good();
        if let Some(cache) = &mut hashing.cache_capabilities {
            cache.digest_functions = vec![DigestFunction::Sha1.to_proto()];
        }
        let hint = "RECC_CAS_DIGEST_FUNCTION=SHA1";
        assert_finds(&first(hashing), Verdict::Warning, "SHA256", hint);
        let mut reading = good();
        if let Some(cache) = &mut reading.cache_capabilities {
            cache.action_cache_update_capabilities = None;
        }
        assert_finds(&first(reading), Verdict::Warning, "--share", "updates");
    }

    #[test]
    fn clocks_that_differ_are_found() {
        let of = |there| vec![of_clocks(10_000, 11_000, there)];
        assert_finds(&of(10_500), Verdict::Ok, "agrees", "");
        assert_finds(&of(12_500), Verdict::Ok, "agrees", "");
        assert_finds(&of(71_000), Verdict::Warning, "60 s ahead", "NTP");
        assert_finds(&of(0), Verdict::Warning, "10 s behind", "NTP");
    }
}
