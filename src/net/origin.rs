//! Whether a page of some origin may open a websocket here: only the host's own pages, and those the administrator
//! allows. Odoo only looks whether there is an Origin at all (ODOO_BUS §1), which lets any page use a visitor's
//! cookies.

/// Whether the header `Origin` is that of the request's own host, or one of `allowed` (origins, or `*` for any).
/// X-Forwarded-Host is not looked at: a client can send it.
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
    fn the_administrator_may_allow_others() {
        let allowed = ["https://shop.example.com".to_owned(), " http://dev.example.com:3000/ ".to_owned()];
        assert!(is_allowed("https://shop.example.com:443", "odoo.example.com", &allowed));
        assert!(is_allowed("http://dev.example.com:3000", "odoo.example.com", &allowed));
        assert!(!is_allowed("http://shop.example.com", "odoo.example.com", &allowed));
        assert!(is_allowed("null", "odoo.example.com", &["*".to_owned()]));
    }
}
