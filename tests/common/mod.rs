//! Throw-away PostgreSQL clusters with imbus preloaded, and a websocket client, for the integration tests. Servers are
//! private (own data directory, own port, loopback only) and stopped when their `Cluster` is dropped.
#![allow(dead_code)] // each test file uses its own part

#[path = "../steady/mod.rs"]
pub mod steady;

use postgres::{Client, NoTls};
use serde_json::{Value, json};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use steady::Steady;
use tungstenite::client::IntoClientRequest;
use tungstenite::{Message, WebSocket};

/// Longest wait for anything; reached only when something is broken.
pub const PATIENCE: Duration = Duration::from_secs(30);

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// The ports that servers of tests listen on, and how many there are.
const FIRST_PORT: u16 = 20_000;
const PORTS: u32 = 10_000;

/// A running private cluster.
pub struct Cluster {
    pub dir: PathBuf,
    pub port: u16,
}

/// Waits until `condition` holds; panics with `what` after [`PATIENCE`].
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < until, "not in {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Makes ten round trips and gives them [`PATIENCE`] in all: enough only when the worker is told of each, as its own
/// look-out comes every 5 s.
pub fn promptly(mut round_trip: impl FnMut(i32)) {
    let until = Instant::now() + PATIENCE;
    for number in 0..10 {
        round_trip(number);
        assert!(Instant::now() < until, "round trip {number} was not announced to the worker");
    }
}

pub fn pg_config(what: &str) -> String {
    let program = std::env::var("PG_CONFIG").unwrap_or_else(|_| "pg_config".into());
    let output = Command::new(program).arg(what).output().expect("pg_config");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn is_root() -> bool {
    let output = Command::new("id").arg("-u").output().expect("id");
    output.stdout.starts_with(b"0")
}

/// A port nobody listens on right now. Outside the range that systems choose from, where another test's connection might
/// take it before it is used.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let own = || std::process::id().wrapping_mul(131).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
    (0..PORTS)
        .map(|_| FIRST_PORT + (own() % PORTS) as u16)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("a free port")
}

impl Cluster {
    /// A cluster with imbus preloaded and its port chosen freely.
    pub fn start() -> Cluster {
        Cluster::start_with(&[])
    }

