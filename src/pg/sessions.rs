//! Sessions that have claimed jobs for a runner outside: each has a number, never given twice, that stands with its claims
//! and in shared memory for as long as it lives. When it ends, however, the database worker hears of it at once.

use super::report::{Outcome, not_preloaded, report};
use super::{launch, shared, worker};
use pgrx::prelude::*;
use std::cell::Cell;

thread_local! {
    /// This session's number, once it has claimed.
    static MINE: Cell<Option<i64>> = const { Cell::new(None) };
}

/// This session's number. Errors: 55000 without the workers, 53300 when too many sessions have claims.
pub fn mine() -> Outcome<i64> {
    if let Some(number) = MINE.get() {
        return Ok(number);
    }
    let shared = shared::get().ok_or_else(|| not_preloaded("a job"))?;
    let number = shared.enter_session().ok_or_else(|| {
        report(
            PgSqlErrorCode::ERRCODE_TOO_MANY_CONNECTIONS,
            "too many sessions have claimed jobs",
            &format!("There may be {} at the same time.", shared::SESSIONS),
            "Have fewer runners claim more jobs each.",
        )
    })?;
    MINE.set(Some(number));
    launch::at_exit(leave);
    Ok(number)
}

/// The session ends: its claims are given back.
#[pg_guard]
unsafe extern "C-unwind" fn leave(_code: i32, _argument: pg_sys::Datum) {
    if let (Some(shared), Some(number)) = (shared::get(), MINE.get()) {
        shared.leave_session(number);
        shared.wake_for_orphans(worker::database_oid());
    }
}
