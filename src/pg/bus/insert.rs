//! The short way into the bus table: the row is put in as logical replication's apply worker does it
//! (ExecSimpleRelationInsert), without parsing, planning or triggers. Only for a table on which that comes to the same as
//! INSERT: Odoo's seven columns without further ado, no rules, row security, checks, or triggers of a user's; so no code
//! but PostgreSQL's own runs, and no change of user is needed.

use super::Bus;
use crate::pg::datum::Text;
use crate::pg::report::{Outcome, report};
use crate::pg::{ffi, ring};
use pgrx::IntoDatum;
use pgrx::prelude::*;
use std::ffi::CStr;

/// The columns of the bus table.
const COLUMNS: usize = 7;

/// Inserts a row and notes it for the worker; its id, or None where the long way must be gone.
pub fn insert(bus: &Bus, channel: &str, message: &str) -> Outcome<Option<i64>> {
    if bus.sequence == pg_sys::InvalidOid {
        return Ok(None);
    }
    // SAFETY: main thread, inside a transaction. What is opened is closed below; on ERROR the abort closes it.
    unsafe {
        pg_sys::PreventCommandIfReadOnly(c"INSERT".as_ptr());
        pg_sys::PreventCommandIfParallelMode(c"INSERT".as_ptr());
        let relation = pg_sys::table_open(bus.relid, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE);
        let inserted = match columns(bus, relation) {
            Some(columns) => put(bus, relation, &columns, channel, message),
            None => Ok(None),
        };
        pg_sys::table_close(relation, pg_sys::NoLock as pg_sys::LOCKMODE);
        inserted
    }
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

/// The columns of a table on which the short way comes to the same as INSERT; None for another one.
///
/// SAFETY: an open relation.
unsafe fn columns(bus: &Bus, relation: pg_sys::Relation) -> Option<Vec<Value>> {
    // SAFETY: the caller's; the relation's cache entry stays while it is open.
    unsafe {
        let class = &*(*relation).rd_rel;
        let descriptor = (*relation).rd_att;
        let constraints = (*descriptor).constr.as_ref();
        let is_plain = (*relation).rd_rules.is_null()
            && !class.relforcerowsecurity
            && constraints.is_none_or(|found| found.num_check == 0 && !found.has_generated_stored)
            && (!bus.is_odoo || is_quiet(relation));
        if !is_plain {
            return None;
        }
        let mut columns = Vec::with_capacity(COLUMNS);
        for number in 1..=(*descriptor).natts {
            let column = ffi::attribute(descriptor, number - 1);
            columns.push(value(&*column)?);
        }
        let live = columns.iter().filter(|column| !matches!(column, Value::Dropped)).count();
        (live == COLUMNS).then_some(columns)
    }
}

fn value(column: &pg_sys::FormData_pg_attribute) -> Option<Value> {
    if column.attisdropped {
        return Some(Value::Dropped);
    }
    if column.atttypmod >= 0 {
        return None;
    }
    // SAFETY: a NAME ends with a zero byte.
    match unsafe { CStr::from_ptr(column.attname.data.as_ptr()) }.to_bytes() {
        b"id" if column.atttypid == pg_sys::INT8OID => Some(Value::Id { narrow: false }),
        b"id" if column.atttypid == pg_sys::INT4OID => Some(Value::Id { narrow: true }),
        b"channel" => Some(Value::Channel),
        b"message" => Some(Value::Message),
        b"create_date" | b"write_date" => Some(Value::Now),
        b"create_uid" | b"write_uid" if !column.attnotnull => Some(Value::Null),
        _ => None,
    }
}

/// Whether no trigger would do anything: there are but internal ones, which are imbus's own and those of foreign keys,
/// and these are of columns that stay NULL. (On imbus's own table nobody else can put any.)
///
/// SAFETY: an open relation.
unsafe fn is_quiet(relation: pg_sys::Relation) -> bool {
    // SAFETY: the caller's; lists of the relation's cache entry.
    unsafe {
        let Some(found) = (*relation).trigdesc.as_ref() else { return true };
        let list = std::slice::from_raw_parts(found.triggers, usize::try_from(found.numtriggers).unwrap_or(0));
        let internal = |trigger: &pg_sys::Trigger| {
            trigger.tgisinternal || trigger.tgtype & pg_sys::TRIGGER_TYPE_INSERT as i16 == 0
        };
        let stays_null = |key: &pg_sys::ForeignKeyCacheInfo| {
            let count = usize::try_from(key.nkeys).unwrap_or(0);
            key.conkey.iter().take(count).all(|number| {
                let column = ffi::attribute((*relation).rd_att, i32::from(*number) - 1);
                matches!(value(&*column), Some(Value::Null))
            })
        };
        let keys = pg_sys::RelationGetFKeyList(relation);
        list.iter().all(internal)
            && ffi::cells(keys).iter().all(|cell| stays_null(&*cell.ptr_value.cast::<pg_sys::ForeignKeyCacheInfo>()))
    }
}

/// SAFETY: an open relation and its columns.
unsafe fn put(
    bus: &Bus,
    relation: pg_sys::Relation,
    columns: &[Value],
    channel: &str,
    message: &str,
) -> Outcome<Option<i64>> {
    // SAFETY: as in `insert`. The result relation lives as long as the executor's state.
    unsafe {
        let state = pg_sys::CreateExecutorState();
        let context = pg_sys::MemoryContextSwitchTo((*state).es_query_cxt);
        let result = pg_sys::palloc0(size_of::<pg_sys::ResultRelInfo>()).cast::<pg_sys::ResultRelInfo>();
        (*result).type_ = pg_sys::NodeTag::T_ResultRelInfo;
        pg_sys::InitResultRelInfo(result, relation, 1, std::ptr::null_mut(), 0);
        (*result).ri_TrigDesc = std::ptr::null_mut();
        pg_sys::ExecOpenIndices(result, false);
        let id = if has_expressions(result) {
            None
        } else {
            Some(fill(bus, relation, result, state, columns, channel, message)?)
        };
        pg_sys::ExecCloseIndices(result);
        pg_sys::MemoryContextSwitchTo(context);
        pg_sys::FreeExecutorState(state);
        if let Some(id) = id {
            pg_sys::CommandCounterIncrement();
            ring::note(id);
        }
        Ok(id)
    }
}

/// Whether an index would call functions of a user's, or is checked later by a trigger.
///
/// SAFETY: indexes are open.
unsafe fn has_expressions(result: *const pg_sys::ResultRelInfo) -> bool {
    // SAFETY: the caller's.
    unsafe {
        let count = usize::try_from((*result).ri_NumIndices).unwrap_or(0);
        let infos =
            if count == 0 { &[][..] } else { std::slice::from_raw_parts((*result).ri_IndexRelationInfo, count) };
        let relations =
            if count == 0 { &[][..] } else { std::slice::from_raw_parts((*result).ri_IndexRelationDescs, count) };
        infos.iter().any(|info| !(**info).ii_Expressions.is_null() || !(**info).ii_Predicate.is_null())
            || relations.iter().any(|index| !(*(**index).rd_index).indimmediate)
    }
}

/// SAFETY: as in `put`.
unsafe fn fill(
    bus: &Bus,
    relation: pg_sys::Relation,
    result: *mut pg_sys::ResultRelInfo,
    state: *mut pg_sys::EState,
    columns: &[Value],
    channel: &str,
    message: &str,
) -> Outcome<i64> {
    // SAFETY: the slot has as many places as the relation has columns.
    unsafe {
        let id = ffi::guarded(|| ffi::nextval_internal(bus.sequence, false));
        let now = pg_sys::Datum::from(pg_sys::GetCurrentTransactionStartTimestamp());
        let slot = pg_sys::table_slot_create(relation, std::ptr::null_mut());
        let values = std::slice::from_raw_parts_mut((*slot).tts_values, columns.len());
        let nulls = std::slice::from_raw_parts_mut((*slot).tts_isnull, columns.len());
        for ((column, value), null) in columns.iter().zip(values).zip(nulls) {
            let datum = match column {
                Value::Id { narrow: true } => Some(pg_sys::Datum::from(i32::try_from(id).map_err(|_| too_great(id))?)),
                Value::Id { narrow: false } => Some(pg_sys::Datum::from(id)),
                Value::Channel => Text(channel.to_owned()).into_datum(),
                Value::Message => Text(message.to_owned()).into_datum(),
                Value::Now => Some(now),
                Value::Null | Value::Dropped => None,
            };
            *null = datum.is_none();
            *value = datum.unwrap_or(pg_sys::Datum::from(0));
        }
        pg_sys::ExecStoreVirtualTuple(slot);
        pg_sys::ExecSimpleRelationInsert(result, state, slot);
        pg_sys::ExecDropSingleTupleTableSlot(slot);
        Ok(id)
    }
}

fn too_great(id: i64) -> pgrx::pg_sys::panic::ErrorReport {
    report(
        PgSqlErrorCode::ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE,
        "integer out of range",
        &format!("The sequence of the bus table has reached {id}."),
        "Make column id of the table a bigint.",
    )
}