    /// The same with further lines for postgresql.conf, which win over the usual ones.
    pub fn start_with(lines: &[&str]) -> Cluster {
        let control = Path::new(&pg_config("--sharedir")).join("extension/imbus.control");
        assert!(control.exists(), "{} is missing: make && make install first", control.display());
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("imbus-it-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        if is_root() {
            assert!(Command::new("chown").arg("postgres").arg(&dir).status().unwrap().success());
        }
        let cluster = Cluster { dir, port: free_port() };
        cluster.run("initdb", &["-D", &cluster.data(), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]);
        let mut conf = format!(
            "port = {}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{}'\nfsync = off\n\
             shared_preload_libraries = 'imbus'\nmax_worker_processes = 20\nimbus.port = 0\n",
            cluster.port,
            cluster.dir.display()
        );
        for line in lines {
            conf.push_str(line);
            conf.push('\n');
        }
        let path = cluster.dir.join("data/postgresql.conf");
        let usual = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, usual + &conf).unwrap();
        cluster.pg_ctl(&["-w", "start"]);
        cluster
    }

    fn data(&self) -> String {
        self.dir.join("data").display().to_string()
    }

    /// Where the server logs.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// What the server has logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Runs one of PostgreSQL's programs as the user that may; panics when it fails.
    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        let program = Path::new(&pg_config("--bindir")).join(program).display().to_string();
        let mut words = vec![program.as_str()];
        if is_root() {
            words = vec!["setpriv", "--reuid", "postgres", "--regid", "postgres", "--init-groups", &program];
        }
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).args(arguments).current_dir(&self.dir).stdin(Stdio::null());
        // pg_ctl's child keeps inherited pipes open: its output goes to a file.
        let out = self.dir.join("command.out");
        let file = std::fs::File::create(&out).unwrap();
        let status = command.stdout(file.try_clone().unwrap()).stderr(file).status().unwrap();
        let text = std::fs::read_to_string(&out).unwrap_or_default();
        assert!(status.success(), "{program} {arguments:?}: {text}\n{}", self.log());
        text
    }

    /// `pg_ctl` on this cluster, e.g. `["-m", "immediate", "-w", "restart"]`.
    pub fn pg_ctl(&self, arguments: &[&str]) {
        let (data, log) = (self.data(), self.log_path().display().to_string());
        let mut all = vec!["-D", &data, "-l", &log, "-t", "60"];
        all.extend(arguments);
        self.run("pg_ctl", &all);
    }

    /// The number of the server's first process.
    pub fn postmaster(&self) -> i32 {
        let lock = std::fs::read_to_string(self.dir.join("data/postmaster.pid")).unwrap();
        lock.lines().next().unwrap().parse().unwrap()
    }

    /// kill -9 of the server itself: its processes end by themselves, and it is started again.
    pub fn kill_server(&self) {
        let postmaster = self.postmaster();
        kill_9(postmaster);
        self.start_after(postmaster);
    }

    /// Starts the server again once this postmaster and all its processes have ended.
    pub fn start_after(&self, postmaster: i32) {
        let data = self.dir.join("data").canonicalize().unwrap();
        let is_one = |process: &Path| std::fs::read_link(process.join("cwd")).is_ok_and(|folder| folder == data);
        eventually("the server's processes have ended", || {
            // As long as init has not taken note of its end, its number is in use.
            !try_signal(postmaster, 0)
                && !std::fs::read_dir("/proc").unwrap().flatten().any(|process| is_one(&process.path()))
        });
        self.pg_ctl(&["-w", "start"]);
    }

    /// Waits until no session of a superuser's is in a database, such as one of autovacuum's or one that is just ending: nobody
    /// else may terminate it.
    pub fn left_by_superusers(&self, database: &str) {
        let mut sql = self.connect("postgres");
        let text = "SELECT FROM pg_stat_activity WHERE datname = $1
                       AND (backend_type = 'autovacuum worker' OR backend_type = 'client backend' AND usename = 'postgres')";
        eventually("superusers have left it", || sql.query(text, &[&database]).unwrap().is_empty());
    }

    /// A connection to a database as a role.
    pub fn connect_as(&self, database: &str, role: &str) -> Client {
        self.try_connect(database, role).unwrap_or_else(|error| panic!("{error}\n{}", self.log()))
    }

    /// The same, with the error.
    pub fn try_connect(&self, database: &str, role: &str) -> Result<Client, postgres::Error> {
        Client::connect(&format!("host=127.0.0.1 port={} user={role} dbname={database}", self.port), NoTls)
    }

    /// A connection as superuser.
    pub fn connect(&self, database: &str) -> Client {
        self.connect_as(database, "postgres")
    }

    /// Creates a database with the extension and waits until it is served.
    pub fn database(&self, name: &str) -> Client {
        self.database_with(name, "")
    }

    /// The same with tables made before the extension comes.
    pub fn database_with(&self, name: &str, before: &str) -> Client {
        self.connect("postgres").batch_execute(&format!("CREATE DATABASE {name}")).unwrap();
        let mut client = self.connect(name);
        client.batch_execute(before).unwrap();
        client.batch_execute("CREATE EXTENSION imbus").unwrap();
        self.wait_served(name);
        client
    }

    /// Waits until the gateway listens and the worker of the database runs. `postgres` needs no extension for this.
    pub fn wait_served(&self, database: &str) {
        let mut client = self.connect(database);
        eventually(&format!("database {database} is served"), || {
            // A server that is about to go down may have taken this session with it.
            if client.is_closed()
                && let Ok(another) = self.try_connect(database, "postgres")
            {
                client = another;
            }
            client
                .query_opt(
                    "SELECT 1 FROM imbus_stat_gateway g, imbus_stat_bus b
                      WHERE g.port IS NOT NULL AND b.pid IS NOT NULL AND b.datname = current_database()",
                    &[],
                )
                .is_ok_and(|row| row.is_some())
        });
        // The views know of a worker before the gateway lets its clients in.
        eventually(&format!("clients of database {database} are let in"), || {
            let path = format!("/websocket?version=18.0-7&token={}", token(&mut client, &json!(["*"])));
            Socket::open_path(self.ws_port(&mut client), &path, &[]).is_ok_and(|mut socket| socket.is_let_in())
        });
    }

    /// The gateway's real port, asked for in a database that has the extension.
    pub fn ws_port(&self, client: &mut Client) -> u16 {
        let mut port = None;
        eventually("the gateway listens", || {
            port = client
                .query_opt("SELECT port FROM imbus_stat_gateway WHERE port IS NOT NULL", &[])
                .ok()
                .flatten()
                .map(|row| row.get::<_, i32>(0));
            port.is_some()
        });
        u16::try_from(port.unwrap()).unwrap()
    }

    /// Opens a websocket with a token for these channels (JSON, e.g. `["broadcast"]`), made in the client's database.
    pub fn socket(&self, client: &mut Client, channels: Value) -> Socket {
        let token = token(client, &channels);
        Socket::open(self.ws_port(client), &token)
    }

    /// Opens a websocket and subscribes to all the channels of its token; waits until the gateway has taken that.
    pub fn subscriber(&self, client: &mut Client, channels: Value, last: i64) -> Socket {
        let mut socket = self.socket(client, channels.clone());
        socket.subscribe(channels, last);
        socket.sync(client);
        socket
    }
}

