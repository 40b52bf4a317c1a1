//! How an attempt ends: with a result, with a failure, with its runner.

use super::claims::{Locked, lock_again, take, waits};
use super::enqueue::{indexes, is_not_own};
use super::{Claimed, Place, Token, change_and_tell, move_and_tell, new_token, on_named, on_table, table};
use crate::core::job::{self, State};
use crate::pg::datum::{JsonbText, Str, Text};
use crate::pg::report::{Outcome, internal, report};
use crate::pg::transaction::{Failure, by_hashing, by_places};
use crate::pg::{direct, sql, wake, worker};
use pgrx::datum::{DatumWithOid, TimestampWithTimeZone};
use pgrx::prelude::*;

/// Ends jobs of this table whose rows fulfil a condition on `j`, and puts them with these changes where ended jobs are.
/// `given` is what they are joined with, as `d (id, payload)`, or nothing. Returns how many.
fn end(place: &Place, condition: &str, given: &str, changes: Changes<'_>, args: &[DatumWithOid<'_>]) -> Outcome<usize> {
    relocate(place, &table()?.name, condition, given, changes, args)
}

/// Columns, and what stands there from now on: expressions on the former row `g`.
pub(super) type Changes<'a> = &'a [(&'a str, &'a str)];

/// The same into the table of this name.
pub(super) fn relocate(
    place: &Place,
    to: &str,
    condition: &str,
    given: &str,
    changes: Changes<'_>,
    args: &[DatumWithOid<'_>],
) -> Outcome<usize> {
    let table = table()?;
    let value = |column: &String| {
        let changed = changes.iter().find(|(name, _)| name == column);
        changed.map_or_else(|| format!("g.{column}"), |(_, value)| (*value).to_owned())
    };
    let (columns, values) = (table.columns.join(", "), table.columns.iter().map(value).collect::<Vec<_>>().join(", "));
    let (using, more) = if given.is_empty() { ("", "") } else { ("USING", ", d.payload AS given") };
    let text = format!(
        "WITH g AS (DELETE FROM PLACE j {using} {given} WHERE {condition} RETURNING j.*{more})
         INSERT INTO NEXT AS j (COLUMNS) SELECT VALUES FROM g"
    );
    move_and_tell(&text, &[place.name(), ("NEXT", to), ("COLUMNS", &columns), ("VALUES", &values)], args)
}

/// What changes when a job ends, but for its state and its payload.
const ENDED: [(&str, &str); 5] = [
    ("token", "NULL"),
    ("session", "NULL"),
    ("traceback", "NULL"),
    ("finished_at", "pg_catalog.clock_timestamp()"),
    ("write_date", "pg_catalog.clock_timestamp() AT TIME ZONE 'UTC'"),
];

/// The state of a job whose result is given.
const STATE: (&str, &str) = ("state", "CASE WHEN g.given IS NULL THEN 'done' ELSE 'succeeded' END");

fn payload(result: Option<&str>) -> Option<String> {
    result.map(|json| format!(r#"{{"result":{json}}}"#))
}

/// Ends a job with its result, in the transaction that did the work. Errors: 55000 when the token has been given up.
pub fn succeed(claimed: &Claimed, result: Option<&str>) -> Outcome<()> {
    let ended = Place::find(claimed, |place| Ok(succeed_at(place, claimed, result)?.then_some(())))?;
    ended.ok_or_else(|| given_up(claimed.id))
}

/// The same in this table; false when the job is not there.
pub(super) fn succeed_at(place: &Place, claimed: &Claimed, result: Option<&str>) -> Outcome<bool> {
    let payload = payload(result).map(JsonbText);
    let [token, session, traceback, finished_at, write_date] = ENDED;
    let changes = [("state", "$3"), ("payload", "$4"), token, session, traceback, finished_at, write_date];
    let state = State::ended(result.is_some()).as_str().to_owned();
    let args = [claimed.id.into(), Text(claimed.token.clone()).into(), Text(state).into(), payload.into()];
    let is_ended = end(place, "j.id = $1 AND j.token = $2 AND j.state = 'processing'", "", &changes, &args)? > 0;
    if is_ended {
        wake::ended(&[claimed.id]);
    }
    Ok(is_ended)
}

/// The same in this table, the short way where there is one. The row is locked as SQL does it: whoever is just changing it is
/// waited for. Errors: 40001 when it has changed since the transaction's snapshot, where that is kept (REPEATABLE READ).
pub(super) fn succeed_shortly(place: pg_sys::Oid, claimed: &Claimed, result: Option<&str>) -> Outcome<bool> {
    let text = "SELECT j.ctid, j.notify IS NULL FROM PLACE j WHERE j.id = $1 AND j.token = $2 AND j.state = 'processing' FOR UPDATE";
    let args = [claimed.id.into(), Text(claimed.token.clone()).into()];
    let named = Place::of(place)?;
    let read = |row: &sql::Row| Ok((row.get::<pg_sys::ItemPointerData>(1)?.unwrap_or_default(), row.need::<bool>(2)?));
    let Some((row, is_quiet)) = on_named(text, &[named.name()], &args, read)?.into_iter().next() else {
        return Ok(false);
    };
    if is_quiet && let Some(moved) = move_directly(place, &[(row, claimed.id)], &[payload(result)], None)? {
        wake::ended(&[claimed.id]);
        return Ok(moved);
    }
    succeed_at(&named, claimed, result)
}

/// Ends jobs with their results, in the transaction that did the work; they were claimed in the table `place`. False when
/// one of them was not the runner's any more, so that the transaction must not be committed.
pub fn succeed_all(place: pg_sys::Oid, token: &Token, results: &[(i64, Option<String>)]) -> Outcome<bool> {
    let [no_token, session, traceback, finished_at, write_date] = ENDED;
    let changes = [STATE, ("payload", "g.given::jsonb"), no_token, session, traceback, finished_at, write_date];
    let given = "ROWS FROM (pg_catalog.unnest($1::bigint[]), pg_catalog.unnest($2::text[])) d (id, payload)";
    let condition = "j.id = d.id AND j.token = $3 AND j.state = 'processing'";
    let ids: Vec<i64> = results.iter().map(|(id, _)| *id).collect();
    let payloads: Vec<Option<String>> = results.iter().map(|(_, result)| payload(result.as_deref())).collect();
    let args = [ids.clone().into(), payloads.into(), Text(token.clone()).into()];
    let mut changed = by_hashing(|| end(&Place::of(place)?, condition, given, &changes, &args))?;
    if changed < results.len() {
        // They may have been moved since (`rotation`).
        changed += by_hashing(|| end(&Place::anywhere()?, condition, given, &changes, &args))?;
    }
    wake::ended(&ids);
    Ok(changed == results.len())
}

/// Ends jobs with their results that were never `processing`: this transaction has locked them, all in one table, and did the
/// work. False when one of them is not as it was, so that the transaction must not be committed.
pub fn succeed_at_once(jobs: &[(&Locked, Option<String>)], began: TimestampWithTimeZone) -> Outcome<bool> {
    let Some((first, _)) = jobs.first() else { return Ok(true) };
    let (rows, payloads): (Vec<_>, Vec<_>) =
        jobs.iter().map(|(job, result)| ((job.row, job.id), payload(result.as_deref()))).unzip();
    let moved = match move_directly(first.place, &rows, &payloads, Some(began))? {
        Some(moved) => moved,
        None => move_by_sql(first.place, jobs, began)?,
    };
    wake::ended(&jobs.iter().map(|(job, _)| job.id).collect::<Vec<_>>());
    Ok(moved)
}

/// The end of a job: its result as the payload has it, when it began, if that is not known yet, and when it ended.
struct Ending<'a> {
    payload: Option<&'a str>,
    began: Option<TimestampWithTimeZone>,
    ended: TimestampWithTimeZone,
}

/// What stands in a column then.
type Make = fn(&Ending<'_>) -> Option<pg_sys::Datum>;

/// What changes in a column by a job's end: its name, its type, what stands there.
type Ended = (&'static str, pg_sys::Oid, Make);

/// By each end.
const BY_AN_END: [Ended; 7] = [
    ("state", pg_sys::VARCHAROID, |ending| Str(State::ended(ending.payload.is_some()).as_str()).into_datum()),
    ("payload", pg_sys::JSONBOID, |ending| ending.payload.map(|json| JsonbText(json.to_owned())).into_datum()),
    ("token", pg_sys::TEXTOID, |_| None),
    ("session", pg_sys::INT8OID, |_| None),
    ("traceback", pg_sys::TEXTOID, |_| None),
    ("finished_at", pg_sys::TIMESTAMPTZOID, |ending| ending.ended.into_datum()),
    // In UTC, which is how PostgreSQL keeps what has a time zone.
    ("write_date", pg_sys::TIMESTAMPOID, |ending| ending.ended.into_datum()),
];

/// By that of a job that was never `processing`, too.
const AT_ONCE: [Ended; 3] = [
    ("worker", pg_sys::VARCHAROID, |_| None),
    ("attempts", pg_sys::INT4OID, |_| 1_i32.into_datum()),
    ("claimed_at", pg_sys::TIMESTAMPTZOID, |ending| ending.began.into_datum()),
];

/// What makes the columns of an open table that change, None where what stands there stays. None for a table that is not as it was
/// made.
fn layout(table: &direct::Table, changes: &[Ended]) -> Option<Vec<Option<Make>>> {
    if table.triggers().any(|(name, _)| is_not_own(name)) {
        return None;
    }
    let make = |column: direct::Column<'_>| {
        let change = changes.iter().find(|(name, ..)| name.as_bytes() == column.name && !column.is_dropped);
        let Some((_, of, make)) = change else { return Some(None) };
        (column.type_oid == *of && !column.has_modifier).then_some(Some(*make))
    };
    let layout: Vec<Option<Make>> = table.columns().map(make).collect::<Option<_>>()?;
    (layout.iter().flatten().count() == changes.len()).then_some(layout)
}

/// The short way (`direct`) of jobs that this transaction has locked where they are, with their ids and their payloads, `began` for
/// those that were never `processing`; None where the long one must be gone.
fn move_directly(
    place: pg_sys::Oid,
    jobs: &[(pg_sys::ItemPointerData, i64)],
    payloads: &[Option<String>],
    began: Option<TimestampWithTimeZone>,
) -> Outcome<Option<bool>> {
    let table = table()?;
    let changes = [&BY_AN_END[..], if began.is_some() { &AT_ONCE } else { &[] }].concat();
    let ended = TimestampWithTimeZone::try_from(worker::now()).map_err(internal)?;
    let value = |layout: &Vec<Option<Make>>, row: usize, column: usize| {
        let payload = payloads.get(row).and_then(Option::as_deref);
        match layout.get(column).copied().flatten() {
            Some(make) => direct::Value::Other(make(&Ending { payload, began, ended })),
            None => direct::Value::Same,
        }
    };
    direct::relocate([place, table.relid], indexes(&table), |table| layout(table, &changes), jobs, value)
}

/// The long way.
fn move_by_sql(place: pg_sys::Oid, jobs: &[(&Locked, Option<String>)], began: TimestampWithTimeZone) -> Outcome<bool> {
    let [_, session, traceback, finished_at, write_date] = ENDED;
    let attempts = [("attempts", "1"), ("claimed_at", "$4"), ("worker", "NULL")];
    let changes =
        [&[STATE, ("payload", "g.given::jsonb"), session, traceback, finished_at, write_date][..], &attempts].concat();
    let given =
        "ROWS FROM (pg_catalog.unnest($1::tid[]), pg_catalog.unnest($2::bigint[]), pg_catalog.unnest($3::text[]))
                 d (place, id, payload)";
    let condition = "j.ctid = d.place AND j.id = d.id AND j.state = 'created' AND j.ready";
    let places: Vec<pg_sys::ItemPointerData> = jobs.iter().map(|(job, _)| job.row).collect();
    let ids: Vec<i64> = jobs.iter().map(|(job, _)| job.id).collect();
    let payloads: Vec<Option<String>> = jobs.iter().map(|(_, result)| payload(result.as_deref())).collect();
    let args = [places.into(), ids.into(), payloads.into(), began.into()];
    let changed = by_places(|| end(&Place::of(place)?, condition, given, &changes, &args))?;
    Ok(changed == jobs.len())
}

/// Records the failed attempt of such a job. False when it is not as it was.
pub fn fail_at_once(job: &Locked, failed: &Failed, began: TimestampWithTimeZone) -> Outcome<bool> {
    let state = job::after_failure(1, job.max_attempts);
    let (changes, condition) =
        ("attempts = 1, claimed_at = $6, worker = NULL,", "COALESCE(j.state = 'created' AND j.ready, false)");
    let attempt = Attempt { state, id: job.id, payload: &failed.payload, traceback: &failed.text, is_delayed: true };
    Ok(end_attempt(&Place::of(job.place)?, &attempt, "1", changes, condition, began.into())? > 0)
}

/// Gives back what was claimed under a token, but for one job: none of these was begun, or what was done of them is undone.
/// Whatever Odoo has begun it has locked (`begin`), and keeps.
pub fn give_back_others(token: &Token, but: i64) -> Outcome<usize> {
    give_back(token, "<> $2 FOR UPDATE", but)
}

/// Gives back a claimed job that nobody has begun, or that was stopped for another's sake: that is no attempt. One whose row
/// somebody has locked is left for the next look.
pub fn give_back_one(claimed: &Claimed) -> Outcome<()> {
    give_back(&claimed.token, "= $2 FOR NO KEY UPDATE", claimed.id)?;
    Ok(())
}

/// Gives back the jobs of a token whose ids, and whose locks, are these.
fn give_back(token: &Token, which: &str, id: i64) -> Outcome<usize> {
    let text = format!(
        "UPDATE TABLE j SET state = 'created', attempts = attempts - 1, token = NULL, session = NULL,
                            write_date = pg_catalog.clock_timestamp() AT TIME ZONE 'UTC'
          WHERE token = $1 AND id IN (SELECT id FROM TABLE WHERE token = $1 AND state = 'processing' AND id {which} SKIP LOCKED)"
    );
    let given_back = change_and_tell(&text, &[], &[Text(token.clone()).into(), id.into()])?;
    wake::enqueued();
    Ok(given_back)
}

/// What a runner hears that answers for a job it has lost: whatever it did in the same transaction is undone.
pub fn given_up(id: i64) -> pgrx::pg_sys::panic::ErrorReport {
    report(
        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        &format!("job {id} is not this runner's any more"),
        "Its session had ended, its timeout had passed, somebody cancelled it, or it has ended already.",
        "Roll back, and claim the next one.",
    )
}

/// Why an attempt failed.
pub struct Failed {
    /// `{"error":{"code","message","data"}}`, as JSON text.
    pub payload: String,
    /// For column `traceback`.
    pub text: String,
    /// No other attempt can do better.
    pub is_final: bool,
}

impl From<&Failure> for Failed {
    fn from(failure: &Failure) -> Failed {
        let (detail, hint) = (failure.detail.as_deref(), failure.hint.as_deref());
        let payload = job::error_payload(&failure.code, &failure.message, detail, hint);
        Failed { payload, text: failure.to_string(), is_final: false }
    }
}

/// Records a failed attempt: the job waits for the next one, or has failed. False when it was not the runner's any more.
pub fn fail(claimed: &Claimed, failed: &Failed) -> Outcome<bool> {
    let ended = Place::find(claimed, |place| Ok(fail_at(place, claimed, failed)?.then_some(())))?;
    Ok(ended.is_some())
}

/// The same in this table; false when the job is not there.
pub(super) fn fail_at(place: &Place, claimed: &Claimed, failed: &Failed) -> Outcome<bool> {
    let text = "SELECT attempts, max_attempts FROM PLACE WHERE id = $1 AND token = $2 FOR NO KEY UPDATE";
    let key = [claimed.id.into(), Text(claimed.token.clone()).into()];
    let attempts = on_named(text, &[place.name()], &key, |row| Ok((row.need::<i32>(1)?, row.need::<i32>(2)?)))?;
    let Some((attempts, max_attempts)) = attempts.into_iter().next() else { return Ok(false) };
    let state = if failed.is_final { State::Failed } else { job::after_failure(attempts, max_attempts) };
    let attempt =
        Attempt { state, id: claimed.id, payload: &failed.payload, traceback: &failed.text, is_delayed: true };
    end_claimed(place, claimed, &attempt)?;
    Ok(true)
}

/// Records the death of a runner in a job that it had locked and not claimed. False when somebody has locked it again.
pub fn died_unclaimed(id: i64) -> Outcome<bool> {
    let locked = lock_again(&[id], None)?;
    let Some(job) = locked.first() else { return Ok(!waits(id)?) };
    let token = new_token()?;
    take(&[job], &token, None)?;
    runner_died(&Claimed { id, token, place: None })?;
    Ok(true)
}

/// Records the death of a runner in a job: at once `created` again, or failed after the fifth. One whose row somebody has
/// locked is left for the next look: a worker waits for nobody.
pub fn runner_died(claimed: &Claimed) -> Outcome<()> {
    let text = "UPDATE TABLE SET deaths = deaths + 1, attempts = attempts - 1
                 WHERE token = $2 AND id = (SELECT id FROM TABLE WHERE id = $1 AND token = $2 AND state = 'processing'
                               FOR NO KEY UPDATE SKIP LOCKED) RETURNING deaths";
    let key = [claimed.id.into(), Text(claimed.token.clone()).into()];
    let deaths = on_table(text, &key, |row| row.need::<i32>(1))?;
    let Some(deaths) = deaths.into_iter().next() else { return Ok(()) };
    let message = format!("the runner died {deaths} times in this job");
    let payload = job::error_payload("runner_died", &message, None, None);
    let state = job::after_death(deaths);
    let attempt = Attempt { state, id: claimed.id, payload: &payload, traceback: &message, is_delayed: false };
    end_claimed(&Place::anywhere()?, claimed, &attempt)
}

/// An attempt that has not succeeded.
struct Attempt<'a> {
    /// What becomes of the job.
    state: State,
    id: i64,
    payload: &'a str,
    traceback: &'a str,
    /// The next one comes later.
    is_delayed: bool,
}

/// Ends the attempt of a claimed job.
fn end_claimed(place: &Place, claimed: &Claimed, attempt: &Attempt<'_>) -> Outcome<()> {
    let condition = "j.token = $6 AND j.state = 'processing'";
    end_attempt(
        place,
        attempt,
        "j.attempts",
        "token = NULL, session = NULL,",
        condition,
        Text(claimed.token.clone()).into(),
    )?;
    Ok(())
}

/// Ends an attempt where the job is: a row that Odoo has locked as its own (`begin`) could not be moved. `number` is the attempt's,
/// `changes` are further ones, `condition` is that on the job, whose argument is $6. Returns how many jobs changed.
fn end_attempt(
    place: &Place,
    attempt: &Attempt<'_>,
    number: &str,
    changes: &str,
    condition: &str,
    argument: DatumWithOid<'_>,
) -> Outcome<usize> {
    // Each attempt that fails waits twice as long as the one before, up to an hour, and a little more at random, so
    // that what failed together does not come back together.
    let text = "UPDATE PLACE j SET CHANGES state = $2, traceback = $4,
                       payload = CASE WHEN $2 = 'failed' THEN $3 END,
                       errors = (CASE WHEN pg_catalog.jsonb_array_length(j.errors) < 20 THEN j.errors
                                      ELSE j.errors - 0 END)
                                || pg_catalog.jsonb_build_array(pg_catalog.jsonb_build_object(
                                       'attempt', NUMBER, 'at', pg_catalog.clock_timestamp(),
                                       'error', $3 -> 'error')),
                       finished_at = CASE WHEN $2 = 'failed' THEN pg_catalog.clock_timestamp() END,
                       run_at = CASE WHEN $5 AND $2 = 'created'
                                     THEN pg_catalog.clock_timestamp()
                                          + LEAST(LEAST(j.retry_delay, '1 year') * pg_catalog.power(
                                                      2::float8, LEAST(NUMBER, 20)::float8 - 1),
                                                  GREATEST('1 hour', LEAST(j.retry_delay, '1 year')))
                                            * (1 + pg_catalog.random() / 4)
                                     ELSE j.run_at END,
                       write_date = pg_catalog.clock_timestamp() AT TIME ZONE 'UTC'
                 WHERE j.id = $1 AND CONDITION";
    let args = [
        attempt.id.into(),
        Text(attempt.state.as_str().to_owned()).into(),
        JsonbText(attempt.payload.to_owned()).into(),
        Text(attempt.traceback.to_owned()).into(),
        attempt.is_delayed.into(),
        argument,
    ];
    let names = [place.name(), ("NUMBER", number), ("CHANGES", changes), ("CONDITION", condition)];
    let changed = change_and_tell(text, &names, &args)?;
    if attempt.state.is_unfinished() {
        wake::enqueued()
    } else {
        wake::ended(&[attempt.id])
    }
    Ok(changed)
}

/// Records that a job was stopped because somebody wanted it to.
pub fn cancelled(claimed: &Claimed) -> Outcome<()> {
    let text = "UPDATE TABLE j SET state = 'cancelled', token = NULL, session = NULL, finished_at = pg_catalog.clock_timestamp(),
                       write_date = pg_catalog.clock_timestamp() AT TIME ZONE 'UTC'
                 WHERE id = $1 AND token = $2 AND state = 'processing'";
    change_and_tell(text, &[], &[claimed.id.into(), Text(claimed.token.clone()).into()])?;
    Ok(())
}
