//! Which table is the bus: beginning with it, taking over Odoo's when it appears, its trigger, bookmarks, pruning.

use super::Database;
use crate::core::journal::Entry;
use crate::core::position::Position;
use crate::core::ring::Reader;
use crate::core::tracker::Tracker;
use crate::pg::bus::{self, Bus, Moved};
use crate::pg::report::{Outcome, report};
use crate::pg::transaction::{self, Failure, set_local};
use crate::pg::{bookmark, guc, jobs, ring, trigger, worker};
use pgrx::prelude::*;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// How far below the greatest id a worker that knows nothing looks for ids that are still in flight.
const START_WINDOW: i64 = 10_000;
/// How far below the greatest id rows are looked for that were written under ids which had counted as passed.
pub const RECENT_IDS: i64 = 100_000;
/// Rows younger than this (seconds) are dispatched by a worker that knows nothing: it cannot tell whether anybody was
/// told of them.
const BEGINNING: f64 = 15.0;
/// Seconds that `last = 0` reaches back, and a little.
const RECENT: f64 = 51.0;

/// Rows of a table just adopted that are looked through for undelivered ones; a new table has few.
const UNKNOWN_MAX: i64 = 100_000;

/// The error of a read that found another table in force than the one it was for; caught in `Database::dispatch`.
pub fn changed() -> pgrx::pg_sys::panic::ErrorReport {
    report(PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, CHANGED, "", "")
}

/// Its message.
pub const CHANGED: &str = "the bus has moved to another table";

impl Database {
    /// Makes sure that there is a table and bookkeeping of it. False while there is none.
    pub(super) fn begun(&mut self) -> Result<bool, Failure> {
        if self.tracker.is_some() || !self.resumed {
            return Ok(self.tracker.is_some());
        }
        let (own, odoo, bus) = transaction::run(|| {
            let (own, odoo) = bus::candidates()?;
            Ok((own, odoo, bus::table()?))
        })?;
        let retention = transaction::run(bus::retention)?;
        let (history, seen) = transaction::run(|| own.load_bookmarks(retention))?;
        self.history = history;
        self.snapshot = transaction::run(bookmark::snapshot)?;
        self.snapshot_at = Instant::now();
        let ours = |table: u32| table == own.oid() || odoo.as_ref().is_some_and(|odoo| odoo.oid() == table);
        let resumed = self.resume_from.take().filter(|position| ours(position.table));
        self.is_catching_up = resumed.is_none() && !self.history.is_empty();
        // What was committed before the ring is read from is older than what will be found in it.
        self.is_overrun = resumed.is_none();
        let head = ring::get().map_or(0, |ring| ring.head());
        let position = match (resumed, self.history.newest()) {
            (Some(position), _) => position,
            (None, Some(newest)) => Position { ring: head, ..newest.clone() },
            (None, None) => self.first(&own, &bus, retention, head)?,
        };
        pgrx::debug1!(
            "imbus begins at id {} of the bus of database \"{}\", {} gaps, ring {}, {}",
            position.high,
            self.name,
            position.gaps.len(),
            position.ring,
            if self.is_overrun { "from a bookmark" } else { "from the gateway's position" }
        );
        self.reader = Reader::new(position.ring);
        self.began = position.ring;
        self.intake.begin(position.ring, position.taken);
        let epoch = u64::try_from(worker::now()).unwrap_or(1);
        let mut tracker = Tracker::new(position, bus.holders(), epoch);
        tracker.moved(bus.oid());
        if self.is_overrun {
            self.inherited = transaction::run(bookmark::prepared)?.into_iter().collect();
        }
        if let Some(seen) = seen.filter(|_| self.is_catching_up) {
            // Ids that counted as passed at the bookmark, written since: the ring that announced them is gone.
            let low = tracker.high().saturating_sub(RECENT_IDS);
            for (id, xmin) in transaction::run(|| bus.ids_between(low, tracker.high()))? {
                if !seen.sees(xmin) {
                    tracker.promised((id, id), || bus.holders());
                }
            }
        }
        self.tracker = Some(tracker);
        self.attached = !bus.is_odoo;
        self.swept = !bus.is_odoo;
        self.bus = Some(bus);
        self.drain();
        Ok(true)
    }

