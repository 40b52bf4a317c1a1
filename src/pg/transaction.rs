//! The only begin, commit and abort of the workers, and the only switch of user.

use super::report::Outcome;
use super::{guard, sqlstate};
use pgrx::pg_sys::panic::ErrorReportable;
use pgrx::pg_sys::panic::{CaughtError, ErrorReportWithLevel};
use pgrx::prelude::*;
use std::ffi::CStr;
use std::panic::AssertUnwindSafe;
use std::sync::OnceLock;

/// Why a transaction of a worker failed.
#[derive(Debug)]
pub struct Failure {
    pub code: String,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.message, self.code)
    }
}

impl From<ErrorReportWithLevel> for Failure {
    fn from(report: ErrorReportWithLevel) -> Failure {
        Failure {
            code: characters(code(report.sql_error_code())),
            message: report.message().to_owned(),
            detail: report.detail().map(str::to_owned),
            hint: report.hint().map(str::to_owned),
        }
    }
}

/// An error's packed SQLSTATE: pgrx takes one that it does not know for an internal error.
fn code(known: PgSqlErrorCode) -> i32 {
    let raised = sqlstate::take();
    match known {
        PgSqlErrorCode::ERRCODE_INTERNAL_ERROR => raised.unwrap_or(known as i32),
        _ => known as i32,
    }
}

/// The five characters of a packed SQLSTATE (elog.h, MAKE_SQLSTATE: six bits each, counted from '0').
fn characters(packed: i32) -> String {
    (0..5).map(|i| char::from(((packed >> (6 * i)) & 0x3f) as u8 + b'0')).collect()
}

/// Runs `work` in a transaction of its own with a snapshot, and commits. An ERROR, an `Err` or a panic inside aborts it
/// and is returned; FATAL ends the process as always.
pub fn run<T>(work: impl FnOnce() -> Outcome<T>) -> Result<T, Failure> {
    run_at(pg_sys::XACT_READ_COMMITTED, work)
}

/// The same with one snapshot for all statements, taken before `work` begins.
pub fn run_in_one_snapshot<T>(work: impl FnOnce() -> Outcome<T>) -> Result<T, Failure> {
    run_at(pg_sys::XACT_REPEATABLE_READ, work)
}

fn run_at<T>(isolation: u32, work: impl FnOnce() -> Outcome<T>) -> Result<T, Failure> {
    PgTryBuilder::new(AssertUnwindSafe(|| {
        // SAFETY: a worker's top level, outside any transaction.
        unsafe {
            pg_sys::SetCurrentStatementStartTimestamp();
            pg_sys::StartTransactionCommand();
            // Whatever ALTER DATABASE … SET default_transaction_… says.
            pg_sys::XactReadOnly = false;
            pg_sys::XactIsoLevel = isolation as i32;
            pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        }
        let value = work().unwrap_or_report();
        // SAFETY: pairs with the above; deferred triggers may still raise, which is caught like any ERROR.
        unsafe {
            if pg_sys::ActiveSnapshotSet() {
                pg_sys::PopActiveSnapshot();
            }
            pg_sys::CommitTransactionCommand();
            pg_sys::pgstat_report_stat(false);
        }
        Ok(value)
    }))
    .catch_others(|error| Err(abort(error)))
    .catch_rust_panic(|error| Err(abort(error)))
    .execute()
}

impl From<CaughtError> for Failure {
    fn from(error: CaughtError) -> Failure {
        match error {
            CaughtError::PostgresError(report) | CaughtError::ErrorReport(report) => report.into(),
            CaughtError::RustPanic { ereport, .. } => ereport.into(),
        }
    }
}

fn abort(error: CaughtError) -> Failure {
    // SAFETY: after a caught ERROR the transaction is aborted at once, as PostgreSQL's own main loop does.
    unsafe {
        pg_sys::InterruptHoldoffCount += 1;
        pg_sys::AbortCurrentTransaction();
        pg_sys::InterruptHoldoffCount -= 1;
    }
    error.into()
}

/// Has `now()` and `statement_timestamp()` begin anew, as in a transaction of its own: later than before, if by a microsecond only.
pub fn restart_clock() {
    // SAFETY: main thread, inside a transaction. What parallel workers do as they start; only a server that was built with
    // assertions asks that it be one.
    unsafe {
        if !has_assertions() {
            pg_sys::SetCurrentStatementStartTimestamp();
            let now = pg_sys::GetCurrentStatementStartTimestamp();
            let now = now.max(pg_sys::GetCurrentTransactionStartTimestamp() + 1);
            pg_sys::SetParallelStartTimestamps(now, now);
        }
    }
}

