//! From `created` to `processing`: which jobs can run, and who has them. Jobs wait in lanes, one for each queue, kind, role
//! and priority, in the order of their times; the index of waiting jobs begins with these, so that a look at the heads of
//! all lanes, and a claim from one of them, cost the same however many jobs wait in them or beside them.

use super::{COUNTING, Claimed, Place, Token, on_named, on_table, rows_changed, table, through_table};
use crate::core::job::{self, Lane};
use crate::core::queues::Limits;
use crate::core::span::Place as At;
use crate::pg::datum::{JsonbText, Text};
use crate::pg::report::{Outcome, internal};
use crate::pg::transaction::{along_bitmaps, in_passing};
use crate::pg::{ffi, guc, sql, worker};
use pgrx::datum::{DatumWithOid, TimestampWithTimeZone};
use pgrx::prelude::*;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

/// Blocked jobs looked at in one go, for those whose dependencies have ended.
const BLOCKED: i64 = 1_000;

/// For functions and runners outside, or for Odoo: as the index has it. A number, since of a condition that is false the planner
/// makes another that no index knows.
const KIND: &str = "(CASE WHEN c.res_model IS NULL THEN 0 ELSE 1 END)";

/// Lanes of a role in a queue in which jobs are due: those after them are not looked at, since they come later anyway. Where
/// each job has a priority of its own, a look at all would be one at all jobs.
const DUE_LANES: i32 = 256;

/// The heads of all lanes, jumped to along the index; $1 is a queue, or NULL for all; $2 is `DUE_LANES`. Times in seconds from
/// now.
const LANES: &str = "
    WITH RECURSIVE lane AS (
      (SELECT c.queue, KIND AS odoo, c.role, c.priority, c.run_at, (c.run_at <= pg_catalog.clock_timestamp())::integer AS due FROM TABLE c
        WHERE c.state = 'created' AND c.ready
          AND (c.queue, KIND, c.role, c.priority) >= (COALESCE($1, ''), 0, '0'::oid, -2147483648)
        ORDER BY c.queue, KIND, c.role, c.priority, c.run_at LIMIT 1)
      UNION ALL
      SELECT n.*, (n.run_at <= pg_catalog.clock_timestamp())::integer
                  + CASE WHEN (n.queue, n.odoo, n.role) = (l.queue, l.odoo, l.role) THEN l.due ELSE 0 END
        FROM lane l CROSS JOIN LATERAL (
        SELECT c.queue, KIND AS odoo, c.role, c.priority, c.run_at FROM TABLE c
         WHERE c.state = 'created' AND c.ready
           AND (c.queue, KIND, c.role, c.priority) > (l.queue, l.odoo, l.role, CASE WHEN l.due < $2 THEN l.priority ELSE 2147483647 END)
         ORDER BY c.queue, KIND, c.role, c.priority, c.run_at LIMIT 1) n
       WHERE $1 IS NULL OR l.queue = $1)
    SELECT queue::text, odoo = 1, role, priority, run_at,
           EXTRACT(epoch FROM GREATEST(LEAST(run_at, '2200-01-01'), '1970-01-01') - pg_catalog.clock_timestamp())::float8
      FROM lane WHERE $1 IS NULL OR queue = $1";

/// The lanes in which jobs wait (of one queue, or of all), those that come first at the front. Of a role in a queue no more
/// than `DUE_LANES` in which jobs are due.
pub fn lanes(queue: Option<&str>) -> Outcome<Vec<Lane>> {
    let read = |row: &sql::Row| {
        Ok(Lane {
            queue: row.text(1)?,
            is_odoo: row.need(2)?,
            role: u32::from(row.need::<pg_sys::Oid>(3)?),
            priority: row.need(4)?,
            first: row.get::<TimestampWithTimeZone>(5)?.map_or(0, TimestampWithTimeZone::into_inner),
            due_in: row.need(6)?,
        })
    };
    let queue = queue.map(|queue| Text(queue.to_owned()));
    let text = LANES.replace("KIND", KIND);
    let mut lanes = on_table(&text, &[queue.into(), DUE_LANES.into()], read)?;
    job::sort(&mut lanes);
    Ok(lanes)
}

