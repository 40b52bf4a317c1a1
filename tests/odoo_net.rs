//! `imbus.auth = 'odoo'` on the network side: real sockets, an Odoo played by the test.

mod fake_odoo;
mod gateway;

use fake_odoo::{Answer, CLOSED, Odoo, PEEK, PRESENCE};
use gateway::*;
use imbus::core::settings::{AuthMethod, Settings};
use std::io::{Read, Write};
use std::time::{Duration, Instant};
use tungstenite::client::IntoClientRequest;

fn vouching(odoo: &Odoo) -> Settings {
    let auth = vec![AuthMethod::Token, AuthMethod::Odoo];
    Settings { auth, odoo_url: format!("http://127.0.0.1:{}", odoo.port), ..settings() }
}

fn visitor(gateway: &Gateway, session: &str) -> Client {
    let cookie = format!("frontend_lang=en; session_id={session}");
    gateway.open("?version=18.0-7", &[("User-Agent", "browser"), ("Cookie", &cookie)])
}

#[test]
fn odoo_says_what_is_subscribed_to() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let mut worker = gateway.worker();
    worker.dispatch(&notifications(&[(41, "x")]));
    let mut client = visitor(&gateway, "s1");
    client.subscribe(r#"["mine","secret"]"#, 0);
    worker.answer(&[]);
    worker.dispatch(&notifications(&[(42, "secret"), (43, r#"["res.partner",4]"#), (44, r#"["res.partner",3]"#)]));
    assert_eq!(client.ids(), [44]);
    let call = odoo.with(|state| state.calls[0].clone());
    assert_eq!(call.params["is_first_poll"], true);
    let head = call.head.to_lowercase();
    assert!(head.contains("cookie: frontend_lang=en; session_id=s1\r\n"), "{head}");
    assert!(head.contains(&format!("host: 127.0.0.1:{}\r\n", gateway.port)), "{head}");
    assert!(head.contains("user-agent: browser\r\n"), "{head}");
    let shown = gateway.inspect(Some(DEMO));
    assert_eq!(shown[0].subject.as_deref(), Some("res.partner(3)"));
    // Now it is known how far the ids are.
    let mut second = visitor(&gateway, "s2");
    second.subscribe("[]", 7);
    odoo.wait("the second", |state| state.calls.len() == 2);
    assert_eq!(odoo.with(|state| state.calls[1].params["last"].clone()), 44);
}

#[test]
fn who_has_no_session_gets_odoos_in_the_101() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let mut worker = gateway.worker();
    let url = format!("ws://127.0.0.1:{}/websocket?version=19.0-2", gateway.port);
    let mut request = url.into_client_request().unwrap();
    let origin = format!("http://127.0.0.1:{}", gateway.port);
    request.headers_mut().insert("Origin", origin.parse().unwrap());
    let (socket, response) = tungstenite::client(request, gateway.tcp()).unwrap();
    assert_eq!(response.headers()["set-cookie"], "session_id=given; HttpOnly; Path=/");
    assert_eq!(odoo.count(PEEK), 1);
    odoo.answer("given", Answer::Known("demo", 0, ""));
    let mut client = Client { socket };
    client.subscribe(r#"["a"]"#, 0);
    worker.answer(&[]);
    worker.dispatch(&notifications(&[(1, "a")]));
    assert_eq!(client.ids(), [1]);
    let head = odoo.with(|state| state.calls[1].head.clone()).to_lowercase();
    assert!(head.contains("cookie: session_id=given\r\n"), "{head}");
    // Whoever has one is not asked about before it subscribes.
    let before = odoo.count(PEEK);
    let _other = visitor(&gateway, "s");
    gateway.wait_until("open", |_| gateway.inspect(None).len() == 2);
    assert_eq!(odoo.count(PEEK), before);
}

#[test]
fn an_ended_session_is_closed_with_4001() {
    let odoo = Odoo::start();
    let settings = Settings { session_recheck: Duration::from_millis(300), ..vouching(&odoo) };
    let gateway = Gateway::with(settings);
    let mut worker = gateway.worker();
    odoo.answer("ended", Answer::Expired);
    let mut client = visitor(&gateway, "ended");
    client.subscribe("[]", 0);
    client.closed_with(4001, "");
    // At the next subscribe, where Odoo goes on with the public.
    let unhurried = Gateway::with(vouching(&odoo));
    let mut its_worker = unhurried.worker();
    let mut one = visitor(&unhurried, "s1");
    one.subscribe("[]", 0);
    its_worker.answer(&[]);
    odoo.answer("s1", Answer::Known("demo", 0, "Set-Cookie: session_id=new; Path=/\r\n"));
    one.subscribe(r#"["b"]"#, 0);
    one.closed_with(4001, "");
    // By itself: asked without is_first_poll, all sockets of the session.
    let (mut two, mut three) = (visitor(&gateway, "s2"), visitor(&gateway, "s2"));
    for client in [&mut two, &mut three] {
        client.subscribe("[]", 0);
        worker.answer(&[]);
    }
    odoo.wait("a check", |state| state.calls.iter().any(|call| call.params["is_first_poll"] == false));
    odoo.answer("s2", Answer::Expired);
    two.closed_with(4001, "SESSION_EXPIRED");
    three.closed_with(4001, "SESSION_EXPIRED");
}

#[test]
fn a_session_with_a_new_id_comes_back_and_learns_of_it() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let mut worker = gateway.worker();
    let mut first = visitor(&gateway, "old");
    first.subscribe("[]", 0);
    worker.answer(&[]);
    odoo.answer("old", Answer::Known("demo", 3, "Set-Cookie: session_id=new; HttpOnly; Path=/\r\n"));
    first.subscribe(r#"["b"]"#, 0);
    first.closed_with(4002, "");
    let url = format!("ws://127.0.0.1:{}/websocket?version=18.0-7", gateway.port);
    let mut request = url.into_client_request().unwrap();
    let origin = format!("http://127.0.0.1:{}", gateway.port);
    for (name, value) in [("Origin", origin.as_str()), ("Cookie", "frontend_lang=en; session_id=old")] {
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    let (socket, response) = tungstenite::client(request, gateway.tcp()).unwrap();
    assert_eq!(response.headers()["set-cookie"], "session_id=new; HttpOnly; Path=/");
    let mut client = Client { socket };
    client.subscribe(r#"["b"]"#, 0);
    worker.answer(&[]);
    worker.dispatch(&notifications(&[(9, "b")]));
    assert_eq!(client.ids(), [9]);
    let head = odoo.with(|state| state.calls.last().unwrap().head.clone());
    assert!(head.contains("session_id=new"), "{head}");
}

#[test]
fn equal_questions_share_a_call_and_few_are_asked_at_once() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(Settings { odoo_concurrency: 3, ..vouching(&odoo) });
    let mut worker = gateway.worker();
    odoo.with(|state| state.held = true);
    let mut clients: Vec<Client> = (0..60).map(|n| visitor(&gateway, &format!("s{}", n % 20))).collect();
    clients.iter_mut().for_each(|client| client.subscribe(r#"["a"]"#, 0));
    odoo.wait("three at once", |state| state.under_way == 3);
    gateway.wait_until("all wait", |net| {
        net.counters().messages_received.load(std::sync::atomic::Ordering::Relaxed) == 60
    });
    odoo.with(|state| state.held = false);
    (0..60).for_each(|_| worker.answer(&[]));
    worker.dispatch(&notifications(&[(1, "a")]));
    clients.iter_mut().for_each(|client| assert_eq!(client.ids(), [1]));
    assert_eq!(odoo.with(|state| state.most), 3);
    // The three that were under way when others asked the same were not shared.
    assert!(odoo.count(PEEK) <= 26, "{}", odoo.count(PEEK));
}

#[test]
fn an_odoo_that_fails_is_no_end_and_no_hang() {
    let odoo = Odoo::start();
    let mut gateway = Gateway::with(vouching(&odoo));
    let mut worker = gateway.worker();
    let bad = [
        "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",
        "HTTP/1.1 303 See Other\r\nLocation: /web/database/selector\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        "garbage\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"result\":",
        "",
    ];
    for (at, text) in bad.into_iter().enumerate() {
        let session = format!("bad{at}");
        odoo.answer(&session, Answer::Raw(text));
        let mut client = visitor(&gateway, &session);
        client.subscribe("[]", 0);
        client.closed_with(1013, "Odoo cannot be asked now");
    }
    odoo.answer("giant", Answer::Giant(5 << 20));
    let mut client = visitor(&gateway, "giant");
    client.subscribe("[]", 0);
    client.closed_with(1013, "Odoo cannot be asked now");
    odoo.answer("elsewhere", Answer::Known("unknown", 3, ""));
    let mut client = visitor(&gateway, "elsewhere");
    client.subscribe("[]", 0);
    client.closed_with(1013, "Odoo cannot be asked now");
    let mut good = visitor(&gateway, "good");
    good.subscribe("[]", 0);
    worker.answer(&[]);
    worker.dispatch(&notifications(&[(1, "broadcast")]));
    assert_eq!(good.ids(), [1]);
    gateway.wait_log(imbus::net::bridge::LogLevel::Warning, "could not ask Odoo at");
}

#[test]
fn an_odoo_that_hangs_holds_up_nobody_else() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(Settings { odoo_concurrency: 4, ..vouching(&odoo) });
    let mut worker = gateway.worker();
    let mut good = visitor(&gateway, "good");
    good.subscribe("[]", 0);
    worker.answer(&[]);
    let start = Instant::now();
    let mut hanging: Vec<Client> = (0..3)
        .map(|at| {
            let session = format!("hangs{at}");
            odoo.answer(&session, Answer::Never);
            let mut client = visitor(&gateway, &session);
            client.subscribe("[]", 0);
            client
        })
        .collect();
    odoo.wait("they hang", |state| state.under_way == 3);
    // Those who were let in hear, and others are let in.
    worker.dispatch(&notifications(&[(1, "broadcast")]));
    assert_eq!(good.ids(), [1]);
    let mut another = visitor(&gateway, "another");
    another.subscribe("[]", 0);
    worker.answer(&[]);
    worker.dispatch(&notifications(&[(2, "broadcast")]));
    assert_eq!((good.ids(), another.ids()), (vec![2], vec![2]));
    // A call has its end, and the places are free again. This is bounded, not timed.
    hanging.iter_mut().for_each(|client| {
        client.socket.get_mut().set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        client.closed_with(1013, "Odoo cannot be asked now");
    });
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[test]
fn forged_cookies_are_odoos_business_and_do_no_harm() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let mut worker = gateway.worker();
    let long = format!("session_id={}", "x".repeat(6000));
    let mut clients = Vec::new();
    for cookie in [
        "session_id=../../etc/passwd",
        "session_id=\"a;b\"",
        "session_id=a; session_id=b",
        "session_id=%0d%0aX: y",
        &long,
    ] {
        let mut client = gateway.open("?version=18.0-7", &[("Cookie", cookie)]);
        client.subscribe("[]", 0);
        worker.answer(&[]);
        let head = odoo.with(|state| state.calls.last().unwrap().head.clone());
        assert!(head.contains(&format!("cookie: {cookie}\r\n")), "{head}");
        assert!(!head.contains("\r\nX: y"), "{head}");
        clients.push(client);
    }
}

#[test]
fn who_leaves_while_it_is_asked_about_is_forgotten() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(Settings { odoo_concurrency: 1, ..vouching(&odoo) });
    let mut worker = gateway.worker();
    odoo.with(|state| state.held = true);
    let mut first = visitor(&gateway, "first");
    first.subscribe("[]", 0);
    odoo.wait("it is asked", |state| state.calls.len() == 1);
    for at in 0..20 {
        visitor(&gateway, &format!("gone{at}")).subscribe("[]", 0);
    }
    gateway.wait_until("they have left", |_| gateway.inspect(None).len() == 1);
    // One that changes its mind is asked about once more, for the last it said.
    first.subscribe(r#"["a"]"#, 0);
    first.subscribe(r#"["b"]"#, 0);
    gateway
        .wait_until("heard", |net| net.counters().messages_received.load(std::sync::atomic::Ordering::Relaxed) == 23);
    odoo.with(|state| state.held = false);
    worker.answer(&[]);
    worker.answer(&[]);
    worker.dispatch(&notifications(&[(1, "a"), (2, "b")]));
    assert_eq!(first.ids(), [2]);
    assert_eq!(odoo.count(PEEK), 2);
}

#[test]
fn presence_is_told_after_the_subscription_and_the_end_once() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let mut worker = gateway.worker();
    odoo.with(|state| state.held = true);
    let mut one = visitor(&gateway, "s1");
    one.subscribe("[]", 0);
    one.say(r#"{"event_name":"update_presence","data":{"inactivity_period":7,"im_status_ids_by_model":{}}}"#);
    odoo.wait("asked", |state| state.calls.len() == 1);
    odoo.with(|state| state.held = false);
    worker.answer(&[]);
    odoo.wait("presence", |state| state.calls.len() == 2);
    let call = odoo.with(|state| state.calls[1].clone());
    assert_eq!((call.path.as_str(), &call.params["inactivity_period"]), (PRESENCE, &serde_json::json!(7)));
    // Another session of the same user's, and another user.
    let mut two = visitor(&gateway, "s2");
    two.subscribe("[]", 0);
    worker.answer(&[]);
    odoo.answer("s3", Answer::Known("demo", 8, ""));
    let mut three = visitor(&gateway, "s3");
    three.subscribe("[]", 0);
    worker.answer(&[]);
    drop(one);
    drop(three);
    odoo.wait("the other has left", |state| state.calls.iter().any(|call| call.path == CLOSED));
    assert!(odoo.with(|state| state.calls.last().unwrap().head.contains("session_id=s3")));
    drop(two);
    odoo.wait("the user has left", |state| state.calls.iter().filter(|call| call.path == CLOSED).count() == 2);
    assert!(odoo.with(|state| state.calls.last().unwrap().head.contains("session_id=s2")));
}

#[test]
fn two_databases_with_the_same_partners_never_mix() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let (mut demo, _) = gateway.worker_of(DEMO);
    let (mut other, _) = gateway.worker_of(OTHER);
    odoo.answer("o", Answer::Known("other", 3, ""));
    let (mut one, mut two) = (visitor(&gateway, "d"), visitor(&gateway, "o"));
    one.subscribe("[]", 0);
    demo.answer(&[]);
    two.subscribe("[]", 0);
    other.answer(&[]);
    demo.dispatch(&notifications(&[(1, r#"["res.partner",3]"#)]));
    assert_eq!(one.ids(), [1]);
    other.dispatch(&notifications(&[(2, r#"["res.partner",3]"#)]));
    assert_eq!(two.ids(), [2]);
    demo.dispatch(&notifications(&[(3, "broadcast")]));
    assert_eq!(one.ids(), [3]);
}

#[test]
fn the_plain_endpoints_know_odoos_sessions_too() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let mut worker = gateway.worker();
    let call = |path: &str, cookie: &str, params: &str| {
        let body = format!(r#"{{"jsonrpc":"2.0","method":"call","id":9,"params":{params}}}"#);
        gateway.http(&format!(
            "POST {path} HTTP/1.1\r\nHost: h\r\n{cookie}Content-Type: application/json\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        ))
    };
    let answer = std::thread::scope(|scope| {
        let answer = scope.spawn(|| call(PEEK, "", r#"{"channels":["a"],"last":0}"#));
        worker.answer(&notifications(&[(1, "a")]));
        answer.join().unwrap()
    });
    assert!(answer.contains("Set-Cookie: session_id=given"), "{answer}");
    assert!(answer.contains(r#"["demo","broadcast"]"#) && answer.contains(r#""id": 1"#), "{answer}");
    odoo.answer("ended", Answer::Expired);
    let answer = call(PEEK, "Cookie: session_id=ended\r\n", r#"{"channels":[],"last":0}"#);
    assert!(answer.contains("\"code\": 100"), "{answer}");
    let answer = call(PRESENCE, "Cookie: session_id=s\r\n", r#"{"inactivity_period":5}"#);
    assert!(answer.contains("\"result\":{}"), "{answer}");
    assert_eq!(odoo.with(|state| state.calls.last().unwrap().params["inactivity_period"].clone()), 5);
    let answer = call(PEEK, "Cookie: session_id=s\r\n", r#"{"channels":[["res.partner",9]],"last":0}"#);
    assert!(answer.contains("builtins.ValueError"), "{answer}");
}

#[test]
fn a_page_behind_odoos_own_proxy_settings_is_let_in() {
    let odoo = Odoo::start();
    let ask = |gateway: &Gateway, origin: &str, forwarded: &str| {
        let request = format!(
            "GET /websocket?version=19.0-2 HTTP/1.1\r\nHost: odoochat\r\nOrigin: {origin}\r\n\
             X-Forwarded-Host: {forwarded}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Cookie: session_id=s\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        );
        let mut tcp = gateway.tcp();
        tcp.write_all(request.as_bytes()).unwrap();
        let mut head = [0; 12];
        tcp.read_exact(&mut head).unwrap();
        String::from_utf8_lossy(&head).into_owned()
    };
    let gateway = Gateway::with(vouching(&odoo));
    assert_eq!(ask(&gateway, "https://odoo.example", "odoo.example"), "HTTP/1.1 101");
    assert_eq!(ask(&gateway, "https://evil.example", "odoo.example"), "HTTP/1.1 403");
    // Where Odoo is not asked, it is not known what a proxy says.
    assert_eq!(ask(&Gateway::new(), "https://odoo.example", "odoo.example"), "HTTP/1.1 403");
}

#[test]
fn what_came_with_the_opening_is_heard_after_it() {
    let odoo = Odoo::start();
    let gateway = Gateway::with(vouching(&odoo));
    let mut worker = gateway.worker();
    odoo.answer("given", Answer::Known("demo", 0, ""));
    let mut tcp = gateway.tcp();
    let text = subscribe(r#"["a"]"#, 0);
    let mut bytes = "GET /websocket?version=18.0-7 HTTP/1.1\r\nHost: h\r\nOrigin: http://h\r\nConnection: Upgrade\r\n\
        Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        .as_bytes()
        .to_vec();
    bytes.extend([0x81, 0x80 | text.len() as u8, 0, 0, 0, 0]);
    bytes.extend(text.as_bytes());
    tcp.write_all(&bytes).unwrap();
    worker.answer(&[]);
    worker.dispatch(&notifications(&[(1, "a")]));
    let mut got = Vec::new();
    while !String::from_utf8_lossy(&got).contains("\"id\":1") {
        let mut more = [0; 4096];
        let count = tcp.read(&mut more).unwrap();
        assert!(count > 0);
        got.extend_from_slice(&more[..count]);
    }
}
