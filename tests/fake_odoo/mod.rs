//! An Odoo played by the tests: the routes that imbus calls, sessions by their ids, and all that can go wrong.

// Each test uses a part of it.
#![allow(dead_code)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// How long anything may take that is to happen.
const PATIENCE: Duration = Duration::from_secs(30);

pub const PEEK: &str = "/websocket/peek_notifications";
pub const PRESENCE: &str = "/websocket/update_bus_presence";
pub const CLOSED: &str = "/websocket/on_closed";

/// What one call looked like.
#[derive(Clone, Debug)]
pub struct Call {
    pub path: String,
    pub head: String,
    pub params: serde_json::Value,
}

#[derive(Default)]
pub struct State {
    pub calls: Vec<Call>,
    pub under_way: usize,
    pub most: usize,
    /// By the session's id: what is answered. Without an entry: of user 3 in demo.
    pub answers: HashMap<String, Answer>,
    /// Calls wait as long as this is set.
    pub held: bool,
    /// Visitors without a session get one of their own each, as from the real one: `fresh1`, `fresh2`, …
    pub fresh: bool,
    /// It is down: nobody listens.
    down: bool,
    connections: Vec<TcpStream>,
    /// How many connections were ever made to it.
    pub accepted: usize,
}

#[derive(Clone)]
pub enum Answer {
    /// Of this database and partner (0: the public), with these header lines.
    Known(&'static str, u32, &'static str),
    Expired,
    /// As the real one does with a session that has ended: the first poll makes a public one, any other call is told.
    Ended(&'static str),
    /// These bytes, after which it hangs up.
    Raw(&'static str),
    /// Nothing, ever.
    Never,
    /// So many bytes of white space before the answer.
    Giant(usize),
    /// This JSON as the list of channels.
    Channels(&'static str),
    /// An answer that comes byte by byte and never ends, with its head whole.
    Dribble,
    /// As [`Answer::Known`] while somebody waits for it (`is_first_poll`), never when a session is checked.
    NeverChecked(&'static str, u32),
}

#[derive(Clone)]
pub struct Odoo {
    pub port: u16,
    pub state: Arc<(Mutex<State>, Condvar)>,
}

impl Odoo {
    pub fn start() -> Odoo {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let odoo = Odoo { port: listener.local_addr().unwrap().port(), state: Arc::default() };
        odoo.listen(listener);
        odoo
    }

    fn listen(&self, listener: TcpListener) {
        let served = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if served.with(|state| state.down) {
                    return;
                }
                let odoo = served.clone();
                odoo.with(|state| {
                    state.accepted += 1;
                    state.connections.push(stream.try_clone().unwrap());
                });
                std::thread::spawn(move || {
                    let ends = stream.try_clone().unwrap();
                    odoo.serve(stream);
                    // Another hold on it is kept, so that it ends only when told.
                    let _ = ends.shutdown(Shutdown::Both);
                });
            }
        });
    }

    /// Goes down with all its connections.
    pub fn stop(&self) {
        self.with(|state| state.down = true);
        // The listener looks at that when somebody comes.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        let end = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
            assert!(Instant::now() < end, "the listener does not go");
            std::thread::yield_now();
        }
        self.with(|state| state.connections.drain(..).for_each(|stream| drop(stream.shutdown(Shutdown::Both))));
    }

    /// Comes back on the same port.
    pub fn come_back(&self) {
        self.with(|state| state.down = false);
        self.listen(TcpListener::bind(("127.0.0.1", self.port)).unwrap());
    }

