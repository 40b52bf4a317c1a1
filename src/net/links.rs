//! The links of all databases: who is connected, and what is said to whom; what is known of a database itself, with or
//! without a link, is its [`Desk`]'s. Turns what comes in into [`LinkEvent`]s, in the order of each link.

mod desk;

use super::batch::Batch;
use super::link::{Link, Peer, Reason};
use super::replays::Ask;
use crate::core::hub::Moment;
use crate::core::link::{self, Answer, Command, Event, Question};
use crate::core::notification::Notification;
use crate::core::settings::Database;
use desk::Desk;
use mio::net::UnixStream;
use mio::{Registry, Token};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;

/// How long a link may take to say who it is, in milliseconds.
const HELLO_WAIT: Moment = 10_000;

/// Messages of one link handled in one turn.
const TURN: usize = 256;

/// A link, by its place and its serial number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkId {
    place: usize,
    serial: u64,
}

/// What comes in on links.
pub enum LinkEvent {
    /// The worker of a database is there.
    Up(u32),
    /// It is gone.
    Down(u32),
    Batch(Arc<Batch>),
    /// A page of a replay, for a connection of this reactor.
    Recovered {
        reactor: usize,
        request: u64,
        notifications: Vec<Notification>,
        more: bool,
    },
    /// The answer to a query, for a connection of this reactor.
    Answered {
        reactor: usize,
        query: u64,
        answer: Answer,
    },
    Emit(Vec<String>),
    /// A job is to be run by Odoo.
    Call {
        link: LinkId,
        database: u32,
        call: u64,
        id: i64,
        token: String,
    },
    Inspect {
        link: LinkId,
        database: Option<u32>,
    },
    /// A connection is to be ended.
    Disconnect {
        link: LinkId,
        id: i64,
        database: Option<u32>,
        reason: String,
    },
    /// Something to be logged as a warning.
    Complaint(String),
}

/// All links.
pub struct Links {
    registry: Registry,
    /// Tokens are this and the place.
    base: usize,
    serial: u64,
    links: Vec<Option<Link>>,
    desks: HashMap<u32, Desk>,
    /// Places to be read on in the next turn.
    again: Vec<usize>,
    events: Vec<LinkEvent>,
}

impl Links {
    /// No links yet; tokens begin at `base`.
    pub fn new(registry: Registry, base: usize) -> Links {
        let (links, desks, again, events) = (Vec::new(), HashMap::new(), Vec::new(), Vec::new());
        Links { registry, base, serial: 0, links, desks, again, events }
    }

    /// Takes in a link just accepted.
    pub fn open(&mut self, stream: UnixStream, now: Moment) -> io::Result<()> {
        let place = self.links.iter().position(Option::is_none).unwrap_or(self.links.len());
        self.serial += 1;
        let mut link = Link::new(stream, Token(self.base + place), self.serial, now + HELLO_WAIT);
        link.register(&self.registry)?;
        match self.links.get_mut(place) {
            Some(free) => *free = Some(link),
            None => self.links.push(Some(link)),
        }
        Ok(())
    }

    /// A link can be read or written.
    pub fn ready(&mut self, place: usize) {
        if !self.again.contains(&place) {
            self.again.push(place);
        }
    }

    /// Whether there is something to do at once.
    pub fn is_busy(&self) -> bool {
        !self.again.is_empty()
    }

    /// Reads and writes the links that are ready. Returns what came in, in order.
    pub fn turn(&mut self) -> Vec<LinkEvent> {
        for place in std::mem::take(&mut self.again) {
            let result = self.read(place);
            self.settle(place, result);
        }
        std::mem::take(&mut self.events)
    }

    /// Hangs up on those that do not say who they are. Returns when to call this again.
    pub fn tick(&mut self, now: Moment) -> Option<Moment> {
        let mut next = None;
        for place in 0..self.links.len() {
            if let Some(Peer::Unknown(give_up)) = self.links.get(place).and_then(Option::as_ref).map(|link| link.peer) {
                if give_up <= now {
                    self.hang_up(place, Some("no first message".to_owned()));
                } else {
                    next = Some(next.map_or(give_up, |next: Moment| next.min(give_up)));
                }
            }
        }
        next
    }

    /// A connection of a reactor asks for a page of a replay: it is asked for now, or when there is a place for it.
    pub fn ask(&mut self, database: u32, reactor: usize, ask: Ask) {
        self.desks.entry(database).or_default().ask(reactor, ask);
        self.pump(database);
    }

