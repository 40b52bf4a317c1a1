//! The opening of a websocket (ODOO_BUS §1): which requests become one, and who may come in. An unfit request gets an
//! HTTP error; an unknown or outdated client gets its websocket and a close frame, because browsers hide HTTP errors
//! from the page.

use super::Env;
use super::asked::{Asked, Wish};
use super::auth::{self, Admission, Authority};
use super::counters::{Counters, Rejection};
use super::deflate::Agreement;
use super::http::{Answer, Request, Response};
use super::origin;
use crate::core::protocol::{self, Close, CloseCode};
use std::sync::atomic::AtomicU64;

/// A request that becomes a websocket.
pub struct Upgrade {
    /// The 101.
    pub response: Vec<u8>,
    /// What was agreed on compressed messages.
    pub deflate: Option<Agreement>,
    /// Who comes in, or why not.
    pub admission: Result<Admission, Close>,
}

/// Headers without which no websocket opens, as Odoo has them (websocket.py:885).
const REQUIRED: [&str; 6] = ["Connection", "Host", "Sec-WebSocket-Key", "Sec-WebSocket-Version", "Upgrade", "Origin"];

/// Answers `GET /websocket`.
pub fn answer(request: &Request, _: &[u8], env: &Env) -> Answer {
    let rejected: &AtomicU64 = &env.counters.handshakes_rejected;
    let (response, deflate) = match accept(request, env) {
        Ok(accepted) => accepted,
        Err(response) => {
            Counters::add(rejected, 1);
            return Answer::Response(response);
        }
    };
    let admission = match check_version(request).and_then(|()| auth::admit(request, env)) {
        Ok(admission) => admission,
        Err(close) => {
            Counters::add(rejected, 1);
            Rejection::of_close(close.code).into_iter().for_each(|why| env.counters.reject(why));
            return Answer::Upgrade(Box::new(Upgrade { response, deflate, admission: Err(close) }));
        }
    };
    let response = match &admission.authority {
        // The session that Odoo gives it goes into the 101 (SPEC section 11).
        Authority::Odoo(vouched) if vouched.visitor.session().is_none() => {
            let wish = Wish::Open(Box::new(Opening { response, deflate }));
            return Answer::Ask(Box::new(Asked { admission, wish, id: "null".to_owned(), position: None }));
        }
        Authority::Odoo(vouched) => with_cookies(response, &vouched.set_cookies),
        _ => response,
    };
    Answer::Upgrade(Box::new(Upgrade { response, deflate, admission: Ok(admission) }))
}

/// A websocket that opens when it is known who comes in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opening {
    response: Vec<u8>,
    deflate: Option<Agreement>,
}

impl Opening {
    /// Opens it, with these values of `Set-Cookie`, or closes it at once.
    pub fn open(self, admission: Result<Admission, Close>, set_cookies: &[String]) -> Upgrade {
        Upgrade { response: with_cookies(self.response, set_cookies), deflate: self.deflate, admission }
    }
}

/// A 101 that sets cookies too.
fn with_cookies(mut response: Vec<u8>, set_cookies: &[String]) -> Vec<u8> {
    response.truncate(response.len().saturating_sub(2));
    for value in set_cookies {
        response.extend_from_slice(format!("Set-Cookie: {value}\r\n").as_bytes());
    }
    response.extend_from_slice(b"\r\n");
    response
}

/// The 101 to a request for a websocket, and what is agreed on compressed messages.
///
/// # Errors
/// The answer to one that cannot become a websocket.
pub fn accept(request: &Request, env: &Env) -> Result<(Vec<u8>, Option<Agreement>), Response> {
    let accept = tungstenite::handshake::derive_accept_key(check(request, env)?.as_bytes());
    let deflate = agree(request, env);
    let extensions = deflate.map(|agreement| format!("Sec-WebSocket-Extensions: {}\r\n", agreement.answer()));
    let extensions = extensions.unwrap_or_default();
    let response = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {accept}\r\n{extensions}\r\n"
    );
    Ok((response.into_bytes(), deflate))
}

/// What is agreed on compressed messages, if anything.
fn agree(request: &Request, env: &Env) -> Option<Agreement> {
    env.settings.compression.then(|| Agreement::accept(request.all("Sec-WebSocket-Extensions").flatten()))?
}

/// Checks the headers and returns the key.
fn check<'a>(request: &Request<'a>, env: &Env) -> Result<&'a str, Response> {
    if request.minor == 0 {
        return Err(Response::text(400, "a websocket needs HTTP/1.1"));
    }
    let missing: Vec<_> = REQUIRED.into_iter().filter(|name| request.header(name).is_none()).collect();
    #[cfg(feature = "testing")]
    let missing = super::testing::forgiven(missing);
    if !missing.is_empty() {
        return Err(Response::text(400, &format!("missing header: {}", missing.join(", "))));
    }
    if !request.header("Upgrade").is_some_and(|value| value.eq_ignore_ascii_case("websocket")) {
        return Err(Response::text(400, "header Upgrade must be websocket"));
    }
    if !request.has_word("Connection", "upgrade") {
        return Err(Response::text(400, "header Connection must contain upgrade"));
    }
    if request.header("Sec-WebSocket-Version") != Some("13") {
        let mut response = Response::text(426, "header Sec-WebSocket-Version must be 13");
        response.headers.push(("Sec-WebSocket-Version", "13".to_owned()));
        return Err(response);
    }
    let key = request.header("Sec-WebSocket-Key").filter(|key| is_key(key));
    let key = key.ok_or_else(|| Response::text(400, "header Sec-WebSocket-Key must be 16 bytes in base64"))?;
    if !origin::may_ask(request, env) {
        return Err(origin::refused());
    }
    Ok(key)
}

/// Whether this is 16 bytes in base64.
fn is_key(key: &str) -> bool {
    let is_digit = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'+' || byte == b'/';
    key.len() == 24 && key.strip_suffix("==").is_some_and(|digits| digits.bytes().all(is_digit))
}

/// Odoo's check of the websocket worker's version: only a client with a User-Agent has to have one (websocket.py:1012).
fn check_version(request: &Request) -> Result<(), Close> {
    let version = request.parameter("version").unwrap_or_default();
    if request.all("User-Agent").next().is_none() || protocol::is_supported(&version) {
        return Ok(());
    }
    Err(Close::new(CloseCode::Normal, protocol::OUTDATED))
}
