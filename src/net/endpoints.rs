//! The endpoints: their paths, methods and what answers. Decides what a request asks for; what that takes is the
//! reactor's.

use super::Env;
use super::admin;
use super::asked::{self, Asked, Wish};
use super::auth::{self, Admission};
use super::handshake;
use super::http::{Answer, Request, Response};
use super::odoo;
use super::origin;
use crate::core::protocol::{Close, CloseCode};
use crate::core::rpc::{self, Call};
use serde::Deserialize;
use serde_json::value::RawValue;

/// An endpoint.
pub struct Route {
    path: &'static str,
    methods: &'static [&'static str],
    /// Whether it reads the request's body.
    pub takes_body: bool,
    pub answer: fn(&Request, &[u8], &Env) -> Answer,
}

const fn get(path: &'static str, answer: fn(&Request, &[u8], &Env) -> Answer) -> Route {
    Route { path, methods: &["GET", "HEAD", "OPTIONS"], takes_body: false, answer }
}

const fn post(path: &'static str, answer: fn(&Request, &[u8], &Env) -> Answer) -> Route {
    Route { path, methods: &["POST", "OPTIONS"], takes_body: true, answer }
}

/// All endpoints.
const ROUTES: &[Route] = &[
    Route { path: "/websocket", methods: &["GET", "OPTIONS"], takes_body: false, answer: handshake::answer },
    get("/websocket/health", health),
    post("/longpolling/poll", poll),
    post("/websocket/peek_notifications", peek),
    post("/bus/has_missed_notifications", missed),
    post("/bus/get_autovacuum_info", vacuum),
    post(odoo::PRESENCE, presence),
    post(odoo::CLOSED, closed),
    get("/metrics", admin::metrics),
    get("/imbus", admin::page),
    Route { path: "/imbus/live", methods: &["GET", "OPTIONS"], takes_body: false, answer: admin::live },
];

/// The endpoint that answers a request.
///
/// # Errors
/// The answer where there is none: 404, 405, or what OPTIONS is told.
pub fn find(request: &Request, env: &Env) -> Result<&'static Route, Response> {
    let route = ROUTES.iter().find(|route| route.path == request.path);
    let route = route.ok_or_else(|| Response::text(404, "no such endpoint"))?;
    let allow = ("Allow", route.methods.join(", "));
    if request.method == "OPTIONS" {
        let mut response = Response::text(204, "");
        response.headers.push(allow);
        response.headers.extend(origin::preflight(request, env, route.methods));
        return Err(response);
    }
    if route.methods.contains(&request.method) {
        return Ok(route);
    }
    let mut response = Response::text(405, "method not allowed");
    response.headers.push(allow);
    Err(response)
}

fn health(_: &Request, _: &[u8], _: &Env) -> Answer {
    Answer::Response(Response::json(200, "{\"status\": \"pass\"}".to_owned()))
}

/// What Odoo's clients up to 15 ask for: `{channels, last, options}`.
fn poll(request: &Request, body: &[u8], env: &Env) -> Answer {
    call(request, body, env, |params| wanted(params, true))
}

/// `{channels, last, is_first_poll}`: what there is now.
fn peek(request: &Request, body: &[u8], env: &Env) -> Answer {
    call(request, body, env, |params| wanted(params, false))
}

/// `{last_notification_id}`.
fn missed(request: &Request, body: &[u8], env: &Env) -> Answer {
    #[derive(Deserialize)]
    struct Params {
        last_notification_id: i64,
    }
    call(request, body, env, |params| {
        let params: Params = serde_json::from_str(params).map_err(|error| error.to_string())?;
        Ok(Wish::Missed { last: params.last_notification_id })
    })
}

/// `{}`.
fn vacuum(request: &Request, body: &[u8], env: &Env) -> Answer {
    call(request, body, env, |_| Ok(Wish::Vacuum))
}

/// `{inactivity_period, …}`, for Odoo: what is proxied as `/websocket` comes here too.
fn presence(request: &Request, body: &[u8], env: &Env) -> Answer {
    forward(request, body, env, odoo::PRESENCE)
}

/// `{}`, for Odoo.
fn closed(request: &Request, body: &[u8], env: &Env) -> Answer {
    forward(request, body, env, odoo::CLOSED)
}

fn forward(request: &Request, body: &[u8], env: &Env, path: &'static str) -> Answer {
    let Some(admission) = auth::odoo_only(request, env) else {
        return Answer::Response(Response::text(404, "no such endpoint"));
    };
    let text = String::from_utf8_lossy(body).into_owned();
    admitted(request, body, env, |_| Ok(Wish::Forward { path, body: text }), || Ok(admission))
}

fn wanted(params: &str, waits: bool) -> Result<Wish, String> {
    #[derive(Deserialize)]
    struct Params<'a> {
        #[serde(borrow, default)]
        channels: Option<&'a RawValue>,
        #[serde(default)]
        last: Option<i64>,
        #[serde(default)]
        is_first_poll: Option<bool>,
    }
    let params: Params = serde_json::from_str(params).map_err(|error| error.to_string())?;
    let last = params.last.unwrap_or(0);
    if last < 0 {
        return Err("last must not be negative".to_owned());
    }
    let channels = params.channels.map_or("[]", RawValue::get).to_owned();
    // Who polls subscribes anew each time, and says nothing of it.
    let is_first = waits || params.is_first_poll.unwrap_or(false);
    Ok(Wish::Notifications { channels, last, waits, is_first })
}

/// A JSON-RPC call of somebody who has a proof of who it is.
fn call(request: &Request, body: &[u8], env: &Env, wish: impl FnOnce(&str) -> Result<Wish, String>) -> Answer {
    admitted(request, body, env, wish, || auth::admit(request, env))
}

fn admitted(
    request: &Request,
    body: &[u8],
    env: &Env,
    wish: impl FnOnce(&str) -> Result<Wish, String>,
    admit: impl FnOnce() -> Result<Admission, Close>,
) -> Answer {
    let refuse = |status: u16, text: &str| Answer::Response(Response::text(status, text));
    if !origin::may_ask(request, env) {
        return Answer::Response(origin::refused());
    }
    // A page of another site may send a form without asking, but not this.
    let kind = request.header("Content-Type").unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !["application/json", "application/json-rpc"].iter().any(|json| kind.eq_ignore_ascii_case(json)) {
        return refuse(415, "the body must be application/json");
    }
    let call = match Call::parse(body) {
        Ok(call) => call,
        Err(reason) => return refuse(400, &format!("not a JSON-RPC call: {reason}")),
    };
    let admission = match admit() {
        Ok(admission) => admission,
        Err(close) => {
            let status = if close.code == CloseCode::TryLater { 503 } else { 401 };
            return Answer::Response(asked::failure(status));
        }
    };
    match wish(call.params) {
        Ok(wish) => {
            let (id, position) = (call.id.to_owned(), asked::position(request));
            Answer::Ask(Box::new(Asked { admission, wish, id, position }))
        }
        Err(reason) => {
            let body = rpc::error(call.id, 200, &reason, "builtins.ValueError");
            Answer::Response(Response::json(200, body))
        }
    }
}
