//! The jobs in SQL: thin wrappers. Their SQL declarations, with the comments users read, stand in sql/imbus--*.sql.

use super::call::{self, Arguments};
use super::datum::{JsonbText, Text};
use super::functions::{channel, filled, given};
use super::report::{Outcome, not_preloaded, report};
use super::{jobs, shared};
use crate::core::channel::Channel;
use crate::core::error::Error;
use pgrx::datum::{Interval, TimestampWithTimeZone};
use pgrx::prelude::*;

/// The optional arguments that `ir_async_call` and `ir_async_call_notify` share.
struct Options {
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
    context: Option<JsonbText>,
    su: Option<bool>,
}

impl Options {
    /// Refuses what this version cannot do, rather than ignore it.
    fn check(&self) -> Outcome<()> {
        let unsupported = |what: &str, hint: &str| {
            Err(report(
                PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
                &format!("{what} is not supported yet"),
                "",
                hint,
            ))
        };
        if self.model.is_some() || self.res_ids.is_some() || self.su.is_some() {
            return unsupported(
                "a job on an Odoo model",
                "Leave model, res_ids and su out: the target is an SQL function.",
            );
        }
        if self.timeout.is_some() {
            return unsupported("timeout", "Leave timeout out.");
        }
        Ok(())
    }
}

fn enqueue(
    target: Option<Text>,
    args: Option<JsonbText>,
    kwargs: Option<JsonbText>,
    description: Option<Text>,
    notify: Option<Channel>,
    options: Options,
) -> Outcome<i64> {
    if shared::get().is_none() {
        return Err(not_preloaded("a job"));
    }
    options.check()?;
    let target = filled(target, "target")?;
    let args = args.map_or_else(|| "[]".to_owned(), |json| json.0);
    let kwargs = kwargs.map_or_else(|| "{}".to_owned(), |json| json.0);
    let arguments = Arguments::parse(&args, &kwargs)?;
    let role = enqueuing_role()?;
    let max_attempts = options.max_attempts.unwrap_or(1);
    if max_attempts < 1 {
        let value = max_attempts.to_string();
        return Err(Error::Argument { argument: "max_attempts", value, reason: "it must be at least 1".into() }.into());
    }
    let signature = call::resolve(&target, &arguments)?;
    jobs::enqueue(jobs::New {
        target: signature,
        args,
        kwargs,
        description: description.map(|text| text.0),
        notify,
        queue: options.queue.map_or_else(|| "default".to_owned(), |text| text.0),
        priority: options.priority.unwrap_or(10),
        run_at: options.run_at,
        max_attempts,
        retry_delay: options.retry_delay,
        identity_key: options.identity_key.map(|text| text.0),
        depends_on: options.depends_on.map(|ids| ids.into_iter().flatten().collect()),
        user_id: options.user_id,
        context: options.context.map(|json| json.0),
        role,
        search_path: search_path(),
    })
}

/// The search_path in force: the job runs with it.
fn search_path() -> String {
    // SAFETY: PostgreSQL's own copy of the setting, never NULL once a session runs.
    unsafe { std::ffi::CStr::from_ptr(pg_sys::namespace_search_path) }.to_string_lossy().into_owned()
}

/// The current user, who must be able to connect, because the job will (SPEC section 11). Errors: 42501.
fn enqueuing_role() -> Outcome<pg_sys::Oid> {
    // SAFETY: a plain global of the session.
    let role = unsafe { pg_sys::GetUserId() };
    let text =
        "SELECT rolcanlogin AND pg_catalog.has_database_privilege(oid, pg_catalog.current_database(), 'CONNECT'),
                       rolname::text FROM pg_catalog.pg_roles WHERE oid = $1";
    let found = super::transaction::safely(|| {
        super::sql::first(text, &[role.into()], |row| Ok((row.need::<bool>(1)?, row.text(2)?)))
    })?;
    let (can, name) = found.unwrap_or_default();
    if can {
        return Ok(role);
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
/// for a role that cannot log in, 0A000 for what this version cannot do, 55000 without the workers.
#[pg_extern]
#[allow(clippy::too_many_arguments)]
fn ir_async_call(
    target: Option<Text>,
    args: Option<JsonbText>,
    kwargs: Option<JsonbText>,
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
    context: Option<JsonbText>,
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
    args: Option<JsonbText>,
    kwargs: Option<JsonbText>,
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
    context: Option<JsonbText>,
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
