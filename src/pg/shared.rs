//! What the processes share: who serves which database, wake-ups, runners, holds, counters. Plain atomics: no pointer
//! but the addresses of latches (which live in PostgreSQL's own shared memory for as long as the server), no file
//! descriptors, no locks, so that a transaction callback after commit can never fail here.

mod runners;

use super::{casualties, worker};
use crate::core::ends::Ends;
use pgrx::prelude::*;
use pgrx::{PGRXSharedMemory, PgAtomic, pg_shmem_init};
use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering};

pub use runners::{RunnerSlot, RunnerState};

/// Databases served at once; each also takes one of max_worker_processes, which is the tighter limit in practice.
pub const DATABASES: usize = 512;
/// The greatest `imbus.job_workers`.
pub const RUNNERS: usize = 64;
/// Databases that DROP, RENAME and the like keep the workers out of at the same time.
const HOLDS: usize = 32;
/// Databases whose extension changed since the gateway last looked; more make it look at all of them.
const ANNOUNCED: usize = 64;
/// The secret of the tokens in the data directory, made at first start.
const SECRET_FILE: &str = "imbus_token_secret";
const SECRET: usize = 32;

/// A process and how to wake it.
#[derive(Default)]
pub struct Process {
    pid: AtomicI32,
    latch: AtomicUsize,
}

impl Process {
    /// Enters the calling process.
    pub fn enter(&self) {
        worker::assert_main_thread();
        // SAFETY: reads this process's own globals on the main thread.
        unsafe {
            self.latch.store(pg_sys::MyLatch as usize, Ordering::Release);
            self.pid.store(pg_sys::MyProcPid, Ordering::Release);
        }
    }

    /// Clears the entry; no wake-up reaches the process afterwards.
    pub fn leave(&self) {
        self.latch.store(0, Ordering::Release);
        self.pid.store(0, Ordering::Release);
    }

    /// The process id, 0 when there is none.
    pub fn pid(&self) -> i32 {
        self.pid.load(Ordering::Acquire)
    }

    /// Sets the latch of the process, if there is one. Never fails: it may run after commit.
    pub fn wake(&self) {
        let latch = self.latch.load(Ordering::Acquire);
        if latch != 0 {
            // SAFETY: a latch of PGPROC, which outlives every process; setting a stranger's latch only wakes it once.
            unsafe { pg_sys::SetLatch(latch as *mut pg_sys::Latch) };
        }
    }
}

/// What a database's slot says of its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DatabaseState {
    Free = 0,
    /// Registered with the postmaster, not there yet.
    Starting = 1,
    /// Serving.
    Running = 2,
    /// Looked, and there is no extension.
    Absent = 3,
    /// Has left: to be started again.
    Exited = 4,
}

/// One served (or examined) database.
#[derive(Default)]
pub struct DatabaseSlot {
    oid: AtomicU32,
    state: AtomicU32,
    pub process: Process,
    /// Something was published.
    pub wake: AtomicBool,
    /// Odoo said by NOTIFY that it has published.
    pub look: AtomicBool,
    /// A job was enqueued or has ended.
    pub jobs: AtomicBool,
    /// A session or a runner has ended that had claimed jobs.
    pub orphans: AtomicBool,
    /// One more than the runners there may be in the cluster, as the worker knew when it last looked at the jobs; 0 before.
    places: AtomicU32,
    /// Counts what runners may find when they look, but for jobs that one of them was offered.
    news: AtomicU64,
    /// Jobs wait for others to end: for their own sake, or since their queue has a limit.
    awaits_ends: AtomicBool,
    /// How many jobs have ended, and which, as far as others wait for that.
    ended: AtomicU64,
    pub ends: Ends,
    /// A job was enqueued, or brought back, that waits for others to end.
    pub blocked: AtomicBool,
    /// Which of the tables in which jobs wait and run by turns fills, counted from 0.
    filling: AtomicU32,
    /// Jobs of this database that Odoo works on, and whether others wait for it.
    odoo_jobs: AtomicU32,
    odoo_wanted: AtomicBool,
    /// The extension may be gone.
    pub recheck: AtomicBool,
    /// When it was registered, in microseconds since 2000.
    pub since: AtomicI64,
    pub dispatched: AtomicU64,
    pub skipped: AtomicU64,
    pub position: AtomicI64,
    pub gaps: AtomicU64,
    /// When the oldest commit was made that the worker has not taken in, in microseconds since 2000; 0 for none.
    committed: AtomicI64,
}

