//! A request that waits for somebody else: for a database to answer, or for something to happen. Decides how the answer
//! is put into JSON; knows no sockets.

use super::auth::Admission;
use super::http::{Reply, Response};
use crate::core::channel::Channel;
use crate::core::hub::Moment;
use crate::core::link::Answer;
use crate::core::notification::Notification;
use crate::core::protocol::{self, CHANNELS_MAX};
use crate::core::{json, rpc};

/// How long a poll waits for a notification, in milliseconds (Odoo's TIMEOUT of 50 s, bus/models/bus.py).
const POLL_WAIT: Moment = 50_000;

/// How long a database may take to answer, in milliseconds.
const ANSWER_WAIT: Moment = 10_000;

/// The cookie that tells a poller's position where its last id does not, see [`Waiting::position`].
const COOKIE: &str = "imbus_poll";

/// Longest life of that cookie, in seconds: a poller comes back at once.
const COOKIE_AGE: u32 = 120;

/// A request of which not all is known yet.
pub struct Asked {
    pub admission: Admission,
    pub wish: Wish,
    /// The JSON text of the call's id.
    pub id: String,
    /// What it brought in [`COOKIE`].
    pub position: Option<String>,
}

/// What a request wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Notifications of these channels (a JSON array) after `last`; with `waits` it waits for the first.
    Notifications { channels: String, last: i64, waits: bool },
    /// Whether there is no notification with this id.
    Missed { last: i64 },
    /// When old notifications were and will be deleted.
    Vacuum,
    /// The text of `/metrics`.
    Metrics,
}

/// A request that waits.
pub struct Waiting {
    pub admission: Admission,
    pub wish: Wish,
    reply: Reply,
    id: String,
    position: Option<String>,
    /// What it is subscribed to.
    channels: Vec<Channel>,
    found: Vec<Notification>,
}

impl Waiting {
    /// A request just read.
    pub fn new(asked: Asked, reply: Reply) -> Waiting {
        let Asked { admission, wish, id, position } = asked;
        Waiting { admission, wish, reply, id, position, channels: Vec::new(), found: Vec::new() }
    }

    /// How long it may wait, in milliseconds.
    pub fn patience(&self) -> Moment {
        match self.wish {
            Wish::Notifications { waits: true, .. } => POLL_WAIT,
            _ => ANSWER_WAIT,
        }
    }

    /// Whether it waits for something to happen, rather than for an answer.
    pub fn polls(&self) -> bool {
        matches!(self.wish, Wish::Notifications { waits: true, .. })
    }

    /// The channels it asks for, as JSON.
    pub fn channels(&self) -> &str {
        match &self.wish {
            Wish::Notifications { channels, .. } => channels,
            Wish::Missed { .. } | Wish::Vacuum | Wish::Metrics => "[]",
        }
    }

    /// The channels it asks for.
    ///
    /// # Errors
    /// Why they are none.
    pub fn parsed_channels(&self) -> Result<Vec<Channel>, String> {
        let channels = protocol::channels(self.channels(), self.admission.authority.database_name(), true)?;
        if channels.len() > CHANNELS_MAX { Err(format!("more than {CHANNELS_MAX} channels")) } else { Ok(channels) }
    }

    /// It is subscribed to these channels now. Returns the position from which on it is owed.
    pub fn subscribed(&mut self, channels: &[Channel]) -> i64 {
        self.channels = channels.to_vec();
        self.channels.sort_unstable();
        self.channels.dedup();
        self.position()
    }

    /// The client's position. Clients of Odoo up to 15 say the greatest id they have ever had; where the last they had
    /// was a smaller one, that is their position, and the cookie says so for exactly that greatest id and those channels.
    fn position(&self) -> i64 {
        let Wish::Notifications { last, .. } = self.wish else { return 0 };
        let parse = || {
            let mut parts = self.position.as_deref()?.splitn(3, '.');
            let (greatest, position) = (parts.next()?.parse::<i64>().ok()?, parts.next()?.parse::<i64>().ok()?);
            let is_mine = greatest == last && (0..last).contains(&position) && parts.next()? == self.fingerprint();
            is_mine.then_some(position)
        };
        parse().unwrap_or(last)
    }

    fn fingerprint(&self) -> String {
        let texts: Vec<&str> = self.channels.iter().map(Channel::as_str).collect();
        let mixed = texts
            .join(",")
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        format!("{mixed:016x}")
    }

    /// Takes notifications for the answer.
    pub fn found(&mut self, notifications: &[Notification]) {
        self.found.extend_from_slice(notifications);
    }

    /// Whether there is something to answer with.
    pub fn has_found(&self) -> bool {
        !self.found.is_empty()
    }

