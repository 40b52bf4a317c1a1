//! Handles for fuzz targets and for the echo server of the conformance tests: one connection driven by hand, and a
//! gateway whose websockets answer with what they hear. Behind feature `testing`; no build that is installed has it.

use super::Env;
use super::asked::{Said, Waiting, Wish};
use super::connection::{Connection, Turn};
use super::deflate;
use super::http::{self, Served};
use super::outbound::Flow;
use super::socket::Socket;
use super::websocket::Text;
use crate::core::link::Answer;
use crate::core::protocol::Frame;
use crate::core::settings::{Database, Settings};
use mio::net::TcpStream;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Instant;
use tungstenite::protocol::WebSocketConfig;

/// The longest message of an echoing gateway, in bytes. Unset: nothing echoes.
static ECHO: OnceLock<usize> = OnceLock::new();

/// From now on every websocket of this process answers with what it hears: text with text, binary with binary.
/// Messages may have up to `message_max` bytes, and a client needs no Origin, which the Autobahn cases do not send.
pub fn set_echo(message_max: usize) {
    let _ = ECHO.set(message_max);
}

pub(super) fn echoes() -> bool {
    ECHO.get().is_some()
}

/// The websocket's limits, with the echo's own longest message.
pub(super) fn widened(config: WebSocketConfig) -> WebSocketConfig {
    match ECHO.get() {
        Some(max) => config.max_message_size(Some(*max)).max_frame_size(Some(*max)),
        None => config,
    }
}

/// The headers whose lack matters.
pub(super) fn forgiven(mut missing: Vec<&'static str>) -> Vec<&'static str> {
    missing.retain(|name| !echoes() || *name != "Origin");
    missing
}

/// Answers with what was heard, as a pong is put into the queue: a peer that does not read is closed as too slow.
pub(super) fn echo(socket: &mut Socket, text: &Text) -> Turn {
    let (first, payload) = match text {
        Text::Utf8(text) => (0x81, text.as_str().as_bytes()),
        Text::Bytes(bytes) => (0x82, bytes.as_ref()),
    };
    let mut frame = vec![first];
    match payload.len() {
        length @ 0..=125 => frame.push(length as u8),
        length @ 126..=0xffff => {
            frame.push(126);
            frame.extend((length as u16).to_be_bytes());
        }
        length => {
            frame.push(127);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend(payload);
    let frame: Frame = frame.into();
    // Only texts are ever sent compressed.
    let packs = first == 0x81 && socket.deflate.is_some_and(|agreement| agreement.takes(&frame));
    let frame = if packs { deflate::twin(&frame).unwrap_or(frame) } else { frame };
    // It never fails: an overflow is noticed at the next read.
    let _ = socket.write(&frame);
    Turn::Done
}

/// The world of connections that are driven by hand: its clock stands still.
pub struct World {
    env: Env,
}

/// What [`World::head`] made of a connection's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Head {
    Partial,
    Answered {
        consumed: usize,
        skip: usize,
        response: Vec<u8>,
        close: bool,
    },
    /// Somebody else has to be asked.
    Asked {
        consumed: usize,
    },
    /// With the response, and whether the client was let in.
    Upgraded {
        consumed: usize,
        response: Vec<u8>,
        admitted: bool,
    },
}

impl World {
    /// A world of these settings and databases, at this time of day in Unix seconds.
    pub fn new(settings: Settings, databases: Vec<Database>, unix: i64) -> World {
        let mut env = Env::new(Arc::new(settings), Arc::new(databases), Arc::default(), Instant::now());
        (env.now, env.unix_ms) = (1_000, unix.saturating_mul(1_000));
        World { env }
    }

    /// What the HTTP side makes of a connection's bytes.
    pub fn head(&self, bytes: &[u8], refused: bool) -> Head {
        match http::serve(bytes, Ipv4Addr::LOCALHOST.into(), &self.env, refused) {
            Served::Partial { .. } => Head::Partial,
            Served::Answered { consumed, skip, response, close } => Head::Answered { consumed, skip, response, close },
            Served::Asked { consumed, .. } => Head::Asked { consumed },
            Served::Upgraded { consumed, upgrade } => {
                let admitted = upgrade.admission.is_ok();
                Head::Upgraded { consumed, response: upgrade.response, admitted }
            }
        }
    }

    /// Gives a new connection these pieces one after the other, then the end of the stream, and tells what came of it.
    ///
    /// # Errors
    /// No pair of sockets can be had.
    pub fn visit<'a>(&self, pieces: impl IntoIterator<Item = &'a [u8]>) -> io::Result<Visit> {
        let mut visitor = Visitor::new(&self.env)?;
        for piece in pieces {
            visitor.say(piece, &self.env);
        }
        let _ = visitor.client.shutdown(Shutdown::Write);
        visitor.settle(&self.env);
        Ok(visitor.visit)
    }
}

/// What came of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Visit {
    /// All that was sent to the client.
    pub sent: Vec<u8>,
    /// What its websocket asked for.
    pub heard: Vec<Heard>,
    /// Whether the websocket opened.
    pub opened: bool,
    /// Whether the connection is over.
    pub gone: bool,
}

