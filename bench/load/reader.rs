//! The clients: one thread opens its share of the sockets, subscribes each, and reads them all. What all of a thread's
//! sockets have received is told to the publisher; nothing is allocated per message.

use crate::Options;
use crate::publish::channel;
use crate::scan::{Order, Scan};
use mio::event::Event;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// Sockets of one thread that are being opened at the same time.
const OPENING: usize = 128;

/// Sockets that share a source address: its ports (28,000 by default) are then found at once.
const PER_ADDRESS: usize = 8_000;

/// What the readers and the publisher share.
pub struct Shared {
    pub options: Options,
    pub begin: Instant,
    /// The greatest id before the sockets are opened.
    pub last: i64,
    pub publisher: Thread,
    pub stop: AtomicBool,
    /// Numbers of messages before the part under way.
    pub base: AtomicU64,
    /// Messages that are looked at together: those of one transaction.
    pub unit: AtomicU64,
    /// Goes up with each part.
    pub part: AtomicU64,
    /// Whether the time of each receipt is kept.
    pub is_timed: AtomicBool,
    /// The publisher is woken when so many deliveries have been counted.
    pub wanted: AtomicU64,
    pub failure: Mutex<Option<String>>,
    pub lines: Vec<Line>,
}

/// What one thread tells.
#[derive(Default)]
pub struct Line {
    /// Sockets that have subscribed.
    pub opened: AtomicUsize,
    /// All sockets of this thread have received the messages before this one.
    pub received: AtomicU64,
    /// Notifications received, all sockets of this thread together, and reads that brought some.
    pub deliveries: AtomicU64,
    pub reads: AtomicU64,
    /// Message and time (ns from the beginning) of each receipt.
    pub receipts: Mutex<Vec<(u64, u64)>>,
}

impl Shared {
    /// Notifications received by all sockets together.
    pub fn deliveries(&self) -> u64 {
        self.lines.iter().map(|line| line.deliveries.load(Ordering::Acquire)).sum()
    }

    /// Ends everything with a reason.
    pub fn fail(&self, reason: String) {
        if let Ok(mut failure) = self.failure.lock() {
            failure.get_or_insert(reason);
        }
        self.publisher.unpark();
    }
}

enum Stage {
    Connecting,
    Upgrading(Vec<u8>),
    Open,
}

struct Connection {
    tcp: TcpStream,
    stage: Stage,
    scan: Scan,
    received: u64,
}

/// One thread's sockets.
pub struct Reader<'a> {
    shared: &'a Shared,
    line: &'a Line,
    index: usize,
    poll: Poll,
    share: usize,
    connections: Vec<Connection>,
    opened: usize,
    /// On the thread's first socket.
    order: Order,
    part: u64,
    base: u64,
    unit: u64,
    /// Sockets that have received each unit of the part under way.
    done: Vec<u32>,
    complete: usize,
    receipts: Vec<(u64, u64)>,
    deliveries: u64,
    reads: u64,
}

impl<'a> Reader<'a> {
    /// Makes the reader of one thread.
    ///
    /// # Errors
    /// The poll's.
    pub fn new(shared: &'a Shared, index: usize) -> io::Result<Reader<'a>> {
        let (sockets, threads) = (shared.options.sockets, shared.options.threads);
        Ok(Reader {
            shared,
            line: &shared.lines[index],
            index,
            poll: Poll::new()?,
            share: sockets / threads + usize::from(index < sockets % threads),
            connections: Vec::new(),
            opened: 0,
            order: Order::default(),
            part: u64::MAX,
            base: 0,
            unit: 1,
            done: Vec::new(),
            complete: 0,
            receipts: Vec::new(),
            deliveries: 0,
            reads: 0,
        })
    }

    /// Opens and reads until told to stop.
    ///
    /// # Errors
    /// A socket cannot be opened, or the server closes one.
    pub fn run(mut self) -> Result<(), Box<dyn std::error::Error>> {
        let mut events = Events::with_capacity(1024);
        let mut buffer = vec![0; 256 * 1024];
        while !self.shared.stop.load(Ordering::Acquire) {
            while self.connections.len() < self.share && self.connections.len() - self.opened < OPENING {
                self.connect()?;
            }
            match self.poll.poll(&mut events, Some(Duration::from_millis(100))) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            }
            self.begin_part();
            for event in &events {
                self.happened(event, &mut buffer)?;
            }
            self.tell();
        }
        Ok(())
    }

    fn connect(&mut self) -> io::Result<()> {
        let place = self.connections.len();
        let number = place * self.shared.options.threads + self.index;
        let mut tcp = open(number, self.shared.options.address, None)?;
        self.poll.registry().register(&mut tcp, Token(place), Interest::READABLE | Interest::WRITABLE)?;
        self.connections.push(Connection { tcp, stage: Stage::Connecting, scan: Scan::default(), received: 0 });
        Ok(())
    }

    fn begin_part(&mut self) {
        let part = self.shared.part.load(Ordering::Acquire);
        if self.part != part {
            self.part = part;
            self.base = self.shared.base.load(Ordering::Acquire);
            self.unit = self.shared.unit.load(Ordering::Acquire);
            self.done.clear();
            self.complete = 0;
        }
    }

    fn happened(&mut self, event: &Event, buffer: &mut [u8]) -> Result<(), Box<dyn std::error::Error>> {
        let place = event.token().0;
        let connection = &mut self.connections[place];
        match &mut connection.stage {
            Stage::Open => self.read(place, buffer)?,
            Stage::Connecting if event.is_writable() => {
                if let Some(error) = connection.tcp.take_error()? {
                    return Err(error.into());
                }
                connection.stage = Stage::Upgrading(Vec::new());
                connection.tcp.write_all(request(&self.shared.options.path, self.shared.options.address).as_bytes())?;
            }
            Stage::Upgrading(_) if event.is_readable() => self.upgrade(place, buffer)?,
            _ => {}
        }
        Ok(())
    }

