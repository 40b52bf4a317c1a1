//! Everybody comes back at once: clients with Odoo's sessions, Odoo's own way of waiting between two attempts
//! (websocket_worker.js), an Odoo that takes its time, and a server that is restarted. See `bench/crowd`.
//!
//! `crowd --gateway HOST:PORT --odoo PORT --sql CONNINFO --restart COMMAND [--clients N] [--workers N] [--ms N]`

use lexopt::prelude::*;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use socket2::{Domain, Protocol, Socket, Type};
use std::collections::BinaryHeap;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use tungstenite::protocol::Role;
use tungstenite::{Message, WebSocket};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Messages published while the clients come back.
const MESSAGES: i64 = 20;
/// All of it has to be over by then.
const PATIENCE: Duration = Duration::from_secs(300);

// ---------------------------------------------------------------------------------------------------------------------
// An Odoo

#[derive(Default)]
struct Calls {
    under_way: usize,
    most: usize,
    working: usize,
    begun: Vec<Instant>,
}

#[derive(Clone)]
struct Odoo {
    calls: Arc<(Mutex<Calls>, Condvar)>,
    workers: usize,
    takes: Duration,
}

impl Odoo {
    fn serve(self, listener: TcpListener) {
        for stream in listener.incoming().flatten() {
            let odoo = self.clone();
            std::thread::spawn(move || {
                // A gateway that is restarted hangs up.
                let _ = odoo.talk(stream);
            });
        }
    }

