//! A request that waits for somebody else: for a database to answer, or for something to happen. Decides how the answer
//! is put into JSON; knows no sockets.

use super::auth::{Admission, Authority, Known};
use super::batch::Run;
use super::handshake::Opening;
use super::http::{Reply, Response};
use super::odoo::Question;
use crate::core::channel::Channel;
use crate::core::hub::Moment;
use crate::core::link::Answer;
use crate::core::notification::Notification;
use crate::core::protocol::{self, CHANNELS_MAX, Frame};
use crate::core::{json, rpc};

/// How long a poll waits for a notification, in milliseconds (Odoo's TIMEOUT of 50 s, bus/models/bus.py).
const POLL_WAIT: Moment = 50_000;

/// How long Odoo may take to answer, in milliseconds, with the time in the line (core/line.rs).
const ODOO_WAIT: Moment = 60_000;

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
    /// Notifications of these channels (a JSON array) after `last`; with `waits` it waits for the first. `is_first` is for
    /// Odoo, see [`Question::Channels`].
    Notifications { channels: String, last: i64, waits: bool, is_first: bool },
    /// Whether there is no notification with this id.
    Missed { last: i64 },
    /// When old notifications were and will be deleted.
    Vacuum,
    /// The text of `/metrics`.
    Metrics,
    /// A websocket, as soon as Odoo has said who it is.
    Open(Box<Opening>),
    /// What Odoo itself answers to this call, a JSON text.
    Forward { path: &'static str, body: String },
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
    is_subscribed: bool,
    found: Vec<Found>,
}

/// Notifications with ascending ids, as text that others share.
struct Found {
    first: i64,
    last: i64,
    count: usize,
    /// The entries of the answer, see [`entries`].
    text: Frame,
}

/// What a request is answered with.
pub struct Said {
    /// The answer without its body.
    pub response: Response,
    /// What is sent.
    pub pieces: Vec<Frame>,
    /// Whether the connection ends with it.
    pub close: bool,
    /// How many notifications there are in it.
    pub count: usize,
}

/// Notifications as entries of an answer, without the brackets around them; `database` is their database's name.
pub fn entries(notifications: &[Notification], database: &str) -> Frame {
    let entry = |notification: &Notification| {
        let channel = notification.channel.stored(database);
        format!("{{\"id\": {}, \"channel\": {channel}, \"message\": {}}}", notification.id, notification.message)
    };
    let entries: Vec<String> = notifications.iter().map(entry).collect();
    entries.join(", ").into_bytes().into()
}

impl Waiting {
    /// A request just read.
    pub fn new(asked: Asked, reply: Reply) -> Waiting {
        let Asked { admission, wish, id, position } = asked;
        let (channels, found) = (Vec::new(), Vec::new());
        Waiting { admission, wish, reply, id, position, channels, is_subscribed: false, found }
    }

    /// How long it may wait, in milliseconds: not beyond its proof. `now` in milliseconds since 1970.
    pub fn patience(&self, now: i64) -> Moment {
        let proof = self.admission.authority.expires().saturating_mul(1000).saturating_sub(now).max(0).unsigned_abs();
        let most = match self.wish {
            _ if matches!(&self.admission.authority, Authority::Odoo(vouched) if vouched.known.is_none()) => ODOO_WAIT,
            Wish::Notifications { waits: true, .. } => POLL_WAIT,
            _ => ANSWER_WAIT,
        };
        most.min(proof)
    }

    /// Whether it waits for something to happen, rather than for an answer.
    pub fn polls(&self) -> bool {
        matches!(self.wish, Wish::Notifications { waits: true, .. })
    }

    /// The channels it asks for, as JSON.
    pub fn channels(&self) -> &str {
        match &self.wish {
            Wish::Notifications { channels, .. } => channels,
            Wish::Missed { .. } | Wish::Vacuum | Wish::Metrics | Wish::Open(_) | Wish::Forward { .. } => "[]",
        }
    }

    /// Who comes in, and the websocket that opens (see [`Wish::Open`]); an empty one where none was asked for.
    pub fn into_opening(self) -> (Admission, Opening) {
        let opening = if let Wish::Open(opening) = self.wish { *opening } else { Opening::default() };
        (self.admission, opening)
    }

    /// What Odoo is asked on its behalf.
    pub fn for_odoo(&self) -> Question {
        match &self.wish {
            Wish::Forward { path, body } => Question::Forward { path, body: body.clone() },
            Wish::Notifications { last, is_first, .. } => {
                Question::Channels { channels: self.channels().to_owned(), last: *last, is_first: *is_first }
            }
            _ => Question::Channels { channels: "[]".to_owned(), last: 0, is_first: true },
        }
    }

    /// Odoo knows it, and sets these cookies (values of `Set-Cookie`).
    pub fn vouched_for(&mut self, known: Known, set_cookies: &[String]) {
        let cookies = set_cookies.iter().map(|value| ("Set-Cookie", value.clone()));
        self.reply.headers.extend(cookies);
        if let Authority::Odoo(vouched) = &mut self.admission.authority {
            vouched.known = Some(known);
        }
    }

    /// Odoo's own answer, JSON.
    pub fn forwarded(&self, body: String, set_cookies: &[String]) -> Said {
        let mut response = Response::json(200, body);
        response.headers.extend(set_cookies.iter().map(|value| ("Set-Cookie", value.clone())));
        self.put(response)
    }

    /// The answer to a call of a session that has ended, as Odoo gives it.
    pub fn expired(&self) -> Said {
        let name = "odoo.http.SessionExpiredException";
        self.put(Response::json(200, rpc::error(&self.id, 100, "Odoo Session Expired", name)))
    }

