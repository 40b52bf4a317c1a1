//! HTTP/1.1 as far as the gateway speaks it: one request at a time out of a connection's buffer, and the texts of
//! answers. What a request gets is decided by `endpoints`; knows no sockets. Heads are hostile: bounded, parsed by
//! httparse, refused at the first doubt.

use super::Env;
use super::asked::Asked;
use super::counters::{Counters, Rejection};
use super::endpoints::{self, Route};
use super::handshake::Upgrade;
use super::origin;
use httparse::Header;
use std::net::IpAddr;

/// The longest request head, in bytes (SPEC section 7).
pub const HEAD_MAX: usize = 8 * 1024;

/// The longest request body, in bytes (ODOO_BUS §2 has the same limit for messages).
const BODY_MAX: usize = 1 << 20;

/// Header lines a request may have; browsers send about 20.
const HEADERS_MAX: usize = 64;

/// A request's head.
pub struct Request<'a> {
    pub method: &'a str,
    pub path: &'a str,
    /// What follows the `?`, undecoded.
    pub query: &'a str,
    /// Of HTTP/1.x.
    pub minor: u8,
    /// Who asks.
    pub peer: IpAddr,
    headers: &'a [Header<'a>],
}

/// An answer in words, before it is put into HTTP.
pub struct Response {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub kind: &'static str,
    pub body: String,
    /// What it counts as, where the status does not say it all.
    pub rejection: Option<Rejection>,
}

/// What an endpoint does with a request.
pub enum Answer {
    Response(Response),
    Upgrade(Box<Upgrade>),
    /// Somebody else has to be asked first.
    Ask(Box<Asked>),
}

/// How an answer is put.
#[derive(Clone, Debug)]
pub struct Reply {
    minor: u8,
    is_head: bool,
    /// Whether the connection ends with it.
    pub close: bool,
    pub headers: Vec<(&'static str, String)>,
}

/// What became of the bytes in a connection's buffer.
pub enum Served {
    /// No whole request yet. With `go_on` the client waits to be told to send the body.
    Partial { go_on: bool },
    /// One request is answered: its head and what was read of its body took `consumed` bytes, `skip` bytes of it after
    /// that are of no use.
    Answered { consumed: usize, skip: usize, response: Vec<u8>, close: bool },
    /// The answer waits for somebody else.
    Asked { consumed: usize, asked: Box<Asked>, reply: Reply },
    /// The connection becomes a websocket; the answer is in the upgrade.
    Upgraded { consumed: usize, upgrade: Box<Upgrade> },
}

impl<'a> Request<'a> {
    /// All headers, as they came.
    pub fn headers(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> {
        self.headers.iter().map(|header| (header.name, header.value))
    }

    /// The values of a header, in order (name in any case); None for one that is no visible ASCII or UTF-8.
    pub fn all(&self, name: &str) -> impl Iterator<Item = Option<&'a str>> {
        let found = self.headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name));
        found.map(|header| std::str::from_utf8(header.value).ok().map(str::trim))
    }

    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<&'a str> {
        self.all(name).next().flatten()
    }

    /// Whether a header that is a list of words (`Connection`) has this one.
    pub fn has_word(&self, name: &str, word: &str) -> bool {
        self.all(name).flatten().flat_map(|value| value.split(',')).any(|found| found.trim().eq_ignore_ascii_case(word))
    }

    /// The first value of a query parameter, percent-decoded.
    pub fn parameter(&self, name: &str) -> Option<String> {
        let pairs = self.query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        pairs.into_iter().find(|(key, _)| *key == name).map(|(_, value)| percent_decoded(value))
    }

    /// The first cookie of a name.
    pub fn cookie(&self, name: &str) -> Option<&'a str> {
        let pairs = self.all("Cookie").flatten().flat_map(|cookies| cookies.split(';'));
        pairs.filter_map(|pair| pair.trim().split_once('=')).find(|(key, _)| *key == name).map(|(_, value)| value)
    }

    fn closes(&self) -> bool {
        match self.minor {
            0 => !self.has_word("connection", "keep-alive"),
            _ => self.has_word("connection", "close"),
        }
    }

    /// The length of the body that follows.
    fn body(&self) -> Result<usize, Response> {
        if self.all("transfer-encoding").next().is_some() {
            return Err(Response::text(501, "Transfer-Encoding is not supported"));
        }
        let bad = || Response::text(400, "invalid Content-Length");
        let mut length = None;
        for value in self.all("content-length") {
            let value = value.filter(|value| !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()));
            let value = value.ok_or_else(bad)?.parse().unwrap_or(usize::MAX);
            if length.is_some_and(|length| length != value) {
                return Err(bad());
            }
            length = Some(value);
        }
        match length.unwrap_or(0) {
            length if length > BODY_MAX => Err(Response::text(413, "the request body is too long")),
            length => Ok(length),
        }
    }

    /// Whether the client waits for `100 Continue` (RFC 9110 section 10.1.1).
    fn expects(&self) -> Result<bool, Response> {
        match self.header("Expect") {
            None => Ok(false),
            Some(word) if word.eq_ignore_ascii_case("100-continue") => Ok(self.minor > 0),
            Some(_) => Err(Response::text(417, "this expectation is not met")),
        }
    }

    /// How the answer to this request is put.
    fn reply(&self, env: &Env) -> Reply {
        let headers = origin::cors(self, env);
        Reply { minor: self.minor, is_head: self.method == "HEAD", close: self.closes(), headers }
    }
}

