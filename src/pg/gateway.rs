//! The worker `imbus gateway`: one for the cluster. Hears NOTIFY imbus in the listen database, finds the databases that
//! have the extension and keeps a worker for each, owns the network threads.

use super::launch::{self, Handle, Launch};
use super::shared::{self, DatabaseSlot, DatabaseState, RunnerState, Shared};
use super::transaction::{self, safely};
use super::worker::{self, Waiting};
use super::{casualties, guc, listen, sql};
use crate::core::link::SOCKET_PATH;
use crate::core::payload;
use crate::core::settings::Database;
use crate::core::status;
use crate::net::bridge::{LogLevel, Net, Start, ToMain, ToNet};
use pgrx::prelude::*;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The channel Odoo notifies on (bus/models/bus.py).
const CHANNEL: &str = "imbus";
/// Between two looks at the list of databases when nobody announces a change.
const SCAN: Duration = Duration::from_secs(5);
/// Soonest relaunch of a database's worker, and the pace while some are missing.
const RELAUNCH: Duration = Duration::from_secs(1);
/// A worker registered this long ago that has not come up is counted as lost (microseconds).
const STARTING_MAX: i64 = 10_000_000;
/// Databases examined at the same time when the gateway starts.
const EXAMINED_AT_ONCE: usize = 4;

thread_local! {
    /// The network threads, here so that the exit callback finds them.
    static NET: RefCell<Option<Net>> = const { RefCell::new(None) };
}

/// Has the postmaster start the gateway.
pub fn register() {
    launch::register(&Launch { name: "imbus gateway", function: "imbus_gateway_main", argument: 0 });
}

/// What the gateway's main thread knows.
struct Gateway {
    shared: &'static Shared,
    /// Written by the network threads to wake this one.
    waker: UnixStream,
    handles: HashMap<u32, Handle>,
    /// Databases without the extension, not to be examined again until announced.
    absent: HashSet<u32>,
    /// All databases, by name.
    names: HashMap<String, u32>,
    served: Vec<Database>,
    next_scan: Instant,
    malformed_logged: bool,
    starved_logged: bool,
}

/// The gateway's main function.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn imbus_gateway_main(_argument: pg_sys::Datum) {
    worker::start();
    let Some(shared) = shared::get() else { launch::exit() };
    if let Err(error) = launch::connect_by_name(&guc::listen_database()) {
        error.report(PgLogLevel::FATAL);
    }
    shared.gateway.enter();
    launch::at_exit(leave);
    if let Err(failure) = listen::listen(CHANNEL) {
        pgrx::warning!("imbus gateway could not listen: {failure}");
        launch::exit_to_restart();
    }
    let Some(waker) = start_network(shared) else { launch::exit_to_restart() };
    shared.started.store(worker::now(), Ordering::Release);
    Gateway {
        shared,
        waker,
        handles: HashMap::new(),
        absent: HashSet::new(),
        names: HashMap::new(),
        served: Vec::new(),
        next_scan: Instant::now(),
        malformed_logged: false,
        starved_logged: false,
    }
    .serve()
}

/// Tells the clients (1001) and stops the network threads, however the gateway ends.
#[pg_guard]
unsafe extern "C-unwind" fn leave(_code: i32, _argument: pg_sys::Datum) {
    if let Some(net) = NET.with(|cell| cell.borrow_mut().take()) {
        net.stop();
    }
    if let Some(shared) = shared::get() {
        shared.gateway.leave();
        shared.port.store(0, Ordering::Release);
        shared.counters.connections_open.store(0, Ordering::Relaxed);
    }
}

