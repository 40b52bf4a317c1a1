//! Enqueueing a job, and what becomes of one that is inserted by hand.

use super::{NOTIFICATION, change, on_table};
use crate::core::channel::Channel;
use crate::core::job::{self, State};
use crate::pg::datum::{JsonbText, Text};
use crate::pg::report::{Outcome, internal, report};
use crate::pg::{bus, wake, worker};
use pgrx::datum::{DatumWithOid, Interval, TimestampWithTimeZone};
use pgrx::pg_sys::panic::ErrorReportable;
use pgrx::prelude::*;
use std::cell::Cell;

thread_local! {
    /// imbus itself inserts a job: the trigger keeps the role it was given.
    static ENQUEUEING: Cell<bool> = const { Cell::new(false) };
}

/// The records of Odoo that a job's method is called on.
#[derive(Clone, Default)]
pub struct Model {
    pub name: Option<String>,
    /// A JSON array of their ids.
    pub res_ids: Option<String>,
    pub su: Option<bool>,
}

/// A job to enqueue, its arguments checked.
pub struct New {
    pub target: String,
    pub args: String,
    pub kwargs: String,
    pub description: Option<String>,
    pub notify: Option<Channel>,
    pub queue: String,
    pub priority: i32,
    pub run_at: Option<TimestampWithTimeZone>,
    pub max_attempts: i32,
    pub retry_delay: Option<Interval>,
    pub timeout: Option<Interval>,
    pub identity_key: Option<String>,
    pub depends_on: Option<Vec<i64>>,
    pub model: Model,
    pub user_id: Option<i32>,
    pub context: Option<String>,
    pub role: pg_sys::Oid,
    pub search_path: String,
}

/// Enqueues in the current transaction: the id. An unfinished job with the same identity_key is returned instead.
pub fn enqueue(new: New) -> Outcome<i64> {
    let text = "
        INSERT INTO TABLE AS j (name, method, args, kwargs, notify, queue, priority, run_at, max_attempts, retry_delay,
                                identity_key, depends_on, user_id, context, role, search_path, timeout,
                                res_model, res_ids, super_user, ready)
        VALUES ($1, $2, $3, $4, $5, $6, $7, COALESCE($8, pg_catalog.now()), $9,
                COALESCE($10, '10 seconds'::pg_catalog.interval), $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21)
        ON CONFLICT (identity_key) WHERE identity_key IS NOT NULL AND state IN ('created', 'processing') DO NOTHING
        RETURNING j.id";
    let database = bus::table()?.database;
    let stored = new.notify.as_ref().map(|channel| Text(channel.stored(&database)));
    let is_ready = new.depends_on.as_ref().is_none_or(Vec::is_empty);
    let args: [DatumWithOid<'_>; 21] = [
        new.description.clone().map(Text).into(),
        Text(new.target).into(),
        JsonbText(new.args).into(),
        JsonbText(new.kwargs).into(),
        stored.into(),
        Text(new.queue).into(),
        new.priority.into(),
        new.run_at.into(),
        new.max_attempts.into(),
        new.retry_delay.into(),
        new.identity_key.clone().map(Text).into(),
        new.depends_on.into(),
        new.user_id.into(),
        new.context.map(JsonbText).into(),
        new.role.into(),
        Text(new.search_path).into(),
        new.timeout.into(),
        new.model.name.map(Text).into(),
        new.model.res_ids.map(JsonbText).into(),
        new.model.su.into(),
        is_ready.into(),
    ];
    for _ in 0..10 {
        // For this statement alone: the notification may run triggers of a user's, who may insert jobs too.
        ENQUEUEING.set(true);
        let mark = Enqueueing;
        let inserted = on_table(text, &args, |row| row.need::<i64>(1))?.into_iter().next();
        drop(mark);
        if let Some(id) = inserted {
            wake::enqueued();
            let (name, state) = (new.description.as_deref(), State::Created.as_str());
            if let Some(channel) = &new.notify {
                bus::publish(channel, NOTIFICATION, &change(id, name, state, None))?;
            }
            return Ok(id);
        }
        let key = new.identity_key.clone().map(Text);
        let twin = "SELECT id FROM TABLE WHERE identity_key = $1 AND state IN ('created', 'processing')";
        if let Some(id) = on_table(twin, &[key.into()], |row| row.need::<i64>(1))?.into_iter().next() {
            return Ok(id);
        }
        // The twin has just ended: try again.
    }
    Err(report(
        PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE,
        "could not enqueue: the job with the same identity_key changes too fast",
        "",
        "Retry the transaction.",
    ))
}

/// Clears the mark whatever happens.
struct Enqueueing;

impl Drop for Enqueueing {
    fn drop(&mut self) {
        ENQUEUEING.set(false);
    }
}

/// Trigger function before INSERT on `ir_async`: a job that imbus did not enqueue runs as the role that inserts it
/// (SPEC section 11), and the worker hears of it. Inserted by a superuser (a restore), an unfinished job does not run at
/// all, since it may be anybody's: it has failed, and stays visible.
#[pg_trigger]
fn ir_async_inserted<'a>(trigger: &'a pgrx::PgTrigger<'a>) -> Outcome<Option<PgHeapTuple<'a, impl WhoAllocated>>> {
    let Some(new) = trigger.new() else { return Ok(None) };
    let mut tuple = new.into_owned();
    wake::enqueued();
    if !ENQUEUEING.get() {
        // Raised here: pgrx turns an Err of a trigger function into a panic's text.
        disown(&mut tuple).unwrap_or_report();
    }
    Ok(Some(tuple))
}

fn disown(tuple: &mut PgHeapTuple<'_, AllocatedByRust>) -> Outcome<()> {
    // SAFETY: a plain global of the session, and a catalog look-up.
    let (role, superuser) = unsafe { (pg_sys::GetUserId(), pg_sys::superuser()) };
    tuple.set_by_name("role", role).map_err(internal)?;
    let depends_on: Option<pgrx::Array<'_, i64>> = tuple.get_by_name("depends_on").map_err(internal)?;
    let is_ready = depends_on.is_none_or(|ids| ids.is_empty());
    tuple.set_by_name("ready", is_ready).map_err(internal)?;
    let state: Option<String> = tuple.get_by_name("state").map_err(internal)?;
    if superuser && matches!(state.as_deref(), Some("created" | "processing")) {
        let message = "inserted by a superuser: whose job it was is not known";
        let payload = job::error_payload("not_enqueued", message, None, None);
        tuple.set_by_name("state", State::Failed.as_str()).map_err(internal)?;
        tuple.set_by_name("token", None::<String>).map_err(internal)?;
        tuple.set_by_name("traceback", message).map_err(internal)?;
        tuple.set_by_name("payload", JsonbText(payload)).map_err(internal)?;
        let now = TimestampWithTimeZone::try_from(worker::now()).map_err(internal)?;
        tuple.set_by_name("finished_at", now).map_err(internal)?;
    }
    Ok(())
}
