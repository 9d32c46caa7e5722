//! Whether a thread that carries calls interrupts others when it wakes.
//!
//! Linux lets a thread that has slept go first, in the middle of what another does. With as many busy
//! threads as cores, those interrupted are the very client and server that primed stands between, and a
//! lookup beside a fast download takes up to twice as long for it. So while much is transferred and calls
//! are made, threads that wake often wait for their turn (`SCHED_BATCH`). Beside compilers that use all cores
//! they would wait for long; each looks how long that was, and goes first again if it was too long. (What
//! such a thread starts meanwhile inherits its policy: threads that may block, the embedded backend's commands.)

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::process::getpriority_process;
use thread_priority::{
    NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy,
    set_thread_priority_and_policy, thread_native_id, thread_schedule_policy,
};

use crate::http2::frame_memory;
use crate::meters::METERS;

/// A thread looks about whenever it has woken so many times.
const WAKES: u64 = 16;
/// It waits for its turn if that was within so long,
const OFTEN: Duration = Duration::from_millis(50);
/// if so many calls began meanwhile on all threads,
const CALLS: u64 = 2;
/// and if so much was transferred: bytes in each microsecond.
const MUCH: u64 = 20;
/// It goes on to do so for so long after that was the case.
const LINGER: Duration = Duration::from_millis(100);
/// How long it may wait for its turns in all,
const PATIENCE: Duration = Duration::from_millis(256);
/// from one look to so many later: a quarter of a millisecond each. Where only primed's clients and servers keep
/// the cores busy, it is less than half of that on the whole, but may be more for some hundred wakes.
const LOOKS: u64 = 64;
/// How long it goes first if it had to wait longer; twice as long each time that it happens soon,
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);

/// What Linux tells of the thread that opens it, in nanoseconds: how long it has run, and how long it
/// has waited for a core (`Documentation/scheduler/sched-stats.rst`).
const SCHEDSTAT: &str = "/proc/thread-self/schedstat";
/// Niceness 0, in the crate's own measure.
const NOT_NICE: u8 = 47;

const FIRST: ThreadSchedulePolicy = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Other);
const IN_TURN: ThreadSchedulePolicy =
    ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Batch);

/// To be called whenever the thread of a runtime has woken, which is always the same.
pub fn watch() -> impl Fn() {
    let thread: OnceLock<Option<Mutex<Thread>>> = OnceLock::new();
    move || {
        if let Some(thread) = thread.get_or_init(|| Thread::current().map(Mutex::new)) {
            thread.lock().woke(Load::now);
        }
    }
}

/// What the process has done since it began.
#[derive(Clone, Copy, Default)]
struct Load {
    /// Calls that have begun.
    calls: u64,
    /// Bytes that were transferred, but for small messages.
    bytes: u64,
}

impl Load {
    fn now() -> Self {
        Load {
            calls: METERS.calls.all.begun(),
            bytes: frame_memory::read(),
        }
    }
}

/// A thread that carries calls.
struct Thread {
    statistics: File,
    wakes: u64,
    manners: Manners,
}

impl Thread {
    /// The one that runs. `None` if its user has said how it is to be scheduled, or if the system
    /// does not tell how long threads wait: it goes first then, as any other.
    fn current() -> Option<Self> {
        let is_as_usual =
            getpriority_process(None) == Ok(0) && thread_schedule_policy() == Ok(FIRST);
        Some(Thread {
            statistics: File::open(SCHEDSTAT).ok().filter(|_| is_as_usual)?,
            wakes: 0,
            manners: Manners::new(Instant::now()),
        })
    }

    /// It has woken.
    fn woke(&mut self, load: impl FnOnce() -> Load) {
        self.wakes += 1;
        if !self.wakes.is_multiple_of(WAKES) {
            return;
        }
        let Some(waited) = waited(&self.statistics) else {
            return;
        };
        let policy = match self.manners.look(Instant::now(), load(), waited) {
            Some(Manner::First) => FIRST,
            Some(Manner::InTurn) => IN_TURN,
            None => return,
        };
        tracing::trace!(?policy, "a thread is scheduled otherwise");
        if let Err(error) = schedule(policy) {
            // A container may forbid it; nothing is lost.
            tracing::debug!(%error, ?policy, "a thread cannot be scheduled otherwise");
        }
    }
}

