//! The words of the websocket, as Odoo's client speaks them (ODOO_BUS §3, §4): what a client's message asks for, which
//! of its versions are served, how notifications and closes are put into frames. Knows no sockets.

use super::channel::Channel;
use super::json;
use super::notification::Notification;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

/// A complete websocket frame, shared by everybody it is sent to.
pub type Frame = Arc<[u8]>;

/// The oldest websocket worker that is served (Odoo 18.0 of November 2024).
const OLDEST: (u32, u32, u32) = (18, 0, 2);

/// The longest reason a close frame can carry, in bytes (RFC 6455: 125 with the code).
const REASON_MAX: usize = 123;

/// Text that may share a frame, in bytes; a longer message has a frame of its own.
const FRAME_TEXT: usize = 64 * 1024;

/// Channels one connection may subscribe to; an Odoo user has some dozens.
pub const CHANNELS_MAX: usize = 10_000;

/// The longest data of an update of presence, in bytes: some list who else is looked at.
const PRESENCE_MAX: usize = 64 * 1024;

/// Why a websocket ends (ODOO_BUS, close codes; 44xx are imbus's own).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum CloseCode {
    /// The client shall not come back ([`OUTDATED`]).
    Normal = 1000,
    /// The gateway stops.
    GoingAway = 1001,
    /// The client broke the framing of RFC 6455.
    Protocol = 1002,
    /// A text message is no UTF-8.
    BadText = 1007,
    /// A message over 1 MiB, or more than [`CHANNELS_MAX`] channels.
    TooBig = 1009,
    /// The gateway starts again.
    Restart = 1012,
    /// Too many frames, or too slow in reading them; come back later.
    TryLater = 1013,
    /// Odoo's SESSION_EXPIRED: the session has ended, or is somebody else's.
    SessionExpired = 4001,
    /// Odoo's KEEP_ALIVE_TIMEOUT: come back at once.
    KeepAlive = 4002,
    /// No valid proof of who this is.
    Unauthorized = 4401,
    /// A channel outside what the proof allows.
    Forbidden = 4403,
}

impl CloseCode {
    /// Whether the client is given time to answer the close frame, as Odoo does (websocket.py:548).
    pub fn awaits_answer(self) -> bool {
        matches!(self, CloseCode::Normal | CloseCode::GoingAway | CloseCode::Restart)
    }
}

/// A close frame's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Close {
    /// What the client goes by.
    pub code: CloseCode,
    reason: String,
}

/// The reason Odoo's client knows for "reload the page".
pub const OUTDATED: &str = "OUTDATED_VERSION";

impl Close {
    /// A close with a reason, cut to what a frame can carry.
    pub fn new(code: CloseCode, reason: impl Into<String>) -> Close {
        let mut reason = reason.into();
        while reason.len() > REASON_MAX {
            reason.pop();
        }
        Close { code, reason }
    }

    /// The reason, at most 123 bytes.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// The frame to send.
    pub fn frame(&self) -> Frame {
        let mut payload = (self.code as u16).to_be_bytes().to_vec();
        payload.extend_from_slice(self.reason.as_bytes());
        frame(0x88, &payload)
    }
}

/// An empty ping.
pub fn ping() -> Frame {
    frame(0x89, &[])
}

/// One whole unmasked frame; `first` is FIN, the reserved bits and the opcode.
pub fn frame(first: u8, payload: &[u8]) -> Frame {
    let mut bytes = head(first, payload.len());
    bytes.extend_from_slice(payload);
    bytes.into()
}

