//! The database worker's part of schedules: what is due is enqueued in the transaction that says when it is due next, so
//! that a run is neither lost nor made twice. What was missed while nobody looked is made up for once.

use super::super::datum::{Jsonb, Text};
use super::super::jobs::{self, Model, New};
use super::super::report::Outcome;
use super::super::sql::Row;
use super::super::transaction::{self, Failure};
use super::super::worker;
use super::super::zone::ServerZone;
use super::on_table;
use crate::core::schedule::Expression;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The look-out for schedules nobody announced, and for a clock that was set.
const LOOKOUT: Duration = Duration::from_secs(5);
/// Soonest look after another when somebody asks for it: every job that is enqueued does.
const PAUSE: Duration = Duration::from_millis(100);
/// Before a run that could not be enqueued, or whose schedule is locked, is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// What is due is enqueued for so long in a turn; notifications wait meanwhile.
const TURN: Duration = Duration::from_millis(20);

/// SQLSTATE undefined_table.
const UNDEFINED_TABLE: &str = "42P01";

/// When a schedule is looked after: its time has come; or it ran in what is the future by more than three hours, so that
/// the clock has been wrong and set right (Vixie cron draws the line there). Less than that is waited for.
const DUE: [&str; 2] = [
    "s.next_run <= pg_catalog.now()",
    "s.next_run > pg_catalog.now() AND s.last_run > pg_catalog.now() + '3 hours'::pg_catalog.interval",
];

/// The schedules of this database, for its worker.
pub struct Schedules {
    looked: Option<Instant>,
    /// The same on the wall, in seconds since 1970.
    seen: f64,
    next: Instant,
    /// Those that were due at the last look and have not had their turn. All have it before the next look, so that those
    /// that fail hinder no other.
    waiting: VecDeque<i64>,
}

impl Default for Schedules {
    fn default() -> Schedules {
        Schedules { looked: None, seen: 0.0, next: Instant::now(), waiting: VecDeque::new() }
    }
}

impl Schedules {
    /// When to look again.
    pub fn next(&self) -> Instant {
        self.next
    }

    /// Enqueues what is due. `woken`: somebody may have changed a schedule.
    pub fn mind(&mut self, woken: bool) {
        let now = Instant::now();
        if woken {
            self.next = self.next.min(self.looked.map_or(now, |looked| looked + PAUSE));
        }
        if now < self.next {
            return;
        }
        if self.waiting.is_empty() {
            self.looked = Some(now);
            self.seen = worker::since_1970(worker::now()) as f64 / 1e6;
            match transaction::run(due) {
                Ok(due) => self.waiting = due.into(),
                // The extension is being dropped.
                Err(failure) if failure.code == UNDEFINED_TABLE => {}
                Err(failure) => pgrx::warning!("imbus could not look for schedules: {failure}"),
            }
        }
        self.next = Instant::now() + self.enqueue(now + TURN);
    }

    /// Enqueues what waits until the turn is over, each in a transaction of its own; how long until the next turn.
    fn enqueue(&mut self, end: Instant) -> Duration {
        while let Some(id) = self.waiting.pop_front() {
            if let Err(failure) = transaction::run(|| run(id)) {
                complain(id, &failure);
            }
            if Instant::now() >= end && !self.waiting.is_empty() {
                return Duration::ZERO;
            }
        }
        let (later, is_left) = transaction::run(|| next(self.seen)).unwrap_or_default();
        let wait = Duration::from_secs_f64(later.map_or(f64::MAX, |later| later.max(0.0)).min(LOOKOUT.as_secs_f64()));
        if is_left { wait.min(RETRY) } else { wait }
    }
}

/// Those that are due, in order.
fn due() -> Outcome<Vec<i64>> {
    let [due, early] = DUE;
    let text = format!(
        "SELECT d.id FROM (SELECT s.id, s.next_run FROM SCHEDULES s WHERE {due}
                           UNION ALL SELECT s.id, s.next_run FROM SCHEDULES s WHERE {early}) d ORDER BY d.next_run, d.id"
    );
    on_table(&text, &[], |row| row.need(1))
}

/// Seconds until the next one is due of those that were not at the last look; and whether one that was is due still,
/// since it is locked or has failed.
fn next(seen: f64) -> Outcome<(Option<f64>, bool)> {
    let text = "SELECT EXTRACT(epoch FROM (SELECT min(s.next_run) FROM SCHEDULES s WHERE s.next_run > pg_catalog.to_timestamp($1))
                                          - pg_catalog.clock_timestamp())::float8,
                       EXISTS (SELECT FROM SCHEDULES s WHERE s.next_run <= pg_catalog.to_timestamp($1))";
    let found = on_table(text, &[seen.into()], |row| Ok((row.get(1)?, row.need(2)?)))?;
    Ok(found.into_iter().next().unwrap_or_default())
}

