//! What a database worker and the gateway say to each other over their link (a Unix socket inside the data directory).
//! Frames: a little-endian u32 length, then that many bytes of postcard. Both sides are this very library, but a link
//! may still meet an older process during an upgrade, so the first message carries [`VERSION`].

use super::channel::Channel;
use super::granted::Granted;
use super::notification::Notification;
use super::position::Position;
use super::status::Jobs;
use serde::{Deserialize, Serialize};

/// Version of the messages below; a peer with another one is hung up on and comes back after its restart.
pub const VERSION: u32 = 4;

/// Where the gateway listens for links, relative to the data directory (every PostgreSQL process's working directory).
/// `pg_stat_tmp` is emptied at start and left out of base backups.
pub const SOCKET_PATH: &str = "pg_stat_tmp/imbus.sock";

/// The longest frame a peer may announce, in bytes (a bus row may hold 1 GB, a batch is cut well below).
pub const FRAME_MAX: usize = 1 << 30;

/// To the gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// First message of a database worker: which database it serves. Answered by [`Command::Resume`].
    Hello { version: u32, database: u32, name: String },
    /// Newly committed notifications in delivery order, and the worker's position after them.
    /// `committed` is when the oldest of them was committed, in microseconds since 1970, 0 where nobody knows.
    Dispatch { notifications: Vec<Notification>, position: Position, committed: i64 },
    /// One page of the answer to [`Command::Recover`], in an order in which each page's last id is a position of the
    /// client. With `more` there are further pages, each sent when [`Command::More`] asks for it. With the last page the
    /// client has had everything owed of what was dispatched on this link before this message. A page may be empty.
    Recovered { request: u64, notifications: Vec<Notification>, more: bool },
    /// The answer to [`Command::Query`].
    Answered { query: u64, answer: Answer },
    /// A job that is claimed for Odoo: call it there. Answered by [`Command::Called`], unless the link ends before. The id 0
    /// is no job's and asks whether Odoo is there.
    Call { call: u64, id: i64, token: String },
    /// JSON lists of channels to NOTIFY in the listen database on behalf of the writers, one entry per payload.
    Emit { payloads: Vec<String> },
    /// First message of a backend that wants to see the connections (of one database, or of all). Answered by
    /// [`Command::Connections`], after which the gateway hangs up.
    Inspect { version: u32, database: Option<u32> },
    /// First message of a backend that wants a connection ended (of one database, or of whichever). Answered by
    /// [`Command::Disconnected`], after which the gateway hangs up.
    Disconnect { version: u32, database: Option<u32>, id: i64, reason: String },
}

/// From the gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Go on from here: the position after the last dispatch that the gateway saw from this database, None when it saw
    /// none (then the worker goes on from its own).
    Resume { position: Option<Position> },
    /// Replay to one connection: what it is owed on these channels after `last` (0: the last 50 s, as Odoo's `_poll`).
    Recover { request: u64, channels: Vec<Channel>, last: i64 },
    /// The next page of a replay: the client has taken in the one before.
    More { request: u64 },
    /// Nobody waits for this replay any more.
    Forget { request: u64 },
    /// Something only the database knows. Answered by [`Event::Answered`], in any order.
    Query { query: u64, question: Question },
    /// What came of an [`Event::Call`].
    Called { call: u64, outcome: Called },
    /// The open connections.
    Connections(Vec<Connection>),
    /// Whether the connection was there.
    Disconnected(bool),
}

/// How a call of Odoo ended that was to run a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Called {
    /// Odoo says that the job has ended, in its own transaction.
    Settled,
    /// Odoo says that the job is not the caller's any more.
    Lost,
    /// Odoo was not reached, or does not know what to do: the job was not begun, and why.
    Refused(String),
    /// Odoo says that this is no call of a job: it is there.
    Alive,
    /// The call was answered by an error: the job has ended there, and why.
    Died(String),
    /// The call was broken off: whether the job was begun is not known, and why.
    Broken(String),
}

