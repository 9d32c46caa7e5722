//! Explanations: what became of the actions of builds, why, and what to do about it.

mod advice;
pub mod difference;
pub mod explain;
pub mod library;
