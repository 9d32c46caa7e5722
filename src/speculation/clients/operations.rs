//! The names of the operations that clients' executions are: one that has lost the stream of its
//! `Execute` goes on waiting by that name (`WaitExecution`), which tells nothing of the action.

use quick_cache::sync::Cache;

use crate::speculation::Engine;
use crate::speculation::flights::FlightKey;

/// Operations whose names are remembered.
const MAX_OPERATIONS: usize = 50_000;

/// What clients' operations execute, by name.
pub type Operations = Cache<String, FlightKey>;

/// Knows no operation yet.
pub fn operations() -> Operations {
    Cache::new(MAX_OPERATIONS)
}

impl Engine {
    /// Notes that the upstream calls a client's execution of `key` so.
    pub fn name_operation(&self, name: String, key: &FlightKey) {
        self.operations.insert(name, key.clone());
    }

    /// What the operation `name` executes, if a client's `Execute` was told that name.
    pub fn operation(&self, name: &str) -> Option<FlightKey> {
        self.operations.get(name)
    }
}
