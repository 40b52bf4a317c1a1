//! Jobs with which a runner has died before they were claimed: short ones go from `created` to their end in one transaction, so
//! that no row tells of it. Which job a runner is at stands in memory that the postmaster maps before it forks, and that, unlike
//! PostgreSQL's shared memory, outlives a crash of the others: a job that brings the server down is known when it is up again.

use super::shared::RUNNERS;
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

static MEMORY: OnceLock<&'static Memory> = OnceLock::new();

/// Maps the memory, in the postmaster.
pub fn request() {
    // SAFETY: new memory, shared with children, kept for the life of the process. Zeroes are a valid `Memory`; it is used through
    // atomics only.
    let memory = unsafe {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        let mapped = libc::mmap(std::ptr::null_mut(), size_of::<Memory>(), access, flags, -1, 0);
        if mapped == libc::MAP_FAILED { None } else { mapped.cast::<Memory>().as_ref() }
    };
    match memory {
        Some(memory) => drop(MEMORY.set(memory)),
        None => pgrx::warning!("imbus claims short jobs one by one: {}", std::io::Error::last_os_error()),
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

/// After a crash, in the postmaster, when nobody else lives: whoever was at work has died.
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

/// That one of these is counted. One that has died twice is counted twice.
pub fn settle(database: u32, job: i64) {
    let dead = MEMORY.get().map_or(&[][..], |memory| &memory.dead);
    if let Some(entry) = dead.iter().find(|entry| entry.is(database, job)) {
        // In this order: what stands in an entry is the job of its database.
        entry.database.store(0, Ordering::Release);
        entry.job.store(0, Ordering::Release);
    }
}
