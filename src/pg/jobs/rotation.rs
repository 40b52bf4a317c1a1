//! What `core::rotation` asks for, done: jobs are moved out of a table that they have filled with dead rows, and the table is
//! truncated. Statements on `ir_async` mean its children too, and take their snapshot once they have the locks on all of
//! them, so that each sees a job exactly once.

use super::{Table, on_named, table, through_table};
use crate::core::rotation::Done;
use crate::pg::report::{Outcome, internal};
use crate::pg::transaction::{as_owner, safely, set_local};
use crate::pg::{ffi, shared, sql, worker};
use pgrx::datum::TimestampWithTimeZone;
use pgrx::prelude::*;
use std::time::Duration;

/// Jobs moved in one transaction: whoever ends one of this table waits for that.
const MOVED: i64 = 2_000;
/// How long a snapshot that may be used to look into an emptied table keeps it from being truncated. Who looks at the jobs for
/// the first time with an older one may miss some that were moved or have ended since.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether a job is moved.
const MOVES: &str = "(finished_at IS NOT NULL OR state = 'created' OR session IS NULL AND res_model IS NULL)";

/// The table that new jobs go to; None where there is none besides `ir_async`.
pub(super) fn filling(table: &Table) -> Option<pg_sys::Oid> {
    // SAFETY: a plain global.
    let database = u32::from(unsafe { pg_sys::MyDatabaseId });
    let slot = shared::get().and_then(|shared| shared.database(database));
    let place = slot.map_or(0, shared::DatabaseSlot::filling);
    table.children.get(place).or(table.children.first()).map(|child| child.relid)
}

/// How many of these tables there are.
pub fn tables() -> Outcome<usize> {
    Ok(table()?.children.len())
}

/// The size of a table in bytes.
pub fn size(place: usize) -> Outcome<u64> {
    let table = table()?;
    let Some(child) = table.children.get(place) else { return Ok(0) };
    let text = "SELECT pg_catalog.pg_relation_size($1)";
    Ok(safely(|| sql::first(text, &[child.relid.into()], |row| row.need::<i64>(1)))?.map_or(0, i64::unsigned_abs))
}

/// How much of it lives, in bytes, more or less, and how many jobs these are. Reads the whole table.
pub fn live(place: usize) -> Outcome<(u64, u64)> {
    let table = table()?;
    let Some(child) = table.children.get(place) else { return Ok((0, 0)) };
    // Without looking at what is stored apart.
    let text = "SELECT COALESCE(pg_catalog.sum(200 + LEAST(pg_catalog.pg_column_size(args), 2000)
                                                   + LEAST(pg_catalog.pg_column_size(kwargs), 2000)), 0)::bigint,
                       pg_catalog.count(*)
                  FROM ONLY CHILD";
    let read = |row: &sql::Row| Ok((row.need::<i64>(1)?.unsigned_abs(), row.need::<i64>(2)?.unsigned_abs()));
    Ok(through_table(text, &[("CHILD", &child.name)], &[], read)?.into_iter().next().unwrap_or_default())
}

/// Where in a table to go on.
pub type Position = pg_sys::ItemPointerData;

/// The first job that lives in a table, from a position on.
pub fn first(place: usize, from: Option<Position>) -> Outcome<Option<Position>> {
    let table = table()?;
    let Some(child) = table.children.get(place) else { return Ok(None) };
    let text = "SELECT ctid FROM ONLY CHILD WHERE ctid >= $1 LIMIT 1";
    let found =
        on_named(text, &[("CHILD", &child.name)], &[from.unwrap_or_default().into()], |row| row.get::<Position>(1))?;
    Ok(found.into_iter().next().flatten())
}

/// Whether anything is to be moved out of a table.
pub fn has_any_to_move(place: usize) -> Outcome<bool> {
    let table = table()?;
    let Some(child) = table.children.get(place) else { return Ok(false) };
    let text = "SELECT EXISTS (SELECT FROM ONLY CHILD WHERE MOVES)";
    let found = through_table(text, &[("CHILD", &child.name), ("MOVES", MOVES)], &[], |row| row.need::<bool>(1))?;
    Ok(found.into_iter().next().unwrap_or(false))
}

