//! The checker can fail: a ledger with one fault each, and the clean one beside it.

use super::check::{Past, Promise, Report, check};
use super::ledger::{Entry, Key, Ledger, NEVER, Outcome, Row, Sent};
use super::stage::Absence;
use super::story::{Receipt, Story, Visit};

/// Transactions of two messages each on channels 0 and 1 of database 0, committed one after another: transaction n is
/// issued at 100 n + 100 and returns 50 later; its messages have ids 2 n + 1 and 2 n + 2.
fn entries(count: u32) -> Vec<Entry> {
    let entry = |txn: u32| Entry {
        txn,
        database: 0,
        outcome: Outcome::Committed,
        issued: u64::from(txn) * 100 + 100,
        returned: u64::from(txn) * 100 + 150,
        sent: Box::new([Sent::on(0), Sent::on(1)]),
        is_prepared: false,
        how: "test",
    };
    (0..count).map(entry).collect()
}

fn key(message: usize) -> Key {
    Key { txn: (message / 2) as u32, seq: (message % 2) as u32 }
}

fn table(messages: impl IntoIterator<Item = usize>) -> Vec<Row> {
    messages.into_iter().map(|m| Row { key: key(m), channel: (m % 2) as u8, id: m as i64 + 1 }).collect()
}

fn visit(first: usize, last: i64) -> Visit {
    Visit { first, last, last_was_greatest: true, live_from: 0 }
}

/// A client of both channels that received these messages in one connection.
fn story(messages: &[usize]) -> Story {
    let mut story = Story::new("client".into(), 0, vec![0, 1]);
    story.owed_from = 0;
    story.visits.push(visit(0, 0));
    story.receipts = messages.iter().map(|m| Receipt { id: *m as i64 + 1, key: key(*m), at: 0 }).collect();
    story
}

fn ledger(entries: Vec<Entry>) -> Ledger {
    let rows = 0..entries.len() * 2;
    let kept = rows.filter(|m| {
        let entry = &entries[m / 2];
        entry.outcome == Outcome::Committed && entry.sent[m % 2].is_kept()
    });
    let rows = table(kept);
    let (ledger, complaints) = Ledger::new(entries, vec![rows]);
    assert!(complaints.is_empty(), "{complaints:?}");
    ledger
}

/// Exactly this fault, once.
fn only(report: &Report, promise: Promise) {
    assert_eq!(report.count(promise), 1, "{report}");
    assert_eq!(report.to_string().matches("broken").count(), 1, "{report}");
}

fn restarts() -> Past {
    Past::Restarts(Vec::new())
}

fn checked(entries: Vec<Entry>, stories: &[Story]) -> Report {
    check(&ledger(entries), stories, &Past::Quiet)
}

#[test]
fn what_came_right_is_clean() {
    let report = checked(entries(3), &[story(&[0, 1, 2, 3, 4, 5]), story(&[0, 1, 2, 3, 4, 5])]);
    assert!(report.is_clean(), "{report}");
    assert_eq!((report.owed, report.receipts, report.live), (12, 12, 12));
}

#[test]
fn a_lost_message_is_reported() {
    only(&checked(entries(3), &[story(&[0, 1, 3, 4, 5])]), Promise::Lost);
}

#[test]
fn what_was_committed_before_the_first_subscription_is_not_owed() {
    let mut story = story(&[2, 3, 4, 5]);
    story.owed_from = 120;
    assert!(checked(entries(3), &[story]).is_clean());
}

#[test]
fn a_message_twice_in_one_connection_is_reported() {
    only(&checked(entries(3), &[story(&[0, 1, 2, 3, 3, 4, 5])]), Promise::Doubled);
    let allowed = check(&ledger(entries(3)), &[story(&[0, 1, 2, 3, 3, 4, 5])], &restarts());
    only(&allowed, Promise::Doubled);
}

#[test]
fn what_the_end_of_a_worker_did_is_told_apart() {
    let away = |database: u8| Past::Restarts(vec![Absence { database, from: 250, to: 320 }]);
    let ledger = ledger(entries(3));
    let doubled = [story(&[0, 1, 2, 3, 3, 4, 5])];
    only(&check(&ledger, &doubled, &away(0)), Promise::DoubledByWorker);
    only(&check(&ledger, &doubled, &away(1)), Promise::Doubled);
    let swapped = [story(&[0, 1, 4, 5, 2, 3])];
    assert_eq!(check(&ledger, &swapped, &away(0)).count(Promise::AcrossWorker), 2);
    assert_eq!(check(&ledger, &swapped, &away(1)).count(Promise::AcrossTransactions), 2);
}

#[test]
fn across_a_restart_an_id_drawn_in_an_earlier_transaction_is_not_owed() {
    let mut drawn_before = entries(3);
    drawn_before[1].sent[0].draw_before();
    let (ledger, stories) = (ledger(drawn_before), [story(&[0, 1, 3, 4, 5])]);
    only(&check(&ledger, &stories, &Past::Quiet), Promise::Lost);
    let report = check(&ledger, &stories, &restarts());
    assert!(report.is_clean() && report.not_owed == 1, "{report}");
}

