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
    /// One that may be there or not, as this transaction ends.
    InDoubt(Other),
}

/// A transaction that somebody else is in.
#[derive(Clone, Copy, Debug)]
pub struct Other {
    xid: pg_sys::TransactionId,
    /// It puts the row in by INSERT … ON CONFLICT, and does not know yet whether it will; 0 for others.
    token: u32,
}

/// A B-tree index on one column of texts.
#[derive(Clone, Copy)]
pub struct Index {
    pub table: pg_sys::Oid,
    pub index: pg_sys::Oid,
    /// The column's number in the table.
    pub column: i16,
}

/// Looks for rows of a key. The caller has locked the table.
pub fn look(along: &Index, key: &str) -> Found {
    let mut snapshot =
        pg_sys::SnapshotData { snapshot_type: pg_sys::SnapshotType::SNAPSHOT_DIRTY, ..Default::default() };
    let snapshot = &raw mut snapshot;
    let mut entry = pg_sys::ScanKeyData::default();
    let mut found = Found::Nothing;
    // SAFETY: main thread, inside a transaction. What is opened is closed below, on ERROR by the abort. The snapshot, into which the
    // scan writes, and the key outlive it.
    unsafe {
        let table = pg_sys::table_open(along.table, pg_sys::NoLock as pg_sys::LOCKMODE);
        let index = pg_sys::index_open(along.index, pg_sys::AccessShareLock as pg_sys::LOCKMODE);
        pg_sys::ScanKeyEntryInitialize(
            &raw mut entry,
            0,
            along.column,
            pg_sys::BTEqualStrategyNumber as pg_sys::StrategyNumber,
            pg_sys::InvalidOid,
            *(*index).rd_indcollation,
            pg_sys::Oid::from(pg_sys::F_TEXTEQ),
            Str(key).into_datum().unwrap_or(pg_sys::Datum::null()),
        );
        let scan = pg_sys::systable_beginscan_ordered(table, index, snapshot, 1, &raw mut entry);
        while !pg_sys::systable_getnext_ordered(scan, pg_sys::ScanDirection::ForwardScanDirection).is_null() {
            let (begun, ended) = ((*snapshot).xmin, (*snapshot).xmax);
            if begun != pg_sys::InvalidTransactionId {
                found = Found::InDoubt(Other { xid: begun, token: (*snapshot).speculativeToken });
            } else if ended != pg_sys::InvalidTransactionId {
                found = Found::InDoubt(Other { xid: ended, token: 0 });
            } else {
                found = Found::Row;
                break;
            }
        }
        pg_sys::systable_endscan_ordered(scan);
        pg_sys::index_close(index, pg_sys::AccessShareLock as pg_sys::LOCKMODE);
        pg_sys::table_close(table, pg_sys::NoLock as pg_sys::LOCKMODE);
    }
    found
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
