//! The settings of the embedded backend, as users write them.

use std::num::NonZero;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

/// What the embedded backend needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbeddedConfig {
    /// Where blobs and results are kept.
    pub cache_dir: PathBuf,
    /// How much they may take; `None` leaves it to what the disk has.
    pub cache_size: Option<ByteSize>,
    /// How many actions are executed at once.
    pub jobs: NonZero<usize>,
    /// Whether they run in a sandbox.
    pub sandbox: SandboxMode,
    /// How long one may run.
    pub max_action_time: Duration,
}

/// Whether actions run in a sandbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SandboxMode {
    /// By bubblewrap, where it is installed and works.
    #[default]
    Auto,
    /// By bubblewrap, or primed does not start.
    Bubblewrap,
    /// Not at all.
    None,
}

/// A number of bytes, more than none: `20GiB`, `500MB`, `1048576`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteSize(pub u64);

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a size is wanted, such as 20GiB or 500MB: a number above 0 with B, kB, MB, GB, TB, KiB, MiB, GiB or TiB"
)]
pub struct ByteSizeError;

impl FromStr for ByteSize {
    type Err = ByteSizeError;

    fn from_str(text: &str) -> Result<Self, ByteSizeError> {
        let number = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
        let unit = match text[number.len()..].to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            "tb" => 1e12,
            "k" | "kib" => 1024.0,
            "m" | "mib" => 1024.0 * 1024.0,
            "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
            "t" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
            _ => return Err(ByteSizeError),
        };
        let number: f64 = number.trim().parse().map_err(|_| ByteSizeError)?;
        match number * unit {
            bytes if bytes >= 1.0 && bytes <= u64::MAX as f64 => Ok(ByteSize(bytes as u64)),
            _ => Err(ByteSizeError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_every_unit_and_nonsense_is_refused() {
        for (text, bytes) in [
            ("1", 1),
            ("4096B", 4096),
            ("1.5kB", 1500),
            ("500MB", 500_000_000),
            ("2 GB", 2_000_000_000),
            ("20GiB", 20 << 30),
            ("20g", 20 << 30),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "0", "-1GB", "GiB", "20XB", "nan", "inf", "1e40", "GB20"] {
            assert_eq!(text.parse::<ByteSize>(), Err(ByteSizeError), "{text}");
        }
    }
}
