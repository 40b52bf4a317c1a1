//! What a committing transaction tells the workers: flags kept while it runs, acted on after its commit, when its rows
//! are visible. A rolled-back savepoint may leave a flag set; a needless wake-up does no harm.

use super::shared;
use pgrx::prelude::*;
use std::cell::Cell;

thread_local! {
    static PUBLISHED: Cell<bool> = const { Cell::new(false) };
    static ENQUEUED: Cell<bool> = const { Cell::new(false) };
    static EXTENSION: Cell<bool> = const { Cell::new(false) };
    static HOLDING: Cell<bool> = const { Cell::new(false) };
    static OWNER: Cell<u32> = const { Cell::new(0) };
}

/// The running transaction has published to the bus of this database.
pub fn published() {
    PUBLISHED.set(true);
}

/// The running transaction has enqueued or changed a job of this database.
pub fn enqueued() {
    ENQUEUED.set(true);
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

/// Registers the callback, once in the life of a process.
pub fn register() {
    // SAFETY: main thread, `_PG_init`; the callback is a plain function without state.
    unsafe { pg_sys::RegisterXactCallback(Some(at_end), std::ptr::null_mut()) };
}

/// Runs inside CommitTransaction, where an ERROR would be a PANIC: only atomics and SetLatch, no allocation.
unsafe extern "C-unwind" fn at_end(event: pg_sys::XactEvent::Type, _arg: *mut std::ffi::c_void) {
    use pg_sys::XactEvent::{XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PARALLEL_ABORT, XACT_EVENT_PREPARE};
    if matches!(event, XACT_EVENT_COMMIT | XACT_EVENT_ABORT | XACT_EVENT_PREPARE) && HOLDING.take() {
        release();
    }
    match event {
        XACT_EVENT_COMMIT => {
            let (published, enqueued, extension) = (PUBLISHED.take(), ENQUEUED.take(), EXTENSION.take());
            if published || enqueued || extension {
                tell(published, enqueued, extension);
            }
            recheck(OWNER.take());
        }
        // A prepared transaction's rows are found by the worker's own look-out (database.rs) or by COMMIT PREPARED.
        XACT_EVENT_ABORT | XACT_EVENT_PARALLEL_ABORT | XACT_EVENT_PREPARE => {
            PUBLISHED.set(false);
            ENQUEUED.set(false);
            EXTENSION.set(false);
            OWNER.set(0);
        }
        _ => {}
    }
}

/// Has the worker of a database look again whether it has the extension, and who owns it.
fn recheck(database: u32) {
    if let Some(slot) = shared::get().and_then(|shared| shared.database(database)).filter(|_| database != 0) {
        slot.recheck.store(true, std::sync::atomic::Ordering::Release);
        slot.process.wake();
    }
}

fn release() {
    if let Some(shared) = shared::get() {
        // SAFETY: a plain global.
        shared.release(unsafe { pg_sys::MyProcPid });
        shared.rescan.store(true, std::sync::atomic::Ordering::Release);
        shared.gateway.wake();
    }
}

fn tell(published: bool, enqueued: bool, extension: bool) {
    let Some(shared) = shared::get() else { return };
    // SAFETY: a plain global.
    let database = u32::from(unsafe { pg_sys::MyDatabaseId });
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