/// Has the current thread scheduled by `policy`, unless somebody has made it nice meanwhile.
fn schedule(policy: ThreadSchedulePolicy) -> Result<(), Box<dyn Error>> {
    if getpriority_process(None)? == 0 {
        let priority = ThreadPriority::try_from(NOT_NICE)?;
        set_thread_priority_and_policy(thread_native_id(), priority, policy)?;
    }
    Ok(())
}

/// How long the thread has waited for a processor since it began.
fn waited(statistics: &File) -> Option<Duration> {
    let mut line = [0; 80];
    let length = statistics.read_at(&mut line, 0).ok()?;
    let line = std::str::from_utf8(&line[..length]).ok()?;
    let nanoseconds = line.split_ascii_whitespace().nth(1)?;
    Some(Duration::from_nanos(nanoseconds.parse().ok()?))
}

/// How a thread wakes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// It interrupts others.
    First,
    /// It waits for its turn.
    InTurn,
}

/// Chooses the manner of a thread from what it looks like now and then.
struct Manners {
    manner: Manner,
    looked_at: Instant,
    /// As it was then.
    load: Load,
    /// When it was busy last.
    busy_at: Instant,
    /// Since when it has been `InTurn`, or until when it is not to be.
    turned: Instant,
    /// Looks since `waited` was noted.
    looks: u64,
    waited: Duration,
    pause: Duration,
}

impl Manners {
    fn new(now: Instant) -> Self {
        Manners {
            manner: Manner::First,
            looked_at: now,
            load: Load::default(),
            busy_at: now,
            turned: now,
            looks: 0,
            waited: Duration::ZERO,
            pause: FIRST_PAUSE,
        }
    }

