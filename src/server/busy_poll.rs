//! Whether a thread that carries calls sleeps as soon as it has nothing to do.
//!
//! A processor that has nothing to do sleeps, too, and a virtual one above all takes tens of microseconds to
//! wake. Where calls are made one at a time that happens to primed twice in each, and is most of what a proxy
//! adds to them. So while one thing follows the other sooner than that, a thread asks the system over and
//! over what there is (busy polling) before it sleeps. Whoever wants its processor meanwhile has it first. If
//! somebody keeps it, the thread sleeps at once, as others do, for a while; and also where many calls
//! are under way, of which there is always one to go on with, or where much is transferred.

use std::cell::RefCell;
use std::future::poll_fn;
use std::num::NonZero;
use std::task::{Poll, Waker};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use crate::http2::{frame_memory, whole_messages};
use crate::meters::METERS;
use crate::stream;

/// A thread polls if it has this much hope that something comes soon,
const ENOUGH: u8 = 4;
/// of at most so much. What comes soon adds one to it.
const MOST: u8 = 8;
/// What it takes away to have polled in vain.
const VAIN: u8 = 2;
/// A client and a backend keep so many processors busy with each call under way: there is no hope where that
/// leaves none.
const PROCESSORS_OF_CALL: usize = 2;
/// The same if more bytes than these were transferred since a thread had nothing to do before: there is more to
/// come, and whoever sends and receives it wants the processors.
const MUCH: u64 = 32 * 1024;
/// For how long a thread does not poll whose processor was kept by others; twice as long each time that it
/// happens again within that time,
const FIRST_REST: Duration = Duration::from_millis(50);
/// up to this.
const LONGEST_REST: Duration = Duration::from_millis(3200);

thread_local! {
    /// Of this thread, if it polls at all.
    static THIS: RefCell<Option<BusyPoll>> = const { RefCell::new(None) };
}

/// Has the current thread poll before it sleeps, each time for at most `patience`; never with zero.
/// Its runtime must tell of it (`idle`, `woke`). Ends only with zero.
pub async fn keep(patience: Duration) {
    if patience.is_zero() {
        return;
    }
    let few = available_parallelism().map_or(1, NonZero::get) / PROCESSORS_OF_CALL;
    let this = BusyPoll::new(patience, few.max(1) as u64, Instant::now());
    THIS.set(Some(this));
    whole_messages::begin();
    loop {
        poll_fn(|cx| match with_this(|this| this.is_due(cx.waker())) {
            Some(true) => Poll::Ready(()),
            Some(false) | None => Poll::Pending,
        })
        .await;
        while with_this(|this| this.goes_on(Instant::now(), stream::reads())) == Some(true) {
            let began = Instant::now();
            std::thread::yield_now();
            let now = Instant::now();
            with_this(|this| this.gave_way(now, now - began));
            // Has the runtime ask the system, and the tasks run that something has come for.
            tokio::task::yield_now().await;
        }
    }
}

/// The thread has nothing to do. If it is to poll, the task that `keep` is polled by is woken.
pub fn idle() {
    let polls = with_this(|this| {
        let polls = this.idle(Instant::now(), stream::reads(), Load::now());
        if let Some(task) = this.task.as_ref().filter(|_| polls) {
            task.wake_by_ref();
        }
        polls
    });
    if polls != Some(true) {
        whole_messages::pass_on();
    }
}

/// The thread has asked the system what there is, and may have slept until there was something.
pub fn woke() {
    with_this(|this| this.woke(Instant::now()));
}

fn with_this<T>(act: impl FnOnce(&mut BusyPoll) -> T) -> Option<T> {
    THIS.with_borrow_mut(|this| this.as_mut().map(act))
}

/// What the process has to do.
#[derive(Clone, Copy)]
struct Load {
    /// Calls that are under way.
    calls: u64,
    /// Bytes that were transferred since it began, but for small messages.
    bytes: u64,
    /// Whether this thread waits for the rest of a large message.
    is_amid_message: bool,
}

