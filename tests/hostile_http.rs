//! What a hostile reader of the plain endpoints found: each test fails on the faults it names.

mod gateway;

use gateway::steady::Steady;
use gateway::*;
use imbus::core::granted::Granted;
use imbus::core::link::{Answer, Command, Event, Question};
use imbus::core::settings::{AuthMethod, Settings};
use imbus::core::token::{Grant, sign};
use imbus::net::bridge::ToNet;
use imbus::net::counters::Rejection;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

fn call(path: &str, headers: &str, params: &Value) -> String {
    let body = json!({"jsonrpc": "2.0", "method": "call", "id": 7, "params": params}).to_string();
    format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{headers}\r\n{body}",
        body.len()
    )
}

fn bearer() -> String {
    format!("Authorization: Bearer {}\r\n", token(DEMO, "demo"))
}

fn poll(channels: &Value, last: i64) -> String {
    call("/longpolling/poll", &bearer(), &json!({"channels": channels, "last": last}))
}

/// The status and body of one answer; None when nothing comes, or the connection ends without one.
fn answer(tcp: &mut Steady) -> Option<(u16, String, String)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if tcp.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    tcp.read_exact(&mut body).ok()?;
    Some((head[9..12].parse().unwrap(), head, String::from_utf8(body).unwrap()))
}

/// Whether the peer has answered or hung up within the patience of the tests.
fn reacts(tcp: &mut Steady) -> bool {
    tcp.read(&mut [0; 4096]).is_ok()
}

fn asking() -> Gateway {
    Gateway::with(Settings { auth: vec![AuthMethod::Token, AuthMethod::Function], ..settings() })
}

fn question(worker: &mut Worker) -> u64 {
    match worker.next() {
        Some(Command::Query { query, question: Question::Authenticate { .. } }) => query,
        other => panic!("{other:?}"),
    }
}

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// notes.rs set_databases: `close` does nothing to a request but takes its subscription.
#[test]
fn a_poll_ends_when_its_database_is_no_longer_served() {
    let gateway = Gateway::new();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    tcp.write_all(poll(&json!(["a"]), 1).as_bytes()).unwrap();
    worker.answer(&[]);
    gateway.net().send(ToNet::Databases(Arc::new(Vec::new())));
    assert!(reacts(&mut tcp), "neither an answer nor an end");
}

/// notes.rs set_settings, likewise.
#[test]
fn a_poll_ends_when_the_secret_is_changed() {
    let gateway = Gateway::new();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    tcp.write_all(poll(&json!(["a"]), 1).as_bytes()).unwrap();
    worker.answer(&[]);
    gateway.net().send(ToNet::Settings(Arc::new(Settings { token_secret: b"another".to_vec(), ..settings() })));
    assert!(reacts(&mut tcp), "neither an answer nor an end");
}

/// notes.rs set_databases: a database that is gone for a moment (the list is read anew) mutes the pollers for good.
#[test]
fn a_poll_is_told_what_is_committed_after_a_change_of_the_settings() {
    let gateway = Gateway::new();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    tcp.write_all(poll(&json!(["a"]), 1).as_bytes()).unwrap();
    worker.answer(&[]);
    gateway.net().send(ToNet::Databases(Arc::new(Vec::new())));
    gateway.net().send(ToNet::Databases(Arc::new(databases())));
    worker.dispatch(&notifications(&[(2, "a")]));
    assert!(reacts(&mut tcp), "what was committed is kept from the poller");
}

