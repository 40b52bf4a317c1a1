//! How far a database worker has read its bus table: which ids it has dispatched, which it still waits for, and what
//! was dispatched lately in which order. Knows ids only; what "running" means is the caller's.

use serde::{Deserialize, Serialize};
use std::collections::{HashSet, VecDeque};

/// Ids remembered in the order of their dispatch, for clients that come back (a reconnect is a matter of seconds;
/// 131,072 ids last a minute at 2,000 messages per second and cost 1 MiB).
pub const LOG_MAX: usize = 1 << 17;

/// Ids that were drawn from the sequence but are not visible: inclusive bounds.
pub type Range = (i64, i64);

/// The worker's position: everything up to `high` was dispatched, except what lies in `gaps`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// OID of the bus table: ids of another table mean nothing.
    pub table: u32,
    /// The greatest id seen.
    pub high: i64,
    /// Ids below `high` that may still commit, ascending, disjoint.
    pub gaps: Vec<Range>,
    /// How far the commit-order ring was read (an index into it).
    pub ring: u64,
}

impl Position {
    /// Whether an id has been passed: not above `high` and in no gap.
    pub fn covers(&self, id: i64) -> bool {
        id <= self.high && !self.gaps.iter().any(|(low, high)| (*low..=*high).contains(&id))
    }
}

/// Gaps found at the same time, and the transactions that were running then: one of them may have drawn the ids, nobody
/// who came later can have.
#[derive(Clone, Debug)]
struct Group {
    gaps: Vec<Range>,
    holders: HashSet<u64>,
}

/// The bookkeeping of one bus table.
#[derive(Clone, Debug, Default)]
pub struct Tracker {
    table: u32,
    high: i64,
    groups: Vec<Group>,
    log: VecDeque<i64>,
}

impl Tracker {
    /// Goes on from a position; `holders` are the transactions running now.
    pub fn new(position: Position, holders: HashSet<u64>) -> Tracker {
        let groups = if position.gaps.is_empty() { Vec::new() } else { vec![Group { gaps: position.gaps, holders }] };
        Tracker { table: position.table, high: position.high, groups, log: VecDeque::new() }
    }

    /// Goes back to a position that the gateway saw last; the log of deliveries stays.
    pub fn rewind(&mut self, position: Position, holders: HashSet<u64>) {
        let log = std::mem::take(&mut self.log);
        *self = Tracker { log, ..Tracker::new(position, holders) };
    }

    /// The position now.
    pub fn position(&self) -> Position {
        let mut gaps: Vec<Range> = self.groups.iter().flat_map(|group| group.gaps.iter().copied()).collect();
        gaps.sort_unstable();
        Position { table: self.table, high: self.high, gaps, ring: 0 }
    }

    /// Whether any id is waited for.
    pub fn has_gaps(&self) -> bool {
        !self.groups.is_empty()
    }

    /// OID of the table it is about.
    pub fn table(&self) -> u32 {
        self.table
    }

    /// The greatest id seen.
    pub fn high(&self) -> i64 {
        self.high
    }

    /// Ids of gaps that have become visible: they are dispatched now.
    pub fn filled(&mut self, ids: &[i64]) {
        for id in ids {
            for group in &mut self.groups {
                cut(&mut group.gaps, *id);
            }
            self.remember(*id);
        }
        self.groups.retain(|group| !group.gaps.is_empty());
    }

    /// Forgets gaps that nobody can fill any more. `running` are the transactions that ran before the rows of the gaps
    /// were last looked for, so whoever ended before that was seen.
    pub fn settle(&mut self, running: &HashSet<u64>) {
        self.groups.retain(|group| !group.holders.is_disjoint(running));
    }

    /// New rows above `high`, ascending: they are dispatched now, and what they skip becomes a gap. `holders` are the
    /// transactions running after the rows were read.
    pub fn arrived(&mut self, ids: &[i64], holders: impl FnOnce() -> HashSet<u64>) {
        let mut gaps = Vec::new();
        for id in ids.iter().copied().filter(|id| *id > self.high).collect::<Vec<_>>() {
            if id - self.high > 1 {
                gaps.push((self.high + 1, id - 1));
            }
            self.high = id;
            self.remember(id);
        }
        if !gaps.is_empty() {
            self.groups.push(Group { gaps, holders: holders() });
        }
    }

    /// Ids below `last` that were dispatched after it: a client whose last id this is has not had them. Empty when
    /// `last` is not remembered.
    pub fn after(&self, last: i64) -> Vec<i64> {
        match self.log.iter().rposition(|id| *id == last) {
            Some(at) => self.log.iter().skip(at + 1).copied().filter(|id| *id < last).collect(),
            None => Vec::new(),
        }
    }

