//! Those who mean well: subscribers that each have a channel of their own and one with everybody, and what they receive
//! when.

use crate::publish::frame;
use crate::reader::{masked, open, request};
use crate::scan::{DIGITS, MARK, Scan};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use std::error::Error;
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What the subscribers tell.
pub struct Told {
    pub begin: Instant,
    pub stop: AtomicBool,
    /// How many have subscribed.
    pub opened: AtomicUsize,
    /// How many notifications have come.
    pub count: AtomicUsize,
    /// Number and time (ns from the beginning) of each receipt.
    pub receipts: Mutex<Vec<(u64, u64)>>,
    pub failure: Mutex<Option<String>>,
}

impl Told {
    /// Nothing yet.
    pub fn new() -> Told {
        Told {
            begin: Instant::now(),
            stop: AtomicBool::new(false),
            opened: AtomicUsize::new(0),
            count: AtomicUsize::new(0),
            receipts: Mutex::default(),
            failure: Mutex::default(),
        }
    }

    /// Nanoseconds from the beginning.
    pub fn now(&self) -> u64 {
        self.begin.elapsed().as_nanos() as u64
    }

    /// The first thing that went wrong.
    ///
    /// # Errors
    /// That.
    pub fn check(&self) -> Result<()> {
        match self.failure.lock().map_err(|_| "a subscriber died")?.clone() {
            Some(failure) => Err(failure.into()),
            None => Ok(()),
        }
    }
}

/// Who subscribes to what, and where.
pub struct Subscribers<'a> {
    pub address: SocketAddr,
    pub path: &'a str,
    pub count: usize,
    pub broadcast: &'a str,
    pub last: i64,
}

struct Subscriber {
    tcp: TcpStream,
    is_open: bool,
    head: Vec<u8>,
    scan: Scan,
    /// Text that has not been looked through: a number may be cut.
    text: Vec<u8>,
}

impl Subscribers<'_> {
    /// Opens, subscribes and reads until told to stop.
    ///
    /// # Errors
    /// A socket cannot be opened, or the server closes one.
    pub fn run(&self, told: &Told) -> Result<()> {
        let mut poll = Poll::new()?;
        let mut events = Events::with_capacity(1024);
        let mut buffer = vec![0; 64 * 1024];
        let mut all = Vec::new();
        for place in 0..self.count {
            let mut tcp = open(place, self.address, None)?;
            poll.registry().register(&mut tcp, Token(place), Interest::READABLE | Interest::WRITABLE)?;
            all.push(Subscriber { tcp, is_open: false, head: Vec::new(), scan: Scan::default(), text: Vec::new() });
        }
        let mut asked = vec![false; self.count];
        while !told.stop.load(Ordering::Acquire) {
            match poll.poll(&mut events, Some(Duration::from_millis(100))) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            }
            for event in &events {
                let place = event.token().0;
                let subscriber = &mut all[place];
                if event.is_writable() && !std::mem::replace(&mut asked[place], true) {
                    subscriber.tcp.write_all(request(self.path, self.address).as_bytes())?;
                }
                if event.is_readable() {
                    self.read(place, subscriber, &mut buffer, told)?;
                }
            }
        }
        Ok(())
    }

    fn read(&self, place: usize, subscriber: &mut Subscriber, buffer: &mut [u8], told: &Told) -> Result<()> {
        loop {
            let count = match subscriber.tcp.read(buffer) {
                Ok(0) => return Err("the server closed a well-behaved connection".into()),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            if subscriber.is_open {
                subscriber.take(&buffer[..count], told)?;
                continue;
            }
            subscriber.head.extend_from_slice(&buffer[..count]);
            if subscriber.head.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
                if !subscriber.head.starts_with(b"HTTP/1.1 101 ") {
                    return Err(format!("no upgrade: {}", String::from_utf8_lossy(&subscriber.head)).into());
                }
                subscriber.is_open = true;
                let channels = format!("\"{}\",\"{}\"", self.broadcast, own(self.broadcast, place));
                subscriber.tcp.write_all(&masked(&super::kind::subscribe(&channels, self.last)))?;
                told.opened.fetch_add(1, Ordering::Release);
            }
        }
    }
}

/// The channel of one subscriber.
pub fn own(broadcast: &str, place: usize) -> String {
    format!("{broadcast}-{place}")
}

impl Subscriber {
    fn take(&mut self, bytes: &[u8], told: &Told) -> Result<()> {
        let text = &mut self.text;
        let found = self.scan.feed(bytes, |payload| text.extend_from_slice(payload));
        if found.closed {
            return Err(
                format!("the server closed a well-behaved connection: {}", String::from_utf8_lossy(bytes)).into()
            );
        }
        for _ in 0..found.pings {
            let mut pong = frame(0x8a, &[]);
            pong[1] |= 0x80;
            pong.extend([0; 4]);
            self.tcp.write_all(&pong)?;
        }
        let now = told.now();
        let numbers = numbers(&mut self.text);
        told.count.fetch_add(numbers.len(), Ordering::Release);
        let mut receipts = told.receipts.lock().map_err(|_| "the publisher died")?;
        receipts.extend(numbers.into_iter().map(|number| (number, now)));
        Ok(())
    }
}

/// The numbers in a text, which keeps only what may be cut.
fn numbers(text: &mut Vec<u8>) -> Vec<u64> {
    let (mut found, mut done) = (Vec::new(), 0);
    while let Some(at) = text[done..].iter().position(|byte| *byte == MARK).map(|at| done + at + 1) {
        let Some(digits) = text.get(at..at + DIGITS) else {
            text.drain(..at - 1);
            return found;
        };
        found.extend(String::from_utf8_lossy(digits).parse::<u64>());
        done = at + DIGITS;
    }
    text.clear();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_however_they_are_cut() {
        let whole = b"[~00000007 xx,~00000008 xx]";
        for chunk in [1, 3, 9, whole.len()] {
            let mut text = Vec::new();
            let found: Vec<u64> = whole
                .chunks(chunk)
                .flat_map(|bytes| {
                    text.extend_from_slice(bytes);
                    numbers(&mut text)
                })
                .collect();
            assert_eq!(found, [7, 8], "cut every {chunk} bytes");
        }
    }
}
