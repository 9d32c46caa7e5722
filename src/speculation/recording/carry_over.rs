//! What an action parent has run without primed being asked: a proxy between (buildbox-casd, say)
//! answers from what it has stored, and what was primed well is never asked for. Its earlier
//! records tell: adapted to the tree that it was executed in, each names an action whose result is
//! in the action cache, or which the parent does not run any more.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use tonic::Status;

use crate::cas::outputs::output_files;
use crate::speculation::clients::subaction::Subaction;
use crate::speculation::flights::FlightKey;
use crate::speculation::planning::known::CurrentParent;
use crate::speculation::planning::schedule::{Plan, Ready, Results};
use crate::speculation::planning::subject::{PlannedParent, Share, Subject};
use crate::speculation::records::parent::{BaseAction, ExecutedParent, Parent};
use crate::speculation::workshop::Workshop;
use crate::task;

/// What was not asked for, but run.
#[derive(Default)]
pub struct CarriedOver {
    /// Base actions that are what they were.
    pub unchanged: Vec<Arc<BaseAction>>,
    /// Actions that they have become.
    pub adapted: Vec<Subaction>,
}

/// Follows the earlier records of a parent that was executed as `executed`, and of which `seen`
/// was asked for.
///
/// # Errors
/// The backend's status, when it cannot be asked.
pub async fn carry_over(
    workshop: &Workshop,
    earlier: Arc<Parent>,
    executed: &ExecutedParent,
    seen: &[Subaction],
) -> Result<CarriedOver, Status> {
    let instance = earlier.identity.instance.clone();
    let flight = |action| FlightKey {
        instance: instance.clone(),
        action,
    };
    let current = CurrentParent {
        input_root: executed.input_root,
        texts: executed.texts.clone().into(),
        outputs: None,
    };
    let known = [(earlier.identity.weak_key(), current)];
    let parents = vec![PlannedParent {
        parent: earlier,
        share: Share::Whole,
    }];
    let subject =
        Subject::load(&workshop.cas, &workshop.directories, parents, known.into()).await?;
    let mut asked: BTreeMap<FlightKey, &Subaction> = BTreeMap::new();
    asked.extend(
        seen.iter()
            .map(|subaction| (flight(subaction.action), subaction)),
    );
    let planned = task::blocking("planning", move || {
        let mut plan = Plan::new(subject);
        let ready = plan.start(&Results::new());
        (plan, ready)
    });
    let Some((mut plan, mut ready)) = planned.await else {
        return Ok(CarriedOver::default());
    };
    let mut carried = CarriedOver::default();
    while let Some(Ready { key, .. }) = ready.pop() {
        let Some((base, _)) = plan.recorded(&key) else {
            continue;
        };
        let (directory, order) = (base.working_directory.clone(), base.order);
        let result = match asked.get(&key) {
            Some(subaction) => Some(subaction.result.clone()),
            None => {
                let found = workshop.backend.action_result(&key.instance, key.action);
                let found = found.await?.filter(|result| result.exit_code == 0);
                found.map(Arc::new)
            }
        };
        let outputs = match &result {
            Some(result) => {
                let function = key.action.function();
                let outputs = output_files(
                    &workshop.cas,
                    &workshop.directories,
                    &instance,
                    function,
                    &directory,
                    result,
                );
                Some(outputs.await?)
            }
            None => None,
        };
        if let Some(result) = result.filter(|_| !asked.contains_key(&key)) {
            carried.adapted.push(Subaction {
                action: key.action,
                result,
                order,
                working_directory: None,
                file_system_root: PathBuf::from("/"),
            });
        }
        ready.extend(plan.complete(&key, outputs, &Results::new()));
    }
    let seen: HashSet<_> = seen.iter().map(|subaction| subaction.action).collect();
    let unchanged = plan.unchanged().filter(|base| !seen.contains(&base.digest));
    carried.unchanged.extend(unchanged.cloned());
    Ok(carried)
}
