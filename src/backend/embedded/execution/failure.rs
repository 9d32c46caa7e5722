//! Why an action did not run to its end, as the status that its waiters get.

use std::fmt::Display;

use prost::Message;
use tonic::Code;

use super::any;
use crate::digest::Digest;
use crate::reapi::google::rpc;

/// Missing blobs that one status names; a client that uploads them is told of the others then.
const MAX_NAMED: usize = 1000;

/// Why an action did not run to its end.
#[derive(Debug)]
pub struct Failure {
    /// The gRPC status code.
    pub code: Code,
    /// What happened, and what to do about it.
    pub message: String,
    missing: Vec<Digest>,
}

impl Failure {
    /// The client's own fault.
    pub fn invalid(message: impl Into<String>) -> Self {
        Failure::new(Code::InvalidArgument, message)
    }

    /// Something else must be done or be there first.
    pub fn precondition(message: impl Into<String>) -> Self {
        Failure::new(Code::FailedPrecondition, message)
    }

    /// This machine's fault.
    pub fn internal(error: impl Display) -> Self {
        Failure::new(Code::Internal, error.to_string())
    }

    /// The work was cut off: primed is about to end, or something in it panicked.
    pub fn stopping() -> Self {
        let message = "primed is stopping, or has a fault that its log tells of; execute again";
        Failure::new(Code::Unavailable, message)
    }

    /// Any other.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Failure {
            code,
            message: message.into(),
            missing: Vec::new(),
        }
    }

    /// Blobs that the client must upload first. (REAPI, errors of `Execute`.)
    pub fn missing(digests: impl IntoIterator<Item = Digest>) -> Self {
        let mut missing: Vec<Digest> = digests.into_iter().collect();
        let (count, first) = (missing.len(), missing.first().map(Digest::to_string));
        missing.truncate(MAX_NAMED);
        let message = match (count, first) {
            (1, Some(first)) => format!("the blob {first} is not in the CAS; upload it first"),
            (_, first) => format!(
                "{count} blobs are not in the CAS, {} among them; upload them first",
                first.unwrap_or_default()
            ),
        };
        Failure {
            missing,
            ..Failure::precondition(message)
        }
    }

    /// The form that messages carry.
    pub fn to_status(&self) -> rpc::Status {
        let violations = self.missing.iter().map(|digest| Violation {
            kind: "MISSING".to_owned(),
            subject: format!("blobs/{}", digest.resource()),
            description: String::new(),
        });
        let violations: Vec<Violation> = violations.collect();
        let details = match violations.is_empty() {
            true => vec![],
            false => vec![any(
                "google.rpc.PreconditionFailure",
                &PreconditionFailure { violations },
            )],
        };
        rpc::Status {
            code: self.code as i32,
            message: self.message.clone(),
            details,
        }
    }
}

/// `google.rpc.PreconditionFailure`.
#[derive(Clone, PartialEq, Message)]
struct PreconditionFailure {
    #[prost(message, repeated, tag = "1")]
    violations: Vec<Violation>,
}

/// `google.rpc.PreconditionFailure.Violation`.
#[derive(Clone, PartialEq, Message)]
struct Violation {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(string, tag = "2")]
    subject: String,
    #[prost(string, tag = "3")]
    description: String,
}