/// Starts the threads with all signals blocked, so that only this thread gets them.
fn start_network(shared: &'static Shared) -> Option<UnixStream> {
    raise_file_limit();
    let (here, there) = UnixStream::pair().ok()?;
    here.set_nonblocking(true).ok()?;
    there.set_nonblocking(true).ok()?;
    let start = Start {
        settings: Arc::new(guc::settings()),
        databases: Arc::new(Vec::new()),
        link_path: SOCKET_PATH.into(),
        // A full pipe means that a wake-up waits already.
        wake_main: Box::new(move || drop((&there).write(&[1]))),
        census: Box::new(move || census(shared)),
    };
    // SAFETY: plain signal masks of this thread, restored below.
    let before = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        before
    };
    let net = Net::start(start);
    // SAFETY: restores the mask taken above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut()) };
    match net {
        Ok(net) => {
            NET.with(|cell| *cell.borrow_mut() = Some(net));
            Some(here)
        }
        Err(error) => {
            pgrx::warning!("imbus gateway could not start its network threads: {error}");
            None
        }
    }
}

/// How the databases are, from shared memory: the network threads call it.
fn census(shared: &Shared) -> Vec<status::Database> {
    let known = shared.databases().filter(|slot| !matches!(slot.state(), DatabaseState::Absent | DatabaseState::Free));
    let describe = |slot: &DatabaseSlot| status::Database {
        oid: slot.oid(),
        state: if slot.state() == DatabaseState::Running { "running" } else { "starting" },
        pid: slot.process.pid(),
        position: slot.position.load(Ordering::Relaxed),
        gaps: slot.gaps.load(Ordering::Relaxed),
        dispatched: slot.dispatched.load(Ordering::Relaxed),
    };
    known.map(describe).collect()
}

/// A socket a client: as many files as the system lets this process have.
fn raise_file_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: reads and writes this process's own limit.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && limit.rlim_cur < limit.rlim_max {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

fn tell(message: ToNet) {
    NET.with(|cell| {
        if let Some(net) = cell.borrow().as_ref() {
            net.send(message);
        }
    });
}

impl Gateway {
    fn serve(mut self) -> ! {
        loop {
            if worker::reload() {
                tell(ToNet::Settings(Arc::new(guc::settings())));
            }
            self.hear();
            self.drain();
            if self.shared.rescan.swap(false, Ordering::AcqRel) || Instant::now() >= self.next_scan {
                self.scan();
            }
            self.copy_counters();
            worker::report_activity(None);
            let timeout = self.next_scan.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let timeout = if listen::pending() { Duration::ZERO } else { timeout };
            worker::idle(&Waiting { socket: Some(self.waker.as_raw_fd()), writable: false, timeout });
        }
    }

    /// Wakes the databases that a NOTIFY names. Its channels are not believed: the workers read their tables.
    fn hear(&mut self) {
        for heard in listen::take().into_iter().filter(|heard| heard.pid != worker::pid()) {
            match payload::databases(&heard.payload) {
                Ok(names) => {
                    for oid in names.iter().filter_map(|name| self.names.get(name)) {
                        self.shared.look_at_bus(*oid);
                    }
                }
                Err(error) if !self.malformed_logged => {
                    self.malformed_logged = true;
                    pgrx::log!("imbus ignored a malformed NOTIFY from process {}: {error} (logged once)", heard.pid);
                }
                Err(_) => {}
            }
        }
    }

    /// Does what the network threads ask for.
    fn drain(&mut self) {
        let mut bytes = [0u8; 256];
        while (&self.waker).read(&mut bytes).is_ok_and(|n| n > 0) {}
        let messages: Vec<ToMain> =
            NET.with(|cell| cell.borrow().as_ref().map(|net| net.receiver().try_iter().collect()).unwrap_or_default());
        let mut payloads = Vec::new();
        for message in messages {
            match message {
                ToMain::Log { level, text, hint } => log(level, &text, hint.as_deref()),
                ToMain::Emit { payloads: more } => payloads.extend(more),
                ToMain::Listening { port } => self.shared.port.store(u32::from(port), Ordering::Release),
                ToMain::LinkUp { .. } | ToMain::LinkDown { .. } => {}
                ToMain::Died { thread, reason } => {
                    pgrx::warning!("imbus network thread {thread} died: {reason}; the gateway starts again");
                    launch::exit_to_restart();
                }
            }
        }
        if !payloads.is_empty() {
            emit(&payloads);
        }
    }

