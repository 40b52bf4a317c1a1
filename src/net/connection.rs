//! One connection through its life: HTTP requests, an open websocket, the closing, the draining. Decides when a stage
//! ends; the reactor asks it turn by turn and does what takes more than this one connection.

use super::Env;
use super::asked::{Said, Waiting};
use super::counters::{Counters, Rejection};
use super::handshake::Upgrade;
use super::http::{self, Served};
use super::outbound::{Flow, Full, Kind};
use super::replays::Replays;
use super::socket::Socket;
use super::websocket::{Due, Heard, Websocket};
use crate::core::hub::Moment;
use crate::core::protocol::{self, Close, CloseCode, Frame, Message};
use mio::net::TcpStream;
use std::io::{self, ErrorKind, Read};
use std::net::SocketAddr;

/// How long a request head may take, in milliseconds (SPEC section 7).
const HEAD_WAIT: Moment = 10_000;

/// How long a connection may idle between two requests, in milliseconds.
const IDLE_WAIT: Moment = 15_000;

/// How long a close may take: writing what waits, and the client's answer. In milliseconds.
const CLOSE_WAIT: Moment = 5_000;

/// How long the peer may take to notice the end of the stream, in milliseconds. Closing at once with bytes of the
/// peer's unread would reset the connection, and the close frame with it.
const DRAIN_WAIT: Moment = 1_000;

/// Answers that may wait before further requests are read, in bytes.
const ANSWERS_MAX: usize = 64 * 1024;

/// Bytes of further requests that are read while one waits for its answer.
const PIPELINED_MAX: usize = 16 * 1024;

/// A connection.
pub struct Connection {
    /// Its number while the gateway runs.
    pub id: i64,
    pub address: SocketAddr,
    pub accepted: Moment,
    pub socket: Socket,
    /// What its database is still asked for.
    pub replays: Replays,
    /// Earliest timer set for it.
    pub armed: Moment,
    /// The query whose answer it waits for.
    pub query: Option<u64>,
    /// What it asked for last while its channels were being asked for: JSON, and its last id.
    pub subscribing: Option<Box<(String, i64)>>,
    /// The last id it said when its channels were asked for.
    pub asked_last: i64,
    /// Whether the desk for Odoo knows of it.
    pub here: bool,
    /// Whether it counts as an open websocket.
    pub counted: bool,
    /// Whether it is in the reactor's list of those to be written to.
    pub dirty: bool,
    /// Whether it is in the reactor's line of those to be read from.
    pub again: bool,
    refused: bool,
    stage: Stage,
    /// When the stage has taken too long; an open websocket has its own.
    deadline: Moment,
}

enum Stage {
    Http(Http),
    Open(Box<Websocket>),
    /// Last words are being written; with a websocket, the peer's answer is awaited too.
    Closing(Option<Box<Websocket>>),
    /// All is written and the stream ended; the peer has yet to end its own.
    Drain,
}

/// Between requests, or in one.
#[derive(Default)]
struct Http {
    buffer: Vec<u8>,
    /// Bytes of a request's body that are still to be skipped.
    skip: usize,
    /// Whether a request was answered before.
    kept: bool,
    /// Whether the client was told to go on with its body.
    told: bool,
    /// The request whose answer is not there yet; those after it wait.
    waiting: Option<Box<Waiting>>,
}

impl Http {
    /// A request was taken out of the buffer; `skip` bytes of its body are still to come.
    fn took(&mut self, consumed: usize, skip: usize) {
        self.buffer.drain(..consumed.min(self.buffer.len()));
        self.skip = skip;
        self.kept = true;
        self.told = false;
        if self.buffer.is_empty() {
            // A poller waits for most of its life.
            self.buffer = Vec::new();
        }
    }
}

/// What a turn of reading came to.
pub enum Turn {
    /// Nothing more to read for now.
    Wait,
    /// There is more, but others have their turn first.
    Again,
    /// Something was read that needs nothing else.
    Done,
    /// The websocket is open.
    Opened,
    /// The client subscribes.
    Subscribe { channels: String, last: i64 },
    /// What the client says of its user's presence.
    Presence(String),
    /// A request waits for its answer.
    Asked,
    /// It has waited for as long as it may.
    Waited,
    /// A message that is ignored, and why.
    Ignored(String),
    /// The connection is on its way out: nothing is to be delivered to it any more.
    Closing,
    /// The connection is over.
    Gone,
}