    fn remember(&mut self, id: i64) {
        if self.log.len() == LOG_MAX {
            self.log.pop_front();
        }
        self.log.push_back(id);
    }
}

/// Takes one id out of a list of ranges.
fn cut(gaps: &mut Vec<Range>, id: i64) {
    let Some(at) = gaps.iter().position(|(low, high)| (*low..=*high).contains(&id)) else { return };
    let (low, high) = gaps.swap_remove(at);
    if low < id {
        gaps.push((low, id - 1));
    }
    if id < high {
        gaps.push((id + 1, high));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ids: &[u64]) -> HashSet<u64> {
        ids.iter().copied().collect()
    }

    #[test]
    fn a_skipped_id_is_waited_for_until_its_transactions_end() {
        let mut tracker = Tracker::new(Position { table: 1, high: 10, ..Position::default() }, set(&[]));
        tracker.arrived(&[11, 14], || set(&[7]));
        assert_eq!(tracker.position(), Position { table: 1, high: 14, gaps: vec![(12, 13)], ring: 0 });
        assert_eq!(tracker.table(), 1);
        tracker.settle(&set(&[7, 8]));
        tracker.filled(&[13]);
        assert_eq!(tracker.position().gaps, vec![(12, 12)]);
        tracker.settle(&set(&[8]));
        assert!(!tracker.has_gaps());
        assert!(tracker.position().covers(12));
    }

    #[test]
    fn a_huge_jump_costs_one_range() {
        let mut tracker = Tracker::default();
        tracker.arrived(&[i64::MAX], || set(&[1]));
        assert_eq!(tracker.position().gaps, vec![(1, i64::MAX - 1)]);
        tracker.filled(&[5]);
        assert_eq!(tracker.position().gaps, vec![(1, 4), (6, i64::MAX - 1)]);
    }

    #[test]
    fn what_was_dispatched_after_a_clients_last_is_owed() {
        let mut tracker = Tracker::default();
        tracker.arrived(&[1, 2, 5], || set(&[1]));
        tracker.filled(&[3]);
        tracker.arrived(&[6], || set(&[1]));
        tracker.filled(&[4]);
        assert_eq!(tracker.after(5), vec![3, 4]);
        assert_eq!(tracker.after(3), Vec::<i64>::new());
        assert_eq!(tracker.after(6), vec![4]);
        assert_eq!(tracker.after(99), Vec::<i64>::new());
    }

    #[test]
    fn the_log_is_bounded() {
        let mut tracker = Tracker::default();
        let ids: Vec<i64> = (1..=(LOG_MAX as i64 + 10)).collect();
        tracker.arrived(&ids, || set(&[]));
        assert_eq!(tracker.log.len(), LOG_MAX);
    }

    mod model {
        use super::*;
        use proptest::prelude::*;

        proptest! {
            /// Rows become visible in any order; a worker that reads at random moments dispatches each exactly once.
            #[test]
            fn every_committed_id_is_dispatched_once(
                order in Just((1..=40i64).collect::<Vec<_>>()).prop_shuffle(),
                reads in proptest::collection::vec(0usize..6, 1..40),
            ) {
                let mut tracker = Tracker::default();
                let mut visible: Vec<i64> = Vec::new();
                let mut sent: Vec<i64> = Vec::new();
                let mut coming = order.into_iter();
                for step in reads.into_iter().chain([40, 0]) {
                    visible.extend(coming.by_ref().take(step));
                    // One transaction a row, named by its id: those not yet visible are running.
                    let running: HashSet<u64> =
                        (1..=40u64).filter(|id| !visible.contains(&(*id as i64))).collect();
                    let position = tracker.position();
                    let mut old: Vec<i64> = visible.iter().copied()
                        .filter(|id| *id <= position.high && !position.covers(*id)).collect();
                    old.sort_unstable();
                    let mut new: Vec<i64> = visible.iter().copied().filter(|id| *id > position.high).collect();
                    new.sort_unstable();
                    tracker.filled(&old);
                    tracker.settle(&running);
                    tracker.arrived(&new, || running.clone());
                    sent.extend(old);
                    sent.extend(new);
                }
                sent.sort_unstable();
                prop_assert_eq!(sent, (1..=40i64).collect::<Vec<_>>());
                prop_assert!(!tracker.has_gaps());
            }
        }
    }
}
