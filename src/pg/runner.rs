//! The workers `imbus job <name>`: each runs jobs of one role in one database, connected as that role; short ones in company
//! (`company`).

mod claim;
mod company;

use super::call::{self, Arguments};
use super::jobs::{self, Claimed, Failed, Work};
use super::launch;
use super::limit::Limit;
use super::report::Outcome;
use super::ring;
use super::session;
use super::shared::{self, RunnerSlot, RunnerState};
use super::sqlstate;
use super::transaction::{self, Failure};
use super::worker::{self, Waiting};
use crate::core::span::Span;
use claim::{Claims, Turn};
use pgrx::prelude::*;
use std::cell::Cell;
use std::ffi::CStr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a runner waits for the next job of its role.
const LINGER: Duration = Duration::from_secs(10);

thread_local! {
    /// The slot of this runner.
    static SLOT: Cell<Option<usize>> = const { Cell::new(None) };
    /// Another library's hook.
    static PREVIOUS_LOG: Cell<pg_sys::emit_log_hook_type> = const { Cell::new(None) };
    /// Interrupts by which somebody wanted to stop a job, as far as they have hit one.
    static INTERRUPTS: Cell<u32> = const { Cell::new(0) };
    /// Set once connected: what is logged from then on is no failure to connect.
    static CONNECTED: Cell<bool> = const { Cell::new(false) };
}

fn slot() -> Option<&'static RunnerSlot> {
    shared::get().and_then(|shared| SLOT.get().and_then(|index| shared.runner(index)))
}

/// The runner's main function; the argument is the number of its slot.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn imbus_runner_main(argument: pg_sys::Datum) {
    worker::start();
    SLOT.set(Some(argument.value()));
    let Some(slot) = slot() else { launch::exit() };
    slot.process.enter();
    launch::at_exit(leave);
    // SAFETY: main thread; the hook stays for the life of the process and only writes to shared memory.
    unsafe {
        PREVIOUS_LOG.set(pg_sys::emit_log_hook);
        pg_sys::emit_log_hook = Some(keep_message);
    }
    let (database, role) = (slot.database.load(Ordering::Acquire), slot.role.load(Ordering::Acquire));
    launch::connect(database, role);
    CONNECTED.set(true);
    session::be_unstoppable();
    INTERRUPTS.set(slot.interrupts());
    slot.set_state(RunnerState::Running);
    let mut claims = Claims::new(slot, argument.value(), role);
    // The one it was launched for; what it is stands in its row.
    let mut first = slot.claim().map(|(id, token)| Claimed { id, token, place: None });
    loop {
        if let Some(claimed) = first.take() {
            work(&claimed);
            session::reset();
            slot.clear_job();
        }
        session::be_unstoppable();
        if worker::reload() {
            claims.forget();
        }
        let turn = claims.next().or_else(|| linger(slot, database, &mut claims));
        let Some(turn) = turn else { break };
        let (began, jobs, took, is_cut) = (Instant::now(), turn.jobs(), turn.took(), turn.is_cut());
        company::go_on(slot, turn);
        slot.clear_job();
        claims.pace.record(jobs, took + began.elapsed());
        if is_cut {
            claims.pace.cut_short(jobs);
        }
    }
    launch::exit()
}

/// Keeps the message of the FATAL that ends a runner which cannot connect.
#[pg_guard]
unsafe extern "C-unwind" fn keep_message(error: *mut pg_sys::ErrorData) {
    if let Some(previous) = PREVIOUS_LOG.get() {
        // SAFETY: the hook that was there before, with its own argument.
        unsafe { super::ffi::guarded(|| previous(error)) };
    }
    if CONNECTED.get() {
        return;
    }
    // SAFETY: PostgreSQL passes a valid error; its message is a C string or NULL.
    let message = unsafe {
        let fatal = (*error).elevel >= pg_sys::FATAL as i32;
        if !fatal || (*error).message.is_null() {
            return;
        }
        CStr::from_ptr((*error).message).to_string_lossy().into_owned()
    };
    if let Some(slot) = slot() {
        slot.set_message(&message);
    }
}

