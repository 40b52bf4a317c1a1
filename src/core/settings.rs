//! The settings the network threads work by: a plain copy of the `imbus.*` settings, made on the main thread (pg::guc)
//! and handed over whole, again at each reload.

use std::time::Duration;

/// A way to prove who may subscribe (`imbus.auth`, tried in order).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthMethod {
    /// A signed token says what its bearer may subscribe to.
    Token,
    /// Odoo itself says it, of the request's cookies.
    Odoo,
    /// A function of the database named in `?db=` says it.
    Function,
}

/// What the network threads need of `imbus.*`; each field is the setting of the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// TCP port, 0 for any free one (fixed at start).
    pub port: u16,
    /// Addresses to listen on, as in `listen_addresses`: IP addresses, host names or `*` (fixed at start).
    pub listen_addresses: Vec<String>,
    /// Reactor threads (fixed at start).
    pub io_threads: usize,
    pub auth: Vec<AuthMethod>,
    /// Where Odoo itself is reached: `http://host:port`.
    pub odoo_url: String,
    /// Calls of Odoo at once.
    pub odoo_concurrency: usize,
    /// Age at which what Odoo said of a session is asked again; zero for never.
    pub session_recheck: Duration,
    /// Key of the tokens (HS256).
    pub token_secret: Vec<u8>,
    /// Origins accepted besides the request's own host (`https://odoo.example.com`, or `*` for any).
    pub allowed_origins: Vec<String>,
    pub max_connections: usize,
    /// Whether compression is agreed to with clients that offer it, and what is sent to them compressed.
    pub compression: bool,
    /// Bytes that may wait in one connection's outbound queue.
    pub send_queue_max: usize,
    /// Incoming frames allowed within `rate_limit_burst` × `rate_limit_delay`.
    pub rate_limit_burst: u32,
    pub rate_limit_delay: Duration,
    /// Age after which a connection is asked to reconnect (up to half as long again, at random).
    pub keepalive: Duration,
    /// Silence after which a ping is sent.
    pub ping_interval: Duration,
}

/// A database that has the extension, as the gateway's main thread knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Database {
    pub oid: u32,
    pub name: String,
}
