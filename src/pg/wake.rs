//! What a committing transaction tells the workers: the ids it wrote (`ring`) and flags kept while it runs, acted on
//! after its commit, when its rows are visible. A rolled-back savepoint may leave a flag set; a needless wake-up does no
//! harm.

use super::{dispatcher, ring, shared, worker};
use pgrx::prelude::*;
use std::cell::{Cell, RefCell};
use std::sync::atomic::Ordering;

thread_local! {
    static ENQUEUED: Cell<bool> = const { Cell::new(false) };
    /// The role and the id of a job that any runner of the role can take at once; 0 for none.
    static PLAIN: Cell<(u32, i64)> = const { Cell::new((0, 0)) };
    /// When the first of the jobs is to start that are to wait, in microseconds since 2000.
    static LATER: Cell<i64> = const { Cell::new(i64::MAX) };
    static ENDED: RefCell<Vec<i64>> = const { RefCell::new(Vec::new()) };
    static BLOCKED: Cell<bool> = const { Cell::new(false) };
    static EXTENSION: Cell<bool> = const { Cell::new(false) };
    static HOLDING: Cell<bool> = const { Cell::new(false) };
    static OWNER: Cell<u32> = const { Cell::new(0) };
}

/// The running transaction has enqueued or brought back a job of this database, or asks its worker to look.
pub fn enqueued() {
    ENQUEUED.set(true);
}

/// The running transaction has enqueued a job that any runner of this role can take at once.
pub fn enqueued_for(role: u32, job: i64) {
    // Of several jobs the worker makes the best.
    if PLAIN.replace((role, job)).0 != 0 {
        ENQUEUED.set(true);
    }
}

/// The running transaction has enqueued a job that is not to start before then, in microseconds since 2000.
pub fn enqueued_for_later(start: i64) {
    LATER.set(LATER.get().min(start));
}

/// The running transaction has enqueued or brought back a job of this database that waits for others to end.
pub fn enqueued_blocked() {
    BLOCKED.set(true);
    ENQUEUED.set(true);
}

/// The running transaction has ended these jobs of this database: others may have waited for that.
pub fn ended(jobs: &[i64]) {
    ENDED.with_borrow_mut(|ended| ended.extend_from_slice(jobs));
}

/// The running transaction has created or dropped an extension or a database.
pub fn extension_changed() {
    EXTENSION.set(true);
}

/// The running transaction has given a database to another owner.
pub fn owner_changed(database: u32) {
    OWNER.set(database);
}

/// The running transaction keeps the workers of a database out (`hook`); they are let back when it ends.
pub fn holding() {
    HOLDING.set(true);
}

/// Registers the callbacks, once in the life of a process.
pub fn register() {
    // SAFETY: main thread, `_PG_init`; the callbacks are plain functions without state.
    unsafe {
        pg_sys::RegisterXactCallback(Some(at_end), std::ptr::null_mut());
        pg_sys::RegisterSubXactCallback(Some(at_savepoint), std::ptr::null_mut());
    }
}

/// Runs when a savepoint is released or rolled back, while its level is still the current one.
unsafe extern "C-unwind" fn at_savepoint(
    event: pg_sys::SubXactEvent::Type,
    _savepoint: pg_sys::SubTransactionId,
    _parent: pg_sys::SubTransactionId,
    _arg: *mut std::ffi::c_void,
) {
    use pg_sys::SubXactEvent::{SUBXACT_EVENT_ABORT_SUB, SUBXACT_EVENT_COMMIT_SUB};
    // SAFETY: a plain read of this session's state.
    let level = u32::try_from(unsafe { pg_sys::GetCurrentTransactionNestLevel() }).unwrap_or(1);
    match event {
        SUBXACT_EVENT_COMMIT_SUB => ring::release_savepoint(level),
        SUBXACT_EVENT_ABORT_SUB => ring::abort_savepoint(level),
        _ => {}
    }
}

