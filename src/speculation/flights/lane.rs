//! The lane: starts what `Flights` says is next, follows it, and brings the result home. Cap and
//! order are `Flights`' business; what is worth executing is `schedule`'s.

use std::collections::HashMap;
use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message;
use tokio_stream::StreamExt;
use tonic::Code;

use super::durations::execution_time;
use super::stages::told;
use super::{Departure, Ending, Flights, Outcome};
use crate::backend::Backend;
use crate::reapi::google::longrunning::{Operation, operation};
use crate::reapi::{ActionResult, ExecuteResponse, ServerCapabilities};
use crate::speculation::activity::{Activities, Activity};
use crate::task;

/// REAPI: larger numbers are less urgent, 0 is the default of all clients.
const PRIORITY: i32 = 1000;
/// How long the backend may take to cancel an operation; its place in the lane is taken until then.
const MAX_CANCELLING: Duration = Duration::from_secs(5);

struct Lane {
    backend: Arc<dyn Backend>,
    priorities: Mutex<HashMap<Arc<str>, i32>>,
}

/// Runs the lane until the task is dropped.
pub async fn run(flights: Arc<Flights>, backend: Arc<dyn Backend>, activities: Activities) {
    let lane = Arc::new(Lane {
        backend,
        priorities: Mutex::default(),
    });
    loop {
        let departure = flights.depart().await;
        let execution = execute(lane.clone(), departure, activities.begin());
        task::spawn("speculative execution", execution);
    }
}

