//! One unfinished job per `identity_key` over all tables of jobs. Each has a unique index of its own; whoever puts such a job in
//! looks along those of the other tables before he does, and once more when his row is in: of two who do it at the same time, in
//! two tables between which the jobs just change, one at least sees the other's row, and waits for what becomes of it. That
//! both do, each for the other, is a deadlock as any, which PostgreSQL ends.

use super::{Table, on_table};
use crate::pg::datum::Text;
use crate::pg::dirty::{self, Found, Index};
use crate::pg::report::{Outcome, internal, report};
use crate::pg::transaction::safely;
use crate::pg::{catalog, ffi, sql};
use pgrx::prelude::*;
use std::cell::RefCell;
use std::rc::Rc;

/// Of the table, what is locked by who puts in a job with a key: shared by imbus, exclusively by who does it by hand, whose row
/// nobody can look back from.
const KEYS: u16 = 2;

/// Indexes, as they were in this state of the catalogs.
type Known = ((u64, u64), Rc<[Index]>);

thread_local! {
    static INDEXES: RefCell<Option<Known>> = const { RefCell::new(None) };
}

/// What became of a job that was to be put in.
pub enum Put<T> {
    /// It is in, and none with its key is elsewhere.
    Alone(T),
    /// It was not tried: there is one.
    Before,
    /// It is in, and so is another one: it is to be taken back.
    Beside(T),
}

/// Puts an unfinished job into the table `place` by `work`; one with a key only beside no other, in whatever table but this one,
/// whose own index knows. Waits for those who are putting in or ending one with the same key. Errors: 40P01, and those of `work`.
pub fn put<T>(
    table: &Table,
    key: Option<&str>,
    place: pg_sys::Oid,
    work: impl FnOnce() -> Outcome<T>,
) -> Outcome<Put<T>> {
    let Some(key) = key else { return Ok(Put::Alone(work()?)) };
    // On an error the locks go with the transaction, or with its savepoint.
    ffi::lock_object(table.relid, KEYS, pg_sys::ShareLock, true);
    lock(table);
    let put = if is_taken(table, key, place)? {
        Put::Before
    } else {
        let done = work()?;
        if is_taken(table, key, place)? { Put::Beside(done) } else { Put::Alone(done) }
    };
    unlock(table);
    ffi::unlock_object(table.relid, KEYS, pg_sys::ShareLock);
    Ok(put)
}

/// Whether there is an unfinished job with this key, for who is about to put one in by hand. If not, nobody else puts one in, nor is
/// any moved, until the transaction has ended.
pub fn is_taken_by_hand(table: &Table, key: &str) -> Outcome<bool> {
    ffi::lock_object(table.relid, KEYS, pg_sys::ExclusiveLock, true);
    lock(table);
    is_taken(table, key, pg_sys::InvalidOid)
}

/// The unfinished job with this key, as things are now. Errors: 40001 for one that the transaction's snapshot does not have.
pub fn twin(key: &str) -> Outcome<Option<i64>> {
    let text = "SELECT id FROM TABLE WHERE identity_key = $1 AND state IN ('created', 'processing')";
    let key = Text(key.to_owned());
    let found = sql::as_of_now(|| on_table(text, &[key.into()], |row| row.need::<i64>(1)))?;
    let Some(id) = found.first().copied() else { return Ok(None) };
    // SAFETY: a plain global.
    let keeps_snapshot = unsafe { pg_sys::XactIsoLevel } >= pg_sys::XACT_REPEATABLE_READ as i32;
    if keeps_snapshot && on_table("SELECT FROM TABLE WHERE id = $1", &[id.into()], |_| Ok(()))?.is_empty() {
        return Err(report(
            PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE,
            "could not serialize access: another job has the same identity_key",
            &format!("Job {id} is not to be seen by the snapshot of this transaction."),
            "Retry the transaction.",
        ));
    }
    Ok(Some(id))
}

/// Whether an unfinished job with this key is in any table but one. The tables are locked, also when it has waited.
fn is_taken(table: &Table, key: &str, but: pg_sys::Oid) -> Outcome<bool> {
    loop {
        let mut in_doubt = None;
        for index in indexes(table)?.iter().filter(|index| index.table != but) {
            match dirty::look(index, key) {
                Found::Row => return Ok(true),
                Found::InDoubt(other) => in_doubt = Some(other),
                Found::Nothing => {}
            }
        }
        let Some(other) = in_doubt else { return Ok(false) };
        // Nobody else waits for that.
        unlock(table);
        dirty::wait_for(other);
        lock(table);
    }
}

/// No job is moved into another table meanwhile (`rotation`).
fn lock(table: &Table) {
    // SAFETY: main thread, inside a transaction.
    tables(table).for_each(|relid| unsafe {
        pg_sys::LockRelationOid(relid, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE);
    });
}

/// What the transaction holds besides, by what it has put in, stays.
fn unlock(table: &Table) {
    // SAFETY: pairs with `lock`.
    tables(table).for_each(|relid| unsafe {
        pg_sys::UnlockRelationOid(relid, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE);
    });
}

fn tables(table: &Table) -> impl Iterator<Item = pg_sys::Oid> {
    std::iter::once(table.relid).chain(table.children.iter().map(|child| child.relid))
}

/// The indexes of keys, of tables that are locked.
fn indexes(table: &Table) -> Outcome<Rc<[Index]>> {
    let state = catalog::tables();
    let known =
        INDEXES.with_borrow(|known| known.as_ref().filter(|(then, _)| *then == state).map(|(_, known)| known.clone()));
    if let Some(known) = known {
        return Ok(known);
    }
    let text = "SELECT i.indrelid, i.indexrelid, a.attnum
                  FROM pg_catalog.pg_index i
                  JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
                 WHERE i.indrelid = ANY($1) AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1
                   AND a.attname = 'identity_key'";
    let read = |row: &sql::Row| Ok(Index { table: row.need(1)?, index: row.need(2)?, column: row.need(3)? });
    let relids: Vec<pg_sys::Oid> = tables(table).collect();
    let found: Rc<[Index]> = sql::as_of_now(|| safely(|| sql::rows(text, &[relids.into()], read)))?.into();
    if let Some(relid) = tables(table).find(|relid| found.iter().all(|index| index.table != *relid)) {
        let relid = u32::from(relid);
        return Err(internal(format!("table {relid} of jobs has lost its index of identity keys")));
    }
    INDEXES.set(Some((state, Rc::clone(&found))));
    Ok(found)
}
