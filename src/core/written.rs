//! What one transaction has inserted into the bus table, savepoints minded. Ids in ranges, in the order of insertion.

/// Ranges whose memory is kept from one transaction to the next.
const SPARE: usize = 64;

/// The ids of one transaction.
#[derive(Clone, Debug, Default)]
pub struct Written {
    /// The level of the savepoint they belong to, and the bounds. Levels never descend by more than their ranges' end:
    /// what belongs to an open savepoint stands behind what does not.
    ranges: Vec<(u32, i64, i64)>,
}

impl Written {
    /// A row was inserted at this level (1 is the transaction itself, PostgreSQL's GetCurrentTransactionNestLevel).
    pub fn note(&mut self, level: u32, id: i64) {
        match self.ranges.last_mut() {
            Some((at, _, last)) if *at == level && last.checked_add(1) == Some(id) => *last = id,
            _ => self.ranges.push((level, id, id)),
        }
    }

    /// The savepoint at this level was released: its ids belong to the level below.
    pub fn commit_level(&mut self, level: u32) {
        let start = self.start_of(level);
        let Some(tail) = self.ranges.get_mut(start..) else { return };
        tail.iter_mut().for_each(|(at, ..)| *at = level.saturating_sub(1));
        self.merge(start);
    }

    /// The savepoint at this level was rolled back: its ids, and those of savepoints inside it, are forgotten.
    pub fn abort_level(&mut self, level: u32) {
        self.ranges.truncate(self.start_of(level));
    }

    /// The ranges (inclusive), in the order of insertion.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = (i64, i64)> + DoubleEndedIterator + '_ {
        self.ranges.iter().map(|(_, first, last)| (*first, *last))
    }

    /// Whether nothing was inserted.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Forgets everything. Gives memory back, never asks for any: shrinking would.
    pub fn clear(&mut self) {
        self.ranges.clear();
        if self.ranges.capacity() > SPARE {
            self.ranges = Vec::new();
        }
    }

    /// Where the ranges of an open savepoint begin.
    fn start_of(&self, level: u32) -> usize {
        self.ranges.len() - self.ranges.iter().rev().take_while(|(at, ..)| *at >= level).count()
    }

    /// Joins the range at `at` with the one before it, where they touch: a released savepoint's first with its parent's
    /// last.
    fn merge(&mut self, at: usize) {
        let Some((before, after)) = self.ranges.split_at_mut_checked(at) else { return };
        if let (Some((low, _, end)), Some((level, first, last))) = (before.last_mut(), after.first())
            && low == level
            && end.checked_add(1) == Some(*first)
        {
            *end = *last;
            self.ranges.remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ids(written: &Written) -> Vec<i64> {
        written.ranges().flat_map(|(first, last)| first..=last).collect()
    }

    #[test]
    fn consecutive_ids_make_one_range_across_released_savepoints() {
        let mut written = Written::default();
        written.note(1, 1);
        written.note(2, 2);
        written.note(2, 3);
        written.commit_level(2);
        written.note(1, 4);
        assert_eq!(written.ranges().collect::<Vec<_>>(), [(1, 4)]);
        written.note(2, 5);
        written.abort_level(2);
        assert_eq!(ids(&written), [1, 2, 3, 4]);
        written.clear();
        assert!(written.is_empty());
    }

    #[derive(Clone, Debug)]
    enum Act {
        Note(i64),
        Savepoint,
        Release,
        Rollback,
        /// To the savepoint this many levels further out: PostgreSQL may end those inside it with it.
        RollbackFar(usize),
    }

    /// The fewest ranges that say the same.
    fn fewest(ids: &[i64]) -> usize {
        ids.windows(2).filter(|pair| pair[0].checked_add(1) != Some(pair[1])).count() + usize::from(!ids.is_empty())
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            4 => (1i64..30).prop_map(Act::Note),
            2 => Just(Act::Savepoint),
            1 => Just(Act::Release),
            1 => Just(Act::Rollback),
            1 => (1usize..4).prop_map(Act::RollbackFar),
        ]
    }

    proptest! {
        #[test]
        fn savepoints_are_minded(acts in proptest::collection::vec(act(), 0..60)) {
            let mut written = Written::default();
            let mut open: Vec<Vec<i64>> = vec![Vec::new()];
            let mut next = 0;
            for act in acts {
                let level = open.len() as u32;
                match act {
                    Act::Note(jump) => {
                        // Mostly the next id, as a sequence gives them out.
                        next += if jump < 20 { 1 } else { jump - 25 };
                        written.note(level, next);
                        open.last_mut().unwrap().push(next);
                    }
                    Act::Savepoint => open.push(Vec::new()),
                    Act::Release if open.len() > 1 => {
                        written.commit_level(level);
                        let ids = open.pop().unwrap();
                        open.last_mut().unwrap().extend(ids);
                    }
                    Act::Rollback if open.len() > 1 => {
                        written.abort_level(level);
                        open.pop();
                    }
                    Act::RollbackFar(levels) if open.len() > levels => {
                        written.abort_level(level + 1 - levels as u32);
                        open.truncate(open.len() - levels);
                    }
                    _ => {}
                }
                prop_assert_eq!(ids(&written), open.concat());
                let least: usize = fewest(&open.concat());
                let most: usize = open.iter().map(|ids| fewest(ids)).sum();
                prop_assert!((least..=most).contains(&written.ranges().len()));
            }
        }
    }

    #[test]
    fn no_great_capacity_is_kept() {
        let mut written = Written::default();
        (0..3).for_each(|id| written.note(1, 2 * id));
        let capacity = written.ranges.capacity();
        written.clear();
        assert_eq!(written.ranges.capacity(), capacity);
        (0..10_000).for_each(|id| written.note(1, 2 * id));
        written.clear();
        assert_eq!((written.is_empty(), written.ranges.capacity()), (true, 0), "shrinking would ask for memory");
    }
}
