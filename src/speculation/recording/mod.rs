//! Recording: after a parent has ended, `recorder` makes a record of what it has executed. `record` finds
//! the base actions, `generate` where their inputs came from. What comes by `archive` is recorded, too.

pub mod archive;
mod carry_over;
mod generate;
mod mounts;
mod record;
pub(super) mod recorder;