fn has_assertions() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        // SAFETY: main thread; a preset option's value is a C string.
        let found = unsafe { pg_sys::GetConfigOption(c"debug_assertions".as_ptr(), true, false) };
        // SAFETY: as above.
        !found.is_null() && unsafe { CStr::from_ptr(found) } != c"off"
    })
}

/// Runs `work` in a savepoint that is rolled back whatever comes of it: its locks go, what it did to sequences stays.
pub fn in_passing<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    // SAFETY: inside a transaction; as PL/pgSQL does for its EXCEPTION blocks (pl_exec.c).
    unsafe {
        let (context, owner) = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
        // An ERROR that left the savepoint open would end it alone, and leave the transaction in it.
        let undo = |error: CaughtError| {
            pg_sys::InterruptHoldoffCount += 1;
            pg_sys::RollbackAndReleaseCurrentSubTransaction();
            pg_sys::InterruptHoldoffCount -= 1;
            pg_sys::MemoryContextSwitchTo(context);
            pg_sys::CurrentResourceOwner = owner;
            error.rethrow()
        };
        PgTryBuilder::new(AssertUnwindSafe(|| {
            pg_sys::BeginInternalSubTransaction(std::ptr::null());
            pg_sys::MemoryContextSwitchTo(context);
            let result = work().unwrap_or_report();
            pg_sys::RollbackAndReleaseCurrentSubTransaction();
            pg_sys::MemoryContextSwitchTo(context);
            pg_sys::CurrentResourceOwner = owner;
            Ok(result)
        }))
        .catch_others(undo)
        .catch_rust_panic(undo)
        .execute()
    }
}

/// Runs `work` in a savepoint, which is kept if it succeeds: its effects are the transaction's, its locks and its settings
/// go. Otherwise all it did is undone, and the transaction goes on. FATAL ends the process as always.
pub fn in_savepoint<T>(work: impl FnOnce() -> Outcome<T>) -> Result<T, Failure> {
    // SAFETY: inside a transaction; as PL/pgSQL does for its EXCEPTION blocks (pl_exec.c). The nest level of settings is
    // outside of the savepoint's own, so that what `work` has set for its session goes too.
    unsafe {
        let (context, owner) = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
        let nest = pg_sys::NewGUCNestLevel();
        let undo = |error| {
            pg_sys::InterruptHoldoffCount += 1;
            pg_sys::RollbackAndReleaseCurrentSubTransaction();
            pg_sys::InterruptHoldoffCount -= 1;
            Failure::from(error)
        };
        let result = PgTryBuilder::new(AssertUnwindSafe(|| {
            pg_sys::BeginInternalSubTransaction(std::ptr::null());
            pg_sys::MemoryContextSwitchTo(context);
            let value = work().unwrap_or_report();
            pg_sys::ReleaseCurrentSubTransaction();
            Ok(value)
        }))
        .catch_others(|error| Err(undo(error)))
        .catch_rust_panic(|error| Err(undo(error)))
        .execute();
        pg_sys::MemoryContextSwitchTo(context);
        pg_sys::CurrentResourceOwner = owner;
        pg_sys::AtEOXact_GUC(false, nest);
        result
    }
}

/// Runs `work` and takes back what it has set, also for its session.
pub fn without_settings<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    // SAFETY: as in `safely`.
    let nest = unsafe { pg_sys::NewGUCNestLevel() };
    let result = work();
    // SAFETY: pairs with NewGUCNestLevel.
    unsafe { pg_sys::AtEOXact_GUC(false, nest) };
    result
}

/// Runs `work` as another role, under SECURITY_RESTRICTED_OPERATION and with search_path `pg_catalog`, as autovacuum
/// runs user-owned code. An ERROR inside restores everything with the (sub)transaction's abort. Statements for a
/// superuser may mean these relations and imbus's own, whatever the names they use have come to mean.
pub fn as_owner<T>(owner: pg_sys::Oid, relations: [pg_sys::Oid; 2], work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    // SAFETY: a catalog look-up inside a transaction.
    let guard = unsafe { pg_sys::superuser_arg(owner) }.then(|| guard::allow(relations));
    let restore = User::switch(owner);
    let result = safely(work);
    drop(restore);
    drop(guard);
    result
}

