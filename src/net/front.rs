//! What reactor 0 has besides its connections: the TCP doors, the door for links, the links, and inquiries that wait
//! for the other reactors. Decides when the links may be read: not while the other reactors are behind.

use super::bridge::{LogLevel, MainLine, Peer};
use super::links::{LinkEvent, LinkId, Links};
use super::listener::Listeners;
use super::survey::Surveys;
use crate::core::hub::Moment;
use crate::core::link::{Command, Connection};
use crate::core::settings::Settings;
use mio::net::UnixListener;
use mio::{Interest, Registry, Token};
use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

/// Tokens: the waker has 0; then the TCP doors, the links' door, the links, and from [`CONNECTIONS`] the connections.
const DOORS: usize = 1;
const LINK_DOOR: usize = 1 << 20;
const LINKS: usize = LINK_DOOR + 1;
/// Where the tokens of connections begin.
pub const CONNECTIONS: usize = 1 << 30;

/// Notes that may wait at another reactor before the links are read on.
const BEHIND: usize = 1024;

/// How soon to look again whether the other reactors have caught up, in milliseconds.
const CATCH_UP: Moment = 5;

/// Between two attempts to open the links' door, in milliseconds.
const RETRY: Moment = 2_000;

/// Reactor 0's extra rooms.
pub struct Front {
    registry: Registry,
    pub listeners: Listeners,
    pub links: Links,
    path: PathBuf,
    door: Option<UnixListener>,
    door_retry: Option<Moment>,
    /// When to accept links again after it failed.
    links_retry: Option<Moment>,
    complained: bool,
    pub surveys: Surveys,
    inquiries: HashMap<u64, Inquiry>,
    next_inquiry: u64,
    /// Doors at which somebody may wait.
    knocked: Vec<usize>,
    wake_at: Option<Moment>,
    is_behind: bool,
}

/// The connections of several reactors, on their way to an inspector.
struct Inquiry {
    link: LinkId,
    missing: usize,
    connections: Vec<Connection>,
    /// The connection that was to be ended was there.
    found: bool,
}

impl Front {
    /// Doors by the settings, the links' at `path`; nothing is bound yet.
    ///
    /// # Errors
    /// Descriptors cannot be had.
    pub fn new(registry: &Registry, settings: &Settings, path: PathBuf) -> io::Result<Front> {
        Ok(Front {
            registry: registry.try_clone()?,
            listeners: Listeners::new(registry.try_clone()?, DOORS, &settings.listen_addresses, settings.port),
            links: Links::new(registry.try_clone()?, LINKS),
            path,
            door: None,
            door_retry: Some(0),
            links_retry: None,
            complained: false,
            surveys: Surveys::default(),
            inquiries: HashMap::new(),
            next_inquiry: 0,
            knocked: Vec::new(),
            wake_at: None,
            is_behind: false,
        })
    }

    /// Something happened at a token below [`CONNECTIONS`].
    pub fn ready(&mut self, token: usize, now: Moment, main: &mut MainLine) {
        match token {
            LINK_DOOR => self.accept_links(now, main),
            LINKS.. => self.links.ready(token - LINKS),
            DOORS.. => self.knock(token - DOORS),
            _ => {}
        }
    }

    /// Does what time asks for, and reads the links unless the other reactors are behind. Returns the port when the
    /// first door opened, and what came in on the links.
    pub fn turn(&mut self, peers: &[Peer], now: Moment, main: &mut MainLine) -> (Option<u16>, Vec<LinkEvent>) {
        let was_paused = self.listeners.deadline();
        let port = self.listeners.tick(now, main);
        if was_paused.is_some_and(|at| at <= now) {
            (0..self.listeners.len()).for_each(|place| self.knock(place));
        }
        if self.door_retry.is_some_and(|at| at <= now) {
            self.open_door(now, main);
        }
        if self.links_retry.is_some_and(|at| at <= now) {
            self.accept_links(now, main);
        }
        self.is_behind = peers.iter().any(|peer| peer.backlog() > BEHIND);
        let catch_up = self.is_behind.then_some(now + CATCH_UP);
        let times = [self.links.tick(now), catch_up, self.door_retry, self.links_retry, self.listeners.deadline()];
        self.wake_at = times.into_iter().flatten().min();
        (port, if self.is_behind { Vec::new() } else { self.links.turn() })
    }

