//! One network thread: a poll loop over its connections. Moves what happens at a socket, in time, on the links or on
//! the main thread to where it is decided, and the outcome back. A turn does a bounded amount for each connection, so
//! that none can starve the others, and writes at its end, so that what was said in one turn goes out at once.

use super::auth::Admission;
use super::bridge::{LogLevel, MainLine, Note, Numbers, Peer, ToMain, ToNet, WAKER};
use super::connection::{Connection, Turn};
use super::counters::Counters;
use super::front::{CONNECTIONS, Front};
use super::links::{LinkEvent, Recover};
use super::outbound::{Flow, Kind};
use super::timers::Timers;
use super::{Env, batch::Batch};
use crate::core::channel::Channel;
use crate::core::hub::{Hub, Moment, Slot};
use crate::core::link;
use crate::core::notification::Notification;
use crate::core::protocol::{self, CHANNELS_MAX, Close, CloseCode};
use crate::core::settings::{Database, Settings};
use crossbeam_channel::Receiver;
use mio::event::Event;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Registry, Token};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Notes handled in one turn.
const NOTES: usize = 256;

/// Accepted at one door in one turn.
const ACCEPTS: usize = 128;

/// Connections over the limit that are still told so (503); beyond them a connection is dropped unheard.
const REFUSALS: usize = 128;

/// How soon to try again when the main thread takes no messages, in milliseconds.
const MAIN_RETRY: Moment = 20;

/// How long a stop waits for the clients, in milliseconds.
const STOP_WAIT: Moment = 1_000;

/// What a reactor is made of, as [`super::bridge::Net::start`] hands it to its thread.
pub struct Parts {
    pub index: usize,
    pub poll: Poll,
    pub notes: Receiver<Note>,
    pub peers: Vec<Peer>,
    pub main: MainLine,
    pub numbers: Arc<Numbers>,
    pub settings: Arc<Settings>,
    pub databases: Arc<Vec<Database>>,
    pub counters: Arc<Counters>,
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
    env: Env,
    hub: Hub,
    connections: Vec<Option<Box<Connection>>>,
    free: Vec<Slot>,
    timers: Timers,
    /// Connections with something to write.
    dirty: Vec<Slot>,
    /// Connections with something to read that had their turn.
    again: Vec<Slot>,
    receivers: Vec<Slot>,
    /// Only reactor 0 has it.
    front: Option<Front>,
    /// The reactor that takes the next accepted connection.
    next: usize,
    /// Set when the thread is to end.
    stop_at: Option<Moment>,
}