    fn talk(&self, mut stream: std::net::TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        loop {
            let (mut length, mut session) = (0, String::new());
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line)? == 0 {
                    return Ok(());
                }
                let line = line.trim().to_ascii_lowercase();
                if let Some(value) = line.strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap_or(0);
                }
                if let Some((_, value)) = line.split_once("session_id=") {
                    session = value.to_owned();
                }
                if line.is_empty() {
                    break;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body)?;
            self.work();
            let partner = session.trim_start_matches('s');
            let result = format!(
                r#"{{"jsonrpc":"2.0","id":1,"result":{{"channels":[["served","broadcast"],["served","res.partner",{partner}]],"notifications":[]}}}}"#
            );
            let head = format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}", result.len());
            stream.write_all(format!("{head}\r\n\r\n{result}").as_bytes())?;
        }
    }

    /// As many at once as it has workers; the others wait.
    fn work(&self) {
        let (lock, wake) = &*self.calls;
        let Ok(mut calls) = lock.lock() else { return };
        calls.under_way += 1;
        calls.most = calls.most.max(calls.under_way);
        calls.begun.push(Instant::now());
        while calls.working >= self.workers {
            let Ok(woken) = wake.wait(calls) else { return };
            calls = woken;
        }
        calls.working += 1;
        drop(calls);
        std::thread::sleep(self.takes);
        if let Ok(mut calls) = lock.lock() {
            calls.working -= 1;
            calls.under_way -= 1;
        }
        wake.notify_one();
    }

    /// The calls since the last time, and how many there were at once.
    fn take(&self) -> (Vec<Instant>, usize) {
        let Ok(mut calls) = self.calls.0.lock() else { return Default::default() };
        let most = calls.under_way;
        (std::mem::take(&mut calls.begun), std::mem::replace(&mut calls.most, most))
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The clients

enum Stage {
    /// Until its next attempt.
    Away,
    Connecting(TcpStream),
    Upgrading(TcpStream, Vec<u8>),
    Open(Box<WebSocket<TcpStream>>),
}

struct Client {
    stage: Stage,
    /// The id of the last notification.
    last: i64,
    received: Vec<i64>,
    delay: f64,
}

struct Crowd {
    gateway: SocketAddr,
    poll: Poll,
    clients: Vec<Client>,
    /// When who tries again.
    attempts: BinaryHeap<(std::cmp::Reverse<Instant>, usize)>,
    opening: usize,
    random: u64,
}

impl Crowd {
    fn new(gateway: SocketAddr, count: usize) -> std::io::Result<Crowd> {
        let client = || Client { stage: Stage::Away, last: 0, received: Vec::new(), delay: 1.0 };
        let now = Instant::now();
        Ok(Crowd {
            gateway,
            poll: Poll::new()?,
            clients: (0..count).map(|_| client()).collect(),
            attempts: (0..count).map(|at| (std::cmp::Reverse(now), at)).collect(),
            opening: 0,
            random: 88_172_645_463_325_252,
        })
    }

    fn random(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % 1000) as f64 / 1000.0
    }

    /// Reads and reconnects for a while.
    fn turn(&mut self, events: &mut Events) -> Result<(), Failure> {
        while self.opening < 512 && self.attempts.peek().is_some_and(|(at, _)| at.0 <= Instant::now()) {
            if let Some((_, at)) = self.attempts.pop() {
                self.connect(at)?;
            }
        }
        match self.poll.poll(events, Some(Duration::from_millis(20))) {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            result => result?,
        }
        for event in events.iter() {
            let at = event.token().0;
            if self.happened(at).is_err() {
                self.lost(at);
            }
        }
        Ok(())
    }

    fn connect(&mut self, at: usize) -> Result<(), Failure> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_linger(Some(Duration::ZERO))?;
        socket.set_nonblocking(true)?;
        let source: SocketAddr = ([127, 0, 0, 2 + (at / 8000) as u8], 0).into();
        socket.bind(&source.into())?;
        // EINPROGRESS
        if let Err(error) = socket.connect(&self.gateway.into())
            && error.raw_os_error() != Some(115)
        {
            self.lost(at);
            return Ok(());
        }
        let mut tcp = TcpStream::from_std(socket.into());
        self.poll.registry().register(&mut tcp, Token(at), Interest::READABLE | Interest::WRITABLE)?;
        self.clients[at].stage = Stage::Connecting(tcp);
        self.opening += 1;
        Ok(())
    }

    /// As Odoo's client: half as long again as the last time, and up to a second more.
    fn lost(&mut self, at: usize) {
        let jitter = self.random();
        let client = &mut self.clients[at];
        if matches!(client.stage, Stage::Connecting(_) | Stage::Upgrading(..)) {
            self.opening -= 1;
        }
        client.stage = Stage::Away;
        client.delay = (client.delay * 1.5).min(60.0) + jitter;
        self.attempts.push((std::cmp::Reverse(Instant::now() + Duration::from_secs_f64(client.delay)), at));
    }

    fn happened(&mut self, at: usize) -> Result<(), Failure> {
        let gateway = self.gateway;
        let client = &mut self.clients[at];
        loop {
            match std::mem::replace(&mut client.stage, Stage::Away) {
                Stage::Away => return Ok(()),
                Stage::Connecting(mut tcp) => {
                    if let Some(error) = tcp.take_error()? {
                        client.stage = Stage::Connecting(tcp);
                        return Err(error.into());
                    }
                    let head = format!(
                        "GET /websocket?version=19.0-2 HTTP/1.1\r\nHost: {gateway}\r\nOrigin: http://{gateway}\r\n\
                         User-Agent: crowd\r\nCookie: session_id=s{at}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
                    );
                    match tcp.write_all(head.as_bytes()) {
                        Err(error) if error.kind() == ErrorKind::NotConnected => {
                            client.stage = Stage::Connecting(tcp);
                            return Ok(());
                        }
                        result => {
                            client.stage = Stage::Upgrading(tcp, Vec::new());
                            result?;
                        }
                    }
                }
                Stage::Upgrading(mut tcp, mut head) => {
                    let mut byte = [0];
                    while !head.ends_with(b"\r\n\r\n") {
                        match tcp.read(&mut byte) {
                            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                                client.stage = Stage::Upgrading(tcp, head);
                                return Ok(());
                            }
                            Ok(0) | Err(_) => {
                                client.stage = Stage::Upgrading(tcp, head);
                                return Err("hung up".into());
                            }
                            Ok(_) => head.push(byte[0]),
                        }
                    }
                    if !head.starts_with(b"HTTP/1.1 101") {
                        client.stage = Stage::Upgrading(tcp, head);
                        return Err("refused".into());
                    }
                    self.opening -= 1;
                    client.delay = 1.0;
                    let mut socket = WebSocket::from_raw_socket(tcp, Role::Client, None);
                    let last = client.last;
                    socket.send(Message::text(format!(
                        r#"{{"event_name":"subscribe","data":{{"channels":["a"],"last":{last}}}}}"#
                    )))?;
                    client.stage = Stage::Open(Box::new(socket));
                }
                Stage::Open(mut socket) => loop {
                    match socket.read() {
                        Ok(Message::Text(text)) => {
                            let frame: serde_json::Value = serde_json::from_str(&text)?;
                            for entry in frame.as_array().into_iter().flatten() {
                                client.last = entry["id"].as_i64().ok_or("no id")?;
                                client.received.push(entry["message"]["payload"].as_i64().ok_or("no payload")?);
                            }
                        }
                        Ok(_) => {}
                        Err(tungstenite::Error::Io(error)) if error.kind() == ErrorKind::WouldBlock => {
                            client.stage = Stage::Open(socket);
                            return Ok(());
                        }
                        Err(error) => return Err(error.into()),
                    }
                },
            }
        }
    }

    fn open(&self) -> usize {
        self.clients.iter().filter(|client| matches!(client.stage, Stage::Open(_))).count()
    }
}

