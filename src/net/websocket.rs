//! An open websocket: takes messages out of what the peer sends, keeps to the limits of ODOO_BUS §2, and knows when the
//! peer has been silent for too long. Decides how an open websocket ends; what a message means is the protocol's.

use super::auth::{Admission, Authority};
use super::deflate::Fault;
use super::socket::Socket;
use super::{Env, millis};
use crate::core::hub::Moment;
use crate::core::protocol::{Close, CloseCode};
use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::io::ErrorKind;
use tungstenite::error::{Error, ProtocolError};
use tungstenite::protocol::{Role, WebSocketConfig, WebSocketContext};
use tungstenite::{Bytes, Message};

/// Buffer for reading, in bytes: most messages of Odoo's client are shorter (NOTES: 2.6 KiB a connection with it).
const READ_BUFFER: usize = 2048;

/// The longest message, in bytes (ODOO_BUS §2).
pub const MESSAGE_MAX: usize = 1 << 20;

/// How long an answer to a ping may take, in milliseconds (ODOO_BUS §5).
const PONG_WAIT: Moment = 15_000;

/// How long a client may take that is asked about when it subscribes, in milliseconds.
const PROOF_WAIT: Moment = 30_000;

/// An open websocket without its socket.
pub struct Websocket {
    context: WebSocketContext,
    pub admission: Admission,
    rate: VecDeque<Moment>,
    opened: Moment,
    /// Of half the keepalive time, in 65536ths: how much later than it this connection ends.
    jitter: u16,
    heard: Moment,
    pinged: Option<Moment>,
    /// Whether somebody has said that it may be here.
    let_in: bool,
}

/// What the peer sent.
pub enum Heard {
    /// A message's text (TEXT and BINARY are alike to Odoo).
    Text(Text),
    /// Nothing more for now.
    Nothing,
    /// The peer says goodbye; tungstenite's answer is in the queue.
    Goodbye,
    /// The connection is to be closed.
    Close(Close),
    /// The peer sends more frames than it may.
    Fast,
    /// The peer does not read what its pings are answered with.
    Slow,
    /// The peer is gone.
    Gone,
}

/// A message's text, not copied.
pub enum Text {
    Utf8(tungstenite::Utf8Bytes),
    Bytes(Bytes),
}

impl Text {
    /// The text; None for a binary message that is no UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Text::Utf8(text) => Some(text.as_str()),
            Text::Bytes(bytes) => std::str::from_utf8(bytes).ok(),
        }
    }
}

/// What time asks of an open websocket.
pub enum Due {
    Nothing,
    Ping,
    Close(Close),
    /// The peer does not answer.
    Gone,
}

