//! What the hub promises.

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

fn recovered(hub: &mut Hub, request: u64, rows: &[(i64, &str)], now: Moment) -> Vec<i64> {
    let rows = rows.iter().map(|(id, name)| notification(*id, name)).collect();
    let (_, owed) = hub.recovered(request, rows, now).unwrap();
    owed.iter().map(|notification| notification.id).collect()
}

#[test]
fn silent_until_recovered_then_live() {
    let mut hub = hub();
    let recovery = hub.subscribe(0, channels(&["a"]), 7, 1, 0).unwrap();
    assert_eq!(recovery, Recovery { channels: channels(&["a"]), last: 7 });
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
    hub.subscribe(0, channels(&["a"]), 0, 1, 0);
    hub.subscribe(1, channels(&["a"]), 0, 2, 0);
    recovered(&mut hub, 1, &[], 0);
    recovered(&mut hub, 2, &[], 0);
    assert_eq!(dispatch(&mut hub, DATABASE, 1, "a", 0), [0]);
    assert_eq!(dispatch(&mut hub, 6, 1, "a", 0), [1]);
}

#[test]
fn only_new_channels_are_recovered_and_the_others_go_on() {
    let mut hub = hub();
    hub.subscribe(0, channels(&["a"]), 7, 1, 0);
    recovered(&mut hub, 1, &[], 0);
    assert_eq!(hub.subscribe(0, channels(&["a", "a"]), 99, 2, 0), None);
    let recovery = hub.subscribe(0, channels(&["b", "a"]), 99, 3, 0).unwrap();
    assert_eq!(recovery, Recovery { channels: channels(&["b"]), last: 7 });
    assert_eq!(dispatch(&mut hub, DATABASE, 8, "a", 0), [0]);
    assert_eq!(dispatch(&mut hub, DATABASE, 9, "b", 0), NOBODY);
    assert_eq!(recovered(&mut hub, 3, &[(8, "a"), (9, "b")], 0), [9]);
    assert_eq!(hub.subscribed(0), 2);
}

#[test]
fn an_answer_that_was_overtaken_counts_for_nothing() {
    let mut hub = hub();
    hub.subscribe(0, channels(&["a"]), 7, 1, 0);
    hub.subscribe(0, channels(&[]), 7, 2, 0);
    hub.subscribe(0, channels(&["a"]), 7, 3, 0);
    assert_eq!(recovered(&mut hub, 1, &[(8, "a")], 0), NOTHING);
    assert_eq!(dispatch(&mut hub, DATABASE, 9, "a", 0), NOBODY);
    assert_eq!(recovered(&mut hub, 3, &[(8, "a"), (9, "a")], 0), [8, 9]);
}

#[test]
fn coming_back_to_a_channel_repeats_nothing_and_misses_nothing() {
    let mut hub = hub();
    hub.subscribe(0, channels(&["a", "b"]), 5, 1, 0);
    recovered(&mut hub, 1, &[(8, "a")], 0);
    dispatch(&mut hub, DATABASE, 12, "b", 0);
    hub.subscribe(0, channels(&["b"]), 5, 2, 0);
    assert_eq!(hub.subscribed(0), 1);
    assert_eq!(dispatch(&mut hub, DATABASE, 11, "a", 0), NOBODY, "a late one, below what was sent");
    let recovery = hub.subscribe(0, channels(&["a", "b"]), 5, 3, 0).unwrap();
    assert_eq!(recovery, Recovery { channels: channels(&["a"]), last: 5 });
    assert_eq!(dispatch(&mut hub, DATABASE, 10, "a", 0), NOBODY);
    assert_eq!(dispatch(&mut hub, DATABASE, 13, "a", 0), NOBODY);
    assert_eq!(recovered(&mut hub, 3, &[(8, "a"), (11, "a"), (10, "a"), (13, "a")], 0), [11, 10, 13]);
    assert_eq!(dispatch(&mut hub, DATABASE, 9, "a", 0), [0]);
}

#[test]
fn the_position_follows_what_was_sent_ten_seconds_ago() {
    let mut hub = hub();
    hub.subscribe(0, channels(&["a"]), 5, 1, 0);
    recovered(&mut hub, 1, &[], 0);
    dispatch(&mut hub, DATABASE, 20, "a", 100_000);
    dispatch(&mut hub, DATABASE, 30, "a", 109_999);
    let last = |hub: &mut Hub, name: &str, now| hub.subscribe(0, channels(&["a", name]), 99, now, now).unwrap().last;
    assert_eq!(last(&mut hub, "b", 109_999), 5);
    assert_eq!(last(&mut hub, "c", 119_998), 5, "30 was sent less than 10 s ago, 20 in the same stretch");
    assert_eq!(last(&mut hub, "d", 130_000), 30);
}

#[test]
fn a_position_of_zero_is_set_by_a_later_subscribe() {
    let mut hub = hub();
    assert_eq!(hub.subscribe(0, channels(&["a"]), 0, 1, 0).unwrap().last, 0);
    assert_eq!(hub.subscribe(0, channels(&["b"]), 9, 2, 0).unwrap().last, 9);
    assert_eq!(hub.subscribe(0, channels(&["c"]), 4, 3, 0).unwrap().last, 9);
}

#[test]
fn what_is_remembered_of_left_channels_is_bounded() {
    let mut hub = hub();
    hub.subscribe(0, channels(&["a"]), 5, 1, 0);
    recovered(&mut hub, 1, &[(50, "a")], 0);
    for n in 0..LEFT_MAX as u64 {
        let request = n + 2;
        hub.subscribe(0, channels(&[&format!("c{n}")]), 5, request, 0);
        recovered(&mut hub, request, &[], 0);
    }
    assert_eq!(hub.session(0).unwrap().subscriptions.len(), LEFT_MAX + 1);
    let recovery = hub.subscribe(0, channels(&["d"]), 5, 1_000, 0).unwrap();
    assert_eq!(recovery.last, 5, "the limit is passed by this very call");
    assert_eq!(hub.session(0).unwrap().subscriptions.len(), 1);
    assert_eq!(hub.subscribe(0, channels(&["a"]), 5, 1_001, 0).unwrap().last, 50);
}

#[test]
fn closing_leaves_nothing_behind() {
    let mut hub = hub();
    hub.open(1, DATABASE);
    hub.subscribe(0, channels(&["a", "b"]), 0, 1, 0);
    hub.subscribe(1, channels(&["b", "c"]), 0, 2, 0);
    recovered(&mut hub, 2, &[], 0);
    assert_eq!(hub.close(0), [1]);
    assert_eq!(hub.recovered(1, vec![notification(1, "a")], 0), None);
    assert_eq!(dispatch(&mut hub, DATABASE, 2, "b", 0), [1]);
    assert_eq!(hub.close(1), [] as [u64; 0]);
    assert!(hub.index.is_empty() && hub.requests.is_empty());
    assert_eq!(hub.free.len(), hub.channels.len());
    hub.open(0, DATABASE);
    assert_eq!(hub.subscribe(0, channels(&["z"]), 0, 3, 0).unwrap().channels, channels(&["z"]));
    assert_eq!(hub.channels.len(), 3, "entries are used again");
}