    /// The position of a worker that finds no bookmark: rows that are older than a restart takes count as dispatched
    /// (clients say what they have), ids missing shortly before may still be in flight. Leaves bookmarks for what is
    /// older, as far as the rows' dates tell.
    fn first(&mut self, own: &Bus, bus: &Bus, retention: f64, ring: u64) -> Result<Position, Failure> {
        let table = bus.oid();
        let at = |high| Position { table, high, ..Position::default() };
        for ago in [retention, RECENT].into_iter().filter(|ago| *ago > BEGINNING) {
            let position = transaction::run(|| {
                let position = at(bus.last_id_before(ago)?);
                own.keep_bookmark(&position, ago, "")?;
                Ok(position)
            })?;
            self.history.push(worker::now() - (ago * 1e6) as i64, position);
        }
        let position = transaction::run(|| {
            let position = beginning(bus)?;
            own.keep_bookmark(&position, 0.0, "")?;
            Ok(position)
        })?;
        self.history.push(worker::now(), position.clone());
        Ok(Position { ring, ..position })
    }

    /// Takes note of the table in force, when a read found that it has changed.
    pub(super) fn follow(&mut self) -> Result<(), Failure> {
        let now = transaction::run(bus::table)?;
        if self.bus.as_ref() != Some(&now) { self.switch_to(now) } else { Ok(()) }
    }

    /// Another table has come into force, or the same one has another owner. Ids go on (`Bus::go_on_from`), so the
    /// bookkeeping does too.
    fn switch_to(&mut self, bus: Bus) -> Result<(), Failure> {
        let same = self.bus.as_ref().is_some_and(|known| known.oid() == bus.oid());
        if !same {
            pgrx::log!("imbus moves the bus of database \"{}\" to another table", self.name);
        }
        // What its owner wrote into it before anybody knew of it has low ids, which count as dispatched.
        let written = if same { Vec::new() } else { transaction::run(|| unknown(&bus))? };
        if let Some(tracker) = &mut self.tracker {
            tracker.moved(bus.oid());
            let unknown = written.into_iter().filter(|(id, xmin)| !tracker.journal.holds(*id, *xmin));
            unknown.collect::<Vec<_>>().into_iter().for_each(|(id, _)| tracker.promised((id, id), || bus.holders()));
        }
        self.attached = !bus.is_odoo;
        self.swept = !bus.is_odoo;
        self.bus = Some(bus);
        self.look_due = true;
        self.next_care = self.last_look;
        Ok(())
    }

    /// Looks after the tables: Odoo's taken over, its trigger attached, no row left in imbus's own, no sequence restarted.
    pub(super) fn care(&mut self) {
        if self.tracker.is_none() {
            return;
        }
        worker::report_activity(Some("looking after the bus tables"));
        let done = self.follow().and_then(|()| self.mind_sequence()).and_then(|()| self.sweep());
        if let Err(failure) = done {
            self.slot.recheck.store(true, Ordering::Release);
            self.complain(format!("imbus could not look after the bus of database \"{}\": {failure}", self.name));
        }
        let Some(bus) = self.bus.as_ref().filter(|bus| bus.is_odoo).cloned() else { return };
        match transaction::run(|| trigger::attach(&bus)) {
            Ok(()) => self.attached = true,
            Err(failure) => {
                // Somebody has the table locked; until the trigger is there the look-out finds what is inserted.
                self.next_look = self.next_look.min(Instant::now() + super::GAP_LOOKOUT);
                pgrx::debug1!("imbus could not attach its trigger in database \"{}\" yet: {failure}", self.name);
            }
        }
    }

    /// Has what lies in imbus's own table in the one in force before anybody is answered from that: a replay reads it alone.
    pub(super) fn bring_over(&mut self) {
        if self.swept || self.tracker.is_none() {
            return;
        }
        match self.sweep() {
            Ok(_) => self.swept = true,
            Err(failure) => {
                self.complain(format!("imbus could not move the bus of database \"{}\": {failure}", self.name));
            }
        }
    }

    /// Moves what lies in imbus's own table into Odoo's, once that is in force: the rest of a long move, rows of
    /// transactions that began before it, rows restored. Whether there were any.
    pub(super) fn sweep(&mut self) -> Result<bool, Failure> {
        let Some(odoo) = self.bus.as_ref().filter(|bus| bus.is_odoo).cloned() else { return Ok(false) };
        let (own, retention) = transaction::run(|| Ok((bus::candidates()?.0, bus::retention()?)))?;
        let mut any = false;
        loop {
            let moved = transaction::run(|| own.move_to(&odoo, retention))?;
            if moved.is_empty() {
                return Ok(any);
            }
            any = true;
            self.look_due = true;
            self.pass_over(&moved);
            worker::check_interrupts();
        }
    }