/// How many jobs of limited queues are processed, by whomever.
pub fn taken(limits: &Limits) -> Outcome<HashMap<String, usize>> {
    if limits.is_empty() {
        return Ok(HashMap::new());
    }
    let text = "SELECT c.queue::text, pg_catalog.count(*) FROM TABLE c
                 WHERE c.state = 'processing' AND c.queue = ANY($1) GROUP BY c.queue";
    let count = |row: &sql::Row| Ok((row.text(1)?, usize::try_from(row.need::<i64>(2)?).unwrap_or(0)));
    Ok(on_table(text, &[limits.queues().into()], count)?.into_iter().collect())
}

/// How many more jobs of each queue may be processed.
pub struct Room {
    limits: Rc<Limits>,
    taken: HashMap<String, usize>,
}

impl Room {
    /// As things are.
    pub fn now() -> Outcome<Room> {
        let limits = guc::queues();
        Ok(Room { taken: taken(&limits)?, limits })
    }

    /// Of this queue; None for as many as you like.
    pub fn of(&self, queue: &str) -> Option<usize> {
        Some(self.limits.of(queue)?.saturating_sub(self.taken.get(queue).copied().unwrap_or(0)))
    }
}

/// Counting and claiming are one where queues have limits. False when another transaction is at it.
pub fn lock_limits() -> Outcome<bool> {
    Ok(guc::queues().is_empty() || ffi::lock_object(table()?.relid, COUNTING, pg_sys::ExclusiveLock, false))
}

/// Who claims jobs that are not counted keeps nobody from counting any more.
pub fn unlock_limits() -> Outcome<()> {
    if !guc::queues().is_empty() {
        ffi::unlock_object(table()?.relid, COUNTING, pg_sys::ExclusiveLock);
    }
    Ok(())
}

/// How many more jobs of the queue may be processed, at most `wanted`; the limits are locked.
pub fn room(queue: &str, wanted: i64) -> Outcome<i64> {
    let Some(limit) = guc::queues().of(queue).filter(|limit| *limit > 0) else { return Ok(wanted) };
    ffi::lock_object(table()?.relid, COUNTING, pg_sys::ExclusiveLock, true);
    let text = "SELECT pg_catalog.count(*) FROM TABLE WHERE state = 'processing' AND queue = $1";
    let taken = on_table(text, &[Text(queue.to_owned()).into()], |row| row.need::<i64>(1))?.into_iter().next();
    Ok(i64::try_from(limit).unwrap_or(i64::MAX).saturating_sub(taken.unwrap_or(0)).clamp(0, wanted))
}

/// A place in a lane: where the last claim ended, so that the next one need not pass what lies before it: entries of jobs that
/// are done, which stay in the index as long as the oldest transaction anywhere.
#[derive(Clone, Debug)]
pub struct Mark {
    run_at: TimestampWithTimeZone,
    id: i64,
}

impl Mark {
    /// Where a lane begins.
    pub fn first(lane: &Lane) -> Outcome<Mark> {
        Mark::at((lane.first, i64::MIN))
    }

    /// At this place.
    pub fn at(place: At) -> Outcome<Mark> {
        Ok(Mark { run_at: time(place.0)?, id: place.1 })
    }

    /// Its place.
    pub fn place(&self) -> At {
        (self.run_at.into_inner(), self.id)
    }
}

/// A waiting job that this transaction has locked.
pub struct Locked {
    pub id: i64,
    run_at: TimestampWithTimeZone,
    /// The table that it is in, and where.
    pub place: pg_sys::Oid,
    pub row: pg_sys::ItemPointerData,
    /// It is run alone: a runner has died in it, and no other job is to die with it again, or its time is limited.
    is_alone: bool,
    /// Somebody hears of its states or knows it by a name or a key, or it was tried before.
    is_watched: bool,
    pub max_attempts: i32,
    /// What its runner needs, if that was asked for.
    pub work: Option<Work>,
}

