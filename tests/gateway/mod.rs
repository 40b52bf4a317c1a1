//! The gateway's network side with real sockets, a real websocket client, and a database worker played by the test.

// Each test uses a part of it.
#![allow(dead_code)]

#[path = "../steady/mod.rs"]
pub mod steady;

use imbus::core::channel::Channel;
use imbus::core::link::{Command, Connection, Decoder, Event, VERSION, encode};
use imbus::core::notification::Notification;
use imbus::core::position::Position;
use imbus::core::settings::{AuthMethod, Database, Settings};
use imbus::core::token::{Claims, Grant, sign};
use imbus::net::bridge::{LogLevel, Net, Start, ToMain};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use steady::Steady;
use tungstenite::client::IntoClientRequest;
use tungstenite::{Message, WebSocket};

/// How long anything may take that is to happen.
pub const PATIENCE: Duration = Duration::from_secs(10);
pub const SECRET: &[u8] = b"a secret of the tests";
pub const DEMO: u32 = 5;
pub const OTHER: u32 = 6;

// ---------------------------------------------------------------------------------------------------------------------
// The gateway

pub struct Gateway {
    pub net: Option<Net>,
    pub port: u16,
    pub folder: PathBuf,
    pub logs: Vec<(LogLevel, String)>,
}

pub fn settings() -> Settings {
    Settings {
        port: 0,
        listen_addresses: vec!["127.0.0.1".to_owned()],
        io_threads: 2,
        auth: vec![AuthMethod::Token],
        odoo_url: "http://127.0.0.1:1".to_owned(),
        odoo_concurrency: 8,
        session_recheck: Duration::from_secs(60),
        token_secret: SECRET.to_vec(),
        allowed_origins: Vec::new(),
        max_connections: 1000,
        compression: true,
        send_queue_max: 1 << 20,
        rate_limit_burst: 1000,
        rate_limit_delay: Duration::from_millis(200),
        keepalive: Duration::from_secs(3600),
        ping_interval: Duration::from_secs(45),
    }
}

pub fn databases() -> Vec<Database> {
    vec![Database { oid: DEMO, name: "demo".to_owned() }, Database { oid: OTHER, name: "other".to_owned() }]
}

impl Gateway {
    pub fn new() -> Gateway {
        Gateway::with(settings())
    }

    pub fn with(settings: Settings) -> Gateway {
        let mut gateway = Gateway::closed(settings, databases());
        gateway.wait_open();
        gateway
    }

