//! The workers `imbus job <name>`: each runs jobs of one role in one database, connected as that role. And the
//! dispatcher in the database worker, which claims, launches, and notices at once when a runner is gone.

use super::call::{self, Arguments};
use super::jobs::{self, Claimed, Failed};
use super::launch::{self, Handle, Launch};
use super::limit::Limit;
use super::report::Outcome;
use super::shared::{self, RunnerSlot, RunnerState, Shared};
use super::transaction::{self, Failure};
use super::worker::{self, Waiting};
use super::{ffi, guc};
use pgrx::prelude::*;
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::CStr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The look-out for jobs nobody announced (prepared transactions, restored rows).
const LOOKOUT: Duration = Duration::from_secs(5);
/// How soon a dispatcher that found no place tries again.
const NO_PLACE: Duration = Duration::from_millis(200);
/// A runner registered this long ago that has not come up is counted as lost (microseconds).
const STARTING_MAX: i64 = 10_000_000;
/// How long a runner waits for the next job of its role.
const LINGER: Duration = Duration::from_secs(10);

/// Starts runners for waiting jobs and cleans up after them; part of the database worker.
pub struct Dispatcher {
    shared: &'static Shared,
    database: u32,
    handles: HashMap<usize, Handle>,
    next: Instant,
}

impl Dispatcher {
    /// A dispatcher for the database this worker is connected to.
    pub fn new(shared: &'static Shared, database: u32) -> Dispatcher {
        Dispatcher { shared, database, handles: HashMap::new(), next: Instant::now() }
    }

    /// When to look again even if nobody wakes it.
    pub fn next(&self) -> Instant {
        self.next
    }

    /// Whether that time has come.
    pub fn due(&self) -> bool {
        Instant::now() >= self.next
    }

    /// Cleans up after runners that have ended, then finds runners for the jobs that can run.
    pub fn dispatch(&mut self) {
        self.next = Instant::now() + LOOKOUT;
        if self.reap() {
            // A runner has left for the sake of another database: that one takes the place first.
            self.next = Instant::now() + NO_PLACE;
            return;
        }
        self.rescue();
        if self.mine().filter(|(_, slot)| slot.cancel_again()).count() > 0 {
            self.next = Instant::now() + NO_PLACE;
        }
        let waiting = match transaction::run(jobs::waiting) {
            Ok(waiting) => waiting,
            Err(failure) => return pgrx::warning!("imbus could not look for jobs: {failure}"),
        };
        for (place, (role, count)) in waiting.iter().enumerate() {
            let before: Vec<u32> = waiting.iter().take(place).map(|(role, _)| *role).collect();
            self.serve_role(*role, *count, &before);
        }
        if !waiting.is_empty() && !guc::queues().is_empty() {
            // Whoever counts and claims keeps others from it.
            self.next = self.next.min(Instant::now() + NO_PLACE);
        }
        if let Ok(Some(seconds)) = transaction::run(jobs::next_start) {
            self.next = self.next.min(Instant::now() + Duration::from_secs_f64(seconds.clamp(0.001, 3600.0)));
        }
    }

    fn mine(&self) -> impl Iterator<Item = (usize, &'static RunnerSlot)> {
        let database = self.database;
        self.shared.runners().filter(move |(_, slot)| {
            slot.database.load(Ordering::Acquire) == database && slot.state() != RunnerState::Free
        })
    }

    /// Wakes idle runners of the role, and starts more while jobs are left and places are free. `before` are the roles
    /// whose jobs come first.
    fn serve_role(&mut self, role: u32, count: i64, before: &[u32]) {
        let mut left = count;
        for (_, slot) in self.mine().filter(|(_, slot)| slot.role.load(Ordering::Acquire) == role) {
            let idle = slot.state() == RunnerState::Running && slot.job().is_none();
            if idle || slot.state() == RunnerState::Reserved {
                slot.process.wake();
                left -= 1;
            }
        }
        while left > 0 {
            let Some((index, slot)) = self.shared.reserve_runner(guc::job_workers()) else {
                self.ask_to_leave(role, before);
                self.next = self.next.min(Instant::now() + NO_PLACE);
                return;
            };
            if !self.launch(index, slot, role) {
                return;
            }
            left -= 1;
        }
    }

    /// Has a runner of another role or database leave after its job, an idle one if there is one: no role keeps its
    /// places while jobs that come before its own wait, and databases take turns.
    fn ask_to_leave(&self, role: u32, before: &[u32]) {
        let others = || {
            self.shared.runners().map(|(_, slot)| slot).filter(|slot| {
                let (theirs, here) = (slot.role.load(Ordering::Acquire), self.is_mine(slot));
                slot.state() == RunnerState::Running && !(here && (theirs == role || before.contains(&theirs)))
            })
        };
        if others().any(|slot| slot.leave.load(Ordering::Acquire) == self.database) {
            return;
        }
        let chosen = others().find(|slot| slot.job().is_none()).or_else(|| others().next());
        if let Some(slot) = chosen {
            slot.leave.store(self.database, Ordering::Release);
            slot.process.wake();
        }
    }