    /// Looks at the databases: starts workers that are missing, frees the slots of those that are gone.
    fn scan(&mut self) {
        self.next_scan = Instant::now() + SCAN;
        match self.shared.take_announced() {
            None => self.absent.clear(),
            Some(oids) => self.absent.retain(|oid| !oids.contains(oid)),
        }
        let list = match databases() {
            Ok(list) => list,
            Err(failure) => return pgrx::warning!("imbus could not read the list of databases: {failure}"),
        };
        self.names = list.iter().map(|database| (database.name.clone(), database.oid)).collect();
        let present: HashSet<u32> = list.iter().map(|database| database.oid).collect();
        self.absent.retain(|oid| present.contains(oid));
        self.tidy(&present);
        self.tidy_runners(&present);
        let mut starved = 0;
        for database in &list {
            if !self.keep_worker(database) {
                starved += 1;
            }
        }
        self.shared.starved.store(starved, Ordering::Relaxed);
        self.publish(&list);
    }

    /// Frees slots whose worker has left.
    fn tidy(&mut self, present: &HashSet<u32>) {
        for slot in self.shared.databases() {
            let oid = slot.oid();
            let stopped = self.handles.get(&oid).is_some_and(|handle| handle.is_stopped());
            let lost = slot.state() == DatabaseState::Starting
                && slot.process.pid() == 0
                && worker::now().saturating_sub(slot.since.load(Ordering::Relaxed)) > STARTING_MAX;
            let left = matches!(slot.state(), DatabaseState::Exited | DatabaseState::Absent) && slot.process.pid() == 0;
            if !(left || stopped || lost) {
                continue;
            }
            // Announced again since the worker looked: the extension may be back already.
            let announced = slot.recheck.swap(false, Ordering::AcqRel);
            if slot.state() == DatabaseState::Absent && !announced {
                self.absent.insert(oid);
            }
            self.handles.remove(&oid);
            if present.contains(&oid) && slot.state() != DatabaseState::Absent {
                // Kept, so that the counters and the time of the last launch survive.
                slot.process.leave();
                slot.set_state(DatabaseState::Exited);
            } else {
                slot.free();
            }
        }
    }

    /// Frees the places of runners whose database is gone, or has lost the extension: no database worker comes back to
    /// look after them.
    fn tidy_runners(&self, present: &HashSet<u32>) {
        let is_gone = |database: u32| !present.contains(&database) || self.absent.contains(&database);
        for (place, slot) in self.shared.runners().filter(|(_, slot)| slot.state() == RunnerState::Exited) {
            if is_gone(slot.database.load(Ordering::Acquire)) {
                casualties::at_rest(place);
                slot.free();
            }
        }
        casualties::forget(is_gone);
    }

    /// Sees to it that a database has its worker, or is known to need none. False when no place could be had.
    fn keep_worker(&mut self, database: &Database) -> bool {
        if self.absent.contains(&database.oid) || self.shared.is_held(database.oid) {
            return true;
        }
        let slot = match self.shared.database(database.oid) {
            Some(slot) if slot.state() != DatabaseState::Exited => return true,
            Some(slot) => {
                let age = worker::now().saturating_sub(slot.since.load(Ordering::Relaxed));
                if age < RELAUNCH.as_micros() as i64 {
                    self.next_scan = self.next_scan.min(Instant::now() + RELAUNCH);
                    return true;
                }
                slot
            }
            None => {
                let starting = self.shared.databases().filter(|slot| slot.state() == DatabaseState::Starting).count();
                if starting >= EXAMINED_AT_ONCE {
                    self.next_scan = self.next_scan.min(Instant::now() + RELAUNCH);
                    return true;
                }
                match self.shared.add_database(database.oid) {
                    Some(slot) => slot,
                    None => return self.warn_starved(database),
                }
            }
        };
        self.launch(slot, database)
    }