impl Locked {
    fn read(row: &sql::Row, asked: Asked) -> Outcome<Locked> {
        let id = row.need(1)?;
        let work = match asked {
            Asked::Place => None,
            Asked::Work => Some(Work { id, ..work(row, 8)? }),
        };
        Ok(Locked {
            id,
            run_at: row.get(2)?.ok_or_else(|| internal("a job without its time"))?,
            place: row.need(3)?,
            row: row.get(4)?.unwrap_or_default(),
            is_alone: row.need(5)?,
            is_watched: row.need(6)?,
            max_attempts: row.need(7)?,
            work,
        })
    }

    /// Where it stands in its lane.
    pub fn mark(&self) -> Mark {
        Mark { run_at: self.run_at, id: self.id }
    }

    /// Whether it may go from `created` to its end at once: nobody looks out for its states, nor for its first attempt.
    pub fn may_skip_a_state(&self) -> bool {
        !self.is_alone && !self.is_watched && self.work.is_some()
    }
}

/// What is read of jobs that are locked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Where they are.
    Place,
    /// What their runner needs, too.
    Work,
}

impl Asked {
    /// Of a job `c`, what `Locked` holds.
    fn columns(self) -> String {
        let place = "c.id, c.run_at, c.tableoid, c.ctid, c.deaths > 0 OR c.timeout IS NOT NULL,
                     COALESCE(c.notify, c.name, c.identity_key) IS NOT NULL OR c.attempts > 0, c.max_attempts";
        match self {
            Asked::Place => place.to_owned(),
            Asked::Work => format!("{place}, {WORK}"),
        }
    }
}

/// Those that may be claimed together, all in one table: the first alone, or those up to the next one that is run alone, or is
/// elsewhere.
pub fn company(locked: &[Locked]) -> &[Locked] {
    let Some(first) = locked.first() else { return &[] };
    let count = match first.is_alone {
        true => 1,
        false => locked.iter().take_while(|job| !job.is_alone && job.place == first.place).count(),
    };
    locked.get(..count).unwrap_or_default()
}

/// What a lane is known by: the first four arguments of the statements on one.
fn key(lane: &Lane) -> [DatumWithOid<'static>; 4] {
    let role = pg_sys::Oid::from(lane.role);
    [Text(lane.queue.clone()).into(), i32::from(lane.is_odoo).into(), role.into(), lane.priority.into()]
}

/// Microseconds since 2000 as PostgreSQL has them.
fn time(at: i64) -> Outcome<TimestampWithTimeZone> {
    TimestampWithTimeZone::try_from(at).map_err(internal)
}

/// Locks the first jobs of a lane that are due and that nobody else has locked, in order, for this transaction, from where
/// the lane begins or from where the last claim ended.
pub fn lock_first(lane: &Lane, most: i64, after: Option<&Mark>, asked: Asked) -> Outcome<Vec<Locked>> {
    let text = "SELECT COLUMNS FROM TABLE c
                 WHERE c.state = 'created' AND c.ready AND c.queue = $1 AND KIND = $2 AND c.role = $3
                   AND c.priority = $4 AND c.run_at <= $5 AND (c.run_at, c.id) > ($6, $7)
                 ORDER BY c.run_at, c.id LIMIT $8 FOR UPDATE OF c SKIP LOCKED";
    let Mark { run_at, id } = after.cloned().map_or_else(|| Mark::first(lane), Ok)?;
    let [queue, kind, role, priority] = key(lane);
    let args = [queue, kind, role, priority, time(worker::now())?.into(), run_at.into(), id.into(), most.into()];
    on_named(text, &[("KIND", KIND), ("COLUMNS", &asked.columns())], &args, |row| Locked::read(row, asked))
}

/// Locks the job that a runner of its role was offered, if it waits still.
pub fn lock_offered(id: i64, role: u32, asked: Asked) -> Outcome<Option<Locked>> {
    // Said so that it is looked up by its id alone, not among all that wait or have waited.
    let text = "SELECT COLUMNS FROM TABLE c
                 WHERE c.id = $1 AND COALESCE(c.state = 'created' AND c.ready, false) AND c.role = $2 AND c.res_model IS NULL
                   AND c.run_at <= pg_catalog.clock_timestamp() FOR UPDATE OF c SKIP LOCKED";
    let args = [id.into(), pg_sys::Oid::from(role).into()];
    let locked = on_named(text, &[("COLUMNS", &asked.columns())], &args, |row| Locked::read(row, asked))?;
    Ok(locked.into_iter().next())
}

