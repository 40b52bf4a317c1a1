//! The bus in SQL: thin wrappers that read arguments, ask the core, and touch the bus table. Their SQL declarations,
//! with the comments users read, stand in sql/imbus--*.sql.

use super::bus::{self, RawRow};
use super::datum::{JsonbText, Text};
use super::report::{Outcome, not_preloaded, report};
use super::{guc, listen, shared, worker};
use crate::core::channel::Channel;
use crate::core::error::Error;
use crate::core::token::{Claims, Grant};
use crate::core::{json, payload, token};
use pgrx::datum::Interval;
use pgrx::iter::{SetOfIterator, TableIterator};
use pgrx::prelude::*;
use std::collections::HashSet;
use std::sync::atomic::Ordering;

/// Tokens live at most this long, so that a clock's overflow is never reached (100 years, in seconds).
const TOKEN_LIFE_MAX: f64 = 100.0 * 366.0 * 86_400.0;
/// At most one line a minute is logged about split payloads, as Odoo logs them (SPEC section 5); microseconds.
const SPLIT_LOG_INTERVAL: i64 = 60_000_000;

/// An argument that must not be NULL.
pub fn given<T>(value: Option<T>, argument: &'static str) -> Outcome<T> {
    value.ok_or_else(|| Error::Missing { argument }.into())
}

/// A text argument that must be neither NULL nor empty.
pub fn filled(value: Option<Text>, argument: &'static str) -> Outcome<String> {
    let text = given(value, argument)?.0;
    if text.is_empty() { Err(Error::Missing { argument }.into()) } else { Ok(text) }
}

/// A channel given as jsonb.
pub fn channel(target: Option<JsonbText>, argument: &'static str) -> Outcome<Channel> {
    Ok(Channel::from_json(&given(target, argument)?.0, &bus::table()?.database)?)
}

/// The elements of a jsonb array argument, as JSON text.
fn array(value: Option<JsonbText>, argument: &'static str) -> Outcome<Vec<String>> {
    let text = given(value, argument)?.0;
    match json::elements(&text)? {
        Some(elements) => Ok(elements.into_iter().map(str::to_owned).collect()),
        None => Err(Error::Argument { argument, value: text, reason: "it must be a JSON array".to_owned() }.into()),
    }
}

/// `bus_sendone(target text, notification_type text, message jsonb)`: publishes on a plain string channel in the current
/// transaction and returns the id. Errors: 22004 for NULLs, 22023 for an empty channel.
#[pg_extern]
fn bus_sendone_text(target: Option<Text>, kind: Option<Text>, message: Option<JsonbText>) -> Outcome<i64> {
    let target = Channel::plain(&given(target, "target")?.0)?;
    bus::publish(&target, &filled(kind, "notification_type")?, &given(message, "message")?.0)
}

/// `bus_sendone(target jsonb, notification_type text, message jsonb)`: the same for any channel, a JSON string or an
/// array such as `["res.partner",42]`. Errors as above.
#[pg_extern]
fn bus_sendone_jsonb(target: Option<JsonbText>, kind: Option<Text>, message: Option<JsonbText>) -> Outcome<i64> {
    let target = channel(target, "target")?;
    bus::publish(&target, &filled(kind, "notification_type")?, &given(message, "message")?.0)
}

/// `bus_sendmany(notifications jsonb)`: publishes `[[target, type, message], …]` in order; the ids. Nothing is
/// published when any of them is wrong.
#[pg_extern]
fn bus_sendmany(notifications: Option<JsonbText>) -> Outcome<SetOfIterator<'static, i64>> {
    let list = array(notifications, "notifications")?;
    let database = bus::table()?.database;
    let read = |text: &String| -> Outcome<(Channel, String, String)> {
        let wrong = |reason: &str| Error::Argument {
            argument: "notifications",
            value: text.clone(),
            reason: reason.to_owned(),
        };
        match json::elements(text)?.as_deref() {
            Some([target, kind, message]) => {
                let kind: String =
                    serde_json::from_str(kind).map_err(|_| wrong("the type of each must be a string"))?;
                if kind.is_empty() {
                    return Err(wrong("the type of each must not be empty").into());
                }
                Ok((Channel::from_json(target, &database)?, kind, (*message).to_owned()))
            }
            _ => Err(wrong("each must be an array [target, type, message]").into()),
        }
    };
    let all = list.iter().map(read).collect::<Outcome<Vec<_>>>()?;
    let ids = all.iter().map(|(channel, kind, message)| bus::publish(channel, kind, message));
    Ok(SetOfIterator::new(ids.collect::<Outcome<Vec<_>>>()?))
}

