use super::*;

fn set(ids: &[u64]) -> Holders {
    ids.iter().copied().collect()
}

fn rows(ids: &[i64]) -> Vec<Entry> {
    ids.iter().map(|id| Entry { id: *id, xmin: 1, channel: 0 }).collect()
}

fn at(high: i64) -> Position {
    Position { table: 1, high, ..Position::default() }
}

impl Tracker {
    fn looked(&mut self, running: &[u64]) {
        let look = self.begin_look();
        self.settle(look, &set(running));
    }

    fn read(&mut self, ids: &[i64], holders: &[u64]) {
        self.dispatched(&rows(ids), i64::MAX, || set(holders), 0, || u64::MAX);
    }
}

#[test]
fn a_skipped_id_is_waited_for_until_its_transactions_end() {
    let mut tracker = Tracker::new(at(10), set(&[]), 1);
    tracker.read(&[11, 14], &[7]);
    assert_eq!((tracker.high(), tracker.ranges()), (14, vec![(12, 13)]));
    tracker.looked(&[7, 8]);
    tracker.read(&[13], &[]);
    assert_eq!(tracker.ranges(), vec![(12, 12)]);
    tracker.looked(&[8]);
    assert_eq!(tracker.gaps(), 0);
    assert!(tracker.position(0).covers(12));
}

#[test]
fn a_gap_found_while_a_look_is_under_way_is_no_part_of_it() {
    let mut tracker = Tracker::new(at(10), set(&[]), 1);
    let look = tracker.begin_look();
    tracker.read(&[12], &[7]);
    tracker.settle(look, &set(&[]));
    assert_eq!(tracker.ranges(), vec![(11, 11)]);
    tracker.looked(&[]);
    assert_eq!(tracker.gaps(), 0);
}

#[test]
fn rows_may_come_in_any_order() {
    let mut tracker = Tracker::new(at(0), set(&[]), 1);
    tracker.read(&[9, 2, 5], &[7]);
    assert_eq!((tracker.high(), tracker.ranges()), (9, vec![(1, 1), (3, 4), (6, 8)]));
    tracker.read(&[4, 12, 7], &[8]);
    assert_eq!(tracker.ranges(), vec![(1, 1), (3, 3), (6, 6), (8, 8), (10, 11)]);
    tracker.looked(&[8]);
    assert_eq!(tracker.ranges(), vec![(10, 11)]);
}

#[test]
fn a_huge_jump_costs_one_range() {
    let mut tracker = Tracker::default();
    tracker.read(&[i64::MAX], &[1]);
    tracker.read(&[5], &[1]);
    assert_eq!(tracker.ranges(), vec![(1, 4), (6, i64::MAX - 1)]);
}

#[test]
fn what_a_prepared_transaction_holds_is_waited_for_again() {
    let mut tracker = Tracker::new(at(10), set(&[]), 1);
    tracker.read(&[14], &[7]);
    tracker.promised((9, 16), || set(&[5]));
    tracker.looked(&[5]);
    assert_eq!(tracker.ranges(), (9..=14).map(|id| (id, id)).collect::<Vec<_>>());
}

#[test]
fn an_id_drawn_by_one_transaction_and_prepared_by_another_is_waited_for() {
    let mut tracker = Tracker::new(at(10), set(&[]), 1);
    tracker.read(&[12], &[7]);
    tracker.promised((11, 11), || set(&[8]));
    tracker.looked(&[8]);
    assert_eq!(tracker.ranges(), vec![(11, 11)], "who drew it has ended, who has it has not");
    tracker.looked(&[]);
    assert_eq!(tracker.gaps(), 0);
}

#[test]
fn after_a_lost_link_what_the_gateway_did_not_see_is_not_dispatched() {
    let mut tracker = Tracker::new(at(10), set(&[]), 1);
    tracker.read(&[11, 13], &[7]);
    let seen = tracker.position(4);
    tracker.read(&[12, 14], &[7]);
    tracker.rewind(seen.clone(), set(&[7]));
    assert_eq!(tracker.position(4), seen);
    assert!(tracker.journal.holds(13, 1) && !tracker.journal.holds(12, 1));
    // Another worker's numbers mean nothing here.
    tracker.rewind(Position { epoch: 9, journal: 1, ..seen }, set(&[7]));
    assert_eq!(tracker.journal.end(), 0);
}

#[test]
fn a_restarted_sequence_begins_anew_but_knows_what_it_sent() {
    let mut tracker = Tracker::new(at(10), set(&[]), 1);
    tracker.read(&[1], &[]);
    tracker.restart();
    assert_eq!((tracker.high(), tracker.table()), (0, 1));
    assert!(tracker.journal.holds(1, 1) && !tracker.journal.holds(1, 2));
}

mod model {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Rows become visible in any order, some never; a worker that reads at random moments what is not covered
        /// dispatches each exactly once, and in the end waits for nothing.
        #[test]
        fn every_committed_id_is_dispatched_once(
            order in Just((1..=40i64).collect::<Vec<_>>()).prop_shuffle(),
            lost in proptest::collection::hash_set(1..=40i64, 0..10),
            reads in proptest::collection::vec((0usize..6, any::<bool>()), 1..40),
        ) {
            let mut tracker = Tracker::new(at(0), set(&[]), 1);
            let (mut ended, mut sent): (Vec<i64>, Vec<i64>) = (Vec::new(), Vec::new());
            let mut coming = order.into_iter();
            for (step, ring) in reads.into_iter().chain([(40, false), (0, false)]) {
                // One transaction a row, named by its id: those not ended are running.
                let running = |ended: &[i64]| -> Holders {
                    (1..=40u64).filter(|id| !ended.contains(&(*id as i64))).collect()
                };
                let (before, look) = (running(&ended), tracker.begin_look());
                let position = tracker.position(0);
                let fresh = ended.iter().copied().filter(|id| !lost.contains(id) && !position.covers(*id));
                let mut found: Vec<i64> = fresh.collect();
                if !ring {
                    found.sort_unstable();
                }
                // More end between the read and the question who runs; the ring brings some of them at once.
                let since = ended.len();
                ended.extend(coming.by_ref().take(step));
                let announced: Vec<i64> = ended[since..].iter().copied().filter(|id| ring && !lost.contains(id)).collect();
                let holders = running(&ended);
                tracker.dispatched(&rows(&announced), i64::MAX, || holders.clone(), 0, || u64::MAX);
                tracker.dispatched(&rows(&found), i64::MAX, || holders.clone(), 0, || u64::MAX);
                tracker.settle(look, &before);
                sent.extend(announced);
                sent.extend(found);
            }
            // Whoever ended since has been seen by nobody yet.
            for _ in 0..2 {
                let position = tracker.position(0);
                let found: Vec<i64> =
                    ended.iter().copied().filter(|id| !lost.contains(id) && !position.covers(*id)).collect();
                tracker.looked(&[]);
                tracker.dispatched(&rows(&found), i64::MAX, Holders::new, 0, || u64::MAX);
                sent.extend(found);
            }
            sent.sort_unstable();
            let all: Vec<i64> = (1..=40).filter(|id| !lost.contains(id)).collect();
            prop_assert_eq!(sent, all);
            tracker.looked(&[]);
            prop_assert_eq!(tracker.gaps(), 0);
        }
    }
}
