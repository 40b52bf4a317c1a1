//! Table `ir_async`: every statement on it. All run as the table's owner; each change of a job's state is notified in
//! the same transaction. Jobs wait and run in its children, by turns (`rotation`), and come into the table itself when they
//! have ended; a statement on it means the children too.

mod claims;
mod control;
mod endings;
mod enqueue;
mod identity;
mod outside;
mod overview;
mod rotation;

pub use claims::{
    Asked, Locked, Mark, Room, Work, company, count_due, lanes, left, lock_again, lock_first, lock_limits,
    lock_offered, processing, read, release, release_after, take, unlock_limits,
};
pub use control::{cancel, complete, retry, status};
pub use endings::{
    Failed, cancelled, died_unclaimed, fail, fail_at_once, give_back_one, give_back_others, given_up, runner_died,
    succeed, succeed_all, succeed_at_once,
};
pub use enqueue::{Model, New, enqueue, enqueue_all};
pub use outside::{begin, claim_outside, fail_outside, finish_outside, progress};
pub use overview::{prune, summary};
pub use rotation::{Position, empty_out, first, has_any_to_move, is_looked_into, live, size, tables, truncate};

use enqueue::as_own;

use super::datum::{JsonbText, Text};
use super::report::{Outcome, internal, report};
use super::sql;
use super::transaction::{along_indexes, as_owner, safely};
use super::{bus, catalog};
use crate::core::channel::Channel;
use crate::core::{json, template};
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Type of the notifications about jobs (SPEC section 8).
const NOTIFICATION: &str = "ir.async";

/// Of the table, what is locked besides its rows, by numbers. No statement locks that: whoever could, could keep everybody from
/// claiming.
/// By who counts jobs and claims.
const COUNTING: u16 = 1;
/// By who puts in a job with an identity_key: shared by imbus, exclusively by who does it by hand, whose row nobody looks back from.
const KEYS: u16 = 2;

/// A fencing token: 128 random bits in hexadecimal.
pub type Token = String;

/// The table of this database.
struct Table {
    relid: pg_sys::Oid,
    owner: pg_sys::Oid,
    /// The sequence that gives out its ids.
    sequence: pg_sys::Oid,
    /// Qualified and quoted.
    name: String,
    /// The name of `imbus_progress` beside it.
    progress: String,
    /// The tables in which jobs wait and run by turns: they inherit it.
    children: Vec<Child>,
    /// Its columns, quoted.
    columns: Vec<String>,
}

/// A table in which jobs wait and run.
#[derive(Clone)]
struct Child {
    relid: pg_sys::Oid,
    name: String,
}

/// A table that a job's row is in.
struct Place(String);

thread_local! {
    static FOUND: RefCell<Option<Rc<Table>>> = const { RefCell::new(None) };
    /// Its OID, for `changed`; 0 while it is not known, so that any table may be it.
    static WATCHED: Cell<Option<u32>> = const { Cell::new(None) };
    /// What was found out of it may be wrong by now.
    static STALE: Cell<bool> = const { Cell::new(false) };
    /// The state of the catalogs in which it was last seen to be called so.
    static NAMED: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
}

/// A table's definition has changed, or may have.
unsafe extern "C-unwind" fn changed(_argument: pg_sys::Datum, relid: pg_sys::Oid) {
    let is_it = |watched| watched == 0 || watched == u32::from(relid);
    if relid == pg_sys::InvalidOid || WATCHED.get().is_some_and(is_it) {
        STALE.set(true);
    }
}

fn table() -> Outcome<Rc<Table>> {
    let cached = FOUND.with_borrow(Option::clone).filter(|_| !STALE.get());
    let state = catalog::tables();
    let is_named_so = |table: &Rc<Table>| NAMED.get() == state || bus::name(table.relid).as_ref() == Some(&table.name);
    if let Some(table) = cached.filter(is_named_so) {
        NAMED.set(state);
        return Ok(table);
    }
    if WATCHED.replace(Some(0)).is_none() {
        // SAFETY: main thread, once in the life of a process; the callback touches its own flag only.
        unsafe { pg_sys::CacheRegisterRelcacheCallback(Some(changed), pg_sys::Datum::from(0)) };
    }
    STALE.set(false);
    let found = sql::as_of_now(|| safely(find))?;
    WATCHED.set(Some(found.as_ref().map_or(0, |table| u32::from(table.relid))));
    let found = found.map(Rc::new);
    FOUND.with_borrow_mut(|cell| cell.clone_from(&found));
    found.ok_or_else(|| {
        report(
            PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
            "table ir_async is missing",
            "The extension imbus is not installed in this database.",
            "Run CREATE EXTENSION imbus.",
        )
    })
}

