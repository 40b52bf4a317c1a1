//! The worker `imbus database <name>`: reads newly committed notifications and hands them to the gateway, replays to
//! clients that come back, has jobs run, prunes. One for each database that has the extension.

mod adoption;
mod queries;
mod reading;
mod replays;

use super::bus::Bus;
use super::dispatcher::Dispatcher;
use super::link::{BACKLOG_MAX, Link};
use super::schedules::Schedules;
use super::shared::{self, DatabaseSlot, DatabaseState, Shared};
use super::transaction::{self, Failure, safely};
use super::worker::{self, Waiting};
use super::{launch, sql};
use crate::core::intake::Intake;
use crate::core::link::{Command, Event, Question, VERSION};
use crate::core::position::{History, Position};
use crate::core::ring::Reader;
use crate::core::tracker::Tracker;
use pgrx::prelude::*;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The look-out for rows nobody announced (triggers switched off, a table restored or swapped, Odoo before its table
/// has the trigger).
const LOOKOUT: Duration = Duration::from_secs(5);
/// The same while ids are known to be missing; longer where there are thousands of them.
const GAP_LOOKOUT: Duration = Duration::from_millis(500);
/// Ranges of missing ids looked for at that pace.
const GAPS_AT_ONCE: u32 = 1000;
/// Soonest look after another when Odoo's NOTIFY asks for it: the ring has mostly been quicker.
const NOTIFY_LOOKOUT: Duration = Duration::from_millis(50);
/// At a high rate what is committed is read so often and no more: fewer, longer reads leave the writers more of the
/// processors, and nobody notices a millisecond at that rate.
const PACE: Duration = Duration::from_millis(1);
/// The longest pace: it grows with the rate.
const PACE_MAX: u32 = 4;
/// The high rate: rows in a time.
const HIGH_RATE: (u64, Duration) = (40, Duration::from_millis(10));
/// Between attempts to reach the gateway.
const RECONNECT: Duration = Duration::from_millis(250);
/// Between two looks at the tables: whether Odoo's has come, has its trigger, whether rows lie in the wrong one.
const CARE: Duration = Duration::from_secs(4);
/// Between two bookmarks (SPEC section 11: every 5 s at most).
const BOOKMARK: Duration = Duration::from_secs(4);
/// Between two rounds of pruning.
const PRUNE: Duration = Duration::from_secs(60);

/// Everything the worker knows.
struct Database {
    shared: &'static Shared,
    slot: &'static DatabaseSlot,
    oid: u32,
    name: String,
    link: Option<Link>,
    /// The gateway has said from where to go on.
    resumed: bool,
    /// What it said, until the bookkeeping has begun.
    resume_from: Option<Position>,
    next_connect: Instant,
    /// The bus table in force, as last read.
    bus: Option<Bus>,
    tracker: Option<Tracker>,
    history: History,
    reader: Reader,
    /// Where it began.
    began: u64,
    intake: Intake,
    /// When the oldest commit was made that is not handed on, in microseconds since 1970; 0 for none that is known.
    committed: i64,
    /// The bus table has its trigger, so that every insert is announced.
    attached: bool,
    /// Whether the table in force has all that lay in imbus's own when it took over.
    swept: bool,
    /// What this snapshot sees of the ids up to the position is dispatched by the time of the next bookmark.
    snapshot: String,
    snapshot_at: Instant,
    /// Transactions that were prepared before this worker began without knowing of their ids.
    inherited: HashSet<u32>,
    /// What prepared transactions have sent, in order, by their numbers; and how many ids these are.
    promises: HashMap<u32, Vec<(i64, i64)>>,
    promised: usize,
    /// Prepared transactions of which not all is known.
    unknown: HashSet<u32>,
    /// The table is to be looked at, whatever the ring says.
    look_due: bool,
    /// Something in the ring was lost.
    is_overrun: bool,
    /// How far the table was looked through for it.
    behind: Option<i64>,
    /// What the first look finds may have been dispatched by an earlier worker.
    is_catching_up: bool,
    last_look: Instant,
    /// Since when rows are counted, and how many there had been.
    counted: (Instant, u64),
    /// How many times [`PACE`] to wait before a read.
    pace: u32,
    next_look: Instant,
    next_care: Instant,
    next_bookmark: Instant,
    bookmarked: Option<Position>,
    next_prune: Instant,
    /// When the last round of pruning was done, since 1970.
    pruned: Option<Duration>,
    replays: HashMap<u64, replays::Answer>,
    /// Asked on behalf of single clients; one is answered in a turn, so that what is committed does not wait for all.
    questions: VecDeque<(u64, Question)>,
    poison_logged: bool,
    unnotified_logged: bool,
    /// The warning that holds.
    complaint: String,
    /// When a client was last not answered, as the log has it.
    complained_at: Option<Instant>,
    schedules: Schedules,
    jobs: Dispatcher,
}

/// The worker's main function; the argument is the database's OID.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn imbus_database_main(argument: pg_sys::Datum) {
    worker::start();
    let oid = u32::try_from(argument.value()).unwrap_or(0);
    let Some(shared) = shared::get() else { launch::exit() };
    let Some(slot) = shared.database(oid) else { launch::exit() };
    slot.process.enter();
    launch::at_exit(leave);
    if shared.is_held(oid) {
        launch::exit();
    }
    launch::connect(oid, 0);
    // A plan is made once and kept: along the primary key, however small the table is at that time and whatever is
    // known of it after a crash. A bitmap of all that lies above an id, sorted for a page of it, costs the whole table.
    for method in [c"enable_seqscan", c"enable_bitmapscan", c"enable_sort"] {
        transaction::set_for_session(method, c"off");
    }
    // Which lets the costs of the smallest statements look worth compiling.
    transaction::set_for_session(c"jit", c"off");
    become_owner();
    let name = match extension_database() {
        Ok(Some(name)) => name,
        Ok(None) => {
            slot.set_state(DatabaseState::Absent);
            launch::exit()
        }
        Err(failure) => {
            // The gateway tries again.
            pgrx::warning!("imbus could not look for its extension: {failure}");
            launch::exit()
        }
    };
    slot.forget_odoo();
    slot.set_state(DatabaseState::Running);
    shared.rescan.store(true, Ordering::Release);
    shared.gateway.wake();
    pgrx::log!("imbus serves database \"{name}\"");
    Database::new(shared, slot, name).serve()
}

