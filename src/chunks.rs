//! Chunks of a body, in order. Most bodies are of one chunk, which takes no memory here.

use std::collections::VecDeque;

use bytes::Bytes;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Chunks {
    /// There if there are any.
    first: Option<Bytes>,
    rest: VecDeque<Bytes>,
}

impl Chunks {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// The last one.
    pub fn last(&self) -> Option<&Bytes> {
        self.rest.back().or(self.first.as_ref())
    }

    /// Adds one behind the others.
    pub fn push(&mut self, chunk: Bytes) {
        match self.first {
            None => self.first = Some(chunk),
            Some(_) => self.rest.push_back(chunk),
        }
    }

    /// Takes the first one out.
    pub fn pop(&mut self) -> Option<Bytes> {
        let first = self.first.take();
        if !self.rest.is_empty() {
            self.first = self.rest.pop_front();
        }
        first
    }

    /// Adds others behind these.
    pub fn append(&mut self, others: Chunks) {
        let Chunks { first, rest } = others;
        self.extend(first.into_iter().chain(rest));
    }

    /// All in one piece; copied only if there are several.
    pub fn joined(&self) -> Bytes {
        match &self.first {
            Some(only) if self.rest.is_empty() => only.clone(),
            first => {
                let all: Vec<&[u8]> = first.iter().chain(&self.rest).map(|one| &one[..]).collect();
                all.concat().into()
            }
        }
    }
}

impl From<Bytes> for Chunks {
    fn from(only: Bytes) -> Self {
        Chunks {
            first: Some(only),
            rest: VecDeque::new(),
        }
    }
}

impl Extend<Bytes> for Chunks {
    fn extend<I: IntoIterator<Item = Bytes>>(&mut self, chunks: I) {
        for chunk in chunks {
            self.push(chunk);
        }
    }
}

impl FromIterator<Bytes> for Chunks {
    fn from_iter<I: IntoIterator<Item = Bytes>>(chunks: I) -> Self {
        let mut all = Chunks::default();
        all.extend(chunks);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(chunks: &'static [&str]) -> Chunks {
        let bytes = |chunk: &&'static str| Bytes::from(*chunk);
        chunks.iter().map(bytes).collect()
    }

    #[test]
    fn chunks_leave_in_the_order_in_which_they_came() {
        let mut chunks = of(&["a", "b"]);
        assert_eq!(chunks.pop().unwrap(), "a");
        chunks.append(of(&["c", "d", "e"]));
        assert_eq!(chunks.last().unwrap(), "e");
        assert_eq!(chunks.joined(), "bcde");
        let rest: Vec<_> = std::iter::from_fn(|| chunks.pop()).collect();
        assert_eq!(rest, ["b", "c", "d", "e"]);
        assert!(chunks.is_empty());
        assert!(chunks.last().is_none());
        assert!(chunks.joined().is_empty());
    }

    #[test]
    fn one_chunk_is_not_copied() {
        let chunk = Bytes::from_static(b"only");
        let chunks = Chunks::from(chunk.clone());
        assert_eq!(chunks.joined().as_ptr(), chunk.as_ptr());
        assert_eq!(chunks.last(), Some(&chunk));
    }
}
