//! What permessage-deflate costs and saves the gateway: one network thread, a database worker played here, and clients
//! on real sockets. Prints the processor time of the network thread for a delivery, and its bytes, without and with
//! compression, the two in turn, the least disturbed of several rounds. With `--idle N`, what N idle connections take in memory, both ways.
//!
//! `deflate [--seconds 2] [--sizes 200,2048] [--receivers 1,100]` · `deflate --idle 2000`

use imbus::core::channel::Channel;
use imbus::core::link::{Command, Decoder, Event, VERSION, encode};
use imbus::core::notification::Notification;
use imbus::core::position::Position;
use imbus::core::settings::{AuthMethod, Database, Settings};
use imbus::core::token::{Claims, Grant, sign};
use imbus::net::bridge::{Net, Start, ToMain};
use lexopt::prelude::*;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const SECRET: &[u8] = b"a secret of the benchmark";
const DATABASE: u32 = 5;

/// Rounds of each measurement.
const ROUNDS: u32 = 7;

struct Gateway {
    net: Net,
    /// Of the network thread.
    thread: String,
    port: u16,
    worker: UnixStream,
    decoder: Decoder,
    last: i64,
}

impl Gateway {
    fn new() -> Gateway {
        let folder = std::env::temp_dir().join(format!("imbus-deflate-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let settings = Settings {
            port: 0,
            listen_addresses: vec!["127.0.0.1".to_owned()],
            io_threads: 1,
            auth: vec![AuthMethod::Token],
            odoo_url: "http://127.0.0.1:1".to_owned(),
            odoo_concurrency: 8,
            session_recheck: Duration::from_secs(60),
            token_secret: SECRET.to_vec(),
            allowed_origins: vec!["*".to_owned()],
            max_connections: 20_000,
            compression: true,
            send_queue_max: 1 << 30,
            rate_limit_burst: 10,
            rate_limit_delay: Duration::from_millis(200),
            keepalive: Duration::from_secs(3600),
            ping_interval: Duration::from_secs(3600),
        };
        let databases = vec![Database { oid: DATABASE, name: "demo".to_owned() }];
        let link_path = folder.join("link");
        let (settings, databases) = (Arc::new(settings), Arc::new(databases));
        let start = Start {
            settings,
            databases,
            link_path: link_path.clone(),
            wake_main: Box::new(|| {}),
            census: Box::new(Vec::new),
        };
        let others = threads();
        let net = Net::start(start).expect("threads");
        let port = loop {
            if let ToMain::Listening { port } = net.receiver().recv().expect("a message") {
                break port;
            }
        };
        let mut worker = UnixStream::connect(&link_path).expect("the link");
        let hello = Event::Hello { version: VERSION, database: DATABASE, name: "demo".to_owned() };
        worker.write_all(&encode(&hello).expect("hello")).expect("the link");
        let thread = threads().into_iter().find(|thread| !others.contains(thread)).expect("a network thread");
        let mut gateway = Gateway { net, thread, port, worker, decoder: Decoder::default(), last: 0 };
        let Command::Resume { .. } = gateway.command() else { panic!("no resume") };
        // The worker is connected: the socket may go, and the next gateway have its place.
        fs::remove_dir_all(&folder).expect("the folder");
        gateway
    }

    fn command(&mut self) -> Command {
        loop {
            if let Some(command) = self.decoder.next().expect("a command") {
                return command;
            }
            let mut bytes = [0; 4096];
            let count = self.worker.read(&mut bytes).expect("the link");
            self.decoder.feed(&bytes[..count]);
        }
    }

    fn say(&mut self, event: &Event) {
        self.worker.write_all(&encode(event).expect("an event")).expect("the link");
    }

    /// A client live on channel "a".
    fn client(&mut self, compression: bool) -> Client {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs() as i64;
        let (db, channels, exp) = ("demo".to_owned(), Grant::All, now + 86_400);
        let claims = Claims { db, oid: DATABASE, channels, iat: now, exp, sub: None, admin: false };
        let token = sign(&claims, SECRET).expect("a token");
        let offer = if compression { "Sec-WebSocket-Extensions: permessage-deflate\r\n" } else { "" };
        let request = format!(
            "GET /websocket?token={token} HTTP/1.1\r\nHost: x\r\nOrigin: x\r\nUpgrade: websocket\r\n\
             Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{offer}\r\n"
        );
        let mut tcp = TcpStream::connect(("127.0.0.1", self.port)).expect("connect");
        tcp.write_all(request.as_bytes()).expect("write");
        let mut answer = [0; 1024];
        let count = tcp.read(&mut answer).expect("read");
        assert_eq!(String::from_utf8_lossy(&answer[..count]).contains("permessage-deflate"), compression);
        let subscribe = br#"{"event_name":"subscribe","data":{"channels":["a"],"last":0}}"#;
        let mut frame = vec![0x81, 0x80 | subscribe.len() as u8, 0, 0, 0, 0];
        frame.extend(subscribe);
        tcp.write_all(&frame).expect("write");
        let Command::Recover { request, .. } = self.command() else { panic!("no recovery") };
        self.say(&Event::Recovered { request, notifications: Vec::new(), more: false });
        Client { tcp, head: Vec::new() }
    }

    /// Sends one notification, and waits until everybody has it. Returns the bytes one client got.
    fn publish(&mut self, message: &str, clients: &mut [Client]) -> usize {
        self.last += 1;
        let channel = Channel::from_json("\"a\"", "demo").expect("a channel");
        let notifications = vec![Notification { id: self.last, channel, message: message.into() }];
        let position = Position { table: 1, high: self.last, ..Position::default() };
        self.say(&Event::Dispatch { notifications, position, committed: 0 });
        clients.iter_mut().map(Client::frame).max().unwrap_or(0)
    }
}

struct Client {
    tcp: TcpStream,
    head: Vec<u8>,
}

impl Client {
    /// Waits for a whole frame, which is the only one under way. Returns its bytes.
    fn frame(&mut self) -> usize {
        let (mut bytes, mut total, mut whole) = ([0; 65_536], 0, usize::MAX);
        self.head.clear();
        while total < whole {
            let count = self.tcp.read(&mut bytes).expect("read");
            assert!(count > 0, "closed");
            self.head.extend(bytes[..count].iter().take(10 - self.head.len().min(10)));
            total += count;
            whole = whole_frame(&self.head).unwrap_or(usize::MAX);
        }
        assert_eq!(total, whole);
        total
    }
}

/// The length of a frame with this head.
fn whole_frame(head: &[u8]) -> Option<usize> {
    Some(match *head.get(1)? {
        126 => 4 + usize::from(u16::from_be_bytes([*head.get(2)?, *head.get(3)?])),
        127 => 10 + u64::from_be_bytes(head.get(2..10)?.try_into().ok()?) as usize,
        length => 2 + usize::from(length),
    })
}

/// Messages of so many bytes, as Odoo's mail sends them: words, names and numbers that differ from one to the next.
fn messages(length: usize) -> Vec<String> {
    const WORDS: [&str; 24] = [
        "partner",
        "please",
        "invoice",
        "mail",
        "channel",
        "project",
        "date",
        "review",
        "record",
        "thread",
        "order",
        "name",
        "today",
        "attachment",
        "needs",
        "action",
        "the",
        "history",
        "of",
        "tracking",
        "value",
        "and",
        "task",
        "hello",
    ];
    let mut state = 0x1234_5678_9abc_def0_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as usize % below
    };
    let mut entry = || {
        let body: Vec<&str> = (0..4 + random(12)).map(|_| WORDS[random(24)]).collect();
        format!(
            r#"{{"id":{},"author":{{"id":{},"type":"partner"}},"body":"<p>{}</p>","date":"2026-11-{:02} {:02}:{:02}","model":"{}.{}","res_id":{}}}"#,
            random(100_000),
            random(900),
            body.join(" "),
            1 + random(28),
            random(24),
            random(60),
            WORDS[random(24)],
            WORDS[random(24)],
            random(10_000),
        )
    };
    let mut message = || {
        let mut text = r#"{"type":"mail.record/insert","payload":{"Message":["#.to_owned();
        while text.len() < length - 4 {
            text.push_str(&entry());
            text.push(',');
        }
        text.truncate(length - 4);
        text + "\"]}}"
    };
    (0..64).map(|_| message()).collect()
}