    /// Takes the answer to the upgrade and subscribes.
    fn upgrade(&mut self, place: usize, buffer: &mut [u8]) -> Result<(), Box<dyn std::error::Error>> {
        let number = place * self.shared.options.threads + self.index;
        let connection = &mut self.connections[place];
        let Stage::Upgrading(head) = &mut connection.stage else { return Ok(()) };
        match connection.tcp.read(buffer) {
            Ok(count) => head.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let Some(end) = head.windows(4).position(|bytes| bytes == b"\r\n\r\n") else {
            return if head.is_empty() { Err("closed during the upgrade".into()) } else { Ok(()) };
        };
        if !head.starts_with(b"HTTP/1.1 101 ") {
            return Err(format!("no upgrade: {}", String::from_utf8_lossy(head)).into());
        }
        if head.len() > end + 4 {
            return Err("received something before subscribing".into());
        }
        connection.stage = Stage::Open;
        connection.tcp.write_all(&subscribe(&self.shared.options, number, self.shared.last))?;
        self.opened += 1;
        self.line.opened.store(self.opened, Ordering::Release);
        self.shared.publisher.unpark();
        Ok(())
    }

    fn read(&mut self, place: usize, buffer: &mut [u8]) -> Result<(), Box<dyn std::error::Error>> {
        loop {
            let connection = &mut self.connections[place];
            let count = match connection.tcp.read(buffer) {
                Ok(0) => return Err("the server closed a connection".into()),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            let mut order = Ok(());
            let texts = |text: &[u8]| {
                if place == 0 && order.is_ok() {
                    order = self.order.feed(text);
                }
            };
            let found = connection.scan.feed(&buffer[..count], texts);
            order?;
            if found.closed {
                let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
                return Err(format!("the server closed a connection: {text:?}").into());
            }
            for _ in 0..found.pings {
                connection.tcp.write_all(&[0x8a, 0x80, 0, 0, 0, 0])?;
            }
            if found.notifications > 0 {
                self.count(place, found.notifications);
            }
            // epoll is edge-triggered here; less than was asked for means that nothing is left.
            if count < buffer.len() {
                return Ok(());
            }
        }
    }

    fn count(&mut self, place: usize, notifications: u64) {
        let connection = &mut self.connections[place];
        let before = connection.received;
        connection.received += notifications;
        self.deliveries += notifications;
        self.reads += 1;
        if self.shared.is_timed.load(Ordering::Relaxed) {
            let now = self.shared.begin.elapsed().as_nanos() as u64;
            self.receipts.extend((before..connection.received).map(|number| (number, now)));
        }
        let unit = |number: u64| (number.saturating_sub(self.base) / self.unit) as usize;
        let (from, to) = (unit(before), unit(connection.received));
        if self.done.len() < to {
            self.done.resize(to, 0);
        }
        self.done[from..to].iter_mut().for_each(|count| *count += 1);
    }

    /// Tells the publisher how far this thread's sockets are.
    fn tell(&mut self) {
        self.line.reads.store(self.reads, Ordering::Relaxed);
        self.line.deliveries.store(self.deliveries, Ordering::SeqCst);
        if self.shared.deliveries() >= self.shared.wanted.load(Ordering::SeqCst) {
            self.shared.wanted.store(u64::MAX, Ordering::SeqCst);
            self.shared.publisher.unpark();
        }
        let before = self.complete;
        while self.done.get(self.complete).is_some_and(|count| *count as usize == self.share) {
            self.complete += 1;
        }
        if self.complete == before {
            return;
        }
        if let Ok(mut receipts) = self.line.receipts.lock() {
            receipts.append(&mut self.receipts);
        }
        self.line.received.store(self.base + self.complete as u64 * self.unit, Ordering::Release);
        self.shared.publisher.unpark();
    }
}

/// Begins to connect socket `number` of this load; `buffer` bytes for what comes in, else what the system gives.
///
/// # Errors
/// The system's.
pub fn open(number: usize, address: SocketAddr, buffer: Option<usize>) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    // Closing leaves no TIME_WAIT behind, which would use up the ports.
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_tcp_nodelay(true)?;
    socket.set_nonblocking(true)?;
    if let Some(bytes) = buffer {
        socket.set_recv_buffer_size(bytes)?;
    }
    let source: SocketAddr = ([127, 0, 0, 2 + (number / PER_ADDRESS) as u8], 0).into();
    socket.bind(&source.into())?;
    match socket.connect(&address.into()) {
        // EINPROGRESS
        Err(error) if error.raw_os_error() != Some(115) => Err(error),
        _ => Ok(TcpStream::from_std(socket.into())),
    }
}

/// The request for a websocket.
pub fn request(path: &str, host: SocketAddr) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
}

/// The subscription of socket `number`, as a frame masked with zeros.
fn subscribe(options: &Options, number: usize, last: i64) -> Vec<u8> {
    let own = (1..options.channels).map(|at| number * options.channels + at);
    let names = own.map(|at| format!(",\"channel-{}\"", at.checked_rem(options.pool).unwrap_or(at)));
    let (channel, names) = (channel(), names.collect::<String>());
    let text = format!(r#"{{"event_name":"subscribe","data":{{"channels":["{channel}"{names}],"last":{last}}}}}"#);
    masked(&text)
}

/// A text frame of a client, masked with zeros.
pub fn masked(text: &str) -> Vec<u8> {
    let mut frame = crate::publish::frame(0x81, text.as_bytes());
    frame[1] |= 0x80;
    let head = frame.len() - text.len();
    frame.splice(head..head, [0; 4]);
    frame
}
