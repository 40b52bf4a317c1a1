//! The worker `imbus database <name>`: reads newly committed notifications and hands them to the gateway, replays to
//! clients that come back, has jobs run, prunes. One for each database that has the extension.

use super::bus::{self, Bus, RawRow};
use super::link::{BACKLOG_MAX, Link};
use super::report::Outcome;
use super::shared::{self, DatabaseSlot, DatabaseState, Shared};
use super::transaction::{self, Failure, safely};
use super::worker::{self, Waiting};
use super::{guc, jobs, launch, runner, sql};
use crate::core::channel::Channel;
use crate::core::link::{Command, Event, VERSION};
use crate::core::notification::Notification;
use crate::core::position::{Position, Tracker};
use crate::core::{json, payload};
use pgrx::prelude::*;
use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Rows read in one transaction.
const PAGE: i64 = 1000;
/// The look-out for rows nobody announced (prepared transactions, triggers switched off, Odoo without NOTIFY).
const LOOKOUT: Duration = Duration::from_secs(5);
/// The same while ids are known to be missing.
const GAP_LOOKOUT: Duration = Duration::from_millis(500);
/// Between attempts to reach the gateway.
const RECONNECT: Duration = Duration::from_millis(250);
/// Bytes of messages in one part of a dispatch or a replay.
const PART: usize = 1 << 20;
/// Between two rounds of pruning.
const PRUNE: Duration = Duration::from_secs(60);
/// How far below the greatest id a starting worker looks for ids that are still in flight.
const START_WINDOW: i64 = 10_000;
/// Rows younger than this (seconds) are dispatched by a worker that knows nothing: it cannot tell whether anybody was
/// told of them.
const BEGINNING: f64 = 15.0;

/// Everything the worker knows.
struct Database {
    shared: &'static Shared,
    slot: &'static DatabaseSlot,
    oid: u32,
    name: String,
    link: Option<Link>,
    /// The gateway has said from where to go on.
    resumed: bool,
    next_connect: Instant,
    tracker: Option<Tracker>,
    next_look: Instant,
    next_prune: Instant,
    poison_logged: bool,
    /// The warning that holds.
    complaint: String,
    jobs: runner::Dispatcher,
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
    slot.set_state(DatabaseState::Running);
    shared.rescan.store(true, Ordering::Release);
    shared.gateway.wake();
    pgrx::log!("imbus serves database \"{name}\"");
    let now = Instant::now();
    let jobs = runner::Dispatcher::new(shared, oid);
    Database {
        shared,
        slot,
        oid,
        name,
        link: None,
        resumed: false,
        next_connect: now,
        tracker: None,
        next_look: now,
        next_prune: now + PRUNE,
        poison_logged: false,
        complaint: String::new(),
        jobs,
    }
    .serve()
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

/// The transactions of this database that run now, this process's own left out. Prepared ones are among them, under the
/// number they had when they were prepared (MarkAsPreparingGuts in twophase.c).
fn running() -> HashSet<u64> {
    let mut count = 0;
    // SAFETY: main thread; the array is palloc'd and freed here. PostgreSQL 15 to 18 keep the entry at two 32-bit words.
    unsafe {
        let list = pg_sys::GetCurrentVirtualXIDs(pg_sys::InvalidTransactionId, false, false, 0, &mut count);
        let words = std::slice::from_raw_parts(list.cast::<[u32; 2]>(), usize::try_from(count).unwrap_or(0));
        let set = words.iter().map(|[backend, local]| u64::from(*backend) << 32 | u64::from(*local)).collect();
        pg_sys::pfree(list.cast());
        set
    }
}

impl Database {
    fn serve(mut self) -> ! {
        loop {
            self.leave_if_unwanted();
            worker::reload();
            self.talk();
            if self.slot.wake.swap(false, Ordering::AcqRel) || Instant::now() >= self.next_look {
                self.dispatch();
            }
            if self.slot.jobs.swap(false, Ordering::AcqRel) || self.jobs.due() {
                self.jobs.dispatch();
            }
            if Instant::now() >= self.next_prune {
                self.next_prune = Instant::now() + PRUNE;
                prune();
            }
            self.sleep();
        }
    }