impl Response {
    /// A short text for people.
    pub fn text(status: u16, body: &str) -> Response {
        let (kind, body) = ("text/plain; charset=utf-8", format!("{body}\n"));
        Response { status, headers: Vec::new(), kind, body, rejection: None }
    }

    /// JSON.
    pub fn json(status: u16, body: String) -> Response {
        let headers = vec![("Cache-Control", "no-store".to_owned())];
        Response { status, headers, kind: "application/json", body, rejection: None }
    }
}

impl Reply {
    /// An answer that ends the connection.
    fn last_word(self) -> Reply {
        Reply { close: true, ..self }
    }

    /// The bytes to send.
    pub fn bytes(&self, response: &Response) -> Vec<u8> {
        let mut bytes = self.head(response, response.body.len());
        if !self.is_head && response.status != 204 {
            bytes.extend_from_slice(response.body.as_bytes());
        }
        bytes
    }

    /// The bytes of the head; the body has so many.
    pub fn head(&self, response: &Response, length: usize) -> Vec<u8> {
        let mut head = format!("HTTP/1.1 {} {}\r\n", response.status, reason(response.status));
        let mut add = |name: &str, value: &str| {
            for part in [name, ": ", value, "\r\n"] {
                head.push_str(part);
            }
        };
        response.headers.iter().chain(&self.headers).for_each(|(name, value)| add(name, value));
        // Without content there is nothing to describe (RFC 9110 section 8.6).
        if response.status != 204 {
            add("Content-Type", response.kind);
            add("Content-Length", &length.to_string());
        }
        match (self.close, self.minor) {
            (true, _) => add("Connection", "close"),
            (false, 0) => add("Connection", "keep-alive"),
            (false, _) => {}
        }
        head.push_str("\r\n");
        head.into_bytes()
    }
}

/// Looks at what a connection has sent. `refused` tells that there are too many connections already.
pub fn serve(buffer: &[u8], peer: IpAddr, env: &Env, refused: bool) -> Served {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut headers);
    let consumed = match parsed.parse(buffer) {
        Ok(httparse::Status::Complete(consumed)) if consumed <= HEAD_MAX => consumed,
        Ok(httparse::Status::Partial) if buffer.len() < HEAD_MAX => return Served::Partial { go_on: false },
        Ok(_) | Err(httparse::Error::TooManyHeaders) => return refuse(431, env),
        Err(_) => return refuse(400, env),
    };
    let target = parsed.path.unwrap_or_default();
    let (path, query) = local(target).split_once('?').unwrap_or((local(target), ""));
    let minor = parsed.version.unwrap_or(1);
    let method = parsed.method.unwrap_or_default();
    let request = Request { method, path, query, minor, peer, headers: parsed.headers };
    match answer(&request, buffer.get(consumed..).unwrap_or_default(), env, refused) {
        Ok(Step::Wait { go_on }) => Served::Partial { go_on },
        Ok(Step::Answer { used, skip, answer, is_last }) => {
            let (consumed, reply) = (consumed + used, request.reply(env));
            let reply = if is_last { reply.last_word() } else { reply };
            match answer {
                Answer::Upgrade(upgrade) => {
                    Counters::add(&env.counters.requests, 1);
                    Served::Upgraded { consumed, upgrade }
                }
                Answer::Ask(asked) => Served::Asked { consumed, asked, reply },
                Answer::Response(response) => {
                    env.counters.answered(&response);
                    Served::Answered { consumed, skip, response: reply.bytes(&response), close: reply.close }
                }
            }
        }
        Err(response) => {
            env.counters.answered(&response);
            let response = request.reply(env).last_word().bytes(&response);
            Served::Answered { consumed, skip: 0, response, close: true }
        }
    }
}

