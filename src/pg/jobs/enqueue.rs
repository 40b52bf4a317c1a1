//! Enqueueing a job, and what becomes of one that is inserted by hand.

use super::identity::{self, Put};
use super::{NOTIFICATION, Place, Table, change, name_of, on_named, on_table, rotation, table};
use crate::core::channel::Channel;
use crate::core::job::{self, State};
use crate::pg::datum::{Jsonb, JsonbText, Str};
use crate::pg::direct::{self, Indexes};
use crate::pg::report::{Outcome, internal, report};
use crate::pg::{bus, catalog, guc, wake, worker};
use pgrx::datum::{DatumWithOid, Interval, TimestampWithTimeZone};
use pgrx::pg_sys::panic::ErrorReportable;
use pgrx::prelude::*;
use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

thread_local! {
    /// imbus itself inserts a job: the trigger keeps the role it was given.
    static ENQUEUEING: Cell<bool> = const { Cell::new(false) };
    /// That of the table that was last put into.
    static LAYOUT: RefCell<Option<Known>> = const { RefCell::new(None) };
    /// The errors of a new job.
    static NO_ERRORS: Jsonb = Jsonb::parse("[]");
}

/// What makes the value of each column; None for NULL.
type Layout = Rc<[Option<Make>]>;

/// A table's layout, as it was in this state of the catalogs.
type Known = (pg_sys::Oid, (u64, u64), Layout);

/// The records of Odoo that a job's method is called on.
#[derive(Clone, Default)]
pub struct Model {
    pub name: Option<String>,
    /// A JSON array of their ids.
    pub res_ids: Option<Jsonb>,
    pub su: Option<bool>,
}

/// A job to enqueue, its arguments checked.
pub struct New {
    pub target: Rc<str>,
    pub args: Jsonb,
    pub kwargs: Jsonb,
    pub description: Option<String>,
    pub notify: Option<Channel>,
    pub queue: Cow<'static, str>,
    pub priority: i32,
    pub run_at: Option<TimestampWithTimeZone>,
    pub max_attempts: i32,
    pub retry_delay: Option<Interval>,
    pub timeout: Option<Interval>,
    pub identity_key: Option<String>,
    pub depends_on: Option<Vec<i64>>,
    pub model: Model,
    pub user_id: Option<i32>,
    pub context: Option<Jsonb>,
    pub role: pg_sys::Oid,
    pub search_path: Rc<str>,
}

impl New {
    /// Any runner of the role can take it at once.
    fn is_plain(&self) -> bool {
        // Where jobs are counted, who counts keeps others from claiming.
        self.model.name.is_none() && self.depends_on.is_none() && guc::queues().is_empty()
    }

    fn is_ready(&self) -> bool {
        self.depends_on.as_ref().is_none_or(Vec::is_empty)
    }
}

/// What a new job's row holds.
struct Row<'a> {
    new: &'a New,
    id: i64,
    /// The channel as it is stored.
    notify: Option<&'a str>,
    /// When the transaction began.
    now: TimestampWithTimeZone,
    retry_delay: Interval,
    no_errors: &'a Jsonb,
}

/// What a failed attempt waits for the next one unless its enqueuer says otherwise, in microseconds.
const RETRY_DELAY: i64 = 10_000_000;

