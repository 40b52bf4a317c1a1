//! What time does to a connection: the clock is the test's.

use super::*;
use crate::core::settings::{AuthMethod, Database, Settings};
use crate::core::token::{Claims, Grant, sign};
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SECRET: &[u8] = b"a secret of the tests";

fn env() -> Env {
    let settings = Settings {
        port: 0,
        listen_addresses: Vec::new(),
        io_threads: 1,
        auth: vec![AuthMethod::Token],
        odoo_url: String::new(),
        odoo_concurrency: 1,
        session_recheck: Duration::ZERO,
        token_secret: SECRET.to_vec(),
        allowed_origins: vec!["*".to_owned()],
        max_connections: 1,
        compression: true,
        send_queue_max: 100,
        rate_limit_burst: 10,
        rate_limit_delay: Duration::from_millis(200),
        keepalive: Duration::from_secs(3600),
        ping_interval: Duration::from_secs(45),
    };
    let databases = vec![Database { oid: 5, name: "demo".to_owned() }];
    let mut env = Env::new(Arc::new(settings), Arc::new(databases), Arc::default(), Instant::now());
    (env.now, env.unix_ms) = (1_000, 1_000_000);
    env
}

/// A connection and the client's end of it.
fn pair(env: &Env) -> (Connection, std::net::TcpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, address) = listener.accept().unwrap();
    server.set_nonblocking(true).unwrap();
    (Connection::new(1, TcpStream::from_std(server), address, false, env.now), client)
}

/// Reads until something was read that makes a difference.
fn read(connection: &mut Connection, env: &Env) -> Turn {
    let start = Instant::now();
    loop {
        connection.socket.begin_turn(env.settings.send_queue_max);
        match connection.read(env) {
            Turn::Wait if start.elapsed() < Duration::from_secs(10) => std::thread::yield_now(),
            turn => return turn,
        }
    }
}

fn open(env: &Env, expires_in: i64) -> (Connection, std::net::TcpStream) {
    open_with(env, expires_in, "")
}

/// With further headers.
fn open_with(env: &Env, expires_in: i64, headers: &str) -> (Connection, std::net::TcpStream) {
    let exp = env.unix_ms / 1000 + expires_in;
    let claims = Claims { db: "demo".to_owned(), oid: 5, channels: Grant::All, iat: 0, exp, sub: None, admin: false };
    let (mut connection, mut client) = pair(env);
    let token = sign(&claims, SECRET).unwrap();
    let request = format!(
        "GET /websocket?token={token} HTTP/1.1\r\nHost: x\r\nOrigin: x\r\nUpgrade: websocket\r\n\
         Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
    );
    client.write_all(request.as_bytes()).unwrap();
    assert!(matches!(read(&mut connection, env), Turn::Opened));
    connection.flush(env).unwrap();
    (connection, client)
}

/// What the client has got so far after a flush.
fn got(connection: &mut Connection, client: &mut std::net::TcpStream, env: &Env) -> String {
    connection.flush(env).unwrap();
    let mut bytes = [0; 1024];
    let count = client.read(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes[..count]).into_owned()
}

#[test]
fn a_head_may_take_ten_seconds() {
    let mut env = env();
    let (mut connection, mut client) = pair(&env);
    client.write_all(b"GET /websocket HTT").unwrap();
    assert_eq!(connection.deadline(&env), env.now + 10_000);
    env.now += 9_999;
    assert!(matches!(connection.due(&env), Turn::Wait));
    env.now += 1;
    assert!(matches!(connection.due(&env), Turn::Closing));
    assert!(got(&mut connection, &mut client, &env).starts_with("HTTP/1.1 408 "));
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    env.now += DRAIN_WAIT;
    assert!(matches!(connection.due(&env), Turn::Gone));
}

#[test]
fn an_idle_connection_is_let_go_without_a_word() {
    let mut env = env();
    let (mut connection, mut client) = pair(&env);
    client.write_all(b"GET /websocket/health HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    while !connection.socket.take_heard() {
        connection.socket.begin_turn(100);
        assert!(matches!(connection.read(&env), Turn::Wait));
    }
    assert!(got(&mut connection, &mut client, &env).starts_with("HTTP/1.1 200 "));
    env.now += IDLE_WAIT;
    assert!(matches!(connection.due(&env), Turn::Gone));
}

#[test]
fn a_client_that_answers_no_ping_is_gone() {
    let mut env = env();
    let (mut connection, mut client) = open(&env, 1_000);
    assert!(got_101(&mut client));
    assert_eq!(connection.deadline(&env), env.now + 45_000);
    env.now += 45_000;
    assert!(matches!(connection.due(&env), Turn::Wait));
    assert_eq!(got(&mut connection, &mut client, &env), String::from_utf8_lossy(&[0x89, 0]));
    env.now += 14_999;
    assert!(matches!(connection.due(&env), Turn::Wait));
    env.now += 1;
    assert!(matches!(connection.due(&env), Turn::Gone));
}

