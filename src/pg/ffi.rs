//! What pgrx does not bind on all of PostgreSQL 15 to 18, and what headers there have as inline functions and macros, or with other
//! arguments: commands/async.h, libpq/libpq.h, commands/discard.h,
//! tcop/tcopprot.h, access/twophase.h, commands/sequence.h,
//! nodes/nodeFuncs.h, port.h, utils/timeout.h. Whoever calls a function here wraps it in [`guarded`], so that an ERROR unwinds
//! as a Rust panic instead of jumping over Rust frames.

use pgrx::pg_sys;
use std::ffi::{c_char, c_int, c_void};

/// PQcommMethods of libpq.h.
#[repr(C)]
pub struct CommMethods {
    pub comm_reset: unsafe extern "C-unwind" fn(),
    pub flush: unsafe extern "C-unwind" fn() -> c_int,
    pub flush_if_writable: unsafe extern "C-unwind" fn() -> c_int,
    pub is_send_pending: unsafe extern "C-unwind" fn() -> bool,
    pub putmessage: unsafe extern "C-unwind" fn(c_char, *const c_char, usize) -> c_int,
    pub putmessage_noblock: unsafe extern "C-unwind" fn(c_char, *const c_char, usize),
}

/// What the walkers of nodes/nodeFuncs.h call.
pub type Walker = Option<unsafe extern "C-unwind" fn(*mut pg_sys::Node, *mut c_void) -> bool>;

/// Of enum TimeoutId (utils/timeout.h).
pub const STATEMENT_TIMEOUT: c_int = 3;

#[allow(non_upper_case_globals)]
unsafe extern "C-unwind" {
    pub static mut PqCommMethods: *const CommMethods;
    pub static mut notifyInterruptPending: c_int;
    pub fn TwoPhaseGetDummyProc(xid: pg_sys::TransactionId, lock_held: bool) -> *mut pg_sys::PGPROC;
    pub fn nextval_internal(sequence: pg_sys::Oid, check_permissions: bool) -> i64;
    #[cfg_attr(not(feature = "pg15"), link_name = "expression_tree_walker_impl")]
    pub fn expression_tree_walker(node: *mut pg_sys::Node, walker: Walker, context: *mut c_void) -> bool;
    #[cfg_attr(not(feature = "pg15"), link_name = "query_tree_walker_impl")]
    pub fn query_tree_walker(query: *mut pg_sys::Query, walker: Walker, context: *mut c_void, flags: c_int) -> bool;
    pub fn Async_Listen(channel: *const c_char);
    pub fn Async_Notify(channel: *const c_char, payload: *const c_char);
    pub fn ProcessNotifyInterrupt(flush: bool);
    pub fn DiscardCommand(statement: *mut pg_sys::DiscardStmt, is_top_level: bool);
    pub fn PortalHashTableDeleteAll();
    pub fn ResetSequenceCaches();
    pub fn die(signal: c_int);
    pub fn enable_timeout_every(id: c_int, end: pg_sys::TimestampTz, delay_ms: c_int);
    pub fn disable_timeout(id: c_int, keep_indicator: bool);
    #[cfg_attr(feature = "pg18", link_name = "pqsignal_be")]
    pub fn pqsignal(signal: c_int, handler: Option<unsafe extern "C-unwind" fn(c_int)>);
}

/// Runs a call into PostgreSQL that may raise. Never around functions of pg_sys, which do this themselves: a panic may
/// not cross it.
///
/// # Safety
/// On the main thread, with whatever the called function asks for.
pub unsafe fn guarded<T>(call: impl FnOnce() -> T) -> T {
    // SAFETY: the caller's.
    unsafe { pg_sys::submodules::ffi::pg_guard_ffi_boundary(call) }
}

/// A column of a tuple descriptor, counted from 0 (TupleDescAttr of access/tupdesc.h; since 18 the columns lie behind the
/// compact ones).
///
/// # Safety
/// A valid descriptor with so many columns.
pub unsafe fn attribute(descriptor: pg_sys::TupleDesc, index: c_int) -> *const pg_sys::FormData_pg_attribute {
    let place = |number: c_int| usize::try_from(number).unwrap_or(0);
    // SAFETY: the caller's.
    unsafe {
        #[cfg(feature = "pg18")]
        let first: *const pg_sys::FormData_pg_attribute =
            (*descriptor).compact_attrs.as_ptr().add(place((*descriptor).natts)).cast();
        #[cfg(not(feature = "pg18"))]
        let first: *const pg_sys::FormData_pg_attribute = (*descriptor).attrs.as_ptr();
        first.add(place(index))
    }
}

/// Empties a slot (ExecClearTuple of executor/tuptable.h).
///
/// # Safety
/// A valid slot.
pub unsafe fn clear(slot: *mut pg_sys::TupleTableSlot) {
    // SAFETY: the caller's; every kind of slot has this operation.
    unsafe {
        if let Some(clear) = (*(*slot).tts_ops).clear {
            guarded(|| clear(slot));
        }
    }
}