impl Load {
    fn now() -> Self {
        Load {
            calls: METERS.calls.all.present(),
            bytes: frame_memory::read(),
            is_amid_message: whole_messages::are_awaited(),
        }
    }
}

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Working,
    Polling,
    Sleeping,
}

/// See the module.
struct BusyPoll {
    patience: Duration,
    /// How many calls may be under way.
    few: u64,
    doing: Doing,
    /// Since when nothing has come,
    idle_since: Instant,
    /// and how often something had by then.
    reads: u64,
    /// What had been transferred when it had nothing to do last.
    bytes: u64,
    hope: u8,
    /// Until when it does not poll,
    rests_until: Instant,
    /// and for how long in all.
    rest: Duration,
    /// The task that polls.
    task: Option<Waker>,
}

impl BusyPoll {
    fn new(patience: Duration, few: u64, now: Instant) -> Self {
        BusyPoll {
            patience,
            few,
            doing: Doing::Working,
            idle_since: now,
            reads: 0,
            bytes: 0,
            hope: 0,
            rests_until: now,
            rest: FIRST_REST,
            task: None,
        }
    }

    /// The thread has nothing to do, and something has come to it so often: whether it polls now.
    fn idle(&mut self, now: Instant, reads: u64, load: Load) -> bool {
        let is_new = reads != self.reads;
        if is_new {
            (self.idle_since, self.reads) = (now, reads);
        }
        if load.calls > self.few || load.bytes > self.bytes + MUCH {
            self.hope = 0;
        }
        self.bytes = load.bytes;
        let hopes = self.hope >= ENOUGH || load.is_amid_message && load.calls <= self.few;
        let polls = is_new && hopes && now >= self.rests_until;
        self.doing = if polls {
            Doing::Polling
        } else {
            Doing::Sleeping
        };
        polls
    }

    /// Whether it polls; if not, the task is woken when it does.
    fn is_due(&mut self, task: &Waker) -> bool {
        if !self.task.as_ref().is_some_and(|own| own.will_wake(task)) {
            self.task = Some(task.clone());
        }
        self.doing == Doing::Polling
    }

    /// Whether it polls once more.
    fn goes_on(&mut self, now: Instant, reads: u64) -> bool {
        if self.doing != Doing::Polling {
            return false;
        }
        if reads != self.reads {
            self.hope = (self.hope + 1).min(MOST);
        } else if now - self.idle_since > self.patience {
            self.hope = self.hope.saturating_sub(VAIN);
        } else {
            return true;
        }
        self.doing = Doing::Working;
        false
    }

    /// Others could have its processor just now, and had it for so long.
    fn gave_way(&mut self, now: Instant, others: Duration) {
        if others <= self.patience {
            return;
        }
        if now > self.rests_until + self.rest {
            self.rest = FIRST_REST;
        }
        self.rests_until = now + self.rest;
        self.rest = (self.rest * 2).min(LONGEST_REST);
        self.doing = Doing::Working;
    }

