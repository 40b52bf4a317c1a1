//! The short way into the bus table (`direct`): only for Odoo's seven columns without further ado, and without triggers of
//! a user's.

use super::Bus;
use crate::pg::datum::Text;
use crate::pg::direct::{self, Column, Indexes, Table};
use crate::pg::report::{Outcome, report};
use crate::pg::{ring, worker};
use pgrx::IntoDatum;
use pgrx::prelude::*;

/// The columns of the bus table.
const COLUMNS: usize = 7;

/// Inserts a row and notes it for the worker; its id, or None where the long way must be gone.
pub fn insert(bus: &Bus, channel: &str, message: &str) -> Outcome<Option<i64>> {
    if bus.sequence == pg_sys::InvalidOid {
        return Ok(None);
    }
    let id = direct::with(
        bus.relid,
        Indexes::Anybodys,
        |table| columns(bus, table),
        |rows, columns| {
            let id = direct::next_of(bus.sequence);
            let narrow = i32::try_from(id).ok();
            if narrow.is_none() && columns.iter().any(|column| matches!(column, Value::Id { narrow: true })) {
                return Err(too_great(id));
            }
            // In UTC, as Odoo has it.
            let now = pg_sys::Datum::from(worker::transaction_start());
            rows.put(|column| match columns.get(column)? {
                Value::Id { narrow: true } => narrow.map(pg_sys::Datum::from),
                Value::Id { narrow: false } => Some(pg_sys::Datum::from(id)),
                Value::Channel => Text(channel.to_owned()).into_datum(),
                Value::Message => Text(message.to_owned()).into_datum(),
                Value::Now => Some(now),
                Value::Null | Value::Dropped => None,
            });
            Ok(id)
        },
    )?;
    id.into_iter().for_each(ring::note);
    Ok(id)
}

/// What stands in which column.
enum Value {
    Id { narrow: bool },
    Channel,
    Message,
    Now,
    Null,
    Dropped,
}

/// What to put into the columns of a table on which the short way comes to the same as INSERT; None for another one.
fn columns(bus: &Bus, table: &Table) -> Option<Vec<Value>> {
    let columns: Vec<Value> = table.columns().map(value).collect::<Option<_>>()?;
    let live = columns.iter().filter(|column| !matches!(column, Value::Dropped)).count();
    (live == COLUMNS && (!bus.is_odoo || is_quiet(table, &columns))).then_some(columns)
}

fn value(column: Column<'_>) -> Option<Value> {
    if column.is_dropped {
        return Some(Value::Dropped);
    }
    if column.has_modifier {
        return None;
    }
    match column.name {
        b"id" if column.type_oid == pg_sys::INT8OID => Some(Value::Id { narrow: false }),
        b"id" if column.type_oid == pg_sys::INT4OID => Some(Value::Id { narrow: true }),
        b"channel" => Some(Value::Channel),
        b"message" => Some(Value::Message),
        b"create_date" | b"write_date" => Some(Value::Now),
        b"create_uid" | b"write_uid" if !column.is_required => Some(Value::Null),
        _ => None,
    }
}

/// Whether no trigger would do anything: there are but internal ones, which are imbus's own and those of foreign keys,
/// and these are of columns that stay NULL. (On imbus's own table nobody else can put any.)
fn is_quiet(table: &Table, columns: &[Value]) -> bool {
    table.triggers().all(|(_, is_internal)| is_internal)
        && table.foreign_keys().all(|column| matches!(columns.get(column), Some(Value::Null)))
}

fn too_great(id: i64) -> pgrx::pg_sys::panic::ErrorReport {
    report(
        PgSqlErrorCode::ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE,
        "integer out of range",
        &format!("The sequence of the bus table has reached {id}."),
        "Make column id of the table a bigint.",
    )
}