/// Gives the slot back to the gateway, which decides whether to start again.
#[pg_guard]
unsafe extern "C-unwind" fn leave(_code: i32, _argument: pg_sys::Datum) {
    let Some(shared) = shared::get() else { return };
    let pid = worker::pid();
    for slot in shared.databases().filter(|slot| slot.process.pid() == pid) {
        slot.process.leave();
        if slot.state() != DatabaseState::Absent {
            slot.set_state(DatabaseState::Exited);
        }
    }
    shared.rescan.store(true, Ordering::Release);
    shared.gateway.wake();
}

/// Counts as a session of the database's owner from now on, so that an owner who terminates all sessions of the
/// database (as Odoo's database manager does) reaches this one too. Statements switch users themselves.
fn become_owner() {
    let owner = transaction::run(|| {
        safely(|| {
            let text = "SELECT datdba FROM pg_catalog.pg_database WHERE oid = $1";
            sql::first(text, &[pg_sys::Oid::from(worker::database_oid()).into()], |row| row.get::<pg_sys::Oid>(1))
        })
    });
    if let Ok(Some(Some(owner))) = owner {
        // SAFETY: this process's own entry; others read it as one aligned word (pg_signal_backend).
        unsafe { (*pg_sys::MyProc).roleId = owner };
    }
}

/// The database's name, if it has the extension.
fn extension_database() -> Result<Option<String>, Failure> {
    transaction::run(|| {
        safely(|| {
            let text = "SELECT d.datname::text FROM pg_catalog.pg_extension e, pg_catalog.pg_database d
                         WHERE e.extname = 'imbus' AND d.datname = pg_catalog.current_database()";
            sql::first(text, &[], |row| row.text(1))
        })
    })
}