/// Makes a column's value; it may be a part of the row.
type Make = fn(&Row<'_>) -> Option<pg_sys::Datum>;

/// What is stored as it came, not copied.
fn stored(json: Option<&Jsonb>) -> Option<pg_sys::Datum> {
    json.map(Jsonb::datum)
}

/// A column: its name, its type and what stands there.
type Column = (&'static str, pg_sys::Oid, Make);

/// The columns of a new job's row in the table's order; the others are NULL.
const COLUMNS: [Column; 28] = {
    use pg_sys::*;
    [
        ("id", INT8OID, |row| row.id.into_datum()),
        // As Odoo has them: timestamps without a zone in UTC, which are the same numbers.
        ("create_date", TIMESTAMPOID, |row| row.now.into_datum()),
        ("write_date", TIMESTAMPOID, |row| row.now.into_datum()),
        ("name", VARCHAROID, |row| row.new.description.as_deref().map(Str).into_datum()),
        ("state", VARCHAROID, |_| Str(State::Created.as_str()).into_datum()),
        ("res_model", VARCHAROID, |row| row.new.model.name.as_deref().map(Str).into_datum()),
        ("res_ids", JSONBOID, |row| stored(row.new.model.res_ids.as_ref())),
        ("method", VARCHAROID, |row| Str(&row.new.target).into_datum()),
        ("args", JSONBOID, |row| stored(Some(&row.new.args))),
        ("kwargs", JSONBOID, |row| stored(Some(&row.new.kwargs))),
        ("user_id", INT4OID, |row| row.new.user_id.into_datum()),
        ("context", JSONBOID, |row| stored(row.new.context.as_ref())),
        ("super_user", BOOLOID, |row| row.new.model.su.into_datum()),
        ("role", OIDOID, |row| row.new.role.into_datum()),
        ("search_path", TEXTOID, |row| Str(&row.new.search_path).into_datum()),
        ("notify", VARCHAROID, |row| row.notify.map(Str).into_datum()),
        ("queue", VARCHAROID, |row| Str(&row.new.queue).into_datum()),
        ("priority", INT4OID, |row| row.new.priority.into_datum()),
        ("run_at", TIMESTAMPTZOID, |row| row.new.run_at.unwrap_or(row.now).into_datum()),
        ("max_attempts", INT4OID, |row| row.new.max_attempts.into_datum()),
        ("attempts", INT4OID, |_| 0_i32.into_datum()),
        ("deaths", INT4OID, |_| 0_i32.into_datum()),
        ("retry_delay", INTERVALOID, |row| row.new.retry_delay.unwrap_or(row.retry_delay).into_datum()),
        ("timeout", INTERVALOID, |row| row.new.timeout.into_datum()),
        ("identity_key", VARCHAROID, |row| row.new.identity_key.as_deref().map(Str).into_datum()),
        ("depends_on", INT8ARRAYOID, |row| row.new.depends_on.clone().into_datum()),
        ("ready", BOOLOID, |row| row.new.is_ready().into_datum()),
        ("errors", JSONBOID, |row| stored(Some(row.no_errors))),
    ]
};

/// Enqueues in the current transaction: the id. An unfinished job with the same identity_key is returned instead.
pub fn enqueue(new: &New) -> Outcome<i64> {
    Ok(enqueue_all(std::slice::from_ref(new))?.first().copied().unwrap_or(0))
}

/// The same for several, in order. Errors: 22023 for a dependency that never was a job; 25006 in a read-only transaction; 40001 for
/// an unfinished job with the same identity_key that the transaction's snapshot does not have, or that others keep changing; 40P01.
pub fn enqueue_all(jobs: &[New]) -> Outcome<Vec<i64>> {
    let table = table()?;
    let dependencies: Vec<i64> = jobs.iter().filter_map(|new| new.depends_on.as_ref()).flatten().copied().collect();
    if !dependencies.is_empty() {
        check_dependencies(&table, dependencies)?;
    }
    let mut ids = Vec::with_capacity(jobs.len());
    let alike = |one: &New, other: &New| one.identity_key.is_none() && other.identity_key.is_none();
    for group in jobs.chunk_by(alike) {
        let created = match group {
            [New { identity_key: Some(key), .. }] => match insert_once(&table, &group[0], key)? {
                Ok(id) => vec![id],
                Err(twin) => {
                    ids.push(twin);
                    continue;
                }
            },
            _ => match put_in(&table, group)? {
                Some(created) => created,
                None => {
                    let insert = |new| insert(&table, &table.name, new, "")?.first().copied().ok_or_else(suppressed);
                    group.iter().map(insert).collect::<Outcome<_>>()?
                }
            },
        };
        for (new, id) in group.iter().zip(&created) {
            tell_of(new, *id)?;
        }
        ids.extend(created);
    }
    Ok(ids)
}

/// Refuses dependencies on ids that have not been given out yet: a job would wait for nothing, or for somebody else's.
fn check_dependencies(table: &Table, ids: Vec<i64>) -> Outcome<()> {
    let text = "SELECT d.id FROM pg_catalog.unnest($1) d (id)
                 WHERE d.id > COALESCE(pg_catalog.pg_sequence_last_value($2), 0)
                   AND NOT EXISTS (SELECT FROM TABLE j WHERE j.id = d.id) LIMIT 1";
    let unknown = on_table(text, &[ids.into(), table.sequence.into()], |row| row.need::<i64>(1))?;
    let Some(id) = unknown.first() else { return Ok(()) };
    let message = format!("job {id} does not exist");
    let hint = "depends_on holds ids that ir_async_call has returned.";
    Err(report(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, &message, "It is in depends_on.", hint))
}

/// Wakes whom a new job concerns at the commit, and notifies.
fn tell_of(new: &New, id: i64) -> Outcome<()> {
    match new.run_at {
        _ if !new.is_ready() => wake::enqueued_blocked(),
        Some(start) => wake::enqueued_for_later(start.into_inner()),
        None if new.is_plain() => wake::enqueued_for(u32::from(new.role), id),
        None => wake::enqueued(),
    }
    if let Some(channel) = &new.notify {
        let (name, state) = (new.description.as_deref(), State::Created.as_str());
        bus::publish(channel, NOTIFICATION, &change(id, name, state, None))?;
    }
    Ok(())
}

/// Has `work` done with each job's row, in order.
fn with_rows<T>(table: &Table, jobs: &[New], mut work: impl FnMut(&Row<'_>) -> Outcome<T>) -> Outcome<Vec<T>> {
    let now = TimestampWithTimeZone::try_from(worker::transaction_start()).map_err(internal)?;
    let retry_delay = Interval::new(0, 0, RETRY_DELAY).map_err(internal)?;
    let no_errors = NO_ERRORS.with(Jsonb::clone);
    let rows = jobs.iter().map(|new| {
        worker::check_interrupts();
        let notify = match &new.notify {
            Some(channel) => Some(channel.stored(&bus::table()?.database)),
            None => None,
        };
        let id = direct::next_of(table.sequence);
        work(&Row { new, id, notify: notify.as_deref(), now, retry_delay, no_errors: &no_errors })
    });
    rows.collect()
}

/// Puts jobs in the short way (`direct`), into the table that fills: their ids; None where the long way must be gone.
fn put_in(table: &Table, jobs: &[New]) -> Outcome<Option<Vec<i64>>> {
    let Some(relid) = filling(table) else { return Ok(None) };
    direct::with(
        relid,
        indexes(table),
        |found| layout(relid, found),
        |rows, layout| {
            with_rows(table, jobs, |row| {
                rows.put(|column| layout.get(column).copied().flatten().and_then(|make| make(row)));
                Ok(row.id)
            })
        },
    )
}

/// Whose indexes imbus's tables of jobs have: made by the bootstrap superuser, as everything of a trusted extension; somebody may
/// have given them away.
pub(super) fn indexes(table: &Table) -> Indexes {
    // SAFETY: a cache look-up inside a transaction.
    if unsafe { pg_sys::superuser_arg(table.owner) } { Indexes::Superusers } else { Indexes::Anybodys }
}

/// The table that fills; None where a new job is to be put into `ir_async` itself, since somebody's trigger fires there.
pub(super) fn filling(table: &Table) -> Option<pg_sys::Oid> {
    rotation::filling(table).filter(|_| !direct::fires(table.relid, is_not_own))
}

/// Whether a trigger of this name is another than the table's own.
pub(super) fn is_not_own(trigger: &[u8]) -> bool {
    trigger != b"ir_async_inserted"
}

/// What makes a row of an open table, found out once while no table changes.
fn layout(relid: pg_sys::Oid, table: &direct::Table) -> Option<Layout> {
    // The table is locked: whatever has changed in it has been heard.
    let state = catalog::tables();
    let known = LAYOUT.with_borrow(|known| {
        let is_it = |(of, then, _): &&Known| *of == relid && *then == state;
        known.as_ref().filter(is_it).map(|(.., layout)| Rc::clone(layout))
    });
    if known.is_some() {
        return known;
    }
    let found: Layout = columns(table)?.into();
    LAYOUT.set(Some((relid, state, Rc::clone(&found))));
    Some(found)
}

/// What makes the value of each column, None for NULL, of a table that is as it was made: with its own trigger alone, which
/// has nothing to do where imbus enqueues. None for another one.
fn columns(table: &direct::Table) -> Option<Vec<Option<Make>>> {
    if table.triggers().any(|(name, _)| is_not_own(name)) {
        return None;
    }
    let mut expected = COLUMNS.iter().peekable();
    let columns: Vec<Option<Make>> = table
        .columns()
        .map(|column| match expected.next_if(|(name, ..)| name.as_bytes() == column.name) {
            Some((_, of, make)) => (column.type_oid == *of && !column.has_modifier).then_some(Some(*make)),
            None => (column.is_dropped || !column.is_required && !column.has_default).then_some(None),
        })
        .collect::<Option<_>>()?;
    expected.next().is_none().then_some(columns)
}

/// Inserts a job into the table of this name: its id, none where a conflict was to be passed over.
fn insert(table: &Table, to: &str, new: &New, on_conflict: &str) -> Outcome<Vec<i64>> {
    let names = COLUMNS.map(|(name, ..)| name).join(", ");
    let values: Vec<String> = (1..=COLUMNS.len()).map(|number| format!("${number}")).collect();
    let text = format!("INSERT INTO NEXT ({names}) VALUES ({}) {on_conflict} RETURNING id", values.join(", "));
    let inserted = with_rows(table, std::slice::from_ref(new), |row| {
        // SAFETY: of the type that stands beside it; the row stays until the statement has run.
        let args = COLUMNS.map(|(_, of, make)| unsafe { DatumWithOid::new(make(row), of) });
        as_own(|| on_named(&text, &[("NEXT", to)], &args, |row| row.need::<i64>(1)))
    });
    Ok(inserted?.concat())
}

fn suppressed() -> pgrx::pg_sys::panic::ErrorReport {
    report(
        PgSqlErrorCode::ERRCODE_TRIGGERED_ACTION_EXCEPTION,
        "the job was not stored",
        "A trigger on ir_async suppressed it.",
        "",
    )
}

/// Inserts a job with an identity_key; the id of an unfinished one with the same key as the error.
fn insert_once(table: &Table, new: &New, key: &str) -> Outcome<Result<i64, i64>> {
    const ONCE: &str =
        "ON CONFLICT (identity_key) WHERE identity_key IS NOT NULL AND state IN ('created', 'processing') DO NOTHING";
    for _ in 0..10 {
        let relid = filling(table).unwrap_or(table.relid);
        let insert = || Ok(insert(table, &name_of(relid)?, new, ONCE)?.first().copied());
        match identity::put(table, Some(key), relid, insert)? {
            Put::Alone(Some(id)) => return Ok(Ok(id)),
            Put::Beside(Some(id)) => {
                let place = Place::of(relid)?;
                on_named("DELETE FROM PLACE WHERE id = $1 RETURNING id", &[place.name()], &[id.into()], |_| Ok(()))?;
            }
            Put::Alone(None) | Put::Beside(None) | Put::Before => {}
        }
        if let Some(twin) = identity::twin(key)? {
            return Ok(Err(twin));
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

/// Runs a statement that puts in rows which are as they are to be. It alone: a notification may run triggers of a user's, who
/// may insert jobs too.
pub(super) fn as_own<T>(statement: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    ENQUEUEING.set(true);
    let mark = Enqueueing;
    let result = statement();
    drop(mark);
    result
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
        wake::enqueued_blocked();
        // Raised here: pgrx turns an Err of a trigger function into a panic's text.
        disown(&mut tuple).unwrap_or_report();
        check(&tuple).unwrap_or_report();
        check_twins(&tuple).unwrap_or_report();
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

/// No other job has its id, nor its identity_key while both are unfinished. Errors: 23505.
fn check_twins(tuple: &PgHeapTuple<'_, AllocatedByRust>) -> Outcome<()> {
    let exists = |what: &str| {
        let message = format!("a job with {what} exists already");
        Err(report(PgSqlErrorCode::ERRCODE_UNIQUE_VIOLATION, &message, "", "Enqueue jobs by ir_async_call."))
    };
    let id: Option<i64> = tuple.get_by_name("id").map_err(internal)?;
    if !on_table("SELECT FROM TABLE WHERE id = $1", &[id.into()], |_| Ok(()))?.is_empty() {
        return exists(&format!("id {}", id.unwrap_or(0)));
    }
    let key: Option<String> = tuple.get_by_name("identity_key").map_err(internal)?;
    let finished_at: Option<TimestampWithTimeZone> = tuple.get_by_name("finished_at").map_err(internal)?;
    match key {
        Some(key) if finished_at.is_none() && identity::is_taken_by_hand(&*table()?, &key)? => {
            exists("this identity_key that has not ended")
        }
        _ => Ok(()),
    }
}

fn disown(tuple: &mut PgHeapTuple<'_, AllocatedByRust>) -> Outcome<()> {
    // SAFETY: a plain global of the session, and a catalog look-up.
    let (role, superuser) = unsafe { (pg_sys::GetUserId(), pg_sys::superuser()) };
    tuple.set_by_name("role", role).map_err(internal)?;
    let depends_on: Option<pgrx::Array<'_, i64>> = tuple.get_by_name("depends_on").map_err(internal)?;
    let is_ready = depends_on.is_none_or(|ids| ids.is_empty());
    tuple.set_by_name("ready", is_ready).map_err(internal)?;
    let state: Option<String> = tuple.get_by_name("state").map_err(internal)?;
    if !superuser && state.as_deref() == Some("processing") {
        // Whoever had claimed it has another row; nobody has a token but from a claim.
        tuple.set_by_name("state", State::Created.as_str()).map_err(internal)?;
        tuple.set_by_name("token", None::<String>).map_err(internal)?;
        tuple.set_by_name("session", None::<i64>).map_err(internal)?;
    }
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
