//! What streams send: it waits in two lanes until it is its turn, and is encoded only then.

use bytes::BytesMut;

use super::{Frame, QUEUED, REMEMBERED_RESETS, SMALL, State, StreamError};
use crate::chunks::Chunks;
use crate::http2::SEND_BUFFER;
use crate::http2::fields::Fields;
use crate::http2::frame::{self, Reason, kind};
use crate::http2::hpack::Pseudo;
use crate::http2::outbox::Outbox;

impl State {
    pub(super) fn queue_head(&mut self, key: usize, pseudo: Pseudo, fields: Fields, is_end: bool) {
        let head = Frame::Head {
            pseudo,
            fields,
            is_end,
        };
        self.streams[key].is_ended |= is_end;
        self.queue(key, head);
    }

    pub(super) fn queue(&mut self, key: usize, frame: Frame) {
        let size = frame.size();
        let stream = &mut self.streams[key];
        stream.frames += 1;
        stream.queued += size;
        self.queued += size;
        if stream.slow > 0 || size > SMALL {
            stream.slow += 1;
            self.slow.push_back((key, frame));
        } else {
            self.fast.push_back((key, frame));
        }
        self.stir();
    }

    /// Takes back what a stream has queued.
    pub(super) fn unqueue(&mut self, key: usize) {
        let stream = &mut self.streams[key];
        if stream.frames == 0 {
            return;
        }
        self.window_out += stream.queued as i64;
        self.queued -= stream.queued;
        (stream.frames, stream.queued, stream.slow) = (0, 0, 0);
        self.fast.retain(|(of, _)| *of != key);
        self.slow.retain(|(of, _)| *of != key);
        self.unblock();
    }

    /// Wakes writers that may have room again.
    pub(super) fn unblock(&mut self) {
        if self.window_out <= 0 || self.queued > QUEUED / 2 {
            return;
        }
        for key in std::mem::take(&mut self.blocked) {
            if let Some(stream) = self.streams.get_mut(key) {
                stream.is_blocked = false;
                stream.wake_writer();
            }
        }
    }

    /// Opens streams that had to wait.
    pub(super) fn open_waiting(&mut self) {
        while self.by_id.len() < self.max_streams()
            && let Some((key, head)) = self.waiting.pop_front()
        {
            self.open(key);
            self.queue(key, head);
            self.streams[key].wake_writer();
        }
    }

    pub(super) fn open(&mut self, key: usize) {
        let asked = self.asks();
        let stream = &mut self.streams[key];
        stream.asked = asked;
        stream.id = self.next;
        stream.window_out = self.first_window_out;
        self.next += 2;
        self.by_id.insert(stream.id, key);
    }

    /// Hands frames that are due over to be written, as many as make a good write.
    pub fn assemble(&mut self, out: &mut Outbox) {
        loop {
            out.append(&mut self.control);
            if out.is_full() {
                return;
            }
            let (key, frame) = match self.fast.pop_front() {
                Some(next) => next,
                None => match self.slow.pop_front() {
                    Some(next) => {
                        self.streams[next.0].slow -= 1;
                        next
                    }
                    None => return,
                },
            };
            let size = frame.size();
            let is_end = self.write(key, frame, out);
            self.queued -= size;
            let stream = &mut self.streams[key];
            stream.queued -= size;
            stream.frames -= 1;
            if stream.is_waiting && stream.queued <= SEND_BUFFER / 2 {
                stream.wake_writer();
            }
            if size > 0 && !self.blocked.is_empty() {
                self.unblock();
            }
            if is_end {
                self.settle(key);
            }
        }
    }

    /// Whether something has ended with it.
    fn write(&mut self, key: usize, frame: Frame, out: &mut Outbox) -> bool {
        let stream = &mut self.streams[key];
        match frame {
            Frame::Head {
                pseudo,
                fields,
                is_end,
            } => {
                stream.is_opened = true;
                stream.is_sent |= is_end;
                self.scratch.clear();
                self.encoder.encode(&pseudo, &fields, &mut self.scratch);
                out.head(stream.id, &self.scratch, is_end, self.frame_size);
                if self.scratch.capacity() > 4096 {
                    self.scratch = Vec::new();
                }
                is_end
            }
            Frame::Data { data, is_end } => {
                stream.is_sent |= is_end;
                out.data(stream.id, data, is_end, self.frame_size);
                is_end
            }
            Frame::Reset(reason) => {
                let id = stream.id;
                if self.by_id.remove(&id).is_some() {
                    self.reset_by_id(id, reason);
                }
                true
            }
        }
    }

    /// Resets a stream, whose error this becomes.
    pub(super) fn reset(&mut self, key: usize, reason: Reason, error: StreamError) {
        self.unqueue(key);
        let stream = &mut self.streams[key];
        stream.error.get_or_insert(error);
        stream.wake_reader();
        stream.wake_writer();
        let (id, is_opened) = (stream.id, stream.is_opened);
        self.discard(key);
        if self.by_id.remove(&id).is_some() {
            match is_opened {
                true => self.reset_by_id(id, reason),
                // The server never hears of it.
                false => self.remember_reset(id),
            }
            self.open_waiting();
        }
        self.settle(key);
    }

    pub(super) fn reset_by_id(&mut self, id: u32, reason: Reason) {
        let payload = reason.0.to_be_bytes();
        frame::put(&mut self.control, kind::RST_STREAM, 0, id, &payload);
        self.remember_reset(id);
        self.stir();
    }

    pub(super) fn remember_reset(&mut self, id: u32) {
        if self.resets.len() == REMEMBERED_RESETS {
            self.resets.pop_front();
        }
        self.resets.push_back(id);
    }

    /// Drops what has not been read of a stream.
    pub(super) fn discard(&mut self, key: usize) {
        let stream = &mut self.streams[key];
        stream.chunks = Chunks::default();
        stream.gathered = BytesMut::new();
        let unread = std::mem::take(&mut stream.unread);
        self.credit(key, unread);
    }

    /// Forgets a stream as far as it is at its end.
    pub(super) fn settle(&mut self, key: usize) {
        let stream = &mut self.streams[key];
        let (id, handles, frames) = (stream.id, stream.handles, stream.frames);
        if stream.has_ended && stream.is_sent && frames == 0 && self.by_id.remove(&id).is_some() {
            self.open_waiting();
            self.stir();
        }
        if handles == 0 && frames == 0 && !self.by_id.contains_key(&id) {
            self.streams.remove(key);
            self.stir();
        }
    }
}
