//! Table `ir_async`: every statement on it. All run as the table's owner; each change of a job's state is notified in
//! the same transaction.

mod claims;
mod control;
mod endings;
mod enqueue;
mod outside;
mod overview;

pub use claims::{
    Locked, Mark, Room, Work, company, count_due, lanes, left, lock, lock_first, lock_limits, lock_offered, processing,
    release, take,
};
pub use control::{cancel, complete, retry, status};
pub use endings::{Failed, cancelled, fail, give_back_others, given_up, runner_died, succeed, succeed_all};
pub use enqueue::{Model, New, enqueue, enqueue_all};
pub use outside::{begin, claim_outside, fail_outside, finish_outside, progress};
pub use overview::{prune, summary};

use super::bus;
use super::datum::{JsonbText, Text};
use super::report::{Outcome, internal, report};
use super::sql;
use super::transaction::{as_owner, safely};
use crate::core::channel::Channel;
use crate::core::json;
use pgrx::datum::DatumWithOid;
use pgrx::prelude::*;
use std::cell::RefCell;

/// Type of the notifications about jobs (SPEC section 8).
const NOTIFICATION: &str = "ir.async";

/// A fencing token: 128 random bits in hexadecimal.
pub type Token = String;

/// The table of this database.
#[derive(Clone)]
struct Table {
    relid: pg_sys::Oid,
    owner: pg_sys::Oid,
    /// The sequence that gives out its ids.
    sequence: pg_sys::Oid,
    /// Qualified and quoted.
    name: String,
    /// The name of `imbus_progress` beside it.
    progress: String,
}

thread_local! {
    static FOUND: RefCell<Option<Table>> = const { RefCell::new(None) };
}

fn table() -> Outcome<Table> {
    let cached = FOUND.with(|found| found.borrow().clone());
    if let Some(table) = cached.filter(|table| bus::name(table.relid).as_ref() == Some(&table.name)) {
        return Ok(table);
    }
    let text = "SELECT c.oid, c.relowner, pg_catalog.quote_ident(n.nspname) || '.ir_async',
                       pg_catalog.quote_ident(n.nspname) || '.imbus_progress',
                       pg_catalog.pg_get_serial_sequence(pg_catalog.quote_ident(n.nspname) || '.ir_async', 'id')
                           ::pg_catalog.regclass::oid
                  FROM pg_catalog.pg_extension e
                  JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
                  JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = 'ir_async'
                 WHERE e.extname = 'imbus'";
    let found = safely(|| {
        sql::first(text, &[], |row| {
            Ok(Table {
                relid: row.get(1)?.unwrap_or(pg_sys::InvalidOid),
                owner: row.get(2)?.unwrap_or(pg_sys::InvalidOid),
                name: row.text(3)?,
                progress: row.text(4)?,
                sequence: row.get(5)?.unwrap_or(pg_sys::InvalidOid),
            })
        })
    })?;
    FOUND.with(|cell| cell.borrow_mut().clone_from(&found));
    found.ok_or_else(|| {
        report(
            PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
            "table ir_async is missing",
            "The extension imbus is not installed in this database.",
            "Run CREATE EXTENSION imbus.",
        )
    })
}

/// Runs a statement on the table; `TABLE` in the text is its name, `PROGRESS` that of `imbus_progress`.
fn on_table<T>(text: &str, args: &[DatumWithOid<'_>], map: impl FnMut(&sql::Row) -> Outcome<T>) -> Outcome<Vec<T>> {
    let table = table()?;
    let text = text.replace("TABLE", &table.name).replace("PROGRESS", &table.progress);
    as_owner(table.owner, [table.relid; 2], || sql::rows(&text, args, map))
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
fn change_and_tell(text: &str, args: &[DatumWithOid<'_>]) -> Outcome<usize> {
    Ok(rows_changed(text, "NULL", args, |_, _| Ok(()))?.len())
}

/// Makes a change and tells of it. Returns what `map` makes of each changed job: its id is column 1, what `more` names
/// begins at the column that it is handed.
fn rows_changed<T>(
    text: &str,
    more: &str,
    args: &[DatumWithOid<'_>],
    mut map: impl FnMut(&sql::Row, usize) -> Outcome<T>,
) -> Outcome<Vec<T>> {
    let text = format!("{text} RETURNING {CHANGED}, {more}");
    let mut told = Vec::new();
    let changed = on_table(&text, args, |row| {
        if let Some(channel) = row.get::<Text>(5)? {
            let (name, payload) = (row.get::<Text>(2)?, row.get::<JsonbText>(4)?);
            let name = name.as_ref().map(|text| text.0.as_str());
            let payload = payload.as_ref().map(|json| json.0.as_str());
            told.push((channel.0, change(row.need(1)?, name, &row.text(3)?, payload)));
        }
        map(row, 6)
    })?;
    for (channel, body) in &told {
        tell(channel, body)?;
    }
    Ok(changed)
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
