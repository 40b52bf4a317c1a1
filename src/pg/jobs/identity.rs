//! One unfinished job per `identity_key` over all tables of jobs. Each has a unique index of its own. Whoever puts such a job in
//! looks along all of them before he does, and along those of the other tables once more when his row is in: of two who do it at
//! the same time, in two tables between which the jobs just change, one at least sees the other's row, and waits for what
//! becomes of it. That both do, each for the other, is a deadlock as any, which PostgreSQL ends. While a look waits for somebody,
//! nothing is locked for its sake.

use super::{KEYS, Table, on_table};
use crate::pg::datum::Text;
use crate::pg::dirty::{self, Found, Index};
use crate::pg::report::{Outcome, internal, report};
use crate::pg::transaction::safely;
use crate::pg::{catalog, ffi, sql};
use pgrx::prelude::*;
use std::cell::RefCell;
use std::rc::Rc;

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

/// Puts an unfinished job into the table `place` by `work`; one with a key only beside no other. Waits for those who are putting in
/// or ending one with the same key. Errors: 25006 in a read-only transaction, 40P01, 55P03, what ends a wait, and those of `work`.
pub fn put<T>(
    table: &Table,
    key: Option<&str>,
    place: pg_sys::Oid,
    work: impl FnOnce() -> Outcome<T>,
) -> Outcome<Put<T>> {
    let Some(key) = key else { return Ok(Put::Alone(work()?)) };
    // SAFETY: main thread, inside a transaction.
    unsafe { pg_sys::PreventCommandIfReadOnly(c"INSERT".as_ptr()) };
    // On an error the locks go with the transaction, or with its savepoint.
    let locks = Locks { table, keys: Some(pg_sys::ShareLock) };
    locks.take();
    if is_taken(&locks, key, pg_sys::InvalidOid)? {
        locks.give_back();
        return Ok(Put::Before);
    }
    let done = work()?;
    // Who comes by hand from now on sees this row, and waits for it.
    let locks = locks.without_keys();
    let is_beside = is_taken(&locks, key, place)?;
    locks.give_back();
    Ok(if is_beside { Put::Beside(done) } else { Put::Alone(done) })
}

/// Whether there is an unfinished job with this key, for who is about to put one in by hand. If not, nobody puts one with a key in,
/// nor is any job moved, until the transaction has ended.
pub fn is_taken_by_hand(table: &Table, key: &str) -> Outcome<bool> {
    let locks = Locks { table, keys: Some(pg_sys::ExclusiveLock) };
    locks.take();
    is_taken(&locks, key, pg_sys::InvalidOid)
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

/// Whether an unfinished job with this key is in any table but one. The locks are there, also when it has waited.
fn is_taken(locks: &Locks<'_>, key: &str, but: pg_sys::Oid) -> Outcome<bool> {
    loop {
        let mut in_doubt = None;
        for index in indexes(locks.table)?.iter().filter(|index| index.table != but) {
            match dirty::look(index, key) {
                Found::Row => return Ok(true),
                Found::InDoubt(other) => in_doubt = Some(other),
                Found::Nothing => {}
            }
        }
        let Some(other) = in_doubt else { return Ok(false) };
        locks.give_back();
        dirty::wait_for(other);
        locks.take();
    }
}

/// What is locked while somebody looks, and puts in what he has looked for. No job is moved into another table meanwhile
/// (`rotation`).
struct Locks<'a> {
    table: &'a Table,
    /// How `KEYS` is, if it is.
    keys: Option<u32>,
}

impl<'a> Locks<'a> {
    fn take(&self) {
        if let Some(mode) = self.keys {
            ffi::lock_object(self.table.relid, KEYS, mode, true);
        }
        // SAFETY: main thread, inside a transaction.
        tables(self.table).for_each(|relid| unsafe {
            pg_sys::LockRelationOid(relid, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE);
        });
    }

    /// What the transaction holds besides, by what it has put in, stays.
    fn give_back(&self) {
        // SAFETY: pairs with `take`.
        tables(self.table).for_each(|relid| unsafe {
            pg_sys::UnlockRelationOid(relid, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE);
        });
        self.unlock_keys();
    }

    /// The tables' alone: the keys' is given back.
    fn without_keys(self) -> Locks<'a> {
        self.unlock_keys();
        Locks { keys: None, ..self }
    }

    fn unlock_keys(&self) {
        if let Some(mode) = self.keys {
            ffi::unlock_object(self.table.relid, KEYS, mode);
        }
    }
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
                  JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
                  JOIN pg_catalog.pg_am m ON m.oid = c.relam AND m.amname = 'btree'
                 WHERE i.indrelid = ANY($1) AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1
                   AND i.indpred IS NOT NULL AND a.attname = 'identity_key'";
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
