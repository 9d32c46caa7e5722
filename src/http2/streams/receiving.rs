//! What the peer says, frame by frame. What breaks the rules of HTTP/2 ends the stream or the
//! connection, as RFC 9113 has it.

use std::sync::Arc;

use bytes::Bytes;
use http::header::CONTENT_LENGTH;
use http::{Method, StatusCode};

use super::windows::HOW_FAR;
use super::{
    BLOCK_FACTOR, CONTINUATIONS, Call, FAREWELL, Frame, LINGERING, Phase, Role, State, Stream,
    StreamError, Unfinished,
};
use crate::http2::MAX_FRAME_SIZE;
use crate::http2::fields::Fields;
use crate::http2::frame::{
    self, FrameHeader, LARGEST_WINDOW, Reason, Settings, flag, kind, unpadded,
};
use crate::http2::hpack::{Block, Pseudo, TABLE_SIZE};
use crate::http2::whole_messages;

impl State {
    /// Takes a frame that was read. `whole` is the payload once more, if it is to be kept as it is
    /// instead of being copied.
    ///
    /// # Errors
    /// The reason with which the connection must end.
    pub fn receive(
        &mut self,
        header: FrameHeader,
        payload: &[u8],
        whole: Option<&Bytes>,
    ) -> Result<(), Reason> {
        let is_settings = header.kind == kind::SETTINGS && !header.has(flag::ACK);
        if !self.is_greeted && !is_settings {
            return Err(Reason::PROTOCOL_ERROR);
        }
        self.is_greeted = true;
        if let Some(Unfinished { stream, .. }) = self.unfinished
            && (header.kind, header.stream) != (kind::CONTINUATION, stream)
        {
            return Err(Reason::PROTOCOL_ERROR);
        }
        let of_connection = [kind::SETTINGS, kind::PING, kind::GOAWAY];
        let of_either = [kind::WINDOW_UPDATE];
        let is_known = header.kind <= kind::CONTINUATION && !of_either.contains(&header.kind);
        if is_known && of_connection.contains(&header.kind) != (header.stream == 0) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        match header.kind {
            kind::DATA => self.data(header, payload, whole),
            kind::HEADERS => self.headers(header, payload),
            kind::CONTINUATION => self.continuation(header, payload),
            kind::PRIORITY if payload.len() != 5 => {
                self.reset_by_id(header.stream, Reason::FRAME_SIZE_ERROR);
                Ok(())
            }
            kind::RST_STREAM => self.reset_by_peer(header.stream, number(payload)?),
            kind::SETTINGS => self.settings(header, payload),
            kind::PUSH_PROMISE => Err(Reason::PROTOCOL_ERROR),
            kind::PING => self.pinged(header, payload),
            kind::GOAWAY => self.left_by_peer(payload),
            kind::WINDOW_UPDATE => self.window_update(header.stream, number(payload)?),
            // Priorities are ignored, and so are frames of kinds that do not exist yet.
            _ => Ok(()),
        }
    }

    fn data(
        &mut self,
        header: FrameHeader,
        payload: &[u8],
        whole: Option<&Bytes>,
    ) -> Result<(), Reason> {
        let size = header.length;
        self.window_in -= size as i64;
        if self.window_in < 0 {
            return Err(Reason::FLOW_CONTROL_ERROR);
        }
        let data = unpadded(&header, payload)?;
        let Some(&key) = self.by_id.get(&header.stream) else {
            self.credit_connection(size);
            return self.late(header.stream);
        };
        let stream = &mut self.streams[key];
        stream.window_in -= size as i64;
        let refused = if stream.has_ended {
            Some(Reason::STREAM_CLOSED)
        } else if stream.window_in < 0 {
            Some(Reason::FLOW_CONTROL_ERROR)
        } else {
            let left = stream
                .announced
                .map(|due| due.checked_sub(data.len() as u64));
            stream.announced = left.flatten();
            let is_too_long = left == Some(None);
            (!stream.is_begun || is_too_long).then_some(Reason::PROTOCOL_ERROR)
        };
        if let Some(reason) = refused {
            self.credit_connection(size);
            self.reset(key, reason, StreamError::Violation(reason));
            return Ok(());
        }
        let kept = match stream.has_reader {
            true => data.len(),
            false => 0,
        };
        if kept > 0 {
            let unread = stream.unread;
            stream.push(match whole {
                Some(whole) => whole.slice_ref(data),
                None => Bytes::copy_from_slice(data),
            });
            let is_amid = self.follow_rhythm(key, &header, unread);
            let stream = &mut self.streams[key];
            if !(is_amid && whole_messages::wait(&mut stream.reader)) {
                stream.wake_reader();
            }
        }
        self.credit(key, size - kept);
        self.moved(key, size);
        if header.has(flag::END_STREAM) {
            self.ended_by_peer(key);
        }
        Ok(())
    }

