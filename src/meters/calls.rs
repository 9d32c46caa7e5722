//! Calls of clients by method and status. Methods that are none of a known service's count as one,
//! whatever their names: a client cannot add lines to the page.
//!
//! A call costs four additions, two when it begins and two when it is over.

use super::{Counter, Level, Present};

/// The known methods, each as its service is called in short, and by its own name.
const METHODS: [(&str, &str); METHOD_COUNT] = [
    ("other", "other"),
    ("ActionCache", "GetActionResult"),
    ("ActionCache", "UpdateActionResult"),
    ("Execution", "Execute"),
    ("Execution", "WaitExecution"),
    ("Operations", "other"),
    ("Operations", "CancelOperation"),
    ("Capabilities", "GetCapabilities"),
    ("ContentAddressableStorage", "other"),
    ("ContentAddressableStorage", "FindMissingBlobs"),
    ("ContentAddressableStorage", "BatchUpdateBlobs"),
    ("ContentAddressableStorage", "BatchReadBlobs"),
    ("ContentAddressableStorage", "GetTree"),
    ("LocalContentAddressableStorage", "other"),
    ("ByteStream", "Read"),
    ("ByteStream", "Write"),
    ("ByteStream", "QueryWriteStatus"),
    ("Health", "other"),
    ("Asset", "other"),
];
const METHOD_COUNT: usize = 19;

/// gRPC's statuses, by number; then what has none: the client or the upstream broke the call off.
const STATUSES: [&str; 18] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
    "none",
];
const NO_STATUS: usize = STATUSES.len() - 1;

/// All calls.
#[derive(Debug)]
pub struct Calls {
    by_method: [OfMethod; METHOD_COUNT],
    /// Of whatever method.
    pub all: Level,
}

#[derive(Debug)]
struct OfMethod {
    begun: Counter,
    ended: [Counter; STATUSES.len()],
}

/// The calls of one method, as they were at one time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Its service in short, or `other`.
    pub service: &'static str,
    /// Its name, or `other`.
    pub method: &'static str,
    /// How many are not over.
    pub in_flight: u64,
    /// How many have ended with each status; those with none are left out.
    pub ended: Vec<(&'static str, u64)>,
}

/// A call that counts as being in flight until this is dropped.
#[derive(Debug)]
pub struct CallMeter {
    calls: &'static OfMethod,
    status: usize,
    _present: Present,
}

impl Calls {
    pub(super) const fn new() -> Self {
        Calls {
            by_method: [const {
                OfMethod {
                    begun: Counter::new(),
                    ended: [const { Counter::new() }; STATUSES.len()],
                }
            }; METHOD_COUNT],
            all: Level::new(),
        }
    }

    /// A call of the method at `path` (`/SERVICE/METHOD`) begins.
    pub fn begin(&'static self, path: &str) -> CallMeter {
        let calls = &self.by_method[index(path)];
        calls.begun.add(1);
        CallMeter {
            calls,
            status: NO_STATUS,
            _present: self.all.enter(),
        }
    }

    /// Of every method of which there was a call.
    pub fn get(&self) -> Vec<Counted> {
        let counted = METHODS.iter().zip(&self.by_method).map(|(names, calls)| {
            let ended: Vec<u64> = calls.ended.iter().map(Counter::get).collect();
            let over: u64 = ended.iter().sum();
            let statuses = STATUSES.into_iter().zip(ended);
            Counted {
                service: names.0,
                method: names.1,
                in_flight: calls.begun.get().saturating_sub(over),
                ended: statuses.filter(|(_, count)| *count > 0).collect(),
            }
        });
        counted
            .filter(|calls| calls.in_flight > 0 || !calls.ended.is_empty())
            .collect()
    }
}

impl CallMeter {
    /// The call ends with this `grpc-status`; without one, it was broken off.
    pub fn status(&mut self, status: Option<u32>) {
        let known = status.and_then(|status| usize::try_from(status).ok());
        self.status = known.map_or(NO_STATUS, |status| status.min(NO_STATUS));
    }
}

impl Drop for CallMeter {
    fn drop(&mut self) {
        self.calls.ended[self.status].add(1);
    }
}

/// Where the method at `path` stands in `METHODS`.
fn index(path: &str) -> usize {
    let Some((service, method)) = path.strip_prefix('/').and_then(|path| path.split_once('/'))
    else {
        return 0;
    };
    match (service, method) {
        ("build.bazel.remote.execution.v2.ActionCache", "GetActionResult") => 1,
        ("build.bazel.remote.execution.v2.ActionCache", "UpdateActionResult") => 2,
        ("build.bazel.remote.execution.v2.Execution", "Execute") => 3,
        ("build.bazel.remote.execution.v2.Execution", "WaitExecution") => 4,
        ("google.longrunning.Operations", "CancelOperation") => 6,
        ("google.longrunning.Operations", _) => 5,
        ("build.bazel.remote.execution.v2.Capabilities", "GetCapabilities") => 7,
        ("build.bazel.remote.execution.v2.ContentAddressableStorage", method) => match method {
            "FindMissingBlobs" => 9,
            "BatchUpdateBlobs" => 10,
            "BatchReadBlobs" => 11,
            "GetTree" => 12,
            _ => 8,
        },
        ("build.buildgrid.LocalContentAddressableStorage", _) => 13,
        ("google.bytestream.ByteStream", "Read") => 14,
        ("google.bytestream.ByteStream", "Write") => 15,
        ("google.bytestream.ByteStream", "QueryWriteStatus") => 16,
        ("grpc.health.v1.Health", _) => 17,
        ("build.bazel.remote.asset.v1.Fetch" | "build.bazel.remote.asset.v1.Push", _) => 18,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_count_by_method_and_status_and_names_that_are_made_up_add_nothing() {
        static CALLS: Calls = Calls::new();
        let lookup = "/build.bazel.remote.execution.v2.ActionCache/GetActionResult";
        let mut found = CALLS.begin(lookup);
        let mut absent = CALLS.begin(lookup);
        found.status(Some(0));
        absent.status(Some(5));
        drop((found, absent));
        drop(CALLS.begin(lookup));
        let _open = CALLS.begin("/google.bytestream.ByteStream/Read");
        for made_up in ["/a/b", "/", "*", "/google.bytestream.ByteStream/Made\"Up"] {
            CALLS.begin(made_up).status(Some(9999));
        }
        let of = |service, method, in_flight, ended: &[_]| Counted {
            service,
            method,
            in_flight,
            ended: ended.to_vec(),
        };
        let expected = [
            of("other", "other", 0, &[("none", 4)]),
            of(
                "ActionCache",
                "GetActionResult",
                0,
                &[("OK", 1), ("NOT_FOUND", 1), ("none", 1)],
            ),
            of("ByteStream", "Read", 1, &[]),
        ];
        assert_eq!(CALLS.get(), expected);
    }

    #[test]
    fn every_known_method_has_a_place_of_its_own() {
        let service = |name| match name {
            "Operations" => "google.longrunning.Operations".to_owned(),
            "ByteStream" => "google.bytestream.ByteStream".to_owned(),
            "LocalContentAddressableStorage" => format!("build.buildgrid.{name}"),
            "Health" => "grpc.health.v1.Health".to_owned(),
            "Asset" => "build.bazel.remote.asset.v1.Fetch".to_owned(),
            _ => format!("build.bazel.remote.execution.v2.{name}"),
        };
        for (at, (short, method)) in METHODS.into_iter().enumerate() {
            let path = format!("/{}/{method}", service(short));
            assert_eq!(index(&path), at, "{path}");
        }
    }
}
