//! What the hub promises.

use super::session::{LATE_MAX, LEFT_MAX};
use super::*;

const DATABASE: u32 = 5;
const NOBODY: [Slot; 0] = [];
const NOTHING: [i64; 0] = [];

fn channel(name: &str) -> Channel {
    Channel::plain(name).unwrap()
}

fn channels(names: &[&str]) -> Vec<Channel> {
    names.iter().map(|name| channel(name)).collect()
}

fn notification(id: i64, name: &str) -> Notification {
    Notification { id, channel: channel(name), message: "{}".into() }
}

/// A hub with connection 0 of [`DATABASE`].
fn hub() -> Hub {
    let mut hub = Hub::default();
    hub.open(0, DATABASE);
    hub
}

fn dispatch(hub: &mut Hub, database: u32, id: i64, name: &str, now: Moment) -> Vec<Slot> {
    let mut receivers = Vec::new();
    hub.dispatch(database, &[notification(id, name)], now, &mut receivers);
    receivers.sort_unstable();
    receivers
}

/// A new subscription whose recoveries, if any, are numbered from `request`.
fn change(hub: &mut Hub, slot: Slot, names: &[&str], last: i64, request: u64, now: Moment) -> Change {
    let mut numbers = request..;
    hub.subscribe(slot, channels(names), last, || numbers.next().unwrap(), now)
}

/// A new subscription of connection 0 that asks for one recovery at most.
fn subscribe(hub: &mut Hub, names: &[&str], last: i64, request: u64, now: Moment) -> Option<Recovery> {
    let mut recoveries = change(hub, 0, names, last, request, now).recoveries;
    assert!(recoveries.len() <= 1);
    recoveries.pop()
}

fn asked(request: u64, names: &[&str], last: i64) -> Recovery {
    Recovery { request, channels: channels(names), last }
}

fn page(hub: &mut Hub, request: u64, rows: &[(i64, &str)], more: bool, now: Moment) -> Vec<i64> {
    let rows = rows.iter().map(|(id, name)| notification(*id, name)).collect();
    let (_, owed) = hub.recovered(request, rows, more, now).unwrap();
    owed.iter().map(|notification| notification.id).collect()
}

fn recovered(hub: &mut Hub, request: u64, rows: &[(i64, &str)], now: Moment) -> Vec<i64> {
    page(hub, request, rows, false, now)
}

#[test]
fn silent_until_recovered_then_live() {
    let mut hub = hub();
    let recovery = subscribe(&mut hub, &["a"], 7, 1, 0).unwrap();
    assert_eq!(recovery, asked(1, &["a"], 7));
    assert_eq!(dispatch(&mut hub, DATABASE, 8, "a", 0), NOBODY);
    assert_eq!(recovered(&mut hub, 1, &[(8, "a")], 0), [8]);
    assert_eq!(dispatch(&mut hub, DATABASE, 9, "a", 0), [0]);
    assert_eq!(dispatch(&mut hub, DATABASE, 10, "b", 0), NOBODY);
    assert_eq!(hub.sent(0), 2);
}

#[test]
fn the_same_channel_of_another_database_is_another_channel() {
    let mut hub = hub();
    hub.open(1, 6);
    subscribe(&mut hub, &["a"], 0, 1, 0);
    change(&mut hub, 1, &["a"], 0, 2, 0);
    recovered(&mut hub, 1, &[], 0);
    recovered(&mut hub, 2, &[], 0);
    assert_eq!(dispatch(&mut hub, DATABASE, 1, "a", 0), [0]);
    assert_eq!(dispatch(&mut hub, 6, 1, "a", 0), [1]);
}

#[test]
fn only_new_channels_are_recovered_and_the_others_go_on() {
    let mut hub = hub();
    subscribe(&mut hub, &["a"], 7, 1, 0);
    recovered(&mut hub, 1, &[], 0);
    assert_eq!(subscribe(&mut hub, &["a", "a"], 99, 2, 0), None);
    let recovery = subscribe(&mut hub, &["b", "a"], 99, 3, 0).unwrap();
    assert_eq!(recovery, asked(3, &["b"], 7));
    assert_eq!(dispatch(&mut hub, DATABASE, 8, "a", 0), [0]);
    assert_eq!(dispatch(&mut hub, DATABASE, 9, "b", 0), NOBODY);
    assert_eq!(recovered(&mut hub, 3, &[(8, "a"), (9, "b")], 0), [9]);
    assert_eq!(hub.subscribed(0), 2);
}

#[test]
fn an_answer_that_was_overtaken_counts_for_nothing() {
    let mut hub = hub();
    subscribe(&mut hub, &["a"], 7, 1, 0);
    assert_eq!(change(&mut hub, 0, &[], 7, 2, 0), Change { given_up: vec![1], recoveries: vec![] });
    subscribe(&mut hub, &["a"], 7, 3, 0);
    assert_eq!(hub.recovered(1, vec![notification(8, "a")], true, 0), None);
    assert_eq!(dispatch(&mut hub, DATABASE, 9, "a", 0), NOBODY);
    assert_eq!(recovered(&mut hub, 3, &[(8, "a"), (9, "a")], 0), [8, 9]);
}

