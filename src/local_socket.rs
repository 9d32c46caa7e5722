//! A connected Unix socket, of which the system tells no more than is waited for.
//!
//! Linux reports room to write on a Unix socket each time the peer has read from it. A socket that
//! is registered for both directions, as tokio's own is, is therefore woken once for each message
//! that it has sent, in vain, and the peer pays for the wake-up while it reads.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, Shutdown, SocketFlags};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net;
use tokio::net::unix::pipe::{Receiver, Sender};

/// A listening Unix socket on a runtime. For tokio it is a connected one: a listener of tokio's own
/// would register what it accepts for both directions, and on its own runtime.
pub struct LocalListener(net::UnixStream);

impl LocalListener {
    /// Registers a listening socket with the current runtime.
    ///
    /// # Errors
    /// What the system said.
    pub fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let socket = UnixStream::from(OwnedFd::from(listener));
        net::UnixStream::from_std(socket).map(LocalListener)
    }

    /// Waits for a client. Its socket belongs to no runtime yet.
    ///
    /// # Errors
    /// What the system said: for example that no descriptor is free.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let accept = || Ok(rustix::net::accept_with(&self.0, flags)?.into());
        self.0.async_io(Interest::READABLE, accept).await
    }
}

/// The process at the other end of a connected socket, when it connected or began to listen, if the
/// kernel can express it in this namespace, and its user.
///
/// # Errors
/// What the system said.
pub fn credentials(socket: &UnixStream) -> io::Result<(Option<i32>, u32)> {
    let credentials = getsockopt(socket, PeerCredentials)?;
    let pid = Some(credentials.pid()).filter(|pid| *pid > 0);
    Ok((pid, credentials.uid()))
}

/// A connected Unix socket on a runtime.
pub struct LocalSocket {
    reader: Reader,
    /// A second descriptor of it, registered for writing, while there is no room to write.
    writer: Option<Sender>,
    /// Whether the last write had to wait.
    waits: bool,
}

/// How it is read.
enum Reader {
    /// Registered with no runtime yet: what the peer has sent already is read, and can be answered,
    /// before that.
    Fresh { socket: OwnedFd, has_read: bool },
    /// Registered for reading. It is no pipe, but is read like one; and those are what tokio
    /// registers for one direction.
    Registered(Receiver),
    /// The system refused to register it.
    Lost,
}

impl Reader {
    /// Registers it with the current runtime, if it is not yet.
    fn registered(&mut self) -> io::Result<&mut Receiver> {
        if let Reader::Fresh { .. } = self
            && let Reader::Fresh { socket, .. } = std::mem::replace(self, Reader::Lost)
        {
            *self = Reader::Registered(Receiver::from_owned_fd_unchecked(socket)?);
        }
        match self {
            Reader::Registered(reader) => Ok(reader),
            Reader::Fresh { .. } | Reader::Lost => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn socket(&self) -> io::Result<BorrowedFd<'_>> {
        match self {
            Reader::Fresh { socket, .. } => Ok(socket.as_fd()),
            Reader::Registered(reader) => Ok(reader.as_fd()),
            Reader::Lost => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl LocalSocket {
    /// A connected, non-blocking socket. It is registered with the runtime that it is read on, when there
    /// is something to wait for.
    pub fn new(socket: UnixStream) -> Self {
        LocalSocket {
            reader: Reader::Fresh {
                socket: socket.into(),
                has_read: false,
            },
            writer: None,
            waits: false,
        }
    }

    /// Connects to the socket file at `path`.
    ///
    /// # Errors
    /// What the system said.
    pub async fn connect(path: &Path) -> io::Result<Self> {
        let socket = net::UnixStream::connect(path).await?.into_std()?;
        Ok(LocalSocket::new(socket))
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => match self.send(bufs) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let second = self.reader.socket()?.try_clone_to_owned()?;
                    self.writer.insert(Sender::from_owned_fd_unchecked(second)?)
                }
                sent => return Poll::Ready(sent),
            },
        };
        let sent = Pin::new(writer).poll_write_vectored(cx, bufs);
        let waited = std::mem::replace(&mut self.waits, sent.is_pending());
        if sent.is_ready() && !waited {
            self.writer = None;
        }
        sent
    }

    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut nothing = SendAncillaryBuffer::default();
        let sent = rustix::net::sendmsg(
            self.reader.socket()?,
            bufs,
            &mut nothing,
            SendFlags::NOSIGNAL,
        );
        Ok(sent?)
    }
}