    fn ended_by_peer(&mut self, key: usize) {
        let stream = &mut self.streams[key];
        if stream.announced.is_some_and(|due| due > 0) {
            let reason = Reason::PROTOCOL_ERROR;
            return self.reset(key, reason, StreamError::Violation(reason));
        }
        stream.has_ended = true;
        stream.wake_reader();
        self.settle(key);
    }

    fn headers(&mut self, header: FrameHeader, payload: &[u8]) -> Result<(), Reason> {
        let mut block = unpadded(&header, payload)?;
        if header.has(flag::PRIORITY) {
            block = block.get(5..).ok_or(Reason::FRAME_SIZE_ERROR)?;
        }
        let is_end = header.has(flag::END_STREAM);
        if header.has(flag::END_HEADERS) {
            return self.list(header.stream, is_end, block);
        }
        self.unfinished = Some(Unfinished {
            stream: header.stream,
            is_end,
            block: block.to_vec(),
            frames: 0,
        });
        Ok(())
    }

    fn continuation(&mut self, header: FrameHeader, payload: &[u8]) -> Result<(), Reason> {
        let mut unfinished = self.unfinished.take().ok_or(Reason::PROTOCOL_ERROR)?;
        unfinished.block.extend_from_slice(payload);
        unfinished.frames += 1;
        let is_too_long = unfinished.block.len() > BLOCK_FACTOR * self.header_list;
        if is_too_long || unfinished.frames > CONTINUATIONS {
            return Err(Reason::ENHANCE_YOUR_CALM);
        }
        if header.has(flag::END_HEADERS) {
            return self.list(unfinished.stream, unfinished.is_end, &unfinished.block);
        }
        self.unfinished = Some(unfinished);
        Ok(())
    }

    /// A header list is complete.
    fn list(&mut self, id: u32, is_end: bool, block: &[u8]) -> Result<(), Reason> {
        let decoded = self.decoder.decode(block);
        let block = decoded.map_err(|_| Reason::COMPRESSION_ERROR)?;
        match (self.by_id.get(&id).copied(), self.role) {
            (Some(key), _) => {
                let understood = match self.streams[key].is_begun {
                    true => self.trailers(key, is_end, &block),
                    false => self.response(key, is_end, block),
                };
                if let Err(reason) = understood {
                    self.reset(key, reason, StreamError::Violation(reason));
                }
                Ok(())
            }
            (None, Role::Client) => self.late(id),
            (None, Role::Server { .. }) if id.is_multiple_of(2) => Err(Reason::PROTOCOL_ERROR),
            (None, Role::Server { .. }) if id <= self.newest => self.late(id),
            (None, Role::Server { max_streams }) => {
                self.newest = id;
                self.request(id, is_end, block, max_streams as usize);
                Ok(())
            }
        }
    }

