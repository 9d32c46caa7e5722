//! What the exit codes mean.

/// All went well.
pub const OK: u8 = 0;
/// It did not work, or time ran out.
pub const FAILURE: u8 = 1;
/// A program that was to be run is there, but cannot be (as shells say it).
pub const NOT_EXECUTABLE: u8 = 126;
/// There is no such program.
pub const NOT_FOUND: u8 = 127;
/// What a signal's number is added to, when a command was ended by it.
pub const SIGNALLED: u8 = 128;
/// The arguments or settings are wrong (`EX_USAGE` of sysexits).
pub const USAGE: u8 = 64;
