//! The bus table: which one it is, and how it is published to. Statements on it run as the table's owner (SPEC
//! section 11); those of the workers are in `rows`.

use super::datum::Text;
use super::report::{Outcome, report};
use super::transaction::{in_passing, safely};
use super::{guc, listen, ring, shared, sql};
use crate::core::channel::Channel;
use crate::core::json;
use pgrx::prelude::*;
use std::cell::RefCell;
use std::ffi::CStr;

mod insert;
mod rows;
pub use rows::{Moved, RawRow, Scope, retention};

/// The bus table of this database, or a table that might be it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bus {
    relid: pg_sys::Oid,
    owner: pg_sys::Oid,
    /// Qualified and quoted.
    name: String,
    /// The database's name, in front of every channel.
    pub database: String,
    /// The sequence that gives out its ids.
    sequence: pg_sys::Oid,
    /// Qualified and quoted, empty when there is none.
    sequence_name: String,
    /// Odoo's `public.bus_bus` rather than imbus's own table.
    pub is_odoo: bool,
}

/// Ids left out when the bus moves to another table, for those who have one from the old table still in hand.
const MARGIN: i64 = 1000;

/// The table in force, and what was true when it was looked up.
#[derive(Clone)]
struct Found {
    bus: Bus,
    /// Whatever is called public.bus_bus, and its owner.
    odoo: (pg_sys::Oid, pg_sys::Oid),
    database_owner: pg_sys::Oid,
}

thread_local! {
    static FOUND: RefCell<Option<Found>> = const { RefCell::new(None) };
}

/// The tables that may be the bus: imbus's own, and Odoo's `public.bus_bus` when it is an ordinary table with Odoo's
/// columns, owned by the owner of the database or of the extension.
const CANDIDATES: &str = "
    SELECT c.oid, c.relowner, pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname),
           pg_catalog.current_database()::text, s.oid,
           pg_catalog.quote_ident(sn.nspname) || '.' || pg_catalog.quote_ident(s.relname), c.relname = 'bus_bus'
      FROM pg_catalog.pg_class c
      JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
      JOIN pg_catalog.pg_extension e ON e.extname = 'imbus'
      JOIN pg_catalog.pg_database d ON d.datname = pg_catalog.current_database()
      LEFT JOIN pg_catalog.pg_attribute i ON i.attrelid = c.oid AND i.attname = 'id' AND NOT i.attisdropped
      LEFT JOIN pg_catalog.pg_depend p ON p.refobjid = c.oid AND p.refobjsubid = i.attnum
                                      AND p.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
                                      AND p.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
                                      AND p.deptype IN ('a', 'i')
      LEFT JOIN pg_catalog.pg_class s ON s.oid = p.objid AND s.relkind = 'S'
      LEFT JOIN pg_catalog.pg_namespace sn ON sn.oid = s.relnamespace
     WHERE c.relkind = 'r' AND c.relpersistence <> 't'
       AND (   (n.nspname = 'public' AND c.relname = 'bus_bus'
                AND c.relowner IN (d.datdba, e.extowner)
                AND (SELECT count(*) FROM pg_catalog.pg_attribute a
                      WHERE a.attrelid = c.oid AND NOT a.attisdropped AND a.attnum > 0
                        AND (   a.attname = 'id' AND a.atttypid IN (20, 23)
                             OR a.attname IN ('channel', 'message') AND a.atttypid IN (25, 1043)
                             OR a.attname IN ('create_date', 'write_date') AND a.atttypid = 1114
                             OR a.attname IN ('create_uid', 'write_uid') AND a.atttypid = 23)) = 7)
            OR (c.relname = 'imbus_bus' AND c.relnamespace = e.extnamespace))
     ORDER BY s.oid IS NULL";