    fn request(&mut self, id: u32, is_end: bool, block: Arc<Block>, max_streams: usize) {
        let refused = if matches!(self.phase, Phase::Left) {
            // The peer knows that nobody looks at it.
            return self.remember_reset(id);
        } else if self.by_id.len() >= max_streams || self.streams.len() >= max_streams + LINGERING {
            Some(Reason::REFUSED_STREAM)
        } else {
            let is_whole = block.path.is_some() && block.has_scheme && block.status.is_none();
            let is_call = block
                .method
                .as_ref()
                .is_some_and(|method| *method != Method::CONNECT);
            let is_good = is_whole && is_call && !block.is_malformed || block.is_too_large;
            (!is_good).then_some(Reason::PROTOCOL_ERROR)
        };
        if let Some(reason) = refused {
            return self.reset_by_id(id, reason);
        }
        let mut stream = Stream::new(id, self.first_window_in, self.first_window_out);
        stream.is_begun = true;
        stream.is_opened = true;
        stream.announced = announced(&block.fields);
        let key = self.streams.insert(stream);
        self.by_id.insert(id, key);
        if block.is_too_large {
            let stream = &mut self.streams[key];
            (stream.handles, stream.has_reader) = (0, false);
            let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
            self.queue_head(key, Pseudo::Response(status), Fields::new(), true);
            if !is_end {
                self.queue(key, Frame::Reset(Reason::NO_ERROR));
            }
        } else {
            self.calls.push(Call { key, head: block });
        }
        if is_end {
            self.ended_by_peer(key);
        }
    }

    fn response(&mut self, key: usize, is_end: bool, block: Arc<Block>) -> Result<(), Reason> {
        let status = block.status.ok_or(Reason::PROTOCOL_ERROR)?;
        let has_others = block.method.is_some() || block.path.is_some();
        if has_others || block.is_malformed || block.is_too_large {
            return Err(Reason::PROTOCOL_ERROR);
        }
        if status.is_informational() {
            // Another one follows.
            return match is_end {
                true => Err(Reason::PROTOCOL_ERROR),
                false => Ok(()),
            };
        }
        let stream = &mut self.streams[key];
        stream.is_begun = true;
        stream.head = Some(block);
        stream.wake_reader();
        self.answered(key);
        if is_end {
            self.ended_by_peer(key);
        }
        Ok(())
    }

    fn trailers(&mut self, key: usize, is_end: bool, block: &Block) -> Result<(), Reason> {
        let stream = &mut self.streams[key];
        if stream.has_ended {
            return Err(Reason::STREAM_CLOSED);
        }
        if !is_end || block.has_pseudo() || block.is_malformed || block.is_too_large {
            return Err(Reason::PROTOCOL_ERROR);
        }
        stream.trailers = Some(block.fields.clone());
        self.ended_by_peer(key);
        Ok(())
    }

    /// A frame for a stream that is not open. That is no error if it may have been sent before the
    /// peer knew.
    fn late(&mut self, id: u32) -> Result<(), Reason> {
        if self.is_idle(id) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        if !self.resets.contains(&id) {
            self.reset_by_id(id, Reason::STREAM_CLOSED);
        }
        Ok(())
    }

    /// Whether there has never been such a stream.
    fn is_idle(&self, id: u32) -> bool {
        match self.role {
            _ if id.is_multiple_of(2) => true,
            Role::Client => id >= self.next,
            Role::Server { .. } => id > self.newest,
        }
    }

    fn reset_by_peer(&mut self, id: u32, reason: u32) -> Result<(), Reason> {
        let reason = Reason(reason);
        // Streams that were opened before the peer said how many it takes.
        let are_too_many = self.role == Role::Client && self.by_id.len() > self.max_streams();
        if let Some(key) = self.by_id.remove(&id) {
            self.unqueue(key);
            let stream = &mut self.streams[key];
            let error = match reason {
                // The latter is what newer C-cores say (gRPC 1.85: measured).
                Reason::REFUSED_STREAM | Reason::ENHANCE_YOUR_CALM if are_too_many => {
                    StreamError::NotProcessed(reason)
                }
                reason => StreamError::Reset(reason),
            };
            stream.error.get_or_insert(error);
            stream.wake_reader();
            stream.wake_writer();
            self.settle(key);
            self.open_waiting();
        } else if self.is_idle(id) {
            return Err(Reason::PROTOCOL_ERROR);
        }
        Ok(())
    }

