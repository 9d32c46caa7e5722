//! The lane: starts what `Flights` says is next, follows it, and brings the result home. Cap and
//! order are `Flights`' business; what is worth executing is `schedule`'s.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use tokio_stream::StreamExt;
use tonic::Code;

use super::activity::{Activities, Activity};
use super::flights::{Departure, Ending, Flights, Outcome};
use super::record::execution_time;
use crate::backend::Backend;
use crate::reapi::google::longrunning::{Operation, operation};
use crate::reapi::{ActionResult, ExecuteResponse};
use crate::task;

/// REAPI: larger numbers are less urgent, 0 is the default of clients.
const PRIORITY: i32 = 1000;

/// Runs the lane until the task is dropped.
pub async fn run(flights: Arc<Flights>, backend: Arc<dyn Backend>, activity: Activities) {
    loop {
        let departure = flights.depart().await;
        let execution = execute(departure, backend.clone(), activity.begin());
        task::spawn("speculative execution", execution);
    }
}

async fn execute(departure: Departure, backend: Arc<dyn Backend>, activity: Activity) {
    let action = departure.key().action;
    let mut time = Duration::ZERO;
    let (outcome, ending) = match follow(&departure, backend.as_ref()).await {
        Ok((operation, result)) if result.exit_code == 0 => {
            time = execution_time(&result).unwrap_or(time);
            (
                Outcome::Primed(Arc::new(result)),
                Ending::Succeeded(operation),
            )
        }
        Ok((_, result)) => {
            tracing::debug!(%action, exit_code = result.exit_code, "a speculative action failed");
            (Outcome::Failed, Ending::Failed)
        }
        Err(reason) => {
            tracing::debug!(%action, %reason, "a speculative action was not executed");
            (Outcome::Abandoned, Ending::Abandoned)
        }
    };
    // The plan hears of it before any client does: what depends on it is then known by the time
    // that the client can ask for it.
    departure.land(outcome, activity.clone()).await;
    departure.end(ending, time);
    drop(activity);
}

/// Executes and follows the operation to its end. Returns the last operation, as it was sent,
/// with the result in it.
async fn follow(
    departure: &Departure,
    backend: &dyn Backend,
) -> Result<(Bytes, ActionResult), String> {
    let key = departure.key();
    let mut operations = backend
        .execute(&key.instance, key.action, PRIORITY)
        .await
        .map_err(|status| status.to_string())?;
    while let Some(encoded) = operations.next().await {
        let encoded = encoded.map_err(|status| status.to_string())?;
        let operation = Operation::decode(encoded.clone()).map_err(|error| error.to_string())?;
        if !operation.done {
            departure.progress(encoded);
            continue;
        }
        return match operation.result {
            Some(operation::Result::Response(any)) => {
                let response = ExecuteResponse::decode(any.value.as_ref())
                    .map_err(|error| error.to_string())?;
                let status = response.status.unwrap_or_default();
                match response.result {
                    Some(result) if status.code == Code::Ok as i32 => Ok((encoded, result)),
                    _ => Err(format!("{:?}: {}", Code::from(status.code), status.message)),
                }
            }
            Some(operation::Result::Error(status)) => Err(status.message),
            None => Err("the operation ended without a result".to_owned()),
        };
    }
    Err("the backend closed the stream before the operation was done".to_owned())
}
