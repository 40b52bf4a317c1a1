//! The part of an Odoo with the add-on that runs jobs, played by the tests: it takes the calls of imbus and settles jobs
//! through SQL, or does all that can go wrong.

use postgres::Client;
use serde_json::Value;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// How long anything may take that is to happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// What it does with the jobs of a method.
#[allow(dead_code)]
#[derive(Clone, Copy)]
pub enum Does {
    /// Ends them, with the method's name as the result.
    Finish,
    /// The same, when [`OdooRunner::let_go`] is called.
    Wait,
    /// Answers with this status, and does nothing.
    Answer(u16),
    HangUp,
}

/// A call as it came.
#[allow(dead_code)]
#[derive(Clone, Debug)]
pub struct Call {
    pub head: String,
    pub body: Value,
    method: String,
}

#[derive(Default)]
struct State {
    calls: Vec<Call>,
    /// The ids of the jobs that it began, in order.
    began: Vec<i64>,
    does: HashMap<String, Does>,
    databases: HashMap<String, Arc<Mutex<Client>>>,
    /// The statement that settles a job, with its id, token and method.
    settle: Option<&'static str>,
    connections: Vec<TcpStream>,
    is_down: bool,
    /// Connections are taken and closed at once, as a front does whose Odoo is down.
    is_deaf: bool,
    turned_away: usize,
    has_let_go: bool,
    under_way: usize,
    most: usize,
    refused: usize,
}

// Each test uses a part of it.
#[allow(dead_code)]
#[derive(Clone)]
pub struct OdooRunner {
    pub port: u16,
    state: Arc<(Mutex<State>, Condvar)>,
}

#[allow(dead_code)]
impl OdooRunner {
    pub fn start() -> OdooRunner {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let odoo = OdooRunner { port: listener.local_addr().unwrap().port(), state: Arc::default() };
        odoo.listen(listener);
        odoo
    }

    /// It may settle jobs of the database that this client is connected to.
    pub fn connect(&self, mut client: Client) {
        let name: String = client.query_one("SELECT current_database()::text", &[]).unwrap().get(0);
        self.with(|state| state.databases.insert(name, Arc::new(Mutex::new(client))));
    }

    /// Jobs are settled by this statement, with their id, token and method.
    pub fn settle_with(&self, statement: &'static str) {
        self.with(|state| state.settle = Some(statement));
    }

    pub fn does(&self, method: &str, what: Does) {
        self.with(|state| state.does.insert(method.to_owned(), what));
    }

    /// Takes connections and closes them, or does not any more.
    pub fn be_deaf(&self, is_deaf: bool) {
        self.with(|state| state.is_deaf = is_deaf);
    }

    /// How many connections were closed so.
    pub fn turned_away(&self) -> usize {
        self.with(|state| state.turned_away)
    }

    pub fn let_go(&self) {
        self.with(|state| state.has_let_go = true);
    }

    pub fn hold(&self) {
        self.with(|state| state.has_let_go = false);
    }

    pub fn calls(&self) -> Vec<Call> {
        self.with(|state| state.calls.clone())
    }

    /// How often it began this job.
    pub fn times(&self, id: i64) -> usize {
        self.with(|state| state.began.iter().filter(|began| **began == id).count())
    }

    /// How often it was called with a job of this method first.
    pub fn count(&self, method: &str) -> usize {
        self.with(|state| state.calls.iter().filter(|call| call.method == method).count())
    }

    /// How many jobs it was refused to settle, since they were not its own any more.
    pub fn refused(&self) -> usize {
        self.with(|state| state.refused)
    }

    /// The most that were under way at the same time.
    pub fn most(&self) -> usize {
        self.with(|state| state.most)
    }

    pub fn wait(&self, what: &str, is_so: impl Fn(&[Call]) -> bool) {
        self.until(what, |state| is_so(&state.calls));
    }

    /// Goes down with all its connections.
    pub fn stop(&self) {
        self.with(|state| state.is_down = true);
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
        self.with(|state| state.is_down = false);
        self.listen(TcpListener::bind(("127.0.0.1", self.port)).unwrap());
    }

    fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        let result = look(&mut self.state.0.lock().unwrap());
        self.state.1.notify_all();
        result
    }

    fn until(&self, what: &str, is_so: impl Fn(&State) -> bool) {
        let end = Instant::now() + PATIENCE;
        let mut state = self.state.0.lock().unwrap();
        while !is_so(&state) {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "in vain: {what}: {:?}", state.calls);
            state = self.state.1.wait_timeout(state, left).unwrap().0;
        }
    }

    fn listen(&self, listener: TcpListener) {
        let odoo = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if odoo.with(|state| state.is_down) {
                    return;
                }
                odoo.with(|state| state.connections.push(stream.try_clone().unwrap()));
                let odoo = odoo.clone();
                std::thread::spawn(move || {
                    let ends = stream.try_clone().unwrap();
                    odoo.serve(stream);
                    // Another hold on it is kept, so that it ends only when told.
                    let _ = ends.shutdown(Shutdown::Both);
                });
            }
        });
    }

    /// One call on one connection, as Odoo's workers do.
    fn serve(&self, mut stream: TcpStream) {
        if self.with(|state| {
            state.turned_away += usize::from(state.is_deaf);
            state.is_deaf
        }) {
            return;
        }
        let Some((head, body)) = read(&stream) else { return };
        if body["id"] == 0 {
            // No job's: the add-on says so, and is there.
            let _ = write!(stream, "HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{{}}");
            return;
        }
        let (database, mut id) = (body["db"].as_str().unwrap().to_owned(), body["id"].as_i64().unwrap());
        let token = body["token"].as_str().unwrap().to_owned();
        let client = self.with(|state| state.databases.get(&database).cloned());
        self.with(|state| {
            state.under_way += 1;
            state.most = state.most.max(state.under_way);
        });
        let mut status = self.run(client.as_ref(), id, &token, Some((head, body)));
        while status == Some(200)
            && let Some(next) = client.as_ref().and_then(|client| following(client, id, &token))
        {
            id = next;
            match self.run(client.as_ref(), id, &token, None) {
                // Those that had to wait have been given back, this one before it was begun.
                Some(409) => {
                    self.with(|state| {
                        let last = state.began.iter().rposition(|began| *began == id);
                        last.map(|place| state.began.remove(place))
                    });
                    break;
                }
                next => status = next,
            }
        }
        self.with(|state| state.under_way -= 1);
        if let Some(status) = status {
            let _ = write!(stream, "HTTP/1.1 {status} Status\r\nContent-Length: 2\r\n\r\n{{}}");
        }
    }

    /// Runs a job: the status to answer with, None to hang up.
    fn run(
        &self,
        client: Option<&Arc<Mutex<Client>>>,
        id: i64,
        token: &str,
        call: Option<(String, Value)>,
    ) -> Option<u16> {
        let method: String = client.map_or_else(String::new, |client| {
            let row = client.lock().unwrap().query_one("SELECT method::text FROM ir_async WHERE id = $1", &[&id]);
            row.map_or_else(|_| String::new(), |row| row.get(0))
        });
        let does = self.with(|state| {
            state.calls.extend(call.map(|(head, body)| Call { head, body, method: method.clone() }));
            state.began.push(id);
            state.does.get(&method).copied().unwrap_or(Does::Finish)
        });
        if let Does::Wait = does {
            self.until("let go", |state| state.has_let_go);
        }
        let status = match does {
            Does::HangUp => None,
            Does::Answer(status) => Some(status),
            Does::Finish | Does::Wait => {
                let finish =
                    self.with(|state| state.settle).unwrap_or("SELECT ir_async_finish($1, $2, to_jsonb($3::text))");
                match client?.lock().unwrap().execute(finish, &[&id, &token, &method]) {
                    Ok(_) => Some(200),
                    Err(error) if error.code().is_some() => Some(409),
                    // Its database is gone: an Odoo says so before it begins anything.
                    Err(_) => Some(503),
                }
            }
        };
        self.with(|state| state.refused += usize::from(status == Some(409)));
        status
    }
}

/// The job that follows under the same token, and can be begun.
fn following(client: &Mutex<Client>, id: i64, token: &str) -> Option<i64> {
    let text = "SELECT n.id FROM (SELECT f.id FROM ir_async f, ir_async j
                 WHERE j.id = $1 AND f.token = $2 AND f.state = 'processing' AND (f.run_at, f.id) > (j.run_at, j.id)
                 ORDER BY f.run_at, f.id LIMIT 1) n, ir_async_begin(n.id, $2)";
    client.lock().unwrap().query_opt(text, &[&id, &token]).ok().flatten().map(|row| row.get(0))
}

fn read(stream: &TcpStream) -> Option<(String, Value)> {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    while !head.ends_with("\r\n\r\n") {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return None;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().unwrap();
        }
        head.push_str(&line);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((head, serde_json::from_slice(&body).ok()?))
}
