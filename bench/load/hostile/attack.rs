//! The attackers, in a process of their own so that what they cost is known: opens its peers, misbehaves in one way for
//! some seconds, and says what it did. A peer that the server closes comes back at once.

use super::kind::Kind;
use crate::publish::Flood;
use crate::reader::{masked, open, request};
use mio::event::Event;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use socket2::{SockFilter, SockRef};
use std::error::Error;
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a peer waits before it comes back.
const BACK: Duration = Duration::from_millis(10);

/// How often what is due is looked for.
const TICK: Duration = Duration::from_millis(5);

/// A burst is over when everybody is in or turned away, or after this long.
const BURST: Duration = Duration::from_secs(4);

/// How long everybody stays who came in a burst.
const STAY: Duration = Duration::from_millis(500);

/// Messages after which a peer that nobody stops begins anew: one more than the gateway's rate limit lets through.
const MESSAGES: usize = 11;

/// When a peer vanishes after it has subscribed.
const VANISH: Duration = Duration::from_millis(500);

/// How an attack goes.
#[derive(Clone, Debug)]
pub struct Attack {
    pub kind: Kind,
    pub address: SocketAddr,
    pub path: String,
    pub seconds: Duration,
    pub peers: usize,
    /// The first peer's number, which says where it comes from.
    pub first: usize,
    /// The channel that well-behaved ones are on, and the one that only peers are on.
    pub broadcast: String,
    pub flood: String,
    /// The last id before.
    pub last: i64,
    /// Where to publish what readers that stall are sent: SQL, and the bare writer's control port.
    pub publish: String,
    pub control: Option<String>,
}

#[derive(Default)]
enum Stage {
    #[default]
    Away,
    Connecting,
    Upgrading(Vec<u8>),
    Open,
    /// Nothing more is done with it.
    Mute,
}

#[derive(Default)]
struct Peer {
    tcp: Option<TcpStream>,
    stage: Stage,
    /// When something is due.
    next: Option<Instant>,
    sent: usize,
    /// The message being written, and bytes of it that are.
    out: Option<(Arc<[u8]>, usize)>,
}

/// What came of it.
#[derive(Default)]
struct Done {
    opened: usize,
    refused: usize,
    closed: usize,
    messages: usize,
    bytes: usize,
    bursts: usize,
}

struct Crowd {
    attack: Attack,
    poll: Poll,
    peers: Vec<Peer>,
    /// The long messages, in turn.
    giants: Vec<Arc<[u8]>>,
    done: Done,
    burst: Instant,
    settled: Option<Instant>,
}

/// Attacks; the line that tells of it.
///
/// # Errors
/// The system's, or SQL's.
pub fn attack(attack: &Attack) -> Result<String, Box<dyn Error>> {
    let begin = Instant::now();
    let mut flood = match attack.kind {
        Kind::Stalled => Some(Flood::connect(&attack.publish, attack.control.as_deref(), &attack.flood)?),
        _ => None,
    };
    let mut crowd = Crowd::new(attack.clone())?;
    let mut events = Events::with_capacity(1024);
    let mut buffer = vec![0; 64 * 1024];
    while begin.elapsed() < attack.seconds {
        match crowd.poll.poll(&mut events, Some(TICK)) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            result => result?,
        }
        for event in &events {
            crowd.happened(event, &mut buffer);
        }
        crowd.tick();
        if let Some(flood) = &mut flood {
            flood.go_on(begin.elapsed())?;
        }
    }
    let Done { opened, refused, closed, messages, bytes, bursts } = crowd.done;
    let open = crowd.peers.iter().filter(|peer| matches!(peer.stage, Stage::Open | Stage::Mute)).count();
    let floods = flood.map_or(0, |flood| flood.sent());
    Ok(format!(
        "opened={opened} refused={refused} closed={closed} messages={messages} bytes={bytes} bursts={bursts} open={open} \
         floods={floods}"
    ))
}