/// Calls in each second: the fewest and most of the full seconds, and the seconds.
fn pace(calls: &[Instant]) -> (usize, usize, usize) {
    let Some(first) = calls.iter().min() else { return (0, 0, 0) };
    let mut seconds: Vec<usize> = Vec::new();
    for call in calls {
        let second = call.duration_since(*first).as_secs() as usize;
        seconds.resize(seconds.len().max(second + 1), 0);
        seconds[second] += 1;
    }
    let count = seconds.len();
    seconds.pop();
    (seconds.iter().copied().min().unwrap_or(0), seconds.iter().copied().max().unwrap_or(0), count)
}

fn run() -> Result<(), Failure> {
    let (mut gateway, mut port, mut sql, mut restart) = (None::<SocketAddr>, 0, String::new(), String::new());
    let (mut count, mut workers, mut milliseconds) = (10_000, 4, 20);
    let mut parser = lexopt::Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            Long("gateway") => gateway = Some(parser.value()?.parse()?),
            Long("odoo") => port = parser.value()?.parse()?,
            Long("sql") => sql = parser.value()?.string()?,
            Long("restart") => restart = parser.value()?.string()?,
            Long("clients") => count = parser.value()?.parse()?,
            Long("workers") => workers = parser.value()?.parse()?,
            Long("ms") => milliseconds = parser.value()?.parse()?,
            _ => return Err(arg.unexpected().into()),
        }
    }
    let odoo = Odoo { calls: Arc::default(), workers, takes: Duration::from_millis(milliseconds) };
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    let served = odoo.clone();
    std::thread::spawn(move || served.serve(listener));
    let mut crowd = Crowd::new(gateway.ok_or("--gateway is missing")?, count)?;
    let mut events = Events::with_capacity(1024);
    let connect = || postgres::Client::connect(&sql, postgres::NoTls);
    let publish = |sql: &mut postgres::Client, number: i64| {
        sql.execute("SELECT bus_sendone('broadcast', 't', to_jsonb($1::bigint))", &[&number])
    };

    let begin = Instant::now();
    let reached = |crowd: &Crowd, number: i64| crowd.clients.iter().all(|client| client.received.contains(&number));
    let mut client = connect()?;
    // Until everybody hears: the first messages find some on their way.
    let mut number = 0;
    let mut next = begin;
    while !reached(&crowd, number) {
        if next <= Instant::now() && crowd.open() == count {
            number += 1;
            publish(&mut client, number)?;
            next = Instant::now() + Duration::from_secs(2);
        }
        crowd.turn(&mut events)?;
        if begin.elapsed() > PATIENCE {
            return Err("not everybody came in".into());
        }
    }
    let came = begin.elapsed();
    let (calls, most) = odoo.take();
    let (least, greatest, seconds) = pace(&calls);
    println!(
        "coming in: {count} clients in {:.1} s, {} calls, at most {most} at once, {least} to {greatest} a second in {seconds} s",
        came.as_secs_f64(),
        calls.len()
    );

    drop(client);
    crowd.clients.iter_mut().for_each(|client| client.received.clear());
    let begin = Instant::now();
    let restarted = std::thread::spawn(move || std::process::Command::new("/bin/sh").args(["-c", &restart]).status());
    let mut client = None;
    let (mut said, mut next) = (0, Instant::now());
    let owed: Vec<i64> = (1..=MESSAGES).map(|n| 1_000_000 + n).collect();
    let has_all = |client: &Client| owed.iter().all(|number| client.received.contains(number));
    loop {
        crowd.turn(&mut events)?;
        if client.is_none() && restarted.is_finished() {
            client = Some(connect()?);
        }
        if let Some(sql) = client.as_mut()
            && said < MESSAGES
            && next <= Instant::now()
        {
            said += 1;
            publish(sql, 1_000_000 + said)?;
            next = Instant::now() + Duration::from_millis(250);
        }
        if said == MESSAGES && crowd.clients.iter().all(has_all) || begin.elapsed() > PATIENCE {
            break;
        }
    }
    let back = begin.elapsed();
    let (calls, most) = odoo.take();
    let (least, greatest, seconds) = pace(&calls);
    let lost: usize = crowd.clients.iter().map(|c| owed.iter().filter(|n| !c.received.contains(n)).count()).sum();
    let doubled: usize = crowd
        .clients
        .iter()
        .map(|client| {
            let mut sorted = client.received.clone();
            sorted.sort_unstable();
            sorted.dedup();
            client.received.len() - sorted.len()
        })
        .sum();
    println!(
        "coming back: everybody had all {MESSAGES} messages after {:.1} s, {} calls, at most {most} at once, \
         {least} to {greatest} a second in {seconds} s, {lost} lost, {doubled} doubled",
        back.as_secs_f64(),
        calls.len()
    );
    if lost > 0 { Err("messages were lost".into()) } else { Ok(()) }
}

fn main() {
    if let Err(error) = run() {
        eprintln!("crowd: {error}");
        std::process::exit(1);
    }
}
