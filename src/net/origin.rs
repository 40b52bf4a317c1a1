//! Whether a page of some origin may open a websocket here: only the host's own pages, and those the administrator
//! allows. Odoo only looks whether there is an Origin at all (ODOO_BUS §1), which lets any page use a visitor's
//! cookies. What the pages of others may read (CORS, the Fetch standard) follows the same rule.

use super::Env;
use super::counters::Rejection;
use super::http::{Request, Response};
use crate::core::settings::AuthMethod;

/// Whether a request may be answered: it says no origin, as no browser's does, or an allowed one.
pub fn may_ask(request: &Request, env: &Env) -> bool {
    request.all("Origin").next().is_none() || allowed(request, env).is_some()
}

/// The answer to a page of another site.
pub fn refused() -> Response {
    let text = "this origin is not allowed, see imbus.allowed_origins";
    Response { rejection: Some(Rejection::Origin), ..Response::text(403, text) }
}

/// Its origin, if that is allowed.
fn allowed<'a>(request: &Request<'a>, env: &Env) -> Option<&'a str> {
    let mut origins = request.all("Origin");
    let origin = origins.next()??;
    if origins.next().is_some() {
        return None;
    }
    // Odoo's manual has the proxy say in X-Forwarded-Host what it was asked for, and Odoo goes by it (proxy_mode). No page
    // can have its visitor's browser send that header here: it takes leave (CORS) that nobody gives.
    let by_proxy = env.settings.auth.contains(&AuthMethod::Odoo).then(|| request.header("X-Forwarded-Host")).flatten();
    let hosts = [request.header("Host"), by_proxy.and_then(|hosts| hosts.split(',').next()).map(str::trim)];
    let is_its = |host: &str| is_allowed(origin, host, &env.settings.allowed_origins);
    hosts.into_iter().flatten().any(is_its).then_some(origin)
}

/// The headers that let a page of an allowed origin read an answer, with cookies unless just any origin is allowed.
pub fn cors(request: &Request, env: &Env) -> Vec<(&'static str, String)> {
    let Some(origin) = allowed(request, env) else { return Vec::new() };
    let mut headers = vec![("Access-Control-Allow-Origin", origin.to_owned()), ("Vary", "Origin".to_owned())];
    if !env.settings.allowed_origins.iter().any(|entry| entry.trim() == "*") {
        headers.push(("Access-Control-Allow-Credentials", "true".to_owned()));
    }
    headers
}

/// What such a page is told before it sends a request that needs leave.
pub fn preflight(request: &Request, env: &Env, methods: &[&str]) -> Vec<(&'static str, String)> {
    if allowed(request, env).is_none() || request.header("Access-Control-Request-Method").is_none() {
        return Vec::new();
    }
    vec![
        ("Access-Control-Allow-Methods", methods.join(", ")),
        ("Access-Control-Allow-Headers", "Authorization, Content-Type".to_owned()),
        ("Access-Control-Max-Age", "600".to_owned()),
    ]
}

/// Whether the header `Origin` is that of the request's own host, or one of `allowed` (origins, or `*` for any).
pub fn is_allowed(origin: &str, host: &str, allowed: &[String]) -> bool {
    if allowed.iter().any(|entry| entry.trim() == "*") {
        return true;
    }
    let Some((scheme, authority)) = origin.split_once("://") else { return false };
    let Some(from) = endpoint(authority, scheme) else { return false };
    let is_same = |entry: &String| {
        let Some((other, authority)) = entry.trim().trim_end_matches('/').split_once("://") else { return false };
        other.eq_ignore_ascii_case(scheme) && endpoint(authority, other).as_ref() == Some(&from)
    };
    endpoint(host, scheme).as_ref() == Some(&from) || allowed.iter().any(is_same)
}

/// Whether a Host header names this very machine.
pub fn is_loopback(host: &str) -> bool {
    let Some((name, _)) = endpoint(host, "http") else { return false };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Host in lower case and port of `host[:port]`; without a port that of the scheme.
fn endpoint(authority: &str, scheme: &str) -> Option<(String, u16)> {
    let default = || match scheme.to_ascii_lowercase().as_str() {
        "http" | "ws" => Some(80),
        "https" | "wss" => Some(443),
        _ => None,
    };
    let is_port = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if is_port(port) => (host, port.parse().ok()?),
        _ => (authority, default()?),
    };
    let is_plain = |host: &str| !host.is_empty() && !host.contains([':', '/', '@', '[', ']', ' ']);
    let is_v6 = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).is_some_and(|host| !host.is_empty());
    (is_plain(host) || is_v6).then(|| (host.to_ascii_lowercase(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_host_is_allowed_with_default_ports_counted() {
        for (origin, host) in [
            ("http://localhost:8072", "localhost:8072"),
            ("https://Odoo.example.com", "odoo.example.com"),
            ("https://odoo.example.com", "odoo.example.com:443"),
            ("http://odoo.example.com:80", "odoo.example.com"),
            ("http://[::1]:8072", "[::1]:8072"),
            ("https://[::1]", "[::1]"),
        ] {
            assert!(is_allowed(origin, host, &[]), "{origin} at {host}");
        }
    }

    #[test]
    fn everybody_else_is_not() {
        for (origin, host) in [
            ("https://evil.example", "odoo.example.com"),
            ("https://odoo.example.com", "odoo.example.com:80"),
            ("http://localhost:8069", "localhost:8072"),
            ("https://odoo.example.com.evil.example", "odoo.example.com"),
            ("https://odoo.example.com@evil.example", "odoo.example.com"),
            ("null", "odoo.example.com"),
            ("", ""),
            ("https://", ""),
            ("file://", "odoo.example.com"),
            ("https://odoo.example.com:99999", "odoo.example.com:99999"),
        ] {
            assert!(!is_allowed(origin, host, &[]), "{origin} at {host}");
        }
    }

    #[test]
    fn this_machine_has_few_names() {
        for host in ["localhost", "LOCALHOST:8072", "127.0.0.1", "127.1.2.3:80", "[::1]", "[::1]:8072"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in
            ["", "example.com", "localhost.example.com", "10.0.0.1", "127.0.0.1.evil.example", "[::2]", "::1", "127.1"]
        {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn the_administrator_may_allow_others() {
        let allowed = ["https://shop.example.com".to_owned(), " http://dev.example.com:3000/ ".to_owned()];
        assert!(is_allowed("https://shop.example.com:443", "odoo.example.com", &allowed));
        assert!(is_allowed("http://dev.example.com:3000", "odoo.example.com", &allowed));
        assert!(!is_allowed("http://shop.example.com", "odoo.example.com", &allowed));
        assert!(is_allowed("null", "odoo.example.com", &["*".to_owned()]));
    }
}