    fn settings(&mut self, header: FrameHeader, payload: &[u8]) -> Result<(), Reason> {
        if header.has(flag::ACK) {
            return match payload {
                [] => {
                    self.acknowledged();
                    Ok(())
                }
                _ => Err(Reason::FRAME_SIZE_ERROR),
            };
        }
        let settings = Settings::read(payload)?;
        if let Some(size) = settings.header_table_size {
            self.encoder.resize((size as usize).min(TABLE_SIZE));
        }
        if let Some(size) = settings.max_frame_size {
            self.frame_size = size.min(MAX_FRAME_SIZE) as usize;
        }
        if let Some(size) = settings.initial_window_size {
            let more = i64::from(size) - self.first_window_out;
            self.first_window_out = i64::from(size);
            for (_, stream) in &mut self.streams {
                stream.window_out += more;
                if stream.window_out > LARGEST_WINDOW {
                    return Err(Reason::FLOW_CONTROL_ERROR);
                }
                if more > 0 && stream.is_waiting {
                    stream.wake_writer();
                }
            }
        }
        let max_streams = settings.max_concurrent_streams.map(|max| max as usize);
        // What is not said in the first ones is not limited.
        self.max_streams = max_streams.or(self.max_streams).or(Some(usize::MAX));
        self.open_waiting();
        frame::put(&mut self.control, kind::SETTINGS, flag::ACK, 0, &[]);
        Ok(())
    }

    fn pinged(&mut self, header: FrameHeader, payload: &[u8]) -> Result<(), Reason> {
        if payload.len() != FAREWELL.len() {
            return Err(Reason::FRAME_SIZE_ERROR);
        }
        if !header.has(flag::ACK) {
            frame::put(&mut self.control, kind::PING, flag::ACK, 0, payload);
        } else if payload == HOW_FAR {
            self.told_how_far();
        } else if payload == FAREWELL && matches!(self.phase, Phase::Leaving) {
            self.phase = Phase::Left;
            self.go_away(self.newest, Reason::NO_ERROR);
        }
        Ok(())
    }

    fn left_by_peer(&mut self, payload: &[u8]) -> Result<(), Reason> {
        let (last, rest) = payload
            .split_at_checked(4)
            .ok_or(Reason::FRAME_SIZE_ERROR)?;
        let reason = Reason(number(rest.get(..4).unwrap_or_default())?);
        if self.role != Role::Client {
            return Ok(());
        }
        let last = number(last)? & 0x7fff_ffff;
        self.phase = Phase::Left;
        let mut unseen: Vec<usize> = self.waiting.drain(..).map(|(key, _)| key).collect();
        self.by_id.retain(|id, key| {
            let is_seen = *id <= last;
            if !is_seen {
                unseen.push(*key);
            }
            is_seen
        });
        for key in unseen {
            self.unqueue(key);
            let stream = &mut self.streams[key];
            stream
                .error
                .get_or_insert(StreamError::NotProcessed(reason));
            stream.wake_reader();
            stream.wake_writer();
            self.settle(key);
        }
        Ok(())
    }

    fn window_update(&mut self, id: u32, more: u32) -> Result<(), Reason> {
        let more = i64::from(more & 0x7fff_ffff);
        let grown = |window: i64| match window + more {
            _ if more == 0 => Err(Reason::PROTOCOL_ERROR),
            window if window > LARGEST_WINDOW => Err(Reason::FLOW_CONTROL_ERROR),
            window => Ok(window),
        };
        if id == 0 {
            self.window_out = grown(self.window_out)?;
            self.unblock();
            return Ok(());
        }
        let Some(&key) = self.by_id.get(&id) else {
            return match self.is_idle(id) {
                true => Err(Reason::PROTOCOL_ERROR),
                false => Ok(()),
            };
        };
        let stream = &mut self.streams[key];
        match grown(stream.window_out) {
            Ok(window) => {
                stream.window_out = window;
                if stream.is_waiting {
                    stream.wake_writer();
                }
            }
            Err(reason) => self.reset(key, reason, StreamError::Violation(reason)),
        }
        Ok(())
    }
}

/// A payload that is a number.
fn number(payload: &[u8]) -> Result<u32, Reason> {
    let bytes = payload.try_into().map_err(|_| Reason::FRAME_SIZE_ERROR)?;
    Ok(u32::from_be_bytes(bytes))
}

/// How long a body is going to be.
fn announced(fields: &Fields) -> Option<u64> {
    fields.get(&CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
