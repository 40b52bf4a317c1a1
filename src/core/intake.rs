//! What the ring said and is not dispatched yet: ids in the order of their commits, cut into pages. Knows neither the
//! ring nor the table.

use super::ring::{Entry, Kind};
use std::collections::VecDeque;

/// Ranges that may wait; a worker that cannot hand on for so long lets the order go, the table has the rows.
const WAITING_MAX: usize = 1 << 20;

#[derive(Clone, Copy, Debug)]
struct Waiting {
    /// The entry's index in the ring.
    index: u64,
    /// Tells transactions apart.
    transaction: u64,
    what: What,
    /// How many of its ids are done.
    taken: u64,
}

#[derive(Clone, Copy, Debug)]
enum What {
    Ids(i64, i64),
    /// A transaction's number, and how many more of the same transaction follow.
    Finished(u32, i64),
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Read these rows and dispatch them in this order; the second number tells transactions apart.
    Rows(Vec<(i64, u64)>),
    /// Look for the rows of the transaction with these numbers, its own and its savepoints'.
    Finished(Vec<u32>),
    Nothing,
}

/// The queue.
#[derive(Clone, Debug, Default)]
pub struct Intake {
    waiting: VecDeque<Waiting>,
    transactions: u64,
    /// An entry of which so many ids were done by an earlier reader.
    begun: Option<(u64, u64)>,
}

impl Intake {
    /// Begins anew: of the entry at this index so many ids are done.
    pub fn begin(&mut self, index: u64, taken: u64) {
        self.waiting.clear();
        self.begun = (taken > 0).then_some((index, taken));
    }

    /// Takes in an entry of the ring. False when there is no room: then all that waited is forgotten.
    pub fn push(&mut self, index: u64, entry: Entry) -> bool {
        let what = match entry.kind {
            Kind::Committed | Kind::Part => What::Ids(entry.first, entry.last),
            Kind::Finished => What::Finished(u32::try_from(entry.first).unwrap_or(0), entry.last),
            Kind::Prepared | Kind::Overflow => return true,
        };
        if self.waiting.len() >= WAITING_MAX {
            self.waiting.clear();
            return false;
        }
        let mut waiting = Waiting { index, transaction: self.transactions, what, taken: 0 };
        let taken = self.begun.filter(|(begun, _)| *begun == index).map_or(0, |(_, taken)| taken);
        if waiting.take(taken) {
            self.waiting.push_back(waiting);
        }
        if matches!(entry.kind, Kind::Committed) {
            self.transactions += 1;
        }
        true
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether an id waits. `ids` are looked up together, in any order.
    pub fn holds(&self, ids: &[i64]) -> Vec<bool> {
        let mut ranges: Vec<(i64, i64)> = self.waiting.iter().filter_map(Waiting::ids).collect();
        ranges.sort_unstable();
        // Explicit ids may come twice; a range that begins later may end earlier.
        let mut ends = Vec::with_capacity(ranges.len());
        let mut greatest = i64::MIN;
        for (_, last) in &ranges {
            greatest = greatest.max(*last);
            ends.push(greatest);
        }
        let held = |id: &i64| {
            let at = ranges.partition_point(|(first, _)| first <= id);
            at.checked_sub(1).and_then(|at| ends.get(at)).is_some_and(|end| end >= id)
        };
        ids.iter().map(held).collect()
    }

    /// What to do next, at most `max` rows. It stays until [`Intake::done`].
    pub fn next(&self, max: usize) -> Next {
        let mut rows = Vec::new();
        for waiting in &self.waiting {
            match waiting.what {
                What::Finished(..) if rows.is_empty() => return Next::Finished(self.finished()),
                What::Finished(..) => break,
                What::Ids(first, last) => {
                    let room = max - rows.len();
                    rows.extend((first..=last).take(room).map(|id| (id, waiting.transaction)));
                    if rows.len() >= max {
                        break;
                    }
                }
            }
        }
        if rows.is_empty() { Next::Nothing } else { Next::Rows(rows) }
    }

    /// The numbers of the transaction in front.
    fn finished(&self) -> Vec<u32> {
        let mut numbers = Vec::new();
        for waiting in &self.waiting {
            let What::Finished(number, more) = waiting.what else { break };
            numbers.push(number);
            if more == 0 {
                break;
            }
        }
        numbers
    }

    /// What `next` said is done.
    pub fn done(&mut self, next: &Next) {
        match next {
            Next::Nothing => {}
            Next::Finished(numbers) => drop(self.waiting.drain(..numbers.len().min(self.waiting.len()))),
            Next::Rows(rows) => {
                let mut left = rows.len() as u64;
                while let Some(waiting) = self.waiting.front_mut()
                    && let Some((first, last)) = waiting.ids()
                {
                    let count = last.abs_diff(first) + 1;
                    if left < count {
                        waiting.take(left);
                        return;
                    }
                    left -= count;
                    self.waiting.pop_front();
                }
            }
        }
    }

    /// The ring's index of what waits longest.
    pub fn position(&self) -> Option<u64> {
        self.waiting.iter().map(|waiting| waiting.index).min()
    }

    /// How many ids are done of the entry at [`Intake::position`].
    pub fn taken(&self) -> u64 {
        self.waiting.iter().min_by_key(|waiting| waiting.index).map_or(0, |waiting| waiting.taken)
    }
}

impl Waiting {
    /// So many of its ids are done; whether any are left.
    fn take(&mut self, count: u64) -> bool {
        let What::Ids(first, last) = &mut self.what else { return true };
        self.taken += count;
        *first = first.saturating_add_unsigned(count);
        first <= last
    }