    /// A connection of a reactor wants to know something of a database.
    pub fn query(&mut self, database: u32, reactor: usize, query: u64, question: Question) {
        self.desks.entry(database).or_default().query(reactor, query, question);
        self.pump(database);
    }

    /// Whether the worker of a database is connected.
    pub fn is_up(&self, database: u32) -> bool {
        self.desks.get(&database).is_some_and(|desk| desk.link.is_some())
    }

    /// The greatest id that was dispatched from a database, 0 where none was.
    pub fn greatest(&self, database: u32) -> i64 {
        self.desks.get(&database).and_then(|desk| desk.position.as_ref()).map_or(0, |position| position.high)
    }

    /// Nobody waits for the answer to this query any more.
    pub fn drop_query(&mut self, database: u32, query: u64) {
        if let Some(desk) = self.desks.get_mut(&database) {
            desk.drop_query(query);
        }
    }

    /// Nobody waits for this replay any more.
    pub fn forget(&mut self, database: u32, request: u64) {
        let Some(desk) = self.desks.get_mut(&database) else { return };
        if desk.forget(request)
            && let Some(place) = desk.link
            && let Some(link) = self.links.get_mut(place).and_then(Option::as_mut)
        {
            let _ = link.say(&Command::Forget { request });
            self.ready(place);
        }
        self.pump(database);
    }

    /// Says something on a link, if it is still there.
    pub fn say(&mut self, id: LinkId, command: &Command) {
        let Some(link) = self.links.get_mut(id.place).and_then(Option::as_mut).filter(|l| l.serial == id.serial) else {
            return;
        };
        let result = link.say(command);
        self.settle(id.place, result.map(|()| false));
    }

    /// Answers an inspector and hangs up on it.
    pub fn answer(&mut self, id: LinkId, answer: &Command) {
        let Some(link) = self.links.get_mut(id.place).and_then(Option::as_mut).filter(|l| l.serial == id.serial) else {
            return;
        };
        let result = link.say(answer);
        link.peer = Peer::Served;
        self.settle(id.place, result.map(|()| false));
    }

    /// The databases that have the extension: what is known of others is forgotten, as a position means nothing to an
    /// extension that was dropped and created again.
    pub fn keep(&mut self, databases: &[Database]) {
        self.desks.retain(|oid, desk| {
            if !databases.iter().any(|database| database.oid == *oid) {
                desk.position = None;
            }
            !desk.is_empty()
        });
    }

    fn read(&mut self, place: usize) -> Result<bool, Reason> {
        let Some(link) = self.links.get_mut(place).and_then(Option::as_mut) else { return Ok(false) };
        let serial = link.serial;
        let (more, end) = match link.read() {
            Ok(more) => (more, None),
            Err(reason) => (false, Some(reason)),
        };
        for _ in 0..TURN {
            // What was sent before a hang-up still counts; the link itself may go with any of its messages.
            let Some(link) = self.links.get_mut(place).and_then(Option::as_mut) else { return Ok(false) };
            match link.next()? {
                Some(event) if link.serial == serial => self.take(place, event)?,
                _ => return end.map_or(Ok(more), Err),
            }
        }
        // The end of the stream is found again by the next read.
        Ok(true)
    }

