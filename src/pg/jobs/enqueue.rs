//! Enqueueing a job, and what becomes of one that is inserted by hand.

use super::{NOTIFICATION, change, on_table};
use crate::core::channel::Channel;
use crate::core::job::{self, State};
use crate::pg::datum::{JsonbText, Text};
use crate::pg::report::{Outcome, internal, report};
use crate::pg::{bus, guc, wake, worker};
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

impl New {
    /// Any runner of the role can take it at once.
    fn is_plain(&self) -> bool {
        let is_free = self.run_at.is_none() && self.model.name.is_none() && self.depends_on.is_none();
        is_free && guc::queues().of(&self.queue).is_none()
    }
}

/// Enqueues in the current transaction: the id. An unfinished job with the same identity_key is returned instead.
pub fn enqueue(new: New) -> Outcome<i64> {
    let text = "
        INSERT INTO TABLE AS j (name, method, args, kwargs, notify, queue, priority, run_at, max_attempts, retry_delay,
                                identity_key, depends_on, user_id, context, role, search_path, timeout,
                                res_model, res_ids, super_user, ready)
        VALUES ($1, $2, $3, $4, $5, $6, $7, COALESCE($8, pg_catalog.now()), $9,
                COALESCE($10, '10 seconds'::pg_catalog.interval), $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21)";
    const ONCE: &str = "
        ON CONFLICT (identity_key) WHERE identity_key IS NOT NULL AND state IN ('created', 'processing') DO NOTHING";
    let once = if new.identity_key.is_some() { ONCE } else { "" };
    let text = &format!("{text}{once} RETURNING j.id");
    let stored = match &new.notify {
        Some(channel) => Some(Text(channel.stored(&bus::table()?.database))),
        None => None,
    };
    let is_plain = new.is_plain();
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
            if is_plain {
                wake::enqueued_for(u32::from(new.role));
            } else {
                wake::enqueued();
            }
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
    if !ENQUEUEING.get() {
        wake::enqueued();
        // Raised here: pgrx turns an Err of a trigger function into a panic's text.
        disown(&mut tuple).unwrap_or_report();
        check(&tuple).unwrap_or_report();
    }
    Ok(Some(tuple))
}

/// What holds of every job. Errors: 23514.
fn check(tuple: &PgHeapTuple<'_, AllocatedByRust>) -> Outcome<()> {
    let state: Option<String> = tuple.get_by_name("state").map_err(internal)?;
    let token: Option<String> = tuple.get_by_name("token").map_err(internal)?;
    let finished_at: Option<TimestampWithTimeZone> = tuple.get_by_name("finished_at").map_err(internal)?;
    let max_attempts: Option<i32> = tuple.get_by_name("max_attempts").map_err(internal)?;
    let wrong = match state.as_deref().and_then(State::parse) {
        None => "its state is none of a job's",
        Some(state) if (state == State::Processing) != token.is_some() => "a token belongs to a job that is processing",
        Some(state) if state.is_unfinished() != finished_at.is_none() => "finished_at belongs to a job that has ended",
        _ if max_attempts.is_some_and(|most| most < 1) => "max_attempts is at least 1",
        _ => return Ok(()),
    };
    let detail = format!("State: {}", state.as_deref().unwrap_or("NULL"));
    let message = format!("a job cannot be so: {wrong}");
    Err(report(PgSqlErrorCode::ERRCODE_CHECK_VIOLATION, &message, &detail, "Enqueue jobs by ir_async_call."))
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
