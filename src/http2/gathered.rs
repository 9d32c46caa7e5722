//! Lets what is written in small pieces leave together. `h2` flushes each of its own answers to a
//! SETTINGS or a PING while it reads on, and every write wakes the other end: a client that opens
//! a connection for each call would be woken twice before there is an answer.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How many bytes are held back at most.
const LIMIT: usize = 1024;

/// A connection on which writes wait while there is more to read, up to 1 KiB of them. Its owner
/// must read on until there is nothing (`Pending`) before it waits for anything else.
pub struct Gathered<S> {
    io: S,
    held: Vec<u8>,
    /// As far as is known, there is something to read.
    reading: bool,
}

impl<S> Gathered<S> {
    /// Wraps a connection that nothing has been read from.
    pub fn new(io: S) -> Self {
        Gathered {
            io,
            held: Vec::new(),
            reading: true,
        }
    }

    /// Whether `size` more bytes can wait.
    fn can_hold(&self, size: usize) -> bool {
        self.reading && self.held.len() + size <= LIMIT
    }
}

impl<S: AsyncWrite + Unpin> Gathered<S> {
    fn poll_release(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.held.is_empty() {
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, &self.held))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.held.drain(..written);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Gathered<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.io).poll_read(cx, buf);
        this.reading = polled.is_ready();
        if polled.is_pending()
            && let Poll::Ready(Err(error)) = this.poll_release(cx)
        {
            return Poll::Ready(Err(error));
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gathered<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.can_hold(buf.len()) {
            this.held.extend_from_slice(buf);
            return Poll::Ready(Ok(buf.len()));
        }
        ready!(this.poll_release(cx))?;
        Pin::new(&mut this.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let size = bufs.iter().map(|buf| buf.len()).sum();
        if this.can_hold(size) {
            for buf in bufs {
                this.held.extend_from_slice(buf);
            }
            return Poll::Ready(Ok(size));
        }
        ready!(this.poll_release(cx))?;
        Pin::new(&mut this.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.reading {
            ready!(this.poll_release(cx))?;
        }
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_release(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    /// What has arrived at the other end, without waiting for more.
    async fn arrived(far: &mut DuplexStream) -> Vec<u8> {
        let mut read = Vec::new();
        let mut piece = [0; 4096];
        while let Ok(size) =
            tokio::time::timeout(std::time::Duration::ZERO, far.read(&mut piece)).await
        {
            match size.unwrap() {
                0 => break,
                size => read.extend_from_slice(&piece[..size]),
            }
        }
        read
    }

    async fn write(near: &mut Gathered<DuplexStream>, bytes: &[u8]) {
        near.write_all(bytes).await.unwrap();
        near.flush().await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_written_while_there_is_more_to_read_leaves_when_there_is_not() {
        let (near, mut far) = duplex(64 * 1024);
        let mut near = Gathered::new(near);
        far.write_all(b"ab").await.unwrap();
        write(&mut near, b"1").await;
        let mut byte = [0];
        near.read_exact(&mut byte).await.unwrap();
        write(&mut near, b"2").await;
        near.read_exact(&mut byte).await.unwrap();
        assert_eq!(arrived(&mut far).await, b"");
        let nothing_more = near.read_exact(&mut byte);
        let nothing_more = tokio::time::timeout(std::time::Duration::ZERO, nothing_more).await;
        assert!(nothing_more.is_err());
        assert_eq!(arrived(&mut far).await, b"12");
        write(&mut near, b"3").await;
        assert_eq!(arrived(&mut far).await, b"3", "nothing is read any more");
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_lost_or_put_in_another_order() {
        let (near, mut far) = duplex(64 * 1024);
        let mut near = Gathered::new(near);
        write(&mut near, b"small ").await;
        write(&mut near, &vec![b'l'; LIMIT]).await;
        assert_eq!(
            arrived(&mut far).await,
            [b"small ".as_slice(), &vec![b'l'; LIMIT]].concat()
        );
        let vectored = [IoSlice::new(b"vec"), IoSlice::new(b"tored")];
        assert_eq!(near.write_vectored(&vectored).await.unwrap(), 8);
        assert_eq!(arrived(&mut far).await, b"");
        near.shutdown().await.unwrap();
        assert_eq!(arrived(&mut far).await, b"vectored");
    }
}