/// However the runner ends, its place says so and the database worker is woken.
#[pg_guard]
unsafe extern "C-unwind" fn leave(_code: i32, _argument: pg_sys::Datum) {
    let (Some(shared), Some(slot)) = (shared::get(), slot()) else { return };
    let database = slot.database.load(Ordering::Acquire);
    if shared.is_held(database) {
        slot.held.store(true, Ordering::Release);
    }
    slot.process.leave();
    slot.set_span(Span::default());
    slot.set_state(RunnerState::Exited);
    shared.wake_jobs(database);
    // Should the database worker be gone for good, the gateway frees the place.
    shared.rescan.store(true, Ordering::Release);
    shared.gateway.wake();
}

/// Waits for the next jobs of the role; None when none came, or when the place is needed.
fn linger(slot: &RunnerSlot, database: u32, claims: &mut Claims) -> Option<Turn> {
    let until = Instant::now() + LINGER;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let held = shared::get().is_some_and(|shared| shared.is_held(database));
        if left.is_zero() || held || slot.leave.load(Ordering::Acquire) != 0 {
            slot.is_waiting.store(false, Ordering::Release);
            return None;
        }
        slot.is_waiting.store(true, Ordering::SeqCst);
        claims.lingers = true;
        // What was enqueued before that woke somebody else, or nobody; or was offered by somebody who was slow to say it.
        if let Some(turn) = claims.next() {
            came(slot, database, claims, false);
            return Some(turn);
        }
        if let Some(turn) = claims.offered() {
            came(slot, database, claims, true);
            return Some(turn);
        }
        worker::report_activity(None);
        worker::idle(&Waiting { socket: None, writable: false, timeout: left.min(claims.patience()) });
        if worker::reload() {
            claims.forget();
        }
        let was_offered = slot.offer.load(Ordering::SeqCst) != 0;
        if let Some(turn) = claims.offered() {
            came(slot, database, claims, true);
            return Some(turn);
        }
        if !was_offered && !slot.is_waiting.load(Ordering::SeqCst) {
            claims.rest_until(Instant::now());
        }
    }
}

/// It waits no more, if it has not said so before it ran the job that has come.
fn came(slot: &RunnerSlot, database: u32, claims: &mut Claims, is_offered: bool) {
    if std::mem::take(&mut claims.lingers) {
        wait_no_more(slot, database, is_offered);
    }
}

/// Has the database's worker look, should the runner have been woken for another job than the one it has: `is_offered` where
/// it has the one that it was offered.
fn wait_no_more(slot: &RunnerSlot, database: u32, is_offered: bool) {
    let was_woken = !slot.is_waiting.swap(false, Ordering::SeqCst);
    let has_another = slot.offer.swap(0, Ordering::SeqCst) != 0 || was_woken && !is_offered;
    if has_another {
        tell_others(database);
    }
}

/// There are jobs that nobody may know of.
fn tell_others(database: u32) {
    if let Some(shared) = shared::get() {
        shared.database(database).into_iter().for_each(|slot| slot.add_news());
        shared.wake_jobs(database);
    }
}

/// Calls a job's function.
fn call(work: &Work) -> Outcome<Option<String>> {
    worker::report_activity(Some(&work.target));
    let arguments = Arguments::parse(&work.args, &work.kwargs)?;
    sqlstate::watched(|| call::run(&work.target, &arguments, &work.search_path))
}

