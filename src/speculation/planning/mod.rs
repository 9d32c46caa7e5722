//! Planning: `resolve` tells what recorded files are now, `instantiate` what that makes of an action, `worth`
//! whether it is executed, and `schedule` when. Nobody is asked for anything but when a plan's `subject` is
//! loaded.

mod edits;
pub(super) mod instantiate;
pub(super) mod known;
pub(super) mod resolve;
pub(super) mod schedule;
pub(super) mod subject;
mod tree_edit;
pub(super) mod uses;
pub mod verdict;
pub(super) mod worth;