    fn launch(&mut self, slot: &DatabaseSlot, database: &Database) -> bool {
        slot.since.store(worker::now(), Ordering::Relaxed);
        slot.set_state(DatabaseState::Starting);
        let name = format!("imbus database {}", database.name);
        let launch = Launch { name: &name, function: "imbus_database_main", argument: database.oid.into() };
        match launch::start(&launch) {
            Ok(Some(handle)) => {
                self.handles.insert(database.oid, handle);
                true
            }
            _ => {
                slot.free();
                self.warn_starved(database)
            }
        }
    }

    /// One WARNING; the next look tries again.
    fn warn_starved(&mut self, database: &Database) -> bool {
        if !self.starved_logged {
            self.starved_logged = true;
            pgrx::ereport!(
                PgLogLevel::WARNING,
                PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
                format!("no background worker is free for database \"{}\"", database.name),
                "Increase max_worker_processes (8 + databases + imbus.job_workers) and restart PostgreSQL."
            );
        }
        false
    }

    /// Tells the network threads which databases are served.
    fn publish(&mut self, list: &[Database]) {
        // A worker that has left comes back: its clients stay, and the gateway remembers how far they are.
        let running = |database: &&Database| {
            self.shared.database(database.oid).is_some_and(|slot| match slot.state() {
                DatabaseState::Running | DatabaseState::Exited => true,
                DatabaseState::Starting => self.served.contains(database),
                DatabaseState::Absent | DatabaseState::Free => false,
            })
        };
        let served: Vec<Database> = list.iter().filter(running).cloned().collect();
        if served != self.served {
            self.served.clone_from(&served);
            tell(ToNet::Databases(Arc::new(served)));
        }
    }

    fn copy_counters(&self) {
        NET.with(|cell| {
            if let Some(net) = cell.borrow().as_ref() {
                let (from, to) = (net.counters(), &self.shared.counters);
                let pairs = [
                    (&from.connections_open, &to.connections_open),
                    (&from.connections_total, &to.connections_total),
                    (&from.handshakes_rejected, &to.handshakes_rejected),
                    (&from.messages_received, &to.messages_received),
                    (&from.notifications_sent, &to.notifications_sent),
                    (&from.bytes_sent, &to.bytes_sent),
                    (&from.slow_consumers, &to.slow_consumers),
                ];
                for (from, to) in pairs {
                    to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
                }
            }
        });
    }
}

/// The databases that can be connected to; templates are left alone.
fn databases() -> Result<Vec<Database>, transaction::Failure> {
    transaction::run(|| {
        safely(|| {
            let text = "SELECT oid, datname::text FROM pg_catalog.pg_database
                         WHERE datallowconn AND NOT datistemplate ORDER BY oid";
            sql::rows(text, &[], |row| {
                let oid = row.get::<pg_sys::Oid>(1)?.unwrap_or(pg_sys::InvalidOid);
                Ok(Database { oid: oid.into(), name: row.text(2)? })
            })
        })
    })
}

/// NOTIFY in the listen database on behalf of the writers.
fn emit(payloads: &[String]) {
    let sent = transaction::run(|| {
        payloads.iter().for_each(|payload| listen::notify(CHANNEL, payload));
        Ok(())
    });
    if let Err(failure) = sent {
        pgrx::warning!("imbus could not notify on behalf of writers: {failure}");
    }
}

fn log(level: LogLevel, text: &str, hint: Option<&str>) {
    let level = match level {
        LogLevel::Debug => PgLogLevel::DEBUG1,
        LogLevel::Log => PgLogLevel::LOG,
        LogLevel::Warning => PgLogLevel::WARNING,
    };
    let mut report = pgrx::pg_sys::panic::ErrorReport::new(
        PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION,
        text.to_owned(),
        pgrx::function_name!(),
    );
    if let Some(hint) = hint {
        report = report.set_hint(hint.to_owned());
    }
    report.report(level);
}
