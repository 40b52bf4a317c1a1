//! Table `ir_async`: every statement on it. All run as the table's owner; each change of a job's state is notified in
//! the same transaction.

use super::bus;
use super::datum::{JsonbText, Text};
use super::report::{Outcome, internal, report};
use super::sql;
use super::transaction::{Failure, as_owner, safely};
use super::{shared, wake, worker};
use crate::core::channel::Channel;
use crate::core::job::{self, State};
use crate::core::json;
use crate::core::status::{FailedJob, Jobs, Queue};
use pgrx::datum::{DatumWithOid, Interval, TimestampWithTimeZone};
use pgrx::pg_sys::panic::ErrorReportable;
use pgrx::prelude::*;
use std::cell::{Cell, RefCell};

/// Type of the notifications about jobs (SPEC section 8).
const NOTIFICATION: &str = "ir.async";
/// Jobs counted for the administrator, a state.
const COUNTED: u32 = 20_000;
/// Finished jobs deleted in one transaction.
const PRUNE_BATCH: i64 = 10_000;

/// A fencing token: 128 random bits in hexadecimal.
pub type Token = String;

/// The table of this database.
#[derive(Clone)]
struct Table {
    relid: pg_sys::Oid,
    owner: pg_sys::Oid,
    name: String,
}

thread_local! {
    static FOUND: RefCell<Option<Table>> = const { RefCell::new(None) };
    /// imbus itself inserts a job: the trigger keeps the role it was given.
    static ENQUEUEING: Cell<bool> = const { Cell::new(false) };
}