impl Connection {
    /// A connection just accepted; `refused` when there are too many already.
    pub fn new(id: i64, tcp: TcpStream, address: SocketAddr, refused: bool, now: Moment) -> Connection {
        Connection {
            id,
            address,
            accepted: now,
            socket: Socket::new(tcp),
            replays: Replays::default(),
            armed: Moment::MAX,
            query: None,
            subscribing: None,
            asked_last: 0,
            here: false,
            counted: false,
            dirty: false,
            again: false,
            refused,
            stage: Stage::Http(Http::default()),
            deadline: now + HEAD_WAIT,
        }
    }

    /// The open websocket.
    pub fn websocket(&self) -> Option<&Websocket> {
        match &self.stage {
            Stage::Open(websocket) => Some(websocket),
            _ => None,
        }
    }

    /// The open websocket.
    pub fn websocket_mut(&mut self) -> Option<&mut Websocket> {
        match &mut self.stage {
            Stage::Open(websocket) => Some(websocket),
            _ => None,
        }
    }

    /// The request that waits for its answer.
    pub fn waiting(&mut self) -> Option<&mut Waiting> {
        match &mut self.stage {
            Stage::Http(http) => http.waiting.as_deref_mut(),
            _ => None,
        }
    }

    /// The request that waits may wait anew: it is known now who it is.
    pub fn be_patient(&mut self, env: &Env) {
        if let Stage::Http(Http { waiting: Some(waiting), .. }) = &self.stage {
            self.deadline = env.now.saturating_add(waiting.patience(env.unix_ms));
        }
    }

    /// The request that waits gets its answer.
    pub fn answer(&mut self, said: Said, env: &Env) {
        let Stage::Http(http) = &mut self.stage else { return };
        if http.waiting.take().is_none() {
            return;
        }
        self.deadline = env.now + IDLE_WAIT;
        env.counters.answered(&said.response);
        said.pieces.into_iter().for_each(|piece| self.socket.say(piece));
        if said.close {
            self.end(env);
        }
    }

    /// Whether it is on its way out.
    pub fn is_closing(&self) -> bool {
        matches!(self.stage, Stage::Closing(_) | Stage::Drain)
    }

    /// Reads until something is to be done.
    pub fn read(&mut self, env: &Env) -> Turn {
        match &mut self.stage {
            Stage::Http(_) => self.read_http(env),
            Stage::Open(websocket) => match websocket.read(&mut self.socket, env) {
                #[cfg(feature = "testing")]
                Heard::Text(text) if super::testing::echoes() => super::testing::echo(&mut self.socket, &text),
                Heard::Text(text) => {
                    Counters::add(&env.counters.messages_received, 1);
                    let text = text.as_str().ok_or_else(|| "a binary message that is no UTF-8".to_owned());
                    match text.and_then(protocol::parse) {
                        Ok(Message::Subscribe { channels, last }) => Turn::Subscribe { channels, last },
                        Ok(Message::Presence { data }) => Turn::Presence(data),
                        Ok(Message::Other) => Turn::Done,
                        Err(reason) => Turn::Ignored(reason),
                    }
                }
                Heard::Nothing => self.wait(),
                Heard::Goodbye => self.end(env),
                Heard::Close(close) => {
                    self.close(&close, env);
                    Turn::Closing
                }
                Heard::Slow => {
                    self.close_slow(env);
                    Turn::Closing
                }
                Heard::Fast => {
                    Counters::add(&env.counters.closed_by_policy, 1);
                    env.counters.reject(Rejection::Rate);
                    self.part(&Close::new(CloseCode::TryLater, ""), env);
                    Turn::Closing
                }
                Heard::Gone => Turn::Gone,
            },
            Stage::Closing(Some(websocket)) => match websocket.read(&mut self.socket, env) {
                Heard::Text(_) => Turn::Done,
                Heard::Nothing => self.wait(),
                Heard::Gone if self.socket.out.is_empty() => Turn::Gone,
                Heard::Goodbye | Heard::Close(_) | Heard::Fast | Heard::Slow | Heard::Gone => self.end(env),
            },
            Stage::Closing(None) => match self.socket.drain() {
                Ok(_) => self.wait(),
                Err(_) => Turn::Gone,
            },
            Stage::Drain => match self.socket.drain() {
                Ok(false) => self.wait(),
                Ok(true) | Err(_) => Turn::Gone,
            },
        }
    }