fn find() -> Outcome<Option<Table>> {
    let text = "SELECT c.oid, c.relowner, pg_catalog.quote_ident(n.nspname) || '.ir_async',
                       pg_catalog.quote_ident(n.nspname) || '.imbus_progress',
                       pg_catalog.pg_get_serial_sequence(pg_catalog.quote_ident(n.nspname) || '.ir_async', 'id')
                           ::pg_catalog.regclass::oid
                  FROM pg_catalog.pg_extension e
                  JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
                  JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = 'ir_async'
                 WHERE e.extname = 'imbus'";
    let found = sql::first(text, &[], |row| {
        Ok(Table {
            relid: row.get(1)?.unwrap_or(pg_sys::InvalidOid),
            owner: row.get(2)?.unwrap_or(pg_sys::InvalidOid),
            name: row.text(3)?,
            progress: row.text(4)?,
            sequence: row.get(5)?.unwrap_or(pg_sys::InvalidOid),
            children: Vec::new(),
            columns: Vec::new(),
        })
    })?;
    let Some(mut table) = found else { return Ok(None) };
    // Imbus's own alone: another that inherits the table is looked into, but nothing is put there.
    let text = "SELECT i.inhrelid FROM pg_catalog.pg_inherits i
                  JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
                                             AND d.objid = i.inhrelid AND d.deptype = 'e'
                  JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid AND e.extname = 'imbus'
                 WHERE i.inhparent = $1 AND d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass ORDER BY 1";
    let children = sql::rows(text, &[table.relid.into()], |row| row.need::<pg_sys::Oid>(1))?;
    let named = |relid| Some(Child { relid, name: bus::name(relid)? });
    table.children = children.into_iter().filter_map(named).collect();
    let text = "SELECT pg_catalog.quote_ident(attname) FROM pg_catalog.pg_attribute
                 WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped ORDER BY attnum";
    table.columns = sql::rows(text, &[table.relid.into()], |row| row.text(1))?;
    Ok(Some(table))
}

/// What is put into the text of a statement: words, and the names that they stand for.
type Names<'a> = &'a [(&'a str, &'a str)];

