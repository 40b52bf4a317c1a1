//! One link: a Unix socket on which whole messages come and go (core::link). Knows nothing of what they mean.

use super::outbound::{Flow, Kind, Outbound};
use crate::core::hub::Moment;
use crate::core::link::{self, Command, Decoder, Event};
use mio::net::UnixStream;
use mio::{Interest, Registry, Token};
use std::io::{self, ErrorKind, Read};

/// Read from one link in one turn, in bytes.
const TURN: usize = 256 * 1024;

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Has not said yet; hung up on at this time.
    Unknown(Moment),
    /// The worker of a database (its OID).
    Database(u32),
    /// Waits for the list of connections.
    Inspector,
    /// Has all it asked for; hung up on when it is written.
    Served,
}

/// Why a link ends, as the log tells it; None when the peer just hung up.
pub type Reason = Option<String>;

/// A link.
pub struct Link {
    stream: UnixStream,
    token: Token,
    /// Tells this link from another one in the same place.
    pub serial: u64,
    pub peer: Peer,
    decoder: Decoder,
    out: Outbound,
    wants_write: bool,
}

impl Link {
    /// A link just accepted, hung up on at `give_up` if it does not say who it is.
    pub fn new(stream: UnixStream, token: Token, serial: u64, give_up: Moment) -> Link {
        let (decoder, out) = (Decoder::default(), Outbound::default());
        Link { stream, token, serial, peer: Peer::Unknown(give_up), decoder, out, wants_write: false }
    }

    /// Puts the link into the poll.
    ///
    /// # Errors
    /// The poll's.
    pub fn register(&mut self, registry: &Registry) -> io::Result<()> {
        registry.register(&mut self.stream, self.token, Interest::READABLE)
    }

    /// The poll forgets the link; it does so by itself too, but only when the last copy of the descriptor is closed.
    pub fn deregister(&mut self, registry: &Registry) {
        let _ = registry.deregister(&mut self.stream);
    }

    /// Reads a turn's worth. True when there may be more.
    pub fn read(&mut self) -> Result<bool, Reason> {
        let mut bytes = [0; 16 * 1024];
        let mut total = 0;
        while total < TURN {
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(None),
                Ok(count) => {
                    total += count;
                    self.decoder.feed(bytes.get(..count).unwrap_or_default());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Some(error.to_string())),
            }
        }
        Ok(true)
    }

    /// The next whole message among what was read.
    pub fn next(&mut self) -> Result<Option<Event>, Reason> {
        self.decoder.next().map_err(|_| Some("malformed message".to_owned()))
    }

    /// Puts a message into the queue.
    pub fn say(&mut self, command: &Command) -> Result<(), Reason> {
        let frame = link::encode(command).ok_or_else(|| Some("message too long".to_owned()))?;
        let _ = self.out.push(frame.into(), Kind::Exempt, usize::MAX);
        Ok(())
    }

    /// Writes what the socket takes. True when there is more to write that it would take.
    pub fn flush(&mut self, registry: &Registry) -> Result<bool, Reason> {
        let (flow, _) = self.out.write_to(&mut self.stream).map_err(|error| Some(error.to_string()))?;
        if flow == Flow::Empty && self.peer == Peer::Served {
            return Err(None);
        }
        let wants_write = flow == Flow::Blocked;
        if wants_write != self.wants_write {
            let interest = if wants_write { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
            let changed = registry.reregister(&mut self.stream, self.token, interest);
            changed.map_err(|error| Some(error.to_string()))?;
            self.wants_write = wants_write;
        }
        Ok(flow == Flow::Paused)
    }
}
