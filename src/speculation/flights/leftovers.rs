//! What is still being executed for builds that are over. It goes on, since the next build may want
//! it; but if that is planned and does not, as its sources have changed once more, it is cancelled.

use std::collections::HashMap;

use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::{FlightKey, Landing};
use crate::speculation::records::parent::WeakKey;

/// Executions for builds that are over, by the parent that they are for, each with who follows it.
#[derive(Debug, Default)]
pub struct Leftovers(Mutex<HashMap<WeakKey, Vec<Leftover>>>);

/// One of them.
pub type Leftover = (FlightKey, mpsc::Sender<Landing>);

impl Leftovers {
    /// Adds one.
    pub fn add(&self, parent: WeakKey, leftover: Leftover) {
        self.0.lock().entry(parent).or_default().push(leftover);
    }

    /// Takes those of a parent that is planned anew.
    pub fn take(&self, parent: WeakKey) -> Vec<Leftover> {
        self.0.lock().remove(&parent).unwrap_or_default()
    }

    /// Forgets those that `owner` has followed to their end.
    pub fn forget(&self, owner: &mpsc::Sender<Landing>) {
        self.0.lock().retain(|_, leftovers| {
            leftovers.retain(|(_, known)| !known.same_channel(owner));
            !leftovers.is_empty()
        });
    }
}