impl Websocket {
    /// Begins after the handshake; `rest` is what came after it already.
    pub fn new(admission: Admission, rest: Vec<u8>, now: Moment) -> Websocket {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER)
            .write_buffer_size(0)
            .max_message_size(Some(MESSAGE_MAX))
            .max_frame_size(Some(MESSAGE_MAX));
        #[cfg(feature = "testing")]
        let config = super::testing::widened(config);
        let context = WebSocketContext::from_partially_read(rest, Role::Server, Some(config));
        let jitter = RandomState::new().hash_one(now) as u16;
        let let_in = !matches!(admission.authority, Authority::Function(_));
        Websocket { context, admission, rate: VecDeque::new(), opened: now, jitter, heard: now, pinged: None, let_in }
    }

    /// The next thing the peer sent.
    pub fn read(&mut self, socket: &mut Socket, env: &Env) -> Heard {
        loop {
            let message = self.context.read(socket);
            if socket.take_heard() {
                self.heard = env.now;
                self.pinged = None;
            }
            if !self.within_rate(socket.take_frames(), env) {
                return Heard::Fast;
            }
            if socket.has_overflowed() {
                return Heard::Slow;
            }
            if let Some(fault) = socket.fault() {
                return Heard::Close(parting(fault));
            }
            match message {
                Ok(Message::Text(text)) => return Heard::Text(Text::Utf8(text)),
                #[cfg(feature = "testing")]
                Ok(Message::Binary(bytes)) if super::testing::echoes() => return Heard::Text(Text::Bytes(bytes)),
                // The connection check of Odoo's later clients (ODOO_BUS §12).
                Ok(Message::Binary(bytes)) if bytes.as_ref() == [0] => {}
                Ok(Message::Binary(bytes)) => return Heard::Text(Text::Bytes(bytes)),
                Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {}
                Ok(Message::Close(_)) => {
                    // Puts the answer into the queue, then says that the connection is closed.
                    let _ = self.context.flush(socket);
                    return Heard::Goodbye;
                }
                Err(error) => return ending(error),
            }
        }
    }

    /// Counts frames that arrived. False when the 11th came too soon after the 1st (websocket.py:634).
    fn within_rate(&mut self, frames: usize, env: &Env) -> bool {
        let burst = env.settings.rate_limit_burst as usize;
        let span = millis(env.settings.rate_limit_delay).saturating_mul(burst as Moment);
        for _ in 0..frames {
            while self.rate.len() > burst {
                self.rate.pop_front();
            }
            let full = burst > 0 && self.rate.len() == burst;
            if full && self.rate.pop_front().is_some_and(|first| env.now.saturating_sub(first) < span) {
                return false;
            }
            if burst > 0 {
                self.rate.push_back(env.now);
            }
        }
        true
    }

    /// When to call [`Websocket::due`] next.
    pub fn deadline(&self, socket: &Socket, env: &Env) -> Moment {
        let expiry = self.admission.authority.expires().saturating_mul(1000).saturating_sub(env.unix_ms).max(0);
        let expiry = env.now.saturating_add(expiry.unsigned_abs());
        expiry.min(self.retirement(env)).min(self.silence_ends(socket, env)).min(self.proof_ends())
    }

    /// Its channels are known.
    pub fn let_in(&mut self) {
        self.let_in = true;
    }

    /// Until when it has to prove who it is.
    fn proof_ends(&self) -> Moment {
        if self.let_in { Moment::MAX } else { self.opened.saturating_add(PROOF_WAIT) }
    }

    /// What is due now.
    pub fn due(&self, socket: &Socket, env: &Env) -> Due {
        if self.admission.authority.expires().saturating_mul(1000) <= env.unix_ms {
            return Due::Close(Close::new(CloseCode::Unauthorized, "the token has expired"));
        }
        if env.now >= self.proof_ends() {
            return Due::Close(Close::new(CloseCode::Unauthorized, "no subscription"));
        }
        if env.now >= self.retirement(env) {
            return Due::Close(Close::new(CloseCode::KeepAlive, ""));
        }
        match (env.now >= self.silence_ends(socket, env), self.pinged) {
            (false, _) => Due::Nothing,
            (true, None) => Due::Ping,
            (true, Some(_)) => Due::Gone,
        }
    }

    /// A ping is on its way.
    pub fn pinged(&mut self, now: Moment) {
        self.pinged = Some(now);
    }

    /// When the connection has lived long enough: `imbus.keepalive` and up to half as long again (websocket.py:738).
    fn retirement(&self, env: &Env) -> Moment {
        match millis(env.settings.keepalive) {
            0 => Moment::MAX,
            age => {
                let extra = (u128::from(age / 2) * u128::from(self.jitter)) >> 16;
                self.opened.saturating_add(age).saturating_add(extra as Moment)
            }
        }
    }

    /// When a ping is due, or its answer overdue. As long as bytes go out, the ping may still be behind them.
    fn silence_ends(&self, socket: &Socket, env: &Env) -> Moment {
        match (self.pinged, millis(env.settings.ping_interval)) {
            (Some(pinged), _) => pinged.max(socket.progress).saturating_add(PONG_WAIT),
            (None, 0) => Moment::MAX,
            (None, interval) => self.heard.saturating_add(interval),
        }
    }
}

/// How a websocket ends on a fault in what is compressed.
fn parting(fault: Fault) -> Close {
    match fault {
        Fault::Nested => Close::new(CloseCode::Protocol, "a message inside another one"),
        Fault::Broken => Close::new(CloseCode::BadText, "a message that cannot be inflated"),
        Fault::TooBig => Close::new(CloseCode::TooBig, ""),
    }
}

/// How a websocket ends on an error of tungstenite's.
fn ending(error: Error) -> Heard {
    let code = match error {
        Error::Io(error) if error.kind() == ErrorKind::WouldBlock => return Heard::Nothing,
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => return Heard::Gone,
        Error::Protocol(error) => return Heard::Close(Close::new(CloseCode::Protocol, error.to_string())),
        Error::Capacity(_) => CloseCode::TooBig,
        Error::Utf8(_) => CloseCode::BadText,
        _ => return Heard::Gone,
    };
    Heard::Close(Close::new(code, ""))
}