async fn execute(lane: Arc<Lane>, mut departure: Departure, activity: Activity) {
    let action = departure.key().action;
    let mut time = Duration::ZERO;
    let (outcome, ending) = match lane.follow(&mut departure).await {
        Ok(Executed {
            operation,
            result,
            cached: true,
        }) => match result.exit_code {
            // It had succeeded by the time that it was stopped.
            0 if departure.has_given_way() => {
                time = execution_time(&result).unwrap_or(time);
                let outcome = Outcome::Primed(Arc::new(result));
                (outcome, Ending::Succeeded(operation))
            }
            0 => (Outcome::Cached(Arc::new(result)), Ending::Cached),
            // It had failed by the time that it was stopped.
            code if departure.has_given_way() => {
                departure.because(format!("it ended with exit code {code}"));
                (Outcome::Failed, Ending::Failed)
            }
            // A failure that is cached is the client's to see.
            code => {
                departure.because(format!("the backend holds a result with exit code {code}"));
                tracing::debug!(%action, exit_code = code, "the backend holds a failure");
                (Outcome::Abandoned, Ending::Abandoned)
            }
        },
        Ok(Executed {
            operation, result, ..
        }) if result.exit_code == 0 => {
            departure.executed(&result);
            time = execution_time(&result).unwrap_or(time);
            let outcome = Outcome::Primed(Arc::new(result));
            (outcome, Ending::Succeeded(operation))
        }
        Ok(Executed { result, .. }) => {
            time = execution_time(&result).unwrap_or(time);
            departure.executed(&result);
            departure.because(format!("it ended with exit code {}", result.exit_code));
            tracing::debug!(%action, exit_code = result.exit_code, "a speculative action failed");
            (Outcome::Failed, Ending::Failed)
        }
        Err(NotExecuted::GaveWay) => {
            if departure.give_way() {
                tracing::debug!(%action, "a speculative action gave way to a client's");
                return;
            }
            (Outcome::Abandoned, Ending::Abandoned)
        }
        Err(NotExecuted::Because(reason)) => {
            // Of one that was cancelled it is known why.
            if !departure.cancelled().is_cancelled() {
                departure.because(&reason);
            }
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

/// What came of an execution.
struct Executed {
    /// The last `Operation`, as it was sent.
    operation: Bytes,
    result: ActionResult,
    /// Whether the backend had the result already.
    cached: bool,
}

/// Why there is no result.
enum NotExecuted {
    /// It was stopped for a client.
    GaveWay,
    /// For another reason.
    Because(String),
}

impl<E: ToString> From<E> for NotExecuted {
    fn from(reason: E) -> Self {
        NotExecuted::Because(reason.to_string())
    }
}

/// What the backend makes of a cancellation.
enum Cancelled {
    Done,
    /// `for_good` if it never does that.
    Refused {
        for_good: bool,
    },
}

impl Lane {
    /// Executes and follows the operation to its end.
    async fn follow(&self, departure: &mut Departure) -> Result<Executed, NotExecuted> {
        let key = departure.key().clone();
        let priority = self.priority(&key.instance).await;
        if priority > 0 {
            departure.leave_to_priorities();
        }
        let mut operations = self
            .backend
            .execute(&key.instance, key.action, priority)
            .await?;
        let cancelled = departure.cancelled().clone();
        let asked = departure.asked_to_give_way().clone();
        let mut name: Option<String> = None;
        let (mut may_be_asked, mut stopping) = (true, None);
        loop {
            let stopped = async {
                match &mut stopping {
                    Some(stopping) => Pin::new(stopping).await,
                    None => pending().await,
                }
            };
            let next = tokio::select! {
                biased;
                next = operations.next() => next,
                // Before it has told a name it cannot be cancelled, only left alone.
                () = cancelled.cancelled(), if name.is_some() => {
                    if let Some(name) = &name {
                        self.cancel(name).await;
                    }
                    return Err("it was cancelled".into());
                }
                () = asked.cancelled(), if may_be_asked && name.is_some() => {
                    may_be_asked = false;
                    let name = name.clone().filter(|_| departure.is_to_give_way());
                    stopping = name.map(|name| Box::pin(async move { self.cancel(&name).await }));
                    continue;
                }
                stopped = stopped => match stopped {
                    Cancelled::Done => return Err(NotExecuted::GaveWay),
                    Cancelled::Refused { for_good } => {
                        departure.goes_on(for_good);
                        stopping = None;
                        continue;
                    }
                }
            };
            let ended = match next {
                None => Err("the backend closed the stream before the operation was done".into()),
                Some(Err(status)) => Err(NotExecuted::from(status)),
                Some(Ok(encoded)) => {
                    departure.told(told(encoded.clone()));
                    let operation = Operation::decode(encoded.clone())?;
                    if !operation.done {
                        departure.progress(encoded);
                        name.get_or_insert(operation.name);
                        continue;
                    }
                    executed(encoded, operation)
                }
            };
            return match ended {
                Ok(executed) if executed.result.exit_code == 0 => Ok(executed),
                // However the backend puts it, it was stopped.
                _ if stopping.is_some() => Err(NotExecuted::GaveWay),
                ended => ended,
            };
        }
    }

    /// Has an operation stopped.
    async fn cancel(&self, operation: &str) -> Cancelled {
        let cancel = self.backend.cancel(operation);
        match tokio::time::timeout(MAX_CANCELLING, cancel).await {
            Ok(Ok(())) => {
                tracing::debug!(operation, "a speculative execution was cancelled");
                Cancelled::Done
            }
            Ok(Err(status)) => {
                tracing::debug!(operation, %status, "a speculative execution cannot be cancelled");
                let for_good =
                    matches!(status.code(), Code::Unimplemented | Code::PermissionDenied);
                Cancelled::Refused { for_good }
            }
            Err(_) => {
                tracing::debug!(operation, "the backend does not answer a cancellation");
                Cancelled::Refused { for_good: false }
            }
        }
    }

    /// The least urgent priority that the backend allows, asked once for each instance.
    async fn priority(&self, instance: &Arc<str>) -> i32 {
        if let Some(known) = self.priorities.lock().get(instance) {
            return *known;
        }
        let Ok(capabilities) = self.backend.capabilities(instance).await else {
            return 0;
        };
        let priority = least_urgent(&capabilities);
        self.priorities.lock().insert(instance.clone(), priority);
        priority
    }
}

/// The largest allowed number up to `PRIORITY`; 0, the default of all clients, where the backend
/// names no ranges that allow more. (buildbox-casd names none, and ignores priorities.)
fn least_urgent(capabilities: &ServerCapabilities) -> i32 {
    let execution = capabilities.execution_capabilities.as_ref();
    let ranges = execution.and_then(|execution| execution.execution_priority_capabilities.as_ref());
    ranges
        .into_iter()
        .flat_map(|ranges| &ranges.priorities)
        .filter(|range| range.min_priority <= PRIORITY)
        .map(|range| range.max_priority.min(PRIORITY))
        .max()
        .unwrap_or(0)
        .max(0)
}

fn executed(encoded: Bytes, operation: Operation) -> Result<Executed, NotExecuted> {
    match operation.result {
        Some(operation::Result::Response(any)) => {
            let response = ExecuteResponse::decode(any.value.as_ref())?;
            let status = response.status.unwrap_or_default();
            match response.result {
                Some(result) if status.code == Code::Ok as i32 => Ok(Executed {
                    operation: encoded,
                    result,
                    cached: response.cached_result,
                }),
                _ => Err(format!("{:?}: {}", Code::from(status.code), status.message).into()),
            }
        }
        Some(operation::Result::Error(status)) => Err(status.message.into()),
        None => Err("the operation ended without a result".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reapi::priority_capabilities::PriorityRange;
    use crate::reapi::{ExecutionCapabilities, PriorityCapabilities};

    fn allowing(ranges: &[(i32, i32)]) -> ServerCapabilities {
        let priorities = ranges
            .iter()
            .map(|(min_priority, max_priority)| PriorityRange {
                min_priority: *min_priority,
                max_priority: *max_priority,
            })
            .collect();
        ServerCapabilities {
            execution_capabilities: Some(ExecutionCapabilities {
                execution_priority_capabilities: Some(PriorityCapabilities { priorities }),
                ..ExecutionCapabilities::default()
            }),
            ..ServerCapabilities::default()
        }
    }

    #[test]
    fn the_least_urgent_priority_that_the_backend_allows_is_used() {
        assert_eq!(least_urgent(&ServerCapabilities::default()), 0);
        assert_eq!(least_urgent(&allowing(&[(-10, 10)])), 10);
        assert_eq!(least_urgent(&allowing(&[(-10, -1)])), 0);
        assert_eq!(least_urgent(&allowing(&[(0, i32::MAX)])), PRIORITY);
        assert_eq!(
            least_urgent(&allowing(&[(0, 5), (100, 200), (5000, 6000)])),
            200
        );
    }
}
