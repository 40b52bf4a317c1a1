//! Who a client is (SPEC section 7, "who may subscribe"): the proof in the request, checked against the settings and
//! the databases that are served; or who else is to be asked.

use super::Env;
use super::http::Request;
use super::visitor::Visitor;
use crate::core::error::Error;
use crate::core::protocol::{Close, CloseCode};
use crate::core::settings::{AuthMethod, Database};
use crate::core::token::{self, Claims};
use std::collections::BTreeMap;

/// Characters of the User-Agent that are kept for the administrator's view.
const AGENT_MAX: usize = 200;

/// Somebody who may come in.
pub struct Admission {
    pub authority: Authority,
    pub user_agent: Box<str>,
}

/// Who says what a client may subscribe to.
pub enum Authority {
    /// Its token, once and for all.
    Token(Claims),
    /// A function of its database, at each subscribe.
    Function(Box<Asking>),
    /// Odoo, at each subscribe.
    Odoo(Box<Vouched>),
    /// Nobody: it looks at the gateway itself, until then (Unix seconds), and subscribes to nothing.
    Watcher { until: i64 },
}

/// A client whose channels are asked for.
pub struct Asking {
    pub database: Database,
    /// The headers of its request, a JSON object.
    pub headers: Box<str>,
    /// Who it is, as far as was answered.
    pub subject: Option<String>,
}

/// A client that Odoo is asked about.
pub struct Vouched {
    pub visitor: Visitor,
    /// What Odoo has said.
    pub known: Option<Known>,
    /// What it said of its presence before Odoo knew it.
    pub presence: Option<String>,
    /// Cookies that its browser has to be given.
    pub set_cookies: Vec<String>,
}

/// Somebody Odoo knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub database: Database,
    /// Who it is; None is the public.
    pub subject: Option<String>,
}

impl Authority {
    /// The client's database; 0 while it is not known.
    pub fn database(&self) -> u32 {
        match self {
            Authority::Token(claims) => claims.oid,
            Authority::Function(asking) => asking.database.oid,
            Authority::Odoo(vouched) => vouched.known.as_ref().map_or(0, |known| known.database.oid),
            Authority::Watcher { .. } => 0,
        }
    }

    /// Whether it is a client of a database.
    pub fn is_client(&self) -> bool {
        !matches!(self, Authority::Watcher { .. })
    }

    /// The name of the client's database.
    pub fn database_name(&self) -> &str {
        match self {
            Authority::Token(claims) => &claims.db,
            Authority::Function(asking) => &asking.database.name,
            Authority::Odoo(vouched) => vouched.known.as_ref().map_or("", |known| known.database.name.as_str()),
            Authority::Watcher { .. } => "",
        }
    }

    /// Who the client is.
    pub fn subject(&self) -> Option<&str> {
        match self {
            Authority::Token(claims) => claims.sub.as_deref(),
            Authority::Function(asking) => asking.subject.as_deref(),
            Authority::Odoo(vouched) => vouched.known.as_ref()?.subject.as_deref(),
            Authority::Watcher { .. } => None,
        }
    }

    /// When it ends, in Unix seconds.
    pub fn expires(&self) -> i64 {
        match self {
            Authority::Token(claims) => claims.exp,
            Authority::Function(_) | Authority::Odoo(_) => i64::MAX,
            Authority::Watcher { until } => *until,
        }
    }
}

/// Tries the methods of `imbus.auth` in order.
///
/// # Errors
/// The close frame that tells the client why not: 4401, or 1013 while no database is known yet.
pub fn admit(request: &Request, env: &Env) -> Result<Admission, Close> {
    let mut refusal = Close::new(CloseCode::Unauthorized, "no way to authenticate is set");
    let mut told = false;
    for method in &env.settings.auth {
        let result = match method {
            AuthMethod::Token => by_token(request, env),
            AuthMethod::Function => by_function(request, env),
            AuthMethod::Odoo => Ok(by_odoo(request, env)),
        };
        match result {
            Ok(authority) => return Ok(Admission { authority, user_agent: user_agent(request) }),
            // What is wrong with the proof there is says more than that there is no other.
            Err((close, had_proof)) => {
                if had_proof || !told {
                    refusal = close;
                }
                told |= had_proof;
            }
        }
    }
    Err(refusal)
}

/// What the administrator sees of a client's program.
pub fn user_agent(request: &Request) -> Box<str> {
    request.header("User-Agent").unwrap_or_default().chars().take(AGENT_MAX).collect()
}

