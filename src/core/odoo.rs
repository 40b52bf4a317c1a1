//! What is said to Odoo's own endpoints and understood of their answers (ODOO_BUS §9). Knows no HTTP.

use super::channel::Channel;
use super::error::Error;
use super::granted::Granted;
use super::json;
use super::link::Called;
use serde::Deserialize;
use serde_json::value::RawValue;

/// The longest part of an answer that is shown to the administrator, in characters.
const SHOWN: usize = 200;

/// What Odoo said of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Its channels.
    Known(Known),
    /// It has ended.
    Expired,
    /// What was asked for is refused, and why: a message of the client's to ignore, as Odoo does.
    Refused(String),
}

/// A session that Odoo knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// The name of its database, as Odoo's channels carry it.
    pub database: String,
    /// Its channels; who it is: `res.partner(3)`, `mail.guest(4)`, None for the public.
    pub granted: Granted,
}

impl Known {
    /// Whether somebody has logged in.
    pub fn is_user(&self) -> bool {
        self.granted.subject.as_deref().is_some_and(|subject| subject.starts_with(PARTNER))
    }
}

const PARTNER: &str = "res.partner";
const GUEST: &str = "mail.guest";

/// The body of a call with these parameters, a JSON object.
pub fn call(params: &str) -> String {
    format!("{{\"jsonrpc\":\"2.0\",\"method\":\"call\",\"id\":1,\"params\":{params}}}")
}

/// What the status of the add-on's answer says of a job (`odoo/imbus`, controller `/imbus/async/run`). An Odoo without
/// the add-on, without that database, or on its way up or down has not begun it.
pub fn ran(status: u16) -> Called {
    match status {
        200 => Called::Settled,
        409 => Called::Lost,
        400 => Called::Alive,
        404 => Called::Refused("it has no add-on imbus for this database".to_owned()),
        300..500 | 502..=504 => Called::Refused(format!("it answers with status {status}")),
        _ => Called::Died(format!("it answers with status {status}")),
    }
}

/// The body of a call of `/websocket/peek_notifications`. `channels` is a JSON array of strings; `last` the greatest id
/// there is, so that the answer carries no notifications. `is_first` makes Odoo accept a session that it has not seen
/// on a websocket yet; without it Odoo says when one has ended (bus/controllers/websocket.py).
pub fn peek(channels: &str, last: i64, is_first: bool) -> String {
    call(&format!("{{\"channels\":{channels},\"last\":{last},\"is_first_poll\":{is_first}}}"))
}

/// Whether a client's channels are what Odoo takes: a JSON array of strings.
pub fn are_names(channels: &str) -> bool {
    json::elements(channels).ok().flatten().is_some_and(|elements| elements.iter().all(|text| text.starts_with('"')))
}

/// Whether this is a URL of an Odoo: `http://host:port`, with a path before its own where there is one.
pub fn is_url(text: &str) -> bool {
    let Some(rest) = text.strip_prefix("http://") else { return false };
    let host = rest.split('/').next().unwrap_or_default();
    let is_plain = |byte: u8| byte.is_ascii_graphic() && !b"?#@\"<>\\^`{|}".contains(&byte);
    !host.is_empty() && !host.starts_with(':') && rest.bytes().all(is_plain)
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow, default)]
    result: Option<&'a RawValue>,
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Failure {
    #[serde(default)]
    code: i64,
    #[serde(default)]
    data: Data,
}

#[derive(Default, Deserialize)]
struct Data {
    #[serde(default)]
    name: String,
    #[serde(default)]
    message: Option<String>,
}

#[derive(Deserialize)]
struct Peeked<'a> {
    #[serde(borrow)]
    channels: &'a RawValue,
}

/// Reads the answer of `/websocket/peek_notifications`.
///
/// # Errors
/// What is wrong with it, for the administrator: nothing that the client could help.
pub fn answer(body: &str) -> Result<Answer, String> {
    // serde takes an array for a struct too.
    if !body.trim_start().starts_with('{') {
        return Err(format!("it is no JSON object but {}", shown(body)));
    }
    let envelope: Envelope = serde_json::from_str(body).map_err(|error| format!("{error} in {}", shown(body)))?;
    match (envelope.result, envelope.error) {
        (_, Some(error)) => failure(error.get()),
        (Some(result), None) => known(result.get()).map(Answer::Known),
        (None, None) => Err(format!("it has neither result nor error: {}", shown(body))),
    }
}

/// An error of Odoo's: the end of the session (code 100), something wrong with the request, or a fault of Odoo's own.
fn failure(text: &str) -> Result<Answer, String> {
    let failure: Failure = serde_json::from_str(text).map_err(|error| format!("{error} in {}", shown(text)))?;
    let name = failure.data.name;
    if failure.code == 100 || name.ends_with("SessionExpiredException") {
        return Ok(Answer::Expired);
    }
    let message = failure.data.message.unwrap_or_default();
    let is_refusal =
        name.starts_with("odoo.exceptions.") || name.starts_with("builtins.") || name.contains("BadRequest");
    let said = shown(&format!("{name}: {message}"));
    if is_refusal { Ok(Answer::Refused(said)) } else { Err(said) }
}

fn known(text: &str) -> Result<Known, String> {
    let bad = |reason: &str| format!("{reason}: {}", shown(text));
    if !text.trim_start().starts_with('{') {
        return Err(bad("the result is no object"));
    }
    let peeked: Peeked = serde_json::from_str(text).map_err(|error| bad(&error.to_string()))?;
    let elements = json::elements(peeked.channels.get()).ok().flatten().ok_or_else(|| bad("no list of channels"))?;
    let database = elements.first().and_then(|first| database(first)).ok_or_else(|| bad("no database in it"))?;
    let mut granted = Granted { channels: Vec::with_capacity(elements.len()), subject: None };
    for element in elements {
        match Channel::from_row(element, &database) {
            Ok(channel) => {
                granted.subject = who(element).or(granted.subject);
                granted.channels.push(channel);
            }
            Err(Error::ForeignChannel { .. }) => return Err(bad("it names several databases")),
            // Some module's, that nothing can be published on.
            Err(_) => {}
        }
    }
    if granted.channels.is_empty() {
        return Err(bad("no channels"));
    }
    Ok(Known { database, granted })
}

/// The database that a channel names.
fn database(element: &str) -> Option<String> {
    let elements = json::elements(element).ok()??;
    let name: String = serde_json::from_str(elements.first()?).ok()?;
    Some(name).filter(|name| !name.is_empty())
}

/// Whose channel this is, if it is somebody's own: `["db","res.partner",3]`. Odoo adds it after all others
/// (bus/models/ir_websocket.py), a guest's before (mail/models/discuss/ir_websocket.py).
fn who(element: &str) -> Option<String> {
    let elements = json::elements(element).ok()??;
    let [_, model, id] = elements.as_slice() else { return None };
    let id: u64 = id.parse().ok()?;
    [PARTNER, GUEST].into_iter().find(|name| *model == json::string(name)).map(|name| format!("{name}({id})"))
}

fn shown(text: &str) -> String {
    let mut short: String = text.chars().take(SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests;
