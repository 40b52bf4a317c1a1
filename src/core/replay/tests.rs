use super::*;
use crate::core::journal::{Entry, KEPT};
use proptest::prelude::*;
use std::collections::BTreeMap;

const MINE: u32 = 7;
const OTHER: u32 = 8;
/// Between two dispatches, in microseconds.
const SECOND: i64 = 1_000_000;

/// A worker with a table, dispatching what it is told in that order, with bookmarks now and then.
struct Worker {
    tracker: Tracker,
    history: History,
    table: BTreeMap<i64, u32>,
    order: Vec<i64>,
    times: BTreeMap<i64, i64>,
    clock: i64,
}

impl Worker {
    fn new() -> Worker {
        let tracker = Tracker::new(Position::default(), Default::default(), 1);
        let mut history = History::default();
        history.push(0, Position::default());
        Worker { tracker, history, table: BTreeMap::new(), order: Vec::new(), times: BTreeMap::new(), clock: 0 }
    }

    fn dispatch(&mut self, id: i64, channel: u32, needed: u64) {
        self.clock += SECOND;
        self.table.insert(id, channel);
        self.order.push(id);
        self.times.insert(id, self.clock);
        self.tracker.dispatched(&[Entry { id, xmin: 1, channel }], i64::MAX, || [1].into(), 0, || needed);
        if self.clock % (5 * SECOND) == 0 {
            self.history.push(self.clock, self.tracker.position(0));
        }
    }

    /// A worker after a crash: the journal is gone, the bookmarks are not; it dispatches again what they do not cover.
    fn restart(&mut self) {
        let position = self.history.newest().cloned().unwrap_or_default();
        let again: Vec<i64> = self.table.keys().copied().filter(|id| !position.covers(*id)).collect();
        self.tracker = Tracker::new(position, Default::default(), 2);
        for id in again {
            let channel = self.table[&id];
            self.tracker.dispatched(&[Entry { id, xmin: 1, channel }], i64::MAX, Default::default, 0, || u64::MAX);
        }
        self.tracker.journal.begin_exact();
    }

    fn replay(&self, last: i64) -> Replay {
        Replay::new(&self.tracker, &self.history, last, [MINE].into(), self.clock)
    }

    /// One step of an answer: what the client is sent, None at the end.
    fn step(&self, replay: &mut Replay) -> Option<Vec<i64>> {
        let mine = |id: &i64| self.table[id] == MINE;
        Some(match replay.next(&self.tracker) {
            Step::Done => return None,
            Step::Lost => panic!("lost"),
            Step::Among(ids) => ids.into_iter().filter(mine).collect(),
            Step::Within(ranges) => {
                let found = self.table.keys().copied();
                let found = found.filter(|id| ranges.iter().any(|(low, high)| (low..=high).contains(&id)));
                let ids = found.filter(|id| replay.owes_from_table(&self.tracker, *id) && mine(id)).collect();
                replay.scanned(&self.tracker, None);
                ids
            }
            Step::Above(from) => {
                let page: Vec<i64> = self.table.range(from + 1..).map(|(id, _)| *id).take(3).collect();
                let found = page.iter().copied();
                let ids = found.filter(|id| replay.owes_from_table(&self.tracker, *id) && mine(id)).collect();
                replay.scanned(&self.tracker, page.last().copied().filter(|_| page.len() == 3));
                ids
            }
        })
    }

    fn answer(&self, last: i64) -> Vec<i64> {
        let mut replay = self.replay(last);
        std::iter::from_fn(|| self.step(&mut replay)).flatten().collect()
    }

    fn mine(&self) -> impl Iterator<Item = i64> + '_ {
        self.order.iter().copied().filter(|id| self.table[id] == MINE)
    }
}

/// Ids near their natural order: some come up to `late` places later.
fn order(count: i64, late: &[usize]) -> Vec<i64> {
    let mut keyed: Vec<(usize, i64)> =
        (1..=count).map(|id| (id as usize + late[id as usize % late.len()], id)).collect();
    keyed.sort_unstable();
    keyed.into_iter().map(|(_, id)| id).collect()
}

#[test]
fn what_was_dispatched_after_a_clients_last_is_owed_in_that_order() {
    let mut worker = Worker::new();
    for (id, channel) in [(1, MINE), (5, MINE), (6, OTHER), (3, MINE), (2, MINE), (9, MINE), (4, MINE)] {
        worker.dispatch(id, channel, u64::MAX);
    }
    assert_eq!(worker.answer(5), [3, 2, 9, 4]);
    assert_eq!(worker.answer(3), [2, 9, 4]);
    assert_eq!(worker.answer(6), [3, 2, 9, 4]);
    assert_eq!(worker.answer(4), Vec::<i64>::new());
}

