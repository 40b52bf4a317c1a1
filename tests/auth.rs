//! Nobody gets in without a valid proof, and nobody reads more than the proof names.

mod common;

use common::{Cluster, Ended, Socket, eventually, exchange, shared, status, token};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use postgres::Client;
use serde_json::{Value, json};
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};
use tungstenite::Error;

/// `{"alg":"none","typ":"JWT"}` and `{"alg":"None","typ":"JWT"}` as a token begins with them.
const NONE: [&str; 2] = ["eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0", "eyJhbGciOiJOb25lIiwidHlwIjoiSldUIn0"];

/// A database that these tests share, as they change nothing in it.
fn demo(cluster: &Cluster) -> Client {
    static MADE: OnceLock<()> = OnceLock::new();
    MADE.get_or_init(|| drop(cluster.database("demo")));
    cluster.connect("demo")
}

fn now() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap()
}

/// The claims of a good token for channel `broadcast` of the client's database.
fn claims(sql: &mut Client) -> Value {
    let row =
        sql.query_one("SELECT datname::text, oid FROM pg_database WHERE datname = current_database()", &[]).unwrap();
    json!({"db": row.get::<_, String>(0), "oid": row.get::<_, u32>(1), "channels": ["broadcast"], "iat": now(),
           "exp": now() + 3600, "sub": "test"})
}

/// The secret that the cluster made at its first start.
fn secret(cluster: &Cluster) -> Vec<u8> {
    let secret = std::fs::read(cluster.dir.join("data/imbus_token_secret")).unwrap();
    assert_eq!(secret.len(), 32);
    secret
}

fn sign(claims: &Value, secret: &[u8]) -> String {
    sign_with(claims, secret, Algorithm::HS256)
}

fn sign_with(claims: &Value, secret: &[u8], algorithm: Algorithm) -> String {
    jsonwebtoken::encode(&Header::new(algorithm), claims, &EncodingKey::from_secret(secret)).unwrap()
}

/// How a websocket with these credentials ends right after the upgrade.
fn refusal(port: u16, path: &str, headers: &[(&'static str, &str)]) -> (u16, String) {
    let mut socket = Socket::open_path(port, path, headers).expect("the refusal comes after the upgrade");
    // What a client asks for before it has read the refusal does not matter.
    socket.subscribe(json!(["broadcast"]), 0);
    match socket.ended() {
        Ended::Close(code, reason) => (code, reason),
        Ended::Dropped => panic!("dropped without a close frame"),
    }
}

fn refused(port: u16, token: &str) -> u16 {
    refusal(port, &format!("/websocket?version=18.0-7&token={token}"), &[]).0
}

/// Whether a token gets its bearer a notification on `broadcast`.
fn accepted(sql: &mut Client, mut socket: Socket) {
    socket.subscribe(json!(["broadcast"]), 0);
    socket.sync(sql);
    let mark = socket.ws.get_ref().local_addr().unwrap().to_string();
    let payload = json!(mark).to_string();
    sql.execute("SELECT bus_sendone('broadcast', 't', $1::text::jsonb)", &[&payload]).unwrap();
    while socket.payload() != json!(mark) {}
}

/// The status of a handshake with these header lines.
fn handshake(port: u16, target: &str, lines: &[&str]) -> u16 {
    status(&exchange(port, format!("GET {target} HTTP/1.1\r\n{}\r\n\r\n", lines.join("\r\n")).as_bytes()))
}

/// The header lines of a good handshake of the same host, without those that begin with `without`.
fn lines(port: u16, without: &str) -> Vec<String> {
    let all = [
        format!("Host: 127.0.0.1:{port}"),
        format!("Origin: http://127.0.0.1:{port}"),
        "Upgrade: websocket".to_owned(),
        // "close" ends the connection after an answer that is no upgrade.
        "Connection: Upgrade, close".to_owned(),
        "Sec-WebSocket-Version: 13".to_owned(),
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==".to_owned(),
    ];
    all.into_iter().filter(|line| without.is_empty() || !line.starts_with(without)).collect()
}

fn handshake_without(port: u16, token: &str, without: &str, with: &str) -> u16 {
    let mut lines = lines(port, without);
    if !with.is_empty() {
        lines.push(with.to_owned());
    }
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    handshake(port, &format!("/websocket?version=18.0-7&token={token}"), &lines)
}

/// Sets a setting for the cluster and has it read.
fn set(cluster: &Cluster, setting: &str, value: &str) {
    let mut admin = cluster.connect("postgres");
    admin.batch_execute(&format!("ALTER SYSTEM SET {setting} = '{value}'")).unwrap();
    admin.batch_execute("SELECT pg_reload_conf()").unwrap();
}

// ---------------------------------------------------------------------------------------------------------------------
// Where the proof stands

#[test]
fn a_token_in_the_query_lets_in() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let socket = cluster.socket(&mut sql, json!(["broadcast"]));
    accepted(&mut sql, socket);
}

#[test]
fn a_token_in_the_authorization_header_lets_in() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let (port, bearer) = (cluster.ws_port(&mut sql), format!("Bearer {}", token(&mut sql, &json!(["broadcast"]))));
    let socket = Socket::open_path(port, "/websocket?version=18.0-7", &[("Authorization", &bearer)]).unwrap();
    accepted(&mut sql, socket);
}

