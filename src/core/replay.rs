//! What a client that comes back is owed, and in which order: first what only the table still knows, by id, then the
//! journal, in the order of dispatch. So wherever an answer is cut, the last id the client has had is its position.

use super::journal::Entry;
use super::position::{History, Position, Range};
use super::tracker::Tracker;
use std::collections::HashSet;

/// How far back `last = 0` goes, in microseconds (Odoo's `_poll`: its TIMEOUT of 50 s).
pub const RECENT: i64 = 50_000_000;

/// Rows read in one step.
pub const PAGE: usize = 1000;

/// Journal entries looked through in one step.
const LOOKED_AT: u64 = if cfg!(test) { 16 } else { 1 << 16 };

/// What to read next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The rows with ids in these ranges; then say [`Replay::scanned`].
    Within(Vec<Range>),
    /// The next [`PAGE`] rows above this id; then say [`Replay::scanned`].
    Above(i64),
    /// These rows, in this order.
    Among(Vec<i64>),
    /// Nothing is owed any more.
    Done,
    /// The journal has forgotten what this slow client still needs: plan anew, from the last id it was sent.
    Lost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Gaps,
    Above(i64),
    Journal,
}

/// An answer under way.
#[derive(Clone, Debug)]
pub struct Replay {
    /// Only rows of the last 50 s are owed.
    pub recent: bool,
    last: i64,
    before: Position,
    /// Fingerprints of the channels.
    channels: HashSet<u32>,
    /// The journal's entries from here on were dispatched after the client asked: all are owed.
    until: u64,
    stage: Stage,
    cursor: u64,
}

impl Replay {
    /// What is owed to a client that has had everything up to `last` (0: nothing, it gets the last 50 s) of these
    /// channels; `now` in microseconds since 2000.
    pub fn new(tracker: &Tracker, history: &History, last: i64, channels: HashSet<u32>, now: i64) -> Replay {
        let journal = &tracker.journal;
        let until = journal.end();
        // Odoo: a `last` beyond the table (restored, emptied) counts as none (bus/models/ir_websocket.py).
        let recent = last == 0 || last > tracker.high() && journal.find(last).is_none();
        let replay = |before: Position, stage: Stage, cursor: u64| {
            let last = if recent { before.high } else { last };
            Replay { recent, last, before, channels, until, stage, cursor }
        };
        if recent {
            let before = history.before(now - RECENT).cloned().unwrap_or_default();
            // What the journal has forgotten was dispatched before that bookmark.
            let stage = if tracker.still_has(&before) { Stage::Journal } else { Stage::Gaps };
            return replay(before, stage, journal.start());
        }
        if let Some(at) = journal.place(last) {
            return replay(Position::default(), Stage::Journal, at + 1);
        }
        let before = history.before_id(last).cloned();
        replay(before.unwrap_or(Position { high: last, ..Position::default() }), Stage::Gaps, journal.start())
    }

    /// What to read next.
    pub fn next(&mut self, tracker: &Tracker) -> Step {
        match self.stage {
            Stage::Gaps => match self.gaps() {
                gaps if gaps.is_empty() => Step::Above(self.from()),
                gaps => Step::Within(gaps),
            },
            Stage::Above(id) => Step::Above(id),
            Stage::Journal => self.walk(tracker),
        }
    }

    /// The table was read: `end` is the last id of a page that may not be the last one.
    pub fn scanned(&mut self, tracker: &Tracker, end: Option<i64>) {
        let base = tracker.journal.base().map_or(0, |base| base.high);
        self.stage = match (self.stage, end) {
            (Stage::Gaps, _) if !self.gaps().is_empty() => Stage::Above(self.from()),
            (_, Some(end)) if end < base => Stage::Above(end),
            _ => Stage::Journal,
        };
    }

    /// Whether a row found in the table is owed: it was dispatched before the journal begins.
    pub fn owes_from_table(&self, tracker: &Tracker, id: i64) -> bool {
        let journal = &tracker.journal;
        self.passes(id) && journal.base().is_some_and(|base| base.covers(id)) && journal.find(id).is_none()
    }

    /// The journal's first entry that this replay may still need.
    pub fn needs(&self) -> u64 {
        self.cursor
    }

    fn from(&self) -> i64 {
        self.last.min(self.before.high)
    }

    /// What was waited for, up to where all is read: ids must ascend.
    fn gaps(&self) -> Vec<Range> {
        let from = self.from();
        self.before.gaps.iter().filter(|(low, _)| *low <= from).map(|(low, high)| (*low, (*high).min(from))).collect()
    }

    fn passes(&self, id: i64) -> bool {
        id > self.last || id < self.last && !self.before.covers(id)
    }

    fn walk(&mut self, tracker: &Tracker) -> Step {
        let journal = &tracker.journal;
        if self.cursor < journal.start() {
            return Step::Lost;
        }
        let end = (self.cursor + LOOKED_AT).min(journal.end());
        if end == journal.end() {
            return self.collect(tracker, end, journal.slice(self.cursor..end));
        }
        match journal.of_channels(&self.channels, self.cursor, LOOKED_AT as usize) {
            Some(found) => self.collect(tracker, journal.end(), found),
            None => self.collect(tracker, end, journal.slice(self.cursor..end)),
        }
    }

    /// A page of what is owed of these entries, which are all of the client's channels from the cursor up to `end`.
    fn collect(&mut self, tracker: &Tracker, end: u64, entries: impl IntoIterator<Item = (u64, Entry)>) -> Step {
        let is_filtered = self.before != Position::default();
        let mut ids = Vec::new();
        for (number, entry) in entries {
            let owed = number >= self.until || !is_filtered || self.passes(entry.id) || tracker.is_late(entry.id);
            if owed && self.channels.contains(&entry.channel) {
                ids.push(entry.id);
                if ids.len() >= PAGE {
                    self.cursor = number + 1;
                    return Step::Among(ids);
                }
            }
        }
        self.cursor = end;
        if ids.is_empty() && end >= tracker.journal.end() { Step::Done } else { Step::Among(ids) }
    }
}

#[cfg(test)]
mod tests;
