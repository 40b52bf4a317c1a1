//! What Linux counts of a process: processor time, memory, open files.

use std::fs;

/// What /proc counts processor time in: USER_HZ, 100 on every Linux that PostgreSQL runs on.
const TICKS: f64 = 100.0;

/// Processor seconds of a process so far, user and system.
pub fn cpu(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, in parentheses, may contain blanks. Then come state and further fields, utime the 12th of them.
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields).unwrap_or_default();
    fields.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS
}

/// Resident memory of a process in bytes.
pub fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}

/// How many times a process has called `write` or `writev`; 0 when we may not know.
pub fn writes(pid: u32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let line = io.lines().find_map(|line| line.strip_prefix("syscw:"));
    line.and_then(|line| line.trim().parse().ok()).unwrap_or_default()
}

/// How many files a process has open; 0 when we may not know.
pub fn files(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map(Iterator::count).unwrap_or_default()
}
