//! The limit: a server that does nothing but write to its sockets, with two threads and epoll. What comes in on its control
//! port goes out to every socket: a message by itself in one write, messages that come together in one `writev`, along
//! with others that wait.

use crossbeam_channel::{Receiver, Sender, unbounded};
use mio::event::Event;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};
use socket2::SockRef;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::sync::Arc;

const WAKER: Token = Token(0);
const SOCKETS: Token = Token(1);
const CONTROL: Token = Token(2);
const FIRST: usize = 3;

/// Slices that Linux takes in one `writev` (UIO_MAXIOV).
const SLICES: usize = 1024;

/// The answer to the key that the load generator always sends.
const ANSWER: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                        Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/// Frames published together.
type Record = Arc<Vec<Vec<u8>>>;

enum Note {
    Accepted(TcpStream),
    Record(Record),
}

struct Connection {
    tcp: TcpStream,
    /// The upgrade so far; None when it is done.
    head: Option<Vec<u8>>,
    /// What the socket did not take, and bytes of the first frame that are written already.
    waiting: VecDeque<(Record, usize)>,
    written: usize,
}

struct Worker {
    poll: Poll,
    notes: Receiver<Note>,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
}

/// Only the first thread has these.
struct Doors {
    sockets: TcpListener,
    control: TcpListener,
    publisher: Option<TcpStream>,
    bytes: Vec<u8>,
    /// The other thread, and whether it has the next socket.
    other: Sender<Note>,
    waker: Waker,
    turn: bool,
}

/// Serves until killed. Prints the ports of websockets and control.
///
/// # Errors
/// The poll's.
pub fn serve() -> io::Result<()> {
    let address = ([127, 0, 0, 1], 0).into();
    let (mut sockets, mut control) = (TcpListener::bind(address)?, TcpListener::bind(address)?);
    // mio's own backlog overflows when many come at once; each then waits a second.
    SockRef::from(&sockets).listen(4096)?;
    println!("{} {}", sockets.local_addr()?.port(), control.local_addr()?.port());
    let (first, second) = (Poll::new()?, Poll::new()?);
    first.registry().register(&mut sockets, SOCKETS, Interest::READABLE)?;
    first.registry().register(&mut control, CONTROL, Interest::READABLE)?;
    let waker = Waker::new(second.registry(), WAKER)?;
    let (other, notes) = unbounded();
    let worker = |poll, notes| Worker { poll, notes, connections: Vec::new(), free: Vec::new() };
    let second = worker(second, notes);
    std::thread::spawn(move || second.run(None));
    let doors = Doors { sockets, control, publisher: None, bytes: Vec::new(), other, waker, turn: false };
    worker(first, crossbeam_channel::never()).run(Some(doors))
}

impl Worker {
    fn run(mut self, mut doors: Option<Doors>) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        loop {
            match self.poll.poll(&mut events, None) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            }
            let mut records = Vec::new();
            for event in &events {
                match (event.token(), &mut doors) {
                    (SOCKETS, Some(doors)) => self.accept(doors)?,
                    (CONTROL, Some(doors)) => records.append(&mut doors.read(self.poll.registry())?),
                    _ => self.happened(event),
                }
            }
            while let Ok(note) = self.notes.try_recv() {
                match note {
                    Note::Accepted(tcp) => self.take(tcp)?,
                    Note::Record(record) => records.push(record),
                }
            }
            for together in records.chunk_by(|one, next| one.len() > 1 && next.len() > 1) {
                self.write_all(together);
            }
        }
    }

    fn accept(&mut self, doors: &mut Doors) -> io::Result<()> {
        while let Ok((tcp, _)) = doors.sockets.accept() {
            doors.turn = !doors.turn;
            if doors.turn {
                self.take(tcp)?;
            } else {
                doors.tell(Note::Accepted(tcp))?;
            }
        }
        Ok(())
    }

    fn take(&mut self, mut tcp: TcpStream) -> io::Result<()> {
        tcp.set_nodelay(true)?;
        let place = self.free.pop().unwrap_or(self.connections.len());
        // Edge-triggered: writability is told of once, when a full socket takes bytes again.
        self.poll.registry().register(&mut tcp, Token(FIRST + place), Interest::READABLE | Interest::WRITABLE)?;
        let connection = Some(Connection { tcp, head: Some(Vec::new()), waiting: VecDeque::new(), written: 0 });
        match self.connections.get_mut(place) {
            Some(free) => *free = connection,
            None => self.connections.push(connection),
        }
        Ok(())
    }

    fn happened(&mut self, event: &Event) {
        let Some(place) = event.token().0.checked_sub(FIRST) else { return };
        let Some(connection) = self.connections.get_mut(place).and_then(Option::as_mut) else { return };
        let mut alive = true;
        if event.is_writable() && !connection.waiting.is_empty() {
            alive = connection.write_on();
        }
        if event.is_readable() {
            alive &= connection.read();
        }
        if !alive {
            self.connections[place] = None;
            self.free.push(place);
        }
    }

    /// Writes records to every socket, in one call each.
    fn write_all(&mut self, records: &[Record]) {
        let slices: Vec<IoSlice> = records.iter().flat_map(|record| record.iter()).map(|f| IoSlice::new(f)).collect();
        let slices = &slices[..slices.len().min(SLICES)];
        let bytes: usize = slices.iter().map(|slice| slice.len()).sum();
        for connection in self.connections.iter_mut().flatten().filter(|connection| connection.head.is_none()) {
            let is_clear = connection.waiting.is_empty();
            let written = if is_clear { connection.tcp.write_vectored(slices).unwrap_or(0) } else { 0 };
            if written < bytes || slices.len() == SLICES {
                connection.waiting.extend(records.iter().map(|record| (record.clone(), 0)));
                connection.advance(written);
            }
            if is_clear && written > 0 && !connection.waiting.is_empty() {
                // Took a part: until it says "would block" no edge comes.
                connection.write_on();
            }
        }
    }
}

