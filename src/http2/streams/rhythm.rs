//! Whether a server pauses between the messages of an answer, of its own accord. gRPC's messages are not
//! looked into for it: a frame that is as large as it may be is followed by more of its message.

use std::time::Duration;

use tokio::time::Instant;

use super::{Role, State};
use crate::http2::MAX_FRAME_SIZE;
use crate::http2::frame::{FrameHeader, flag};

/// From this time on it is a pause. casd takes 2 ms to prepare a message of 2 MiB; whoever need not do
/// that takes some tens of microseconds to go on.
const PAUSE: Duration = Duration::from_micros(500);

/// How a server sends the large messages of a stream: those that do not fit into one frame.
#[derive(Default)]
pub(super) struct Rhythm {
    /// How much has come of the one that has begun, if one has.
    begun: u32,
    /// How large the last one was,
    last: u32,
    /// and when it was complete, if the server could have gone on.
    complete: Option<Instant>,
    /// The server is near, and pauses between them though all that it has sent is read.
    pauses: bool,
}

impl State {
    /// A frame of data has come; so much of what came before it is not read. Returns whether whoever reads
    /// had better wait for the rest of the message. What clients send is never waited for: there is nothing to
    /// be gained.
    pub(super) fn follow_rhythm(
        &mut self,
        key: usize,
        header: &FrameHeader,
        unread: usize,
    ) -> bool {
        if self.role != Role::Client {
            return false;
        }
        let size = header.length as u32;
        let is_near = self.round_trip_if_far().is_none();
        let stream = &mut self.streams[key];
        let rhythm = &mut stream.rhythm;
        if size < MAX_FRAME_SIZE {
            if rhythm.begun > 0 {
                rhythm.last = std::mem::take(&mut rhythm.begun).saturating_add(size);
                rhythm.complete = may_go_on(stream.window_in).then(Instant::now);
            }
            return false;
        }
        let begins = rhythm.begun == 0;
        if begins && let Some(complete) = rhythm.complete.take() {
            rhythm.pauses = is_near && unread == 0 && complete.elapsed() >= PAUSE;
        }
        rhythm.begun = rhythm.begun.saturating_add(size);
        if !rhythm.pauses {
            return false;
        }
        if begins {
            let last = rhythm.last;
            self.fit(key, last);
        }
        may_go_on(self.streams[key].window_in) && !header.has(flag::END_STREAM)
    }
}

/// Whether a server may send another frame of the largest size.
fn may_go_on(window: i64) -> bool {
    window >= i64::from(MAX_FRAME_SIZE)
}