    fn wait(&self) -> Turn {
        if self.socket.is_cut_short() { Turn::Again } else { Turn::Wait }
    }

    fn read_http(&mut self, env: &Env) -> Turn {
        let mut bytes = [0; 4096];
        loop {
            if let Some(turn) = self.serve(env) {
                return turn;
            }
            let count = match self.socket.read(&mut bytes) {
                Ok(0) if self.socket.out.is_empty() => return Turn::Gone,
                Ok(0) => return self.end(env),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return self.wait(),
                Err(_) => return Turn::Gone,
            };
            let Stage::Http(http) = &mut self.stage else { return Turn::Again };
            if http.buffer.is_empty() && http.skip == 0 && http.kept && http.waiting.is_none() {
                self.deadline = env.now + HEAD_WAIT;
            }
            http.buffer.extend_from_slice(bytes.get(..count).unwrap_or_default());
        }
    }

    /// Answers the requests in the buffer. None when more is to be read.
    fn serve(&mut self, env: &Env) -> Option<Turn> {
        loop {
            if self.socket.out.len() > ANSWERS_MAX {
                return Some(Turn::Wait);
            }
            let Stage::Http(http) = &mut self.stage else { return Some(Turn::Again) };
            if http.waiting.is_some() {
                // What comes after it waits, but the end of the stream is to be noticed.
                return (http.buffer.len() >= PIPELINED_MAX).then_some(Turn::Wait);
            }
            let skipped = http.skip.min(http.buffer.len());
            http.buffer.drain(..skipped);
            http.skip -= skipped;
            if http.buffer.is_empty() {
                return None;
            }
            match http::serve(&http.buffer, self.address.ip(), env, self.refused) {
                Served::Partial { go_on } => {
                    if go_on && !std::mem::replace(&mut http.told, true) {
                        self.socket.say(Frame::from(&b"HTTP/1.1 100 Continue\r\n\r\n"[..]));
                    }
                    return None;
                }
                Served::Asked { consumed, asked, reply } => {
                    http.took(consumed, 0);
                    let waiting = Waiting::new(*asked, reply);
                    self.deadline = env.now.saturating_add(waiting.patience(env.unix_ms));
                    http.waiting = Some(Box::new(waiting));
                    return Some(Turn::Asked);
                }
                Served::Answered { consumed, skip, response, close } => {
                    http.took(consumed, skip);
                    self.deadline = env.now + if skip > 0 { HEAD_WAIT } else { IDLE_WAIT };
                    self.socket.say(response.into());
                    if close {
                        return Some(self.end(env));
                    }
                }
                Served::Upgraded { consumed, upgrade } => {
                    let rest = http.buffer.get(consumed..).unwrap_or_default().to_vec();
                    return Some(self.upgrade(*upgrade, rest, env));
                }
            }
        }
    }

    /// Becomes a websocket; `rest` came after the request.
    fn upgrade(&mut self, upgrade: Upgrade, rest: Vec<u8>, env: &Env) -> Turn {
        self.socket.say(upgrade.response.into());
        let rest = self.socket.begin_frames(rest, upgrade.deflate);
        match upgrade.admission {
            Ok(admission) => {
                self.stage = Stage::Open(Box::new(Websocket::new(admission, rest, env.now)));
                Turn::Opened
            }
            Err(close) => {
                self.socket.say(close.frame());
                self.end(env)
            }
        }
    }

    /// The websocket that a request waits for opens, or not.
    pub fn open_late(&mut self, opening: impl FnOnce(Waiting) -> Upgrade, env: &Env) -> Turn {
        let Stage::Http(http) = &mut self.stage else { return Turn::Wait };
        let Some(waiting) = http.waiting.take() else { return Turn::Wait };
        let rest = std::mem::take(&mut http.buffer);
        Counters::add(&env.counters.requests, 1);
        self.upgrade(opening(*waiting), rest, env)
    }

    /// Ends the connection after what waits in its queue.
    fn end(&mut self, env: &Env) -> Turn {
        self.socket.mute();
        self.stage = Stage::Closing(None);
        self.deadline = env.now + CLOSE_WAIT;
        Turn::Closing
    }