    fn sleep(&self) {
        let idle = self.slot.wake.load(Ordering::Acquire) && self.can_send();
        let mut until = self.next_look.min(self.next_prune).min(self.jobs.next());
        if self.link.is_none() {
            until = until.min(self.next_connect);
        }
        let timeout = if idle { Duration::ZERO } else { until.saturating_duration_since(Instant::now()) };
        // A timeout of less than a millisecond would spin.
        let timeout = if idle { timeout } else { timeout.max(Duration::from_millis(1)) };
        worker::report_activity(None);
        worker::idle(&Waiting {
            socket: self.link.as_ref().map(Link::fd),
            writable: self.link.as_ref().is_some_and(|link| link.backlog() > 0),
            timeout,
        });
    }

    /// Ends when the database is held for DROP, RENAME or a copy, or when the extension is gone.
    fn leave_if_unwanted(&self) {
        if self.shared.is_held(self.oid) {
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
            Ok(commands) => commands.into_iter().for_each(|command| self.obey(command)),
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
            Command::Recover { request, channels, last } => {
                self.dispatch();
                self.recover(request, channels, last);
            }
            Command::More { .. } | Command::Forget { .. } | Command::Connections(_) => {}
        }
    }

    /// Goes on from what the gateway saw last, or from this worker's own position, or from the table as it is.
    fn resume(&mut self, position: Option<Position>) {
        self.resumed = true;
        match (position, &mut self.tracker) {
            (Some(position), Some(tracker)) => tracker.rewind(position, running()),
            (Some(position), None) => self.tracker = Some(Tracker::new(position, running())),
            (None, _) => {}
        }
        self.dispatch();
    }

    /// Reads what has been committed and hands it on; again until nothing is left or the gateway has enough to do.
    fn dispatch(&mut self) {
        let gaps = self.tracker.as_ref().is_some_and(Tracker::has_gaps);
        self.next_look = Instant::now() + if gaps { GAP_LOOKOUT } else { LOOKOUT };
        worker::report_activity(Some("reading committed notifications"));
        while self.can_send() {
            // Whoever ended before the snapshot is taken is seen by it.
            let before = running();
            match transaction::run_in_one_snapshot(|| self.read(&before)) {
                Ok(more) => {
                    self.complaint.clear();
                    if !more {
                        break;
                    }
                }
                Err(failure) => {
                    // The extension may be going away under us; the next round looks.
                    self.slot.recheck.store(true, Ordering::Release);
                    self.complain(format!("imbus could not read the bus of database \"{}\": {failure}", self.name));
                    break;
                }
            }
        }
        if !self.can_send() && self.resumed {
            self.slot.wake.store(true, Ordering::Release);
        }
        if let Some(tracker) = self.tracker.as_ref().filter(|tracker| tracker.has_gaps()) {
            self.slot.gaps.store(tracker.position().gaps.len() as u64, Ordering::Relaxed);
            self.next_look = self.next_look.min(Instant::now() + GAP_LOOKOUT);
        }
    }

    /// Warns once until it works again or fails in another way.
    fn complain(&mut self, text: String) {
        if self.complaint != text {
            pgrx::warning!("{text}");
            self.complaint = text;
        }
    }

    /// One read, of late and new rows in the same snapshot, or a row could come before one that was committed earlier.
    /// `before` are the transactions that ran before the snapshot. Returns whether there may be more.
    fn read(&mut self, before: &HashSet<u64>) -> Outcome<bool> {
        let bus = bus::table()?;
        self.adopt(&bus)?;
        let Some(tracker) = &mut self.tracker else { return Ok(false) };
        let start = tracker.position();
        let late = bus.within(&tracker.position().gaps)?;
        let new = bus.above(tracker.high(), PAGE)?;
        let more = i64::try_from(new.len()).is_ok_and(|count| count == PAGE);
        tracker.filled(&late.iter().map(|row| row.id).collect::<Vec<_>>());
        tracker.settle(before);
        tracker.arrived(&new.iter().map(|row| row.id).collect::<Vec<_>>(), running);
        let position = tracker.position();
        self.slot.position.store(position.high, Ordering::Relaxed);
        self.slot.gaps.store(position.gaps.len() as u64, Ordering::Relaxed);
        let rows: Vec<RawRow> = late.into_iter().chain(new).collect();
        if rows.is_empty() {
            return Ok(false);
        }
        self.emit(&rows, &bus);
        self.hand_on(rows, &bus, start, position);
        Ok(more)
    }

