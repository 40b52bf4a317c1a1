//! Runners outside: they claim through SQL, and answer with the fencing token of their claim. A claim ends with the
//! session that made it (`pg::sessions`), or with the job's timeout, which each word of progress restarts.

use super::claims::{Asked, Locked, lanes, lock_first, room};
use super::control::has_rights;
use super::endings::{Failed, fail_at, given_up, succeed_shortly};
use super::{
    Claimed, NOTIFICATION, Place, Token, change_and_tell, new_token, on_named, on_table, stored_channel, table,
};
use crate::core::job::Lane;
use crate::core::json;
use crate::pg::bus;
use crate::pg::datum::{JsonbText, Text};
use crate::pg::report::Outcome;
use crate::pg::transaction::in_passing;
use pgrx::datum::Interval;
use pgrx::prelude::*;
use std::cell::RefCell;

/// A job that a runner outside has claimed: what it needs to run it.
pub struct Assignment {
    pub id: i64,
    pub token: Token,
    pub name: Option<Text>,
    pub target: Text,
    pub args: JsonbText,
    pub kwargs: JsonbText,
    pub model: Option<Text>,
    pub res_ids: Option<JsonbText>,
    pub user_id: Option<i32>,
    pub context: Option<JsonbText>,
    pub su: Option<bool>,
    pub attempt: i32,
    pub timeout: Option<Interval>,
}

/// Claims the first jobs of a queue that can run now and whose role the caller is, or is a member of.
pub fn claim_outside(queue: &str, max_jobs: i32, worker: Option<&str>, session: i64) -> Outcome<Vec<Assignment>> {
    let lanes = lanes_of(queue)?;
    let room = room(queue, max_jobs.into())?;
    let mut jobs = Vec::new();
    for lane in lanes.iter().filter(|lane| lane.is_due()) {
        let wanted = room - i64::try_from(jobs.len()).unwrap_or(room);
        if wanted > 0 {
            jobs.extend(lock_first(lane, wanted, None, Asked::Place)?);
        }
    }
    jobs.iter().map(|locked| assign(locked, worker, session)).collect()
}

/// The lanes of the queue whose jobs the caller has the rights to.
fn lanes_of(queue: &str) -> Outcome<Vec<Lane>> {
    let mut lanes = lanes(Some(queue))?;
    lanes.retain(|lane| has_rights(pg_sys::Oid::from(lane.role)));
    Ok(lanes)
}

/// Claims a job that this transaction has locked.
fn assign(locked: &Locked, worker: Option<&str>, session: i64) -> Outcome<Assignment> {
    let (id, place, token) = (locked.id, Place::of(locked.place)?, new_token()?);
    let text =
        "UPDATE PLACE j SET state = 'processing', attempts = attempts + 1, token = $2, session = $3, worker = $4,
                       claimed_at = pg_catalog.clock_timestamp(),
                       write_date = pg_catalog.clock_timestamp() AT TIME ZONE 'UTC' WHERE id = $1";
    let worker = worker.map(|worker| Text(worker.to_owned()));
    let args = [id.into(), Text(token.clone()).into(), session.into(), worker.into()];
    change_and_tell(text, &[place.name()], &args)?;
    let text = "SELECT name::text, method::text, args, kwargs, res_model::text, res_ids, user_id, context, super_user,
                       attempts, timeout FROM PLACE WHERE id = $1";
    let read = |row: &crate::pg::sql::Row| {
        Ok(Assignment {
            id,
            token: token.clone(),
            name: row.get(1)?,
            target: Text(row.text(2)?),
            args: row.get(3)?.unwrap_or(JsonbText("[]".to_owned())),
            kwargs: row.get(4)?.unwrap_or(JsonbText("{}".to_owned())),
            model: row.get(5)?,
            res_ids: row.get(6)?,
            user_id: row.get(7)?,
            context: row.get(8)?,
            su: row.get(9)?,
            attempt: row.need(10)?,
            timeout: row.get(11)?,
        })
    };
    on_named(text, &[place.name()], &[id.into()], read)?.into_iter().next().ok_or_else(|| given_up(id))
}

/// A job that is begun: what is to be called, and the job that follows under the same token.
pub struct Begun {
    pub model: Option<Text>,
    pub res_ids: Option<JsonbText>,
    pub target: Text,
    pub args: JsonbText,
    pub kwargs: JsonbText,
    pub user_id: Option<i32>,
    pub context: Option<JsonbText>,
    pub su: Option<bool>,
    pub following: Option<i64>,
}

/// Says that the runner begins a claimed job: while its transaction lasts, the job is not given back as one that only waits
/// for another in the same call. None for a runner that has lost it.
pub fn begin(claimed: &Claimed) -> Outcome<Option<Begun>> {
    found_by(claimed, |found| {
        // Weak enough for cancelling, for timing out and for an end of the runner.
        let text =
            "SELECT j.res_model::text, j.res_ids, j.method::text, j.args, j.kwargs, j.user_id, j.context, j.super_user,
                           (SELECT f.id FROM PLACE f WHERE f.token = $2 AND f.state = 'processing'
                               AND (f.run_at, f.id) > (j.run_at, j.id) ORDER BY f.run_at, f.id LIMIT 1)
                      FROM PLACE j WHERE j.id = $1 AND j.token = $2 AND j.state = 'processing' FOR KEY SHARE OF j";
        let args = [claimed.id.into(), Text(claimed.token.clone()).into()];
        let read = |row: &crate::pg::sql::Row| {
            Ok(Begun {
                model: row.get(1)?,
                res_ids: row.get(2)?,
                target: Text(row.text(3)?),
                args: row.get(4)?.unwrap_or(JsonbText("[]".to_owned())),
                kwargs: row.get(5)?.unwrap_or(JsonbText("{}".to_owned())),
                user_id: row.get(6)?,
                context: row.get(7)?,
                su: row.get(8)?,
                following: row.get(9)?,
            })
        };
        Ok(on_named(text, &[Place::of(found.place)?.name()], &args, read)?.into_iter().next())
    })
}