impl Reactor {
    pub fn new(parts: Parts) -> io::Result<Reactor> {
        let registry = parts.poll.registry().try_clone()?;
        let front = match parts.index {
            0 => Some(Front::new(&registry, &parts.settings, parts.link_path)?),
            _ => None,
        };
        Ok(Reactor {
            index: parts.index,
            poll: parts.poll,
            registry,
            notes: parts.notes,
            peers: parts.peers,
            main: parts.main,
            numbers: parts.numbers,
            env: Env::new(parts.settings, parts.databases, parts.counters, parts.start),
            hub: Hub::default(),
            connections: Vec::new(),
            free: Vec::new(),
            timers: Timers::default(),
            dirty: Vec::new(),
            again: Vec::new(),
            receivers: Vec::new(),
            front,
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
            for slot in std::mem::take(&mut self.again) {
                self.read(slot);
            }
            self.read_notes();
            self.front_turn();
            self.time_passes();
            self.write();
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
        let at = [self.timers.next(), front, main, self.stop_at].into_iter().flatten().min()?;
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
            self.read(slot);
        }
    }

    fn get(&mut self, slot: Slot) -> Option<&mut Connection> {
        self.connections.get_mut(slot as usize)?.as_deref_mut()
    }

    /// Puts a connection into the list of those to be written to.
    fn mark(&mut self, slot: Slot) {
        if let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut)
            && !std::mem::replace(&mut connection.dirty, true)
        {
            self.dirty.push(slot);
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
                    self.again.push(slot);
                    break;
                }
                Turn::Opened => self.opened(slot),
                Turn::Subscribe { channels, last } => self.subscribe(slot, channels, last),
                Turn::Ignored(reason) => {
                    let text = format!("ignored a message of connection {}: {reason}", connection.id);
                    self.main.log(LogLevel::Debug, text, None);
                }
                Turn::Closing => self.leave(slot),
                Turn::Gone => return self.remove(slot),
            }
        }
        self.mark(slot);
    }

    fn opened(&mut self, slot: Slot) {
        let Some(websocket) = self.get(slot).and_then(|connection| connection.websocket()) else { return };
        let database = websocket.admission.claims.oid;
        self.hub.open(slot, database);
        Counters::add(&self.env.counters.connections_total, 1);
        Counters::add(&self.env.counters.connections_open, 1);
    }

    /// A connection is on its way out: nothing is delivered to it any more.
    fn leave(&mut self, slot: Slot) {
        let Some(database) = self.hub.database(slot) else { return };
        Counters::less(&self.env.counters.connections_open);
        for request in self.hub.close(slot) {
            match &mut self.front {
                Some(front) => front.links.forget(database, request),
                None => self.tell_front(Note::Forget { database, request }),
            }
        }
    }

    fn remove(&mut self, slot: Slot) {
        self.leave(slot);
        if let Some(mut connection) = self.connections.get_mut(slot as usize).and_then(Option::take) {
            let _ = self.registry.deregister(&mut connection.socket.tcp);
            Counters::less(&self.env.counters.sockets_open);
            self.free.push(slot);
        }
    }

    fn close(&mut self, slot: Slot, close: &Close) {
        if let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) {
            connection.close(close, &self.env);
        }
        self.leave(slot);
        self.mark(slot);
    }

    fn subscribe(&mut self, slot: Slot, channels: Vec<Channel>, last: i64) {
        let Some(websocket) = self.get(slot).and_then(|connection| connection.websocket()) else { return };
        let Admission { claims, .. } = &websocket.admission;
        let database = claims.oid;
        if channels.len() > CHANNELS_MAX {
            let reason = format!("more than {CHANNELS_MAX} channels");
            return self.close(slot, &Close::new(CloseCode::TooBig, reason));
        }
        if let Some(channel) = channels.iter().find(|channel| !claims.allows(channel)) {
            let reason = format!("channel not allowed: {}", channel.as_str());
            return self.close(slot, &Close::new(CloseCode::Forbidden, reason));
        }
        let request = self.numbers.request.fetch_add(1, Ordering::Relaxed);
        let Some(recovery) = self.hub.subscribe(slot, channels, last, request, self.env.now) else { return };
        Counters::add(&self.env.counters.recoveries, 1);
        let recover = Recover { reactor: self.index, request, channels: recovery.channels, last: recovery.last };
        match &mut self.front {
            Some(front) => front.links.recover(database, recover),
            None => self.tell_front(Note::Recover { database, recover }),
        }
    }

    fn tell_front(&self, note: Note) {
        if let Some(front) = self.peers.first() {
            front.tell(note);
        }
    }

    fn read_notes(&mut self) {
        for _ in 0..NOTES {
            let Ok(note) = self.notes.try_recv() else { return };
            self.note(note);
        }
    }

    fn note(&mut self, note: Note) {
        match note {
            Note::Net(ToNet::Settings(settings)) => self.set_settings(settings),
            Note::Net(ToNet::Databases(databases)) => self.set_databases(databases),
            Note::Net(ToNet::Stop) => self.stop(),
            Note::Accepted { tcp, address, refused } => self.accepted(tcp, address, refused),
            Note::Batch(batch) => self.deliver(&batch),
            Note::Recovered { request, notifications } => self.recovered(request, notifications),
            Note::Inspect { inquiry, database } => {
                let connections = self.inspect(database);
                self.tell_front(Note::Inspected { inquiry, connections });
            }
            Note::Inspected { inquiry, connections } => {
                if let Some(front) = &mut self.front {
                    front.inquired(inquiry, connections);
                }
            }
            Note::Recover { database, recover } => {
                if let Some(front) = &mut self.front {
                    front.links.recover(database, recover);
                }
            }
            Note::Forget { database, request } => {
                if let Some(front) = &mut self.front {
                    front.links.forget(database, request);
                }
            }
        }
    }

    /// New settings. A changed secret ends every connection that came in under the old one.
    fn set_settings(&mut self, settings: Arc<Settings>) {
        let same_secret = settings.token_secret == self.env.settings.token_secret;
        self.env.settings = settings;
        for slot in self.open_slots() {
            if !same_secret {
                self.close(slot, &Close::new(CloseCode::Unauthorized, "the token's secret was changed"));
            }
            self.mark(slot);
        }
    }

    /// The databases that are served now; connections of others are closed.
    fn set_databases(&mut self, databases: Arc<Vec<Database>>) {
        if let Some(front) = &mut self.front {
            front.links.keep(&databases);
        }
        self.env.databases = databases;
        for slot in self.open_slots() {
            let database = self.hub.database(slot);
            if !self.env.databases.iter().any(|served| Some(served.oid) == database) {
                self.close(slot, &Close::new(CloseCode::GoingAway, "the database is no longer served"));
            }
        }
    }

    fn open_slots(&self) -> Vec<Slot> {
        let open = |slot: &Slot| self.hub.database(*slot).is_some();
        (0..self.connections.len() as Slot).filter(open).collect()
    }

    fn stop(&mut self) {
        if self.stop_at.is_some() {
            return;
        }
        self.stop_at = Some(self.env.now + STOP_WAIT);
        if let Some(front) = &mut self.front {
            front.close();
        }
        for slot in 0..self.connections.len() as Slot {
            if self.hub.database(slot).is_some() {
                self.close(slot, &Close::new(CloseCode::GoingAway, ""));
            } else if self.get(slot).is_some_and(|connection| !connection.is_closing()) {
                self.remove(slot);
            }
        }
    }

    /// One dispatch of a database worker goes out to whom it concerns.
    fn deliver(&mut self, batch: &Batch) {
        for run in batch.runs() {
            let mut receivers = std::mem::take(&mut self.receivers);
            self.hub.dispatch(batch.database, run.notifications, self.env.now, &mut receivers);
            if !receivers.is_empty() {
                Counters::add(&self.env.counters.frames_sent, receivers.len());
                Counters::add(&self.env.counters.notifications_sent, receivers.len() * run.notifications.len());
            }
            for slot in &receivers {
                self.send(*slot, run.frame());
            }
            self.receivers = receivers;
        }
    }

    /// Puts a live frame into a connection's queue, or closes the connection when it reads too slowly.
    fn send(&mut self, slot: Slot, frame: &protocol::Frame) {
        let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) else { return };
        let mut sent = connection.send(frame, Kind::Live, &self.env);
        if sent.is_err() && connection.flush(&self.env).is_ok() {
            // Much may be said in one turn; only what the socket does not take makes a slow consumer.
            sent = connection.send(frame, Kind::Live, &self.env);
        }
        if sent.is_err() {
            connection.socket.out.cut();
            Counters::add(&self.env.counters.slow_consumers, 1);
            self.close(slot, &Close::new(CloseCode::TryLater, "reading too slowly"));
        }
        self.mark(slot);
    }

    /// A recovery is answered: what of it is owed goes out, and its channels are live from now on.
    fn recovered(&mut self, request: u64, notifications: Vec<Notification>) {
        let Some((slot, owed)) = self.hub.recovered(request, notifications, self.env.now) else { return };
        let Some(connection) = self.connections.get_mut(slot as usize).and_then(Option::as_mut) else { return };
        for range in protocol::runs(&owed, false) {
            let run = owed.get(range).unwrap_or_default();
            let frame = protocol::notifications_frame(run);
            // A replay never makes a slow consumer.
            let _ = connection.send(&frame, Kind::Exempt, &self.env);
            Counters::add(&self.env.counters.frames_sent, 1);
        }
        Counters::add(&self.env.counters.notifications_sent, owed.len());
        self.mark(slot);
    }

    /// The open websockets of a database, or of all.
    fn inspect(&self, database: Option<u32>) -> Vec<link::Connection> {
        let mut found = Vec::new();
        for (slot, connection) in (0..).zip(&self.connections) {
            let Some(connection) = connection else { continue };
            let Some(websocket) = connection.websocket() else { continue };
            let claims = &websocket.admission.claims;
            if database.is_some_and(|database| database != claims.oid) {
                continue;
            }
            found.push(link::Connection {
                id: connection.id,
                address: connection.address.to_string(),
                user_agent: websocket.admission.user_agent.to_string(),
                subject: claims.sub.clone(),
                database: claims.oid,
                channels: self.hub.subscribed(slot) as i64,
                sent: self.hub.sent(slot),
                queued: connection.socket.out.len() as i64,
                age_ms: self.env.now.saturating_sub(connection.accepted) as i64,
            });
        }
        found
    }

    /// Reactor 0's other work: doors and links.
    fn front_turn(&mut self) {
        let Some(front) = &mut self.front else { return };
        let (port, events) = front.turn(&self.peers, self.env.now, &mut self.main);
        let knocked = front.take_knocked();
        if let Some(port) = port {
            self.main.tell(ToMain::Listening { port });
        }
        events.into_iter().for_each(|event| self.link_event(event));
        knocked.into_iter().for_each(|place| self.accept(place));
    }

    fn link_event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up(database) => self.main.tell(ToMain::LinkUp { database }),
            LinkEvent::Down(database) => self.main.tell(ToMain::LinkDown { database }),
            LinkEvent::Emit(payloads) => self.main.tell(ToMain::Emit { payloads }),
            LinkEvent::Complaint(text) => self.main.log(LogLevel::Warning, text, None),
            LinkEvent::Batch(batch) => {
                self.peers.iter().skip(1).for_each(|peer| peer.tell(Note::Batch(batch.clone())));
                self.deliver(&batch);
            }
            LinkEvent::Recovered { reactor: 0, request, notifications } => self.recovered(request, notifications),
            LinkEvent::Recovered { reactor, request, notifications } => {
                if let Some(peer) = self.peers.get(reactor) {
                    peer.tell(Note::Recovered { request, notifications });
                }
            }
            LinkEvent::Inspect { link, database } => {
                let own = self.inspect(database);
                let Some(front) = &mut self.front else { return };
                let inquiry = front.inquire(link, self.peers.len());
                front.inquired(inquiry, own);
                self.peers.iter().skip(1).for_each(|peer| peer.tell(Note::Inspect { inquiry, database }));
            }
        }
    }

    /// Takes in who waits at a door and hands them out to the reactors in turn.
    fn accept(&mut self, place: usize) {
        for _ in 0..ACCEPTS {
            let Some(front) = &mut self.front else { return };
            let Some((tcp, address)) = front.listeners.accept(place, self.env.now, &mut self.main) else { return };
            let open = self.env.counters.sockets_open.fetch_add(1, Ordering::Relaxed);
            let excess = usize::try_from(open).unwrap_or(usize::MAX).saturating_sub(self.env.settings.max_connections);
            let refused = open as usize >= self.env.settings.max_connections;
            if excess > REFUSALS {
                Counters::less(&self.env.counters.sockets_open);
                continue;
            }
            let address = SocketAddr::new(address.ip().to_canonical(), address.port());
            self.next = (self.next + 1) % self.peers.len().max(1);
            match self.peers.get(self.next) {
                Some(peer) if self.next != self.index => peer.tell(Note::Accepted { tcp, address, refused }),
                _ => self.accepted(tcp, address, refused),
            }
        }
        if let Some(front) = &mut self.front {
            front.knock(place);
        }
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
                        self.again.push(slot);
                    }
                    self.after_write(slot, flow);
                }
            }
        }
    }

    /// Asks the poll for writability as long as something waits, and sets the timer.
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
    }
}