/// Runs one job: effect, result, state and notification in one commit. Its function is called in a savepoint, so that its
/// failure takes no second transaction; what stopped it, or only the commit has refused, is recorded in one.
fn work(claimed: &Claimed) {
    if slot().and_then(RunnerSlot::cancelled) == Some(claimed.id) {
        return record(claimed, &Ended::Cancelled);
    }
    let (limit, begun) = (Cell::new(None), Cell::new(false));
    let outcome = transaction::run(|| attempt(claimed, &limit, &begun));
    session::be_unstoppable();
    Limit::lift();
    worker::report_activity(None);
    let failure = match outcome {
        Ok(None) => return,
        Ok(Some(failure)) | Err(failure) => failure,
    };
    let is_interrupted = failure.code == QUERY_CANCELED && was_interrupted();
    let ended = match slot().and_then(RunnerSlot::cancelled) {
        // Somebody has locked its row, to cancel it most likely.
        _ if !begun.get() && failure.code != QUERY_CANCELED => Ended::Interrupted,
        _ if failure.code != QUERY_CANCELED => Ended::Failed(failure),
        Some(id) if id == claimed.id => Ended::Cancelled,
        // It was for the job before.
        Some(_) => Ended::Interrupted,
        None => match limit.get() {
            Some((begun, milliseconds)) if is_over(begun, milliseconds) => Ended::Failed(timed_out(milliseconds)),
            // It was for the job before, and came late.
            _ if is_interrupted => Ended::Interrupted,
            _ => Ended::Failed(failure),
        },
    };
    record(claimed, &ended);
}

fn record(claimed: &Claimed, ended: &Ended) {
    let recorded = transaction::run(|| match ended {
        Ended::Failed(failure) => jobs::fail(claimed, &Failed::from(failure)).map(drop),
        Ended::Cancelled => jobs::cancelled(claimed),
        Ended::Interrupted => jobs::give_back_one(claimed),
    });
    if let Err(failure) = recorded {
        pgrx::warning!("imbus could not record the failure of job {}: {failure}", claimed.id);
    }
    session::be_unstoppable();
}

/// SQLSTATE query_canceled.
const QUERY_CANCELED: &str = "57014";

/// How an attempt ended that did not succeed.
enum Ended {
    Failed(Failure),
    Cancelled,
    Interrupted,
}

/// Whether somebody has interrupted the runner to stop a job since this was last asked; an administrator's pg_cancel_backend
/// is no such interrupt.
fn was_interrupted() -> bool {
    let interrupts = slot().map_or(0, RunnerSlot::interrupts);
    INTERRUPTS.replace(interrupts) != interrupts
}

fn is_over(begun: Instant, milliseconds: i64) -> bool {
    i64::try_from(begun.elapsed().as_millis()).unwrap_or(i64::MAX) >= milliseconds
}

fn timed_out(milliseconds: i64) -> Failure {
    Failure {
        code: "timeout".to_owned(),
        message: format!("the job took longer than its timeout of {milliseconds} ms"),
        detail: None,
        hint: None,
    }
}

/// Calls a job's function and ends the job. What stopped it is returned; other failures are recorded here.
fn attempt(claimed: &Claimed, limit: &Cell<Option<(Instant, i64)>>, begun: &Cell<bool>) -> Outcome<Option<Failure>> {
    session::be_stoppable();
    let Some(work) = jobs::read(claimed)? else { return Ok(None) };
    begun.set(true);
    let guard = work.timeout.map(|milliseconds| {
        limit.set(Some((Instant::now(), milliseconds)));
        Limit::set(milliseconds)
    });
    let result = transaction::in_savepoint(|| call(&work));
    drop(guard);
    match result {
        Ok(result) => jobs::succeed(claimed, result.as_deref())?,
        Err(failure) if failure.code == QUERY_CANCELED => return Ok(Some(failure)),
        Err(failure) => {
            session::be_unstoppable();
            jobs::fail(claimed, &Failed::from(&failure))?;
            // The next commit writes it to disk with its own. Should the server go down before that, the job is run once more,
            // as one is that it went down with; but nobody is told of what is not on disk.
            if !ring::has_notes() {
                transaction::set_local(c"synchronous_commit", c"off");
            }
        }
    }
    Ok(None)
}
