//! Schedules: table `imbus_schedule`, every statement on it, and its functions in SQL. All statements run as the table's
//! owner. A schedule's role is the one that made it, as with a job; nothing that is inserted by other means chooses it.

mod due;

pub use due::Schedules;

use super::bus;
use super::datum::{Jsonb, JsonbText, Str, Text};
use super::functions::{channel, filled};
use super::job_functions::{Call, Job, Options};
use super::jobs::New;
use super::report::{Outcome, internal, report};
use super::sql;
use super::transaction::{as_owner, safely};
use super::zone::ServerZone;
use super::{wake, worker};
use crate::core::error::{Error, shown};
use crate::core::schedule::Expression;
use crate::core::template;
use pgrx::datum::{DatumWithOid, Interval};
use pgrx::pg_sys::panic::ErrorReportable;
use pgrx::prelude::*;
use std::cell::Cell;

/// Names may be so long (bytes), so that the index on them holds them.
const NAME_MAX: usize = 255;

thread_local! {
    /// imbus itself inserts a schedule: the trigger keeps the role it was given.
    static SCHEDULING: Cell<bool> = const { Cell::new(false) };
}

/// Where the tables of this database are.
struct Home {
    relid: pg_sys::Oid,
    owner: pg_sys::Oid,
    schema: String,
}

fn home() -> Outcome<Home> {
    let text = "SELECT c.oid, c.relowner, pg_catalog.quote_ident(n.nspname)
                  FROM pg_catalog.pg_extension e
                  JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
                  JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = 'imbus_schedule'
                 WHERE e.extname = 'imbus'";
    let found = safely(|| {
        sql::first(text, &[], |row| {
            Ok(Home {
                relid: row.get(1)?.unwrap_or(pg_sys::InvalidOid),
                owner: row.get(2)?.unwrap_or(pg_sys::InvalidOid),
                schema: row.text(3)?,
            })
        })
    })?;
    found.ok_or_else(|| {
        report(
            PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE,
            "table imbus_schedule is missing",
            "The extension imbus is not installed in this database.",
            "Run CREATE EXTENSION imbus.",
        )
    })
}

