//! The plain endpoints and subscriptions whose channels are asked for: real sockets, and a database worker played by the
//! test.

mod gateway;

use gateway::steady::Steady;
use gateway::*;
use imbus::core::granted::Granted;
use imbus::core::link::{Answer, Command, Event, Question};
use imbus::core::settings::{AuthMethod, Settings};
use imbus::core::token::{Grant, sign};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::sync::atomic::Ordering;

/// A request of a JSON-RPC call.
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

/// One answer: its status, its head, its body.
fn answer(tcp: &mut Steady) -> (u16, String, String) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        assert_eq!(tcp.read(&mut byte).unwrap(), 1, "the end of the stream after {}", String::from_utf8_lossy(&head));
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    tcp.read_exact(&mut body).unwrap();
    (head[9..12].parse().unwrap(), head, String::from_utf8(body).unwrap())
}

/// The result of a call that is answered.
fn result(tcp: &mut Steady) -> Value {
    let (status, head, body) = answer(tcp);
    assert_eq!(status, 200, "{head}{body}");
    let mut body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&body["jsonrpc"], &body["id"]), (&json!("2.0"), &json!(7)));
    body["result"].take()
}

fn ids(result: &Value) -> Vec<i64> {
    result.as_array().unwrap().iter().map(|entry| entry["id"].as_i64().unwrap()).collect()
}

fn say(tcp: &mut Steady, request: &str) {
    tcp.write_all(request.as_bytes()).unwrap();
}

fn poll(channels: &Value, last: i64) -> String {
    call("/longpolling/poll", &bearer(), &json!({"channels": channels, "last": last, "options": {}}))
}