#[test]
fn a_slow_client_is_told_when_the_journal_has_gone_on_without_it() {
    let mut worker = Worker::new();
    (1..=10).for_each(|id| worker.dispatch(id, MINE, u64::MAX));
    let mut replay = worker.replay(5);
    (11..=2 * KEPT as i64 + 20).for_each(|id| worker.dispatch(id, MINE, u64::MAX));
    assert_eq!(replay.next(&worker.tracker), Step::Lost);
}

proptest! {
    /// Whatever the client's last id, wherever it breaks off and comes back with its last id, while more is
    /// dispatched: it has everything that was dispatched after its first last id. Nothing comes twice as long as the
    /// journal remembers its last.
    #[test]
    fn an_answer_may_be_cut_anywhere(
        count in 20i64..400,
        late in proptest::collection::vec(0usize..30, 1..17),
        first in 0.0f64..1.0,
        cuts in proptest::collection::vec(1usize..4, 0..6),
        restart in any::<bool>(),
    ) {
        let mut worker = Worker::new();
        let all = order(count, &late);
        let (early, coming) = all.split_at(all.len() * 3 / 4);
        early.iter().for_each(|id| worker.dispatch(*id, if id % 3 == 0 { OTHER } else { MINE }, u64::MAX));
        let had = (worker.mine().count() as f64 * first) as usize;
        let had: Vec<i64> = worker.mine().take(had).collect();
        let Some(first) = had.last().copied() else { return Ok(()) };
        let mut last = first;
        if restart {
            worker.restart();
        }
        let exact = !restart && worker.tracker.journal.place(last).is_some();
        let mut got: Vec<i64> = Vec::new();
        let mut coming = coming.iter();
        for steps in cuts.into_iter().chain([usize::MAX]) {
            let mut replay = worker.replay(last);
            for _ in 0..steps {
                let Some(page) = worker.step(&mut replay) else { break };
                // Cut inside the page.
                let part = if steps == usize::MAX { &page[..] } else { &page[..page.len().div_ceil(2)] };
                got.extend(part);
                if let Some(id) = part.last() {
                    last = *id;
                }
                if part.len() < page.len() {
                    break;
                }
            }
            for id in coming.by_ref().take(3) {
                worker.dispatch(*id, if id % 3 == 0 { OTHER } else { MINE }, 0);
            }
        }
        got.extend(worker.answer(last));
        let missing: Vec<i64> = worker.mine().filter(|id| !had.contains(id) && !got.contains(id)).collect();
        prop_assert!(missing.is_empty(), "missing {:?} of last {}: {:?}", missing, first, got);
        if exact {
            let mut once = got.clone();
            once.sort_unstable();
            once.dedup();
            prop_assert_eq!(once.len(), got.len(), "twice: {:?}", got);
        }
        let too_old: Vec<&i64> = got.iter().filter(|id| **id < first - 60 - 30).collect();
        prop_assert!(too_old.is_empty(), "{:?} for last {}", too_old, first);
    }

    /// A client without a last id gets what was dispatched in the last 50 s, each once and in that order as far as the
    /// journal reaches, whether that is all of it or not.
    #[test]
    fn the_recent_past_comes_whole_and_once(
        count in 1i64..400,
        late in proptest::collection::vec(0usize..30, 1..17),
        rare in 1i64..40,
        kept in any::<bool>(),
        breaks in any::<bool>(),
    ) {
        let mut worker = Worker::new();
        for id in order(count, &late) {
            let recent = worker.history.before(worker.clock - RECENT).filter(|old| worker.tracker.is_mine(old));
            let needed = recent.filter(|_| kept).map_or(u64::MAX, |position| position.journal);
            worker.dispatch(id, if id % rare == 0 { MINE } else { OTHER }, needed);
            if breaks && id % 97 == 0 {
                let seen = worker.history.newest().cloned().unwrap_or_default();
                worker.order.truncate(seen.journal as usize);
                let end = worker.tracker.journal.end();
                worker.history.rewind(1, seen.journal);
                worker.tracker.rewind(seen.clone(), [1].into());
                let again = (seen.journal..end).count();
                let lost: Vec<i64> = worker.table.keys().copied().filter(|id| !worker.order.contains(id)).collect();
                prop_assert_eq!(lost.len(), again);
                for id in lost {
                    let channel = worker.table[&id];
                    worker.dispatch(id, channel, needed);
                }
            }
        }
        let got = worker.answer(0);
        let recent = |id: &i64| worker.times[id] > worker.clock - RECENT;
        let owed: Vec<i64> = worker.mine().filter(recent).collect();
        let missing: Vec<&i64> = owed.iter().filter(|id| !got.contains(id)).collect();
        prop_assert!(missing.is_empty(), "missing {:?} of {:?}", missing, got);
        prop_assert!(got.windows(2).all(|pair| pair[0] != pair[1]));
        let mut once = got.clone();
        once.sort_unstable();
        once.dedup();
        prop_assert_eq!(once.len(), got.len(), "twice: {:?}", got);
        if kept {
            let tail: Vec<i64> = got.iter().copied().filter(|id| owed.contains(id)).collect();
            prop_assert_eq!(tail, owed);
        }
    }
}
