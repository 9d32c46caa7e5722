//! A bearer token in a file that somebody else keeps fresh: a kubelet, a cron job, a vault agent.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderMap, header};
use parking_lot::{Mutex, RwLock};

use crate::config::upstream::UpstreamHeader;

/// How long a token is used before its file is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// A larger file holds no token.
const MAX_SIZE: u64 = 64 * 1024;

/// The headers that a token file makes, kept up to date whenever they are used.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    /// Headers beside the token.
    others: HeaderMap,
    headers: RwLock<Arc<HeaderMap>>,
    watch: Mutex<Watch>,
}

#[derive(Debug)]
struct Watch {
    looked: Instant,
    /// Of the file that the token was read from.
    stamp: Stamp,
    /// Whether the last look failed, which is said once.
    failing: bool,
}

/// What differs when a file was changed, or a link to it now leads to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl From<std::fs::Metadata> for Stamp {
    fn from(metadata: std::fs::Metadata) -> Self {
        Stamp {
            file: (metadata.dev(), metadata.ino()),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

impl TokenFile {
    /// Reads the token in `path`; `others` are headers to go with it.
    ///
    /// # Errors
    /// When there is no token to begin with.
    pub fn open(path: &Path, others: HeaderMap) -> io::Result<Self> {
        let (token, stamp) = read(path)?;
        Ok(TokenFile {
            path: path.to_owned(),
            headers: RwLock::new(Arc::new(with_token(&others, token))),
            others,
            watch: Mutex::new(Watch {
                looked: Instant::now(),
                stamp,
                failing: false,
            }),
        })
    }

    /// The headers as of `now`. Looks at the file if the last look was a second ago; where it
    /// holds no token any more, the last one stays.
    pub fn headers(&self, now: Instant) -> Arc<HeaderMap> {
        // Whoever comes while another looks takes what there is.
        if let Some(mut watch) = self.watch.try_lock()
            && now.saturating_duration_since(watch.looked) >= LOOK_AGAIN
        {
            watch.looked = now;
            self.look(&mut watch);
        }
        self.headers.read().clone()
    }

    fn look(&self, watch: &mut Watch) {
        let path = self.path.display();
        let stamp = std::fs::metadata(&self.path).map(Stamp::from);
        if stamp.as_ref().is_ok_and(|stamp| *stamp == watch.stamp) {
            watch.failing = false;
            return;
        }
        match read(&self.path) {
            Ok((token, stamp)) => {
                *self.headers.write() = Arc::new(with_token(&self.others, token));
                watch.stamp = stamp;
                watch.failing = false;
                tracing::info!(%path, "the upstream token was read again");
            }
            Err(error) if !watch.failing => {
                watch.failing = true;
                tracing::warn!(%path, %error, "no new upstream token; the last one stays in use");
            }
            Err(_) => {}
        }
    }
}

fn with_token(others: &HeaderMap, token: UpstreamHeader) -> HeaderMap {
    let mut headers = others.clone();
    headers.insert(token.name, token.value);
    headers
}

/// The header that the token in `path` makes, and the stamp of the file it was in. The stamp is
/// taken first: a file that changes while it is read is read again at the next look.
fn read(path: &Path) -> io::Result<(UpstreamHeader, Stamp)> {
    let file = File::open(path)?;
    let stamp = Stamp::from(file.metadata()?);
    let mut content = String::new();
    file.take(MAX_SIZE + 1).read_to_string(&mut content)?;
    let invalid = |reason| io::Error::new(io::ErrorKind::InvalidData, reason);
    let token = content.trim();
    if token.is_empty() {
        return Err(invalid("it is empty"));
    }
    if content.len() as u64 > MAX_SIZE {
        return Err(invalid("it is too large for a token"));
    }
    let header = UpstreamHeader::new(header::AUTHORIZATION.as_str(), &format!("Bearer {token}"))
        .map_err(|_| invalid("a token is one line of visible ASCII characters"))?;
    Ok((header, stamp))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Looks long after the last look.
    fn later(file: &TokenFile) -> String {
        let now = file.watch.lock().looked + LOOK_AGAIN;
        shown(&file.headers(now))
    }

    fn shown(headers: &HeaderMap) -> String {
        headers[header::AUTHORIZATION].to_str().unwrap().to_owned()
    }

    #[test]
    fn a_token_that_is_rewritten_is_read_again_but_not_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        std::fs::write(&path, " one \n").unwrap();
        let others = HeaderMap::from_iter([(header::USER_AGENT, "x".parse().unwrap())]);
        let file = TokenFile::open(&path, others).unwrap();
        let opened = file.watch.lock().looked;
        std::fs::write(&path, "another\n").unwrap();
        assert_eq!(shown(&file.headers(opened)), "Bearer one");
        assert_eq!(later(&file), "Bearer another");
        let headers = file.headers(opened);
        assert_eq!(headers[header::USER_AGENT], "x");
        assert!(headers[header::AUTHORIZATION].is_sensitive());
        assert!(!format!("{file:?}").contains("another"));
    }

    #[test]
    fn a_link_that_is_swapped_to_another_directory_is_followed() {
        // As kubelets do: token -> ..data/token, ..data -> ..DATE
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for (date, token) in [("..1", "one"), ("..2", "two")] {
            std::fs::create_dir(at(date)).unwrap();
            std::fs::write(at(date).join("token"), token).unwrap();
        }
        symlink("..1", at("..data")).unwrap();
        symlink("..data/token", at("token")).unwrap();
        let file = TokenFile::open(&at("token"), HeaderMap::new()).unwrap();
        assert_eq!(later(&file), "Bearer one");
        symlink("..2", at("..new")).unwrap();
        std::fs::rename(at("..new"), at("..data")).unwrap();
        assert_eq!(later(&file), "Bearer two");
    }

    #[test]
    fn a_file_that_holds_no_token_any_more_leaves_the_last_one_in_use() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        std::fs::write(&path, "one").unwrap();
        let file = TokenFile::open(&path, HeaderMap::new()).unwrap();
        let big = "x".repeat(100_000);
        for content in ["", " \n", "two\nlines", "ümlaut", &big] {
            std::fs::write(&path, content).unwrap();
            assert_eq!(later(&file), "Bearer one");
            assert!(file.watch.lock().failing);
        }
        std::fs::remove_file(&path).unwrap();
        assert_eq!(later(&file), "Bearer one");
        std::fs::create_dir(&path).unwrap();
        assert_eq!(later(&file), "Bearer one");
        std::fs::remove_dir(&path).unwrap();
        std::fs::write(&path, "two").unwrap();
        assert_eq!(later(&file), "Bearer two");
        assert!(!file.watch.lock().failing);
    }

    #[test]
    fn without_a_token_to_begin_with_there_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        assert!(TokenFile::open(&path, HeaderMap::new()).is_err());
        std::fs::write(&path, "").unwrap();
        let error = TokenFile::open(&path, HeaderMap::new()).unwrap_err();
        assert_eq!(error.to_string(), "it is empty");
    }
}