/// The network threads of this process.
fn threads() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").expect("threads").flatten();
    let tasks = tasks.map(|task| task.path().to_string_lossy().into_owned());
    let name = |task: &String| fs::read_to_string(format!("{task}/comm")).unwrap_or_default();
    tasks.filter(|task| name(task).starts_with("imbus net")).collect()
}

impl Gateway {
    /// Processor time of the network thread so far, in microseconds.
    fn spent(&self) -> f64 {
        let text = fs::read_to_string(format!("{}/schedstat", self.thread)).expect("schedstat");
        text.split(' ').next().and_then(|number| number.parse::<f64>().ok()).expect("a number") / 1000.0
    }

    /// Microseconds of the network thread for a delivery, and bytes.
    fn measure(&mut self, clients: &mut [Client], messages: &[String], time: Duration) -> (f64, f64) {
        let (begun, before) = (Instant::now(), self.spent());
        let (mut bytes, mut count) = (0, 0);
        while begun.elapsed() < time || count < messages.len() {
            bytes += self.publish(&messages[count % messages.len()], clients);
            count += 1;
        }
        ((self.spent() - before) / (count * clients.len()) as f64, bytes as f64 / count as f64)
    }
}

fn resident() -> usize {
    let text = fs::read_to_string("/proc/self/statm").expect("statm");
    text.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).expect("a number") * 4096
}

