//! What the role that enqueued a job may do with it.

use super::endings::relocate;
use super::identity::{self, Put};
use super::{Place, Token, change_and_tell, enqueue, name_of, on_table, table};
use crate::pg::datum::{JsonbText, Text};
use crate::pg::report::{Outcome, report};
use crate::pg::{shared, sql, wake, worker};
use pgrx::prelude::*;

/// A job's state as JSON for its own role, a member of it, or whoever may read the table; None for others.
pub fn status(id: i64) -> Outcome<Option<String>> {
    let text = "SELECT pg_catalog.jsonb_build_object('id', id, 'name', name, 'state', state, 'payload', payload,
                       'queue', queue, 'priority', priority, 'attempts', attempts, 'max_attempts', max_attempts,
                       'deaths', deaths, 'errors', errors, 'target', method, 'user_id', user_id,
                       'created_at', create_date AT TIME ZONE 'UTC', 'run_at', run_at, 'started_at', claimed_at,
                       'finished_at', finished_at, 'model', res_model, 'worker', worker,
                       'progress', CASE WHEN state = 'processing' THEN (
                            SELECT pg_catalog.jsonb_build_object('percent', p.percent, 'message', p.message)
                              FROM PROGRESS p WHERE p.job_id = j.id AND p.at >= j.claimed_at) END), role
                  FROM TABLE j WHERE id = $1";
    let found = on_table(text, &[id.into()], |row| {
        Ok((row.get::<JsonbText>(1)?.map(|json| json.0), row.need::<pg_sys::Oid>(2)?))
    })?;
    let json = found.into_iter().find(|(_, role)| may_see(*role).unwrap_or(false)).and_then(|(json, _)| json);
    Ok(json)
}

fn may_see(role: pg_sys::Oid) -> Outcome<bool> {
    let relid = table()?.relid;
    // SAFETY: a catalog look-up inside a transaction.
    let read = unsafe { pg_sys::pg_class_aclcheck(relid, pg_sys::GetUserId(), pg_sys::ACL_SELECT as pg_sys::AclMode) };
    Ok(worker::is_monitor() || read == pg_sys::AclResult::ACLCHECK_OK || has_rights(role))
}