#[test]
fn a_token_in_the_cookie_lets_in() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let cookie = format!("session_id=x; imbus_token={}; lang=en", token(&mut sql, &json!(["broadcast"])));
    let port = cluster.ws_port(&mut sql);
    let socket = Socket::open_path(port, "/websocket?version=18.0-7", &[("Cookie", &cookie)]).unwrap();
    accepted(&mut sql, socket);
}

// ---------------------------------------------------------------------------------------------------------------------
// What is no proof

#[test]
fn no_token_is_refused_after_the_upgrade() {
    let cluster = shared();
    let port = cluster.ws_port(&mut demo(&cluster));
    assert_eq!(refusal(port, "/websocket?version=18.0-7", &[]), (4401, "no token".to_owned()));
    assert_eq!(refusal(port, "/websocket?version=18.0-7", &[("Cookie", "session_id=x")]).0, 4401);
    assert_eq!(refusal(port, "/websocket?version=18.0-7", &[("Authorization", "Basic YTpi")]).0, 4401);
}

#[test]
fn garbage_for_a_token_is_refused() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let port = cluster.ws_port(&mut sql);
    let good = token(&mut sql, &json!(["broadcast"]));
    let (half, padded) = (&good[..good.len() / 2], format!("{good}."));
    for garbage in ["", "x", "a.b.c", "...", "%00%ff%2e", half, &padded, &"A".repeat(6000)] {
        assert_eq!(refused(port, garbage), 4401, "{garbage:?}");
    }
}

#[test]
fn a_token_of_our_own_signed_with_the_kept_secret_lets_in() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let token = sign(&claims(&mut sql), &secret(&cluster));
    let socket = Socket::open(cluster.ws_port(&mut sql), &token);
    accepted(&mut sql, socket);
}

#[test]
fn an_expired_token_is_refused() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let port = cluster.ws_port(&mut sql);
    let mut claims = claims(&mut sql);
    for age in [0, 1, 30, 3600] {
        claims["exp"] = json!(now() - age);
        assert_eq!(refused(port, &sign(&claims, &secret(&cluster))), 4401, "expired {age} s ago");
    }
}

#[test]
fn a_token_without_expiry_is_refused() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let mut claims = claims(&mut sql);
    claims.as_object_mut().unwrap().remove("exp");
    assert_eq!(refused(cluster.ws_port(&mut sql), &sign(&claims, &secret(&cluster))), 4401);
}

#[test]
fn a_forged_signature_is_refused() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let port = cluster.ws_port(&mut sql);
    let claims = claims(&mut sql);
    assert_eq!(refused(port, &sign(&claims, b"another secret")), 4401);
    assert_eq!(refused(port, &sign(&claims, b"")), 4401);
    // More rights under the signature of fewer.
    let good = token(&mut sql, &json!(["broadcast"]));
    let more = sign(&json!({"channels": ["*"]}), b"another secret");
    let (good, more): (Vec<&str>, Vec<&str>) = (good.split('.').collect(), more.split('.').collect());
    assert_eq!(refused(port, &[good[0], more[1], good[2]].join(".")), 4401);
    assert_eq!(refused(port, &[good[0], good[1], ""].join(".")), 4401);
}

#[test]
fn a_token_with_alg_none_is_refused() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let port = cluster.ws_port(&mut sql);
    let good = token(&mut sql, &json!(["broadcast"]));
    let parts: Vec<&str> = good.split('.').collect();
    for header in NONE {
        for signature in ["", parts[2]] {
            assert_eq!(refused(port, &[header, parts[1], signature].join(".")), 4401);
        }
        assert_eq!(refused(port, &[header, parts[1]].join(".")), 4401);
    }
}

