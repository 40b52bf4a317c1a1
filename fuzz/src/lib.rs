//! What the fuzz targets do with their bytes. Each `run` states what must hold for any input and panics where it does
//! not; `cargo test --features testing --test corpus` gives it all of the corpus, on stable Rust.

pub mod channel;
pub mod http;
pub mod json;
pub mod link;
pub mod payload;
pub mod protocol;
pub mod token;
pub mod websocket;

use imbus::core::settings::{AuthMethod, Database, Settings};
use imbus::core::token::{Claims, Grant, sign};
use imbus::net::testing::World;
use std::sync::OnceLock;
use std::time::Duration;

/// What the tokens of these targets are signed with; those in the corpus too.
pub const SECRET: &[u8] = b"a secret of the fuzz targets";

/// The time of day in all targets, in Unix seconds.
pub const NOW: i64 = 1_700_000_000;

/// A world where connections are driven by hand; rate limits are off, since what they refuse depends on how the
/// bytes are cut.
pub fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let settings = Settings {
            port: 0,
            listen_addresses: Vec::new(),
            io_threads: 1,
            auth: vec![AuthMethod::Token, AuthMethod::Function],
            odoo_url: "http://127.0.0.1:1".to_owned(),
            odoo_concurrency: 8,
            session_recheck: Duration::from_secs(60),
            token_secret: SECRET.to_vec(),
            allowed_origins: vec!["http://allowed".to_owned()],
            max_connections: 10,
            compression: true,
            send_queue_max: 1 << 20,
            rate_limit_burst: 0,
            rate_limit_delay: Duration::ZERO,
            keepalive: Duration::ZERO,
            ping_interval: Duration::ZERO,
        };
        World::new(settings, vec![Database { oid: 5, name: "demo".to_owned() }], NOW)
    })
}

/// A token for all channels of the database.
pub fn token() -> &'static str {
    static TOKEN: OnceLock<String> = OnceLock::new();
    TOKEN.get_or_init(|| {
        let db = "demo".to_owned();
        let claims = Claims { db, oid: 5, channels: Grant::All, iat: NOW, exp: NOW + 60, sub: None, admin: false };
        sign(&claims, SECRET).expect("a token")
    })
}

/// The bytes in pieces. The first byte of the input says how: whole, byte by byte, or by the lengths that a small
/// generator seeded with it gives.
pub fn cut(bytes: &[u8], how: u8) -> Vec<&[u8]> {
    let mut seed = u32::from(how);
    let (mut pieces, mut rest) = (Vec::new(), bytes);
    while !rest.is_empty() {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let length = match how {
            0 => rest.len(),
            1 => 1,
            2..=127 => 1 + (seed >> 24) as usize % 8,
            _ => 1 + (seed >> 16) as usize % 1500,
        };
        let (piece, tail) = rest.split_at(length.min(rest.len()));
        pieces.push(piece);
        rest = tail;
    }
    pieces
}