/// The cluster that the tests of one file share, with room for many databases; it is stopped when the process ends. For
/// tests that change nothing the others see.
pub fn shared() -> Shared {
    shared_with(&[])
}

/// The same with more lines of postgresql.conf, the same ones at each call.
pub fn shared_with(lines: &[&str]) -> Shared {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    extern "C" fn at_exit() {
        if let Some(cluster) = CLUSTER.get() {
            cluster.stop();
        }
    }
    Shared(CLUSTER.get_or_init(|| {
        let cluster = Cluster::start_with(&[&["max_worker_processes = 64"], lines].concat());
        // SAFETY: the callback cannot unwind: it looks at files and signals, and ignores what fails.
        assert_eq!(unsafe { libc::atexit(at_exit) }, 0);
        cluster
    }))
}

/// One test's hold on the shared cluster; shows the log when the test fails.
pub struct Shared(&'static Cluster);

impl std::ops::Deref for Shared {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        self.0
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.0.show_log_of_failure();
    }
}

impl Cluster {
    fn show_log_of_failure(&self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(60).collect();
            eprintln!("--- log of the server");
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }

    fn stop(&self) {
        let pid = std::fs::read_to_string(self.dir.join("data/postmaster.pid"));
        if let Some(pid) = pid.ok().and_then(|text| text.lines().next().map(str::to_owned)) {
            if !try_signal(pid.parse().unwrap_or(0), libc::SIGQUIT) {
                eprintln!("process {pid} of {} could not be stopped", self.dir.display());
            }
            let path = PathBuf::from(format!("/proc/{pid}"));
            let until = Instant::now() + PATIENCE;
            while path.exists() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.show_log_of_failure();
        self.stop();
    }
}

/// The SQLSTATE with which a statement was refused.
pub fn refusal(result: Result<Vec<postgres::Row>, postgres::Error>) -> String {
    result.expect_err("refused").code().expect("an error of the server").code().to_owned()
}

/// Ends a process as the kernel would.
pub fn kill_9(pid: i32) {
    assert!(try_signal(pid, libc::SIGKILL), "process {pid}");
}

/// Sends a signal to one process of a private cluster.
pub fn signal_to(pid: i32, number: i32) {
    assert!(try_signal(pid, number), "process {pid}");
}

/// Sends a signal to one process of a private cluster; whether it could.
pub fn try_signal(pid: i32, signal: i32) -> bool {
    // SAFETY: no memory is touched; the pid was just read from the cluster itself.
    pid > 1 && unsafe { libc::kill(pid, signal) } == 0
}

/// Waits until the server has come back from its crash recovery and serves the database.
pub fn recovered(cluster: &Cluster, database: &str) -> Client {
    let mut client = None;
    eventually("the server has recovered", || {
        client = cluster.try_connect(database, "postgres").ok();
        client.as_mut().is_some_and(|client| client.simple_query("SELECT 1").is_ok())
    });
    cluster.wait_served(database);
    client.unwrap()
}

/// A token for these channels of the client's database.
pub fn token(client: &mut Client, channels: &Value) -> String {
    client.query_one("SELECT bus_token($1::text::jsonb, subject => 'test')", &[&channels.to_string()]).unwrap().get(0)
}

/// Sends bytes to the gateway and returns all it answers until it ends the connection; panics when it does not.
pub fn exchange(port: u16, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // The gateway may have answered and gone before it has read all: that shows in what is read.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            panic!("the connection did not end: {:?}", String::from_utf8_lossy(&answer))
        }
        _ => String::from_utf8_lossy(&answer).into_owned(),
    }
}

