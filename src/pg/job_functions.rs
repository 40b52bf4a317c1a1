//! The jobs in SQL: thin wrappers. Their SQL declarations, with the comments users read, stand in sql/imbus--*.sql.

use super::call::{self, Shape};
use super::catalog::{Remembered, remembered};
use super::datum::{Jsonb, JsonbText, Text};
use super::functions::{channel, filled, given};
use super::jobs::{Claimed, Failed, Model};
use super::report::{Outcome, not_preloaded, report};
use super::transaction::safely;
use super::{guc, jobs, sessions, shared, sql};
use crate::core::channel::Channel;
use crate::core::error::Error;
use crate::core::job;
use pgrx::datum::{Interval, TimestampWithTimeZone};
use pgrx::prelude::*;
use std::borrow::Cow;
use std::cell::RefCell;
use std::rc::Rc;

/// The optional arguments that `ir_async_call` and `ir_async_call_notify` share.
#[derive(Default)]
pub(super) struct Options {
    pub(super) queue: Option<Text>,
    pub(super) priority: Option<i32>,
    pub(super) run_at: Option<TimestampWithTimeZone>,
    pub(super) max_attempts: Option<i32>,
    pub(super) retry_delay: Option<Interval>,
    pub(super) timeout: Option<Interval>,
    pub(super) identity_key: Option<Text>,
    pub(super) depends_on: Option<Vec<Option<i64>>>,
    pub(super) model: Option<Text>,
    pub(super) res_ids: Option<Vec<Option<i64>>>,
    pub(super) user_id: Option<i32>,
    pub(super) context: Option<Jsonb>,
    pub(super) su: Option<bool>,
}

impl Options {
    /// The records of Odoo that are meant. Errors: 22023 for some without their model.
    fn model(&mut self) -> Outcome<Model> {
        let name = self.model.take().map(|text| text.0);
        let lost = name.is_none() && (self.res_ids.is_some() || self.su.is_some());
        if lost || name.as_deref() == Some("") {
            let value = name.unwrap_or_else(|| "NULL".to_owned());
            let reason = "res_ids and su are for a job on an Odoo model".to_owned();
            return Err(Error::Argument { argument: "model", value, reason }.into());
        }
        let res_ids = self.res_ids.take().map(|ids| {
            let ids: Vec<String> = ids.into_iter().flatten().map(|id| id.to_string()).collect();
            Jsonb::parse(&format!("[{}]", ids.join(",")))
        });
        Ok(Model { name, res_ids, su: self.su })
    }
}

/// What the jobs of one call have in common.
pub(super) struct Call {
    role: pg_sys::Oid,
    search_path: Rc<str>,
}

/// A target as it is asked for: its text, how it is called, search_path, role.
type Asked = (String, Shape, Rc<str>, pg_sys::Oid);

thread_local! {
    /// What targets mean, while nothing changes in the catalogs.
    static RESOLVED: RefCell<Remembered<Asked, Rc<str>>> = RefCell::default();
    /// The roles that can run jobs.
    static ROLES: RefCell<Remembered<pg_sys::Oid, ()>> = RefCell::default();
}

impl Call {
    /// Errors: 42501 for a role that cannot log in, 55000 without the workers.
    pub(super) fn begin() -> Outcome<Call> {
        if shared::get().is_none() {
            return Err(not_preloaded("a job"));
        }
        Ok(Call { role: enqueuing_role()?, search_path: search_path() })
    }

