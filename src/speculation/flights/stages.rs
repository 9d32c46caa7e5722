//! What the backend says about where an execution is: `ExecuteOperationMetadata.stage` (REAPI). Read
//! without the rest of the operation, which may hold a large result. buildbox-casd 1.4 says nothing of
//! its own executions, and passes on what a cluster says.

use bytes::Bytes;
use prost::Message;

use crate::reapi::execution_stage::Value;

/// Where an execution is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Nothing that helps.
    Nothing,
    /// It waits for a worker.
    Queued,
    /// A worker has it, or had it.
    Executing,
}

/// `Operation`, as far as it is read.
#[derive(Clone, PartialEq, Message)]
struct Progress {
    #[prost(message, optional, tag = "2")]
    metadata: Option<Packed>,
    #[prost(bool, tag = "3")]
    done: bool,
}

/// `Any`.
#[derive(Clone, PartialEq, Message)]
struct Packed {
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

/// `ExecuteOperationMetadata`.
#[derive(Clone, PartialEq, Message)]
struct Staged {
    #[prost(enumeration = "Value", tag = "1")]
    stage: i32,
}

/// What an encoded `Operation` tells.
pub fn told(operation: Bytes) -> Told {
    let Ok(progress) = Progress::decode(operation) else {
        return Told::Nothing;
    };
    if progress.done {
        return Told::Executing;
    }
    let staged = progress.metadata.map(|any| Staged::decode(any.value));
    match staged.and_then(Result::ok).map(|staged| staged.stage()) {
        Some(Value::Queued) => Told::Queued,
        Some(Value::Executing | Value::Completed) => Told::Executing,
        _ => Told::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reapi::ExecuteOperationMetadata;
    use crate::reapi::google::longrunning::{Operation, operation};
    use crate::reapi::google::rpc::Status;

    fn operation(stage: Value) -> Operation {
        let metadata = ExecuteOperationMetadata {
            stage: stage as i32,
            stdout_stream_name: "stdout".to_owned(),
            ..ExecuteOperationMetadata::default()
        };
        Operation {
            name: "name".to_owned(),
            metadata: Some(prost_types::Any {
                type_url: "type".to_owned(),
                value: metadata.encode_to_vec(),
            }),
            ..Operation::default()
        }
    }

    #[test]
    fn an_operation_tells_whether_a_worker_has_it() {
        let of = |operation: &Operation| told(operation.encode_to_vec().into());
        assert_eq!(of(&operation(Value::Queued)), Told::Queued);
        assert_eq!(of(&operation(Value::Executing)), Told::Executing);
        assert_eq!(of(&operation(Value::Completed)), Told::Executing);
        assert_eq!(of(&operation(Value::Unknown)), Told::Nothing);
        assert_eq!(of(&operation(Value::CacheCheck)), Told::Nothing);
        assert_eq!(of(&Operation::default()), Told::Nothing);
        let over = Operation {
            done: true,
            result: Some(operation::Result::Error(Status::default())),
            ..operation(Value::Queued)
        };
        assert_eq!(of(&over), Told::Executing);
        assert_eq!(told(Bytes::from_static(b"\xff")), Told::Nothing);
    }
}
