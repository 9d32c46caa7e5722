//! What primed's process takes of the machine, under the names that Prometheus' own clients give it.

use std::time::Duration;
use std::{fmt, fs};

use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

use super::Families;

/// The process as it is at one time.
#[derive(Debug)]
pub struct Process {
    cpu: Duration,
    /// In bytes.
    virtual_memory: u64,
    /// In bytes.
    resident_memory: u64,
    threads: u64,
    open_files: u64,
    /// None if there is no limit.
    max_files: Option<u64>,
    /// Seconds since 1970.
    started: f64,
}

impl Process {
    /// This process now; `None` where `/proc` does not tell.
    pub fn now() -> Option<Self> {
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        // The name of the program, in brackets, can hold anything.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        // proc_pid_stat(5) counts from 1, and two fields stand before these.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        let since_boot = field(22)? as f64 / clock_ticks_per_second() as f64;
        let boot = fs::read_to_string("/proc/stat").ok()?;
        let boot = boot.lines().find_map(|line| line.strip_prefix("btime "))?;
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        Some(Process {
            cpu: Duration::new(cpu.tv_sec.try_into().ok()?, cpu.tv_nsec.try_into().ok()?),
            virtual_memory: field(23)?,
            resident_memory: field(24)? * page_size() as u64,
            threads: field(20)?,
            open_files: fs::read_dir("/proc/self/fd").ok()?.count() as u64,
            max_files: getrlimit(Resource::Nofile).current,
            started: boot.trim().parse::<f64>().ok()? + since_boot,
        })
    }

    pub(super) fn encode(&self, to: &mut Families) -> fmt::Result {
        to.time(
            "process_cpu",
            "CPU time of the process",
            self.cpu.as_secs_f64(),
        )?;
        to.bytes(
            "process_virtual_memory",
            "Virtual memory",
            self.virtual_memory,
        )?;
        to.bytes(
            "process_resident_memory",
            "Resident memory",
            self.resident_memory,
        )?;
        to.gauge("process_threads", "Threads", self.threads)?;
        to.gauge("process_open_fds", "Open file descriptors", self.open_files)?;
        if let Some(most) = self.max_files {
            to.gauge("process_max_fds", "How many of them there may be", most)?;
        }
        to.moment(
            "process_start_time",
            "When the process began, since 1970",
            self.started,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_memory_threads_files_and_a_past() {
        let now = Process::now().unwrap();
        assert!(now.resident_memory > 0 && now.virtual_memory >= now.resident_memory);
        assert!(now.threads > 0 && now.open_files > 0);
        let age = crate::clock::now_unix_ms() as f64 / 1000.0 - now.started;
        assert!((-2.0..86_400.0).contains(&age), "{age}");
    }
}
