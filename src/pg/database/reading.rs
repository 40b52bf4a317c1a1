//! Reading: what the ring announces is read by primary key and handed on in the order of commits; now and then, and
//! when there is reason to, the table itself is looked at for rows that nobody announced.

use super::adoption::{CHANGED, RECENT_IDS};
use super::{Database, GAP_LOOKOUT, GAPS_AT_ONCE, LOOKOUT};
use crate::core::channel::Channel;
use crate::core::intake::Next;
use crate::core::journal::Entry;
use crate::core::link::Event;
use crate::core::notification::Notification;
use crate::core::position::{Position, Snapshot};
use crate::core::replay::RECENT;
use crate::core::ring::Kind;
use crate::core::{json, payload};
use crate::pg::bus::{self, Bus, RawRow, Scope};
use crate::pg::report::Outcome;
use crate::pg::transaction::{self, Failure};
use crate::pg::{guc, ring, worker};
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Rows read in one transaction.
const PAGE: usize = 1000;
/// Bytes of messages in one part of a dispatch.
const PART: usize = 1 << 20;
/// An id this far above the greatest one makes the worker ask the sequence whether it was drawn there at all.
const FAR: i64 = 10_000;
/// Rows found by a look, not in the ring, are told apart by the transaction that wrote them: numbers no ring gives.
const UNANNOUNCED: u64 = 1 << 63;
/// Ids of prepared transactions that are remembered; beyond that, and after a restart, the table is looked through.
const PROMISES_MAX: usize = 1 << 17;
/// Ample time for a committed transaction to append to the ring.
const APPEND: Duration = Duration::from_millis(20);
/// After a failed read.
const RETRY: Duration = Duration::from_secs(1);

/// A row and the transaction it belongs to.
type Found = (RawRow, u64);

impl Database {
    /// Reads what has been committed and hands it on; again until nothing is left or the gateway has enough to do.
    pub(super) fn dispatch(&mut self) {
        worker::report_activity(Some("reading committed notifications"));
        self.drain();
        while self.can_send() {
            match self.step() {
                Ok(true) => self.drain(),
                Ok(false) => {
                    self.complaint.clear();
                    break;
                }
                Err(failure) if failure.message == CHANGED && self.follow().is_ok() => {}
                Err(failure) => {
                    // The extension may be going away under us; the next round looks.
                    self.slot.recheck.store(true, Ordering::Release);
                    self.complain(format!("imbus could not read the bus of database \"{}\": {failure}", self.name));
                    self.look_due = false;
                    self.next_look = Instant::now() + RETRY;
                    break;
                }
            }
        }
        if self.resumed && !self.can_send() {
            self.slot.wake.store(true, Ordering::Release);
        }
    }