    /// Closes an open websocket: a close frame, and for some codes the client's answer, then the end.
    pub fn close(&mut self, close: &Close, env: &Env) {
        use CloseCode::{GoingAway, KeepAlive, Normal, Restart};
        if self.websocket().is_some() && !matches!(close.code, Normal | GoingAway | Restart | KeepAlive) {
            Counters::add(&env.counters.closed_by_policy, 1);
        }
        if self.websocket().is_some() {
            Rejection::of_close(close.code).into_iter().for_each(|why| env.counters.reject(why));
        }
        self.part(close, env);
    }

    /// Closes a websocket that reads too slowly; what waits for it is dropped, it will ask for it when it comes back.
    pub fn close_slow(&mut self, env: &Env) {
        Counters::add(&env.counters.slow_consumers, 1);
        env.counters.reject(Rejection::Slow);
        self.socket.out.cut();
        self.part(&Close::new(CloseCode::TryLater, "reading too slowly"), env);
    }

    /// Closes a websocket because somebody wants it.
    pub fn disconnect(&mut self, close: &Close, env: &Env) {
        env.counters.reject(Rejection::Disconnected);
        self.part(close, env);
    }

    fn part(&mut self, close: &Close, env: &Env) {
        let stage = std::mem::replace(&mut self.stage, Stage::Closing(None));
        let Stage::Open(websocket) = stage else {
            self.stage = stage;
            return;
        };
        self.socket.mute();
        self.socket.say(close.frame());
        self.stage = Stage::Closing(close.code.awaits_answer().then_some(websocket));
        self.deadline = env.now + CLOSE_WAIT;
    }

    /// Puts a frame with notifications into the queue.
    pub fn send(&mut self, frame: &Frame, kind: Kind, env: &Env) -> Result<(), Full> {
        self.socket.out.push(frame.clone(), kind, env.settings.send_queue_max)
    }

    /// Writes what the socket takes. True when there is a reason to read now.
    ///
    /// # Errors
    /// The connection is over.
    pub fn flush(&mut self, env: &Env) -> io::Result<(Flow, bool)> {
        let waited = !self.socket.out.is_empty();
        let (flow, count) = self.socket.flush_out(env.now)?;
        Counters::add(&env.counters.bytes_sent, count);
        if flow != Flow::Empty {
            return Ok((flow, false));
        }
        match self.stage {
            Stage::Closing(None) => {
                self.socket.shut();
                self.stage = Stage::Drain;
                self.deadline = env.now + DRAIN_WAIT;
                Ok((flow, true))
            }
            Stage::Http(_) => Ok((flow, waited)),
            _ => Ok((flow, false)),
        }
    }

    /// When to call [`Connection::due`] next.
    pub fn deadline(&self, env: &Env) -> Moment {
        match &self.stage {
            Stage::Open(websocket) => websocket.deadline(&self.socket, env),
            _ => self.patience_ends(),
        }
    }

    /// When the stage has taken too long; a peer that goes on to read what waits for it has more time.
    fn patience_ends(&self) -> Moment {
        if self.socket.out.is_empty() { self.deadline } else { self.deadline.max(self.socket.progress + CLOSE_WAIT) }
    }

    /// Does what time asks for.
    pub fn due(&mut self, env: &Env) -> Turn {
        let patience_ends = self.patience_ends();
        let due = match &mut self.stage {
            Stage::Open(websocket) => {
                let due = websocket.due(&self.socket, env);
                if let Due::Ping = due {
                    websocket.pinged(env.now);
                }
                due
            }
            _ if env.now < patience_ends => Due::Nothing,
            Stage::Http(http) if http.waiting.is_some() => return Turn::Waited,
            Stage::Http(http) if !http.kept || !http.buffer.is_empty() || http.skip > 0 => {
                self.socket.say(http::refusal(408, env).into());
                return self.end(env);
            }
            _ => Due::Gone,
        };
        match due {
            Due::Nothing => Turn::Wait,
            Due::Ping => {
                self.socket.say(protocol::ping());
                Turn::Wait
            }
            Due::Close(close) => {
                self.close(&close, env);
                Turn::Closing
            }
            Due::Gone => Turn::Gone,
        }
    }
}

#[cfg(test)]
mod tests;
