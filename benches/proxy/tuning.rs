//! What both peers announce in their SETTINGS. gRPC's C core grows its windows and frames to
//! megabytes on a fast link; other clients stay at HTTP/2's 16 KiB frames.

/// The sizes that a peer announces, in bytes.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Tuning {
    /// SETTINGS_MAX_FRAME_SIZE.
    #[arg(long, default_value_t = 4 << 20)]
    pub frame: u32,
    /// The window of each stream, and of the connection.
    #[arg(long, default_value_t = 4 << 20)]
    pub window: u32,
}

impl Tuning {
    /// HTTP/2 stops one byte short of 16 MiB.
    pub fn frame(self) -> u32 {
        self.frame.clamp(16 << 10, (1 << 24) - 1)
    }
}

/// How many streams one connection may carry: no limit that a measurement meets.
pub const STREAMS: u32 = 1 << 20;
/// Bytes of headers that a peer takes.
pub const HEADER_LIST: u32 = 1 << 20;
/// Resets that a peer takes: bursts of them are measured, not fought.
pub const RESETS: usize = 100_000;