#[test]
fn another_algorithm_with_the_right_secret_is_refused() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let claims = claims(&mut sql);
    let port = cluster.ws_port(&mut sql);
    for algorithm in [Algorithm::HS384, Algorithm::HS512] {
        assert_eq!(refused(port, &sign_with(&claims, &secret(&cluster), algorithm)), 4401, "{algorithm:?}");
    }
}

#[test]
fn a_token_of_another_database_is_refused() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let (port, secret, good) = (cluster.ws_port(&mut sql), secret(&cluster), claims(&mut sql));
    let oid = good["oid"].as_u64().unwrap();
    for (db, oid) in [("demo", oid + 1), ("demo", 0), ("nobody", oid), ("postgres", oid), ("Demo", oid)] {
        let mut claims = good.clone();
        claims["db"] = json!(db);
        claims["oid"] = json!(oid);
        assert_eq!(refused(port, &sign(&claims, &secret)), 4401, "{db} {oid}");
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What a proof allows

#[test]
fn a_channel_outside_the_claims_is_refused_by_name() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    for channels in [json!(["broadcast", "secret"]), json!(["secret"]), json!([["secret", 42]])] {
        let mut socket = cluster.socket(&mut sql, json!(["broadcast", ["secret", 43]]));
        socket.subscribe(channels.clone(), 0);
        match socket.ended() {
            Ended::Close(4403, reason) => assert!(reason.contains("secret"), "{channels}: {reason}"),
            ended => panic!("{channels}: {ended:?}"),
        }
    }
}

#[test]
fn a_star_in_the_claims_allows_every_channel() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    for (number, claims) in [json!("*"), json!(["*"]), json!(["broadcast", "*"])].into_iter().enumerate() {
        let mut socket = cluster.socket(&mut sql, claims.clone());
        let channel = format!("anything {number}");
        socket.subscribe(json!([channel, ["res.partner", 42]]), 0);
        socket.sync(&mut sql);
        sql.execute("SELECT bus_sendone($1::text, 't', '1')", &[&channel]).unwrap();
        assert_eq!(socket.payload(), json!(1), "{claims}");
    }
}

#[test]
fn a_star_asked_for_is_a_channel_like_any_other() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let mut socket = cluster.socket(&mut sql, json!(["broadcast"]));
    socket.subscribe(json!(["*"]), 0);
    assert!(matches!(socket.ended(), Ended::Close(4403, _)));
}

#[test]
fn a_token_that_expires_while_connected_ends_the_connection() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let port = cluster.ws_port(&mut sql);
    let token: String = sql.query_one("SELECT bus_token('[\"brief\"]', '10 seconds')", &[]).unwrap().get(0);
    let mut socket = Socket::open(port, &token);
    socket.subscribe(json!(["brief"]), 0);
    socket.sync(&mut sql);
    socket.only(&mut sql, "brief");
    assert!(matches!(socket.ended(), Ended::Close(4401, _)));
    assert_eq!(refused(port, &token), 4401);
}

#[test]
fn another_token_secret_ends_the_old_tokens_and_makes_new_ones() {
    let cluster = Cluster::start();
    let mut sql = cluster.database("demo");
    let port = cluster.ws_port(&mut sql);
    let old = token(&mut sql, &json!(["broadcast"]));
    accepted(&mut sql, Socket::open(port, &old));
    set(&cluster, "imbus.token_secret", "a secret of the administrator");
    let path = format!("/websocket?version=18.0-7&token={old}");
    eventually("the old token is refused", || {
        let mut socket = Socket::open_path(port, &path, &[]).unwrap();
        // An accepted one is ended by a channel it does not name.
        socket.subscribe(json!(["not in the token"]), 0);
        matches!(socket.ended(), Ended::Close(4401, _))
    });
    let new = token(&mut sql, &json!(["broadcast"]));
    accepted(&mut sql, Socket::open(port, &new));
    let own = sign(&claims(&mut sql), b"a secret of the administrator");
    accepted(&mut sql, Socket::open(port, &own));
    assert_eq!(refused(port, &sign(&claims(&mut sql), &secret(&cluster))), 4401);
}

#[test]
fn the_token_secret_is_kept_across_a_restart_and_from_others() {
    use std::os::unix::fs::MetadataExt;
    let cluster = Cluster::start();
    let mut sql = cluster.database("demo");
    let before = token(&mut sql, &json!(["broadcast"]));
    cluster.pg_ctl(&["-m", "fast", "-w", "restart"]);
    cluster.wait_served("demo");
    let mut sql = cluster.connect("demo");
    let port = cluster.ws_port(&mut sql);
    accepted(&mut sql, Socket::open(port, &before));
    let mode = std::fs::metadata(cluster.dir.join("data/imbus_token_secret")).unwrap().mode();
    assert_eq!(mode & 0o077, 0, "{mode:o}");
}