/// What a database worker can be asked on behalf of one client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// Whether no notification has this id (any more).
    Missed { last: i64 },
    /// When old notifications were deleted last, and when they will be.
    Vacuum,
    /// How its jobs are.
    Jobs,
    /// What `imbus.auth_function` makes of these headers (a JSON object) and channels (a JSON array).
    Authenticate { headers: String, channels: String },
}

/// What a database worker answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    Missed(bool),
    /// In microseconds since 1970; None: not yet.
    Vacuum {
        last: Option<i64>,
        next: i64,
    },
    Jobs(Jobs),
    /// None: refused.
    Authenticated(Option<Granted>),
    /// It could not be answered; the log of the server says why.
    Failed,
}

/// One connection, as `imbus_stat_connections` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// Identifies the connection while the gateway runs.
    pub id: i64,
    /// The client's address and port.
    pub address: String,
    pub user_agent: String,
    /// The token's subject.
    pub subject: Option<String>,
    /// OID of its database.
    pub database: u32,
    /// How many channels it is subscribed to.
    pub channels: i64,
    /// Notifications sent.
    pub sent: i64,
    /// Bytes waiting in its outbound queue.
    pub queued: i64,
    /// Milliseconds since it was accepted.
    pub age_ms: i64,
}

/// One message as a frame; None when it would be longer than [`FRAME_MAX`].
pub fn encode(message: &impl Serialize) -> Option<Vec<u8>> {
    let mut frame = postcard::to_extend(message, vec![0; 4]).ok()?;
    let length = frame.len().checked_sub(4).filter(|length| *length <= FRAME_MAX)?;
    let length = u32::try_from(length).ok()?;
    frame.get_mut(..4)?.copy_from_slice(&length.to_le_bytes());
    Some(frame)
}

/// A peer that does not speak this protocol: hang up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// Bytes a decoder keeps room for, whatever giant it has seen.
const KEPT: usize = 1 << 16;

/// Collects bytes and hands out whole messages.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    read: usize,
}

impl Decoder {
    /// Adds what was read from the socket.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.read > 0 && self.read == self.bytes.len() {
            self.bytes.clear();
            self.read = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    // Not an iterator: the caller says which message it expects.
    #[allow(clippy::should_implement_trait)]
    /// The next whole message, None while it is not there yet.
    pub fn next<T: serde::de::DeserializeOwned>(&mut self) -> Result<Option<T>, Malformed> {
        let rest = self.bytes.get(self.read..).unwrap_or_default();
        let Some((head, body)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*head) as usize;
        if length > FRAME_MAX {
            return Err(Malformed);
        }
        let Some(frame) = body.get(..length) else { return Ok(None) };
        let message = postcard::from_bytes(frame).map_err(|_| Malformed)?;
        self.read += 4 + length;
        if self.read > KEPT {
            self.bytes.drain(..self.read);
            self.read = 0;
            self.bytes.shrink_to(KEPT.max(2 * self.bytes.len()));
        }
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_any_cut() {
        let sent = [
            Event::Hello { version: VERSION, database: 5, name: "demo".into() },
            Event::Emit { payloads: vec!["[]".into(); 3] },
        ];
        let bytes: Vec<u8> = sent.iter().flat_map(|event| encode(event).unwrap()).collect();
        let mut decoder = Decoder::default();
        let mut got = Vec::new();
        for byte in bytes {
            decoder.feed(&[byte]);
            while let Some(event) = decoder.next::<Event>().unwrap() {
                got.push(event);
            }
        }
        assert_eq!(got, sent);
    }

    #[test]
    fn an_announced_giant_and_garbage_are_refused() {
        let mut decoder = Decoder::default();
        decoder.feed(&u32::MAX.to_le_bytes());
        assert_eq!(decoder.next::<Event>(), Err(Malformed));
        let mut decoder = Decoder::default();
        decoder.feed(&[1, 0, 0, 0, 250]);
        assert_eq!(decoder.next::<Event>(), Err(Malformed));
    }
}
