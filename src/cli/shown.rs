//! How times, durations, digests and ids are shown to people, by all commands alike.

use std::collections::BTreeSet;
use std::io::Write;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::{Failure, exit_codes};

/// Columns of a line.
pub const WIDTH: usize = 100;
/// Digits of a hash that tell it from others.
const HASH: usize = 12;
/// The shortest beginning of a build's id that is shown.
const MIN_ID: usize = 8;

/// A day and a time of it, here: `2026-11-21 15:14:01`.
pub fn date_and_time(unix_ms: i64) -> String {
    formatted(unix_ms, "%Y-%m-%d %H:%M:%S")
}

/// A time of the day, here: `15:14:01.291`.
pub fn time_of_day(unix_ms: i64) -> String {
    formatted(unix_ms, "%H:%M:%S%.3f")
}

fn formatted(unix_ms: i64, format: &str) -> String {
    match Timestamp::from_millisecond(unix_ms) {
        Ok(time) => time
            .to_zoned(TimeZone::system())
            .strftime(format)
            .to_string(),
        Err(_) => "?".to_owned(),
    }
}

/// A duration in the unit that suits it: `51 ms`, `2.4 s`, `3 min 12 s`.
pub fn duration(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..60_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        60_000..3_600_000 => format!("{} min {:02} s", ms / 60_000, ms % 60_000 / 1000),
        _ => format!("{} h {:02} min", ms / 3_600_000, ms % 3_600_000 / 60_000),
    }
}

/// A number of bytes in the unit that suits it: `512 B`, `1.2 GiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = count as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{count} B"),
        _ => format!("{size:.1} {}", UNITS[unit]),
    }
}

/// From one time to another.
pub fn span(from_unix_ms: i64, to_unix_ms: i64) -> String {
    duration(u64::try_from(to_unix_ms - from_unix_ms).unwrap_or(0))
}

/// The beginning of a digest.
pub fn digest(text: &str) -> &str {
    text.get(..HASH).unwrap_or(text)
}

/// How much of their ids tells builds apart.
pub fn id_length<'a>(ids: impl Iterator<Item = &'a str> + Clone) -> usize {
    let count = ids.clone().count();
    let tells_apart = |length: &usize| {
        let short: BTreeSet<&str> = ids
            .clone()
            .map(|id| id.get(..*length).unwrap_or(id))
            .collect();
        short.len() == count
    };
    (MIN_ID..36).find(tells_apart).unwrap_or(36)
}

/// `text` in at most `width` columns; of one that is longer, the end says more than the middle.
pub fn cut(text: &str, width: usize) -> String {
    let count = text.chars().count();
    if count <= width {
        return text.to_owned();
    }
    let head = width.saturating_sub(1) / 3;
    let tail = width.saturating_sub(1 + head);
    let start: String = text.chars().take(head).collect();
    let end: String = text.chars().skip(count - tail).collect();
    format!("{start}…{end}")
}

/// Prints what a command has to say.
pub fn print(text: &str) -> Result<(), Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(|error| Failure::new(exit_codes::FAILURE, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_shown_in_the_unit_that_suits_them() {
        let shown = [0, 999, 2400, 192_000, 7_500_000].map(duration);
        assert_eq!(
            shown,
            ["0 ms", "999 ms", "2.4 s", "3 min 12 s", "2 h 05 min"]
        );
    }

    #[test]
    fn long_texts_keep_their_beginning_and_more_of_their_end() {
        assert_eq!(cut("make in /home/me/project", 10), "mak…roject");
        assert_eq!(cut("make", 10), "make");
        assert_eq!(cut("größenänderung", 5), "g…ung");
    }

    #[test]
    fn ids_are_shown_as_long_as_it_takes_to_tell_them_apart() {
        assert_eq!(id_length(["0123456789", "0123456788"].into_iter()), 10);
        assert_eq!(id_length(["01234567-1", "11234567-1"].into_iter()), 8);
    }
}