/// The tables that exist now, whatever the transaction's snapshot: imbus's own and, when it may be used, Odoo's. Errors 42P01
/// without the extension.
pub fn candidates() -> Outcome<(Bus, Option<Bus>)> {
    let found = sql::as_of_now(|| {
        safely(|| {
            sql::rows(CANDIDATES, &[], |row| {
                Ok(Bus {
                    relid: row.get(1)?.unwrap_or(pg_sys::InvalidOid),
                    owner: row.get(2)?.unwrap_or(pg_sys::InvalidOid),
                    name: row.text(3)?,
                    database: row.text(4)?,
                    sequence: row.get(5)?.unwrap_or(pg_sys::InvalidOid),
                    sequence_name: row.text(6)?,
                    is_odoo: row.need(7)?,
                })
            })
        })
    })?;
    let own = found.iter().find(|bus| !bus.is_odoo).cloned();
    let odoo = found.into_iter().find(|bus| bus.is_odoo);
    let own = own.ok_or_else(|| {
        report(
            PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
            "the bus table is missing",
            "There is no table imbus_bus.",
            "Run CREATE EXTENSION imbus.",
        )
    })?;
    Ok((own, odoo))
}

/// The bus table: Odoo's as soon as it is there, else imbus's own. Whoever finds a table that has just come into force
/// sees to it that its ids go on above all that were given out.
pub fn table() -> Outcome<Bus> {
    let known = FOUND.with_borrow(Clone::clone);
    if let Some(found) = known.filter(still_right) {
        return Ok(found.bus);
    }
    let (odoo, database_owner) = (odoo_now(), database_owner());
    let (own, candidate) = candidates()?;
    let bus = candidate.unwrap_or_else(|| own.clone());
    bus.go_on_from(&own)?;
    FOUND.set(Some(Found { bus: bus.clone(), odoo, database_owner }));
    Ok(bus)
}

/// Whatever is called public.bus_bus, with its owner: by system caches alone, as it is asked for every message.
fn odoo_now() -> (pg_sys::Oid, pg_sys::Oid) {
    // SAFETY: cache look-ups inside a transaction.
    let relid = unsafe {
        let public = pg_sys::get_namespace_oid(c"public".as_ptr(), true);
        pg_sys::get_relname_relid(c"bus_bus".as_ptr(), public)
    };
    (relid, owner(relid).unwrap_or(pg_sys::InvalidOid))
}

/// The owner of a relation, if it exists.
pub fn owner(relid: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: a cache look-up inside a transaction; the tuple is released before it is left.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::RELOID as i32, relid.into());
        if tuple.is_null() {
            return None;
        }
        let owner = (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_class>()).relowner;
        pg_sys::ReleaseSysCache(tuple);
        Some(owner)
    }
}

/// The qualified name of a table.
pub fn name(relid: pg_sys::Oid) -> Option<String> {
    // SAFETY: cache look-ups inside a transaction; the names are palloc'd copies.
    unsafe {
        let (schema, table) =
            (pg_sys::get_namespace_name(pg_sys::get_rel_namespace(relid)), pg_sys::get_rel_name(relid));
        if schema.is_null() || table.is_null() {
            return None;
        }
        let name = CStr::from_ptr(pg_sys::quote_qualified_identifier(schema, table)).to_string_lossy().into_owned();
        pg_sys::pfree(schema.cast());
        pg_sys::pfree(table.cast());
        Some(name)
    }
}

/// The owner of this database.
fn database_owner() -> pg_sys::Oid {
    // SAFETY: a cache look-up inside a transaction; the tuple is released before it is left.
    unsafe {
        let tuple =
            pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::DATABASEOID as i32, pg_sys::MyDatabaseId.into());
        if tuple.is_null() {
            return pg_sys::InvalidOid;
        }
        let owner = (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_database>()).datdba;
        pg_sys::ReleaseSysCache(tuple);
        owner
    }
}

/// Whether the table found is what `table` would find again.
fn still_right(found: &Found) -> bool {
    found.odoo == odoo_now()
        && found.database_owner == database_owner()
        && owner(found.bus.relid) == Some(found.bus.owner)
        && name(found.bus.relid).as_ref() == Some(&found.bus.name)
}