/// A question, answered by the test.
fn question(worker: &mut Worker) -> (u64, Question) {
    match worker.next() {
        Some(Command::Query { query, question }) => (query, question),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_poll_answers_at_once_when_there_is_something() {
    let gateway = Gateway::new();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    say(&mut tcp, &poll(&json!(["a", ["res.partner", 3]]), 5));
    let (request, channels, last) = worker.recover();
    assert_eq!((channels, last), (vec![channel("a"), channel(r#"["res.partner",3]"#)], 5));
    worker.recovered(request, &notifications(&[(6, "a"), (8, "a")]), false);
    let found = result(&mut tcp);
    assert_eq!(found[0], json!({"id": 6, "channel": ["demo", "a"], "message": {"type": "t", "payload": 6}}));
    assert_eq!(ids(&found), [6, 8]);
}

#[test]
fn a_poll_waits_for_the_first_notification_and_takes_all_of_its_commit() {
    let gateway = Gateway::new();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    for round in 0..3 {
        say(&mut tcp, &poll(&json!(["a", "b"]), round * 10));
        worker.answer(&[]);
        let first = round * 10 + 1;
        worker.dispatch(&notifications(&[(first, "c"), (first + 1, "a"), (first + 2, "b"), (first + 3, "a")]));
        assert_eq!(ids(&result(&mut tcp)), [first + 1, first + 2, first + 3]);
    }
    assert_eq!(gateway.net().counters().connections_open.load(Ordering::Relaxed), 0);
}

#[test]
fn requests_sent_ahead_are_answered_one_after_the_other() {
    let gateway = Gateway::new();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    say(&mut tcp, &[poll(&json!(["a"]), 1), "GET /websocket/health HTTP/1.0\r\n\r\n".to_owned()].concat());
    worker.answer(&[]);
    worker.dispatch(&notifications(&[(2, "a")]));
    assert_eq!(ids(&result(&mut tcp)), [2]);
    assert!(rest(&mut tcp).ends_with("{\"status\": \"pass\"}"));
}

#[test]
fn a_poll_of_a_client_that_goes_away_ends_with_it() {
    let gateway = Gateway::new();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    say(&mut tcp, &poll(&json!(["a"]), 1));
    let (request, ..) = worker.recover();
    drop(tcp);
    assert_eq!(worker.next(), Some(Command::Forget { request }));
    gateway.wait_until("the socket is gone", |net| net.counters().sockets_open.load(Ordering::Relaxed) == 0);
}

/// Clients of Odoo up to 15 say the greatest id they have had, not the last.
#[test]
fn a_poller_that_says_its_greatest_id_gets_a_late_lower_one_once() {
    let gateway = Gateway::new();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    say(&mut tcp, &poll(&json!(["a"]), 12));
    worker.answer(&[]);
    worker.dispatch(&notifications(&[(9, "a")]));
    let (_, head, body) = answer(&mut tcp);
    assert!(body.contains("\"id\": 9"), "{body}");
    let cookie = head.lines().find_map(|line| line.strip_prefix("Set-Cookie: ")).expect("a cookie");
    assert!(cookie.contains("HttpOnly") && cookie.contains("Path=/longpolling"), "{cookie}");
    let cookie = cookie.split(';').next().unwrap();
    let headers = format!("{}Cookie: other=1; {cookie}\r\n", bearer());
    let with =
        |channels: Value, last: i64| call("/longpolling/poll", &headers, &json!({"channels": channels, "last": last}));
    let mut pollers = Vec::new();
    for (channels, last, position) in [(json!(["a"]), 12, 9), (json!(["b"]), 12, 12), (json!(["a"]), 13, 13)] {
        let mut tcp = gateway.tcp();
        say(&mut tcp, &with(channels, last));
        assert_eq!(worker.recover().2, position);
        pollers.push(tcp);
    }
}

#[test]
fn ids_ascend_in_an_answer_and_the_rest_comes_with_the_next() {
    let gateway = Gateway::new();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    say(&mut tcp, &poll(&json!(["a"]), 1));
    worker.answer(&notifications(&[(4, "a"), (7, "a"), (5, "a")]));
    assert_eq!(ids(&result(&mut tcp)), [4, 7]);
}

#[test]
fn peeking_never_waits_and_names_the_channels() {
    let gateway = Gateway::new();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    let params = json!({"channels": ["a"], "last": 3, "is_first_poll": true});
    let peek = call("/websocket/peek_notifications", &bearer(), &params);
    say(&mut tcp, &peek);
    worker.answer(&[]);
    assert_eq!(result(&mut tcp), json!({"channels": [["demo", "a"]], "notifications": []}));
    say(&mut tcp, &peek);
    worker.answer(&notifications(&[(4, "a")]));
    assert_eq!(ids(&result(&mut tcp)["notifications"]), [4]);
    say(&mut tcp, &call("/websocket/peek_notifications", &bearer(), &json!({"channels": [], "last": 0})));
    assert_eq!(result(&mut tcp), json!({"channels": [], "notifications": []}));
}

#[test]
fn what_only_the_database_knows_is_asked_of_it() {
    let gateway = Gateway::new();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    say(&mut tcp, &call("/bus/has_missed_notifications", &bearer(), &json!({"last_notification_id": 41})));
    let (query, asked) = question(&mut worker);
    assert_eq!(asked, Question::Missed { last: 41 });
    worker.send(&Event::Answered { query, answer: Answer::Missed(true) });
    assert_eq!(result(&mut tcp), json!(true));
    say(&mut tcp, &call("/bus/get_autovacuum_info", &bearer(), &json!({})));
    let (query, asked) = question(&mut worker);
    assert_eq!(asked, Question::Vacuum);
    worker.send(&Event::Answered { query, answer: Answer::Vacuum { last: None, next: 0 } });
    assert_eq!(result(&mut tcp), json!({"id": 0, "lastcall": null, "nextcall": "1970-01-01 00:00:00"}));
    say(&mut tcp, &call("/bus/get_autovacuum_info", &bearer(), &json!({})));
    let (query, _) = question(&mut worker);
    worker.send(&Event::Answered { query, answer: Answer::Failed });
    assert_eq!(answer(&mut tcp).0, 503);
}

#[test]
fn a_question_is_asked_again_of_the_next_worker() {
    let gateway = Gateway::new();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    say(&mut tcp, &call("/bus/has_missed_notifications", &bearer(), &json!({"last_notification_id": 1})));
    let (query, _) = question(&mut worker);
    drop(worker);
    let mut worker = gateway.worker();
    assert_eq!(question(&mut worker), (query, Question::Missed { last: 1 }));
    worker.send(&Event::Answered { query, answer: Answer::Missed(false) });
    assert_eq!(result(&mut tcp), json!(false));
}

#[test]
fn who_has_no_proof_gets_401_and_who_may_not_403() {
    let gateway = Gateway::new();
    let none = json!({"channels": ["a"], "last": 0});
    let a_only = Grant::Channels(vec![channel("a")]);
    let narrow = sign(&claims(DEMO, "demo", a_only), SECRET).unwrap();
    let narrow = format!("Authorization: Bearer {narrow}\r\n");
    for (path, headers, params, status) in [
        ("/longpolling/poll", "", &none, 401),
        ("/longpolling/poll", "Authorization: Bearer x\r\n", &none, 401),
        ("/websocket/peek_notifications", "", &none, 401),
        ("/bus/has_missed_notifications", "", &json!({"last_notification_id": 1}), 401),
        ("/bus/get_autovacuum_info", "", &json!({}), 401),
        ("/longpolling/poll", &narrow, &json!({"channels": ["a", "b"], "last": 0}), 403),
        ("/longpolling/poll", &format!("{}Origin: https://evil.example\r\n", bearer()), &none, 403),
    ] {
        let mut tcp = gateway.tcp();
        say(&mut tcp, &call(path, headers, params));
        let (found, head, body) = answer(&mut tcp);
        assert_eq!(found, status, "{path} {headers} {head}{body}");
        assert_eq!(head.contains("WWW-Authenticate: Bearer\r\n"), status == 401);
    }
    let mut tcp = gateway.tcp();
    let request = call("/longpolling/poll", &bearer(), &none).replace("application/json", "text/plain");
    say(&mut tcp, &request);
    assert_eq!(answer(&mut tcp).0, 415);
    say(&mut tcp, &poll(&json!([1]), 0));
    let error: Value = serde_json::from_str(&answer(&mut tcp).2).unwrap();
    assert_eq!((&error["error"]["code"], &error["id"]), (&json!(200), &json!(7)), "{error}");
    say(&mut tcp, &poll(&json!(["a"]), -1));
    let error: Value = serde_json::from_str(&answer(&mut tcp).2).unwrap();
    assert_eq!(error["error"]["data"]["name"], "builtins.ValueError");
}

#[test]
fn bodies_may_come_in_pieces_and_after_being_asked_for() {
    let gateway = Gateway::new();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    let request = call("/websocket/peek_notifications", &bearer(), &json!({"channels": ["a"], "last": 0}));
    let expecting = request.replace("\r\n\r\n", "\r\nExpect: 100-continue\r\n\r\n");
    let (head, body) = expecting.split_once("\r\n\r\n").unwrap();
    say(&mut tcp, &format!("{head}\r\n\r\n"));
    let (status, ..) = answer(&mut tcp);
    assert_eq!(status, 100);
    for byte in body.bytes() {
        tcp.write_all(&[byte]).unwrap();
    }
    worker.answer(&[]);
    assert_eq!(result(&mut tcp)["notifications"], json!([]));
    say(&mut tcp, &head.replace("/websocket/peek_notifications", "/nowhere").add_end());
    assert_eq!(answer(&mut tcp).0, 404);
    assert_eq!(rest(&mut tcp), "", "the body that never comes ends the connection");
    let mut tcp = gateway.tcp();
    say(&mut tcp, &request.replace("\r\n\r\n", "\r\nExpect: something\r\n\r\n"));
    assert_eq!(answer(&mut tcp).0, 417);
}

trait AddEnd {
    fn add_end(&self) -> String;
}

impl AddEnd for String {
    fn add_end(&self) -> String {
        format!("{self}\r\n\r\n")
    }
}

#[test]
fn pages_of_allowed_origins_may_read_answers_and_others_may_not() {
    let allowed = vec!["https://shop.example.com".to_owned()];
    let gateway = Gateway::with(Settings { allowed_origins: allowed, ..settings() });
    let preflight = |origin: &str| {
        gateway.http(&format!(
            "OPTIONS /longpolling/poll HTTP/1.1\r\nHost: x\r\nOrigin: {origin}\r\nConnection: close\r\n\
             Access-Control-Request-Method: POST\r\n\r\n"
        ))
    };
    let answer = preflight("https://shop.example.com");
    assert!(answer.starts_with("HTTP/1.1 204 No Content\r\n") && !answer.contains("\r\nContent-"), "{answer}");
    for header in [
        "Allow: POST, OPTIONS",
        "Access-Control-Allow-Origin: https://shop.example.com",
        "Access-Control-Allow-Methods: POST, OPTIONS",
        "Access-Control-Allow-Headers: Authorization, Content-Type",
        "Access-Control-Allow-Credentials: true",
        "Vary: Origin",
    ] {
        assert!(answer.contains(&format!("{header}\r\n")), "{header}: {answer}");
    }
    assert!(!preflight("https://evil.example").contains("Access-Control"));
    let health =
        "GET /websocket/health HTTP/1.1\r\nHost: x\r\nOrigin: https://shop.example.com\r\nConnection: close\r\n\r\n";
    assert!(gateway.http(health).contains("Access-Control-Allow-Origin: https://shop.example.com\r\n"));
    let any = Gateway::with(Settings { allowed_origins: vec!["*".to_owned()], ..settings() });
    let answer = any.http(health);
    assert!(answer.contains("Access-Control-Allow-Origin: ") && !answer.contains("Credentials"), "{answer}");
}

// ---------------------------------------------------------------------------------------------------------------------
// Channels that are asked for

fn asking() -> Gateway {
    Gateway::with(Settings { auth: vec![AuthMethod::Token, AuthMethod::Function], ..settings() })
}

/// Answers a question who may subscribe.
fn grant(worker: &mut Worker, channels: &[&str]) -> (Value, Value) {
    let (query, Question::Authenticate { headers, channels: asked }) = question(worker) else { panic!("no question") };
    let channels = channels.iter().map(|name| channel(name)).collect();
    let granted = Granted { channels, subject: Some("somebody".to_owned()) };
    worker.send(&Event::Answered { query, answer: Answer::Authenticated(Some(granted)) });
    (serde_json::from_str(&headers).unwrap(), serde_json::from_str(&asked).unwrap())
}

#[test]
fn a_client_is_on_the_channels_that_its_database_says_and_no_others() {
    let gateway = asking();
    let mut worker = gateway.worker();
    let mut client = gateway.open("?version=18.0-2&db=demo", &[("Cookie", "a=1"), ("X-Who", "me")]);
    client.subscribe(r#"["secret", "b"]"#, 4);
    let (headers, channels) = grant(&mut worker, &["b", r#"["res.partner",3]"#]);
    assert_eq!((&headers["cookie"], &headers["x-who"]), (&json!("a=1"), &json!("me")));
    assert_eq!(channels, json!(["secret", "b"]));
    let (request, channels, last) = worker.recover();
    assert_eq!((channels, last), (vec![channel("b"), channel(r#"["res.partner",3]"#)], 4));
    worker.recovered(request, &[], false);
    worker.dispatch(&notifications(&[(5, "secret"), (6, "b"), (7, r#"["res.partner",3]"#)]));
    assert_eq!([client.ids(), client.ids()].concat(), [6, 7]);
    assert_eq!(gateway.inspect(None)[0].subject.as_deref(), Some("somebody"));
}

#[test]
fn of_subscriptions_during_a_question_the_last_one_counts() {
    let gateway = asking();
    let mut worker = gateway.worker();
    let mut client = gateway.open("?version=18.0-2&db=demo", &[]);
    client.subscribe(r#"["a"]"#, 1);
    let (query, Question::Authenticate { channels, .. }) = question(&mut worker) else { panic!("no question") };
    assert_eq!(channels, r#"["a"]"#);
    client.subscribe(r#"["b"]"#, 2);
    client.subscribe(r#"["c"]"#, 3);
    client.say("nonsense");
    // The answer to a ping comes after all that was said before it.
    client.socket.send(tungstenite::Message::Ping("x".into())).unwrap();
    assert_eq!(client.socket.read().unwrap(), tungstenite::Message::Pong("x".into()));
    let granted = Granted { channels: vec![channel("a")], subject: None };
    worker.send(&Event::Answered { query, answer: Answer::Authenticated(Some(granted)) });
    assert_eq!(grant(&mut worker, &["c"]).1, json!(["c"]));
    // The replay of the first may have been asked for by then, or not.
    loop {
        match worker.next() {
            Some(Command::Recover { channels, .. }) if channels == [channel("c")] => break,
            Some(Command::Recover { .. } | Command::Forget { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn who_is_refused_is_closed_4401_and_requests_get_401() {
    let gateway = asking();
    let mut worker = gateway.worker();
    let mut client = gateway.open("?version=18.0-2&db=demo", &[]);
    client.subscribe(r#"["a"]"#, 0);
    let (query, _) = question(&mut worker);
    worker.send(&Event::Answered { query, answer: Answer::Authenticated(None) });
    client.closed_with(4401, "refused");
    let mut client = gateway.open("?version=18.0-2&db=demo", &[]);
    client.subscribe(r#"["a"]"#, 0);
    let (query, _) = question(&mut worker);
    worker.send(&Event::Answered { query, answer: Answer::Failed });
    assert_eq!(client.closed().0, 1013);
    let mut tcp = gateway.tcp();
    say(&mut tcp, &call("/longpolling/poll?db=demo", "", &json!({"channels": ["a"], "last": 0})));
    let (query, _) = question(&mut worker);
    worker.send(&Event::Answered { query, answer: Answer::Authenticated(None) });
    assert_eq!(answer(&mut tcp).0, 401);
    for query in ["?version=18.0-2&db=nowhere", "?version=18.0-2"] {
        assert_eq!(gateway.open(query, &[]).closed().0, 4401);
    }
}

#[test]
fn requests_may_be_asked_for_too() {
    let gateway = asking();
    let (mut worker, mut tcp) = (gateway.worker(), gateway.tcp());
    say(&mut tcp, &call("/longpolling/poll?db=demo", "", &json!({"channels": ["a"], "last": 3})));
    grant(&mut worker, &["a"]);
    worker.answer(&notifications(&[(4, "a")]));
    assert_eq!(ids(&result(&mut tcp)), [4]);
    say(&mut tcp, &call("/bus/has_missed_notifications?db=demo", "", &json!({"last_notification_id": 4})));
    assert_eq!(grant(&mut worker, &[]).1, json!([]));
    let (query, asked) = question(&mut worker);
    assert_eq!(asked, Question::Missed { last: 4 });
    worker.send(&Event::Answered { query, answer: Answer::Missed(false) });
    assert_eq!(result(&mut tcp), json!(false));
}

#[test]
fn a_good_token_needs_no_question_and_a_bad_one_is_told() {
    let gateway = asking();
    let mut worker = gateway.worker();
    let mut client = gateway.open(&format!("?version=18.0-2&db=demo&token={}", token(DEMO, "demo")), &[]);
    client.subscribe(r#"["a"]"#, 0);
    worker.answer(&[]);
    let (code, reason) = gateway.open("?version=18.0-2&token=x", &[]).closed();
    assert!(code == 4401 && reason.starts_with("invalid token"), "{code} {reason}");
    // With a database named, the next way is tried.
    let mut client = gateway.open("?version=18.0-2&db=demo&token=x", &[]);
    client.subscribe(r#"["a"]"#, 0);
    grant(&mut worker, &["a"]);
    worker.answer(&[]);
}