#[test]
fn coming_back_to_a_channel_repeats_nothing_and_misses_nothing() {
    let mut hub = hub();
    subscribe(&mut hub, &["a", "b"], 5, 1, 0);
    recovered(&mut hub, 1, &[(8, "a")], 0);
    dispatch(&mut hub, DATABASE, 12, "b", 0);
    subscribe(&mut hub, &["b"], 5, 2, 0);
    assert_eq!(hub.subscribed(0), 1);
    assert_eq!(dispatch(&mut hub, DATABASE, 11, "a", 0), NOBODY, "a late one, below what was sent");
    let recovery = subscribe(&mut hub, &["a", "b"], 5, 3, 0).unwrap();
    assert_eq!(recovery, asked(3, &["a"], 5));
    assert_eq!(dispatch(&mut hub, DATABASE, 10, "a", 0), NOBODY);
    assert_eq!(dispatch(&mut hub, DATABASE, 13, "a", 0), NOBODY);
    assert_eq!(recovered(&mut hub, 3, &[(8, "a"), (11, "a"), (10, "a"), (13, "a")], 0), [11, 10, 13]);
    assert_eq!(dispatch(&mut hub, DATABASE, 9, "a", 0), [0]);
}

#[test]
fn the_position_follows_what_was_sent_ten_seconds_ago() {
    let mut hub = hub();
    subscribe(&mut hub, &["a"], 5, 1, 0);
    recovered(&mut hub, 1, &[], 0);
    dispatch(&mut hub, DATABASE, 20, "a", 100_000);
    dispatch(&mut hub, DATABASE, 30, "a", 109_999);
    let last = |hub: &mut Hub, name: &str, now| subscribe(hub, &["a", name], 99, now, now).unwrap().last;
    assert_eq!(last(&mut hub, "b", 109_999), 5);
    assert_eq!(last(&mut hub, "c", 119_998), 5, "30 was sent less than 10 s ago, 20 in the same stretch");
    assert_eq!(last(&mut hub, "d", 130_000), 30);
}

#[test]
fn a_position_of_zero_is_set_by_a_later_subscribe() {
    let mut hub = hub();
    assert_eq!(subscribe(&mut hub, &["a"], 0, 1, 0).unwrap().last, 0);
    assert_eq!(subscribe(&mut hub, &["b"], 9, 2, 0).unwrap().last, 9);
    assert_eq!(subscribe(&mut hub, &["c"], 4, 3, 0).unwrap().last, 9);
}

#[test]
fn what_is_remembered_of_left_channels_is_bounded() {
    let mut hub = hub();
    subscribe(&mut hub, &["a"], 5, 1, 0);
    recovered(&mut hub, 1, &[(50, "a")], 0);
    for n in 0..LEFT_MAX as u64 {
        let request = n + 2;
        subscribe(&mut hub, &[&format!("c{n}")], 5, request, 0);
        recovered(&mut hub, request, &[], 0);
    }
    assert_eq!(hub.session(0).unwrap().subscriptions.len(), LEFT_MAX + 1);
    let recovery = subscribe(&mut hub, &["d"], 5, 1_000, 0).unwrap();
    assert_eq!(recovery.last, 5, "the limit is passed by this very call");
    assert_eq!(hub.session(0).unwrap().subscriptions.len(), 1);
    assert_eq!(subscribe(&mut hub, &["a"], 5, 1_001, 0).unwrap().last, 50);
}

#[test]
fn closing_leaves_nothing_behind() {
    let mut hub = hub();
    hub.open(1, DATABASE);
    subscribe(&mut hub, &["a", "b"], 0, 1, 0);
    change(&mut hub, 1, &["b", "c"], 0, 2, 0);
    recovered(&mut hub, 2, &[], 0);
    assert_eq!(hub.close(0), [1]);
    assert_eq!(hub.recovered(1, vec![notification(1, "a")], false, 0), None);
    assert_eq!(dispatch(&mut hub, DATABASE, 2, "b", 0), [1]);
    assert_eq!(hub.close(1), [] as [u64; 0]);
    assert!(hub.index.is_empty() && hub.requests.is_empty());
    assert_eq!(hub.free.len(), hub.channels.len());
    hub.open(0, DATABASE);
    assert_eq!(subscribe(&mut hub, &["z"], 0, 3, 0).unwrap().channels, channels(&["z"]));
    assert_eq!(hub.channels.len(), 3, "entries are used again");
}

