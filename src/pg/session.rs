//! What a job leaves in its runner's session is cleared away before the next one: settings (they are taken back by
//! [`super::transaction`]), temporary tables, prepared statements, cursors, session locks, sequences' last values.

use super::{ffi, launch, transaction};
use pgrx::prelude::*;

/// Savepoints with a transaction number of their own that others see without looking further (storage/proc.h,
/// PGPROC_MAX_CACHED_SUBXIDS is 64); the next jobs get a transaction of their own before that.
const NUMBERS: u8 = 56;

/// Lock method of advisory locks (storage/lock.h, USER_LOCKMETHOD).
const USER_LOCKS: u16 = 2;

/// Whether jobs can share a transaction here. Where texts are converted one by one, they do not.
pub fn can_share() -> bool {
    // SAFETY: plain reads of the session's state.
    unsafe { pg_sys::GetDatabaseEncoding() == pg_sys::pg_enc::PG_UTF8 as i32 && !has_temporary() }
}

/// Whether another job can be run in this transaction.
pub fn can_go_on() -> bool {
    // SAFETY: this process's own entry.
    unsafe { (*pg_sys::MyProc).subxidStatus.count < NUMBERS && !has_temporary() }
}

/// Whether there is a schema for temporary tables.
///
/// SAFETY: main thread.
unsafe fn has_temporary() -> bool {
    unsafe { (*pg_sys::MyProc).tempNamespaceId != pg_sys::InvalidOid }
}

/// Lets no interrupt stop what comes next but the end of the session: it is for a job, and would hit the record of how that
/// ended. Holds until `be_stoppable`, or an ERROR, which resets it (errfinish in elog.c). Nor does lock_timeout end a wait
/// meanwhile: it is such an interrupt.
pub fn be_unstoppable() {
    // SAFETY: plain settings of the session, as HOLD_CANCEL_INTERRUPTS (miscadmin.h).
    unsafe { pg_sys::QueryCancelHoldoffCount = 1 };
}

/// Lets an interrupt stop the jobs that come next; one that was for those before is forgotten.
pub fn be_stoppable() {
    // SAFETY: as above.
    unsafe {
        pg_sys::QueryCancelPending = 0;
        pg_sys::QueryCancelHoldoffCount = 0;
    }
}

/// Clears what is cleared without a transaction, or within one.
pub fn clear() {
    // SAFETY: what DISCARD ALL does (commands/discard.c), but for plans, which are the session's own and stay valid.
    unsafe {
        pg_sys::DropAllPreparedStatements();
        ffi::guarded(|| ffi::PortalHashTableDeleteAll());
        // Not those of the transaction: what was done under them is not committed yet.
        pg_sys::LockReleaseSession(USER_LOCKS);
        ffi::guarded(|| ffi::ResetSequenceCaches());
    }
}

/// Clears what only a transaction of its own can clear, where there is such a thing.
pub fn after_transaction() {
    // SAFETY: main thread.
    if unsafe { has_temporary() } {
        discard_all();
    }
}

/// Forgets what a job left.
pub fn reset() {
    clear();
    after_transaction();
}

fn discard_all() {
    let done = transaction::run(|| {
        let mut statement =
            pg_sys::DiscardStmt { type_: pg_sys::NodeTag::T_DiscardStmt, target: pg_sys::DiscardMode::DISCARD_ALL };
        // SAFETY: what DISCARD ALL runs; allowed because this is no transaction block of a client's.
        unsafe {
            pg_sys::PopActiveSnapshot();
            ffi::guarded(|| ffi::DiscardCommand(&mut statement, true));
        }
        Ok(())
    });
    if let Err(failure) = done {
        // A session that cannot be cleaned must not serve another job.
        pgrx::warning!("imbus could not reset a job's session: {failure}");
        launch::exit();
    }
}