/// Notes why a run could not be enqueued. It stays due.
fn complain(id: i64, failure: &Failure) {
    let text = "UPDATE SCHEDULES SET problem = $2 WHERE id = $1 AND problem IS DISTINCT FROM $2 RETURNING name";
    let noted = transaction::run(|| on_table(text, &[id.into(), Text(failure.to_string()).into()], |row| row.text(1)));
    for name in noted.unwrap_or_default() {
        pgrx::warning!("imbus could not enqueue the job of schedule \"{name}\": {failure}");
    }
}

/// A schedule whose time has come.
struct Due {
    expression: String,
    zone: String,
    /// It is not: the clock has been set back.
    is_early: bool,
    /// The job of its last run has not ended, and runs do not overlap.
    is_busy: bool,
    /// Its role exists.
    has_role: bool,
    job: New,
}

/// Enqueues one if it is due still, and says when it is due next.
fn run(id: i64) -> Outcome<()> {
    let Some(due) = take(id)? else { return Ok(()) };
    if !due.has_role {
        return stop(id, "its role does not exist any more");
    }
    let Ok(next) = next_run(&due) else {
        return stop(id, "its cron_expression or its time_zone is not valid");
    };
    let next = next.map(|next| next as f64);
    let text = if due.is_early {
        "UPDATE SCHEDULES SET next_run = pg_catalog.to_timestamp($2), last_run = pg_catalog.clock_timestamp()
          WHERE id = $1 RETURNING id"
    } else if due.is_busy {
        "UPDATE SCHEDULES SET next_run = pg_catalog.to_timestamp($2), skipped = skipped + 1 WHERE id = $1 RETURNING id"
    } else {
        let job = jobs::enqueue(&due.job)?;
        let text =
            "UPDATE SCHEDULES SET next_run = pg_catalog.to_timestamp($2), last_run = pg_catalog.clock_timestamp(),
                           last_job = $3, runs = runs + 1, problem = NULL WHERE id = $1 RETURNING id";
        on_table(text, &[id.into(), next.into(), job.into()], |_| Ok(()))?;
        return Ok(());
    };
    on_table(text, &[id.into(), next.into()], |_| Ok(()))?;
    Ok(())
}

/// When it is due next, in seconds since 1970; None: never.
fn next_run(due: &Due) -> Outcome<Option<i64>> {
    let zone = ServerZone::named(&due.zone)?;
    Ok(Expression::parse(&due.expression)?.next(worker::unix_time(), &zone))
}

/// Locks a schedule that is due, unless somebody is changing it.
fn take(id: i64) -> Outcome<Option<Due>> {
    let [due, early] = DUE;
    let text = format!(
        "SELECT s.cron_expression, s.time_zone, s.next_run > pg_catalog.now(),
                NOT s.overlap AND EXISTS (SELECT FROM JOBS j WHERE j.id = s.last_job
                                             AND j.state IN ('created', 'processing')),
                EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = s.role),
                s.role, s.search_path, s.next_run, s.description, s.target, s.args, s.kwargs, s.notify,
                s.queue, s.priority, s.max_attempts, s.retry_delay, s.timeout, s.user_id, s.context,
                s.model, s.res_ids, s.su
           FROM SCHEDULES s WHERE s.id = $1 AND ({due} OR {early}) FOR UPDATE OF s SKIP LOCKED"
    );
    let found = on_table(&text, &[id.into()], |row| {
        Ok(Due {
            expression: row.text(1)?,
            zone: row.text(2)?,
            is_early: row.need(3)?,
            is_busy: row.need(4)?,
            has_role: row.need(5)?,
            job: job(row)?,
        })
    })?;
    Ok(found.into_iter().next())
}

/// The job of such a row: its `run_at` is the time that was due.
fn job(row: &Row) -> Outcome<New> {
    Ok(New {
        role: row.need(6)?,
        search_path: row.text(7)?.into(),
        run_at: row.get(8)?,
        description: row.get::<Text>(9)?.map(|text| text.0),
        target: row.text(10)?.into(),
        args: row.get(11)?.unwrap_or_else(|| Jsonb::parse("[]")),
        kwargs: row.get(12)?.unwrap_or_else(|| Jsonb::parse("{}")),
        notify: row.get::<Text>(13)?.map(|text| jobs::stored_channel(&text.0)).transpose()?.flatten(),
        queue: row.text(14)?.into(),
        priority: row.need(15)?,
        max_attempts: row.need(16)?,
        retry_delay: row.get(17)?,
        timeout: row.get(18)?,
        user_id: row.get(19)?,
        context: row.get(20)?,
        model: Model { name: row.get::<Text>(21)?.map(|text| text.0), res_ids: row.get(22)?, su: row.get(23)? },
        identity_key: None,
        depends_on: None,
    })
}

/// Has a schedule run no more, and says why.
fn stop(id: i64, problem: &str) -> Outcome<()> {
    let text = "UPDATE SCHEDULES s SET next_run = NULL, problem = $2,
                       role = (SELECT r.oid FROM pg_catalog.pg_roles r WHERE r.oid = s.role)
                 WHERE s.id = $1 RETURNING s.name";
    for name in on_table(text, &[id.into(), Text(problem.to_owned()).into()], |row| row.text(1))? {
        pgrx::warning!("imbus no longer runs schedule \"{name}\": {problem}");
    }
    Ok(())
}
