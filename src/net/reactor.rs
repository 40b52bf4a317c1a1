//! One network thread: a poll loop over its connections. Moves what happens at a socket, in time, on the links or on
//! the main thread to where it is decided, and the outcome back. A turn does a bounded amount for each connection, and
//! reads for a bounded time, so that none can starve the others, and writes at its end, so that what was said in one
//! turn goes out at once.

mod delivery;
mod doors;
mod notes;
mod odoo;
mod requests;
mod watching;

use super::Env;
use super::bridge::{Census, LogLevel, MainLine, Note, Numbers, Peer, WAKER};
use super::connection::{Connection, Turn};
use super::counters::Counters;
use super::front::{CONNECTIONS, Front};
use super::odoo::Odoo;
use super::outbound::Flow;
use super::timers::Timers;
use super::visitor::Handovers;
use crate::core::hub::{Hub, Moment, Slot};
use crate::core::protocol::{Close, CloseCode};
use crate::core::settings::{Database, Settings};
use crossbeam_channel::Receiver;
use mio::event::Event;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Registry, Token};
use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How soon to try again when the main thread takes no messages, in milliseconds.
const MAIN_RETRY: Moment = 20;

/// How long a stop waits for the clients, in milliseconds.
const STOP_WAIT: Moment = 1_000;

/// How long a turn goes on reading before what was dispatched meanwhile goes out. One more message may go over it: the
/// longest takes about 10 ms.
const READING: Duration = Duration::from_millis(2);

/// What a reactor is made of, as [`super::bridge::Net::start`] hands it to its thread.
pub struct Parts {
    pub index: usize,
    pub poll: Poll,
    pub notes: Receiver<Note>,
    pub peers: Vec<Peer>,
    pub main: MainLine,
    pub numbers: Arc<Numbers>,
    pub census: Arc<Census>,
    pub settings: Arc<Settings>,
    pub databases: Arc<Vec<Database>>,
    pub counters: Arc<Counters>,
    pub handovers: Arc<Handovers>,
    pub start: Instant,
    pub link_path: PathBuf,
}

/// A network thread.
pub struct Reactor {
    index: usize,
    poll: Poll,
    registry: Registry,
    notes: Receiver<Note>,
    peers: Vec<Peer>,
    main: MainLine,
    numbers: Arc<Numbers>,
    census: Arc<Census>,
    env: Env,
    hub: Hub,
    connections: Vec<Option<Box<Connection>>>,
    free: Vec<Slot>,
    timers: Timers,
    /// Connections with something to write.
    dirty: Vec<Slot>,
    /// Connections with something to read, in the order of their turns.
    again: VecDeque<Slot>,
    receivers: Vec<Slot>,
    /// Who waits for the answer to which query, and whom it went to.
    queries: HashMap<u64, (Slot, Whom)>,
    /// Open websockets of the live page.
    watchers: Vec<Slot>,
    /// Who waits for the text of `/metrics`.
    measuring: Vec<Slot>,
    next_survey: Moment,
    /// What was dispatched in this turn: when it was committed (microseconds since 1970), how many it reached.
    dispatched: Vec<(i64, usize)>,
    /// Only reactor 0 has it.
    front: Option<Front>,
    /// The desk for Odoo, beside the front.
    odoo: Option<Odoo>,
    /// When the desk is to be turned to next.
    odoo_at: Option<Moment>,
    /// The reactor that takes the next accepted connection.
    next: usize,
    /// Set when the thread is to end.
    stop_at: Option<Moment>,
}

/// Whom a query went to.
#[derive(Clone, Copy)]
enum Whom {
    /// The worker of a database.
    Database(u32),
    Odoo,
}

impl Reactor {
    /// Makes a reactor in its own thread.
    ///
    /// # Errors
    /// Descriptors cannot be had.
    pub fn new(parts: Parts) -> io::Result<Reactor> {
        let registry = parts.poll.registry().try_clone()?;
        let front = match parts.index {
            0 => Some(Front::new(&registry, &parts.settings, parts.link_path)?),
            _ => None,
        };
        let mut env = Env::new(parts.settings, parts.databases, parts.counters, parts.start);
        env.handovers = parts.handovers;
        let odoo = front.as_ref().and(parts.peers.first());
        let odoo = odoo.map(|own| Odoo::new(parts.peers.clone(), own.clone(), env.handovers.clone()));
        Ok(Reactor {
            index: parts.index,
            poll: parts.poll,
            registry,
            notes: parts.notes,
            peers: parts.peers,
            main: parts.main,
            numbers: parts.numbers,
            census: parts.census,
            env,
            hub: Hub::default(),
            connections: Vec::new(),
            free: Vec::new(),
            timers: Timers::default(),
            dirty: Vec::new(),
            again: VecDeque::new(),
            receivers: Vec::new(),
            queries: HashMap::new(),
            watchers: Vec::new(),
            measuring: Vec::new(),
            next_survey: 0,
            dispatched: Vec::new(),
            front,
            odoo,
            odoo_at: None,
            next: 0,
            stop_at: None,
        })
    }

