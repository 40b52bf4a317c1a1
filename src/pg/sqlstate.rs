//! SQLSTATEs of a user's own (`RAISE … USING ERRCODE = 'P1234'`): pgrx knows PostgreSQL's, and makes XX000 of others. An error
//! context callback sees each error as it is raised.

use pgrx::prelude::*;
use std::cell::Cell;
use std::ffi::c_void;

thread_local! {
    /// The packed SQLSTATE of the last error raised while somebody watches.
    static RAISED: Cell<i32> = const { Cell::new(0) };
}

/// Watches while it lives.
pub struct Watch(*mut pg_sys::ErrorContextCallback);

/// Runs `work` and keeps the SQLSTATE of what it raises.
pub fn watched<T>(work: impl FnOnce() -> T) -> T {
    RAISED.set(0);
    // SAFETY: main thread; the callback lives on this stack until the guard has taken it off again, also while unwinding.
    unsafe {
        let mut callback = pg_sys::ErrorContextCallback {
            previous: pg_sys::error_context_stack,
            callback: Some(raised),
            arg: std::ptr::null_mut(),
        };
        let guard = Watch(callback.previous);
        pg_sys::error_context_stack = &raw mut callback;
        let result = work();
        drop(guard);
        result
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // SAFETY: what was there before.
        unsafe { pg_sys::error_context_stack = self.0 };
    }
}

/// The packed SQLSTATE of the last error raised; None for none.
pub fn take() -> Option<i32> {
    Some(RAISED.take()).filter(|code| *code != 0)
}

unsafe extern "C-unwind" fn raised(_argument: *mut c_void) {
    // SAFETY: called by errfinish, which has an error at hand.
    let code = unsafe { pg_sys::geterrcode() };
    // The first two characters, six bits each, counted from '0': classes 00 to 02 are no errors (errcodes.txt).
    let is_error = code & 0xfff > 2 << 6 || code & 0x3f != 0;
    if is_error {
        RAISED.set(code);
    }
}
