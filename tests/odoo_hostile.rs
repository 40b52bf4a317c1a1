//! `imbus.auth = 'odoo'` against visitors and Odoos that do what they should not: whatever it is, nobody gets what is
//! another's, and nobody else waits for it.

mod fake_odoo;
mod gateway;

use fake_odoo::{Answer, CLOSED, Odoo, PEEK, PRESENCE, chunked};
use gateway::steady::Steady;
use gateway::*;
use imbus::core::settings::{AuthMethod, Settings};
use std::collections::HashSet;
use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const LATER: &str = "Odoo cannot be asked now";

fn vouching(odoo: &Odoo) -> Settings {
    let auth = vec![AuthMethod::Token, AuthMethod::Odoo];
    Settings { auth, odoo_url: format!("http://127.0.0.1:{}", odoo.port), ..settings() }
}

fn visitor(gateway: &Gateway, session: &str) -> Client {
    let cookie = format!("session_id={session}");
    gateway.open("?version=18.0-7", &[("User-Agent", "browser"), ("Cookie", &cookie)])
}

/// A client of this session that is let in.
fn let_in(gateway: &Gateway, worker: &mut Worker, session: &str) -> Client {
    let mut client = visitor(gateway, session);
    client.subscribe("[]", 0);
    worker.answer(&[]);
    client
}

fn upgrade(gateway: &Gateway, lines: &str) -> String {
    format!(
        "GET /websocket?version=18.0-7 HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n{lines}\r\n",
        gateway.port
    )
}

/// What comes up to the end of the head, or to the end.
fn head(tcp: &mut Steady) -> String {
    let (mut got, mut byte) = (Vec::new(), [0]);
    while !got.ends_with(b"\r\n\r\n") && tcp.read(&mut byte).unwrap_or(0) == 1 {
        got.push(byte[0]);
    }
    String::from_utf8_lossy(&got).into_owned()
}

fn asked_for(gateway: &Gateway) -> u64 {
    gateway.net().counters().odoo_waiting.load(Ordering::Relaxed)
}