    /// Runs until told to stop.
    ///
    /// # Errors
    /// The poll's own.
    pub fn run(mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        self.front_turn();
        while !self.is_done() {
            match self.poll.poll(&mut events, self.timeout()) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            }
            self.env.tick();
            for event in &events {
                self.happened(event);
            }
            self.go_on(Instant::now() + READING);
            self.read_notes();
            self.front_turn();
            self.odoo_turn();
            self.time_passes();
            self.watch_time();
            self.write();
            self.observe();
            self.main.retry();
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        let is_empty = self.free.len() == self.connections.len();
        self.stop_at.is_some_and(|at| is_empty || at <= self.env.now)
    }

    fn timeout(&self) -> Option<Duration> {
        if !self.again.is_empty() || !self.dirty.is_empty() || !self.notes.is_empty() {
            return Some(Duration::ZERO);
        }
        let front = self.front.as_ref().and_then(Front::wake_at);
        let main = self.main.is_waiting().then_some(self.env.now + MAIN_RETRY);
        let others = [self.odoo_at, self.stop_at, self.watch_deadline()];
        let at = [self.timers.next(), front, main].into_iter().chain(others).flatten().min()?;
        Some(Duration::from_millis(at.saturating_sub(self.env.elapsed())))
    }

    fn happened(&mut self, event: &Event) {
        let token = event.token();
        if token == WAKER {
            return;
        }
        let Some(slot) = token.0.checked_sub(CONNECTIONS) else {
            if let Some(front) = &mut self.front {
                front.ready(token.0, self.env.now, &mut self.main);
            }
            return;
        };
        let slot = slot as Slot;
        if event.is_writable() {
            self.mark(slot);
        }
        if event.is_readable() || event.is_read_closed() || event.is_error() {
            self.come_back(slot);
        }
    }

    fn get(&mut self, slot: Slot) -> Option<&mut Connection> {
        self.connections.get_mut(slot as usize)?.as_deref_mut()
    }

    /// Puts a connection into the list of those to be written to.
    fn mark(&mut self, slot: Slot) {
        if let Some(connection) = self.get(slot)
            && !std::mem::replace(&mut connection.dirty, true)
        {
            self.dirty.push(slot);
        }
    }

    /// Puts a connection into the line of those that are to be read from.
    fn come_back(&mut self, slot: Slot) {
        if let Some(connection) = self.get(slot)
            && !std::mem::replace(&mut connection.again, true)
        {
            self.again.push_back(slot);
        }
    }

    /// Gives those their turn that have something to read, one after the other until `end`; the rest stay in line for
    /// the next turn.
    fn go_on(&mut self, end: Instant) {
        for _ in 0..self.again.len() {
            let Some(slot) = self.again.pop_front() else { return };
            if let Some(connection) = self.get(slot) {
                connection.again = false;
                self.read(slot);
            }
            if Instant::now() >= end {
                return;
            }
        }
    }