    fn is_mine(&self, slot: &RunnerSlot) -> bool {
        slot.database.load(Ordering::Acquire) == self.database
    }

    /// Claims a job, which counts the attempt, and launches a runner with it. False when there was nothing to do or no
    /// worker to be had.
    fn launch(&mut self, index: usize, slot: &'static RunnerSlot, role: u32) -> bool {
        let claimed = match transaction::run(|| jobs::claim(role)) {
            Ok(Some(claimed)) => claimed,
            Ok(None) => {
                slot.set_state(RunnerState::Free);
                return false;
            }
            Err(failure) => {
                slot.set_state(RunnerState::Free);
                pgrx::warning!("imbus could not claim a job: {failure}");
                return false;
            }
        };
        slot.database.store(self.database, Ordering::Release);
        slot.role.store(role, Ordering::Release);
        slot.set_job(claimed.id, &claimed.token);
        let name = transaction::run(|| Ok(super::bus::table()?.database)).unwrap_or_default();
        let launch =
            Launch { name: &format!("imbus job {name}"), function: "imbus_runner_main", argument: index as u64 };
        match launch::start(&launch) {
            Ok(Some(handle)) => {
                self.handles.insert(index, handle);
                true
            }
            _ => {
                warn_no_slot(&name);
                slot.clear_job();
                slot.set_state(RunnerState::Free);
                give_back(&claimed, false);
                self.next = self.next.min(Instant::now() + Duration::from_secs(1));
                false
            }
        }
    }

    /// Frees the places of runners that have ended and settles the jobs that ended with them. Whether a place was given
    /// up for another database.
    fn reap(&mut self) -> bool {
        let mut given_up = false;
        for (index, slot) in self.mine().collect::<Vec<_>>() {
            // Launched by an earlier life of this worker and never come up.
            let lost = slot.state() == RunnerState::Reserved
                && slot.process.pid() == 0
                && worker::now().saturating_sub(slot.since.load(Ordering::Relaxed)) > STARTING_MAX;
            let gone = slot.state() == RunnerState::Exited
                || lost
                || self.handles.get(&index).is_some_and(|handle| handle.is_stopped());
            if !gone {
                continue;
            }
            self.handles.remove(&index);
            if let Some((id, token)) = slot.job() {
                settle(&Claimed { id, token }, &slot.message(), !slot.held.load(Ordering::Acquire));
            }
            let wanted_by = slot.leave.load(Ordering::Acquire);
            slot.free();
            if wanted_by != 0 && wanted_by != self.database {
                self.shared.wake_jobs(wanted_by);
                given_up = true;
            }
        }
        given_up
    }

    /// Gives back jobs that are `processing` without a runner: theirs died with the server, or they were restored from
    /// a dump. A runner enters its job in its slot before its claim commits, so none at work is taken for an orphan.
    fn rescue(&self) {
        let orphans = match transaction::run(jobs::processing) {
            Ok(orphans) => orphans,
            Err(failure) => return pgrx::warning!("imbus could not look for abandoned jobs: {failure}"),
        };
        let alive: Vec<String> = self.mine().filter_map(|(_, slot)| slot.job()).map(|(_, token)| token).collect();
        for orphan in orphans.iter().filter(|orphan| !alive.contains(&orphan.claimed.token)) {
            let is_outside = orphan.session.is_some_and(|session| self.shared.has_session(session));
            if !is_outside || orphan.is_overdue {
                give_back(&orphan.claimed, true);
            }
        }
    }
}

/// A job whose runner ended: it could not connect (PostgreSQL's message), or it died.
fn settle(claimed: &Claimed, message: &str, counts: bool) {
    if message.is_empty() {
        return give_back(claimed, counts);
    }
    let failure = Failure {
        code: "runner_failed".to_owned(),
        message: message.to_owned(),
        detail: None,
        hint: Some("The job runs in a session of the role that enqueued it.".to_owned()),
    };
    if let Err(failure) = transaction::run(|| jobs::fail(claimed, &Failed::from(&failure))) {
        pgrx::warning!("imbus could not record the failure of job {}: {failure}", claimed.id);
    }
}

fn give_back(claimed: &Claimed, counts: bool) {
    if let Err(failure) = transaction::run(|| jobs::runner_died(claimed, counts)) {
        pgrx::warning!("imbus could not give back job {}: {failure}", claimed.id);
    }
}

fn warn_no_slot(database: &str) {
    thread_local! { static WARNED: Cell<bool> = const { Cell::new(false) } }
    if !WARNED.replace(true) {
        pgrx::ereport!(
            PgLogLevel::WARNING,
            PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
            format!("no background worker is free for the jobs of database \"{database}\""),
            "Increase max_worker_processes (8 + databases + imbus.job_workers) and restart PostgreSQL."
        );
    }
}