    fn ids(&self) -> Option<(i64, i64)> {
        match self.what {
            What::Ids(first, last) => Some((first, last)),
            What::Finished(..) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(intake: &mut Intake, index: u64, kind: Kind, first: i64, last: i64) {
        assert!(intake.push(index, Entry { database: 1, kind, first, last }));
    }

    #[test]
    fn pages_keep_the_order_of_commits_and_tell_transactions_apart() {
        let mut intake = Intake::default();
        push(&mut intake, 4, Kind::Part, 10, 12);
        push(&mut intake, 5, Kind::Committed, 20, 20);
        push(&mut intake, 6, Kind::Committed, 1, 2);
        push(&mut intake, 7, Kind::Finished, 99, 1);
        push(&mut intake, 7, Kind::Finished, 101, 0);
        push(&mut intake, 8, Kind::Committed, 3, 3);
        assert_eq!(intake.holds(&[9, 10, 12, 13, 20, 2, 3, 99]), [false, true, true, false, true, true, true, false]);
        let first = intake.next(2);
        assert_eq!(first, Next::Rows(vec![(10, 0), (11, 0)]));
        intake.done(&first);
        assert_eq!(intake.position(), Some(4));
        let second = intake.next(10);
        assert_eq!(second, Next::Rows(vec![(12, 0), (20, 0), (1, 1), (2, 1)]));
        intake.done(&second);
        assert_eq!(intake.next(10), Next::Finished(vec![99, 101]));
        intake.done(&intake.next(10));
        assert_eq!(intake.next(10), Next::Rows(vec![(3, 2)]));
        intake.done(&intake.next(10));
        assert!(intake.is_empty());
        assert_eq!(intake.next(10), Next::Nothing);
    }

    #[test]
    fn another_reader_goes_on_in_the_middle_of_an_entry() {
        let mut intake = Intake::default();
        push(&mut intake, 4, Kind::Committed, 10, 19);
        intake.done(&intake.next(7));
        assert_eq!((intake.position(), intake.taken()), (Some(4), 7));
        let mut other = Intake::default();
        other.begin(4, 7);
        push(&mut other, 4, Kind::Committed, 10, 19);
        push(&mut other, 5, Kind::Committed, 1, 1);
        assert_eq!(other.next(9), Next::Rows(vec![(17, 0), (18, 0), (19, 0), (1, 1)]));
        other.done(&other.next(1));
        assert_eq!(other.taken(), 8);
    }

    #[test]
    fn ranges_inside_others_are_found() {
        let mut intake = Intake::default();
        push(&mut intake, 1, Kind::Committed, 1, 100);
        push(&mut intake, 2, Kind::Committed, 50, 51);
        assert_eq!(intake.holds(&[60, 101]), [true, false]);
    }

    #[test]
    fn what_finds_no_room_is_said() {
        let mut intake = Intake::default();
        for index in 0..WAITING_MAX as u64 {
            push(&mut intake, index, Kind::Committed, 1, 1);
        }
        assert!(!intake.push(9, Entry { database: 1, kind: Kind::Committed, first: 1, last: 1 }));
        assert!(intake.is_empty());
    }
}
