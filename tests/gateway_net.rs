//! The gateway's network side alone: real sockets, a real websocket client, and a database worker played by the test.
//! Each test is a promise. Where one says that something is not sent, something that is sent follows and comes first.

mod gateway;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use gateway::*;
use imbus::core::link::{Command, Connection, Event, VERSION};
use imbus::core::notification::Notification;
use imbus::core::position::Position;
use imbus::core::settings::Settings;
use imbus::core::token::{Claims, Grant, sign};
use imbus::net::bridge::{LogLevel, ToMain, ToNet};
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};
use tungstenite::Message;
use tungstenite::protocol::frame::Frame;
use tungstenite::protocol::frame::coding::{Data, OpCode};

// ---------------------------------------------------------------------------------------------------------------------
// Delivery

#[test]
fn a_dispatch_reaches_its_subscribers_and_no_other_database() {
    let gateway = Gateway::new();
    let (mut demo, mut other) = (gateway.worker(), gateway.worker_of(OTHER).0);
    let mut mine: Vec<Client> = (0..3).map(|_| gateway.subscribed(&mut demo, r#"["a",["res.partner",42]]"#)).collect();
    let mut theirs = gateway.client_of(&token(OTHER, "other"));
    theirs.subscribe(r#"["a"]"#, 0);
    other.answer(&[]);
    demo.dispatch(&notifications(&[(1, "b"), (2, "a"), (3, r#"["res.partner",42]"#)]));
    other.dispatch(&notifications(&[(4, "a")]));
    for client in &mut mine {
        assert_eq!((client.ids(), client.ids()), (vec![2], vec![3]));
    }
    assert_eq!(theirs.ids(), [4], "nothing of the other database before it");
}

#[test]
fn nothing_is_sent_before_the_recovery_and_nothing_is_lost_or_doubled_around_it() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    for _ in 0..2 {
        let mut client = gateway.client();
        client.subscribe(r#"["a"]"#, 7);
        let (request, channels, last) = worker.recover();
        assert_eq!((channels, last), (vec![channel("a")], 7));
        worker.dispatch(&notifications(&[(9, "a"), (10, "a")]));
        worker.recovered(request, &notifications(&[(8, "a"), (6, "a"), (9, "a"), (10, "a")]), false);
        worker.dispatch(&notifications(&[(11, "a")]));
        assert_eq!((client.ids(), client.ids(), client.ids()), (vec![8], vec![6, 9, 10], vec![11]));
    }
}

#[test]
fn a_repeated_subscribe_recovers_only_what_is_new_and_repeats_nothing() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let mut client = gateway.client();
    client.subscribe(r#"["a","a"]"#, 5);
    worker.answer(&notifications(&[(6, "a")]));
    assert_eq!(client.ids(), [6]);
    client.subscribe(r#"["a"]"#, 1);
    client.subscribe(r#"["b","a"]"#, 1);
    let (request, channels, last) = worker.recover();
    assert_eq!((channels, last), (vec![channel("b")], 5), "the unchanged subscribe asked for nothing");
    worker.dispatch(&notifications(&[(7, "a"), (8, "b")]));
    worker.recovered(request, &notifications(&[(6, "a"), (8, "b")]), false);
    assert_eq!((client.ids(), client.ids()), (vec![8], vec![7]), "what is live waits for the replay");
    client.subscribe(r#"["b"]"#, 1);
    client.subscribe(r#"["b","a"]"#, 1);
    worker.answer(&notifications(&[(6, "a"), (7, "a"), (9, "a")]));
    assert_eq!(client.ids(), [9], "6 and 7 were sent on this socket before");
    client.subscribe("[]", 1);
    client.subscribe(r#"["c"]"#, 1);
    worker.answer(&[]);
    worker.dispatch(&notifications(&[(10, "a"), (11, "c")]));
    assert_eq!(client.ids(), [11]);
}

#[test]
fn ids_ascend_inside_a_frame_and_order_is_never_changed() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let mut client = gateway.subscribed(&mut worker, r#"["a","b"]"#);
    worker.dispatch(&notifications(&[(3, "a"), (5, "a"), (4, "a"), (6, "b"), (7, "a")]));
    let frames: Vec<_> = (0..4).map(|_| client.ids()).collect();
    assert_eq!(frames, [vec![3, 5], vec![4], vec![6], vec![7]]);
}

#[test]
fn a_lost_link_goes_on_where_it_was_and_recoveries_wait_for_it() {
    let mut gateway = Gateway::new();
    let mut worker = gateway.worker();
    assert_eq!(gateway.next(), ToMain::LinkUp { database: DEMO });
    let mut client = gateway.subscribed(&mut worker, r#"["a"]"#);
    worker.dispatch(&notifications(&[(7, "a")]));
    assert_eq!(client.ids(), [7]);
    client.subscribe(r#"["a","b"]"#, 0);
    worker.recover();
    drop(worker);
    assert_eq!(gateway.next(), ToMain::LinkDown { database: DEMO });
    let mut late = gateway.client();
    late.subscribe(r#"["a"]"#, 6);
    let (mut worker, position) = gateway.worker_of(DEMO);
    assert_eq!(position, Some(Position { table: 1, high: 7, ..Position::default() }));
    let mut asked = [worker.recover(), worker.recover()];
    asked.sort_by_key(|(_, _, last)| *last);
    assert_eq!(
        asked.each_ref().map(|(_, channels, last)| (channels.clone(), *last)),
        [(vec![channel("b")], 0), (vec![channel("a")], 6)]
    );
    worker.dispatch(&notifications(&[(8, "a")]));
    worker.recovered(asked[0].0, &notifications(&[(3, "b")]), false);
    worker.recovered(asked[1].0, &notifications(&[(7, "a"), (8, "a")]), false);
    assert_eq!((client.ids(), client.ids()), (vec![3], vec![8]));
    assert_eq!(late.ids(), [7, 8]);
}

#[test]
fn a_second_worker_of_a_database_replaces_the_first() {
    let mut gateway = Gateway::new();
    let mut first = gateway.worker();
    let mut second = gateway.worker();
    assert_eq!(first.next(), None);
    let up = ToMain::LinkUp { database: DEMO };
    let said = [gateway.next(), gateway.next(), gateway.next()];
    assert_eq!(said, [up.clone(), ToMain::LinkDown { database: DEMO }, up]);
    let mut client = gateway.subscribed(&mut second, r#"["a"]"#);
    second.dispatch(&notifications(&[(1, "a")]));
    assert_eq!(client.ids(), [1]);
}

#[test]
fn links_that_speak_something_else_are_hung_up_on() {
    let mut gateway = Gateway::new();
    let mut old = Worker::new(gateway.link());
    old.send(&Event::Hello { version: VERSION + 1, database: DEMO, name: "demo".to_owned() });
    assert_eq!(old.next(), None);
    gateway.wait_log(LogLevel::Warning, "version");
    let mut rude = Worker::new(gateway.link());
    rude.dispatch(&[]);
    assert_eq!(rude.next(), None);
    for bytes in [&[0xff; 8][..], &[1, 0, 0, 0, 250]] {
        let mut garbage = Worker::new(gateway.link());
        garbage.stream.write_all(bytes).unwrap();
        assert_eq!(garbage.next(), None);
    }
    gateway.wait_log(LogLevel::Warning, "malformed");
    gateway.worker();
}

#[test]
fn the_link_socket_is_for_the_owner_only_and_goes_with_the_gateway() {
    let gateway = Gateway::new();
    let _ = gateway.worker();
    let path = gateway.folder.join("link");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let folder = gateway.folder.clone();
    gateway.net().send(ToNet::Stop);
    let start = Instant::now();
    while path.exists() {
        assert!(start.elapsed() < PATIENCE && folder.exists());
    }
}

#[test]
fn emits_reach_the_main_thread() {
    let mut gateway = Gateway::new();
    let mut worker = gateway.worker();
    assert_eq!(gateway.next(), ToMain::LinkUp { database: DEMO });
    worker.send(&Event::Emit { payloads: vec!["[]".to_owned()] });
    assert_eq!(gateway.next(), ToMain::Emit { payloads: vec!["[]".to_owned()] });
}

#[test]
fn an_inspector_sees_the_connections_of_all_reactors() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let mut clients: Vec<Client> = (0..5).map(|_| gateway.subscribed(&mut worker, r#"["a","b"]"#)).collect();
    worker.dispatch(&notifications(&[(1, "a"), (2, "a")]));
    clients.iter_mut().for_each(|client| assert_eq!(client.ids(), [1, 2]));
    assert_eq!(gateway.inspect(Some(OTHER)), []);
    let found = gateway.inspect(None);
    let mut ids: Vec<_> = found.iter().map(|connection| connection.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 5);
    for connection in found {
        assert_eq!((connection.database, connection.channels, connection.sent), (DEMO, 2, 2));
        assert_eq!((connection.user_agent.as_str(), connection.subject.as_deref()), ("test", Some("ann")));
        assert!(connection.address.starts_with("127.0.0.1:") && connection.queued == 0);
    }
    assert_eq!(gateway.inspect(Some(DEMO)).len(), 5);
}

// ---------------------------------------------------------------------------------------------------------------------
// Replays, page by page

/// With more in its outbound queue, a connection is asked no page for.
const DRAINED: usize = 64 * 1024;

/// What the kernel's buffers of one connection never hold.
const GIANT: usize = 32 << 20;

/// Notifications of one channel with these ids, together about `size` bytes long.
fn filled(ids: std::ops::Range<i64>, name: &str, size: usize) -> Vec<Notification> {
    let filler = "x".repeat(size / ids.clone().count());
    let message = |id| format!(r#"{{"type":"{filler}","payload":{id}}}"#).into();
    ids.map(|id| Notification { id, channel: channel(name), message: message(id) }).collect()
}

/// A client whose first page of a replay of "a" (ids 1 to 32, more to come) is more than it has read; and its request.
fn parked(gateway: &Gateway, worker: &mut Worker) -> (Client, u64) {
    let before = gateway.queued(DRAINED);
    let mut client = gateway.client();
    client.subscribe(r#"["a"]"#, 7);
    let (request, ..) = worker.recover();
    worker.recovered(request, &filled(1..33, "a", GIANT), true);
    let start = Instant::now();
    while gateway.queued(DRAINED) == before {
        assert!(start.elapsed() < PATIENCE, "the page is queued");
    }
    (client, request)
}

#[test]
fn pages_go_out_as_they_come_and_the_last_one_makes_live() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    for _ in 0..2 {
        let mut client = gateway.subscribed(&mut worker, r#"["live"]"#);
        client.subscribe(r#"["live","a"]"#, 0);
        let (request, channels, _) = worker.recover();
        assert_eq!(channels, [channel("a")]);
        worker.recovered(request, &notifications(&[(2, "a"), (3, "a"), (1, "a")]), true);
        assert_eq!((client.ids(), client.ids()), (vec![2, 3], vec![1]));
        worker.more(request);
        worker.dispatch(&notifications(&[(8, "a"), (9, "live")]));
        worker.recovered(request, &[], true);
        worker.more(request);
        worker.recovered(request, &notifications(&[(8, "a")]), true);
        worker.more(request);
        worker.dispatch(&notifications(&[(10, "a")]));
        worker.recovered(request, &notifications(&[(10, "a")]), false);
        worker.dispatch(&notifications(&[(11, "a"), (12, "live")]));
        let got: Vec<_> = (0..5).map(|_| client.ids()).collect();
        assert_eq!(got, [[8], [10], [9], [11], [12]], "what is live waits for the end, or its id would stand for all");
    }
}

#[test]
fn a_client_for_whom_too_much_is_live_during_its_replay_is_told_to_come_back() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let mut client = gateway.subscribed(&mut worker, r#"["live"]"#);
    client.subscribe(r#"["live","a"]"#, 0);
    worker.recover();
    let long = "x".repeat(600_000);
    let message = format!(r#"{{"type":"t","payload":"{long}"}}"#);
    for id in 1..=3 {
        worker.dispatch(&[Notification { message: message.clone().into(), ..notification(id, "live") }]);
    }
    client.closed_with(1012, "more is sent than can wait for the end of a replay");
}

#[test]
fn pages_that_nobody_asked_for_do_no_harm() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    for _ in 0..2 {
        let mut client = gateway.client();
        client.subscribe(r#"["a"]"#, 7);
        let (request, ..) = worker.recover();
        for id in 8..20 {
            worker.recovered(request, &notifications(&[(id, "a")]), true);
        }
        worker.recovered(request, &notifications(&[(20, "a")]), false);
        worker.recovered(request, &notifications(&[(21, "a")]), false);
        worker.recovered(u64::MAX, &notifications(&[(21, "a")]), true);
        worker.dispatch(&notifications(&[(22, "a")]));
        let got: Vec<_> = (8..=21).map(|_| client.ids()).collect();
        let expected: Vec<_> = (8..=20).chain([22]).map(|id| vec![id]).collect();
        assert_eq!(got, expected);
        while let Some(command) = worker.peek() {
            assert_eq!(command, Command::More { request });
        }
    }
}

#[test]
fn a_slow_reader_gets_its_replay_as_it_reads_and_little_of_it_waits_in_memory() {
    const PAGE: usize = 64 * 1024;
    const ROWS: i64 = 4;
    const PAGES: i64 = (GIANT / PAGE) as i64 + 50;
    let gateway = Gateway::with(Settings { send_queue_max: PAGE, ..settings() });
    let mut worker = gateway.worker();
    let mut client = gateway.client();
    client.subscribe(r#"["a"]"#, 7);
    let sent = Arc::new(AtomicI64::new(0));
    let counter = sent.clone();
    let answering = std::thread::spawn(move || {
        let (request, ..) = worker.recover();
        for page in 1..=PAGES {
            counter.store(page, Ordering::Relaxed);
            worker.recovered(request, &filled((page - 1) * ROWS + 1..page * ROWS + 1, "a", PAGE), page < PAGES);
            if page < PAGES {
                worker.more(request);
            }
        }
        worker.dispatch(&notifications(&[(PAGES * ROWS + 1, "a")]));
        worker
    });
    let is_waiting = || {
        let queued = gateway.inspect(None)[0].queued as usize;
        assert!(queued < DRAINED + PAGE + 1_000, "{queued} bytes wait");
        queued >= DRAINED
    };
    // The kernel takes in what it can; after that the queue stays as it is.
    let mut full = 0;
    gateway.wait_until("the queue stays full", |_| {
        full = if is_waiting() { full + 1 } else { 0 };
        full == 20
    });
    let held = sent.load(Ordering::Relaxed);
    assert!(held < PAGES - 50, "{held} pages, and nothing was read");
    let mut read = 0;
    while read <= PAGES * ROWS {
        for id in client.ids() {
            assert_eq!(id, read + 1);
            read = id;
        }
        if read % 64 == 0 {
            is_waiting();
        }
    }
    answering.join().unwrap();
    assert_eq!(gateway.inspect(None)[0].queued, 0);
    assert_eq!(gateway.net().counters().slow_consumers.load(Ordering::Relaxed), 0);
}

#[test]
fn five_slow_replays_keep_no_other_client_waiting() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let mut slow: Vec<_> = (0..5).map(|_| parked(&gateway, &mut worker)).collect();
    let mut quick = gateway.client();
    quick.subscribe(r#"["a"]"#, 7);
    worker.answer(&notifications(&[(8, "a")]));
    assert_eq!(quick.ids(), [8]);
    let (client, request) = &mut slow[3];
    (1..33).for_each(|id| assert_eq!(client.ids(), [id]));
    worker.more(*request);
    worker.recovered(*request, &notifications(&[(40, "a")]), false);
    assert_eq!(client.ids(), [40]);
}

#[test]
fn four_pages_at_once_are_asked_for_and_the_others_in_the_order_of_asking() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let (mut reader, parked) = parked(&gateway, &mut worker);
    let mut clients = Vec::new();
    let mut requests = Vec::new();
    for number in 0..6 {
        let mut client = gateway.client();
        client.subscribe(r#"["a"]"#, 10 + number);
        match number {
            0..4 => requests.push(worker.recover().0),
            _ => gateway.wait_until("it is asked for", |_| {
                // Twice, as the first may overtake the asking.
                let is_subscribed = |all: Vec<Connection>| all.iter().filter(|one| one.channels == 1).count();
                gateway.inspect(None);
                is_subscribed(gateway.inspect(None)) == clients.len() + 2
            }),
        }
        clients.push(client);
        if number == 4 {
            (1..33).for_each(|id| assert_eq!(reader.ids(), [id]));
            gateway.wait_until("all is read", |_| gateway.queued(0) == 0);
            gateway.inspect(None);
        }
    }
    assert_eq!(worker.peek(), None, "four are under way");
    worker.recovered(requests[2], &notifications(&[(20, "a")]), false);
    assert_eq!(worker.recover().2, 14);
    worker.recovered(requests[0], &notifications(&[(20, "a")]), true);
    worker.more(parked);
    worker.recovered(requests[1], &notifications(&[(20, "a")]), true);
    assert_eq!(worker.recover().2, 15);
    worker.recovered(parked, &[], false);
    worker.more(requests[0]);
    assert_eq!((clients[0].ids(), clients[1].ids(), clients[2].ids()), (vec![20], vec![20], vec![20]));
}

#[test]
fn a_replay_cut_off_by_the_loss_of_the_link_goes_on_after_its_last_page() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let (mut slow, parked) = parked(&gateway, &mut worker);
    let (mut early, mut amid) = (gateway.client(), gateway.client());
    early.subscribe(r#"["a"]"#, 5);
    worker.recover();
    amid.subscribe(r#"["a"]"#, 6);
    let (request, ..) = worker.recover();
    worker.recovered(request, &notifications(&[(30, "a"), (20, "a")]), true);
    worker.more(request);
    worker.recovered(request, &[], true);
    worker.more(request);
    drop(worker);
    let mut worker = gateway.worker();
    let (first, _, last) = worker.recover();
    assert_eq!(last, 5, "no page had come");
    assert_eq!(worker.recover(), (request, vec![channel("a")], 20));
    worker.dispatch(&notifications(&[(31, "a")]));
    worker.recovered(request, &notifications(&[(19, "a"), (31, "a")]), false);
    worker.recovered(first, &notifications(&[(30, "a"), (20, "a"), (19, "a"), (31, "a")]), false);
    worker.dispatch(&notifications(&[(32, "a")]));
    assert_eq!([amid.ids(), amid.ids(), amid.ids()], [vec![30], vec![20], vec![19, 31]]);
    assert_eq!([early.ids(), early.ids(), early.ids()], [vec![30], vec![20], vec![19, 31]]);
    assert_eq!((amid.ids(), early.ids()), (vec![32], vec![32]));
    assert_eq!(worker.peek(), None, "the third has not read its page yet");
    (1..33).for_each(|id| assert_eq!(slow.ids(), [id]));
    assert_eq!(worker.recover(), (parked, vec![channel("a")], 32));
    worker.recovered(parked, &notifications(&[(33, "a")]), false);
    assert_eq!(slow.ids(), [33]);
}

#[test]
fn a_replay_whose_client_is_gone_is_given_up_and_makes_room() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let (slow, parked) = parked(&gateway, &mut worker);
    drop(slow);
    assert_eq!(worker.next(), Some(Command::Forget { request: parked }));
    let mut clients = Vec::new();
    let mut requests = Vec::new();
    for _ in 0..4 {
        let mut client = gateway.client();
        client.subscribe(r#"["a"]"#, 7);
        requests.push(worker.recover().0);
        clients.push(client);
    }
    let mut fifth = gateway.client();
    fifth.subscribe(r#"["a"]"#, 8);
    drop(clients.remove(1));
    assert_eq!(worker.next(), Some(Command::Forget { request: requests[1] }));
    let (request, _, last) = worker.recover();
    assert_eq!(last, 8);
    worker.recovered(requests[1], &notifications(&[(9, "a")]), true);
    worker.recovered(request, &notifications(&[(9, "a")]), true);
    assert_eq!(fifth.ids(), [9]);
    worker.more(request);
    drop(fifth);
    assert_eq!(worker.next(), Some(Command::Forget { request }), "nothing more was asked for the one that is gone");
}

#[test]
fn a_replay_whose_channels_are_left_is_given_up_and_goes_on_when_they_are_back() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let mut client = gateway.client();
    client.subscribe(r#"["a","b"]"#, 7);
    let (request, ..) = worker.recover();
    worker.recovered(request, &notifications(&[(10, "b"), (9, "a")]), true);
    worker.more(request);
    assert_eq!((client.ids(), client.ids()), (vec![10], vec![9]));
    client.subscribe(r#"["b"]"#, 7);
    client.subscribe(r#"["c"]"#, 7);
    assert_eq!(worker.next(), Some(Command::Forget { request }));
    let (third, channels, last) = worker.recover();
    assert_eq!((channels, last), (vec![channel("c")], 7));
    worker.recovered(request, &notifications(&[(11, "a"), (12, "b")]), false);
    worker.recovered(third, &notifications(&[(8, "c")]), false);
    assert_eq!(client.ids(), [8]);
    client.subscribe(r#"["a","c"]"#, 7);
    let (fourth, channels, last) = worker.recover();
    assert_eq!((channels, last), (vec![channel("a")], 9), "a is not repeated");
    worker.recovered(fourth, &notifications(&[(11, "a")]), false);
    assert_eq!(client.ids(), [11]);
}

#[test]
fn the_replays_of_one_connection_come_one_after_the_other() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let mut client = gateway.client();
    client.subscribe(r#"["a"]"#, 7);
    let (first, ..) = worker.recover();
    client.subscribe(r#"["a","b"]"#, 7);
    client.subscribe(r#"["a","b","c"]"#, 7);
    gateway.wait_until("all is asked for", |net| net.counters().recoveries.load(Ordering::Relaxed) == 3);
    worker.recovered(first, &notifications(&[(8, "a")]), true);
    worker.more(first);
    worker.recovered(first, &[], false);
    for (name, id) in [("b", 9), ("c", 10)] {
        let (request, channels, last) = worker.recover();
        assert_eq!((channels, last), (vec![channel(name)], 7));
        worker.recovered(request, &notifications(&[(id, name)]), false);
    }
    worker.dispatch(&notifications(&[(11, "a"), (12, "c")]));
    assert_eq!([client.ids(), client.ids(), client.ids()], [[8], [9], [10]]);
    assert_eq!([client.ids(), client.ids()], [[11], [12]]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Who may come in

#[test]
fn without_a_valid_token_nobody_stays() {
    let gateway = Gateway::new();
    let expired = Claims { exp: unix() - 1, ..claims(DEMO, "demo", Grant::All) };
    for (bad, reason) in [
        (String::new(), "no token"),
        ("nonsense".to_owned(), "token"),
        (sign(&claims(DEMO, "demo", Grant::All), b"another secret").unwrap(), "token"),
        (sign(&expired, SECRET).unwrap(), "expired"),
        (token(7, "demo"), "database"),
        (token(DEMO, "other"), "database"),
    ] {
        let (code, text) = gateway.client_of(&bad).closed();
        assert!(code == 4401 && text.contains(reason), "{code} {text}");
    }
}

#[test]
fn a_token_is_found_in_header_and_cookie_too() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let token = token(DEMO, "demo");
    let (bearer, cookie) = (format!("bearer {token}"), format!("a=b; imbus_token={token}; c=d"));
    for headers in [[("Authorization", bearer.as_str())], [("Cookie", cookie.as_str())]] {
        let mut client = gateway.open("", &headers);
        client.subscribe(r#"["a"]"#, 0);
        worker.answer(&notifications(&[(1, "a")]));
        assert_eq!(client.ids(), [1]);
    }
}

#[test]
fn an_outdated_client_is_told_to_reload() {
    let gateway = Gateway::new();
    let token = token(DEMO, "demo");
    for version in ["", "version=17.0-3&", "version=18.0-1&"] {
        let mut client = gateway.open(&format!("?{version}token={token}"), &[("User-Agent", "test")]);
        client.closed_with(1000, "OUTDATED_VERSION");
    }
    let mut worker = gateway.worker();
    let mut box_without_agent = gateway.open(&format!("?token={token}"), &[]);
    box_without_agent.subscribe(r#"["a"]"#, 0);
    worker.answer(&notifications(&[(1, "a")]));
    assert_eq!(box_without_agent.ids(), [1]);
}

#[test]
fn a_channel_outside_the_claims_closes_with_4403() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let grant = Grant::Channels(vec![channel("a"), channel(r#"["res.partner",42]"#)]);
    let token = sign(&claims(DEMO, "demo", grant), SECRET).unwrap();
    let mut client = gateway.client_of(&token);
    client.subscribe(r#"["a",["res.partner",42]]"#, 0);
    worker.answer(&[]);
    client.subscribe(r#"["a",["res.partner",43]]"#, 0);
    let (code, reason) = client.closed();
    assert!(code == 4403 && reason.contains(r#"["res.partner",43]"#), "{code} {reason}");
    let mut client = gateway.client_of(&token);
    client.subscribe(&format!(r#"["{}"]"#, "x".repeat(500)), 0);
    let (code, reason) = client.closed();
    assert_eq!((code, reason.len()), (4403, 123));
}

#[test]
fn tokens_end_with_their_time_and_with_their_secret() {
    let gateway = Gateway::new();
    let short = Claims { exp: unix() + 1, ..claims(DEMO, "demo", Grant::All) };
    let mut client = gateway.client_of(&sign(&short, SECRET).unwrap());
    assert_eq!(client.closed().0, 4401);
    let mut client = gateway.client();
    gateway.wait_until("the connection opens", |net| net.counters().connections_open.load(Ordering::Relaxed) == 1);
    let same = Settings { max_connections: 5, ..settings() };
    gateway.net().send(ToNet::Settings(Arc::new(same)));
    gateway.net().send(ToNet::Settings(Arc::new(Settings { token_secret: b"new".to_vec(), ..settings() })));
    assert_eq!(client.closed().0, 4401);
}

#[test]
fn databases_come_and_go() {
    let mut gateway = Gateway::closed(settings(), Vec::new());
    gateway.wait_open();
    assert_eq!(gateway.client().closed().0, 1013);
    gateway.net().send(ToNet::Databases(Arc::new(databases())));
    let mut worker = gateway.worker();
    // Each reactor takes the list when it comes to it.
    let mut client = loop {
        let mut client = gateway.client();
        client.subscribe(r#"["a"]"#, 0);
        client.socket.get_mut().set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        if client.socket.read().is_err_and(|error| matches!(error, tungstenite::Error::Io(_))) {
            client.socket.get_mut().set_read_timeout(Some(PATIENCE)).unwrap();
            break client;
        }
    };
    worker.answer(&notifications(&[(1, "a")]));
    assert_eq!(client.ids(), [1]);
    worker.dispatch(&notifications(&[(2, "a")]));
    assert_eq!(client.ids(), [2]);
    gateway.net().send(ToNet::Databases(Arc::new(databases().split_off(1))));
    assert_eq!(client.closed().0, 1001);
    assert_eq!(gateway.client().closed().0, 1013);
    drop(worker);
    assert_eq!(gateway.worker_of(DEMO).1, None, "the position of a dropped extension is forgotten");
}

#[test]
fn a_foreign_origin_is_refused() {
    let gateway =
        Gateway::with(Settings { allowed_origins: vec!["https://shop.example.com".to_owned()], ..settings() });
    let ask = |origin: &str| {
        let host = format!("127.0.0.1:{}", gateway.port);
        let answer = gateway.http(&upgrade_request(&host, &[("Origin", origin)], "Connection: close, upgrade"));
        answer.lines().next().unwrap_or_default().to_owned()
    };
    let own = format!("http://127.0.0.1:{}", gateway.port);
    assert_eq!(ask(&own), "HTTP/1.1 101 Switching Protocols");
    assert_eq!(ask("https://shop.example.com"), "HTTP/1.1 101 Switching Protocols");
    for origin in ["https://evil.example", "null", "http://127.0.0.1:1", "http://127.0.0.1"] {
        assert_eq!(ask(origin), "HTTP/1.1 403 Forbidden");
    }
}

/// An upgrade without a token: when it succeeds, the gateway closes right after it.
fn upgrade_request(host: &str, headers: &[(&str, &str)], connection: &str) -> String {
    let mut request = format!(
        "GET /websocket HTTP/1.1\r\nHost: {host}\r\n{connection}\r\nUpgrade: WebSocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    );
    headers.iter().for_each(|(name, value)| request.push_str(&format!("{name}: {value}\r\n")));
    request + "\r\n"
}

#[test]
fn an_unfit_handshake_gets_an_http_error() {
    let gateway = Gateway::new();
    let own = format!("http://127.0.0.1:{}", gateway.port);
    let host = format!("127.0.0.1:{}", gateway.port);
    let good = upgrade_request(&host, &[("Origin", &own)], "Connection: Upgrade");
    assert!(gateway.http(&good).contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"));
    for (part, instead, status) in [
        ("Origin", "X-Origin", "400"),
        ("Connection: Upgrade", "Connection: keep-alive", "400"),
        ("Connection: Upgrade", "X-Connection: Upgrade", "400"),
        ("Upgrade: WebSocket", "Upgrade: h2c", "400"),
        ("Host: ", "X-Host: ", "400"),
        ("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZQ==", "400"),
        ("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZQ!!", "400"),
        ("Version: 13", "Version: 8", "426"),
        ("HTTP/1.1", "HTTP/1.0", "400"),
        ("GET ", "POST ", "405"),
        ("\r\n\r\n", "\r\nContent-Length: 1\r\n\r\nx", "400"),
    ] {
        assert!(good.contains(part));
        let bad = good.replacen(part, instead, 1);
        let mut tcp = gateway.tcp();
        tcp.write_all(bad.as_bytes()).unwrap();
        let mut head = [0; 12];
        tcp.read_exact(&mut head).unwrap();
        assert_eq!(std::str::from_utf8(&head).unwrap(), format!("HTTP/1.1 {status}"), "{bad}");
    }
    let rejected = gateway.net().counters().handshakes_rejected.load(Ordering::Relaxed);
    assert!(rejected >= 9, "{rejected}");
}

// ---------------------------------------------------------------------------------------------------------------------
// What clients do wrong

#[test]
fn messages_without_meaning_change_nothing() {
    let mut gateway = Gateway::new();
    let mut worker = gateway.worker();
    let mut client = gateway.subscribed(&mut worker, r#"["a"]"#);
    for text in [
        "nonsense",
        "[]",
        "{}",
        r#"{"event_name":"subscribe"}"#,
        r#"{"event_name":"update_presence","data":{"inactivity_period":0,"im_status_ids_by_model":{}}}"#,
        r#"{"event_name":"subscribe","data":{"channels":[42],"last":0}}"#,
        r#"{"event_name":"subscribe","data":{"channels":["b",""],"last":0}}"#,
        r#"{"event_name":"subscribe","data":{"channels":["b"]}}"#,
        r#"{"event_name":"subscribe","data":{"channels":["b"],"last":-1}}"#,
        r#"{"event_name":"subscribe","data":{"channels":["b"],"last":9223372036854775808}}"#,
    ] {
        client.say(text);
    }
    for bytes in [&[0][..], &[0xff, 0xfe]] {
        client.socket.send(Message::binary(bytes.to_vec())).unwrap();
    }
    client.socket.send(Message::binary(subscribe(r#"["a","c"]"#, 0).into_bytes())).unwrap();
    let (request, channels, _) = worker.recover();
    assert_eq!(channels, [channel("c")], "a binary message counts like a text");
    worker.recovered(request, &[], false);
    worker.dispatch(&notifications(&[(1, "b"), (2, "a")]));
    assert_eq!(client.ids(), [2]);
    gateway.wait_log(LogLevel::Debug, "ignored a message");
}

#[test]
fn a_mebibyte_is_taken_and_one_byte_more_is_not() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let mut client = gateway.client();
    let mut text = subscribe(r#"["a"]"#, 0);
    text.push_str(&" ".repeat((1 << 20) - text.len()));
    client.say(&text);
    worker.answer(&notifications(&[(1, "a")]));
    assert_eq!(client.ids(), [1]);
    client.say(&(text + " "));
    assert_eq!(client.closed().0, 1009);
    let mut client = gateway.client();
    for (first, opcode) in [(true, OpCode::Data(Data::Text)), (false, OpCode::Data(Data::Continue))] {
        let frame = Frame::message(vec![b' '; (1 << 19) + usize::from(!first)], opcode, false);
        client.socket.send(Message::Frame(frame)).unwrap();
    }
    assert_eq!(client.closed().0, 1009, "the sum of the fragments counts");
}

#[test]
fn broken_frames_and_broken_text_are_closed() {
    let gateway = Gateway::new();
    for (bytes, code) in [
        (&[0x81, 1, b'x'][..], 1002),
        (&[0xc1, 0x81, 0, 0, 0, 0, b'x'], 1002),
        (&[0x83, 0x80, 0, 0, 0, 0], 1002),
        (&[0x80, 0x80, 0, 0, 0, 0], 1002),
        (&[0x09, 0x80, 0, 0, 0, 0], 1002),
        (&[0x88, 0x81, 0, 0, 0, 0, 3], 1002),
        (&[0x88, 0x82, 0, 0, 0, 0, 0x03, 0xec], 1002),
        (&[0x81, 0x82, 0, 0, 0, 0, 0xff, 0xfe], 1007),
        (&[0x88, 0x83, 0, 0, 0, 0, 0x03, 0xe8, 0xff], 1007),
        (&[0x88, 0x80, 0, 0, 0, 0], 1005),
        (&[0x88, 0x82, 0, 0, 0, 0, 0x0f, 0xa1], 4001),
    ] {
        let mut client = gateway.client();
        client.socket.get_mut().write_all(bytes).unwrap();
        let Message::Close(close) = client.socket.read().unwrap() else { panic!("no close for {bytes:?}") };
        assert_eq!(close.map_or(1005, |close| close.code.into()), code, "{bytes:?}");
    }
}

#[test]
fn the_eleventh_frame_too_soon_is_one_too_many() {
    let gateway =
        Gateway::with(Settings { rate_limit_burst: 10, rate_limit_delay: Duration::from_secs(5), ..settings() });
    let mut worker = gateway.worker();
    let mut client = gateway.subscribed(&mut worker, r#"["a"]"#);
    for _ in 0..9 {
        client.socket.send(Message::Ping(Vec::new().into())).unwrap();
    }
    worker.dispatch(&notifications(&[(1, "a")]));
    loop {
        match client.socket.read().unwrap() {
            Message::Text(_) => break,
            other => assert!(other.is_pong()),
        }
    }
    client.socket.send(Message::Frame(Frame::message("", OpCode::Data(Data::Text), false))).unwrap();
    let close = loop {
        match client.socket.read().unwrap() {
            Message::Close(close) => break close.unwrap(),
            other => assert!(other.is_pong()),
        }
    };
    assert_eq!((u16::from(close.code), close.reason.as_str()), (1013, ""), "a fragment is a frame too");
}

#[test]
fn a_slow_consumer_is_closed_and_another_goes_on() {
    let gateway = Gateway::with(Settings { send_queue_max: 64 * 1024, ..settings() });
    let mut worker = gateway.worker();
    let mut slow = gateway.subscribed(&mut worker, r#"["a"]"#);
    let mut quick = gateway.subscribed(&mut worker, r#"["a"]"#);
    let filler = "x".repeat(256 * 1024);
    let mut id = 0;
    while gateway.net().counters().slow_consumers.load(Ordering::Relaxed) == 0 {
        id += 1;
        assert!(id < 1000, "the kernel's buffers are not that large");
        let message = format!(r#"{{"type":"{filler}","payload":{id}}}"#).into();
        worker.dispatch(&[Notification { id, channel: channel("a"), message }]);
        assert_eq!(quick.ids(), [id], "a frame above the limit passes an empty queue");
    }
    // What the kernel held of the last frame is followed by the close, or the stream ends in the middle of it.
    let close = loop {
        match slow.socket.read() {
            Ok(Message::Close(close)) => break close.map(|close| u16::from(close.code)),
            Ok(_) => {}
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(close, Some(1013));
    worker.dispatch(&notifications(&[(id + 1, "a")]));
    assert_eq!(quick.ids(), [id + 1]);
}

#[test]
fn a_replay_larger_than_the_queue_is_no_offence() {
    let gateway = Gateway::with(Settings { send_queue_max: 64 * 1024, ..settings() });
    let mut worker = gateway.worker();
    let mut client = gateway.client();
    client.subscribe(r#"["a"]"#, 1);
    let filler = "x".repeat(32 * 1024);
    let message = |id| format!(r#"{{"type":"{filler}","payload":{id}}}"#).into();
    let rows: Vec<_> = (1..=300).map(|id| Notification { id, channel: channel("a"), message: message(id) }).collect();
    worker.answer(&rows);
    worker.dispatch(&notifications(&[(301, "a")]));
    let mut got = Vec::new();
    while got.len() < 301 {
        got.extend(client.ids());
    }
    assert_eq!(got, (1..=301).collect::<Vec<_>>());
    assert_eq!(gateway.net().counters().slow_consumers.load(Ordering::Relaxed), 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Time

#[test]
fn silence_is_answered_by_pings_and_age_by_4002() {
    let gateway = Gateway::with(Settings { ping_interval: Duration::from_millis(50), ..settings() });
    let mut client = gateway.client();
    for _ in 0..2 {
        assert_eq!(client.socket.read().unwrap(), Message::Ping(Vec::new().into()));
        client.socket.flush().unwrap();
    }
    let gateway = Gateway::with(Settings { keepalive: Duration::from_millis(50), ..settings() });
    gateway.client().closed_with(4002, "");
}

#[test]
fn a_stop_says_1001_to_everybody_and_does_not_wait_for_the_deaf() {
    let gateway = Gateway::new();
    let mut clients: Vec<Client> = (0..4).map(|_| gateway.client()).collect();
    let _deaf = gateway.client();
    let _half = gateway.tcp();
    gateway.wait_until("all are open", |net| net.counters().connections_open.load(Ordering::Relaxed) == 5);
    let stopped = std::thread::spawn(move || gateway.stop());
    clients.iter_mut().for_each(|client| assert_eq!(client.closed().0, 1001));
    assert!(stopped.join().unwrap() < Duration::from_secs(3));
}

// ---------------------------------------------------------------------------------------------------------------------
// HTTP

#[test]
fn a_taken_port_is_tried_again_and_logged_once() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut gateway = Gateway::closed(Settings { port, ..settings() }, databases());
    gateway.wait_log(LogLevel::Warning, "could not listen");
    drop(taken);
    gateway.wait_open();
    assert_eq!(gateway.port, port);
    gateway.wait_log(LogLevel::Log, "listening on address \"127.0.0.1\"");
    assert_eq!(gateway.logs.iter().filter(|(level, _)| *level == LogLevel::Warning).count(), 1);
    assert!(gateway.http("GET /websocket/health HTTP/1.0\r\n\r\n").starts_with("HTTP/1.1 200 OK\r\n"));
}

#[test]
fn every_kind_of_address_can_be_listened_on() {
    for names in [&["*"][..], &["localhost"], &["127.0.0.1", "localhost", "127.0.0.2"]] {
        let names = names.iter().map(|name| name.to_string()).collect();
        let gateway = Gateway::with(Settings { listen_addresses: names, ..settings() });
        assert!(gateway.http("GET /websocket/health HTTP/1.0\r\n\r\n").starts_with("HTTP/1.1 200 OK\r\n"));
    }
}

#[test]
fn health_answers_on_one_connection_as_often_as_asked() {
    let gateway = Gateway::new();
    let body = "{\"status\": \"pass\"}";
    let ask = "GET /websocket/health HTTP/1.1\r\nHost: x\r\n\r\n";
    let last = "GET /websocket/health?x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let head = "HEAD http://x/websocket/health HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc";
    let answer = gateway.http(&[ask, head, ask, last].concat());
    assert_eq!(answer.matches("HTTP/1.1 200 OK\r\n").count(), 4);
    assert_eq!(answer.matches(body).count(), 3);
    assert_eq!(answer.matches("Cache-Control: no-store\r\n").count(), 4);
    assert_eq!(answer.matches("Content-Length: 18\r\n").count(), 4);
    assert!(answer.ends_with(&format!("Connection: close\r\n\r\n{body}")));
    let kept = "GET /websocket/health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n";
    let answer = gateway.http(&[kept, "GET /websocket/health HTTP/1.0\r\n\r\n"].concat());
    assert_eq!(answer.matches(body).count(), 2);
}

#[test]
fn requests_that_cannot_be_answered_get_their_status() {
    let gateway = Gateway::new();
    let long = format!("GET / HTTP/1.1\r\nHost: x\r\nX-Long: {}", "x".repeat(8192));
    let many = format!("GET / HTTP/1.1\r\nHost: x\r\n{}\r\n", "X: y\r\n".repeat(100));
    for (request, status) in [
        ("GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        ("DELETE /websocket/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\u{fc}\x03\x03", 400),
        ("hello, is anybody there?\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1x\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1048577\r\n\r\n", 413),
        ("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
        (&long, 431),
        (&many, 431),
    ] {
        let answer = gateway.http(request);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:.60} {answer}");
        assert!(answer.contains("Connection: close\r\n"), "{request:.60} {answer}");
    }
    let allow = gateway.http("PUT /websocket/health HTTP/1.0\r\n\r\n");
    assert!(allow.contains("Allow: GET, HEAD, OPTIONS\r\n"), "{allow}");
    let body = "x".repeat(1 << 20);
    let post = format!("POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let answer = gateway.http(&[&post, "GET /websocket/health HTTP/1.0\r\n\r\n"].concat());
    assert!(answer.starts_with("HTTP/1.1 404 ") && answer.ends_with("{\"status\": \"pass\"}"), "{answer}");
}

#[test]
fn too_many_connections_are_told_to_come_later() {
    let gateway = Gateway::with(Settings { max_connections: 2, ..settings() });
    let _two = [gateway.client(), gateway.client()];
    let answer = gateway.http("GET /websocket HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("Retry-After: "), "{answer}");
}

// ---------------------------------------------------------------------------------------------------------------------
// All at once

/// A worker that knows every notification of one channel dispatched so far, while clients come, go and come back.
#[test]
fn in_the_thick_of_it_everything_comes_once_and_in_order() {
    const LAST: i64 = 3_000;
    let gateway = Gateway::with(Settings { io_threads: 3, ..settings() });
    let worker = gateway.worker();
    let feeder = std::thread::spawn(move || feed(worker, LAST));
    std::thread::scope(|scope| {
        for number in 0..12 {
            let gateway = &gateway;
            scope.spawn(move || hear(gateway, number, LAST));
        }
    });
    drop(gateway);
    feeder.join().unwrap();
}

/// Dispatches ids 1 to `last` on channel "a" and answers recoveries in between, in small pages, until the gateway is
/// gone.
fn feed(mut worker: Worker, last: i64) {
    const PAGE: i64 = 20;
    worker.stream.set_nonblocking(true).unwrap();
    let mut replays = HashMap::new();
    let mut id: i64 = 0;
    let mut bytes = [0; 4096];
    loop {
        match worker.stream.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => worker.decoder.feed(&bytes[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
        worker.stream.set_nonblocking(false).unwrap();
        while let Some(command) = worker.decoder.next::<Command>().unwrap() {
            let (request, had) = match command {
                Command::Recover { request, last, .. } => (request, last),
                Command::More { request } => (request, replays[&request]),
                Command::Forget { request } => {
                    replays.remove(&request);
                    continue;
                }
                other => panic!("{other:?}"),
            };
            let end = id.min(had + PAGE);
            replays.insert(request, end);
            let rows: Vec<_> = (had + 1..=end).map(|id| notification(id, "a")).collect();
            worker.recovered(request, &rows, end < id);
        }
        if id < last {
            let count = (id % 4 + 1).min(last - id);
            worker.dispatch(&(id + 1..=id + count).map(|id| notification(id, "a")).collect::<Vec<_>>());
            id += count;
        }
        worker.stream.set_nonblocking(true).unwrap();
        std::thread::yield_now();
    }
}

/// Hears everything from 1 to `last`, over several connections.
fn hear(gateway: &Gateway, number: i64, last: i64) {
    let mut heard: i64 = 0;
    let patience = 300 + 50 * number;
    while heard < last {
        let mut client = gateway.client();
        client.subscribe(r#"["a"]"#, heard);
        let stay = heard + patience;
        while heard < last.min(stay) {
            for id in client.ids() {
                assert_eq!(id, heard + 1, "client {number}");
                heard = id;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Compression

const OFFER: &str = "permessage-deflate; client_max_window_bits";

/// Deflated, without the end of the flush (RFC 7692 section 7.2.1).
fn deflated(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len() + 100);
    Compress::new(Compression::new(9), false).compress_vec(text, &mut bytes, FlushCompress::Sync).unwrap();
    bytes.truncate(bytes.len() - 4);
    bytes
}

/// A frame of a client, masked with zeros.
fn raw_frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    match payload.len() {
        length @ ..126 => bytes.push(0x80 | length as u8),
        length => {
            bytes.push(0xff);
            bytes.extend((length as u64).to_be_bytes());
        }
    }
    bytes.extend([0; 4]);
    bytes.extend(payload);
    bytes
}

impl Client {
    fn write(&mut self, bytes: &[u8]) {
        self.socket.get_mut().write_all(bytes).unwrap();
    }

    /// The first byte of the next frame, and its payload, inflated if need be.
    fn raw(&mut self) -> (u8, Vec<u8>) {
        let tcp = self.socket.get_mut();
        let mut read = |length: u64| {
            let mut bytes = vec![0; length as usize];
            tcp.read_exact(&mut bytes).unwrap();
            bytes
        };
        let head = read(2);
        let length = match head[1] {
            126 => u64::from(u16::from_be_bytes(read(2).try_into().unwrap())),
            127 => u64::from_be_bytes(read(8).try_into().unwrap()),
            length => u64::from(length),
        };
        let mut payload = read(length);
        if head[0] & 0x40 == 0 {
            return (head[0], payload);
        }
        payload.extend([0, 0, 0xff, 0xff]);
        let mut text = Vec::with_capacity(1 << 20);
        Decompress::new(false).decompress_vec(&payload, &mut text, FlushDecompress::Sync).unwrap();
        (head[0], text)
    }

    /// The code of the close that comes next.
    fn raw_close(&mut self) -> u16 {
        let (first, payload) = self.raw();
        assert_eq!(first, 0x88);
        u16::from_be_bytes([payload[0], payload[1]])
    }
}

impl Gateway {
    /// A client that offers this.
    fn offering(&self, offer: &str) -> Client {
        let query = format!("?version=18.0-2&token={}", token(DEMO, "demo"));
        self.open(&query, &[("User-Agent", "test"), ("Sec-WebSocket-Extensions", offer)])
    }
}

/// One long notification.
fn long(id: i64) -> Notification {
    let message = format!(r#"{{"type":"t","payload":"{}"}}"#, "a long message, ".repeat(200));
    Notification { id, channel: channel("a"), message: message.into() }
}

#[test]
fn compression_is_agreed_to_where_the_setting_and_the_offer_allow_it() {
    let ask = |gateway: &Gateway, offer: &str| {
        let host = format!("127.0.0.1:{}", gateway.port);
        let origin = format!("http://{host}");
        let headers = [("Origin", origin.as_str()), ("Sec-WebSocket-Extensions", offer)];
        let answer = gateway.http(&upgrade_request(&host, &headers, "Connection: Upgrade"));
        assert!(answer.starts_with("HTTP/1.1 101 "));
        let line = answer.lines().find_map(|line| line.strip_prefix("Sec-WebSocket-Extensions: "));
        line.map(str::to_owned)
    };
    let on = Gateway::new();
    let both = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
    assert_eq!(ask(&on, OFFER).as_deref(), Some(both));
    assert_eq!(
        ask(&on, "permessage-deflate; server_max_window_bits=9").unwrap(),
        format!("{both}; server_max_window_bits=9")
    );
    assert_eq!(ask(&on, "permessage-deflate; server_max_window_bits=99"), None);
    let off = Gateway::with(Settings { compression: false, ..settings() });
    assert_eq!(ask(&off, OFFER), None);
}

#[test]
fn compressed_messages_go_both_ways_beside_clients_that_want_none() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let mut plain = gateway.subscribed(&mut worker, r#"["a"]"#);
    let mut packed = [gateway.offering(OFFER), gateway.offering(OFFER)];
    let mut narrow = gateway.offering("permessage-deflate; server_max_window_bits=8");
    for client in packed.iter_mut().chain([&mut narrow]) {
        let bytes = deflated(subscribe(r#"["a"]"#, 0).as_bytes());
        let (one, two) = bytes.split_at(7);
        client.write(&[raw_frame(0x41, one), raw_frame(0x89, b"p"), raw_frame(0x80, two)].concat());
        worker.answer(&[]);
        assert_eq!(client.raw(), (0x8a, b"p".to_vec()));
    }
    worker.dispatch(&[notification(1, "a"), long(2)]);
    worker.dispatch(&[notification(3, "a")]);
    let mut expected = || plain.socket.read().unwrap().into_data().to_vec();
    let (first, second) = (expected(), expected());
    assert!(first.len() > 3000);
    for client in &mut packed {
        assert_eq!(
            (client.raw(), client.raw()),
            ((0xc1, first.clone()), (0x81, second.clone())),
            "short stays as it is"
        );
    }
    assert_eq!((narrow.raw(), narrow.raw()), ((0x81, first), (0x81, second)), "longer than its window");
}

#[test]
fn what_is_sent_compressed_along_with_the_handshake_is_heard() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let query = format!("?version=18.0-2&token={}", token(DEMO, "demo"));
    let host = format!("127.0.0.1:{}", gateway.port);
    let headers = [("Origin", format!("http://{host}")), ("Sec-WebSocket-Extensions", OFFER.to_owned())];
    let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let request = upgrade_request(&host, &headers, "Connection: Upgrade");
    let request = request.replacen("/websocket", &format!("/websocket{query}"), 1);
    let message = raw_frame(0xc1, &deflated(subscribe(r#"["a"]"#, 7).as_bytes()));
    let mut tcp = gateway.tcp();
    tcp.write_all(&[request.as_bytes(), &message].concat()).unwrap();
    let (_, channels, last) = worker.recover();
    assert_eq!((channels, last), (vec![channel("a")], 7));
}

#[test]
fn compression_that_is_turned_off_ends_for_open_connections_too() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let mut client = gateway.offering(OFFER);
    client.write(&raw_frame(0xc1, &deflated(subscribe(r#"["a"]"#, 0).as_bytes())));
    worker.answer(&[]);
    worker.dispatch(&[long(1)]);
    assert_eq!(client.raw().0, 0xc1);
    gateway.net().send(ToNet::Settings(Arc::new(Settings { compression: false, ..settings() })));
    let mut newer = gateway.offering(OFFER);
    newer.subscribe(r#"["b"]"#, 0);
    worker.answer(&[]);
    worker.dispatch(&[long(2)]);
    assert_eq!(client.raw().0, 0x81);
    client.write(&raw_frame(0xc1, &deflated(subscribe(r#"["a","c"]"#, 0).as_bytes())));
    worker.answer(&[]);
}

#[test]
fn a_hostile_compressed_message_closes_its_connection_and_no_other() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let mut other = gateway.subscribed(&mut worker, r#"["a"]"#);
    let begun = raw_frame(0x41, &deflated(b"{}"));
    let bomb = deflated(&vec![b' '; 16 << 20]);
    for (bytes, code) in [
        (raw_frame(0xc1, b"\x07"), 1007),
        (raw_frame(0xc1, &deflated(b"cut short, cut short")[..9]), 1007),
        (raw_frame(0xc1, &deflated(b"\xff\xfe")), 1007),
        (raw_frame(0xc1, &bomb), 1009),
        (raw_frame(0x41, &bomb), 1009),
        (vec![0xc1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0], 1009),
        (raw_frame(0xc9, b""), 1002),
        (raw_frame(0xc0, b""), 1002),
        (raw_frame(0xe1, b""), 1002),
        (raw_frame(0xa1, b""), 1002),
        (vec![0xc1, 1, 0], 1002),
        ([&begun[..], &raw_frame(0xc0, b"")].concat(), 1002),
        ([&begun[..], &raw_frame(0x81, b"{}")].concat(), 1002),
        ([raw_frame(0x01, b"{}"), begun.clone()].concat(), 1002),
    ] {
        let mut client = gateway.offering(OFFER);
        client.write(&bytes);
        assert_eq!(client.raw_close(), code, "{:?}", &bytes[..bytes.len().min(20)]);
    }
    worker.dispatch(&notifications(&[(1, "a")]));
    assert_eq!(other.ids(), [1]);
}

#[test]
fn compressed_frames_count_like_others() {
    let gateway = Gateway::with(Settings { rate_limit_burst: 10, ..settings() });
    let mut client = gateway.offering(OFFER);
    let frames = [vec![raw_frame(0x41, b"")], vec![raw_frame(0, b""); 10]].concat();
    client.write(&frames.concat());
    assert_eq!(client.raw_close(), 1013);
}