    pub fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        let result = look(&mut self.state.0.lock().unwrap());
        self.state.1.notify_all();
        result
    }

    pub fn wait(&self, what: &str, is_so: impl Fn(&State) -> bool) {
        let end = Instant::now() + PATIENCE;
        let mut state = self.state.0.lock().unwrap();
        while !is_so(&state) {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what}: {:?}", state.calls);
            state = self.state.1.wait_timeout(state, left).unwrap().0;
        }
    }

    pub fn answer(&self, session: &str, answer: Answer) {
        self.with(|state| state.answers.insert(session.to_owned(), answer));
    }

    pub fn count(&self, path: &str) -> usize {
        self.with(|state| state.calls.iter().filter(|call| call.path == path).count())
    }

    pub fn serve(&self, stream: TcpStream) {
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
            if reader.read_exact(&mut body).is_err() {
                return;
            }
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            let path = head.split(' ').nth(1).unwrap().to_owned();
            let session = head.split("session_id=").nth(1).unwrap_or("");
            let session = session.split([';', '\r']).next().unwrap_or("").to_owned();
            let params = body["params"].clone();
            let (answer, number) = self.with(|state| {
                state.calls.push(Call { path: path.clone(), head: head.clone(), params: params.clone() });
                state.under_way += 1;
                state.most = state.most.max(state.under_way);
                (state.answers.get(&session).cloned(), state.calls.len())
            });
            self.wait("let go", |state| !state.held);
            let none = if session.is_empty() { "Set-Cookie: session_id=given; HttpOnly; Path=/\r\n" } else { "" };
            let mut answer = answer.unwrap_or(Answer::Known("demo", if session.is_empty() { 0 } else { 3 }, none));
            if let Answer::NeverChecked(database, partner) = answer {
                let is_check = path == PEEK && params["is_first_poll"] != true;
                answer = if is_check { Answer::Never } else { Answer::Known(database, partner, "") };
            }
            if let Answer::Ended(database) = answer {
                let is_first = path == PEEK && params["is_first_poll"] == true;
                let lines = "Set-Cookie: session_id=public; HttpOnly; Path=/\r\n";
                answer = if is_first { Answer::Known(database, 0, lines) } else { Answer::Expired };
            }
            let text = match answer {
                Answer::Raw(text) => {
                    self.with(|state| state.under_way -= 1);
                    let _ = stream.write_all(text.as_bytes());
                    return;
                }
                Answer::Never => {
                    let _ = reader.read(&mut [0]);
                    self.with(|state| state.under_way -= 1);
                    return;
                }
                Answer::Dribble => {
                    dribble(&mut stream);
                    self.with(|state| state.under_way -= 1);
                    return;
                }
                Answer::NeverChecked(..) | Answer::Ended(_) => unreachable!("decided above"),
                Answer::Channels(_) if path != PEEK => response("", r#"{"jsonrpc":"2.0","id":1,"result":{}}"#),
                Answer::Channels(channels) => response(
                    "",
                    &format!(r#"{{"jsonrpc":"2.0","id":1,"result":{{"channels":{channels},"notifications":[]}}}}"#),
                ),
                Answer::Giant(length) => response("", &" ".repeat(length)),
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
                    let fresh = session.is_empty() && self.with(|state| state.fresh);
                    let own = format!("Set-Cookie: session_id=fresh{number}; HttpOnly; Path=/\r\n");
                    let lines = if fresh { own.as_str() } else { lines };
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

/// Says a head, and then a byte now and then until nobody listens.
fn dribble(stream: &mut TcpStream) {
    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n{");
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    loop {
        // The pause between two bytes: nothing more is said to it.
        match stream.read(&mut [0]) {
            Ok(_) => return,
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
            Err(_) => return,
        }
        if stream.write_all(b" ").is_err() {
            return;
        }
    }
}

/// The same answer in chunks.
pub fn chunked(body: &str) -> String {
    let (one, two) = body.split_at(body.len() / 2);
    format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n\
         {:x}\r\n{one}\r\n{:x}\r\n{two}\r\n0\r\n\r\n",
        one.len(),
        two.len()
    )
}

pub fn response(lines: &str, body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{lines}Content-Length: {}\r\n\r\n{body}", body.len())
}