    /// Sends the notifications among these rows in parts of bounded size. Only the last part carries the new position:
    /// should the link break before, the rest is not taken for sent.
    fn hand_on(&mut self, rows: Vec<RawRow>, bus: &Bus, start: Position, end: Position) {
        let (mut part, mut bytes) = (Vec::new(), 0);
        for notification in rows.into_iter().filter_map(|row| self.judge(row, bus)).collect::<Vec<_>>() {
            bytes += notification.message.len();
            part.push(notification);
            self.slot.dispatched.fetch_add(1, Ordering::Relaxed);
            if bytes > PART {
                bytes = 0;
                self.send(&Event::Dispatch { notifications: std::mem::take(&mut part), position: start.clone() });
            }
        }
        self.send(&Event::Dispatch { notifications: part, position: end });
    }

    /// Starts the bookkeeping of a bus table that is not the one known so far: the first one, Odoo's when it has taken
    /// over, or the one of an extension that was created again.
    fn adopt(&mut self, bus: &Bus) -> Outcome<()> {
        let known = self.tracker.as_ref().is_some_and(|tracker| tracker.table() == bus.oid());
        if !known {
            self.tracker = Some(Tracker::new(beginning(bus)?, running()));
        }
        Ok(())
    }

    /// NOTIFY on behalf of the writers, one list of channels per transaction, for Odoo processes that still listen.
    fn emit(&mut self, rows: &[RawRow], bus: &Bus) {
        if !guc::emit_notify() {
            return;
        }
        let mut transactions: Vec<(&str, Vec<String>)> = Vec::new();
        for row in rows.iter().filter(|row| row.own) {
            let Some(channel) = row.channel.as_deref().filter(|text| Channel::from_row(text, &bus.database).is_ok())
            else {
                continue;
            };
            let at = transactions.iter().position(|(xmin, _)| *xmin == row.xmin).unwrap_or_else(|| {
                transactions.push((&row.xmin, Vec::new()));
                transactions.len() - 1
            });
            if let Some((_, channels)) = transactions.get_mut(at)
                && !channels.iter().any(|known| known == channel)
            {
                channels.push(channel.to_owned());
            }
        }
        let limit = guc::notify_payload_max_length();
        let lists = transactions.iter().map(|(_, channels)| format!("[{}]", channels.join(",")));
        let payloads: Vec<String> = lists.filter_map(|list| payload::split(&list, limit).ok()).flatten().collect();
        if !payloads.is_empty() {
            self.send(&Event::Emit { payloads });
        }
    }

    /// A row as a notification; one that is none is counted and logged once.
    fn judge(&mut self, row: RawRow, bus: &Bus) -> Option<Notification> {
        let id = row.id;
        let reason = match (row.channel, row.message) {
            (Some(channel), Some(message)) => match (Channel::from_row(&channel, &bus.database), json::check(&message))
            {
                (Ok(channel), Ok(())) => return Some(Notification { id, channel, message: message.into() }),
                (Err(error), _) | (_, Err(error)) => error.to_string(),
            },
            _ => "channel or message is null".to_owned(),
        };
        self.slot.skipped.fetch_add(1, Ordering::Relaxed);
        if !self.poison_logged {
            self.poison_logged = true;
            pgrx::log!("imbus skipped row {id} of the bus of database \"{}\": {reason} (logged once)", bus.database);
        }
        None
    }

    /// What one client is owed of what was dispatched so far. Rows not dispatched yet will come to it as to everybody.
    fn recover(&mut self, request: u64, channels: Vec<Channel>, last: i64) {
        let wanted: HashSet<Channel> = channels.into_iter().collect();
        // Without a position there is nothing to answer by: break the link, the gateway asks again.
        let Some(tracker) = self.tracker.as_ref() else { return self.hang_up() };
        let (position, late) = (tracker.position(), tracker.after(last));
        let link = &mut self.link;
        let replayed = transaction::run(|| {
            let mut answer = Answer { request, link, wanted: &wanted, notifications: Vec::new(), bytes: 0 };
            replay(&mut answer, &position, &late, last)?;
            Ok(answer.send(false))
        });
        match replayed {
            Ok(true) => {}
            Ok(false) => self.hang_up(),
            Err(failure) => {
                pgrx::warning!("imbus could not replay the bus of database \"{}\": {failure}", self.name);
                // The client is better served by a new attempt than by a silent hole: break the link, ask again.
                self.hang_up();
            }
        }
    }