    /// A job with its arguments checked and its target resolved.
    pub(super) fn prepare(&self, job: Job) -> Outcome<jobs::New> {
        let Job { target, args, kwargs, description, notify, mut options } = job;
        let model = options.model()?;
        let target = filled(target, "target")?;
        let args = args.unwrap_or_else(|| Jsonb::parse("[]"));
        let kwargs = kwargs.unwrap_or_else(|| Jsonb::parse("{}"));
        let shape = Shape::of(&args, &kwargs)?;
        let max_attempts = options.max_attempts.unwrap_or(1);
        if max_attempts < 1 {
            let value = max_attempts.to_string();
            let reason = "it must be at least 1".into();
            return Err(Error::Argument { argument: "max_attempts", value, reason }.into());
        }
        let queue = options.queue.map_or(Cow::Borrowed("default"), |text| Cow::Owned(text.0));
        // What a runner outside is to do is its own business, and Odoo knows its methods.
        let is_function = model.name.is_none() && guc::queues().of(&queue) != Some(0);
        let signature = if is_function {
            let asked = (target, shape, Rc::clone(&self.search_path), self.role);
            remembered(&RESOLVED, asked, |(target, shape, ..)| Ok(call::resolve(target, shape)?.into()))?
        } else {
            target.into()
        };
        Ok(jobs::New {
            target: signature,
            args,
            kwargs,
            description: description.map(|text| text.0),
            notify,
            queue,
            priority: options.priority.unwrap_or(10),
            run_at: options.run_at,
            max_attempts,
            retry_delay: bounded(options.retry_delay, "retry_delay", false)?,
            timeout: bounded(options.timeout, "timeout", true)?,
            identity_key: options.identity_key.map(|text| text.0),
            depends_on: options.depends_on.map(|ids| ids.into_iter().flatten().collect()),
            model,
            user_id: options.user_id,
            context: options.context,
            role: self.role,
            search_path: Rc::clone(&self.search_path),
        })
    }
}

/// A job as it is asked for.
pub(super) struct Job {
    pub(super) target: Option<Text>,
    pub(super) args: Option<Jsonb>,
    pub(super) kwargs: Option<Jsonb>,
    pub(super) description: Option<Text>,
    pub(super) notify: Option<Channel>,
    pub(super) options: Options,
}

fn enqueue(
    target: Option<Text>,
    args: Option<Jsonb>,
    kwargs: Option<Jsonb>,
    description: Option<Text>,
    notify: Option<Channel>,
    options: Options,
) -> Outcome<i64> {
    jobs::enqueue(&Call::begin()?.prepare(Job { target, args, kwargs, description, notify, options })?)
}

/// The jobs in a JSON array, with the names and types of `ir_async_call`'s arguments.
const MANY: &str = "
    SELECT x.target, x.args, x.kwargs, x.description, x.notify, x.queue, x.priority, x.run_at, x.max_attempts,
           x.retry_delay, x.timeout, x.identity_key, x.depends_on, x.model, x.res_ids, x.user_id, x.context, x.su
      FROM pg_catalog.jsonb_to_recordset($1) AS x (
           target text, args jsonb, kwargs jsonb, description text, notify jsonb, queue text, priority integer,
           run_at timestamptz, max_attempts integer, retry_delay interval, timeout interval, identity_key text,
           depends_on bigint[], model text, res_ids bigint[], user_id integer, context jsonb, su boolean)";

/// The first thing that is wrong with the elements of a JSON array: a name that is no argument, or NULL for an element that
/// is no object.
const WRONG: &str = "
    SELECT k.name FROM pg_catalog.jsonb_array_elements($1) e (job)
                  CROSS JOIN LATERAL (SELECT pg_catalog.jsonb_typeof(e.job) = 'object') t (is_object)
                  LEFT JOIN LATERAL pg_catalog.jsonb_object_keys(CASE WHEN t.is_object THEN e.job ELSE '{}' END) k (name) ON true
     WHERE NOT t.is_object
        OR k.name <> ALL (ARRAY['target', 'args', 'kwargs', 'description', 'notify', 'queue', 'priority', 'run_at',
           'max_attempts', 'retry_delay', 'timeout', 'identity_key', 'depends_on', 'model', 'res_ids', 'user_id',
           'context', 'su']) LIMIT 1";

/// `ir_async_call_many(jobs jsonb)`: enqueues all jobs of an array of objects, whose names are the arguments of
/// `ir_async_call`, in order, or none; their ids in the same order. Errors: 22023 for anything else than such objects, and
/// those of `ir_async_call`.
#[pg_extern]
fn ir_async_call_many(jobs: Option<Jsonb>) -> Outcome<SetOfIterator<'static, i64>> {
    let jobs = given(jobs, "jobs")?;
    let wrong = |reason: &str| Error::Argument { argument: "jobs", value: jobs.text(), reason: reason.to_owned() };
    if jobs.array_len().is_none() {
        return Err(wrong("it must be a JSON array").into());
    }
    match safely(|| sql::first(WRONG, &[(&jobs).into()], |row| row.get::<Text>(1)))? {
        None => {}
        Some(None) => return Err(wrong("its elements must be objects").into()),
        Some(Some(name)) => return Err(wrong(&format!("a job has no argument \"{}\"", name.0)).into()),
    }
    let wanted = safely(|| sql::rows(MANY, &[(&jobs).into()], wanted_job))?;
    let call = Call::begin()?;
    let prepared = wanted.into_iter().map(|(mut job, notify)| {
        job.notify = notify.map(|json| channel(Some(json), "notify")).transpose()?;
        call.prepare(job)
    });
    let prepared: Vec<jobs::New> = prepared.collect::<Outcome<_>>()?;
    Ok(SetOfIterator::new(jobs::enqueue_all(&prepared)?))
}