/// The HTTP status of an answer, 0 when it is none.
pub fn status(answer: &str) -> u16 {
    answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|code| code.parse().ok()).unwrap_or(0)
}

/// A websocket client.
pub struct Socket {
    pub ws: WebSocket<Steady>,
    waiting: Vec<Value>,
}

/// What ended a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    Close(u16, String),
    Dropped,
}

impl Socket {
    /// Connects with a token in the query.
    pub fn open(port: u16, token: &str) -> Socket {
        Socket::open_path(port, &format!("/websocket?version=18.0-7&token={token}"), &[])
            .unwrap_or_else(|error| panic!("handshake: {error}"))
    }

    /// Connects to a path with an Origin of the same host and further headers.
    pub fn open_path(port: u16, path: &str, headers: &[(&'static str, &str)]) -> Result<Socket, tungstenite::Error> {
        let mut request = format!("ws://127.0.0.1:{port}{path}").into_client_request()?;
        request.headers_mut().insert("Origin", format!("http://127.0.0.1:{port}").parse().unwrap());
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        let stream = TcpStream::connect(("127.0.0.1", port)).map_err(tungstenite::Error::Io)?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        match tungstenite::client(request, Steady(stream)) {
            Ok((ws, _)) => Ok(Socket { ws, waiting: Vec::new() }),
            Err(tungstenite::HandshakeError::Failure(error)) => Err(error),
            Err(tungstenite::HandshakeError::Interrupted(_)) => panic!("handshake interrupted"),
        }
    }

    /// Sends a message as it is.
    pub fn send(&mut self, text: &str) {
        self.ws.send(Message::text(text)).unwrap();
    }

    /// Whether the gateway keeps the connection: it answers a ping instead of closing.
    pub fn is_let_in(&mut self) -> bool {
        let _ = self.ws.send(Message::Ping(Vec::new().into()));
        matches!(self.ws.read(), Ok(Message::Pong(_)))
    }

    /// Subscribes; returns without an answer, as there is none.
    pub fn subscribe(&mut self, channels: Value, last: i64) {
        self.send(&json!({"event_name": "subscribe", "data": {"channels": channels, "last": last}}).to_string());
    }

    /// Waits until the gateway shows this connection with a subscription.
    pub fn sync(&mut self, client: &mut Client) {
        self.sync_to(client, "> 0");
    }

    /// Waits until the gateway shows this connection with such a number of channels, e.g. `= 2`.
    pub fn sync_to(&mut self, client: &mut Client, channels: &str) {
        let address = self.ws.get_ref().local_addr().unwrap().to_string();
        let query = format!("SELECT 1 FROM imbus_stat_connections WHERE address = $1 AND channels {channels}");
        let until = Instant::now() + PATIENCE;
        while client.query_opt(&query, &[&address]).unwrap().is_none() {
            if Instant::now() > until {
                self.ws.get_ref().set_read_timeout(Some(Duration::from_millis(100))).unwrap();
                panic!("the subscription was not taken; the socket says {:?}", self.ws.read());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The next notification, `{"id", "message"}`; panics when none comes.
    pub fn next(&mut self) -> Value {
        self.try_next(PATIENCE).unwrap_or_else(|| panic!("no notification came"))
    }

    /// The next notification's payload.
    pub fn payload(&mut self) -> Value {
        self.next()["message"]["payload"].clone()
    }

    /// The next notification, None when none comes in time.
    pub fn try_next(&mut self, timeout: Duration) -> Option<Value> {
        let until = Instant::now() + timeout;
        while self.waiting.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            self.ws.get_ref().set_read_timeout(Some(left)).unwrap();
            match self.ws.read() {
                Ok(Message::Text(frame)) => {
                    let list: Vec<Value> = serde_json::from_str(&frame).expect("a frame is an array");
                    assert!(!list.is_empty(), "Odoo's client cannot take an empty array");
                    let ids: Vec<i64> = list.iter().map(|n| n["id"].as_i64().unwrap()).collect();
                    assert!(ids.is_sorted(), "ids ascend in a frame: {ids:?}");
                    self.waiting.extend(list);
                }
                Ok(Message::Close(close)) => panic!("closed instead of a notification: {close:?}"),
                Ok(_) => {}
                Err(tungstenite::Error::Io(error))
                    if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                Err(error) => panic!("{error}"),
            }
        }
        Some(self.waiting.remove(0))
    }

    /// Nothing comes until a marker published now has come: what was to be kept away would have come first.
    pub fn only(&mut self, client: &mut Client, channel: &str) {
        client.execute("SELECT bus_sendone($1::text, 'marker', '\"marker\"')", &[&channel]).unwrap();
        assert_eq!(self.payload(), json!("marker"));
    }

    /// Reads until the connection ends, passing over notifications.
    pub fn ended(&mut self) -> Ended {
        self.ws.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
        loop {
            match self.ws.read() {
                Ok(Message::Close(Some(frame))) => return Ended::Close(frame.code.into(), frame.reason.to_string()),
                Ok(Message::Close(None)) => return Ended::Close(1005, String::new()),
                Ok(_) => {}
                Err(tungstenite::Error::Io(error))
                    if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) =>
                {
                    panic!("the connection did not end")
                }
                Err(error) => {
                    eprintln!("dropped: {error}");
                    return Ended::Dropped;
                }
            }
        }
    }
}

impl Socket {
    /// How the connection ends within half a second; None when it goes on.
    pub fn ended_soon(&mut self) -> Option<Ended> {
        let end = Instant::now() + Duration::from_millis(500);
        while Instant::now() < end {
            self.ws.get_ref().set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            match self.ws.read() {
                Ok(Message::Close(Some(frame))) => {
                    return Some(Ended::Close(frame.code.into(), frame.reason.to_string()));
                }
                Ok(_) => {}
                Err(tungstenite::Error::Io(error))
                    if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                Err(_) => return Some(Ended::Dropped),
            }
        }
        None
    }
}

/// Odoo's table, as Odoo 18 makes it.
pub const ODOO_TABLE: &str = "CREATE TABLE public.bus_bus (id serial PRIMARY KEY, create_uid int, write_uid int,
     channel varchar, message varchar, create_date timestamp, write_date timestamp)";

/// Publishes on a plain channel; the id.
pub fn publish(sql: &mut Client, channel: &str, payload: &str) -> i64 {
    sql.query_one("SELECT bus_sendone($1::text, 'test', to_jsonb($2::text))", &[&channel, &payload]).unwrap().get(0)
}

/// Waits until `condition` holds, as long as the contract allows (never less than it promises).
pub fn within(promised: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + promised;
    while !condition() {
        assert!(Instant::now() < until, "not within {promised:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A client as Odoo's: it remembers the last id of its last frame, and comes back with it whenever its connection ends.
pub struct Follower {
    port: u16,
    token: String,
    channels: Value,
    /// The id of the last notification of the last frame.
    pub last: i64,
    /// What has come, in its order: ids and payloads.
    pub found: Vec<(i64, Value)>,
    socket: Option<Socket>,
}

impl Follower {
    /// A client with a token for these channels, subscribed.
    pub fn open(cluster: &Cluster, sql: &mut Client, channels: Value, last: i64) -> Follower {
        let (port, token) = (cluster.ws_port(sql), token(sql, &channels));
        let mut follower = Follower { port, token, channels, last, found: Vec::new(), socket: None };
        eventually("the follower is let in", || follower.connect());
        if let Some(socket) = &mut follower.socket {
            socket.sync(sql);
        }
        follower
    }

    /// The same client at another server, with what it knows.
    pub fn moved_to(mut self, port: u16) -> Follower {
        (self.port, self.socket) = (port, None);
        self
    }

    /// Ends its connection; it comes back when it is asked to read.
    pub fn drop_connection(&mut self) {
        self.socket = None;
    }

    fn connect(&mut self) -> bool {
        let path = format!("/websocket?version=18.0-7&token={}", self.token);
        self.socket = Socket::open_path(self.port, &path, &[]).ok().and_then(|mut socket| {
            socket.is_let_in().then(|| {
                socket.subscribe(self.channels.clone(), self.last);
                socket
            })
        });
        self.socket.is_some()
    }

    /// Reads one frame, or comes back; false when there was nothing to do.
    fn step(&mut self) -> bool {
        let Some(socket) = &mut self.socket else { return self.connect() };
        let _ = socket.ws.get_ref().set_read_timeout(Some(Duration::from_millis(50)));
        match socket.ws.read() {
            Ok(Message::Text(frame)) => {
                let list: Vec<Value> = serde_json::from_str(&frame).expect("a frame is an array");
                for notification in list {
                    self.last = notification["id"].as_i64().unwrap();
                    self.found.push((self.last, notification["message"]["payload"].clone()));
                }
                true
            }
            Ok(Message::Close(_)) => self.lose(),
            Ok(_) => true,
            Err(tungstenite::Error::Io(e)) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => false,
            Err(_) => self.lose(),
        }
    }

    fn lose(&mut self) -> bool {
        self.socket = None;
        false
    }

    /// Whether this payload has come.
    pub fn has(&self, payload: &str) -> bool {
        self.found.iter().any(|(_, found)| found == payload)
    }

    /// The payloads that have come, in their order.
    pub fn payloads(&self) -> Vec<String> {
        self.found.iter().filter_map(|(_, payload)| payload.as_str().map(str::to_owned)).collect()
    }

    /// Reads, and comes back as often as it must, until `enough`; whether it was in time.
    pub fn try_until(&mut self, mut enough: impl FnMut(&Follower) -> bool) -> bool {
        let until = Instant::now() + PATIENCE;
        while !enough(self) {
            if Instant::now() > until {
                return false;
            }
            if !self.step() {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        true
    }

    /// The same; panics when it was not.
    pub fn until(&mut self, what: &str, enough: impl FnMut(&Follower) -> bool) {
        let came = self.try_until(enough);
        let last = &self.found[self.found.len().saturating_sub(20)..];
        assert!(came, "not in {PATIENCE:?}: {what}; the last of what came: {last:?}");
    }

    /// Reads until all these payloads have come.
    pub fn reads(&mut self, payloads: &[&str]) {
        self.until(&format!("{payloads:?} came"), |follower| payloads.iter().all(|payload| follower.has(payload)));
    }
}