/// Runs a statement on the table; `SCHEDULES` in the text is its name, `JOBS` that of `ir_async`.
fn on_table<T>(text: &str, args: &[DatumWithOid<'_>], map: impl FnMut(&sql::Row) -> Outcome<T>) -> Outcome<Vec<T>> {
    let home = home()?;
    let (schedules, jobs) = (format!("{}.imbus_schedule", home.schema), format!("{}.ir_async", home.schema));
    let text = template::fill(text, &[("SCHEDULES", &schedules), ("JOBS", &jobs)]);
    as_owner(home.owner, [home.relid; 2], || sql::rows(&text, args, map))
}

/// A schedule to be made or replaced, all checked.
struct Made {
    name: String,
    expression: String,
    zone: String,
    next: i64,
    overlap: bool,
    job: New,
}

/// Makes it, or replaces the one of that name if it is the same role's or nobody's: the id; None when it is another's.
/// A run that is due already stays due unless its time is another now, so that a program may say at each start what it
/// wants to be run.
fn keep(made: Made) -> Outcome<Option<i64>> {
    let text = "
        INSERT INTO SCHEDULES AS s (name, cron_expression, time_zone, next_run, overlap, role, role_name, search_path,
               description, target, args, kwargs, notify, queue, priority, max_attempts, retry_delay, timeout, user_id,
               context, model, res_ids, su)
        SELECT $1, $2, $3, pg_catalog.to_timestamp($4), $5, $6, r.rolname, $7, $8, $9, $10, $11, $12, $13, $14, $15,
               COALESCE($16, '10 seconds'::pg_catalog.interval), $17, $18, $19, $20, $21, $22
          FROM pg_catalog.pg_roles r WHERE r.oid = $6
        ON CONFLICT (name) DO UPDATE SET
               next_run = CASE WHEN s.role = EXCLUDED.role AND s.cron_expression = EXCLUDED.cron_expression
                                AND s.time_zone = EXCLUDED.time_zone
                               THEN COALESCE(s.next_run, EXCLUDED.next_run) ELSE EXCLUDED.next_run END,
               last_job = CASE WHEN s.role = EXCLUDED.role THEN s.last_job END,
               problem = NULL,
               (cron_expression, time_zone, overlap, role, role_name, search_path, description, target, args, kwargs,
                notify, queue, priority, max_attempts, retry_delay, timeout, user_id, context, model, res_ids,
                su) =
               (EXCLUDED.cron_expression, EXCLUDED.time_zone, EXCLUDED.overlap, EXCLUDED.role, EXCLUDED.role_name,
                EXCLUDED.search_path, EXCLUDED.description, EXCLUDED.target, EXCLUDED.args, EXCLUDED.kwargs,
                EXCLUDED.notify, EXCLUDED.queue, EXCLUDED.priority, EXCLUDED.max_attempts, EXCLUDED.retry_delay,
                EXCLUDED.timeout, EXCLUDED.user_id, EXCLUDED.context, EXCLUDED.model, EXCLUDED.res_ids, EXCLUDED.su)
         WHERE s.role = EXCLUDED.role OR s.role IS NULL
            OR NOT EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = s.role)
        RETURNING s.id";
    let Made { name, expression, zone, next, overlap, job } = made;
    let database = bus::table()?.database;
    let args: [DatumWithOid<'_>; 22] = [
        Text(name).into(),
        Text(expression).into(),
        Text(zone).into(),
        (next as f64).into(),
        overlap.into(),
        job.role.into(),
        Str(&job.search_path).into(),
        job.description.map(Text).into(),
        Str(&job.target).into(),
        job.args.into(),
        job.kwargs.into(),
        job.notify.map(|channel| Text(channel.stored(&database))).into(),
        Str(&job.queue).into(),
        job.priority.into(),
        job.max_attempts.into(),
        job.retry_delay.into(),
        job.timeout.into(),
        job.user_id.into(),
        job.context.into(),
        job.model.name.map(Text).into(),
        job.model.res_ids.into(),
        job.model.su.into(),
    ];
    SCHEDULING.set(true);
    let mark = Scheduling;
    let id = on_table(text, &args, |row| row.need::<i64>(1))?.into_iter().next();
    drop(mark);
    wake::enqueued();
    Ok(id)
}

/// Clears the mark whatever happens.
struct Scheduling;

impl Drop for Scheduling {
    fn drop(&mut self) {
        SCHEDULING.set(false);
    }
}

/// `ir_async_schedule(name, cron_expression, target, args, kwargs, …)`: has a job enqueued whenever the expression
/// matches the wall clock of `time_zone`, as the current role and with its search_path; replaces the schedule of that name
/// if it is the same role's. The id. Errors: those of `ir_async_call`, 22023 for an expression, a zone or a name, 42501
/// for somebody else's schedule.
#[pg_extern]
#[allow(clippy::too_many_arguments)]
fn ir_async_schedule(
    name: Option<Text>,
    cron_expression: Option<Text>,
    target: Option<Text>,
    args: Option<Jsonb>,
    kwargs: Option<Jsonb>,
    time_zone: Option<Text>,
    description: Option<Text>,
    notify: Option<JsonbText>,
    queue: Option<Text>,
    priority: Option<i32>,
    max_attempts: Option<i32>,
    retry_delay: Option<Interval>,
    timeout: Option<Interval>,
    model: Option<Text>,
    res_ids: Option<Vec<Option<i64>>>,
    user_id: Option<i32>,
    context: Option<Jsonb>,
    su: Option<bool>,
    overlap: Option<bool>,
) -> Outcome<i64> {
    let name = filled(name, "name")?;
    if name.len() > NAME_MAX {
        let reason = format!("it is longer than {NAME_MAX} bytes");
        return Err(Error::Argument { argument: "name", value: name, reason }.into());
    }
    let expression = filled(cron_expression, "cron_expression")?;
    let zone = ServerZone::named(&time_zone.map_or_else(|| "UTC".to_owned(), |text| text.0))?;
    let next = Expression::parse(&expression)?.next(worker::unix_time(), &zone).ok_or_else(|| Error::Argument {
        argument: "cron_expression",
        value: expression.clone(),
        reason: "no such time comes within 50 years".to_owned(),
    })?;
    let notify = notify.map(|json| channel(Some(json), "notify")).transpose()?;
    let options = Options {
        queue,
        priority,
        max_attempts,
        retry_delay,
        timeout,
        model,
        res_ids,
        user_id,
        context,
        su,
        ..Options::default()
    };
    let job = Call::begin()?.prepare(Job { target, args, kwargs, description, notify, options })?;
    let overlap = overlap.unwrap_or(false);
    let made = Made { name: name.clone(), expression, zone: zone.name(), next, overlap, job };
    keep(made)?.ok_or_else(|| not_yours(&name, "Choose another name, or have its role unschedule it."))
}