fn wanted_job(row: &sql::Row) -> Outcome<(Job, Option<JsonbText>)> {
    let options = Options {
        queue: row.get(6)?,
        priority: row.get(7)?,
        run_at: row.get(8)?,
        max_attempts: row.get(9)?,
        retry_delay: row.get(10)?,
        timeout: row.get(11)?,
        identity_key: row.get(12)?,
        depends_on: row.get(13)?,
        model: row.get(14)?,
        res_ids: row.get(15)?,
        user_id: row.get(16)?,
        context: row.get(17)?,
        su: row.get(18)?,
    };
    let (target, args, kwargs, description) = (row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?);
    Ok((Job { target, args, kwargs, description, notify: None, options }, row.get(5)?))
}

/// The search_path in force: the job runs with it.
fn search_path() -> Rc<str> {
    // SAFETY: PostgreSQL's own copy of the setting, never NULL once a session runs.
    unsafe { std::ffi::CStr::from_ptr(pg_sys::namespace_search_path) }.to_string_lossy().into()
}

/// The current user, who must be able to connect, because the job will (SPEC section 11). Errors: 42501.
fn enqueuing_role() -> Outcome<pg_sys::Oid> {
    // SAFETY: a plain global of the session.
    let role = unsafe { pg_sys::GetUserId() };
    remembered(&ROLES, role, |role| check_role(*role))?;
    Ok(role)
}

fn check_role(role: pg_sys::Oid) -> Outcome<()> {
    let text =
        "SELECT rolcanlogin AND pg_catalog.has_database_privilege(oid, pg_catalog.current_database(), 'CONNECT'),
                       rolname::text FROM pg_catalog.pg_roles WHERE oid = $1";
    let found = super::transaction::safely(|| {
        super::sql::first(text, &[role.into()], |row| Ok((row.need::<bool>(1)?, row.text(2)?)))
    })?;
    let (can, name) = found.unwrap_or_default();
    if can {
        return Ok(());
    }
    Err(report(
        PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
        &format!("role \"{name}\" cannot run jobs"),
        "A job runs in a session of the role that enqueues it; this role lacks LOGIN, or CONNECT on the database.",
        "ALTER ROLE … LOGIN, or GRANT CONNECT ON DATABASE.",
    ))
}

/// `ir_async_call(target, args, kwargs, …)`: enqueues a job in the current transaction; the id. The target is an SQL
/// function (`name` or `schema.name`), called later as the current role with `args` (a JSON array) by position and
/// `kwargs` (a JSON object) by name. Errors: 22004, 22023 for bad arguments, 42883, 42725, 42501 for the target, 42501
/// for a role that cannot log in, 55000 without the workers.
#[pg_extern]
#[allow(clippy::too_many_arguments)]
fn ir_async_call(
    target: Option<Text>,
    args: Option<Jsonb>,
    kwargs: Option<Jsonb>,
    description: Option<Text>,
    notify: Option<JsonbText>,
    queue: Option<Text>,
    priority: Option<i32>,
    run_at: Option<TimestampWithTimeZone>,
    max_attempts: Option<i32>,
    retry_delay: Option<Interval>,
    timeout: Option<Interval>,
    identity_key: Option<Text>,
    depends_on: Option<Vec<Option<i64>>>,
    model: Option<Text>,
    res_ids: Option<Vec<Option<i64>>>,
    user_id: Option<i32>,
    context: Option<Jsonb>,
    su: Option<bool>,
) -> Outcome<i64> {
    let notify = notify.map(|json| channel(Some(json), "notify")).transpose()?;
    let options = Options {
        queue,
        priority,
        run_at,
        max_attempts,
        retry_delay,
        timeout,
        identity_key,
        depends_on,
        model,
        res_ids,
        user_id,
        context,
        su,
    };
    enqueue(target, args, kwargs, description, notify, options)
}