fn call(path: &str, lines: &str, params: &str) -> String {
    let body = format!(r#"{{"jsonrpc":"2.0","method":"call","id":9,"params":{params}}}"#);
    format!(
        "POST {path} HTTP/1.1\r\nHost: h\r\n{lines}Content-Type: application/json\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Opens sockets, or calls, of strangers behind one that hangs; returns the answers' heads.
fn strangers(odoo: &Odoo, gateway: &Gateway, request: &str) -> Vec<String> {
    odoo.with(|state| (state.fresh, state.held) = (true, true));
    let mut first = visitor(gateway, "first");
    first.subscribe("[]", 0);
    odoo.wait("the only place is taken", |state| state.under_way == 1);
    let mut waiting: Vec<_> = (0..5).map(|_| gateway.tcp()).collect();
    waiting.iter_mut().for_each(|tcp| tcp.write_all(request.as_bytes()).unwrap());
    // Whether they share a call or not, all of them have been heard by then.
    gateway.wait_until("strangers wait", |_| gateway.inspect(None).len() == 1 && asked_for(gateway) > 0);
    odoo.with(|state| state.held = false);
    waiting.iter_mut().map(head).collect()
}

fn given(head: &str) -> String {
    let line = head.lines().find_map(|line| line.strip_prefix("Set-Cookie: session_id="));
    line.unwrap_or_else(|| panic!("no session: {head}")).split(';').next().unwrap().to_owned()
}

#[test]
fn strangers_who_open_a_websocket_at_once_never_get_the_same_session() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(Settings { odoo_concurrency: 1, ..vouching(&odoo) });
    let mut worker = gateway.worker();
    let origin = format!("Origin: http://127.0.0.1:{}\r\n", gateway.port);
    let heads = std::thread::scope(|scope| {
        let heads = scope.spawn(|| strangers(&odoo, &gateway, &upgrade(&gateway, &origin)));
        worker.answer(&[]);
        heads.join().unwrap()
    });
    let sessions: HashSet<String> = heads.iter().map(|head| given(head)).collect();
    assert_eq!(sessions.len(), 5, "{heads:?}");
}

#[test]
fn strangers_who_peek_at_once_never_get_the_same_session() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(Settings { odoo_concurrency: 1, ..vouching(&odoo) });
    let mut worker = gateway.worker();
    let request = call(PEEK, "", r#"{"channels":[],"last":0,"is_first_poll":true}"#);
    let heads = std::thread::scope(|scope| {
        let heads = scope.spawn(|| strangers(&odoo, &gateway, &request));
        (0..6).for_each(|_| worker.answer(&[]));
        heads.join().unwrap()
    });
    let sessions: HashSet<String> = heads.iter().map(|head| given(head)).collect();
    assert_eq!(sessions.len(), 5, "{heads:?}");
}

#[test]
fn a_string_that_looks_like_a_record_is_a_string() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let mut worker = gateway.worker();
    let mut client = visitor(&gateway, "s");
    client.subscribe(r#"["[\"demo\",\"res.partner\",9]","[\"res.partner\",9]","res.partner_9"]"#, 0);
    worker.answer(&[]);
    worker.dispatch(&notifications(&[(1, r#"["res.partner",9]"#), (2, "broadcast")]));
    assert_eq!(client.ids(), [2]);
    // A record that is named outright is no subscription at all, and Odoo is not asked.
    let mut other = let_in(&gateway, &mut worker, "t");
    let before = odoo.count(PEEK);
    other.subscribe(r#"[["demo","res.partner",9]]"#, 0);
    other.subscribe(r#"["x"]"#, 0);
    worker.answer(&[]);
    worker.dispatch(&notifications(&[(3, r#"["res.partner",9]"#), (4, "x")]));
    assert_eq!(other.ids(), [4]);
    assert_eq!(odoo.count(PEEK), before + 1);
}

#[test]
fn an_answer_of_no_known_shape_lets_nobody_in() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let mut worker = gateway.worker();
    let bad = [
        "[]",
        "{}",
        "null",
        "\"broadcast\"",
        "[\"broadcast\"]",
        "[[]]",
        "[[\"\",\"broadcast\"]]",
        "[[7,\"broadcast\"]]",
        "[[\"unknown\",\"broadcast\"]]",
        "[[\"demo\",\"broadcast\"],[\"other\",\"res.partner\",3]]",
        "[[\"other\",\"broadcast\"],[\"demo\",\"res.partner\",3]]",
        "[[\"DEMO\",\"broadcast\"]]",
        "[[\"demo \",\"broadcast\"]]",
    ];
    for (at, channels) in bad.into_iter().enumerate() {
        let session = format!("bad{at}");
        odoo.answer(&session, Answer::Channels(channels));
        let mut client = visitor(&gateway, &session);
        client.subscribe("[\"broadcast\"]", 0);
        assert_eq!(client.closed(), (1013, LATER.to_owned()), "{channels}");
    }
    let mut good = let_in(&gateway, &mut worker, "good");
    worker.dispatch(&notifications(&[(1, "broadcast")]));
    assert_eq!(good.ids(), [1]);
}

#[test]
fn an_answer_in_chunks_is_an_answer() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let mut worker = gateway.worker();
    let body = r#"{"jsonrpc":"2.0","id":1,"result":{"channels":[["demo","broadcast"]],"notifications":[]}}"#;
    odoo.answer("s", Answer::Raw(chunked(body).leak()));
    let mut client = let_in(&gateway, &mut worker, "s");
    worker.dispatch(&notifications(&[(1, "broadcast")]));
    assert_eq!(client.ids(), [1]);
}

#[test]
fn an_odoo_that_was_restarted_costs_nobody_a_refusal() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let mut worker = gateway.worker();
    let mut first = let_in(&gateway, &mut worker, "first");
    // Down: who comes is told to come back, who is here hears on.
    odoo.stop();
    let mut refused = visitor(&gateway, "refused");
    refused.subscribe("[]", 0);
    refused.closed_with(1013, LATER);
    worker.dispatch(&notifications(&[(1, "broadcast")]));
    assert_eq!(first.ids(), [1]);
    odoo.come_back();
    let mut second = let_in(&gateway, &mut worker, "second");
    worker.dispatch(&notifications(&[(2, "broadcast")]));
    assert_eq!((first.ids(), second.ids()), (vec![2], vec![2]));
    // Restarted while nobody called it: the connections that were kept are dead, which no client is to feel.
    let mut others = Vec::new();
    for at in 0..5 {
        odoo.stop();
        odoo.come_back();
        others.push(let_in(&gateway, &mut worker, &format!("after{at}")));
    }
    worker.dispatch(&notifications(&[(3, "broadcast")]));
    others.iter_mut().for_each(|client| assert_eq!(client.ids(), [3]));
}

#[test]
fn with_all_places_taken_by_an_odoo_that_dribbles_messages_flow_and_it_ends() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(Settings { odoo_concurrency: 2, ..vouching(&odoo) });
    let mut worker = gateway.worker();
    let mut good = let_in(&gateway, &mut worker, "good");
    let start = Instant::now();
    let mut dribbled: Vec<Client> = ["one", "two"]
        .into_iter()
        .map(|session| {
            odoo.answer(session, Answer::Dribble);
            let mut client = visitor(&gateway, session);
            client.subscribe("[]", 0);
            client
        })
        .collect();
    odoo.wait("both places are taken", |state| state.under_way == 2);
    let mut late = visitor(&gateway, "late");
    late.subscribe("[]", 0);
    (1..=50).for_each(|id| {
        worker.dispatch(&notifications(&[(id, "broadcast")]));
        assert_eq!(good.ids(), [id]);
    });
    dribbled.iter_mut().for_each(|client| {
        client.socket.get_mut().set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        client.closed_with(1013, LATER);
    });
    // This is bounded, not timed.
    assert!(start.elapsed() < Duration::from_secs(60));
    worker.answer(&[]);
    worker.dispatch(&notifications(&[(51, "broadcast")]));
    assert_eq!((good.ids(), late.ids()), (vec![51], vec![51]));
    assert_eq!(odoo.with(|state| state.most), 2);
}

#[test]
fn a_page_from_elsewhere_is_refused_before_odoo_is_asked() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let port = gateway.port;
    for lines in [
        "Origin: https://evil.example\r\nCookie: session_id=s\r\n".to_owned(),
        "Origin: https://evil.example\r\n".to_owned(),
        "Origin: null\r\nCookie: session_id=s\r\n".to_owned(),
        format!("Origin: http://127.0.0.1:{port}.evil.example\r\nCookie: session_id=s\r\n"),
        "Origin: http://127.0.0.1:1\r\nCookie: session_id=s\r\n".to_owned(),
    ] {
        let mut tcp = gateway.tcp();
        tcp.write_all(upgrade(&gateway, &lines).as_bytes()).unwrap();
        let head = head(&mut tcp);
        assert!(head.starts_with("HTTP/1.1 403 "), "{lines}: {head}");
        assert!(!head.contains("Set-Cookie"), "{head}");
    }
    assert_eq!(odoo.with(|state| state.calls.len()), 0);
}

#[test]
fn no_request_smuggles_a_header_to_odoo() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let origin = format!("Origin: http://127.0.0.1:{}\r\n", gateway.port);
    for cookie in [
        "session_id=a\rX-Evil: 1",
        "session_id=a\nX-Evil: 1",
        "session_id=a\r\n X-Evil: 1",
        "session_id=a\0X-Evil: 1",
        "session_id=\u{e9}\u{10d}; X-Evil: 1",
        "X-Evil: 1",
    ] {
        let mut tcp = gateway.tcp();
        tcp.write_all(upgrade(&gateway, &format!("{origin}Cookie: {cookie}\r\n")).as_bytes()).unwrap();
        head(&mut tcp);
        drop(tcp);
    }
    // Longer than a head may be: nobody is asked about it.
    let mut tcp = gateway.tcp();
    let long = format!("{origin}Cookie: session_id={}\r\n", "x".repeat(8 << 10));
    let _ = tcp.write_all(upgrade(&gateway, &long).as_bytes());
    assert!(!head(&mut tcp).starts_with("HTTP/1.1 101"));
    let mut client = visitor(&gateway, "last");
    client.subscribe("[]", 0);
    odoo.wait("the last", |state| state.calls.iter().any(|call| call.head.contains("=last")));
    odoo.with(|state| {
        for call in &state.calls {
            let evil = call.head.lines().any(|line| line.trim_start().to_lowercase().starts_with("x-evil"));
            assert!(!evil, "{}", call.head);
            assert!(call.head.len() < 8 << 10);
        }
    });
}

#[test]
fn a_form_of_another_site_says_nothing_to_odoo_in_a_users_name() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    for path in [PRESENCE, CLOSED, PEEK, "/longpolling/poll"] {
        let lines = "Origin: https://evil.example\r\nCookie: session_id=s\r\n";
        let request = call(path, lines, r#"{"channels":[],"last":0,"inactivity_period":1}"#);
        // What a page may send without asking first.
        for request in [request.replace("application/json", "text/plain"), request] {
            let answer = gateway.http(&request);
            assert!(answer.starts_with("HTTP/1.1 4"), "{path}: {answer}");
        }
    }
    assert_eq!(odoo.with(|state| state.calls.len()), 0);
}

#[test]
fn the_first_to_subscribe_asks_odoo_for_no_old_messages() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let mut worker = gateway.worker();
    worker.dispatch(&notifications(&[(500_000, "x")]));
    // A client of a token hears one of them: they have been taken in by then.
    let mut seen = gateway.subscribed(&mut worker, r#"["x"]"#);
    worker.dispatch(&notifications(&[(500_001, "x")]));
    assert_eq!(seen.ids(), [500_001]);
    let _client = let_in(&gateway, &mut worker, "s");
    let last = odoo.with(|state| state.calls[0].params["last"].as_i64().unwrap());
    assert!(last >= 500_001, "Odoo would send all after {last}");
}