/// INSERT as the table's owner, with whatever triggers and rules a user has put on the table.
fn insert_by_sql(bus: &Bus, channel: &str, message: String) -> Outcome<i64> {
    let insert = format!(
        "INSERT INTO {} (channel, message, create_date, write_date)
         VALUES ($1, $2, pg_catalog.now() AT TIME ZONE 'UTC', pg_catalog.now() AT TIME ZONE 'UTC') RETURNING id::bigint",
        bus.name
    );
    let args = [Text(channel.to_owned()).into(), Text(message).into()];
    bus.as_owner(|| sql::first(&insert, &args, |row| row.need::<i64>(1)))?.ok_or_else(|| {
        report(
            PgSqlErrorCode::ERRCODE_TRIGGERED_ACTION_EXCEPTION,
            "the notification was not stored",
            &format!("A trigger on {} suppressed it.", bus.name),
            "",
        )
    })
}

/// Publishes in the current transaction: the id of the new row.
///
/// `kind` is the notification's type, `payload` its payload as JSON text.
pub fn publish(channel: &Channel, kind: &str, payload: &str) -> Outcome<i64> {
    let bus = table()?;
    let message = format!(r#"{{"type":{},"payload":{}}}"#, json::string(kind), json::compact(payload)?);
    let stored = channel.stored(&bus.database);
    let id = match insert::insert(&bus, &stored, &message)? {
        Some(id) => id,
        None => insert_by_sql(&bus, &stored, message)?,
    };
    if shared::get().is_some() {
        // Where the table has its trigger, that has noted the id already.
        if !ring::is_noted(id) {
            ring::note(id);
        }
    } else if guc::emit_notify() {
        // Without workers only listeners of this very database can be told; the limit is as in `imbus_notify`.
        for part in crate::core::payload::split(&format!("[{stored}]"), guc::notify_payload_max_length())? {
            listen::notify("imbus", &part);
        }
    }
    Ok(id)
}

impl Bus {
    /// Has the ids of this table go on above those that another bus table of this database has given out; `own` is
    /// imbus's own table. Nothing to do in most cases, nothing that can be done in a read-only transaction.
    fn go_on_from(&self, own: &Bus) -> Outcome<()> {
        let others = || -> Outcome<i64> {
            if self.is_odoo {
                return Ok(own.last_drawn()?.unwrap_or(0));
            }
            // A transaction's older snapshot may not have the last bookmark of the table that is gone.
            let newest = sql::as_of_now(|| own.last_bookmarked())?.filter(|(table, _)| *table != own.relid);
            Ok(newest.map_or(0, |(_, high)| high))
        };
        // SAFETY: a plain setting of the session.
        let read_only = unsafe { pg_sys::XactReadOnly || pg_sys::RecoveryInProgress() };
        if read_only || self.last_drawn()?.is_none_or(|last| last >= others().unwrap_or(0)) {
            return Ok(());
        }
        // One at a time, or a sequence could be set back.
        in_passing(|| {
            // SAFETY: inside a transaction; nobody else has the right to this lock on imbus's own table.
            unsafe { pg_sys::LockRelationOid(own.relid, pg_sys::ShareUpdateExclusiveLock as pg_sys::LOCKMODE) };
            let others = others()?;
            let limit = if self.is_narrow()? { i64::from(i32::MAX) } else { i64::MAX };
            if others > self.last_drawn()?.unwrap_or(i64::MAX) && others < limit - MARGIN {
                self.advance(others + MARGIN)?;
            }
            Ok(())
        })
    }

    /// Table `imbus_bookmark`, which stands beside imbus's own bus table.
    pub fn bookmarks(&self) -> String {
        format!("{}bookmark", self.name.strip_suffix("bus").unwrap_or(&self.name))
    }
}
