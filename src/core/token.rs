//! Tokens that let their bearer subscribe: what they claim, how they are signed and checked (JWT, RFC 7519, HS256
//! only). Knows no clock and no secret of its own; whether the database is the right one is the caller's to compare.

use super::channel::Channel;
use super::error::{Error, Result};
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// The channels a token allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grant {
    /// All of the database, `["*"]` in the token.
    All,
    Channels(Vec<Channel>),
}

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// Name of the database, to be compared with the one asked for.
    pub db: String,
    /// Its OID, to be compared likewise: a database of the same name may be another one later.
    pub oid: u32,
    pub channels: Grant,
    /// When it was made, in Unix seconds.
    pub iat: i64,
    /// From when on it is not accepted, in Unix seconds.
    pub exp: i64,
    /// Whom it was made for.
    pub sub: Option<String>,
    /// Whether it opens the administrator's pages.
    pub admin: bool,
}

impl Claims {
    /// Whether its bearer may subscribe to the channel.
    pub fn allows(&self, channel: &Channel) -> bool {
        match &self.channels {
            Grant::All => true,
            Grant::Channels(channels) => channels.contains(channel),
        }
    }
}

/// The claims as they stand in the token.
#[derive(Serialize, Deserialize)]
struct Wire {
    db: String,
    oid: u32,
    channels: Vec<Box<RawValue>>,
    iat: i64,
    exp: i64,
    /// From when on it is accepted; others that know the secret may set it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nbf: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sub: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    admin: bool,
}

/// The claims as a signed token. Errors: [`Error::Token`] when the secret is empty.
pub fn sign(claims: &Claims, secret: &[u8]) -> Result<String> {
    check_secret(secret)?;
    let texts = match &claims.channels {
        Grant::All => vec![ALL.to_owned()],
        Grant::Channels(channels) => channels.iter().map(|channel| written(channel, &claims.db)).collect(),
    };
    let channels = texts.into_iter().map(RawValue::from_string).collect::<std::result::Result<_, _>>();
    let wire = Wire {
        db: claims.db.clone(),
        oid: claims.oid,
        channels: channels.map_err(|_| refused("a channel cannot be written"))?,
        iat: claims.iat,
        exp: claims.exp,
        nbf: None,
        sub: claims.sub.clone(),
        admin: claims.admin,
    };
    jsonwebtoken::encode(&Header::new(Algorithm::HS256), &wire, &EncodingKey::from_secret(secret))
        .map_err(|_| refused("it cannot be signed"))
}

/// The claims of a token that is signed with the secret and valid at `now` (Unix seconds, no leeway). The caller
/// compares `db` and `oid`. Errors: [`Error::Token`] for all that is malformed, forged, signed with anything but HS256,
/// expired or not yet valid, and for an empty secret.
pub fn verify(token: &str, secret: &[u8], now: i64) -> Result<Claims> {
    check_secret(secret)?;
    let mut validation = Validation::new(Algorithm::HS256);
    // The library would ask the clock, and grant a minute's leeway; that `exp` is there follows from its type below.
    validation.validate_exp = false;
    validation.required_spec_claims.clear();
    let data = jsonwebtoken::decode::<Wire>(token, &DecodingKey::from_secret(secret), &validation)
        .map_err(|error| refused(reason(error.kind())))?;
    if data.header.crit.is_some() {
        // RFC 7515, 4.1.11: who does not understand an extension marked critical must refuse.
        return Err(refused("it has a critical extension"));
    }
    let wire = data.claims;
    if wire.exp <= now {
        return Err(refused(&format!("expired {} s ago", now.saturating_sub(wire.exp))));
    }
    if wire.nbf.is_some_and(|start| start > now) {
        return Err(refused("not valid yet"));
    }
    let channels = grant(&wire.channels, &wire.db)?;
    let Wire { db, oid, iat, exp, sub, admin, .. } = wire;
    Ok(Claims { db, oid, channels, iat, exp, sub, admin })
}

/// The element of claim `channels` that stands for all of them.
const ALL: &str = r#""*""#;

/// A channel as an array without the database; with it where the reader would take its first element for the database.
fn written(channel: &Channel, database: &str) -> String {
    match Channel::from_json(channel.as_str(), database) {
        Ok(same) if same == *channel => channel.as_str().to_owned(),
        _ => channel.stored(database),
    }
}

fn grant(channels: &[Box<RawValue>], database: &str) -> Result<Grant> {
    if channels.iter().any(|channel| channel.get() == ALL) {
        return Ok(Grant::All);
    }
    let channels = channels.iter().map(|channel| Channel::from_json(channel.get(), database));
    let channels = channels.collect::<Result<_>>().map_err(|_| refused("a channel in it is malformed"))?;
    Ok(Grant::Channels(channels))
}

/// An empty secret would make every forger a signer.
fn check_secret(secret: &[u8]) -> Result<()> {
    if secret.is_empty() { Err(refused("the secret is empty")) } else { Ok(()) }
}

fn refused(reason: &str) -> Error {
    Error::Token { reason: reason.to_owned() }
}

/// Why the library refused. Nothing of the token itself: reasons go to logs and close frames.
fn reason(kind: &ErrorKind) -> &'static str {
    match kind {
        ErrorKind::InvalidSignature => "the signature does not match",
        ErrorKind::InvalidAlgorithm => "only HS256 is accepted",
        ErrorKind::InvalidAudience => "it is meant for another audience",
        _ => "it is malformed",
    }
}

#[cfg(test)]
mod tests;
