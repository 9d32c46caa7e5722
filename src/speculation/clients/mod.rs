//! What clients do, as the proxy sees it, and on whose behalf: their calls, and the builds that these
//! belong to.

pub mod builds;
pub(super) mod caller;
pub(super) mod callers;
pub mod hidden_hits;
pub mod observation;
pub(super) mod operations;
pub mod runs;
pub(super) mod subaction;