impl Database {
    fn new(shared: &'static Shared, slot: &'static DatabaseSlot, name: String) -> Database {
        let now = Instant::now();
        let oid = slot.oid();
        Database {
            shared,
            slot,
            oid,
            name,
            link: None,
            resumed: false,
            resume_from: None,
            next_connect: now,
            bus: None,
            tracker: None,
            history: History::default(),
            reader: Reader::default(),
            began: 0,
            intake: Intake::default(),
            committed: 0,
            attached: false,
            swept: false,
            snapshot: String::new(),
            snapshot_at: now,
            inherited: HashSet::new(),
            promises: HashMap::new(),
            promised: 0,
            unknown: HashSet::new(),
            look_due: true,
            is_overrun: false,
            behind: None,
            is_catching_up: true,
            last_look: now,
            counted: (now, 0),
            pace: 0,
            next_look: now,
            next_care: now,
            next_bookmark: now,
            bookmarked: None,
            next_prune: now + PRUNE,
            pruned: None,
            replays: HashMap::new(),
            questions: VecDeque::new(),
            poison_logged: false,
            unnotified_logged: false,
            complaint: String::new(),
            complained_at: None,
            schedules: Schedules::default(),
            jobs: Dispatcher::new(shared, oid),
        }
    }

    fn serve(mut self) -> ! {
        loop {
            self.leave_if_unwanted();
            if worker::reload() {
                // Settings say how many runners there may be, and for which queues.
                self.slot.jobs.store(true, Ordering::Release);
                // And how long what is old is kept.
                self.next_prune = Instant::now();
            }
            self.talk();
            self.mind_the_time();
            if self.slot.wake.load(Ordering::Acquire) || self.look_due {
                self.keep_pace();
                self.slot.wake.swap(false, Ordering::AcqRel);
                self.dispatch();
            }
            if let Some((query, question)) = self.questions.pop_front() {
                self.answer(query, question);
            }
            self.schedules.mind(self.slot.jobs.load(Ordering::Acquire));
            if self.slot.jobs.swap(false, Ordering::AcqRel) || self.jobs.due() {
                let calls = self.jobs.dispatch(self.resumed);
                calls.iter().for_each(|call| self.send(call));
            }
            self.sleep();
        }
    }

    /// Lets a little more be committed before the next read, where much is.
    fn keep_pace(&mut self) {
        let (since, before) = self.counted;
        let rows = self.slot.dispatched.load(Ordering::Relaxed);
        if since.elapsed() >= HIGH_RATE.1 {
            let high = HIGH_RATE.0 as f64 * since.elapsed().as_secs_f64() / HIGH_RATE.1.as_secs_f64();
            self.pace = (rows.saturating_sub(before) as f64 / high).min(PACE_MAX.into()) as u32;
            self.counted = (Instant::now(), rows);
        }
        if self.pace > 0 {
            std::thread::sleep(PACE * self.pace);
        }
    }

    /// Does what time asks for.
    fn mind_the_time(&mut self) {
        let now = Instant::now();
        if self.slot.look.swap(false, Ordering::AcqRel) {
            self.next_look = self.next_look.min(now.max(self.last_look + NOTIFY_LOOKOUT));
        }
        self.look_due |= now >= self.next_look;
        if now >= self.next_care {
            self.next_care = now + CARE;
            self.care();
        }
        if now >= self.next_bookmark {
            self.next_bookmark = now + BOOKMARK;
            self.bookmark();
        }
        if now >= self.next_prune {
            self.next_prune = now + PRUNE;
            self.prune();
            self.pruned = SystemTime::now().duration_since(UNIX_EPOCH).ok();
        }
    }