/// What a request with its body comes to.
enum Step {
    /// More of the body is needed.
    Wait { go_on: bool },
    /// With how much of the body was used, how much of it is still to be skipped, and whether the connection ends with it.
    Answer { used: usize, skip: usize, answer: Answer, is_last: bool },
}

/// Answers a request of which `rest` follows the head.
///
/// # Errors
/// The last word on a connection on which nothing more can be understood.
fn answer(request: &Request, rest: &[u8], env: &Env, refused: bool) -> Result<Step, Response> {
    let hosts = request.all("host").count();
    if hosts > 1 || hosts == 0 && request.minor > 0 {
        return Err(Response::text(400, "one Host header is needed"));
    }
    if refused {
        let mut response = Response::text(503, "too many connections");
        response.rejection = Some(Rejection::TooManyConnections);
        response.headers.push(("Retry-After", "5".to_owned()));
        return Err(response);
    }
    let (length, expects) = (request.body()?, request.expects()?);
    let route = match endpoints::find(request, env) {
        Ok(route) => route,
        // A client that waits to be told to go on is told not to: its body never comes.
        Err(response) if expects => return Err(response),
        Err(response) => {
            let answer = Answer::Response(response);
            return Ok(Step::Answer { used: 0, skip: length, answer, is_last: false });
        }
    };
    let Route { takes_body, answer, .. } = route;
    if !*takes_body {
        return match answer(request, &[], env) {
            Answer::Upgrade(_) if length > 0 => Err(Response::text(400, "an upgrade has no body")),
            // Whether the body comes that nobody asked for, nobody can tell.
            answer => Ok(Step::Answer { used: 0, skip: length, answer, is_last: expects && length > 0 }),
        };
    }
    match rest.get(..length) {
        Some(body) => {
            let answer = answer(request, body, env);
            Ok(Step::Answer { used: length, skip: 0, answer, is_last: false })
        }
        None => Ok(Step::Wait { go_on: expects }),
    }
}

/// The answer to what is no request that could be answered.
fn refuse(status: u16, env: &Env) -> Served {
    Served::Answered { consumed: 0, skip: 0, response: refusal(status, env), close: true }
}

/// The answer to a head that is bad (400), too long (431) or late (408); the connection ends with it.
pub fn refusal(status: u16, env: &Env) -> Vec<u8> {
    let reply = Reply { minor: 1, is_head: false, close: true, headers: Vec::new() };
    let response = Response::text(status, reason(status));
    env.counters.answered(&response);
    reply.bytes(&response)
}

/// The path and query of a request target, also of one in absolute form (RFC 9112 section 3.2.2).
fn local(target: &str) -> &str {
    let is_http = |scheme: &str| scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https");
    let Some((_, rest)) = target.split_once("://").filter(|(scheme, _)| is_http(scheme)) else { return target };
    rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/")
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        417 => "Expectation Failed",
        426 => "Upgrade Required",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "Error",
    }
}

/// Decodes `%xx`; what is no escape stays, what is no UTF-8 becomes U+FFFD.
fn percent_decoded(text: &str) -> String {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        match (first, digit(tail.first()), digit(tail.get(1))) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((high * 16 + low) as u8);
                rest = tail.get(2..).unwrap_or_default();
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