/// Runs inside CommitTransaction, where an ERROR would be a PANIC: only atomics and SetLatch, no allocation.
unsafe extern "C-unwind" fn at_end(event: pg_sys::XactEvent::Type, _arg: *mut std::ffi::c_void) {
    use pg_sys::XactEvent::{XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PARALLEL_ABORT, XACT_EVENT_PREPARE};
    if matches!(event, XACT_EVENT_COMMIT | XACT_EVENT_ABORT | XACT_EVENT_PREPARE) && HOLDING.take() {
        release();
    }
    match event {
        XACT_EVENT_COMMIT => {
            // SAFETY: a plain global.
            let database = u32::from(unsafe { pg_sys::MyDatabaseId });
            let published = ring::committed(database);
            let (enqueued, blocked, extension) = (ENQUEUED.take(), BLOCKED.take(), EXTENSION.take());
            let enqueued = enqueued | is_soon(LATER.replace(i64::MAX));
            if enqueued && let Some(slot) = shared::get().and_then(|shared| shared.database(database)) {
                slot.add_news();
                slot.blocked.fetch_or(blocked, Ordering::SeqCst);
            }
            let enqueued = enqueued | !is_taken(database, PLAIN.take());
            let ended = ENDED.with_borrow_mut(|jobs| {
                let is_to_look =
                    !jobs.is_empty() && shared::get().is_some_and(|shared| shared.has_ended(database, jobs));
                jobs.clear();
                is_to_look
            });
            if published || enqueued || ended || extension {
                tell(database, published, enqueued || ended, extension);
            }
            recheck(OWNER.take());
        }
        XACT_EVENT_ABORT | XACT_EVENT_PARALLEL_ABORT | XACT_EVENT_PREPARE => {
            if event == XACT_EVENT_PREPARE {
                // SAFETY: a plain global.
                ring::prepared(u32::from(unsafe { pg_sys::MyDatabaseId }));
            }
            ring::forget();
            ENQUEUED.set(false);
            ENDED.with_borrow_mut(Vec::clear);
            BLOCKED.set(false);
            PLAIN.set((0, 0));
            LATER.set(i64::MAX);
            EXTENSION.set(false);
            OWNER.set(0);
        }
        _ => {}
    }
}

/// Whether there is no plain job, or one that needs nobody else: a runner that waits was offered it (the worker's answer
/// would take longer), or all runners come to it by themselves.
fn is_taken(database: u32, (role, job): (u32, i64)) -> bool {
    let Some(shared) = shared::get().filter(|_| role != 0) else { return true };
    if shared.offer(database, role, job) {
        return true;
    }
    // A runner that begins to wait just now sees either this, or that it is woken.
    shared.database(database).into_iter().for_each(|slot| slot.add_news());
    shared.offer(database, role, job) || shared.is_served(database, role)
}

/// Whether the worker would not learn of such a job in time when it looks out by itself.
fn is_soon(start: i64) -> bool {
    const LOOKOUT: i64 = 2 * dispatcher::LOOKOUT.as_micros() as i64;
    start < i64::MAX && start < worker::now().saturating_add(LOOKOUT)
}

/// Has the worker of a database look again whether it has the extension, and who owns it.
fn recheck(database: u32) {
    if let Some(slot) = shared::get().and_then(|shared| shared.database(database)).filter(|_| database != 0) {
        slot.recheck.store(true, Ordering::Release);
        slot.process.wake();
    }
}

fn release() {
    if let Some(shared) = shared::get() {
        // SAFETY: a plain global.
        shared.release(unsafe { pg_sys::MyProcPid });
        shared.rescan.store(true, Ordering::Release);
        shared.gateway.wake();
    }
}

fn tell(database: u32, published: bool, enqueued: bool, extension: bool) {
    let Some(shared) = shared::get() else { return };
    if published {
        shared.wake_bus(database);
    }
    if enqueued {
        shared.wake_jobs(database);
    }
    if extension {
        recheck(database);
        shared.announce(database);
    }
}