impl Connection {
    /// Reads what the client says. False at the end.
    fn read(&mut self) -> bool {
        let mut bytes = [0; 4096];
        loop {
            match (self.tcp.read(&mut bytes), &mut self.head) {
                (Ok(0), _) => return false,
                (Ok(count), Some(head)) => {
                    head.extend_from_slice(&bytes[..count]);
                    if head.ends_with(b"\r\n\r\n") {
                        self.head = None;
                        if self.tcp.write_all(ANSWER).is_err() {
                            return false;
                        }
                    }
                }
                (Ok(_), None) => {}
                (Err(error), _) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
    }

    /// Writes what waits until the socket is full. False when it is over.
    fn write_on(&mut self) -> bool {
        while !self.waiting.is_empty() {
            let mut skip = self.written;
            let frames = self.waiting.iter().flat_map(|(record, from)| &record[*from..]).take(SLICES);
            let slices: Vec<IoSlice> = frames.map(|frame| IoSlice::new(&frame[std::mem::take(&mut skip)..])).collect();
            match self.tcp.write_vectored(&slices) {
                Ok(count) => self.advance(count),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(_) => return false,
            }
        }
        true
    }

    fn advance(&mut self, count: usize) {
        self.written += count;
        while let Some((record, from)) = self.waiting.front_mut() {
            match record.get(*from) {
                Some(frame) if self.written < frame.len() => return,
                Some(frame) => {
                    self.written -= frame.len();
                    *from += 1;
                }
                None => drop(self.waiting.pop_front()),
            }
        }
    }
}

impl Doors {
    fn tell(&self, note: Note) -> io::Result<()> {
        // The other thread lives as long as the process.
        let _ = self.other.send(note);
        self.waker.wake()
    }

    /// Reads from the publisher; complete records go to the other thread and are returned.
    fn read(&mut self, registry: &mio::Registry) -> io::Result<Vec<Record>> {
        while let Ok((mut tcp, _)) = self.control.accept() {
            registry.register(&mut tcp, CONTROL, Interest::READABLE)?;
            self.bytes.clear();
            self.publisher = Some(tcp);
        }
        let mut buffer = [0; 64 * 1024];
        while let Some(count) = self.publisher.as_mut().and_then(|tcp| tcp.read(&mut buffer).ok()) {
            if count == 0 {
                self.publisher = None;
            }
            self.bytes.extend_from_slice(&buffer[..count]);
        }
        let mut records = Vec::new();
        while let Some((record, used)) = record(&self.bytes) {
            self.bytes.drain(..used);
            let record = Arc::new(record);
            self.tell(Note::Record(record.clone()))?;
            records.push(record);
        }
        Ok(records)
    }
}

/// The first record of what the publisher said, and its length; None as long as it is incomplete.
fn record(bytes: &[u8]) -> Option<(Vec<Vec<u8>>, usize)> {
    let number = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize);
    let mut at = 4;
    let mut frames = Vec::new();
    for _ in 0..number(0)? {
        let length = number(at)?;
        frames.push(bytes.get(at + 4..at + 4 + length)?.to_vec());
        at += 4 + length;
    }
    Some((frames, at))
}