/// Turns `succeeded` into `done`, for the job's own role only. True when it did, false when it was done already.
/// Errors: 42704 for an unknown job, 42501 for somebody else's, 40001 for one that the transaction's snapshot does not have, 55000
/// in another state.
pub fn complete(id: i64) -> Outcome<bool> {
    let text = "SELECT role, state::text, tableoid FROM TABLE WHERE id = $1 FOR UPDATE";
    let read = |row: &sql::Row| Ok((row.need::<pg_sys::Oid>(1)?, row.text(2)?, row.need::<pg_sys::Oid>(3)?));
    let mut found = on_table(text, &[id.into()], read)?;
    if found.is_empty() {
        // It has just ended, and changed its table.
        found = on_table(text, &[id.into()], read)?;
    }
    let is_there = !found.is_empty();
    let Some((_, state, place)) = found.into_iter().find(|(role, ..)| has_rights(*role)) else {
        return Err(refused(id, is_there, "Only the role that enqueued a job completes it."));
    };
    match state.as_str() {
        "done" => Ok(false),
        "succeeded" => {
            let text = "UPDATE PLACE j SET state = 'done',
                               write_date = pg_catalog.clock_timestamp() AT TIME ZONE 'UTC' WHERE id = $1";
            change_and_tell(text, &[Place::of(place)?.name()], &[id.into()])?;
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

/// Whether the caller has the rights of a role.
pub(super) fn has_rights(role: pg_sys::Oid) -> bool {
    // SAFETY: catalog look-ups inside a transaction.
    unsafe { pg_sys::has_privs_of_role(pg_sys::GetUserId(), role) }
}

/// Why a job is not changed: it is not there, or somebody else's, or not to be seen by the transaction's snapshot.
fn refused(id: i64, is_there: bool, rule: &str) -> pg_sys::panic::ErrorReport {
    if is_there {
        let message = format!("permission denied for job {id}");
        return report(PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE, &message, rule, "");
    }
    let now = sql::as_of_now(|| on_table("SELECT true FROM TABLE WHERE id = $1", &[id.into()], |_| Ok(())));
    if now.is_ok_and(|found| !found.is_empty()) {
        let message = format!("job {id} is not to be seen by the snapshot of this transaction");
        let detail = "It was enqueued, or has changed its table, since the snapshot was taken.";
        let hint = "Retry the transaction.";
        return report(PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE, &message, detail, hint);
    }
    let message = format!("job {id} does not exist");
    let detail = "Finished jobs are deleted after imbus.job_retention.";
    report(PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT, &message, detail, "")
}

/// A job that somebody wants to change: where it is, its state, its token and its identity_key.
struct Known {
    place: Place,
    state: String,
    token: Option<Token>,
    key: Option<String>,
}

/// Looks up a job that the caller may change: its own role only. A row that was inserted by hand may have the id of
/// somebody else's. Errors: 42704, 42501, 40001.
fn own(id: i64) -> Outcome<Known> {
    let text = "SELECT role, state::text, token::text, identity_key::text, tableoid FROM TABLE WHERE id = $1";
    let found = on_table(text, &[id.into()], |row| {
        let or_none = |text: Option<Text>| text.map(|text| text.0);
        let (token, key) = (or_none(row.get(3)?), or_none(row.get(4)?));
        Ok((row.need::<pg_sys::Oid>(1)?, Known { place: Place::of(row.need(5)?)?, state: row.text(2)?, token, key }))
    })?;
    let is_there = !found.is_empty();
    let known = found.into_iter().find(|(role, _)| has_rights(*role));
    known.map(|(_, known)| known).ok_or_else(|| refused(id, is_there, "Only the role that enqueued a job changes it."))
}

/// Ends a job: one that waits, or has failed and might be brought back, is `cancelled` with this transaction; one that a runner
/// works on is stopped at once, whatever becomes of this transaction, and its effect undone. False when it has ended otherwise
/// already. Errors: 42704, 42501, 40001.
pub fn cancel(id: i64) -> Outcome<bool> {
    loop {
        let known = own(id)?;
        if !matches!(known.state.as_str(), "created" | "processing" | "failed") {
            return Ok(false);
        }
        if let (Some(token), Some(shared)) = (&known.token, shared::get())
            && shared.runners().any(|(_, slot)| slot.ask_cancel(id, token))
        {
            // The database worker asks again should the job not heed it.
            wake::enqueued();
            return Ok(true);
        }
        let text = "UPDATE PLACE j SET state = 'cancelled', token = NULL, session = NULL, finished_at = pg_catalog.clock_timestamp(),
                           write_date = pg_catalog.clock_timestamp() AT TIME ZONE 'UTC'
                     WHERE id = $1 AND state = $2 AND token IS NOT DISTINCT FROM $3";
        let args = [id.into(), Text(known.state).into(), known.token.map(Text).into()];
        if change_and_tell(text, &[known.place.name()], &args)? > 0 {
            return Ok(true);
        }
        // It has just been claimed, or has just ended.
        pgrx::check_for_interrupts!();
    }
}

/// Brings a job back that has failed or was cancelled, as if it were new; its errors stay. True when it did, false when
/// it waits or runs. Errors: 42704, 42501, 40001, 40P01, 25006, 55000 for one that has succeeded, 23505 while another one with its
/// identity_key is unfinished.
pub fn retry(id: i64) -> Outcome<bool> {
    loop {
        let known = own(id)?;
        match known.state.as_str() {
            "failed" | "cancelled" => {}
            "succeeded" | "done" => {
                return Err(report(
                    PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
                    &format!("job {id} has succeeded"),
                    &format!("Its state is \"{}\".", known.state),
                    "Only a job that failed or was cancelled is brought back.",
                ));
            }
            _ => return Ok(false),
        }
        let twin = match &known.key {
            Some(key) => identity::twin(key)?,
            None => None,
        };
        if twin.is_some() {
            return Err(has_twin(id, twin));
        }
        let table = table()?;
        let relid = enqueue::filling(&table).unwrap_or(table.relid);
        let bring = || {
            let condition = "j.id = $1 AND j.state IN ('failed', 'cancelled')";
            relocate(&known.place, &name_of(relid)?, condition, "", &BROUGHT_BACK, &[id.into()])
        };
        match identity::put(&table, known.key.as_deref(), relid, bring)? {
            // Somebody else has just brought it back, or it has another table; or its twin is to be seen now.
            Put::Alone(0) | Put::Beside(0) | Put::Before => {
                pgrx::check_for_interrupts!();
            }
            Put::Alone(_) => {
                wake::enqueued_blocked();
                return Ok(true);
            }
            Put::Beside(_) => return Err(has_twin(id, None)),
        }
    }
}

/// What changes when a job is brought back.
const BROUGHT_BACK: [(&str, &str); 8] = [
    ("state", "'created'"),
    ("attempts", "0"),
    ("deaths", "0"),
    ("payload", "NULL"),
    ("traceback", "NULL"),
    ("finished_at", "NULL"),
    ("run_at", "pg_catalog.clock_timestamp()"),
    ("write_date", "pg_catalog.clock_timestamp() AT TIME ZONE 'UTC'"),
];

/// Why a job cannot be brought back.
fn has_twin(id: i64, twin: Option<i64>) -> pg_sys::panic::ErrorReport {
    let twin = twin.map_or_else(|| "Another job".to_owned(), |twin| format!("Job {twin}"));
    report(
        PgSqlErrorCode::ERRCODE_UNIQUE_VIOLATION,
        &format!("job {id} cannot be brought back now"),
        &format!("{twin} has the same identity_key, and has not ended."),
        "Wait for that one, or cancel it.",
    )
}
