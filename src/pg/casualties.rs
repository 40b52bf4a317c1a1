//! Jobs with which a runner has died before they were claimed: short ones go from `created` to their end in one transaction, so
//! that no row tells of it. Which job a runner is at stands in a small file that all processes have in memory: unlike PostgreSQL's
//! shared memory it outlives them, so that a job that brings the server down is known when it is up again.

use super::shared::RUNNERS;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};

/// Jobs whose runners have died that no worker has taken note of; of more, some are not counted.
const DEAD: usize = 4 * RUNNERS;

/// A job of a database.
struct Entry {
    database: AtomicU32,
    /// 0 for none.
    job: AtomicI64,
}

/// What is zero when it is new.
struct Memory {
    /// By the runner's place.
    at_work: [Entry; RUNNERS],
    dead: [Entry; DEAD],
}

/// The file in the data directory.
const FILE: &str = "imbus_at_work";

static MEMORY: OnceLock<&'static Memory> = OnceLock::new();

/// Opens the file, in the postmaster, whose working directory is the data directory.
pub fn request() {
    match open() {
        Ok(memory) => drop(MEMORY.set(memory)),
        Err(error) => pgrx::warning!("imbus claims each job before it runs it: {FILE}: {error}"),
    }
}

fn open() -> std::io::Result<&'static Memory> {
    let size = size_of::<Memory>();
    if std::fs::metadata(FILE).map_or(0, |found| found.len()) != size as u64 {
        // Another file, since somebody may have the old one in memory; with all its blocks: a disk that is full is an error here, not a
        // signal later.
        let new = format!("{FILE}.new");
        let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&vec![0; size])?;
        std::fs::rename(new, FILE)?;
    }
    let file = std::fs::OpenOptions::new().read(true).write(true).open(FILE)?;
    // SAFETY: a file of this size, mapped for the life of the process and shared with its children. Whatever bytes it has are a valid
    // `Memory`, which is used through atomics only.
    unsafe {
        let (access, none) = (libc::PROT_READ | libc::PROT_WRITE, std::ptr::null_mut());
        let mapped = libc::mmap(none, size, access, libc::MAP_SHARED, file.as_raw_fd(), 0);
        if mapped == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        mapped.cast::<Memory>().as_ref().ok_or_else(std::io::Error::last_os_error)
    }
}

/// Whether a death would be noticed.
pub fn are_noticed() -> bool {
    MEMORY.get().is_some()
}

impl Entry {
    fn is(&self, database: u32, job: i64) -> bool {
        self.job.load(Ordering::Acquire) == job && self.database.load(Ordering::Acquire) == database
    }

    /// Enters a job, if there is none.
    fn take(&self, database: u32, job: i64) -> bool {
        let is_taken = self.job.compare_exchange(0, job, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if is_taken {
            self.database.store(database, Ordering::Release);
        }
        is_taken
    }
}

/// The runner at this place begins a job that it has not claimed.
pub fn at_work(place: usize, database: u32, job: i64) {
    if let Some(entry) = MEMORY.get().and_then(|memory| memory.at_work.get(place)) {
        entry.database.store(database, Ordering::Release);
        entry.job.store(job, Ordering::Release);
    }
}

/// The runner at this place has none any more.
pub fn at_rest(place: usize) {
    if let Some(entry) = MEMORY.get().and_then(|memory| memory.at_work.get(place)) {
        entry.job.store(0, Ordering::Release);
    }
}

/// In the postmaster, when nobody else lives: whoever is still said to be at work has died.
pub fn gather() {
    for entry in MEMORY.get().map_or(&[][..], |memory| &memory.at_work) {
        let job = entry.job.swap(0, Ordering::AcqRel);
        if job != 0 {
            add(entry.database.load(Ordering::Acquire), job);
        }
    }
}

/// A runner has died with a job of this database.
pub fn add(database: u32, job: i64) {
    if let Some(memory) = MEMORY.get() {
        let _ = memory.dead.iter().any(|entry| entry.take(database, job));
    }
}

/// The jobs of a database with which runners have died.
pub fn of(database: u32) -> Vec<i64> {
    let dead = MEMORY.get().map_or(&[][..], |memory| &memory.dead);
    let job = |entry: &Entry| entry.job.load(Ordering::Acquire);
    dead.iter().filter(|entry| job(entry) != 0 && entry.database.load(Ordering::Acquire) == database).map(job).collect()
}

/// Forgets those of databases that are gone.
pub fn forget(is_gone: impl Fn(u32) -> bool) {
    let dead = MEMORY.get().map_or(&[][..], |memory| &memory.dead);
    for entry in dead.iter().filter(|entry| entry.job.load(Ordering::Acquire) != 0) {
        let database = entry.database.load(Ordering::Acquire);
        // 0: it is just being entered.
        if database != 0 && is_gone(database) {
            settle(database, entry.job.load(Ordering::Acquire));
        }
    }
}

/// That one of these is counted. One that has died twice is counted twice.
pub fn settle(database: u32, job: i64) {
    let dead = MEMORY.get().map_or(&[][..], |memory| &memory.dead);
    if let Some(entry) = dead.iter().find(|entry| entry.is(database, job)) {
        // In this order: what stands in an entry is the job of its database.
        entry.database.store(0, Ordering::Release);
        entry.job.store(0, Ordering::Release);
    }
}