impl DatabaseSlot {
    /// OID of the database, 0 when the slot is free.
    pub fn oid(&self) -> u32 {
        self.oid.load(Ordering::Acquire)
    }

    /// There may be jobs that no runner was offered. Said before it is looked who waits.
    pub fn add_news(&self) {
        self.news.fetch_add(1, Ordering::SeqCst);
    }

    /// How often that was said.
    pub fn news(&self) -> u64 {
        self.news.load(Ordering::SeqCst)
    }

    /// Whether some job waits for others to end.
    pub fn await_ends(&self, awaits: bool) {
        self.awaits_ends.store(awaits, Ordering::SeqCst);
    }

    /// How many jobs have ended, counted from whenever.
    pub fn ended(&self) -> u64 {
        self.ended.load(Ordering::Relaxed)
    }

    /// Which table fills (`core::rotation`).
    pub fn filling(&self) -> usize {
        self.filling.load(Ordering::Acquire) as usize
    }

    /// Another one does from now on; who does not know yet does no harm.
    pub fn set_filling(&self, table: usize) {
        self.filling.store(u32::try_from(table).unwrap_or(0), Ordering::Release);
    }

    /// The worker is about to look at the jobs, and goes by this many runners.
    pub fn set_places(&self, places: usize) {
        self.places.store(u32::try_from(places).unwrap_or(u32::MAX - 1) + 1, Ordering::SeqCst);
    }

    fn places(&self) -> Option<usize> {
        usize::try_from(self.places.load(Ordering::SeqCst)).ok()?.checked_sub(1)
    }

    pub fn state(&self) -> DatabaseState {
        match self.state.load(Ordering::Acquire) {
            1 => DatabaseState::Starting,
            2 => DatabaseState::Running,
            3 => DatabaseState::Absent,
            4 => DatabaseState::Exited,
            _ => DatabaseState::Free,
        }
    }

    pub fn set_state(&self, state: DatabaseState) {
        self.state.store(state as u32, Ordering::Release);
    }

