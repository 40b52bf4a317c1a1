//! HTTP/1.1 as far as the gateway speaks it: one request at a time out of a connection's buffer, the table of
//! endpoints, and the texts of answers. Decides what a request gets; knows no sockets. Heads are hostile: bounded,
//! parsed by httparse, refused at the first doubt.

use super::Env;
use super::handshake::{self, Upgrade};
use httparse::Header;

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
    headers: &'a [Header<'a>],
}

/// An answer in words, before it is put into HTTP.
pub struct Response {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub kind: &'static str,
    pub body: String,
}

/// What an endpoint does with a request.
pub enum Answer {
    Response(Response),
    Upgrade(Box<Upgrade>),
}

/// What became of the bytes in a connection's buffer.
pub enum Served {
    /// No whole head yet.
    Partial,
    /// One request is answered: its head took `consumed` bytes, its body are the `body` bytes after that.
    Answered { consumed: usize, body: usize, response: Vec<u8>, close: bool },
    /// The connection becomes a websocket; the answer is in the upgrade.
    Upgraded { consumed: usize, upgrade: Box<Upgrade> },
}

/// An endpoint: its path, the methods it takes and what answers.
struct Route {
    path: &'static str,
    methods: &'static [&'static str],
    answer: fn(&Request, &Env) -> Answer,
}

/// All endpoints.
const ROUTES: &[Route] = &[
    Route { path: "/websocket", methods: &["GET"], answer: handshake::answer },
    Route { path: "/websocket/health", methods: &["GET", "HEAD"], answer: health },
];

impl<'a> Request<'a> {
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

    fn answer(&self, env: &Env) -> Answer {
        let Some(route) = ROUTES.iter().find(|route| route.path == self.path) else {
            return Answer::Response(Response::text(404, "no such endpoint"));
        };
        if !route.methods.contains(&self.method) {
            let mut response = Response::text(405, "method not allowed");
            response.headers.push(("Allow", route.methods.join(", ")));
            return Answer::Response(response);
        }
        (route.answer)(self, env)
    }
}

impl Response {
    /// A short text for people.
    pub fn text(status: u16, body: &str) -> Response {
        Response { status, headers: Vec::new(), kind: "text/plain; charset=utf-8", body: format!("{body}\n") }
    }

    /// The bytes to send: `minor` and `method` are the request's.
    fn bytes(&self, minor: u8, method: &str, close: bool) -> Vec<u8> {
        let mut head = format!("HTTP/1.1 {} {}\r\n", self.status, reason(self.status));
        let mut add = |name: &str, value: &str| {
            for part in [name, ": ", value, "\r\n"] {
                head.push_str(part);
            }
        };
        self.headers.iter().for_each(|(name, value)| add(name, value));
        add("Content-Type", self.kind);
        add("Content-Length", &self.body.len().to_string());
        match (close, minor) {
            (true, _) => add("Connection", "close"),
            (false, 0) => add("Connection", "keep-alive"),
            (false, _) => {}
        }
        head.push_str("\r\n");
        if method != "HEAD" {
            head.push_str(&self.body);
        }
        head.into_bytes()
    }
}

/// Looks at what a connection has sent. `refused` tells that there are too many connections already.
pub fn serve(buffer: &[u8], env: &Env, refused: bool) -> Served {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut headers);
    let consumed = match parsed.parse(buffer) {
        Ok(httparse::Status::Complete(consumed)) if consumed <= HEAD_MAX => consumed,
        Ok(httparse::Status::Partial) if buffer.len() < HEAD_MAX => return Served::Partial,
        Ok(_) | Err(httparse::Error::TooManyHeaders) => return refuse(431),
        Err(_) => return refuse(400),
    };
    let target = parsed.path.unwrap_or_default();
    let (path, query) = local(target).split_once('?').unwrap_or((local(target), ""));
    let minor = parsed.version.unwrap_or(1);
    let method = parsed.method.unwrap_or_default();
    let request = Request { method, path, query, minor, headers: parsed.headers };
    let last_word = |response: Response| Served::Answered {
        consumed,
        body: 0,
        response: response.bytes(minor, method, true),
        close: true,
    };
    let hosts = request.all("host").count();
    if hosts > 1 || hosts == 0 && minor > 0 {
        return last_word(Response::text(400, "one Host header is needed"));
    }
    if refused {
        let mut response = Response::text(503, "too many connections");
        response.headers.push(("Retry-After", "5".to_owned()));
        return last_word(response);
    }
    let body = match request.body() {
        Ok(body) => body,
        Err(response) => return last_word(response),
    };
    match request.answer(env) {
        Answer::Upgrade(_) if body > 0 => last_word(Response::text(400, "an upgrade has no body")),
        Answer::Upgrade(upgrade) => Served::Upgraded { consumed, upgrade },
        Answer::Response(response) => {
            let close = request.closes();
            Served::Answered { consumed, body, response: response.bytes(minor, method, close), close }
        }
    }
}

/// The answer to what is no request that could be answered.
fn refuse(status: u16) -> Served {
    Served::Answered { consumed: 0, body: 0, response: refusal(status), close: true }
}

/// The answer to a head that is bad (400), too long (431) or late (408); the connection ends with it.
pub fn refusal(status: u16) -> Vec<u8> {
    Response::text(status, reason(status)).bytes(1, "", true)
}

/// The path and query of a request target, also of one in absolute form (RFC 9112 section 3.2.2).
fn local(target: &str) -> &str {
    let Some((_, rest)) = target.split_once("://").filter(|_| !target.starts_with('/')) else { return target };
    rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/")
}

fn health(_: &Request, _: &Env) -> Answer {
    Answer::Response(Response {
        status: 200,
        headers: vec![("Cache-Control", "no-store".to_owned())],
        kind: "application/json",
        body: "{\"status\": \"pass\"}".to_owned(),
    })
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
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
