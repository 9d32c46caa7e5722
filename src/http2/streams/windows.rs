//! How much the peer may send before more of it has been read (RFC 9113, 5.2).
//!
//! A stream's window is what can be under way in one round trip, so it limits how fast a far peer can
//! send: 1 MiB brings 50 MB/s at most over 20 ms. So it is remembered how long a peer takes to
//! acknowledge the first SETTINGS, or to answer a call or a PING if it does so sooner: who is near may
//! have been busy. An upstream is called all the time; a client is asked by a PING before each time that
//! its windows grow, for what they hold waits in memory if the upstream is slower. Where that is long, streams
//! that read half a window in less than two round trips, and so may be held up by it, have theirs
//! doubled. At first those of all streams grow, so that a message of 4 MiB need not wait; then each
//! stream's own, as long as its reader is as quick, and what one has come to, the next has as soon as
//! it is read. One that is not read never has more than the former.

use std::time::Duration;

use tokio::time::Instant;

use super::State;
use crate::http2::frame::{self, kind};
use crate::http2::streams::Role;
use crate::http2::{MAX_FRAME_SIZE, STREAM_WINDOW};

/// How long a far peer takes to answer, at least. Nearer ones are not held up by their windows: 1 MiB in
/// each round trip is 260 MB/s. Those on this machine take as long only when all of it is busy.
const FAR: Duration = Duration::from_millis(4);
/// What the windows of all streams grow to, and what those of single ones do.
const LARGEST_FIRST_WINDOW: u32 = 4 * 1024 * 1024;
const LARGEST_STREAM_WINDOW: u32 = 32 * 1024 * 1024;
/// What a PING says that asks how far the peer is.
pub(super) const HOW_FAR: [u8; 8] = *b"how far?";
/// How much is read before the peer is told that it may send as much again.
const CREDIT: u32 = STREAM_WINDOW / 2;

/// How far the peer is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Distance {
    /// The connection began at this time, and with it the first SETTINGS.
    Asked(Instant),
    /// They were acknowledged after so long, or a call was answered sooner.
    Known(Duration),
}

impl State {
    /// The peer has acknowledged SETTINGS.
    pub(super) fn acknowledged(&mut self) {
        if let Distance::Asked(when) = self.distance {
            self.distance = Distance::Known(when.elapsed());
        }
    }

    pub(super) fn round_trip_if_far(&self) -> Option<Duration> {
        match self.distance {
            Distance::Known(round_trip) if round_trip >= FAR => Some(round_trip),
            _ => None,
        }
    }

    /// When a call begins, if it is of interest how soon its answer comes: the first words may have
    /// been acknowledged late only because the peer was busy.
    pub(super) fn asks(&self) -> Option<Instant> {
        self.round_trip_if_far().map(|_| Instant::now())
    }

    /// An answer has begun.
    pub(super) fn answered(&mut self, key: usize) {
        if let Some(asked) = self.streams[key].asked {
            self.heard_since(asked);
        }
    }

    /// Asks a client how far it is, unless it has been asked and has not answered yet. Returns whether
    /// it had answered.
    fn ask_how_far(&mut self) -> bool {
        if self.asked_how_far.is_some() {
            return false;
        }
        if let Role::Server { .. } = self.role {
            self.asked_how_far = Some(Instant::now());
            frame::put(&mut self.control, kind::PING, 0, 0, &HOW_FAR);
            self.stir();
        }
        true
    }

    /// It has answered that.
    pub(super) fn told_how_far(&mut self) {
        if let Some(asked) = self.asked_how_far.take() {
            self.heard_since(asked);
        }
    }

    /// The peer answers what it was asked then: it is no farther than that.
    fn heard_since(&mut self, asked: Instant) {
        if let Distance::Known(round_trip) = &mut self.distance {
            *round_trip = asked.elapsed().min(*round_trip);
        }
    }

    /// So much of a stream's data has been read, or is of no use: the peer may send as much again.
    pub(super) fn credit(&mut self, key: usize, size: usize) {
        if size == 0 {
            return;
        }
        self.credit_connection(size);
        let stream = &mut self.streams[key];
        stream.credit += size as u32;
        if stream.credit < CREDIT || stream.has_ended || stream.error.is_some() {
            return;
        }
        let credit = std::mem::take(&mut stream.credit);
        let round_trip = self.round_trip_if_far();
        let more = round_trip.map_or(0, |round_trip| self.widen(key, credit, round_trip));
        let stream = &mut self.streams[key];
        stream.window_in += i64::from(credit + more);
        let id = stream.id;
        self.tell_window(id, credit + more);
    }

    /// So much has been read on a stream from a far peer. Returns what its own window grows by.
    fn widen(&mut self, key: usize, credit: u32, round_trip: Duration) -> u32 {
        let stream = &mut self.streams[key];
        let window = self.first_window_in + stream.extra_window;
        let now = Instant::now();
        let Some((since, read)) = &mut stream.pace else {
            stream.pace = Some((now, 0));
            let more = self.widest.saturating_sub(window);
            stream.extra_window += more;
            self.ask_how_far();
            return more;
        };
        *read += credit;
        if *read < window / 2 {
            return 0;
        }
        let is_quick = now.duration_since(*since) < 2 * round_trip;
        stream.pace = Some((now, 0));
        if !is_quick || window >= LARGEST_STREAM_WINDOW || !self.ask_how_far() {
            return 0;
        }
        let stream = &mut self.streams[key];
        if self.first_window_in >= LARGEST_FIRST_WINDOW {
            stream.extra_window += window;
            self.widest = self.widest.max(2 * window);
            return window;
        }
        let more = self.first_window_in;
        self.first_window_in += more;
        for (_, stream) in &mut self.streams {
            stream.window_in += i64::from(more);
        }
        let settings = frame::settings(&[(4, self.first_window_in)]);
        frame::put(&mut self.control, kind::SETTINGS, 0, 0, &settings);
        0
    }

    /// A message of this size, and a frame of the next, are to fit into a stream's window, whatever the peer
    /// has not been told of.
    pub(super) fn fit(&mut self, key: usize, size: u32) {
        let wanted = size.saturating_add(MAX_FRAME_SIZE + CREDIT);
        let wanted = wanted.min(LARGEST_FIRST_WINDOW);
        let stream = &mut self.streams[key];
        let more = wanted.saturating_sub(self.first_window_in + stream.extra_window);
        if more > 0 {
            stream.extra_window += more;
            stream.window_in += i64::from(more);
            let id = stream.id;
            self.tell_window(id, more);
        }
    }

    /// What `credit` does, for the connection alone, for data of which no stream knows.
    pub(super) fn credit_connection(&mut self, size: usize) {
        self.credit += size as u32;
        if self.credit >= self.window / 2 {
            let credit = std::mem::take(&mut self.credit);
            self.window_in += i64::from(credit);
            self.tell_window(0, credit);
        }
    }

    fn tell_window(&mut self, id: u32, credit: u32) {
        let credit = credit.to_be_bytes();
        frame::put(&mut self.control, kind::WINDOW_UPDATE, 0, id, &credit);
        self.stir();
    }
}