    /// Doors at which somebody may wait; each is asked until nobody does.
    pub fn take_knocked(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.knocked)
    }

    /// Somebody may wait at a door.
    pub fn knock(&mut self, place: usize) {
        if !self.knocked.contains(&place) {
            self.knocked.push(place);
        }
    }

    /// When to turn next: at once, or at a time.
    pub fn wake_at(&self) -> Option<Moment> {
        if !self.knocked.is_empty() || self.links.is_busy() && !self.is_behind { Some(0) } else { self.wake_at }
    }

    /// Begins to ask all reactors who is connected.
    pub fn inquire(&mut self, link: LinkId, reactors: usize) -> u64 {
        self.next_inquiry += 1;
        self.inquiries
            .insert(self.next_inquiry, Inquiry { link, missing: reactors, connections: Vec::new(), found: false });
        self.next_inquiry
    }

    /// One reactor's answer; with the last one the inspector is answered.
    pub fn inquired(&mut self, number: u64, connections: Vec<Connection>) {
        let Some(inquiry) = self.inquiries.get_mut(&number) else { return };
        inquiry.connections.extend(connections);
        inquiry.missing = inquiry.missing.saturating_sub(1);
        if inquiry.missing == 0
            && let Some(inquiry) = self.inquiries.remove(&number)
        {
            self.links.answer(inquiry.link, &Command::Connections(inquiry.connections));
        }
    }

    /// Whether one reactor had the connection that is to be ended; with the last one who asked for it is answered.
    pub fn disconnected(&mut self, number: u64, found: bool) {
        let Some(inquiry) = self.inquiries.get_mut(&number) else { return };
        inquiry.found |= found;
        inquiry.missing = inquiry.missing.saturating_sub(1);
        if inquiry.missing == 0
            && let Some(inquiry) = self.inquiries.remove(&number)
        {
            self.links.answer(inquiry.link, &Command::Disconnected(inquiry.found));
        }
    }

    /// Closes the doors; the links go on.
    pub fn close(&mut self) {
        self.listeners.close();
        self.knocked.clear();
        self.door_retry = None;
        if self.door.take().is_some() {
            let _ = fs::remove_file(&self.path);
        }
    }

    fn open_door(&mut self, now: Moment, main: &mut MainLine) {
        match self.bind_door() {
            Ok(door) => {
                self.door = Some(door);
                self.door_retry = None;
            }
            Err(error) => {
                self.door_retry = Some(now + RETRY);
                if !std::mem::replace(&mut self.complained, true) {
                    let text = format!("could not listen on socket \"{}\": {error}", self.path.display());
                    let hint = "No database worker can connect. This is tried again every 2 s.";
                    main.log(LogLevel::Warning, text, Some(hint));
                }
            }
        }
    }

    /// The socket is left behind by a process that was killed; its directory is the server's own.
    fn bind_door(&self) -> io::Result<UnixListener> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut door = UnixListener::bind(&self.path)?;
        fs::set_permissions(&self.path, Permissions::from_mode(0o600))?;
        self.registry.register(&mut door, Token(LINK_DOOR), Interest::READABLE)?;
        Ok(door)
    }

    fn accept_links(&mut self, now: Moment, main: &mut MainLine) {
        self.links_retry = None;
        let Some(door) = &self.door else { return };
        loop {
            match door.accept() {
                Ok((stream, _)) => {
                    if let Err(error) = self.links.open(stream, now) {
                        main.log(LogLevel::Warning, format!("could not take in a link: {error}"), None);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() != ErrorKind::WouldBlock {
                        self.links_retry = Some(now + RETRY);
                        main.log(LogLevel::Warning, format!("could not accept a link: {error}"), None);
                    }
                    return;
                }
            }
        }
    }
}