/// What a websocket asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// With the JSON text of the channels.
    Subscribe {
        channels: String,
        last: i64,
    },
    Ignored(String),
}

/// A connection and its client.
struct Visitor {
    connection: Connection,
    client: UnixStream,
    visit: Visit,
}

impl Visitor {
    fn new(env: &Env) -> io::Result<Visitor> {
        let (client, server) = UnixStream::pair()?;
        client.set_nonblocking(true)?;
        server.set_nonblocking(true)?;
        // The system calls are the same for either kind of stream.
        let tcp = TcpStream::from_std(std::net::TcpStream::from(OwnedFd::from(server)));
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        let connection = Connection::new(1, tcp, address, false, env.now);
        Ok(Visitor { connection, client, visit: Visit::default() })
    }

    fn say(&mut self, mut bytes: &[u8], env: &Env) {
        while !self.visit.gone && !bytes.is_empty() {
            match self.client.write(bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
            self.settle(env);
        }
    }

    /// Turns, as a reactor gives them, until nothing is left to do.
    fn settle(&mut self, env: &Env) {
        while !self.visit.gone && self.turn(env) {}
    }

    /// One turn; true when another one is wanted.
    fn turn(&mut self, env: &Env) -> bool {
        self.connection.socket.begin_turn(env.settings.send_queue_max);
        let again = loop {
            match self.connection.read(env) {
                Turn::Wait => break false,
                Turn::Again => break true,
                Turn::Done | Turn::Closing | Turn::Waited | Turn::Presence(_) => {}
                Turn::Asked => self.answer(env),
                Turn::Opened => self.visit.opened = true,
                Turn::Subscribe { channels, last } => self.visit.heard.push(Heard::Subscribe { channels, last }),
                Turn::Ignored(reason) => self.visit.heard.push(Heard::Ignored(reason)),
                Turn::Gone => {
                    self.visit.gone = true;
                    break false;
                }
            }
        };
        let flushed = if self.visit.gone { Ok((Flow::Empty, false)) } else { self.connection.flush(env) };
        let received = self.receive();
        match flushed {
            Ok((flow, read)) => again || read || received && flow != Flow::Empty,
            Err(_) => {
                self.visit.gone = true;
                false
            }
        }
    }

    /// The request that waits gets its answer at once.
    fn answer(&mut self, env: &Env) {
        let Some(waiting) = self.connection.waiting() else { return };
        let said = said(waiting);
        self.connection.answer(said, env);
    }

    /// Takes in what the client was sent. True when there was something.
    fn receive(&mut self) -> bool {
        let before = self.visit.sent.len();
        // Ends with "would block", which is no matter.
        let _ = self.client.read_to_end(&mut self.visit.sent);
        self.visit.sent.len() > before
    }
}

/// What a request gets whose database answers at once, and has no notification.
fn said(waiting: &mut Waiting) -> Said {
    let channels = match waiting.parsed_channels() {
        Ok(channels) => channels,
        Err(reason) => return waiting.refuse(&reason),
    };
    match waiting.wish {
        Wish::Notifications { .. } => {
            waiting.subscribed(&channels);
            waiting.answer_found()
        }
        Wish::Missed { last } => waiting.answer(&Answer::Missed(last % 2 == 0)),
        Wish::Vacuum => waiting.answer(&Answer::Vacuum { last: None, next: 1_700_000_000_000_000 }),
        Wish::Open(_) | Wish::Forward { .. } => waiting.fail(503),
        Wish::Metrics => waiting.answer_text("imbus_up 1\n".to_owned()),
    }
}