    /// If it has slept, it is over.
    fn woke(&mut self, now: Instant) {
        if self.doing != Doing::Sleeping {
            return;
        }
        self.doing = Doing::Working;
        self.hope = match now - self.idle_since <= self.patience {
            true => (self.hope + 1).min(MOST),
            false => self.hope.saturating_sub(1),
        };
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::local_socket::LocalSocket;
    use crate::stream::{Stream, Transport};
    use crate::task;

    const PATIENCE: Duration = Duration::from_micros(200);
    const FEW: u64 = 2;
    const SOON: Duration = Duration::from_micros(30);
    const LATE: Duration = Duration::from_millis(1);

    /// A thread to which things happen.
    struct Thread {
        poll: BusyPoll,
        now: Instant,
        reads: u64,
        bytes: u64,
        is_amid_message: bool,
    }

    impl Thread {
        fn new() -> Self {
            let now = Instant::now();
            Thread {
                poll: BusyPoll::new(PATIENCE, FEW, now),
                now,
                reads: 0,
                bytes: 0,
                is_amid_message: false,
            }
        }

        /// Something has come and been dealt with, and so many calls are under way: whether it polls now.
        fn works(&mut self, calls: u64) -> bool {
            self.reads += 1;
            self.idles(calls)
        }

        /// It has nothing to do, and so many calls are under way: whether it polls now.
        fn idles(&mut self, calls: u64) -> bool {
            let bytes = self.bytes;
            let load = Load {
                calls,
                bytes,
                is_amid_message: self.is_amid_message,
            };
            self.poll.idle(self.now, self.reads, load)
        }

        /// Nothing more comes for so long: whether it polls yet.
        fn waits(&mut self, time: Duration) -> bool {
            self.now += time;
            self.poll.goes_on(self.now, self.reads)
        }

        /// It has slept for so long.
        fn sleeps(&mut self, time: Duration) {
            self.now += time;
            self.poll.woke(self.now);
        }

        /// One thing follows the other, until it polls.
        fn hopes(&mut self) {
            let mut times = 0;
            while !self.works(1) {
                self.sleeps(SOON);
                times += 1;
                assert!(times < 100, "it never polls");
            }
        }

        /// How often something comes until it polls no more, where it polls in vain each time.
        fn hopes_in_vain(&mut self) -> u32 {
            let mut times = 0;
            while self.works(1) {
                assert!(!self.waits(PATIENCE + SOON));
                assert!(!self.idles(1), "nothing has come");
                self.sleeps(LATE);
                times += 1;
            }
            times
        }
    }

    #[test]
    fn a_thread_polls_while_one_thing_follows_the_other() {
        let mut thread = Thread::new();
        for _ in 0..ENOUGH {
            assert!(!thread.works(1), "it has no hope yet");
            thread.sleeps(SOON);
        }
        for _ in 0..100 {
            assert!(thread.works(1));
            assert!(thread.waits(SOON) && thread.waits(SOON), "nothing has come");
            thread.reads += 1;
            assert!(!thread.waits(SOON), "there is something to do");
        }
        assert!((1..=4).contains(&thread.hopes_in_vain()));
        for _ in 0..100 {
            assert!(!thread.works(1));
            thread.sleeps(LATE);
        }
    }

    #[test]
    fn a_thread_that_polls_in_vain_every_other_time_stops_it() {
        let mut thread = Thread::new();
        thread.hopes();
        let mut polled = 0;
        for _ in 0..100 {
            if thread.works(1) {
                polled += 1;
                thread.reads += 1;
                assert!(!thread.waits(SOON));
            } else {
                thread.sleeps(SOON);
            }
            if thread.works(1) {
                polled += 1;
                assert!(!thread.waits(PATIENCE + SOON));
            } else {
                thread.sleeps(LATE);
            }
        }
        assert!(polled < 20, "{polled} of 200");
    }

    #[test]
    fn where_many_calls_are_under_way_a_thread_sleeps_at_once() {
        let mut thread = Thread::new();
        thread.hopes();
        assert!(thread.works(FEW));
        thread.reads += 1;
        assert!(!thread.waits(SOON));
        for _ in 0..100 {
            assert!(!thread.works(FEW + 1));
            thread.sleeps(SOON);
            assert!(!thread.works(0), "all are answered, and as many come again");
            thread.sleeps(SOON);
        }
    }

    #[test]
    fn where_much_is_transferred_a_thread_sleeps_at_once() {
        let mut thread = Thread::new();
        thread.hopes();
        thread.reads += 1;
        assert!(!thread.waits(SOON));
        thread.bytes += MUCH;
        assert!(thread.works(1));
        thread.reads += 1;
        assert!(!thread.waits(SOON));
        for _ in 0..100 {
            thread.bytes += MUCH + 1;
            assert!(!thread.works(1));
            thread.sleeps(SOON);
        }
        thread.hopes();
    }

    #[test]
    fn for_the_rest_of_a_large_message_a_thread_polls_though_much_is_transferred() {
        let mut thread = Thread::new();
        thread.is_amid_message = true;
        for _ in 0..100 {
            thread.bytes += 2 * MUCH;
            assert!(thread.works(FEW));
            thread.reads += 1;
            assert!(!thread.waits(SOON), "there is something to do");
        }
        assert!(thread.works(FEW));
        assert!(!thread.waits(PATIENCE + SOON));
        assert!(!thread.idles(FEW), "nothing has come");
        assert!(!thread.works(FEW + 1));
        assert!(thread.works(FEW));
        thread.poll.gave_way(thread.now, LATE);
        assert!(!thread.works(FEW), "others keep its processor");
    }

    #[test]
    fn a_thread_whose_processor_others_keep_rests_the_longer_the_more_often() {
        let mut thread = Thread::new();
        let mut rests = Vec::new();
        for _ in 0..9 {
            thread.hopes();
            thread.poll.gave_way(thread.now, SOON);
            assert!(thread.waits(SOON), "they had it for a moment");
            thread.poll.gave_way(thread.now, LATE);
            assert!(!thread.waits(SOON));
            let since = thread.now - SOON;
            while !thread.works(1) {
                thread.sleeps(SOON);
            }
            rests.push(thread.now - since);
        }
        let expected = [1, 2, 4, 8, 16, 32, 64, 64, 64].map(|times| FIRST_REST * times);
        for (rest, expected) in rests.iter().zip(expected) {
            assert!((expected..expected + LATE).contains(rest), "{rests:?}");
        }
        thread.now += LONGEST_REST * 2;
        thread.hopes();
        thread.poll.gave_way(thread.now, LATE);
        assert_eq!(thread.poll.rests_until - thread.now, FIRST_REST);
    }

    /// Answers each byte that comes with another one.
    fn echo(mut far: UnixStream) {
        let mut byte = [0];
        while far.read_exact(&mut byte).is_ok() && far.write_all(&byte).is_ok() {}
    }

    /// How many of 200 answers a runtime, with this patience, finds by polling.
    fn found_by_polling(patience: Duration) -> u32 {
        let runtime = super::super::runtime().build().unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        let answering = std::thread::Builder::new().spawn(|| echo(far)).unwrap();
        let found = runtime.block_on(async {
            task::spawn("busy poll", keep(patience));
            near.set_nonblocking(true).unwrap();
            let mut near = Stream::from(Transport::Unix(LocalSocket::new(near)));
            let mut found = 0;
            for _ in 0..200 {
                near.write_all(b".").await.unwrap();
                near.read_exact(&mut [0]).await.unwrap();
                let is_polling = with_this(|this| this.doing == Doing::Polling);
                found += u32::from(is_polling == Some(true));
            }
            found
        });
        answering.join().unwrap();
        found
    }

    #[test]
    fn a_runtime_finds_what_comes_by_polling() {
        // Not while other tests have many calls under way, or transfer much.
        let began = Instant::now();
        while found_by_polling(Duration::from_secs(60)) < 100 {
            assert!(began.elapsed() < Duration::from_secs(60), "it never does");
        }
    }

    #[test]
    fn a_runtime_passes_on_what_has_come_of_a_message_before_it_sleeps() {
        let runtime = super::super::runtime().build().unwrap();
        let passed_on = runtime.block_on(async {
            task::spawn("busy poll", keep(PATIENCE));
            // Its first turn is over, so that it is one that passes on.
            tokio::task::yield_now().await;
            let mut waits = None;
            let passed_on = poll_fn(|cx| match waits {
                Some(_) => Poll::Ready(()),
                None => {
                    waits = Some(whole_messages::wait(&mut Some(cx.waker().clone())));
                    Poll::Pending
                }
            });
            tokio::time::timeout(Duration::from_secs(60), passed_on)
                .await
                .map(|()| waits)
        });
        assert_eq!(passed_on.ok(), Some(Some(true)));
    }

    #[test]
    fn a_runtime_without_patience_never_polls() {
        assert_eq!(found_by_polling(Duration::ZERO), 0);
    }
}
