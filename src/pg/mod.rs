//! Everything that touches PostgreSQL, on the main thread of each process.

#![allow(clippy::result_large_err)] // pgrx's ErrorReport is large; errors are rare and end the statement.

mod authenticate;
mod bookmark;
mod bus;
mod call;
mod casualties;
mod catalog;
mod database;
mod datum;
mod direct;
mod dirty;
mod dispatcher;
mod ffi;
mod functions;
mod gateway;
mod guard;
mod guc;
mod hook;
mod job_functions;
mod jobs;
mod launch;
mod limit;
mod link;
mod listen;
mod odoo_jobs;
mod report;
mod ring;
mod rotation;
mod runner;
mod schedules;
mod session;
mod sessions;
mod shared;
mod sql;
mod sqlstate;
mod stats;
mod transaction;
mod trigger;
mod wake;
mod worker;
mod zone;

use pgrx::prelude::*;

/// Called by PostgreSQL when the library is loaded: by the postmaster with `shared_preload_libraries`, otherwise by
/// the first backend that calls one of its functions (then publishing and polling work, the workers do not).
#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    // SAFETY: no other thread exists yet. pgrx would add a Rust backtrace to every DETAIL where the server's environment
    // happens to ask for backtraces; users get PostgreSQL's messages alone.
    unsafe { std::env::set_var("RUST_LIB_BACKTRACE", "0") };
    let preloaded = shared::preloading();
    guc::define(preloaded);
    wake::register();
    guard::install();
    if preloaded {
        casualties::request();
        shared::request();
        ring::request();
        hook::install();
        gateway::register();
    }
}