impl AsyncRead for LocalSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Reader::Fresh { socket, has_read } = &mut self.reader
            && !std::mem::replace(has_read, true)
        {
            match rustix::io::read(socket, buf.initialize_unfilled()) {
                Ok(read) => {
                    buf.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::AGAIN) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
        Pin::new(self.reader.registered()?).poll_read(cx, buf)
    }
}

impl AsyncWrite for LocalSocket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_send(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_send(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(rustix::net::shutdown(
            self.reader.socket()?,
            Shutdown::Write,
        )?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::io::{Read, Write};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// More than the system keeps for a reader that does not read.
    const LARGE: usize = 4 * 1024 * 1024;

    fn pair() -> (LocalSocket, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        (LocalSocket::new(near), far)
    }

    /// Writes until there is no more room; says how much.
    async fn fill(near: &mut LocalSocket) -> usize {
        let piece = vec![1; 64 * 1024];
        let mut size = 0;
        let full = poll_fn(|cx| {
            loop {
                match Pin::new(&mut *near).poll_write(cx, &piece) {
                    Poll::Ready(sent) => size += sent.unwrap(),
                    Poll::Pending => return Poll::Ready(size),
                }
            }
        });
        full.await
    }

    #[tokio::test]
    async fn a_writer_goes_on_when_there_is_room_again_and_is_told_of_room_no_longer() {
        let (mut near, mut far) = pair();
        assert!(near.writer.is_none());
        let filled = fill(&mut near).await;
        assert!(near.writer.is_some(), "there is no room");
        let reading = crate::task::blocking("reader", move || {
            far.read_exact(&mut vec![0; filled + LARGE]).unwrap();
            far
        });
        let more = vec![1; LARGE];
        let (far, written) = tokio::join!(reading, near.write_all(&more));
        written.unwrap();
        assert!(far.is_some(), "all has arrived");
        near.write_all(b"1").await.unwrap();
        near.write_all(b"2").await.unwrap();
        assert!(near.writer.is_none());
    }

    #[tokio::test]
    async fn what_is_sent_arrives_whole_in_both_directions_and_ends_when_it_is_shut_down() {
        let (mut near, far) = pair();
        far.set_nonblocking(true).unwrap();
        let mut far = LocalSocket::new(far);
        let sent: Vec<u8> = (0..LARGE).map(|at| (at / 7) as u8).collect();
        let (mut read, mut answer) = (Vec::new(), [0; 2]);
        let one = async {
            near.write_all(&sent).await.unwrap();
            near.shutdown().await.unwrap();
            near.read_exact(&mut answer).await.unwrap();
        };
        let other = async {
            far.read_to_end(&mut read).await.unwrap();
            far.write_all(b"ok").await.unwrap();
        };
        tokio::join!(one, other);
        assert!(read == sent);
        assert_eq!(&answer, b"ok");
    }

    #[tokio::test]
    async fn what_has_been_sent_already_is_read_and_answered_without_waiting() {
        let (mut near, mut far) = pair();
        far.write_all(b"hello").unwrap();
        let mut said = [0; 64];
        let mut room = ReadBuf::new(&mut said);
        let read = poll_fn(|cx| Poll::Ready(Pin::new(&mut near).poll_read(cx, &mut room)));
        assert!(matches!(read.await, Poll::Ready(Ok(()))));
        assert_eq!(room.filled(), b"hello");
        near.write_all(b"hi").await.unwrap();
        let is_fresh = |near: &LocalSocket| matches!(near.reader, Reader::Fresh { .. });
        assert!(is_fresh(&near), "there was nothing to wait for");
        far.write_all(b"go on").unwrap();
        let mut more = [0; 5];
        near.read_exact(&mut more).await.unwrap();
        assert_eq!(&more, b"go on");
        assert!(!is_fresh(&near));
    }

    #[tokio::test]
    async fn to_write_to_a_peer_that_is_gone_is_an_error() {
        let (mut near, far) = pair();
        drop(far);
        let error = near.write_all(b"x").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn a_client_is_accepted_and_its_process_known() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = LocalListener::new(UnixListener::bind(&path).unwrap()).unwrap();
        let (accepted, client) = tokio::join!(listener.accept(), LocalSocket::connect(&path));
        let (accepted, mut client) = (accepted.unwrap(), client.unwrap());
        let (pid, uid) = credentials(&accepted).unwrap();
        assert_eq!(pid, i32::try_from(std::process::id()).ok());
        assert_eq!(uid, rustix::process::getuid().as_raw());
        client.write_all(b"hello").await.unwrap();
        let mut accepted = LocalSocket::new(accepted);
        let mut said = [0; 5];
        accepted.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"hello");
    }
}
