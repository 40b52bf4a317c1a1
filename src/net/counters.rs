//! What the network threads count, for the views and for `/metrics`. Cumulative since the gateway started, but for the
//! two `_open` ones; read at any time by the main thread.

use std::sync::atomic::{AtomicU64, Ordering};

/// All counters of the gateway's network side.
#[derive(Debug, Default)]
pub struct Counters {
    /// TCP connections open now, whatever they speak; what `imbus.max_connections` limits.
    pub sockets_open: AtomicU64,
    /// Websockets open now.
    pub connections_open: AtomicU64,
    /// Websockets opened.
    pub connections_total: AtomicU64,
    /// Requests for a websocket that were refused, by an HTTP error or by a close right after the upgrade.
    pub handshakes_rejected: AtomicU64,
    /// Data messages received from clients.
    pub messages_received: AtomicU64,
    /// Notifications sent, counted once per receiver.
    pub notifications_sent: AtomicU64,
    /// Frames with notifications sent, counted once per receiver.
    pub frames_sent: AtomicU64,
    /// Bytes written to clients.
    pub bytes_sent: AtomicU64,
    /// Connections closed because they read too slowly.
    pub slow_consumers: AtomicU64,
    /// Open websockets closed for what the client did or was not allowed to: 1002, 1007, 1009, 1013 for its rate, 4401,
    /// 4403.
    pub closed_by_policy: AtomicU64,
    /// Subscriptions that had to be recovered.
    pub recoveries: AtomicU64,
}

impl Counters {
    /// Adds to one of the counters.
    pub(super) fn add(counter: &AtomicU64, number: usize) {
        counter.fetch_add(number as u64, Ordering::Relaxed);
    }

    /// Takes one off an `_open` counter.
    pub(super) fn less(counter: &AtomicU64) {
        counter.fetch_sub(1, Ordering::Relaxed);
    }
}