/// Locks these jobs for functions, as far as they wait, are due, and nobody else has locked them, in the order in which they are
/// given. Of `role`, if that is known: somebody may have put in another job with such an id by hand, which is his own.
pub fn lock_again(ids: &[i64], role: Option<u32>) -> Outcome<Vec<Locked>> {
    let text = "SELECT COLUMNS FROM TABLE c
                 WHERE c.id = ANY($1) AND COALESCE(c.state = 'created' AND c.ready, false) AND c.res_model IS NULL
                   AND ($2 IS NULL OR c.role = $2) AND c.run_at <= pg_catalog.clock_timestamp() FOR UPDATE OF c SKIP LOCKED";
    let names = [("COLUMNS", &*Asked::Place.columns())];
    let args = [ids.to_vec().into(), role.map(pg_sys::Oid::from).into()];
    let mut locked = on_named(text, &names, &args, |row| Locked::read(row, Asked::Place))?;
    locked.sort_unstable_by_key(|job| ids.iter().position(|id| *id == job.id));
    Ok(locked)
}

/// Whether a job waits to be claimed, and is due.
pub fn waits(id: i64) -> Outcome<bool> {
    let text = "SELECT true FROM TABLE c WHERE c.id = $1 AND COALESCE(c.state = 'created' AND c.ready, false)
                   AND c.run_at <= pg_catalog.clock_timestamp()";
    Ok(!on_table(text, &[id.into()], |_| Ok(()))?.is_empty())
}

/// How many jobs of a lane are due, counted up to `most`.
pub fn count_due(lane: &Lane, most: i64) -> Outcome<i64> {
    let text = "SELECT pg_catalog.count(*) FROM (SELECT FROM TABLE c
                 WHERE c.state = 'created' AND c.ready AND c.queue = $1 AND KIND = $2 AND c.role = $3
                   AND c.priority = $4 AND c.run_at BETWEEN $5 AND $6 LIMIT $7) s";
    let [queue, kind, role, priority] = key(lane);
    let args = [queue, kind, role, priority, time(lane.first)?.into(), time(worker::now())?.into(), most.into()];
    let counted = on_table(&text.replace("KIND", KIND), &args, |row| row.need(1))?;
    Ok(counted.into_iter().next().unwrap_or(0))
}

/// What a runner needs of its job.
#[derive(Clone, Debug)]
pub struct Work {
    pub id: i64,
    pub target: String,
    pub args: String,
    pub kwargs: String,
    pub search_path: String,
    /// How long it may take, in milliseconds.
    pub timeout: Option<i64>,
}

const WORK: &str = "method::text, args, kwargs, search_path,
                    CASE WHEN timeout IS NOT NULL
                         THEN pg_catalog.ceil(EXTRACT(epoch FROM LEAST(timeout, '1 year')) * 1000)::bigint END";

fn work(row: &sql::Row, first: usize) -> Outcome<Work> {
    Ok(Work {
        id: 0,
        target: row.text(first)?,
        args: row.get::<JsonbText>(first + 1)?.map(|json| json.0).unwrap_or_default(),
        kwargs: row.get::<JsonbText>(first + 2)?.map(|json| json.0).unwrap_or_default(),
        search_path: row.text(first + 3)?,
        timeout: row.get(first + 4)?,
    })
}

/// Claims jobs of one table that this transaction has locked, under one token: `processing`, one attempt more. They come in the
/// order in which they were locked.
pub fn take(company: &[&Locked], token: &Token, worker: Option<&str>) -> Outcome<Vec<Work>> {
    let Some(first) = company.first() else { return Ok(Vec::new()) };
    let text = "UPDATE PLACE j SET state = 'processing', attempts = attempts + 1, token = $2, worker = $3,
                claimed_at = pg_catalog.clock_timestamp(), write_date = pg_catalog.clock_timestamp() AT TIME ZONE 'UTC'
          WHERE id = ANY($1)";
    let ids: Vec<i64> = company.iter().map(|job| job.id).collect();
    let args = [ids.clone().into(), Text(token.clone()).into(), worker.map(|name| Text(name.to_owned())).into()];
    let place = Place::of(first.place)?;
    let mut works = rows_changed(text, &[place.name()], WORK, &args, |row, first| {
        Ok(Work { id: row.need(1)?, ..work(row, first)? })
    })?;
    let places: HashMap<i64, usize> = ids.iter().enumerate().map(|(place, id)| (*id, place)).collect();
    works.sort_unstable_by_key(|work| places.get(&work.id).copied());
    Ok(works)
}

