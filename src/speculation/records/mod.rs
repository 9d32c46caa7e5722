//! What is known of the parents that were built: as it is held (`parent`), kept on disk (`store`), and sent
//! to others (`interchange`).

pub mod interchange;
pub mod parent;
pub(super) mod prediction;
pub mod store;
pub(super) mod texts;