    /// Does not wait for the port.
    pub fn closed(settings: Settings, databases: Vec<Database>) -> Gateway {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("imbus-net-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let link_path = folder.join("link");
        std::fs::write(&link_path, "left behind").unwrap();
        let (settings, databases) = (Arc::new(settings), Arc::new(databases));
        let net = Net::start(Start {
            settings,
            databases,
            link_path,
            wake_main: Box::new(|| {}),
            census: Box::new(Vec::new),
        })
        .unwrap();
        Gateway { net: Some(net), port: 0, folder, logs: Vec::new() }
    }

    pub fn net(&self) -> &Net {
        self.net.as_ref().unwrap()
    }

    /// The next message to the main thread; log lines are put aside.
    pub fn next(&mut self) -> ToMain {
        loop {
            match self.net().receiver().recv_timeout(PATIENCE).expect("a message to the main thread") {
                ToMain::Log { level, text, .. } => self.logs.push((level, text)),
                message => return message,
            }
        }
    }

    pub fn wait_open(&mut self) {
        let ToMain::Listening { port } = self.next() else { panic!("listening is said first") };
        self.port = port;
    }

    /// Waits for a log line with this text.
    pub fn wait_log(&mut self, level: LogLevel, part: &str) {
        while !self.logs.iter().any(|(found, text)| *found == level && text.contains(part)) {
            let message = self.net().receiver().recv_timeout(PATIENCE).expect(part);
            if let ToMain::Log { level, text, .. } = message {
                self.logs.push((level, text));
            }
        }
    }

    pub fn wait_until(&self, what: &str, mut is_so: impl FnMut(&Net) -> bool) {
        let start = Instant::now();
        while !is_so(self.net()) {
            assert!(start.elapsed() < PATIENCE, "{what}");
            std::thread::yield_now();
        }
    }

    pub fn link(&self) -> UnixStream {
        let start = Instant::now();
        loop {
            match UnixStream::connect(self.folder.join("link")) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    return stream;
                }
                Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
            }
        }
    }

    pub fn worker(&self) -> Worker {
        self.worker_of(DEMO).0
    }

    /// A database worker that has said hello, and where it was told to go on.
    pub fn worker_of(&self, database: u32) -> (Worker, Option<Position>) {
        let mut worker = Worker::new(self.link());
        worker.send(&Event::Hello { version: VERSION, database, name: "demo".to_owned() });
        match worker.next() {
            Some(Command::Resume { position }) => (worker, position),
            other => panic!("{other:?}"),
        }
    }

    pub fn tcp(&self) -> Steady {
        let tcp = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        tcp.set_read_timeout(Some(PATIENCE)).unwrap();
        tcp.set_write_timeout(Some(PATIENCE)).unwrap();
        Steady(tcp)
    }

    /// A websocket client with this query and these headers besides the necessary ones.
    pub fn open(&self, query: &str, headers: &[(&'static str, &str)]) -> Client {
        let url = format!("ws://127.0.0.1:{}/websocket{query}", self.port);
        let mut request = url.into_client_request().unwrap();
        let origin = format!("http://127.0.0.1:{}", self.port);
        for (name, value) in [("Origin", origin.as_str())].iter().chain(headers) {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        Client { socket: tungstenite::client(request, self.tcp()).unwrap().0 }
    }

    pub fn client(&self) -> Client {
        self.client_of(&token(DEMO, "demo"))
    }

    pub fn client_of(&self, token: &str) -> Client {
        self.open(&format!("?version=18.0-2&token={token}"), &[("User-Agent", "test")])
    }

    /// A client live on these channels.
    pub fn subscribed(&self, worker: &mut Worker, channels: &str) -> Client {
        let mut client = self.client();
        client.subscribe(channels, 0);
        worker.answer(&[]);
        client
    }

    /// The connections, as an inspector sees them.
    pub fn inspect(&self, database: Option<u32>) -> Vec<Connection> {
        let mut inspector = Worker::new(self.link());
        inspector.send(&Event::Inspect { version: VERSION, database });
        let Some(Command::Connections(connections)) = inspector.next() else { panic!("no list") };
        assert_eq!(inspector.next(), None);
        connections
    }

    /// How many connections have more than this in their outbound queue, in bytes.
    pub fn queued(&self, bytes: usize) -> usize {
        self.inspect(None).iter().filter(|connection| connection.queued > bytes as i64).count()
    }

    pub fn http(&self, request: &str) -> String {
        let mut tcp = self.tcp();
        tcp.write_all(request.as_bytes()).unwrap();
        rest(&mut tcp)
    }

    /// Stops the gateway; tells how long it took.
    pub fn stop(mut self) -> Duration {
        let start = Instant::now();
        self.net.take().unwrap().stop();
        start.elapsed()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if let Some(net) = self.net.take() {
            net.stop();
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

pub fn rest(tcp: &mut Steady) -> String {
    let mut bytes = Vec::new();
    tcp.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

// ---------------------------------------------------------------------------------------------------------------------
// The database worker

pub struct Worker {
    pub stream: UnixStream,
    pub decoder: Decoder,
}

impl Worker {
    pub fn new(stream: UnixStream) -> Worker {
        Worker { stream, decoder: Decoder::default() }
    }

    pub fn send(&mut self, event: &Event) {
        self.stream.write_all(&encode(event).unwrap()).unwrap();
    }

    /// What the gateway says next; None when it hangs up.
    pub fn next(&mut self) -> Option<Command> {
        loop {
            if let Some(command) = self.decoder.next().unwrap() {
                return Some(command);
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return None,
                Ok(count) => self.decoder.feed(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub fn dispatch(&mut self, notifications: &[Notification]) {
        let high = notifications.iter().map(|notification| notification.id).max().unwrap_or_default();
        let position = Position { table: 1, high, ..Position::default() };
        self.send(&Event::Dispatch { notifications: notifications.to_vec(), position, committed: 0 });
    }

    /// The next command, if one is there already.
    pub fn peek(&mut self) -> Option<Command> {
        if let Some(command) = self.decoder.next().unwrap() {
            return Some(command);
        }
        let mut bytes = [0; 4096];
        self.stream.set_nonblocking(true).unwrap();
        let result = self.stream.read(&mut bytes);
        self.stream.set_nonblocking(false).unwrap();
        match result {
            Ok(count) => self.decoder.feed(&bytes[..count]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        self.decoder.next().unwrap()
    }

    /// The next recovery asked for: its request, channels and `last`.
    pub fn recover(&mut self) -> (u64, Vec<Channel>, i64) {
        match self.next() {
            Some(Command::Recover { request, channels, last }) => (request, channels, last),
            other => panic!("{other:?}"),
        }
    }

    /// The next page of this request is asked for.
    pub fn more(&mut self, request: u64) {
        assert_eq!(self.next(), Some(Command::More { request }));
    }

    pub fn recovered(&mut self, request: u64, notifications: &[Notification], more: bool) {
        self.send(&Event::Recovered { request, notifications: notifications.to_vec(), more });
    }

    /// Waits for a recovery and answers it.
    pub fn answer(&mut self, notifications: &[Notification]) {
        let (request, ..) = self.recover();
        self.recovered(request, notifications, false);
    }
}

pub fn channel(name: &str) -> Channel {
    Channel::from_json(name, "demo").or_else(|_| Channel::plain(name)).unwrap()
}

pub fn notification(id: i64, name: &str) -> Notification {
    Notification { id, channel: channel(name), message: format!(r#"{{"type":"t","payload":{id}}}"#).into() }
}

pub fn notifications(pairs: &[(i64, &str)]) -> Vec<Notification> {
    pairs.iter().map(|(id, name)| notification(*id, name)).collect()
}

// ---------------------------------------------------------------------------------------------------------------------
// The client

pub struct Client {
    pub socket: WebSocket<Steady>,
}

impl Client {
    pub fn say(&mut self, text: &str) {
        self.socket.send(Message::text(text)).unwrap();
    }

    pub fn subscribe(&mut self, channels: &str, last: i64) {
        self.say(&subscribe(channels, last));
    }

    /// The ids of the next frame.
    pub fn ids(&mut self) -> Vec<i64> {
        loop {
            match self.socket.read().unwrap() {
                Message::Text(text) => {
                    let frame: serde_json::Value = serde_json::from_str(&text).unwrap();
                    let id = |entry: &serde_json::Value| {
                        assert_eq!(entry["message"]["payload"], entry["id"]);
                        entry["id"].as_i64().unwrap()
                    };
                    return frame.as_array().unwrap().iter().map(id).collect();
                }
                Message::Ping(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// The code and reason with which the gateway closes, and that it ends the TCP connection after that.
    pub fn closed(&mut self) -> (u16, String) {
        let close = loop {
            match self.socket.read().unwrap() {
                Message::Close(close) => break close.unwrap(),
                Message::Text(_) | Message::Ping(_) => {}
                other => panic!("{other:?}"),
            }
        };
        let _ = self.socket.flush();
        let mut bytes = [0; 1024];
        while self.socket.get_mut().read(&mut bytes).expect("the end of the stream") > 0 {}
        (close.code.into(), close.reason.to_string())
    }

    pub fn closed_with(&mut self, code: u16, reason: &str) {
        assert_eq!(self.closed(), (code, reason.to_owned()));
    }
}

pub fn subscribe(channels: &str, last: i64) -> String {
    format!(r#"{{"event_name":"subscribe","data":{{"channels":{channels},"last":{last}}}}}"#)
}

pub fn unix() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64
}

pub fn claims(oid: u32, db: &str, channels: Grant) -> Claims {
    Claims {
        db: db.to_owned(),
        oid,
        channels,
        iat: unix(),
        exp: unix() + 3600,
        sub: Some("ann".to_owned()),
        admin: false,
    }
}

pub fn token(oid: u32, db: &str) -> String {
    sign(&claims(oid, db, Grant::All), SECRET).unwrap()
}
