//! Signs of life for the service manager (`WatchdogSec=`): they are given while every thread that
//! forwards calls still takes turns, and stop when one is stuck, so that primed is started anew.
//!
//! The engine has no say: priming that is stuck costs hits, a restart costs clients their calls.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

/// Asks threads for signs of life.
#[derive(Default)]
pub struct Watchdog {
    round: watch::Sender<u64>,
    threads: Vec<(String, Arc<AtomicU64>)>,
}

/// The part of it that runs on a thread.
pub struct Pulse {
    round: watch::Receiver<u64>,
    answered: Arc<AtomicU64>,
}

impl Pulse {
    /// Answers while the thread takes turns and the watchdog lives.
    pub async fn beat(mut self) {
        while self.round.changed().await.is_ok() {
            let round = *self.round.borrow_and_update();
            self.answered.store(round, Ordering::Relaxed);
        }
    }
}

impl Watchdog {
    /// What the thread `name` is to run.
    pub fn pulse(&mut self, name: String) -> Pulse {
        let answered = Arc::new(AtomicU64::new(*self.round.borrow()));
        self.threads.push((name, answered.clone()));
        Pulse {
            round: self.round.subscribe(),
            answered,
        }
    }

    /// Tells the service manager, as often as it wants to hear it, that all goes well; returns if
    /// it does not want to.
    pub async fn run(self, tell: impl Fn()) {
        let Some(limit) = sd_notify::watchdog_enabled() else {
            return;
        };
        // Once to ask, once to hear the answer, and one to spare.
        let mut ticks = tokio::time::interval((limit / 4).max(Duration::from_millis(1)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut was_silent = Vec::new();
        loop {
            ticks.tick().await;
            let silent = self.ask();
            if silent.is_empty() {
                tell();
            } else if silent != was_silent {
                tracing::error!(
                    threads = ?silent,
                    "threads are stuck; the service manager will start primed anew"
                );
            }
            was_silent = silent;
        }
    }

    /// The threads that have not answered since they were asked last; asks again if there are none.
    fn ask(&self) -> Vec<String> {
        let round = *self.round.borrow();
        let silent =
            |(_, answered): &&(_, Arc<AtomicU64>)| answered.load(Ordering::Relaxed) < round;
        let silent = self.threads.iter().filter(silent);
        let silent: Vec<_> = silent.map(|(name, _)| name.clone()).collect();
        if silent.is_empty() {
            self.round.send_replace(round + 1);
        }
        silent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_stuck_thread_is_enough_to_be_silent_and_all_is_well_when_it_goes_on() {
        let mut watchdog = Watchdog::default();
        let (stuck, well) = (
            watchdog.pulse("stuck".into()),
            watchdog.pulse("well".into()),
        );
        let (go_on, wait) = std::sync::mpsc::sync_channel::<()>(0);
        let thread = |pulse: Pulse, first: Option<std::sync::mpsc::Receiver<()>>| {
            std::thread::Builder::new()
                .spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().build();
                    runtime.unwrap().block_on(async {
                        if let Some(wait) = first {
                            wait.recv().unwrap();
                        }
                        pulse.beat().await;
                    });
                })
                .unwrap()
        };
        let threads = [thread(stuck, Some(wait)), thread(well, None)];
        assert_eq!(
            watchdog.ask(),
            Vec::<String>::new(),
            "nobody was asked before"
        );
        let until = |silent: &[&str]| {
            while watchdog.ask() != silent {
                std::thread::yield_now();
            }
        };
        until(&["stuck"]);
        assert_eq!(watchdog.ask(), ["stuck"]);
        go_on.send(()).unwrap();
        until(&[]);
        drop(watchdog);
        for thread in threads {
            thread.join().unwrap();
        }
    }
}
