//! `imbus.auth = 'odoo'` on the network side: real sockets, an Odoo played by the test.

mod gateway;

use gateway::*;
use imbus::core::settings::{AuthMethod, Settings};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use tungstenite::client::IntoClientRequest;

/// What one call of Odoo's looked like.
#[derive(Clone, Debug)]
struct Call {
    path: String,
    head: String,
    params: serde_json::Value,
}

#[derive(Default)]
struct State {
    calls: Vec<Call>,
    under_way: usize,
    most: usize,
    /// By the session's id: what is answered. Without an entry: of user 3 in demo.
    answers: HashMap<String, Answer>,
    /// Calls wait as long as this is set.
    held: bool,
}

#[derive(Clone)]
enum Answer {
    /// Of this database and partner (0: the public), with these header lines.
    Known(&'static str, u32, &'static str),
    Expired,
    Raw(&'static str),
}

#[derive(Clone)]
struct Odoo {
    port: u16,
    state: Arc<(Mutex<State>, Condvar)>,
}

impl Odoo {
    fn start() -> Odoo {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let odoo = Odoo { port: listener.local_addr().unwrap().port(), state: Arc::default() };
        let served = odoo.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let odoo = served.clone();
                std::thread::spawn(move || odoo.serve(stream));
            }
        });
        odoo
    }

    fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        let result = look(&mut self.state.0.lock().unwrap());
        self.state.1.notify_all();
        result
    }

    fn wait(&self, what: &str, is_so: impl Fn(&State) -> bool) {
        let end = Instant::now() + PATIENCE;
        let mut state = self.state.0.lock().unwrap();
        while !is_so(&state) {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what}: {:?}", state.calls);
            state = self.state.1.wait_timeout(state, left).unwrap().0;
        }
    }

    fn answer(&self, session: &str, answer: Answer) {
        self.with(|state| state.answers.insert(session.to_owned(), answer));
    }

    fn count(&self, path: &str) -> usize {
        self.with(|state| state.calls.iter().filter(|call| call.path == path).count())
    }

    fn serve(&self, stream: TcpStream) {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut stream = stream;
        loop {
            let (mut head, mut length) = (String::new(), 0);
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap_or(0) == 0 {
                    return;
                }
                if let Some((name, value)) = line.split_once(':')
                    && name.eq_ignore_ascii_case("content-length")
                {
                    length = value.trim().parse().unwrap();
                }
                head.push_str(&line);
                if line == "\r\n" {
                    break;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            let path = head.split(' ').nth(1).unwrap().to_owned();
            let session = head.split("session_id=").nth(1).unwrap_or("");
            let session = session.split([';', '\r']).next().unwrap_or("").to_owned();
            let params = body["params"].clone();
            let answer = self.with(|state| {
                state.calls.push(Call { path: path.clone(), head: head.clone(), params: params.clone() });
                state.under_way += 1;
                state.most = state.most.max(state.under_way);
                state.answers.get(&session).cloned()
            });
            self.wait("let go", |state| !state.held);
            let none = if session.is_empty() { "Set-Cookie: session_id=given; HttpOnly; Path=/\r\n" } else { "" };
            let answer = answer.unwrap_or(Answer::Known("demo", if session.is_empty() { 0 } else { 3 }, none));
            let text = match answer {
                Answer::Raw(text) => text.to_owned(),
                Answer::Expired => response(
                    "",
                    r#"{"jsonrpc":"2.0","id":1,"error":{"code":100,"message":"Odoo Session Expired","data":{"name":"odoo.http.SessionExpiredException"}}}"#,
                ),
                Answer::Known(..) if path != "/websocket/peek_notifications" => {
                    response("", r#"{"jsonrpc":"2.0","id":1,"result":{}}"#)
                }
                Answer::Known(database, partner, lines) => {
                    let mut channels = vec![serde_json::json!([database, "broadcast"])];
                    for asked in params["channels"].as_array().unwrap() {
                        if asked.as_str().unwrap() != "secret" {
                            channels.push(serde_json::json!([database, asked]));
                        }
                    }
                    if partner > 0 {
                        channels.push(serde_json::json!([database, "res.partner", partner]));
                    }
                    let result = serde_json::json!({"channels": channels, "notifications": []});
                    response(lines, &serde_json::json!({"jsonrpc": "2.0", "id": 1, "result": result}).to_string())
                }
            };
            self.with(|state| state.under_way -= 1);
            if stream.write_all(text.as_bytes()).is_err() {
                return;
            }
        }
    }
}

fn response(lines: &str, body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{lines}Content-Length: {}\r\n\r\n{body}", body.len())
}

fn vouching(odoo: &Odoo) -> Settings {
    let auth = vec![AuthMethod::Token, AuthMethod::Odoo];
    Settings { auth, odoo_url: format!("http://127.0.0.1:{}", odoo.port), ..settings() }
}

fn visitor(gateway: &Gateway, session: &str) -> Client {
    let cookie = format!("frontend_lang=en; session_id={session}");
    gateway.open("?version=18.0-7", &[("User-Agent", "browser"), ("Cookie", &cookie)])
}

const PEEK: &str = "/websocket/peek_notifications";
const PRESENCE: &str = "/websocket/update_bus_presence";
const CLOSED: &str = "/websocket/on_closed";

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
    let mut one = visitor(&gateway, "s1");
    one.subscribe("[]", 0);
    worker.answer(&[]);
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
    ];
    for (at, text) in bad.into_iter().enumerate() {
        let session = format!("bad{at}");
        odoo.answer(&session, Answer::Raw(text));
        let mut client = visitor(&gateway, &session);
        client.subscribe("[]", 0);
        client.closed_with(1013, "Odoo cannot be asked now");
    }
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