/// `ir_async_call_notify(description, target, args, kwargs, notify, …)`: the same, with a notification on channel
/// `notify` at each state; a NULL description hides the job from the systray.
#[pg_extern]
#[allow(clippy::too_many_arguments)]
fn ir_async_call_notify(
    description: Option<Text>,
    target: Option<Text>,
    args: Option<Jsonb>,
    kwargs: Option<Jsonb>,
    notify: Option<JsonbText>,
    queue: Option<Text>,
    priority: Option<i32>,
    run_at: Option<TimestampWithTimeZone>,
    max_attempts: Option<i32>,
    retry_delay: Option<Interval>,
    timeout: Option<Interval>,
    identity_key: Option<Text>,
    depends_on: Option<Vec<Option<i64>>>,
    model: Option<Text>,
    res_ids: Option<Vec<Option<i64>>>,
    user_id: Option<i32>,
    context: Option<Jsonb>,
    su: Option<bool>,
) -> Outcome<i64> {
    let notify = Some(given(notify, "notify")?);
    ir_async_call(
        target,
        args,
        kwargs,
        description,
        notify,
        queue,
        priority,
        run_at,
        max_attempts,
        retry_delay,
        timeout,
        identity_key,
        depends_on,
        model,
        res_ids,
        user_id,
        context,
        su,
    )
}

/// `ir_async_status(id bigint)`: the job as JSON, NULL when there is none that the caller may see.
#[pg_extern]
fn ir_async_status(id: Option<i64>) -> Outcome<Option<JsonbText>> {
    Ok(jobs::status(given(id, "id")?)?.map(JsonbText))
}

/// `ir_async_complete(id bigint)`: turns `succeeded` into `done`, for the job's own role. True when it did, false when
/// it was done already. Errors: 42704, 42501, 55000.
#[pg_extern]
fn ir_async_complete(id: Option<i64>) -> Outcome<bool> {
    jobs::complete(given(id, "id")?)
}

/// An interval that is an option: not negative, at most a year; `positive` where zero makes no sense. Errors: 22023.
fn bounded(value: Option<Interval>, argument: &'static str, positive: bool) -> Outcome<Option<Interval>> {
    let Some(interval) = value else { return Ok(None) };
    // As PostgreSQL compares intervals: months of 30 days.
    let days = i128::from(interval.months()) * 30 + i128::from(interval.days());
    let micros = days * 86_400_000_000 + i128::from(interval.micros());
    let year = 366 * 86_400_000_000;
    if micros < i128::from(positive) || micros > year {
        let least = if positive { "more than 0" } else { "at least 0" };
        let reason = format!("it must be {least} and at most a year");
        return Err(Error::Argument { argument, value: format!("{micros} microseconds"), reason }.into());
    }
    Ok(Some(interval))
}

/// `ir_async_cancel(id bigint)`: ends a job. One that waits is `cancelled` with this transaction; one that runs is stopped
/// at once and its effect undone, whatever becomes of this transaction. True when it was there to be ended. Errors: 42704,
/// 42501.
#[pg_extern]
fn ir_async_cancel(id: Option<i64>) -> Outcome<bool> {
    jobs::cancel(given(id, "id")?)
}

/// `ir_async_retry(id bigint)`: brings a failed or cancelled job back. True when it did, false when it waits or runs.
/// Errors: 42704, 42501, 55000.
#[pg_extern]
fn ir_async_retry(id: Option<i64>) -> Outcome<bool> {
    jobs::retry(given(id, "id")?)
}

/// `ir_async_claim(queue, max_jobs, worker)`: claims jobs of the queue for a runner outside, in order. They are the
/// session's until it ends, or until their `timeout` has passed since the claim or the last progress. `worker` is a name for
/// the administrator. Errors: 22004, 22023, 53300, 55000 without the workers.
#[pg_extern]
#[allow(clippy::type_complexity)]
fn ir_async_claim(
    queue: Option<Text>,
    max_jobs: Option<i32>,
    worker: Option<Text>,
) -> Outcome<
    TableIterator<
        'static,
        (
            name!(id, i64),
            name!(token, String),
            name!(name, Option<Text>),
            name!(target, Text),
            name!(args, JsonbText),
            name!(kwargs, JsonbText),
            name!(model, Option<Text>),
            name!(res_ids, Option<JsonbText>),
            name!(user_id, Option<i32>),
            name!(context, Option<JsonbText>),
            name!(su, Option<bool>),
            name!(attempt, i32),
            name!(timeout, Option<Interval>),
        ),
    >,