/// Ends a claimed job with a result (NULL and null are none). Errors: 55000 for a runner that has lost it.
pub fn finish_outside(claimed: &Claimed, result: Option<&str>) -> Outcome<()> {
    let result = result.filter(|json| *json != "null");
    end(claimed, |found| succeed_shortly(found.place, claimed, result))
}

/// Ends an attempt of a claimed job with an error. Errors: 55000 for a runner that has lost it.
pub fn fail_outside(claimed: &Claimed, failed: &Failed) -> Outcome<()> {
    end(claimed, |found| fail_at(&Place::of(found.place)?, claimed, failed))
}

/// Ends a claimed job, or its attempt, where it is. Errors: 55000 for a runner that has lost it.
fn end(claimed: &Claimed, work: impl Fn(&Found) -> Outcome<bool>) -> Outcome<()> {
    let ended = found_by(claimed, |found| Ok((found.is_mine() && work(found)?).then_some(())))?;
    ended.ok_or_else(|| given_up(claimed.id))
}

/// Keeps and tells how far a claimed job is; its timeout begins anew. The
/// job's own row stays as it is, so that a transaction that ends the job with an older snapshot is not in its way. Errors:
/// 55000 for a runner that has lost it.
pub fn progress(claimed: &Claimed, percent: Option<f64>, message: Option<&str>) -> Outcome<()> {
    let found = find(claimed)?.filter(Found::is_mine).ok_or_else(|| given_up(claimed.id))?;
    let place = Place::of(found.place)?;
    let text = "INSERT INTO PROGRESS AS p (job_id, percent, message, at)
                VALUES ($1, $2, $3, pg_catalog.clock_timestamp())
                ON CONFLICT (job_id) DO UPDATE SET percent = EXCLUDED.percent, message = EXCLUDED.message,
                                                   at = EXCLUDED.at RETURNING p.job_id";
    on_table(text, &[claimed.id.into(), percent.into(), message.map(|text| Text(text.to_owned())).into()], |_| Ok(()))?;
    let text = "SELECT name::text, notify::text FROM PLACE WHERE id = $1 AND notify IS NOT NULL";
    let told = on_named(text, &[place.name()], &[claimed.id.into()], |row| Ok((row.get::<Text>(1)?, row.text(2)?)))?;
    let Some((name, stored)) = told.into_iter().next() else { return Ok(()) };
    let Some(channel) = stored_channel(&stored)? else { return Ok(()) };
    let body = format!(
        r#"{{"id":{},"name":{},"state":"processing","payload":null,"progress":{{"percent":{},"message":{}}}}}"#,
        claimed.id,
        name.map_or_else(|| "null".to_owned(), |name| json::string(&name.0)),
        percent.filter(|percent| percent.is_finite()).map_or_else(|| "null".to_owned(), |percent| percent.to_string()),
        message.map_or_else(|| "null".to_owned(), json::string),
    );
    bus::publish(&channel, NOTIFICATION, &body)?;
    Ok(())
}

/// Where a claimed job is, and whose.
#[derive(Clone, Copy)]
struct Found {
    place: pg_sys::Oid,
    role: pg_sys::Oid,
    is_odoos: bool,
}

impl Found {
    /// Whether the caller has the rights of the job's role. Odoo runs the jobs of all roles: there the token that it was given is
    /// enough.
    fn is_mine(&self) -> bool {
        self.is_odoos || has_rights(self.role)
    }
}

thread_local! {
    /// The token that this session was last asked about, and where its jobs are: all in one table, and all of one role.
    static LAST: RefCell<Option<(Token, Found)>> = const { RefCell::new(None) };
}

/// Does something where the jobs of that token were found the last time, and if nothing comes of it, where this one is now. None for
/// a runner that has lost it.
fn found_by<T>(claimed: &Claimed, work: impl Fn(&Found) -> Outcome<Option<T>>) -> Outcome<Option<T>> {
    let last =
        LAST.with_borrow(|last| last.as_ref().filter(|(token, _)| *token == claimed.token).map(|(_, found)| *found));
    if let Some(found) = last
        && table()?.children.iter().any(|child| child.relid == found.place)
        && let Some(done) = work(&found)?
    {
        return Ok(Some(done));
    }
    let Some(found) = find(claimed)? else { return Ok(None) };
    LAST.set(Some((claimed.token.clone(), found)));
    work(&found)
}

/// Looks a claimed job up in passing: no lock is left on the tables that it is not in. A job that Odoo or a runner outside
/// works on is not moved (`rotation`).
fn find(claimed: &Claimed) -> Outcome<Option<Found>> {
    let text = "SELECT j.tableoid, j.role, j.res_model IS NOT NULL AND j.session IS NULL
                  FROM TABLE j WHERE j.id = $1 AND j.token = $2 AND j.state = 'processing'";
    let args = [claimed.id.into(), Text(claimed.token.clone()).into()];
    let read =
        |row: &crate::pg::sql::Row| Ok(Found { place: row.need(1)?, role: row.need(2)?, is_odoos: row.need(3)? });
    Ok(in_passing(|| on_table(text, &args, read))?.into_iter().next())
}
