//! The bookkeeping of one bus table: which ids were dispatched, which are known to be drawn and may still commit, and in
//! what order things went. Knows ids only; what "running" means is the caller's.

use super::journal::{Entry, Journal};
use super::position::{Position, Range};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Names of transactions that run; the caller's.
pub type Holders = HashSet<u64>;

/// A look for the rows of gaps, by the groups there were when it began.
#[derive(Clone, Copy, Debug)]
pub struct Look(u64);

/// The bookkeeping.
#[derive(Clone, Debug, Default)]
pub struct Tracker {
    table: u32,
    high: i64,
    /// By their lower bound: the upper bound, and the group they were found with.
    gaps: BTreeMap<i64, (i64, u64)>,
    /// Those who may hold the ids of a group: they were running when it was found, nobody who came later can.
    groups: HashMap<u64, Holders>,
    next_group: u64,
    epoch: u64,
    /// Ids dispatched, or promised, after they counted as passed: bookmarks cannot tell when they came.
    late: HashSet<i64>,
    /// What was dispatched lately.
    pub journal: Journal,
}

impl Tracker {
    /// Goes on from a position. `holders` are the transactions running now, `epoch` names this worker.
    pub fn new(position: Position, holders: Holders, epoch: u64) -> Tracker {
        let mut tracker = Tracker { table: position.table, high: position.high, epoch, ..Tracker::default() };
        tracker.open(position.gaps.iter().copied(), || holders);
        tracker.journal = Journal::new(position);
        tracker
    }

    /// Goes back to what the gateway saw last: a position of this worker, or of one before it.
    pub fn rewind(&mut self, position: Position, holders: Holders) {
        let journal = std::mem::take(&mut self.journal);
        let end = position.journal;
        let mine = self.is_mine(&position);
        *self = Tracker { next_group: self.next_group, ..Tracker::new(position, holders, self.epoch) };
        if mine {
            self.journal = journal;
            self.journal.truncate(end);
        }
    }

    /// The position now; `ring` is how far the ring was read.
    pub fn position(&self, ring: u64) -> Position {
        let gaps = self.ranges();
        let (table, high, epoch, journal) = (self.table, self.high, self.epoch, self.journal.end());
        Position { table, high, gaps, ring, taken: 0, epoch, journal }.coarse()
    }

    /// The ids that are waited for.
    pub fn ranges(&self) -> Vec<Range> {
        self.gaps.iter().map(|(low, (high, _))| (*low, *high)).collect()
    }

    /// How many ranges of ids are waited for.
    pub fn gaps(&self) -> usize {
        self.gaps.len()
    }

    /// OID of the table.
    pub fn table(&self) -> u32 {
        self.table
    }

    /// The greatest id dispatched.
    pub fn high(&self) -> i64 {
        self.high
    }

    /// These rows are dispatched now, in this order. What they skip above `high` becomes a gap; `holders` are the
    /// transactions that run after the rows were read. An id above `drawn` was made up by its writer and says nothing of
    /// the others. `ring` is the position's, `needed` the journal's.
    pub fn dispatched(
        &mut self,
        rows: &[Entry],
        drawn: i64,
        holders: impl FnOnce() -> Holders,
        ring: u64,
        needed: impl FnOnce() -> u64,
    ) {
        let mut journal = std::mem::take(&mut self.journal);
        journal.extend(rows.iter().copied(), || self.position_before(ring), needed);
        self.journal = journal;
        let mut new: Vec<i64> = Vec::new();
        for row in rows {
            if row.id <= self.high {
                if !self.fill(row.id) {
                    self.mark_late(row.id);
                }
            } else if row.id <= drawn {
                new.push(row.id);
            }
        }
        new.sort_unstable();
        let mut skipped = Vec::new();
        for id in new {
            if id > self.high.saturating_add(1) {
                skipped.push((self.high + 1, id - 1));
            }
            self.high = self.high.max(id);
        }
        self.open(skipped, holders);
    }

    /// These ids will be visible when a prepared transaction commits: they are waited for as long as it is among those
    /// who run now, also where others who may have drawn them are gone.
    pub fn promised(&mut self, range: Range, holders: impl FnOnce() -> Holders) {
        let covered: Vec<i64> = (range.0..=range.1.min(self.high)).take(CAREFUL).collect();
        for id in &covered {
            self.fill(*id);
            self.mark_late(*id);
        }
        let ids = covered.into_iter().map(|id| (id, id)).collect::<Vec<_>>();
        self.open(ids, holders);
    }

    /// Begins a look for the rows of gaps; gaps found from now on are no part of it. Say [`Tracker::settle`] at its end.
    pub fn begin_look(&self) -> Look {
        Look(self.next_group)
    }

    /// Forgets gaps that nobody can fill any more. `running` are the transactions that ran before the rows of the gaps
    /// were looked for, so whoever ended before that was seen.
    pub fn settle(&mut self, look: Look, running: &Holders) {
        let before = self.groups.len();
        self.groups.retain(|group, holders| *group >= look.0 || !holders.is_disjoint(running));
        if self.groups.len() < before {
            let groups = &self.groups;
            self.gaps.retain(|_, (_, group)| groups.contains_key(group));
        }
    }

    /// Whether the journal has all that was dispatched after this position.
    pub fn still_has(&self, position: &Position) -> bool {
        self.is_mine(position) && (self.journal.start()..=self.journal.end()).contains(&position.journal)
    }

    /// Whether a position counts this journal's entries.
    pub fn is_mine(&self, position: &Position) -> bool {
        position.epoch == self.epoch
    }

    /// The bus moved to another table; ids go on.
    pub fn moved(&mut self, table: u32) {
        self.table = table;
    }

    /// The table was emptied and its sequence starts again: ids from here on are new ones.
    pub fn restart(&mut self) {
        let journal = std::mem::take(&mut self.journal);
        *self = Tracker { table: self.table, epoch: self.epoch, journal, ..Tracker::default() };
    }

    /// Without counting the journal that is being written.
    fn position_before(&self, ring: u64) -> Position {
        Position { ring, ..Position { table: self.table, high: self.high, gaps: self.ranges(), ..Position::default() } }
    }

    /// Whether an id came after it counted as passed.
    pub fn is_late(&self, id: i64) -> bool {
        self.late.contains(&id)
    }

    fn mark_late(&mut self, id: i64) {
        if self.late.len() >= CAREFUL {
            self.late.clear();
        }
        self.late.insert(id);
    }

    /// Takes one id out of the gaps; whether it was in one.
    fn fill(&mut self, id: i64) -> bool {
        let Some((&low, &(high, group))) = self.gaps.range(..=id).next_back().filter(|(_, (high, _))| *high >= id)
        else {
            return false;
        };
        self.gaps.remove(&low);
        if low < id {
            self.gaps.insert(low, (id - 1, group));
        }
        if id < high {
            self.gaps.insert(id + 1, (high, group));
        }
        true
    }

    /// A group of gaps. A group whose gaps are all filled is forgotten with its holders.
    fn open(&mut self, gaps: impl IntoIterator<Item = Range>, holders: impl FnOnce() -> Holders) {
        let group = self.next_group;
        let before = self.gaps.len();
        self.gaps.extend(gaps.into_iter().map(|(low, high)| (low, (high, group))));
        if self.gaps.len() > before {
            self.next_group += 1;
            self.groups.insert(group, holders());
        }
    }
}

/// Ids of one range promised by a prepared transaction that are waited for again, and late ids remembered, at most.
const CAREFUL: usize = 100_000;

#[cfg(test)]
mod tests;
