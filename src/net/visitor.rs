//! A client that Odoo itself is asked about: what is handed on of its request, and how Odoo's new cookies find their way
//! to its browser. Knows no sockets.

use super::Env;
use super::http::Request;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Headers of a request that are handed on: for the session's list of devices, the language of a new session, and the
/// host behind proxies (Odoo's proxy_mode).
const HANDED_ON: [&str; 8] = [
    "User-Agent",
    "Accept-Language",
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Proto",
    "X-Forwarded-Port",
    "X-Real-IP",
    "Forwarded",
];

/// Odoo's cookie.
const SESSION: &str = "session_id";

/// How long Odoo knows a session by its former id too, in milliseconds: less than its SESSION_DELETION_TIMER of 120 s
/// (odoo/http.py).
const HANDOVER: u64 = 110_000;

/// Sessions with a new id that are remembered at most.
const HANDOVERS_MAX: usize = 10_000;

/// Who a client is to Odoo.
#[derive(Clone, Debug)]
pub struct Visitor {
    /// Equal for those that Odoo cannot tell apart: host and cookies.
    pub key: Arc<str>,
    /// Header lines for Odoo.
    pub headers: Arc<[(&'static str, String)]>,
    pub host: Box<str>,
    cookies: Box<str>,
}

impl Visitor {
    /// The visitor behind a request.
    pub fn new(request: &Request) -> Visitor {
        let cookies: Vec<&str> = request.all("Cookie").flatten().collect();
        let handed_on = HANDED_ON.into_iter().filter_map(|name| Some((name, request.header(name)?.to_owned())));
        let host = request.header("Host").unwrap_or_default();
        Visitor::of(handed_on.collect(), host.into(), cookies.join("; "))
    }

    fn of(headers: Arc<[(&'static str, String)]>, host: Box<str>, cookies: String) -> Visitor {
        let forwarded = headers.iter().find(|(name, _)| *name == "X-Forwarded-Host");
        let forwarded = forwarded.map_or("", |(_, value)| value.as_str());
        let key = format!("{host}\n{forwarded}\n{cookies}").into();
        Visitor { key, headers, host, cookies: cookies.into() }
    }

    /// The value of its `Cookie` header.
    pub fn cookies(&self) -> &str {
        &self.cookies
    }

    /// Its session, if it brings one.
    pub fn session(&self) -> Option<&str> {
        pairs(&self.cookies)
            .find(|(name, _)| *name == SESSION)
            .map(|(_, value)| value)
            .filter(|value| !value.is_empty())
    }

    /// The same visitor with the cookies that these values of `Set-Cookie` give it.
    pub fn with(&self, set: &[String]) -> Visitor {
        let given: Vec<(&str, &str)> = set.iter().filter_map(|line| given(line)).collect();
        let kept = pairs(&self.cookies).filter(|(name, _)| !given.iter().any(|(new, _)| new == name));
        // A cookie with an empty value is one that is taken away.
        let new = given.iter().copied().filter(|(_, value)| !value.is_empty());
        let cookies: Vec<String> = kept.chain(new).map(|(name, value)| format!("{name}={value}")).collect();
        Visitor::of(self.headers.clone(), self.host.clone(), cookies.join("; "))
    }

    /// Whether these values of `Set-Cookie` give it another session than it brought.
    pub fn is_renewed_by(&self, set: &[String]) -> bool {
        set.iter().filter_map(|line| given(line)).any(|(name, value)| name == SESSION && Some(value) != self.session())
    }
}

fn pairs(cookies: &str) -> impl Iterator<Item = (&str, &str)> {
    cookies.split(';').filter_map(|pair| pair.trim().split_once('='))
}

/// The cookie that a value of `Set-Cookie` gives.
fn given(line: &str) -> Option<(&str, &str)> {
    let (name, value) = line.split(';').next()?.split_once('=')?;
    Some((name.trim(), value.trim()))
}

/// Sessions whose id Odoo has changed while it was asked about them, which their browsers do not know yet: the 101 of
/// their next websocket tells them.
#[derive(Debug, Default)]
pub struct Handovers {
    /// By the former key.
    sessions: Mutex<HashMap<Arc<str>, Handover>>,
    /// How many there are: nearly always none.
    count: AtomicUsize,
}

/// What to set (values of `Set-Cookie`), until when.
type Handover = (Vec<String>, u64);

impl Handovers {
    /// A visitor's session has a new id.
    pub fn add(&self, visitor: &Visitor, set: &[String], now: u64) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|_, (_, until)| *until > now);
        if sessions.len() < HANDOVERS_MAX {
            let only: Vec<String> =
                set.iter().filter(|line| given(line).is_some_and(|(name, _)| name == SESSION)).cloned().collect();
            sessions.insert(visitor.key.clone(), (only, now.saturating_add(HANDOVER)));
        }
        self.count.store(sessions.len(), Ordering::Relaxed);
    }

    /// What a visitor's browser is to be told.
    pub fn of(&self, visitor: &Visitor, env: &Env) -> Vec<String> {
        if self.count.load(Ordering::Relaxed) == 0 {
            return Vec::new();
        }
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        let found = sessions.get(&visitor.key).filter(|(_, until)| *until > env.now);
        found.map(|(set, _)| set.clone()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visitor(cookies: &str) -> Visitor {
        Visitor::of(Arc::new([]), "odoo.example".into(), cookies.to_owned())
    }

    #[test]
    fn the_session_is_found_and_replaced() {
        let one = visitor("frontend_lang=en; session_id=abc; cids=1");
        assert_eq!(one.session(), Some("abc"));
        let set = ["session_id=new; Max-Age=604800; HttpOnly; Path=/".to_owned(), "cids=; Path=/".to_owned()];
        assert!(one.is_renewed_by(&set));
        let two = one.with(&set);
        assert_eq!(two.cookies(), "frontend_lang=en; session_id=new");
        assert!(!two.is_renewed_by(&set));
        assert_ne!(one.key, two.key);
        assert_eq!(visitor("").session(), None);
        assert_eq!(visitor("").with(&set).cookies(), "session_id=new");
        assert_eq!(visitor("session_id=").session(), None);
        assert!(!one.is_renewed_by(&["tz=UTC; Path=/".to_owned()]));
    }
}