fn idle(count: usize) {
    for compression in [false, true] {
        let mut gateway = Gateway::new();
        // What the first few take stays.
        let mut clients: Vec<_> = (0..100).map(|_| gateway.client(compression)).collect();
        let before = resident();
        clients.extend((0..count).map(|_| gateway.client(compression)));
        println!("compression {compression}: {} bytes for an idle connection", (resident() - before) / count);
        drop(clients);
        gateway.net.stop();
    }
}

struct Options {
    time: Duration,
    sizes: Vec<usize>,
    receivers: Vec<usize>,
    idle: usize,
}

fn options() -> Result<Options, lexopt::Error> {
    let numbers = |text: String| text.split(',').map(|number| number.parse().expect("a number")).collect();
    let (sizes, receivers) = (vec![200, 512, 1024, 2048, 20_480], vec![1, 10, 100, 1000]);
    let mut options = Options { time: Duration::from_secs(2), sizes, receivers, idle: 0 };
    let mut parser = lexopt::Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            Long("seconds") => options.time = Duration::from_secs_f64(parser.value()?.parse()?),
            Long("sizes") => options.sizes = numbers(parser.value()?.string()?),
            Long("receivers") => options.receivers = numbers(parser.value()?.string()?),
            Long("idle") => options.idle = parser.value()?.parse()?,
            _ => return Err(arg.unexpected()),
        }
    }
    Ok(options)
}

fn main() -> Result<(), lexopt::Error> {
    let options = options()?;
    if options.idle > 0 {
        idle(options.idle);
        return Ok(());
    }
    println!("| message | receivers | µs a delivery, plain | compressed | | bytes, plain | compressed | |");
    println!("|---|---|---|---|---|---|---|---|");
    for receivers in options.receivers {
        let mut gateways = [Gateway::new(), Gateway::new()];
        let open = |(at, gateway): (usize, &mut Gateway)| (0..receivers).map(|_| gateway.client(at == 1)).collect();
        let mut clients: Vec<Vec<Client>> = gateways.iter_mut().enumerate().map(open).collect();
        for size in &options.sizes {
            let texts = messages(*size);
            let mut best = [(f64::MAX, 0.0); 2];
            for _ in 0..ROUNDS {
                for ((gateway, clients), best) in gateways.iter_mut().zip(&mut clients).zip(&mut best) {
                    let (us, bytes) = gateway.measure(clients, &texts, options.time / ROUNDS);
                    *best = (best.0.min(us), bytes);
                }
            }
            let [(us, bytes), (us_packed, bytes_packed)] = best;
            println!(
                "| {size} | {receivers} | {us:.2} | {us_packed:.2} | {:.0} % | {bytes:.0} | {bytes_packed:.0} | {:.0} % |",
                us_packed * 100.0 / us,
                bytes_packed * 100.0 / bytes,
            );
        }
        gateways.into_iter().for_each(|gateway| gateway.net.stop());
    }
    Ok(())
}