    /// The channels it asks for.
    ///
    /// # Errors
    /// Why they are none.
    pub fn parsed_channels(&self) -> Result<Vec<Channel>, String> {
        let arrays = !matches!(self.admission.authority, Authority::Odoo(_));
        let channels = protocol::channels(self.channels(), self.admission.authority.database_name(), arrays)?;
        if channels.len() > CHANNELS_MAX { Err(format!("more than {CHANNELS_MAX} channels")) } else { Ok(channels) }
    }

    /// It is subscribed to these channels now. Returns the position from which on it is owed.
    pub fn subscribed(&mut self, channels: &[Channel]) -> i64 {
        self.is_subscribed = true;
        if let Wish::Notifications { channels, .. } = &mut self.wish {
            // It may be long, and the wait too.
            *channels = String::new();
        }
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

    /// Takes notifications of one dispatch for the answer.
    pub fn found(&mut self, run: Run) {
        let Some((first, last)) = run.notifications.first().zip(run.notifications.last()) else { return };
        let text = run.entries(self.admission.authority.database_name());
        self.found.push(Found { first: first.id, last: last.id, count: run.notifications.len(), text });
    }

    /// Takes a page of a replay for the answer.
    pub fn found_page(&mut self, notifications: &[Notification]) {
        for range in protocol::runs(notifications, false) {
            let run = notifications.get(range).unwrap_or_default();
            let Some((first, last)) = run.first().zip(run.last()) else { continue };
            let text = entries(run, self.admission.authority.database_name());
            self.found.push(Found { first: first.id, last: last.id, count: run.len(), text });
        }
    }

    /// Whether there is something to answer with.
    pub fn has_found(&self) -> bool {
        !self.found.is_empty()
    }

    /// The answer with what was found. Of ids that do not ascend only those up to there: the last id of an answer is
    /// the client's position, the rest comes with its next request.
    pub fn answer_found(&self) -> Said {
        let Wish::Notifications { last, waits, .. } = &self.wish else { return self.fail(503) };
        let pairs = self.found.iter().zip(self.found.iter().skip(1));
        let ascending = pairs.take_while(|(one, next)| next.first > one.last).count();
        let found = self.found.get(..self.found.len().min(ascending + 1)).unwrap_or_default();
        let mut response = Response::json(200, String::new());
        if let Some(position) = found.last().map(|found| found.last).filter(|position| *waits && position < last) {
            let value = format!("{last}.{position}.{}", self.fingerprint());
            let cookie = format!("{COOKIE}={value}; Path=/longpolling; Max-Age={COOKIE_AGE}; HttpOnly; SameSite=Lax");
            response.headers.push(("Set-Cookie", cookie));
        }
        let (open, end) = if *waits {
            ("[".to_owned(), "]")
        } else {
            let database = self.admission.authority.database_name();
            let channels: Vec<String> = self.channels.iter().map(|channel| channel.stored(database)).collect();
            (format!("{{\"channels\": [{}], \"notifications\": [", channels.join(", ")), "]}")
        };
        let (before, after) = rpc::around(&self.id);
        let mut pieces: Vec<Frame> = vec![format!("{before}{open}").into_bytes().into()];
        for (at, found) in found.iter().enumerate() {
            if at > 0 {
                pieces.push(Frame::from(&b", "[..]));
            }
            pieces.push(found.text.clone());
        }
        pieces.push(format!("{end}{after}").into_bytes().into());
        let length = pieces.iter().map(|piece| piece.len()).sum();
        pieces.insert(0, self.reply.head(&response, length).into());
        let count = found.iter().map(|found| found.count).sum();
        Said { response, pieces, close: self.reply.close, count }
    }

    /// The answer to a request that has waited for as long as it may: a poll finds nothing, unless its proof has ended
    /// (`now` in milliseconds since 1970) or nobody knows it yet; anything else failed.
    pub fn answer_late(&self, now: i64) -> Said {
        match self.is_subscribed && self.polls() {
            _ if self.patience(now) == 0 => self.fail(401),
            true => self.answer_found(),
            false => self.fail(503),
        }
    }

    /// The answer of a database.
    pub fn answer(&self, answer: &Answer) -> Said {
        let result = match answer {
            Answer::Missed(missed) => missed.to_string(),
            Answer::Vacuum { last, next } => {
                let last = last.map_or("null".to_owned(), |at| json::string(&utc(at)));
                format!("{{\"id\": 0, \"lastcall\": {last}, \"nextcall\": {}}}", json::string(&utc(*next)))
            }
            Answer::Authenticated(_) | Answer::Jobs(_) | Answer::Failed => return self.fail(503),
        };
        self.put(Response::json(200, rpc::result(&self.id, &result)))
    }

    /// The text of `/metrics`.
    pub fn answer_text(&self, text: String) -> Said {
        let mut response = Response::text(200, "");
        response.kind = "text/plain; version=0.0.4; charset=utf-8";
        response.body = text;
        self.put(response)
    }

    /// The answer to a call that is wrong in itself, as Odoo gives it.
    pub fn refuse(&self, message: &str) -> Said {
        self.put(Response::json(200, rpc::error(&self.id, 200, message, "builtins.ValueError")))
    }

    /// No answer: 401, 403 or 503.
    pub fn fail(&self, status: u16) -> Said {
        self.put(failure(status))
    }

    fn put(&self, response: Response) -> Said {
        let pieces = vec![self.reply.bytes(&response).into()];
        Said { response, pieces, close: self.reply.close, count: 0 }
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