impl Crowd {
    fn new(attack: Attack) -> std::io::Result<Crowd> {
        let giants = attack.kind.giants(attack.last).iter().map(|text| masked(text).into()).collect();
        let now = Instant::now();
        let peers = (0..attack.peers).map(|_| Peer { next: Some(now), ..Peer::default() }).collect();
        let (done, settled) = (Done::default(), None);
        Ok(Crowd { attack, poll: Poll::new()?, peers, giants, done, burst: now, settled })
    }

    /// What time asks for.
    fn tick(&mut self) {
        let now = Instant::now();
        for place in 0..self.peers.len() {
            if self.peers[place].next.is_some_and(|next| next <= now) {
                self.due(place, now);
            }
        }
        if self.attack.kind == Kind::Burst {
            self.burst(now);
        }
    }

    fn due(&mut self, place: usize, now: Instant) {
        let kind = self.attack.kind;
        let peer = &mut self.peers[place];
        peer.next = None;
        match (&peer.stage, kind) {
            (Stage::Away, _) => self.connect(place),
            (Stage::Open, Kind::Slowloris) => {
                peer.next = Some(now + Duration::from_secs(1));
                self.say(place, b"a");
            }
            (Stage::Open, Kind::Subscribes) => {
                peer.next = Some(now + kind.pace(place));
                peer.sent += 1;
                let text = kind.subscription(self.attack.first + place, peer.sent, self.attack.last);
                self.say(place, &masked(&text));
            }
            (Stage::Open, Kind::HalfOpen) => {
                vanish(peer.tcp.as_ref());
                peer.stage = Stage::Mute;
            }
            _ => {}
        }
    }

    /// When all who came in a burst are in, or turned away, they leave, and all come again.
    fn burst(&mut self, now: Instant) {
        let is_settled = |peer: &Peer| matches!(peer.stage, Stage::Open | Stage::Away);
        if self.settled.is_none() && (now > self.burst + BURST || self.peers.iter().all(is_settled)) {
            self.settled = Some(now);
        }
        if self.settled.is_some_and(|at| now > at + STAY) {
            for peer in &mut self.peers {
                *peer = Peer { next: Some(now + BACK), ..Peer::default() };
            }
            self.settled = None;
            self.burst = now;
            self.done.bursts += 1;
        }
    }

    fn connect(&mut self, place: usize) {
        let number = self.attack.first + place;
        let buffer = (self.attack.kind == Kind::Stalled).then_some(4096);
        let Ok(mut tcp) = open(number, self.attack.address, buffer) else { return self.lose(place) };
        let both = Interest::READABLE | Interest::WRITABLE;
        if self.poll.registry().register(&mut tcp, Token(place), both).is_err() {
            return self.lose(place);
        }
        self.peers[place] = Peer { tcp: Some(tcp), stage: Stage::Connecting, ..Peer::default() };
    }

    /// A peer is closed and comes back.
    fn lose(&mut self, place: usize) {
        let peer = &mut self.peers[place];
        match peer.stage {
            Stage::Open | Stage::Mute => self.done.closed += 1,
            Stage::Connecting | Stage::Upgrading(_) | Stage::Away => self.done.refused += 1,
        }
        // In a burst it waits for the next one.
        let next = (self.attack.kind != Kind::Burst).then(|| Instant::now() + BACK);
        *peer = Peer { next, ..Peer::default() };
    }

    fn happened(&mut self, event: &Event, buffer: &mut [u8]) {
        let place = event.token().0;
        let peer = &mut self.peers[place];
        let Some(tcp) = &mut peer.tcp else { return };
        match &mut peer.stage {
            Stage::Connecting if event.is_writable() => {
                if !matches!(tcp.take_error(), Ok(None)) {
                    return self.lose(place);
                }
                self.connected(place);
            }
            Stage::Mute if event.is_error() || event.is_write_closed() => self.lose(place),
            Stage::Upgrading(_) if event.is_readable() => self.upgrade(place, buffer),
            Stage::Open => {
                if event.is_readable() && self.drain(place, buffer) {
                    return self.lose(place);
                }
                if event.is_writable() {
                    self.write(place);
                }
            }
            _ => {}
        }
    }