thread_local! {
    /// The slot of this runner.
    static SLOT: Cell<Option<usize>> = const { Cell::new(None) };
    /// Another library's hook.
    static PREVIOUS_LOG: Cell<pg_sys::emit_log_hook_type> = const { Cell::new(None) };
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
    slot.set_state(RunnerState::Running);
    let first = slot.job().map(|(id, token)| Claimed { id, token });
    let mut next = first.or_else(|| claim(slot, role));
    while let Some(claimed) = next {
        work(&claimed);
        slot.clear_job();
        reset();
        next = claim(slot, role).or_else(|| linger(slot, database, role));
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
    slot.set_state(RunnerState::Exited);
    shared.wake_jobs(database);
    // Should the database worker be gone for good, the gateway frees the place.
    shared.rescan.store(true, Ordering::Release);
    shared.gateway.wake();
}

fn claim(slot: &RunnerSlot, role: u32) -> Option<Claimed> {
    if slot.leave.load(Ordering::Acquire) != 0 {
        return None;
    }
    let claimed = transaction::run(|| {
        let claimed = jobs::claim(role)?;
        if let Some(claimed) = &claimed {
            slot.set_job(claimed.id, &claimed.token);
        }
        Ok(claimed)
    });
    match claimed {
        Ok(claimed) => claimed,
        Err(failure) => {
            slot.clear_job();
            pgrx::warning!("imbus could not claim a job: {failure}");
            None
        }
    }
}

/// Waits for the next job of the role; None when none came, or when the place is needed.
fn linger(slot: &RunnerSlot, database: u32, role: u32) -> Option<Claimed> {
    let until = Instant::now() + LINGER;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let held = shared::get().is_some_and(|shared| shared.is_held(database));
        if left.is_zero() || held || slot.leave.load(Ordering::Acquire) != 0 {
            return None;
        }
        worker::report_activity(None);
        worker::idle(&Waiting { socket: None, writable: false, timeout: left });
        worker::reload();
        let claimed = claim(slot, role);
        if claimed.is_some() {
            return claimed;
        }
    }
}

/// Runs one job: effect, result, state and notification in one commit; a failure is recorded in a second one.
fn work(claimed: &Claimed) {
    if slot().and_then(RunnerSlot::cancelled) == Some(claimed.id) {
        return record(claimed, &Ended::Cancelled);
    }
    let limit = Cell::new(None);
    let outcome = transaction::run(|| attempt(claimed, &limit));
    Limit::lift();
    worker::report_activity(None);
    let Err(failure) = outcome else { return };
    let ended = match slot().and_then(RunnerSlot::cancelled) {
        _ if failure.code != QUERY_CANCELED => Ended::Failed(failure),
        Some(id) if id == claimed.id => Ended::Cancelled,
        // It was for the job before.
        Some(_) => Ended::Interrupted,
        None => match limit.get() {
            Some((begun, milliseconds)) if is_over(begun, milliseconds) => Ended::Failed(timed_out(milliseconds)),
            _ => Ended::Failed(failure),
        },
    };
    record(claimed, &ended);
}

fn record(claimed: &Claimed, ended: &Ended) {
    let recorded = transaction::run(|| match ended {
        Ended::Failed(failure) => jobs::fail(claimed, &Failed::from(failure)).map(drop),
        Ended::Cancelled => jobs::cancelled(claimed),
        Ended::Interrupted => jobs::runner_died(claimed, false),
    });
    if let Err(failure) = recorded {
        pgrx::warning!("imbus could not record the failure of job {}: {failure}", claimed.id);
    }
}

/// SQLSTATE query_canceled.
const QUERY_CANCELED: &str = "57014";

/// How an attempt ended that did not succeed.
enum Ended {
    Failed(Failure),
    Cancelled,
    Interrupted,
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

fn attempt(claimed: &Claimed, limit: &Cell<Option<(Instant, i64)>>) -> Outcome<()> {
    let Some(work) = jobs::lock(claimed)? else { return Ok(()) };
    worker::report_activity(Some(&work.target));
    let arguments = Arguments::parse(&work.args, &work.kwargs)?;
    let guard = work.timeout.map(|milliseconds| {
        limit.set(Some((Instant::now(), milliseconds)));
        Limit::set(milliseconds)
    });
    let result = call::run(&work.target, &arguments, &work.search_path)?;
    drop(guard);
    jobs::succeed(claimed, result.as_deref())
}

/// Forgets what a job left in the session: settings, temporary tables, prepared statements, session locks.
fn reset() {
    let done = transaction::run(|| {
        let mut statement =
            pg_sys::DiscardStmt { type_: pg_sys::NodeTag::T_DiscardStmt, target: pg_sys::DiscardMode::DISCARD_ALL };
        // SAFETY: what DISCARD ALL runs; allowed because this is no transaction block of a client's.
        unsafe {
            pg_sys::PopActiveSnapshot();
            ffi::guarded(|| ffi::DiscardCommand(&mut statement, true));
        }
        Ok(())
    });
    if let Err(failure) = done {
        // A session that cannot be cleaned must not serve another job.
        pgrx::warning!("imbus could not reset a job's session: {failure}");
        launch::exit();
    }
}