/// Reads a row that lives, with all its columns, into a slot of its table (table_tuple_fetch_row_version of access/tableam.h). False
/// when none lives there.
///
/// # Safety
/// An open table, and a slot that was made for it.
pub unsafe fn fetch(
    table: pg_sys::Relation,
    mut place: pg_sys::ItemPointerData,
    slot: *mut pg_sys::TupleTableSlot,
) -> bool {
    // SAFETY: the caller's; a snapshot of PostgreSQL's own that sees what is committed, or done by this transaction.
    unsafe {
        let Some(fetch) = (*(*table).rd_tableam).tuple_fetch_row_version else { return false };
        let snapshot = &raw mut pg_sys::SnapshotSelfData;
        let is_there = guarded(|| fetch(table, &raw mut place, snapshot, slot));
        if is_there {
            pg_sys::slot_getsomeattrs_int(slot, (*(*table).rd_att).natts);
        }
        is_there
    }
}

/// Which is the first of these compiled conditions that a row in a slot fulfils (ExecQual of executor/executor.h). All are
/// looked at under one guard, as each costs more than many a condition.
///
/// # Safety
/// Valid conditions, and an executor's state that has a context for each tuple.
pub unsafe fn first_held<T>(
    conditions: &[(T, *mut pg_sys::ExprState)],
    state: *mut pg_sys::EState,
    slot: *mut pg_sys::TupleTableSlot,
) -> Option<usize> {
    // SAFETY: the caller's; a compiled expression has the function that evaluates it.
    unsafe {
        let context = (*state).es_per_tuple_exprcontext;
        (*context).ecxt_scantuple = slot;
        let mut is_null = false;
        let mut holds = |condition: *mut pg_sys::ExprState| {
            let evaluate = (*condition).evalfunc;
            evaluate.is_none_or(|evaluate| evaluate(condition, context, &raw mut is_null).value() != 0)
        };
        guarded(|| conditions.iter().position(|(_, condition)| holds(*condition)))
    }
}

/// The cells of a list.
///
/// # Safety
/// A valid list or NULL.
pub unsafe fn cells<'a>(list: *mut pg_sys::List) -> &'a [pg_sys::ListCell] {
    // SAFETY: a list's elements are `length` cells.
    unsafe {
        match list.as_ref() {
            Some(list) => std::slice::from_raw_parts(list.elements, usize::try_from(list.length).unwrap_or(0)),
            None => &[],
        }
    }
}

/// Some object that belongs to a table, by a number of the caller's (SET_LOCKTAG_OBJECT of storage/lock.h): unlike an advisory lock,
/// no statement can lock it.
fn object(relid: pg_sys::Oid, number: u16) -> pg_sys::LOCKTAG {
    pg_sys::LOCKTAG {
        // SAFETY: a plain global.
        locktag_field1: unsafe { pg_sys::MyDatabaseId }.into(),
        locktag_field2: pg_sys::RelationRelationId.into(),
        locktag_field3: relid.into(),
        locktag_field4: number,
        locktag_type: pg_sys::LockTagType::LOCKTAG_OBJECT as u8,
        locktag_lockmethodid: pg_sys::DEFAULT_LOCKMETHOD as u8,
    }
}

/// Locks such an object in one of PostgreSQL's lock modes until the transaction's end or `unlock_object` (LockDatabaseObject of
/// storage/lmgr.h). False when somebody else has it and is not to be waited for. Errors: 40P01, 55P03 and what ends a wait.
pub fn lock_object(relid: pg_sys::Oid, number: u16, mode: u32, waits: bool) -> bool {
    let tag = object(relid, number);
    // SAFETY: main thread, inside a transaction; a valid tag.
    let result = unsafe { pg_sys::LockAcquire(&raw const tag, mode as pg_sys::LOCKMODE, false, !waits) };
    result != pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL
}

/// Gives such a lock back.
pub fn unlock_object(relid: pg_sys::Oid, number: u16, mode: u32) {
    let tag = object(relid, number);
    // SAFETY: as above.
    unsafe { pg_sys::LockRelease(&raw const tag, mode as pg_sys::LOCKMODE, false) };
}

/// Truncates a table that this transaction has locked ACCESS EXCLUSIVE, as TRUNCATE does.
pub fn truncate(relid: pg_sys::Oid) {
    let behavior = pg_sys::DropBehavior::DROP_RESTRICT;
    // SAFETY: main thread, inside a transaction; lists of one relation and its OID.
    unsafe {
        let relation = pg_sys::table_open(relid, pg_sys::NoLock as pg_sys::LOCKMODE);
        pg_sys::CheckTableNotInUse(relation, c"TRUNCATE".as_ptr());
        let none = std::ptr::null_mut();
        let (relations, oids) = (pg_sys::lappend(none, relation.cast()), pg_sys::lappend_oid(none, relid));
        #[cfg(feature = "pg15")]
        pg_sys::ExecuteTruncateGuts(relations, oids, none, behavior, false);
        #[cfg(not(feature = "pg15"))]
        pg_sys::ExecuteTruncateGuts(relations, oids, none, behavior, false, false);
        pg_sys::table_close(relation, pg_sys::NoLock as pg_sys::LOCKMODE);
    }
}