/// requests.rs drop_query: of a websocket that is closing the database is not found any more.
#[test]
fn the_question_of_a_websocket_that_said_goodbye_is_taken_back() {
    let gateway = asking();
    let mut worker = gateway.worker();
    let mut others: Vec<Client> = (0..2).map(|_| gateway.open("?version=18.0-2&db=demo", &[])).collect();
    others.iter_mut().for_each(|client| client.subscribe(r#"["a"]"#, 0));
    let first = (0..2).map(|_| question(&mut worker)).min().unwrap();
    for round in 1..=3 {
        let mut gone = gateway.open("?version=18.0-2&db=demo", &[]);
        gone.subscribe(&format!(r#"["gone{round}"]"#), 0);
        gone.socket.close(None).unwrap();
        while gone.socket.read().is_ok() {}
        let name = "only those that wait are left";
        gateway.wait_until(name, |net| net.counters().connections_open.load(Ordering::Relaxed) == 2);
    }
    let mut last = gateway.open("?version=18.0-2&db=demo", &[]);
    last.subscribe(r#"["last"]"#, 0);
    // An answer to a ping comes after all that was said before it.
    last.socket.send(tungstenite::Message::Ping("x".into())).unwrap();
    assert_eq!(last.socket.read().unwrap(), tungstenite::Message::Pong("x".into()));
    worker.send(&Event::Answered { query: first, answer: Answer::Authenticated(None) });
    match worker.next() {
        Some(Command::Query { question: Question::Authenticate { channels, .. }, .. }) => {
            assert_eq!(channels, r#"["last"]"#, "asked for a client that is gone");
        }
        other => panic!("{other:?}"),
    }
}

/// http.rs answer: of a route without a body the answer to `Expect` neither closes nor asks for the body; the next
/// request is taken for it.
#[test]
fn a_body_that_was_never_asked_for_is_not_taken_from_the_next_request() {
    let gateway = Gateway::new();
    let mut tcp = gateway.tcp();
    let request = "GET /websocket/health HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n";
    tcp.write_all(request.as_bytes()).unwrap();
    let (status, head, _) = answer(&mut tcp).unwrap();
    assert_eq!(status, 200);
    assert!(head.contains("Connection: close"), "the connection goes on, five bytes out of step: {head}");
}

/// The same, as the next request has it.
#[test]
fn after_an_expectation_on_a_get_the_next_request_is_understood() {
    let gateway = Gateway::new();
    let mut tcp = gateway.tcp();
    let next = "GET /websocket/health HTTP/1.1\r\nHost: x\r\n\r\n";
    let smuggler = format!(
        "GET /websocket/health HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
        next.len()
    );
    tcp.write_all(smuggler.as_bytes()).unwrap();
    assert_eq!(answer(&mut tcp).unwrap().0, 200);
    tcp.write_all(next.as_bytes()).unwrap();
    tcp.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    let mut byte = [0];
    // An answer, or the end of the connection; not silence.
    assert!(tcp.read(&mut byte).is_ok(), "the request was swallowed");
}

/// connection.rs read_http: the first byte of a further request sets the deadline of a head while a poll waits.
/// reactor/requests.rs waited: a client nobody has vouched for is answered 200.
#[test]
fn a_request_sent_ahead_does_not_cut_a_poll_short_and_without_proof_nothing_is_answered() {
    let gateway = asking();
    let mut worker = gateway.worker();
    let mut tcp = gateway.tcp();
    tcp.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    tcp.write_all(call("/longpolling/poll?db=demo", "", &json!({"channels": ["a"], "last": 3})).as_bytes()).unwrap();
    question(&mut worker);
    tcp.write_all(b"G").unwrap();
    let answer = answer(&mut tcp);
    assert!(answer.is_none(), "well before 50 s, and to somebody who has not been let in: {answer:?}");
}

/// asked.rs: refusals found out later are not counted.
#[test]
fn refusals_of_requests_that_waited_are_counted_too() {
    let gateway = asking();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    let a_only = Grant::Channels(vec![channel("a")]);
    let narrow = sign(&claims(DEMO, "demo", a_only), SECRET).unwrap();
    let narrow = format!("Authorization: Bearer {narrow}\r\n");
    let none = json!({"channels": ["b"], "last": 0});
    tcp.write_all(call("/longpolling/poll", &narrow, &none).as_bytes()).unwrap();
    assert_eq!(answer(&mut tcp).unwrap().0, 403);
    tcp.write_all(call("/longpolling/poll?db=demo", "", &none).as_bytes()).unwrap();
    let query = question(&mut worker);
    worker.send(&Event::Answered { query, answer: Answer::Authenticated(None) });
    assert_eq!(answer(&mut tcp).unwrap().0, 401);
    let counters = gateway.net().counters();
    let counted = (counters.rejected(Rejection::Forbidden), counters.rejected(Rejection::Unauthorized));
    assert_eq!(counted, (1, 1));
}

/// asked.rs patience: a poll outlives its token.
#[test]
fn nothing_is_told_to_a_poller_whose_token_has_expired() {
    let gateway = Gateway::new();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    let mut claims = claims(DEMO, "demo", Grant::All);
    claims.exp = unix() + 2;
    let headers = format!("Authorization: Bearer {}\r\n", sign(&claims, SECRET).unwrap());
    tcp.write_all(call("/longpolling/poll", &headers, &json!({"channels": ["a"], "last": 1})).as_bytes()).unwrap();
    worker.answer(&[]);
    gateway.wait_until("the token has expired", |_| unix() > claims.exp);
    worker.dispatch(&notifications(&[(2, "a")]));
    let answer = answer(&mut tcp);
    assert!(answer.as_ref().is_none_or(|(status, ..)| *status == 401), "{answer:?}");
}

/// connection.rs end, CLOSE_WAIT: five seconds for an answer of any size, however steadily it is read; 15 s on a
/// connection that is kept.
#[test]
fn an_answer_that_is_being_read_is_not_cut_off() {
    let gateway = Gateway::new();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    let headers = format!("{}Connection: close\r\n", bearer());
    tcp.write_all(call("/longpolling/poll", &headers, &json!({"channels": ["a"], "last": 1})).as_bytes()).unwrap();
    let (request, ..) = worker.recover();
    let mut page = notifications(&[(2, "a")]);
    page[0].message = format!(r#"{{"type":"t","payload":"{}"}}"#, "x".repeat(40 << 20)).into();
    worker.recovered(request, &page, false);
    let (mut total, mut chunk) = (0, vec![0; 1 << 20]);
    loop {
        match tcp.read(&mut chunk) {
            Ok(0) | Err(_) => break,
            Ok(count) => total += count,
        }
        // A steady reader, and no fast one.
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(total > 40 << 20, "cut off after {total} bytes");
}

/// asked.rs Wish::Notifications: the text of the channels is kept for as long as the poll waits.
#[test]
fn a_poll_that_waits_costs_little_however_much_it_said() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let body =
        format!(r#"{{"jsonrpc":"2.0","id":7,"params":{{"channels":[{}"a"],"last":1}}}}"#, " ".repeat((1 << 20) - 200));
    let head = format!(
        "POST /longpolling/poll HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{}Content-Length: {}\r\n\r\n",
        bearer(),
        body.len()
    );
    let before = resident();
    let pollers: Vec<Steady> = (0..100)
        .map(|_| {
            let mut tcp = gateway.tcp();
            tcp.write_all(head.as_bytes()).unwrap();
            tcp.write_all(body.as_bytes()).unwrap();
            worker.answer(&[]);
            tcp
        })
        .collect();
    let each = resident().saturating_sub(before) / pollers.len() as u64;
    assert!(each < 100_000, "{each} bytes for each poll that waits");
}

/// delivery.rs join: too many channels close a websocket, and mute a request.
#[test]
fn a_poll_that_is_granted_too_many_channels_is_answered() {
    let gateway = asking();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    tcp.write_all(call("/longpolling/poll?db=demo", "", &json!({"channels": ["a"], "last": 3})).as_bytes()).unwrap();
    let query = question(&mut worker);
    let channels = (0..200_000).map(|number| channel(&format!("c{number}"))).collect();
    let granted = Granted { channels, subject: None };
    worker.send(&Event::Answered { query, answer: Answer::Authenticated(Some(granted)) });
    assert!(reacts(&mut tcp), "neither an answer nor an end");
}

/// notes.rs set_settings: those who were let in by a function have no token.
#[test]
fn a_changed_secret_leaves_those_alone_who_came_without_a_token() {
    let gateway = asking();
    let mut worker = gateway.worker();
    let mut client = gateway.open("?version=18.0-2&db=demo", &[]);
    client.subscribe(r#"["a"]"#, 0);
    let query = question(&mut worker);
    let granted = Granted { channels: vec![channel("a")], subject: None };
    worker.send(&Event::Answered { query, answer: Answer::Authenticated(Some(granted)) });
    worker.answer(&[]);
    let auth = vec![AuthMethod::Token, AuthMethod::Function];
    let settings = Settings { token_secret: b"another".to_vec(), auth, ..settings() };
    gateway.net().send(ToNet::Settings(Arc::new(settings)));
    worker.dispatch(&notifications(&[(2, "a")]));
    match client.socket.read().unwrap() {
        tungstenite::Message::Text(_) => {}
        other => panic!("{other:?}"),
    }
}

/// asked.rs answer_found: every poller gets its own copy of what all of them hear.
#[test]
fn one_long_message_to_many_pollers_is_kept_once() {
    let gateway = Gateway::new();
    let mut worker = gateway.worker();
    let mut pollers: Vec<Steady> = (0..50)
        .map(|_| {
            let mut tcp = gateway.tcp();
            tcp.write_all(poll(&json!(["a"]), 1).as_bytes()).unwrap();
            worker.answer(&[]);
            tcp
        })
        .collect();
    let before = resident();
    let mut batch = notifications(&[(2, "a")]);
    batch[0].message = format!(r#"{{"type":"t","payload":"{}"}}"#, "x".repeat(16 << 20)).into();
    worker.dispatch(&batch);
    // The head of each answer: it is there, and most of it waits.
    pollers.iter_mut().for_each(|tcp| assert_eq!(tcp.read(&mut [0; 1]).unwrap(), 1));
    let grown = resident().saturating_sub(before);
    assert!(grown < 200 << 20, "{} MiB for one message of 16 MiB and {} pollers", grown >> 20, pollers.len());
}

/// delivery.rs deliver and requests.rs finish both count.
#[test]
fn what_a_poller_was_sent_is_counted_once() {
    let gateway = Gateway::new();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    tcp.write_all(poll(&json!(["a"]), 1).as_bytes()).unwrap();
    worker.answer(&[]);
    worker.dispatch(&notifications(&[(2, "a")]));
    assert_eq!(answer(&mut tcp).unwrap().0, 200);
    assert_eq!(gateway.net().counters().notifications_sent.load(Ordering::Relaxed), 1);
}

/// The same fault as the question of a websocket that said goodbye, as a hostile one has it: without any proof, and
/// while the worker is away or busy, each visit leaves 1 MiB behind.
#[test]
fn what_websockets_that_are_gone_have_asked_is_not_kept() {
    let gateway = asking();
    let channels = format!(r#"["{}"]"#, "x".repeat((1 << 20) - 200));
    let before = resident();
    for _ in 0..100 {
        let mut client = gateway.open("?version=18.0-2&db=demo", &[]);
        client.subscribe(&channels, 0);
        let _ = client.socket.close(None);
        while client.socket.read().is_ok() {}
    }
    gateway.wait_until("all are gone", |net| net.counters().sockets_open.load(Ordering::Relaxed) == 0);
    let grown = resident().saturating_sub(before);
    assert!(grown < 30 << 20, "{} MiB for nobody", grown >> 20);
}