    /// The answer with what was found, and whether the connection ends with it. Of ids that do not ascend only those up
    /// to there: the last id of an answer is the client's position, the rest comes with its next request.
    pub fn answer_found(&self) -> (Vec<u8>, bool, usize) {
        let Wish::Notifications { last, waits, .. } = &self.wish else { return self.fail(503) };
        let run = protocol::runs(&self.found, false).into_iter().next().unwrap_or_default();
        let found = self.found.get(run).unwrap_or_default();
        let database = self.admission.authority.database_name();
        let entry = |notification: &Notification| {
            let channel = notification.channel.stored(database);
            format!("{{\"id\": {}, \"channel\": {channel}, \"message\": {}}}", notification.id, notification.message)
        };
        let entries: Vec<String> = found.iter().map(entry).collect();
        let entries = format!("[{}]", entries.join(", "));
        let result = if *waits {
            entries
        } else {
            let channels: Vec<String> = self.channels.iter().map(|channel| channel.stored(database)).collect();
            format!("{{\"channels\": [{}], \"notifications\": {entries}}}", channels.join(", "))
        };
        let mut response = Response::json(200, rpc::result(&self.id, &result));
        if let Some(position) = found.last().map(|last| last.id).filter(|position| *waits && position < last) {
            let value = format!("{last}.{position}.{}", self.fingerprint());
            let cookie = format!("{COOKIE}={value}; Path=/longpolling; Max-Age={COOKIE_AGE}; HttpOnly; SameSite=Lax");
            response.headers.push(("Set-Cookie", cookie));
        }
        let (bytes, close) = self.put(&response);
        (bytes, close, found.len())
    }

    /// The answer of a database, and whether the connection ends with it.
    pub fn answer(&self, answer: &Answer) -> (Vec<u8>, bool, usize) {
        let result = match answer {
            Answer::Missed(missed) => missed.to_string(),
            Answer::Vacuum { last, next } => {
                let last = last.map_or("null".to_owned(), |at| json::string(&utc(at)));
                format!("{{\"id\": 0, \"lastcall\": {last}, \"nextcall\": {}}}", json::string(&utc(*next)))
            }
            Answer::Authenticated(_) | Answer::Jobs(_) | Answer::Failed => return self.fail(503),
        };
        let (bytes, close) = self.put(&Response::json(200, rpc::result(&self.id, &result)));
        (bytes, close, 0)
    }

    /// The text of `/metrics`, and whether the connection ends with it.
    pub fn answer_text(&self, text: String) -> (Vec<u8>, bool, usize) {
        let mut response = Response::text(200, "");
        response.kind = "text/plain; version=0.0.4; charset=utf-8";
        response.body = text;
        let (bytes, close) = self.put(&response);
        (bytes, close, 0)
    }

    /// The answer to a call that is wrong in itself, as Odoo gives it.
    pub fn refuse(&self, message: &str) -> (Vec<u8>, bool, usize) {
        let body = rpc::error(&self.id, 200, message, "builtins.ValueError");
        let (bytes, close) = self.put(&Response::json(200, body));
        (bytes, close, 0)
    }

    /// No answer: 401, 403 or 503.
    pub fn fail(&self, status: u16) -> (Vec<u8>, bool, usize) {
        let (bytes, close) = self.put(&failure(status));
        (bytes, close, 0)
    }

    fn put(&self, response: &Response) -> (Vec<u8>, bool) {
        (self.reply.bytes(response), self.reply.close)
    }
}

/// The answer to who may not, or not now.
pub fn failure(status: u16) -> Response {
    let mut response = match status {
        401 => Response::text(401, "no valid proof of who this is"),
        403 => Response::text(403, "a channel is not allowed"),
        _ => Response::text(503, "try again later"),
    };
    match status {
        401 => response.headers.push(("WWW-Authenticate", "Bearer".to_owned())),
        503 => response.headers.push(("Retry-After", "5".to_owned())),
        _ => {}
    }
    response
}

/// What a request brought in [`COOKIE`].
pub fn position(request: &super::http::Request) -> Option<String> {
    request.cookie(COOKIE).map(str::to_owned)
}

/// Microseconds since 1970 as Odoo writes a time: `2026-01-31 23:59:59`, in UTC.
fn utc(at: i64) -> String {
    let seconds = at.div_euclid(1_000_000);
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Howard Hinnant's days_from_civil, the other way round: years begin in March, eras have 400 of them.
    let days = days + 719_468;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = year + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        assert_eq!(utc(0), "1970-01-01 00:00:00");
        assert_eq!(utc(951_782_400_000_000), "2000-02-29 00:00:00");
        assert_eq!(utc(1_767_225_599_999_999), "2025-12-31 23:59:59");
        assert_eq!(utc(-1), "1969-12-31 23:59:59");
    }
}
