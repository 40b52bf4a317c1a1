use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

const SECRET: &[u8] = b"a secret of the test";
const NOW: i64 = 1_700_000_000;

fn claims(channels: Grant) -> Claims {
    Claims { db: "db".into(), oid: 16_384, channels, iat: NOW, exp: NOW + 60, sub: None, admin: false }
}

fn channel(text: &str) -> Channel {
    Channel::from_json(text, "db").unwrap()
}

fn refusal(token: &str) -> String {
    match verify(token, SECRET, NOW) {
        Err(Error::Token { reason }) => reason,
        other => panic!("{other:?}"),
    }
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

/// A token with any header and claims, signed with HMAC and the secret whatever its header says.
fn forged(header: &str, claims: &str, secret: &[u8], algorithm: Algorithm) -> String {
    let message = format!("{}.{}", base64(header.as_bytes()), base64(claims.as_bytes()));
    let signature =
        jsonwebtoken::crypto::sign(message.as_bytes(), &EncodingKey::from_secret(secret), algorithm).unwrap();
    format!("{message}.{signature}")
}

/// A well-signed token with these claims.
fn signed(claims: &Value) -> String {
    forged(r#"{"typ":"JWT","alg":"HS256"}"#, &claims.to_string(), SECRET, Algorithm::HS256)
}

fn full() -> Value {
    json!({"db": "db", "oid": 16384, "channels": ["*"], "iat": NOW, "exp": NOW + 60})
}

#[test]
fn what_is_signed_comes_back() {
    let all = Claims { sub: Some("é".into()), admin: true, ..claims(Grant::All) };
    assert_eq!(verify(&sign(&all, SECRET).unwrap(), SECRET, NOW), Ok(all));
    let some = claims(Grant::Channels(vec![channel(r#""broadcast""#), channel(r#"["res.partner",42]"#)]));
    assert_eq!(verify(&sign(&some, SECRET).unwrap(), SECRET, NOW), Ok(some));
    let none = claims(Grant::Channels(vec![]));
    assert_eq!(verify(&sign(&none, SECRET).unwrap(), SECRET, NOW), Ok(none));
}

#[test]
fn the_token_is_a_plain_jwt() {
    let token = sign(&claims(Grant::Channels(vec![channel(r#"["é",1]"#)])), SECRET).unwrap();
    let payload = r#"{"db":"db","oid":16384,"channels":[["\u00e9",1]],"iat":1700000000,"exp":1700000060}"#;
    assert_eq!(token, forged(r#"{"typ":"JWT","alg":"HS256"}"#, payload, SECRET, Algorithm::HS256));
    let token = sign(&claims(Grant::All), SECRET).unwrap();
    assert!(
        token.contains(&base64(
            r#"{"db":"db","oid":16384,"channels":["*"],"iat":1700000000,"exp":1700000060}"#.as_bytes()
        ))
    );
}

#[test]
fn a_grant_allows_its_channels_only() {
    let some = claims(Grant::Channels(vec![channel(r#"["res.partner",42]"#)]));
    assert!(some.allows(&channel(r#"["db","res.partner",42.0]"#)));
    assert!(!some.allows(&channel(r#"["res.partner",43]"#)));
    assert!(!some.allows(&channel(r#""res.partner""#)));
    assert!(claims(Grant::All).allows(&channel(r#""anything""#)));
    assert!(!claims(Grant::Channels(vec![])).allows(&channel(r#""broadcast""#)));
}

#[test]
fn a_channel_called_star_is_not_all_channels() {
    let star = claims(Grant::Channels(vec![channel(r#""*""#)]));
    let back = verify(&sign(&star, SECRET).unwrap(), SECRET, NOW).unwrap();
    assert!(back.allows(&channel(r#""*""#)));
    assert!(!back.allows(&channel(r#""broadcast""#)));
}

#[test]
fn channels_may_be_names_full_arrays_or_all() {
    let with = |channels: Value| {
        let mut claims = full();
        claims["channels"] = channels;
        verify(&signed(&claims), SECRET, NOW).map(|claims| claims.channels)
    };
    let two = Grant::Channels(vec![channel(r#""broadcast""#), channel(r#"["res.partner",42]"#)]);
    assert_eq!(with(json!([["db", "broadcast"], ["db", "res.partner", 42]])), Ok(two.clone()));
    assert_eq!(with(json!(["broadcast", ["res.partner", 42]])), Ok(two));
    assert_eq!(with(json!(["broadcast", "*"])), Ok(Grant::All));
    for wrong in [json!([[]]), json!([["db"]]), json!([42]), json!([null]), json!([["a", {}]])] {
        assert_eq!(with(wrong), Err(Error::Token { reason: "a channel in it is malformed".into() }));
    }
    assert!(with(json!("*")).is_err());
    assert!(with(json!({"*": 1})).is_err());
}

#[test]
fn a_token_ends_at_its_second_without_leeway() {
    let token = sign(&claims(Grant::All), SECRET).unwrap();
    let at = |now| verify(&token, SECRET, now);
    assert!(at(NOW + 59).is_ok());
    assert_eq!(at(NOW + 60), Err(Error::Token { reason: "expired 0 s ago".into() }));
    assert_eq!(at(NOW + 65), Err(Error::Token { reason: "expired 5 s ago".into() }));
    assert!(at(i64::MAX).is_err());
    assert!(at(i64::MIN).is_ok());
    let old = sign(&Claims { exp: i64::MIN, ..claims(Grant::All) }, SECRET).unwrap();
    assert!(refusal(&old).starts_with("expired"));
}

#[test]
fn a_start_given_by_another_signer_is_kept() {
    let mut claims = full();
    claims["nbf"] = json!(NOW);
    assert!(verify(&signed(&claims), SECRET, NOW).is_ok());
    claims["nbf"] = json!(NOW + 1);
    assert_eq!(refusal(&signed(&claims)), "not valid yet");
}

#[test]
fn only_the_signers_secret_opens_it() {
    let token = sign(&claims(Grant::All), b"another secret").unwrap();
    assert_eq!(refusal(&token), "the signature does not match");
    for secret in [b"".as_slice(), b"a secret of the tes", b"a secret of the test "] {
        assert!(verify(&sign(&claims(Grant::All), SECRET).unwrap(), secret, NOW).is_err());
    }
}

#[test]
fn an_empty_secret_neither_signs_nor_opens() {
    let empty = Error::Token { reason: "the secret is empty".into() };
    assert_eq!(sign(&claims(Grant::All), b""), Err(empty.clone()));
    let token = forged(r#"{"alg":"HS256"}"#, &full().to_string(), b"", Algorithm::HS256);
    assert_eq!(verify(&token, b"", NOW), Err(empty));
}

#[test]
fn changed_claims_do_not_fit_the_signature() {
    let token = sign(&claims(Grant::Channels(vec![])), SECRET).unwrap();
    let parts: Vec<&str> = token.split('.').collect();
    let wider = base64(full().to_string().as_bytes());
    assert_eq!(refusal(&format!("{}.{wider}.{}", parts[0], parts[2])), "the signature does not match");
    assert_eq!(refusal(&format!("{}.{}.", parts[0], parts[1])), "the signature does not match");
}

#[test]
fn every_algorithm_but_hs256_is_refused() {
    let claims = full().to_string();
    let unsigned =
        |alg: &str| format!("{}.{}.", base64(format!(r#"{{"alg":"{alg}"}}"#).as_bytes()), base64(claims.as_bytes()));
    for alg in ["none", "None", "NONE", "nOnE", ""] {
        assert_eq!(refusal(&unsigned(alg)), "it is malformed", "{alg}");
        let header = format!(r#"{{"alg":"{alg}"}}"#);
        assert_eq!(refusal(&forged(&header, &claims, SECRET, Algorithm::HS256)), "it is malformed", "{alg}");
    }
    for alg in ["HS384", "HS512", "RS256", "RS512", "PS256", "ES256", "EdDSA"] {
        assert_eq!(refusal(&unsigned(alg)), "only HS256 is accepted", "{alg}");
        let header = format!(r#"{{"alg":"{alg}"}}"#);
        assert_eq!(refusal(&forged(&header, &claims, SECRET, Algorithm::HS256)), "only HS256 is accepted", "{alg}");
    }
    let rightly = forged(r#"{"typ":"JWT","alg":"HS512"}"#, &claims, SECRET, Algorithm::HS512);
    assert_eq!(refusal(&rightly), "only HS256 is accepted");
}

#[test]
fn headers_that_ask_for_more_are_refused() {
    let header = r#"{"alg":"HS256","crit":["b64"],"b64":"no"}"#;
    assert_eq!(refusal(&forged(header, &full().to_string(), SECRET, Algorithm::HS256)), "it has a critical extension");
    let mut claims = full();
    claims["aud"] = json!("another service");
    assert_eq!(refusal(&signed(&claims)), "it is meant for another audience");
}

#[test]
fn missing_and_wrong_claims_are_refused() {
    assert!(verify(&signed(&full()), SECRET, NOW).is_ok());
    for name in ["db", "oid", "channels", "iat", "exp"] {
        let mut claims = full();
        claims.as_object_mut().unwrap().remove(name);
        assert_eq!(refusal(&signed(&claims)), "it is malformed", "{name}");
        claims[name] = Value::Null;
        assert_eq!(refusal(&signed(&claims)), "it is malformed", "{name}");
    }
    let wrong = [
        ("oid", json!(-1)),
        ("oid", json!("16384")),
        ("exp", json!("never")),
        ("exp", json!(1e300)),
        ("db", json!(["db"])),
        ("admin", json!("yes")),
        ("sub", json!(1)),
        ("channels", json!("*")),
    ];
    for (name, value) in wrong {
        let mut claims = full();
        claims[name] = value;
        assert_eq!(refusal(&signed(&claims)), "it is malformed", "{name}");
    }
    for claims in ["[]", "1", "null", "", "{", r#"{"exp":9,"exp":99999999999}"#] {
        let token = forged(r#"{"alg":"HS256"}"#, claims, SECRET, Algorithm::HS256);
        assert_eq!(refusal(&token), "it is malformed", "{claims}");
    }
}

#[test]
fn garbage_is_refused() {
    let token = sign(&claims(Grant::All), SECRET).unwrap();
    let cases =
        ["", ".", "..", "...", "a.b.c", "é.é.é", "Bearer x", &token[1..], &format!("{token}.x"), &format!(" {token}")];
    for text in cases {
        assert!(matches!(verify(text, SECRET, NOW), Err(Error::Token { .. })), "{text}");
    }
}

/// A channel whose first element may be the database's own name.
fn any_channel() -> impl Strategy<Value = Channel> {
    let first = prop_oneof![Just("db".to_owned()), ".{1,6}"];
    let tail = prop::collection::vec(
        prop_oneof![Just(r#""db""#.to_owned()), "-?[1-9][0-9]{0,9}", Just("true".to_owned())],
        0..3,
    );
    (first, tail).prop_map(|(first, tail)| {
        let elements: Vec<String> =
            [r#""db""#.to_owned(), crate::core::json::string(&first)].into_iter().chain(tail).collect();
        Channel::from_row(&format!("[{}]", elements.join(",")), "db").unwrap()
    })
}

proptest! {
    #[test]
    fn any_grant_comes_back(
        channels in prop::collection::vec(any_channel(), 0..6), oid in any::<u32>(), iat in any::<i64>(),
        sub in any::<Option<String>>(), admin in any::<bool>(), secret in prop::collection::vec(any::<u8>(), 1..80),
    ) {
        let claims = Claims { oid, iat, sub, admin, ..claims(Grant::Channels(channels)) };
        prop_assert_eq!(verify(&sign(&claims, &secret).unwrap(), &secret, NOW), Ok(claims));
    }

    #[test]
    fn a_token_with_any_character_changed_is_refused(place in any::<prop::sample::Index>(), by in any::<char>()) {
        let token = sign(&claims(Grant::All), SECRET).unwrap();
        let mut chars: Vec<char> = token.chars().collect();
        let at = place.index(chars.len());
        prop_assume!(chars[at] != by);
        chars[at] = by;
        let changed: String = chars.into_iter().collect();
        prop_assert!(verify(&changed, SECRET, NOW).is_err(), "{}", changed);
    }

    #[test]
    fn nothing_panics(
        token in any::<String>(), parts in "[A-Za-z0-9_=-]{0,20}\\.[A-Za-z0-9_-]{0,20}\\.[A-Za-z0-9_-]{0,20}",
    ) {
        prop_assert!(verify(&token, SECRET, NOW).is_err());
        prop_assert!(verify(&parts, SECRET, NOW).is_err());
    }

    #[test]
    fn any_claims_that_are_well_signed_do_not_panic(claims in crate::core::json::tests::value()) {
        let token = forged(r#"{"alg":"HS256"}"#, &claims.0, SECRET, Algorithm::HS256);
        prop_assert!(verify(&token, SECRET, NOW).is_err());
    }
}
