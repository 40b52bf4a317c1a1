//! Who a client is (SPEC section 7, "who may subscribe"): the proof in the request, checked against the settings and
//! the databases that are served.

use super::Env;
use super::http::Request;
use crate::core::error::Error;
use crate::core::protocol::{Close, CloseCode};
use crate::core::settings::AuthMethod;
use crate::core::token::{self, Claims};

/// Characters of the User-Agent that are kept for the administrator's view.
const AGENT_MAX: usize = 200;

/// Somebody who may come in.
pub struct Admission {
    pub claims: Claims,
    pub user_agent: Box<str>,
}

/// Tries the methods of `imbus.auth` in order.
///
/// # Errors
/// The close frame that tells the client why not: 4401, or 1013 while no database is known yet.
pub fn admit(request: &Request, env: &Env) -> Result<Admission, Close> {
    let mut refusal = Close::new(CloseCode::Unauthorized, "no way to authenticate is set");
    for method in &env.settings.auth {
        match method {
            AuthMethod::Token => match by_token(request, env) {
                Ok(claims) => {
                    let agent = request.header("User-Agent").unwrap_or_default();
                    return Ok(Admission { claims, user_agent: agent.chars().take(AGENT_MAX).collect() });
                }
                Err(close) => refusal = close,
            },
        }
    }
    Err(refusal)
}

fn by_token(request: &Request, env: &Env) -> Result<Claims, Close> {
    let refuse = |reason: &str| Close::new(CloseCode::Unauthorized, reason);
    let token = find_token(request).ok_or_else(|| refuse("no token"))?;
    let claims =
        token::verify(&token, &env.settings.token_secret, env.unix_ms.div_euclid(1000)).map_err(
            |error| match error {
                Error::Token { reason } => refuse(&format!("invalid token: {reason}")),
                _ => refuse("invalid token"),
            },
        )?;
    let mut alike = env.databases.iter().filter(|served| served.oid == claims.oid || served.name == claims.db);
    match alike.next() {
        Some(served) if served.oid == claims.oid && served.name == claims.db => Ok(claims),
        // Renamed, or dropped and made again: the token is for what was there before.
        Some(_) => Err(refuse("the token is for another database")),
        // A token of this very server: its database has just got the extension, or its worker is on its way.
        None => Err(Close::new(CloseCode::TryLater, "the token's database is not served")),
    }
}

/// The token in `?token=`, in `Authorization: Bearer` or in cookie `imbus_token`: the first there is.
fn find_token(request: &Request) -> Option<String> {
    let bearer = || {
        let (scheme, token) = request.header("Authorization")?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim().to_owned())
    };
    let cookie = || {
        let mut pairs = request.all("Cookie").flatten().flat_map(|cookies| cookies.split(';'));
        pairs.find_map(|pair| pair.trim().strip_prefix("imbus_token=")).map(|token| token.trim_matches('"').to_owned())
    };
    request.parameter("token").or_else(bearer).or_else(cookie).filter(|token| !token.is_empty())
}