    /// Something was committed just now. Never fails: it runs after commit.
    pub fn stamp(&self) {
        if self.committed.load(Ordering::Relaxed) == 0 {
            let _ = self.committed.compare_exchange(0, worker::now(), Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// When the oldest commit since the last call was made, in microseconds since 2000; 0 for none.
    pub fn take_stamp(&self) -> i64 {
        self.committed.swap(0, Ordering::Relaxed)
    }

    /// Its worker knows of no jobs that Odoo works on.
    pub fn forget_odoo(&self) {
        self.odoo_jobs.store(0, Ordering::Release);
        self.odoo_wanted.store(false, Ordering::Release);
    }

    /// Gives the slot back.
    pub fn free(&self) {
        self.process.leave();
        for counter in [&self.dispatched, &self.skipped, &self.gaps] {
            counter.store(0, Ordering::Relaxed);
        }
        self.position.store(0, Ordering::Relaxed);
        self.forget_odoo();
        self.set_state(DatabaseState::Free);
        self.oid.store(0, Ordering::Release);
    }
}

/// A database that a command keeps the workers out of, and the backend that does.
#[derive(Default)]
struct Hold {
    database: AtomicU32,
    pid: AtomicI32,
}

/// The network's counters, as the gateway last copied them.
#[derive(Default)]
pub struct GatewayCounters {
    pub connections_open: AtomicU64,
    pub connections_total: AtomicU64,
    pub handshakes_rejected: AtomicU64,
    pub messages_received: AtomicU64,
    pub notifications_sent: AtomicU64,
    pub bytes_sent: AtomicU64,
    pub slow_consumers: AtomicU64,
}

/// So many jobs are worth a look at their tables.
const MANY: u64 = 4096;
/// Sessions that may have claimed jobs for runners outside at the same time.
pub const SESSIONS: usize = 2048;

/// All of it.
pub struct Shared {
    secret: [u8; SECRET],
    pub gateway: Process,
    /// The port the gateway really listens on, 0 while it does not.
    pub port: AtomicU32,
    pub started: AtomicI64,
    pub counters: GatewayCounters,
    /// Databases were created, dropped or renamed, or got the extension: look at once.
    pub rescan: AtomicBool,
    /// Databases that got or lost the extension: to be examined again.
    announced: [AtomicU32; ANNOUNCED],
    /// More of them than there is room for.
    announced_all: AtomicBool,
    /// Databases without a worker for want of a slot.
    pub starved: AtomicU64,
    pub notify_splits: AtomicU64,
    pub notify_split_logged: AtomicI64,
    databases: [DatabaseSlot; DATABASES],
    runners: [RunnerSlot; RUNNERS],
    holds: [Hold; HOLDS],
    /// The numbers of the sessions that have claimed jobs, 0 for none.
    sessions: [AtomicI64; SESSIONS],
    /// The number given last.
    last_session: AtomicI64,
}

// SAFETY: atomics and bytes only, no pointers that could differ between processes.
unsafe impl PGRXSharedMemory for Shared {}

impl Default for Shared {
    fn default() -> Shared {
        // It begins anew when the server does, and when some process has crashed.
        casualties::gather();
        Shared {
            secret: load_secret(),
            gateway: Process::default(),
            port: AtomicU32::new(0),
            started: AtomicI64::new(0),
            counters: GatewayCounters::default(),
            rescan: AtomicBool::new(false),
            announced: [const { AtomicU32::new(0) }; ANNOUNCED],
            announced_all: AtomicBool::new(false),
            starved: AtomicU64::new(0),
            notify_splits: AtomicU64::new(0),
            notify_split_logged: AtomicI64::new(0),
            databases: std::array::from_fn(|_| DatabaseSlot::default()),
            runners: std::array::from_fn(|_| RunnerSlot::default()),
            holds: std::array::from_fn(|_| Hold::default()),
            sessions: [const { AtomicI64::new(0) }; SESSIONS],
            last_session: AtomicI64::new(0),
        }
    }
}

impl Shared {
    /// The secret of the tokens, unless `imbus.token_secret` sets another.
    pub fn secret(&self) -> &[u8] {
        &self.secret
    }

    /// The slots in use.
    pub fn databases(&self) -> impl Iterator<Item = &DatabaseSlot> {
        self.databases.iter().filter(|slot| slot.oid() != 0)
    }

    /// The slot of a database, if it has one.
    pub fn database(&self, oid: u32) -> Option<&DatabaseSlot> {
        self.databases.iter().find(|slot| slot.oid() == oid)
    }

    /// Takes a slot for a database. Called by the gateway alone; None when all are in use.
    pub fn add_database(&self, oid: u32) -> Option<&DatabaseSlot> {
        let slot = self.databases.iter().find(|slot| slot.oid() == 0)?;
        slot.oid.store(oid, Ordering::Release);
        Some(slot)
    }

    /// All runner slots with their numbers.
    pub fn runners(&self) -> impl Iterator<Item = (usize, &RunnerSlot)> {
        self.runners.iter().enumerate()
    }

    pub fn runner(&self, index: usize) -> Option<&RunnerSlot> {
        self.runners.get(index)
    }

    /// Reserves a runner's slot while fewer than `limit` are taken.
    pub fn reserve_runner(&self, limit: usize) -> Option<(usize, &RunnerSlot)> {
        let taken = self.runners.iter().filter(|slot| slot.state() != RunnerState::Free).count();
        if taken >= limit {
            return None;
        }
        self.runners().find(|(_, slot)| slot.reserve())
    }

    /// Wakes the worker of a database: something was published there. Never fails.
    pub fn wake_bus(&self, oid: u32) {
        let slot = self.database(oid);
        slot.into_iter().for_each(DatabaseSlot::stamp);
        if let Some(slot) = slot
            // Whoever set it before has woken the worker, which has not looked at the ring since.
            && !slot.wake.swap(true, Ordering::AcqRel)
        {
            slot.process.wake();
        }
    }

    /// Has the worker of a database look at its table. Never fails.
    pub fn look_at_bus(&self, oid: u32) {
        if let Some(slot) = self.database(oid) {
            slot.look.store(true, Ordering::Release);
            slot.process.wake();
        }
    }

    /// Offers a job to a runner of its role that waits; false when there is none that is not woken already. Never fails.
    pub fn offer(&self, oid: u32, role: u32, job: i64) -> bool {
        let takes = |slot: &&RunnerSlot| {
            slot.database.load(Ordering::Acquire) == oid
                && slot.role.load(Ordering::Acquire) == role
                && slot.state() == RunnerState::Running
                && slot.is_waiting.swap(false, Ordering::SeqCst)
                // It may have been offered another one in its last wait, by somebody who was slow to say which.
                && slot.offer.compare_exchange(0, job, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        };
        let slot = self.runners.iter().find(takes);
        slot.into_iter().for_each(|slot| slot.process.wake());
        slot.is_some()
    }

    /// Whether all places for runners are taken by ones that go on to the next job of this role by themselves: each claims
    /// once more after it has said that it waits, and one that leaves wakes its database's worker. Never fails.
    pub fn is_served(&self, oid: u32, role: u32) -> bool {
        let Some(places) = self.database(oid).and_then(DatabaseSlot::places) else { return false };
        let goes_on = |slot: &&RunnerSlot| {
            slot.database.load(Ordering::Acquire) == oid
                && slot.role.load(Ordering::Acquire) == role
                && slot.state() == RunnerState::Running
                && slot.leave.load(Ordering::Acquire) == 0
                && !slot.rests.load(Ordering::SeqCst)
        };
        self.runners.iter().filter(goes_on).count() >= places
    }

    /// These jobs have ended. Whether the worker of the database is to look: some may wait for that, or there are many by
    /// now, whose tables are to be looked after. Never fails.
    pub fn has_ended(&self, oid: u32, jobs: &[i64]) -> bool {
        let Some(slot) = self.database(oid) else { return false };
        let count = jobs.len() as u64;
        let before = slot.ended.fetch_add(count, Ordering::Relaxed);
        let after = before.wrapping_add(count);
        let is_awaited = slot.awaits_ends.load(Ordering::SeqCst);
        if is_awaited {
            slot.ends.put(jobs);
        }
        is_awaited || before / MANY != after / MANY
    }

    /// Wakes the worker of a database: there may be jobs to run. Never fails.
    pub fn wake_jobs(&self, oid: u32) {
        if let Some(slot) = self.database(oid) {
            slot.jobs.store(true, Ordering::Release);
            slot.process.wake();
        }
    }

    /// The same, where jobs of a session or a runner may be there that is gone.
    pub fn wake_for_orphans(&self, oid: u32) {
        if let Some(slot) = self.database(oid) {
            slot.orphans.store(true, Ordering::Release);
        }
        self.wake_jobs(oid);
    }

    /// Whether jobs of a database wait for Odoo.
    pub fn want_odoo(&self, oid: u32, wanted: bool) {
        if let Some(slot) = self.database(oid) {
            slot.odoo_wanted.store(wanted, Ordering::Release);
        }
    }

    /// Takes a place with Odoo for a job of a database, while fewer than `limit` are taken in all. Where others wait, none
    /// takes more than its share.
    pub fn enter_odoo(&self, oid: u32, limit: u32) -> bool {
        let Some(slot) = self.database(oid) else { return false };
        let wanting = self.databases().filter(|slot| slot.odoo_wanted.load(Ordering::Acquire)).count().max(1);
        let share = (limit / u32::try_from(wanting).unwrap_or(1)).max(1);
        let mine = slot.odoo_jobs.fetch_add(1, Ordering::AcqRel);
        let has_place = self.odoo_calls() <= limit && mine < share;
        if !has_place {
            slot.odoo_jobs.fetch_sub(1, Ordering::AcqRel);
        }
        has_place
    }

    /// How many places with Odoo are taken.
    pub fn odoo_calls(&self) -> u32 {
        self.databases().map(|slot| slot.odoo_jobs.load(Ordering::Acquire)).sum()
    }

    /// Gives such a place back, and tells the databases whose jobs wait for one.
    pub fn leave_odoo(&self, oid: u32) {
        if let Some(slot) = self.database(oid) {
            let less = |jobs: u32| jobs.checked_sub(1);
            let _ = slot.odoo_jobs.fetch_update(Ordering::AcqRel, Ordering::Acquire, less);
        }
        for slot in self.databases().filter(|slot| slot.oid() != oid && slot.odoo_wanted.load(Ordering::Acquire)) {
            self.wake_jobs(slot.oid());
        }
    }

    /// Has the gateway look at the list of databases at once. Never fails.
    pub fn announce(&self, oid: u32) {
        let enter = |cell: &AtomicU32| cell.compare_exchange(0, oid, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if !self.announced.iter().any(enter) {
            self.announced_all.store(true, Ordering::Release);
        }
        self.rescan.store(true, Ordering::Release);
        self.gateway.wake();
    }

    /// Takes the announced databases; None when all are to be examined.
    pub fn take_announced(&self) -> Option<Vec<u32>> {
        let all = self.announced_all.swap(false, Ordering::AcqRel);
        let oids = self.announced.iter().map(|cell| cell.swap(0, Ordering::AcqRel)).filter(|oid| *oid != 0).collect();
        (!all).then_some(oids)
    }

    /// Keeps workers out of a database until [`Shared::release`]. False when too many are held already.
    pub fn hold(&self, oid: u32, pid: i32) -> bool {
        let mine =
            |hold: &&Hold| hold.pid.load(Ordering::Acquire) == pid && hold.database.load(Ordering::Acquire) == oid;
        if self.holds.iter().any(|hold| mine(&hold)) {
            return true;
        }
        self.holds.iter().any(|hold| {
            let taken = hold.pid.compare_exchange(0, pid, Ordering::AcqRel, Ordering::Acquire).is_ok();
            if taken {
                hold.database.store(oid, Ordering::Release);
            }
            taken
        })
    }

    /// Lets go of what a backend holds.
    pub fn release(&self, pid: i32) {
        for hold in self.holds.iter().filter(|hold| hold.pid.load(Ordering::Acquire) == pid) {
            hold.database.store(0, Ordering::Release);
            hold.pid.store(0, Ordering::Release);
        }
    }

    /// Gives a session a number that none had before, nor in an earlier life of the server; None when there is no room.
    pub fn enter_session(&self) -> Option<i64> {
        let now = worker::now();
        let next = |last: i64| Some(now.max(last.saturating_add(1)));
        let last = self.last_session.fetch_update(Ordering::AcqRel, Ordering::Acquire, next).unwrap_or_default();
        let number = now.max(last.saturating_add(1));
        let enter = |cell: &AtomicI64| cell.compare_exchange(0, number, Ordering::AcqRel, Ordering::Acquire).is_ok();
        self.sessions.iter().any(enter).then_some(number)
    }

    /// The session with this number has ended.
    pub fn leave_session(&self, number: i64) {
        for cell in self.sessions.iter().filter(|cell| cell.load(Ordering::Acquire) == number) {
            cell.store(0, Ordering::Release);
        }
    }

    /// Whether the session with this number lives.
    pub fn has_session(&self, number: i64) -> bool {
        self.sessions.iter().any(|cell| cell.load(Ordering::Acquire) == number)
    }

    /// Whether workers are to stay out of a database.
    pub fn is_held(&self, oid: u32) -> bool {
        self.holds.iter().any(|hold| hold.database.load(Ordering::Acquire) == oid)
    }
}

// SAFETY: the name is imbus's own.
static SHARED: PgAtomic<Shared> = unsafe { PgAtomic::new(c"imbus") };

thread_local! {
    /// Set in the postmaster and inherited by each of its children.
    static REQUESTED: Cell<bool> = const { Cell::new(false) };
}

/// Whether the postmaster is loading `shared_preload_libraries`.
pub fn preloading() -> bool {
    // SAFETY: a plain flag of PostgreSQL's, read on the main thread.
    unsafe { pg_sys::process_shared_preload_libraries_in_progress }
}

/// Asks for the shared memory; only while preloading.
pub fn request() {
    pg_shmem_init!(SHARED);
    REQUESTED.set(true);
}

/// The shared state; None when the library was not preloaded.
pub fn get() -> Option<&'static Shared> {
    REQUESTED.get().then(|| SHARED.get())
}

/// Reads the secret, or makes it at first start. Runs in the postmaster, whose working directory is the data directory.
fn load_secret() -> [u8; SECRET] {
    let mut secret = [0; SECRET];
    let read = std::fs::File::open(SECRET_FILE).and_then(|mut file| file.read_exact(&mut secret));
    if read.is_ok() {
        return secret;
    }
    // SAFETY: fills exactly SECRET bytes.
    let random = unsafe { pg_sys::pg_strong_random(secret.as_mut_ptr().cast(), SECRET) };
    if !random {
        pgrx::error!("could not make random bytes for {SECRET_FILE}");
    }
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(SECRET_FILE);
    if let Err(error) = file.and_then(|mut file| file.write_all(&secret).and_then(|()| file.sync_all())) {
        pgrx::warning!("could not keep {SECRET_FILE} ({error}): tokens end with this server start");
    }
    secret
}