#[test]
fn pages_go_out_as_they_come_and_the_last_makes_live() {
    let mut hub = hub();
    subscribe(&mut hub, &["live"], 5, 1, 0);
    recovered(&mut hub, 1, &[], 0);
    subscribe(&mut hub, &["live", "a"], 5, 2, 0);
    assert_eq!(page(&mut hub, 2, &[(6, "a"), (7, "live"), (9, "a")], true, 0), [6, 9], "7 came live");
    assert_eq!(dispatch(&mut hub, DATABASE, 10, "a", 0), NOBODY);
    assert_eq!(dispatch(&mut hub, DATABASE, 11, "live", 0), [0]);
    assert_eq!(page(&mut hub, 2, &[], true, 0), NOTHING);
    assert_eq!(dispatch(&mut hub, DATABASE, 12, "a", 0), NOBODY);
    assert_eq!(page(&mut hub, 2, &[(8, "a"), (10, "a"), (12, "a")], false, 0), [8, 10, 12]);
    assert_eq!(dispatch(&mut hub, DATABASE, 13, "a", 0), [0]);
    assert_eq!(hub.recovered(2, vec![notification(14, "a")], false, 0), None, "there is nothing after the last page");
    assert_eq!(hub.sent(0), 7);
}

#[test]
fn what_was_had_before_is_left_out_of_every_page() {
    let mut hub = hub();
    subscribe(&mut hub, &["a"], 5, 1, 0);
    recovered(&mut hub, 1, &[(8, "a"), (20, "a")], 0);
    subscribe(&mut hub, &[], 5, 2, 0);
    dispatch(&mut hub, DATABASE, 11, "a", 0);
    subscribe(&mut hub, &["a"], 5, 3, 0);
    assert_eq!(page(&mut hub, 3, &[(8, "a"), (11, "a")], true, 0), [11]);
    dispatch(&mut hub, DATABASE, 12, "a", 0);
    assert_eq!(page(&mut hub, 3, &[(20, "a"), (21, "a"), (12, "a")], true, 0), [21, 12]);
    assert_eq!(page(&mut hub, 3, &[(8, "a"), (22, "a")], false, 0), [22]);
}

#[test]
fn a_channel_left_amid_its_replay_goes_on_where_it_was_broken_off() {
    let mut hub = hub();
    subscribe(&mut hub, &["a", "b"], 5, 1, 0);
    assert_eq!(page(&mut hub, 1, &[(6, "a"), (9, "b"), (8, "a")], true, 0), [6, 9, 8]);
    assert_eq!(subscribe(&mut hub, &["b"], 5, 2, 0), None);
    assert_eq!(page(&mut hub, 1, &[(10, "a"), (12, "b")], true, 0), [12]);
    let Change { given_up, recoveries } = change(&mut hub, 0, &["a", "b", "c"], 5, 3, 0);
    assert_eq!((given_up, recoveries), (vec![], vec![asked(4, &["c"], 5), asked(3, &["a"], 8)]));
    assert_eq!(change(&mut hub, 0, &["c"], 5, 5, 0).given_up.len(), 2, "nobody waits for a and b");
    let Change { recoveries, .. } = change(&mut hub, 0, &["a", "c"], 5, 6, 0);
    assert_eq!(recoveries, [asked(6, &["a"], 8)], "no page had come since");
    assert_eq!(recovered(&mut hub, 6, &[(10, "a"), (7, "a")], 0), [10, 7]);
    assert_eq!(dispatch(&mut hub, DATABASE, 13, "a", 0), [0]);
    assert_eq!(hub.close(0), [4]);
    assert!(hub.index.is_empty() && hub.requests.is_empty());
}

#[test]
fn too_many_late_ones_are_rather_sent_twice_than_never() {
    let mut hub = hub();
    subscribe(&mut hub, &["a"], 5, 1, 0);
    recovered(&mut hub, 1, &[(9, "a"), (1_000, "a")], 0);
    subscribe(&mut hub, &[], 5, 2, 0);
    let late: Vec<i64> = (10..=10 + LATE_MAX as i64).collect();
    for id in &late {
        dispatch(&mut hub, DATABASE, *id, "a", 0);
    }
    subscribe(&mut hub, &["a"], 5, 3, 0);
    let rows: Vec<(i64, &str)> = std::iter::once(9).chain(late.iter().copied()).map(|id| (id, "a")).collect();
    assert_eq!(recovered(&mut hub, 3, &rows, 0), late);
}

#[test]
fn the_position_follows_the_pages_of_a_replay() {
    let mut hub = hub();
    subscribe(&mut hub, &["a"], 5, 1, 0);
    page(&mut hub, 1, &[(50, "a")], true, 100_000);
    page(&mut hub, 1, &[(60, "a")], true, 115_000);
    assert_eq!(subscribe(&mut hub, &["a", "b"], 5, 2, 126_000).unwrap().last, 50);
    assert_eq!(subscribe(&mut hub, &["a", "b", "c"], 5, 3, 150_000).unwrap().last, 60);
    assert_eq!(recovered(&mut hub, 1, &[(70, "a")], 150_000), [70]);
}
