//! What a process and all below it use, by `/proc`: an nginx is its workers.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// A process and its descendants, as of now.
#[derive(Clone, Debug, Default)]
pub struct Family(Vec<u32>);

impl Family {
    pub fn of(root: u32) -> Self {
        let mut parents = HashMap::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let pid = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            let Some(pid) = pid else { continue };
            if let Some(parent) = stat_field(pid, 4) {
                parents.insert(pid, parent);
            }
        }
        let mut family = vec![root];
        let mut next = 0;
        while let Some(&parent) = family.get(next) {
            let children = parents.iter().filter(|(_, of)| **of == u64::from(parent));
            family.extend(children.map(|(pid, _)| *pid));
            next += 1;
        }
        Family(family)
    }

    /// Time on a CPU, in nanoseconds. The scheduler's own count of each thread; where there is
    /// none, the process's in clock ticks.
    pub fn cpu_ns(&self) -> u64 {
        self.0.iter().map(|pid| cpu_ns(*pid)).sum()
    }

    /// Proportional set size, in KiB: memory that processes share counts once.
    pub fn pss_kib(&self) -> u64 {
        self.0.iter().map(|pid| rollup(*pid, "Pss:")).sum()
    }
}

fn cpu_ns(pid: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let scheduled: u64 = tasks
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|task| first_number(&task.path().join("schedstat")))
        .sum();
    if scheduled > 0 {
        return scheduled;
    }
    let ticks = [14, 15].map(|field| stat_field(pid, field).unwrap_or(0));
    (ticks[0] + ticks[1]) * 10_000_000
}

fn first_number(file: &Path) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// A numeric field of `/proc/PID/stat`, counted from 1 as proc(5) does. The second, the name, can
/// hold blanks and ends at the last parenthesis.
fn stat_field(pid: u32, field: usize) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(field - 3)?.parse().ok()
}

fn rollup(pid: u32, key: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok())
        .unwrap_or(0)
}