#[test]
fn a_message_again_after_a_reconnect_is_reported_where_it_is_not_allowed() {
    let mut again = story(&[0, 1, 2, 3, 3, 4, 5]);
    again.visits.push(Visit { live_from: 300, ..visit(4, 4) });
    only(&checked(entries(3), std::slice::from_ref(&again)), Promise::Repeated);
    let allowed = check(&ledger(entries(3)), std::slice::from_ref(&again), &restarts());
    assert!(allowed.is_clean());
    assert_eq!(allowed.repeats_allowed, 1);
    again.visits[1].last_was_greatest = false;
    assert!(checked(entries(3), &[again]).is_clean());
}

#[test]
fn a_swap_within_a_transaction_is_reported() {
    only(&checked(entries(3), &[story(&[0, 1, 3, 2, 4, 5])]), Promise::WithinTransaction);
    let mut replayed = story(&[0, 1, 3, 2, 4, 5]);
    replayed.visits[0].live_from = NEVER;
    only(&checked(entries(3), &[replayed]), Promise::WithinTransaction);
}

#[test]
fn a_swap_of_transactions_is_reported_when_one_was_committed_before_the_other_began_to() {
    let swapped = [0, 1, 4, 5, 2, 3];
    let report = checked(entries(3), &[story(&swapped)]);
    assert_eq!(report.count(Promise::AcrossTransactions), 2, "{report}");
    let mut overlapping = entries(3);
    overlapping[1].returned = 301;
    assert!(checked(overlapping, &[story(&swapped)]).is_clean(), "commits that overlap have no order");
    let mut unanswered = entries(3);
    (unanswered[1].outcome, unanswered[1].returned) = (Outcome::Unknown, NEVER);
    let (ledger, _) = Ledger::new(unanswered, vec![table(0..6)]);
    assert!(check(&ledger, &[story(&swapped)], &restarts()).is_clean());
}

#[test]
fn a_swap_in_a_replay_is_none_but_far_swaps_of_live_messages_are() {
    let mut replayed = story(&[0, 1, 4, 5, 2, 3]);
    replayed.visits[0].live_from = 250;
    assert!(checked(entries(3), &[replayed]).is_clean());
    let count = 1000;
    let mut far: Vec<usize> = (1..count).collect();
    far.push(0);
    let report = checked(entries(count as u32 / 2), &[story(&far)]);
    assert!(report.count(Promise::AcrossTransactions) == 1, "{report}");
}

#[test]
fn two_clients_that_saw_two_orders_are_reported() {
    let mut overlapping = entries(2);
    overlapping[1].issued = 110;
    let report = checked(overlapping, &[story(&[0, 1, 2, 3]), story(&[2, 0, 1, 3])]);
    only(&report, Promise::SameForAll);
}

#[test]
fn what_was_rolled_back_is_reported_when_it_comes() {
    let mut rolled_back = entries(3);
    rolled_back[1].outcome = Outcome::RolledBack;
    assert_eq!(checked(rolled_back.clone(), &[story(&[0, 1, 2, 3, 4, 5])]).count(Promise::RolledBack), 2);
    assert!(checked(rolled_back, &[story(&[0, 1, 4, 5])]).is_clean());
    let mut taken_back = entries(3);
    taken_back[1].sent[1].take_back();
    only(&checked(taken_back.clone(), &[story(&[0, 1, 2, 3, 4, 5])]), Promise::RolledBack);
    assert!(checked(taken_back, &[story(&[0, 1, 2, 4, 5])]).is_clean());
}

#[test]
fn what_is_foreign_is_reported() {
    let mut elsewhere = entries(3);
    elsewhere[1].database = 1;
    let tables = vec![table([0, 1, 4, 5]), table([2, 3])];
    let (ledger, complaints) = Ledger::new(elsewhere, tables);
    assert!(complaints.is_empty(), "{complaints:?}");
    only(&check(&ledger, &[story(&[0, 1, 2, 4, 5])], &Past::Quiet), Promise::Foreign);
    let mut one_channel = story(&[0, 2, 3, 4]);
    one_channel.channels = vec![0];
    only(&checked(entries(3), &[one_channel]), Promise::Foreign);
    let mut unknown = story(&[0, 1, 2, 3, 4, 5]);
    unknown.receipts.push(Receipt { id: 99, key: key(99), at: 0 });
    only(&checked(entries(3), &[unknown]), Promise::Foreign);
}

#[test]
fn the_table_settles_unknown_outcomes_and_contradicts_wrong_ones() {
    let mut unknown = entries(2);
    unknown[0].outcome = Outcome::Unknown;
    unknown[1].outcome = Outcome::Unknown;
    let (ledger, complaints) = Ledger::new(unknown, vec![table(0..2)]);
    assert!(complaints.is_empty(), "{complaints:?}");
    let outcomes: Vec<Outcome> = ledger.entries().iter().map(|entry| entry.outcome).collect();
    assert_eq!(outcomes, [Outcome::Committed, Outcome::RolledBack]);
    assert_eq!(Ledger::new(entries(2), vec![table(0..3)]).1.len(), 1, "half a transaction");
    assert_eq!(Ledger::new(entries(1), vec![table(0..4)]).1.len(), 2, "rows of no transaction");
}
