//! A position: how far something was read or delivered, as one greatest id and the gaps below it. Positions go to the
//! gateway with each dispatch and to disk as bookmarks; they say what a client that comes back is owed.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Ids that were drawn from the sequence but are not visible: inclusive bounds.
pub type Range = (i64, i64);

/// Gaps that a position carries at most; more are merged, which uncovers ids between them (they may be delivered again
/// after a restart, never lost).
const GAPS_MAX: usize = 8192;

/// Everything up to `high` was dispatched, except what lies in `gaps`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// OID of the bus table: ids of another table mean nothing.
    pub table: u32,
    /// The greatest id dispatched.
    pub high: i64,
    /// Ids below `high` that may still commit, ascending, disjoint.
    pub gaps: Vec<Range>,
    /// How far the commit-order ring was read (an index into it).
    pub ring: u64,
    /// How many ids of the entry there were dispatched already.
    pub taken: u64,
    /// The worker process whose journal `journal` counts; another one has another journal.
    pub epoch: u64,
    /// How many notifications that worker had dispatched.
    pub journal: u64,
}

impl Position {
    /// Whether an id has been passed: not above `high` and in no gap.
    pub fn covers(&self, id: i64) -> bool {
        let at = self.gaps.partition_point(|(low, _)| *low <= id);
        let gap = at.checked_sub(1).and_then(|at| self.gaps.get(at));
        id <= self.high && gap.is_none_or(|(_, high)| *high < id)
    }

    /// The same position with at most [`GAPS_MAX`] gaps.
    pub fn coarse(mut self) -> Position {
        while self.gaps.len() > GAPS_MAX {
            let merge = |pair: &[Range]| Some((pair.first()?.0, pair.last()?.1));
            self.gaps = self.gaps.chunks(2).filter_map(merge).collect();
        }
        self
    }
}

/// Which transactions had ended at a moment: PostgreSQL's snapshot in its text form, `xmin:xmax:xip,…`, cut to the 32 bits
/// that rows carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    xmax: u32,
    running: Vec<u32>,
}

impl Snapshot {
    /// Reads the text; None when it is none.
    pub fn parse(text: &str) -> Option<Snapshot> {
        let number = |text: &str| text.parse::<u64>().ok().map(|number| number as u32);
        let mut parts = text.splitn(3, ':');
        let (_, xmax, running) = (parts.next()?, number(parts.next()?)?, parts.next()?);
        let running = running.split(',').filter(|text| !text.is_empty()).map(number).collect::<Option<_>>()?;
        Some(Snapshot { xmax, running })
    }

    /// Whether this transaction had ended (transam.c compares numbers modulo 2^32; those below 3 are for ever).
    pub fn sees(&self, number: u32) -> bool {
        let precedes = (number.wrapping_sub(self.xmax) as i32) < 0;
        number < 3 || precedes && !self.running.contains(&number)
    }
}

/// The positions of the past, one every few seconds: where to begin for a client whose last id is known, and what is old
/// enough to be deleted.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Microseconds since 2000, and the position then; ascending.
    bookmarks: VecDeque<(i64, Position)>,
}

impl History {
    /// Remembers a position.
    pub fn push(&mut self, at: i64, position: Position) {
        self.bookmarks.push_back((at, position));
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.bookmarks.is_empty()
    }

    /// The newest one.
    pub fn newest(&self) -> Option<&Position> {
        self.bookmarks.back().map(|(_, position)| position)
    }

    /// The newest position before this id was delivered. Once an id is covered it stays so, hence the search by halves.
    pub fn before_id(&self, id: i64) -> Option<&Position> {
        let end = self.bookmarks.partition_point(|(_, position)| !position.covers(id));
        self.bookmarks.get(end.checked_sub(1)?).map(|(_, position)| position)
    }

    /// The newest position at or before a moment (microseconds since 2000).
    pub fn before(&self, moment: i64) -> Option<&Position> {
        let end = self.bookmarks.partition_point(|(at, _)| *at <= moment);
        self.bookmarks.get(end.checked_sub(1)?).map(|(_, position)| position)
    }

    /// Forgets what was remembered of this worker's journal (`epoch`) beyond an entry: its numbers are given again.
    pub fn rewind(&mut self, epoch: u64, journal: u64) {
        self.bookmarks.retain(|(_, position)| position.epoch != epoch || position.journal <= journal);
    }

    /// Forgets what lies before a moment, but for the newest of it.
    pub fn prune(&mut self, moment: i64) {
        while self.bookmarks.get(1).is_some_and(|(at, _)| *at <= moment) {
            self.bookmarks.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(high: i64, gaps: &[Range]) -> Position {
        Position { high, gaps: gaps.to_vec(), ..Position::default() }
    }

    #[test]
    fn a_position_covers_what_is_not_above_it_and_in_no_gap() {
        let position = position(10, &[(2, 3), (7, 7)]);
        let covered: Vec<i64> = (0..13).filter(|id| position.covers(*id)).collect();
        assert_eq!(covered, [0, 1, 4, 5, 6, 8, 9, 10]);
    }

    #[test]
    fn a_coarse_position_covers_no_more() {
        let fine = position(100_000, &(0..10_000).map(|n| (n * 10, n * 10 + 3)).collect::<Vec<_>>());
        let coarse = fine.clone().coarse();
        assert!(coarse.gaps.len() <= GAPS_MAX);
        assert!((0..100_001).all(|id| fine.covers(id) || !coarse.covers(id)));
        assert!(coarse.covers(100_000));
    }

    #[test]
    fn a_snapshot_tells_who_had_ended() {
        let snapshot = Snapshot::parse("4294967300:4294967305:4294967301,4294967303").unwrap();
        let seen: Vec<u32> = (0..12).filter(|number| snapshot.sees(*number)).collect();
        assert_eq!(seen, [0, 1, 2, 3, 4, 6, 8]);
        assert!(snapshot.sees(u32::MAX - 5), "before the numbers began anew");
        assert_eq!(Snapshot::parse("7:7:").unwrap(), Snapshot { xmax: 7, running: vec![] });
        assert_eq!(Snapshot::parse("7:x:"), None);
    }

    #[test]
    fn the_past_is_found_by_id_and_by_time() {
        let mut history = History::default();
        for (at, high, gaps) in [(10, 5, vec![]), (20, 9, vec![(6, 7)]), (30, 12, vec![(6, 6)]), (40, 20, vec![])] {
            history.push(at, position(high, &gaps));
        }
        let high = |found: Option<&Position>| found.map(|position| position.high);
        assert_eq!(high(history.before_id(5)), None);
        assert_eq!(high(history.before_id(8)), Some(5));
        assert_eq!(high(history.before_id(6)), Some(12), "it was waited for until then");
        assert_eq!(high(history.before_id(7)), Some(9));
        assert_eq!(high(history.before_id(99)), Some(20));
        assert_eq!(high(history.before(9)), None);
        assert_eq!(high(history.before(20)), Some(9));
        assert_eq!(high(history.before(39)), Some(12));
        history.prune(35);
        assert_eq!(high(history.before(35)), Some(12));
        assert_eq!(high(history.before(29)), None);
        assert_eq!(high(history.newest()), Some(20));
    }
}
