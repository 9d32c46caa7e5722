//! What can be seen of local clients: who they are, where they work, and the files there.

pub mod index;
pub mod peer;
pub mod process;
pub mod watch;
