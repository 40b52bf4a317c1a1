//! The bus table: which one it is, and every statement on it. All of them run as the table's owner (SPEC section 11).

use super::datum::Text;
use super::guc;
use super::report::{Outcome, report};
use super::sql;
use super::transaction::{as_owner, safely};
use super::{listen, shared, wake};
use crate::core::channel::Channel;
use crate::core::json;
use crate::core::position::Range;
use pgrx::prelude::*;
use std::cell::RefCell;

/// How far `last = 0` reaches back, in seconds (Odoo's `_poll`: its TIMEOUT of 50 s).
const RECENT: i64 = 50;
/// Rows deleted in one transaction of the worker's garbage collection.
const GC_BATCH: i64 = 10_000;

/// The bus table of this database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bus {
    relid: pg_sys::Oid,
    owner: pg_sys::Oid,
    /// Qualified and quoted.
    name: String,
    /// The database's name, in front of every channel.
    pub database: String,
}

/// A row as it stands, not yet trusted.
#[derive(Debug)]
pub struct RawRow {
    pub id: i64,
    pub channel: Option<String>,
    pub message: Option<String>,
    /// Published by imbus rather than by Odoo's ORM (which fills create_uid).
    pub own: bool,
    /// The transaction that wrote it.
    pub xmin: String,
}

thread_local! {
    static FOUND: RefCell<Option<Bus>> = const { RefCell::new(None) };
}

/// Odoo's `public.bus_bus` when it is an ordinary table with Odoo's columns, owned by the owner of the database or of
/// the extension; else imbus's own.
const FIND: &str = "
    SELECT c.oid, c.relowner, pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname),
           pg_catalog.current_database()::text
      FROM pg_catalog.pg_class c
      JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
      JOIN pg_catalog.pg_extension e ON e.extname = 'imbus'
      JOIN pg_catalog.pg_database d ON d.datname = pg_catalog.current_database()
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
     ORDER BY c.relname = 'bus_bus' DESC LIMIT 1";

/// The bus table; found again whenever Odoo's table has come, gone or changed hands. Errors 42P01 without extension.
pub fn table() -> Outcome<Bus> {
    let cached = FOUND.with(|found| found.borrow().clone());
    if let Some(bus) = cached.filter(still_right) {
        return Ok(bus);
    }
    let found = safely(|| {
        sql::first(FIND, &[], |row| {
            Ok(Bus {
                relid: row.get(1)?.unwrap_or(pg_sys::InvalidOid),
                owner: row.get(2)?.unwrap_or(pg_sys::InvalidOid),
                name: row.text(3)?,
                database: row.text(4)?,
            })
        })
    })?;
    FOUND.with(|cell| cell.borrow_mut().clone_from(&found));
    found.ok_or_else(|| {
        report(
            PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
            "the bus table is missing",
            "There is neither public.bus_bus nor imbus_bus.",
            "Run CREATE EXTENSION imbus.",
        )
    })
}

/// Whether the cached table is what `table` would find: by system caches alone, as it is asked for every message.
fn still_right(bus: &Bus) -> bool {
    // SAFETY: cache look-ups inside a transaction; the tuple is released before it is left.
    unsafe {
        let public = pg_sys::get_namespace_oid(c"public".as_ptr(), true);
        let odoo = pg_sys::get_relname_relid(c"bus_bus".as_ptr(), public);
        if odoo != pg_sys::InvalidOid && odoo != bus.relid {
            return false;
        }
        let tuple = pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::RELOID as i32, bus.relid.into());
        if tuple.is_null() {
            return false;
        }
        let class = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_class>();
        let owner = (*class).relowner;
        pg_sys::ReleaseSysCache(tuple);
        owner == bus.owner
    }
}