    /// One piece of work; whether there may be more.
    fn step(&mut self) -> Result<bool, Failure> {
        if !self.begun()? {
            return Ok(false);
        }
        if self.is_overrun {
            self.look_behind()?;
            return Ok(true);
        }
        let next = self.intake.next(PAGE);
        match &next {
            Next::Rows(rows) => self.read(rows)?,
            Next::Finished(numbers) => {
                self.intake.done(&next);
                self.look_for(numbers)?;
            }
            Next::Nothing if self.look_due => self.look()?,
            Next::Nothing => {
                self.committed = 0;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes in what the ring has for this database.
    pub(super) fn drain(&mut self) {
        let Some(ring) = ring::get() else { return };
        // Taken first: what it is of is in the ring by then, or comes in very soon.
        let stamp = self.slot.take_stamp();
        if self.committed == 0 && stamp != 0 {
            self.committed = worker::since_1970(stamp);
        }
        let (oid, began, intake, unknown) = (self.oid, self.began, &mut self.intake, &mut self.unknown);
        let (mut promised, mut whole) = (Vec::new(), true);
        let read = self.reader.read(ring, |index, entry| {
            if entry.database == oid {
                if let Some((range, number)) = entry.promise() {
                    if index == began {
                        // There may be more of it before.
                        unknown.insert(number);
                    }
                    promised.push((range, number));
                }
                whole &= entry.kind != Kind::Overflow;
                whole &= intake.push(index, entry);
            }
        });
        self.is_overrun |= !read || !whole;
        for (range, number) in &promised {
            self.remember(*range, *number);
        }
        if let (Some(tracker), Some(bus)) = (&mut self.tracker, &self.bus) {
            let mut holders = None;
            for (range, _) in promised {
                tracker.promised(range, || holders.get_or_insert_with(|| bus.holders()).clone());
            }
        }
    }

    /// What a prepared transaction has sent, in order.
    fn remember(&mut self, (first, last): (i64, i64), number: u32) {
        let count = usize::try_from(last.abs_diff(first)).unwrap_or(usize::MAX).saturating_add(1);
        if self.promised.saturating_add(count) > PROMISES_MAX {
            self.promises.clear();
            self.promised = 0;
            // What was sent before is forgotten; the rest of a transaction is no use without it.
            self.unknown.insert(number);
        }
        if count <= PROMISES_MAX {
            self.promised += count;
            self.promises.entry(number).or_default().push((first, last));
        }
    }

    /// The ids of a prepared transaction with these numbers, in the order of sending, if all of them are known.
    fn promised(&mut self, numbers: &[u32]) -> Option<Vec<i64>> {
        let mut ids = Vec::new();
        for number in numbers {
            if self.unknown.remove(number) {
                return None;
            }
            for (first, last) in self.promises.remove(number).unwrap_or_default() {
                ids.extend(first..=last);
            }
        }
        self.promised = self.promised.saturating_sub(ids.len());
        Some(ids).filter(|ids| !ids.is_empty())
    }

    /// Reads rows that the ring announced and hands them on. They are visible: their ids came after the commit.
    fn read(&mut self, announced: &[(i64, u64)]) -> Result<(), Failure> {
        let ids: Vec<i64> = announced.iter().map(|(id, _)| *id).collect();
        let mut rows = transaction::run(|| self.same_table()?.among(&ids, Scope::All))?;
        if rows.len() < ids.len() && self.bus.as_ref().is_some_and(|bus| bus.is_odoo) && self.sweep()? {
            // Written to imbus's own table by a transaction that began before Odoo's took over.
            rows = transaction::run(|| self.same_table()?.among(&ids, Scope::All))?;
        }
        let mut transactions: HashMap<i64, u64> = announced.iter().copied().collect();
        let found = rows.into_iter().map(|row| {
            let transaction = transactions.remove(&row.id).unwrap_or_default();
            (row, transaction)
        });
        let found = found.collect();
        self.intake.done(&Next::Rows(announced.to_vec()));
        self.hand_on(found);
        Ok(())
    }

    /// Looks at the table itself. What the ring has by then goes first: whatever is visible and not in it by now has
    /// committed after all of that, or was never to come into it (doc of core::ring).
    fn look(&mut self) -> Result<(), Failure> {
        let (Some(bus), Some(tracker)) = (self.bus.clone(), &self.tracker) else { return Ok(()) };
        // Without the trigger nobody announces an id that is used after it counted as passed: nothing counts as passed.
        let look = Some(tracker.begin_look()).filter(|_| self.attached);
        self.last_look = Instant::now();
        // Whoever ended before the snapshot is taken is seen by it.
        let before = bus.holders();
        let (rows, more) = self.unannounced(None)?;
        while let next @ (Next::Rows(_) | Next::Finished(_)) = self.intake.next(PAGE) {
            if !self.can_send() {
                return Ok(());
            }
            match &next {
                Next::Rows(rows) => self.read(rows)?,
                Next::Finished(numbers) => {
                    self.intake.done(&next);
                    self.look_for(numbers)?;
                }
                Next::Nothing => break,
            }
        }
        self.hand_on(rows);
        let Some(tracker) = &mut self.tracker else { return Ok(()) };
        if let Some(look) = look {
            tracker.settle(look, &before);
        }
        self.look_due = more.is_some();
        if more.is_none() && std::mem::take(&mut self.is_catching_up) {
            tracker.journal.begin_exact();
        }
        let gaps = u32::try_from(tracker.gaps()).unwrap_or(u32::MAX);
        self.slot.gaps.store(gaps.into(), Ordering::Relaxed);
        let pause = if gaps == 0 { LOOKOUT } else { GAP_LOOKOUT * (1 + gaps / GAPS_AT_ONCE) };
        self.next_look = Instant::now() + pause;
        Ok(())
    }

    /// Looks for the rows of a transaction that was committed at this place in the order of commits: a prepared one, or
    /// one too long for the ring. They go in the order of sending, as far as that is remembered.
    fn look_for(&mut self, numbers: &[u32]) -> Result<(), Failure> {
        let transaction = UNANNOUNCED | numbers.first().copied().map_or(0, u64::from);
        if let Some(ids) = self.promised(numbers) {
            let rows = transaction::run(|| self.same_table()?.among(&ids, Scope::All))?;
            self.hand_on(rows.into_iter().map(|row| (row, transaction)).collect());
            return Ok(());
        }
        let (mut found, mut from) = (Vec::new(), None);
        loop {
            let (rows, next) = self.unannounced(from)?;
            let (mine, others): (Vec<Found>, Vec<Found>) =
                rows.into_iter().partition(|(row, _)| numbers.contains(&row.xmin));
            self.look_due |= !others.is_empty();
            found.extend(mine);
            from = next;
            if from.is_none() {
                break;
            }
        }
        if numbers.iter().any(|number| self.inherited.remove(number)) {
            found.extend(self.inherited_rows(numbers)?);
        }
        let mut order: HashMap<i64, i64> = HashMap::new();
        // Prepared before this worker began, or more than it can remember: the commands tell the order.
        let ids: Vec<i64> = found.iter().map(|(row, _)| row.id).collect();
        order.extend(transaction::run(|| self.same_table()?.commands(&ids))?);
        found.sort_by_key(|(row, _)| (order.get(&row.id).copied().unwrap_or_default(), row.id));
        self.hand_on(found.into_iter().map(|(row, _)| (row, transaction)).collect());
        Ok(())
    }

    /// Rows of a transaction that was prepared before this worker began, under ids that had counted as passed.
    fn inherited_rows(&self, numbers: &[u32]) -> Result<Vec<Found>, Failure> {
        let Some(tracker) = &self.tracker else { return Ok(Vec::new()) };
        let (high, gaps) = (tracker.high(), tracker.position(0));
        let rows = transaction::run(|| {
            let bus = self.same_table()?;
            let recent = bus.ids_between(high.saturating_sub(RECENT_IDS), high)?;
            let mine = recent.into_iter().filter(|(id, xmin)| numbers.contains(xmin) && gaps.covers(*id));
            bus.among(&mine.map(|(id, _)| id).collect::<Vec<_>>(), Scope::All)
        })?;
        Ok(rows.into_iter().map(|row| (row, 0)).collect())
    }

    /// Entries of the ring were overwritten before they were read. What they announced is older than all that the ring
    /// has now, so it goes first: what is visible and not in the ring, once those who have just committed have had the
    /// time to come into it.
    fn look_behind(&mut self) -> Result<(), Failure> {
        let (mut rows, next) = self.unannounced(self.behind)?;
        let long_ago = Snapshot::parse(&self.snapshot).filter(|_| self.snapshot_at.elapsed() > APPEND);
        if !long_ago.is_some_and(|snapshot| rows.iter().all(|(row, _)| snapshot.sees(row.xmin))) {
            std::thread::sleep(APPEND);
            self.drain();
        }
        let queued = self.intake.holds(&rows.iter().map(|(row, _)| row.id).collect::<Vec<_>>());
        let mut queued = queued.into_iter();
        rows.retain(|_| !queued.next().unwrap_or(false));
        self.behind = next;
        self.is_overrun = next.is_some();
        self.look_due = true;
        self.hand_on(rows);
        Ok(())
    }

    /// Visible rows that were not dispatched and are not in the ring so far: those of gaps and a page of new ones, or the
    /// page of new ones above `from`. And where the next page begins, if there may be one.
    fn unannounced(&mut self, from: Option<i64>) -> Result<(Vec<Found>, Option<i64>), Failure> {
        let Some(tracker) = &self.tracker else { return Ok((Vec::new(), None)) };
        let gaps = if from.is_none() { tracker.ranges() } else { Vec::new() };
        let from = from.unwrap_or_else(|| tracker.high());
        let rows = transaction::run_in_one_snapshot(|| {
            let bus = self.same_table()?;
            let late = bus.within(&gaps, Scope::All)?;
            let new = bus.drawn_above(from, PAGE as i64)?;
            let next = new.last().map(|row| row.id).filter(|_| new.len() == PAGE);
            Ok((late.into_iter().chain(new).collect::<Vec<_>>(), next))
        });
        let (rows, next) = rows?;
        self.drain();
        let queued = self.intake.holds(&rows.iter().map(|row| row.id).collect::<Vec<_>>());
        let unknown = rows.into_iter().zip(queued).filter(|(_, queued)| !queued);
        let found = unknown.map(|(row, _)| {
            let transaction = UNANNOUNCED | u64::from(row.xmin);
            (row, transaction)
        });
        Ok((found.collect(), next))
    }

    /// The table in force, if it is still the one that the bookkeeping is about; otherwise an error that makes the
    /// worker look again.
    pub(super) fn same_table(&self) -> Outcome<Bus> {
        let bus = bus::table()?;
        match &self.bus {
            Some(known) if *known == bus => Ok(bus),
            _ => Err(super::adoption::changed()),
        }
    }

    /// How far the ring is read and done.
    pub(super) fn ring_position(&self) -> u64 {
        self.intake.position().unwrap_or_else(|| self.reader.cursor())
    }

    /// Sends these rows on in this order, in parts of bounded size. Only the last part carries the new position: should
    /// the link break before, the rest is not taken for sent.
    fn hand_on(&mut self, rows: Vec<Found>) {
        let (Some(bus), ring) = (self.bus.clone(), self.ring_position()) else { return };
        let Some(tracker) = &self.tracker else { return };
        let rows: Vec<Found> = rows.into_iter().filter(|(row, _)| !tracker.journal.holds(row.id, row.xmin)).collect();
        let taken = self.intake.taken();
        let start = Position { taken, ..tracker.position(ring) };
        if rows.is_empty() {
            return;
        }
        self.emit(&rows, &bus);
        let mut entries = Vec::with_capacity(rows.len());
        let mut notifications = Vec::with_capacity(rows.len());
        for (row, _) in rows {
            let (id, xmin) = (row.id, row.xmin);
            let notification = self.judge(row, &bus);
            let channel = notification.as_ref().map_or(0, |notification| notification.channel.fingerprint());
            entries.push(Entry { id, xmin, channel });
            notifications.extend(notification);
        }
        let drawn = self.drawn(&entries, &bus);
        let Some(tracker) = &mut self.tracker else { return };
        let (replays, recent) = (&self.replays, self.history.before(worker::now() - RECENT));
        // Of this worker's journal, what a client without a position would be sent.
        let recent = recent.filter(|position| tracker.is_mine(position)).map(|position| position.journal);
        let needed = || replays.values().map(super::replays::Answer::needs).chain(recent).min().unwrap_or(u64::MAX);
        tracker.dispatched(&entries, drawn, || bus.holders(), ring, needed);
        let end = Position { taken, ..tracker.position(ring) };
        self.slot.position.store(end.high, Ordering::Relaxed);
        self.slot.gaps.store(tracker.gaps() as u64, Ordering::Relaxed);
        if tracker.gaps() > 0 {
            self.next_look = self.next_look.min(Instant::now() + GAP_LOOKOUT);
        }
        self.slot.dispatched.fetch_add(notifications.len() as u64, Ordering::Relaxed);
        self.send_parts(notifications, &start, end);
    }

    fn send_parts(&mut self, notifications: Vec<Notification>, start: &Position, end: Position) {
        let committed = self.committed;
        if self.intake.is_empty() {
            self.committed = 0;
        }
        let (mut part, mut bytes) = (Vec::new(), 0);
        for notification in notifications {
            bytes += notification.message.len();
            part.push(notification);
            if bytes > PART {
                bytes = 0;
                self.send(&Event::Dispatch {
                    notifications: std::mem::take(&mut part),
                    position: start.clone(),
                    committed,
                });
            }
        }
        self.send(&Event::Dispatch { notifications: part, position: end, committed });
    }

    /// The greatest id that the sequence can have given out; asked for only when an id is far above the others.
    fn drawn(&self, entries: &[Entry], bus: &Bus) -> i64 {
        let high = self.tracker.as_ref().map_or(0, |tracker| tracker.high());
        let is_far = entries.iter().any(|entry| entry.id > high.saturating_add(FAR));
        let ask = || transaction::run(|| bus.last_drawn()).ok().flatten();
        if is_far { ask().unwrap_or(i64::MAX) } else { i64::MAX }
    }

    /// NOTIFY on behalf of the writers, one list of channels per transaction, for Odoo processes that still listen.
    fn emit(&mut self, rows: &[Found], bus: &Bus) {
        if !guc::emit_notify() {
            return;
        }
        let mut lists: Vec<(u64, Vec<&str>)> = Vec::new();
        for (row, transaction) in rows.iter().filter(|(row, _)| row.own) {
            let Some(channel) = row.channel.as_deref().filter(|text| Channel::from_row(text, &bus.database).is_ok())
            else {
                continue;
            };
            if lists.last().is_none_or(|(last, _)| last != transaction) {
                lists.push((*transaction, Vec::new()));
            }
            if let Some((_, channels)) = lists.last_mut()
                && !channels.contains(&channel)
            {
                channels.push(channel);
            }
        }
        let limit = guc::notify_payload_max_length();
        let lists = lists.iter().map(|(_, channels)| format!("[{}]", channels.join(",")));
        let mut payloads = Vec::new();
        for list in lists {
            match payload::split(&list, limit) {
                Ok(parts) => payloads.extend(parts),
                Err(error) => self.warn_unnotified(&error.to_string()),
            }
        }
        if !payloads.is_empty() {
            self.send(&Event::Emit { payloads });
        }
    }

    /// One channel alone is too long for a NOTIFY: Odoo's own processes will not hear of it, imbus's clients do.
    fn warn_unnotified(&mut self, reason: &str) {
        if !std::mem::replace(&mut self.unnotified_logged, true) {
            pgrx::warning!(
                "imbus could not notify on behalf of a writer in database \"{}\": {reason} (logged once)",
                self.name
            );
        }
    }

    /// A row as a notification; one that is none is counted and logged once.
    fn judge(&mut self, row: RawRow, bus: &Bus) -> Option<Notification> {
        let id = row.id;
        let reason = match notification(row, bus) {
            Ok(notification) => return Some(notification),
            Err(reason) => reason,
        };
        self.slot.skipped.fetch_add(1, Ordering::Relaxed);
        if !self.poison_logged {
            self.poison_logged = true;
            pgrx::log!("imbus skipped row {id} of the bus of database \"{}\": {reason} (logged once)", bus.database);
        }
        None
    }
}

/// A row as a notification, or why it is none.
pub(super) fn notification(row: RawRow, bus: &Bus) -> Result<Notification, String> {
    let (Some(channel), Some(message)) = (row.channel, row.message) else {
        return Err("channel or message is null".to_owned());
    };
    let channel = Channel::from_row(&channel, &bus.database).map_err(|error| error.to_string())?;
    json::check(&message).map_err(|error| error.to_string())?;
    Ok(Notification { id: row.id, channel, message: message.into() })
}
