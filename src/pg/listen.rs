//! LISTEN inside a background worker, where the SQL statement is refused. What async.c delivers to a "client" is taken
//! off in a message method of our own; the same on PostgreSQL 15 to 18 (commands/async.h, libpq/libpq.h).

use super::ffi::{self, CommMethods, guarded};
use super::transaction::{self, Failure};
use pgrx::pg_sys;
use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int};

/// One heard notification: the process that sent it and its payload.
#[derive(Debug, PartialEq, Eq)]
pub struct Heard {
    pub pid: i32,
    pub payload: String,
}

thread_local! {
    static HEARD: RefCell<Vec<Heard>> = const { RefCell::new(Vec::new()) };
}

unsafe extern "C-unwind" fn nothing() {}

unsafe extern "C-unwind" fn zero() -> c_int {
    0
}

unsafe extern "C-unwind" fn no() -> bool {
    false
}

unsafe extern "C-unwind" fn put(kind: c_char, data: *const c_char, len: usize) -> c_int {
    // SAFETY: async.c passes `len` readable bytes. Nothing here can panic or raise.
    let bytes = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), len) };
    if kind as u8 == b'A'
        && let Some(heard) = parse(bytes)
    {
        HEARD.with(|list| list.borrow_mut().push(heard));
    }
    0
}

unsafe extern "C-unwind" fn put_noblock(kind: c_char, data: *const c_char, len: usize) {
    // SAFETY: as `put`.
    unsafe { put(kind, data, len) };
}

static METHODS: CommMethods = CommMethods {
    comm_reset: nothing,
    flush: zero,
    flush_if_writable: zero,
    is_send_pending: no,
    putmessage: put,
    putmessage_noblock: put_noblock,
};

/// Reads a NotificationResponse: int32 pid, channel, NUL, payload, NUL.
fn parse(bytes: &[u8]) -> Option<Heard> {
    let (pid, rest) = bytes.split_at_checked(4)?;
    let pid = i32::from_be_bytes(pid.try_into().ok()?);
    let mut strings = rest.split(|byte| *byte == 0);
    strings.next()?;
    let payload = String::from_utf8_lossy(strings.next()?).into_owned();
    Some(Heard { pid, payload })
}

/// Starts to listen on a channel in the current database. Call once, outside any transaction.
pub fn listen(channel: &str) -> Result<(), Failure> {
    let channel = CString::new(channel).unwrap_or_default();
    // SAFETY: the methods live for ever; PostgreSQL's own are not used in a worker without a client.
    unsafe { ffi::PqCommMethods = &METHODS };
    transaction::run(|| {
        // SAFETY: inside a transaction, on the main thread.
        unsafe { guarded(|| ffi::Async_Listen(channel.as_ptr())) };
        Ok(())
    })
}

/// Takes what has been heard. Call outside any transaction.
pub fn take() -> Vec<Heard> {
    // SAFETY: a flag set by the signal handler; the destination is put back by the guard even when an ERROR unwinds.
    unsafe {
        if ffi::notifyInterruptPending != 0 {
            let _back = Destination(pg_sys::whereToSendOutput);
            pg_sys::whereToSendOutput = pg_sys::CommandDest::DestRemote;
            guarded(|| ffi::ProcessNotifyInterrupt(false));
        }
    }
    HEARD.with(|list| std::mem::take(&mut *list.borrow_mut()))
}

/// Whether something waits that did not set the latch (a NOTIFY of this very process).
pub fn pending() -> bool {
    // SAFETY: a plain flag.
    unsafe { ffi::notifyInterruptPending != 0 }
}

struct Destination(pg_sys::CommandDest::Type);

impl Drop for Destination {
    fn drop(&mut self) {
        // SAFETY: main thread.
        unsafe { pg_sys::whereToSendOutput = self.0 };
    }
}

/// Queues a NOTIFY in the current transaction. Raises what pg_notify raises (empty or long channel, long payload).
pub fn notify(channel: &str, payload: &str) {
    let (channel, payload) = (CString::new(channel).unwrap_or_default(), CString::new(payload).unwrap_or_default());
    // SAFETY: copies both strings; errors unwind as ERRORs.
    unsafe { guarded(|| ffi::Async_Notify(channel.as_ptr(), payload.as_ptr())) };
}
