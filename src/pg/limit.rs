//! A time limit for what runs in this process: a cancel at its end, and again until it is heeded, since code may catch
//! one.

use super::ffi;
use pgrx::prelude::*;

/// Then it is cancelled so often, should it catch that, in milliseconds.
const AGAIN: i32 = 50;

/// A time limit, lifted when dropped.
pub struct Limit;

impl Limit {
    /// So many milliseconds from now.
    pub fn set(milliseconds: i64) -> Limit {
        // SAFETY: the handler is registered in every backend (InitPostgres); it asks for a cancel.
        unsafe {
            let end = pg_sys::GetCurrentTimestamp().saturating_add(milliseconds.saturating_mul(1000));
            ffi::guarded(|| ffi::enable_timeout_every(ffi::STATEMENT_TIMEOUT, end, AGAIN));
        }
        Limit
    }

    /// There is none any more; a cancel that came too late is not for what comes next.
    pub fn lift() {
        // SAFETY: as in `set`; one that is not set is no error.
        unsafe {
            ffi::guarded(|| ffi::disable_timeout(ffi::STATEMENT_TIMEOUT, false));
            pg_sys::QueryCancelPending = 0;
        }
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        Limit::lift();
    }
}