    /// A turn of reading for one connection.
    fn read(&mut self, slot: Slot) {
        let limit = self.env.settings.send_queue_max;
        let Some(connection) = self.get(slot) else { return };
        connection.socket.begin_turn(limit);
        loop {
            let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) else { return };
            match connection.read(&self.env) {
                Turn::Wait => break,
                Turn::Again => {
                    self.come_back(slot);
                    break;
                }
                Turn::Done => {}
                Turn::Opened => self.opened(slot),
                Turn::Asked => self.asked(slot),
                Turn::Waited => {}
                Turn::Subscribe { channels, last } => self.subscribe(slot, channels, last),
                Turn::Presence(data) => self.present(slot, data),
                Turn::Ignored(reason) => {
                    let text = format!("ignored a message of connection {}: {reason}", connection.id);
                    self.main.log(LogLevel::Debug, text, None);
                }
                Turn::Closing => self.leave(slot),
                Turn::Gone => return self.remove(slot),
            }
        }
        if let Some(connection) = self.get(slot) {
            let received = connection.socket.take_received();
            Counters::add(&self.env.counters.bytes_received, received);
        }
        self.mark(slot);
    }

    /// How long what went out in this turn has taken since its commit.
    fn observe(&mut self) {
        if self.dispatched.is_empty() {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        for (committed, count) in self.dispatched.drain(..) {
            let taken = now.saturating_sub(u128::from(committed.unsigned_abs()));
            self.env.counters.took(u64::try_from(taken).unwrap_or(u64::MAX), count);
        }
    }

    /// A connection is on its way out: nothing is delivered to it any more.
    fn leave(&mut self, slot: Slot) {
        self.drop_query(slot);
        self.watchers.retain(|watcher| *watcher != slot);
        self.depart(slot);
        if self.get(slot).is_some_and(|connection| std::mem::take(&mut connection.counted)) {
            Counters::less(&self.env.counters.connections_open);
        }
        let Some(database) = self.hub.database(slot) else { return };
        let unanswered = self.hub.close(slot);
        self.give_up(slot, database, unanswered);
    }

    fn remove(&mut self, slot: Slot) {
        self.leave(slot);
        if let Some(mut connection) = self.connections.get_mut(slot as usize).and_then(Option::take) {
            let _ = self.registry.deregister(&mut connection.socket.tcp);
            connection.socket.abandon();
            Counters::less(&self.env.counters.sockets_open);
            self.free.push(slot);
        }
    }

    fn close(&mut self, slot: Slot, close: &Close) {
        if self.get(slot).and_then(Connection::waiting).is_some() {
            let status = match close.code {
                CloseCode::Unauthorized => 401,
                CloseCode::Forbidden => 403,
                _ => 503,
            };
            return self.finish(slot, |waiting| waiting.fail(status));
        }
        if let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) {
            connection.close(close, &self.env);
        }
        self.leave(slot);
        self.mark(slot);
    }

    fn accepted(&mut self, mut tcp: TcpStream, address: SocketAddr, refused: bool) {
        let slot = self.free.pop().unwrap_or(self.connections.len() as Slot);
        let token = Token(CONNECTIONS + slot as usize);
        // What is said in one turn is written at once already; waiting for more would only delay it.
        let _ = tcp.set_nodelay(true);
        if self.stop_at.is_some() || self.registry.register(&mut tcp, token, Interest::READABLE).is_err() {
            Counters::less(&self.env.counters.sockets_open);
            if (slot as usize) < self.connections.len() {
                self.free.push(slot);
            }
            return;
        }
        let id = self.numbers.connection.fetch_add(1, Ordering::Relaxed) + 1;
        let connection = Some(Box::new(Connection::new(id, tcp, address, refused, self.env.now)));
        match self.connections.get_mut(slot as usize) {
            Some(place) => *place = connection,
            None => self.connections.push(connection),
        }
        self.mark(slot);
    }

    fn time_passes(&mut self) {
        while let Some((at, slot, id)) = self.timers.due(self.env.now) {
            let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) else { continue };
            if connection.id != id || connection.armed != at {
                continue;
            }
            connection.armed = Moment::MAX;
            match connection.due(&self.env) {
                Turn::Gone => self.remove(slot),
                Turn::Waited => self.waited(slot),
                Turn::Closing => {
                    self.leave(slot);
                    self.mark(slot);
                }
                _ => self.mark(slot),
            }
        }
    }

    /// Writes what this turn has said, and sets timers anew.
    fn write(&mut self) {
        for slot in std::mem::take(&mut self.dirty) {
            let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) else { continue };
            connection.dirty = false;
            match connection.flush(&self.env) {
                Err(_) => self.remove(slot),
                Ok((flow, read)) => {
                    if read {
                        self.come_back(slot);
                    }
                    self.after_write(slot, flow);
                }
            }
        }
    }

    /// Asks the poll for writability as long as something waits, sets the timer, and lets a replay go on.
    fn after_write(&mut self, slot: Slot, flow: Flow) {
        let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) else { return };
        let wants_write = flow == Flow::Blocked;
        let socket = &mut connection.socket;
        if std::mem::replace(&mut socket.wants_write, wants_write) != wants_write {
            let interest = if wants_write { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
            if self.registry.reregister(&mut socket.tcp, Token(CONNECTIONS + slot as usize), interest).is_err() {
                return self.remove(slot);
            }
        }
        let deadline = connection.deadline(&self.env).max(self.env.now + 1);
        if deadline < connection.armed {
            connection.armed = deadline;
            self.timers.set(deadline, slot, connection.id);
        }
        if flow == Flow::Paused {
            self.mark(slot);
        }
        self.replay_on(slot);
    }
}