/// Until when the bearer of an administrator's token may look (Unix seconds), or what is wrong with the token; None
/// without one.
pub fn admin(request: &Request, env: &Env) -> Option<Result<i64, String>> {
    let token = find_token(request)?;
    Some(match verify(&token, env) {
        Ok(claims) if claims.admin => Ok(claims.exp),
        Ok(_) => Err("the token is no administrator's".to_owned()),
        Err((close, _)) => Err(close.reason().to_owned()),
    })
}

/// A refusal, and whether there was a proof at all.
type Refusal = (Close, bool);

fn refuse(reason: &str) -> Refusal {
    (Close::new(CloseCode::Unauthorized, reason), true)
}

fn by_token(request: &Request, env: &Env) -> Result<Authority, Refusal> {
    let token = find_token(request).ok_or_else(|| (Close::new(CloseCode::Unauthorized, "no token"), false))?;
    let claims = verify(&token, env)?;
    let mut alike = env.databases.iter().filter(|served| served.oid == claims.oid || served.name == claims.db);
    match alike.next() {
        Some(served) if served.oid == claims.oid && served.name == claims.db => Ok(Authority::Token(claims)),
        // Renamed, or dropped and made again: the token is for what was there before.
        Some(_) => Err(refuse("the token is for another database")),
        // A token of this very server: its database has just got the extension, or its worker is on its way.
        None => Err((Close::new(CloseCode::TryLater, "the token's database is not served"), true)),
    }
}

fn verify(token: &str, env: &Env) -> Result<Claims, Refusal> {
    let now = env.unix_ms.div_euclid(1000);
    token::verify(token, &env.settings.token_secret, now).map_err(|error| match error {
        Error::Token { reason } => refuse(&format!("invalid token: {reason}")),
        _ => refuse("invalid token"),
    })
}

/// The database named in `?db=` is asked; whether it has a function to ask is its own business.
fn by_function(request: &Request, env: &Env) -> Result<Authority, Refusal> {
    let none = || (Close::new(CloseCode::Unauthorized, "no database is named"), false);
    let name = request.parameter("db").filter(|name| !name.is_empty()).ok_or_else(none)?;
    match env.databases.iter().find(|served| served.name == name) {
        Some(database) => {
            let headers = headers(request).into_boxed_str();
            Ok(Authority::Function(Box::new(Asking { database: database.clone(), headers, subject: None })))
        }
        // Nothing that tells whether there is such a database.
        None => Err(refuse("refused")),
    }
}

/// Whoever it is, Odoo is asked: it knows the public too.
fn by_odoo(request: &Request, env: &Env) -> Authority {
    let visitor = Visitor::new(request);
    let set_cookies = env.handovers.of(&visitor, env);
    let visitor = if set_cookies.is_empty() { visitor } else { visitor.with(&set_cookies) };
    Authority::Odoo(Box::new(Vouched { visitor, known: None, presence: None, set_cookies }))
}

/// Who asks for what only Odoo has an answer to; None where Odoo is not asked at all.
pub fn odoo_only(request: &Request, env: &Env) -> Option<Admission> {
    let is_asked = env.settings.auth.contains(&AuthMethod::Odoo);
    is_asked.then(|| Admission { authority: by_odoo(request, env), user_agent: user_agent(request) })
}

/// The headers of a request as a JSON object: names in lower case, several of one name joined as RFC 9110 says.
fn headers(request: &Request) -> String {
    let mut joined: BTreeMap<String, String> = BTreeMap::new();
    for (name, value) in request.headers() {
        let name = name.to_ascii_lowercase();
        let between = if name == "cookie" { "; " } else { ", " };
        let entry = joined.entry(name).or_default();
        if !entry.is_empty() {
            entry.push_str(between);
        }
        entry.push_str(&String::from_utf8_lossy(value));
    }
    serde_json::to_string(&joined).unwrap_or_default()
}

/// The token in `?token=`, in `Authorization: Bearer` or in cookie `imbus_token`: the first there is.
fn find_token(request: &Request) -> Option<String> {
    let bearer = || {
        let (scheme, token) = request.header("Authorization")?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim().to_owned())
    };
    let cookie = || request.cookie("imbus_token").map(|token| token.trim_matches('"').to_owned());
    request.parameter("token").or_else(bearer).or_else(cookie).filter(|token| !token.is_empty())
}