// ---------------------------------------------------------------------------------------------------------------------
// The handshake

#[test]
fn a_foreign_origin_is_forbidden() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let port = cluster.ws_port(&mut sql);
    let path = format!("/websocket?version=18.0-7&token={}", token(&mut sql, &json!(["broadcast"])));
    for origin in ["https://evil.example", "null", "http://127.0.0.1", "http://127.0.0.1.evil.example"] {
        match Socket::open_path(port, &path, &[("Origin", origin)]) {
            Err(Error::Http(response)) => assert_eq!(response.status(), 403, "{origin}"),
            Err(error) => panic!("{origin}: {error}"),
            Ok(_) => panic!("{origin} was let in"),
        }
    }
}

#[test]
fn an_allowed_origin_is_let_in_after_a_reload() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let port = cluster.ws_port(&mut sql);
    let path = format!("/websocket?version=18.0-7&token={}", token(&mut sql, &json!(["broadcast"])));
    let origin = [("Origin", "https://shop.example.com")];
    assert!(matches!(Socket::open_path(port, &path, &origin), Err(Error::Http(response)) if response.status() == 403));
    set(&cluster, "imbus.allowed_origins", "https://shop.example.com, https://other.example.com:8443");
    eventually("the origin is allowed", || Socket::open_path(port, &path, &origin).is_ok());
    let socket = Socket::open_path(port, &path, &[("Origin", "https://other.example.com:8443")]).unwrap();
    accepted(&mut sql, socket);
    let other_port = [("Origin", "https://other.example.com")];
    assert!(Socket::open_path(port, &path, &other_port).is_err());
}

#[test]
fn an_outdated_browser_is_told_to_reload() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let port = cluster.ws_port(&mut sql);
    let token = token(&mut sql, &json!(["broadcast"]));
    for version in ["version=17.0-3&", "version=18.0-1&", "version=&", "version=x&", ""] {
        let path = format!("/websocket?{version}token={token}");
        let refusal = refusal(port, &path, &[("User-Agent", "Mozilla/5.0")]);
        assert_eq!(refusal, (1000, "OUTDATED_VERSION".to_owned()), "{version:?}");
    }
    for version in ["18.0-2", "18.0-7", "saas~18.1-1", "19.0-1"] {
        let path = format!("/websocket?version={version}&token={token}");
        let socket = Socket::open_path(port, &path, &[("User-Agent", "Mozilla/5.0")]).unwrap();
        accepted(&mut sql, socket);
    }
}

#[test]
fn without_user_agent_no_version_is_needed() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let port = cluster.ws_port(&mut sql);
    let token = token(&mut sql, &json!(["broadcast"]));
    for version in ["version=17.0-3&", ""] {
        let socket = Socket::open_path(port, &format!("/websocket?{version}token={token}"), &[]).unwrap();
        accepted(&mut sql, socket);
    }
}

#[test]
fn a_handshake_without_a_needed_header_is_a_bad_request() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let port = cluster.ws_port(&mut sql);
    let token = token(&mut sql, &json!(["broadcast"]));
    for name in ["Origin", "Host", "Upgrade", "Sec-WebSocket-Version", "Sec-WebSocket-Key"] {
        assert_eq!(handshake_without(port, &token, name, ""), 400, "{name}");
    }
    for (name, wrong) in [
        ("Sec-WebSocket-Key", "Sec-WebSocket-Key: short"),
        ("Upgrade", "Upgrade: h2c"),
        ("Connection", "Connection: close"),
    ] {
        assert_eq!(handshake_without(port, &token, name, wrong), 400, "{wrong}");
    }
}

#[test]
fn another_websocket_version_is_told_the_right_one() {
    let cluster = shared();
    let mut sql = demo(&cluster);
    let port = cluster.ws_port(&mut sql);
    let token = token(&mut sql, &json!(["broadcast"]));
    let mut lines = lines(port, "Sec-WebSocket-Version");
    lines.push("Sec-WebSocket-Version: 12".to_owned());
    let request = format!("GET /websocket?token={token} HTTP/1.1\r\n{}\r\n\r\n", lines.join("\r\n"));
    let answer = exchange(port, request.as_bytes());
    assert_eq!(status(&answer), 426);
    assert!(answer.contains("\r\nSec-WebSocket-Version: 13\r\n"), "{answer}");
}
