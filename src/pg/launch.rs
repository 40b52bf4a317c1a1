//! Registering background workers.

use super::report::{Outcome, internal};
use pgrx::prelude::*;
use std::ffi::{CString, c_char};

/// Seconds after which the postmaster brings the gateway back ("within 5 s", SPEC section 10).
const RESTART: i32 = 1;

/// A worker to register.
pub struct Launch<'a> {
    /// Shown as `backend_type` in pg_stat_activity.
    pub name: &'a str,
    /// The exported function it runs.
    pub function: &'a str,
    /// Handed to that function.
    pub argument: u64,
}

fn copy<const N: usize>(to: &mut [c_char; N], text: &str) {
    let bytes = text.bytes().filter(|byte| *byte != 0).take(N - 1);
    for (cell, byte) in to.iter_mut().zip(bytes) {
        *cell = byte as c_char;
    }
}

fn worker(launch: &Launch<'_>) -> pg_sys::BackgroundWorker {
    let mut worker = pg_sys::BackgroundWorker {
        bgw_flags: (pg_sys::BGWORKER_SHMEM_ACCESS | pg_sys::BGWORKER_BACKEND_DATABASE_CONNECTION) as i32,
        // A standby starts the library without error, and serves when promoted.
        bgw_start_time: pg_sys::BgWorkerStartTime::BgWorkerStart_RecoveryFinished,
        bgw_main_arg: pg_sys::Datum::from(launch.argument as usize),
        ..Default::default()
    };
    copy(&mut worker.bgw_name, launch.name);
    copy(&mut worker.bgw_type, launch.name);
    copy(&mut worker.bgw_library_name, "imbus");
    copy(&mut worker.bgw_function_name, launch.function);
    worker
}

/// Registers a worker with the postmaster, at preload; it is brought back whenever it ends.
pub fn register(launch: &Launch<'_>) {
    let mut worker = worker(launch);
    worker.bgw_restart_time = RESTART;
    // SAFETY: called by the postmaster from `_PG_init`; PostgreSQL copies the struct.
    unsafe { pg_sys::RegisterBackgroundWorker(&mut worker) };
}

/// A dynamic worker's handle, to ask the postmaster about it.
pub struct Handle(*mut pg_sys::BackgroundWorkerHandle);

impl Handle {
    /// Whether the worker has ended (or could never be started).
    pub fn is_stopped(&self) -> bool {
        let mut pid = 0;
        // SAFETY: the handle was palloc'd in TopMemoryContext by `start` and lives as long as the process.
        let status = unsafe { pg_sys::GetBackgroundWorkerPid(self.0, &mut pid) };
        status == pg_sys::BgwHandleStatus::BGWH_STOPPED
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: palloc'd by RegisterDynamicBackgroundWorker, freed once.
        unsafe { pg_sys::pfree(self.0.cast()) };
    }
}

/// Starts a worker that is not brought back by the postmaster. None when max_worker_processes leaves no slot.
pub fn start(launch: &Launch<'_>) -> Outcome<Option<Handle>> {
    let mut worker = worker(launch);
    worker.bgw_restart_time = pg_sys::BGW_NEVER_RESTART;
    let mut handle = std::ptr::null_mut();
    // SAFETY: main thread; the start and end of the worker set this process's latch; the handle must outlive the
    // current transaction's memory.
    unsafe {
        worker.bgw_notify_pid = pg_sys::MyProcPid;
        let before = pg_sys::MemoryContextSwitchTo(pg_sys::TopMemoryContext);
        let registered = pg_sys::RegisterDynamicBackgroundWorker(&mut worker, &mut handle);
        pg_sys::MemoryContextSwitchTo(before);
        Ok((registered && !handle.is_null()).then_some(Handle(handle)))
    }
}

/// Connects the worker to a database as a role (both by OID), or as the bootstrap superuser when `role` is 0.
pub fn connect(database: u32, role: u32) {
    // SAFETY: once, at the start of a worker's main function; failure is FATAL, which ends the process.
    unsafe {
        pg_sys::BackgroundWorkerInitializeConnectionByOid(pg_sys::Oid::from(database), pg_sys::Oid::from(role), 0);
    }
}

/// Connects the worker to a database by name, as the bootstrap superuser.
pub fn connect_by_name(database: &str) -> Outcome<()> {
    let name = CString::new(database).map_err(internal)?;
    // SAFETY: as `connect`.
    unsafe { pg_sys::BackgroundWorkerInitializeConnection(name.as_ptr(), std::ptr::null(), 0) };
    Ok(())
}

/// Runs `callback` when this process ends, before it leaves shared memory, however it ends (but for a crash).
pub fn at_exit(callback: unsafe extern "C-unwind" fn(i32, pg_sys::Datum)) {
    // SAFETY: a plain function.
    unsafe { pg_sys::before_shmem_exit(Some(callback), pg_sys::Datum::from(0)) };
}

/// Ends this worker in order; the postmaster does not log it.
pub fn exit() -> ! {
    leave(0)
}

/// Ends this worker so that the postmaster brings it back.
pub fn exit_to_restart() -> ! {
    leave(1)
}

#[allow(unreachable_code)] // proc_exit never returns, but not all of pgrx's bindings say so
fn leave(code: i32) -> ! {
    // SAFETY: runs the exit callbacks.
    unsafe { pg_sys::proc_exit(code) };
    std::process::exit(code)
}