/// Publishes in the current transaction: the id of the new row.
///
/// `kind` is the notification's type, `payload` its payload as JSON text.
pub fn publish(channel: &Channel, kind: &str, payload: &str) -> Outcome<i64> {
    let bus = table()?;
    let message = format!(r#"{{"type":{},"payload":{}}}"#, json::string(kind), json::compact(payload)?);
    let stored = channel.stored(&bus.database);
    let insert = format!(
        "INSERT INTO {} (channel, message, create_date, write_date)
         VALUES ($1, $2, pg_catalog.now() AT TIME ZONE 'UTC', pg_catalog.now() AT TIME ZONE 'UTC') RETURNING id::bigint",
        bus.name
    );
    let args = [Text(stored.clone()).into(), Text(message).into()];
    let id = as_owner(bus.owner, || sql::first(&insert, &args, |row| row.need::<i64>(1)))?;
    if shared::get().is_some() {
        wake::published();
    } else if guc::emit_notify() {
        // Without workers only listeners of this very database can be told; the limit is as in `imbus_notify`.
        for part in crate::core::payload::split(&format!("[{stored}]"), guc::notify_payload_max_length())? {
            listen::notify("imbus", &part);
        }
    }
    id.ok_or_else(|| {
        report(
            PgSqlErrorCode::ERRCODE_TRIGGERED_ACTION_EXCEPTION,
            "the notification was not stored",
            &format!("A trigger on {} suppressed it.", bus.name),
            "",
        )
    })
}

fn raw(row: &sql::Row<'_>) -> Outcome<RawRow> {
    Ok(RawRow {
        id: row.need(1)?,
        channel: row.get::<Text>(2)?.map(|text| text.0),
        message: row.get::<Text>(3)?.map(|text| text.0),
        own: row.need(4)?,
        xmin: row.text(5)?,
    })
}

const COLUMNS: &str = "id::bigint, channel::text, message::text, create_uid IS NULL, xmin::text";

impl Bus {
    /// OID of the table.
    pub fn oid(&self) -> u32 {
        self.relid.into()
    }

    fn select(&self, condition: &str, args: &[pgrx::datum::DatumWithOid<'_>]) -> Outcome<Vec<RawRow>> {
        let text = format!("SELECT {COLUMNS} FROM {} WHERE {condition}", self.name);
        as_owner(self.owner, || sql::rows(&text, args, raw))
    }

    /// The first `limit` visible rows above `high`, ascending: one range of the primary key.
    pub fn above(&self, high: i64, limit: i64) -> Outcome<Vec<RawRow>> {
        self.select("id > $1 ORDER BY id LIMIT $2", &[high.into(), limit.into()])
    }

    /// Which rows with ids in these ranges (inclusive) are visible now, ascending.
    pub fn within(&self, ranges: &[Range]) -> Outcome<Vec<RawRow>> {
        if ranges.is_empty() {
            return Ok(Vec::new());
        }
        let (low, high): (Vec<i64>, Vec<i64>) = ranges.iter().copied().unzip();
        let condition = "id IN (SELECT b.id FROM ROWS FROM (pg_catalog.unnest($1::bigint[]), pg_catalog.unnest($2::bigint[])) r (low, high)
                                 CROSS JOIN LATERAL (SELECT i.id FROM TABLE i WHERE i.id BETWEEN r.low AND r.high) b)
                         ORDER BY id";
        self.select(&condition.replace("TABLE", &self.name), &[low.into(), high.into()])
    }

    /// Which of these rows are visible now, ascending.
    pub fn among(&self, ids: &[i64]) -> Outcome<Vec<RawRow>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        self.select("id = ANY($1) ORDER BY id", &[ids.to_vec().into()])
    }

    /// Odoo's `_poll`: the last 50 s when `last` is 0, else everything above it, ascending.
    pub fn since(&self, last: i64) -> Outcome<Vec<RawRow>> {
        if last == 0 {
            let recent = "create_date > (pg_catalog.clock_timestamp() AT TIME ZONE 'UTC')
                          - pg_catalog.make_interval(secs => $1) ORDER BY id";
            return self.select(recent, &[(RECENT as f64).into()]);
        }
        self.select("id > $1 ORDER BY id", &[last.into()])
    }

    /// The greatest visible id, 0 when the table is empty.
    pub fn last_id(&self) -> Outcome<i64> {
        let text = format!("SELECT COALESCE(max(id), 0)::bigint FROM {}", self.name);
        Ok(as_owner(self.owner, || sql::first(&text, &[], |row| row.need(1)))?.unwrap_or(0))
    }

    /// Whether a row with this id is visible.
    pub fn has(&self, id: i64) -> Outcome<bool> {
        let text = format!("SELECT true FROM {} WHERE id = $1", self.name);
        Ok(as_owner(self.owner, || sql::first(&text, &[id.into()], |_| Ok(())))?.is_some())
    }

    /// The visible ids above `low`, ascending.
    pub fn ids_above(&self, low: i64) -> Outcome<Vec<i64>> {
        let text = format!("SELECT id::bigint FROM {} WHERE id > $1 ORDER BY id", self.name);
        as_owner(self.owner, || sql::rows(&text, &[low.into()], |row| row.need(1)))
    }

    /// The greatest id of a row older than `seconds`, 0 when there is none.
    pub fn last_id_before(&self, seconds: f64) -> Outcome<i64> {
        let text = format!(
            "SELECT COALESCE(max(id), 0)::bigint FROM {} WHERE create_date < (pg_catalog.clock_timestamp()
                    AT TIME ZONE 'UTC') - pg_catalog.make_interval(secs => $1)",
            self.name
        );
        Ok(as_owner(self.owner, || sql::first(&text, &[seconds.into()], |row| row.need(1)))?.unwrap_or(0))
    }

    /// Deletes rows older than `seconds`: how many. With `batch`, only the oldest few, for the worker.
    pub fn gc(&self, seconds: f64, batch: bool) -> Outcome<i64> {
        let limit = if batch { GC_BATCH } else { i64::MAX };
        let text = format!(
            "DELETE FROM {0} WHERE id IN (
                SELECT id FROM {0} WHERE create_date < (pg_catalog.clock_timestamp() AT TIME ZONE 'UTC')
                       - pg_catalog.make_interval(secs => $1) ORDER BY id LIMIT $2)",
            self.name
        );
        let deleted = as_owner(self.owner, || sql::execute(&text, &[seconds.into(), limit.into()]))?;
        Ok(i64::try_from(deleted).unwrap_or(i64::MAX))
    }
}

/// The retention in seconds: Odoo's `bus.gc_retention_seconds` where there is an Odoo, else `imbus.gc_retention`.
pub fn retention() -> Outcome<f64> {
    let find = "SELECT c.relowner FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
          WHERE n.nspname = 'public' AND c.relname = 'ir_config_parameter' AND c.relkind = 'r'
            AND (SELECT count(*) FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND NOT a.attisdropped
                  AND a.attname IN ('key', 'value') AND a.atttypid IN (25, 1043)) = 2";
    let owner = safely(|| sql::first(find, &[], |row| row.get::<pg_sys::Oid>(1)))?.flatten();
    let Some(owner) = owner else { return Ok(guc::gc_retention() as f64) };
    let text = "SELECT value::text FROM public.ir_config_parameter WHERE key = 'bus.gc_retention_seconds'";
    let value = as_owner(owner, || sql::first(text, &[], |row| row.get::<Text>(1)))?.flatten();
    let seconds = value.and_then(|text| text.0.trim().parse::<f64>().ok());
    Ok(seconds.filter(|s| s.is_finite() && *s >= 0.0).unwrap_or(guc::gc_retention() as f64))
}