/// Runs a statement on the table, along its indexes; `TABLE` in the text is its name, `PROGRESS` that of `imbus_progress`.
fn on_table<T>(text: &str, args: &[DatumWithOid<'_>], map: impl FnMut(&sql::Row) -> Outcome<T>) -> Outcome<Vec<T>> {
    on_named(text, &[], args, map)
}

/// The same with more names.
fn on_named<T>(
    text: &str,
    names: Names<'_>,
    args: &[DatumWithOid<'_>],
    map: impl FnMut(&sql::Row) -> Outcome<T>,
) -> Outcome<Vec<T>> {
    along_indexes(|| through_table(text, names, args, map))
}

/// Runs a statement that reads a whole table.
fn through_table<T>(
    text: &str,
    names: Names<'_>,
    args: &[DatumWithOid<'_>],
    map: impl FnMut(&sql::Row) -> Outcome<T>,
) -> Outcome<Vec<T>> {
    let table = table()?;
    let own = [("TABLE", table.name.as_str()), ("PROGRESS", table.progress.as_str())];
    let text = template::fill(text, &[&own[..], names].concat());
    as_owner(table.owner, [table.relid; 2], || sql::rows(&text, args, map))
}

/// The name of a table of jobs, qualified and quoted, as it is now.
fn name_of(relid: pg_sys::Oid) -> Outcome<String> {
    bus::name(relid).ok_or_else(|| internal("a table of jobs is gone"))
}

impl Place {
    /// Wherever the row is.
    fn anywhere() -> Outcome<Place> {
        Ok(Place(table()?.name.clone()))
    }

    /// This table alone, without any that inherits it.
    fn of(relid: pg_sys::Oid) -> Outcome<Place> {
        Ok(Place(format!("ONLY {}", name_of(relid)?)))
    }

    /// Does something where a claimed job was last seen, and if it is not there, wherever it is.
    fn find<T>(claimed: &Claimed, mut work: impl FnMut(&Place) -> Outcome<Option<T>>) -> Outcome<Option<T>> {
        if let Some(relid) = claimed.place
            && let Some(found) = work(&Place::of(relid)?)?
        {
            return Ok(Some(found));
        }
        work(&Place::anywhere()?)
    }

    /// `PLACE` in the text of a statement.
    fn name(&self) -> (&'static str, &str) {
        ("PLACE", &self.0)
    }
}

/// The payload of a notification about a change.
fn change(id: i64, name: Option<&str>, state: &str, payload: Option<&str>) -> String {
    let name = name.map_or_else(|| "null".to_owned(), json::string);
    let payload = payload.unwrap_or("null");
    format!(r#"{{"id":{id},"name":{name},"state":{},"payload":{payload}}}"#, json::string(state))
}

/// What a change returns, for its notification.
const CHANGED: &str = "j.id, j.name::text, j.state::text, j.payload, j.notify::text";

/// Makes a change and tells of it. Returns how many jobs changed.
fn change_and_tell(text: &str, names: Names<'_>, args: &[DatumWithOid<'_>]) -> Outcome<usize> {
    Ok(rows_changed(text, names, "NULL", args, |_, _| Ok(()))?.len())
}

/// Makes a change and tells of it. Returns what `map` makes of each changed job: its id is column 1, what `more` names
/// begins at the column that it is handed.
fn rows_changed<T>(
    text: &str,
    names: Names<'_>,
    more: &str,
    args: &[DatumWithOid<'_>],
    mut map: impl FnMut(&sql::Row, usize) -> Outcome<T>,
) -> Outcome<Vec<T>> {
    let mut told = Vec::new();
    let changed = on_named(&changing(text, more), names, args, |row| {
        told.extend(told_of(row)?);
        map(row, 6)
    })?;
    told.iter().try_for_each(|(channel, body)| tell(channel, body))?;
    Ok(changed)
}

/// Moves jobs and tells of it. Returns how many.
fn move_and_tell(text: &str, names: Names<'_>, args: &[DatumWithOid<'_>]) -> Outcome<usize> {
    let moved = as_own(|| on_named(&changing(text, "NULL"), names, args, told_of))?;
    moved.iter().flatten().try_for_each(|(channel, body)| tell(channel, body))?;
    Ok(moved.len())
}

fn changing(text: &str, more: &str) -> String {
    format!("{text} RETURNING {CHANGED}, {more}")
}

/// Of a changed job: its channel, if it has one, and what is to be said there.
fn told_of(row: &sql::Row) -> Outcome<Option<(String, String)>> {
    let Some(channel) = row.get::<Text>(5)? else { return Ok(None) };
    let (name, payload) = (row.get::<Text>(2)?, row.get::<JsonbText>(4)?);
    let name = name.as_ref().map(|text| text.0.as_str());
    let payload = payload.as_ref().map(|json| json.0.as_str());
    Ok(Some((channel.0, change(row.need(1)?, name, &row.text(3)?, payload))))
}

/// Tells of a change on the job's channel.
fn tell(channel: &str, body: &str) -> Outcome<()> {
    if let Some(channel) = stored_channel(channel)? {
        bus::publish(&channel, NOTIFICATION, body)?;
    }
    Ok(())
}

/// A channel as it is stored; under a former name of the database it is today's.
pub fn stored_channel(stored: &str) -> Outcome<Option<Channel>> {
    let Some(elements) = json::elements(stored)? else { return Ok(None) };
    let database = bus::table()?.database;
    let rest = elements.get(1..).unwrap_or_default().join(",");
    Ok(Some(Channel::from_row(&format!("[{},{rest}]", json::string(&database)), &database)?))
}

/// A claimed job.
#[derive(Clone)]
pub struct Claimed {
    pub id: i64,
    pub token: Token,
    /// The table that it was claimed in, if that is known; it may have been moved since.
    pub place: Option<pg_sys::Oid>,
}

/// A new one.
pub fn new_token() -> Outcome<Token> {
    let mut bytes = [0u8; 16];
    // SAFETY: fills exactly 16 bytes.
    let random = unsafe { pg_sys::pg_strong_random(bytes.as_mut_ptr().cast(), bytes.len()) };
    if !random {
        return Err(internal("could not make random bytes"));
    }
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