    fn hang_up(&mut self) {
        self.link = None;
        self.resumed = false;
    }
}

/// An answer to one client on its way: kept small by sending it in parts.
struct Answer<'a> {
    request: u64,
    link: &'a mut Option<Link>,
    wanted: &'a HashSet<Channel>,
    notifications: Vec<Notification>,
    bytes: usize,
}

impl Answer<'_> {
    /// Adds the rows that are this client's notifications. False when the link is gone.
    fn add(&mut self, rows: Vec<RawRow>, bus: &Bus) -> bool {
        for row in rows {
            let Some(notification) = sound(row, bus).filter(|found| self.wanted.contains(&found.channel)) else {
                continue;
            };
            self.bytes += notification.message.len();
            self.notifications.push(notification);
            if self.bytes > PART && !self.send(true) {
                return false;
            }
        }
        true
    }

    fn send(&mut self, more: bool) -> bool {
        self.bytes = 0;
        let notifications = std::mem::take(&mut self.notifications);
        let event = Event::Recovered { request: self.request, notifications, more };
        self.link.as_mut().is_some_and(|link| link.send(&event).is_ok())
    }
}

/// Reads what a client is owed, page by page of the primary key.
fn replay(answer: &mut Answer<'_>, position: &Position, late: &[i64], last: i64) -> Outcome<()> {
    let bus = bus::table()?;
    // Odoo: a `last` beyond the table (restored, emptied) counts as none (bus/models/ir_websocket.py).
    let last = if last > bus.last_id()?.max(position.high) { 0 } else { last };
    if last == 0 {
        let recent = bus.since(0)?.into_iter().filter(|row| position.covers(row.id));
        answer.add(recent.collect(), &bus);
        return Ok(());
    }
    let mut open = answer.add(bus.among(late)?, &bus);
    let mut from = last;
    while open && from < position.high {
        let page = bus.above(from, PAGE)?;
        let Some(end) = page.last().map(|row| row.id) else { break };
        from = end;
        open = answer.add(page.into_iter().filter(|row| position.covers(row.id)).collect(), &bus);
    }
    Ok(())
}

/// A row as a notification; None when it is not one (counted when it was dispatched).
fn sound(row: RawRow, bus: &Bus) -> Option<Notification> {
    let (id, channel, message) = (row.id, row.channel?, row.message?);
    let channel = Channel::from_row(&channel, &bus.database).ok()?;
    json::check(&message).ok()?;
    Some(Notification { id, channel, message: message.into() })
}

/// Where a worker begins that knows nothing, in a table it has not read before: rows that are older than a restart takes
/// count as dispatched (clients say what they have), ids missing shortly before may still be in flight.
fn beginning(bus: &Bus) -> Outcome<Position> {
    let high = bus.last_id_before(BEGINNING)?;
    let low = high.saturating_sub(START_WINDOW).max(0);
    let mut gaps = Vec::new();
    let mut expected = low.saturating_add(1);
    for id in bus.ids_above(low)?.into_iter().filter(|id| *id <= high) {
        if id > expected {
            gaps.push((expected, id - 1));
        }
        expected = id.saturating_add(1);
    }
    Ok(Position { table: bus.oid(), high, gaps, ring: 0 })
}

/// Deletes old notifications and finished jobs, in short transactions.
fn prune() {
    worker::report_activity(Some("deleting old notifications and jobs"));
    loop {
        let deleted =
            transaction::run(|| Ok(bus::table()?.gc(bus::retention()?, true)? + jobs::prune(guc::job_retention())?));
        match deleted {
            Ok(0) => break,
            Ok(_) => worker::check_interrupts(),
            Err(failure) => {
                pgrx::warning!("imbus could not delete old rows: {failure}");
                break;
            }
        }
    }
}
