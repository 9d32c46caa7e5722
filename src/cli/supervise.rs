//! `primed supervise`: what stands between the embedded backend and the command of an action.

use super::{Failure, exit_codes};
use crate::backend::embedded::execution;

pub(super) fn run() -> Result<(), Failure> {
    execution::supervise().map_err(|error| Failure::new(exit_codes::FAILURE, error))
}
