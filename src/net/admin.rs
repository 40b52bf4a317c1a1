//! What is for the administrator's eyes only: `/metrics`, the live page and its websocket (SPEC section 11, "Tenants").
//! A peer on this very machine may look, unless a proxy stands between; anybody else needs a token that says so.

use super::Env;
use super::asked::{Asked, Wish};
use super::auth::{self, Admission, Authority};
use super::handshake;
use super::http::{Answer, Request, Response};
use super::origin;

/// Headers that a proxy adds.
const FORWARDED: [&str; 4] = ["Forwarded", "Via", "X-Real-IP", "X-Forwarded-For"];

/// The live page; its script talks to `/imbus/live`.
const PAGE: &str = include_str!("page.html");

/// What the page may do: nothing but run itself and talk to where it came from.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Until when somebody may look, in Unix seconds.
///
/// # Errors
/// The answer to who may not.
fn leave(request: &Request, env: &Env) -> Result<i64, Response> {
    match auth::admin(request, env) {
        Some(Ok(until)) => Ok(until),
        Some(Err(reason)) => {
            let mut response = Response::text(401, &reason);
            response.headers.push(("WWW-Authenticate", "Bearer".to_owned()));
            Err(response)
        }
        None if is_local(request) => Ok(i64::MAX),
        None => {
            let hint = "only from this very machine, or with a token: SELECT bus_token('[]', admin => true)";
            Err(Response::text(403, hint))
        }
    }
}

/// Whether the request comes from this machine without a proxy between, and means it: a page of another site whose name
/// was made to point here says its own Host.
fn is_local(request: &Request) -> bool {
    let is_forwarded = |(name, _): (&str, &[u8])| {
        let name = name.to_ascii_lowercase();
        name.starts_with("x-forwarded-") || FORWARDED.iter().any(|header| header.eq_ignore_ascii_case(&name))
    };
    request.peer.is_loopback()
        && !request.headers().any(is_forwarded)
        && request.header("Host").is_some_and(origin::is_loopback)
}

/// Answers `GET /metrics`.
pub fn metrics(request: &Request, _: &[u8], env: &Env) -> Answer {
    match leave(request, env) {
        Err(response) => Answer::Response(response),
        Ok(until) => {
            let admission = Admission { authority: Authority::Watcher { until }, user_agent: "".into() };
            Answer::Ask(Box::new(Asked { admission, wish: Wish::Metrics, id: String::new(), position: None }))
        }
    }
}

/// Answers `GET /imbus`.
pub fn page(request: &Request, _: &[u8], env: &Env) -> Answer {
    if let Err(response) = leave(request, env) {
        return Answer::Response(response);
    }
    let headers = [
        ("Cache-Control", "no-store"),
        ("Content-Security-Policy", POLICY),
        ("Referrer-Policy", "no-referrer"),
        ("X-Content-Type-Options", "nosniff"),
    ];
    let mut response = Response::text(200, "");
    response.headers.extend(headers.map(|(name, value)| (name, value.to_owned())));
    response.kind = "text/html; charset=utf-8";
    response.body = PAGE.to_owned();
    Answer::Response(response)
}

/// Answers `GET /imbus/live`: the page's websocket.
pub fn live(request: &Request, _: &[u8], env: &Env) -> Answer {
    let until = match leave(request, env) {
        Ok(until) => until,
        Err(response) => return Answer::Response(response),
    };
    match handshake::accept(request, env) {
        Ok((response, deflate)) => {
            let agent = auth::user_agent(request);
            let admission = Ok(Admission { authority: Authority::Watcher { until }, user_agent: agent });
            Answer::Upgrade(Box::new(handshake::Upgrade { response, deflate, admission }))
        }
        Err(response) => Answer::Response(response),
    }
}