    /// Handles one message of a link.
    fn take(&mut self, place: usize, event: Event) -> Result<(), Reason> {
        let Some(link) = self.links.get_mut(place).and_then(Option::as_mut) else { return Ok(()) };
        match (link.peer, event) {
            (Peer::Unknown(_), Event::Hello { version: link::VERSION, database, .. }) => self.greet(place, database),
            (Peer::Unknown(_), Event::Inspect { version: link::VERSION, database }) => {
                link.peer = Peer::Inspector;
                let link = LinkId { place, serial: link.serial };
                self.events.push(LinkEvent::Inspect { link, database });
                Ok(())
            }
            (Peer::Unknown(_), Event::Disconnect { version: link::VERSION, database, id, reason }) => {
                link.peer = Peer::Inspector;
                let link = LinkId { place, serial: link.serial };
                self.events.push(LinkEvent::Disconnect { link, id, database, reason });
                Ok(())
            }
            (
                Peer::Unknown(_),
                Event::Hello { version, .. } | Event::Inspect { version, .. } | Event::Disconnect { version, .. },
            ) => Err(Some(format!("it speaks version {version} of the protocol, this process {}", link::VERSION))),
            (Peer::Database(database), Event::Dispatch { notifications, position, committed }) => {
                self.desks.entry(database).or_default().position = Some(position);
                if !notifications.is_empty() {
                    self.events.push(LinkEvent::Batch(Arc::new(Batch::new(database, notifications, committed))));
                }
                Ok(())
            }
            (Peer::Database(database), Event::Recovered { request, notifications, more }) => {
                self.answered(database, request, notifications, more);
                Ok(())
            }
            (Peer::Database(database), Event::Answered { query, answer }) => {
                let reactor = self.desks.get_mut(&database).and_then(|desk| desk.told(query));
                self.events.extend(reactor.map(|reactor| LinkEvent::Answered { reactor, query, answer }));
                self.pump(database);
                Ok(())
            }
            (Peer::Database(_), Event::Emit { payloads }) => {
                self.events.push(LinkEvent::Emit(payloads));
                Ok(())
            }
            (Peer::Database(database), Event::Call { call, id, token }) => {
                let link = LinkId { place, serial: link.serial };
                self.events.push(LinkEvent::Call { link, database, call, id, token });
                Ok(())
            }
            _ => Err(Some("a message out of place".to_owned())),
        }
    }

    /// A page of a replay has come. One of which nobody knows, or that nobody waits for any more, is dropped.
    fn answered(&mut self, database: u32, request: u64, notifications: Vec<Notification>, more: bool) {
        let Some(desk) = self.desks.get_mut(&database) else { return };
        let last = notifications.last().map(|notification| notification.id);
        if let Some(reactor) = desk.answered(request, last, more) {
            self.events.push(LinkEvent::Recovered { reactor, request, notifications, more });
        }
        self.pump(database);
    }

    /// A database worker says hello: it takes the place of an older one and is told where to go on.
    fn greet(&mut self, place: usize, database: u32) -> Result<(), Reason> {
        let older = self.desks.entry(database).or_default().link;
        if let Some(older) = older {
            self.hang_up(older, Some("another worker of the same database has come".to_owned()));
        }
        let desk = self.desks.entry(database).or_default();
        desk.link = Some(place);
        let position = desk.position.clone();
        let Some(link) = self.links.get_mut(place).and_then(Option::as_mut) else { return Ok(()) };
        link.peer = Peer::Database(database);
        link.say(&Command::Resume { position })?;
        self.events.push(LinkEvent::Up(database));
        self.pump(database);
        self.flush(place)
    }

    /// Asks a worker for as many pages as there are places.
    fn pump(&mut self, database: u32) {
        let Some(desk) = self.desks.get_mut(&database) else { return };
        let Some(place) = desk.link else { return };
        let Some(link) = self.links.get_mut(place).and_then(Option::as_mut) else { return };
        let mut has_said = false;
        while let Some(command) = desk.next() {
            // Never too long: a client says what it wants in 1 MiB.
            let _ = link.say(&command);
            has_said = true;
        }
        if has_said {
            self.ready(place);
        }
    }

    fn flush(&mut self, place: usize) -> Result<(), Reason> {
        let Some(link) = self.links.get_mut(place).and_then(Option::as_mut) else { return Ok(()) };
        if link.flush(&self.registry)? {
            self.ready(place);
        }
        Ok(())
    }

    /// Ends what a turn with a link began: writes, comes back, or hangs up.
    fn settle(&mut self, place: usize, result: Result<bool, Reason>) {
        match result.and_then(|more| self.flush(place).map(|()| more)) {
            Ok(true) => self.ready(place),
            Ok(false) => {}
            Err(reason) => self.hang_up(place, reason),
        }
    }

    fn hang_up(&mut self, place: usize, reason: Reason) {
        let Some(mut link) = self.links.get_mut(place).and_then(Option::take) else { return };
        link.deregister(&self.registry);
        if let Some(reason) = reason {
            self.events.push(LinkEvent::Complaint(format!("hung up on a link: {reason}")));
        }
        let Peer::Database(database) = link.peer else { return };
        let Some(desk) = self.desks.get_mut(&database).filter(|desk| desk.link == Some(place)) else { return };
        desk.lose();
        self.events.push(LinkEvent::Down(database));
    }
}
