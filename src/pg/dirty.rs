//! Looks along an index at what is in a table at this moment, whatever snapshot the transaction keeps: also at what others are
//! just putting in or taking away. As PostgreSQL looks for conflicts before it puts in a row
//! (check_exclusion_or_unique_constraint of execIndexing.c).

use super::datum::Str;
use pgrx::prelude::*;

/// What was found.
#[derive(Clone, Copy, Debug)]
pub enum Found {
    Nothing,
    /// A row that is there.
    Row,
    /// One that is there or not, as this transaction ends.
    InDoubt(Other),
}

/// A transaction that somebody else is in.
#[derive(Clone, Copy, Debug)]
pub struct Other {
    xid: pg_sys::TransactionId,
    /// It puts the row in by INSERT … ON CONFLICT, and does not know yet whether it will; 0 for others.
    token: u32,
}

/// A B-tree index of one column, compared as texts are.
#[derive(Clone, Copy)]
pub struct Index {
    pub table: pg_sys::Oid,
    pub index: pg_sys::Oid,
    /// The column's number in the table.
    pub column: i16,
}

/// Looks for rows of a key, and tells of one in doubt only where none is there for sure. The caller has locked the table, and the
/// index is what [`Index`] says.
pub fn look(along: &Index, key: &str) -> Found {
    let mut dirty = pg_sys::SnapshotData { snapshot_type: pg_sys::SnapshotType::SNAPSHOT_DIRTY, ..Default::default() };
    // SAFETY: main thread, inside a transaction. What is opened is closed below, on ERROR by the abort; the dirty snapshot outlives
    // its scan, which writes into it.
    unsafe {
        let table = pg_sys::table_open(along.table, pg_sys::NoLock as pg_sys::LOCKMODE);
        let index = pg_sys::index_open(along.index, pg_sys::AccessShareLock as pg_sys::LOCKMODE);
        let (mut found, has_met_any) = scan(table, index, along.column, key, &raw mut dirty);
        if matches!(found, Found::Nothing) && has_met_any {
            // Unlike PostgreSQL's own look for conflicts this one keeps no lock on the page: of a row that is updated meanwhile it
            // may meet the old version alone, when that has just become dead. Its successor is committed, and so seen now.
            let snapshot = pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot());
            (found, _) = scan(table, index, along.column, key, snapshot);
            pg_sys::UnregisterSnapshot(snapshot);
        }
        pg_sys::index_close(index, pg_sys::AccessShareLock as pg_sys::LOCKMODE);
        pg_sys::table_close(table, pg_sys::NoLock as pg_sys::LOCKMODE);
        found
    }
}

/// Looks by one snapshot; with what was found comes whether the index has any entry of the key, also of dead rows.
///
/// SAFETY: an open table, an open index of it as [`Index`] says, and a valid snapshot.
unsafe fn scan(
    table: pg_sys::Relation,
    index: pg_sys::Relation,
    column: i16,
    key: &str,
    snapshot: pg_sys::Snapshot,
) -> (Found, bool) {
    let mut entry = pg_sys::ScanKeyData::default();
    // SAFETY: the caller's. The key outlives the scan, which is ended below, on ERROR by the abort.
    unsafe {
        pg_sys::ScanKeyEntryInitialize(
            &raw mut entry,
            0,
            column,
            pg_sys::BTEqualStrategyNumber as pg_sys::StrategyNumber,
            pg_sys::InvalidOid,
            *(*index).rd_indcollation,
            pg_sys::Oid::from(pg_sys::F_TEXTEQ),
            Str(key).into_datum().unwrap_or(pg_sys::Datum::null()),
        );
        let scan = pg_sys::systable_beginscan_ordered(table, index, snapshot, 1, &raw mut entry);
        // It says where the last entry was that was met.
        (*(*scan).iscan).xs_heaptid = pg_sys::ItemPointerData::default();
        let mut found = Found::Nothing;
        while !pg_sys::systable_getnext_ordered(scan, pg_sys::ScanDirection::ForwardScanDirection).is_null() {
            found = match () {
                () if (*snapshot).snapshot_type != pg_sys::SnapshotType::SNAPSHOT_DIRTY => Found::Row,
                () if (*snapshot).xmin != pg_sys::InvalidTransactionId => {
                    Found::InDoubt(Other { xid: (*snapshot).xmin, token: (*snapshot).speculativeToken })
                }
                () if (*snapshot).xmax != pg_sys::InvalidTransactionId => {
                    Found::InDoubt(Other { xid: (*snapshot).xmax, token: 0 })
                }
                () => Found::Row,
            };
            if matches!(found, Found::Row) {
                break;
            }
        }
        let has_met_any = (*(*scan).iscan).xs_heaptid.ip_posid != 0;
        pg_sys::systable_endscan_ordered(scan);
        (found, has_met_any)
    }
}

/// Waits until that transaction has ended, or knows whether it puts in the row. Errors: 40P01, 55P03, and what interrupts a wait.
pub fn wait_for(other: Other) {
    let nowhere = std::ptr::null_mut();
    // SAFETY: main thread, inside a transaction.
    unsafe {
        match other.token {
            0 => pg_sys::XactLockTableWait(other.xid, nowhere, std::ptr::null_mut(), pg_sys::XLTW_Oper::XLTW_None),
            token => pg_sys::SpeculativeInsertionWait(other.xid, token),
        }
    }
}