/// Moves jobs out of a table, from a position on or from its beginning: what waits or runs into the one that fills, what has
/// ended to its like. Those that Odoo or a runner outside works on stay until they have ended: their runners may look at
/// them by a snapshot of theirs. With what was done comes where to go on. Errors: 55P03.
pub fn empty_out(place: usize, after: Option<Position>) -> Outcome<(Done, Option<Position>)> {
    let table = table()?;
    let (Some(from), Some(to)) = (table.children.get(place), filling(&table)) else { return Ok((Done::All, None)) };
    let Some(to) = table.children.iter().find(|child| child.relid == to) else { return Ok((Done::All, None)) };
    lock(from.relid, pg_sys::ExclusiveLock);
    // A table that is full of dead rows is read as few times as can be.
    let text = "WITH s AS MATERIALIZED (
             SELECT ctid AS place, MOVES AS moves FROM ONLY CHILD WHERE ctid > $1 LIMIT $2),
         g AS (DELETE FROM ONLY CHILD j USING s WHERE j.ctid = s.place AND s.moves RETURNING j.*),
         ended AS (INSERT INTO TABLE (COLUMNS) SELECT COLUMNS FROM g WHERE finished_at IS NOT NULL),
         waiting AS (INSERT INTO NEXT (COLUMNS) SELECT COLUMNS FROM g WHERE finished_at IS NULL)
         SELECT (SELECT pg_catalog.count(*) FROM s), (SELECT pg_catalog.count(*) FROM g), (SELECT pg_catalog.max(place) FROM s)";
    let columns = table.columns.join(", ");
    let names =
        [("MOVES", MOVES), ("CHILD", from.name.as_str()), ("COLUMNS", columns.as_str()), ("NEXT", to.name.as_str())];
    let args = [after.unwrap_or_default().into(), MOVED.into()];
    let read = |row: &sql::Row| Ok((row.need::<i64>(1)?, row.need::<i64>(2)?, row.get::<Position>(3)?));
    let found = super::as_own(|| on_named(text, &names, &args, read))?;
    let (seen, moved, last) = found.into_iter().next().unwrap_or((0, 0, None));
    Ok(match () {
        () if seen == MOVED => (Done::Some, last),
        // Once more from the beginning.
        () if after.is_some() => (Done::Some, None),
        () if seen == moved => (Done::All, None),
        () => (Done::Nothing, None),
    })
}

/// Whether somebody may still look for jobs in a table that was emptied at this time, in microseconds since 2000, by a snapshot
/// from before. Not for longer than `PATIENCE`; and who has been idle for that long in a transaction is not waited for.
pub fn is_looked_into(emptied: i64) -> Outcome<bool> {
    if worker::now() - emptied > PATIENCE.as_micros() as i64 {
        return Ok(false);
    }
    let text = "SELECT EXISTS (SELECT FROM pg_catalog.pg_stat_get_activity(NULL) a
                                WHERE a.datid = (SELECT oid FROM pg_catalog.pg_database
                                                  WHERE datname = pg_catalog.current_database())
                                  AND a.pid <> pg_catalog.pg_backend_pid() AND a.backend_xmin IS NOT NULL
                                  AND a.xact_start <= $1
                                  AND (a.state <> 'idle in transaction' OR a.xact_start > $2))";
    let emptied = TimestampWithTimeZone::try_from(emptied).map_err(internal)?;
    let recent = TimestampWithTimeZone::try_from(worker::now() - PATIENCE.as_micros() as i64).map_err(internal)?;
    let table = table()?;
    let found = as_owner(table.owner, [table.relid; 2], || {
        sql::first(text, &[emptied.into(), recent.into()], |row| row.need::<bool>(1))
    });
    Ok(found?.unwrap_or(false))
}

/// Truncates a table in which nothing lives, as TRUNCATE does, but by its OID. Errors: 55P03.
pub fn truncate(place: usize) -> Outcome<Done> {
    let table = table()?;
    let Some(child) = table.children.get(place) else { return Ok(Done::All) };
    lock(child.relid, pg_sys::AccessExclusiveLock);
    if first(place, None)?.is_some() {
        return Ok(Done::Some);
    }
    ffi::truncate(child.relid);
    Ok(Done::All)
}

/// Locks a table by its OID, and has nothing in this transaction wait for long: others wait behind it.
fn lock(relid: pg_sys::Oid, mode: u32) {
    set_local(c"lock_timeout", c"50ms");
    // SAFETY: inside a transaction; the lock is kept until its end.
    unsafe { pg_sys::LockRelationOid(relid, mode as pg_sys::LOCKMODE) };
}