/// `bus_poll(channels jsonb, last bigint, ignore_ids bigint[])`: Odoo's `_poll` (bus/models/bus.py): `last = 0` gives
/// the last 50 s, else what has a greater id, ascending. Channels are compared as JSON values. Rows that are no
/// notifications are left out; what jsonb cannot hold in a message is U+FFFD.
#[pg_extern]
fn bus_poll(
    channels: Option<JsonbText>,
    last: Option<i64>,
    ignore_ids: Option<Vec<Option<i64>>>,
) -> Outcome<TableIterator<'static, (name!(id, i64), name!(channel, JsonbText), name!(message, JsonbText))>> {
    let bus = bus::table()?;
    let targets = array(channels, "channels")?;
    let wanted =
        targets.iter().map(|text| Ok(Channel::from_json(text, &bus.database)?)).collect::<Outcome<HashSet<_>>>()?;
    let ignored: HashSet<i64> = ignore_ids.unwrap_or_default().into_iter().flatten().collect();
    let keep = |row: RawRow| {
        let (id, channel, message) = (row.id, row.channel?, row.message?);
        let mine = Channel::from_row(&channel, &bus.database).is_ok_and(|channel| wanted.contains(&channel));
        let sound = mine && !ignored.contains(&id) && json::check(&message).is_ok();
        sound.then(|| {
            let text = |json: &str| JsonbText(json::for_jsonb(json).into_owned());
            (id, text(&channel), text(&message))
        })
    };
    let rows = bus.since(last.unwrap_or(0))?;
    Ok(TableIterator::new(rows.into_iter().filter_map(keep).collect::<Vec<_>>()))
}

/// `bus_last_id()`: the greatest visible id, 0 when the table is empty.
#[pg_extern]
fn bus_last_id() -> Outcome<i64> {
    bus::table()?.last_id()
}

/// `bus_has_missed_notifications(last bigint)`: true when no row has that id (later Odoo's endpoint of that name).
#[pg_extern]
fn bus_has_missed_notifications(last: Option<i64>) -> Outcome<bool> {
    Ok(!bus::table()?.has(given(last, "last")?)?)
}

/// `bus_gc(retention interval)`: deletes rows older than that, NULL meaning the setting; how many were deleted.
#[pg_extern]
fn bus_gc(retention: Option<Interval>) -> Outcome<i64> {
    let seconds = match retention {
        None => bus::retention()?,
        Some(interval) => positive(&interval, "retention", 0.0)?,
    };
    bus::table()?.gc(seconds)
}

/// The seconds of an interval, refused below `least`.
fn positive(interval: &Interval, argument: &'static str, least: f64) -> Outcome<f64> {
    let seconds = interval.as_micros() as f64 / 1e6;
    if seconds < least {
        let reason = if least > 0.0 { "it must be positive" } else { "it must not be negative" };
        return Err(Error::Argument { argument, value: format!("{seconds} s"), reason: reason.to_owned() }.into());
    }
    Ok(seconds)
}

/// `bus_token(channels jsonb, expires_in interval, subject text, admin boolean)`: a JWT (HS256) that lets its bearer
/// subscribe to these channels of this database; `["*"]` or `"*"` allows all. `admin` is for members of pg_monitor.
/// Errors: 22023 for a bad channel or an expiry that is not positive, 42501 for `admin`, 55000 without the workers.
#[pg_extern]
fn bus_token(
    channels: Option<JsonbText>,
    expires_in: Option<Interval>,
    subject: Option<Text>,
    admin: Option<bool>,
) -> Outcome<Text> {
    if shared::get().is_none() {
        return Err(not_preloaded("bus_token()"));
    }
    let admin = admin.unwrap_or(false);
    if admin && !worker::is_monitor() {
        return Err(report(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            "permission denied for an admin token",
            "Only members of pg_monitor may make tokens with admin.",
            "Leave admin out, or GRANT pg_monitor.",
        ));
    }
    let life = positive(&given(expires_in, "expires_in")?, "expires_in", 1e-6)?.min(TOKEN_LIFE_MAX);
    let now = worker::unix_time();
    let claims = Claims {
        db: bus::table()?.database,
        oid: worker::database_oid(),
        channels: grant(channels)?,
        iat: now,
        // At least one second: a token is never born expired.
        exp: now.saturating_add(life.ceil() as i64),
        sub: subject.map(|text| text.0),
        admin,
    };
    Ok(Text(token::sign(&claims, &guc::token_secret())?))
}