    fn connected(&mut self, place: usize) {
        let Attack { path, address, kind, .. } = &self.attack;
        if *kind == Kind::Slowloris {
            let now = Instant::now();
            let head = format!("GET /websocket HTTP/1.1\r\nHost: {address}\r\nX-Slow: ");
            // Not all in the same moment.
            let next = now + Duration::from_millis(place as u64 * 7 % 1000);
            self.peers[place].stage = Stage::Open;
            self.peers[place].next = Some(next);
            self.done.opened += 1;
            return self.say(place, head.as_bytes());
        }
        let request = request(path, *address);
        self.peers[place].stage = Stage::Upgrading(Vec::new());
        self.say(place, request.as_bytes());
    }

    /// Takes the answer to the upgrade and does what comes after it.
    fn upgrade(&mut self, place: usize, buffer: &mut [u8]) {
        let peer = &mut self.peers[place];
        let (Stage::Upgrading(head), Some(tcp)) = (&mut peer.stage, &mut peer.tcp) else { return };
        match tcp.read(buffer) {
            Ok(count) if count > 0 => head.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            _ => return self.lose(place),
        }
        if !head.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
            return;
        }
        if !head.starts_with(b"HTTP/1.1 101 ") {
            return self.lose(place);
        }
        peer.stage = Stage::Open;
        self.done.opened += 1;
        self.begin(place);
    }

    /// A websocket is open.
    fn begin(&mut self, place: usize) {
        let Attack { kind, last, first, broadcast, flood, .. } = &self.attack;
        let (kind, last) = (*kind, *last);
        let subscribe = |channel: &str| masked(&super::kind::subscribe(&format!("\"{channel}\""), last));
        match kind {
            Kind::Slowloris => {}
            Kind::Subscribes => self.peers[place].next = Some(Instant::now() + kind.pace(place) / 2),
            Kind::Giants | Kind::Lists => self.write(place),
            Kind::Burst => {
                let text = kind.subscription(first + place, 0, last);
                self.say(place, &masked(&text));
            }
            Kind::HalfOpen => {
                let frame = subscribe(broadcast);
                self.peers[place].next = Some(Instant::now() + VANISH);
                self.say(place, &frame);
            }
            Kind::Stalled => {
                let frame = subscribe(flood);
                self.say(place, &frame);
                self.peers[place].stage = Stage::Mute;
            }
        }
    }

    /// Reads and throws away. True at the end.
    fn drain(&mut self, place: usize, buffer: &mut [u8]) -> bool {
        let Some(tcp) = &mut self.peers[place].tcp else { return false };
        loop {
            match tcp.read(buffer) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() != ErrorKind::WouldBlock,
            }
        }
    }

    /// Says something short.
    fn say(&mut self, place: usize, bytes: &[u8]) {
        let Some(tcp) = &mut self.peers[place].tcp else { return };
        match tcp.write(bytes) {
            Ok(count) => {
                self.done.bytes += count;
                self.done.messages += 1;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => self.lose(place),
        }
    }

    /// Writes long messages as long as they are taken.
    fn write(&mut self, place: usize) {
        if self.giants.is_empty() {
            return;
        }
        let peer = &mut self.peers[place];
        let Some(tcp) = &mut peer.tcp else { return };
        loop {
            if peer.sent >= MESSAGES {
                return self.lose(place);
            }
            let (sent, giants) = (peer.sent, &self.giants);
            let (message, at) = peer.out.get_or_insert_with(|| (giants[(place + sent) % giants.len()].clone(), 0));
            match tcp.write(&message[*at..]) {
                Ok(count) => {
                    *at += count;
                    self.done.bytes += count;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => return self.lose(place),
            }
            if *at == message.len() {
                peer.out = None;
                peer.sent += 1;
                self.done.messages += 1;
            }
        }
    }
}

/// From now on the kernel drops whatever arrives for this socket: nothing is acknowledged, nothing reset, as if the
/// cable had been pulled.
fn vanish(tcp: Option<&TcpStream>) {
    let Some(tcp) = tcp else { return };
    // BPF_RET | BPF_K with 0: keep no byte (socket(7), SO_ATTACH_FILTER).
    let _ = SockRef::from(tcp).attach_filter(&[SockFilter::new(0x06, 0, 0, 0)]);
}
