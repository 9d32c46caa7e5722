//! Signals while a command runs. It is in the same process group as `primed run`, so what a
//! terminal sends reaches it by itself; what another process sends to `primed run` is passed on.

use std::io;
use std::os::fd::AsFd;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::process::{Pid, WaitId, WaitIdOptions, getpid, kill_process, waitid};
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, Command};

use super::super::{Failure, exit_codes};
use super::live_line::LiveLine;

/// The signals that are waited for. Those that the process was told to ignore (by nohup, say) stay
/// ignored, for the command too.
const SIGNALS: [Signal; 10] = [
    Signal::SIGCHLD,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGTSTP,
    Signal::SIGCONT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

/// The size of the kernel's `signalfd_siginfo`.
const INFO: usize = 128;

/// Signals that are blocked, to be waited for.
pub struct Blocked(SigSet);

/// What comes in by signals.
pub struct Signals {
    blocked: SigSet,
    incoming: Receiver,
}

/// A signal that has come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incoming {
    signal: Signal,
    /// Whether the kernel sent it, by itself or for a terminal: then the command has it, too.
    by_kernel: bool,
}

impl Signals {
    /// Blocks signals, so that they can be waited for. Call it before there are other threads.
    ///
    /// # Errors
    /// What the system said.
    pub fn block() -> io::Result<Blocked> {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let ignored = ignored(&status);
        let set: SigSet = SIGNALS
            .into_iter()
            .filter(|signal| ignored & (1 << (*signal as u64 - 1)) == 0)
            .collect();
        set.thread_block()?;
        Ok(Blocked(set))
    }

    /// The next signal that ends a process which does nothing about it.
    pub async fn next_deadly(&mut self) -> u8 {
        loop {
            match self.next().await.signal {
                Signal::SIGTSTP => stop_self(),
                Signal::SIGCHLD | Signal::SIGCONT | Signal::SIGWINCH => {}
                deadly => return deadly as u8,
            }
        }
    }

    /// The next signal.
    pub async fn next(&mut self) -> Incoming {
        loop {
            // Nothing is lost if this is given up while it waits.
            if self.incoming.readable().await.is_err() {
                return std::future::pending().await;
            }
            let mut info = [0; INFO];
            if let Ok(INFO) = self.incoming.try_read(&mut info)
                && let Some(incoming) = Incoming::read(&info)
            {
                return incoming;
            }
        }
    }

    /// Starts the command, with the signals that this process began with.
    ///
    /// # Errors
    /// What the system said.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        // A signal at this moment ends this process, as it should: the command has not begun.
        self.blocked.thread_unblock()?;
        let spawned = command.spawn();
        self.blocked.thread_block()?;
        spawned
    }
}

impl Blocked {
    /// Waits for them from now on, on the current runtime.
    pub fn listen(self) -> Result<Signals, Failure> {
        let listen = || -> io::Result<Receiver> {
            let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
            let descriptor = SignalFd::with_flags(&self.0, flags)?;
            // It is no pipe, but is read like one; tokio's own `AsyncFd` can only be made with
            // unsafe code.
            Receiver::from_owned_fd_unchecked(descriptor.as_fd().try_clone_to_owned()?)
        };
        let incoming = listen().map_err(|error| Failure::new(exit_codes::FAILURE, error))?;
        Ok(Signals {
            blocked: self.0,
            incoming,
        })
    }
}

impl Incoming {
    /// Reads a `signalfd_siginfo`: signal number, errno, code, all of 32 bits.
    fn read(info: &[u8; INFO]) -> Option<Self> {
        let (number, rest) = info.split_first_chunk()?;
        let (_errno, rest) = rest.split_first_chunk::<4>()?;
        let (code, _) = rest.split_first_chunk()?;
        Some(Incoming {
            signal: Signal::try_from(i32::from_ne_bytes(*number)).ok()?,
            // `SI_USER`, `SI_QUEUE` and the like, which processes send, are 0 and below.
            by_kernel: i32::from_ne_bytes(*code) > 0,
        })
    }

    /// Passes it on to the command, unless that has it already.
    pub fn pass_on(self, command: Option<u32>) {
        let passed_on = !self.by_kernel && self.signal != Signal::SIGWINCH;
        if let (true, Some(command)) = (passed_on, command.and_then(pid))
            && let Some(signal) = rustix::process::Signal::from_named_raw(self.signal as i32)
        {
            // It may have ended.
            let _ = kill_process(command, signal);
        }
    }

    /// Whether it may tell that the command has stopped, or has ended.
    pub fn is_of_a_child(self) -> bool {
        self.signal == Signal::SIGCHLD
    }

    /// Has the live line again.
    pub fn after(self, line: &mut LiveLine) {
        if matches!(self.signal, Signal::SIGCONT | Signal::SIGWINCH) {
            line.redraw();
        }
    }
}

/// Whether the process is a child that is stopped.
fn is_stopped(child: u32) -> bool {
    // Left for others to wait for, too.
    let state = WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    pid(child).is_some_and(|pid| matches!(waitid(WaitId::Pid(pid), state), Ok(Some(_))))
}

fn pid(child: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(child).ok()?)
}

/// Stops this process, if the command is stopped; not before, since the shell takes the terminal
/// back then, and a command that still runs could read what is typed for the shell. Returns when it
/// is continued.
pub fn stop_with(command: u32, line: Option<&mut LiveLine>) {
    if is_stopped(command) {
        if let Some(line) = line {
            line.hide();
        }
        stop_self();
    }
}

/// Stops this process, as SIGTSTP would have done. Returns when it is continued.
fn stop_self() {
    // That one signals oneself cannot fail.
    let _ = kill_process(getpid(), rustix::process::Signal::STOP);
}

/// The mask of ignored signals, out of `/proc/self/status`.
fn ignored(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_process_was_told_to_ignore_is_known() {
        let status = "Name:\tx\nSigBlk:\t0000000000000002\nSigIgn:\t0000000000000001\n";
        assert_eq!(ignored(status), 1, "SIGHUP, by nohup");
        assert_eq!(ignored(""), 0);
    }

    #[test]
    fn what_a_terminal_sends_is_told_from_what_a_process_sends() {
        let mut info = [0; INFO];
        info[..4].copy_from_slice(&2_i32.to_ne_bytes());
        let by = |info: &[u8; INFO]| {
            let incoming = Incoming::read(info).unwrap();
            (incoming.signal, incoming.by_kernel)
        };
        assert_eq!(by(&info), (Signal::SIGINT, false));
        info[8..12].copy_from_slice(&0x80_i32.to_ne_bytes());
        assert_eq!(by(&info), (Signal::SIGINT, true));
    }
}
