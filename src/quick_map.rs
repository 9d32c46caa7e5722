//! Maps that calls look into: they hash several times as fast as those of the standard library, still
//! with a seed of their own, so that nobody who chooses the keys can foresee which of them meet.

use std::collections::HashMap;

/// What hashes.
pub use foldhash::fast::RandomState;

/// A hash map for a path that is worth it.
pub type QuickMap<K, V> = HashMap<K, V, RandomState>;