    /// Takes in that the thread has woken `WAKES` times since the last look, and for how long it has
    /// `waited` in all. Says so if its manner is to change.
    fn look(&mut self, now: Instant, load: Load, waited: Duration) -> Option<Manner> {
        let since = now - self.looked_at;
        let much = u64::try_from(since.as_micros()).map_or(u64::MAX, |since| since * MUCH);
        let is_busy = since <= OFTEN
            && load.calls >= self.load.calls + CALLS
            && load.bytes >= self.load.bytes.saturating_add(much);
        (self.looked_at, self.load) = (now, load);
        if is_busy {
            self.busy_at = now;
        }
        match self.manner {
            Manner::First if is_busy && now >= self.turned => {
                (self.turned, self.looks, self.waited) = (now, 0, waited);
                self.manner = Manner::InTurn;
            }
            Manner::InTurn if waited > self.waited + PATIENCE => {
                if now - self.turned > self.pause {
                    self.pause = FIRST_PAUSE;
                }
                self.turned = now + self.pause;
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
                self.manner = Manner::First;
            }
            Manner::InTurn if now - self.busy_at <= LINGER => {
                self.looks += 1;
                if self.looks.is_multiple_of(LOOKS) {
                    self.waited = waited;
                }
                return None;
            }
            Manner::InTurn => self.manner = Manner::First,
            Manner::First => return None,
        }
        Some(self.manner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread's manners, looked at as often as a busy thread does.
    struct Busy {
        manners: Manners,
        now: Instant,
        load: Load,
        waited: Duration,
    }

    const LOOK: Duration = Duration::from_millis(5);
    /// As much as makes a thread wait for its turn that looks about so often.
    const BUSY: Load = Load {
        calls: CALLS,
        bytes: 5000 * MUCH,
    };
    const IDLE: Load = Load { calls: 0, bytes: 0 };

    impl Busy {
        fn new() -> Self {
            let now = Instant::now();
            Busy {
                manners: Manners::new(now),
                now,
                load: Load::default(),
                waited: Duration::ZERO,
            }
        }

        fn look(&mut self, after: Duration, load: Load, waited: Duration) -> Option<Manner> {
            self.now += after;
            self.load.calls += load.calls;
            self.load.bytes += load.bytes;
            self.waited += waited;
            self.manners.look(self.now, self.load, self.waited)
        }

        /// For how long it goes first when it had to wait too long just now.
        fn pause(&mut self) -> Duration {
            assert_eq!(self.look(LOOK, BUSY, PATIENCE * 2), Some(Manner::First));
            let since = self.now;
            while self.look(LOOK, BUSY, PATIENCE * 2).is_none() {}
            assert_eq!(self.manners.manner, Manner::InTurn);
            self.now - since
        }
    }

    #[test]
    fn a_thread_waits_for_its_turn_while_it_is_busy() {
        let mut thread = Busy::new();
        let none = Duration::ZERO;
        let seldom = Load {
            calls: 100,
            bytes: 1 << 30,
        };
        assert_eq!(
            thread.look(OFTEN * 2, seldom, none),
            None,
            "it wakes seldom"
        );
        assert_eq!(thread.look(LOOK, Load { calls: 0, ..BUSY }, none), None);
        assert_eq!(thread.look(LOOK, Load { bytes: 0, ..BUSY }, none), None);
        assert_eq!(thread.look(LOOK, BUSY, none), Some(Manner::InTurn));
        assert_eq!(thread.look(LINGER, IDLE, none), None, "more may come");
        assert_eq!(thread.look(LOOK, IDLE, none), Some(Manner::First));
        assert_eq!(thread.look(LOOK, BUSY, none), Some(Manner::InTurn));
        assert_eq!(thread.look(LINGER + LOOK, BUSY, none), Some(Manner::First));
    }

    #[test]
    fn a_thread_whose_turn_is_long_in_coming_goes_first_for_a_while() {
        let mut thread = Busy::new();
        let share = PATIENCE / LOOKS as u32;
        thread.look(LOOK, BUSY, share);
        for _ in 0..LOOKS * 10 {
            assert_eq!(thread.look(LOOK, BUSY, share), None);
        }
        let pauses: Vec<Duration> = (0..6).map(|_| thread.pause()).collect();
        let expected = [1, 2, 4, 8, 16, 16].map(|times| FIRST_PAUSE * times);
        for (pause, expected) in pauses.iter().zip(expected) {
            assert!((expected..=expected + LOOK).contains(pause), "{pauses:?}");
        }
        while thread.now - thread.manners.turned <= LONGEST_PAUSE {
            assert_eq!(thread.look(LOOK, BUSY, share), None);
        }
        assert!(thread.pause() <= FIRST_PAUSE + LOOK, "it was well for long");
    }

    /// Runs `claim` on a thread of its own: how one is scheduled stays with it.
    fn on_a_thread(claim: impl FnOnce() + Send + 'static) {
        let thread = std::thread::Builder::new().spawn(claim).unwrap();
        thread.join().unwrap();
    }

    #[test]
    fn the_system_is_told_and_niceness_stays_as_it_was() {
        on_a_thread(|| {
            let Some(mut thread) = Thread::current() else {
                panic!("run tests with niceness 0, and SCHED_OTHER");
            };
            let mut load = Load::default();
            let mut wake_until = |policy, more: Load| {
                let began = Instant::now();
                while thread_schedule_policy() != Ok(policy) {
                    assert!(began.elapsed() < Duration::from_secs(60), "{policy:?}");
                    load.calls += more.calls;
                    load.bytes += more.bytes;
                    thread.woke(|| load);
                }
            };
            wake_until(IN_TURN, BUSY);
            wake_until(FIRST, IDLE);
            assert_eq!(getpriority_process(None), Ok(0));
        });
    }

    #[test]
    fn a_thread_that_is_scheduled_otherwise_already_is_left_alone() {
        on_a_thread(|| {
            rustix::process::setpriority_process(None, 1).unwrap();
            assert!(Thread::current().is_none());
        });
    }
}