    fn sleep(&self) {
        let busy = (self.look_due || self.slot.wake.load(Ordering::Acquire)) && self.can_send();
        let busy = busy || !self.questions.is_empty();
        let mut until = self.next_prune.min(self.next_care).min(self.jobs.next()).min(self.schedules.next());
        until = until.min(if self.link.is_some() { self.next_look } else { self.next_connect });
        if self.has_news() {
            until = until.min(self.next_bookmark);
        }
        let timeout = if busy { Duration::ZERO } else { until.saturating_duration_since(Instant::now()) };
        // A timeout of less than a millisecond would spin.
        let timeout = if busy { timeout } else { timeout.max(Duration::from_millis(1)) };
        worker::report_activity(None);
        worker::idle(&Waiting {
            socket: self.link.as_ref().map(Link::fd),
            writable: self.link.as_ref().is_some_and(|link| link.backlog() > 0),
            timeout,
        });
    }

    /// Ends when the database is held for DROP, RENAME or a copy, or when the extension is gone.
    fn leave_if_unwanted(&mut self) {
        if self.shared.is_held(self.oid) {
            self.jobs.lost_line();
            launch::exit();
        }
        if !self.slot.recheck.swap(false, Ordering::AcqRel) {
            return;
        }
        become_owner();
        match extension_database() {
            Ok(Some(_)) => {}
            Ok(None) => {
                self.slot.set_state(DatabaseState::Absent);
                pgrx::log!("imbus no longer serves database \"{}\": the extension was dropped", self.name);
                launch::exit();
            }
            // Asked again after the next sleep.
            Err(_) => self.slot.recheck.store(true, Ordering::Release),
        }
    }

    fn can_send(&self) -> bool {
        self.resumed && self.link.as_ref().is_some_and(|link| link.backlog() < BACKLOG_MAX)
    }

    /// Connects to the gateway when there is no link, writes what waits, answers what came.
    fn talk(&mut self) {
        if self.link.is_none() && Instant::now() >= self.next_connect {
            self.next_connect = Instant::now() + RECONNECT;
            if let Ok(link) = Link::connect() {
                self.link = Some(link);
                self.resumed = false;
                self.send(&Event::Hello { version: VERSION, database: self.oid, name: self.name.clone() });
            }
        }
        let Some(link) = &mut self.link else { return };
        match link.flush().and_then(|()| link.receive()) {
            Ok(commands) => {
                for command in commands {
                    // What a link said that is gone since means nothing to the next one.
                    if self.link.is_some() {
                        self.obey(command);
                    }
                }
            }
            Err(_) => self.hang_up(),
        }
    }

    fn send(&mut self, event: &Event) {
        if let Some(link) = &mut self.link
            && link.send(event).is_err()
        {
            self.hang_up();
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Resume { position } => self.resume(position),
            Command::Recover { request, channels, last } => self.recover(request, channels, last),
            Command::More { request } => self.go_on(request),
            Command::Forget { request } => drop(self.replays.remove(&request)),
            Command::Query { query, question } => self.questions.push_back((query, question)),
            Command::Called { call, outcome } => self.jobs.called(call, &outcome),
            Command::Connections(_) | Command::Disconnected(_) => {}
        }
    }

    /// Goes on from what the gateway saw last, or from this worker's own position, or from the bookmarks.
    fn resume(&mut self, position: Option<Position>) {
        self.resumed = true;
        match (&mut self.tracker, &self.bus, position) {
            (Some(tracker), Some(bus), Some(position)) => {
                self.reader = Reader::new(position.ring);
                self.began = position.ring;
                self.intake.begin(position.ring, position.taken);
                self.history.rewind(position.epoch, position.journal);
                tracker.rewind(position, bus.holders());
            }
            (_, _, position) => self.resume_from = position,
        }
        self.look_due = true;
        self.dispatch();
    }

    /// Warns once until it works again or fails in another way.
    fn complain(&mut self, text: String) {
        if self.complaint != text {
            pgrx::warning!("{text}");
            self.complaint = text;
        }
    }

    fn hang_up(&mut self) {
        self.link = None;
        self.resumed = false;
        self.replays.clear();
        self.questions.clear();
        self.jobs.lost_line();
    }
}
