//! The commit-order ring in shared memory (core::ring): its allocation, and what this process's transactions have
//! written so far, which goes into it right after their commit.

use crate::core::ring::{Entry, Kind, Ring};
use crate::core::written::Written;
use pgrx::prelude::*;
use std::cell::RefCell;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// Entries (ranges of ids) in the ring, of 32 bytes each: some seconds of commits at the highest rate, so that a worker
/// that restarts or is held up still finds them. When it does not, only the order is lost: the table has the rows.
const ENTRIES: usize = 1 << 17;

/// Ranges that one transaction announces one by one; the worker looks for more of them by its number.
const RANGES: usize = ENTRIES / 16;

/// The ring.
pub type Shared = Ring<AtomicU64, ENTRIES>;

/// Set in the postmaster and inherited by each of its children, at the same address.
static RING: AtomicPtr<Shared> = AtomicPtr::new(std::ptr::null_mut());

static mut PREVIOUS_REQUEST: pg_sys::shmem_request_hook_type = None;
static mut PREVIOUS_STARTUP: pg_sys::shmem_startup_hook_type = None;

thread_local! {
    static WRITTEN: RefCell<Written> = RefCell::new(Written::default());
    /// Numbers of the prepared transactions that the running command commits.
    static FINISHED: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// Asks for the memory; in the postmaster, while preloading.
pub fn request() {
    // SAFETY: `_PG_init` in the postmaster, before any other thread or process.
    unsafe {
        PREVIOUS_REQUEST = pg_sys::shmem_request_hook;
        pg_sys::shmem_request_hook = Some(on_request);
        PREVIOUS_STARTUP = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(on_startup);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_request() {
    // SAFETY: called by PostgreSQL at its time; the hook before comes first.
    unsafe {
        if let Some(previous) = PREVIOUS_REQUEST {
            pg_sys::submodules::ffi::pg_guard_ffi_boundary(|| previous());
        }
        pg_sys::RequestAddinShmemSpace(size_of::<Shared>());
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_startup() {
    // SAFETY: as above. Fresh shared memory is not promised to be zero, so it is made so by whoever comes first, which
    // is the postmaster alone; zeroed memory is an empty ring.
    unsafe {
        if let Some(previous) = PREVIOUS_STARTUP {
            pg_sys::submodules::ffi::pg_guard_ffi_boundary(|| previous());
        }
        let mut found = false;
        let memory = pg_sys::ShmemInitStruct(c"imbus ring".as_ptr(), size_of::<Shared>(), &mut found);
        if !found {
            std::ptr::write_bytes(memory.cast::<u8>(), 0, size_of::<Shared>());
        }
        RING.store(memory.cast(), Ordering::Release);
    }
}

/// The ring; None when the library was not preloaded.
pub fn get() -> Option<&'static Shared> {
    // SAFETY: allocated above for the life of the server, all atomics.
    unsafe { RING.load(Ordering::Acquire).as_ref() }
}

/// The running transaction has inserted this row into the bus table.
pub fn note(id: i64) {
    // SAFETY: a plain read of this session's state.
    let level = u32::try_from(unsafe { pg_sys::GetCurrentTransactionNestLevel() }).unwrap_or(1);
    WRITTEN.with_borrow_mut(|written| written.note(level, id));
}

/// Whether this id was the last one noted.
pub fn is_noted(id: i64) -> bool {
    WRITTEN.with_borrow(|written| written.ranges().last().is_some_and(|(_, last)| last == id))
}

/// Whether the running transaction has published anything.
pub fn has_notes() -> bool {
    WRITTEN.with_borrow(|written| !written.is_empty())
}

/// The running command commits the prepared transaction with these numbers (its own and its savepoints').
pub fn finishing(numbers: Vec<u32>) {
    FINISHED.set(numbers);
}

/// A savepoint at this level was released.
pub fn release_savepoint(level: u32) {
    WRITTEN.with_borrow_mut(|written| written.commit_level(level));
}

/// A savepoint at this level was rolled back.
pub fn abort_savepoint(level: u32) {
    WRITTEN.with_borrow_mut(|written| written.abort_level(level));
}

/// The transaction has ended without a trace.
pub fn forget() {
    WRITTEN.with_borrow_mut(Written::clear);
    FINISHED.with_borrow_mut(Vec::clear);
}

/// The transaction has committed: its ids go into the ring. Whether there were any. Called after commit: takes no
/// memory, cannot fail.
pub fn committed(database: u32) -> bool {
    let Some(ring) = get() else {
        forget();
        return false;
    };
    let any = WRITTEN.with_borrow(|written| {
        let ranges = written.ranges();
        let count = ranges.len();
        if count > RANGES {
            append_numbers(ring, database);
            return true;
        }
        ring.append(ranges.enumerate().map(|(at, (first, last))| {
            let kind = if at + 1 == count { Kind::Committed } else { Kind::Part };
            Entry { database, kind, first, last }
        }));
        count > 0
    });
    let finished = FINISHED.with_borrow(|numbers| {
        append_finished(ring, database, numbers.iter().copied());
        !numbers.is_empty()
    });
    forget();
    any || finished
}

/// A transaction of very many ranges is announced by its number and those of its savepoints. At this time PostgreSQL
/// still has them.
fn append_numbers(ring: &Shared, database: u32) {
    // SAFETY: the list belongs to the transaction, which is ended after this.
    let children = unsafe {
        let mut list = std::ptr::null_mut();
        let count = usize::try_from(pg_sys::xactGetCommittedChildren(&mut list)).unwrap_or(0).min(RANGES);
        if list.is_null() { &[][..] } else { std::slice::from_raw_parts(list, count) }
    };
    // SAFETY: a plain read of this session's state.
    let top = unsafe { pg_sys::GetTopTransactionIdIfAny() };
    let number = |at: usize| at.checked_sub(1).and_then(|at| children.get(at)).unwrap_or(&top).into_inner();
    append_finished(ring, database, (0..children.len() + 1).map(number));
}

/// Announces a transaction by its numbers.
fn append_finished(ring: &Shared, database: u32, numbers: impl ExactSizeIterator<Item = u32>) {
    let count = numbers.len() as i64;
    ring.append(numbers.enumerate().map(|(at, number)| Entry {
        database,
        kind: Kind::Finished,
        first: i64::from(number),
        last: count - 1 - at as i64,
    }));
}

/// The transaction was prepared: its ids are waited for until somebody ends it.
pub fn prepared(database: u32) -> bool {
    // SAFETY: a plain read of this session's state.
    let number = unsafe { pg_sys::GetTopTransactionIdIfAny() }.into_inner();
    let any = WRITTEN.with_borrow(|written| {
        let entry = |range| Entry::prepared(database, range, number);
        if let Some(ring) = get() {
            ring.append(written.ranges().map(entry));
        }
        !written.is_empty()
    });
    forget();
    any
}