/// Runs a function that the administrator has named as its owner, restricted likewise. What it means is its own business.
pub fn as_user<T>(owner: pg_sys::Oid, work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    let restore = User::switch(owner);
    let result = safely(work);
    drop(restore);
    result
}

/// Runs `work` with search_path `pg_catalog`, so that no operator or function of a user's is called by mistake.
pub fn safely<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    // SAFETY: the nest level is closed below; on ERROR the abort closes it.
    let nest = unsafe { pg_sys::NewGUCNestLevel() };
    set(c"search_path", c"pg_catalog, pg_temp", pg_sys::GucAction::GUC_ACTION_SAVE);
    let result = work();
    // SAFETY: pairs with NewGUCNestLevel.
    unsafe { pg_sys::AtEOXact_GUC(false, nest) };
    result
}

/// Hands this process's statistics of tables on at once.
pub fn report_statistics() {
    // SAFETY: main thread, outside any transaction.
    unsafe { pg_sys::pgstat_report_stat(true) };
}

/// Runs statements of imbus's own whose plans are made once and kept: along the index that was made for them, however
/// small the table is at that time and whatever is known of it.
pub fn along_indexes<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    // SAFETY: as in `safely`.
    let nest = unsafe { pg_sys::NewGUCNestLevel() };
    for method in [c"enable_seqscan", c"enable_bitmapscan", c"enable_sort", c"jit"] {
        set(method, c"off", pg_sys::GucAction::GUC_ACTION_SAVE);
    }
    set(c"plan_cache_mode", c"force_generic_plan", pg_sys::GucAction::GUC_ACTION_SAVE);
    let result = work();
    // SAFETY: pairs with NewGUCNestLevel.
    unsafe { pg_sys::AtEOXact_GUC(false, nest) };
    result
}

/// The same along indexes that are read as bitmaps only.
pub fn along_bitmaps<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    along_indexes(|| {
        // Until `along_indexes` ends.
        set(c"enable_bitmapscan", c"on", pg_sys::GucAction::GUC_ACTION_SAVE);
        work()
    })
}

/// Runs statements that join by hashing: the planner takes a parameter's array for a short one.
pub fn by_hashing<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    without_settings(|| {
        for method in [c"enable_nestloop", c"enable_mergejoin"] {
            set(method, c"off", pg_sys::GucAction::GUC_ACTION_SAVE);
        }
        work()
    })
}

/// Runs statements that look up rows by where they are.
pub fn by_places<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    without_settings(|| {
        for method in [c"enable_hashjoin", c"enable_mergejoin", c"enable_indexscan"] {
            set(method, c"off", pg_sys::GucAction::GUC_ACTION_SAVE);
        }
        work()
    })
}

/// Runs statements that wait for nobody's lock longer than 100 ms. Errors: 55P03.
pub fn with_lock_timeout<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    without_settings(|| {
        set(c"lock_timeout", c"100ms", pg_sys::GucAction::GUC_ACTION_SAVE);
        work()
    })
}

/// Sets a setting of PostgreSQL's for the rest of the transaction.
pub fn set_local(name: &CStr, value: &CStr) {
    set(name, value, pg_sys::GucAction::GUC_ACTION_LOCAL);
}

/// Sets a setting of PostgreSQL's for the life of a worker.
pub fn set_for_session(name: &CStr, value: &CStr) {
    set(name, value, pg_sys::GucAction::GUC_ACTION_SET);
}

fn set(name: &CStr, value: &CStr, action: pg_sys::GucAction::Type) {
    let (context, source) = (pg_sys::GucContext::PGC_USERSET, pg_sys::GucSource::PGC_S_SESSION);
    // SAFETY: main thread; C strings.
    unsafe { pg_sys::set_config_option(name.as_ptr(), value.as_ptr(), context, source, action, true, 0, false) };
}

/// The user before a switch; restored when dropped.
struct User {
    id: pg_sys::Oid,
    context: i32,
}

impl User {
    fn switch(to: pg_sys::Oid) -> User {
        let mut before = User { id: pg_sys::InvalidOid, context: 0 };
        // SAFETY: plain reads and writes of the session's user, main thread.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut before.id, &mut before.context);
            let restricted = pg_sys::SECURITY_RESTRICTED_OPERATION as i32;
            pg_sys::SetUserIdAndSecContext(to, before.context | restricted);
        }
        before
    }
}

impl Drop for User {
    fn drop(&mut self) {
        // SAFETY: as in `switch`.
        unsafe { pg_sys::SetUserIdAndSecContext(self.id, self.context) };
    }
}