#[test]
fn anything_heard_is_an_answer_to_a_ping() {
    let mut env = env();
    let (mut connection, mut client) = open(&env, 1_000);
    env.now += 45_000;
    assert!(matches!(connection.due(&env), Turn::Wait));
    env.now += 10_000;
    client.write_all(&[0x81, 0x82, 0, 0, 0, 0, b'{', b'}']).unwrap();
    assert!(matches!(read(&mut connection, &env), Turn::Ignored(_)));
    assert_eq!(connection.deadline(&env), env.now + 45_000);
    env.now += 44_999;
    assert!(matches!(connection.due(&env), Turn::Wait));
}

#[test]
fn a_token_ends_its_connection() {
    let mut env = env();
    let (mut connection, mut client) = open(&env, 20);
    assert!(got_101(&mut client));
    assert_eq!(connection.deadline(&env), env.now + 20_000);
    (env.now, env.unix_ms) = (env.now + 20_000, env.unix_ms + 20_000);
    assert!(matches!(connection.due(&env), Turn::Closing));
    assert!(got(&mut connection, &mut client, &env).contains("the token has expired"));
}

#[test]
fn age_ends_a_connection_after_one_to_one_and_a_half_keepalives() {
    let mut env = env();
    let (mut connection, _client) = open(&env, 1_000_000);
    Arc::make_mut(&mut env.settings).ping_interval = Duration::ZERO;
    let ends = connection.deadline(&env) - env.now;
    assert!((3_600_000..5_400_000).contains(&ends), "{ends}");
    env.now += ends;
    assert!(matches!(connection.due(&env), Turn::Closing));
}

#[test]
fn an_answer_to_a_close_is_awaited_for_a_while() {
    let mut env = env();
    let (mut connection, mut client) = open(&env, 1_000);
    assert!(got_101(&mut client));
    connection.close(&Close::new(CloseCode::GoingAway, ""), &env);
    assert_eq!(connection.flush(&env).unwrap(), (Flow::Empty, false), "the stream stays open");
    env.now += CLOSE_WAIT - 1;
    assert!(matches!(connection.due(&env), Turn::Wait));
    client.write_all(&[0x88, 0x80, 0, 0, 0, 0]).unwrap();
    assert!(matches!(read(&mut connection, &env), Turn::Closing));
    assert_eq!(connection.flush(&env).unwrap(), (Flow::Empty, true), "now it ends");
    drop(client);
    assert!(matches!(read(&mut connection, &env), Turn::Gone));
}

#[test]
fn frames_are_limited_to_a_burst_in_any_two_seconds() {
    let mut env = env();
    let (mut connection, mut client) = open(&env, 1_000);
    let text = [0x81, 0x82, 0, 0, 0, 0, b'{', b'}'];
    for _ in 0..25 {
        client.write_all(&text).unwrap();
        assert!(matches!(read(&mut connection, &env), Turn::Ignored(_)));
        env.now += 200;
    }
    env.now -= 1;
    client.write_all(&text).unwrap();
    assert!(matches!(read(&mut connection, &env), Turn::Closing), "1,999 ms after the one ten places earlier");
}

#[test]
fn a_turn_inflates_one_long_message_at_most() {
    use flate2::{Compress, Compression, FlushCompress};
    let env = env();
    let (mut connection, mut client) = open_with(&env, 1_000, "Sec-WebSocket-Extensions: permessage-deflate\r\n");
    let mut bytes = Vec::with_capacity(4096);
    let text = vec![b' '; 1 << 20];
    Compress::new(Compression::best(), false).compress_vec(&text, &mut bytes, FlushCompress::Sync).unwrap();
    bytes.truncate(bytes.len() - 4);
    let length = (bytes.len() as u16).to_be_bytes();
    let message = [&[0xc1, 0xfe][..], &length, &[0; 4], &bytes].concat();
    client.write_all(&message.repeat(2)).unwrap();
    for _ in 0..2 {
        assert!(matches!(read(&mut connection, &env), Turn::Ignored(_)));
        assert!(matches!(connection.read(&env), Turn::Again), "whatever waits, the others have their turn");
    }
    connection.socket.begin_turn(100);
    assert!(matches!(connection.read(&env), Turn::Wait));
}

fn got_101(client: &mut std::net::TcpStream) -> bool {
    let mut bytes = [0; 1024];
    let count = client.read(&mut bytes).unwrap();
    bytes[..count].starts_with(b"HTTP/1.1 101 ")
}
