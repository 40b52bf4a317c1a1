//! What the three kinds of worker have in common: signals, waiting, reload, the main-thread mark, small look-ups.

use pgrx::prelude::*;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Microseconds between 1970 and 2000, PostgreSQL's epoch.
const POSTGRES_EPOCH: i64 = 946_684_800_000_000;

static RELOAD: AtomicBool = AtomicBool::new(false);

/// PostgreSQL may be touched on one thread only; pgrx checks the same at each call, this names the rule.
pub fn assert_main_thread() {
    pg_sys::submodules::thread_check::check_active_thread();
}

#[pg_guard]
unsafe extern "C-unwind" fn on_sighup(_signal: i32) {
    RELOAD.store(true, Ordering::Release);
    // SAFETY: SetLatch is safe in a signal handler; the interrupted code keeps its errno.
    unsafe {
        let errno = *libc::__errno_location();
        pg_sys::SetLatch(pg_sys::MyLatch);
        *libc::__errno_location() = errno;
    }
}

/// Installs the handlers of a worker and unblocks signals: SIGTERM ends it at the next check, as a backend.
pub fn start() {
    // SAFETY: first thing in a background worker's main function.
    unsafe {
        super::ffi::pqsignal(libc::SIGTERM, Some(super::ffi::die));
        super::ffi::pqsignal(libc::SIGHUP, Some(on_sighup));
        pg_sys::BackgroundWorkerUnblockSignals();
    }
}

/// Re-reads the configuration when SIGHUP came; whether it did.
pub fn reload() -> bool {
    let asked = RELOAD.swap(false, Ordering::AcqRel);
    if asked {
        // SAFETY: main thread, outside any transaction.
        unsafe { pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP) };
    }
    asked
}

/// What to wait for besides the latch.
pub struct Waiting {
    pub socket: Option<RawFd>,
    pub writable: bool,
    pub timeout: Duration,
}

/// Sleeps as [`wait`] does in a worker that has nothing to do: a cancel request is for a statement, and there is none
/// (PostgreSQL's idle backends ignore it likewise, ProcessInterrupts in postgres.c).
pub fn idle(waiting: &Waiting) {
    sleep(waiting);
    // SAFETY: a flag that the signal handler sets.
    unsafe { pg_sys::QueryCancelPending = 0 };
    check_interrupts();
}

/// Sleeps until the latch, the socket or the time; ends the process when the postmaster died, raises when it was told
/// to terminate or to cancel.
pub fn wait(waiting: &Waiting) {
    sleep(waiting);
    check_interrupts();
}

fn sleep(waiting: &Waiting) {
    let mut events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
    if waiting.socket.is_some() {
        events |= pg_sys::WL_SOCKET_READABLE;
        if waiting.writable {
            events |= pg_sys::WL_SOCKET_WRITEABLE;
        }
    }
    let millis = i64::try_from(waiting.timeout.as_millis()).unwrap_or(i64::MAX);
    // SAFETY: main thread; MyLatch is this process's own.
    unsafe {
        let socket = waiting.socket.unwrap_or(-1);
        pg_sys::WaitLatchOrSocket(pg_sys::MyLatch, events as i32, socket, millis, pg_sys::PG_WAIT_EXTENSION);
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
}

/// Ends the process when it was told to.
pub fn check_interrupts() {
    pgrx::check_for_interrupts!();
}

/// Microseconds since 2000, PostgreSQL's clock.
pub fn now() -> i64 {
    // SAFETY: reads the clock.
    unsafe { pg_sys::GetCurrentTimestamp() }
}

/// When the transaction began, likewise.
pub fn transaction_start() -> i64 {
    // SAFETY: a plain value of the session.
    unsafe { pg_sys::GetCurrentTransactionStartTimestamp() }
}

/// The same time in microseconds since 1970.
pub fn since_1970(at: i64) -> i64 {
    at.saturating_add(POSTGRES_EPOCH)
}

/// Seconds since 1970.
pub fn unix_time() -> i64 {
    since_1970(now()) / 1_000_000
}

/// OID of the database this process is connected to.
pub fn database_oid() -> u32 {
    // SAFETY: a plain global.
    u32::from(unsafe { pg_sys::MyDatabaseId })
}

/// This process's id.
pub fn pid() -> i32 {
    // SAFETY: a plain global.
    unsafe { pg_sys::MyProcPid }
}

/// Whether the current user may see everything: a member of pg_monitor (superusers are).
pub fn is_monitor() -> bool {
    // SAFETY: catalog look-ups inside a transaction.
    unsafe { pg_sys::has_privs_of_role(pg_sys::GetUserId(), pg_sys::Oid::from(PG_MONITOR)) }
}

/// Whether the current user may end what others have: a member of pg_signal_backend (superusers are).
pub fn may_signal() -> bool {
    // SAFETY: catalog look-ups inside a transaction.
    unsafe { pg_sys::has_privs_of_role(pg_sys::GetUserId(), pg_sys::Oid::from(PG_SIGNAL_BACKEND)) }
}

/// OID of the role pg_signal_backend (catalog/pg_authid.dat, fixed in all versions).
const PG_SIGNAL_BACKEND: u32 = 4200;

/// OID of the role pg_monitor (catalog/pg_authid.dat, fixed in all versions).
const PG_MONITOR: u32 = 3373;

/// Shows in pg_stat_activity what the worker does: `active` with a query, or `idle`.
pub fn report_activity(query: Option<&str>) {
    let text = query.map(|query| std::ffi::CString::new(query).unwrap_or_default());
    let state = match &text {
        Some(_) => pg_sys::BackendState::STATE_RUNNING,
        None => pg_sys::BackendState::STATE_IDLE,
    };
    // SAFETY: PostgreSQL copies the text.
    unsafe { pg_sys::pgstat_report_activity(state, text.as_ref().map_or(std::ptr::null(), |text| text.as_ptr())) };
}