    /// Rows that were dispatched already and had to take another id are not dispatched again.
    fn pass_over(&mut self, moved: &[Moved]) {
        let ring = self.ring_position();
        let (Some(tracker), Some(bus)) = (&mut self.tracker, &self.bus) else { return };
        let position = tracker.position(ring);
        let renumbered = moved.iter().filter(|row| row.id != row.old && position.covers(row.old));
        let entries: Vec<Entry> = renumbered.map(|row| Entry { id: row.id, xmin: row.xmin, channel: 0 }).collect();
        if !entries.is_empty() {
            tracker.dispatched(&entries, i64::MAX, || bus.holders(), ring, || 0);
        }
    }

    /// TRUNCATE … RESTART IDENTITY, or a table swapped for an empty one: ids begin anew.
    fn mind_sequence(&mut self) -> Result<(), Failure> {
        let (Some(tracker), Some(bus)) = (&mut self.tracker, &self.bus) else { return Ok(()) };
        let (last, high) = (transaction::run(|| bus.last_drawn())?, tracker.high());
        let Some(last) = last.filter(|last| *last < high) else { return Ok(()) };
        if transaction::run(|| bus.last_id())? > last {
            return Ok(());
        }
        tracker.restart();
        self.history = Default::default();
        self.bookmarked = None;
        self.look_due = true;
        transaction::run(|| bus::candidates()?.0.forget_bookmarks(None))
    }

    /// Whether a bookmark would say anything new.
    pub(super) fn has_news(&self) -> bool {
        self.tracker.as_ref().is_some_and(|tracker| {
            self.bookmarked
                .as_ref()
                .is_none_or(|old| old.journal != tracker.journal.end() || old.table != tracker.table())
        })
    }

    /// Keeps the position.
    pub(super) fn bookmark(&mut self) {
        let Some(tracker) = self.tracker.as_ref().filter(|_| self.has_news()) else { return };
        let position = tracker.position(self.ring_position());
        let before = self.snapshot.clone();
        let kept = transaction::run(|| {
            // A bookmark lost in a crash is as good as one not made yet.
            set_local(c"synchronous_commit", c"off");
            bus::candidates()?.0.keep_bookmark(&position, 0.0, &before)?;
            bookmark::snapshot()
        });
        match kept {
            Ok(snapshot) => {
                // What lies above the position is seen by a new one and not dispatched yet. The old one goes on to be
                // true: what it sees of the ids up to the position is dispatched.
                if !self.is_catching_up {
                    self.snapshot = snapshot;
                    self.snapshot_at = Instant::now();
                }
                self.history.push(worker::now(), position.clone());
                self.bookmarked = Some(position);
            }
            Err(failure) => {
                self.complain(format!("imbus could not keep its position in database \"{}\": {failure}", self.name));
            }
        }
    }

    /// Deletes old notifications and finished jobs, in short transactions. What a client that comes back within the
    /// retention may be owed stays, however old its date: it was dispatched before a bookmark of that age.
    pub(super) fn prune(&mut self) {
        worker::report_activity(Some("deleting old notifications and jobs"));
        let Some(bus) = self.bus.clone() else { return };
        let done = transaction::run(bus::retention).and_then(|retention| {
            let moment = worker::now() - (retention * 1e6) as i64;
            self.history.prune(moment);
            transaction::run(|| bus::candidates()?.0.forget_bookmarks(Some(retention)))?;
            if let Some(position) = self.history.before(moment).cloned() {
                while transaction::run(|| bus.prune(retention, &position))? > 0 {
                    worker::check_interrupts();
                }
            }
            while transaction::run(|| jobs::prune(guc::job_retention()))? > 0 {
                worker::check_interrupts();
            }
            Ok(())
        });
        if let Err(failure) = done {
            self.slot.recheck.store(true, Ordering::Release);
            pgrx::warning!("imbus could not delete old rows: {failure}");
        }
    }
}

/// The latest rows of a table that nobody has read yet, within the retention.
fn unknown(bus: &Bus) -> Outcome<Vec<(i64, u32)>> {
    bus.latest(bus::retention()?, UNKNOWN_MAX)
}

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
    Ok(Position { table: bus.oid(), high, gaps, ..Position::default() })
}