fn table() -> Outcome<Table> {
    let cached = FOUND.with(|found| found.borrow().clone());
    if let Some(table) = cached.filter(|table| bus::name(table.relid).as_ref() == Some(&table.name)) {
        return Ok(table);
    }
    let text = "SELECT c.oid, c.relowner, pg_catalog.quote_ident(n.nspname) || '.ir_async'
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

/// Runs a statement on the table; `TABLE` in the text is its name.
fn on_table<T>(text: &str, args: &[DatumWithOid<'_>], map: impl FnMut(&sql::Row) -> Outcome<T>) -> Outcome<Vec<T>> {
    let table = table()?;
    let text = text.replace("TABLE", &table.name);
    as_owner(table.owner, [table.relid; 2], || sql::rows(&text, args, map))
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
    pub user_id: Option<i32>,
    pub context: Option<String>,
    pub role: pg_sys::Oid,
    pub search_path: String,
}

/// Enqueues in the current transaction: the id. An unfinished job with the same identity_key is returned instead.
pub fn enqueue(new: New) -> Outcome<i64> {
    let text = "
        INSERT INTO TABLE AS j (name, method, args, kwargs, notify, queue, priority, run_at, max_attempts, retry_delay,
                                identity_key, depends_on, user_id, context, role, search_path, timeout)
        VALUES ($1, $2, $3, $4, $5, $6, $7, COALESCE($8, pg_catalog.now()), $9,
                COALESCE($10, '10 seconds'::pg_catalog.interval), $11, $12, $13, $14, $15, $16, $17)
        ON CONFLICT (identity_key) WHERE identity_key IS NOT NULL AND state IN ('created', 'processing') DO NOTHING
        RETURNING j.id";
    let database = bus::table()?.database;
    let stored = new.notify.as_ref().map(|channel| Text(channel.stored(&database)));
    let args: [DatumWithOid<'_>; 17] = [
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
    let text = format!("{text} RETURNING {CHANGED}");
    let changed = on_table(&text, args, |row| {
        let (name, payload) = (row.get::<Text>(2)?, row.get::<JsonbText>(4)?);
        let body = change(
            row.need(1)?,
            name.as_ref().map(|text| text.0.as_str()),
            &row.text(3)?,
            payload.as_ref().map(|json| json.0.as_str()),
        );
        Ok((row.get::<Text>(5)?.map(|text| text.0), body))
    })?;
    for (channel, body) in &changed {
        tell(channel.as_deref(), body)?;
    }
    Ok(changed.len())
}

/// Tells of a change on the job's channel. A channel stored under a former name of the database is today's.
fn tell(channel: Option<&str>, body: &str) -> Outcome<()> {
    let Some(stored) = channel else { return Ok(()) };
    let Some(elements) = json::elements(stored)? else { return Ok(()) };
    let database = bus::table()?.database;
    let rest = elements.get(1..).unwrap_or_default().join(",");
    let channel = Channel::from_row(&format!("[{},{rest}]", json::string(&database)), &database)?;
    bus::publish(&channel, NOTIFICATION, body)?;
    Ok(())
}

/// A claimed job.
pub struct Claimed {
    pub id: i64,
    pub token: Token,
}

/// What makes a waiting job runnable now. Jobs of Odoo (with a model) are no business of SQL runners.
const RUNNABLE: &str = "c.state = 'created' AND c.res_model IS NULL AND c.run_at <= pg_catalog.clock_timestamp()
    AND NOT EXISTS (SELECT FROM pg_catalog.unnest(c.depends_on) d (id) JOIN TABLE p ON p.id = d.id
                     WHERE p.state NOT IN ('succeeded', 'done'))";

/// The roles that have runnable jobs, with how many (of the first few hundred), in the order of their first ones.
pub fn waiting() -> Outcome<Vec<(u32, i64)>> {
    let text = format!(
        "SELECT r.role, count(*) FROM (
           SELECT c.role, row_number() OVER (ORDER BY c.priority, c.run_at, c.id) AS place
             FROM TABLE c WHERE {RUNNABLE} ORDER BY c.priority, c.run_at, c.id LIMIT 256) r
          GROUP BY r.role ORDER BY min(r.place)"
    );
    on_table(&text, &[], |row| Ok((u32::from(row.need::<pg_sys::Oid>(1)?), row.need(2)?)))
}

/// Seconds until the next job is to start that waits for its time; None when there is none.
pub fn next_start() -> Outcome<Option<f64>> {
    let text = "SELECT EXTRACT(epoch FROM min(run_at) - pg_catalog.clock_timestamp())::float8 FROM TABLE
                 WHERE state = 'created' AND run_at > pg_catalog.clock_timestamp() AND run_at < 'infinity'";
    Ok(on_table(text, &[], |row| row.get::<f64>(1))?.into_iter().flatten().next())
}

/// Claims the first runnable job of a role: `processing`, one attempt more, a new token.
pub fn claim(role: u32) -> Outcome<Option<Claimed>> {
    let token = new_token()?;
    let text = format!(
        "SELECT c.id FROM TABLE c WHERE c.role = $1 AND {RUNNABLE}
          ORDER BY c.priority, c.run_at, c.id LIMIT 1 FOR UPDATE OF c SKIP LOCKED"
    );
    let found = on_table(&text, &[pg_sys::Oid::from(role).into()], |row| row.need::<i64>(1))?;
    let Some(id) = found.into_iter().next() else { return Ok(None) };
    let text = "UPDATE TABLE j SET state = 'processing', attempts = attempts + 1, token = $2,
                       claimed_at = pg_catalog.clock_timestamp(),
                       write_date = pg_catalog.clock_timestamp() AT TIME ZONE 'UTC' WHERE id = $1";
    change_and_tell(text, &[id.into(), Text(token.clone()).into()])?;
    Ok(Some(Claimed { id, token }))
}

fn new_token() -> Outcome<Token> {
    let mut bytes = [0u8; 16];
    // SAFETY: fills exactly 16 bytes.
    let random = unsafe { pg_sys::pg_strong_random(bytes.as_mut_ptr().cast(), bytes.len()) };
    if !random {
        return Err(internal("could not make random bytes"));
    }
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What a runner needs of its job.
pub struct Work {
    pub target: String,
    pub args: String,
    pub kwargs: String,
    pub search_path: String,
    /// How long it may take, in milliseconds.
    pub timeout: Option<i64>,
}

/// Locks a claimed job for the transaction that runs it; None when the token has been given up.
pub fn lock(claimed: &Claimed) -> Outcome<Option<Work>> {
    let text = "SELECT method::text, args, kwargs, search_path,
                       pg_catalog.ceil(EXTRACT(epoch FROM LEAST(timeout, '1 year')) * 1000)::bigint FROM TABLE
                 WHERE id = $1 AND token = $2 AND state = 'processing' FOR UPDATE";
    let found = on_table(text, &[claimed.id.into(), Text(claimed.token.clone()).into()], |row| {
        Ok(Work {
            target: row.text(1)?,
            args: row.get::<JsonbText>(2)?.map(|json| json.0).unwrap_or_default(),
            kwargs: row.get::<JsonbText>(3)?.map(|json| json.0).unwrap_or_default(),
            search_path: row.text(4)?,
            timeout: row.get(5)?,
        })
    })?;
    Ok(found.into_iter().next())
}

/// Ends a job with its result, in the transaction that did the work.
pub fn succeed(claimed: &Claimed, result: Option<&str>) -> Outcome<()> {
    let payload = result.map(|json| JsonbText(format!(r#"{{"result":{json}}}"#)));
    let text = "UPDATE TABLE j SET state = $3, payload = $4, token = NULL, traceback = NULL,
                       finished_at = pg_catalog.clock_timestamp(),
                       write_date = pg_catalog.clock_timestamp() AT TIME ZONE 'UTC'
                 WHERE id = $1 AND token = $2 AND state = 'processing'";
    let state = State::ended(result.is_some()).as_str().to_owned();
    let args = [claimed.id.into(), Text(claimed.token.clone()).into(), Text(state).into(), payload.into()];
    if change_and_tell(text, &args)? == 0 {
        return Err(report(
            PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE,
            "the job was given to another runner",
            "",
            "",
        ));
    }
    wake::enqueued();
    Ok(())
}

/// Records a failed attempt: the job waits for the next one, or has failed.
pub fn fail(claimed: &Claimed, failure: &Failure) -> Outcome<()> {
    let payload =
        job::error_payload(&failure.code, &failure.message, failure.detail.as_deref(), failure.hint.as_deref());
    let text = "SELECT attempts, max_attempts FROM TABLE WHERE id = $1 AND token = $2 FOR UPDATE";
    let key = || [claimed.id.into(), Text(claimed.token.clone()).into()];
    let attempts = on_table(text, &key(), |row| Ok((row.need::<i32>(1)?, row.need::<i32>(2)?)))?;
    let Some((attempts, max_attempts)) = attempts.into_iter().next() else { return Ok(()) };
    let [id, token] = key();
    end_attempt(job::after_failure(attempts, max_attempts), id, token, &payload, &failure.to_string(), true)
}

/// Records the death of a runner in a job: at once `created` again, or failed after the fifth.
pub fn runner_died(claimed: &Claimed, counts: bool) -> Outcome<()> {
    let text = "UPDATE TABLE SET deaths = deaths + $3::integer, attempts = attempts - 1
                 WHERE id = $1 AND token = $2 AND state = 'processing' RETURNING deaths";
    let key = || [claimed.id.into(), Text(claimed.token.clone()).into()];
    let [id, token] = key();
    let deaths = on_table(text, &[id, token, i32::from(counts).into()], |row| row.need::<i32>(1))?;
    let Some(deaths) = deaths.into_iter().next() else { return Ok(()) };
    let message = format!("the runner died {deaths} times in this job");
    let payload = job::error_payload("runner_died", &message, None, None);
    let [id, token] = key();
    end_attempt(job::after_death(deaths), id, token, &payload, &message, false)
}

fn end_attempt(
    state: State,
    id: DatumWithOid<'_>,
    token: DatumWithOid<'_>,
    payload: &str,
    traceback: &str,
    delayed: bool,
) -> Outcome<()> {
    // Each attempt that fails waits twice as long as the one before, up to an hour, and a little more at random, so
    // that what failed together does not come back together.
    let text = "UPDATE TABLE j SET state = $3, token = NULL, traceback = $5,
                       payload = CASE WHEN $3 = 'failed' THEN $4 END,
                       errors = (CASE WHEN pg_catalog.jsonb_array_length(j.errors) < 20 THEN j.errors
                                      ELSE j.errors - 0 END)
                                || pg_catalog.jsonb_build_array(pg_catalog.jsonb_build_object(
                                       'attempt', j.attempts, 'at', pg_catalog.clock_timestamp(),
                                       'error', $4 -> 'error')),
                       finished_at = CASE WHEN $3 = 'failed' THEN pg_catalog.clock_timestamp() END,
                       run_at = CASE WHEN $6 AND $3 = 'created'
                                     THEN pg_catalog.clock_timestamp()
                                          + LEAST(LEAST(j.retry_delay, '1 year') * pg_catalog.power(
                                                      2::float8, LEAST(j.attempts, 20)::float8 - 1),
                                                  GREATEST('1 hour', LEAST(j.retry_delay, '1 year')))
                                            * (1 + pg_catalog.random() / 4)
                                     ELSE j.run_at END,
                       write_date = pg_catalog.clock_timestamp() AT TIME ZONE 'UTC'
                 WHERE id = $1 AND token = $2 AND state = 'processing'";
    let args = [
        id,
        token,
        Text(state.as_str().to_owned()).into(),
        JsonbText(payload.to_owned()).into(),
        Text(traceback.to_owned()).into(),
        delayed.into(),
    ];
    change_and_tell(text, &args)?;
    wake::enqueued();
    Ok(())
}

/// The jobs that are `processing` here, for a worker that starts and asks who still works on them.
pub fn processing() -> Outcome<Vec<Claimed>> {
    let text = "SELECT id, token::text FROM TABLE WHERE state = 'processing' AND res_model IS NULL";
    on_table(text, &[], |row| Ok(Claimed { id: row.need(1)?, token: row.text(2)? }))
}

/// How the jobs are, for the administrator's page: counted up to a bound a state, so that a long queue costs no more.
pub fn summary() -> Outcome<Jobs> {
    let text = format!(
        "SELECT s.queue::text, s.state::text, pg_catalog.count(*) FROM (
            (SELECT queue, state FROM TABLE WHERE state = 'created' LIMIT {COUNTED})
            UNION ALL (SELECT queue, state FROM TABLE WHERE state = 'processing' LIMIT {COUNTED})
            UNION ALL (SELECT queue, state FROM TABLE WHERE finished_at IS NOT NULL
                        ORDER BY finished_at DESC LIMIT {COUNTED})) s
          GROUP BY 1, 2 ORDER BY 1"
    );
    let mut queues: Vec<Queue> = Vec::new();
    for (name, state, count) in on_table(&text, &[], |row| Ok((row.text(1)?, row.text(2)?, row.need::<i64>(3)?)))? {
        if queues.last().is_none_or(|queue| queue.queue != name) {
            queues.push(Queue { queue: name, ..Queue::default() });
        }
        let Some(queue) = queues.last_mut() else { continue };
        match state.as_str() {
            "created" => queue.waiting = count,
            "processing" => queue.processing = count,
            "succeeded" => queue.succeeded = count,
            "failed" => queue.failed = count,
            _ => queue.done += count,
        }
    }
    let text = format!(
        "SELECT s.id, s.name::text, pg_catalog.left(pg_catalog.split_part(s.error, E'\n', 1), 200),
                (pg_catalog.date_part('epoch', s.finished_at) * 1000)::bigint
           FROM (SELECT id, COALESCE(name, method) AS name, COALESCE(payload #>> '{{error,message}}', '') AS error, state,
                        finished_at
                   FROM TABLE WHERE finished_at IS NOT NULL ORDER BY finished_at DESC LIMIT {COUNTED}) s
          WHERE s.state = 'failed' ORDER BY s.finished_at DESC LIMIT 20"
    );
    let failed = on_table(&text, &[], |row| {
        Ok(FailedJob { id: row.need(1)?, name: row.text(2)?, error: row.text(3)?, at: row.need(4)? })
    })?;
    Ok(Jobs { queues, failed })
}

/// Deletes finished jobs older than `seconds`: how many (a batch at most). Failed jobs stay visible.
pub fn prune(seconds: i64) -> Outcome<i64> {
    let text = "DELETE FROM TABLE WHERE id IN (SELECT id FROM TABLE WHERE state IN ('succeeded', 'done', 'cancelled')
                   AND finished_at < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $1) LIMIT $2)
                RETURNING id";
    let deleted = on_table(text, &[(seconds as f64).into(), PRUNE_BATCH.into()], |_| Ok(()))?;
    Ok(i64::try_from(deleted.len()).unwrap_or(0))
}

/// A job's state as JSON for its own role, a member of it, or whoever may read the table; None for others.
pub fn status(id: i64) -> Outcome<Option<String>> {
    let text = "SELECT pg_catalog.jsonb_build_object('id', id, 'name', name, 'state', state, 'payload', payload,
                       'queue', queue, 'priority', priority, 'attempts', attempts, 'max_attempts', max_attempts,
                       'deaths', deaths, 'errors', errors, 'target', method, 'user_id', user_id,
                       'created_at', create_date AT TIME ZONE 'UTC', 'run_at', run_at, 'started_at', claimed_at,
                       'finished_at', finished_at), role FROM TABLE WHERE id = $1";
    let found = on_table(text, &[id.into()], |row| {
        Ok((row.get::<JsonbText>(1)?.map(|json| json.0), row.need::<pg_sys::Oid>(2)?))
    })?;
    let Some((json, role)) = found.into_iter().next() else { return Ok(None) };
    Ok(json.filter(|_| may_see(role).unwrap_or(false)))
}

fn may_see(role: pg_sys::Oid) -> Outcome<bool> {
    let relid = table()?.relid;
    // SAFETY: catalog look-ups inside a transaction.
    unsafe {
        let user = pg_sys::GetUserId();
        let read = pg_sys::pg_class_aclcheck(relid, user, pg_sys::ACL_SELECT as pg_sys::AclMode);
        Ok(worker::is_monitor() || read == pg_sys::AclResult::ACLCHECK_OK || pg_sys::has_privs_of_role(user, role))
    }
}

/// Turns `succeeded` into `done`, for the job's own role only. True when it did, false when it was done already.
/// Errors: 42704 for an unknown job, 42501 for somebody else's, 55000 in another state.
pub fn complete(id: i64) -> Outcome<bool> {
    let text = "SELECT role, state::text FROM TABLE WHERE id = $1 FOR UPDATE";
    let found = on_table(text, &[id.into()], |row| Ok((row.need::<pg_sys::Oid>(1)?, row.text(2)?)))?;
    let Some((role, state)) = found.into_iter().next() else {
        return Err(report(
            PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
            &format!("job {id} does not exist"),
            "Finished jobs are deleted after imbus.job_retention.",
            "",
        ));
    };
    // SAFETY: catalog look-ups inside a transaction.
    if !unsafe { pg_sys::has_privs_of_role(pg_sys::GetUserId(), role) } {
        return Err(report(
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            &format!("permission denied for job {id}"),
            "Only the role that enqueued a job completes it.",
            "",
        ));
    }
    match state.as_str() {
        "done" => Ok(false),
        "succeeded" => {
            let text = "UPDATE TABLE j SET state = 'done',
                               write_date = pg_catalog.clock_timestamp() AT TIME ZONE 'UTC' WHERE id = $1";
            change_and_tell(text, &[id.into()])?;
            Ok(true)
        }
        other => Err(report(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            &format!("job {id} has not succeeded"),
            &format!("Its state is \"{other}\"."),
            "Only a job that succeeded is completed.",
        )),
    }
}

/// A job that somebody wants to change: its state and its token.
struct Known {
    state: String,
    token: Option<Token>,
}

/// Looks up a job that the caller may change: its own role only. Errors: 42704, 42501.
fn own(id: i64) -> Outcome<Known> {
    let text = "SELECT role, state::text, token::text FROM TABLE WHERE id = $1";
    let found = on_table(text, &[id.into()], |row| {
        let token = row.get::<Text>(3)?.map(|text| text.0);
        Ok((row.need::<pg_sys::Oid>(1)?, Known { state: row.text(2)?, token }))
    })?;
    let Some((role, known)) = found.into_iter().next() else {
        return Err(report(
            PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
            &format!("job {id} does not exist"),
            "Finished jobs are deleted after imbus.job_retention.",
            "",
        ));
    };
    // SAFETY: a catalog look-up inside a transaction.
    if unsafe { pg_sys::has_privs_of_role(pg_sys::GetUserId(), role) } {
        return Ok(known);
    }
    Err(report(
        PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
        &format!("permission denied for job {id}"),
        "Only the role that enqueued a job changes it.",
        "",
    ))
}

/// Ends a job: one that waits is `cancelled` with this transaction; one that a runner works on is stopped at once,
/// whatever becomes of this transaction, and its effect undone. False when it has ended already. Errors: 42704, 42501.
pub fn cancel(id: i64) -> Outcome<bool> {
    loop {
        let known = own(id)?;
        if !matches!(known.state.as_str(), "created" | "processing") {
            return Ok(false);
        }
        if let (Some(token), Some(shared)) = (&known.token, shared::get())
            && shared.runners().any(|(_, slot)| slot.ask_cancel(id, token))
        {
            // The database worker asks again should the job not heed it.
            wake::enqueued();
            return Ok(true);
        }
        let text = "UPDATE TABLE j SET state = 'cancelled', token = NULL, finished_at = pg_catalog.clock_timestamp(),
                           write_date = pg_catalog.clock_timestamp() AT TIME ZONE 'UTC'
                     WHERE id = $1 AND state = $2 AND token IS NOT DISTINCT FROM $3";
        let args = [id.into(), Text(known.state).into(), known.token.map(Text).into()];
        if change_and_tell(text, &args)? > 0 {
            return Ok(true);
        }
        // It has just been claimed, or has just ended.
        pgrx::check_for_interrupts!();
    }
}

/// Records that a job was stopped because somebody wanted it to.
pub fn cancelled(claimed: &Claimed) -> Outcome<()> {
    let text = "UPDATE TABLE j SET state = 'cancelled', token = NULL, finished_at = pg_catalog.clock_timestamp(),
                       write_date = pg_catalog.clock_timestamp() AT TIME ZONE 'UTC'
                 WHERE id = $1 AND token = $2 AND state = 'processing'";
    change_and_tell(text, &[claimed.id.into(), Text(claimed.token.clone()).into()])?;
    Ok(())
}

/// Brings a job back that has failed or was cancelled, as if it were new; its errors stay. True when it did, false when
/// it waits or runs. Errors: 42704, 42501, 55000 for one that has succeeded.
pub fn retry(id: i64) -> Outcome<bool> {
    let known = own(id)?;
    if matches!(known.state.as_str(), "succeeded" | "done") {
        return Err(report(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            &format!("job {id} has succeeded"),
            &format!("Its state is \"{}\".", known.state),
            "Only a job that failed or was cancelled is brought back.",
        ));
    }
    let text = "UPDATE TABLE j SET state = 'created', attempts = 0, deaths = 0, payload = NULL, traceback = NULL,
                       finished_at = NULL, run_at = pg_catalog.clock_timestamp(),
                       write_date = pg_catalog.clock_timestamp() AT TIME ZONE 'UTC'
                 WHERE id = $1 AND state IN ('failed', 'cancelled')";
    let is_back = change_and_tell(text, &[id.into()])? > 0;
    if is_back {
        wake::enqueued();
    }
    Ok(is_back)
}