fn grant(channels: Option<JsonbText>) -> Outcome<Grant> {
    let text = given(channels, "channels")?.0;
    if text == r#""*""# {
        return Ok(Grant::All);
    }
    let list = array(Some(JsonbText(text)), "channels")?;
    if list.iter().any(|element| element == r#""*""#) {
        return Ok(Grant::All);
    }
    let database = bus::table()?.database;
    let channels = list.iter().map(|element| Ok(Channel::from_json(element, &database)?));
    Ok(Grant::Channels(channels.collect::<Outcome<_>>()?))
}

/// `imbus_notify(channel text, payload text)`: `pg_notify` that splits a JSON array which is too long for one payload
/// into halves, as Odoo does before it calls ODOO_NOTIFY_FUNCTION (bus/models/bus.py). Errors: those of pg_notify, and
/// 54000 with nothing sent when a payload cannot be split below `imbus.notify_payload_max_length`.
#[pg_extern]
fn imbus_notify(channel: Option<Text>, payload: Option<Text>) -> Outcome<()> {
    // pg_notify treats NULL as the empty string, and then refuses an empty channel itself.
    let channel = channel.map(|text| text.0).unwrap_or_default();
    let payload = payload.map(|text| text.0).unwrap_or_default();
    let parts = payload::split(&payload, guc::notify_payload_max_length())?;
    for part in &parts {
        listen::notify(&channel, part);
    }
    if parts.len() > 1 {
        count_split(parts.len(), payload.len());
    }
    Ok(())
}

fn count_split(parts: usize, bytes: usize) {
    let Some(shared) = shared::get() else { return };
    shared.notify_splits.fetch_add(1, Ordering::Relaxed);
    let now = worker::now();
    let last = shared.notify_split_logged.load(Ordering::Relaxed);
    let due = last == 0 || now.saturating_sub(last) >= SPLIT_LOG_INTERVAL;
    if due && shared.notify_split_logged.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
        pgrx::log!("imbus_notify split a payload of {bytes} bytes into {parts} parts");
    }
}

/// `imbus_version()`: the version of the library, which may be ahead of the extension's until ALTER EXTENSION UPDATE.
#[pg_extern]
fn imbus_version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Trigger function on the bus table, for each row inserted: notes its id for the worker (`ring`). Its result, which
/// PostgreSQL ignores after the row is in, is a null pointer.
#[pg_extern]
fn imbus_bus_inserted(call: pg_sys::FunctionCallInfo) -> Outcome<i64> {
    // SAFETY: PostgreSQL calls a trigger function with a TriggerData that lives as long as the call; whoever calls it
    // otherwise gets an error first.
    unsafe {
        let context = (*call).context;
        if context.is_null() || (*context).type_ != pg_sys::NodeTag::T_TriggerData {
            return Err(report(
                PgSqlErrorCode::ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED,
                "imbus_bus_inserted() was not called as a trigger",
                "",
                "",
            ));
        }
        let data = context.cast::<pg_sys::TriggerData>();
        if let Some(id) = row_id((*(*data).tg_relation).rd_att, (*data).tg_trigtuple) {
            super::ring::note(id);
        }
    }
    Ok(0)
}

/// The id of a row of the bus table; None when the trigger hangs on a table without such a column.
///
/// SAFETY: a tuple and its descriptor.
unsafe fn row_id(descriptor: pg_sys::TupleDesc, tuple: pg_sys::HeapTuple) -> Option<i64> {
    // SAFETY: the caller's.
    unsafe {
        let column = pg_sys::SPI_fnumber(descriptor, c"id".as_ptr());
        if column <= 0 {
            return None;
        }
        let mut is_null = false;
        let value = pg_sys::heap_getattr(tuple, column, descriptor, &mut is_null);
        match pg_sys::SPI_gettypeid(descriptor, column) {
            _ if is_null => None,
            pg_sys::INT8OID => Some(value.value() as i64),
            pg_sys::INT4OID => Some(i64::from(value.value() as i32)),
            _ => None,
        }
    }
}
