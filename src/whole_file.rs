//! Files that are replaced whole or not at all: whoever reads one meanwhile, or after a crash, finds
//! what stood there before or what stands there now.

use std::io;
use std::path::Path;

/// Writes `content` beside its place first and then renames it. What stands there and is no regular
/// file, a pipe say, is written to directly.
///
/// # Errors
/// What the system said. What stood there before is unharmed then.
pub fn write(file: &Path, content: &[u8]) -> io::Result<()> {
    if file.exists() && !file.is_file() {
        // A pipe, say; or a directory, which cannot be written.
        return std::fs::write(file, content);
    }
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    let beside = file.with_file_name(name);
    let written = std::fs::write(&beside, content).and_then(|()| std::fs::rename(&beside, file));
    if written.is_err() {
        // It may not even exist.
        let _ = std::fs::remove_file(&beside);
    }
    written
}
