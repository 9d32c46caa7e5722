//! Sharing: what is recorded stands where others find it, in the backend's CAS, by way of its action cache.

pub(super) mod relatives;
pub(super) mod share;
pub(super) mod shelf;