/// The head of an unmasked frame, with room for its payload.
fn head(first: u8, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(10 + length);
    bytes.push(first);
    match length {
        0..=125 => bytes.push(length as u8),
        126..=0xffff => {
            bytes.push(126);
            bytes.extend_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            bytes.push(127);
            bytes.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    bytes
}

/// The frame that carries these notifications: `[{"id":12,"message":…},…]`, the messages as they stand.
pub fn notifications_frame(notifications: &[Notification]) -> Frame {
    let ids: Vec<String> = notifications.iter().map(|notification| notification.id.to_string()).collect();
    let (open, middle) = ("{\"id\":", ",\"message\":");
    let fixed = open.len() + middle.len() + "},".len();
    let texts: usize = notifications.iter().zip(&ids).map(|(n, id)| fixed + id.len() + n.message.len()).sum();
    let mut bytes = head(0x81, texts + "[]".len() - usize::from(!ids.is_empty()));
    bytes.push(b'[');
    for (at, (notification, id)) in notifications.iter().zip(&ids).enumerate() {
        if at > 0 {
            bytes.push(b',');
        }
        for part in [open, id, middle, &notification.message, "}"] {
            bytes.extend_from_slice(part.as_bytes());
        }
    }
    bytes.push(b']');
    bytes.into()
}

/// One text message.
pub fn text_frame(text: &str) -> Frame {
    frame(0x81, text.as_bytes())
}

/// Cuts notifications into what may share a frame: inside one, ids ascend and the text stays short; with `by_channel`
/// it is also all of one channel. Their order is never changed.
pub fn runs(notifications: &[Notification], by_channel: bool) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let (mut start, mut text) = (0, 0);
    let pairs = notifications.iter().zip(notifications.iter().skip(1));
    for (at, (notification, next)) in pairs.enumerate() {
        text += notification.message.len();
        let together = next.id > notification.id
            && text + next.message.len() <= FRAME_TEXT
            && (!by_channel || next.channel == notification.channel);
        if !together {
            runs.push(start..at + 1);
            (start, text) = (at + 1, 0);
        }
    }
    if start < notifications.len() {
        runs.push(start..notifications.len());
    }
    runs
}

/// What a client's message asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Replace the subscription by these channels (a JSON array, see [`channels`]); `last` is the greatest id the client
    /// says it has, 0 for none.
    Subscribe { channels: String, last: i64 },
    /// How long the user has been away: a JSON object, for Odoo.
    Presence { data: String },
    /// Anything else Odoo's client sends; nothing to do.
    Other,
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    event_name: Cow<'a, str>,
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Subscribe<'a> {
    #[serde(borrow)]
    channels: &'a RawValue,
    last: i64,
}

/// Reads a client's message.
///
/// # Errors
/// Why the message is ignored; the connection stays open, as with Odoo.
pub fn parse(text: &str) -> Result<Message, String> {
    // serde takes an array for a struct too.
    if !text.trim_start().starts_with('{') {
        return Err("a message must be an object".to_owned());
    }
    let envelope: Envelope = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if envelope.event_name == "update_presence" {
        let data = envelope.data.map(RawValue::get).filter(|data| data.starts_with('{') && data.len() <= PRESENCE_MAX);
        return data.map(|data| Message::Presence { data: data.to_owned() }).ok_or("no presence in it".to_owned());
    }
    if envelope.event_name != "subscribe" {
        return Ok(Message::Other);
    }
    let data = envelope.data.ok_or("subscribe without data")?;
    let subscribe: Subscribe = serde_json::from_str(data.get()).map_err(|error| error.to_string())?;
    if subscribe.last < 0 {
        return Err("last must not be negative".to_owned());
    }
    Ok(Message::Subscribe { channels: subscribe.channels.get().to_owned(), last: subscribe.last })
}

/// Reads a JSON array of channels. `database` is the name of the client's database; `arrays` tells whether record
/// channels (`["res.partner",42]`) may be named, which Odoo's own clients never do.
///
/// # Errors
/// What is wrong with it.
pub fn channels(text: &str, database: &str, arrays: bool) -> Result<Vec<Channel>, String> {
    let elements = json::elements(text).map_err(|error| error.to_string())?;
    let elements = elements.ok_or("channels must be an array")?;
    let channel = |element: &str| {
        if !(element.starts_with('"') || arrays && element.starts_with('[')) {
            return Err("channels must be strings".to_owned());
        }
        Channel::from_json(element, database).map_err(|error| error.to_string())
    };
    elements.into_iter().map(channel).collect()
}

/// Whether a client's websocket worker (`18.0-2`, `saas~18.1-1`) is served: [`OLDEST`] and all later ones.
pub fn is_supported(version: &str) -> bool {
    fn number(text: &str) -> Option<u32> {
        text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
    }
    let parsed = || {
        let (release, worker) = version.strip_prefix("saas~").unwrap_or(version).split_once('-')?;
        let (major, minor) = release.split_once('.')?;
        Some((number(major)?, number(minor)?, number(worker)?))
    };
    parsed().is_some_and(|version| version >= OLDEST)
}

#[cfg(test)]
mod tests;
