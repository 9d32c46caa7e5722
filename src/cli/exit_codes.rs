//! What the exit codes mean.

/// All went well.
pub const OK: u8 = 0;
/// It did not work, or time ran out.
pub const FAILURE: u8 = 1;
/// The arguments or settings are wrong (`EX_USAGE` of sysexits).
pub const USAGE: u8 = 64;