/// Which jobs are still processed under a token.
pub fn left(token: &Token) -> Outcome<Vec<i64>> {
    let text = "SELECT id FROM TABLE WHERE token = $1 AND state = 'processing'";
    on_table(text, &[Text(token.clone()).into()], |row| row.need(1))
}

/// Reads a claimed job for the transaction that runs it; None when the token has been given up. No lock is kept: as long as
/// the job runs, its table is nobody's (`rotation`), and its end asks for the token again.
pub fn read(claimed: &Claimed) -> Outcome<Option<Work>> {
    let text = format!("SELECT {WORK} FROM PLACE WHERE id = $1 AND token = $2 AND state = 'processing'");
    let read = |row: &sql::Row| Ok(Work { id: claimed.id, ..work(row, 1)? });
    in_passing(|| {
        Place::find(claimed, |place| {
            let args = [claimed.id.into(), Text(claimed.token.clone()).into()];
            Ok(on_named(&text, &[place.name()], &args, read)?.into_iter().next())
        })
    })
}

/// The blocked jobs after a look at some of them.
pub struct Blocked {
    /// Where to go on; None when the last was seen.
    pub next: Option<i64>,
    /// There are such.
    pub are_there: bool,
    /// Of some it is not known yet whether what they depend on and is not there is to come.
    pub are_unsure: bool,
}

thread_local! {
    /// Blocked jobs whose dependencies are not all there: the next transaction's number when that was seen first, and whether it
    /// was seen since all blocked jobs have been looked at.
    static UNSURE: RefCell<HashMap<i64, (u64, bool)>> = RefCell::default();
}

/// How many of them are kept; further ones wait until these are decided.
const UNSURE_MAX: usize = 100_000;

/// Whether what a job depends on and is not there has been there before: no transaction goes on, by `oldest`, that may have put
/// it in before the job was seen first. Whoever knew its id had put it in by then.
fn is_gone(id: i64, oldest: u64) -> bool {
    UNSURE.with_borrow_mut(|unsure| {
        if unsure.len() >= UNSURE_MAX && !unsure.contains_key(&id) {
            return false;
        }
        // SAFETY: reads a number in shared memory.
        let next = || unsafe { pg_sys::ReadNextFullTransactionId() }.value;
        let (first, is_seen) = unsure.entry(id).or_insert_with(|| (next(), true));
        *is_seen = true;
        let is_gone = *first <= oldest;
        if is_gone {
            unsure.remove(&id);
        }
        is_gone
    })
}

/// Lets those of the blocked jobs wait in their lanes whose dependencies have all ended well. Looks at some, those with ids above
/// `after`.
pub fn release(after: i64) -> Outcome<Blocked> {
    let text = blocked("c.state = 'created' AND c.id > $1 ORDER BY c.id");
    let seen = on_table(&text, &[after.into(), BLOCKED.into(), table()?.sequence.into()], judged)?;
    let are_there = free(&seen)?;
    let is_last = is_all(&seen);
    let next = seen.iter().map(|(id, _)| *id).max().filter(|_| !is_last);
    if next.is_none() {
        // Those that are not blocked any more, for whatever reason, are forgotten.
        UNSURE.with_borrow_mut(|unsure| unsure.retain(|_, (_, is_seen)| std::mem::take(is_seen)));
    }
    let are_unsure = UNSURE.with_borrow(|unsure| !unsure.is_empty());
    Ok(Blocked { next, are_there, are_unsure })
}

/// The same of those that wait for one of these jobs. False when there were more of them than were looked at.
pub fn release_after(ended: Vec<i64>) -> Outcome<bool> {
    let text = blocked("c.depends_on && $1");
    let args = [ended.into(), BLOCKED.into(), table()?.sequence.into()];
    let seen = along_bitmaps(|| through_table(&text, &[], &args, judged))?;
    free(&seen)?;
    Ok(is_all(&seen))
}