> {
    let queue = filled(queue, "queue")?;
    let max_jobs = given(max_jobs, "max_jobs")?;
    if !(1..=CLAIMED_MAX).contains(&max_jobs) {
        let reason = format!("it must be between 1 and {CLAIMED_MAX}");
        return Err(Error::Argument { argument: "max_jobs", value: max_jobs.to_string(), reason }.into());
    }
    let worker = worker.map(|text| text.0);
    let claimed = jobs::claim_outside(&queue, max_jobs, worker.as_deref(), sessions::mine()?)?;
    Ok(TableIterator::new(claimed.into_iter().map(|job| {
        (
            job.id,
            job.token,
            job.name,
            job.target,
            job.args,
            job.kwargs,
            job.model,
            job.res_ids,
            job.user_id,
            job.context,
            job.su,
            job.attempt,
            job.timeout,
        )
    })))
}

/// Jobs that are claimed at once, at most.
const CLAIMED_MAX: i32 = 10_000;

fn claimed(id: Option<i64>, token: Option<Text>) -> Outcome<Claimed> {
    Ok(Claimed { id: given(id, "id")?, token: given(token, "token")?.0, place: None })
}

/// `ir_async_begin(id, token)`: says that the runner begins a claimed job, of several that it was given at once; holds while
/// the transaction lasts. Returns what is to be called, and the job that follows under the same token (NULL for none); no row
/// when the job is not the runner's any more. Errors: 22004.
#[pg_extern]
#[allow(clippy::type_complexity)]
fn ir_async_begin(
    id: Option<i64>,
    token: Option<Text>,
) -> Outcome<
    TableIterator<
        'static,
        (
            name!(model, Option<Text>),
            name!(res_ids, Option<JsonbText>),
            name!(target, Text),
            name!(args, JsonbText),
            name!(kwargs, JsonbText),
            name!(user_id, Option<i32>),
            name!(context, Option<JsonbText>),
            name!(su, Option<bool>),
            name!(following, Option<i64>),
        ),
    >,
> {
    let begun = jobs::begin(&claimed(id, token)?)?;
    Ok(TableIterator::new(begun.into_iter().map(|job| {
        (job.model, job.res_ids, job.target, job.args, job.kwargs, job.user_id, job.context, job.su, job.following)
    })))
}

/// `ir_async_finish(id, token, result jsonb)`: ends a claimed job: `succeeded` with a result, `done` without one (NULL or
/// null). Errors: 55000 when the job is not the runner's any more, 22004.
#[pg_extern]
fn ir_async_finish(id: Option<i64>, token: Option<Text>, result: Option<JsonbText>) -> Outcome<()> {
    jobs::finish_outside(&claimed(id, token)?, result.as_ref().map(|json| json.0.as_str()))
}

/// `ir_async_fail(id, token, error jsonb)`: ends an attempt of a claimed job, which is made again if `max_attempts` allows
/// and the error has no `"retry": false`. `error` is an object `{"code","message","data"}` as in JSON-RPC, or a string, its
/// message. Errors: 55000 when the job is not the runner's any more, 22004, 22023.
#[pg_extern]
fn ir_async_fail(id: Option<i64>, token: Option<Text>, error: Option<JsonbText>) -> Outcome<()> {
    let error = given(error, "error")?.0;
    let said = job::Said::parse(&error).ok_or_else(|| {
        let reason = "it must be an object with a message, or a string".to_owned();
        Error::Argument { argument: "error", value: error.clone(), reason }
    })?;
    let failed = Failed { payload: said.payload, text: said.text, is_final: said.is_final };
    jobs::fail_outside(&claimed(id, token)?, &failed)
}

/// `ir_async_progress(id, token, percent, message)`: keeps and tells how far a claimed job is, and begins its timeout
/// anew. Errors: 55000 when the job is not the runner's any more, 22004, 22023 for a percentage outside 0 to 100.
#[pg_extern]
fn ir_async_progress(id: Option<i64>, token: Option<Text>, percent: Option<f64>, message: Option<Text>) -> Outcome<()> {
    if let Some(value) = percent.filter(|percent| !(0.0..=100.0).contains(percent)) {
        let reason = "it must be between 0 and 100".to_owned();
        return Err(Error::Argument { argument: "percent", value: value.to_string(), reason }.into());
    }
    jobs::progress(&claimed(id, token)?, percent, message.as_ref().map(|text| text.0.as_str()))
}
