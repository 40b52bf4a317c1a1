//! What one transaction has inserted into the bus table, savepoints minded. Ids in ranges, in the order of insertion.

/// Ranges kept allocated from one transaction to the next.
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

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.ranges.clear();
        self.ranges.shrink_to(SPARE);
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
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            4 => (1i64..30).prop_map(Act::Note),
            2 => Just(Act::Savepoint),
            1 => Just(Act::Release),
            1 => Just(Act::Rollback),
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
                    _ => {}
                }
                prop_assert_eq!(ids(&written), open.concat());
            }
        }
    }
}