/// Reads blocked jobs: their ids, whether all that they depend on has ended well, whether all of it is there. One that is not there
/// has ended well and was deleted, or its transaction goes on still, or, where its id has not been given out, is to be restored
/// yet: sequences come after the rows. `which` is found along one index, and so says nothing of the
/// state where that is not the index of this state.
fn blocked(which: &str) -> String {
    format!(
        "SELECT b.id, d.are_well, d.are_there, pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text::bigint,
                b.state = 'created'
           FROM (SELECT c.id, c.depends_on, c.state FROM TABLE c WHERE NOT c.ready AND {which} LIMIT $2) b
          CROSS JOIN (SELECT COALESCE(pg_catalog.pg_sequence_last_value($3), 0) AS last_id) l
          CROSS JOIN LATERAL (
                SELECT COALESCE(pg_catalog.bool_and(CASE WHEN p.id IS NULL THEN d.id <= l.last_id
                                                         ELSE p.state IN ('succeeded', 'done') END), true) AS are_well,
                       COALESCE(pg_catalog.bool_and(p.id IS NOT NULL), true) AS are_there
                  FROM pg_catalog.unnest(b.depends_on) d (id) LEFT JOIN TABLE p ON p.id = d.id) d"
    )
}

/// A blocked job's id, and whether it is free.
fn judged(row: &sql::Row) -> Outcome<(i64, bool)> {
    let (id, oldest) = (row.need::<i64>(1)?, row.need::<i64>(4)?.cast_unsigned());
    let waits: bool = row.need(5)?;
    Ok((id, waits && row.need(2)? && (row.need(3)? || is_gone(id, oldest))))
}

/// Whether a look has found all that there are.
fn is_all(seen: &[(i64, bool)]) -> bool {
    i64::try_from(seen.len()).unwrap_or(0) < BLOCKED
}

/// Lets those wait in their lanes that are free. Whether others stay blocked.
fn free(seen: &[(i64, bool)]) -> Outcome<bool> {
    let free: Vec<i64> = seen.iter().filter(|(_, is_free)| *is_free).map(|(id, _)| *id).collect();
    let others_stay = free.len() < seen.len();
    if !free.is_empty() {
        let text =
            "UPDATE TABLE SET ready = true WHERE NOT ready AND id IN (SELECT c.id FROM TABLE c WHERE c.id = ANY($1)
                       AND c.state = 'created' AND NOT c.ready FOR UPDATE SKIP LOCKED) RETURNING id";
        on_table(text, &[free.into()], |_| Ok(()))?;
    }
    Ok(others_stay)
}

/// A job that is `processing`, for a worker that asks who still works on it.
pub struct Processing {
    pub claimed: Claimed,
    /// The session that claimed it (`pg::sessions`), where a runner outside did.
    pub session: Option<i64>,
    /// It was claimed before this worker began.
    pub is_old: bool,
    /// It is Odoo's to run.
    pub is_odoo: bool,
    /// It has a timeout, and was claimed, or told of its progress, longer ago than that.
    pub is_overdue: bool,
}

/// The jobs that are `processing` here, those of one token one after another, in the order in which they are run. `began`:
/// when this worker did, in microseconds since 2000.
pub fn processing(began: i64) -> Outcome<Vec<Processing>> {
    let began = time(began)?;
    let text = "SELECT j.id, j.token::text, j.session,
                       j.timeout IS NOT NULL AND GREATEST(j.claimed_at, p.at) + LEAST(j.timeout, '1 year')
                                                 < pg_catalog.clock_timestamp(),
                       j.res_model IS NOT NULL, j.claimed_at < $1
                  FROM TABLE j LEFT JOIN PROGRESS p ON p.job_id = j.id WHERE j.state = 'processing'
                 ORDER BY j.token, j.run_at, j.id";
    on_table(text, &[began.into()], |row| {
        Ok(Processing {
            claimed: Claimed { id: row.need(1)?, token: row.text(2)?, place: None },
            session: row.get(3)?,
            is_overdue: row.need(4)?,
            is_odoo: row.need(5)?,
            is_old: row.need(6)?,
        })
    })
}