fn not_yours(name: &str, hint: &str) -> pgrx::pg_sys::panic::ErrorReport {
    report(
        PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
        "permission denied for the schedule of another role",
        &format!("Schedule: {}", shown(name)),
        hint,
    )
}

/// `ir_async_unschedule(name)`: removes a schedule of the current role, or of one it is a member of; jobs that it has
/// enqueued stay. True when there was one. Errors: 42501 for somebody else's.
#[pg_extern]
fn ir_async_unschedule(name: Option<Text>) -> Outcome<bool> {
    let name = filled(name, "name")?;
    let text = "SELECT id, role FROM SCHEDULES WHERE name = $1 FOR UPDATE";
    let found =
        on_table(text, &[Text(name.clone()).into()], |row| Ok((row.need::<i64>(1)?, row.get::<pg_sys::Oid>(2)?)))?;
    let Some((id, role)) = found.into_iter().next() else { return Ok(false) };
    // SAFETY: catalog look-ups inside a transaction.
    if !role.is_none_or(|role| unsafe { pg_sys::has_privs_of_role(pg_sys::GetUserId(), role) }) {
        return Err(not_yours(&name, "Only the role that made a schedule removes it."));
    }
    on_table("DELETE FROM SCHEDULES WHERE id = $1 RETURNING id", &[id.into()], |_| Ok(()))?;
    Ok(true)
}

/// Trigger function before INSERT on `imbus_schedule`: a schedule that imbus did not make (a restored one) is the
/// inserting role's, if that is no superuser and has the name of the role that made it; else it may be anybody's, is
/// nobody's, and does not run.
#[pg_trigger]
fn imbus_schedule_inserted<'a>(
    trigger: &'a pgrx::PgTrigger<'a>,
) -> Outcome<Option<PgHeapTuple<'a, impl WhoAllocated>>> {
    let Some(new) = trigger.new() else { return Ok(None) };
    let mut tuple = new.into_owned();
    wake::enqueued();
    if !SCHEDULING.get() {
        // Raised here: pgrx turns an Err of a trigger function into a panic's text.
        disown(&mut tuple).unwrap_or_report();
    }
    Ok(Some(tuple))
}

fn disown(tuple: &mut PgHeapTuple<'_, AllocatedByRust>) -> Outcome<()> {
    // SAFETY: a plain global of the session, and a catalog look-up.
    let (role, superuser) = unsafe { (pg_sys::GetUserId(), pg_sys::superuser()) };
    let text = "SELECT rolname::text FROM pg_catalog.pg_roles WHERE oid = $1";
    let name = safely(|| sql::first(text, &[role.into()], |row| row.text(1)))?.unwrap_or_default();
    let before: Option<Text> = tuple.get_by_name("role_name").map_err(internal)?;
    let is_theirs = before.as_ref().is_none_or(|before| before.0 == name);
    if !superuser && is_theirs {
        tuple.set_by_name("role", role).map_err(internal)?;
        tuple.set_by_name("role_name", Text(name)).map_err(internal)?;
        return Ok(());
    }
    let problem = match superuser {
        true => "inserted by a superuser: whose schedule it was is not known",
        false => "inserted by another role than the one whose schedule it was",
    };
    tuple.set_by_name("role", None::<pg_sys::Oid>).map_err(internal)?;
    tuple.set_by_name("next_run", None::<TimestampWithTimeZone>).map_err(internal)?;
    tuple.set_by_name("problem", problem).map_err(internal)?;
    Ok(())
}
