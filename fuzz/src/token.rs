//! Tokens: only what is signed with the secret and in its time is taken, and means the same when it is signed anew.
//! An input that starts with `{` is a set of claims that is signed here; any other is a token as a client sends it.

use super::{NOW, SECRET};
use imbus::core::token::{Claims, sign, verify};
use jsonwebtoken::{Algorithm, EncodingKey};

pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if !text.starts_with('{') {
        return taken(text, verify(text, SECRET, NOW).ok());
    }
    let message = format!("{}.{}", base64(br#"{"alg":"HS256"}"#), base64(data));
    let key = EncodingKey::from_secret(SECRET);
    let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::HS256).expect("a signature");
    let token = format!("{message}.{signature}");
    taken(&token, verify(&token, SECRET, NOW).ok());
    assert!(verify(&token, b"another secret", NOW).is_err());
    assert!(verify(&format!("{message}."), SECRET, NOW).is_err());
    assert!(verify(&format!("{message}A.{signature}"), SECRET, NOW).is_err());
}

fn taken(token: &str, claims: Option<Claims>) {
    let Some(claims) = claims else { return };
    assert!(claims.exp > NOW);
    assert!(verify(token, SECRET, claims.exp).is_err(), "its time ends");
    let again = sign(&claims, SECRET).expect("signed anew");
    assert_eq!(verify(&again, SECRET, NOW), Ok(claims));
}

/// base64url without padding (RFC 4648, 5).
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let triple = |chunk: &[u8]| {
        let bits = (0..3).fold(0, |bits, at| bits << 8 | u32::from(*chunk.get(at).unwrap_or(&0)));
        (0..=chunk.len()).map(move |at| ALPHABET[(bits >> (18 - 6 * at) & 63) as usize] as char)
    };
    bytes.chunks(3).flat_map(triple).collect()
}
